"""
Learning rate and momentum as functions of the step, parameter groups, and the teacher's moving average.
"""

import math
import re
from collections.abc import Iterable

import torch
from torch import nn

UNDECAYED = ("place.", "norm")  # modules that weight decay must not pull to zero: position codes, normalisations
BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")  # the number of an encoder's block in the name of a parameter
BEFORE = {
    "embed",
    "relate",
    "place",
    "query_place",
    "gather",
}  # modules of encoders and adapters that come before the blocks


def decay_groups(modules: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: weight matrices decay; biases, vectors, norms and position codes don't. Every parameter is in exactly one."""
    return _groups(modules.named_parameters(), weight_decay, 1.0)


def layer_groups(encoder: nn.Module, head: nn.Module, lr_decay: float, weight_decay: float) -> list[dict]:
    """
    AdamW groups as of `decay_groups`, two per layer, whose `scale` the loop multiplies the learning rate with.

    The head and what follows the encoder's blocks learn at scale 1, each block `lr_decay` times as fast as the next one, and what
    comes before the blocks slowest (BEiT, Bao 2021). Every parameter that needs a gradient is in exactly one group. `depth` counts an
    encoder's layers from the top, 0 being what follows the blocks; the head has None.
    """
    named = list(encoder.named_parameters())
    depth = 1 + max((int(found[1]) for name, _ in named if (found := BLOCK.search(name))), default=-1)
    groups = [group | {"depth": None} for group in decay_groups(head, weight_decay)]
    for down in range(depth + 1, -1, -1):
        own = [(name, p) for name, p in named if _layer(name, depth) == depth + 1 - down]
        groups += [group | {"depth": down} for group in _groups(own, weight_decay, lr_decay**down)]
    return [group for group in groups if group["params"]]


def _groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, scale: float) -> list[dict]:
    named = [(name, p) for name, p in named if p.requires_grad]
    kept = [p.ndim < 2 or any(word in name for word in UNDECAYED) for name, p in named]
    return [
        {
            "params": [p for (_, p), k in zip(named, kept, strict=True) if k == undecayed],
            "weight_decay": decay,
            "scale": scale,
        }
        for undecayed, decay in ((False, weight_decay), (True, 0.0))
    ]


def _layer(name: str, depth: int) -> int:
    """0 before the blocks, 1 … depth in them, depth + 1 after them."""
    if block := BLOCK.search(name):
        return int(block[1]) + 1
    return 0 if any(part in BEFORE for part in name.split(".")[:2]) else depth + 1


def warmup_cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear to `peak` over `warmup` steps (the first step isn't 0), then half a cosine to 0 at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def warm_restarts(step: int, period: int, peak: float, warmup: int = 0) -> float:
    """
    Linear to `peak` over `warmup` steps, then cosines down to 0 that last period, 2 * period, 4 * period … steps.

    SGDR (Loshchilov & Hutter 2017, equation 5) with T_mult = 2.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    cycle = ((step - warmup) // period + 1).bit_length() - 1  # cycle i begins after period * (2^i - 1) steps
    done = (step - warmup - period * (2**cycle - 1)) / (period * 2**cycle)
    return peak * (0.5 * (1 + math.cos(math.pi * done)))


def ema_momentum(step: int, steps: int, start: float) -> float:
    """Linear from `start` at the first step towards 1 after the last (I-JEPA)."""
    return start + (1 - start) * step / steps


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameters only, in float32."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
