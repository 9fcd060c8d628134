"""
Streams on their way through the service: of each the newest windows wait, streams take turns, and one fit of each runs at a time.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lib.journal import say
from lib.peers import Peer
from lib.session import Fit, Predict, Session


@dataclass(eq=False)
class Lane:
    """One stream: its session, what waits to be predicted and fitted, and who sends it."""

    session: Session
    peer: Peer | None = None
    left_s: float = 0.0  # when its last producer went
    slot: deque[Predict] = field(default_factory=deque)
    predicting: bool = False
    fits: list[Fit] = field(default_factory=list)  # that wait
    fitting: bool = False
    shed: int = 0
    chunk_s: float = 0.0  # of the last samples
    pause_s: float = 0.0  # since then, in turns of the watch
    paused: bool = False  # longer than is usual
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def heard(self, chunk_s: float) -> None:
        """Samples came, so many s of them."""
        if self.paused:
            name = self.session.stream.name
            say(logging.INFO, f"stream {name}: samples again, after {self.pause_s:.0f} s", stream=name)
        self.chunk_s, self.pause_s, self.paused = chunk_s, 0.0, False

    def wait(self, turn_s: float, patience_s: float) -> None:
        """None came in a turn; that is said once, when it has been for `patience_s` and twice as long as the last chunk."""
        self.pause_s += turn_s
        if not self.paused and self.pause_s > max(patience_s, 2 * self.chunk_s):
            self.paused, name = True, self.session.stream.name
            say(logging.WARNING, f"stream {name}: no samples for {self.pause_s:.0f} s", stream=name)

    def stats(self) -> dict:
        """Everything that is counted."""
        own = {"connected": self.peer is not None, "waiting": len(self.slot), "shed": self.shed}
        pause_s = round(max(self.pause_s, 0.0), 1) if self.peer and self.paused else None
        return {**self.session.stats(), **own, "pause_s": pause_s}

    def settle(self) -> None:
        """Say so if everything that came in has been worked off."""
        if self.slot or self.predicting or self.fits or self.fitting:
            self.idle.clear()
        else:
            self.idle.set()

    def want(self, fit: Fit) -> None:
        """Queue a fit; one that is behind is merged with the next."""
        last = self.fits[-1] if self.fits else None
        if fit.groups is not None:  # they hold all there is
            self.fits = [fit]
        elif last and last.groups is None:
            self.fits[-1] = Fit(None, (last.fresh + fit.fresh)[-self.session.most :])
        else:
            self.fits.append(fit)


class Turns:
    """Windows that wait: at most `slots` of a stream, of which the newest stay; streams take turns."""

    def __init__(self, slots: int):
        self.slots, self.lanes = slots, deque()  # lanes with a window that waits, each once

    def put(self, lane: Lane, job: Predict) -> bool:
        """Queue a window; whether an older one had to go."""
        if not lane.slot:
            self.lanes.append(lane)
        full = len(lane.slot) == self.slots
        if full:
            lane.slot.popleft()
            lane.shed += 1
        lane.slot.append(job)
        return full

    def take(self) -> tuple[Lane, Predict] | None:
        """Whose turn it is, and its oldest window."""
        if not self.lanes:
            return None
        lane = self.lanes.popleft()
        job = lane.slot.popleft()
        if lane.slot:
            self.lanes.append(lane)
        return lane, job


class Worker:
    """A thread that runs functions one after the other and hands each result to a function on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str):
        self.loop, self.jobs = loop, queue.SimpleQueue()
        threading.Thread(
            target=self._run, name=name, daemon=True
        ).start()  # a model that hangs must not hinder the exit

    def submit(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Run `work`, which must not raise, then `done` with what it returned."""
        self.jobs.put((work, done))

    def close(self) -> None:
        """Let the thread end once it has done what waits."""
        self.jobs.put(None)

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            work, done = job
            result = work()
            if self.loop.is_closed():
                return
            self.loop.call_soon_threadsafe(done, result)
