"""
Augmentations: two views of a window that mean the same to a brain but not to a spectrum analyser.

Random numbers are made by `Draw` from (seed, step, index of the window in the global batch). A window's views are therefore the same
on any rank, in any micro-batch and beside any other windows. Strengths are in physical units: the most that a window can get of each
augmentation; how much it gets is drawn. Everything runs on the device of the windows. Units and length stay; channels only change through the mask.

Shape letters: B windows, C channels, T samples, F frequencies, K knots or taps, W any width.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lib.masks import uniform

TAPS, PHASES = (
    16,
    1024,
)  # of the interpolation, per sample: its error is at -60 dB up to 0.75 of half the rate, -13 dB at 0.9
TAPE = 2**22  # samples of noise from which every channel is cut: 16 MB
SLOWEST_HZ = 0.5  # of the 1/f noise: what is slower would be an offset, which caches have filtered out

Draw = Callable[[str, int], torch.Tensor]  # (purpose, width) -> numbers in [0, 1), float32 (B, W)


@dataclass(frozen=True)
class Strength:
    """The most that a view does to a window; 0 or None: not at all."""

    warp_s: float = 0.0  # displacement in time by a smooth curve
    warp_hz: float = 0.5  # its fastest part
    shift_s: float = 0.0  # displacement of the whole window
    white_db: float | None = None  # power of white noise relative to the channel's own
    pink_db: float | None = None  # power of 1/f noise
    amplitude_db: float = 0.0  # gain per channel, up or down
    bandstop_hz: float = 0.0  # width of a band that is taken out
    dropout: float = 0.0  # share of the good channels that are masked
    flip: float = 0.0  # probability of the opposite sign


def draws(seed: int, step: int, index_B: np.ndarray, device: torch.device | str = "cpu") -> Draw:
    """The random numbers of windows; two views of one window have two indices."""

    def draw(purpose: str, width: int) -> torch.Tensor:
        u_BW = uniform(seed, step, index_B, width, f"view {purpose}")
        return torch.from_numpy(u_BW).float().to(device)

    return draw


def make_view(
    x_BCT: torch.Tensor,
    positions_BC3: torch.Tensor,
    mask_BC: torch.Tensor,
    rate_hz: float,
    strength: Strength,
    draw: Draw,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows with everything that `strength` asks for done to them, and their channel mask."""
    s = strength
    if s.warp_s or s.shift_s:
        x_BCT = augment_time(x_BCT, rate_hz, s.warp_s, s.warp_hz, s.shift_s, draw)
    if s.amplitude_db:
        x_BCT = augment_amplitude(x_BCT, s.amplitude_db, draw)
    if s.bandstop_hz:
        x_BCT = augment_bandstop(x_BCT, rate_hz, s.bandstop_hz, draw)
    if s.white_db is not None:
        x_BCT = augment_noise(x_BCT, s.white_db, 0.0, rate_hz, draw)
    if s.pink_db is not None:
        x_BCT = augment_noise(x_BCT, s.pink_db, 1.0, rate_hz, draw)
    if s.flip:
        x_BCT = augment_sign(x_BCT, s.flip, draw)
    return x_BCT, augment_dropout(positions_BC3, mask_BC, s.dropout, draw) if s.dropout else mask_BC


# ----------------------------------------------------------------------------
# time


