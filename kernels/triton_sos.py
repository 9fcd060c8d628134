"""
Second-order sections over a stream, all in float64, in two Triton kernels; meaning in kernels/reference.py.

Short chunks take the recurrence, step by step, a channel per thread. From BLOCK samples on, whole blocks take the linear map of
reference.sos_block instead, which a GPU's lanes can share; the recurrence, run on unit vectors, makes that map on the device.
One block follows the other, because the state does.

Bytes: each sample is read once and written once (8 in float32), each state too (16 for a section of a channel). On top of that come,
once per call, the sections, and from BLOCK samples on the map (up to 64 x 64 float64), from the cache for all but the first of the
programs. A NaN spoils its own channel from there on; in blocks also the up to 31 samples before it in its block.

Shapes: C channels, T samples, S sections, Q samples of a block.
"""

import torch
import triton
import triton.language as tl

BLOCK = 32


@triton.jit
def sos_kernel(x_ptr, sos_ptr, state_ptr, y_ptr, C, T, x_c, x_t, y_c, y_t, SECTIONS: tl.constexpr, LANES: tl.constexpr):
    """The recurrence: direct form II transposed, the state in registers."""
    c = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = c < C
    b0, b1, b2, a1, a2, z1, z2 = (), (), (), (), (), (), ()
    for s in tl.static_range(SECTIONS):
        b0 += (tl.load(sos_ptr + 6 * s),)
        b1 += (tl.load(sos_ptr + 6 * s + 1),)
        b2 += (tl.load(sos_ptr + 6 * s + 2),)
        a1 += (tl.load(sos_ptr + 6 * s + 4),)
        a2 += (tl.load(sos_ptr + 6 * s + 5),)
        z1 += (tl.load(state_ptr + 2 * s * C + c, mask, 0),)
        z2 += (tl.load(state_ptr + (2 * s + 1) * C + c, mask, 0),)
    x_ptrs, y_ptrs = x_ptr + c * x_c, y_ptr + c * y_c
    for _ in range(T):
        x = tl.load(x_ptrs, mask, 0).to(tl.float64)
        new1, new2 = (), ()
        for s in tl.static_range(SECTIONS):
            y = b0[s] * x + z1[s]
            new1 += (b1[s] * x - a1[s] * y + z2[s],)
            new2 += (b2[s] * x - a2[s] * y,)
            x = y
        z1, z2 = new1, new2
        tl.store(y_ptrs, x.to(y_ptr.dtype.element_ty), mask)
        x_ptrs, y_ptrs = x_ptrs + x_t, y_ptrs + y_t
    for s in tl.static_range(SECTIONS):
        tl.store(state_ptr + 2 * s * C + c, z1[s], mask)
        tl.store(state_ptr + (2 * s + 1) * C + c, z2[s], mask)


@triton.jit
def sos_block_kernel(
    x_ptr,
    map_ptr,
    state_ptr,
    y_ptr,
    C,
    T,
    x_c,
    x_t,
    y_c,
    SECTIONS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """T samples, a multiple of BLOCK; STATES is a power of two, at least 2 SECTIONS. Signals and states are rows here."""
    WIDTH: tl.constexpr = BLOCK + 2 * SECTIONS
    c = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    q = tl.arange(0, BLOCK).to(tl.int64)
    s = tl.arange(0, STATES)
    lanes, real = (c < C)[:, None], s < 2 * SECTIONS
    x_to_y = tl.load(map_ptr + q[:, None] + q[None, :] * WIDTH)
    x_to_z = tl.load(map_ptr + q[:, None] + (BLOCK + s)[None, :] * WIDTH, real[None, :], 0)
    z_to_y = tl.load(map_ptr + (BLOCK + s)[:, None] + q[None, :] * WIDTH, real[:, None], 0)
    z_to_z = tl.load(map_ptr + (BLOCK + s)[:, None] + (BLOCK + s)[None, :] * WIDTH, real[:, None] & real[None, :], 0)
    z_ptrs = state_ptr + s[None, :] * C + c[:, None]
    z = tl.load(z_ptrs, lanes & real[None, :], 0)
    for t in range(0, T, BLOCK):
        x = tl.load(x_ptr + c[:, None] * x_c + (t + q)[None, :] * x_t, lanes, 0).to(tl.float64)
        y = tl.dot(x, x_to_y, out_dtype=tl.float64) + tl.dot(z, z_to_y, out_dtype=tl.float64)
        z = tl.dot(x, x_to_z, out_dtype=tl.float64) + tl.dot(z, z_to_z, out_dtype=tl.float64)
        tl.store(y_ptr + c[:, None] * y_c + (t + q)[None, :], y.to(y_ptr.dtype.element_ty), lanes)
    tl.store(z_ptrs, z, lanes & real[None, :])


def sos_stream(x_CT: torch.Tensor, sos_S6: torch.Tensor, state_S2C: torch.Tensor) -> torch.Tensor:
    """y_CT, the state updated in place; arguments as for kernels.sos_stream."""
    (C, T), S = x_CT.shape, len(sos_S6)
    y_CT = torch.empty_like(x_CT, memory_format=torch.contiguous_format)
    if not y_CT.numel():
        return y_CT
    sos_S6, z_S2C = sos_S6.contiguous(), state_S2C.contiguous()
    steps, few = T // BLOCK * BLOCK, {"SECTIONS": S, "LANES": 32, "num_warps": 1, "enable_fp_fusion": True}
    with torch.cuda.device_of(x_CT):
        if steps:
            width = BLOCK + 2 * S
            map_WW = torch.eye(width, dtype=torch.float64, device=x_CT.device)  # column w: a unit of sample or state w
            unit = (map_WW, sos_S6, map_WW[BLOCK:], map_WW, width, BLOCK, 1, width, 1, width)
            sos_kernel[(triton.cdiv(width, 32),)](*unit, **few)
            args = (x_CT, map_WW, z_S2C, y_CT, C, steps, *x_CT.stride(), T)
            tile = {"STATES": max(triton.next_power_of_2(2 * S), 16), "BLOCK": BLOCK, "LANES": 16}
            sos_block_kernel[(triton.cdiv(C, 16),)](*args, SECTIONS=S, **tile, enable_fp_fusion=True)
        if steps < T:
            rest = (x_CT[:, steps:], sos_S6, z_S2C, y_CT[:, steps:], C, T - steps, *x_CT.stride(), T, 1)
            sos_kernel[(triton.cdiv(C, 32),)](*rest, **few)
    if z_S2C is not state_S2C:
        state_S2C.copy_(z_S2C)
    return y_CT
