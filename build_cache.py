"""
Build a cache of continuous, filtered, float16 recordings from raw EEG (or vibration) files; the only step that opens raw files.

    python build_cache.py                                             # the demo cohort: written as EDF, then cached
    python build_cache.py --source ~/tusz --cache cache/tusz          # BIDS, TUH trees, folders with a dataset.toml, XDF, .mat …
    python build_cache.py --source a b --cache cache/ab --rate-hz 200 # several sources, another rate
    python build_cache.py --action verify --cache cache/tusz          # every byte checked; also: status, gc
    torchrun --nproc-per-node 8 build_cache.py --source …             # several processes or machines share the work

Interrupted at any moment, the same command goes on where it stopped, and ends in the same bytes. Recordings that can't be trusted
are listed in quarantine.json with a code and a reason; the build goes on and ends with exit status 3.
"""

import contextlib
import json
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from kernels import pack, plain
from lib import channels, command, filters, labels, manifest, pool, recordings, store
from lib.errors import Failed, Rejected, Unusable
from lib.inspection import check_amplitude, check_rate, inspect, loud_channels
from lib.parts import Task, plan, same_content, shaft_hz, source_files, source_rules, unused
from lib.recordings import ReadSpec
from lib.sources import Discovery, discover
from lib.statements import VIBRATION_UNITS

RECIPE = 5  # counted up whenever the code below stores other numbers for the same input; part of the signal hash
FEW = 4  # channels whose average is hardly a reference: of two it leaves one channel and its negative


@dataclass(frozen=True)
class Config:
    source: tuple[Path, ...] = ()  # folders or files with raw recordings; none: write and ingest the demo cohort
    cache: Path = Path("cache/demo")  # directory to build, check or clean
    dataset: tuple[Path, ...] = ()  # dataset.toml files for sources that hold none: one for all sources, or one each
    action: Literal["build", "verify", "status", "gc"] = "build"  # gc deletes what no manifest refers to
    # signal path: any change here is another signal hash, so that caches never mix
    rate_hz: float | None = None  # sampling rate of the cache; none: 100 for EEG, the native rate for vibration
    band_hz: Literal["auto", "none"] | tuple[float, float] = "auto"  # pass band; auto: 0.5 45 for EEG, else none
    notch_hz: Literal["none"] | tuple[float, ...] = "none"  # line frequencies to remove, e.g. 50 100
    envelope_hz: Literal["none"] | tuple[float, float] = "none"  # keep the envelope of this band, not the signal
    reference: str = "average"  # average, none, or electrodes such as Cz or A1,A2; vibration is never re-referenced
    channels: str = "all"  # all, tuh21, tuh19, hbn128, or names such as C3,Cz,C4
    missing: Literal["auto", "reject", "interpolate", "mask"] = "auto"  # electrodes a file lacks; auto: the profile's
    scale: Literal["robust", "zscore", "none"] = "robust"  # per recording and channel; microvolts stay recoverable
    causal: bool = False  # the filter that serve_realtime.py runs, instead of the zero-phase one
    engine: Literal["fft", "mne"] = "fft"  # mne: MNE's own filter and resample, slower, as a cross-check
    min_seconds: float | None = None  # shorter segments are left out, s; none: 1 for EEG, 0.05 for vibration snapshots
    # what files that don't carry it need; a dataset.toml is the better place
    source_rate_hz: float | None = None  # rate of csv, npy, mat … files
    source_unit: str | None = None  # their unit, e.g. uV, mV, g
    source_channels: str | None = None  # their channel names, comma-separated
    # labels: never part of the signal hash, read anew by every build
    channel_labels: bool = False  # where a TUSZ .csv_bi is missing, take the union of the per-channel .csv
    allow_no_seizures: bool = False  # accept a seizure data set whose training split has none
    anonymise: bool = False  # pseudonyms for subjects and files, no free text, ages over 89 as 90
    # the build
    strict: bool = False  # one quarantined recording makes the build fail
    retry_quarantined: bool = False  # try refused recordings again although they did not change
    workers: int = 0  # processes; 0: one per core, fewer if memory is short
    share: str = "1/1"  # k/n: cache only this machine's share and leave the manifest to a last call without it
    timeout_s: float = 3600.0  # a recording that takes longer is quarantined


