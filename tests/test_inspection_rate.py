"""A machine's shaft tells the sampling rate: mislabelled recordings are refused, sound ones and loose parts are not."""

import numpy as np
import pytest

from lib.errors import Rejected
from lib.inspection import check_rate

SHAFT_HZ = 29.95


def machine(rate_hz: float, seconds: float, orders: tuple[float, ...], hiss: float, seed: int = 0) -> np.ndarray:
    """x_CT (1, T): lines at multiples of the shaft, low-passed noise, and some hiss over the whole band."""
    rng = np.random.default_rng(seed)
    t_T = np.arange(int(rate_hz * seconds)) / rate_hz
    x_T = sum(np.sin(2 * np.pi * k * SHAFT_HZ * t_T + k) for k in orders)
    rumble_T = np.convolve(rng.standard_normal(len(t_T)), np.hanning(64) / 32, "same")
    return (x_T + 0.3 * rumble_T + hiss * rng.standard_normal(len(t_T)))[None]


@pytest.mark.parametrize("ratio", [3, 4])
def test_a_stated_rate_that_is_too_low_is_refused(ratio):
    x_CT = machine(48_000, 6, (1, 2, 3, 4, 5, 6, 7), hiss=0.003)
    assert check_rate(x_CT, 48_000, SHAFT_HZ) == []
    with pytest.raises(Rejected) as refusal:
        check_rate(x_CT, 48_000 / ratio, SHAFT_HZ)
    assert refusal.value.code == "rate_implausible" and "as if the rate were 48000 Hz" in refusal.value.reason


def test_half_orders_are_noted_and_a_loud_upper_band_is_trusted():
    loose = machine(12_000, 8, (0.5, 1, 1.5, 2, 2.5, 3), hiss=0.003)
    (note,) = check_rate(loose, 12_000, SHAFT_HZ)
    assert note.startswith("rate or loose parts: ")
    assert check_rate(machine(12_000, 8, (0.5, 1, 1.5, 2), hiss=1.0), 12_000, SHAFT_HZ) == []


def test_short_silent_and_lineless_recordings_say_nothing():
    assert check_rate(machine(12_000, 0.2, (0.25, 0.5, 0.75), 0.001), 12_000, SHAFT_HZ) == []
    assert check_rate(np.zeros((2, 100_000)), 12_000, SHAFT_HZ) == []
    assert check_rate(machine(12_000, 8, (), 0.001), 12_000, SHAFT_HZ) == []


def test_no_real_bearing_but_the_mislabelled_one_is_refused(data_dir):
    for path in sorted((data_dir / "cwru").glob("*.npy")):
        x_CT, shaft_hz = np.load(path).reshape(1, -1).astype(np.float64), float(path.name.split("_")[0]) / 60
        if "Normal" in path.name:
            assert check_rate(x_CT, 48_000, shaft_hz) == []
            with pytest.raises(Rejected, match="48000"):
                check_rate(x_CT, 12_000, shaft_hz)
        else:
            assert check_rate(x_CT, 12_000, shaft_hz) == [], path.name
    for x_TC in np.load(data_dir / "femto" / "Bearing1_1.npz")["acc"][::20]:  # a tenth of a second: too short to say
        assert check_rate(x_TC.T.astype(np.float64), 25_600, 30.0) == []
