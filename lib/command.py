"""
What every script's command line has in common: flags from a frozen dataclass, presets, exit codes, one JSON line at the end.

    if __name__ == "__main__":
        sys.exit(command.run(main, Config, __doc__, PRESETS))

Imports no torch and no MNE, so that `--help` and the cache builder start at once.
"""

import contextlib
import ctypes
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tyro

from lib.errors import Failed, Unusable

DONE, FAILED, UNUSABLE, QUARANTINED, INTERRUPTED = 0, 1, 2, 3, 130

REFUSED = {  # what the system may say to a path that is right in form: the mend
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make space, and run it again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give another path, or the right to it"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG), "give another path"),
    errno.EIO: "the disk is failing",
}

_out = None  # the real standard output while `run` keeps everything else off it


def run(
    main: Callable[[typing.Any], dict | None],
    config: type,
    doc: str,
    presets: dict[str, dict] | None = None,
    saved: Callable[[typing.Any], typing.Any] | None = None,
) -> int:
    """
    Parse sys.argv into `config`, call `main` and return the exit status.

    `main(cfg)` returns the results, which become the last line of stdout (None prints nothing: ranks other than 0), with
    status 3 if they hold a `quarantined` other than 0. Whatever else is printed meanwhile, also by child processes, goes to
    stderr. Unusable → one line and 2; Failed, no memory, or a file that the system refuses to write or to read → one line and 1; KeyboardInterrupt → 130,
    its message telling how to go on; other errors are bugs and keep their traceback (1).
    """
    complaint, results, status = "", None, DONE
    try:
        cfg = parse(config, sys.argv[1:], doc, presets, saved)
        with _only_results_on_stdout():
            results = main(cfg)
            if results is not None:
                emit(results)
    except Unusable as e:
        complaint, status = str(e), UNUSABLE
    except Failed as e:
        complaint, status = str(e), FAILED
    except OSError as e:
        if e.errno not in REFUSED:
            raise
        complaint, status = f"{e.filename or 'a file'}: {e.strerror}; {REFUSED[e.errno]}", FAILED
    except MemoryError as e:  # of NumPy and Python; those of PyTorch are a step's, which is done again in parts
        complaint, status = f"out of memory ({e}): free some, or take less at a time", FAILED
    except KeyboardInterrupt as e:
        complaint, status = " ".join(["interrupted", *map(str, e.args)]), INTERRUPTED
    if complaint:  # here, where a progress bar has gone with the frames that the exception held, and has ended its line
        print(f"{Path(sys.argv[0]).name}: {' '.join(complaint.split())}", file=sys.stderr)
    return QUARANTINED if results and results.get("quarantined") else status


def emit(results: dict) -> None:
    """Write one JSON object as a line of the real stdout, at once (`run` does it for what main returns)."""
    write(json_line(results) + "\n")


def write(text: str) -> None:
    """Write to the real stdout, at once. Raises Failed where nobody reads it any more."""
    out = _out or sys.stdout
    try:
        print(text, end="", file=out, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # or closing it would try once more
        raise Failed("stdout was closed before all was written") from None


def parse(
    config: type,
    args: Sequence[str],
    doc: str = "",
    presets: dict[str, dict] | None = None,
    saved: Callable[[typing.Any], typing.Any] | None = None,
) -> typing.Any:
    """
    An instance of the dataclass `config`: the defaults of the preset named by `--preset` (field `preset`), then the flags.

    Field names become flags and trailing comments their help, by tyro, which wants each field on one line. `none` stands for None where a field allows it.
    `saved(cfg)` gives the configuration of the run that `--resume` goes on with: its values are the defaults then, and any other
    value is an error, as is a number that isn't finite: such a configuration is kept as JSON. Raises Unusable for flags that don't
    parse, and SystemExit after `--help`.
    """
    args = _none_by_any_case(config, args)
    default = config()
    if presets is not None:
        names = [b for a, b in itertools.pairwise(args) if a == "--preset"]
        names += [a.removeprefix("--preset=") for a in args if a.startswith("--preset=")]
        default = dataclasses.replace(default, **presets.get(names[-1] if names else default.preset, {}))
    cfg = _parse_flags(config, args, doc, default)
    if saved is not None:
        check_finite(cfg)
    if saved is None or not cfg.resume:
        return cfg
    kept = saved(cfg)
    cfg = _parse_flags(config, args, doc, kept)
    for name in (f.name for f in dataclasses.fields(config) if f.name != "device"):
        ours, theirs = getattr(kept, name), getattr(cfg, name)
        if ours != theirs:
            flag = f"--{name.replace('_', '-')}"
            raise Unusable(f"the run to resume has {flag} {ours}, not {theirs}: leave {flag} out, or start a new run")
    return cfg


def _parse_flags(config: type, args: Sequence[str], doc: str, default: typing.Any) -> typing.Any:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, args=args, default=default, description=doc)
    except SystemExit as e:
        if not e.code:
            raise
        raise Unusable(_unboxed(complaint.getvalue())) from None


