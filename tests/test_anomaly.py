"""
Anomaly scores: exact flows of Gaussian worlds, planted anomalies, standard errors that fall as they must, and verdicts that don't flatter.

Shape letters: N windows, C channels, L samples.
"""

import numpy as np
import pytest
import torch

from lib import anomaly
from lib.flow import log_likelihood

L, RATE_HZ = 64, 1000.0


def gaussian_velocity(variance_L: np.ndarray):
    """The exact velocity of independent Gaussian samples: v = (t s² − (1 − t)) / (t² s² + (1 − t)²) x."""

    def velocity(x_NCL, t: float):
        var = variance_L if isinstance(x_NCL, np.ndarray) else torch.from_numpy(variance_L)
        return (t * var - (1 - t)) / (t**2 * var + (1 - t) ** 2) * x_NCL

    return velocity


def encoder(variance_L: np.ndarray, seed: int = 0):
    def encode(x_NCL: np.ndarray, probes: int):
        z, log_p_N, error_N = log_likelihood(gaussian_velocity(variance_L), torch.from_numpy(x_NCL), 64, probes, seed)
        return z.numpy(), -log_p_N.numpy(), error_N.numpy()

    return encode


@pytest.fixture(scope="module")
def world():
    """Healthy windows of a coloured Gaussian, others of it, and ones with a loud upper half."""
    rng = np.random.default_rng(0)
    variance_L = np.linspace(0.2, 2, L)
    draw = lambda n, gain=1.0: (rng.standard_normal((n, 1, L)) * np.sqrt(variance_L) * gain).astype(np.float32)  # noqa: E731
    strange = draw(60)
    strange[:, :, L // 2 :] *= 2
    return variance_L, draw(200), draw(100), np.concatenate([draw(60), strange])


def test_the_likelihood_is_that_of_the_gaussian(world):
    variance_L, _, reference, test = world
    scores = anomaly.likelihood_scores(encoder(variance_L), reference, test, probes=8)
    nats_N = 0.5 * (test[:, 0] ** 2 / variance_L + np.log(2 * np.pi * variance_L)).mean(1)
    score = scores["−log p"]
    np.testing.assert_allclose(score.value_N, nats_N, atol=1e-2)
    assert np.all(np.abs(score.value_N - nats_N) <= 3 * score.error_N + 5e-3)
    z_N = np.sqrt((test[:, 0] ** 2 / variance_L).sum(1))
    np.testing.assert_allclose(scores["length of the noise"].value_N, z_N, rtol=0.02)
    usual = np.median(anomaly.likelihood_scores(encoder(variance_L), reference, reference)["−log p"].value_N)
    assert np.allclose(scores["typicality"].value_N, np.abs(score.value_N - usual), atol=1e-2)


def test_standard_errors_fall_with_the_square_root_of_draws():
    """A velocity that mixes samples: a diagonal one has no variance of its divergence."""
    rng = np.random.default_rng(1)
    mix_LL = torch.from_numpy(rng.standard_normal((L, L)) / L)
    x_NCL = torch.from_numpy(rng.standard_normal((4, 1, L)))
    errors = [log_likelihood(lambda x, t: x @ mix_LL, x_NCL, 4, probes, 3)[2].mean() for probes in (8, 128)]
    assert 0.15 < errors[1] / errors[0] < 0.4  # 0.25

    velocity = lambda x_NCL, t: 0.1 * x_NCL  # noqa: E731
    test = rng.standard_normal((30, 1, L)).astype(np.float32)
    few, many = (anomaly.residual_score(velocity, test, test, noises=n).error_N.mean() for n in (4, 64))
    assert 0.15 < many / few < 0.4


def test_planted_anomalies_are_found_by_every_score_but_the_blind_ones(world):
    variance_L, healthy, reference, test = world
    strange_N = np.repeat([False, True], 60)
    scores = anomaly.plain_scores(healthy, test, RATE_HZ)
    scores["residual"] = anomaly.residual_score(gaussian_velocity(variance_L), reference, test)
    scores |= anomaly.likelihood_scores(encoder(variance_L), reference, test)
    scores["5-NN of features"] = anomaly.feature_score(np.abs(healthy[:, 0]), np.abs(test[:, 0]))
    rows = anomaly.table(scores, strange_N, np.arange(120) // 5)
    assert rows[anomaly.BASELINE]["gain"] == 0 and rows[anomaly.BASELINE]["error"] == 0
    for name in ("residual", "−log p", "length of the noise", "RMS", "5-NN of features"):
        assert rows[name]["auroc"] > 0.9 and rows[name]["low"] <= rows[name]["auroc"] <= rows[name]["high"], name
    again = anomaly.residual_score(gaussian_velocity(variance_L), reference, test[:7])
    np.testing.assert_allclose(
        again.value_N, scores["residual"].value_N[:7], rtol=1e-5
    )  # common noise: no window matters to others


def test_mahalanobis_and_neighbours_against_plain_ones():
    rng = np.random.default_rng(2)
    fitted, own = rng.standard_normal((400, 3)) * [1, 2, 3], rng.standard_normal((20, 3))
    distance = np.sort(np.linalg.norm(own[:, None] - fitted, axis=2), 1)[:, 4]
    np.testing.assert_allclose(anomaly.neighbours(fitted, own), distance)
    gap = own - fitted.mean(0)
    plain = np.sqrt(np.einsum("nf,fg,ng->n", gap, np.linalg.inv(np.cov(fitted.T)), gap))
    np.testing.assert_allclose(anomaly.mahalanobis(fitted, own), plain, rtol=0.05)


def test_the_default_is_what_wins_by_interval():
    def task(gain: float, low: float) -> dict:
        rows = {anomaly.BASELINE: {"gain_low": 0.0}, "RMS": {"gain_low": -0.4}}
        return rows | {"residual": {"gain": gain, "gain_low": low}}

    won = {f"task {i}": task(0.1, 0.02 if i < 3 else -0.1) for i in range(5)}
    name, words = anomaly.verdict(won)
    assert name == "residual" and "in 3 of 5" in words
    lost = won | {"task 0": task(0.1, -0.01)}
    name, words = anomaly.verdict(lost)
    assert name == anomaly.BASELINE and words.startswith("no score is above")
