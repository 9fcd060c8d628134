"""
Sampling rate and gaps of a signal from the time stamps of its samples, which jitter, come in bursts and are rounded.

T samples, E events.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lib.errors import Rejected
from lib.recordings import Segment

MISSING = 2.5  # samples: fewer are within what stamps are good for
_DATE = re.compile(
    r"(?:(\d{4}-\d\d-\d\d)[T ])?(\d\d:\d\d:\d\d(?:[.,]\d{1,9})?) ?(?:Z|(?:UTC)?([+-])(\d\d):?(\d\d))?", re.ASCII
)
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
    """The clock behind time stamps in seconds, one per sample. Raises Rejected: `time_stamps`, `time_order`."""
    t_T = np.asarray(stamps_T, np.float64)
    bad = np.count_nonzero(~np.isfinite(t_T))
    if len(t_T) < 4 or bad:
        raise Rejected("time_stamps", f"{name}: {len(t_T)} time stamps, of which {bad} are not numbers")
    lag = min(1000, len(t_T) // 4)  # over many samples rounding and bursts average out, and few lags span a gap
    period_s = float(np.median(t_T[lag:] - t_T[:-lag])) / lag
    if not period_s > 0:
        raise Rejected("time_order", f"{name}: time stamps don't increase")
    edges = _edges(t_T, period_s)
    back = next((e for e in edges[1:-1] if t_T[e] < t_T[e - 1]), None)
    if back is not None:
        raise Rejected("time_order", f"{name}: time goes back by {t_T[back - 1] - t_T[back]:.3f} s at sample {back}")

    spans = list(pairwise(edges))
    # one period for all pieces, since it is one device: least squares, pooled
    numbers = [np.arange(b - a) - (b - a - 1) / 2 for a, b in spans]
    weight = sum(float(n @ n) for n in numbers)
    if weight > 0:
        period_s = sum(float(n @ t_T[a:b]) for n, (a, b) in zip(numbers, spans, strict=True)) / weight
    return Clock(1 / period_s, [(a, b, float(t_T[a:b].mean()) - period_s * (b - a - 1) / 2) for a, b in spans])


def read_dates(texts: Sequence[str], name: str) -> np.ndarray:
    """
    Seconds since the first of time stamps written as dates (ISO 8601, as `2024-01-01 12:00:00.004+01:00`) or times of day, float64 (T,).

    Raises Rejected `time_stamps` for anything else, because 01/02/2024 may be January or February.
    """
    found = [_DATE.fullmatch(text.strip()) for text in texts]
    if None in found:
        wrong = found.index(None)
        mend = "write seconds, or dates as 2024-01-31 12:00:00.004"
        raise Rejected(
            "time_stamps", f"{name}: {texts[wrong]!r} in row {wrong + 1} of the time column is not read: {mend}"
        )
    try:
        local = np.array([f"{m[1] or '1970-01-01'}T{m[2].replace(',', '.')}" for m in found], "datetime64[ns]")
    except ValueError as error:
        raise Rejected("time_stamps", f"{name}: the time column holds a date that is none: {error}") from error
    ahead_min = [int(f"{m[3]}1") * (60 * int(m[4]) + int(m[5])) if m[3] else 0 for m in found]
    stamps = local - np.array(ahead_min, "timedelta64[m]")
    return (stamps - stamps[0]).astype(np.float64) / 1e9


def _edges(t_T: np.ndarray, period_s: float) -> list[int]:
    """Where pieces without a gap start and stop: a gap is a jump after which stamps stay late; what only came late is made up for soon."""
    excess_T = np.diff(t_T) - period_s
    jumps = np.flatnonzero(np.abs(excess_T) > MISSING * period_s)
    jitter_s = np.quantile(np.abs(excess_T), 0.99)  # bursts are regular, gaps are rare
    late_T = t_T - t_T[0] - np.arange(len(t_T)) * period_s
    near = max(1, round(LEVEL_S / period_s))

    def missing(i: int, start: int, stop: int) -> bool:
        """Whether samples are missing after sample i of a piece [start, stop)."""
        before_T, after_T = late_T[max(start, i + 1 - near) : i + 1], late_T[i + 1 : min(stop, i + 1 + near)]
        if min(len(before_T), len(after_T)) < near // 10:  # too close to a gap to judge the level between the two
            return excess_T[i] > 3 * jitter_s
        # the least late samples: deliveries may be late for long, but all of them only if samples are missing
        shift_s = after_T.min() - before_T.min()
        return shift_s / excess_T[i] > 0.5 and abs(shift_s) > jitter_s

    edges = [0, len(t_T)]
    by_size = sorted(jumps.tolist(), key=lambda i: -abs(excess_T[i]))  # so that small ones are judged between the large
    for i in by_size:
        place = bisect_left(edges, i + 1)
        if missing(i, edges[place - 1], edges[place]):
            edges.insert(place, i + 1)
    for i in by_size:  # once more, now that smaller ones beside them are known too
        place = bisect_left(edges, i + 1)
        if edges[place] == i + 1 and not missing(i, edges[place - 1], edges[place + 1]):
            edges.pop(place)
    return edges
