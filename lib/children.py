"""
Processes that the service starts: whatever a source imports, or dies of, is not the service's.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections import Counter
from pathlib import Path

from lib import command
from lib.errors import Failed, Unusable
from lib.journal import LOG, say
from lib.producer import PARENT_VARIABLE

PATIENCE_S = 2.0  # for a process that was asked to end


async def run(script: Path, words: list, kind: str, variables: dict[str, str]) -> tuple[int, str]:
    """
    Run `python script words` to its end: exit status and last line on stderr, which all go to the log.

    When this is cancelled the process is ended too.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script.resolve()),
        *map(str, words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **variables, PARENT_VARIABLE: str(os.getpid())},
    )
    last = ""
    try:
        async for text in _lines(child.stderr):
            last = text
            LOG.info("%s: %s", kind, text)
        return await child.wait(), last
    finally:
        if child.returncode is None:
            child.terminate()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(child.wait(), PATIENCE_S)
        if child.returncode is None:
            child.kill()
            await child.wait()


async def keep(script: Path, words: list, kind: str, variables: dict[str, str], again: bool, counts: Counter) -> None:
    """
    As `run`, until it is done; one that dies is started `again`, each time later, and counted.

    Raises Unusable as the process did, and Failed for one that dies and isn't started again.
    """
    wait_s = 1.0
    while True:
        code, last = await run(script, words, kind, variables)
        if code == command.DONE:
            return
        if code == command.UNUSABLE:
            raise Unusable(last.partition(": ")[2] or last)
        if not again:
            raise Failed(f"the {kind} ended with status {code}: {last}")
        counts["sources_restarted"] += 1
        say(logging.WARNING, f"{kind} ended with status {code}; it is started again in {wait_s:g} s", source=kind)
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, 30.0)


async def _lines(reader: asyncio.StreamReader):
    """Lines that hold something, cut where they are very long (a progress bar has no end of line)."""
    rest = b""
    while data := await reader.read(4096):
        *whole, rest = (rest + data.replace(b"\r", b"\n")).split(b"\n")
        whole, rest = ([*whole, rest], b"") if len(rest) > 4096 else (whole, rest)
        for text in (line.decode(errors="replace").strip() for line in whole):
            if text:
                yield text
    if text := rest.decode(errors="replace").strip():
        yield text
