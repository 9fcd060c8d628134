"""
How well found seizures match annotated ones, by the rules in use: samples, SzCORE events, NEDC's OVERLAP and TAES.

Seizures are intervals: float64 arrays (n, 2) of start and stop in seconds from the start of the recording. Every rule gives Counts,
which add up over recordings, so that rates are of the whole test set and not means of files.

The rules differ a lot on the same output (SeizureTransformer: 8.6 false alarms a day by SzCORE, 27 by OVERLAP, 137 by TAES), so
print them side by side.
"""

from dataclasses import astuple, dataclass

import numpy as np

BEFORE_S, AFTER_S = 30.0, 60.0  # SzCORE: a detection may come so much before a seizure, or after it
MERGE_S, LONGEST_S = 90.0, 300.0  # SzCORE: events closer than the first are one, longer than the second several
SZCORE_HZ = 10  # SzCORE compares events at this precision
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Counts:
    """Hits and misses of annotated seizures, false alarms, and the seconds looked at; fractions in TAES."""

    hits: float = 0.0
    misses: float = 0.0
    false_alarms: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def sensitivity(self) -> float:
        """Share of what was annotated that was found; NaN where nothing was annotated."""
        return _ratio(self.hits, self.hits + self.misses)

    @property
    def precision(self) -> float:
        """Share of what was found that was annotated; NaN where nothing was found."""
        return _ratio(self.hits, self.hits + self.false_alarms)

    @property
    def f1(self) -> float:
        """Harmonic mean of both; NaN where nothing was annotated or found."""
        return _ratio(2 * self.hits, 2 * self.hits + self.misses + self.false_alarms)

    @property
    def false_alarms_per_day(self) -> float:
        """Of 24 hours looked at."""
        return _ratio(86400 * self.false_alarms, self.seconds)

    def rates(self, prefix: str) -> dict[str, float]:
        """All four, under names that begin alike."""
        names = ("sensitivity", "precision", "f1", "false_alarms_per_day")
        return {f"{prefix}_{name}": getattr(self, name) for name in names}


def sample_counts(reference_N2, found_N2, seconds: float, rate_hz: float = 1.0) -> Counts:
    """Each sample at `rate_hz` counts for itself (SzCORE's sample-based score, Dan 2024)."""
    reference_T, found_T = (mask_of(i, seconds, rate_hz) for i in (reference_N2, found_N2))
    hits, misses, false = (reference_T & found_T).sum(), (reference_T & ~found_T).sum(), (~reference_T & found_T).sum()
    return Counts(float(hits), float(misses), float(false), len(reference_T) / rate_hz)


def szcore_counts(reference_N2, found_N2, seconds: float) -> Counts:
    """
    SzCORE's event-based score (Dan 2024): any overlap with a seizure extended by 30 s before and 60 s after is a hit.

    Events less than 90 s apart are merged, those longer than 5 minutes are cut into pieces, both in the annotation and in what was found.
    """
    last = round(seconds * SZCORE_HZ)
    reference_N2, found_N2 = (split(merge(i, MERGE_S), LONGEST_S) for i in (reference_N2, found_N2))
    wide_N2 = np.clip(reference_N2 + (-BEFORE_S, AFTER_S), 0, seconds)
    wide_N2, found_N2 = (np.clip(np.rint(i * SZCORE_HZ), 0, last) for i in (wide_N2, found_N2))
    touch_NM = overlaps(wide_N2, found_N2) > 0
    hits = touch_NM.any(1).sum()
    return Counts(float(hits), float(len(wide_N2) - hits), float((~touch_NM.any(0)).sum()), last / SZCORE_HZ)


def overlap_counts(reference_N2, found_N2, seconds: float) -> Counts:
    """NEDC's any-overlap score (Ziyabari 2019, OVLP): an annotated seizure that anything found touches is a hit; what touches none is a false alarm."""
    touch_NM = overlaps(merge(reference_N2), merge(found_N2)) > 0
    hits = touch_NM.any(1).sum()
    return Counts(float(hits), float(len(touch_NM) - hits), float((~touch_NM.any(0)).sum()), seconds)


def taes_counts(reference_N2, found_N2, seconds: float) -> Counts:
    """
    NEDC's time-aligned score (Ziyabari 2019, TAES): shares of each seizure's length are hit, missed and falsely alarmed.

    What was found outside a seizure counts up to once the seizure's length; of several seizures under one detection all but the first
    are missed; several detections inside one seizure add up.
    """
    reference_N2, found_N2 = merge(reference_N2), merge(found_N2)
    common_NM = overlaps(reference_N2, found_N2)
    length_N, length_M = np.ptp(reference_N2, axis=1), np.ptp(found_N2, axis=1)
    open_N, open_M = np.ones(len(length_N), bool), np.ones(len(length_M), bool)
    hits = misses = false = 0.0
    for n, m in np.argwhere(common_NM > 0):  # in order of time, as both are sorted
        if not (open_N[n] and open_M[m]):
            continue
        open_N[n] = False
        if found_N2[m, 1] >= reference_N2[n, 1]:
            parts, lost = np.array([m]), open_N & (common_NM[:, m] > 0)
            open_N[lost] = False
            misses += lost.sum()
        else:
            parts = np.flatnonzero(open_M & (common_NM[n] > 0))
        open_M[parts] = False
        hit = common_NM[n, parts].sum() / length_N[n]
        hits, misses = hits + hit, misses + 1 - hit
        false += np.minimum(1, (length_M[parts] - common_NM[n, parts]) / length_N[n]).sum()
    return Counts(hits, misses + open_N.sum(), false + open_M.sum(), seconds)


