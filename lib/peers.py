"""
The service's side of a connection: who it is, what it sends, how it is let in and shown out.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from lib import wire

LINGER_S = 0.5  # for a peer to read why it is cut off


@dataclass(eq=False)
class Peer:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    role: str = "nobody"
    name: str = ""
    stream: wire.Stream | None = None  # that a producer announced
    quiet_s: float = 0.0  # since it was last heard, in turns of the watch: time in which we did not run doesn't count
    reason: str | None = None  # why we ended it

    async def line(self) -> bytes:
        """A line with its end. Raises Malformed for one that is too long, before more of it is read."""
        try:
            return await self.reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            raise wire.Malformed("line_too_long", f"a line has at most {wire.MAX_LINE} bytes") from None

    async def answer(self, data: bytes, stall_s: float) -> None:
        """Send something that was asked for. Raises TimeoutError if it isn't taken."""
        self.writer.write(data)
        await asyncio.wait_for(self.writer.drain(), stall_s)

    async def messages(self, stream: wire.Stream) -> AsyncIterator[tuple[tuple, bytes, bytes]]:
        """What a producer sends until it is ended, each checked before more is read: message, its header or line, its payload."""
        channels, binary = len(stream.channels), stream.framing == "binary"
        while True:
            if binary:
                head = await self.reader.readexactly(wire.HEADER.size)
                header = wire.parse_header(head, channels)
                payload = await self.reader.readexactly(header.payload) if header.payload else b""
                message = wire.parse_frame(header, payload, channels)
            else:
                head, payload = await self.line(), b""
                message = wire.parse_line(head, channels)
            if self.reason is not None:  # ended: what it had sent before must not reach its successor's stream
                return
            yield message, head, payload

    async def refuse(self, error: wire.Malformed) -> None:
        """Say why; then read on for a moment, because closing on unread bytes would take the reason back."""
        self.reason = self.reason or error.code
        with contextlib.suppress(asyncio.TimeoutError, OSError, ssl.SSLError):
            self.writer.write(wire.error(error.code, error.sentence))
            if self.writer.can_write_eof():
                self.writer.write_eof()
            await asyncio.wait_for(discard(self.reader, wire.MAX_FRAME), LINGER_S)

    def end(self, reason: str, last: bytes) -> None:
        """Close from our side, with a last line for who said hello; whoever reads from it notices and tidies up."""
        if self.reason is None:
            self.reason = reason
            if self.role != "nobody":
                self.writer.write(last)
            self.writer.close()


async def discard(reader: asyncio.StreamReader, most: float = float("inf")) -> None:
    """Read until the peer closes, or has sent so many bytes."""
    while most > 0 and (data := await reader.read(wire.MAX_LINE)):
        most -= len(data)


class Bucket:
    """Lets so many a second through, and a burst."""

    def __init__(self, per_s: float, burst: int):
        self.per_s, self.burst, self.left, self.seen_s = per_s, burst, float(burst), time.monotonic()

    def take(self) -> bool:
        """Whether one more may pass."""
        now_s = time.monotonic()
        self.left, self.seen_s = min(self.burst, self.left + (now_s - self.seen_s) * self.per_s), now_s
        if self.left < 1:
            return False
        self.left -= 1
        return True
