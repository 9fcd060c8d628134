"""lib/isc.py: planted components are found, formulas match loops, nulls are calibrated, and retrieval and identity are what they say."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.isc import correlated_components, isc, isc_by_lag, isc_by_time, isc_null, nearest_alike, retrieval


def shared_and_own(
    subjects: int, channels: int, samples: int, strength: list[float], seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signals (S, C, T) of white sources all see, mixed in by `strength`, in white noise of every subject; patterns and sources."""
    rng = np.random.default_rng(seed)
    pattern_CK = np.linalg.qr(rng.standard_normal((channels, len(strength))))[0] * strength
    source_KT = rng.standard_normal((len(strength), samples))
    x_SCT = rng.standard_normal((subjects, channels, samples))
    return x_SCT + pattern_CK @ source_KT, pattern_CK, source_KT


# ----------------------------------------------------------------------------
# correlated components


def test_planted_components_are_found():
    strength = [2.0, 1.0]
    x, pattern, source = shared_and_own(8, 12, 4000, strength)
    found = correlated_components([x], 4, shrinkage=0.0)
    for k, s in enumerate(strength):
        assert abs(np.corrcoef(found.patterns_CK[:, k], pattern[:, k])[0, 1]) > 0.98
        y_T = (found.weights_CK[:, k] @ x).mean(0)
        expected = math.sqrt(s**2 / (s**2 + 1 / 8))  # the noise of eight, averaged
        assert abs(np.corrcoef(y_T, source[k])[0, 1]) == pytest.approx(expected, abs=0.01)
        # unit noise: the best linear reader has signal s², noise 1, of which s² / (1 + s²) is shared
        assert found.isc_K[k] == pytest.approx(s**2 / (1 + s**2), abs=0.02)
    assert abs(found.isc_K[2:]).max() < 0.06
    np.testing.assert_allclose(isc(np.einsum("ck,sct->skt", found.weights_CK, x)), found.isc_K, atol=1e-10)


def test_no_other_weights_share_more():
    x, _, _ = shared_and_own(5, 6, 800, [1.0])
    best = correlated_components([x], 1, shrinkage=0.0)
    rng = np.random.default_rng(1)
    for _ in range(200):
        w_C = best.weights_CK[:, 0] / np.linalg.norm(best.weights_CK) + 0.3 * rng.standard_normal(6)
        assert isc((w_C @ x)[:, None])[0] <= best.isc_K[0] + 1e-12


def test_against_the_definition_over_pairs():
    """Parra 2019: covariances summed over all pairs of subjects, by loop."""
    x, _, _ = shared_and_own(4, 3, 500, [0.7])
    x_0 = x - x.mean(2, keepdims=True)
    between = sum(x_0[i] @ x_0[j].T for i, j in itertools.permutations(range(4), 2)) / 12
    within = sum(a @ a.T for a in x_0) / 4
    values, vectors = np.linalg.eig(np.linalg.solve(within, between))
    order = np.argsort(-values.real)
    found = correlated_components([x], 3, shrinkage=0.0)
    np.testing.assert_allclose(found.isc_K, values.real[order], rtol=1e-8)
    for k in range(3):
        assert abs(np.corrcoef(found.weights_CK[:, k], vectors[:, order[k]].real)[0, 1]) == pytest.approx(1, abs=1e-8)


def test_several_stimuli_of_other_lengths_and_subjects():
    parts = [shared_and_own(s, 10, t, [1.5], seed=0)[0] for s, t in ((6, 1000), (3, 500))]
    found = correlated_components(parts, 1)
    alone = correlated_components(parts[:1], 1)
    assert abs(np.corrcoef(found.weights_CK[:, 0], alone.weights_CK[:, 0])[0, 1]) > 0.97
    doubled = correlated_components([np.tile(parts[0], (1, 1, 1)), parts[0]], 1)  # twice the same changes nothing
    np.testing.assert_allclose(doubled.isc_K, alone.isc_K)


def test_shrinkage_helps_where_channels_outnumber_time():
    train, pattern, _ = shared_and_own(3, 60, 25, [1.5], seed=2)
    fresh = np.random.default_rng(3)
    source = fresh.standard_normal(4000)
    test = fresh.standard_normal((6, 60, 4000)) + pattern[:, :1] * source
    shares = [
        isc(np.einsum("ck,sct->skt", correlated_components([train], 1, shrinkage=g).weights_CK, test))[0]
        for g in (1e-6, 0.3)
    ]
    assert shares[1] > 0.4 and shares[1] > shares[0] + 0.1


