"""
The two ends of a scale of quality: surrogates that keep nothing but the spectrum, and real windows against real windows.

Shape letters: N windows, C channels, L samples, F frequencies.
"""

from collections.abc import Callable

import numpy as np

Halves = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def phase_randomised(x_NCL: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Windows with random phases that keep the amplitude spectra, and between channels the cross-spectra (Prichard and Theiler 1994).

    What is left is what a linear Gaussian process would give. All channels of a window are turned by the same phases; the mean and the
    highest frequency stay.
    """
    z_NCF = np.fft.rfft(np.asarray(x_NCL, np.float64), axis=2)
    turn_NF = np.exp(2j * np.pi * rng.random((len(x_NCL), z_NCF.shape[2])))
    turn_NF[:, 0] = 1
    if x_NCL.shape[2] % 2 == 0:
        turn_NF[:, -1] = 1  # it has to be real
    return np.fft.irfft(z_NCF * turn_NF[:, None], x_NCL.shape[2], axis=2).astype(np.float32)


def by_window(count: int, each: int) -> Halves:
    """Draws two disjoint sets of `each` of `count` windows, at random: the floor of independent windows."""
    assert 2 * each <= count, (each, count)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(count)
        return order[:each], order[each : 2 * each]

    return draw


def by_block(block_N: np.ndarray, each: int, label_N: np.ndarray | None = None) -> Halves:
    """
    Draws two sets of `each` windows from different blocks (recordings, subjects): the floor of honest new recordings.

    Blocks are dealt within their label, so that both sets hold all labels; a label of a single block has its windows dealt instead, see
    `lone`. Where one side has fewer windows than asked for, both sets are of that many.
    """
    label_N = np.zeros(len(block_N), int) if label_N is None else np.asarray(label_N)
    groups = []
    for label in np.unique(label_N):
        own = np.flatnonzero(label_N == label)
        groups.append([own[block_N[own] == block] for block in np.unique(block_N[own])])

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        sides: tuple[list, list] = ([], [])
        for blocks in groups:
            units = list(blocks[0]) if len(blocks) == 1 else blocks
            order, first = rng.permutation(len(units)), int(rng.integers(2))
            for place, unit in enumerate(order):  # the odd one to either side
                sides[(place + first) % 2].append(np.atleast_1d(units[unit]))
        pools = [np.concatenate(side) for side in sides]
        count = min(each, *map(len, pools))
        return rng.permutation(pools[0])[:count], rng.permutation(pools[1])[:count]

    return draw


def lone(block_N: np.ndarray, label_N: np.ndarray | None = None) -> int:
    """How many labels have a single block, and therefore no block floor of their own."""
    label_N = np.zeros(len(block_N), int) if label_N is None else np.asarray(label_N)
    return sum(len(np.unique(np.asarray(block_N)[label_N == label])) < 2 for label in np.unique(label_N))
