"""
A mock amplifier: endless synthetic EEG whose truth is known, with blinks, eye movements, alpha while the eyes are closed, and markers.

The same seed gives the same samples whatever the chunks. SCRIPT is a session as the service's states expect one; CYCLE follows for ever.

Shapes: T samples, C channels.
"""

from collections.abc import Iterator

import numpy as np
from scipy import signal

from lib import wire
from lib.channels import POSITIONS
from lib.errors import Unusable
from lib.producer import Pace, Persistent, Producer, acknowledged, chunk_samples, reaching

CHANNELS = ("Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8", "C3", "Cz", "C4", "P3", "Pz", "P4", "O1", "Oz", "O2")
SCRIPT = (  # seconds, marker, what the eyes do
    (2, "IDLE", "open"),
    (2, "EYE_WARMUP_DESC", "open"),
    (8, "EYE_WARMUP_BLINK", "blink"),
    (2, "EYE_WARMUP_TEXT", "open"),
    (8, "EYE_WARMUP_MOVE", "move"),
    (16, "BACKGROUND", "open"),
    (2, "INFERENCE", "open"),
)
CYCLE = ((8, "eyes_closed", "closed"), (8, "eyes_open", "open"))

BACKGROUND_UV = (
    (0.3, 6.0),
    (0.05, 6.0),
    (0.01, 5.0),
)  # time constant (s) and rms of the parts that make up the 1/f background
SENSOR_UV, LINE_UV, LINE_HZ = 1.0, 2.0, 50.0
ALPHA_UV, ALPHA_HZ, ALPHA_WIDTH_HZ, ALPHA_RISE_S = 20.0, 10.0, 1.0, 0.3  # rms over the occiput with eyes closed
BLINK_UV, BLINK_S, BLINKS_PER_S = 200.0, 0.06, 0.25  # height at the forehead, standard deviation of its course
MOVE_UV, MOVE_S = 80.0, 1.0  # height beside the eye, how long the eyes stay away
SPREAD_M = 0.05  # how far from its electrodes an activity reaches


class Amplifier:
    """
    The signal. `alpha` and `eyes` can be set at any time, `blink` and `look` called, and hold from the next sample on.

    `truth` keeps the last of what was done, as (sample, "blink" | "left" | "right" | "closed" | "open").
    """

    def __init__(self, channels: tuple[str, ...] = CHANNELS, rate_hz: float = 250.0, seed: int = 0):
        self.channels, self.rate_hz, self.seq = channels, rate_hz, 0
        self.truth: list[tuple[int, str]] = []
        self._noise, self._chance = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
        C = len(channels)
        self._background = [_smooth(seconds * rate_hz, C) for seconds, _ in BACKGROUND_UV]
        radius = np.exp(-np.pi * ALPHA_WIDTH_HZ / rate_hz)
        self._rhythm = _Recursion(np.sqrt(1 - radius**2), complex(radius * np.exp(2j * np.pi * ALPHA_HZ / rate_hz)), 1)
        rise = float(np.exp(-1 / (ALPHA_RISE_S * rate_hz)))
        self._level, self.alpha = _Recursion(1 - rise, rise, 1), False
        self._occiput_C, self._forehead_C = _reach(channels, "O1", "O2"), _reach(channels, "Fp1", "Fp2")
        self._eyes_C = _reach(channels, "F8") - _reach(channels, "F7")
        self._bumps: list[tuple[int, np.ndarray, np.ndarray]] = []  # first sample, its course, its channels
        self._next_blink = self._wait()

    def blink(self) -> None:
        """Blink now."""
        self._blink(self.seq)

    def look(self, right: bool) -> None:
        """Look to one side for a while, now."""
        self._note(self.seq, "right" if right else "left")
        sign = 1 if right else -1
        self._bumps.append((self.seq, sign * MOVE_UV * np.ones(round(MOVE_S * self.rate_hz)), self._eyes_C))

    def close_eyes(self, closed: bool) -> None:
        """Alpha rises while they are closed, and nobody blinks."""
        if closed != self.alpha:
            self._note(self.seq, "closed" if closed else "open")
        self.alpha = closed

    def take(self, samples: int) -> np.ndarray:
        """The next x_TC, float32, in microvolts."""
        stop, C = self.seq + samples, len(self.channels)
        while self._next_blink < stop:
            if not self.alpha:
                self._blink(self._next_blink)
            self._next_blink += self._wait()
        white_TK = self._noise.standard_normal((samples, (len(BACKGROUND_UV) + 1) * C + 1))
        x_TC = SENSOR_UV * white_TK[:, :C]
        for i, ((_, uv), part) in enumerate(zip(BACKGROUND_UV, self._background, strict=True)):
            x_TC += uv * part(white_TK[:, (i + 1) * C : (i + 2) * C])
        level_T1 = self._level(np.full((samples, 1), float(self.alpha)))
        x_TC += np.sqrt(2) * ALPHA_UV * level_T1 * self._rhythm(white_TK[:, -1:]).real * self._occiput_C
        index_T = np.arange(self.seq, stop)
        x_TC += np.sqrt(2) * LINE_UV * np.sin(2 * np.pi * LINE_HZ / self.rate_hz * index_T)[:, None]
        for first, course_T, reach_C in self._bumps:
            begin, end = max(first, self.seq), min(first + len(course_T), stop)
            if begin < end:
                x_TC[begin - self.seq : end - self.seq] += course_T[begin - first : end - first, None] * reach_C
        self._bumps = [bump for bump in self._bumps if bump[0] + len(bump[1]) > stop]
        self.seq = stop
        return x_TC.astype(np.float32)

    def _wait(self) -> int:
        return 1 + round(self._chance.exponential(self.rate_hz / BLINKS_PER_S))

    def _blink(self, first: int) -> None:
        self._note(first, "blink")
        t_T = np.arange(round(8 * BLINK_S * self.rate_hz)) / self.rate_hz - 4 * BLINK_S
        self._bumps.append((first, BLINK_UV * np.exp(-0.5 * (t_T / BLINK_S) ** 2), self._forehead_C))

    def _note(self, seq: int, what: str) -> None:
        self.truth = [*self.truth[-999:], (seq, what)]


