"""
Tables of samples: CSV and TXT files, and what archives have in common with them, for EEG and for vibration.

Such files say little about themselves. What they do say (a header row, a time column, arrays called `fs` or `ch_names`, a `.yml`
beside them) is used and must agree with what dataset.toml states; what neither says is not guessed.

T samples, C channels, N snapshots.
"""

import csv
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib import channels
from lib.errors import Rejected
from lib.labels import MISSING, decode
from lib.recordings import Event, ReadSpec, Recording, Segment, code_events, onset_of
from lib.statements import ARBITRARY, settle_channels, settle_rate, settle_unit
from lib.timestamps import read_clock, read_dates

TIMES = {"time", "times", "t", "timestamp", "timestamps", "time_stamp", "time_stamps", "lsl_timestamp", "seconds"}
RATES = set(
    "rate rate_hz fs sf sr sfreq srate samplingrate sampling_rate sample_rate samplerate sampling_frequency".split()
)
NAMES = {"channels", "channel_names", "ch_names", "chnames", "labels", "sensors", "electrodes"}
STAMP_S = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3, "milliseconds": 1e-3}
STAMP_S |= dict.fromkeys(("us", "µs", "usec", "microseconds"), 1e-6)
# `time [ms]`, `timestamp_us`, OpenViBE's `Time:256Hz`
_TIME = re.compile(
    rf"({'|'.join(TIMES)})(?:_?[\[(](?P<in>\S+)[\])]|_(?P<of>{'|'.join(STAMP_S)})|:\d+hz)?", re.IGNORECASE
)
REMARKS = 0.1  # of the rows at most hold a text where texts are said now and then
STEADY = 4  # time is the axis that is this many times longer than the other


@dataclass
class Table:
    """What a file holds before anything that is stated about it is applied."""

    signal: object  # array-like (T, C), (C, T), (T,), or (N, T, C) and (N, C, T) for vibration; loaded when read
    names: list[str] | None = None
    rate_hz: float | None = None
    unit: str | None = None
    stamps_T: np.ndarray | None = None
    stamp_s: float | None = None  # what the time column counts in; None: not said
    markers: list[np.ndarray] = field(default_factory=list)  # codes or texts, one per sample
    per_snapshot: dict[str, np.ndarray] = field(default_factory=dict)
    trials: list[tuple[str, int]] = field(default_factory=list)  # label and samples of each, one after the other
    columns: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_table(path: Path, spec: ReadSpec) -> Recording:
    """Opens a CSV or TXT file. Raises Rejected."""
    return to_recording(path, _read_text(path, spec), spec)


def to_recording(path: Path, table: Table, spec: ReadSpec) -> Recording:
    """A recording from what the file holds and what is stated about it. Raises Rejected."""
    _add_sidecar(path, table)
    order, snapshots, samples = _orientation(path, table, spec)
    count = np.shape(table.signal)[order[0]] if order else 1
    vibration = spec.kind == "vibration"
    if vibration and not table.names and (count == 1 or path.suffix.lower() not in (".csv", ".txt")):
        table.names = [f"ch{i + 1}" for i in range(count)]  # axes have no standard names that could be wrong
    names, picked = settle_channels(table.names or [], spec.channels, count, path.name)
    kinds = ["vibration" if vibration else channels.kind(name) for name in names]
    unit, factor = spec.unit or table.unit or ARBITRARY, 1.0
    if not vibration:
        unit, factor = settle_unit(table.unit, spec.unit, path.name)

    total = snapshots * samples
    clock, rate_hz = _clock(path, table, spec)
    if clock:
        segments = clock.segments(rate_hz)
    else:
        lengths = [length for _, length in table.trials] or [samples] * snapshots
        stops = np.cumsum(lengths).tolist()
        segments = [Segment(b - n, b, (b - n) / rate_hz) for n, b in zip(lengths, stops, strict=True)]
    if snapshots > 1:
        table.notes.append(f"{snapshots} snapshots; the time between them is not in the file")
    events = [event for marks_T in table.markers for event in _events(marks_T, rate_hz, segments)]
    for (label, length), segment in zip(table.trials, segments if table.trials else [], strict=True):
        events.append(Event(segment.onset_s, length / rate_hz, label))
    for name, values_N in table.per_snapshot.items():
        events += [Event(s.onset_s, samples / rate_hz, name, float(v)) for s, v in zip(segments, values_N, strict=True)]

    def take(indices: list[int]) -> np.ndarray:
        x_CNT = np.transpose(np.asarray(table.signal), order) if order else np.asarray(table.signal)[None]
        x_CT = x_CNT[[picked[i] for i in indices]].astype(np.float32).reshape(len(indices), total)
        return x_CT * np.float32(factor)

    return Recording(
        path=path,
        names=names,
        kinds=kinds,
        rates_hz=[rate_hz] * len(names),
        unit=unit,
        samples=total,
        segments=segments,
        take=take,
        events=sorted(events, key=lambda e: e.onset_s),
        notes=table.notes,
        columns=table.columns,
    )


