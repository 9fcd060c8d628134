"""
Few-shot classification by prototypes (Snell 2017): a class is the mean of K windows' features, a window belongs to the nearest one.

Shape letters: B windows, X features, Q queries, N classes.
"""

import numpy as np

from lib import classical, scores
from lib.errors import Unusable
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


def draw_episodes(
    y_B: np.ndarray, subject_B: np.ndarray, span_B3: np.ndarray, shots: int, episodes: int, seed: int
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Which windows are drawn from, bool (B), and of those the rows of support and queries of each episode that could be drawn."""
    mixed = [s for s in np.unique(subject_B) if len(set(y_B[subject_B == s])) == len(set(y_B))]
    kept_B = np.isin(subject_B, mixed) if mixed else np.ones(len(y_B), bool)
    y_B, subject_B, span_B3 = y_B[kept_B], subject_B[kept_B], span_B3[kept_B]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(10 * episodes):
        if len(drawn) == episodes:
            break
        one = episode(rng, y_B, subject_B, span_B3, shots, bool(mixed))
        drawn += [one] if one else []
    return kept_B, drawn


def right(z_BX: np.ndarray, y_B: np.ndarray, support: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Whether the nearest prototype is of each query's class, bool (Q); features standardised by the support."""
    classes = np.unique(y_B)
    spread_X = np.maximum(z_BX[support].std(0), 1e-6 + 1e-3 * z_BX[support].std())
    prototype_NX = np.stack([z_BX[support[y_B[support] == c]].mean(0) for c in classes]) / spread_X
    apart_QN = np.linalg.norm((z_BX[query] / spread_X)[:, None] - prototype_NX, axis=2)
    return classes[apart_QN.argmin(1)] == y_B[query]


def few_shot(
    ways: dict[str, np.ndarray],
    y_B: np.ndarray,
    subject_B: np.ndarray,
    span_B3: np.ndarray,
    shots: int,
    episodes: int,
    seed: int,
    resamples: int = scores.RESAMPLES,
) -> dict[str, tuple[float, tuple[float, float], tuple[float, float]]] | None:
    """
    Mean balanced accuracy over episodes of each way to describe windows (features (B, X)), and two 95 % intervals.

    The first is over subjects, by a bootstrap of the queries of each; the second over episodes, which says how far the draw alone
    moves the mean: it shrinks with their number, and says nothing of other people.

    Within subjects where a subject has several classes, else across them. None where no episode can be drawn.
    """
    kept_B, drawn = draw_episodes(y_B, subject_B, span_B3, shots, episodes, seed)
    if len(drawn) < 2:
        return None
    y_B, subject_B = y_B[kept_B], subject_B[kept_B]
    # every class weighs the same in every episode: sums over queries are then balanced accuracies
    classes, y_B = np.unique(y_B, return_inverse=True)
    subjects, subject_B = np.unique(subject_B, return_inverse=True)
    weight_E = [1 / np.bincount(y_B[query])[y_B[query]] for _, query in drawn]
    query_Q, weight_Q = np.concatenate([query for _, query in drawn]), np.concatenate(weight_E)
    at_Q, cells = subject_B[query_Q] * len(classes) + y_B[query_Q], len(subjects) * len(classes)
    all_SN = np.bincount(at_Q, weight_Q, cells).reshape(len(subjects), -1)
    asked_S = all_SN.any(1)
    results = {}
    for name, z_BX in ways.items():
        right_E = [right(z_BX[kept_B], y_B, *one) for one in drawn]
        score_E = np.array([w_Q @ r_Q for w_Q, r_Q in zip(weight_E, right_E, strict=True)]) / len(classes)
        right_SN = np.bincount(at_Q, weight_Q * np.concatenate(right_E), cells).reshape(all_SN.shape)
        value, *of_subjects = scores.subject_bootstrap(
            _balanced, np.flatnonzero(asked_S), right_SN[asked_S], all_SN[asked_S], resamples=resamples
        )["score"]
        half = 1.96 * score_E.std(ddof=1) / np.sqrt(len(score_E))
        results[name] = value, tuple(of_subjects), (float(score_E.mean() - half), float(score_E.mean() + half))
    return results


def _balanced(right_SN: np.ndarray, all_SN: np.ndarray) -> dict[str, float]:
    """Balanced accuracy from sums per subject and class; NaN where a class wasn't asked for."""
    with np.errstate(invalid="ignore"):
        return {"score": float((right_SN.sum(0) / all_SN.sum(0)).mean())}


def known(examples: Examples, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class (B), subject (B) and place (B, 3: recording, first and one past the last sample) of examples of one target."""
    row_B, start_B = examples.locate(ids)
    subject_B = np.array([examples.cache.recordings[i].subject for i in row_B])
    span_B3 = np.stack([row_B, start_B, start_B + examples.samples], 1)
    return examples.values(ids)[:, 0].astype(np.int64), subject_B, span_B3


def check(examples: Examples, ids: np.ndarray, shots: int, episodes: int, seed: int, split: str) -> None:
    """Raises Unusable where `score` would find too little to draw from."""
    if len(draw_episodes(*known(examples, ids), shots, episodes, seed)[1]) < 2:
        of = f"subjects per class of {examples.targets[0].name}"
        raise Unusable(f"--shots {shots}: the {split} split has too few windows or {of}")


def score(
    inference: Inference, examples: Examples, ids: np.ndarray, shots: int, episodes: int, seed: int, resamples: int
) -> dict[str, dict]:
    """
    `few_shot` of examples of one target of classes by the model's features and, where there are common sites, by band power.

    Named and ordered as in lib/judgement.py's `summary`, with `episode_intervals`; `check` has passed them.
    """
    cache, (target,) = examples.cache, examples.targets
    z_BX, _ = inference.features(examples, ids)
    row_B, start_B = examples.locate(ids)
    sites = classical.Sites.of(cache, np.unique(row_B).tolist())
    ways = {"model": z_BX.flatten(1).numpy()}
    if sites:
        ways["band_power"] = classical.described("band_power", sites, cache, row_B, start_B, examples.samples)
    scored = few_shot(ways, *known(examples, ids), shots, episodes, seed, resamples)
    name, (value, of_subjects, of_episodes) = f"{target.name}_{shots}_shots_balanced_accuracy", scored.pop("model")
    baselines = {way: {name: [v, *interval]} for way, (v, interval, _) in scored.items()}
    return {
        "metrics": {name: value},
        "intervals": {name: of_subjects},
        "episode_intervals": {name: of_episodes},
        "baselines": baselines | {"constant": {name: 1 / len(target.classes)}},
    }
