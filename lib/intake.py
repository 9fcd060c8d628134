"""
From a producer's chunks to windows: one stream's signal path, the same numbers as `build_cache.py --causal` however it was cut up.

Pick channels by name, microvolts, causal filter and resampler with float64 state, then per window reference, order, mask and unit.
Filter and resampler work sample by sample and the rest on whole windows, so that no bit depends on how samples came in.

What is doubtful is never served as if it were not: samples that are missing, not finite or beyond 1 V are held (the filter must stay
finite) and make the windows they touch invalid; after more than `hold_s` of them, or a count that goes back, filter and window start
anew and everything is invalid until the filter has settled.

Shapes: C announced or filtered channels, T samples of the producer, K samples at the model's rate.
"""

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from kernels import plain
from lib import channels, statements
from lib.errors import Rejected, Unusable
from lib.filters import Causal, check_band, same_rate

LIMIT_UV = 1e6  # no electrode gives a volt
PIECE = 64  # samples that are filtered at once, at most: what a ring holds stays in the processor's cache
LOOK_S, LOOK_SAMPLES = 2.0, 2048  # what quality() looks back at, and the most samples of it
LINE_HZ = (50.0, 60.0)


@dataclass(frozen=True)
class Layout:
    """What a producer announces."""

    channels: tuple[str, ...]
    rate_hz: float
    unit: str  # uV, mV, V …, or a.u.


@dataclass(frozen=True)
class Path:
    """What a model needs of a signal; the names of build_cache.py's flags mean the same here."""

    channels: tuple[str, ...] = ()  # in the model's order; none: what the cache builder would take, in its order
    reference: str = "Fz"  # average, none, or electrodes such as Fz or A1,A2
    band_hz: tuple[float | None, float | None] | None = (0.5, 45.0)
    notch_hz: tuple[float, ...] = ()
    rate_hz: float | None = None  # none: the producer's
    unit: str = "uV"  # of windows: uV or V
    window: int = 250  # samples at rate_hz
    step: int = 125
    bad: tuple[str, ...] = ()  # channels known to be bad: zero in every window, and in no average
    partial: bool = False  # wanted channels that the producer lacks are treated as bad ones, not refused
    settle_s: float = 1.6  # invalid after a start
    hold_s: float = 0.1  # longest gap that is bridged


@dataclass
class Window:
    """A window for the model, or the reason why it must not be used."""

    start: int  # samples in the producer's count: [start, stop)
    stop: int
    x_CT: np.ndarray  # float32, C-contiguous, in the model's order and unit
    valid: bool = True
    reason: str | None = None  # settling (after the start), gap, rewind, nan, saturated, flat (no channel moves)


def stack(windows) -> np.ndarray:
    """Windows (Window, or their arrays) as float64 (N, C, T), without those that aren't numbers throughout."""
    kept = [x for x in (np.asarray(getattr(w, "x_CT", w), np.float64) for w in windows) if np.isfinite(x).all()]
    return np.stack(kept) if kept else np.empty((0, 0, 0))


