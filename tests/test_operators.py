"""torch.ops.berger on the CPU: each operator against its float64 meaning, its gradients, what NaN does, and what the C++ must survive."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import BuiltinFunctionType

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import kernels
from kernels import build, plain, reference

ROOT = Path(__file__).resolve().parent.parent
SOS = np.concatenate(
    [
        scipy.signal.tf2sos(*scipy.signal.iirnotch(50, 30, 256)),
        scipy.signal.butter(4, (0.5, 45), "bandpass", fs=256, output="sos"),
    ]
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# rows, steps, channels, states, ahead: nothing, one, primes, whole chunks and vectors, and one more than those
SCANS = [
    (0, 5, 3, 2, 1),
    (2, 0, 3, 2, 1),
    (2, 5, 0, 2, 0),
    (2, 5, 3, 0, 1),
    (1, 1, 1, 1, 1),
    (2, 16, 32, 16, 16),
    (3, 16, 64, 16, 32),
]
SCANS += [(2, 17, 7, 5, 3), (2, 33, 13, 3, 0), (1, 101, 40, 16, 40), (2, 48, 70, 9, 35), (1, 31, 129, 17, 65)]


@pytest.fixture(autouse=True)
def loaded():
    """Without the C++ these tests are of the fallback, through the same operators."""
    kernels.path()


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Within a share of the largest value, or of 1, the inputs' own size."""
    assert actual.shape == expected.shape
    if expected.numel():
        assert (actual.double() - expected).abs().max() <= tolerance * max(float(expected.detach().abs().max()), 1.0)


def same_on_three_threads(work) -> None:
    expected = work()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(work(), expected, strict=True))
    finally:
        torch.set_num_threads(1)


# ----------------------------------------------------------------------------
# selective scan


