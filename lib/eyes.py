"""
Taking eye movements and blinks out of a stream: a fixed spatial projection, fitted on what was recorded while the eyes moved.

Eye potentials are slow, large, and reach all electrodes in fixed proportions. The directions in which slow activity is many times
stronger while the eyes move than in the quietest stretches are generalised eigenvectors of both covariances (Somers et al. 2018), and
give the eyes' patterns on the scalp. How strongly a pattern is present is estimated with unit gain and the least power of what is there
in quiet stretches at all frequencies (a minimum-variance beamformer, Van Veen et al. 1997), and that much of it is subtracted: a fixed
matrix, without delay.

Shapes: C channels, T samples, D directions.
"""

from dataclasses import dataclass

import numpy as np

from lib.intake import Path, stack

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
    """Up to 7 Hz of stretches (…, C, T), zero phase."""
    X_CF = np.fft.rfft(x_CT)
    X_CF[..., np.fft.rfftfreq(x_CT.shape[-1], 1 / rate_hz) > HIGHEST_HZ] = 0
    return np.fft.irfft(X_CF, x_CT.shape[-1])


def fit(moving: list[np.ndarray], rest: list[np.ndarray], rate_hz: float) -> Eyes | None:
    """
    From windows (C, T) recorded while the eyes moved, and at rest (may be none: then the quieter half of the former stands for it).

    None if there are too few windows, or nothing in them is eye-like.
    """
    if sum(x.shape[1] for x in moving) < LEAST_S * rate_hz:
        return None
    moving_NCT, rest_NCT = (_pieces(windows, rate_hz) for windows in (moving, rest or moving))
    slow_NCT = slow(rest_NCT, rate_hz)
    power_N = slow_NCT.var(2).mean(1)
    quiet_N = power_N <= np.quantile(power_N, 0.5)  # people blink at rest, too
    moving_CC, slow_CC, quiet_CC = (
        _covariance(x) for x in (slow(moving_NCT, rate_hz), slow_NCT[quiet_N], rest_NCT[quiet_N])
    )
    C, level = len(slow_CC), np.trace(slow_CC) / len(slow_CC)
    if not level > 0:
        return None
    slow_CC, quiet_CC = (c + 1e-3 * level * np.eye(C) for c in (slow_CC, quiet_CC))  # an average has no full rank
    root_CC = np.linalg.inv(np.linalg.cholesky(slow_CC))
    ratio_C, u_CC = np.linalg.eigh(root_CC @ moving_CC @ root_CC.T)
    chosen = np.flatnonzero(ratio_C >= RATIO)[::-1][:MOST]
    if not len(chosen):
        return None
    pattern_CD = slow_CC @ root_CC.T @ u_CC[:, chosen]
    w_CD = np.linalg.solve(quiet_CC, pattern_CD)
    w_CD = w_CD @ np.linalg.inv(pattern_CD.T @ w_CD)
    return Eyes(np.eye(C) - pattern_CD @ w_CD.T, ratio_C[chosen])


def fit_groups(groups: dict, path: Path, before: Eyes | None) -> Eyes | None:
    """The eyes of a session, from its groups EYE_MOVEMENT and BACKGROUND; those of before where there is too little to tell."""
    to_uV = 1e6 if path.unit == "V" else 1.0
    moving, rest = ([to_uV * x for x in stack(groups.get(g, ()))] for g in ("EYE_MOVEMENT", "BACKGROUND"))
    return fit(moving, rest, path.rate_hz) or before


def _pieces(windows: list[np.ndarray], rate_hz: float) -> np.ndarray:
    """Stretches (N, C, T) of half a second, the mean of their window taken out."""
    samples = max(round(PIECE_S * rate_hz), 2)
    pieces = []
    for x_CT in windows:
        x_CT = np.asarray(x_CT, np.float64) - np.mean(x_CT, axis=1, keepdims=True)
        whole = x_CT.shape[1] // samples * samples
        pieces.append(x_CT[:, :whole].reshape(len(x_CT), -1, samples).swapaxes(0, 1))
    return np.concatenate(pieces)


def _covariance(x_NCT: np.ndarray) -> np.ndarray:
    return np.einsum("nct,ndt->cd", x_NCT, x_NCT, optimize=True) / (x_NCT.shape[0] * x_NCT.shape[2])
