"""
The riemann pipeline: covariance → parallel transport from the subject's mean to the model's → CSP → SVM with probabilities.

Made by scikit-learn and pyriemann (`learn`), served by NumPy alone: equal to them, at a fraction of their time per window.

Shapes: N windows, C channels (times bands, in covariances), T samples, F filters, K classes, S support vectors, B classifiers.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lib import spd
from lib.errors import Unusable
from lib.eyes import Eyes, fit_groups
from lib.intake import Path, stack

FOLDS = 5


class NotReady(RuntimeError):
    """A prediction was asked of a pipeline that isn't ready; the message says what it waits for."""


@dataclass(frozen=True)
class Machines:
    """One support vector machine per class (one for two classes) with Gaussian kernel and Platt's sigmoid, as scikit-learn fitted them."""

    centre_F: np.ndarray
    spread_F: np.ndarray
    gamma_B: np.ndarray
    support_SF: np.ndarray
    weight_BS: np.ndarray
    bias_B: np.ndarray
    slope_B: np.ndarray
    offset_B: np.ndarray

    def __call__(self, x_NF: np.ndarray) -> np.ndarray:
        """Probabilities (N, K)."""
        z_NF = (x_NF - self.centre_F) / self.spread_F
        apart_NS = np.square(z_NF[:, None] - self.support_SF).sum(2)
        told_BN = [
            np.exp(-g * apart_NS) @ w_S + b for g, w_S, b in zip(self.gamma_B, self.weight_BS, self.bias_B, strict=True)
        ]
        with np.errstate(over="ignore"):
            p_NB = 1 / (1 + np.exp(self.slope_B * np.stack(told_BN, 1) + self.offset_B))
        if p_NB.shape[1] == 1:
            return np.concatenate([1 - p_NB, p_NB], 1)
        total_N1 = p_NB.sum(1, keepdims=True)
        return np.where(total_N1 > 0, p_NB / np.where(total_N1 > 0, total_N1, 1), 1 / p_NB.shape[1])


@dataclass(frozen=True, eq=False)
class Riemann:
    """Log variances of spatially filtered windows, recentred by the subject's own, told apart by support vector machines."""

    path: Path
    classes: tuple[str, ...]
    mean_CC: np.ndarray  # of the subjects' means it was made from
    filters_FC: np.ndarray
    machines: Machines
    bands_hz: tuple[
        tuple[float, float], ...
    ] = ()  # of the window's copies whose joint covariance it is; none: as it comes
    transport_min: int = 10  # windows of the subject before anything is said
    transport_most: int = 300  # that count: then older ones fade, so that hours later it still follows
    remove_eyes: bool = False
    eyes: Eyes | None = None
    subject_CC: np.ndarray | None = None
    seen: int = 0  # windows in the subject's mean
    name = "riemann"

    @property
    def ready(self) -> str | None:
        """None, or what is still missing."""
        if self.seen < self.transport_min:
            return f"parallel transport has {self.seen} of {self.transport_min} subject windows that don't overlap"
        return None

    def covariances(self, x_NCT: np.ndarray) -> np.ndarray:
        """Of windows, in microvolts, without eyes, in all bands."""
        x_NCT = np.asarray(x_NCT, np.float64) * (1e6 if self.path.unit == "V" else 1.0)
        return spd.oas(banded(self.eyes(x_NCT) if self.eyes else x_NCT, self.bands_hz, self.path.rate_hz))

    @cached_property
    def _moved_FC(self) -> np.ndarray:
        """Transport and spatial filters in one matrix."""
        return self.filters_FC @ spd.transport(self.subject_CC, self.mean_CC)

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        """Probabilities (N, K), float64. Raises NotReady."""
        if self.ready:
            raise NotReady(self.ready)
        moved_FC = self._moved_FC
        power_NF = np.einsum("fc,ncd,fd->nf", moved_FC, self.covariances(x_NCT), moved_FC, optimize=True)
        return self.machines(np.log(power_NF))

    def fit(self, groups: dict) -> "Riemann":
        """The steps in order: eyes, if wanted, then the subject's mean from BACKGROUND (which other eyes make void)."""
        new = self
        if self.remove_eyes:
            found = fit_groups(groups, self.path, self.eyes)
            if found is not self.eyes:
                new = replace(new, eyes=found, subject_CC=None, seen=0)
        x_NCT = stack(groups.get("BACKGROUND", ()))
        if len(x_NCT):
            new = replace(new, subject_CC=spd.mean(new.covariances(x_NCT)), seen=min(len(x_NCT), self.transport_most))
        return new

    def partial_fit(self, windows) -> "Riemann":
        """Windows of the session, not overlapping, move the subject's mean."""
        x_NCT = stack(windows)
        if not len(x_NCT):
            return self
        c_NCC, weight_N = self.covariances(x_NCT), np.ones(len(x_NCT))
        if self.seen:
            c_NCC, weight_N = np.concatenate([self.subject_CC[None], c_NCC]), np.append(float(self.seen), weight_N)
        seen = min(self.seen + len(x_NCT), self.transport_most)
        return replace(self, subject_CC=spd.mean(c_NCC, weight_N), seen=seen)

    def warm(self, compile: str = "auto") -> dict:
        """Run what the first window would otherwise pay for."""
        x_1CT = np.random.default_rng(0).standard_normal((1, len(self.path.channels), self.path.window))
        ready = self if self.ready is None else replace(self, subject_CC=self.mean_CC, seen=self.transport_min)
        return timed(lambda: ready.predict_proba(x_1CT))