def scan_case(rows, steps, channels, states, dtype=torch.float64, seed=0):
    """u, fade, b and c as in lib/mamba.py, slices of one tensor; some fades lie beyond the cut."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, steps, 2 * channels + 2 * states, generator=g, dtype=torch.float64)
    x[..., channels : 2 * channels] = 5 * torch.rand(rows, steps, channels, generator=g, dtype=torch.float64)
    return x.to(dtype).split((channels, channels, states, states), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SCANS)
def test_scan_and_its_gradients(case, dtype):
    *sizes, ahead = case
    ours = [t.detach().requires_grad_() for t in scan_case(*sizes, dtype)]
    exact = [t.detach().double().requires_grad_() for t in ours]
    y, expected = kernels.selective_scan(*ours, ahead), reference.selective_scan(*exact, ahead)
    assert y.dtype == dtype
    close(y, expected, ROUNDING[dtype])
    if expected.numel() and expected.requires_grad and sizes[3]:
        g = torch.randn_like(y)
        for mine, theirs in zip(
            torch.autograd.grad(y, ours, g), torch.autograd.grad(expected, exact, g.double()), strict=True
        ):
            assert mine.dtype == dtype
            close(mine, theirs, 5 * ROUNDING[dtype])


def test_scan_passes_gradcheck():
    inputs = [t.clone().requires_grad_() for t in scan_case(2, 19, 5, 3)]
    assert torch.autograd.gradcheck(lambda *t: kernels.selective_scan(*t, 2), inputs)


def test_scan_of_any_strides():
    u, fade, b, c = scan_case(3, 21, 10, 4, torch.float32)
    expected = kernels.selective_scan(*(t.contiguous() for t in (u, fade, b, c)), 4)
    flipped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (u, fade, b, c)]
    shifted = [
        torch.empty(t.numel() + 1)[1:].view_as(t).copy_(t) for t in (u, fade, b, c)
    ]  # off any vector's alignment
    one_row = [t[:1].expand(3, -1, -1) for t in (u, fade, b, c)]
    assert torch.equal(kernels.selective_scan(*flipped, 4), expected)
    assert torch.equal(kernels.selective_scan(*shifted, 4), expected)
    assert torch.equal(kernels.selective_scan(*one_row, 4), expected[:1].expand(3, -1, -1))
    assert torch.equal(kernels.selective_scan(u[::2], fade[::2], b[::2], c[::2], 4), expected[::2])


def test_scan_agrees_with_the_plain_form_of_the_encoder():
    from lib.mamba import selective_scan

    u, fade, b, c = scan_case(4, 50, 12, 16, torch.float32)
    turned = (t.flip(1) for t in (u[..., 6:], fade[..., 6:], b, c))
    expected = torch.cat([selective_scan(u[..., :6], fade[..., :6], b, c), selective_scan(*turned).flip(1)], 2)
    close(kernels.selective_scan(u, fade, b, c, 6), expected.double(), 2e-6)


def test_scan_cuts_fades_at_4():
    u, fade, b, c = (t.clone() for t in scan_case(2, 40, 6, 4, torch.float32))
    fade[:, ::3] = torch.inf
    fade.requires_grad_()
    y = kernels.selective_scan(u, fade, b, c)
    assert torch.equal(y, kernels.selective_scan(u, fade.detach().clamp_max(4), b, c)) and y.isfinite().all()
    y.sum().backward()
    assert fade.grad.isfinite().all() and not fade.grad[fade > 4].any() and fade.grad[fade < 4].all()


@pytest.mark.parametrize("size", [1e-18, 1e-9, 1e9, 1e18])
@pytest.mark.parametrize("fade", [0.0, 1.0, 4.0])
def test_scan_of_small_and_large_values(fade, size):
    """Within a chunk what is left is 1e-28 after 16 fades of 4."""
    u, _, b, c = (t.contiguous() for t in scan_case(2, 50, 8, 4, torch.float32))
    for scales in ((size, 1.0), (1.0, size)):  # of the input; of the gradient
        ours = [t.clone().requires_grad_() for t in (u * scales[0], torch.full_like(u, fade), b, c)]
        exact = [t.detach().double().requires_grad_() for t in ours]
        y, expected = kernels.selective_scan(*ours, 3), reference.selective_scan(*exact, 3)
        g = torch.randn_like(y) * scales[1]
        pairs = [(y, expected)]
        pairs += zip(torch.autograd.grad(y, ours, g), torch.autograd.grad(expected, exact, g.double()), strict=True)
        for i, (mine, theirs) in enumerate(pairs):
            tolerance = 1e-4 if i == 2 else 1e-5  # of a fade: a difference of large sums
            assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("which", range(4))
def test_scan_keeps_a_nan_within_its_row_and_the_steps_it_can_reach(which):
    inputs = [t.clone() for t in scan_case(3, 64, 8, 4, torch.float32)]
    expected = kernels.selective_scan(*inputs)
    inputs[which][1, 40, 2] = torch.nan
    y, meant = kernels.selective_scan(*inputs), reference.selective_scan(*inputs)
    assert torch.equal(y[[0, 2]], expected[[0, 2]]) and torch.equal(y[1, :32], expected[1, :32])
    assert y[meant.isnan()].isnan().all() and (meant.isnan() | (y.isnan() <= (torch.arange(64)[:, None] >= 32))).all()


def test_scan_is_the_same_on_any_number_of_threads():
    inputs = scan_case(200, 33, 20, 5, torch.float32)
    g = torch.randn(200, 33, 20)

    def both():
        y = torch.ops.berger.selective_scan(*inputs, 9)
        return [y, *torch.ops.berger.selective_scan_backward(g, *inputs, y, 9)]

    same_on_three_threads(both)


# ----------------------------------------------------------------------------
# tokens


def token_case(B, C, P, K, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, space, time = (torch.randn(*shape, D, generator=g).to(dtype) for shape in ((B, C * P), (B, C), (P,)))
    return x, space, time, torch.randint(C * P, (B, K), generator=g) if C * P else torch.zeros(B, 0, dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize(
    "sizes", [(2, 3, 4, 7, 16), (1, 1, 1, 1, 1), (3, 5, 2, 13, 37), (0, 3, 2, 4, 8), (2, 3, 2, 0, 8), (2, 3, 2, 4, 0)]
)
def test_tokens_and_their_gradients(sizes, taken, dtype):
    x, space, time, ids = token_case(*sizes, dtype)
    x = reference.take(x, ids) if taken else x
    ours = [t.clone().requires_grad_() for t in (x, space, time)]
    exact = [t.double().requires_grad_() for t in (x, space, time)]
    z, expected = kernels.embed_tokens(*ours, ids, taken), reference.embed_tokens(*exact, ids, taken)
    assert z.dtype == dtype
    close(z, expected, ROUNDING[dtype])
    g = torch.randn_like(z)
    for mine, theirs in zip(
        torch.autograd.grad(z, ours, g), torch.autograd.grad(expected, exact, g.double()), strict=True
    ):
        assert mine.dtype == dtype
        close(mine, theirs, 3 * ROUNDING[dtype])


def test_tokens_are_the_models():
    from lib.models import Places

    torch.manual_seed(0)
    place = Places(32, 1.0)
    xyz_BC3, x_BND, ids_BK = 0.1 * torch.randn(2, 5, 3), torch.randn(2, 20, 32), torch.randint(20, (2, 9))
    expected = reference.take(x_BND, ids_BK) + place(xyz_BC3, 4, ids_BK)
    whole_BND = place(xyz_BC3, 4)  # space + time of all tokens
    time_PD = place(torch.full((1, 1, 3), torch.nan), 4)[0] - place.unplaced_D
    space_BCD = whole_BND.unflatten(1, (5, 4))[:, :, 0] - time_PD[0]
    torch.testing.assert_close(kernels.embed_tokens(x_BND, space_BCD, time_PD, ids_BK), expected, rtol=0, atol=1e-6)


def test_tokens_gradients_are_the_same_on_any_number_of_threads():
    *_, ids = token_case(90, 5, 4, 30, 37)
    grad = torch.randn(90, 30, 37)
    same_on_three_threads(lambda: torch.ops.berger.embed_tokens_backward(grad, ids, 5, 4, True, True, True))


def test_tokens_mix_formats_and_strides():
    x, space, time, ids = token_case(2, 3, 4, 7, 16)
    z = kernels.embed_tokens(x.bfloat16(), space.bfloat16(), time, ids)
    assert z.dtype == torch.float32
    assert torch.equal(z, kernels.embed_tokens(x.bfloat16().float(), space.bfloat16().float(), time, ids))
    query = torch.randn(16).expand(2, 7, 16)  # one vector for all: stride 0
    assert torch.equal(
        kernels.embed_tokens(query, space, time, ids, True), reference.embed_tokens(query, space, time, ids, True)
    )
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, space, time, ids)]
    assert torch.equal(kernels.embed_tokens(*turned), reference.embed_tokens(x, space, time, ids))


def test_tokens_pass_gradcheck():
    x, space, time, ids = token_case(2, 3, 2, 5, 3, torch.float64)
    inputs = [t.requires_grad_() for t in (x, space, time)]
    assert torch.autograd.gradcheck(lambda *t: kernels.embed_tokens(*t, ids), inputs)


def test_tokens_far_into_memory(tmp_path):
    """Beyond 2**32 values: a sparse file, of which a few pages are read."""
    shape = (2, 1 << 26, 64)
    with open(tmp_path / "x", "wb") as file:
        file.truncate(4 * np.prod(shape, dtype=np.int64))
    x = torch.from_numpy(np.memmap(tmp_path / "x", np.float32, "r+", shape=shape))
    x[1, -1] = 7.0
    ids = torch.tensor([[0, 5], [(1 << 26) - 1, (1 << 26) - 1]])
    z = kernels.embed_tokens(x, torch.zeros(2, 1 << 16, 64), torch.ones(1 << 10, 64), ids)
    assert torch.equal(z[0], torch.ones(2, 64)) and torch.equal(z[1], torch.full((2, 64), 8.0))


def test_tokens_that_are_not_there_are_named():
    x, space, time, ids = token_case(2, 3, 4, 7, 16)
    for wrong in (-1, 12):
        with pytest.raises(IndexError, match=f"token {wrong} of 12"):
            kernels.embed_tokens(x, space, time, torch.full_like(ids, wrong))
    for wrong in ((x[:, :5], space, time, ids), (x, space[:1], time, ids), (x, space, time[:, :8], ids)):
        with pytest.raises(ValueError):
            kernels.embed_tokens(*wrong)


# ----------------------------------------------------------------------------
# moving average


@pytest.mark.parametrize("teacher", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("momentum", [0.996, 0.0, 1.0, 0.3])
def test_ema(teacher, student, momentum):
    shapes = [(), (0,), (1,), (17,), (4099,), (33, 7)]
    t = [torch.randn(s).to(teacher) for s in shapes]
    s = [torch.randn(shape).to(student) for shape in shapes]
    before, copies = [x.clone() for x in t], [torch.empty(x.shape, dtype=torch.bfloat16) for x in t]
    kernels.ema_(t, s, momentum, copies)
    for now, then, new, c in zip(t, before, s, copies, strict=True):
        close(now, momentum * then.double() + (1 - momentum) * new.to(teacher).double(), ROUNDING[teacher])
        assert torch.equal(c, now.bfloat16())


def test_a_teacher_that_moved_before_its_backward_pass_is_an_error():
    teacher, x = torch.randn(5), torch.randn(5, requires_grad=True)
    for moved, copies in (([teacher], None), ([torch.randn(5)], [teacher])):
        y = (teacher * x).sum()
        kernels.ema_(moved, [torch.randn(5)], 0.9, copies)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_ema_of_any_strides_and_nan():
    t, s = torch.randn(6, 8), torch.randn(6, 8)
    s[2, 3] = torch.nan
    expected = t.lerp(s, 0.1)
    turned = t.T.contiguous().T
    kernels.ema_([turned], [s], 0.9)
    assert torch.equal(turned.isnan(), s.isnan())
    torch.testing.assert_close(turned, expected, equal_nan=True)
    with pytest.raises((ValueError, RuntimeError)):
        kernels.ema_([t], [s, s], 0.9)


# ----------------------------------------------------------------------------
# streaming filter


@pytest.mark.parametrize("C, T", [(1, 1), (21, 257), (7, 33), (13, 32), (129, 64), (0, 5), (5, 0)])
def test_filter_is_scipys_bit_for_bit(C, T):
    x_CT, zi_SC2 = np.random.default_rng(0).normal(size=(C, T)), np.random.default_rng(1).normal(size=(len(SOS), C, 2))
    y_CT, zf_SC2 = scipy.signal.sosfilt(SOS, x_CT, axis=1, zi=zi_SC2) if x_CT.size else (x_CT, zi_SC2)
    state = torch.from_numpy(zi_SC2.swapaxes(1, 2).copy())
    assert np.array_equal(kernels.sos_stream(torch.from_numpy(x_CT), torch.from_numpy(SOS), state).numpy(), y_CT)
    assert np.array_equal(state.numpy(), zf_SC2.swapaxes(1, 2))
    sections = plain.Sections(SOS, zi_SC2.swapaxes(1, 2))
    assert np.array_equal(sections(x_CT), y_CT) and np.array_equal(sections.state_S2C, zf_SC2.swapaxes(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_is_the_same_however_the_signal_is_cut(dtype):
    x_CT = torch.randn(9, 200, dtype=dtype)
    state = torch.zeros(len(SOS), 2, 9, dtype=torch.float64)
    whole = kernels.sos_stream(x_CT, torch.from_numpy(SOS), state.clone())
    assert whole.dtype == dtype
    for sizes in ([1] * 200, [8] * 25, [0, 32, 7, 161], [33, 31, 136]):
        z = state.clone()
        parts = [kernels.sos_stream(x, torch.from_numpy(SOS), z) for x in x_CT.split(sizes, 1)]
        assert torch.equal(torch.cat(parts, 1), whole)


def test_filter_as_one_linear_map():
    x_CT, state = torch.randn(4, 12, dtype=torch.float64), torch.randn(len(SOS), 2, 4, dtype=torch.float64)
    both = reference.sos_block(torch.from_numpy(SOS), 12) @ torch.cat([x_CT.T, state.flatten(0, 1)])
    y_CT = kernels.sos_stream(x_CT, torch.from_numpy(SOS), state)
    close(y_CT.T, both[:12], 1e-12)
    close(state.flatten(0, 1), both[12:], 1e-12)


def test_filter_keeps_a_nan_in_its_channel():
    x_CT = torch.randn(9, 40)
    x_CT[3, 10] = torch.nan
    y_CT = kernels.sos_stream(x_CT, torch.from_numpy(SOS), torch.zeros(len(SOS), 2, 9, dtype=torch.float64))
    assert y_CT[3, 10:].isnan().all() and y_CT.isnan().sum() == 30


def test_a_state_that_moved_before_its_backward_pass_is_an_error():
    state, x = torch.zeros(len(SOS), 2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = (state * x).sum()
    kernels.sos_stream(torch.randn(3, 8), torch.from_numpy(SOS), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_filter_that_cannot_be_is_refused():
    x, sos, state = torch.zeros(3, 5), torch.from_numpy(SOS), torch.zeros(len(SOS), 2, 3, dtype=torch.float64)
    for wrong in ((x[0], sos, state), (x, sos[:2], state), (x, sos, state[..., :2]), (x, sos[:, :5], state)):
        with pytest.raises(ValueError):
            kernels.sos_stream(*wrong)
    with pytest.raises(ValueError, match="no gradients"):
        kernels.sos_stream(x.clone().requires_grad_(), sos, state)
    for wrong in ((x.half(), sos, state), (x, sos.float(), state), (x, sos, state.float())):
        with pytest.raises(TypeError):
            kernels.sos_stream(*wrong)
    for wrong in ((SOS[:, :5], state), (SOS, state[:2]), (SOS * 2, state), (SOS[:0], state[:0])):
        with pytest.raises(ValueError):
            plain.Sections(np.asarray(wrong[0]), wrong[1].numpy())
    with pytest.raises(ValueError, match="2 channels, not 3"):
        plain.Sections(SOS, state.numpy())(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="state is"):
        plain.Sections(SOS, state.numpy()).state_S2C = np.zeros((len(SOS), 2, 2))


def test_sections_take_another_state():
    x_CT = np.random.default_rng(0).normal(size=(3, 40))
    sections = plain.Sections(SOS, np.zeros((len(SOS), 2, 3)))
    first, state_S2C = sections(x_CT), sections.state_S2C.copy()
    second = sections(x_CT)
    sections.state_S2C = np.zeros((len(SOS), 2, 3))
    assert np.array_equal(sections(x_CT), first)
    sections.state_S2C = state_S2C
    assert np.array_equal(sections(x_CT), second)


def test_filter_without_pythons_headers(tmp_path, monkeypatch):
    if plain.library() is None:
        pytest.skip("no g++")
    if build.python_flags():
        assert hasattr(plain.library(), "PyInit__plain") and isinstance(
            plain.filter_of(plain.library()), BuiltinFunctionType
        )
    monkeypatch.setattr(build, "python_flags", list)
    monkeypatch.setattr(
        build, "sources", lambda kind: [build.FOLDERS[kind] / f"{name}.cpp" for name in ("filter", "python")]
    )
    build.compile_to(tmp_path / "plain.so", "plain", build.compiler())
    monkeypatch.setattr(build, "build", lambda kind, say: tmp_path / "plain.so")
    monkeypatch.setattr(plain, "_loaded", [])
    assert not hasattr(plain.library(), "PyInit__plain")
    for C, T in ((21, 33), (3, 1), (5, 0)):
        test_filter_is_scipys_bit_for_bit(C, T)


def test_what_the_filter_of_python_refuses():
    call = plain.filter_of(plain.library()) if plain.library() else None
    if not isinstance(call, BuiltinFunctionType):
        pytest.skip("the library was compiled without Python's headers")
    x_CT, sections = np.zeros((3, 5)), plain.Sections(SOS, np.zeros((len(SOS), 2, 3)))
    for wrong, error in (((x_CT, x_CT), TypeError), ((x_CT, x_CT, 0), ValueError), ((x_CT, x_CT, "a"), TypeError)):
        with pytest.raises(error):
            call(*wrong)
    for x, y in ((1, x_CT), (x_CT, x_CT[:, ::2]), (x_CT.T, x_CT), (x_CT, b"unwritable")):
        with pytest.raises((TypeError, ValueError, BufferError)):
            call(x, y, sections._at)
    assert not sections.state_S2C.any()


def test_a_live_chunk_of_no_samples_leaves_the_last_one():
    if plain.library() is None:
        pytest.skip("no g++")
    last_C, raw_TC, y_TC = np.full(2, 7.0), np.zeros((4, 2), np.float32), np.full((5, 2), 123.0)
    sections = plain.Sections(SOS, np.zeros((len(SOS), 2, 2)))
    live = plain.Live(sections, 2, None, 1.0, 1e9, last_C, 4)
    assert live.take(np.zeros((0, 2), np.float32), raw_TC.ctypes.data, y_TC[1:].ctypes.data)
    assert (last_C == 7).all() and not sections.state_S2C.any()


def test_sections_of_many_threads():
    x_CT = np.random.default_rng(0).normal(size=(21, 2000))  # long: other threads run meanwhile
    expected = plain.Sections(SOS, np.zeros((len(SOS), 2, 21)))(x_CT)

    def feed(_) -> bool:
        sections = plain.Sections(SOS, np.zeros((len(SOS), 2, 21)))
        parts = [sections(part) for part in np.split(x_CT, [1, 9, 400, 1900], 1)]
        return np.array_equal(np.concatenate(parts, 1), expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(feed, range(64)))


def test_sections_are_copied_and_pickled_with_their_state(monkeypatch):
    x_CT = np.random.default_rng(0).normal(size=(3, 50))
    one = plain.Sections(SOS, np.zeros((len(SOS), 2, 3)))
    one(x_CT)
    others = [copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    expected = one(x_CT[:, ::2])  # strided, too
    assert all(np.array_equal(other(x_CT[:, ::2]), expected) for other in others)
    monkeypatch.setattr(plain, "_loaded", [None])
    without = plain.Sections(SOS, np.zeros((len(SOS), 2, 3)))
    without(x_CT)
    assert np.array_equal(without(x_CT[:, ::2]), expected)


# ----------------------------------------------------------------------------
# attention

# windows, heads, queries, keys, width: nothing, one, primes, a tile of queries and a block of keys, and one more than those
ATTENDED = [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (2, 2, 3, 4, 0), (1, 1, 1, 1, 1)]
ATTENDED += [(2, 3, 32, 256, 16), (2, 2, 33, 257, 32), (3, 2, 7, 19, 5), (1, 2, 70, 517, 64), (2, 4, 76, 76, 8)]


def attention_case(windows, heads, queries, keys, width, dtype=torch.float64, seed=0):
    """Queries, keys and values as a layer makes them, slices of one row of heads, and a gradient."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(windows, n, heads, width) for n in (queries, keys, keys, queries)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for s in shapes]


