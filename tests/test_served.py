"""From a causal cache to a folder for --models, and from there to the same answers about the recordings themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lib import pipelines, replay, served
from lib.cache import Cache
from lib.errors import Unusable
from lib.intake import Intake, Path
from lib.lineage import trained_on
from lib.models import Architecture, build_encoder, signal_meta
from lib.readouts import Decoder, Reading, save_model
from lib.riemann import learn
from lib.sources import discover
from lib.targets import read_targets
from tests import recipes, task_cases

TARGET = "eyes_open+eyes_closed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The cohort's recordings and a causal cache of them."""
    folder = tmp_path_factory.mktemp("served")
    task_cases.write_cohort(folder / "raw", subjects=7)
    words = ["--source", folder / "raw", "--cache", folder / "cache", "--causal", "--workers", 1, "--allow-no-seizures"]
    code, _, said = recipes.run(*words, "--rate-hz", 100, "--band-hz", 1, 40)
    assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """An untrained model of that cache, as train_supervised.py would leave one."""
    cache = Cache(folder / "cache")
    rows = [i for i, r in enumerate(cache.recordings) if r.split == "train"]
    targets = read_targets(cache, [TARGET], rows, 100)
    torch.manual_seed(0)
    decoder = Decoder(build_encoder(Architecture(d_model=16, layers=1, heads=2, patch=50)), Reading("mean", 2), targets)
    torch.nn.init.normal_(decoder.heads[0].weight, std=0.1)
    (folder / "run").mkdir()
    meta = signal_meta(cache) | trained_on(cache, rows) | {"lineage": [], "window_s": 1.0}
    save_model(folder / "run" / "model.safetensors", decoder, meta)
    return folder / "run"


@pytest.mark.parametrize("kind", ["riemann", "encoder", "hybrid"])
def test_a_pipeline_is_made_saved_scored_and_serves_the_recording_as_it_was_scored(folder, model, kind):
    encoder = None if kind == "riemann" else model
    found = served.fit(folder / "cache", TARGET, kind, folder / kind, encoder, window_s=1.0, transport_min=3)
    assert found["classes"] == ["eyes_closed", "eyes_open"] and found["val_subjects"] >= 2
    if kind == "riemann":
        assert found["val"]["balanced_accuracy"] > 0.8
    pipeline, cache = pipelines.load(folder / kind), Cache(folder / "cache")
    assert pipeline.name == kind and pipeline.path.window == 100 and pipeline.ready
    row = next(i for i, r in enumerate(cache.recordings) if r.split == "val" and "Rest" in r.key)
    source = next(s for s in discover([folder / "raw"]).sources if s.key == cache.recordings[row].key)
    material = replay.read(source.path, spec=source.spec)
    intake = Intake(material.stream, pipeline.path)
    windows = [w for first, x_TC in material.pieces for w in intake.push(first, x_TC) if w.valid]
    assert len(windows) > 20
    start_N = np.array([round(w.start * 100 / material.stream.rate_hz) for w in windows])
    kept_NCT = served.read(cache, np.full(len(windows), row), start_N, 100)
    live_NCT = np.stack([w.x_CT for w in windows])
    np.testing.assert_allclose(live_NCT, kept_NCT, rtol=2e-3, atol=2e-2)  # float16
    live, kept = (pipeline.fit({"BACKGROUND": list(x)}).predict_proba(x) for x in (live_NCT, kept_NCT))
    np.testing.assert_allclose(live, kept, atol=0.02)
    assert (live.argmax(1) == kept.argmax(1)).all()


def test_encoders_take_the_scale_of_the_session_for_that_of_the_recording(folder, model):
    made, cache = pipelines.load(model), Cache(folder / "cache")
    rows = [i for i, r in enumerate(cache.recordings) if r.split == "val" and "Rest" in r.key]
    start_N = np.arange(0, 1500, 100)
    for row in rows:
        x_NCT = served.read(cache, np.full(15, row), start_N, 100)
        z_NCT = cache.read(np.full(15, row), start_N, 100).x_BCT.numpy()
        ours_NCT, good = made.fit({"BACKGROUND": list(x_NCT)}).signal(x_NCT)
        assert good is None
        np.testing.assert_allclose(ours_NCT, z_NCT, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pipeline": "svm"}, ("--pipeline svm", "riemann")),
        ({"pipeline": "hybrid"}, ("--encoder",)),
        ({"encoder": "run/model.safetensors"}, ("takes no --encoder",)),
        ({"target": "age:regression"}, ("--target age", "is a number", "age:classification")),
        ({"target": "dreams"}, ("dreams",)),
        ({"where": ("task=Sleep",)}, ("no recording has task Sleep",)),
        ({"where": ("mood=good",)}, ("--where mood=good",)),
    ],
)
def test_what_can_not_be_made_is_refused_in_one_line(folder, options, words):
    options = {"target": TARGET, "pipeline": "riemann", "models": folder / "never"} | options
    with pytest.raises(Unusable) as refused:
        served.fit(folder / "cache", **options)
    assert all(word in str(refused.value) for word in words) and not (folder / "never").exists()


