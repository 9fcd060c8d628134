"""
Mixing: what channels have in common, taken off windows and put back onto generated ones by a matrix and its inverse.

Electrodes see the same sources, so most of a window of EEG is the same in its neighbours. A network that goes through channels one by one above its
tokens can't say so sample by sample, and a matrix says it exactly: the symmetric root of the channels' covariance, whose inverse, of all that
make channels uncorrelated, moves them least (Kessy 2018, eq. 3), so that each still belongs to its place on the head. Any choice of channels has
its own.

Shape letters: B windows, C channels of a window, V channels of all recordings, G groups, T samples.
"""

from collections.abc import Sequence

import numpy as np
import torch

SILENT = 1e-5  # of the mean variance: what a direction has at least, such as the one that an average reference removes


def covariance(signals: Sequence[torch.Tensor], places: Sequence[np.ndarray], channels: int) -> np.ndarray:
    """
    Of signals, each (C, T), whose rows are the `places` of V channels: the mean covariance (V, V), weighted by samples.

    Channels that no signal has are uncorrelated and of variance 1, and so are those that don't meet in all signals that have one of them.
    """
    total_VV, samples_V, met_VV = np.zeros((channels, channels)), np.zeros(channels), np.zeros((channels, channels))
    for x_CT, place_C in zip(signals, places, strict=True):
        x_CT = x_CT.double() - x_CT.double().mean(1, keepdim=True)
        at = np.ix_(place_C, place_C)
        total_VV[at] += (x_CT @ x_CT.T).numpy()
        met_VV[at] += x_CT.shape[1]
        samples_V[place_C] += x_CT.shape[1]
    whole_VV = (met_VV > 0) & (met_VV == samples_V[:, None]) & (met_VV == samples_V)
    return np.where(whole_VV, total_VV / np.maximum(met_VV, 1), np.diag(samples_V == 0).astype(float))


def own(cross_GVV: torch.Tensor, group_B: np.ndarray, place_BC: np.ndarray) -> np.ndarray:
    """The covariance (B, C, C) of windows' channels in their groups; a place of -1 is a channel alone."""
    some_BCC = cross_GVV.numpy()[group_B[:, None, None], place_BC[:, :, None], place_BC[:, None, :]]
    alone_BC = place_BC < 0
    both_BCC = alone_BC[:, :, None] | alone_BC[:, None, :]
    return np.where(both_BCC, np.eye(place_BC.shape[1]), some_BCC)


def roots(cross_BCC: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square roots (B, C, C) and their inverses, float64."""
    value_BC, vector_BCC = torch.linalg.eigh(torch.from_numpy(np.ascontiguousarray(cross_BCC)).double())
    scale_B1C = value_BC.clamp_min(0).maximum(SILENT * value_BC.mean(1, keepdim=True)).sqrt()[:, None]
    back_BCC = vector_BCC.transpose(1, 2)
    return (vector_BCC * scale_B1C) @ back_BCC, (vector_BCC / scale_B1C) @ back_BCC


def unmixed(
    x_BCT: torch.Tensor,
    cross_GVV: torch.Tensor,
    group_B: np.ndarray,
    place_BC: np.ndarray,
    mask_BC: torch.Tensor | None,
) -> torch.Tensor:
    """Windows whose channels are uncorrelated and of variance 1 in their group; those masked stay zero."""
    place_BC = place_BC if mask_BC is None else np.where(mask_BC.numpy(), place_BC, -1)
    which, inverse_B = np.unique(np.column_stack([group_B, place_BC]), axis=0, return_inverse=True)
    _, apart_UCC = roots(own(cross_GVV, which[:, 0], which[:, 1:]))
    return apart_UCC[torch.from_numpy(inverse_B.reshape(-1))].to(x_BCT) @ x_BCT
