"""
Lines on their way to a consumer: a bounded queue that never makes anybody wait, and the servers that the service calls by itself.
"""

import asyncio
import logging
import random
import ssl
import time
from collections import Counter, deque

from lib import sockets, wire
from lib.journal import Complaints, say
from lib.peers import discard

MOST_LINES = 64  # that wait for a consumer
DIAL_S = 5.0  # for a server to answer


class Outbox:
    """The newest lines for one consumer. Who reads too slowly loses the oldest, and is told how many by the next line's metadata."""

    def __init__(self, name: str, most: int = MOST_LINES):
        self.name, self.most, self.lines = name, most, deque()
        self.dropped = self.untold = 0
        self.open = False
        self.news, self.empty = asyncio.Event(), asyncio.Event()
        self.empty.set()  # or nobody is there whom to send to

    def offer(self, message: dict, data: bytes) -> None:
        """Queue a message and its line."""
        if len(self.lines) == self.most:
            self.lines.popleft()
            self.dropped += 1
            self.untold += 1
        self.lines.append((message, data))
        if self.open:
            self.empty.clear()
        self.news.set()

    async def deliver(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stall_s: float) -> None:
        """Send until the peer is gone, which only reading tells. Raises TimeoutError if it takes nothing for `stall_s`, OSError."""
        sending = asyncio.create_task(self._send(writer, stall_s))
        reading = asyncio.create_task(discard(reader))
        try:
            done, _ = await asyncio.wait({sending, reading}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            sending.cancel()
            reading.cancel()
            await asyncio.gather(sending, reading, return_exceptions=True)

    async def _send(self, writer: asyncio.StreamWriter, stall_s: float) -> None:
        writer.transport.set_write_buffer_limits(high=0)  # then drain waits until the kernel has taken all
        self.open = True
        try:
            while True:
                while self.lines:
                    message, data = self.lines.popleft()
                    if self.untold:
                        metadata = {**message["window_metadata"], "dropped": self.untold}
                        data, self.untold = wire.line({**message, "window_metadata": metadata}), 0
                    writer.write(data)
                    if writer.transport.get_write_buffer_size():
                        self.empty.clear()
                        await asyncio.wait_for(writer.drain(), stall_s)
                self.empty.set()
                self.news.clear()
                await self.news.wait()
        finally:
            self.open = False
            self.empty.set()


async def dial(
    host: str, port: int, tls: ssl.SSLContext | None, outbox: Outbox, stall_s: float, backoff_s: tuple[float, float],
    counts: Counter, complain: Complaints,
) -> None:  # fmt: skip
    """Call a server that waits for predictions, as the original service did, but for ever: backing off with full jitter."""
    shortest_s, longest_s = backoff_s
    where, tries = f"--connect {host}:{port}", 0
    while True:
        began_s = time.monotonic()
        try:
            opening = asyncio.open_connection(host, port, ssl=tls, limit=wire.MAX_LINE)
            reader, writer = await asyncio.wait_for(opening, DIAL_S)
        except (OSError, ssl.SSLError, asyncio.TimeoutError) as error:
            complain(where, f"{where}: {error or 'no answer'}; it is tried again")
        else:
            counts["dialled"] += 1
            say(logging.INFO, f"{where}: connected")
            try:
                sockets.tune(writer.get_extra_info("socket"), stall_s)
                writer.write(wire.SERVICE_HANDSHAKE)
                await outbox.deliver(reader, writer, stall_s)
            except (OSError, ssl.SSLError, asyncio.TimeoutError) as error:
                complain(f"{where} broke", f"{where} broke: {error or 'it takes nothing'}")
            finally:
                writer.close()  # what waits may still go out
            counts["dialled_closed"] += 1
        tries = 0 if time.monotonic() - began_s > longest_s else tries + 1
        await asyncio.sleep(random.uniform(0, min(longest_s, shortest_s * 2 ** min(tries, 16))))
