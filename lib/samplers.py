"""
Which windows make up the batch of a step: pure functions of (seed, step), so a run resumes at any step without history.

Every sampler has `ids(step)`, the int64 window ids of the global batch; rank r of W takes ids(step)[r::W], so the order is
the same for every number of ranks. Shuffles are computed, not stored: one number costs a few multiplications wherever it
stands in the order, 24 million windows start at once and need no memory, and no version of NumPy changes the order.

Shapes: N numbers, B windows of a batch, R ranges, D datasets, S subjects.
"""

import zlib
from collections.abc import Iterable, Mapping

import numpy as np

STEPS_AHEAD = 16  # computed together; what a step gets does not depend on it
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd, so that products with it are all different

# ----------------------------------------------------------------------------
# computed shuffles


def key(seed: int, purpose: str) -> np.ndarray:
    """A 64-bit key, uint64 (1,), for one use of a seed."""
    return np.random.SeedSequence((seed, zlib.crc32(purpose.encode()))).generate_state(1, np.uint64)


def mix(x_N: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers (the finaliser of SplitMix64, Steele et al. 2014)."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def derive(key_N: np.ndarray, *numbers) -> np.ndarray:
    """Keys, uint64 (N,), of the uses of a key that integers number."""
    for number in numbers:
        key_N = mix(key_N + np.asarray(number).astype(np.uint64) * GOLDEN)
    return key_N


def permuted(index_N: np.ndarray, n, key_N: np.ndarray) -> np.ndarray:
    """
    Where the permutation of 0 … n-1 that the key chooses sends each index, int64 (N,); n and key may differ per index.

    A Feistel network on an a x b grid just larger than n, followed until it is back inside (Black and Rogaway 2002).
    """
    index_N, n_N, key_N = np.broadcast_arrays(np.asarray(index_N, np.int64), np.asarray(n, np.int64), key_N)
    a_N = np.ceil(np.sqrt(n_N)).astype(np.uint64)
    b_N = (n_N.astype(np.uint64) + a_N - np.uint64(1)) // np.maximum(a_N, np.uint64(1))
    result_N, todo = index_N.astype(np.uint64), np.arange(len(index_N))
    while len(todo):
        a, b, k = a_N[todo], b_N[todo], key_N[todo]
        left, right = np.divmod(result_N[todo], b)
        for turn_key in (k, ~k, k << np.uint64(1)):
            left = (left + mix(turn_key + right * GOLDEN) % a) % a
            right = (right + mix(turn_key - left * GOLDEN) % b) % b
        result_N[todo] = left * b + right
        todo = todo[result_N[todo] >= n_N[todo].astype(np.uint64)]
    return result_N.astype(np.int64)


def block_shuffled(position_N: np.ndarray, n: int, block: int, group: int, key_1: np.ndarray) -> np.ndarray:
    """
    The windows at positions of an endless sequence of shuffled epochs of n windows, int64 (N,).

    Blocks of neighbouring windows, which are cheap to read together, are permuted, and the windows of each `group` of
    consecutive blocks are shuffled among each other. The n % block windows that fill no block belong to the last group.
    """
    epoch_N, position_N = np.divmod(position_N, n)
    epoch_key_N = derive(key_1, epoch_N)
    blocks, size = n // block, block * group
    group_N = np.minimum(position_N // size, max(-(-blocks // group) - 1, 0))
    size_N = np.where(group_N == max(-(-blocks // group) - 1, 0), n - group_N * size, size)
    inside_N = permuted(position_N - group_N * size, size_N, derive(epoch_key_N, 1 + group_N))
    block_N, offset_N = np.divmod(group_N * size + inside_N, block)
    whole = block_N < blocks
    block_N[whole] = permuted(block_N[whole], blocks, derive(epoch_key_N[whole], 0))
    return block_N * block + offset_N


class Ranges:
    """Window id ranges [start, stop), an int64 (R, 2) array, counted through as 0 … len-1."""

    def __init__(self, ranges_R2: np.ndarray):
        ranges_R2 = np.asarray(ranges_R2, np.int64).reshape(-1, 2)
        ranges_R2 = ranges_R2[ranges_R2[:, 1] > ranges_R2[:, 0]]
        self._first = np.concatenate([[0], np.cumsum(ranges_R2[:, 1] - ranges_R2[:, 0])])
        self._shift = ranges_R2[:, 0] - self._first[:-1]

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, rank_N: np.ndarray) -> np.ndarray:
        return rank_N + self._shift[np.searchsorted(self._first, rank_N, side="right") - 1]


# ----------------------------------------------------------------------------
# samplers


class UniformSampler:
    """Every window once per epoch, block-shuffled; block=1 with a group of n or more is a plain shuffle."""

    def __init__(self, n: int, batch: int, seed: int, block: int = 16, group: int = 256):
        if n < 1:
            raise ValueError("no windows to sample from")
        self.n, self.batch, self.block, self.group, self._key = n, batch, block, group, key(seed, "uniform")
        self._ahead = (-1, np.empty((0, batch), np.int64))

    def ids(self, step: int) -> np.ndarray:
        first, ids_SB = self._ahead
        if not 0 <= step - first < len(ids_SB):  # a few steps at once cost hardly more than one
            first = step - step % STEPS_AHEAD
            position_N = first * self.batch + np.arange(STEPS_AHEAD * self.batch)
            ids_SB = block_shuffled(position_N, self.n, self.block, self.group, self._key).reshape(-1, self.batch)
            self._ahead = (first, ids_SB)
        return ids_SB[step - first].copy()

    def epoch(self, step: int) -> float:
        """Passes over the windows before this step."""
        return step * self.batch / self.n


class DatasetSampler:
    """
    Datasets in fixed shares, each walking through block-shuffled epochs of its own.

    `ranges` holds the window id ranges (R, 2) of each dataset (see Windows.ranges), `weights` its share before
    normalisation; one without a weight isn't drawn. Shares are exact over `len(pattern)` windows and off by about one
    window on the way there. Raises ValueError where a weight belongs to no windows.
    """

    def __init__(
        self, ranges: Mapping[str, np.ndarray], weights: Mapping[str, float], batch: int, seed: int, block=16, group=256
    ):
        names = [name for name, weight in weights.items() if weight != 0]
        self.ranges = [Ranges(ranges.get(name, np.empty((0, 2)))) for name in names]
        empty = [name for name, part in zip(names, self.ranges, strict=True) if not len(part)]
        share_D = np.array([weights[name] for name in names], np.float64)
        if empty or not names or not ((share_D > 0) & np.isfinite(share_D)).all():
            raise ValueError(f"dataset weights {dict(weights)}: no windows in {empty or list(ranges)}, or not positive")
        share_D /= share_D.sum()

        # the shortest pattern in which every share is a whole number of places, else 10,000 places and nearly so
        places_LD = np.arange(1, 10_001)[:, None] * share_D
        whole_L = (np.abs(places_LD - np.rint(places_LD)) < 1e-6).all(axis=1)
        length = int(whole_L.argmax()) + 1 if whole_L.any() else 10_000
        count_D = np.floor(share_D * length + 1e-6).astype(np.int64)
        count_D[np.argsort(count_D - share_D * length, kind="stable")[: length - count_D.sum()]] += 1
        if not count_D.all():
            raise ValueError(f"dataset weights {dict(weights)}: a share is below one in 10,000")
        when = np.concatenate([(np.arange(count) + 0.5) / count for count in count_D])
        self.pattern = np.repeat(np.arange(len(names)), count_D)[np.argsort(when, kind="stable")]
        self._before = np.concatenate(
            [[count_D * 0], np.cumsum(self.pattern[:, None] == np.arange(len(names)), axis=0)]
        )

        self.names, self.batch, self.block, self.group = names, batch, block, group
        self._order_key = key(seed, "dataset order")
        self._keys = [key(seed, f"dataset {name}") for name in names]

    def drawn(self, position: int) -> np.ndarray:
        """How many windows of each dataset lie before a position, int64 (D,)."""
        cycles, place = divmod(position, len(self.pattern))
        return cycles * self._before[-1] + self._before[place]

    def ids(self, step: int) -> np.ndarray:
        begin_D, end_D = self.drawn(step * self.batch), self.drawn((step + 1) * self.batch)
        parts = []
        for d, part in enumerate(self.ranges):
            rank_N = np.arange(begin_D[d], end_D[d])
            parts.append(part[block_shuffled(rank_N, len(part), self.block, self.group, self._keys[d])])
        # shuffled, or a rank that takes every second id might see one dataset only
        order_B = permuted(np.arange(self.batch), self.batch, derive(self._order_key, step))
        return np.concatenate(parts)[order_B]

    def epoch(self, step: int) -> dict[str, float]:
        """Passes over each dataset before this step."""
        drawn_D = self.drawn(step * self.batch).tolist()
        return {name: n / len(part) for name, n, part in zip(self.names, drawn_D, self.ranges, strict=True)}


class SeizureSampler:
    """
    Balanced epochs: every window that is seizure in part, `ratio_full` times as many that are seizure throughout and
    `ratio_none` times as many without, or what there is of them (`counts`), in random order.

    Of the larger categories each epoch takes windows that none before it took, until fewer are left than it needs.
    `partial` and `full` are the ids of those among n windows; all others are without seizure. Raises ValueError where
    nothing is seizure in part.
    """

    def __init__(
        self, partial: np.ndarray, full: np.ndarray, n: int, batch: int, seed: int, ratio_full=0.3, ratio_none=2.5
    ):
        if not len(partial):
            raise ValueError("no window is seizure in part: nothing to balance")
        partial, full = np.asarray(partial, np.int64), np.asarray(full, np.int64)
        seizure = np.sort(np.concatenate([partial, full]))
        between = Ranges(np.stack([np.concatenate([[0], seizure + 1]), np.concatenate([seizure, [n]])], axis=1))
        self._categories = (partial, full, between)
        wanted = len(partial), round(ratio_full * len(partial)), round(ratio_none * len(partial))
        counts = [min(w, len(ids)) for w, ids in zip(wanted, self._categories, strict=True)]
        self.counts = dict(zip(("partial", "full", "none"), counts, strict=True))
        self.batch, self.epoch_windows = batch, sum(counts)
        self._order_key, self._keys = key(seed, "seizure order"), [key(seed, f"seizure {c}") for c in self.counts]

    def ids(self, step: int) -> np.ndarray:
        epoch_B, place_B = np.divmod(step * self.batch + np.arange(self.batch), self.epoch_windows)
        place_B = permuted(place_B, self.epoch_windows, derive(self._order_key, epoch_B))
        ids_B = np.empty(self.batch, np.int64)
        first = 0
        for count, category, category_key in zip(self.counts.values(), self._categories, self._keys, strict=True):
            here = (first <= place_B) & (place_B < first + count)
            if here.any():
                # one order of the category serves as many epochs as it has disjoint draws for
                order_N, draw_N = np.divmod(epoch_B[here], len(category) // count)
                rank_N = draw_N * count + place_B[here] - first
                ids_B[here] = category[permuted(rank_N, len(category), derive(category_key, order_N))]
            first += count
        return ids_B

    def epoch(self, step: int) -> float:
        """Balanced epochs before this step."""
        return step * self.batch / self.epoch_windows


class SubjectSampler:
    """
    Every subject equally often: each round takes one window of every subject, in random order.

    A subject's windows, id ranges (R, 2) of its recordings, come in an order of their own, all once before any comes again.
    """

    def __init__(self, subjects: Iterable[np.ndarray], batch: int, seed: int):
        subjects = [np.asarray(ranges_R2, np.int64).reshape(-1, 2) for ranges_R2 in subjects]
        count_S = np.array([int(np.maximum(r[:, 1] - r[:, 0], 0).sum()) for r in subjects], np.int64)
        if not len(subjects) or not count_S.all():
            raise ValueError(f"{int((count_S == 0).sum())} of {len(subjects)} subjects have no windows")
        self.ranges, self.batch, self._count_S = Ranges(np.concatenate(subjects)), batch, count_S
        self._first_S = np.cumsum(count_S) - count_S
        self._round_key, self._window_key = key(seed, "subject round"), key(seed, "subject window")

    def ids(self, step: int) -> np.ndarray:
        round_B, place_B = np.divmod(step * self.batch + np.arange(self.batch), len(self._count_S))
        subject_B = permuted(place_B, len(self._count_S), derive(self._round_key, round_B))
        lap_B, index_B = np.divmod(round_B, self._count_S[subject_B])
        index_B = permuted(index_B, self._count_S[subject_B], derive(self._window_key, subject_B, lap_B))
        return self.ranges[self._first_S[subject_B] + index_B]

    def epoch(self, step: int) -> float:
        """Rounds over the subjects before this step."""
        return step * self.batch / len(self._count_S)