def banded(x_NCT: np.ndarray, bands_hz: tuple, rate_hz: float) -> np.ndarray:
    """Copies of windows in several bands as further channels (N, C x bands, T): what tells flickers apart (Kalunga et al. 2016)."""
    if not bands_hz:
        return x_NCT
    hz_F, X_NCF = np.fft.rfftfreq(x_NCT.shape[2], 1 / rate_hz), np.fft.rfft(x_NCT)
    copies = [np.fft.irfft(X_NCF * ((hz_F >= low) & (hz_F <= high)), x_NCT.shape[2]) for low, high in bands_hz]
    return np.concatenate(copies, axis=1)


def learn(
    x_NCT: np.ndarray, y_N: np.ndarray, subject_N: np.ndarray, classes: tuple[str, ...], path: Path,
    bands_hz: tuple = (), **options,
) -> Riemann:  # fmt: skip
    """
    A riemann pipeline of labelled windows (microvolts) of several subjects, each moved from its own mean to the mean of all.

    `y_N` are class numbers. Eight CSP filters (pyriemann), SVMs by scikit-learn with default C and gamma, classes of equal weight,
    calibrated on held-out subjects (on held-out windows where there are fewer than three subjects). Raises Unusable.
    """
    from pyriemann.spatialfilters import CSP

    c_NCC, subject_N = spd.oas(banded(x_NCT, bands_hz, path.rate_hz)), np.asarray(subject_N)
    means = {s: spd.mean(c_NCC[subject_N == s]) for s in np.unique(subject_N)}
    mean_CC = spd.mean(np.stack(list(means.values())))
    moved_NCC = np.empty_like(c_NCC)
    for s, own_CC in means.items():
        move_CC = spd.transport(own_CC, mean_CC)
        moved_NCC[subject_N == s] = move_CC @ c_NCC[subject_N == s] @ move_CC.T
    csp = CSP(nfilter=min(8, len(mean_CC)), log=True).fit(moved_NCC, y_N)
    features_NF = np.log(np.einsum("fc,ncd,fd->nf", csp.filters_, moved_NCC, csp.filters_, optimize=True))
    machines = fit_machines(features_NF, y_N, subject_N, len(classes))
    return Riemann(path, tuple(classes), mean_CC, csp.filters_, machines, tuple(bands_hz), **options)


def fit_machines(x_NF: np.ndarray, y_N: np.ndarray, subject_N: np.ndarray, classes: int) -> Machines:
    """Support vector machines with calibrated probabilities, one against the rest."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import SVC

    centre_F, spread_F = x_NF.mean(0), np.maximum(x_NF.std(0), 1e-9)
    z_NF = (x_NF - centre_F) / spread_F
    folds = to_calibrate_on(y_N, subject_N, classes)
    fitted, used = [], set()
    for k in range(1, classes) if classes == 2 else range(classes):
        machine = SVC(class_weight="balanced")
        calibrated = CalibratedClassifierCV(machine, method="sigmoid", cv=folds, ensemble=False).fit(z_NF, y_N == k)
        one = calibrated.calibrated_classifiers_[0]
        fitted.append((one.estimator, one.calibrators[0]))
        used |= set(one.estimator.support_.tolist())
    support = np.array(sorted(used))
    weight_BS = np.zeros((len(fitted), len(support)))
    for row_S, (machine, _) in zip(weight_BS, fitted, strict=True):
        row_S[np.searchsorted(support, machine.support_)] = machine.dual_coef_[0]
    told = [(machine._gamma, machine.intercept_[0], sigmoid.a_, sigmoid.b_) for machine, sigmoid in fitted]
    gamma_B, bias_B, slope_B, offset_B = np.array(told, np.float64).T
    return Machines(centre_F, spread_F, gamma_B, z_NF[support], weight_BS, bias_B, slope_B, offset_B)


def to_calibrate_on(y_N: np.ndarray, subject_N: np.ndarray, classes: int) -> list:
    """Folds of windows to calibrate on: subjects held out, or windows where that leaves a class out. Raises Unusable where nothing does."""
    from sklearn.model_selection import GroupKFold, StratifiedKFold

    count_K = np.bincount(y_N, minlength=classes)
    if count_K.min() < 2:
        raise Unusable(f"--target: a class has {count_K.min()} windows to learn from, and needs two or more")
    subjects = len(np.unique(subject_N))
    if subjects >= 3:
        folds = list(GroupKFold(min(FOLDS, subjects)).split(y_N, y_N, subject_N))
        if all(len(set(y_N[rows])) == classes for fold in folds for rows in fold):
            return folds
    return list(StratifiedKFold(min(FOLDS, int(count_K.min()))).split(y_N, y_N))


def timed(call) -> dict:
    """The median time of some calls after the first three."""
    for _ in range(3):
        call()
    took = []
    for _ in range(9):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return {"window_ms": round(1e3 * sorted(took)[4], 3)}
