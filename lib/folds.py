"""
Cross-validation over subjects: every subject is scored by a model that never saw it; the next fold chooses that model, if one is chosen.
"""

from collections.abc import Sequence

from lib.cache import Cache
from lib.errors import Unusable


def fold_rows(cache: Cache, rows: Sequence[int], folds: int, chosen: bool = True) -> list[dict[str, list[int]]]:
    """
    Per fold the recordings, of `rows`, to score, to choose the model by (val), and to train on. Raises Unusable.

    Where nothing is chosen all others are trained on, and val is what is scored.
    """
    subject_of = {i: cache.recordings[i].subject for i in rows}
    fold_of = {s: n % folds for n, s in enumerate(sorted(set(subject_of.values())))}
    if len(fold_of) < folds:
        raise Unusable(f"--folds {folds}: there are {len(fold_of)} subjects in train and val")
    plan = []
    for fold in range(folds):
        ahead = {i: (fold_of[subject_of[i]] - fold) % folds for i in rows}  # folds from the present one
        score, val = ([i for i in rows if ahead[i] == n] for n in (0, int(chosen)))
        plan.append({"score": score, "val": val, "train": [i for i in rows if ahead[i] > int(chosen)]})
    return plan
