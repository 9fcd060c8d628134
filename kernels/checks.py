"""
What inputs the operations refuse: the checks and the words of csrc/ops.cpp, for where that isn't what runs.
"""

import torch

MOST_SECTIONS = 64  # of one filter, as in csrc/kernels.h


def one_device(*arguments) -> None:
    """Raises TypeError: the operators are chosen by one of the devices, and would take the others' addresses for its own."""
    lists = (x if isinstance(x, list | tuple) else [x] for x in arguments)
    devices = {t.device for each in lists for t in each if isinstance(t, torch.Tensor)}
    if len(devices) > 1:
        raise TypeError(f"all tensors must be on one device, not on {' and '.join(sorted(map(str, devices)))}")


def embed_tokens(x_BXD, space_BCD, time_PD, ids_BK, taken) -> None:
    """Raises ValueError, TypeError, and on the CPU (a GPU would have to wait for it) IndexError."""
    if (x_BXD.ndim, space_BCD.ndim, time_PD.ndim, ids_BK.ndim) != (3, 3, 2, 2):
        raise ValueError("x B x X x D, space B x C x D, time P x D, ids B x K")
    (B, K), (P, D), C = ids_BK.shape, time_PD.shape, space_BCD.shape[1]
    if x_BXD.shape[0] != B or space_BCD.shape[0] != B:
        raise ValueError("x, space and ids must be of as many windows")
    if x_BXD.shape[2] != D or space_BCD.shape[2] != D:
        raise ValueError("x, space and time must be equally wide")
    tokens = K if taken else C * P
    if x_BXD.shape[1] != tokens:
        raise ValueError(f"x must have {tokens} tokens a window, not {x_BXD.shape[1]}")
    if ids_BK.dtype != torch.int64:
        raise TypeError("ids must be int64")
    if ids_BK.is_cpu and len(wrong := ids_BK[(ids_BK < 0) | (ids_BK >= C * P)]):
        raise IndexError(f"token {wrong[0]} of {C * P}")


def ema_(teacher, student, momentum, copies) -> None:
    """Raises ValueError."""
    if len(teacher) != len(student) or len(copies) not in (0, len(teacher)):
        raise ValueError("as many tensors each")
    for i, (t, s, c) in enumerate(zip(teacher, student, copies or teacher, strict=True)):
        if t.shape != s.shape or t.shape != c.shape:
            raise ValueError(f"tensors {i} must be of one shape")


def sos_stream(x_CT, sos_S6, state_S2C) -> None:
    """Raises ValueError and TypeError."""
    if (x_CT.ndim, sos_S6.ndim) != (2, 2) or sos_S6.shape[1] != 6:
        raise ValueError("x must be C x T and sos S x 6")
    if len(sos_S6) > MOST_SECTIONS:
        raise ValueError(f"{len(sos_S6)} sections are more than {MOST_SECTIONS}")
    if state_S2C.shape != (len(sos_S6), 2, len(x_CT)) or not state_S2C.is_contiguous():
        raise ValueError("state must be a contiguous S x 2 x C")
    if (sos_S6.dtype, state_S2C.dtype) != (torch.float64, torch.float64):
        raise TypeError("sos and state must be float64")
    if x_CT.dtype not in (torch.float32, torch.float64):
        raise TypeError("x must be float32 or float64")
    for s, a0 in enumerate(sos_S6[:, 3].tolist() if sos_S6.is_cpu else ()):
        if a0 != 1:
            raise ValueError(f"section {s} isn't b0 b1 b2 1 a1 a2: divide it by its fourth number")


def selective_scan(u_RLE, fade_RLE, b_RLS, c_RLS, ahead) -> None:
    """Raises ValueError and TypeError."""
    shapes = u_RLE.shape, b_RLS.shape
    alike = (fade_RLE.shape, c_RLS.shape) == shapes and shapes[0][:2] == shapes[1][:2]
    if (u_RLE.ndim, b_RLS.ndim) != (3, 3) or not alike:
        raise ValueError("u and fade must be R x L x E, b and c R x L x S")
    if not 0 <= ahead <= u_RLE.shape[2]:
        raise ValueError(f"{ahead} channels ahead of {u_RLE.shape[2]}")
    dtypes = {x.dtype for x in (u_RLE, fade_RLE, b_RLS, c_RLS)}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise TypeError("u, fade, b and c must be all float32 or all float64")


def attend(q_BHQW, k_BHKW, v_BHKW, real_BK) -> None:
    """Raises ValueError and TypeError."""
    q, k = q_BHQW.shape, k_BHKW.shape
    if (len(q), len(k)) != (4, 4) or k != v_BHKW.shape or (*q[:2], q[3]) != (*k[:2], k[3]):
        raise ValueError("q must be B x H x Q x W, k and v B x H x K x W")
    dtypes = {x.dtype for x in (q_BHQW, k_BHKW, v_BHKW)}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64, torch.bfloat16}:
        raise TypeError("q, k and v must be all float32, all float64 or all bfloat16")
    if real_BK is None:
        return
    if real_BK.shape != (k[0], k[2]):
        raise ValueError("real must be B x K")
    if real_BK.dtype != torch.bool:
        raise TypeError("real must be bool")
