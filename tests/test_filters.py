"""lib/filters.py: equality with MNE-Python, independence of chunks, and what happens at the ends of the scale."""

import tracemalloc
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.filters import (
    Causal,
    Spectral,
    band_pass_taps,
    grid_points,
    half_bands,
    notch_taps,
    quartiles,
    robust_scale,
    run_pass,
    zscore,
)

RATES_HZ = (128, 160, 173.61, 200, 250, 256, 300, 400, 500, 512, 1000, 1024, 2048)
BAND_HZ = (0.5, 45.0)


def eeg_like(channels: int, samples: int, rate_hz: float, seed: int = 0) -> np.ndarray:
    """1/f noise of 20 uV with mains hum that drifts about the output's Nyquist frequency, the worst place for it."""
    rng = np.random.default_rng(seed)
    f = np.maximum(np.fft.rfftfreq(samples, 1 / rate_hz), 0.2)
    x_CT = np.fft.irfft(np.fft.rfft(rng.standard_normal((channels, samples)), axis=1) * f**-0.75, samples)
    return (20 * x_CT / x_CT.std() + 10 * np.sin(2 * np.pi * 50.013 * np.arange(samples) / rate_hz)).astype(np.float32)


def by_mne(x_CT, rate_hz, out_hz, band_hz, notch_hz):
    """What a user of MNE-Python writes, with its defaults."""
    import mne

    info = mne.create_info(len(x_CT), rate_hz, "eeg")
    raw = mne.io.RawArray(x_CT.astype(np.float64), info, verbose="error")
    if notch_hz:
        raw.notch_filter(notch_hz, verbose="error")
    if band_hz:
        raw.filter(*band_hz, verbose="error")
    return raw.resample(out_hz, verbose="error").get_data()


def relative_rms(y, reference) -> float:
    return float(np.sqrt(np.mean((y - reference) ** 2) / np.mean(reference**2)))


# ----------------------------------------------------------------------------
# taps


@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_taps_are_mnes(rate_hz):
    from mne.filter import create_filter

    for band_hz in (BAND_HZ, (0.1, 40.0), (None, 45.0), (1.0, None), (0.5, rate_hz / 2 - 1)):
        expected = create_filter(None, rate_hz, *band_hz, verbose="error")
        np.testing.assert_allclose(band_pass_taps(rate_hz, band_hz), expected, atol=1e-12)


