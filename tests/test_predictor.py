"""The predictor's three kinds: what must not change a prediction, and what must."""

import pytest
import torch

from lib.channels import POSITIONS, TEN_TWENTY
from lib.errors import Unusable
from lib.models import Architecture, build_encoder
from lib.predictor import KINDS, SUMMARY, Predictor

SMALL = Architecture(d_model=32, layers=1, heads=2, patch=25, rate_hz=100.0)
CHANNELS, PATCHES = 7, 4
CONTEXT, TARGET = [0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 12, 27]


@pytest.fixture(params=KINDS)
def predictor(request):
    torch.manual_seed(0)
    return Predictor(SMALL, 2, request.param)


def context(batch: int = 3) -> tuple:
    """Arguments of a predictor: features of the visible tokens, where they are, and what is asked for."""
    torch.manual_seed(1)
    positions_BC3 = torch.tensor([POSITIONS[n] for n in TEN_TWENTY[:CHANNELS]]).repeat(batch, 1, 1)
    x_BCT = torch.randn(batch, CHANNELS, PATCHES * SMALL.patch)
    context_BK, target_BM = torch.tensor([CONTEXT] * batch), torch.tensor([TARGET] * batch)
    z_BKD = build_encoder(SMALL)(x_BCT, positions_BC3, ids_BK=context_BK).detach()
    return z_BKD, positions_BC3, PATCHES, context_BK, target_BM


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance


def test_predictions_at_two_targets_of_a_window_differ(predictor):
    predicted_BMD = predictor(*context())
    assert predicted_BMD.shape == (3, 4, 32)
    first, second = torch.triu_indices(4, 4, 1)
    # in place (8 against 12), in time (8 against 9), and in both
    assert torch.cdist(predicted_BMD, predicted_BMD)[:, first, second].min() > 0.01
    assert not close(predicted_BMD[0], predicted_BMD[1], 1e-4)  # and depend on what the context says


def test_padding_changes_nothing(predictor):
    z_BKD, positions_BC3, patches, context_BK, target_BM = context()
    straight = predictor(z_BKD, positions_BC3, patches, context_BK, target_BM)
    filled_BKD = torch.cat([z_BKD, 100 * torch.randn_like(z_BKD)], 1)
    filled_BK, real_BK = torch.cat([context_BK, context_BK * 0], 1), torch.tensor([[True] * 8 + [False] * 8] * 3)
    filled_BM, real_BM = torch.cat([target_BM, target_BM * 0], 1), torch.tensor([[True] * 4 + [False] * 4] * 3)
    assert close(predictor(filled_BKD, positions_BC3, patches, filled_BK, target_BM, real_BK), straight)
    padded = predictor(filled_BKD, positions_BC3, patches, filled_BK, filled_BM, real_BK, real_BM)
    assert close(padded[:, :4], straight)
    padded = predictor(z_BKD, positions_BC3, patches, context_BK, filled_BM, None, real_BM)
    assert close(padded[:, :4], straight)


def test_order_of_channels_and_tokens_does_not_matter(predictor):
    z_BKD, positions_BC3, patches, context_BK, target_BM = context()
    straight = predictor(z_BKD, positions_BC3, patches, context_BK, target_BM)
    order_C = torch.randperm(CHANNELS)
    new_of_old_C = order_C.argsort()
    renamed_BK, renamed_BM = (new_of_old_C[t // patches] * patches + t % patches for t in (context_BK, target_BM))
    assert close(predictor(z_BKD, positions_BC3[:, order_C], patches, renamed_BK, renamed_BM), straight)
    order_K, order_M = torch.randperm(8), torch.randperm(4)
    moved = predictor(z_BKD[:, order_K], positions_BC3, patches, context_BK[:, order_K], target_BM[:, order_M])
    assert close(moved, straight[:, order_M])


def test_windows_of_a_batch_are_independent(predictor):
    z_BKD, positions_BC3, patches, context_BK, target_BM = context()
    together = predictor(z_BKD, positions_BC3, patches, context_BK, target_BM)
    for b in range(3):
        one = slice(b, b + 1)
        alone = predictor(z_BKD[one], positions_BC3[one], patches, context_BK[one], target_BM[one])
        assert close(alone, together[one])


def test_gradient_reaches_every_parameter(predictor):
    z_BKD, positions_BC3, *rest = context()
    positions_BC3[:, 1] = torch.nan
    predictor(z_BKD.requires_grad_(), positions_BC3, *rest).square().sum().backward()
    for name, p in predictor.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert (z_BKD.grad.abs().sum(2) > 0).all()  # every visible token counts


@pytest.mark.parametrize("kind, alone", [("prelocal", True), ("postlocal", False), ("contextual", False)])
def test_targets_know_of_each_other_after_the_refinement_only(kind, alone):
    torch.manual_seed(0)
    predictor = Predictor(SMALL, 2, kind)
    z_BKD, positions_BC3, patches, context_BK, target_BM = context()
    few = predictor(z_BKD, positions_BC3, patches, context_BK, target_BM[:, :2])
    assert close(few, predictor(z_BKD, positions_BC3, patches, context_BK, target_BM)[:, :2], 1e-6) == alone


def test_summary_is_of_the_whole_context():
    torch.manual_seed(0)
    predictor = Predictor(SMALL, 2, "contextual")
    found = []
    predictor.pool.register_forward_hook(lambda module, given, result: found.append(result))
    z_BKD, *rest = context()
    predictor(z_BKD, *rest)
    for k in range(z_BKD.shape[1]):
        changed_BKD = z_BKD.clone()
        changed_BKD[:, k] += torch.randn(32)
        predictor(changed_BKD, *rest)
        assert found[-1].shape == (3, SUMMARY, 16) and not close(found[-1], found[0], 1e-5)


def test_an_unknown_kind_is_named():
    with pytest.raises(Unusable, match="--predictor inner"):
        Predictor(SMALL, 2, "inner")
