"""A recorded session: what went in comes out, a torn tail is told, damage is refused, a full disk ends only the recording."""

import errno
import json
import os
import subprocess
import sys

import pytest

from lib import recorder, wire
from lib.errors import Unusable
from lib.recorder import Kind, Recorder, is_session, open_session
from tests.recipes import ROOT

STREAM = wire.Stream("amp", ("Fz", "Cz", "Pz"), 250.0, "uV", "ndjson")


def write(path, chunks: int = 50) -> list[bytes]:
    payloads = [bytes([i % 256]) * (i * 7 % 300 + 8) for i in range(chunks)]
    with Recorder(path) as log:
        log.opened(3, STREAM)
        for i, payload in enumerate(payloads):
            log.line(3, payload) if i % 5 else log.frame(3, payload[:7], payload[7:])
        log.closed(3, "bye")
    return payloads


def test_a_session_comes_back_as_it_arrived(tmp_path):
    frames = write(tmp_path / "s")
    session = open_session(tmp_path / "s")
    entries = list(session.entries())
    assert is_session(tmp_path / "s") and not session.notes and len(entries) == session.records == len(frames) + 4
    kinds = [Kind.START, Kind.OPEN, *(Kind.LINE if i % 5 else Kind.FRAME for i in range(50)), Kind.CLOSE, Kind.END]
    assert [e.kind for e in entries] == kinds and [e.data for e in entries[2:-2]] == frames
    times = [e.arrival_s for e in entries]
    assert times == sorted(times) and session.seconds == times[-1] and session.streams == {3: STREAM}


def test_wherever_the_tail_is_cut_the_rest_is_read_and_it_is_said(tmp_path):
    frames = write(tmp_path / "s", 6)
    data = (tmp_path / "s").read_bytes()
    torn = tmp_path / "torn"
    for size in range(len(recorder.MAGIC), len(data), 3):
        torn.write_bytes(data[:size])
        session = open_session(torn)
        assert session.notes and "has no end" in session.notes[-1]
        read = [e.data for e in session.entries() if e.kind in (Kind.FRAME, Kind.LINE)]
        assert read == frames[: len(read)]
        assert session.end <= size and (session.end == size) == (len(session.notes) == 1)
    torn.write_bytes(data + bytes(5_000_000))  # what some file systems leave after a power cut
    assert open_session(torn).records == 10 and "truncated: the last 5000000 bytes" in open_session(torn).notes[0]


def test_damage_before_the_tail_is_refused_wherever_it_is(tmp_path):
    write(tmp_path / "s", 6)
    data = (tmp_path / "s").read_bytes()
    bad = tmp_path / "bad"
    refused, told, places = 0, 0, range(len(recorder.MAGIC), len(data), 3)
    for place in places:
        bad.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            told += bool(open_session(bad).notes)
        except Unusable as error:
            refused += "damaged at byte" in str(error)
    assert refused + told == len(places) and refused > 0.8 * len(places)
    start = len(recorder.MAGIC)
    first = start + recorder.RECORD.size + int.from_bytes(data[start : start + 4], "little")
    bad.write_bytes(data[:start] + data[first:])  # a whole record gone
    with pytest.raises(Unusable, match="damaged at byte 8"):
        open_session(bad)


def test_what_is_no_session_is_refused(tmp_path):
    (tmp_path / "other").write_bytes(b"0       X X X X")
    assert not is_session(tmp_path / "other") and not is_session(tmp_path) and not is_session(tmp_path / "none")
    for path, words in ((tmp_path / "other", "no recorded session"), (tmp_path / "none", "No such file")):
        with pytest.raises(Unusable, match=words):
            open_session(path)
    with pytest.raises(Unusable, match="never overwritten"):
        Recorder(tmp_path / "other")
    with pytest.raises(Unusable, match="name a file that can be written"):
        Recorder(tmp_path / "no" / "folder")


PROGRAM = """
import sys
from lib.recorder import Recorder
log, i = Recorder(sys.argv[1]), 0
while True:
    log.frame(0, i.to_bytes(4, "little") * 100)
    i += 1
    if i % 1000 == 0:
        print(i, log.totals()["records"], flush=True)
"""


def test_a_killed_recorder_leaves_everything_but_its_last_moments(tmp_path):
    path = tmp_path / "s"
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            written = int(line.split()[1])
            if written > 2000:
                break
        process.kill()
    session = open_session(path)
    numbers = [int.from_bytes(e.data[:4], "little") for e in session.entries() if e.kind == Kind.FRAME]
    assert "has no end" in session.notes[-1]
    losses = [json.loads(e.data)["records"] for e in session.entries() if e.kind == Kind.LOST]
    assert len(numbers) >= written - 1 and (losses or numbers == list(range(len(numbers))))


def test_a_full_disk_ends_the_recording_and_nothing_else(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    log = Recorder(tmp_path / "s")
    log.closed(0, "x")
    full = open("/dev/full", "wb", buffering=0)
    log._file, kept = full, log._file
    for _ in range(100):
        log.closed(0, "y" * 100)
    totals = log.close()
    kept.close()
    assert os.strerror(errno.ENOSPC) in totals["error"]
    log.closed(0, "z")
    assert log.close()["lost"] >= 1


def test_a_disk_too_slow_loses_records_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "MOST_WAITING", 1000)
    log = Recorder(tmp_path / "s")
    with log._news:  # the writer can't take anything meanwhile: the lock is reentrant for this thread only
        for _ in range(20):
            log.closed(0, "y" * 100)
    log.closed(0, "after")
    lost = log.close()["lost"]
    session = open_session(tmp_path / "s")
    assert lost >= 10 and sum(e.kind == Kind.LOST for e in session.entries()) == 1
    assert f"{lost} records were lost" in session.notes[0]
    assert [e.data for e in session.entries()][-2] == b"after"
