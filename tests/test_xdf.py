"""Recorded LSL sessions written by hand, chunk by chunk: two clocks, gaps, bursts, empty streams; and the real ones."""

import struct
from pathlib import Path

import numpy as np
import pytest

from lib.errors import Rejected
from lib.recordings import ReadSpec, open_recording
from lib.timestamps import read_clock

RATE = 200


def chunk(tag: int, content: bytes) -> bytes:
    return b"\x04" + struct.pack("<IH", len(content) + 2, tag) + content


def channel_table(channels) -> str:
    rows = "".join(f"<channel><label>{n}</label><unit>{u}</unit><type>EEG</type></channel>" for n, u in channels)
    return f"<desc><channels>{rows}</channels></desc>"


def stream(
    number: int, name: str, kind: str, rate: float, stamps, values, offset_s: float = 0.0, channels=()
) -> list[bytes]:
    """Header, clock offsets, samples and footer of one stream, whose clock is `offset_s` behind the recorder's."""
    texts = isinstance(values, list)
    width = 1 if texts else values.shape[1]
    header = f"""<?xml version="1.0"?><info><name>{name}</name><type>{kind}</type><channel_count>{width}</channel_count>
        <nominal_srate>{rate}</nominal_srate><channel_format>{"string" if texts else "float32"}</channel_format>
        {channel_table(channels) if channels else "<desc/>"}</info>"""
    content = struct.pack("<IBI", number, 4, len(stamps))
    for stamp, value in zip(stamps, values, strict=True):
        data = b"\x04" + struct.pack("<I", len(value)) + value.encode() if texts else value.astype("<f4").tobytes()
        content += b"\x08" + struct.pack("<d", stamp) + data
    footer = f"<info><sample_count>{len(stamps)}</sample_count></info>"
    clock = [chunk(4, struct.pack("<Idd", number, t, offset_s)) for t in np.arange(0, 60, 5.0) + 1000 - offset_s]
    parts = [chunk(2, struct.pack("<I", number) + header.encode()), *clock]
    return [
        *parts,
        *([chunk(3, content)] if len(stamps) else []),
        chunk(6, struct.pack("<I", number) + footer.encode()),
    ]


def xdf(path: Path, *streams: list[bytes]) -> Path:
    path.write_bytes(b"XDF:" + b"".join([chunk(1, b"<info><version>1.0</version></info>"), *sum(streams, [])]))
    return path


@pytest.fixture
def x_TC() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 20, (20 * RATE, 3)).astype(np.float32)


EEG = [("Fp1", "microvolts"), ("Cz", "microvolts"), ("Oz", "uV")]


def code(path: Path, **spec) -> str:
    with pytest.raises(Rejected) as refusal:
        open_recording(path, ReadSpec(**spec))
    return refusal.value.code


def test_markers_of_another_clock_and_a_gap(tmp_path, x_TC):
    t_T = 1000 + np.arange(len(x_TC)) / RATE
    t_T[2000:] += 7.0
    happened = [
        1000 + 2.0,
        1000 + 10.0 + 3.5,
        1000 + 17.0 + 1.0,
        1000 + 900.0,
    ]  # inside, in the gap, after it, after the end
    path = xdf(
        tmp_path / "a.xdf",
        stream(1, "amp", "EEG", RATE, t_T, x_TC, channels=EEG),
        stream(2, "keys", "Markers", 0, np.array(happened) - 500.0, ["start", "pause", "stop", "late"], offset_s=500.0),
        stream(3, "spare", "EEG", RATE, [], np.zeros((0, 3), np.float32), channels=EEG),
    )
    recording = open_recording(path)
    assert recording.names == ["Fp1", "Cz", "Oz"] and recording.rates_hz == [RATE] * 3 and recording.unit == "uV"
    assert np.array_equal(recording.read([2, 0]), x_TC.T[[2, 0]])
    assert [(s.start, s.stop) for s in recording.segments] == [(0, 2000), (2000, 4000)]
    assert [s.onset_s for s in recording.segments] == pytest.approx([0, 17.0])
    assert [e.label for e in recording.events] == ["start", "pause", "stop"]
    assert [e.onset_s for e in recording.events] == pytest.approx([2.0, 13.5, 18.0], abs=1e-3)
    assert any("spare" in note for note in recording.notes) and any(
        "1 events outside" in note for note in recording.notes
    )


