"""
What turns a window into a prediction: three pipelines with the same methods, each an immutable value.

    riemann   covariance (OAS) → parallel transport from the subject's mean to the model's → CSP → SVM with probabilities
    encoder   an encoder with its readout and head, as train_supervised.py leaves them in model.safetensors
    hybrid    both, each calibrated, averaged

`fit` (on what was collected while the eyes moved and at rest) and `partial_fit` (on windows being served, no labels needed) return a copy;
`ready` says what is still missing. Windows are (N, C, T) in the channels, order, rate and unit of `path`. A folder of a saved pipeline
holds pipeline.safetensors (arrays and, as JSON, all the rest) and, where there is an encoder, model.safetensors; nothing is unpickled.
Only an encoder needs torch; only the making of a riemann pipeline needs scikit-learn and pyriemann.

Shapes: N windows, C channels, T samples, F filters, K classes, S support vectors, B classifiers.
"""

import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import numpy as np

from lib import spd
from lib.arrays import load_arrays, save_arrays
from lib.channels import POSITIONS, canonical
from lib.errors import Unusable
from lib.eyes import Eyes
from lib.eyes import fit as fit_eyes
from lib.intake import Path

FORMAT, VERSION = "berger-pipeline", 1
FILE, MODEL = "pipeline.safetensors", "model.safetensors"
CLIP_SD = 15.0  # as lib.cache clips what is not in microvolts
FOLDS = 5


class NotReady(RuntimeError):
    """A prediction was asked of a pipeline that isn't ready; the message says what it waits for."""


def finite(windows) -> np.ndarray:
    """Windows (arrays or lib.intake.Window) as float64 (N, C, T), those left out that aren't numbers throughout."""
    kept = [x for x in (np.asarray(getattr(w, "x_CT", w), np.float64) for w in windows) if np.isfinite(x).all()]
    return np.stack(kept) if kept else np.empty((0, 0, 0))


def eyes_of(groups: dict, path: Path, before: Eyes | None, rate_hz: float | None = None) -> Eyes | None:
    """The eyes fitted on EYE_MOVEMENT against BACKGROUND; those of before where there is too little to tell."""
    moving, rest = (list(finite(groups.get(g, ()))) for g in ("EYE_MOVEMENT", "BACKGROUND"))
    to_uV = 1e6 if path.unit == "V" else 1.0  # so that its floor means the same
    found = fit_eyes([to_uV * x for x in moving], [to_uV * x for x in rest], rate_hz or path.rate_hz)
    return found or before


# ----------------------------------------------------------------------------
# riemann


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
            return f"parallel transport has {self.seen} of {self.transport_min} subject windows"
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
            found = eyes_of(groups, self.path, self.eyes)
            if found is not self.eyes:
                new = replace(new, eyes=found, subject_CC=None, seen=0)
        x_NCT = finite(groups.get("BACKGROUND", ()))
        if len(x_NCT):
            new = replace(new, subject_CC=spd.mean(new.covariances(x_NCT)), seen=min(len(x_NCT), self.transport_most))
        return new

    def partial_fit(self, windows) -> "Riemann":
        """Windows of the session, not overlapping, move the subject's mean."""
        x_NCT = finite(windows)
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
        return _timed(lambda: ready.predict_proba(x_1CT))


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
    folds = _folds(y_N, subject_N, classes)
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


def _folds(y_N: np.ndarray, subject_N: np.ndarray, classes: int) -> list:
    """To calibrate on: subjects held out, or windows where that leaves a class out. Raises Unusable where nothing does."""
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


# ----------------------------------------------------------------------------
# encoder


