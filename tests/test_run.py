"""The command line and the run directory: flags, exit statuses, the one JSON line, the log, state that survives anything."""

import dataclasses
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from lib import command
from lib.errors import Failed, Unusable
from lib.precision import choose_dtype
from lib.prefetch import Prefetch
from lib.ranks import Ranks, join
from lib.run import Run, RunConfig, saved_config, steps_of
from lib.tensors import save_tensors
from tests import recipes

ONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Config(RunConfig):
    lr: float = 0.1  # learning rate
    band_hz: tuple[float, float] | None = (0.5, 45.0)  # pass band, Hz
    adapter: Literal["none", "perceiver"] = "none"  # kind
    init: str | None = None  # a file


PRESETS = {"mini": {}, "base": {"lr": 0.01}}


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """A training script in a checkout of its own, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "losses.py").write_text("# the code as it was\n")
    path = tmp_path / "train_toy.py"
    path.write_text("# toy\n")
    monkeypatch.setattr(sys, "argv", [str(path), "--lr", "0.1"])
    return path


def outcome(main, capfd, monkeypatch, *args, presets=PRESETS) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["toy.py", *args])
    code = command.run(main, Config, "Toy.", presets)
    out, err = capfd.readouterr()
    return code, out, err


# the command line


NOBODY_READS = """
import sys
from dataclasses import dataclass
from lib import command

@dataclass(frozen=True)
class Config:
    lr: float = 0.1

