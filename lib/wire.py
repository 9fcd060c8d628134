"""
The service's wire protocol as functions on bytes: no sockets, no clock. docs/realtime.md has it as tables.

Every peer's first line is a handshake (JSON). Producers then send frames, 32 bytes of little-endian header and a payload, or JSON
lines that mean the same; consumers and control clients speak JSON lines only. Whatever doesn't parse raises Malformed with a short
code, before more of it is read than its limit.

Shapes: T samples, C channels.
"""

import json
import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

PROTOCOL = 1
CLIENT_NAME = "eeg-processor"  # what the service calls itself
MAGIC = b"EEG1"
HEADER = struct.Struct("<4sBBHIIQd")  # magic, kind, flags (0), channels, samples, payload bytes, seq, t
MAX_LINE = 64 * 1024  # bytes, newline included
MAX_FRAME = 1024 * 1024  # bytes of payload
MAX_EVENT = 4096  # bytes of an event's JSON
MAX_NAME = 64  # printable characters of a name
MAX_CHANNELS = 1024
MAX_RATE_HZ = 100_000.0
MAX_SEQ = 2**53 - 1  # the largest that JSON numbers hold everywhere

ROLES = ("producer", "consumer", "control")
FRAMINGS = ("binary", "ndjson")


class Kind(IntEnum):
    """What a frame holds."""

    samples = 1  # float32, time-major
    event = 2  # JSON: {"code": ..., "value": ...}
    ping = 3  # no payload; seq is an id, answered by a pong line once everything before it has been worked off
    bye = 4  # no payload; the producer closes


class Malformed(ValueError):
    """What a peer sent can't be used: a code for counters and the error line, a sentence for people."""

    def __init__(self, code: str, sentence: str):
        super().__init__(code, sentence)
        self.code, self.sentence = code, sentence


class Samples(NamedTuple):
    """A chunk: seq is the index of its first sample in the producer's count, t the producer's clock (s) at its last."""

    seq: int
    t: float
    x_TC: np.ndarray  # float32; NaN where a sample is missing


class Event(NamedTuple):
    """A marker that applies from sample seq on."""

    seq: int
    t: float
    code: str
    value: Any = None


class Ping(NamedTuple):
    """A request for a pong line."""

    id: int


class Bye(NamedTuple):
    """The producer says that nothing follows."""


class Header(NamedTuple):
    """A frame's header, checked."""

    kind: Kind
    samples: int
    payload: int  # bytes that follow
    seq: int
    t: float


@dataclass(frozen=True)
class Stream:
    """What a producer announces in its handshake."""

    name: str
    channels: tuple[str, ...]
    rate_hz: float
    unit: str = "uV"
    framing: str = "binary"


@dataclass(frozen=True)
class Hello:
    """A peer's handshake."""

    client_name: str
    role: str
    token: str | None = None
    stream: Stream | None = None


# ----------------------------------------------------------------------------------------------------------------------
# JSON lines


def line(message: dict) -> bytes:
    """One message as a line; ValueError for a number that isn't finite."""
    return json.dumps(message, allow_nan=False).encode() + b"\n"


def read_line(data: bytes) -> dict:
    """The JSON object of one line. Raises Malformed: NaN, Infinity and anything but an object are none."""
    if len(data) > MAX_LINE:
        raise Malformed("line_too_long", f"a line has at most {MAX_LINE} bytes")
    try:
        message = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets
        raise Malformed("bad_json", "the line is not JSON") from None
    if not isinstance(message, dict):
        raise Malformed("bad_json", "the line is not a JSON object")
    return message


def _no_constant(name: str):
    raise ValueError(name)


def error(code: str, sentence: str) -> bytes:
    """The last line a peer gets before it is cut off."""
    return line({"type": "error", "code": code, "message": sentence})


def printable(text: Any) -> str:
    """At most 64 printable characters, for logs and messages."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:MAX_NAME])


# ----------------------------------------------------------------------------------------------------------------------
# Handshake


def handshake(
    client_name: str, role: str | None = None, token: str | None = None, stream: Stream | None = None
) -> bytes:
    """A peer's first line; the service's own has nothing but its name."""
    message: dict = {"type": "handshake", "client_name": client_name}
    if role:
        message |= {"role": role, "protocol": PROTOCOL}
    if token is not None:
        message["token"] = token
    if stream:
        message["stream"] = {
            "name": stream.name,
            "sfreq": stream.rate_hz,
            "channels": list(stream.channels),
            "unit": stream.unit,
            "framing": stream.framing,
        }
    return line(message)


SERVICE_HANDSHAKE = handshake(CLIENT_NAME)


def read_handshake(data: bytes) -> Hello:
    """A peer's first line. Raises Malformed."""
    message = read_line(data)
    if message.get("type") != "handshake":
        raise Malformed("bad_handshake", 'the first line must be {"type": "handshake", ...}')
    if message.get("protocol") != PROTOCOL or isinstance(message["protocol"], bool):
        raise Malformed("bad_protocol", f'the service speaks "protocol": {PROTOCOL}')
    role, token, stream = message.get("role"), message.get("token"), message.get("stream")
    if role not in ROLES:
        raise Malformed("bad_role", f'"role" must be one of {", ".join(ROLES)}')
    if token is not None and not isinstance(token, str):
        raise Malformed("bad_handshake", '"token" must be a string')
    name = message.get("client_name", "")
    if not isinstance(name, str):
        raise Malformed("bad_handshake", '"client_name" must be a string')
    return Hello(printable(name), role, token, _stream(stream) if role == "producer" else None)


