"""
Rhythms: the lines in the spectrum of a signal's envelope, and where a window is in each of them.

The blows of a bearing come so regularly that one of them tells when all others come, and noise tells nothing of the first: a flow has to agree
with itself on it over the whole window, and one that is trained for minutes does not, so its blows drift. So the frequencies of the
strongest rhythms are measured in training recordings, and their phases in windows; a network is shown both as a clock, and generated
windows get phases that are drawn, as they get a level. A signal without lines, as most EEG, has no rhythm, and nothing changes.

Frequencies are in cycles per sample, phases in turns at the middle of a window. Shape letters: B windows, C channels, T samples, F frequencies,
P peaks, Q rhythms, H harmonics, K combinations.
"""

import itertools
import math

import numpy as np
import torch

STANDS_OUT = 50.0  # times the median power around it, 17 dB: white noise reaches a third of it in 100,000 frequencies
AROUND = 301  # frequencies that this median is of
HIGHEST = 0.125  # cycles per sample
FEWEST_CYCLES = 2.0  # of a rhythm in a window
LONGEST = 16  # windows that a signal must be as long as: lines of a shorter one are blurred
PEAKS = 30  # lines that rhythms have to explain
ORDER = 8  # of the harmonics, and of the sums and differences that count as explained
FADES = 0.9  # what an explained line counts less for each order above the first
HARMONICS, SIDEBANDS = 60, 8  # of the first rhythm, and of the second around each, that lib/regular.py uses
FAR = 0.25  # cycles per sample that the first one's should reach
GAIN = 0.05  # of the lines' power: what another rhythm must explain more
SHAFT = 0.005  # share that a shaft's stated speed may be off
LOUDEST = 0.999  # quantile that envelopes are clipped at, so that one knock is not a rhythm


