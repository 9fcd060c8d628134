"""The seizure set of real signal: every segment once, seizures where the annotations say, and the cache builder takes it for an archive of TUSZ."""

import numpy as np
import pytest

from lib.cache import Cache
from tests import bonn_seizures, recipes


def test_segments_are_joined_without_a_step_and_seizures_that_touch_are_one():
    parts = [np.full(400, level) for level in (0.0, 10.0, 20.0, 0.0, 30.0)]
    x_T, seizures = bonn_seizures.join(parts, [False, True, True, False, True])
    assert len(x_T) == 5 * 400 - 4 * bonn_seizures.FADE and np.abs(np.diff(x_T)).max() < 1
    step = (400 - bonn_seizures.FADE) / bonn_seizures.RATE_HZ
    assert seizures == [pytest.approx((step, 2 * step + 400 / 173.61)), pytest.approx((4 * step, len(x_T) / 173.61))]


def test_real_segments_become_patients_of_an_archive(data_dir, tmp_path):
    files = bonn_seizures.main(bonn_seizures.Config(tmp_path / "tree", data_dir / "bonn"))
    assert len(files) == 10
    status, results, err = recipes.run("--source", tmp_path / "tree", "--cache", tmp_path / "cache", "--workers", 1)
    assert status == 0, err
    assert {name: split["subjects"] for name, split in results["splits"].items()} == {"train": 6, "val": 2, "test": 2}
    cache = Cache(tmp_path / "cache")
    row_N, onset_s, end_s = (np.asarray(x) for x in cache.intervals("seizure"))
    assert set(row_N) == set(range(10)) and (end_s > onset_s).all()
    total_s = float((end_s - onset_s).sum())
    assert 0.8 * 40 * 23.6 < total_s <= 40 * 23.6 + 10  # forty segments, some cut where a recording ends
