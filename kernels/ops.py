"""
The operations as functions of tensors: torch.ops.berger (so called because `kernels` is also a package on PyPI) behind checks.

On the CPU they are C++, compiled on first use (kernels/build.py), on a GPU Triton or CUDA C++ (kernels/gpu.py). Without a compiler, or with
BERGER_KERNELS=0, their meaning itself runs; one line on stderr says which. BERGER_KERNELS=avx2 keeps the C++ from using AVX-512, BERGER_KERNELS=generic from AVX2 as well.
"""

import threading

import numpy as np
import torch
from torch.autograd.forward_ad import unpack_dual

from kernels import build, checks, reference
from kernels.plain import asked, say
from kernels.reference import UnreadableWindow

_lock = threading.Lock()
_path: str | None = None


@torch.compiler.assume_constant_result
def path(device: str = "cpu") -> str:
    """Which implementation runs: "c++ (avx512)", "c++ (avx2)" or "c++ (generic)" on the CPU, kernels.gpu.path() on a GPU, or "reference"; may compile."""
    global _path
    if device != "cpu" and (kind := torch.device(device).type) != "cpu":
        if kind != "cuda":
            return "reference"
        from kernels import gpu

        return gpu.path()
    if _path is None:
        with _lock:
            if _path is None:
                _path = _load()
    return _path


def _load() -> str:
    if asked() == "0":
        say("plain PyTorch, because BERGER_KERNELS=0")
        return "reference"
    try:
        torch.ops.load_library(build.build("torch", say))
    except (build.BuildFailed, OSError) as e:  # OSError: a library that this system can't load
        say(f"plain PyTorch, slower, because {e}")
        return "reference"
    processor = torch.ops.berger.processor_path()
    say(f"C++, {processor}")
    return f"c++ ({processor})"


# ----------------------------------------------------------------------------
# operators

SCHEMAS = {
    "gather_windows": "(Tensor fds_B, Tensor offsets_B, Tensor file_channels_B, Tensor map_BC, Tensor? gain_BC, Tensor? bias_BC, "
    "float clip, Tensor(a!) out_BCT) -> Tensor",
    "embed_tokens": "(Tensor x_BXD, Tensor space_BCD, Tensor time_PD, Tensor ids_BK, bool taken) -> Tensor",
    "embed_tokens_backward": "(Tensor grad_BKD, Tensor ids_BK, SymInt channels, SymInt patches, bool need_x, bool need_space, "
    "bool need_time) -> (Tensor, Tensor, Tensor)",
    "ema_": "(Tensor(a!)[] teacher, Tensor[] student, float momentum, Tensor(b!)[] copies) -> ()",
    "sos_stream": "(Tensor x_CT, Tensor sos_S6, Tensor(a!) state_S2C) -> Tensor",
    "selective_scan": "(Tensor u_RLE, Tensor fade_RLE, Tensor b_RLS, Tensor c_RLS, SymInt ahead) -> Tensor",
    "selective_scan_backward": "(Tensor grad_RLE, Tensor u_RLE, Tensor fade_RLE, Tensor b_RLS, Tensor c_RLS, Tensor y_RLE, SymInt ahead) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "attend": "(Tensor q_BHQW, Tensor k_BHKW, Tensor v_BHKW, Tensor? real_BK) -> (Tensor, Tensor)",
    "attend_backward": "(Tensor grad_BHQW, Tensor q_BHQW, Tensor k_BHKW, Tensor v_BHKW, Tensor? real_BK, Tensor y_BHQW, "
    "Tensor level_BHQ) -> (Tensor, Tensor, Tensor)",
}
ON_CPU = ("gather_windows", "attend", "attend_backward")  # a GPU reads no files, and torch has attention for it
_operators = torch.library.Library("berger", "DEF")


def _define() -> None:
    for name, schema in SCHEMAS.items():
        _operators.define(name + schema)
        if name in ("ema_", "sos_stream"):  # no gradients, so autograd needn't be asked: half of a short call's time
            _operators.impl(name, torch.library.fallthrough_kernel, "Autograd")
        if name != "gather_windows":
            _operators.impl(name, _checked(name, getattr(reference, name)), "CompositeExplicitAutograd")
        if name not in ON_CPU:
            _operators.impl(name, _checked(name, _on_gpu(name)), "CUDA")


def _checked(name: str, function):
    """Refuses what the C++ refuses, in its words; gradients get what the operators themselves kept."""
    check = getattr(checks, name, None)

    def run(*args):
        checks.one_device(*args)
        if check:
            check(*args)
        return function(*args)

    return run


