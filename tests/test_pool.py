"""Workers that die for real."""

import os
import signal
import time

import pytest

from lib import pool


def task(what):
    kind, value = what
    if kind == "die":
        os.kill(os.getpid(), value)
    if kind == "exit":
        os._exit(value)
    if kind == "sleep":
        time.sleep(value)
    if kind == "raise":
        raise ValueError(value)
    return value * 2


def test_crashes_and_hangs_cost_one_task_each():
    tasks = [("ok", i) for i in range(6)]
    tasks[2:2] = [("die", signal.SIGSEGV), ("exit", 7), ("sleep", 600)]
    done = {t: r for t, r in pool.run(task, tasks, workers=2, timeout_s=4.0)}
    assert {t: r for t, r in done.items() if t[0] == "ok"} == {("ok", i): 2 * i for i in range(6)}
    assert done["die", signal.SIGSEGV].code == "reader_crashed" and "SIGSEGV" in done["die", signal.SIGSEGV].reason
    assert done["exit", 7].code == "reader_crashed" and "status 7" in done["exit", 7].reason
    assert done["sleep", 600].code == "timeout"
    assert len(done) == len(tasks)


def test_kill_is_reported_as_memory_and_an_exception_ends_the_run():
    ((_, crash),) = pool.run(task, [("die", signal.SIGKILL)], workers=1, timeout_s=60.0)
    assert crash.code == "out_of_memory"
    with pytest.raises(ValueError, match="boom"):
        list(pool.run(task, [("raise", "boom")], workers=1, timeout_s=60.0))
    assert list(pool.run(task, [], workers=2, timeout_s=1.0)) == []
