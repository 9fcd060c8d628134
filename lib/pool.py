"""
Worker processes that may die: a reader that crashes, is killed for memory or hangs costs one recording, not the build.

`concurrent.futures` gives up all pending work when one worker dies, so this is a pool of its own: one pipe per worker, one task at a time.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass
class Crash:
    """A task whose worker died twice, or took too long."""

    code: str  # reader_crashed | out_of_memory | timeout
    reason: str


def _serve(pipe, function: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # the parent is gone, however it died
            return
        try:
            answer = (True, function(task))
        except Exception as error:  # noqa: BLE001 - carried to the parent, which raises it
            answer = (False, error)
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


class _Worker:
    def __init__(self, function: Callable):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.task = None
        self.since = 0.0

    def give(self, task) -> None:
        self.task, self.since = task, time.monotonic()
        self.pipe.send(task)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(function: Callable, tasks: list, workers: int, timeout_s: float) -> Iterator[tuple[object, object]]:
    """
    Yield (task, result) as results come, in any order; a result is what `function` returned, or a Crash.

    An exception that `function` raises ends the run. A task whose worker died is done once more with nothing beside it,
    because what killed it may have been its neighbours' memory.
    """
    waiting, suspects = deque(tasks), deque()
    pool: list[_Worker] = []
    retried = set()
    try:
        while waiting or suspects or any(w.task is not None for w in pool):
            busy = [w for w in pool if w.task is not None]
            if waiting:
                while len(pool) < min(workers, len(waiting) + len(busy)):
                    pool.append(_Worker(function))
                for worker in pool:
                    if worker.task is None and waiting:
                        worker.give(waiting.popleft())
            elif suspects and not busy:
                if not pool:
                    pool.append(_Worker(function))
                retried.add(id(suspects[0]))
                pool[0].give(suspects.popleft())
            busy = [w for w in pool if w.task is not None]
            ready = multiprocessing.connection.wait([w.pipe for w in busy], timeout=1.0)
            for worker in busy:
                late = time.monotonic() - worker.since > timeout_s
                if worker.pipe not in ready and not late:
                    continue
                task = worker.task
                try:
                    if worker.pipe not in ready:
                        raise TimeoutError
                    good, answer = worker.pipe.recv()
                except (EOFError, ConnectionResetError, TimeoutError) as error:
                    worker.stop()
                    pool.remove(worker)
                    if isinstance(error, TimeoutError):
                        yield task, Crash("timeout", f"no result within {timeout_s:.0f} s")
                    elif id(task) in retried:
                        yield task, _obituary(worker.process.exitcode)
                    else:
                        suspects.append(task)
                    continue
                worker.task = None
                if not good:
                    raise answer
                yield task, answer
    finally:
        for worker in pool:
            worker.stop()


def _obituary(exitcode: int) -> Crash:
    if exitcode == -signal.SIGKILL:
        return Crash(
            "out_of_memory",
            "its worker was killed twice, the second time alone (SIGKILL, as the kernel does when memory runs out)",
        )
    name = signal.Signals(-exitcode).name if exitcode < 0 else f"exit status {exitcode}"
    return Crash("reader_crashed", f"its reader ended the process twice ({name})")


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