@dataclass(frozen=True, eq=False)
class Encoder:
    """
    A Decoder of lib/readouts.py on one window after the other, in float32 and one thread.

    Where it was trained on signals scaled per recording, the scale of this session is a step that is fitted at rest.
    """

    path: Path
    classes: tuple[str, ...]
    decoder: Any  # lib.readouts.Decoder
    meta: dict  # of its file
    target: int = 0  # which of its targets
    scale_min: int = 10  # windows before anything is said
    remove_eyes: bool = False
    eyes: Eyes | None = None
    scale_C: np.ndarray | None = None  # microvolts per unit of the model's signals
    offset_C: np.ndarray | None = None
    seen: int = 0  # windows the scale is of
    quick: Any = None  # the decoder as TorchScript, for windows one by one
    name = "encoder"

    @property
    def scaled(self) -> str:
        """How its signals were scaled: robust, zscore or none."""
        return self.meta["signal"]["scale"]

    @property
    def ready(self) -> str | None:
        """None, or what is still missing."""
        if self.scaled != "none" and self.seen < self.scale_min:
            return f"the scale of the channels has {self.seen} of {self.scale_min} subject windows"
        return None

    @cached_property
    def _positions_C3(self) -> np.ndarray:
        return np.array([POSITIONS.get(canonical(n), (np.nan,) * 3) for n in self.path.channels], np.float32)

    @cached_property
    def _silent_C(self) -> np.ndarray:
        """The only channel that is zero without being bad: the reference."""
        reference = [canonical(n) for n in self.path.reference.split(",")]
        return np.array([reference == [canonical(n)] for n in self.path.channels])

    def signal(self, x_NCT: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Windows as the decoder knows them, float32, and which channels are good; None: all are."""
        x_NCT = np.asarray(x_NCT, np.float64) * (1e6 if self.path.unit == "V" else 1.0)
        good_NC = x_NCT.any(2) | self._silent_C
        x_NCT = self.eyes(x_NCT) if self.eyes else x_NCT
        if self.scaled != "none":
            x_NCT = (x_NCT - self.offset_C[:, None]) / self.scale_C[:, None]
        x_NCT = np.where(good_NC[..., None], x_NCT.clip(-CLIP_SD, CLIP_SD) if self.scaled != "none" else x_NCT, 0)
        return x_NCT.astype(np.float32), None if good_NC.all() else good_NC

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        """Probabilities (N, K), float64. Raises NotReady."""
        import torch

        if self.ready:
            raise NotReady(self.ready)
        x_NCT, good_NC = self.signal(x_NCT)
        x_BCT = torch.from_numpy(x_NCT)
        positions_BC3 = torch.from_numpy(self._positions_C3).expand(len(x_NCT), -1, -1)
        with torch.inference_mode():
            if self.quick is not None and good_NC is None and len(x_NCT) == 1:
                out = list(self.quick(x_BCT, positions_BC3))
            else:
                mask_BC = None if good_NC is None else torch.from_numpy(good_NC)
                part = SimpleNamespace(x_BCT=x_BCT, signal=(x_BCT, positions_BC3, mask_BC))
                out = self.decoder(part)
            p_NK = self.decoder.say(out)[self.target].double().numpy()
        if self.decoder.reading.stretches:  # of a seizure in any stretch of the window
            p_NK = np.stack([1 - p_NK.max(1), p_NK.max(1)], 1)
        return p_NK

    def fit(self, groups: dict) -> "Encoder":
        """The steps in order: eyes, if wanted, then the scale from BACKGROUND (which other eyes make void)."""
        new = self
        if self.remove_eyes:
            found = eyes_of(groups, self.path, self.eyes)
            if found is not self.eyes:
                new = replace(new, eyes=found, scale_C=None, offset_C=None, seen=0)
        x_NCT = finite(groups.get("BACKGROUND", ()))
        if len(x_NCT) and self.scaled != "none":
            scale_C, offset_C = new._measure(x_NCT)
            new = replace(new, scale_C=scale_C, offset_C=offset_C, seen=len(x_NCT))
        return new

    def partial_fit(self, windows) -> "Encoder":
        """Where nothing was recorded at rest, the first windows say the scale; later ones change nothing."""
        x_NCT = finite(windows)
        if self.scaled == "none" or self.seen >= self.scale_min or not len(x_NCT):
            return self
        scale_C, offset_C = self._measure(x_NCT)
        if self.seen:
            share = len(x_NCT) / (self.seen + len(x_NCT))
            scale_C = self.scale_C ** (1 - share) * scale_C**share
            offset_C = self.offset_C * (1 - share) + offset_C * share
        return replace(self, scale_C=scale_C, offset_C=offset_C, seen=self.seen + len(x_NCT))

    def _measure(self, x_NCT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and offset of each channel as the cache builder would say of these windows as a recording."""
        x_NCT = x_NCT * (1e6 if self.path.unit == "V" else 1.0)
        x_NCT = self.eyes(x_NCT) if self.eyes else x_NCT
        x_CT = x_NCT.transpose(1, 0, 2).reshape(x_NCT.shape[1], -1)
        if self.scaled == "zscore":
            scale_C, offset_C = x_CT.std(1), x_CT.mean(1)
        else:
            low_C, offset_C, high_C = np.quantile(x_CT, (0.25, 0.5, 0.75), axis=1)
            scale_C = (high_C - low_C) / 1.349
        return np.where(scale_C > 1e-6, scale_C, 1.0), offset_C

    def warm(self, compile: str = "auto") -> dict:
        """
        Run what the first window would otherwise pay for; `auto` keeps TorchScript where it gives the same and is a tenth faster.

        Which is faster is measured, so it may differ from one start to the next, and with it the last bits: `off` where they matter.
        """
        import torch

        C, T = len(self.path.channels), self.path.window
        x_1CT = np.random.default_rng(0).standard_normal((1, C, T))
        one = np.ones(C)
        ready = self if self.ready is None else replace(self, scale_C=one, offset_C=0 * one, seen=self.scale_min)
        done = _timed(lambda: ready.predict_proba(x_1CT)) | {"compiled": False}
        if compile == "off":
            return done
        x_1CT, _ = ready.signal(x_1CT)
        example = torch.from_numpy(x_1CT), torch.from_numpy(self._positions_C3)[None]
        quick = _script(self.decoder, example)
        if quick is None:
            return done
        trial = replace(ready, quick=quick)
        window = np.random.default_rng(1).standard_normal((1, C, T))
        same = np.allclose(trial.predict_proba(window), ready.predict_proba(window), atol=1e-5)
        with_it = _timed(lambda: trial.predict_proba(window))
        if same and (compile == "on" or with_it["window_ms"] < 0.9 * done["window_ms"]):
            object.__setattr__(self, "quick", quick)  # a cache, like any cached_property: what is said stays the same
            return with_it | {"compiled": True}
        return done


def _script(decoder, example: tuple):
    """The decoder as frozen TorchScript for windows of one shape, or None where it can't be traced."""
    import warnings

    import torch

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, x_BCT, positions_BC3):
            return tuple(self.decoder(SimpleNamespace(x_BCT=x_BCT, signal=(x_BCT, positions_BC3, None))))

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # that shapes become constants is what is wanted
        try:
            quick = torch.jit.freeze(torch.jit.trace(Plain().eval(), example, check_trace=False))
            for _ in range(3):  # its optimiser works during the first calls
                quick(*example)
        except RuntimeError:
            return None
    return quick


