"""
Time every kernel against its plain-PyTorch meaning and against what this machine copies and multiplies.

    python kernels/bench.py
    BERGER_KERNELS=cuda python kernels/bench.py    # on a GPU: CUDA C++ instead of Triton

Prints a table and, last, one JSON line. Variants of a row take turns, so that a busy machine slows all of them alike; figures are
medians. Bytes are what an operation must read and write, and the share compares their rate with that of a large torch copy; operations
that compute more than they move also have their multiply-adds compared with a large matrix product. Speed-up is against the first row
of an operation. Everything runs on the GPU if there is one, but for the window gather and the filter of NumPy arrays. Last, train_jepa.py
runs on made-up recordings with kernels on and off: the logs must be the same to PHASE_TOLERANCE, and the speeds are printed.
"""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.signal
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

import kernels
from kernels import plain, reference

ROOT = Path(__file__).resolve().parent.parent
PHASE_TOLERANCE = 1e-3  # relative, of any logged loss or gradient norm; training amplifies rounding step by step
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Config:
    rounds: int = 15  # turns per variant
    megabytes: int = 256  # of float16 on disk, several times the processor's caches; read warm
    threads: int = 0  # 0: as many as torch takes
    cpu_time: bool = False  # of the process instead of the wall's, for a machine that others use; take --threads 1
    compile: bool = True  # torch.compile of the plain forms too: a minute more
    only: str = ""  # operations whose name contains this
    phase_steps: int = 12  # of train_jepa.py with kernels on and off, twice each: some minutes; 0: none


@dataclass
class Case:
    """One row group: what is done, its ways, the bytes it must move, its floating-point operations."""

    name: str
    variants: dict[str, Callable]
    bytes: int
    flops: int = 0
    repeats: int = 1  # calls per turn, for those of microseconds
    dtype: torch.dtype = torch.float32  # of the large product that it is compared with


