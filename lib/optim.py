"""
Learning rate and momentum as functions of the step, parameter groups, and the teacher's moving average.
"""

import math

import torch
from torch import nn

UNDECAYED = ("place.", "norm")  # modules that weight decay must not pull to zero: position codes, normalisations


def decay_groups(modules: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: weight matrices decay; biases, vectors, norms and position codes don't. Every parameter is in exactly one."""
    named = [(n, p) for n, p in modules.named_parameters() if p.requires_grad]
    kept = {n for n, p in named if p.ndim < 2 or any(word in n for word in UNDECAYED)}
    groups = [[p for n, p in named if n not in kept], [p for n, p in named if n in kept]]
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def warmup_cosine(step: int, steps: int, peak: float, warmup: int, floor: float = 0.0) -> float:
    """Linear to `peak` over `warmup` steps (the first step isn't 0), then half a cosine to `floor` times the peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def ema_momentum(step: int, steps: int, start: float) -> float:
    """Linear from `start` at the first step towards 1 after the last (I-JEPA)."""
    return start + (1 - start) * step / steps


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameters only, in float32."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
