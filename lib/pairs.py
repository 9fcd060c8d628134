"""
Which windows belong together although they are not the same: pairs for contrastive training, from a cache's events and tasks alone.

    movie      the same moment of the same movie in another subject, whatever the montages
    resting    the same resting state: eyes open, eyes closed, or rest where a task says no more
    event      the same kind of event (events.tsv, annotations), at any time within it, in another subject
    task       the same task in another subject
    augment    the window itself; the two differ by their augmentations (lib/views.py)
    neighbour  a window close in time of the same recording

What a step gets is a function of (seed, step). Which views may serve each other as negatives is decided here too: never those of the
same moment or state, never windows of one recording that are close in time.

Shape letters: S spans, B pairs of a batch, V = 2B views (all anchors, then all partners), N any number.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lib.cache import Cache
from lib.errors import Unusable
from lib.labels import MOVIE
from lib.masks import uniform
from lib.samplers import DatasetSampler

KINDS = ("movie", "resting", "event", "task", "augment", "neighbour")
EYES = ("eyes_open", "eyes_closed")
REST = re.compile(r"rest(ing)?([ _-]?state)?", re.IGNORECASE)  # a task that is rest, and says nothing of the eyes
TRIES = 8  # partners drawn blindly, before all that are possible are listed


@dataclass
class Pairs:
    """The pairs of one global batch, and how its views stand to each other. A view and its own partner are always alike."""

    kind_B: np.ndarray  # index into KINDS
    recording_V: np.ndarray  # rows of Cache.recordings
    start_V: np.ndarray  # first samples
    alike_VV: np.ndarray  # bool: the same moment or state; positives for a loss that takes several
    excluded_VV: np.ndarray  # bool: neither positive nor negative


def labels_of(shares: dict[str, float]) -> tuple[str, ...]:
    """The probe's labels (lib/probe.py) that pairs of these kinds are chosen by."""
    told = {"movie": ("task", "event"), "resting": ("task", "event"), "event": ("event",), "task": ("task",)}
    return tuple({label for kind in shares for label in told.get(kind, ())})


def parse_shares(words: tuple[str, ...]) -> dict[str, float]:
    """`movie:0.6 resting:0.2` as shares by kind. Raises Unusable."""
    shares = {}
    for word in words:
        kind, _, share = word.partition(":")
        if kind not in KINDS or not re.fullmatch(r"\d*\.?\d+", share) or float(share) <= 0 or kind in shares:
            raise Unusable(
                f"--pairs {word}: expected a kind once, a colon and a positive share, as in movie:0.6; kinds: {', '.join(KINDS)}"
            )
        shares[kind] = float(share)
    if not shares:
        raise Unusable(f"--pairs is empty; kinds: {', '.join(KINDS)}")
    return shares


# ----------------------------------------------------------------------------
# where something goes on


