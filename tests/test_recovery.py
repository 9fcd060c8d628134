"""Faults put into a training loop written like those of the phases: it goes on, says so, and ends alike however often it is killed."""

import copy
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lib import recovery
from lib.errors import Failed
from lib.optim import decay_groups, ema_momentum, ema_update, warmup_cosine
from lib.prefetch import Prefetch
from lib.ranks import Ranks
from lib.run import MEASURED, Run, RunConfig, due
from lib.tensors import load_tensors
from tests.recipes import ROOT

ONE = Ranks(0, 1, torch.device("cpu"))
SCRIPT = str(ROOT / "train_jepa.py")  # what is copied into the run


@dataclass(frozen=True)
class Config(RunConfig):
    lr: float = 0.01  # learning rate
    steps: int = 30  # optimizer steps
    batch: int = 12  # windows per step, over all ranks
    micro: int = 0  # windows per forward pass; 0: all
    clip: float = 1.0  # largest gradient norm
    log_every: int = 1  # steps
    save_every: int = 10  # steps


class Killed(Exception):
    """As by SIGKILL: nothing more is done."""


def draw(share, micro: int, step: int) -> list[torch.Tensor]:
    """Windows (b, 6) of a step in micro-batches."""
    x_BD = torch.randn(64, 6, generator=torch.Generator().manual_seed(step))[: share[-1] + 1][share]
    return list(x_BD.split(micro or len(x_BD)))


def healthy(state: dict, step: int, x_BD: torch.Tensor) -> float:
    """What the loss is multiplied with."""
    return 1.0


def train(cfg: Config, fault=healthy, ranks: Ranks = ONE, kill: tuple = (), stop: tuple = (), model=None) -> tuple:
    """State, model and teacher at the end; killed or stopped by a signal after so many steps of this process."""
    run, share = Run(cfg, SCRIPT, ranks), ranks.share(cfg.batch)
    torch.manual_seed(cfg.seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)) if model is None else copy.deepcopy(model)
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=cfg.lr, fused=True)
    modules, parameters, taken = {"model": model, "teacher": teacher}, list(model.parameters()), 0
    state = {"step": 0, "begun": False, "best": [], **recovery.fresh(cfg.micro)}
    if cfg.resume:
        state |= run.restore(modules, optimizer)
    if not state["begun"]:
        state["begun"] = True
        run.save(state, modules, optimizer)
    loader = Prefetch(lambda s: draw(share, state["micro"], s), state["step"], cfg.steps)
    try:
        for step, parts in loader:
            optimizer.zero_grad(set_to_none=True)
            lr = state["lr_scale"] * warmup_cosine(step, cfg.steps, cfg.lr, 3)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            loss_sum = torch.zeros(())
            try:
                for x_BD in parts:
                    loss = model(x_BD).square().mean(1).sum() * fault(state, step, x_BD)
                    loss.backward()
                    loss_sum += loss.detach()
            except RuntimeError as error:
                recovery.halve(error, run, state, max(map(len, parts)))
                loader.seek(step)
                continue
            gradients = [p.grad for p in parameters]
            loss, stopped = ranks.sum(gradients, [loss_sum / cfg.batch, taken in stop])
            torch._foreach_div_(gradients, cfg.batch)
            norm = float(nn.utils.clip_grad_norm_(parameters, cfg.clip))
            if recovery.sound(state, loss, norm):
                optimizer.step()
                ema_update(teacher, model, ema_momentum(step, cfg.steps, 0.9))
            elif recovery.skip(run, state, loss, norm, [step]):
                recovery.go_back(run, state, modules, optimizer)
                loader.seek(state["step"])
                continue
            state["step"] = done = step + 1
            taken += 1
            run.log(done, loss=loss, lr=lr, grad_norm=norm, skipped=state["skipped"])
            last, on_time = done == cfg.steps, due(done, cfg.save_every)
            if last or (on_time or stopped) and not state["streak"]:
                run.save(state, modules, optimizer, last or on_time)
            if stopped or taken in kill:
                raise Killed
    finally:
        loader.close()
        run.close()
    return state, model, teacher


