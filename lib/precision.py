"""
Which number format the matrix products run in, decided by measuring.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lib.ranks import Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADVANTAGE = 0.95  # bfloat16 must be at least this much faster, or float32 stays


def autocast(device_type: str, dtype: str) -> torch.autocast:
    """The context in which a forward pass runs; parameters, sums and the optimiser stay float32."""
    return torch.autocast(device_type, DTYPES[dtype], enabled=dtype != "float32")


def choose_dtype(
    flag: str, loss: Callable[..., torch.Tensor], modules: Sequence[nn.Module], ranks: Ranks, repeats: int = 3
) -> str:
    """
    `flag`, or for `auto` the format in which `loss` of throwaway copies of the modules, forward and backward, is fastest, the same on all ranks.

    Interleaved best of `repeats` after a warm-up, because on CPUs bfloat16 was seen from 8 x slower to 1.7 x faster, by shape;
    what is twice as slow is not tried again.
    """
    if flag != "auto":
        return flag
    best = dict.fromkeys(DTYPES, float("inf"))
    if ranks.first:
        copies = copy.deepcopy(list(modules))
        for repeat in range(repeats + 1):
            if repeat > 1 and best["bfloat16"] > 2 * best["float32"]:
                break
            for dtype in DTYPES:
                started = time.perf_counter()
                with autocast(ranks.device.type, dtype):
                    total = loss(*copies).sum()
                total.backward()
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize()
                best[dtype] = min(best[dtype], time.perf_counter() - started) if repeat else float("inf")
    chosen = ranks.agree("bfloat16" if best["bfloat16"] < ADVANTAGE * best["float32"] else "float32")
    if ranks.first:  # the only choice that the clock makes
        print(f"--dtype auto: measured, {chosen} it is; --dtype {chosen} repeats this run exactly", file=sys.stderr)
    return chosen
