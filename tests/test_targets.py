"""Targets: which windows, which values, missing ones, classes and units; against the events and columns of a small cohort."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest

from lib.cache import Cache
from lib.errors import Unusable
from lib.targets import OTHER, Coverage, Examples, balanced, event_examples, parse_word, read_targets
from tests import task_cases
from train_supervised import Config, choose_rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(task_cases.build(tmp_path_factory.mktemp("targets"), subjects=6))


def rows(cache: Cache, split: str | None = None, task: str | None = None) -> list[int]:
    return [i for i, r in enumerate(cache.recordings) if split in (None, r.split) and task in (None, r.task)]


def test_challenge1_is_the_response_time_half_a_second_after_the_stimulus(cache):
    every = rows(cache, task="contrastChangeDetection")
    (target,) = read_targets(cache, ["challenge1"], every, 200)
    assert target.kind == "regression" and target.unit == "s" and target.scored_by == "window"
    examples = Examples(cache, [target], every, 2.0, 1.0)
    row_B, start_B = examples.locate(np.arange(len(examples)))
    value_B = target.decode(examples.values(np.arange(len(examples)))[:, 0])
    expected = []
    for row in every:
        events = cache.events(row)
        starts = [e.onset_s for e in events if e.label == "contrastTrial_start"]
        for start, following in zip(starts, [*starts[1:], np.inf], strict=True):
            target_s = next(e.onset_s for e in events if "target" in e.label and e.onset_s >= start)
            presses = [e.onset_s for e in events if "button" in e.label and target_s < e.onset_s < following]
            fits = round((target_s + 0.5) * 100) + 200 <= cache.recordings[row].samples
            if presses and fits:
                expected.append((row, round((target_s + 0.5) * 100), presses[0] - target_s))
    assert list(zip(row_B, start_B, strict=True)) == [e[:2] for e in expected]
    assert value_B == pytest.approx([e[2] for e in expected], abs=1e-3)
    asked = sum(len(cache.events(row, "stimulus")) for row in every)
    assert len(expected) < asked  # one in eight was not answered
    assert value_B.mean() == pytest.approx(target.mean, abs=1e-5) and value_B.std() == pytest.approx(
        target.std, abs=1e-5
    )


def test_classes_that_training_lacked_are_named(cache):
    by_age = {r: cache.column("age")[r] for r in rows(cache)}
    youngest, eldest = min(by_age.values()), max(by_age.values())
    seen = [r for r, age in by_age.items() if age != eldest]
    (target,) = read_targets(cache, ["age:classification"], seen, 200)
    assert not Examples(cache, [target], seen, 2.0, 2.0).unknown
    some = Examples(cache, [target], rows(cache), 2.0, 2.0)
    assert some.unknown == {"age": [f"{eldest:g}"]} and set(some.rows) == {*seen}
    others = [r for r, age in by_age.items() if age == eldest]
    with pytest.raises(Unusable, match=f"are of {eldest:g}, classes that training doesn't have; .*say age:regression"):
        Examples(cache, [target], others, 2.0, 2.0)
    assert youngest != eldest


def test_a_moved_window_has_a_response_time_moved_along(cache):
    every = rows(cache, task="contrastChangeDetection")
    targets = read_targets(cache, ["challenge1", "age"], every, 200)
    examples = Examples(cache, targets, every, 2.0, 1.0)
    ids = np.arange(examples.along, len(examples))
    row_B, start_B = examples.locate(ids)
    moved_row_B, moved_B, value_BK = examples.moved(ids, 0.3, 0, 5, np.arange(len(ids)))
    shift_s_B = (moved_B - start_B) / 100
    assert np.array_equal(row_B, moved_row_B) and 0.2 < np.abs(shift_s_B).max() <= 0.3 and abs(shift_s_B.mean()) < 0.1
    before_B, after_B = (targets[0].decode(v[:, 0]) for v in (examples.values(ids), value_BK))
    assert before_B - after_B == pytest.approx(shift_s_B, abs=1e-5)
    assert np.array_equal(value_BK[:, 1], examples.values(ids)[:, 1])  # whose window it is doesn't change
    half = examples.moved(ids[::2], 0.3, 0, 5, np.arange(len(ids))[::2])
    assert np.array_equal(half[1], moved_B[::2])  # a function of the place in the batch, not of the batch
    assert np.array_equal(examples.moved(ids, 0.0, 0, 5, ids)[1], start_B)


def test_challenge2_is_of_subjects_and_windows_of_any_task(cache):
    (target,) = read_targets(cache, ["challenge2"], rows(cache, "train"), 200)
    assert target.scored_by == "subject" and target.labels == ("externalizing",)
    examples = Examples(cache, [target], rows(cache, "train"), 2.0, 1.0)
    row_B, _ = examples.locate(np.arange(len(examples)))
    assert {cache.recordings[i].task for i in row_B} == {"contrastChangeDetection", "szMonitoring", "Rest"}
    assert not any(cache.recordings[i].subject.endswith("/01") for i in row_B)  # n/a in the table
    persons = {cache.recordings[i].subject: cache.column("externalizing")[i] for i in np.unique(row_B)}
    assert target.mean == pytest.approx(np.mean([float(v) for v in persons.values()]), abs=1e-6)


def test_several_targets_keep_what_is_missing_apart(cache):
    words = ["challenge1", "externalizing", "eyes_open+eyes_closed"]
    targets = read_targets(cache, words, rows(cache), 200)
    examples = Examples(cache, targets, rows(cache), 2.0, 2.0)
    value_BK = examples.values(np.arange(len(examples)))
    row_B, _ = examples.locate(np.arange(len(examples)))
    task_B, subject_B = (np.array([getattr(cache.recordings[i], n) for i in row_B]) for n in ("task", "subject"))
    known_BK = np.isfinite(value_BK)
    assert set(task_B[known_BK[:, 0]]) == {"contrastChangeDetection"} and set(task_B[known_BK[:, 2]]) == {"Rest"}
    nobody = np.char.endswith(subject_B, "/01")
    assert not known_BK[nobody, 1].any() and known_BK[~nobody, 1].all() and known_BK[nobody].any()
    kinds = examples.kinds()
    assert kinds["along"][0, 1] == kinds["listed"][0, 0] == examples.along < len(examples)
    ranges = examples.ranges([r.subject for r in cache.recordings])
    ids = np.concatenate([np.arange(a, b) for pairs in ranges.values() for a, b in pairs])
    assert np.array_equal(np.sort(ids), np.arange(len(examples)))
    for subject, pairs in ranges.items():
        assert all((subject_B[a:b] == subject).all() for a, b in pairs)


def test_memory_grows_with_recordings_and_events_not_with_windows(cache):
    targets = read_targets(cache, ["age"], rows(cache), 200)
    few, many = (Examples(cache, targets, rows(cache), 2.0, stride) for stride in (2.0, 0.01))
    assert len(many) > 100 * len(few)
    assert few.table_RK.nbytes == many.table_RK.nbytes and not len(many.row_N)


def test_kind_is_what_the_values_look_like_unless_said(cache):
    kinds = {
        w: read_targets(cache, [w], rows(cache), 200)[0].kind for w in ("age", "sex", "task", "age:classification")
    }
    assert kinds == {
        "age": "regression",
        "sex": "classification",
        "task": "classification",
        "age:classification": "classification",
    }
    for word, said in (
        ("sex:regression", "is no number"),
        ("nothing", "there are columns: age"),
        ("split", "no split"),
    ):
        with pytest.raises(Unusable, match=said):
            read_targets(cache, [word], rows(cache), 200)
    with pytest.raises(Unusable, match="each target once"):
        read_targets(cache, ["age", "age"], rows(cache), 200)
    with pytest.raises(Unusable, match="1 class"):
        read_targets(cache, ["task"], rows(cache, task="Rest"), 200)


def test_task_is_a_column_only_where_recordings_have_one(cache):
    bare = copy(cache)
    bare.recordings = [replace(r, task="") for r in cache.recordings]
    with pytest.raises(Unusable, match="no task in .*columns: age"):
        read_targets(bare, ["task"], rows(cache), 200)


def test_events_that_last_hold_windows_side_by_side_and_a_single_label_has_an_opposite(cache):
    (which,) = read_targets(cache, ["eyes_open+eyes_closed"], rows(cache), 150)
    row_N, start_N, values = event_examples(cache, which, rows(cache), 150)
    assert set(values) == {"eyes_open", "eyes_closed"}
    for row, start, value in zip(row_N, start_N, values, strict=True):
        assert any(
            e.onset_s * 100 <= start and start + 150 <= (e.onset_s + e.duration_s) * 100
            for e in cache.events(row, value)
        )
    assert len(values) == 6 * 4 * 2  # two of 1.5 s in each of four blocks of 4 s
    (going_on,) = read_targets(cache, ["eyes_closed"], rows(cache), 150)
    assert going_on.classes == ("eyes_closed", OTHER)
    row_N, start_N, values = event_examples(cache, going_on, rows(cache), 150)
    for row, start, value in zip(row_N, start_N, values, strict=True):
        closed = any(
            e.onset_s * 100 < start + 150 and start < (e.onset_s + e.duration_s) * 100
            for e in cache.events(row, "eyes_closed")
        )
        assert closed == (value == "eyes_closed")


def test_classes_count_alike_by_windows(cache):
    targets = read_targets(cache, ["task"], rows(cache), 200)
    examples = Examples(cache, targets, rows(cache), 2.0, 1.0)
    (target,), (count_C,) = balanced(targets, examples), examples.counts()
    weights = np.array(target.weights)
    assert (
        weights * count_C == pytest.approx(np.full(3, count_C.sum() / 3)) and (weights * count_C).sum() == count_C.sum()
    )
    y_B = examples.values(np.arange(len(examples)))[:, 0]
    assert np.array_equal(np.bincount(y_B.astype(int)), count_C)


def test_stretches_are_seizure_where_at_least_half_of_them_is(cache):
    (target,) = read_targets(cache, ["seizure"], rows(cache), 800)
    examples = Examples(cache, [target], rows(cache, task="szMonitoring"), 8.0, 4.0)
    ids = np.arange(len(examples))
    row_B, start_B = examples.locate(ids)
    y_BS = examples.seizures(row_B, start_B, 0.25)
    assert y_BS.shape == (len(ids), 32) and 0 < y_BS.mean() < 0.5
    for row, start, y_S in zip(row_B, start_B, y_BS, strict=True):
        (e,) = cache.events(row, "seizure")
        middle_s_S = start / 100 + 0.25 * np.arange(32) + 0.125
        assert np.array_equal(y_S == 1, (middle_s_S >= e.onset_s) & (middle_s_S < e.onset_s + e.duration_s))


def test_coverage_equals_a_sum_over_intervals(cache):
    rng, covered = np.random.default_rng(0), Coverage(cache, "eyes_closed")
    row_B = rng.integers(len(cache.recordings), size=300)
    start_B = rng.uniform(0, 16, 300)
    stop_B = start_B + rng.uniform(0, 10, 300)
    for row, start, stop, got in zip(row_B, start_B, stop_B, covered(row_B, start_B, stop_B), strict=True):
        own = cache.events(int(row), "eyes_closed")
        expected = sum(max(0, min(stop, e.onset_s + e.duration_s) - max(start, e.onset_s)) for e in own)
        assert got == pytest.approx(expected, abs=1e-3)
    assert not Coverage(cache, "nothing")(row_B, start_B, stop_B).any()


def test_even_ids_are_spread_and_known(cache):
    targets = read_targets(cache, ["challenge1", "age"], rows(cache), 200)
    examples = Examples(cache, targets, rows(cache), 2.0, 1.0)
    ids = examples.even(20)
    assert len(ids) == 20 and np.ptp(np.diff(ids)) <= 1
    known = examples.even(20, 0)
    assert len(known) == 20 and np.isfinite(examples.values(known)[:, 0]).all()
    assert len(examples.even(0)) == len(examples)


def test_where_takes_one_value_or_several_in_training_as_in_serving(cache):
    cfg = Config(target=("age",), where=("task=Rest+szMonitoring", "sex=F"))
    found = choose_rows(cfg, cache, "train")
    assert {cache.recordings[i].task for i in found} == {"Rest", "szMonitoring"}
    assert found == cache.rows(("train",), cfg.where) and {cache.column("sex")[i] for i in found} == {"F"}
    assert cache.rows(("train", "val", "test")) == rows(cache)
    assert cache.rows((), ("task=Rest",)) == []
    named = copy(cache)  # where one recording's task is called with a +, the words mean that one
    named.recordings = [replace(r, task="Rest+szMonitoring") if i == 3 else r for i, r in enumerate(cache.recordings)]
    assert named.rows(("train", "val", "test"), cfg.where[:1]) == [3]
    with pytest.raises(Unusable, match="--where mood=good: .*there are: .*sex, task"):
        cache.rows(("train",), ("mood=good",))
    with pytest.raises(Unusable, match="--where task=Nap: no recording has task Nap; there are: .*Rest"):
        cache.rows(("train",), ("task=Nap",))


def test_words_are_columns_before_events(cache):
    assert parse_word(cache, "seizure")[2] == "seizure"
    assert parse_word(cache, "age:regression")[:3] == ("age", "regression", "column")
    assert parse_word(cache, "left_target+right_target")[2:] == ("event", ("left_target", "right_target"))


def test_a_class_without_a_window_is_refused_with_the_mend(cache):
    every = rows(cache)
    (target,) = read_targets(cache, ["task"], every, 200)
    by_task = {task: max(cache.recordings[i].samples for i in rows(cache, task=task)) / 100 for task in target.classes}
    shortest, window_s = min(by_task, key=by_task.get), (min(by_task.values()) + max(by_task.values())) / 2
    examples = Examples(cache, [target], every, window_s, 1.0)
    with pytest.raises(Unusable, match=f"class {shortest} holds a window of .* s: lower --window-s"):
        balanced([target], examples)
