"""
Text beside recordings: TUSZ seizure files, events.tsv, channels.tsv, electrodes.tsv and participants tables of BIDS, and the event
vocabulary that all phases share.

Nothing is guessed. A file that can't be right rejects its recording with a code; a row that is wrong is left out and reported with
its line; a value that is missing stays missing and never becomes 0. Times are seconds from the first sample.

Vocabulary that `normalise_events` adds to whatever labels a data set has (which all stay):

    eyes_open, eyes_closed   intervals, from instructed_toOpenEyes / instructed_toCloseEyes (HBN, also as EDF+ annotations)
    movie:<name>             interval, from video_start … video_stop in a movie task, or a trial_type `movie` with a duration
    stimulus, response       contrast change: the target and the first button press after it within its trial; value = response time (s)
    seizure                  intervals, from SzCORE types (sz…), TUSZ types (fnsz, gnsz, …) and `seizure`
"""

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from lib.channels import canonical, standard
from lib.errors import Rejected, Unusable
from lib.recordings import Event, Recording, plausible_positions

SEIZURE_TYPES = frozenset("seiz fnsz gnsz spsz cpsz absz tnsz cnsz tcsz atsz mysz nesz".split())  # TUSZ v2.0.x
BACKGROUND = "bckg"
TUSZ_COLUMNS = ("channel", "start_time", "stop_time", "label", "confidence")
MISSING = frozenset(("", "n/a", "na", "nan", "#n/a"))
NO_NUMBER = MISSING | {"none", "null", "unknown", "?", "-"}  # missing too, but only in a column of numbers
TRAITS = (
    "age",
    "sex",
    "ehq_total",
    "p_factor",
    "attention",
    "internalizing",
    "externalizing",
)  # any spelling of case is ours
SEXES = {**dict.fromkeys(("m", "male", "man", "boy"), "M"), **dict.fromkeys(("f", "female", "woman", "girl"), "F")}

# HBN's films and their length in seconds (video_start to video_stop in the releases): the most an interval without video_stop can last
MOVIE = "movie:"  # how the labels of movies begin
MOVIES = {"DespicableMe": 170.6, "ThePresent": 203.1, "DiaryOfAWimpyKid": 117.4, "FunwithFractals": 163.0}
EYE_CUES = {"instructed_toopeneyes": "eyes_open", "instructed_tocloseeyes": "eyes_closed"}
EYE_STATES = {
    "eyes_open": "eyes_open",
    "eyes open": "eyes_open",
    "eyes_closed": "eyes_closed",
    "eyes closed": "eyes_closed",
}
EYE_ENDS = {"break cnt", "resting_stop", "resting_end"}
KINDS_OF_TRIAL = MISSING | {
    "stimulus",
    "response",
    "feedback",
    "status",
    "trigger",
    "marker",
}  # say nothing about the condition
LABEL_COLUMNS = (
    "trial_type",
    "eventtype",
    "event_type",
    "value",
    "stim_type",
    "event",
    "description",
    "type",
    "event_code",
)
VALUE_COLUMNS = ("response_time", "reaction_time", "value")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?(0|\d+),(\d+)")


@dataclass
class SeizureLabels:
    """When a recording is a seizure: merged intervals [start_s, stop_s), and what the file had that was not taken as it stood."""

    intervals: list[tuple[float, float]]
    notes: list[str] = field(default_factory=list)
    rows_rejected: list[str] = field(default_factory=list)  # "line 7: stop 10 is before start 15"


# --- tables of text ---------------------------------------------------------------------------------------------------------------


def decode(path: Path) -> str:
    """The text of a file: UTF-8 with or without BOM, UTF-16 with BOM, else latin-1 (which every byte sequence is). Raises OSError."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines that aren't blank, with their numbers; not by str.splitlines, which also cuts at latin-1's 0x85."""
    return [(i, line) for i, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip()]


def _split(line: str, delimiter: str) -> list[str]:
    """The cells of one line; quotes are honoured within it only, so that a stray one can't swallow the lines after it."""
    cells = next(csv.reader([line], delimiter=delimiter)) if '"' in line and "\0" not in line else line.split(delimiter)
    return [cell.strip() for cell in cells]


