"""train_contrastive.py on a small cohort that saw the same movies: it learns what they share, resumes exactly, and is the same however divided."""

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

from lib import command
from lib.cache import Cache
from lib.contrast import load_projection
from lib.errors import Unusable
from lib.films import Films
from lib.models import Architecture, build_encoder, load_encoder
from lib.ranks import Ranks
from tests import recipes
from tests.movie_cases import build
from tests.recipes import flags, log
from train_contrastive import PRESETS, Aligned, Config, compare, draw, main, pair_sampler

TINY = dict(d_model=32, layers=1, heads=2, patch_s=0.5, window_s=2.0, stride_s=1.0, batch=12, max_channels=10, steps=12)
TINY |= dict(log_every=1, save_every=4, eval_every=6, dtype="float32", val_pairs=24, probe_windows=36, film_subjects=4)
TINY |= dict(jepa=0.5, pairs=("movie:3", "augment:1"))  # all that a step can consist of


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("contrastive"))


def config(cache: Path, run: Path, **changes) -> Config:
    return replace(Config(cache=(str(cache),), name=str(run)), **(TINY | changes))


@pytest.fixture(scope="module")
def straight(cache, tmp_path_factory) -> Path:
    """A run that nothing interrupted; the others are compared with it."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert main(config(cache, run))["step"] == 12
    return run


def test_a_run_leaves_what_it_promises(straight, cache):
    names = "config.json command.txt code log.jsonl state.safetensors state.previous.safetensors best before.safetensors".split()
    names += "encoder.safetensors projection.safetensors curves.png isc.png map.png".split()
    assert {p.name for p in straight.iterdir()} == {*names}
    lines = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(13))
    keys = {"step", "loss", "lr", "grad_norm", "skipped", "temperature", "negatives", "windows_per_s", "loader_wait"}
    assert all(keys <= line.keys() for line in lines[1:])
    checked = {"val_loss", "alignment", "uniformity", "feature_rank", "subject_share"}
    assert [line["step"] for line in lines if checked <= line.keys()] == [0, 6, 12]
    found = {
        f"{kind}_{name}"
        for kind in ("encoder", "embedding")
        for name in ("subject_identity", "movie_identity", "isc", "isc_p")
    }
    found |= {
        f"embedding_retrieval{of}_top{k}{end}" for of in ("", "_others") for k in (1, 5) for end in ("", "_chance")
    }
    assert [line["step"] for line in lines if found <= line.keys()] == [0, 12]
    assert lines[0]["signal_isc"] > 0.2 and lines[0]["signal_isc_p"] < 0.01  # the movies are in the signals
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    encoder, meta = load_encoder(straight / "encoder.safetensors", Cache(cache))
    assert meta["cache"] == Cache(cache).fingerprint and len(meta["subjects"]) == 6 and meta["lineage"] == []
    project, of = load_projection(straight / "projection.safetensors")
    batch = Cache(cache).windows("val", 2.0, 1.0).read(range(6))
    places = batch.positions_BC3, batch.mask_BC
    assert project(encoder(batch.x_BCT, *places), *places).shape == (6, 4 * 32) and of["run"] == "straight"
    for image in ("curves.png", "isc.png", "map.png"):
        assert (straight / image).stat().st_size > 10_000


def test_a_killed_run_ends_in_the_same_log_and_encoder(cache, straight, tmp_path):
    run = tmp_path / "broken"
    process = recipes.start(*flags(config(cache, run)), script="train_contrastive.py")
    deadline = time.monotonic() + 100
    while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_text().count("\n") < 7:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (run / "encoder.safetensors").exists()  # it was in the middle
    assert main(replace(config(cache, run), resume=True))["step"] == 12
    assert log(run) == log(straight)
    ours, theirs = (load_encoder(r / "encoder.safetensors")[0].state_dict() for r in (run, straight))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert (run / "isc.png").exists()


def test_a_run_that_dies_before_its_second_save_goes_on_from_its_first(cache, tmp_path, monkeypatch):
    short = dict(steps=3, save_every=0, eval_every=0, waveform=5.0, film_subjects=0)  # no movies to evaluate, either
    assert main(config(cache, tmp_path / "straight", **short))["step"] == 3
    with monkeypatch.context() as patched:
        patched.setattr("lib.recovery.sound", lambda state, loss, norm: exit("dies"))
        with pytest.raises(SystemExit, match="dies"):
            main(config(cache, tmp_path / "run", **short))
    main(replace(config(cache, tmp_path / "run", **short), resume=True))
    assert log(tmp_path / "run") == log(
        tmp_path / "straight"
    )  # what phase 1 gave is said once, and its waveform raised once


def same_numbers(ours: list[dict], theirs: list[dict]) -> None:
    """Equal up to the order of sums in float32."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "loss_latent", "grad_norm", "val_loss", "temperature"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), (name, a["step"])


