"""
Weights & Biases beside log.jsonl, for who asks for it (--wandb PROJECT). It may fail; training goes on without it.
"""

import sys
import uuid
from pathlib import Path

from lib.errors import Unusable
from lib.store import write_atomic


def check_tracker() -> None:
    """Raises Unusable if the package isn't installed."""
    try:
        from wandb import init  # noqa: F401 (a folder of that name, such as offline runs leave behind, has no init)
    except ImportError as error:
        raise Unusable("--wandb needs a package that isn't there: pip install -e '.[wandb]'") from error


class Tracker:
    """The tracker's copy of one run, under an id that runs/NAME/wandb_id keeps for --resume. WANDB_MODE counts, as everywhere."""

    def __init__(self, project: str, directory: Path, config: dict):
        import wandb  # here, because nothing must import it without the flag

        self._failures = (wandb.Error, OSError)
        self._run = None
        known = directory / "wandb_id"
        if not known.exists():
            write_atomic(known, uuid.uuid4().hex[:8].encode())
        where = {"project": project, "name": directory.name, "dir": str(directory)}
        try:
            run = wandb.init(
                **where,
                id=known.read_text(),
                resume="allow",
                config=config,
                settings=wandb.Settings(console="off"),  # the last line of stdout stays ours
            )
            run.define_metric("*", step_metric="step")  # its own steps can't go back, and ours can
        except self._failures as error:
            self._give_up(error)
        else:
            self._run = run

    def log(self, values: dict) -> None:
        """Send a line of the log."""
        if self._run:
            try:
                self._run.log(values)
            except self._failures as error:
                self._give_up(error)

    def close(self) -> None:
        """Send the rest and say that the run is over."""
        if self._run:
            try:
                self._run.finish()
            except self._failures as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"--wandb: {reason}; going on without it (log.jsonl has everything)", file=sys.stderr, flush=True)