def _delimiter(line: str) -> str:
    """A tab if there is one, else the more frequent of semicolon and comma."""
    return max("\t;,", key=lambda c: (line.count(c) > 0, c == "\t", line.count(c)))


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Column names and rows (line number, cells) of a delimited file; tab, semicolon or comma by what the header has. Raises OSError."""
    lines = _lines(decode(path))
    if not lines:
        return [], []
    delimiter = _delimiter(lines[0][1])
    (_, names), *rows = [(i, _split(line, delimiter)) for i, line in lines]
    return names, rows


def number(text: str, decimal_comma: bool = False) -> float | None:
    """A finite decimal number, or None for anything else (n/a, NaN, inf, words)."""
    text = text.strip().replace(",", ".") if decimal_comma else text.strip()
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    return value if math.isfinite(value) else None


def has_decimal_comma(cells: list[str]) -> bool:
    """Whether a column writes 9,5 for 9.5: no cell has a point, and one can't be a thousands separator (1,234 alone could be)."""
    found = [m for m in map(_DECIMAL_COMMA.fullmatch, cells) if m]
    return not any("." in c for c in cells) and any(len(m[2]) != 3 or m[1] == "0" for m in found)


def _report(path: Path, rejected: list[str], rows: int) -> list[str]:
    if not rejected:
        return []
    more = f"; {len(rejected) - 3} more" if len(rejected) > 3 else ""
    return [f"table rows left out: {len(rejected)} of {rows} in {path.name}: {'; '.join(rejected[:3])}{more}"]


# --- seizures ---------------------------------------------------------------------------------------------------------------------


