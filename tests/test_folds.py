"""Folds: every subject is scored once, by a model that neither learned from nor was chosen by them."""

from types import SimpleNamespace

import pytest

from lib.errors import Unusable
from lib.folds import fold_rows


def test_folds_part_subjects():
    cache = SimpleNamespace(recordings=[SimpleNamespace(subject=f"s{i % 7}") for i in range(20)])
    rows = list(range(1, 20))
    plan = fold_rows(cache, rows, 3)
    assert sorted(i for part in plan for i in part["score"]) == rows
    for fold, part in enumerate(plan):
        subjects = [{cache.recordings[i].subject for i in part[name]} for name in ("train", "val", "score")]
        assert all(subjects) and len(set.union(*subjects)) == sum(map(len, subjects)) == 7
        assert part["val"] == plan[(fold + 1) % 3]["score"]
    for part in fold_rows(cache, rows, 2, chosen=False):
        assert part["val"] == part["score"] and sorted(part["train"] + part["score"]) == rows
        assert not {cache.recordings[i].subject for i in part["train"]} & {
            cache.recordings[i].subject for i in part["score"]
        }
    with pytest.raises(Unusable, match="there are 7 subjects"):
        fold_rows(cache, rows, 8)
