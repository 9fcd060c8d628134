"""A service in the test's own event loop, peers that speak its protocol, and pipelines small enough to know what they must answer."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np

from lib import intake, states, wire
from serve_realtime import Config, Limits, Service

CHANNELS = ("Fp1", "C3", "Cz", "C4", "O1", "O2")
PATH = intake.Path(reference="none", band_hz=(1.0, 40.0), window=50, step=25, settle_s=0.0)
STREAM = wire.Stream("amp", CHANNELS, 250.0)
PATIENCE_S = 300  # a machine that trains models meanwhile is slow


@dataclass(frozen=True)
class Power:
    """Class "first" if the first channel's power is above the last's; fits only keep what they were given."""

    path: intake.Path = PATH
    fitted: tuple = ()
    ready: str | None = None
    name: str = "power"
    classes: tuple[str, ...] = ("last", "first")

    def warm(self, compile: str) -> dict:
        return {}

    def fit(self, groups: dict) -> "Power":
        kept = {name: np.array(windows) for name, windows in groups.items()}
        return dataclasses.replace(self, fitted=(*self.fitted, kept), ready=None)

    def partial_fit(self, fresh: list) -> "Power":
        return dataclasses.replace(self, fitted=(*self.fitted, np.array(fresh)), ready=None)

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        power_NC = np.square(x_NCT.astype(np.float64)).mean(2)
        p_N = power_NC[:, 0] / (power_NC[:, 0] + power_NC[:, -1] + 1e-12)
        return np.stack([1 - p_N, p_N], 1)


@dataclass(frozen=True)
class Broken(Power):
    """A model that returns or raises what it must not."""

    answer: object = None

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass(frozen=True)
class Held(Power):
    """Predicts only once it is let: what stands still can be looked at."""

    gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        assert self.gate.acquire(timeout=PATIENCE_S)
        return super().predict_proba(x_NCT)


@contextlib.asynccontextmanager
async def serving(
    pipeline=None, limits: Limits | None = None, table: states.Table | None = None, **flags
) -> AsyncIterator[Service]:
    """A service on a free port; streams begin in INFERENCE unless `start` says otherwise."""
    cfg = Config(**{"listen": "127.0.0.1:0", "start": "INFERENCE", **flags})
    service = Service(cfg, pipeline or Power(), table or states.load(), limits or Limits())
    await service.start()
    try:
        yield service
    finally:
        await service.close()


class Peer:
    """Either side of one connection, in raw bytes where need be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer, self.pings = reader, writer, 0

    @classmethod
    async def connect(cls, service: Service, **options) -> "Peer":
        return cls(*await asyncio.open_connection(*service.address, limit=2**20, **options))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def line(self) -> dict | None:
        """The next line; None at the end."""
        data = await asyncio.wait_for(self.reader.readline(), PATIENCE_S)
        return wire.read_line(data) if data else None

    async def rest(self) -> list[dict]:
        """All lines to the end."""
        lines = []
        while (message := await self.line()) is not None:
            lines.append(message)
        return lines

    async def pong(self) -> dict:
        """Wait until everything sent so far has been worked off."""
        self.pings += 1
        await self.send(wire.frame_ping(self.pings))
        message = await self.line()
        assert message["type"] == "pong" and message["id"] == self.pings, message
        return message

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


async def greet(service: Service, data: bytes, **options) -> Peer:
    """A connection whose handshake `data` was accepted."""
    peer = await Peer.connect(service, **options)
    await peer.send(data)
    message = await peer.line()
    assert message == {"type": "handshake", "client_name": "eeg-processor"}, message
    return peer


async def producer(service: Service, stream: wire.Stream = STREAM, token: str | None = None) -> Peer:
    return await greet(service, wire.handshake("test", "producer", token, stream))


async def consumer(service: Service, token: str | None = None) -> Peer:
    return await greet(service, wire.handshake("test", "consumer", token))


async def ask(service: Service, what: str, token: str | None = None) -> dict:
    """One answer of the control role."""
    peer = await greet(service, wire.handshake("test", "control", token))
    await peer.send(wire.line({"type": what}))
    answer = await peer.line()
    await peer.close()
    return answer


async def until(service: Service, condition: Callable[[dict], object]) -> dict:
    """Wait until the service's own numbers say so."""
    began_s = time.monotonic()
    while not condition(stats := service.stats()):
        assert time.monotonic() - began_s < PATIENCE_S, stats
        await asyncio.sleep(0.01)
    return stats


def signal(samples: int, seed: int = 0, channels: int = len(CHANNELS)) -> np.ndarray:
    """x_TC in microvolts whose first channel grows loud and soft in turn."""
    x_TC = np.random.default_rng(seed).normal(0, 10, (samples, channels)).astype(np.float32)
    x_TC[:, 0] *= 1 + np.sin(np.arange(samples) / 60).astype(np.float32) * 0.8
    return x_TC


def without_time(message: dict) -> dict:
    """A data line less what a clock says."""
    return {k: v for k, v in message.items() if k != "processing_time"}
