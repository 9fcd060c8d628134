"""
A served session on disk: every frame as it arrived, appended as it comes, so that it can be replayed bit for bit.

The file is the 8 bytes MAGIC and then records, little-endian: 24 bytes `<IIB3xId`, and the payload.

    length u32      bytes of payload, at most MOST_BYTES
    check u32       CRC-32 of the rest of the record (kind … payload), continued from the record before: none can be missing
    kind u8         see Kind; then 3 zero bytes
    stream u32      which producer's: counted by the service
    arrival f64     seconds since the recording began, monotonic
    payload         `start`, `end`, `lost`: JSON; `open`: what the producer announced, as JSON; `close`: why, as text;
                    `frame`, `line`: what it sent, byte for byte, in the framing it announced

A process that dies leaves at most a torn last record, and a machine that does at most the last second: reading stops before it and says
so. Damage anywhere else is refused.
"""

import contextlib
import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path

from lib import wire
from lib.errors import Unusable

MAGIC = b"BERGER1\n"
RECORD = struct.Struct("<IIB3xId")
MOST_BYTES = 1 << 21  # of a payload; a frame has at most half of it
MOST_WAITING = 1 << 26  # bytes in memory that the disk has not taken yet; more is lost, counted, and said in the file
SYNC_S = 1.0  # how much a machine that loses power may take along


class Kind(IntEnum):
    """What a record holds."""

    START, OPEN, FRAME, LINE, CLOSE, LOST, END = range(7)


