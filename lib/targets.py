"""
What is to be predicted, and from which windows: columns, event labels, the two tasks of the EEG Challenge 2025, seizures.

    challenge1         response time (s), from windows that begin 0.5 s after the stimulus of a contrast-change trial; 2 s are the rule
    challenge2         externalizing factor of a subject, from windows of any task, averaged per subject to be scored
    NAME               a column: age, sex, task, fault …; or an event label: its value (where events have one), or whether it is going on
    NAME+NAME          which of these events a window follows or lies in
    seizure            whether each stretch of a window is a seizure

`NAME:regression` and `NAME:classification` override what the values look like.

Examples are windows with a value per target, missing ones NaN. Those of columns are windows all along recordings, of which nothing is
stored but a table by recording; those of events are listed, a few numbers per event.

Shape letters: R recordings of a cache, B examples, K targets, N listed examples, I intervals, S stretches of a window.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lib.cache import Cache
from lib.errors import Unusable
from lib.samplers import derive, key, mix
from lib.traits import KINDS, Trait, class_name, is_quantity, number
from lib.windows import SEIZURE

DELAY_S = 0.5  # challenge1: from the stimulus to the window
WINDOW_S = {
    "challenge1": 2.0,
    "challenge2": 2.0,
    "seizure": 16.0,
}  # the length of windows if nothing else is said, else 4 s
UNITS = {"age": "years", "challenge1": "s", "stimulus": "s", "response": "s"}
NOT_TARGETS = {"subject", "dataset", "split", "session", "run"}  # who and where, not what
THINNED = 64  # times as many examples as wanted are looked at for those with a value
OTHER = "other"  # the class of what lies between the events of a single label


@dataclass(frozen=True)
class Target(Trait):
    """What is to be predicted, as it is stored in a model: the values' meaning (Trait), where they come from, what one score is of."""

    source: str = "column"  # column, event, seizure
    labels: tuple[str, ...] = ()  # the column, or the labels of events
    after_s: float = 0.0  # from an event's onset to its window
    unit: str = ""
    shares: tuple[float, ...] = ()  # of the classes among the training examples
    scored_by: str = "window"  # or subject: predictions for a subject's windows are averaged
    timed: bool = (
        False  # the value is a time after the event: a window that is moved by so much has one that is so much smaller
    )

    @property
    def kind(self) -> str:
        """regression or classification."""
        return KINDS[bool(self.classes)]

    def decode(self, standard_B: np.ndarray) -> np.ndarray:
        """Standardised numbers in the target's own unit."""
        return standard_B * self.std + self.mean


def parse_word(cache: Cache, word: str) -> tuple[str, str, str, tuple[str, ...]]:
    """Name, kind asked for (or ""), source and labels of a target as it is written on the command line. Raises Unusable."""
    name, _, kind = word.rpartition(":")
    name, kind = (name, kind) if kind in KINDS else (word, "")
    task = {"task"} if any(task is not None for task in cache.column("task")) else set()
    columns = sorted({*cache.columns(), *task} - NOT_TARGETS)
    known = {"challenge1": ("event", ("stimulus",)), "challenge2": ("column", ("externalizing",))}
    known |= {SEIZURE: (SEIZURE, (SEIZURE,))} | {column: ("column", (column,)) for column in columns}
    source, labels = known.get(name, ("event", tuple(name.split("+"))))
    there = columns if source == "column" else cache.labels()
    missing = [label for label in labels if label not in there]
    if missing:
        raise Unusable(
            f"--target {word}: no {missing[0]} in {', '.join(map(str, cache.paths))}; there are columns: {', '.join(columns) or 'none'}; "
            f"events: {', '.join(cache.labels()) or 'none'}"
        )
    return name, kind, source, labels


