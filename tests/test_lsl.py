"""The LSL bridge: stamps to sample numbers on a simulated clock, and real outlets on this machine, killed and restarted."""

import json
import subprocess
import sys
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import consumer, lsl, wire
from lib.errors import Unusable
from tests.outlet import Outlet
from tests.peer import Peer
from tests.recipes import ROOT

RATE_HZ = 250.0
CHANNELS = ("Fz", "Cz", "Pz", "O1")


def feed(stamps_T: np.ndarray, sizes, rate_hz: float = RATE_HZ):
    """Number samples by their stamps: (the Stamps, the number of each sample)."""
    stamps, out, start = lsl.Stamps(rate_hz), [], 0
    x_TC = np.arange(len(stamps_T), dtype=np.float32)[:, None]
    while start < len(stamps_T):
        stop = start + next(sizes)
        out += stamps.push(stamps_T[start:stop], x_TC[start:stop])
        start = stop
    out += stamps.flush()
    np.testing.assert_array_equal(np.concatenate([x for *_, x in out]), x_TC)  # every sample once, in order
    seq_T = np.concatenate([seq + np.arange(len(x)) for seq, _, x in out])
    assert (np.diff(seq_T) > 0).all()
    return stamps, seq_T


def sizes(rng, most: int = 20):
    while True:
        yield int(rng.integers(1, most))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([0.0, 1e-4, 2e-3, 8e-3]), st.floats(-1e-3, 1e-3), st.sampled_from([100.0, 250.0, 1000.0]),
    st.lists(st.integers(50, 5000), max_size=3),
)  # fmt: skip
def test_gaps_are_found_whatever_jitter_and_drift_and_nothing_else_is_one(seed, jitter_s, drift, rate_hz, missing):
    rng = np.random.default_rng(seed)
    number_T = np.arange(4000)
    truth = []
    for i, gap in enumerate(missing):
        gap = round(gap * rate_hz / 250) + 2 * round(jitter_s * rate_hz * 8)
        number_T[1000 * (i + 1) :] += gap
        truth.append(gap)
    stamps_T = 1e6 + number_T / (rate_hz * (1 + drift)) + jitter_s * rng.uniform(-0.5, 0.5, len(number_T))
    stamps, seq_T = feed(stamps_T, sizes(rng), rate_hz)
    found = np.diff(seq_T)
    assert stamps.counts["gaps"] == len(truth) and not stamps.counts["clock_resets"]
    slack = 1 + (0.02 + jitter_s + abs(drift) * 25) * rate_hz
    assert np.flatnonzero(found > 1).tolist() == [1000 * (i + 1) - 1 for i in range(len(truth))]
    for gap, step in zip(truth, found[found > 1], strict=True):
        assert abs(step - 1 - gap * (1 / (1 + drift))) <= slack


@pytest.mark.parametrize("held_s", [0.05, 0.3, 1.0, 3.0])
def test_what_only_came_late_is_no_gap(held_s):
    rng = np.random.default_rng(1)
    true_T = 50 + np.arange(5000) / RATE_HZ
    stamps_T = np.maximum(true_T, np.where(true_T >= 60, 60 + held_s, 0))  # stamped when sent: a hold-up from 60 s on
    stamps_T += np.arange(5000) * 1e-7 + rng.uniform(0, 1e-4, 5000)
    stamps, seq_T = feed(np.maximum.accumulate(stamps_T), sizes(rng))
    assert not stamps.counts and (np.diff(seq_T) == 1).all()


def test_a_clock_that_goes_back_makes_the_service_begin_anew():
    stamps_T = np.r_[1000 + np.arange(500) / RATE_HZ, 3 + np.arange(500) / RATE_HZ]
    stamps, seq_T = feed(stamps_T, iter([8] * 200))
    assert stamps.counts == {"clock_resets": 1} and np.diff(seq_T).max() == 1 + RATE_HZ
    assert stamps.seq_of(3 + 499 / RATE_HZ) == seq_T[-1]


