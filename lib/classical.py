"""
What one would use without deep learning, to stand beside every model: features of windows and linear models of them.

    band_power             log power of the classical bands per site
    waveform               the signal of each site at about 10 Hz: what a matched filter of evoked potentials needs
    latency                when in the window the filter of lib/latency.py responds most, for targets that are times
    lagged_correlations    correlations of pairs of sites at several lags (ridge on them won challenge 2 in 2025)
    tangent_space          logarithm of the covariance relative to the training windows' mean (Barachant 2012, by pyriemann)
    canonical_correlation  with sines of the frequencies that classes are named after (Lin 2006); no training
    envelope_spectrum      of the rectified high-passed signal, where a damaged bearing repeats itself (Randall 2011)
    spectrum               the same bands of signals that are envelopes already (build_cache.py --envelope-hz)
    amplitude              log deviation per site in the cache's own unit

Sites are the channels themselves where all recordings have the same ones, else the 19 places of the 10-20 system, to which every montage
is interpolated. Linear models are ridge and logistic regression, their penalty from cross-validation over subjects.

Shape letters: B windows, C channels, E sites, T samples, F features, K classes or 1, L lags.
"""

import re
import warnings
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch

from lib.cache import Cache
from lib.channels import POSITIONS, TEN_TWENTY, common_sites
from lib.latency import Latency
from lib.probe import band_power
from lib.targets import Examples, Target

REACH_M = 0.03  # of the Gaussian by which a site takes in the electrodes around it
LAGS_S = (0.0, 0.02, 0.05, 0.1, 0.2)
WAVEFORM_HZ = 10.0
HARMONICS = 2
ENVELOPE_HZ = (2.0, 300.0, 64)  # lowest, highest and number of bands of the envelope's spectrum
RIDGES = 10.0 ** np.arange(-1, 6)
LOGISTICS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5


@dataclass(frozen=True)
class Sites:
    """Brings windows of any montage to the same sites: channels of these names, or these places of the 10-20 system."""

    names: tuple[str, ...]
    interpolated: bool = False

    @classmethod
    def of(cls, cache: Cache, rows) -> "Sites | None":
        """The sites of recordings `rows`; None if they differ and some electrode has no known place."""
        montages = {cache.recordings[i].names for i in rows}
        if len(montages) == 1:
            return cls(montages.pop())
        return cls(TEN_TWENTY, interpolated=True) if common_sites(montages) else None

    def fits(self, cache: Cache, rows) -> bool:
        """Whether recordings can be brought to these sites."""
        montages = {cache.recordings[i].names for i in rows}
        return montages == {self.names} or self.interpolated and bool(common_sites(montages))

    def read(self, cache: Cache, row_B: np.ndarray, start_B: np.ndarray, samples: int, unit: str) -> np.ndarray:
        """Windows at the sites, float64 (B, E, T)."""
        batch = cache.read(row_B, start_B, samples, unit)
        x_BCT = batch.x_BCT.numpy().astype(np.float64)
        if not self.interpolated:
            return x_BCT
        place_E3 = np.array([POSITIONS[name] for name in self.names])
        apart_BEC = np.linalg.norm(batch.positions_BC3.numpy()[:, None] - place_E3[:, None], axis=3)
        w_BEC = np.where(batch.mask_BC.numpy()[:, None], np.exp(-0.5 * (apart_BEC / REACH_M) ** 2) + 1e-9, 0.0)
        return (w_BEC / w_BEC.sum(2, keepdims=True).clip(1e-12)) @ x_BCT


# ----------------------------------------------------------------------------
# features (B, F) of windows (B, E, T)


def power_features(x_BET: np.ndarray, rate_hz: float) -> np.ndarray:
    return band_power(torch.from_numpy(x_BET).float(), rate_hz).flatten(1).double().numpy()


def waveform_features(x_BET: np.ndarray, rate_hz: float) -> np.ndarray:
    step = max(1, round(rate_hz / WAVEFORM_HZ))
    whole = x_BET.shape[2] // step * step
    return x_BET[:, :, :whole].reshape(*x_BET.shape[:2], -1, step).mean(3).reshape(len(x_BET), -1)


