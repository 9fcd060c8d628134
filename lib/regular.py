"""
What every turn of a machine repeats: the mean signal given the phases of its rhythms (lib/rhythm.py), found, taken off windows and put back.

Half of the power of a bearing's vibration may be the same in every turn, up to harmonics that are a few samples long. Phases have to be that fine,
and machines drift, so they are measured in every window by the signal's own lines: those that blows and their modulation by the shaft have at
all sums of two rhythms' harmonics. What is left is random, and that is what a flow has to learn. This is the separation of Antoni and Randall (2004) with a clock from the signal
itself; it is done for recordings of one channel.

Frequencies are in cycles per sample, phases in turns at the middle of a window. Shape letters: B and N windows, T samples, Q rhythms, G groups,
K kinds (signal, envelope), M harmonics of the first rhythm, N of the second.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from lib.rhythm import FEWEST_CYCLES, HARMONICS, HIGHEST, SIDEBANDS, envelope

FINE, COARSE = 512, 32  # phases that are tried of either
CLEAR = 4  # sidebands that choose among them: those further out are too weak to, but sharpen what was chosen
NEARER, TRIED = (1.0, 0.25), 9  # how far around it is looked then, of the distance of two phases, and at how many
NEAR, NEARBY = 0.02, 41  # turns that a phase differs at most from one hop to the next, and how many are tried
PASSES, SHARPER = 3, 2  # of phases given the mean and the mean given phases, first by the clear sidebands, then by all
SHARED = 2  # times that all orders are given what is left: some have nearly the same frequency
WIDER = 0.05  # of the power: what all sidebands must explain more than the clear ones, or they are noise in the wave
QUIET = 0.1  # what lines of the envelope count beside those of the signal, whose phases are finer
MOST_WINDOWS = 1024
SOME = 16  # windows at a time, so that their carriers stay in the cache
MORE = 0.1  # of the power: what must repeat more with another rhythm; phases that fit noise best give it up to half of this


@dataclass
class Regular:
    """Mean lines of the signal and the envelope of each group at all sums of two rhythms' harmonics, and the signal they are of."""

    mean_GKMN: torch.Tensor  # complex64, K signal and envelope; M harmonics of the first rhythm, N of the second
    weight_GKMN: torch.Tensor  # float32, one over the variance around it; 0 for lines that don't count
    wave_GMN: torch.Tensor  # complex64, amplitudes of the signal

    def phases(
        self, x_BT: torch.Tensor, rhythm_BQ: torch.Tensor, group_B: np.ndarray, else_BQ: torch.Tensor
    ) -> torch.Tensor:
        """Where windows are in their group's turns (B, Q), of greatest likelihood for Gaussian noise around the mean lines; else `else_BQ`."""
        at = torch.from_numpy(group_B)
        line_BKMN = lines(x_BT, rhythm_BQ, self.mean_GKMN.shape[3] // 2)
        turn_BQ = _likeliest(line_BKMN, self.mean_GKMN[at], self.weight_GKMN[at], rhythm_BQ)
        return torch.where((self.weight_GKMN[at].amax((1, 2, 3)) > 0)[:, None], turn_BQ.to(else_BQ), else_BQ)

    def wave(self, rhythm_BQ2: torch.Tensor, group_B: np.ndarray, samples: int) -> torch.Tensor:
        """The part of windows that every turn has (B, T), zero for a group that has none and where no phase is known."""
        rows = zip(rhythm_BQ2.split(SOME), torch.from_numpy(group_B).split(SOME), strict=True)
        return torch.cat([self._wave(rhythm_SQ2, at_S, samples) for rhythm_SQ2, at_S in rows])

    def _wave(self, rhythm_BQ2: torch.Tensor, at_B: torch.Tensor, samples: int) -> torch.Tensor:
        sides = self.wave_GMN.shape[2] // 2
        low_BMT, high_BNT = _carriers(rhythm_BQ2[:, :, 0], samples, sides, rhythm_BQ2[:, :, 1])
        side_BMT = self.wave_GMN[at_B].to(low_BMT.dtype) @ high_BNT
        known_B1 = rhythm_BQ2[:, :1, :].isfinite().all(2)
        return 2 * (side_BMT.real * low_BMT.real - side_BMT.imag * low_BMT.imag).sum(1) * known_B1


def lines(x_BT: torch.Tensor, rhythm_BQ: torch.Tensor, sides: int) -> torch.Tensor:
    """Signal and envelope of windows at the sums of two rhythms' harmonics, tapered, complex (B, K, M, N)."""
    low_BMT, high_BNT = _carriers(-rhythm_BQ, x_BT.shape[1], sides)
    return torch.einsum("bknt,bmt->bkmn", _tapered(x_BT)[:, :, None] * high_BNT[:, None], low_BMT)


def _tapered(x_BT: torch.Tensor) -> torch.Tensor:
    """Signal and envelope of windows, tapered (B, K, T)."""
    loud_BT = envelope(x_BT[:, None])
    both_BKT = torch.stack([x_BT, loud_BT - loud_BT.mean(1, keepdim=True)], 1)
    return both_BKT * torch.hann_window(x_BT.shape[1], dtype=x_BT.dtype)


class _Tones:
    """Cosines and sines at the sums of two rhythms' harmonics: of windows that share their rhythms, lines and waves are matrix products."""

    def __init__(self, hz_Q: torch.Tensor, samples: int):
        low_1MT, high_1NT = _carriers(hz_Q[None], samples, SIDEBANDS)
        tone_MNT = low_1MT[0, :, None] * high_1NT[0]
        self.orders = tone_MNT.shape[:2]
        self.wave_2XT = torch.view_as_real(tone_MNT).flatten(0, 1).permute(2, 0, 1).contiguous()

    def lines(self, x_BKT: torch.Tensor) -> torch.Tensor:
        """Complex (B, K, M, N)."""
        real, imaginary = (x_BKT @ wave_XT.T for wave_XT in self.wave_2XT)
        return torch.complex(real, -imaginary).unflatten(2, self.orders)

    def wave(self, amplitude_BMN: torch.Tensor) -> torch.Tensor:
        """The signal (B, T) of these complex amplitudes."""
        part_2BX = torch.view_as_real(amplitude_BMN.flatten(1)).permute(2, 0, 1)
        return 2 * (part_2BX[0] @ self.wave_2XT[0] - part_2BX[1] @ self.wave_2XT[1])


def _carriers(
    hz_BQ: torch.Tensor, samples: int, sides: int, turn_BQ: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(2 pi i (frequency x time + phase)) to the powers 0 … HARMONICS of the first rhythm and -sides … sides of the second, complex64."""
    at_T = torch.arange(samples, dtype=torch.float64) + 0.5 - samples / 2
    angle_BQT = hz_BQ.double()[:, :, None] * at_T + (0.0 if turn_BQ is None else turn_BQ.double()[:, :, None])
    first_B1T, second_B1T = torch.nn.functional.pad(angle_BQT.nan_to_num(), (0, 0, 0, 2 - hz_BQ.shape[1])).split(1, 1)

    def power(angle_B1T: torch.Tensor, order_M: torch.Tensor) -> torch.Tensor:
        angle_BMT = (2 * math.pi * ((order_M[:, None] * angle_B1T) % 1)).float()
        return torch.polar(torch.ones_like(angle_BMT), angle_BMT)

    step = 1 + math.isqrt(HARMONICS)  # sines of a few orders, and products for the others
    ones_BMT, steps_BMT = (power(first_B1T, torch.arange(step) * k) for k in (1, step))
    low_BMT = (steps_BMT[:, :, None] * ones_BMT[:, None]).flatten(1, 2)[:, : HARMONICS + 1]
    return low_BMT, power(second_B1T, torch.arange(-sides, sides + 1))


def _turned(turn_BQ: torch.Tensor, sides: int = SIDEBANDS) -> torch.Tensor:
    """What lines of windows at these phases are turned by, complex (B, 1, M, N)."""
    order_M, order_N = torch.arange(HARMONICS + 1.0), torch.arange(-sides, sides + 1.0)
    turn_B2 = torch.nn.functional.pad(turn_BQ.nan_to_num().float(), (0, 2 - turn_BQ.shape[1]))
    angle_BMN = order_M[:, None] * turn_B2[:, 0, None, None] + order_N * turn_B2[:, 1, None, None]
    return torch.polar(torch.ones_like(angle_BMN), 2 * math.pi * angle_BMN)[:, None]


def nothing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `learn` would give of a signal that repeats nothing."""
    shape = (HARMONICS + 1, 2 * SIDEBANDS + 1)
    none_KMN = torch.zeros(2, *shape, dtype=torch.complex64)
    return none_KMN, torch.zeros(2, *shape), none_KMN[0]


def _likeliest(line_BKMN, mean_BKMN, weight_BKMN, rhythm_BQ: torch.Tensor) -> torch.Tensor:
    """Phases (B, Q) at which lines are most alike the mean: the likelihood at all of them is one Fourier transform."""
    alike_BMN = (line_BKMN * mean_BKMN.conj() * weight_BKMN).sum(1).to(torch.complex64)
    sides, order_N = alike_BMN.shape[2] // 2, torch.arange(-CLEAR, CLEAR + 1)
    sides_BMC = alike_BMN.new_zeros(*alike_BMN.shape[:2], COARSE)
    sides_BMC[:, :, order_N] = alike_BMN[:, :, sides + order_N]
    parts = (torch.fft.fft(part_SMC, FINE, dim=1).real for part_SMC in torch.fft.fft(sides_BMC).split(SOME))
    best_B = torch.cat([part_SFC.flatten(1).argmax(1) for part_SFC in parts])
    turn_BQ = torch.stack([best_B // COARSE / FINE, best_B % COARSE / COARSE], 1)[:, : rhythm_BQ.shape[1]]
    fine_B = (weight_BKMN * _outer(sides)).amax((1, 2, 3)) > 0
    if fine_B.any():
        turn_BQ = torch.where(fine_B[:, None], _sharpened(turn_BQ, alike_BMN), turn_BQ)
    return torch.where(rhythm_BQ.isfinite(), (turn_BQ + 0.5) % 1 - 0.5, math.nan)


def _outer(sides: int) -> torch.Tensor:
    """Which sidebands are further out than the clear ones (N)."""
    return torch.arange(-sides, sides + 1).abs() > CLEAR


def _sharpened(turn_BQ: torch.Tensor, alike_BMN: torch.Tensor) -> torch.Tensor:
    """Phases near these at which lines are most alike the mean, one rhythm after the other."""
    sides, turn_BQ = alike_BMN.shape[2] // 2, turn_BQ.clone()
    orders = (torch.arange(HARMONICS + 1.0), torch.arange(-sides, sides + 1.0))
    for part in NEARER:
        for q in reversed(range(turn_BQ.shape[1])):
            near_G = torch.linspace(-part, part, TRIED) / (FINE, COARSE)[q]
            apart_XG = torch.polar(torch.ones(len(orders[q]), TRIED), -2 * math.pi * orders[q][:, None] * near_G)
            own_BX = (alike_BMN * _turned(turn_BQ, sides)[:, 0].conj()).sum(2 - q)
            turn_BQ[:, q] += near_G[(own_BX @ apart_XG).real.argmax(1)]
    return turn_BQ


def learn(
    x_NT: torch.Tensor, hop: int, rhythm_Q: np.ndarray
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], float]:
    """
    Mean (2, M, N), weight and wave (M, N) of a signal's windows, each `hop` samples after the one before, whose rhythms are known, and the share of the power that the wave is.

    Phases are followed from window to window first, so that high harmonics, which a slowly drifting machine blurs within a second, stay sharp.
    Sidebands far out are taken where they explain clearly more, and sharpen phases where that leaves less of the signal.
    """
    hz_Q = torch.from_numpy(rhythm_Q)
    rhythm_NQ = hz_Q.expand(len(x_NT), -1)
    tones = _Tones(hz_Q, x_NT.shape[1])
    line_NKMN = tones.lines(_tapered(x_NT))
    all_KMN = _orders(hz_Q, x_NT.shape[1])
    clear_KMN = all_KMN * ~_outer(SIDEBANDS)
    turn_NQ = _followed(line_NKMN, clear_KMN / (line_NKMN.abs().square().mean(0) + 1e-12), hz_Q, hop)
    hops = x_NT.shape[1] / hop / len(x_NT)

    def settled(turn_NQ: torch.Tensor, counts_KMN: torch.Tensor, passes: int) -> tuple[torch.Tensor, tuple]:
        tables = _mean(line_NKMN * _turned(turn_NQ).conj(), counts_KMN, hops)
        for _ in range(passes):
            turn_NQ = _likeliest(line_NKMN, *(t[None] for t in tables), rhythm_NQ)
            tables = _mean(line_NKMN * _turned(turn_NQ).conj(), counts_KMN, hops)
        return turn_NQ, tables

    def with_wave(turn_NQ: torch.Tensor, tables: tuple, counts_KMN: torch.Tensor, times: int) -> tuple[tuple, float]:
        wave_MN, share = _wave_of(x_NT, line_NKMN[:, :1], tones, turn_NQ, counts_KMN[:1], hops, times)
        return (*tables, wave_MN), share

    clear = settled(turn_NQ, clear_KMN, PASSES)
    found = with_wave(*clear, clear_KMN, 1)
    if (all_KMN == clear_KMN).all():
        return found
    sharper = settled(clear[0], all_KMN, SHARPER)
    wide = max((with_wave(*phases, all_KMN, SHARED) for phases in (clear, sharper)), key=lambda w: w[1])
    return wide if wide[1] > found[1] + WIDER else found


def _mean(turned_NKMN: torch.Tensor, counts_KMN: torch.Tensor, hops: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean lines, the less the less sure they are, and their weights; of windows of which a share `hops` is independent."""
    mean_KMN = turned_NKMN.mean(0)
    spread_KMN = turned_NKMN.abs().square().mean(0) - mean_KMN.abs().square()
    sure_KMN = (1 - spread_KMN * hops / (mean_KMN.abs().square() + 1e-12)).clamp(0, 1)
    return mean_KMN * sure_KMN, counts_KMN / (spread_KMN + 1e-12)


def _wave_of(x_NT, line_N1MN, tones: _Tones, turn_NQ, counts_1MN, hops: float, times: int):
    """
    The wave (M, N) that windows of these lines and phases repeat, and the share of their power that it is.

    Orders whose frequencies a window can't tell apart hear each other. Over many windows phases that come and go keep them apart, those that don't
    are counted twice: so a wave is what all orders explain of what is left, over and over, as far as it makes less of it (Landweber 1951).
    """
    turned_N1MN, left_NT, wave_MN = _turned(turn_NQ), x_NT, torch.zeros(())
    taper_T = torch.hann_window(x_NT.shape[1], dtype=x_NT.dtype)
    for i in range(times):
        if i:
            line_N1MN = tones.lines((left_NT * taper_T)[:, None])
        mean_1MN, _ = _mean(line_N1MN * turned_N1MN.conj(), counts_1MN, hops)
        step_1MN = mean_1MN * (counts_1MN > 0) / (0.5 * x_NT.shape[1])
        own_NT = tones.wave((step_1MN * turned_N1MN)[:, 0])
        part = float(((left_NT * own_NT).sum() / (own_NT.square().sum() + 1e-12)).clamp(0, 1))
        left_NT, wave_MN = left_NT - part * own_NT, wave_MN + part * step_1MN[0]
    return wave_MN, 1 - float(left_NT.square().sum() / (x_NT.square().sum() + 1e-12))


def _orders(hz_Q: torch.Tensor, samples: int) -> torch.Tensor:
    """How much sums of harmonics count (2, M, N) in the signal and in its envelope; 0: not at all."""
    order_M, order_N = torch.arange(HARMONICS + 1.0).double(), torch.arange(-SIDEBANDS, SIDEBANDS + 1.0).double()
    hz_2 = torch.nn.functional.pad(hz_Q.double(), (0, 2 - len(hz_Q)), value=math.nan)
    hz_MN = order_M[:, None] * hz_2[0] + (order_N * hz_2[1].nan_to_num())
    once_MN = torch.ones_like(hz_MN, dtype=torch.bool)
    if not hz_2[1].isfinite():
        once_MN = (order_N == 0).expand_as(once_MN)
    good_MN = once_MN & (hz_MN > FEWEST_CYCLES / samples) & (hz_MN < 0.48)
    return torch.stack([good_MN.float(), QUIET * (good_MN & (hz_MN < HIGHEST))])


def _followed(line_NKMN: torch.Tensor, weight_KMN: torch.Tensor, hz_Q: torch.Tensor, hop: int) -> torch.Tensor:
    """Phases (N, Q) of windows in a row, each the likeliest near where the one before it leads, given all before it."""
    turn_NQ, total_KMN = torch.zeros(len(line_NKMN), len(hz_Q)), 0.0
    near_G = torch.linspace(-NEAR, NEAR, NEARBY)
    orders = (torch.arange(HARMONICS + 1.0), torch.arange(-SIDEBANDS, SIDEBANDS + 1.0))
    apart = [torch.polar(torch.ones(len(k_X), NEARBY), -2 * math.pi * k_X[:, None] * near_G) for k_X in orders]
    for i, line_KMN in enumerate(line_NKMN):
        if i:
            turn_NQ[i] = turn_NQ[i - 1] + (hz_Q * hop).nan_to_num().float()
            for q in range(len(hz_Q)):
                alike_MN = (line_KMN * total_KMN.conj() * weight_KMN).sum(0) * _turned(turn_NQ[i : i + 1])[0, 0].conj()
                turn_NQ[i, q] += near_G[(alike_MN.sum(1 - q) @ apart[q]).real.argmax()]
        total_KMN = total_KMN + line_KMN * _turned(turn_NQ[i : i + 1])[0].conj()
    return torch.where(hz_Q.isfinite(), turn_NQ % 1, math.nan)