def main(cfg: Config) -> dict | None:
    command.check_signs(cfg, positive="rate_hz source_rate_hz timeout_s", not_negative="min_seconds workers")
    if cfg.action == "build":
        return build(cfg)
    return {"verify": verify, "status": status, "gc": collect_garbage}[cfg.action](cfg)


# ----------------------------------------------------------------------------------------------------------------------
# What is stored: the signal path of one recording


def signal_options(cfg: Config, kind: str, specs: list[ReadSpec]) -> dict:
    """Everything that decides the stored numbers; its hash names the directory of the shards. Raises Unusable."""
    eeg, rate_hz = kind == "eeg", cfg.rate_hz
    if rate_hz is None and eeg:
        rate_hz = 100.0
    elif rate_hz is None:
        native = sorted({spec.rate_hz for spec in specs if spec.rate_hz} or {0.0})
        if len(native) > 1 or not native[0]:
            differ = (
                f"whose rates are {', '.join(f'{r:g}' for r in native)} Hz" if native[0] else "that state no rate_hz"
            )
            raise Unusable(f"--rate-hz is needed for vibration sources {differ}: it is the rate of the cache")
        rate_hz = native[0]
    band = (0.5, 45.0) if cfg.band_hz == "auto" and eeg else None if cfg.band_hz in ("auto", "none") else cfg.band_hz
    if band and not 0 < band[0] < band[1] <= rate_hz / 2:
        raise Unusable(
            f"--band-hz {band[0]:g} {band[1]:g} must rise from above 0 and end at or below half of --rate-hz {rate_hz:g}"
        )
    if cfg.notch_hz != "none" and not all(0 < f < float("inf") for f in cfg.notch_hz):
        raise Unusable(f"--notch-hz {' '.join(f'{f:g}' for f in cfg.notch_hz)} must be positive")
    own = None if cfg.envelope_hz == "none" else [float(f) for f in cfg.envelope_hz]
    if own and not 0 < own[0] < own[1]:
        raise Unusable(f"--envelope-hz {own[0]:g} {own[1]:g} must rise from above 0")
    if own and cfg.causal:
        raise Unusable("--envelope-hz needs the whole recording, and --causal must not: leave one of them out")
    for flag, text in (("--channels", cfg.channels), ("--reference", cfg.reference)):
        if twice := channels.named_twice(text.split(",")):
            raise Unusable(f"{flag} {text} names one electrode twice: {twice}")
    if cfg.channels == "all" and cfg.missing in ("interpolate", "mask"):
        raise Unusable(f"--missing {cfg.missing} needs --channels with a profile or names: 'all' lacks no electrode")
    profile = channels.PROFILES.get(cfg.channels)
    # envelopes once came before notch and reference; a machine's without a notch are what they were
    recipe = RECIPE + bool(own and (eeg or cfg.notch_hz != "none"))
    return ({"envelope_hz": own} if own else {}) | {
        "recipe": recipe,
        "kind": kind,
        "rate_hz": float(rate_hz),
        "band_hz": band and [float(f) for f in band],
        "notch_hz": None if cfg.notch_hz == "none" else [float(f) for f in cfg.notch_hz],
        "reference": cfg.reference if eeg else "none",
        "channels": cfg.channels,
        "missing": cfg.missing if cfg.missing != "auto" else profile.missing if profile else "reject",
        "scale": cfg.scale,
        "causal": cfg.causal,
        "engine": cfg.engine,
        "min_seconds": (1.0 if eeg else 0.05) if cfg.min_seconds is None else cfg.min_seconds,
        "dtype": "float16",
    }


@dataclass
class Prepared:
    """A recording as it will be stored."""

    z_TC: np.ndarray  # float16, (x_uV - offset) / scale
    names: tuple[str, ...]
    bad: list[int]  # channels flagged flat, saturated, not a number, or missing and masked
    interpolated: list[int]
    missing: tuple[str, ...]
    dropped: tuple[str, ...]  # channels of the file that were not taken
    scale_C: np.ndarray
    offset_C: np.ndarray
    segments: list[tuple[int, int, float]]  # [start, stop) samples of z_TC, onset in recording time (s)
    notes: list[str]
    source_rate_hz: float  # of these channels in the file
    source_seconds: float  # from its first sample to its last, gaps and what was cropped included


