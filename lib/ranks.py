"""
One process or several: who this one is (torchrun's environment), and sums over all of them. gloo on CPUs, NCCL on GPUs.

Shape letters: S windows of this process, B windows of the global batch, D width.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from lib.command import keep_freed_memory
from lib.errors import Unusable


@dataclass(frozen=True)
class Ranks:
    """This process among `world` equal ones."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and evaluates."""
        return self.rank == 0

    def share(self, batch: int) -> np.ndarray:
        """Which windows of the global batch this process takes."""
        return np.arange(self.rank, batch, self.world)

    def sum(self, tensors: list[torch.Tensor], numbers: list) -> list[float]:
        """Add up float32 tensors in place, in one message, and return the sums of `numbers`, kept exact by a message of their own."""
        sums = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=self.device) for n in numbers])
        if self.world > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            dist.all_reduce(sums)
            for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(total.view_as(t))
        return sums.tolist()

    @torch.no_grad()
    def gather(self, z_SD: torch.Tensor, batch: int) -> torch.Tensor:
        """
        Features (B, D) of all windows of the global batch, in its order, from those of each process's `share`; float32, no gradient.

        For losses that need all windows at once: see `gradient`.
        """
        assert len(z_SD) == len(self.share(batch)), (
            f"{len(z_SD)} windows of process {self.rank}, not {self.share(batch)}"
        )
        z_SD = z_SD.detach().float()
        if self.world == 1:
            return z_SD
        own_SD = z_SD.new_zeros(
            -(-batch // self.world), z_SD.shape[1]
        )  # shares differ by one window, messages must not
        own_SD[: len(z_SD)] = z_SD
        parts = [torch.empty_like(own_SD) for _ in range(self.world)]
        dist.all_gather(parts, own_SD)
        return torch.stack(parts, 1).flatten(0, 1)[:batch]  # window b is number b // world of process b % world

    def gradient(self, loss: torch.Tensor, z_BD: torch.Tensor) -> torch.Tensor:
        """
        Gradient (B, D) of a loss that every process computed from the same gathered `z_BD`, which must require one.

        Its rows of own windows go through the encoder in a second forward pass, (z_SD * g_SD).sum().backward() (GradCache, Gao 2021).
        Parameters of the loss itself (a temperature, a projection) get their share, so that `sum` makes their gradient whole.
        """
        (loss / self.world).backward()
        return z_BD.grad * self.world

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value):
        """The first process's value, everywhere."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1:
            dist.destroy_process_group()


def join(device: str = "auto") -> Ranks:
    """Find out about the other processes and the device. Raises Unusable for a device that isn't there."""
    keep_freed_memory()  # a step's activations and gradients are the same every time
    rank, world, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:  # torch's own way to say that a build lacks CUDA is an assertion
        raise Unusable(f"--device {device} can't be used here: {str(error).splitlines()[0]}") from error
    if place.type == "cuda":
        place = torch.device("cuda", local if place.index is None else place.index)
        torch.cuda.set_device(place)
    if world > 1:
        # the first process evaluates and probes while the others wait
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return Ranks(rank, world, place)