@pytest.fixture
def cfg(tmp_path) -> Config:
    return Config(name=str(tmp_path / "run"))


def log(cfg: Config) -> list[dict]:
    """The lines of the log without what depends on the clock."""
    lines = map(json.loads, (Path(cfg.name) / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def events(cfg: Config, kind: str) -> list[dict]:
    return [line for line in log(cfg) if line.get("event") == kind]


def finite(*modules: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for module in modules for p in module.parameters())


# steps that must not be taken


def nan_at(*steps: int):
    return lambda state, step, x_BD: math.nan if step in steps else 1.0


def nan_at_full_rate(state, step, x_BD) -> float:
    """Weights that went bad because the rate was too high."""
    return math.nan if step >= 16 and state["lr_scale"] == 1 else 1.0


def test_one_bad_step_is_not_taken_and_its_batch_is_named(cfg):
    state, model, teacher = train(cfg, nan_at(7))
    assert state["skipped"] == 1 and state["rollbacks"] == 0 and finite(model, teacher)
    (event,) = events(cfg, "skipped")
    assert event["step"] == 8 and event["windows"] == [7] and event["loss"] is None
    assert [line["step"] for line in log(cfg) if "event" not in line] == list(range(1, 31))
    before, after = (load_tensors(Path(cfg.name) / f"state{s}.safetensors")[1]["state"] for s in (".previous", ""))
    assert before["step"] == 20 and after["step"] == 30


def test_weights_gone_bad_are_taken_back_at_half_the_rate(cfg):
    state, model, teacher = train(cfg, nan_at_full_rate)
    assert state["rollbacks"] == 1 and state["lr_scale"] == 0.5 and state["skipped"] == 3 and finite(model, teacher)
    (event,) = events(cfg, "rollback")
    assert event.items() >= {"step": 10, "after": 19, "scale": 0.5}.items()
    lines = log(cfg)
    at = lines.index(event)
    assert [line["step"] for line in lines[at + 1 :]] == list(range(11, 31))
    full = {line["step"]: line["lr"] for line in lines[:at] if "lr" in line}
    again = {line["step"]: line["lr"] for line in lines[at:] if "lr" in line}
    assert again[11] == full[11] / 2
    first = [line["loss"] for line in lines[:at] if line["step"] == 11]
    assert first == [line["loss"] for line in lines[at:] if line["step"] == 11]  # from the very weights of step 10


def test_bad_batches_in_a_row_are_passed_over_after_one_rollback(cfg):
    state, model, _ = train(cfg, nan_at(12, 13, 14))
    assert state["rollbacks"] == 1 and state["skipped"] == 6 and state["step"] == 30 and finite(model)
    assert [event["step"] for event in events(cfg, "skipped")] == [13, 14, 15] * 2


def test_a_state_saved_when_the_weights_were_already_bad_is_not_gone_back_to(cfg):
    def fault(state, step, x_BD):
        return math.nan if step >= 20 and state["lr_scale"] == 1 else 1.0

    state, *_ = train(cfg, fault)
    assert events(cfg, "rollback")[0]["step"] == 10 and state["step"] == 30


def test_what_never_gets_better_ends_in_a_dump(cfg):
    with pytest.raises(Failed, match="3 rollbacks to step 10.*loss was nan.*--lr.*failed.json"):
        train(cfg, lambda state, step, x_BD: math.nan if step > 15 else 1.0)
    dump = json.loads((Path(cfg.name) / "failed.json").read_text())
    assert dump["state_of_step"] == 10 and dump["rollbacks"] == 3 and dump["lr_scale"] == 0.125
    assert dump["streak"][-1]["windows"] == [dump["streak"][-1]["step"] - 1] and dump["streak"][0]["loss"] == "nan"
    assert [event["step"] for event in events(cfg, "rollback")] == [10, 10, 10]
    states = [load_tensors(Path(cfg.name) / f"state{s}.safetensors")[1]["state"]["step"] for s in (".previous", "")]
    assert states == [0, 10]  # a rollback takes the place of the state it went back to, not of the one before


def test_a_gradient_a_thousand_times_the_usual_is_not_stepped_on(cfg):
    clean, *_ = train(replace(cfg, name=cfg.name + "-clean"))
    state, model, _ = train(cfg, lambda state, step, x_BD: 1e5 if step == 25 else 1.0)
    assert state["skipped"] == 1 and finite(model)
    (event,) = events(cfg, "skipped")
    assert event["step"] == 26 and event["grad_norm"] > 1000 * max(clean["norms"])
    ten_times, *_ = train(replace(cfg, name=cfg.name + "-10"), lambda s, step, x: 10.0 if step == 25 else 1.0)
    assert ten_times["skipped"] == 0


def test_a_run_that_really_diverges_is_brought_back(cfg):
    """Gradient descent on a parabola diverges at more than 2 / curvature; plain SGD, because AdamW would hide it."""
    run = Run(cfg, SCRIPT, ONE)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters())
    state = {"step": 0, **recovery.fresh(0)}
    run.save(state, {"model": model}, optimizer)
    loader = Prefetch(lambda step: torch.ones(1, 1), 0, 200)
    for step, x_BD in loader:
        optimizer.param_groups[0]["lr"] = 5.0 * state["lr_scale"]
        optimizer.zero_grad()
        loss = model(x_BD).square().sum() / 2
        loss.backward()
        norm = float(model.weight.grad.norm())
        if recovery.sound(state, loss.item(), norm):
            optimizer.step()
        elif recovery.skip(run, state, loss.item(), norm, [step]):
            recovery.go_back(run, state, {"model": model}, optimizer)
            loader.seek(state["step"])
            continue
        state["step"] = step + 1
        if due(step + 1, cfg.save_every) and not state["streak"]:
            run.save(state, {"model": model}, optimizer)
    run.close()
    assert 1 <= state["rollbacks"] <= 2 and loss.item() < 1e-12


def test_a_lowered_rate_recovers_slowly():
    state = recovery.fresh(0) | {"lr_scale": 0.25}
    scales = []
    for _ in range(3 * recovery.CALM):
        assert recovery.sound(state, 1.0, 1.0)
        scales.append(state["lr_scale"])
    assert scales[recovery.CALM - 2 : recovery.CALM] == [0.25, 0.5] and scales[-1] == 1.0


# the same end, however often it was killed


@pytest.mark.parametrize(
    "how",
    [
        dict(kill=(4,)),
        dict(kill=(18,)),  # in the middle of the bad steps
        dict(kill=(19,)),  # just after going back
        dict(kill=(23,)),
        dict(stop=(13,)),  # a signal between the saves, before and after
        dict(stop=(17,)),
        dict(stop=(22,)),
    ],
    ids=str,
)
def test_a_run_killed_about_a_rollback_ends_in_the_same_bytes(how, cfg, tmp_path):
    straight = replace(cfg, name=str(tmp_path / "straight"))
    train(straight, nan_at_full_rate)
    with pytest.raises(Killed):
        train(cfg, nan_at_full_rate, **how)
    with pytest.raises(Killed):  # and once more
        train(replace(cfg, resume=True), nan_at_full_rate, kill=(3,))
    train(replace(cfg, resume=True), nan_at_full_rate)
    assert log(cfg) == log(straight)
    for name in ("state.safetensors", "state.previous.safetensors"):
        assert (Path(cfg.name) / name).read_bytes() == (Path(straight.name) / name).read_bytes()
    assert not (Path(cfg.name) / "state.stopped.safetensors").exists()


def test_a_kill_between_going_back_and_saving_it_changes_nothing(cfg, tmp_path, monkeypatch):
    straight = replace(cfg, name=str(tmp_path / "straight"))
    train(straight, nan_at_full_rate)
    honest = Run.save

    def save(run, state, *args):
        if state["rollbacks"]:
            raise Killed
        honest(run, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save)
        with pytest.raises(Killed):
            train(cfg, nan_at_full_rate)
    train(replace(cfg, resume=True), nan_at_full_rate)
    assert log(cfg) == log(straight)


# too little memory


def room_for(windows: int):
    """A device on which so many windows fit."""

    def fault(state, step, x_BD):
        if len(x_BD) > windows and step >= 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return 1.0

    return fault


def test_micro_batches_are_halved_until_they_fit_and_the_result_stays(cfg, tmp_path):
    straight = replace(cfg, name=str(tmp_path / "straight"))
    _, model, teacher = train(straight)
    state, ours, our_teacher = train(cfg, room_for(4))
    assert state["micro"] == 3 and state["halvings"] == 2 and state["skipped"] == 0
    assert [event["micro"] for event in events(cfg, "out_of_memory")] == [6, 3]
    assert [line["step"] for line in log(cfg) if "event" not in line] == list(range(1, 31))
    for a, b in zip(
        [*ours.parameters(), *our_teacher.parameters()], [*model.parameters(), *teacher.parameters()], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(Killed):  # what was learned of the memory is kept
        train(replace(cfg, name=cfg.name + "-2"), room_for(4), kill=(12,))
    state, *_ = train(replace(cfg, name=cfg.name + "-2", resume=True), room_for(4))
    assert state["micro"] == 3 and log(replace(cfg, name=cfg.name + "-2")) == log(cfg)


def test_gradients_are_the_same_in_halves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    gradients = []
    for micro in (0, 6, 3, 1):
        model.zero_grad()
        for x_BD in draw(range(12), micro, 0):
            model(x_BD.double()).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-13, atol=1e-13)


def test_one_window_that_does_not_fit_ends_the_run(cfg):
    with pytest.raises(Failed, match="one window at a time.*--max-channels"):
        train(cfg, room_for(0))


def test_other_errors_are_not_taken_for_memory(cfg):
    def fault(state, step, x_BD):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        train(cfg, fault)


def test_the_allocators_own_error_is_understood(cfg):
    run, state = Run(cfg, SCRIPT, ONE), {"step": 0, **recovery.fresh(0)}
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    recovery.halve(caught.value, run, state, 12)
    assert state["micro"] == 6
    run.close()


# several processes


PROGRAM = """
import dataclasses, json, math, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from lib.ranks import join
from tests.test_recovery import Config, train

def fault(state, step, x_BD):
    if ranks.rank == 1 and step == 6 and len(x_BD) > 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return math.nan if ranks.rank == 1 and step >= 14 and state["lr_scale"] == 1 else 1.0

ranks = join("cpu")
state, model, _ = train(Config(name={name!r}, steps=20), fault, ranks)
torch.save([p.detach() for p in model.parameters()], f"{folder}/{{ranks.rank}}.pt")
json.dump(state, open(f"{folder}/{{ranks.rank}}.json", "w"))
"""


def test_two_ranks_of_which_one_sees_the_fault_decide_alike(tmp_path, cfg):
    program = PROGRAM.format(root=str(ROOT), name=str(tmp_path / "two"), folder=str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    words = [sys.executable, "-c", program]
    processes = [subprocess.Popen(words, env={**env, "RANK": r}, stderr=subprocess.PIPE, text=True) for r in "01"]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in "01")
    assert first["rollbacks"] == 1 and first["lr_scale"] == 0.5 and first["skipped"] == 3
    assert second["micro"] == 3 and first["micro"] == 0  # of which only one ran short
    for name in ("step", "skipped", "rollbacks", "lr_scale", "calm", "norms", "returned", "suspects"):
        assert first[name] == second[name]
    ours, theirs = (torch.load(tmp_path / f"{r}.pt") for r in "01")
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def fault(state, step, x_BD):
        return math.nan if step >= 14 and state["lr_scale"] == 1 else 1.0

    _, model, _ = train(replace(cfg, steps=20), fault)
    for a, b in zip(model.parameters(), ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