def augment_time(
    x_BCT: torch.Tensor, rate_hz: float, warp_s: float, warp_hz: float, shift_s: float, draw: Draw
) -> torch.Tensor:
    """
    Displace all channels of a window alike: by a smooth curve that is 0 at both ends, at most `warp_s` high and no faster than
    `warp_hz`, and by one shift of at most `shift_s`. What would come from beyond an edge is mirrored.

    Interpolated by a Kaiser-windowed sinc. Raises ValueError for a warp that would make time run backwards.
    """
    B, _, T = x_BCT.shape
    knots = max(1, int(2 * T / rate_hz * warp_hz))
    if 2 * math.pi * warp_hz * warp_s >= 1:
        raise ValueError(
            f"a warp of {warp_s:g} s at {warp_hz:g} Hz turns time back; at most {1 / (2 * math.pi * warp_hz):.3g} s"
        )
    sine_KT = torch.sin(math.pi * torch.outer(torch.arange(1, knots + 1), (torch.arange(T) + 0.5) / T)).to(x_BCT)
    weight_BK = 2 * draw("warp", knots) - 1
    curve_BT = weight_BK @ sine_KT
    height_B1 = curve_BT.abs().amax(1, keepdim=True).clamp_min(1e-6)
    most_B1, shift_B1 = draw("warp height", 1) * warp_s * rate_hz, (2 * draw("shift", 1) - 1) * shift_s * rate_hz
    # the height counts where the curve alone would be flatter than it may be steep, else the steepness
    slope_B1 = curve_BT.diff(dim=1).abs().amax(1, keepdim=True).clamp_min(1e-6)
    steepest = 2 * math.pi * warp_hz * warp_s
    scale_B1 = torch.minimum(most_B1 / height_B1, steepest / slope_B1) if warp_s else torch.zeros_like(height_B1)
    at_BT = torch.arange(T).to(x_BCT) + scale_B1 * curve_BT + shift_B1
    return resampled(x_BCT, at_BT)


