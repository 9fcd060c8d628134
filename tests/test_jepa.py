"""train_jepa.py on a small cache of two montages: it learns, resumes exactly, and is the same however the batch is divided."""

import importlib
import json
import math
import os
import re
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
from lib.traits import load_heads
from tests import recipes
from tests.recipes import flags, log
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
                if s % 3 == 0:
                    x_CT[s // 3] = 0  # a dead electrode
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


@pytest.fixture(scope="session")
def straight(cache, tmp_path_factory) -> Path:
    """A run that nothing interrupted; the others are compared with it."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    results = main(config(cache, run))
    assert results["step"] == 24 and results["dtype"] == "float32" and Path(results["encoder"]).exists()
    return run


def test_the_readmes_python_gives_tokens_of_every_window(straight, cache):
    (program,) = re.findall(r"^```python\n(.+?)^```", (recipes.ROOT / "README.md").read_text(), re.M | re.S)
    scope = {}
    exec(program.replace("cache/demo", str(cache)).replace("runs/jepa-1", str(straight)), scope)
    batch, encoder = scope["batch"], scope["encoder"]
    patches = batch.x_BCT.shape[2] // encoder.architecture.patch
    assert scope["z_BND"].shape == (16, batch.x_BCT.shape[1] * patches, encoder.architecture.d_model)
    assert scope["features_BD"].shape == (16, encoder.architecture.d_model)


def test_a_run_leaves_what_it_promises(straight, cache):
    names = {
        "config.json",
        "command.txt",
        "code",
        "log.jsonl",
        "state.safetensors",
        "state.previous.safetensors",
        "best",
        "encoder.safetensors",
        "curves.png",
    }
    assert {p.name for p in straight.iterdir()} == names
    lines = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(25))
    keys = {
        "step",
        "loss",
        "loss_latent",
        "loss_aux",
        "loss_regularised",
        "lr",
        "grad_norm",
        "skipped",
        "rollbacks",
        *MEASURED,
    }
    assert all(keys <= line.keys() for line in lines[1:])
    watched = {"val_loss", "feature_rank", "feature_std", "teacher_cosine", "predicted_cosine"}
    watched |= {"subject_share", "stimulus_share"}
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


def test_raw_samples_start_as_loud_as_asked_and_the_file_says_so(cache, tmp_path):
    weights = []
    for factor in (1.0, 5.0):
        run = tmp_path / f"by-{factor:g}"
        main(config(cache, run, steps=1, lr=1e-30, waveform=factor, keep=1))
        encoder, meta = load_encoder(run / "encoder.safetensors")
        assert meta["waveform"] == factor
        weights.append(encoder.embed.samples.weight)
    torch.testing.assert_close(weights[1], 5 * weights[0])


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
    done = torchrun(config(cache, tmp_path / "ranks"))
    assert len(done.stdout.strip().splitlines()) == 1 and json.loads(done.stdout)["step"] == 24
    same_numbers(log(tmp_path / "ranks"), log(straight))


def torchrun(cfg: Config) -> subprocess.CompletedProcess:
    """The command on two gloo processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(recipes.ROOT / "train_jepa.py"), *flags(cfg)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_everything_at_once_is_the_same_in_micro_batches_and_on_two_ranks(cache, tmp_path):
    changes = dict(steps=6, eval_every=3, predictor="contextual", aux=("age", "sex"), vicreg=0.3, sigreg=0.03)
    changes |= dict(schedule="restarts", probe_epochs=0.5)
    main(config(cache, tmp_path / "one", **changes))
    main(config(cache, tmp_path / "micro", micro=2, **changes))
    torchrun(config(cache, tmp_path / "ranks", **changes))
    for other in ("micro", "ranks"):
        same_numbers(log(tmp_path / other), log(tmp_path / "one"))
    ours, theirs = (load_heads(tmp_path / run / "traits.safetensors")[0].state_dict() for run in ("one", "ranks"))
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in ours)
    line = log(tmp_path / "one")[-1]
    parts = line["loss_latent"] + 0.45 * line["loss_aux"] + line["loss_regularised"]
    assert line["loss"] == pytest.approx(parts) and min(line["loss_aux"], line["loss_regularised"]) > 0


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
    assert len(meta["lineage"]) == 1 and meta["lineage"][0]["file"] == init
    assert (meta["lineage"][0]["run"], meta["lineage"][0]["step"]) == ("straight", 24)
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
        (dict(batch=100_000), "--batch 100000 is more than the"),
        (dict(steps=0), "--steps"),
        (dict(micro=-1), "--micro"),
        (dict(ema=1.5), "--ema"),
        (dict(mask="temporal", patch_s=2.0), "--mask temporal"),
        (dict(device="warp"), "--device"),
        (dict(init="missing.safetensors"), "missing.safetensors"),
        (dict(dataset_weights=("small=1", "tuh=2")), "--dataset-weights"),
        (dict(dataset_weights=("small",)), "--dataset-weights small: expected"),
        (dict(dataset_weights=("small=inf",)), "--dataset-weights small=inf: expected"),
        (dict(cache=()), "--cache names no directory"),
        (dict(patch_s=2.0, max_channels=1), "1 good tokens can't be split"),
        (dict(sampler="seizure"), "--sampler"),
        (dict(aux=("shoe_size",)), "--aux shoe_size"),
        (dict(batch=1, vicreg=1.0), "--vicreg"),
        (dict(keep=-1), "--keep"),
        (dict(val_windows=1), "--val-windows"),
    ],
)
def test_what_is_unusable_is_named_and_leaves_no_run_behind(changes, word, cache, tmp_path):
    with pytest.raises(Unusable, match=word):
        main(replace(config(cache, tmp_path / "x"), **changes))
    assert not (tmp_path / "x").exists()


