"""
Is this a signal? Gaps, flat, saturated and implausible channels, looked for before anything is filtered or cached.

One sample that is not a number makes a filter turn its whole channel into nothing, so gaps are closed or cut out first.

Shapes: C channels, T samples.
"""

from dataclasses import dataclass

import numpy as np

from lib.errors import Rejected
from lib.recordings import Segment

GAP_S = 0.5  # longer runs without a number split the recording or, in a minority of channels, make these bad; shorter are interpolated
LOST_SHARE = 0.05  # a channel that lacks more of its samples than this is bad, however short the gaps
# share of samples equal to the one before, or at the channel's extremes and equal to a neighbour
FLAT_SHARE, SATURATED_SHARE = 0.5, 0.05
# robust deviation after filtering, median over channels: outside the first range no EEG lies, whatever the amplifier; outside the second
# it is unusual enough to be reported (some public recordings state volts and hold the converter's own unit)
PLAUSIBLE_UV, USUAL_UV = (0.1, 50_000.0), (0.5, 1000.0)
# robust deviation over the median channel's: electrodes on a head differ by 2 or 3, one that hangs in the air by hundreds; below so many
# microvolts it is the others that are too quiet
LOUD, LOUD_UV = 30.0, 200.0
# a true rate of so many times the stated one puts the lines of a shaft on fractions of its stated orders: by so many dB, while the upper
# half of the spectrum holds less than this share of the power. Half orders alone may be a loose part, so twice the rate is only noted.
RATE_RATIOS, LINE_DB, UPPER_SHARE = (4, 3, 2), 10.0, 0.01
LOOK_SAMPLES, BLOCK = 1 << 14, 256  # long recordings are judged by evenly spaced blocks, this many samples in all


@dataclass
class Inspection:
    """A signal without gaps, and what was found."""

    x_CT: np.ndarray
    segments: list[Segment]
    bad: list[int]
    notes: list[str]


def inspect(x_CT: np.ndarray, rate_hz: float, segments: list[Segment]) -> Inspection:
    """Close or cut gaps (values that are not finite) and flag channels that are flat, saturated or mostly gaps. Raises Rejected `no_data`."""
    notes, bad = [], set()
    if not np.isfinite(x_CT.sum(1)).all():
        x_CT, segments, bad = _without_gaps(x_CT, rate_hz, segments, notes)
    if not segments:
        raise Rejected("no_data", "nothing but gaps")
    look_CT = _look(x_CT, segments)
    same_CT = look_CT[:, 1:] == look_CT[:, :-1]
    flat_C = (same_CT.mean(1) > FLAT_SHARE) if same_CT.shape[1] else np.zeros(len(x_CT), bool)
    at_rail_CT = (look_CT[:, 1:] == look_CT.max(1, keepdims=True)) | (look_CT[:, 1:] == look_CT.min(1, keepdims=True))
    saturated_C = (at_rail_CT & same_CT).mean(1) > SATURATED_SHARE if same_CT.shape[1] else flat_C
    for word, found_C in (("flat", flat_C), ("saturated", saturated_C & ~flat_C)):
        if found_C.any():
            notes.append(f"{word} channels: {found_C.sum()} of {len(found_C)}")
            bad |= set(np.flatnonzero(found_C).tolist())
    return Inspection(x_CT, segments, sorted(bad), notes)


def check_amplitude(y_CT: np.ndarray, good: np.ndarray) -> list[str]:
    """A note where filtered microvolts are unusual for EEG. Raises Rejected `implausible_amplitude` where they can't be EEG."""
    deviation_uV = float(np.median(_deviations(y_CT)[good]))
    if not PLAUSIBLE_UV[0] <= deviation_uV <= PLAUSIBLE_UV[1]:
        raise Rejected(
            "implausible_amplitude",
            f"median robust deviation {deviation_uV:.3g} µV, where EEG has {PLAUSIBLE_UV[0]:g} to {PLAUSIBLE_UV[1]:g}: a wrong unit",
        )
    unusual = not USUAL_UV[0] <= deviation_uV <= USUAL_UV[1]
    return (
        [f"unusual amplitude, the stated unit may be wrong: median robust deviation {deviation_uV:.3g} µV"]
        if unusual
        else []
    )


def loud_channels(y_CT: np.ndarray, good: np.ndarray) -> list[int]:
    """Channels of a filtered EEG in microvolts that are so much louder than the median of the good ones that they would drown an average reference."""
    deviation_C = _deviations(y_CT)
    return np.flatnonzero(deviation_C > max(LOUD * np.median(deviation_C[good]), LOUD_UV)).tolist()


