"""train_supervised.py on a small cohort: it learns what is there, resumes exactly, and is the same however the batch is divided."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib import command, inference, judgement, seizures
from lib.batches import read_parts
from lib.cache import Cache
from lib.errors import Unusable
from lib.lineage import digest, trained_on
from lib.models import Architecture, build_encoder, load_encoder, save_encoder, signal_meta
from lib.readouts import load_model
from lib.run import MEASURED
from lib.targets import Examples, Target, read_targets
from lib.tensors import load_tensors
from tests import recipes, task_cases
from tests.recipes import flags, log
from train_supervised import PRESETS, Config, main

TINY = dict(d_model=32, layers=2, heads=2, patch_s=0.5, batch=12, steps=24, log_every=1, save_every=5, eval_every=8)
TINY |= dict(filters=6, dtype="float32", resamples=20, baseline_windows=200, lr=2e-3, occlusion_windows=0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return task_cases.build(tmp_path_factory.mktemp("tasks"))


def config(cache: Path, run: Path, **changes) -> Config:
    return replace(Config(cache=(str(cache),), name=str(run)), **(TINY | changes))


@pytest.fixture(scope="session")
def straight(cache, tmp_path_factory) -> Path:
    """A run of two targets that nothing interrupted; others are compared with it."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    results = main(config(cache, run, target=("challenge1", "challenge2"), balance="uncertainty", occlusion_windows=8))
    assert results["step"] == 24 and results["model"] == str(run / "model.safetensors")
    return run


def test_a_run_leaves_what_it_promises(straight, cache):
    assert {p.name for p in straight.iterdir()} >= {
        "config.json",
        "log.jsonl",
        "curves.png",
        "model.safetensors",
        "scores.json",
        "predictions.csv",
        "report.html",
    }
    lines = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    keys = {"step", "loss", "loss_challenge1", "loss_challenge2", "lr", "grad_norm", "skipped", "rollbacks", *MEASURED}
    assert [line["step"] for line in lines] == list(range(25)) and all(keys <= line.keys() for line in lines[1:])
    watched = {"val_loss", "val_challenge1_nrmse", "val_challenge2_nrmse"}
    assert [line["step"] for line in lines if watched <= line.keys()] == [0, 8, 16, 24]
    decoder, meta, _ = load_model(straight / "model.safetensors", Cache(cache))
    assert [t.name for t in decoder.targets] == ["challenge1", "challenge2"] and decoder.targets[0].unit == "s"
    assert meta["window_s"] == 2 and meta["cache"] == Cache(cache).fingerprint and len(meta["subjects"]) == 6
    rows = json.loads((straight / "scores.json").read_text())
    models = {(row["target"], row["model"]) for row in rows}
    assert {
        ("challenge1", m) for m in ("model", "constant", "band_power", "waveform", "latency", "tangent_space")
    } <= models
    assert decoder.reading.kind == "latency" and decoder.readout.latency.log_sharpness.item() != 0
    assert all(row["low"] <= row["high"] for row in rows if row["low"] is not None)


