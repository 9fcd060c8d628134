"""
The compiled operations that need no torch, as functions on NumPy arrays: for building a cache and for the live filter.
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader

import numpy as np

from kernels import build

_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []


def library() -> ctypes.CDLL | None:
    """The library, compiled if need be; None without a compiler or with BERGER_KERNELS=0, which is said once."""
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.append(_load())
    return _loaded[0]


def _load() -> ctypes.CDLL | None:
    if asked() == "0":
        say("plain NumPy and SciPy, because BERGER_KERNELS=0")
        return None
    try:
        found = ctypes.CDLL(str(build.build("plain", say)))
        found.berger_filter.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        found.berger_filter.restype = None
        found.berger_take.argtypes = (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
        )
        found.berger_take.restype = ctypes.c_int64
        found.berger_cut.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        found.berger_cut.restype = None
        return found
    except (build.BuildFailed, OSError) as e:  # OSError: a library that this system can't load
        say(f"plain NumPy and SciPy, slower, because {e}")
        return None


@functools.cache
def asked() -> str:
    """What BERGER_KERNELS says; a word that means nothing is named."""
    word = os.environ.get("BERGER_KERNELS", "")
    if word not in ("", "0", "1", "generic", "avx2", "avx512", "cuda"):
        say(f"BERGER_KERNELS={word} means nothing: 0, generic, avx2 and cuda do")
    return word


def say(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"kernels: {line}", file=sys.stderr, flush=True)


@functools.cache
def filter_of(found: ctypes.CDLL) -> Callable[[np.ndarray, np.ndarray, int], None]:
    """
    The streaming filter of contiguous float64 x_CT to y_CT, given the address of a `_Filter`.

    As a function of Python's, at a quarter of a microsecond a call; by ctypes, at two, where the library was compiled without Python's headers.
    """
    if hasattr(found, "PyInit__plain"):
        return module_from_spec(spec_from_loader("_plain", ExtensionFileLoader("_plain", found._name))).filter

    def by_ctypes(x_CT: np.ndarray, y_CT: np.ndarray, at: int) -> None:
        if x_CT.size:
            found.berger_filter(x_CT.ctypes.data, byref(start(y_CT)), x_CT.shape[1], at)

    return by_ctypes


class _Filter(ctypes.Structure):
    """As in csrc/plain/filter.h."""

    _fields_ = [
        ("channels", ctypes.c_int64),
        ("sections", ctypes.c_int64),
        ("sos", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
    ]


class Sections:
    """
    Second-order sections in series with their state, chunk by chunk: scipy.signal.sosfilt bit for bit, at some microseconds a call.

    y_CT = sections(x_CT) of any length; float64. However a signal is cut into chunks, its samples come out the same. `state_S2C` (scipy's
    zi with its last two axes swapped) may be read and written to. Without the library it is scipy itself. Raises ValueError.
    """

    def __init__(self, sos_S6: np.ndarray, state_S2C: np.ndarray):
        self.sos_S6, self._state_S2C = (np.array(x, np.float64, order="C") for x in (sos_S6, state_S2C))
        S, self.channels = len(self.sos_S6), self.state_S2C.shape[-1]
        if self.sos_S6.shape != (S, 6) or not 1 <= S <= 64 or not np.all(self.sos_S6[:, 3] == 1):
            raise ValueError(f"expected 1 to 64 sections b0 b1 b2 1 a1 a2, not {self.sos_S6.shape}")
        if self.state_S2C.shape != (S, 2, self.channels):
            raise ValueError(f"state is {self.state_S2C.shape}, not {S} x 2 x channels")
        found = self.channels and library()
        self._filter = filter_of(found) if found else self._filter_by_scipy
        self._rest = _Filter(self.channels, S, self.sos_S6.ctypes.data, self.state_S2C.ctypes.data)
        self._at = ctypes.addressof(self._rest)

    @property
    def state_S2C(self) -> np.ndarray:
        return self._state_S2C

    @state_S2C.setter
    def state_S2C(self, state_S2C: np.ndarray) -> None:  # into the memory whose address the C++ has
        if np.shape(state_S2C) != self.state_S2C.shape:
            raise ValueError(f"state is {np.shape(state_S2C)}, not {self.state_S2C.shape}")
        self._state_S2C[:] = state_S2C

    def __call__(self, x_CT: np.ndarray) -> np.ndarray:
        x_CT = np.ascontiguousarray(x_CT, np.float64)
        C, T = x_CT.shape
        if C != self.channels:
            raise ValueError(f"{C} channels, not {self.channels}")
        y_CT = np.empty((C, T))
        self._filter(x_CT, y_CT, self._at)
        return y_CT

    def _filter_by_scipy(self, x_CT: np.ndarray, y_CT: np.ndarray, at: int) -> None:
        import scipy.signal  # here, because it takes a second to import

        if x_CT.size:
            y_CT[:], zi_SC2 = scipy.signal.sosfilt(self.sos_S6, x_CT, axis=1, zi=self.state_S2C.swapaxes(1, 2))
            self.state_S2C[:] = zi_SC2.swapaxes(1, 2)

    def __reduce__(self):  # for copies and other processes
        return Sections, (self.sos_S6, self.state_S2C)


class _LiveSignal(ctypes.Structure):
    """As in csrc/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("announced", "channels", "sections")),
        *((name, ctypes.c_void_p) for name in ("taken", "sos", "state", "last")),
        *((name, ctypes.c_double) for name in ("factor", "limit")),
    ]


