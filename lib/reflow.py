"""
One round of reflow: a flow learns the pairs of noise and sample that another one makes, whose paths are straighter than independent ones.

So fewer evaluations take it from noise to data (Liu 2023). The pairs are made once, before training, and conditions go with them.

Shape letters: B windows of a batch, C channels, T samples, F conditions.
"""

from pathlib import Path

import numpy as np
import torch

from lib import flow, generator
from lib.errors import Unusable
from lib.masks import uniform
from lib.velocity import describe

FINE = 32  # evaluations of the teacher per pair


class Pairs:
    """About `count` pairs of the model file `path`, spread over its templates. Raises Unusable if its conditions are not `conditions`."""

    def __init__(self, path: str | Path, count: int, window: int, conditions: list[dict], seed: int):
        net, whiten, meta = generator.load_model(path)
        if describe(net)["conditions"] != conditions or meta["window"] != window:
            raise Unusable(
                f"--reflow {path} has other conditions or windows: give the cache and flags that it was trained with"
            )
        each = -(-count // len(meta["templates"]))
        self.sets = []
        for k, template in enumerate(meta["templates"]):
            index_N = k * each + np.arange(each)
            x1_NCT, _, code_NF = generator.draw_windows(net, whiten, meta, template, index_N, seed, nfe=FINE)
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
