"""Masks: exact counts, blocks in metres, nothing hidden that isn't there, and nothing that depends on how a batch is divided."""

import numpy as np
import pytest
import torch

from lib.channels import POSITIONS, TEN_TWENTY
from lib.errors import Unusable
from lib.masks import KINDS, choose_channels, draw_masks, uniform

EGI = [f"E{i}" for i in range(1, 129)]


def montage(*names_of_windows: list[str], width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and mask of windows with the named channels, padded to the widest."""
    width = max(width, *map(len, names_of_windows))
    positions_BC3 = torch.full((len(names_of_windows), width, 3), torch.nan)
    mask_BC = torch.zeros(len(names_of_windows), width, dtype=torch.bool)
    for b, names in enumerate(names_of_windows):
        positions_BC3[b, : len(names)] = torch.tensor([POSITIONS[n] for n in names])
        mask_BC[b, : len(names)] = True
    return positions_BC3, mask_BC


def grids(masks, channels: int, patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Context and target as boolean (B, C, P)."""
    out = []
    for ids_BK, real_BK in ((masks.context_BK, masks.context_real_BK), (masks.target_BM, masks.target_real_BM)):
        real_BK = torch.ones_like(ids_BK, dtype=torch.bool) if real_BK is None else real_BK
        grid_BN = np.zeros((len(ids_BK), channels * patches), int)
        for b in range(len(ids_BK)):
            np.add.at(grid_BN[b], ids_BK[b][real_BK[b]].numpy(), 1)
        out.append(grid_BN.reshape(len(ids_BK), channels, patches))
    return out[0], out[1]


@pytest.mark.parametrize("case", range(80))
def test_every_mask_is_exact_disjoint_and_complete(case):
    rng = np.random.default_rng(case)
    kind, windows, patches, length = (
        KINDS[case % 4],
        int(rng.integers(1, 5)),
        int(rng.integers(2, 6)),
        int(rng.integers(1, 7)),
    )
    ratio, radius_m, seed = rng.uniform(0.05, 0.95), rng.uniform(0, 0.3), int(rng.integers(100))
    names = EGI[:20]
    positions_BC3, _ = montage(*[names] * windows)
    mask_BC = torch.from_numpy(rng.random((windows, 20)) < rng.random((windows, 1)))
    mask_BC[:, 0] = True  # at least one good channel
    positions_BC3[:, rng.random(20) < rng.choice([0, 0.3, 1])] = torch.nan
    index_B = np.arange(windows)
    masks = draw_masks(kind, positions_BC3, mask_BC, patches, ratio, radius_m, length, seed, 7, index_B)
    context_BCP, target_BCP = grids(masks, 20, patches)
    good_BCP = mask_BC.numpy()[:, :, None] & np.ones(patches, bool)
    assert ((context_BCP + target_BCP) == good_BCP).all()  # each good token once, padding and bad channels never
    n_B = good_BCP.sum((1, 2))
    assert (target_BCP.sum((1, 2)) == np.clip(np.floor(ratio * n_B + 0.5), 1, n_B - 1)).all()
    assert masks.targets == target_BCP.sum() and masks.tokens == good_BCP.sum()
    assert (
        (masks.target_BM.diff(dim=1)[masks.target_real_BM[:, 1:]] > 0).all()
        if masks.target_real_BM is not None
        else True
    )
    again = draw_masks(kind, positions_BC3, mask_BC, patches, ratio, radius_m, length, seed, 7, index_B)
    assert torch.equal(masks.context_BK, again.context_BK) and torch.equal(masks.target_BM, again.target_BM)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_gets_the_same_mask_alone_in_a_mixed_batch_and_on_any_rank(kind):
    positions_BC3, mask_BC = montage(TEN_TWENTY, EGI, TEN_TWENTY, EGI)
    together = grids(draw_masks(kind, positions_BC3, mask_BC, 4, 0.6, 0.09, 2, 3, 11, np.arange(4)), 128, 4)[1]
    for b in range(4):
        own = len(TEN_TWENTY) if b % 2 == 0 else 128
        alone = draw_masks(
            kind, positions_BC3[b : b + 1, :own], mask_BC[b : b + 1, :own], 4, 0.6, 0.09, 2, 3, 11, np.array([b])
        )
        assert (grids(alone, own, 4)[1][0] == together[b, :own]).all()
    assert (together[0] != together[2]).any()  # but two windows of a batch differ
    later = grids(draw_masks(kind, positions_BC3, mask_BC, 4, 0.6, 0.09, 2, 3, 12, np.arange(4)), 128, 4)[1]
    assert (later != together).any()  # and so do two steps


def test_a_block_is_a_ball_of_electrodes_times_neighbouring_patches():
    positions_BC3, mask_BC = montage(*[EGI] * 32)
    ratio = 0.05  # less than one block: 9 cm around a rim electrode still are 20 of the 128
    masks = draw_masks("spatiotemporal", positions_BC3, mask_BC, 4, ratio, 0.09, 2, 0, 0, np.arange(32))
    _, target_BCP = grids(masks, 128, 4)
    for target_CP, xyz_C3 in zip(target_BCP, positions_BC3.numpy(), strict=True):
        hidden = target_CP.any(1)
        assert set(np.flatnonzero(target_CP.any(0))) in ({0, 1}, {1, 2}, {2, 3})
        distance = np.linalg.norm(xyz_C3[:, None] - xyz_C3[hidden], axis=2)  # from every electrode to the hidden ones
        centres = np.flatnonzero(hidden & (distance.max(1) <= 0.09))
        # some hidden electrode has all hidden ones within the radius, and hides its nearest neighbours first
        assert any(
            distance[c].max() <= np.sort(np.linalg.norm(xyz_C3 - xyz_C3[c], axis=1))[hidden.sum() - 1] + 1e-9
            for c in centres
        )


def test_kinds_hide_what_their_names_say():
    positions_BC3, mask_BC = montage(*[TEN_TWENTY] * 16)

    def target(kind, ratio, radius_m=0.05, length=2, patches=8):
        return grids(
            draw_masks(kind, positions_BC3, mask_BC, patches, ratio, radius_m, length, 1, 1, np.arange(16)), 19, patches
        )[1]

    whole_BC = target("spatial", 0.5).sum(2)  # 76 of 152 tokens: nine electrodes throughout and half of a tenth
    assert ((whole_BC == 8).sum(1) == 9).all() and (whole_BC.sum(1) == 76).all()
    slices_BP = target("temporal", 0.5).sum(1)
    assert (
        (slices_BP == 19).sum(1) >= 3
    ).all()  # four of eight patches, of which a cut block may share one with its neighbour
    runs = [np.diff(np.flatnonzero(np.diff(np.r_[0, row > 0, 0])))[::2] for row in slices_BP]
    assert all((run >= 2).all() for run in runs)  # in blocks of at least two
    scattered = target("random", 0.5)
    assert ((scattered.sum(2) > 0).sum(1) > 15).all()  # spread over nearly all electrodes


def test_a_block_next_to_no_position_hides_single_channels():
    positions_BC3, mask_BC = montage(*[TEN_TWENTY] * 8)
    positions_BC3[:] = torch.nan
    target_BCP = grids(
        draw_masks("spatiotemporal", positions_BC3, mask_BC, 4, 2 / 76, 0.09, 2, 0, 0, np.arange(8)), 19, 4
    )[1]
    assert (target_BCP.any(2).sum(1) == 1).all() and (target_BCP.sum((1, 2)) == 2).all()
    assert len(set(target_BCP.any(2).argmax(1))) > 2


def test_blocks_start_everywhere_and_choose_every_electrode():
    positions_BC3, mask_BC = montage(*[TEN_TWENTY] * 400)
    target_BCP = grids(
        draw_masks("spatiotemporal", positions_BC3, mask_BC, 4, 0.6, 0.09, 2, 0, 0, np.arange(400)), 19, 4
    )[1]
    share_CP = target_BCP.mean(0)
    assert 0.3 < share_CP.min() and share_CP.max() < 0.85, share_CP
    assert abs(share_CP.mean() - 46 / 76) < 1e-9


def test_of_a_lone_electrode_any_patch_may_be_hidden_and_hidden_ones_are_neighbours():
    positions_BC3, mask_BC = montage(*[TEN_TWENTY[:1]] * 300)
    target_BP = grids(draw_masks("spatial", positions_BC3, mask_BC, 8, 0.5, 0.09, 2, 0, 0, np.arange(300)), 1, 8)[1][
        :, 0
    ]
    assert (target_BP.sum(1) == 4).all() and (np.abs(np.diff(target_BP.astype(int), axis=1)).sum(1) <= 2).all()
    assert target_BP.mean(0).min() > 0.2


def test_random_numbers_are_uniform_and_independent_of_each_other():
    u_BW = uniform(5, 9, np.arange(300), 500, "a")
    assert 0 <= u_BW.min() and u_BW.max() < 1 and len(np.unique(u_BW)) == u_BW.size
    assert abs(np.histogram(u_BW, 20, (0, 1))[0] / u_BW.size - 0.05).max() < 0.003
    assert abs(np.corrcoef(u_BW[:-1].ravel(), u_BW[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(u_BW[:, :-1].ravel(), u_BW[:, 1:].ravel())[0, 1]) < 0.01
    assert (uniform(5, 9, np.array([7]), 500, "a") == u_BW[7]).all()
    for other in (
        uniform(6, 9, np.arange(300), 500, "a"),
        uniform(5, 10, np.arange(300), 500, "a"),
        uniform(5, 9, np.arange(300), 500, "b"),
    ):
        assert abs(np.corrcoef(u_BW.ravel(), other.ravel())[0, 1]) < 0.01


def test_channels_are_chosen_among_good_ones_and_packed_together():
    mask_BC = torch.zeros(3, 10, dtype=torch.bool)
    mask_BC[0, :8] = mask_BC[1, 2:7] = mask_BC[2, 9] = True
    kept_BC = choose_channels(mask_BC, 4, 0, 0, np.arange(3))
    assert kept_BC.shape == (3, 4) and (kept_BC[:2].diff(dim=1) > 0).all() and kept_BC[2, 0] == 9
    assert mask_BC.gather(1, kept_BC).sum(1).tolist() == [4, 4, 1]
    for i in range(3):
        alone_BC = choose_channels(mask_BC[i : i + 1], 4, 0, 0, np.array([i]))
        assert alone_BC[0].tolist() == kept_BC[i, : alone_BC.shape[1]].tolist()
    draws = {tuple(choose_channels(mask_BC, 4, 0, step, np.arange(3))[0].tolist()) for step in range(200)}
    assert set().union(*draws) == set(range(8)) and len(draws) > 50
    everything = choose_channels(mask_BC, 0, 0, 0, np.arange(3))
    assert everything.shape == (3, 8) and mask_BC.gather(1, everything).sum(1).tolist() == [8, 5, 1]


def test_windows_of_one_token_are_refused():
    with pytest.raises(Unusable, match="1 good tokens"):
        draw_masks(
            "random", torch.zeros(1, 1, 3), torch.ones(1, 1, dtype=torch.bool), 1, 0.6, 0.09, 2, 0, 0, np.arange(1)
        )
