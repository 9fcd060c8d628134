"""
The velocity network: a convolutional stem and decoder around the blocks of a JEPA encoder.

Every channel goes through the stem by itself: each stage lowers the rate, down to one token per (channel, patch). The blocks of the
encoder mix the tokens of all channels. The decoder goes back up and adds the stem's features of each stage. Weights thus depend neither
on the montage nor on the length of a window. Time and conditions shift and scale the features of every stage and block (adaLN-zero,
Peebles 2023). At step 0 the features of a clean window are exactly those of the encoder it came from.

Layouts are channels-last, (rows, time, width), which on CPUs saves every reordering around a convolution.

Shape letters: B windows, C channels, T samples, P patches, N = C * P tokens, D width of tokens, V width of conditions, W width of a
stage, R = B * C rows, F conditions or waves.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib import rhythm
from lib.conditions import Condition, Conditioning
from lib.grid import Grid
from lib.models import Architecture, Encoder

WAVES_T = 16  # frequencies of the code of time, from half a turn to 32 over its unit
STRIDE = 5  # a stage divides the rate by this much at most


@dataclass(frozen=True)
class Shape:
    """What it takes to build a velocity network beside its encoder's Architecture; stored with its weights."""

    widths: tuple[int, ...] = (16, 48)  # of the stages above the tokens, the finest first; the last one repeats
    kernel: int = 3  # taps of a convolution
    blocks: int = 1  # convolutions of a stage, in the stem and in the decoder
    condition: int = 64  # width of time and conditions
    rhythms: int = 0  # whose clocks the stem is shown (lib/rhythm.py)
    look: bool = False  # whether features of the clean window are a condition


def strides(patch: int) -> list[int]:
    """Factors of a patch's length, one per stage, large ones first: the finest stage costs most. Raises ValueError where a prime factor is over 13."""
    left, found = patch, []
    for prime in (2, 3, 5, 7, 11, 13):
        while left % prime == 0:
            left //= prime
            if found and found[-1] * prime <= STRIDE:
                found[-1] *= prime
            else:
                found.append(prime)
    if left > 1:
        raise ValueError(f"a patch of {patch} samples has the factor {left}")
    return sorted(found, reverse=True)


