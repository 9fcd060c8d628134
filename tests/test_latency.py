import numpy as np
import pytest
import torch

from lib.latency import Latency

RATE_HZ, SITES, SAMPLES = 100.0, 6, 200


def trials(windows: int, seed: int, amplitude: float = 3.0, low: float = 0.3, high: float = 1.7):
    """Noise, and around a random moment of each window a wave at two of the sites; of ten people."""
    rng = np.random.default_rng(seed)
    time_s_B, t_N = rng.uniform(low, high, windows), np.arange(SAMPLES) / RATE_HZ
    wave_BN = amplitude * np.exp(-0.5 * ((t_N + 0.05 - time_s_B[:, None]) / 0.12) ** 2)
    x_BEN = rng.standard_normal((windows, SITES, SAMPLES)) * 2
    x_BEN[:, 1] += wave_BN
    x_BEN[:, 4] -= 0.5 * wave_BN
    return x_BEN, time_s_B, np.arange(windows) % 10


def fitted(x_BEN, time_s_B, subject_B) -> tuple[Latency, np.ndarray]:
    latency = Latency(SITES, RATE_HZ)
    return latency, latency.fit(latency.steps(torch.from_numpy(x_BEN)).numpy(), time_s_B, subject_B)


def seconds(latency: Latency, x_BEN: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return (latency(torch.from_numpy(x_BEN)) * latency.spread + latency.centre).numpy()


def test_finds_when_a_wave_comes_in_windows_it_has_not_seen():
    latency, held_B = fitted(*trials(200, 0))
    x_BEN, time_s_B, _ = trials(200, 1)
    slope, level = np.polyfit(held_B, trials(200, 0)[1], 1)
    off_s_B = slope * (seconds(latency, x_BEN) - float(latency.centre)) / float(latency.spread) + level - time_s_B
    assert off_s_B.std() < 0.05 and abs(off_s_B.mean()) < 0.02  # of 0.4 s, in steps of 0.1 s


def test_a_wave_that_comes_later_is_said_to_come_later_wherever_it_was_learned():
    latency, _ = fitted(*trials(300, 0, high=1.0))  # none after 1 s
    x_BEN, time_s_B, _ = trials(200, 1, low=1.0, high=1.5)
    assert np.corrcoef(seconds(latency, x_BEN), time_s_B)[0, 1] > 0.85
    early_BEN, _, _ = trials(50, 2, high=0.9)
    late_BEN = np.roll(early_BEN, 50, axis=2)
    assert (seconds(latency, late_BEN) - seconds(latency, early_BEN)).mean() == pytest.approx(0.5, abs=0.1)


def test_what_other_people_say_is_no_better_than_chance_where_there_is_nothing():
    x_BEN, time_s_B, subject_B = trials(200, 0, amplitude=0.0)
    latency, held_B = fitted(x_BEN, time_s_B, subject_B)
    assert abs(np.corrcoef(held_B, time_s_B)[0, 1]) < 0.2
    inside_B = seconds(latency, x_BEN)
    assert np.isfinite(inside_B).all() and inside_B.min() > 0 and inside_B.max() < SAMPLES / RATE_HZ


def test_fits_alike_in_any_order_with_a_silent_site_and_one_person():
    x_BEN, time_s_B, subject_B = trials(60, 0)
    x_BEN[:, 2] = 0
    latency, held_B = fitted(x_BEN, time_s_B, subject_B)
    turned = np.random.default_rng(0).permutation(60)
    again, said_B = fitted(x_BEN[turned], time_s_B[turned], subject_B[turned])
    assert np.allclose(held_B[turned], said_B, atol=1e-8) and torch.allclose(latency.filter, again.filter, atol=1e-5)
    alone, held_B = fitted(x_BEN, time_s_B, np.zeros(60))
    assert np.corrcoef(held_B, time_s_B)[0, 1] > 0.9 and torch.isfinite(alone.filter).all()


def test_gradients_reach_the_filter_from_nothing_and_half_precision_is_kept_out():
    x_BEN, time_s_B, subject_B = trials(20, 0)
    latency = Latency(SITES, RATE_HZ)
    latency(torch.from_numpy(x_BEN)).sum().backward()
    assert latency.filter.grad.abs().max() > 0
    latency, _ = fitted(x_BEN, time_s_B, subject_B)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(seconds(latency, x_BEN), seconds(latency, x_BEN.astype(np.float32)))
        assert latency(torch.from_numpy(x_BEN)).dtype == torch.float32