def merge(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, sorted; overlapping and touching ones become one."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            start, stop = merged[-1][0], max(merged.pop()[1], stop)
        merged.append((start, stop))
    return merged


def is_seizure(label: str) -> bool:
    """Whether a label names a seizure: `seizure`, a TUSZ type (seiz, fnsz …) or a SzCORE type (sz, sz_foc_ia …)."""
    label = label.strip().lower()
    return label == "seizure" or label in SEIZURE_TYPES or re.fullmatch(r"sz([_-].*)?", label) is not None


def read_csv_bi(path: Path, duration_s: float) -> SeizureLabels:
    """
    The seizures of a TUSZ `.csv_bi`: rows `TERM,start,stop,seiz|bckg,confidence`, clipped to the recording of `duration_s` seconds.

    Raises Rejected: `labels_missing`, `labels_empty`, `label_unknown`, `labels_per_channel` (it is the other kind of file),
    `label_out_of_range` (a row lies wholly outside: most often the file of another recording), and `labels_rejected` where rows that
    may be seizures were wrong and no seizure is left, so that a broken row never turns into background.
    """
    return _read_tusz(path, duration_s, per_channel=False)


def read_csv_channels(path: Path, duration_s: float) -> SeizureLabels:
    """The union over channels of a TUSZ per-channel `.csv`, for those who ask for it; raises Rejected like `read_csv_bi`."""
    return _read_tusz(path, duration_s, per_channel=True)


def _read_tusz(path: Path, duration_s: float, per_channel: bool) -> SeizureLabels:
    try:
        lines = _lines(decode(path))
    except OSError as error:
        raise Rejected("labels_missing", f"{path.name}: {error.strerror or error}") from error
    comments = [line.lstrip("# ") for _, line in lines if line.lstrip().startswith("#")]
    lines = [(i, line) for i, line in lines if not line.lstrip().startswith("#")]
    delimiter = _delimiter(lines[0][1]) if lines else ","
    rows = [(i, _split(line, delimiter)) for i, line in lines]
    columns = list(TUSZ_COLUMNS)  # the order that holds without a header row
    if rows and "label" in map(str.lower, rows[0][1]):
        columns, rows = [cell.lower() for cell in rows[0][1]], rows[1:]
    if missing := ", ".join(sorted(set(TUSZ_COLUMNS[:4]) - set(columns))):
        raise Rejected("labels_unreadable", f"{path.name} has no column {missing}")
    if not rows:
        raise Rejected("labels_empty", f"{path.name} has no rows; without a seizure it would have one of background")

    found = SeizureLabels([], _compare_header(path, comments, duration_s))
    lost, clipped = 0, 0
    for i, cells in rows:
        while len(cells) > len(columns) and not cells[-1]:  # trailing delimiters say nothing
            cells.pop()
        row = dict(zip(columns, cells, strict=False))
        label = row.get("label", "").lower()
        start, stop = (number(row.get(name, ""), delimiter != ",") for name in ("start_time", "stop_time"))
        where = f"{path.name} line {i}"
        if len(cells) != len(columns):
            found.rows_rejected.append(f"line {i}: {len(cells)} fields, expected {len(columns)}")
        elif label not in SEIZURE_TYPES and label != BACKGROUND:
            raise Rejected("label_unknown", f"{where}: label {row['label']!r}")
        elif not per_channel and row["channel"].upper() != "TERM":
            raise Rejected("labels_per_channel", f"{where}: channel {row['channel']}, expected TERM")
        elif start is None or stop is None or stop <= start:
            found.rows_rejected.append(f"line {i}: start {row['start_time']}, stop {row['stop_time']}")
        elif start >= duration_s or stop <= 0:
            raise Rejected(
                "label_out_of_range", f"{where}: {start:g} to {stop:g} s, but the recording lasts {duration_s:g} s"
            )
        else:
            clipped += start < 0 or stop > duration_s
            found.intervals += [(max(start, 0.0), min(stop, duration_s))] * (label != BACKGROUND)
            continue
        lost += label != BACKGROUND  # what a row without a label was, nobody knows
    if (lost and not found.intervals) or len(found.rows_rejected) == len(rows):
        raise Rejected("labels_rejected", f"{path.name}: {'; '.join(found.rows_rejected[:3])}")
    found.intervals = merge(found.intervals)
    if clipped:
        found.notes.append(f"seizure rows clipped to the recording: {clipped} in {path.name}, of {duration_s:g} s")
    found.notes += _report(path, found.rows_rejected, len(rows))
    return found


def _compare_header(path: Path, comments: list[str], duration_s: float) -> list[str]:
    """Notes where the comments of a TUSZ file speak of another recording: length more than 1 s apart, or another name."""
    pairs = (comment.partition("=") for comment in comments)
    stated = {name.strip().lower(): value.strip() for name, mark, value in pairs if mark}
    notes = []
    seconds = number(stated.get("duration", "").lower().removesuffix("secs"))
    if seconds is not None and abs(seconds - duration_s) > 1:
        notes.append(
            f"labels and recording differ in length: {path.name} is for {seconds:g} s, the recording lasts {duration_s:g} s"
        )
    if (name := stated.get("bname") or path.stem) != path.stem:
        notes.append(f"labels are of another recording by name: {path.name} is for {name}")
    return notes


# --- events -----------------------------------------------------------------------------------------------------------------------


def read_events_tsv(path: Path) -> tuple[list[Event], list[str]]:
    """
    The rows of an events.tsv in order of onset, labels as they are, and notes: every row left out, and why.

    The label is the first column of LABEL_COLUMNS that has one, but a trial_type that only ever says `stimulus`, `response` … yields to
    the others; the value is the first of VALUE_COLUMNS that is a number and not the label. A missing duration is 0.
    """
    try:
        names, rows = read_table(path)
    except OSError as error:
        return [], [f"events file not read: {path.name}: {error.strerror or error}"]
    names = [name.lower() for name in names]
    if "onset" not in names:
        return [], [f"events file without onset column: {path.name} has {', '.join(names) or 'nothing'}"]
    table = {
        name: [cells[i] if i < len(cells) else "" for _, cells in rows] for i, name in reversed([*enumerate(names)])
    }
    comma = {name: has_decimal_comma(cells) for name, cells in table.items()}
    labels = [name for name in LABEL_COLUMNS if name in table]
    if labels[:1] == ["trial_type"] and KINDS_OF_TRIAL.issuperset(cell.lower() for cell in table["trial_type"]):
        labels.append(labels.pop(0))

    events, rejected = [], []
    for i, (line, cells) in enumerate(rows):
        onset = number(table["onset"][i], comma["onset"])
        text = table["duration"][i] if "duration" in table else ""
        duration = 0.0 if text.lower() in MISSING else number(text, comma["duration"])
        source = next((name for name in labels if table[name][i].lower() not in MISSING), None)
        if any(cells[len(names) :]):
            rejected.append(f"line {line}: {len(cells)} fields, expected {len(names)}")
        elif onset is None:
            rejected.append(f"line {line}: onset {table['onset'][i]!r}")
        elif duration is None or duration < 0:
            rejected.append(f"line {line}: duration {text!r}")
        elif source is None:
            rejected.append(f"line {line}: no label")
        else:
            values = (number(table[name][i], comma[name]) for name in VALUE_COLUMNS if name in table and name != source)
            value = next((v for v in values if v is not None), math.nan)
            events.append(Event(onset, duration, table[source][i], value))
    return sorted(events, key=lambda e: e.onset_s), _report(path, rejected, len(rows))


def normalise_events(events: list[Event], task: str = "", duration_s: float = math.inf) -> list[Event]:
    """The events and, among them in order of onset, those of the common vocabulary (see the top of this file) that they imply."""
    events = sorted(events, key=lambda e: e.onset_s)
    implied = [*_eyes(events, duration_s), *_movies(events, task, duration_s), *_trials(events), *_seizures(events)]
    known = {(e.label, round(e.onset_s, 3), round(e.duration_s, 3)) for e in events}
    new = [e for e in implied if (e.label, round(e.onset_s, 3), round(e.duration_s, 3)) not in known]
    return sorted(events + new, key=lambda e: e.onset_s)


def _eyes(events: list[Event], duration_s: float) -> list[Event]:
    """
    An instruction holds until the next one, or until the task ends (HBN: `break cnt`).

    The last one has no end of its own: it lasts as long as the longest before it of the same state, so that whatever follows the task
    isn't taken for rest. The duration of an instruction is that of the voice, not of the state.
    """
    timed = [e for e in events if e.duration_s > 0 and _plain(e.label) in EYE_STATES]
    states = [Event(e.onset_s, e.duration_s, EYE_STATES[_plain(e.label)]) for e in timed]
    cues = [
        (e.onset_s, EYE_CUES.get(label)) for e in events if (label := _plain(e.label)) in EYE_CUES or label in EYE_ENDS
    ]
    known: dict[str, float] = {}
    for i, (onset, state) in enumerate(cues):
        stop = cues[i + 1][0] if i + 1 < len(cues) else min(duration_s, onset + known.get(state, math.inf))
        if state and onset < stop < math.inf:
            known[state] = max(known.get(state, 0.0), stop - onset)
            states.append(Event(onset, stop - onset, state))
    return states


def _plain(label: str) -> str:
    return label.strip().lower()


def _movies(events: list[Event], task: str, duration_s: float) -> list[Event]:
    """From video_start to the next video_stop; where that is missing, a film of known length lasts that long, others are not guessed."""
    name = next((movie for movie in MOVIES if movie.lower() == task.lower()), task)
    given = [e for e in events if name and e.duration_s > 0 and _plain(e.label) == "movie"]
    shown = [Event(e.onset_s, e.duration_s, f"{MOVIE}{name}") for e in given]
    if name not in MOVIES and not re.search("movie|video|film", task, re.IGNORECASE):
        return shown  # HBN's surroundSupp carries stray video triggers
    starts = [e.onset_s for e in events if _plain(e.label) == "video_start"]
    stops = [e.onset_s for e in events if _plain(e.label) == "video_stop"]
    for start, following in zip(starts, [*starts[1:], math.inf], strict=False):  # there may be none
        stop = next((t for t in stops if start < t <= following), None)
        if stop is None and name in MOVIES:
            stop = min(start + MOVIES[name], following, duration_s)
        if stop is not None and stop > start:
            shown.append(Event(start, stop - start, f"{MOVIE}{name}"))
    return shown


def _trials(events: list[Event]) -> list[Event]:
    """Target and first button press of every contrast-change trial, where target < press < next trial; no press: value is NaN."""
    starts = [e.onset_s for e in events if e.label == "contrastTrial_start"]
    targets = [e for e in events if e.label in ("left_target", "right_target")]
    presses = [e.onset_s for e in events if e.label in ("left_buttonPress", "right_buttonPress")]
    trials = []
    for start, following in zip(starts, [*starts[1:], math.inf], strict=False):
        target = next((e for e in targets if start <= e.onset_s < following), None)
        if target is None:
            continue
        press = next((p for p in presses if target.onset_s < p < following), None)
        trials.append(Event(target.onset_s, 0.0, "stimulus", math.nan if press is None else press - target.onset_s))
        if press is not None:
            trials.append(Event(press, 0.0, "response", press - target.onset_s))
    return trials


def _seizures(events: list[Event]) -> list[Event]:
    intervals = [(e.onset_s, e.onset_s + e.duration_s) for e in events if is_seizure(e.label) and e.duration_s > 0]
    return [Event(start, stop - start, "seizure") for start, stop in merge(intervals)]


# --- channels ---------------------------------------------------------------------------------------------------------------------

# `type` of a BIDS channels.tsv, for what lib/recordings.py calls a kind; any other is misc
CHANNEL_TYPES = {"eeg": "eeg", "eog": "eog", "veog": "eog", "heog": "eog", "ecg": "ecg", "emg": "emg", "trig": "stim"}


def apply_channels_tsv(path: Path, recording: Recording) -> None:
    """
    Takes over what a BIDS channels.tsv says of a recording's channels, by electrode: those of a `type` other than EEG are none, those
    whose `status` is bad are bad. What it doesn't fit is noted.
    """
    try:
        columns, rows = read_table(path)
    except OSError as error:
        raise Rejected("unreadable", f"{path.name}: {error.strerror}") from error
    columns = [column.lower() for column in columns]
    if "name" not in columns:
        recording.notes.append(f"channel table not taken: {path.name} has no column `name`")
        return
    said = [dict(zip(columns, cells, strict=False)) for _, cells in rows]
    said = {canonical(row.get("name", "")): row for row in said}
    others = []
    for i, name in enumerate(recording.names):
        row = said.pop(canonical(name), {})
        stated = row.get("type", "").lower()
        kind = "eeg" if stated in MISSING else CHANNEL_TYPES.get(stated, "misc")
        if kind != "eeg" and recording.kinds[i] in ("eeg", "unknown"):
            recording.kinds[i] = kind
            others.append(f"{name} {row['type']}")
        if row.get("status", "").lower() == "bad":
            recording.marked_bad.add(name)
    if others:
        recording.notes.append(f"channels not of type EEG: {', '.join(others)} ({path.name})")
    if said:
        recording.notes.append(f"rows of a channel table without a channel: {', '.join(said)} ({path.name})")


# factors to metres; axes of the coordinate systems that BIDS defines for EEG and that start between the ears, as the head frame does
METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001}
AXES = {"captrak": "RAS", "eeglab-hj": "RAS", "eeglab": "ALS", "ctf": "ALS"}
AXES_NAMES = "CapTrak, EEGLAB-HJ, EEGLAB, CTF"


