"""
One process or several: who this one is (torchrun's environment), and sums over all of them. gloo on CPUs, NCCL on GPUs.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

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
