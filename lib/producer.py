"""
The producers' side of the service's protocol (lib/wire.py) on a blocking socket: what replay, the LSL bridge and the mock amplifier send by.

Shapes: T samples, C channels.
"""

import contextlib
import os
import random
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lib import sockets, wire
from lib.errors import Failed, Unusable

CHUNK_S = 0.04  # what goes together in a chunk where nothing is stated
PING_SAMPLES = 64  # as fast as acknowledged: between two pings, and as many on their way; less than a step of windows
IDLE_S = 5.0  # of silence, after which the service is pinged; it closes a producer that says nothing for --silence-s
TIMEOUT_S = 300.0  # for an answer, which can wait for a fit, or for the service to take what is sent
PARENT_VARIABLE = "BERGER_PARENT"  # process id of the service that started this source, if one did
CLOSE_S = 2.0  # for the service to close too
BUSY = (  # refusals that pass
    "too_many_clients", "too_many_producers", "rate_limited", "shutting_down", "name_in_use", "silent", "stalled",
)  # fmt: skip


class Lost(ConnectionError):
    """The service is gone, or has cut this producer off; the message says why, where the service did."""


def connect(address: tuple[str, int], tls: str | None = None, timeout_s: float = TIMEOUT_S) -> socket.socket:
    """A connected socket; `tls` names the PEM file that vouches for the service. Raises OSError, and Unusable for that file."""
    context = sockets.client_tls(tls)
    link = socket.create_connection(address, timeout_s)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(link, server_hostname=address[0]) if context else link


@contextlib.contextmanager
def reaching(address: tuple[str, int]) -> Iterator[None]:
    """What a command says where the service is lost (Failed) or was never there (Unusable)."""
    try:
        yield
    except Lost as error:
        raise Failed(str(error)) from error
    except OSError as error:
        host, port = address
        raise Unusable(
            f"--to {host}:{port}: {error.strerror or error}: start the service, or name its address"
        ) from error


def orphaned() -> bool:
    """Whether the service that started this process has died: then nobody is left to come back to."""
    parent = os.environ.get(PARENT_VARIABLE, "")
    return parent.isdecimal() and os.getppid() != int(parent)


def backoff_s(attempt: int, least_s: float = 0.25, most_s: float = 5.0) -> float:
    """How long to wait before attempt 1, 2, … to reconnect: exponential with full jitter, so that peers don't come in step."""
    return random.uniform(0, min(most_s, least_s * 2.0**attempt))