def prepare(
    recording: recordings.Recording, signal: dict, spec: ReadSpec, crop: tuple | None, shaft_hz: float | None = None
) -> Prepared:
    """
    Pick, check, filter, resample, re-reference and scale one recording; every rule of docs/cache.md, in order.

    Raises Rejected with the code under which the recording is quarantined.
    """
    notes: list[str] = []
    extra = channels.reference_channels(signal["reference"], recording.names)
    picked = channels.select(
        recording.names,
        recording.kinds,
        signal["channels"],
        stated=spec.channels is not None,
        max_missing=0 if signal["missing"] == "reject" else None,
        identical=lambda a, b: np.array_equal(recording.read([a]), recording.read([b])),
        reference=extra,
    )
    nameless = [
        name
        for i, name in enumerate(recording.names)
        if recording.kinds[i] == "unknown" and name in picked.dropped and channels.canonical(name) not in picked.names
    ]
    if signal["channels"] == "all" and nameless:
        notes.append(
            f"channels of unknown name left out: {', '.join(nameless)}; [values.channel] of dataset.toml can name electrodes"
        )
    present = [c for c, i in enumerate(picked.indices) if i >= 0]
    wanted = [picked.indices[c] for c in present] + [i for i in extra if i not in picked.indices]
    rates = sorted({recording.rates_hz[i] for i in wanted})
    if len(rates) > 1:
        raise Rejected("mixed_rates", f"wanted channels are sampled at {', '.join(f'{r:g}' for r in rates)} Hz")
    rate_hz = rates[0]
    highest = signal["band_hz"][1] if signal["band_hz"] else signal["rate_hz"] / 2
    if highest > rate_hz / 2:
        raise Rejected("rate_too_low", f"sampled at {rate_hz:g} Hz, which can't hold {highest:g} Hz")

    x_CT = recording.read(wanted)
    # segments count samples of the first EEG channel, which may have another rate than the wanted ones
    share = x_CT.shape[1] / recording.samples
    ranges = [replace(s, start=round(s.start * share), stop=round(s.stop * share)) for s in recording.segments]
    source_s = max(s.onset_s + (s.stop - s.start) / rate_hz for s in ranges)
    check = inspect(x_CT, rate_hz, ranges)
    notes += check.notes
    marked = [c for c, i in enumerate(wanted) if recording.names[i] in recording.marked_bad]
    if marked:
        notes.append(f"marked bad channels: {len(marked)} of {len(wanted)}")
    flagged = sorted({*check.bad, *marked})
    if shaft_hz:
        notes += check_rate(check.x_CT, rate_hz, shaft_hz)
    references = [wanted.index(i) for i in extra]
    enveloped = "envelope_hz" in signal
    y_CT = check.x_CT
    if enveloped:  # not linear as filters are: sums over channels have to be of signals
        good = _good(flagged, len(present))
        y_CT = y_CT.astype(np.float32)
        y_CT, bad, interpolated = _across(y_CT, picked, good, flagged, references, signal, notes)
    y_CT, segments = _filter(y_CT, rate_hz, check.segments, signal)
    y_CT, segments = _crop(y_CT, segments, signal, crop)
    if not segments:
        least_s = _least_samples(signal, rate_hz) / rate_hz
        flag = "--envelope-hz" if least_s > signal["min_seconds"] * (1 + 1e-9) else "--min-seconds"
        raise Rejected("too_short", f"no segment of {least_s:g} s ({flag}) is left of {x_CT.shape[1] / rate_hz:.2f} s")

    good = _good(flagged, len(present))
    if recording.unit == "uV" and not enveloped and (loud := set(loud_channels(y_CT, good)) - set(flagged)):
        notes.append(f"loud channels: {len(loud)} of {len(y_CT)}")
        flagged = sorted({*flagged, *loud})
        good = _good(flagged, len(present))
    if recording.unit == "uV":
        notes += check_amplitude(y_CT, np.array(present)[good] if enveloped else good)
    if not enveloped:
        y_CT, bad, interpolated = _across(y_CT, picked, good, flagged, references, signal, notes)

    if signal["scale"] == "none":
        scale_C, offset_C = np.ones(len(y_CT)), np.zeros(len(y_CT))
    else:
        scale_C, offset_C = {"robust": filters.robust_scale, "zscore": filters.zscore}[signal["scale"]](y_CT)
    scale_C, offset_C = np.asarray(scale_C, np.float32), np.asarray(offset_C, np.float32)
    z_TC = pack.pack(y_CT, offset_C, scale_C)
    notes = [*recording.notes, *notes]  # the recording's last, because reading adds to them
    return Prepared(
        z_TC,
        picked.names,
        bad,
        interpolated,
        picked.missing,
        picked.dropped,
        scale_C,
        offset_C,
        segments,
        notes,
        rate_hz,
        source_s,
    )


