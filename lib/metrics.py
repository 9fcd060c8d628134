"""
Numbers that tell a healthy representation from a collapsed one.

Shape letters: B windows, D width, K stimuli.
"""

from collections.abc import Sequence

import numpy as np
import torch

COLLAPSED_STD = 0.03  # features of two windows then have a cosine of about 0.999
FLOOR = 0.3  # share of the untrained encoder's rank and deviation; runs that learn keep at least half, collapsed ones a tenth


def effective_rank(z_BD: torch.Tensor) -> float:
    """RankMe (Garrido 2023): exp of the entropy of the singular values of the centred features; 1 to min(B - 1, D), NaN if not all are finite."""
    if not z_BD.isfinite().all():
        return float("nan")
    s = torch.linalg.svdvals((z_BD - z_BD.mean(0)).double())
    p = s / s.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def feature_std(z_BD: torch.Tensor) -> float:
    """
    Mean standard deviation of the length-normalised features times sqrt(D): about 1 if healthy, 0 if all windows look alike.

    Its square is about 1 minus the mean cosine between the features of two windows.
    """
    unit_BD = torch.nn.functional.normalize(z_BD.double(), dim=1)
    return float(unit_BD.std(0).mean() * z_BD.shape[1] ** 0.5)


def collapsed(values: dict[str, float], untrained: dict[str, float], floor: float = FLOOR) -> str | None:
    """
    What is wrong with the `feature_rank` and `feature_std` of an encoder, beside the untrained one's; None if nothing is.

    Both are needed: features that shrink to one point keep their rank, those that fall onto a line keep their deviation.
    """
    rank, std = values["feature_rank"], values["feature_std"]
    if not (np.isfinite(rank) and np.isfinite(std)):
        return "features are not finite"
    if std < COLLAPSED_STD:
        return f"all windows look alike: feature_std {std:.2g}, a mean cosine of {1 - std**2:.4f} between windows"
    for name, value in (("feature_std", std), ("feature_rank", rank)):
        if value < floor * untrained[name]:
            return f"{name} fell to {value:.2g}, below {floor:g} x the untrained encoder's {untrained[name]:.2g}"
    return None


def variance_shares(z_BD: torch.Tensor, subject_B: Sequence, stimulus_B: Sequence) -> tuple[float, float]:
    """
    Share of the features' variance that is subject, and share of the variance within subjects that is stimulus.

    Analysis of variance, summed over D: a factor's variance component over itself plus the residual (Henderson's method III, 1953).
    Subjects and stimuli may have any numbers of windows. Labels that mean nothing give 0 on average. A share is negative where groups
    differ less than chance would make them, as when all subjects did the same few things; it is at least -1 / (windows per group - 1).
    Windows labelled None are left out. NaN where labels can't tell: one subject only, or no subject with two stimuli.
    """
    placed_B = np.array([s is not None for s in subject_B], bool)
    both_B = placed_B & np.array([s is not None for s in stimulus_B], bool)
    subject_B, stimulus_B, z_BD = np.array(subject_B, str), np.array(stimulus_B, str), z_BD.double().numpy()
    return (
        _share(z_BD[placed_B], subject_B[placed_B], np.zeros(placed_B.sum())),
        _share(z_BD[both_B], stimulus_B[both_B], subject_B[both_B]),
    )


def _share(z_BD: np.ndarray, factor_B: np.ndarray, within_B: np.ndarray) -> float:
    """Variance component of a factor over itself plus the residual, both after the means of the groups `within_B` are taken off."""
    if not len(z_BD):
        return float("nan")
    level_B, group_B = (np.unique(v, return_inverse=True)[1] for v in (factor_B, within_B))
    x_BK = np.eye(level_B.max() + 1)[level_B]
    for table in (z_BD := z_BD.copy(), x_BK):
        for group in range(group_B.max() + 1):
            table[group_B == group] -= table[group_B == group].mean(0)
    size_K, basis_KK = np.linalg.eigh(x_BK.T @ x_BK)
    real_K = size_K > 1e-9 * len(z_BD)
    rank, spare = int(real_K.sum()), len(z_BD) - (group_B.max() + 1) - int(real_K.sum())
    if not rank or spare < 1:
        return float("nan")
    explained = (((x_BK @ basis_KK[:, real_K]).T @ z_BD) ** 2 / size_K[real_K, None]).sum()
    residual = ((z_BD**2).sum() - explained) / spare
    component = (explained - rank * residual) / size_K.sum()
    return float(component / (component + residual)) if component + residual > 0 else float("nan")
