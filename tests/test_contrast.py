"""lib/contrast.py: losses against loops in float64, their gradients, and what they do to features."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.contrast import (
    COLDEST,
    Projection,
    alignment,
    load_projection,
    loss_infonce,
    loss_supcon,
    loss_vicreg_pairs,
    save_projection,
    uniformity,
    units,
)
from lib.errors import Unusable
from lib.models import Architecture
from lib.ranks import Ranks
from lib.tensors import save_tensors

torch.set_num_threads(1)


def features(pairs: int, d: int = 5, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    z_VD = torch.randn(2 * pairs, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return F.normalize(z_VD, dim=1)


def relations(pairs: int, seed: int = 0, alike: float = 0.1, excluded: float = 0.2):
    """Symmetric and disjoint; partners are alike, nobody is anything to itself but excluded."""
    u = torch.rand(2 * pairs, 2 * pairs, generator=torch.Generator().manual_seed(seed))
    u = torch.minimum(u, u.T)
    alike_VV, excluded_VV = u < alike, (u >= alike) & (u < alike + excluded)
    view = torch.arange(2 * pairs)
    alike_VV[view, (view + pairs) % (2 * pairs)] = True
    alike_VV[view, view] = False
    excluded_VV[view, view] = True
    return alike_VV, excluded_VV & ~alike_VV


def infonce_by_loop(z, alike, excluded, temperature, within):
    V, B, total = len(z), len(z) // 2, 0.0
    for v in range(V):
        own = (v + B) % V
        terms = [math.exp(float(z[v] @ z[own]) / temperature)]
        for w in range(V):
            other_half = (w < B) != (v < B)
            if w != v and w != own and not alike[v, w] and not excluded[v, w] and (within or other_half):
                terms.append(math.exp(float(z[v] @ z[w]) / temperature))
        total -= math.log(terms[0] / sum(terms))
    return total / V


def supcon_by_loop(z, alike, excluded, temperature):
    V, total = len(z), 0.0
    for v in range(V):
        others = [w for w in range(V) if w != v and not excluded[v, w]]
        bottom = sum(math.exp(float(z[v] @ z[w]) / temperature) for w in others)
        positives = [w for w in range(V) if alike[v, w]]
        total -= sum(math.log(math.exp(float(z[v] @ z[p]) / temperature) / bottom) for p in positives) / len(positives)
    return total / V


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("pairs, temperature", [(2, 0.5), (7, 0.1), (13, 0.07)])
def test_infonce_against_a_loop(pairs, temperature, within):
    z, (alike, excluded) = features(pairs), relations(pairs)
    expected = infonce_by_loop(z, alike, excluded, temperature, within)
    assert float(loss_infonce(z, alike, excluded, temperature, within)) == pytest.approx(expected, rel=1e-12)
    single = loss_infonce(z.float(), alike, excluded, temperature, within)
    assert float(single) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pairs, temperature", [(2, 0.5), (7, 0.1), (13, 0.07)])
def test_supcon_against_a_loop(pairs, temperature):
    z, (alike, excluded) = features(pairs), relations(pairs)
    expected = supcon_by_loop(z, alike, excluded, temperature)
    assert float(loss_supcon(z, alike, excluded, temperature)) == pytest.approx(expected, rel=1e-12)


def test_supcon_with_one_positive_is_nt_xent():
    z, (alike, excluded) = features(9), relations(9, alike=0.0)
    assert float(loss_supcon(z, alike, excluded, 0.2)) == pytest.approx(float(loss_infonce(z, alike, excluded, 0.2)))


def test_nt_xent_is_the_textbooks():
    """SimCLR's: cross entropy over all other views."""
    z, (alike, excluded) = features(8), relations(8, alike=0.0, excluded=0.0)
    logits = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, (torch.arange(16) + 8) % 16)
    assert float(loss_infonce(z, alike, excluded, 0.3)) == pytest.approx(float(expected))
    a, p = z.chunk(2)
    clip = (F.cross_entropy(a @ p.T / 0.3, torch.arange(8)) + F.cross_entropy(p @ a.T / 0.3, torch.arange(8))) / 2
    assert float(loss_infonce(z, alike, excluded, 0.3, within=False)) == pytest.approx(float(clip))