def test_an_adapter_by_places_says_which_channels_have_none(tmp_path, capsys):
    (folder := tmp_path / "raw").mkdir()
    rng = np.random.default_rng(0)
    for s in range(4):
        np.save(folder / f"s{s}.npy", recipes.noise_uv(rng, 4, 2000).astype(np.float32))
    rule = 'name = "x"\npattern = "s(?P<subject>\\\\d)\\\\.npy"\nrate_hz = 100\nunit = "uV"\nchannels = '
    for names, said in (
        ("'Cz', 'B', 'C', 'D'", "12 of 16 channels"),
        ("'A', 'B', 'C', 'D'", "no channel of the cache"),
    ):
        (folder / "dataset.toml").write_text(f"{rule}[{names}]\n[split]\nval = ['0']\n")
        status, _, err = recipes.run("--source", folder, "--cache", tmp_path / said[:2], "--workers", 1)
        assert status == 0, err
        cfg = config(tmp_path / said[:2], tmp_path / f"run{said[:2]}", adapter="nearest", queries=4, steps=1)
        if said.startswith("no"):
            with pytest.raises(Unusable, match=said):
                main(cfg)
        else:
            assert main(cfg)["step"] == 1 and said in capsys.readouterr().err


@pytest.mark.parametrize("changes", [dict(sampler="subject"), dict(dataset_weights=("small=0.3", "wide=0.7"))])
def test_other_samplers(changes, cache, tmp_path):
    assert main(config(cache, tmp_path / "x", steps=1, **changes))["step"] == 1


def test_the_last_line_says_what_matters_first_and_probes_by_label(cache, tmp_path):
    results = main(config(cache, tmp_path / "x", steps=1))
    assert [*results][:4] == ["run", "step", "metrics", "probes"] and [*results["metrics"]][0] == "val_loss"
    assert not any(name.startswith("probe_") for name in results["metrics"])
    last = log(tmp_path / "x")[-1]
    told = results["probes"]["condition"]
    assert (
        told["score"] == last["probe_condition"] and told["auroc_bandpower"] == last["probe_condition_auroc_bandpower"]
    )
    assert told["score_untrained"] == log(tmp_path / "x")[0]["probe_condition"] and "subjects" in told["protocol"]


