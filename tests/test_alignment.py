"""Alignment: what it makes of covariances, what it must leave alone, what a window's own has to do with canonical correlation, and phases that use it."""

import json

import numpy as np
import pytest
import torch

from lib import alignment
from lib.alignment import covariance, whitener
from lib.cache import Cache
from lib.classical import correlations_with
from lib.errors import Unusable
from lib.models import load_encoder
from lib.readouts import load_model
from tests.recipes import run, write_small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned")
    write_small(folder / "source", subjects=5)
    code, _, said = run("--source", folder / "source", "--cache", folder / "cache", "--rate-hz", 100)
    assert code == 0, said
    return folder / "cache"


@pytest.fixture
def cache(folder):
    return Cache(folder)


def every(cache: Cache, rows: list[int], unit: str = "model"):
    windows = cache.windows(None, 4.0, 4.0, rows)
    return windows.read(range(len(windows)), unit)


@pytest.mark.parametrize("how", ["subject", "recording"])
def test_the_mean_covariance_of_a_person_or_recording_becomes_the_identity(cache, how):
    cache.align(how)
    first = cache.recordings[0]
    rows = [i for i, r in enumerate(cache.recordings) if r.subject == first.subject and (how == "subject" or i == 0)]
    assert len(rows) == (2 if how == "subject" else 1)
    uv = every(cache, rows, "uV").x_BCT
    value_C = torch.linalg.eigvalsh(covariance(uv).mean(0))
    level = covariance(uv).mean(0).diagonal().log().mean().exp()
    expected_C = value_C / (value_C + alignment.FLOOR * level)  # the average reference leaves one direction empty
    got_C = torch.linalg.eigvalsh(covariance(every(cache, rows).x_BCT).mean(0))
    torch.testing.assert_close(got_C, expected_C.sort().values, atol=0.02, rtol=0.02)
    assert got_C[0] < 0.05 and got_C[2] > 0.9
    assert cache.signal["align"] == how


