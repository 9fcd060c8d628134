"""Counting the FLOPs of a step: by hand where that can be done, the same for any batch, and for everything that can be in a step."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.batches import Part
from lib.channels import POSITIONS
from lib.flops import Counter, StepCost, count_flops, matmul_rate
from lib.grid import take
from lib.masks import draw_masks
from lib.models import Architecture, build_encoder
from lib.predictor import KINDS, Predictor

SMALL = dict(d_model=32, layers=2, heads=2, patch=25, rate_hz=100.0)


def part(batch: int, channels: int, mixed: bool = False) -> Part:
    positions_BC3 = torch.tensor([POSITIONS[f"E{i}"] for i in range(1, channels + 1)]).repeat(batch, 1, 1)
    mask_BC = torch.ones(batch, channels, dtype=torch.bool)
    if mixed:
        mask_BC[0, channels // 2 :] = False
    masks = draw_masks("spatiotemporal", positions_BC3, mask_BC, 4, 0.6, 0.09, 2, 0, 0, np.arange(batch))
    x_BCT = torch.randn(batch, channels, 4 * SMALL["patch"])
    return Part(x_BCT, positions_BC3, mask_BC if mixed else None, np.arange(batch), np.zeros(batch, int), masks)


class Step(nn.Module):
    """What is trained in a step, its teacher, and the forward pass."""

    def __init__(self, architecture: Architecture, kind: str):
        super().__init__()
        self.encoder = build_encoder(architecture)
        self.predictor = Predictor(architecture, 2, kind)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, part: Part) -> torch.Tensor:
        m = part.masks
        with torch.no_grad():
            target_BMD = take(self.teacher(*part.signal), m.target_BM)
        z_BKD = self.encoder(part.x_BCT, part.positions_BC3, None, m.context_BK, m.context_real_BK)
        places = (part.positions_BC3, 4, m.context_BK, m.target_BM, m.context_real_BK, m.target_real_BM)
        return F.smooth_l1_loss(self.predictor(z_BKD, *places), target_BMD)


def test_products_are_counted_as_by_hand():
    linear, x_NX = nn.Linear(7, 5), torch.randn(11, 7)
    forward = 2 * 11 * 7 * 5
    assert count_flops(lambda: linear(x_NX), list(linear.parameters())) == 2 * forward
    x_NX.requires_grad_()
    assert count_flops(lambda: linear(x_NX), [*linear.parameters(), x_NX]) == 3 * forward


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_the_same_fused_or_not(device, masked):
    q, k = (torch.zeros(3, 2, n, 8, device=device, requires_grad=True) for n in (6, 10))
    keys = torch.ones(3, 1, 1, 10, device=device, dtype=torch.bool) if masked else None
    forward = 2 * 2 * 3 * 2 * 6 * 10 * 8  # two products
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=keys), [q, k]) == 3 * forward


def test_a_transformers_forward_pass_is_counted_as_by_hand():
    d, channels, n, patch = 32, 5, 20, 25
    encoder = build_encoder(Architecture(**(SMALL | dict(layers=1))))
    x_BCT, positions_BC3 = torch.randn(3, channels, 100), torch.randn(3, channels, 3)
    with Counter() as counter, torch.no_grad():
        encoder(x_BCT, positions_BC3)
    embedding = 2 * n * (patch + patch // 2 + 1) * d + 2 * channels * (27 * d + d * d)
    assert counter.flops == 3 * (embedding + 24 * n * d * d + 4 * n * n * d)


@pytest.mark.parametrize(
    "kind, predictor",
    [
        *((dict(encoder="transformer"), kind) for kind in KINDS),
        (dict(encoder="mamba"), "prelocal"),
        (dict(encoder="fno"), "prelocal"),
        (dict(encoder="hybrid"), "prelocal"),
        (dict(adapter="perceiver", queries=8), "contextual"),
        (dict(adapter="nearest", queries=16), "prelocal"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value.values())),
)
def test_any_batch_costs_what_running_it_counts(kind, predictor):
    step = Step(Architecture(**SMALL, **kind), predictor)
    cost = StepCost(step, step)
    for some in (part(7, 5), part(9, 5), part(4, 12, mixed=True), part(1, 8)):
        with Counter() as counter:
            step(some).backward()
        assert cost(some) == counter.flops > 0
    assert len(cost.per_window) == 3  # two batches of five channels: counted once


def test_counting_leaves_gradients_alone():
    step = Step(Architecture(**SMALL), "prelocal")
    StepCost(step, step)(part(2, 5))
    assert all(p.grad is None for p in step.parameters())


def test_rate_of_matrix_products_is_plausible():
    assert 1e8 < matmul_rate(torch.float32, torch.device("cpu"), 0.02) < 1e15
