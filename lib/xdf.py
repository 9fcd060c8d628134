"""
Recorded LSL sessions (`.xdf`): the EEG stream on its own clock, with the events of all marker streams.

Stamps are synchronised by pyxdf, but not dejittered: it smooths over gaps of up to 500 samples, which lib/timestamps.py finds.
"""

import logging
from pathlib import Path

import numpy as np
import pyxdf

from lib import channels
from lib.errors import Rejected
from lib.recordings import Event, ReadSpec, Recording, code_events, code_label
from lib.statements import ARBITRARY, settle_channels, settle_rate, settle_unit
from lib.timestamps import read_clock

MARKER_WORDS = ("marker", "event", "stim", "trigger")
NOMINAL_TOLERANCE = 0.01  # a nominal rate further than this from the measured one is not the rate


def open_xdf(path: Path, spec: ReadSpec) -> Recording:
    """
    Opens the EEG stream of an XDF file.

    Raises Rejected: `no_eeg_stream`, `ambiguous_stream`, `channels_missing`, `channels_conflict`, and for time stamps, rate and unit.
    """
    logging.getLogger("pyxdf").setLevel(logging.CRITICAL)  # it speaks of its own doings; losses are noted below
    streams, _ = pyxdf.load_xdf(path, dejitter_timestamps=False)
    notes = [f"empty stream ignored: {_field(s, 'name')}" for s in streams if not len(s["time_stamps"])]
    eeg = _eeg_stream(path, [s for s in streams if len(s["time_stamps"])], spec)
    x_TC = np.asarray(eeg["time_series"])
    stated = _footer_count(eeg)
    if stated is not None and stated > len(x_TC):
        notes.append(f"truncated: {len(x_TC)} of {stated} samples of the EEG stream could be read")
    described = _described(eeg)
    labels = [c.get("label", "") for c in described]
    names, columns = settle_channels(labels if any(labels) else [], spec.channels, x_TC.shape[1], path.name)
    about = [described[i] if described else {} for i in columns]
    kinds = [_kind(channel, name) for channel, name in zip(about, names, strict=True)]
    units = [
        settle_unit(channel.get("unit"), spec.unit, path.name) if kind in ("eeg", "unknown") else ("uV", 1.0)
        for channel, kind in zip(about, kinds, strict=True)  # the others are read as they are
    ]
    factor_C = np.array([factor for _, factor in units], np.float32)

    clock = read_clock(eeg["time_stamps"], path.name)
    rate_hz = _rate(path, float(_field(eeg, "nominal_srate") or 0), clock.rate_hz, spec, notes)
    segments = clock.segments(rate_hz)
    events = []
    for stream in streams:
        if stream is not eeg and _is_markers(stream):
            onsets_s = clock.onsets_s(stream["time_stamps"], rate_hz)
            events += [Event(t, 0.0, *_label(value)) for t, value in zip(onsets_s, stream["time_series"], strict=True)]
    end_s = segments[-1].onset_s + (segments[-1].stop - segments[-1].start) / rate_hz
    kept = [e for e in events if 0 <= e.onset_s < end_s and e.label]
    if len(kept) < len(events):
        notes.append(f"{len(events) - len(kept)} events outside the EEG or empty")
    for i, kind in zip(columns, kinds, strict=True):
        kept += code_events(x_TC[:, i], rate_hz, segments) if kind == "stim" else []
    return Recording(
        path=path,
        names=names,
        kinds=kinds,
        rates_hz=[rate_hz] * len(names),
        unit=ARBITRARY if spec.unit == ARBITRARY else "uV",
        samples=len(x_TC),
        segments=segments,
        take=lambda indices: x_TC[:, [columns[i] for i in indices]].T.astype(np.float32) * factor_C[indices][:, None],
        events=sorted(kept, key=lambda e: e.onset_s),
        notes=notes,
    )


def _field(stream: dict, name: str) -> str:
    return str((stream["info"].get(name) or [""])[0] or "").strip()


def _described(stream: dict) -> list[dict[str, str]]:
    """label, type and unit of every channel as the stream's description has them; empty if it has none."""
    description = (stream["info"].get("desc") or [None])[0] or {}
    table = (description.get("channels") or [None])[0] or {}
    listed = table.get("channel", [])
    return [{key: str(value[0] or "").strip() for key, value in channel.items() if value} for channel in listed]


def _footer_count(stream: dict) -> int | None:
    footer = stream.get("footer", {}).get("info", {})
    return int(footer["sample_count"][0]) if footer.get("sample_count") else None


def _is_markers(stream: dict) -> bool:
    if _field(stream, "channel_format") == "string":
        return True
    words = f"{_field(stream, 'type')} {_field(stream, 'name')}".lower()
    return _field(stream, "channel_count") == "1" and any(word in words for word in MARKER_WORDS)


def _label(value) -> tuple[str, float]:
    """(label, value) of one sample of a marker stream."""
    if isinstance(value, list | tuple):
        return " ".join(str(v).strip() for v in value if str(v).strip()), float("nan")
    code = float(np.ravel(value)[0])
    return (code_label(code), code) if code else ("", code)


def _kind(described: dict[str, str], name: str) -> str:
    """What a channel records: by its name or, where that says nothing, by its described type."""
    kind = channels.kind(name)
    declared = described.get("type", "").lower()
    return declared if kind == "unknown" and declared in ("eeg", "eog", "ecg", "emg", "stim", "misc") else kind


def _eeg_stream(path: Path, streams: list[dict], spec: ReadSpec) -> dict:
    """The stream to read: of type EEG, and the one that has the stated channels where there are several."""
    numeric = [s for s in streams if _field(s, "channel_format") != "string"]
    found = [s for s in numeric if _field(s, "type").lower() == "eeg"]
    if spec.channels and len(found) != 1:
        found = [s for s in found or numeric if set(spec.channels) <= {c.get("label") for c in _described(s)}]
    listed = [f"{_field(s, 'name')} ({_field(s, 'type')}, {len(s['time_stamps'])} samples)" for s in streams]
    holds = f"{path.name} holds {', '.join(listed) or 'nothing'}"
    if not found:
        raise Rejected("no_eeg_stream", f"{holds}: no stream of type EEG with samples")
    if len(found) > 1:
        raise Rejected("ambiguous_stream", f"{holds}: state channels in dataset.toml to pick a stream")
    return found[0]


def _rate(path: Path, nominal_hz: float, measured_hz: float, spec: ReadSpec, notes: list[str]) -> float:
    """The nominal rate where the stamps bear it out; where they don't, or there is none, the measured one."""
    if nominal_hz > 0 and abs(nominal_hz - measured_hz) <= NOMINAL_TOLERANCE * measured_hz:
        return settle_rate(nominal_hz, spec.rate_hz, path.name)
    if nominal_hz > 0:
        notes.append(f"wrong nominal rate: {nominal_hz:g} Hz, time stamps say {measured_hz:.2f} Hz")
    return settle_rate(round(measured_hz, 2), spec.rate_hz, path.name, NOMINAL_TOLERANCE)
