"""
Fourier neural operator over time: an electrode's patches as a function of time, convolved with kernels given by their low modes.

As in lib/mamba.py each token is unfolded to 4 finer steps, and hidden ones are left out: here they are zeros, and the sums over time
that remain are scaled up by their share (partial convolution, Liu 2018).

Shape letters: B windows, C channels, P patches per channel, K tokens seen, D width, F steps per patch, R rows, L steps of a row,
M modes, E inner channels, X any width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.grid import Grid, Pool


def fourier_basis(steps: int, modes: int, device: torch.device | None = None) -> torch.Tensor:
    """
    The `modes` lowest cosines, then sines, of period 2 x steps, (2 M, L), orthonormal over that period.

    Twice as long as the window, the other half being zero, so that its end does not run into its beginning.
    """
    t_L = torch.arange(steps, device=device)
    k_M = torch.arange(modes, device=device)
    angle_ML = math.pi / steps * (k_M[:, None] * t_L)
    ends = (k_M == 0) | (k_M == steps)  # the constant and the fastest alternation come without a sine
    size_M1 = torch.where(ends, 0.5, 1.0).sqrt()[:, None] / math.sqrt(steps)
    return torch.cat([size_M1 * angle_ML.cos(), size_M1 * angle_ML.sin()])


class Spectral(nn.Module):
    """
    The layer of Li 2021, act(W u + K u): K multiplies each of the lowest modes of u by a complex matrix of its own.

    The transform is a matrix product, for only few modes are wanted: exact, real, and alike in all number formats. A mode is a
    frequency relative to the window's length, so use the length that the encoder was trained with.
    """

    STEPS, MODES = 4, 16

    def __init__(self, d: int, depth: int):
        super().__init__()
        self.inner = 2 * d // self.STEPS
        self.norm = nn.LayerNorm(d)
        self.inward, self.out = nn.Linear(d, self.STEPS * self.inner), nn.Linear(self.STEPS * self.inner, d)
        self.modes_2MEE = nn.Parameter(torch.randn(2, self.MODES, self.inner, self.inner) / math.sqrt(2 * self.inner))
        with torch.no_grad():
            self.out.weight /= math.sqrt(2 * depth)

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        u_BKX = self.inward(self.norm(z_BKD))
        L = grid.patches * self.STEPS
        u_RLE = grid.spread(u_BKX).reshape(-1, L, self.inner)
        modes = min(self.MODES, L + 1)
        basis_XL = fourier_basis(L, modes, z_BKD.device)
        # X: real parts, then imaginary ones
        modes_MRX = (basis_XL @ u_RLE).unflatten(1, (2, modes)).permute(2, 0, 1, 3).flatten(2)
        a_MEE, b_MEE = self.modes_2MEE[:, :modes]
        times_MXX = torch.cat([torch.cat([a_MEE, b_MEE], 2), torch.cat([-b_MEE, a_MEE], 2)], 1)
        modes_MRX = modes_MRX @ times_MXX
        v_RLE = basis_XL.T @ modes_MRX.unflatten(2, (2, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        v_BCPX = v_RLE.reshape(-1, grid.channels, grid.patches, self.STEPS * self.inner)
        if grid.seen_BCP is not None:
            v_BCPX = v_BCPX / grid.seen_BCP.float().mean(2).clamp_min(1 / grid.patches)[:, :, None, None]
        return self.out(F.gelu(u_BKX + grid.collect(v_BCPX)))


class FNOBlock(nn.Module):
    """A spectral convolution over time, then the feed-forward half with its pool over electrodes."""

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        self.spectral, self.pool = Spectral(d, depth), Pool(d, heads, depth)

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        z_BKD = z_BKD + self.spectral(z_BKD, grid)
        return z_BKD + self.pool(z_BKD, grid)
