"""
State space over time: Mamba's selective scan in plain PyTorch (kernels/ has it faster), and the encoder block made of it.

The scan runs along each electrode's own patches, forwards and backwards, so the order of electrodes can't matter. A window has few
patches (of 1 s, in 4 s: 4), too few for a state to be worth its name: a learned map, at the cost of the usual one, unfolds each
token to 4 finer steps, so that the state lives through 16. Hidden tokens are steps of no duration: the state passes them unchanged
and takes nothing from them, which is the scan of the visible ones alone.

Shape letters: B windows, C channels, P patches per channel, K tokens seen, D width, F steps per patch, X any width; in a scan R rows,
L steps, N chunks, Q steps of a chunk, E channels, S states per channel, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from lib.grid import Grid, Pool

CHUNK = 16  # steps whose fades are summed; times MOST this must stay below the 88 at which exp leaves float32
MOST = 4.0  # that a step can fade: 2 % of the state are left


def selective_scan(
    u_RLE: torch.Tensor, fade_RLE: torch.Tensor, b_RLS: torch.Tensor, c_RLS: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """
    y[t] = c[t] . h[t] with h[t] = exp(-fade[t]) h[t-1] + b[t] u[t], the state h (S, E) of a row from 0; 0 <= fade, cut off at 4.

    Mamba's recurrence (S6, Gu & Dao 2023; u = dt x, fade = dt rate) with a rate per channel instead of per channel and state (as
    Mamba-2, Dao & Gu 2024, per head), so that a chunk is y = exp(-age) tril(c b) exp(age) u, where age is the sum of fades. It
    stays within 32 of the chunk's middle, so nothing overflows; and no digit is lost, for what is summed at a step is scaled by
    what has yet to fade. Python loops over chunks only.
    """
    L = u_RLE.shape[1]
    Q = min(chunk, L)
    u_RNQE, fade_RNQE, b_RNQS, c_RNQS = (
        F.pad(t, (0, 0, 0, -L % Q)).unflatten(1, (-1, Q)) for t in (u_RLE, fade_RLE.clamp_max(MOST), b_RLS, c_RLS)
    )
    age_RNQE = fade_RNQE.cumsum(2)
    half_RN1E = age_RNQE[:, :, -1:] / 2
    grown_RNQE, shrunk_RNQE = ((age_RNQE - half_RN1E).exp() * u_RNQE).to(u_RLE.dtype), (half_RN1E - age_RNQE).exp()
    y_RNQE = (c_RNQS @ b_RNQS.transpose(2, 3)).tril() @ grown_RNQE
    if y_RNQE.shape[1] > 1:  # what the chunks before left behind
        kept_RN1E = (-half_RN1E).exp()
        new_RNSE = kept_RN1E * (b_RNQS.transpose(2, 3) @ grown_RNQE)
        h_RSE, before = torch.zeros_like(new_RNSE[:, 0]), []
        for new_RSE, kept_R1E in zip(new_RNSE.unbind(1), kept_RN1E.square().unbind(1), strict=True):
            before.append(h_RSE)
            h_RSE = kept_R1E * h_RSE + new_RSE
        y_RNQE = y_RNQE + kept_RN1E * (c_RNQS @ torch.stack(before, 1))
    return (shrunk_RNQE * y_RNQE).flatten(1, 2)[:, :L].to(u_RLE.dtype)


def scan_both_ways(
    u_RLX: torch.Tensor, fade_RLX: torch.Tensor, b_RLS: torch.Tensor, c_RLS: torch.Tensor
) -> torch.Tensor:
    """`selective_scan` of the first half of the channels forwards and of the other backwards, by a kernel where there is one."""
    if kernels.path(u_RLX.device.type) != "reference":
        return kernels.selective_scan(u_RLX, fade_RLX, b_RLS, c_RLS, u_RLX.shape[2] // 2)
    ahead, back = zip(u_RLX.chunk(2, 2), fade_RLX.chunk(2, 2), strict=True)
    y_RLX = selective_scan(*ahead, b_RLS, c_RLS)
    y_back_RLX = selective_scan(*(t.flip(1) for t in (*back, b_RLS, c_RLS))).flip(1)
    return torch.cat([y_RLX, y_back_RLX], 2)


class Scan(nn.Module):
    """
    A Mamba mixer in both directions (as FEMBA, Tegon 2025): half of the channels run forwards, half backwards.

    Steps, b and c come through the same map of the input as x, as in Mamba-2. Its short convolution is left out: the map that
    unfolds a patch mixes its steps already.
    """

    STEPS, STATES = 4, 16

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        self.heads = 2 * max(1, heads // 2)  # groups of channels that share what the input adds to their step
        width = math.ceil(2 * d / self.STEPS / self.heads)
        self.inner = self.heads * width
        self.norm = nn.LayerNorm(d)
        self.inward = nn.Linear(d, self.STEPS * (2 * self.inner + 2 * self.STATES + self.heads))
        remembers_E = 64 ** torch.linspace(0, 1, width)  # from 1 to 64 steps, untrained
        self.step_X = nn.Parameter((1 / remembers_E).expm1().log().repeat(self.heads))  # softplus of it: 1 / remembers
        self.log_rate_X = nn.Parameter(torch.zeros(self.inner))
        self.skip_X = nn.Parameter(torch.ones(self.inner))
        self.level = nn.RMSNorm(self.inner)
        self.out = nn.Linear(self.STEPS * self.inner, d)
        with torch.no_grad():
            self.out.weight /= math.sqrt(2 * depth)

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        h_BKFX = self.inward(self.norm(z_BKD)).unflatten(2, (self.STEPS, -1))
        sizes = (self.inner, self.inner, 2 * self.STATES, self.heads)
        gate_BKFX, x_BKFX, bc_BKFX, dt_BKFH = h_BKFX.split(sizes, 3)
        x_BKFX = F.silu(x_BKFX)
        dt_BKFX = (dt_BKFH.float()[..., None] + self.step_X.unflatten(0, (self.heads, -1))).flatten(3)
        dt_BKFX = F.softplus(dt_BKFX)
        # where nothing is seen all of these will be 0, the fade too
        rows_BKX = torch.cat([dt_BKFX * x_BKFX, dt_BKFX * self.log_rate_X.exp(), bc_BKFX], 3).flatten(2)
        rows_RLX = grid.spread(rows_BKX).reshape(-1, grid.patches * self.STEPS, rows_BKX.shape[2] // self.STEPS)
        u_RLX, fade_RLX, b_RLS, c_RLS = rows_RLX.split((self.inner, self.inner, self.STATES, self.STATES), 2)
        y_RLX = scan_both_ways(u_RLX, fade_RLX, b_RLS, c_RLS)
        y_BCPX = y_RLX.reshape(-1, grid.channels, grid.patches, self.STEPS * self.inner)
        y_BKFX = grid.collect(y_BCPX).view_as(x_BKFX) + self.skip_X * x_BKFX
        return self.out((self.level(y_BKFX) * F.silu(gate_BKFX)).flatten(2))


class MambaBlock(nn.Module):
    """A selective scan over time, then the feed-forward half with its pool over electrodes: no attention anywhere."""

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        self.scan, self.pool = Scan(d, heads, depth), Pool(d, heads, depth)

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        z_BKD = z_BKD + self.scan(z_BKD, grid)
        return z_BKD + self.pool(z_BKD, grid)
