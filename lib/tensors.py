"""
Safetensors files that appear whole or not at all, say what they hold, and are verified when read. Nothing is ever unpickled.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lib.errors import Unusable
from lib.store import canonical_json, write_atomic


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors and a JSON value `meta`, with the sha256 of both."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    label = {"meta": meta, "sha256": _digest(tensors, meta)}
    # one key only: the library keeps keys in random order, and the same content should be the same bytes
    write_atomic(Path(path), save(tensors, {"berger": canonical_json(label).decode()}))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors (on the CPU) and `meta` of a file of `save_tensors`. Raises Unusable if it is missing, damaged, or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise Unusable(f"no file {path} (looked in {path.resolve().parent})")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise Unusable(f"{path} is damaged or no safetensors file ({error}); write or copy it again") from error
    try:
        label = json.loads(header["berger"])
        meta, sha256 = label["meta"], label["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(
            f"{path} was not written by Berger, or is damaged: its metadata says nothing of its content"
        ) from error
    if _digest(tensors, meta) != sha256:
        raise Unusable(f"{path} is damaged (its sha256 differs); write or copy it again")
    return tensors, meta


def _digest(tensors: dict[str, torch.Tensor], meta: dict) -> str:
    """sha256 of the metadata and, in order of name, of every tensor's name, type, shape and bytes."""
    sha = hashlib.sha256(canonical_json(meta))
    for name in sorted(tensors):
        t = tensors[name]
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