# ----------------------------------------------------------------------------
# inter-subject correlation


def test_isc_is_the_mean_correlation_of_pairs_of_equal_variance():
    y = shared_and_own(5, 3, 400, [1.0])[0]
    y = y / y.std(2, keepdims=True)
    pairs = [np.corrcoef(y[i, k], y[j, k])[0, 1] for k in range(3) for i, j in itertools.combinations(range(5), 2)]
    np.testing.assert_allclose(isc(y), np.array(pairs).reshape(3, -1).mean(1), rtol=1e-10)
    np.testing.assert_allclose(isc(np.repeat(y[:1], 4, axis=0)), 1, rtol=1e-12)
    assert np.isnan(isc(np.ones((3, 1, 50))))[0]


def test_isc_by_time_follows_the_stimulus():
    y = np.random.default_rng(0).standard_normal((6, 1, 3000))
    y[:, :, 1000:2000] += 2 * np.random.default_rng(1).standard_normal(1000)
    by_time = isc_by_time(y, 500, 250)
    assert by_time.shape == (1, 11)
    assert by_time[0, 4:7].min() > 0.7 and abs(by_time[0, [0, 1, 2, 8, 9, 10]]).max() < 0.1
    np.testing.assert_allclose(by_time[:, 3], isc(y[:, :, 750:1250]))


def test_isc_by_lag_against_a_loop():
    y = shared_and_own(4, 2, 300, [1.5])[0]
    y[1] = np.roll(y[1], 3, axis=1)  # one of them sees it late
    by_lag = isc_by_lag(y, 10)
    assert by_lag.shape == (2, 21)
    y_0 = y - y.mean(2, keepdims=True)
    own = (y_0**2).sum((0, 2)) / 300
    for lag in (-10, -3, 0, 1, 7):
        late, early = (
            (y_0[:, :, lag:], y_0[:, :, : 300 - lag]) if lag >= 0 else (y_0[:, :, : 300 + lag], y_0[:, :, -lag:])
        )
        total = sum((late[i] * early[j]).sum(1) for i, j in itertools.permutations(range(4), 2))
        np.testing.assert_allclose(by_lag[:, 10 + lag], total / (300 - abs(lag)) / 12 / own * 4, rtol=1e-8)
    np.testing.assert_allclose(by_lag[:, 10], isc(y), rtol=1e-10)
    np.testing.assert_allclose(by_lag, by_lag[:, ::-1], rtol=1e-8)


def test_null_is_the_isc_of_shifted_time_courses():
    y = shared_and_own(4, 2, 101, [1.0])[0]
    null, p = isc_null(y, np.random.default_rng(5), 3)
    rng = np.random.default_rng(5)
    for n in range(3):
        by = rng.integers(0, 101, 4)
        np.testing.assert_allclose(null[n], isc(np.stack([np.roll(a, b, axis=1) for a, b in zip(y, by, strict=True)])))
    assert p.shape == (2,) and (p >= 0.25).all()
    even = y[:, :, :100]
    by = np.random.default_rng(6).integers(0, 100, 4)
    null, _ = isc_null(even, np.random.default_rng(6), 1)
    np.testing.assert_allclose(null[0], isc(np.stack([np.roll(a, b, axis=1) for a, b in zip(even, by, strict=True)])))


def test_null_finds_what_is_there_and_keeps_its_level():
    rng = np.random.default_rng(0)
    slow = np.cumsum(rng.standard_normal((120, 5, 1, 200)), axis=3)  # slow drifts correlate by chance
    slow = slow - slow.mean(3, keepdims=True)
    p = [isc_null(y, np.random.default_rng(i), 99)[1][0] for i, y in enumerate(slow)]
    assert 0.01 < np.mean(np.array(p) <= 0.05) < 0.12  # about 0.05 although no two samples are independent
    assert 0.4 < np.mean(p) < 0.6
    shared = rng.standard_normal((5, 1, 400)) + rng.standard_normal(400)
    null, p = isc_null(shared, rng, 400)
    assert p[0] == pytest.approx(1 / 401) and np.quantile(null, 0.99) < isc(shared)[0] / 3


# ----------------------------------------------------------------------------
# retrieval


