"""The linear probe: honest about subjects, equal to the textbook models it is faster than, at chance where there is nothing."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib import probe as module
from lib.cache import Cache
from lib.probe import (
    Label,
    Probe,
    band_power,
    by_label,
    covering_events,
    judge,
    logistic,
    project,
    recentre,
    ridge,
    stimuli,
    varies_within,
)
from tests import recipes

VAL = [f"{s:02d}" for s in range(0, 24, 3)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    """24 people, 8 of them in val, at rest (10 Hz over the back of the head) and at a task; something to `look` at from 2 to 5 s."""
    folder = tmp_path_factory.mktemp("probe")
    recipes.write_small(folder / "raw", subjects=24, seconds=10)
    (folder / "raw" / "dataset.toml").write_text(recipes.RULE + f"[split]\ntest = ['01']\nval = {VAL}\n")
    status, _, err = recipes.run("--source", folder / "raw", "--cache", folder / "cache", "--workers", 1)
    assert status == 0, err
    return Cache(folder / "cache")


@pytest.fixture(scope="module")
def probe(cache) -> Probe:
    return Probe(cache, 1.0, 0.5, 400)


def spectra(batch) -> torch.Tensor:
    """Log amplitude spectra of half seconds, as features of (channel, time) tokens."""
    return torch.fft.rfft(batch.x_BCT.unflatten(2, (-1, 50))).abs().log1p()[..., 1:16].flatten(1, 2)


def test_scores_stand_beside_their_baselines(probe):
    scores = probe.score(spectra)
    of_classes = {f"probe_{c}{s}" for c in ("condition", "sex") for s in ("", "_auroc")} | {"probe_condition_recentred"}
    expected = of_classes | {"probe_age"}
    expected |= {f"{name}_bandpower" for name in expected} | {f"probe_{c}_chance" for c in ("condition", "sex", "age")}
    assert scores.keys() == expected
    for name in ("probe_condition", "probe_condition_auroc", "probe_condition_recentred"):
        assert scores[name] > 0.9 and scores[f"{name}_bandpower"] > 0.8
    assert scores["probe_condition_chance"] == scores["probe_sex_chance"] == 0.5 and scores["probe_age_chance"] == 0
    assert abs(scores["probe_sex_auroc"] - 0.5) < 0.3 and scores["probe_age"] < 0.3  # there is nothing to be found
    assert probe.score(spectra) == scores


def test_subjects_of_val_are_scored_if_there_are_enough(probe, cache, monkeypatch):
    assert probe.protocol["sex"] == "fitted on 15 subjects of train, scored on 8 of val"
    assert not {cache.recordings[i].split for i in probe.row} - {"train", "val"}
    monkeypatch.setattr(module, "FEWEST_SUBJECTS", 9)
    crossed = Probe(cache, 1.0, 0.5, 400)
    assert (
        crossed.protocol["sex"].startswith("cross-validated over 23 subjects")
        and "15 of them" in crossed.protocol["sex"]
    )
    assert crossed.score(spectra)["probe_condition"] > 0.9 and "can't tell" not in crossed.protocol["sex"]
    monkeypatch.setattr(module, "TELLING_SUBJECTS", 24)
    assert (
        Probe(cache, 1.0, 0.5, 400).protocol["sex"].endswith("can't tell: by chance alone an AUROC can be near 0 or 1")
    )


def test_windows_are_spread_evenly_and_no_more_than_asked_for(cache):
    for windows in (46, 400, 1000):
        probe = Probe(cache, 1.0, 0.5, windows)
        counts = np.bincount(probe.row)
        assert windows / 1.5 < len(probe.ids) <= windows or len(probe.ids) == len(probe.windows)
        assert len(set(probe.ids.tolist())) == len(probe.ids) and np.ptp(counts[counts > 0]) == 0
    assert len(Probe(cache, 1.0, 0.5, 10).ids) == 10


def test_auxiliary_targets_are_left_out_and_that_is_said(cache):
    probe = Probe(cache, 1.0, 0.5, 200, leave_out=["age", "handedness"])
    assert not any(name.startswith("probe_age") for name in probe.score(spectra))
    assert probe.protocol["age"] == "left out: it was an auxiliary target" and "handedness" not in probe.protocol


def test_auxiliary_targets_are_found_whatever_their_case(cache):
    probe = Probe(cache, 1.0, 0.5, 200, leave_out=["AGE"])
    assert "left out" in probe.protocol["age"] and not any(k.startswith("probe_age") for k in probe.score(spectra))


def test_labels_beyond_the_most_are_named(cache, monkeypatch):
    monkeypatch.setattr(module, "MOST_LABELS", 1)
    for left_out, kept in (((), "age"), (("age",), "condition")):
        probe = Probe(cache, 1.0, 0.5, 200, leave_out=left_out)
        assert [label.name for label in probe.labels] == [kept]
        assert probe.protocol["sex"] == "left out: there are more than 1 labels"


def test_features_that_are_all_the_same_say_nothing():
    x_BF = np.ones((12, 40))
    assert not project(x_BF, np.arange(12) < 8).any()
    x_BF[8:] = np.random.default_rng(0).standard_normal((4, 40))
    assert project(x_BF, np.arange(12) < 8).shape == (12, 1)


@pytest.mark.parametrize(
    "samples, rate_hz, bands", [(400, 100.0, 5), (25, 100.0, 4), (240, 12000.0, 5), (2, 12000.0, 2)]
)
def test_band_power_of_short_windows(samples, rate_hz, bands):
    power_BCF = band_power(torch.randn(3, 2, samples), rate_hz)
    assert power_BCF.shape == (3, 2, bands) and power_BCF.isfinite().all()


def test_labels_that_chose_training_pairs_are_scored_on_val_alone(cache, monkeypatch):
    probe = Probe(cache, 1.0, 0.5, 200, paired=["condition"])
    assert probe.protocol["condition"].startswith("fitted on") and "probe_condition" in probe.score(spectra)
    monkeypatch.setattr(module, "FEWEST_SUBJECTS", 9)
    crossed = Probe(cache, 1.0, 0.5, 200, paired=["condition"])
    assert crossed.protocol["condition"].startswith("left out: training pairs") and "probe_sex" in crossed.score(
        spectra
    )
    assert not any(name.startswith("probe_condition") for name in crossed.score(spectra))


def test_features_that_are_not_finite_have_no_score(cache):
    probe = Probe(cache, 1.0, 0.5, 200)
    said = probe.score(lambda batch: spectra(batch) * torch.nan)
    assert "probe_sex" not in said and "probe_sex_bandpower" in said


def test_channels_are_thinned_alike(cache):
    seen = []

    def encode(batch) -> torch.Tensor:
        seen.append((batch.x_BCT.shape[1], batch.positions_BC3[0]))
        return spectra(batch)

    Probe(cache, 1.0, 0.5, 100, max_channels=3).score(encode)
    assert {channels for channels, _ in seen} == {3}
    assert all(torch.equal(positions, seen[0][1]) for _, positions in seen)


def test_recentring_takes_away_who_it_is(probe, cache):
    offset_R = 30 * torch.randn(
        len({r.subject for r in cache.recordings}), 15, generator=torch.Generator().manual_seed(0)
    )
    number = {s: i for i, s in enumerate(sorted({r.subject for r in cache.recordings}))}

    def encode(batch) -> torch.Tensor:
        who = [number[cache.recordings[i].subject] for i in batch.recording_B.tolist()]
        return spectra(batch) + offset_R[who][:, None]

    scores = probe.score(encode)
    assert scores["probe_condition_recentred"] > 0.9 > scores["probe_condition"]
    assert scores["probe_condition_recentred"] == pytest.approx(
        probe.score(spectra)["probe_condition_recentred"], abs=0.01
    )


def test_labels_without_meaning_score_chance(probe):
    rng = np.random.default_rng(0)
    (condition,) = (label for label in probe.labels if label.name == "condition")
    x_BF = rng.standard_normal((len(probe.ids), 40)) + condition.y_B[:, None]
    assert probe._fit(x_BF, [condition])[0][1][0] > 0.95
    found = []
    for _ in range(12):
        shuffled = Label("condition", condition.classes, rng.permutation(condition.values).tolist())
        found.append(probe._fit(x_BF, [shuffled])[0][1])
    assert np.abs(np.mean(found, 0) - 0.5).max() < 0.03


# the linear models


def wide(windows: int = 120, features: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """More features than windows, of unequal size; three classes that some of them tell, and which windows are fitted."""
    rng = np.random.default_rng(0)
    y_B = rng.integers(0, 3, windows)
    x_BF = rng.standard_normal((windows, features)) * np.geomspace(0.1, 10, features) + 5
    x_BF[:, :30] += y_B[:, None] * x_BF[:, :30].std(0)
    return x_BF.astype(np.float32), y_B, np.arange(windows) % 3 > 0


def test_projection_changes_no_answer():
    x_BF, y_B, fit_B = wide()
    z_BF = project(x_BF, fit_B)
    assert z_BF.shape[1] < fit_B.sum() < x_BF.shape[1]
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", tol=1e-8))
    expected_BK = reference.fit(x_BF[fit_B].astype(float), y_B[fit_B]).predict_proba(x_BF[~fit_B].astype(float))
    assert logistic(z_BF[fit_B], y_B[fit_B], z_BF[~fit_B], 3) == pytest.approx(expected_BK, abs=2e-3)
    narrow_BF = project(x_BF[:, :20], fit_B)
    assert narrow_BF == pytest.approx(StandardScaler().fit(x_BF[fit_B, :20]).transform(x_BF[:, :20]), abs=1e-4)
    constant_BF = np.concatenate([x_BF[:, :5], np.full((len(x_BF), 1), 7.3, np.float32)], 1)
    assert np.abs(project(constant_BF, fit_B)[:, 5]).max() < 1e-4


@pytest.mark.parametrize("features", [12, 400])
def test_ridge_is_that_of_scikit_learn(features):
    x_BF, y_B, fit_B = wide(features=features)
    rng = np.random.default_rng(1)
    y_BL = np.stack([y_B + 0.3 * rng.standard_normal(len(y_B)), 40 + 10 * rng.standard_normal(len(y_B))], 1)
    z_BF = project(x_BF, fit_B)
    reference = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11), alpha_per_target=True))
    expected_BL = reference.fit(x_BF[fit_B].astype(float), y_BL[fit_B]).predict(x_BF[~fit_B].astype(float))
    assert ridge(z_BF[fit_B], y_BL[fit_B], z_BF[~fit_B]) == pytest.approx(expected_BL, rel=1e-3)


def test_directions_of_some_windows_stand_for_all(monkeypatch):
    x_BF, y_B, fit_B = wide(600, 700)
    exact = judge(logistic(*_parts(x_BF, y_B, fit_B), 3), y_B[~fit_B], 3)
    monkeypatch.setattr(module, "DIRECTIONS", 200)
    assert project(x_BF, fit_B).shape[1] <= 200
    assert np.min(np.subtract(judge(logistic(*_parts(x_BF, y_B, fit_B), 3), y_B[~fit_B], 3), exact)) > -0.05


def _parts(x_BF, y_B, fit_B):
    z_BF = project(x_BF, fit_B)
    return z_BF[fit_B], y_B[fit_B], z_BF[~fit_B]


def test_judgement():
    rng = np.random.default_rng(0)
    y_B, said_BK = rng.integers(0, 3, 90), rng.dirichlet(np.ones(3), 90)
    right, auroc = judge(said_BK, y_B, 3)
    assert auroc == pytest.approx(roc_auc_score(y_B, said_BK, multi_class="ovr", average="macro"))
    assert right == pytest.approx(np.mean([(said_BK[y_B == k].argmax(1) == k).mean() for k in range(3)]))
    assert judge(np.eye(3)[y_B], y_B, 3) == (1, 1) and judge(y_B[:, None] * 1.0, y_B, 0) == (1,)
    assert judge(np.full((90, 1), y_B.mean()), y_B, 0) == pytest.approx((0,))
    assert np.isnan(judge(said_BK, 0 * y_B, 3)).all() and np.isnan(judge(said_BK[:0], y_B[:0], 3)).all()
    assert np.isnan(logistic(said_BK, 0 * y_B, said_BK, 3)).all()


def test_recentring_needs_no_label():
    x_BF, subject_B = np.random.default_rng(0).standard_normal((30, 4)), np.arange(30) % 3
    centred_BF = recentre(x_BF, subject_B)
    assert all(np.abs(centred_BF[subject_B == s].mean(0)).max() < 1e-12 for s in range(3))
    label = Label("state", ["a", "b"], ["ab"[i // 3 % 2] for i in range(30)])
    assert varies_within(label, subject_B) and not varies_within(
        Label("sex", ["a", "b"], ["ab"[i % 3 % 2] for i in range(30)]), subject_B
    )


# what goes on in a window


def test_the_event_that_covers_a_window(cache, monkeypatch):
    windows = cache.windows("val", 1.0, 0.5)
    ids = np.arange(len(windows))
    start_s = windows.locate(ids)[1] / cache.rate_hz
    inside = (start_s >= 2) & (start_s <= 4)
    kinds, since_s = covering_events(windows, ids)
    assert [kind == "look" for kind in kinds] == inside.tolist() and inside.any()
    assert since_s[inside] == pytest.approx(start_s[inside] - 2) and np.isnan(since_s[~inside]).all()
    some = ids[3::7]
    assert covering_events(windows, some)[0] == [kinds[i] for i in some]
    names = stimuli(windows, ids)
    assert {names[i] for i in ids[inside]} == {"look 0"} and {names[i] for i in ids[~inside]} == {None}
    monkeypatch.setattr(module, "BIN_S", 1.0)
    assert [n for n in stimuli(windows, ids[inside])] == [f"look {int(s - 2)}" for s in start_s[inside]]


def test_scores_are_told_by_label():
    scores = {"probe_age": 0.1, "probe_age_chance": 0.0, "probe_age_group_auroc_bandpower": 0.6}
    scores |= {"probe_age_untrained": 0.2, "probe_age_group_bandpower": 0.5, "probe_age_group_recentred": 0.7}
    assert by_label(scores, {"age_group": "on val", "age": "crossed", "sex": "left out"}) == {
        "age": {"chance": 0.0, "score": 0.1, "score_untrained": 0.2, "protocol": "crossed"},
        "age_group": {"auroc_bandpower": 0.6, "recentred": 0.7, "score_bandpower": 0.5, "protocol": "on val"},
        "sex": {"protocol": "left out"},
    }