def test_gradients():
    alike, excluded = relations(4)
    z = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for within in (True, False):
        assert torch.autograd.gradcheck(
            lambda z, t, w=within: loss_infonce(F.normalize(z, dim=1), alike, excluded, t, w), (z, t)
        )
    assert torch.autograd.gradcheck(lambda z, t: loss_supcon(F.normalize(z, dim=1), alike, excluded, t), (z, t))
    assert torch.autograd.gradcheck(loss_vicreg_pairs, (z,))


def test_a_view_without_negatives_gives_nothing_and_no_nan():
    z = features(3).requires_grad_()
    alike, excluded = relations(3, alike=0.0, excluded=1.0)
    loss = loss_infonce(z, alike, excluded, 0.1)
    loss.backward()
    assert loss.item() == 0 and (z.grad == 0).all()


def test_what_is_excluded_gets_no_gradient():
    z = features(2).requires_grad_()
    alike, excluded = relations(2, alike=0.0, excluded=0.0)
    excluded[0, 1] = excluded[1, 0] = True
    logits_without = loss_infonce(z, alike, excluded, 0.1)
    (g,) = torch.autograd.grad(logits_without, z)
    moved = z.detach().clone()
    moved[1] = F.normalize(moved[1] + 0.3 * moved[0], dim=0)
    assert g.isfinite().all()
    before = -F.log_softmax((z[0] @ z.T / 0.1)[[2, 3]], 0)[0]  # of view 0: its partner and one negative
    after = -F.log_softmax((z[0] @ moved.T / 0.1)[[2, 3]], 0)[0]
    assert before.item() == pytest.approx(after.item())


def test_vicreg_of_pairs_by_hand():
    z = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = 0.0
    a, p = z[:20].numpy(), z[20:].numpy()
    expected += ((a - p) ** 2).mean()
    for half in (a, p):
        c = np.cov(half.T)
        expected += np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean()
        expected += 0.04 * (np.sum(c**2) - np.sum(np.diag(c) ** 2)) / 6
    assert float(loss_vicreg_pairs(z)) == pytest.approx(expected)


# ----------------------------------------------------------------------------
# projection


def projection(time: bool = True, d: int = 6) -> Projection:
    torch.manual_seed(0)
    return Projection(Architecture(d_model=8, heads=2, patch=50), d, time, 0.07)


def test_projection_is_a_sum_over_good_electrodes_weighted_by_place():
    z, xyz = torch.randn(3, 4 * 5, 8), 0.1 * torch.randn(3, 4, 3)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = False
    for time, width in ((True, 5 * 6), (False, 6)):
        project = projection(time)
        out = project(z, xyz, mask)
        assert out.shape == (3, width)
        order = torch.tensor([2, 0, 3, 1])  # of electrodes: it doesn't matter
        torch.testing.assert_close(
            project(z.view(3, 4, 5, 8)[:, order].flatten(1, 2), xyz[:, order], mask[:, order]), out
        )
        poisoned = z.clone()
        poisoned.view(3, 4, 5, 8)[1, 2] = math.nan  # whatever stands there
        torch.testing.assert_close(project(poisoned, xyz, mask), out)
        rest = [0, 1, 3]  # as if it had never been there
        torch.testing.assert_close(project(z.view(3, 4, 5, 8)[1:2, rest].flatten(1, 2), xyz[1:2, rest], None), out[1:2])
        assert not torch.allclose(project(z, xyz.flip(1), mask)[0], out[0], atol=1e-4)  # places do
    assert project(z, torch.full_like(xyz, math.nan), None).isfinite().all()


