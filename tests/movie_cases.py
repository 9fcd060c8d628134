"""A small cache of movies and rest: what every brain shares, and whose brain it is, are known."""

from pathlib import Path

import numpy as np

from lib.edf import write_edf
from tests import recipes

SMALL = "EEG FP1-REF,EEG F3-REF,EEG C3-REF,EEG P3-REF,EEG O1-REF,EEG FP2-REF,EEG C4-REF,EEG O2-REF".split(",")
WIDE = [f"E{i}" for i in range(1, 129, 11)]  # 12 of the 128
FILMS = ("DespicableMe", "ThePresent")
SECONDS, RATE_HZ, ONSET_S = 20, 200, 1.0
RULE = """name = "{}"
pattern = 's(?P<subject>\\d+)_(?P<task>[A-Za-z]+)\\.edf'
[split]
val = [{}]
test = [{}]
"""


def film(name: str) -> np.ndarray:
    """What a movie makes of every brain: float64 µV, slow and of its own."""
    rng = np.random.default_rng(len(name))
    spectrum = rng.standard_normal((SECONDS * RATE_HZ) // 2 + 1) + 1j * rng.standard_normal(SECONDS * RATE_HZ // 2 + 1)
    hz = np.fft.rfftfreq(SECONDS * RATE_HZ, 1 / RATE_HZ)
    x_T = np.fft.irfft(spectrum * ((hz >= 1) & (hz <= 6)), SECONDS * RATE_HZ)
    return x_T / x_T.std()


def write_cohort(folder: Path, subjects: int, shared_uv: float, seed: int = 0) -> list[Path]:
    """As many `subjects` with 8 and with 12 electrodes: two movies that begin 1 s to 1.5 s into the file, and rest."""
    rng, sources = np.random.default_rng(seed), []
    for name, electrodes in (("small", SMALL), ("wide", WIDE)):
        source = folder / name
        source.mkdir(parents=True)
        for s in range(subjects):
            weight_C = np.linspace(0.3, 1.0, len(electrodes)) * rng.uniform(0.8, 1.2, len(electrodes))
            t = np.arange(SECONDS * RATE_HZ) / RATE_HZ
            for task in FILMS:
                x_CT = recipes.noise_uv(rng, len(electrodes), len(t), 10.0)
                x_CT[:4] += 8 * np.sin(2 * np.pi * (8 + 0.7 * s) * t)  # whose brain it is
                late = ONSET_S + 0.1 * (s % 6)
                driven_T = np.roll(film(task), round(late * RATE_HZ))
                driven_T[: round(late * RATE_HZ)] = 0
                x_CT += shared_uv * weight_C[:, None] * driven_T
                events = [(late, 0.0, "video_start"), (SECONDS - 0.5, 0.0, "video_stop")]
                write_edf(source / f"s{s:02d}_{task}.edf", x_CT, RATE_HZ, electrodes, events)
            x_CT = recipes.noise_uv(rng, len(electrodes), len(t), 10.0)
            x_CT[4:] += 15 * np.sin(2 * np.pi * 10 * t) * (t % 10 >= 5)
            eyes = [(at, 5.0, ("eyes_open", "eyes_closed")[i % 2]) for i, at in enumerate(range(0, SECONDS, 5))]
            events = [*eyes, (3.0, 0.0, "blip"), (8.0, 0.0, "blip")]
            write_edf(source / f"s{s:02d}_RestingState.edf", x_CT, RATE_HZ, electrodes, events)
        held = [f'"{s:02d}"' for s in range(subjects)]
        val, test = held[1::3], held[2 : 3 if subjects > 5 else 2]
        (source / "dataset.toml").write_text(RULE.format(name, ", ".join(v for v in val), ", ".join(test)))
        sources.append(source)
    return sources


def build(folder: Path, subjects: int = 6, shared_uv: float = 10.0) -> Path:
    """The cache of such a cohort."""
    sources = write_cohort(folder / "edf", subjects, shared_uv)
    status, results, err = recipes.run("--source", *sources, "--cache", folder / "cache", "--workers", 1)
    assert status == 0 and results["recordings"] == 6 * subjects, err
    return folder / "cache"
