"""
Are these two sets of windows from one distribution? Kernels, neighbours, and classifiers that try to tell them apart.

Sets are index arrays into one pool, so that distances and kernels are computed once for all draws of all floors.

Shape letters: N windows of the pool, A and B the windows of the two sets, C channels, L samples, F features, K classes, P permutations.
"""

import math

import numpy as np
import torch
from torch import nn

NEIGHBOURS = 5  # as Naeem 2020
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernels, times the median distance
PERMUTATIONS = 100
WORD = 1 << 31


def squared_distances(x_NF: np.ndarray) -> np.ndarray:
    """Euclidean distances squared of all pairs (N, N), float32."""
    x = torch.from_numpy(np.ascontiguousarray(x_NF, np.float32))
    return torch.cdist(x, x).square_().numpy()


def kernel(square_NN: np.ndarray, median: float) -> np.ndarray:
    """Mean of five Gaussian kernels whose widths are multiples of the median distance (Li 2015)."""
    square = torch.from_numpy(square_NN)
    total = torch.zeros_like(square)
    for width in WIDTHS:
        total += torch.exp(square * (-0.5 / (width * median) ** 2))
    return (total / len(WIDTHS)).numpy()


def mmd(kernel_NN: np.ndarray, a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Unbiased MMD² of two sets (Gretton 2012, eq. 3), and how many deviations of relabelled windows it lies above their mean."""
    both = np.concatenate([a, b])
    k = torch.from_numpy(kernel_NN)[torch.from_numpy(both)][:, torch.from_numpy(both)]
    in_a = np.zeros((len(both), PERMUTATIONS + 1), np.float32)
    in_a[: len(a), 0] = 1
    for p in range(PERMUTATIONS):
        in_a[rng.permutation(len(both))[: len(a)], p + 1] = 1
    w_a = torch.from_numpy(in_a)
    w_b, own = 1 - w_a, k.diagonal()[:, None]
    k_a, k_b = k @ w_a, k @ w_b
    within_a = ((w_a * k_a).sum(0) - (w_a * own).sum(0)) / (len(a) * (len(a) - 1))
    within_b = ((w_b * k_b).sum(0) - (w_b * own).sum(0)) / (len(b) * (len(b) - 1))
    value_P = (within_a + within_b - 2 * (w_a * k_b).sum(0) / (len(a) * len(b))).double().numpy()
    return float(value_P[0]), float((value_P[0] - value_P[1:].mean()) / (value_P[1:].std() + 1e-12))


def neighbourhoods(square_NN: np.ndarray, a: np.ndarray, b: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """Density and coverage (Naeem 2020, eq. 3 and 4), precision and recall (Kynkäänniemi 2019) of set b against set a."""
    square = torch.from_numpy(square_NN)
    at_a, at_b = torch.from_numpy(np.asarray(a)), torch.from_numpy(np.asarray(b))
    across = square[at_a][:, at_b]
    k = min(k, len(a) - 1, len(b) - 1)
    radius_A = square[at_a][:, at_a].kthvalue(k + 1, 1).values  # the nearest is the window itself
    radius_B = square[at_b][:, at_b].kthvalue(k + 1, 1).values
    inside = across < radius_A[:, None]
    return {
        "density": float(inside.sum() / (k * len(b))),
        "coverage": float((across.min(1).values < radius_A).float().mean()),
        "precision": float(inside.any(0).float().mean()),
        "recall": float((across < radius_B).any(1).float().mean()),
    }


def frechet(a_AF: np.ndarray, b_BF: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (Heusel 2017)."""
    mean_a, mean_b = a_AF.mean(0), b_BF.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(x.T)) for x in (a_AF, b_BF))
    size, turn = np.linalg.eigh(cov_a)
    root = (turn * np.sqrt(size.clip(0))) @ turn.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def folds(count: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """A fold per window, at random, of equal sizes."""
    return rng.permutation(np.arange(count) % parts)


def told_by_logistic(a_AF: np.ndarray, b_BF: np.ndarray, fold_N: np.ndarray) -> np.ndarray:
    """Probability (A + B,) that a window is of set b, each from a logistic regression fitted on the other folds (Lopez-Paz 2017)."""
    x_NF = np.concatenate([a_AF, b_BF])
    y_N = np.repeat([0, 1], [len(a_AF), len(b_BF)])
    said_N = np.full(len(x_NF), 0.5)
    for fold in np.unique(fold_N):
        fit, judged = fold_N != fold, fold_N == fold
        mean_F, sd_F = x_NF[fit].mean(0), x_NF[fit].std(0) + 1e-3
        if len(np.unique(y_N[fit])) == 2:
            model = logistic((x_NF[fit] - mean_F) / sd_F, y_N[fit])
            said_N[judged] = model.predict_proba((x_NF[judged] - mean_F) / sd_F)[:, 1]
    return said_N


def logistic(x_NF: np.ndarray, y_N: np.ndarray):
    """A fitted logistic regression, by the solver that is quick for that many features."""
    from sklearn.linear_model import LogisticRegression

    few = x_NF.shape[1] * len(np.unique(y_N)) <= 600
    return LogisticRegression(C=0.1, max_iter=200, tol=1e-3, solver="newton-cholesky" if few else "lbfgs").fit(
        x_NF, y_N
    )


# ----------------------------------------------------------------------------
# a small convolutional network on raw samples


class Network(nn.Module):
    """Four strided convolutions, mean and maximum over time, a linear layer: about 30,000 parameters for one channel."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        sizes = [(channels, 16, 16, 8), (16, 32, 9, 2), (32, 48, 7, 2), (48, 64, 5, 2)]
        layers: list[nn.Module] = []
        for into, out, width, stride in sizes:
            layers += [nn.Conv1d(into, out, width, stride, width // 2), nn.BatchNorm1d(out), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(2 * sizes[-1][1], classes)

    def forward(self, x_BCL: torch.Tensor) -> torch.Tensor:
        """Logits (B, K)."""
        h_BDT = self.layers(x_BCL)
        return self.head(torch.cat([h_BDT.mean(2), h_BDT.amax(2)], 1))


def train_network(x_NCL: np.ndarray, y_N: np.ndarray, classes: int, seed: int, steps: int = 150) -> Network:
    """A Network fitted to class numbers by AdamW on one cycle of the learning rate; the same for the same seed."""
    x, y = torch.from_numpy(np.ascontiguousarray(x_NCL, np.float32)), torch.from_numpy(np.asarray(y_N, np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % WORD)
        model = Network(x.shape[1], classes)
    rng = torch.Generator().manual_seed(seed % WORD)
    batch = min(64, len(x))
    per_pass = len(x) // batch
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    model.train()
    for step in range(steps):
        if step % per_pass == 0:
            order = torch.randperm(len(x), generator=rng)
        at = order[step % per_pass * batch :][:batch]
        optimizer.param_groups[0]["lr"] = 3e-3 * min(
            1.0, 5 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        )
        loss = nn.functional.cross_entropy(model(x[at]), y[at])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def network_says(model: Network, x_NCL: np.ndarray) -> np.ndarray:
    """Probabilities (N, K) of a trained network."""
    x = torch.from_numpy(np.ascontiguousarray(x_NCL, np.float32))
    with torch.inference_mode():
        return torch.cat([model(part).softmax(1) for part in x.split(256)]).double().numpy()


def told_by_network(
    a_ACL: np.ndarray, b_BCL: np.ndarray, fold_N: np.ndarray, seed: int, steps: int = 150
) -> np.ndarray:
    """Probability (A + B,) that a window is of set b, each from a network trained on the other folds."""
    x_NCL = np.concatenate([a_ACL, b_BCL])
    y_N = np.repeat([0, 1], [len(a_ACL), len(b_BCL)])
    said_N = np.full(len(x_NCL), 0.5)
    for fold in np.unique(fold_N):
        model = train_network(x_NCL[fold_N != fold], y_N[fold_N != fold], 2, seed + int(fold), steps)
        said_N[fold_N == fold] = network_says(model, x_NCL[fold_N == fold])[:, 1]
    return said_N


# ----------------------------------------------------------------------------
# what others publish, so that their tables can be compared with; the floors beside them say what they are worth

PIECE = 24  # samples, as TimeGAN and those after it


class Recurrent(nn.Module):
    """A GRU of 16 units, whatever the channels: TimeGAN's half as many units as channels are none for one channel."""

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.gru, self.head = nn.GRU(channels, 16, batch_first=True), nn.Linear(16, outputs)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Outputs at every sample (B, T, outputs)."""
        return self.head(self.gru(x_BTC)[0])


def published(real_NCL: np.ndarray, fake_NCL: np.ndarray, seed: int, steps: int = 150) -> dict[str, float]:
    """
    Kolmogorov-Smirnov distance of all samples pooled; MMD² of raw samples with one kernel at the median distance; mean distance of pairs;
    TimeGAN's discriminative (|accuracy − 0.5|) and predictive (error of the next sample, trained on generated) scores on pieces of 24 samples.
    """
    from scipy.stats import ks_2samp

    rng = np.random.default_rng([seed, 7])
    flat_real, flat_fake = (x.reshape(len(x), -1) for x in (real_NCL, fake_NCL))
    square = torch.cdist(*2 * [torch.from_numpy(np.concatenate([flat_real, flat_fake]))]).square_()
    n, m = len(flat_real), len(flat_fake)
    k = torch.exp(square * (-0.5 / float(square[square > 0].median())))
    within = (k[:n, :n].sum() - n) / (n * (n - 1)) + (k[n:, n:].sum() - m) / (m * (m - 1))
    low, high = real_NCL.min(), real_NCL.max()

    def pieces(x_NCL: np.ndarray) -> torch.Tensor:
        at_N = rng.integers(x_NCL.shape[2] - min(PIECE, x_NCL.shape[2]) + 1, size=len(x_NCL))
        cut = np.stack([x[:, i : i + PIECE].T for x, i in zip(x_NCL, at_N, strict=True)])
        return torch.from_numpy(np.ascontiguousarray((cut - low) / (high - low), np.float32))

    real, fake = pieces(real_NCL), pieces(fake_NCL)
    return {
        "ks_pooled": float(
            ks_2samp(
                rng.permutation(flat_real.ravel())[:100_000], rng.permutation(flat_fake.ravel())[:100_000]
            ).statistic
        ),
        "mmd_raw": float(within - 2 * k[:n, n:].mean()),
        "diversity": float(square[n:, n:].sqrt().sum() / (m * (m - 1))),
        "discriminative_24": _discriminative(real, fake, seed, steps),
        "predictive_24": _predictive(real, fake, seed, steps),
    }


def _fit_recurrent(model_outputs: int, x_BTC: torch.Tensor, y: torch.Tensor, loss, seed: int, steps: int) -> Recurrent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % WORD)
        model = Recurrent(x_BTC.shape[2], model_outputs)
    rng, optimizer = torch.Generator().manual_seed(seed % WORD), torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        at = torch.randint(len(x_BTC), (128,), generator=rng)
        optimizer.zero_grad(set_to_none=True)
        loss(model(x_BTC[at]), y[at]).backward()
        optimizer.step()
    return model.eval()


def _discriminative(real: torch.Tensor, fake: torch.Tensor, seed: int, steps: int) -> float:
    """|accuracy − 0.5| on the fifth that was not trained on."""
    x, y = torch.cat([real, fake]), torch.cat([torch.ones(len(real)), torch.zeros(len(fake))])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed % WORD))
    fit, judged = order[: len(x) * 4 // 5], order[len(x) * 4 // 5 :]

    def loss(said_BT1: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(said_BT1[:, -1, 0], y_B)

    model = _fit_recurrent(1, x[fit], y[fit], loss, seed, steps)
    with torch.inference_mode():
        right = (model(x[judged])[:, -1, 0] > 0) == (y[judged] > 0.5)
    return abs(float(right.float().mean()) - 0.5)


def _predictive(real: torch.Tensor, fake: torch.Tensor, seed: int, steps: int) -> float:
    """Mean absolute error of the next sample of real pieces, by a network trained on generated ones."""
    model = _fit_recurrent(fake.shape[2], fake[:, :-1], fake[:, 1:], nn.functional.l1_loss, seed, steps)
    with torch.inference_mode():
        return float((model(real[:, :-1]) - real[:, 1:]).abs().mean())
