"""kernels/csrc/cuda without a GPU: run on CPU threads against the meaning, compiled by nvcc; with one, the operators themselves."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch

import kernels
from kernels import build, cuda_cpp, reference

SOS = torch.from_numpy(
    np.concatenate([scipy.signal.butter(n, (0.5, 45), "bandpass", fs=256, output="sos") for n in (4, 1)])
)


@pytest.fixture(scope="module")
def on_threads(tmp_path_factory):
    """The CUDA sources compiled for the CPU by tests/cuda_on_threads.h, in place of nvcc's library."""
    if build.compiler() is None:
        pytest.skip("no g++")
    library = tmp_path_factory.mktemp("cuda") / "cuda.so"
    shim = ["-include", str(Path(__file__).with_name("cuda_on_threads.h")), "-x", "c++", "-Wno-unknown-pragmas"]
    sources = map(str, sorted(cuda_cpp.FOLDER.glob("*.cu")))
    command = [
        build.compiler(),
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-pthread",
        *shim,
        *sources,
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_cpp, "library", lambda: ctypes.CDLL(str(library)))
        yield


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if expected.numel():
        assert (actual - expected).abs().max() <= tolerance * max(float(expected.abs().max()), 1.0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("C, T", [(1, 1), (3, 8), (2, 64), (2, 71), (0, 5), (5, 0)])
def test_filter(on_threads, C, T, dtype, tolerance):
    x_CT, state = torch.randn(C, T, dtype=dtype), torch.randn(len(SOS), 2, C, dtype=torch.float64)
    after = state.clone()
    y_CT = cuda_cpp.sos_stream(x_CT, SOS, state)
    close(y_CT, reference.sos_stream(x_CT, SOS, after), tolerance)
    close(state, after, 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "R, L, E, S, ahead",
    [(1, 1, 1, 1, 1), (2, 17, 7, 5, 3), (1, 9, 70, 17, 40), (0, 3, 2, 2, 1), (2, 0, 2, 2, 1), (2, 3, 2, 0, 1)],
)
def test_scan_and_its_gradients(on_threads, R, L, E, S, ahead, dtype, tolerance):
    u, b, c, g = (torch.randn(R, L, k, dtype=dtype) for k in (E, S, S, E))
    fade = 5 * torch.rand(R, L, E, dtype=dtype)
    y = cuda_cpp.selective_scan(u, fade, b, c, ahead)
    close(y, reference.selective_scan(u, fade, b, c, ahead), tolerance)
    ours = cuda_cpp.selective_scan_backward(g, u, fade, b, c, y, ahead)
    if R and L and S:
        for mine, theirs in zip(ours, reference.selective_scan_backward(g, u, fade, b, c, y, ahead), strict=True):
            close(mine, theirs, 4 * tolerance)


@pytest.mark.slow
def test_nvcc_compiles_them_without_spills(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    report = cuda_cpp.compile_to(tmp_path / "cuda.so", nvcc)
    assert (tmp_path / "cuda.so").exists()
    kernels_found = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    assert {arch for _, arch in kernels_found} == {"sm_80", "sm_90", "sm_100"}
    spills = re.findall(r"Function properties for (\w+)\n.*?(\d+) bytes spill stores", report)
    assert len(spills) == len(kernels_found)
    too_wide = "scan_backwardIdLi64E"  # 128 doubles a thread: 256 registers, one more than there are
    assert not [(name, n) for name, n in spills if n != "0" and too_wide not in name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("backend", ["", "cuda"])
def test_operators_on_a_gpu(monkeypatch, backend):
    from kernels import gpu

    monkeypatch.setenv("BERGER_KERNELS", backend)
    gpu.path.cache_clear()
    u, fade, b, c = (torch.rand(8, 40, k, device="cuda") for k in (20, 20, 16, 16))
    exact = [t.double().cpu() for t in (u, fade, b, c)]
    close(kernels.selective_scan(u, fade, b, c, 9).cpu().double(), reference.selective_scan(*exact, 9), 1e-5)
    x_CT, state = torch.randn(21, 100), torch.zeros(len(SOS), 2, 21, dtype=torch.float64)
    expected = reference.sos_stream(x_CT, SOS, state.clone())
    close(kernels.sos_stream(x_CT.cuda(), SOS.cuda(), state.cuda()).cpu(), expected, 1e-5)
    gpu.path.cache_clear()
