"""
Which tokens a window's context encoder sees and which it has to predict: an exact share, in blocks by electrode distance.

Token n of a window is patch n % P of channel n // P. A mask depends on (seed, step, index of the window in the global
batch) and on that window's own channels alone: it is the same on any rank, in any micro-batch and beside any other windows.

Shape letters: B windows, C channels, P patches per channel, N = C * P tokens, K context tokens, M target tokens, W any width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from lib.errors import Unusable
from lib.samplers import GOLDEN, derive, key, mix

TOO_FEW = "can't be split into context and target: raise --window-s or lower --patch-s"
KINDS = ("random", "spatial", "temporal", "spatiotemporal")


@dataclass
class Masks:
    """Token ids in ascending order; windows with fewer than the others are filled up with id 0, marked False in `*_real`."""

    context_BK: torch.Tensor  # int64
    target_BM: torch.Tensor  # int64
    context_real_BK: torch.Tensor | None  # bool; None if nothing was filled up
    target_real_BM: torch.Tensor | None
    tokens: int  # context and targets of all windows
    targets: int

    def to(self, device: torch.device) -> "Masks":
        """The same on another device."""
        parts = (self.context_BK, self.target_BM, self.context_real_BK, self.target_real_BM)
        moved = (None if t is None else t.to(device, non_blocking=True) for t in parts)
        return Masks(*moved, self.tokens, self.targets)


def uniform(seed: int, step: int, index_B: np.ndarray, width: int, purpose: str) -> np.ndarray:
    """
    Numbers in [0, 1), float64 (B, W), each a function of (seed, purpose, step, window index, column) alone.

    Hashed counters: a generator per window would cost a Python loop over the batch.
    """
    key_B = derive(key(seed, purpose), step, index_B)
    z_BW = mix(key_B[:, None] + np.arange(1, width + 1, dtype=np.uint64) * GOLDEN)
    return (z_BW >> np.uint64(11)) * 2.0**-53


def choose_channels(mask_BC: torch.Tensor, most: int, seed: int, step: int, index_B: np.ndarray) -> torch.Tensor:
    """
    Channel ids (B, C') int64: at most `most` good channels of each window in ascending order, drawn at random (0: all of them).

    C' is the largest number that any window keeps; windows with fewer are filled up with masked channels behind their own: what is drawn for a
    channel goes by its place, and that must not depend on which windows share the micro-batch.
    """
    good_BC = mask_BC.numpy()
    keep = min(int(good_BC.sum(1).max()), most or good_BC.shape[1])
    order_BC = np.where(good_BC, uniform(seed, step, index_B, good_BC.shape[1], "channels") if most else 0.0, 1.0)
    kept_BC = np.argsort(order_BC, axis=1, kind="stable")[:, :keep]
    behind_BC = np.where(np.take_along_axis(good_BC, kept_BC, 1), 0, good_BC.shape[1])
    return torch.from_numpy(np.sort(kept_BC + behind_BC, axis=1) % good_BC.shape[1])


def check_tokens(cache, rows: Iterable[int], most: int, patches: int) -> None:
    """Raises Unusable for a recording of `rows` whose windows, of at most `most` good channels (0: all), have too few tokens to hide some."""
    good_R, _ = cache.good_channels()
    for row in sorted(rows):
        tokens = min(good_R[row], most or good_R[row]) * patches
        if tokens < 2:
            raise Unusable(f"{cache.recordings[row].key}: a window with {tokens} good tokens {TOO_FEW}")


def draw_masks(
    kind: str,
    positions_BC3: torch.Tensor,
    mask_BC: torch.Tensor,
    patches: int,
    ratio: float,
    radius_m: float,
    length: int,
    seed: int,
    step: int,
    index_B: np.ndarray,
) -> Masks:
    """
    Hide `ratio` of each window's own good tokens, rounded half up, but at least one and never all.

    random: single tokens. Otherwise blocks, until the number is met; the last one is cut to what is nearest its centre, in metres, then in time:
    spatial: all patches of the electrodes within radius_m; temporal: `length` patches of all electrodes; spatiotemporal (Guetschel
    2026): `length` patches of the electrodes within radius_m. An electrode without a position (NaN) is near itself only.
    """
    good_BCP = np.repeat(mask_BC.numpy()[:, :, None], patches, axis=2)
    B, C, P = good_BCP.shape
    tokens_B = good_BCP.sum((1, 2))
    if tokens_B.min() < 2:
        raise Unusable(f"a window with {tokens_B.min()} good tokens {TOO_FEW}")
    hidden_B = np.clip(np.floor(ratio * tokens_B + 0.5).astype(np.int64), 1, tokens_B - 1)
    priority_BCP = uniform(seed, step, index_B, C * P, "mask order").reshape(B, C, P)
    if kind == "random":
        order_BCP = priority_BCP
    else:
        radius_m = np.inf if kind == "temporal" else radius_m
        length = P if kind == "spatial" else min(length, P)
        shift_BCP = np.floor(uniform(seed, step, index_B, C * P, "mask start").reshape(B, C, P) * length).astype(
            np.int64
        )
        order_BCP = _order_of_blocks(
            positions_BC3.numpy(), good_BCP, hidden_B, priority_BCP, shift_BCP, radius_m, length
        )
    order_BN = np.where(good_BCP, order_BCP, np.inf).reshape(B, C * P)
    good_BN = good_BCP.reshape(B, C * P)

    first_BM = np.argsort(order_BN, axis=1, kind="stable")[:, : hidden_B.max()]
    target_BN = np.zeros((B, C * P), bool)
    np.put_along_axis(target_BN, first_BM, np.arange(first_BM.shape[1]) < hidden_B[:, None], axis=1)
    context_BK, context_real_BK = _ids(good_BN & ~target_BN)
    target_BM, target_real_BM = _ids(target_BN)
    return Masks(context_BK, target_BM, context_real_BK, target_real_BM, int(tokens_B.sum()), int(hidden_B.sum()))


def _order_of_blocks(
    positions_BC3, good_BCP, hidden_B, priority_BCP, shift_BCP, radius_m: float, length: int
) -> np.ndarray:
    """
    When each token is hidden (B, C, P), infinite if not needed: the number of its block plus its distance from the centre.

    Each round places one block per window around its not yet hidden token of highest priority, the block's start shifted so
    that the centre can be any of its patches.
    """
    B, C, P = good_BCP.shape
    order_BCP = np.full((B, C, P), np.inf)
    open_B = hidden_B.copy()
    time_P = np.arange(P)
    for block in range(C * P):  # every block hides at least its own centre
        rows = np.flatnonzero(open_B > 0)  # A: windows that still need a block
        if not len(rows):
            break
        free_ACP = good_BCP[rows] & np.isinf(order_BCP[rows])
        centre_A = np.where(free_ACP, priority_BCP[rows], -1.0).reshape(len(rows), -1).argmax(1)
        channel_A, patch_A = centre_A // P, centre_A % P
        start_A = np.clip(patch_A - shift_BCP[rows, channel_A, patch_A], 0, P - length)
        distance_AC = np.linalg.norm(positions_BC3[rows] - positions_BC3[rows, channel_A][:, None], axis=2)
        distance_AC = np.nan_to_num(distance_AC, nan=np.inf)
        distance_AC[np.arange(len(rows)), channel_A] = 0
        near_AC = distance_AC <= radius_m
        during_AP = (time_P >= start_A[:, None]) & (time_P < start_A[:, None] + length)
        new_ACP = free_ACP & near_AC[:, :, None] & during_AP[:, None, :]
        away_A1P = (
            1e-7 * np.abs(time_P - patch_A[:, None])[:, None]
        )  # of an electrode that is cut, what is near in time
        when_ACP = block + np.minimum(distance_AC, 0.999)[:, :, None] + away_A1P  # distances in metres are well below 1
        order_BCP[rows] = np.where(new_ACP, when_ACP, order_BCP[rows])
        open_B[rows] -= new_ACP.sum((1, 2))
    return order_BCP


def _ids(chosen_BN: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ascending ids of the chosen tokens, filled up with 0, and which are real (None: all)."""
    count_B = chosen_BN.sum(1)
    ids_BW = np.argsort(~chosen_BN, axis=1, kind="stable")[:, : count_B.max()]
    real_BW = np.arange(ids_BW.shape[1]) < count_B[:, None]
    if real_BW.all():
        return torch.from_numpy(ids_BW), None
    return torch.from_numpy(np.where(real_BW, ids_BW, 0)), torch.from_numpy(real_BW)
