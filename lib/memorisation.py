"""
Were windows copied from the training set? Nothing that measures fidelity can tell: copies are as real as it gets.

Shape letters: N windows judged, C channels, L samples, T samples of a stretch, K places in it, F frequencies.
"""

from collections.abc import Sequence

import numpy as np
import torch

COPY = 0.95  # a correlation above which two windows are one, at some shift
AT_ONCE = 1 << 23  # values held by the search


def nearest(x_NCL: np.ndarray, among: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """
    The largest correlation (N,) of each window with any equally long piece of the stretches `among` (C, T), and in which one (N,).

    All channels together; means are taken out, and amplitude and sign don't matter. By blocks of four windows' length in the frequency
    domain (overlap-save), so that every moment a training window may have begun at is looked at. Shorter stretches are left out.
    """
    n, channels, samples = x_NCL.shape
    longest = max((y.shape[1] for y in among), default=0)
    size = 1 << (max(samples, min(4 * samples, longest)) - 1).bit_length()
    hop = size - samples + 1
    best_N, at_N = torch.full((n,), -1.0), torch.zeros(n, dtype=torch.int64)
    for some in np.array_split(np.arange(n), -(-n * channels * size // AT_ONCE)):
        x_NCF = torch.fft.rfft(_unit(x_NCL[some]), size).conj()
        for number, stretch_CT in enumerate(among):
            y_CT = torch.from_numpy(np.ascontiguousarray(stretch_CT, np.float64))
            y_CT = y_CT - y_CT.mean(1, keepdim=True)
            energy_K = _energy(y_CT, samples)
            for first in range(0, len(energy_K), hop):
                y_CF = torch.fft.rfft(y_CT[:, first : first + size].float(), size)
                r_NK = torch.fft.irfft((x_NCF * y_CF).sum(1), size)[:, : min(hop, len(energy_K) - first)]
                r_N = (r_NK.abs() / energy_K[first : first + hop].sqrt()).amax(1)
                better_N = r_N > best_N[some]
                best_N[some] = torch.where(better_N, r_N, best_N[some])
                at_N[some] = torch.where(better_N, number, at_N[some])
    return best_N.double().numpy(), at_N.numpy()


def _energy(y_CT: torch.Tensor, samples: int) -> torch.Tensor:
    """Sum over channels of the squares around their mean in each piece of so many samples, float32, of the flat ones infinite."""
    sums = (torch.nn.functional.pad(a.cumsum(1), (1, 0)) for a in (y_CT, y_CT.square()))
    sum_CK, square_CK = (a[:, samples:] - a[:, :-samples] for a in sums)
    energy_K = (square_CK - sum_CK.square() / samples).sum(0)
    flat_K = energy_K <= 1e-9 * y_CT.square().sum() * samples / max(1, y_CT.shape[1])
    return torch.where(flat_K, torch.inf, energy_K).float()


def around(x_NCL: np.ndarray) -> list[np.ndarray]:
    """Windows as stretches that hold each of their circular shifts, for where there is nothing but windows to search."""
    return [np.concatenate([x_CL, x_CL[:, :-1]], 1) for x_CL in x_NCL]


def _unit(x_NCL: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(x_NCL, np.float32))
    x = x - x.mean(2, keepdim=True)
    return x / x.square().sum((1, 2), keepdim=True).sqrt().clamp_min(1e-12)


def copies(own_N: np.ndarray, real_N: np.ndarray) -> dict[str, float]:
    """
    `rate`: the share of generated windows that are copies; `real`: the same of held-out real ones.

    `own_N` and `real_N` are correlations with the nearest training window; beyond `limit` a window counts as a copy. The limit is COPY, or
    the 99th percentile of the real ones where a recording repeats itself so much that these are higher. `chance` is how probable so
    many copies are if generated windows are like real ones (Fisher's exact test, one-sided); `most` is the largest rate at which that is 1 % or more.
    """
    from scipy.stats import fisher_exact

    limit = max(COPY, float(np.percentile(real_N, 99)))
    own, real, n, m = int((own_N > limit).sum()), int((real_N > limit).sum()), len(own_N), len(real_N)

    def chance(count: int) -> float:
        return float(fisher_exact([[count, n - count], [real, m - real]], alternative="greater").pvalue)

    most = next((count - 1 for count in range(1, n + 1) if chance(count) < 0.01), n)
    return {"limit": limit, "rate": own / n, "real": real / m, "most": most / n, "chance": chance(own)}