def check_finite(cfg: typing.Any) -> None:
    """Raises Unusable for the first field that is NaN or infinite, which compares like no size or like any, or beyond 64 bits."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise Unusable(f"--{field.name.replace('_', '-')} {value} must be a finite number")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise Unusable(f"--{field.name.replace('_', '-')} {value} must fit 64 bits")


def check_signs(cfg: typing.Any, positive: str, not_negative: str) -> None:
    """Raises Unusable for a field that isn't finite, and for the first of these (names in a string) whose sign is wrong; None passes."""
    check_finite(cfg)
    for name in positive.split():
        value = getattr(cfg, name)
        if value is not None and not value > 0:
            raise Unusable(f"--{name.replace('_', '-')} {value} must be positive")
    for name in not_negative.split():
        value = getattr(cfg, name)
        if value is not None and value < 0:
            raise Unusable(f"--{name.replace('_', '-')} {value} must not be negative")


def json_line(value: typing.Any) -> str:
    """Strict one-line JSON: paths and numpy numbers are understood, and a number that isn't finite becomes null."""
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)


def _plain(value: typing.Any) -> typing.Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _none_by_any_case(config: type, args: Sequence[str]) -> list[str]:
    """tyro knows None only as `None`; a field whose choices hold the word "none" keeps it."""
    optional = {
        f"--{name.replace('_', '-')}"
        for name, hint in typing.get_type_hints(config).items()
        if typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)
    }
    flag, out = "", []
    for arg in args:
        name, equals, value = arg.partition("=")
        if arg.startswith("--"):
            flag = name.replace("_", "-")
        if flag in optional and arg.lower() == "none":
            arg = "None"
        elif flag in optional and equals and arg.startswith("--") and value.lower() == "none":
            arg = f"{name}=None"
        out.append(arg)
    return out


def _unboxed(text: str) -> str:
    """The first paragraph of the box that tyro draws around an error, as one line that ends in where to look."""
    text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", text)
    lines = [line.strip(" │|").strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.match(r"[╭╰+]", line)]
    rule = next((i for i, line in enumerate(lines) if re.fullmatch(r"[─-]+", line)), len(lines))
    return f"{' '.join(lines[:rule]).rstrip('.')}; see --help"


def keep_freed_memory() -> None:
    """For a process that allocates the same large arrays again and again: freed memory stays in it, where glibc would fetch it anew, page by page."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older ones take no more than that


@contextlib.contextmanager
def _only_results_on_stdout() -> Iterator[None]:
    """Send what libraries and child processes print to stderr, by file descriptor as well as by name."""
    global _out
    sys.stdout.flush()
    saved = os.dup(1)
    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as own, contextlib.redirect_stdout(sys.stderr):
        _out = own
        os.dup2(2, 1)
        try:
            yield
        finally:
            _out = None
            os.dup2(saved, 1)
            os.close(saved)