def _fake(name: str):
    def register(function):
        def run(*args):  # for tensors without memory: where one is among others it is this that the dispatcher calls
            checks.one_device(*args)
            return function(*args)

        torch.library.register_fake(f"berger::{name}", run)

    return register


def _on_gpu(name: str):
    def run(*args):
        from kernels import gpu  # here, because it imports Triton

        if name == "sos_stream":  # a backward pass would take the new state for the old
            torch.autograd.graph.increment_version(args[2])
        return gpu.run(name, args)

    return run


_define()


@_fake("gather_windows")
def _(fds_B, offsets_B, file_channels_B, map_BC, gain_BC, bias_BC, clip, out_BCT):
    return fds_B.new_empty(3, dtype=torch.int64)


@_fake("embed_tokens")
def _(x_BXD, space_BCD, time_PD, ids_BK, taken):
    return x_BXD.new_empty(*ids_BK.shape, x_BXD.shape[2], dtype=_widest(x_BXD, space_BCD, time_PD))


@_fake("embed_tokens_backward")
def _(grad_BKD, ids_BK, channels, patches, need_x, need_space, need_time):
    B, _, D = grad_BKD.shape
    shapes = ((need_x, (B, channels * patches, D)), (need_space, (B, channels, D)), (need_time, (patches, D)))
    return tuple(grad_BKD.new_empty(shape if need else 0) for need, shape in shapes)


@_fake("ema_")
def _(teacher, student, momentum, copies):
    return None


@_fake("sos_stream")
def _(x_CT, sos_S6, state_S2C):
    return torch.empty_like(x_CT, memory_format=torch.contiguous_format)


@_fake("selective_scan")
def _(u_RLE, fade_RLE, b_RLS, c_RLS, ahead):
    return torch.empty_like(u_RLE, memory_format=torch.contiguous_format)


@_fake("selective_scan_backward")
def _(grad_RLE, u_RLE, fade_RLE, b_RLS, c_RLS, y_RLE, ahead):
    inputs = (u_RLE, fade_RLE, b_RLS, c_RLS)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)


@_fake("attend")
def _(q_BHQW, k_BHKW, v_BHKW, real_BK):
    level = torch.promote_types(q_BHQW.dtype, torch.float32)
    return _heads_beside(q_BHQW), q_BHQW.new_empty(q_BHQW.shape[:3], dtype=level)


@_fake("attend_backward")
def _(grad_BHQW, q_BHQW, k_BHKW, v_BHKW, real_BK, y_BHQW, level_BHQ):
    return _heads_beside(q_BHQW), _heads_beside(k_BHKW), _heads_beside(v_BHKW)


def _heads_beside(like_BHQW: torch.Tensor) -> torch.Tensor:
    B, H, Q, W = like_BHQW.shape
    return like_BHQW.new_empty(B, Q, H, W).transpose(1, 2)


def _keep_tokens(ctx, inputs, output):
    x_BXD, space_BCD, time_PD, ids_BK, ctx.taken = inputs
    ctx.save_for_backward(ids_BK)
    ctx.channels, ctx.patches = space_BCD.shape[1], time_PD.shape[0]
    ctx.formats = x_BXD.dtype, space_BCD.dtype, time_PD.dtype


def _embed_tokens_gradients(ctx, grad_BKD):
    need_x, need_space, need_time = ctx.needs_input_grad[:3]
    need = (need_x and not ctx.taken, need_space, need_time)
    grads = list(torch.ops.berger.embed_tokens_backward(grad_BKD, *ctx.saved_tensors, ctx.channels, ctx.patches, *need))
    if ctx.taken:
        grads[0], need = grad_BKD, (need_x, need_space, need_time)
    formatted = (g.to(dtype) if wanted else None for g, dtype, wanted in zip(grads, ctx.formats, need, strict=True))
    return (*formatted, None, None)


def _keep_scan(ctx, inputs, output):
    *tensors, ctx.ahead = inputs
    ctx.save_for_backward(*tensors, output)


def _scan_gradients(ctx, grad_RLE):
    return *torch.ops.berger.selective_scan_backward(grad_RLE, *ctx.saved_tensors, ctx.ahead), None


