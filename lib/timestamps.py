"""
Sampling rate and gaps of a signal from the time stamps of its samples, which jitter, come in bursts and are rounded.

T samples, E events.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lib.errors import Rejected
from lib.recordings import Segment

MISSING = 2.5  # samples: fewer are within what stamps are good for
LEVEL_S = 5.0  # lateness is judged over this long on either side of a jump: longer than hold-ups, too short for drift


@dataclass(frozen=True)
class Clock:
    """Straight lines through the stamps between gaps: sample start + i of a piece was taken at first_s + i / rate_hz."""

    rate_hz: float
    pieces: list[tuple[int, int, float]]  # start, stop, first_s

    def segments(self, rate_hz: float) -> list[Segment]:
        """The pieces in recording time, with `rate_hz` the rate that is used from here on, which may be the nominal one."""
        segments, end_s = [], 0.0
        for start, stop, first_s in self.pieces:
            onset_s = max(end_s, first_s - self.pieces[0][2])
            segments.append(Segment(start, stop, onset_s))
            end_s = onset_s + (stop - start) / rate_hz
        return segments

    def onsets_s(self, stamps_E, rate_hz: float) -> list[float]:
        """Recording time of events by their stamps on the same clock, such that an event keeps its sample."""
        onsets, segments = [], self.segments(rate_hz)
        for stamp in np.asarray(stamps_E, np.float64).tolist():
            onset_s = stamp - self.pieces[0][2]  # in a gap
            for (start, stop, first_s), segment in zip(self.pieces, segments, strict=True):
                if -0.5 <= (stamp - first_s) * self.rate_hz < stop - start:
                    onset_s = segment.onset_s + max(0.0, stamp - first_s) * self.rate_hz / rate_hz
            onsets.append(onset_s)
        return onsets


def read_clock(stamps_T, name: str) -> Clock:
    """
    The clock behind time stamps in seconds, one per sample.

    A gap is a jump after which stamps stay late; what was only delivered late is made up for soon.
    Raises Rejected: `time_stamps`, `time_order`.
    """
    t_T = np.asarray(stamps_T, np.float64)
    if len(t_T) < 4 or not np.isfinite(t_T).all():
        raise Rejected(
            "time_stamps", f"{name}: {np.count_nonzero(~np.isfinite(t_T))} of {len(t_T)} time stamps are not numbers"
        )
    lag = min(1000, len(t_T) // 4)  # over many samples rounding and bursts average out, and few lags span a gap
    period_s = float(np.median(t_T[lag:] - t_T[:-lag])) / lag
    if not period_s > 0:
        raise Rejected("time_order", f"{name}: time stamps don't increase")
    excess_T = np.diff(t_T) - period_s
    jumps = np.flatnonzero(np.abs(excess_T) > MISSING * period_s)
    jitter_s = np.quantile(np.abs(excess_T), 0.99)  # bursts are regular, gaps are rare
    late_T = t_T - t_T[0] - np.arange(len(t_T)) * period_s
    near = max(1, round(LEVEL_S / period_s))
    gaps, since = [], 0
    for i in jumps.tolist():
        if i + 1 - since < near // 10:  # too close to the last gap to judge its level
            missing = excess_T[i] > 3 * jitter_s
        else:
            # the least late sample on either side: deliveries may be late for long, but all of them only if samples are missing
            before_s, after_s = late_T[max(since, i + 1 - near) : i + 1].min(), late_T[i + 1 : i + 1 + near].min()
            missing = (after_s - before_s) / excess_T[i] > 0.5 and abs(after_s - before_s) > jitter_s
        if missing:
            gaps.append(i)
            since = i + 1
    row = next((i for i in gaps if excess_T[i] < 0), None)
    if row is not None:
        raise Rejected("time_order", f"{name}: time goes back by {t_T[row] - t_T[row + 1]:.3f} s after sample {row}")

    edges = [0, *(i + 1 for i in gaps), len(t_T)]
    spans = list(pairwise(edges))
    # one period for all pieces, since it is one device: least squares, pooled
    numbers = [np.arange(b - a) - (b - a - 1) / 2 for a, b in spans]
    weight = sum(float(n @ n) for n in numbers)
    if weight > 0:
        period_s = sum(float(n @ t_T[a:b]) for n, (a, b) in zip(numbers, spans, strict=True)) / weight
    return Clock(1 / period_s, [(a, b, float(t_T[a:b].mean()) - period_s * (b - a - 1) / 2) for a, b in spans])