RULES = {"sample": sample_counts, "szcore": szcore_counts, "overlap": overlap_counts, "taes": taes_counts}


def score(pairs: list[tuple]) -> dict[str, float]:
    """All rules over recordings, given as (annotated (n, 2), found (m, 2), seconds); raises ValueError without an annotated seizure."""
    if not any(len(reference) for reference, _, _ in pairs):
        raise ValueError("no recording has an annotated seizure: sensitivity and F1 would mean nothing")
    return {
        k: v for name, rule in RULES.items() for k, v in sum((rule(*p) for p in pairs), Counts()).rates(name).items()
    }


def merge(intervals_N2, gap_s: float = 0.0) -> np.ndarray:
    """Intervals in order, those less than `gap_s` apart, overlapping or touching made one."""
    table = np.asarray(intervals_N2, np.float64).reshape(-1, 2)
    merged: list[list[float]] = []
    for start, stop in table[np.argsort(table[:, 0], kind="stable")].tolist():
        if merged and (start <= merged[-1][1] or start - merged[-1][1] < gap_s):
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return np.array(merged, np.float64).reshape(-1, 2)


def split(intervals_N2: np.ndarray, longest_s: float) -> np.ndarray:
    """Intervals with the longer ones cut into pieces of `longest_s` and a rest."""
    pieces = []
    for start, stop in intervals_N2.tolist():
        while stop - start > longest_s:
            pieces.append([start, start + longest_s])
            start += longest_s
        pieces.append([start, stop])
    return np.array(pieces, np.float64).reshape(-1, 2)


def overlaps(a_N2: np.ndarray, b_M2: np.ndarray) -> np.ndarray:
    """How much of each interval of one list lies in each of the other (N, M)."""
    start_NM = np.maximum(a_N2[:, None, 0], b_M2[None, :, 0])
    return np.maximum(0.0, np.minimum(a_N2[:, None, 1], b_M2[None, :, 1]) - start_NM)


def mask_of(intervals_N2, seconds: float, rate_hz: float) -> np.ndarray:
    """True at the samples inside intervals, bool (T)."""
    mask_T = np.zeros(round(seconds * rate_hz), bool)
    for start, stop in np.rint(np.asarray(intervals_N2, np.float64).reshape(-1, 2) * rate_hz).astype(np.int64):
        mask_T[max(0, start) : max(0, stop)] = True
    return mask_T


def intervals_of(mask_T: np.ndarray, rate_hz: float) -> np.ndarray:
    """The runs of True in a mask as intervals."""
    edge = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask_T, np.int8), [0]])))
    return edge.reshape(-1, 2) / rate_hz


def detect(
    probability_T: np.ndarray, rate_hz: float, threshold: float, close_s: float, open_s: float, shortest_s: float
) -> np.ndarray:
    """
    Intervals where a probability is at least `threshold`, after filling gaps up to `close_s` and dropping what is shorter than `open_s`.

    Morphological closing, then opening (as SeizureTransformer does, Wu 2025); at last events shorter than `shortest_s` are dropped.
    """
    found_N2 = merge(intervals_of(probability_T >= threshold, rate_hz), close_s + 1e-9)
    return found_N2[np.ptp(found_N2, axis=1) >= max(open_s, shortest_s) - 1e-9]


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


# ----------------------------------------------------------------------------
# from probabilities to events, and to files


def choose_detection(
    probabilities: list[np.ndarray], references: list, seconds: list[float], rate_hz: float
) -> tuple[dict[str, float], float]:
    """
    Threshold and morphology of `detect` of the highest SzCORE F1, and that F1; of several equal ones the best F1 of samples.

    Of equal ones the morphology with most thresholds, and their middle: it is the farthest from doing worse.
    """
    tried = []
    for close_s in (0.0, 2.0, 5.0):
        for shortest_s in (0.0, 2.0, 5.0, 10.0):
            for threshold in THRESHOLDS:
                found = [detect(p, rate_hz, threshold, close_s, shortest_s, shortest_s) for p in probabilities]
                pairs = list(zip(references, found, seconds, strict=True))
                event, sample = (sum((rule(*p) for p in pairs), Counts()).f1 for rule in (szcore_counts, sample_counts))
                tried.append((np.nan_to_num(event), round(np.nan_to_num(sample), 2), threshold, close_s, shortest_s))
    best = max(t[:2] for t in tried)
    alike = [t for t in tried if t[:2] == best]
    close_s, shortest_s = max(
        (t[3:] for t in alike), key=[t[3:] for t in alike].count
    )  # the first of the most frequent
    own = [t[2] for t in alike if t[3:] == (close_s, shortest_s)]
    threshold = own[len(own) // 2]
    return {"threshold": threshold, "close_s": close_s, "open_s": shortest_s, "shortest_s": shortest_s}, float(best[0])


def events_tsv(found_N2: np.ndarray, confidence_N: np.ndarray, seconds: float) -> str:
    """Events as SzCORE's annotation files have them (Dan 2024); a file without a seizure has one row of background."""
    lines = ["onset\tduration\teventType\tconfidence\tchannels\tdateTime\trecordingDuration"]
    for (start, stop), confidence in zip(found_N2, confidence_N, strict=True):
        lines.append(f"{start:.2f}\t{stop - start:.2f}\tsz\t{confidence:.3f}\tn/a\tn/a\t{seconds:.2f}")
    if not len(found_N2):
        lines.append(f"0.00\t{seconds:.2f}\tbckg\tn/a\tn/a\tn/a\t{seconds:.2f}")
    return "\n".join([*lines, ""])
