"""
Fast operations, each beside its plain-PyTorch meaning (kernels/reference.py).

The C++ is compiled on first use (kernels/build.py). Without a compiler, or with BERGER_KERNELS=0, the meaning itself runs; one
line on stderr says which. BERGER_KERNELS=generic keeps the C++ from using AVX2. Operators are registered under torch.ops.berger, because `kernels` is also a package on PyPI.
"""

import os
import sys
import threading

import numpy as np
import torch

from kernels import reference
from kernels.reference import UnreadableWindow

_lock = threading.Lock()
_path: str | None = None


def path() -> str:
    """Which implementation runs: "c++ (avx2)", "c++ (generic)" or "reference"; the first call may compile."""
    global _path
    if _path is None:
        with _lock:
            if _path is None:
                _path = _load()
    return _path


def _load() -> str:
    if os.environ.get("BERGER_KERNELS") == "0":
        _say("plain PyTorch, because BERGER_KERNELS=0")
        return "reference"

    from kernels import build  # here, because a script that reads nothing needs none of it

    try:
        torch.ops.load_library(build.build(_say))
    except (build.BuildFailed, OSError) as e:  # OSError: a library that this system can't load
        _say(f"plain PyTorch, slower, because {e}")
        return "reference"
    processor = torch.ops.berger.processor_path()
    _say(f"C++, {processor}")
    return f"c++ ({processor})"


def _say(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"kernels: {line}", file=sys.stderr, flush=True)


def gather_windows(
    fds_B: torch.Tensor,
    offsets_B: torch.Tensor,
    file_channels_B: torch.Tensor,
    map_BC: torch.Tensor,
    gain_BC: torch.Tensor | None,
    bias_BC: torch.Tensor | None,
    samples: int,
    clip: float = float("inf"),
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Reads B windows of `samples` steps out of time-major float16 files as x_BCT, float32 or bfloat16 (out's dtype, if given).

    Window b starts at byte offsets_B[b] of the open file fds_B[b], which has file_channels_B[b] channels (all three int64).
    Its channel c is channel map_BC[b, c] (int32) of the file, and its values are clamp(x, -clip, clip) * gain_BC + bias_BC,
    each step rounded to float32, then rounded to dtype; where the map is -1 they are zero, whatever gain and bias are. NaN
    stays NaN; an infinity becomes the clip, or stays one if clip is infinite. Gain and bias are float32; None is one and zero.

    Runs without the GIL on at most torch.get_num_threads() threads. Windows in the page cache come first; the disk reads of all
    others are under way by then. Raises UnreadableWindow, naming the window, on a failed or short read (out is then undefined),
    TypeError for a wrong dtype or device, and ValueError for a wrong shape, channel, offset or clip.
    """
    shape, dtype = (*map_BC.shape, samples), dtype if out is None else out.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"windows come as float32 or bfloat16, not {dtype}")
    if out is None:  # NumPy asks for huge pages, torch doesn't: page faults would take longer than the reading
        out = torch.from_numpy(np.empty(shape, np.float32 if dtype == torch.float32 else np.int16)).view(dtype)
    int64, int32, float32 = torch.int64, torch.int32, torch.float32
    kinds = (("fds", fds_B, int64), ("offsets", offsets_B, int64), ("file_channels", file_channels_B, int64))
    kinds += (("map", map_BC, int32), ("gain", gain_BC, float32), ("bias", bias_BC, float32), ("out", out, dtype))
    for name, x, kind in kinds:
        if x is not None and (x.dtype != kind or not x.is_cpu):
            raise TypeError(f"{name} must be {kind} on the CPU, not {x.dtype} on {x.device}")
    for name, x in (("map", map_BC), ("gain", gain_BC), ("bias", bias_BC)):
        if x is not None and (x.ndim != 2 or x.shape != shape[:2]):
            raise ValueError(f"{name} must be B x C, {shape[:-1]}, not {tuple(x.shape)}")
    for name, x in (("fds", fds_B), ("offsets", offsets_B), ("file_channels", file_channels_B)):
        if x.shape != shape[:1]:
            raise ValueError(f"{name} must have one entry for each of the {shape[0]} windows, not {tuple(x.shape)}")
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and {shape}, not {tuple(out.shape)}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, not {clip}")

    if path() == "reference":
        reference.gather_windows(fds_B, offsets_B, file_channels_B, map_BC, gain_BC, bias_BC, clip, out)
        return out
    status = torch.ops.berger.gather_windows(fds_B, offsets_B, file_channels_B, map_BC, gain_BC, bias_BC, clip, out)
    window, code, got_bytes = status.tolist()
    if window >= 0:
        raise UnreadableWindow(window, code, got_bytes, 2 * samples * int(file_channels_B[window]))
    return out
