"""A small cohort with something to tell: response times in the signal, seizures, a trait in a rhythm, two states."""

from pathlib import Path

import numpy as np

from lib.edf import write_edf
from tests import recipes

RATE_HZ = 200
RULE = """name = "tasks"
pattern = 's(?P<subject>\\d+)_(?P<task>[A-Za-z]+)\\.edf'
[participants]
file = "people.csv"
id = "id"
id_pattern = 's(?P<subject>\\d+)'
columns = {{ age = "age", sex = "sex", externalizing = "externalizing" }}
[split]
val = [{}]
test = [{}]
"""


def write_cohort(folder: Path, subjects: int = 12, seed: int = 0) -> Path:
    """Three recordings per subject: contrast change (a wave where the button is pressed), monitoring (a seizure), rest (eyes open, closed)."""
    folder.mkdir(parents=True)
    rng, people = np.random.default_rng(seed), ["id,age,sex,externalizing"]
    for s in range(subjects):
        trait = (s * 7 % subjects) / subjects * 3 - 1.5
        missing = s == 1
        people.append(f"s{s:02d},{20 + s},{'FM'[s % 2]},{'n/a' if missing else f'{trait:.3f}'}")
        for task, seconds, make in (
            ("contrastChangeDetection", 40, trials),
            ("szMonitoring", 48, seizure),
            ("Rest", 16, rest),
        ):
            x_CT = recipes.noise_uv(rng, len(recipes.NAMES), seconds * RATE_HZ, 10.0)
            t = np.arange(x_CT.shape[1]) / RATE_HZ
            x_CT[1] += 6 * np.exp(0.6 * trait) * np.sin(2 * np.pi * 14 * t + s)
            events = make(rng, x_CT, t, s)
            write_edf(folder / f"s{s:02d}_{task}.edf", x_CT, RATE_HZ, recipes.NAMES, events)
    (folder / "people.csv").write_text("\n".join([*people, ""]))
    val, test = (", ".join(f'"{s:02d}"' for s in chosen) for chosen in (range(2, subjects, 3), range(3, subjects, 6)))
    (folder / "dataset.toml").write_text(RULE.format(val, test))
    return folder


def trials(rng: np.random.Generator, x_CT: np.ndarray, t: np.ndarray, s: int) -> list[tuple[float, float, str]]:
    """Trials of 3 s; one in eight is not answered."""
    events = []
    for i, start in enumerate(np.arange(1.0, t[-1] - 4, 3.0)):
        delay = rng.uniform(0.7, 1.7)
        events += [
            (start, 0.0, "contrastTrial_start"),
            (start + 0.2, 0.0, ("left_target", "right_target")[(i + s) % 2]),
        ]
        if i % 8 != 7:
            events.append((start + 0.2 + delay, 0.0, "left_buttonPress"))
            x_CT[2:5] += 60 * np.exp(-0.5 * ((t - start - 0.2 - delay) / 0.1) ** 2)
    return events


def seizure(rng: np.random.Generator, x_CT: np.ndarray, t: np.ndarray, s: int) -> list[tuple[float, float, str]]:
    """One seizure of 12 s."""
    start = 10.0 + s
    weight_C1 = np.linspace(-1, 1, len(x_CT))[
        :, None
    ]  # not the same everywhere: the average reference would take it away
    x_CT += 60 * weight_C1 * np.sin(2 * np.pi * 3 * t) * ((t >= start) & (t < start + 12))
    return [(start, 12.0, "seizure")]


def rest(rng: np.random.Generator, x_CT: np.ndarray, t: np.ndarray, s: int) -> list[tuple[float, float, str]]:
    """Eyes open and closed in turn, 4 s each."""
    x_CT[4:] += 20 * np.sin(2 * np.pi * 10 * t) * (t % 8 >= 4)
    return [(at, 4.0, ("eyes_open", "eyes_closed")[i % 2]) for i, at in enumerate((0.0, 4.0, 8.0, 12.0))]


def build(folder: Path, subjects: int = 12) -> Path:
    """The cache of such a cohort."""
    source = write_cohort(folder / "edf", subjects)
    status, results, err = recipes.run("--source", source, "--cache", folder / "cache", "--workers", 1)
    assert status == 0 and results["recordings"] == 3 * subjects, err
    return folder / "cache"
