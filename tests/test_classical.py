"""Classical baselines: each finds what it is made for, and is the same after a trip through a model's file."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from lib import classical
from lib.cache import Cache
from lib.channels import POSITIONS, TEN_TWENTY
from lib.classical import Sites
from lib.edf import write_edf
from lib.targets import Examples, read_targets
from tests import recipes, task_cases

RATE_HZ = 100.0


def noise(seed: int, windows: int = 200, sites: int = 4, samples: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((windows, sites, samples))


def accuracy(x_BF: np.ndarray, y_B: np.ndarray) -> float:
    """Of a linear model fitted on the first half of the windows, on the others; ten subjects."""
    half, subject_B = len(y_B) // 2, np.arange(len(y_B)) % 10
    linear = classical.fit_linear(x_BF[:half], y_B[:half], subject_B[:half], 2)
    return float((linear(x_BF[half:]).argmax(1) == y_B[half:]).mean())


def test_each_kind_of_feature_finds_what_it_is_made_for():
    t, y_B, rng = np.arange(400) / RATE_HZ, np.arange(200) % 2, np.random.default_rng(1)
    phase_B11 = rng.uniform(0, 2 * np.pi, (200, 1, 1))
    rhythm = noise(0)
    rhythm[:, :1] += y_B[:, None, None] * np.sin(2 * np.pi * 10 * t + phase_B11)
    assert accuracy(classical.power_features(rhythm, RATE_HZ), y_B) > 0.95
    assert accuracy(classical.waveform_features(rhythm, RATE_HZ), y_B) < 0.7  # its phase is random
    evoked = noise(0)
    evoked[:, 2] += (2 * y_B[:, None] - 1) * np.exp(-0.5 * ((t - 2) / 0.1) ** 2)
    assert accuracy(classical.waveform_features(evoked, RATE_HZ), y_B) > 0.95
    assert accuracy(classical.power_features(evoked, RATE_HZ), y_B) < 0.7
    late = noise(0)
    late[:, 1] = 0.5 * late[:, 1] + np.where(y_B[:, None] == 1, np.roll(late[:, 0], 5, 1), np.roll(late[:, 0], -5, 1))
    assert accuracy(classical.correlation_features(late, RATE_HZ), y_B) > 0.95
    assert accuracy(classical.power_features(late, RATE_HZ), y_B) < 0.7


def test_an_envelope_spectrum_tells_how_often_a_resonance_is_struck():
    rng, rate_hz, y_B, windows = np.random.default_rng(0), 12000.0, np.arange(60) % 2, []
    ring = np.exp(-np.arange(60) / 8) * np.sin(2 * np.pi * 3000 / rate_hz * np.arange(60))
    for y in y_B:
        strikes = np.zeros(3000)
        strikes[rng.integers(50) :: (100, 160)[y]] = rng.uniform(0.8, 1.2)
        windows.append(np.convolve(strikes, ring)[:3000] + 0.3 * rng.standard_normal(3000))
    assert accuracy(classical.envelope_features(np.array(windows)[:, None], rate_hz), y_B) > 0.9


def test_canonical_correlation_needs_no_training():
    t, rng, hz = np.arange(400) / 250, np.random.default_rng(0), [13.0, 17.0, 21.0]
    y_B = np.arange(90) % 3
    x_BET = rng.standard_normal((90, 6, 400)) * 2
    for b, y in enumerate(y_B):
        x_BET[b] += rng.standard_normal((6, 1)) * np.sin(2 * np.pi * hz[y] * t + rng.uniform(0, 6))
    assert (classical.correlations_with(x_BET, 250.0, hz).argmax(1) == y_B).mean() > 0.95
    assert classical.frequencies(("13 Hz", "17Hz")) == [13, 17] and classical.frequencies(("rest", "13 Hz")) is None


def test_linear_models_equal_scikit_learns_also_where_features_outnumber_windows():
    rng = np.random.default_rng(0)
    x_BF, subject_B = rng.standard_normal((40, 100)), np.repeat(np.arange(8), 5)
    y_B = x_BF[:, :3].sum(1) + 0.1 * rng.standard_normal(40)
    linear = classical.fit_linear(x_BF, y_B, subject_B, 0)
    z_BF = (x_BF - x_BF.mean(0)) / x_BF.std(0)
    fits = [Ridge(penalty).fit(z_BF, y_B).predict(z_BF) for penalty in classical.RIDGES]
    assert any(np.allclose(linear(x_BF)[:, 0], fit, atol=1e-6) for fit in fits)
    one = classical.fit_linear(x_BF, y_B, np.zeros(40), 0)
    assert np.allclose(one(x_BF)[:, 0], fits[len(fits) // 2], atol=1e-6)  # one subject: the middle penalty
    three = classical.fit_linear(x_BF, np.arange(40) % 2 * 2, subject_B, 3)  # class 1 of 3 isn't there
    assert set(three(x_BF).argmax(1)) == {0, 2}


def test_a_fold_of_one_subject_with_one_value_doesnt_choose_the_penalty():
    """Five people of one value each: their folds have no variance, and R² there is a huge negative number."""
    rng, subject_B = np.random.default_rng(0), np.repeat(np.arange(5), 20)
    y_B = np.array([-2.1, -0.7, 0.1, 0.9, 2.3])[subject_B]
    x_BF = rng.standard_normal((100, 10)) + 0.5 * y_B[:, None]
    linear = classical.fit_linear(x_BF, y_B, subject_B, 0)
    z_BF = (x_BF - x_BF.mean(0)) / x_BF.std(0)
    errors = []
    for penalty in classical.RIDGES:
        fits = [(Ridge(penalty).fit(z_BF[subject_B != s], y_B[subject_B != s]), subject_B == s) for s in range(5)]
        errors.append(sum(((fit.predict(z_BF[held]) - y_B[held]) ** 2).sum() for fit, held in fits))
    best = Ridge(classical.RIDGES[np.argmin(errors)]).fit(z_BF, y_B)
    assert np.allclose(linear(x_BF)[:, 0], best.predict(z_BF), atol=1e-6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(task_cases.build(tmp_path_factory.mktemp("classical"), subjects=6))


def test_baselines_find_what_is_there_and_survive_a_file(cache):
    rows = {split: [i for i, r in enumerate(cache.recordings) if r.split == split] for split in ("train", "val")}
    targets = read_targets(cache, ["eyes_open+eyes_closed", "challenge1"], rows["train"], 200)
    train, val = (Examples(cache, targets, rows[s], 2.0, 1.0) for s in ("train", "val"))
    made = [classical.fit_baselines(cache, train, k, 500) for k in range(2)]
    assert {b.name for b in made[0]} >= {"band_power", "amplitude", "lagged_correlations", "tangent_space"}
    assert {b.name for b in made[1]} >= {"waveform", "latency"} and "latency" not in {b.name for b in made[0]}
    ids = val.even(0, 0)
    row_B, start_B = val.locate(ids)
    power = next(b for b in made[0] if b.name == "band_power")
    said_BC = power.say(cache, targets[0], row_B, start_B, 200)
    assert said_BC.sum(1) == pytest.approx(1) and (said_BC.argmax(1) == val.values(ids)[:, 0]).mean() > 0.9
    again = classical.unpack(*classical.pack(made), 2)
    for ours, theirs, target in zip(again, made, targets, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            told = (x.say(cache, target, row_B, start_B, 200) for x in (a, b))
            assert np.allclose(*told) and a.name == b.name
            assert a.unit == b.unit == ("own" if a.name in ("amplitude", "tangent_space") else "model")
    described, tensors = classical.pack(made)
    before = [
        {k: v for k, v in d.items() if k != "unit"} for d in described
    ]  # a file of when covariances were of scaled channels
    units = {b.name: b.unit for b in classical.unpack(before, tensors, 2)[0]}
    assert units["tangent_space"] == units["band_power"] == "model" and units["amplitude"] == "own"


def test_recentred_baselines_know_each_subject_by_its_own_mean(cache):
    rows = [i for i, r in enumerate(cache.recordings) if r.split == "train"]
    targets = read_targets(cache, ["eyes_open+eyes_closed"], rows, 200)
    train = Examples(cache, targets, rows, 2.0, 1.0)
    made = classical.fit_baselines(cache, train, 0, 500, recentred=True)
    twice = [b for b in made if b.recentred]
    assert {b.title for b in twice} == {"band_power_recentred", "tangent_space_recentred"}
    row_B, start_B = train.locate(train.even(0, 0))
    who_B = classical.subjects(cache, row_B)
    x_BET = twice[0].sites.read(cache, row_B, start_B, 200, "model")
    for baseline in twice:
        measured_B = baseline.measure(x_BET, cache.rate_hz)
        z_BF = baseline.features(measured_B, who_B)
        for subject in set(who_B):
            assert np.abs(z_BF[who_B == subject].mean(0)).max() < 1e-5
        turned = np.random.default_rng(0).permutation(len(row_B))  # windows of several people in any order
        assert np.allclose(baseline.features(measured_B[turned], who_B[turned]), z_BF[turned], atol=1e-6)
    again = classical.unpack(*classical.pack([made]), 1)[0]
    for a, b in zip(made, again, strict=True):
        told = (x.say(cache, targets[0], row_B, start_B, 200) for x in (a, b))
        assert (a.title, a.recentred) == (b.title, b.recentred) and np.allclose(*told)


def test_seconds_of_seizures_are_told(cache):
    rows = [i for i, r in enumerate(cache.recordings) if r.task == "szMonitoring" and r.split == "train"]
    (target,) = read_targets(cache, ["seizure"], rows, 800)
    linear = classical.fit_seconds(cache, Examples(cache, [target], rows, 8.0, 4.0), rows, 500)
    other = next(i for i, r in enumerate(cache.recordings) if r.task == "szMonitoring" and r.split == "val")
    said_T = classical.along(cache, linear, other, 0.25)
    (e,) = cache.events(other, "seizure")
    inside_T = (np.arange(len(said_T)) * 0.25 >= e.onset_s) & (np.arange(len(said_T)) * 0.25 < e.onset_s + e.duration_s)
    assert len(said_T) == 48 * 4 and said_T[inside_T].mean() > 0.8 > 0.2 > said_T[~inside_T].mean()
    rest = [i for i, r in enumerate(cache.recordings) if r.task == "Rest"]
    assert classical.fit_seconds(cache, Examples(cache, [target], rest, 8.0, 4.0), rest, 500) is None


def test_mixed_montages_meet_at_the_ten_twenty_sites(tmp_path):
    rng, sources = np.random.default_rng(0), []
    for name, electrodes in (("small", recipes.NAMES), ("wide", [f"E{i}" for i in range(1, 129, 11)])):
        (tmp_path / name).mkdir()
        write_edf(tmp_path / name / "s1.edf", recipes.noise_uv(rng, len(electrodes), 2000), 200, electrodes, [])
        (tmp_path / name / "dataset.toml").write_text(
            f'name = "{name}"\npattern = "s(?P<subject>.)[.]edf"\n[split]\ntrain = ["1"]\n'
        )
        sources.append(tmp_path / name)
    status, _, err = recipes.run("--source", *sources, "--cache", tmp_path / "cache", "--workers", 1)
    assert status == 0, err
    cache = Cache(tmp_path / "cache")
    rows = range(len(cache.recordings))
    sites = Sites.of(cache, rows)
    assert sites == Sites(TEN_TWENTY, True) and sites.fits(cache, rows)
    row_B = np.array([0, len(cache.recordings) - 1])
    x_BET = sites.read(cache, row_B, np.array([100, 100]), 200, "model")
    assert x_BET.shape == (2, 19, 200) and np.isfinite(x_BET).all()
    names = cache.recordings[0].names  # a site where an electrode lies sees mostly that one
    own = cache.read(row_B[:1], [100], 200).x_BCT[0, names.index("O1")].numpy()
    assert np.corrcoef(own, x_BET[0, TEN_TWENTY.index("O1")])[0, 1] > 0.9
    single = Sites.of(cache, [0])
    assert single.names == names and not single.fits(cache, rows) and all(n in POSITIONS for n in names)
