"""
kernels/triton_*.py against float64 and published references: in Triton's interpreter on the CPU, and compiled where there is a GPU.

What is interpreted runs in a process of its own (test_in_the_interpreter), since Triton asks for that before it is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch

from kernels import reference

pytest.importorskip("triton", reason="no Triton here: pip install triton (Linux)")

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, which TRITON_INTERPRET=1 keeps Triton from")


def test_in_the_interpreter():
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout, done.stdout


@pytest.fixture(params=["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Where the kernels run: in the interpreter's process only there."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA; test_in_the_interpreter runs this without")
    return request.param


def assert_near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, beside: float = 0.0) -> None:
    """Equal up to rounding of the largest value, or of what is `beside` it in its sum; same shape and dtype, NaN at the same places."""
    assert found.dtype == dtype and found.shape == wanted.shape
    found, wanted = found.double().cpu(), wanted.double().cpu()
    largest = wanted.nan_to_num().abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[dtype] * max(largest, beside), equal_nan=True)


# ----------------------------------------------------------------------------
# tokens

TOKENS = [(1, 1, 1, 1, 1), (2, 3, 4, 7, 13), (3, 5, 3, 11, 130), (2, 5, 3, 0, 8), (0, 2, 2, 2, 2), (1, 2, 3, 7, 1031)]
FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def token_inputs(B, C, P, K, D, dtype, device, taken=False):
    """x, codes and ids, which repeat."""
    generator = torch.Generator().manual_seed(B + K + D)
    shapes = ((B, K if taken else C * P, D), (B, C, D), (P, D))
    values = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    return *values, torch.randint(C * P, (B, K), generator=generator).to(device)


@pytest.mark.parametrize("sizes", TOKENS)
@pytest.mark.parametrize("taken", [False, True])
def test_embed_tokens(device, sizes, taken):
    from kernels.triton_tokens import embed_tokens

    for dtype in FORMATS[: 4 if sizes == TOKENS[1] else 1]:
        *values, ids_BK = token_inputs(*sizes, dtype, device, taken)
        wanted = reference.embed_tokens(*(x.double() for x in values), ids_BK, taken)
        assert_near(embed_tokens(*values, ids_BK, taken), wanted, dtype)


def test_embed_tokens_of_any_layout_and_mixed_formats(device):
    from kernels.triton_tokens import embed_tokens

    x_BKD, space_BCD, time_PD, ids_BK = token_inputs(2, 3, 4, 7, 13, torch.float32, device, taken=True)
    for x in (x_BKD[0, 0].expand(2, 7, 13), x_BKD.mT.contiguous().mT, x_BKD.repeat(1, 1, 2)[:, :, ::2], x_BKD.half()):
        codes = (space_BCD.transpose(0, 1).contiguous().transpose(0, 1), time_PD.mT.contiguous().mT)
        wanted = reference.embed_tokens(*(t.double() for t in (x, *codes)), ids_BK, True)
        assert_near(embed_tokens(x, *codes, ids_BK.mT.contiguous().mT, True), wanted, torch.float32)


def test_embed_tokens_beyond_two_billion_elements(device):
    from kernels.triton_tokens import embed_tokens

    far = torch.empty(2**31 + 8, dtype=torch.float16, device=device)  # of which two rows are ever touched
    x_BND = far.as_strided((1, 2, 8), (0, 2**31, 1))
    x_BND.copy_(torch.arange(16).view(1, 2, 8))
    zeros = torch.zeros(1, 2, 8, device=device)
    z_BKD = embed_tokens(x_BND, zeros, zeros[0, :1], torch.tensor([[1, 0, 1]], device=device), False)
    assert z_BKD[0, :, 0].tolist() == [8, 0, 8]


@pytest.mark.parametrize("sizes", TOKENS)
def test_embed_tokens_backward(device, sizes):
    from kernels.triton_tokens import embed_tokens_backward

    B, C, P, K, D = sizes
    for dtype in FORMATS[: 4 if sizes == TOKENS[1] else 1]:
        *values, ids_BK = token_inputs(*sizes, dtype, device)
        grad_BKD = torch.randn(D, B, K, device=device).to(dtype).permute(1, 2, 0)
        leaves = [x.double().requires_grad_() for x in values]
        wanted = torch.autograd.grad(reference.embed_tokens(*leaves, ids_BK), leaves, grad_BKD.double())
        for found, gradient in zip(
            embed_tokens_backward(grad_BKD, ids_BK, C, P, True, True, True), wanted, strict=True
        ):
            assert_near(found, gradient, dtype)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, False)])
def test_embed_tokens_backward_gives_what_is_asked_for(device, needed):
    from kernels.triton_tokens import embed_tokens_backward

    *_, ids_BK = token_inputs(2, 3, 4, 7, 13, torch.float32, device)
    grad_BKD = torch.ones(1, 1, 1, device=device).expand(2, 7, 13)  # as of a sum: no stride at all
    wanted = reference.embed_tokens_backward(grad_BKD, ids_BK, 3, 4, *needed)
    for found, gradient in zip(embed_tokens_backward(grad_BKD, ids_BK, 3, 4, *needed), wanted, strict=True):
        assert_near(found, gradient, torch.float32)


def test_a_nan_stays_in_its_token(device):
    from kernels.triton_tokens import embed_tokens, embed_tokens_backward

    x_BND, space_BCD, time_PD, _ = token_inputs(1, 3, 2, 6, 5, torch.float32, device)
    x_BND[0, 2, 1] = torch.nan
    ids_BK = torch.arange(6, device=device)[None]
    found_BK = embed_tokens(x_BND, space_BCD, time_PD, ids_BK, False).isnan().any(2)
    assert found_BK[0].tolist() == [False, False, True, False, False, False]
    gx_BND, gspace_BCD, _ = embed_tokens_backward(x_BND, ids_BK, 3, 2, True, True, False)
    assert torch.equal(gx_BND, x_BND) or torch.equal(gx_BND.isnan(), x_BND.isnan())
    assert gspace_BCD.isnan().nonzero().tolist() == [[0, 1, 1]]


# ----------------------------------------------------------------------------
# moving average

PAIRS = [(torch.float32, torch.float32, None), (torch.float32, torch.bfloat16, torch.bfloat16)]
PAIRS += [(torch.float64, torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16, None)]


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_ema(device, formats, momentum):
    from kernels.triton_ema import ema_

    torch.manual_seed(0)
    master, weights, copied = formats
    shapes = [(0,), (), (1,), (4096,), (4097,), (13, 17), (2, 3, 5)]
    teacher = [torch.randn(s, device=device).to(master) for s in shapes]
    teacher += [torch.randn(7, 5, device=device).to(master).T, torch.randn(100, device=device).to(master)[1:]]
    student = [torch.randn(t.shape, device=device).to(weights) for t in teacher]
    student[3][7] = torch.nan
    copies = [] if copied is None else [torch.empty(t.shape, dtype=copied, device=device) for t in teacher]
    wanted = [t.double() for t in teacher]
    reference.ema_(wanted, student, momentum, [])
    ema_(teacher, student, momentum, copies)
    for i, (t, w) in enumerate(zip(teacher, wanted, strict=True)):
        assert_near(t, w, master)
        assert momentum in (0.3, 0.996) or torch.equal(t.nan_to_num(), w.to(master).nan_to_num())  # exact at both ends
        if copies:  # the interpreter rounds towards zero
            assert_near(copies[i], w, copied)


def test_ema_of_nothing(device):
    from kernels.triton_ema import ema_

    ema_([], [], 0.9, [])


def test_ema_follows_tensors_that_move(device):
    from kernels.triton_ema import ema_

    for _ in range(3):  # the table of addresses is kept from call to call
        teacher, student = [torch.zeros(5000, device=device)], [torch.ones(5000, device=device)]
        for _ in range(2):
            ema_(teacher, student, 0.5, [])
        assert (teacher[0] == 0.75).all()


# ----------------------------------------------------------------------------
# second-order sections


def sections(count: int) -> torch.Tensor:
    """A notch and a band-pass from 0.5 Hz on at 500 Hz, as lib/filters.py makes them, or the first sections thereof."""
    notches = [scipy.signal.tf2sos(*scipy.signal.iirnotch(f, 30, 500.0)) for f in (50, 100, 150, 200)]
    sos_S6 = np.concatenate([scipy.signal.butter(4, (0.5, 45), "bandpass", fs=500.0, output="sos"), *notches])
    return torch.from_numpy(sos_S6[:count])


@pytest.mark.parametrize("C, T, S", [(1, 1, 1), (3, 31, 6), (17, 32, 3), (5, 67, 2), (33, 3, 8), (2, 0, 4), (0, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sos_stream_is_scipys(device, C, T, S, dtype):
    from kernels.triton_sos import sos_stream

    x_CT = (torch.randn(C, T, generator=torch.Generator().manual_seed(T)) * 10 + 500).to(dtype)
    sos_S6, state_S2C = sections(S), torch.randn(S, 2, C, dtype=torch.float64)
    y_CT, after_SC2 = x_CT.numpy(), state_S2C.mT.numpy()
    if x_CT.numel():
        y_CT, after_SC2 = scipy.signal.sosfilt(sos_S6.numpy(), x_CT.double().numpy(), 1, np.array(after_SC2))
    state_S2C = state_S2C.to(device)
    found_CT = sos_stream(x_CT.to(device), sos_S6.to(device), state_S2C)
    torch.testing.assert_close(found_CT.cpu().double(), torch.from_numpy(y_CT).double(), rtol=1e-6, atol=1e-8)
    if dtype == torch.float64:
        assert_near(found_CT, torch.from_numpy(y_CT), dtype)
    assert_near(state_S2C, torch.from_numpy(np.array(after_SC2)).mT, torch.float64)


def test_sos_stream_is_the_same_however_cut(device):
    from kernels.triton_sos import sos_stream

    x_TC = torch.randn(75, 3, dtype=torch.float64, device=device)  # time-major in memory
    sos_S6 = sections(2).to(device)
    wanted_CT = reference.sos_stream(x_TC.T.cpu(), sections(2), torch.zeros(2, 2, 3, dtype=torch.float64))
    for cut in ([75], [1, 8, 33, 33], [64, 0, 11]):
        state_SC2 = torch.zeros(2, 3, 2, dtype=torch.float64, device=device)  # scipy's order, seen as ours
        y_CT = torch.cat([sos_stream(x_TC[part].T, sos_S6, state_SC2.mT) for part in torch.arange(75).split(cut)], 1)
        assert_near(y_CT, wanted_CT, torch.float64)


def test_a_nan_stays_in_its_channel(device):
    from kernels.triton_sos import sos_stream

    x_CT = torch.randn(3, 70, device=device)
    x_CT[1, 40] = torch.nan
    y_CT = sos_stream(x_CT, sections(2).to(device), torch.zeros(2, 2, 3, dtype=torch.float64, device=device))
    assert y_CT[1, :32].isfinite().all() and y_CT[1, 40:].isnan().all()  # 32 to 39 are of the NaN's block
    assert y_CT[[0, 2]].isfinite().all()


# ----------------------------------------------------------------------------
# selective scan

SCANS = [
    (2, 16, 10, 3, 5),
    (1, 1, 1, 1, 1),
    (2, 17, 64, 16, 32),
    (1, 32, 5, 2, 0),
    (2, 71, 33, 17, 12),
    (1, 37, 70, 5, 70),
]
SCANS += [(0, 4, 3, 2, 1), (2, 0, 3, 2, 1)]


def scan_inputs(R, L, E, S, dtype, device) -> list[torch.Tensor]:
    """u, fade, b and c as slices of one tensor; some fades above 4."""
    x_RLX = torch.randn(R, L, 2 * E + 2 * S, generator=torch.Generator().manual_seed(L + E)).to(device)
    x_RLX[..., E : 2 * E] = 2 * x_RLX[..., E : 2 * E].abs()
    return list(x_RLX.to(dtype).split((E, E, S, S), 2))


def check_scan(inputs: list[torch.Tensor], grad_RLE: torch.Tensor, ahead: int) -> None:
    """Both directions of differentiation against float64."""
    from kernels.triton_scan import selective_scan, selective_scan_backward

    leaves = [x.double().requires_grad_() for x in inputs]
    wanted_RLE = reference.selective_scan(*leaves, ahead)
    y_RLE = selective_scan(*inputs, ahead)
    assert_near(y_RLE, wanted_RLE.detach(), inputs[0].dtype)
    gradients, beside = [torch.zeros_like(x) for x in leaves], 0.0
    if wanted_RLE.numel():
        gradients = torch.autograd.grad(wanted_RLE, leaves, grad_RLE.double())
        beside = (
            (gradients[0] * leaves[0]).abs().sum(1).max().item()
        )  # the gradient of a fade is a difference of such sums
    found = selective_scan_backward(grad_RLE, *inputs, y_RLE, ahead)
    for i, (gradient, wanted, x) in enumerate(zip(found, gradients, inputs, strict=True)):
        assert_near(gradient, wanted, x.dtype, beside if i == 1 else 0.0)


@pytest.mark.parametrize("R, L, E, S, ahead", SCANS)
def test_selective_scan_and_its_gradients(device, R, L, E, S, ahead):
    for dtype in {16: FORMATS, 37: [torch.float64]}.get(L, [torch.float32]):
        grad_RLE = torch.randn(E, R, L, device=device).to(dtype).permute(1, 2, 0)
        check_scan(scan_inputs(R, L, E, S, dtype, device), grad_RLE, ahead)


@pytest.mark.parametrize("seed", range(3))
def test_selective_scan_of_random_sizes(device, seed):
    rng = np.random.default_rng(seed)
    R, L, E, S = (int(rng.integers(1, most)) for most in (4, 50, 40, 20))
    inputs = scan_inputs(R, L, E, S, torch.float32, device)
    check_scan(inputs, torch.randn(R, L, E, device=device), int(rng.integers(E + 1)))


def test_selective_scan_of_any_layout_and_mixed_formats(device):
    u, fade, b, c = scan_inputs(2, 9, 6, 3, torch.float32, device)
    inputs = [u.bfloat16(), fade.mT.contiguous().mT, b[:, :1].expand(2, 9, 3), c]
    check_scan(inputs, torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device).expand(2, 9, 6), 4)


@pytest.mark.filterwarnings("ignore:.*encountered in matmul")  # NumPy's, about products that are masked
@pytest.mark.parametrize("fade", [0.0, 4.0, 1e30])
def test_selective_scan_at_the_ends_of_fading(device, fade):
    u, fades, b, c = scan_inputs(1, 40, 4, 3, torch.float32, device)
    check_scan([u, torch.full_like(fades, fade), b, c], torch.ones_like(u), 2)


def test_a_nan_of_a_scan_stays_in_its_channel_and_comes_from_no_later_chunk(device):
    from kernels.triton_scan import selective_scan

    u, fade, b, c = (x.clone() for x in scan_inputs(1, 70, 4, 3, torch.float32, device))
    u[0, 40, 1] = u[0, 40, 3] = torch.nan
    y_LE = selective_scan(u, fade, b, c, 2)[0]
    assert y_LE[:, [0, 2]].isfinite().all()
    assert y_LE[:32, 1].isfinite().all() and y_LE[40:, 1].isnan().all()
    assert y_LE[64:, 3].isfinite().all() and y_LE[:41, 3].isnan().all()


# ----------------------------------------------------------------------------
# bytes and machine code


@pytest.fixture
def traffic(monkeypatch) -> list:
    """For each launch of an interpreted kernel its accesses to memory: (addresses, bytes of an element, whether it writes)."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launches, launch = [], GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(pointers, mask, writes: bool) -> None:
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        launches[-1].append((addresses, pointers.get_element_ty().primitive_bitwidth // 8, writes))

    def noted_launch(self, *args, **kwargs):
        launches.append([])
        return launch(self, *args, **kwargs)

    def noted_load(self, pointers, mask, *rest):
        note(pointers, mask, False)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note(pointers, mask, True)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", noted_launch)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    return launches


def distinct_bytes(launch: list) -> int:
    """What a launch must get from memory and bring there, with a cache that keeps what several programs read."""
    kinds = {(size, writes) for _, size, writes in launch}
    parts = {kind: np.concatenate([a for a, *its in launch if tuple(its) == kind]) for kind in kinds}
    return sum(len(np.unique(addresses)) * size for (size, _), addresses in parts.items())


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")
def test_bytes_are_those_stated(traffic):
    from kernels.triton_report import ema_cases, scan_cases, sos_cases, token_cases

    cases = [*token_cases(2, 3, 4, 5, 24), *ema_cases(1, 4096, 4100), *sos_cases(3, 7, 2), *sos_cases(5, 67, 1)]
    for case in (*cases, *scan_cases(2, 13, 8, 3), *scan_cases(1, 37, 8, 3)):
        traffic.clear()
        case.run()
        assert sum(map(distinct_bytes, traffic)) == case.bytes, case.name
        written = [np.concatenate([a for a, _, writes in launch if writes]) for launch in traffic]
        assert all(len(np.unique(addresses)) == len(addresses) for addresses in written), case.name


def check_report(cases: list, sm: int) -> None:
    from kernels.triton_report import report

    rows = list(report(cases, (sm,)))
    for row in rows:
        print(row)
        assert row["spilled"] == 0 and row["registers"] <= 255 and row["shared"] <= 48 << 10, row
    assert {row["op"] for row in rows} == {case.name for case in cases}


@compiled
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_compiles_for_gpus_that_are_not_here_without_spills(sm):
    from kernels.triton_report import real_cases

    check_report([case for case in real_cases() if "512 steps" not in case.name], sm)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_compiles_scans_of_many_chunks(sm):
    from kernels.triton_report import real_cases

    check_report([case for case in real_cases() if "512 steps" in case.name], sm)


@compiled
def test_a_thread_of_the_average_moves_16_bytes_at_once():
    from triton.backends.compiler import GPUTarget

    from kernels.triton_report import ema_cases, machine_code, recorded

    target = GPUTarget("cuda", 90, 32)
    with recorded(target) as launches:
        for case in ema_cases(8192):
            case.run()
    assert len(launches) == 2
    for kernel, how in launches:
        assert "ld.global.v4" in machine_code(kernel, how, target).asm["ptx"]


@compiled
def test_nothing_imports_triton_before_it_is_needed():
    code = "import sys, kernels, kernels.reference; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
