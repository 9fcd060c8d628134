"""A real LSL outlet in a process of its own, told by lines what to push: `python -m tests.outlet NAME TYPE SOURCE_ID RATE CHANNELS…`."""

import subprocess
import sys

from tests.recipes import ROOT


class Outlet:
    """Starts one; `push` returns when liblsl has taken it; `kill` is what a crash does."""

    def __init__(
        self, name: str, kind: str, source_id: str, rate_hz: float, channels: tuple[str, ...], unit: str = "microvolts"
    ):
        words = [sys.executable, "-m", "tests.outlet", name, kind, source_id, str(rate_hz), unit, *channels]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.line()

    def line(self, text: str | None = None) -> str:
        """Say something and return the answer."""
        if text:
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the outlet died"
        return answer.strip()

    def push(self, first: int, count: int, stamp: float) -> None:
        """Samples first … first + count - 1: channel c of sample i is i + c / 8; the last has `stamp`."""
        self.line(f"push {first} {count} {stamp!r}")

    def mark(self, code: str, stamp: float) -> None:
        """Push a marker."""
        self.line(f"mark {stamp!r} {code}")

    def clock(self) -> float:
        """LSL's clock."""
        return float(self.line("clock"))

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def main(name: str, kind: str, source_id: str, rate_hz: str, unit: str, *names: str) -> None:
    """Serve the lines of stdin."""
    import numpy as np

    from lib import lsl

    pylsl = lsl.load()
    markers = kind == "Markers"
    form = "string" if markers else "float32"
    info = pylsl.StreamInfo(name, kind, len(names), float(rate_hz), form, source_id)
    if not markers:
        info.set_channel_labels(list(names))
        info.set_channel_types("EEG")
        info.set_channel_units(unit)
    outlet = pylsl.StreamOutlet(info)
    print("ready", flush=True)
    for line in sys.stdin:
        word, *rest = line.split(maxsplit=3)
        if word == "push":
            first, count, stamp = int(rest[0]), int(rest[1]), float(rest[2])
            x_TC = np.arange(first, first + count)[:, None] + np.arange(len(names)) / 8
            outlet.push_chunk(x_TC.astype(np.float32), stamp)
        elif word == "mark":
            outlet.push_sample([" ".join(rest[1:]).strip()], float(rest[0]))
        elif word == "consumers":
            assert outlet.wait_for_consumers(300)
        print(pylsl.local_clock(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
