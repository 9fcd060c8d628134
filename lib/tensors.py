"""
Tensors as safetensors files that appear whole or not at all, say what they hold, and are verified when read. Nothing is ever unpickled.
"""

from pathlib import Path

import torch
from safetensors.torch import save

from lib import arrays
from lib.errors import Unusable
from lib.store import write_atomic

MADE_BY = {  # where files of a format come from
    "berger-encoder": "encoder.safetensors of a run",
    "berger-model": "model.safetensors of a run of train_supervised.py",
    "berger-flow": "model.safetensors of a run of train_flow.py",
    "berger-projection": "projection.safetensors of a run of train_contrastive.py",
    "berger-traits": "traits.safetensors of a run of train_jepa.py --aux",
}


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors and a JSON object `meta`, with the sha256 of both."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomic(Path(path), save(tensors, arrays.label(tensors, meta, _data)))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors (on the CPU) and `meta` of a file of `save_tensors`. Raises Unusable if it is missing, damaged, or of another kind."""
    return arrays.load(path, "pt", _data)


def check_format(meta: dict, path: str | Path, wanted: str, version: int) -> None:
    """Raises Unusable, with which file to give instead, if `meta` is of a file of another kind or version."""
    found = meta.get("format"), meta.get("version")
    if found == (wanted, version):
        return
    words = f"{path} is {found[0]} {found[1]}, expected {wanted} {version}"
    if found[0] == wanted:
        raise Unusable(f"{words}, of another version of this code; train it again")
    raise Unusable(f"{words}: give {MADE_BY[wanted]}" if wanted in MADE_BY else words)


def _data(t: torch.Tensor):
    """Its bytes."""
    return t.reshape(-1).view(torch.uint8).numpy()
