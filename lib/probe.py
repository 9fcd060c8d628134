"""
What can be read from frozen features by a linear model on subjects it has not seen, beside band power and chance.

The protocol is the same in every phase: windows spread evenly over the recordings of the train and val splits (never test), one
linear model per label, fitted on subjects of train and scored on subjects of val; where val is too small for that, by
cross-validation over the subjects of both, which the report says.

Shape letters: B windows, C channels, T samples, P patches per channel, N = C * P tokens, D width, F features.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lib.cache import Batch, Cache

BANDS_HZ = {"delta": (1, 4), "theta": (4, 8), "alpha": (8, 13), "beta": (13, 30), "gamma": (30, 45)}
MOST_CLASSES = 10  # a column of more distinct words says nothing that a linear probe could learn
MOST_LEVELS = 5  # a column of more distinct numbers is a quantity
MOST_LABELS = 12
FEWEST_SUBJECTS = 8  # in val, to be scored on it; fewer make a score that is an anecdote
NOT_LABELS = {"session", "run", "dataset", "split", "subject"}  # who and where, not what
COVERED = 0.9  # share of a window that an event must cover to be its label


@dataclass
class Label:
    """What is to be predicted: one value per probe window, None where it has none."""

    name: str
    regression: bool
    values: list


class Probe:
    """
    A fixed set of windows and labels of a cache, on which any encoder is scored.

    At most `windows` of them, spread evenly over recordings and time.
    """

    def __init__(self, cache: Cache, window_s: float, stride_s: float, windows: int = 1500):
        self.cache = cache
        rows = [i for i, r in enumerate(cache.recordings) if r.split in ("train", "val")]
        everything = cache.windows(None, window_s, stride_s, rows)
        ranges = everything.ranges(range(len(cache.recordings)))
        each = max(1, windows // len(ranges))
        chosen = [_spread(ranges[row], each) for row in sorted(ranges)]
        if len(chosen) > windows:  # more recordings than windows: an even choice of them
            chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, windows).astype(int)]
        ids = np.concatenate(chosen)
        channels = [len(cache.recordings[i].names) for i in everything.locate(ids)[0]]
        self.ids = ids[np.argsort(channels, kind="stable")]  # so that batches are of one montage and need no padding
        self.windows = everything
        self.row, _ = everything.locate(self.ids)
        self.subject = np.array([cache.recordings[i].subject for i in self.row])
        self.val = np.array([cache.recordings[i].split == "val" for i in self.row])
        self.same_montage = len({cache.recordings[i].names for i in self.row}) == 1
        self.labels = self._column_labels() + self._event_labels()
        self.baseline: dict[str, float] = {}
        self.protocol: dict[str, str] = {}

    def _column_labels(self) -> list[Label]:
        labels = []
        for name in ["task", *self.cache.columns()]:
            values = [None if v != v else v for v in self.cache.column(name)]  # NaN is missing too
            values = [values[i] for i in self.row]
            label = _as_label(name, values, self.subject)
            if label and name not in NOT_LABELS and name not in {known.name for known in labels}:
                labels.append(label)
        return labels[:MOST_LABELS]

    def _event_labels(self) -> list[Label]:
        """One label `event`: which kind of event covers the window, if one does (eyes_open against eyes_closed, T0, T1, T2 …)."""
        values: list = [None] * len(self.ids)
        for name in self.cache.labels():
            row, start_s, stop_s = self.cache.intervals(name)
            ids, share = self.windows.overlap(row, start_s * self.cache.rate_hz, stop_s * self.cache.rate_hz)
            covered = set(ids[share >= COVERED].tolist())
            values = [
                name if window in covered and v is None else v
                for window, v in zip(self.ids.tolist(), values, strict=True)
            ]
        label = _as_label("event", values, self.subject)
        return [label] if label else []

    def score(self, encode: Callable[[Batch], torch.Tensor], batch: int = 64) -> dict[str, float]:
        """
        `probe_LABEL` (balanced accuracy or R²), `probe_LABEL_bandpower` and `probe_LABEL_chance` for every label.

        `encode(batch)` gives features of all tokens (B, N, D) on the CPU; they are averaged over time per electrode where all
        recordings share a montage, else over everything.
        """
        if not self.labels:
            return {}
        wanted = not self.baseline
        features, powers = [], []
        for first in range(0, len(self.ids), batch):
            part = self.windows.read(self.ids[first : first + batch])
            z_BCD = encode(part).float().unflatten(1, (part.mask_BC.shape[1], -1)).mean(2)
            features.append(self._readout(z_BCD, part.mask_BC))
            if wanted:
                powers.append(self._readout(band_power(part.x_BCT, self.cache.rate_hz), part.mask_BC))
        if wanted:
            self.baseline = {label.name: self._fit(np.concatenate(powers), label) for label in self.labels}
        x_BF, scores = np.concatenate(features), {}
        for label in self.labels:
            scores[f"probe_{label.name}"] = self._fit(x_BF, label)
            scores[f"probe_{label.name}_bandpower"] = self.baseline[label.name]
            classes = 0 if label.regression else len({v for v in label.values if v is not None})
            scores[f"probe_{label.name}_chance"] = (
                1 / classes if classes else 0.0
            )  # of always saying the commonest, or the mean
        return {name: round(value, 4) for name, value in scores.items()}

    def _readout(self, z_BCD: torch.Tensor, mask_BC: torch.Tensor) -> np.ndarray:
        z_BCD = torch.where(mask_BC[:, :, None], z_BCD, 0.0)
        if self.same_montage:
            return z_BCD.flatten(1).numpy()
        return (z_BCD.sum(1) / mask_BC.sum(1, keepdim=True).clamp_min(1)).numpy()

    def _fit(self, x_BF: np.ndarray, label: Label) -> float:
        known = np.array([v is not None for v in label.values])
        x_BF, subject, val = x_BF[known], self.subject[known], self.val[known]
        y_B = np.array([v for v in label.values if v is not None])
        fitted, scored = len(set(subject[~val])), len(set(subject[val]))
        if min(fitted, scored) >= FEWEST_SUBJECTS and (label.regression or set(y_B[val]) == set(y_B[~val])):
            self.protocol[label.name] = f"fitted on {fitted} subjects of train, scored on {scored} of val"
            return fit_and_score(x_BF, y_B, [(np.flatnonzero(~val), np.flatnonzero(val))], label.regression)
        self.protocol[label.name] = (
            f"cross-validated over {fitted + scored} subjects of train and val: val alone is too small"
        )
        return fit_and_score(x_BF, y_B, subject_folds(subject, 5), label.regression)


def subject_folds(subject_B: np.ndarray, folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row indices to fit on and to score, each subject scored once, by a model that never saw it."""
    number_B = np.unique(subject_B, return_inverse=True)[1] % folds
    return [(np.flatnonzero(number_B != f), np.flatnonzero(number_B == f)) for f in np.unique(number_B)]


