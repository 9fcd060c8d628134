"""
Adapters: an encoder behind a montage of its own, whatever the electrodes of the recording.

Perceiver: Q learned electrodes take in what the real ones of the same patch measured, the encoder works on these Q x P latent tokens,
and each real token adds to itself what it then reads from those of its patch (Perceiver IO, Jaegle 2021; learned queries over
electrodes as in LUNA, Döner 2025). Both steps know electrodes by position, never by name or number. There are thus features for each
electrode and patch of any montage, and the JEPA loss, predictor and probes use the adapter like a bare encoder: the context's latent
tokens come from visible tokens alone, the teacher's from all, and targets are the teacher's features of the hidden tokens. (When real
tokens were read out by position only, targets were nearly a function of the position: on the demo cohort they were predicted with a
cosine of 0.90, at a rank of 7 instead of 30.)

Nearest: the plain alternative to beat, each electrode's samples at the nearest of 128 places; the others take part in nothing.

Shape letters: B windows, C channels, T samples, S samples of a patch, P patches per channel, N = C * P tokens, K tokens asked for,
Q queries or latent electrodes, D width, H heads, W width of a head, X any width.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.channels import POSITIONS, SPHERE_CENTRE_M
from lib.grid import Grid, take, to_patches

MONTAGE = tuple(f"E{i}" for i in range(1, 129))  # GSN-HydroCel-128


def spread_montage(electrodes: int) -> torch.Tensor:
    """Positions (Q, 3) of so many electrodes of MONTAGE: from the vertex on, always the one farthest from those chosen (Gonzalez 1985)."""
    xyz_Q3 = np.array([POSITIONS[name] for name in MONTAGE])
    chosen = [int(np.linalg.norm(xyz_Q3 - POSITIONS["Cz"], axis=1).argmin())]
    far_Q = np.full(len(MONTAGE), np.inf)
    while len(chosen) < electrodes:
        far_Q = np.minimum(far_Q, np.linalg.norm(xyz_Q3 - xyz_Q3[chosen[-1]], axis=1))
        chosen.append(int(far_Q.argmax()))
    return torch.tensor(xyz_Q3[chosen], dtype=torch.float32)


class Across(nn.Module):
    """
    Attention from places to places: a key's logit is what it says minus (its distance / reach)^2, the reach learned per head.

    Untrained it interpolates, from the nearest electrode (3 cm) to half a head (12 cm), so montages of one head look alike from
    the start. One more key, learned, stands for nothing: what a query gets where no electrode is seen. An electrode without a
    position counts as in the middle of the head, equally far from all.
    """

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.kv, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.nothing_X = nn.Parameter(0.02 * torch.randn(2 * d))
        self.log_reach_H = nn.Parameter(torch.linspace(math.log(0.03), math.log(0.12), heads))
        self.register_buffer("centre_3", torch.tensor(SPHERE_CENTRE_M, dtype=torch.float32), persistent=False)

    def place(self, positions_BC3: torch.Tensor) -> torch.Tensor:
        """Positions from the middle of the head, in reaches of each head: (B, 1, H, C, 3), the 1 for the patches."""
        placed_BC1 = positions_BC3.isfinite().all(2, keepdim=True)
        xyz_BC3 = torch.where(placed_BC1, positions_BC3 - self.centre_3, 0.0)
        return (xyz_BC3[:, None] / self.log_reach_H.exp()[:, None, None])[:, None]

    def forward(
        self,
        query_BPQD: torch.Tensor,
        query_BQ3: torch.Tensor,
        z_BKD: torch.Tensor,
        positions_BC3: torch.Tensor,
        grid: Grid,
    ) -> torch.Tensor:
        """
        What each query finds in its patch (B, P, Q, D), among the tokens z_BKD of `grid`, whose electrodes are at positions_BC3.

        Queries that all windows or patches share may have B = 1 or P = 1.
        """
        B, P, scale = z_BKD.shape[0], grid.patches, math.sqrt(query_BPQD.shape[3] // self.heads)
        kv_BPCX = grid.spread(self.kv(self.norm(z_BKD))).transpose(1, 2)
        kv_BPCX = torch.cat([kv_BPCX, self.nothing_X.to(kv_BPCX.dtype).expand(B, P, 1, -1)], 2)
        k_BPHCW, v_BPHCW = kv_BPCX.unflatten(3, (2 * self.heads, -1)).transpose(2, 3).chunk(2, 2)
        q_BPHQW = self.q(self.norm_q(query_BPQD)).unflatten(3, (self.heads, -1)).transpose(2, 3)
        # -|q - k|^2 is 2 qk - |k|^2 and a constant of the query, so four more dimensions make a plain dot product of it
        at_k_BPHC3 = F.pad(self.place(positions_BC3), (0, 0, 0, 1))  # nothing is in the middle too
        at_q_BPHQ3 = self.place(query_BQ3)
        more_k = torch.cat([2 * at_k_BPHC3, -at_k_BPHC3.square().sum(-1, keepdim=True)], -1)
        more_q = F.pad(at_q_BPHQ3, (0, 1), value=1.0) * scale
        k, q = (
            torch.cat([t, more.to(t.dtype).expand(B, P, -1, -1, -1)], -1).flatten(0, 1)
            for t, more in ((k_BPHCW, more_k), (q_BPHQW.expand(B, P, -1, -1, -1), more_q))
        )
        seen = None
        if grid.seen_BCP is not None:
            seen = F.pad(grid.seen_BCP.transpose(1, 2), (0, 1), value=True).flatten(0, 1)[:, None, None]
        v = F.pad(v_BPHCW, (0, 4)).flatten(0, 1)  # fused attention wants one width
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1 / scale)[..., :-4]
        return self.out(a.transpose(1, 2).flatten(2).unflatten(0, (B, P)))


class Perceiver(nn.Module):
    """An encoder on `architecture.queries` learned electrodes, with the interface of a bare one."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        a = self.architecture = encoder.architecture
        self.encoder = encoder
        content_QD = 0.02 * torch.randn(a.queries, a.d_model)
        self.query_place = nn.ParameterDict({"content_QD": content_QD, "xyz_Q3": spread_montage(a.queries)})
        self.gather, self.read = Across(a.d_model, a.heads), Across(a.d_model, a.heads)
        self.norm = nn.LayerNorm(a.d_model)

    embed = property(lambda self: self.encoder.embed)
    place = property(lambda self: self.encoder.place)
    front = property(lambda self: self.encoder.front)

    def calibrate(self, parts: Sequence) -> None:
        """As the encoder's."""
        self.encoder.calibrate(parts)

    def unify(self, z_BKD: torch.Tensor, positions_BC3: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        """Features of the learned electrodes (B, Q * P, D), whatever the montage (21 in, Q out), and their grid."""
        content_QD, xyz_1Q3 = self.query_place["content_QD"], self.query_place["xyz_Q3"][None]
        query_11QD = (content_QD + self.place(xyz_1Q3, 1))[:, None]  # asks where, not when: all patches share it
        found_BPQD = self.gather(query_11QD, xyz_1Q3, z_BKD, positions_BC3, grid) + content_QD
        latent_BND = found_BPQD.transpose(1, 2).flatten(1, 2) + self.place(xyz_1Q3, grid.patches)
        latents = Grid(len(content_QD), grid.patches)
        return self.encoder.mix(latent_BND, latents), latents

    def forward(
        self,
        x_BCT: torch.Tensor,
        positions_BC3: torch.Tensor,
        mask_BC: torch.Tensor | None = None,
        ids_BK: torch.Tensor | None = None,
        real_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        z_BKD, grid = self.encoder.tokens(x_BCT, positions_BC3, mask_BC, ids_BK, real_BK)
        y_BND, latents = self.unify(z_BKD, positions_BC3, grid)
        token_BPCD, xyz_1Q3 = grid.spread(z_BKD).transpose(1, 2), self.query_place["xyz_Q3"][None]
        read_BPCD = self.read(token_BPCD, positions_BC3, y_BND, xyz_1Q3, latents)
        return self.norm(z_BKD + grid.collect(read_BPCD.transpose(1, 2)))


class Nearest(nn.Module):
    """
    An encoder on the first `architecture.queries` places of MONTAGE, spread evenly; those where no electrode is nearest count as hidden.

    Electrodes that share a place are averaged there, patch by patch, and share its features. One without a position is left out:
    its features are zeros.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.architecture, self.encoder = encoder.architecture, encoder
        self.register_buffer("xyz_Q3", spread_montage(encoder.architecture.queries), persistent=False)

    embed = property(lambda self: self.encoder.embed)
    place = property(lambda self: self.encoder.place)
    front = property(lambda self: self.encoder.front)

    def calibrate(self, parts: Sequence) -> None:
        """As the encoder's, by what it will be given."""
        patch, moved = self.architecture.patch, []
        for p in parts:
            x_BNS = to_patches(p.x_BCT, patch)
            C, P = p.x_BCT.shape[1], p.x_BCT.shape[2] // patch
            real_BN = None if p.mask_BC is None else p.mask_BC.repeat_interleave(P, 1)
            mean_BQT, real_BQP, _ = self.move(x_BNS, p.positions_BC3, Grid(C, P, None, real_BN))
            xyz_BQ3 = self.xyz_Q3.expand(len(mean_BQT), -1, -1)
            moved.append(replace(p, x_BCT=mean_BQT, positions_BC3=xyz_BQ3, mask_BC=real_BQP[:, :, 0]))
        if any(p.mask_BC.any() for p in moved):  # without a position, nothing is measured
            self.encoder.calibrate(moved)

    def move(
        self, x_BKS: torch.Tensor, positions_BC3: torch.Tensor, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Signals of the places (B, Q, T), in which patches they have some (B, Q, P), and the place of each electrode (B, C)."""
        placed_BC1 = positions_BC3.isfinite().all(2, keepdim=True)
        xyz_BC3 = torch.where(placed_BC1, positions_BC3, 0.0)
        place_BC = torch.cdist(xyz_BC3, self.xyz_Q3.expand(len(xyz_BC3), -1, -1)).argmin(2)
        one_BQC = (
            (F.one_hot(place_BC, len(self.xyz_Q3)) * placed_BC1).transpose(1, 2).double()
        )  # autocast leaves it alone
        ones_BCP = one_BQC.new_ones(*place_BC.shape, grid.patches) if grid.seen_BCP is None else grid.seen_BCP.double()
        sum_BQPS = (one_BQC @ grid.spread(x_BKS).flatten(2).double()).unflatten(2, (grid.patches, -1))
        count_BQP = one_BQC @ ones_BCP
        return (sum_BQPS / count_BQP.clamp_min(1)[..., None]).flatten(2).float(), count_BQP > 0, place_BC

    def forward(
        self,
        x_BCT: torch.Tensor,
        positions_BC3: torch.Tensor,
        mask_BC: torch.Tensor | None = None,
        ids_BK: torch.Tensor | None = None,
        real_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x_BNS = to_patches(x_BCT, self.architecture.patch)
        (B, C, _), P = x_BCT.shape, x_BNS.shape[1] // x_BCT.shape[1]
        if ids_BK is not None:
            x_BNS = take(x_BNS, ids_BK)
        elif mask_BC is not None:
            real_BK = mask_BC.repeat_interleave(P, 1)
        grid = Grid(C, P, ids_BK, real_BK)
        mean_BQT, real_BQP, place_BC = self.move(x_BNS, positions_BC3, grid)
        y_BNX = self.encoder(mean_BQT, self.xyz_Q3.expand(B, -1, -1), real_BK=real_BQP.flatten(1))
        y_BCPD = take(y_BNX.unflatten(1, (-1, P)).flatten(2), place_BC).unflatten(2, (P, -1))
        placed_BC11 = positions_BC3.isfinite().all(2)[..., None, None]
        return grid.collect(torch.where(placed_BC11, y_BCPD, 0.0))
