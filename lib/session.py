"""
One producer's session: its signal path, its state, what has been collected, and the model that predicts for it. No sockets, no threads.

`samples` and `event` yield what there is to do, in sample order: windows to Predict and Fits to run. Whoever runs the fit gives the result to
`adopt`; until then windows are predicted by the model before it, which nobody ever writes to.
"""

import bisect
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lib.filters import Causal
from lib.intake import Intake, Path, Window
from lib.states import State, Table
from lib.wire import Event, Samples, Stream

MOST_EVENTS = 256  # that wait for their sample


class Model(NamedTuple):
    """A pipeline and how many fits made it; replaced as one, so that both always belong together."""

    pipeline: Any
    version: int


@dataclass(frozen=True)
class NoModel:
    """The pipeline where there is none: it predicts nothing, and says so."""

    path: Path = Path(reference="average")
    name, classes, ready = "none", (), "no model was given (--models)"

    def warm(self, compile: str) -> dict:
        """Nothing to warm up."""
        return {}

    def fit(self, groups: dict) -> "NoModel":
        """Nothing to fit."""
        return self

    def partial_fit(self, fresh: list) -> "NoModel":
        """Nothing to fit."""
        return self


class Predict(NamedTuple):
    """A full window to predict."""

    window: Window
    state: str
    t: float  # producer's clock at its last sample
    arrived_s: float  # time.monotonic() when that came


class Fit(NamedTuple):
    """Windows to fit a pipeline to: all groups, or for a partial fit a list of fresh ones."""

    groups: dict[str, list[np.ndarray]] | None
    fresh: list[np.ndarray]


@dataclass
class Outcome:
    """What became of one window."""

    probabilities: np.ndarray | None
    reason: str | None  # why there is no prediction: a code, and after a colon the detail
    seconds: float
    error: BaseException | None = None


@dataclass
class Session:
    """State of one stream. `most` windows are kept of a group; every `partial_every` fresh ones make a partial fit, 0: none do."""

    stream: Stream
    intake: Intake
    table: Table
    state: State
    model: Model
    most: int = 256
    partial_every: int = 10
    counts: Counter = field(default_factory=Counter)
    groups: dict[str, deque] = field(default_factory=dict)
    fresh: list[np.ndarray] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)  # that wait for their sample, in order
    next_seq: int | None = None
    kept_until: int = 0  # windows that begin before it overlap one that was kept
    offset_s: float = math.inf  # least seen of our clock less the producer's
    quality: dict[str, dict] = field(default_factory=dict)  # of the channels, as last looked at

    def attach(self) -> None:
        """A connection takes over: its count of samples and its clock are its own."""
        self.events.clear()
        self.next_seq, self.offset_s, self.kept_until = None, math.inf, 0

    def samples(self, chunk: Samples, arrived_s: float) -> Iterator[Predict | Fit]:
        """Filter a chunk, apply the events that fall into it at their samples, and yield what is due."""
        seq, t, x_TC = chunk
        self.offset_s = min(self.offset_s, arrived_s - t)
        stop = seq + len(x_TC)
        while self.events and self.events[0].seq < stop:
            event = self.events.pop(0)
            cut = event.seq - seq
            if cut > 0:
                yield from self._push(seq, t - (stop - event.seq) / self.stream.rate_hz, x_TC[:cut], arrived_s)
                seq, x_TC = event.seq, x_TC[cut:]
            yield from self._apply(event)
        yield from self._push(seq, t, x_TC, arrived_s)

    def event(self, event: Event) -> Iterator[Predict | Fit]:
        """Take a marker: it waits for its sample, or applies at once if that has been."""
        if self.next_seq is None or event.seq > self.next_seq:
            if len(self.events) == MOST_EVENTS:
                self.counts["events_lost"] += 1
            else:
                bisect.insort(self.events, event, key=lambda e: e.seq)
            return
        self.counts["events_late"] += event.seq < self.next_seq
        yield from self._apply(event._replace(seq=self.next_seq))

    def _apply(self, event: Event) -> Iterator[Fit]:
        move = self.table.step(self.state.name, event.code)
        if not move.accepted:
            self.counts["events_ignored"] += 1
            return
        self.counts["events_accepted"] += 1
        self.state = move.state
        self.intake.restart(event.seq)
        self.kept_until = 0
        self.fresh = []  # of another segment
        if move.fit:
            yield Fit({name: list(kept) for name, kept in self.groups.items()}, [])

    def _push(self, seq: int, t: float, x_TC: np.ndarray, arrived_s: float) -> Iterator[Predict | Fit]:
        if self.next_seq is not None and seq < self.next_seq:
            self.kept_until = 0
        windows = self.intake.push(seq, x_TC)
        self.next_seq = seq + len(x_TC)
        for window in windows:
            self.counts["windows"] += 1
            # a fit that this window makes due comes after its prediction, which must not have seen it
            if self.state.predict:
                late_s = (self.next_seq - window.stop) / self.stream.rate_hz
                yield Predict(window, self.state.name, t - late_s, arrived_s)
            if self.state.collect and window.valid and window.start >= self.kept_until:
                self.kept_until = window.stop
                yield from self._keep(window.x_CT)

    def _keep(self, x_CT: np.ndarray) -> Iterator[Fit]:
        self.counts["windows_kept"] += 1
        if not self.state.partial_fit:
            self.groups.setdefault(self.state.collect, deque(maxlen=self.most)).append(x_CT)
        elif self.partial_every:  # only until their partial fit: inference lasts for hours
            self.fresh.append(x_CT)
            if len(self.fresh) >= self.partial_every:
                yield Fit(None, self.fresh)
                self.fresh = []

    def adopt(self, pipeline: Any) -> None:
        """A fit's result predicts from now on."""
        self.model = Model(pipeline, self.model.version + 1)

    def stats(self) -> dict:
        """Everything that is counted."""
        pipeline, version = self.model
        return {
            "name": self.stream.name,
            "rate_hz": self.stream.rate_hz,
            "channels": len(self.stream.channels),
            "state": self.state.name,
            "next_seq": self.next_seq,
            "pipeline_type": pipeline.name,
            "model_version": version,
            "not_ready": pipeline.ready,
            "collected": {name: len(kept) for name, kept in self.groups.items()},
            "counts": {**self.counts, **self.intake.counts},
            "clock_offset_s": round(self.offset_s, 6) if math.isfinite(self.offset_s) else None,
            "quality": self.quality,
        }

    def message(self, job: Predict, model: Model, outcome: Outcome, shed: int) -> dict:
        """The data line of one window."""
        p_K, classes = outcome.probabilities, getattr(model.pipeline, "classes", ())
        best = None if p_K is None else int(np.argmax(p_K))
        window = job.window
        metadata = {
            "stream": self.stream.name,
            "state": job.state,
            "start": window.start,
            "stop": window.stop,
            "t": round(job.t, 6),  # the same to the bit however the samples came in
            "rate_hz": self.stream.rate_hz,
            "model_version": model.version,
            "shed": shed,
        }
        if best is not None:
            label = classes[best] if len(classes) else best
            metadata["label"] = label if isinstance(label, (int, str)) else str(label)
            metadata["probabilities"] = [round(float(p), 6) for p in p_K]
        message = {
            "type": "data",
            "prediction": None if best is None else _as_int(classes, best),
            "probability": None if best is None else float(p_K[best]),
            "pipeline_type": model.pipeline.name,
            "processing_time": round(outcome.seconds, 6),
            "window_metadata": metadata,
        }
        return message if best is not None else message | {"skip_reason": outcome.reason}


