"""lib/hums.py: tones of constant loudness are found whatever their phase, taken off windows and drawn again; noise doesn't hum."""

import numpy as np
import pytest
import torch

from lib import generator, hums
from lib.corpus import Corpus, fit_corpus, for_strangers
from tests import recipes
from tests.test_rhythm import RULE, TINY
from train_flow import Config, main

T = 512
HUM = 0.0703  # cycles per sample, 36 in a window


def sines(rng: np.random.Generator, windows: int, tones: dict[float, float], loud=1.0) -> torch.Tensor:
    """Noise of variance 1 with sines {cycles per window: amplitude} of a phase drawn for each window."""
    at_T = (np.arange(T) + 0.5) / T
    x_NT = rng.standard_normal((windows, T))
    for cycles, amplitude in tones.items():
        x_NT += loud * amplitude * np.cos(2 * np.pi * (cycles * at_T + rng.random((windows, 1))))
    return torch.from_numpy(x_NT)


@pytest.mark.parametrize("seed", range(3))
def test_hums_are_found_with_their_amplitude(seed):
    rng = np.random.default_rng(seed)
    tones = {20.0: 0.5, 31.5: 1.0, 100.25: 0.4, 200.1: 2.0}
    hum_F = hums.find(sines(rng, 200, tones), 200)
    found = {at / hums.FINER: float(hum_F[at]) for at in hum_F.nonzero()[:, 0].tolist()}
    for cycles, amplitude in tones.items():
        near = [a for at, a in found.items() if abs(at - cycles) <= 0.3]
        assert len(near) == 1 and near[0] == pytest.approx(amplitude, rel=0.1)
    rest = [a for at, a in found.items() if min(abs(at - c) for c in tones) > 0.3]
    assert len(rest) <= 12 and max(rest, default=0) < 0.2  # of some 250 places, and none louder than the noise there


def test_noise_bursts_and_few_windows_do_not_hum():
    rng = np.random.default_rng(3)
    x_NT = sines(rng, 400, {})
    hum_F = hums.find(x_NT, 400)
    gone = 1 - float((x_NT - hums.of(x_NT, hum_F.expand(400, -1))).square().mean() / x_NT.square().mean())
    assert gone < 0.03
    loud_N1 = np.exp(rng.standard_normal((400, 1)))  # a tone that comes and goes is no hum
    hum_F = hums.find(sines(rng, 400, {40.0: 3.0}, loud_N1), 400)
    assert not hum_F[hums.FINER * 39 : hums.FINER * 41].any()
    assert not hums.find(sines(rng, 10, {40.0: 3.0}), 10).any()
    assert not hums.find(torch.zeros(400, T), 400).any()


def test_a_hum_is_taken_off_and_one_of_another_phase_comes_back():
    rng = np.random.default_rng(4)
    x_NT = sines(rng, 300, {50.0: 1.0, 120.0: 0.5})
    hum_F = torch.zeros(hums.FINER * T // 2 + 1)
    hum_F[hums.FINER * 50], hum_F[hums.FINER * 120] = 1.0, 0.5
    rest_NT = x_NT - hums.of(x_NT, hum_F.expand(300, -1))
    assert float(rest_NT.square().mean()) == pytest.approx(1.0, abs=0.02)  # 1.625 before
    again_NT = hums.drawn(hum_F, torch.from_numpy(rng.random((300, hums.MOST))), T)
    assert float(again_NT.square().mean()) == pytest.approx(0.625, rel=0.01)
    assert torch.allclose(hums.of(again_NT, hum_F.expand(300, -1)), again_NT, atol=2e-2)
    turn_N = torch.angle(hums.lines(again_NT)[:, hums.FINER * 50])
    assert abs(float(torch.polar(torch.ones(300), turn_N).mean().abs())) < 0.15
    still_NT = hums.drawn(torch.zeros_like(hum_F), torch.rand(3, hums.MOST), T)
    assert still_NT.shape == (3, T) and not still_NT.any()


@pytest.fixture(scope="module")
def humming(tmp_path_factory) -> str:
    """A cache of half a minute of noise each of a machine with a motor beside it, and of one without."""
    folder, rng = tmp_path_factory.mktemp("hums"), np.random.default_rng(5)
    (folder / "source").mkdir()
    for name, loud in (("1000_worn1", 0.4), ("1100_well1", 0.0)):
        x_T = rng.standard_normal(60_000) + loud * np.cos(2 * np.pi * HUM * np.arange(60_000))
        np.save(folder / "source" / f"{name}.npy", x_T[None].astype(np.float32))
    (folder / "source" / "dataset.toml").write_text(RULE)
    status, _, err = recipes.run("--source", folder / "source", "--cache", folder / "cache", "--workers", 1)
    assert status == 0, err
    return str(folder / "cache")


@pytest.mark.parametrize("taken", [True, False])
def test_samples_of_a_machine_hum_as_steadily_as_it_does_if_hums_are_taken_off(taken, humming, tmp_path):
    flags = TINY | dict(
        window=T, stride=128, hold_out="time", patch=32, widths=(16, 32), rhythms=0, steps=2, hums=taken
    )
    told = main(Config(cache=(humming,), name=str(tmp_path / "run"), **flags))
    net, whiten, meta = generator.load_model(told["model"])
    loud, quiet = whiten.names.index("machine/1000_worn1.npy"), whiten.names.index("machine/1100_well1.npy")
    assert bool(whiten.hum_GF[loud].any()) == taken
    power = {}
    for template in meta["templates"]:
        drawn = generator.draw_windows(net, whiten, meta, template, np.arange(100), 0, nfe=4)
        x_NT = torch.from_numpy(generator.in_unit(whiten, template, *drawn)[:, 0])
        power[template["group"]] = hums.lines(x_NT)[:, round(HUM * hums.FINER * T)].abs().square().numpy()
    assert power[loud].mean() > 5 * power[quiet].mean()
    varies = power[loud].std() / power[loud].mean()
    assert varies < 0.5 if taken else varies > 0.6  # the machine's own: 0.31; of noise in a narrow band up to 1


def test_no_machine_hums_as_another_does(humming):
    corpus = Corpus([humming], T, 8, 128, True, 0.6)
    whiten, group_R = fit_corpus(corpus, True, 8)
    tone_NT = sines(np.random.default_rng(6), 100, {36.0: 1.0})
    for group in (0, 1):
        whiten.settle(group, tone_NT, 100, hum=True, flatten=True)
    own, own_R = for_strangers(corpus, whiten, group_R, [1], "val")
    assert own_R.tolist() == [group_R[0], 2] and own.hum_GF.any(1).tolist() == [True, True, False]
    assert torch.equal(own.flat_GF[2], whiten.flat_GF[group_R[1]])  # which goes with the filter