def _good(bad: list[int], present: int) -> np.ndarray:
    """The channels that aren't bad, of so many. Raises Rejected where those are not most."""
    good = np.setdiff1d(np.arange(present), bad)
    if len(good) <= present / 2:
        raise Rejected(
            "bad_channels",
            f"{present - len(good)} of {present} channels are flat, saturated, not a number or marked bad",
        )
    return good


def _across(
    y_CT: np.ndarray, picked, good: np.ndarray, flagged: list[int], references: list[int], signal: dict, notes: list
) -> tuple[np.ndarray, list[int], list[int]]:
    """Re-reference, in place, and put channels where a profile wants them, with those that are missing; also: which are bad, and interpolated."""
    present = [c for c, i in enumerate(picked.indices) if i >= 0]
    if references:
        if set(references) & set(flagged):
            raise Rejected(
                "missing_reference",
                f"reference {signal['reference']} is flat, saturated, loud, not a number or marked bad",
            )
        y_CT -= y_CT[references].mean(0)
    elif signal["reference"] == "average":
        _average(y_CT, channels.are_bipolar([picked.names[c] for c in present]), good, notes)

    if len(y_CT) == len(picked.names):
        full_CT = y_CT
    else:
        full_CT = np.zeros((len(picked.names), y_CT.shape[1]), np.float32)
        full_CT[present] = y_CT[: len(present)]
    bad = [present[i] for i in flagged if i < len(present)]
    lacking = [c for c, i in enumerate(picked.indices) if i < 0]
    if lacking and signal["missing"] == "interpolate":
        sources = [present[i] for i in good]
        weights = channels.spline_weights([picked.names[c] for c in sources], [picked.names[c] for c in lacking])
        full_CT[lacking] = weights @ full_CT[sources]
        return full_CT, bad, lacking
    return full_CT, sorted(bad + lacking), []


def _average(y_CT: np.ndarray, bipolar: list[bool], good: np.ndarray, notes: list) -> None:
    """Re-reference, in place, to the average of the good channels; differences of neighbours have no reference in common, and stay."""
    unipolar = np.flatnonzero(~np.array(bipolar))
    averaged = np.intersect1d(good, unipolar)
    if len(unipolar) < len(y_CT):
        notes.append("bipolar channels left as recorded, not re-referenced")
    elif len(averaged) == 1:
        notes.append("one channel: reference left as recorded")
    if len(averaged) < 2:
        return
    if len(averaged) < FEW:
        notes.append(f"average reference of few channels: {len(averaged)} (--reference none leaves them as recorded)")
    mean_T = (y_CT if len(averaged) == len(y_CT) else y_CT[averaged]).mean(0)
    y_CT[slice(None) if len(unipolar) == len(y_CT) else unipolar] -= mean_T


def _least_samples(signal: dict, rate_hz: float) -> float:
    """What a segment of the source must have to be kept."""
    least, inner_hz = signal["min_seconds"] * rate_hz, signal.get("envelope_hz")
    return max(least, filters.envelope_samples(rate_hz, inner_hz)) if inner_hz else least


