"""lib/balance.py on two losses that share a layer: scales are undone, weights stay, and nothing collapses."""

import pytest
import torch
from torch import nn

from lib.balance import Balance


def train(mode: str, factor: float, steps: int = 300) -> tuple[list[float], list[float], Balance]:
    """Weights and shared-layer gradient norms (unweighted, of the unscaled losses) after training two regressions from one layer."""
    torch.manual_seed(0)
    shared, heads = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(2))
    balance = Balance(("a", "b"), (1.0, 0.3), mode)
    parameters = [*shared.parameters(), *heads.parameters()]
    groups = [{"params": parameters, "lr": 1e-3}, {"params": [balance.log_variance], "lr": 1e-2}]
    optimizer = torch.optim.Adam(groups if mode == "uncertainty" else groups[:1])
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(2, 8, generator=generator)
    norms = []
    for step in range(steps):
        x = torch.randn(64, 8, generator=generator)
        noisy = (x @ truth.T) + torch.randn(64, 2, generator=generator)
        z = torch.tanh(shared(x))
        losses = [factor**k * (head(z)[:, 0] - noisy[:, k]).square().mean() for k, head in enumerate(heads)]
        optimizer.zero_grad()
        norms = [float(torch.autograd.grad(loss, shared.weight, retain_graph=True)[0].norm()) for loss in losses]
        sum(w * loss for w, loss in zip(balance.weights(), losses, strict=True)).backward()
        values = [float(loss.detach()) for loss in losses]
        balance.learn(values)
        optimizer.step()
        if balance.compares(step):
            balance.compare(values, norms)
    return balance.weights(), norms, balance


def test_fixed_weights_stay():
    weights, _, balance = train("fixed", 100.0)
    assert weights == pytest.approx([1.0, 0.3]) and not balance.compares(0) and not balance.log_variance.requires_grad


def test_gradnorm_undoes_the_scale_of_a_loss():
    ratios = []
    for factor in (1.0, 100.0):
        weights, norms, _ = train("gradnorm", factor)
        assert min(weights) > 1e-3 and sum(weights) == pytest.approx(1.3)
        ratios.append(weights[1] * norms[1] / (weights[0] * norms[0]))
    assert 0.5 < ratios[1] / ratios[0] < 2
    assert 0.1 < ratios[0] < 0.9  # about the shares, 0.3


def test_uncertainty_undoes_the_scale_of_a_loss_and_does_not_vanish():
    small, _, _ = train("uncertainty", 1.0, 1500)
    large, _, balance = train("uncertainty", 10.0, 1500)
    assert 3 < (small[1] / small[0]) / (large[1] / large[0]) < 30
    assert min(*small, *large) > 1e-3 and balance.log_variance.requires_grad


def test_uncertainty_settles_where_the_theory_says():
    balance = Balance(("a", "b"), (1.0, 0.3), "uncertainty")
    optimizer = torch.optim.SGD([balance.log_variance], lr=0.1)
    for _ in range(2000):
        added = balance.learn([4.0, 0.5])
        optimizer.step()
    assert balance.weights() == pytest.approx([0.25, 0.3 * 2.0], rel=1e-3)  # share x exp(-s) = share / loss
    assert added == pytest.approx(float(torch.log(torch.tensor(4.0)) - 0.3 * torch.log(torch.tensor(2.0))), rel=1e-3)


def test_a_step_that_is_not_finite_moves_nothing():
    balance = Balance(("a", "b"), (1.0, 1.0), "gradnorm")
    balance.compare([float("nan"), 1.0], [1.0, 1.0])
    balance.compare([1.0, 1.0], [0.0, 1.0])
    assert balance.weights() == [1.0, 1.0] and not balance.first.any()


def test_its_state_is_in_its_buffers():
    _, _, balance = train("gradnorm", 10.0, 50)
    again = Balance(("a", "b"), (1.0, 0.3), "gradnorm")
    again.load_state_dict(balance.state_dict())
    assert again.weights() == balance.weights() and torch.equal(again.first, balance.first)
