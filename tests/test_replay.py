"""Producers: what a recording or a recorded session sends, sample by sample; pace, acknowledgement, refusals, broken connections."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import shutil
import socket
import subprocess
import threading

import numpy as np
import pytest

from lib import amplifier, consumer, recordings, replay, wire
from lib.errors import Failed, Unusable
from lib.producer import Lost, Pace, Producer, reaching
from lib.recorder import Recorder
from tests.peer import Peer
from tests.service import PATH, Power, serving

STREAM = wire.Stream("amp", ("Fz", "Cz", "Pz"), 250.0)


def joined(chunks) -> np.ndarray:
    return np.concatenate([c.x_TC for c in chunks])


@pytest.mark.parametrize("framing, samples", [("binary", 100_000), ("ndjson", 2000)])
def test_what_a_producer_sends_arrives(framing, samples):
    x_TC = np.random.default_rng(0).standard_normal((samples, 3)).astype(np.float32)
    x_TC[5, 1] = np.nan
    stream = wire.Stream("amp", STREAM.channels, 250.0, "uV", framing)
    with Peer() as peer, Producer(peer.address, stream, token="t") as producer:
        producer.event(0, 0.0, "start", {"a": [1, None]})
        producer.samples(0, samples / 250, x_TC)  # larger than any frame
        producer.ack()
        assert peer.hellos[0].stream == stream and peer.hellos[0].token == "t"
        chunks = peer.chunks()
        assert peer.events() == [wire.Event(0, 0.0, "start", {"a": [1, None]})] and len(chunks) > 1
        np.testing.assert_array_equal(joined(chunks), x_TC)
        assert [c.seq for c in chunks] == [0, *itertools.accumulate(len(c.x_TC) for c in chunks[:-1])]
        for c in chunks:
            assert c.t == pytest.approx((c.seq + len(c.x_TC)) / 250)
    peer.until(lambda p: isinstance(p.got[-1], wire.Bye))


def test_refusals_and_broken_connections_say_why():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(*lines):
            link, _ = server.accept()
            with link:
                link.makefile("rb").readline()
                link.sendall(b"".join(lines))

        def refuse(kind, words, *lines):
            thread = threading.Thread(target=answer, args=lines)
            thread.start()
            with pytest.raises(kind, match=words):
                with Producer(server.getsockname(), STREAM, timeout_s=5) as producer:
                    producer.ack()
            thread.join()

        refuse(Unusable, "no Fz .channel_missing", wire.error("channel_missing", "no Fz"))
        refuse(Lost, "full .rate_limited", wire.error("rate_limited", "full"))
        refuse(Unusable, "not the service", b"220 mail.example ESMTP\n")
        refuse(Lost, "closed")
        refuse(Lost, "closed|broke", wire.SERVICE_HANDSHAKE)
        refuse(Lost, "more than 65536 bytes", wire.SERVICE_HANDSHAKE + b"x" * 70_000)
        address = server.getsockname()
    with pytest.raises(Unusable, match=f"--to 127.0.0.1:{address[1]}: Connection refused"), reaching(address):
        Producer(address, STREAM)
    with pytest.raises(Failed, match="gone"), reaching(address):
        raise Lost("gone")


@pytest.fixture
def gappy(tmp_path):
    """A recording with two pieces, a sample that is missing, and events, opened as any other."""
    import mne

    rng, rate_hz = np.random.default_rng(1), 200.0
    x_CT = 1e-5 * rng.standard_normal((4, 2000))
    info = mne.create_info(["Pz", "Cz", "Fz", "EOG"], rate_hz, ["eeg", "eeg", "eeg", "eog"])
    raw = mne.io.RawArray(x_CT, info, verbose="ERROR")
    raw.set_annotations(mne.Annotations([3.0, 1.0, 7.001], [1.0, 0.0, 0.0], ["bad_acq_skip", "left", "right hand"]))
    path = tmp_path / "gap_raw.fif"
    raw.save(path, verbose="ERROR")
    return path, x_CT


def test_a_recording_keeps_its_clock_gaps_and_events(gappy):
    path, x_CT = gappy
    material = replay.read(path)
    assert material.stream == wire.Stream("gap_raw.fif", ("Fz", "Cz", "Pz"), 200.0, "uV", "binary")
    assert [(first, len(x_TC)) for first, x_TC in material.pieces] == [(0, 600), (800, 1200)]
    kept = np.r_[0:600, 800:2000]
    np.testing.assert_allclose(
        np.concatenate([x for _, x in material.pieces]).T, 1e6 * x_CT[[2, 1, 0]][:, kept], rtol=1e-5
    )
    assert [(e.seq, e.code) for e in material.events] == [(200, "left"), (1400, "right hand")]


@pytest.mark.parametrize("chunk, framing", [(1, "binary"), (7, "ndjson"), (0, "binary"), (5000, "binary")])
def test_whatever_the_chunks_the_same_arrives_and_events_come_first(gappy, chunk, framing):
    path, _ = gappy
    material = replay.read(path, "me", framing)
    with Peer() as peer:
        totals = replay.run(path, peer.address, 0.0, "me", framing, chunk)
    x_TC, seq = joined(peer.chunks()), np.concatenate([c.seq + np.arange(len(c.x_TC)) for c in peer.chunks()])
    np.testing.assert_array_equal(x_TC, np.concatenate([x for _, x in material.pieces]))
    np.testing.assert_array_equal(seq, np.r_[0:600, 800:2000])
    assert peer.events() == material.events
    for event in material.events:
        later = peer.got[peer.got.index(event) :]
        assert next(i.seq for i in later if isinstance(i, wire.Samples)) + max(chunk, 8) > event.seq
        assert all(i.seq + len(i.x_TC) <= event.seq for i in peer.got[: -len(later)] if isinstance(i, wire.Samples))
    assert totals["samples"] == 1800 and totals["events"] == 2 and totals["gaps"] == 1
    json.dumps(totals, allow_nan=False)


def test_real_recordings_with_their_events(data_dir):
    motor = replay.read(data_dir / "eegmmidb/S001/S001R04.edf")
    assert len(motor.stream.channels) == 64 and motor.stream.rate_hz == 160
    recording = recordings.open_recording(data_dir / "eegmmidb/S001/S001R04.edf")
    cz = recording.read([[n.strip(".").upper() for n in recording.names].index("CZ")])[0]
    np.testing.assert_array_equal(motor.pieces[0][1][:, motor.stream.channels.index("Cz")], cz)
    assert [(e.seq, e.code) for e in motor.events] == [(round(e.onset_s * 160), e.label) for e in recording.events]

    session = replay.read(data_dir / "xdf/ssvep_example.xdf")  # markers of a stream on another clock
    assert session.events[0].code == "Trial Started" and len(session.events) > 200
    path = next((data_dir / "ssvep_exo").glob("subject0*/*_raw.fif"))
    ssvep = replay.read(path)  # events of a file beside it
    codes = {e.code for e in ssvep.events}
    assert codes == {"1", "2", "3", "4"} and all(0 <= e.seq < len(ssvep.pieces[0][1]) for e in ssvep.events)


def test_what_cannot_be_replayed_is_refused_with_the_mend(tmp_path, gappy, data_dir):
    (tmp_path / "x.edf").write_bytes(b"0       nonsense")
    (tmp_path / "y.xyz").write_bytes(b"0")
    for path, words in (
        (tmp_path / "none.edf", "no such file"),
        (tmp_path / "x.edf", "x.edf"),
        (tmp_path / "y.xyz", "no reader"),
        (data_dir / "eegmmidb", "name one of them"),
        (data_dir / "damaged/S001R04_crlf_mangled.edf", "line_endings"),
        (next((data_dir / "bonn").glob("*/*.txt")), "unit"),
    ):
        with pytest.raises(Unusable, match=words):
            replay.run(path, ("127.0.0.1", 9), 0.0)
    with pytest.raises(Unusable, match="can't be negative"):
        replay.run(gappy[0], ("127.0.0.1", 9), -1.0)


def test_as_fast_as_acknowledged_never_runs_ahead(gappy):
    path, _ = gappy
    with Peer(answers=False) as peer:
        thread = threading.Thread(
            target=lambda: pytest.raises(Failed, replay.run, path, peer.address, 0.0), daemon=True
        )
        thread.start()
        peer.until(lambda p: sum(isinstance(i, wire.Ping) for i in p.got) == 2)
        sent = sum(len(c.x_TC) for c in peer.chunks())
        assert sent == 128  # two pings, the first unanswered
        peer.drop()
        thread.join(300)
        assert not thread.is_alive() and sum(len(c.x_TC) for c in peer.chunks()) == sent


def test_the_pace_is_kept_and_lateness_told(monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr("lib.producer.time.monotonic", lambda: now[0])
    monkeypatch.setattr("lib.producer.time.sleep", lambda s: (slept.append(s), now.__setitem__(0, now[0] + s)))
    pace = Pace(2.0)
    for at_s in (1.0, 1.5, 3.0):
        pace.wait(at_s, [])
    assert now[0] == pytest.approx(101.0) and sum(slept) == pytest.approx(1.0) and pace.late_s == 0
    now[0] += 5
    pace.wait(3.5, [])
    assert now[0] == pytest.approx(106.0) and pace.late_s == pytest.approx(4.75)
    Pace(0).wait(1e9, [])


def test_a_recorded_session_is_sent_again_as_it_came(tmp_path):
    rng, sent = np.random.default_rng(2), {1: [], 2: []}
    with Recorder(tmp_path / "s") as log:
        for number, framing in ((1, "binary"), (2, "ndjson")):
            log.opened(number, wire.Stream(f"amp{number}", ("Fz", "Cz")[:number], 250.0, "uV", framing))
        for i in range(300):
            number = 1 + i % 2
            x_TC = rng.standard_normal((10, number)).astype(np.float32)
            sent[number].append((5 * i, float(i), x_TC.tobytes()))
            if number == 1:
                log.frame(1, wire.frame_samples(5 * i, float(i), x_TC))
                log.frame(1, wire.frame_ping(i))
            else:
                log.line(2, wire.line_event(5 * i, float(i), "go", i))
                log.line(2, wire.line_samples(5 * i, float(i), x_TC))
        log.frame(1, wire.frame_bye())
        log.closed(1, "end")
    with Peer() as peer:
        totals = replay.run(tmp_path / "s", peer.address, 0.0)
        peer.until(lambda p: sum(isinstance(i, wire.Bye) for i in p.got) == 2)
    came = [(c.seq, c.t, c.x_TC.tobytes()) for c in peer.chunks()]
    for number, chunks in sent.items():
        assert [c for c in came if len(c[2]) == 40 * number] == chunks
    assert peer.events() == [wire.Event(5 * i, float(i), "go", i) for i in range(1, 300, 2)]
    assert totals["samples"] == 3000 and totals["streams"] == 2 and not totals["notes"]
    assert {h.stream.name for h in peer.hellos} == {"amp1", "amp2"}


def test_the_client_prints_each_line_and_comes_back():
    lines = [wire.SERVICE_HANDSHAKE, *(wire.line({"type": "data", "prediction": p}) for p in (1, None, 0))]
    with socket.create_server(("127.0.0.1", 0)) as server:
        printed = []

        def serve():
            for part in (lines[:2], [], lines[:1] + lines[2:]):
                link, _ = server.accept()
                with link:
                    assert wire.read_handshake(link.makefile("rb").readline()).role == "consumer"
                    link.sendall(b"".join(part))

        thread = threading.Thread(target=serve)
        thread.start()
        counts = consumer.run(server.getsockname(), lines=5, write=printed.append)
        thread.join()
        assert "".join(printed).encode() == b"".join([*lines[:2], lines[0], *lines[2:]])
        assert counts["data"] == 3 and counts["skipped"] == 1 and counts["handshake"] == 2 and counts["reconnects"] >= 2
        address = server.getsockname()
    with pytest.raises(Unusable, match="start the service first"):
        consumer.run(address, retry=False)


def test_a_client_ends_when_nobody_reads_what_it_prints():
    def write(line):
        raise BrokenPipeError

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(wire.SERVICE_HANDSHAKE))
        thread.start()
        with pytest.raises(BrokenPipeError):  # not to be taken for a service that is gone, and called again
            consumer.run(server.getsockname(), write=write, retry=False)
        thread.join()


def test_a_client_that_reaches_nobody_says_so_once(capsys, monkeypatch):
    waits = iter([0.0] * 5)
    monkeypatch.setattr(consumer, "backoff_s", lambda attempt: next(waits))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(StopIteration):  # it goes on for ever
        consumer.run(address)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"--to {address[0]}:{address[1]}: Connection refused; it is tried again"]


def test_the_client_can_be_called_by_the_service():
    printed, where = [], []
    ready = threading.Event()
    thread = threading.Thread(
        target=consumer.listen, args=("127.0.0.1", 0, 2, printed.append, lambda a: (where.append(a), ready.set()))
    )
    thread.start()
    assert ready.wait(10)
    for line in (b'{"type": "handshake"}\n', b'{"type": "data"}\n'):
        with socket.create_connection(where[0]) as link:
            link.sendall(line)
    thread.join(10)
    assert [json.loads(line)["type"] for line in printed] == ["handshake", "data"]


@contextlib.contextmanager
def running(**flags):
    """The real service on an event loop in another thread."""
    box, ready = [], threading.Event()

    async def serve():
        stop = asyncio.Event()
        pipeline = Power(dataclasses.replace(PATH, step=125))
        async with serving(pipeline, **flags) as service:
            box.extend((service, lambda: service.loop.call_soon_threadsafe(stop.set)))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(300)
    try:
        yield box[0]
    finally:
        box[1]()
        thread.join(300)


def test_the_service_takes_what_is_sent_as_fast_as_acknowledged_and_sheds_nothing(gappy):
    with running() as service:
        for framing in ("binary", "ndjson"):
            totals = replay.run(gappy[0], service.address, 0.0, f"one {framing}", framing)
            assert totals["samples"] == 1800
            counts = service.lanes[f"one {framing}"].session.counts
            assert counts["windows"] == (600 - 50) // 125 + 1 + (1200 - 50) // 125 + 1 and counts["events_ignored"] == 2
        assert not service.vitals.counts["shed"] and service.vitals.counts["samples"] == 3600
        assert service.vitals.closed == {"done": 2}
        with Producer(service.address, wire.Stream("one binary", ("C3",), 250.0)) as producer:
            with pytest.raises(Lost, match="name_in_use"):
                Producer(service.address, producer.stream)
        with pytest.raises(Unusable, match="mismatch"):
            Producer(service.address, wire.Stream("two", ("nothing", "known"), 250.0, "parsec"))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_sources_and_client_speak_tls_with_a_token(tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    cert, key, token = tmp_path / "cert.pem", tmp_path / "key.pem", "secret of many words"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -addext".split()
    words += ["subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    monkeypatch.setenv("BERGER_TOKEN", token)
    with running(tls_cert=cert, tls_key=key) as service:
        printed = []
        arguments = (service.address, token, cert, 6, False, printed.append)
        client = threading.Thread(target=consumer.run, args=arguments, daemon=True)
        client.start()
        while not service.outboxes:
            threading.Event().wait(0.01)
        with Producer(service.address, wire.Stream("amp", ("C3", "C4"), 250.0), token, cert) as producer:
            for seq in range(0, 550, 50):
                producer.samples(seq, seq / 250, np.random.default_rng(seq).standard_normal((50, 2)))
                producer.ack()
        client.join(300)
        totals = amplifier.run(service.address, seconds=2.2, speed=0.0, token=token, tls=cert)
        assert totals["samples"] == 550 and service.vitals.counts["samples"] == 1100
        kinds = [json.loads(line)["type"] for line in printed]
        assert kinds == ["handshake", *["data"] * 5]
        for bad, words in ((None, "unauthorised"), ("guess", "unauthorised")):
            with pytest.raises(Unusable, match=words):
                amplifier.run(service.address, seconds=1.0, speed=0.0, token=bad, tls=cert)
        with pytest.raises(Unusable, match="unauthorised"):
            consumer.run(service.address, "guess", cert)
        with pytest.raises((Unusable, Failed)):
            amplifier.run(service.address, seconds=1.0, speed=0.0, token=token)  # plain TCP
        with pytest.raises(Unusable, match="--tls-ca"):
            amplifier.run(service.address, seconds=1.0, speed=0.0, token=token, tls=tmp_path / "none.pem")