def fit_and_score(x_BF: np.ndarray, y_B: np.ndarray, folds: list, regression: bool) -> float:
    """R² of ridge regression or balanced accuracy of logistic regression on standardised features, over all scored rows; NaN if none can be."""
    # here, because these take 1.6 s that a typing error in a flag need not wait for
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.metrics import balanced_accuracy_score, r2_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    guess_B, scored_B = np.empty(len(y_B), y_B.dtype), np.zeros(len(y_B), bool)
    for fit, score in folds:
        if not regression and len(set(y_B[fit])) < 2:
            continue  # subjects of one class only teach nothing
        linear = RidgeCV(np.logspace(0, 5, 11)) if regression else LogisticRegression(C=0.01, class_weight="balanced")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence: so well regularised, more iterations change no decision
            guess_B[score] = make_pipeline(StandardScaler(), linear).fit(x_BF[fit], y_B[fit]).predict(x_BF[score])
        scored_B[score] = True
    if not scored_B.any():
        return float("nan")
    return float((r2_score if regression else balanced_accuracy_score)(y_B[scored_B], guess_B[scored_B]))


def band_power(x_BCT: torch.Tensor, rate_hz: float) -> torch.Tensor:
    """Log power of the classical bands per channel (B, C, 5); bands above half the rate are left out."""
    power_BCF = torch.fft.rfft(x_BCT * torch.hann_window(x_BCT.shape[2])).abs().square()
    hz_F = torch.fft.rfftfreq(x_BCT.shape[2], 1 / rate_hz)
    bands = [(hz_F >= low) & (hz_F < high) for low, high in BANDS_HZ.values()]
    return torch.stack([(power_BCF[:, :, band].mean(2) + 1e-6).log() for band in bands if band.any()], 2)


def _spread(ranges: np.ndarray, count: int) -> np.ndarray:
    """At most `count` ids spread evenly over id ranges (n, 2)."""
    lengths = ranges[:, 1] - ranges[:, 0]
    total = int(lengths.sum())
    at = np.unique(((np.arange(min(count, total)) + 0.5) * total / min(count, total)).astype(np.int64))
    segment = np.searchsorted(np.cumsum(lengths), at, side="right")
    return ranges[segment, 0] + at - (np.cumsum(lengths) - lengths)[segment]


def _as_label(name: str, values: list, subject: np.ndarray) -> Label | None:
    """A label if the values are many numbers, or a few classes each seen in at least two subjects; else None."""
    known = {v for v in values if v is not None}
    numbers = [_number(v) for v in values]
    if len(known) > MOST_LEVELS and all(_number(v) is not None for v in known):
        subjects = {s for s, v in zip(subject, numbers, strict=True) if v is not None}
        return Label(name, True, numbers) if len(subjects) >= FEWEST_SUBJECTS else None
    if len(known) > MOST_CLASSES:
        return None
    seen = Counter(v for v, _ in {(v, s) for v, s in zip(values, subject, strict=True) if v is not None})
    kept = {v for v, subjects in seen.items() if subjects >= 2}
    return Label(name, False, [str(v) if v in kept else None for v in values]) if len(kept) >= 2 else None


def _number(value) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None
