"""
Scores of predictions, with intervals from a bootstrap over subjects: windows of one person are not independent.

Shape letters: B predictions, K classes, R resamples.
"""

from collections.abc import Callable

import numpy as np

BINS = 15  # of the calibration error (Guo 2017)
RESAMPLES = 1000


def nrmse(y_B: np.ndarray, guess_B: np.ndarray) -> float:
    """RMSE over the target's standard deviation (ddof 0), as the EEG Challenge 2025 scores; a constant guess at the mean has 1."""
    return float(np.sqrt(np.mean((guess_B - y_B) ** 2)) / np.std(y_B))


def challenge_score(challenge1: float, challenge2: float) -> float:
    """The EEG Challenge 2025's overall score from the two NRMSE; lower is better."""
    return 0.3 * challenge1 + 0.7 * challenge2


def regression_scores(y_B: np.ndarray, guess_B: np.ndarray) -> dict[str, float]:
    """NRMSE, MAE, R², Pearson r and Lin's concordance (1989) of one target; NaN where undefined."""
    y_B, guess_B = np.asarray(y_B, np.float64), np.asarray(guess_B, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = nrmse(y_B, guess_B)
        covariance = np.mean((y_B - y_B.mean()) * (guess_B - guess_B.mean()))
        bias = (y_B.mean() - guess_B.mean()) ** 2
        return {
            "nrmse": error,
            "mae": float(np.abs(guess_B - y_B).mean()),
            "r2": float(1 - error**2),
            "pearson_r": float(covariance / (y_B.std() * guess_B.std())),
            "concordance": float(2 * covariance / (y_B.var() + guess_B.var() + bias)),
        }


def classification_scores(y_B: np.ndarray, probability_BK: np.ndarray) -> dict[str, float]:
    """
    Scores of class probabilities for true class numbers: balanced accuracy, accuracy, AUROC, AUPRC, kappa, F1, calibration error.

    AUROC, AUPRC and F1 are of class 1 where there are two classes, else the mean of one against the rest. Classes that don't occur
    in y_B are left out of every mean.
    """
    classes, guess_B = np.unique(y_B), probability_BK.argmax(1)
    scored = classes if probability_BK.shape[1] > 2 else classes[classes == 1]
    auroc = auprc = kappa = float("nan")
    if len(classes) > 1:
        auroc = float(np.mean([area_under_roc(y_B == k, probability_BK[:, k]) for k in scored]))
        auprc = float(np.mean([average_precision(y_B == k, probability_BK[:, k]) for k in scored]))
    count_KK = np.zeros((probability_BK.shape[1],) * 2)
    np.add.at(count_KK, (y_B, guess_B), 1)
    true_K, said_K, right_K = count_KK.sum(1), count_KK.sum(0), count_KK.diagonal()
    expected = true_K @ said_K / len(y_B) ** 2
    if len(classes) > 1 and expected < 1:
        kappa = float((right_K.sum() / len(y_B) - expected) / (1 - expected))
    f1_K = 2 * right_K / np.maximum(true_K + said_K, 1)
    return {
        "balanced_accuracy": float((right_K / np.maximum(true_K, 1))[classes].mean()),
        "accuracy": float(right_K.sum() / len(y_B)),
        "auroc": auroc,
        "auprc": auprc,
        "kappa": kappa,
        "f1": float(f1_K[scored].mean()) if len(scored) else float("nan"),
        "calibration_error": calibration_error(y_B, probability_BK),
    }


def area_under_roc(true_B: np.ndarray, score_B: np.ndarray) -> float:
    """Chance that a true one has the higher score, ties counting half: scikit-learn's, in a tenth of its time (a bootstrap calls it often)."""
    _, place_B, count = np.unique(score_B, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    trues = int(true_B.sum())
    return float((rank[place_B[true_B]].sum() - trues * (trues + 1) / 2) / (trues * (len(true_B) - trues)))


def average_precision(true_B: np.ndarray, score_B: np.ndarray) -> float:
    """Mean precision over steps of recall, equal scores being one step: scikit-learn's."""
    levels, place_B = np.unique(-score_B, return_inverse=True)
    found, said = (
        np.cumsum(np.bincount(place_B, true_B, len(levels))),
        np.cumsum(np.bincount(place_B, minlength=len(levels))),
    )
    return float((np.diff(found, prepend=0) * found / said).sum() / found[-1])


def calibration_error(y_B: np.ndarray, probability_BK: np.ndarray) -> float:
    """Expected calibration error (Guo 2017, eq. 3): mean distance of confidence and accuracy over equal bins of confidence."""
    confidence_B, right_B = probability_BK.max(1), probability_BK.argmax(1) == y_B
    bin_B = np.clip(np.ceil(confidence_B * BINS).astype(int) - 1, 0, BINS - 1)
    gap = np.bincount(bin_B, right_B - confidence_B, BINS)  # count times difference of the means
    return float(np.abs(gap).sum() / len(y_B))


def subject_bootstrap(
    score: Callable[..., dict[str, float]],
    subject_B: np.ndarray,
    *values_B: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, tuple[float, float, float]]:
    """
    Each score with its 95 % interval: (value, low, high), by percentiles over resampled subjects (Efron 1979).

    `score(*values_B)` gives the scores of some rows. Resamples in which a score is undefined don't count for it; NaN bounds where
    fewer than two subjects, or no defined resample, leave nothing to say.
    """
    names, number_B = np.unique(subject_B, return_inverse=True)
    value = score(*values_B)
    order_B = np.argsort(number_B, kind="stable")
    rows = np.split(order_B, np.cumsum(np.bincount(number_B))[:-1])
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples if len(names) > 1 else 0):
        picked = np.concatenate([rows[i] for i in rng.integers(len(names), size=len(names))])
        drawn.append(score(*(v[picked] for v in values_B)))
    return {name: (v, *_interval([d[name] for d in drawn])) for name, v in value.items()}


def _interval(values: list[float]) -> tuple[float, float]:
    kept = np.array([v for v in values if np.isfinite(v)])
    return tuple(np.percentile(kept, [2.5, 97.5]).tolist()) if len(kept) else (float("nan"), float("nan"))
