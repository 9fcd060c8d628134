"""Pipelines: equal to pyriemann and scikit-learn, to the trained model on the same windows, to themselves after a trip through a file."""

import pickle
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyriemann.estimation import Covariances
from pyriemann.geometry.mean import mean_riemann
from pyriemann.spatialfilters import CSP
from sklearn.calibration import CalibratedClassifierCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from lib import alignment, pipelines, spd
from lib.arrays import load_arrays, save_arrays
from lib.channels import TEN_TWENTY
from lib.deep import Encoder, load_encoder
from lib.errors import Unusable
from lib.eyes import fit_groups
from lib.intake import Path, Window
from lib.models import Architecture, build_encoder
from lib.pipelines import Hybrid
from lib.readouts import Decoder, Reading, load_model, save_model
from lib.riemann import NotReady, Riemann, learn, to_calibrate_on
from lib.targets import Target
from lib.transfer import Transfer
from tests.recipes import ROOT

NAMES = TEN_TWENTY[:6]
PATH = Path(NAMES, "none", (1.0, 40.0), rate_hz=100.0, window=100, step=50)


def windows(count: int, seed: int, classes: int = 2, C: int = 6, T: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Windows (µV) of one subject: which source is loud is the class; how sources mix is the subject's."""
    rng = np.random.default_rng(seed)
    y_N, mix_CC = np.arange(count) % classes, np.eye(C) + 0.3 * rng.standard_normal((C, C))
    x_NCT = rng.standard_normal((count, C, T))
    x_NCT[np.arange(count), y_N] *= 2.5
    return 10 * mix_CC @ x_NCT, y_N


def lesson(subjects: int = 4, count: int = 30, classes: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [windows(count, s, classes) for s in range(subjects)]
    x_NCT, y_N = (np.concatenate(p) for p in zip(*parts, strict=True))
    return x_NCT, y_N, np.repeat(np.arange(subjects), count)


@pytest.fixture(scope="module", params=[2, 3])
def riemann(request) -> Riemann:
    return learn(*lesson(classes=request.param), ("left", "right", "feet")[: request.param], PATH)


# ----------------------------------------------------------------------------
# riemann: the same as the libraries it was made with


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), C=st.integers(1, 7), T=st.integers(2, 60), scale=st.sampled_from([1e-6, 1.0, 1e3]))
def test_covariances_are_pyriemanns(seed, C, T, scale):
    x_NCT = scale * np.random.default_rng(seed).standard_normal((3, C, T))
    np.testing.assert_allclose(spd.oas(x_NCT), Covariances("oas").transform(x_NCT), rtol=1e-9, atol=1e-12 * scale**2)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), weighted=st.booleans())
def test_means_are_pyriemanns_and_transport_takes_one_to_the_other(seed, weighted):
    rng = np.random.default_rng(seed)
    c_NCC = spd.oas(rng.standard_normal((7, 5, 40)) * rng.uniform(0.5, 3, (7, 5, 1)))
    weight_N = rng.uniform(0.1, 2, 7) if weighted else None
    mean_CC = spd.mean(c_NCC, weight_N)
    np.testing.assert_allclose(mean_CC, mean_riemann(c_NCC, sample_weight=weight_N, tol=1e-9), rtol=1e-6, atol=1e-7)
    move_CC = spd.transport(c_NCC[0], c_NCC[1])
    np.testing.assert_allclose(move_CC @ c_NCC[0] @ move_CC.T, c_NCC[1], rtol=1e-8, atol=1e-9)
    moved_NCC = move_CC @ c_NCC @ move_CC.T  # distances don't change on the way
    np.testing.assert_allclose(spd.mean(moved_NCC, weight_N), move_CC @ mean_CC @ move_CC.T, rtol=1e-5, atol=1e-6)


