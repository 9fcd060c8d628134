"""
Contrastive objectives: functions of the features of a whole global batch, because every window is compared with every other.

Views are in the order of lib/pairs.py: all anchors, then all partners. `alike_VV` marks the positives of each view (its own partner
among them, never itself), `excluded_VV` what is neither positive nor negative; both are symmetric.

Shape letters: B pairs, V = 2B views, N tokens, C channels, P patches, D width, H weighted sums, X = H * D.
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lib.losses import loss_vicreg
from lib.models import Architecture, Places
from lib.tensors import check_format, load_tensors, save_tensors

FORMAT, VERSION = "berger-projection", 1
COLDEST, HOTTEST = 0.01, 1.0  # bounds of a learned temperature; CLIP's lower one
FILTERS, PLACE = 4, 64  # weighted sums over electrodes, and the width of the code of a place that they are told from


class Projection(nn.Module):
    """
    Features of windows to vectors (B, P * d) for comparison, or (B, d) without `time`: per patch, sums over electrodes with weights that
    are functions of their places, then two layers. What it learns to forget stays in the encoder (Chen 2020).

    Weighted like this because what a stimulus drives is somewhere on the head, and the average reference takes the plain mean out of the
    signal: averaged over electrodes, the demo cohort's movies were not found in three times as many steps.
    """

    def __init__(self, architecture: Architecture, d: int, time: bool, temperature: float):
        super().__init__()
        wide = architecture.d_model
        self.time = time
        self.place = Places(PLACE, architecture.patch / architecture.rate_hz)
        self.weigh = nn.Linear(PLACE, FILTERS)
        self.layers = nn.Sequential(nn.Linear(FILTERS * wide, wide), nn.GELU(), nn.Linear(wide, d))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, z_BND: torch.Tensor, positions_BC3: torch.Tensor, mask_BC: torch.Tensor | None) -> torch.Tensor:
        weight_BCH = self.weigh(self.place(positions_BC3, 1))
        z_BCPD = z_BND.unflatten(1, (positions_BC3.shape[1], -1))
        if mask_BC is not None:
            weight_BCH = weight_BCH * mask_BC[:, :, None]
            z_BCPD = torch.where(mask_BC[:, :, None, None], z_BCPD, 0.0)
        good_B111 = (mask_BC if mask_BC is not None else torch.ones_like(positions_BC3[:, :, 0])).sum(1)[
            :, None, None, None
        ]
        y_BPHD = torch.einsum("bch,bcpd->bphd", weight_BCH, z_BCPD.to(weight_BCH.dtype)) / good_B111
        y_BPX = y_BPHD.flatten(2)
        return self.layers(y_BPX if self.time else y_BPX.mean(1, keepdim=True)).float().flatten(1)

    def temperature(self) -> torch.Tensor:
        """As learned so far, within bounds; outside of them it gets no gradient."""
        return self.log_temperature.exp().clamp(COLDEST, HOTTEST)


def save_projection(path: str | Path, project: Projection, architecture: Architecture, meta: dict) -> None:
    """Write a projection with what it takes to use it; `meta` says whose features it reads."""
    own = {"format": FORMAT, "version": VERSION, "architecture": asdict(architecture)}
    own |= {"width": project.layers[-1].out_features, "time": project.time}
    save_tensors(path, project.state_dict(), own | meta)


def load_projection(path: str | Path) -> tuple[Projection, dict]:
    """A projection of `save_projection` (on the CPU, in evaluation mode) and its metadata. Raises Unusable."""
    tensors, meta = load_tensors(path)
    check_format(meta, path, FORMAT, VERSION)
    project = Projection(Architecture(**meta["architecture"]), meta["width"], meta["time"], 0.1)
    project.load_state_dict(tensors)
    return project.eval(), meta


def units(y_VD: torch.Tensor) -> torch.Tensor:
    """Vectors of a global batch at length 1, after their mean is taken off: what all windows have in common tells none from another."""
    return F.normalize(y_VD - y_VD.mean(0), dim=1)


# ----------------------------------------------------------------------------
# losses


def loss_infonce(
    z_VD: torch.Tensor,
    alike_VV: torch.Tensor,
    excluded_VV: torch.Tensor,
    temperature: torch.Tensor | float,
    within: bool = True,
) -> torch.Tensor:
    """
    Symmetric InfoNCE (van den Oord 2018) of unit vectors: mean over views of -log softmax of the own partner among it and the negatives.

    Negatives are all views that are neither alike nor excluded: NT-Xent (Chen 2020); without `within` only those of the other half (CLIP).
    A view without negatives gives 0.
    """
    view_V, B = torch.arange(len(z_VD), device=z_VD.device), len(z_VD) // 2
    partner_V = (view_V + B) % (2 * B)
    out_VV = alike_VV | excluded_VV
    out_VV = out_VV if within else out_VV | ((view_V < B)[:, None] == (view_V < B))
    out_VV = out_VV.scatter(1, partner_V[:, None], False)
    logit_VV = (z_VD @ z_VD.T / temperature).masked_fill(
        out_VV | torch.eye(2 * B, dtype=torch.bool, device=z_VD.device), -torch.inf
    )
    return F.cross_entropy(logit_VV, partner_V)


def loss_supcon(
    z_VD: torch.Tensor, alike_VV: torch.Tensor, excluded_VV: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """Supervised contrastive loss L_out (Khosla 2020, equation 2) of unit vectors: all that are alike are positives, one after the other."""
    itself_VV = torch.eye(len(z_VD), dtype=torch.bool, device=z_VD.device)
    logit_VV = (z_VD @ z_VD.T / temperature).masked_fill(excluded_VV | itself_VV, -torch.inf)
    log_p_VV = torch.where(alike_VV, logit_VV - logit_VV.logsumexp(1, keepdim=True), 0.0)
    return -(log_p_VV.sum(1) / alike_VV.sum(1)).mean()


def loss_vicreg_pairs(z_VD: torch.Tensor) -> torch.Tensor:
    """VICReg (Bardes 2022, equation 6, divided by 25) of two halves: partners close, features of each half varied and uncorrelated."""
    a_BD, p_BD = z_VD.chunk(2)
    return F.mse_loss(a_BD, p_BD) + loss_vicreg(a_BD) + loss_vicreg(p_BD)


# ----------------------------------------------------------------------------
# what they do to the features


def alignment(z_VD: torch.Tensor) -> float:
    """Mean squared distance of partners (Wang and Isola 2020, alpha 2) of unit vectors: 0 if alike, 2 if unrelated."""
    a_BD, p_BD = z_VD.chunk(2)
    return float((a_BD - p_BD).square().sum(1).mean())


def uniformity(z_VD: torch.Tensor) -> float:
    """
    Log of the mean of exp(-2 x squared distance) over all pairs of unit vectors (Wang and Isola 2020): 0 if all are alike, about
    -4 + 8 / D where they are spread evenly over a sphere in many dimensions.
    """
    return float(torch.pdist(z_VD).square().mul(-2).exp().mean().log())
