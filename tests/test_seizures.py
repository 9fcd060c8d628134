"""Seizure scoring against cases worked by hand and against the public timescoring package."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import seizures
from lib.seizures import Counts


def values(counts: Counts) -> tuple:
    return counts.hits, counts.misses, counts.false_alarms


@pytest.mark.parametrize(
    "reference, found, expected",
    [
        ([(100, 160)], [(120, 130)], (10, 50, 0)),
        ([(100, 160)], [(150, 180)], (10, 50, 20)),
        ([], [(0, 5)], (0, 0, 5)),
        ([(0, 5)], [], (0, 5, 0)),
    ],
)
def test_sample_counts_by_hand(reference, found, expected):
    assert values(seizures.sample_counts(reference, found, 600)) == expected


@pytest.mark.parametrize(
    "reference, found, expected",
    [
        ([(100, 160)], [(71, 75)], (1, 0, 0)),  # 29 s before: within the tolerance
        ([(100, 160)], [(60, 69)], (0, 1, 1)),  # 31 s before: not
        ([(100, 160)], [(219, 230)], (1, 0, 0)),  # 59 s after
        ([(100, 160)], [(221, 230)], (0, 1, 1)),
        ([(100, 160), (240, 300)], [(110, 120)], (1, 0, 0)),  # 80 s apart: one seizure
        ([(100, 160), (251, 300)], [(110, 120)], (1, 1, 0)),  # 91 s apart: two
        ([(100, 1000)], [(110, 120)], (1, 2, 0)),  # 15 minutes: three seizures of 5
        ([(100, 160)], [(1000, 2000)], (0, 1, 4)),  # a false alarm of 1,000 s: 300 + 300 + 300 + 100
        ([], [], (0, 0, 0)),
    ],
)
def test_szcore_counts_by_hand(reference, found, expected):
    assert values(seizures.szcore_counts(reference, found, 3600)) == expected


@pytest.mark.parametrize(
    "reference, found, expected",
    [
        ([(100, 160)], [(159, 400)], (1, 0, 0)),
        ([(100, 160)], [(160, 400)], (0, 1, 1)),  # touching is not overlapping
        ([(100, 160), (200, 210)], [(150, 205)], (2, 0, 0)),
        ([(100, 160)], [(100, 110), (120, 130), (300, 310)], (1, 0, 1)),
    ],
)
def test_overlap_counts_by_hand(reference, found, expected):
    assert values(seizures.overlap_counts(reference, found, 3600)) == expected


@pytest.mark.parametrize(
    "reference, found, expected",
    [
        ([(100, 200)], [(100, 200)], (1, 0, 0)),
        ([(100, 200)], [(150, 200)], (0.5, 0.5, 0)),
        ([(100, 200)], [(50, 150)], (0.5, 0.5, 0.5)),
        ([(100, 200)], [(150, 250)], (0.5, 0.5, 0.5)),
        ([(100, 200)], [(50, 250)], (1, 0, 1)),
        ([(100, 200)], [(0, 1000)], (1, 0, 1)),  # at most one false alarm
        ([(100, 200)], [(110, 120), (130, 160)], (0.4, 0.6, 0)),  # two detections in one seizure add up
        ([(100, 200), (300, 400), (500, 600)], [(100, 600)], (1, 2, 1)),  # one detection over three seizures
        ([(100, 200)], [(300, 310)], (0, 1, 1)),
        ([(100, 200)], [(110, 130), (180, 220)], (0.4, 0.6, 0.2)),
    ],
)
def test_taes_counts_by_hand(reference, found, expected):
    assert values(seizures.taes_counts(reference, found, 3600)) == pytest.approx(expected)


def test_rates_add_up_over_recordings_and_are_nan_where_they_mean_nothing():
    total = Counts(1, 1, 2, 3600) + Counts(2, 0, 0, 3600)
    assert (total.sensitivity, total.precision) == (0.75, 0.6)
    assert total.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert total.false_alarms_per_day == 24
    assert all(math.isnan(v) for v in Counts().rates("x").values())
    with pytest.raises(ValueError, match="no recording has an annotated seizure"):
        seizures.score([([], [(0, 1)], 60)])


def test_detection_fills_gaps_and_drops_blips():
    probability_T = np.zeros(100)
    probability_T[[*range(10, 20), *range(22, 30), 50, *range(80, 100)]] = 0.9
    found = seizures.detect(probability_T, 1.0, 0.5, close_s=2, open_s=2, shortest_s=3)
    assert found.tolist() == [[10, 30], [80, 100]]
    assert seizures.detect(probability_T, 10.0, 0.95, 1, 1, 1).shape == (0, 2)


events = st.lists(st.tuples(st.integers(0, 590), st.integers(1, 900)), max_size=6).map(
    lambda pairs: [(float(start * 6), float(min(3600, start * 6 + length))) for start, length in pairs]
)


@settings(max_examples=200, deadline=None)
@given(events, events)
def test_scores_equal_those_of_the_public_package(reference, found):
    timescoring = pytest.importorskip("timescoring.scoring", reason="pip install timescoring")
    from timescoring.annotations import Annotation

    # it expects sorted events that don't overlap
    reference, found = ([tuple(i) for i in seizures.merge(x).tolist()] for x in (reference, found))
    a, b = Annotation(reference, 10, 36000), Annotation(found, 10, 36000)
    for theirs, ours in (
        (timescoring.SampleScoring(a, b, 1), seizures.sample_counts(reference, found, 3600)),
        (timescoring.EventScoring(a, b), seizures.szcore_counts(reference, found, 3600)),
    ):
        assert ours.hits == theirs.tp and ours.false_alarms == theirs.fp
        assert ours.hits + ours.misses == theirs.refTrue
        assert ours.false_alarms_per_day == pytest.approx(theirs.fpRate)


@settings(max_examples=100, deadline=None)
@given(events, events)
def test_every_annotated_seizure_is_hit_or_missed(reference, found):
    whole = len(seizures.merge(reference))
    for rule in (seizures.overlap_counts, seizures.taes_counts):
        counts = rule(reference, found, 3600)
        assert counts.hits + counts.misses == pytest.approx(whole) and counts.false_alarms >= 0
    assert np.array_equal(seizures.intervals_of(seizures.mask_of(reference, 3600, 1), 1), seizures.merge(reference))


def test_detection_is_chosen_where_it_does_best_and_in_the_middle_of_what_is_as_good():
    probability_T = np.full(2400, 0.1)
    probability_T[400:640] = 0.8  # 100 to 160 s at 4 Hz
    probability_T[1600:1612] = 0.9  # 3 s of something else
    chosen, f1 = seizures.choose_detection([probability_T], [[(100.0, 160.0)]], [600.0], 4.0)
    assert f1 == 1 and 0.3 <= chosen["threshold"] <= 0.6 and chosen["shortest_s"] > 3
    assert seizures.detect(probability_T, 4.0, **chosen).tolist() == [[100, 160]]


def test_events_are_written_as_szcore_reads_them():
    lines = seizures.events_tsv(np.array([[12.0, 20.5]]), np.array([0.9]), 60.0).splitlines()
    assert (
        lines[0].split("\t")[:3] == ["onset", "duration", "eventType"]
        and lines[0].split("\t")[-1] == "recordingDuration"
    )
    assert lines[1].split("\t")[:4] == ["12.00", "8.50", "sz", "0.900"] and len(lines) == 2
    none = seizures.events_tsv(np.empty((0, 2)), np.empty(0), 60.0).splitlines()
    assert none[1].split("\t")[:3] == ["0.00", "60.00", "bckg"]
