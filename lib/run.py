"""
A training run's directory: what was run, its log, and the state from which it goes on as if it had never stopped.

    runs/NAME/config.json                  every flag
    runs/NAME/command.txt                  the command lines and git revisions that wrote it, one per start
    runs/NAME/code/                        the script and lib/ as they were
    runs/NAME/log.jsonl                    one JSON object per line, the same keys in all phases; events have `event`
    runs/NAME/state.safetensors            everything needed to resume; written whole or not at all, verified when read
    runs/NAME/state.previous.safetensors   the one before: used if the newest is damaged, or was bad already
    runs/NAME/state.stopped.safetensors    where a signal ended the run, until the next save
    runs/NAME/best/step-000400.safetensors the best checkpoints by validation loss
"""

import dataclasses
import json
import math
import os
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from lib.command import json_line
from lib.errors import Failed, Unusable
from lib.prefetch import Prefetch
from lib.ranks import Ranks
from lib.store import DISK_FULL, write_atomic
from lib.tensors import load_tensors, save_tensors
from lib.tracker import Tracker, check_tracker

Dtype = Literal["auto", "float32", "bfloat16"]
# keys of log.jsonl that depend on the clock and the machine; all others are the same however often a run was resumed
MEASURED = ("seconds", "windows_per_s", "tokens_per_s", "loader_wait", "matmul_share", "memory_mb")


def without_val(recordings: int, window: str) -> str:
    """The line of a run that has no window to validate on, although val may have so many recordings; `window` is its length."""
    told = "val_loss, best/ and what is watched are of training windows"
    if not recordings:
        return f"there is no val split: {told}"
    return f"no recording of val ({recordings}) holds a window of {window}: {told}; take shorter windows, or others for val ([split] in dataset.toml)"


@dataclass(frozen=True)
class RunConfig:
    """Flags of every training script that nobody ablates."""

    preset: Literal["mini", "base", "full"] = "mini"  # set of defaults: two cores in minutes, one GPU, several GPUs
    name: str | None = None  # of the run below runs/, or its path; none: the phase and the next number, as in jepa-3
    resume: bool = False  # go on with run --name, or with the newest run of the phase, with that run's own flags
    overwrite: bool = False  # delete the run of that name first
    seed: int = 0  # of weights, batches and masks
    device: str = "auto"  # cuda if there is one, else cpu
    dtype: Dtype = "auto"  # of matrix products; auto: measured, kept on resume; name one to repeat a run
    compile: bool = False  # torch.compile; needs a C++ compiler on CPUs
    log_every: int = 10  # steps per line of log.jsonl
    eval_every: int = 100  # steps between validations; 0: only at the end
    save_every: int = 100  # steps between saves of the state
    probe_epochs: float = 0.0  # epochs between linear probes; 0: only before the first step and at the end
    wandb: str | None = None  # project of Weights & Biases to log to as well; needs pip install -e '.[wandb]'


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
        others = sorted(p.name for p in (directory / "code").glob("*.py") if p.name != Path(sys.argv[0]).name)
        if others:  # of another phase
            raise Unusable(
                f"{directory} is a run of {others[0]}: python {others[0]} --name {directory} --resume"
            ) from error
        raise Unusable(
            f"{directory} was written by another version of this script ({error}); start a new run"
        ) from error


def due(step: int, every: int) -> bool:
    """Whether something done `every` so many steps is done after `step` of them; 0: never."""
    return every > 0 and step % every == 0


def steps_of(epochs: float, windows: int, batch: int) -> int:
    """Steps of `batch` windows in so many passes over `windows` of them: at least one, but none for no epochs."""
    return max(1, round(epochs * windows / batch)) if epochs else 0


LARGE = 512  # windows of a batch, which fit anywhere: the default one should do for the smallest data set


def check_batch(batch: int, windows: int, of: str = "training windows") -> None:
    """Raises Unusable for a large batch of more windows than there are, which may not fit into memory; a small one holds some of them twice."""
    if batch > max(windows, LARGE):
        raise Unusable(f"--batch {batch} is more than the {windows} {of} there are: --batch {windows} at most")


