"""
Numbers that tell a healthy representation from a collapsed one.

Shape letters: B windows, D width.
"""

import torch


def effective_rank(z_BD: torch.Tensor) -> float:
    """RankMe (Garrido 2023): exp of the entropy of the singular values of the centred features; between 1 and min(B - 1, D)."""
    s = torch.linalg.svdvals((z_BD - z_BD.mean(0)).double())
    p = s / s.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def feature_std(z_BD: torch.Tensor) -> float:
    """Mean standard deviation of the length-normalised features times sqrt(D): about 1 if healthy, 0 if all windows look alike."""
    unit_BD = torch.nn.functional.normalize(z_BD.double(), dim=1)
    return float(unit_BD.std(0).mean() * z_BD.shape[1] ** 0.5)
