"""
State space over time: Mamba's selective scan in plain PyTorch, and the encoder block made of it.

The scan runs along each electrode's own patches, forwards and backwards, so the order of electrodes can't matter. A window has few
patches (of 1 s, in 4 s: 4), too few for a state to be worth its name: a learned map, at the cost of the usual one, unfolds each
token to 4 finer steps, so that the state lives through 16. Hidden tokens are steps of no duration: the state passes them unchanged
and takes nothing from them, which is the scan of the visible ones alone.

Shape letters: B windows, C channels, P patches per channel, K tokens seen, D width, F steps per patch, X any width; in a scan R rows,
L steps, N chunks, Q steps of a chunk, H heads, E channels per head, S states per channel.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.grid import Grid, Pool

FORGOTTEN = 20.0  # e^-20 is nothing to float32; larger numbers would cost their neighbours digits in sums over a chunk


def selective_scan(
    u_RLHE: torch.Tensor, fade_RLH: torch.Tensor, b_RLS: torch.Tensor, c_RLS: torch.Tensor, chunk: int = 64
) -> torch.Tensor:
    """
    y[t] = c[t] . h[t] with h[t] = exp(-fade[t]) h[t-1] + b[t] u[t], the state h (S, E) per row and head from 0; fade >= 0.

    Mamba's recurrence (S6, Gu & Dao 2023; u = dt x, fade = dt rate) with one rate per head (Mamba-2, Dao & Gu 2024), which makes a
    chunk a few matrix products: a rate per channel and state took 5 times as long. All exponents are sums of -fade over the steps
    in between, never positive, so nothing overflows. Python loops over chunks only.
    """
    L = u_RLHE.shape[1]
    Q = min(chunk, L)
    fade_RLH = fade_RLH.clamp_max(FORGOTTEN)
    u_RNQHE, fade_RNQH, b_RNQS, c_RNQS = (
        F.pad(t, (0, 0) * (t.ndim - 2) + (0, -L % Q)).unflatten(1, (-1, Q)) for t in (u_RLHE, fade_RLH, b_RLS, c_RLS)
    )
    u_RNHQE, age_RNHQ = u_RNQHE.transpose(2, 3), fade_RNQH.cumsum(2).transpose(2, 3)
    future_QQ = torch.ones(Q, Q, dtype=torch.bool, device=u_RLHE.device).triu(1)
    decay_RNHQQ = (age_RNHQ[..., None, :] - age_RNHQ[..., :, None]).masked_fill_(future_QQ, -torch.inf).exp_()
    like_RN1QQ = (c_RNQS @ b_RNQS.transpose(2, 3))[:, :, None]
    y_RNHQE = (like_RN1QQ * decay_RNHQQ).to(u_RNHQE.dtype) @ u_RNHQE
    if y_RNHQE.shape[1] > 1:  # what the chunks before left behind
        left_RNHQ1 = (age_RNHQ - age_RNHQ[..., -1:]).exp()[..., None].to(u_RNHQE.dtype)
        new_RNHSE = (b_RNQS[:, :, None].transpose(3, 4) @ (left_RNHQ1 * u_RNHQE)).to(age_RNHQ.dtype)
        kept_RNH11 = (-age_RNHQ[..., -1:, None]).exp()
        h_RHSE, before = torch.zeros_like(new_RNHSE[:, 0]), []
        for new_RHSE, kept_RH11 in zip(new_RNHSE.unbind(1), kept_RNH11.unbind(1), strict=True):
            before.append(h_RHSE)
            h_RHSE = kept_RH11 * h_RHSE + new_RHSE
        y_RNHQE = y_RNHQE + (-age_RNHQ[..., None]).exp() * (c_RNQS[:, :, None] @ torch.stack(before, 1))
    return y_RNHQE.transpose(2, 3).flatten(1, 2)[:, :L].to(u_RLHE.dtype)


class Scan(nn.Module):
    """
    A Mamba mixer in both directions (as FEMBA, Tegon 2025): half of the heads run forwards, half backwards.

    Steps, b and c come through the same map of the input as x, as in Mamba-2. Its short convolution is left out: the map that
    unfolds a patch mixes its steps already.
    """

    STEPS, STATES = 4, 16

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        ahead = max(1, heads // 2)
        self.heads = 2 * ahead
        self.inner = self.heads * math.ceil(2 * d / self.STEPS / self.heads)
        self.norm = nn.LayerNorm(d)
        self.inward = nn.Linear(d, self.STEPS * (2 * self.inner + 2 * self.STATES + self.heads))
        remembers_H = 64 ** (torch.arange(ahead) / max(1, ahead - 1)).repeat(2)  # from 1 to 64 steps, untrained
        self.step_H = nn.Parameter((1 / remembers_H).expm1().log())  # softplus of it is 1 / remembers
        self.log_rate_H = nn.Parameter(torch.zeros(self.heads))
        self.skip_H = nn.Parameter(torch.ones(self.heads))
        self.level = nn.RMSNorm(self.inner)
        self.out = nn.Linear(self.STEPS * self.inner, d)
        with torch.no_grad():
            self.out.weight /= math.sqrt(2 * depth)

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        h_BKFX = self.inward(self.norm(z_BKD)).unflatten(2, (self.STEPS, -1))
        sizes = (self.inner, self.inner, 2 * self.STATES, self.heads)
        gate_BKFX, x_BKFX, bc_BKFX, dt_BKFH = h_BKFX.split(sizes, 3)
        x_BKFHE = F.silu(x_BKFX).unflatten(3, (self.heads, -1))
        dt_BKFH = F.softplus(dt_BKFH.float() + self.step_H)
        u_BKFX = (x_BKFHE * dt_BKFH[..., None]).flatten(3)
        rows_BKX = torch.cat([u_BKFX, bc_BKFX, dt_BKFH * self.log_rate_H.exp()], 3).flatten(2)  # fade 0 where hidden
        rows_RLX = grid.spread(rows_BKX).reshape(-1, grid.patches * self.STEPS, rows_BKX.shape[2] // self.STEPS)
        u_RLX, b_RLS, c_RLS, fade_RLH = rows_RLX.split((self.inner, self.STATES, self.STATES, self.heads), 2)
        ahead, back = zip(u_RLX.unflatten(2, (self.heads, -1)).chunk(2, 2), fade_RLH.chunk(2, 2), strict=True)
        y_RLHE = selective_scan(*ahead, b_RLS, c_RLS)
        y_back_RLHE = selective_scan(*(t.flip(1) for t in (*back, b_RLS, c_RLS))).flip(1)
        y_RLHE = torch.cat([y_RLHE, y_back_RLHE], 2)
        y_BCPX = y_RLHE.reshape(-1, grid.channels, grid.patches, self.STEPS * self.inner)
        y_BKFHE = grid.collect(y_BCPX).view_as(x_BKFHE) + self.skip_H[:, None] * x_BKFHE
        return self.out((self.level(y_BKFHE.flatten(3)) * F.silu(gate_BKFX)).flatten(2))


class MambaBlock(nn.Module):
    """A selective scan over time, then the feed-forward half with its pool over electrodes: no attention anywhere."""

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        self.scan, self.pool = Scan(d, heads, depth), Pool(d, heads, depth)

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        z_BKD = z_BKD + self.scan(z_BKD, grid)
        return z_BKD + self.pool(z_BKD, grid)
