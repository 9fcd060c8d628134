"""
Generated windows as a cache, in physical units, so that every tool that reads recordings reads them.

One recording per training recording that windows were modelled on, named by a hash of it; its windows lie end to end, each a segment, so
that none that a reader cuts crosses from one into the next. Columns are the conditions; `generated` names the model.

Shape letters: N windows, C channels, T samples.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lib import store
from lib.errors import Unusable


def write_generated(directory: str | Path, windows: Iterable[tuple[dict, np.ndarray]], model: str, command: str) -> int:
    """
    Write pairs of a template (Model file's) and its windows (N, C, T) in its unit; returns the number of recordings.

    Replaces a cache that was generated before. Raises Unusable for a directory that holds anything else, and for templates that differ in
    rate, unit or kind.
    """
    from lib import manifest, sources  # here: they bring the readers along

    check_room(directory, ())
    target = Path(directory)
    directory = target.with_name(f"{target.name}.half")  # the old one stays until the new one is whole
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    found, parts, signal = sources.Discovery(), {}, None
    for template, x_NCT in windows:
        own = template["signal"] | {"generated": model}
        if signal is not None and own != signal:
            raise Unusable("--sample: templates differ in rate or filter; choose a data set with --given dataset=NAME")
        signal = own
        part, source = _recording(directory / store.digest(signal)[:12], template, x_NCT, signal, model)
        parts[source.key] = part
        found.sources.append(source)
        found.participants[source.dataset, source.subject] = {}
    if signal is None:
        raise Unusable("--sample: there is nothing to write")
    shards = directory / store.digest(signal)[:12]
    tables, head, _ = manifest.assemble(found, parts, signal, shards.name, False, False)
    store.write_atomic(directory / "build.json", store.canonical_json({"command": command}))
    tables["build.json"] = (directory / "build.json").read_bytes()
    store.write_tables(directory, tables, head)
    shutil.rmtree(target, ignore_errors=True)
    directory.rename(target)
    return len(parts)


def check_room(directory: str | Path, templates: Iterable[dict]) -> None:
    """Raises Unusable, before anything is generated, where `write_generated` would: for its directory or its templates."""
    directory = Path(directory)
    if len({store.digest(t["signal"]) for t in templates}) > 1:
        raise Unusable("--sample: templates differ in rate or filter; choose a data set with --given dataset=NAME")
    if (directory / "manifest.json").exists():
        head = json.loads((directory / "manifest.json").read_bytes())
        if "generated" not in head.get("signal", {}):
            raise Unusable(f"--out {directory} is a cache of recordings: choose another place")
    elif directory.exists() and any(directory.iterdir()):
        raise Unusable(f"--out {directory} holds something else: choose another place")


def _recording(shards: Path, template: dict, x_NCT: np.ndarray, signal: dict, model: str):
    """One recording: its shard on disk, its part, and what a source would say of it."""
    from lib.recordings import ReadSpec
    from lib.sources import Source

    N, C, T = x_NCT.shape
    x_TC = x_NCT.transpose(0, 2, 1).reshape(N * T, C).astype(np.float32)
    scale_C = np.maximum(x_TC.std(0), 1e-12).astype(np.float32)
    key = f"{template['dataset']}/{template['key']}"
    shard = f"{store.key_hash(key)}.npy"
    (shards / "shards").mkdir(parents=True, exist_ok=True)
    size, crc32 = store.write_shard(shards / "shards" / shard, (x_TC / scale_C).astype(np.float16))
    rate_hz = signal["rate_hz"]
    positions = {n: p for n, p in zip(template["names"], template["positions"], strict=True) if p is not None}
    part = {
        "key": key, "status": "cached", "shard": shard, "bytes": size, "crc32": crc32, "samples": N * T,
        "unit": template["unit"], "source_rate_hz": rate_hz, "source_seconds": N * T / rate_hz, "first_sample": 0,
        "names": template["names"], "positions": positions, "bad": [], "interpolated": [], "missing": [], "dropped": [],
        "segments": [[i * T, (i + 1) * T, i * T / rate_hz] for i in range(N)],
        "scale": [float(v) for v in scale_C], "offset": [0.0] * C, "events": [], "columns": {}, "notes": [],
        "signal": store.digest(signal), "rules": {}, "files": [],
    }  # fmt: skip
    (shards / "parts").mkdir(exist_ok=True)
    store.write_part(shards / "parts" / f"{store.key_hash(key)}.json", part)
    spec = ReadSpec(rate_hz, template["unit"], tuple(template["names"]), signal["kind"])
    columns = template["columns"] | {"generated": model}
    source = Source(
        key,
        Path(shard),
        template["dataset"],
        "folder",
        (),
        (),
        spec,
        template["subject"],
        columns=columns,
        split="train",
    )
    return part, source