def real_keys(windows, keys, seed=0):
    real_BK = torch.rand(windows, keys, generator=torch.Generator().manual_seed(seed)) < 0.6
    real_BK[1:2] = False  # a window without any
    return real_BK


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("sizes", ATTENDED)
def test_attention_and_its_gradients(sizes, masked, dtype):
    *inputs, grad = attention_case(*sizes, dtype)
    real_BK = real_keys(sizes[0], sizes[3]) if masked else None
    leaves = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double() for t in inputs]
    y, (expected, level) = kernels.attend(*leaves, real_BK), reference.attend(*exact, real_BK)
    assert y.dtype == dtype and y.transpose(1, 2).is_contiguous()
    close(y, expected, ROUNDING[dtype])
    theirs = reference.attend_backward(grad.double(), *exact, real_BK, expected, level)
    for mine, meant in zip(torch.autograd.grad(y, leaves, grad), theirs, strict=True):
        assert mine.dtype == dtype
        close(mine, meant, 5 * ROUNDING[dtype])


@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
def test_attention_means_what_torchs_does(masked):
    inputs = [t.requires_grad_() for t in attention_case(3, 2, 9, 13, 6)[:3]]
    real_BK = real_keys(3, 13).index_fill(1, torch.tensor(0), True) if masked else None
    keys = real_BK[:, None, None] if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=keys)
    for found in (kernels.attend(*inputs, real_BK), reference.attend(*inputs, real_BK)[0]):
        torch.testing.assert_close(found, expected)
        for mine, theirs in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (found, expected)), strict=True):
            torch.testing.assert_close(mine, theirs)
        expected = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=keys)