def read_targets(
    cache: Cache,
    words: Sequence[str],
    rows: Sequence[int],
    samples: int,
    after_s: float = 0.0,
    event_s: float = 0.0,
    scored_by: str = "auto",
) -> list[Target]:
    """
    The targets `words`, standardised over the training recordings `rows`; a subject counts once per value of a column.

    Raises Unusable for what isn't there, can't be learned (one value, no number), or doesn't go together.
    """
    targets = []
    for word in words:
        name, kind, source, labels = parse_word(cache, word)
        if name in {t.name for t in targets}:
            raise Unusable(f"--target {word}: expected each target once")
        target = Target(name, source=source, labels=labels, unit=UNITS.get(name, ""))
        if source == SEIZURE:
            if len(words) > 1:
                raise Unusable(
                    "--target seizure needs an output per stretch of a window and can't go with other targets"
                )
            targets.append(replace(target, classes=("background", SEIZURE), weights=(1.0, 1.0)))
            continue
        subject = [r.subject for r in cache.recordings]
        if source == "event":
            timed = name == "challenge1"
            target = replace(target, after_s=DELAY_S if timed else after_s, timed=timed)
            row_N, _, values = event_examples(cache, target, rows, samples, event_s)
            found = [(subject[row], value) for row, value in zip(row_N, values, strict=True)]
            alone = False
        else:
            column = cache.column(labels[0])
            found = sorted({(subject[i], column[i]) for i in rows if class_name(column[i]) is not None}, key=str)
            alone = max(Counter(s for s, _ in found).values(), default=2) == 1
        by = ("subject" if alone else "window") if scored_by == "auto" else scored_by
        kind = kind or ("regression" if name.startswith("challenge") else KINDS[not is_quantity([v for _, v in found])])
        targets.append(replace(_fitted(target, word, found, kind), scored_by=by))
    return targets


def _fitted(target: Target, word: str, found: list[tuple[str, object]], kind: str) -> Target:
    """The target with the classes, or the mean and deviation, of the values found in the training recordings."""
    values = [v for _, v in found]
    if kind == "regression":
        odd = [v for v in values if number(v) is None]
        if odd:
            raise Unusable(f"--target {word}: {odd[0]!r} is no number; say {target.name}:classification")
        numbers = np.sort([number(v) for v in values])
        if len(set(numbers)) < 2:
            raise Unusable(f"--target {word}: {len(set(numbers))} distinct values in training: nothing to learn")
        return replace(target, mean=float(numbers.mean()), std=float(numbers.std()))
    classes = tuple(sorted({class_name(v) for v in values}))
    if len(classes) < 2:
        raise Unusable(
            f"--target {word}: training has {len(classes)} class ({', '.join(classes) or 'none'}), two are needed"
        )
    return replace(target, classes=classes, weights=(1.0,) * len(classes))


