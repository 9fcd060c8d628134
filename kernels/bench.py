"""
Time every kernel against its plain-PyTorch meaning and against this machine's own copy bandwidth.

    python kernels/bench.py

Prints a table and, last, one JSON line. Variants of a row take turns, so that a busy machine slows all of them alike; figures are
medians. Bytes are what an operation must read and write; the share compares their rate with that of a large torch copy.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

import kernels
from kernels import reference


@dataclass(frozen=True)
class Config:
    rounds: int = 15  # turns per variant
    megabytes: int = 256  # of float16 on disk, several times the processor's caches; read warm
    threads: int = 0  # 0: as many as torch takes


def interleaved(variants: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds per call of each variant; they take turns, after one turn that isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    """What ran the benchmark, in general terms."""
    return f"{os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


class WindowGather:
    """Random windows of one file in the page cache, with gain and bias."""

    def __init__(self, folder: Path, megabytes: int, windows: int, channels: int, samples: int, dtype: torch.dtype):
        self.name = f"gather_windows {windows} x {channels} x {samples} {str(dtype).removeprefix('torch.')}"
        path = folder / f"{channels}"
        if not path.exists():
            np.random.default_rng(0).standard_normal((megabytes << 19) // channels * channels, np.float32).astype(
                np.float16
            ).tofile(path)
        self.fd = os.open(path, os.O_RDONLY)
        self.starts = (os.fstat(self.fd).st_size // 2 // channels - samples, 2 * channels)
        self.args = [
            torch.full((windows,), channels),
            torch.arange(channels, dtype=torch.int32).expand(windows, -1).contiguous(),
        ]
        self.args += [torch.rand(windows, channels), torch.rand(windows, channels)]
        self.out = torch.empty(windows, channels, samples, dtype=dtype)
        self.bytes = self.out.numel() * (2 + self.out.element_size())
        self.rng = np.random.default_rng(1)

    def call(self, implementation: Callable) -> None:
        starts, step = self.starts
        offsets_B = torch.from_numpy(self.rng.integers(0, starts, len(self.out)) * step)
        implementation(torch.full_like(offsets_B, self.fd), offsets_B, *self.args, clip=15.0, out=self.out)

    def variants(self) -> dict[str, Callable]:
        def plain(*args, clip, out):
            reference.gather_windows(*args, clip, out)

        def fast(*args, clip, out):
            kernels.gather_windows(*args, out.shape[-1], clip=clip, out=out)

        found = {"PyTorch": lambda: self.call(plain)}
        return found if kernels.path() == "reference" else found | {kernels.path(): lambda: self.call(fast)}


CASES = [(256, 21, 400, torch.float32), (256, 21, 400, torch.bfloat16), (8, 21, 400, torch.float32)]
CASES += [(64, 21, 6000, torch.float32), (256, 128, 400, torch.float32)]  # a minute of 10-20, and HBN's montage


def main(cfg: Config) -> dict:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    source, target, rows = torch.zeros(32 << 20), torch.zeros(32 << 20), []
    print(machine())
    print("\n| operation | implementation | ms | GB/s | share of copy | speed-up |\n| - | - | - | - | - | - |")
    with tempfile.TemporaryDirectory() as folder:
        for case in (WindowGather(Path(folder), cfg.megabytes, *shape) for shape in CASES):
            seconds = interleaved(case.variants() | {"copy": lambda: target.copy_(source)}, cfg.rounds)
            copy_rate = 2 * source.nbytes / seconds.pop("copy")
            for name, s in seconds.items():
                row = {"op": case.name, "path": name, "ms": round(s * 1e3, 3), "bytes": case.bytes}
                row |= {"gb_per_s": round(case.bytes / s / 1e9, 2), "copy_share": round(case.bytes / s / copy_rate, 3)}
                row["speed_up"] = round(max(seconds.values()) / s, 1)
                rows.append(row)
                print("| " + " | ".join(str(row[k]) for k in row if k != "bytes") + " |", flush=True)
    return {"machine": machine(), "rows": rows}


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config, description=__doc__))))
