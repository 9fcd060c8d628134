"""
A training run's directory: what was run, its log, and the state from which it goes on as if it had never stopped.

    runs/NAME/config.json        every flag
    runs/NAME/command.txt        the command lines and git revisions that wrote it, one per start
    runs/NAME/code/              the script and lib/ as they were
    runs/NAME/log.jsonl          one JSON object per line, the same keys in all phases
    runs/NAME/state.safetensors  everything needed to resume; written whole or not at all
"""

import dataclasses
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lib.command import json_line
from lib.errors import Unusable
from lib.prefetch import Prefetch
from lib.ranks import Ranks
from lib.store import write_atomic
from lib.tensors import load_tensors, save_tensors

Dtype = Literal["auto", "float32", "bfloat16"]
# keys of log.jsonl that depend on the clock and the machine; all others are the same however often a run was resumed
MEASURED = ("seconds", "windows_per_s", "tokens_per_s", "loader_wait", "memory_mb")


@dataclass(frozen=True)
class RunConfig:
    """Flags of every training script that nobody ablates."""

    preset: Literal["mini", "base", "full"] = "mini"  # set of defaults: two cores in minutes, one GPU, several GPUs
    name: str | None = (
        None  # of the run below runs/, or its path; none: the phase and the next free number, as in jepa-3
    )
    resume: bool = False  # go on with run --name, or with the newest run of the phase, with that run's own flags
    overwrite: bool = False  # delete the run of that name first
    seed: int = 0  # of weights, batches and masks
    device: str = "auto"  # cuda if there is one, else cpu
    dtype: Dtype = "auto"  # of matrix products; auto: measured at the start and kept on resume
    compile: bool = False  # torch.compile; needs a C++ compiler on CPUs
    log_every: int = 10  # steps per line of log.jsonl
    eval_every: int = 100  # steps between validations; 0: only at the end
    save_every: int = 100  # steps between saves of the state
    probe_every: int = 0  # steps between linear probes; 0: only before the first step and at the end


def saved_config(cfg: RunConfig) -> RunConfig:
    """The configuration of the run that `cfg` asks to resume. Raises Unusable if there is none."""
    directory = _directory(cfg, sys.argv[0]) if cfg.name else _newest(_phase(sys.argv[0]))
    try:
        saved = json.loads((directory / "config.json").read_text())
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return dataclasses.replace(
            type(cfg)(**values), name=cfg.name or str(directory), resume=True, overwrite=cfg.overwrite
        )
    except (OSError, ValueError) as error:
        raise Unusable(f"no run to resume at {directory} ({error}); leave out --resume to start one") from error
    except TypeError as error:
        raise Unusable(
            f"{directory} was written by another version of this script ({error}); start a new run"
        ) from error


def due(step: int, every: int) -> bool:
    """Whether something done `every` so many steps is done after `step` of them; 0: never."""
    return every > 0 and step % every == 0