def correlation_features(x_BET: np.ndarray, rate_hz: float) -> np.ndarray:
    """Fisher-transformed correlations of all pairs at all lags; of a site with itself only at lags above 0."""
    x_BET = x_BET - x_BET.mean(2, keepdims=True)
    x_BET = x_BET / np.maximum(x_BET.std(2, keepdims=True), 1e-9)
    T, features = x_BET.shape[2], []
    for lag in sorted({round(s * rate_hz) for s in LAGS_S if round(s * rate_hz) < x_BET.shape[2] // 2}):
        r_BEE = x_BET[:, :, : T - lag] @ x_BET[:, :, lag:].transpose(0, 2, 1) / (T - lag)
        pairs = np.triu_indices(x_BET.shape[1], 1) if lag == 0 else np.indices(r_BEE.shape[1:]).reshape(2, -1)
        features.append(r_BEE[:, pairs[0], pairs[1]])
    return np.arctanh(np.clip(np.concatenate(features, 1), -0.999, 0.999))


def covariances(x_BET: np.ndarray) -> np.ndarray:
    """Covariances (B, E, E) shrunk towards the identity (OAS)."""
    from pyriemann.estimation import (
        Covariances,  # here: it takes a second that a typing error in a flag need not wait for
    )

    noise_BET = np.random.default_rng(0).standard_normal(x_BET.shape)  # a channel flagged bad is all zeros
    x_BET = x_BET + 1e-3 * x_BET.std() * noise_BET
    return Covariances("oas").transform(x_BET)


def envelope_features(x_BET: np.ndarray, rate_hz: float) -> np.ndarray:
    """Log power in bands of the squared envelope of what is above a tenth of the rate."""
    from scipy.signal import hilbert

    T = x_BET.shape[2]
    spectrum = np.fft.rfft(x_BET)
    spectrum[..., np.fft.rfftfreq(T, 1 / rate_hz) < rate_hz / 10] = 0
    envelope_BET = np.abs(hilbert(np.fft.irfft(spectrum, T))) ** 2
    return spectrum_features(envelope_BET, rate_hz)


def spectrum_features(x_BET: np.ndarray, rate_hz: float) -> np.ndarray:
    """Log power in narrow bands, of equal width on a logarithmic scale: of a cache of envelopes, which are envelopes already."""
    T = x_BET.shape[2]
    power_BEF = np.abs(np.fft.rfft((x_BET - x_BET.mean(2, keepdims=True)) * np.hanning(T))) ** 2
    hz_F = np.fft.rfftfreq(T, 1 / rate_hz)
    low, high, bands = ENVELOPE_HZ
    edge = np.geomspace(low, min(high, rate_hz / 2), bands + 1)
    chosen = [(hz_F >= a) & (hz_F < b) for a, b in zip(edge[:-1], edge[1:], strict=True)]
    return np.concatenate([np.log(power_BEF[..., c].mean(2) + 1e-6) for c in chosen if c.any()], 1)


def amplitude_features(x_BET: np.ndarray, rate_hz: float) -> np.ndarray:
    return np.log(x_BET.std(2) + 1e-9)


def correlations_with(x_BET: np.ndarray, rate_hz: float, hz_K: list[float]) -> np.ndarray:
    """Largest canonical correlation of the channels with sines and cosines of each frequency and its second harmonic (B, K)."""
    time_s_T = np.arange(x_BET.shape[2]) / rate_hz
    x_BTE = x_BET.transpose(0, 2, 1)
    q_BTE = np.linalg.qr(x_BTE - x_BTE.mean(1, keepdims=True))[0]
    best_BK = []
    for hz in hz_K:
        angle_T = 2 * np.pi * hz * time_s_T
        wave_TW = np.stack([f(h * angle_T) for h in range(1, HARMONICS + 1) for f in (np.sin, np.cos)], 1)
        q_TW = np.linalg.qr(wave_TW - wave_TW.mean(0))[0]
        best_BK.append(np.linalg.svd(q_BTE.transpose(0, 2, 1) @ q_TW, compute_uv=False)[:, 0])
    return np.stack(best_BK, 1)


FEATURES = {
    "band_power": (power_features, "model"),
    "waveform": (waveform_features, "model"),
    "lagged_correlations": (correlation_features, "model"),
    "envelope_spectrum": (envelope_features, "model"),
    "spectrum": (spectrum_features, "model"),
    "amplitude": (amplitude_features, "own"),
}


# ----------------------------------------------------------------------------
# linear models


@dataclass
class Linear:
    """Standardised features times weights: numbers, or logits of classes."""

    centre_F: np.ndarray
    spread_F: np.ndarray
    weight_FK: np.ndarray
    bias_K: np.ndarray

    def __call__(self, x_BF: np.ndarray) -> np.ndarray:
        return (x_BF - self.centre_F) / self.spread_F @ self.weight_FK + self.bias_K


def fit_linear(x_BF: np.ndarray, y_B: np.ndarray, subject_B: np.ndarray, classes: int) -> Linear:
    """
    Ridge regression (classes 0), or logistic regression with classes of equal weight; penalty by cross-validation over subjects.

    The middle penalty where there are too few subjects to cross-validate.
    """
    from sklearn.linear_model import Ridge, RidgeCV
    from sklearn.model_selection import GroupKFold

    centre_F, spread_F = x_BF.mean(0), x_BF.std(0)
    spread_F = np.where(spread_F > 1e-9, spread_F, 1.0)
    z_BF, basis_FR = (x_BF - centre_F) / spread_F, None
    if z_BF.shape[1] > len(z_BF):  # in the span of the windows, which changes nothing but the time it takes
        basis_FR = np.linalg.svd(z_BF, full_matrices=False)[2].T
        z_BF = z_BF @ basis_FR
    count = min(FOLDS, len(np.unique(subject_B)))
    folds = list(GroupKFold(count).split(z_BF, groups=subject_B)) if count > 1 else []
    if classes:
        folds = [f for f in folds if len(set(y_B[f[0]])) == len(set(y_B))]
        weight_FK, bias_K = _all_classes(_logistic(z_BF, y_B, folds), classes)
    else:
        # not by R², which is -1e30 for a fold of one subject whose value is constant, and would choose alone
        chosen = RidgeCV(RIDGES, cv=folds, scoring="neg_mean_squared_error")
        model = (chosen if folds else Ridge(RIDGES[len(RIDGES) // 2])).fit(z_BF, y_B)
        weight_FK, bias_K = model.coef_.reshape(-1, 1).copy(), np.array([model.intercept_])
    if basis_FR is not None:
        weight_FK = basis_FR @ weight_FK
    return Linear(centre_F, spread_F, weight_FK, bias_K)


def _logistic(z_BF: np.ndarray, y_B: np.ndarray, folds: list):
    """Logistic regression with the penalty of the smallest loss on held-out subjects, classes of equal weight in both."""
    from sklearn.linear_model import LogisticRegression

    _, class_B, count_K = np.unique(y_B, return_inverse=True, return_counts=True)  # folds lack none
    share_K = count_K / len(y_B)
    best, penalty = np.inf, LOGISTICS[len(LOGISTICS) // 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: so well regularised, more iterations change no decision
        for c in LOGISTICS if folds else ():
            loss = 0.0
            for fit, held in folds:
                model = LogisticRegression(C=c, class_weight="balanced", max_iter=300).fit(z_BF[fit], y_B[fit])
                told_N = model.predict_log_proba(z_BF[held])[np.arange(len(held)), class_B[held]]
                loss -= (told_N / share_K[class_B[held]]).sum()
            if loss < best:
                best, penalty = loss, c
        return LogisticRegression(C=penalty, class_weight="balanced", max_iter=300).fit(z_BF, y_B)


def _all_classes(model, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases of a logit per class; one that was not there to fit is never said."""
    weight_FK, bias_K = np.zeros((model.coef_.shape[1], classes)), np.full(classes, -1e9)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(coefficients) == 1:  # of two classes, the second one's
        coefficients, intercepts = np.stack([0 * coefficients[0], coefficients[0]]), np.array([0.0, intercepts[0]])
    there = model.classes_.astype(int)
    weight_FK[:, there], bias_K[there] = coefficients.T, intercepts
    return weight_FK, bias_K


def probabilities(logit_BK: np.ndarray) -> np.ndarray:
    e_BK = np.exp(logit_BK - logit_BK.max(1, keepdims=True))
    return e_BK / e_BK.sum(1, keepdims=True)


# ----------------------------------------------------------------------------
# baselines of a run


@dataclass
class Baseline:
    """
    One way of telling one target; `mean_EE` is what covariances are relative to, `hz_K` the frequencies to correlate with.

    Recentred: relative to each subject's own mean over its windows, without their labels (Zanini 2018).
    """

    name: str
    sites: Sites
    linear: Linear | None = None
    mean_EE: np.ndarray | None = None
    hz_K: list[float] | None = None
    recentred: bool = False
    unit: str = "model"  # of the windows: model, or own for that of the cache
    latency: Latency | None = None  # which says the one feature

    @property
    def title(self) -> str:
        """What it is called in tables and files."""
        return title(self.name, self.recentred)

    def measure(self, x_BET: np.ndarray, rate_hz: float) -> np.ndarray:
        """Of each window by itself: features (B, F), or covariances (B, E, E)."""
        if self.latency:
            with torch.no_grad():
                return self.latency(torch.from_numpy(x_BET))[:, None].double().numpy()
        return covariances(x_BET) if self.mean_EE is not None else FEATURES[self.name][0](x_BET, rate_hz)

    def features(self, measured_B: np.ndarray, subject_B: np.ndarray) -> np.ndarray:
        """What the linear model sees of what was measured, (B, F)."""
        from pyriemann.tangentspace import TangentSpace

        space = TangentSpace()
        if not self.recentred:
            if self.mean_EE is None:
                return measured_B
            space.reference_ = self.mean_EE
            return space.transform(measured_B)
        parts, order = [], []
        for subject in np.unique(subject_B):
            own = np.flatnonzero(subject_B == subject)
            x_B = measured_B[own]
            parts.append(x_B - x_B.mean(0) if self.mean_EE is None else space.fit(x_B).transform(x_B))
            order.append(own)
        return np.concatenate(parts)[np.argsort(np.concatenate(order))]

    def say(self, cache: Cache, target: Target, row_B: np.ndarray, start_B: np.ndarray, samples: int) -> np.ndarray:
        """Numbers in the target's unit (B, 1), or probabilities (B, classes)."""
        measured = []
        for some in np.array_split(np.arange(len(row_B)), -(-len(row_B) // 256)):
            unit = "model" if self.unit == "model" else cache.unit
            x_BET = self.sites.read(cache, row_B[some], start_B[some], samples, unit)
            measured.append(
                correlations_with(x_BET, cache.rate_hz, self.hz_K) if self.hz_K else self.measure(x_BET, cache.rate_hz)
            )
        measured_B = np.concatenate(measured)
        if self.hz_K:
            return probabilities(20 * measured_B)
        out_BK = self.linear(self.features(measured_B, subjects(cache, row_B)))
        return probabilities(out_BK) if target.classes else target.decode(out_BK)


def title(name: str, recentred: bool) -> str:
    """The name of a baseline in tables and files."""
    return f"{name}_recentred" if recentred else name


def subjects(cache: Cache, row_B: np.ndarray) -> np.ndarray:
    """Whose windows these are."""
    return np.array([cache.recordings[i].subject for i in row_B])


def described(
    name: str, sites: Sites, cache: Cache, row_B: np.ndarray, start_B: np.ndarray, samples: int
) -> np.ndarray:
    """Features (B, F) of windows by one of FEATURES."""
    make, unit = FEATURES[name]
    unit = cache.unit if unit == "own" else unit
    chunks = np.array_split(np.arange(len(row_B)), -(-len(row_B) // 256))
    return np.concatenate([make(sites.read(cache, row_B[c], start_B[c], samples, unit), cache.rate_hz) for c in chunks])


def frequencies(classes: tuple[str, ...]) -> list[float] | None:
    """The frequencies that all classes are named after (`13 Hz`), if they are."""
    found = [re.fullmatch(r"([\d.]+) ?Hz", name, re.IGNORECASE) for name in classes]
    return [float(m[1]) for m in found] if classes and all(found) else None


def fit_baselines(cache: Cache, examples: Examples, k: int, most: int, recentred: bool = False) -> list[Baseline]:
    """
    Baselines of target `k`, fitted on at most `most` examples; those the signals don't allow are left out.

    `recentred`: band power and tangent space a second time, relative to each subject's own mean.
    """
    target = examples.targets[k]
    ids_B = examples.even(most, k)
    row_B, start_B = examples.locate(ids_B)
    y_B = examples.values(ids_B)[:, k].astype(np.float64)
    sites = Sites.of(cache, np.unique(row_B).tolist())
    if sites is None or not len(ids_B) or (target.classes and len(set(y_B)) < 2):
        return []
    subject_B = subjects(cache, row_B)
    x_BET = sites.read(cache, row_B, start_B, examples.samples, "model")
    names = ["band_power", "amplitude"]
    if cache.signal.get("envelope_hz"):
        names += ["spectrum"]
    else:
        names += ["envelope_spectrum"] if cache.signal["kind"] == "vibration" else ["lagged_correlations"]
    names += ["waveform"] if target.source == "event" else []
    made = [Baseline(name, sites, unit="own" if name == "amplitude" else "model") for name in names]
    if len(sites.names) > 1:
        from pyriemann.tangentspace import TangentSpace

        # scaled by channel, an average reference leaves a direction empty that tells recordings, and so states, apart
        unit = "model" if "align" in cache.signal else "own"
        own_BET = x_BET if unit == "model" else sites.read(cache, row_B, start_B, examples.samples, cache.unit)
        mean_EE = TangentSpace().fit(covariances(own_BET)).reference_
        made.append(Baseline("tangent_space", sites, mean_EE=mean_EE, unit=unit))
    if recentred:
        twice = [b for b in made if b.name in ("band_power", "tangent_space")]
        made += [replace(b, recentred=True, mean_EE=copy(b.mean_EE)) for b in twice]
    for baseline in made:
        same = baseline.unit == "model"
        signal = x_BET if same else sites.read(cache, row_B, start_B, examples.samples, cache.unit)
        features_BF = baseline.features(baseline.measure(signal, cache.rate_hz), subject_B)
        baseline.linear = fit_linear(
            features_BF, y_B.astype(int) if target.classes else y_B, subject_B, len(target.classes)
        )
    if target.timed:
        latency = Latency(len(sites.names), cache.rate_hz)
        time_s_B = target.decode(y_B) - target.after_s
        said_B = latency.fit(latency.steps(torch.from_numpy(x_BET)).numpy(), time_s_B, subject_B)
        made.append(Baseline("latency", sites, fit_linear(said_B[:, None], y_B, subject_B, 0), latency=latency))
    hz_K = frequencies(target.classes)
    return [*made, *([Baseline("canonical_correlation", sites, hz_K=hz_K)] if hz_K else [])]


def pack(baselines: list[list[Baseline]]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The baselines of all targets as a description and tensors, to be kept in a model's file."""
    described, tensors = [], {}
    for k, made in enumerate(baselines):
        for b in made:
            described.append(
                {
                    "target": k,
                    "name": b.name,
                    "sites": b.sites.names,
                    "interpolated": b.sites.interpolated,
                    "hz": b.hz_K,
                    "recentred": b.recentred,
                    "unit": b.unit,
                    "rate_hz": b.latency.rate_hz if b.latency else None,
                }
            )
            arrays = {} if b.linear is None else vars(b.linear)
            arrays = arrays | ({} if b.mean_EE is None else {"mean_EE": b.mean_EE})
            kept = b.latency.state_dict() if b.latency else {}
            tensors |= {
                f"baseline.{k}.{b.title}.{n}": torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()
            } | {f"baseline.{k}.{b.title}.filter.{n}": t for n, t in kept.items()}
    return described, tensors


def unpack(described: list[dict], tensors: dict[str, torch.Tensor], targets: int) -> list[list[Baseline]]:
    """What `pack` was given."""
    baselines: list[list[Baseline]] = [[] for _ in range(targets)]
    for d in described:
        recentred = d.get("recentred", False)  # files from before there was such a thing say nothing of it
        unit = d.get("unit", "own" if d["name"] == "amplitude" else "model")
        start = f"baseline.{d['target']}.{title(d['name'], recentred)}."
        arrays = {n.removeprefix(start): t.numpy() for n, t in tensors.items() if n.startswith(start)}
        sites, latency = Sites(tuple(d["sites"]), d["interpolated"]), None
        if d["name"] == "latency":
            latency = Latency(len(sites.names), d["rate_hz"])
            kept = {n: torch.from_numpy(arrays.pop(f"filter.{n}")) for n in latency.state_dict()}
            latency.load_state_dict(kept)
        mean_EE = arrays.pop("mean_EE", None)
        linear = Linear(**arrays) if arrays else None
        baselines[d["target"]].append(Baseline(d["name"], sites, linear, mean_EE, d["hz"], recentred, unit, latency))
    return baselines


# ----------------------------------------------------------------------------
# seizures: a logistic regression of every second


def second_features(cache: Cache, row_B: np.ndarray, start_B: np.ndarray) -> np.ndarray:
    """Mean and maximum over good channels of log band power and log line length (Esteller 2001) of one second, (B, F)."""
    batch = cache.read(row_B, start_B, round(cache.rate_hz))
    length_BC1 = batch.x_BCT.diff(dim=2).abs().mean(2, keepdim=True).add(1e-3).log()
    x_BCF = torch.cat([band_power(batch.x_BCT, cache.rate_hz), length_BC1], 2).double().numpy()
    good_BC1 = batch.mask_BC.numpy()[:, :, None]
    mean_BF = np.where(good_BC1, x_BCF, 0.0).sum(1) / good_BC1.sum(1).clip(1)
    return np.concatenate([mean_BF, np.where(good_BC1, x_BCF, -1e3).max(1)], 1)


def fit_seconds(cache: Cache, examples: Examples, rows: list[int], most: int) -> Linear | None:
    """Fitted on at most `most` seconds of recordings `rows`, spread evenly; None if they are all alike."""
    row_B, start_B = _seconds(cache, rows)
    kept = np.unique(np.linspace(0, len(row_B) - 1, min(most, len(row_B))).astype(np.int64))
    row_B, start_B = row_B[kept], start_B[kept]
    start_s_B = start_B / cache.rate_hz
    y_B = examples.coverage(row_B, start_s_B, start_s_B + 1) >= 0.5
    if len(set(y_B)) < 2:
        return None
    features = [
        second_features(cache, row_B[s], start_B[s])
        for s in np.array_split(np.arange(len(row_B)), -(-len(row_B) // 256))
    ]
    subject_B = np.array([cache.recordings[i].subject for i in row_B])
    return fit_linear(np.concatenate(features), y_B.astype(int), subject_B, 2)


def along(cache: Cache, linear: Linear, row: int, stretch_s: float) -> np.ndarray:
    """The probability of a seizure in each stretch of a recording, that of its second."""
    row_B, start_B = _seconds(cache, [row])
    seconds = cache.recordings[row].samples / cache.rate_hz
    said_T = np.zeros(int(np.ceil(seconds)))
    for some in np.array_split(np.arange(len(row_B)), -(-len(row_B) // 256)):
        logit_BK = linear(second_features(cache, row_B[some], start_B[some]))
        said_T[(start_B[some] / cache.rate_hz).round().astype(int)] = probabilities(logit_BK)[:, 1]
    return said_T[(np.arange(int(np.ceil(seconds / stretch_s - 1e-9))) * stretch_s).astype(int)]


def _seconds(cache: Cache, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """All whole seconds of recordings that lie in a segment."""
    second = round(cache.rate_hz)
    pairs = [
        np.stack([np.full(len(s), row), s], 1)
        for row in rows
        for a, b in cache.recordings[row].segments
        if len(s := np.arange(-(-a // second) * second, b - second + 1, second))
    ]
    row_B, start_B = np.concatenate(pairs or [np.empty((0, 2), np.int64)]).T
    return row_B, start_B
