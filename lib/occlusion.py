"""
Which electrodes and which frequencies a model needs: how much its loss rises without them (Zeiler & Fergus 2014).

Shape letters: B windows, C channels, E sites, T samples.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from lib.batches import Part
from lib.channels import POSITIONS, TEN_TWENTY, common_sites
from lib.inference import Inference
from lib.precision import autocast
from lib.probe import BANDS_HZ
from lib.targets import Examples

MOST_SITES = (
    64  # electrodes that are taken away one by one; of larger or mixed montages the regions of the 10-20 system
)


def without_site(part: Part, site: int, place_E3: torch.Tensor) -> Part:
    """The windows without the electrodes that are nearer to this site than to any other; one that would lose all of them keeps them."""
    nearest_BC = torch.cdist(part.positions_BC3, place_E3.expand(len(part.x_BCT), -1, -1)).argmin(2)
    good_BC = part.mask_BC if part.mask_BC is not None else torch.ones_like(nearest_BC, dtype=torch.bool)
    mask_BC = good_BC & (nearest_BC != site)
    mask_BC = torch.where(mask_BC.any(1, keepdim=True), mask_BC, good_BC)
    return replace(part, x_BCT=torch.where(mask_BC[:, :, None], part.x_BCT, 0.0), mask_BC=mask_BC)


def without_band(part: Part, low_hz: float, high_hz: float, rate_hz: float) -> Part:
    """The windows without the frequencies of a band."""
    T = part.x_BCT.shape[2]
    hz_F = torch.fft.rfftfreq(T, 1 / rate_hz)
    kept_F = ((hz_F < low_hz) | (hz_F >= high_hz)).to(part.x_BCT)
    return replace(part, x_BCT=torch.fft.irfft(torch.fft.rfft(part.x_BCT) * kept_F, n=T))


def occlusion(
    loss_of: Callable[[Part, int], float], parts: list[Part], sites: tuple[str, ...], rate_hz: float
) -> tuple[dict[str, float], dict[str, float]]:
    """
    By site and by band, how much higher the loss is without it. `loss_of(part, i)` is the loss of micro-batch i seen as `part`.
    """

    def total(change: Callable[[Part], Part]) -> float:
        return float(np.sum([loss_of(change(part), i) for i, part in enumerate(parts)]))

    whole = total(lambda part: part)
    place_E3 = torch.tensor(np.array([POSITIONS[name] for name in sites]), dtype=torch.float32).reshape(-1, 3)
    by_site = {name: total(lambda part, e=e: without_site(part, e, place_E3)) - whole for e, name in enumerate(sites)}
    bands = {name: edges for name, edges in BANDS_HZ.items() if edges[0] < rate_hz / 2}
    by_band = {
        f"{name} {low:g}–{high:g} Hz": total(lambda part, low=low, high=high: without_band(part, low, high, rate_hz))
        - whole
        for name, (low, high) in bands.items()
    }
    return by_site, by_band


def occlude(inference: Inference, examples: Examples, most: int) -> tuple[dict[str, float], dict[str, float]]:
    """`occlusion` of a model by its mean loss on at most `most` examples, spread evenly."""
    ids, decoder, device = examples.even(most), inference.decoder, inference.device
    pieces = [piece for chunk in inference.pieces(examples, ids) for piece in chunk]
    known = [piece.y.to(device) for piece in pieces]

    @torch.no_grad()
    def loss_of(part: Part, i: int) -> float:
        with autocast(device.type, inference.dtype):
            out = decoder(part.to(device))
        return float(decoder.loss(out, known[i]).sum()) / len(ids)

    sites = common_sites(examples.cache.recordings[i].names for i in np.unique(examples.locate(ids)[0]).tolist())
    sites = sites if len(sites) <= MOST_SITES else TEN_TWENTY
    return occlusion(loss_of, [piece.part for piece in pieces], sites, examples.cache.rate_hz)