def test_the_chain_is_what_pyriemann_and_scikit_learn_say(riemann):
    classes = len(riemann.classes)
    x_NCT, y_N, subject_N = lesson(classes=classes)
    c_NCC = Covariances("oas").transform(x_NCT)
    means = [mean_riemann(c_NCC[subject_N == s], tol=1e-10) for s in range(4)]
    whole_CC = mean_riemann(np.stack(means), tol=1e-10)
    move = [spd.transport(m, whole_CC) for m in means]
    moved_NCC = np.stack([move[s] @ c @ move[s].T for s, c in zip(subject_N, c_NCC, strict=True)])
    features_NF = CSP(nfilter=6, log=True).fit(moved_NCC, y_N).transform(moved_NCC)
    folds = to_calibrate_on(y_N, subject_N, classes)
    machine = CalibratedClassifierCV(SVC(class_weight="balanced"), cv=folds, ensemble=False)
    theirs = make_pipeline(StandardScaler(), OneVsRestClassifier(machine) if classes > 2 else machine)
    theirs_NK = theirs.fit(features_NF, y_N).predict_proba(features_NF)
    for s in range(4):
        mine = subject_N == s
        ours_NK = riemann.fit({"BACKGROUND": list(x_NCT[mine])}).predict_proba(x_NCT[mine])
        np.testing.assert_allclose(ours_NK, theirs_NK[mine], atol=1e-5)
    assert (theirs_NK.argmax(1) == y_N).mean() > 0.8


def test_it_waits_for_its_subject_and_says_so(riemann):
    x_NCT, _ = windows(12, 9, len(riemann.classes))
    assert riemann.ready == "parallel transport has 0 of 10 subject windows that don't overlap"
    with pytest.raises(NotReady, match="0 of 10"):
        riemann.predict_proba(x_NCT)
    some = riemann.partial_fit(x_NCT[:9])
    assert some.ready == "parallel transport has 9 of 10 subject windows that don't overlap"
    enough = some.partial_fit([Window(0, 100, x.astype(np.float32)) for x in x_NCT[9:10]])
    assert enough.ready is None and riemann.seen == 0 and some.seen == 9 and some.subject_CC is not enough.subject_CC
    p_NK = enough.predict_proba(x_NCT)
    assert p_NK.dtype == np.float64 and p_NK.sum(1) == pytest.approx(1) and (p_NK >= 0).all()
    assert enough.partial_fit([]) is enough and enough.partial_fit([np.full((6, 100), np.nan)]) is enough


def test_recentring_finds_a_subject_it_never_saw(riemann):
    x_NCT, y_N = windows(60, 99, len(riemann.classes))
    x_NCT = np.diag([1, 4, 0.3, 1, 2, 1]) @ x_NCT  # as if electrodes had other gains
    centred = riemann.fit({"BACKGROUND": x_NCT})
    elsewhere = replace(riemann, subject_CC=riemann.mean_CC, seen=10)
    right = [float((p.predict_proba(x_NCT).argmax(1) == y_N).mean()) for p in (centred, elsewhere)]
    assert right[0] > 1 / len(riemann.classes) + 0.2 and right[0] > right[1]


def test_partial_fits_approach_the_mean_of_all_and_old_windows_fade(riemann):
    x_NCT, _ = windows(40, 7)
    little, whole = riemann, riemann.fit({"BACKGROUND": x_NCT})
    for i in range(0, 40, 8):
        little = little.partial_fit(x_NCT[i : i + 8])
    apart = np.linalg.norm(little.subject_CC - whole.subject_CC) / np.linalg.norm(whole.subject_CC)
    assert little.seen == whole.seen == 40 and apart < 0.02
    later = replace(whole, transport_most=40)
    for _ in range(12):
        later = later.partial_fit(4 * x_NCT)  # an amplifier's gain that changed
    assert later.seen == 40
    ratio = np.trace(later.subject_CC) / np.trace(whole.subject_CC)
    assert ratio > 15


def test_volts_change_nothing(riemann):
    x_NCT, _ = windows(20, 3)
    volts = pipelines.with_path(riemann, replace(PATH, unit="V"))
    a, b = riemann.fit({"BACKGROUND": x_NCT}), volts.fit({"BACKGROUND": 1e-6 * x_NCT})
    np.testing.assert_allclose(a.predict_proba(x_NCT), b.predict_proba(1e-6 * x_NCT), rtol=1e-9)


