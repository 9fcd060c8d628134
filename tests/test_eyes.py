"""Eye removal: what is known to be blinks and looks goes, what is known to be brain stays, and nothing is taken where there is nothing."""

import numpy as np
import pytest
import scipy.signal

from lib import eyes, replay
from lib.channels import POSITIONS, TEN_TWENTY
from lib.intake import Intake, Path
from tests import recipes

RATE_HZ, NAMES = 200.0, TEN_TWENTY


def near(*centres: str) -> np.ndarray:
    """How strongly each electrode sees what happens at some."""
    place_C3 = np.array([POSITIONS[n] for n in NAMES])
    return sum(np.exp(-0.5 * (np.linalg.norm(place_C3 - POSITIONS[c], axis=1) / 0.05) ** 2) for c in centres)


def session(seconds: int, seed: int, moving: bool = True, every_s: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Brain and eyes (C, T) in microvolts: correlated noise with alpha at the back; a blink and a look every so often."""
    rng, T = np.random.default_rng(seed), round(seconds * RATE_HZ)
    sources_CT = recipes.noise_uv(rng, len(NAMES), T, 5.0)
    brain_CT = np.stack([near(n) for n in NAMES], 1) @ sources_CT
    t = np.arange(T) / RATE_HZ
    brain_CT += 15 * np.outer(near("O1", "O2"), np.sin(2 * np.pi * 10 * t))
    eyes_CT = np.zeros_like(brain_CT)
    for start in np.arange(0.6, seconds - 1.5, every_s) if moving else ():
        blink_T = rng.uniform(150, 250) * np.exp(-0.5 * ((t - start) / 0.07) ** 2)
        look_T = rng.choice([-80, 80]) * ((t > start + 0.7) & (t < start + 1.2))
        eyes_CT += np.outer(near("Fp1", "Fp2"), blink_T) + np.outer(near("F8") - near("F7"), look_T)
    return brain_CT, eyes_CT


def windows(x_CT: np.ndarray) -> list[np.ndarray]:
    return np.split(x_CT[:, : x_CT.shape[1] // 400 * 400], x_CT.shape[1] // 400, axis=1)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("rested", [False, True])
def test_blinks_and_looks_go_and_brain_stays(average, rested):
    brain_CT, eyes_CT = session(24, 0, every_s=2.0 if rested else 4.0)  # without rest, quiet stretches must be there
    rest_CT = session(20, 1, moving=False)[0]
    new_brain_CT, new_eyes_CT = session(20, 2)
    parts = [brain_CT + eyes_CT, rest_CT, new_brain_CT, new_eyes_CT]
    moving, rest, brain, eye = [x - x.mean(0) for x in parts] if average else parts
    found = eyes.fit(windows(moving), windows(rest) if rested else [], RATE_HZ)
    assert 2 <= len(found.ratio_D) <= 4 and (np.diff(found.ratio_D) <= 0).all()
    clean_CT = found((brain + eye)[None])[0]
    left_CT = clean_CT - found(brain[None])[0]
    assert np.abs(left_CT).max() < 0.12 * np.abs(eye).max()
    back = [NAMES.index(n) for n in ("O1", "O2", "Pz", "P3", "P4")]
    for c in back:
        assert np.corrcoef(clean_CT[c], brain[c])[0, 1] > 0.95
        assert abs(clean_CT[c].std() / brain[c].std() - 1) < 0.1
    np.testing.assert_allclose(found.project_CC @ found.project_CC, found.project_CC, atol=1e-8)


def test_units_and_order_of_channels_change_nothing():
    x_CT = sum(session(24, 0))
    found, order = eyes.fit(windows(x_CT), [], RATE_HZ), np.random.default_rng(0).permutation(len(NAMES))
    turned = eyes.fit(windows(1e3 * x_CT[order]), [], RATE_HZ)
    np.testing.assert_allclose(turned.project_CC, found.project_CC[np.ix_(order, order)], atol=1e-8)


def test_a_masked_channel_stays_zero():
    x_CT = sum(session(24, 0))
    x_CT[4] = 0
    found = eyes.fit(windows(x_CT), [], RATE_HZ)
    assert np.abs(found(x_CT[None])[0, 4]).max() < 1e-6 * np.abs(x_CT).max()


def test_nothing_is_taken_where_there_is_nothing():
    brain_CT, eyes_CT = session(24, 0, moving=False)
    assert eyes.fit(windows(brain_CT), windows(session(20, 1, moving=False)[0]), RATE_HZ) is None
    assert eyes.fit(windows(sum(session(24, 0)))[:2], [], RATE_HZ) is None  # four seconds
    assert eyes.fit([], [], RATE_HZ) is None
    assert eyes.fit(windows(0 * brain_CT), [], RATE_HZ) is None


def test_real_blinks(data_dir):
    material = replay.read(data_dir / "eegmmidb" / "S001" / "S001R01.edf")
    names = tuple(material.stream.channels)
    intake = Intake(material.stream, Path(names, "average", (0.5, 45.0), window=160, step=160, settle_s=2.0))
    pieces = [w.x_CT for first, x_TC in material.pieces for w in intake.push(first, x_TC) if w.valid]
    found = eyes.fit(pieces[:29], [], 160.0)  # half a minute with eyes open
    x_CT = np.concatenate(pieces[29:], axis=1).astype(np.float64)
    clean_CT = found(x_CT[None])[0]
    front = [i for i, n in enumerate(names) if n.strip(".").upper() in ("FP1", "FPZ", "FP2")]
    back = [i for i, n in enumerate(names) if n.strip(".").upper() in ("O1", "OZ", "O2", "PO3", "PO4", "POZ")]
    trace_T = eyes.slow(x_CT[front].mean(0), 160.0)
    peaks = scipy.signal.find_peaks(trace_T, height=100.0, distance=48)[0]
    assert len(front) == 3 and len(peaks) >= 4
    left = np.abs(clean_CT[front].mean(0)[peaks]).mean() / np.abs(x_CT[front].mean(0)[peaks]).mean()
    rhythm = [(z - eyes.slow(z, 160.0))[back].std() for z in (x_CT, clean_CT)]
    assert left < 0.2 and 0.9 < rhythm[1] / rhythm[0] < 1.05
