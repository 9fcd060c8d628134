"""lib/rhythm.py: the rhythms of knocking signals are found and of noise are not, phases follow the clock, and a network is told both."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import conditions, flow, generator, rhythm, whitened, whitening
from lib.conditions import Condition
from lib.corpus import Corpus, for_strangers
from lib.errors import Unusable
from lib.models import Architecture
from lib.velocity import Shape, build_velocity
from lib.whitened import fit_target
from tests import recipes
from tests.test_train_flow import RULE, TINY
from tests.test_velocity import disturbed
from train_flow import Config, main

BLOWS, SHAFT = 0.0131, 0.00237  # cycles per sample, of no common divisor


def knocking(rng: np.random.Generator, samples: int = 40_000, channels: int = 1, shaft: float = 0.5) -> torch.Tensor:
    """Noise that is loud for a moment at every blow, the louder the higher a shaft stands, and always a little."""
    t = np.arange(samples)
    blow = (t * BLOWS) % 1 < 0.12
    loud = blow * (1 + shaft * np.cos(2 * np.pi * SHAFT * t)) + 0.05
    return torch.from_numpy(rng.standard_normal((channels, samples)) * loud)


@pytest.mark.parametrize("channels", [1, 3])
def test_blows_and_the_shaft_they_follow_are_found(channels):
    found_Q = rhythm.find([knocking(np.random.default_rng(0), channels=channels)], 2, 1024)
    assert np.abs(found_Q - [BLOWS, SHAFT]).max() < 5e-6  # a fifth of a bin


def test_blows_alone_are_one_rhythm_whatever_is_asked_for():
    found_Q = rhythm.find([knocking(np.random.default_rng(1), shaft=0.0)], 3, 1024)
    assert abs(found_Q[0] - BLOWS) < 5e-6 and np.isnan(found_Q[1:]).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 4]))
def test_noise_has_no_rhythm(seed, channels):
    noise_CT = torch.from_numpy(np.random.default_rng(seed).standard_normal((channels, 20_000)))
    assert np.isnan(rhythm.find([noise_CT], 2, 512)).all()


def test_one_knock_is_no_rhythm_and_a_short_signal_has_none():
    rng = np.random.default_rng(2)
    knock_CT = torch.from_numpy(rng.standard_normal((1, 20_000)))
    knock_CT[:, 7000:7010] *= 100
    assert np.isnan(rhythm.find([knock_CT], 2, 512)).all()
    assert np.isnan(rhythm.find([knocking(rng, 8000)], 2, 1024)).all()
    assert len(rhythm.find([], 2, 1024)) == 2


def test_signals_that_share_no_rhythm_have_none_together():
    rng = np.random.default_rng(3)
    alike = [knocking(rng, shaft=0.0) for _ in range(2)]
    assert abs(rhythm.find(alike, 1, 1024)[0] - BLOWS) < 5e-6
    others = [
        x_CT[:, ::k]
        for x_CT, k in zip([knocking(rng, 160_000, shaft=0.0) for _ in range(4)], (1, 2, 3, 4), strict=True)
    ]
    assert abs(rhythm.find([others[0]], 1, 1024)[0] - BLOWS) < 5e-6
    assert abs(rhythm.find([others[2]], 1, 1024)[0] - 3 * BLOWS) < 2e-5


def test_the_phase_goes_on_with_the_window_whatever_its_loudness():
    x_CT = knocking(np.random.default_rng(4), shaft=0.0)
    starts = np.arange(0, 30_000, 997)
    x_BCT = torch.stack([x_CT[:, s : s + 1024] for s in starts])
    hz_BQ = torch.tensor([[BLOWS, math.nan]], dtype=torch.float64).expand(len(starts), 2)
    turn_BQ = rhythm.phases(x_BCT, hz_BQ, None)
    advanced_B = (turn_BQ[:, 0] - torch.from_numpy(BLOWS * starts) + 0.5) % 1
    assert float(advanced_B.std()) < 0.02 and turn_BQ[:, 1].isnan().all()
    assert torch.allclose(rhythm.phases(100 * x_BCT, hz_BQ, None)[:, 0], turn_BQ[:, 0])
    two_BCT = torch.cat([x_BCT, torch.randn(x_BCT.shape, dtype=torch.float64)], 1)  # a bad channel says nothing
    mask_BC = torch.tensor([[True, False]]).expand(len(starts), 2)
    assert torch.allclose(rhythm.phases(two_BCT, hz_BQ, mask_BC)[:, 0], turn_BQ[:, 0])


def test_the_envelope_of_a_tone_is_flat_and_of_two_tones_beats():
    t = torch.arange(1000, dtype=torch.float64)
    tone_T, other_T = torch.cos(2 * math.pi * 0.1 * t), torch.cos(2 * math.pi * 0.12 * t)
    assert torch.allclose(rhythm.envelope(tone_T[None]), torch.ones(1000, dtype=torch.float64))
    beats_T = rhythm.envelope((tone_T + other_T)[None])
    assert torch.allclose(beats_T, 2 + 2 * torch.cos(2 * math.pi * 0.02 * t))
    assert torch.allclose(
        rhythm.envelope(tone_T[None, :999])[100:-100], torch.ones(799, dtype=torch.float64), atol=0.05
    )


def test_a_clock_says_the_time_in_harmonics_that_its_steps_can_show():
    told_BQ2 = torch.tensor([[[0.01, 0.25], [0.1, 0.0]], [[math.nan, math.nan], [0.01, math.nan]]])
    clock_BSX = rhythm.clock(told_BQ2, 250, 4, 1000)
    assert clock_BSX.shape == (2, 250, 2 * 2 * rhythm.ORDER)
    at_S = (torch.arange(250) + 0.5) * 4 - 500
    for h in range(1, rhythm.ORDER + 1):
        angle_S = 2 * math.pi * h * (0.01 * at_S + 0.25)
        shown_SX = clock_BSX[0].unflatten(1, (2, rhythm.ORDER, 2))[:, 0, h - 1]
        assert torch.allclose(shown_SX, torch.stack([angle_S.cos(), angle_S.sin()], 1), atol=1e-4)
    second_SHX = clock_BSX[0].unflatten(1, (2, rhythm.ORDER, 2))[:, 1]
    assert second_SHX[:, 0].abs().sum() > 0 and not second_SHX[:, 1:].any()  # 0.2 x 4 is above half a cycle per step
    assert not clock_BSX[1].any()


def test_filters_keep_rhythms_in_their_file_and_files_without_any_are_read():
    rng = np.random.default_rng(5)
    signals = [[knocking(rng, shaft=0.0)], [torch.from_numpy(rng.standard_normal((1, 20_000)))]]
    whiten = whitening.fit(("machine", "noise"), signals, 8, 512, 2)
    assert whiten.rhythm_GQ.shape == (2, 1) and abs(float(whiten.rhythm_GQ[0, 0]) - BLOWS) < 5e-6
    assert whiten.rhythm_GQ[1].isnan().all()
    tensors = whiten.tensors()
    again = whitening.restore(whiten.names, tensors)
    assert torch.allclose(again.rhythm_GQ, whiten.rhythm_GQ, rtol=0, atol=0, equal_nan=True)
    x_BCT = signals[0][0][None, :, : 8 + 512].repeat(2, 1, 1)
    w_BCT, _ = whiten.whiten(x_BCT, np.array([0, 1]), None)
    code_BX = whiten.rhythms(w_BCT, np.array([0, 1]), None)
    assert code_BX.shape == (2, 2) and code_BX[0].isfinite().all() and code_BX[1].isnan().all()
    drawn_NX = whiten.draw_rhythms(np.array([[0.0], [0.75]]), 0)
    assert torch.allclose(drawn_NX, torch.tensor([[BLOWS, -0.5], [BLOWS, 0.25]]), atol=1e-5)
    del tensors["rhythm_GQ"]
    old = whitening.restore(whiten.names, tensors)
    assert old.rhythms(w_BCT, np.array([0, 1]), None).shape == (2, 0)


def test_rhythms_are_dropped_with_all_conditions_and_never_alone():
    code_BF = torch.ones(1000, 5)  # two conditions and the level, one rhythm
    u_BF = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0))
    kept_BF = conditions.dropped(code_BF, u_BF, 0.3).isfinite()
    assert torch.equal(kept_BF[:, 2], kept_BF[:, 3]) and torch.equal(kept_BF[:, 3], kept_BF[:, 4])
    assert torch.equal(kept_BF[:, 2], u_BF[:, 3] >= 0.3) and kept_BF[:, 0].sum() < kept_BF[:, 2].sum()


def test_a_network_hears_the_clock_in_all_channels_and_not_without_one():
    torch.manual_seed(0)
    net = disturbed(
        build_velocity(
            Architecture("transformer", 16, 1, 2, 1000.0, 16), [Condition("level")], Shape((8,), 3, rhythms=1)
        )
    )
    assert net.codes == 3
    x_BCT, t_B, places_BC3 = torch.randn(2, 3, 64), torch.full((2,), 0.5), torch.zeros(2, 3, 3)

    def says(*rhythms: float) -> torch.Tensor:
        return net(x_BCT, t_B, torch.tensor([[0.0, *rhythms]] * 2), places_BC3)[0]

    assert not torch.allclose(says(0.05, 0.0), says(0.05, 0.5)) and torch.allclose(
        says(0.05, -0.5), says(0.05, 0.5), atol=1e-5
    )
    assert torch.equal(says(math.nan, math.nan), says(0.05, math.nan))
    shown = (says(0.05, 0.0) - says(math.nan, math.nan)).abs().sum(2)
    assert (shown > 0).all()
    samples = [
        flow.sample(net, torch.tensor([[0.0, 0.05, turn]] * 4), places_BC3[0], 64, "v", seed=1, nfe=2)
        for turn in (0.0, 0.5)
    ]
    assert not torch.equal(*samples)


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> Path:
    """A cache of half a minute of each of two knocking machines, and of one that hums."""
    folder = tmp_path_factory.mktemp("rhythm")
    rng, source = np.random.default_rng(6), folder / "source"
    source.mkdir()
    for name, shaft in (("1000_worn1", 0.0), ("1100_worn2", 0.5)):
        np.save(source / f"{name}.npy", knocking(rng, 60_000, shaft=shaft).numpy().astype(np.float32))
    np.save(source / "1100_well1.npy", rng.standard_normal((1, 60_000)).astype(np.float32))
    (source / "dataset.toml").write_text(RULE)
    status, _, err = recipes.run("--source", source, "--cache", folder / "cache", "--workers", 1)
    assert status == 0, err
    return folder / "cache"


def trained(machines: Path, run: Path, **changes) -> dict:
    flags = TINY | dict(
        window=512, stride=128, hold_out="time", patch=32, widths=(16, 32), eval_every=200, save_every=200
    )
    return main(Config(cache=(str(machines),), name=str(run), **(flags | changes)))


def test_a_flow_with_rhythms_trains_samples_straightens_and_scores(machines, tmp_path):
    told = trained(machines, tmp_path / "run", steps=8)
    net, whiten, meta = generator.load_model(told["model"])
    assert whiten.rhythm_GQ.shape == (3, 2) and net.shape.rhythms == 2 and net.codes == len(net.given.conditions) + 4
    assert whiten.rhythm_GQ.isfinite().sum(1).tolist() == [1, 0, 2]  # worn1, well1, worn2 with its shaft
    assert trained(machines, tmp_path / "straighter", steps=4, reflow=told["model"], pairs=24)["step"] == 4
    made = main(Config(model=told["model"], sample=9, out=str(tmp_path / "made"), nfe=4))
    assert made["windows"] == 9
    scored = main(
        Config(
            model=told["model"], score=True, cache=(str(machines),), hold_out="time", stride=128, healthy="subject=machine/well1", nfe=2,
            score_windows=40,
        )
    )  # fmt: skip
    assert "residual" in scored["metrics"]
    corpus = Corpus((machines,), 512, 8, 128, True, 0.6)
    group_R = np.array([0, 1, 2])
    own, own_R = for_strangers(corpus, whiten, group_R, [0, 2], "val")
    assert own_R.tolist() == [3, 1, 4] and own.rhythm_GQ[3:].isnan().all()
    assert torch.equal(own.taps_GK[3:], whiten.taps_GK[[0, 2]]) and whiten.rhythm_GQ.shape == (3, 2)
    with pytest.raises(Unusable, match="machine/worn1"):
        main(Config(model=told["model"], score=True, cache=(str(machines),), hold_out="time", healthy="subject=nobody"))
    plain = trained(machines, tmp_path / "plain", steps=2, rhythms=0)
    assert generator.load_model(plain["model"])[0].clock is None


def test_windows_whose_phases_were_looked_for_are_remembered_whoever_shares_the_batch(machines, monkeypatch):
    corpus = Corpus((machines,), 512, 8, 128, True, 0.6)
    columns = dict(label=(), domain=(), speed="", traits=())
    how = dict(by_recording=True, order=16, rhythms=2, unmix=False, level=True, hum=True, flatten=True)
    fit = partial(fit_target, corpus, **columns, **how)

    def read(target, recordings, starts, micro=8):
        where = np.array(recordings), np.array(starts), np.arange(len(starts))
        return [(w.x1_BCT, w.code_BX, w.raw_BCT) for w in target.read(*where, 0, micro, 0, 0)]

    known, told = fit()[0], [0, 2, 1, 0, 2]
    starts = [600, 4000, 900, 600, 5000]
    assert known.whiten.repeats is not None
    together = [torch.cat(parts) for parts in zip(*read(known, told, starts, 2), strict=True)]
    for i in range(5):
        alone = read(fit()[0], told[i : i + 1], starts[i : i + 1])[0]
        assert all(torch.equal(a[0].nan_to_num(7), b[i].nan_to_num(7)) for a, b in zip(alone, together, strict=True))
    monkeypatch.setattr(known.whiten, "rhythms", lambda *_: pytest.fail("looked for again"))
    again = [torch.cat(parts) for parts in zip(*read(known, told, starts), strict=True)]
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(again, together, strict=True))
    monkeypatch.setattr(whitened, "REMEMBERED", 0)
    forgetful = fit()[0]
    read(forgetful, told, starts)
    assert not forgetful._made


def test_windows_of_one_of_several_channels_are_of_the_one_that_is_drawn(tmp_path):
    rng = np.random.default_rng(8)
    for name, channels in (("machine", ["DE"]), ("three", ["DE", "FE", "BA"])):
        (source := tmp_path / name).mkdir()
        np.save(source / "1000_worn1.npy", knocking(rng, 60_000, len(channels)).numpy().astype(np.float32))
        rule = RULE.replace('"machine"', f'"{name}"').replace('["DE"]', json.dumps(channels))
        (source / "dataset.toml").write_text(rule)
    sources = ("--source", tmp_path / "machine", tmp_path / "three")
    status, _, err = recipes.run(*sources, "--cache", tmp_path / "cache", "--workers", 1)
    assert status == 0, err
    corpus = Corpus((tmp_path / "cache",), 512, 8, 128, True, 0.6)
    assert sorted(len(r.names) for r in corpus.recordings) == [1, 3]
    columns = dict(label=(), domain=(), speed="", traits=())
    how = dict(by_recording=True, order=16, rhythms=1, unmix=False, level=True, hum=True, flatten=True)

    def read(target, step):
        parts = target.read(np.array([0, 1]), np.array([600, 600]), np.arange(2), 1, 0, 0, step)
        return {int(w.recording_B[b]): w.x1_BCT[b] for w in parts for b in range(len(w.x1_BCT))}

    target, others = fit_target(corpus, **columns, **how)[0], []
    assert target.whiten.repeats is not None
    for step in range(6):
        remembered, fresh = read(target, step), read(fit_target(corpus, **columns, **how)[0], step)
        assert all(torch.equal(remembered[row], fresh[row]) for row in (0, 1))
        others.append(remembered)
    several = next(row for row, r in enumerate(corpus.recordings) if len(r.names) == 3)
    assert not all(torch.equal(o[several], others[0][several]) for o in others)  # another channel is drawn


@pytest.mark.slow
def test_generated_windows_knock_when_they_are_told_to(machines, tmp_path):
    told = trained(machines, tmp_path / "run", steps=400, batch=32, d_model=32)
    net, whiten, meta = generator.load_model(told["model"])
    template = next(t for t in meta["templates"] if whiten.rhythm_GQ[t["group"]].isfinite().sum() == 1)
    w_NCT, _, code_NX, turn_NP = generator.draw_windows(net, whiten, meta, template, np.arange(64), 1, nfe=16)
    known = len(net.given.conditions)
    whole_NCT, _ = generator.mixed(whiten, template, w_NCT, code_NX, turn_NP)
    turn_N = whiten.rhythms(whole_NCT.float(), np.full(64, template["group"]), None)[:, 1]
    apart_N = (turn_N - code_NX[:, known + 1] + 0.5) % 1 - 0.5
    assert float(apart_N.abs().median()) < 0.05  # 0.25 by chance
