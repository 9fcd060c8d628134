"""lib/regular.py: what a drifting machine repeats is found through noise, and taken off and put back exactly."""

import math

import numpy as np
import pytest
import torch

from lib import regular, rhythm, whitening
from tests.test_rhythm import BLOWS, SHAFT

SAMPLES, HOP = 1024, 128


def machine(
    rng: np.random.Generator,
    samples: int = 40_000,
    noise: float = 0.5,
    drift: float = 1e-3,
    shaft: float = SHAFT,
    narrow: float = 0.0,
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """
    A signal (1, T) that rings at every blow, the louder the higher the shaft stands, in noise, without the noise, and its blows in turns (T).

    Its speed drifts by a share `drift`, slowly. With `narrow` it is loud only near one place of the shaft's turn.
    """
    t = np.arange(samples)
    turn = BLOWS * (t + drift * samples / 12 * np.sin(2 * np.pi * 2 * t / samples))
    since = (turn % 1) / BLOWS
    place = np.cos(2 * np.pi * turn * shaft / BLOWS)
    clean = np.exp(-since / 12) * np.sin(0.9 * since) * (np.exp(narrow * (place - 1)) if narrow else 1 + 0.5 * place)
    clean = clean / clean.std()
    return torch.from_numpy(clean + noise * rng.standard_normal(samples))[None].float(), clean, turn


def windows(x_T: torch.Tensor, hop: int = HOP) -> torch.Tensor:
    return torch.as_tensor(x_T).float().flatten().unfold(0, SAMPLES, hop)


@pytest.fixture(scope="module")
def learned() -> tuple[regular.Regular, torch.Tensor]:
    hz_Q = np.array([BLOWS, SHAFT])
    found, _ = regular.learn(windows(machine(np.random.default_rng(0))[0]), HOP, hz_Q)
    return regular.Regular(*(t[None] for t in found)), torch.from_numpy(hz_Q)


def test_what_is_repeated_is_found_in_windows_that_nothing_was_learned_from(learned):
    repeats, hz_Q = learned
    x_1T, clean_T, turn_T = machine(np.random.default_rng(1))
    x_NT, clean_NT = windows(x_1T, 777), windows(clean_T, 777)
    hz_NQ, group_N = hz_Q.expand(len(x_NT), -1), np.zeros(len(x_NT), int)
    turn_NQ = repeats.phases(x_NT, hz_NQ, group_N, torch.full((len(x_NT), 2), math.nan))
    own_NT = repeats.wave(torch.stack([hz_NQ, turn_NQ], 2), group_N, SAMPLES)
    assert float((clean_NT - own_NT).square().mean() / clean_NT.square().mean()) < 0.12
    true_N = turn_T[np.arange(len(x_NT)) * 777 + SAMPLES // 2]
    apart_N = np.exp(2j * np.pi * (turn_NQ[:, 0].numpy() - true_N))
    assert np.abs(apart_N.mean()) > 0.999  # the same distance in all windows, to 0.7 hundredths of a turn


def test_a_machine_that_drifts_is_as_sharp_as_one_that_does_not():
    shares = []
    for drift in (0.0, 1e-3):
        x_NT = windows(machine(np.random.default_rng(2), noise=0.1, drift=drift)[0])
        (*_, wave_MN), _ = regular.learn(x_NT, HOP, np.array([BLOWS, SHAFT]))
        shares.append(float(2 * wave_MN.abs().square().sum()))  # power of a sum of sinusoids
    assert 0.85 < shares[0] < 1.05 and shares[1] > 0.9 * shares[0]


def test_sidebands_far_out_are_part_of_the_wave():
    rng, hz_Q = np.random.default_rng(6), np.array([BLOWS, SHAFT])
    found, share = regular.learn(windows(machine(rng, narrow=40.0)[0]), HOP, hz_Q)
    power_MN, outer_N = found[2].abs().square(), regular._outer(regular.SIDEBANDS)
    assert share > 0.6 and power_MN[:, outer_N].sum() > 0.2 * power_MN.sum()
    x_1T, clean_T, _ = machine(rng, narrow=40.0)
    x_NT, clean_NT = windows(x_1T, 777), windows(clean_T, 777)
    hz_NQ, group_N, left = torch.from_numpy(hz_Q).expand(len(x_NT), -1), np.zeros(len(x_NT), int), []
    for sides in (regular.SIDEBANDS, regular.CLEAR):  # the second: tables as wide as in files of versions before
        part = slice(regular.SIDEBANDS - sides, regular.SIDEBANDS + sides + 1)
        some = regular.Regular(*(t[None][..., part].contiguous() for t in found))
        turn_NQ = some.phases(x_NT, hz_NQ, group_N, torch.full((len(x_NT), 2), math.nan))
        own_NT = some.wave(torch.stack([hz_NQ, turn_NQ], 2), group_N, SAMPLES)
        left.append(float((clean_NT - own_NT).square().mean() / clean_NT.square().mean()))
    assert left[0] < 0.25 and left[0] < 0.7 * left[1]


@pytest.mark.parametrize("sides", [regular.SIDEBANDS, regular.CLEAR])
def test_phases_lie_between_those_that_are_tried_first_only_if_sidebands_far_out_count(sides):
    true_NQ = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    mean_KMN = torch.randn(1, regular.HARMONICS + 1, 2 * sides + 1, dtype=torch.complex64)
    line_NKMN = mean_KMN * regular._turned(true_NQ, sides)
    turn_NQ = regular._likeliest(line_NKMN, mean_KMN[None], torch.ones(1, *mean_KMN.shape), true_NQ)
    apart_NQ = (turn_NQ - true_NQ + 0.5) % 1 - 0.5
    steps_Q = torch.tensor([1 / regular.FINE, 1 / regular.COARSE])
    assert (apart_NQ.abs() <= steps_Q * (0.05 if sides > regular.CLEAR else 0.55)).all()
    assert (apart_NQ.abs() > 0.2 * steps_Q).any() == (sides == regular.CLEAR)


def test_orders_of_one_frequency_share_what_they_explain(monkeypatch):
    x_NT, shares = windows(machine(np.random.default_rng(7), shaft=BLOWS / 3.5, noise=0.2, narrow=40.0)[0]), []
    for times in (1, 2):  # orders (m, n) and (m + 2, n - 7) are one, always in the same phase
        monkeypatch.setattr(regular, "SHARED", times)
        shares.append(regular.learn(x_NT, HOP, np.array([BLOWS, BLOWS / 3.5]))[1])
    assert shares[0] + 0.02 < shares[1]


def test_one_rhythm_is_enough_and_noise_repeats_next_to_nothing():
    rng = np.random.default_rng(3)
    x_1T, clean_T, _ = machine(rng)
    (*_, wave_MN), _ = regular.learn(windows(x_1T), HOP, np.array([BLOWS, math.nan]))
    assert not wave_MN[:, : regular.SIDEBANDS].any() and not wave_MN[:, regular.SIDEBANDS + 1 :].any()
    assert 0.5 < float(2 * wave_MN.abs().square().sum()) < 1.0
    (*_, wave_MN), _ = regular.learn(torch.randn(300, SAMPLES), HOP, np.array([BLOWS, SHAFT]))
    assert float(2 * wave_MN.abs().square().sum()) < 0.05


def test_a_group_that_repeats_nothing_keeps_the_phases_of_its_envelope(learned):
    repeats, hz_Q = learned
    both = regular.Regular(
        *(torch.stack([own[0], none]) for own, none in zip(vars(repeats).values(), regular.nothing(), strict=True))
    )
    x_NT = windows(machine(np.random.default_rng(4))[0], 4000)
    hz_NQ, else_NQ = hz_Q.expand(len(x_NT), -1), torch.full((len(x_NT), 2), 0.125)
    none_N = np.ones(len(x_NT), int)
    assert torch.equal(both.phases(x_NT, hz_NQ, none_N, else_NQ), else_NQ)
    assert not both.wave(torch.stack([hz_NQ, else_NQ], 2), none_N, SAMPLES).any()
    unknown_NQ2 = torch.full((len(x_NT), 2, 2), math.nan)
    assert not both.wave(unknown_NQ2, np.zeros(len(x_NT), int), SAMPLES).any()


def test_filters_take_it_off_windows_and_keep_it_in_their_file():
    rng = np.random.default_rng(5)
    signals = [
        [machine(rng)[0]],
        [torch.from_numpy(rng.standard_normal((1, 40_000))).float()],
        [torch.randn(2, 40_000)],
    ]
    whiten = whitening.fit(("machine", "noise", "two"), signals, 8, SAMPLES, 2)
    again = whitening.restore(whiten.names, whiten.tensors())
    assert again.repeats is not None and torch.equal(again.repeats.wave_GMN, whiten.repeats.wave_GMN)
    for fitted in (whiten, again):
        x_BCT = torch.stack([signals[g][0][:, 3000 : 3000 + 8 + SAMPLES] for g in (0, 1)])
        w_BCT, _ = fitted.whiten(x_BCT, np.array([0, 1]), None)
        code_BX = fitted.rhythms(w_BCT, np.array([0, 1]), None)
        own_BCT = fitted.repeated(code_BX, np.array([0, 1]), SAMPLES)
        left_BCT = w_BCT - own_BCT
        assert float(left_BCT[0].square().mean()) < 0.7 * float(w_BCT[0].square().mean()) and not own_BCT[1].any()
    none = whitening.fit(("noise",), signals[1:2], 8, SAMPLES, 2)
    assert none.repeats is None and not none.repeated(torch.zeros(3, 0), np.zeros(3, int), 64).any()


def test_the_stated_shaft_is_a_rhythm_where_more_repeats_with_it():
    """What the envelope shows least: blows that are all as loud, and sidebands of the shaft in the signal alone."""
    x_1T, *_ = machine(np.random.default_rng(4))
    wrong_Q, hops = np.array([BLOWS, 0.0173]), (windows(x_1T), HOP)
    tried = rhythm.with_shaft(wrong_Q, SHAFT * 1.001)
    shares = [regular.learn(*hops, own_Q)[1] for own_Q in tried]
    assert np.allclose(tried[1], [BLOWS, SHAFT * 1.001]) and shares[1] > shares[0] + 0.1
    assert len(rhythm.with_shaft(np.array([BLOWS, SHAFT]), SHAFT * 1.001)) == 1
    assert len(rhythm.with_shaft(wrong_Q, math.nan)) == 1 and len(rhythm.with_shaft(np.zeros(0), SHAFT)) == 1
    only_Q = rhythm.with_shaft(np.full(2, np.nan), SHAFT)[1]
    assert only_Q[0] == SHAFT and np.isnan(only_Q[1])
    second_Q = rhythm.with_shaft(np.array([BLOWS, np.nan]), SHAFT)[1]
    assert np.allclose(second_Q, [BLOWS, SHAFT])
    shares = whitening.fit(("a", "b"), [[x_1T], [x_1T]], 0, SAMPLES, 2, shafts=[math.nan, SHAFT])
    assert np.allclose(shares.rhythm_GQ[0].numpy(), shares.rhythm_GQ[1].numpy(), rtol=0.005)