def test_units_rates_and_channels(tmp_path, x_TC):
    t_T = 1000 + np.arange(len(x_TC)) / RATE
    volts = xdf(
        tmp_path / "volts.xdf", stream(1, "amp", "EEG", RATE, t_T, x_TC * 1e-6, channels=[(n, "volts") for n, _ in EEG])
    )
    assert np.allclose(open_recording(volts).read([0]), x_TC.T[:1], atol=1e-3)
    assert code(volts, unit="uV") == "unit_conflict" and code(volts, rate_hz=250) == "rate_conflict"
    assert code(volts, channels=("C3", "C4", "Cz")) == "channels_conflict"  # the file says that they are others
    assert open_recording(volts, ReadSpec(channels=("Oz",))).names == ["Oz"]

    bare = xdf(tmp_path / "bare.xdf", stream(1, "amp", "EEG", RATE, t_T, x_TC))
    assert code(bare) == "channels_missing" and code(bare, channels=("Fp1", "Cz", "Oz")) == "unit_missing"
    assert open_recording(bare, ReadSpec(channels=("Fp1", "Cz", "Oz"), unit="uV")).names == ["Fp1", "Cz", "Oz"]
    odd = xdf(tmp_path / "odd.xdf", stream(1, "amp", "EEG", RATE, t_T, x_TC, channels=[(n, "counts") for n, _ in EEG]))
    assert code(odd) == "unit_unknown"
    assert open_recording(odd, ReadSpec(unit="a.u.")).unit == "a.u."

    wrong = xdf(tmp_path / "wrong.xdf", stream(1, "amp", "EEG", 250, t_T, x_TC, channels=EEG))
    recording = open_recording(wrong)
    assert recording.rates_hz[0] == pytest.approx(200, rel=1e-4) and any(
        "wrong nominal rate: 250" in n for n in recording.notes
    )
    none = xdf(tmp_path / "none.xdf", stream(1, "amp", "EEG", 0, t_T, x_TC, channels=EEG))
    assert open_recording(none).rates_hz[0] == pytest.approx(200, rel=1e-4)


def test_which_stream(tmp_path, x_TC):
    t_T = 1000 + np.arange(len(x_TC)) / RATE
    two = xdf(
        tmp_path / "two.xdf",
        stream(1, "left", "EEG", RATE, t_T, x_TC, channels=EEG),
        stream(2, "right", "EEG", RATE, t_T, -x_TC, channels=[("C3", "uV"), ("C4", "uV"), ("Pz", "uV")]),
    )
    assert code(two) == "ambiguous_stream"
    assert np.array_equal(open_recording(two, ReadSpec(channels=("C4",))).read([0])[0], -x_TC[:, 1])
    assert code(xdf(tmp_path / "none.xdf", stream(1, "x", "Accelerometer", RATE, t_T, x_TC))) == "no_eeg_stream"


def test_a_recording_that_broke_off(tmp_path, x_TC):
    t_T = 1000 + np.arange(len(x_TC)) / RATE
    halves = [stream(1, "amp", "EEG", RATE, t_T[a:b], x_TC[a:b], channels=EEG) for a, b in ((0, 2000), (2000, 4000))]
    whole = xdf(
        tmp_path / "a.xdf", halves[0][:-1] + [halves[1][-2], halves[0][-1].replace(b"2000", b"4000")]
    ).read_bytes()
    assert open_recording(tmp_path / "a.xdf").samples == 4000
    at = whole.index(halves[1][-2])
    (tmp_path / "b.xdf").write_bytes(whole[:at] + b"\0" * 64 + halves[0][-1].replace(b"2000", b"4000"))
    (tmp_path / "c.xdf").write_bytes(whole[: at + 1000])
    for name in ("b.xdf", "c.xdf"):
        recording = open_recording(tmp_path / name)
        assert recording.samples == 2000 and np.array_equal(recording.read([0])[0], x_TC[:2000, 0])


