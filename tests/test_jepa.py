"""train_jepa.py on a small cache of two montages: it learns, resumes exactly, and is the same however the batch is divided."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train_jepa
from lib import command
from lib.cache import Cache
from lib.edf import write_edf
from lib.errors import Failed, Unusable
from lib.models import load_encoder
from lib.run import MEASURED
from tests import recipes
from train_jepa import PRESETS, Config, main

SMALL = "EEG FP1-REF,EEG F3-REF,EEG C3-REF,EEG P3-REF,EEG O1-REF,EEG FP2-REF,EEG C4-REF,EEG O2-REF".split(",")
WIDE = [f"E{i}" for i in range(1, 129, 11)]  # 12 of the 128
TINY = dict(d_model=32, layers=2, heads=2, patch_s=0.5, window_s=2.0, batch=12, max_channels=10, steps=24, log_every=1)
TINY |= dict(save_every=5, eval_every=8, dtype="float32", val_windows=24, probe_windows=60)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Ten subjects with 8 electrodes and ten with 12; a rhythm over the back of the head comes at rest and goes with a task."""
    folder = tmp_path_factory.mktemp("jepa")
    rng = np.random.default_rng(0)
    for name, electrodes in (("small", SMALL), ("wide", WIDE)):
        source = folder / name
        source.mkdir()
        for s in range(10):
            for condition in ("rest", "task"):
                x_CT = recipes.noise_uv(rng, len(electrodes), 16 * 200)
                t = np.arange(x_CT.shape[1]) / 200
                rhythm = np.sin(2 * np.pi * (9.5 + 0.1 * s) * t) * (1 + np.sin(2 * np.pi * 0.3 * t + s))
                x_CT[len(electrodes) // 2 :] += (25 if condition == "rest" else 3) * rhythm
                write_edf(source / f"s{s:02d}_{condition}.edf", x_CT, 200, electrodes, [(2.0, 3.0, "look")])
        people = "".join(f"s{s:02d},{20 + 3 * s},{'FM'[s % 2]}\n" for s in range(10))
        (source / "people.csv").write_text("id,age,sex\n" + people)
        (source / "dataset.toml").write_text(recipes.RULE.replace('"small"', f'"{name}"'))
    sources = ("--source", folder / "small", folder / "wide")
    status, results, err = recipes.run(*sources, "--cache", folder / "cache", "--workers", 1)
    assert status == 0 and results["recordings"] == 40, err
    return folder / "cache"


def config(cache: Path, run: Path, **changes) -> Config:
    return replace(Config(cache=(str(cache),), name=str(run)), **(TINY | changes))


def flags(cfg: Config) -> list[str]:
    """The command line that gives this configuration."""
    words = []
    for name, value in vars(cfg).items():
        if value != getattr(Config(), name):
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def log(run: Path) -> list[dict]:
    """The lines of a run's log without what depends on the clock."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


@pytest.fixture(scope="session")
def straight(cache, tmp_path_factory) -> Path:
    """A run that nothing interrupted; the others are compared with it."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    results = main(config(cache, run))
    assert results["step"] == 24 and results["dtype"] == "float32" and Path(results["encoder"]).exists()
    return run


def test_a_run_leaves_what_it_promises(straight, cache):
    names = {
        "config.json",
        "command.txt",
        "code",
        "log.jsonl",
        "state.safetensors",
        "encoder.safetensors",
        "curves.png",
    }
    assert {p.name for p in straight.iterdir()} == names
    lines = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(25))
    keys = {"step", "loss", "lr", "grad_norm", "skipped", *MEASURED}
    assert all(keys <= line.keys() for line in lines[1:])
    watched = {"val_loss", "feature_rank", "feature_std", "teacher_cosine", "predicted_cosine"}
    assert [line["step"] for line in lines if watched <= line.keys()] == [0, 8, 16, 24]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    encoder, meta = load_encoder(straight / "encoder.safetensors", Cache(cache))
    assert meta["cache"] == Cache(cache).fingerprint and meta["unit"] == "uV" and "Fp1" in meta["channels"]
    batch = Cache(cache).windows("val", 2.0, 1.0).read(range(6))
    z_BND = encoder(batch.x_BCT, batch.positions_BC3, batch.mask_BC)
    assert z_BND.shape == (6, batch.x_BCT.shape[1] * 4, 32) and z_BND.isfinite().all()


