"""
Windows of one length in samples from caches that need not be alike: other rates, other units, other channels, one numbering.

Training and validation are told apart by subject, as the caches say, or by time within every recording.

Shape letters: B windows, C channels, T samples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lib.batches import Part, read_parts
from lib.cache import Cache, Recording
from lib.errors import Unusable
from lib.statements import settle_shaft
from lib.whitening import Whitening, autocorrelation, channel_filters, fit
from lib.windows import Windows

MOST_FILTERS = 512  # groups that have a filter of their own
MOST_CHANNELS = 300  # names in all recordings; what so many have in common with each other is not kept
MOST_FITTED = 2**18  # samples of a recording that statistics are taken from, spread over its segments


class Corpus:
    """
    Recordings of several caches in one list; `caches` and `rows` say where each is.

    `before` samples in front of every window are read with it. `by_time` ignores the cache's splits: the first `share` of every
    recording is for training, and what follows after a gap of one window is held out. Raises Unusable where that leaves no window.
    """

    def __init__(
        self, paths: Sequence[str | Path], samples: int, before: int, stride: int, by_time: bool, share: float
    ):
        self.caches = [Cache(path) for path in paths] or [Cache()]  # which says what is missing
        self.samples, self.before, self.stride = samples, before, stride
        places = [(c, row) for c, cache in enumerate(self.caches) for row in range(len(cache.recordings))]
        self.cache_R, self.row_R = np.array(places, np.int64).T
        self.recordings: list[Recording] = [self.caches[c].recordings[row] for c, row in places]
        self.spans: dict[str, list[tuple[int, int, int]]] = {"train": [], "val": [], "test": []}
        for i, r in enumerate(self.recordings):
            if by_time:
                cut = round(share * r.samples)
                self.spans["train"] += [(i, a, min(b, cut)) for a, b in r.segments if a < cut]
                cut += samples + before
                self.spans["val"] += [(i, max(a, cut), b) for a, b in r.segments if b > cut]
            else:
                self.spans[r.split] += [(i, a, b) for a, b in r.segments]
        if not len(self.windows("train")):
            raise Unusable(f"no window of {samples} samples in the training part of {', '.join(map(str, paths))}")

    @property
    def fingerprint(self) -> str:
        """What identifies the content of the caches."""
        return "+".join(cache.fingerprint for cache in self.caches)

    def windows(self, part: str, stride: int | None = None) -> Windows:
        """The windows of train, val or test; where they start includes `before`."""
        return Windows(self.spans[part], self.before + self.samples, stride or self.stride)

    def rows(self, part: str) -> list[int]:
        """The recordings of a part."""
        return sorted({i for i, _, _ in self.spans[part]})

    def rate_hz(self, recording: int) -> float:
        """Its sampling rate."""
        return self.caches[self.cache_R[recording]].rate_hz

    def block(self, recording: int) -> str:
        """What intervals are over: the subject of EEG, the recording of anything else."""
        found = self.recordings[recording]
        return found.subject if self.caches[self.cache_R[recording]].signal["kind"] == "eeg" else found.key

    def values(self, columns: Mapping[str, Sequence[str]]) -> list[dict]:
        """For every recording the value of each of `columns` (name: columns joined with a blank); none where one is missing."""
        tables = [{name: cache.column(name) for words in columns.values() for name in words} for cache in self.caches]
        found = []
        for c, row in zip(self.cache_R, self.row_R, strict=True):
            values = {}
            for name, words in columns.items():
                told = [tables[c][word][row] for word in words]
                told = [v for v in told if not (v is None or v != v)]
                if len(told) == len(words):
                    values[name] = told[0] if len(told) == 1 else " ".join(map(str, told))
            found.append(values)
        return found

    def shaft(self, rows: Sequence[int]) -> float:
        """Turns of the shaft that recordings state (`shaft_hz`, or `rpm`), cycles per sample; NaN where one doesn't, or they differ."""
        values = self.values({"shaft_hz": ("shaft_hz",), "rpm": ("rpm",)})
        stated = {settle_shaft(values[i]) / self.rate_hz(i) for i in rows}
        return stated.pop() if len(stated) == 1 else math.nan

    def read(
        self,
        recording_B: np.ndarray,
        start_B: np.ndarray,
        index_B: np.ndarray,
        max_channels: int,
        micro: int,
        seed: int,
        step: int,
    ) -> list[Part]:
        """Windows, each with what is before it, in micro-batches of one cache and about one number of channels; `read_parts`."""
        parts = []
        for c in np.unique(self.cache_R[recording_B]):
            mine = np.flatnonzero(self.cache_R[recording_B] == c)
            where = (self.row_R[recording_B[mine]], start_B[mine], self.before + self.samples, index_B[mine])
            for part in read_parts(self.caches[c], *where, max_channels, micro, seed, step):
                own = mine[np.searchsorted(index_B[mine], part.index_B)] if len(mine) > 1 else mine
                parts.append(replace(part, recording_B=recording_B[own]))
        return parts

    def good(self, recording: int) -> np.ndarray:
        """Which of a recording's channels are good."""
        cache, row = self.caches[self.cache_R[recording]], int(self.row_R[recording])
        return np.flatnonzero(cache.read([row], [self.recordings[recording].segments[0][0]], 1).mask_BC[0].numpy())

    def places(self, channels: Sequence[str]) -> np.ndarray:
        """Which of `channels` those of every recording are (R, C); -1 for none, and behind the last."""
        number = {name: v for v, name in enumerate(channels)}
        place_RC = np.full((len(self.recordings), max(len(r.names) for r in self.recordings)), -1)
        for r, recording in enumerate(self.recordings):
            place_RC[r, : len(recording.names)] = [number.get(name, -1) for name in recording.names]
        return place_RC

    def signal(self, recording: int, part: str = "train") -> list[torch.Tensor]:
        """Its longest stretches of a part, good channels only, in model units, (C, T); not more than MOST_FITTED samples."""
        cache, row = self.caches[self.cache_R[recording]], int(self.row_R[recording])
        spans = sorted(((b - a, a) for i, a, b in self.spans[part] if i == recording), reverse=True)
        left, found = MOST_FITTED, []
        for length, start in spans:
            length = min(length, left)
            if length >= self.samples:
                batch = cache.read([row], [start], length)
                found.append(batch.x_BCT[0][batch.mask_BC[0]])
                left -= length
        return found


