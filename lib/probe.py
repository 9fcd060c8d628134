"""
What can be read from frozen features by a linear model on subjects it has not seen, beside band power and chance.

The protocol is the same in every phase: windows spread evenly over the recordings of the train and val splits (never test), one
linear model per label, fitted on subjects of train and scored on subjects of val, which no phase trains on. Where val is too small
for that, by cross-validation over the subjects of both; training has seen those of train then, and the protocol says so.

Scores of a label, say task: `probe_task` (balanced accuracy, or R² of a quantity) and `probe_task_auroc` (classes only; one against
the rest, averaged). Where it varies within subjects also `probe_task_recentred`: each subject's features are shifted so that their mean
over its own windows, whatever their labels, is 0. Behind each stands the same from band power (`probe_task_bandpower`,
`probe_task_auroc_bandpower`, `probe_task_recentred_bandpower`), and `probe_task_chance` is what always saying the same would give (an
AUROC of 0.5).

Shape letters: B windows, C channels, T samples, P patches per channel, N = C * P tokens, D width, F features, K classes or 1.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lib.cache import Batch, Cache
from lib.precision import autocast
from lib.traits import class_name, is_quantity, number
from lib.windows import Windows

BANDS_HZ = {"delta": (1, 4), "theta": (4, 8), "alpha": (8, 13), "beta": (13, 30), "gamma": (30, 45)}
MOST_CLASSES = 10  # a column of more distinct words says nothing that a linear probe could learn
MOST_LABELS = 12
FEWEST_SUBJECTS = 8  # in val, to be scored on it; fewer make a score that is an anecdote
TELLING_SUBJECTS = (
    12  # of train and val, cross-validated; of fewer each fold lacks a large part of a class, and scores go either way
)
FOLDS = 5
NOT_LABELS = {"session", "run", "dataset", "split", "subject"}  # who and where, not what
COVERED = 0.9  # share of a window that an event must cover to be its label
BIN_S = 10.0  # of an event's time, within which its windows are of the same stimulus
DIRECTIONS = (
    1000  # that a linear model may combine features along; those of as many windows, and all there are of fewer
)


@dataclass
class Label:
    """What is to be predicted: one value per probe window, None where it has none."""

    name: str
    classes: list[str]  # empty: a quantity
    values: list

    def __post_init__(self):
        self.known = np.array([v is not None for v in self.values])
        numbers = {c: i for i, c in enumerate(self.classes)}
        self.y_B = np.array([np.nan if v is None else numbers.get(v, v) for v in self.values], float)

    @property
    def chance(self) -> float:
        """Balanced accuracy of always saying the commonest class, or R² of always saying the mean."""
        return 1 / len(self.classes) if self.classes else 0.0


class Probe:
    """
    A fixed set of windows and labels of a cache, on which any encoder is scored.

    At most `windows` of them, spread evenly over recordings and time, with at most `max_channels` (0: all) of their channels. Labels in
    `leave_out` are not scored: an encoder that was trained on them has no business there. Those in `paired` chose the training pairs, and
    are scored on val alone: cross-validation over training subjects would find what these labels put there. `protocol` says what was done.
    """

    def __init__(
        self,
        cache: Cache,
        window_s: float,
        stride_s: float,
        windows: int = 1500,
        max_channels: int = 0,
        leave_out: Sequence[str] = (),
        paired: Sequence[str] = (),
    ):
        self.cache, self.max_channels = cache, max_channels
        rows = [i for i, r in enumerate(cache.recordings) if r.split in ("train", "val")]
        everything = cache.windows(None, window_s, stride_s, rows)
        ranges = everything.ranges(range(len(cache.recordings)))
        each = max(1, windows // len(ranges))
        chosen = [_spread(ranges[row], each) for row in sorted(ranges)]
        if len(chosen) > windows:  # more recordings than windows: an even choice of them
            chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, windows).astype(int)]
        ids = np.concatenate(chosen)
        channels = np.array([len(cache.recordings[i].names) for i in everything.locate(ids)[0]])
        order = np.argsort(channels, kind="stable")  # so that batches are of one montage and need no padding
        self.ids, self.channels = ids[order], channels[order]
        self.windows = everything
        self.row, _ = everything.locate(self.ids)
        self.subject = np.array([cache.recordings[i].subject for i in self.row])
        self.val = np.array([cache.recordings[i].split == "val" for i in self.row])
        self.same_montage = len({cache.recordings[i].names for i in self.row}) == 1
        self.baseline: dict[str, float] = {}
        told = {name.casefold() for name in leave_out}  # a flag finds its column in either case
        found = self._event_labels() + self._column_labels()
        left_out = sorted(label.name for label in found if label.name.casefold() in told)
        found = [label for label in found if label.name not in left_out]
        self.labels, too_many = found[:MOST_LABELS], found[MOST_LABELS:]
        self.plan = {label.name: self._plan(label) for label in self.labels}
        seen = [label.name for label in self.labels if label.name in paired and not self.plan[label.name][0]]
        self.labels = [label for label in self.labels if label.name not in seen]
        self.protocol = {name: words for name, (_, words) in self.plan.items()}
        self.protocol |= {
            name: "left out: training pairs were chosen by it, and val is too small to score it" for name in seen
        }
        self.protocol |= {name: "left out: it was an auxiliary target" for name in left_out}
        self.protocol |= {label.name: f"left out: there are more than {MOST_LABELS} labels" for label in too_many}

    def _column_labels(self) -> list[Label]:
        labels = []
        for name in ["task", *self.cache.columns()]:
            values = [None if v != v else v for v in self.cache.column(name)]  # NaN is missing too
            values = [values[i] for i in self.row]
            label = _as_label(name, values, self.subject)
            if label and name not in NOT_LABELS and name not in {known.name for known in labels}:
                labels.append(label)
        return labels

    def _event_labels(self) -> list[Label]:
        """One label `event`: which kind of event covers the window, if one does (eyes_open against eyes_closed, T0, T1, T2 …)."""
        label = _as_label("event", covering_events(self.windows, self.ids)[0], self.subject)
        return [label] if label else []

    def score(self, encode: Callable[[Batch], torch.Tensor], batch: int = 64) -> dict[str, float]:
        """
        The scores listed at the top of this file, of every label.

        `encode(batch)` gives features of all tokens (B, N, D) on the CPU; they are averaged over time per electrode where all
        recordings share a montage, else over everything.
        """
        if not self.labels:
            return {}
        wanted = not self.baseline
        features, powers = [], []
        for channels in np.unique(self.channels):
            ids = self.ids[self.channels == channels]
            for first in range(0, len(ids), batch):
                part = self._read(ids[first : first + batch])
                z_BCD = encode(part).float().unflatten(1, (part.mask_BC.shape[1], -1)).mean(2)
                features.append(self._readout(z_BCD, part.mask_BC))
                if wanted:
                    powers.append(self._readout(band_power(part.x_BCT, self.cache.rate_hz), part.mask_BC))
        if wanted:
            self.baseline = {f"{k}_bandpower": v for k, v in self._scores(np.concatenate(powers)).items()}
        scores = self._scores(np.concatenate(features)) | self.baseline
        scores |= {f"probe_{label.name}_chance": label.chance for label in self.labels}
        return {name: round(value, 4) for name, value in sorted(scores.items())}

    def _read(self, ids_B: np.ndarray) -> Batch:
        """Windows of one number of channels, thinned out evenly, alike in all of them."""
        part = self.windows.read(ids_B)
        count = part.mask_BC.shape[1]
        if not 0 < self.max_channels < count:
            return part
        kept = torch.from_numpy(np.linspace(0, count - 1, self.max_channels).round().astype(np.int64))
        part.x_BCT, part.positions_BC3, part.mask_BC = (
            t[:, kept] for t in (part.x_BCT, part.positions_BC3, part.mask_BC)
        )
        return part

    def _readout(self, z_BCD: torch.Tensor, mask_BC: torch.Tensor) -> np.ndarray:
        z_BCD = torch.where(mask_BC[:, :, None], z_BCD, 0.0)
        if self.same_montage:
            return z_BCD.flatten(1).numpy()
        return (z_BCD.sum(1) / mask_BC.sum(1, keepdim=True).clamp_min(1)).numpy()

    def _plan(self, label: Label) -> tuple[bool, str]:
        """Whether the label is scored on val, not by cross-validation, and what that means in words."""
        train, val = label.known & ~self.val, label.known & self.val
        fitted, scored = len(set(self.subject[train])), len(set(self.subject[val]))
        alike = not label.classes or set(label.y_B[train]) == set(label.y_B[val])
        if min(fitted, scored) >= FEWEST_SUBJECTS and alike:
            return True, f"fitted on {fitted} subjects of train, scored on {scored} of val"
        few = "; so few can't tell: by chance alone an AUROC can be near 0 or 1" * (fitted + scored < TELLING_SUBJECTS)
        return False, (
            f"cross-validated over {fitted + scored} subjects, because val alone is too small; {fitted} of them are of train, "
            f"which training has seen{few}"
        )

    def _scores(self, x_BF: np.ndarray) -> dict[str, float]:
        scores = {}
        if not np.isfinite(x_BF).all():  # diverged: there is nothing to fit, and the run itself goes back
            return scores
        for label, values in self._fit(x_BF, self.labels):
            scores |= dict(zip((f"probe_{label.name}", f"probe_{label.name}_auroc"), values, strict=False))
        varying = [label for label in self.labels if varies_within(label, self.subject)]
        for label, values in self._fit(recentre(x_BF, self.subject), varying) if varying else []:
            scores[f"probe_{label.name}_recentred"] = values[0]
        return scores

    def _fit(self, x_BF: np.ndarray, labels: list[Label]) -> list[tuple[Label, tuple[float, ...]]]:
        """What `judge` says of each label."""
        said = {label.name: np.full((len(x_BF), len(label.classes) or 1), np.nan) for label in labels}
        for on_val in (True, False):
            planned = [label for label in labels if self.plan[label.name][0] == on_val]
            folds = [(~self.val, self.val)] if on_val else subject_folds(self.subject, FOLDS)
            for fit_B, score_B in folds if planned else []:
                z_BF = project(x_BF, fit_B)
                quantities: dict[bytes, list[Label]] = {}  # known of the same windows, they share a decomposition
                for label in planned:
                    rows = fit_B & label.known
                    if label.classes:
                        answer = logistic(z_BF[rows], label.y_B[rows], z_BF[score_B], len(label.classes))
                        said[label.name][score_B] = answer
                    else:
                        quantities.setdefault(rows.tobytes(), []).append(label)
                for group in quantities.values():
                    rows = fit_B & group[0].known
                    answer_BL = ridge(z_BF[rows], np.stack([label.y_B[rows] for label in group], 1), z_BF[score_B])
                    for label, answer_B in zip(group, answer_BL.T, strict=True):
                        said[label.name][score_B] = answer_B[:, None]
        judged = []
        for label in labels:
            scored = label.known & np.isfinite(said[label.name]).all(1)
            judged.append((label, judge(said[label.name][scored], label.y_B[scored], len(label.classes))))
        return judged


def encode_by(encoder: torch.nn.Module, dtype: str) -> Callable[[Batch], torch.Tensor]:
    """A function that gives an encoder's features (B, N, D) of a batch, on the CPU."""
    device = next(encoder.parameters()).device

    @torch.no_grad()
    def encode(batch: Batch) -> torch.Tensor:
        mask_BC = None if batch.mask_BC.all() else batch.mask_BC.to(device)
        with autocast(device.type, dtype):
            return encoder(batch.x_BCT.to(device), batch.positions_BC3.to(device), mask_BC).float().cpu()

    return encode