def envelope(x_CT: torch.Tensor) -> torch.Tensor:
    """Squared magnitude of the analytic signal, mean over channels, (…, C, T) → (…, T)."""
    n = x_CT.shape[-1]
    half_F = torch.fft.rfft(x_CT)
    half_F[..., 1 : (n + 1) // 2] *= 2
    full_F = torch.cat([half_F, half_F.new_zeros(*half_F.shape[:-1], n - half_F.shape[-1])], -1)
    return torch.fft.ifft(full_F).abs().square().mean(-2)


def find(signals: list[torch.Tensor], count: int, samples: int) -> np.ndarray:
    """
    At most `count` frequencies (count; NaN where there are fewer) that the lines of whitened signals, each (C, T), are sums and differences of.

    Lines are looked for in the mean spectrum of the signals, so that only a rhythm that all of them keep is one. `samples` are those of a window.
    """
    found = np.full(count, np.nan)
    signals = [x_CT for x_CT in signals if x_CT.shape[1] >= LONGEST * samples]
    if not (count and signals):
        return found
    n = min(x_CT.shape[1] for x_CT in signals)
    ratio_F = np.mean([_line_power(envelope(x_CT[:, :n].double())) for x_CT in signals], 0)
    hz_P, power_P = _peaks(ratio_F, n, FEWEST_CYCLES / samples)
    basis: list[float] = []
    for q in range(min(count, len(hz_P))):
        before, *scores = (_explained(np.array([*basis, *hz]), hz_P, power_P, 2 / n) for hz in ((), *hz_P[:, None]))
        # phases are drawn independently, which those of harmonics aren't
        known = [
            _explained(np.array(basis), np.array([hz]), np.ones(1), 2 / n) > 0 or harmonic(hz, basis, n) for hz in hz_P
        ]
        scores = np.where(known, 0.0, scores)
        if max(scores) < before + GAIN * power_P.sum():
            break
        basis.append(float(hz_P[int(np.argmax(scores))]))
        found[q] = basis[-1]
    if count > 1 and found[0] * HARMONICS < FAR < found[1] * HARMONICS:  # false for NaN
        found[:2] = found[1::-1]  # a slow rhythm's harmonics don't reach far: it is the second's sidebands
    return found


def with_shaft(rhythm_Q: np.ndarray, shaft: float) -> list[np.ndarray]:
    """
    Rhythms as found, and with a machine's stated shaft (cycles per sample; NaN: not stated) in the last place, if it isn't among them.

    A shaft modulates the blows, and the envelope's lines don't always say so: their sums with another line of the machine may explain more of them.
    """
    if not len(rhythm_Q) or not math.isfinite(shaft) or (np.abs(rhythm_Q / shaft - 1) < SHAFT).any():
        return [rhythm_Q]
    known = rhythm_Q[np.isfinite(rhythm_Q)][: max(1, len(rhythm_Q) - 1)]
    own_Q = np.full(len(rhythm_Q), np.nan)
    own_Q[: len(known)] = known
    own_Q[min(len(known), len(rhythm_Q) - 1)] = shaft
    return [rhythm_Q, own_Q]


def _line_power(envelope_T: torch.Tensor) -> np.ndarray:
    """Power of an envelope's spectrum relative to the median around each frequency."""
    from scipy.ndimage import median_filter  # here: it takes a second, and only fitting needs it

    envelope_T = envelope_T.clamp_max(torch.quantile(envelope_T[: 2**24], LOUDEST))
    power_F = torch.fft.rfft((envelope_T - envelope_T.mean()) * torch.hann_window(len(envelope_T))).abs().square()
    power_F = power_F[: math.ceil(HIGHEST * len(envelope_T))].numpy()
    return power_F / (median_filter(power_F, AROUND) + 1e-30)


def _peaks(ratio_F: np.ndarray, n: int, lowest: float) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies, between bins by a parabola through logarithms, and power of the strongest lines."""
    middle_F = ratio_F[1:-1]
    high_F = (middle_F >= ratio_F[:-2]) & (middle_F > ratio_F[2:]) & (middle_F > STANDS_OUT)
    at_P = np.flatnonzero(high_F) + 1
    at_P = at_P[at_P >= lowest * n]
    at_P = at_P[np.argsort(-ratio_F[at_P], kind="stable")[:PEAKS]]
    below, own, above = (np.log(ratio_F[at_P + i] + 1e-30) for i in (-1, 0, 1))
    return (at_P + 0.5 * (below - above) / (below - 2 * own + above)) / n, ratio_F[at_P]


def _explained(basis_Q: np.ndarray, hz_P: np.ndarray, power_P: np.ndarray, wide: float) -> float:
    """Power of the lines at sums and differences of the basis' harmonics, those of low order counting most."""
    if not len(basis_Q):
        return 0.0
    factor_KQ = np.array(list(itertools.product(range(-ORDER, ORDER + 1), repeat=len(basis_Q))))
    order_K = np.abs(factor_KQ).sum(1)
    factor_KQ, order_K = factor_KQ[(order_K > 0) & (order_K <= ORDER)], order_K[(order_K > 0) & (order_K <= ORDER)]
    near_PK = np.abs(hz_P[:, None] - factor_KQ @ basis_Q) < wide
    return float(power_P @ (near_PK * FADES ** (order_K - 1)).max(1))


def harmonic(hz: float, basis: list[float], n: int) -> bool:
    """Whether a frequency is a multiple of one of the basis, of its half or its third, as far as `n` samples can tell."""
    parts = (base / k for base in basis for k in (1, 2, 3))
    return any(abs(hz - round(hz / part) * part) < (0.5 * hz / part + 1.5) / n for part in parts)


def phases(x_BCT: torch.Tensor, rhythm_BQ: torch.Tensor, mask_BC: torch.Tensor | None) -> torch.Tensor:
    """Where whitened windows are in rhythms (B, Q): turns in [-0.5, 0.5], NaN for a rhythm that isn't one."""
    x_BCT = x_BCT if mask_BC is None else x_BCT * mask_BC[:, :, None]
    loud_BT = envelope(x_BCT)
    T = loud_BT.shape[1]
    loud_BT = (loud_BT - loud_BT.mean(1, keepdim=True)) * torch.hann_window(T, dtype=loud_BT.dtype)
    angle_BQT = -2 * math.pi * rhythm_BQ[:, :, None].to(loud_BT) * (torch.arange(T) + 0.5 - T / 2)
    real, imaginary = (torch.einsum("bt,bqt->bq", loud_BT, wave(angle_BQT)) for wave in (torch.cos, torch.sin))
    return torch.atan2(imaginary, real) / (2 * math.pi)


def clock(rhythm_BQ2: torch.Tensor, steps: int, stride: int, samples: int) -> torch.Tensor:
    """
    Cosines and sines (B, steps, 2 Q H) of rhythms given as (frequency, phase), at the middle of every `stride` samples of a window.

    Zero for harmonics that so few steps can't show, and for a rhythm that isn't known (NaN).
    """
    hz_BQ1, turn_BQ1 = (v[:, :, None] for v in rhythm_BQ2.unbind(2))
    at_S = (torch.arange(steps, device=rhythm_BQ2.device) + 0.5) * stride - samples / 2
    once_BQS = torch.polar(torch.ones_like(hz_BQ1), 2 * math.pi * (hz_BQ1 * at_S + turn_BQ1).nan_to_num())
    wave_BQSH = once_BQS[..., None].expand(*once_BQS.shape, ORDER).cumprod(3)
    order_H = torch.arange(1, ORDER + 1, device=rhythm_BQ2.device)
    shown_BQ1H = (hz_BQ1[..., None] * order_H * stride < 0.5) & turn_BQ1[..., None].isfinite()  # false for NaN
    wave_BQSH = wave_BQSH * shown_BQ1H
    return torch.view_as_real(wave_BQSH).permute(0, 2, 1, 3, 4).flatten(2)
