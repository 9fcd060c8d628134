"""lib/mixing.py: what channels have in common is taken off exactly and put back exactly, for any choice of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import mixing, whitening
from tests.test_whitening import resonance


def sources(rng: np.random.Generator, channels: int, samples: int = 20_000) -> torch.Tensor:
    """Channels that see the same few sources, and a little of their own."""
    blend = rng.standard_normal((channels, 3))
    return torch.from_numpy(blend @ rng.standard_normal((3, samples)) + 0.3 * rng.standard_normal((channels, samples)))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_roots_are_inverse_to_each_other_and_their_square_is_the_covariance(channels, seed):
    cross_11 = np.cov(sources(np.random.default_rng(seed), channels, 500).numpy()).reshape(1, channels, channels)
    root, inverse = mixing.roots(cross_11)
    assert torch.allclose(root @ inverse, torch.eye(channels, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(root @ root, torch.from_numpy(cross_11), atol=1e-8 * cross_11.max())
    assert torch.allclose(root, root.transpose(1, 2))


def test_a_direction_without_power_stays_small_and_finite():
    x_CT = sources(np.random.default_rng(0), 6)
    x_CT = x_CT - x_CT.mean(0)  # an average reference
    root, inverse = mixing.roots(np.cov(x_CT.numpy())[None])
    assert inverse.isfinite().all()
    noise_CT = root[0] @ torch.randn(6, 5000, dtype=torch.float64)
    assert float(noise_CT.mean(0).std() / noise_CT.std()) < 2e-3
    assert float((inverse[0] @ x_CT).std()) < 1.1


def test_windows_of_any_channels_are_uncorrelated_and_come_back():
    rng = np.random.default_rng(1)
    signals = [sources(rng, 5), 3.0 * sources(rng, 4)]
    places = [np.arange(5), np.array([6, 2, 0, 5])]
    crosses = [mixing.covariance([x], [at], 7) for x, at in zip(signals, places, strict=True)]
    cross_GVV = torch.from_numpy(np.stack(crosses))
    whiten = whitening.Whitening(
        ("a", "b"), tuple("tuvwxyz"), *[torch.zeros(2, 1)] * 6, cross_GVV, *[torch.zeros(2, 0)] * 2
    )
    for group, kept in ((0, [0, 1, 2, 3, 4]), (0, [4, 1]), (1, [0, 1, 2, 3]), (1, [2])):
        x_BCT = signals[group][kept][None]
        place_BC = places[group][kept][None]
        w_BCT = mixing.unmixed(x_BCT, cross_GVV, np.array([group]), place_BC, None)
        assert torch.allclose(
            torch.from_numpy(np.cov(w_BCT[0].numpy()).reshape(len(kept), -1)), torch.eye(len(kept)).double(), atol=0.01
        )
        assert torch.allclose(whiten.mixed(w_BCT, group, place_BC[0]), x_BCT, atol=1e-6)


def test_unknown_and_bad_channels_are_left_alone():
    rng = np.random.default_rng(2)
    x_CT = sources(rng, 4)
    cross_GVV = torch.from_numpy(mixing.covariance([x_CT], [np.arange(4)], 5))[None]
    x_BCT = torch.cat([x_CT[None, :3], x_CT[None, :3]])
    place_BC = np.array([[0, 1, 2], [0, 1, -1]])
    w_BCT = mixing.unmixed(x_BCT, cross_GVV, np.zeros(2, int), place_BC, None)
    assert torch.equal(w_BCT[1, 2], x_CT[2])
    alone_BCT = mixing.unmixed(x_BCT[1:, :2], cross_GVV, np.zeros(1, int), place_BC[1:, :2], None)
    assert torch.allclose(w_BCT[1, :2], alone_BCT[0])
    masked_BC = torch.tensor([[True, True, False]] * 2)
    assert torch.allclose(
        mixing.unmixed(x_BCT * masked_BC[..., None], cross_GVV, np.zeros(2, int), place_BC, masked_BC)[0, :2],
        alone_BCT[0],
    )
    assert torch.allclose(
        mixing.unmixed(x_BCT[:1], cross_GVV, np.zeros(1, int), np.array([[4, 0, 1]]), None)[0, 0], x_CT[0]
    )  # 4: nobody had it


def test_channels_that_only_some_recordings_have_don_t_mix_with_the_others():
    rng = np.random.default_rng(3)
    signals = [sources(rng, 3), sources(rng, 2)]
    cross_VV = mixing.covariance(signals, [np.array([0, 1, 2]), np.array([0, 1])], 4)
    assert cross_VV[0, 1] and cross_VV[0, 0] and not cross_VV[0, 2] and not cross_VV[1, 2] and cross_VV[2, 2]
    assert cross_VV[3].tolist() == [0, 0, 0, 1]
    both = np.concatenate([s[:2].numpy() for s in signals], 1)
    assert np.allclose(cross_VV[:2, :2], np.cov(both), rtol=0.02)
    assert np.linalg.eigvalsh(cross_VV).min() > 0


@pytest.mark.parametrize("order", [0, 16])
def test_a_filter_and_a_matrix_together_make_channels_white_and_colour_gives_their_spectra_and_covariance_back(order):
    rng = np.random.default_rng(4)
    x_CT = torch.from_numpy(rng.standard_normal((4, 4))) @ resonance(rng, 60_000, 4)
    whiten = whitening.fit(("a",), [[x_CT]], order, 512, 0, tuple("abcd"), [[np.arange(4)]])
    w_BCT, _ = whiten.whiten(x_CT[None], np.array([0]), None, False, np.arange(4)[None])
    assert torch.allclose(torch.from_numpy(np.cov(w_BCT[0].numpy())).float(), torch.eye(4), atol=0.02)
    again = whitening.restore(whiten.names, whiten.tensors(), whiten.channels)
    noise_NCT = (
        torch.randn(200, 4, 512, generator=torch.Generator().manual_seed(0))
        if order
        else w_BCT[:, :, : 512 * 100].unflatten(2, (100, 512))[0].transpose(0, 1)
    )
    y_NCT = again.colour(again.mixed(noise_NCT, 0, np.arange(4)), 0, None, place_C=np.arange(4))
    found_CC = np.cov(y_NCT.transpose(1, 0, 2).reshape(4, -1))
    assert np.allclose(found_CC, np.cov(x_CT.numpy()), atol=0.08 * np.abs(found_CC).max())
    del (tensors := whiten.tensors())["cross_GVV"]
    old = whitening.restore(whiten.names, tensors)
    assert torch.equal(old.mixed(noise_NCT, 0, np.arange(4)), noise_NCT.double())
