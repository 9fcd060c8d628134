"""The service as its peers meet it: on real sockets and free ports, waiting for its own counters, never for a clock."""

import asyncio
import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
import signal as signals
import socket
import ssl
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lib import filters, journal, pipelines, sockets, states, wire
from lib.errors import Unusable
from lib.outbox import MOST_LINES
from lib.recorder import open_session
from lib.riemann import learn
from serve_realtime import Config, Limits, Service, main
from tests.recipes import ROOT
from tests.service import (
    CHANNELS,
    PATH,
    PATIENCE_S,
    STREAM,
    Broken,
    Held,
    Peer,
    Power,
    ask,
    consumer,
    greet,
    producer,
    serving,
    signal,
    until,
    without_time,
)  # fmt: skip

PATIENT = Limits(hello_s=600, tls_s=600, silence_s=600, stall_s=600, drain_s=20, accept_burst=1000)
LOUD = signal(1000)


def served(test):
    """Run an async test to its end."""

    @functools.wraps(test)
    def run(*arguments, **named):
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 2 * PATIENCE_S))

    return run


async def send(peer: Peer, x_TC: np.ndarray, chunk: int = 20, first: int = 0, framing: str = "binary") -> None:
    """Samples in chunks, without waiting for anything."""
    make = wire.frame_samples if framing == "binary" else wire.line_samples
    for at in range(0, len(x_TC), chunk):
        part_TC = x_TC[at : at + chunk]
        await peer.send(make(first + at, (first + at + len(part_TC)) / 250, part_TC))