# text


@dataclass(frozen=True)
class Layout:
    """How the rows of a text file are cut into cells."""

    delimiter: str | None  # None: white space
    width: int
    decimal_comma: bool

    def cells(self, lines: list[str]) -> list[list[str]]:
        if self.delimiter is None:
            return [line.split() for line in lines]
        return [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=self.delimiter)]

    def number(self, cell: str) -> float | None:
        """A cell as a number, NaN if it is empty or says that it is missing, None if it is text."""
        if cell.lower() in MISSING:
            return math.nan
        try:
            return float(cell.replace(",", ".") if self.decimal_comma else cell)
        except ValueError:
            return None

    def is_data(self, row: list[str]) -> bool:
        """Whether there are numbers, and at least as many as texts, which a marker or comment may be."""
        texts = sum(self.number(cell) is None for cell in row)
        return any(row) and texts <= self.width / 2 and texts < sum(map(bool, row))


def _layout(lines: list[str]) -> Layout:
    """The layout that cuts lines from the middle of the file into equally many cells."""
    sample = lines[len(lines) // 2 :][:20]
    for delimiter in "\t;,":
        widths = {len(row) for row in csv.reader(sample, delimiter=delimiter)}
        if len(widths) == 1 and (width := widths.pop()) > 1:
            text = "".join(sample)
            return Layout(delimiter, width, delimiter != "," and "," in text and "." not in text)
    return Layout(None, max(len(line.split()) for line in sample), False)


def _read_text(path: Path, spec: ReadSpec) -> Table:
    """A CSV or TXT file: delimiter found, header row recognised, time and markers told from channels by their names."""
    text = decode(path)
    if "\0" in text[:4096]:
        raise Rejected("not_text", f"{path.name} holds bytes that are no text")
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] not in "#%"]
    if not lines:
        raise Rejected("no_data", f"{path.name} has no rows")
    layout = _layout(lines)
    top = layout.cells(lines[:50])
    numeric = [len(row) == layout.width and layout.is_data(row) for row in top]
    if not any(numeric):
        raise Rejected("not_numeric", f"{path.name}: no row of {layout.width} numbers among its first {len(top)}")
    first = numeric.index(True)
    above = [row for row in top[:first] if len(row) == layout.width] if first else []
    above = above if above and above[-1] is top[first - 1] else []
    # the nearest that names most columns: a remark may stand between names and samples
    header = next(
        (row for row in reversed(above) if sum(map(bool, row)) > layout.width / 2), above[-1] if above else None
    )
    first += top[first] == [str(i) for i in range(layout.width)] and layout.width > 2  # columns counted by pandas
    if header is None and spec.channels and len(spec.channels) == layout.width:
        header = list(spec.channels)
    table = Table(None)
    cells_TC, texts = _parse(path, lines[first:], layout, table.notes)
    if header is None:
        table.signal = cells_TC
    else:
        _apply_header(path, table, header, cells_TC, texts)
    return table


def _parse(path: Path, lines: list[str], layout: Layout, notes: list[str]) -> tuple[np.ndarray, dict]:
    """(numbers, a row per sample; columns of text by index); empty cells are NaN, a last row that was cut off is left out."""
    if not layout.decimal_comma:
        try:  # fast, but it knows neither empty cells nor text
            numbers = np.loadtxt(lines, np.float64, comments=None, delimiter=layout.delimiter, ndmin=2)
            if numbers.shape[1] == layout.width:
                return numbers, {}
        except ValueError:
            pass
    rows = layout.cells(lines)
    if len(rows[-1]) != layout.width:
        notes.append("truncated: the last row was cut off")
        rows.pop()
    ragged = next((i for i, row in enumerate(rows) if len(row) != layout.width), None)
    if ragged is not None:
        found = f"row {ragged + 1} of the data has {len(rows[ragged])} cells instead of {layout.width}"
        raise Rejected("ragged_rows", f"{path.name}: {found}")
    numbers, texts = np.full((len(rows), layout.width), np.nan), {}
    for i, column in enumerate(zip(*rows, strict=True)):
        values = [layout.number(cell) for cell in column]
        if None in values:
            texts[i] = np.array(column)
        else:
            numbers[:, i] = values
    return numbers, texts