def test_a_run_that_collapses_says_so_loudly_and_stops_if_asked(cache, straight, tmp_path, capsys):
    # no slow teacher, a rate to fall over with, and nothing that keeps what visible tokens show
    changes = dict(ema=0.0, lr=1e-2, visible=0.0, eval_every=8)
    results = main(config(cache, tmp_path / "warned", **changes))
    alarms = [line["step"] for line in log(tmp_path / "warned") if "alarm" in line]
    assert alarms and "feature_std" in results["metrics"]["alarm"] and "COLLAPSE at step" in capsys.readouterr().err
    assert not any("alarm" in line for line in log(straight))
    with pytest.raises(Failed, match=f"collapsed at step {alarms[0]}"):
        main(config(cache, tmp_path / "stopped", collapse="stop", **changes))
    assert log(tmp_path / "stopped")[-1]["step"] == alarms[0]
    with pytest.raises(Failed, match="collapsed at step 24"):  # watched once, at the end
        main(config(cache, tmp_path / "late", collapse="stop", **changes | dict(eval_every=0)))
    results = main(config(cache, tmp_path / "mended", sigreg=0.05, **changes))
    assert "alarm" not in results["metrics"] and results["metrics"]["feature_std"] > 0.5


def test_the_best_encoders_are_kept(straight, cache):
    values = {line["step"]: line["val_loss"] for line in log(straight) if line["step"] in (8, 16, 24)}
    kept = sorted((straight / "best").iterdir())
    assert [p.name for p in kept] == [f"step-{step:06d}.safetensors" for step in sorted(values)]
    assert load_encoder(kept[0], Cache(cache))[1]["step"] == 8


def test_auxiliary_targets_are_stored_left_out_of_probes_and_guarded(cache, tmp_path):
    main(config(cache, tmp_path / "aux", steps=8, aux=("age", "sex:classification")))
    heads, meta = load_heads(tmp_path / "aux" / "traits.safetensors")
    assert [t.name for t in heads.traits] == ["age", "sex"] and heads.traits[1].classes == ("F", "M")
    assert meta["auxiliary"] == ["age", "sex"] and 20 < heads.traits[0].mean < 50
    lines = log(tmp_path / "aux")
    assert not any(name.startswith(("probe_age", "probe_sex")) for line in lines for name in line)
    assert "probe_condition" in lines[-1]
    init = str(tmp_path / "aux" / "encoder.safetensors")
    main(config(cache, tmp_path / "next", init=init, steps=1))  # what it was told once stays out of probes
    assert "probe_age" not in log(tmp_path / "next")[-1]
    main(config(cache, tmp_path / "asked", init=init, steps=1, allow_leak=True))
    assert "probe_age" in log(tmp_path / "asked")[-1]


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


class Faults:
    """jepa_loss with a fault: `broken(call, part)` is asked before every one of the loop's calls."""

    def __init__(self, monkeypatch, broken):
        self.honest, self.broken, self.calls = train_jepa.jepa_loss, broken, 0
        monkeypatch.setattr(train_jepa, "jepa_loss", self)

    def __call__(self, model, teacher, part, visible):
        latent_B, *means = self.honest(model, teacher, part, visible)
        if torch.is_grad_enabled() and model.encoder.embed.samples.weight.requires_grad and len(part.x_BCT) > 3:
            self.calls += 1  # the two and three windows whose cost is counted are no step
        return latent_B * (math.nan if self.broken(self.calls) else 1), *means


def test_a_step_without_a_finite_loss_is_never_taken(cache, tmp_path, monkeypatch):
    Faults(monkeypatch, lambda call: call in (5, 6))
    results = main(config(cache, tmp_path / "nan", steps=6))
    assert 1 <= results["metrics"]["skipped"] <= 2 and math.isfinite(results["metrics"]["loss"])
    skipped = [line for line in log(tmp_path / "nan") if line.get("event") == "skipped"]
    assert len(skipped) == results["metrics"]["skipped"] and len(skipped[0]["windows"]) == TINY["batch"]


