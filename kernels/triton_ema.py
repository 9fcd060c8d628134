"""
The teacher's moving average over all parameters in one Triton launch; meaning in kernels/reference.py.

Bytes: each element of teacher and student is read once, each of teacher and copy written once: 12 for float32, 12 too with
bfloat16 weights (4 + 2 read, 4 + 2 written) and their float32 master. On top of that come 32 for each block of 4096 elements.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels import reference

BLOCK = 4096


@triton.jit
def average(t_ptrs, s_ptrs, c_ptrs, mask, momentum, weight, WIDE: tl.constexpr):
    t, s = tl.load(t_ptrs, mask), tl.load(s_ptrs, mask).to(t_ptrs.dtype.element_ty).to(WIDE)
    momentum, weight = tl.cast(momentum, WIDE), tl.cast(weight, WIDE)
    away = s - t.to(WIDE)
    t = tl.where(weight < 0.5, t.to(WIDE) + weight * away, s - momentum * away).to(t.dtype)  # as torch.lerp
    tl.store(t_ptrs, t, mask)
    if c_ptrs is not None:
        tl.store(c_ptrs, t.to(c_ptrs.dtype.element_ty), mask)


@triton.jit
def ema_kernel(
    table_ptr,
    momentum: tl.float64,
    weight: tl.float64,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    COPY: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of the table is a block: the addresses of its first elements of teacher, student and copy, and how many there are."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 4
    t_ptr = tl.load(row_ptr).to(tl.pointer_type(TEACHER))
    s_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(STUDENT))
    c_ptr = None if COPY is None else tl.load(row_ptr + 2).to(tl.pointer_type(COPY))
    if ALIGNED:  # so that a thread moves 16 bytes at once, where no mask forbids it
        t_ptr, s_ptr = tl.multiple_of(t_ptr, 16), tl.multiple_of(s_ptr, 16)
        c_ptr = None if COPY is None else tl.multiple_of(c_ptr, 16)
    i = tl.arange(0, BLOCK)
    t_ptrs, s_ptrs, c_ptrs = t_ptr + i, s_ptr + i, None if COPY is None else c_ptr + i
    count = tl.load(row_ptr + 3)
    if count == BLOCK:
        average(t_ptrs, s_ptrs, c_ptrs, None, momentum, weight, WIDE)
    else:
        average(t_ptrs, s_ptrs, c_ptrs, i < count, momentum, weight, WIDE)


@lru_cache(maxsize=8)
def table(tensors: tuple[tuple[int, int, int, int], ...], sizes: tuple[int, int, int], device: torch.device):
    """Rows for the addresses and lengths of `tensors`, sizes in bytes of an element, and whether all of them are aligned."""
    rows = [
        (t + i * sizes[0], s + i * sizes[1], c + i * sizes[2], min(n - i, BLOCK))
        for t, s, c, n in tensors
        for i in range(0, n, BLOCK)
    ]
    aligned = all(address % 16 == 0 for row in rows for address in row[:3])
    return torch.tensor(rows, dtype=torch.int64).to(device), aligned


def ema_(teacher: list[torch.Tensor], student: list[torch.Tensor], momentum: float, copies: list[torch.Tensor]) -> None:
    """In place; arguments as for kernels.ema_. A launch per combination of formats; plain PyTorch for what isn't contiguous."""
    groups: dict[tuple, list] = {}
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        c = copies[i] if copies else None
        if not all(x.is_contiguous() for x in (t, s, t if c is None else c)):
            reference.ema_([t], [s], momentum, [] if c is None else [c])
        elif t.numel():
            key = (t.device, t.dtype, s.dtype, None if c is None else c.dtype)
            groups.setdefault(key, []).append((t.data_ptr(), s.data_ptr(), 0 if c is None else c.data_ptr(), t.numel()))
    for (device, *dtypes), tensors in groups.items():
        formats = [None if dtype is None else getattr(tl, str(dtype).removeprefix("torch.")) for dtype in dtypes]
        wide = tl.float64 if dtypes[0] == torch.float64 else tl.float32
        rows, aligned = table(tuple(tensors), tuple(0 if dtype is None else dtype.itemsize for dtype in dtypes), device)
        with torch.cuda.device_of(rows):
            args = (rows, float(momentum), 1.0 - momentum, *formats)
            options = {"num_warps": 8, "enable_fp_fusion": True}
            ema_kernel[(len(rows),)](*args, WIDE=wide, ALIGNED=aligned, BLOCK=BLOCK, **options)