def test_probe_is_by_subject_and_stands_beside_its_baselines(straight):
    first, last = log(straight)[0], log(straight)[-1]
    for label in ("condition", "age", "sex"):
        for line in (first, last):
            assert {f"probe_{label}", f"probe_{label}_bandpower", f"probe_{label}_chance"} <= line.keys()
    assert last["probe_condition"] > 0.8 and last["probe_condition_bandpower"] > 0.8  # a rhythm that comes and goes
    assert last["probe_condition_chance"] == 0.5 and last["probe_age_chance"] == 0
    assert last["probe_sex"] < 0.8  # there is nothing to be found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_ends_in_the_same_log_and_encoder(how, cache, straight, tmp_path):
    run = tmp_path / "broken"
    process = recipes.start(*flags(config(cache, run)), script="train_jepa.py")
    deadline = time.monotonic() + 100
    while not (run / "log.jsonl").exists() or not any(line.get("step", 0) >= 7 for line in whole_lines(run)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    assert process.wait(60) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert not (run / "encoder.safetensors").exists()  # it was in the middle
    resumed = main(replace(config(cache, run), resume=True))
    assert resumed["step"] == 24
    assert log(run) == log(straight)
    assert (run / "state.safetensors").read_bytes() == (straight / "state.safetensors").read_bytes()
    ours, theirs = (load_encoder(r / "encoder.safetensors")[0].state_dict() for r in (run, straight))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def whole_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines(True) if line.endswith("\n")]


def test_resuming_a_finished_run_only_writes_its_results_again(cache, straight):
    before = (straight / "log.jsonl").read_text()
    (straight / "encoder.safetensors").unlink()  # as if killed between the last step and the export
    results = main(replace(config(cache, straight), resume=True))
    assert results["step"] == 24 and Path(results["encoder"]).exists()
    assert (straight / "log.jsonl").read_text() == before


