"""The protocol on bytes: what goes in comes out, what doesn't parse is Malformed and never anything else."""

import json
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import wire
from lib.wire import Bye, Event, Malformed, Ping, Samples, Stream

STREAM = Stream("amp", ("Fp1", "C3", "Cz"), 250.0)


def frames(data: bytes, channels: int = 3) -> list:
    """Every message of a run of frames, header by header, as the service reads them."""
    out = []
    while data:
        header = wire.parse_header(data[:32], channels)
        out.append(wire.parse_frame(header, data[32 : 32 + header.payload], channels))
        data = data[32 + header.payload :]
    return out


def code(function, *arguments) -> str:
    """The code with which `function` refuses."""
    with pytest.raises(Malformed) as caught:
        function(*arguments)
    assert caught.value.sentence and caught.value.code.replace("_", "").isalpha()
    return caught.value.code


def test_the_header_is_byte_for_byte_what_the_docs_say():
    frame = wire.frame_samples(7, 1.5, np.array([[1, 2, 3]], np.float32))
    assert frame == b"EEG1\x01\x00\x03\x00\x01\x00\x00\x00\x0c\x00\x00\x00" + struct.pack("<Qd3f", 7, 1.5, 1, 2, 3)
    assert wire.frame_ping(9)[:16] == b"EEG1\x03" + b"\0" * 11 and wire.HEADER.size == 32
    assert wire.SERVICE_HANDSHAKE == b'{"type": "handshake", "client_name": "eeg-processor"}\n'


@settings(deadline=None)
@given(
    st.integers(0, wire.MAX_SEQ),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(1, 50),
    st.integers(0, 9),
)
def test_samples_survive_both_framings(seq, t, T, seed):
    x_TC = np.random.default_rng(seed).normal(0, 50, (T, 3)).astype(np.float32)
    x_TC[seed % T, seed % 3] = np.nan
    (a,) = frames(wire.frame_samples(seq, t, x_TC))
    b = wire.parse_line(wire.line_samples(seq, t, x_TC), 3)
    for message in (a, b):
        assert isinstance(message, Samples) and (message.seq, message.t) == (seq, t)
        np.testing.assert_array_equal(message.x_TC, x_TC)  # float32 to the bit, also through JSON


@settings(deadline=None)
@given(
    st.text(min_size=1, max_size=64).filter(str.isprintable),
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
)
def test_events_pings_and_byes_survive_both_framings(name, value):
    try:
        frame = wire.frame_event(5, 0.5, name, value)
    except ValueError:  # an integer of thousands of digits
        return
    assert frames(frame + wire.frame_ping(4) + wire.frame_bye()) == [Event(5, 0.5, name, value), Ping(4), Bye()]
    lines = wire.line_event(5, 0.5, name, value), wire.line_ping(4), wire.line_bye()
    assert [wire.parse_line(line, 3) for line in lines] == [Event(5, 0.5, name, value), Ping(4), Bye()]


def test_a_number_is_a_marker_too():
    assert wire.parse_line(b'{"type": "event", "code": 10, "seq": 0}', 3).code == "10"


def test_handshakes_survive():
    for role, stream in (("producer", STREAM), ("consumer", None), ("control", None)):
        hello = wire.read_handshake(wire.handshake("me", role, "secret", stream))
        assert (hello.client_name, hello.role, hello.token, hello.stream) == ("me", role, "secret", stream)


HEADERS = {
    "bad_magic": dict(magic=b"EEG2"),
    "bad_flags": dict(flags=1),
    "bad_kind": dict(kind=5, channels=0, samples=0, payload=0),
    "channel_count": dict(channels=4),
    "bad_length": dict(payload=23),
    "frame_too_long": dict(samples=200_000, payload=2_400_000),
    "bad_seq": dict(seq=2**60),
    "bad_time": dict(t=float("nan")),
}


@pytest.mark.parametrize("wanted", HEADERS)
def test_every_bad_header_is_refused_before_its_payload(wanted):
    fields = {"magic": b"EEG1", "kind": 1, "flags": 0, "channels": 3, "samples": 2, "payload": 24, "seq": 0, "t": 0.0}
    assert wire.parse_header(wire.HEADER.pack(*fields.values()), 3).payload == 24
    assert code(wire.parse_header, wire.HEADER.pack(*(fields | HEADERS[wanted]).values()), 3) == wanted


