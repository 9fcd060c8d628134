"""Attention of bfloat16 on CPUs, made of its parts, means what the fused kernel means."""

import pytest
import torch
import torch.nn.functional as F

from lib import attention
from lib.attention import attend


def inputs(windows: int, heads: int, queries: int, keys: int, width: int) -> list[torch.Tensor]:
    """Queries, keys, values and a gradient that bfloat16 holds exactly, as float64."""
    g = torch.Generator().manual_seed(windows + queries + keys)
    shapes = [(windows, heads, n, width) for n in (queries, keys, keys, queries)]
    return [torch.randn(s, generator=g).bfloat16().double() for s in shapes]


def results(way, tensors, dtype: torch.dtype, **more) -> list[torch.Tensor]:
    """What attention gives and its gradients, as float64."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors[:3]]
    out = way(*leaves, **more)
    out.backward(tensors[3].to(dtype))
    return [x.detach().double() for x in (out, *(leaf.grad for leaf in leaves))]


@pytest.fixture(autouse=True)
def by_parts(monkeypatch):
    """On CPUs that don't multiply bfloat16, too, only slowly."""
    monkeypatch.setattr(attention, "MULTIPLIED", True)


@pytest.mark.parametrize("cached", [1, 4000, 2**20], ids=["one by one", "some", "all at once"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 8), (5, 2, 7, 7, 32), (3, 4, 1, 19, 16), (4, 2, 33, 5, 32), (0, 2, 4, 4, 8)]
)
@pytest.mark.parametrize("masked", ["none", "all alike", "each its own"])
def test_as_a_float64_reference(monkeypatch, cached, shape, masked):
    monkeypatch.setattr(attention, "CACHED", cached)
    tensors, keys = inputs(*shape), None
    if masked != "none":
        keys = torch.rand(1 if masked == "all alike" else shape[0], 1, 1, shape[3]) < 0.6
        keys[..., 0] = True
    expected = results(F.scaled_dot_product_attention, tensors, torch.float64, attn_mask=keys)
    found = results(attend, tensors, torch.bfloat16, keys=keys)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 0.02 * b.norm() + 1e-9


def test_hidden_keys_are_of_no_effect():
    q, k, v, _ = (x.bfloat16() for x in inputs(2, 2, 5, 6, 8))
    keys = torch.tensor([True, True, False, True, False, True])[None, None, None]
    k2, v2 = torch.where(keys.mT, k, 1e3), torch.where(keys.mT, v, -1e3)
    assert torch.equal(attend(q, k, v, keys), attend(q, k2, v2, keys))


def test_a_window_without_any_key_spoils_nothing():
    q, k, v, _ = (x.bfloat16().requires_grad_() for x in inputs(2, 2, 5, 6, 8))
    keys = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    keys[1] = False
    out = attend(q, k, v, keys)
    out.float().square().sum().backward()
    assert out.isfinite().all() and torch.equal(out[:1], attend(q[:1], k[:1], v[:1], keys[:1]))
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert attend(q[:, :, :0], k, v).shape == (2, 2, 0, 8)


def test_the_compiler_takes_it_as_one_graph():
    q, k, v, _ = (x.bfloat16() for x in inputs(3, 2, 5, 6, 8))
    keys = torch.tensor([True, True, False, True, False, True])[None, None, None]
    traced = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(q, k, v, keys), attend(q, k, v, keys))


def test_float32_and_long_windows_are_the_fused_kernels(monkeypatch):
    tensors = inputs(2, 2, 9, 9, 8)
    q, k, v = (x.float() for x in tensors[:3])
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    monkeypatch.setattr(attention, "MULTIPLIED", False)
    q, k, v = (x.bfloat16() for x in tensors[:3])
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    monkeypatch.setattr(attention, "MULTIPLIED", True)
    monkeypatch.setattr(attention, "MOST", 1)  # what the backward pass would keep of them is memory
    q, k, v = (x.bfloat16() for x in tensors[:3])
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
