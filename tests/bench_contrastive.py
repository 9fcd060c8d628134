"""
Where a step of train_contrastive.py goes: what pairs, views, gather and loss cost beside the encoder.

    python tests/bench_contrastive.py                                                   # on cache/demo, preset mini
    torchrun --standalone --nproc-per-node 2 tests/bench_contrastive.py                 # with a real gather

Stages run one after the other here, each timed by itself; in training pairs are drawn and windows read by a thread, and what is waited for it
is measured by that thread's queue over whole steps. Prints a table and, last, one JSON line (on the first process). Medians.
"""

import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

import train_contrastive
from kernels.bench import machine
from lib.cache import Cache
from lib.models import start_encoder
from lib.optim import decay_groups
from lib.precision import autocast
from lib.prefetch import Prefetch
from lib.ranks import join
from tests.bench_cache import show
from train_contrastive import Aligned, draw, pair_sampler, pull

PARALLEL = "pairs, windows and views (in a thread)"


@dataclass(frozen=True)
class Config:
    cache: str = "cache/demo"  # with movies that several people saw
    pairs: tuple[str, ...] = ("movie:1",)
    batch: int = 32  # pairs
    rounds: int = 40  # steps
    dtype: str = "float32"


def main(cfg: Config) -> dict | None:
    ranks, cache = join("cpu"), Cache(cfg.cache)
    run = replace(train_contrastive.Config(), cache=(cfg.cache,), pairs=cfg.pairs, batch=cfg.batch)
    torch.manual_seed(0)
    sizes = (run.encoder, run.d_model, run.layers, run.heads, run.adapter, run.queries)
    encoder, _ = start_encoder(None, cache, run.patch_s, *sizes)
    model = Aligned(encoder.train(), run)
    optimizer = torch.optim.AdamW(decay_groups(model, run.weight_decay), lr=1e-4, fused=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [i for i, r in enumerate(cache.recordings) if r.split == "train"]
    sampler, share = pair_sampler(run, cache, rows), ranks.share(cfg.batch)
    patch = encoder.architecture.patch

    def read(step: int):
        return draw(cache, sampler, share, run, 0, patch, step)

    def learn(views) -> dict[str, float]:
        times = [time.perf_counter()]
        with autocast("cpu", cfg.dtype):
            projected = [model(part) for part in views.parts]
        times.append(time.perf_counter())
        _, pull_VE, told = pull(model, projected, views, run, ranks)
        times.append(time.perf_counter())
        model.project.log_temperature.grad = told
        for part, y_BE in zip(views.parts, projected, strict=True):
            (y_BE * pull_VE[part.index_B]).sum().backward()
        times.append(time.perf_counter())
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        ranks.sum([p.grad for p in parameters], [0.0])
        nn.utils.clip_grad_norm_(parameters, run.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        names = ("encoder and projection", "gather and loss", "backward pass", "sum over processes, clipping, AdamW")
        return dict(zip(names, np.diff(times).tolist(), strict=True))

    seconds: dict[str, list[float]] = {}
    for step in range(cfg.rounds + 1):
        began = time.perf_counter()
        views = read(step)
        for stage, took in {PARALLEL: time.perf_counter() - began, **learn(views)}.items():
            seconds.setdefault(stage, []).append(took)
    medians = {stage: statistics.median(values[1:]) for stage, values in seconds.items()}
    ranks.wait()
    loader, began = Prefetch(read, 0, cfg.rounds, shares=True), time.perf_counter()
    for _, views in loader:
        learn(views)
    wait = loader.waited_s / (time.perf_counter() - began)
    loader.close()
    if not ranks.first:
        return None
    total = sum(took for stage, took in medians.items() if stage != PARALLEL)
    table = [(stage, 1e3 * took, f"{took / total:.1%}") for stage, took in medians.items()]
    print(machine())
    show(
        f"A step of mini, {cfg.batch} pairs on {ranks.world} processes, share of what isn't in a thread",
        ("", "ms", "share"),
        table,
    )
    print(f"\nWaiting for pairs that a thread draws ahead: {wait:.1%} of the time")
    return {"ms": {stage: 1e3 * took for stage, took in medians.items()}, "loader_wait": wait, "world": ranks.world}


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    if (found := main(config)) is not None:
        print(json.dumps(found | {"config": dataclasses.asdict(config)}))
