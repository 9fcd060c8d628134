"""
The operations on a GPU: Triton's (kernels/triton_*.py), or those of kernels/cuda_cpp.py with BERGER_KERNELS=cuda or without Triton.
"""

import importlib.util
import os
from functools import lru_cache

from kernels import reference
from kernels.plain import say

TRITON = {
    "embed_tokens": "triton_tokens",
    "embed_tokens_backward": "triton_tokens",
    "ema_": "triton_ema",
    "sos_stream": "triton_sos",
    "selective_scan": "triton_scan",
    "selective_scan_backward": "triton_scan",
}


@lru_cache(maxsize=1)
def path() -> str:
    """What runs on a GPU: "triton", "cuda c++" (filter and scan only, the rest is plain PyTorch) or "reference"; said once."""
    wanted, found = os.environ.get("BERGER_KERNELS"), "reference"
    if wanted == "0":
        say("plain PyTorch on the GPU, because BERGER_KERNELS=0")
        return found
    if wanted != "cuda" and importlib.util.find_spec("triton"):
        say("Triton on the GPU")
        return "triton"
    from kernels import build, cuda_cpp

    try:
        cuda_cpp.library()
        say("CUDA C++ on the GPU (filter and scan)")
        return "cuda c++"
    except (build.BuildFailed, OSError) as e:
        say(f"plain PyTorch on the GPU, slower, because {e}")
        return "reference"


def run(name: str, arguments: tuple):
    """One of the operators, by what `path` says."""
    found = path()
    if found == "triton":
        return getattr(importlib.import_module(f"kernels.{TRITON[name]}"), name)(*arguments)
    if found == "cuda c++":
        from kernels import cuda_cpp

        if hasattr(cuda_cpp, name):
            return getattr(cuda_cpp, name)(*arguments)
    return getattr(reference, name)(*arguments)
