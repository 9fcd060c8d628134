"""
The live page (--page): what the service sees and says, in a browser on this machine. One file of HTML, over the standard library's HTTP.

The event loop only leaves references here; arrays and JSON are made in the page's own threads, and only while somebody looks. Only
requests for this very address are answered, so that no web site can reach in by a name of its own that points here (DNS rebinding).

Shapes: T samples, C channels.
"""

import base64
import hashlib
import re
import socket
import threading
import time
from collections import deque
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from lib.command import json_line
from lib.errors import Unusable
from lib.sockets import is_loopback, listening, shown

HTML = Path(__file__).with_suffix(".html")
TRACE_S = 5.0  # of signal, and
TRACE_HZ = 125.0  # about so many points a second of it, means of what lies between
TRACE_CHANNELS = 24  # at most; the others are in the table of quality
STREAMS = 16  # that are kept, the newest
PREDICTIONS = 400  # of a stream
REQUESTS = 8  # at a time
UNIT = 0.1  # what one step of a trace's 16 bits is worth, in the producer's unit
ABSENT = -32768  # no sample there


class Page:
    """
    Serves the page from threads of its own until `close`; `samples`, `prediction` and `update` take some microseconds.

    Raises Unusable: the address can be reached by others, or is taken.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0):
        if not is_loopback(host):
            raise Unusable(f"--page {host}: the page has no password, so it is served on 127.0.0.1 only")
        html = HTML.read_bytes()
        self.streams: dict[str, _Trail] = {}
        self.snapshot: dict = {}
        self._lock = threading.Lock()
        self._server = _Server(listening(host, port, "--page"), self, html)
        self.address = self._server.server_address[:2]
        self.url = f"http://{shown(self.address)}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="page", daemon=True)
        self._thread.start()

    def update(self, snapshot: dict) -> None:
        """The service's state from now on: `streams` (name, state, quality …), `stats`, `health`; not to be changed afterwards."""
        self.snapshot = snapshot

    def samples(self, name: str, rate_hz: float, channels: tuple[str, ...], seq: int, x_TC: np.ndarray) -> None:
        """A chunk as it came; the array must stay as it is."""
        with self._lock:
            trail = self.streams.get(name)
            if trail is None or trail.channels != channels or trail.rate_hz != rate_hz:
                self.streams.pop(name, None)
                while len(self.streams) >= STREAMS:
                    del self.streams[next(iter(self.streams))]
                trail = self.streams[name] = _Trail(rate_hz, channels)
            trail.add(seq, x_TC)

    def prediction(
        self, name: str, seq: int, state: str, prediction: int | None, probability: float | None, reason: str | None = None,
        latency_s: float | None = None, label: str | int | None = None,
    ) -> None:  # fmt: skip
        """What became of a window that ends before sample `seq`."""
        with self._lock:
            if trail := self.streams.get(name):
                trail.said.append((seq, state, prediction, probability, reason, latency_s, label))

    def data(self) -> bytes:
        """What the browser asks for again and again, as JSON."""
        with self._lock:
            trails = {name: trail.freeze() for name, trail in self.streams.items()}
        snapshot = self.snapshot
        rows = {row.get("name"): row for row in snapshot.get("streams", [])}
        streams = [{**rows.get(name, {}), "name": name, **trail.drawn()} for name, trail in trails.items()]
        return json_line({**snapshot, "streams": streams, "now_s": round(time.monotonic(), 3)}).encode()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Trail:
    """The last seconds of one stream."""

    def __init__(self, rate_hz: float, channels: tuple[str, ...]):
        self.rate_hz, self.channels = rate_hz, channels
        self.chunks: deque[tuple[int, np.ndarray]] = deque()
        self.said: deque[tuple] = deque(maxlen=PREDICTIONS)

    def add(self, seq: int, x_TC: np.ndarray) -> None:
        if self.chunks and seq < self.chunks[-1][0] + len(self.chunks[-1][1]):  # the producer counts anew
            self.chunks.clear()
            self.said.clear()
        self.chunks.append((seq, x_TC))
        oldest = seq + len(x_TC) - TRACE_S * self.rate_hz
        while self.chunks[0][0] + len(self.chunks[0][1]) <= oldest:
            self.chunks.popleft()

    def freeze(self) -> "_Trail":
        """A copy that nobody else adds to."""
        copy = _Trail(self.rate_hz, self.channels)
        copy.chunks, copy.said = self.chunks.copy(), self.said.copy()
        return copy

    def drawn(self) -> dict:
        """The trace as base64 of int16, time-major, each channel about its median; and what was said."""
        step = max(1, round(self.rate_hz / TRACE_HZ))
        stop = self.chunks[-1][0] + len(self.chunks[-1][1])
        count = int(TRACE_S * self.rate_hz) // step
        last = -(-stop // step) * step  # points lie on multiples of `step`, so that they don't flicker
        first, C = last - count * step, min(len(self.channels), TRACE_CHANNELS)
        x_TC = np.full((count * step, C), np.nan, np.float32)
        for seq, part_TC in self.chunks:
            a, b = max(seq, first), min(seq + len(part_TC), last)
            if a < b:
                x_TC[a - first : b - first] = part_TC[a - seq : b - seq, :C]
        x_TC = np.clip(np.where(np.isfinite(x_TC), x_TC, np.nan), -1e9, 1e9)
        there_TC = ~np.isnan(x_TC)
        n_PC = there_TC.reshape(count, step, C).sum(1)
        mean_PC = np.nan_to_num(x_TC).reshape(count, step, C).sum(1) / np.maximum(n_PC, 1)
        middle_C = [np.median(mean_PC[n_PC[:, c] > 0, c]) if n_PC[:, c].any() else 0.0 for c in range(C)]
        steps_PC = np.clip(np.rint((mean_PC - middle_C) / UNIT), -32767, 32767)
        steps_PC[n_PC == 0] = ABSENT
        return {
            "rate_hz": self.rate_hz,
            "channels": self.channels[:C],
            "channels_in_all": len(self.channels),
            "trace": {
                "first_seq": first,
                "step": step,
                "points": count,
                "unit": UNIT,
                "int16": base64.b64encode(steps_PC.astype("<i2").tobytes()).decode(),
            },
            "said": list(self.said),
        }


class _Server(ThreadingHTTPServer):
    """A few requests at a time; more are turned away rather than kept waiting."""

    daemon_threads = True

    def __init__(self, link: socket.socket, page: Page, html: bytes):
        super().__init__(link.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.page, self.html = link, page, html
        link.listen(REQUESTS)
        self.server_address = link.getsockname()
        port = self.server_address[1]
        self.hosts = {
            f"{host}:{port}"
            for host in ("127.0.0.1", "localhost", "[::1]", shown(self.server_address).rpartition(":")[0])
        }
        # nothing but what this one file holds may run, and nothing but this server be asked
        hashes = {
            tag: base64.b64encode(
                hashlib.sha256(re.search(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)[1]).digest()
            ).decode()
            for tag in (b"script", b"style")
        }
        self.policy = (
            f"default-src 'none'; script-src 'sha256-{hashes[b'script']}'; style-src 'sha256-{hashes[b'style']}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._places = threading.BoundedSemaphore(REQUESTS)

    def process_request(self, request, client_address) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request, client_address) -> None:
        """A browser that goes away in the middle is nothing to speak of."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5.0  # s, of a browser that says nothing
    server_version, sys_version = "berger", ""
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """The page, its data, or a refusal."""
        if self.headers.get("Host", "") not in self.server.hosts:
            self.answer(HTTPStatus.MISDIRECTED_REQUEST, b"this page is served to its own address only\n")
        elif self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self.answer(HTTPStatus.FORBIDDEN, b"not for other sites\n")
        elif self.path == "/":
            self.answer(HTTPStatus.OK, self.server.html, "text/html; charset=utf-8")
        elif self.path == "/data":
            self.answer(HTTPStatus.OK, self.server.page.data(), "application/json")
        else:
            self.answer(HTTPStatus.NOT_FOUND, b"there are / and /data\n")

    def answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        """One response."""
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", self.server.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing: the service has its own log."""