def same_numbers(ours: list[dict], theirs: list[dict]) -> None:
    """Equal up to the order of sums in float32."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a["step"])


def test_micro_batches_change_nothing(cache, straight, tmp_path):
    main(config(cache, tmp_path / "micro", micro=2))
    same_numbers(log(tmp_path / "micro"), log(straight))


def test_two_ranks_compute_what_one_computes(cache, straight, tmp_path):
    run = tmp_path / "ranks"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(recipes.ROOT / "train_jepa.py"), *flags(config(cache, run))],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.strip().splitlines()) == 1 and json.loads(done.stdout)["step"] == 24
    same_numbers(log(run), log(straight))


def test_it_learns_without_collapsing(cache, tmp_path):
    main(config(cache, tmp_path / "long", steps=80, lr=2e-3, log_every=20, eval_every=0))
    first, *_, last = log(tmp_path / "long")
    assert last["val_loss"] < 0.75 * first["val_loss"]
    assert (
        first["predicted_cosine"] < 0.1 and last["predicted_cosine"] > 0.25
    )  # what tokens have in common doesn't count
    assert last["feature_rank"] > 6 and last["feature_std"] > 0.15


def test_an_encoder_can_be_started_from(cache, straight, tmp_path):
    init = str(straight / "encoder.safetensors")
    main(config(cache, tmp_path / "next", init=init, steps=1, d_model=64))  # the file's architecture counts
    _, meta = load_encoder(tmp_path / "next" / "encoder.safetensors")
    assert meta["architecture"]["d_model"] == 32
    assert meta["lineage"] == [{"file": init, "run": "straight", "step": 24}]
    assert log(tmp_path / "next")[0]["probe_condition"] == log(straight)[-1]["probe_condition"]


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(cache=("no/where",)), "no/where"),
        (dict(mask_ratio=1.0), "--mask-ratio"),
        (dict(patch_s=0.3), "--window-s"),
        (dict(patch_s=0.333), "--patch-s"),
        (dict(window_s=2.001), "window_s"),
        (dict(d_model=30, heads=4), "--d-model"),
        (dict(batch=0), "--batch"),
        (dict(steps=0), "--steps"),
        (dict(micro=-1), "--micro"),
        (dict(ema=1.5), "--ema"),
        (dict(mask="temporal", patch_s=2.0), "--mask temporal"),
        (dict(device="warp"), "--device"),
        (dict(init="missing.safetensors"), "missing.safetensors"),
        (dict(dataset_weights=("small=1", "tuh=2")), "--dataset-weights"),
        (dict(sampler="seizure"), "--sampler"),
    ],
)
def test_what_is_unusable_is_named_and_leaves_no_run_behind(changes, word, cache, tmp_path):
    with pytest.raises(Unusable, match=word):
        main(replace(config(cache, tmp_path / "x"), **changes))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("changes", [dict(sampler="subject"), dict(dataset_weights=("small=0.3", "wide=0.7"))])
def test_other_samplers(changes, cache, tmp_path):
    assert main(config(cache, tmp_path / "x", steps=1, **changes))["step"] == 1


@pytest.mark.parametrize(
    "changes", [dict(mask="random"), dict(mask="spatial"), dict(mask="temporal"), dict(max_channels=0)]
)
def test_other_masks(changes, cache, tmp_path):
    results = main(config(cache, tmp_path / "x", steps=2, **changes))
    assert math.isfinite(results["metrics"]["loss"])


@pytest.mark.parametrize(
    "changes",
    [
        dict(encoder="mamba"),
        dict(encoder="fno"),
        dict(encoder="hybrid"),
        dict(adapter="perceiver", queries=8),
        dict(adapter="nearest"),
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_other_encoders_learn_and_are_loaded_from_their_file(changes, cache, tmp_path):
    results = main(config(cache, tmp_path / "run", **changes))
    lines = log(tmp_path / "run")
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] and lines[-1]["feature_rank"] > 2
    encoder, meta = load_encoder(results["encoder"], Cache(cache))
    assert meta["architecture"].items() >= changes.items()
    assert sum(p.numel() for p in encoder.parameters()) == results["parameters"]


def test_a_step_without_a_finite_loss_is_never_taken(cache, tmp_path, monkeypatch):
    calls, honest = [], train_jepa.jepa_loss

    def sometimes_nan(model, teacher, part):
        calls.append(1)
        loss, z_sum_D = honest(model, teacher, part)
        return loss * (math.nan if len(calls) in (5, 6) else 1), z_sum_D

    monkeypatch.setattr(train_jepa, "jepa_loss", sometimes_nan)
    results = main(config(cache, tmp_path / "nan", steps=6))
    assert 1 <= results["metrics"]["skipped"] <= 2 and math.isfinite(results["metrics"]["loss"])
    monkeypatch.setattr(train_jepa, "jepa_loss", lambda *a: (honest(*a)[0] * math.nan, honest(*a)[1]))
    with pytest.raises(Failed, match="--lr"):
        main(config(cache, tmp_path / "hopeless"))


def test_windows_drawn_do_not_depend_on_ranks_or_micro_batches(cache):
    windows = Cache(cache).windows("train", 2.0, 1.0)
    cfg = config(cache, Path("x"))
    ids = np.arange(0, 48, 4)
    whole = by_index(train_jepa.draw(windows, ids, np.arange(12), cfg, 50, 3), ids)
    shares = [np.arange(r, 12, 3) for r in range(3)]
    split = [by_index(train_jepa.draw(windows, ids[s], s, replace(cfg, micro=1), 50, 3), ids[s]) for s in shares]
    split = {k: v for part in split for k, v in part.items()}
    assert whole.keys() == split.keys() and len(whole) == 12
    for key, (x, targets) in whole.items():
        assert torch.equal(x, split[key][0]) and targets == split[key][1]


def by_index(parts: list, ids: np.ndarray) -> dict:
    """Signal and targets of every window, by a fingerprint of the signal."""
    found = {}
    for p in parts:
        for b in range(len(p.x_BCT)):
            real = slice(None) if p.masks.target_real_BM is None else p.masks.target_real_BM[b]
            found[round(float(p.x_BCT[b].double().sum()), 6)] = (p.x_BCT[b], p.masks.target_BM[b][real].tolist())
    assert len(found) == len(ids)
    return found


def test_base_and_full_presets_take_a_step_in_shape():
    for name in ("base", "full"):
        cfg = command.parse(Config, ["--preset", name], "", PRESETS)
        assert cfg.preset == name and cfg.max_channels == 0 and cfg.steps is None and cfg.epochs == 200
    cfg = command.parse(Config, ["--preset", "base", "--batch", "8"], "", PRESETS)
    assert (cfg.d_model, cfg.layers, cfg.heads, cfg.batch, cfg.lr) == (512, 12, 8, 8, 1e-4)


@pytest.mark.slow
def test_base_preset_trains_on_a_cpu(cache, tmp_path):
    cfg = command.parse(Config, ["--preset", "base", "--batch", "4", "--steps", "2"], "", PRESETS)
    cfg = replace(cfg, cache=(str(cache),), name=str(tmp_path / "base"), val_windows=4, probe_windows=20)
    assert main(cfg)["parameters"] > 37e6


@pytest.mark.slow
def test_compiled_equals_eager(cache, tmp_path):
    for name in ("eager", "compiled"):
        main(config(cache, tmp_path / name, steps=3, compile=name == "compiled"))
    same_numbers(log(tmp_path / "compiled"), log(tmp_path / "eager"))
