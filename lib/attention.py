"""
Attention, in the form that is fastest where it runs.

PyTorch's fused kernel everywhere but for bfloat16 on CPUs that multiply it: there it takes two to six times as long as kernels.attend, which gains
nothing forwards on others (docs/benchmarks.md).

Shape letters: B windows, H heads, Q queries, K keys, W width of a head.
"""

import torch
import torch.nn.functional as F

import kernels


def attend(
    q_BHQW: torch.Tensor, k_BHKW: torch.Tensor, v_BHKW: torch.Tensor, real_BK: torch.Tensor | None = None
) -> torch.Tensor:
    """
    softmax(q kᵀ / √W) v (B, H, Q, W), equation 1 of Vaswani (2017).

    `real_BK` marks the keys that may be attended to; None means all of them, which is faster. At least one has to be.
    """
    if q_BHQW.is_cpu and q_BHQW.dtype == torch.bfloat16 and kernels.path() == "c++ (avx512)":
        return kernels.attend(q_BHQW, k_BHKW, v_BHKW, real_BK)
    keys = None if real_BK is None else real_BK[:, None, None]
    return F.scaled_dot_product_attention(q_BHQW, k_BHKW, v_BHKW, attn_mask=keys)
