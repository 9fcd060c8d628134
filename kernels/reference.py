"""
What every operation of kernels/ means, in plain PyTorch; it runs wherever the C++ isn't built.

Shapes: B windows, C channels, T samples, P patches per channel, N = C * P tokens, K tokens taken, X either, D width, S sections of a filter
or states of a scan, R rows, L steps and E channels of a scan, Q steps of a block.
"""

import errno
import os

import torch
import torch.nn.functional as F


class UnreadableWindow(OSError):
    """Window number `window` of a batch could not be read: the system's error, or a file that ended too early."""

    def __init__(self, window: int, code: int, got_bytes: int, wanted_bytes: int):
        why = os.strerror(code) if code else f"the file ends after {got_bytes} of its {wanted_bytes} bytes"
        super().__init__(code or errno.ENODATA, f"window {window} of the batch: {why}")
        self.window = window
        self._arguments = window, code, got_bytes, wanted_bytes

    def __reduce__(self):  # to come back from another process, which OSError's own would not
        return UnreadableWindow, self._arguments


def gather_windows(fds_B, offsets_B, file_channels_B, map_BC, gain_BC, bias_BC, clip, out_BCT) -> None:
    """Fills out_BCT; arguments and errors as for kernels.gather_windows."""
    samples = out_BCT.shape[-1]
    for b in range(len(fds_B)):
        fd, offset, channels = int(fds_B[b]), int(offsets_B[b]), int(file_channels_B[b])
        if channels < 1:
            raise ValueError(f"window {b}: a file of {channels} channels")
        if offset < 0:
            raise ValueError(f"window {b}: byte offset {offset}")
        out_of_file = map_BC[b][(map_BC[b] < -1) | (map_BC[b] >= channels)]
        if len(out_of_file):
            raise ValueError(f"window {b}: channel {out_of_file[0]} of a file of {channels} channels")

        x_TC = read_samples(b, fd, offset, samples, channels)
        x_CT = x_TC.T.float().clamp(-clip, clip).index_select(0, map_BC[b].clamp(min=0))
        if gain_BC is not None:
            x_CT = x_CT * gain_BC[b, :, None]
        if bias_BC is not None:
            x_CT = x_CT + bias_BC[b, :, None]
        out_BCT[b] = x_CT.where(map_BC[b, :, None] >= 0, 0.0)


def read_samples(window: int, fd: int, offset: int, samples: int, channels: int) -> torch.Tensor:
    """Float16 x_TC at byte `offset` of a time-major file; raises UnreadableWindow."""
    x_TC = torch.empty(samples, channels, dtype=torch.float16)
    left = memoryview(x_TC.numpy()).cast("B") if samples else memoryview(b"")
    while left:
        try:
            n = os.preadv(fd, [left], offset)
        except OSError as e:
            raise UnreadableWindow(window, e.errno, x_TC.nbytes - len(left), x_TC.nbytes) from e
        if n == 0:
            raise UnreadableWindow(window, 0, x_TC.nbytes - len(left), x_TC.nbytes)
        left, offset = left[n:], offset + n
    return x_TC


MOST = 4.0  # that one step of selective_scan can fade: 2 % of the state are left


