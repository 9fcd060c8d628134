"""
What brains have in common: correlated components, inter-subject correlation, and what follows from them for moments and people.

Subjects see the same stimulus; whatever their signals (or features) share is driven by it. Correlated component analysis finds the
weights of channels that share most, in closed form; circularly shifted time courses, which share nothing but their spectra, say what
chance gives. Nothing here knows of caches or encoders: arrays in, numbers out.

Shape letters: S subjects, C channels (or features), T samples (or moments), K components, L lags, M moments, D width, N windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh


@dataclass
class Components:
    """Weights of channels, most shared component first, and the share between subjects of each: 1 if alike, 0 if unrelated."""

    weights_CK: np.ndarray
    patterns_CK: np.ndarray  # what each component looks like at the channels (Haufe 2014)
    isc_K: np.ndarray


def correlated_components(stimuli: Sequence[np.ndarray], components: int = 3, shrinkage: float = 0.1) -> Components:
    """
    Correlated component analysis (Dmochowski 2012; Parra 2019, equations 1 to 7) of one array (S, C, T) per stimulus, S and T as they come.

    Largest generalised eigenvalues of the covariances between and within subjects, each per pair and per subject, pooled over stimuli by
    time; the one within is shrunk towards a multiple of the identity. Each subject's mean over a stimulus doesn't count.
    """
    width = stimuli[0].shape[1]
    between_CC, within_CC = np.zeros((2, width, width))
    for x_SCT in stimuli:
        x_SCT = x_SCT - x_SCT.mean(2, keepdims=True)
        subjects, _, samples = x_SCT.shape
        assert subjects > 1, f"{subjects} subject has nobody to share with"
        sum_CT, own_CC = x_SCT.sum(0), np.einsum("sct,sdt->cd", x_SCT, x_SCT, optimize=True)
        within_CC += own_CC / subjects
        between_CC += (sum_CT @ sum_CT.T - own_CC) / (subjects * (subjects - 1))
    identity_CC = np.eye(width) * np.trace(within_CC) / width
    shrunk_CC = (1 - shrinkage) * within_CC + shrinkage * identity_CC
    _, weights_CK = eigh(between_CC, shrunk_CC, subset_by_index=[max(0, width - components), width - 1])
    weights_CK = weights_CK[:, ::-1]
    shared_K, own_K = (np.einsum("ck,cd,dk->k", weights_CK, m, weights_CK) for m in (between_CC, within_CC))
    patterns_CK = within_CC @ weights_CK / own_K
    return Components(weights_CK, patterns_CK, shared_K / own_K)


def isc(y_SKT: np.ndarray) -> np.ndarray:
    """
    Inter-subject correlation per component (K): covariance between subjects, mean over pairs, over variance within, mean over subjects.

    Between subjects of equal variance it is the mean correlation of all pairs. NaN where nothing varies.
    """
    return _ratio(y_SKT - y_SKT.mean(2, keepdims=True))


def _ratio(y_SKT: np.ndarray) -> np.ndarray:
    """As `isc`, of centred time courses."""
    subjects = len(y_SKT)
    own_K = (y_SKT * y_SKT).sum((0, 2))
    together_K = np.square(y_SKT.sum(0)).sum(1) - own_K
    with np.errstate(invalid="ignore", divide="ignore"):
        return together_K / ((subjects - 1) * own_K)


def isc_by_time(y_SKT: np.ndarray, samples: int, stride: int) -> np.ndarray:
    """`isc` in windows of `samples` samples, every `stride` (K, number of windows)."""
    starts = range(0, y_SKT.shape[2] - samples + 1, stride)
    return np.stack([isc(y_SKT[:, :, t : t + samples]) for t in starts], axis=1)


def isc_by_lag(y_SKT: np.ndarray, most: int) -> np.ndarray:
    """
    Inter-subject correlation where one of each pair is `lag` samples late (K, L), L = 2 most + 1 lags from -most to most; even in the lag.

    A peak at 0 as high as `isc`, and nothing beside it, is what a stimulus that all see at the same time leaves. Linear, not circular:
    divided by the samples that overlap.
    """
    y_SKT = y_SKT - y_SKT.mean(2, keepdims=True)
    subjects, _, samples = y_SKT.shape
    size = 2 * samples
    spectrum_SKF = np.fft.rfft(y_SKT, n=size)
    own_KF = (spectrum_SKF * spectrum_SKF.conj()).sum(0)
    together_KF = np.abs(spectrum_SKF.sum(0)) ** 2 - own_KF
    lags_L = np.arange(-most, most + 1)
    together_KL = np.fft.irfft(together_KF, n=size)[:, lags_L] / (samples - np.abs(lags_L))
    own_K1 = (y_SKT * y_SKT).sum((0, 2))[:, None] / samples
    with np.errstate(invalid="ignore", divide="ignore"):
        return together_KL / ((subjects - 1) * own_K1)


def isc_null(y_SKT: np.ndarray, rng: np.random.Generator, shifts: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """
    `isc` by chance (shifts, K), and p (K): the share of these values that reach the true one, which is counted among them.

    Time courses are shifted circularly, each subject's by an amount of its own. Components must have been fitted on other
    subjects, or chance looks lower than it is.
    """
    y_SKT = y_SKT - y_SKT.mean(2, keepdims=True)
    subjects, _, samples = y_SKT.shape
    # a shift turns phases, so that shifted time courses are never made
    spectrum_SKF = np.fft.rfft(y_SKT)
    weight_F = np.full(spectrum_SKF.shape[2], 2.0)
    weight_F[0] = 1
    if samples % 2 == 0:
        weight_F[-1] = 1
    own_K = (y_SKT * y_SKT).sum((0, 2))
    turn_F = -2j * np.pi * np.arange(len(weight_F)) / samples
    null_NK = np.empty((shifts, y_SKT.shape[1]))
    for n in range(shifts):
        by_S = rng.integers(0, samples, subjects)
        sum_KF = np.einsum("sf,skf->kf", np.exp(by_S[:, None] * turn_F), spectrum_SKF)
        together_K = (np.abs(sum_KF) ** 2 @ weight_F) / samples - own_K
        null_NK[n] = together_K / ((subjects - 1) * own_K)
    p_K = (1 + (null_NK >= _ratio(y_SKT)).sum(0)) / (1 + shifts)
    return null_NK, p_K


# ----------------------------------------------------------------------------
# moments and people


def retrieval(query_SMD: np.ndarray, gallery_GMD: np.ndarray | None = None, top: int = 5) -> dict[str, float]:
    """
    Which moment was a subject seeing: its features, compared by cosine with the mean of other subjects' at every moment.

    `gallery_GMD` are those others; without it they are the rest of the queries. NaN marks moments that somebody lacks. Shares of
    queries whose own moment is nearest, or among the `top` nearest, and what guessing gives; NaN if there is nothing to compare.
    """
    q_SMD = _units(query_SMD)
    others_GMD = q_SMD if gallery_GMD is None else _units(gallery_GMD)
    there_GM1 = np.isfinite(others_GMD).all(2, keepdims=True)
    sum_MD, count_M1 = np.where(there_GM1, others_GMD, 0).sum(0), there_GM1.sum(0)
    first, among, guess, guess_among, asked = 0, 0, 0.0, 0.0, 0
    for q_MD in q_SMD:
        mine_M1 = np.isfinite(q_MD).all(1, keepdims=True)
        alone = gallery_GMD is None
        rest_MD = sum_MD - np.where(mine_M1, q_MD, 0) * alone
        known_M = (count_M1 - mine_M1 * alone)[:, 0] > 0
        queries = np.flatnonzero(mine_M1[:, 0] & known_M)
        if known_M.sum() < 2 or not len(queries):
            continue
        score_QM = np.where(known_M, q_MD[queries] @ _units(rest_MD).T, -np.inf)
        own_Q1 = score_QM[np.arange(len(queries)), queries][:, None]
        rank_Q = (score_QM > own_Q1).sum(1) + (np.sum(score_QM == own_Q1, axis=1) - 1) / 2  # ties count half
        first += (rank_Q < 1).sum()
        among += (rank_Q < top).sum()
        asked += len(queries)
        guess += len(queries) / known_M.sum()
        guess_among += len(queries) * min(1.0, top / known_M.sum())
    shares = [float(n) / asked if asked else float("nan") for n in (first, among, guess, guess_among)]
    return dict(zip(("top1", f"top{top}", "top1_chance", f"top{top}_chance"), shares, strict=True))


def _units(z_XD: np.ndarray) -> np.ndarray:
    return z_XD / np.maximum(np.linalg.norm(z_XD, axis=-1, keepdims=True), 1e-12)


def nearest_alike(z_ND: np.ndarray, label_N: np.ndarray, group_N: np.ndarray, block: int = 1024) -> tuple[float, float]:
    """
    Share of windows whose nearest neighbour (cosine) among those of other groups has the same label, and that of random neighbours.

    label subject, group recording: who is it; label movie, group subject: what does he see. NaN for a window without any other of its
    label to find is left out.
    """
    z_ND = _units(z_ND - z_ND.mean(0))  # what all windows have in common says nothing
    (label_N, group_N), right, chance = (np.unique(a, return_inverse=True)[1] for a in (label_N, group_N)), [], []
    for first in range(0, len(z_ND), block):
        rows = slice(first, first + block)
        other_QN = group_N[rows, None] != group_N
        same_QN = (label_N[rows, None] == label_N) & other_QN
        possible_Q = same_QN.any(1)
        nearest_Q = np.where(other_QN, z_ND[rows] @ z_ND.T, -np.inf).argmax(1)
        right.append(same_QN[np.arange(len(nearest_Q)), nearest_Q][possible_Q])
        chance.append((same_QN.sum(1) / np.maximum(other_QN.sum(1), 1))[possible_Q])
    right_N, chance_N = np.concatenate(right), np.concatenate(chance)
    return (float(right_N.mean()), float(chance_N.mean())) if len(right_N) else (float("nan"), float("nan"))
