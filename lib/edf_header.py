"""
What the header of an EDF, EDF+ or BDF file says, and how one is written: dataclasses, the table of units, and triage.

Nothing here looks at data; lib/edf.py holds the header against the file. Codes of Rejected that are raised here: empty,
annex_pointer, not_edf, bad_header, no_signals, record_duration.

Formats: Kemp et al. 1992 (EDF), Kemp & Olivan 2003 (EDF+), biosemi.com/faq/file_format.htm (BDF).
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from lib.errors import Rejected

# Factors to µV. Headers are read as latin-1, so a UTF-8 micro sign (C2 B5) or Greek mu (CE BC) arrives as two characters.
MICRO = ("u", "U", "\u00b5", "\u03bc", "\u00c2\u00b5", "\u00ce\u00bc", "micro")
UNITS = {prefix + volt: 1.0 for prefix in MICRO for volt in ("V", "v", "volt", "volts", "Volt", "Volts")}
UNITS |= {"V": 1e6, "v": 1e6, "volt": 1e6, "Volt": 1e6, "mV": 1e3, "mv": 1e3, "nV": 1e-3, "nv": 1e-3}

FIXED = {"version": 8, "patient": 80, "recording": 80, "date": 8, "time": 8, "header_bytes": 8, "reserved": 44}
FIXED |= {"records": 8, "record_s": 8, "signals": 4}
PER_SIGNAL = {"label": 16, "transducer": 80, "dimension": 8, "physical_min": 8, "physical_max": 8}
PER_SIGNAL |= {"digital_min": 8, "digital_max": 8, "prefilter": 80, "samples": 8, "reserved": 32}
RANGE = ("physical_min", "physical_max", "digital_min", "digital_max")
ANNOTATIONS = ("EDF Annotations", "BDF Annotations")
MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()


@dataclass
class Signal:
    """One signal of a file; `offset` is bytes from the start of a record, `to_uv` None where the unit is no known voltage."""

    label: str
    dimension: str
    rate_hz: float
    samples_per_record: int
    offset: int
    physical_min: float
    physical_max: float
    digital_min: float
    digital_max: float
    to_uv: float | None
    usable: bool = (
        False  # False: minimum equals maximum, so there is no scale, and to the builder the channel is missing
    )

    @property
    def gain(self) -> float:
        return (self.physical_max - self.physical_min) / (self.digital_max - self.digital_min)

    @property
    def bias(self) -> float:
        return self.physical_min - self.digital_min * self.gain


@dataclass
class Header:
    """What a file holds; `annotations` are (offset, length) in bytes within a record, and reading appends to `notes`."""

    path: Path
    format: str  # edf | bdf
    signals: list[Signal]  # without annotation signals
    records: int  # -1 or stated by the header; after lib.edf.read_header: whole records that are there and trusted
    record_s: float
    continuous: bool  # False: EDF+D, whose records say themselves when they start
    start: datetime | None
    header_bytes: int
    record_bytes: int
    annotations: list[tuple[int, int]]
    notes: list[str] = field(default_factory=list)

    @property
    def sample_bytes(self) -> int:
        return 3 if self.format == "bdf" else 2

    def note(self, text: str) -> None:
        """Remember something odd about the file, once."""
        if text not in self.notes:
            self.notes.append(text)


def parse_header(path: Path, file, size: int, annotations_only: bool = False) -> Header:
    """The header at the start of the open `file` of `size` bytes, consistent in itself; with signals or, if asked for, without. Raises Rejected."""
    first = file.read(256)
    if size == 0:
        raise Rejected("empty", f"{path}: zero bytes")
    if b"annex/objects/" in first or first.startswith(b"version https://git-lfs"):
        raise Rejected("annex_pointer", f"{path}: a pointer whose content was not fetched (datalad get, git lfs pull)")
    format = "bdf" if first.startswith(b"\xffBIOSEMI") else "edf"
    known = format == "bdf" or first[:8].strip() == b"0"
    cell = _cells(first, FIXED)
    numbers = {name: parse_integer(cell[name][0]) for name in ("header_bytes", "records", "signals")}
    header_bytes, records, count = numbers.values()
    if len(first) < 256 or (not known and None in numbers.values()):
        raise Rejected("not_edf", f"{path}: {size} bytes that don't start with an EDF header")
    if None in numbers.values() or records < -1 or count < 0 or header_bytes != 256 * (count + 1):
        raise Rejected("bad_header", f"{path}: {numbers} (header_bytes must be 256 x (signals + 1))")
    if size < header_bytes:
        raise Rejected("not_edf", f"{path}: {size} bytes, cut inside its header of {header_bytes}")

    record_s, start = parse_number(cell["record_s"][0]), _start(cell["date"][0], cell["time"][0])
    continuous = cell["reserved"][0][3:5] != "+D"
    header = Header(path, format, [], records, record_s, continuous, start, header_bytes, 0, [])
    columns = _cells(file.read(header_bytes - 256), PER_SIGNAL, count)
    for i in range(count):
        _add_signal(header, {name: column[i] for name, column in columns.items()})
    if annotations_only and not header.signals and header.annotations:
        return header  # its records last no time
    if not header.signals:
        raise Rejected("no_signals", f"{path}: only annotations, and no recording that they are named after beside it")
    if not record_s > 1e-6:
        raise Rejected("record_duration", f"{path}: records of {cell['record_s'][0]!r} seconds")
    if unusable := [s.label for s in header.signals if not s.usable]:
        header.note(f"unusable {', '.join(unusable)}")
    if inverted := [s.label for s in header.signals if s.usable and s.gain < 0]:
        header.note(f"inverted {', '.join(inverted)}")
    return header


def _add_signal(header: Header, cell: dict[str, str]) -> None:
    """Append one signal, or annotation area, to the header."""
    samples, ranges = parse_integer(cell["samples"]), [parse_number(cell[name]) for name in RANGE]
    annotation = cell["label"] in ANNOTATIONS
    if samples is None or samples < 1 or (not annotation and any(map(math.isnan, ranges))):
        raise Rejected("bad_header", f"{header.path}: signal {cell}")
    offset, length = header.record_bytes, samples * header.sample_bytes
    header.record_bytes += length
    if annotation:
        header.annotations.append((offset, length))
        return
    rate_hz = samples / header.record_s if header.record_s > 0 else math.nan
    signal = Signal(cell["label"], cell["dimension"], rate_hz, samples, offset, *ranges, UNITS.get(cell["dimension"]))
    if ranges[0] != ranges[1] and ranges[2] != ranges[3]:
        largest = abs(signal.gain) * 2 ** (8 * header.sample_bytes - 1) + abs(signal.bias)
        signal.usable = signal.gain != 0 and largest * (signal.to_uv or 1) < 1e30  # what float32 can hold
    header.signals.append(signal)


def _cells(data: bytes, widths: dict[str, int], count: int = 1) -> dict[str, list[str]]:
    """Fields of fixed width, `count` values each, as stripped text; latin-1 never fails, and nothing after a NUL counts."""
    text, columns, at = data.decode("latin-1"), {}, 0
    for name, width in widths.items():
        columns[name] = [text[at + i * width :][:width].split("\0")[0].strip() for i in range(count)]
        at += count * width
    return columns


def parse_number(text: str) -> float:
    """A number with decimal point or comma; NaN where it is none."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def parse_integer(text: str) -> int | None:
    """A whole number, or None."""
    value = parse_number(text)
    return int(value) if value.is_integer() else None


