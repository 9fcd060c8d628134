"""lib/flow.py against closed forms: a Gaussian's velocity is known, and with it covariances, scores and densities."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lib import flow
from lib.errors import Unusable

B, C, T = 4000, 1, 6


def gaussian() -> tuple[torch.Tensor, torch.Tensor, flow.Velocity]:
    """Mean, covariance and exact velocity (float64) of data that are Gaussian, by conditioning x_1 - x_0 on x_t."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(T, T, generator=generator, dtype=torch.float64)
    covariance = 0.6 * a @ a.T / T + 0.4 * torch.eye(T, dtype=torch.float64)
    mean = torch.linspace(-1, 1, T, dtype=torch.float64)

    def velocity(x_BCT: torch.Tensor, t: float) -> torch.Tensor:
        of_t = t * t * covariance + (1 - t) ** 2 * torch.eye(T, dtype=torch.float64)
        gain = (t * covariance - (1 - t) * torch.eye(T, dtype=torch.float64)) @ torch.linalg.inv(of_t)
        return mean + (x_BCT - t * mean) @ gain.T

    return mean, covariance, velocity


def noise(step: int) -> torch.Tensor:
    return torch.randn(B, C, T, generator=torch.Generator().manual_seed(step + 100), dtype=torch.float64)


@pytest.mark.parametrize(
    ("solver", "nfe", "within"), [("heun", 16, 0.01), ("midpoint", 16, 0.01), ("euler", 400, 0.01), ("sde", 400, 0.06)]
)
def test_samples_have_the_data_s_mean_and_covariance(solver, nfe, within):
    mean, covariance, velocity = gaussian()
    whitened = noise(-1)
    whitened = (whitened - whitened.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(whitened[:, 0].T.cov())
    ).T  # exactly N(0, I)
    x_BCT = flow.integrate(velocity, whitened, nfe, solver, noise)
    assert (x_BCT[:, 0].T.cov() - covariance).norm() / covariance.norm() < within
    assert (x_BCT[:, 0].mean(0) - mean).abs().max() < (1e-6 if solver != "sde" else 0.05) + within


def test_heun_with_sixteen_evaluations_beats_euler_with_fifty():
    _, covariance, velocity = gaussian()
    x0_BCT = noise(-1)
    exact = flow.integrate(velocity, x0_BCT, 2000, "midpoint")
    error = {
        solver: (flow.integrate(velocity, x0_BCT, nfe, solver) - exact).norm()
        for solver, nfe in (("heun", 16), ("euler", 50))
    }
    assert error["heun"] < error["euler"]


@pytest.mark.parametrize(
    ("solver", "nfe", "calls"),
    [("heun", 16, 16), ("heun", 5, 5), ("heun", 1, 1), ("midpoint", 5, 4), ("euler", 7, 7), ("sde", 3, 3)],
)
def test_no_more_evaluations_than_were_asked_for(solver, nfe, calls):
    times = []

    def velocity(x_BCT: torch.Tensor, t: float) -> torch.Tensor:
        times.append(t)
        return -x_BCT

    flow.integrate(velocity, torch.ones(1, 1, 2), nfe, solver, lambda _: torch.zeros(1, 1, 2))
    assert len(times) == calls and min(times) == 0 and max(times) <= 1


def test_a_solver_needs_its_evaluations():
    for solver, nfe in (("midpoint", 1), ("heun", 0), ("rk9", 4)):
        with pytest.raises(Unusable, match="--nfe"):
            flow.integrate(lambda x, t: x, torch.ones(1, 1, 2), nfe, solver)


def test_likelihood_is_the_gaussian_s_within_its_standard_error():
    mean, covariance, velocity = gaussian()
    x_BCT = torch.distributions.MultivariateNormal(mean, covariance).sample((50,))[:, None]
    truth_B = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x_BCT[:, 0])
    errors = {}
    for probes in (4, 64):
        noise_BCT, log_p_B, error_B = flow.log_likelihood(velocity, x_BCT, 64, probes, seed=probes)
        errors[probes] = error_B.mean()
        assert ((log_p_B - truth_B).abs() < 3 * error_B + 1e-2 * T).float().mean() > 0.95
    assert 2.5 < errors[4] / errors[64] < 6.5  # 1 / sqrt(probes): 4
    assert abs(float((log_p_B - truth_B).mean())) / T < 1e-2  # nats per value
    assert abs(float(noise_BCT.mean())) < 0.2 and 0.8 < float(noise_BCT.std()) < 1.2