def subject_folds(subject_B: np.ndarray, folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which rows to fit on and which to score, each subject scored once, by a model that never saw it."""
    number_B = np.unique(subject_B, return_inverse=True)[1] % folds
    return [(number_B != f, number_B == f) for f in np.unique(number_B)]


def varies_within(label: Label, subject_B: np.ndarray) -> bool:
    """Whether at least two subjects have windows of several values of the label."""
    pairs = {(s, y) for s, y in zip(subject_B[label.known], label.y_B[label.known], strict=True)}
    return sum(count > 1 for count in Counter(s for s, _ in pairs).values()) > 1


def recentre(x_BF: np.ndarray, subject_B: np.ndarray) -> np.ndarray:
    """Features less their mean over all windows of the same subject."""
    x_BF = x_BF.copy()
    for subject in np.unique(subject_B):
        x_BF[subject_B == subject] -= x_BF[subject_B == subject].mean(0)
    return x_BF


def project(x_BF: np.ndarray, fit_B: np.ndarray) -> np.ndarray:
    """
    Features standardised by the rows `fit_B`, in fewer numbers if there are more features than windows to fit.

    A linear model with an L2 penalty only uses directions that the fitted windows span, and doesn't care how they are turned: with up
    to 1000 windows nothing is lost; of more, the span of 1000 even ones is kept. Float64.
    """
    centre_F, spread_F = x_BF[fit_B].mean(0), x_BF[fit_B].std(0)
    x_BF = (x_BF - centre_F) / np.where(spread_F > 1e-6 * np.abs(centre_F) + 1e-12, spread_F, 1)
    rows = np.flatnonzero(fit_B)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), DIRECTIONS)).astype(int)]
    if x_BF.shape[1] <= len(rows):
        return x_BF.astype(np.float64)
    products_BR = (x_BF @ x_BF[rows].T).astype(np.float64)
    size_R, basis_RR = np.linalg.eigh(products_BR[rows])
    real_R = size_R > max(1e-6 * size_R[-1], 1e-12)  # none, if all fitted windows have the same features
    if not real_R.any():
        return np.zeros((len(x_BF), 1))
    return products_BR @ (basis_RR[:, real_R] / np.sqrt(size_R[real_R]))


def logistic(fit_NF: np.ndarray, y_N: np.ndarray, score_BF: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities (B, K) of classes 0 … K-1 by logistic regression, all classes of equal weight; NaN if there is only one to fit."""
    # here, because it takes 1.6 s that a typing error in a flag need not wait for
    from sklearn.linear_model import LogisticRegression

    if len(set(y_N)) < 2:
        return np.full((len(score_BF), classes), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: so well regularised, more iterations change no decision
        linear = LogisticRegression(C=0.01, class_weight="balanced").fit(fit_NF, y_N)
    said_BK = np.zeros((len(score_BF), classes))
    said_BK[:, linear.classes_.astype(int)] = linear.predict_proba(score_BF)
    return said_BK


def ridge(fit_NF: np.ndarray, y_NL: np.ndarray, score_BF: np.ndarray) -> np.ndarray:
    """
    Quantities (B, L) by ridge regression with an intercept, each with the penalty of least leave-one-out error, of 11 from 1 to 1e5.

    What scikit-learn's RidgeCV gives, in a tenth of its time: one decomposition for all penalties and quantities.
    """
    centre_F, centre_L = fit_NF.mean(0), y_NL.mean(0)
    fit_NF, y_NL = fit_NF - centre_F, y_NL - centre_L
    size_F, basis_FF = np.linalg.eigh(fit_NF.T @ fit_NF)
    turned_NF = fit_NF @ basis_FF
    target_FL, power_NF = turned_NF.T @ y_NL, turned_NF**2
    fewest_L, best_FL = np.full(y_NL.shape[1], np.inf), np.zeros_like(target_FL)
    for penalty in np.logspace(0, 5, 11):
        shrunk_F = 1 / (size_F.clip(0) + penalty)
        weight_FL = shrunk_F[:, None] * target_FL
        leverage_N = power_NF @ shrunk_F + 1 / len(y_NL)
        error_L = (((y_NL - turned_NF @ weight_FL) / (1 - leverage_N)[:, None]) ** 2).sum(0)
        better_L = error_L < fewest_L
        fewest_L, best_FL = np.where(better_L, error_L, fewest_L), np.where(better_L, weight_FL, best_FL)
    return (score_BF - centre_F) @ (basis_FF @ best_FL) + centre_L


def judge(said_BK: np.ndarray, y_B: np.ndarray, classes: int) -> tuple[float, ...]:
    """R² of a quantity, or balanced accuracy and AUROC (one against the rest, averaged over the classes there are); NaN if undefined."""
    from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

    levels = np.unique(y_B)
    if len(levels) < 2:
        return (float("nan"),) * (2 if classes else 1)
    if not classes:
        return (float(r2_score(y_B, said_BK[:, 0])),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that was said and is not there
        right = balanced_accuracy_score(y_B, said_BK.argmax(1))
    return float(right), float(np.mean([roc_auc_score(y_B == k, said_BK[:, int(k)]) for k in levels]))


def by_label(scores: dict[str, float], protocol: dict[str, str]) -> dict[str, dict]:
    """What a command prints of `probe_` scores: per label of `protocol` its scores, that of `probe_task` as `score`, and how it was scored."""
    told: dict[str, dict] = {name: {} for name in sorted(protocol)}
    for key, value in scores.items():
        rest = f"{key.removeprefix('probe_')}_"
        name = max((label for label in told if rest.startswith(f"{label}_")), key=len)  # quality, not qual
        way = rest[len(name) + 1 : -1]
        told[name][way if way.startswith(("auroc", "recentred", "chance")) else f"score_{way}".rstrip("_")] = value
    return {name: {**dict(sorted(of.items())), "protocol": protocol[name]} for name, of in told.items()}


def covering_events(windows: Windows, ids_B: np.ndarray) -> tuple[list[str | None], np.ndarray]:
    """The kind of event that covers each window, None if none does, and the seconds from the event's onset to the window's start."""
    cache = windows.cache
    row_B, start_B = windows.locate(ids_B)
    kind_B: list[str | None] = [None] * len(ids_B)
    since_B = np.full(len(ids_B), np.nan)
    for name in cache.labels():
        row_N, start_N, stop_N = cache.intervals(name)
        ids, share = windows.overlap(row_N, start_N * cache.rate_hz, stop_N * cache.rate_hz)
        for b in np.flatnonzero(np.isin(ids_B, ids[share >= COVERED])):
            if kind_B[b] is None:
                onset_s = start_N[(row_N == row_B[b]) & (start_N * cache.rate_hz < start_B[b] + windows.samples / 2)]
                kind_B[b], since_B[b] = name, start_B[b] / cache.rate_hz - onset_s.max()
    return kind_B, since_B


def stimuli(windows: Windows, ids_B: np.ndarray) -> list[str | None]:
    """
    What was going on in each window, by a name that is the same in all subjects: the kind of event that covers it and how far on that
    is, in steps of 10 s; otherwise the recording's task; None if there is neither.
    """
    tasks = windows.cache.column("task")
    return [
        tasks[row] if kind is None else f"{kind} {max(0.0, since) // BIN_S:g}"
        for row, kind, since in zip(windows.locate(ids_B)[0], *covering_events(windows, ids_B), strict=True)
    ]


def band_power(x_BCT: torch.Tensor, rate_hz: float) -> torch.Tensor:
    """
    Log power of the classical bands per channel (B, C, 5); bands that a window is too short or a rate too low for are left out.

    Where that leaves none (windows of machines, of milliseconds) it is of five equal parts of the spectrum.
    """
    power_BCF = torch.fft.rfft(x_BCT * torch.hann_window(x_BCT.shape[2])).abs().square()
    hz_F = torch.fft.rfftfreq(x_BCT.shape[2], 1 / rate_hz)
    bands = [(hz_F >= low) & (hz_F < high) for low, high in BANDS_HZ.values()]
    if not any(band.any() for band in bands):
        bands = list(F.one_hot(torch.arange(len(hz_F)) * 5 // len(hz_F), 5).bool().T)
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
    if is_quantity(known):
        subjects = {s for s, v in zip(subject, values, strict=True) if v is not None}
        return Label(name, [], [number(v) for v in values]) if len(subjects) >= FEWEST_SUBJECTS else None
    if len(known) > MOST_CLASSES:
        return None
    values = [class_name(v) for v in values]
    seen = Counter(v for v, _ in {(v, s) for v, s in zip(values, subject, strict=True) if v is not None})
    kept = sorted(v for v, subjects in seen.items() if subjects >= 2)
    return Label(name, kept, [v if v in kept else None for v in values]) if len(kept) >= 2 else None