def median_speed(lines: Sequence[dict]) -> float:
    """Windows per second in lines of log.jsonl; 0 if none has any."""
    return statistics.median([line["windows_per_s"] for line in lines if line.get("windows_per_s")] or [0.0])


class Pace:
    """Speed since the last line of the log, evaluation and saving left out."""

    def __init__(self, device: torch.device):
        self.device, self.busy_s, self.steps, self.windows, self.tokens = device, 0.0, 0, 0, 0.0

    def add(self, began: float, windows: int, tokens: float) -> None:
        """Count a step that began, with its batch at hand, at `began` (time.perf_counter)."""
        self.busy_s += time.perf_counter() - began
        self.steps += 1
        self.windows += windows
        self.tokens += tokens

    def take(self, loader: Prefetch, ideal_s: float) -> dict[str, float]:
        """The numbers for the log, `ideal_s` being what the last step's matrix products take by themselves; counting starts anew."""
        seconds = self.busy_s + loader.waited_s
        numbers = {
            "windows_per_s": round(self.windows / seconds, 1),
            "tokens_per_s": round(self.tokens / seconds),
            "loader_wait": round(loader.waited_s / seconds, 4),  # share of the time
            "matmul_share": round(ideal_s * self.steps / seconds, 4),  # of the measured rate of matrix products
            "memory_mb": self._memory_mb(),
        }
        self.busy_s, self.steps, self.windows, self.tokens, loader.waited_s = 0.0, 0, 0, 0.0, 0.0
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

    `data` identifies what the run reads (`Cache.fingerprint`): it isn't resumed on anything else. Raises Unusable if the directory holds a run and
    neither --resume nor --overwrite was given, if it can't be written, if --overwrite would delete what a flag names, or --wandb isn't installed.
    """

    def __init__(self, cfg: RunConfig, script: str, ranks: Ranks, data: str = ""):
        self.ranks, self.data, self.stop, self._saved, self._lines = ranks, data, False, None, 0
        self.started, self.script = time.perf_counter(), Path(script).name
        directory = self.problem = None
        if ranks.first:  # an error must reach all ranks, or the others would wait for ever
            try:
                directory = self._prepare(cfg, Path(script))
            except Unusable as error:
                self.problem = str(error)
            except OSError as error:
                self.problem = f"{error.filename or _directory(cfg, script)}: {error.strerror}; give another --name"
        directory, self.problem = ranks.agree((directory, self.problem))
        if self.problem:
            raise Unusable(self.problem)
        self.directory: Path = directory
        self.name = directory.name
        names = ("state.stopped.safetensors", "state.safetensors", "state.previous.safetensors")
        self._stopped, self._newest, self._previous = (self.directory / name for name in names)
        self._log = open(self.directory / "log.jsonl", "a", encoding="utf-8") if ranks.first else None
        tracked = cfg.wandb and ranks.first
        self._tracker = Tracker(cfg.wandb, self.directory, dataclasses.asdict(cfg)) if tracked else None
        self._handlers = {n: signal.signal(n, self._interrupt) for n in (signal.SIGINT, signal.SIGTERM)}

    def _prepare(self, cfg: RunConfig, script: Path) -> Path:
        if cfg.wandb:
            check_tracker()
        directory = _directory(cfg, script)
        if not cfg.resume:
            begun = (directory / "config.json").exists()
            if cfg.overwrite and begun:
                _spare_named(cfg, directory)
                shutil.rmtree(directory)
            if directory.is_file() or directory.is_dir() and any(directory.iterdir()):
                how = "go on with --resume, replace it with --overwrite, or choose another --name"
                raise Unusable(f"{directory} exists{f': {how}' if begun else ' and is no run: choose another --name'}")
            directory.mkdir(parents=True, exist_ok=True)
            flags = {**dataclasses.asdict(cfg), "resume": False, "overwrite": False}  # first: it is what makes a run
            write_atomic(directory / "config.json", json.dumps(json.loads(json_line(flags)), indent=1).encode())
            root = script.resolve().parent
            shutil.copytree(root / "lib", directory / "code" / "lib", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy2(script, directory / "code" / script.name)
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

    def interrupt(self, where: str) -> NoReturn:
        """End the process after a signal, with how to go on. Raises KeyboardInterrupt."""
        go_on = shlex.join(["python", self.script, "--name", str(self.directory), "--resume"])
        raise KeyboardInterrupt(f"{where}; go on with: {go_on}")

    def seconds(self) -> float:
        """Since this process began."""
        return time.perf_counter() - self.started

    def say(self, *words) -> None:
        """A line for the user."""
        if self.ranks.first:
            tqdm.write(" ".join(map(str, words)), file=sys.stderr)
            sys.stderr.flush()

    def log(self, step: int, **values) -> None:
        """Append a line to log.jsonl."""
        if self.ranks.first:
            line = {"step": step, **values, "seconds": round(self.seconds(), 3)}
            self._log.write(json_line(line) + "\n")
            self._log.flush()
            self._lines += 1
            if self._tracker:
                self._tracker.log(line)

    def lines(self, most: int | None = None) -> list[dict]:
        """The first `most` lines of log.jsonl (None: all); one that a kill cut short is left out. Raises Unusable if one can't be read."""
        path, lines = self.directory / "log.jsonl", []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1][:most]:
            try:
                lines.append(json.loads(line))
            except ValueError:
                words = "was damaged since it was written; put it back, or start a new run"
                raise Unusable(f"{path}, line {len(lines) + 1}, {words}") from None
        return lines

    def results(self, state: dict, metrics: dict, parameters: int, **more) -> dict:
        """What a command that has trained an encoder prints in its last line."""
        return {
            "run": str(self.directory),
            "step": state["step"],
            "metrics": metrics,
            **more,
            "windows_per_s": median_speed(self.lines()),
            "seconds": round(self.seconds(), 1),
            "parameters": parameters,
            "dtype": state["dtype"],
            "encoder": str(self.directory / "encoder.safetensors"),
        }

    def among_best(self, state: dict, loss: float, most: int) -> Path | None:
        """
        Where to write a checkpoint of validation loss `loss`, or None if `most` checkpoints are better; `state` has them as `best`.

        Those that drop out are deleted by the next `save`, when nothing can go back to a state that names them.
        """
        mine = [loss, state["step"]]
        ranked = sorted([*state["best"], mine])[:most]
        if not math.isfinite(loss) or mine not in ranked:
            return None
        state["best"] = ranked
        (self.directory / "best").mkdir(exist_ok=True)
        return self._best(state["step"])

    def _best(self, step: int) -> Path:
        return self.directory / "best" / f"step-{step:06d}.safetensors"

    @property
    def fresh(self) -> bool:
        """Whether no state of the run was saved yet, by this process or the one it resumes: what comes before the first step is due."""
        return self._saved is None

    def save(
        self, state: dict, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, on_time: bool = True
    ) -> None:
        """
        Write the state of the run; `state` is JSON and has `step`, the number of steps done. Raises Failed if the disk is full.

        What a signal makes save is not `on_time`: it is resumed from but never rolled back to, because a run must end alike
        whether it was stopped or not.
        """
        if not self.ranks.first:
            return
        os.fsync(self._log.fileno())  # the state must never be ahead of the log
        tensors = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": t for key, t in values.items()}
        if on_time and self._newest.exists() and self._saved < state["step"]:
            os.replace(self._newest, self._previous)
        if on_time:
            self._stopped.unlink(missing_ok=True)
        try:
            path = self._newest if on_time else self._stopped
            save_tensors(path, tensors, {"state": state, "lines": self._lines, "data": self.data})
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise Failed(f"no space to save {self.directory}: make some, and go on with --resume") from error
        if on_time:
            self._saved = state["step"]
            kept = {self._best(step) for _, step in state.get("best", [])}
            for path in set((self.directory / "best").glob("step-*.safetensors")) - kept:
                path.unlink()

    def restore(self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict:
        """
        Load the newest state, cut the log back to it, and return what was given to `save`; {"step": 0} if nothing was saved yet.

        Raises Unusable if no state is whole, or if it doesn't fit the model, the log or the data.
        """
        label = self._load((self._stopped, self._newest, self._previous), math.inf, modules, optimizer)
        state, lines = (label["state"], label["lines"]) if label else ({"step": 0}, 0)
        if label and label.get("data", self.data) != self.data:
            words = "the cache at the path it names was built anew; put the old one back, or start a new run"
            raise Unusable(f"{self.directory} was trained on other data: {words}")
        kept, problem = [], None
        if self.ranks.first:
            try:
                kept = self.lines(lines)
            except Unusable as error:
                problem = str(error)
            if not problem and len(kept) < lines:
                words = f"has {len(kept)} of the {lines} lines that it had: put it back, or start a new run"
                problem = f"{self.directory / 'log.jsonl'} {words}"
        if problem := self.ranks.agree(problem):
            raise Unusable(problem)
        if self.ranks.first:
            self._log.close()
            write_atomic(self.directory / "log.jsonl", "".join(json_line(line) + "\n" for line in kept).encode())
            self._log, self._lines = open(self.directory / "log.jsonl", "a", encoding="utf-8"), lines
        self.say(f"resuming {self.directory} at step {state['step']}")
        return state

    def go_back(self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, before: int) -> dict:
        """
        Load the newest state saved on time after fewer than `before` steps, or the oldest there is; the log is kept.

        Raises Unusable as `restore`. For lib.recovery, which saves at once, so that the steps in between are never resumed from.
        """
        label = self._load((self._newest, self._previous), before, modules, optimizer)
        assert label, f"nothing was saved in {self.directory}: save before the first step"
        return label["state"]

    def _load(
        self, paths: tuple[Path, ...], before: float, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
    ) -> dict | None:
        """Fill modules and optimizer from the first file that is whole and of fewer than `before` steps, and drop the newer ones."""
        label, problems = None, []
        for path in (p for p in paths if p.exists()):
            try:
                tensors, label = load_tensors(path)
            except Unusable as error:
                problems.append(str(error))
                continue
            used = path
            if label["state"]["step"] < before:
                break
        if label is None and problems:
            raise Unusable("; ".join(problems))
        if self.ranks.agree(label) != label:
            raise Failed(f"the processes read different states in {self.directory}")
        if label is None:
            return None
        for problem in problems:
            self.say(f"{problem.split(';')[0]}: going on from {used.name}, step {label['state']['step']}")
        _fill(modules, optimizer, tensors, used)
        self.ranks.wait()  # until all have read it
        if self.ranks.first:
            states = (self._stopped, self._newest, self._previous)
            for path in states[: states.index(used)]:
                path.unlink(missing_ok=True)
            if used == self._previous:
                os.replace(used, self._newest)
        self._saved = label["state"]["step"]
        if "best" in label["state"]:  # those of an older state may be gone
            label["state"]["best"] = [b for b in label["state"]["best"] if self._best(b[1]).exists()]
        return label

    def close(self) -> None:
        """Close the log, give signals back, and leave the process group."""
        if self._log:
            self._log.close()
        if self._tracker:
            self._tracker.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.ranks.close()


def _fill(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, tensors: dict, path: Path) -> None:
    """Load what `save` wrote. Raises Unusable if it doesn't fit."""
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


def _spare_named(cfg: RunConfig, directory: Path) -> None:
    """Raises Unusable for a flag that names a file in a directory that is about to be deleted."""
    for name, value in dataclasses.asdict(cfg).items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            inside = name != "name" and isinstance(text, str) and directory.resolve() in Path(text).resolve().parents
            if inside and Path(text).exists():
                flag = f"--{name.replace('_', '-')} {text}"
                raise Unusable(f"--overwrite would delete {flag} with {directory}: choose another --name")


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