def test_a_hybrid_is_scored_on_nobody_by_whom_it_was_calibrated(folder, model, monkeypatch):
    rng, subject_N, y_N = np.random.default_rng(0), np.repeat(np.arange(3), 40), np.arange(120) % 2
    sure_NK, none_NK = np.eye(2)[y_N] * 0.8 + 0.1, rng.dirichlet((1, 1), 120)
    p_NK, q_NK = (np.where((subject_N == 0)[:, None], a, b) for a, b in ((sure_NK, none_NK), (none_NK, sure_NK)))
    lesson = served.Lesson(np.empty(0), y_N, subject_N, subject_N, subject_N, ())
    told_NK = served.cross_calibrated(p_NK, q_NK, lesson)
    right_N = told_NK.argmax(1) == y_N
    assert right_N[:40].mean() < 0.75  # of the others the second part is good, and of this one the first
    lesson.y_N = np.where(subject_N == 0, 1 - y_N, y_N)
    assert np.array_equal(served.cross_calibrated(p_NK, q_NK, lesson)[:40], told_NK[:40])
    lesson.subject_N = np.zeros(120, int)
    assert np.array_equal(served.cross_calibrated(p_NK, q_NK, lesson), (p_NK + q_NK) / 2)
    asked, calibrate = [], pipelines.calibrate
    monkeypatch.setattr(pipelines, "calibrate", lambda *a: asked.append(len(a[2])) or calibrate(*a))
    found = served.fit(folder / "cache", TARGET, "hybrid", folder / "crossed", model, window_s=1.0, transport_min=3)
    assert found["val_windows"] in asked and sum(asked) == found["val_windows"] * found["val_subjects"]


def test_zero_phase_caches_and_foreign_models_are_refused(folder, model, tmp_path):
    code, _, said = recipes.run(
        "--source", folder / "raw", "--cache", tmp_path / "c", "--workers", 1, "--allow-no-seizures"
    )
    assert code == 0, said
    with pytest.raises(Unusable, match="--causal"):
        served.fit(tmp_path / "c", TARGET, "riemann", tmp_path / "m")
    manifest = pipelines.load(model)
    other = replace(manifest, meta=manifest.meta | {"signal": manifest.meta["signal"] | {"reference": "Cz"}})
    pipelines.save(other, tmp_path / "other")
    with pytest.raises(Unusable, match="reference Cz"):
        served.fit(folder / "cache", TARGET, "encoder", tmp_path / "m", tmp_path / "other")


def test_an_encoder_that_knows_the_val_subjects_is_refused_unless_that_is_allowed(folder, model, tmp_path):
    made, cache = pipelines.load(model), Cache(folder / "cache")
    rows = [i for i, r in enumerate(cache.recordings) if r.split in ("train", "val")]
    pipelines.save(replace(made, meta=made.meta | trained_on(cache, rows)), tmp_path / "all")
    for kind in ("encoder", "hybrid"):
        with pytest.raises(Unusable, match="trained on 2 of the 2 subjects .*--allow-leak"):
            served.fit(folder / "cache", TARGET, kind, tmp_path / "m", tmp_path / "all")
    assert not (tmp_path / "m").exists()
    found = served.fit(folder / "cache", TARGET, "encoder", tmp_path / "m", tmp_path / "all", allow_leak=True)
    assert found["val_subjects"] == 2
    earlier = {"file": "pretrained", "subjects": [], "auxiliary": ["eyes_open"]}
    pipelines.save(replace(made, meta=made.meta | {"lineage": [earlier]}), tmp_path / "told")
    with pytest.raises(Unusable, match="^eyes_open was an auxiliary target of pretrained"):
        served.fit(folder / "cache", TARGET, "encoder", tmp_path / "n", tmp_path / "told")


def test_flickers_are_told_apart_by_their_bands():
    signal = {"rate_hz": 128.0, "band_hz": [4.0, 40.0]}
    assert served.flicker_bands(("rest", "13 Hz", "17 Hz", "21Hz"), signal) == (
        (12, 14),
        (16, 18),
        (20, 22),
        (25, 27),
        (33, 35),
    )
    assert served.flicker_bands(("left", "right"), signal) == ()
    rng, t, y_N = np.random.default_rng(0), np.arange(256) / 128, np.arange(60) % 3
    x_NCT = rng.standard_normal((60, 4, 256))
    for x_CT, y in zip(x_NCT, y_N, strict=True):
        x_CT += 0.7 * rng.uniform(0.5, 1, (4, 1)) * np.sin(2 * np.pi * (13, 17, 21)[y] * t + rng.uniform(0, 6))
    path = Path(("O1", "Oz", "O2", "POz"), "none", (4.0, 40.0), rate_hz=128.0, window=256)
    right = []
    for bands_hz in (served.flicker_bands(("13 Hz", "17 Hz", "21 Hz"), signal), ()):
        made = learn(x_NCT[:40], y_N[:40], np.zeros(40), ("13 Hz", "17 Hz", "21 Hz"), path, bands_hz)
        own = made.partial_fit(x_NCT[:40])
        right.append(float((own.predict_proba(x_NCT[40:]).argmax(1) == y_N[40:]).mean()))
    assert right[0] > 0.9 > right[1]
