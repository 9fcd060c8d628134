"""
What the service says: log lines for people on stderr, as JSON in a file that is rotated, and one live line on a terminal.
"""

import json
import logging
import logging.handlers
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from lib.errors import Unusable
from lib.vitals import Seldom

LOG = logging.getLogger("berger")
FILE_BYTES, FILES = 5 * 2**20, 3  # of --log-file, before it is rotated; how many old ones are kept


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, event, message, and what was given by `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class OneLine(logging.StreamHandler):
    """Lines on stderr that first wipe the live line, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
        super().emit(record)


def start(level: str, file: Path | None) -> None:
    """Set up the log anew. Raises Unusable if the file can't be written."""
    stop()
    screen = OneLine(sys.stderr)
    screen.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    handlers: list[logging.Handler] = [screen]
    if file is not None:
        try:
            rotated = logging.handlers.RotatingFileHandler(
                file, maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8"
            )
        except OSError as error:
            raise Unusable(f"--log-file {file} can't be written: {error.strerror}") from None
        rotated.setFormatter(JsonLines())
        handlers.append(rotated)
    for handler in handlers:
        LOG.addHandler(handler)
    LOG.setLevel(level.upper())
    LOG.propagate = False


def stop() -> None:
    """Close the log's files."""
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()


def say(level: int, message: str, **fields: Any) -> None:
    """A log line; `fields` go into the file's JSON only."""
    LOG.log(level, "%s", message, extra={"fields": fields})


class Complaints:
    """Warnings, each kind at most once in ten seconds, with how many were held back."""

    def __init__(self):
        self.seldom = Seldom()

    def __call__(self, kind: str, text: str, error: BaseException | None = None) -> None:
        """Say it, with a traceback if there is an error, unless it was just said."""
        held = self.seldom(kind)
        if held is not None:
            more = f" ({held} more since)" if held else ""
            LOG.warning("%s%s", text, more, exc_info=error, extra={"fields": {"kind": kind}})


def live(text: str) -> None:
    """Rewrite the live line; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{text[:width]}")
        sys.stderr.flush()
