"""
The service's port: who is let in, what becomes of each connection, and how all of them end. What a peer says after its handshake is
for the function of its role.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lib import journal, sockets, wire
from lib.peers import Bucket, Peer
from lib.vitals import Vitals


@dataclass(frozen=True)
class Limits:
    """What nobody tunes, but tests."""

    clients: int = 64
    producers: int = 32
    accepts_per_s: float = 50.0
    accept_burst: int = 100
    hello_s: float = 2.0  # for a first line
    tls_s: float = 5.0  # for a TLS handshake
    silence_s: float = 60.0  # of a producer: --silence-s
    pause_s: float = 5.0  # of a stream without samples, before that is told
    stall_s: float = 10.0  # of a peer that takes nothing
    slots: int = 2  # windows of a stream that wait, the newest
    drain_s: float = 1.0  # at the end for windows, and again for consumers
    backoff_s: tuple[float, float] = (0.25, 5.0)  # between tries to dial out, shortest and longest


class Listener:
    """Connections: `roles` are what a peer is given to, `peers` those that are there. One peer's error is never another's."""

    def __init__(
        self, limits: Limits, token: str | None, vitals: Vitals, complain: journal.Complaints,
        roles: dict[str, Callable[[Peer], Awaitable[None]]],
    ):  # fmt: skip
        self.limits, self.token, self.vitals, self.complain, self.roles = limits, token, vitals, complain, roles
        self.accepts = Bucket(limits.accepts_per_s, limits.accept_burst)
        self.peers: set[Peer] = set()
        self.handlers: set[asyncio.Task] = set()  # one per connection
        self.stopping = False

    async def open(self, link: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Accept on a socket that listens."""
        wrap = {"ssl": tls, "ssl_handshake_timeout": self.limits.tls_s} if tls else {}
        self.server = await asyncio.start_server(self._accept, sock=link, limit=wire.MAX_LINE, backlog=64, **wrap)

    def stop(self) -> None:
        """Accept no more, and take nothing more from producers."""
        self.stopping = True
        self.server.close()
        for peer in self.of("producer"):
            peer.end("stopping", wire.line({"type": "bye"}))

    async def close(self) -> None:
        """Say bye to all and wait for them, for a while."""
        for peer in list(self.peers):
            peer.end("stopping", wire.line({"type": "bye"}))
        if self.handlers:
            await asyncio.wait(self.handlers, timeout=self.limits.drain_s)
        for task in self.handlers:
            task.cancel()
        await asyncio.gather(*self.handlers, return_exceptions=True)

    def of(self, role: str) -> list[Peer]:
        """The peers of a role."""
        return [peer for peer in self.peers if peer.role == role]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, whoever it is."""
        peer, reason = Peer(reader, writer), "stopping"
        self.handlers.add(asyncio.current_task())
        try:
            reason = await self._host(peer)
        except asyncio.CancelledError:  # at the end, of a peer that takes nothing; asyncio would print it
            pass
        finally:
            self.handlers.discard(asyncio.current_task())
            self.peers.discard(peer)
            self.vitals.closed[peer.reason or reason] += 1
            writer.close() if peer.reason or reason == "done" else writer.transport.abort()

    async def _host(self, peer: Peer) -> str:
        """From its first line to its last; why it ended."""
        try:
            self._admit()
            self.peers.add(peer)
            hello = wire.read_handshake(await asyncio.wait_for(peer.line(), self.limits.hello_s))
            if not sockets.same_token(self.token, hello.token):
                raise wire.Malformed("unauthorised", "the token is missing or wrong")
            peer.role, peer.name, peer.stream = hello.role, hello.client_name, hello.stream
            await self.roles[peer.role](peer)
            return "done"
        except wire.Malformed as error:
            self.complain(f"refused {error.code}", f"{peer.role} {peer.name or 'without a name'}: {error.sentence}")
            if len(self.handlers) <= 4 * self.limits.clients:  # a storm gets no courtesies
                await peer.refuse(error)
            return error.code
        except (asyncio.TimeoutError, TimeoutError):
            return "silent" if peer.role == "nobody" else "stalled"
        except asyncio.IncompleteReadError as error:
            return "torn" if error.partial else "gone"
        except (OSError, ssl.SSLError):
            return "broken"
        except Exception:  # noqa: BLE001 - a bug met by one peer must not end the service for the others
            self.vitals.counts["bugs"] += 1
            journal.LOG.exception("a connection died of a bug: %s %s", peer.role, peer.name)
            return "bug"

    def _admit(self) -> None:
        """Raises Malformed for a connection too many, before anything of it is read."""
        self.vitals.counts["connections"] += 1
        if self.stopping:
            raise wire.Malformed("shutting_down", "the service is shutting down")
        if len(self.peers) >= self.limits.clients:
            raise wire.Malformed("too_many_clients", f"there are {len(self.peers)} connections already")
        if not self.accepts.take():
            raise wire.Malformed("rate_limited", f"more than {self.limits.accepts_per_s:g} connections a second")
