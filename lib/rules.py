"""
dataset.toml: what a folder that is neither BIDS nor TUH holds, stated by its user instead of coded by us.

Every mistake in it is an error that names the file, the key and the nearest valid one; nothing in it is silently without effect.

`pattern` has to match the path below the folder (posix, `a/b.edf`), either whole or from the start of one of its components:
`S(?P<subject>\\d+)\\.edf` also matches `group1/S01.edf`. Case is ignored, because file suffixes come in both. Named groups become columns;
`subject`, `session`, `task` and `run` are what their names say. Groups may be nested: `(?P<subject>(?P<fault>[A-Z]+)_\\d+)`.
"""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from lib.errors import Unusable
from lib.statements import VIBRATION_UNITS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SPLITS = ("train", "val", "test")
FIELDS = ("subject", "session", "task", "run")
KEYS = ("name", "pattern", "rate_hz", "unit", "channels", "kind", "values", "rates", "participants", "crop", "split")
PARTICIPANT_KEYS = ("file", "id", "id_pattern", "columns")


@dataclass(frozen=True)
class Participants:
    """The table that says who the subjects are; `columns` maps our names to the table's (None: all of them)."""

    file: str
    id: str
    id_pattern: str
    columns: dict[str, str] | None


@dataclass(frozen=True)
class Rule:
    """One dataset.toml, checked."""

    path: Path
    name: str | None
    pattern: re.Pattern | None
    spec: dict[str, object]  # fields of ReadSpec that are stated
    # of a column, a participants column, `event` or `channel`: as found → as we call it
    values: dict[str, dict[str, str]]
    participants: Participants | None
    crop: dict[str, dict[str, tuple[float | None, float | None]]]  # column → renamed value → seconds
    split: dict[str, str]  # subject, or value of the column `split_by` → split
    split_by: str = "subject"
    rates_hz: dict[str, dict[str, float]] = field(default_factory=dict)  # column → renamed value → its files' own rate

    def match(self, relative: str) -> dict[str, str] | None:
        """The named groups of a path below the folder, as found, or None where the pattern doesn't match."""
        parts = relative.split("/")
        for i in range(len(parts)):
            if found := self.pattern.fullmatch("/".join(parts[i:])):
                return {name: value for name, value in found.groupdict().items() if value is not None}
        return None

    def rename(self, column: str, value: str) -> str:
        """A captured value as [values.column] calls it."""
        return self.values.get(column, {}).get(value, value)


def nearest(word: str, words, count: int = 1) -> str:
    """The most similar of `words`, for messages: `did you mean …`."""
    return " or ".join(repr(w) for w in difflib.get_close_matches(word, list(words), count, cutoff=0.0))


def read_rule(path: Path) -> Rule:
    """Parse and check a dataset.toml. Raises Unusable."""
    try:
        table = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise Unusable(f"{path} is not valid TOML: {error}") from error
    _check_keys(path, "", table, KEYS)
    name, pattern = (_get(path, table, key, str) for key in ("name", "pattern"))
    if name is not None and (not name.strip() or "/" in name or name in (".", "..")):
        raise Unusable(f"{path}: name = {name!r} can't be part of a path: use letters, digits, - and _")
    compiled = _compile(path, "pattern", pattern)
    values = {
        column: {str(found): str(ours) for found, ours in _table(path, f"values.{column}", renames).items()}
        for column, renames in _table(path, "values", table.get("values", {})).items()
    }
    crop = {
        column: {
            value: _seconds(path, f"crop.{column}.{value}", pair)
            for value, pair in _table(path, f"crop.{column}", cuts).items()
        }
        for column, cuts in _table(path, "crop", table.get("crop", {})).items()
    }
    rates = {
        column: {
            value: _rate(path, f"rates.{column}.{value}", hz)
            for value, hz in _table(path, f"rates.{column}", own).items()
        }
        for column, own in _table(path, "rates", table.get("rates", {})).items()
    }
    participants = _participants(path, table["participants"]) if "participants" in table else None
    split, split_by = _split(path, table.get("split", {}))

    groups = set(compiled.groupindex) if compiled else set(FIELDS)
    known = groups | {"event", "channel"} | set(participants.columns or {} if participants else {})
    any_column = participants is not None and participants.columns is None
    for column in values:
        if column not in known and not any_column:
            raise Unusable(
                f"{path}: [values.{column}] renames nothing: the pattern has no group {column!r}; did you mean {nearest(column, known)}?"
            )
    for key, column in [*(("crop", c) for c in crop), *(("rates", c) for c in rates), ("split] [by", split_by)]:
        if column not in groups | {"subject"}:
            raise Unusable(
                f"{path}: [{key}] {column} is no group of the pattern; did you mean {nearest(column, groups) or 'to add one'}?"
            )
    spec = _spec(path, table)
    if "channel" in values:
        spec["renames"] = tuple(values["channel"].items())
    return Rule(path, name, compiled, spec, values, participants, crop, split, split_by, rates)


