"""
What the cache is judged by: reading, building, start-up and sampling, each beside what one would otherwise use.

    python tests/bench_cache.py                             # everything, about two minutes on two cores
    python tests/bench_cache.py --parts read --folder /data # one part, on the disk that is to be measured

Prints tables and, last, one JSON line. Variants take turns within one run and figures are medians, so that ratios hold on a busy
machine where absolute times don't. Peers that aren't installed are left out, with a word on stderr.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

import build_cache
import kernels
from kernels import reference
from kernels.bench import interleaved, machine
from lib import channels, edf, manifest, samplers, store
from lib.cache import CLIP_SD, Cache
from lib.parts import Task
from lib.recordings import ReadSpec
from lib.sources import Discovery, Source
from lib.windows import Windows

RATE_HZ, WINDOW = 100.0, 400  # samples a second and a window
SAMPLES = 100_000  # of a recording that is read
TEN_TWENTY = channels.PROFILES["tuh21"].channels
HBN = (*channels.PROFILES["hbn128"].channels, "Cz")


@dataclass(frozen=True)
class Config:
    parts: tuple[Literal["read", "build", "start", "sample"], ...] = ("read", "build", "start", "sample")
    folder: Path = Path(tempfile.gettempdir())  # where files are written and removed again; cold reads measure its disk
    megabytes: int = 1024  # of float16 in the cache that is read; its float32 twin takes twice that
    batch: int = 256  # windows of 21 channels x 400 samples
    rounds: int = 15  # turns of each warm variant; cold ones take a third
    minutes: float = 10.0  # of EDF to build, 21 channels at 256 Hz; a third of it at 129 channels and 500 Hz
    recordings: int = 5000  # in the cache that is opened
    windows: int = 24_000_000  # to draw from


# ----------------------------------------------------------------------------------------------------------------------
# What is measured on


def write_cache(cache: Path, recordings: int, samples: int, names: tuple[str, ...], x_TC: np.ndarray | None) -> Cache:
    """A complete cache of made-up recordings, published as the builder does it; without x_TC its shards are empty space."""
    signal = build_cache.signal_options(build_cache.Config(), "eeg", [])
    directory = cache / store.digest(signal)[:12]
    (directory / "shards").mkdir(parents=True)
    sources, parts, zeros = [], {}, [0.0] * len(names)
    for i in range(recordings):
        name, key = f"{i:05d}.npy", f"bench/{i:05d}.edf"
        with open(directory / "shards" / name, "wb") as file:
            if x_TC is None:
                file.truncate(store.NPY_HEADER_BYTES + 2 * samples * len(names))
            else:
                first = i * 7919 % (len(x_TC) - samples)
                file.writelines(store.npy_bytes(x_TC[first : first + samples]))
        size = (directory / "shards" / name).stat().st_size
        sources.append(Source(key, cache / key, "bench", "folder", (), (), ReadSpec(), subject=f"{i // 4:05d}"))
        part = {"status": "cached", "shard": name, "bytes": size, "crc32": 0, "samples": samples, "names": names}
        part |= {"segments": [(0, samples, 0.0)], "scale": [1.0] * len(names), "offset": zeros, "unit": "uV"}
        part |= {"bad": [], "interpolated": [], "missing": (), "positions": {}, "columns": {}, "notes": []}
        part |= {"source_seconds": samples / signal["rate_hz"]}
        parts[key] = part | {"events": [[1.0, 20.0, "rest", None]]}
    tables, head, _ = manifest.assemble(Discovery(sources), parts, signal, directory.name, False, False)
    store.write_tables(cache, tables | {"build.json": store.canonical_json({"command": "bench"})}, head)
    os.sync()  # only clean pages can be evicted
    return Cache(cache)


def eeg(count: int, samples: int, rate_hz: float, seed: int) -> np.ndarray:
    """x_CT in µV: 1/f noise of 20 µV, alpha, line noise."""
    rng, f_hz, t_s = np.random.default_rng(seed), np.fft.rfftfreq(samples, 1 / rate_hz), np.arange(samples) / rate_hz
    spectrum = rng.normal(size=(2, count, len(f_hz)))
    x_CT = np.fft.irfft((spectrum[0] + 1j * spectrum[1]) / np.sqrt(np.maximum(f_hz, 0.1)), samples)
    x_CT *= 20 / x_CT.std(axis=1, keepdims=True)
    return x_CT + 10 * np.sin(2 * np.pi * 10 * t_s) * (1 + np.sin(0.3 * t_s)) + 3 * np.sin(2 * np.pi * 60 * t_s)


def evict(paths: list[Path]) -> None:
    """Ask the system to forget the content of files."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """What this process has made the disk read so far."""
    return int(next(line for line in open("/proc/self/io") if line.startswith("read_bytes")).split()[1])


def show(title: str, head: tuple[str, ...], rows: list[tuple]) -> None:
    print(f"\n**{title}**\n\n| {' | '.join(head)} |\n|{' - |' * len(head)}")
    for row in rows:
        cells = (v if isinstance(v, str) else f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" for v in row)
        print(f"| {' | '.join(cells)} |", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read(cfg: Config, folder: Path) -> dict:
    count = len(TEN_TWENTY)
    recordings = max(8, (cfg.megabytes << 20) // (2 * SAMPLES * count))
    rng = np.random.default_rng(0)
    noise_TC = rng.standard_normal((2 * SAMPLES, count), np.float32).astype(np.float16)
    cache = write_cache(folder / "cache", recordings, SAMPLES, TEN_TWENTY, noise_TC)
    windows_path, per_recording = folder / "windows.f32", SAMPLES // WINDOW
    twin = np.ascontiguousarray(noise_TC[:SAMPLES].reshape(per_recording, WINDOW, count).swapaxes(1, 2), np.float32)
    with open(windows_path, "wb") as file:
        for _ in range(recordings):
            file.write(twin)
    os.sync()
    return {"warm": read_warm(cfg, cache, windows_path, twin, folder), "cold": read_cold(cfg, cache, windows_path)}


def memmap(path: Path) -> np.ndarray:
    return np.asarray(np.memmap(path, np.float32, "r").reshape(-1, len(TEN_TWENTY), WINDOW))


def from_memmap(path_or_windows, rng, batch: int) -> torch.Tensor:
    """The simplest reader there is: pre-cut float32 windows, by fancy indexing."""
    windows = memmap(path_or_windows) if isinstance(path_or_windows, Path) else path_or_windows
    return torch.from_numpy(windows[rng.integers(0, len(windows), batch)])


def from_cache(windows: Windows, sampler, steps: Iterator[int]) -> torch.Tensor:
    return windows.read(sampler.ids(next(steps))).x_BCT


def shuffles(windows: Windows, batch: int) -> dict[str, Callable]:
    """The two ways of drawing: any window next, or blocks of 16 neighbours."""
    plain = samplers.UniformSampler(len(windows), batch, seed=0, block=1, group=len(windows))
    blocks = samplers.UniformSampler(len(windows), batch, seed=0)
    steps = iter(range(10**9))
    return {
        "Cache, shuffled": partial(from_cache, windows, plain, steps),
        "Cache, shuffled in blocks of 16": partial(from_cache, windows, blocks, steps),
    }


def gather_calls(cfg: Config, cache: Cache, rng) -> tuple[Callable, Callable]:
    """The kernel alone, at any sample of any recording, and its plain-PyTorch meaning."""
    count, fds = len(TEN_TWENTY), np.array([os.open(r.shard, os.O_RDONLY) for r in cache.recordings])
    wide_B = torch.full((cfg.batch,), count)
    map_BC = torch.arange(count, dtype=torch.int32).expand(cfg.batch, -1).contiguous()

    def arguments():
        row_B = rng.integers(0, len(fds), cfg.batch)
        offset_B = store.NPY_HEADER_BYTES + rng.integers(0, SAMPLES - WINDOW, cfg.batch) * 2 * count
        return torch.from_numpy(fds[row_B]), torch.from_numpy(offset_B), wide_B, map_BC, None, None

    def fast():
        kernels.gather_windows(*arguments(), WINDOW, CLIP_SD)

    def plain():
        reference.gather_windows(*arguments(), CLIP_SD, torch.empty(cfg.batch, count, WINDOW))

    return fast, plain


def peers(folder: Path, twin: np.ndarray, rng) -> dict[str, tuple[int, Callable]]:
    """The formats others keep windows in: how many windows a call reads, and the call; what isn't installed is left out."""
    found = {}
    for peer, number in ((hdf5, 64), (zarr_chunks, 8), (compressed_npz, 1), (braindecode_lazy, 8)):
        try:
            name, take = peer(folder, twin, rng)
            found[name] = number, partial(take, number)
        except ImportError as error:
            print(f"left out: {peer.__name__} ({error})", file=sys.stderr)
    return found


