"""
Alignment: windows whose channels are, on average over a person, a recording or the window itself, uncorrelated and of variance 1.

Skull, electrodes and cap mix the same sources differently in every head. The inverse symmetric root of the mean covariance takes
off what a person always has, without a label, and leaves what changes (Euclidean alignment, He & Wu 2020, eq. 8 – 11); of all whitenings
it moves channels least, so each still belongs to its place on the head (Kessy 2018). Taken over the window itself it makes of a
spectrum what canonical correlation sees: a rhythm's share of the channels' common subspace, whatever its amplitude (Lin 2006).

Covariances are of the recording's own unit (microvolts), although windows come scaled channel by channel. An average reference leaves
one direction without a signal. Scaling channels turns that direction, differently in each recording, and whitening then amplifies it: every
window tells which recording it is from. Where each recording is a class, that looks like a result: on EEGMAT it is worth 0.2 of
accuracy, and a tangent space re-centred by subject is misled as well.

`subject` and `recording` also remove what differs between people or recordings as wholes, such as a trait.

Shape letters: B windows, C channels, T samples.
"""

from typing import Literal

import numpy as np
import torch

from lib.errors import Unusable
from lib.tensors import load_tensors

Align = Literal["auto", "none", "subject", "recording", "window"]
SCOPES = ("subject", "recording", "window")
FLOOR = 0.02  # of the channels' (geometric) mean variance, added: directions that a reference or a short window leaves empty stay so
WINDOW_S, WINDOWS = 4.0, 32  # by which the covariance of a recording is measured, at most so many, spread evenly


def choose(asked: Align, file: str | None) -> Align:
    """How to align: as asked; `auto` as an encoder's or model's file was trained, without one not. Raises Unusable if it is no such file."""
    if asked != "auto" or not file:
        return "none" if asked == "auto" else asked
    return load_tensors(file)[1].get("signal", {}).get("align", "none")


def whitener(covariance_BCC: torch.Tensor, floor: float = FLOOR) -> torch.Tensor:
    """Inverse symmetric roots (B, C, C), float64; channels of variance 0 (masked) stay 0."""
    variance_BC = covariance_BCC.diagonal(dim1=1, dim2=2).double()
    alive_BC = variance_BC > 0
    level_B = torch.where(alive_BC, variance_BC, 1.0).log().sum(1) / alive_BC.sum(1).clamp_min(1)
    added_BC = floor * level_B.exp()[:, None] * alive_BC
    value_BC, vector_BCC = torch.linalg.eigh(covariance_BCC.double() + torch.diag_embed(added_BC))
    root_BC = torch.where(value_BC > 1e-12, value_BC.clamp_min(1e-12).rsqrt(), 0.0)
    return (vector_BCC * root_BC[:, None]) @ vector_BCC.transpose(1, 2) * (alive_BC[:, :, None] & alive_BC[:, None])


def covariance(x_BCT: torch.Tensor) -> torch.Tensor:
    """Of each window (B, C, C), float64."""
    x_BCT = x_BCT.double() - x_BCT.double().mean(2, keepdim=True)
    return x_BCT @ x_BCT.transpose(1, 2) / x_BCT.shape[2]


class Alignment:
    """Aligns windows of a cache; a recording's or person's covariance is measured when it is first needed, and kept."""

    def __init__(self, cache, how: Align):
        if how not in SCOPES:
            raise Unusable(f"--align {how} is unknown; there are: none, {', '.join(SCOPES)}")
        self.cache, self.how = cache, how
        self.kept: dict[tuple, torch.Tensor] = {}
        self.rows_of: dict[tuple, list[int]] = {}
        for row in range(len(cache.recordings)):
            self.rows_of.setdefault(self.group(row), []).append(row)

    def group(self, row: int) -> tuple:
        """Whose covariance a recording is aligned by: of one montage always."""
        r = self.cache.recordings[row]
        return (r.subject if self.how == "subject" else r.key, r.names)

    def __call__(self, x_BCT: torch.Tensor, good_BC: torch.Tensor, row_B: np.ndarray) -> torch.Tensor:
        """Windows of the recordings `row_B`, in model units, aligned; bad channels stay 0."""
        matrix_BCC = x_BCT.new_zeros(len(x_BCT), x_BCT.shape[1], x_BCT.shape[1])
        for row in np.unique(row_B).tolist():
            mine, C = torch.from_numpy(row_B == row), len(self.cache.recordings[row].names)
            scale_C = torch.from_numpy(self.cache.scales(row)[0].astype(np.float64))
            if self.how == "window":
                root_BCC = whitener(covariance(x_BCT[mine, :C]) * scale_C[:, None] * scale_C)
            else:
                root_BCC = self.root(row, good_BC[mine][0, :C])
            matrix_BCC[mine, :C, :C] = (root_BCC * scale_C).float()
        return matrix_BCC @ x_BCT

    def root(self, row: int, good_C: torch.Tensor) -> torch.Tensor:
        """What windows of a recording, in its own unit, are multiplied by (C, C), float64."""
        key = (*self.group(row), *(~good_C).nonzero().flatten().tolist())
        if key not in self.kept:
            measured = [self.measure(other) for other in self.rows_of[self.group(row)]]
            total_CC, count_CC = (sum(each) for each in zip(*measured, strict=True))
            both_CC = good_C[:, None] & good_C
            mean_CC = torch.where(both_CC, total_CC / count_CC.clamp_min(1), 0.0)
            self.kept[key] = whitener(mean_CC[None])[0]
        return self.kept[key]

    def measure(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the covariances of a recording's windows in its own unit, and of how many each pair of channels has one (C, C)."""
        recording, rate_hz = self.cache.recordings[row], self.cache.rate_hz
        samples = min(round(WINDOW_S * rate_hz), max(stop - start for start, stop in recording.segments))
        windows = self.cache.windows(None, samples / rate_hz, samples / rate_hz, [row])
        ids = np.unique(np.linspace(0, len(windows) - 1, WINDOWS).astype(np.int64))
        batch, scale_C = self.cache.read_unaligned(*windows.locate(ids), samples), self.cache.scales(row)[0]
        met_BCC = (batch.mask_BC[:, :, None] & batch.mask_BC[:, None]).double()
        unit_CC = torch.from_numpy(np.outer(scale_C, scale_C).astype(np.float64))
        return (covariance(batch.x_BCT) * met_BCC).sum(0) * unit_CC, met_BCC.sum(0)