def _apply_header(path: Path, table: Table, header: list[str], cells_TC: np.ndarray, texts: dict) -> None:
    """Sort columns into time, markers and channels by their names."""
    units, names = zip(*map(_split_unit, header), strict=True)
    found = {i: m for i, cell in enumerate(header) if (m := _TIME.fullmatch(cell.replace(" ", "_")))}
    times = list(found)
    markers = [i for i, name in enumerate(names) if channels.kind(name) == "stim" and i not in times]
    kept = [i for i, name in enumerate(names) if name and i not in texts and i not in times and i not in markers]
    cells_TC, texts, remarks_T = _without_remarks(cells_TC, texts, kept, times)
    if counted := [i for i in times if i not in texts]:
        table.stamps_T, table.stamp_s = cells_TC[:, counted[0]], _stamp_s(found[counted[0]])
    elif times:
        table.stamps_T, table.stamp_s = read_dates(texts[times[0]].tolist(), path.name), 1.0
    table.markers = [texts.get(i, cells_TC[:, i]) for i in markers] + ([] if remarks_T is None else [remarks_T])
    ignored = [names[i] for i in texts if i not in markers and i not in times]
    table.notes += [f"columns of text ignored: {', '.join(ignored)}"] if ignored else []
    if not kept:
        raise Rejected("no_signal", f"{path.name} has no column of samples: {', '.join(names)}")
    table.signal, table.names = cells_TC[:, kept], [names[i] for i in kept]
    stated = sorted({units[i] for i in kept if units[i]})
    if len(stated) > 1:
        raise Rejected("unit_conflict", f"{path.name} has columns in {', '.join(stated)}")
    table.unit = stated[0] if stated else None


def _without_remarks(cells_TC: np.ndarray, texts: dict, kept: list[int], times: list[int]) -> tuple:
    """
    (numbers, texts, remarks_T) without rows that hold a text and no sample (Mind Monitor: `/muse/elements/blink`, `/Marker/1`), which would
    shift time; remarks_T has their texts at the samples that follow, None if there are none.
    """
    # a column that speaks of every sample is none of remarks, and its empty rows are gaps
    others = [column for i, column in texts.items() if i not in times and np.mean(column != "") < REMARKS]
    if not others or not kept:
        return cells_TC, texts, None
    said_T = np.array([next(filter(None, row), "") for row in zip(*others, strict=True)])
    remark_T = (said_T != "") & np.isnan(cells_TC[:, kept]).all(1)
    if not remark_T.any() or remark_T.all():
        return cells_TC, texts, None
    following = np.minimum(np.cumsum(~remark_T)[remark_T], np.count_nonzero(~remark_T) - 1)
    remarks_T = np.full(np.count_nonzero(~remark_T), "", said_T.dtype)
    remarks_T[following] = said_T[remark_T]
    return cells_TC[~remark_T], {i: column[~remark_T] for i, column in texts.items()}, remarks_T


def _stamp_s(header: re.Match) -> float | None:
    """What a time column counts in, in seconds, if its header says so."""
    return STAMP_S.get((header["in"] or header["of"] or "").lower())


def _split_unit(cell: str) -> tuple[str | None, str]:
    """(unit, name) of a header cell such as `Fp1 (uV)` or `time [ms]`."""
    found = re.fullmatch(r"(.*?)\s*[\[(]\s*([^\])]{1,8}?)\s*[\])]", cell)
    return (found[2], found[1]) if found else (None, cell)


# what is stated against what the file holds


def _add_sidecar(path: Path, table: Table) -> None:
    """Rate, unit and channels from a simple `.yml` beside the file, if it names any."""
    file = next((f for f in (path.with_suffix(".yml"), path.with_suffix(".yaml")) if f.is_file()), None)
    if file is None:
        return
    text = file.read_text("utf-8", errors="replace")
    rate = re.search(rf"(?mi)^\s*(?:{'|'.join(RATES)})\s*:\s*([\d.]+)\s*$", text)
    names = re.search(rf"(?mi)^\s*(?:{'|'.join(NAMES)})\s*:\s*\n((?:\s*-\s*\S.*\n)+)", text + "\n")
    unit = re.search(r"(?mi)^\s*units?\s*:\s*(\S+)\s*$", text)
    if rate:
        table.rate_hz = settle_rate(float(rate[1]), table.rate_hz, file.name)
    if names and table.names is None:
        table.names = [line.strip().lstrip("-").strip(" '\"") for line in names[1].strip().splitlines()]
    table.unit = table.unit or (unit[1].strip("'\"") if unit else None)