def test_eyes_are_fitted_first_and_make_an_older_mean_void():
    made = replace(learn(*lesson(), ("a", "b"), PATH), remove_eyes=True)
    x_NCT, _ = windows(20, 3)
    t = np.arange(100) / 100
    moving = x_NCT + 2000 * np.outer([1, 0.8, 0.3, 0.2, 0.1, 0], np.exp(-0.5 * ((t - 0.25) / 0.05) ** 2))
    first = made.partial_fit(x_NCT).fit({"EYE_MOVEMENT": moving})
    assert first.eyes is not None and first.seen == 0 and first.ready
    second = first.fit({"EYE_MOVEMENT": moving, "BACKGROUND": x_NCT})
    assert second.seen == 20 and second.ready is None
    blink_NCT = second.eyes(moving) - second.eyes(x_NCT)
    assert np.abs(blink_NCT).max() < 0.05 * np.abs(moving - x_NCT).max()
    assert made.fit({}) is made and made.fit({"EYE_MOVEMENT": moving[:2]}).eyes is None  # too little to tell


# ----------------------------------------------------------------------------
# encoder: the same as the model on the same windows


def model_file(folder, scale: str = "robust", targets=None, readout: str = "attention", **signal):
    torch.manual_seed(0)
    targets = targets or [Target("number"), Target("task", ("a", "b", "c"), (1.0, 1.0, 1.0))]
    architecture = Architecture(d_model=16, layers=1, heads=2, patch=50)
    decoder = Decoder(build_encoder(architecture), Reading(readout, 2, 3), targets)
    for head in decoder.heads:
        torch.nn.init.normal_(head.weight, std=0.5)
    options = {"kind": "eeg", "rate_hz": 100.0, "band_hz": [1.0, 40.0], "notch_hz": None, "reference": "none"}
    options |= {"scale": scale, "causal": True} | signal
    meta = {"signal": options, "rate_hz": 100.0, "channels": list(NAMES), "window_s": 1.0, "lineage": []}
    folder.mkdir(parents=True, exist_ok=True)
    meta["transfer"] = options.pop("transfer", "none")
    save_model(folder / "model.safetensors", decoder, meta)
    return folder / "model.safetensors"


def said_by(file, x_NCT: np.ndarray, target: int = 1) -> np.ndarray:
    """What the model itself says of windows in its own unit."""
    from lib.channels import POSITIONS

    decoder, _, _ = load_model(file)
    place_BC3 = torch.tensor([POSITIONS[n] for n in NAMES], dtype=torch.float32).expand(len(x_NCT), -1, -1)
    part = SimpleNamespace(signal=(torch.from_numpy(x_NCT).float(), place_BC3, None))
    with torch.inference_mode():
        return decoder.say(decoder(part))[target].double().numpy()


@pytest.mark.parametrize("kind", ["mean", "sites", "attention", "prelocal", "contextual"])
def test_an_encoder_says_what_its_model_says(tmp_path, kind):
    file = model_file(tmp_path, readout=kind)
    made = load_encoder(file, "task")
    assert made.path == replace(PATH, channels=NAMES) and made.classes == ("a", "b", "c")
    x_NCT, _ = windows(8, 1)
    with pytest.raises(NotReady, match="scale of the channels has 0 of 10"):
        made.predict_proba(x_NCT)
    scale_C, offset_C = np.linspace(5, 20, 6), np.linspace(-1, 1, 6)
    made = replace(made, scale_C=scale_C, offset_C=offset_C, seen=10)
    z_NCT = (x_NCT - offset_C[:, None]) / scale_C[:, None]
    expected_NK = said_by(file, z_NCT.clip(-15, 15))
    np.testing.assert_allclose(made.predict_proba(x_NCT), expected_NK, atol=1e-6)
    warmed = made.warm("on")
    one_by_one = np.concatenate([made.predict_proba(x[None]) for x in x_NCT])
    np.testing.assert_allclose(one_by_one, expected_NK, atol=1e-5)
    assert warmed["compiled"] and warmed["window_ms"] > 0
    assert made.warm("off")["compiled"] is False