def _keep_attention(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _attention_gradients(ctx, grad_BHQW, _):  # the level is for these alone
    return *torch.ops.berger.attend_backward(grad_BHQW, *ctx.saved_tensors), None


torch.library.register_autograd("berger::embed_tokens", _embed_tokens_gradients, setup_context=_keep_tokens)
torch.library.register_autograd("berger::selective_scan", _scan_gradients, setup_context=_keep_scan)
torch.library.register_autograd("berger::attend", _attention_gradients, setup_context=_keep_attention)


def _no_second_gradients(ctx, *grads):  # torch would only warn, and take them for 0
    raise RuntimeError("kernels has first gradients only; the functions of kernels.reference have all")


torch.library.register_autograd("berger::embed_tokens_backward", _no_second_gradients)
torch.library.register_autograd("berger::selective_scan_backward", _no_second_gradients)
torch.library.register_autograd("berger::attend_backward", _no_second_gradients)


def _no_forward_mode(*tensors: torch.Tensor) -> None:
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "kernels has no forward-mode gradients (jvp, jacfwd); the functions of kernels.reference have"
        )


def _widest(*tensors: torch.Tensor) -> torch.dtype:
    widest = tensors[0].dtype
    for t in tensors[1:]:
        widest = torch.promote_types(widest, t.dtype)
    return widest


# ----------------------------------------------------------------------------
# functions


def embed_tokens(
    x_BXD: torch.Tensor, space_BCD: torch.Tensor, time_PD: torch.Tensor, ids_BK: torch.Tensor, taken: bool = False
) -> torch.Tensor:
    """
    The tokens `ids_BK` (int64, token n is patch n % P of channel n // P) plus codes of their channel and their patch: z_BKD.

    x has all N = C * P tokens of a window, or with `taken` those K already, at any strides. Sums are made in float32 at least and
    z has the widest of the three formats; ids may repeat, and their gradients add up. Raises ValueError for shapes that don't fit
    and, on the CPU, IndexError for a token that isn't there.
    """
    path()
    _no_forward_mode(x_BXD, space_BCD, time_PD)  # torch would take them for 0
    return torch.ops.berger.embed_tokens(x_BXD, space_BCD, time_PD, ids_BK, taken)


def ema_(
    teacher: list[torch.Tensor], student: list[torch.Tensor], momentum: float, copies: list[torch.Tensor] | None = None
) -> None:
    """
    teacher = momentum * teacher + (1 - momentum) * student for each pair of tensors, one pass over the memory, no gradients.

    For bfloat16 weights the teacher is a float32 master, and `copies` are what its network computes with, written in the same pass.
    NaN spreads from either. Raises ValueError for lists or shapes that don't fit each other.
    """
    path()
    teacher, student, copies = list(teacher), list(student), list(copies or [])
    with torch.no_grad():
        torch.ops.berger.ema_(teacher, student, momentum, copies)
    torch.autograd.graph.increment_version([*teacher, *copies])  # or a backward pass would take the new for the old


def sos_stream(x_CT: torch.Tensor, sos_S6: torch.Tensor, state_S2C: torch.Tensor) -> torch.Tensor:
    """
    The next T samples of C channels through S second-order sections in series, as scipy.signal.sosfilt; the state is updated in place.

    x is float32 or float64, and so is y_CT; sections (at most 64) and state (float64, contiguous, scipy's zi with its last two axes
    swapped) aren't. On the CPU every bit is scipy's, however the signal is cut. A NaN stays in its channel's state. No gradients.
    Raises ValueError or TypeError. For NumPy arrays there is kernels.plain.
    """
    if _path is None:  # path() takes longer than a short chunk
        path()
    if (x_CT.requires_grad or sos_S6.requires_grad or state_S2C.requires_grad) and torch.is_grad_enabled():
        raise ValueError("sos_stream has no gradients: give it what x.detach() gives")
    _no_forward_mode(x_CT)
    return torch.ops.berger.sos_stream(x_CT, sos_S6, state_S2C)


def selective_scan(
    u_RLE: torch.Tensor, fade_RLE: torch.Tensor, b_RLS: torch.Tensor, c_RLS: torch.Tensor, ahead: int | None = None
) -> torch.Tensor:
    """
    y[t] = c[t] . h[t] with h[t] = exp(-min(fade[t], 4)) h[t-1] + b[t] u[t], the state h (S, E) of a row from 0; 0 <= fade.

    The first `ahead` of the E channels (None: all) run forwards, the others from the last step to the first. Computed in float32, or
    float64 if an input is; y_RLE has u's format. NaN spreads to what it can reach, and within 16 steps of it also to its channel's
    earlier outputs. Raises ValueError for shapes that don't fit.
    """
    path()
    _no_forward_mode(u_RLE, fade_RLE, b_RLS, c_RLS)
    dtype = torch.promote_types(_widest(u_RLE, fade_RLE, b_RLS, c_RLS), torch.float32)
    tensors = (t.to(dtype) for t in (u_RLE, fade_RLE, b_RLS, c_RLS))
    ahead = (u_RLE.shape[-1] if u_RLE.ndim else 0) if ahead is None else ahead
    return torch.ops.berger.selective_scan(*tensors, ahead).to(u_RLE.dtype)


