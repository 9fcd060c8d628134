"""Small data sets made on the spot, and the builder's command line, for every test that needs a cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib.edf import write_edf
from lib.run import MEASURED

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "EEG FP1-REF",
    "EEG F3-REF",
    "EEG C3-REF",
    "EEG P3-REF",
    "EEG O1-REF",
    "EEG FP2-REF",
    "EEG C4-REF",
    "EEG O2-REF",
)
RULE = """name = "small"
pattern = 's(?P<subject>\\d+)_(?P<condition>[a-z]+)\\.edf'
[participants]
file = "people.csv"
id = "id"
id_pattern = 's(?P<subject>\\d+)'
columns = { age = "age", sex = "sex" }
"""


def noise_uv(rng: np.random.Generator, channels: int, samples: int, sd_uv: float = 20.0) -> np.ndarray:
    """Brownish noise with a 10 Hz rhythm in the last channels: float64 µV of the given deviation."""
    spectrum = rng.standard_normal((channels, samples // 2 + 1)) + 1j * rng.standard_normal(
        (channels, samples // 2 + 1)
    )
    x_CT = np.fft.irfft(spectrum / np.maximum(np.arange(samples // 2 + 1), 8) ** 0.5, samples)
    x_CT /= x_CT.std(axis=1, keepdims=True)
    return sd_uv * x_CT


def write_small(folder: Path, subjects: int = 4, seconds: int = 16, rate_hz: int = 200, seed: int = 0) -> Path:
    """`subjects` people, two EDF files each (rest, task), with events, ages and a dataset.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for s in range(subjects):
        for condition in ("rest", "task"):
            x_CT = noise_uv(rng, len(NAMES), seconds * rate_hz)
            if condition == "rest":
                x_CT[-4:] += 15 * np.sin(2 * np.pi * 10 * np.arange(x_CT.shape[1]) / rate_hz)
            events = [(2.0, 3.0, "look"), (7.5, 0.0, "press")]
            write_edf(folder / f"s{s:02d}_{condition}.edf", x_CT, rate_hz, NAMES, events)
    people = "".join(f"s{s:02d},{20 + 3 * s},{'FM'[s % 2]}\n" for s in range(subjects))
    (folder / "people.csv").write_text("id,age,sex\n" + people)
    (folder / "dataset.toml").write_text(RULE)
    return folder


def run(*words, script: str = "build_cache.py", env: dict | None = None, timeout_s: float = 240, **options):
    """Run a script's command line; returns (exit status, its JSON or None, stderr)."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        **options,
    )
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else None, done.stderr


def start(*words, script: str = "build_cache.py") -> subprocess.Popen:
    """Start a script in a process group of its own, to be killed with `kill`."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL the process and all its children at once, as a power cut does."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it was done already
        pass
    process.wait()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a cache by relative path, without locks."""
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and not p.name.endswith(".lock"))
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def flags(cfg) -> list[str]:
    """The command line that gives this configuration."""
    words = []
    for name, value in vars(cfg).items():
        if value != getattr(type(cfg)(), name):
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def log(run: Path) -> list[dict]:
    """The lines of a run's log without what depends on the clock."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def in_browser(page: Path, profile: Path) -> str:
    """What a real browser, cut off from every network, makes of a page."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no browser: install chromium to open the report in one")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    words = [browser, *options, f"--user-data-dir={profile}", "--dump-dom", f"file://{page}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