def test_only_samples_have_channels_and_events_are_short():
    make = lambda kind, channels, payload: wire.HEADER.pack(b"EEG1", kind, 0, channels, 0, payload, 0, 0.0)  # noqa: E731
    assert code(wire.parse_header, make(2, 3, 10), 3) == "bad_length"
    assert code(wire.parse_header, make(2, 0, wire.MAX_EVENT + 1), 3) == "frame_too_long"
    assert code(wire.parse_header, make(3, 0, 1), 3) == "frame_too_long"
    assert code(wire.parse_header, wire.HEADER.pack(b"EEG1", 1, 0, 3, 0, 0, 0, 0.0), 3) == "bad_length"  # no samples


LINES = [
    (b"[[[[", "bad_json"),
    (b"[" * 60_000, "bad_json"),
    (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "bad_json"),
    (b'{"type": "samples", "seq": 0, "x": [[NaN, 1, 2]]}', "bad_json"),
    (b'{"type": "samples", "seq": 0, "x": [[-Infinity, 1, 2]]}', "bad_json"),
    (b'{"type": "samples", "seq": 0, "x": [[1, 2]]}', "channel_count"),
    (b'{"type": "samples", "seq": 0, "x": [[1, 2, 3], [1, 2]]}', "bad_samples"),
    (b'{"type": "samples", "seq": 0, "x": [["1", "2", "3"]]}', "bad_samples"),
    (b'{"type": "samples", "seq": 0, "x": [[[1, 2, 3]]]}', "bad_samples"),
    (b'{"type": "samples", "seq": 0, "x": [[true, false, true]]}', "bad_samples"),
    (b'{"type": "samples", "seq": 0, "x": [[1, "a", null]]}', "bad_samples"),
    (b'{"type": "samples", "seq": 0, "x": []}', "bad_samples"),
    (b'{"type": "samples", "seq": 0, "x": [null]}', "bad_samples"),
    (b'{"type": "samples", "seq": 0, "x": {"0": 1}}', "bad_samples"),
    (b'{"type": "samples", "seq": 0, "x": [[%s, 1, 2]]}' % (b"9" * 400), "bad_samples"),
    (b'{"type": "samples", "seq": 0, "x": [[%s, 1, 2]]}' % (b"9" * 9000), "bad_json"),
    (b'{"type": "samples", "seq": -1, "x": [[1, 2, 3]]}', "bad_seq"),
    (b'{"type": "samples", "seq": 0.5, "x": [[1, 2, 3]]}', "bad_seq"),
    (b'{"type": "samples", "seq": true, "x": [[1, 2, 3]]}', "bad_seq"),
    (b'{"type": "samples", "x": [[1, 2, 3]]}', "bad_seq"),
    (b'{"type": "samples", "seq": %s, "x": [[1, 2, 3]]}' % (b"9" * 30), "bad_seq"),
    (b'{"type": "samples", "seq": 0, "t": 1e999, "x": [[1, 2, 3]]}', "bad_time"),
    (b'{"type": "samples", "seq": 0, "t": "0", "x": [[1, 2, 3]]}', "bad_time"),
    (b'{"type": "event", "seq": 0}', "bad_event"),
    (b'{"type": "event", "seq": 0, "code": ""}', "bad_event"),
    (b'{"type": "event", "seq": 0, "code": "\\ud800"}', "bad_event"),
    (b'{"type": "event", "seq": 0, "code": 1.5}', "bad_event"),
    (b'{"type": "event", "seq": 0, "code": "%s"}' % (b"a" * 65), "bad_event"),
    (b'{"type": "event", "seq": 0, "code": "a", "value": "%s"}' % (b"a" * 4096), "line_too_long"),
    (b'{"type": "predict"}', "bad_kind"),
    (b'{"type": ["samples"]}', "bad_kind"),
    (b'{"type": "ping", "id": "x"}', "bad_seq"),
    (b"\xff\xfe{}", "bad_json"),
    (b"", "bad_json"),
    (b"7", "bad_json"),
    (b'{"type": "samples"' + b" " * wire.MAX_LINE, "line_too_long"),
]


@pytest.mark.parametrize("line, wanted", LINES)
def test_every_bad_line_is_refused_with_its_code(line, wanted):
    assert code(wire.parse_line, line, 3) == wanted


def test_what_float32_cannot_hold_is_a_bad_sample_not_an_error():
    line = b'{"type": "samples", "seq": 0, "x": [[1e999, 1e39, null], [1, 2, 3]]}'
    x_TC = wire.parse_line(line, 3).x_TC
    assert np.isinf(x_TC[0, :2]).all() and np.isnan(x_TC[0, 2]) and x_TC[1].tolist() == [1, 2, 3]