def apply_electrodes_tsv(files: tuple[Path, ...], recording: Recording) -> None:
    """
    Takes over the electrode positions of a BIDS electrodes.tsv (and coordsystem.json), in metres in the head frame; what can't be is noted.

    They count for electrodes whose name has no standard position.
    """
    path = files[0]
    try:
        columns, rows = read_table(path)
        system = json.loads(decode(files[1])) if len(files) > 1 else {}
    except (OSError, ValueError) as error:
        recording.notes.append(f"electrode positions not taken: {path.name}: {error}")
        return
    system = system if isinstance(system, dict) else {}
    columns = [column.lower() for column in columns]
    said = [dict(zip(columns, cells, strict=False)) for _, cells in rows]
    unplaced = {n for n, electrode in zip(recording.names, standard(recording.names), strict=True) if electrode is None}
    found = {row.get("name", ""): tuple(number(row.get(axis, "")) for axis in "xyz") for row in said}
    found = {name: xyz for name, xyz in found.items() if name in unplaced and None not in xyz}
    if not found:
        return
    unit, axes = (str(system.get(f"EEGCoordinate{key}", "")) for key in ("Units", "System"))
    factor, order = METRES.get(unit.lower()), AXES.get(axes.lower())
    if factor is None or order is None:
        stated = f"unit {unit or 'not stated'}, system {axes or 'not stated'}"
        recording.notes.append(
            f"electrode positions not taken: {path.name}: {stated}; known are m, cm, mm and {AXES_NAMES}"
        )
        return
    turned = {n: (x, y, z) if order == "RAS" else (-y, x, z) for n, (x, y, z) in found.items()}
    metres = {n: tuple(factor * v for v in xyz) for n, xyz in turned.items()}
    recording.positions |= plausible_positions(metres, recording.notes)


