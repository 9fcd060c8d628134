"""
Taking eye movements and blinks out of a stream: a fixed spatial projection, fitted on what was recorded while the eyes moved.

Eye potentials are slow, large, and reach all electrodes in fixed proportions. The directions in which slow activity is many times
stronger while the eyes move than in the quietest stretches are the generalised eigenvectors of both covariances (as in Somers et al.
2018, whose Wiener filter this is with gain 1); their patterns on the scalp are projected out at all frequencies, which keeps the
projection free of delay and linear.

Shapes: C channels, T samples, D directions.
"""

from dataclasses import dataclass

import numpy as np

HIGHEST_HZ = 7.0  # alpha, which closed eyes raise, is above
PIECE_S = 0.5  # of the stretches that are called quiet or not
RATIO = 4.0  # the power of a direction while eyes move over that at rest that makes it an eye's
MOST = 4  # directions: vertical and horizontal movements, blinks, lids
LEAST_S = 5.0  # of eye movements, to fit at all


@dataclass(frozen=True)
class Eyes:
    """`project_CC` takes eye activity out of x_CT; `ratio_D` is how many times stronger it was than rest."""

    project_CC: np.ndarray
    ratio_D: np.ndarray

    def __call__(self, x_NCT: np.ndarray) -> np.ndarray:
        return self.project_CC @ x_NCT


def slow(x_CT: np.ndarray, rate_hz: float) -> np.ndarray:
    """Up to 7 Hz of a window, zero phase, its mean taken out."""
    X_CF = np.fft.rfft(x_CT - x_CT.mean(1, keepdims=True))
    X_CF[:, np.fft.rfftfreq(x_CT.shape[1], 1 / rate_hz) > HIGHEST_HZ] = 0
    return np.fft.irfft(X_CF, x_CT.shape[1])


def fit(moving: list[np.ndarray], rest: list[np.ndarray], rate_hz: float) -> Eyes | None:
    """
    From windows (C, T) recorded while the eyes moved, and at rest (may be none: then the quietest stretches of the former stand for it).

    None if there are too few windows, or nothing in them is eye-like.
    """
    if sum(x.shape[1] for x in moving) < LEAST_S * rate_hz:
        return None
    pieces_NCT = _pieces(moving, rate_hz)
    quiet_NCT = _pieces(rest, rate_hz) if rest else pieces_NCT
    power_N = quiet_NCT.var(2).mean(1)
    quiet_NCT = quiet_NCT[power_N <= np.quantile(power_N, 0.5)]  # people blink at rest, too
    moving_CC, quiet_CC = _covariance(pieces_NCT), _covariance(quiet_NCT)
    C = len(quiet_CC)
    level = np.trace(quiet_CC) / C
    if not level > 0:
        return None
    quiet_CC = quiet_CC + 1e-3 * level * np.eye(C)  # a masked channel has no power, an average reference no rank
    root_CC = np.linalg.inv(np.linalg.cholesky(quiet_CC))
    ratio_C, u_CC = np.linalg.eigh(root_CC @ moving_CC @ root_CC.T)
    chosen = np.flatnonzero(ratio_C >= RATIO)[::-1][:MOST]
    if not len(chosen):
        return None
    w_CD = root_CC.T @ u_CC[:, chosen]
    pattern_CD = quiet_CC @ w_CD  # of unit power in each direction: w' pattern = identity
    return Eyes(np.eye(C) - pattern_CD @ w_CD.T, ratio_C[chosen])


def _pieces(windows: list[np.ndarray], rate_hz: float) -> np.ndarray:
    """Slow activity in stretches (N, C, T) of half a second."""
    samples = max(round(PIECE_S * rate_hz), 2)
    pieces = []
    for x_CT in windows:
        s_CT = slow(np.asarray(x_CT, np.float64), rate_hz)
        whole = s_CT.shape[1] // samples * samples
        pieces.append(s_CT[:, :whole].reshape(len(s_CT), -1, samples).swapaxes(0, 1))
    return np.concatenate(pieces)


def _covariance(x_NCT: np.ndarray) -> np.ndarray:
    return np.einsum("nct,ndt->cd", x_NCT, x_NCT, optimize=True) / (x_NCT.shape[0] * x_NCT.shape[2])
