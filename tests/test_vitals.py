"""Histograms that can be trusted to their resolution, and complaints that don't repeat themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.vitals import HIGH_BUDGET, Histogram, Seldom, Vitals, health, live_line


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 100.0), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_right_to_an_eighth_of_an_octave(durations, share):
    histogram = Histogram()
    for s in durations:
        histogram.add(s)
    exact = float(np.quantile(durations, share, method="inverted_cdf"))
    assert exact / 1.0001 <= histogram.percentile(share) <= exact * 1.126
    assert histogram.count == len(durations) == sum(histogram.bins) and len(histogram.bins) == 216
    assert histogram.percentile(1.0) == pytest.approx(max(durations))


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9, 1e6])
def test_durations_beyond_all_bins_go_to_the_last_ones(seconds):
    histogram = Histogram()
    histogram.add(seconds)
    assert sum(histogram.bins) == 1 and histogram.bins[0 if seconds < 1 else -1] == 1


def test_no_durations_have_no_percentiles():
    assert Histogram().percentile(0.5) is None and Histogram().summary()["p99_ms"] is None


def test_complaints_come_once_a_period_and_say_how_many_were_held_back():
    seldom = Seldom(period_s=10, most=3)
    assert [seldom("a", t) for t in (0, 1, 2, 9.9, 10, 11)] == [0, None, None, None, 3, None]
    assert [seldom(str(i), 12) for i in range(100)] == [0] * 100 and len(seldom.last) <= 3


def stats(**changes) -> dict:
    stream = {"name": "amp", "state": "IDLE", "connected": True, "quality": {}, "pause_s": None}
    return {**Vitals().summary(), "warm": True, "budget": 0.1, "predicting_s": 0.0, "streams": [stream]} | changes


@pytest.mark.parametrize("changes, stopping, status, ready", [
    ({}, False, "ready", True),
    ({"warm": False}, False, "waiting", False),
    ({"streams": []}, False, "waiting", False),
    ({"budget": HIGH_BUDGET + 0.1}, False, "degraded", True),
    ({"predicting_s": 9.0}, False, "degraded", True),
    ({}, True, "stopping", False),
])  # fmt: skip
def test_health_is_ready_only_with_a_warm_model_and_a_producer(changes, stopping, status, ready):
    told = health(stats(**changes), [], stopping)
    assert (told["status"], told["ready"]) == (status, ready)
    assert bool(told["problems"]) == (status in ("waiting", "degraded"))
    assert health(stats(), ["the disk is full"], False)["problems"] == ["the disk is full"]
    (still,) = stats()["streams"]
    told = health(stats(streams=[still | {"pause_s": 7.5}]), [], False)
    assert told["status"] == "degraded" and told["problems"] == ["stream amp: no samples for 8 s"]


def test_the_live_line_names_the_channels_that_look_bad():
    fine = {"rms_uV": 10.0, "flat": False, "clipped": False, "line": 0.1}
    quality = {"Fz": fine, "C3": fine | {"flat": True}, "C4": fine | {"clipped": True}, "O1": fine | {"line": 0.9}}
    stream = {"name": "amp", "state": "INFERENCE", "connected": True, "quality": quality, "pause_s": None}
    line = live_line(stats(streams=[stream]))
    assert "amp INFERENCE: C3 flat, C4 clipped, O1 line 90%" in line and "\n" not in line
    assert ": 1 good" in live_line(stats(streams=[stream | {"quality": {"Fz": fine}}]))
    assert "amp INFERENCE: no samples for 8 s" in live_line(stats(streams=[stream | {"pause_s": 7.5}]))