def test_retrieval_by_hand():
    eye = np.eye(3)
    query = np.stack([eye, eye[[0, 2, 1]]])  # the second takes moments 1 and 2 for each other
    found = retrieval(query, gallery_GMD=np.stack([eye, 2 * eye]), top=2)
    assert found["top1"] == pytest.approx(4 / 6) and found["top1_chance"] == pytest.approx(1 / 3)
    assert found["top2_chance"] == pytest.approx(2 / 3)
    ours = retrieval(np.stack([eye, eye]), top=1)
    assert ours["top1"] == 1


@given(st.integers(2, 5), st.integers(2, 9), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_retrieval_against_a_loop(subjects, moments, seed, own_gallery):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((subjects, moments, 4))
    query[rng.random((subjects, moments)) < 0.2] = np.nan
    gallery = None if own_gallery else rng.standard_normal((3, moments, 4))
    first = asked = 0
    chance = []
    for s in range(subjects):
        others = np.delete(query, s, 0) if own_gallery else gallery
        others = others / np.linalg.norm(others, axis=2, keepdims=True)
        keys = {m: np.nanmean(others[:, m], 0) for m in range(moments) if np.isfinite(others[:, m]).all(1).any()}
        for m in range(moments):
            if np.isfinite(query[s, m]).all() and m in keys and len(keys) > 1:
                score = {k: query[s, m] @ v / np.linalg.norm(v) for k, v in keys.items()}
                first += max(score, key=score.get) == m
                asked += 1
                chance.append(1 / len(keys))
    found = retrieval(query, gallery)
    if asked:
        assert found["top1"] == pytest.approx(first / asked) and found["top1_chance"] == pytest.approx(np.mean(chance))
    else:
        assert math.isnan(found["top1"])


def test_retrieval_is_at_chance_without_anything_shared_and_when_all_is_alike():
    found = retrieval(np.random.default_rng(0).standard_normal((40, 50, 8)))
    assert found["top1"] == pytest.approx(0.02, abs=0.012) and found["top5"] == pytest.approx(0.1, abs=0.025)
    collapsed = retrieval(np.ones((6, 20, 3)))
    assert collapsed["top1"] == 0 and collapsed["top5"] == 0  # a constant knows nothing


# ----------------------------------------------------------------------------
# who and what


def people(identity: float, stimulus: float, seed: int = 0):
    """Features of 8 subjects, 3 recordings each (one per film), 10 windows per recording."""
    rng = np.random.default_rng(seed)
    subject, film = (a.ravel() for a in np.meshgrid(np.arange(8), np.arange(3), indexing="ij"))
    subject, film, recording = (np.repeat(a, 10) for a in (subject, film, np.arange(24)))
    z = identity * rng.standard_normal((8, 16))[subject] + stimulus * rng.standard_normal((3, 16))[film]
    return z + rng.standard_normal((240, 16)), subject, film, recording


def test_people_and_films_are_told_by_their_nearest():
    z, subject, film, recording = people(3.0, 0.0)
    who, chance = nearest_alike(z, subject, recording)
    assert who > 0.95 and chance == pytest.approx(20 / 230)
    z, subject, film, recording = people(0.0, 3.0)
    assert nearest_alike(z, subject, recording)[0] < 0.2
    what, chance = nearest_alike(z, film, subject)
    assert what > 0.95 and chance == pytest.approx(70 / 210)
    z, subject, film, recording = people(0.0, 0.0)
    assert nearest_alike(z, film, subject)[0] == pytest.approx(1 / 3, abs=0.1)
    assert nearest_alike(z, subject, recording)[0] == pytest.approx(20 / 230, abs=0.07)


def test_nearest_alike_against_a_loop_and_in_blocks():
    z, subject, film, recording = people(0.7, 0.7)
    keep = (film < 2) | (subject < 4)  # some have nobody to be found by
    keep &= ~((subject == 7) & (film == 1))  # subject 7 has one recording left
    z, subject, recording = z[keep], subject[keep], recording[keep]
    unit = z - z.mean(0)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    right, chance = [], []
    for i in range(len(z)):
        other = np.flatnonzero(recording != recording[i])
        if (subject[other] == subject[i]).any():
            right.append(subject[other[(unit[other] @ unit[i]).argmax()]] == subject[i])
            chance.append((subject[other] == subject[i]).mean())
    assert 0 < len(right) < len(z)
    for block in (1024, 17):
        who, guess = nearest_alike(z, subject, recording, block)
        assert who == pytest.approx(np.mean(right)) and guess == pytest.approx(np.mean(chance))


def test_nobody_to_be_found():
    assert all(math.isnan(v) for v in nearest_alike(np.eye(3), np.arange(3), np.arange(3)))