class Lines:
    """The lines that come in on a socket, each with its end."""

    def __init__(self, link: socket.socket):
        self._link, self._rest = link, b""

    def read(self, timeout_s: float | None) -> bytes | None:
        """The next line, or None if there is none within `timeout_s` (None: for ever). Raises Lost when the peer is gone."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if len(self._rest) > wire.MAX_LINE:
                raise Lost(f"a line of more than {wire.MAX_LINE} bytes came")
            self._link.settimeout(None if deadline is None else max(1e-6, deadline - time.monotonic()))
            try:
                data = self._link.recv(1 << 16)
            except (TimeoutError, ssl.SSLWantReadError):
                return None
            except OSError as error:
                raise Lost(f"the connection broke: {error.strerror or error}") from error
            if not data:
                raise Lost("the connection was closed")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line + b"\n"


class Producer:
    """
    One stream into the service.

    Raises Unusable if the service refuses the stream (the message is the service's), OSError while it can't be reached, Lost (an
    OSError too) when the connection is gone.
    """

    def __init__(
        self, address: tuple[str, int], stream: wire.Stream, token: str | None = None, tls: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ):  # fmt: skip
        self.stream, self.timeout_s, self.samples_sent, self.events_sent = stream, timeout_s, 0, 0
        self._link = connect(address, tls, timeout_s)
        self._lines, self._pings, self._last = Lines(self._link), 0, time.monotonic()
        self._open: deque[int] = deque()
        with contextlib.ExitStack() as stack:
            stack.callback(self._link.close)
            self._write(wire.handshake(stream.name, "producer", token, stream))
            self._await(lambda message: message.get("type") == "handshake")
            stack.pop_all()

    def samples(self, seq: int, t: float, x_TC: np.ndarray) -> None:
        """Send a chunk: `seq` is the index of its first sample, `t` the producer's clock (s) at its last; NaN is a missing sample."""
        binary = self.stream.framing == "binary"
        # NDJSON: no number takes more than 26 bytes with its comma
        most = max(1, (wire.MAX_FRAME // 4 if binary else (wire.MAX_LINE - 256) // 26 - 1) // max(1, x_TC.shape[1]))
        for start in range(0, len(x_TC), most):
            part_TC = x_TC[start : start + most]
            late_s = (len(x_TC) - start - len(part_TC)) / self.stream.rate_hz
            make = wire.frame_samples if binary else wire.line_samples
            self._write(make(seq + start, t - late_s, part_TC))
        self.samples_sent += len(x_TC)

    def event(self, seq: int, t: float, code: str, value: Any = None) -> None:
        """Send an event that applies from sample `seq` on; before the chunk that holds it."""
        make = wire.frame_event if self.stream.framing == "binary" else wire.line_event
        self._write(make(seq, t, code, value))
        self.events_sent += 1

    def raw(self, frame: bytes) -> None:
        """Send a recorded frame as it is."""
        self._write(frame)

    def ping(self) -> None:
        """Ask for an answer once everything sent so far has been worked off."""
        self._pings += 1
        self._open.append(self._pings)
        self._write(wire.frame_ping(self._pings) if self.stream.framing == "binary" else wire.line_ping(self._pings))

    def ack(self, behind: int = 0) -> None:
        """Wait until at most `behind` pings are unanswered; with 0, until all that was sent has been worked off."""
        if not behind:
            self.ping()
        while len(self._open) > behind:
            wanted = self._open[0]
            self._await(lambda message, wanted=wanted: message.get("type") == "pong" and message.get("id") == wanted)
            self._open.popleft()

    def keep_alive(self) -> None:
        """Ping if nothing was sent for a while, and read what came; to be called while there is nothing to send."""
        while self._open and self._await(lambda message: message.get("type") == "pong", 0.0):
            self._open.popleft()
        if time.monotonic() - self._last > IDLE_S:
            self.ping()

    def close(self) -> None:
        """Say goodbye, if the service is still there, and close; once it has, the stream's name is free."""
        with contextlib.suppress(OSError, Unusable), self._link:
            self._write(wire.frame_bye() if self.stream.framing == "binary" else wire.line_bye())
            self._await(lambda message: False, CLOSE_S)

    def __enter__(self) -> "Producer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        self._last = time.monotonic()
        self._link.settimeout(self.timeout_s)
        try:
            self._link.sendall(data)
        except OSError as error:
            self._await(lambda message: False, 0.2)  # the service says why before it closes
            raise Lost(f"the service takes nothing any more: {error.strerror or error}") from error

    def _await(self, is_it, timeout_s: float | None = None) -> bool:
        """Read lines until one that is asked for. Raises Lost, or Unusable for a refusal; False if there was none in `timeout_s`."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while True:
            line = self._lines.read(max(0.0, deadline - time.monotonic()))
            if line is None and timeout_s is not None:
                return False
            if line is None:
                raise Lost(f"the service gave no answer within {self.timeout_s:g} s")
            try:
                message = wire.read_line(line)
            except wire.Malformed as error:
                raise Unusable(f"what answers there is not the service: {error.sentence}") from error
            if message.get("type") == "error":
                code, said = wire.printable(message.get("code")), str(message.get("message"))[:500]
                raise (Lost if code in BUSY else Unusable)(f"the service refused {self.stream.name}: {said} ({code})")
            if message.get("type") == "bye":
                raise Lost("the service is shutting down")
            if is_it(message):
                return True


def acknowledged(producer: Producer, since: int) -> int:
    """As fast as acknowledged: after enough samples ping, and wait for the ping before. The samples since the last ping."""
    if since < PING_SAMPLES:
        return since
    producer.ping()
    producer.ack(behind=1)
    return 0


def chunk_samples(chunk: int, rate_hz: float, speed: float) -> int:
    """How many samples go together: as stated, else 40 ms of them, and few where the service sets the pace."""
    usual = max(1, round(CHUNK_S * rate_hz))
    return chunk or (usual if speed else min(usual, PING_SAMPLES))


class Persistent:
    """
    A producer for signals that don't wait: when the service goes away it is called again for ever, and what comes meanwhile is lost.

    The first connection raises as Producer does; later ones only Unusable, if the service refuses the stream.
    """

    def __init__(self, address: tuple[str, int], stream: wire.Stream, token: str | None = None, tls: str | None = None):
        self._make = lambda: Producer(address, stream, token, tls)
        self._producer: Producer | None = self._make()
        self._attempt, self._due = 0, 0.0
        self.samples_sent = self.samples_lost = self.events_sent = self.events_lost = self.reconnects = 0

    def samples(self, seq: int, t: float, x_TC: np.ndarray) -> None:
        """As Producer.samples."""
        if self._try(lambda producer: producer.samples(seq, t, x_TC)):
            self.samples_sent += len(x_TC)
        else:
            self.samples_lost += len(x_TC)

    def event(self, seq: int, t: float, code: str, value: Any = None) -> None:
        """As Producer.event."""
        if self._try(lambda producer: producer.event(seq, t, code, value)):
            self.events_sent += 1
        else:
            self.events_lost += 1

    def keep_alive(self) -> None:
        """As Producer.keep_alive; also tries to connect again."""
        self._try(lambda producer: producer.keep_alive())

    def ack(self, behind: int = 0) -> None:
        """As Producer.ack, as long as the service is there."""
        self._try(lambda producer: producer.ack(behind))

    def close(self) -> None:
        """As Producer.close."""
        if self._producer:
            self._producer.close()

    def __enter__(self) -> "Persistent":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _try(self, act: Callable[[Producer], None]) -> bool:
        """Do something with the connection, if there is one or it is time for a new one."""
        try:
            if self._producer is None and time.monotonic() >= self._due:
                self._producer = self._make()
                self.reconnects, self._attempt = self.reconnects + 1, 0
            if self._producer:
                act(self._producer)
                return True
        except OSError as error:
            if self._producer:
                self._producer.close()
            if orphaned():
                raise Lost("the service that started this source is gone") from error
            self._producer, self._attempt = None, self._attempt + 1
            self._due = time.monotonic() + backoff_s(self._attempt)
        return False


class Pace:
    """Waits until something is due: at `speed` times real time, or not at all with 0. Late is late: nothing is left out for it."""

    def __init__(self, speed: float):
        self.speed, self.late_s, self._began = speed, 0.0, None

    def wait(self, at_s: float, producers) -> None:
        """Wait for `at_s` of the recording, keeping `producers` alive meanwhile; the first call says when it began."""
        if not self.speed:
            return
        now = time.monotonic()
        if self._began is None:
            self._began = now - at_s / self.speed
        due = self._began + at_s / self.speed
        self.late_s = max(self.late_s, now - due)
        while now < due:
            time.sleep(min(due - now, IDLE_S / 2))
            for producer in producers:
                producer.keep_alive()
            now = time.monotonic()