@pytest.mark.parametrize("stamp", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("first, last", [(100, 101), (100, 300), (0, 9), (499, 500)])
def test_a_stamp_that_is_no_time_is_counted_and_its_sample_follows_the_one_before(first, last, stamp):
    true_T = 1000 + np.arange(500) / RATE_HZ
    stamps_T = true_T.copy()
    stamps_T[first:last] = stamp
    stamps, sent = lsl.Stamps(RATE_HZ), []
    for i in range(0, 500, 8):
        sent += stamps.push(stamps_T[i : i + 8], np.arange(500)[i : i + 8, None])
    x_T = np.concatenate([x_TC[:, 0] for *_, x_TC in sent])
    assert stamps.counts == {"impossible_stamps": last - first}
    assert x_T.tolist() == list(range(last if first == 0 else 0, 500)) and stamps.seq == len(x_T)
    np.testing.assert_allclose([t for _, t, _ in sent], [true_T[x_TC[-1, 0]] for *_, x_TC in sent], atol=1e-6)


def test_markers_belong_to_the_sample_of_their_stamp():
    stamps_T = np.r_[10 + np.arange(1000) / RATE_HZ, 15 + np.arange(1000) / RATE_HZ]
    stamps = lsl.Stamps(RATE_HZ)
    assert stamps.seq_of(10.0) is None
    stamps.push(stamps_T[:1000], np.zeros((1000, 1)))
    assert stamps.seq_of(12.0) == 500 and stamps.seq_of(12.0011) == 500 and stamps.seq_of(9.0) == -250
    assert not stamps.push(stamps_T[1000:1010], np.zeros((10, 1))) and stamps.seq_of(15.0) is None  # a gap, or late?
    sent = stamps.push(stamps_T[1010:1100], np.zeros((90, 1)))
    assert [(seq, len(x)) for seq, _, x in sent] == [(1250, 10), (1260, 90)] and stamps.seq_of(15.2) == 1300


def info(labels=CHANNELS, kinds=None, units="microvolts", rate_hz=RATE_HZ):
    n = len(labels)
    kinds, units = kinds or ["EEG"] * n, [units] * n if isinstance(units, str) else units
    return SimpleNamespace(
        channel_count=lambda: n, nominal_srate=lambda: rate_hz, get_channel_labels=lambda: labels,
        get_channel_types=lambda: kinds, get_channel_units=lambda: units,
    )  # fmt: skip


def test_what_a_stream_must_say_and_what_can_be_stated():
    layout = lsl.describe(
        info(("EEG Pz-REF", "TRIGGER", "Fz", "odd"), ["EEG", "stim", "EEG", "EEG"], ["mV", "", "uV", "uV"]), "a"
    )
    assert layout.names == ("Fz", "Pz") and layout.columns == (2, 0) and layout.factors == (1.0, 1e3)
    assert lsl.describe(info(("", "")), "a", stated=("Cz", "O2")).names == ("Cz", "O2")
    assert lsl.describe(info(units=""), "a", unit="V").factors == (1e6,) * 4
    for bad, flag in (
        (info(("", "")), "--lsl-channels"),
        (info(units=""), "--lsl-unit"),
        (info(rate_hz=0.0), "nominal rate"),
    ):
        with pytest.raises(Unusable, match=f"--lsl amp: .*{flag}"):
            lsl.describe(bad, "amp")
    assert lsl._quoted("it's") == '"it\'s"' and lsl._quoted('a "b"') == "'a \"b\"'"
    with pytest.raises(Unusable, match="both kinds of quotes"):
        lsl._quoted("""it's "b\"""")
    assert [lsl._code(v) for v in (["go"], ["a", "", "b"], [3.0], [0], [2.5])] == ["go", "a b", "3", "", "2.5"]


PROGRAM = """
import json, sys
from lib import lsl
host, port, name = "127.0.0.1", int(sys.argv[1]), sys.argv[2]
try:
    totals = lsl.run(name, (host, port), *sys.argv[3:4], going=lambda totals: totals["outlets_lost"] < 2)
    print(json.dumps(totals), file=sys.stderr, flush=True)
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
"""


class Running:
    """The bridge in a process of its own; what it says is in `said`."""

    def __init__(self, address, name: str, *markers: str):
        words = [sys.executable, "-c", PROGRAM, str(address[1]), name, *markers]
        self.process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.said, self._news = [], threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._news:
                self.said.append(line.strip())
                self._news.notify_all()

    def until(self, words: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: any(words in line for line in self.said), 300), self.said

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()


needs_pylsl = pytest.mark.skipif(find_spec("pylsl") is None, reason="needs pylsl: pip install 'pylsl>=1.18'")


@needs_pylsl
def test_an_outlet_that_is_killed_and_restarted_leaves_a_gap_and_its_markers_find_their_samples():
    name = "berger-test-amp"
    with Peer() as peer, Running(peer.address, name) as bridge:
        bridge.until("waiting for LSL stream")
        outlet = Outlet(name, "EEG", "berger-test-1", RATE_HZ, CHANNELS)
        events = Outlet(f"{name}-markers", "Markers", "berger-test-2", 0.0, ("code",))
        try:
            peer.until(lambda p: p.hellos)
            assert peer.hellos[0].stream == wire.Stream(name, ("Fz", "Cz", "Pz", "O1"), RATE_HZ)
            t0 = outlet.clock()
            for i in range(0, 400, 8):
                outlet.push(i, 8, t0 + (i + 7) / RATE_HZ)
            bridge.until("LSL markers from")
            peer.until(lambda p: sum(len(c.x_TC) for c in p.chunks()) == 400)
            events.line("consumers")
            events.mark("when", float("nan"))
            events.mark("left hand", t0 + 300 / RATE_HZ)
            peer.until(lambda p: p.events())
            outlet.kill()
            bridge.until("is lost")
            outlet = Outlet(name, "EEG", "berger-test-1", RATE_HZ, CHANNELS)
            outlet.line("consumers")
            events.mark("right", t0 + 950 / RATE_HZ)
            for i in range(900, 1300, 8):
                outlet.push(i, 8, t0 + (i + 7) / RATE_HZ)
            peer.until(lambda p: sum(len(c.x_TC) for c in p.chunks()) == 800 and len(p.events()) == 2)
            bridge.until("1 gaps, 500 samples missing")
            seq_T = np.concatenate([c.seq + np.arange(len(c.x_TC)) for c in peer.chunks()])
            x_TC = np.concatenate([c.x_TC for c in peer.chunks()])
            np.testing.assert_array_equal(seq_T, np.r_[0:400, 900:1300])
            np.testing.assert_array_equal(x_TC, seq_T[:, None] + np.arange(4) / 8)
            assert [(e.code, e.seq) for e in peer.events()] == [("left hand", 300), ("right", 950)]
            assert len(peer.hellos) == 1  # the connection to the service outlived the outlet
            outlet.kill()
            bridge.until('"samples": 800')
            assert any('"markers_without_time": 1' in line for line in bridge.said)
            assert bridge.process.wait(300) == 0
        finally:
            for one in (outlet, events):
                if one.process.poll() is None:
                    one.kill()


@needs_pylsl
def test_of_streams_with_one_name_the_source_id_chooses():
    with Peer() as peer:
        outlets = [Outlet("berger-test-twin", "EEG", f"twin-{i}", RATE_HZ, CHANNELS) for i in range(2)]
        try:
            with Running(peer.address, "berger-test-twin", "none") as bridge:
                bridge.until("name one by its source id")
            with Running(peer.address, "twin-1", "none"):
                assert peer.until(lambda p: p.hellos)[0].stream.name == "berger-test-twin"
        finally:
            for outlet in outlets:
                outlet.kill()


@needs_pylsl
@pytest.mark.slow
def test_the_service_says_which_windows_a_restarted_outlet_spoilt():
    name, reasons, news = "berger-test-served", [], threading.Condition()
    words = [
        sys.executable,
        "serve_realtime.py",
        "--listen",
        "127.0.0.1:0",
        "--lsl",
        name,
        "--start",
        "INFERENCE",
        "--sync",
    ]

    def read(line: str) -> None:
        message = json.loads(line)
        if message["type"] == "data":
            with news:
                reasons.append(message["skip_reason"].partition(":")[0])
                news.notify()

    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as service:
        host, port = json.loads(service.stdout.readline())["listen"].split(":")
        reader = threading.Thread(
            target=consumer.run, args=((host, int(port)),), kwargs={"lines": 15, "write": read}, daemon=True
        )
        reader.start()
        outlet = Outlet(name, "EEG", "berger-test-3", RATE_HZ, CHANNELS)
        t0 = outlet.clock()
        try:
            for first, windows in ((0, 7), (1500, 14)):
                outlet.line("consumers")
                for i in range(first, first + 1000, 50):
                    outlet.push(i, 50, t0 + (i + 49) / RATE_HZ)
                with news:
                    assert news.wait_for(lambda windows=windows: len(reasons) == windows, 300), reasons
                outlet.kill()
                outlet = Outlet(name, "EEG", "berger-test-3", RATE_HZ, CHANNELS)
            # windows of 250 samples every 125; the filter settles for 400
            assert reasons == [*["settling"] * 4, *["not_ready"] * 3, *["gap"] * 4, *["not_ready"] * 3]
        finally:
            outlet.kill()
            service.terminate()
            assert service.wait(300) == 0
    reader.join(300)


def test_without_pylsl_the_mend_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pylsl", None)
    with pytest.raises(Unusable, match="pip install"):
        lsl.load()
