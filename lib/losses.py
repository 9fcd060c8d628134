"""
Objectives as functions of tensors. A latent loss is one number per window, so that a global batch can be split over ranks and
micro-batches; a regulariser is of the features of a whole global batch, because it is about how they differ.

Shape letters: B windows, M target tokens, D width, S slices, P points.
"""

import numpy as np
import torch
import torch.nn.functional as F

from lib.samplers import derive, key

COVARIANCE = 0.04  # weight of VICReg's covariance beside its variance term: 1 to 25 in the paper
SLICES = 1024  # directions that SIGReg looks along in a step; others in the next
REACH, POINTS = 3.0, 17  # it compares characteristic functions at this many places from 0 to REACH


def layer_normed(z_BMD: torch.Tensor) -> torch.Tensor:
    """Each token's features at mean 0 and variance 1, in float32: without it a target can shrink to zero, and the loss with it."""
    return F.layer_norm(z_BMD.float(), z_BMD.shape[-1:])


def loss_latent(
    predicted_BMD: torch.Tensor, target_BMD: torch.Tensor, real_BM: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Smooth L1 (I-JEPA, Assran 2023) between predicted and layer-normalised teacher features (B): mean over D and a window's real tokens.

    A window counts as much as any other, however many electrodes it has.
    """
    loss_BM = F.smooth_l1_loss(predicted_BMD.float(), target_BMD, reduction="none").mean(2)
    return loss_BM.mean(1) if real_BM is None else torch.where(real_BM, loss_BM, 0.0).sum(1) / real_BM.sum(1)


def loss_vicreg(z_BD: torch.Tensor) -> torch.Tensor:
    """
    VICReg's variance and covariance terms (Bardes 2022, equations 1 to 4) of the features of at least two windows, in float32 or better.

    mean over d of max(0, 1 - sqrt(C_dd + 1e-4)) + 0.04 / D x sum over d != e of C_de², with C = (z - mean)ᵀ (z - mean) / (B - 1).
    0 if all deviations are at least 1 and no two features correlate; 0.99 if all windows are alike.
    """
    z_BD = _at_least_float32(z_BD)
    z_BD = z_BD - z_BD.mean(0)
    covariance_DD = z_BD.T @ z_BD / (len(z_BD) - 1)
    variance_D = covariance_DD.diagonal()
    hinge = F.relu(1 - (variance_D + 1e-4).sqrt()).mean()
    return hinge + COVARIANCE * (covariance_DD.square().sum() - variance_D.square().sum()) / len(variance_D)


def loss_sigreg(z_BD: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """
    SIGReg (LeJEPA, Balestriero and LeCun 2025): how far from N(0, 1) the features are along random directions, in float32 or better.

    Mean over 1024 directions u of the Epps-Pulley statistic B x integral over t from -3 to 3 of |mean over b of exp(i t u·z_b) -
    exp(-t²/2)|² exp(-t²/2) dt, by the trapezium rule with 17 points from 0 to 3, where the integrand mirrors itself. Directions are a
    function of (seed, step). A sample of N(0, I) gives 1.05 for any B and D, all windows at 0 give 0.40 B, all at one far place 3.0 B.
    """
    z_BD = _at_least_float32(z_BD)
    normal_DS = np.random.default_rng(derive(key(seed, "sigreg"), step)).standard_normal((z_BD.shape[1], SLICES))
    u_DS = F.normalize(torch.from_numpy(normal_DS), dim=0).to(z_BD)
    t_P = torch.linspace(0, REACH, POINTS, dtype=z_BD.dtype, device=z_BD.device)
    gauss_P = torch.exp(-t_P.square() / 2)
    weight_P = torch.full_like(t_P, 2 * REACH / (POINTS - 1))
    weight_P[[0, -1]] /= 2
    angle_BSP = (z_BD @ u_DS)[:, :, None] * t_P
    error_SP = (angle_BSP.cos().mean(0) - gauss_P).square() + angle_BSP.sin().mean(0).square()
    return len(z_BD) * (error_SP @ (weight_P * gauss_P)).mean()


def _at_least_float32(z_BD: torch.Tensor) -> torch.Tensor:
    assert len(z_BD) > 1, f"{len(z_BD)} window has nothing to differ from"
    return z_BD if z_BD.dtype == torch.float64 else z_BD.float()