def resampled(x_BCT: torch.Tensor, at_BT: torch.Tensor) -> torch.Tensor:
    """The windows at times `at_BT` in samples, between them interpolated, beyond the edges mirrored."""
    B, C, T = x_BCT.shape
    first_BT = at_BT.floor()
    tap_K = torch.arange(1 - TAPS // 2, TAPS // 2 + 1, device=x_BCT.device)
    weight_BTK = F.embedding(((at_BT - first_BT) * PHASES).round().long(), interpolator(x_BCT.device))
    place_BTK = first_BT.long()[:, :, None] + tap_K
    place_BTK = (T - 1) - ((place_BTK % (2 * T - 2)) - (T - 1)).abs()
    rows_BTK = place_BTK + T * torch.arange(B, device=x_BCT.device)[:, None, None]
    # a weighted sum of rows, all channels of a moment at once: one pass over memory
    x_MC = F.embedding_bag(
        rows_BTK.view(B * T, TAPS), x_BCT.transpose(1, 2).reshape(B * T, C), mode="sum",
        per_sample_weights=weight_BTK.view(B * T, TAPS),
    )  # fmt: skip
    return x_MC.view(B, T, C).transpose(1, 2).contiguous()


@functools.cache
def interpolator(device: torch.device) -> torch.Tensor:
    """Weights of the taps between two samples, float32 (PHASES + 1, TAPS): a sinc under a Kaiser window (beta 6), their sum 1."""
    apart_PK = torch.arange(PHASES + 1)[:, None] / PHASES - torch.arange(1 - TAPS // 2, TAPS // 2 + 1)
    window_PK = torch.special.i0(6 * (1 - (apart_PK / (TAPS / 2)).square()).clamp_min(0).sqrt())
    weight_PK = torch.sinc(apart_PK) * window_PK
    return (weight_PK / weight_PK.sum(1, keepdim=True)).to(device)


# ----------------------------------------------------------------------------
# signal


def augment_noise(x_BCT: torch.Tensor, most_db: float, exponent: float, rate_hz: float, draw: Draw) -> torch.Tensor:
    """
    Add independent noise with power spectrum 1/f^exponent to every channel, its power relative to the channel's own (about its mean)
    uniform in dB between most_db - 20 and most_db. A silent channel stays silent.
    """
    B, C, T = x_BCT.shape
    tape_N = noise_tape(exponent, rate_hz if exponent else 0.0, x_BCT.device)
    level_B11 = 10 ** ((most_db - 20 * draw(f"noise level {exponent}", 1)[:, :, None]) / 20)
    first_BC = (draw(f"noise {exponent}", C) * (TAPE - T)).long()
    noise_BCT = tape_N.unfold(0, T, 1)[first_BC]
    return torch.addcmul(x_BCT, noise_BCT, level_B11 * x_BCT.std(2, keepdim=True, correction=0))


@functools.cache
def noise_tape(exponent: float, rate_hz: float, device: torch.device) -> torch.Tensor:
    """
    Gaussian noise of variance 1, always the same, float32 (TAPE,): numbers per sample of every window would cost more than the step.

    Two channels rarely get overlapping stretches, and hardly ever at the same time.
    """
    tape_N = torch.randn(TAPE, generator=torch.Generator().manual_seed(0))
    if exponent:
        hz_F = torch.fft.rfftfreq(TAPE, 1 / rate_hz)
        gain_F = torch.where(hz_F >= SLOWEST_HZ, hz_F.clamp_min(SLOWEST_HZ) ** (-exponent / 2), 0.0)
        tape_N = torch.fft.irfft(torch.fft.rfft(tape_N) * gain_F)
    return (tape_N / tape_N.std()).to(device)


def augment_amplitude(x_BCT: torch.Tensor, most_db: float, draw: Draw) -> torch.Tensor:
    """A gain per channel, uniform in dB between -most_db and most_db."""
    return x_BCT * 10 ** ((2 * draw("amplitude", x_BCT.shape[1]) - 1) * most_db / 20)[:, :, None]


def augment_bandstop(x_BCT: torch.Tensor, rate_hz: float, width_hz: float, draw: Draw) -> torch.Tensor:
    """
    Take out a band of up to `width_hz` around a frequency anywhere up to half the rate: zero phase, edges of 1 Hz, the same in all channels.

    The window is continued by its mirror image, so that its ends don't ring into each other.
    """
    T = x_BCT.shape[2]
    hz_F = torch.fft.rfftfreq(2 * T, 1 / rate_hz).to(x_BCT)
    centre_B1, half_B1 = draw("bandstop centre", 1) * rate_hz / 2, draw("bandstop width", 1) * width_hz / 2
    outside_BF = ((hz_F - centre_B1).abs() - half_B1).clamp(0, 1)  # 1: 1 Hz beyond the edge of the band
    gain_BF = torch.where(half_B1 > 0, 0.5 - 0.5 * torch.cos(math.pi * outside_BF), torch.ones_like(outside_BF))
    spectrum_BCF = torch.fft.rfft(torch.cat([x_BCT, x_BCT.flip(2)], 2))
    return torch.fft.irfft(spectrum_BCF * gain_BF[:, None, :], n=2 * T)[:, :, :T].contiguous()


def augment_sign(x_BCT: torch.Tensor, probability: float, draw: Draw) -> torch.Tensor:
    """The opposite sign of all channels, or none."""
    return torch.where(draw("sign", 1)[:, :, None] < probability, -x_BCT, x_BCT)


# ----------------------------------------------------------------------------
# channels


def augment_dropout(positions_BC3: torch.Tensor, mask_BC: torch.Tensor, most: float, draw: Draw) -> torch.Tensor:
    """
    A mask without up to `most` of the good channels, rounded down, at least one stays: in half of the windows scattered ones, in half
    those nearest to one of them. Electrodes without a position (NaN) are far from all.
    """
    u_BC, u_B3 = draw("dropout", mask_BC.shape[1]), draw("dropout how", 3)
    good_B = mask_BC.sum(1)
    drop_B = torch.minimum((u_B3[:, 0] * most * good_B).round().long(), good_B - 1)
    drop_B = torch.minimum(drop_B, (most * good_B).floor().long())
    priority_BC = torch.where(mask_BC, u_BC, torch.inf)
    centre_B = priority_BC.argmin(1)
    centre_B13 = positions_BC3.gather(1, centre_B[:, None, None].expand(-1, 1, 3))
    distance_BC = (positions_BC3 - centre_B13).norm(dim=2).nan_to_num(nan=1e3)
    distance_BC = distance_BC.scatter(1, centre_B[:, None], 0.0)
    order_BC = torch.where((u_B3[:, 1:2] < 0.5) & mask_BC, distance_BC, priority_BC)
    rank_BC = order_BC.argsort(dim=1, stable=True).argsort(dim=1)
    return mask_BC & (rank_BC >= drop_B[:, None])