class _Recursion:
    """y[t] = gain x[t] + keep y[t - 1] down the rows, however they are cut."""

    def __init__(self, gain: float, keep: complex, columns: int):
        self._gain, self._keep, self._state = [gain], [1.0, -keep], np.zeros((1, columns), type(keep))

    def __call__(self, x_TN: np.ndarray) -> np.ndarray:
        y_TN, self._state = signal.lfilter(self._gain, self._keep, x_TN, axis=0, zi=self._state)
        return y_TN


def _smooth(samples: float, columns: int) -> _Recursion:
    """White noise to noise of the same power that forgets over so many samples."""
    keep = float(np.exp(-1 / samples))
    return _Recursion(np.sqrt(1 - keep**2), keep, columns)


def _reach(channels: tuple[str, ...], *sources: str) -> np.ndarray:
    """How strongly each channel sees what happens at some electrodes; one whose place is unknown sees nothing."""
    return np.array(
        [
            max(
                np.exp(-0.5 * (np.linalg.norm(np.subtract(POSITIONS[c], POSITIONS[s])) / SPREAD_M) ** 2)
                for s in sources
            )
            if c in POSITIONS
            else 0.0
            for c in channels
        ]
    )


def session(amplifier: Amplifier, chunk: int, script=SCRIPT, cycle=CYCLE) -> Iterator[wire.Samples | wire.Event]:
    """What the amplifier sends: the script once, then the cycle for ever; every marker before the chunk that holds its sample."""
    rate_hz, steps = amplifier.rate_hz, list(script)
    while True:
        for seconds, code, eyes in steps:
            stop = amplifier.seq + round(seconds * rate_hz)
            yield wire.Event(amplifier.seq, amplifier.seq / rate_hz, code)
            amplifier.close_eyes(eyes == "closed")
            since = 0
            while amplifier.seq < stop:
                if eyes in ("blink", "move") and since % round(2 * rate_hz) == 0:
                    amplifier.blink() if eyes == "blink" else amplifier.look(since // round(2 * rate_hz) % 2 == 0)
                first = amplifier.seq
                until = (
                    stop
                    if eyes in ("open", "closed")
                    else min(stop, first + round(2 * rate_hz) - since % round(2 * rate_hz))
                )
                x_TC = amplifier.take(min(chunk, until - first))
                since += len(x_TC)
                yield wire.Samples(first, amplifier.seq / rate_hz, x_TC)
        steps = cycle or steps


def run(
    address: tuple[str, int], channels: tuple[str, ...] = CHANNELS, rate_hz: float = 250.0, seconds: float = 0.0,
    speed: float = 1.0, seed: int = 0, chunk: int = 0, framing: str = "binary", name: str = "amplifier",
    token: str | None = None, tls: str | None = None,
) -> dict:  # fmt: skip
    """
    Send `seconds` of it (0: without end) at `speed` times real time, 0 as fast as the service acknowledges, and return what was sent.

    A service that goes away is called again for ever; what was made meanwhile is lost, and missing in seq.
    Raises Unusable: the service refuses the stream, or isn't there to begin with.
    """
    if not (rate_hz > 0 and speed >= 0 and seconds >= 0 and channels):
        raise Unusable(
            f"--rate-hz {rate_hz:g}, --speed {speed:g}: a mock amplifier needs channels, a rate above 0 and no negative times"
        )
    amplifier, pace = Amplifier(channels, rate_hz, seed), Pace(speed)
    stream = wire.Stream(name, channels, rate_hz, "uV", framing)
    with reaching(address):
        link = (Persistent if speed else Producer)(address, stream, token, tls)
        with link:
            since = 0
            for item in session(amplifier, chunk_samples(chunk, rate_hz, speed)):
                if seconds and item.seq >= seconds * rate_hz:
                    break
                if isinstance(item, wire.Event):
                    link.event(*item)
                    continue
                pace.wait(item.t, [link])
                link.samples(*item)
                since = acknowledged(link, since + len(item.x_TC)) if not speed else 0
            link.ack()
    totals = {"stream": name, "samples": link.samples_sent, "events": link.events_sent, "late_s": round(pace.late_s, 4)}
    return totals | ({"lost": link.samples_lost, "reconnects": link.reconnects} if speed else {})
