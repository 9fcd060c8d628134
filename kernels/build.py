"""
Compile kernels/csrc into one library; needs only g++ (or $CXX), no ninja and no setup.py.

    python kernels/build.py    # otherwise it happens by itself when a kernel is first used

The library's name carries a hash of the sources, the flags and the torch it was built against, so a stale one is never loaded.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).resolve().parent
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared"]
FLAGS += ["-ffp-contract=off"]  # a fused multiply-add would differ from the reference in the last bit
FLAGS += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]


class BuildFailed(Exception):
    """The library can't be compiled here; the message is one line that says why."""


def sources() -> list[Path]:
    return sorted((HERE / "csrc").glob("*.cpp"))


def library() -> Path:
    """Where the library for these sources and this torch belongs."""
    parts = [torch.__version__, str(torch.version.git_version), platform.machine(), *FLAGS]
    parts += [path.name + path.read_text() for path in sources()]
    return HERE / f"_C-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}.so"


def compiler() -> str | None:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    return next((path for path in map(shutil.which, wanted) if path), None)


def build(say=lambda line: None) -> Path:
    """The library's path, after compiling it if it isn't there; of several processes one compiles. Raises BuildFailed."""
    target = library()
    if target.exists():
        return target
    gxx = compiler()
    if gxx is None:
        raise BuildFailed("there is no g++")
    try:
        with open(HERE / "_C.lock.tmp", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                compile_to(target, gxx, say)
    except OSError as e:  # a read-only checkout, a full disk
        raise BuildFailed(f"{HERE} can't be written ({e.strerror})") from e
    return target


def compile_to(target: Path, gxx: str, say) -> None:
    say(f"compiling {HERE.name}/csrc with {Path(gxx).name}, once: about 20 s")
    began = time.monotonic()
    half = target.with_suffix(f".{os.getpid()}.tmp")
    command = [gxx, *FLAGS, f"-isystem{TORCH / 'include'}", *map(str, sources()), f"-L{TORCH / 'lib'}"]
    command += ["-ltorch_cpu", "-lc10", "-o", str(half)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = (
                [line for line in done.stderr.splitlines() if "error" in line]
                or done.stderr.splitlines()
                or ["no message"]
            )
            raise BuildFailed(f"{Path(gxx).name} failed: {lines[0]}")
        os.replace(half, target)  # whole or not at all, also for a process on another machine that shares this folder
    finally:
        half.unlink(missing_ok=True)
    say(f"compiled in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    try:
        print(build(say=lambda line: print(line, file=sys.stderr)))
    except BuildFailed as e:
        sys.exit(f"{e}; everything works without it, in plain PyTorch")
