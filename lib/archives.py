"""
Arrays in NPY, NPZ, MAT (v5 and v7.3) and HDF5 files: which of them is the signal, and what the others say about it.

T samples, C channels, N snapshots.
"""

import math
import re
from pathlib import Path

import h5py
import numpy as np
import pymatreader

from lib import channels
from lib.errors import Rejected
from lib.recordings import ReadSpec, Recording
from lib.tables import NAMES, RATES, TIMES, Table, to_recording

UNITS = {"unit", "units"}
ELECTRODES = 512  # more no cap has


def open_archive(path: Path, spec: ReadSpec) -> Recording:
    """Opens an archive of arrays. Raises Rejected."""
    return to_recording(path, _choose(path, _arrays(path, path.suffix.lower()), spec), spec)


def _arrays(path: Path, ending: str) -> dict:
    """Everything in an archive by name; large HDF5 arrays stay on disk until they are read."""
    if ending == ".npy":
        return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}
    if ending == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    if ending == ".mat":
        return _flat({k: v for k, v in pymatreader.read_mat(path).items() if not k.startswith("__")})
    file = h5py.File(path, "r")
    found = dict(file.attrs)

    def visit(name: str, item) -> None:
        found.update(item.attrs)
        if isinstance(item, h5py.Dataset):
            found[name] = item.asstr()[()] if h5py.check_string_dtype(item.dtype) else item

    file.visititems(visit)
    return found


def _flat(content: dict, prefix: str = "") -> dict:
    """Nested MATLAB structures as one dict, with names like `data/fs`."""
    flat = {}
    for name, value in content.items():
        value = _by_name(value)
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _by_name(value):
    """A MATLAB array of structures with fields Name and Data (Paderborn) as a structure of these names; anything else as it is."""
    names, data = (value.get(key) for key in ("Name", "Data")) if isinstance(value, dict) else (None, None)
    listed = isinstance(names, list) and isinstance(data, list) and len(names) == len(data) == len(set(map(str, names)))
    return dict(zip(map(str, names), data, strict=True)) if listed else value


def _sorted_out(path: Path, content: dict, table: Table, spec: ReadSpec) -> tuple[dict, dict]:
    """(arrays of two or more axes, arrays of one), after everything that speaks about the signal went into the table. Raises Rejected."""
    blocks, vectors, rates_hz, units = {}, {}, {}, set()
    for full_name, value in content.items():
        name = full_name.rsplit("/", 1)[-1]
        if isinstance(value, list) and not all(isinstance(v, str | float | int) for v in value):
            continue  # MATLAB cells
        array = value if isinstance(value, h5py.Dataset) else np.asarray(value)
        if array.dtype.kind in "SUO" and array.size:
            texts = [v.decode() if isinstance(v, bytes) else str(v) for v in np.ravel(array[()])]
            table.names = [t.strip() for t in texts] if name.lower() in NAMES else table.names
            units |= {t.strip() for t in texts} - {""} if name.lower() in UNITS else set()
        elif array.dtype.kind in "fiub" and array.size == 1:
            number = float(np.ravel(array[()])[0])
            if name.lower() in RATES:
                rates_hz[name] = number
            elif math.isfinite(number):  # a fact that isn't known is no fact, and JSON couldn't hold it
                table.columns["rpm" if name.lower().endswith("rpm") else name] = number
        elif array.dtype.kind in "fiu" and array.size:
            wide = [n for n in array.shape if n > 1]
            if len(wide) > 1:
                blocks[name] = array if len(wide) == array.ndim else np.asarray(array).reshape(wide)
            else:
                vectors[name] = np.ravel(array[()])
    if len(units) > 1:
        raise Rejected("unit_conflict", f"{path.name} has arrays in {', '.join(sorted(units))}")
    if {name.lower() for name in rates_hz} - {"rate"}:  # beside a sampling rate, a rate is another (MFPT: of the shaft)
        table.columns |= {name: rates_hz.pop(name) for name in list(rates_hz) if name.lower() == "rate"}
    told_hz = set(rates_hz.values())
    if len(told_hz) > 1 and spec.rate_hz not in told_hz:
        listed = " and ".join(f"{hz:g}" for hz in sorted(told_hz))
        raise Rejected("rate_conflict", f"{path.name} says {listed} Hz: state rate_hz in dataset.toml")
    table.unit = next(iter(units), None)
    table.rate_hz = spec.rate_hz if len(told_hz) > 1 else next(iter(told_hz), None)
    return blocks, vectors