def interleaved(
    variants: dict[str, Callable], rounds: int, repeats: int = 1, clock=time.perf_counter
) -> dict[str, float]:
    """Median seconds per call of each variant; they take turns, after one turn that isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            began = clock()
            for _ in range(repeats):
                variant()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append((clock() - began) / repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    """What ran the benchmark, in general terms."""
    gpu = f", {torch.cuda.get_device_name()}" if DEVICE == "cuda" else ""
    return f"{os.cpu_count()} cores {platform.machine()}{gpu}, torch {torch.__version__}, {torch.get_num_threads()} threads"


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
        starts, step = self.starts
        draws = np.random.default_rng(1).integers(0, starts, (64, windows)) * step
        self.draws = itertools.cycle(list(torch.from_numpy(draws)))  # beforehand, as a loader draws them
        self.fds = torch.full((windows,), self.fd)
        self.copied = torch.zeros(2, self.bytes // 2, dtype=torch.uint8)

    def call(self, implementation: Callable) -> None:
        implementation(self.fds, next(self.draws), *self.args, clip=15.0, out=self.out)

    def case(self) -> Case:
        def plain(*args, clip, out):
            reference.gather_windows(*args, clip, out)

        def fast(*args, clip, out):
            kernels.gather_windows(*args, out.shape[-1], clip=clip, out=out)

        variants = {"PyTorch": lambda: self.call(plain), kernels.path(): lambda: self.call(fast)}
        variants["memcpy of as many bytes"] = lambda: self.copied[0].copy_(self.copied[1])
        return Case(self.name, variants, self.bytes)


GATHERS = [(256, 21, 400, torch.float32), (256, 21, 400, torch.bfloat16), (8, 21, 400, torch.float32)]
GATHERS += [(64, 21, 6000, torch.float32), (256, 128, 400, torch.float32)]  # a minute of 10-20, and HBN's montage


def gathers(cfg: Config, folder: Path) -> Iterator[Case]:
    for shape in GATHERS:
        yield WindowGather(folder, cfg.megabytes, *shape).case()


def backward(function: Callable, leaves: list[torch.Tensor]) -> Callable:
    """Forward and backward pass of a function of these leaves."""

    def work():
        y = function()
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return work


def compiled(cfg: Config, function: Callable) -> dict[str, Callable]:
    return {"torch.compile": torch.compile(function, dynamic=False)} if cfg.compile else {}


def tokens(cfg: Config, folder: Path) -> Iterator[Case]:
    """The context tokens of a batch, as lib/models.py makes them; P = 4 patches, 40 % of the tokens seen."""
    for B, C, D, dtype in ((64, 21, 128, torch.float32), (256, 21, 512, torch.float32), (256, 64, 512, torch.bfloat16)):
        K = round(0.4 * C * 4)
        x, space, time_PD = (torch.randn(*s, D, device=DEVICE).to(dtype) for s in ((B, 4 * C), (B, C), (4,)))
        ids = torch.stack([torch.randperm(4 * C)[:K] for _ in range(B)]).to(DEVICE)
        leaves = [x.requires_grad_(), space.requires_grad_()]
        ways = {"PyTorch": reference.embed_tokens} | compiled(cfg, reference.embed_tokens)
        ways[kernels.path(DEVICE)] = kernels.embed_tokens
        forward = {name: partial(f, x, space, time_PD, ids) for name, f in ways.items()}
        size, bytes = (
            f"{B} x {K} of {4 * C} x {D} {str(dtype)[6:]}",
            x.element_size() * D * (2 * B * K + B * C) + 8 * B * K,
        )
        quiet = {name: torch.no_grad()(f) for name, f in forward.items()}
        yield Case(f"embed_tokens {size}", quiet, bytes)
        both = {name: backward(f, leaves) for name, f in forward.items()}
        yield Case(f"embed_tokens, forward and backward, {size}", both, bytes + x.element_size() * D * B * (K + 5 * C))


def averages(cfg: Config, folder: Path) -> Iterator[Case]:
    """The parameters of an encoder of some depth and width."""
    for layers, d, student, copied in (
        (4, 128, torch.float32, False),
        (12, 512, torch.float32, False),
        (12, 512, torch.bfloat16, True),
    ):
        shapes = [
            s
            for _ in range(layers)
            for s in ((3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,), (d,))
        ]
        t = [torch.randn(s, device=DEVICE) for s in shapes]
        new, copies = [x.to(student) for x in t], [x.bfloat16() for x in t] if copied else None

        def plainly(t=t, new=new, copies=copies):
            torch._foreach_lerp_(t, [x.float() for x in new] if copies else new, 0.004)
            if copies:
                torch._foreach_copy_(copies, t)

        ways = {
            "PyTorch (foreach)": plainly,
            "PyTorch (loop)": lambda t=t, n=new, c=copies: reference.ema_(t, n, 0.996, c),
        }
        ways[kernels.path(DEVICE)] = lambda t=t, n=new, c=copies: kernels.ema_(t, n, 0.996, c)
        count = sum(x.numel() for x in t)
        name = f"ema_ {len(t)} tensors, {count / 1e6:.1f} M, {str(student)[6:]}{', bfloat16 copies' if copied else ''}"
        yield Case(name, ways, count * (8 + new[0].element_size() + 2 * copied))


def filters(cfg: Config, folder: Path) -> Iterator[Case]:
    """The live filter: 0.5 to 45 Hz of order 4 and a notch, chunk by chunk, and a recording in one call."""
    sos = [
        scipy.signal.butter(4, (0.5, 45), "bandpass", fs=256, output="sos"),
        scipy.signal.tf2sos(*scipy.signal.iirnotch(50, 30, 256)),
    ]
    sos_S6 = np.concatenate(sos)
    on_device = torch.from_numpy(sos_S6).to(DEVICE)
    for C, T in ((21, 1), (21, 8), (21, 32), (129, 1), (129, 8), (129, 32), (21, 100_000)):
        x_CT, state = np.random.default_rng(0).normal(size=(C, T)), np.zeros((len(sos_S6), 2, C))
        zi, sections = state.swapaxes(1, 2).copy(), plain.Sections(sos_S6, state)
        x, z = torch.from_numpy(x_CT).to(DEVICE), torch.from_numpy(state).to(DEVICE)
        ways = {
            "scipy.signal.sosfilt": lambda x=x_CT, zi=zi: scipy.signal.sosfilt(sos_S6, x, axis=1, zi=zi),
            "c++, NumPy arrays": lambda x=x_CT, f=sections: f(x),
            f"{kernels.path(DEVICE)}, tensors": lambda x=x, z=z: kernels.sos_stream(x, on_device, z),
        }
        yield Case(f"sos_stream {C} x {T}", ways, 16 * C * T, 9 * len(sos_S6) * C * T, max(1, 3000 // T))


def chunked(u, fade, b, c, ahead):
    """The plain form that lib/mamba.py falls back to, both ways."""
    from lib.mamba import selective_scan  # the one place where kernels/ looks at lib/

    turned = (t.flip(1) for t in (u[..., ahead:], fade[..., ahead:], b, c))
    y = selective_scan(u[..., :ahead], fade[..., :ahead], b, c)
    return torch.cat([y, selective_scan(*turned).flip(1)], 2)


def scans(cfg: Config, folder: Path) -> Iterator[Case]:
    """A block of the encoder, d = 128 and 768, over windows of 4 s, and a recording at 4 steps a second."""
    for R, L, E in ((64 * 21, 16, 64), (64 * 21, 16, 384), (64, 1000, 64)):
        S = 16
        x = torch.randn(R, L, 2 * E + 2 * S, device=DEVICE)
        x[..., E : 2 * E].abs_()
        x.requires_grad_()

        def call(f, x=x, sizes=(E, E, S, S)):
            return f(*x.split(sizes, 2), sizes[0] // 2)

        ways = {"PyTorch, step by step": reference.selective_scan, "PyTorch, chunked": chunked}
        ways |= {f"{name}, chunked": f for name, f in compiled(cfg, chunked).items()} if L <= 16 else {}
        ways[kernels.path(DEVICE)] = kernels.selective_scan
        size, values = f"{R} x {L} x {E}, {S} states", 4 * R * L
        quiet = {name: torch.no_grad()(lambda f=f: call(f)) for name, f in ways.items()}
        yield Case(f"selective_scan {size}", quiet, values * (3 * E + 2 * S), 5 * R * L * E * S)
        both = {name: backward(lambda f=f: call(f), [x]) for name, f in ways.items()}
        yield Case(f"selective_scan, forward and backward, {size}", both, values * (9 * E + 6 * S), 18 * R * L * E * S)


def attentions(cfg: Config, folder: Path) -> Iterator[Case]:
    """Of a layer's heads, as slices of one row of them: narrow encoders at 19 and 62 channels, the presets mini and base at 21."""
    fused = torch.nn.functional.scaled_dot_product_attention
    for B, N, D, H, dtype in (
        (64, 76, 64, 2, torch.bfloat16),
        (64, 248, 64, 2, torch.bfloat16),
        (64, 84, 128, 4, torch.bfloat16),
        (16, 84, 512, 8, torch.bfloat16),
        (64, 84, 128, 4, torch.float32),
    ):
        x = torch.randn(B, N, 3 * D, device=DEVICE, dtype=dtype).requires_grad_()

        def call(f, x=x, heads=H):
            q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in x.chunk(3, 2))
            return f(q, k, v).transpose(1, 2).flatten(2)

        def meant(q, k, v):
            return (q @ k.mT * q.shape[3] ** -0.5).softmax(3) @ v

        ways = {"PyTorch, fused": fused, "PyTorch, its parts": meant}
        ways |= {f"{name}, its parts": f for name, f in compiled(cfg, meant).items()}
        ways[kernels.path(DEVICE)] = kernels.attend
        size, flops = f"{B} x {N} x {D}, {H} heads, {str(dtype)[6:]}", 4 * B * N * N * D
        quiet = {name: torch.no_grad()(lambda f=f: call(f)) for name, f in ways.items()}
        yield Case(f"attend {size}", quiet, 4 * x.element_size() * B * N * D, flops, dtype=dtype)
        both = {name: backward(lambda f=f: call(f), [x]) for name, f in ways.items()}
        bytes = 11 * x.element_size() * B * N * D
        yield Case(f"attend, forward and backward, {size}", both, bytes, 7 * flops // 2, dtype=dtype)


def run_script(words: str, env: dict[str, str]) -> None:
    """One of the repository's scripts with its flags; raises CalledProcessError."""
    subprocess.run([sys.executable, *words.split()], cwd=ROOT, env=env, check=True, capture_output=True)


def phases(cfg: Config, folder: Path) -> Iterator[dict]:
    """A short pretraining with kernels and without, in turns: how far the logs are apart, and how fast each was."""
    (folder / "raw").mkdir()
    rng, names = np.random.default_rng(0), "Fp1 Fp2 F7 F3 Fz F4 F8 T7 C3 Cz C4 T8 P7 P3 Pz P4 P8 O1 Oz O2".split()
    for subject in range(8):
        x_TC = 20 * rng.standard_normal((12_000, len(names)))
        np.savetxt(folder / f"raw/s{subject:02d}.csv", x_TC, "%.3f", ",", header=",".join(names), comments="")
    off = os.environ | {"BERGER_KERNELS": "0"}
    on = {name: value for name, value in os.environ.items() if (name, value) != ("BERGER_KERNELS", "0")}
    run_script(f"build_cache.py --source {folder}/raw --cache {folder}/cache --source-rate-hz 200 --source-unit uV", on)
    flags = f"--cache {folder}/cache --steps {cfg.phase_steps} --log-every 1 --val-windows 16 --probe-windows 16 --dtype float32"
    for encoder in ("transformer", "mamba"):
        logs = {"off": [], "on": []}
        for seed in range(2):
            for name, env in (("off", off), ("on", on)):
                run = folder / f"{encoder}-{name}-{seed}"
                run_script(f"train_jepa.py {flags} --encoder {encoder} --seed {seed} --name {run}", env)
                lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
                logs[name] += [line for line in lines if line["step"] > 1]  # the first has what is done once
        pairs = [(a[k], b[k]) for a, b in zip(*logs.values(), strict=True) for k in ("loss", "grad_norm")]
        apart = max(abs(a / b - 1) for a, b in pairs)
        # the fastest step: other work on the machine slows some, at random
        slow, fast = (max(line["windows_per_s"] for line in log) for log in logs.values())
        speeds = f"{slow:.1f} windows/s without kernels, {fast:.1f} with ({fast / slow:.2f} x)"
        print(f"train_jepa.py --encoder {encoder}: {speeds}; logs apart by {apart:.1e}", flush=True)
        assert apart <= PHASE_TOLERANCE, f"{encoder}: {apart} is more than {PHASE_TOLERANCE}"
        yield {
            "phase": f"train_jepa {encoder}",
            "off": slow,
            "on": fast,
            "speed_up": round(fast / slow, 3),
            "apart": apart,
        }


def main(cfg: Config) -> dict:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    clock = time.process_time if cfg.cpu_time else time.perf_counter
    rows, source, target = [], *torch.zeros(2, 32 << 20, device=DEVICE)
    factors = {dtype: torch.randn(2, 1024, 1024, device=DEVICE).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(machine())
    columns = "operation | implementation | ms | GB/s | share of copy | GFLOP/s | share of product | speed-up"
    print(f"\n| {columns} |\n|{' - |' * 8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cases = (
            case
            for group in (gathers, tokens, averages, filters, scans, attentions)
            for case in group(cfg, Path(folder))
        )
        for case in (case for case in cases if cfg.only in case.name):
            a, b = factors[case.dtype]
            ceilings = {"copy": lambda: target.copy_(source), "product": lambda a=a, b=b: torch.mm(a, b)}
            limits = interleaved(ceilings, 5, clock=clock)
            copy_rate, product_rate = 2 * source.nbytes / limits["copy"], 2 * 1024**3 / limits["product"]
            seconds = interleaved(case.variants, cfg.rounds, case.repeats, clock)
            first = next(iter(seconds.values()))
            for name, s in seconds.items():
                row = {
                    "op": case.name,
                    "path": name,
                    "ms": float(f"{s * 1e3:.4g}"),
                    "bytes": case.bytes,
                    "flops": case.flops,
                }
                row |= {"gb_per_s": round(case.bytes / s / 1e9, 2), "copy_share": round(case.bytes / s / copy_rate, 3)}
                row |= {
                    "gflop_per_s": round(case.flops / s / 1e9, 2),
                    "product_share": round(case.flops / s / product_rate, 3),
                }
                row["speed_up"] = round(first / s, 2)
                rows.append(row)
                print("| " + " | ".join(str(row[k]) for k in row if k not in ("bytes", "flops")) + " |", flush=True)
        print()
        runs = list(phases(cfg, Path(folder))) if cfg.phase_steps else []
    return {"machine": machine(), "rows": rows, "phases": runs}


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config, description=__doc__))))
