"""
Micro-batches of windows of alike montages, so that a small montage is never padded to a large one; with what is true of them if need be.

Shape letters: B windows, C channels, T samples, K targets, S stretches of a window.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from lib.cache import Cache
from lib.grid import take
from lib.masks import Masks, choose_channels
from lib.targets import Examples


@dataclass
class Part:
    """Windows of one micro-batch, all of about the same number of channels."""

    x_BCT: torch.Tensor
    positions_BC3: torch.Tensor
    mask_BC: torch.Tensor | None  # None: every channel is good
    index_B: np.ndarray  # their places in the global batch
    recording_B: np.ndarray  # rows of Cache.recordings
    masks: Masks | None = None  # what is hidden in them, in phases that hide something
    kept_BC: torch.Tensor | None = None  # which channels of the recordings these are

    @property
    def signal(self) -> tuple:
        """What an encoder takes."""
        return self.x_BCT, self.positions_BC3, self.mask_BC

    def good_patches(self, patch: int) -> torch.Tensor:
        """The samples of all tokens of good channels."""
        x_BCT = self.x_BCT if self.mask_BC is None else self.x_BCT[self.mask_BC]
        return x_BCT.reshape(-1, patch)

    def some(self, rows: list[int]) -> "Part":
        """Some of its windows, before anything is hidden in them."""
        mask_BC = None if self.mask_BC is None else self.mask_BC[rows]
        tensors = (self.x_BCT[rows], self.positions_BC3[rows], mask_BC, self.index_B[rows], self.recording_B[rows])
        return Part(*tensors, kept_BC=self.kept_BC[rows])

    def to(self, device: torch.device) -> "Part":
        """The same on another device."""
        if device.type == "cpu":
            return self
        x, positions, mask = (None if t is None else t.to(device, non_blocking=True) for t in self.signal)
        masks = None if self.masks is None else self.masks.to(device)
        return replace(self, x_BCT=x, positions_BC3=positions, mask_BC=mask, masks=masks)


def read_parts(
    cache: Cache,
    recording_B: np.ndarray,
    start_B: np.ndarray,
    samples: int,
    index_B: np.ndarray,
    max_channels: int,
    micro: int,
    seed: int,
    step: int,
) -> list[Part]:
    """
    Windows in micro-batches of at most `micro` (0: any number), with at most `max_channels` of their good channels (0: all).

    Which channels depends on (seed, step, place in the global batch), not on how the batch is divided. Raises Unusable.
    """
    channels_B = np.array([len(cache.recordings[i].names) for i in recording_B])
    if max_channels:
        channels_B = np.minimum(channels_B, max_channels)
    parts = []
    for channels in np.unique(channels_B):
        alike = np.flatnonzero(channels_B == channels)
        for some in np.array_split(alike, -(-len(alike) // (micro or len(alike)))):
            batch = cache.read(recording_B[some], start_B[some], samples)
            kept_BC = choose_channels(batch.mask_BC, max_channels, seed, step, index_B[some])
            x_BCT, positions_BC3 = take(batch.x_BCT, kept_BC), take(batch.positions_BC3, kept_BC)
            mask_BC = batch.mask_BC.gather(1, kept_BC)
            mask_BC = None if mask_BC.all() else mask_BC
            parts.append(Part(x_BCT, positions_BC3, mask_BC, index_B[some], recording_B[some], kept_BC=kept_BC))
    return parts


@dataclass
class Piece:
    """A micro-batch and what is true of it: encoded values (B, K), or which stretches are seizure (B, S)."""

    part: Part
    y: torch.Tensor

    def to(self, device: torch.device) -> "Piece":
        """The same on another device."""
        return self if device.type == "cpu" else Piece(self.part.to(device), self.y.to(device, non_blocking=True))


def read_pieces(
    examples: Examples,
    ids_B: np.ndarray,
    index_B: np.ndarray,
    max_channels: int,
    micro: int,
    seed: int,
    step: int,
    stretch_s: float,
    move_s: float = 0.0,
) -> list[Piece]:
    """
    Examples in micro-batches, as `read_parts`; for seizures one value per stretch of `stretch_s`.

    Those whose value is a time are moved by up to `move_s`, which depends on (seed, step, place in the global batch) alone. Raises Unusable.
    """
    row_B, start_B, y_BK = examples.moved(ids_B, move_s, seed, step, index_B)
    parts = read_parts(examples.cache, row_B, start_B, examples.samples, index_B, max_channels, micro, seed, step)
    if examples.coverage:
        y_BK = examples.seizures(row_B, start_B, stretch_s)
    return [Piece(part, torch.from_numpy(y_BK[np.searchsorted(index_B, part.index_B)])) for part in parts]