def _filter(x_CT: np.ndarray, rate_hz: float, segments: list, signal: dict) -> tuple[np.ndarray, list]:
    """Filter and resample each segment by itself, so that nothing leaks over a gap; short ones are left out."""
    out_hz, band, notch = signal["rate_hz"], signal["band_hz"], signal["notch_hz"]
    inner_hz = signal.get("envelope_hz")
    pieces, kept, first = [], [], 0
    if inner_hz and inner_hz[1] > rate_hz / 2:
        raise Rejected(
            "rate_too_low", f"sampled at {rate_hz:g} Hz, which can't hold {inner_hz[1]:g} Hz (--envelope-hz)"
        )
    try:
        if signal["causal"]:
            filters.Causal(rate_hz, out_hz, band, notch, len(x_CT))
        elif signal["engine"] == "fft":
            before = filters.Spectral(rate_hz, rate_hz, None, notch if inner_hz else None)
            spectral = filters.Spectral(rate_hz, out_hz, band, None if inner_hz else notch)
    except ValueError as error:
        raise Rejected("rate_too_low", f"sampled at {rate_hz:g} Hz: {error}") from error
    least = _least_samples(signal, rate_hz)
    for segment in segments:
        if segment.stop - segment.start < least:
            continue
        piece = x_CT[:, segment.start : segment.stop]
        if inner_hz:  # of what is left without line noise: afterwards that is a level, and no filter finds it
            mne = signal["engine"] == "mne"
            piece = recordings.mne_filter_resample(piece, rate_hz, rate_hz, None, notch) if mne else before(piece)
            piece = filters.envelope(piece, rate_hz, inner_hz)
        if signal["causal"]:
            piece = filters.Causal(rate_hz, out_hz, band, notch, len(piece)).process(piece).astype(np.float32)
        elif signal["engine"] == "mne":
            piece = recordings.mne_filter_resample(piece, rate_hz, out_hz, band, None if inner_hz else notch)
        else:
            piece = spectral(piece)
        pieces.append(piece)
        kept.append((first, first + piece.shape[1], segment.onset_s))
        first += piece.shape[1]
    return (np.concatenate(pieces, axis=1) if len(pieces) != 1 else pieces[0]) if pieces else x_CT[:, :0], kept


def _crop(y_CT: np.ndarray, segments: list, signal: dict, crop: tuple | None) -> tuple[np.ndarray, list]:
    """Keep what lies between two times of the recording (s; negative: from its end; a stop of 0 or none: its end)."""
    if not crop:
        return y_CT, segments
    rate_hz = signal["rate_hz"]
    end_s = max(onset_s + (stop - start) / rate_hz for start, stop, onset_s in segments) if segments else 0.0
    low_s, high_s = crop[0] or 0.0, crop[1] or end_s
    low_s, high_s = (low_s + end_s if low_s < 0 else low_s), (high_s + end_s if high_s < 0 else high_s)
    if low_s >= high_s or low_s >= end_s:
        raise Rejected("crop_empty", f"crop {list(crop)} leaves nothing of {end_s:.1f} s")
    pieces, kept, first = [], [], 0
    for start, stop, onset_s in segments:
        a = max(start, start + round((low_s - onset_s) * rate_hz))
        b = min(stop, start + round((high_s - onset_s) * rate_hz))
        if b - a >= signal["min_seconds"] * rate_hz:
            pieces.append(y_CT[:, a:b])
            kept.append((first, first + b - a, onset_s + (a - start) / rate_hz))
            first += b - a
    return np.concatenate([y_CT[:, :0], *pieces], axis=1), kept


# ----------------------------------------------------------------------------------------------------------------------
# One source: from file to shard and part, in a worker process


def cache_recording(task: Task) -> dict:
    """Cache one source, or quarantine it; either way a part file says so, unless the file could not be read at all."""
    source, signal = task.source, task.signal
    command.keep_freed_memory()
    part = {"key": source.key, "signal": store.digest(signal), "rules": source_rules(source)}
    part_path = task.directory / "parts" / f"{store.key_hash(source.key)}.json"
    try:
        part["files"] = [[*stat, store.file_crc32(path)] for path, stat in source_files(source)]
        if task.previous and same_content(task.previous, part):
            part = {**task.previous, "files": part["files"]}  # touched, not changed
        else:
            recording = recordings.open_recording(source.path, source.spec)
            if source.channel_table:
                labels.apply_channels_tsv(source.channel_table, recording)
            if source.electrode_files:
                labels.apply_electrodes_tsv(source.electrode_files, recording)
            ready = prepare(recording, signal, source.spec, source.crop, shaft_hz(source))
            part |= _write(task, part, recording, ready)
    except Rejected as error:
        part |= {"status": "quarantined", "code": error.code, "reason": task.told(error.reason)}
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) in store.DISK_FULL:
            raise Failed(
                f"{task.directory}: {error.strerror}; free some space and run the same command again"
            ) from None
        code = "out_of_memory" if isinstance(error, MemoryError) else "unreadable"
        return {
            **part,
            "status": "quarantined",
            "code": code,
            "reason": task.told(f"{type(error).__name__}: {error}"),
            "files": [],
        }
    try:
        store.write_part(part_path, part)
    except OSError as error:
        raise Failed(f"{part_path}: {error.strerror}; free some space and run the same command again") from None
    return part