def test_no_mixing_of_a_persons_channels_survives():
    torch.manual_seed(0)
    x_BCT, mix_CC = torch.randn(6, 5, 400, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    cov, mixed = covariance(x_BCT), covariance(mix_CC @ x_BCT)
    a, b = (whitener(c.mean(0, keepdim=True), 0.0)[0] for c in (cov, mixed))
    straight, other = a @ cov @ a, b @ mixed @ b
    torch.testing.assert_close(torch.linalg.eigvalsh(straight), torch.linalg.eigvalsh(other))  # all but a rotation


def test_what_is_white_already_stays_and_symmetry_keeps_channels_where_they_are():
    torch.testing.assert_close(whitener(torch.eye(4)[None], 0.0)[0], torch.eye(4, dtype=torch.float64))
    cov_CC = torch.full((3, 3), 0.6) + 0.4 * torch.eye(3)
    root_CC = whitener(cov_CC[None], 0.0)[0]
    torch.testing.assert_close(root_CC, root_CC.T)
    assert (root_CC @ cov_CC.double()).diagonal().min() > 0.8  # correlation of each channel with what it becomes


def test_bad_channels_stay_zero_and_change_nothing():
    torch.manual_seed(0)
    x_BCT = torch.randn(2, 5, 300)
    x_BCT[:, 3] = 0
    kept = [0, 1, 2, 4]
    with_it, without = whitener(covariance(x_BCT)), whitener(covariance(x_BCT[:, kept]))
    assert (with_it[:, 3] == 0).all() and (with_it[:, :, 3] == 0).all()
    torch.testing.assert_close(with_it[:, kept][:, :, kept], without)
    assert (whitener(torch.zeros(1, 3, 3)) == 0).all()


def test_a_bad_channel_of_one_recording_is_left_out_of_it_alone(folder, cache):
    cache.align("subject")
    whole = every(cache, [1]).x_BCT
    cache._good[cache._first_channel[0] + 2] = False  # of recording 0 of the same person
    cache.align("subject")
    assert (every(cache, [0]).x_BCT[:, 2] == 0).all()
    assert torch.corrcoef(torch.stack([every(cache, [1]).x_BCT.flatten(), whole.flatten()]))[0, 1] > 0.9


def test_microvolts_and_masks_are_as_they_were(cache):
    before, uv = every(cache, [0, 1]), every(cache, [0, 1], "uV")
    cache.align("subject")
    after = every(cache, [0, 1])
    assert torch.equal(every(cache, [0, 1], "uV").x_BCT, uv.x_BCT) and torch.equal(after.mask_BC, before.mask_BC)
    assert not torch.allclose(after.x_BCT, before.x_BCT)
    cache.align("none")
    assert torch.equal(every(cache, [0, 1]).x_BCT, before.x_BCT) and "align" not in cache.signal


def test_which_windows_are_read_together_changes_nothing(cache):
    cache.align("subject")
    together = every(cache, [0, 3, 5]).x_BCT
    cache.align("subject")
    alone = torch.cat([every(cache, [row]).x_BCT for row in (5, 0, 3)])
    torch.testing.assert_close(together, alone[torch.tensor([4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3])])


def test_power_of_an_aligned_window_is_what_canonical_correlation_sees():
    """With one frequency and no harmonic, squared canonical correlations add up to the whitened channels' squared correlations with sine and cosine."""
    rng, rate_hz, T = np.random.default_rng(0), 100.0, 400
    t_T = np.arange(T) / rate_hz
    x_CT = rng.standard_normal((4, 4)) @ rng.standard_normal((4, T)) + np.outer([1, -2, 0.5, 0], np.sin(2 * np.pi * 13 * t_T))  # fmt: skip
    x_1CT = torch.from_numpy(x_CT)[None]
    white_CT = (whitener(covariance(x_1CT), 0.0) @ (x_1CT - x_1CT.mean(2, keepdim=True)))[0].numpy()
    wave_2T = np.stack([np.sin(2 * np.pi * 13 * t_T), np.cos(2 * np.pi * 13 * t_T)]) * np.sqrt(2)
    shares_C2 = (white_CT @ wave_2T.T / T) ** 2
    q_TC = np.linalg.qr((x_CT - x_CT.mean(1, keepdims=True)).T)[0]
    canonical = np.linalg.svd(q_TC.T @ np.linalg.qr(wave_2T.T)[0], compute_uv=False)
    assert shares_C2.sum() == pytest.approx((canonical**2).sum(), rel=1e-9)
    assert correlations_with(x_CT[None], rate_hz, [13.0])[0, 0] ** 2 <= canonical[0] ** 2 + 0.1


def test_an_unknown_way_and_a_strange_file_are_refused(cache, tmp_path):
    with pytest.raises(Unusable, match="--align session is unknown"):
        cache.align("session")
    with pytest.raises(Unusable, match="no file"):
        alignment.choose("auto", str(tmp_path / "none.safetensors"))
    assert alignment.choose("auto", None) == "none" and alignment.choose("window", None) == "window"


def test_phases_go_on_as_the_first_one_began(folder, tmp_path):
    flags = ["--cache", folder, "--steps", 2, "--batch", 8, "--d-model", 16, "--heads", 2, "--layers", 1]
    code, done, said = run(*flags, "--align", "subject", "--name", tmp_path / "a", script="train_jepa.py")
    assert code == 0, said
    init = ["--init", done["encoder"], "--cache", folder, "--steps", 2, "--batch", 8]
    code, next_one, said = run(*init, "--pairs", "augment:1", "--name", tmp_path / "b", script="train_contrastive.py")
    assert code == 0, said
    assert alignment.choose("auto", next_one["encoder"]) == "subject"
    more = ["--target", "condition", "--mode", "probe", "--occlusion-windows", 0, "--resamples", 20]
    code, last, said = run(*init, *more, "--name", tmp_path / "c", script="train_supervised.py")
    assert code == 0, said
    assert alignment.choose("auto", last["model"]) == "subject"
    wrong = ["--evaluate", last["model"], "--cache", folder, "--align", "window", "--name", tmp_path / "e"]
    code, _, said = run(*wrong, script="train_supervised.py")
    assert code == 2 and "was trained with --align subject" in said
    plain = [*init, *more, "--align", "none", "--name", tmp_path / "d"]
    code, other, said = run(*plain, script="train_supervised.py")
    assert code == 0 and "was trained with --align subject, the windows come with none, as asked" in said, said
    opened = Cache(folder)
    for load, file in ((load_encoder, next_one["encoder"]), (load_model, last["model"])):
        opened.align("none")
        with pytest.raises(
            Unusable, match=r'with --align subject, the windows come with none: call cache.align\("subject'
        ):
            load(file, opened)
        opened.align("subject")
        load(file, opened)
    assert alignment.choose("auto", other["model"]) == "none"
    read = {name: json.loads((tmp_path / name / "scores.json").read_text()) for name in "cd"}
    assert read["c"] != read["d"]
    code, _, said = run("--init", done["encoder"], "--cache", folder, "--steps", 2, script="train_flow.py")
    assert code == 2 and "--align subject" in said


@pytest.mark.parametrize("how", ["subject", "recording", "window"])
def test_how_recordings_were_scaled_leaves_no_trace(folder, tmp_path, how):
    """Scaled by channel after an average reference, whitened windows would say which recording they are of."""
    other = tmp_path / "other"
    code, _, said = run("--source", folder.parent / "source", "--cache", other, "--rate-hz", 100, "--scale", "zscore")
    assert code == 0, said
    robust, zscore = Cache(folder), Cache(other)
    for opened in (robust, zscore):
        opened.align(how)
    a, b = (every(opened, [0, 1, 4]).x_BCT for opened in (robust, zscore))
    a, b = (x - x.mean(2, keepdim=True) for x in (a, b))  # their offsets differ
    assert (a - b).abs().max() < 0.05 and torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.9999
