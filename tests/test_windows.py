"""The window index against a plain enumeration."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.windows import Windows, merge


@st.composite
def cases(draw):
    segments, row = [], 0
    for row in range(draw(st.integers(1, 4))):
        at = 0
        for _ in range(draw(st.integers(1, 3))):
            stop = at + draw(st.integers(0, 150))
            segments.append((row, at, stop))
            at = stop + draw(st.integers(0, 20))
    interval = st.tuples(st.integers(0, row + 1), st.floats(-20, 400), st.floats(0.5, 90))
    return segments, draw(st.integers(1, 40)), draw(st.integers(1, 25)), draw(st.lists(interval, max_size=6))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_ids_and_overlaps_equal_an_enumeration(case):
    segments, samples, stride, intervals = case
    windows = Windows(segments, samples, stride)
    listed = [(row, t) for row, start, stop in segments for t in range(start, stop - samples + 1, stride)]
    assert len(windows) == len(listed)
    rows, starts = windows.locate(np.arange(len(windows)))
    assert list(zip(rows.tolist(), starts.tolist(), strict=True)) == listed

    table = np.array([(r, a, a + d) for r, a, d in intervals]).reshape(-1, 3)
    merged = merge(*table.T)
    covered = np.zeros(len(listed))
    for row, low, high in zip(*merged, strict=True):
        for i, (r, t) in enumerate(listed):
            covered[i] += max(0.0, min(t + samples, high) - max(t, low)) / samples if r == row else 0.0
    ids, share = windows.overlap(*merged)
    positive = share > 1e-12
    assert ids[positive].tolist() == np.flatnonzero(covered > 1e-12).tolist()
    assert np.allclose(share[positive], covered[ids[positive]])


def test_merge_joins_what_overlaps():
    rows, starts, stops = merge(np.array([1, 0, 0, 0]), np.array([0.0, 5, 1, 2]), np.array([1.0, 6, 3, 4]))
    assert rows.tolist() == [0, 0, 1] and starts.tolist() == [1, 5, 0] and stops.tolist() == [4, 6, 1]


def test_ranges_group_window_ids():
    windows = Windows([(0, 0, 100), (1, 0, 30), (2, 0, 50)], 10, 10)
    ranges = windows.ranges(["a", "b", "a"])
    assert ranges["a"].tolist() == [[0, 10], [13, 18]] and ranges["b"].tolist() == [[10, 13]]


def test_bad_ids_are_refused():
    with pytest.raises(AssertionError, match="window ids"):
        Windows([(0, 0, 100)], 10, 10).locate([10])


def test_24_million_windows_cost_tens_of_megabytes_and_no_time():
    segments = np.stack([np.arange(70_000), np.zeros(70_000, int), np.full(70_000, 140_000)], axis=1)
    tracemalloc.start()
    started = time.process_time()
    windows = Windows(segments, 400, 400)
    rows, _ = windows.locate(np.arange(0, len(windows), 1000))
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(windows) == 24_500_000 and rows[-1] == 24_499_000 // 350
    assert peak < 50e6 and seconds < 2, (peak, seconds)  # generous: machines are shared