def _stream(stated: Any) -> Stream:
    if not isinstance(stated, dict):
        raise Malformed(
            "bad_stream", 'a producer announces its "stream": {"name", "sfreq", "channels", "unit", "framing"}'
        )
    name = _name(stated.get("name"), '"name" of the stream')
    channels = stated.get("channels")
    if not isinstance(channels, list) or not 1 <= len(channels) <= MAX_CHANNELS:
        raise Malformed("bad_stream", f'"channels" must be a list of 1 to {MAX_CHANNELS} names')
    channels = tuple(_name(c, "every channel") for c in channels)
    if len(set(channels)) < len(channels):
        twice = next(c for c in channels if channels.count(c) > 1)
        raise Malformed("bad_stream", f"channel {twice} is listed twice")
    rate_hz = _number(stated.get("sfreq"), "bad_stream", '"sfreq"')
    if not 0 < rate_hz <= MAX_RATE_HZ:
        raise Malformed("bad_stream", f'"sfreq" must be above 0 and at most {MAX_RATE_HZ:g} Hz')
    unit, framing = stated.get("unit", "uV"), stated.get("framing", "binary")
    if framing not in FRAMINGS:
        raise Malformed("bad_stream", f'"framing" must be one of {", ".join(FRAMINGS)}')
    return Stream(name, channels, rate_hz, _name(unit, '"unit"'), framing)


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME or not value.isprintable():
        raise Malformed("bad_stream", f"{what} must be 1 to {MAX_NAME} printable characters")
    return value