async def lines(peer: Peer, count: int) -> list[dict]:
    return [await peer.line() for _ in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# What goes in comes out


@served
async def test_the_lines_are_those_the_original_service_sent():
    async with serving(limits=PATIENT) as service:
        peer = await Peer.connect(service)
        await peer.send(wire.handshake("nc", "consumer"))
        assert await peer.reader.readline() == b'{"type": "handshake", "client_name": "eeg-processor"}\n'
        amp = await producer(service)
        await send(amp, LOUD[:50])
        message = await peer.line()
    assert list(message) == ["type", "prediction", "probability", "pipeline_type", "processing_time", "window_metadata"]
    assert message["type"] == "data" and message["pipeline_type"] == "power"
    assert (
        type(message["prediction"]) is int and type(message["probability"]) is float and message["processing_time"] > 0
    )
    metadata = message["window_metadata"]
    assert (metadata["start"], metadata["stop"], metadata["stream"], metadata["state"]) == (0, 50, "amp", "INFERENCE")
    assert metadata["t"] == 0.2 and metadata["label"] == ("last", "first")[message["prediction"]]
    assert message["probability"] == pytest.approx(max(metadata["probabilities"]), abs=1e-6)


@served
async def test_many_consumers_get_the_same_lines():
    async with serving(limits=PATIENT) as service:
        readers = [await consumer(service) for _ in range(5)]
        amp = await producer(service)
        for at in range(0, 500, 25):
            await send(amp, LOUD[at : at + 25], 25, at)
            await amp.pong()
        answers = [await lines(reader, 19) for reader in readers]
        assert all(a == answers[0] for a in answers)
        assert [m["window_metadata"]["start"] for m in answers[0]] == list(range(0, 475, 25))


async def replayed(chunks: list[int], framing: str, events: tuple = (), **flags) -> list[dict]:
    """Predictions of one and the same signal, cut as `chunks` say."""
    async with serving(limits=PATIENT, sync=True, partial_fit=3, **flags) as service:
        reader = await consumer(service)
        amp = await producer(service, dataclasses.replace(STREAM, framing=framing))
        at, todo = 0, list(events)
        while at < len(LOUD):
            chunk = chunks[at % len(chunks)]
            while todo and todo[0][0] < at + chunk:
                seq, code = todo.pop(0)
                await amp.send((wire.frame_event if framing == "binary" else wire.line_event)(seq, 0.0, code))
            await send(amp, LOUD[at : at + chunk], chunk, at, framing)
            at += chunk
        await amp.send(wire.frame_ping(1) if framing == "binary" else wire.line_ping(1))
        assert (await amp.line())["seq"] == len(LOUD)
        count = service.vitals.counts["predicted"]
        return [without_time(m) for m in await lines(reader, count)]


SESSION = ((100, "EYE_WARMUP_DESC"), (130, "EYE_WARMUP_BLINK"), (333, "BACKGROUND"), (334, "T1"), (501, "TASK_PERIOD"))


@pytest.mark.parametrize("events", [(), SESSION], ids=["inference", "session"])
def test_sync_predicts_the_same_to_the_bit_however_samples_come_in(events):
    ways = [
        ([25], "binary"),
        ([1], "binary"),
        ([1000], "binary"),
        ([32, 7, 64, 3], "binary"),
        ([20], "ndjson"),
        ([13, 90], "ndjson"),
    ]
    answers = [
        asyncio.run(replayed(chunks, framing, events, start="IDLE" if events else "INFERENCE"))
        for chunks, framing in ways
    ]
    assert len(answers[0]) == (18 if events else 39)
    assert all(a == answers[0] for a in answers[1:])
    versions = [m["window_metadata"]["model_version"] for m in answers[0]]
    assert versions == sorted(versions) and versions[-1] > (1 if events else 3)


# ----------------------------------------------------------------------------------------------------------------------
# States, fits


@served
async def test_a_session_collects_fits_and_predicts_by_its_states():
    script = ("EYE_WARMUP_DESC", "EYE_WARMUP_BLINK", "EYE_WARMUP_TEXT", "EYE_WARMUP_MOVE", "BACKGROUND", "INFERENCE")
    async with serving(limits=PATIENT, sync=True, start="auto", partial_fit=2) as service:
        reader, amp = await consumer(service), await producer(service)
        for i, code in enumerate(script):
            await amp.send(wire.frame_event(20 + 160 * i, 0.0, code))
        await send(amp, LOUD, 64)
        await amp.pong()
        fitted = service.lanes["amp"].session.model.pipeline.fitted
        whole_CT = filters.Causal(250, 250, PATH.band_hz, None, len(CHANNELS)).process(LOUD.T)
        cut = lambda start: whole_CT[:, start : start + 50].astype(np.float32)  # noqa: E731
        # three whole windows that don't overlap in each state of 160 samples, from its first sample on
        eyes = np.array([cut(20 + 160 * state + 50 * k) for state in (1, 3) for k in range(3)])
        background = np.array([cut(20 + 160 * 4 + 50 * k) for k in range(3)])
        np.testing.assert_array_equal(fitted[0]["EYE_MOVEMENT"], eyes)
        assert set(fitted[0]) == {"EYE_MOVEMENT"}
        np.testing.assert_array_equal(fitted[1]["EYE_MOVEMENT"], eyes)
        np.testing.assert_array_equal(fitted[1]["BACKGROUND"], background)
        np.testing.assert_array_equal(fitted[2], np.array([cut(820), cut(870)]))
        assert len(fitted) == 3
        messages = await lines(reader, 6)
        assert [m["window_metadata"]["start"] for m in messages] == [820, 845, 870, 895, 920, 945]
        # a window is never predicted by a model that has seen it
        assert [m["window_metadata"]["model_version"] for m in messages] == [2, 2, 2, 3, 3, 3]
        assert service.vitals.counts["fits"] == 2 and service.vitals.counts["partial_fits"] == 1


@served
async def test_stray_late_and_endless_markers_are_counted_and_ignored():
    async with serving(limits=PATIENT, start="IDLE") as service:
        amp = await producer(service)
        await send(amp, LOUD[:100])
        for code in ("T1", "EYE_WARMUP_MOVE", "\U0001f9e0", "IDLE"):
            await amp.send(wire.frame_event(100, 0.0, code))
        await amp.send(wire.frame_event(3, 0.0, "BACKGROUND"))  # its sample has been: applies now
        for _ in range(300):
            await amp.send(wire.frame_event(10**9, 0.0, "INFERENCE"))
        await amp.pong()
        (stream,) = service.stats()["streams"]
        assert stream["state"] == "BACKGROUND"
        counted = {k: v for k, v in stream["counts"].items() if k.startswith("events")}
        assert counted == {"events_ignored": 4, "events_late": 1, "events_accepted": 1, "events_lost": 44}


@dataclass(frozen=True)
class Versioned(Power):
    """Says by its probability how many fits made it."""

    def predict_proba(self, x_NCT):
        p = 0.5 + len(self.fitted) / 1000
        return np.tile([1 - p, p], (len(x_NCT), 1))


@served
async def test_a_model_and_its_version_are_always_of_one_fit():
    async with serving(Versioned(), PATIENT, partial_fit=1) as service:
        reader, amp = await consumer(service), await producer(service)
        for at in range(0, 1000, 50):
            await send(amp, LOUD[at : at + 50], 50, at)
            if at % 250 == 200:
                await amp.pong()
        await amp.pong()
        count = service.vitals.counts["predicted"]
        for message in await lines(reader, count):
            made = round((message["probability"] - 0.5) * 1000)
            assert made == message["window_metadata"]["model_version"]
        assert service.vitals.counts["partial_fits"] >= 4
        fitted = service.lanes["amp"].session.model.pipeline.fitted
        kept = sum(len(f) for f in fitted)  # behind, partial fits are merged: none is lost, none done twice
        assert kept == service.lanes["amp"].session.counts["windows_kept"] == 20


@dataclass(frozen=True)
class Unfittable(Power):
    """Whose fit fails."""

    def partial_fit(self, fresh):
        raise np.linalg.LinAlgError("singular")


@served
async def test_a_fit_that_fails_leaves_the_model_as_it_was():
    async with serving(Unfittable(), PATIENT, partial_fit=1) as service:
        amp = await producer(service)
        await send(amp, LOUD[:100])
        await amp.pong()
        assert service.vitals.counts["partial_fit_errors"] == 1 or service.vitals.counts["partial_fit_errors"] == 2
        assert service.stats()["streams"][0]["model_version"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Bad input, row by row of docs/realtime.md


def header(**fields) -> bytes:
    good = {"magic": b"EEG1", "kind": 1, "flags": 0, "channels": 6, "samples": 2, "payload": 48, "seq": 0, "t": 0.0}
    return wire.HEADER.pack(*(good | fields).values())


BAD_BYTES = {
    "bad_magic": ("binary", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "bad_flags": ("binary", header(flags=1)),
    "bad_kind": ("binary", header(kind=9)),
    "channel_count": ("binary", header(channels=5, payload=40)),
    "bad_length": ("binary", header(payload=47)),
    "frame_too_long": ("binary", header(samples=50_000, payload=1_200_000)),
    "bad_time": ("binary", header(t=float("inf"))),
    "bad_seq": ("binary", header(seq=2**63)),
    "bad_event": ("binary", header(kind=2, channels=0, samples=0, payload=2) + b"{}"),
    "bad_json": ("ndjson", b"[" * 60_000 + b"\n"),
    "bad_samples": ("ndjson", b'{"type": "samples", "seq": 0, "x": [[1, 2], [3]]}\n'),
    "line_too_long": ("ndjson", b'{"type": "samples", "x": "' + b"a" * 200_000),
}


@pytest.mark.parametrize("code", BAD_BYTES)
@served
async def test_what_does_not_parse_ends_that_connection_and_no_other(code):
    framing, data = BAD_BYTES[code]
    async with serving(limits=PATIENT) as service:
        reader, good = await consumer(service), await producer(service)
        bad = await producer(service, wire.Stream("bad", CHANNELS, 250.0, framing=framing))
        await send(good, LOUD[:40])
        await bad.send(data)
        (error,) = await bad.rest()
        assert error["type"] == "error" and error["code"] == code and error["message"]
        await send(good, LOUD[40:75], first=40)
        await good.pong()
        assert [m["window_metadata"]["start"] for m in await lines(reader, 2)] == [0, 25]
        assert (await until(service, lambda stats: stats["closed"]))["closed"] == {code: 1}


@pytest.mark.parametrize("data, code", [
    (b"\n", "bad_json"), (b'{"type": "handshake"}\n', "bad_protocol"), (b"EEG1" + b"\0" * 28 + b"\n", "bad_json"),
    (b"a" * 70_000, "line_too_long"), (wire.handshake("x", "producer"), "bad_stream"), (b'{"type":"stats"}\n', "bad_handshake"),
])  # fmt: skip
@served
async def test_a_bad_hello_is_refused_with_a_reason(data, code):
    async with serving(limits=PATIENT) as service:
        peer = await Peer.connect(service)
        await peer.send(data)
        assert [m["code"] for m in await peer.rest()] == [code]
        assert (await until(service, lambda stats: stats["closed"]))["closed"] == {code: 1} and not service.lanes


BAD_SAMPLES = {"nan": np.nan, "inf": np.inf, "saturated": 2e6}


@pytest.mark.parametrize("kind", BAD_SAMPLES)
@served
async def test_samples_that_cannot_be_make_their_windows_null_and_no_others(kind):
    x_TC = LOUD[:400].copy()
    x_TC[160:165, 2] = BAD_SAMPLES[kind]
    async with serving(limits=PATIENT) as service:
        reader, amp = await consumer(service), await producer(service)
        clean = {}
        for at in range(0, 400, 25):
            await send(amp, x_TC[at : at + 25], 25, at)
            await amp.pong()
        for message in await lines(reader, 15):
            clean[message["window_metadata"]["start"]] = message
        bad = {at for at, m in clean.items() if m["prediction"] is None}
        assert bad == {125, 150}  # exactly those that hold samples 160 to 164
        reason = "saturated" if kind == "saturated" else "nan"
        assert all(clean[at]["skip_reason"] == reason and clean[at]["probability"] is None for at in bad)
        assert service.vitals.skipped == {reason: 2}
        assert service.stats()["streams"][0]["counts"]["held"] == 5


@pytest.mark.parametrize("gap, reason", [(10, "gap"), (100, "gap"), (-100, "rewind")])
@served
async def test_gaps_and_rewinds_are_counted_and_what_they_touch_is_null(gap, reason):
    path = dataclasses.replace(PATH, settle_s=0.4)  # 100 samples
    async with serving(Power(path), PATIENT) as service:
        reader, amp = await consumer(service), await producer(service)
        for at in range(0, 800, 25):
            await send(amp, LOUD[at : at + 25], 25, at + (gap if at >= 400 else 0))
            await amp.pong()
        (stream,) = service.stats()["streams"]
        messages = await lines(reader, stream["counts"]["windows"])
    null = [(m["window_metadata"]["start"], m["skip_reason"]) for m in messages if m["prediction"] is None]
    assert {why for _, why in null} == {"settling", reason}
    assert [at for at, why in null if why == "settling"] == [0, 25, 50, 75]
    touched = [at for at, why in null if why == reason]
    # 10 samples are 40 ms: held; more, or a count that goes back, starts the filter anew
    assert touched == {10: [375, 400], 100: [500, 525, 550, 575], -100: [300, 325, 350, 375]}[gap]
    counts = stream["counts"]
    assert counts["rewinds" if gap < 0 else "gaps"] == 1 and counts.get("lost", 0) == max(gap, 0)
    assert counts.get("resets", 0) == (gap != 10)


MODELS = {
    "not_ready": Power(ready="no subject windows yet"),
    "model_error": Broken(answer=RuntimeError("a bug in a model")),
    "not_finite": Broken(answer=np.array([[np.nan, 1.0]])),
}


@pytest.mark.parametrize("reason", [*MODELS, "shape", "none"])
@served
async def test_a_model_that_cannot_answer_costs_windows_not_the_service(reason):
    model = MODELS.get(reason) or Broken(answer=np.zeros((1, 0)) if reason == "shape" else None)
    wanted = reason if reason in MODELS else {"shape": "not_finite", "none": "model_error"}[reason]
    async with serving(model, PATIENT) as service:
        reader, amp = await consumer(service), await producer(service)
        for at in range(0, 100, 25):
            await send(amp, LOUD[at : at + 25], 25, at)
            await amp.pong()
        for message in await lines(reader, 3):
            assert message["prediction"] is None and message["probability"] is None
            assert message["skip_reason"].partition(":")[0] == wanted
        assert service.vitals.skipped == {wanted: 3} and service.vitals.counts["predicted"] == 0
        assert (await ask(service, "health"))["ready"]


@served
async def test_a_flat_channel_is_a_warning_only():
    x_TC = LOUD.copy()
    x_TC[:, 3] = 5.0
    async with serving(limits=PATIENT) as service:
        reader, amp = await consumer(service), await producer(service)
        await send(amp, x_TC[:50])
        assert (await reader.line())["prediction"] is not None
        quality = service.lanes["amp"].session.intake.quality()
        assert [name for name, q in quality.items() if q["flat"]] == ["C4"]


@served
async def test_of_the_same_sample_again_and_again_nothing_is_said():
    async with serving(limits=PATIENT) as service:
        reader, amp = await consumer(service), await producer(service)
        for at in range(0, 100, 25):
            await send(amp, np.repeat(LOUD[:1], 25, axis=0), 25, at)
            await amp.pong()
        assert [(m["prediction"], m["skip_reason"]) for m in await lines(reader, 3)] == [(None, "flat")] * 3


@served
async def test_a_slow_consumer_loses_its_own_oldest_lines_and_is_told():
    path = dataclasses.replace(PATH, step=2)
    async with serving(Power(path), PATIENT, partial_fit=0) as service:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.setblocking(False)
        await asyncio.get_running_loop().sock_connect(link, service.address)
        slow = Peer(*await asyncio.open_connection(sock=link, limit=2048))
        await slow.send(wire.handshake("slow", "consumer"))
        assert (await slow.line())["type"] == "handshake"
        quick, amp, total = await consumer(service), await producer(service), 0
        # 1000 lines are 400 kB: more than the kernel hides
        for at in range(0, 2050, 2):
            await send(amp, LOUD[at % 900 : at % 900 + 2], 2, at)
            total = max(0, (at + 2 - 50) // 2 + 1)
            if total:
                message = await quick.line()  # nobody else waits
                assert (
                    message["window_metadata"]["start"] == 2 * (total - 1)
                    and "dropped" not in message["window_metadata"]
                )
        boxes = {c["name"]: c for c in service.stats()["consumers"]}
        dropped = boxes["consumer slow"]["dropped"]
        assert dropped > 0 and boxes["consumer slow"]["waiting"] <= MOST_LINES
        got, told = 0, 0
        while got + told < total:
            message = await slow.line()
            got, told = got + 1, told + message["window_metadata"].get("dropped", 0)
        assert told == dropped and got + told == total
        assert message["window_metadata"]["start"] == 2 * (total - 1)  # the newest is never lost


@served
async def test_a_consumer_that_never_reads_is_closed():
    path = dataclasses.replace(PATH, step=1)
    async with serving(Power(path), dataclasses.replace(PATIENT, stall_s=0.2), partial_fit=0) as service:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.connect(service.address)
        link.sendall(wire.handshake("dead", "consumer"))
        await until(service, lambda stats: stats["peers"]["consumer"])
        amp, at = await producer(service), 0
        while not service.vitals.closed["stalled"]:
            await send(amp, LOUD[at % 900 : at % 900 + 5], 5, at)
            at += 5
            await asyncio.sleep(0)
        assert not service.outboxes and amp.reader.at_eof() is False
        link.close()


@served
async def test_half_open_peers_are_closed():
    async with serving(limits=dataclasses.replace(PATIENT, hello_s=0.05, silence_s=0.4)) as service:
        mute = await Peer.connect(service)
        assert await mute.rest() == []
        await until(service, lambda stats: stats["closed"] == {"silent": 1})
        slow = await Peer.connect(service)
        await slow.send(b'{"type": "hand')  # half a line is no hello either
        assert await slow.rest() == []
        amp = await Peer.connect(service)
        await amp.send(wire.handshake("amp", "producer", None, STREAM))
        said = await amp.rest()
        assert [m["type"] for m in said] == ["handshake", "error"] and said[1]["code"] == "silent"
        await until(service, lambda stats: stats["closed"].get("silent") == 3)


def test_how_long_a_producer_may_send_nothing_is_a_flag_and_longer_than_usual_chunks():
    assert Config().silence_s == Limits().silence_s >= 60
    process, ready = start("--silence-s", "0.5")
    with socket.create_connection(sockets.address(ready["listen"], "")) as link:
        link.sendall(wire.handshake("amp", "producer", None, STREAM))
        said = [json.loads(line) for line in link.makefile()]
    process.terminate()
    finish(process)
    assert said[-1]["code"] == "silent" and "nothing came for 0.5 s (--silence-s)" in said[-1]["message"]


@served
async def test_a_stream_without_samples_is_told_once_and_once_when_they_come_again(caplog):
    caplog.set_level("INFO", "berger")
    said = lambda: [r.getMessage() for r in caplog.records if "amp: no" in r.getMessage() or "again" in r.getMessage()]  # noqa: E731
    async with serving(limits=dataclasses.replace(PATIENT, pause_s=0.4)) as service:
        amp = await producer(service)
        await send(amp, LOUD[:250], 250)  # a second of them: two without more are nothing unusual
        await amp.pong()
        lane = service.lanes["amp"]
        lane.wait(0.9, 0.4)
        assert not said() and lane.stats()["pause_s"] is None
        for _ in range(3):
            await amp.pong()  # a ping is no sample
            lane.wait(1.0, 0.4)
        assert len(said()) == 1 and "stream amp: no samples for" in said()[0]
        assert service.stats()["streams"][0]["pause_s"] >= 3.9
        await send(amp, LOUD[:20], first=250)
        await amp.pong()
        assert len(said()) == 2 and "samples again, after" in said()[1] and service.health()["status"] == "ready"


@served
async def test_resets_and_torn_frames_are_counted():
    async with serving(limits=PATIENT) as service:
        torn = await producer(service)
        await torn.send(wire.frame_samples(0, 0.0, LOUD[:20])[:100])
        await torn.close()
        await until(service, lambda stats: stats["closed"].get("torn") == 1)
        reset = await producer(service)
        await send(reset, LOUD[:20])
        reset.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.writer.transport.abort()
        await until(service, lambda stats: sum(stats["closed"].values()) == 2)
        again = await producer(service)
        await send(again, LOUD[:50])
        await again.pong()


@served
async def test_more_peers_than_there_is_room_for_are_turned_away():
    async with serving(limits=dataclasses.replace(PATIENT, clients=3, producers=1)) as service:
        amp = await producer(service)
        other = await Peer.connect(service)
        await other.send(wire.handshake("other", "producer", None, wire.Stream("other", CHANNELS, 250.0)))
        assert [m["code"] for m in await other.rest()] == ["too_many_producers"]
        await until(service, lambda stats: stats["closed"].get("too_many_producers") == 1)
        kept = [await consumer(service), await consumer(service)]
        late = await Peer.connect(service)
        assert [m["code"] for m in await late.rest()] == ["too_many_clients"]
        await kept[0].close()
        await until(service, lambda stats: stats["peers"]["consumer"] == 1)
        assert await consumer(service) and not amp.reader.at_eof()


@served
async def test_a_storm_of_connections_is_slowed_down():
    async with serving(limits=dataclasses.replace(PATIENT, accept_burst=4, accepts_per_s=1e-6)) as service:
        amp = await producer(service)
        codes = []
        for _ in range(20):
            peer = await Peer.connect(service)
            await peer.send(wire.handshake("x", "control"))
            message = await peer.line()
            codes.append(message.get("code"))
            await peer.close()
        assert codes == [None] * 3 + ["rate_limited"] * 17
        await send(amp, LOUD[:50])
        await amp.pong()


@served
async def test_a_stream_that_is_there_is_replaced_only_with_a_token(monkeypatch):
    async with serving(limits=PATIENT) as service:
        first = await producer(service)
        second = await Peer.connect(service)
        await second.send(wire.handshake("x", "producer", None, STREAM))
        assert [m["code"] for m in await second.rest()] == ["name_in_use"]
        await send(first, LOUD[:20])
        await first.pong()
    monkeypatch.setenv("BERGER_TOKEN", "secret of many words")
    async with serving(limits=PATIENT, partial_fit=1) as service:
        first = await producer(service, token="secret of many words")
        await send(first, LOUD[:60])
        await first.pong()
        second = await producer(service, token="secret of many words")
        assert [m["code"] for m in await first.rest()] == ["replaced"]
        await send(second, LOUD[:60], first=1000)
        await second.pong()
        (stream,) = service.stats()["streams"]
        # the same session goes on: its model stays fitted, the missing samples are counted
        assert stream["model_version"] >= 1 and stream["counts"]["gaps"] == 1 and stream["connected"]


@served
async def test_a_stream_that_comes_back_goes_on_where_it_was():
    async with serving(limits=PATIENT, partial_fit=1) as service:
        for first in (0, 500):
            amp = await producer(service)
            await send(amp, LOUD[:100], first=first)
            version = (await amp.pong()) and service.stats()["streams"][0]["model_version"]
            await amp.send(wire.frame_bye())
            assert await amp.rest() == []
            await until(service, lambda stats: not stats["streams"][0]["connected"])
        assert version >= 2 and len(service.lanes) == 1
        await producer(
            service, dataclasses.replace(STREAM, rate_hz=500.0)
        )  # another stream by the same name is another
        assert service.stats()["streams"][0]["model_version"] == 0


@served
async def test_streams_that_are_gone_do_not_pile_up():
    async with serving(limits=dataclasses.replace(PATIENT, producers=2)) as service:
        for i in range(12):
            amp = await producer(service, wire.Stream(f"amp {i}", CHANNELS, 250.0))
            await amp.send(wire.frame_bye())
            assert await amp.rest() == []
            await until(service, lambda stats: stats["peers"]["producer"] == 0)
        assert len(service.lanes) <= 4 and "amp 11" in service.lanes


@served
async def test_a_stream_that_does_not_fit_the_model_is_refused_and_a_reordered_one_is_not():
    path = dataclasses.replace(PATH, channels=CHANNELS)
    x_TC = LOUD[:50]
    async with serving(Power(path), PATIENT, sync=True) as service:
        peer = await Peer.connect(service)
        await peer.send(wire.handshake("x", "producer", None, wire.Stream("lacking", CHANNELS[:-2], 250.0)))
        (error,) = await peer.rest()
        assert error["code"] == "mismatch" and "O1" in error["message"] and "O2" in error["message"]
        for stream in (wire.Stream("slow", CHANNELS, 60.0), wire.Stream("odd", CHANNELS, 250.0, "bananas")):
            peer = await Peer.connect(service)
            await peer.send(wire.handshake("x", "producer", None, stream))
            assert [m["code"] for m in await peer.rest()] == ["mismatch"]
        reader, answers = await consumer(service), []
        order = [3, 0, 5, 1, 2, 4]
        for name, places in (("straight", list(range(6))), ("shuffled", order)):
            amp = await producer(service, wire.Stream(name, tuple(CHANNELS[i] for i in places), 250.0))
            await send(amp, np.ascontiguousarray(x_TC[:, places]))
            answers.append(await reader.line())
        assert answers[0]["probability"] == answers[1]["probability"]


# ----------------------------------------------------------------------------------------------------------------------
# Overload, order, waiting


@served
async def test_overload_sheds_the_oldest_windows_of_the_stream_that_has_too_many():
    model = Held()
    async with serving(model, PATIENT, partial_fit=0) as service:
        reader = await consumer(service)
        greedy = await producer(service)
        await send(greedy, LOUD[:50])
        await until(service, lambda stats: stats["predicting_s"] > 0)
        modest = await producer(service, wire.Stream("modest", CHANNELS, 250.0))
        await send(modest, LOUD[:50])
        await send(greedy, LOUD[50:300], first=50)
        await until(
            service,
            lambda stats: stats["streams"][0]["counts"]["windows"] == 11 and stats["streams"][1]["waiting"] == 1,
        )
        assert [s["shed"] for s in service.stats()["streams"]] == [8, 0]
        for _ in range(4):
            model.gate.release()
        got = [(m["window_metadata"]["stream"], m["window_metadata"]["start"]) for m in await lines(reader, 4)]
        assert got[0] == ("amp", 0) and set(got[1:3]) == {("modest", 0), ("amp", 225)} and got[3] == ("amp", 250)
        assert service.vitals.counts["shed"] == 8


@served
async def test_a_ping_is_answered_when_its_windows_have_been_predicted_and_sent():
    model = Held()
    async with serving(model, PATIENT) as service:
        reader, amp = await consumer(service), await producer(service)
        await send(amp, LOUD[:50])
        await amp.send(wire.frame_ping(77))
        await until(service, lambda stats: stats["predicting_s"] > 0)
        answer = asyncio.create_task(amp.line())
        assert (await ask(service, "stats"))["counts"].get("predicted", 0) == 0 and not answer.done()
        model.gate.release()
        assert await answer == {"type": "pong", "id": 77, "seq": 50}
        assert service.vitals.counts["predicted"] == 1 and (await reader.line())["type"] == "data"


# ----------------------------------------------------------------------------------------------------------------------
# Dialling out


@served
async def test_a_server_that_is_dialled_gets_handshake_and_data_and_is_called_again():
    calls: asyncio.Queue = asyncio.Queue()

    async def answer(reader, writer):
        await calls.put(Peer(reader, writer))

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    limits = dataclasses.replace(PATIENT, backoff_s=(0.001, 0.01))
    async with serving(limits=limits, connect=(f"{host}:{port}",)) as service:
        amp, seq = await producer(service), 0
        for _ in range(3):
            call = await asyncio.wait_for(calls.get(), PATIENCE_S)
            assert await call.reader.readline() == b'{"type": "handshake", "client_name": "eeg-processor"}\n'
            await send(amp, LOUD[seq : seq + 50], first=seq)
            seq += 50
            assert (await call.line())["type"] == "data"
            call.writer.transport.abort()
        last = await asyncio.wait_for(calls.get(), PATIENCE_S)
        server.close()
        last.writer.transport.abort()
        await until(service, lambda stats: stats["counts"].get("dialled_closed", 0) >= 4)
        await send(amp, LOUD[seq : seq + 50], first=seq)  # while nobody is there
        await amp.pong()
        server = await asyncio.start_server(answer, host, port)
        call = await asyncio.wait_for(calls.get(), PATIENCE_S)
        assert (await call.line())["type"] == "handshake"
        assert (await call.line())["window_metadata"]["stop"] <= seq + 50
    server.close()


# ----------------------------------------------------------------------------------------------------------------------
# Security


def test_other_machines_are_served_only_with_token_and_tls(monkeypatch, tmp_path):
    monkeypatch.delenv("BERGER_TOKEN", raising=False)
    make = lambda **flags: Service(Config(**flags), Power(), states.load(), Limits())  # noqa: E731
    for host in ("0.0.0.0", "192.168.1.5", "[::]", "lab.example.org"):
        with pytest.raises(Unusable, match="a token .* and TLS"):
            make(listen=f"{host}:0")
    monkeypatch.setenv("BERGER_TOKEN", "secret of many words")
    with pytest.raises(Unusable, match=r"needs TLS"):
        make(listen="0.0.0.0:0")
    with pytest.raises(Unusable, match="belong together"):
        make(tls_cert=tmp_path / "cert.pem")
    with pytest.raises(Unusable, match="cert.pem"):
        make(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")
    for host in ("127.0.0.1", "localhost", "[::1]", "127.3.2.1"):
        make(listen=f"{host}:0")


@pytest.mark.parametrize("text", ["127.0.0.1", ":80", "127.0.0.1:http", "127.0.0.1:70000", "127.0.0.1:-1"])
def test_an_address_that_is_none_is_refused(text):
    with pytest.raises(Unusable, match="--listen"):
        sockets.address(text, "--listen")


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Unusable, match="choose another port"):
        sockets.listening(*taken.getsockname(), "--listen")


@served
async def test_without_the_token_nobody_is_let_in(monkeypatch):
    monkeypatch.setenv("BERGER_TOKEN", "secret of many words")
    async with serving(limits=PATIENT) as service:
        for role, stream in (("producer", STREAM), ("consumer", None), ("control", None)):
            for token in (None, "", "secret", "secret of many wordz", "\ud800"):
                peer = await Peer.connect(service)
                await peer.send(wire.handshake("x", role, token, stream))
                assert [m["code"] for m in await peer.rest()] == ["unauthorised"]
        assert (await ask(service, "health", "secret of many words"))["type"] == "health"


def test_tokens_are_compared_by_hmac():
    assert "compare_digest" in (ROOT / "lib" / "sockets.py").read_text()
    assert sockets.same_token(None, None) and sockets.same_token("a", "a")
    assert not sockets.same_token("a", None) and not sockets.same_token("a", "b")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -addext".split()
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(["openssl", *words, names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_tls_works_and_plain_peers_are_turned_away(certificate, monkeypatch):
    cert, key = certificate
    monkeypatch.setenv("BERGER_TOKEN", "secret of many words")

    @served
    async def run():
        trust = ssl.create_default_context(cafile=str(cert))
        flags = {"listen": "0.0.0.0:0", "tls_cert": cert, "tls_key": key}
        async with serving(limits=PATIENT, **flags) as service:
            service.address = ("127.0.0.1", service.address[1])
            hello = wire.handshake("x", "consumer", "secret of many words")
            reader = await greet(service, hello, ssl=trust)
            amp = await greet(service, wire.handshake("x", "producer", "secret of many words", STREAM), ssl=trust)
            await send(amp, LOUD[:50])
            assert (await reader.line())["prediction"] is not None
            plain = await Peer.connect(service)
            await plain.send(hello)
            try:
                assert b"handshake" not in await plain.reader.read()
            except ConnectionError:
                pass
            old = ssl.create_default_context(cafile=str(cert))
            old.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises((ssl.SSLError, OSError)):
                await Peer.connect(service, ssl=old)

    run()


# ----------------------------------------------------------------------------------------------------------------------
# What people and programs see


@served
async def test_control_answers_stats_and_health_and_refuses_the_rest():
    async with serving(limits=PATIENT) as service:
        assert (await ask(service, "health")) == {
            "type": "health", "status": "waiting", "ready": False, "problems": ["no producer"],
        }  # fmt: skip
        amp = await producer(service)
        await send(amp, LOUD[:100])
        await amp.pong()
        control = await greet(service, wire.handshake("x", "control"))
        await control.send(wire.line({"type": "health"}) + wire.line({"type": "stats"}))
        health, stats = await lines(control, 2)
        assert health["status"] == "ready" and health["ready"] and not health["problems"]
        assert {"latency", "counts", "skipped", "closed", "budget", "streams", "consumers", "peers"} <= set(stats)
        assert set(stats["latency"]) == {"ingest", "queue", "inference", "total"}
        assert stats["counts"]["predicted"] + stats["counts"].get("shed", 0) == 3 and stats["counts"]["samples"] == 100
        assert stats["latency"]["total"]["p50_ms"] <= stats["latency"]["total"]["p99_ms"]
        await control.send(wire.line({"type": "shutdown"}))
        assert [m["code"] for m in await control.rest()] == ["bad_request"]
        await control.close()
        peer = await greet(service, wire.handshake("x", "control"))
        await peer.send(wire.line({"type": "save"}))
        assert [m["code"] for m in await peer.rest()] == ["bad_request"]  # no --save


def test_the_log_file_is_json_and_rotated(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "FILE_BYTES", 2000)
    path = tmp_path / "log.jsonl"
    journal.start("info", path)
    try:
        for i in range(90):
            journal.say(20, f"a line with a \n break and ü {i}", stream="amp", n=i)
        journal.say(10, "not at this level")
        try:
            raise ValueError("of a model")
        except ValueError:
            journal.LOG.exception("it failed")
    finally:
        journal.stop()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4 and all(f.stat().st_size <= 2000 for f in files)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[-1]["level"] == "error" and "ValueError: of a model" in records[-1]["traceback"]
    first = json.loads((tmp_path / "log.jsonl.1").read_text().splitlines()[0])
    assert first["stream"] == "amp" and first["time"].endswith("Z") and "not at" not in path.read_text()
    with pytest.raises(Unusable, match="--log-file"):
        journal.start("info", tmp_path / "none" / "log.jsonl")


class Terminal(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


@served
async def test_a_terminal_has_a_live_line_that_log_lines_wipe(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    journal.start("info", None)
    try:
        async with serving(limits=PATIENT) as service:
            amp = await producer(service)
            await send(amp, LOUD[:100])
            await amp.pong()
            began_s = time.monotonic()
            while "amp INFERENCE: 6 good" not in sys.stderr.getvalue() and time.monotonic() - began_s < PATIENCE_S:
                await asyncio.sleep(0.02)
        shown = sys.stderr.getvalue().split("\r\x1b[K")
    finally:
        journal.stop()
    assert "INFO stream amp: 6 channels at 250 Hz\n" in shown[1]
    assert any("windows" in line and "ms |" in line for line in shown)


def start(*flags: str, **variables: str) -> tuple[subprocess.Popen, dict]:
    """The command, and its ready line."""
    words = [sys.executable, str(ROOT / "serve_realtime.py"), "--listen", "127.0.0.1:0", *flags]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables}
    )
    ready = process.stdout.readline()
    assert ready, process.stderr.read()
    return process, json.loads(ready)


@pytest.mark.parametrize("number, status", [(signals.SIGTERM, 0), (signals.SIGINT, 130)])
def test_a_signal_stops_it_cleanly_with_the_totals_last(number, status, tmp_path):
    process, ready = start("--log-file", str(tmp_path / "log"))
    assert ready["ready"] is True and sockets.address(ready["listen"], "")[1] > 0
    with socket.create_connection(sockets.address(ready["listen"], "")) as link, link.makefile("rb") as file:
        link.sendall(wire.handshake("x", "consumer"))
        assert wire.read_line(file.readline())["type"] == "handshake"
        process.send_signal(number)
        assert [wire.read_line(line)["type"] for line in file] == ["bye"]
    out, err = process.communicate(timeout=PATIENCE_S)
    totals = json.loads(out.splitlines()[-1])
    assert process.returncode == status and totals["windows"] == 0 and totals["seconds"] > 0
    assert "Traceback" not in err


@pytest.mark.parametrize("flags, said", [
    (["--listen", "0.0.0.0:0"], "needs a token"),
    (["--listen", "nowhere"], "--listen"),
    (["--states", "none.toml"], "none.toml"),
    (["--start", "SLEEP"], "--start SLEEP"),
    (["--models", "nowhere"], "nowhere"),
    (["--step", "0"], "--step 0"),
    (["--token-file", "none.txt"], "none.txt"),
    (["--action", "fit"], "--cache"),
])  # fmt: skip
def test_what_the_user_got_wrong_is_one_line_and_status_2(flags, said):
    words = [sys.executable, str(ROOT / "serve_realtime.py"), *flags]
    clean = {k: v for k, v in os.environ.items() if k != "BERGER_TOKEN"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, env=clean)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr, done.stderr


@pytest.mark.parametrize(
    "name", ["settle_s", "collect_s", "speed", "seconds", "window_s", "stride_s", "after_s", "event_s", "silence_s"]
)
def test_numbers_that_are_none_are_refused_before_anything_starts(name):
    for value in (math.nan, math.inf, *(() if name == "after_s" else (-1.0,))):
        with pytest.raises(Unusable, match=f"^--{name.replace('_', '-')} {value} must"):
            main(Config(**{name: value}))


@pytest.mark.parametrize("name", ["partial_fit", "seed", "chunk", "wait", "transport_min", "lines"])
def test_counts_below_none_are_refused_before_anything_starts(name):
    with pytest.raises(Unusable, match=f"^--{name.replace('_', '-')} -1 must not be negative"):
        main(Config(**{name: -1}))


@served
async def test_a_bad_channel_that_no_stream_has_is_a_typo_and_said():
    path = dataclasses.replace(PATH, bad=("c3", "Fp9"))
    async with serving(Power(path), PATIENT) as service:
        peer = await Peer.connect(service)
        await peer.send(wire.handshake("x", "producer", None, STREAM))
        (error,) = await peer.rest()
        assert error["code"] == "mismatch" and error["message"].startswith("--bad-channels Fp9: not among")


def fittable(folder: Path) -> Path:
    """A saved pipeline of the test streams, with as few windows at rest as make a fit."""
    rng, y_N = np.random.default_rng(0), np.arange(40) % 2
    x_NCT = rng.standard_normal((40, len(CHANNELS), 50))
    x_NCT[np.arange(40), y_N] *= 3
    path = dataclasses.replace(PATH, channels=CHANNELS, rate_hz=250.0)
    pipelines.save(learn(x_NCT, y_N, np.zeros(40), ("a", "b"), path, transport_min=2), folder)
    return folder


def test_a_folder_that_can_not_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(Unusable, match=f"^--save {folder} can't be written: .*; name another folder"):
            main(Config(models=fittable(tmp_path / "model"), save=folder))


def test_a_save_that_fails_costs_neither_control_nor_totals_nor_the_recording(tmp_path):
    kept, record = tmp_path / "kept", tmp_path / "record"
    words = ("--models", fittable(tmp_path / "model"), "--save", kept, "--record", record, "--start", "BACKGROUND")
    process, ready = start(*map(str, words))
    assert kept.is_dir()
    kept.rmdir()
    kept.write_text("")
    address = sockets.address(ready["listen"], "")
    with socket.create_connection(address) as amp, amp.makefile("rb") as pongs:
        amp.sendall(wire.handshake("x", "producer", None, STREAM))
        frames = (wire.frame_samples(0, 2.0, LOUD[:500]), wire.frame_event(500, 2.0, "INFERENCE"))
        amp.sendall(b"".join([*frames, wire.frame_samples(500, 2.4, LOUD[500:600]), wire.frame_ping(1)]))
        assert [wire.read_line(pongs.readline())["type"] for _ in range(2)] == ["handshake", "pong"]
        with socket.create_connection(address) as link, link.makefile("rb") as file:
            link.sendall(wire.handshake("x", "control") + wire.line({"type": "stats"}) + wire.line({"type": "save"}))
            _, stats, error = (wire.read_line(file.readline()) for _ in range(3))
            assert stats["counts"]["fits"] == 1 and error["code"] == "not_saved" and str(kept) in error["message"]
            link.sendall(wire.line({"type": "health"}))
            assert wire.read_line(file.readline())["type"] == "health"  # still connected
            process.send_signal(signals.SIGTERM)
            assert [wire.read_line(line)["type"] for line in file] == ["bye"]
    out, err = process.communicate(timeout=PATIENCE_S)
    totals = json.loads(out.splitlines()[-1])
    assert process.returncode == 2 and totals["saved"] is None and totals["fits"] == 1 and totals["recorded"]["records"]
    assert "Traceback" not in err and err.splitlines()[-1].startswith(f"serve_realtime.py: {kept}"), err
    assert not open_session(record).notes  # such as that it has no end


def test_serving_starts_without_torch_mne_and_scipy_signal():
    program = (
        "import sys, serve_realtime; print(sorted({'mne', 'torch', 'sklearn', 'scipy.signal'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------------------------------
# The whole command


@served
async def test_the_client_of_the_docs_works():
    (program,) = re.findall(r"^```python\n(.+?)^```", (ROOT / "docs" / "realtime.md").read_text(), re.M | re.S)
    assert len(program.splitlines()) <= 32
    async with serving(limits=PATIENT, start="IDLE") as service:
        words = [sys.executable, "-c", program, sockets.shown(service.address)]
        child = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        out, _ = await child.communicate()
    said = [json.loads(line) for line in out.splitlines()]
    assert [m["type"] for m in said] == ["handshake", "handshake", "data"] and child.returncode == 0
    assert said[2]["window_metadata"]["stream"] == "demo" and service.vitals.counts["shed"] == 0


def finish(process: subprocess.Popen) -> tuple[dict, str]:
    """The totals of a command that ends by itself."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def test_a_recording_is_replayed_to_a_client_and_a_recorded_session_gives_the_same_predictions(data_dir, tmp_path):
    path = data_dir / "eegmmidb" / "S001" / "S001R04.edf"
    told = []
    for flags in (
        ["--replay", str(path), "--record", str(tmp_path / "session")],
        ["--replay", str(tmp_path / "session")],
    ):
        process, ready = start(*flags, "--speed", "0", "--sync", "--wait", "1", "--start", "INFERENCE")
        words = [
            sys.executable,
            str(ROOT / "serve_realtime.py"),
            "--action",
            "client",
            "--to",
            ready["listen"],
            "--lines",
            "100",
        ]
        client = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        totals, _ = finish(process)
        *lines, counts = [json.loads(line) for line in client.stdout.splitlines()]
        assert lines[0] == {"type": "handshake", "client_name": "eeg-processor"} and counts["lines"] == 100
        assert all(m["type"] == "data" and m["skip_reason"].startswith(("not_ready", "settling")) for m in lines[1:])
        assert [m["window_metadata"]["start"] for m in lines[1:]] == list(range(0, 99 * 125, 125))
        assert totals["windows"] == (20_000 - 250) // 125 + 1 and totals["shed"] == 0  # 125 s at 160 Hz
        told.append([without_time(m) for m in lines[1:]])
    assert told[0] == told[1]


def test_an_amplifier_of_so_many_seconds_ends_the_service():
    process, _ = start("--amplifier", "--seconds", "1", "--speed", "20")
    totals, _ = finish(process)
    assert totals["streams"] == 1 and totals["windows"] == 1


def test_a_replay_of_nothing_ends_the_service_with_one_line(tmp_path):
    path = tmp_path / "none.edf"
    process, _ = start("--replay", str(path))
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2 and f"--replay {path}:" in err.splitlines()[-1] and "Traceback" not in err
