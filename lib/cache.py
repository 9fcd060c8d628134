"""
Read a cache: metadata at start-up, windows by batched reads afterwards. Nothing here opens, or falls back to, a raw recording.

Shape letters: B windows of a batch, C channels, T samples.
"""

import contextlib
import json
import os
import resource
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import kernels
from lib import store
from lib.alignment import Align, Alignment
from lib.errors import Unusable
from lib.windows import Windows, merge

CLIP_SD = 15.0  # EEG beyond this many robust standard deviations is an artefact: clipped when read, not when stored; impacts of a bearing stay
FILES = 8192  # that may be open, half of them shards


@dataclass(frozen=True)
class Recording:
    """One recording of a cache: who and what, and where its samples are."""

    key: str
    dataset: str
    subject: str  # "dataset/subject", unique over caches
    session: str
    task: str
    run: str
    split: str
    columns: dict
    names: tuple[str, ...]
    samples: int
    segments: tuple[tuple[int, int], ...]  # [start, stop) samples; windows never cross their borders
    onsets_s: tuple[float, ...]  # of the segments in the recording's own time, which counts gaps and what was cropped
    folder: Path
    file: str
    montage: int

    @property
    def shard(self) -> Path:
        """The file that holds its samples."""
        return self.folder / self.file


OWN = ("task", "dataset", "session", "run", "subject")  # columns that every recording has
ALIKE = "rate_hz scale kind envelope_hz band_hz notch_hz reference causal".split()  # of signals that are read together


def rebuilt_with(name: str, value) -> str:
    """The flag of build_cache.py that gives a signal's property (one of ALIKE, or `unit`) this value, after "rebuild it"."""
    if name in ("kind", "unit"):
        return f'with {name} = "{value}" in its dataset.toml, if that is what it is'
    if name == "causal":
        return "with --causal" if value else "without --causal"
    words = value if isinstance(value, list | tuple) else ["none" if value is None else value]
    flag = f"--{name.replace('_', '-')}"
    return " ".join(["with", flag, *(f"{w:g}" if isinstance(w, float) else str(w) for w in words)])


@dataclass(frozen=True)
class Event:
    """Something that happened in a recording; onset and duration in seconds of the stored signal (gaps removed)."""

    onset_s: float
    duration_s: float
    label: str
    value: float


@dataclass
class Batch:
    """Windows of any montages: padded channels, and channels flagged bad, are zero and have a False mask."""

    x_BCT: torch.Tensor  # float32; robust standard deviations, or microvolts if asked for
    positions_BC3: torch.Tensor  # float32 metres; NaN where the electrode has no known place
    mask_BC: torch.Tensor  # bool, True for a real and good channel
    recording_B: torch.Tensor  # int64 row of Cache.recordings
    start_B: torch.Tensor  # int64 first sample


