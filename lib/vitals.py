"""
How the service is doing: latency histograms, counters, and complaints that don't repeat themselves.

A histogram has eight bins per octave from 1 us to 134 s, 216 integers: a percentile is read off to 9 % at any length of run.
"""

import math
import time
from collections import Counter

OCTAVES, PARTS = 27, 8


class Histogram:
    """Durations by logarithm; `add` is some hundred ns."""

    def __init__(self):
        self.bins, self.count, self.total_s, self.longest_s = [0] * (OCTAVES * PARTS), 0, 0.0, 0.0

    def add(self, seconds: float) -> None:
        """Count one duration; what is below 1 us or above 134 s goes to the first or last bin."""
        mantissa, exponent = math.frexp(max(seconds * 1e6, 1.0))  # mantissa from 1/2 to 1
        place = (exponent - 1) * PARTS + int((mantissa - 0.5) * 2 * PARTS)
        self.bins[min(place, OCTAVES * PARTS - 1)] += 1
        self.count += 1
        self.total_s += seconds
        self.longest_s = max(self.longest_s, seconds)

    def percentile(self, share: float) -> float | None:
        """The duration (s) that `share` of all don't exceed: the upper edge of its bin; None of none."""
        left = max(1, math.ceil(share * self.count))
        for place, n in enumerate(self.bins):
            left -= n
            if left <= 0 and self.count:
                octave, part = divmod(place, PARTS)
                return min(2.0**octave * (1 + (part + 1) / PARTS) * 1e-6, max(self.longest_s, 1e-6))
        return None

    def summary(self) -> dict:
        """For a stats line, ms."""
        ms = lambda s: None if s is None else round(s * 1e3, 3)  # noqa: E731
        mean_s = self.total_s / self.count if self.count else None
        quantiles = {
            f"p{name}_ms": ms(self.percentile(share)) for name, share in (("50", 0.5), ("99", 0.99), ("999", 0.999))
        }
        return {"count": self.count, "mean_ms": ms(mean_s), **quantiles, "max_ms": ms(self.longest_s)}


class Vitals:
    """What `stats` and `health` report; written to by the event loop only."""

    SPANS = ("ingest", "queue", "inference", "total")

    def __init__(self):
        self.began_s = time.monotonic()
        self.spans = {name: Histogram() for name in self.SPANS}
        self.counts: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()  # windows without a prediction, by reason
        self.closed: Counter[str] = Counter()  # connections, by why they ended
        self.inference_s = 0.0  # of a window, moving mean

    def predicted(self, queue_s: float, inference_s: float, total_s: float) -> None:
        """A window that went through the model."""
        self.spans["queue"].add(queue_s)
        self.spans["inference"].add(inference_s)
        self.spans["total"].add(total_s)
        self.inference_s += (inference_s - self.inference_s) * (0.05 if self.counts["predicted"] else 1.0)
        self.counts["predicted"] += 1

    def budget(self, windows_per_s: float) -> float:
        """Share of the time that predicting so many windows takes; above 1 some must be shed."""
        return self.inference_s * windows_per_s

    def summary(self) -> dict:
        """For a stats line."""
        return {
            "uptime_s": round(time.monotonic() - self.began_s, 3),
            "latency": {name: h.summary() for name, h in self.spans.items()},
            "counts": dict(sorted(self.counts.items())),
            "skipped": dict(sorted(self.skipped.items())),
            "closed": dict(sorted(self.closed.items())),
        }


class Seldom:
    """Lets a complaint through once a period and says how many were held back since."""

    def __init__(self, period_s: float = 10.0, most: int = 256):
        self.period_s, self.most = period_s, most
        self.last: dict[str, tuple[float, int]] = {}  # key: when it was let through, held back since

    def __call__(self, key: str, now_s: float | None = None) -> int | None:
        """None while `key` has to wait, else how often it was held back."""
        now_s = time.monotonic() if now_s is None else now_s
        last_s, held = self.last.get(key, (-math.inf, 0))
        if now_s - last_s < self.period_s:
            self.last[key] = (last_s, held + 1)
            return None
        if key not in self.last and len(self.last) >= self.most:  # keys may come from outside
            self.last.clear()
        self.last[key] = (now_s, 0)
        return held


HIGH_BUDGET = 0.75  # of the time between windows: BCI2000's rule for when to worry


def health(stats: dict, problems: list[str], stopping: bool) -> dict:
    """
    A health line from a stats line: ready when the model is warm and a producer is there, degraded when something is wrong.

    `problems` are those that no number shows.
    """
    missing = [] if stats["warm"] else ["the model is not warm yet"]
    missing += [] if any(s["connected"] for s in stats["streams"]) else ["no producer"]
    pauses = {s["name"]: s["pause_s"] for s in stats["streams"] if s["pause_s"] is not None}
    problems = [*missing, *problems, *(f"stream {name}: no samples for {s:.0f} s" for name, s in pauses.items())]
    if stats["budget"] > HIGH_BUDGET:
        problems.append(f"predicting takes {stats['budget']:.0%} of the time between windows")
    if stats["predicting_s"] > 5:
        problems.append(f"the model has not answered for {stats['predicting_s']:.0f} s")
    ready = not missing and not stopping
    status = "stopping" if stopping else "waiting" if missing else "degraded" if problems else "ready"
    return {"type": "health", "status": status, "ready": ready, "problems": problems}


def live_line(stats: dict) -> str:
    """A stats line for a person: windows, latency, what was lost, and the channels that look bad."""
    total, counts = stats["latency"]["total"], stats["counts"]
    times = f" {total['p50_ms']:.1f}/{total['p99_ms']:.1f} ms" if total["count"] else ""  # p50, p99
    words = [f"{counts.get('predicted', 0)} windows{times}"]
    words += [f"{sum(stats['skipped'].values())} null, {counts.get('shed', 0)} shed", f"busy {stats['budget']:.0%}"]
    for stream in stats["streams"]:
        if stream["connected"]:
            still = stream["pause_s"] is not None
            said = f"no samples for {stream['pause_s']:.0f} s" if still else _bad_channels(stream["quality"])
            words.append(f"{stream['name']} {stream['state']}: {said}")
    return " | ".join(words)


def _bad_channels(quality: dict[str, dict]) -> str:
    """Which channels look bad, and why."""
    bad = [f"{name} {kind}" for name, q in quality.items() for kind in ("flat", "clipped") if q[kind]]
    bad += [f"{name} line {q['line']:.0%}" for name, q in quality.items() if q["line"] > 0.5 and not q["flat"]]
    return ", ".join(bad[:6]) + (f" and {len(bad) - 6} more" if len(bad) > 6 else "") or f"{len(quality)} good"
