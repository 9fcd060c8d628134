"""
Is this window of the healthy machine, or the usual state? Scores of a flow, and beside them the plain ones that they have to beat.

Every score is larger for stranger windows and comes with its standard error, where it is estimated by draws. Two sets go in: `healthy` windows,
which scores are fitted on and scaled by (`reference`; the flow was trained on them, too), and the windows to be judged.

Shape letters: N windows, C channels, L samples, F features, D draws of noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lib import descriptors
from lib.scores import area_under_roc, subject_bootstrap

TIMES = (0.2, 0.3, 0.4)  # of the path from noise (0) to data (1), at which a residual is looked at
NOISES = 4  # draws of it, the same for all windows
PROBES = 4  # of the divergence, per window
NEIGHBOURS = 5
BASELINE = "5-NN of log-spectra"  # what a score has to beat to be worth its network
BATCH = 64


@dataclass(frozen=True)
class Score:
    """How strange each window is, and the standard error of that (0 where nothing is drawn)."""

    value_N: np.ndarray
    error_N: np.ndarray


def plain_scores(healthy_NCL: np.ndarray, test_NCL: np.ndarray, rate_hz: float) -> dict[str, Score]:
    """What needs no network: neighbours and Mahalanobis distance of log-spectra with envelopes, kurtosis, and distance of the RMS."""
    fitted, own = (descriptors.log_spectral(x, rate_hz) for x in (healthy_NCL, test_NCL))
    mean_F, sd_F = fitted.mean(0), fitted.std(0) + 0.1  # dB
    fitted, own = (fitted - mean_F) / sd_F, (own - mean_F) / sd_F
    of_healthy, of_test = (descriptors.statistics(x).mean(1) for x in (healthy_NCL, test_NCL))
    found = {BASELINE: neighbours(fitted, own), "Mahalanobis of log-spectra": mahalanobis(fitted, own)}
    found["kurtosis"] = of_test[:, 1]
    found["RMS"] = np.abs(of_test[:, 0] - of_healthy[:, 0].mean())
    return {name: Score(value_N, np.zeros(len(value_N))) for name, value_N in found.items()}


def feature_score(healthy_NF: np.ndarray, test_NF: np.ndarray) -> Score:
    """Distance to the fifth nearest healthy window in an encoder's features, each in deviations of the healthy ones."""
    mean_F, sd_F = healthy_NF.mean(0), healthy_NF.std(0) + 1e-6
    value_N = neighbours((healthy_NF - mean_F) / sd_F, (test_NF - mean_F) / sd_F)
    return Score(value_N, np.zeros(len(value_N)))


def residual_score(
    velocity: Callable[[np.ndarray, float], np.ndarray],
    reference_NCL: np.ndarray,
    test_NCL: np.ndarray,
    noises: int = NOISES,
    seed: int = 0,
) -> Score:
    """
    How badly the flow tells signal from noise: the mean squared error of its velocity on the way to a window, in deviations of healthy windows.

    `velocity(x_NCL, t)` is the flow's at x_t = t x + (1 − t) noise, whose truth is x − noise. The noise is the same for all windows, so
    that it takes no part in their differences; the error is over its draws.
    """
    rng = np.random.default_rng([seed, 11])
    noise_DCL = rng.standard_normal((noises, *test_NCL.shape[1:]), np.float32)

    def errors(x_NCL: np.ndarray, t: float) -> np.ndarray:
        rows = []
        for noise_CL in noise_DCL:
            parts = (x_NCL[i : i + BATCH] for i in range(0, len(x_NCL), BATCH))
            gaps = [velocity(t * x + (1 - t) * noise_CL, t) - (x - noise_CL) for x in parts]
            rows.append(np.concatenate([(gap**2).mean((1, 2)) for gap in gaps]))
        return np.stack(rows)

    scaled = []
    for t in TIMES:
        of_reference = errors(reference_NCL, t).mean(0)
        scaled.append((errors(test_NCL, t) - of_reference.mean()) / (of_reference.std() + 1e-12))
    mean_DN = np.mean(scaled, 0)
    return Score(mean_DN.mean(0), mean_DN.std(0, ddof=min(1, noises - 1)) / np.sqrt(noises))


