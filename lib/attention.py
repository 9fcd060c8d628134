"""
Attention, in the form that is fastest where it runs.

PyTorch's fused kernel everywhere but for bfloat16 on CPUs that multiply it: there its backward pass takes three times as long as in float32, and
its three parts, a product, a softmax and a product of as many windows as stay in the caches, half as long (docs/benchmarks.md).

Shape letters: B windows, H heads, Q queries, K keys, W width of a head.
"""

import itertools

import torch
import torch.nn.functional as F

CACHED = 2**20  # scores that are made at a time
MOST = 2**26  # that are kept for the backward pass; the fused kernel keeps none
MULTIPLIED = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # by this CPU


def attend(
    q_BHQW: torch.Tensor, k_BHKW: torch.Tensor, v_BHKW: torch.Tensor, keys: torch.Tensor | None = None
) -> torch.Tensor:
    """
    softmax(q kᵀ / √W) v (B, H, Q, W), equation 1 of Vaswani (2017).

    `keys` broadcasts to (B, H, Q, K) and is True where a key may be attended to; what a query without any finds is finite and means nothing.
    """
    scores = q_BHQW.shape[1] * q_BHQW.shape[2] * k_BHKW.shape[2]
    if (
        q_BHQW.device.type != "cpu"
        or q_BHQW.dtype != torch.bfloat16
        or q_BHQW.shape[0] * scores > MOST
        or not MULTIPLIED
    ):
        return F.scaled_dot_product_attention(q_BHQW, k_BHKW, v_BHKW, attn_mask=keys)
    q_BHQW = q_BHQW * q_BHQW.shape[3] ** -0.5
    some = max(1, CACHED // max(1, scores))
    masks = itertools.repeat(None) if keys is None else keys.expand(len(q_BHQW), *keys.shape[1:]).split(some)
    parts = zip(q_BHQW.split(some), k_BHKW.split(some), v_BHKW.split(some), masks, strict=False)
    return torch.cat([_plain(*part) for part in parts])


def _plain(q_BHQW, k_BHKW, v_BHKW, keys: torch.Tensor | None) -> torch.Tensor:
    score_BHQK = q_BHQW @ k_BHKW.transpose(2, 3)
    if keys is not None:
        score_BHQK = score_BHQK.masked_fill(~keys, torch.finfo(score_BHQK.dtype).min)  # -inf: NaN where all are hidden
    return score_BHQK.softmax(3) @ v_BHKW