class Live:
    """
    What a live signal needs for each chunk, in one call instead of a dozen of NumPy's, with the same bits.

    take(x_TA, raw_at, y_at) writes the taken channels times `factor` to the float32 rows at address raw_at, those through `sections` (which
    may be none) to the float64 rows at y_at, and the newest sample to last_C; at most `most` samples. If a sample isn't finite or beyond
    `limit` it returns False: then the sections haven't moved. Not to be made where library() is None.
    """

    def __init__(
        self,
        sections: Sections | None,
        announced: int,
        taken_C: np.ndarray | None,
        factor: float,
        limit: float,
        last_C: np.ndarray,
        most: int,
    ):
        taken_C = None if taken_C is None else np.ascontiguousarray(taken_C, np.int64)
        self.x_TA = np.empty((most, announced), np.float32)
        self._kept = sections, taken_C, last_C  # whose memory is written to
        filter_3 = (
            (len(sections.sos_S6), sections.sos_S6.ctypes.data, sections.state_S2C.ctypes.data)
            if sections
            else (0, 0, 0)
        )
        self._signal = _LiveSignal(
            announced,
            len(last_C),
            filter_3[0],
            None if taken_C is None else taken_C.ctypes.data,
            *filter_3[1:],
            last_C.ctypes.data,
            factor,
            limit,
        )
        self._take, self._x, self._rest = library().berger_take, self.x_TA.ctypes.data, ctypes.addressof(self._signal)

    def take(self, x_TA: np.ndarray, raw_at: int, y_at: int) -> bool:
        T = len(x_TA)
        self.x_TA[:T] = x_TA
        return bool(self._take(self._x, T, raw_at, y_at, self._rest))


class _LiveWindow(ctypes.Structure):
    """As in csrc/kernels.h."""

    _fields_ = [
        ("channels", ctypes.c_int64),
        ("wanted", ctypes.c_int64),
        ("row", ctypes.c_void_p),
        ("reference", ctypes.c_int64),
        ("factor", ctypes.c_double),
    ]


MEAN_OF_ALL, NO_REFERENCE = -1, -2


class Cutter:
    """
    Windows for a model out of filtered samples: less a row, the mean of all rows or nothing, times `factor`, wanted rows, float32.

    cutter(y_at, T) of the float64 rows (T, C) at an address is x_WT; `row_W` below 0 are zero. With NumPy's bits. Not to be made where
    library() is None.
    """

    def __init__(self, channels: int, row_W: np.ndarray, reference: int, factor: float):
        self._row_W = np.ascontiguousarray(row_W, np.int64)
        shape = (channels, len(self._row_W), self._row_W.ctypes.data, reference, factor)
        self._window, self._cut = _LiveWindow(*shape), library().berger_cut
        self._rest = ctypes.addressof(self._window)

    def __call__(self, y_at: int, samples: int) -> np.ndarray:
        x_WT = np.empty((len(self._row_W), samples), np.float32)
        self._cut(y_at, samples, self._rest, byref(start(x_WT)))
        return x_WT


byref, start = ctypes.byref, ctypes.c_char.from_buffer  # where an array begins; a third of the time of x.ctypes
