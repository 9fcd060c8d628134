"""
Tokens taken from their windows, with the codes of their places added: a Triton kernel each way; meaning in kernels/reference.py.

Bytes, at e bytes an element of x, space, time, z and their gradients: forwards a token costs 8 (its id) + 2 e D (x read, z written),
and each code that is used is read from memory once. Backwards a token costs 8 (its rank) + e D, and each row of the gradients is
written once, with 8 to say which tokens it sums; torch sorts the ids before. No atomics: the sums are the same in every run.

Shapes: B windows, C channels, P patches per channel, N = C * P tokens, K tokens taken, X = N or K, D width.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def embed_kernel(
    x_ptr,
    space_ptr,
    time_ptr,
    ids_ptr,
    z_ptr,
    tokens,
    K,
    D,
    patches,
    x_b,
    x_n,
    space_b,
    space_c,
    time_p,
    TAKEN: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = token < tokens
    mask = inside[:, None] & (d < D)[None, :]
    id = tl.load(ids_ptr + token, inside, 0)
    window = token // K
    row = token % K if TAKEN else id
    x = tl.load(x_ptr + (window * x_b + row * x_n)[:, None] + d[None, :], mask)
    space = tl.load(space_ptr + (window * space_b + id // patches * space_c)[:, None] + d[None, :], mask)
    time = tl.load(time_ptr + (id % patches * time_p)[:, None] + d[None, :], mask)
    z = x.to(WIDE) + (space.to(WIDE) + time.to(WIDE))
    tl.store(z_ptr + token[:, None] * D + d[None, :], z.to(z_ptr.dtype.element_ty), mask)


def embed_tokens(
    x_BXD: torch.Tensor, space_BCD: torch.Tensor, time_PD: torch.Tensor, ids_BK: torch.Tensor, taken: bool
) -> torch.Tensor:
    """z_BKD; arguments as for kernels.embed_tokens."""
    x_BXD, space_BCD, time_PD = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_BXD, space_BCD, time_PD))
    (B, K), D = ids_BK.shape, x_BXD.shape[2]
    dtype = torch.promote_types(torch.promote_types(x_BXD.dtype, space_BCD.dtype), time_PD.dtype)
    z_BKD = x_BXD.new_empty(B, K, D, dtype=dtype)
    if z_BKD.numel():
        strides = (*x_BXD.stride()[:2], *space_BCD.stride()[:2], time_PD.stride(0))
        width = min(triton.next_power_of_2(D), 1024)
        tile = {"WIDE": wide(dtype), "TOKENS": max(2048 // width, 1), "WIDTH": width, "enable_fp_fusion": True}
        grid = (triton.cdiv(B * K, tile["TOKENS"]), triton.cdiv(D, width))
        args = (x_BXD, space_BCD, time_PD, ids_BK.contiguous(), z_BKD, B * K, K, D, len(time_PD), *strides)
        with torch.cuda.device_of(x_BXD):
            embed_kernel[grid](*args, TAKEN=taken, **tile)
    return z_BKD


def wide(dtype: torch.dtype) -> tl.dtype:
    """What sums of this format are made in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def embed_backward_kernel(
    grad_ptr,
    order_ptr,
    first_ptr,
    gx_ptr,
    gspace_ptr,
    K,
    D,
    channels,
    patches,
    grad_b,
    grad_k,
    X: tl.constexpr,
    SPACE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sums of a channel's tokens: one program reads its rows of the gradient, patch by patch, in the order of their ids."""
    channel = tl.program_id(0).to(tl.int64)  # counted over all windows
    window = channel // channels
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = d < D
    sum_channel = tl.full([WIDTH], 0, WIDE)
    stop = tl.load(first_ptr + channel * patches)
    for n in range(channel * patches, (channel + 1) * patches):
        start = stop
        stop = tl.load(first_ptr + n + 1)
        sum_token = tl.full([WIDTH], 0, WIDE)
        for i in range(start, stop):
            row = tl.load(order_ptr + i) - window * K
            sum_token += tl.load(grad_ptr + window * grad_b + row * grad_k + d, mask, 0).to(WIDE)
        if X:
            tl.store(gx_ptr + n * D + d, sum_token.to(gx_ptr.dtype.element_ty), mask)
        sum_channel += sum_token
    if SPACE:
        tl.store(gspace_ptr + channel * D + d, sum_channel.to(gspace_ptr.dtype.element_ty), mask)


def embed_tokens_backward(
    grad_BKD: torch.Tensor,
    ids_BK: torch.Tensor,
    channels: int,
    patches: int,
    need_x: bool,
    need_space: bool,
    need_time: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x_BND, space_BCD and time_PD; arguments as for kernels.reference.embed_tokens_backward."""
    B, K, D = grad_BKD.shape
    gx_BND = grad_BKD.new_empty((B, channels * patches, D) if need_x else 0)
    gspace_BCD = grad_BKD.new_empty((B, channels, D) if need_space else 0)
    gtime_PD = grad_BKD.new_empty(0)
    if gx_BND.numel() or gspace_BCD.numel():
        grad_BKD = grad_BKD if grad_BKD.stride(2) == 1 else grad_BKD.contiguous()
        N = channels * patches
        id_J, order_J = (ids_BK + torch.arange(B, device=ids_BK.device)[:, None] * N).flatten().sort(stable=True)
        first_N = torch.searchsorted(id_J, torch.arange(B * N + 1, device=ids_BK.device))  # of the tokens with an id
        width = min(triton.next_power_of_2(D), 256)
        grid = (B * channels, triton.cdiv(D, width))
        tile = {"WIDE": wide(grad_BKD.dtype), "WIDTH": width, "num_warps": 1, "enable_fp_fusion": True}
        args = (grad_BKD, order_J, first_N, gx_BND, gspace_BCD, K, D, channels, patches, *grad_BKD.stride()[:2])
        with torch.cuda.device_of(grad_BKD):
            embed_backward_kernel[grid](*args, X=need_x, SPACE=need_space, **tile)
    if need_time:  # no caller does; patches are then the channels of one window that has all tokens
        patch_1J, flat_1JD = (ids_BK % patches).reshape(1, -1), grad_BKD.reshape(1, B * K, D)
        gtime_PD = embed_tokens_backward(flat_1JD, patch_1J, patches, 1, False, True, False)[1][0]
    return gx_BND, gspace_BCD, gtime_PD
