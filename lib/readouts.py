"""
From an encoder's tokens to what is to be predicted: readouts, heads, and both with their encoder as one file.

    mean         mean over all tokens
    sites        mean over time at each of some places of the head, which take in the electrodes around them
    attention    a few learned softmax-weighted means over all tokens
    prelocal     spatial filters on the samples, then the local encoder (patch embedding) of the filtered signals, no context
    postlocal    the local encoder of each electrode, then spatial filters, no context
    contextual   the whole encoder, then spatial filters
    latency      as contextual, and a time: when in the window the event was that the signal is locked to (lib/latency.py)

prelocal, postlocal and contextual are the downstream designs of S-JEPA (Guetschel 2024, figure 2). They work for any montage, because
a filter's weight for an electrode is a function of the electrode's place. They keep the order of patches; the others leave it to the tokens. For
seizures, which have an output per stretch, a readout sees each patch by itself.

Shape letters: B windows, C channels, T samples, P patches, N = C * P tokens, D width, E sites, F filters, H means, K targets, O outputs,
X features, S stretches.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lib.batches import Part
from lib.channels import POSITIONS, TEN_TWENTY
from lib.errors import Unusable
from lib.grid import to_patches
from lib.latency import Latency
from lib.models import Architecture, build_encoder, check_alignment, check_signal
from lib.targets import Target
from lib.tensors import check_format, load_tensors, save_tensors

FORMAT, VERSION = "berger-model", 1
Kind = Literal["mean", "sites", "attention", "prelocal", "postlocal", "contextual", "latency"]
LOCAL = ("prelocal", "postlocal")  # that leave out the encoder's blocks


@dataclass(frozen=True)
class Reading:
    """What it takes to build a readout; stored with its weights."""

    kind: Kind = "mean"
    patches: int = 4  # of a window
    filters: int = 8  # spatial filters, or means of `attention`
    stretches: int = 0  # outputs per patch; 0: one per window
    sites: tuple[str, ...] = TEN_TWENTY  # electrodes of the montage whose places `sites` has


class Local(nn.Module):
    """The parts of an encoder that come before its blocks."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.architecture, self.embed, self.place = encoder.architecture, encoder.embed, encoder.place


class SpatialFilters(nn.Module):
    """Weights (B, F, C) of unit length over the good channels of each window, a linear function of the code of their places."""

    def __init__(self, d: int, filters: int):
        super().__init__()
        self.weight = nn.Linear(d, filters)

    def forward(self, place_BCD: torch.Tensor, mask_BC: torch.Tensor | None) -> torch.Tensor:
        w_BFC = self.weight(place_BCD).transpose(1, 2).float()
        if mask_BC is not None:
            w_BFC = torch.where(mask_BC[:, None], w_BFC, 0.0)
        return F.normalize(w_BFC, dim=2)


