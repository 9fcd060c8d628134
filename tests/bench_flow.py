"""
What train_flow.py costs, as ratios measured in one run: python -m tests.bench_flow [--parts step rate memory sample] [--rounds 5]

step: a step of mini (forward, backward, clip, AdamW, average) at batch 32 x 1024 in steps/s, and beside it a loop around the same network
whose path, times and targets come from torchcfm (pip install torchcfm), interleaved. rate: the share of the measured rate of matrix
products that a step of base reaches. memory: the most that base takes, in a process of its own. sample: windows/s at 16 evaluations.

Wall times of a shared machine say little: the median of interleaved rounds is printed beside process CPU time.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from lib import flow
from lib.command import keep_freed_memory
from lib.conditions import Condition
from lib.flops import count_flops, matmul_rate
from lib.models import Architecture, build_encoder
from lib.optim import decay_groups, ema_update
from lib.precision import autocast
from lib.velocity import Shape, Velocity
from train_flow import PRESETS, Config

CONDITIONS = [Condition("label", tuple("abcdefghij")), Condition("domain", ("a", "b")), Condition("level")]
SAMPLES = 1024


def network(cfg: Config) -> Velocity:
    """What a preset builds, without a cache."""
    torch.manual_seed(0)
    encoder = build_encoder(Architecture(cfg.encoder, cfg.d_model, cfg.layers, cfg.heads, 12000.0, cfg.patch))
    encoder.embed.requires_grad_(False)
    return Velocity(encoder, CONDITIONS, Shape(cfg.widths, cfg.kernel))


def stepper(net: Velocity, cfg: Config, batch: int, channels: int, micro: int, matcher=None) -> Callable[[], None]:
    """One optimizer step on noise, whose path and target are ours, or those of a matcher of torchcfm."""
    average = network(cfg).requires_grad_(False)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decay_groups(net, 0.01), lr=1e-4, fused=True)
    data = torch.randn(batch, channels, SAMPLES)
    code, positions = torch.zeros(batch, len(CONDITIONS)), torch.full((batch, channels, 3), math.nan)
    counter = iter(range(10**9))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        number = next(counter)
        for some in np.array_split(np.arange(batch), -(-batch // (micro or batch))):
            x1 = data[some]
            if matcher is None:
                x0, t = (
                    flow.draw_noise(0, number, some, x1.shape[1:]),
                    flow.draw_times("logit-normal", 0.1, 0, number, some),
                )
                x = flow.between(x0, x1, t)
                v = flow.to_velocity(net(x, t, code[some], positions[some])[0], x, t, "preconditioned")
                loss = flow.loss_flow(v, x0, x1, None).sum() / batch
            else:
                t, x, target = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
                v = flow.to_velocity(net(x, t, code[some], positions[some])[0], x, t, "preconditioned")
                loss = (v - target).square().mean() * (len(some) / batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema_update(average, net, 0.999)

    return step


def in_bfloat16(step: Callable[[], None]) -> Callable[[], None]:
    """The same step with matrix products in bfloat16."""

    def work() -> None:
        with autocast("cpu", "bfloat16"):
            step()

    return work


def timed(works: dict[str, Callable[[], None]], rounds: int, repeats: int = 10) -> dict[str, dict[str, float]]:
    """Median wall and CPU time per call, the works taking turns."""
    for work in works.values():
        work()
    wall, cpu = ({name: [] for name in works} for _ in range(2))
    for _ in range(rounds):
        for name, work in works.items():
            began, used = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                work()
            wall[name].append((time.perf_counter() - began) / repeats)
            cpu[name].append((time.process_time() - used) / repeats)
    return {
        n: {"wall_ms": 1e3 * statistics.median(wall[n]), "best_ms": 1e3 * min(wall[n]), "cpu_ms": 1e3 * min(cpu[n])}
        for n in works
    }


def bench_step(rounds: int) -> dict:
    """mini at batch 32 x 1024: steps/s, and against torchcfm with the same network."""
    cfg = Config()
    net = network(cfg)
    works = {"ours": stepper(net, cfg, 32, 1, 0), "bfloat16": in_bfloat16(stepper(network(cfg), cfg, 32, 1, 0))}
    try:  # --compile takes a C++ compiler
        works["compiled"] = stepper(torch.compile(network(cfg)), cfg, 32, 1, 0)
        works["compiled_bfloat16"] = in_bfloat16(stepper(torch.compile(network(cfg)), cfg, 32, 1, 0))
        timed({name: works[name] for name in ("compiled", "compiled_bfloat16")}, 1, 1)
    except torch._dynamo.exc.BackendCompilerFailed:
        print("no C++ compiler: steps with --compile aren't timed", file=sys.stderr)
        works = {name: work for name, work in works.items() if not name.startswith("compiled")}
    try:
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        works["torchcfm"] = stepper(net, cfg, 32, 1, 0, ConditionalFlowMatcher(sigma=0.0))
    except ImportError:
        print("torchcfm isn't installed: only our own step is timed", file=sys.stderr)
    times = timed(works, rounds)
    found = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps_per_s": 1e3 / times["ours"]["best_ms"],
        **{f"steps_per_s_{n}": 1e3 / t["best_ms"] for n, t in times.items() if n not in ("ours", "torchcfm")},
        **times,
    }
    if "torchcfm" in times:
        found["ours_over_torchcfm"] = times["ours"]["cpu_ms"] / times["torchcfm"]["cpu_ms"]
    return found


def bench_rate(rounds: int) -> dict:
    """base: floating-point operations of a step against the rate of a large matrix product, measured in between."""
    cfg = replace(Config(), **PRESETS["base"])
    net, batch, channels = network(cfg), 4, 8
    x, t = torch.randn(batch, channels, SAMPLES), torch.rand(batch)
    code, positions = torch.zeros(batch, len(CONDITIONS)), torch.full((batch, channels, 3), math.nan)
    flops = count_flops(lambda: net(x, t, code, positions)[0], [p for p in net.parameters() if p.requires_grad])
    step, shares = stepper(net, cfg, batch, channels, 0), []
    for _ in range(rounds):
        rate = matmul_rate(torch.float32, torch.device("cpu"))
        spent_s = timed({"step": step}, 1, 1)["step"]["best_ms"] / 1e3
        shares.append(flops / rate / spent_s)
    return {"gflop": flops / 1e9, "share_of_matmul_rate": statistics.median(shares), "best_share": max(shares)}


def bench_memory() -> dict:
    """base with its own batch, micro-batch and channels: peak resident memory of a process that does two steps."""
    if "FLOW_MEMORY" not in os.environ:
        command = [sys.executable, "-m", "tests.bench_flow", "--parts", "memory"]
        done = subprocess.run(
            command, env={**os.environ, "FLOW_MEMORY": "1"}, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.strip().splitlines()[-1])["memory"]
    cfg = replace(Config(), **PRESETS["base"])
    step = stepper(network(cfg), cfg, cfg.micro, cfg.max_channels, cfg.micro)
    step()
    return {
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "windows": cfg.micro,
        "channels": cfg.max_channels,
    }


def bench_sample(rounds: int) -> dict:
    """mini: windows/s at 16 evaluations, Heun."""
    net = network(Config()).requires_grad_(False)
    code, positions = torch.zeros(64, len(CONDITIONS)), torch.full((1, 3), math.nan)
    works = {"sample": lambda: flow.sample(net, code, positions, SAMPLES, "preconditioned")}
    times = timed(works, rounds, 1)["sample"]
    return {"windows_per_s": 64e3 / times["best_ms"], **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", default=["step", "rate", "memory", "sample"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()  # as the command does
    benches = {"step": bench_step, "rate": bench_rate, "memory": lambda _: bench_memory(), "sample": bench_sample}
    found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "load": os.getloadavg()[0]}
    for part in args.parts:
        found[part] = benches[part](args.rounds)
    print(json.dumps(found, default=float))


if __name__ == "__main__":
    main()