def _check_keys(path: Path, where: str, table: dict, valid: tuple[str, ...]) -> None:
    for key in table:
        if key not in valid:
            raise Unusable(
                f"{path}: unknown key {where}{key}; did you mean {nearest(key, valid)}? Valid: {', '.join(valid)}"
            )


def _table(path: Path, key: str, value) -> dict:
    if not isinstance(value, dict):
        raise Unusable(f"{path}: {key} must be a table, like [{key}], not {value!r}")
    return value


def _get(path: Path, table: dict, key: str, kind: type | tuple, where: str = ""):
    value = table.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        wanted = "text" if kind is str else "a number"
        raise Unusable(f"{path}: {where}{key} = {value!r} must be {wanted}")
    return value


def _compile(path: Path, key: str, pattern: str | None) -> re.Pattern | None:
    try:
        return None if pattern is None else re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise Unusable(f"{path}: {key} is not a valid regular expression: {error} (in {pattern!r})") from error


def _spec(path: Path, table: dict) -> dict[str, object]:
    """The stated fields of a ReadSpec: rate_hz, unit, channels, kind."""
    spec = {key: value for key in ("unit", "kind") if (value := _get(path, table, key, str)) is not None}
    if spec.get("kind", "eeg") not in ("eeg", "vibration"):
        raise Unusable(f'{path}: kind = {spec["kind"]!r} must be "eeg" or "vibration"')
    if spec.get("unit") in VIBRATION_UNITS:
        spec.setdefault("kind", "vibration")
    if "rate_hz" in table:
        spec["rate_hz"] = _rate(path, "rate_hz", table["rate_hz"])
    if (channels := table.get("channels")) is not None:
        if (
            not isinstance(channels, list)
            or not channels
            or not all(isinstance(c, str) and c.strip() for c in channels)
        ):
            raise Unusable(f"{path}: channels must be a list of names, not {channels!r}")
        spec["channels"] = tuple(channels)
    return spec


def _rate(path: Path, key: str, hz) -> float:
    if not isinstance(hz, int | float) or isinstance(hz, bool):
        raise Unusable(f"{path}: {key} = {hz!r} must be a number")
    if not 0 < hz < float("inf"):
        raise Unusable(f"{path}: {key} = {hz} must be more than 0")
    return float(hz)


def _participants(path: Path, table) -> Participants:
    table = _table(path, "participants", table)
    _check_keys(path, "participants.", table, PARTICIPANT_KEYS)
    file, id_, pattern = (_get(path, table, key, str, "participants.") for key in ("file", "id", "id_pattern"))
    if not file or not id_:
        raise Unusable(f"{path}: [participants] needs `file` and `id`, the column that names the subject")
    compiled = _compile(path, "participants.id_pattern", pattern)
    if compiled and "subject" not in compiled.groupindex:
        raise Unusable(f"{path}: participants.id_pattern = {pattern!r} has no group (?P<subject>…)")
    columns = table.get("columns")
    if columns is not None and not all(
        isinstance(c, str) for c in _table(path, "participants.columns", columns).values()
    ):
        raise Unusable(f"{path}: participants.columns = {columns!r} must map our names to columns of {file}")
    return Participants(file, id_, pattern or "(?P<subject>.+)", columns)


def _seconds(path: Path, key: str, pair) -> tuple[float | None, float | None]:
    """[start, stop] of a crop: seconds from the start, negative ones from the end; a stop of 0 is the end (None)."""
    if not (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(s, int | float) and not isinstance(s, bool) for s in pair)
    ):
        raise Unusable(f"{path}: {key} = {pair!r} must be two numbers, [start, stop] in seconds")
    start, stop = float(pair[0]), float(pair[1]) or None
    if stop is not None and (start < 0) == (stop < 0) and stop <= start:
        raise Unusable(f"{path}: {key} = {pair!r} stops before it starts")
    return start, stop


def _split(path: Path, table) -> tuple[dict[str, str], str]:
    """Which subject, or with `by` which value of that column, is in which split."""
    table = _table(path, "split", table)
    _check_keys(path, "split.", table, (*SPLITS, "by"))
    by = _get(path, table, "by", str, "split.") or "subject"
    split: dict[str, str] = {}
    for name, subjects in table.items():
        if name == "by":
            continue
        if (
            not isinstance(subjects, list)
            or not subjects
            or not all(isinstance(s, str | int) and not isinstance(s, bool) for s in subjects)
        ):
            raise Unusable(f"{path}: split.{name} must be a list of {by}s, not {subjects!r}")
        for subject in map(str, subjects):
            if split.setdefault(subject, name) != name:
                raise Unusable(f"{path}: {by} {subject!r} is in both split.{split[subject]} and split.{name}")
    return split, by