class Pace:
    """Speed since the last line of the log, evaluation and saving left out."""

    def __init__(self, device: torch.device):
        self.device, self.busy_s, self.windows, self.tokens = device, 0.0, 0, 0.0

    def add(self, began: float, windows: int, tokens: float) -> None:
        """Count a step that began at `began` (time.perf_counter)."""
        self.busy_s += time.perf_counter() - began
        self.windows += windows
        self.tokens += tokens

    def take(self, loader: Prefetch) -> dict[str, float]:
        """The numbers for the log; counting starts anew."""
        numbers = {
            "windows_per_s": round(self.windows / self.busy_s, 1),
            "tokens_per_s": round(self.tokens / self.busy_s),
            "loader_wait": round(loader.waited_s / self.busy_s, 4),  # share of the time
            "memory_mb": self._memory_mb(),
        }
        self.busy_s, self.windows, self.tokens, loader.waited_s = 0.0, 0, 0.0, 0.0
        return numbers

    def _memory_mb(self) -> int:
        """The most that was in use: of the GPU's memory, or of the process's."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


class Run:
    """
    The directory of one run. Only the first rank writes; every rank reads when resuming.

    Raises Unusable if the directory holds a run and neither --resume nor --overwrite was given.
    """

    def __init__(self, cfg: RunConfig, script: str, ranks: Ranks):
        self.ranks, self.stop = ranks, False
        self.started = time.perf_counter()
        directory = self.problem = None
        if ranks.first:  # an error must reach all ranks, or the others would wait for ever
            try:
                directory = self._prepare(cfg, Path(script))
            except Unusable as error:
                self.problem = str(error)
        directory, self.problem = ranks.agree((directory, self.problem))
        if self.problem:
            raise Unusable(self.problem)
        self.directory: Path = directory
        self.name = directory.name
        self._log = open(self.directory / "log.jsonl", "a", encoding="utf-8") if ranks.first else None
        self._handlers = {n: signal.signal(n, self._interrupt) for n in (signal.SIGINT, signal.SIGTERM)}

    def _prepare(self, cfg: RunConfig, script: Path) -> Path:
        directory = _directory(cfg, script)
        if not cfg.resume:
            if cfg.overwrite and (directory / "config.json").exists():  # never a directory that isn't a run
                shutil.rmtree(directory)
            try:
                directory.mkdir(parents=True)
            except FileExistsError:
                if any(directory.iterdir()):
                    raise Unusable(
                        f"{directory} exists: go on with --resume, replace it with --overwrite, or choose another --name"
                    ) from None
            root = script.resolve().parent
            shutil.copytree(root / "lib", directory / "code" / "lib", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy2(script, directory / "code" / script.name)
            flags = {**dataclasses.asdict(cfg), "resume": False, "overwrite": False}
            write_atomic(directory / "config.json", json.dumps(json.loads(json_line(flags)), indent=1).encode())
        with open(directory / "command.txt", "a", encoding="utf-8") as file:
            file.write(
                f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {_revision(script)} {shlex.join([sys.executable, *sys.argv])}\n"
            )
        return directory

    def _interrupt(self, number: int, frame) -> None:
        """The first signal lets the step finish and its state be saved; the second one ends the process at once."""
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def seconds(self) -> float:
        """Since this process began."""
        return time.perf_counter() - self.started

    def say(self, *words) -> None:
        """A line for the user."""
        if self.ranks.first:
            print(*words, file=sys.stderr, flush=True)

    def log(self, step: int, **values) -> None:
        """Append a line to log.jsonl."""
        if self.ranks.first:
            self._log.write(json_line({"step": step, **values, "seconds": round(self.seconds(), 3)}) + "\n")
            self._log.flush()

    def lines(self) -> list[dict]:
        """What log.jsonl holds; a line that a kill cut short is left out."""
        lines = (self.directory / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def save(self, state: dict, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Write the state of the run; `state` is JSON and has `step`, the number of steps done."""
        if not self.ranks.first:
            return
        os.fsync(self._log.fileno())  # the state must never be ahead of the log
        tensors = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": t for key, t in values.items()}
        save_tensors(self.directory / "state.safetensors", tensors, state)

    def restore(self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict:
        """
        Load what `save` wrote, cut the log back to it, and return its `state`; {"step": 0} if nothing was saved yet.

        Raises Unusable for a damaged state, or one that doesn't fit the model.
        """
        path, state = self.directory / "state.safetensors", {"step": 0}
        if path.exists():
            tensors, state = load_tensors(path)
            try:
                for name, module in modules.items():
                    own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
                    module.load_state_dict(own)
            except RuntimeError as error:
                raise Unusable(f"{path} doesn't fit this model: {str(error).splitlines()[-1].strip()}") from error
            moments: dict[int, dict] = {}
            for key, t in tensors.items():
                if key.startswith("optimizer."):
                    _, index, name = key.split(".")
                    moments.setdefault(int(index), {})[name] = t
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        if self.ranks.first:
            kept = [line for line in self.lines() if line["step"] <= state["step"]] if path.exists() else []
            self._log.close()
            write_atomic(self.directory / "log.jsonl", "".join(json_line(line) + "\n" for line in kept).encode())
            self._log = open(self.directory / "log.jsonl", "a", encoding="utf-8")
        self.say(f"resuming {self.directory} at step {state['step']}")
        return state

    def close(self) -> None:
        """Close the log, give signals back, and leave the process group."""
        if self._log:
            self._log.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.ranks.close()


def _phase(script: str | Path) -> str:
    return Path(script).stem.removeprefix("train_")


def _numbered(phase: str) -> dict[int, Path]:
    found = {p: p.name.removeprefix(f"{phase}-") for p in Path("runs").glob(f"{phase}-*")}
    return {int(number): path for path, number in found.items() if number.isdecimal()}


def _newest(phase: str) -> Path:
    numbered = _numbered(phase)
    if not numbered:
        raise Unusable(f"no run to resume: there is no runs/{phase}-*; name one with --name")
    return numbered[max(numbered)]


def _directory(cfg: RunConfig, script: str | Path) -> Path:
    if cfg.name is None:
        phase = _phase(script)
        return Path("runs") / f"{phase}-{max(_numbered(phase), default=0) + 1}"
    return Path(cfg.name) if os.sep in cfg.name else Path("runs") / cfg.name


def _revision(script: Path) -> str:
    """The git revision of the script's directory, with + if files were changed, or `unversioned`."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(script.resolve().parent), *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unversioned"
