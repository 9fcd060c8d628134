"""
Processes that the service starts: whatever a source imports, or dies of, is not the service's.
"""

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from lib.journal import LOG
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
