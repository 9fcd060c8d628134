"""
Tensors as safetensors files that appear whole or not at all, say what they hold, and are verified when read. Nothing is ever unpickled.
"""

from pathlib import Path

import torch
from safetensors.torch import save

from lib import arrays
from lib.store import write_atomic


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors and a JSON object `meta`, with the sha256 of both."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomic(Path(path), save(tensors, arrays.label(tensors, meta, _data)))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors (on the CPU) and `meta` of a file of `save_tensors`. Raises Unusable if it is missing, damaged, or of another kind."""
    return arrays.load(path, "pt", _data)


def _data(t: torch.Tensor):
    """Its bytes."""
    return t.reshape(-1).view(torch.uint8).numpy()
