"""
Objectives: functions of tensors, summed over what they count, so that a global batch can be split over ranks and micro-batches.

Shape letters: B windows, M target tokens, D width.
"""

import torch
import torch.nn.functional as F


def layer_normed(z_BMD: torch.Tensor) -> torch.Tensor:
    """Each token's features at mean 0 and variance 1, in float32: without it a target can shrink to zero, and the loss with it."""
    return F.layer_norm(z_BMD.float(), z_BMD.shape[-1:])


def loss_latent(
    predicted_BMD: torch.Tensor, target_BMD: torch.Tensor, real_BM: torch.Tensor | None = None
) -> torch.Tensor:
    """Smooth L1 (I-JEPA, Assran 2023) between predicted and layer-normalised teacher features: mean over D, sum over real tokens."""
    loss_BM = F.smooth_l1_loss(predicted_BMD.float(), target_BMD, reduction="none").mean(2)
    return loss_BM.sum() if real_BM is None else torch.where(real_BM, loss_BM, 0.0).sum()
