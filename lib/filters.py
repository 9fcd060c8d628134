"""
Filters and resamplers on plain arrays: the signal path of build_cache.py and serve_realtime.py.

Spectral  a whole segment at once, zero phase, by FFT: what `raw.notch_filter(notch); raw.filter(lo, hi); raw.resample(out)`
          of MNE-Python gives with its default settings, edges and time grid included, at about a tenth of its CPU time.
Causal    chunk by chunk, with carried state: what the service runs, and what `build_cache.py --causal` stores.

Shapes: C channels, T samples, K output samples, J taps, F frequencies.
"""

import copy
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import ceil, log2

import numpy as np
import scipy  # scipy.signal loads when it is first used: it takes 1.1 s, and only causal filters need it
import scipy.fft as fft

from kernels import pack, plain

Band = tuple[float | None, float | None]  # low and high edge of the pass band in Hz; None leaves that side open
Notch = tuple[float, ...]  # line frequencies in Hz; one at or above Nyquist has nothing to remove and is left out


def same_rate(a_hz: float, b_hz: float) -> bool:
    """True where resampling would change nothing (MNE's own tolerance)."""
    return abs(a_hz - b_hz) <= 1e-6 * b_hz


def check_band(rate_hz: float, low: float | None, high: float | None) -> None:
    nyquist = rate_hz / 2
    if (low is not None and low <= 0) or (high is not None and high >= nyquist) or (low or 0) >= (high or nyquist):
        raise ValueError(f"band {low} to {high} Hz does not fit between 0 and the {nyquist:g} Hz Nyquist frequency")


# ----------------------------------------------------------------------------
# zero phase: MNE's FIR design


