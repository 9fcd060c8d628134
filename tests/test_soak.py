"""Hours in a minute: a clean stream beside everything that can go wrong, and nothing of it is lost, leaked or late for ever."""

import asyncio
import contextlib
import gc
import os
import random
import socket
import struct
import time

import numpy as np
import pytest

from lib import wire
from serve_realtime import Limits
from tests.service import CHANNELS, Peer, Power, consumer, producer, serving, signal, until

RATE_HZ = 250.0
LIMITS = Limits(clients=32, producers=8, hello_s=1.0, silence_s=3.0, stall_s=2.0, accepts_per_s=500.0, drain_s=5.0)


def resident_kib() -> int:
    """Memory in use now."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def clean(service, peer: Peer, stop: asyncio.Event, x_TC: np.ndarray) -> int:
    """A stream at its own pace; the number of samples it sent."""
    seq, began_s = 0, time.monotonic()
    while not stop.is_set():
        part_TC = x_TC[seq % 5000 : seq % 5000 + 10]
        await peer.send(wire.frame_samples(seq, seq / RATE_HZ, part_TC))
        seq += 10
        if seq % 25 == 0:  # never more than one window ahead, whatever else the machine does
            await peer.pong()
        await asyncio.sleep(max(0.0, began_s + seq / RATE_HZ - time.monotonic()))
    await peer.pong()
    return seq


async def trouble(service, stop: asyncio.Event, seed: int) -> None:
    """One misdeed after the other."""
    rng = random.Random(seed)
    x_TC = signal(400, seed)
    hello = lambda name, **more: wire.handshake("x", "producer", None, wire.Stream(name, CHANNELS, RATE_HZ, **more))  # noqa: E731
    while not stop.is_set():
        deed = rng.choice("storm junk long half count reset nan gap deaf flood lines events".split())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if deed == "storm":
                peers = await asyncio.gather(*(Peer.connect(service) for _ in range(20)))
                for peer in peers:
                    peer.writer.transport.abort()
                continue
            peer = await Peer.connect(service)
            name = f"bad {seed} {rng.randrange(3)}"
            if deed == "junk":
                await peer.send(rng.randbytes(rng.randrange(1, 3000)) + b"\n")
            elif deed == "long":
                await peer.send(b"a" * 200_000)
            elif deed == "half":
                await peer.send(b'{"type": ')
                if rng.random() < 0.5:
                    continue  # and stays
            elif deed == "count":
                await peer.send(hello(name) + wire.frame_samples(0, 0.0, x_TC[:5, :3]))
            elif deed == "reset":
                await peer.send(hello(name) + wire.frame_samples(0, 0.0, x_TC[:5])[:50])
                linger = struct.pack("ii", 1, 0)
                peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                peer.writer.transport.abort()
                continue
            elif deed in ("nan", "gap", "events", "flood"):
                await peer.send(hello(name))
                if (await peer.line() or {}).get("type") == "handshake":
                    for i in range(20):
                        part_TC = x_TC[i * 10 : i * 10 + 10].copy()
                        if deed == "nan" and i % 3 == 0:
                            part_TC[rng.randrange(10)] = np.nan
                        seq = i * (10 if deed != "gap" else rng.randrange(1, 60))
                        await peer.send(wire.frame_samples(seq, 0.0, part_TC))
                        if deed == "events":
                            await peer.send(
                                wire.frame_event(seq, 0.0, rng.choice(["BACKGROUND", "INFERENCE", "T1", "IDLE"]))
                            )
                    if deed == "flood":
                        await peer.send(wire.frame_samples(200, 0.0, np.tile(x_TC, (20, 1))))
            elif deed == "deaf":
                await peer.send(wire.handshake("x", "consumer"))
                if rng.random() < 0.5:
                    continue  # never reads, never closes
            elif deed == "lines":
                await peer.send(hello(name, framing="ndjson"))
                await peer.send(
                    rng.choice([b"[" * 60_000, b'{"type": "samples", "seq": 0, "x": [[1e999]]}', b"NaN"]) + b"\n"
                )
            await peer.close()
        await asyncio.sleep(rng.random() * 0.02)


async def passed(service, seconds: float) -> None:
    """So much time, and so many misdeeds as a machine with nothing else to do would have met in it."""
    while time.monotonic() - service.vitals.began_s < seconds or service.vitals.counts["connections"] < 20 * seconds:
        await asyncio.sleep(0.1)


async def soak(seconds: float) -> None:
    """Raises AssertionError for whatever a long session must not do."""
    gc.collect()
    before = descriptors()
    async with serving(Power(), LIMITS, partial_fit=4, collect_s=5.0) as service:
        reader, amp = await consumer(service), await producer(service)
        stop, results = asyncio.Event(), []

        async def read():
            while (message := await reader.line()) and message["type"] == "data":
                if message["window_metadata"]["stream"] == "amp":
                    results.append((message["window_metadata"]["start"], message["prediction"]))

        reading = asyncio.create_task(read())
        sending = asyncio.create_task(clean(service, amp, stop, signal(5010)))
        deeds = [asyncio.create_task(trouble(service, stop, seed)) for seed in range(4)]
        await passed(service, 0.4 * seconds)  # warm-up: queues, groups and allocator have grown to what they need
        gc.collect()
        warm_kib = resident_kib()
        await passed(service, seconds)
        gc.collect()
        grown_kib = resident_kib() - warm_kib
        stop.set()
        samples = await sending
        await asyncio.gather(*deeds)
        windows = (samples - 50) // 25 + 1
        stats = await until(service, lambda stats: len(results) >= windows)
        reading.cancel()
        assert [start for start, _ in results] == list(range(0, 25 * windows, 25))  # every one, in order
        assert all(prediction is not None for _, prediction in results)
        assert stats["counts"].get("bugs", 0) == 0, stats
        assert len(stats["closed"]) >= 8, stats["closed"]
        assert grown_kib < 5 * 1024, f"{grown_kib} KiB more than after the warm-up"
        assert len(service.lanes) <= 16 and len(service.listener.peers) <= 32
        await amp.close()
        await reader.close()
    gc.collect()
    deadline_s = time.monotonic() + 20
    while descriptors() > before and time.monotonic() < deadline_s:
        await asyncio.sleep(0.05)
        gc.collect()
    assert descriptors() <= before, f"{descriptors()} descriptors, {before} before"


@pytest.mark.parametrize("seconds", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_minutes_of_chaos(seconds):
    asyncio.run(soak(seconds))