def fit_corpus(
    corpus: Corpus, by_recording: bool, order: int, rhythms: int = 0, unmix: bool = False
) -> tuple[Whitening, np.ndarray]:
    """
    What whitens windows, fitted on the training part, one set per recording or per data set; and which set each recording takes (R).

    A set is a filter, levels, rhythms and, to `unmix`, what channels have in common. A recording without a set of its own, because it is
    held out or there are too many, takes the set whose filter predicts it best; labels are not looked at.
    """
    trained = corpus.rows("train")
    name_R = [r.key if by_recording else r.dataset for r in corpus.recordings]
    members = {name: [i for i in trained if name_R[i] == name] for name in sorted({name_R[i] for i in trained})}
    channels = sorted({name for i in trained for name in corpus.recordings[i].names}) if unmix else []
    if len(channels) > MOST_CHANNELS or all(len(corpus.recordings[i].names) == 1 for i in trained):
        channels = []
    place_RC = corpus.places(channels)
    signals, places = {}, {}
    for name in even([*members], MOST_FILTERS):
        of = [(x, place_RC[i, corpus.good(i)]) for i in even(members[name], 64) for x in corpus.signal(i)]
        if of:
            signals[name], places[name] = zip(*of, strict=True)
    shafts = [corpus.shaft(members[name]) for name in signals]
    whiten = fit([*signals], [*signals.values()], order, corpus.samples, rhythms, channels, [*places.values()], shafts)
    number = {name: g for g, name in enumerate(signals)}
    group_R = np.array([number.get(name, -1) for name in name_R])
    for part in ("train", "val"):
        for i in corpus.rows(part):
            if group_R[i] < 0 and (stretches := corpus.signal(i, part)):
                group_R[i] = whiten.choose(autocorrelation(stretches[0], order))
    return whiten, np.maximum(group_R, 0)


def for_strangers(
    corpus: Corpus, whiten: Whitening, group_R: np.ndarray, strangers: list[int], part: str
) -> tuple[Whitening, np.ndarray]:
    """
    Filters with groups for recordings that nothing was fitted on, and the groups: each unmixes its channels by its own covariance, labels unseen.

    What channels have in common differs from head to head by directions that one has hardly any power in: by another's matrix
    a window would be anything but white. Nor does one machine keep the time of another: strangers have no rhythm, and no hum.
    """
    if not strangers or not (whiten.channels or whiten.rhythm_GQ.shape[1] or whiten.hum_GF.any()):
        return whiten, group_R
    place_RC, group_R, filters, crosses = corpus.places(whiten.channels), group_R.copy(), [], []
    for i in strangers:
        known = (at := place_RC[i, corpus.good(i)]) >= 0
        signals = [x_CT[known] for x_CT in corpus.signal(i, part)] if known.any() else []
        taps_K = whiten.taps_GK[group_R[i]].numpy()
        own_VK, cross_VV, _ = channel_filters(signals, [at[known]] * len(signals), len(whiten.channels), taps_K)
        filters.append(own_VK)
        crosses.append(cross_VV)
    own = whiten.joined([group_R[i] for i in strangers], filters, crosses)
    group_R[strangers] = len(whiten.names) + np.arange(len(strangers))
    return own, group_R


def even(items: list, most: int) -> list:
    """At most so many of them, evenly chosen."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]