class ConvBlock(nn.Module):
    """Normalised, shifted and scaled features through a convolution and back, added to what they were (rows, time, width)."""

    def __init__(self, w: int, kernel: int):
        super().__init__()
        self.wide = nn.Conv2d(w, 2 * w, (1, kernel), padding=(0, kernel // 2))  # in 2-D only: channels-last memory
        self.narrow = nn.Linear(2 * w, w)
        with torch.no_grad():
            self.narrow.weight *= 0.3  # the residual stream starts nearly linear

    def forward(self, z_RTW: torch.Tensor, shift_R1W: torch.Tensor, scale_R1W: torch.Tensor) -> torch.Tensor:
        h_RTW = modulated(F.layer_norm(z_RTW, z_RTW.shape[2:]), shift_R1W, scale_R1W)
        # squeezed, not indexed: the gradient of an index is a copy into zeros
        h_RTW = self.wide(h_RTW.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        return z_RTW + self.narrow(F.silu(h_RTW))


def modulated(z: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """z x (1 + scale) + shift, in one pass."""
    return torch.addcmul(shift, z, 1 + scale)


class Velocity(nn.Module):
    """
    From noisy windows (B, C, T), times (B) and codes (B, F + 2 Q; NaN for null) to an output of the windows' shape, zero at first.

    Codes are those of F conditions, then frequency and phase of Q rhythms.

    Windows of any number of channels; of any length, which is filled up with zeros to whole patches inside. Beside the output come the
    features (B, N, D) of the tokens. `seen_BD`, if it was built to `look`, is what another encoder makes of the clean window.
    """

    def __init__(self, encoder: Encoder, conditions: Sequence[Condition], shape: Shape):
        super().__init__()
        a, d = encoder.architecture, encoder.architecture.d_model
        self.shape, self.strides = shape, strides(a.patch)
        self.encoder = encoder
        above = len(self.strides) - 1
        widths = [*shape.widths, *[shape.widths[-1]] * above][:above]
        self.widths = [*widths, d]
        steps = list(zip(self.strides, [1, *widths], self.widths, strict=True))
        self.down = nn.ModuleList(nn.Linear(s * fine, coarse) for s, fine, coarse in steps)
        self.up = nn.ModuleList(nn.Linear(coarse, s * fine) for s, fine, coarse in steps[1:])
        self.clock = nn.Linear(2 * shape.rhythms * rhythm.ORDER, self.widths[0], bias=False) if shape.rhythms else None
        self.stem = nn.ModuleList(ConvBlock(w, shape.kernel) for w in widths for _ in range(shape.blocks))
        self.decoder = nn.ModuleList(ConvBlock(w, shape.kernel) for w in widths for _ in range(shape.blocks))
        self.last = nn.Linear(self.widths[0], self.strides[0])
        self.time = nn.Sequential(nn.Linear(2 * WAVES_T, shape.condition), nn.SiLU(), nn.Linear(shape.condition, shape.condition))  # fmt: skip
        self.given = Conditioning(conditions, shape.condition)
        self.look = nn.Linear(d, shape.condition, bias=False) if shape.look else None  # so that no features add nothing
        self.sizes = [w for w in widths for _ in range(2 * shape.blocks)] * 2 + [self.widths[0]] * 2
        self.modulate = nn.Linear(shape.condition, 3 * d * a.layers + sum(self.sizes))
        for layer in (self.modulate, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        wave_F = math.pi * 2 ** torch.linspace(0, 6, WAVES_T)
        self.register_buffer("wave_F", wave_F, persistent=False)
        self.checkpointing = (
            False  # forget activations of stages and blocks and compute them twice: less memory, more time
        )

    @property
    def codes(self) -> int:
        """Numbers that a window's conditions and rhythms are."""
        return len(self.given.conditions) + 2 * self.shape.rhythms

    @property
    def shared(self) -> nn.Parameter:
        """The last parameters that all losses meet in: gradients are compared there."""
        return self.encoder.norm.weight

    def forward(
        self,
        x_BCT: torch.Tensor,
        t_B: torch.Tensor,
        code_BF: torch.Tensor,
        positions_BC3: torch.Tensor,
        mask_BC: torch.Tensor | None = None,
        seen_BD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        B, C, T = x_BCT.shape
        x_BCT = F.pad(x_BCT, (0, -T % self.encoder.architecture.patch))
        stem, decoder, blocks, ends = self.modulations(t_B, code_BF, C, seen_BD)
        z_RTW, skips = x_BCT.flatten(0, 1)[:, :, None], []
        for stage, (stride, down) in enumerate(zip(self.strides, self.down, strict=True)):
            z_RTW = down(z_RTW.reshape(B * C, z_RTW.shape[1] // stride, -1))
            if stage == 0 and self.clock is not None:
                rhythm_BQ2 = code_BF[:, len(self.given.conditions) :].unflatten(1, (-1, 2))
                z_BTW = self.clock(rhythm.clock(rhythm_BQ2, z_RTW.shape[1], stride, T))
                z_RTW = z_RTW + (z_BTW.repeat_interleave(C, 0) if C > 1 else z_BTW)
            if stage < len(self.up):
                z_RTW = self.stage(self.stem, stage, z_RTW, stem)
                skips.append(z_RTW)
        patches = z_RTW.shape[1]
        z_BND = z_RTW.reshape(B, C * patches, -1) + self.encoder.place(positions_BC3, patches)
        real_BN = None if mask_BC is None else mask_BC.repeat_interleave(patches, 1)
        z_BND = self.mix(z_BND, Grid(C, patches, None, real_BN), blocks)
        z_RTW = z_BND.reshape(B * C, patches, -1)
        for stage in reversed(range(len(skips))):
            z_RTW = self.up[stage](z_RTW).reshape(skips[stage].shape) + skips[stage]
            z_RTW = self.stage(self.decoder, stage, z_RTW, decoder)
        out_RTW = self.last(modulated(F.layer_norm(z_RTW, z_RTW.shape[2:]), *ends))
        return out_RTW.reshape(B, C, -1)[:, :, :T], z_BND

    def modulations(
        self, t_B: torch.Tensor, code_BF: torch.Tensor, channels: int, seen_BD: torch.Tensor | None = None
    ) -> tuple[list, list, list, list]:
        """Shift and scale of each convolution of the stem and the decoder, by row; shift, scale and gate of the blocks; those of the end."""
        t_B = torch.cat([t_B, t_B.new_ones(1)])  # the last row: a clean window without conditions
        code_BF = F.pad(code_BF, (0, 0, 0, 1), value=math.nan)
        angle_BF = t_B[:, None] * self.wave_F
        c_BV = self.time(torch.cat([angle_BF.sin(), angle_BF.cos()], 1)) + self.given(code_BF)
        if seen_BD is not None:
            c_BV = c_BV + F.pad(self.look(seen_BD), (0, 0, 0, 1))
        m_BX = self.modulate(F.silu(c_BV))
        trunk = 3 * self.encoder.architecture.d_model * len(self.encoder.blocks)
        blocks = (m_BX[:-1, :trunk] - m_BX[-1:, :trunk])[:, None].chunk(3 * len(self.encoder.blocks), 2)
        rows = m_BX[:-1, None, trunk:]
        rows = (rows.repeat_interleave(channels, 0) if channels > 1 else rows).split(self.sizes, 2)
        n = 2 * len(self.stem)
        return rows[:n], rows[n : 2 * n], blocks, rows[2 * n :]

    def stage(self, side: nn.ModuleList, stage: int, z_RTW: torch.Tensor, rows: list) -> torch.Tensor:
        """The convolutions of one stage."""
        for i in range(stage * self.shape.blocks, (stage + 1) * self.shape.blocks):
            z_RTW = self.run(side[i], z_RTW, rows[2 * i], rows[2 * i + 1])
        return z_RTW

    def mix(self, z_BND: torch.Tensor, grid: Grid, rows: list) -> torch.Tensor:
        """Tokens through the encoder's blocks, each modulated from outside, whatever its kind."""
        for i, block in enumerate(self.encoder.blocks):
            shift_B1D, scale_B1D, gate_B1D = rows[3 * i : 3 * i + 3]
            z_BND = self.run(self.block, block, z_BND, grid, shift_B1D, scale_B1D, gate_B1D)
        return self.encoder.norm(z_BND)

    @staticmethod
    def block(block: nn.Module, z_BND, grid: Grid, shift_B1D, scale_B1D, gate_B1D) -> torch.Tensor:
        """z + (1 + gate) x what the block adds to its modulated input: the block itself where all three are zero."""
        u_BND = modulated(z_BND, shift_B1D, scale_B1D)
        return z_BND + (1 + gate_B1D) * (block(u_BND, grid) - u_BND)

    def run(self, work, *inputs) -> torch.Tensor:
        """work(*inputs), whose inside is computed again in the backward pass if memory is short."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(work, *inputs, use_reentrant=False)
        return work(*inputs)


def build_velocity(architecture: Architecture, conditions: Sequence[Condition], shape: Shape) -> Velocity:
    """A freshly initialised network."""
    return Velocity(Encoder(architecture), conditions, shape)


def describe(net: Velocity) -> dict:
    """What a model file must say to build the network again."""
    conditions = [asdict(c) for c in net.given.conditions]
    return {"architecture": asdict(net.encoder.architecture), "shape": asdict(net.shape), "conditions": conditions}


def rebuild(meta: dict) -> Velocity:
    """The network that `describe` described, not yet with its weights."""
    conditions = [Condition(c["name"], tuple(c["classes"]), c["mean"], c["std"]) for c in meta["conditions"]]
    shape = Shape(**{**meta["shape"], "widths": tuple(meta["shape"]["widths"])})
    return build_velocity(Architecture(**meta["architecture"]), conditions, shape)