@pytest.mark.parametrize("rate", [128, 256, 1000])
@pytest.mark.parametrize("kind", ["exact", "rounded to ms", "in bursts", "jittering"])
def test_gaps_are_told_from_late_deliveries(rate, kind):
    rng = np.random.default_rng(1)
    index = np.arange(rate * 100)
    t_T = index / rate
    gaps = [(rate * 30, 0.4), (rate * 60, 3.0)]
    for start, length_s in gaps:
        t_T[start:] += length_s
    if kind == "rounded to ms":
        t_T = np.round(t_T, 3)
    if kind == "in bursts":  # of 16 samples, stamped on arrival, which is sometimes half a second late
        arrival = index // 16 * 16 + 15
        held_up = rng.random(len(index) // 16 + 1) < 0.01
        for start, _ in gaps:
            held_up[(start - rate) // 16 : (start + rate) // 16] = False
        t_T = t_T[np.minimum(arrival, len(index) - 1)] + index % 16 * 1e-6 + 0.5 * held_up[index // 16]
    if kind == "jittering":
        t_T += rng.normal(0, 1.0 / rate, len(index))
    clock = read_clock(1.5e9 + t_T, "test")
    assert clock.rate_hz == pytest.approx(rate, rel=1e-3)
    assert len(clock.pieces) == 3
    for (start, _, first_s), (expected, length_s), before in zip(clock.pieces[1:], gaps, (0.0, 0.4), strict=True):
        assert abs(start - expected) <= 16
        assert first_s - clock.pieces[0][2] == pytest.approx(start / rate + before + length_s, abs=0.2)


def test_time_must_go_forward():
    t_T = np.arange(1000) / 250
    for bad_T, word in (
        (np.where(np.arange(1000) < 500, t_T, t_T - 100), "time_order"),
        (t_T[::-1], "time_order"),
        (np.where(np.arange(1000) == 7, np.nan, t_T), "time_stamps"),
    ):
        with pytest.raises(Rejected) as refusal:
            read_clock(bad_T, "test")
        assert refusal.value.code == word


def test_real_sessions(data_dir):
    folder = data_dir / "xdf"
    recording = open_recording(folder / "ssvep_example.xdf")  # wireless, in bursts up to 0.18 s late, nothing lost
    assert recording.names[:3] == ["S2", "F4", "C4"] and set(recording.rates_hz) == {300}
    assert len(recording.segments) == 1 and len(recording.events) == 258
    assert recording.events[0].label == "Trial Started" and recording.events[0].onset_s == pytest.approx(15.75, abs=0.1)
    assert 5 < np.median(recording.read(range(7)).std(axis=1)) < 200

    recording = open_recording(folder / "switch_example.xdf")
    assert len(recording.names) == 16 and set(recording.rates_hz) == {256} and len(recording.segments) == 1
    assert {e.label for e in recording.events} >= {"Trial Started", "switch,3,1,2", "ping"}

    spec = ReadSpec(unit="uV", channels=tuple("ABCDEFGH"))
    recording = open_recording(folder / "clock_resets.xdf", spec)  # nominally 100 Hz, but stamps every 10.8 ms
    assert recording.rates_hz[0] == pytest.approx(92.9, abs=0.1) and len(recording.events) == 175
    assert [(s.start, s.stop) for s in recording.segments] == [(0, 12876), (12876, 27815)]
    assert recording.segments[1].onset_s == pytest.approx(412.4, abs=1)  # a break of 274 s, found through the reset
    assert code(folder / "empty_streams.xdf") == "no_eeg_stream"
    assert code(folder / "minimal.xdf") == "channels_missing"