class Spans:
    """
    Stretches of good segments, each at least one window long, during which one thing (`what`) goes on since `onset`; in samples.

    In order of recording and start. Windows are counted through as 0 … len-1, every `stride` from the start of a span. What isn't stored (gaps,
    cropped parts) has gone by all the same: a stretch behind it has an onset so much earlier. `interval` is the row of the table.
    """

    def __init__(self, cache: Cache, rows: list[int], table: list[tuple], samples: int, stride: int):
        """
        `table` has recording rows, onset and stop in seconds of the stored signal (numbers or arrays), a name, and, if it isn't 0, the seconds that had
        gone by at the onset; what isn't in `rows` is left out.
        """
        known: dict[str, int] = {}
        columns = [
            np.stack(
                np.broadcast_arrays(
                    *np.atleast_1d(row, onset_s, stop_s, *gone_s or (0.0,)), known.setdefault(name, len(known))
                )
            )
            for row, onset_s, stop_s, name, *gone_s in table
        ]
        row_N, onset_N, stop_N, gone_N, what_N = np.concatenate([np.empty((5, 0)), *columns], axis=1)
        segments = [(i, start, stop) for i in sorted(rows) for start, stop in cache.recordings[i].segments]
        row_G, begin_G, end_G = np.array(segments, np.int64).reshape(-1, 3).T
        missing_G = (
            np.rint([t * cache.rate_hz for i in sorted(rows) for t in cache.recordings[i].onsets_s]).astype(np.int64)
            - begin_G
        )
        onset_N, stop_N, gone_N = (np.rint(t * cache.rate_hz).astype(np.int64) for t in (onset_N, stop_N, gone_N))

        # every interval with every segment of its recording
        low_N, high_N = (np.searchsorted(row_G, row_N, side) for side in ("left", "right"))
        n = np.repeat(np.arange(len(row_N)), high_N - low_N)
        g = np.arange(len(n)) - np.repeat(np.cumsum(high_N - low_N) - high_N, high_N - low_N)
        start, stop = np.maximum(onset_N[n], begin_G[g]), np.minimum(stop_N[n], end_G[g])
        long = int(end_G.max(initial=0)) + 1
        first_N = (
            np.searchsorted(row_G * long + begin_G, row_N * long + np.minimum(onset_N, long - 1), side="right") - 1
        )
        first_N = np.maximum(first_N, low_N)  # the segment that an interval begins in
        since = onset_N[n] - gone_N[n] - (missing_G[g] - missing_G[first_N[n]])
        keep = stop - start >= samples
        order = np.lexsort((start[keep], row_G[g][keep]))
        self.row_S, self.onset_S, self.start_S, self.stop_S, self.what_S, self.interval_S = (
            a[keep][order].astype(np.int64) for a in (row_G[g], since, start, stop, what_N[n], n)
        )
        self.names, self.samples, self.stride = list(known), samples, stride
        subjects = [r.subject for r in cache.recordings]
        self.subject_S = np.unique(np.array(subjects)[self.row_S], return_inverse=True)[1]
        self.first = np.concatenate([[0], np.cumsum((self.stop_S - self.start_S - samples) // stride + 1)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def locate(self, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The span and the first sample of windows."""
        span_N = np.searchsorted(self.first, ids_N, side="right") - 1
        return span_N, self.start_S[span_N] + (ids_N - self.first[span_N]) * self.stride

    def holding(self, among_G: np.ndarray, row_N: np.ndarray, start_N: np.ndarray) -> np.ndarray:
        """Which of the spans `among_G` (ascending ids) holds each window wholly, the last that began before it or none: its id, or -1."""
        long = int(max(self.stop_S.max(initial=0), start_N.max(initial=0))) + 1
        key_G = self.row_S[among_G] * long + self.start_S[among_G]
        at_N = among_G[np.searchsorted(key_G, row_N * long + start_N, side="right") - 1]
        inside = (self.row_S[at_N] == row_N) & (self.start_S[at_N] <= start_N)
        return np.where(inside & (start_N + self.samples <= self.stop_S[at_N]), at_N, -1)


def find_spans(
    cache: Cache,
    rows: list[int],
    kind: str,
    window_s: float,
    stride_s: float,
    events: tuple[str, ...] = (),
    event_s: float = 0.0,
) -> Spans:
    """
    Where a kind of pair can be drawn from in some recordings.

    `events` are the labels of `event` (none: all with a duration but movies and eyes); those without a duration last `event_s`, or one
    window. Raises Unusable for labels that the cache doesn't have.
    """
    windows, labels = cache.windows(None, window_s, stride_s, rows), cache.labels()
    if kind == "movie":
        table = [(*cache.intervals(name), name, cache.gone(name)) for name in labels if name.startswith(MOVIE)]
    elif kind == "event":
        if unknown := sorted(set(events) - set(labels)):
            raise Unusable(f"--events {' '.join(unknown)}: no such event in the cache; it has {', '.join(labels)}")
        chosen = events or [name for name in labels if not name.startswith(MOVIE) and name not in EYES]
        table = [(*cache.intervals(name), name) for name in chosen]
        for row in rows if events else ():
            brief = [e for e in cache.events(row) if e.label in events and not e.duration_s]
            table += [(row, e.onset_s, e.onset_s + (event_s or window_s), e.label) for e in brief]
    else:
        whole = {i: (i, 0.0, cache.recordings[i].samples / cache.rate_hz) for i in rows}
        tasks = {i: cache.recordings[i].task for i in rows}
        if kind == "resting":
            table = [(*cache.intervals(name), name) for name in EYES]
            told = {int(row) for part in table for row in part[0]}  # by events, which are finer than a task
            names = {i: task if task in EYES else "rest" * bool(REST.fullmatch(task)) for i, task in tasks.items()}
            table += [(*whole[i], name) for i, name in names.items() if name and i not in told]
        elif kind == "task":
            table = [(*whole[i], task) for i, task in tasks.items() if task]
        else:
            table = [(*whole[i], kind) for i in rows]
    return Spans(cache, rows, table, windows.samples, windows.stride)


# ----------------------------------------------------------------------------
# who belongs to whom


class Partners:
    """
    Who can be the partner of a window: one in another span of the same `group_S` and another `owner_S`.

    `aligned`: at the same time since the onset. `ranges` are the ids of the windows that have a partner.
    """

    def __init__(self, spans: Spans, group_S: np.ndarray, owner_S: np.ndarray, aligned: bool):
        self.spans, self.group_S, self.owner_S, self.aligned = spans, group_S, owner_S, aligned
        self.order = np.argsort(group_S, kind="stable")  # spans by group
        self.count = np.bincount(group_S)
        self.start = np.cumsum(self.count) - self.count
        # the earliest and latest moment at which a window in a span can begin; without alignment there is only one
        self.low_S = (spans.start_S - spans.onset_S) * aligned
        self.high_S = (spans.stop_S - spans.samples - spans.onset_S) * aligned
        self.ranges = self._paired()

    def members(self, group: int) -> np.ndarray:
        """The spans of a group, ascending."""
        return self.order[self.start[group] : self.start[group] + self.count[group]]

    def _paired(self) -> np.ndarray:
        """Windows for which more spans hold their moment than those of the same owner: id ranges (R, 2)."""
        if not len(self.spans):
            return np.empty((0, 2), np.int64)
        if self.aligned:
            span_N, start_N = self.spans.locate(np.arange(len(self.spans)))
            moment_N, first_N = start_N - self.spans.onset_S[span_N], np.arange(len(span_N) + 1)
        else:  # all windows of a span have the same partners, and there may be millions
            span_N = np.arange(len(self.group_S))
            moment_N, first_N = np.zeros(len(span_N), np.int64), self.spans.first
        own_S = np.unique(np.stack([self.group_S, self.owner_S]), axis=1, return_inverse=True)[1].ravel()
        paired_N = self._holding(self.group_S, span_N, moment_N) > self._holding(own_S, span_N, moment_N)
        edge = np.flatnonzero(np.diff(np.concatenate([[False], paired_N, [False]])))
        return first_N[edge].reshape(-1, 2)

    def _holding(self, group_S: np.ndarray, span_N: np.ndarray, moment_N: np.ndarray) -> np.ndarray:
        """How many spans of a window's group hold its moment."""
        long = int(self.high_S.max()) + 2
        low_S, high_S = (np.sort(group_S * long + a) for a in (self.low_S, self.high_S))
        at_N = group_S[span_N] * long + moment_N
        return np.searchsorted(low_S, at_N, side="right") - np.searchsorted(high_S, at_N, side="left")

    def draw(self, span_N: np.ndarray, moment_N: np.ndarray, u_NW: np.ndarray) -> np.ndarray:
        """The spans of partners, each possible one equally likely, by TRIES uniform numbers per window."""
        group_N, moment_N = self.group_S[span_N], moment_N * self.aligned
        partner_N = np.full(len(span_N), -1)
        for turn in range(TRIES):
            todo = np.flatnonzero(partner_N < 0)
            g = group_N[todo]
            drawn = self.order[self.start[g] + (u_NW[todo, turn] * self.count[g]).astype(np.int64)]
            fits = self._fits(drawn, span_N[todo], moment_N[todo])
            partner_N[todo[fits]] = drawn[fits]
        for n in np.flatnonzero(partner_N < 0):  # few: those of a group with hardly another owner
            g = group_N[n]
            everyone = self.members(g)
            fitting = everyone[self._fits(everyone, span_N[n], moment_N[n])]
            partner_N[n] = fitting[int(u_NW[n, 0] * len(fitting))]
        return partner_N

    def _fits(self, candidate, span, moment) -> np.ndarray:
        held = (self.low_S[candidate] <= moment) & (moment <= self.high_S[candidate])
        return held & (self.owner_S[candidate] != self.owner_S[span])


class PairSampler:
    """
    Pairs of windows of a split's recordings, in exact shares of kinds; each kind walks through epochs of its own.

    Partners at the same moment of a movie may be `tolerance_s` apart; `neighbour` is up to `neighbour_s` away; `resting` is drawn from
    `resting_subjects` (any: also another block of one's own). Windows of a recording or of a movie that begin less than `guard_s`
    apart (0: one window) are never negatives. Raises Unusable: what the cache lacks for a kind.
    """

    def __init__(
        self,
        cache: Cache,
        rows: list[int],
        window_s: float,
        stride_s: float,
        shares: dict[str, float],
        batch: int,
        seed: int,
        tolerance_s: float = 0.0,
        neighbour_s: float = 10.0,
        guard_s: float = 0.0,
        resting_subjects: Literal["other", "any", "same"] = "other",
        events: tuple[str, ...] = (),
        event_s: float = 0.0,
    ):
        self.batch, self.seed, self.shares = batch, seed, shares
        self.samples = cache.windows(None, window_s, stride_s, rows).samples
        self.tolerance, self.neighbour = (round(s * cache.rate_hz) for s in (tolerance_s, neighbour_s))
        self.guard = round(guard_s * cache.rate_hz) or self.samples
        self.partners: dict[str, Partners] = {}
        for kind in shares:
            spans = find_spans(cache, rows, kind, window_s, stride_s, events, event_s)
            group_S, owner_S, itself = spans.what_S, spans.subject_S, np.arange(len(spans.row_S))
            if kind in ("augment", "neighbour"):  # the partner is in the same span
                group_S, owner_S = itself, np.zeros(len(itself), np.int64)
            elif kind == "resting" and resting_subjects != "other":
                owner_S = itself
                if resting_subjects == "same":
                    both = np.stack([spans.what_S, spans.subject_S])
                    group_S = np.unique(both, axis=1, return_inverse=True)[1].ravel()
            found = self.partners[kind] = Partners(spans, group_S, owner_S, kind == "movie")
            if kind == "augment":
                found.ranges = np.array([[0, len(spans)]])
            elif kind == "neighbour":
                roomy = np.flatnonzero(spans.stop_S - spans.start_S > self.samples)
                found.ranges = np.stack([spans.first[roomy], spans.first[roomy + 1]], axis=1) * (self.neighbour > 0)
            if not (found.ranges[:, 1] > found.ranges[:, 0]).any():
                raise Unusable(f"--pairs {kind}: {self._lacking(cache, kind, spans, resting_subjects, window_s)}")
        self._refuse_one_state()
        lengths = [len(found.spans) for found in self.partners.values()]
        self.offset = np.concatenate([[0], np.cumsum(lengths)])
        ranges = {kind: self.partners[kind].ranges + first for kind, first in zip(shares, self.offset, strict=False)}
        try:
            self.sampler = DatasetSampler(ranges, shares, batch, seed)
        except ValueError as error:  # a share that is too small
            raise Unusable(f"--pairs {' '.join(f'{k}:{v:g}' for k, v in shares.items())}: {error}") from error

    def _lacking(self, cache: Cache, kind: str, spans: Spans, subjects: str, window_s: float) -> str:
        need = {
            "movie": "the same moment of a movie in two subjects (events movie:NAME with a duration)",
            "resting": "one resting state in two "
            + ("subjects" if subjects == "other" else "blocks")
            + " (events eyes_open and eyes_closed, or tasks of that name or rest)",
            "event": "one kind of event in two subjects (with a duration, or named by --events)",
            "task": "one task in two subjects",
            "augment": "a window",
            "neighbour": "a segment longer than a window, and --neighbour-s above 0",
        }[kind]
        have = sorted({spans.names[w] for w in spans.what_S}) if len(spans) else []
        there = f"long enough are {', '.join(have)}" if have else f"events are {', '.join(cache.labels()) or 'none'}"
        return f"needs {need}, windows of {window_s:g} s; in {', '.join(map(str, cache.paths))} {there}"

    def _refuse_one_state(self) -> None:
        """A state is told from another one only; if all windows of the batch are in the same, there is nothing to learn."""
        ((kind, found), *others) = self.partners.items()
        if not others and kind in ("resting", "event", "task"):
            group, _ = np.unique(np.stack([found.group_S, found.owner_S]), axis=1)
            paired = np.flatnonzero(np.bincount(group) > 1)
            if len(paired) == 1:
                name = found.spans.names[found.spans.what_S[found.group_S == paired[0]][0]]
                raise Unusable(
                    f"--pairs {kind}: {name} is the only one that has partners, so there are no negatives; "
                    f"add a kind, as in {kind}:0.5 augment:0.5"
                )

    def draw(self, step: int) -> Pairs:
        """The pairs of a step's global batch."""
        ids_B, index_B = self.sampler.ids(step), np.arange(self.batch)
        place_B = np.searchsorted(self.offset, ids_B, side="right") - 1
        u_BW = uniform(self.seed, step, index_B, TRIES + 3, "partner")
        recording_2B, start_2B, span_2B = (np.empty((2, self.batch), np.int64) for _ in range(3))
        for place, (kind, found) in enumerate(self.partners.items()):
            here = np.flatnonzero(place_B == place)
            parts = self._draw_kind(kind, found, ids_B[here] - self.offset[place], u_BW[here])
            span_2B[:, here], start_2B[:, here] = parts
            recording_2B[:, here] = found.spans.row_S[span_2B[:, here]]
        recording_V, start_V = recording_2B.ravel(), start_2B.ravel()
        alike_VV, excluded_VV = self._relations(np.tile(place_B, 2), recording_V, start_V, span_2B.ravel())
        kind_B = np.array([KINDS.index(kind) for kind in self.partners])[place_B]
        return Pairs(kind_B, recording_V, start_V, alike_VV, excluded_VV)

    def _draw_kind(self, kind: str, found: Partners, ids_N: np.ndarray, u_NW: np.ndarray):
        """Spans (2, N) and first samples (2, N) of anchors and partners."""
        spans, last_S = found.spans, found.spans.stop_S - self.samples
        span_N, start_N = spans.locate(ids_N)
        moment_N = start_N - spans.onset_S[span_N]
        partner_N = span_N if kind in ("augment", "neighbour") else found.draw(span_N, moment_N, u_NW)
        # off the grid of strides, so that every sample is a start in time
        room_N = np.minimum(last_S[span_N] - start_N, spans.stride - 1)
        if kind == "movie":
            room_N = np.minimum(room_N, found.high_S[partner_N] - moment_N)
        shift_N = (u_NW[:, TRIES] * (room_N + 1)).astype(np.int64)
        start_N = start_N + shift_N
        begin_N, end_N, u_N = spans.start_S[partner_N], last_S[partner_N], u_NW[:, TRIES + 1]
        if kind == "movie":
            then_N = spans.onset_S[partner_N] + moment_N + shift_N
            then_N = np.clip(then_N + np.rint((2 * u_N - 1) * self.tolerance).astype(np.int64), begin_N, end_N)
        elif kind == "augment":
            then_N = start_N
        elif kind == "neighbour":
            begin_N, end_N = np.maximum(begin_N, start_N - self.neighbour), np.minimum(end_N, start_N + self.neighbour)
            then_N = begin_N + (u_N * (end_N - begin_N)).astype(np.int64)
            then_N += then_N >= start_N  # anything but itself
        else:
            then_N = begin_N + (u_N * (end_N - begin_N + 1)).astype(np.int64)
        return np.stack([span_N, partner_N]), np.stack([start_N, then_N])

    def _relations(self, place_V, recording_V, start_V, span_V) -> tuple[np.ndarray, np.ndarray]:
        """Which views are alike, and which are neither positive nor negative to each other (V, V)."""
        alike_VV = np.zeros((len(place_V), len(place_V)), bool)
        near_VV = (recording_V[:, None] == recording_V) & (abs(start_V[:, None] - start_V) < self.guard)
        excluded_VV = near_VV.copy()
        for place, (kind, found) in enumerate(self.partners.items()):
            if kind in ("augment", "neighbour"):
                continue
            own_V = place_V == place  # others may happen to be in the same movie, or the same state
            group_V = np.where(own_V, found.group_S[np.where(own_V, span_V, 0)], -1)
            for group in np.unique(found.group_S if kind == "movie" else group_V[own_V]):
                at_V = found.spans.holding(found.members(group), recording_V, start_V)
                same_VV = (at_V >= 0)[:, None] & (at_V >= 0)
                if kind == "movie":
                    moment_V = start_V - found.spans.onset_S[at_V]
                    apart_VV = abs(moment_V[:, None] - moment_V)
                    excluded_VV |= same_VV & (apart_VV < self.guard)
                    alike_VV |= same_VV & (apart_VV <= self.tolerance)
                else:  # a state is no moment: only pairs of this kind say that it is what counts
                    same_VV &= (group_V[:, None] == group) | (group_V == group)
                    excluded_VV |= same_VV
                    alike_VV |= same_VV
        alike_VV &= ~near_VV
        view_V = np.arange(len(place_V))
        alike_VV[view_V, (view_V + self.batch) % len(view_V)] = True
        alike_VV[view_V, view_V] = False
        excluded_VV[view_V, view_V] = True
        return alike_VV, excluded_VV & ~alike_VV


def movie_moments(
    cache: Cache, rows: list[int], window_s: float, every_s: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    Of each movie that two subjects saw: recordings, one per subject, and first samples (S, M) of the windows that begin `every_s`
    after each other from its onset, -1 where a window would leave a good segment.
    """
    spans = find_spans(cache, rows, "movie", window_s, every_s)
    moments = {}
    for what, name in enumerate(spans.names):
        here = np.flatnonzero(spans.what_S == what)
        subjects, first = np.unique(spans.subject_S[here], return_index=True)
        if len(subjects) < 2:
            continue
        row_S, shown_S = spans.row_S[here][first], spans.interval_S[here][first]
        last = int((spans.stop_S - spans.onset_S)[here].max()) - spans.samples
        after_M = np.arange(0, last + 1, spans.stride)
        start_SM = np.full((len(row_S), len(after_M)), -1)
        for s in here:  # each stretch of the interval that was chosen of its subject
            start_M = spans.onset_S[s] + after_M
            inside_M = (start_M >= spans.start_S[s]) & (start_M + spans.samples <= spans.stop_S[s])
            start_SM[np.ix_(shown_S == spans.interval_S[s], inside_M)] = start_M[inside_M]
        moments[name.removeprefix(MOVIE)] = (row_S, start_SM)
    return moments
