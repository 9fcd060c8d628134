"""
What held-out people's windows say of the moments of a movie: which moment, which movie, who is watching, and what is shared.

Always the same windows, `step_s` apart from a movie's onset, in the first channels that a cache keeps; subjects of train serve as the
gallery that moments are looked up in, and to fit the components in. Values come as plain numbers for the log, curves for the plots.

Shape letters: S subjects, M moments of a movie (in tables: of all movies, one after the other), B windows, C channels, T samples,
D width, K components.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lib.batches import Part, read_parts
from lib.cache import Cache
from lib.channels import POSITIONS, TEN_TWENTY
from lib.isc import correlated_components, isc, isc_by_lag, isc_by_time, isc_null, nearest_alike, retrieval
from lib.pairs import movie_moments

Encode = Callable[[Part], dict[str, torch.Tensor]]  # windows to named features (B, D), on the CPU

ENOUGH = 0.8  # share of the subjects that must have a moment for it to count in the inter-subject correlation
COMPONENTS, SHRINKAGE, SHIFTS = 3, 0.1, 500
SIGNAL_LAG_S, FEATURE_LAG_S, SPAN_S = 1.0, 5.0, 10.0  # of the plots: lags, and the length of the windows in movie time


@dataclass
class Curves:
    """Inter-subject correlation of the first component for a plot: by lag, mean over movies, and by time of each movie."""

    lag_s: list[float]
    by_lag: list[float]
    time_s: dict[str, list[float]]
    by_time: dict[str, list[float]]
    null: float  # 95 % of circularly shifted ones are below


class Films:
    """Moments of the movies that at least two held-out subjects saw; at most `subjects` of each split, spread evenly."""

    def __init__(
        self,
        cache: Cache,
        train: list[int],
        held: list[int],
        window_s: float,
        step_s: float,
        subjects: int,
        channels: int,
    ):
        self.cache, self.step_s, self.channels = cache, step_s, channels
        self.held, self.train = (
            {
                name: _some(rows, starts, subjects)
                for name, (rows, starts) in movie_moments(cache, part, window_s, step_s).items()
            }
            if subjects > 1
            else {}
            for part in (held, train)
        )
        self.names = sorted(self.held)
        self.samples = round(window_s * cache.rate_hz)

    def features(
        self, encode: Encode, moments: dict, batch: int = 64
    ) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
        """Tables (S, M, D) of features, NaN where a subject lacks a moment; the movie of each moment, and the subjects."""
        who = [self.cache.recordings[row].subject for rows, _ in moments.values() for row in rows]
        subjects, width, tables = sorted(set(who)), {}, {}
        films = [name for name in self.names if name in moments]
        length = {name: min(m[name][1].shape[1] for m in (self.held, self.train) if name in m) for name in films}
        film_M, first = np.repeat(films, [length[name] for name in films]), 0
        for name in films:
            row_S, start_SM = moments[name]
            start_SM = start_SM[:, : length[name]]
            s, m = np.nonzero(start_SM >= 0)
            at_S = np.array([subjects.index(self.cache.recordings[row].subject) for row in row_S])
            for low in range(0, len(s), batch):
                some = slice(low, low + batch)
                where = (row_S[s[some]], start_SM[s[some], m[some]], self.samples, np.arange(len(s[some])))
                for part in read_parts(self.cache, *where, self.channels, 0, 0, 0):
                    for kind, z_BD in encode(part).items():
                        width[kind] = z_BD.shape[1]
                        if kind not in tables:
                            tables[kind] = np.full((len(subjects), len(film_M), width[kind]), np.nan, np.float32)
                        tables[kind][at_S[s[some]][part.index_B], first + m[some][part.index_B]] = z_BD.numpy()
            first += length[name]
        return tables, film_M, subjects

    def score(self, encode: Encode) -> tuple[dict[str, float], dict[str, Curves], dict[str, np.ndarray]]:
        """
        Per kind of features: `KIND_retrieval_top1` and `_top5` (a held-out subject's moment among all, by the mean of train's; with
        `_others` by that of the other held-out ones), `KIND_subject_identity` and `KIND_movie_identity` (nearest neighbours), all with
        `_chance`, and `KIND_isc` with its p; curves, and tables of held-out subjects. Nothing where no two of them saw a movie.
        """
        if not self.names:
            return {}, {}, {}
        held, film_M, subjects = self.features(encode, self.held)
        train, film_train_M, _ = self.features(encode, self.train)
        values, curves, alike = {}, {}, np.array_equal(film_train_M, film_M)  # whether train saw the same movies
        for kind, q_SMD in held.items():
            # what all windows have in common tells nothing: the level of the gallery is taken off both
            level_D = np.nanmean(train[kind] if alike else q_SMD, axis=(0, 1))
            found = {f"_others_{key}": value for key, value in retrieval(q_SMD - level_D).items()}
            if alike:
                found |= {f"_{key}": value for key, value in retrieval(q_SMD - level_D, train[kind] - level_D).items()}
            values |= {f"{kind}_retrieval{key}": value for key, value in found.items()}
            values |= _identities(kind, q_SMD, film_M)
            if alike:
                courses = (self._courses(table[kind], film_M) for table in (train, held))
                shared, shown = self._shared(*courses, 1 / self.step_s, FEATURE_LAG_S)
                values |= {f"{kind}_{key}": value for key, value in shared.items()}
                curves |= {kind: shown} if shown else {}
        tables = {**held, "film": film_M, "subject": np.array(subjects)}
        return {k: round(v, 4) for k, v in values.items()}, curves, tables

    def score_signals(self) -> tuple[dict[str, float], dict[str, Curves]]:
        """`signal_isc` and its p of the signals themselves, and curves: what there is to be found. Components come from train."""
        common = [name for name in self.names if name in self.train]
        if not common:
            return {}, {}
        train, held = ({name: self._signals(*m[name]) for name in common} for m in (self.train, self.held))
        length = {name: min(train[name].shape[2], held[name].shape[2]) for name in common}
        train, held = ({name: x[name][:, :, : length[name]] for name in common} for x in (train, held))
        values, curves = self._shared(train, held, self.cache.rate_hz, SIGNAL_LAG_S)
        return {f"signal_{k}": round(v, 4) for k, v in values.items()}, {"signal": curves} if curves else {}

    def _courses(self, z_SMD: np.ndarray, film_M: np.ndarray) -> dict[str, np.ndarray]:
        """Time courses (S, D, M) of each movie, of the moments that enough subjects have; what is missing is the subject's mean."""
        courses = {}
        for name in self.names:
            z_SXD = z_SMD[:, film_M == name]
            there_SX = np.isfinite(z_SXD).all(2)
            z_SXD, there_SX = z_SXD[there_SX.any(1)], there_SX[there_SX.any(1)]
            keep_X = there_SX.mean(0) >= ENOUGH
            z_SXD = z_SXD[:, keep_X] if keep_X.any() else z_SXD[:, :0]
            if len(z_SXD) > 1 and z_SXD.shape[1] > COMPONENTS:
                mean_S1D = np.nanmean(z_SXD, axis=1, keepdims=True)
                courses[name] = np.where(np.isfinite(z_SXD), z_SXD, mean_S1D).astype(np.float64).transpose(0, 2, 1)
        return courses

    def _signals(self, row_S: np.ndarray, start_SM: np.ndarray) -> np.ndarray:
        """Signals (S, C, T) at the electrodes nearest to those of the 10-20 system, average-referenced, of all that every subject has."""
        there_M = (start_SM >= 0).mean(0) >= ENOUGH
        moments = np.flatnonzero(there_M)
        row_S, start_SM = row_S[(start_SM[:, moments] >= 0).all(1)], start_SM[(start_SM[:, moments] >= 0).all(1)]
        if len(row_S) < 2:
            return np.empty((0, len(TEN_TWENTY), 0))
        samples = int((moments[-1] - moments[0]) * self.step_s * self.cache.rate_hz) + self.samples
        sites_C3, signals = np.array([POSITIONS[name] for name in TEN_TWENTY]), []
        for row, start in zip(row_S, start_SM[:, moments[0]], strict=True):
            batch = self.cache.read([row], [start], samples)
            good_C = batch.mask_BC[0].numpy() & np.isfinite(batch.positions_BC3[0].numpy()).all(1)
            x_CT, xyz_C3 = batch.x_BCT[0].numpy()[good_C], batch.positions_BC3[0].numpy()[good_C]
            nearest_C = np.linalg.norm(sites_C3[:, None] - xyz_C3, axis=2).argmin(1)
            signals.append(x_CT[nearest_C] - x_CT[nearest_C].mean(0))
        return np.stack(signals).astype(np.float64)

    def _shared(
        self, train: dict, held: dict, rate_hz: float, most_lag_s: float
    ) -> tuple[dict[str, float], Curves | None]:
        """Inter-subject correlation of held-out subjects in the components of train's, mean over movies, against shifted time courses."""
        names = [
            name
            for name in self.names
            if name in train and name in held and len(train[name]) > 1 and len(held[name]) > 1
        ]
        if not names:
            return {}, None
        weights_CK = correlated_components([train[name] for name in names], COMPONENTS, SHRINKAGE).weights_CK
        y = {name: np.einsum("ck,sct->skt", weights_CK, held[name]) for name in names}
        share = np.array([y[name].shape[2] for name in names]) / sum(y[name].shape[2] for name in names)
        found_K = sum(w * isc(y[name]) for w, name in zip(share, names, strict=True))
        rng = np.random.default_rng(0)
        null_NK = sum(w * isc_null(y[name], rng, SHIFTS)[0] for w, name in zip(share, names, strict=True))
        p_K = (1 + (null_NK >= found_K).sum(0)) / (1 + SHIFTS)
        most, span = round(most_lag_s * rate_hz), max(3, round(SPAN_S * rate_hz))
        most = min(most, *(y[name].shape[2] // 2 for name in names))
        by_lag = sum(w * isc_by_lag(y[name], most)[0] for w, name in zip(share, names, strict=True))
        stride, by_time = max(1, span // 5), {}
        for name in names:
            if y[name].shape[2] >= span:
                by_time[name] = isc_by_time(y[name], span, stride)[0]
        middle_s = {name: ((np.arange(len(c)) * stride + span / 2) / rate_hz).tolist() for name, c in by_time.items()}
        lags_s = (np.arange(-most, most + 1) / rate_hz).tolist()
        curves = Curves(
            lags_s,
            by_lag.tolist(),
            middle_s,
            {n: c.tolist() for n, c in by_time.items()},
            float(np.quantile(null_NK[:, 0], 0.95)),
        )
        return {"isc": float(found_K[0]), "isc_p": float(p_K[0])}, curves


def _some(row_S: np.ndarray, start_SM: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many subjects, spread evenly."""
    chosen = np.unique(np.linspace(0, len(row_S) - 1, min(most, len(row_S))).round().astype(int))
    return row_S[chosen], start_SM[chosen]


def _identities(kind: str, z_SMD: np.ndarray, film_M: np.ndarray) -> dict[str, float]:
    """Who is it, by windows of other movies; and what does he see, by windows of other people."""
    there_SM = np.isfinite(z_SMD).all(2)
    subject_SM, film_SM = np.broadcast_arrays(np.arange(len(z_SMD))[:, None], np.unique(film_M, return_inverse=True)[1])
    subject_N, film_N = subject_SM[there_SM], film_SM[there_SM]
    recording_N = subject_N * (film_N.max() + 1) + film_N
    who, movie = (
        nearest_alike(z_SMD[there_SM], subject_N, recording_N),
        nearest_alike(z_SMD[there_SM], film_N, subject_N),
    )
    pairs = (("subject_identity", who), ("movie_identity", movie))
    return {f"{kind}_{name}{end}": v for name, both in pairs for end, v in zip(("", "_chance"), both, strict=True)}
