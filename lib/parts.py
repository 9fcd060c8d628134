"""
What was done with every source, in a file each, and what is left to do: a build that was interrupted goes on from these.

A part says which source, options and rules it is of, and is cached with its shard or quarantined with a code and a reason.
"""

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from lib import manifest, store
from lib.sources import Source
from lib.statements import settle_shaft


@dataclass(frozen=True)
class Task:
    """One source that is left to do."""

    source: Source
    signal: dict
    directory: Path  # CACHE/<signal hash>
    previous: dict | None  # the part of an earlier build whose source has been touched since
    anonymous: bool = False  # leave no reason in the part: it can name the file

    def told(self, reason: str) -> str:
        """Why a source was refused, without the folder it lies in (a moved source gives the same bytes), or nothing that can name it."""
        return "" if self.anonymous else reason.replace(str(self.source.path), self.source.path.name)

    def noted(self, notes: list[str]) -> list[str]:
        """What was odd about a source, or only of which kinds, because particulars can name it."""
        if not self.anonymous:
            return notes
        return [manifest.kind_of_note(note) for note in notes if self.source.path.name not in note]


def plan(
    sources: list[Source], signal: dict, directory: Path, anonymous: bool, retry: bool
) -> tuple[dict[str, dict], list[Task]]:
    """What is done already (part by key), and what is left to do; a changed source, rule or missing shard is to be done again."""
    parts, tasks, signal_hash = {}, [], store.digest(signal)
    for source in sources:
        part = store.read_part(directory / "parts" / f"{store.key_hash(source.key)}.json")
        if part and (part["key"], part["signal"], part["rules"]) != (source.key, signal_hash, source_rules(source)):
            part = None
        if part and part["status"] == "cached":
            with contextlib.suppress(OSError):
                if (directory / "shards" / part["shard"]).stat().st_size == part["bytes"]:
                    parts[source.key] = part
        elif part and not retry:
            parts[source.key] = part
        if source.key in parts and not _untouched(source, part):
            tasks.append(Task(source, signal, directory, parts.pop(source.key), anonymous))
        elif source.key not in parts:
            tasks.append(Task(source, signal, directory, None, anonymous))
    return parts, tasks


def _untouched(source: Source, part: dict) -> bool:
    try:
        return [tuple(f[:2]) for f in part["files"]] == [stat for _, stat in source_files(source)]
    except OSError:
        return False


def source_files(source: Source) -> list[tuple[Path, tuple[int, int]]]:
    """The files a signal comes from, the recording itself first, with (bytes, mtime_ns). Raises OSError."""
    files = []
    for path in (source.path, *source.companions):
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for p in inside:
            stat = p.stat()
            files.append((p, (stat.st_size, stat.st_mtime_ns)))
    return files


def source_rules(source: Source) -> dict:
    """What the data set's description adds to the signal options."""
    rules = {"spec": asdict(source.spec), "crop": source.crop}
    if (hz := shaft_hz(source)) is not None:
        rules["shaft_hz"] = hz
    return json.loads(json.dumps(rules))  # lists for tuples, as a part that is read back has them


def shaft_hz(source: Source) -> float | None:
    """Turns per second of the machine that vibrates, where a column `rpm` or `shaft_hz` says so."""
    if source.spec.kind != "vibration":
        return None
    hz = settle_shaft(source.columns)
    return None if math.isnan(hz) else hz


def same_content(previous: dict, part: dict) -> bool:
    """Whether a source still is what an earlier build read, whatever its modification times."""
    pairs = [[(size, crc32) for size, _, crc32 in p["files"]] for p in (previous, part)]
    return pairs[0] == pairs[1] and previous["signal"] == part["signal"] and previous["rules"] == part["rules"]


def unused(directory: Path) -> list[Path]:
    """Files below the signal directories that belong to no recording or quarantine entry of the manifest."""
    data = directory / store.read_manifest(directory)["directory"]
    listed, used = manifest.listed_keys(directory), set()
    for path in data.glob("parts/*.json"):
        part = store.read_part(path)
        if part and part["key"] in listed:
            used |= {path, data / "shards" / part.get("shard", "")}
    return sorted(p for folder in ("parts", "shards") for p in directory.glob(f"*/{folder}/*") if p not in used)