def test_its_scale_is_learned_at_rest_or_from_the_first_windows(tmp_path):
    made = load_encoder(model_file(tmp_path), "task")
    x_NCT, _ = windows(40, 2)
    rest = made.fit({"BACKGROUND": x_NCT})
    flat_CT = x_NCT.transpose(1, 0, 2).reshape(6, -1)
    low_C, middle_C, high_C = np.quantile(flat_CT, (0.25, 0.5, 0.75), axis=1)
    np.testing.assert_allclose(rest.scale_C, (high_C - low_C) / 1.349)
    np.testing.assert_allclose(rest.offset_C, middle_C)
    assert rest.ready is None and made.seen == 0 and rest.partial_fit(5 * x_NCT) is rest
    first = made.partial_fit(x_NCT[:4])
    assert first.ready == "the scale of the channels has 4 of 10 subject windows that don't overlap"
    first = first.partial_fit(x_NCT[4:])
    assert first.ready is None and np.abs(first.scale_C / rest.scale_C - 1).max() < 0.1
    none = load_encoder(model_file(tmp_path / "none", scale="none"), "task")
    assert none.ready is None
    np.testing.assert_allclose(
        none.predict_proba(x_NCT[:3]), said_by(tmp_path / "none" / "model.safetensors", x_NCT[:3]), atol=1e-6
    )


@pytest.mark.parametrize("how", ["subject", "recording", "window"])
@pytest.mark.parametrize("scale", ["robust", "none"])
def test_a_model_of_aligned_signals_gets_them_aligned(tmp_path, how, scale):
    """Windows of a person at rest as a recording of a cache: the service and the cache must make the same of them."""
    file = model_file(tmp_path / "a", scale=scale, align=how)
    made = load_encoder(file, "task")
    x_NCT, _ = windows(40, 2)
    if how != "window":
        with pytest.raises(NotReady, match="covariance of the channels has 0 of 10"):
            made.predict_proba(x_NCT)
    rest = made.fit({"BACKGROUND": x_NCT})
    offset_C = rest.offset_C if scale == "robust" else np.zeros(6)
    z_NCT = torch.from_numpy(x_NCT - offset_C[:, None])
    cov_NCC = alignment.covariance(z_NCT)
    root = alignment.whitener(cov_NCC if how == "window" else cov_NCC.mean(0, keepdim=True))
    expected_NK = said_by(file, (root @ z_NCT).numpy())
    np.testing.assert_allclose(rest.predict_proba(x_NCT), expected_NK, atol=1e-5)
    first = made.partial_fit(x_NCT[:4]).partial_fit(x_NCT[4:])
    assert first.ready is None
    if scale == "none" and how != "window":
        np.testing.assert_allclose(first.covariance_CC, rest.covariance_CC)
    pipelines.save(rest, tmp_path / "b")
    again = pipelines.load(tmp_path / "b")
    np.testing.assert_allclose(again.predict_proba(x_NCT), expected_NK, atol=1e-5)
    x_NCT[:, 4] = 0  # a channel that went bad is left out of it
    assert np.isfinite(rest.predict_proba(x_NCT)).all() and (rest.signal(x_NCT)[0][:, 4] == 0).all()


def test_channels_that_are_zero_are_masked_but_not_the_reference(tmp_path):
    x_NCT, _ = windows(3, 2)
    x_NCT[:, 4] = 0
    plain = load_encoder(model_file(tmp_path / "a", scale="none"), "task")
    assert plain.signal(x_NCT)[1].tolist() == [[True] * 4 + [False, True]] * 3
    few = load_encoder(model_file(tmp_path / "b", scale="none"), "task")
    few = pipelines.with_path(few, replace(few.path, channels=tuple(n for n in NAMES if n != "Fz")))
    np.testing.assert_allclose(plain.predict_proba(x_NCT), few.predict_proba(np.delete(x_NCT, 4, 1)), atol=1e-5)
    fz = load_encoder(model_file(tmp_path / "c", scale="none", reference="Fz"), "task")
    assert fz.signal(x_NCT)[1] is None


