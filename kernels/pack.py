"""
The loops that building a cache spends its time in: what they mean, in NumPy, and the C++ that runs instead where it can be built.

Both give the same bits, so a cache doesn't show which of them made it. Without a compiler, or with BERGER_KERNELS=0, NumPy does the work,
and a build takes two to four times as long.

Shapes: C channels, T samples, R records, N samples per record or half of an extended signal, J taps, M grid points, K outputs.
"""

import ctypes
import zlib

import numpy as np

from kernels.plain import library

BLOCK = 1 << 13  # columns at a time: small enough for the processor's cache
FLOAT16_MAX = float(np.finfo(np.float16).max)


def call(name: str, *arguments) -> None:
    """Run one of the C++ loops; arrays go as pointers, the rest as int64."""
    getattr(library(), "berger_" + name)(*map(_c, arguments))


def _c(argument):
    return ctypes.c_void_p(argument.ctypes.data) if isinstance(argument, np.ndarray) else ctypes.c_int64(argument)


def digits(
    block: np.ndarray, records: int, record_bytes: int, sample_bytes: int, offset: int, samples: int
) -> np.ndarray:
    """Integers of 2 or 3 bytes, little-endian, (records, samples), from `offset` on; of three the upper part of overlapping fours."""
    if sample_bytes == 2:
        return np.ndarray((records, samples), "<i2", block, offset, (record_bytes, 2))
    return np.ndarray((records, samples), "<i4", block, offset - 1, (record_bytes, 3)) >> 8