def test_notch_removes_what_mne_removes():
    from mne.filter import notch_filter

    impulse_T = np.zeros(8001)
    impulse_T[4000] = 1
    expected_T = notch_filter(impulse_T, 256.0, [50.0, 100.0], verbose="error")
    taps = notch_taps(256.0, (50.0, 100.0))
    np.testing.assert_allclose(expected_T[4000 - len(taps) // 2 :][: len(taps)], taps, atol=1e-12)


@pytest.mark.parametrize("band_hz", [(0.5, 64.0), (0.5, 80.0), (0.0, 45.0), (45.0, 0.5)])
def test_a_band_that_does_not_fit_is_refused(band_hz):
    with pytest.raises(ValueError, match="Nyquist"):
        Spectral(128, 100, band_hz)
    with pytest.raises(ValueError, match="Nyquist"):
        Causal(128, 100, band_hz, None, 1)


# ----------------------------------------------------------------------------
# Spectral


@pytest.mark.parametrize(
    "rate_hz, out_hz",
    [*((rate_hz, 100) for rate_hz in RATES_HZ), (128, 200), (128, 128), (200, 200), (500, 128), (512, 200)],
)
def test_equals_mne(rate_hz, out_hz):
    for seconds, band_hz, notch_hz in (
        (61.7, BAND_HZ, None),
        (37, BAND_HZ, (50.0,)),
        (12.3, None, None),
        (4.1, BAND_HZ, None),
    ):
        x_CT = eeg_like(2, int(seconds * rate_hz), rate_hz)
        y_CK = Spectral(rate_hz, out_hz, band_hz, notch_hz)(x_CT)
        expected_CK = by_mne(x_CT, rate_hz, out_hz, band_hz, notch_hz)
        assert y_CK.dtype == np.float32 and y_CK.shape == expected_CK.shape
        assert relative_rms(y_CK, expected_CK) < 1e-3


@given(
    samples=st.integers(8, 5000),  # below that MNE itself gives noise, and no segment so short is cached
    rate_hz=st.sampled_from((128, 173.61, 256, 500)),
    out_hz=st.sampled_from((64, 100, 200)),
)
@settings(max_examples=40, deadline=None)
def test_equals_mne_at_any_length(samples, rate_hz, out_hz):
    x_CT = eeg_like(2, samples + 1, rate_hz, seed=samples)[:, :samples]
    y_CK = Spectral(rate_hz, out_hz, (0.5, 30.0))(x_CT)
    expected_CK = by_mne(x_CT, rate_hz, out_hz, (0.5, 30.0), None)
    assert y_CK.shape == expected_CK.shape and np.isfinite(y_CK).all()
    np.testing.assert_allclose(y_CK, expected_CK, atol=1e-3 * np.sqrt(np.mean(expected_CK**2)) * 4 + 1e-4)


def test_padding_too_short_for_the_filter_is_noticed():
    samples = 2**14 - 200  # MNE pads by just 100 on either side of this length
    x_CT = eeg_like(1, samples, 256)
    assert len(Spectral(256, 100, BAND_HZ).passes(samples)) == 2
    assert relative_rms(Spectral(256, 100, BAND_HZ)(x_CT), by_mne(x_CT, 256, 100, BAND_HZ, None)) < 1e-5


def test_electrode_offset_leaves_no_trace_in_float32():
    x_CT = eeg_like(2, 256 * 60, 256)
    spectral = Spectral(256, 100, BAND_HZ)
    np.testing.assert_allclose(spectral(x_CT + np.float32(32768)), spectral(x_CT), atol=0.02)
    assert abs(Spectral(256, 100, (None, 45.0))(x_CT + np.float32(32768)).mean() - 32768 - x_CT.mean()) < 0.1


def test_equal_rates_without_filter_change_nothing():
    x_CT = eeg_like(3, 1001, 100)
    y_CT = Spectral(100, 100, None)(x_CT)
    np.testing.assert_array_equal(y_CT, x_CT)
    assert not np.shares_memory(x_CT, y_CT)
    assert Spectral(256, 100, BAND_HZ)(np.empty((3, 0), np.float32)).shape == (3, 0)


def test_channels_do_not_touch_each_other():
    x_CT = eeg_like(7, 256 * 20, 256)
    whole_CK = Spectral(256, 100, BAND_HZ)(x_CT)
    x_CT[3] = np.nan
    y_CK = Spectral(256, 100, BAND_HZ)(x_CT)
    np.testing.assert_array_equal(np.delete(y_CK, 3, 0), np.delete(whole_CK, 3, 0))
    for c in (0, 4, 6):
        np.testing.assert_allclose(Spectral(256, 100, BAND_HZ)(x_CT[c : c + 1])[0], whole_CK[c], atol=1e-3)


def test_memory_is_a_few_channels_not_the_recording():
    x_CT = np.zeros((129, 500 * 120), np.float32)
    tracemalloc.start()
    y_CK = Spectral(500, 100, BAND_HZ)(x_CT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - y_CK.nbytes < 12e6 < x_CT.nbytes / 2


@pytest.mark.parametrize(
    "rate_hz, halvings, smooth", [(256, 1, True), (500, 2, False), (2000, 4, False), (160, 0, True)]
)
def test_half_bands_and_smooth_lengths_change_nothing_that_matters(rate_hz, halvings, smooth):
    x_CT = eeg_like(4, 60_000, rate_hz) + 10 * np.random.default_rng(0).standard_normal((4, 60_000)).astype(np.float32)
    (one,) = Spectral(rate_hz, 100, None).passes(60_000)
    assert len(half_bands(one.points, one.new)) == halvings and (grid_points(one.new) == one.new) == smooth
    for band_hz in (None, BAND_HZ):
        p = replace(one, band_hz=band_hz)
        plain_CK = run_pass(x_CT.astype(np.float64), p, np.zeros(4), quick=False)
        assert (
            relative_rms(run_pass(x_CT, p, np.zeros(4, np.float32), quick=True), plain_CK) < 1e-4
        )  # white noise folds


def test_real_recording_equals_mne(data_dir):
    import mne

    raw = mne.io.read_raw_edf(data_dir / "eegmmidb/S001/S001R01.edf", preload=True, verbose="error")
    x_CT = (raw.get_data(picks=range(8)) * 1e6).astype(np.float32)
    rate_hz = raw.info["sfreq"]
    expected_CK = by_mne(x_CT, rate_hz, 100, BAND_HZ, None)
    assert relative_rms(Spectral(rate_hz, 100, BAND_HZ)(x_CT), expected_CK) < 1e-3


# ----------------------------------------------------------------------------
# Causal


@lru_cache
def causal_case(rate_hz, out_hz):
    x_CT = eeg_like(3, 3000, rate_hz).astype(np.float64) + 1e4
    return x_CT, Causal(rate_hz, out_hz, BAND_HZ, (50.0,), 3).process(x_CT)


@given(
    rates_hz=st.sampled_from(((256, 100), (500, 100), (173.61, 100), (128, 200), (100, 100), (160, 128))),
    chunks=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 400)), max_size=60),
)
@settings(max_examples=60, deadline=None)
def test_chunks_of_any_size_give_one_signal(rates_hz, chunks):
    x_CT, whole_CK = causal_case(*rates_hz)
    causal, parts, at = Causal(*rates_hz, BAND_HZ, (50.0,), 3), [], 0
    for n in (*chunks, 3000):
        parts.append(causal.process(x_CT[:, at : at + n]))
        at += n
    y_CK = np.concatenate(parts, axis=1)
    assert y_CK.shape == whole_CK.shape
    assert np.abs(y_CK - whole_CK).max() <= 1e-10 * np.abs(whole_CK).max()