# --- participants -----------------------------------------------------------------------------------------------------------------


def read_participants(
    path: Path,
    id_column: str = "participant_id",
    id_pattern: str = r"(?:sub-)?(?P<subject>.+)",
    columns: dict[str, str] | None = None,
    renames: dict[str, dict[str, str]] | None = None,
) -> tuple[dict[str, dict[str, float | str]], list[str]]:
    """
    What a table says of each subject (missing values left out), and notes; `columns` maps our names to the table's, default all.

    A column is numbers if every value in it is one; the traits but sex are numbers whatever they hold. Sex is M or F; codes such as 0
    and 1 count only where `renames` or the levels in the JSON file beside the table say which is which. Rows that contradict each other
    about a subject leave that value missing. Raises Unusable where the table or a column asked for is not there.
    """
    try:
        names, rows = read_table(path)
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror or error}") from error
    lower = [name.lower() for name in names]
    if columns is None:
        columns = {
            low if low in TRAITS else name: name
            for name, low in zip(names, lower, strict=True)
            if name and low != id_column.lower()
        }
    for name in (id_column, *columns.values()):
        if name.lower() not in lower:
            raise Unusable(f"{path}: no column {name!r}; it has {', '.join(names) or 'none'}")

    notes, ids, wrong = [], [], []
    place = lower.index(id_column.lower())
    pattern = re.compile(id_pattern, re.IGNORECASE)
    for line, cells in rows:
        id_ = cells[place] if place < len(cells) else ""
        found = pattern.fullmatch(id_) if id_.lower() not in MISSING else None
        right = found and not any(cells[len(names) :])
        ids.append(found["subject"] if right else None)
        wrong += [] if right else [f"line {line}: {len(cells)} fields, {id_column} {id_!r}"]
    notes += _report(path, wrong, len(rows))

    participants: dict[str, dict[str, float | str]] = {id_: {} for id_ in ids if id_ is not None}
    for ours, theirs in columns.items():
        i = lower.index(theirs.lower())
        cells = [row[i] if i < len(row) else "" for _, row in rows]
        values, note = _typed(ours, [((renames or {}).get(ours) or {}).get(c, c) for c in cells], _levels(path, theirs))
        notes += [f"participants values left out: {theirs} in {path.name}: {note}"] if note else []
        said: dict[str, set] = {}
        for id_, value in zip(ids, values, strict=True):
            if id_ is not None and value is not None:
                said.setdefault(id_, set()).add(value)
        for id_, all_said in said.items():
            if len(all_said) == 1:
                participants[id_][ours] = all_said.pop()
            else:
                told = " and ".join(map(str, sorted(all_said)))
                notes.append(f"participants contradict themselves: {theirs} of {id_} in {path.name} is {told}")
    if not participants:
        notes.append(f"participants table without participants: {path.name}")
    return participants, notes