def likelihood_scores(
    encode: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray, np.ndarray]],
    reference_NCL: np.ndarray,
    test_NCL: np.ndarray,
    probes: int = PROBES,
) -> dict[str, Score]:
    """
    −log p per value, its distance from that of healthy windows (typicality, Nalisnick 2019), and the length of the noise a window comes from.

    `encode(x_NCL, probes)` integrates the flow backward: noise (N, C, L), −log p (N,) in nats, its standard error (N,) over Hutchinson's probes.
    """
    values = test_NCL[0].size

    def run(x_NCL: np.ndarray) -> list[np.ndarray]:
        parts = [encode(x_NCL[i : i + BATCH], probes) for i in range(0, len(x_NCL), BATCH)]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    _, usual_N, _ = run(reference_NCL)
    noise_NCL, nats_N, error_N = run(test_NCL)
    return {
        "−log p": Score(nats_N / values, error_N / values),
        "typicality": Score(np.abs(nats_N - np.median(usual_N)) / values, error_N / values),
        "length of the noise": Score(np.sqrt((noise_NCL**2).sum((1, 2))), np.zeros(len(nats_N))),
    }


def neighbours(fitted_MF: np.ndarray, own_NF: np.ndarray) -> np.ndarray:
    """Distance (N,) to the fitted row that is the NEIGHBOURS-th nearest."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(fitted_MF))).fit(fitted_MF).kneighbors(own_NF)[0][:, -1]


def mahalanobis(fitted_MF: np.ndarray, own_NF: np.ndarray) -> np.ndarray:
    """Mahalanobis distance (N,), the covariance shrunk as Ledoit and Wolf (2004) have it."""
    from sklearn.covariance import LedoitWolf

    return np.sqrt(LedoitWolf().fit(fitted_MF).mahalanobis(own_NF))


def table(
    scores: Mapping[str, Score], strange_N: np.ndarray, block_N: Sequence, seed: int = 0, resamples: int = 300
) -> dict[str, dict[str, float]]:
    """
    Of each score the area under the ROC curve with its 95 % interval over resampled blocks (subjects; of machines recordings), and the difference to the baseline with its own.

    A resample without strange, or without usual, blocks has no curve and doesn't count. `error` is the median standard error in
    deviations of the usual windows' scores.
    """
    block_N = np.asarray(block_N)
    names = list(scores)
    value_NS = np.stack([scores[name].value_N for name in names], 1)

    def areas(strange_N: np.ndarray, value_NS: np.ndarray) -> dict[str, float]:
        if strange_N.all() or not strange_N.any():
            return {name: float("nan") for key in ("", "gain ") for name in (key + n for n in names)}
        own = {name: area_under_roc(strange_N, value_NS[:, i]) for i, name in enumerate(names)}
        return own | {f"gain {name}": own[name] - own.get(BASELINE, float("nan")) for name in names}

    found = subject_bootstrap(areas, block_N, strange_N, value_NS, seed=seed, resamples=resamples)
    rows = {}
    for name in names:
        auroc, gain, usual = found[name], found[f"gain {name}"], scores[name].value_N[~strange_N]
        rows[name] = dict(zip(("auroc", "low", "high", "gain", "gain_low", "gain_high"), (*auroc, *gain), strict=True))
        rows[name]["error"] = float(np.median(scores[name].error_N) / (usual.std() + 1e-12))
    return rows


def verdict(tables: Mapping[str, Mapping[str, Mapping[str, float]]], least: float = 0.6) -> tuple[str, str]:
    """
    The default score and why, of several tasks (held-out machines, subjects): the one that is above the baseline by interval in `least` of them, else the baseline.
    """
    wins = {
        name: sum(rows[name]["gain_low"] > 0 for rows in tables.values() if name in rows)
        for name in dict.fromkeys(name for rows in tables.values() for name in rows)
        if name != BASELINE
    }
    name, count = max(wins.items(), key=lambda item: item[1])
    if count >= least * len(tables):
        return name, f"{name} is above {BASELINE} by interval in {count} of {len(tables)} tasks"
    return (
        BASELINE,
        f"no score is above {BASELINE} by interval in {least:.0%} of {len(tables)} tasks; the most is {count}, of {name}",
    )
