"""Numbers of a representation: known ranks and variance shares are found again, collapse is told from health."""

import math

import numpy as np
import pytest
import torch

from lib.metrics import collapsed, effective_rank, feature_std, variance_shares

HEALTHY = {"feature_rank": 15.2, "feature_std": 0.27}


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_features_in_a_subspace(rank):
    g = torch.Generator().manual_seed(0)
    basis_DD = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64))[0]
    z_BR = torch.linalg.qr(torch.randn(400, rank, generator=g, dtype=torch.float64))[0]
    z_BR -= z_BR.mean(0)
    assert effective_rank(z_BR @ basis_DD[:rank] + 5) == pytest.approx(rank, rel=0.02)


def test_features_of_a_diverged_encoder_are_an_alarm_and_no_error():
    z_BD = torch.full((8, 4), torch.inf)
    values = {"feature_rank": effective_rank(z_BD), "feature_std": feature_std(z_BD)}
    assert collapsed(values, HEALTHY) == "features are not finite"


def test_feature_std_is_one_minus_the_cosine_between_windows():
    g = torch.Generator().manual_seed(0)
    for spread in (0.01, 0.1, 1.0):
        z_BD = 1 + spread * torch.randn(200, 32, generator=g, dtype=torch.float64)
        unit_BD = torch.nn.functional.normalize(z_BD, dim=1)
        cosine = (float(unit_BD.sum(0).square().sum()) - 200) / (200 * 199)
        assert feature_std(z_BD) ** 2 == pytest.approx(1 - cosine, rel=0.05)
    assert feature_std(torch.ones(9, 4)) < 1e-7


def test_the_alarm_names_what_fell():
    assert collapsed(HEALTHY, HEALTHY) is None
    assert collapsed({"feature_rank": 9.0, "feature_std": 0.14}, HEALTHY) is None  # half of it is learning
    assert "feature_rank fell" in collapsed(HEALTHY | {"feature_rank": 3.0}, HEALTHY)
    assert "feature_std fell" in collapsed(HEALTHY | {"feature_std": 0.07}, HEALTHY)
    assert "look alike" in collapsed(HEALTHY | {"feature_std": 0.01}, HEALTHY)
    assert "look alike" in collapsed(HEALTHY | {"feature_std": 0.01}, HEALTHY | {"feature_std": 0.01})  # it began so
    assert "finite" in collapsed(HEALTHY | {"feature_rank": math.nan}, HEALTHY)
    assert collapsed(HEALTHY | {"feature_rank": 5.0}, HEALTHY, floor=0.5) and not collapsed(HEALTHY, HEALTHY, floor=0)


def components(seed: int, subject_sd: float, stimulus_sd: float, windows: int = 500):
    """Features with known variance components, unequal numbers of windows per cell, and their labels."""
    rng = np.random.default_rng(seed)
    subject_B = rng.integers(0, 30, windows)
    stimulus_B = np.where(rng.random(windows) < 0.4, rng.integers(0, 3, windows), rng.integers(0, 20, windows))
    z_BD = subject_sd * rng.standard_normal((30, 8))[subject_B] + stimulus_sd * rng.standard_normal((20, 8))[stimulus_B]
    return torch.tensor(z_BD + rng.standard_normal((windows, 8))), subject_B, stimulus_B, rng


@pytest.mark.parametrize("subject_sd, stimulus_sd", [(0, 0), (1, 0), (0, 0.5), (1, 0.5), (2, 1)])
def test_known_variance_shares_are_recovered(subject_sd, stimulus_sd):
    found = []
    for seed in range(20):
        z_BD, subject_B, stimulus_B, _ = components(seed, subject_sd, stimulus_sd)
        found.append(variance_shares(z_BD, subject_B.tolist(), [f"movie {s}" for s in stimulus_B]))
    s, m = subject_sd**2, stimulus_sd**2
    assert np.mean(found, 0) == pytest.approx([s / (s + m + 1), m / (m + 1)], abs=0.02)


def test_labels_that_mean_nothing_get_no_share():
    found = []
    for seed in range(40):
        z_BD, subject_B, stimulus_B, rng = components(seed, 1, 0.5)
        found.append(variance_shares(z_BD, rng.permutation(subject_B).tolist(), rng.permutation(stimulus_B).tolist()))
    assert np.abs(np.mean(found, 0)).max() < 0.003 and np.abs(found).max() < 0.04


def test_shares_ignore_scale_rotation_order_and_unlabelled_windows():
    z_BD, subject_B, stimulus_B, rng = components(0, 1, 0.5)
    shares = variance_shares(z_BD, subject_B.tolist(), stimulus_B.tolist())
    turn_DD = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    order = rng.permutation(len(z_BD))
    again = variance_shares(100 + 3 * z_BD[order] @ turn_DD, subject_B[order].tolist(), stimulus_B[order].tolist())
    assert again == pytest.approx(shares)
    more_BD = torch.cat([z_BD, 1e3 * torch.ones(5, 8)])
    assert variance_shares(more_BD, [*subject_B, *[None] * 5], [*stimulus_B, *[0] * 5]) == pytest.approx(shares)
    half = [None if i % 2 else s for i, s in enumerate(stimulus_B)]
    assert variance_shares(z_BD, subject_B, half)[0] == shares[0]
    assert variance_shares(z_BD, subject_B, half)[1] == variance_shares(z_BD[::2], subject_B[::2], half[::2])[1]


def test_shares_that_the_labels_can_not_tell_are_nan():
    z_BD = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    one, own = [0] * 12, list(range(12))
    halves = [i // 6 for i in range(12)]
    assert np.isnan(variance_shares(z_BD, one, one)).all()  # nothing varies
    assert np.isnan(variance_shares(z_BD, own, own)).all()  # a window per subject: no residual
    assert np.isnan(variance_shares(z_BD, [None] * 12, [None] * 12)).all()
    subject, stimulus = variance_shares(z_BD, halves, halves)  # each subject saw its own stimulus
    assert math.isfinite(subject) and math.isnan(stimulus)
    assert np.isnan(variance_shares(torch.ones(12, 3), halves, [i % 2 for i in range(12)])).all()  # no variance at all