sys.exit(command.run(lambda cfg: {"answer": 42}, Config, "doc"))
"""


def test_a_stdout_that_nobody_reads_is_one_line_and_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-c", NOBODY_READS]
    done = subprocess.run(words, cwd=recipes.ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "-c: stdout was closed before all was written\n")


def test_results_are_the_only_thing_on_stdout(capfd, monkeypatch):
    def main(cfg):
        print("noise")
        subprocess.run(["echo", "noise of a child"], check=True)
        return {
            "path": Path("a/b"),
            "score": np.float32(0.5),
            "bad": float("nan"),
            "count": np.int64(3),
            "list": (1, True),
        }

    code, out, err = outcome(main, capfd, monkeypatch)
    assert code == 0 and out.count("\n") == 1 and "noise of a child" in err
    assert json.loads(out) == {"path": "a/b", "score": 0.5, "bad": None, "count": 3, "list": [1, True]}


@pytest.mark.parametrize(
    "error, code, line",
    [
        (Unusable("no manifest in cache/x;\n  build it"), 2, "toy.py: no manifest in cache/x; build it\n"),
        (Failed("disk full"), 1, "toy.py: disk full\n"),
        (KeyboardInterrupt("at step 3; resume it"), 130, "toy.py: interrupted at step 3; resume it\n"),
        (MemoryError("8 GiB"), 1, "toy.py: out of memory (8 GiB): free some, or take less at a time\n"),
        (OSError(errno.ENOSPC, "no space", "a/b"), 1, "toy.py: a/b: no space; make space, and run it again\n"),
    ],
)
def test_errors_are_one_line_and_a_status(error, code, line, capfd, monkeypatch):
    def main(cfg):
        raise error

    assert outcome(main, capfd, monkeypatch) == (code, "", line)


def test_quarantine_is_status_3_and_a_bug_keeps_its_traceback(capfd, monkeypatch):
    assert outcome(lambda cfg: {"quarantined": 2}, capfd, monkeypatch)[0] == 3
    assert outcome(lambda cfg: {"quarantined": 0}, capfd, monkeypatch)[0] == 0
    assert outcome(lambda cfg: None, capfd, monkeypatch)[:2] == (0, "")
    with pytest.raises(ZeroDivisionError):
        outcome(lambda cfg: 1 / 0, capfd, monkeypatch)


def test_numbers_beyond_64_bits_are_refused():
    with pytest.raises(Unusable, match="--seed 99999999999999999999 must fit 64 bits"):
        command.parse(Config, ["--seed", "99999999999999999999"], "", PRESETS, saved_config)


@pytest.mark.parametrize(
    "args, word", [(["--lrr", "1"], "--lrr"), (["--lr", "x"], "--lr"), (["--preset", "huge"], "--preset"), (["x"], "x")]
)
def test_bad_flags_are_one_line_and_status_2(args, word, capfd, monkeypatch):
    code, out, err = outcome(lambda cfg: {}, capfd, monkeypatch, *args)
    assert code == 2 and out == "" and err.count("\n") == 1 and word in err and "╭" not in err


def test_presets_come_first_and_flags_win():
    def parse(*args):
        return command.parse(Config, args, "", PRESETS)

    assert parse().lr == 0.1 and parse("--preset", "base").lr == 0.01 and parse("--preset=base").preset == "base"
    assert parse("--lr", "5", "--preset", "base").lr == 5
    assert parse("--band-hz", "none").band_hz is None and parse("--band-hz", "1", "2").band_hz == (1, 2)
    assert parse("--adapter", "none").adapter == "none"


# the run directory


def test_a_run_holds_config_command_revision_and_code(script):
    run = Run(Config(lr=0.5), str(script), ONE)
    assert run.directory == Path("runs/toy-1")
    assert json.loads((run.directory / "config.json").read_text())["lr"] == 0.5
    assert "train_toy.py --lr 0.1" in (run.directory / "command.txt").read_text()
    assert (run.directory / "code/train_toy.py").read_text() == "# toy\n" and (
        run.directory / "code/lib/losses.py"
    ).exists()
    assert Run(Config(), str(script), ONE).directory == Path("runs/toy-2")  # the next free number
    run.close()


def test_an_existing_run_is_neither_continued_nor_lost_by_accident(script):
    cfg = Config(name="a")
    run = Run(cfg, str(script), ONE)
    run.log(1, loss=1.0)
    with pytest.raises(Unusable, match="--resume"):
        Run(cfg, str(script), ONE)
    assert Run(dataclasses.replace(cfg, overwrite=True), str(script), ONE).lines() == []
    foreign = Path("runs/notes")
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(
        Unusable, match="exists and is no run: choose another"
    ):  # --overwrite deletes runs, nothing else
        Run(Config(name="notes", overwrite=True), str(script), ONE)
    assert (foreign / "thesis.txt").exists()
    run.close()


def test_overwriting_spares_what_a_flag_names(script):
    Run(Config(name="a"), str(script), ONE).close()
    (made := Path("runs/a/encoder.safetensors")).write_bytes(b"weights")
    again = Config(name="a", overwrite=True, init=str(made))
    with pytest.raises(Unusable, match="--overwrite would delete --init runs/a/encoder.safetensors"):
        Run(again, str(script), ONE)
    assert made.exists()
    Run(dataclasses.replace(again, init="runs/a/gone.safetensors"), str(script), ONE).close()
    assert not made.exists()


@pytest.mark.parametrize("name, word", [("./notes.txt", "is no run"), ("./notes.txt/a", "notes.txt.*directory")])
def test_a_run_that_can_not_be_written_is_one_line(name, word, script):
    Path("notes.txt").write_text("mine")
    with pytest.raises(Unusable, match=word):
        Run(Config(name=name), str(script), ONE)
    assert Path("notes.txt").read_text() == "mine"


def test_a_run_half_made_can_be_replaced(script, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/code")

    with monkeypatch.context() as m, pytest.raises(Unusable, match="runs/a/code: No space left"):
        m.setattr("lib.run.shutil.copytree", full)
        Run(Config(name="a"), str(script), ONE)
    Run(Config(name="a", overwrite=True), str(script), ONE).close()


def test_a_run_is_not_resumed_on_other_data_or_without_its_log(script):
    model, optimizer = fresh()
    run = Run(Config(name="a"), str(script), ONE, "one cache")
    train(run, 0, 3, model, optimizer)
    run.save({"step": 3}, {"model": model}, optimizer)
    run.log(4, loss=1.0)
    run.close()
    log = run.directory / "log.jsonl"
    whole = log.read_text()

    def resume(data: str) -> dict:
        again = Run(Config(name="a", resume=True), str(script), ONE, data)
        try:
            return again.restore({"model": model}, optimizer)
        finally:
            again.close()

    with pytest.raises(Unusable, match="was trained on other data"):
        resume("another cache")
    for damaged, word in (("", "has 0 of the 3 lines"), (whole.replace("loss", '"loss', 1), "line 1, was damaged")):
        log.write_text(damaged)
        with pytest.raises(Unusable, match=word):
            resume("one cache")
        assert log.read_text() == damaged
    log.write_text(whole + "\0\0\n")  # what a crash leaves behind the lines that the state knows
    assert resume("one cache")["step"] == 3 and len(log.read_text().splitlines()) == 3


def test_resume_takes_the_flags_of_the_run(script, monkeypatch):
    with pytest.raises(Unusable, match="no run to resume"):
        saved_config(Config(resume=True))
    with pytest.raises(Unusable, match="no run to resume"):
        saved_config(Config(name="b", resume=True))
    Run(Config(name="b", lr=0.7, band_hz=None), str(script), ONE).close()
    Run(Config(lr=0.3), str(script), ONE).close()

    def parse(*args):
        return command.parse(Config, args, "", PRESETS, saved_config)

    assert parse("--name", "b", "--resume").lr == 0.7 and parse("--name", "b", "--resume").band_hz is None
    assert parse("--resume").lr == 0.3  # the newest numbered run
    assert parse("--name", "b", "--resume", "--lr", "0.7", "--device", "cpu").device == "cpu"
    with pytest.raises(Unusable, match="--lr 0.7, not 0.6"):
        parse("--name", "b", "--resume", "--lr", "0.6")
    (Path("runs/b/config.json")).write_text('{"lr": 0.7, "gone": 1}')
    with pytest.raises(Unusable, match="another version"):
        parse("--name", "b", "--resume")
    monkeypatch.setattr("sys.argv", ["train_other.py"])
    with pytest.raises(Unusable, match=f"is a run of {script.name}: python {script.name} --name runs/b --resume"):
        parse("--name", "b", "--resume")


def test_a_choice_of_the_clock_says_how_to_repeat_it(capsys):
    layer = torch.nn.Linear(4, 4)
    chosen = choose_dtype("auto", lambda m: m(torch.ones(2, 4)), (layer,), ONE)
    assert f"--dtype {chosen} repeats this run exactly" in capsys.readouterr().err
    assert choose_dtype("float32", None, (), ONE) == "float32" and not capsys.readouterr().err


def train(run: Run, first: int, last: int, model, optimizer) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(step + 1, loss=loss.item(), lr=0.1)


def fresh():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def test_state_and_log_continue_as_if_nothing_had_happened(script):
    model, optimizer = fresh()
    straight = Run(Config(name="straight"), str(script), ONE)
    train(straight, 0, 9, model, optimizer)

    broken = Run(Config(name="broken"), str(script), ONE)
    halfway, its_optimizer = fresh()
    train(broken, 0, 4, halfway, its_optimizer)
    broken.save({"step": 4, "dtype": "float32"}, {"model": halfway}, its_optimizer)
    train(broken, 4, 6, halfway, its_optimizer)  # these steps were done but never saved
    with open(broken.directory / "log.jsonl", "a") as log:
        log.write('{"step": 7, "lo')  # and the kill came in the middle of a line
    assert len(broken.lines()) == 6

    resumed = Run(Config(name="broken", resume=True), str(script), ONE)
    again, its_optimizer = fresh()
    with torch.no_grad():
        again.weight.zero_()
    state = resumed.restore({"model": again}, its_optimizer)
    assert state == {"step": 4, "dtype": "float32"}
    train(resumed, 4, 9, again, its_optimizer)
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)
    without_clock = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in run.lines()] for run in (straight, resumed)
    ]
    assert without_clock[0] == without_clock[1] and len(without_clock[0]) == 9
    assert len((resumed.directory / "command.txt").read_text().splitlines()) == 2
    resumed.close()


def test_a_run_killed_before_its_first_save_starts_over(script):
    run = Run(Config(name="early"), str(script), ONE)
    run.log(0, val_loss=1.0)
    resumed = Run(Config(name="early", resume=True), str(script), ONE)
    model, optimizer = fresh()
    assert resumed.restore({"model": model}, optimizer) == {"step": 0} and resumed.lines() == []
    run.close()
    resumed.close()


def test_a_state_that_is_damaged_or_does_not_fit_is_refused(script):
    run = Run(Config(name="c"), str(script), ONE)
    model, optimizer = fresh()
    train(run, 0, 1, model, optimizer)
    run.save({"step": 1}, {"model": model}, optimizer)
    other = torch.nn.Linear(4, 5)
    with pytest.raises(Unusable, match="doesn't fit"):
        run.restore({"model": other}, torch.optim.AdamW(other.parameters()))
    damage(run.directory / "state.safetensors")
    with pytest.raises(Unusable, match="state.safetensors is damaged"):
        run.restore({"model": model}, optimizer)
    run.close()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["damaged", "truncated", "lost between two renames"])
def test_the_state_before_is_used_with_a_message_where_the_newest_is_damaged(how, script, capfd):
    model, optimizer = fresh()
    straight = Run(Config(name="straight"), str(script), ONE)
    run = Run(Config(name="e"), str(script), ONE)
    halfway, its_optimizer = fresh()
    for first, last in ((0, 2), (2, 4), (4, 6)):
        train(straight, first, last, model, optimizer)
        straight.save({"step": last}, {"model": model}, optimizer)
        train(run, first, last, halfway, its_optimizer)
        run.save({"step": last}, {"model": halfway}, its_optimizer)
    newest = run.directory / "state.safetensors"
    if how == "damaged":
        damage(newest)
    elif how == "truncated":
        newest.write_bytes(newest.read_bytes()[:100])
    else:
        newest.unlink()
    run.close()
    run = Run(Config(name="e", resume=True), str(script), ONE)
    again, its_optimizer = fresh()
    assert run.restore({"model": again}, its_optimizer) == {"step": 4}
    message = capfd.readouterr().err
    assert "resuming runs/e at step 4" in message
    assert how.startswith("lost") or "state.safetensors is damaged" in message and "state.previous" in message
    assert newest.exists() and not (run.directory / "state.previous.safetensors").exists()
    train(run, 4, 6, again, its_optimizer)
    run.save({"step": 6}, {"model": again}, its_optimizer)
    for name in ("state.safetensors", "state.previous.safetensors"):
        assert (run.directory / name).read_bytes() == (straight.directory / name).read_bytes()
    straight.close()
    run.close()


def test_a_full_disk_is_one_line_and_the_state_before_stays(script):
    run = Run(Config(name="f"), str(script), ONE)
    model, optimizer = fresh()
    train(run, 0, 1, model, optimizer)
    run.save({"step": 1}, {"model": model}, optimizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        with pytest.raises(Failed, match="no space to save runs/f"):
            run.save({"step": 2}, {"model": model}, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.close()
    resumed = Run(Config(name="f", resume=True), str(script), ONE)
    assert resumed.restore({"model": model}, optimizer) == {"step": 1}
    resumed.close()


# the best checkpoints


def evaluate_at(run: Run, state: dict, losses: dict[int, float], last: int, save_every: int = 3) -> None:
    """Steps with validations, each written as a file if it is among the best two."""
    model, optimizer = fresh()
    for step in range(state["step"] + 1, last + 1):
        state["step"] = step
        if step in losses and (path := run.among_best(state, losses[step], 2)):
            save_tensors(path, {"x": torch.tensor([float(step)])}, {"val_loss": losses[step]})
        if step % save_every == 0:
            run.save(state, {"model": model}, optimizer)


LOSSES = {2: 0.9, 4: 0.5, 5: math.nan, 6: 0.7, 8: 0.6, 10: 0.5, 11: 0.8}


def best(run: Run) -> list[str]:
    return sorted(path.name for path in (run.directory / "best").iterdir())


def test_the_best_checkpoints_are_kept_and_the_others_deleted(script):
    run = Run(Config(name="best"), str(script), ONE)
    state = {"step": 0, "best": []}
    evaluate_at(run, state, LOSSES, 6)
    assert best(run) == ["step-000004.safetensors", "step-000006.safetensors"]
    evaluate_at(
        run, state, LOSSES, 8
    )  # the new one is there, and the state that still names the old one is the last saved
    assert best(run) == ["step-000004.safetensors", "step-000006.safetensors", "step-000008.safetensors"]
    evaluate_at(run, state, LOSSES, 12)
    assert best(run) == [
        "step-000004.safetensors",
        "step-000010.safetensors",
    ]  # of equal ones the earlier counts as better
    assert state["best"] == [[0.5, 4], [0.5, 10]]
    run.close()


@pytest.mark.parametrize("killed_at", [4, 5, 7, 8, 11])
def test_the_best_checkpoints_are_the_same_after_a_kill(killed_at, script):
    run = Run(Config(name="killed"), str(script), ONE)
    evaluate_at(run, {"step": 0, "best": []}, LOSSES, killed_at)
    run.close()
    resumed = Run(Config(name="killed", resume=True), str(script), ONE)
    state = resumed.restore({"model": fresh()[0]}, fresh()[1])
    evaluate_at(resumed, state, LOSSES, 12)
    assert state["best"] == [[0.5, 4], [0.5, 10]]
    assert best(resumed) == ["step-000004.safetensors", "step-000010.safetensors"]
    resumed.close()


# the tracker


TRACKED = """
import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
from tests.test_run import Config, ONE, fresh
from lib.run import Run
for resume in {resume!r}:
    run = Run(Config(name="t", wandb={wandb!r}, resume=resume), "train_toy.py", ONE)
    if resume:
        run.restore({{"model": fresh()[0]}}, fresh()[1])
    if {kill!r}:
        children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True).stdout
        (service,) = (int(line.split()[0]) for line in children.splitlines() if "wandb-core" in line)
        os.kill(service, signal.SIGKILL)
        time.sleep(0.5)
    for step in (1, 2, 3):
        run.log(step, loss=1.5)
    run.close()
