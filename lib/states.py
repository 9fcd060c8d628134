"""
The session's state machine: a table {state: {event: next state}} and what is done in each state. Made of data, so a TOML file can replace it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.errors import Unusable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GROUPS = ("EYE_MOVEMENT", "BACKGROUND", "INFERENCE")  # what windows are collected for

DEFAULT = """
start = "IDLE"
events = [  # every marker the experiment sends; any other is counted and ignored
    "IDLE", "EYE_WARMUP_DESC", "EYE_WARMUP_BLINK", "EYE_WARMUP_TEXT", "EYE_WARMUP_MOVE", "BACKGROUND", "INFERENCE", "TASK_PERIOD",
]

[codes]  # markers by another name, such as "10" = "TASK_PERIOD"

[states.IDLE.next]  # event = state it leads to
EYE_WARMUP_DESC = "EYE_WARMUP_DESC"
BACKGROUND = "BACKGROUND"
INFERENCE = "INFERENCE"
TASK_PERIOD = "INFERENCE"

[states.EYE_WARMUP_DESC.next]
EYE_WARMUP_BLINK = "EYE_WARMUP_BLINK"
BACKGROUND = "BACKGROUND"
IDLE = "IDLE"

[states.EYE_WARMUP_BLINK]
collect = "EYE_MOVEMENT"  # group that takes this state's windows
[states.EYE_WARMUP_BLINK.next]
EYE_WARMUP_BLINK = "EYE_WARMUP_BLINK"
EYE_WARMUP_TEXT = "EYE_WARMUP_TEXT"
BACKGROUND = "BACKGROUND"
IDLE = "IDLE"

[states.EYE_WARMUP_TEXT.next]
EYE_WARMUP_MOVE = "EYE_WARMUP_MOVE"
BACKGROUND = "BACKGROUND"
IDLE = "IDLE"

[states.EYE_WARMUP_MOVE]
collect = "EYE_MOVEMENT"
fit_before = ["BACKGROUND"]  # going to one of these states fits the pipeline to what has been collected
[states.EYE_WARMUP_MOVE.next]
EYE_WARMUP_BLINK = "EYE_WARMUP_BLINK"
EYE_WARMUP_TEXT = "EYE_WARMUP_TEXT"
BACKGROUND = "BACKGROUND"
IDLE = "IDLE"

[states.BACKGROUND]
collect = "BACKGROUND"
fit_before = ["INFERENCE"]
[states.BACKGROUND.next]
INFERENCE = "INFERENCE"
TASK_PERIOD = "INFERENCE"
IDLE = "IDLE"

[states.INFERENCE]
collect = "INFERENCE"
predict = true  # every full window
partial_fit = true  # from time to time, on windows that don't overlap
[states.INFERENCE.next]
EYE_WARMUP_DESC = "EYE_WARMUP_DESC"
BACKGROUND = "BACKGROUND"
IDLE = "IDLE"
"""


@dataclass(frozen=True)
class State:
    """One row of the table."""

    name: str
    next: dict[str, str]
    collect: str | None = None
    predict: bool = False
    partial_fit: bool = False
    fit_before: tuple[str, ...] = ()


class Move(NamedTuple):
    """What an event led to."""

    state: State
    accepted: bool
    fit: bool


@dataclass(frozen=True)
class Table:
    """All states; checked when made."""

    start: str
    events: tuple[str, ...]
    codes: dict[str, str]
    states: dict[str, State]

    def step(self, state: str, code: str) -> Move:
        """Where a marker leads from `state`: never an error, an event that isn't accepted leaves everything as it is."""
        here = self.states[state]
        there = here.next.get(self.codes.get(code, code))
        if there is None:
            return Move(here, False, False)
        return Move(self.states[there], True, there in here.fit_before)

    def predicting(self) -> str | None:
        """The first state that predicts."""
        return next((name for name, state in self.states.items() if state.predict), None)


def load(path: Path | None = None) -> Table:
    """The table of a TOML file, or the default one. Raises Unusable naming the file, the state and the mend."""
    if path is None:
        return parse(DEFAULT, "the default table")
    try:
        return parse(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"--states {path} can't be read: {error}") from None


def parse(text: str, where: str) -> Table:
    """The table that `text` (TOML) describes. Raises Unusable."""
    try:
        stated = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unusable(f"{where} is not TOML: {error}") from None
    _check_keys(stated, {"start": str, "events": list, "codes": dict, "states": dict}, where)
    for key in ("start", "events", "states"):
        if not stated.get(key):
            raise Unusable(f"{where} has no {key}; see docs/realtime.md for the default table")
    table = Table(stated["start"], tuple(stated["events"]), stated.get("codes", {}), {})
    kinds = {"next": dict, "collect": str, "predict": bool, "partial_fit": bool, "fit_before": list}
    for name, row in stated["states"].items():
        if not isinstance(row, dict):
            raise Unusable(f"{where}: states.{name} must be a table")
        _check_keys(row, kinds, f"{where}, state {name}")
        table.states[name] = State(name, **{"next": {}, **row, "fit_before": tuple(row.get("fit_before", ()))})
    _check(table, where)
    return table


def _check_keys(found: dict, kinds: dict[str, type], where: str) -> None:
    for key, value in found.items():
        if key not in kinds:
            raise Unusable(f"{where}: no key {key}; there are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise Unusable(f"{where}: {key} must be a {kinds[key].__name__}, not {value!r}")
        names = value if isinstance(value, list) else value.values() if key in ("codes", "next") else ()
        if not all(isinstance(name, str) for name in names):
            raise Unusable(f"{where}: {key} must hold names in quotes, not {value!r}")


def _check(table: Table, where: str) -> None:
    """Every state exists and can be reached, every event is listed and means something somewhere."""
    known, used = set(table.events), {event for state in table.states.values() for event in state.next}
    if table.start not in table.states:
        raise Unusable(f"{where}: start = {table.start} is not among the states {', '.join(table.states)}")
    for name, state in table.states.items():
        for event, there in state.next.items():
            if event not in known:
                raise Unusable(
                    f"{where}: state {name} waits for unknown event {event}; list it under events, or mend its name"
                )
            if there not in table.states:
                raise Unusable(f"{where}: event {event} leads from {name} to unknown state {there}")
        if state.collect is not None and state.collect not in GROUPS:
            raise Unusable(f"{where}: state {name} collects for {state.collect}, which is none of {', '.join(GROUPS)}")
        for there in state.fit_before:
            if there not in state.next.values():
                raise Unusable(f"{where}: state {name} has fit_before {there}, but no event leads there from it")
    for event in table.events:
        if event not in used:
            raise Unusable(f"{where}: event {event!r} is accepted in no state")
    for code, event in table.codes.items():
        if event not in known:
            raise Unusable(f"{where}: code {code} stands for unknown event {event!r}")
    reached, todo = {table.start}, [table.start]
    while todo:
        new = set(table.states[todo.pop()].next.values()) - reached
        reached |= new
        todo += new
    lost = [name for name in table.states if name not in reached]
    if lost:
        raise Unusable(f"{where}: no event leads to {', '.join(lost)} from {table.start}")
