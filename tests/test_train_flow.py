"""train_flow.py on two small caches of different rates: it learns, resumes exactly, samples into a cache, and is the same however divided."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

import train_flow
from lib import flow, generator
from lib.cache import Cache
from lib.corpus import Corpus
from lib.edf import write_edf
from lib.errors import Failed, Unusable
from lib.models import Architecture, build_encoder, load_encoder, save_encoder, signal_meta
from lib.run import MEASURED
from lib.tensors import load_tensors, save_tensors
from lib.whitened import fit_target
from tests import recipes
from tests.test_jepa import log
from train_flow import EVAL_STEP, Config, draw, main

TINY = dict(
    window=128,
    stride=64,
    batch=12,
    steps=20,
    log_every=1,
    save_every=5,
    eval_every=10,
    dtype="float32",
    val_windows=24,
    max_channels=3,
)
TINY |= dict(d_model=16, layers=2, heads=2, patch=16, widths=(8,), kernel=3, whiten_order=8, calibrate=64, nfe=4)
RULE = """name = "machine"
kind = "vibration"
pattern = '(?P<rpm>\\d+)_(?P<subject>(?P<fault>[a-z]+)\\d)\\.npy'
rate_hz = 2000
unit = "g"
channels = ["DE"]
"""


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> tuple[Path, Path]:
    """EEG of eight people at 100 Hz, and two kinds of noise of eight machines at 2 kHz: a resonance where there is a fault."""
    folder = tmp_path_factory.mktemp("flow")
    people, machines = folder / "people", folder / "machines"
    rng = np.random.default_rng(0)
    people.mkdir()
    for s in range(8):
        for condition in ("rest", "task"):
            write_edf(
                people / f"s{s:02d}_{condition}.edf",
                recipes.noise_uv(rng, 4, 16 * 200),
                200,
                recipes.NAMES[:4],
                [(2.0, 3.0, "look")],
            )
    (people / "people.csv").write_text("id,age,sex\n" + "".join(f"s{s:02d},{20 + s},{'FM'[s % 2]}\n" for s in range(8)))
    (people / "dataset.toml").write_text(recipes.RULE)
    machines.mkdir()
    for s in range(8):
        for fault, radius in (("well", 0.5), ("worn", 0.95)):
            poles = np.real(np.poly([radius * np.exp(2j), radius * np.exp(-2j)]))
            x_T = (1 + s / 8) * lfilter([1.0], poles, rng.standard_normal(8000)).astype(np.float32)
            np.save(machines / f"{1700 + 20 * s}_{fault}{s}.npy", x_T)
    (machines / "dataset.toml").write_text(RULE)
    for source in (people, machines):
        status, results, err = recipes.run("--source", source, "--cache", folder / f"c-{source.name}", "--workers", 1)
        assert status == 0 and results["recordings"] == 16, err
    return folder / "c-people", folder / "c-machines"


def config(caches, run: Path | str, **changes) -> Config:
    return replace(Config(cache=tuple(map(str, caches)), name=str(run), label=("fault",)), **(TINY | changes))


def fitted(cfg: Config, corpus: Corpus) -> tuple:
    """What `fit_target` gives for a config."""
    columns = dict(label=cfg.label, domain=cfg.domain, speed=cfg.speed, traits=cfg.traits)
    how = dict(by_recording=True, order=cfg.whiten_order, rhythms=cfg.rhythms, unmix=cfg.unmix, level=cfg.level)
    return fit_target(corpus, **columns, **how, hum=cfg.hums, flatten=cfg.flatten)


@pytest.fixture(scope="session")
def straight(caches, tmp_path_factory) -> Path:
    """A run that nothing interrupted; the others are compared with it."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    results = main(config(caches, run, contrast=0.1))
    assert results["step"] == 20 and results["memory_mb"] > 0 and Path(results["model"]).exists()
    return run