def decode(
    block: np.ndarray, record_bytes: int, sample_bytes: int, offset_C, gain_C, bias_C, x_CRN: np.ndarray
) -> None:
    """x = digits * gain + bias, float32, of signals that start at `offset_C` (bytes, 1 or more) in the first of the records."""
    C, R, N = x_CRN.shape
    gain_C, bias_C = np.asarray(gain_C, np.float32), np.asarray(bias_C, np.float32)
    if library():
        sizes = (R, record_bytes, sample_bytes, C)
        call("decode", block, *sizes, np.asarray(offset_C, np.int64), N, gain_C, bias_C, x_CRN.strides[0] // 4, x_CRN)
        return
    for x_RN, offset, gain, bias in zip(x_CRN, offset_C, gain_C, bias_C, strict=True):
        x_RN[...] = digits(block, R, record_bytes, sample_bytes, offset, N)
        x_RN *= gain
        x_RN += bias


def extend(x_CT: np.ndarray, left: int, points: int, offset_C: np.ndarray) -> np.ndarray:
    """x - offset, reflected about its first and last sample, zeros beyond: MNE's 'reflect_limited', `points` in all."""
    T = x_CT.shape[1]
    stop = left + T
    a, b = min(left, T - 1), min(points - stop, T - 1)
    y_CT = np.empty((len(x_CT), points), x_CT.dtype)
    np.subtract(x_CT, offset_C[:, None], out=y_CT[:, left:stop])
    np.subtract(2 * y_CT[:, left : left + 1], y_CT[:, left + 1 : left + 1 + a][:, ::-1], out=y_CT[:, left - a : left])
    np.subtract(2 * y_CT[:, stop - 1 : stop], y_CT[:, stop - 1 - b : stop - 1][:, ::-1], out=y_CT[:, stop : stop + b])
    y_CT[:, : left - a] = y_CT[:, stop + b :] = 0
    return y_CT


def halve(x_CT: np.ndarray, left: int, points: int, offset_C: np.ndarray, taps_J: np.ndarray) -> np.ndarray:
    """
    Every second sample of the circular, extended x after a half-band low-pass, float32 (C, points / 2).

    y[n] = e[2n] / 2 + sum over j of taps[j] (e[2n + 2j + 1] + e[2n - 2j - 1]), where e = extend(x, left, points, offset). Where all of
    the sum lies in a reflection, y[n] is the reflection of another y, equal but for its rounding.
    """
    y_CN = np.empty((len(x_CT), points // 2), np.float32)
    if library():
        x_CT, offset_C = _rows(x_CT), np.ascontiguousarray(offset_C, np.float32)
        sizes = (*x_CT.shape, x_CT.strides[0] // 4, left, points)
        call("halve", x_CT, *sizes, offset_C, np.ascontiguousarray(taps_J, np.float32), len(taps_J), y_CN)
        return y_CN
    e_CT, J, N = extend(x_CT, left, points, offset_C), len(taps_J), points // 2
    odd_CN = np.take(e_CT, np.arange(1 - 2 * J, points + 2 * J, 2), axis=1, mode="wrap")
    for n in range(0, N, BLOCK):
        y = y_CN[:, n : n + BLOCK]
        np.multiply(e_CT[:, 2 * n : 2 * (n + BLOCK) : 2], np.float32(0.5), out=y)
        for j, tap in enumerate(taps_J):
            after = odd_CN[:, n + J + j :][:, : y.shape[1]]
            y += tap * (after + odd_CN[:, n + J - 1 - j :][:, : y.shape[1]])
    T, reach, last = x_CT.shape[1], 2 * J - 1, left + x_CT.shape[1] - 1
    twice = np.float32(1)  # twice the gain at 0 Hz
    for tap in np.asarray(taps_J, np.float32):
        twice += 4 * tap
    for pivot, low, high in ((left, max(left - T + 1, 0), left), (last, last, min(last + T - 1, points - 1))):
        first, stop = (low + reach + 1) // 2, (high - reach) // 2 + 1
        if first < stop:
            mirror_CN = y_CN[:, pivot - stop + 1 : pivot - first + 1]
            y_CN[:, first:stop] = twice * e_CT[:, pivot : pivot + 1] - mirror_CN[:, ::-1]
    return y_CN


def _rows(x_CT: np.ndarray) -> np.ndarray:
    """x as float32 whose rows are contiguous."""
    x_CT = np.asarray(x_CT, np.float32)
    return x_CT if x_CT.strides[1] == 4 and x_CT.strides[0] % 4 == 0 else np.ascontiguousarray(x_CT)


def interpolate(x_CM: np.ndarray, period: int, first: int, outputs: int, polynomials_D8: np.ndarray) -> np.ndarray:
    """
    The circular x between its samples: y[k] = x at the place (first + k) M / period, float32 (C, outputs).

    The eight samples around a place are weighted by polynomials of its fraction - 1/2, lowest power first.
    """
    x_CM, polynomials_D8 = np.ascontiguousarray(x_CM, np.float32), np.ascontiguousarray(polynomials_D8, np.float32)
    y_CK = np.empty((len(x_CM), outputs), np.float32)
    if library():
        call("interpolate", x_CM, *x_CM.shape, period, first, outputs, polynomials_D8, len(polynomials_D8) - 1, y_CK)
        return y_CK
    for k in range(0, outputs, BLOCK):
        y = y_CK[:, k : k + BLOCK]
        at_K, rest_K = np.divmod((first + k + np.arange(y.shape[1])) * x_CM.shape[1], period)
        fraction_K1 = (rest_K.astype(np.float32) / np.float32(period) - np.float32(0.5))[:, None]
        taps_K8 = polynomials_D8[-1]
        for p_8 in polynomials_D8[-2::-1]:
            taps_K8 = taps_K8 * fraction_K1 + p_8
        v_CK8 = np.take(x_CM, at_K[:, None] + np.arange(-3, 5), axis=1, mode="wrap") * taps_K8
        v_CK4 = v_CK8[..., :4] + v_CK8[..., 4:]
        v_CK2 = v_CK4[..., :2] + v_CK4[..., 2:]
        y[...] = v_CK2[..., 0] + v_CK2[..., 1]
    return y_CK


def order_statistics(x_CT: np.ndarray, ranks: list[int]) -> np.ndarray:
    """The values at `ranks` (ascending) of every sorted row, float32 (C, ranks)."""
    if library():
        x_CT, y_CR = _rows(x_CT), np.empty((len(x_CT), len(ranks)), np.float32)
        sizes = (*x_CT.shape, x_CT.strides[0] // 4)
        call("order_statistics", x_CT, *sizes, np.asarray(ranks, np.int64), len(ranks), y_CR)
        return y_CR
    return np.sort(np.asarray(x_CT, np.float32), axis=1)[:, ranks]  # quicker than partition at several places


def pack(y_CK: np.ndarray, offset_C: np.ndarray, scale_C: np.ndarray) -> np.ndarray:
    """(y - offset) / scale as float16, time-major (K, C), clipped to what float16 holds."""
    z_KC = np.empty(y_CK.shape[::-1], np.float16)
    y_CK, offset_C, scale_C = _rows(y_CK), np.asarray(offset_C, np.float32), np.asarray(scale_C, np.float32)
    if library():
        call("pack", y_CK, *y_CK.shape, y_CK.strides[0] // 4, offset_C, scale_C, z_KC)
        return z_KC
    for k in range(0, len(z_KC), BLOCK):
        z_CB = (y_CK[:, k : k + BLOCK] - offset_C[:, None]) / scale_C[:, None]
        z_KC[k : k + BLOCK] = np.clip(z_CB, -FLOAT16_MAX, FLOAT16_MAX).T
    return z_KC


def crc32(data, crc: int = 0) -> int:
    """zlib.crc32 of bytes, several times as fast."""
    data = np.frombuffer(data, np.uint8)
    whole, remainder = len(data) // 64 * 64, np.empty(16, np.uint8)
    if whole and library() and library().berger_crc_remainder(*map(_c, (data, whole, crc ^ 0xFFFFFFFF, remainder))):
        data, crc = data[whole:], zlib.crc32(remainder, 0xFFFFFFFF)
    return zlib.crc32(data, crc)