def read_warm(cfg: Config, cache: Cache, windows_path: Path, twin: np.ndarray, folder: Path) -> dict:
    rng, in_memory = np.random.default_rng(1), memmap(windows_path)
    in_memory.reshape(-1)[::1024].sum()  # every page is mapped
    for recording in cache.recordings:
        recording.shard.read_bytes()
    baseline = "float32 memmap of windows"
    fast, plain = gather_calls(cfg, cache, rng)
    whole = shuffles(cache.windows(window_s=4.0, stride_s=2.0), cfg.batch)
    threads, quick, b = torch.get_num_threads(), 4 * cfg.rounds, cfg.batch

    # threads, rounds, readers with the windows of a call; each group has the baseline, because slow readers clear the
    # processor's caches for whoever comes next
    groups = [
        (threads, quick, {f"gather_windows, {kernels.path()}": (b, fast)} | {n: (b, c) for n, c in whole.items()})
    ]
    groups += [(1, quick, {f"gather_windows, {kernels.path()}, one thread": (b, fast)})]
    groups += [(threads, cfg.rounds, {"gather_windows, PyTorch": (b, plain)} | peers(folder, twin, rng))]
    found: dict[str, tuple[float, float]] = {}
    for number, rounds, readers in groups:
        torch.set_num_threads(number)
        readers = {baseline: (b, partial(from_memmap, in_memory, rng, b))} | readers
        seconds = interleaved({name: call for name, (_, call) in readers.items()}, rounds)
        speed = {name: readers[name][0] / s for name, s in seconds.items()}
        for name, v in speed.items():
            found.setdefault(name, (v, v / speed[baseline]))
    torch.set_num_threads(threads)
    rows = sorted(((name, *figures) for name, figures in found.items()), key=lambda row: -row[2])
    title = f"Random windows, 21 x 400, as float32, from the page cache, {cfg.batch} a batch"
    show(title, ("reader", "windows/s", "of the memmap"), rows)
    return {name: {"windows_per_s": speed, "ratio": ratio} for name, speed, ratio in rows}


