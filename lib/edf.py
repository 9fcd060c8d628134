"""
EDF, EDF+C, EDF+D and BDF with numpy alone: triage before any datum is touched, wanted signals in µV, annotations, a writer.

A header (lib/edf_header.py) is believed only where the file agrees with it: sizes are compared before anything is allocated.
Codes of Rejected that are raised here: unreadable, no_data, line_endings, size_mismatch, record_onsets, missing_channel, unit.

C channels, T samples, R records, N samples per record, B bytes per record.
"""

import math
import os
from datetime import datetime
from pathlib import Path

import numpy as np

from kernels import pack
from lib.edf_header import UNITS, Header, Signal, format_header, parse_header, round_up
from lib.errors import Rejected

GUESS_SD_UV = (1, 500)  # a signal without a known unit is taken as µV only where its standard deviation is EEG's
BLOCK_BYTES = 4 << 20  # read at a time: small enough for the processor's cache, large enough for a disk
PAD = 4  # bytes before a block, so that the first 24-bit sample can be read as the upper part of 32 bits


def read_header(path: Path) -> Header:
    """The header of an EDF or BDF file, checked against the file's size. Raises Rejected."""
    path = Path(path)
    try:
        if not path.is_file():
            target = Path(os.readlink(path)).as_posix() if path.is_symlink() else ""
            code = "annex_pointer" if "annex/objects/" in target else "unreadable"
            raise Rejected(code, f"{path}: {f'its content, {target}, is not there' if target else 'no such file'}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = parse_header(path, file, size)
    except OSError as error:
        raise Rejected("unreadable", f"{path}: {error.strerror or error}") from error
    header.records = _trusted_records(header, size)
    return header


def read_signals(header: Header, indices, volts: bool = True) -> np.ndarray:
    """
    The signals `indices`, all of one rate, as x_CT float32 in µV.

    A unit that isn't in UNITS is taken as µV only where the median standard deviation is EEG's. `volts=False` returns any
    signal (Status, SpO2 …) in its own unit. Raises Rejected: `unit`, `missing_channel`, `size_mismatch`, `unreadable`.
    """
    signals = [header.signals[i] for i in indices]
    assert len({s.samples_per_record for s in signals}) == 1, [(s.label, s.rate_hz) for s in signals]
    if unusable := [s.label for s in signals if not s.usable]:
        raise Rejected("missing_channel", f"{header.path}: minimum equals maximum, so no scale: {', '.join(unusable)}")

    x_CRN = np.empty((len(signals), header.records, signals[0].samples_per_record), np.float32)
    scale_C = [(signal.to_uv or 1) if volts else 1 for signal in signals]
    gain_C = [signal.gain * scale for signal, scale in zip(signals, scale_C, strict=True)]
    bias_C = [signal.bias * scale for signal, scale in zip(signals, scale_C, strict=True)]
    offset_C = [PAD + signal.offset for signal in signals]
    for first, block in _blocks(header, 0, header.records):
        part_CRN = x_CRN[:, first : first + (len(block) - PAD) // header.record_bytes]
        pack.decode(block, header.record_bytes, header.sample_bytes, offset_C, gain_C, bias_C, part_CRN)
    x_CT = x_CRN.reshape(len(signals), -1)

    doubtful = [c for c, signal in enumerate(signals) if volts and signal.to_uv is None]
    if doubtful:
        spread_uv = float(np.median([x_CT[c].std(dtype=np.float64) for c in doubtful]))
        units = ", ".join(sorted({repr(signals[c].dimension) for c in doubtful}))
        if not GUESS_SD_UV[0] <= spread_uv <= GUESS_SD_UV[1]:
            reason = f"{header.path}: unknown unit {units}, and a deviation of {spread_uv:.3g} is not EEG in microvolts"
            raise Rejected("unit", f"{reason}: state the unit in dataset.toml")
        header.note(f"unit_guessed uV for {units}")
    return x_CT


def read_annotations(header: Header) -> tuple[list[tuple[int, int, float]], list[tuple[float, float, str]]]:
    """
    Segments (first record, stop record, onset_s) between gaps, and events (onset_s, duration_s, text) sorted by onset.

    Seconds count from the first sample. Events are clipped to the recording; those wholly outside are dropped with a note.
    Raises Rejected: `record_onsets` (an EDF+D whose records don't say when they start).
    """
    onset_R, events, unread = _read_tals(header, header.records, sparse=header.continuous)
    start_s = float(onset_R[0]) if np.isfinite(onset_R[0]) else 0.0  # EDF+ allows a fraction of a second
    edges = [0, header.records]
    if not header.continuous:
        # onsets are rounded decimals: a gap is what exceeds their rounding and one sample
        tolerance_s = max(1e-3, 1 / max(s.rate_hz for s in header.signals))
        step_R = np.diff(onset_R)
        if not np.isfinite(onset_R).all() or (step_R < header.record_s - tolerance_s).any():
            raise Rejected("record_onsets", f"{header.path}: EDF+D whose records don't say, in order, when they start")
        edges[1:1] = (np.flatnonzero(step_R > header.record_s + tolerance_s) + 1).tolist()
    starts_s = [0.0] + [float(onset_R[a]) - start_s for a in edges[1:-1]]
    segments = list(zip(edges[:-1], edges[1:], starts_s, strict=True))

    end_s = starts_s[-1] + (edges[-1] - edges[-2]) * header.record_s
    kept, clipped, outside = [], 0, 0
    for onset_s, duration_s, text in events:
        onset_s -= start_s
        stop_s = onset_s + duration_s
        if onset_s >= end_s or (onset_s < 0 and stop_s <= 0):
            outside += 1
            continue
        if onset_s < 0 or stop_s > end_s + 1e-6:
            clipped += 1
            onset_s = max(onset_s, 0.0)
            duration_s = min(stop_s, end_s) - onset_s
        kept.append((onset_s, duration_s, text))
    for name, count in (("label_out_of_range", outside), ("label_clipped", clipped), ("label_unreadable", unread)):
        if count:
            header.note(f"{name} {count}")
    return segments, sorted(kept, key=lambda event: event[0])


def holds_only_annotations(path: Path) -> bool:
    """Whether a file is an EDF+ or BDF+ of annotations about another recording, such as a hypnogram."""
    try:
        with open(path, "rb") as file:
            return not parse_header(path, file, os.fstat(file.fileno()).st_size, annotations_only=True).signals
    except (OSError, Rejected):
        return False


def read_annotation_file(path: Path, recording: Path) -> list[tuple[float, float, str]]:
    """
    Events (onset_s, duration_s, text) of an EDF+ of annotations, sorted, in seconds from the start that the header of `recording` states.

    Without a date in either header both start together. Raises Rejected: `labels_unreadable`.
    """
    starts = []
    try:
        for file_path in (path, recording):
            with open(file_path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = parse_header(file_path, file, size, annotations_only=True)
            starts.append(header.start)
            if file_path is path:
                _, events, unread = _read_tals(header, max(0, size - header.header_bytes) // header.record_bytes)
    except (OSError, Rejected) as error:
        raise Rejected("labels_unreadable", f"{path.name}: {error}") from error
    if unread:
        raise Rejected("labels_unreadable", f"{path.name}: {unread} annotations can't be read")
    later_s = (starts[0] - starts[1]).total_seconds() if all(starts) else 0.0
    return sorted(((onset + later_s, duration, text) for onset, duration, text in events), key=lambda e: e[0])


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

    `events` are (onset_s, duration_s, text). `physical_uv` is the full scale (µV, one number or one per channel), by
    default the largest value; what exceeds it saturates. Raises ValueError where something doesn't fit the format.
    """
    samples = round(rate_hz * record_s)
    channels, total = x_CT_uv.shape
    records = total // max(samples, 1)
    onsets_s = [r * record_s for r in range(records)] if record_onsets_s is None else list(record_onsets_s)
    whole = records > 0 and records * samples == total and abs(samples - rate_hz * record_s) < 1e-6
    if not whole or (channels, records) != (len(names), len(onsets_s)):
        shape = f"{len(names)} names and {len(onsets_s)} records of {rate_hz} Hz x {record_s} s"
        raise ValueError(f"{channels} channels of {total} samples don't make {shape}")
    if not np.isfinite(x_CT_uv).all() or any(mark in text for _, _, text in events for mark in "\x14\x15\0"):
        raise ValueError("EDF holds finite numbers, and annotations without control characters")
    factor = UNITS.get(dimension, 1.0)
    peak_C = np.abs(x_CT_uv).max(axis=1) if physical_uv is None else np.broadcast_to(physical_uv, channels)
    scale_C = [round_up(max(float(peak), 1e-3) / factor) for peak in peak_C]

    tals = [f"{_seconds(onset)}\x14\x14\0".encode() for onset in onsets_s]
    for onset, duration, text in events:
        record = max(int(np.searchsorted(onsets_s, onset, side="right")) - 1, 0)
        length = f"\x15{_seconds(duration)[1:]}" if duration else ""
        tals[record] += f"{_seconds(onset)}{length}\x14{text}\x14\0".encode()
    width = -(-max(map(len, tals)) // 2)  # in samples of two bytes
    tal_bytes = b"".join(tal.ljust(2 * width, b"\0") for tal in tals)

    data_RS = np.empty((records, channels * samples + width), "<i2")
    data_RS[:, channels * samples :] = np.frombuffer(tal_bytes, "<i2").reshape(records, width)
    for c, scale in enumerate(scale_C):
        digital_T = np.clip(np.rint(x_CT_uv[c] * (32767 / (float(scale) * factor))), -32767, 32767)
        data_RS[:, c * samples : (c + 1) * samples] = digital_T.reshape(records, samples)

    reserved = "EDF+C" if record_onsets_s is None else "EDF+D"
    header = format_header(names, dimension, scale_C, samples, width, reserved, records, record_s, start, patient)
    with open(path, "wb") as file:
        file.write(header)
        file.write(data_RS.data)


def _seconds(value: float) -> str:
    return f"{value:+.6f}".rstrip("0").rstrip(".")


def _trusted_records(header: Header, size: int) -> int:
    """
    How many whole records to use. Raises Rejected: `no_data`, `line_endings`, `size_mismatch`.

    Fewer bytes than stated, or a count of -1: the whole records that are there. More: the stated records, if more of the same
    kind follow; otherwise the file was altered, and nobody knows where.
    """
    stated, data_bytes = header.records, size - header.header_bytes
    whole, rest = divmod(data_bytes, header.record_bytes)
    found = f"{header.path}: {stated} records of {header.record_bytes} bytes stated, {data_bytes} bytes there"
    if not whole or not stated:
        raise Rejected("no_data", found)
    if (stated, 0) == (whole, rest):
        return stated
    if header.format == "bdf" and data_bytes * 3 == stated * header.record_bytes * 2:
        raise Rejected("size_mismatch", f"{found}: samples of two bytes under the magic of BDF")
    if _line_endings_converted(header, whole):
        raise Rejected("line_endings", f"{found}, and a 0D before every 0A: mangled by a line-ending conversion")
    if stated < 0 or stated > whole:
        if _bytes_lost(header, whole):
            raise Rejected("size_mismatch", f"{found}, and bytes are missing from its midst")
        header.note("truncated")
        return whole
    if rest or not _continues(header, stated, whole):
        raise Rejected("size_mismatch", f"{found}; what follows the data is no record")
    header.note(f"records_ignored {whole - stated}")
    return stated


def _line_endings_converted(header: Header, records: int) -> bool:
    """Whether the data have 0A, and each with a 0D before it."""
    feeds = pairs = 0
    for _, block in _blocks(header, 0, records):
        data = block[PAD - 1 :].tobytes()  # with the last byte of the block before
        feeds += data.count(b"\n", 1)
        pairs += data.count(b"\r\n")
        if feeds > pairs + 2:
            return False
    return feeds == pairs > 2


def _bytes_lost(header: Header, records: int) -> bool:
    """Whether some record reads much smoother a byte or two late: bytes before it were lost (0D 0A made 0A, say)."""
    for record in np.unique(np.linspace(0, records - 1, 16).astype(int)).tolist():
        _, block = next(_blocks(header, record, record + 1))
        steps = [_roughness(header, np.roll(block, -shift)) for shift in range(header.sample_bytes)]
        if min(steps[1:]) * 8 < steps[0]:
            return True
    return False


def _continues(header: Header, first: int, stop: int) -> bool:
    """Whether records from `first` on are of one kind with those before, by time stamps or, without any, by amplitude."""
    if header.annotations:
        onset_R, _, _ = _read_tals(header, stop)
        return bool((np.diff(onset_R[first - 1 :]) > 0).all())
    start, *after = (_roughness(header, next(_blocks(header, r, stop))[1]) for r in (0, first, stop - 1))
    return all(start / 8 < steps < start * 8 for steps in after)


def _roughness(header: Header, block: np.ndarray) -> float:
    """The median over (some) signals of the mean step from sample to sample."""
    signals = [s for s in header.signals if s.samples_per_record > 2][:: max(1, len(header.signals) // 8)]
    digital = (_digital(header, block, s)[:, :-1].astype(np.int64) for s in signals)
    return float(np.median([np.abs(np.diff(d_RN)).mean() for d_RN in digital])) if signals else 0.0


def _blocks(header: Header, first: int, stop: int):
    """Yield (record, bytes) for blocks of whole records; the bytes have PAD in front and are overwritten by the next block."""
    per_block = min(max(1, BLOCK_BYTES // header.record_bytes), stop - first)
    buffer = np.zeros(PAD + per_block * header.record_bytes, np.uint8)
    try:
        with open(header.path, "rb", buffering=0) as file:
            file.seek(header.header_bytes + first * header.record_bytes)
            for record in range(first, stop, per_block):
                buffer[PAD - 1] = buffer[-1]
                block = buffer[: PAD + min(per_block, stop - record) * header.record_bytes]
                if file.readinto(block[PAD:]) != len(block) - PAD:
                    raise Rejected("size_mismatch", f"{header.path}: got shorter while it was read")
                yield record, block
    except OSError as error:
        raise Rejected("unreadable", f"{header.path}: {error.strerror or error}") from error


def _digital(header: Header, block: np.ndarray, signal: Signal) -> np.ndarray:
    """The digits of one signal in a block, (R, N)."""
    records, start = (len(block) - PAD) // header.record_bytes, PAD + signal.offset
    return pack.digits(block, records, header.record_bytes, header.sample_bytes, start, signal.samples_per_record)


def _read_tals(
    header: Header, records: int, sparse: bool = False
) -> tuple[np.ndarray, list[tuple[float, float, str]], int]:
    """
    Stated onset of every record (NaN: none), events, and how many annotation lists can't be read (EDF+ 2.2.2).

    `sparse`: leave out the onsets of records that hold nothing else, most of a continuous file, for speed.
    """
    onset_R = np.full(records, np.nan)
    events, unread = [], 0
    for area, record, data in _annotation_areas(header, records):
        tals = data.rstrip(b"\0")
        if sparse and record and tals.count(b"\x14") == 2 and tals.endswith(b"\x14\x14"):
            continue
        for place, tal in enumerate(tals.split(b"\0")):
            stamp, *texts = tal.split(b"\x14")
            onset, _, duration = stamp.partition(b"\x15")
            try:
                onset_s, duration_s = float(onset), float(duration or 0)
            except ValueError:
                onset_s = duration_s = math.nan
            if not (texts and math.isfinite(onset_s) and 0 <= duration_s < math.inf):
                unread += bool(tal.strip())
                continue
            if area == place == 0 and not texts[0]:
                onset_R[record] = onset_s
            events += [(onset_s, duration_s, _text(text)) for text in texts if text.strip()]
    return onset_R, events, unread


def _annotation_areas(header: Header, records: int):
    """Yield (area, record, bytes) of the annotation signals, reading nothing else."""
    try:
        fd = os.open(header.path, os.O_RDONLY)
        try:
            for record in range(records if header.annotations else 0):
                for area, (offset, length) in enumerate(header.annotations):
                    data = os.pread(fd, length, header.header_bytes + record * header.record_bytes + offset)
                    if len(data) != length:
                        raise Rejected("size_mismatch", f"{header.path}: got shorter while it was read")
                    yield area, record, data
        finally:
            os.close(fd)
    except OSError as error:
        raise Rejected("unreadable", f"{header.path}: {error.strerror or error}") from error


def _text(data: bytes) -> str:
    """Annotation text: UTF-8 as the format wants it, else latin-1 as older writers did it."""
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return data.decode("latin-1").strip()