def attend(
    q_BHQW: torch.Tensor, k_BHKW: torch.Tensor, v_BHKW: torch.Tensor, real_BK: torch.Tensor | None = None
) -> torch.Tensor:
    """
    softmax(q kᵀ / √W) v over the keys that `real_BK` (bool; None: all) marks, 0 without any: (B, H, Q, W), equation 1 of Vaswani (2017).

    q, k and v are all float32, float64 or bfloat16, at any strides; what comes is laid out as (B, Q, H, W). Of bfloat16 the shares are
    rounded, too, and sums are made in float32. Memory grows with Q + K, not Q K. NaN spreads to the queries that attend to it, and back
    to all keys and values of its head. Raises ValueError or TypeError. On a GPU it is the reference: torch has its own there.
    """
    path()
    _no_forward_mode(q_BHQW, k_BHKW, v_BHKW)
    return torch.ops.berger.attend(q_BHQW, k_BHKW, v_BHKW, real_BK)[0]


def gather_windows(
    fds_B: torch.Tensor,
    offsets_B: torch.Tensor,
    file_channels_B: torch.Tensor,
    map_BC: torch.Tensor,
    gain_BC: torch.Tensor | None,
    bias_BC: torch.Tensor | None,
    samples: int,
    clip: float = float("inf"),
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Reads B windows of `samples` steps out of time-major float16 files as x_BCT, float32 or bfloat16 (out's dtype, if given).

    Window b starts at byte offsets_B[b] of the open file fds_B[b], which has file_channels_B[b] channels (all three int64).
    Its channel c is channel map_BC[b, c] (int32) of the file, and its values are clamp(x, -clip, clip) * gain_BC + bias_BC,
    each step rounded to float32, then rounded to dtype; where the map is -1 they are zero, whatever gain and bias are. NaN
    stays NaN; an infinity becomes the clip, or stays one if clip is infinite. Gain and bias are float32; None is one and zero.

    Runs without the GIL on at most torch.get_num_threads() threads. Windows in the page cache come first; the disk reads of all
    others are under way by then. Raises UnreadableWindow, naming the window, on a failed or short read (out is then undefined),
    TypeError for a wrong dtype or device, and ValueError for a wrong shape, channel, offset or clip.
    """
    shape, dtype = (*map_BC.shape, samples), dtype if out is None else out.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"windows come as float32 or bfloat16, not {dtype}")
    if out is None:  # NumPy asks for huge pages, torch doesn't: page faults would take longer than the reading
        out = torch.from_numpy(np.empty(shape, np.float32 if dtype == torch.float32 else np.int16)).view(dtype)
    int64, int32, float32 = torch.int64, torch.int32, torch.float32
    kinds = (("fds", fds_B, int64), ("offsets", offsets_B, int64), ("file_channels", file_channels_B, int64))
    kinds += (("map", map_BC, int32), ("gain", gain_BC, float32), ("bias", bias_BC, float32), ("out", out, dtype))
    for name, x, kind in kinds:
        if x is not None and (x.dtype != kind or not x.is_cpu):
            raise TypeError(f"{name} must be {kind} on the CPU, not {x.dtype} on {x.device}")
    for name, x in (("map", map_BC), ("gain", gain_BC), ("bias", bias_BC)):
        if x is not None and (x.ndim != 2 or x.shape != shape[:2]):
            raise ValueError(f"{name} must be B x C, {shape[:-1]}, not {tuple(x.shape)}")
    for name, x in (("fds", fds_B), ("offsets", offsets_B), ("file_channels", file_channels_B)):
        if x.shape != shape[:1]:
            raise ValueError(f"{name} must have one entry for each of the {shape[0]} windows, not {tuple(x.shape)}")
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and {shape}, not {tuple(out.shape)}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, not {clip}")

    if path() == "reference":
        reference.gather_windows(fds_B, offsets_B, file_channels_B, map_BC, gain_BC, bias_BC, clip, out)
        return out
    status = torch.ops.berger.gather_windows(fds_B, offsets_B, file_channels_B, map_BC, gain_BC, bias_BC, clip, out)
    window, code, got_bytes = status.tolist()
    if window >= 0:
        raise UnreadableWindow(window, code, got_bytes, 2 * samples * int(file_channels_B[window]))
    return out