def test_projections_are_files(tmp_path):
    project = projection()
    save_projection(tmp_path / "p.safetensors", project, Architecture(d_model=8, heads=2, patch=50), {"run": "x"})
    again, meta = load_projection(tmp_path / "p.safetensors")
    z, xyz = torch.randn(2, 3 * 4, 8), 0.1 * torch.randn(2, 3, 3)
    assert torch.equal(again(z, xyz, None), project(z, xyz, None)) and meta["run"] == "x"
    with pytest.raises(Unusable, match="other.safetensors is berger-encoder"):
        save_tensors(tmp_path / "other.safetensors", {}, {"format": "berger-encoder", "version": 1})
        load_projection(tmp_path / "other.safetensors")


def test_units_are_centred():
    y = torch.randn(50, 6) + 100
    z = units(y)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(50))
    torch.testing.assert_close(units(y + 7), z, atol=1e-4, rtol=1e-3)
    assert (z @ z.T).mean() < 0.1


def test_temperature_starts_as_asked_and_stays_in_bounds():
    head = projection()
    assert head.temperature().item() == pytest.approx(0.07)
    with torch.no_grad():
        head.log_temperature.fill_(-20)
    assert head.temperature().item() == pytest.approx(COLDEST)


def test_the_loss_learns_to_tell_moments_apart():
    """Two views of 64 moments under noise: descent on a linear map beats chance by far; without negatives it could only collapse."""
    rng = torch.Generator().manual_seed(0)
    moment = torch.randn(64, 4, generator=rng)
    mixing = torch.randn(4, 30, generator=rng)
    x = torch.cat([moment @ mixing + 3 * torch.randn(64, 30, generator=rng) for _ in range(2)])
    alike, excluded = relations(64, alike=0.0, excluded=0.0)
    weight = (torch.randn(30, 4, generator=rng) * 0.1).requires_grad_()
    optimizer = torch.optim.Adam([weight], 0.02)

    def found() -> float:
        z = F.normalize(x @ weight.detach(), dim=1)
        return float(((z[:64] @ z[64:].T).argmax(1) == torch.arange(64)).float().mean())

    before = found()
    for _ in range(150):
        loss = loss_infonce(F.normalize(x @ weight, dim=1), alike, excluded, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.2 and found() > 0.5


# ----------------------------------------------------------------------------
# gathered


def test_gradients_through_gathered_features_are_exact():
    """Two ranks, played one after the other: their rows of the gradient are those of one process that has everything."""
    torch.manual_seed(0)
    encoder, x = torch.nn.Linear(6, 4).double(), torch.randn(10, 2, 6, dtype=torch.float64)
    alike, excluded = relations(10)

    def loss_of(z_B2D):
        return loss_infonce(F.normalize(z_B2D.transpose(0, 1).flatten(0, 1), dim=1), alike, excluded, 0.2)

    loss_of(encoder(x)).backward()
    whole = encoder.weight.grad.clone()
    encoder.zero_grad()
    everything = encoder(x).detach()
    for rank in range(2):
        ranks = Ranks(rank, 2, torch.device("cpu"))
        z = everything.clone().requires_grad_()
        rows = ranks.gradient(loss_of(z), z)[ranks.share(10)]
        (encoder(x[ranks.share(10)]) * rows).sum().backward()
    torch.testing.assert_close(encoder.weight.grad, whole, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------
# alignment and uniformity


def test_alignment_and_uniformity():
    z = features(2000, 16)
    assert alignment(z) == pytest.approx(2, abs=0.05)  # unrelated
    assert alignment(torch.cat([z[:50], z[:50]])) == 0
    assert uniformity(z[:1].repeat(10, 1)) == pytest.approx(0, abs=1e-6)
    assert uniformity(z) == pytest.approx(-4 + 8 / 16, abs=0.05)
    crowded = F.normalize(z + 2 * z[0], dim=1)
    assert uniformity(crowded) > uniformity(z) + 1
    small = features(3, 4).numpy()
    distances = [((small[i] - small[j]) ** 2).sum() for i in range(6) for j in range(i)]
    assert uniformity(torch.from_numpy(small)) == pytest.approx(math.log(np.mean(np.exp(-2 * np.array(distances)))))
