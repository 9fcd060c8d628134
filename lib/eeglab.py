"""
EEGLAB `.set` files of both kinds: signal inside, or in an `.fdt` beside it.

Read without MNE, in one pass, because MNE doesn't compare `pnts` with the data that are there, and reads embedded data twice.
"""

import math
from pathlib import Path

import numpy as np
import pymatreader

from lib import channels
from lib.errors import Rejected
from lib.recordings import Event, ReadSpec, Recording, code_label, cut, plausible_positions
from lib.statements import settle_rate, settle_unit

KINDS = {"eeg": "eeg", "ref": "eeg", "eog": "eog", "ecg": "ecg", "ekg": "ecg", "emg": "emg", "trigger": "stim"}
KINDS |= {"stim": "stim", "misc": "misc"}
# right and front from x and y, by where the nose is; EEGLAB's own is +X
NOSE = {"+X": ((0, -1), (1, 0)), "-X": ((0, 1), (-1, 0)), "+Y": ((1, 0), (0, 1)), "-Y": ((-1, 0), (0, -1))}
METRES = ((0.25, 1.0), (2.5, 0.1), (25.0, 0.01), (math.inf, 0.001))  # a mean radius below 0.25 is in m, dm, cm, mm
FIDUCIALS = {"nasion": ("nasion", "nz"), "left": ("left", "lpa", "lhj"), "right": ("right", "rpa", "rhj")}


def open_set(path: Path, spec: ReadSpec) -> Recording:
    """
    Opens an EEGLAB data set; its unit is the microvolt by convention, so another one can only be stated.

    Raises Rejected: `bad_header`, `epoched`, `channels_missing`, `missing_file`, `no_data`, `truncated`, `size_mismatch`.
    """
    content = pymatreader.read_mat(path)
    eeg = content.get("EEG", content)  # newer files hold its fields at the top
    if not isinstance(eeg, dict) or not {"nbchan", "pnts", "srate", "data"} <= eeg.keys():
        raise Rejected("bad_header", f"{path.name} holds no EEG structure")
    count, points = int(eeg["nbchan"]), int(eeg["pnts"])
    if int(eeg.get("trials") or 1) > 1:
        raise Rejected("epoched", f"{path.name} holds {int(eeg['trials'])} epochs, not a continuous recording")
    rate_hz = settle_rate(float(eeg["srate"]), spec.rate_hz, path.name)
    unit, factor = settle_unit(None, spec.unit or "uV", path.name)
    x_CT = _data(path, eeg["data"], count, points)

    chanlocs = _rows(eeg.get("chanlocs"))
    names = [str(row.get("labels", "")) for row in chanlocs] or list(spec.channels or [])
    if not names:
        raise Rejected("channels_missing", f"{path.name} names no channels: state channels in dataset.toml")
    if len(names) != count:
        raise Rejected("bad_header", f"{path.name} holds {count} channels, {len(names)} are named")
    types = [str(row.get("type", "")).strip().lower() for row in chanlocs] or [""] * count
    notes: list[str] = []
    breaks, events = _events(_rows(eeg.get("event")), rate_hz, notes)
    return Recording(
        path=path,
        names=names,
        kinds=[KINDS.get(declared) or channels.kind(name) for name, declared in zip(names, types, strict=True)],
        rates_hz=[rate_hz] * count,
        unit=unit,
        samples=points,
        segments=cut(points, rate_hz, breaks),
        take=lambda indices: np.asarray(x_CT[indices], np.float32) * np.float32(factor),
        events=events,
        positions=plausible_positions(_positions(chanlocs, eeg.get("chaninfo")), notes),
        notes=notes,
    )


def _data(path: Path, data, count: int, points: int) -> np.ndarray:
    """x_CT in microvolts: embedded, or a memory map of the `.fdt`, whose size must be exactly that of the data."""
    if not isinstance(data, str):
        x_CT = np.asarray(data)
        x_CT = x_CT.reshape(1, -1) if x_CT.ndim == 1 and count == 1 else x_CT
        if x_CT.ndim == 3:
            raise Rejected("epoched", f"{path.name} holds {x_CT.shape[2]} epochs, not a continuous recording")
        if x_CT.shape != (count, points):
            raise Rejected("size_mismatch", f"{path.name} says {count} channels x {points} points, holds {x_CT.shape}")
        return x_CT
    options = [path.with_name(Path(data.replace("\\", "/")).name), path.with_suffix(".fdt"), path.with_suffix(".FDT")]
    file = next((f for f in options if f.is_file()), None)
    if file is None:
        raise Rejected("missing_file", f"{path.name} names {data}, which is not beside it")
    if file.suffix.lower() != ".fdt":
        raise Rejected("unsupported", f"{file.name}: the old format .dat; save it again with a newer EEGLAB")
    size, expected = file.stat().st_size, 4 * count * points
    if size != expected:
        code = "no_data" if size == 0 else "truncated" if size < expected else "size_mismatch"
        raise Rejected(code, f"{file.name} has {size} bytes, {count} channels x {points} points need {expected}")
    return np.memmap(file, "<f4", "r", shape=(points, count)).T