def test_channels_that_a_stream_lacks_cost_nothing(tmp_path):
    x_NCT, _ = windows(3, 2)
    x_NCT[:, 4], x_NCT[0, 1] = 0, 0
    made, seen = load_encoder(model_file(tmp_path, scale="none"), "task"), []
    made.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].x_BCT.shape[1]))
    together = made.predict_proba(x_NCT)  # not all lack the same
    np.testing.assert_allclose(np.concatenate([made.predict_proba(x[None]) for x in x_NCT]), together, atol=1e-6)
    assert seen == [6, 4, 5, 5]
    made.warm("on")
    np.testing.assert_allclose(made.predict_proba(x_NCT[1:2]), together[1:2], atol=1e-6)
    assert np.isfinite(made.predict_proba(0 * x_NCT)).all()


@pytest.mark.parametrize(
    "options, target, words",
    [
        ({"causal": False}, "task", ("zero-phase", "--causal", "--acausal")),
        ({}, "age", ("--target age", "number, task")),
        ({}, "number", ("is a number", "classes")),
        ({"kind": "vibration"}, "task", ("vibration",)),
        *(({"transfer": t}, "task", (f"--transfer {t}", "later windows")) for t in get_args(Transfer) if t != "none"),
    ],
)
def test_a_model_the_service_can_not_serve_is_refused(tmp_path, options, target, words):
    file = model_file(tmp_path, **options)
    with pytest.raises(Unusable) as refused:
        load_encoder(file, target)
    assert all(word in str(refused.value) for word in words)
    if "causal" in options:
        assert isinstance(load_encoder(file, target, acausal=True), Encoder)


# ----------------------------------------------------------------------------
# hybrid


def make_hybrid(folder) -> Hybrid:
    deep = load_encoder(model_file(folder), "task")
    made = learn(*lesson(classes=3), ("a", "b", "c"), deep.path, remove_eyes=False)
    return Hybrid(made, deep, (1.5, 0.8), 0.3)


def test_a_hybrid_is_the_calibrated_average_of_both(tmp_path):
    both = make_hybrid(tmp_path)
    x_NCT, _ = windows(20, 4, 3)
    assert both.ready and both.partial_fit(x_NCT[:5]).ready
    both = both.fit({"BACKGROUND": x_NCT})
    p_NK, q_NK = (part.predict_proba(x_NCT) for part in (both.riemann, both.encoder))
    expected_NK = 0.7 * pipelines.tempered(p_NK, 1.5) + 0.3 * pipelines.tempered(q_NK, 0.8)
    np.testing.assert_allclose(both.predict_proba(x_NCT), expected_NK, rtol=1e-9)
    assert both.ready is None and set(both.warm("off")) == {"riemann", "encoder"}


def test_calibration_finds_what_is_overconfident_and_what_is_worth_more():
    rng = np.random.default_rng(0)
    y_N = rng.integers(0, 3, 3000)
    logit_NK = np.eye(3)[y_N] * 1.5 + rng.standard_normal((3000, 3))
    good_NK = pipelines.tempered(np.exp(1.5 * logit_NK) / np.exp(1.5 * logit_NK).sum(1, keepdims=True), 1 / 3)
    noise_NK = rng.dirichlet((1, 1, 1), 3000)
    (hot, cold), weight = pipelines.calibrate(noise_NK, good_NK, y_N)
    assert weight > 0.8 and hot > 5 and 2 < cold < 4.5  # three times too confident


# ----------------------------------------------------------------------------
# files