def test_a_run_leaves_what_it_promises(straight, caches):
    names = "config.json command.txt code log.jsonl state.safetensors state.previous.safetensors best encoder.safetensors model.safetensors curves.png"
    assert {p.name for p in straight.iterdir()} == set(names.split())
    lines = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(21))
    keys = {"step", "loss", "loss_flow", "loss_contrast", "lr", "grad_norm", "skipped", "rollbacks", *MEASURED}
    assert all(keys <= line.keys() for line in lines[1:])
    assert [line["step"] for line in lines if {"val_loss", "val_loss_t0.1", "val_loss_t0.9"} <= line.keys()] == [
        0,
        10,
        20,
    ]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert abs(lines[-1]["val_loss"] - lines[0]["val_loss"]) < 0.05  # whitened noise: there is hardly anything to learn
    encoder, meta = load_encoder(straight / "encoder.safetensors")
    assert meta["subjects"] and encoder.architecture.d_model == 16
    net, whiten, meta = generator.load_model(straight / "model.safetensors")
    assert [c.name for c in net.given.conditions] == ["dataset", "rate", "label", "speed", "recording", "level"]
    assert len(whiten.names) == len(meta["templates"]) and not (whiten.trim_GF == 1).all()
    text = json.dumps(meta["templates"])
    assert "s03" not in text and "worn3" not in text  # nobody is named


def test_a_run_that_was_stopped_ends_in_the_same_log_and_model(caches, straight, tmp_path, monkeypatch):
    draw, run = train_flow.draw, tmp_path / "stopped"

    def draw_and_stop(target, recording_B, start_B, index_B, cfg, micro, step, drop):
        if step == 13:
            signal.raise_signal(signal.SIGINT)
        return draw(target, recording_B, start_B, index_B, cfg, micro, step, drop)

    monkeypatch.setattr(train_flow, "draw", draw_and_stop)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        main(config(caches, run, contrast=0.1))
    monkeypatch.undo()
    assert not (run / "model.safetensors").exists()
    results = main(replace(config(caches, run, contrast=0.1), resume=True))
    assert results["step"] == 20 and log(run) == log(straight)
    for name in ("state.safetensors", "model.safetensors", "encoder.safetensors"):
        assert same_tensors(run / name, straight / name), name


