"""Schedules against torch's own, and parameter groups: every parameter in exactly one, at the rate of its layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.models import Architecture, build_encoder
from lib.optim import decay_groups, ema_momentum, ema_update, layer_groups, warm_restarts, warmup_cosine


@settings(deadline=None)
@given(period=st.integers(1, 40))
def test_warm_restarts_are_torchs(period):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, period, T_mult=2)
    for step in range(7 * period + 3):  # three cycles: period, 2 and 4 times that
        assert warm_restarts(step, period, 2.0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warm_up_comes_before_the_first_cycle():
    rates = [warm_restarts(step, 10, 1.0, warmup=4) for step in range(4 + 70)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [step for step, rate in enumerate(rates) if rate == 1.0] == [3, 4, 14, 34]
    assert all(0 < rate <= 1 for rate in rates)


def test_cosine_is_torchs_after_the_warm_up():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50 - 1 - 5)
    for step in range(5, 50):
        assert warmup_cosine(step, 50, 0.3, 5) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    assert warmup_cosine(0, 50, 0.3, 5) == pytest.approx(0.06)


def test_momentum_rises_to_one_and_the_teacher_follows():
    assert ema_momentum(0, 10, 0.9) == 0.9 and ema_momentum(10, 10, 0.9) == 1.0
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = 0.75 * teacher.weight.detach() + 0.25 * student.weight.detach()
    ema_update(teacher, student, 0.75)
    torch.testing.assert_close(teacher.weight.detach(), expected)


KINDS = ["transformer", "mamba", "fno", "hybrid"]


def encoder_of(kind: str, adapter: str = "none", layers: int = 3) -> nn.Module:
    return build_encoder(Architecture(kind, 16, layers, 2, 100.0, 50, adapter, 8, relations=True))


def same(groups: list[dict], modules: list[nn.Module]) -> None:
    """Every parameter is in exactly one group."""
    ours = [id(p) for group in groups for p in group["params"]]
    theirs = {id(p) for module in modules for p in module.parameters() if p.requires_grad}
    assert len(ours) == len(set(ours)) and set(ours) == theirs


@pytest.mark.parametrize("adapter", ["none", "perceiver", "nearest"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_learn_slower_the_nearer_they_are_to_the_signal(kind, adapter):
    encoder, head = encoder_of(kind, adapter), nn.Linear(16, 2)
    groups = layer_groups(encoder, head, 0.5, 0.05)
    same(groups, [encoder, head])
    scales = {id(p): group["scale"] for group in groups for p in group["params"]}
    by_name = {name.removeprefix("encoder."): scales[id(p)] for name, p in encoder.named_parameters()}
    assert [g["scale"] for g in groups] == [0.5 ** (g["depth"] or 0) for g in groups]
    assert all(scales[id(p)] == 1 for p in head.parameters()) and by_name["norm.weight"] == 1
    assert by_name["embed.samples.weight"] == 0.5**4 == by_name["place.unplaced_D"]
    for name, scale in by_name.items():
        if name.startswith("blocks."):
            assert scale == 0.5 ** (3 - int(name.split(".")[1])), name
        if name.startswith(("gather.", "query_place.", "relate.")):
            assert scale == 0.5**4, name
        if name.startswith("read."):
            assert scale == 1, name
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for m in (encoder, head) for p in decay_groups(m, 0.05)[0]["params"]}


def test_without_decay_of_the_rate_all_layers_are_alike():
    encoder, head = encoder_of("transformer"), nn.Linear(16, 2)
    assert {group["scale"] for group in layer_groups(encoder, head, 1.0, 0.05)} == {1.0}
    same(decay_groups(encoder, 0.05), [encoder])
    assert {group["scale"] for group in decay_groups(encoder, 0.05)} == {1.0}


def test_a_frozen_encoder_is_in_no_group():
    encoder, head = encoder_of("fno").requires_grad_(False), nn.Linear(16, 2)
    groups = layer_groups(encoder, head, 0.5, 0.05)
    same(groups, [encoder, head])
    assert len(groups) == 2


def test_matrices_decay_and_the_rest_does_not():
    encoder = encoder_of("transformer")
    names = {id(p): name for name, p in encoder.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in decay_groups(encoder, 0.05))
    assert "blocks.0.qkv.weight" in decayed and "embed.samples.weight" in decayed
    assert {"place.space.0.weight", "blocks.1.norm1.weight", "blocks.1.qkv.bias"} <= kept