def _orientation(path: Path, table: Table, spec: ReadSpec) -> tuple[tuple[int, ...], int, int]:
    """
    (order of axes that gives (C, T) or (C, N, T), snapshots, samples of each).

    The channel axis is the one whose length is the known number of channels, or else the one that is much shorter.
    """
    shape = np.shape(table.signal)
    if path.suffix.lower() in (".csv", ".txt"):
        return (1, 0), 1, shape[0]
    if len(shape) == 1:
        return (), 1, shape[0]
    if len(shape) > 3 or len(shape) == 3 and spec.kind != "vibration":
        how = "save one array (samples, channels) a file, and its rate_hz in a dataset.toml"
        words = f"{path.name} holds an array {shape}, not a continuous recording: {how}"
        raise Rejected("epoched", f'{words}; for snapshots of a machine say kind = "vibration" there')
    a, b = shape[-2:]
    counts = {len(n) for n in (spec.channels, table.names) if n}
    fits = [axis for axis, size in enumerate((a, b)) if size in counts] if len(counts) == 1 else []
    if len(fits) != 1 and max(a, b) < STEADY * min(a, b):
        raise Rejected("orientation", f"{path.name} holds {shape}: which axis is time? State channels in dataset.toml")
    axis = fits[0] if len(fits) == 1 else int(b < a)
    if len(shape) == 2:
        return (axis, 1 - axis), 1, shape[1 - axis]
    return (1 + axis, 0, 2 - axis), shape[0], shape[2 - axis]


def _clock(path: Path, table: Table, spec: ReadSpec):
    """(clock of the time column if there is one, rate): the file's rate, which stamps and a stated rate must bear out."""
    if table.stamps_T is None:
        return None, settle_rate(table.rate_hz, spec.rate_hz, path.name)
    known_hz = table.rate_hz or spec.rate_hz
    clock = read_clock(table.stamps_T, path.name)
    # a column in milli- or microseconds that doesn't say so is known by the rate it has to have
    scales = [table.stamp_s] if table.stamp_s else [1.0, 1e-3, 1e-6] if known_hz else [1.0]
    scale = next((s for s in scales if known_hz and abs(clock.rate_hz / s - known_hz) < 0.02 * known_hz), scales[0])
    if scale != 1.0:
        clock = read_clock(table.stamps_T * scale, path.name)
    if known_hz is None and clock.rate_hz < 10:
        step = f"{path.name}: time goes by {1 / clock.rate_hz:g} per row"
        raise Rejected("rate_missing", f"{step}, which can't be seconds: state rate_hz in dataset.toml")
    whole_hz = float(round(clock.rate_hz))  # devices run at whole rates, clocks are a little off
    measured_hz = whole_hz if abs(clock.rate_hz - whole_hz) < 1e-3 * whole_hz else round(clock.rate_hz, 2)
    rate_hz = settle_rate(table.rate_hz, spec.rate_hz, path.name) if known_hz else measured_hz
    settle_rate(clock.rate_hz, rate_hz, path.name, tolerance=0.02)
    table.notes.append(f"rate from time stamps: {clock.rate_hz:.3f} Hz measured, {rate_hz:g} Hz used")
    return clock, rate_hz


def _events(marks_T: np.ndarray, rate_hz: float, segments: list[Segment]) -> list[Event]:
    """Events of a marker column, of codes or of texts."""
    if marks_T.dtype.kind != "U":
        return code_events(marks_T, rate_hz, segments)
    changes = np.flatnonzero(np.append(True, marks_T[1:] != marks_T[:-1]))
    stops = np.append(changes, len(marks_T))[1:]
    spans = zip(changes.tolist(), stops.tolist(), strict=True)
    starts = [(i, stop) for i, stop in spans if marks_T[i] not in ("", "0")]
    return [Event(onset_of(segments, rate_hz, i), (stop - i) / rate_hz, str(marks_T[i])) for i, stop in starts]
