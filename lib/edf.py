"""
EDF, EDF+C, EDF+D and BDF files with numpy alone: header triage before any datum is touched, wanted signals in µV, annotations, and a writer.

A header is believed only where the file agrees with it: sizes are checked before anything is allocated, and what doesn't fit
raises Rejected(code, reason) with one of: unreadable, empty, annex_pointer, not_edf, bad_header, no_signals, record_duration,
no_data, line_endings, size_mismatch, record_onsets, and from read_signals also missing_channel and unit.

Formats: Kemp et al. 1992 (EDF), Kemp & Olivan 2003 (EDF+), biosemi.com/faq/file_format.htm (BDF).

C channels, T samples, R records, N samples per record, B bytes per record.
"""

import math
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from lib.errors import Rejected

# Factors to µV. Headers are read as latin-1, so a UTF-8 micro sign (C2 B5) or Greek mu (CE BC) arrives as two characters.
MICRO = ("u", "U", "\u00b5", "\u03bc", "\u00c2\u00b5", "\u00ce\u00bc", "micro")
UNITS = {prefix + volt: 1.0 for prefix in MICRO for volt in ("V", "v", "volt", "volts", "Volt", "Volts")}
UNITS |= {"V": 1e6, "v": 1e6, "volt": 1e6, "Volt": 1e6, "mV": 1e3, "mv": 1e3, "nV": 1e-3, "nv": 1e-3}
GUESS_SD_UV = (1, 500)  # a signal without a known unit is taken as µV only where its standard deviation is EEG's

FIXED = (8, 80, 80, 8, 8, 8, 44, 8, 8, 4)  # version, patient, recording, date, time, header bytes, reserved, records, record_s, signals
PER_SIGNAL = {"label": 16, "transducer": 80, "dimension": 8, "physical_min": 8, "physical_max": 8}
PER_SIGNAL |= {"digital_min": 8, "digital_max": 8, "prefilter": 80, "samples": 8, "reserved": 32}
ANNOTATIONS = ("EDF Annotations", "BDF Annotations")
MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()
BLOCK_BYTES = 4 << 20  # read at a time: small enough for the processor's cache, large enough for a disk
PAD = 4  # bytes before a block, so that the first 24-bit sample can be read as the upper part of 32 bits


@dataclass
class Signal:
    """One signal of a file; `offset` is bytes from the start of a record, `to_uv` None where the unit isn't a known voltage."""

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
    usable: bool  # False: its scale can't be computed (minimum equals maximum), so to the builder the channel is missing

    @property
    def gain(self) -> float:
        return (self.physical_max - self.physical_min) / (self.digital_max - self.digital_min)

    @property
    def bias(self) -> float:
        return self.physical_min - self.digital_min * self.gain


@dataclass
class Header:
    """What a file holds; `annotations` are (offset, length) in bytes within a record, and read calls append to `notes`."""

    path: Path
    format: str  # edf | bdf
    signals: list[Signal]  # without annotation signals
    records: int  # whole records that are there and trusted
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


