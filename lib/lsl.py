"""
The LSL bridge: an EEG stream and the marker streams of a Lab Streaming Layer network, sent to the service as any other producer would.

A process of its own (--action lsl), so that no fault of liblsl reaches the service. LSL numbers no samples: their time stamps become seq,
so that what an outlet lost, or didn't send while it was restarted, is missing in seq, and the service resets its filters. LSL has no
authentication; by default only outlets on this machine are looked for. Needs the extra `lsl` (pylsl).

Shapes: T samples, C channels.
"""

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lib import channels, wire
from lib.errors import Rejected, Unusable
from lib.producer import Persistent, orphaned, reaching
from lib.recordings import code_label
from lib.statements import settle_channels, settle_rate, settle_unit
from lib.vitals import Seldom

SCOPES = {  # liblsl's configuration; `network` leaves it to LSLAPICFG and lsl_api.cfg
    "machine": """
[multicast]
ResolveScope = machine
[lab]
KnownPeers = {127.0.0.1}
[tuning]
WatchdogTimeThreshold = 2
WatchdogCheckInterval = 1
[log]
level = -3
""",
    "network": None,
}
WAIT_S = 0.2  # for samples, before anything else gets its turn
FIND_S = 0.5  # between two looks for marker streams
BUFFER_S = 30  # of samples that wait in the inlet while the bridge is busy

MISSING = 2.5  # samples: fewer are within what stamps are good for (as in lib/timestamps.py)
JITTERS = 6.0  # a jump must also be this many times the usual deviation
TRACK_S = 5.0  # how fast the device's own rate is followed
HOLD_S = 0.15  # samples after a jump wait this long: if they only came late, the next ones soon don't
BACK_S = 0.5  # stamps that go back by more are of another clock
RESET_S = 1.0  # what is left out in seq then, so that the service begins anew
FAR_S = 1e10  # 300 years: no clock says that


