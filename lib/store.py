"""
The cache on disk: how its files are written whole or not at all, named, summed up and checked.

    CACHE/manifest.json               written last; without it a cache is not a cache
    CACHE/index.json                  one entry per recording, sorted by key: shard, samples, montage, segments
    CACHE/labels.json                 subject, split, task and columns per recording; participants; event vocabulary
    CACHE/events.npy                  one row per event: recording, onset_s, duration_s, label, value
    CACHE/scales.npy                  per recording and channel: scale_uV and offset_uV; microvolts = stored * scale + offset
    CACHE/quarantine.json             every recording that was refused, with its code and reason
    CACHE/build.json                  the command that builds it
    CACHE/<signal hash>/shards/*.npy  float16, time-major (T, C), one immutable array per recording
    CACHE/<signal hash>/parts/*.json  what became of one source; shards and parts are what an interrupted build resumes from
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import zlib
from pathlib import Path

import numpy as np

from kernels import pack
from lib.errors import Unusable

FORMAT = "berger-cache"
VERSION = 1
TABLES = ("index.json", "labels.json", "events.npy", "scales.npy", "quarantine.json", "build.json")
EVENT = np.dtype([("recording", "<i4"), ("onset_s", "<f8"), ("duration_s", "<f8"), ("label", "<i4"), ("value", "<f8")])
NPY_HEADER_BYTES = 128
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def canonical_json(value) -> bytes:
    """The one spelling of a JSON value: sorted keys, no blanks, no NaN; what is hashed and written."""
    return utf8(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


def utf8(text: str) -> bytes:
    """Text as UTF-8, with ? for what that can't hold: bytes of file names in another encoding, halves of MATLAB's characters."""
    return text.encode(errors="replace")


def digest(value) -> str:
    """sha256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_atomic(path: Path, *chunks) -> None:
    """Write bytes so that `path` holds all of them or is untouched, whenever the process or the machine dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # not the temporary one, or none
        raise
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make renames and removals in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_stale_temporaries(directory: Path) -> None:
    """Delete the temporary files of builders that no longer run on this machine."""
    for path in directory.rglob(".*.tmp"):
        pid = path.name.rsplit(".", 2)[-2]
        if not pid.isdigit() or not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def npy_bytes(array: np.ndarray) -> tuple[bytes, memoryview]:
    """Header and data of a `.npy` version 1 file; the header is padded to 128 bytes, so that data start at a fixed place."""
    header = f"{{'descr': {np.lib.format.dtype_to_descr(array.dtype)!r}, 'fortran_order': False, 'shape': {array.shape!r}, }}"
    pad = -(10 + len(header) + 1) % NPY_HEADER_BYTES
    head = b"\x93NUMPY\x01\x00" + (len(header) + pad + 1).to_bytes(2, "little") + header.encode() + b" " * pad + b"\n"
    return head, memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def write_shard(path: Path, x_TC: np.ndarray) -> tuple[int, int]:
    """Write one recording, float16 (T, C); returns the file's bytes and CRC-32."""
    head, data = npy_bytes(x_TC)
    assert len(head) == NPY_HEADER_BYTES and x_TC.dtype == np.float16, (len(head), x_TC.dtype)
    write_atomic(path, head, data)
    return len(head) + len(data), pack.crc32(data, zlib.crc32(head))


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc, block = 0, memoryview(bytearray(1 << 18))  # stays in the processor's cache
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = pack.crc32(block[:count], crc)
    return crc


def key_hash(key: str) -> str:
    """The name of a source's part file: ten hex digits of its key."""
    return hashlib.sha1(key.encode()).hexdigest()[:10]


def write_part(path: Path, part: dict) -> None:
    """Write what became of one source, with a checksum of itself."""
    write_atomic(path, canonical_json({"crc32": zlib.crc32(canonical_json(part)), "part": part}))