def test_predictions_of_one_truth_are_one_velocity():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 8, 2, 5, generator=generator)
    t_B = torch.linspace(0.05, 0.9, 8)
    x_BCT, v_BCT = flow.between(x0, x1, t_B), x1 - x0
    t = t_B[:, None, None]
    d = t**2 + (1 - t) ** 2
    outputs = {"v": v_BCT, "x1": x1, "preconditioned": (v_BCT - (2 * t - 1) / d * x_BCT) * d.sqrt()}
    assert set(outputs) == set(flow.PREDICTIONS)
    for prediction, out in outputs.items():
        assert torch.allclose(flow.to_velocity(out, x_BCT, t_B, prediction), v_BCT, atol=1e-4)


def test_a_preconditioned_network_that_says_nothing_samples_white_noise():
    def velocity(x_BCT: torch.Tensor, t: float) -> torch.Tensor:
        return flow.to_velocity(torch.zeros_like(x_BCT), x_BCT, x_BCT.new_full((len(x_BCT),), t), "preconditioned")

    x0_BCT = noise(-1)
    x1_BCT = flow.integrate(velocity, x0_BCT, 16)
    assert torch.allclose(x1_BCT, x0_BCT * (x1_BCT / x0_BCT).mean(), rtol=1e-6)
    assert abs(float((x1_BCT / x0_BCT).mean()) - 1) < 0.01


@pytest.mark.parametrize("kind", flow.TIMES)
def test_times_and_noise_are_functions_of_seed_step_and_window(kind):
    index_B = np.arange(5000)
    t_B = flow.draw_times(kind, 0.1, 0, 7, index_B)
    assert torch.equal(t_B[100:200], flow.draw_times(kind, 0.1, 0, 7, index_B[100:200]))
    assert not torch.equal(t_B, flow.draw_times(kind, 0.1, 0, 8, index_B)) and 0 <= t_B.min() and t_B.max() <= 1
    spread = {"logit-normal": 0.2158, "uniform": 1 / math.sqrt(12), "ends": 0.35}[kind]
    assert abs(float(t_B.mean()) - 0.5) < 0.02 and abs(float(t_B.std()) - spread) < 0.03
    z_BCT = flow.draw_noise(0, 7, index_B[:300], (2, 50))
    assert torch.equal(z_BCT[10:20], flow.draw_noise(0, 7, index_B[10:20], (2, 50)))
    assert abs(float(z_BCT.mean())) < 0.02 and abs(float(z_BCT.std()) - 1) < 0.02
    assert len(torch.unique(z_BCT[:, 0, 0])) == 300


class Shifted(nn.Module):
    """A network whose velocity leads to the first condition's value, or to 0 without it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_BCT, t_B, code_BF, positions_BC3, mask_BC=None):
        return code_BF[:, :1, None].nan_to_num().expand_as(x_BCT) + self.weight, None


def test_sampling_depends_on_seed_number_and_condition_alone():
    net, code_NF = Shifted(), torch.tensor([[2.0]]).repeat(10, 1)
    how = (torch.zeros(3, 3), 16, "x1")
    x_NCT = flow.sample(net, code_NF, *how, seed=1, batch=4)
    assert x_NCT.shape == (10, 3, 16) and torch.equal(x_NCT, flow.sample(net, code_NF, *how, seed=1, batch=4))
    assert torch.equal(x_NCT[6:], flow.sample(net, code_NF[6:], *how, seed=1, first=6))
    assert not torch.equal(x_NCT, flow.sample(net, code_NF, *how, seed=2))
    null = torch.full_like(code_NF, math.nan)
    assert torch.equal(flow.sample(net, null, *how, cfg=3.0), flow.sample(net, null, *how))  # guidance towards nothing
    means = [float(flow.sample(net, code_NF, *how, cfg=cfg).mean()) for cfg in (0.0, 1.0, 2.0)]
    assert means[0] < means[1] < means[2]


def test_loss_is_of_good_channels_only():
    x0, x1 = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    v = torch.ones(2, 3, 4)
    v[:, 1] = 5
    mask = torch.tensor([[True, False, True]] * 2)
    assert torch.equal(flow.loss_flow(v, x0, x1, mask), torch.zeros(2))
    assert torch.allclose(flow.loss_flow(v, x0, x1, None), torch.full((2,), 16 / 3))