class Stamps:
    """
    From time stamps to sample numbers, as they come: a line that follows the stamps, and jumps away from it, which are gaps.

    A hold-up looks like a gap at first, so that what follows a jump is held until the stamps have stayed late for HOLD_S. A stamp that
    is no time (NaN, infinite) is replaced by what follows from the one before; samples before the first good stamp are left out.
    """

    def __init__(self, rate_hz: float):
        self.period_s, self.seq, self.counts = 1 / rate_hz, 0, Counter()
        self._due_s: float | None = None  # where the next sample's stamp should be
        self._last_s: float | None = None  # the last stamp
        self._jitter_s = 0.0
        self._held: list[tuple[np.ndarray, np.ndarray]] = []

    def push(self, stamps_T: np.ndarray, x_TC: np.ndarray) -> list[tuple[int, float, np.ndarray]]:
        """What is ready: (seq of the first sample, stamp of the last, x_TC), in order; a gap is missing in seq."""
        ready: list[tuple[int, float, np.ndarray]] = []
        stamps_T, x_TC = self._possible(stamps_T, x_TC)
        if not len(stamps_T):
            return ready
        if self._due_s is None:
            self._due_s = float(stamps_T[0])
        self._last_s = float(stamps_T[-1])
        jumps = np.flatnonzero(abs(np.diff(stamps_T) - self.period_s) > self._tolerance_s()) + 1
        for start, stop in zip([0, *jumps], [*jumps, len(stamps_T)], strict=True):
            if start < stop:
                self._take(stamps_T[start:stop], x_TC[start:stop], ready)
        return ready

    def seq_of(self, stamp: float) -> int | None:
        """The sample a marker's stamp belongs to; None while that can't be said."""
        if self._due_s is None or self._held:
            return None
        return self.seq + round((stamp - self._due_s) / self.period_s)

    def flush(self) -> list[tuple[int, float, np.ndarray]]:
        """What is held, when nothing follows for now: a jump before it was a gap."""
        ready: list[tuple[int, float, np.ndarray]] = []
        if self._held:
            self._settle(ready)
        return ready

    def _possible(self, stamps_T: np.ndarray, x_TC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stamps that are times, and their samples."""
        good_T = np.abs(stamps_T) < FAR_S
        if good_T.all():
            return stamps_T, x_TC
        self.counts["impossible_stamps"] += int((~good_T).sum())
        if self._last_s is None:
            first = int(good_T.argmax()) if good_T.any() else len(good_T)
            stamps_T, x_TC, good_T = stamps_T[first:], x_TC[first:], good_T[first:]
        place_T = np.maximum.accumulate(
            np.where(good_T, np.arange(len(good_T)), -1)
        )  # of the last good one; -1: before
        last_T = np.where(place_T < 0, self._last_s or 0.0, stamps_T[place_T])
        return last_T + self.period_s * (np.arange(len(good_T)) - place_T), x_TC

    def _tolerance_s(self) -> float:
        return max(MISSING * self.period_s, min(JITTERS * self._jitter_s, BACK_S / 2))

    def _late_T(self, stamps_T: np.ndarray) -> np.ndarray:
        ahead = sum(len(held_T) for held_T, _ in self._held)
        return stamps_T - (self._due_s + self.period_s * np.arange(ahead, ahead + len(stamps_T)))

    def _take(self, stamps_T: np.ndarray, x_TC: np.ndarray, ready: list) -> None:
        late_T, tolerance_s = self._late_T(stamps_T), self._tolerance_s()
        if late_T.mean() < -BACK_S:
            self._back(float(stamps_T[0]), ready)
            late_T = self._late_T(stamps_T)
        if late_T.min() <= tolerance_s:  # not a gap, or no longer
            self._release(ready)
            self._send(stamps_T, x_TC, ready)
            return
        self._held.append((stamps_T, x_TC))
        if stamps_T[-1] - self._held[0][0][0] >= HOLD_S:
            self._settle(ready)

    def _send(self, stamps_T: np.ndarray, x_TC: np.ndarray, ready: list) -> None:
        late_T, tolerance_s = self._late_T(stamps_T), self._tolerance_s()
        share = 1 - math.exp(-len(stamps_T) * self.period_s / TRACK_S)
        error_s = min(float(late_T.mean()), tolerance_s)
        self._jitter_s += share * (min(float(abs(late_T).mean()), 2 * tolerance_s) - self._jitter_s)
        ready.append((self.seq, float(stamps_T[-1]), x_TC))
        self.seq += len(x_TC)
        self._due_s += len(x_TC) * self.period_s + share * error_s

    def _release(self, ready: list) -> None:
        held, self._held = self._held, []
        for stamps_T, x_TC in held:
            self._send(stamps_T, x_TC, ready)

    def _settle(self, ready: list) -> None:
        """A jump was a gap: leave out in seq what is missing."""
        first_s = self._due_s
        late_T = np.concatenate([held_T for held_T, _ in self._held])
        late_T = late_T - (first_s + self.period_s * np.arange(len(late_T)))
        level_s = float(np.median(late_T[late_T <= late_T.min() + self._tolerance_s()]))
        missing = max(1, round(level_s / self.period_s))
        self.counts["gaps"] += 1
        self.counts["samples_missing"] += missing
        self.seq += missing
        self._due_s += level_s
        self._release(ready)

    def _back(self, stamp: float, ready: list) -> None:
        """Stamps of another clock: how much is missing nobody knows."""
        self._release(ready)
        self.counts["clock_resets"] += 1
        self.seq += round(RESET_S / self.period_s)
        self._due_s = stamp


@dataclass(frozen=True)
class Layout:
    """What an outlet sends, and what of it goes to the service."""

    names: tuple[str, ...]
    columns: tuple[int, ...]
    factors: tuple[float, ...]  # to microvolts
    rate_hz: float
    unit: str
    count: int


def describe(info, name: str, unit: str | None = None, stated: tuple[str, ...] | None = None) -> Layout:
    """The EEG channels of a pylsl.StreamInfo by their canonical names. Raises Unusable: what it doesn't say, and the flag that does."""
    count = info.channel_count()
    labels, kinds, units = (
        [str(v or "").strip() for v in (get() or [])] or [""] * count
        for get in (info.get_channel_labels, info.get_channel_types, info.get_channel_units)
    )
    try:
        rate_hz = settle_rate(info.nominal_srate() or None, None, name)
        own, columns = settle_channels(labels if any(labels) else [], stated, count, name)
        known = ("eeg", "eog", "ecg", "emg", "stim", "misc")
        kinds = [
            kinds[i].lower() if channels.kind(n) == "unknown" and kinds[i].lower() in known else channels.kind(n)
            for n, i in zip(own, columns, strict=True)
        ]
        picked = channels.select(own, kinds, "all", stated=stated is not None)
        taken = tuple(columns[i] for i in picked.indices)
        settled = [settle_unit(units[i], unit, name) for i in taken]
    except Rejected as error:
        mends = {
            "unit": "--lsl-unit uV",
            "chan": "--lsl-channels with their names",
            "rate": "an outlet with a nominal rate",
        }
        mend = mends.get(error.code[:4], "another outlet")
        raise Unusable(f"--lsl {name}: {error.reason.split(': state ')[0]} ({error.code}); use {mend}") from error
    return Layout(picked.names, taken, tuple(f for _, f in settled), rate_hz, settled[0][0], count)


def run(
    name: str, address: tuple[str, int], markers: str = "auto", unit: str | None = None,
    scope: str = "machine", stated: tuple[str, ...] | None = None, framing: str = "binary", token: str | None = None, tls: str | None = None,
    say: Callable[[str], None] | None = None, going: Callable[[dict], bool] = lambda totals: True,
) -> dict:  # fmt: skip
    """
    Send the EEG stream `name` (its name or source id; "auto": the only one of type EEG) until `going(totals)` is false.

    `markers`: auto sends those of all streams of type Markers, none none, else a stream's name. It waits for outlets that aren't there
    yet, comes back to those that are restarted, and so it does with the service. Raises Unusable: no pylsl, a stream that doesn't say
    what it is, several of that name, or the service refuses it.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    bridge = Bridge(load(scope), name, markers, unit, stated, say)
    totals = bridge.totals
    while going(totals):
        if not bridge.find(going):
            break
        layout = bridge.layout()
        stream = wire.Stream(wire.printable(bridge.info.name()), layout.names, layout.rate_hz, layout.unit, framing)
        with reaching(address), Persistent(address, stream, token, tls) as link:
            bridge.send(link, layout, going)
            link.ack()
        totals["samples"] += link.samples_sent
        totals["events"] += link.events_sent
        totals["lost"] += link.samples_lost
        totals["reconnects"] += link.reconnects
    return dict(totals)


def load(scope: str = "machine"):
    """pylsl, told where to look for streams before it does anything. Raises Unusable: it isn't there, or lacks liblsl."""
    try:
        import pylsl
    except (ImportError, RuntimeError, OSError) as error:
        raise Unusable(f"--lsl needs pylsl 1.18 (pip install 'pylsl>=1.18'): {str(error).splitlines()[0]}") from error
    if SCOPES[scope]:
        pylsl.set_config_content(SCOPES[scope])
    return pylsl


class Bridge:
    """The inlets of one EEG stream and its markers."""

    def __init__(
        self, pylsl, name: str, markers: str, unit: str | None, stated: tuple[str, ...] | None, say: Callable[[str], None]
    ):  # fmt: skip
        self.pylsl, self.name, self.say, self.totals = pylsl, name, say, Counter()
        self.info = self._inlet = None
        self.layout = lambda: describe(self.info, name, unit, stated)
        self._wanted = "type='EEG'" if name == "auto" else f"name={_quoted(name)} or source_id={_quoted(name)}"
        predicate = {"auto": "type='Markers'", "none": None}.get(markers, f"name={_quoted(markers)}")
        self._resolver = pylsl.ContinuousResolver(pred=predicate) if predicate else None
        self._looked = -math.inf
        self._markers: dict[str, object] = {}  # by uid, which no two outlets share, also not one that was restarted
        self._gone: set[str] = set()
        self._queue: deque[tuple[float, str]] = deque()  # stamp, code

    def find(self, going: Callable[[dict], bool], idle: Callable[[], None] = lambda: None) -> bool:
        """Wait for the EEG stream and open it; False if `going` ended that. Raises Unusable: several of that name."""
        told = False
        while self._inlet is None and going(self.totals) and not orphaned():
            found = self.pylsl.resolve_bypred(self._wanted, 1, 1.0)
            if found and self.info is None:  # to begin with, listen on: there may be others, whose answers take longer
                found += self.pylsl.resolve_bypred(self._wanted, 2, 2.0)
                found = list({info.uid(): info for info in found}.values())
            if len(found) > 1:
                which = ", ".join(f"{i.name()} ({i.source_id() or 'no source id'}, {i.hostname()})" for i in found)
                raise Unusable(f"--lsl {self.name}: {len(found)} streams, {which}: name one by its source id")
            if found:
                self._open(found[0])
            elif not told:
                self.say(f"waiting for LSL stream {self.name}")
                told = True
            idle()
        return self._inlet is not None

    def send(self, link: Persistent, layout: Layout, going: Callable[[dict], bool]) -> None:
        """Send samples and markers until `going` ends it or the outlet comes back as something else."""
        self.say(f"LSL stream {self.name}: {len(layout.names)} channels at {layout.rate_hz:g} Hz")
        stamps, factor_C, columns = Stamps(layout.rate_hz), np.array(layout.factors, np.float32), list(layout.columns)
        before, news, seldom = Counter(), Counter(), Seldom()
        while going(self.totals):
            try:
                x_TC, stamps_T = self._inlet.pull_chunk(WAIT_S, 1024, as_numpy=True, min_samples=1)
            except self.pylsl.util.LostError:
                self._deliver(link, stamps, stamps.flush())
                self.totals["outlets_lost"] += 1
                self.say(f"LSL stream {self.name} is lost: looking for it")
                self._inlet = None
                if not self.find(going, link.keep_alive) or self.layout() != layout:
                    return
                continue
            self._pull_markers()
            x_TC = np.asarray(x_TC, np.float32).reshape(len(stamps_T), layout.count)[:, columns] * factor_C
            ready = stamps.push(np.asarray(stamps_T, np.float64), x_TC)
            self._deliver(link, stamps, ready)
            link.keep_alive()
            new, before = stamps.counts - before, stamps.counts.copy()
            self.totals.update(new)
            news.update(new)
            if news and seldom("news") is not None:
                words = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in news.items())
                self.say(f"LSL stream {self.name}: {words}")
                news.clear()

    def _open(self, info) -> None:
        inlet = self.pylsl.StreamInlet(
            info, max_buflen=BUFFER_S, recover=False, processing_flags=self.pylsl.proc_clocksync
        )
        try:
            self.info = inlet.info(5.0)
            inlet.open_stream(5.0)
        except (self.pylsl.util.LostError, self.pylsl.util.TimeoutError):
            return  # listed, but gone: look again
        self._inlet = inlet

    def _pull_markers(self) -> None:
        """Take what markers have come, of streams that are there by now."""
        if self._resolver and time.monotonic() - self._looked > FIND_S:
            self._looked = time.monotonic()
            for info in self._resolver.results():
                if info.uid() not in self._markers and info.uid() not in self._gone:
                    self._markers[info.uid()] = self.pylsl.StreamInlet(
                        info, recover=False, processing_flags=self.pylsl.proc_clocksync
                    )
                    self.say(f"LSL markers from {info.name()}")
        for uid, inlet in list(self._markers.items()):
            try:
                values, stamps = inlet.pull_chunk(0.0, 1024)
            except self.pylsl.util.LostError:
                self._gone.add(uid)
                del self._markers[uid]
                continue
            for stamp, value in zip(stamps, values, strict=True):
                if not abs(stamp) < FAR_S:
                    self.totals["markers_without_time"] += 1
                elif code := _code(value):
                    self._queue.append((stamp, code))

    def _deliver(self, link: Persistent, stamps: Stamps, ready: list) -> None:
        """Send what is ready, every marker before the chunk that holds its sample, if it is known by then."""
        placed = []
        while self._queue and (seq := stamps.seq_of(self._queue[0][0])) is not None:
            stamp, code = self._queue.popleft()
            if seq >= 0:
                placed.append((seq, stamp, code))
            else:
                self.totals["markers_before_signal"] += 1
        placed.sort(key=lambda item: item[0])
        for seq, stamp, x_TC in ready:
            while placed and placed[0][0] < seq + len(x_TC):
                link.event(*placed.pop(0))
            link.samples(seq, stamp, x_TC)
        for item in placed:
            link.event(*item)


def _code(value) -> str:
    """What a marker says: its text or its number; nothing for 0, which most senders use for the end of one."""
    parts = [str(v).strip() if isinstance(v, str) else code_label(v) if v else "" for v in value]
    return wire.printable(" ".join(p for p in parts if p))


def _quoted(text: str) -> str:
    """A literal of XPath, in which LSL's queries are written. Raises Unusable for one that can't be."""
    mark = "'" if "'" not in text else '"'
    if mark in text:
        raise Unusable(f"--lsl {text}: a name with both kinds of quotes can't be looked for; give its source id")
    return f"{mark}{text}{mark}"
