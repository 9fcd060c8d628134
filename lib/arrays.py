"""
NumPy arrays as safetensors files, the torch-free twin of lib/tensors.py: whole or not at all, verified when read, nothing unpickled.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lib.errors import Unusable
from lib.store import canonical_json, write_atomic


def save_arrays(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """Write arrays and a JSON value `meta`, with the sha256 of both."""
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    label = {"meta": meta, "sha256": _digest(arrays, meta)}
    write_atomic(Path(path), save(arrays, {"berger": canonical_json(label).decode()}))


def load_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and `meta` of a file of `save_arrays`. Raises Unusable if it is missing, damaged, or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise Unusable(f"no file {path} (looked in {path.resolve().parent})")
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise Unusable(f"{path} is damaged or no safetensors file ({error}); write or copy it again") from error
    try:
        label = json.loads(header["berger"])
        meta, sha256 = label["meta"], label["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Unusable(
            f"{path} was not written by Berger, or is damaged: its metadata says nothing of its content"
        ) from error
    if not isinstance(meta, dict) or _digest(arrays, meta) != sha256:
        raise Unusable(f"{path} is damaged (its sha256 differs); write or copy it again")
    return arrays, meta


def _digest(arrays: dict[str, np.ndarray], meta: dict) -> str:
    """sha256 of the metadata and, in order of name, of every array's name, type, shape and bytes."""
    sha = hashlib.sha256(canonical_json(meta))
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        sha.update(arrays[name].tobytes())
    return sha.hexdigest()