def _timed(call) -> dict:
    """The median time of some calls after the first three."""
    for _ in range(3):
        call()
    took = []
    for _ in range(9):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return {"window_ms": round(1e3 * sorted(took)[4], 3)}


# ----------------------------------------------------------------------------
# hybrid


@dataclass(frozen=True, eq=False)
class Hybrid:
    """A riemann pipeline and an encoder of the same windows and classes: the average of both probabilities, each at its own temperature."""

    riemann: Riemann
    encoder: Encoder
    temperature: tuple[float, float] = (1.0, 1.0)
    weight: float = 0.5  # of the encoder
    name = "hybrid"

    @property
    def path(self) -> Path:
        return self.riemann.path

    @property
    def classes(self) -> tuple[str, ...]:
        return self.riemann.classes

    @property
    def ready(self) -> str | None:
        """None, or what is still missing."""
        return self.riemann.ready or self.encoder.ready

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        """Probabilities (N, K), float64. Raises NotReady."""
        both = (self.riemann.predict_proba(x_NCT), self.encoder.predict_proba(x_NCT))
        p_NK, q_NK = (tempered(p, t) for p, t in zip(both, self.temperature, strict=True))
        return (1 - self.weight) * p_NK + self.weight * q_NK

    def fit(self, groups: dict) -> "Hybrid":
        return replace(self, riemann=self.riemann.fit(groups), encoder=self.encoder.fit(groups))

    def partial_fit(self, windows) -> "Hybrid":
        return replace(self, riemann=self.riemann.partial_fit(windows), encoder=self.encoder.partial_fit(windows))

    def warm(self, compile: str = "auto") -> dict:
        """Both parts' first windows."""
        return {"riemann": self.riemann.warm(compile), "encoder": self.encoder.warm(compile)}