def _events(rows: list[dict], rate_hz: float, notes: list[str]) -> tuple[list[int], list[Event]]:
    """(samples before which the signal is broken, events), from EEGLAB's latencies, which count from 1."""
    breaks, events = [], []
    for row in rows:
        label, value = str(row.get("type", "")).strip(), _number(row.get("type"))
        label = code_label(value) if math.isfinite(value) else label
        sample, samples = _number(row.get("latency")) - 1, _number(row.get("duration"))
        if not math.isfinite(sample):
            notes.append(f"event without latency: {label!r}")
        elif label in ("boundary", "-99"):  # the latter is ERPLAB's
            breaks.append(math.ceil(sample))  # it stands between two samples
        else:
            events.append(Event(sample / rate_hz, samples / rate_hz if 0 < samples < math.inf else 0.0, label, value))
    return breaks, sorted(events, key=lambda e: e.onset_s)


def _rows(table) -> list[dict]:
    """A MATLAB structure array as one dict per element; it comes as a dict of lists or, with one element, of values."""
    if isinstance(table, list | np.ndarray):
        return [row for row in table if isinstance(row, dict)]
    if not isinstance(table, dict) or not table:
        return []
    columns = [v for v in table.values() if isinstance(v, list)]
    columns = columns or [v for v in table.values() if isinstance(v, np.ndarray) and v.ndim == 1 and v.size > 1]
    length = max(map(len, columns), default=0)
    full = {
        k: v
        for k, v in table.items()
        if isinstance(v, list | np.ndarray) and getattr(v, "ndim", 1) and len(v) == length
    }
    return [{k: v[i] for k, v in full.items()} for i in range(length)] if length else [table]


def _number(value) -> float:
    """A field as a number; NaN where it is empty or text."""
    try:
        return float(value) if np.size(value) == 1 else math.nan
    except (TypeError, ValueError):
        return math.nan


def _positions(chanlocs: list[dict], chaninfo) -> dict[str, np.ndarray]:
    """Electrode positions in metres; in the head frame if there are fiducials, else in EEGLAB's, which is close to it."""
    chaninfo = chaninfo if isinstance(chaninfo, dict) else {}
    turn = np.array(NOSE.get(str(chaninfo.get("nosedir")).upper(), NOSE["+X"]))

    def place(row: dict) -> np.ndarray:
        x, y, z = (_number(row.get(axis)) for axis in "XYZ")
        return np.append(turn @ (x, y), z)

    positions = {str(row.get("labels", "")): place(row) for row in chanlocs}
    positions = {name: p for name, p in positions.items() if np.isfinite(p).all() and p.any()}
    if not positions:
        return {}
    radius = float(np.mean([np.linalg.norm(p) for p in positions.values()]))
    metres = next(factor for limit, factor in METRES if radius < limit)
    fiducials = {}
    for row in _rows(chaninfo.get("nodatchans")):
        text = f"{row.get('description', '')} {row.get('labels', '')}".lower()
        fiducials |= {key: place(row) for key, words in FIDUCIALS.items() if any(word in text for word in words)}
    if len(fiducials) == 3:
        positions = _to_head_frame(positions, **fiducials)
    return {name: p * metres for name, p in positions.items()}


def _to_head_frame(positions: dict, nasion: np.ndarray, left: np.ndarray, right: np.ndarray) -> dict:
    """The frame of MNE: x through both ears to the right, y from it through the nasion, z up."""
    right_e = (right - left) / np.linalg.norm(right - left)
    origin = left + right_e * ((nasion - left) @ right_e)
    front_e = (nasion - origin) / np.linalg.norm(nasion - origin)
    axes = np.stack([right_e, front_e, np.cross(right_e, front_e)])
    return {name: axes @ (p - origin) for name, p in positions.items()}
