"""
Fast operations, each beside its plain-PyTorch meaning (kernels/reference.py).

The C++ is compiled on first use (kernels/build.py). Without a compiler, or with BERGER_KERNELS=0, the meaning itself runs; one
line on stderr says which. Operators are registered under torch.ops.berger, because `kernels` is also a package on PyPI.
"""

import os
import sys
import threading

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
    from kernels import build  # not needed where kernels are switched off

    if os.environ.get("BERGER_KERNELS") == "0":
        _say("plain PyTorch, because BERGER_KERNELS=0")
        return "reference"
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
    if out is None:
        out = torch.empty(*map_BC.shape, samples, dtype=dtype)
    wanted = {"fds": (fds_B, torch.int64), "offsets": (offsets_B, torch.int64), "map": (map_BC, torch.int32)}
    wanted |= {"file_channels": (file_channels_B, torch.int64), "out": (out, out.dtype)}
    wanted |= {"gain": (gain_BC, torch.float32), "bias": (bias_BC, torch.float32)}
    for name, (x, kind) in wanted.items():
        if x is not None and (x.dtype != kind or x.device.type != "cpu"):
            raise TypeError(f"{name} must be {kind} on the CPU, not {x.dtype} on {x.device}")
    if out.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"windows come as float32 or bfloat16, not {out.dtype}")
    if map_BC.ndim != 2 or any(x.shape != map_BC.shape for x in (gain_BC, bias_BC) if x is not None):
        raise ValueError(f"map, gain and bias must be B x C alike, not {[tuple(x.shape) for x in (map_BC, gain_BC, bias_BC) if x is not None]}")
    if any(x.shape != map_BC.shape[:1] for x in (fds_B, offsets_B, file_channels_B)):
        raise ValueError(f"fds, offsets and file_channels must have one entry for each of the {len(map_BC)} windows")
    if out.shape != (*map_BC.shape, samples) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and {(*map_BC.shape, samples)}, not {tuple(out.shape)}")
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
