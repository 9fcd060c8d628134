"""
Compile kernels/csrc; needs only g++ (or $CXX), no ninja and no setup.py.

    python kernels/build.py    # otherwise it happens by itself when a kernel is first used

Two libraries: `torch` has the operators of torch.ops.berger; `plain` is for programs on NumPy arrays that do without torch. The name
of each carries a hash of its sources, of the flags and of the torch it was built against, so a stale one is never loaded.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = {"torch": HERE / "csrc", "plain": HERE / "csrc" / "plain"}
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared"]
FLAGS += ["-ffp-contract=off"]  # a fused multiply-add would differ from the reference in the last bit


class BuildFailed(Exception):
    """The library can't be compiled here; the message is one line that says why."""


def sources(kind: str) -> list[Path]:
    return sorted(FOLDERS[kind].glob("*.cpp"))


def library(kind: str) -> Path:
    """Where the library for these sources and this torch belongs."""
    parts = [platform.machine(), *FLAGS]
    if kind == "torch":
        import torch  # here, because building a cache needs none of it

        parts += [torch.__version__, str(torch.version.git_version), *threading_flags()]
    else:
        parts += python_flags()
    for path in [*sources(kind), *sorted({*FOLDERS["torch"].glob("*.h"), *FOLDERS[kind].glob("*.h")})]:
        parts += [path.name, path.read_text()]
    return HERE / f"_{kind}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}.so"


def threading_flags() -> list[str]:
    """
    For torch's own threads: at::parallel_for is a plain loop in what is compiled without OpenMP.

    To the compiler alone, not to the linker: the runtime has to be the one that torch brings, a second one would have threads of its own.
    """
    import torch

    return ["-Xpreprocessor", "-fopenmp"] if torch.backends.openmp.is_available() else []


def python_flags() -> list[str]:
    """For what Python calls without ctypes; none where Python's headers aren't (Debian: python3-dev), and ctypes does it."""
    folders = {sysconfig.get_path(name) for name in ("include", "platinclude")}
    if not any((Path(folder) / "Python.h").exists() for folder in folders):
        return []
    missing = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []  # Python itself has the rest
    return [f'-DWITH_PYTHON="{sys.implementation.cache_tag}"', *missing, *(f"-isystem{f}" for f in sorted(folders))]


def compiler() -> str | None:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    return next((path for path in map(shutil.which, wanted) if path), None)


def build(kind: str, say=lambda line: None) -> Path:
    """The library's path, after compiling it if it isn't there; of several processes one compiles. Raises BuildFailed."""
    target = library(kind)
    if whole(target):
        return target
    gxx = compiler()
    if gxx is None:
        wanted = os.environ.get("CXX")
        raise BuildFailed(f"CXX={wanted} is no program here (one name, without flags)" if wanted else "there is no g++")
    try:
        with open(HERE / "_build.lock.tmp", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole(target):
                say(f"compiling {HERE.name}/csrc ({kind}) with {Path(gxx).name}, once: up to half a minute")
                began = time.monotonic()
                compile_to(target, kind, gxx)
                say(f"compiled in {time.monotonic() - began:.0f} s")
    except OSError as e:  # a read-only checkout, a full disk
        raise BuildFailed(f"{HERE} can't be written ({e.strerror})") from e
    return target


def whole(target: Path) -> bool:
    """Whether it is there, and on Linux as long as its ELF header says: one cut by a crash would end the process that loads it."""
    if not target.exists():
        return False
    with open(target, "rb") as f:
        header, size = f.read(64), os.fstat(f.fileno()).st_size
    if len(header) == 64 and header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian
        sections, each, count = struct.unpack_from("<Q10xHH", header, 40)
        return sections + each * count <= size
    return size > 0 and sys.platform != "linux"


def compile_to(target: Path, kind: str, gxx: str, extra: tuple[str, ...] = ()) -> None:
    half = target.with_suffix(f".{os.getpid()}.tmp")
    command = [gxx, *FLAGS, *extra, *map(str, sources(kind)), "-o", str(half)]
    if kind == "torch":
        import torch

        root = Path(torch.__file__).resolve().parent
        command += [
            *threading_flags(),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-isystem{root / 'include'}",
        ]
        command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    else:
        command += python_flags()
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = done.stderr.splitlines() or ["no message"]
            raise BuildFailed(f"{Path(gxx).name} failed: {next((x for x in lines if 'error' in x), lines[0])}")
        with open(half, "rb") as f:
            os.fsync(f.fileno())
        os.replace(half, target)  # whole or not at all, also for a process on another machine that shares this folder
    finally:
        half.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    try:
        for kind in FOLDERS:
            print(build(kind, say=lambda line: print(line, file=sys.stderr)))
    except BuildFailed as e:
        sys.exit(f"{e}; everything works without it, in plain PyTorch and NumPy")