def firwin_taps(rate_hz: float, edges_hz: list[float], gains: list[int], transition_hz: float) -> np.ndarray:
    """Odd-length linear-phase taps: a sum of Hamming low-passes, one per transition between edges (mne.filter 'firwin')."""
    nyquist_hz = rate_hz / 2
    length = max(ceil(3.3 / transition_hz * rate_hz), 1) | 1  # 3.3 = length x transition width of a Hamming window
    edges, gains = [edge / nyquist_hz for edge in edges_hz], list(gains)
    if edges[0] > 0:
        edges, gains = [0.0, *edges], [gains[0], *gains]
    if edges[-1] < 1:
        edges, gains = [*edges, 1.0], [*gains, gains[-1]]
    taps = np.zeros(length)
    taps[length // 2] = gains[-1]
    for low, high, gain, next_gain in zip(edges, edges[1:], gains, gains[1:], strict=False):
        if gain != next_gain:
            n = round(3.3 / ((high - low) / 2)) | 1
            margin = (length - n) // 2
            place = np.arange(n) - n // 2
            low_pass = np.sinc((low + high) / 2 * place) * (0.54 + 0.46 * np.cos(2 * np.pi * place / (n - 1)))
            taps[margin : length - margin] += (gain - next_gain) * low_pass / low_pass.sum()
    return taps


def band_pass_taps(rate_hz: float, band_hz: Band) -> np.ndarray:
    """The taps of mne.filter.create_filter(None, rate, *band) with its default transitions; ValueError beyond Nyquist."""
    low, high = band_hz
    check_band(rate_hz, low, high)
    edges, gains, transitions = [], [], []
    if low is not None:
        transitions.append(min(max(0.25 * low, 2.0), low))
        edges, gains = [low - transitions[-1], low], [0, 1]
    if high is not None:
        transitions.append(min(max(0.25 * high, 2.0), rate_hz / 2 - high))
        edges, gains = [*edges, high, high + transitions[-1]], [*gains, 1, 0]
    return firwin_taps(rate_hz, edges, gains, min(transitions)) if transitions else np.ones(1)


def notch_taps(rate_hz: float, notch_hz: Notch) -> np.ndarray:
    """The taps of mne.filter.notch_filter: stop bands of f/200, transitions of 0.5 Hz; ValueError beyond Nyquist."""
    half = [(f, f / 400) for f in sorted(notch_hz)]
    edges = [edge for f, h in half for edge in (f - h - 0.5, f - h, f + h, f + h + 0.5)]
    if edges[0] <= 0 or edges[-1] > rate_hz / 2 or edges != sorted(edges):
        raise ValueError(f"notches {notch_hz} Hz overlap or do not fit below the {rate_hz / 2:g} Hz Nyquist frequency")
    return firwin_taps(rate_hz, edges, [1, 0, 0, 1] * len(notch_hz), 0.5)


# ----------------------------------------------------------------------------
# zero phase: one FFT for filter and resampler


@dataclass(frozen=True)
class Pass:
    """One FFT there and back: extend to `points` samples, multiply, come back with `new`, keep `final` from `first` on."""

    rate_hz: float
    band_hz: Band | None
    notch_hz: Notch | None
    points: int
    left: int  # samples of padding before the signal
    new: int
    first: int
    final: int


ALIAS_DB = 80.0  # what halving the rate leaves of a frequency that it folds onto a wanted one


@lru_cache(maxsize=4)
def half_bands(points: int, new: int) -> tuple[np.ndarray, ...]:
    """
    Taps of the half-band low-passes that may halve the rate, one after the other, before an FFT of `points`: the lowest new // 2
    bins, which are wanted, stay. Only the odd taps of one side; the even ones are 0, the middle one 1/2 (Kaiser window).
    """
    stages = []
    while points > max(2.4 * new, 1000) and points % 2 == 0:
        length = (ALIAS_DB - 7.95) / 2.285 / (2 * np.pi * (0.5 - new / points))
        half = 2 * ceil((length + 2) / 4)
        odd = np.arange(1, half, 2)
        shape = np.i0(0.1102 * (ALIAS_DB - 8.7) * np.sqrt(1 - (odd / half) ** 2)) / np.i0(0.1102 * (ALIAS_DB - 8.7))
        stages.append((np.sinc(odd / 2) / 2 * shape).astype(np.float32))
        points //= 2
    return tuple(stages)


# An FFT of an awkward length (26,214 = 2 x 3 x 17 x 257) costs several of a smooth, longer one, between whose samples eight taps of a
# Kaiser-Bessel window find the wanted ones: the non-uniform FFT (Fessler & Sutton 2003; shape: Beatty et al. 2005), accurate to 1e-5.
OVERSAMPLING, SHAPE = 1.25, np.pi * np.sqrt(64 / 1.25**2 * 0.75**2 - 0.8)


def grid_points(new: int) -> int:
    """The length to come back with where `new` samples are wanted: `new`, or a longer one that the FFT likes."""
    awkward = new > 100 and new != fft.next_fast_len(new, real=True)
    return fft.next_fast_len(ceil(OVERSAMPLING * new), real=True) if awkward else new


@lru_cache(maxsize=1)
def window_polynomials() -> np.ndarray:
    """The eight taps about a place between samples, as polynomials of its fraction - 1/2: (powers, 8), lowest first."""
    fraction = np.cos(np.pi * (np.arange(64) + 0.5) / 64) / 2  # Chebyshev nodes
    away_F8 = fraction[:, None] + 3.5 - np.arange(8)
    window_F8 = np.i0(SHAPE * np.sqrt(1 - (away_F8 / 4) ** 2)) / np.i0(SHAPE)
    return np.polynomial.polynomial.polyfit(fraction, window_F8, 6).astype(np.float32)


def window_spectrum(cycles: np.ndarray) -> np.ndarray:
    """The Fourier transform of that window at so many cycles a sample."""
    root = np.sqrt(SHAPE**2 - (8 * np.pi * cycles) ** 2 + 0j)
    return (8 * np.sinh(root) / root).real / np.i0(SHAPE)


@lru_cache(maxsize=4)
def response(
    rate_hz: float, band_hz: Band | None, notch_hz: Notch | None, points: int, new: int, quick: bool
) -> np.ndarray:
    """
    What each wanted bin is multiplied by, float32 (2F,), once for its real and once for its imaginary part: a zero-phase gain.

    `quick`: it also makes up for what half-bands and the window between samples do to the wanted bins.
    """
    bins, grid = np.arange(min(points, new) // 2 + 1), grid_points(new) if quick else new
    gain_F = np.full(len(bins), grid / points)
    for taps in design(rate_hz, band_hz, notch_hz):
        h_T = np.zeros(points)
        h_T[: len(taps)] = taps
        gain_F *= fft.rfft(np.roll(h_T, -(len(taps) // 2)))[: len(bins)].real
    if new != points and min(points, new) % 2 == 0:
        gain_F[-1] *= 2 if new < points else 0.5  # two bins fold into one, or one is split into two
    for taps in half_bands(points, new) if quick else ():
        h_T = np.zeros(points)
        h_T[0], h_T[1 : 2 * len(taps) : 2], h_T[-1 : -2 * len(taps) : -2] = 0.5, taps, taps
        gain_F *= 2 / fft.rfft(h_T)[: len(bins)].real
        points //= 2
    if grid != new:
        gain_F /= window_spectrum(bins / grid)
        gain_F[-1] *= 0.5 if new % 2 == 0 and new <= points else 1  # in the midst of a longer spectrum it counts twice
    return np.repeat(gain_F, 2).astype(np.float32)


def design(rate_hz: float, band_hz: Band | None, notch_hz: Notch | None) -> list[np.ndarray]:
    """The FIR taps of notch and band-pass, those that are wanted."""
    notch_hz = tuple(f for f in notch_hz or () if f < rate_hz / 2)
    taps = [notch_taps(rate_hz, notch_hz)] if notch_hz else []
    return taps + ([band_pass_taps(rate_hz, band_hz)] if band_hz and band_hz != (None, None) else [])


def run_pass(x_CT: np.ndarray, p: Pass, offset_C: np.ndarray, quick: bool) -> np.ndarray:
    """Filter and resample x - offset in x's own precision; `quick`, for float32: at a halved rate and a smooth length, where it can."""
    left, points, stages = p.left, p.points, half_bands(p.points, p.new) if quick else ()
    for taps in stages:
        x_CT = pack.halve(x_CT, left, points, offset_C, taps)
        left, points, offset_C = 0, points // 2, np.zeros_like(offset_C)
    X_CF = fft.rfft(x_CT if stages else pack.extend(x_CT, left, points, offset_C), axis=1)
    gain_2F = response(p.rate_hz, p.band_hz, p.notch_hz, p.points, p.new, quick)
    X_CF = X_CF[:, : len(gain_2F) // 2]
    X_CF.view(x_CT.dtype)[...] *= gain_2F
    grid = grid_points(p.new) if quick else p.new
    y_CM = fft.irfft(X_CF, grid, axis=1)
    if grid == p.new:
        return y_CM[:, p.first : p.first + p.final]
    return pack.interpolate(y_CM, p.new, p.first, p.final, window_polynomials())


class Spectral:
    """
    Zero-phase filter and resampler of whole segments: x_CT float32 at rate_hz -> y_CT float32 at out_hz.

    Equals MNE-Python's default `notch_filter`, `filter` and `resample` of a Raw (0.1 % rms, mostly far less), its padding
    and time grid included: MNE pads to a power of two P and makes round(P out/in) samples of that, so the output is shifted
    and stretched by up to half a sample. It has round(T out/in) samples. Raises ValueError for a band beyond Nyquist.
    """

    def __init__(self, rate_hz: float, out_hz: float, band_hz: Band | None, notch_hz: Notch | None = None):
        self.rate_hz, self.out_hz = float(rate_hz), float(out_hz)
        self.band_hz = tuple(band_hz) if band_hz else None
        self.notch_hz = tuple(notch_hz) if notch_hz else None
        taps = design(self.rate_hz, self.band_hz, self.notch_hz)
        self.reach = sum(len(h) // 2 for h in taps)  # samples on either side that one output depends on
        self.dc_gain = round(float(np.prod([h.sum() for h in taps])))  # 0 or 1 by design

    def passes(self, T: int) -> list[Pass]:
        """One pass where the padding is long enough to hide the filter's wrap-around, else MNE's steps one by one."""
        rate, band, notch, reach = self.rate_hz, self.band_hz, self.notch_hz, self.reach
        if not same_rate(self.out_hz, rate):
            ratio = self.out_hz / rate
            points = 2 ** ceil(log2(T + 2 * min(T // 8, 100)))
            left = (points - T) // 2
            new, first, final = max(round(ratio * points), 1), round(ratio * left), max(round(ratio * T), 1)
            resample = [Pass(rate, None, None, points, left, new, first, final)]
            if left >= 4 * reach:
                return [replace(resample[0], band_hz=band, notch_hz=notch)]
        elif T > 2 * reach:
            points = fft.next_fast_len(T + 2 * reach, real=True)
            return [Pass(rate, band, notch, points, reach, points, reach, T)]
        else:
            resample = []
        steps = []
        for one in ((None, notch), (band, None)):
            for taps in design(rate, *one):
                points = fft.next_fast_len(T + len(taps) - 1, real=True)
                steps.append(Pass(rate, *one, points, len(taps) // 2, points, len(taps) // 2, T))
        return steps + resample

    def __call__(self, x_CT: np.ndarray) -> np.ndarray:
        C, T = x_CT.shape
        if T == 0 or (self.reach == 0 and same_rate(self.out_hz, self.rate_hz)):
            return np.array(x_CT, np.float32)
        passes = self.passes(T)
        y_CK = np.empty((C, passes[-1].final), np.float32)
        fused = len(passes) == 1 and T > 2 * self.reach
        rows = min(max(2**24 // passes[-1].points, 1), 4)  # four share the SIMD lanes; a day-long one goes alone
        for c in range(0, C, rows):
            x, y = x_CT[c : c + rows], y_CK[c : c + rows]
            if fused:  # float32 is enough once the electrode offset (tens of mV) is about gone
                offset_C = x[:, :: T // 1000 + 1].mean(axis=1, dtype=np.float32)
                y[:] = run_pass(x.astype(np.float32, copy=False), passes[0], offset_C, quick=True)
                if self.dc_gain:
                    y += self.dc_gain * offset_C[:, None]
            else:  # short, or an unlucky length; the offset stays, since zeros may be padded to it
                x = x.astype(np.float64)
                for p in passes:
                    x = run_pass(x, p, np.zeros(len(x)), quick=False)
                y[:] = x
        return y_CK


# ----------------------------------------------------------------------------
# causal


class Causal:
    """
    Band-pass, notch and resampler with carried state: x_CT at rate_hz -> y_CK float64 at out_hz, in chunks of any size.

    Butterworth of order 4 per edge and 2nd-order notches (Q 30), as second-order sections; then a Kaiser-windowed sinc of
    ten zero crossings on either side, cut off at the lower Nyquist frequency, for any rational ratio of rates. Starts settled
    on its first sample, so an electrode offset doesn't ring. Output k belongs to time k / out_hz - delay_s (the sections'
    own phase delay comes on top); T samples give ceil(T out/in). The cutting into chunks changes the last bits at most.
    Its input must be finite: a NaN stays in the state until reset(). Raises ValueError for a band beyond Nyquist.
    """

    def __init__(self, rate_hz: float, out_hz: float, band_hz: Band | None, notch_hz: Notch | None, channels: int):
        low, high = band_hz or (None, None)
        check_band(rate_hz, low, high)
        sections = [
            scipy.signal.tf2sos(*scipy.signal.iirnotch(f, 30, rate_hz)) for f in notch_hz or () if f < rate_hz / 2
        ]
        if low and high:
            sections.append(scipy.signal.butter(4, (low, high), "bandpass", fs=rate_hz, output="sos"))
        elif low or high:
            sections.append(
                scipy.signal.butter(4, low or high, "highpass" if low else "lowpass", fs=rate_hz, output="sos")
            )
        self.sos = np.concatenate(sections) if sections else None
        self.settled_S2 = None if self.sos is None else scipy.signal.sosfilt_zi(self.sos)  # by a constant 1
        self.channels, self.up, self.down, self.delay_s = channels, 1, 1, 0.0
        if not same_rate(out_hz, rate_hz):
            ratio = Fraction(out_hz / rate_hz).limit_denominator(20_000)  # 10000/17361 for 173.61 Hz
            self.up, self.down = ratio.numerator, ratio.denominator
            half = 10 * max(self.up, self.down)
            self.delay_s = half / self.up / rate_hz
            J = 2 * half // self.up + 1
            at_JU = np.arange(J * self.up).reshape(J, self.up) - half  # in steps of 1 / (up x rate)
            window_JU = np.i0(5.0 * np.sqrt(np.clip(1 - (at_JU / half) ** 2, 0, 1))) * (at_JU <= half)
            taps_JU = np.sinc(at_JU / max(self.up, self.down)) * window_JU
            self.taps = (taps_JU / taps_JU.sum(axis=0)).ravel()  # each phase passes a constant unchanged
        self.reset()

    def reset(self) -> None:
        """Forget the signal: the next sample is a first sample."""
        self.sections = self.past_CT = None
        self.start = self.outputs = 0  # index of the first sample in past_CT; outputs given so far

    def copy(self) -> "Causal":
        """A snapshot that goes on independently (but for the sections' state, arrays are replaced, never written to)."""
        other = copy.copy(self)
        other.sections = copy.copy(self.sections)
        return other

    def process(self, x_CT: np.ndarray) -> np.ndarray:
        assert x_CT.ndim == 2 and len(x_CT) == self.channels, f"{x_CT.shape} is not ({self.channels}, T)"
        step = max(2**20 // max(self.channels, 1), 1)  # bounds the float64 copies of a whole recording in one call
        if 0 < x_CT.shape[1] <= step:
            return self._chunk(x_CT.astype(np.float64, copy=False))
        parts = [self._chunk(x_CT[:, i : i + step].astype(np.float64)) for i in range(0, x_CT.shape[1], step)]
        return np.concatenate(parts, axis=1) if parts else np.empty((self.channels, 0))

    def _chunk(self, x_CT: np.ndarray) -> np.ndarray:
        if self.sos is not None:
            if self.sections is None:
                self.sections = plain.Sections(self.sos, self.settled_S2[:, :, None] * x_CT[:, 0])
            x_CT = self.sections(x_CT)
        return x_CT if self.up == self.down else self.resample(x_CT)

    def resample(self, x_CT: np.ndarray) -> np.ndarray:
        """What process does after the sections."""
        reach = len(self.taps) // self.up - 1  # samples before the newest that an output depends on
        if self.past_CT is None:
            self.start = -ceil(reach / self.down) * self.down  # always a multiple of `down`: there the phase is 0
            self.past_CT = np.repeat(x_CT[:, :1], -self.start, axis=1)
        x_CT = np.concatenate([self.past_CT, x_CT], axis=1)
        stop = self.start + x_CT.shape[1]
        until = -(-stop * self.up // self.down)
        if until - self.outputs < 16:  # a live chunk: one product per output
            y_KC = np.empty((until - self.outputs, self.channels))
            for i, k in enumerate(range(self.outputs, until)):
                newest, phase = divmod(k * self.down - self.start * self.up, self.up)
                y_KC[i] = x_CT[:, newest - reach : newest + 1] @ self.taps[phase :: self.up][::-1]
            y_CK = y_KC.T
        else:
            first = self.start // self.down * self.up
            y_CK = scipy.signal.upfirdn(self.taps, x_CT, self.up, self.down, axis=1)[
                :, self.outputs - first : until - first
            ]
        keep = (stop - reach) // self.down * self.down
        self.past_CT, self.start, self.outputs = x_CT[:, keep - self.start :].copy(), keep, until
        return y_CK


# ----------------------------------------------------------------------------
# scale


def envelope(x_CT: np.ndarray, rate_hz: float, band_hz: Band) -> np.ndarray:
    """
    Magnitude of the analytic signal of what lies in a band, float32: how loud a resonance is, moment by moment (Randall 2011).

    A damaged bearing knocks at a rate that its geometry sets, and each knock rings at resonances that its housing sets; only the
    envelope's spectrum is of the fault alone. Zero-phase Butterworth of fourth order, a high-pass where the band ends at half the rate.
    """
    y_CT = scipy.signal.sosfiltfilt(_envelope_sections(rate_hz, band_hz), x_CT.astype(np.float64), axis=1)
    analytic_CT = scipy.signal.hilbert(y_CT, fft.next_fast_len(y_CT.shape[1]), axis=1)
    return np.abs(analytic_CT)[:, : x_CT.shape[1]].astype(np.float32)


def _envelope_sections(rate_hz: float, band_hz: Band) -> np.ndarray:
    low, high = band_hz
    edges, kind = (low, "highpass") if high > 0.49 * rate_hz else ([low, high], "bandpass")
    return scipy.signal.butter(4, edges, kind, fs=rate_hz, output="sos")


def envelope_samples(rate_hz: float, band_hz: Band) -> int:
    """What an envelope takes at least: one sample more than sosfiltfilt mirrors at either end."""
    return 3 * (2 * len(_envelope_sections(rate_hz, band_hz)) + 1) + 1


def robust_scale(x_CT: np.ndarray, flat: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Interquartile range / 1.349 and median of each channel, exact, float32 (C,) each; scale 1 for one below `flat`."""
    q_C3 = quartiles(x_CT)
    scale_C = (q_C3[:, 2] - q_C3[:, 0]) / 1.349
    return np.where(scale_C > flat, scale_C, 1).astype(np.float32), q_C3[:, 1].astype(np.float32)


def quartiles(x_CT: np.ndarray) -> np.ndarray:
    """Equal to np.quantile(x, (0.25, 0.5, 0.75), axis=1).T, quicker."""
    place_3 = np.arange(1, 4) * ((x_CT.shape[1] - 1) / 4)
    low_3 = place_3.astype(int)
    ranks, at = np.unique([low_3, np.ceil(place_3).astype(int)], return_inverse=True)
    low_C3, high_C3 = pack.order_statistics(x_CT, ranks)[:, at.reshape(2, 3)].swapaxes(0, 1).astype(np.float64)
    return low_C3 + (place_3 - low_3) * (high_C3 - low_C3) + 0.0  # + 0: of equal zeros any sign may come first


def zscore(x_CT: np.ndarray, flat: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation and mean of each channel, float32 (C,) each; scale 1 for one below `flat`."""
    scale_C = x_CT.std(axis=1)
    return np.where(scale_C > flat, scale_C, 1).astype(np.float32), x_CT.mean(axis=1).astype(np.float32)
