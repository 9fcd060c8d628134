"""Attention takes the kernel where it is faster and means the same everywhere."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from lib.attention import attend

DTYPES = [torch.float32, torch.bfloat16]


def inputs(windows: int, heads: int, queries: int, keys: int, width: int) -> list[torch.Tensor]:
    """Queries, keys, values and a gradient that bfloat16 holds exactly, as float64."""
    g = torch.Generator().manual_seed(windows + queries + keys)
    shapes = [(windows, heads, n, width) for n in (queries, keys, keys, queries)]
    return [torch.randn(s, generator=g).bfloat16().double() for s in shapes]


def results(way, tensors, dtype: torch.dtype, keys: torch.Tensor | None) -> list[torch.Tensor]:
    """What attention gives and its gradients, as float64."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors[:3]]
    out = way(*leaves, keys)
    out.backward(tensors[3].to(dtype))
    return [x.detach().double() for x in (out, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 2, 7, 7, 32), (3, 4, 1, 19, 16), (4, 2, 33, 5, 32)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
def test_as_a_float64_reference(monkeypatch, shape, masked, dtype):
    monkeypatch.setattr(kernels, "path", lambda: "c++ (avx512)")  # whatever runs it here
    tensors, real_BK = inputs(*shape), None
    if masked:
        real_BK = torch.rand(shape[0], shape[3], generator=torch.Generator().manual_seed(1)) < 0.6
        real_BK[:, 0] = True
    keys = real_BK[:, None, None] if masked else None
    expected = results(F.scaled_dot_product_attention, tensors, torch.float64, keys)
    found = results(attend, tensors, dtype, real_BK)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= (0.006 if dtype == torch.bfloat16 else 1e-6) * b.norm() + 1e-9


def test_bfloat16_is_the_kernels_and_everything_else_torchs(monkeypatch):
    q, k, v, _ = inputs(2, 2, 9, 9, 8)
    asked = []
    monkeypatch.setattr(kernels, "attend", lambda *x: asked.append(x) or x[0])
    monkeypatch.setattr(kernels, "path", lambda: "c++ (avx512)")
    attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert len(asked) == 1
    for path, dtypes in {"c++ (avx512)": [torch.float32], "c++ (avx2)": DTYPES, "reference": DTYPES}.items():
        monkeypatch.setattr(kernels, "path", lambda path=path: path)
        for dtype in dtypes:
            three = [x.to(dtype) for x in (q, k, v)]
            assert torch.equal(attend(*three), F.scaled_dot_product_attention(*three))
    assert len(asked) == 1


def test_the_compiler_takes_it_as_one_graph():
    q, k, v, _ = (x.bfloat16() for x in inputs(3, 2, 5, 6, 8))
    real_BK = torch.tensor([True, True, False, True, False, True]).expand(3, -1)
    traced = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(q, k, v, real_BK), attend(q, k, v, real_BK))