@pytest.mark.parametrize("rate_hz, out_hz", [(256, 100), (500, 100), (173.61, 100), (128, 200), (128, 100)])
def test_causal_resampler_keeps_time_and_never_looks_ahead(rate_hz, out_hz):
    t_T = np.arange(int(20 * rate_hz)) / rate_hz
    causal = Causal(rate_hz, out_hz, None, None, 1)
    y_K = causal.process(np.sin(2 * np.pi * 7 * t_T)[None])[0]
    assert len(y_K) == int(np.ceil(len(t_T) * out_hz / rate_hz - 1e-9))
    t_K = np.arange(len(y_K)) / out_hz - causal.delay_s
    np.testing.assert_allclose(y_K[t_K > 1], np.sin(2 * np.pi * 7 * t_K[t_K > 1]), atol=5e-3)
    step_T = np.where(t_T < 10, 0.0, 1.0)
    y_K = Causal(rate_hz, out_hz, None, None, 1).process(step_T[None])[0]
    assert not y_K[np.arange(len(y_K)) / out_hz < 10 - 1e-9].any()


def test_causal_resampler_suppresses_aliases():
    t_T = np.arange(5000) / 500
    y_K = Causal(500, 100, None, None, 1).process(np.sin(2 * np.pi * 70 * t_T)[None])[0]  # would appear at 30 Hz
    assert np.abs(y_K[100:]).max() < 5e-3


def test_causal_starts_settled_on_an_electrode_offset():
    x_CT = np.full((2, 2000), 20_000.0)
    assert np.abs(Causal(256, 100, BAND_HZ, (50.0,), 2).process(x_CT)).max() < 1e-6
    np.testing.assert_allclose(Causal(256, 100, (None, 45.0), None, 2).process(x_CT), 20_000, rtol=1e-9)


def test_causal_passes_the_band_and_stops_the_rest():
    t_T = np.arange(256 * 60) / 256
    gains = {}
    for f in (0.05, 10.0, 50.0, 90.0):
        y_K = Causal(256, 256, BAND_HZ, (50.0,), 1).process(np.sin(2 * np.pi * f * t_T)[None])[0]
        gains[f] = y_K[256 * 40 :].std() * np.sqrt(2)
    assert abs(gains[10.0] - 1) < 0.01 and max(gains[0.05], gains[50.0], gains[90.0]) < 0.01


def test_snapshot_and_reset():
    x_CT, whole_CK = causal_case(256, 100)
    causal = Causal(256, 100, BAND_HZ, (50.0,), 3)
    head_CK = causal.process(x_CT[:, :1000])
    snapshot = causal.copy()
    tails = [c.process(x_CT[:, 1000:]) for c in (causal, snapshot)]
    np.testing.assert_array_equal(*tails)
    np.testing.assert_allclose(np.concatenate([head_CK, tails[0]], axis=1), whole_CK, atol=1e-8)
    causal.reset()
    np.testing.assert_array_equal(causal.process(x_CT), whole_CK)


# ----------------------------------------------------------------------------
# scale


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60))
def test_quartiles_are_numpys(values):
    x_CT = np.array([values, values[::-1]], np.float32)
    expected_C3 = np.quantile(x_CT.astype(np.float64), (0.25, 0.5, 0.75), axis=1).T
    np.testing.assert_allclose(quartiles(x_CT), expected_C3, rtol=1e-6, atol=1e-6)


def test_scales():
    x_CT = np.random.default_rng(0).normal(3, 7, (2, 100_000)).astype(np.float32)
    x_CT[1] = 5  # flat
    for scale in (robust_scale, zscore):
        scale_C, offset_C = scale(x_CT)
        np.testing.assert_allclose(scale_C, [7, 1], rtol=0.02)
        np.testing.assert_allclose(offset_C, [3, 5], atol=0.1)
        assert scale_C.dtype == offset_C.dtype == np.float32
    x_CT[0, :200] = 1e5  # an artefact hardly moves the robust one
    assert robust_scale(x_CT)[0][0] < 7.2 < 1000 < zscore(x_CT)[0][0]