def tempered(p_NK: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities whose logits are divided by a temperature (Guo 2017)."""
    q_NK = np.clip(p_NK, 1e-9, None) ** (1 / temperature)
    return q_NK / q_NK.sum(1, keepdims=True)


def calibrate(p_NK: np.ndarray, q_NK: np.ndarray, y_N: np.ndarray) -> tuple[tuple[float, float], float]:
    """Temperatures of both parts and the encoder's weight, of the least log loss on windows neither was trained on."""
    grid = np.geomspace(0.25, 8, 61)

    def loss(r_NK: np.ndarray) -> float:
        return -float(np.log(np.clip(r_NK[np.arange(len(y_N)), y_N], 1e-9, None)).mean())

    temperature = tuple(float(min(grid, key=lambda t, r=r_NK: loss(tempered(r, t)))) for r_NK in (p_NK, q_NK))
    p_NK, q_NK = tempered(p_NK, temperature[0]), tempered(q_NK, temperature[1])
    weight = min(np.linspace(0, 1, 21), key=lambda w: loss((1 - w) * p_NK + w * q_NK))
    return temperature, float(weight)


# ----------------------------------------------------------------------------
# files


def with_path(pipeline, path: Path):
    """The pipeline with another path, of the same channels, rate and filter: bad channels, step, settling time."""
    if isinstance(pipeline, Hybrid):
        parts = (replace(part, path=path) for part in (pipeline.riemann, pipeline.encoder))
        return replace(pipeline, **dict(zip(("riemann", "encoder"), parts, strict=True)))
    return replace(pipeline, path=path)


def save(pipeline, folder: str | File) -> None:
    """Write a pipeline with all it has learned in this session. Raises Unusable if the folder can't be written."""
    folder = File(folder)
    parts = {"riemann": pipeline} if isinstance(pipeline, Riemann) else {"encoder": pipeline}
    if isinstance(pipeline, Hybrid):
        parts = {"riemann": pipeline.riemann, "encoder": pipeline.encoder}
    arrays: dict[str, np.ndarray] = {}
    meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": pipeline.name}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            meta[name], own = _pack(part)
            arrays |= {f"{name}.{key}": a for key, a in own.items()}
        if "encoder" in parts:
            from lib.readouts import save_model

            save_model(folder / MODEL, parts["encoder"].decoder, parts["encoder"].meta)
        if isinstance(pipeline, Hybrid):
            meta |= {"temperature": list(pipeline.temperature), "weight": pipeline.weight}
        save_arrays(folder / FILE, arrays, meta)
    except OSError as error:
        raise Unusable(f"{folder}: {error.strerror}; name another folder") from error


def load(path: str | File, acausal: bool = False):
    """
    A pipeline from its folder, or from a run directory or model file of train_supervised.py.

    Raises Unusable in one line: missing, damaged, of another kind or version, not of the service's causal filter (unless `acausal`).
    """
    path = File(path)
    if path.name == FILE:
        path = path.parent
    if path.is_file() or (not (path / FILE).is_file() and (path / MODEL).is_file()):
        return load_encoder(path if path.is_file() else path / MODEL, acausal=acausal)
    if not (path / FILE).is_file():
        raise Unusable(
            f"--models {path}: no {FILE} or {MODEL} there (looked in {path.resolve()}); "
            "make one: python serve_realtime.py --action fit --cache CACHE --target NAME --models DIR"
        )
    arrays, meta = load_arrays(path / FILE)
    if meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise Unusable(f"{path / FILE} is {meta.get('format')} {meta.get('version')}, expected {FORMAT} {VERSION}")
    try:
        parts = {}
        for name in ("riemann", "encoder"):
            own = {k.removeprefix(f"{name}."): a for k, a in arrays.items() if k.startswith(f"{name}.")}
            if name in meta and name == "riemann":
                parts[name] = _unpack_riemann(meta[name], own)
            elif name in meta:
                parts[name] = _unpack_encoder(load_encoder(path / MODEL, acausal=acausal), meta[name], own)
        if meta["name"] == "hybrid":
            pipeline = Hybrid(**parts, temperature=tuple(map(float, meta["temperature"])), weight=float(meta["weight"]))
            if pipeline.riemann.classes != pipeline.encoder.classes:
                raise ValueError("its parts have different classes")
        else:
            pipeline = parts[meta["name"]]
        _try(pipeline)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, np.linalg.LinAlgError) as error:
        raise Unusable(f"{path / FILE} doesn't hold a whole pipeline ({error}); save it again") from error
    return pipeline


def load_encoder(file: File, target: str | None = None, acausal: bool = False) -> Encoder:
    """An encoder pipeline of a model of train_supervised.py, for one of its targets. Raises Unusable."""
    import torch

    from lib.readouts import load_model

    torch.set_num_threads(1)  # a window is too small to share, and the other cores have streams to serve
    decoder, meta, _ = load_model(file)
    signal, names = meta["signal"], [t.name for t in decoder.targets]
    if signal.get("kind") != "eeg":
        raise Unusable(f"{file} was trained on {signal.get('kind')} signals; the service takes EEG")
    if not signal.get("causal") and not acausal:
        raise Unusable(
            f"{file} was trained on zero-phase filtered signals, which no service can give it: build the cache with --causal "
            "and train again, or accept the difference with --acausal"
        )
    if target is not None and target not in names:
        raise Unusable(f"--target {target}: {file} predicts {', '.join(names)}")
    told = [k for k, t in enumerate(decoder.targets) if t.classes and target in (None, t.name)]
    if not told:
        raise Unusable(f"{file}: {target or ', '.join(names)} is a number, and the service predicts classes")
    k = told[0]
    path = signal_path(signal, tuple(meta["channels"]), round(meta["window_s"] * meta["rate_hz"]))
    return Encoder(path, tuple(decoder.targets[k].classes), decoder, meta, k)


