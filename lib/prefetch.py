"""
The next step's batch is made in a thread while this step computes. What a batch holds depends on its step alone, so it stays exact.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class Prefetch:
    """`draw(step)` for step = first, first + 1, … last - 1, at most `depth` ahead; errors are raised where the batch is asked for."""

    def __init__(self, draw: Callable[[int], Any], first: int, last: int, depth: int = 2):
        self.waited_s = 0.0
        self._queue: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(draw, first, last), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, draw: Callable[[int], Any], first: int, last: int) -> None:
        for step in range(first, last):
            try:
                item, error = draw(step), None
            except Exception as caught:  # noqa: BLE001 (raised again by next())
                item, error = None, caught
            while not self._closed.is_set():
                try:
                    self._queue.put((item, error), timeout=0.1)
                    break
                except queue.Full:
                    continue
            if error or self._closed.is_set():
                return

    def next(self) -> Any:
        """The batch of the next step; the time spent waiting for it is added to `waited_s`."""
        started = time.perf_counter()
        item, error = self._queue.get()
        self.waited_s += time.perf_counter() - started
        if error:
            raise error
        return item

    def close(self) -> None:
        """End the thread, whatever it is doing."""
        self._closed.set()
        self._thread.join()
