"""
Cross-validation over subjects: every subject is scored by a model that never saw it, and the next fold chooses that model.
"""

from collections.abc import Sequence

from lib.cache import Cache
from lib.errors import Unusable


def fold_rows(cache: Cache, rows: Sequence[int], folds: int) -> list[dict[str, list[int]]]:
    """Per fold the recordings, of `rows`, to score, to choose the model by (val), and to train on. Raises Unusable."""
    subject_of = {i: cache.recordings[i].subject for i in rows}
    fold_of = {s: n % folds for n, s in enumerate(sorted(set(subject_of.values())))}
    if len(fold_of) < folds:
        raise Unusable(f"--folds {folds}: there are {len(fold_of)} subjects in train and val")
    plan = []
    for fold in range(folds):
        ahead = {i: (fold_of[subject_of[i]] - fold) % folds for i in rows}  # folds from the present one
        score, val = ([i for i in rows if ahead[i] == n] for n in (0, 1))
        plan.append({"score": score, "val": val, "train": [i for i in rows if ahead[i] > 1]})
    return plan