def stated(**fields) -> dict:
    return {"name": "amp", "sfreq": 250, "channels": ["A", "B"], "unit": "uV", "framing": "binary"} | fields


HELLOS = [
    ({"type": "hello"}, "bad_handshake"),
    ({"protocol": 2}, "bad_protocol"),
    ({"protocol": True}, "bad_protocol"),
    ({"role": "root"}, "bad_role"),
    ({"role": ["producer"]}, "bad_role"),
    ({"token": 5}, "bad_handshake"),
    ({"client_name": 5}, "bad_handshake"),
    ({"stream": None}, "bad_stream"),
    ({"stream": stated(name="")}, "bad_stream"),
    ({"stream": stated(name="a" * 65)}, "bad_stream"),
    ({"stream": stated(name="a\nb")}, "bad_stream"),
    ({"stream": stated(channels=[])}, "bad_stream"),
    ({"stream": stated(channels="AB")}, "bad_stream"),
    ({"stream": stated(channels=["A", "A"])}, "bad_stream"),
    ({"stream": stated(channels=["A", 5])}, "bad_stream"),
    ({"stream": stated(channels=[f"c{i}" for i in range(1025)])}, "bad_stream"),
    ({"stream": stated(sfreq=0)}, "bad_stream"),
    ({"stream": stated(sfreq="250")}, "bad_stream"),
    ({"stream": stated(sfreq=1e9)}, "bad_stream"),
    ({"stream": stated(sfreq=True)}, "bad_stream"),
    ({"stream": stated(unit=5)}, "bad_stream"),
    ({"stream": stated(framing="xml")}, "bad_stream"),
]


@pytest.mark.parametrize("fields, wanted", HELLOS)
def test_every_bad_handshake_is_refused_with_its_code(fields, wanted):
    hello = {"type": "handshake", "client_name": "x", "role": "producer", "protocol": 1, "stream": stated()}
    assert wire.read_handshake(wire.line(hello)).stream.channels == ("A", "B")
    assert code(wire.read_handshake, wire.line(hello | fields)) == wanted


def test_names_are_harmless_in_logs():
    shown = wire.printable("a\x1b[31m\n\ud800" + "b" * 99)
    assert len(shown) == 64 and shown.isprintable() and shown.startswith("a?[31m??b")


def test_ten_thousand_mutated_messages_are_parsed_or_malformed():
    rng = random.Random(7)
    x_TC = np.ones((4, 3), np.float32)
    binary = [
        wire.frame_samples(3, 0.1, x_TC),
        wire.frame_event(3, 0.1, "BACKGROUND"),
        wire.frame_ping(1),
        wire.frame_bye(),
    ]
    text = [wire.line_samples(3, 0.1, x_TC), wire.line_event(3, 0.1, "BACKGROUND", [1]), wire.line_ping(1),
            wire.handshake("me", "producer", "t", STREAM)]  # fmt: skip
    seen = {"parsed": 0, "malformed": 0}
    for case in range(10_000):
        data = bytearray(rng.choice(binary if case % 2 else text))
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            what = rng.randrange(4)
            if what == 0:
                data[at] = rng.randrange(256)
            elif what == 1:
                del data[at : at + rng.randrange(1, 9)]
            elif what == 2:
                data[at:at] = rng.choice(
                    [b"NaN", b"1e999", b"[[[[", b"9" * 400, b"\\ud800", b"null", b"{", b"\0\0", b"-"]
                )
            else:
                data[at : at + 4] = rng.randbytes(4)
            data = data or bytearray(b"\0")
        try:
            if case % 2:
                data = bytes(data).ljust(32, b"\0")
                header = wire.parse_header(data[:32], 3)
                assert header.payload <= wire.MAX_FRAME
                wire.parse_frame(header, data[32:].ljust(header.payload, b"\0")[: header.payload], 3)
            elif rng.random() < 0.3:
                wire.read_handshake(bytes(data))
            else:
                message = wire.parse_line(bytes(data), 3)
                assert not isinstance(message, Samples) or message.x_TC.dtype == np.float32
            seen["parsed"] += 1
        except Malformed as error:
            seen["malformed"] += 1
            json.loads(wire.error(error.code, error.sentence))
    assert min(seen.values()) > 200, seen
