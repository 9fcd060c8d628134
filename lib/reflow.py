"""
One round of reflow (Liu 2023): a flow learns from pairs of noise and sample that another flow, its teacher, has made.

The paths between such pairs are straighter than between noise and windows drawn independently, so that samples need fewer evaluations. The
pairs are made once, before training, together with their conditions.

Shape letters: B windows of a batch, C channels, T samples, F conditions.
"""

from pathlib import Path

import numpy as np
import torch

from lib import flow, generator
from lib.conditions import Condition
from lib.errors import Unusable
from lib.masks import uniform
from lib.velocity import Velocity
from lib.whitening import Whitening

FINE = 32  # evaluations of the teacher per pair


def same_filters(a: Whitening, b: Whitening) -> bool:
    """Whether two whitenings make the same of a signal, to rounding."""
    pairs = [
        (getattr(a, name), getattr(b, name)) for name in ("taps_GK", "cross_GVV", "rhythm_GQ", "hum_GF", "flat_GF")
    ]
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-5, equal_nan=True) for x, y in pairs)


Teacher = tuple[Velocity, Whitening, dict]


def load_teacher(path: str | Path, window: int, conditions: list[Condition], own: Whitening, level: bool) -> Teacher:
    """
    The model whose pairs are to be learned.

    Raises Unusable if its conditions, windows, level or filters are others than those given: pairs live in the space that filters make.
    """
    net, whiten, meta = generator.load_model(path)
    alike = list(net.given.conditions) == conditions and (meta["window"], meta["level"]) == (window, level)
    if not (alike and same_filters(own, whiten)):
        raise Unusable(
            f"--reflow {path} has other conditions, windows or filters: give the cache and flags that it was trained with"
        )
    return net, whiten, meta


class Pairs:
    """About `count` pairs of a teacher, spread over its templates."""

    def __init__(self, teacher: Teacher, count: int, seed: int):
        net, whiten, meta = teacher
        each = -(-count // len(meta["templates"]))
        self.sets = []
        for k, template in enumerate(meta["templates"]):
            index_N = k * each + np.arange(each)
            x1_NCT, _, code_NF, _ = generator.draw_windows(net, whiten, meta, template, index_N, seed, nfe=FINE)
            noise_NCT = flow.draw_noise(seed, 0, index_N, x1_NCT.shape[1:])  # what `flow.sample` begins with
            positions_NC3 = generator.positions_of(template).expand(each, -1, -1)
            self.sets.append((x1_NCT, noise_NCT, code_NF, positions_NC3))

    def draw(self, index_B: np.ndarray, micro: int, seed: int, step: int) -> list[tuple]:
        """Pairs (x1, x0, codes, positions, index) in micro-batches of one number of channels; which ones depends on (seed, step, index)."""
        u_B2 = uniform(seed, step, index_B, 2, "flow pair")
        set_B = (u_B2[:, 0] * len(self.sets)).astype(np.int64)
        channels_B = np.array([self.sets[k][0].shape[1] for k in set_B])
        parts = []
        for channels in np.unique(channels_B):
            alike = np.flatnonzero(channels_B == channels)
            for some in np.array_split(alike, -(-len(alike) // (micro or len(alike)))):
                rows = [[t[int(u_B2[b, 1] * len(t))] for t in self.sets[set_B[b]]] for b in some]
                parts.append((*(torch.stack(column) for column in zip(*rows, strict=True)), index_B[some]))
        return parts
