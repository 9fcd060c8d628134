"""
NumPy arrays as safetensors files, the torch-free twin of lib/tensors.py: whole or not at all, verified when read, nothing unpickled.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lib.errors import Unusable
from lib.store import canonical_json, write_atomic


def save_arrays(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """Write arrays and a JSON object `meta`, with the sha256 of both."""
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    write_atomic(Path(path), save(arrays, label(arrays, meta, np.ndarray.tobytes)))


def load_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and `meta` of a file of `save_arrays`. Raises Unusable if it is missing, damaged, or of another kind."""
    return load(path, "np", np.ndarray.tobytes)


# ----------------------------------------------------------------------------
# of arrays and tensors


def label(tensors: dict[str, Any], meta: dict, data_of: Callable[[Any], Any]) -> dict[str, str]:
    """The file's metadata; one key only: the library keeps keys in random order, and the same content should be the same bytes."""
    return {"berger": canonical_json({"meta": meta, "sha256": _digest(tensors, meta, data_of)}).decode()}


def load(path: str | Path, framework: str, data_of: Callable[[Any], Any]) -> tuple[dict[str, Any], dict]:
    """
    What `label` was given, with tensors of safetensors' `framework` (np, pt) whose bytes are `data_of` them.

    Raises Unusable if the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise Unusable(f"no file {path} (looked in {path.resolve().parent})")
    try:
        with safe_open(path, framework) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise Unusable(f"{path} is damaged or no safetensors file ({error}); write or copy it again") from error
    try:
        told = json.loads(header["berger"])
        meta, sha256 = told["meta"], told["sha256"]
        intact = isinstance(meta, dict) and _digest(tensors, meta, data_of) == sha256
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        words = "was not written by Berger, or is damaged: its metadata says nothing of its content"
        raise Unusable(f"{path} {words}") from error
    if not intact:
        raise Unusable(f"{path} is damaged (its sha256 differs); write or copy it again")
    return tensors, meta


def _digest(tensors: dict[str, Any], meta: dict, data_of: Callable[[Any], Any]) -> str:
    """sha256 of the metadata and, in order of name, of every tensor's name, type, shape and bytes."""
    sha = hashlib.sha256(canonical_json(meta))
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        sha.update(data_of(tensors[name]))
    return sha.hexdigest()