def test_attention_passes_gradcheck():
    inputs = [t.detach().requires_grad_() for t in attention_case(2, 2, 5, 7, 3)[:3]]
    assert torch.autograd.gradcheck(lambda *t: kernels.attend(*t, real_keys(2, 7)), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_any_strides(dtype):
    q, k, v, grad = attention_case(3, 2, 9, 13, 6, dtype)

    def both(q, k, v, grad, real_BK):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        y = kernels.attend(*leaves, real_BK)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    real_BK = real_keys(3, 13)
    expected = both(*(t.contiguous() for t in (q, k, v, grad)), real_BK)
    shifted = [torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in (q, k, v, grad)]
    turned = [t.mT.contiguous().mT for t in (q, k, v, grad)]
    doubled = [torch.stack([t, t], 2)[:, :, 0] for t in (q, k, v, grad)]
    for inputs in ((q, k, v, grad), shifted, turned, doubled):
        wide_real = real_BK.mT.contiguous().mT
        assert all(torch.equal(a, b) for a, b in zip(both(*inputs, wide_real), expected, strict=True))
    ones = both(q, k, v, torch.ones(()).to(dtype).expand(grad.shape), real_BK)
    meant = both(q, k, v, torch.ones_like(grad), real_BK)
    assert all(torch.equal(a, b) for a, b in zip(ones, meant, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_with_keys_hidden_is_that_without_them(dtype):
    q, k, v, grad = attention_case(2, 2, 40, 300, 16, dtype)
    real_BK = (torch.rand(1, 300, generator=torch.Generator().manual_seed(3)) < 0.5).expand(2, -1)
    k[:, :, ~real_BK[0]], v[:, :, ~real_BK[0]] = torch.nan, torch.inf
    some = [q, k[:, :, real_BK[0]], v[:, :, real_BK[0]]]
    y, level = torch.ops.berger.attend(q, k, v, real_BK)
    close(y, kernels.attend(*some).double(), ROUNDING[dtype])
    grads = torch.ops.berger.attend_backward(grad, q, k, v, real_BK, y, level)
    meant = torch.ops.berger.attend_backward(grad, *some, None, y, level)
    close(grads[0], meant[0].double(), ROUNDING[dtype])
    for mine, theirs in zip(grads[1:], meant[1:], strict=True):
        close(mine[:, :, real_BK[0]], theirs.double(), ROUNDING[dtype])
        assert not mine[:, :, ~real_BK[0]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_large_and_far_scores(dtype):
    q, k, v, grad = attention_case(2, 2, 9, 300, 8, dtype)
    for factor in (1e4, 1e12):
        y, level = torch.ops.berger.attend(q * factor, k, v, None)
        best = (q.double() @ k.double().mT).argmax(3)[..., None].expand(-1, -1, -1, 8)
        assert torch.equal(y, v.gather(2, best))
        assert all(g.isfinite().all() for g in torch.ops.berger.attend_backward(grad, q * factor, k, v, None, y, level))


def test_attention_to_keys_at_minus_infinity():
    q, v = torch.ones(1, 1, 2, 1), torch.randn(1, 1, 700, 1)
    for hidden in (slice(0, 256), slice(256, 512), slice(100, 690), slice(0, 700)):  # whole blocks of keys, too; all
        k = torch.zeros(1, 1, 700, 1)
        k[:, :, hidden] = -torch.inf
        y, level = torch.ops.berger.attend(q, k, v, None)
        for mine, theirs in zip((y, level), reference.attend(q.double(), k.double(), v.double()), strict=True):
            close(mine, theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", range(3))
def test_attention_keeps_a_nan_within_its_head(which, dtype):
    inputs = attention_case(2, 2, 40, 300, 8, dtype)[:3]
    expected = kernels.attend(*inputs)
    inputs[which][1, 0, 5, 2] = torch.nan
    y = kernels.attend(*inputs)
    meant = reference.attend(*inputs)[0].isnan()
    assert torch.equal(y.isnan(), meant) and meant.any()
    assert torch.equal(y[0], expected[0]) and torch.equal(y[1, 1], expected[1, 1])


def test_attention_is_the_same_on_any_number_of_threads():
    q, k, v, grad = attention_case(20, 2, 70, 70, 16, torch.float32)
    real_BK = real_keys(20, 70)

    def both():
        y, level = torch.ops.berger.attend(q, k, v, real_BK)
        return [y, *torch.ops.berger.attend_backward(grad, q, k, v, real_BK, y, level)]

    same_on_three_threads(both)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(0, most) for most in (3, 3, 40, 300, 40))),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_attention(sizes, dtype, masked, seed):
    *inputs, grad = attention_case(*sizes, dtype, seed)
    real_BK = real_keys(sizes[0], sizes[3], seed) if masked else None
    exact = [t.double() for t in inputs]
    y, level = torch.ops.berger.attend(*inputs, real_BK)
    expected, exact_level = reference.attend(*exact, real_BK)
    close(y, expected, ROUNDING[dtype])
    ours = torch.ops.berger.attend_backward(grad, *inputs, real_BK, y, level)
    theirs = reference.attend_backward(grad.double(), *exact, real_BK, expected, exact_level)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 5 * ROUNDING[dtype])


# ----------------------------------------------------------------------------
# all of them


def test_opcheck():
    x, space, time, ids = token_case(2, 3, 4, 7, 16)
    leaves = [t.clone().requires_grad_() for t in (x, space, time)]
    opcheck(torch.ops.berger.embed_tokens.default, (*leaves, ids, False))
    opcheck(torch.ops.berger.embed_tokens.default, (reference.take(x, ids), *leaves[1:], ids, True))
    opcheck(torch.ops.berger.embed_tokens_backward.default, (torch.randn(2, 7, 16), ids, 3, 4, True, False, True))
    inputs = [t.clone().requires_grad_() for t in scan_case(2, 19, 5, 3, torch.float32)]
    opcheck(torch.ops.berger.selective_scan.default, (*inputs, 2))
    plain_inputs = [t.detach() for t in inputs]
    y = torch.ops.berger.selective_scan(*plain_inputs, 2)
    opcheck(torch.ops.berger.selective_scan_backward.default, (torch.randn_like(y), *plain_inputs, y, 2))
    state = torch.zeros(len(SOS), 2, 4, dtype=torch.float64)
    opcheck(torch.ops.berger.sos_stream.default, (torch.randn(4, 9), torch.from_numpy(SOS), state))
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, grad = attention_case(2, 2, 5, 7, 8, dtype)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        opcheck(torch.ops.berger.attend.default, (*leaves, None))
        opcheck(torch.ops.berger.attend.default, (*leaves, real_keys(2, 7)))
        kept = torch.ops.berger.attend(q, k, v, None)
        opcheck(torch.ops.berger.attend_backward.default, (grad, q, k, v, None, *kept))
    opcheck(torch.ops.berger.ema_.default, ([torch.randn(5)], [torch.randn(5)], 0.9, []))
    opcheck(torch.ops.berger.ema_.default, ([torch.randn(5)], [torch.randn(5)], 0.9, [torch.randn(5).bfloat16()]))


@pytest.mark.parametrize("name", ["embed_tokens", "selective_scan", "attend"])
def test_second_gradients_are_refused_where_the_meaning_has_them(name):
    x, space, time, ids = token_case(2, 3, 4, 7, 16)
    inputs, rest = {
        "embed_tokens": ([x, space, time], (ids,)),
        "selective_scan": (scan_case(2, 9, 5, 3, torch.float32), (2,)),
        "attend": (attention_case(2, 2, 5, 7, 3)[:3], ()),
    }[name]
    leaves = [t.clone().requires_grad_() for t in inputs]

    def second(package):
        y = getattr(package, name)(*leaves, *rest)
        y = (y[0] if isinstance(y, tuple) else y).square().sum()
        first = torch.autograd.grad(y, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    assert all(g.any() for g in second(reference))
    with pytest.raises(RuntimeError, match="kernels.reference"):
        second(kernels)


@pytest.mark.parametrize("name", ["embed_tokens", "selective_scan", "sos_stream", "attend"])
def test_forward_mode_gradients_are_refused_where_the_meaning_has_them(name):
    x, space, time, ids = token_case(2, 3, 4, 7, 16)
    state = torch.zeros(len(SOS), 2, 3, dtype=torch.float64)
    inputs, rest = {
        "embed_tokens": ((x, space, time), (ids,)),
        "selective_scan": (tuple(scan_case(2, 9, 5, 3)), (2,)),
        "sos_stream": ((torch.randn(3, 9).double(),), (torch.from_numpy(SOS), state)),
        "attend": (tuple(attention_case(2, 2, 5, 7, 3)[:3]), ()),
    }[name]
    if name != "sos_stream":  # whose meaning writes to its state
        tangent = torch.func.jvp(lambda *xs: getattr(reference, name)(*xs, *rest), inputs, inputs)[1]
        assert (tangent[0] if name == "attend" else tangent).any()
    with pytest.raises(RuntimeError, match="no forward-mode gradients"):
        torch.func.jvp(lambda *xs: getattr(kernels, name)(*xs, *rest), inputs, inputs)


def test_torch_compile_takes_them_whole():
    inputs = [t.clone().requires_grad_() for t in scan_case(2, 19, 6, 3, torch.float32)]
    x, space, time, ids = token_case(2, 3, 4, 7, 16)

    def work(u, fade, b, c, x):
        z = kernels.embed_tokens(x, space, time, ids)
        heads = z.unflatten(2, (2, 8)).transpose(1, 2)
        z = z + kernels.attend(heads, heads, heads).transpose(1, 2).flatten(2)
        return kernels.selective_scan(u, fade, b, c, 3).sin().sum() + z.square().sum()

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    results = []
    for function in (work, compiled):
        x_leaf = x.clone().requires_grad_()
        value = function(*inputs, x_leaf)
        results.append([value.detach(), *torch.autograd.grad(value, [*inputs, x_leaf])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(0, most) for most in (3, 50, 40, 20))),
    share=st.floats(0, 1),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_scan(sizes, share, double, seed):
    inputs = scan_case(*sizes, torch.float64 if double else torch.float32, seed)
    ahead = round(share * sizes[2])
    exact = [t.double() for t in inputs]
    y = kernels.selective_scan(*inputs, ahead)
    close(y, reference.selective_scan(*exact, ahead), 1e-12 if double else 5e-6)
    if y.numel() and sizes[3]:
        g = torch.randn(y.shape, dtype=y.dtype)
        ours = torch.ops.berger.selective_scan_backward(g, *inputs, y, ahead)
        theirs = reference.selective_scan_backward(g.double(), *exact, None, ahead)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-11 if double else 2e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(C=st.integers(1, 40), T=st.integers(0, 80), S=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_filter(C, T, S, seed):
    rng = np.random.default_rng(seed)
    sos = np.concatenate([rng.normal(size=(S, 3)), np.ones((S, 1)), rng.uniform(-0.4, 0.4, (S, 2))], 1)
    sos[::2, 2] = sos[::2, 0]  # sections that are even take a way of their own
    x_CT, state = rng.normal(size=(C, T)), rng.normal(size=(S, 2, C))
    theirs, ours = torch.from_numpy(state.copy()), torch.from_numpy(state.copy())
    expected = reference.sos_stream(torch.from_numpy(x_CT), torch.from_numpy(sos), theirs)
    assert torch.equal(kernels.sos_stream(torch.from_numpy(x_CT), torch.from_numpy(sos), ours), expected)
    assert torch.equal(ours, theirs)


def test_many_python_threads_at_once():
    inputs, sos = scan_case(40, 33, 20, 5, torch.float32), torch.from_numpy(SOS)
    x_CT, tokens = torch.randn(21, 500), token_case(4, 5, 4, 11, 64)
    heads = attention_case(4, 2, 40, 70, 16, torch.float32)[:3]

    def work():
        t = [torch.zeros(3000)]
        kernels.ema_(t, [torch.ones(3000)], 0.5)
        state = torch.zeros(len(SOS), 2, 21, dtype=torch.float64)
        return (
            kernels.selective_scan(*inputs),
            kernels.sos_stream(x_CT, sos, state),
            kernels.embed_tokens(*tokens),
            kernels.attend(*heads),
            t[0],
        )

    expected, same = work(), []

    def repeat():
        for _ in range(5):
            same.extend(torch.equal(a, b) for a, b in zip(work(), expected, strict=True))

    threads = [threading.Thread(target=repeat) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 200


CHECKED = "scan_and or attention_and or far_scores or strides or fades or nan or tokens_and or mix or ema or bit_for_bit or cut or test_any_ or equals_its or every_map or compiled_path"
UNDER_SANITIZERS = """
import sys
from pathlib import Path
import pytest
from kernels import build
found = {kind: Path(sys.argv[1]) / f"{kind}.so" for kind in build.FOLDERS}
build.library = found.__getitem__
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", sys.argv[2], "tests/test_operators.py", "tests/test_kernels.py",
                      "tests/test_intake.py"]))
"""


def run(*arguments: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
@pytest.mark.parametrize("which", ["generic", "avx2"])
def test_older_processors(which):
    if which not in kernels.path() and not (which == "generic" or "avx512" in kernels.path()):
        pytest.skip(f"{kernels.path()} is what runs here")
    some = "case11-dtype or any_ or bit_for_bit or (tokens_and and sizes2) or (attention and not gradcheck)"
    done = run("-m", "pytest", "-q", "-s", __file__, "-k", some, BERGER_KERNELS=which)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
    assert f"kernels: C++, {which}" in done.stderr


@pytest.mark.slow
def test_without_kernels_the_operators_mean_the_same():
    some = "tokens_and or attention_and or hidden or cut or compile or case7-dtype"
    done = run("-m", "pytest", "-q", __file__, "-k", some, BERGER_KERNELS="0")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


@pytest.mark.slow
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    gxx = build.compiler()
    if gxx is None or "clang" in gxx:
        pytest.skip("no g++")
    extra = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
    for kind in build.FOLDERS:
        build.compile_to(tmp_path / f"{kind}.so", kind, gxx, extra)
    runtime = [
        subprocess.run([gxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    env = {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    done = run("-c", UNDER_SANITIZERS, str(tmp_path), CHECKED, **env)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
