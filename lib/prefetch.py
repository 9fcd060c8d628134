"""
The next step's batch is made in a thread while this step computes. What a batch holds depends on its step alone, so it stays exact.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from threadpoolctl import threadpool_limits


class Prefetch:
    """
    Pairs of step and `draw(step)` for step = first, first + 1, … last - 1, at most `depth` ahead.

    Errors are raised where the batch is asked for. `seek` makes the same loop go on from another step. Where steps compute on the CPU (`shares`),
    batches are drawn by an eighth of the threads: two teams of threads on the same cores wait for each other at every operation.
    """

    def __init__(self, draw: Callable[[int], Any], first: int, last: int, depth: int = 2, shares: bool = False):
        self.waited_s = 0.0
        self._draw, self._last, self._depth, self._shares = draw, last, depth, shares
        self._start(first)

    def _start(self, first: int) -> None:
        self._step = first
        self._queue: queue.Queue = queue.Queue(self._depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(first,), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, first: int) -> None:
        threads = (
            torch.get_num_threads()
        )  # the first question in a thread gives it all of them: so before they are limited
        with threadpool_limits(max(threads // 8, 1) if self._shares else None, "openmp"):
            self._fill(first)

    def _fill(self, first: int) -> None:
        for step in range(first, self._last):
            try:
                item, error = self._draw(step), None
            except Exception as caught:  # noqa: BLE001 (raised again where the batch is asked for)
                item, error = None, caught
            while not self._closed.is_set():
                try:
                    self._queue.put((item, error), timeout=0.1)
                    break
                except queue.Full:
                    continue
            if error or self._closed.is_set():
                return

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        """The next step and its batch; the time spent waiting for it is added to `waited_s`."""
        if self._step >= self._last:
            raise StopIteration
        started = time.perf_counter()
        item, error = self._queue.get()
        self.waited_s += time.perf_counter() - started
        if error:
            raise error
        self._step += 1
        return self._step - 1, item

    def seek(self, step: int) -> None:
        """Go on from `step`; what was drawn ahead is dropped, and drawn anew."""
        self.close()
        self._start(step)

    def close(self) -> None:
        """End the thread, whatever it is doing."""
        self._closed.set()
        self._thread.join()
