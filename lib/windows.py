"""
Which windows there are: an index that holds a few numbers per segment and none per window, so that 24 million cost nothing.

Window ids are 0 … n-1 in order of recording, segment and time; window i is found by search.
"""

from collections.abc import Sequence

import numpy as np

SEIZURE = "seizure"  # the event label that windows are categorised by
FULL_SHARE = 0.99  # a window is seizure throughout if at least this share of it is


class Windows:
    """Windows of `samples` samples, every `stride`, inside the segments (recording row, start, stop) of a cache."""

    def __init__(self, segments: Sequence[tuple[int, int, int]], samples: int, stride: int, cache=None):
        table = np.array(segments, np.int64).reshape(-1, 3)
        counts = np.maximum(0, (table[:, 2] - table[:, 1] - samples) // stride + 1)
        keep = counts > 0
        self.samples, self.stride, self.cache = samples, stride, cache
        self._row, self._start = table[keep, 0], table[keep, 1]
        self._first = np.concatenate([[0], np.cumsum(counts[keep])])

    def __len__(self) -> int:
        return int(self._first[-1])

    def locate(self, ids) -> tuple[np.ndarray, np.ndarray]:
        """Row of `cache.recordings` and first sample of each window."""
        ids = np.asarray(ids, np.int64)
        assert ids.size == 0 or (0 <= ids.min() and ids.max() < len(self)), (
            f"window ids {ids.min()}…{ids.max()} of {len(self)}"
        )
        segment = np.searchsorted(self._first, ids, side="right") - 1
        return self._row[segment], self._start[segment] + (ids - self._first[segment]) * self.stride

    def read(self, ids, unit: str = "model", channels: int | None = None):
        """The windows `ids` as a Batch of their cache."""
        return self.cache.read(*self.locate(ids), self.samples, unit, channels)

    def ranges(self, values: Sequence) -> dict:
        """Window id ranges, int64 (n, 2), per distinct value; `values` holds one hashable value per row of `cache.recordings`."""
        groups: dict = {}
        for row, first, stop in zip(
            self._row.tolist(), self._first[:-1].tolist(), self._first[1:].tolist(), strict=True
        ):
            groups.setdefault(values[row], []).append((first, stop))
        return {value: np.array(pairs, np.int64) for value, pairs in groups.items()}

    def overlap(self, row_N, start_N, stop_N) -> tuple[np.ndarray, np.ndarray]:
        """
        The sorted ids of the windows that intervals touch, and the share (0, 1] of each that they cover.

        Intervals are rows of recordings with start and stop in samples; those of one recording must not overlap (see `merge`).
        """
        row_N, start_N, stop_N = (np.asarray(a, np.float64) for a in (row_N, start_N, stop_N))
        # pair every interval with every segment of its recording: segments are sorted by recording
        order = np.argsort(self._row, kind="stable")
        low, high = (np.searchsorted(self._row[order], row_N, side) for side in ("left", "right"))
        interval = np.repeat(np.arange(len(row_N)), high - low)
        segment = order[
            np.arange(len(interval)) - np.repeat(np.cumsum(high - low) - (high - low), high - low) + low[interval]
        ]
        begin, end = start_N[interval] - self._start[segment], stop_N[interval] - self._start[segment]
        count = self._first[segment + 1] - self._first[segment]
        first = np.maximum(0, np.floor((begin - self.samples) / self.stride).astype(np.int64) + 1)
        last = np.minimum(count - 1, np.ceil(end / self.stride).astype(np.int64) - 1)
        number = np.maximum(0, last - first + 1)
        pair = np.repeat(np.arange(len(segment)), number)
        k = np.arange(len(pair)) - np.repeat(np.cumsum(number) - number, number) + first[pair]
        covered = np.minimum(k * self.stride + self.samples, end[pair]) - np.maximum(k * self.stride, begin[pair])
        ids, inverse = np.unique(self._first[segment[pair]] + k, return_inverse=True)
        return ids, np.minimum(np.bincount(inverse, covered / self.samples, len(ids)), 1.0)

    def seizure_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted ids of the windows that are seizure partly, and throughout; all others are none."""
        row, start_s, stop_s = self.cache.intervals(SEIZURE)
        ids, share = self.overlap(row, start_s * self.cache.rate_hz, stop_s * self.cache.rate_hz)
        return ids[share < FULL_SHARE], ids[share >= FULL_SHARE]


def merge(row_N, start_N, stop_N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intervals sorted by recording and start, with overlapping and touching ones of a recording made one."""
    order = np.lexsort((start_N, row_N))
    merged: list[list[float]] = []
    for row, start, stop in zip(
        *(np.asarray(a, np.float64)[order].tolist() for a in (row_N, start_N, stop_N)), strict=True
    ):
        if merged and merged[-1][0] == row and start <= merged[-1][2]:
            merged[-1][2] = max(merged[-1][2], stop)
        else:
            merged.append([row, start, stop])
    table = np.array(merged, np.float64).reshape(-1, 3)
    return table[:, 0].astype(np.int64), table[:, 1], table[:, 2]
