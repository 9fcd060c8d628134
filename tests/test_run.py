"""The command line and the run directory: flags, exit statuses, the one JSON line, the log, state that survives anything."""

import dataclasses
import json
import os
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
from lib.prefetch import Prefetch
from lib.ranks import Ranks, join
from lib.run import Run, RunConfig, saved_config

ONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Config(RunConfig):
    lr: float = 0.1  # learning rate
    band_hz: tuple[float, float] | None = (0.5, 45.0)  # pass band, Hz
    adapter: Literal["none", "perceiver"] = "none"  # kind


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
    with pytest.raises(Unusable, match="exists"):  # --overwrite deletes runs, nothing else
        Run(Config(name="notes", overwrite=True), str(script), ONE)
    assert (foreign / "thesis.txt").exists()
    run.close()


def test_resume_takes_the_flags_of_the_run(script):
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
    path = run.directory / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)
    with pytest.raises(Unusable, match="state.safetensors is damaged"):
        run.restore({"model": model}, optimizer)
    run.close()


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
    assert [loader.next() for _ in range(3)] == [4, 9, 16]
    with pytest.raises(Unusable, match="shard 5"):
        loader.next()
    loader.close()


def test_prefetch_stops_while_it_waits_for_a_slow_consumer():
    drawn = []
    loader = Prefetch(lambda step: drawn.append(step), 0, 10**6, depth=2)
    loader.next()
    loader.close()
    assert len(drawn) < 10 and loader.waited_s >= 0