def _start(date: str, time: str) -> datetime | None:
    """When a recording began, or None: dates are often wrong (00.00.00, 75 seconds), and nothing depends on them."""
    try:
        (day, month, year), (hour, minute, second) = (map(int, date.split(".")), map(int, time.split(".")))
        return datetime(year + (1900 if year >= 85 else 2000), month, day, hour, minute, second)
    except ValueError:
        return None


def format_header(
    labels, dimension, scale_C, samples, tal_samples, reserved, records, record_s, start, patient
) -> bytes:
    """
    The header of an EDF+ file of signals from -scale to scale, each of `samples` per record, and one of annotations.

    Raises ValueError where a value doesn't fit its field.
    """
    when = f"{start.day:02}-{MONTHS[start.month - 1]}-{start.year}" if start else "X"
    clock = start or datetime(1985, 1, 1)
    count = len(labels) + 1
    fixed = {"version": 0, "patient": patient, "recording": f"Startdate {when} X X X"}
    fixed |= {"date": f"{clock:%d.%m.%y}", "time": f"{clock:%H.%M.%S}", "header_bytes": 256 * (count + 1)}
    fixed |= {"reserved": reserved, "records": records, "record_s": f"{record_s:.8g}", "signals": count}
    columns = {"label": [*labels, ANNOTATIONS[0]], "dimension": [dimension] * len(labels) + [""]}
    columns |= {"physical_min": [f"-{scale}" for scale in scale_C] + ["-1"], "physical_max": [*scale_C, "1"]}
    # symmetric, so that 0 µV is the digit 0
    columns |= {"digital_min": ["-32767"] * len(labels) + ["-32768"], "digital_max": ["32767"] * count}
    columns |= {"samples": [samples] * len(labels) + [tal_samples]}

    cells = [(name, width, fixed[name]) for name, width in FIXED.items()]
    cells += [(name, width, v) for name, width in PER_SIGNAL.items() for v in columns.get(name, [""] * count)]
    for name, width, value in cells:
        if len(str(value)) > width or not str(value).isprintable():
            raise ValueError(f"{name} {value!r} doesn't fit a header field of {width} characters")
    return "".join(str(value).ljust(width) for _, width, value in cells).encode("latin-1")


def round_up(value: float) -> str:
    """The smallest number not below `value` that leaves room for a minus sign in eight characters."""
    decimals = max(0, 8 - 2 - len(str(int(value))))
    return f"{math.ceil(value * 10**decimals) / 10**decimals:.{decimals}f}"
