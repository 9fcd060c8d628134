"""
What a window is like, in numbers that quality and anomaly scores are made of: statistics, spectra, envelopes, autocorrelation.

All by numpy and scipy, float64 inside, one row per window; nothing is fitted here.

Shape letters: N windows, C channels, L samples of a window, F frequencies, K lags, S statistics.
"""

from collections.abc import Mapping

import numpy as np
from scipy.signal import hilbert, welch

WELCH = 256  # samples of a Welch segment, Hann, half overlapping
ENVELOPE_SHARE = 0.25  # of the frequencies up to half the rate, where an envelope's spectrum says something
LAGS = 128  # of the autocorrelation
TINY = 1e-12  # power relative to the windows' own, so that silence has a logarithm


def statistics(x_NCL: np.ndarray) -> np.ndarray:
    """Log RMS, kurtosis, crest factor, skewness and log line length of every window and channel (N, C, S)."""
    x = np.asarray(x_NCL, np.float64)
    centred = x - x.mean(2, keepdims=True)
    sd = centred.std(2) + TINY
    rms = np.sqrt((x**2).mean(2)) + TINY
    kurtosis = (centred**4).mean(2) / sd**4
    skew = (centred**3).mean(2) / sd**3
    line = np.abs(np.diff(x, axis=2)).mean(2) + TINY
    return np.stack([np.log(rms), kurtosis, np.abs(x).max(2) / rms, skew, np.log(line)], 2)


def psd(x_NCL: np.ndarray, rate_hz: float) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (F,) in Hz without 0, and Welch's power spectral density (N, C, F)."""
    segment = min(WELCH, x_NCL.shape[2])
    hz_F, power_NCF = welch(np.asarray(x_NCL, np.float64), rate_hz, nperseg=segment, axis=2)
    return hz_F[1:], power_NCF[:, :, 1:]


def envelope_spectrum(x_NCL: np.ndarray, rate_hz: float) -> tuple[np.ndarray, np.ndarray]:
    """
    Frequencies (F,) in Hz, and the power (N, C, F) of the squared envelope relative to its own mean.

    The squared-envelope spectrum of bearing diagnostics (Antoni 2007), over the full band.
    """
    x = np.asarray(x_NCL, np.float64)
    envelope = np.abs(hilbert(x - x.mean(2, keepdims=True), axis=2)) ** 2
    envelope = envelope / (envelope.mean(2, keepdims=True) + TINY) - 1
    samples = x.shape[2]
    taper_L = np.hanning(samples)
    power = np.abs(np.fft.rfft(envelope * taper_L, axis=2)) ** 2 / (taper_L**2).sum()
    hz = np.fft.rfftfreq(samples, 1 / rate_hz)
    kept = slice(1, max(2, round(ENVELOPE_SHARE * len(hz))))
    return hz[kept], power[:, :, kept]


def autocorrelation(x_NCL: np.ndarray, lags: int = LAGS) -> np.ndarray:
    """Autocorrelation (N, C, K) at lags 1 … K, biased, so that lag 0 has 1."""
    x = np.asarray(x_NCL, np.float64)
    x = x - x.mean(2, keepdims=True)
    lags = min(lags, x.shape[2] - 1)
    power = np.abs(np.fft.rfft(x, 2 * x.shape[2], axis=2)) ** 2
    r = np.fft.irfft(power, axis=2)[:, :, : lags + 1]
    return r[:, :, 1:] / (r[:, :, :1] + TINY)


def envelope_autocorrelation(x_NCL: np.ndarray) -> np.ndarray:
    """Autocorrelation (N, C, K) of the envelope."""
    x = np.asarray(x_NCL, np.float64)
    return autocorrelation(np.abs(hilbert(x - x.mean(2, keepdims=True), axis=2)))


def decibel(power: np.ndarray) -> np.ndarray:
    """10 log10, silence at −120 dB of the largest value."""
    return 10 * np.log10(power + TINY * max(float(np.nanmax(power)), TINY))


def log_spectral(x_NCL: np.ndarray, rate_hz: float) -> np.ndarray:
    """
    Features (N, F) of windows in dB: log-PSD and log envelope spectrum of every channel, side by side.

    The envelope's is in 32 bands, and with more than four channels the PSD too.
    """
    power = psd(x_NCL, rate_hz)[1]
    power = pooled(power, 32) if power.shape[1] > 4 else power
    rhythm = pooled(envelope_spectrum(x_NCL, rate_hz)[1], 32)
    both = [10 * np.log10(part + TINY) for part in (power, rhythm)]
    return np.concatenate([part.reshape(len(x_NCL), -1) for part in both], 1)


def pooled(power_NCF: np.ndarray, bands: int) -> np.ndarray:
    """Mean power in at most `bands` bands of equal width."""
    edges = np.unique(np.linspace(0, power_NCF.shape[2], bands + 1).round().astype(int))
    return np.add.reduceat(power_NCF, edges[:-1], axis=2) / np.diff(edges)


def band_powers(hz_F: np.ndarray, power_F: np.ndarray, bands_hz: Mapping[str, tuple[float, float]]) -> np.ndarray:
    """Mean power (…, bands) of the bands that have a frequency in them."""
    inside = [(hz_F >= low) & (hz_F < high) for low, high in bands_hz.values()]
    return np.stack([power_F[..., band].mean(-1) for band in inside if band.any()], -1)


def background(hz_F: np.ndarray, power_F: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Slope of the 1/f background (…,), frequency (Hz) and height (dB) of the alpha peak above it.

    A line through log power against log frequency from 2 to 40 Hz without 7 to 14 Hz; the peak is the largest distance from it there.
    """
    alpha = (hz_F >= 7) & (hz_F <= 14)
    fitted = (hz_F >= 2) & (hz_F <= 40) & ~alpha
    x_F, y = np.log10(hz_F), 10 * np.log10(power_F + TINY)
    centred_F = x_F[fitted] - x_F[fitted].mean()
    slope = (y[..., fitted] * centred_F).sum(-1) / (centred_F**2).sum()
    line = y[..., fitted].mean(-1)[..., None] + slope[..., None] * (x_F - x_F[fitted].mean())
    above = (y - line)[..., alpha]
    return slope / 10, hz_F[alpha][above.argmax(-1)], above.max(-1)
