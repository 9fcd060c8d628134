"""
From one data set, person or day to another without labels: features are moved to where those of the training data were.

    recentre   each subject's mean (Zanini 2018, in feature space)
    normalise  mean and deviation of each recording
    adabn      mean and deviation of each data set (AdaBN, Li 2016: the statistics of a normalisation are the domain's own)
    coral      covariance of each data set (Sun 2016)

Shape letters: B windows, S subjects, X features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from lib.cache import Cache
from lib.errors import Unusable

Transfer = Literal["none", "recentre", "normalise", "adabn", "coral"]
WIDEST = 1024  # features whose covariance is kept in a model's file
SHRUNK = 0.1  # of a covariance's mean variance, added to its diagonal


@dataclass
class Domain:
    """Where features lie."""

    mean_X: np.ndarray
    std_X: np.ndarray
    covariance_XX: np.ndarray | None = None  # None: too wide

    @classmethod
    def of(cls, z_BX: np.ndarray) -> "Domain":
        wide = z_BX.shape[1] > WIDEST
        return cls(
            z_BX.mean(0), z_BX.std(0), None if wide else np.cov(z_BX, rowvar=False).reshape((z_BX.shape[1],) * 2)
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is kept in a model's file."""
        kept = {name: value for name, value in vars(self).items() if value is not None}
        return {f"domain.{name}": torch.from_numpy(np.asarray(value, np.float32)) for name, value in kept.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "Domain":
        return cls(
            **{n.removeprefix("domain."): t.double().numpy() for n, t in tensors.items() if n.startswith("domain.")}
        )


class Offsets(nn.Module):
    """
    How far each training subject's features lie from the mean of all (S, X), as measured when the heads were fitted.

    Training takes it away, because --transfer recentre scores features without it.
    """

    def __init__(self, subjects: Sequence[str], width: int):
        super().__init__()
        self.place = {subject: i for i, subject in enumerate(sorted(set(subjects)))}
        self.register_buffer("offset_SX", torch.zeros(len(self.place), width))

    def measure(self, z_BX: np.ndarray, subject_B: np.ndarray) -> None:
        """Of features of at least some windows of each subject; 0 for the others."""
        for subject in np.unique(subject_B):
            away_X = z_BX[subject_B == subject].mean(0) - z_BX.mean(0)
            self.offset_SX[self.place[subject]] = torch.from_numpy(away_X)

    def forward(self, subjects: Sequence[str]) -> torch.Tensor:
        """(B, X)."""
        return self.offset_SX[[self.place[s] for s in subjects]]


def groups(cache: Cache, row_B: np.ndarray, how: Transfer) -> np.ndarray:
    """Whose features are moved together."""
    by = {"recentre": "subject", "normalise": "key"}.get(how, "dataset")
    return np.array([getattr(cache.recordings[i], by) for i in row_B])


def moved(z_BX: np.ndarray, group_B: np.ndarray, how: Transfer, source: Domain) -> np.ndarray:
    """Features of each group moved to the source's. Raises Unusable for coral where features are too many."""
    if how == "coral" and source.covariance_XX is None:
        raise Unusable(f"--transfer coral needs at most {WIDEST} features: take --readout mean, or fewer --filters")
    z_BX = np.array(z_BX, np.float64)
    for group in np.unique(group_B) if how != "none" else ():
        own = group_B == group
        centred_BX = z_BX[own] - z_BX[own].mean(0)
        if how in ("normalise", "adabn"):
            centred_BX = centred_BX / np.maximum(centred_BX.std(0), 1e-6) * source.std_X
        elif how == "coral":
            centred_BX = centred_BX @ _power(np.cov(centred_BX, rowvar=False), -0.5) @ _power(source.covariance_XX, 0.5)
        z_BX[own] = centred_BX + source.mean_X
    return z_BX


def _power(covariance_XX: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a covariance, shrunk towards a multiple of the identity, so that there is an inverse."""
    covariance_XX = np.atleast_2d(covariance_XX)
    level = np.trace(covariance_XX) / len(covariance_XX)
    size_X, basis_XX = np.linalg.eigh(covariance_XX + SHRUNK * max(level, 1e-12) * np.eye(len(covariance_XX)))
    return (basis_XX * size_X.clip(1e-12) ** exponent) @ basis_XX.T
