"""
Replays a recording into the service: any file that the cache builder reads, with its events, or a session that --record has kept.

A recording's sample i is sent with seq = i, counted in recording time: what is missing between its segments is missing in seq too, so
that the service sees the gap. Events are those that a cache of it would have, each sent before the chunk that holds its sample.

Shapes: T samples, C channels.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib import channels, manifest, recordings, wire
from lib.errors import Rejected, Unusable
from lib.producer import Pace, Producer, acknowledged, chunk_samples, reaching
from lib.recorder import Entry, Kind, Session, is_session, open_session
from lib.recordings import ReadSpec
from lib.sources import Source, discover


@dataclass
class Material:
    """A recording, ready to be sent."""

    stream: wire.Stream
    pieces: list[tuple[int, np.ndarray]]  # seq of the first sample, x_TC float32
    events: list[wire.Event]  # in order of seq
    notes: list[str] = field(default_factory=list)

    def chunks(self, samples: int) -> Iterator[wire.Samples | wire.Event]:
        """What is sent, in order: chunks of `samples`, fewer at the end of a piece, each after the events within it."""
        events = iter([*self.events, None])
        event = next(events)
        for first, x_TC in self.pieces:
            for start in range(0, len(x_TC), samples):
                part_TC = x_TC[start : start + samples]
                stop = first + start + len(part_TC)
                while event and event.seq < stop:
                    yield event
                    event = next(events)
                yield wire.Samples(first + start, stop / self.stream.rate_hz, part_TC)


def run(
    path: Path | str, address: tuple[str, int], speed: float = 1.0, name: str | None = None, framing: str = "binary",
    chunk: int = 0, token: str | None = None, tls: str | None = None, spec: ReadSpec = ReadSpec(),  # noqa: B008  frozen
) -> dict:  # fmt: skip
    """
    Send a recording or a recorded session to the service at `address`, and return what was sent once all of it is worked off.

    `speed` 1 is real time, 20 twenty times that, 0 as fast as the service acknowledges. `chunk` samples go together; 0: 40 ms.
    Raises Unusable: the file can't be read, the service can't be reached or refuses; Failed: the connection was lost.
    """
    if not speed >= 0 or chunk < 0:
        raise Unusable(
            f"--speed {speed:g} and --chunk {chunk} can't be negative; 0 is as fast as acknowledged, and 40 ms"
        )
    with reaching(address):
        if is_session(path):
            return play_session(open_session(path), address, speed, token, tls)
        material = read(path, name, framing, spec)
        return play(material, address, speed, chunk, token, tls)


def read(path: Path | str, name: str | None = None, framing: str = "binary", spec: ReadSpec = ReadSpec()) -> Material:  # noqa: B008
    """Open a recording as the cache builder does: its EEG channels by their canonical names, and its events. Raises Unusable."""
    source = _source(path, spec)
    try:
        recording = recordings.open_recording(source.path, source.spec)
        picked = channels.select(
            recording.names,
            recording.kinds,
            "all",
            stated=source.spec.channels is not None,
            identical=lambda a, b: np.array_equal(recording.read([a]), recording.read([b])),
        )
        rates = sorted({recording.rates_hz[i] for i in picked.indices})
        if len(rates) > 1:
            raise Rejected("mixed_rates", f"channels are sampled at {', '.join(f'{r:g}' for r in rates)} Hz")
        x_CT = recording.read(picked.indices)
        pieces = _pieces(recording, x_CT, rates[0])
        stop = pieces[-1][0] + len(pieces[-1][1])
        events, remarks = _events(source, recording, rates[0], stop)
    except Rejected as error:
        raise Unusable(f"{path}: {error.reason} ({error.code})") from error
    stream = wire.Stream(wire.printable(name or source.path.name), picked.names, rates[0], recording.unit, framing)
    return Material(stream, pieces, events, [*recording.notes, *remarks])


def _source(path: Path | str, spec: ReadSpec) -> Source:
    """The one recording that `path` is, with its label files and what a dataset.toml beside it states."""
    if not Path(path).exists():
        raise Unusable(f"--replay {path}: there is no such file or folder")
    found = discover([path], defaults=spec)
    if found.rejected and not found.sources:
        _, _, code, reason = found.rejected[0]
        raise Unusable(f"{path}: {reason} ({code})")
    if len(found.sources) != 1:
        raise Unusable(
            f"{path} holds {len(found.sources)} recordings, such as {found.sources[0].path}: name one of them"
        )
    return found.sources[0]


def _pieces(recording: recordings.Recording, x_CT: np.ndarray, rate_hz: float) -> list[tuple[int, np.ndarray]]:
    """The uninterrupted pieces of a recording, each with the number its first sample has in recording time."""
    share = (
        x_CT.shape[1] / recording.samples
    )  # segments count samples of the first EEG channel, which may have another rate
    pieces, end = [], 0
    for segment in recording.segments:
        x_TC = np.ascontiguousarray(x_CT[:, round(segment.start * share) : round(segment.stop * share)].T)
        if len(x_TC):
            first = max(end, round(segment.onset_s * rate_hz))
            pieces.append((first, x_TC))
            end = first + len(x_TC)
    if not pieces:
        raise Rejected("no_data", "it holds no samples")
    return pieces


def _events(source: Source, recording, rate_hz: float, stop: int) -> tuple[list[wire.Event], list[str]]:
    """The events a cache would have, by the sample of the stream they apply from."""
    facts = {
        "events": [(e.onset_s, e.duration_s, e.label, e.value) for e in recording.events],
        "source_seconds": stop / rate_hz,
        "source_rate_hz": rate_hz,
        "first_sample": recording.first_sample,
        "segments": [(0, stop, 0.0)],  # recording time, in which seq counts, has no gaps
    }
    events, remarks = manifest.recording_events(source, facts, rate_hz, channel_labels=False)
    sent = []
    for event in events:
        seq = round(event.onset_s * rate_hz)
        value = None if np.isnan(event.value) else event.value
        sent.append(wire.Event(seq, seq / rate_hz, wire.printable(event.label), value))
    return [e for e in sorted(sent, key=lambda e: e.seq) if e.seq < stop and e.code], remarks


def play(
    material: Material, address: tuple[str, int], speed: float = 1.0, chunk: int = 0, token: str | None = None,
    tls: str | None = None,
) -> dict:  # fmt: skip
    """Send what `read` gave. Raises OSError and Unusable as Producer does."""
    stream = material.stream
    pace, since = Pace(speed), 0
    with Producer(address, stream, token, tls) as producer:
        for item in material.chunks(chunk_samples(chunk, stream.rate_hz, speed)):
            if isinstance(item, wire.Event):
                producer.event(*item)
                continue
            pace.wait(item.t - material.pieces[0][0] / stream.rate_hz, [producer])
            producer.samples(*item)
            since = 0 if speed else acknowledged(producer, since + len(item.x_TC))
        producer.ack()
        return {
            "stream": stream.name,
            "channels": len(stream.channels),
            "rate_hz": stream.rate_hz,
            "seconds": round(producer.samples_sent / stream.rate_hz, 3),
            "samples": producer.samples_sent,
            "events": producer.events_sent,
            "gaps": len(material.pieces) - 1,
            "late_s": round(pace.late_s, 4),
            "notes": material.notes,
        }


def play_session(
    session: Session, address: tuple[str, int], speed: float = 1.0, token: str | None = None, tls: str | None = None
) -> dict:
    """Send a recorded session as it arrived, frame by frame, every producer on a connection of its own."""
    for note in session.notes:
        print(f"{session.path.name}: {note}", file=sys.stderr)
    pace, producers, since = Pace(speed), {}, {}
    samples = events = 0
    try:
        for entry in session.entries():
            pace.wait(entry.arrival_s, producers.values())
            if entry.kind == Kind.OPEN:
                stream = session.streams[entry.stream]
                for number in [n for n, p in producers.items() if p.stream.name == stream.name]:
                    _end(producers, number)  # this one took over its stream
                producers[entry.stream], since[entry.stream] = Producer(address, stream, token, tls), 0
            elif entry.kind in (Kind.FRAME, Kind.LINE) and entry.stream in producers:
                producer = producers[entry.stream]
                item = _item(entry, len(producer.stream.channels))
                if isinstance(item, wire.Samples | wire.Event):  # pings and byes are ours to send
                    producer.raw(entry.data)
                if isinstance(item, wire.Samples):
                    samples, new = samples + len(item.x_TC), since[entry.stream] + len(item.x_TC)
                    since[entry.stream] = 0 if speed else acknowledged(producer, new)
                events += isinstance(item, wire.Event)
            elif entry.kind == Kind.CLOSE:
                _end(producers, entry.stream)
        for number in list(producers):
            _end(producers, number)
    except wire.Malformed as error:
        raise Unusable(f"{session.path}: a frame of another service: {error.sentence} ({error.code})") from error
    finally:
        for producer in producers.values():
            producer.close()
    return {
        "stream": session.path.name,
        "streams": len(session.streams),
        "seconds": round(session.seconds, 3),
        "samples": samples,
        "events": events,
        "late_s": round(pace.late_s, 4),
        "notes": session.notes,
    }


def _end(producers: dict[int, Producer], number: int) -> None:
    """Wait until all that a producer sent has been worked off, and end it."""
    if producer := producers.pop(number, None):
        with producer:
            producer.ack()


def _item(entry: Entry, channels: int) -> wire.Samples | wire.Event | wire.Ping | wire.Bye:
    """What a recorded frame or line says. Raises Malformed."""
    if entry.kind == Kind.LINE:
        return wire.parse_line(entry.data, channels)
    header = wire.parse_header(entry.data[: wire.HEADER.size], channels)
    return wire.parse_frame(header, entry.data[wire.HEADER.size :], channels)