class Sites(nn.Module):
    """Weights (B, E, C) that sum to 1 over the good channels of each window: a Gaussian of half the sites' usual distance."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.register_buffer("place_E3", torch.tensor([POSITIONS[name] for name in names]), persistent=False)
        apart_EE = torch.cdist(self.place_E3, self.place_E3).fill_diagonal_(torch.inf)
        self.reach_m = float(apart_EE.amin(1).median()) / 2 if len(names) > 1 else 0.03

    def forward(self, positions_BC3: torch.Tensor, mask_BC: torch.Tensor | None) -> torch.Tensor:
        apart_BEC = torch.cdist(self.place_E3.expand(len(positions_BC3), -1, -1), positions_BC3)
        w_BEC = torch.exp(-0.5 * (apart_BEC / self.reach_m).square()).nan_to_num(0.0) + 1e-9  # no place: as good as far
        if mask_BC is not None:
            w_BEC = torch.where(mask_BC[:, None], w_BEC, 0.0)
        return w_BEC / w_BEC.sum(2, keepdim=True).clamp_min(1e-12)


class Readout(nn.Module):
    """Features (B, X) of windows, or (B, P, X) of their patches if the reading has stretches."""

    def __init__(self, architecture: Architecture, reading: Reading):
        super().__init__()
        self.reading, self.patch = reading, architecture.patch
        d, filters, patches = architecture.d_model, reading.filters, 1 if reading.stretches else reading.patches
        widths = {"mean": d, "sites": len(reading.sites) * d, "attention": filters * d}
        self.width = widths.get(reading.kind, filters * patches * d) + (reading.kind == "latency")
        self.latency = Latency(len(reading.sites), architecture.rate_hz) if reading.kind == "latency" else None
        if reading.kind == "attention":
            self.score = nn.Linear(d, filters)
        elif reading.kind == "sites":
            self.sites = Sites(reading.sites)
        elif reading.kind != "mean":
            self.filters = SpatialFilters(d, filters)
        if reading.kind == "latency":
            self.sites = Sites(reading.sites)
        if reading.kind in LOCAL:
            self.norm = nn.LayerNorm(d)

    def forward(self, encoder: nn.Module, part: Part) -> torch.Tensor:
        x_BCT, positions_BC3, mask_BC = part.signal
        kind = self.reading.kind
        if kind in ("mean", "attention"):
            return self._pool(encoder(*part.signal).unflatten(1, (x_BCT.shape[1], -1)).float(), mask_BC)
        if kind == "sites":
            z_BCPD = encoder(*part.signal).unflatten(1, (x_BCT.shape[1], -1)).float()
            z_BPCD = z_BCPD.transpose(1, 2) if self.reading.stretches else z_BCPD.mean(2)[:, None]
            z_BPX = (self.sites(positions_BC3, mask_BC)[:, None] @ z_BPCD).flatten(2)
            return z_BPX if self.reading.stretches else z_BPX[:, 0]
        w_BFC = self.filters(encoder.place(positions_BC3, 1), mask_BC)
        if kind == "prelocal":
            z_BFPD = encoder.embed(to_patches(w_BFC @ x_BCT, self.patch)).unflatten(1, (w_BFC.shape[1], -1))
            z_BFPD = F.gelu(self.norm(z_BFPD))
        else:
            local = kind == "postlocal"
            z_BND = encoder.embed(to_patches(x_BCT, self.patch)) if local else encoder(*part.signal)
            z_BND = F.gelu(self.norm(z_BND)) if local else z_BND
            z_BCPD = z_BND.unflatten(1, (x_BCT.shape[1], -1)).float()
            z_BFPD = torch.einsum("bfc,bcpd->bfpd", w_BFC, z_BCPD)
        z_BPX = z_BFPD.float().transpose(1, 2).flatten(2)
        if self.reading.stretches:
            return z_BPX
        return (
            torch.cat([z_BPX.flatten(1), self.latency(self.at_sites(part))[:, None]], 1)
            if self.latency
            else z_BPX.flatten(1)
        )

    def at_sites(self, part: Part) -> torch.Tensor:
        """The signal at the sites (B, E, T)."""
        x_BCT, positions_BC3, mask_BC = part.signal
        return self.sites(positions_BC3, mask_BC) @ x_BCT.float()

    def _pool(self, z_BCPD: torch.Tensor, mask_BC: torch.Tensor | None) -> torch.Tensor:
        """Means over electrodes and, unless there are stretches, over patches."""
        B, C, P, _ = z_BCPD.shape
        real_BC = mask_BC if mask_BC is not None else torch.ones(B, C, dtype=torch.bool, device=z_BCPD.device)
        z_BPCD, real_BPC = z_BCPD.transpose(1, 2), real_BC[:, None].expand(B, P, C)
        if not self.reading.stretches:
            z_BPCD, real_BPC = z_BPCD.flatten(1, 2)[:, None], real_BPC.flatten(1)[:, None]
        score_BPCH = self.score(z_BPCD) if self.reading.kind == "attention" else z_BPCD.new_zeros(*z_BPCD.shape[:3], 1)
        weight_BPCH = score_BPCH.masked_fill(~real_BPC[..., None], -1e9).softmax(2)
        z_BPX = torch.einsum("bpch,bpcd->bphd", weight_BPCH, z_BPCD).flatten(2)
        return z_BPX if self.reading.stretches else z_BPX[:, 0]


class Decoder(nn.Module):
    """Encoder, readout and a linear head per target."""

    def __init__(self, encoder: nn.Module, reading: Reading, targets: Sequence[Target]):
        super().__init__()
        self.reading, self.targets = reading, list(targets)
        self.encoder = Local(encoder) if reading.kind in LOCAL else encoder
        self.readout = Readout(encoder.architecture, reading)
        outputs = [reading.stretches or max(1, len(t.classes)) for t in targets]
        self.heads = nn.ModuleList(nn.Linear(self.readout.width, n) for n in outputs)
        for head in self.heads:  # the first guess is the mean, or all classes alike
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.register_load_state_dict_pre_hook(_drop_scaling)

    def features(self, part: Part) -> torch.Tensor:
        """What the heads see: (B, X), or (B, P, X) with stretches."""
        return self.readout(self.encoder, part)

    def read(self, z_BX: torch.Tensor) -> list[torch.Tensor]:
        """Per target standardised numbers (B, 1) or logits (B, classes); with stretches logits (B, S) of a seizure."""
        return [head(z_BX).flatten(1) for head in self.heads]

    def forward(self, part: Part, offset_BX: torch.Tensor | None = None) -> list[torch.Tensor]:
        """What `read` gives, of features less an offset."""
        z_BX = self.features(part)
        return self.read(z_BX if offset_BX is None else z_BX - offset_BX)

    def loss(self, out: list[torch.Tensor], y_BK: torch.Tensor) -> torch.Tensor:
        """
        Sum over known examples of each target's loss (K): squared error of the standardised number, or cross-entropy weighted by class.

        With stretches `y_BK` is what is a seizure (B, S), and the loss of a window the mean over its stretches.
        """
        if self.reading.stretches:
            return F.binary_cross_entropy_with_logits(out[0].float(), y_BK, reduction="none").mean(1).sum()[None]
        losses = []
        for target, o, y_B in zip(self.targets, out, y_BK.T, strict=True):
            told_B = y_B.isfinite()
            o, y_B = o.float(), torch.where(told_B, y_B, 0.0)  # before the loss: 0 x a gradient of NaN is NaN
            if target.classes:
                weight = torch.tensor(target.weights, device=o.device)
                loss_B = F.cross_entropy(o, y_B.long(), weight, reduction="none")
            else:
                loss_B = (o[:, 0] - y_B).square()
            losses.append(torch.where(told_B, loss_B, 0.0).sum())
        return torch.stack(losses)

    def say(self, out: list[torch.Tensor]) -> list[torch.Tensor]:
        """Per target numbers in its own unit (B, 1), or probabilities of its classes (B, classes); of a seizure (B, S)."""
        if self.reading.stretches:
            return [out[0].float().sigmoid()]
        return [
            o.float().softmax(1) if t.classes else t.decode(o.double()) for t, o in zip(self.targets, out, strict=True)
        ]


def _drop_scaling(decoder: Decoder, state: dict, prefix: str, *_) -> None:
    """Older files scale features, by 0 and 1; one that scales them otherwise is refused for holding more than it should."""
    for name, nothing in (("centre_X", 0.0), ("spread_X", 1.0)):
        if f"{prefix}{name}" in state and (state[f"{prefix}{name}"] == nothing).all():
            del state[f"{prefix}{name}"]


def save_model(path: str | Path, decoder: Decoder, meta: dict, more: dict[str, torch.Tensor] | None = None) -> None:
    """
    Write a model with everything needed to use it; `meta` has `signal_meta`, `lineage`, `window_s` and what was chosen on val.

    `more` are tensors of other things to be kept beside, called `baseline.…`.
    """
    own = {"format": FORMAT, "version": VERSION, "architecture": asdict(decoder.encoder.architecture)}
    own |= {"readout": asdict(decoder.reading), "targets": [asdict(t) for t in decoder.targets]}
    tensors = {f"model.{name}": t for name, t in decoder.state_dict().items()} | (more or {})
    save_tensors(Path(path), tensors, own | meta)


def load_model(path: str | Path, cache=None) -> tuple[Decoder, dict, dict[str, torch.Tensor]]:
    """
    A model (on the CPU, in evaluation mode), its metadata, and the tensors kept beside it.

    Raises Unusable if the file is missing, damaged or no model, or if `cache` holds signals unlike those it was trained on, or aligns them
    in another way.
    """
    tensors, meta = load_tensors(path)
    check_format(meta, path, FORMAT, VERSION)
    if cache is not None:
        check_signal(meta, cache, path)
        check_alignment(meta, cache, path)
    try:
        targets = [Target(**{k: tuple(v) if isinstance(v, list) else v for k, v in t.items()}) for t in meta["targets"]]
        reading = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["readout"].items()}
        decoder = Decoder(build_encoder(Architecture(**meta["architecture"])), Reading(**reading), targets)
        decoder.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise Unusable(f"{path} was written by another version of this code ({reason}); train it again") from error
    return decoder.eval(), meta, {k: t for k, t in tensors.items() if not k.startswith("model.")}
