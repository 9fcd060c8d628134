"""Scores against golden values, scikit-learn and their definitions; intervals against known sampling distributions."""

import math

import numpy as np
import pytest
from sklearn import metrics

from lib import scores


def test_nrmse_divides_by_the_deviation_not_by_the_range():
    y_B, guess_B = np.array([0.0, 0, 0, 0, 10]), np.array([1.0, 1, 1, 1, 9])
    assert scores.nrmse(y_B, guess_B) == 0.25  # RMSE 1, std 4; over the range of 10 it would be 0.1
    assert scores.nrmse(y_B, np.full(5, y_B.mean())) == 1
    assert scores.challenge_score(0.9, 1.0) == pytest.approx(0.97)
    # the EEG Challenge 2025's winner, from its two published parts
    assert scores.challenge_score(0.91316, 0.98519) == pytest.approx(0.96358, abs=5e-4)


def test_regression_scores_against_their_definitions():
    rng = np.random.default_rng(0)
    y_B = rng.standard_normal(200) * 3 + 1
    guess_B = 0.7 * y_B + rng.standard_normal(200) + 0.5
    found = scores.regression_scores(y_B, guess_B)
    assert found["r2"] == pytest.approx(metrics.r2_score(y_B, guess_B))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(y_B, guess_B))
    assert found["pearson_r"] == pytest.approx(np.corrcoef(y_B, guess_B)[0, 1])
    assert scores.regression_scores(y_B, y_B)["concordance"] == pytest.approx(1)
    assert scores.regression_scores(y_B, y_B + 1)["concordance"] == pytest.approx(2 * y_B.var() / (2 * y_B.var() + 1))
    assert math.isnan(scores.regression_scores(y_B, np.ones(200))["pearson_r"])


@pytest.mark.parametrize("classes", [2, 4])
def test_classification_scores_against_sklearn(classes):
    rng = np.random.default_rng(1)
    y_B = rng.integers(classes, size=300)
    probability_BK = rng.dirichlet(np.ones(classes), 300) + 0.5 * np.eye(classes)[y_B]
    probability_BK /= probability_BK.sum(1, keepdims=True)
    found, guess_B = scores.classification_scores(y_B, probability_BK), probability_BK.argmax(1)
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(y_B, guess_B))
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(y_B, guess_B))
    if classes == 2:
        assert found["auroc"] == pytest.approx(metrics.roc_auc_score(y_B, probability_BK[:, 1]))
        assert found["f1"] == pytest.approx(metrics.f1_score(y_B, guess_B))
    else:
        assert found["auroc"] == pytest.approx(metrics.roc_auc_score(y_B, probability_BK, multi_class="ovr"))
        assert found["f1"] == pytest.approx(metrics.f1_score(y_B, guess_B, average="macro"))


def test_a_class_that_does_not_occur_is_left_out():
    y_B, probability_BK = np.array([0, 0, 2, 2]), np.array([[0.8, 0.1, 0.1]] * 3 + [[0.1, 0.2, 0.7]])
    found = scores.classification_scores(y_B, probability_BK)
    assert found["balanced_accuracy"] == 0.75 and np.isfinite(found["auroc"])
    one = scores.classification_scores(np.zeros(3, int), np.array([[0.9, 0.1]] * 3))
    assert one["accuracy"] == 1 and math.isnan(one["auroc"]) and math.isnan(one["kappa"])


def test_calibration_error_by_hand():
    probability_BK = np.array([[0.75, 0.25]] * 4)
    assert scores.calibration_error(np.array([0, 0, 0, 1]), probability_BK) == pytest.approx(0)
    assert scores.calibration_error(np.array([0, 1, 1, 1]), probability_BK) == pytest.approx(0.5)


def test_intervals_cover_what_they_should_when_windows_of_a_subject_are_alike():
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        person_S = rng.standard_normal(40)
        subject_B = np.repeat(np.arange(40), 20)
        y_B = person_S[subject_B] + 0.1 * rng.standard_normal(800)
        value, low, high = scores.subject_bootstrap(lambda y: {"mean": y.mean()}, subject_B, y_B, resamples=200)["mean"]
        assert low < value < high
        covered += low < 0 < high
    assert covered >= 51  # of 60 at 95 %; taking windows for independent gives about 20


def test_bootstrap_says_nothing_about_one_subject():
    y_B = np.arange(10.0)
    value, low, high = scores.subject_bootstrap(lambda y: {"m": y.mean()}, np.zeros(10), y_B)["m"]
    assert value == 4.5 and math.isnan(low) and math.isnan(high)
