"""
Tokens on their grid of channels and patches, for layers that mix along one of the two: over time, or over electrodes.

Hidden tokens are dropped, not replaced by mask tokens. What is done to a token by itself, nearly all of the arithmetic, is done to
the tokens seen, in the order they came; only what runs along an axis is spread on the grid, with zeros at the other places.

Shape letters: B windows, C channels, T samples, S samples of a patch, P patches per channel, N = C * P tokens, K tokens seen, D width,
H heads, X any width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def take(z_BND: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """The tokens `ids_BK` of each window: as rows of a table, which forwards and backwards takes a fifth of the time of `gather`."""
    first_B1 = torch.arange(len(ids_BK), device=ids_BK.device)[:, None] * z_BND.shape[1]
    return F.embedding(ids_BK + first_B1, z_BND.flatten(0, 1))


def to_patches(x_BCT: torch.Tensor, patch: int) -> torch.Tensor:
    """Windows as tokens of raw samples (B, N, S); the window length must be a multiple of the patch length."""
    assert x_BCT.shape[2] % patch == 0, f"{x_BCT.shape[2]} samples are no multiple of patches of {patch}"
    return x_BCT.unflatten(2, (-1, patch)).flatten(1, 2)


class Grid:
    """Which tokens a layer is given: `ids_BK`, or all N if it is None. Those that aren't real (False in real_BK) take part in nothing."""

    def __init__(
        self, channels: int, patches: int, ids_BK: torch.Tensor | None = None, real_BK: torch.Tensor | None = None
    ):
        self.channels, self.patches, self.ids_BK, self.real_BK = channels, patches, ids_BK, real_BK
        seen_BN = real_BK
        if ids_BK is not None:
            (B, K), N = ids_BK.shape, channels * patches
            place_BK = ids_BK if real_BK is None else torch.where(real_BK, ids_BK, N)  # those not real: off the grid
            order_BK = torch.arange(K, device=ids_BK.device).expand(B, K)
            self.order_BN = ids_BK.new_full((B, N + 1), K).scatter(1, place_BK, order_BK)[:, :N]  # K: hidden
            seen_BN = self.order_BN < K
        self.seen_BCP = None if seen_BN is None else seen_BN.unflatten(1, (channels, patches))  # None: all of them

    def spread(self, z_BKX: torch.Tensor) -> torch.Tensor:
        """Tokens at their places (B, C, P, X), zeros where there is none."""
        if self.ids_BK is not None:
            return take(F.pad(z_BKX, (0, 0, 0, 1)), self.order_BN).unflatten(1, (self.channels, self.patches))
        z_BCPX = z_BKX.unflatten(1, (self.channels, self.patches))
        return z_BCPX if self.seen_BCP is None else torch.where(self.seen_BCP[..., None], z_BCPX, 0.0)

    def collect(self, z_BCPX: torch.Tensor) -> torch.Tensor:
        """Tokens from their places (B, K, X)."""
        z_BNX = z_BCPX.flatten(1, 2)
        return z_BNX if self.ids_BK is None else take(z_BNX, self.ids_BK)

    def share(self, z_BPX: torch.Tensor) -> torch.Tensor:
        """For each token what belongs to its patch (B, K, X)."""
        if self.ids_BK is None:
            return z_BPX[:, None].expand(-1, self.channels, -1, -1).flatten(1, 2)
        return take(z_BPX, self.ids_BK % self.patches)


class Pool(nn.Module):
    """
    The feed-forward half of a block, which also sees the other electrodes: each head's softmax-weighted mean over those of the same patch.

    A function of a token and of a sum over its set ignores the set's order (Deep Sets, Zaheer 2017); the weights of the sum are those
    of attention by a learned seed (Set Transformer, Lee 2019). Linear in the number of electrodes.
    """

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.score = nn.Linear(d, heads)
        self.own, self.others = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d, bias=False)
        self.out = nn.Linear(2 * d, d)
        with torch.no_grad():
            self.out.weight /= math.sqrt(2 * depth)

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        h_BKD = self.norm(z_BKD)
        h_BCPD, score_BCPH = grid.spread(h_BKD), grid.spread(self.score(h_BKD))
        if grid.seen_BCP is not None:  # finite, so that a patch without any electrode gives zeros, not NaN
            score_BCPH = score_BCPH.masked_fill(~grid.seen_BCP[..., None], -1e9)
        weight_BCPH = score_BCPH.softmax(1)
        mean_BPHX = (weight_BCPH[..., None] * h_BCPD.unflatten(3, (weight_BCPH.shape[3], -1))).sum(1)
        return self.out(F.gelu(self.own(h_BKD) + grid.share(self.others(mean_BPHX.flatten(2)))))


def mean_of(z_BND: torch.Tensor, mask_BC: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens of good channels (B, D), float32."""
    if mask_BC is None:
        return z_BND.float().mean(1)
    good_BN1 = mask_BC.repeat_interleave(z_BND.shape[1] // mask_BC.shape[1], 1)[:, :, None]
    return torch.where(good_BN1, z_BND.float(), 0.0).sum(1) / good_BN1.sum(1).clamp_min(1)