def test_weights_gone_bad_are_rolled_back_at_a_lower_rate(cache, tmp_path, monkeypatch):
    Faults(monkeypatch, lambda call: 15 <= call < 21)  # three steps and one after the rollback
    results = main(config(cache, tmp_path / "bad"))
    lines = log(tmp_path / "bad")
    back = [line for line in lines if line.get("event") == "rollback"]
    assert len(back) == 1 and back[0]["scale"] == 0.5 and back[0]["step"] < back[0]["after"]
    assert (
        results["step"] == 24 and results["metrics"]["rollbacks"] == 1 and lines[-1]["val_loss"] < lines[0]["val_loss"]
    )
    Faults(monkeypatch, lambda call: True)
    with pytest.raises(Failed, match="--lr"):
        main(config(cache, tmp_path / "hopeless"))
    assert (tmp_path / "hopeless" / "failed.json").exists()


def test_out_of_memory_halves_micro_batches_and_changes_nothing(cache, straight, tmp_path, monkeypatch):
    honest = train_jepa.jepa_loss

    def small_memory(model, teacher, part, visible):
        if len(part.x_BCT) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory (a stand-in: this machine has no GPU)")
        return honest(model, teacher, part, visible)

    monkeypatch.setattr(train_jepa, "jepa_loss", small_memory)
    main(config(cache, tmp_path / "small"))
    lines = log(tmp_path / "small")
    assert [line["micro"] for line in lines if line.get("event") == "out_of_memory"]
    same_numbers([line for line in lines if "event" not in line], log(straight))


def test_windows_drawn_do_not_depend_on_ranks_or_micro_batches(cache):
    windows = Cache(cache).windows("train", 2.0, 1.0)
    cfg = config(cache, Path("x"))
    ids = np.arange(0, 48, 4)
    whole = by_index(train_jepa.draw(windows, ids, np.arange(12), cfg, 0, 50, 3), ids)
    shares = [np.arange(r, 12, 3) for r in range(3)]
    split = [by_index(train_jepa.draw(windows, ids[s], s, cfg, 1, 50, 3), ids[s]) for s in shares]
    split = {k: v for part in split for k, v in part.items()}
    assert whole.keys() == split.keys() and len(whole) == 12
    for key, (x, targets) in whole.items():
        alone_CT, same = split[key]
        assert torch.equal(x[: len(alone_CT)], alone_CT) and not x[len(alone_CT) :].any() and targets == same


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


@pytest.mark.parametrize("script", ["train_jepa", "train_contrastive", "train_flow"])
def test_a_val_split_without_a_window_is_said_with_the_mend(script, tmp_path, capsys):
    folder = recipes.write_small(tmp_path / "raw", subjects=3)
    for condition in ("rest", "task"):
        short_CT = recipes.noise_uv(np.random.default_rng(0), len(recipes.NAMES), 2 * 200)
        write_edf(folder / f"s02_{condition}.edf", short_CT, 200, recipes.NAMES, [])
    with open(folder / "dataset.toml", "a") as file:
        file.write('[split]\ntrain = ["00", "01"]\nval = ["02"]\n')
    status, results, err = recipes.run("--source", folder, "--cache", tmp_path / "cache", "--workers", 1)
    assert status == 0, err
    phase = importlib.import_module(script)
    own = (
        dict(window=512, calibrate=0)
        if script == "train_flow"
        else dict(pairs=("augment:1",))
        if "con" in script
        else {}
    )
    size = dict(d_model=16, layers=1, heads=2, batch=4, steps=1, max_channels=4, dtype="float32")
    results = phase.main(phase.Config(cache=(str(tmp_path / "cache"),), name=str(tmp_path / "run"), **size, **own))
    assert results["step"] == 1
    assert re.search(r"no recording of val \(2\) holds a window of .*\[split\]", capsys.readouterr().err)