def test_a_session_survives_its_file_bit_for_bit(tmp_path):
    x_NCT, _ = windows(30, 5, 3)
    made = make_hybrid(tmp_path / "model")
    made = pipelines.with_path(made, replace(made.path, bad=("Fp1",), step=25))
    found = fit_groups({"EYE_MOVEMENT": x_NCT * np.array([9, 1, 1, 1, 1, 1])[:, None], "BACKGROUND": x_NCT}, PATH, None)
    assert found is not None
    session = Hybrid(
        replace(made.riemann, eyes=found).fit({"BACKGROUND": x_NCT}),
        made.encoder.fit({"BACKGROUND": x_NCT}),
        (2.0, 1.0),
        0.4,
    )
    for name, pipeline in (("hybrid", session), ("riemann", session.riemann), ("encoder", session.encoder)):
        pipelines.save(pipeline, tmp_path / name)
        again = pipelines.load(tmp_path / name)
        assert again.name == name and again.path == session.path and again.classes == ("a", "b", "c")
        assert np.array_equal(again.predict_proba(x_NCT), pipeline.predict_proba(x_NCT))
        assert again.ready is None and pipelines.load(tmp_path / name / "pipeline.safetensors").name == name
    before = (tmp_path / "riemann" / "pipeline.safetensors").read_bytes()
    pipelines.save(pipelines.load(tmp_path / "riemann"), tmp_path / "riemann")
    assert (tmp_path / "riemann" / "pipeline.safetensors").read_bytes() == before


def test_damaged_foreign_or_incomplete_files_are_refused_in_one_line(tmp_path):
    made = learn(*lesson(), ("a", "b"), PATH)
    pipelines.save(made, tmp_path / "good")
    file = tmp_path / "good" / "pipeline.safetensors"
    data, (arrays, meta) = file.read_bytes(), load_arrays(file)
    flipped = bytearray(data)
    flipped[-5] ^= 1
    cases = [bytes(flipped), data[:-10], data[:40], b"", pickle.dumps({"a": 1}), b"\xff" * 200]
    folder = tmp_path / "bad"
    folder.mkdir()
    for case in cases:
        (folder / file.name).write_bytes(case)
        with pytest.raises(Unusable) as refused:
            pipelines.load(folder)
        assert "pipeline.safetensors" in str(refused.value) and "\n" not in str(refused.value)
    own = meta["riemann"]
    wrong = [
        (arrays, meta | {"format": "other"}),
        (arrays, meta | {"version": 99}),
        (arrays, meta | {"name": "os.system"}),
        (arrays, meta | {"riemann": own | {"surprise": 1}}),
        (arrays, meta | {"riemann": own | {"classes": ["a", "b", "c"]}}),
        (arrays, meta | {"riemann": own | {"path": own["path"] | {"channels": ["Cz"]}}}),
        ({k: v for k, v in arrays.items() if "filters" not in k}, meta),
        (arrays | {"riemann.mean_CC": arrays["riemann.mean_CC"][:3]}, meta),
        (arrays | {"riemann.mean_CC": np.full((6, 6), np.nan)}, meta),
        (arrays | {"riemann.machines.bias_B": np.array([np.nan])}, meta),
    ]
    for some, said in wrong:
        save_arrays(folder / file.name, some, said)
        with pytest.raises(Unusable) as refused:
            pipelines.load(folder)
        assert "\n" not in str(refused.value)
    (folder / file.name).unlink()
    (folder / "svc.joblib").write_bytes(pickle.dumps({}))
    with pytest.raises(Unusable, match="no pipeline.safetensors or model.safetensors"):
        pipelines.load(folder)


def test_serving_riemann_imports_no_torch_and_reads_a_training_run_for_encoders(tmp_path):
    made = learn(*lesson(), ("a", "b"), PATH).partial_fit(windows(12, 1)[0])
    pipelines.save(made, tmp_path)
    program = (
        "import sys, numpy as np; from lib import pipelines; p = pipelines.load(sys.argv[1]); p.warm();"
        "p.fit({'BACKGROUND': list(np.random.randn(12, 6, 100))}).predict_proba(np.random.randn(1, 6, 100));"
        "print({'mne', 'torch', 'sklearn', 'pyriemann'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    targets = [Target("task", ("a", "b"), (1.0, 1.0))]
    file = model_file(tmp_path / "run", targets=targets)
    assert pipelines.load(tmp_path / "run").name == pipelines.load(file).name == "encoder"