def signal_path(signal: dict, names: tuple[str, ...], window: int, step: int | None = None) -> Path:
    """The path that gives a stream the signals of a cache with these options."""
    band = signal["band_hz"] and tuple(signal["band_hz"])
    return Path(
        channels=tuple(names),
        reference=signal["reference"],
        band_hz=band or None,
        notch_hz=tuple(signal["notch_hz"] or ()),
        rate_hz=float(signal["rate_hz"]),
        window=window,
        step=step or max(1, window // 2),
    )


def _pack(part) -> tuple[dict, dict[str, np.ndarray]]:
    """A part as JSON and arrays."""
    arrays = {
        f.name: v for f in fields(part) if isinstance(v := getattr(part, f.name), np.ndarray)
    }  # all but what is nested
    meta = {n: getattr(part, n) for n in ("remove_eyes", "seen")} | {
        "path": asdict(part.path),
        "classes": list(part.classes),
    }
    if part.eyes:
        arrays |= {f"eyes.{k}": v for k, v in vars(part.eyes).items()}
    if isinstance(part, Riemann):
        arrays |= {f"machines.{f.name}": getattr(part.machines, f.name) for f in fields(part.machines)}
        meta |= {n: getattr(part, n) for n in ("transport_min", "transport_most", "bands_hz")}
    else:
        meta |= {n: getattr(part, n) for n in ("target", "scale_min")}
    return meta, {name: np.asarray(a, np.float64) for name, a in arrays.items()}


def _unpack_path(meta: dict) -> Path:
    return Path(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta.items()})


def _nested(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays of a nested value, taken out."""
    return {k.removeprefix(f"{name}."): arrays.pop(k) for k in list(arrays) if k.startswith(f"{name}.")}


def _unpack_riemann(meta: dict, arrays: dict[str, np.ndarray]) -> Riemann:
    meta, own_eyes, machines = dict(meta), _nested(arrays, "eyes"), _nested(arrays, "machines")
    path, classes = _unpack_path(meta.pop("path")), tuple(meta.pop("classes"))
    return Riemann(
        path, classes, machines=Machines(**machines), eyes=Eyes(**own_eyes) if own_eyes else None, **arrays, **meta
    )


def _unpack_encoder(base: Encoder, meta: dict, arrays: dict[str, np.ndarray]) -> Encoder:
    meta, own_eyes = dict(meta), _nested(arrays, "eyes")
    path, classes = _unpack_path(meta.pop("path")), tuple(meta.pop("classes"))
    found = Eyes(**own_eyes) if own_eyes else None
    if tuple(base.decoder.targets[meta["target"]].classes) != classes:
        raise ValueError(f"{MODEL} beside it is another model")
    return replace(base, path=path, classes=classes, eyes=found, **arrays, **meta)


def _try(pipeline) -> None:
    """Raises ValueError where a loaded pipeline can't say anything of a window of noise."""
    parts = (pipeline.riemann, pipeline.encoder) if isinstance(pipeline, Hybrid) else (pipeline,)
    for part in parts:
        C = len(part.path.channels)
        if isinstance(part, Riemann):
            wide = C * max(1, len(part.bands_hz))
            shapes = {"mean": (part.mean_CC, (wide, wide)), "subject": (part.subject_CC, (wide, wide))}
        else:
            shapes = {"scale": (part.scale_C, (C,)), "offset": (part.offset_C, (C,))}
        shapes["eyes"] = (part.eyes and part.eyes.project_CC, (C, C))
        for name, (array, shape) in shapes.items():
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} is {array.shape}, not {shape}")
        if isinstance(part, Riemann):
            ready = part if part.seen else replace(part, subject_CC=part.mean_CC)
            ready = replace(ready, transport_min=0)
        else:
            one = np.ones(C)
            ready = part if part.seen else replace(part, scale_C=one, offset_C=0 * one)
            ready = replace(ready, scale_min=0)
        p_1K = ready.predict_proba(np.random.default_rng(0).standard_normal((1, C, part.path.window)))
        if p_1K.shape != (1, len(part.classes)) or not np.isfinite(p_1K).all():
            raise ValueError(f"says {p_1K.shape} of {len(part.classes)} classes, or no number")