def _as_int(classes, best: int) -> int:
    """A class that is an integer is the prediction itself, any other its index."""
    label = classes[best] if len(classes) else best
    return int(label) if isinstance(label, (int, np.integer)) and not isinstance(label, bool) else best


def predict(model: Model, window: Window) -> Outcome:
    """Probabilities of a window, or the reason why there are none; never an exception."""
    if not window.valid:
        return Outcome(None, window.reason or "invalid", 0.0)
    began_s = time.perf_counter()
    try:
        if model.pipeline.ready is not None:
            return Outcome(None, f"not_ready: {model.pipeline.ready}", 0.0)
        p_K = np.asarray(model.pipeline.predict_proba(window.x_CT[None]), np.float64)[0]
    except Exception as error:  # noqa: BLE001 - whatever a model raises costs one window, not the service
        return Outcome(None, "model_error", time.perf_counter() - began_s, error)
    seconds = time.perf_counter() - began_s
    if p_K.ndim != 1 or not len(p_K) or not np.isfinite(p_K).all():
        return Outcome(None, "not_finite", seconds)
    return Outcome(p_K, None, seconds)


def warm(pipeline: Any, compile: str) -> tuple[dict, BaseException | None]:
    """What a pipeline says of its first windows, which are noise; or what went wrong. Does what no stream should wait for."""
    Causal(250.0, 250.0, (1.0, 40.0), None, 1).process(
        np.zeros((1, 8))
    )  # imports SciPy, compiles the filter where it must be
    try:
        return pipeline.warm(compile), None
    except Exception as error:  # noqa: BLE001 - said where the service is started
        return {}, error


def refit(pipeline: Any, fit: Fit) -> tuple[Any, BaseException | None]:
    """The pipeline that a fit makes of `pipeline`, which stays as it is; or None and what went wrong."""
    try:
        return (pipeline.fit(fit.groups) if fit.groups is not None else pipeline.partial_fit(fit.fresh)), None
    except Exception as error:  # noqa: BLE001 - a fit that fails leaves the model as it was
        return None, error
