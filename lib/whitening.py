"""
Whitening by linear prediction, and the level of a window as a variable of its own: what a flow need not learn.

White noise and a squared error leave a floor of noise over every band that is empty, and real spectra span 60 to 80 dB. So a filter
of each group of training recordings, fitted on their continuous signals, flattens the spectrum before windows are cut, and its exact
inverse, stable by construction, puts it back onto generated windows. The RMS of a window is divided out as well; models see its rank
within the group instead, and generated windows get the RMS of the rank that was drawn. What channels have in common
(lib/mixing.py), rhythms (lib/rhythm.py), hums (lib/hums.py) and a gain that
flattens what these leave go with the filters. After training a gain per frequency, `trim`,
mends what is left between the mean spectra of generated and training signals. All of it is stored with the model.

Signals are in the cache's model unit. Shape letters: B windows, C channels, T samples, K order, G groups, Q quantiles or rhythms, F frequencies,
V channels of all recordings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from lib import hums, mixing, regular, rhythm

QUANTILES = 65  # of a group's levels: every 1.6 %
AVERAGED = 48  # windows x frequencies that a gain of `settle` is the mean of, so that its power is off by 14 %
EMPTY = 1e-3  # of the mean power: what a gain takes a quieter frequency for
SEGMENT = 256  # samples of the segments that mean spectra are of
CLICK = 10.0  # times the power at a frequency that one segment of a hundred has: what is louder is no part of the mean spectrum
HISTORY = 4096  # samples that an inverse filter runs before what is kept; its memory is far shorter
WHITE_FLOOR = (
    1e-9  # of the power, -90 dB: below what float16 resolves, and what keeps a silent band's equations solvable
)
TAIL = 0.005  # ranks are clipped by this much, so that deviates of the rarest levels stay finite


@dataclass
class Whitening:
    """A filter and a table of levels for each group of recordings, float64; `names` says which groups, `channels` which channels mix."""

    names: tuple[str, ...]
    channels: tuple[str, ...]
    taps_GK: (
        torch.Tensor
    )  # (G, K + 1): a window's whitened sample is the sum of taps x the samples from itself backwards
    level_GQ: torch.Tensor  # quantiles of the natural logarithm of windows' RMS
    power_GF: torch.Tensor  # mean spectrum of the training signals
    trim_GF: torch.Tensor  # gain on generated signals; 1 until `calibrate`
    rhythm_GQ: torch.Tensor  # frequencies of the envelope's rhythms, cycles per sample; NaN where there is none
    own_GVK: torch.Tensor  # filters of single channels; V is 0 where all of a recording have one
    cross_GVV: torch.Tensor  # covariance of the whitened channels; V is 0 where they aren't unmixed
    hum_GF: torch.Tensor  # amplitudes of hums in signals of one channel (lib/hums.py); F is 0 until `settle`
    flat_GF: torch.Tensor  # gain that flattens the spectrum of whole windows; F is 0 until `settle`
    repeats: regular.Regular | None = None  # what signals of one channel repeat

    @property
    def order(self) -> int:
        """Samples before a window that whitening it needs."""
        return self.taps_GK.shape[1] - 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a model file; `restore` is the way back."""
        found = {field.name: getattr(self, field.name) for field in fields(self)[2:-1]}
        own = {} if self.repeats is None else vars(self.repeats)
        return found | {f"repeats.{k}": torch.view_as_real(t) if t.is_complex() else t for k, t in own.items()}

    def filters(self, group_B: np.ndarray, place_BC: np.ndarray | None) -> torch.Tensor:
        """Taps (B, C or 1, K + 1) of windows: those of their channels as far as known, else those of their groups."""
        taps_B1K = self.taps_GK[torch.from_numpy(group_B)][:, None]
        if place_BC is None or not len(self.channels):
            return taps_B1K
        place_BC = torch.from_numpy(place_BC)
        own_BCK = self.own_GVK[torch.from_numpy(group_B)[:, None], place_BC]
        return torch.where((place_BC >= 0)[:, :, None], own_BCK, taps_B1K)

    def whiten(
        self,
        x_BCT: torch.Tensor,
        group_B: np.ndarray,
        mask_BC: torch.Tensor | None,
        level: bool = True,
        place_BC: np.ndarray | None = None,
    ):
        """
        Windows without the `order` samples before them, whitened, float32 (B, C, T), and their levels as normal deviates (B).

        Windows must begin `order` samples early. With `level` the RMS of each is that of its group's median window. `place_BC` says which of
        `channels` (-1: none) their channels are; without it they stay mixed.
        """
        x_BCT = x_BCT.double()
        taps_BCK = self.filters(group_B, place_BC)
        if self.order:  # circular, which reaches the first `order` samples only
            n = x_BCT.shape[2]
            product = torch.fft.rfft(x_BCT) * torch.fft.rfft(taps_BCK, n)
            w_BCT = torch.fft.irfft(product, n)[:, :, self.order :]
        else:
            w_BCT = x_BCT * taps_BCK
        if place_BC is not None and len(self.channels):
            w_BCT = mixing.unmixed(w_BCT, self.cross_GVV, group_B, place_BC, mask_BC)
        log_B = log_rms(x_BCT[:, :, self.order :], mask_BC)
        deviate_B = self.deviate(log_B, group_B)
        if level:
            median_B = self.level_GQ[torch.from_numpy(group_B), QUANTILES // 2]
            w_BCT = w_BCT * torch.exp(median_B - log_B).clamp(0.01, 100.0)[:, None, None]
        return w_BCT.float(), deviate_B.float()

    def rhythms(self, w_BCT: torch.Tensor, group_B: np.ndarray, mask_BC: torch.Tensor | None) -> torch.Tensor:
        """Frequency and phase of the rhythms of whitened windows, float32 (B, 2 Q); NaN where there is none."""
        rhythm_BQ = self.rhythm_GQ[torch.from_numpy(group_B)]
        if rhythm_BQ.isnan().all():
            return rhythm_BQ.repeat_interleave(2, 1).float()
        turn_BQ = rhythm.phases(w_BCT, rhythm_BQ, mask_BC)
        if self.repeats is not None and w_BCT.shape[1] == 1:
            turn_BQ = self.repeats.phases(w_BCT[:, 0], rhythm_BQ, group_B, turn_BQ)
        return torch.stack([rhythm_BQ, turn_BQ], 2).flatten(1).float()

    def repeated(self, code_BX: torch.Tensor, group_B: np.ndarray, samples: int) -> torch.Tensor:
        """What every turn of these rhythms has, of white windows of one channel, float32 (B, 1, T); zero for groups that repeat nothing."""
        if self.repeats is None:
            return torch.zeros(len(code_BX), 1, samples)
        return self.repeats.wave(code_BX.unflatten(1, (-1, 2)), group_B, samples)[:, None].float()

    def settle(self, group: int, x_NT: torch.Tensor, apart: float, hum: bool, flatten: bool) -> None:
        """
        Measure what hums in channels of a group's windows, whitened and without what repeats, and what makes the rest's mean spectrum flat and 1.

        `apart` is how many of them are as good as independent; where they are few, neighbouring frequencies share a gain.
        """
        T = x_NT.shape[1]
        if not self.flat_GF.shape[1]:
            self.hum_GF = torch.zeros(len(self.names), hums.FINER * T // 2 + 1)
            self.flat_GF = torch.ones(len(self.names), T // 2 + 1, dtype=torch.float64)
        if hum:
            self.hum_GF[group] = hums.find(x_NT, apart)
            x_NT = x_NT - hums.of(x_NT, self.hum_GF[group])
        if flatten:
            power_F = (
                sum(torch.fft.rfft(x_ST.double()).abs().square().sum(0) for x_ST in x_NT.split(512)) / x_NT.numel()
            )
            power_1F = power_F.clamp_min(EMPTY * power_F.mean().clamp_min(1e-12))[None]
            around = min(math.ceil(AVERAGED / apart) // 2, power_1F.shape[1] - 1)
            smooth_1F = F.avg_pool1d(F.pad(power_1F, (around, around), mode="reflect"), 2 * around + 1, 1)
            self.flat_GF[group] = smooth_1F[0].rsqrt()

    def settled(self, w_BCT: torch.Tensor, group_B: np.ndarray) -> torch.Tensor:
        """White windows without repeats as a flow learns them: without hums, and of a flat spectrum, filtered around a circle."""
        if not self.flat_GF.shape[1]:
            return w_BCT
        at_B = torch.from_numpy(group_B)
        if w_BCT.shape[1] == 1 and self.hum_GF.any():
            w_BCT = w_BCT - hums.of(w_BCT[:, 0], self.hum_GF[at_B])[:, None]
        return torch.fft.irfft(torch.fft.rfft(w_BCT) * self.flat_GF[at_B, None].to(w_BCT.dtype), w_BCT.shape[2])

    def unsettled(self, w_NCT: torch.Tensor, group: int, u_NP: torch.Tensor) -> torch.Tensor:
        """The inverse of `settled`, but for the phases of hums, which are uniform if `u_NP` is."""
        if not self.flat_GF.shape[1]:
            return w_NCT
        w_NCT = torch.fft.irfft(torch.fft.rfft(w_NCT) / self.flat_GF[group].to(w_NCT.dtype), w_NCT.shape[2])
        if w_NCT.shape[1] == 1 and self.hum_GF[group].any():
            w_NCT = w_NCT + hums.drawn(self.hum_GF[group], u_NP, w_NCT.shape[2])[:, None]
        return w_NCT

    def mixed(self, w_NCT: torch.Tensor, group: int, place_C: np.ndarray) -> torch.Tensor:
        """White channels with what those `place_C` of a group have in common; the inverse of what `whiten` does to them, float64."""
        if not len(self.channels):
            return w_NCT.double()
        root_1CC, _ = mixing.roots(mixing.own(self.cross_GVV, np.array([group]), place_C[None]))
        return root_1CC[0] @ w_NCT.double()

    def joined(self, groups: Sequence[int], own: Sequence[np.ndarray], crosses: Sequence[np.ndarray]) -> "Whitening":
        """With further groups, each like one that is there but for the filters of its channels and what these have in common, and without its rhythms and hums."""
        at = torch.tensor([*range(len(self.names)), *groups])
        rows = {name: values[at] for name, values in self.tensors().items()}
        rows["own_GVK"] = torch.cat([self.own_GVK, torch.from_numpy(np.stack(own))])
        rows["cross_GVV"] = torch.cat([self.cross_GVV, torch.from_numpy(np.stack(crosses))])
        rows["rhythm_GQ"][len(self.names) :] = math.nan
        rows["hum_GF"][len(self.names) :] = 0.0
        return restore(self.names + ("",) * len(groups), rows, self.channels)

    def unwhiten(self, w_CT: np.ndarray, group: int, before_CK: np.ndarray) -> np.ndarray:
        """The exact inverse for a signal whose `order` preceding samples are known; float64."""
        from scipy.signal import lfilter, lfiltic  # here: it takes a second, and only sampling needs it

        taps_K = self.taps_GK[group].numpy()
        rows = zip(np.asarray(w_CT, np.float64), before_CK, strict=True)
        return np.stack([lfilter([1.0], taps_K, w, zi=lfiltic([1.0], taps_K, b[::-1]))[0] for w, b in rows])

    def colour(
        self,
        w_NCT: torch.Tensor,
        group: int,
        log_N: np.ndarray | None,
        trim: bool = True,
        place_C: np.ndarray | None = None,
    ) -> np.ndarray:
        """
        Generated windows of one group, mixed, as signals with its spectrum, and with RMS exp(log_N), or as it comes; float64 (N, C, T).

        They are laid end to end in a ring, so that none begins in silence: each rings on from the one before it.
        """
        from scipy.signal import lfilter  # here: it takes a second, and only sampling needs it

        N, C, T = w_NCT.shape
        ring_CM = w_NCT.double().numpy().transpose(1, 0, 2).reshape(C, N * T)
        laps = -(-HISTORY // (N * T))
        before_CM = np.tile(ring_CM, laps)[:, -HISTORY:]
        taps_CK = self.filters(np.array([group]), None if place_C is None else place_C[None])[0].expand(C, -1).numpy()
        rows = zip(taps_CK, np.concatenate([before_CM, ring_CM], 1), strict=True)
        y_CM = np.stack([lfilter([1.0], taps_K, x_M)[HISTORY:] for taps_K, x_M in rows])
        if trim:
            gain_F = self.trim_GF[group].numpy()
            at_F = np.linspace(0, 1, N * T // 2 + 1)
            gain_F = np.exp(np.interp(at_F, np.linspace(0, 1, len(gain_F)), np.log(gain_F)))
            y_CM = np.fft.irfft(np.fft.rfft(y_CM) * gain_F, N * T)
        y_NCT = y_CM.reshape(C, N, T).transpose(1, 0, 2)
        if log_N is not None:
            own_N = log_rms(torch.from_numpy(y_NCT), None).numpy()
            y_NCT = y_NCT * np.exp(log_N - own_N)[:, None, None]
        return y_NCT

    def deviate(self, log_B: torch.Tensor, group_B: np.ndarray) -> torch.Tensor:
        """Where log RMS lie among those of their group, as deviates of a standard normal: 0 is the median."""
        at_Q = np.linspace(0, 1, QUANTILES)
        tables = self.level_GQ.numpy()[group_B]
        rank_B = [np.interp(v, q, at_Q) for v, q in zip(log_B.tolist(), tables, strict=True)]
        return torch.special.ndtri(torch.tensor(rank_B, dtype=torch.float64).clamp(TAIL, 1 - TAIL))

    def draw_levels(self, u_N: np.ndarray, group: int) -> tuple[np.ndarray, torch.Tensor]:
        """Log RMS (N) of ranks `u_N` in a group, and their deviates, float32."""
        log_N = np.interp(u_N, np.linspace(0, 1, QUANTILES), self.level_GQ[group].numpy())
        return log_N, torch.special.ndtri(torch.from_numpy(u_N).clamp(TAIL, 1 - TAIL)).float()

    def draw_rhythms(self, u_NQ: np.ndarray, group: int) -> torch.Tensor:
        """Those of a group with phases that are uniform if `u_NQ` is, float32 (N, 2 Q)."""
        rhythm_NQ = self.rhythm_GQ[group].expand(u_NQ.shape)
        return torch.stack([rhythm_NQ, torch.from_numpy(u_NQ) - 0.5], 2).flatten(1).float()

    def choose(self, correlation_K: np.ndarray) -> int:
        """The group whose filter predicts a signal of this autocorrelation best: the largest Gaussian likelihood (Itakura 1975)."""
        power_G = np.einsum("gk,kl,gl->g", self.taps_GK, toeplitz(correlation_K), self.taps_GK)
        return int(np.argmax(np.log(self.taps_GK[:, 0].numpy()) - 0.5 * power_G))

    def calibrate(self, group: int, x_NCT: np.ndarray) -> None:
        """
        Set the gain of a group so that signals like `x_NCT`, coloured without it, get the mean spectrum of its training signals.

        Spectra are taken inside windows, or, of windows shorter than a segment, along all of them.
        """
        N, C, T = x_NCT.shape
        x_NCT = x_NCT if T >= SEGMENT else x_NCT.transpose(1, 0, 2).reshape(1, C, N * T)
        if x_NCT.shape[2] >= SEGMENT and (self.power_GF[group] > 0).all():
            power_F, wanted_F = mean_spectrum(torch.from_numpy(x_NCT)), self.power_GF[group]
            gain_F = (wanted_F / wanted_F.sum() / (power_F / power_F.sum()).clamp_min(1e-30)).sqrt()
            self.trim_GF[group] = gain_F.clamp(1e-4, 1e2)


def restore(names: Sequence[str], tensors: dict[str, torch.Tensor], channels: Sequence[str] = ()) -> Whitening:
    """A whitening from what `tensors` gave."""
    none = {name: (0,) for name in ("rhythm_GQ", "hum_GF", "flat_GF")}  # in older files
    none |= {"own_GVK": (0, tensors["taps_GK"].shape[1]), "cross_GVV": (0, 0)}
    older = {name: torch.zeros(len(names), *shape) for name, shape in none.items()}
    own = {k: t for k, t in tensors.items() if not k.startswith("repeats.")}
    parts = {k.removeprefix("repeats."): t for k, t in tensors.items() if k not in own}
    complete = {k: t if "weight" in k else torch.view_as_complex(t) for k, t in parts.items()}
    return Whitening(
        tuple(names), tuple(channels), **older | own, repeats=regular.Regular(**complete) if parts else None
    )


def fit(
    names: Sequence[str],
    signals: Sequence[list[torch.Tensor]],
    order: int,
    samples: int,
    rhythms: int = 0,
    channels: Sequence[str] = (),
    places: Sequence[list[np.ndarray]] = (),
    shafts: Sequence[float] = (),
) -> Whitening:
    """
    Filters of `order` (0: only a gain), levels of windows of `samples` and at most so many `rhythms`, of groups of signals, each float (C, T) and
    longer than a window.

    With `channels`, `places` says for every signal which of them its rows are, and what they have in common is measured. `shafts` are the
    stated frequencies of each group's machine, cycles per sample: one is taken for a rhythm where more of the signal repeats with it.
    A group's filter solves the normal equations of its mean autocorrelation, so its inverse is stable (Makhoul 1975).
    """
    taps, levels, powers, lines, own, crosses, found = [], [], [], [], [], [], []
    at_G, shaft_G = places if channels else [()] * len(signals), shafts or [math.nan] * len(signals)
    for group, at, shaft in zip(signals, at_G, shaft_G, strict=True):
        correlation_K = np.mean([autocorrelation(x_CT, order) for x_CT in group], axis=0)
        taps.append(predictor(correlation_K))
        log = np.concatenate([window_levels(x_CT, samples) for x_CT in group])
        levels.append(np.quantile(log, np.linspace(0, 1, QUANTILES)))
        long = [mean_spectrum(x_CT.double()[None]) for x_CT in group if x_CT.shape[1] >= SEGMENT]
        own_VK, cross_VV, white = channel_filters(group, at if channels else None, len(channels), taps[-1])
        own.append(own_VK)
        crosses.append(cross_VV)
        rhythm_Q, repeats = _rhythms(group, white, samples, rhythms, shaft)
        lines.append(rhythm_Q)
        found.append(repeats)
        powers.append(torch.stack(long).mean(0) if long else torch.zeros(SEGMENT // 2 + 1, dtype=torch.float64))
    power_GF, rhythm_GQ = torch.stack(powers), torch.from_numpy(np.stack(lines))
    rhythm_GQ = rhythm_GQ[:, rhythm_GQ.isfinite().any(0)]
    nothing, repeats = regular.nothing(), None
    if any(found):
        repeats = regular.Regular(*map(torch.stack, zip(*(r or nothing for r in found), strict=True)))
    tables = (torch.from_numpy(np.stack(rows)) for rows in (taps, levels))
    trim_GF = torch.ones_like(power_GF)
    own_GVK, cross_GVV = (torch.from_numpy(np.stack(rows)) for rows in (own, crosses))
    fitted = (*tables, power_GF, trim_GF, rhythm_GQ, own_GVK, cross_GVV, power_GF[:, :0], power_GF[:, :0])
    return Whitening(tuple(names), tuple(channels), *fitted, repeats)


def _rhythms(
    group: list[torch.Tensor], white: list[torch.Tensor], samples: int, count: int, shaft: float
) -> tuple[np.ndarray, tuple | None]:
    """At most `count` rhythms of a group's signals, and what they repeat; None where that isn't known, as of several channels."""
    rhythm_Q = rhythm.find(white, count, samples)
    long = any(x_CT.shape[1] >= rhythm.LONGEST * samples for x_CT in white)
    if not long or any(len(x_CT) > 1 for x_CT in group):
        return rhythm_Q, None
    hops, repeats, share = _hops(group, white, samples), None, 0.0
    for own_Q in rhythm.with_shaft(rhythm_Q, shaft):
        if np.isfinite(own_Q).any():
            learned, own_share = regular.learn(*hops, own_Q)
            if own_Q is rhythm_Q or own_share > share + regular.MORE:
                rhythm_Q, repeats, share = own_Q, learned, own_share
    return rhythm_Q, repeats


def _hops(group: list[torch.Tensor], white: list[torch.Tensor], samples: int) -> tuple[torch.Tensor, int]:
    """Windows (N, T) of the longest of whitened signals of one channel, at their median level, and the hop from each to the next."""
    x_1T, w_1T = max(zip(group, white, strict=True), key=lambda pair: pair[0].shape[1])
    level_N = torch.from_numpy(window_levels(x_1T[:, x_1T.shape[1] - w_1T.shape[1] :], samples))[: regular.MOST_WINDOWS]
    w_NT = w_1T[0].unfold(0, samples, max(1, samples // 8))[: len(level_N)]
    return (w_NT * torch.exp(level_N.median() - level_N)[:, None]).float(), max(1, samples // 8)


def channel_filters(
    signals: Sequence[torch.Tensor], places: Sequence[np.ndarray] | None, channels: int, taps_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
    """
    Filters of a group's channels (V, K + 1), what the whitened ones have in common (V, V), and signals (C, T - K) whitened by them.

    Without `places` all have the filter of the group, as have channels that no signal has.
    """
    order, own_VK = len(taps_K) - 1, np.tile(taps_K, (channels, 1))
    if places is None:
        return own_VK, np.zeros((0, 0)), [filtered(x_CT.double(), taps_K[None]) for x_CT in signals]
    found = [[] for _ in range(channels)]
    for x_CT, place_C in zip(signals, places, strict=True):
        for x_T, v in zip(x_CT, place_C, strict=True):
            found[v].append(autocorrelation(x_T[None], order))
    for v, correlations in enumerate(found):
        if correlations and (mean_K := np.mean(correlations, axis=0))[0] > 0:
            own_VK[v] = predictor(mean_K)
    white = [filtered(x_CT.double(), own_VK[place_C]) for x_CT, place_C in zip(signals, places, strict=True)]
    return own_VK, mixing.covariance(white, places, channels), white


def filtered(x_CT: torch.Tensor, taps_CK: np.ndarray) -> torch.Tensor:
    """A signal whitened, without its first samples, which the filters have no past of."""
    from scipy.signal import oaconvolve  # here: it takes a second

    order = taps_CK.shape[1] - 1
    return torch.from_numpy(oaconvolve(x_CT.numpy(), taps_CK, axes=1)[:, order : x_CT.shape[1]])


def autocorrelation(x_CT: torch.Tensor, order: int) -> np.ndarray:
    """Of lags 0 … order, mean over samples and channels, float64 (order + 1)."""
    x_CT = x_CT.double()
    n = 2 ** math.ceil(math.log2(x_CT.shape[1] + order + 1))  # no lag wraps around
    power_CF = torch.fft.rfft(x_CT, n).abs().square()
    lags_CK = torch.fft.irfft(power_CF, n)[:, : order + 1]
    return (lags_CK.mean(0) / x_CT.shape[1]).numpy()


def predictor(correlation_K: np.ndarray) -> np.ndarray:
    """
    Taps (order + 1) of the filter that makes a signal of this autocorrelation white and of variance 1, as far as its order goes.

    Raises ValueError for a signal without power.
    """
    if not correlation_K[0] > 0:
        raise ValueError("a signal without power can't be whitened")
    scale = math.sqrt(correlation_K[0])
    correlation_K = correlation_K / correlation_K[0]
    correlation_K[0] *= 1 + WHITE_FLOOR
    taps_K = np.ones(1)
    if len(correlation_K) > 1:
        weight_K = np.linalg.solve(toeplitz(correlation_K[:-1]), correlation_K[1:])
        taps_K = np.concatenate([taps_K, -weight_K])
    return taps_K / (scale * math.sqrt(taps_K @ correlation_K))


def toeplitz(correlation_K: np.ndarray) -> np.ndarray:
    """The symmetric matrix of an autocorrelation (K, K)."""
    lag_K = np.arange(len(correlation_K))
    return correlation_K[np.abs(lag_K[:, None] - lag_K)]


def mean_spectrum(x_NCT: torch.Tensor) -> torch.Tensor:
    """
    Power (F), mean over channels of their half-overlapping Hann segments (Welch 1967), clicks (CLICK) left out.

    One lost sample is broad-band: at frequencies where a machine has hardly any power it would be most of a minute's mean.
    """
    hann_S = torch.hann_window(SEGMENT, dtype=x_NCT.dtype)
    power_NCMF = torch.fft.rfft(x_NCT.unfold(2, SEGMENT, SEGMENT // 2) * hann_S).abs().square()
    power_CMF = power_NCMF.transpose(0, 1).flatten(1, 2)
    loud_C1F = power_CMF.kthvalue(math.ceil(0.99 * power_CMF.shape[1]), dim=1, keepdim=True).values
    usual_CMF = power_CMF <= CLICK * loud_C1F
    return ((power_CMF * usual_CMF).sum(1) / usual_CMF.sum(1)).mean(0)


def log_rms(x_BCT: torch.Tensor, mask_BC: torch.Tensor | None) -> torch.Tensor:
    """Natural logarithm of the RMS of windows over good channels (B); silence is at -14."""
    power_BC = x_BCT.double().square().mean(2)
    power_B = power_BC.mean(1) if mask_BC is None else (power_BC * mask_BC).sum(1) / mask_BC.sum(1).clamp_min(1)
    return 0.5 * torch.log(power_B + 1e-12)


def window_levels(x_CT: torch.Tensor, samples: int) -> np.ndarray:
    """Log RMS of windows of a signal, every eighth of a window."""
    power_T = x_CT.double().square().mean(0)
    sums_T = torch.cat([power_T.new_zeros(1), power_T.cumsum(0)])
    ends_W = torch.arange(samples, len(sums_T), max(1, samples // 8))
    return (0.5 * torch.log((sums_T[ends_W] - sums_T[ends_W - samples]) / samples + 1e-12)).numpy()
