"""
Mamba's selective scan in chunks of Q steps, each a few small matrix products, in Triton; meaning in kernels/reference.py.

In a chunk y = exp(-age) (tril(c b') exp(age) u + c h), where age is the sum of fades so far and h the state before the chunk
(Dao & Gu 2024); lib/mamba.py says why no digit is lost. At most 32 steps of a fade of at most 4 are summed, and the middle of the
chunk is the zero of ages, so that nothing leaves float32 unless u b c does beyond 1e10. Sums are made in float32, float64 if u is.
A NaN in u or fade spoils its channel's whole chunk, one in b or c its step; both stay in the state.

Bytes, at e bytes an element: forwards a row's step costs 3 e E + 2 e S (u, fade, y; b and c) however long it is. Backwards, too,
everything is read once and written once, 5 e E + 4 e S, if there is one chunk: L <= 32; y isn't read. Of several chunks the states
before each and the gradients of those after each are found first, at 4 e E + 2 e S, written and read at 4 w S E / Q, w being 4 or 8.
Registers hold 16 states a channel, 32 in a single chunk; more works too, but spills.

Shapes: R rows, L steps, E channels (the first `ahead` forwards, the others backwards), S states, N chunks, Q steps of a chunk.
"""

import torch
import triton
import triton.language as tl

from kernels.reference import MOST as MOST_FADE

MOST = tl.constexpr(MOST_FADE)


@triton.jit
def part_of(part, ahead, E, BLOCK: tl.constexpr):
    """The channels of a block, which of them there are, and whether they run backwards: no block has both kinds."""
    parts_ahead = tl.cdiv(ahead, BLOCK)
    back = part >= parts_ahead
    start = tl.where(back, ahead + (part - parts_ahead) * BLOCK, part * BLOCK)
    e = start + tl.arange(0, BLOCK)
    return e, e < tl.where(back, E, ahead), back


@triton.jit
def ages_of(fade_QE, back):
    """Ages at each step in running direction, from the middle of the chunk, and half of what fades in all."""
    sum_QE, all_E = tl.cumsum(fade_QE, 0), tl.sum(fade_QE, 0)
    return tl.where(back, all_E[None, :] - sum_QE + fade_QE, sum_QE) - all_E[None, :] / 2, all_E[None, :] / 2


@triton.jit
def tile_of(ptr, row, step, stride_r, stride_l, q, x):
    """Addresses of a row's steps from `step` on; only what many rows or steps add up to takes 64 bits."""
    return ptr + (row * stride_r + step * stride_l) + (q[:, None] * stride_l + x[None, :])


@triton.jit
def scan_kernel(
    u_ptr,
    fade_ptr,
    b_ptr,
    c_ptr,
    y_ptr,
    states_ptr,
    L,
    E,
    S,
    ahead,
    u_r,
    u_l,
    fade_r,
    fade_l,
    b_r,
    b_l,
    c_r,
    c_l,
    ADJOINT: tl.constexpr,
    OUTPUT: tl.constexpr,
    WIDE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
):
    """
    A block of a row's channels, chunk by chunk: OUTPUT writes y, else the state before each chunk is written.

    ADJOINT takes the gradient of y for u and c for b, and runs the other way: its states are gradients of the states after each chunk.
    """
    row = tl.program_id(0).to(tl.int64)
    e, real_E, back = part_of(tl.program_id(1), ahead, E, BLOCK)
    q, s = tl.arange(0, STEPS), tl.arange(0, STATES)
    real_S = s < S
    chunks = tl.cdiv(L, STEPS)
    h_SE = tl.full([STATES, BLOCK], 0, WIDE)
    for i in range(chunks):
        chunk = tl.where(back != ADJOINT, chunks - 1 - i, i)
        step = chunk.to(tl.int64) * STEPS
        real_Q = q < L - step
        mask_QE, mask_QS = real_Q[:, None] & real_E[None, :], real_Q[:, None] & real_S[None, :]
        u_QE = tl.load(tile_of(u_ptr, row, step, u_r, u_l, q, e), mask_QE, 0).to(WIDE)
        fade_QE = tl.load(tile_of(fade_ptr, row, step, fade_r, fade_l, q, e), mask_QE, 0).to(WIDE)
        b_QS = tl.load(tile_of(b_ptr, row, step, b_r, b_l, q, s), mask_QS, 0).to(WIDE)
        age_QE, half_1E = ages_of(tl.minimum(fade_QE, MOST), back)
        kept_1E = tl.exp(-half_1E)
        grown_QE = tl.exp(-age_QE if ADJOINT else age_QE) * u_QE
        if OUTPUT:
            c_QS = tl.load(tile_of(c_ptr, row, step, c_r, c_l, q, s), mask_QS, 0).to(WIDE)
            cb_QQ = tl.dot(c_QS, tl.trans(b_QS), input_precision="ieee", out_dtype=WIDE)
            earlier_QQ = tl.where(back, q[None, :] >= q[:, None], q[None, :] <= q[:, None])
            y_QE = tl.dot(tl.where(earlier_QQ, cb_QQ, 0), grown_QE, input_precision="ieee", out_dtype=WIDE)
            y_QE += kept_1E * tl.dot(c_QS, h_SE, input_precision="ieee", out_dtype=WIDE)
            y_QE = (tl.exp(-age_QE) * y_QE).to(y_ptr.dtype.element_ty)
            tl.store(tile_of(y_ptr, row, step, L * E, E, q, e), y_QE, mask_QE)
        else:
            state_ptrs = tile_of(states_ptr, row * chunks + chunk, 0, S * E, E, s, e)
            tl.store(state_ptrs, h_SE, real_S[:, None] & real_E[None, :])
        new_SE = tl.dot(tl.trans(b_QS), grown_QE, input_precision="ieee", out_dtype=WIDE)
        h_SE = kept_1E * (kept_1E * h_SE + new_SE)


