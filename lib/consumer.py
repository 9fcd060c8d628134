"""
A client of the service: prints every line as it comes, and connects again for as long as it takes when the service goes away.

It connects, as consumers do, or with `listen` waits for the service to call (--connect), as the original service did.
"""

import contextlib
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable

from lib import command, wire
from lib.errors import Unusable
from lib.producer import BUSY, Lines, Lost, backoff_s, connect


def run(
    address: tuple[str, int], token: str | None = None, tls: str | None = None, lines: int = 0, retry: bool = True,
    write: Callable[[str], None] | None = None,
) -> dict:  # fmt: skip
    """
    Print what the service at `address` says, and return the counts: after `lines` lines (0: never), or at its end without `retry`.
    Why there is nothing to print is said once on stderr, until there is.

    Raises Unusable: the service refuses this client, or it can't be reached and `retry` is off. What `write` raises passes.
    """
    (host, port), seen, attempt, write = address[:2], Counter(), 0, write or command.write
    while True:
        why = "the connection was closed without a word"
        try:
            link = connect(address, tls)
        except OSError as error:
            why = error.strerror or error
            if not retry:
                raise Unusable(f"--to {host}:{port}: {why}: start the service first") from error
        else:
            with contextlib.closing(link):
                with contextlib.suppress(OSError):  # then there is nothing to read either
                    link.sendall(wire.handshake("consumer", "consumer", token))
                before = seen["lines"]
                for line in _lines(link):
                    _count(seen, line)
                    write(line)
                    if seen["lines"] == lines:
                        return dict(seen)
                    attempt = 0
                seen["connections"] += seen["lines"] > before
        if not retry:
            return dict(seen)
        attempt += 1
        if attempt == 2:  # the first may be a service that is started again, or not yet
            print(f"--to {host}:{port}: {why}; it is tried again", file=sys.stderr, flush=True)
        seen["reconnects"] += 1
        time.sleep(backoff_s(attempt))


def listen(
    host: str, port: int, lines: int = 0, write: Callable[[str], None] | None = None,
    ready: Callable[[tuple[str, int]], None] | None = None,
) -> dict:  # fmt: skip
    """Wait for a service that was told to --connect here, and print what it says; one at a time, until `lines` lines."""
    seen, write = Counter(), write or command.write
    try:
        server = socket.create_server((host, port))
    except OSError as error:
        raise Unusable(f"--listen {host}:{port}: {error.strerror}: choose another address") from error
    with server:
        if ready:
            ready(server.getsockname()[:2])
        while True:
            link, _ = server.accept()
            seen["connections"] += 1
            with link:
                for line in _lines(link):
                    _count(seen, line)
                    write(line)
                    if seen["lines"] == lines:
                        return dict(seen)


def _lines(link: socket.socket):
    """The lines of one connection, until it ends."""
    incoming = Lines(link)
    with contextlib.suppress(Lost):
        while True:
            yield incoming.read(None).decode(errors="replace")


def _count(seen: Counter, line: str) -> None:
    """Count a line by what it is. Raises Unusable for a refusal that won't pass."""
    seen["lines"] += 1
    try:
        message = wire.read_line(line.encode())
    except wire.Malformed:
        seen["malformed"] += 1
        return
    kind = str(message.get("type"))
    seen[kind] += 1
    seen["skipped"] += kind == "data" and message.get("prediction") is None
    if kind == "error" and message.get("code") not in BUSY:
        raise Unusable(f"the service refused: {message.get('message')} ({message.get('code')})")
