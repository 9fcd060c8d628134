"""lib/samplers.py: each order is complete, repeatable, the same for every number of ranks, and needs no memory."""

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.samplers import DatasetSampler, Ranges, SeizureSampler, SubjectSampler, UniformSampler, key, permuted

SEIZURE_IDS = np.sort(np.random.default_rng(0).choice(20_000, 900, replace=False))
SAMPLERS = {
    "uniform": lambda batch, seed: UniformSampler(10_007, batch, seed),
    "dataset": lambda batch, seed: DatasetSampler(
        {"tuh": np.array([[0, 500], [900, 2000]]), "hbn": np.array([[500, 900], [2000, 9000]])},
        {"tuh": 0.3, "hbn": 0.7},
        batch,
        seed,
    ),
    "seizure": lambda batch, seed: SeizureSampler(SEIZURE_IDS[::3], SEIZURE_IDS[1::3], 20_000, batch, seed),
    "subject": lambda batch, seed: SubjectSampler(
        [[[0, 10], [50, 90]], [[10, 50]], [[90, 91], [91, 700]]], batch, seed
    ),
}


def stream(sampler, windows: int) -> np.ndarray:
    """The first windows that a sampler gives."""
    return np.concatenate([sampler.ids(step) for step in range(-(-windows // sampler.batch))])[:windows]


# ----------------------------------------------------------------------------
# what all samplers share


@pytest.mark.parametrize("name", SAMPLERS)
def test_order_depends_on_seed_and_step_only(name):
    sampler = SAMPLERS[name](64, 7)
    forward = [sampler.ids(step) for step in range(50)]
    for step in (49, 3, 17):  # a fresh sampler that starts anywhere, as after a resume
        np.testing.assert_array_equal(SAMPLERS[name](64, 7).ids(step), forward[step])
        np.testing.assert_array_equal(sampler.ids(step), forward[step])
    assert forward[0].dtype == np.int64 and forward[0].shape == (64,)
    assert not np.array_equal(SAMPLERS[name](64, 8).ids(0), forward[0])
    assert sampler.epoch(0) != sampler.epoch(10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_ranks_share_each_batch_without_overlap(name):
    sampler = SAMPLERS[name](64, 0)
    for step in range(5):
        whole = sampler.ids(step)
        for world in (1, 2, 4):
            union = np.empty_like(whole)
            for rank in range(world):
                union[rank::world] = SAMPLERS[name](64, 0).ids(step)[rank::world]
            np.testing.assert_array_equal(union, whole)


@pytest.mark.parametrize("name", ["uniform", "seizure", "subject"])
def test_order_does_not_depend_on_the_batch_size(name):
    np.testing.assert_array_equal(stream(SAMPLERS[name](64, 3), 3000), stream(SAMPLERS[name](17, 3), 3000))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_permuted_is_a_permutation(n, seed):
    order = permuted(np.arange(n), n, key(seed, "test"))
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    some = np.arange(0, n, 7)
    np.testing.assert_array_equal(permuted(some, n, key(seed, "test")), order[some])


def test_permuted_is_close_to_uniform():
    keys = key(0, "test") + np.arange(24_000, dtype=np.uint64)
    orders = Counter(zip(*(permuted(np.full(24_000, i), 4, keys).tolist() for i in range(4)), strict=True))
    assert len(orders) == 24 and max(orders.values()) < 1.4 * min(orders.values())
    where = np.bincount(permuted(np.full(24_000, 5), 1000, keys) // 100, minlength=10)
    assert where.max() < 1.15 * where.min()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=8))
def test_ranges_count_through(gaps_and_lengths):
    at, ranges = 0, []
    for gap, length in gaps_and_lengths:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    expected = [i for start, stop in ranges for i in range(start, stop)]
    counted = Ranges(np.array(ranges))
    assert len(counted) == len(expected)
    np.testing.assert_array_equal(counted[np.arange(len(expected))], np.array(expected, np.int64))


# ----------------------------------------------------------------------------
# uniform


@given(
    n=st.integers(1, 2000),
    batch=st.integers(1, 300),
    block=st.sampled_from((1, 3, 16)),
    group=st.sampled_from((1, 4, 256)),
)
@settings(max_examples=40, deadline=None)
def test_uniform_epochs_hold_every_window_once(n, batch, block, group):
    drawn = stream(UniformSampler(n, batch, 0, block, group), 3 * n)
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(drawn[epoch * n : (epoch + 1) * n]), np.arange(n))
    if n > 20 and block * group > 1:
        assert not np.array_equal(drawn[:n], drawn[n : 2 * n])


def test_uniform_reads_neighbours_together_but_mixes_the_batch():
    drawn = stream(UniformSampler(1_000_000, 256, 0), 4096)
    assert len(set((drawn // 16).tolist())) == 256  # 256 blocks of 16 make a group
    assert len(set((drawn[:256] // 16).tolist())) > 120
    assert np.abs(np.diff(drawn)).mean() > 200_000
    plain = stream(UniformSampler(1_000_000, 256, 0, block=1, group=1_000_000), 4096)
    assert len(set((plain // 16).tolist())) > 3900


def test_24_million_windows_start_at_once():
    """TUEG in 4 s windows. DistributedSampler takes 1.7 s and 805 MB per rank here (docs)."""
    n = 24_300_000
    seizure = np.arange(0, n, 200)
    subjects = [[[i * 1600, i * 1600 + 900], [i * 1600 + 900, i * 1600 + 1600]] for i in range(15_000)]
    tracemalloc.start()
    began = time.process_time()
    for sampler in (
        UniformSampler(n, 256, 0),
        DatasetSampler({"a": np.array([[0, n // 3]]), "b": np.array([[n // 3, n]])}, {"a": 0.3, "b": 0.7}, 256, 0),
        SeizureSampler(seizure[::2], seizure[1::2], n, 256, 0),
        SubjectSampler(subjects, 256, 0),
    ):
        assert sampler.ids(123_456).max() < n
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2 and peak < 50e6


def test_nothing_to_sample_is_an_error():
    with pytest.raises(ValueError, match="no windows"):
        UniformSampler(0, 4, 0)
    with pytest.raises(ValueError, match="partly|in part"):
        SeizureSampler(np.empty(0), np.array([3]), 10, 4, 0)
    with pytest.raises(ValueError, match="1 of 2 subjects"):
        SubjectSampler([[[0, 5]], [[5, 5]]], 4, 0)
    with pytest.raises(ValueError, match="hbn"):
        DatasetSampler({"tuh": np.array([[0, 5]])}, {"tuh": 0.3, "hbn": 0.7}, 4, 0)


# ----------------------------------------------------------------------------
# datasets


@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), batch=st.integers(20, 64), sizes=st.integers(1, 400)
)
@settings(max_examples=40, deadline=None)
def test_dataset_shares_are_exact_from_the_start(weights, batch, sizes):
    ranges = {str(d): np.array([[d * 1000, d * 1000 + sizes + d]]) for d in range(len(weights))}
    sampler = DatasetSampler(ranges, {str(d): w for d, w in enumerate(weights)}, batch, 0)
    windows = batch * (5 + 300 // batch)
    dataset = stream(sampler, windows) // 1000
    share = np.array(weights) / sum(weights)
    assert np.abs(np.bincount(dataset, minlength=len(weights)) - share * windows).max() < 2 + windows * 1e-4
    pattern = np.bincount(sampler.pattern, minlength=len(weights)) / len(sampler.pattern)
    assert np.abs(pattern - share).max() <= 1e-4


def test_each_dataset_walks_its_own_epochs():
    sampler = SAMPLERS["dataset"](50, 0)
    assert len(sampler.pattern) == 10
    drawn = stream(sampler, 24_000)
    assert np.isin(drawn, np.r_[0:500, 900:2000]).sum() == 0.3 * 24_000
    for ranges in (np.r_[0:500, 900:2000], np.r_[500:900, 2000:9000]):
        own = drawn[np.isin(drawn, ranges)]
        counts = np.unique(own, return_counts=True)[1]
        assert len(counts) == len(ranges) and counts.max() - counts.min() <= 1
    for rank in range(2):  # a rank sees the mixture too
        assert 0.2 < np.isin(drawn[rank::2], np.r_[0:500, 900:2000]).mean() < 0.4
    assert sampler.epoch(480) == {"tuh": 7200 / 1600, "hbn": 16_800 / 7400}


# ----------------------------------------------------------------------------
# seizures


@given(
    n=st.integers(2, 3000),
    share=st.floats(0.001, 1),
    cut=st.floats(0.05, 1),
    batch=st.integers(1, 100),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_balanced_epochs(n, share, cut, batch, seed):
    seizure = np.sort(np.random.default_rng(seed).choice(n, max(int(n * share), 1), replace=False))
    n_partial = max(int(len(seizure) * cut), 1)
    partial = np.sort(np.random.default_rng(seed).choice(seizure, n_partial, replace=False))
    full = np.setdiff1d(seizure, partial)
    none = np.setdiff1d(np.arange(n), seizure)
    sampler = SeizureSampler(partial, full, n, batch, seed)
    expected = [n_partial, min(round(0.3 * n_partial), len(full)), min(round(2.5 * n_partial), len(none))]
    assert list(sampler.counts.values()) == expected
    drawn = stream(sampler, 2 * sampler.epoch_windows).reshape(2, -1)
    for epoch in drawn:
        assert len(np.unique(epoch)) == len(epoch)
        assert [int(np.isin(epoch, ids).sum()) for ids in (partial, full, none)] == expected


def test_balanced_epochs_draw_anew_until_all_was_seen():
    partial, full = SEIZURE_IDS[::9], np.setdiff1d(SEIZURE_IDS, SEIZURE_IDS[::9])
    sampler = SeizureSampler(partial, full, 20_000, 60, 0)
    assert sampler.counts == {"partial": 100, "full": 30, "none": 250}
    drawn = stream(sampler, 76 * sampler.epoch_windows).reshape(76, -1)
    none = drawn[~np.isin(drawn, SEIZURE_IDS)]
    assert len(np.unique(none)) == 76 * 250 == len(none)  # 19,100 windows without seizure: no repeat for 76 epochs
    assert len(np.unique(drawn[:26][np.isin(drawn[:26], full)])) == 26 * 30
    first_places = np.flatnonzero(np.isin(drawn[0], partial))
    assert 0.35 < first_places.mean() / len(drawn[0]) < 0.65  # the categories are mixed, not one after the other


# ----------------------------------------------------------------------------
# subjects


@given(
    counts=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), min_size=1, max_size=12),
    batch=st.integers(20, 50),
)
@settings(max_examples=40, deadline=None)
def test_every_round_holds_every_subject_once(counts, batch):
    first, subjects, owner = 0, [], []
    for s, lengths in enumerate(counts):
        ranges = []
        for length in lengths:
            ranges.append((first, first + length))
            owner += [s] * length
            first += length
        subjects.append(ranges)
    rounds = 2 * max(map(sum, counts))
    drawn = stream(SubjectSampler(subjects, batch, 0), rounds * len(counts))
    by_round = np.array(owner)[drawn].reshape(rounds, -1)
    np.testing.assert_array_equal(np.sort(by_round, axis=1), np.tile(np.arange(len(counts)), (rounds, 1)))
    for s, lengths in enumerate(counts):
        own = drawn[np.array(owner)[drawn] == s]
        for lap in range(2):  # every window once, then every window again
            assert len(set(own[lap * sum(lengths) : (lap + 1) * sum(lengths)].tolist())) == sum(lengths)
