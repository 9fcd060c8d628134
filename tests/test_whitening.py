"""lib/whitening.py: filters flatten spectra, their inverses are exact and stable, levels are ranks within a group."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import butter, lfilter, welch

from lib import whitening


def resonance(
    rng: np.random.Generator, samples: int, channels: int = 1, radius: float = 0.97, turn: float = 0.2
) -> torch.Tensor:
    """Noise through two poles, so that its spectrum spans 50 dB."""
    poles = np.poly([radius * np.exp(2j * np.pi * turn), radius * np.exp(-2j * np.pi * turn), 0.9])
    return torch.from_numpy(lfilter([1.0], np.real(poles), rng.standard_normal((channels, samples + 500)))[:, 500:])


@pytest.fixture(scope="module")
def fitted() -> tuple[whitening.Whitening, list[torch.Tensor]]:
    rng = np.random.default_rng(0)
    signals = [3.0 * resonance(rng, 40_000, 2), 0.1 * resonance(rng, 40_000, 1, 0.9, 0.05)]
    return whitening.fit(("loud", "quiet"), [[x] for x in signals], 32, 512), signals


def spectrum_db(x: np.ndarray) -> np.ndarray:
    return 10 * np.log10(welch(x, nperseg=256)[1][..., 2:-2])


def test_a_whitened_signal_has_a_flat_spectrum_and_variance_one(fitted):
    whiten, signals = fitted
    for group, x_CT in enumerate(signals):
        w_BCT, _ = whiten.whiten(x_CT[None], np.array([group]), None, level=False)
        assert w_BCT.shape[2] == x_CT.shape[1] - 32 and w_BCT.dtype == torch.float32
        assert abs(float(w_BCT.std()) - 1) < 0.02
        before, after = np.ptp(spectrum_db(x_CT.numpy()).mean(0)), np.ptp(spectrum_db(w_BCT[0].numpy()).mean(0))
        assert after < 3 < 15 < before


def test_windows_are_whitened_as_the_continuous_signal_is(fitted):
    whiten, signals = fitted
    x_CT = signals[0]
    whole_BCT, _ = whiten.whiten(x_CT[None], np.array([0]), None, level=False)
    for start in (0, 1000, 20_001):
        w_BCT, _ = whiten.whiten(x_CT[None, :, start : start + 32 + 512], np.array([0]), None, level=False)
        assert torch.allclose(w_BCT[0], whole_BCT[0, :, start : start + 512], atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 48), st.integers(0, 10_000), st.floats(0.5, 0.99))
def test_the_inverse_is_exact(order, seed, radius):
    rng = np.random.default_rng(seed)
    x_CT = resonance(rng, 3000, 2, radius, rng.random() * 0.5)
    whiten = whitening.fit(("a",), [[x_CT]], order, 256)
    taps_K = whiten.taps_GK[0].numpy()
    assert order == 0 or np.abs(np.roots(taps_K)).max() < 1
    w_CT = lfilter(taps_K, [1.0], x_CT.numpy())[:, order:]
    back_CT = whiten.unwhiten(w_CT, 0, x_CT[:, :order].numpy())
    assert np.abs(back_CT - x_CT[:, order:].numpy()).max() < 1e-9 * float(x_CT.abs().max())


def test_levels_are_divided_out_and_come_back_as_ranks(fitted):
    whiten, signals = fitted
    windows_BCT = signals[0].unfold(1, 544, 512).transpose(0, 1)
    group_B = np.zeros(len(windows_BCT), np.int64)
    _, deviate_B = whiten.whiten(windows_BCT, group_B, None)
    assert abs(float(deviate_B.mean())) < 0.2 and 0.7 < float(deviate_B.std()) < 1.2
    quiet_BCT, quieter_B = whiten.whiten(0.5 * windows_BCT, group_B, None)
    assert torch.allclose(quiet_BCT, whiten.whiten(windows_BCT, group_B, None)[0], atol=1e-4)
    assert (quieter_B <= deviate_B).all() and quieter_B.isfinite().all()
    log_N, drawn_N = whiten.draw_levels(np.linspace(0.01, 0.99, 50), 0)
    assert torch.allclose(whiten.deviate(torch.from_numpy(log_N), np.zeros(50, np.int64)).float(), drawn_N, atol=1e-3)


def test_white_noise_gets_spectrum_and_level_of_its_group(fitted):
    whiten, signals = fitted
    generator = torch.Generator().manual_seed(0)
    for group, x_CT in enumerate(signals):
        log_N, _ = whiten.draw_levels(np.random.default_rng(0).random(60), group)
        y_NCT = whiten.colour(torch.randn(60, len(x_CT), 512, generator=generator), group, log_N)
        assert np.allclose(0.5 * np.log((y_NCT**2).mean((1, 2))), log_N)
        apart = (
            10 * np.log10(welch(y_NCT, nperseg=256)[1].mean((0, 1)) / welch(x_CT.numpy(), nperseg=256)[1].mean(0))[2:-2]
        )
        assert np.abs(apart).max() < 2.0 and np.sqrt((apart**2).mean()) < 0.7
        edges = (y_NCT[:, :, :8] ** 2).mean() / (y_NCT**2).mean()
        assert 0.5 < edges < 2  # no window begins in silence


def test_calibration_mends_what_the_filter_left():
    rng = np.random.default_rng(1)
    x_CT = torch.from_numpy(
        np.diff(rng.standard_normal((1, 60_000)), 3)
    )  # a triple zero at 0 Hz, which poles can't make
    whiten = whitening.fit(("a",), [[x_CT]], 8, 512)
    w_NCT = torch.randn(64, 1, 512, generator=torch.Generator().manual_seed(1))
    error = []
    for _ in range(2):
        y_NCT = whiten.colour(w_NCT, 0, None)
        error.append(np.abs(spectrum_db(y_NCT.reshape(1, -1)) - spectrum_db(x_CT.numpy())).max())
        whiten.calibrate(0, y_NCT)
    assert error[1] < 4 < 20 < error[0]


def lined(rng: np.random.Generator, windows: int, channels: int = 1) -> torch.Tensor:
    """Windows of noise with a hum that comes from elsewhere than the filter knows: one sharp line, 20 dB above a hollow of 10 dB."""
    noise = torch.from_numpy(rng.standard_normal((windows, channels, 256)))
    shape_F = torch.where((torch.arange(129) > 60) & (torch.arange(129) < 80), 0.3, 1.0)
    shape_F[30] = 10.0
    return torch.fft.irfft(torch.fft.rfft(noise) * shape_F, 256)


@pytest.mark.parametrize("windows, channels", [(400, 1), (60, 4), (8, 2)])
def test_what_the_filter_left_is_flattened_and_put_back(fitted, windows, channels):
    whiten, rng = whitening.restore(fitted[0].names, fitted[0].tensors()), np.random.default_rng(3)
    before, new = lined(rng, windows, channels), lined(rng, 500, channels)
    assert whiten.settled(before, np.zeros(windows, int)) is before  # no gain yet
    whiten.settle(1, before.flatten(0, 1), windows * channels, hum=False, flatten=True)
    flat = whiten.settled(new, np.ones(500, int))
    power_F = torch.fft.rfft(flat).abs().square().mean((0, 1)) / 256
    if windows * channels > whitening.AVERAGED:
        assert power_F.log().abs().max() < 0.5 and abs(float(power_F.mean()) - 1) < 0.05
    else:  # sixteen windows don't tell what three frequencies have each
        assert power_F.log().abs()[:20].max() < 1 and whiten.flat_GF[1, 10:20].std() < 0.15
    assert torch.allclose(whiten.unsettled(flat, 1, torch.zeros(500, 64)), new, atol=1e-9)
    assert torch.allclose(whiten.settled(new, np.zeros(500, int)), new, atol=1e-9)  # the other group has none
    again = whitening.restore(whiten.names, whiten.tensors())
    assert torch.equal(again.settled(new, np.ones(500, int)), flat)
    old = {name: t for name, t in whiten.tensors().items() if name not in ("hum_GF", "flat_GF")}
    assert whitening.restore(whiten.names, old).settled(new, np.ones(500, int)) is new


def test_silence_and_short_windows_are_flattened_to_something_finite(fitted):
    for x_NT in (torch.zeros(4, 256), torch.randn(3, 2), torch.randn(1, 5), torch.randn(2, 257)):
        whiten = whitening.restore(fitted[0].names, fitted[0].tensors())
        whiten.settle(0, x_NT, 1e-3, hum=True, flatten=True)
        flat = whiten.settled(x_NT[:, None], np.zeros(len(x_NT), int))
        assert flat.isfinite().all() and flat.shape == (len(x_NT), 1, x_NT.shape[1])


def test_a_click_is_no_part_of_the_mean_spectrum():
    """One lost sample stood for a band where the machine has hardly any power, 12 dB too loud; what comes often stays."""
    x_T = torch.from_numpy(lfilter(*butter(8, 0.6), np.random.default_rng(0).standard_normal(512 * whitening.SEGMENT)))
    clicked_T, often_T = x_T.clone(), x_T.clone()
    clicked_T[5000] += 3.0
    often_T[:: 8 * whitening.SEGMENT] += 3.0
    plain_F, one_F, many_F = (whitening.mean_spectrum(x.reshape(1, 1, -1)) for x in (x_T, clicked_T, often_T))
    quiet = plain_F < plain_F.max() * 1e-5
    assert (
        quiet.sum() > 10 and (one_F / plain_F).log10().abs().max() < 0.1 < 1 < (many_F / plain_F)[quiet].log10().min()
    )


def test_a_recording_without_a_filter_gets_the_one_that_predicts_it_best(fitted):
    whiten, _ = fitted
    rng = np.random.default_rng(7)
    for group, x_CT in enumerate((3.0 * resonance(rng, 8000), 0.1 * resonance(rng, 8000, 1, 0.9, 0.05))):
        assert whiten.choose(whitening.autocorrelation(x_CT, 32)) == group


def test_it_goes_through_a_file(fitted):
    whiten, _ = fitted
    again = whitening.restore(list(whiten.names), whiten.tensors())
    assert again.names == whiten.names and all(
        torch.equal(a, b) for a, b in zip(again.tensors().values(), whiten.tensors().values(), strict=True)
    )


def test_silence_is_refused():
    with pytest.raises(ValueError, match="without power"):
        whitening.fit(("a",), [[torch.zeros(1, 1000)]], 8, 256)