print("wandb" in sys.modules)
"""


def tracked(wandb: str | None, resume: tuple = (False,), kill: bool = False, **env) -> tuple[str, str]:
    """Whether a process of its own imported the tracker for runs of three steps, started or resumed, and what it said."""
    words = [sys.executable, "-c", TRACKED.format(root=str(recipes.ROOT), wandb=wandb, resume=resume, kill=kill)]
    env = {**os.environ, "WANDB_MODE": "offline", **env}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(Path("runs/t/log.jsonl").read_text().splitlines()) == 3
    return done.stdout.strip(), done.stderr


def test_nothing_imports_the_tracker_without_the_flag(script):
    assert tracked(None)[0] == "False" and not Path("runs/t/wandb_id").exists()


def test_the_tracker_goes_on_with_the_same_run(script):
    pytest.importorskip("wandb.sdk")
    assert tracked("berger", resume=(False, True))[0] == "True"
    name = Path("runs/t/wandb_id").read_text()
    files = sorted(Path("runs/t").rglob(f"run-{name}.wandb"))
    assert len(name) == 8 and len(files) == 2  # one per start, of one run
    assert b"band_hz" in files[0].read_bytes() and b"loss" in files[1].read_bytes()


@pytest.mark.slow
def test_a_tracker_without_a_login_does_not_stop_the_run(script):
    pytest.importorskip("wandb.sdk")
    _, err = tracked("berger", WANDB_MODE="online", HOME=str(Path.cwd()), NETRC="none", WANDB_API_KEY="")
    assert "--wandb: No API key" in err and err.count("going on without it") == 1


@pytest.mark.slow
def test_a_tracker_that_dies_does_not_stop_the_run(script):
    pytest.importorskip("wandb.sdk")
    assert tracked("berger", kill=True)[1].count("going on without it") == 1


def test_a_tracker_that_is_not_installed_is_named(script, monkeypatch):
    Path("wandb").mkdir()  # as offline runs leave behind: no package
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Unusable, match=r"--wandb.*pip install -e '\.\[wandb\]'"):
        Run(Config(name="v", wandb="berger"), str(script), ONE)
    assert not Path("runs/v").exists()


def test_epochs_become_steps():
    assert steps_of(0, 1000, 64) == 0 and steps_of(0.001, 1000, 64) == 1 and steps_of(2, 1000, 50) == 40


def test_the_first_signal_lets_the_step_finish(script):
    run = Run(Config(name="d"), str(script), ONE)
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.stop
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    run.close()


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(Unusable, match="--device"):
        join("cuda:77")
    with pytest.raises(Unusable, match="--device warp"):
        join("warp")
    assert join("cpu") == ONE


# batches ahead of time


def test_prefetch_keeps_order_and_raises_where_the_batch_is_asked_for():
    def draw(step):
        if step == 5:
            raise Unusable("shard 5 has gone")
        return step * step

    loader = Prefetch(draw, 2, 9)
    assert [next(loader) for _ in range(3)] == [(2, 4), (3, 9), (4, 16)]
    with pytest.raises(Unusable, match="shard 5"):
        next(loader)
    loader.close()


def test_prefetch_goes_on_from_where_it_is_sent_with_what_is_drawn_then():
    scale, seen = 1, []
    loader = Prefetch(lambda step: scale * step, 0, 6)
    for step, batch in loader:
        seen.append((step, batch))
        if step == 3 and scale == 1:
            scale = 10  # what was drawn ahead is out of date
            loader.seek(2)
    loader.close()
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3), (2, 20), (3, 30), (4, 40), (5, 50)]
    assert list(Prefetch(lambda step: step, 4, 4)) == []


def test_prefetch_stops_while_it_waits_for_a_slow_consumer():
    drawn = []
    loader = Prefetch(lambda step: drawn.append(step), 0, 10**6, depth=2)
    next(loader)
    loader.close()
    assert len(drawn) < 10 and loader.waited_s >= 0


def test_batches_are_drawn_by_few_threads_where_steps_compute_on_the_same_cores():
    code = """
import torch
from threadpoolctl import threadpool_info
from lib.prefetch import Prefetch

def threads(step):
    torch.ones(2**20).exp().sum()
    return max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp")

torch.set_num_threads(9)
print([next(Prefetch(threads, 0, 1, shares=shares))[1] for shares in (False, True)], threads(0), torch.get_num_threads())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout.strip() == "[9, 1] 9 9", told.stderr
