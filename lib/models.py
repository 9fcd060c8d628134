"""
The encoder on (channel, time patch) tokens, and encoders as files.

No parameter depends on a montage: a token knows its electrode by 3-D position and its patch by time in seconds. Token n of a
window is patch n % P of channel n // P.

Shape letters: B windows, C channels, T samples, S samples of a patch, P patches per channel, N = C * P tokens, K tokens seen,
D width, H heads, F frequencies.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lib.attention import attend
from lib.cache import ALIKE, rebuilt_with
from lib.errors import Unusable
from lib.fno import FNOBlock
from lib.grid import Grid, take, to_patches
from lib.hybrid import HybridBlock
from lib.lineage import inherited
from lib.mamba import MambaBlock
from lib.perceiver import Nearest, Perceiver
from lib.tensors import check_format, load_tensors, save_tensors

FORMAT = "berger-encoder"
VERSION = 1
HEAD_M = 0.1  # radius of a head
SILENT = 1e-3  # variance that a patch of an electrode has at least, where unit noise has 1
MOST = 0.9  # what a perfect correlation counts as: its Fisher transform is infinite


@dataclass(frozen=True)
class Architecture:
    """What it takes to build an encoder; stored with its weights."""

    encoder: str = "transformer"
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    rate_hz: float = 100.0  # of the signal; frequencies and times mean nothing without it
    patch: int = 100  # samples per token
    adapter: str = "none"  # what stands between the electrodes and the encoder: none, perceiver, nearest
    queries: int = 128  # learned electrodes of the perceiver
    relations: bool = False  # tokens also know how their samples correlate with those of other electrodes

    def check(self) -> None:
        """Raises Unusable for sizes that don't fit each other."""
        for flag, value, known in (("encoder", self.encoder, BLOCKS), ("adapter", self.adapter, ADAPTERS)):
            if value not in known:
                raise Unusable(f"--{flag} {value} is unknown; there are: {', '.join(known)}")
        if not 1 <= self.queries <= 128:
            raise Unusable(f"--queries {self.queries} must lie in 1 to 128")
        for flag, value in (("d-model", self.d_model), ("layers", self.layers), ("heads", self.heads)):
            if value < 1:
                raise Unusable(f"--{flag} {value} must be at least 1")
        if self.d_model % (2 * self.heads):
            raise Unusable(f"--d-model {self.d_model} must be a multiple of 2 x --heads {self.heads}")
        if self.patch < 8:
            raise Unusable(
                f"a patch of {self.patch} samples is too short for a spectrum; raise --patch-s (--patch of train_flow.py)"
            )


