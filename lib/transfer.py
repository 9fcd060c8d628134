"""
From one data set, person or day to another without labels: features are moved to where those of the training data were.

    recentre   each subject's mean (Zanini 2018, in feature space)
    normalise  mean and deviation of each recording
    adabn      mean and deviation of each data set (AdaBN, Li 2016: the statistics of a normalisation are the domain's own)
    coral      covariance of each data set (Sun 2016), in the directions of largest variance

Shape letters: B windows, S subjects, X features, R directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import nn

from lib.cache import Cache
from lib.errors import Unusable

Transfer = Literal["none", "recentre", "normalise", "adabn", "coral"]
RANK = 128  # directions of largest variance that a covariance is kept by
SHRUNK = 0.1  # of a covariance's mean variance, added to its diagonal, so that there is an inverse


@dataclass
class Domain:
    """Where features lie: their mean, deviation, and covariance as basis_XR diag(size_R) basis_XR' + level I."""

    mean_X: np.ndarray
    std_X: np.ndarray
    basis_XR: np.ndarray
    size_R: np.ndarray
    level: np.ndarray

    @classmethod
    def of(cls, z_BX: np.ndarray) -> "Domain":
        """Of features in float64; with more than RANK of them, by a randomised decomposition (Halko 2011) with a fixed seed."""
        mean_X = z_BX.mean(0)
        scaled_BX = (z_BX - mean_X) / max(len(z_BX) - 1, 1) ** 0.5
        if min(scaled_BX.shape) <= RANK:
            _, spread_R, basis_RX = np.linalg.svd(scaled_BX, full_matrices=False)
        else:
            from sklearn.utils.extmath import randomized_svd  # here: it takes a second to import

            _, spread_R, basis_RX = randomized_svd(scaled_BX, RANK, random_state=0)
        level = SHRUNK * max(float((scaled_BX**2).sum()) / z_BX.shape[1], 1e-12)
        return cls(mean_X, z_BX.std(0), basis_RX.T, spread_R**2, np.array(level))

    def shaped(self, z_BX: np.ndarray, exponent: float) -> np.ndarray:
        """Centred features times a power of the covariance."""
        rest = self.level**exponent
        return rest * z_BX + (z_BX @ self.basis_XR) * ((self.size_R + self.level) ** exponent - rest) @ self.basis_XR.T

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is kept in a model's file."""
        return {f"domain.{name}": torch.from_numpy(np.asarray(v, np.float32)) for name, v in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "Domain":
        """Raises Unusable for those of an earlier version."""
        own = {n.removeprefix("domain."): t.double().numpy() for n, t in tensors.items() if n.startswith("domain.")}
        if own.keys() != {f.name for f in fields(cls)}:
            raise Unusable("the model's file is of an earlier version of lib/transfer.py: train it again")
        return cls(**own)


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
    """Features of each group moved to the source's."""
    z_BX = np.array(z_BX, np.float64)
    for group in np.unique(group_B) if how != "none" else ():
        own = group_B == group
        centred_BX = z_BX[own] - z_BX[own].mean(0)
        if how in ("normalise", "adabn"):
            centred_BX = centred_BX / np.maximum(centred_BX.std(0), 1e-6) * source.std_X
        elif how == "coral":
            centred_BX = source.shaped(Domain.of(centred_BX).shaped(centred_BX, -0.5), 0.5)
        z_BX[own] = centred_BX + source.mean_X
    return z_BX
