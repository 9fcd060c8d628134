"""
Were windows copied from the training set? Nothing that measures fidelity can tell: copies are as real as it gets.

Shape letters: N windows judged, M windows searched, C channels, L samples, F frequencies.
"""

import numpy as np
import torch

COPY = 0.95  # a correlation above which two windows are one, at some shift
AT_ONCE = 1 << 23  # values held by the search


def nearest(x_NCL: np.ndarray, among_MCL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    The largest correlation (N,) of each window with any of `among` at any circular shift, all channels together, and which it is (N,).

    Means are taken out, and amplitude and sign don't matter.
    """
    n, channels, samples = x_NCL.shape
    x_NCF, y_MCF = (torch.fft.rfft(_unit(a)) for a in (x_NCL, among_MCL))
    y_MCF = y_MCF.conj()
    best_N, at_N = np.full(n, -1.0), np.zeros(n, int)
    for i in range(n):
        step = max(1, AT_ONCE // (channels * samples))
        for first in range(0, len(y_MCF), step):
            joint_MF = (x_NCF[i] * y_MCF[first : first + step]).sum(1)
            r_M = torch.fft.irfft(joint_MF, samples).abs().amax(1)
            found = int(r_M.argmax())
            if float(r_M[found]) > best_N[i]:
                best_N[i], at_N[i] = float(r_M[found]), first + found
    return best_N, at_N


def _unit(x_NCL: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(x_NCL, np.float32))
    x = x - x.mean(2, keepdim=True)
    return x / x.square().sum((1, 2), keepdim=True).sqrt().clamp_min(1e-12)


def copies(own_N: np.ndarray, real_N: np.ndarray) -> dict[str, float]:
    """
    The share of generated windows that are copies (`rate`), that of held-out real ones (`real`) and the most that is like it (`most`).

    Both are correlations with the nearest training window. A recording that repeats itself has real windows above COPY; the `limit` is
    then the 99th percentile of the real ones. `chance` is that of so many copies, were the generated like the real: Fisher's exact test,
    one-sided; `most` has a chance of 1 %.
    """
    from scipy.stats import fisher_exact

    limit = max(COPY, float(np.percentile(real_N, 99)))
    own, real, n, m = int((own_N > limit).sum()), int((real_N > limit).sum()), len(own_N), len(real_N)

    def chance(count: int) -> float:
        return float(fisher_exact([[count, n - count], [real, m - real]], alternative="greater").pvalue)

    most = next((count - 1 for count in range(1, n + 1) if chance(count) < 0.01), n)
    return {"limit": limit, "rate": own / n, "real": real / m, "most": most / n, "chance": chance(own)}