def read_cold(cfg: Config, cache: Cache, windows_path: Path) -> dict:
    rng, shards = np.random.default_rng(2), [r.shard for r in cache.recordings]

    def from_shards():
        """Default mmap of the very shards."""
        for row in rng.integers(0, len(shards), cfg.batch):
            start = rng.integers(0, SAMPLES - WINDOW)
            np.load(shards[row], mmap_mode="r")[start : start + WINDOW].astype(np.float32)

    baseline = "float32 memmap of windows"
    calls = {baseline: partial(from_memmap, windows_path, rng, cfg.batch), "mmap of the shards": from_shards}
    calls |= shuffles(cache.windows(window_s=4.0, stride_s=2.0), cfg.batch)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    wanted = {name: cfg.batch * WINDOW * len(TEN_TWENTY) * (4 if name == baseline else 2) for name in calls}
    fetched = dict.fromkeys(calls, 0)
    for _ in range(max(3, cfg.rounds // 3)):
        for name, call in calls.items():
            evict([windows_path, *shards])
            before, began = bytes_from_disk(), time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
            fetched[name] += bytes_from_disk() - before
    rows = []
    for name, calls_s in seconds.items():
        speed, ratio = cfg.batch / median(calls_s), median(seconds[baseline]) / median(calls_s)
        rows.append((name, speed, ratio, fetched[name] / wanted[name] / len(calls_s)))
    rows.sort(key=lambda row: -row[1])
    show(
        "The same from the disk, page cache evicted",
        ("reader", "windows/s", "of the memmap", "bytes read / wanted"),
        rows,
    )
    return {name: {"windows_per_s": v, "ratio": ratio, "bytes_ratio": n} for name, v, ratio, n in rows}


def hdf5(folder: Path, twin: np.ndarray, rng) -> tuple[str, Callable]:
    import h5py

    file = h5py.File(folder / "windows.h5", "w")
    data = file.create_dataset("x", (8 * len(twin), *twin.shape[1:]), np.float32, chunks=(1, *twin.shape[1:]))
    for i in range(8):
        data[i * len(twin) : (i + 1) * len(twin)] = twin
    return "HDF5, chunk = window", lambda n: torch.from_numpy(
        np.stack([data[i] for i in rng.integers(0, len(data), n)])
    )


def zarr_chunks(folder: Path, twin: np.ndarray, rng) -> tuple[str, Callable]:
    import zarr

    data = zarr.create_array(folder / "windows.zarr", shape=twin.shape, chunks=(1, *twin.shape[1:]), dtype=np.float32)
    data[:] = twin
    return "zarr, chunk = window", lambda n: torch.from_numpy(
        np.stack([data[int(i)] for i in rng.integers(0, len(twin), n)])
    )


def compressed_npz(folder: Path, twin: np.ndarray, rng) -> tuple[str, Callable]:
    np.savez_compressed(folder / "windows.npz", x=twin)

    def take(n: int):
        return torch.from_numpy(
            np.stack([np.load(folder / "windows.npz")["x"][i] for i in rng.integers(0, len(twin), n)])
        )

    return "compressed npz of windows per recording", take


def braindecode_lazy(folder: Path, twin: np.ndarray, rng) -> tuple[str, Callable]:
    import mne
    from braindecode.datasets import BaseConcatDataset, RawDataset
    from braindecode.preprocessing import create_fixed_length_windows

    x_CT = twin.swapaxes(0, 1).reshape(len(TEN_TWENTY), -1) * 1e-6
    raw = mne.io.RawArray(x_CT, mne.create_info(list(TEN_TWENTY), RATE_HZ, "eeg"), verbose="error")
    raw.save(folder / "bench_raw.fif", verbose="error")
    lazy = RawDataset(mne.io.read_raw_fif(folder / "bench_raw.fif", preload=False, verbose="error"))
    cut = {"window_size_samples": WINDOW, "window_stride_samples": WINDOW, "drop_last_window": True, "preload": False}
    windows = create_fixed_length_windows(BaseConcatDataset([lazy]), **cut)
    return "braindecode, lazy fif", lambda n: torch.from_numpy(
        np.stack([windows[i][0] for i in rng.integers(0, len(windows), n)])
    )


# ----------------------------------------------------------------------------------------------------------------------
# Building


def build(cfg: Config, folder: Path) -> dict:
    """CPU seconds per hour of EEG from EDF to shard, in one process, beside MNE's three calls; and how far the signals differ."""
    import mne

    results, rows = {}, []
    signal = build_cache.signal_options(build_cache.Config(), "eeg", [])
    (folder / "build" / "shards").mkdir(parents=True)
    (folder / "build" / "parts").mkdir()
    for names, rate_hz, minutes in ((TEN_TWENTY, 256, cfg.minutes), (HBN, 500, cfg.minutes / 3)):
        path = folder / f"{len(names)}.edf"
        edf.write_edf(path, eeg(len(names), round(minutes * 60) * rate_hz, rate_hz, seed=3), rate_hz, list(names))
        source = Source(f"bench/{path.name}", path, "bench", "folder", (), (), ReadSpec(), subject="1")
        task, kept = Task(source, signal, folder / "build", None), {}

        def ours(task=task, kept=kept):
            kept["part"] = build_cache.cache_recording(task)

        def theirs(path=path, kept=kept):
            raw = mne.io.read_raw_edf(path, preload=True, verbose="error")
            kept["raw"] = raw.filter(0.5, 45.0, verbose="error").resample(RATE_HZ, verbose="error")

        cpu = {"ours": [], "mne": []}
        for turn in range(4):
            for name, call in (("ours", ours), ("mne", theirs)):
                began = time.process_time()
                call()
                if turn:
                    cpu[name].append((time.process_time() - began) / (minutes / 60))
        part = kept["part"]
        assert part["status"] == "cached", part
        x_TC = np.load(folder / "build" / "shards" / part["shard"]).astype(np.float64) * part["scale"] + part["offset"]
        mne_CT = kept["raw"].get_data(picks=[kept["raw"].ch_names.index(n) for n in part["names"]]) * 1e6
        mne_CT -= mne_CT.mean(axis=0)  # the average reference, which the cache has and commutes with the filter
        difference = float(np.sqrt(np.square(x_TC.T - mne_CT).mean() / np.square(mne_CT).mean()))
        us, them = median(cpu["ours"]), median(cpu["mne"])
        rows.append((f"{len(names)} at {rate_hz} Hz", us, them, them / us, f"{difference:.4%}"))
        results[f"{len(names)}"] = {
            "cpu_s_per_h": us,
            "mne_cpu_s_per_h": them,
            "ratio": them / us,
            "rms_difference": difference,
        }
    head = ("channels", "EDF to shard", "MNE read, filter, resample", "ratio", "rms difference")
    show("Building, CPU seconds per EEG-hour", head, rows)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Start-up and sampling


def start(cfg: Config, folder: Path) -> dict:
    """CPU seconds of the pre-flight check and the window index; importing Python packages comes on top of it."""
    write_cache(folder / "cache", cfg.recordings, 1_000, HBN, None)
    cpu = []
    for _ in range(5):
        began = time.process_time()
        cache = Cache(folder / "cache")
        length = len(cache.windows("train"))
        cpu.append(time.process_time() - began)
    show("Start-up", ("recordings", "training windows", "CPU s"), [(len(cache.recordings), length, median(cpu))])
    return {"recordings": len(cache.recordings), "cpu_s": median(cpu)}


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def sample(cfg: Config, folder: Path) -> dict:
    """CPU and memory from nothing to the first batch, and CPU of a batch far into the run."""
    recordings = 70_000  # as many as TUEG
    per_recording = -(-cfg.windows // recordings)
    segments = np.zeros((recordings, 3), np.int64)
    segments[:, 0], segments[:, 2] = np.arange(recordings), WINDOW + (per_recording - 1) * 200
    dataset = ["tuh" if i % 3 else "hbn" for i in range(recordings)]
    subject = [i // 5 for i in range(recordings)]

    def seizures(windows: Windows):
        ids = np.arange(0, len(windows), 100)
        return samplers.SeizureSampler(ids[::2], ids[1::2], len(windows), cfg.batch, 0)

    makers = {
        "uniform, blocks of 16": lambda w: samplers.UniformSampler(len(w), cfg.batch, 0),
        "uniform, plain shuffle": lambda w: samplers.UniformSampler(len(w), cfg.batch, 0, block=1, group=len(w)),
        "dataset weights": lambda w: samplers.DatasetSampler(w.ranges(dataset), {"tuh": 0.3, "hbn": 0.7}, cfg.batch, 0),
        "balanced seizure, 1 % seizure": seizures,
        "subject-balanced": lambda w: samplers.SubjectSampler(w.ranges(subject).values(), cfg.batch, 0),
    }
    rows, results = [], {}
    for name, make in makers.items():
        memory, began = resident_mb(), time.process_time()
        windows = Windows(segments, WINDOW, 200)
        sampler = make(windows)
        windows.locate(sampler.ids(0))
        cpu_s, memory = time.process_time() - began, resident_mb() - memory
        began = time.process_time()
        for step in range(50_000, 50_050):
            windows.locate(sampler.ids(step))
        batch_ms = (time.process_time() - began) / 50 * 1e3
        rows.append((name, cpu_s, memory, batch_ms))
        results[name] = {"cpu_s": cpu_s, "mb": memory, "batch_ms": batch_ms}
        del sampler, windows
    head = ("sampler", "CPU s to the first batch", "MB", "CPU ms per batch")
    show(f"Sampling from {per_recording * recordings:,} windows", head, rows)
    return results


def main(cfg: Config) -> dict:
    print(machine())
    results = {"machine": machine()}
    for name in cfg.parts:
        with tempfile.TemporaryDirectory(dir=cfg.folder) as folder:
            results[name] = {"read": read, "build": build, "start": start, "sample": sample}[name](cfg, Path(folder))
    return results


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config, description=__doc__))))
