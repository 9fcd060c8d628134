"""
BrainVision: what has to be true of header, data and markers before MNE, which doesn't check it, reads them.

A truncated `.eeg` is silently read as far as it goes; here it must be as long as header, markers and BIDS sidecar say. Data and
marker files that the header names by an old name or by a path of another machine are taken from beside the header.
"""

import json
import re
import tempfile
from pathlib import Path, PureWindowsPath

from lib.errors import Rejected
from lib.recordings import ReadSpec, Recording, open_mne

SAMPLE_BYTES = {"INT_16": 2, "UINT_16": 2, "INT_32": 4, "IEEE_FLOAT_32": 4}
NO_MARKERS = "Brain Vision Data Exchange Marker File, Version 1.0\n[Marker Infos]\n"


def open_vhdr(path: Path, spec: ReadSpec) -> Recording:
    """Opens a BrainVision recording. Raises Rejected: `bad_header`, `missing_file`, `no_data`, `truncated`, `size_mismatch`."""
    text = _decoded(path)
    entry = _entries(text)
    data, markers = _found(path, entry)
    if data is None:
        named = entry.get("datafile") or "no data file"
        raise Rejected("missing_file", f"{path.name} names {named}, which is not beside it")
    _check_sizes(path, entry, data, markers)

    with (
        tempfile.TemporaryDirectory() as folder
    ):  # header and markers are read from there, the data stay where they are
        marks = Path(folder) / "markers.vmrk"
        marks.write_bytes(_as_utf8(_decoded(markers) if markers else NO_MARKERS))
        for key, file in (("DataFile", data), ("MarkerFile", marks)):
            line = f"{key}={file.resolve()}".replace("\\", r"\\")
            text = re.sub(rf"(?mi)^{key}[ \t]*=.*$", line, text)
        copy = Path(folder) / "header.vhdr"
        copy.write_bytes(_as_utf8(text))
        recording = open_mne(copy, spec, shown=path)

    if entry.get("markerfile") and markers is None:
        recording.notes.append(f"no markers: {entry['markerfile']} is missing")
    for key, file in (("datafile", data), ("markerfile", markers)):
        if file and entry[key] != file.name:
            recording.notes.append(f"file of another name: the header says {entry[key]}, read {file.name}")
    return recording


def parts(path: Path) -> list[Path]:
    """The data and marker files of a header, those that are there."""
    return [file for file in _found(path, _entries(_decoded(path))) if file]


def _decoded(path: Path) -> str:
    """The text of a file: UTF-8 as the format wants it, else Latin-1, as older recorders wrote it."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _as_utf8(text: str) -> bytes:
    """What MNE reads right whatever the text was written in: Latin-1 can't hold every folder, and comments in it stop MNE."""
    return re.sub(r"(?mi)^Codepage[ \t]*=.*?(\r?)$", r"Codepage=UTF-8\1", text).encode()


def _entries(text: str) -> dict[str, str]:
    """`Key=value` lines by key in lower case; the first of equal keys, since `[Comment]` at the end is free text."""
    lines = re.findall(r"^(\w+)[ \t]*=[ \t]*(.*?)[ \t]*\r?$", text, re.MULTILINE)
    return {key.lower(): value for key, value in reversed(lines)}


def _found(path: Path, entry: dict[str, str]) -> tuple[Path | None, Path | None]:
    """Data and marker file: in the header's own folder, under the name it states or under its own stem; None if there is none."""
    found = []
    for key, ending in (("datafile", ".eeg"), ("markerfile", ".vmrk")):
        bare = PureWindowsPath(entry.get(key, "").replace("$b", path.stem)).name  # understands both kinds of slash
        options = [path.parent / bare, path.with_suffix(ending), path.with_suffix(ending.upper())] if bare else []
        found.append(next((file for file in options if file.is_file()), None))
    return found[0], found[1]


def _check_sizes(path: Path, entry: dict[str, str], data: Path, markers: Path | None) -> None:
    """The data are whole, and as long as everything says that speaks of their length."""
    size = data.stat().st_size
    if size == 0:
        raise Rejected("no_data", f"{data.name} has no bytes")
    sample_bytes = SAMPLE_BYTES.get(entry.get("binaryformat", "").upper())
    if sample_bytes is None:
        return  # ASCII, where MNE parses every number
    try:
        frame = sample_bytes * int(entry["numberofchannels"])
        period_s = float(entry["samplinginterval"].replace(",", ".")) / 1e6
        stated = int(entry.get("datapoints") or 0)
        samples, rest = divmod(size, frame)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise Rejected("bad_header", f"{path.name}: {type(error).__name__} {error}") from error
    if rest or samples < stated:
        raise Rejected("truncated", f"{data.name}: {size} bytes are not {stated or 'whole'} samples of {frame} bytes")
    if stated and samples > stated:
        raise Rejected("size_mismatch", f"{data.name} holds {samples} samples, the header says {stated}")
    if markers:
        positions = re.findall(r"^Mk\d+=[^,]*,[^,]*,(\d+)", _decoded(markers), re.MULTILINE)
        last = max(map(int, positions), default=0)
        if last > samples + 1:  # counted from 1, and a marker may stand at the very end
            raise Rejected("truncated", f"{data.name} holds {samples} samples, but a marker is at sample {last}")
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        duration_s = json.loads(_decoded(sidecar)).get("RecordingDuration")
        if isinstance(duration_s, int | float) and samples * period_s < duration_s - max(1.0, 0.01 * duration_s):
            raise Rejected(
                "truncated", f"{data.name} lasts {samples * period_s:.1f} s, {sidecar.name} says {duration_s:.1f} s"
            )
