"""
Filter and scan in CUDA C++: compiled by nvcc when first wanted, called with tensors' pointers on the current stream.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from kernels import build, reference

FOLDER = build.HERE / "csrc" / "cuda"
ARCHITECTURES = (80, 90, 100)
Q = 32  # samples of a filter's block


def compile_to(target: Path, nvcc: str, architectures: tuple[int, ...] = ARCHITECTURES) -> str:
    """Compiles csrc/cuda into a library; returns what ptxas says of registers and spills. Raises build.BuildFailed."""
    half = target.with_suffix(f".{os.getpid()}.tmp")
    command = [nvcc, "-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-o", str(half)]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    done = subprocess.run([*command, *map(str, sorted(FOLDER.glob("*.cu")))], capture_output=True, text=True)
    if done.returncode:
        half.unlink(missing_ok=True)
        raise build.BuildFailed(
            f"nvcc failed: {next((x for x in done.stderr.splitlines() if 'error' in x), 'no message')}"
        )
    os.replace(half, target)
    return done.stderr


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled library. Raises build.BuildFailed or OSError."""
    text = repr([p.read_text() for p in sorted(FOLDER.iterdir())] + [ARCHITECTURES])
    target = build.HERE / f"_cuda-{hashlib.sha256(text.encode()).hexdigest()[:12]}.so"
    if not target.exists():
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise build.BuildFailed("there is no nvcc")
        compile_to(target, nvcc)
    return ctypes.CDLL(str(target))


def _call(name: str, device: torch.device, *arguments) -> None:
    """One of the library's functions: tensors as pointers, the rest as int64, last the stream."""
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in arguments]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    code = getattr(library(), name)(*pointers, ctypes.c_void_p(stream))
    if code:
        raise RuntimeError(f"{name}: CUDA error {code}")


@lru_cache(maxsize=32)
def _block(sos: tuple, steps: int, device: torch.device) -> torch.Tensor:
    return reference.sos_block(torch.tensor(sos, dtype=torch.float64), steps).to(device)


def sos_stream(x_CT: torch.Tensor, sos_S6: torch.Tensor, state_S2C: torch.Tensor) -> torch.Tensor:
    (C, T), S = x_CT.shape, len(sos_S6)
    x, y, state = x_CT.contiguous(), torch.empty(C, T, dtype=x_CT.dtype, device=x_CT.device), state_S2C.contiguous()
    if y.numel():
        sos, q = tuple(map(tuple, sos_S6.tolist())), min(Q, T)
        whole, rest = _block(sos, q, x.device), _block(sos, T % q or q, x.device)
        _call("berger_sos_stream", x.device, x, y, state, C, T, whole, q, rest, S, x.dtype == torch.float64)
        if state is not state_S2C:
            state_S2C.copy_(state)
    return y


def selective_scan(u_RLE, fade_RLE, b_RLS, c_RLS, ahead):
    (R, L, E), S = u_RLE.shape, b_RLS.shape[2]
    if S > 64:
        return reference.selective_scan(u_RLE, fade_RLE, b_RLS, c_RLS, ahead)
    inputs, y_RLE = [t.contiguous() for t in (u_RLE, fade_RLE, b_RLS, c_RLS)], u_RLE.new_empty(R, L, E)
    if y_RLE.numel():
        _call(f"berger_scan_{_format(u_RLE)}", u_RLE.device, *inputs, y_RLE, R, L, E, S, ahead)
    return y_RLE


def selective_scan_backward(grad_RLE, u_RLE, fade_RLE, b_RLS, c_RLS, y_RLE, ahead):
    (R, L, E), S = u_RLE.shape, b_RLS.shape[2]
    if S > 64:
        return reference.selective_scan_backward(grad_RLE, u_RLE, fade_RLE, b_RLS, c_RLS, y_RLE, ahead)
    inputs = [t.contiguous() for t in (grad_RLE, u_RLE, fade_RLE, b_RLS, c_RLS, y_RLE)]
    grads = [u_RLE.new_empty(R, L, E), u_RLE.new_empty(R, L, E), b_RLS.new_zeros(R, L, S), b_RLS.new_zeros(R, L, S)]
    if u_RLE.numel():
        _call(f"berger_scan_backward_{_format(u_RLE)}", u_RLE.device, *inputs, *grads, R, L, E, S, ahead)
    return tuple(grads)


def _format(x: torch.Tensor) -> str:
    return {torch.float32: "float", torch.float64: "double"}[x.dtype]
