"""
Attention over the electrodes of a patch, state space over time: each axis by what suits it, and neither at the square of both.

Shape letters: B windows, C channels, P patches per channel, K tokens seen, D width, H heads, W width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.attention import attend
from lib.grid import Grid
from lib.mamba import Scan


class Attend(nn.Module):
    """Attention among the electrodes of the same patch: a set, so that their order can't matter."""

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        with torch.no_grad():
            self.out.weight /= math.sqrt(3 * depth)

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        qkv_BCPX = grid.spread(self.qkv(self.norm(z_BKD)))
        shape = (-1, grid.channels, 3, self.heads, qkv_BCPX.shape[3] // (3 * self.heads))
        q_RHCW, k_RHCW, v_RHCW = qkv_BCPX.transpose(1, 2).reshape(shape).permute(2, 0, 3, 1, 4)  # R: patches of windows
        real_RC = None
        if grid.seen_BCP is not None:
            seen_RC = grid.seen_BCP.transpose(1, 2).flatten(0, 1)
            real_RC = seen_RC | ~seen_RC.any(1, keepdim=True)  # nothing seen: of no effect, but not NaN
        a_RHCW = attend(q_RHCW, k_RHCW, v_RHCW, real_RC)
        a_BPCD = a_RHCW.transpose(1, 2).flatten(2).unflatten(0, (-1, grid.patches))
        return self.out(grid.collect(a_BPCD.transpose(1, 2)))


class HybridBlock(nn.Module):
    """Attention over electrodes, a selective scan over time, and a feed-forward layer."""

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        self.attend, self.scan = Attend(d, heads, depth), Scan(d, heads, depth)
        self.norm, self.wide, self.narrow = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        with torch.no_grad():
            self.narrow.weight /= math.sqrt(2 * depth)

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        z_BKD = z_BKD + self.attend(z_BKD, grid)
        z_BKD = z_BKD + self.scan(z_BKD, grid)
        return z_BKD + self.narrow(F.gelu(self.wide(self.norm(z_BKD))))