def embed_tokens(
    x_BXD: torch.Tensor, space_BCD: torch.Tensor, time_PD: torch.Tensor, ids_BK: torch.Tensor, taken: bool = False
) -> torch.Tensor:
    """
    The tokens `ids_BK` (int64, token n is patch n % P of channel n // P) plus codes of their channel and their patch: z_BKD.

    x has all N = C * P tokens of a window, or with `taken` those K already. The sums are made in float32 (float64 if an input
    is), and z has the widest of the three formats.
    """
    patches = len(time_PD)
    x_BKD = x_BXD if taken else take(x_BXD, ids_BK)
    place_BKD = take(space_BCD, ids_BK // patches) + time_PD[ids_BK % patches]
    return x_BKD + place_BKD


def take(z_BND: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    first_B1 = torch.arange(len(ids_BK), device=ids_BK.device)[:, None] * z_BND.shape[1]
    return F.embedding(ids_BK + first_B1, z_BND.flatten(0, 1))


def embed_tokens_backward(
    grad_BKD: torch.Tensor,
    ids_BK: torch.Tensor,
    channels: int,
    patches: int,
    need_x: bool,
    need_space: bool,
    need_time: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Gradients of x_BND, space_BCD and time_PD, in grad's format, summed in float32 at least; (0,) for one that isn't needed.

    With `taken` the gradient of x is grad itself, so that x isn't asked for here.
    """
    (B, _, D), none = grad_BKD.shape, grad_BKD.new_empty(0)
    wide_BKD = grad_BKD.to(torch.promote_types(grad_BKD.dtype, torch.float32))

    def summed(to_BK: torch.Tensor, places: int) -> torch.Tensor:
        first_B1 = torch.arange(B, device=to_BK.device)[:, None] * places
        sums = wide_BKD.new_zeros(B * places, D).index_add(0, (to_BK + first_B1).flatten(), wide_BKD.flatten(0, 1))
        return sums.unflatten(0, (B, places)).to(grad_BKD.dtype)

    gx_BND = summed(ids_BK, channels * patches) if need_x else none
    gspace_BCD = summed(ids_BK // patches, channels) if need_space else none
    time = (ids_BK % patches).flatten(), wide_BKD.flatten(0, 1)
    gtime_PD = wide_BKD.new_zeros(patches, D).index_add(0, *time).to(grad_BKD.dtype) if need_time else none
    return gx_BND, gspace_BCD, gtime_PD


def ema_(
    teacher: list[torch.Tensor], student: list[torch.Tensor], momentum: float, copies: list[torch.Tensor] | None = None
) -> None:
    """
    teacher = momentum * teacher + (1 - momentum) * student for each pair of tensors, in the teacher's format; copies = teacher.

    For bfloat16 weights the teacher is a float32 master, and `copies` are what the network computes with.
    """
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        t.lerp_(s.to(t.dtype), 1 - momentum)
        if copies:
            copies[i].copy_(t)


def sos_stream(x_CT: torch.Tensor, sos_S6: torch.Tensor, state_S2C: torch.Tensor) -> torch.Tensor:
    """
    The next T samples of C channels through second-order sections in series (direct form II transposed, as scipy.signal.sosfilt).

    x is float32 or float64, and so is y_CT; sections (b0 b1 b2 1 a1 a2) and state are float64, and so is the arithmetic. The state
    (scipy's zi with its last two axes swapped) is updated in place. However the signal is cut, every sample comes out the same.
    """
    x_TC = x_CT.T.double().clone()
    for t in range(len(x_TC)):
        x_C = x_TC[t]
        for (b0, b1, b2, _, a1, a2), z_2C in zip(sos_S6.tolist(), state_S2C, strict=True):
            y_C = b0 * x_C + z_2C[0]
            z_2C[0] = b1 * x_C - a1 * y_C + z_2C[1]
            z_2C[1] = b2 * x_C - a2 * y_C
            x_C = y_C
        x_TC[t] = x_C
    return x_TC.T.to(x_CT.dtype).contiguous()


def sos_block(sos_S6: torch.Tensor, steps: int) -> torch.Tensor:
    """
    The same as one linear map of Q = `steps` samples, for processors with more lanes than there are channels: M (Q + 2S, Q + 2S).

    [y_QC; state_(2S)C after] = M @ [x_QC; state_(2S)C before], the state being state_S2C.flatten(0, 1).
    """
    width = steps + 2 * len(sos_S6)
    unit = torch.eye(width, dtype=torch.float64)
    state_S2C = unit[steps:].unflatten(0, (-1, 2)).clone()
    y_CT = sos_stream(unit[:steps].T, sos_S6.cpu(), state_S2C)
    return torch.cat([y_CT.T, state_S2C.flatten(0, 1)]).to(sos_S6.device)


def selective_scan(
    u_RLE: torch.Tensor, fade_RLE: torch.Tensor, b_RLS: torch.Tensor, c_RLS: torch.Tensor, ahead: int | None = None
) -> torch.Tensor:
    """
    y[t] = c[t] . h[t] with h[t] = exp(-min(fade[t], 4)) h[t-1] + b[t] u[t], the state h (S, E) of a row from 0; 0 <= fade.

    Mamba's recurrence (S6, Gu & Dao 2023; u = dt x, fade = dt rate) with a rate per channel, as in Mamba-2 (Dao & Gu 2024).
    The first `ahead` of the E channels (None: all) run forwards, the others from the last step to the first.
    """
    E, L = u_RLE.shape[2], u_RLE.shape[1]
    ahead = E if ahead is None else ahead
    if ahead < E:
        turned = (t.flip(1) for t in (u_RLE[..., ahead:], fade_RLE[..., ahead:], b_RLS, c_RLS))
        y_RLE = selective_scan(u_RLE[..., :ahead], fade_RLE[..., :ahead], b_RLS, c_RLS)
        return torch.cat([y_RLE, selective_scan(*turned).flip(1)], 2)
    keep_RLE, y = (-fade_RLE.clamp_max(MOST)).exp(), []
    h_RSE = u_RLE.new_zeros(len(u_RLE), b_RLS.shape[2], E)
    for t in range(L):
        h_RSE = keep_RLE[:, t, None] * h_RSE + b_RLS[:, t, :, None] * u_RLE[:, t, None]
        y.append((c_RLS[:, t, :, None] * h_RSE).sum(1))
    return torch.stack(y, 1) if y else torch.empty_like(u_RLE)


def selective_scan_backward(grad_RLE, u_RLE, fade_RLE, b_RLS, c_RLS, y_RLE, ahead):
    """
    Gradients of u, fade, b and c, in their formats, given that of y and y itself; that of a fade above 4 is 0.

    Written out, because inside an operator torch records no gradients.
    """
    gu_RLE, gfade_RLE, gb_RLS, gc_RLS = (torch.zeros_like(t) for t in (u_RLE, fade_RLE, b_RLS, c_RLS))
    keep_RLE, L = (-fade_RLE.clamp_max(MOST)).exp(), u_RLE.shape[1]
    for part, steps in ((slice(ahead), range(L)), (slice(ahead, None), range(L - 1, -1, -1))):
        u, keep, grad = u_RLE[..., part], keep_RLE[..., part], grad_RLE[..., part]
        states = [u.new_zeros(len(u), b_RLS.shape[2], u.shape[2])]
        for t in steps:
            states.append(keep[:, t, None] * states[-1] + b_RLS[:, t, :, None] * u[:, t, None])
        gh_RSE = torch.zeros_like(states[0])
        for t in reversed(steps):
            h_RSE, before_RSE = states.pop(), states[-1]
            gc_RLS[:, t] += (h_RSE * grad[:, t, None]).sum(2)
            gh_RSE = gh_RSE + c_RLS[:, t, :, None] * grad[:, t, None]
            gb_RLS[:, t] += (gh_RSE * u[:, t, None]).sum(2)
            gu_RLE[:, t, part] = (gh_RSE * b_RLS[:, t, :, None]).sum(1)
            gfade_RLE[:, t, part] = -(gh_RSE * before_RSE).sum(1) * keep[:, t]
            gh_RSE = gh_RSE * keep[:, t, None]
    return gu_RLE, gfade_RLE.masked_fill(fade_RLE > MOST, 0), gb_RLS, gc_RLS


def attend(
    q_BHQW: torch.Tensor, k_BHKW: torch.Tensor, v_BHKW: torch.Tensor, real_BK: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    softmax(q kᵀ / √W) v over the keys that `real_BK` marks (B, H, Q, W), equation 1 of Vaswani (2017), and the logarithms of its denominators.

    Computed in float32, or float64 if that is what is given; without any real key both are 0.
    """
    k_BHKW, v_BHKW = of_real(k_BHKW, real_BK), of_real(v_BHKW, real_BK)
    score_BHQK = scores(q_BHQW, k_BHKW, real_BK)
    level_BHQ = score_BHQK.logsumexp(3) if score_BHQK.shape[3] else score_BHQK.new_full(q_BHQW.shape[:3], -torch.inf)
    level_BHQ = level_BHQ.masked_fill(level_BHQ == -torch.inf, 0)
    y_BHQW = (score_BHQK - level_BHQ[..., None]).exp() @ v_BHKW.to(score_BHQK.dtype)
    return heads_beside(y_BHQW, q_BHQW.dtype), level_BHQ


def attend_backward(grad_BHQW, q_BHQW, k_BHKW, v_BHKW, real_BK, y_BHQW, level_BHQ):
    """Gradients of q, k and v, in their format, given that of y, y itself and the logarithms of its denominators."""
    k_BHKW, v_BHKW = of_real(k_BHKW, real_BK), of_real(v_BHKW, real_BK)
    score_BHQK = scores(q_BHQW, k_BHKW, real_BK)
    q, k, v, y, grad = (t.to(score_BHQK.dtype) for t in (q_BHQW, k_BHKW, v_BHKW, y_BHQW, grad_BHQW))
    share_BHQK = (score_BHQK - level_BHQ[..., None]).exp()
    g_score_BHQK = share_BHQK * (grad @ v.mT - (grad * y).sum(3, keepdim=True)) * max(1, q.shape[3]) ** -0.5
    found = g_score_BHQK @ k, g_score_BHQK.mT @ q, share_BHQK.mT @ grad
    return tuple(heads_beside(t, q_BHQW.dtype) for t in found)


def of_real(x_BHKW: torch.Tensor, real_BK: torch.Tensor | None) -> torch.Tensor:
    return x_BHKW if real_BK is None else x_BHKW.masked_fill(~real_BK[:, None, :, None], 0)  # even of NaN


def scores(q_BHQW: torch.Tensor, k_BHKW: torch.Tensor, real_BK: torch.Tensor | None) -> torch.Tensor:
    wide = torch.promote_types(q_BHQW.dtype, torch.float32)
    score_BHQK = q_BHQW.to(wide) @ k_BHKW.to(wide).mT * max(1, q_BHQW.shape[3]) ** -0.5
    return score_BHQK if real_BK is None else score_BHQK.masked_fill(~real_BK[:, None, None], -torch.inf)


def heads_beside(x_BHQW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x_BHQW.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)