def _write(task: Task, part: dict, recording: recordings.Recording, ready: Prepared) -> dict:
    content = store.digest([part["signal"], part["rules"], [(size, crc32) for size, _, crc32 in part["files"]]])
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(task.source.key).stem)[:40]
    shard = f"{store.key_hash(task.source.key)}-{stem}-{content[:6]}.npy"
    size, crc32 = store.write_shard(task.directory / "shards" / shard, ready.z_TC)
    own = {}  # of channels whose names don't say where they are, though they may look so
    for name, electrode in zip(recording.names, channels.standard(recording.names), strict=True):
        if electrode is None and channels.canonical(name) in ready.names:
            place = recording.positions.get(name)
            own[channels.canonical(name)] = place and [round(float(v), 5) for v in place]
    return {
        "status": "cached",
        "shard": shard,
        "bytes": size,
        "crc32": crc32,
        "samples": len(ready.z_TC),
        "unit": recording.unit,
        "source_rate_hz": ready.source_rate_hz,
        "source_seconds": ready.source_seconds,
        "first_sample": recording.first_sample,
        "names": ready.names,
        "positions": own,
        "bad": ready.bad,
        "interpolated": ready.interpolated,
        "missing": ready.missing,
        "dropped": ready.dropped,
        "segments": ready.segments,
        "scale": [float(v) for v in ready.scale_C],
        "offset": [float(v) for v in ready.offset_C],
        "events": [
            [float(e.onset_s), float(e.duration_s), e.label, e.value if np.isfinite(e.value) else None]
            for e in recording.events
        ],
        "columns": recording.columns,
        "notes": task.noted(ready.notes),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The build


def build(cfg: Config) -> dict | None:
    started = time.monotonic()
    rank, world, launched = _share(cfg)
    found, kind = _discover(cfg)
    signal = signal_options(cfg, kind, [s.spec for s in found.sources])
    directory = cfg.cache / store.digest(signal)[:12]
    for name in ("parts", "shards"):
        _make_folder(directory / name, cfg.cache)

    with store.lock(cfg.cache, f"build-{rank}-of-{world}.lock" if world > 1 else "build.lock"):
        if world == 1:
            store.remove_stale_temporaries(cfg.cache)
        parts, tasks = plan(found.sources, signal, directory, cfg.anonymise, cfg.retry_quarantined)
        reused = sum(part["status"] == "cached" for part in parts.values())
        tasks = [t for t in tasks if int(store.key_hash(t.source.key), 16) % world == rank]
        if tasks:
            store.remove_manifest(cfg.cache)
            store.write_atomic(cfg.cache / "build.json", store.canonical_json({"command": resume_command(cfg)}))
        print(f"{len(tasks)} recordings to do, {len(parts)} done before", file=sys.stderr)
        parts |= work(tasks, cfg)
        if launched and not _is_last(rank):
            return None
        if world > 1 and not launched:
            quarantined = sum(parts[t.source.key]["status"] != "cached" for t in tasks)
            return {
                "cache": str(cfg.cache),
                "share": cfg.share,
                "built": len(tasks) - quarantined,
                "quarantined": quarantined,
            }
        if launched:  # what the other ranks did is on disk; what none could read is tried here once more
            parts, left = plan(found.sources, signal, directory, cfg.anonymise, retry=False)
            parts |= work(left, cfg)
        results = finalise(cfg, found, signal, directory, parts)
    results |= {"built": results["recordings"] - reused if tasks else 0, "reused": reused}
    results["seconds"] = round(time.monotonic() - started, 2)
    if cfg.strict and results["quarantined"]:
        raise Failed(f"--strict: {results['quarantined']} recordings quarantined, see {cfg.cache / 'quarantine.json'}")
    return results


def work(tasks: list[Task], cfg: Config) -> dict[str, dict]:
    """Do the tasks in worker processes, the largest first; returns their parts by key."""

    def size(task: Task) -> int:
        with contextlib.suppress(OSError):
            return sum(stat[0] for _, stat in source_files(task.source))
        return 0

    sizes = {id(t): size(t) for t in tasks}
    tasks = sorted(tasks, key=lambda t: (-sizes[id(t)], t.source.key))
    # a recording needs about its samples in float32 thrice: 6 x an int16 file, 3 x a float32 one
    largest = max(sizes.values(), default=0) * 6 + 300e6
    workers = min(cfg.workers or os.cpu_count() or 1, max(1, int(pool.available_memory() // largest)), len(tasks) or 1)
    if tasks:
        plain.library()  # compiled here, so that no worker has to
    parts: dict[str, dict] = {}
    seconds, quarantined, total = 0.0, 0, sum(sizes.values())
    os.environ.update(
        OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1"
    )  # inherited: parallel over recordings
    with tqdm(total=total, unit="B", unit_scale=True, desc="caching", disable=not tasks, mininterval=1.0) as bar:
        for task, result in pool.run(cache_recording, tasks, workers, cfg.timeout_s):
            if isinstance(result, pool.Crash):
                result = {
                    "key": task.source.key,
                    "status": "quarantined",
                    "code": result.code,
                    "reason": result.reason,
                    "files": [],
                }
            parts[task.source.key] = result
            quarantined += result["status"] == "quarantined"
            seconds += result.get("samples", 0) / task.signal["rate_hz"]
            bar.update(sizes[id(task)])
            bar.set_postfix_str(
                f"{len(parts)}/{len(tasks)} recordings, {seconds / 3600:.2f} h, {quarantined} quarantined",
                refresh=False,
            )
    return parts


def finalise(cfg: Config, found: Discovery, signal: dict, directory: Path, parts: dict[str, dict]) -> dict:
    """Read the labels, write index, labels and quarantine from what is really on disk, and the manifest last."""
    before = dict(parts)
    tables, head, results = manifest.assemble(found, parts, signal, directory.name, cfg.channel_labels, cfg.anonymise)
    for key, part in parts.items():
        if part is not before[key]:  # texts that could name people went
            store.write_part(directory / "parts" / f"{store.key_hash(key)}.json", part)
    command_line = cfg.cache / "build.json"
    if not command_line.exists():
        store.write_atomic(command_line, store.canonical_json({"command": resume_command(cfg)}))
    tables["build.json"] = command_line.read_bytes()
    refused = json.loads(tables["quarantine.json"])
    for entry in refused[:20]:
        print(f"quarantined {entry['key']}: {entry['code']}: {entry['reason']}", file=sys.stderr)
    if len(refused) > 20:
        print(f"… and {len(refused) - 20} more, see {cfg.cache / 'quarantine.json'}", file=sys.stderr)
    for note in results["split_notes"]:
        print(note, file=sys.stderr)
    refusal = manifest.refusal(results, cfg.allow_no_seizures)
    if refusal:
        store.remove_manifest(cfg.cache)
        store.write_atomic(cfg.cache / "quarantine.json", tables["quarantine.json"])
        raise Unusable(refusal)
    try:
        store.write_tables(cfg.cache, tables, head)
    except OSError as error:
        if error.errno in store.DISK_FULL:
            raise Failed(f"{cfg.cache}: {error.strerror}; free some space and run the same command again") from None
        raise
    stray = len(list(directory.glob("parts/*.json"))) - sum(1 for p in parts.values() if p.get("files"))
    if stray > 0:
        print(
            f"{stray} recordings cached before are not among these sources: not in the manifest (--action gc deletes them)",
            file=sys.stderr,
        )
    return {"cache": str(cfg.cache), **results}


def _discover(cfg: Config) -> tuple[Discovery, str]:
    """All sources, and whether they are EEG or vibration; without --source, the demo cohort's."""
    roots = cfg.source
    if not roots:
        from lib.demo import write_demo  # only here: it brings its own signal model

        roots = (cfg.cache.with_name(cfg.cache.name + "-edf"),)
        _make_folder(roots[0].parent, cfg.cache)
        with store.lock(roots[0].parent, f"{roots[0].name}.lock", wait=True):
            write_demo(roots[0])
    names = tuple(n.strip() for n in cfg.source_channels.split(",")) if cfg.source_channels else None
    kind = "vibration" if cfg.source_unit in VIBRATION_UNITS else "eeg"
    stated = ReadSpec(rate_hz=cfg.source_rate_hz, unit=cfg.source_unit, channels=names, kind=kind)
    found = discover(roots, cfg.dataset, stated)
    if cfg.anonymise:
        _make_folder(cfg.cache.parent, cfg.cache)  # where the key is kept
        found = manifest.Pseudonyms(cfg.cache).discovery(found)
    for note in found.notes:
        print(note, file=sys.stderr)
    kinds = {source.spec.kind for source in found.sources}
    if len(kinds) > 1:
        raise Unusable("--source mixes EEG and vibration: build a cache for each")
    return found, next(iter(kinds), "eeg")


def _make_folder(folder: Path, cache: Path) -> None:
    """Make a folder that a cache needs, and those above it. Raises Unusable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"--cache {cache}: {error.strerror}") from error


def resume_command(cfg: Config) -> str:
    """The command that builds this cache, without what changes only how fast it is built."""
    words = ["python", "build_cache.py"]
    for name, value in asdict(replace(cfg, workers=0, share="1/1", strict=False, retry_quarantined=False)).items():
        if value != getattr(Config(), name) or name == "cache":
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag)
            else:
                words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _share(cfg: Config) -> tuple[int, int, bool]:
    """Rank, world size, and whether torchrun set them. Raises Unusable."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), True
    k, slash, n = cfg.share.partition("/")
    if not (slash and k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise Unusable(f"--share {cfg.share} must be k/n with 1 <= k <= n")
    return int(k) - 1, int(n), False


def _is_last(rank: int) -> bool:
    """Wait until every rank has done its share; True on the one that then writes the manifest."""
    from datetime import timedelta

    import torch.distributed as dist  # only under torchrun

    dist.init_process_group("gloo", timeout=timedelta(days=7))
    dist.barrier()
    dist.destroy_process_group()
    return rank == 0


# ----------------------------------------------------------------------------------------------------------------------
# An existing cache


def verify(cfg: Config) -> dict:
    """Check every byte; names each damaged file."""
    problems = store.verify(cfg.cache)
    if problems:
        lines = [f"{path} {what}" for path, what in problems]
        print(*lines, sep="\n", file=sys.stderr)
        paths = shlex.join(dict.fromkeys(str(path) for path, _ in problems))
        raise Unusable(
            f"{len(problems)} damaged in {cfg.cache}: {lines[0]}; mend: rm -f {paths} && {store.build_command(cfg.cache)}"
        )
    counts = store.read_manifest(cfg.cache)["counts"]
    return {"cache": str(cfg.cache), "verified": True, **counts}


def status(cfg: Config) -> dict:
    """What is there, complete or not, which labels it has, and how many bytes no manifest refers to."""
    done = [p for p in map(store.read_part, cfg.cache.glob("*/parts/*.json")) if p]
    results = {
        "cache": str(cfg.cache),
        "complete": (cfg.cache / "manifest.json").exists(),
        "cached": sum(p["status"] == "cached" for p in done),
        "quarantined_by_code": dict(Counter(p["code"] for p in done if p["status"] == "quarantined")),
        "bytes": sum(p.stat().st_size for p in cfg.cache.rglob("*") if p.is_file()),
        "command": store.build_command(cfg.cache),
    }
    if not cfg.cache.is_dir():
        raise Unusable(f"--cache {cfg.cache} does not exist")
    if results["complete"]:
        head = store.read_manifest(cfg.cache)
        results |= {
            "counts": head["counts"],
            "signal": head["signal"],
            **manifest.known_labels(cfg.cache),
            "unused_bytes": sum(p.stat().st_size for p in unused(cfg.cache)),
        }
    return results


def collect_garbage(cfg: Config) -> dict:
    """Delete shards and parts that the manifest does not refer to: of other options, and of sources that changed or went."""
    store.read_manifest(cfg.cache)  # only a complete cache says what is in use
    with store.lock(cfg.cache, "build.lock"):
        paths = unused(cfg.cache)
        freed = sum(p.stat().st_size for p in paths)
        for path in paths:
            path.unlink()
        for folder in sorted((p for p in cfg.cache.rglob("*") if p.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty
    return {"cache": str(cfg.cache), "deleted": len(paths), "freed_bytes": freed}


if __name__ == "__main__":
    sys.exit(command.run(main, Config, __doc__))