def same_tensors(a: Path, b: Path) -> bool:
    ours, theirs = (generator.load_tensors(p)[0] for p in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def losses(run: Path) -> np.ndarray:
    return np.array([line["loss"] for line in log(run) if "loss" in line])


def test_micro_batches_change_nothing(caches, straight, tmp_path):
    main(config(caches, tmp_path / "micro", contrast=0.1, micro=2, calibrate=0))
    assert np.allclose(losses(tmp_path / "micro"), losses(straight), rtol=1e-4)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(caches, tmp_path):
    reference = tmp_path / "one"
    main(config(caches, reference, contrast=0.1, steps=6, calibrate=0, balance="gradnorm"))
    words = [
        "--cache",
        *map(str, caches),
        "--name",
        str(tmp_path / "two"),
        "--label",
        "fault",
        "--contrast",
        "0.1",
        "--balance",
        "gradnorm",
    ]
    for name, value in (TINY | {"steps": 6, "calibrate": 0}).items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_flow.py"]
    done = subprocess.run(
        [*torchrun, *words, "--device", "cpu"], cwd=recipes.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.allclose(losses(tmp_path / "two"), losses(reference), rtol=1e-4)


def test_out_of_memory_halves_then_checkpoints_and_the_result_stays(caches, tmp_path, monkeypatch):
    reference = tmp_path / "whole"
    main(config(caches[1:], reference, steps=6, calibrate=0))
    forward, failed = train_flow.Model.forward, []

    def short_of_memory(self, part, predict):
        if torch.is_grad_enabled() and not self.net.checkpointing:
            failed.append(len(part.x1_BCT))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, part, predict)

    monkeypatch.setattr(train_flow.StepCost, "__call__", lambda *_: 0)
    monkeypatch.setattr(train_flow.Model, "forward", short_of_memory)
    run = tmp_path / "short"
    main(config(caches[1:], run, steps=6, calibrate=0))
    events = [line for line in log(run) if line.get("event") == "out_of_memory"]
    assert (
        failed == [12, 6, 3, 1] and [e.get("micro") for e in events] == [6, 3, 1, None] and events[-1]["checkpointing"]
    )
    assert np.allclose(losses(run), losses(reference), rtol=1e-4)


def test_nan_is_skipped_named_and_rolled_back_and_the_run_gives_up_with_a_dump(caches, tmp_path, monkeypatch):
    forward = train_flow.Model.forward
    bad = {"times": 1}

    def broken(self, part, predict):
        loss_B, unlike_B = forward(self, part, predict)
        if torch.is_grad_enabled() and bad["times"] != 0 and part.index_B[0] == 0 and bad.get("on"):
            bad["times"] -= 1
            loss_B = loss_B * math.nan
        return loss_B, unlike_B

    monkeypatch.setattr(train_flow.Model, "forward", broken)
    monkeypatch.setattr(train_flow.StepCost, "__call__", lambda *_: 0)
    bad["on"] = True
    main(config(caches[1:], tmp_path / "once", steps=6, calibrate=0))
    events = [line for line in log(tmp_path / "once") if "event" in line]
    assert [e["event"] for e in events] == ["skipped"] and len(events[0]["windows"]) == 12
    bad["times"] = -1
    with pytest.raises(Failed, match="no progress"):
        main(config(caches[1:], tmp_path / "always", calibrate=0))
    dump = json.loads((tmp_path / "always" / "failed.json").read_text())
    assert dump["rollbacks"] == 3 and dump["lr_scale"] < 1


def test_what_is_looked_at_is_hidden_from_half_of_training_and_from_all_evaluation(caches):
    cfg = config(caches[1:], "unused", share="cond")
    corpus = Corpus(cfg.cache, cfg.window, cfg.whiten_order, cfg.stride, False, 0.6)
    target, *_ = fitted(cfg, corpus)
    windows = corpus.windows("train").locate(np.arange(64) % len(corpus.windows("train")))

    def shown(step: int) -> np.ndarray:
        return torch.cat([p.shown_B1 for p in draw(target, *windows, np.arange(64), cfg, 0, step, 0.0)]).numpy()

    assert 0.25 < shown(3).mean() < 0.75 and (shown(3) != shown(4)).any()
    assert not shown(EVAL_STEP).any()


@pytest.mark.parametrize("share", ["cond", "repa", "none"])
def test_every_way_to_share_trains_and_what_should_learn_does(share, caches, tmp_path):
    torch.manual_seed(0)
    cache = Cache(caches[1])
    encoder = build_encoder(Architecture("transformer", 16, 2, 2, cache.rate_hz, 16))
    meta = signal_meta(cache) | {
        "lineage": [],
        "subjects": [],
        "auxiliary": [],
        "run": "x",
        "step": 0,
        "window_s": 0.064,
    }
    save_encoder(tmp_path / "e.safetensors", encoder, meta)
    how = dict(
        share=share,
        init=str(tmp_path / "e.safetensors"),
        steps=6,
        calibrate=0,
        contrast=0.1 if share == "none" else 0.0,
    )
    results = main(config(caches[1:], tmp_path / "run", **how))
    after, _ = load_encoder(results["encoder"])
    changed = any(not torch.equal(a, b) for a, b in zip(after.parameters(), encoder.parameters(), strict=True))
    assert changed == (share != "repa")
    names = {"cond": {"loss_flow"}, "repa": {"loss_flow", "loss_align"}, "none": {"loss_flow", "loss_contrast"}}[share]
    assert {k for k in results["metrics"] if k.startswith("loss_")} == names


def test_the_contrastive_gradient_reaches_the_trunk_and_heads_are_in_the_optimizer(caches, tmp_path):
    cfg = config(caches[1:], tmp_path / "none", contrast=0.1)
    corpus = train_flow.Corpus(cfg.cache, 128, 8, 64, False, 0.6)
    encoder, _ = train_flow.start_encoder(cfg, corpus)
    target, _, learned, _ = fitted(cfg, corpus)
    model = train_flow.Model(train_flow.Velocity(encoder, learned, train_flow.Shape((8,), 3)), None, cfg)
    windows = corpus.windows("train")
    parts = train_flow.draw(target, *windows.locate(np.arange(12)), np.arange(12), cfg, 0, 0, 0.1)
    ranks = train_flow.join("cpu")
    _, pull_BE = train_flow.contrast(model, parts, cfg, "float32", ranks)
    sum((model.views(p) * pull_BE[p.index_B]).sum() for p in parts).backward()
    trunk = [p for name, p in model.net.encoder.named_parameters() if name.startswith(("blocks", "embed", "norm"))]
    assert np.mean([p.grad is not None and bool(p.grad.abs().max() > 0) for p in trunk]) >= 0.9
    grouped = {id(p) for g in train_flow.decay_groups(model, 0.01) for p in g["params"]}
    assert all(id(p) in grouped for p in model.project.parameters())


@pytest.mark.parametrize("changes", [dict(whiten_order=0, level=False, whiten_by="dataset"), dict(predict="v", times="uniform"), dict(predict="x1", balance="uncertainty", contrast=0.1),
                                     dict(hold_out="time"), dict(encoder="mamba"), dict(unmix=False, rhythms=1, flatten=False), dict(hums=False), dict(balance="gradnorm", contrast=0.1)])  # fmt: skip
def test_other_flags_train_too(changes, caches, tmp_path):
    results = main(config(caches[1:], tmp_path / "run", steps=4, calibrate=0, **changes))
    assert math.isfinite(results["metrics"]["val_loss"])


@pytest.mark.parametrize(
    "changes",
    [
        dict(share="repa"),
        dict(kernel=4),
        dict(drop=1.0),
        dict(batch=0),
        dict(batch=100_000),
        dict(sample=3),
        dict(model="x.safetensors"),
        dict(label=("colour",)),
        dict(train_share=0.0),
        dict(window=10**7),
        dict(rhythms=3),
        dict(judge=80, open_test=True),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_name(changes, caches, tmp_path):
    with pytest.raises(Unusable):
        main(config(caches[1:], tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_said_before_how_many_windows_a_judgement_takes(tmp_path):
    with pytest.raises(Unusable, match="no file"):
        main(Config(judge=3, model=str(tmp_path / "model.safetensors")))


# ----------------------------------------------------------------------------
# what a model is for


def test_samples_are_a_cache_in_physical_units_that_tools_read(straight, tmp_path):
    def sample(out: str, *words) -> dict:
        status, results, err = recipes.run(
            "--sample",
            64,
            "--model",
            straight / "model.safetensors",
            "--out",
            tmp_path / out,
            "--given",
            "dataset=machine",
            *words,
            script="train_flow.py",
        )
        assert status == 0, err
        return results

    results = sample("a", "label=worn", "--nfe", 4)
    assert results["windows"] == 64 and results["nfe"] == 4 and results["windows_per_s"] > 0
    assert results["run"] == str(straight)  # a path, as training prints it
    cache = Cache(tmp_path / "a")
    assert (
        cache.unit == "g"
        and cache.rate_hz == 2000
        and set(cache.column("fault")) == {"worn"}
        and cache.signal["kind"] == "vibration"
    )
    assert set(cache.column("generated")) == {"straight"}
    windows = cache.windows(None, 128 / 2000, 128 / 2000)
    assert len(windows) == 64
    x_BCT = windows.read(np.arange(64), "g").x_BCT
    assert x_BCT.isfinite().all() and 0.3 < float(x_BCT.std()) < 30
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    again = Config(
        sample=64, model=str(straight / "model.safetensors"), out=f"{tmp_path}/a/"
    )  # as a shell completes it
    with pytest.raises(Unusable, match="rate or filter"):
        train_flow.generate(again, train_flow.join("cpu"))
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before  # what was there is lost only to what replaces it
    train_flow.generate(replace(again, given=("dataset=machine",), seed=1), train_flow.join("cpu"))
    assert (tmp_path / "a" / "manifest.json").read_bytes() != before and len(Cache(tmp_path / "a").recordings)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def apart(real: Cache, fake: Cache, fault: str) -> tuple[float, float]:
    """How far the spectra of generated windows are from those they are modelled on, dB RMS, and the ratio of their levels."""
    spectra, levels = [], []
    for cache in (real, fake):
        rows = [
            i
            for i, r in enumerate(cache.recordings)
            if r.columns["fault"] == fault and (cache is fake or r.split == "train")
        ]
        windows = cache.windows(None, 128 / 2000, 128 / 2000, rows)
        x_BCT = windows.read(np.linspace(0, len(windows) - 1, 60).astype(int), "g").x_BCT.double()
        levels.append(x_BCT.square().mean().sqrt())
        spectra.append((torch.fft.rfft(x_BCT * torch.hann_window(128)).abs() ** 2).mean((0, 1))[2:-2])
    apart_db = 10 * torch.log10(spectra[1] / spectra[0] * (levels[0] / levels[1]) ** 2)
    return float(apart_db.square().mean().sqrt()), float(levels[1] / levels[0])


def test_generated_noise_has_the_spectrum_and_the_level_of_its_recordings(caches, straight, tmp_path):
    how = dict(sample=160, out=str(tmp_path / "a"), given=("dataset=machine",), nfe=4)
    train_flow.generate(Config(model=str(straight / "model.safetensors"), **how), train_flow.join("cpu"))
    for fault in ("well", "worn"):
        apart_db, louder = apart(Cache(caches[1]), Cache(tmp_path / "a"), fault)
        assert apart_db < 2 and 0.7 < louder < 1.4


@pytest.mark.parametrize("flatten", [True, False])
def test_a_network_that_learned_nothing_has_the_spectrum_without_any_filter_if_it_was_flattened(
    flatten, caches, tmp_path
):
    flags = dict(steps=1, whiten_order=0, calibrate=0, flatten=flatten)
    told = main(config(caches[1:], tmp_path / "run", **flags))
    how = dict(sample=160, out=str(tmp_path / "a"), nfe=4)
    train_flow.generate(Config(model=told["model"], **how), train_flow.join("cpu"))
    apart_db, _ = apart(Cache(caches[1]), Cache(tmp_path / "a"), "worn")
    assert apart_db < 2 if flatten else apart_db > 5


def test_samples_of_a_seed_are_the_same_and_guidance_and_conditions_change_them(straight):
    net, whiten, meta = generator.load_model(straight / "model.safetensors")
    template = meta["templates"][-1]
    with torch.no_grad():
        net.last.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        net.modulate.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))

    def draw(**how):
        return generator.draw_windows(net, whiten, meta, template, np.arange(6), 0, nfe=4, **how)[0]

    base = draw()
    assert torch.equal(base, draw())
    assert torch.equal(base[3:], generator.draw_windows(net, whiten, meta, template, np.arange(3, 6), 0, nfe=4)[0])
    for how in (
        dict(cfg=2.0),
        dict(unconditional=True),
        dict(given={"label": 0.0 if template["code"][2] else 1.0}),
        dict(solver="euler"),
        dict(solver="sde"),
    ):
        assert not torch.allclose(base, draw(**how), atol=1e-4), how
    assert torch.allclose(draw(unconditional=True), draw(unconditional=True, cfg=1.0))


def test_a_round_of_reflow_learns_the_teacher_s_pairs(caches, straight, tmp_path):
    results = main(
        config(
            caches,
            tmp_path / "run",
            reflow=str(straight / "model.safetensors"),
            pairs=64,
            steps=6,
            calibrate=0,
            times="ends",
        )
    )
    assert math.isfinite(results["metrics"]["loss_flow"])
    with pytest.raises(Unusable, match="--reflow"):
        main(config(caches[1:], tmp_path / "other", reflow=str(straight / "model.safetensors"), pairs=64))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_scores_stand_beside_plain_ones(caches, straight):
    status, results, err = recipes.run(
        "--score", "--model", straight / "model.safetensors", "--cache", caches[1], "--healthy", "fault=well", "--score-windows", 60, "--nfe", 4, "--hold-out", "time",
        script="train_flow.py",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(Path(results["scores"]).read_text())
    assert {"residual", "−log p", "typicality", "5-NN of log-spectra", "5-NN of features", "RMS"} <= set(
        found["scores"]
    )
    assert all(len(s["value"]) == len(found["recording"]) == results["windows"] for s in found["scores"].values())
    assert results["metrics"]["5-NN of log-spectra"] > 0.9 and results["run"] == str(straight)


@pytest.mark.slow
def test_scores_without_anything_to_tell_apart_say_so(caches, straight):
    name = Cache(caches[1]).recordings[0].dataset
    status, results, err = recipes.run(
        "--score", "--model", straight / "model.safetensors", "--cache", caches[1], "--healthy", f"dataset={name}", "--score-windows", 20, "--nfe", 2, "--hold-out", "time",
        script="train_flow.py",
    )  # fmt: skip
    assert (
        status == 0 and results["metrics"] == {} and f"--healthy dataset={name}: all of the held-out windows are" in err
    )


def test_too_few_windows_to_score_are_one_line(caches, straight):
    few = dict(model=str(straight / "model.safetensors"), score=True, hold_out="time", nfe=2)
    with pytest.raises(Unusable, match="too few windows to compare with, 3 of train"):
        main(config(caches[1:], "unused", score_windows=3, **few))


@pytest.mark.slow
def test_samples_are_judged_after_training(caches, tmp_path):
    results = main(config(caches[1:], tmp_path / "run", hold_out="time", steps=4, calibrate=0, judge=80))
    assert (
        Path(results["report"]).exists() and results["metrics"]["quality_class_accuracy"] > 0.8 and results["verdict"]
    )
    later = main(Config(judge=80, model=results["model"], cache=(str(caches[1]),), hold_out="time"))
    assert later["run"] == results["run"] == str(tmp_path / "run")


def test_models_of_another_version_are_refused_in_one_line(straight, tmp_path):
    tensors, meta = load_tensors(straight / "model.safetensors")
    for name, change in (("whiten.older_G", {}), ("net.older", {}), ("net.last.weight", {"groups": []})):
        path = tmp_path / "model.safetensors"
        save_tensors(path, tensors | {name: torch.zeros(2)}, meta | change)
        with pytest.raises(Unusable, match="another version of lib/velocity.py.*train it again"):
            generator.load_model(path)


def test_flow_module_and_file_agree_on_what_noise_samples_begin_with(straight):
    net, whiten, meta = generator.load_model(straight / "model.safetensors")
    template = meta["templates"][0]
    with torch.no_grad():
        net.last.weight.zero_()
        net.last.bias.zero_()
    w_NCT, *_ = generator.draw_windows(net, whiten, meta, template, np.arange(5), 3, nfe=16)
    noise = flow.draw_noise(3, 0, np.arange(5), w_NCT.shape[1:])
    assert torch.allclose(w_NCT, noise, atol=0.1) and not torch.allclose(
        w_NCT, flow.draw_noise(4, 0, np.arange(5), w_NCT.shape[1:]), atol=1
    )