def read_part(path: Path) -> dict | None:
    """What became of one source, or None if the file is missing or damaged (the source is then simply done again)."""
    try:
        wrapped = json.loads(path.read_bytes())
        part = wrapped["part"]
        return part if zlib.crc32(canonical_json(part)) == wrapped["crc32"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def lock(directory: Path, name: str, wait: bool = False):
    """One builder at a time; the kernel releases the lock however the holder dies. Raises Unusable naming the holder."""
    with open(directory / name, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise Unusable(f"--cache {directory} is being built by {holder}; wait for it or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def write_tables(directory: Path, tables: dict[str, bytes], manifest: dict) -> bool:
    """
    Publish the tables and, after them, the manifest; returns False where all of it stood there already.

    The old manifest goes first, so that no reader ever sees tables of two builds.
    """
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in tables.items()}
    manifest = {**manifest, "format": FORMAT, "version": VERSION, "files": files}
    manifest["sha256"] = digest(manifest)  # of everything above, so that a damaged manifest is noticed too
    text = utf8(json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False))
    path = directory / "manifest.json"
    if path.exists() and path.read_bytes() == text and not any(table_problems(directory, files)):
        return False
    remove_manifest(directory)
    for name, data in tables.items():
        write_atomic(directory / name, data)
    write_atomic(path, text)
    return True


def remove_manifest(directory: Path) -> None:
    """Take a cache out of use before anything in it changes."""
    (directory / "manifest.json").unlink(missing_ok=True)
    fsync_directory(directory)


def build_command(directory: Path) -> str:
    """The command that built, or was building, a cache."""
    try:
        return json.loads((directory / "build.json").read_bytes())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"python build_cache.py --source PATH --cache {directory}"


def read_manifest(directory: Path) -> dict:
    """The manifest of a complete cache of this version. Raises Unusable, with the command that mends it."""
    if not directory.is_dir():
        raise Unusable(
            f"no cache at {directory} (looked in {directory.resolve()}); build it: python build_cache.py --source PATH --cache {directory}"
        )
    path = directory / "manifest.json"
    if not path.exists():
        done = len(list(directory.glob("*/parts/*.json")))
        raise Unusable(
            f"{path} is missing: the build did not finish ({done} sources done); resume it: {build_command(directory)}"
        )
    try:
        manifest = json.loads(path.read_bytes())
        version, stated = (manifest["format"], manifest["version"]), manifest.pop("sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{path} is damaged; rebuild it (shards are kept): {build_command(directory)}") from error
    if version != (FORMAT, VERSION):
        raise Unusable(
            f"{path} is {version[0]} version {version[1]}, expected {FORMAT} {VERSION}; rebuild: {build_command(directory)}"
        )
    if stated != digest(manifest):
        raise Unusable(
            f"{path} is damaged (its sha256 differs); rebuild it (shards are kept): {build_command(directory)}"
        )
    return manifest | {"sha256": stated}


def table_problems(directory: Path, files: dict):
    """(path, what is wrong) for every table that is missing or does not hold what the manifest says."""
    for name, expected in files.items():
        try:
            data = (directory / name).read_bytes()
        except OSError:
            yield directory / name, "is missing"
            continue
        if len(data) != expected["bytes"]:
            yield directory / name, f"has {len(data)} bytes, expected {expected['bytes']}"
        elif hashlib.sha256(data).hexdigest() != expected["sha256"]:
            yield directory / name, "is damaged (sha256 differs from the manifest)"


def shard_problems(directory: Path, recordings: list[dict], checksums: bool = False):
    """(path, what is wrong) for every shard: missing, of the wrong size or, with `checksums`, damaged; sizes come from one directory scan."""
    shards = directory / "shards"
    try:
        with os.scandir(shards) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
    except OSError:
        sizes = {}
    for recording in recordings:
        name = recording["shard"]
        if name not in sizes:
            yield shards / name, "is missing"
        elif sizes[name] != recording["bytes"]:
            yield shards / name, f"has {sizes[name]} bytes, expected {recording['bytes']}"
        elif checksums and file_crc32(shards / name) != recording["crc32"]:
            yield shards / name, "is damaged (CRC-32 differs from the index)"


def part_problems(directory: Path, recordings: list[dict]):
    """(path, what is wrong) for every commit record that is missing or damaged."""
    expected = {directory / "parts" / f"{key_hash(recording['key'])}.json" for recording in recordings}
    for path in sorted(expected | set(directory.glob("parts/*.json"))):
        if read_part(path) is None:
            yield path, f"is {'damaged' if path.exists() else 'missing'}"


def verify(directory: Path) -> list[tuple[Path, str]]:
    """Every damaged file of a cache, and what is wrong with it: manifest, tables, shards (full CRC) and parts."""
    manifest = read_manifest(directory)
    problems = list(table_problems(directory, manifest["files"]))
    if any(path.name == "index.json" for path, _ in problems):
        return problems
    recordings = json.loads((directory / "index.json").read_bytes())["recordings"]
    data = directory / manifest["directory"]
    return problems + list(shard_problems(data, recordings, checksums=True)) + list(part_problems(data, recordings))