class Cache:
    """
    The recordings of one or several complete caches of the same rate, filter and unit.

    Opening one is the pre-flight check: manifest, tables (sha256) and every shard's exact size, read from metadata alone.
    Raises Unusable: what is missing or differs, where, and the command that mends it.
    """

    def __init__(self, *paths: str | Path):
        if not paths:
            raise Unusable("--cache names no directory: give one or several that build_cache.py wrote")
        self.paths = [Path(p) for p in paths]
        self.manifests = [store.read_manifest(p) for p in self.paths]
        self._check_alike()
        self.rate_hz: float = self.manifests[0]["signal"]["rate_hz"]
        self.signal: dict = self.manifests[0][
            "signal"
        ]  # rate, band, notch, reference, scale, … as the builder was told
        self.unit: str = self.manifests[0]["unit"]
        self.recordings: list[Recording] = []
        self.participants: dict[str, dict] = {}
        scales, montages, bad = [], [], []
        for path, manifest in zip(self.paths, self.manifests, strict=False):
            self._load(path, manifest, scales, montages, bad)
        self._scales = np.concatenate(scales)
        self._channels = np.array([len(r.names) for r in self.recordings], np.int64)
        self._first_channel = np.concatenate([[0], np.cumsum(self._channels)])
        self._good = np.ones(len(self._scales), bool)
        for first, indices in zip(self._first_channel, bad, strict=False):
            self._good[first + np.asarray(indices, np.int64)] = False
        self._montage = np.array([r.montage for r in self.recordings], np.int64)
        self._positions = np.full((len(montages), max(map(len, montages)), 3), np.nan, np.float32)
        for table, positions in zip(self._positions, montages, strict=False):
            table[: len(positions)] = positions
        self._files = OpenFiles(self.recordings)
        self.alignment: Alignment | None = None

    def align(self, how: Align) -> None:
        """From now on windows in model units are aligned (lib/alignment.py), and `signal` says so. Raises Unusable."""
        self.alignment = None if how == "none" else Alignment(self, how)
        self.signal = {k: v for k, v in self.signal.items() if k != "align"} | ({} if how == "none" else {"align": how})

    def _check_alike(self) -> None:
        first = self.manifests[0]
        for path, manifest in zip(self.paths[1:], self.manifests[1:], strict=False):
            for name in (*ALIKE, "unit"):
                ours, theirs = (m.get(name, m["signal"].get(name)) for m in (first, manifest))
                if ours != theirs:
                    raise Unusable(
                        f"{path} has {name} {theirs}, {self.paths[0]} has {ours}: they can't be read together; "
                        f"rebuild {path} {rebuilt_with(name, ours)}, or the other as this one"
                    )

    def _load(self, path: Path, manifest: dict, scales: list, montages: list, bad: list) -> None:
        tables = {
            name: entry
            for name, entry in manifest["files"].items()
            if name not in ("quarantine.json", "build.json", "events.npy")
        }
        _refuse(path, store.table_problems(path, tables))
        index, labels = (json.loads((path / name).read_bytes()) for name in ("index.json", "labels.json"))
        _refuse(path, store.shard_problems(path / manifest["directory"], index["recordings"]))
        data = path / manifest["directory"] / "shards"
        scales.append(np.load(path / "scales.npy"))
        known = {r.key for r in self.recordings}
        for row in index["recordings"]:
            label, montage = labels["recordings"][row["key"]], index["montages"][row["montage"]]
            if row["key"] in known:
                raise Unusable(f"{path} holds {row['key']} once more: give each recording in one cache only")
            self.recordings.append(
                Recording(
                    row["key"],
                    label["dataset"],
                    f"{label['dataset']}/{label['subject']}",
                    label["session"],
                    label["task"],
                    label["run"],
                    label["split"],
                    label["columns"],
                    tuple(montage["names"]),
                    row["samples"],
                    tuple((start, stop) for start, stop, _ in row["segments"]),
                    tuple(onset_s for _, _, onset_s in row["segments"]),
                    data,
                    row["shard"],
                    len(montages) + row["montage"],
                )
            )
            bad.append(row["bad"])
        montages += [[[np.nan] * 3 if p is None else p for p in m["positions_m"]] for m in index["montages"]]
        self.participants |= labels["participants"]

    @property
    def fingerprint(self) -> str:
        """What identifies the content of the cache: the manifest's sha256, joined where there are several caches."""
        return "+".join(m["sha256"] for m in self.manifests)

    @cached_property
    def _events(self) -> tuple[np.ndarray, list[str]]:
        """All events of all caches sorted by recording, and their vocabulary."""
        tables, vocabulary, first = [], [], 0
        for path, manifest in zip(self.paths, self.manifests, strict=False):
            _refuse(path, store.table_problems(path, {"events.npy": manifest["files"]["events.npy"]}))
            table = np.load(path / "events.npy").copy()
            labels = json.loads((path / "labels.json").read_bytes())
            table["recording"] += first
            table["label"] += len(vocabulary)
            first += len(labels["recordings"])
            vocabulary += labels["vocabulary"]
            tables.append(table)
        return np.concatenate(tables), vocabulary

    def events(self, recording: int, label: str | None = None) -> list[Event]:
        """The events of one recording (row of `recordings`) in order of onset, all or those of one label."""
        table, vocabulary = self._events
        low, high = np.searchsorted(table["recording"], [recording, recording + 1])
        events = (
            Event(float(e["onset_s"]), float(e["duration_s"]), vocabulary[e["label"]], float(e["value"]))
            for e in table[low:high]
        )
        return [e for e in events if label is None or e.label == label]

    def intervals(self, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Recording, start and stop (s) of every event of one label with a duration, overlapping ones of a recording merged."""
        table, vocabulary = self._events
        rows = table[
            np.isin(table["label"], [i for i, v in enumerate(vocabulary) if v == label]) & (table["duration_s"] > 0)
        ]
        return merge(rows["recording"], rows["onset_s"], rows["onset_s"] + rows["duration_s"])

    def gone(self, label: str) -> np.ndarray:
        """Seconds of each of a movie's `intervals` that had passed where its stored part begins, for lack of signal."""
        table, vocabulary = self._events
        here = table[np.isin(table["label"], [i for i, v in enumerate(vocabulary) if v == label])]
        gone = dict(zip(zip(here["recording"], here["onset_s"], strict=True), here["value"], strict=True))
        return np.nan_to_num([gone[key] for key in zip(*self.intervals(label)[:2], strict=True)])

    @cached_property
    def _segments(self) -> np.ndarray:
        """All segments (recording, first, one past the last sample), sorted."""
        table = sorted((i, *ends) for i, r in enumerate(self.recordings) for ends in r.segments)
        return np.array(table, np.int64).reshape(-1, 3)

    def holds(self, row_B, start_B, samples: int) -> np.ndarray:
        """Whether windows of so many samples lie within one segment of their recordings, bool (B)."""
        row_N, start_N, stop_N = self._segments.T
        reach = 1 + stop_N.max(initial=0) + np.abs(start_B).max(initial=0)  # so that no start is another recording's
        i_B = np.searchsorted(row_N * reach + start_N, row_B * reach + start_B, side="right") - 1
        return (i_B >= 0) & (row_N[i_B] == row_B) & (start_B + samples <= stop_N[i_B])

    def labels(self) -> list[str]:
        """The vocabulary of events."""
        return sorted(set(self._events[1]))

    def column(self, name: str) -> list:
        """A value per recording, None where missing: session, task, run, dataset, split, a column of the source, or a participant's trait."""
        values = []
        for r in self.recordings:
            own = getattr(r, name) if name in (*OWN, "split") else None
            value = r.columns.get(name, self.participants.get(r.subject, {}).get(name, own))
            values.append(None if value == "" else value)
        return values

    def columns(self) -> list[str]:
        """The names `column` knows beyond session, task, run, dataset, split and subject."""
        return sorted(
            {n for r in self.recordings for n in r.columns} | {n for p in self.participants.values() for n in p}
        )

    def rows(self, splits: Sequence[str], where: Sequence[str] = ()) -> list[int]:
        """
        The recordings of these splits with the values of `where`: `task=fist`, or one of several, `run=03+07`.

        A value of the cache that holds a + itself is taken as it is. Raises Unusable for a column, or values, that no
        recording has.
        """
        from lib.traits import class_name  # here: it needs this module

        rows = [i for i, r in enumerate(self.recordings) if r.split in splits]
        for word in where:
            name, equals, value = word.partition("=")
            if not equals or name not in {*self.columns(), *OWN}:
                known = ", ".join([*self.columns(), *OWN])
                raise Unusable(f"--where {word}: expected COLUMN=VALUE; there are: {known}")
            values = [class_name(v) for v in self.column(name)]
            wanted = [value] if value in values else value.split("+")
            if not set(wanted) & set(values):
                there = ", ".join(sorted({v for v in values if v is not None})[:20])
                raise Unusable(f"--where {word}: no recording has {name} {' or '.join(wanted)}; there are: {there}")
            rows = [i for i in rows if values[i] in wanted]
        return rows

    def long_enough(self, split: str, samples: int) -> list[int]:
        """The recordings of a split that hold a window of so many samples."""
        found = set(self._segments[self._segments[:, 2] - self._segments[:, 1] >= samples, 0].tolist())
        return [i for i in self.rows([split]) if i in found]

    def windows(
        self, split: str | None = None, window_s: float = 4.0, stride_s: float = 2.0, recordings=None
    ) -> Windows:
        """
        All windows of one split (or of the given rows of `recordings`); any length and stride, no rebuild.

        Raises Unusable if there are none.
        """
        rows = range(len(self.recordings)) if recordings is None else recordings
        rows = [i for i in rows if split is None or self.recordings[i].split == split]
        segments = [(i, start, stop) for i in rows for start, stop in self.recordings[i].segments]
        windows = Windows(segments, self._whole(window_s, "window_s"), self._whole(stride_s, "stride_s"), self)
        if not len(windows):
            have = {s: sum(r.split == s for r in self.recordings) for s in ("train", "val", "test")}
            raise Unusable(
                f"no window of {window_s:g} s in split {split or 'all'} of {', '.join(map(str, self.paths))} (recordings: {have}): "
                "a shorter --window-s, or longer recordings there ([split] in dataset.toml)"
            )
        return windows

    def _whole(self, seconds: float, name: str) -> int:
        samples = round(seconds * self.rate_hz)
        if samples < 1 or abs(samples - seconds * self.rate_hz) > 1e-6 * samples:
            raise Unusable(f"{name} {seconds} is not a whole number of samples at {self.rate_hz} Hz")
        return samples

    def scales(self, recording: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and offset (C) of one recording: its unit is model unit x scale + offset."""
        first = self._first_channel[recording]
        return tuple(self._scales[first : first + self._channels[recording]].T)

    def good_channels(self) -> tuple[np.ndarray, np.ndarray]:
        """How many channels of each recording (R) are good, and how many of those have a position."""
        placed_RC = np.isfinite(self._positions).all(2)[self._montage]
        of_N = np.repeat(np.arange(len(self.recordings)), self._channels)
        placed_N = placed_RC[of_N, np.arange(len(of_N)) - self._first_channel[of_N]]
        counts = (np.bincount(of_N, weights, len(self.recordings)) for weights in (self._good, self._good & placed_N))
        return tuple(count_R.astype(np.int64) for count_R in counts)

    def read(self, recording_B, start_B, samples: int, unit: str = "model", channels: int | None = None) -> Batch:
        """As `read_unaligned`; in model units aligned, if `align` was called."""
        batch = self.read_unaligned(recording_B, start_B, samples, unit, channels)
        if self.alignment is not None and unit == "model":
            batch.x_BCT = self.alignment(batch.x_BCT, batch.mask_BC, batch.recording_B.numpy())
        return batch

    def read_unaligned(
        self, recording_B, start_B, samples: int, unit: str = "model", channels: int | None = None
    ) -> Batch:
        """
        Read windows of `samples` samples; `unit` is "model" (robust standard deviations, clipped at ±15) or the cache's own (µV).

        `channels` pads to a fixed count instead of the batch's largest. Raises Unusable for a shard that has shrunk since the start.
        """
        recording_B, start_B = np.asarray(recording_B, np.int64), np.asarray(start_B, np.int64)
        assert unit in ("model", self.unit), f"unit {unit!r} is neither 'model' nor {self.unit!r}"
        count_B = self._channels[recording_B]
        channel_C = np.arange(max(count_B.max(initial=0), channels or 0))
        real_BC = channel_C < count_B[:, None]
        row_BC = np.minimum(self._first_channel[recording_B][:, None] + channel_C, len(self._good) - 1)
        good_BC = real_BC & self._good[row_BC]
        gain_BC = bias_BC = None
        if unit != "model":
            gain_BC, bias_BC = (
                torch.from_numpy(np.where(good_BC, self._scales[row_BC, i], 0).astype(np.float32)) for i in (0, 1)
            )
        with self._files.open(recording_B) as fd_B:
            try:
                x_BCT = kernels.gather_windows(
                    torch.from_numpy(fd_B),
                    torch.from_numpy(store.NPY_HEADER_BYTES + start_B * count_B * 2),
                    torch.from_numpy(count_B),
                    torch.from_numpy(np.where(good_BC, channel_C, -1).astype(np.int32)),
                    gain_BC,
                    bias_BC,
                    samples,
                    CLIP_SD if unit == "model" and self.signal["kind"] == "eeg" else float("inf"),
                )
            except kernels.UnreadableWindow as error:
                shard = self.recordings[recording_B[error.window]].shard
                raise Unusable(
                    f"{shard}: {error}; the cache changed under the reader: verify it, then build it again"
                ) from error
        positions_BC3 = self._positions[self._montage[recording_B], : len(channel_C)]
        if positions_BC3.shape[1] < len(channel_C):
            positions_BC3 = np.pad(positions_BC3, ((0, 0), (0, len(channel_C) - positions_BC3.shape[1]), (0, 0)))
        if not real_BC.all():
            positions_BC3[~real_BC] = 0
        arrays = (positions_BC3, good_BC, recording_B, start_B)
        return Batch(x_BCT, *(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))


class OpenFiles:
    """Shards kept open, the least recently used closed first; opened when first read, so that a forked process opens its own."""

    def __init__(self, recordings: list[Recording]):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < FILES and (
            hard == resource.RLIM_INFINITY or soft < hard
        ):  # commonly 1,024: less than two large batches
            soft = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.capacity = max(64, min(soft, FILES) // 2)
        self._recordings, self._lock, self._turn, self._opened = recordings, threading.Lock(), 0, 0
        self._fds = np.full(len(recordings), -1, np.int64)
        self._used = np.zeros(len(recordings), np.int64)  # the last batch that read it

    @contextlib.contextmanager
    def open(self, row_B: np.ndarray):
        """The file descriptors, int64, of recordings given by row; none is closed while the batch is read. Raises Unusable."""
        with self._lock:
            self._turn += 1
            self._used[row_B] = self._turn
            for row in np.unique(row_B[self._fds[row_B] < 0]).tolist():
                path = self._recordings[row].shard
                try:
                    self._fds[row] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise Unusable(
                        f"{path}: {error.strerror}; the cache changed under the reader: verify it"
                    ) from error
                self._opened += 1
            yield self._fds[row_B]
            if self._opened > self.capacity:
                rows = np.flatnonzero(self._fds >= 0)
                for row in rows[np.argsort(self._used[rows], kind="stable")][: len(rows) - self.capacity]:
                    os.close(self._fds[row])
                    self._fds[row] = -1
                self._opened = self.capacity

    def __del__(self):
        for fd in self._fds[self._fds >= 0].tolist():
            os.close(fd)


def _refuse(path: Path, problems) -> None:
    """Raise Unusable for the first problems found, with the command that mends them."""
    found = [f"{file} {what}" for file, what in problems]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise Unusable(f"{found[0]}{more}; mend it: {store.build_command(path)}")