class PatchEmbedding(nn.Module):
    """
    A linear map of a patch's samples plus one of its log amplitude spectrum, standardised per frequency by `calibrate`.

    The spectrum is what rhythms of random phase have in common; the samples keep phase and shape. Amplitude survives in both,
    because windows are scaled per recording, not one by one.
    """

    def __init__(self, patch: int, d: int):
        super().__init__()
        self.samples = nn.Linear(patch, d)
        with torch.no_grad():  # of random phase, so noise to whatever reads tokens linearly; training may raise it
            self.samples.weight *= 0.2
        self.spectrum = nn.Linear(patch // 2 + 1, d)
        hann_S = torch.hann_window(patch)
        self.register_buffer("taper_S", hann_S / hann_S.square().sum().sqrt(), persistent=False)
        self.register_buffer("level_F", torch.zeros(patch // 2 + 1))
        self.register_buffer("spread_F", torch.ones(patch // 2 + 1))

    def log_amplitude(self, x_BKS: torch.Tensor) -> torch.Tensor:
        """Unit white noise is at about 0; the floor is 40 dB below, where float16 rounding and filtered-out bands are."""
        re_BKF, im_BKF = torch.view_as_real(torch.fft.rfft(x_BKS.float() * self.taper_S)).unbind(-1)
        power_BKF = torch.addcmul(re_BKF.square(), im_BKF, im_BKF)  # abs() takes a root, three times as long
        return 0.5 * torch.log(power_BKF + 1e-4)

    @torch.no_grad()
    def calibrate(self, x_KS: torch.Tensor) -> None:
        """Take level and spread of each frequency from patches of the training data: a 1/f spectrum is mostly a constant otherwise."""
        spectrum_KF = self.log_amplitude(x_KS)
        self.level_F.copy_(spectrum_KF.mean(0))
        self.spread_F.copy_(
            spectrum_KF.std(0).clamp_min(0.25)
        )  # filtered-out bands hardly vary and must not be blown up

    def forward(self, x_BKS: torch.Tensor) -> torch.Tensor:
        return self.samples(x_BKS) + self.spectrum((self.log_amplitude(x_BKS) - self.level_F) / self.spread_F)


class Places(nn.Module):
    """
    Where and when a token is: an MLP of Fourier features of the electrode's position plus a fixed sine-cosine code of time.

    Electrodes without a position (NaN) share one learned vector.
    """

    WAVELENGTHS_M = (0.4, 0.2, 0.1, 0.05)  # from twice a head's width to the spacing of 64 electrodes

    def __init__(self, d: int, patch_s: float):
        super().__init__()
        self.width = 3 + 6 * len(self.WAVELENGTHS_M)
        self.space = nn.Sequential(nn.Linear(self.width, d), nn.GELU(), nn.Linear(d, d))
        self.unplaced_D = nn.Parameter(0.02 * torch.randn(d))
        self.patch_s = patch_s
        period_s = 2 * patch_s * 250 ** torch.linspace(0, 1, d // 2)
        self.register_buffer("rad_per_s", 2 * math.pi / period_s, persistent=False)
        self.register_buffer("rad_per_m", 2 * math.pi / torch.tensor(self.WAVELENGTHS_M), persistent=False)

    def harmonics(self, positions_BC3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fourier features (B, C, F) of positions, and which electrodes have one (B, C, 1); the others count as in the origin."""
        placed_BC1 = positions_BC3.isfinite().all(2, keepdim=True)
        xyz_BC3 = torch.where(placed_BC1, positions_BC3, 0.0)
        angle_BCF = (xyz_BC3[..., None] * self.rad_per_m).flatten(2)
        return torch.cat([xyz_BC3 / HEAD_M, angle_BCF.sin(), angle_BCF.cos()], 2), placed_BC1

    def forward(self, positions_BC3: torch.Tensor, patches: int, ids_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Codes (B, K, D) of the tokens `ids_BK`, or of all N."""
        features_BCF, placed_BC1 = self.harmonics(positions_BC3)
        space_BCD = torch.where(placed_BC1, self.space(features_BCF), self.unplaced_D)
        time_s_P = (torch.arange(patches, device=positions_BC3.device) + 0.5) * self.patch_s
        angle_PF = time_s_P[:, None] * self.rad_per_s
        time_PD = torch.cat([angle_PF.sin(), angle_PF.cos()], 1)
        if ids_BK is None:
            return (space_BCD[:, :, None] + time_PD).flatten(1, 2)
        return take(space_BCD, ids_BK // patches) + time_PD[ids_BK % patches]


class Relations(nn.Module):
    """
    A linear map of how a token's samples correlate with those of the electrodes seen in the same patch, by where these are.

    Fisher-transformed correlations times the harmonics of the other electrodes' places, averaged over them: so covariance, of which
    single electrodes know nothing and on which the best classical pipelines live, is in the tokens from the start, for any montage. Only
    tokens that are seen take part. Standardised per harmonic by `calibrate`. An electrode without others, or without a place, adds nothing.
    """

    def __init__(self, harmonics: int, d: int):
        super().__init__()
        self.weight = nn.Linear(harmonics, d)
        with torch.no_grad():  # where correlations say nothing they are noise beside the spectrum
            self.weight.weight *= 0.5
        self.register_buffer("level_F", torch.zeros(harmonics))
        self.register_buffer("spread_F", torch.ones(harmonics))

    def measure(self, x_BKS: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], grid: Grid) -> torch.Tensor:
        """What is mapped (B, K, F), not yet standardised; `at` are `Places.harmonics`."""
        x_BKS = x_BKS.float() - x_BKS.float().mean(2, keepdim=True)
        unit_BKS = x_BKS * (x_BKS.square().sum(2, keepdim=True) + SILENT * x_BKS.shape[2]).rsqrt()
        unit_BPCS = grid.spread(unit_BKS).transpose(1, 2)
        z_BPCC = torch.atanh(MOST * (unit_BPCS @ unit_BPCS.transpose(2, 3)).float().clamp(-1, 1))
        z_BPCC = z_BPCC * (1 - torch.eye(z_BPCC.shape[3], device=z_BPCC.device))
        at_BCF, placed_BC1 = at
        found_BPCF = z_BPCC @ (at_BCF * placed_BC1)[:, None]
        seen_BCP = placed_BC1.expand(-1, -1, grid.patches)
        if grid.seen_BCP is not None:
            seen_BCP = seen_BCP & grid.seen_BCP
        others_BCP = seen_BCP.sum(1, keepdim=True) - seen_BCP.long()
        return grid.collect(found_BPCF.transpose(1, 2) / others_BCP.clamp_min(1)[..., None])

    @torch.no_grad()
    def calibrate(self, found_NF: torch.Tensor) -> None:
        """Take level and spread of each harmonic from tokens of the training data, as `measure` gives them."""
        spread_F = found_NF.std(0)
        known_F = spread_F > 1e-6  # of one electrode none: others, met later, would be a thousand times too loud
        self.level_F.copy_(torch.where(known_F, found_NF.mean(0), 0.0))
        self.spread_F.copy_(torch.where(known_F, spread_F.clamp_min(1e-3), 1.0))

    def forward(self, x_BKS: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], grid: Grid) -> torch.Tensor:
        return self.weight((self.measure(x_BKS, at, grid) - self.level_F) / self.spread_F)


class Block(nn.Module):
    """A pre-norm transformer block; with `context` its queries attend to that instead of to themselves."""

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.wide, self.narrow = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        with torch.no_grad():  # so that the residual stream does not grow with depth (GPT-2)
            self.out.weight /= math.sqrt(2 * depth)
            self.narrow.weight /= math.sqrt(2 * depth)

    def forward(
        self, z_BKD: torch.Tensor, real_BK: torch.Tensor | None = None, context_BKD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`real_BK` marks the keys that may be attended to; None means all of them, which is faster."""
        h_BKD = self.norm1(z_BKD)
        d = h_BKD.shape[2]
        if context_BKD is None:
            q, k, v = self.qkv(h_BKD).chunk(3, 2)
        else:
            q = F.linear(h_BKD, self.qkv.weight[:d], self.qkv.bias[:d])
            k, v = F.linear(context_BKD, self.qkv.weight[d:], self.qkv.bias[d:]).chunk(2, 2)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        a_BKD = attend(q, k, v, real_BK).transpose(1, 2).flatten(2)
        z_BKD = z_BKD + self.out(a_BKD)
        return z_BKD + self.narrow(F.gelu(self.wide(self.norm2(z_BKD))))


class TransformerBlock(Block):
    """Tokens of all channels and patches attend to each other."""

    def forward(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        return super().forward(z_BKD, grid.real_BK)


BLOCKS = {"transformer": TransformerBlock, "mamba": MambaBlock, "fno": FNOBlock, "hybrid": HybridBlock}


class Encoder(nn.Module):
    """
    Embedded tokens through blocks that mix them, of one of four kinds.

    `forward` gives features of the tokens `ids_BK` computed from these tokens alone, or of all N = C * P tokens if ids_BK is None.
    Masked channels (mask_BC False) and tokens that aren't real take part in nothing; what comes out at their places means nothing.
    Give None instead of a mask without False: it is faster. An adapter has the same interface, and `architecture`, `embed`, `place`.
    """

    def __init__(self, architecture: Architecture):
        super().__init__()
        a = self.architecture = architecture
        self.embed = PatchEmbedding(a.patch, a.d_model)
        self.place = Places(a.d_model, a.patch / a.rate_hz)
        self.relate = Relations(self.place.width, a.d_model) if a.relations else None
        self.blocks = nn.ModuleList(BLOCKS[a.encoder](a.d_model, a.heads, a.layers) for _ in range(a.layers))
        self.norm = nn.LayerNorm(a.d_model)

    def tokens(
        self,
        x_BCT: torch.Tensor,
        positions_BC3: torch.Tensor,
        mask_BC: torch.Tensor | None = None,
        ids_BK: torch.Tensor | None = None,
        real_BK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Grid]:
        """The tokens as the blocks get them, and their grid; arguments as of `forward`."""
        patches = x_BCT.shape[2] // self.architecture.patch
        x_BNS = to_patches(x_BCT, self.architecture.patch)
        if ids_BK is not None:
            x_BNS = take(x_BNS, ids_BK)
        elif mask_BC is not None:
            real_BK = mask_BC.repeat_interleave(patches, 1)
        grid = Grid(x_BCT.shape[1], patches, ids_BK, real_BK)
        z_BKD = self.embed(x_BNS) + self.place(positions_BC3, patches, ids_BK)
        if self.relate is not None:
            z_BKD = z_BKD + self.relate(x_BNS, self.place.harmonics(positions_BC3), grid)
        return z_BKD, grid

    @property
    def front(self) -> list[nn.Module]:
        """What sees samples: all that isn't shared with a network that has a front of its own."""
        return [self.embed] if self.relate is None else [self.embed, self.relate]

    @torch.no_grad()
    def calibrate(self, parts: Sequence) -> None:
        """Standardise what tokens are made of, by windows of the training data (lib/batches.py's Parts)."""
        patch, found = self.architecture.patch, []
        self.embed.calibrate(torch.cat([p.good_patches(patch) for p in parts]))
        for p in parts if self.relate is not None else ():
            x_BNS = to_patches(p.x_BCT, patch)
            real_BN = None if p.mask_BC is None else p.mask_BC.repeat_interleave(x_BNS.shape[1] // p.x_BCT.shape[1], 1)
            grid = Grid(p.x_BCT.shape[1], x_BNS.shape[1] // p.x_BCT.shape[1], None, real_BN)
            found_BNF = self.relate.measure(x_BNS, self.place.harmonics(p.positions_BC3), grid)
            found.append(found_BNF.flatten(0, 1) if real_BN is None else found_BNF[real_BN])
        if found:
            self.relate.calibrate(torch.cat(found))

    def mix(self, z_BKD: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Features of tokens."""
        for block in self.blocks:
            z_BKD = block(z_BKD, grid)
        return self.norm(z_BKD)

    def forward(
        self,
        x_BCT: torch.Tensor,
        positions_BC3: torch.Tensor,
        mask_BC: torch.Tensor | None = None,
        ids_BK: torch.Tensor | None = None,
        real_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.mix(*self.tokens(x_BCT, positions_BC3, mask_BC, ids_BK, real_BK))


ADAPTERS = {"none": lambda encoder: encoder, "perceiver": Perceiver, "nearest": Nearest}


def build_encoder(architecture: Architecture) -> nn.Module:
    """A freshly initialised encoder. Raises Unusable."""
    architecture.check()
    return ADAPTERS[architecture.adapter](Encoder(architecture))


def start_encoder(
    init: str | None, cache, patch_s: float, encoder: str, d_model: int, layers: int, heads: int, adapter: str, queries: int,
    relations: bool,
) -> tuple[nn.Module, list[dict]]:  # fmt: skip
    """The encoder that a phase starts from, of a file or fresh, and the lineage of the file. Raises Unusable."""
    if init:
        loaded, meta = load_encoder(init, cache, asked=True)
        check_places(loaded.architecture.adapter, cache)
        return loaded, inherited(meta, init)
    check_places(adapter, cache)
    patch = round(patch_s * cache.rate_hz)
    if patch != patch_s * cache.rate_hz:
        raise Unusable(f"--patch-s {patch_s:g} is not a whole number of samples at {cache.rate_hz:g} Hz")
    sizes = (encoder, d_model, layers, heads, cache.rate_hz, patch, adapter, queries, relations)
    return build_encoder(Architecture(*sizes)), []


def check_places(adapter: str, cache) -> None:
    """Raises Unusable if an adapter that goes by positions alone has none to go by; stderr is told of channels without one."""
    good, placed = (int(count_R.sum()) for count_R in cache.good_channels())
    if adapter != "nearest" or placed == good:
        return
    if not placed:
        raise Unusable(
            "--adapter nearest goes by positions, and no channel of the cache has one: --adapter perceiver or none"
        )
    print(f"--adapter nearest leaves out {good - placed} of {good} channels, which have no position", file=sys.stderr)


def signal_meta(cache) -> dict:
    """What an encoder must know of the signals it was trained on: rate, unit, filter, reference, scale, channels, cache."""
    names = sorted({name for r in cache.recordings for name in r.names})
    return {
        "rate_hz": cache.rate_hz,
        "unit": cache.unit,
        "signal": cache.signal,
        "channels": names,
        "cache": cache.fingerprint,
    }


def check_signal(meta: dict, cache, path: str | Path, tuned: bool = False) -> None:
    """
    Raises Unusable if a cache holds signals unlike those a file was trained on.

    What is `tuned` on them learns another phase of the filter: of causal against zero-phase stderr is told, no more.
    """
    theirs = {"causal": False} | cache.signal | {"unit": cache.unit}
    ours = {"causal": False} | meta["signal"] | {"unit": meta.get("unit", cache.unit)}  # older files don't say
    for name in (*ALIKE, "unit"):
        if ours.get(name) == theirs.get(name):
            continue
        words = f"{path} was trained at {name} {ours.get(name)}, the cache has {theirs.get(name)}"
        if name != "causal" or not tuned:
            raise Unusable(f"{words}: rebuild the cache {rebuilt_with(name, ours.get(name))}, as the model's")
        print(f"{words}: waves come at other times than it has learned", file=sys.stderr)


def check_alignment(meta: dict, cache, path: str | Path, asked: bool = False) -> None:
    """Raises Unusable if windows of a cache aren't aligned as those a file was trained on; where that was `asked` for stderr is told."""
    ours, theirs = (signal.get("align", "none") for signal in (meta["signal"], cache.signal))
    if ours == theirs:
        return
    words = f"{path} was trained with --align {ours}, the windows come with {theirs}"
    if not asked:
        raise Unusable(f'{words}: call cache.align("{ours}") before')
    print(f"{words}, as asked: its features are of other mixtures than it has learned", file=sys.stderr)


def save_encoder(path: str | Path, encoder: nn.Module, meta: dict) -> None:
    """Write an encoder with everything needed to use it; `meta` has `signal_meta` and `lineage`."""
    meta = {"format": FORMAT, "version": VERSION, "architecture": asdict(encoder.architecture)} | meta
    save_tensors(Path(path), encoder.state_dict(), meta)


def load_encoder(path: str | Path, cache=None, asked: bool = False) -> tuple[nn.Module, dict]:
    """
    An encoder (on the CPU, in evaluation mode) and its metadata, to be trained further.

    Raises Unusable if the file is missing, damaged or no encoder, or if `cache` holds signals unlike those it was trained on, or aligns
    them in another way; of another phase of the filter alone, or an alignment that was `asked` for, stderr is told.
    """
    tensors, meta = load_tensors(path)
    check_format(meta, path, FORMAT, VERSION)
    if cache is not None:
        check_signal(meta, cache, path, tuned=True)
        check_alignment(meta, cache, path, asked)
    try:
        encoder = build_encoder(Architecture(**meta["architecture"]))
        encoder.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise Unusable(f"{path} was written by another version of lib/models.py ({reason}); train it again") from error
    return encoder.eval(), meta