def with_unit_stride(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def tiles(u_RLE: torch.Tensor, states: int, ahead: int) -> tuple[int, dict]:
    """Number of blocks of channels, and the sizes of one."""
    E, L = u_RLE.shape[2], u_RLE.shape[1]
    steps, block = 16 if L <= 16 else 32, 16 if max(ahead, E - ahead) <= 16 else 32
    tile = {"WIDE": tl.float64 if u_RLE.dtype == torch.float64 else tl.float32, "STEPS": steps, "BLOCK": block}
    tile |= {
        "STATES": max(triton.next_power_of_2(states), 16),
        "num_warps": steps * block // 128,
        "enable_fp_fusion": True,
    }
    return triton.cdiv(ahead, block) + triton.cdiv(E - ahead, block), tile


def selective_scan(
    u_RLE: torch.Tensor, fade_RLE: torch.Tensor, b_RLS: torch.Tensor, c_RLS: torch.Tensor, ahead: int
) -> torch.Tensor:
    """y_RLE; arguments as for kernels.selective_scan."""
    (R, L, E), S = u_RLE.shape, b_RLS.shape[2]
    y_RLE = torch.empty_like(u_RLE, memory_format=torch.contiguous_format)
    if y_RLE.numel():
        inputs = with_unit_stride(u_RLE, fade_RLE, b_RLS, c_RLS)
        strides = [stride for x in inputs for stride in x.stride()[:2]]
        parts, tile = tiles(u_RLE, S, ahead)
        with torch.cuda.device_of(u_RLE):
            scan_kernel[(R, parts)](*inputs, y_RLE, None, L, E, S, ahead, *strides, ADJOINT=False, OUTPUT=True, **tile)
    return y_RLE


@triton.jit
def scan_backward_kernel(
    gy_ptr,
    u_ptr,
    fade_ptr,
    b_ptr,
    c_ptr,
    before_ptr,
    gafter_ptr,
    gu_ptr,
    gfade_ptr,
    gb_ptr,
    gc_ptr,
    L,
    E,
    S,
    ahead,
    parts,
    gy_r,
    gy_l,
    u_r,
    u_l,
    fade_r,
    fade_l,
    b_r,
    b_l,
    c_r,
    c_l,
    ALONE: tl.constexpr,
    WIDE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
):
    """All gradients of a row's chunk; ALONE says that the row has no other, so that no state comes in or goes out."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, s = tl.arange(0, STEPS), tl.arange(0, STATES)
    step = chunk.to(tl.int64) * STEPS
    real_Q = q < L - step
    mask_QS = real_Q[:, None] & (s < S)[None, :]
    b_QS = tl.load(tile_of(b_ptr, row, step, b_r, b_l, q, s), mask_QS, 0).to(WIDE)
    c_QS = tl.load(tile_of(c_ptr, row, step, c_r, c_l, q, s), mask_QS, 0).to(WIDE)
    cb_QQ = tl.dot(c_QS, tl.trans(b_QS), input_precision="ieee", out_dtype=WIDE)
    gcb_QQ = tl.full([STEPS, STEPS], 0, WIDE)
    gb_QS, gc_QS = tl.full([STEPS, STATES], 0, WIDE), tl.full([STEPS, STATES], 0, WIDE)
    for part in range(parts):
        e, real_E, back = part_of(part, ahead, E, BLOCK)
        mask_QE = real_Q[:, None] & real_E[None, :]
        gy_QE = tl.load(tile_of(gy_ptr, row, step, gy_r, gy_l, q, e), mask_QE, 0).to(WIDE)
        u_QE = tl.load(tile_of(u_ptr, row, step, u_r, u_l, q, e), mask_QE, 0).to(WIDE)
        fade_QE = tl.load(tile_of(fade_ptr, row, step, fade_r, fade_l, q, e), mask_QE, 0).to(WIDE)
        age_QE, half_1E = ages_of(tl.minimum(fade_QE, MOST), back)
        grow_QE, shrink_QE = tl.exp(age_QE), tl.exp(-age_QE)
        grown_QE, gsum_QE = grow_QE * u_QE, shrink_QE * gy_QE
        earlier_QQ = tl.where(back, q[None, :] >= q[:, None], q[None, :] <= q[:, None])
        seen_QQ = tl.where(earlier_QQ, cb_QQ, 0)
        sum_QE = tl.dot(seen_QQ, grown_QE, input_precision="ieee", out_dtype=WIDE)
        ggrown_QE = tl.dot(tl.trans(seen_QQ), gsum_QE, input_precision="ieee", out_dtype=WIDE)
        gseen_QQ = tl.dot(gsum_QE, tl.trans(grown_QE), input_precision="ieee", out_dtype=WIDE)
        gcb_QQ += tl.where(earlier_QQ, gseen_QQ, 0)  # where not, it may be infinite
        gall_1E = tl.full([1, BLOCK], 0, WIDE)
        if not ALONE:
            states = tile_of(0, row * tl.num_programs(1) + chunk, 0, S * E, E, s, e)
            mask_SE, kept_1E = (s < S)[:, None] & real_E[None, :], tl.exp(-half_1E)
            before_SE = kept_1E * tl.load(before_ptr + states, mask_SE, 0)
            gafter_SE = kept_1E * tl.load(gafter_ptr + states, mask_SE, 0)
            sum_QE += tl.dot(c_QS, before_SE, input_precision="ieee", out_dtype=WIDE)
            ggrown_QE += tl.dot(b_QS, gafter_SE, input_precision="ieee", out_dtype=WIDE)
            gc_QS += tl.dot(gsum_QE, tl.trans(before_SE), input_precision="ieee", out_dtype=WIDE)
            gb_QS += tl.dot(grown_QE, tl.trans(gafter_SE), input_precision="ieee", out_dtype=WIDE)
            after_SE = before_SE + tl.dot(tl.trans(b_QS), grown_QE, input_precision="ieee", out_dtype=WIDE)
            gall_1E -= tl.sum(gafter_SE * after_SE, 0)[None, :]
        gu_QE = grow_QE * ggrown_QE
        gage_QE = gu_QE * u_QE - gsum_QE * sum_QE  # u grows with its age, y shrinks
        later_QE, all_1E = tl.cumsum(gage_QE, 0), tl.sum(gage_QE, 0)[None, :]
        gfade_QE = gall_1E + tl.where(back, later_QE, all_1E - later_QE + gage_QE)
        gfade_QE = tl.where(fade_QE > MOST, 0, gfade_QE)
        out = tile_of(0, row, step, L * E, E, q, e)
        tl.store(gu_ptr + out, gu_QE.to(gu_ptr.dtype.element_ty), mask_QE)
        tl.store(gfade_ptr + out, gfade_QE.to(gfade_ptr.dtype.element_ty), mask_QE)
    gb_QS += tl.dot(tl.trans(gcb_QQ), c_QS, input_precision="ieee", out_dtype=WIDE)
    gc_QS += tl.dot(gcb_QQ, b_QS, input_precision="ieee", out_dtype=WIDE)
    out = tile_of(0, row, step, L * S, S, q, s)
    tl.store(gb_ptr + out, gb_QS.to(gb_ptr.dtype.element_ty), mask_QS)
    tl.store(gc_ptr + out, gc_QS.to(gc_ptr.dtype.element_ty), mask_QS)


def selective_scan_backward(
    grad_RLE: torch.Tensor,
    u_RLE: torch.Tensor,
    fade_RLE: torch.Tensor,
    b_RLS: torch.Tensor,
    c_RLS: torch.Tensor,
    y_RLE: torch.Tensor,
    ahead: int,
) -> tuple[torch.Tensor, ...]:
    """Gradients of u, fade, b and c, given that of y; y itself isn't needed here."""
    (R, L, E), S = u_RLE.shape, b_RLS.shape[2]
    inputs = with_unit_stride(grad_RLE, u_RLE, fade_RLE, b_RLS, c_RLS)
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[1:])
    if not u_RLE.numel():
        return tuple(g.zero_() for g in gradients)
    parts, tile = tiles(u_RLE, S, ahead)
    chunks, wide = triton.cdiv(L, tile["STEPS"]), torch.promote_types(u_RLE.dtype, torch.float32)
    gy, u, fade, b, c = ((x, *x.stride()[:2]) for x in inputs)
    before = gafter = None
    with torch.cuda.device_of(u_RLE):
        if chunks > 1:
            before, gafter = (u_RLE.new_empty(R, chunks, S, E, dtype=wide) for _ in range(2))
            for adjoint, x, w, states in ((False, u, b, before), (True, gy, c, gafter)):
                args = (x[0], fade[0], w[0], None, None, states, L, E, S, ahead, *x[1:], *fade[1:], *w[1:], 0, 0)
                scan_kernel[(R, parts)](*args, ADJOINT=adjoint, OUTPUT=False, **tile)
        strides = [stride for x in inputs for stride in x.stride()[:2]]
        args = (*inputs, before, gafter, *gradients, L, E, S, ahead, parts, *strides)
        scan_backward_kernel[(R, chunks)](*args, ALONE=chunks == 1, **tile)
    return gradients