def _deviations(y_CT: np.ndarray) -> np.ndarray:
    """Interquartile range / 1.349 of each channel, from some 512 evenly spaced samples."""
    low_C, high_C = np.percentile(y_CT[:, :: max(1, y_CT.shape[1] // 512)], (25, 75), axis=1)
    return (high_C - low_C) / 1.349


def check_rate(x_CT: np.ndarray, rate_hz: float, shaft_hz: float) -> list[str]:
    """
    Notes where the lines of a shaft of known speed don't fit the stated rate. Raises Rejected `rate_implausible` where they contradict it.

    The rate is read off the machine: its shaft turns `shaft_hz` times a second. A recording too short to tell its lines says nothing.
    """
    from scipy.signal import welch  # here: it takes a second, and only vibration needs it

    for ratio in RATE_RATIOS:
        step_hz = shaft_hz / ratio
        segment = 1 << int(np.ceil(np.log2(24 * rate_hz / step_hz)))
        if 4 * step_hz * ratio > rate_hz or segment > x_CT.shape[1]:
            continue
        hz_F, power_CF = welch(x_CT, rate_hz, nperseg=segment, axis=1)
        upper = (power_CF[:, hz_F > rate_hz / 4].sum(1) / np.maximum(power_CF.sum(1), 1e-30)).max()
        lines = [_line_db(hz_F, power_CF, k * step_hz, step_hz) for k in range(1, 2 * ratio) if k % ratio]
        if upper < UPPER_SHARE and np.percentile(lines, 25) > LINE_DB:
            words = f"stated {rate_hz:g} Hz, but a shaft of {60 * shaft_hz:g} rpm has its lines at 1/{ratio}, as if the rate were {ratio * rate_hz:g} Hz"
            if ratio > 2:
                raise Rejected("rate_implausible", f"{words}; if so, state it under [rates] of dataset.toml")
            return [f"rate or loose parts: {words}"]
    return []


def _line_db(hz_F: np.ndarray, power_CF: np.ndarray, at_hz: float, step_hz: float) -> float:
    """How far the strongest frequency within 1 % of `at_hz` stands above the median around it, best channel."""
    away_F = np.abs(hz_F - at_hz)
    near_F, around_F = away_F <= max(0.01 * at_hz, hz_F[1]), away_F <= 0.45 * step_hz
    return float(
        (
            10
            * np.log10(power_CF[:, near_F].max(1) / np.maximum(np.median(power_CF[:, around_F], axis=1), 1e-30) + 1e-30)
        ).max()
    )


def _look(x_CT: np.ndarray, segments: list[Segment]) -> np.ndarray:
    """All samples of a short recording, evenly spaced blocks of a long one."""
    total = sum(s.stop - s.start for s in segments)
    if total <= LOOK_SAMPLES:
        return np.concatenate([x_CT[:, s.start : s.stop] for s in segments], axis=1)
    starts = np.linspace(0, x_CT.shape[1] - BLOCK, LOOK_SAMPLES // BLOCK).astype(int)
    return np.concatenate([x_CT[:, s : s + BLOCK] for s in starts], axis=1)


def _without_gaps(x_CT: np.ndarray, rate_hz: float, segments: list[Segment], notes: list[str]) -> tuple:
    """The signal with short gaps interpolated, segments split at long ones, and the channels with long gaps of their own, zeroed."""
    gap_CT = ~np.isfinite(x_CT)
    dead_C = gap_CT.mean(1) > 0.5  # a channel that never worked doesn't split the others
    silent_T = gap_CT[~dead_C].mean(0) > 0.5 if not dead_C.all() else np.ones(x_CT.shape[1], bool)
    cuts = _long_runs(silent_T, GAP_S * rate_hz)
    kept = []
    for segment in segments:
        start = segment.start
        for a, b in [
            (max(a, segment.start), min(b, segment.stop)) for a, b in cuts if a < segment.stop and b > segment.start
        ]:
            kept.append((start, a))
            start = b
        kept.append((start, segment.stop))
    whole = [next(s for s in segments if s.start <= a <= s.stop) for a, _ in kept]
    split = [Segment(a, b, s.onset_s + (a - s.start) / rate_hz) for (a, b), s in zip(kept, whole, strict=True) if b > a]
    if cuts:
        notes.append(f"gaps cut out: {len(cuts)}, {sum(b - a for a, b in cuts) / rate_hz:.1f} s")
    x_CT, inside_T = x_CT.copy(), np.zeros(x_CT.shape[1], bool)
    for s in split:
        inside_T[s.start : s.stop] = True
    lost_C = gap_CT[:, inside_T].mean(1) > LOST_SHARE if inside_T.any() else np.ones(len(x_CT), bool)
    lost_C |= [bool(_long_runs(gap_T & inside_T, GAP_S * rate_hz)) for gap_T in gap_CT]
    for c, gap_T in enumerate(gap_CT):
        if lost_C[c]:
            x_CT[c] = 0
        elif gap_T.any():
            known = np.flatnonzero(~gap_T)
            x_CT[c, gap_T] = np.interp(np.flatnonzero(gap_T), known, x_CT[c, known])
            notes.append(f"short gaps interpolated: {int(gap_T[inside_T].sum())} samples of channel {c}")
    if lost_C.any():
        notes.append(f"channels with long gaps: {int(lost_C.sum())}")
    return x_CT, split, set(np.flatnonzero(lost_C).tolist())


def _long_runs(flag_T: np.ndarray, longest: float) -> list[tuple[int, int]]:
    """Where a flag stands for more than `longest` samples: [start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flag_T, [False]]).astype(np.int8))).reshape(-1, 2)
    return [(a, b) for a, b in edges.tolist() if b - a > longest]