def _typed(name: str, cells: list[str], levels: dict[str, str]) -> tuple[list[float | str | None], str]:
    """The values of one participants column, None where missing, and a note on those that had to be left out."""
    comma = has_decimal_comma(cells)
    numbers = [number(cell, comma) for cell in cells]
    words = {c for c, n in zip(cells, numbers, strict=True) if n is None and c.lower() not in NO_NUMBER}
    if name == "sex":
        values = [SEXES.get(levels.get(c, c).lower()) for c in cells]
        unknown = {c for c, v in zip(cells, values, strict=True) if v is None and c.lower() not in MISSING}
        return values, f"{', '.join(sorted(unknown))} says neither M nor F; left missing" if unknown else ""
    if name in TRAITS or not words and any(n is not None for n in numbers):
        return numbers, f"{', '.join(sorted(words)[:3])} is no number; left missing" if words else ""
    return [None if c.lower() in MISSING else c for c in cells], ""


def _levels(path: Path, column: str) -> dict[str, str]:
    """What the codes of a column mean, from the BIDS sidecar (participants.json beside participants.tsv), if it says."""
    try:
        described = json.loads(decode(path.with_suffix(".json")))
        levels = next((d["Levels"] for name, d in described.items() if name.lower() == column.lower()), {})
        return {
            str(code): meaning["Description"] if isinstance(meaning, dict) else str(meaning)
            for code, meaning in levels.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
