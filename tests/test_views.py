"""lib/views.py: each augmentation does what its strength says, in its unit, keeps what it must keep, and depends on the window alone."""

import math

import numpy as np
import pytest
import torch

from lib.views import (
    Strength,
    augment_amplitude,
    augment_bandstop,
    augment_dropout,
    augment_noise,
    augment_sign,
    augment_time,
    draws,
    make_view,
    noise_tape,
    resampled,
)

HZ, B, C, T = 100.0, 48, 6, 400
ALL = Strength(0.05, 0.5, 0.1, -10, -10, 3.0, 4.0, 0.4, 0.5)


def windows(batch: int = B, channels: int = C, samples: int = T, seed: int = 0) -> torch.Tensor:
    """Brownish noise."""
    x_BCT = torch.randn(batch, channels, samples, generator=torch.Generator().manual_seed(seed)).cumsum(2)
    return x_BCT - x_BCT.mean(2, keepdim=True)


def draw_of(batch: int = B, step: int = 0, first: int = 0, seed: int = 0):
    return draws(seed, step, first + np.arange(batch))


def sine(hz: float, at_BT: torch.Tensor) -> torch.Tensor:
    return torch.sin(2 * math.pi * hz / HZ * at_BT + 0.3)[:, None]


def db(ratio: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(ratio)


def spectrum(x_BCT: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft(x_BCT * torch.hann_window(x_BCT.shape[2])).abs().square()


# ----------------------------------------------------------------------------
# what all share


def test_views_depend_on_seed_step_and_the_windows_own_index():
    x, positions, mask = windows(), torch.randn(B, C, 3), torch.ones(B, C, dtype=torch.bool)
    whole, kept = make_view(x, positions, mask, HZ, ALL, draw_of())
    again = make_view(x, positions, mask, HZ, ALL, draw_of())
    assert torch.equal(whole, again[0]) and torch.equal(kept, again[1])
    some = np.array([7, 3, 40])  # another division of the batch, padded to more channels
    wider = torch.nn.functional.pad(x[some], (0, 0, 0, 3))
    padded = torch.nn.functional.pad(mask[some], (0, 3))
    part, part_kept = make_view(
        wider, torch.nn.functional.pad(positions[some], (0, 0, 0, 3)), padded, HZ, ALL, draws(0, 0, some)
    )
    torch.testing.assert_close(part[:, :C], whole[some], rtol=1e-5, atol=1e-5)
    assert torch.equal(part_kept[:, :C], kept[some]) and not part_kept[:, C:].any()
    for other in (draw_of(step=1), draw_of(first=B), draw_of(seed=1)):
        assert not torch.allclose(make_view(x, positions, mask, HZ, ALL, other)[0], whole, atol=0.1)


def test_nothing_asked_for_is_nothing_done():
    x, positions, mask = windows(), torch.randn(B, C, 3), torch.rand(B, C) > 0.2
    view, kept = make_view(x, positions, mask, HZ, Strength(), draw_of())
    assert view is x and kept is mask


def test_shape_type_and_silent_channels_stay():
    x = windows(channels=5, samples=333)
    x[:, 2] = 0  # a masked channel
    mask = torch.ones(B, 5, dtype=torch.bool)
    mask[:, 2] = False
    view, kept = make_view(x, torch.randn(B, 5, 3), mask, HZ, ALL, draw_of())
    assert view.shape == x.shape and view.dtype == torch.float32 and view.is_contiguous() and view.isfinite().all()
    assert (view[:, 2] == 0).all() and not kept[:, 2].any()
    before = x.clone()
    make_view(x, torch.randn(B, 5, 3), mask, HZ, ALL, draw_of())
    assert torch.equal(x, before)  # the windows themselves are left alone


# ----------------------------------------------------------------------------
# time


@pytest.mark.parametrize("hz", [1.0, 10.0, 25.0, 37.0])
def test_interpolation_is_exact_in_the_band(hz):
    at_BT = torch.arange(T) + torch.rand(B, 1, generator=torch.Generator().manual_seed(1))
    y = resampled(sine(hz, torch.arange(T)[None]).expand(B, 1, T), at_BT)
    error = (y - sine(hz, at_BT))[:, :, 20:-20].square().mean() / 0.5
    assert db(error) < -55


def test_resampling_at_the_samples_changes_nothing_and_edges_are_mirrored():
    x = windows()
    grid_BT = torch.arange(T).float().expand(B, T)
    torch.testing.assert_close(resampled(x, grid_BT), x, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(resampled(x, grid_BT - 3)[:, :, :3], x[:, :, 1:4].flip(2), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(resampled(x, grid_BT + 2)[:, :, -2:], x[:, :, -3:-1].flip(2), atol=1e-4, rtol=1e-5)


def displacement(warp_s: float, warp_hz: float, shift_s: float, samples: int = T, step: int = 0) -> torch.Tensor:
    """What `augment_time` does to a ramp: seconds by which each moment is displaced (B, T)."""
    ramp = torch.arange(samples).float().expand(B, 1, samples).contiguous()
    return (augment_time(ramp, HZ, warp_s, warp_hz, shift_s, draw_of(step=step)) - ramp)[:, 0] / HZ


def test_shift_is_in_seconds():
    moved_B = displacement(0.0, 0.5, 0.2)[:, 60:-60].mean(1)
    assert moved_B.abs().max() <= 0.2 and moved_B.abs().max() > 0.17 and abs(float(moved_B.mean())) < 0.06
    assert displacement(0.0, 0.5, 0.2)[:, 60:-60].std(1).max() < 1e-4  # all of the window alike


def test_warp_is_smooth_bounded_and_never_runs_backwards():
    warp_s, warp_hz = 0.2, 0.5
    curve_BT = displacement(warp_s, warp_hz, 0.0, 1000)
    inside = curve_BT[:, 20:-20]
    assert inside.abs().max() <= warp_s + 1e-3 and inside.abs().max() > 0.8 * warp_s
    assert curve_BT[:, 10].abs().max() < 0.07  # it begins at 0, and 0.1 s later is as far as the slope allows
    speed = inside.diff(dim=1) * HZ
    assert speed.abs().max() <= 2 * math.pi * warp_hz * warp_s + 1e-2 < 1
    power_BF = torch.fft.rfft(curve_BT[:, 20:-20] * torch.hann_window(960)).abs().square()
    hz_F = torch.fft.rfftfreq(960, 1 / HZ)
    assert (power_BF[:, hz_F > warp_hz + 0.3].sum(1) / power_BF.sum(1)).max() < 1e-3
    with pytest.raises(ValueError, match="turns time back; at most 0.318"):
        augment_time(windows(), HZ, 0.4, 0.5, 0.0, draw_of())


def test_channels_are_warped_alike():
    x = windows()
    x[:, 1] = 2 * x[:, 0]
    y = augment_time(x, HZ, 0.1, 0.5, 0.1, draw_of())
    torch.testing.assert_close(y[:, 1], 2 * y[:, 0], atol=1e-4, rtol=1e-4)


def test_warp_keeps_the_spectrum_of_slow_rhythms():
    x = sine(10.0, torch.arange(T)[None]).expand(B, 1, T).contiguous()
    power_BF = spectrum(augment_time(x, HZ, 0.1, 0.5, 0.0, draw_of()))[:, 0]
    hz_F = torch.fft.rfftfreq(T, 1 / HZ)
    assert (power_BF[:, (hz_F > 6) & (hz_F < 15)].sum(1) / power_BF.sum(1)).min() > 0.98


# ----------------------------------------------------------------------------
# noise


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_noise_has_its_power_and_spectrum(exponent):
    x = windows(batch=200, samples=1000)
    x[:, 0] *= 30  # relative to each channel's own
    added = augment_noise(x, -6.0, exponent, HZ, draw_of(200)) - x
    relative = db(added.square().mean(2) / x.var(2, correction=0))
    assert relative.median(1).values.max() < -5 and relative.median(1).values.min() > -27
    assert abs(float(relative.median()) + 16) < 2.5  # uniform in dB between -26 and -6
    assert (relative[:, 0] - relative[:, 1]).abs().median() < 1.5  # one level for the whole window
    power_F = spectrum(added / added.std(2, keepdim=True)).mean((0, 1))
    hz_F = torch.fft.rfftfreq(1000, 1 / HZ)
    band = (hz_F > 1) & (hz_F < 45)
    slope = np.polyfit(np.log(hz_F[band].numpy()), np.log(power_F[band].numpy()), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.06)


def test_noise_of_channels_is_independent():
    x = torch.ones(B, 20, T) * torch.tensor([1.0, -1.0]).repeat(T // 2)
    noise = augment_noise(x, 0.0, 0.0, HZ, draw_of()) - x
    noise = noise / noise.std(2, keepdim=True)
    correlation = noise @ noise.transpose(1, 2) / T - torch.eye(20)
    assert correlation.abs().mean() < 1.1 * math.sqrt(2 / math.pi / T) and correlation.abs().max() < 0.3


@pytest.mark.parametrize("exponent, rate_hz", [(0.0, 0.0), (1.0, 100.0), (1.0, 250.0)])
def test_noise_tape(exponent, rate_hz):
    tape_N = noise_tape(exponent, rate_hz, torch.device("cpu"))
    assert tape_N.std() == pytest.approx(1, abs=1e-3) and abs(float(tape_N.mean())) < 2e-3
    kurtosis = float(((tape_N - tape_N.mean()) / tape_N.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3, abs=0.05)


# ----------------------------------------------------------------------------
# amplitude, band-stop, sign


def test_amplitude_is_a_gain_in_db():
    x = windows()
    gain = augment_amplitude(x, 6.0, draw_of()) / x
    assert (gain.std(2) < 1e-4 * gain.mean(2).abs()).all()  # one per channel
    gain_db = 2 * db(gain.mean(2))
    assert gain_db.abs().max() <= 6 and gain_db.abs().max() > 5.8 and gain_db.mean().abs() < 0.6
    assert gain_db.std(1).mean() > 2  # channels differ


def test_bandstop_takes_out_a_band_of_its_width_and_nothing_else():
    width_hz, x = 6.0, torch.randn(400, 2, 1000, generator=torch.Generator().manual_seed(0))
    y = augment_bandstop(x, HZ, width_hz, draw_of(400))
    draw = draw_of(400)
    centre_B, half_B = draw("bandstop centre", 1)[:, 0] * HZ / 2, draw("bandstop width", 1)[:, 0] * width_hz / 2
    ratio_BF = spectrum(y).mean(1) / spectrum(x).mean(1)
    hz_F = torch.fft.rfftfreq(1000, 1 / HZ)
    apart_BF = (hz_F - centre_B[:, None]).abs() - half_B[:, None]
    inside = (apart_BF < -0.4) & (half_B[:, None] > 0.5)
    assert inside.sum() > 5000 and db(ratio_BF[inside].mean()) < -25
    assert (db(ratio_BF[apart_BF > 1.4]).abs().max() < 0.5) and (centre_B.max() > 45) and (centre_B.min() < 5)
    assert half_B.max() <= width_hz / 2
    steep = windows(64)  # with ends far apart: no ringing into each other
    changed = (augment_bandstop(steep, HZ, 0.001, draw_of(64)) - steep).abs().amax((1, 2)) / steep.std((1, 2))
    assert changed.median() < 0.5


def test_sign_turns_whole_windows():
    x = windows(400)
    ratio = (augment_sign(x, 0.3, draw_of(400)) / x)[:, :, 5:]
    assert set(ratio.flatten(1)[:, 0].tolist()) == {-1.0, 1.0} and (ratio == ratio[:, :1, :1]).all()
    assert float((ratio[:, 0, 0] < 0).float().mean()) == pytest.approx(0.3, abs=0.07)


# ----------------------------------------------------------------------------
# channels


def test_dropout_masks_a_share_scattered_or_together():
    batch, channels, most = 400, 40, 0.5
    positions = torch.randn(batch, channels, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, channels, dtype=torch.bool)
    mask[:, 30:] = False
    kept = augment_dropout(positions, mask, most, draw_of(batch))
    assert not (kept & ~mask).any()
    dropped = mask & ~kept
    share_B = dropped.sum(1) / 30
    assert share_B.max() <= most and share_B.max() > 0.45 and share_B.min() == 0
    assert float(share_B.mean()) == pytest.approx(most / 2, abs=0.03)
    together = 0
    for b in torch.nonzero(dropped.sum(1) >= 4)[:, 0].tolist():
        d_CC = torch.cdist(positions[b], positions[b])
        gone, n = torch.nonzero(dropped[b])[:, 0], int(dropped[b].sum())
        good = torch.nonzero(mask[b])[:, 0]
        nearest = [set(good[d_CC[c, good].argsort()[:n]].tolist()) for c in gone.tolist()]
        together += set(gone.tolist()) in nearest  # those nearest to one of them
    assert 0.4 < together / int((dropped.sum(1) >= 4).sum()) < 0.62


def test_dropout_leaves_a_channel_and_stands_unknown_positions():
    positions = torch.full((B, 3, 3), torch.nan)
    mask = torch.tensor([[True, False, False], [True, True, False]]).repeat(B // 2, 1)
    kept = augment_dropout(positions, mask, 1.0, draw_of())
    assert kept.any(1).all() and (kept.sum(1) < mask.sum(1)).any()