def read_header(path: Path) -> Header:
    """The header of an EDF or BDF file, checked against the file's size. Raises Rejected."""
    path = Path(path)
    try:
        if not path.is_file():
            raise _no_file(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            fixed = file.read(256)
            header = _parse_header(path, fixed, file, size)
            stated = _integer(_split(fixed, FIXED)[7])
            header.records = _trusted_records(header, stated, size)
    except OSError as error:
        raise Rejected("unreadable", f"{path}: {error.strerror or error}") from error
    return header


def read_signals(header: Header, indices, volts: bool = True) -> np.ndarray:
    """
    The signals `indices`, all of one rate, as x_CT float32 in µV.

    A unit that isn't in UNITS is taken as µV only where the median standard deviation is EEG's. `volts=False` returns any signal
    (Status, SpO2 …) in its own unit. Raises Rejected: `unit`, `missing_channel`, `size_mismatch`.
    """
    signals = [header.signals[i] for i in indices]
    assert signals and len({s.samples_per_record for s in signals}) == 1, [(s.label, s.rate_hz) for s in signals]
    for signal in signals:
        if not signal.usable:
            raise Rejected("missing_channel", f"{signal.label}: minimum equals maximum, so it has no scale")

    x_CRN = np.empty((len(signals), header.records, signals[0].samples_per_record), np.float32)
    scales = [(signal.to_uv or 1.0) if volts else 1.0 for signal in signals]
    for first, block in _blocks(header, 0, header.records):
        for x_RN, signal, scale in zip(x_CRN[:, first:], signals, scales):
            digital_RN = _digital(header, block, signal)
            part_RN = x_RN[: len(digital_RN)]
            part_RN[...] = digital_RN
            part_RN *= np.float32(signal.gain * scale)
            part_RN += np.float32(signal.bias * scale)
    x_CT = x_CRN.reshape(len(signals), -1)
    if volts:
        _check_guessed_units(header, signals, x_CT)
    return x_CT


def read_annotations(header: Header) -> tuple[list[tuple[int, int, float]], list[tuple[float, float, str]]]:
    """
    Segments (first record, stop record, onset_s) between gaps, and events (onset_s, duration_s, text) sorted by onset.

    Seconds count from the first sample. Events are clipped to the recording; those wholly outside are dropped with a note.
    Raises Rejected: `record_onsets` (an EDF+D whose records don't say when they start).
    """
    onset_R, events, unread = _read_tals(header)
    start_s = float(onset_R[0]) if np.isfinite(onset_R[0]) else 0.0
    if header.continuous:
        segments = [(0, header.records, 0.0)]
    else:
        if not (np.isfinite(onset_R).all() and (np.diff(onset_R) > 0).all()):
            raise Rejected("record_onsets", f"{header.path}: EDF+D, but its records don't say in order when they start")
        # onsets are rounded decimals: a gap is what exceeds their rounding and one sample
        tolerance_s = max([1e-3] + [1 / s.rate_hz for s in header.signals if s.rate_hz > 10])
        step_R = np.diff(onset_R)
        if (step_R < header.record_s - tolerance_s).any():
            raise Rejected("record_onsets", f"{header.path}: EDF+D whose records overlap in time")
        edges = [0, *(np.flatnonzero(step_R > header.record_s + tolerance_s) + 1).tolist(), header.records]
        segments = [(a, b, float(onset_R[a]) - start_s) for a, b in zip(edges, edges[1:])]

    first, stop, onset_s = segments[-1]
    end_s = onset_s + (stop - first) * header.record_s
    kept, clipped = [], 0
    for onset, duration, text in events:
        a, b = max(onset - start_s, 0.0), min(onset - start_s + duration, end_s)
        if b >= a and a < end_s:
            kept.append((a, b - a, text) if b - a < duration - 1e-9 else (a, duration, text))
            clipped += b - a < duration - 1e-9
    outside = len(events) - len(kept)
    counts = {"label_out_of_range": outside, "label_clipped": clipped, "label_unreadable": unread}
    _note(header, *(f"{name} {count}" for name, count in counts.items() if count))
    return segments, sorted(kept, key=lambda event: event[0])


def write_edf(
    path: Path,
    x_CT_uv: np.ndarray,
    rate_hz: float,
    names: list[str],
    events=(),
    dimension: str = "uV",
    start: datetime | None = None,
    record_s: float = 1,
    patient: str = "X X X X",
    record_onsets_s=None,
    physical_uv=None,
) -> None:
    """
    Write x_CT (µV) as EDF+C, or as EDF+D where `record_onsets_s` gives the start of every record; same input, same bytes.

    `events` are (onset_s, duration_s, text). `physical_uv` is the full scale (µV, one number or one per channel), by default
    the largest value; what exceeds it saturates. Raises ValueError where something doesn't fit the format.
    """
    samples = round(rate_hz * record_s)
    channels, total = x_CT_uv.shape
    if channels != len(names) or not samples or abs(samples - rate_hz * record_s) > 1e-6 or total % samples or not total:
        raise ValueError(f"{channels} channels and {total} samples don't fill records of {rate_hz} Hz x {record_s} s for {len(names)} names")
    records = total // samples
    factor = UNITS.get(dimension, 1.0)
    peak_C = np.abs(x_CT_uv).max(axis=1) if physical_uv is None else np.broadcast_to(physical_uv, channels)
    scale_C = [_round_up(max(float(p), 1e-3) / factor) for p in peak_C]

    onsets_s = [r * record_s for r in range(records)] if record_onsets_s is None else list(record_onsets_s)
    if len(onsets_s) != records:
        raise ValueError(f"{len(onsets_s)} record onsets for {records} records")
    tals = [f"{_seconds(onset)}\x14\x14\0".encode() for onset in onsets_s]
    for onset, duration, text in events:
        record = max(int(np.searchsorted(onsets_s, onset, side="right")) - 1, 0)
        tals[record] += f"{_seconds(onset)}{chr(21) + _seconds(duration)[1:] if duration else ''}\x14{text}\x14\0".encode()
    width = -(-max(map(len, tals)) // 2)  # in samples of two bytes

    header = [  # one row per header field: a value per signal, the annotations last
        [*names, ANNOTATIONS[0]],
        [""] * (channels + 1),
        [dimension] * channels + [""],
        [f"-{s}" for s in scale_C] + ["-1"],
        [*scale_C, "1"],
        ["-32767"] * channels + ["-32768"],  # symmetric, so that 0 µV is the digit 0
        ["32767"] * (channels + 1),
        [""] * (channels + 1),
        [samples] * channels + [width],
        [""] * (channels + 1),
    ]
    when = f"{start.day:02}-{MONTHS[start.month - 1]}-{start.year}" if start else "X"
    clock = start or datetime(1985, 1, 1)
    fixed = ["0", patient, f"Startdate {when} X X X", f"{clock:%d.%m.%y}", f"{clock:%H.%M.%S}", 256 * (channels + 2)]
    fixed += ["EDF+C" if record_onsets_s is None else "EDF+D", records, f"{record_s:.8g}", channels + 1]
    cells = list(zip(fixed, FIXED)) + [(v, w) for row, w in zip(header, PER_SIGNAL.values()) for v in row]

    data_RS = np.zeros((records, channels * samples + width), "<i2")
    for c, (x_T, scale) in enumerate(zip(x_CT_uv, scale_C)):
        digital_T = np.clip(np.rint(x_T * (32767 / (float(scale) * factor))), -32767, 32767)
        data_RS[:, c * samples : (c + 1) * samples] = digital_T.reshape(records, samples)
    data_RS[:, channels * samples :] = np.frombuffer(b"".join(t.ljust(2 * width, b"\0") for t in tals), "<i2").reshape(records, width)
    with open(path, "wb") as file:
        file.write(b"".join(_cell(value, width) for value, width in cells))
        file.write(data_RS.data)


# ---- header


def _no_file(path: Path) -> Rejected:
    target = os.readlink(path) if path.is_symlink() else ""
    if "annex/objects/" in Path(target).as_posix():
        return Rejected("annex_pointer", f"{path}: a git-annex link whose content was not fetched (datalad get)")
    return Rejected("unreadable", f"{path}: {'dangling link' if target else 'no such file'}")


def _split(data: bytes, widths) -> list[str]:
    """Fixed-width fields as stripped text; latin-1 never fails, and nothing after a NUL counts."""
    edges = np.cumsum([0, *widths]).tolist()
    return [data[a:b].decode("latin-1").split("\0")[0].strip() for a, b in zip(edges, edges[1:])]


def _number(text: str) -> float:
    """A header number, with decimal point or comma; NaN where it is none."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _integer(text: str) -> int | None:
    value = _number(text)
    return int(value) if value == value and value == int(value) else None


def _start(date: str, time: str) -> datetime | None:
    """When a recording began, or None: dates are often wrong (00.00.00, 75 seconds), and nothing depends on them."""
    try:
        (day, month, year), (hour, minute, second) = (map(int, date.split(".")), map(int, time.split(".")))
        return datetime(year + (1900 if year >= 85 else 2000), month, day, hour, minute, second)
    except ValueError:
        return None


def _parse_header(path: Path, fixed: bytes, file, size: int) -> Header:
    """Everything the header says, consistent in itself; `records` is still to be found out."""
    if size == 0:
        raise Rejected("empty", f"{path}: zero bytes")
    if b"annex/objects/" in fixed or fixed.startswith(b"version https://git-lfs"):
        raise Rejected("annex_pointer", f"{path}: a pointer whose content was not fetched (datalad get, git lfs pull)")
    _, _, _, date, time, header_bytes, reserved, records, record_s, count = _split(fixed, FIXED)
    format = "bdf" if fixed.startswith(b"\xffBIOSEMI") else "edf"
    known = format == "bdf" or fixed[:8].strip() == b"0"
    numbers = {"header bytes": _integer(header_bytes), "records": _integer(records), "signals": _integer(count)}
    if len(fixed) < 256 or not known and None in numbers.values():
        raise Rejected("not_edf", f"{path}: {size} bytes that don't start with an EDF header")
    header_bytes, stated, count = numbers.values()
    if None in numbers.values() or count < 0 or header_bytes != 256 * (count + 1) or stated < -1:
        raise Rejected("bad_header", f"{path}: {numbers} (header bytes must be 256 x (signals + 1))")
    if size < header_bytes:
        raise Rejected("not_edf", f"{path}: {size} bytes, cut inside its header of {header_bytes}")

    cells = _split(file.read(header_bytes - 256), [width for width in PER_SIGNAL.values() for _ in range(count)])
    columns = {name: cells[i * count : (i + 1) * count] for i, name in enumerate(PER_SIGNAL)}
    header = Header(path, format, [], 0, _number(record_s), reserved[3:5] != "+D", _start(date, time), header_bytes, 0, [])
    for i in range(count):
        _add_signal(header, {name: column[i] for name, column in columns.items()})
    if not header.signals:
        raise Rejected("no_signals", f"{path}: only annotations")
    if not (header.record_s > 0 and all(s.rate_hz < 1e7 for s in header.signals)):
        raise Rejected("record_duration", f"{path}: records of {record_s!r} seconds")

    unusable = [s.label for s in header.signals if not s.usable]
    inverted = [s.label for s in header.signals if s.usable and s.gain < 0]
    _note(header, *(f"{word} {', '.join(labels)}" for word, labels in (("unusable", unusable), ("inverted", inverted)) if labels))
    return header


def _add_signal(header: Header, cell: dict[str, str]) -> None:
    """Append one signal, or annotation area, to the header."""
    samples = _integer(cell["samples"])
    if samples is None or samples < 0:
        raise Rejected("bad_header", f"{header.path}: {cell['label']!r} has {cell['samples']!r} samples per record")
    offset, length = header.record_bytes, samples * header.sample_bytes
    header.record_bytes += length
    if cell["label"] in ANNOTATIONS:
        header.annotations.append((offset, length))
        return
    ranges = [_number(cell[name]) for name in ("physical_min", "physical_max", "digital_min", "digital_max")]
    if any(map(math.isnan, ranges)):
        texts = [cell[name] for name in ("physical_min", "physical_max", "digital_min", "digital_max")]
        raise Rejected("bad_header", f"{header.path}: {cell['label']!r} has the range {texts}")
    rate_hz = samples / header.record_s if header.record_s > 0 else math.nan
    signal = Signal(cell["label"], cell["dimension"], rate_hz, samples, offset, *ranges, UNITS.get(cell["dimension"]), False)
    if samples and ranges[0] != ranges[1] and ranges[2] != ranges[3]:
        largest = abs(signal.gain) * 2 ** (8 * header.sample_bytes - 1) + abs(signal.bias)
        signal.usable = signal.gain != 0 and largest * (signal.to_uv or 1) < 1e30  # what float32 can hold
    header.signals.append(signal)


# ---- size against header


def _trusted_records(header: Header, stated: int, size: int) -> int:
    """
    How many whole records to use. Raises Rejected: `no_data`, `line_endings`, `size_mismatch`.

    Too few bytes, or a count of -1: the whole records that are there. Too many: the stated ones, if what follows is records too; else
    the file was altered, and nobody knows where.
    """
    data_bytes = size - header.header_bytes
    whole, rest = divmod(data_bytes, header.record_bytes) if header.record_bytes else (0, data_bytes)
    found = f"{header.path}: {stated} records of {header.record_bytes} bytes stated, {data_bytes} bytes there"
    if not min(whole, stated % (whole + 1) if stated < 0 else stated):
        raise Rejected("no_data", found)
    if (whole, rest) == (stated, 0):
        return stated
    if _line_endings_converted(header):
        raise Rejected("line_endings", f"{found}, and a 0D before every 0A: mangled by a line-ending conversion")
    if stated < 0 or stated > whole:
        if _shifted(header, whole):
            raise Rejected("size_mismatch", f"{found}, and bytes are missing from its midst")
        _note(header, "truncated")
        return whole
    if rest or not _continues(header, stated, whole):
        raise Rejected("size_mismatch", f"{found}; what follows the data is no record")
    _note(header, f"records_ignored {whole - stated}")
    return stated


def _line_endings_converted(header: Header) -> bool:
    """Whether every 0A of the data has a 0D before it."""
    feeds = pairs = 0
    with open(header.path, "rb") as file:
        file.seek(header.header_bytes)
        last = b""
        while block := file.read(BLOCK_BYTES):
            feeds += block.count(b"\n")
            pairs += block.count(b"\r\n") + (last == b"\r" and block[:1] == b"\n")
            last = block[-1:]
            if feeds - pairs > 2:
                return False
    return feeds == pairs and feeds > 2


def _shifted(header: Header, records: int) -> bool:
    """Whether some records read much smoother a byte or two later: bytes before them were lost (0D 0A made 0A, say)."""
    for record in np.unique(np.linspace(0, records - 1, 32).astype(int)).tolist():
        (_, block), *_ = _blocks(header, record, record + 1)
        roughness = [_roughness(header, block, shift) for shift in range(header.sample_bytes)]
        if min(roughness[1:]) * 8 < roughness[0]:
            return True
    return False


def _continues(header: Header, first: int, stop: int) -> bool:
    """Whether the records from `first` are of one kind with those before: by their time stamps or, without any, by amplitude."""
    if header.annotations:
        onset_R, _, _ = _read_tals(header, stop)
        return bool(np.isfinite(onset_R).all() and (np.diff(onset_R) > 0).all())
    before, after = (_roughness(header, next(_blocks(header, r, stop))[1]) for r in (0, first))
    last = _roughness(header, next(_blocks(header, stop - 1, stop))[1])
    return before / 8 < after < before * 8 and before / 8 < last < before * 8


def _roughness(header: Header, block: np.ndarray, shift: int = 0) -> float:
    """The median over signals of the mean step from sample to sample, read `shift` bytes late."""
    steps = [np.abs(np.diff(_digital(header, block, s, shift)[:, :-1])).mean() for s in header.signals if s.samples_per_record > 2]
    return float(np.median(steps)) if steps else 0.0


# ---- data


def _blocks(header: Header, first: int, stop: int):
    """Yield (record, bytes) for blocks of whole records; the bytes have PAD in front and are overwritten by the next block."""
    per_block = min(max(1, BLOCK_BYTES // header.record_bytes), stop - first)
    buffer = np.zeros(PAD + per_block * header.record_bytes, np.uint8)
    try:
        with open(header.path, "rb", buffering=0) as file:
            file.seek(header.header_bytes + first * header.record_bytes)
            for record in range(first, stop, per_block):
                block = buffer[: PAD + min(per_block, stop - record) * header.record_bytes]
                if file.readinto(block[PAD:]) != len(block) - PAD:
                    raise Rejected("size_mismatch", f"{header.path}: the file got shorter while it was read")
                yield record, block
    except OSError as error:
        raise Rejected("unreadable", f"{header.path}: {error.strerror or error}") from error


def _digital(header: Header, block: np.ndarray, signal: Signal, shift: int = 0) -> np.ndarray:
    """The digits of one signal in a block, (R, N): a view for 16 bits; for 24 bits the upper three bytes of an overlapping int32."""
    shape = ((len(block) - PAD) // header.record_bytes, signal.samples_per_record)
    at = PAD + signal.offset + shift
    if header.format == "edf":
        return np.ndarray(shape, "<i2", block, at, (header.record_bytes, 2))
    return np.ndarray(shape, "<i4", block, at - 1, (header.record_bytes, 3)) >> 8


def _check_guessed_units(header: Header, signals: list[Signal], x_CT: np.ndarray) -> None:
    """Accept signals without a known unit as µV where their spread is that of EEG. Raises Rejected: `unit`."""
    doubtful = [c for c, signal in enumerate(signals) if signal.to_uv is None]
    if not doubtful:
        return
    spread_uv = float(np.median([x_CT[c].std(dtype=np.float64) for c in doubtful]))
    found = ", ".join(sorted({repr(signals[c].dimension) for c in doubtful}))
    if not GUESS_SD_UV[0] <= spread_uv <= GUESS_SD_UV[1]:
        raise Rejected("unit", f"{header.path}: unit {found} is unknown, and a deviation of {spread_uv:.3g} is not EEG in microvolts")
    _note(header, f"unit_guessed uV for {found}")


def _note(header: Header, *notes: str) -> None:
    header.notes.extend(note for note in notes if note not in header.notes)


# ---- annotations


def _read_tals(header: Header, records: int = 0) -> tuple[np.ndarray, list[tuple[float, float, str]], int]:
    """Stated onset of every record (NaN where none), events, and the count of annotations that can't be read (time-stamped lists, EDF+ 2.2.2)."""
    records = records or header.records
    onset_R = np.full(records, np.nan)
    events, unread = [], 0
    for first, block in _blocks(header, 0, records) if header.annotations else ():
        block_RB = block[PAD:].reshape(-1, header.record_bytes)
        for number, (offset, length) in enumerate(header.annotations):
            area = block_RB[:, offset : offset + length].tobytes()
            for r in range(len(block_RB)):
                tals = area[r * length : (r + 1) * length].rstrip(b"\0")
                for position, tal in enumerate(filter(None, tals.split(b"\0"))):
                    stamp, *texts = tal.split(b"\x14")
                    onset, _, duration = stamp.partition(b"\x15")
                    onset_s, duration_s = _number(onset.decode("latin-1")), _number(duration.decode("latin-1") or "0")
                    if not texts or math.isnan(onset_s) or not duration_s >= 0:
                        unread += 1
                        continue
                    if number == position == 0 and not texts[0]:
                        onset_R[first + r] = onset_s
                    events.extend((onset_s, duration_s, text) for text in map(_text, texts) if text)
    return onset_R, events, unread


def _text(data: bytes) -> str:
    """Annotation text: UTF-8 as the format wants it, else latin-1 as older writers did it."""
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return data.decode("latin-1").strip()


# ---- writing


def _cell(value, width: int) -> bytes:
    data = str(value).encode("latin-1")
    if len(data) > width:
        raise ValueError(f"{value!r} doesn't fit a header field of {width} characters")
    return data.ljust(width)


def _round_up(value: float) -> str:
    """The smallest number not below `value` that leaves room for a minus sign in eight characters."""
    decimals = max(0, 8 - 2 - len(str(int(value))))
    return f"{math.ceil(value * 10**decimals) / 10**decimals:.{decimals}f}"


def _seconds(value: float) -> str:
    return f"{value:+.6f}".rstrip("0").rstrip(".")
