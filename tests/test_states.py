"""The table of states: all events in all states, and every way a file can be wrong."""

import itertools

import pytest

from lib import states
from lib.errors import Unusable

TABLE = states.load()
EXPECTED = {  # what design.md and the original service accept
    "IDLE": {"EYE_WARMUP_DESC": "EYE_WARMUP_DESC", "BACKGROUND": "BACKGROUND", "INFERENCE": "INFERENCE", "TASK_PERIOD": "INFERENCE"},
    "EYE_WARMUP_DESC": {"EYE_WARMUP_BLINK": "EYE_WARMUP_BLINK", "BACKGROUND": "BACKGROUND", "IDLE": "IDLE"},
    "EYE_WARMUP_BLINK": {
        "EYE_WARMUP_BLINK": "EYE_WARMUP_BLINK", "EYE_WARMUP_TEXT": "EYE_WARMUP_TEXT", "BACKGROUND": "BACKGROUND", "IDLE": "IDLE",
    },
    "EYE_WARMUP_TEXT": {"EYE_WARMUP_MOVE": "EYE_WARMUP_MOVE", "BACKGROUND": "BACKGROUND", "IDLE": "IDLE"},
    "EYE_WARMUP_MOVE": {
        "EYE_WARMUP_BLINK": "EYE_WARMUP_BLINK", "EYE_WARMUP_TEXT": "EYE_WARMUP_TEXT", "BACKGROUND": "BACKGROUND", "IDLE": "IDLE",
    },
    "BACKGROUND": {"INFERENCE": "INFERENCE", "TASK_PERIOD": "INFERENCE", "IDLE": "IDLE"},
    "INFERENCE": {"EYE_WARMUP_DESC": "EYE_WARMUP_DESC", "BACKGROUND": "BACKGROUND", "IDLE": "IDLE"},
}  # fmt: skip
FITS = {("EYE_WARMUP_MOVE", "BACKGROUND"), ("BACKGROUND", "INFERENCE")}
CODES = [*TABLE.events, "T1", "", "background", "\ud800", "10", "a" * 64]


@pytest.mark.parametrize("state, code", list(itertools.product(EXPECTED, CODES)))
def test_every_event_in_every_state(state, code):
    move, there = TABLE.step(state, code), EXPECTED[state].get(code)
    assert move.accepted == (there is not None)
    assert move.state.name == (there or state)
    assert move.fit == ((state, there) in FITS)


def test_the_default_collects_and_predicts_where_it_should():
    collects = {name: state.collect for name, state in TABLE.states.items() if state.collect}
    assert collects == {
        "EYE_WARMUP_BLINK": "EYE_MOVEMENT", "EYE_WARMUP_MOVE": "EYE_MOVEMENT", "BACKGROUND": "BACKGROUND", "INFERENCE": "INFERENCE",
    }  # fmt: skip
    assert [s.name for s in TABLE.states.values() if s.predict] == ["INFERENCE"] == [TABLE.predicting()]
    assert TABLE.start == "IDLE" and set(EXPECTED) == set(TABLE.states)


SMALL = """
start = "REST"
events = ["GO", "STOP"]
[codes]
"33" = "GO"
[states.REST.next]
GO = "TASK"
[states.TASK]
collect = "INFERENCE"
predict = true
[states.TASK.next]
STOP = "REST"
"""


def test_a_file_replaces_the_table(tmp_path):
    path = tmp_path / "states.toml"
    path.write_text(SMALL)
    table = states.load(path)
    assert table.step("REST", "33").state.name == table.step("REST", "GO").state.name == "TASK"
    assert table.step("TASK", "33").accepted is False and table.predicting() == "TASK"


WRONG = [
    (("GO = ", "GOO = "), "GOO"),
    (('GO = "TASK"', 'GO = "TASKS"'), "unknown state TASKS"),
    (('start = "REST"', 'start = "NONE"'), "NONE"),
    (('"STOP"]', '"STOP", "PAUSE"]'), "'PAUSE' is accepted in no state"),
    (('"33" = "GO"', '"33" = "RUN"'), "'RUN'"),
    (('collect = "INFERENCE"', 'collect = "TASK"'), "none of EYE_MOVEMENT"),
    (("predict = true", 'predict = "yes"'), "must be a bool"),
    (("predict = true", "predicts = true"), "no key predicts"),
    (("predict = true", 'fit_before = ["TASK"]'), "no event leads there"),
    (('GO = "TASK"', 'GO = "REST"'), "no event leads to TASK from REST"),
    (('events = ["GO", "STOP"]', "events = [1, 2]"), "names in quotes"),
    (('GO = "TASK"', "GO = 5"), "names in quotes"),
    (("start = ", "begin = "), "no key begin"),
    (('events = ["GO", "STOP"]', ""), "has no events"),
    (("[states.TASK]", "[states.TASK"), "is not TOML"),
    (("[states.REST.next]", "[states]\nREST = 5\n[states.LOST.next]"), "must be a table"),
]


@pytest.mark.parametrize("change, said", WRONG)
def test_a_wrong_file_is_refused_by_name_with_what_is_wrong(change, said, tmp_path):
    path = tmp_path / "states.toml"
    text = SMALL.replace(*change)
    assert text != SMALL
    path.write_text(text)
    with pytest.raises(Unusable, match=str(path)) as caught:
        states.load(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Unusable, match="none.toml"):
        states.load(tmp_path / "none.toml")
