"""
What a model says, without gradients: features and predictions of examples, and the probability of a seizure along whole recordings.

Shape letters: B examples, X features, K targets, S stretches of a window, T stretches of a recording.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lib.batches import Piece, read_parts, read_pieces
from lib.judgement import Said, Timeline, annotated
from lib.precision import autocast
from lib.readouts import Decoder
from lib.targets import Examples
from lib.transfer import Domain, Transfer, groups, moved

EVAL_STEP = 2**31 - 1  # the "step" whose random numbers draw the channels of scored windows
CHUNK, MOST_AT_ONCE = 64, 4096  # windows in a forward pass, and whose features are kept at once


@dataclass(frozen=True)
class Inference:
    """A model (in evaluation mode) and how windows are given to it: in which number format, how many channels and windows at once."""

    decoder: Decoder
    dtype: str
    max_channels: int  # of a window; 0: all
    micro: int  # windows per forward pass; 0: all of a montage at once
    seed: int  # of the channels that are drawn
    stretch_s: float  # of a seizure's probability

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.decoder.parameters()).device

    def pieces(self, examples: Examples, ids: np.ndarray) -> Iterator[list[Piece]]:
        """Examples in chunks of micro-batches; which channels of a window are seen depends on its place in `ids`."""
        for first in range(0, len(ids), CHUNK):
            index = np.arange(first, min(first + CHUNK, len(ids)))
            how = (self.max_channels, self.micro, self.seed, EVAL_STEP, self.stretch_s)
            yield read_pieces(examples, ids[index], index, *how)

    @torch.no_grad()
    def features(self, examples: Examples, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """What the heads see of examples, and what is true of them, in their order, on the CPU."""
        z, y = [], []
        for pieces in self.pieces(examples, ids):
            with autocast(self.device.type, self.dtype):
                z_BX = torch.cat([self.decoder.features(p.to(self.device).part).float().cpu() for p in pieces])
            order = torch.from_numpy(np.argsort(np.concatenate([p.part.index_B for p in pieces])))
            z.append(z_BX[order])
            y.append(torch.cat([p.y for p in pieces])[order])
        return torch.cat(z), torch.cat(y)

    @torch.no_grad()
    def steps(self, examples: Examples, ids: np.ndarray) -> np.ndarray:
        """What the filter of a `latency` readout sees of examples, in their order (B, E, T), float64."""
        found, readout = [], self.decoder.readout
        for pieces in self.pieces(examples, ids):
            x_BET = torch.cat([readout.latency.steps(readout.at_sites(p.to(self.device).part)) for p in pieces])
            found.append(x_BET.double().cpu().numpy()[np.argsort(np.concatenate([p.part.index_B for p in pieces]))])
        return np.concatenate(found)

    @torch.no_grad()
    def predict(
        self, examples: Examples, ids: np.ndarray, transfer: Transfer = "none", source: Domain | None = None
    ) -> Said:
        """
        What the model says of examples, window by window, and its loss.

        `transfer` moves their features to `source`, where those of the training data lie; not for outputs per stretch.
        """
        decoder, moves = self.decoder, transfer != "none"
        said, losses, y = [], [], []
        row_B, start_B = examples.locate(ids)
        most = len(ids) if moves else MOST_AT_ONCE
        for first in range(0, len(ids), most):
            z_BX, y_BK = self.features(examples, ids[first : first + most])
            if moves:
                at_BX = moved(z_BX.numpy(), groups(examples.cache, row_B, transfer), transfer, source)
                z_BX = torch.from_numpy(at_BX).float()
            out = decoder.read(z_BX.to(self.device))
            losses.append(decoder.loss(out, y_BK.to(self.device)).double().cpu())
            said.append([o.double().cpu().numpy() for o in decoder.say(out)])
            y.append(y_BK.numpy())
        y_BK = np.concatenate(y)
        known_K = np.array([len(ids)]) if examples.coverage else np.maximum(np.isfinite(y_BK).sum(0), 1)
        told = [np.concatenate([s[k] for s in said]) for k in range(len(decoder.targets))]
        return Said(told, y_BK, row_B, start_B, torch.stack(losses).sum(0).numpy() / known_K)

    @torch.no_grad()
    def timelines(self, examples: Examples, rows: Sequence[int]) -> list[Timeline]:
        """The probability of a seizure along recordings: windows that overlap by half, and what they say of a stretch averaged."""
        cache, samples, lines = examples.cache, examples.samples, []
        stretch = self.stretch_s * cache.rate_hz  # samples, not always a whole number
        for row, annotated_N2 in zip(rows, annotated(cache, rows), strict=True):
            r = cache.recordings[row]
            total = np.zeros((2, int(np.ceil(r.samples / stretch - 1e-9))))
            starts = [
                s
                for a, b in r.segments
                if b - a >= samples
                for s in (*range(a, b - samples + 1, samples // 2), b - samples)
            ]
            place_B = np.unique(np.floor(np.array(starts) / stretch + 1e-9).astype(np.int64))
            start_B = np.rint(place_B * stretch).astype(np.int64)
            for first in range(0, len(start_B), CHUNK):
                index = np.arange(first, min(first + CHUNK, len(start_B)))
                how = (samples, index, self.max_channels, self.micro, self.seed, EVAL_STEP)
                for part in read_parts(cache, np.full(len(index), row), start_B[index], *how):
                    with autocast(self.device.type, self.dtype):
                        said_BS = self.decoder.say(self.decoder(part.to(self.device)))[0].cpu().numpy()
                    for said_S, place in zip(said_BS, place_B[part.index_B], strict=True):
                        total[:, place : place + len(said_S)] += np.stack([said_S, np.ones(len(said_S))])
            probability_T = total[0] / np.maximum(total[1], 1)
            lines.append(Timeline(row, probability_T, annotated_N2, r.samples / cache.rate_hz))
        return lines