def _choose(path: Path, content: dict, spec: ReadSpec) -> Table:
    """Which of the arrays is the signal, and what the others say about it."""
    table = Table(None)
    blocks, vectors = _sorted_out(path, content, table, spec)
    stamps = {n: v for n, v in vectors.items() if n.lower() in TIMES}
    codes = {n: v for n, v in vectors.items() if channels.kind(n) == "stim"}
    rest = {n: v for n, v in vectors.items() if n not in stamps and n not in codes}
    trials = _trials(blocks, spec)
    if trials:
        table.signal = np.concatenate(list(trials.values()), axis=1)
        table.trials = [(label, x_CT.shape[1]) for label, x_CT in trials.items()]
        table.notes.append(f"arrays taken for trials, one after the other: {', '.join(blocks)}")
        used = {*blocks}
    elif blocks:
        name = _one_block(path, blocks, spec)
        table.signal = blocks[name]
        shape = table.signal.shape
        codes |= {n: v for n, v in rest.items() if v.dtype.kind in "iu" and len(v) == max(shape)}
        table.per_snapshot = {n: v for n, v in rest.items() if len(shape) == 3 and len(v) == shape[0]}
        used = {name, *table.per_snapshot}
    else:
        parts = _equal_vectors(path, rest, spec)
        table.signal = np.stack(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))
        table.names = None if path.suffix.lower() == ".npy" else [_bare(n) for n in parts]  # .npy: only the file's name
        used = {*parts}
    samples = max(table.signal.shape)
    table.markers = [v for v in codes.values() if len(v) == samples]
    table.stamps_T = next((v for v in stamps.values() if len(v) == samples), None)
    unused = sorted({*blocks, *rest} - used - {*codes})
    table.notes += [f"arrays not used: {', '.join(unused)}"] if unused else []
    return table


def _trials(blocks: dict, spec: ReadSpec) -> dict[str, np.ndarray]:
    """
    Arrays x_CT of the same channels that are numbered and otherwise of one name (SEED: djc_eeg1 … djc_eeg15), by number; {} if they aren't.

    The channels are those stated, else the shorter axis.
    """
    found = {name: re.fullmatch(r"(.*?)(\d+)", name) for name in blocks}
    if len(blocks) < 2 or not all(found.values()) or len({m[1] for m in found.values()}) > 1:
        return {}
    trials = {}
    for name in sorted(blocks, key=lambda name: int(found[name][2])):
        x = np.asarray(blocks[name])
        stated = spec.channels and len(spec.channels)
        if x.ndim != 2 or x.dtype.kind != "f" or stated and stated not in x.shape:
            return {}
        trials[found[name][2]] = x if x.shape[0] == (stated or min(x.shape)) else x.T
    return trials if len({len(x_CT) for x_CT in trials.values()}) == 1 else {}


def _one_block(path: Path, blocks: dict, spec: ReadSpec) -> str:
    """The name of the signal: the only array but for positions, the only one that fits the stated channels, or the only one of floats."""
    fitting = [n for n, v in blocks.items() if not _are_positions(v)] or list(blocks)
    fitting = [n for n in fitting if spec.channels and len(spec.channels) in blocks[n].shape] or fitting
    floats = [n for n in fitting if blocks[n].dtype.kind == "f"] or fitting
    if len(floats) > 1:
        listed = ", ".join(f"{n} {blocks[n].shape}" for n in floats)
        raise Rejected("ambiguous_array", f"{path.name} holds {listed}: which is the signal? Keep one in the file")
    return floats[0]


def _are_positions(array) -> bool:
    """Whether these may be two or three coordinates of every electrode."""
    return array.ndim == 2 and min(array.shape) in (2, 3) and max(array.shape) <= ELECTRODES


def _bare(name: str) -> str:
    """A channel's name without the test number that CWRU's archives put before it: X097_DE_time is DE."""
    found = re.fullmatch(r"X\d+_(\w+)_time", name)
    return found[1] if found else name


def _equal_vectors(path: Path, vectors: dict, spec: ReadSpec) -> dict:
    """One-dimensional arrays that are the channels of one signal: float if there are float ones, and of equal length."""
    floats = {n: v for n, v in vectors.items() if v.dtype.kind == "f"} or vectors
    number = re.fullmatch(r"\d+", path.stem)
    own = {n: v for n, v in floats.items() if number and n.startswith(f"X{int(path.stem):03d}")}
    floats = own or floats  # some of CWRU's archives hold another test beside their own
    if spec.channels and {_bare(n) for n in floats} >= set(spec.channels):
        floats = {n: v for n, v in floats.items() if _bare(n) in spec.channels}
    if not floats:
        raise Rejected("no_signal", f"{path.name} holds no array of samples")
    if len({len(v) for v in floats.values()}) > 1 or len({_bare(n) for n in floats}) < len(floats):
        listed = ", ".join(f"{n} ({len(v)})" for n, v in floats.items())
        raise Rejected("ambiguous_array", f"{path.name} holds {listed}: state in channels which make up the signal")
    return floats
