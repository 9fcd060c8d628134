"""
What every phase does when training goes wrong, so that it goes on: steps that must not be taken, and too little memory.

A step whose loss or gradient isn't finite, or whose gradient is far beyond any before it, is skipped, counted, and its batch named
in the log. After three in a row the weights are at fault, and the run goes back to the last good state it saved, at half the rate,
which recovers slowly. A rollback is a resume, as exact as one, and the run's state is saved at once. Every decision is made from that
state and from sums over all ranks: ranks decide alike, and a run that was killed decides the same again.
"""

import json
import math
import statistics
import sys

import torch
from torch import nn

from lib.command import json_line
from lib.errors import Failed
from lib.run import Run
from lib.store import write_atomic

IN_A_ROW = 3  # skipped steps that mean that the weights are at fault and not the batches
ROLLBACKS = 3  # to the same state before the run gives up
# times the median of the last norms. Norms of a healthy run spread over one or two decades (rare batches, warm-up, heads that start
# at zero), those of an exploding one grow without end, and clipping keeps the length of a step small but not its direction right.
EXPLODED = 1000.0
REMEMBERED, ENOUGH = 101, 20  # gradient norms that the median is of, at most and at least
CALM = 500  # steps taken after which a lowered rate doubles
OUT_OF_MEMORY = (
    "could not create a primitive",  # oneDNN
    "can't allocate memory",
    "ALLOC_FAILED",
)  # in the errors of the CPU's allocator, and of cuBLAS and cuDNN


def fresh(micro: int) -> dict:
    """What the state of a run holds for this file; `micro` as of --micro (windows per forward pass, 0: all)."""
    counts = {"skipped": 0, "rollbacks": 0, "halvings": 0, "checkpointing": False}  # in all
    rate = {"lr_scale": 1.0, "calm": 0}  # factor of the learning rate, and steps taken since it changed
    # the last norms; what was skipped in a row up to now; steps skipped before a rollback; the state gone back to last, how often
    return counts | rate | {"micro": micro, "norms": [], "streak": [], "suspects": [], "returned": [0, 0]}


def sound(state: dict, loss: float, norm: float) -> bool:
    """Whether a step of this loss and gradient norm (before clipping, over all ranks) may be taken; if so it is counted as taken."""
    usual = statistics.median(state["norms"]) if len(state["norms"]) >= ENOUGH else 0.0
    if not (math.isfinite(loss) and math.isfinite(norm)) or norm > EXPLODED * usual > 0:
        return False
    state["norms"] = [*state["norms"], norm][-REMEMBERED:]
    state["streak"] = []
    state["calm"] += 1
    if state["lr_scale"] < 1 and state["calm"] >= CALM:
        state["lr_scale"], state["calm"] = 2 * state["lr_scale"], 0
    return True


def skip(run: Run, state: dict, loss: float, norm: float, windows: list) -> bool:
    """
    Count and log a step that is not `sound`, with its `windows` (names or numbers, for the log); True if it is time to `go_back`.

    A batch that was skipped before a rollback and is bad again, from other weights, is bad itself: it doesn't count then.
    """
    step = state["step"] + 1
    state["skipped"] += 1
    state["streak"].append({"step": step, "loss": str(loss), "grad_norm": str(norm), "windows": windows})
    run.log(step, event="skipped", loss=loss, grad_norm=norm, windows=windows)
    run.say(f"step {step} skipped: loss {loss:g}, gradient norm {norm:g}; its windows are in {run.directory}/log.jsonl")
    return sum(bad["step"] not in state["suspects"] for bad in state["streak"]) >= IN_A_ROW


def go_back(run: Run, state: dict, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """
    Make model, optimizer and `state` what they were at the last save that a good step followed, and halve the rate.

    Raises Failed, with everything known in failed.json, after three times without progress.
    """
    streak, (place, times), last = state["streak"], state["returned"], state["step"] + 1
    saved = run.go_back(modules, optimizer, before=streak[0]["step"] - 1)
    times = times + 1 if place == saved["step"] else 1
    if times > ROLLBACKS:
        _give_up(run, state, saved["step"])
    kept = {name: state[name] for name in ("skipped", "micro", "halvings", "checkpointing")}
    state |= saved | kept
    state["lr_scale"], state["calm"] = min(saved["lr_scale"], state["lr_scale"]) / 2, 0
    state["rollbacks"] += 1
    state["streak"], state["returned"] = [], [saved["step"], times]
    state["suspects"] = sorted({*state["suspects"], *(bad["step"] for bad in streak)})
    run.log(state["step"], event="rollback", after=last, scale=state["lr_scale"], skipped_in_a_row=len(streak))
    run.say(f"back from step {last} to {state['step']}, at {state['lr_scale']:g} x the learning rate")
    run.save(state, modules, optimizer)


def _give_up(run: Run, state: dict, step: int) -> None:
    bad, path = state["streak"][-1], run.directory / "failed.json"
    if run.ranks.first:
        names = ("skipped", "rollbacks", "lr_scale", "micro", "norms", "streak")
        dump = {"state_of_step": step, **{name: state[name] for name in names}}
        write_atomic(path, json.dumps(json.loads(json_line(dump)), indent=1).encode())
    raise Failed(
        f"{ROLLBACKS} rollbacks to step {step} brought no progress; at step {bad['step']} the loss was {bad['loss']} and the gradient norm "
        f"{bad['grad_norm']}: lower --lr, or look at the windows in {path}"
    )


def halve(error: RuntimeError, run: Run, state: dict, windows: int, checkpoints: bool = False) -> None:
    """
    Make micro-batches half as large as the one of `windows` windows that `error` says doesn't fit into memory.

    The step is then begun anew, without the gradients it had so far: the global batch stays, and so does the result. Each rank does
    it for itself. At one window the last resort, for a phase that `checkpoints`, is to compute activations twice instead of keeping them.
    Raises Failed where nothing is left to be done, and `error` itself if it's about something else.
    """
    if not (isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)):
        raise error
    if windows == 1 and checkpoints and not state["checkpointing"]:
        state["checkpointing"] = True
        run.log(state["step"] + 1, event="out_of_memory", checkpointing=True)
        print(f"rank {run.ranks.rank}: out of memory with one window, checkpointing activations", file=sys.stderr)
        return
    if windows == 1:
        raise Failed(
            "out of memory with one window at a time: lower --max-channels, --window-s or --d-model"
        ) from error
    state["micro"] = windows // 2
    state["halvings"] += 1
    run.log(state["step"] + 1, event="out_of_memory", micro=state["micro"])
    print(f"rank {run.ranks.rank}: out of memory with {windows} windows, going on with {windows // 2}", file=sys.stderr)
