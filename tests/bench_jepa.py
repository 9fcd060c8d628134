"""
What pretraining is judged by: a whole step against the peers' forward and backward passes, and against the hardware.

    python tests/bench_jepa.py                               # all of it, about ten minutes on two quiet cores
    python tests/bench_jepa.py --parts peers --channels 19   # one part
    python tests/bench_jepa.py --compile                     # ours compiled, the peers as they come

Ours is one step of train_jepa.py (teacher, context, predictor, loss, backward pass, clipping, AdamW, moving average), masks drawn anew
each time. The peers are braindecode's SignalJEPA and LUNA, in training mode, forward and backward pass alone: it ships no pretraining.
Each at its own patching: 4 s are 4 tokens per channel at 100 Hz for ours, 3 at 128 Hz for SignalJEPA, 12 at 128 Hz for LUNA. Depth,
width and, with the perceiver, queries are equal. Each runs in the number format that it is
fastest in, unless `--dtype` says which. Where 64 windows at a time would take SignalJEPA 15 GB, it gets 16.

Prints tables and, last, one JSON line. Variants take turns; ratios are of two neighbours in time, in wall time and in CPU time, which a busy
machine disturbs less: median (lowest – highest). Needs `pip install --no-deps braindecode` and what it imports (skorch, mne_bids,
torchinfo, docstring_inheritance, pydantic, wfdb, linear_attention_transformer and its three); no torchaudio fits every torch, so an empty stand-in takes its place, in
this process only. Without them the peers' rows are left out, with a word on stderr.
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

import train_jepa
from kernels.bench import machine
from lib.batches import Part
from lib.channels import POSITIONS, PROFILES
from lib.command import keep_freed_memory
from lib.flops import StepCost
from lib.masks import draw_masks
from lib.models import Architecture, build_encoder
from lib.optim import decay_groups, ema_update
from lib.precision import DTYPES, autocast
from lib.prefetch import Prefetch
from lib.samplers import UniformSampler
from tests.bench_cache import show, write_cache
from train_jepa import JEPA, PRESETS, jepa_loss

RATE_HZ, SECONDS = 100.0, 4
TEN_TWENTY = PROFILES["tuh21"].channels
HBN = (*PROFILES["hbn128"].channels, "Cz")
MASK = ("spatiotemporal", 0.6, 0.09, 2)  # the defaults of train_jepa.py
FEWER = 24  # channels of a window in the preset mini
TORCHAUDIO = ("torchaudio", "torchaudio.functional", "torchaudio.transforms")


@dataclass(frozen=True)
class Config:
    parts: tuple[Literal["peers", "share", "profile"], ...] = ("peers", "share", "profile")
    channels: tuple[int, ...] = (19, 62, 129)  # of the windows given to the peers
    batch: int = 64  # windows
    rounds: int = 5  # turns of each variant
    layers: int = 8  # of the transformers in the part `peers`
    width: int = 64  # of the same
    queries: int = 4  # learned electrodes of ours and LUNA
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of ours and the peers; auto: for each the faster one
    compile: bool = False  # ours
    threads: int = 0  # 0: as many as torch takes
    folder: Path = Path(tempfile.gettempdir())  # for the cache that the profile reads, removed again


# ----------------------------------------------------------------------------------------------------------------------
# Ours


def names_of(channels: int) -> tuple[str, ...]:
    return TEN_TWENTY[:channels] if channels <= len(TEN_TWENTY) else HBN[:channels]


class Step:
    """A whole pretraining step on made-up windows."""

    def __init__(
        self, architecture: Architecture, batch: int, channels: int, dtype: str = "float32", compiled: bool = False
    ):
        torch.manual_seed(0)
        self.model = JEPA(build_encoder(architecture).train(), "prelocal", 2, [])
        self.teacher = copy.deepcopy(self.model.encoder).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, 0.05), lr=1e-4, fused=True)
        self.loss_of = torch.compile(jepa_loss) if compiled else jepa_loss
        self.architecture, self.dtype, self.count = architecture, dtype, 0
        positions_BC3 = torch.tensor([POSITIONS[n] for n in names_of(channels)]).repeat(batch, 1, 1)
        samples = round(SECONDS * RATE_HZ) // architecture.patch * architecture.patch
        x_BCT = torch.randn(batch, channels, samples)
        self.part = Part(x_BCT, positions_BC3, None, np.arange(batch), np.zeros(batch, np.int64))
        self.hide()

    def hide(self) -> None:
        kind, ratio, radius_m, length = MASK
        batch, channels, samples = self.part.x_BCT.shape
        good_BC, patches = torch.ones(batch, channels, dtype=torch.bool), samples // self.architecture.patch
        shape = (kind, self.part.positions_BC3, good_BC, patches, ratio, radius_m, length)
        self.part.masks = draw_masks(*shape, 0, self.count, self.part.index_B)
        self.count += 1

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        ema_update(self.teacher, self.model.encoder, 0.996)
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.hide()
        with autocast("cpu", self.dtype):
            loss_B, _, level_BD = self.loss_of(self.model, self.teacher, self.part)
        loss_B.mean().backward()
        self.update()
        self.model.centre_D.lerp_(level_BD.mean(0), 0.1)


# ----------------------------------------------------------------------------------------------------------------------
# The peers


class Stand(types.ModuleType):
    """In place of a package that nothing measured here calls: any class asked of it exists and does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def peers():
    """braindecode's models, or None."""
    if not importlib.util.find_spec("braindecode"):
        print("braindecode is not installed: its rows are left out", file=sys.stderr)
        return None
    if not importlib.util.find_spec("torchaudio"):
        for name in TORCHAUDIO:
            module = sys.modules[name] = Stand(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None), []
            if parent := name.rpartition(".")[0]:
                setattr(sys.modules[parent], name.rpartition(".")[2], module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import braindecode.models

    return braindecode.models


def electrodes(channels: int) -> list[dict]:
    """Channels as MNE describes them; the first three numbers of `loc` are the electrode's position."""
    return [{"ch_name": n, "kind": "eeg", "loc": np.array([*POSITIONS[n], *[0.0] * 9])} for n in names_of(channels)]


def passes(model: torch.nn.Module, x_BCT: torch.Tensor, dtype: str) -> Callable[[], None]:
    """Forward and backward pass."""

    def run() -> None:
        with autocast("cpu", dtype):
            loss = model(x_BCT).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def turns(variants: dict[str, tuple[Callable, int]], rounds: int) -> dict[str, np.ndarray]:
    """Wall and CPU seconds per window (rounds, 2) of variants that take turns, each a function and the windows it treats."""
    seconds = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, (run, windows) in variants.items():
            began = np.array([time.perf_counter(), time.process_time()])
            run()
            if turn:  # the first isn't counted
                seconds[name].append((np.array([time.perf_counter(), time.process_time()]) - began) / windows)
    return {name: np.array(values) for name, values in seconds.items()}


def spread(ratio_R: np.ndarray) -> str:
    return f"{np.median(ratio_R):.1f} ({ratio_R.min():.1f} – {ratio_R.max():.1f})"


def fastest(build: Callable[[str], Callable], dtype: str) -> tuple[Callable, str]:
    """What `build` makes of a number format, of both the one that runs faster for `auto`, and the format."""
    made = {d: build(dtype=d) for d in (DTYPES if dtype == "auto" else [dtype])}
    seconds = turns({d: (run, 1) for d, run in made.items()}, 2 if len(made) > 1 else 0)
    chosen = min(made, key=lambda d: seconds[d][:, 0].min() if len(made) > 1 else 0)
    return made[chosen], chosen


def compare_peers(cfg: Config) -> dict:
    models, rows, results = peers(), [], {}
    for channels in cfg.channels:
        sizes = dict(
            d_model=cfg.width, layers=cfg.layers, heads=cfg.width // 32, rate_hz=RATE_HZ, patch=100, relations=True
        )
        queries = dict(adapter="perceiver", queries=cfg.queries)
        ours = {
            "ours": (sizes, channels),
            "ours, heads as narrow as the peer's": (sizes | dict(heads=8), channels),
            "ours, 3 tokens per channel as the peer": (sizes | dict(patch=133), channels),
            f"ours, {cfg.queries} queries": (sizes | queries, channels),
            f"ours, {FEWER} of the channels as in mini": (sizes, min(channels, FEWER)),
        }
        wanted = {  # name: windows, what makes it of a number format, which format
            name: (
                cfg.batch,
                functools.partial(Step, Architecture(**sizes), cfg.batch, seen, compiled=cfg.compile),
                cfg.dtype,
            )
            for name, (sizes, seen) in ours.items()
        }
        if models:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                described = dict(chs_info=electrodes(channels), sfreq=128, n_outputs=2)
                signal_jepa = models.SignalJEPA(n_times=512, transformer__d_model=cfg.width,
                                                transformer__num_encoder_layers=cfg.layers, **described)  # fmt: skip
                luna = models.LUNA(n_chans=channels, n_times=480, embed_dim=cfg.width, depth=cfg.layers,
                                   num_queries=cfg.queries, **described)  # fmt: skip
            windows = min(cfg.batch, 16 if channels > 100 else 64)
            jepa = functools.partial(passes, signal_jepa, torch.randn(windows, channels, 512))
            wanted["SignalJEPA"] = windows, jepa, cfg.dtype
            if cfg.dtype == "auto":
                wanted["SignalJEPA in float32"] = windows, jepa, "float32"
            wanted["LUNA"] = (
                cfg.batch,
                functools.partial(passes, luna, torch.randn(cfg.batch, channels, 480)),
                cfg.dtype,
            )
        variants, formats = {}, {}
        for name, (windows, build, dtype) in wanted.items():
            run, formats[name] = fastest(build, dtype)
            variants[name] = run, windows
        seconds = turns(variants, cfg.rounds)
        for name, seconds_R2 in seconds.items():
            wall, cpu = np.median(seconds_R2, axis=0)
            against = {peer: seconds[peer] / seconds_R2 for peer in ("SignalJEPA", "LUNA") if peer in seconds}
            rows.append(
                (
                    str(channels),
                    name,
                    formats[name],
                    1 / wall,
                    *(spread(r[:, i]) for r in against.values() for i in (0, 1)),
                )
            )
            medians = {peer: np.median(r, axis=0).tolist() for peer, r in against.items()}
            results[f"{channels} {name}"] = {
                "dtype": formats[name],
                "windows_per_s": 1 / wall,
                "cpu_ms": 1e3 * cpu,
                "ratios": medians,
            }
    heads = tuple(
        f"{unit} / {peer}'s" for peer in (("SignalJEPA", "LUNA") if models else ()) for unit in ("×", "×, CPU")
    )
    show(
        f"A step of ours, passes of theirs, {cfg.layers} × {cfg.width}", ("channels", "", "", "windows/s", *heads), rows
    )
    return results


# ----------------------------------------------------------------------------------------------------------------------
# The hardware


def preset(name: str) -> Architecture:
    sizes = dataclasses.replace(train_jepa.Config(), **PRESETS[name])
    patch = round(sizes.patch_s * RATE_HZ)
    return Architecture(sizes.encoder, sizes.d_model, sizes.layers, sizes.heads, RATE_HZ, patch, relations=True)


def share(cfg: Config) -> dict:
    """How much of the rate of a large matrix product a step reaches."""
    rows, results = [], {}
    for name, batch, channels in (("mini", 64, 21), ("mini", 64, 24), ("base", 16, 21)):
        own = functools.partial(Step, preset(name), batch, channels, compiled=cfg.compile)
        step, dtype = fastest(own, cfg.dtype)
        a_NN = torch.randn(1024, 1024).to(DTYPES[dtype])

        def product(a_NN: torch.Tensor = a_NN) -> None:
            for _ in range(20):
                a_NN @ a_NN

        flops = StepCost(lambda part, step=step: jepa_loss(step.model, step.teacher, part)[0], step.model)(step.part)
        seconds = turns({"step": (step, 1), "product": (product, 1)}, cfg.rounds)
        rate_R2 = flops / seconds["step"]
        share_R2 = 100 * rate_R2 / (20 * 2 * 1024**3 / seconds["product"])
        shape = f"{name}, {batch} × {channels} channels"
        rows.append(
            (shape, dtype, flops / 1e9, np.median(rate_R2[:, 0]) / 1e9, spread(share_R2[:, 0]), spread(share_R2[:, 1]))
        )
        results[shape] = {"dtype": dtype, "gflop": flops / 1e9, "share": np.median(share_R2, axis=0).tolist()}
    head = ("step", "", "GFLOP", "GFLOP/s", "% of a large product's rate", "the same, CPU time")
    show("Matrix products, beside a large one of the same format", head, rows)
    return results


def profile(cfg: Config) -> dict:
    """Where a step of the preset mini goes, and what it waits for its windows."""
    run, patch = train_jepa.Config(), round(RATE_HZ)
    with tempfile.TemporaryDirectory(dir=cfg.folder) as folder:
        noise_TC = np.random.default_rng(0).standard_normal((200_000, len(TEN_TWENTY)), np.float32).astype(np.float16)
        cache = write_cache(Path(folder) / "cache", 32, 100_000, TEN_TWENTY, noise_TC)
        windows = cache.windows("train", run.window_s, run.stride_s)
        sampler = UniformSampler(len(windows), run.batch, 0)

        def draw(step: int) -> list[Part]:
            return train_jepa.draw(windows, sampler.ids(step), np.arange(run.batch), run, 0, patch, step)

        step, dtype = fastest(functools.partial(Step, preset("mini"), run.batch, len(TEN_TWENTY)), cfg.dtype)
        seconds: dict[str, list] = {}
        for turn in range(3 * cfg.rounds + 1):
            for stage, took in stages(step, draw, turn, dtype).items():
                seconds.setdefault(stage, []).append(took)
        medians = {stage: statistics.median(values[1:]) for stage, values in seconds.items()}
        loader, began = Prefetch(draw, 0, 5 * cfg.rounds, shares=True), time.perf_counter()
        for _, (part,) in loader:
            step.part = part
            step()
        wait = loader.waited_s / (time.perf_counter() - began)
        loader.close()
    total = sum(medians.values())
    rows = [(stage, 1e3 * took, f"{took / total:.0%}") for stage, took in medians.items()]
    show(f"A step of mini, {run.batch} × {len(TEN_TWENTY)} channels, {dtype}", ("", "ms", "share"), rows)
    print(f"\nWaiting for windows that a thread reads ahead: {wait:.1%} of the time")
    return {"ms": {stage: 1e3 * took for stage, took in medians.items()}, "loader_wait": wait}


def stages(step: Step, draw: Callable[[int], list[Part]], turn: int, dtype: str) -> dict[str, float]:
    """Seconds of the stages of one step, in the order in which they run."""
    times = [time.perf_counter()]

    def lap(result):
        times.append(time.perf_counter())
        return result

    (part,) = lap(draw(turn))
    m, patches = part.masks, part.x_BCT.shape[2] // step.architecture.patch
    with autocast("cpu", dtype):
        with torch.no_grad():
            z_BND = lap(step.teacher(*part.signal))
        z_BKD = lap(step.model.context(part)[0])
        places = (part.positions_BC3, patches, m.context_BK, m.target_BM, m.context_real_BK, m.target_real_BM)
        predicted_BMD = lap(step.model.predictor(z_BKD, *places))
        target_BMD = train_jepa.layer_normed(train_jepa.take(z_BND, m.target_BM) - step.model.centre_D)
        loss = lap(train_jepa.loss_latent(predicted_BMD, target_BMD, m.target_real_BM).mean())
    lap(loss.backward())
    lap(step.update())
    names = (
        "reading, masks (in a thread)",
        "teacher",
        "context",
        "predictor",
        "targets, loss",
        "backward",
        "clip, AdamW, EMA",
    )
    return dict(zip(names, np.diff(times), strict=True))


def main(cfg: Config) -> dict:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    print(machine())
    results = {
        "machine": machine(),
        "load": os.getloadavg()[0],
        "config": json.loads(json.dumps(dataclasses.asdict(cfg), default=str)),
    }
    for name in sorted(cfg.parts, key=lambda name: name != "peers"):  # the peers first: they keep no memory
        if name != "peers":
            keep_freed_memory()  # as the command does
        results[name] = {"peers": compare_peers, "share": share, "profile": profile}[name](cfg)
    return results


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config, description=__doc__))))