class Ring:
    """The newest samples of several channels, time-major inside: a chunk is written in one piece."""

    def __init__(self, rows: int, samples: int, dtype: type):
        self.kept, self.x_TC, self.fill, self.total = samples, np.zeros((2 * samples, rows), dtype), 0, 0
        self.at, self.row = self.x_TC.ctypes.data, self.x_TC.strides[0]

    def room(self, samples: int) -> int:
        """The address of the row where as many samples, at most `kept`, are to be written; `add` then makes them count."""
        if self.fill + samples > len(self.x_TC):
            self.x_TC[: self.kept] = self.x_TC[self.fill - self.kept : self.fill]
            self.fill = self.kept
        return self.at + self.fill * self.row

    def add(self, samples: int) -> None:
        """They have been written."""
        self.fill += samples
        self.total += samples

    def append(self, y_CT: np.ndarray) -> None:
        """Add at most as many samples as are kept."""
        T = y_CT.shape[1]
        self.room(T)
        self.x_TC[self.fill : self.fill + T] = y_CT.T
        self.add(T)

    @property
    def oldest(self) -> int:
        """Index of the oldest sample that is surely there."""
        return self.total - min(self.fill, self.kept)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A view (C, T) of samples [start, stop), counted since the last clear."""
        first = self.fill - self.total
        return self.x_TC[first + start : first + stop].T

    def address(self, start: int) -> int:
        """Where the row of sample `start` is."""
        return self.at + (self.fill - self.total + start) * self.row

    def clear(self) -> None:
        """Forget them."""
        self.fill = self.total = 0


class Intake:
    """
    The signal path of one stream. Raises Unusable if the stream can't feed the model: which channels it lacks, which rate, unit …

    `names` are the channels of a window, `counts` how often what happened: gaps, rewinds, resets; samples lost, held, nan, saturated.
    """

    def __init__(self, layout: Layout, path: Path):
        self.layout, self.path = layout, path
        self.factor = _factor(layout.unit) * {"uV": 1.0, "V": 1.0}[path.unit]
        self.out_factor = 1e-6 if path.unit == "V" else 1.0
        self.out_hz = path.rate_hz or layout.rate_hz
        _check_rates(layout.rate_hz, self.out_hz, path)
        announced = [name.strip() for name in layout.channels]
        self.names, place_W = _wanted(announced, path)
        bad = {channels.canonical(name) for name in path.bad}
        known = {channels.canonical(name) for name in (*announced, *self.names)}
        if stray := [name for name in path.bad if channels.canonical(name) not in known]:
            raise Unusable(f"--bad-channels {_some(stray)}: not among the stream's channels {_some(announced)}")
        self.good_W = np.array(
            [i >= 0 and channels.canonical(n) not in bad for n, i in zip(self.names, place_W, strict=True)]
        )
        if not self.good_W.any():
            raise Unusable(f"none of the model's channels is left of {_some(announced)}")
        reference = [] if path.reference in ("average", "none") else path.reference.split(",")
        place_R = [_find(announced, name, f"reference {path.reference}") for name in reference]
        if any(i < 0 for i in place_R):
            raise Unusable(f"reference {path.reference} is not among the stream's channels {_some(announced)}")
        taken = sorted({i for i, good in zip(place_W, self.good_W, strict=True) if good} | set(place_R))
        self.taken = None if taken == list(range(len(announced))) else np.array(taken)
        row_W = [taken.index(i) if good else 0 for i, good in zip(place_W, self.good_W, strict=True)]
        self.row_W = None if row_W == list(range(len(taken))) else np.array(row_W)
        self.reference_R = np.array([taken.index(i) for i in place_R], int)
        self.own_W = np.zeros(len(self.names), bool)  # channels that keep their own reference
        if path.reference == "average":
            self.own_W = np.array(channels.are_bipolar(self.names))
            averaged_W = self.good_W & ~self.own_W
            if averaged_W.sum() > 1:  # of one channel an average would leave nothing
                self.reference_R = np.array(row_W)[averaged_W]
        self.cutter = self._compiled_cut(len(taken), row_W)
        self.causal = Causal(layout.rate_hz, self.out_hz, path.band_hz, path.notch_hz, len(taken))
        self.up, self.down = self.causal.up, self.causal.down
        self.reach = len(self.causal.taps) // self.up - 1 if self.up != self.down else 0
        self.hold = round(path.hold_s * layout.rate_hz)
        # below 16 outputs at a time the resampler has one way to compute them
        self.piece = PIECE if self.up == self.down else min(max(15 * self.down // self.up, 1), PIECE)
        most = max(1, -(-self.piece * self.up // self.down))
        self.ring = Ring(len(taken), path.window + 2 * most, np.float64)
        self.look = min(round(LOOK_S * layout.rate_hz), LOOK_SAMPLES)
        whole = -(-self.ring.kept * self.down // self.up) + self.piece  # what windows can reach back to
        self.raw = Ring(len(taken), max(self.look, whole), np.float32)
        self.last_C = np.zeros(len(taken))
        self.filtered_TC = np.empty((self.piece, len(taken)))  # on the way to the resampler
        self.counts: Counter[str] = Counter()
        self.base = self.origin = 0
        self.expected: int | None = None

    def _compiled_cut(self, rows: int, row_W: list[int]) -> plain.Cutter | None:
        """What `_cut` does in one call, where there is a compiler and the reference is none, one electrode or all of them."""
        alone = {
            0: plain.NO_REFERENCE,
            1: int(self.reference_R[0]) if len(self.reference_R) else 0,
            rows: plain.MEAN_OF_ALL,
        }
        if len(self.reference_R) not in alone or not plain.library():
            return None
        row_W = np.where(self.good_W, row_W, -1)
        return plain.Cutter(rows, row_W, alone[len(self.reference_R)], self.out_factor)

    # ------------------------------------------------------------------------
    # samples in

    def push(self, seq: int, x_TC: np.ndarray) -> list[Window]:
        """The windows that a chunk completes; `seq` is the index of its first sample, x_TC float32 as announced."""
        assert x_TC.ndim == 2 and x_TC.shape[1] == len(self.layout.channels), x_TC.shape
        if not len(x_TC):
            return []
        windows: list[Window] = []
        if seq != self.expected:
            self._jump(seq, windows)
        self.expected = seq + len(x_TC)
        while self.live and self.run == 0 and len(x_TC) and self._take(x_TC[: self.piece], windows):
            x_TC = x_TC[self.piece :]
        if len(x_TC):
            x_CT = (x_TC.T if self.taken is None else x_TC.T[self.taken]).astype(np.float64) * self.factor
            if self.run == 0 and (np.abs(x_CT) <= LIMIT_UV).all():
                self._filter(x_CT, windows)
            else:
                self._filter_doubtful(x_CT, windows)
            self.last_C[:] = x_CT[:, -1]
            if self.live is None and plain.library():
                A = len(self.layout.channels)
                sections = self.causal.sections
                self.live = plain.Live(sections, A, self.taken, self.factor, LIMIT_UV, self.last_C, self.piece)
        return windows

    def _take(self, x_TC: np.ndarray, windows: list[Window]) -> bool:
        """What _filter does, for at most a piece of samples, in one call; False and nothing done where one of them is doubtful."""
        T, raw, ring = len(x_TC), self.raw, self.ring
        if self.up == self.down:
            if not self.live.take(x_TC, raw.room(T), ring.room(T)):
                return False
            ring.add(T)
        else:
            if not self.live.take(x_TC, raw.room(T), self.filtered_TC.ctypes.data):
                return False
            ring.append(self.causal.resample(np.ascontiguousarray(self.filtered_TC[:T].T)))
        raw.add(T)
        self._cut_all(windows)
        return True

    def restart(self, at: int) -> None:
        """Discard the window that is being filled; the next one begins at sample `at` of the producer's count."""
        self.origin = at
        if self.expected is not None:
            self.next = max(round((at - self.base) * self.out_hz / self.layout.rate_hz), self.ring.oldest)

    def _jump(self, seq: int, windows: list[Window]) -> None:
        """A first sample, or one that isn't the next."""
        if self.expected is None:
            self._start(seq, "settling")
            return
        gap = seq - self.expected
        self.counts["gaps" if gap > 0 else "rewinds"] += 1
        if gap > 0:
            self.counts["lost"] += gap
        if 0 < gap and self.run + gap <= self.hold:
            self._hold(self.inputs, gap, "gap")
            self._filter(np.repeat(self.last_C[:, None], gap, axis=1), windows)
        else:
            if gap < 0:
                self.origin = seq  # the one before was of another count, and may lie hours ahead in this one
            self._start(seq, "gap" if gap > 0 else "rewind")

    def _start(self, seq: int, reason: str) -> None:
        """Begin anew with sample `seq`."""
        if self.expected is not None:
            self.counts["resets"] += 1
        self.causal.reset()
        self.live: plain.Live | None = None  # once the sections have begun
        self.ring.clear()
        self.base, self.run, self.why = seq, 0, reason  # run: how many samples in a row were held
        self.raw_base = self.raw.total
        settle = round(self.path.settle_s * self.out_hz)
        self.marks = deque([[0, settle, reason]] if settle else [])  # outputs that are not to be trusted, in order
        self.next = max(round((self.origin - seq) * self.out_hz / self.layout.rate_hz), 0)

    def _hold(self, first: int, count: int, reason: str) -> None:
        """Samples that stand for others, from input `first` on: outputs that they reach are not to be trusted."""
        self.run += count
        self.why = reason
        self.counts["held"] += count
        mark = [-(-first * self.up // self.down), (first + count - 1 + self.reach) * self.up // self.down + 1, reason]
        if self.marks and self.marks[-1][2] == reason and self.marks[-1][1] >= mark[0]:
            self.marks[-1][1] = max(mark[1], self.marks[-1][1])
        else:
            self.marks.append(mark)

    def _filter_doubtful(self, x_CT: np.ndarray, windows: list[Window]) -> None:
        """A chunk that may hold samples that can't be: hold them, and begin anew where too many in a row were held."""
        nan_CT = ~np.isfinite(x_CT)
        bad_CT = nan_CT | ~(np.abs(x_CT) <= LIMIT_UV)
        bad_T = bad_CT.any(0)
        if bad_T.any():
            self.counts["nan"] += int(nan_CT.any(0).sum())
            self.counts["saturated"] += int((bad_T & ~nan_CT.any(0)).sum())
            place_CT = np.where(bad_CT, -1, np.arange(len(bad_T)))  # of the last good sample so far
            place_CT = np.maximum.accumulate(place_CT, axis=1)
            x_CT[...] = np.where(place_CT < 0, self.last_C[:, None], np.take_along_axis(x_CT, place_CT.clip(0), 1))
        kind_T = np.where(nan_CT.any(0), 2, bad_T)
        edges = [0, *(np.flatnonzero(np.diff(kind_T)) + 1).tolist(), len(kind_T)]
        kinds, begin = kind_T[edges[:-1]].tolist(), 0  # of the samples that are still to be filtered
        # a broken producer's runs are a sample each: only starts may cut what is filtered, or they would hold up all streams
        for kind, a, b in zip(kinds, edges, edges[1:], strict=False):
            inputs = self.inputs + a - begin
            if kind:
                self._hold(inputs, b - a, ("saturated", "nan")[kind - 1])
                continue
            # nothing but held samples yet: what they were held at is not this electrode's offset
            if self.run > self.hold or 0 < self.run == inputs:
                self._filter(x_CT[:, begin:a], windows)
                self._start(self.expected - len(kind_T) + a, self.why)
                begin = a
            self.run = 0
        self._filter(x_CT[:, begin:], windows)

    @property
    def inputs(self) -> int:
        """Samples since the last start."""
        return self.raw.total - self.raw_base

    def _filter(self, x_CT: np.ndarray, windows: list[Window]) -> None:
        """Finite samples through filter and ring, and the windows that are full."""
        while x_CT.shape[1]:
            x = x_CT[:, : self.piece]
            self.raw.append(x)
            self.ring.append(self.causal.process(x))
            self._cut_all(windows)
            x_CT = x_CT[:, self.piece :]

    # ------------------------------------------------------------------------
    # windows out

    def _cut_all(self, windows: list[Window]) -> None:
        """The windows that are full."""
        while self.next + self.path.window <= self.ring.total:
            windows.append(self._cut(self.next))
            self.next += self.path.step

    def _cut(self, first: int) -> Window:
        """The window of outputs [first, first + window)."""
        stop = first + self.path.window
        if self.cutter:
            return self._window(first, stop, self.cutter(self.ring.address(first), stop - first))
        y_CT = self.ring.read(first, stop)
        x_CT = y_CT if self.row_W is None else y_CT[self.row_W]
        if len(self.reference_R) == 1:
            x_CT = x_CT - y_CT[self.reference_R[0]]
        elif len(self.reference_R):
            mean_T = (y_CT if len(self.reference_R) == len(y_CT) else y_CT[self.reference_R]).mean(0)
            x_CT = x_CT - np.where(self.own_W[:, None], 0, mean_T) if self.own_W.any() else x_CT - mean_T
        if self.out_factor != 1:
            x_CT = x_CT * self.out_factor
        x_CT = np.array(x_CT, np.float32, order="C")
        if not self.good_W.all():
            x_CT[~self.good_W] = 0
        return self._window(first, stop, x_CT)

    def _window(self, first: int, stop: int, x_CT: np.ndarray) -> Window:
        """With its place in the producer's count, and whether it is to be trusted."""
        while self.marks and self.marks[0][1] <= first:
            self.marks.popleft()
        reason = self.marks[0][2] if self.marks and self.marks[0][0] < stop else None
        start, stop = first * self.down // self.up, (stop - 1) * self.down // self.up + 1
        if reason is None and self._still(start, stop):
            reason = "flat"
        return Window(self.base + start, self.base + stop, x_CT, reason is None, reason)

    def _still(self, start: int, stop: int) -> bool:
        """Whether no channel moved in these samples, counted since the last start: of nothing a model says something all the same."""
        x_CT = self.raw.read(self.raw_base + start, self.raw_base + stop)
        return stop - start >= 8 and np.array_equal(x_CT[:, 0], x_CT[:, -1]) and bool((x_CT == x_CT[:, :1]).all())

    # ------------------------------------------------------------------------
    # how good the signal is

    def quality(self) -> dict[str, dict]:
        """
        Per channel what the last two seconds say of the electrode, before the filter.

        `rms_uV` about the mean; `flat`: most samples equal the one before; `clipped`: many lie at an extreme, beside an equal one;
        `line`: share of the power above 1 Hz that is within 1 Hz of 50 or 60 Hz, the larger of both.
        """
        count = min(self.raw.total, self.look)
        if count < 8:
            return {}
        x_CT = self.raw.read(self.raw.total - count, self.raw.total).astype(np.float64)
        x_CT -= x_CT.mean(1, keepdims=True)
        same_CT = x_CT[:, 1:] == x_CT[:, :-1]
        rail_CT = (x_CT == x_CT.max(1, keepdims=True)) | (x_CT == x_CT.min(1, keepdims=True))
        flat_C = same_CT.mean(1) > 0.5
        clipped_C = ~flat_C & ((rail_CT[:, 1:] & same_CT).mean(1) > 0.05)
        power_CF = np.abs(np.fft.rfft(x_CT * np.hanning(count))) ** 2
        hz_F = np.fft.rfftfreq(count, 1 / self.layout.rate_hz)
        total_C = power_CF[:, hz_F >= 1].sum(1)
        line_C = np.max([power_CF[:, np.abs(hz_F - f) <= 1].sum(1) for f in LINE_HZ], axis=0) / np.maximum(
            total_C, 1e-12
        )
        rows = range(len(x_CT)) if self.taken is None else self.taken
        return {
            self.layout.channels[i]: {
                "rms_uV": float(x_CT[c].std()),
                "flat": bool(flat_C[c]),
                "clipped": bool(clipped_C[c]),
                "line": float(line_C[c]),
            }
            for c, i in enumerate(rows)
        }


# ----------------------------------------------------------------------------
# does the stream fit the model


def _factor(unit: str) -> float:
    """What makes microvolts of the producer's unit; 1 if it is stated that nobody knows. Raises Unusable."""
    stated = statements.ARBITRARY if unit == statements.ARBITRARY else None
    try:
        return statements.settle_unit(unit, stated, "the stream")[1]
    except Rejected:
        raise Unusable(f"unit {unit!r} is no unit of voltage: announce uV, mV or V, or a.u. if nobody knows") from None


def _check_rates(rate_hz: float, out_hz: float, path: Path) -> None:
    """Raises Unusable for a rate that can't be, or is too low for what the model was trained on."""
    if not 0 < rate_hz < float("inf"):
        raise Unusable(f"{rate_hz} Hz is no sampling rate")
    highest = path.band_hz[1] if path.band_hz and path.band_hz[1] else out_hz / 2
    if highest > rate_hz / 2 and not same_rate(highest, rate_hz / 2):
        raise Unusable(f"sampled at {rate_hz:g} Hz, which can't hold the {highest:g} Hz that the model needs")
    try:
        check_band(rate_hz, *(path.band_hz or (None, None)))
    except ValueError as error:
        raise Unusable(f"at {rate_hz:g} Hz: {error}") from None
    if not 1 <= path.window or not 1 <= path.step:
        raise Unusable(f"a window of {path.window} samples every {path.step} is none")


def _wanted(announced: list[str], path: Path) -> tuple[tuple[str, ...], list[int]]:
    """Names and announced places (-1: not there) of the channels of a window. Raises Unusable, naming the channels."""
    if not path.channels:
        try:
            found = channels.select(announced, [channels.kind(n) for n in announced], "all")
        except Rejected as error:
            raise Unusable(error.reason) from None
        return found.names, list(found.indices)
    places = [_find(announced, name, "the model") for name in path.channels]
    lacking = [name for name, i in zip(path.channels, places, strict=True) if i < 0]
    if lacking and not path.partial:
        raise Unusable(
            f"the stream lacks {_some(lacking)} of the model's {len(places)} channels; it has {_some(announced)}; "
            "--missing mask serves it all the same"
        )
    return path.channels, places


def _find(announced: list[str], name: str, who: str) -> int:
    """The place of a channel by its very name, else by its canonical one; -1 if it isn't there. Raises Unusable for several."""
    exact = [i for i, other in enumerate(announced) if other == name]
    found = exact or [i for i, o in enumerate(announced) if channels.canonical(o) == channels.canonical(name)]
    if len(found) > 1:
        raise Unusable(f"{who} needs {name}, which the stream has {len(found)} times")
    return found[0] if found else -1


def _some(names) -> str:
    """The first names of many."""
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
