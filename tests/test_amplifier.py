"""The mock amplifier: the same signal whatever the chunks, its truth in the signal, and a service that goes away and comes back."""

import json
import os
import threading

import numpy as np
import pytest

from lib import amplifier, wire
from lib.amplifier import CHANNELS, CYCLE, SCRIPT, Amplifier, session
from lib.errors import Failed, Unusable
from tests.peer import Peer


def samples(seconds: float, chunk: int, seed: int = 0):
    amp, parts, events = Amplifier(seed=seed), [], []
    for item in session(amp, chunk):
        if item.seq >= seconds * 250:
            return np.concatenate(parts), events, amp
        if isinstance(item, wire.Samples):
            assert item.seq == sum(map(len, parts)) and item.t == (item.seq + len(item.x_TC)) / 250
            parts.append(item.x_TC)
        else:
            events.append(item)


def power(x_T: np.ndarray, low_hz: float, high_hz: float) -> float:
    hz = np.fft.rfftfreq(len(x_T), 1 / 250)
    return float((abs(np.fft.rfft(x_T * np.hanning(len(x_T)))) ** 2)[(hz >= low_hz) & (hz < high_hz)].mean())


def test_the_signal_depends_on_the_seed_and_not_on_the_chunks():
    x_TC, events, _ = samples(8, 10)
    for chunk in (1, 7, 4000):
        other_TC, same, _ = samples(12, chunk)
        np.testing.assert_array_equal(other_TC[: len(x_TC)], x_TC[: len(other_TC)])
        assert same[: len(events)] == events
    assert not np.array_equal(samples(2, 10, seed=1)[0], x_TC[:500])


def test_the_script_comes_first_then_the_cycle():
    _, events, _ = samples(80, 50)
    codes, lengths = [e.code for e in events], np.diff([e.seq for e in events]) / 250
    steps = [*SCRIPT, *CYCLE, *CYCLE, *CYCLE]
    assert codes == [code for _, code, _ in steps][: len(codes)] and len(codes) > len(SCRIPT) + 4
    assert lengths.tolist() == [seconds for seconds, *_ in steps][: len(lengths)]


def test_the_truth_is_in_the_signal():
    x_TC, events, amp = samples(88, 50)
    alpha = {code: [] for code in ("eyes_closed", "eyes_open")}
    for event in events:
        if event.code in alpha:
            part = x_TC[event.seq + 250 : event.seq + 2000, CHANNELS.index("O1")]  # a second to settle
            alpha[event.code].append(power(part, 8, 12) / power(part, 20, 30))
    assert min(alpha["eyes_closed"]) > 5 * max(alpha["eyes_open"])
    front_T = x_TC[:, CHANNELS.index("Fp1")]
    blinks = [seq for seq, what in amp.truth if what == "blink" and seq + 120 < len(x_TC)]
    heights = [
        front_T[seq + 60] - np.median(front_T[seq : seq + 120]) for seq in blinks
    ]  # 8 sd long, highest in the middle
    warmup = [seq for seq in blinks if 4 * 250 <= seq < 12 * 250]
    assert len(warmup) >= 4 and np.median(heights) > 100 and min(heights) > 50
    moves = [(seq, what) for seq, what in amp.truth if what in ("left", "right")]
    tilt_T = x_TC[:, CHANNELS.index("F8")] - x_TC[:, CHANNELS.index("F7")]
    assert [what for _, what in moves] == ["right", "left", "right", "left"]
    for seq, what in moves:
        assert (np.median(tilt_T[seq : seq + 250]) > 0) == (what == "right")
    assert 5 < x_TC[:500].std() < 60  # microvolts, as at a head


def test_alpha_and_blinks_on_demand():
    amp = Amplifier(("O1", "Fp1", "nowhere"), 250.0, 3)
    quiet = amp.take(1000)
    amp.close_eyes(True)
    rich = amp.take(1500)[500:]
    assert power(rich[:, 0], 8, 12) > 10 * power(quiet[:, 0], 8, 12)
    assert power(rich[:, 2], 8, 12) < 5 * power(quiet[:, 2], 8, 12)  # of an electrode whose place nobody knows
    amp.close_eyes(False)
    amp.take(1000)
    amp.blink()
    assert amp.truth[-1] == (amp.seq, "blink") and amp.take(120)[60, 1] > 100


def test_as_fast_as_acknowledged_and_at_a_rate():
    with Peer() as peer:
        totals = amplifier.run(peer.address, CHANNELS, 250.0, 6.0, 0.0, framing="ndjson", name="mock")
        assert totals["samples"] == 1500 == sum(len(c.x_TC) for c in peer.chunks())
        assert peer.hellos[0].stream == wire.Stream("mock", CHANNELS, 250.0, "uV", "ndjson")
        assert [e.code for e in peer.events()] == ["IDLE", "EYE_WARMUP_DESC", "EYE_WARMUP_BLINK"]
        totals = amplifier.run(peer.address, ("O1",), 100.0, 2.0, 200.0)
        assert totals["samples"] == 200 and totals["reconnects"] == 0
        json.dumps(totals, allow_nan=False)
    with pytest.raises(Unusable, match="start the service"):
        amplifier.run(peer.address, ("O1",), 100.0, 2.0, 0.0)
    with pytest.raises(Unusable, match="no negative"):
        amplifier.run(peer.address, ("O1",), 100.0, -1.0)


def test_a_service_that_goes_away_is_called_again_and_what_was_lost_is_told():
    with Peer() as peer:
        totals = []
        thread = threading.Thread(
            target=lambda: totals.append(amplifier.run(peer.address, ("O1", "O2"), 100.0, 60.0, 20.0)), daemon=True
        )
        thread.start()
        peer.until(lambda p: len(p.chunks()) > 5)
        peer.drop()
        peer.until(lambda p: len(p.hellos) == 2)
        thread.join(300)
    lost = 6000 - totals[0]["samples"]
    assert totals[0]["reconnects"] == 1 and totals[0]["lost"] == lost > 0
    seqs = np.concatenate([c.seq + np.arange(len(c.x_TC)) for c in peer.chunks()])
    assert (np.diff(seqs) > 0).all() and seqs[-1] == 5999


def test_a_source_ends_with_the_service_that_started_it(monkeypatch):
    with Peer() as peer:
        monkeypatch.setenv("BERGER_PARENT", str(os.getppid()))
        ended = []
        thread = threading.Thread(
            target=lambda: ended.append(pytest.raises(Failed, amplifier.run, peer.address, ("O1",), 100.0)), daemon=True
        )
        thread.start()
        peer.until(lambda p: p.chunks())
        peer.drop()
        peer.until(lambda p: len(p.hellos) == 2)  # a connection that breaks is not the end
        monkeypatch.setenv("BERGER_PARENT", "1")
        peer.drop()
        thread.join(300)
    assert "started this source is gone" in str(ended[0].value)