def _number(value: Any, code: str, what: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:  # an integer of hundreds of digits
            pass
    raise Malformed(code, f"{what} must be a finite number")


def _seq(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEQ:
        raise Malformed("bad_seq", f'"seq" must be an integer from 0 to {MAX_SEQ}')
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Frames


def frame_samples(seq: int, t: float, x_TC: np.ndarray) -> bytes:
    """A chunk of samples as a frame."""
    x_TC = np.ascontiguousarray(x_TC, "<f4")
    T, C = x_TC.shape
    return HEADER.pack(MAGIC, Kind.samples, 0, C, T, x_TC.nbytes, seq, t) + x_TC.tobytes()


def frame_event(seq: int, t: float, code: str, value: Any = None) -> bytes:
    """A marker as a frame."""
    payload = json.dumps({"code": code} if value is None else {"code": code, "value": value}, allow_nan=False).encode()
    return HEADER.pack(MAGIC, Kind.event, 0, 0, 0, len(payload), seq, t) + payload


def frame_ping(id: int = 0) -> bytes:
    """A request for a pong line with this id."""
    return HEADER.pack(MAGIC, Kind.ping, 0, 0, 0, 0, id, 0.0)


def frame_bye() -> bytes:
    """The producer's last frame."""
    return HEADER.pack(MAGIC, Kind.bye, 0, 0, 0, 0, 0, 0.0)


def parse_header(data: bytes, channels: int) -> Header:
    """A frame's header, against the number of channels that were announced. Raises Malformed before any payload is read."""
    magic, kind, flags, C, T, payload, seq, t = HEADER.unpack(data)
    if magic != MAGIC:
        raise Malformed("bad_magic", f"a frame begins with {MAGIC.decode()}")
    if flags:
        raise Malformed("bad_flags", "flags must be 0")
    if seq > MAX_SEQ:
        raise Malformed("bad_seq", f"seq must be at most {MAX_SEQ}")
    if not math.isfinite(t):
        raise Malformed("bad_time", "t must be a finite number")
    if kind == Kind.samples:
        if C != channels:
            raise Malformed("channel_count", f"a frame of {C} channels in a stream of {channels}")
        if payload > MAX_FRAME:
            raise Malformed("frame_too_long", f"a frame has at most {MAX_FRAME} bytes of payload")
        if not T or payload != 4 * C * T:
            raise Malformed("bad_length", f"{payload} bytes are not {T} samples of {C} float32 channels")
        return Header(Kind.samples, T, payload, seq, t)
    if kind not in (Kind.event, Kind.ping, Kind.bye):
        raise Malformed("bad_kind", f"no kind of frame is {kind}")
    if payload > (MAX_EVENT if kind == Kind.event else 0):
        raise Malformed("frame_too_long", f"an event has at most {MAX_EVENT} bytes, ping and bye none")
    if C or T:
        raise Malformed("bad_length", "only frames of samples have channels and samples")
    return Header(Kind(kind), 0, payload, seq, t)


def parse_frame(header: Header, payload: bytes, channels: int) -> Samples | Event | Ping | Bye:
    """What a frame says. Raises Malformed."""
    if header.kind == Kind.samples:
        return Samples(header.seq, header.t, parse_samples(header, payload, channels))
    if header.kind == Kind.event:
        return parse_event(header, payload)
    return Ping(header.seq) if header.kind == Kind.ping else Bye()


def parse_samples(header: Header, payload: bytes, channels: int) -> np.ndarray:
    """A view of the payload: x_TC, float32."""
    return np.frombuffer(payload, "<f4").reshape(header.samples, channels)


def parse_event(header: Header, payload: bytes) -> Event:
    """A marker. Raises Malformed."""
    message = read_line(payload)
    return Event(header.seq, header.t, _code(message.get("code")), message.get("value"))


def _code(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_SEQ:
        value = str(value)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME or not value.isprintable():
        raise Malformed("bad_event", f'"code" must be an integer or 1 to {MAX_NAME} printable characters')
    return value


# ----------------------------------------------------------------------------------------------------------------------
# The same as JSON lines


def line_samples(seq: int, t: float, x_TC: np.ndarray) -> bytes:
    """A chunk of samples as a line; samples that aren't finite become null."""
    x_TC = np.asarray(x_TC, np.float32)
    rows = x_TC.tolist()
    if not np.isfinite(x_TC).all():
        rows = [[v if math.isfinite(v) else None for v in row] for row in rows]
    return line({"type": "samples", "seq": seq, "t": t, "x": rows})


def line_event(seq: int, t: float, code: str, value: Any = None) -> bytes:
    """A marker as a line."""
    message = {"type": "event", "code": code, "seq": seq, "t": t}
    return line(message if value is None else message | {"value": value})


def line_ping(id: int = 0) -> bytes:
    """A request for a pong line with this id."""
    return line({"type": "ping", "id": id})


def line_bye() -> bytes:
    """The producer's last line."""
    return line({"type": "bye"})


def parse_line(data: bytes, channels: int) -> Samples | Event | Ping | Bye:
    """What a producer's line says. Raises Malformed."""
    message = read_line(data)
    kind = message.get("type")
    if kind == "samples":
        return Samples(_seq(message.get("seq")), _time(message), _rows(message.get("x"), channels))
    if kind == "event" and len(data) > MAX_EVENT:
        raise Malformed("line_too_long", f"the line of an event has at most {MAX_EVENT} bytes")
    if kind == "event":
        return Event(_seq(message.get("seq")), _time(message), _code(message.get("code")), message.get("value"))
    if kind == "ping":
        return Ping(_seq(message.get("id", 0)))
    if kind == "bye":
        return Bye()
    raise Malformed("bad_kind", '"type" of a producer\'s line must be samples, event, ping or bye')


def _time(message: dict) -> float:
    return _number(message.get("t", 0.0), "bad_time", '"t"')


def _rows(rows: Any, channels: int) -> np.ndarray:
    """x_TC of a list of rows; null is a missing sample. Anything but numbers is Malformed."""
    if not isinstance(rows, list) or not rows:
        raise Malformed("bad_samples", '"x" must be a list of rows, one per sample')
    try:
        x_TC = np.array(rows)
        if x_TC.dtype == object and all(v is None or type(v) in (int, float) for row in rows for v in row):
            x_TC = np.array(rows, np.float64)
    except (ValueError, TypeError, OverflowError):  # rows of several lengths or depths; integers of hundreds of digits
        raise Malformed("bad_samples", '"x" must hold rows of numbers, all of one length') from None
    if x_TC.ndim != 2 or x_TC.dtype.kind not in "iuf":
        raise Malformed("bad_samples", '"x" must hold rows of numbers, all of one length')
    if x_TC.shape[1] != channels:
        raise Malformed("channel_count", f"rows of {x_TC.shape[1]} channels in a stream of {channels}")
    with np.errstate(over="ignore"):  # what float32 can't hold is infinite, and as such a bad sample
        return x_TC.astype(np.float32)