def test_micro_batches_change_nothing(cache, straight, tmp_path):
    """Features are made twice then, without and with a gradient."""
    main(config(cache, tmp_path / "micro", micro=5))
    same_numbers(log(tmp_path / "micro"), log(straight))


@pytest.mark.slow
def test_two_ranks_compute_what_one_computes(cache, straight, tmp_path):
    run = tmp_path / "ranks"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(recipes.ROOT / "train_contrastive.py"), *flags(config(cache, run))],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.strip().splitlines()) == 1 and json.loads(done.stdout)["step"] == 12
    same_numbers(log(run), log(straight))


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(cache, straight, tmp_path, monkeypatch):
    """In step 3, with the loss known and some gradients done: it, which all ranks had a part in, isn't made again."""
    calls = []
    backward = torch.Tensor.backward

    def short_of_memory(tensor, *args, **kwargs):
        calls.append(tensor)
        if len(calls) == 9:  # the loss and two montages make three in a step
            raise torch.OutOfMemoryError("out of memory")
        return backward(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", short_of_memory)
    main(config(cache, tmp_path / "short"))
    lines = log(tmp_path / "short")
    assert [line.get("event") for line in lines if "event" in line] == ["out_of_memory"]
    same_numbers([line for line in lines if "event" not in line], log(straight))


# ----------------------------------------------------------------------------
# what is learned


@pytest.mark.slow
def test_unseen_people_are_found_at_the_moment_they_are_at(cache, tmp_path):
    """Held-out subjects' moments by the mean of others', above all without augmentation pairs; people become alike."""
    results = main(
        config(
            cache,
            tmp_path / "long",
            steps=100,
            batch=24,
            lr=3e-3,
            log_every=50,
            eval_every=0,
            jepa=0.0,
            pairs=("movie:1",),
        )
    )
    m = results["metrics"]
    assert m["embedding_retrieval_top1_chance"] == pytest.approx(1 / 34, abs=1e-4)
    assert m["embedding_retrieval_top1"] > 8 * m["embedding_retrieval_top1_chance"]
    assert m["embedding_retrieval_others_top1"] > 6 * m["embedding_retrieval_others_top1_chance"]
    assert m["embedding_retrieval_top1_before"] < 4 * m["embedding_retrieval_top1_chance"]
    assert m["embedding_subject_identity"] < m["embedding_subject_identity_before"]
    assert m["embedding_movie_identity"] > m["embedding_movie_identity_before"]
    assert m["embedding_isc"] > 0.4 > m["embedding_isc_before"] and m["embedding_isc_p"] < 0.01
    assert m["val_loss"] < 0.7 * m["val_loss_before"] and m["alignment"] < 0.8 * m["alignment_before"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(loss="infonce", pairs=("resting:1",), learn_temperature=False),
        dict(loss="supcon", pairs=("task:1",), lr_decay=0.7, compare="windows"),
        dict(
            loss="vicreg",
            pairs=("augment:1", "neighbour:1"),
            warp_s=0.1,
            shift_s=0.1,
            pink_db=-10.0,
            bandstop_hz=4.0,
            flip=0.5,
        ),
        dict(pairs=("event:1", "augment:1"), events=("blip",), adapter="perceiver", queries=4),
    ],
)
def test_other_losses_pairs_and_views(changes, cache, tmp_path):
    """A step of each: everything that should get a gradient does, and the loss falls along it."""
    cfg, cache = config(cache, tmp_path / "x", **({"jepa": 0.0} | changes)), Cache(cache)
    torch.manual_seed(0)
    sizes = dict(d_model=32, layers=1, heads=2, patch=50)
    encoder = build_encoder(Architecture(**sizes, adapter=cfg.adapter, queries=cfg.queries))
    model, ranks = Aligned(encoder, cfg), Ranks(0, 1, torch.device("cpu"))
    rows = [i for i, r in enumerate(cache.recordings) if r.split == "train"]
    views = draw(cache, pair_sampler(cfg, cache, rows), np.arange(cfg.batch), cfg, 0, 50, 0)
    loss, pull_VE, _, projected = compare(model, model, views, cfg, "float32", ranks, True)
    for part, y_BE in zip(views.parts, projected, strict=True):
        (y_BE * pull_VE[part.index_B]).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all("unplaced" in name for name in silent) and math.isfinite(loss)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.02 * p.grad
    assert compare(model, model, views, cfg, "float32", ranks, False)[0] < loss