def test_the_model_that_is_kept_is_the_best_on_val(straight):
    by_step = {line["step"]: line["val_loss"] for line in log(straight) if "val_loss" in line}
    _, meta, _ = load_model(straight / "model.safetensors")
    assert by_step[meta["step"]] == min(by_step.values())


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_ends_in_the_same_log_and_model(how, cache, straight, tmp_path):
    run = tmp_path / "broken"
    cfg = config(cache, run, target=("challenge1", "challenge2"), balance="uncertainty")
    process = recipes.start(*flags(cfg), script="train_supervised.py")
    deadline = time.monotonic() + 200
    while not (run / "log.jsonl").exists() or '"step": 7' not in (run / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    assert process.wait(60) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert not (run / "model.safetensors").exists()  # it was in the middle
    assert main(replace(cfg, resume=True))["step"] == 24
    assert log(run) == log(straight)
    assert (run / "state.safetensors").read_bytes() == (straight / "state.safetensors").read_bytes()
    ours, theirs = (load_model(r / "model.safetensors")[0].state_dict() for r in (run, straight))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def same_numbers(ours: list[dict], theirs: list[dict]) -> None:
    """Equal up to the order of sums in float32."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-3), (name, a["step"])


def test_micro_batches_change_nothing(cache, straight, tmp_path):
    main(config(cache, tmp_path / "micro", target=("challenge1", "challenge2"), balance="uncertainty", micro=5))
    same_numbers(log(tmp_path / "micro"), log(straight))


@pytest.mark.slow
def test_two_ranks_compute_what_one_computes(cache, straight, tmp_path):
    cfg = config(cache, tmp_path / "ranks", target=("challenge1", "challenge2"), balance="uncertainty")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, str(recipes.ROOT / "train_supervised.py"), *flags(cfg)]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.strip().splitlines()) == 1 and json.loads(done.stdout)["step"] == 24
    same_numbers(log(tmp_path / "ranks"), log(straight))


def test_it_learns_response_times(cache, tmp_path):
    """The wave at the button press is plain to see."""
    results = main(config(cache, tmp_path / "rt", readout="prelocal", steps=60, eval_every=20, lr=5e-3, batch=24))
    assert results["metrics"]["challenge1_nrmse"] < 0.8 and results["intervals"]["challenge1_nrmse"][1] < 1
    assert results["baselines"]["constant"]["challenge1_nrmse"][0] == pytest.approx(1, abs=0.05)
    assert results["baselines"]["waveform"]["challenge1_nrmse"][0] < 0.8


def test_test_is_opened_by_evaluate_alone_and_says_so(straight, cache, tmp_path, capfd):
    cfg = Config(
        cache=(str(cache),), name=str(tmp_path / "test"), evaluate=str(straight / "model.safetensors"), resamples=20
    )
    results = main(cfg)
    told = capfd.readouterr().err
    assert results["scored"] == "test" and results["subjects"] == 2 and "THE TEST SPLIT IS OPEN" in told
    assert results["cache"] == [str(cache)] and f"subjects of {cache}" in told and results["unknown_classes"] == {}
    assert {"challenge1_nrmse", "challenge2_nrmse", "challenge_score"} <= results["metrics"].keys()
    lines = (tmp_path / "test" / "predictions.csv").read_text().splitlines()[1:]
    assert {line.split("/")[1][:3] for line in lines} and not any("s02_" in line for line in lines)
    assert "test_opened" in (tmp_path / "test" / "log.jsonl").read_text()


@pytest.mark.slow
def test_classes_of_events_by_any_readout(cache, tmp_path):
    for readout in ("mean", "attention", "prelocal", "postlocal", "contextual"):
        words = dict(
            target=("eyes_open+eyes_closed",),
            readout=readout,
            window_s=2.0,
            baseline_windows=0,
            steps=40,
            eval_every=40,
        )
        results = main(config(cache, tmp_path / readout, **words))
        assert results["metrics"]["eyes_open+eyes_closed_balanced_accuracy"] > 0.75, readout


def test_seizures_are_found_and_written(cache, tmp_path):
    words = dict(target=("seizure",), where=("task=szMonitoring",), window_s=8.0, steps=40, eval_every=20)
    results = main(config(cache, tmp_path / "sz", **words))
    assert results["metrics"]["seizure_szcore_f1"] == 1 and results["metrics"]["seizure_sample_f1"] > 0.8
    files = sorted((tmp_path / "sz" / "events").glob("*.tsv"))
    assert len(files) == 4
    onset, duration, kind, *_ = files[0].read_text().splitlines()[1].split("\t")
    assert kind == "sz" and float(onset) == pytest.approx(12, abs=2) and float(duration) == pytest.approx(12, abs=4)
    evaluated = main(Config(cache=(str(cache),), name=str(tmp_path / "sze"), evaluate=results["model"], resamples=20))
    assert evaluated["recordings"] == 2 and evaluated["metrics"]["seizure_szcore_f1"] == 1
    with pytest.raises(Unusable, match="not of the stretches"):
        main(Config(cache=(str(cache),), evaluate=results["model"], transfer="coral"))
    with pytest.raises(Unusable, match="no window is seizure in part"):
        main(config(cache, tmp_path / "none", **(words | {"where": ("task=Rest",)})))


@pytest.fixture(scope="session")
def encoder(cache, tmp_path_factory) -> Path:
    """An untrained encoder that says it was trained on the train split."""
    return write_encoder(cache, tmp_path_factory.mktemp("encoder") / "encoder.safetensors", ["train"])


def write_encoder(cache: Path, path: Path, splits: list[str], auxiliary: tuple[str, ...] = ()) -> Path:
    torch.manual_seed(0)
    opened = Cache(cache)
    encoder = build_encoder(Architecture(d_model=32, layers=2, heads=2, patch=50))
    encoder.embed.calibrate(opened.windows("train", 2.0, 2.0).read(range(0, 60, 3)).x_BCT.reshape(-1, 50))
    rows = [i for i, r in enumerate(opened.recordings) if r.split in splits]
    meta = signal_meta(opened) | trained_on(opened, rows, auxiliary) | {"run": "x", "step": 0, "lineage": []}
    save_encoder(path, encoder, meta)
    return path


EYES = dict(target=("eyes_open+eyes_closed",), window_s=2.0)


def test_a_probe_leaves_the_encoder_as_it_is(cache, encoder, tmp_path):
    for readout, transfer in (("mean", "none"), ("contextual", "none"), ("mean", "recentre")):
        run = tmp_path / f"{readout}-{transfer}"
        words = dict(mode="probe", init=str(encoder), readout=readout, transfer=transfer, baseline_windows=0)
        results = main(config(cache, run, **EYES, **words))
        assert results["mode"] == "probe" and results["step"] == 0
        assert results["metrics"]["eyes_open+eyes_closed_balanced_accuracy"] > 0.85
        decoder, meta, _ = load_model(run / "model.safetensors")
        theirs = load_encoder(encoder)[0].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in decoder.encoder.state_dict().items())
        assert meta["lineage"][0]["file"] == str(encoder)


def test_fine_tuning_warms_the_head_up_and_then_moves_lower_layers_less(cache, encoder, tmp_path):
    words = dict(
        init=str(encoder), head_warmup=0.5, unfreeze=0.25, lr_decay=0.3, keep=1, baseline_windows=0, occlusion_windows=0
    )
    results = main(config(cache, tmp_path / "ft", **EYES, **words, eval_every=0, clip=100.0))
    assert results["mode"] == "finetune"
    theirs = load_encoder(encoder)[0].state_dict()
    state = {
        k: v
        for k, v in load_tensors(tmp_path / "ft" / "state.safetensors")[0].items()
        if k.startswith("decoder.encoder.")
    }
    moved = {
        k.removeprefix("decoder.encoder."): float((v - theirs[k.removeprefix("decoder.encoder.")]).abs().max())
        for k, v in state.items()
    }
    assert moved["blocks.1.wide.weight"] > moved["blocks.0.wide.weight"] > moved["embed.samples.weight"] > 0
    frozen = main(config(cache, tmp_path / "frozen", **EYES, **(words | {"head_warmup": 1.0, "unfreeze": 0.0})))
    decoder = load_model(frozen["model"])[0]
    assert all(torch.equal(v, theirs[k]) for k, v in decoder.encoder.state_dict().items())


def test_response_times_start_from_louder_waveforms(cache, encoder, tmp_path):
    theirs = load_encoder(encoder)[0].embed.samples.weight
    words = dict(init=str(encoder), steps=1, lr=1e-30, eval_every=0, baseline_windows=0, occlusion_windows=0)
    for more, factor in (
        (dict(target=("challenge1",)), 5.0),
        (dict(target=("challenge1",), waveform=2.0), 2.0),
        (EYES, 1.0),
    ):
        results = main(config(cache, tmp_path / f"by-{factor:g}", **words, **more))
        torch.testing.assert_close(load_model(results["model"])[0].encoder.embed.samples.weight, factor * theirs)


def test_leaks_are_refused(cache, encoder, tmp_path):
    seen = write_encoder(cache, tmp_path / "seen.safetensors", ["train", "val"])
    told = write_encoder(cache, tmp_path / "told.safetensors", ["train"], ("externalizing",))
    with pytest.raises(Unusable, match="was trained on 4 of the"):
        main(config(cache, tmp_path / "a", init=str(seen)))
    with pytest.raises(Unusable, match="externalizing was an auxiliary target"):
        main(config(cache, tmp_path / "b", target=("challenge2",), init=str(told)))
    with pytest.raises(Unusable, match="was trained on"):  # folds score people of train
        main(config(cache, tmp_path / "c", **EYES, init=str(encoder), folds=3))
    assert not any((tmp_path / name).exists() for name in "abc")


def test_what_is_refused_leaves_no_run_and_loses_none(cache, encoder, tmp_path):
    run = tmp_path / "run"
    refused = (
        (dict(init=str(encoder), folds=3), "was trained on"),
        (dict(score_by="subject"), "changes within a subject"),
        (dict(init=str(encoder), shots=5000), "too few windows"),
    )
    for words, said in refused:
        with pytest.raises(Unusable, match=said):
            main(config(cache, run, **EYES, **words))
        assert not run.exists()
    run.mkdir()
    (run / "config.json").write_text("{}")
    for words, said in refused:
        with pytest.raises(Unusable, match=said):
            main(config(cache, run, **EYES, **words, overwrite=True))
        assert (run / "config.json").exists()


def test_training_starts_from_the_heads_of_a_probe(cache, encoder, tmp_path):
    words = EYES | dict(init=str(encoder), readout="sites", max_channels=0)
    main(config(cache, tmp_path / "probe", mode="probe", **words))
    main(config(cache, tmp_path / "tuned", steps=8, waveform=1.0, **words))
    main(config(cache, tmp_path / "bare", steps=8, waveform=1.0, fitted_head=False, **words))
    probe, tuned, bare = (log(tmp_path / name)[0]["val_loss"] for name in ("probe", "tuned", "bare"))
    assert tuned == pytest.approx(probe, rel=1e-4) and bare == pytest.approx(np.log(2), rel=1e-6)
    decoder = load_model(tmp_path / "tuned" / "best" / "step-000000.safetensors")[0]
    assert (
        decoder.reading.kind == "sites" and len(decoder.reading.sites) == 8 and decoder.heads[0].weight.abs().max() > 0
    )


def test_recentring_is_learned_with_and_kept_with_the_model(cache, tmp_path):
    run = tmp_path / "run"
    results = main(config(cache, run, **EYES, steps=8, transfer="recentre"))
    ways = results["baselines"]
    assert {"tangent_space", "tangent_space_recentred", "band_power_recentred", "hybrid"} <= ways.keys()
    state = load_tensors(run / "state.safetensors")[0]
    offsets = next(t for name, t in state.items() if name.endswith("offset_SX"))
    assert (
        len(offsets) == 6
        and offsets.abs().sum(1).min() > 0
        and offsets.sum(0).abs().max() < 0.5 * offsets.abs().sum(0).max()
    )
    test = main(config(cache, tmp_path / "test", evaluate=str(run / "model.safetensors")))
    assert test["transfer"] == "recentre" and "tangent_space_recentred" in test["baselines"]


def test_a_probe_takes_two_folds_because_it_chooses_nothing(cache, encoder, tmp_path):
    run = tmp_path / "run"
    words = EYES | dict(mode="probe", init=str(encoder), allow_leak=True, baseline_windows=0)
    results = main(config(cache, run, folds=2, **words))
    assert len(results["folds"]) == 2
    subjects = [set(load_tensors(run / f"fold-{i}" / "model.safetensors")[1]["subjects"]) for i in (0, 1)]
    assert not subjects[0] & subjects[1] and len(subjects[0] | subjects[1]) == 10


@pytest.mark.slow
def test_folds_score_every_subject_once_by_a_model_that_never_saw_it(cache, tmp_path):
    results = main(
        config(cache, tmp_path / "folds", **EYES, folds=3, steps=16, occlusion_windows=0, baseline_windows=100)
    )
    assert results["scored"].startswith("3 folds") and len(results["folds"]) == 3
    scored = []
    for fold in range(3):
        lines = (tmp_path / "folds" / f"fold-{fold}" / "predictions.csv").read_text().splitlines()[1:]
        scored.append({line.split("_Rest")[0] for line in lines})
        trained = set(load_model(tmp_path / "folds" / f"fold-{fold}" / "model.safetensors")[1]["subjects"])
        assert trained and not trained & {digest(f"tasks/{name.split('/')[1][1:3]}") for name in scored[-1]}
    assert len(set.union(*scored)) == sum(map(len, scored)) == 10  # train and val, never test
    assert {"band_power", "constant"} <= results["baselines"].keys()
    assert (tmp_path / "folds" / "report.html").exists()
    again = main(
        replace(
            config(cache, tmp_path / "folds", **EYES, folds=3, steps=16, occlusion_windows=0, baseline_windows=100),
            resume=True,
        )
    )
    assert again["metrics"] == results["metrics"]


def test_few_shots_by_prototypes(cache, encoder, tmp_path):
    results = main(config(cache, tmp_path / "shots", **EYES, init=str(encoder), shots=2, episodes=40))
    name = "eyes_open+eyes_closed_2_shots_balanced_accuracy"
    for intervals in (results["intervals"], results["episode_intervals"]):
        low, high = intervals[name]
        assert 0.7 < low < results["metrics"][name] < high or results["metrics"][name] == 1
    assert results["baselines"]["constant"][name] == 0.5 and "band_power" in results["baselines"]
    with pytest.raises(Unusable, match="needs one target of classes"):
        main(config(cache, tmp_path / "no", target=("age",), init=str(encoder), shots=2))


def test_transfer_and_autopsy(cache, straight, tmp_path):
    model = str(straight / "model.safetensors")
    base = dict(evaluate=model, resamples=20, cache=(str(cache),), occlusion_windows=0)
    plain = main(Config(name=str(tmp_path / "plain"), autopsy=True, **base))
    assert {row["layer"] for row in plain["autopsy"]} >= {"encoder.blocks.0.wide", "heads.0", "readout.filters.weight"}
    assert len(plain["worst"]) == 10 and plain["worst"][0]["loss"] >= plain["worst"][-1]["loss"]
    assert "Inside the model" in (tmp_path / "plain" / "report.html").read_text()
    for how in ("recentre", "normalise", "adabn", "coral"):
        moved = main(Config(name=str(tmp_path / how), transfer=how, **base))
        assert moved["metrics"]["challenge1_nrmse"] != plain["metrics"]["challenge1_nrmse"], how


@pytest.mark.slow
def test_lineages_end_in_one_table(cache, tmp_path):
    words = ["--lineage", "full", "no_contrastive", "no_auxiliary", "supervised_only", "--pretrain-steps", "4"]
    cfg = config(cache, tmp_path / "lineages", target=("challenge1",), steps=4, eval_every=4, log_every=2)
    status, results, err = recipes.run(*flags(cfg), *words, script="train_supervised.py", timeout_s=900)
    assert status == 0, err[-2000:]
    table = (tmp_path / "lineages" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:6]] == [
        "full",
        "no_contrastive",
        "no_auxiliary",
        "supervised_only",
    ]
    meta = load_model(tmp_path / "lineages" / "full" / "model.safetensors")[1]
    assert len(meta["lineage"]) == 2 and "externalizing" in meta["lineage"][0]["auxiliary"]
    assert not load_model(tmp_path / "lineages" / "supervised_only" / "model.safetensors")[1]["lineage"]
    other = replace(cfg, target=("challenge2",))
    status, _, err = recipes.run(*flags(other), *words, script="train_supervised.py", timeout_s=900)
    assert status == 2 and "was made with other flags" in err
    status, results, err = recipes.run(
        *flags(other), "--lineage", "supervised_only", "--overwrite", script="train_supervised.py", timeout_s=900
    )
    assert status == 0 and "supervised_only_challenge2_nrmse" in results["metrics"], err[-2000:]


def test_flags_that_make_no_sense_are_refused(cache, tmp_path):
    for words, said in (
        (dict(target=("nothing",)), "no nothing in .*columns: age.*events: .*eyes_closed"),
        (dict(target=("seizure", "age")), "can't go with other targets"),
        (dict(mode="probe"), "needs an encoder"),
        (dict(target=("age",), where=("colour=red",)), "there are: age"),
        (dict(target=("age",), where=("task=Sleep",)), "no recording has task Sleep; there are: Rest"),
        (dict(waveform=-1.0), "--waveform"),
        (dict(batch=100_000), "--batch 100000 is more than the"),
        (dict(window_s=2.3), "no whole number of patches"),
        (dict(target=("age",), readout="latency"), "a target that is a time"),
        (dict(target=("age",), task_weights=("age=0",)), "expected a number above 0"),
        (dict(target=("age",), task_weights=("age=nan",)), "expected a number above 0"),
        (dict(target=("age",), occlusion_windows=-5), "--occlusion-windows"),
        (dict(evaluate="some.safetensors", window_s=2.0), "leave --window-s out"),
        (dict(lineage=("full",), init="some.safetensors"), "leave --init and --mode out"),
        (dict(shots=2, init="some.safetensors", transfer="coral"), "leave --transfer"),
        (dict(target=("challenge1", "age"), task_weights=("sex=1",)), "no such target"),
        (dict(target=("challenge1", "age"), task_weights=("age=much",)), "expected TARGET=NUMBER"),
        (dict(target=("seizure",), transfer="coral"), "not of the stretches"),
    ):
        with pytest.raises(Unusable, match=said):
            main(config(cache, tmp_path / "no", **words))
    assert not (tmp_path / "no").exists()


def test_presets_are_configurations():
    for preset, values in PRESETS.items():
        cfg = command.parse(Config, ["--preset", preset], "", PRESETS)
        assert all(getattr(cfg, k) == v for k, v in values.items())
    assert np.isfinite(Config().lr)


class Oracle(torch.nn.Module):
    """Says of each stretch of a window whether it is seizure, by where the window is: the samples are their own numbers."""

    def __init__(self, examples: Examples, stretch_s: float):
        super().__init__()
        self.examples, self.stretch_s, self.nothing = examples, stretch_s, torch.nn.Parameter(torch.zeros(1))

    def forward(self, part):
        return part

    def say(self, part) -> list[torch.Tensor]:
        return [torch.from_numpy(self.examples.seizures(part.recording_B, part.start_B, self.stretch_s))]


@pytest.mark.parametrize("stretch_s", [0.25, 0.125, 1 / 30])  # 25, 12.5 and 3.33 samples
def test_stretches_of_no_whole_number_of_samples_keep_time(cache, monkeypatch, stretch_s):
    opened = Cache(cache)
    row = next(i for i, found in enumerate(judgement.annotated(opened, range(len(opened.recordings)))) if len(found))
    examples = Examples(opened, read_targets(opened, ["seizure"], [row], 400), [row], 4.0, 2.0)

    def placed(cache, recording_B, start_B, samples, index_B, *rest):
        for part in read_parts(cache, recording_B, start_B, samples, index_B, *rest):
            part.start_B = start_B[part.index_B - index_B[0]]
            yield part

    monkeypatch.setattr(inference, "read_parts", placed)
    merged, intervals = [], opened.intervals
    monkeypatch.setattr(opened, "intervals", lambda label: merged.append(label) or intervals(label))
    model = inference.Inference(Oracle(examples, stretch_s), "float32", 4, 0, 0, stretch_s)
    line, *_ = model.timelines(examples, [row, row + 1, row + 2])
    assert len(merged) == 1  # all recordings' seizures are merged, which takes a while, once
    assert len(line.probability_T) * stretch_s == pytest.approx(line.seconds, abs=stretch_s)
    found_N2 = seizures.detect(line.probability_T, 1 / stretch_s, 0.5, 0, 0, 0)
    assert found_N2 == pytest.approx(line.annotated_N2, abs=1.01 * stretch_s)


def test_what_is_averaged_per_subject_is_scored_against_the_subjects_mean():
    people = SimpleNamespace(recordings=[SimpleNamespace(subject=s) for s in "aab"])
    number = Target("x", scored_by="subject", mean=1.0, std=2.0)
    y_BK = np.array([[0.0], [1.0], [2.0]])
    u = judgement.units(number, 0, number.decode(y_BK), y_BK, np.arange(3), people)
    assert u.y_N.tolist() == [2.0, 5.0] == u.said_N[:, 0].tolist()
    kinds = Target("x", classes=("p", "q"), scored_by="subject", shares=(0.9, 0.1), weights=(1.0, 1.0))
    assert judgement.constant(kinds, 2).tolist() == [[0.9, 0.1]] * 2


def test_labels_with_commas_stay_one_column(cache):
    said = judgement.Said([np.eye(2)], np.array([[0.0], [1.0]]), np.zeros(2, int), np.zeros(2, int), np.zeros(1))
    text = judgement.predictions_csv([Target("x", classes=("1,2", 'q"'))], said, Cache(cache))
    assert [row[3:5] for row in csv.reader(text.splitlines())][1:] == [["1,2", "1,2"], ['q"', 'q"']]


def test_each_fold_of_seizures_says_its_own_threshold(cache, tmp_path, monkeypatch):
    chosen = iter([{"threshold": t, "close_s": 0.0, "open_s": 0.0, "shortest_s": 0.0} for t in (0.15, 0.45, 0.85)])
    monkeypatch.setattr(judgement, "choose_detection", lambda *_: next(chosen))
    words = dict(where=("task=szMonitoring",), window_s=8.0, stride_s=8.0, steps=1, eval_every=0, baseline_windows=0)
    results = main(config(cache, tmp_path / "folds", target=("seizure",), folds=3, **words))
    assert [fold["detection"]["threshold"] for fold in results["folds"]] == [0.15, 0.45, 0.85]
    assert "detection" not in results  # the last one's is not that of all
    assert "none is drawn: 0.15, 0.45, 0.85" in (tmp_path / "folds" / "report.html").read_text()


def test_folds_that_mean_different_things_are_refused(cache, tmp_path):
    with pytest.raises(Unusable, match="has no .* to learn from"):
        main(config(cache, tmp_path / "folds", target=("age:classification",), folds=3))
    assert not (tmp_path / "folds").exists()