class Recorder:
    """
    Appends a session to a new file, from any thread, without ever waiting for the disk: a thread of its own writes.

    Raises Unusable: the file exists or can't be made. A disk that fails later ends the recording, not the session: see `error`.
    """

    def __init__(self, path: Path | str):
        self.path, self.error, self.lost, self.records, self.bytes = Path(path), None, 0, 0, 0
        try:
            self._file = open(self.path, "xb", buffering=0)
        except FileExistsError:
            raise Unusable(
                f"--record {path} exists: name a new file, a recorded session is never overwritten"
            ) from None
        except OSError as error:
            raise Unusable(f"--record {path}: {error.strerror}: name a file that can be written") from error
        self._began = time.monotonic()
        self._queue: list[tuple[int, int, float, bytes]] = []
        self._waiting, self._unsaid, self._closing, self._check = 0, 0, False, 0
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()
        self._put(Kind.START, 0, _json({"format": 1, "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}))

    def opened(self, stream: int, announced: wire.Stream) -> None:
        """A producer has come: `stream` is its number, another one each time it comes."""
        self._put(Kind.OPEN, stream, _json(asdict(announced)))

    def frame(self, stream: int, *pieces: bytes) -> None:
        """A binary frame, header and payload, in any number of pieces."""
        self._put(Kind.FRAME, stream, b"".join(pieces))

    def line(self, stream: int, line: bytes) -> None:
        """A line of NDJSON, its end included."""
        self._put(Kind.LINE, stream, bytes(line))

    def closed(self, stream: int, reason: str) -> None:
        """A producer has gone."""
        self._put(Kind.CLOSE, stream, reason.encode())

    def close(self) -> dict:
        """Write out what waits, and return the totals; later calls only return them."""
        if not self._closing:
            self._put(Kind.END, 0, _json({"records": self.records, "lost": self.lost}))
            with self._news:
                self._closing = True
                self._news.notify()
        self._thread.join()
        return self.totals()

    def totals(self) -> dict:
        """What is on disk, what was lost, and the error that ended it, if one did."""
        return {
            "path": str(self.path),
            "records": self.records,
            "bytes": self.bytes,
            "lost": self.lost,
            "error": self.error,
        }

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _put(self, kind: int, stream: int, payload: bytes) -> None:
        with self._news:
            if self.error or self._closing or self._waiting + len(payload) > MOST_WAITING or len(payload) > MOST_BYTES:
                self.lost += 1
                self._unsaid += 1
                return
            if self._unsaid:
                unsaid, self._unsaid = self._unsaid, 0
                self._enqueue(Kind.LOST, 0, _json({"records": unsaid}))
            self._enqueue(kind, stream, payload)

    def _enqueue(self, kind: int, stream: int, payload: bytes) -> None:
        self._queue.append((kind, stream, time.monotonic() - self._began, payload))
        self._waiting += len(payload)
        if len(self._queue) == 1:
            self._news.notify()

    def _write(self) -> None:
        synced, dirty = time.monotonic(), False
        with contextlib.closing(self._file):
            self._append(MAGIC)
            while not self.error:
                with self._news:
                    if not self._queue and not self._closing:
                        self._news.wait(SYNC_S)
                    batch, self._queue = self._queue, []
                    closing = self._closing
                    self._waiting = 0
                if batch:
                    self._append(b"".join(map(self._record, batch)))
                    self.records += len(batch)
                    dirty = True
                if dirty and not self.error and (closing or time.monotonic() - synced >= SYNC_S):
                    self._sync()
                    synced, dirty = time.monotonic(), False
                if closing and not batch:
                    return

    def _record(self, item: tuple[int, int, float, bytes]) -> bytes:
        kind, stream, arrival_s, payload = item
        body = RECORD.pack(0, 0, kind, stream, arrival_s)[8:] + payload
        self._check = zlib.crc32(body, self._check)
        return struct.pack("<II", len(payload), self._check) + body

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
            self.bytes += len(data)
        except OSError as error:
            self.error = f"recording ended: {error.strerror}"

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self.error = f"recording ended: {error.strerror}"


@dataclass(frozen=True)
class Entry:
    """One record of a session."""

    kind: Kind
    stream: int
    arrival_s: float
    data: bytes


@dataclass
class Session:
    """A recorded session that has been verified to its end."""

    path: Path
    streams: dict[int, wire.Stream] = field(default_factory=dict)  # what each producer announced
    records: int = 0
    seconds: float = 0.0
    end: int = 0  # bytes that are whole
    notes: list[str] = field(default_factory=list)

    def entries(self) -> Iterator[Entry]:
        """Its records in order of arrival, read as they are asked for."""
        with self.path.open("rb") as file:
            file.seek(len(MAGIC))
            while file.tell() < self.end:
                length, _, kind, stream, arrival_s = RECORD.unpack(file.read(RECORD.size))
                yield Entry(Kind(kind), stream, arrival_s, file.read(length))


def is_session(path: Path | str) -> bool:
    """Whether a file is a recorded session, by its first bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_session(path: Path | str) -> Session:
    """Verify a recorded session, byte by byte. Raises Unusable: not one, or damaged before its end."""
    session, ended = Session(Path(path)), False
    try:
        size = session.path.stat().st_size
        with session.path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise Unusable(f"{path} is no recorded session: it doesn't begin with {MAGIC!r}")
            session.end, check = len(MAGIC), 0
            while session.end < size:
                head = file.read(RECORD.size)
                whole = len(head) == RECORD.size
                length, stated, kind, stream, arrival_s = RECORD.unpack(head) if whole else (0, 0, 0, 0, 0.0)
                payload = file.read(length) if whole and length <= MOST_BYTES else b""
                found = zlib.crc32(payload, zlib.crc32(head[8:], check))
                if not whole or len(payload) < length or found != stated or kind not in set(Kind):
                    session.notes.append(_torn(file, session.end, size, length))
                    break
                check, session.end = stated, session.end + RECORD.size + length
                session.records, session.seconds = session.records + 1, arrival_s
                ended = kind == Kind.END
                if kind == Kind.OPEN:
                    announced = json.loads(payload)
                    session.streams[stream] = wire.Stream(**{**announced, "channels": tuple(announced["channels"])})
                elif kind == Kind.LOST:
                    session.notes.append(
                        f"{json.loads(payload)['records']} records were lost at {arrival_s:.1f} s: the disk was too slow"
                    )
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from error
    if not ended:
        session.notes.append(f"{session.path.name} has no end: what recorded it was killed, or is still at it")
    return session


def _torn(file, start: int, size: int, length: int) -> str:
    """What to say of a tail that can't be read: a write that was cut short, or zeros. Raises Unusable for any other damage."""
    cut = size - start < RECORD.size or start + RECORD.size + length > size
    short = size - start <= RECORD.size + MOST_BYTES
    if not (cut and short and length <= MOST_BYTES):
        file.seek(start)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise Unusable(
                    f"{file.name} is damaged at byte {start} of {size}: restore it from a copy, it can't be replayed"
                )
    return f"truncated: the last {size - start} bytes of {Path(file.name).name} are not whole and left out"


def _json(value: dict) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