def test_an_encoder_can_be_started_from(cache, straight, tmp_path):
    init = str(straight / "encoder.safetensors")
    main(config(cache, tmp_path / "next", init=init, steps=1, d_model=64))  # the file's architecture counts
    _, meta = load_encoder(tmp_path / "next" / "encoder.safetensors")
    assert meta["architecture"]["d_model"] == 32 and meta["lineage"][0]["run"] == "straight"
    last, first = log(straight)[-1], log(tmp_path / "next")[0]
    assert (
        "probe_task" not in first
    )  # which movie it is chose the pairs, and the probe would be scored on training people
    assert first["encoder_subject_identity"] == last["encoder_subject_identity"]


def test_movies_start_from_louder_waveforms(cache, straight, tmp_path):
    init = straight / "encoder.safetensors"
    start, _ = load_encoder(init)
    for factor in (5.0, 0.0):
        run = tmp_path / f"by-{factor:g}"
        main(config(cache, run, init=str(init), steps=1, lr=1e-30, waveform=factor))
        moved, _ = load_encoder(run / "encoder.safetensors")
        torch.testing.assert_close(moved.embed.samples.weight, factor * start.embed.samples.weight)
        torch.testing.assert_close(moved.embed.spectrum.weight, start.embed.spectrum.weight)


# ----------------------------------------------------------------------------
# flags


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(cache=("no/where",)), "no/where"),
        (dict(pairs=("film:1",)), "--pairs film"),
        (dict(pairs=("event:1",), events=("burp",)), "--events burp"),
        (dict(window_s=19.0, pairs=("movie:1",)), "--pairs movie"),
        (dict(patch_s=0.3), "--window-s"),
        (dict(film_step_s=0.333), "--film-step-s"),
        (dict(batch=1), "--batch"),
        (dict(batch=100_000), "--batch 100000 is more than the"),
        (dict(temperature=0.0), "--temperature"),
        (dict(warp_s=0.4), "--warp-s"),
        (dict(dropout=1.0), "--dropout"),
        (dict(lr_decay=0.0), "--lr-decay"),
        (dict(jepa=-1.0), "--jepa"),
        (dict(waveform=-1.0), "--waveform"),
        (dict(projection=0), "--projection"),
        (dict(init="missing.safetensors"), "missing.safetensors"),
    ],
)
def test_what_is_unusable_is_named_and_leaves_no_run_behind(changes, word, cache, tmp_path):
    with pytest.raises(Unusable, match=word):
        main(replace(config(cache, tmp_path / "x"), **changes))
    assert not (tmp_path / "x").exists()


def test_presets_parse():
    for name, size in (("mini", 128), ("base", 512), ("full", 768)):
        assert command.parse(Config, ["--preset", name], "", PRESETS).d_model == size
    cfg = command.parse(Config, ["--pairs", "movie:0.6", "resting:0.2", "--white-db", "none"], "", PRESETS)
    assert cfg.pairs == ("movie:0.6", "resting:0.2") and cfg.white_db is None


# ----------------------------------------------------------------------------
# films


def test_films_of_perfect_and_of_blind_features(cache):
    """Features that are the movie's time, or the subject, or nothing, score as they must."""
    cache = Cache(cache)
    train, held = ([i for i, r in enumerate(cache.recordings) if r.split == s] for s in ("train", "val"))
    films = Films(cache, train, held, 2.0, 1.0, 32, 8)
    assert films.names == ["DespicableMe", "ThePresent"] and len(films.held["ThePresent"][0]) == 4
    moment = {}
    for rows, starts in [*films.held.values(), *films.train.values()]:
        for row, start_M in zip(rows, starts, strict=True):
            moment |= {(row, m): i for i, m in enumerate(start_M)}
    noise = np.random.default_rng(0)

    def encode(part):
        task = [cache.recordings[i].task for i in part.recording_B]
        who = [sum(map(ord, cache.recordings[i].subject)) for i in part.recording_B]
        film = torch.tensor([float(len(t)) for t in task])
        person = torch.tensor([[math.sin(w * k) for k in range(1, 9)] for w in who])
        random = torch.from_numpy(noise.standard_normal((len(task), 8))).float()
        return {"film": film[:, None] + 0.1 * random, "person": person + 0.01 * random, "nothing": random}

    values, curves, tables = films.score(encode)
    assert tables["film"].shape == (34,) and tables["person"].shape == (4, 34, 8)
    assert values["film_movie_identity"] > 0.99 and values["person_subject_identity"] == 1
    assert values["person_retrieval_top1"] < 0.1 and values["nothing_retrieval_top1"] < 0.1
    assert abs(values["nothing_isc"]) < 0.3 and values["nothing_isc_p"] > 0.01
    signal, shown = films.score_signals()
    assert signal["signal_isc"] > 0.2 and signal["signal_isc_p"] < 0.01
    peak = shown["signal"].lag_s[int(np.argmax(shown["signal"].by_lag))]
    assert abs(peak) <= 0.02 and len(shown["signal"].by_time["ThePresent"]) > 3
