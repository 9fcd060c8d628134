"""
Walks a source and sorts its recordings into data sets: no names are understood here, nothing is read but dataset.toml.

A folder with `dataset.toml` or `dataset_description.json` is a data set of its own, also below another source, and a source that lies
inside one belongs to it. Every folder and every file is visited once, whatever links point to it. Hidden files, __MACOSX, what BIDS
keeps beside raw data, and caches and runs of ours are left out and, where they hold recordings, counted.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lib.recordings import SUFFIXES, is_recording, suffix
from lib.rules import Rule, read_rule

MARKERS = ("dataset.toml", "dataset_description.json")
NOT_RAW = {"derivatives", "sourcedata", "code", "stimuli"}  # of a BIDS data set

_NO_NAME = re.compile(r"edf|v\d+(\.\d+)*|train|dev|eval", re.IGNORECASE)  # TUH's inner folders don't name the data set


@dataclass
class Dataset:
    """The recordings of one data set, before their names are understood."""

    base: Path  # keys are relative to it
    name: str
    rule: Rule | None
    whole: bool  # False where the user asked for a part of it
    described: bool  # has a dataset_description.json: BIDS beyond doubt
    paths: list[Path] = field(default_factory=list)


@dataclass
class Walk:
    """What lies below one source."""

    datasets: dict[Path, Dataset]
    notes: list[str] = field(default_factory=list)
    rejected: list[tuple[str, Path, str, str]] = field(default_factory=list)  # key, path, code, reason


def walk(root: Path, rule: Rule | None) -> Walk:
    """The data sets below (or around) one folder or file; `rule` describes all of it. Raises Unusable."""
    is_folder = root.is_dir() and not is_recording(root)
    base = root if is_folder else root.parent
    if rule is None:
        marked = next((p for p in (base, *base.parents) if any((p / m).is_file() for m in MARKERS)), None)
        base = marked or next((p for p in (base, *base.parents) if not _NO_NAME.fullmatch(p.name)), base)
    found = Walk({base: _dataset(base, rule, base == root)})
    if is_folder:
        _visit(root, base, rule, found)
    else:
        found.datasets[base].paths.append(root)
    return found


def _dataset(base: Path, rule: Rule | None, whole: bool) -> Dataset:
    if rule is None and (base / "dataset.toml").is_file():
        rule = read_rule(base / "dataset.toml")
    return Dataset(base, (rule and rule.name) or _utf8(base.name) or "data", rule, whole, (base / MARKERS[1]).is_file())


def _visit(root: Path, base: Path, rule: Rule | None, found: Walk) -> None:
    seen: set[tuple[int, int]] = set()
    left_out: Counter[str] = Counter()
    linked_files: list[tuple[Dataset, Path]] = []
    folders: list[tuple[Path, Dataset]] = [(root, found.datasets[base])]
    linked_folders: list[tuple[Path, Dataset]] = []  # these wait, so that the real path of a folder comes first
    while folders or linked_folders:
        folder, dataset = folders.pop() if folders else linked_folders.pop(0)
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            _reject(found, dataset, folder, error.strerror or str(error))
            continue
        if (status.st_dev, status.st_ino) in seen:
            found.notes.append(f"folder linked to a second time, left out: {folder.name}")
            continue
        seen.add((status.st_dev, status.st_ino))
        if rule is None and folder != base and any(e.name in MARKERS for e in entries):
            dataset = found.datasets[folder] = _dataset(folder, None, True)
        for entry in entries:
            path, is_folder = folder / entry.name, _is_folder(entry)
            if reason := _left_out(path, is_folder, dataset, root):
                left_out[reason] += _count(path, is_folder)
            elif is_recording(path):
                if entry.is_symlink():
                    linked_files.append((dataset, path))
                elif is_folder or entry.is_file():
                    dataset.paths.append(path)
                else:
                    _reject(found, dataset, path, "neither a file nor a folder")
            elif is_folder:
                (linked_folders if entry.is_symlink() else folders).append((path, dataset))
    _add_linked(linked_files, found)
    found.notes += [f"recordings left out in {reason}: {count}" for reason, count in sorted(left_out.items()) if count]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _left_out(path: Path, is_folder: bool, dataset: Dataset, root: Path) -> str | None:
    """The kind of thing that holds no source recordings, or None."""
    if path.name.startswith("."):
        return "hidden files"
    if not is_folder:
        return None
    ours = path.parent == root and path.name in ("cache", "runs")
    if ours or path.name == "__MACOSX" or (path / "build.json").exists():  # the last marks a cache wherever it is
        return f"{path.name}/"
    beside_raw = dataset.described and path.parent == dataset.base and path.name in NOT_RAW
    return f"{path.name}/" if beside_raw else None


def _count(path: Path, is_folder: bool) -> int:
    """How many recordings a part that is left out holds; .git and the like are not searched."""
    if path.name.startswith("."):
        return int(not is_folder and suffix(path) in SUFFIXES)
    return sum(is_recording(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _reject(found: Walk, dataset: Dataset, path: Path, reason: str) -> None:
    found.rejected.append((f"{dataset.name}/{posix(path, dataset.base)}", path, "unreadable", f"{path.name}: {reason}"))


def _add_linked(linked: list[tuple[Dataset, Path]], found: Walk) -> None:
    """Add recordings that are symbolic links, each file once; a dangling link stays: reading it will say that it is unreadable."""
    taken = {str(path) for dataset in found.datasets.values() for path in dataset.paths}
    for dataset, path in sorted(linked, key=lambda item: str(item[1])):
        target = os.path.realpath(path)
        if target in taken:
            found.notes.append(f"recording linked to a second time, left out: {path.name}")
            continue
        taken.add(target)
        dataset.paths.append(path)


def posix(path: Path, base: Path) -> str:
    """The path below a data set, as UTF-8 can hold it."""
    return _utf8(path.relative_to(base).as_posix())


def _utf8(name: str) -> str:
    """A name of the file system with what isn't UTF-8 spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
