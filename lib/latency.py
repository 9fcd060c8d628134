"""
When in a window an event took place that the signal is locked to, such as the response of a trial.

A filter over electrodes and time finds it. What precedes and follows a response (P3, motor potential) looks the same at any latency, so
a filter learns it once, where a linear readout of the waveform has to learn it anew for each latency. The filter is a ridge regression:
from the signal around a moment it tells how near the response is. A softmax of its output over all moments gives them weights, and
their weighted mean is the time (as places are found in Finn 2016, Deep Spatial Autoencoders).

Shape letters: B windows, E sites, T steps of about 0.1 s, L lags, F = E * L.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

STEP_HZ = 10.0  # the signal is averaged to about this rate: what follows a response is slow
REACH_S = 0.4  # of the filter, before and after a moment
NEAR_S = 0.1  # width of the Gaussian that says how near
RIDGES = 10.0 ** np.arange(-3, 2)  # times the mean variance of what the filter sees
SHARPEST = 2.0 ** np.arange(0, 9)  # of the softmax, per unit of nearness
FOLDS = 5


class Latency(nn.Module):
    """The time from a window's start (B), in units of `spread` from `centre` (both s); uniform weights, and so no time, until fitted."""

    def __init__(self, sites: int, rate_hz: float):
        super().__init__()
        self.rate_hz = rate_hz
        self.step = max(1, round(rate_hz / STEP_HZ))
        self.hz = rate_hz / self.step
        self.reach = round(REACH_S * self.hz)
        self.filter = nn.Parameter(torch.zeros(1, sites, 2 * self.reach + 1))
        self.log_sharpness = nn.Parameter(torch.zeros(()))
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))

    def steps(self, x_BEN: torch.Tensor) -> torch.Tensor:
        """Samples averaged to steps (B, E, T)."""
        return F.avg_pool1d(x_BEN, self.step)

    def forward(self, x_BEN: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x_BEN.device.type, enabled=False):  # hundredths of a second
            x_BET = self.steps(x_BEN.float())
            score_BT = F.conv1d(x_BET, self.filter, padding=self.reach)[:, 0] * self.log_sharpness.exp()
            time_s_T = (torch.arange(x_BET.shape[2], device=x_BET.device) + 0.5) / self.hz
            return (score_BT.softmax(1) @ time_s_T - self.centre) / self.spread

    @torch.no_grad()
    def fit(self, x_BET: np.ndarray, time_s_B: np.ndarray, subject_B: np.ndarray) -> np.ndarray:
        """
        Fit to what took place `time_s_B` after the windows' starts; returns what filters of the other subjects alone say (B).

        The penalty is chosen by the error of nearness, the sharpness by that of time, both on subjects that the filter wasn't fitted on;
        with a single subject on its own windows.
        """
        B, E, T = x_BET.shape
        at_T = (np.arange(T) + 0.5) / self.hz
        near_BT = np.exp(-0.5 * ((at_T - time_s_B[:, None]) / NEAR_S) ** 2)
        names, fold_B = np.unique(subject_B, return_inverse=True)
        fold_B = fold_B % min(FOLDS, len(names))
        folds = fold_B.max() + 1
        width = E * (2 * self.reach + 1) + 1
        gram_KFF, near_KF = np.zeros((folds, width, width)), np.zeros((folds, width))
        for some in np.array_split(np.arange(B), -(-B // 256)):
            seen_BTF = self._seen(x_BET[some])
            for k in range(folds):
                own = fold_B[some] == k
                a_NF = seen_BTF[own].reshape(-1, width)
                gram_KFF[k] += a_NF.T @ a_NF
                near_KF[k] += a_NF.T @ near_BT[some][own].reshape(-1)
        gram_FF, near_F = gram_KFF.sum(0), near_KF.sum(0)
        level = np.trace(gram_FF[:-1, :-1]) / (width - 1)

        def solve(ridge: float, left_FF: np.ndarray, right_F: np.ndarray) -> np.ndarray:
            penalty_F = np.r_[np.full(width - 1, ridge * max(level, 1e-12)), 1e-9]
            return np.linalg.solve(left_FF + np.diag(penalty_F), right_F)

        # without each fold in turn, and the error of nearness on it, less what doesn't depend on the filter
        others = [(gram_FF - gram_KFF[k] * (folds > 1), near_F - near_KF[k] * (folds > 1)) for k in range(folds)]
        held_WKF = np.array([[solve(ridge, *other) for other in others] for ridge in RIDGES])
        error_WK = np.einsum("wkf,kfg,wkg->wk", held_WKF, gram_KFF, held_WKF) - 2 * np.einsum(
            "wkf,kf->wk", held_WKF, near_KF
        )
        best = error_WK.sum(1).argmin()
        score_BT = np.concatenate(
            [
                np.einsum("btf,bf->bt", self._seen(x_BET[some]), held_WKF[best][fold_B[some]])
                for some in np.array_split(np.arange(B), -(-B // 256))
            ]
        )
        said_SB = [_softmax(sharp * score_BT) @ at_T for sharp in SHARPEST]
        chosen = int(np.argmin([_residual(said_B, time_s_B) for said_B in said_SB]))
        filter_F = solve(RIDGES[best], gram_FF, near_F)[:-1]
        size = max(float(np.sqrt(np.mean(filter_F**2))), 1e-12)  # so that a step of the optimizer is a small part of it
        self.filter.copy_(torch.from_numpy(filter_F.reshape(1, E, -1) / size))
        self.log_sharpness.fill_(float(np.log(SHARPEST[chosen] * size)))
        self.centre.fill_(float(time_s_B.mean()))
        self.spread.fill_(max(float(time_s_B.std()), 1e-3))
        return (said_SB[chosen] - float(self.centre)) / float(self.spread)

    def _seen(self, x_BET: np.ndarray) -> np.ndarray:
        """What the filter sees at each moment, and a 1: (B, T, F + 1); zeros beyond the window."""
        padded_BET = np.pad(x_BET, ((0, 0), (0, 0), (self.reach, self.reach)))
        seen_BETL = np.lib.stride_tricks.sliding_window_view(padded_BET, 2 * self.reach + 1, axis=2)
        seen_BTF = seen_BETL.transpose(0, 2, 1, 3).reshape(len(x_BET), x_BET.shape[2], -1)
        return np.concatenate([seen_BTF, np.ones((*seen_BTF.shape[:2], 1))], 2)


def _softmax(score_BT: np.ndarray) -> np.ndarray:
    e_BT = np.exp(score_BT - score_BT.max(1, keepdims=True))
    return e_BT / e_BT.sum(1, keepdims=True)


def _residual(said_B: np.ndarray, wanted_B: np.ndarray) -> float:
    """Variance of `wanted_B` that the best line through `said_B` leaves."""
    apart_B, centred_B = said_B - said_B.mean(), wanted_B - wanted_B.mean()
    return float((centred_B**2).mean() - (apart_B @ centred_B / len(apart_B)) ** 2 / max((apart_B**2).mean(), 1e-12))
