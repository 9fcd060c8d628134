"""
What a step costs and what the hardware could do: floating-point operations of matrix products, and the rate at which they run.

Counted are products of matrices only, a multiply-add as 2, each once: not what fused attention computes anew in its backward pass.
The share of the measured rate that a step reaches is what is left after everything else in it: normalisation, activation, copies,
reading, optimiser.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


class Counter(TorchDispatchMode):
    """Sums PyTorch's own formulas (torch.utils.flop_counter) over what runs inside it; fused attention, on CPUs too, as its products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, packet = function(*args, **kwargs), function.overloadpacket
        name = packet.__name__
        if name.startswith("_scaled_dot_product") and name.endswith("_backward"):  # its first argument is the gradient
            self.flops += 2 * sdpa_flop_count(*(t.shape for t in args[1:4]))
        elif name.startswith("_scaled_dot_product"):
            self.flops += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def count_flops(work: Callable, parameters: list[nn.Parameter]) -> int:
    """Of `work()`, which is run, and of the gradient of its sum by `parameters`."""
    with Counter() as counter:
        torch.autograd.grad(work().sum(), parameters, allow_unused=True)
    return counter.flops


def windows_of(item, batch: int):
    """A batch of so many windows, taken in turn from a tensor, an array, or a dataclass of such."""
    if isinstance(item, torch.Tensor | np.ndarray):
        return item[np.arange(batch) % len(item)]
    if dataclasses.is_dataclass(item):
        return dataclasses.replace(item, **{k: windows_of(v, batch) for k, v in vars(item).items()})
    return item


def shape_of(item) -> tuple | None:
    """What the cost per window depends on: the shapes of a batch's tensors without their first axis."""
    if isinstance(item, torch.Tensor):
        return tuple(item.shape[1:])
    return tuple(map(shape_of, vars(item).values())) if dataclasses.is_dataclass(item) else None


class StepCost:
    """
    FLOPs of `work(part).sum().backward()`, exact for every batch `part`: a dataclass of tensors of windows, and of such.

    They are so many per window of a shape, plus what is done once for all windows, whatever their shape: two windows, run once, tell
    for all batches of windows of that shape. `work` must not be compiled; gradients in the parameters are left alone.
    """

    def __init__(self, work: Callable, module: nn.Module):
        self.work, self.parameters = work, [p for p in module.parameters() if p.requires_grad]
        self.once: int | None = None
        self.per_window: dict[tuple, int] = {}

    def count(self, part, batch: int) -> int:
        """FLOPs of so many windows like those of `part`, by running them."""
        some = windows_of(part, batch)
        return count_flops(lambda: self.work(some), self.parameters)

    def __call__(self, part) -> int:
        """FLOPs of this batch, forward and backward."""
        shape = shape_of(part)
        if shape not in self.per_window:
            two = self.count(part, 2)
            if self.once is None:
                self.once = 3 * two - 2 * self.count(part, 3)
            self.per_window[shape] = (two - self.once) // 2
        windows = len(next(v for v in vars(part).values() if isinstance(v, torch.Tensor)))
        return self.once + self.per_window[shape] * windows


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.1) -> float:
    """Best measured rate of a large square matrix product, FLOP/s, with the threads that torch uses now."""
    n = 8192 if device.type == "cuda" else 768
    a_NN = torch.randn(n, n, device=device).to(dtype)
    best, ends = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < ends:
        for repeat in range(2):  # the first wakes the threads up
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            a_NN @ a_NN
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began) if repeat else best
    return 2 * n**3 / best