def event_examples(
    cache: Cache, target: Target, rows: Iterable[int], samples: int, event_s: float = 0.0
) -> tuple[np.ndarray, np.ndarray, list]:
    """
    Recording, first sample and raw value of every window that belongs to an event of the target's labels in recordings `rows`.

    One window per event, as many side by side as fit into one that lasts longer (`event_s` for those that say nothing). The value is
    the label where there are several, else the event's own, else the label or `other` for windows between events. challenge1: only
    trials answered before the next stimulus. Events whose window would leave its segment are left out.
    """
    row_N, start_N, values = [], [], []
    for row in rows:
        r = cache.recordings[row]
        events = [e for e in cache.events(row) if e.label in target.labels]
        numbered = any(np.isfinite(e.value) for e in events)
        spans = []
        for i, e in enumerate(events):
            value = e.label if len(target.labels) > 1 or not numbered else number(e.value)
            later = events[i + 1].onset_s if i + 1 < len(events) else np.inf
            if value is None or (target.name == "challenge1" and not 0 < value < later - e.onset_s):
                continue
            spans.append((e.onset_s, e.onset_s + (e.duration_s or event_s), value))
        if len(target.labels) == 1 and not numbered:
            spans += [(start, stop, OTHER) for start, stop in _between(spans, r.samples / cache.rate_hz)]
        for onset_s, stop_s, value in spans:
            first, stop = (round(t * cache.rate_hz) for t in (onset_s + target.after_s, stop_s))
            for k in range(max(1, (stop - first) // samples)):
                row_N.append(row)
                start_N.append(first + k * samples)
                values.append(value)
    row_N, start_N = np.array(row_N, np.int64), np.array(start_N, np.int64)
    order = np.lexsort((start_N, row_N))
    order = order[cache.holds(row_N, start_N, samples)[order]]
    return row_N[order], start_N[order], [values[i] for i in order]


def _between(spans: list[tuple], seconds: float) -> list[tuple[float, float]]:
    """What lies between intervals that last."""
    edges = sorted((start, stop) for start, stop, _ in spans if stop > start)
    starts = [0.0, *np.maximum.accumulate([stop for _, stop in edges])] if edges else []
    return [(a, b) for a, b in zip(starts, [*(s for s, _ in edges), seconds], strict=True) if b > a] if edges else []


class Coverage:
    """How much of any stretch of a recording is covered by the events of a label; a search per stretch."""

    def __init__(self, cache: Cache, label: str):
        row_I, start_I, stop_I = cache.intervals(label)
        self.longest = 1.0 + max(r.samples for r in cache.recordings) / cache.rate_hz
        self.key_I, self.length_I = row_I * self.longest + start_I, stop_I - start_I
        self.before_I = np.cumsum(self.length_I) - self.length_I

    def __call__(self, row_B: np.ndarray, start_s_B: np.ndarray, stop_s_B: np.ndarray) -> np.ndarray:
        """Seconds covered from start to stop."""
        if not len(self.key_I):
            return np.zeros(np.broadcast_shapes(np.shape(row_B), np.shape(start_s_B)))
        until_start, until_stop = (self._until(row_B * self.longest + t) for t in (start_s_B, stop_s_B))
        return until_stop - until_start

    def _until(self, key_B: np.ndarray) -> np.ndarray:
        i_B = np.searchsorted(self.key_I, key_B, side="right") - 1
        inside_B = np.minimum(key_B - self.key_I[i_B], self.length_I[i_B])
        return np.where(i_B < 0, 0.0, self.before_I[i_B] + inside_B)


class Examples:
    """
    Windows to learn from or to be scored on, with a value per target; ids 0 … n-1: windows along recordings first, then listed ones.

    `rows` are recordings; those that have no value for any target are left out. Raises Unusable if nothing is left.
    """

    def __init__(
        self,
        cache: Cache,
        targets: Sequence[Target],
        rows: Sequence[int],
        window_s: float,
        stride_s: float,
        event_s: float = 0.0,
    ):
        self.cache, self.targets, self.samples = cache, list(targets), round(window_s * cache.rate_hz)
        self.table_RK = np.full((len(cache.recordings), len(targets)), np.nan, np.float32)
        listed: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
        self.unknown: dict[str, list[str]] = {}  # classes there are that training lacked, by target: left out
        for k, target in enumerate(targets):
            if target.source == "column":
                column = cache.column(target.labels[0])
                values = [column[i] for i in rows]
                self.table_RK[rows, k] = [target.encode(v) for v in values]
            elif target.source == "event":
                row_N, start_N, values = event_examples(cache, target, rows, self.samples, event_s)
                listed.append((k, row_N, start_N, np.array([target.encode(v) for v in values], np.float32)))
            else:
                continue
            if target.classes and (new := {class_name(v) for v in values} - {None, *target.classes}):
                self.unknown[target.name] = sorted(new)
        self.coverage = Coverage(cache, SEIZURE) if any(t.source == SEIZURE for t in targets) else None
        along = [i for i in rows if self.coverage or np.isfinite(self.table_RK[i]).any()]
        self.windows = cache.windows(None, window_s, stride_s, along) if along else None
        self.along = len(self.windows) if self.windows else 0
        self._list(listed)
        self.rows = sorted({*along, *self.row_N.tolist()})  # recordings that examples are of
        if not len(self):
            names = ", ".join(t.name for t in targets)
            words = f"--target {names}: none of {len(rows)} recordings has a value, or a window long enough for one"
            for name, new in self.unknown.items():
                words = f"--target {name}: {len(rows)} recordings are of {', '.join(new)}, classes that training doesn't have"
                words += f"; if it is a quantity, say {name}:regression" * all(number(v) is not None for v in new)
            raise Unusable(words)

    def _list(self, listed: list[tuple]) -> None:
        """Listed examples sorted by recording and time; a window that several targets list is one example."""
        keys = np.concatenate([np.stack([row_N, start_N], 1) for _, row_N, start_N, _ in listed] or [np.empty((0, 2))])
        unique_N2, place = np.unique(keys.astype(np.int64), axis=0, return_inverse=True)
        self.row_N, self.start_N = unique_N2[:, 0], unique_N2[:, 1]
        self.value_NK = np.full((len(unique_N2), len(self.targets)), np.nan, np.float32)
        first = 0
        for k, row_N, _, value_N in listed:
            self.value_NK[place.reshape(-1)[first : first + len(row_N)], k] = value_N
            first += len(row_N)
        known_N = np.isfinite(self.value_NK).any(1)
        self.row_N, self.start_N, self.value_NK = self.row_N[known_N], self.start_N[known_N], self.value_NK[known_N]

    def __len__(self) -> int:
        return self.along + len(self.row_N)

    def locate(self, ids) -> tuple[np.ndarray, np.ndarray]:
        """Row of `cache.recordings` and first sample of each example."""
        ids = np.asarray(ids, np.int64)
        row_B, start_B, along_B = np.empty_like(ids), np.empty_like(ids), ids < self.along
        if along_B.any():
            row_B[along_B], start_B[along_B] = self.windows.locate(ids[along_B])
        listed_B = ids[~along_B] - self.along
        row_B[~along_B], start_B[~along_B] = self.row_N[listed_B], self.start_N[listed_B]
        return row_B, start_B

    def values(self, ids) -> np.ndarray:
        """Encoded values (class numbers, standardised numbers), float32 (B, K); NaN where missing."""
        ids = np.asarray(ids, np.int64)
        value_BK = self.table_RK[self.locate(ids)[0]]
        listed_B = ids >= self.along
        own_NK = self.value_NK[ids[listed_B] - self.along]
        value_BK[listed_B] = np.where(np.isfinite(own_NK), own_NK, value_BK[listed_B])
        return value_BK

    def moved(
        self, ids: np.ndarray, most_s: float, seed: int, step: int, index_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Recording, first sample and encoded values of examples, those with a time for a value moved by up to `most_s` either way.

        How far depends on (seed, step, place in the global batch). Windows that would leave their segment stay.
        """
        row_B, start_B = self.locate(ids)
        value_BK, rate_hz = self.values(ids), self.cache.rate_hz
        timed = [k for k, t in enumerate(self.targets) if t.timed]
        if not timed or not most_s:
            return row_B, start_B, value_BK
        uniform_B = (mix(derive(key(seed, "moved"), step, index_B)) >> np.uint64(11)) / 2.0**53
        shift_B = np.rint((2 * uniform_B - 1) * most_s * rate_hz).astype(np.int64)
        known_B = np.isfinite(value_BK[:, timed]).any(1)
        shift_B = np.where(known_B & self.cache.holds(row_B, start_B + shift_B, self.samples), shift_B, 0)
        for k in timed:
            value_BK[:, k] -= (shift_B / rate_hz / self.targets[k].std).astype(np.float32)
        return row_B, start_B + shift_B, value_BK

    def seizures(self, row_B: np.ndarray, start_B: np.ndarray, stretch_s: float) -> np.ndarray:
        """1 for each stretch of a window that is seizure for at least half, else 0, float32 (B, S)."""
        stretches = round(self.samples / self.cache.rate_hz / stretch_s)
        start_BS = start_B[:, None] / self.cache.rate_hz + stretch_s * np.arange(stretches)
        covered_BS = self.coverage(row_B[:, None], start_BS, start_BS + stretch_s)
        return (covered_BS >= 0.5 * stretch_s).astype(np.float32)

    def ranges(self, values: Sequence[Hashable]) -> dict:
        """Example id ranges, int64 (n, 2), per distinct value; `values` holds one per row of `cache.recordings`."""
        groups = {v: [pairs] for v, pairs in (self.windows.ranges(values) if self.windows else {}).items()}
        for row in np.unique(self.row_N).tolist():
            low, high = np.searchsorted(self.row_N, [row, row + 1]) + self.along
            groups.setdefault(values[row], []).append(np.array([[low, high]], np.int64))
        return {value: np.concatenate(pairs) for value, pairs in groups.items()}

    def kinds(self) -> dict[str, np.ndarray]:
        """Id ranges of examples along recordings and of listed ones, where there are any."""
        bounds = {"along": (0, self.along), "listed": (self.along, len(self))}
        return {name: np.array([b], np.int64) for name, b in bounds.items() if b[1] > b[0]}

    def counts(self) -> list[np.ndarray]:
        """Examples per class of each target, int64 (classes); empty for quantities."""
        along_R = np.zeros(len(self.cache.recordings), np.int64)
        if self.windows:
            for row, pairs in self.windows.ranges(range(len(along_R))).items():
                along_R[row] = np.diff(pairs).sum()
        counts = []
        for k, target in enumerate(self.targets):
            own = np.where(np.isfinite(self.value_NK), self.value_NK, self.table_RK[self.row_N])[:, k]
            numbers = np.concatenate([self.table_RK[:, k], own])
            times, known = np.concatenate([along_R, np.ones(len(own), np.int64)]), np.isfinite(numbers)
            found = (
                np.bincount(numbers[known].astype(np.int64), times[known], len(target.classes))
                if target.classes
                else []
            )
            counts.append(np.asarray(found, np.int64))
        return counts

    def even(self, most: int, k: int | None = None) -> np.ndarray:
        """At most `most` ids (0: all) spread evenly over all examples, or over those with a value for target `k`."""
        ids = _spread(np.arange(len(self)), THINNED * most)
        if k is not None:
            ids = ids[np.isfinite(self.values(ids)[:, k])]
        return _spread(ids, most)


def _spread(ids: np.ndarray, most: int) -> np.ndarray:
    if not 0 < most < len(ids):
        return ids
    return ids[((np.arange(most) + 0.5) * len(ids) / most).astype(np.int64)]


def balanced(targets: Sequence[Target], examples: Examples, weigh: bool = True) -> list[Target]:
    """
    The targets with the shares of their classes among the training examples and, to `weigh`, weights by which every class counts alike,
    1 on average. Raises Unusable for a class without an example.
    """
    weighted = []
    for target, count_C in zip(targets, examples.counts(), strict=True):
        if target.classes and target.source != SEIZURE:
            lacking = [c for c, n in zip(target.classes, count_C.tolist(), strict=True) if not n]
            if lacking:
                length = f"a window of {examples.samples / examples.cache.rate_hz:g} s"
                raise Unusable(
                    f"--target {target.name}: no training recording of class {lacking[0]} holds {length}: lower --window-s"
                )
            share_C = count_C / count_C.sum()
            target = replace(target, shares=tuple(share_C.tolist()))
            if weigh:
                target = replace(target, weights=tuple((1 / (len(count_C) * share_C)).tolist()))
        weighted.append(target)
    return weighted
