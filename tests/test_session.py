"""A session without sockets: the same actions however samples are cut up, bounded groups, and turns that are fair."""

import dataclasses
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import states, wire
from lib.intake import Intake, Window
from lib.lanes import Lane, Turns
from lib.session import Fit, Model, NoModel, Predict, Session, predict, refit
from tests.service import PATH, STREAM, Broken, Power, signal

LOUD = signal(1200, seed=3)
TABLE = states.load()


def session(start: str = "IDLE", **options) -> Session:
    return Session(STREAM, Intake(STREAM, PATH), TABLE, TABLE.states[start], Model(Power(), 0), **options)


def actions(made: Session, chunks: list[int], events: list[tuple[int, str]]) -> list:
    """What comes of a signal and its events, each sent before the chunk that holds its sample; fits are run at once."""
    out, at, todo, turn = [], 0, sorted(events, key=lambda e: e[0]), 0
    while at < len(LOUD):
        size = chunks[turn % len(chunks)]
        turn += 1
        due = []
        while todo and todo[0][0] < at + size:
            seq, code = todo.pop(0)
            due += made.event(wire.Event(seq, 0.0, code))
        part_TC = LOUD[at : at + size]
        at += len(part_TC)
        for action in due:
            out.append(summary(made, action))
        for action in made.samples(wire.Samples(at - len(part_TC), at / 250, part_TC), 0.0):
            out.append(summary(made, action))
    return out


def summary(made: Session, action) -> tuple:
    """All of an action that could differ."""
    if isinstance(action, Predict):
        window = action.window
        return (
            "predict",
            action.state,
            window.start,
            window.stop,
            window.valid,
            window.x_CT.tobytes(),
            round(action.t, 6),
        )
    made.adopt(refit(made.model.pipeline, action)[0])
    groups = {name: np.array(kept).tobytes() for name, kept in (action.groups or {}).items()}
    return "fit", groups, np.array(action.fresh).tobytes(), made.model.version


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 1199), st.sampled_from([*TABLE.events, "T1"])), max_size=12),
)
def test_a_session_does_the_same_however_its_samples_are_cut(chunks, events):
    whole = session(partial_every=2)
    parts = session(partial_every=2)
    assert actions(parts, chunks, events) == actions(whole, [len(LOUD)], events)
    assert parts.state == whole.state and parts.counts == whole.counts


def test_collected_windows_do_not_overlap_and_are_bounded():
    made, other = session("BACKGROUND", most=5), session("INFERENCE", partial_every=0)
    assert not list(made.samples(wire.Samples(0, 0.0, LOUD), 0.0))
    todo = list(other.samples(wire.Samples(0, 0.0, LOUD), 0.0))
    assert len(todo) == (1200 - 50) // 25 + 1 and not any(isinstance(a, Fit) for a in todo) and not other.groups
    kept = made.groups["BACKGROUND"]
    assert made.counts["windows_kept"] == 24 and len(kept) == 5
    whole = {a.window.start: a.window.x_CT for a in todo}
    for start, x_CT in zip(range(950, 1200, 50), kept, strict=True):  # the newest
        np.testing.assert_array_equal(x_CT, whole[start])


def test_windows_are_kept_again_after_the_count_went_back():
    made = session("INFERENCE", partial_every=0)
    for first in (5000, 0):
        list(made.samples(wire.Samples(first, 0.0, LOUD[:200]), 0.0))
    assert made.counts["windows_kept"] >= 4  # what came after the rewind has settled, or is marked
    made = session("INFERENCE", partial_every=0)
    list(made.samples(wire.Samples(5000, 0.0, LOUD[:100]), 0.0))
    made.attach()
    list(made.samples(wire.Samples(0, 0.0, LOUD[:300]), 0.0))
    assert made.kept_until <= 300


@pytest.mark.parametrize("comes_back", [False, True])
def test_windows_follow_at_once_when_the_count_goes_back_behind_the_event_that_began_the_state(comes_back):
    made = session()
    list(made.event(wire.Event(5000, 0.0, "INFERENCE")))
    list(made.samples(wire.Samples(5000, 0.0, LOUD[:200]), 0.0))
    if comes_back:
        made.attach()
    todo = list(made.samples(wire.Samples(0, 0.0, LOUD[:200]), 0.0))
    assert [a.window.start for a in todo if isinstance(a, Predict)] == list(range(0, 151, 25))


@pytest.mark.parametrize(
    "answer", [RuntimeError("bug"), None, np.zeros(0), np.array([[np.inf, 0]]), "text", np.zeros((1, 2, 2))]
)
def test_predict_never_raises(answer):
    window = Window(0, 50, np.zeros((6, 50), np.float32))
    outcome = predict(Model(Broken(answer=answer), 0), window)
    assert outcome.probabilities is None and outcome.reason in ("model_error", "not_finite")
    invalid = dataclasses.replace(window, valid=False, reason="gap")
    assert predict(Model(Broken(answer=answer), 0), invalid).reason == "gap"
    assert predict(Model(NoModel(), 0), window).reason.startswith("not_ready: no model")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60), st.integers(1, 3))
def test_turns_are_fair_and_keep_the_newest(moves, slots):
    turns, lanes = Turns(slots), [Lane(session()) for _ in range(4)]
    waiting, taken, put = {i: deque(maxlen=slots) for i in range(4)}, [], Counter()
    for i, take in moves:
        if take:
            turn = turns.take()
            assert (turn is None) == (not any(waiting.values()))
            if turn:
                number = lanes.index(turn[0])
                assert turn[1] == waiting[number].popleft()  # the oldest of the newest
                taken.append(number)
        else:
            put[i] += 1
            full = len(waiting[i]) == slots
            assert turns.put(lanes[i], put[i]) == full
            waiting[i].append(put[i])
    assert [list(lane.slot) for lane in lanes] == [list(waiting[i]) for i in range(4)]
    drained = []
    while turn := turns.take():
        drained.append(lanes.index(turn[0]))
    several = len({*drained})
    assert len(set(drained[:several])) == several  # everybody once before anybody twice


def test_late_fits_are_merged_and_none_is_lost():
    lane = Lane(session(most=10))
    x = lambda *values: [np.full((2, 2), v) for v in values]  # noqa: E731
    lane.want(Fit(None, x(1, 2)))
    lane.want(Fit(None, x(3)))
    assert [w[0, 0] for w in lane.fits[0].fresh] == [1, 2, 3] and len(lane.fits) == 1
    lane.want(Fit({"BACKGROUND": x(9)}, []))
    lane.want(Fit(None, x(4)))
    assert [fit.groups is None for fit in lane.fits] == [False, True]  # the groups hold what was there before
