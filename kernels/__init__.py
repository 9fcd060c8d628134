"""
Fast operations, each beside its plain-PyTorch meaning (kernels/reference.py).

They are functions of kernels/ops.py, which is imported when the first of them is asked for: it needs torch, which takes seconds to
import and which building a cache does without (kernels/plain.py).
"""

import importlib

NAMES = "UnreadableWindow attend ema_ embed_tokens gather_windows path selective_scan sos_stream".split()


def __getattr__(name: str):
    if name not in NAMES:
        raise AttributeError(f"module kernels has no attribute {name}")
    # asked for once: it takes a microsecond
    found = globals()[name] = getattr(importlib.import_module("kernels.ops"), name)
    return found
