"""
Few-shot classification by prototypes (Snell 2017): a class is the mean of K windows' features, a window belongs to the nearest one.

Shape letters: B windows, X features, Q queries, N classes.
"""

import numpy as np

from lib import classical
from lib.inference import Inference
from lib.targets import Examples

QUERIES = 15  # per class and episode, at most


def episode(
    rng: np.random.Generator, y_B: np.ndarray, group_B: np.ndarray, far: np.ndarray, shots: int, within: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """
    Rows of support (`shots` per class) and of queries; None if the draw has too few.

    `within`: both are of one subject (group), and no query is nearer to a support window than `far` allows (row (2): recording, first and
    one past the last sample). Otherwise queries are of other subjects than the support.
    """
    classes, groups = np.unique(y_B), np.unique(group_B)
    if within:
        inside_B = group_B == rng.choice(groups)
        support_from, query_from = inside_B, inside_B
    else:
        half = rng.permutation(groups)[: max(1, len(groups) // 2)]
        support_from = np.isin(group_B, half)
        query_from = ~support_from
    support, query = [], []
    for c in classes:
        there = np.flatnonzero(support_from & (y_B == c))
        if len(there) < shots:
            return None
        support.append(rng.choice(there, shots, replace=False))
    support = np.concatenate(support)
    near_B = np.zeros(len(y_B), bool)
    for s in support:
        near_B |= (far[:, 0] == far[s, 0]) & (far[:, 1] < far[s, 2]) & (far[:, 2] > far[s, 1])
    for c in classes:
        there = np.flatnonzero(query_from & (y_B == c) & ~near_B)
        if not len(there):
            return None
        query.append(rng.permutation(there)[:QUERIES])
    return support, np.concatenate(query)


def told(z_BX: np.ndarray, y_B: np.ndarray, support: np.ndarray, query: np.ndarray) -> float:
    """Balanced accuracy of the nearest prototype, features standardised by the support."""
    classes = np.unique(y_B)
    spread_X = np.maximum(z_BX[support].std(0), 1e-6 + 1e-3 * z_BX[support].std())
    prototype_NX = np.stack([z_BX[support[y_B[support] == c]].mean(0) for c in classes]) / spread_X
    apart_QN = np.linalg.norm((z_BX[query] / spread_X)[:, None] - prototype_NX, axis=2)
    said_Q = classes[apart_QN.argmin(1)]
    return float(np.mean([(said_Q[y_B[query] == c] == c).mean() for c in classes]))


def few_shot(
    ways: dict[str, np.ndarray],
    y_B: np.ndarray,
    subject_B: np.ndarray,
    span_B3: np.ndarray,
    shots: int,
    episodes: int,
    seed: int,
) -> dict[str, tuple[float, float, float]] | None:
    """
    Mean balanced accuracy over episodes of each way to describe windows (features (B, X)), with its 95 % interval over episodes.

    Within subjects where a subject has several classes, else across them. None where no episode can be drawn.
    """
    mixed = [s for s in np.unique(subject_B) if len(set(y_B[subject_B == s])) == len(set(y_B))]
    kept_B = np.isin(subject_B, mixed) if mixed else np.ones(len(y_B), bool)
    y_B, subject_B, span_B3 = y_B[kept_B], subject_B[kept_B], span_B3[kept_B]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(10 * episodes):
        if len(drawn) == episodes:
            break
        one = episode(rng, y_B, subject_B, span_B3, shots, bool(mixed))
        drawn += [one] if one else []
    if len(drawn) < 2:
        return None
    results = {}
    for name, z_BX in ways.items():
        score_E = np.array([told(z_BX[kept_B], y_B, *one) for one in drawn])
        half = 1.96 * score_E.std(ddof=1) / np.sqrt(len(score_E))
        results[name] = (float(score_E.mean()), float(score_E.mean() - half), float(score_E.mean() + half))
    return results


def score(
    inference: Inference, examples: Examples, ids: np.ndarray, shots: int, episodes: int, seed: int
) -> dict[str, tuple[float, float, float]] | None:
    """`few_shot` of examples of one target of classes by the model's features and, where there are common sites, by band power."""
    cache = examples.cache
    z_BX, y_BK = inference.features(examples, ids)
    row_B, start_B = examples.locate(ids)
    sites = classical.Sites.of(cache, np.unique(row_B).tolist())
    ways = {"model": z_BX.flatten(1).numpy()}
    if sites:
        ways["band_power"] = classical.described("band_power", sites, cache, row_B, start_B, examples.samples)
    subject_B = np.array([cache.recordings[i].subject for i in row_B])
    span_B3 = np.stack([row_B, start_B, start_B + examples.samples], 1)
    return few_shot(ways, y_BK[:, 0].long().numpy(), subject_B, span_B3, shots, episodes, seed)
