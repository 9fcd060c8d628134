"""Objectives against float64 references, their gradients, their optimum, and how they rise with collapse."""

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.stats import norm

from lib.losses import layer_normed, loss_latent, loss_sigreg, loss_vicreg


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_latent_loss_of_a_window_is_the_mean_over_its_real_tokens():
    predicted_BMD, target_BMD = normal(3, 5, 8), layer_normed(normal(3, 5, 8, seed=1))
    real_BM = torch.arange(5) < torch.tensor([[5], [2], [4]])
    whole_B = loss_latent(predicted_BMD, target_BMD, real_BM)
    alone = [loss_latent(predicted_BMD[b : b + 1, :n], target_BMD[b : b + 1, :n]) for b, n in enumerate((5, 2, 4))]
    assert whole_B.tolist() == pytest.approx(torch.cat(alone).tolist(), rel=1e-6)


def test_vicreg_is_its_formula():
    z = normal(7, 4).numpy()
    covariance = np.cov(z, rowvar=False)
    hinge = np.mean([max(0, 1 - np.sqrt(v + 1e-4)) for v in np.diag(covariance)])
    off = sum(covariance[i, j] ** 2 for i in range(4) for j in range(4) if i != j)
    assert float(loss_vicreg(torch.tensor(z))) == pytest.approx(hinge + 0.04 * off / 4, rel=1e-12)


def epps_pulley(z_B: np.ndarray) -> float:
    """The statistic by adaptive quadrature."""

    def integrand(t: float) -> float:
        return abs(np.exp(1j * t * z_B).mean() - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)

    return len(z_B) * integrate.quad(integrand, -3, 3)[0]


def test_sigreg_is_the_mean_epps_pulley_statistic_over_directions():
    z_BD = 0.2 + normal(40, 3, seed=2) * torch.tensor([1.0, 0.3, 2.0])
    assert float(loss_sigreg(z_BD[:, 2:], 0, 0)) == pytest.approx(epps_pulley(z_BD[:, 2].numpy()), rel=1e-3)
    u_SD = torch.nn.functional.normalize(normal(400, 3), dim=1)
    reference = np.mean([epps_pulley((z_BD @ u_D).numpy()) for u_D in u_SD])
    assert float(loss_sigreg(z_BD, 0, 0)) == pytest.approx(reference, rel=0.05)
    turn_DD = torch.linalg.qr(normal(3, 3, seed=3))[0]
    assert float(loss_sigreg(z_BD @ turn_DD, 0, 0)) == pytest.approx(float(loss_sigreg(z_BD, 0, 0)), rel=0.05)


@pytest.mark.parametrize("loss", [loss_vicreg, lambda z_BD: loss_sigreg(z_BD, 3, 7)], ids=["vicreg", "sigreg"])
def test_gradients(loss):
    assert torch.autograd.gradcheck(loss, 0.5 * normal(6, 4).requires_grad_())
    z_BD = normal(6, 4).bfloat16().requires_grad_()
    loss(z_BD).backward()  # in float32 inside
    assert loss(z_BD).dtype == torch.float32 and z_BD.grad.isfinite().all()


def test_the_optimum_is_an_isotropic_gaussian():
    quantiles_B1 = torch.tensor(norm.ppf((np.arange(1000) + 0.5) / 1000))[:, None]
    assert float(loss_sigreg(quantiles_B1, 0, 0)) < 1e-3  # no sampling error here
    assert float(loss_vicreg(1.01 * normal(100000, 8))) < 1e-3
    for B, D in ((16, 32), (64, 128)):
        samples = [float(loss_sigreg(normal(B, D, seed=s), 0, s)) for s in range(20)]
        assert np.mean(samples) == pytest.approx(1.05, abs=0.1)


@pytest.mark.parametrize("loss", [loss_vicreg, lambda z_BD: loss_sigreg(z_BD, 0, 0)], ids=["vicreg", "sigreg"])
def test_both_rise_as_features_collapse(loss):
    z_BD = normal(128, 16)
    to_a_point = [float(loss(scale * z_BD)) for scale in (1.0, 0.7, 0.4, 0.2, 0.05)]
    assert to_a_point == sorted(to_a_point)
    u_D = torch.nn.functional.normalize(normal(16, seed=1), dim=0)
    line_BD = 4 * (z_BD @ u_D)[:, None] * u_D  # of the same variance in all
    to_a_line = [float(loss((1 - share) ** 0.5 * z_BD + share**0.5 * line_BD)) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert to_a_line == sorted(to_a_line) and to_a_line[-1] > 3 * to_a_line[0]


def test_a_regulariser_undoes_a_collapse():
    for loss in (loss_vicreg, lambda z_BD: loss_sigreg(z_BD, 0, 0)):
        z_BD = (0.05 * normal(32, 8)).requires_grad_()
        optimizer = torch.optim.Adam([z_BD], lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            loss(z_BD).backward()
            optimizer.step()
        assert z_BD.std(0).min() > 0.7


def test_directions_are_a_function_of_seed_and_step():
    z_BD = normal(20, 8)
    at = {(s, t): float(loss_sigreg(z_BD, s, t)) for s in (0, 1) for t in (0, 1)}
    torch.rand(5)  # torch's own state plays no part
    assert len(set(at.values())) == 4 and all(float(loss_sigreg(z_BD, *k)) == v for k, v in at.items())
