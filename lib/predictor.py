"""
The JEPA predictor: what the teacher makes of the hidden tokens, told from the visible ones and from where and when each token is.

Three kinds, each with all of the one before:

    prelocal    one query per target, which is all about its place, attends to the visible tokens and never to other targets
    postlocal   a last pass, in which targets attend to predicted and visible tokens together, so that predictions fit each other
    contextual  a summary of the window, learned tokens pooled from the visible ones, is attended to beside them

Shape letters: B windows, C channels, K visible tokens, M targets, S summary tokens, D the encoder's width, E the predictor's.
"""

import math

import torch
from torch import nn

from lib.errors import Unusable
from lib.models import Architecture, Block, Places

KINDS = ("prelocal", "postlocal", "contextual")
SUMMARY = 4  # tokens


class Predictor(nn.Module):
    """
    Guesses of the teacher's features at the target tokens.

    Half as wide as the encoder on purpose: a predictor that could do the encoder's work would leave it none (Assran 2023). Raises
    Unusable.
    """

    def __init__(self, architecture: Architecture, layers: int, kind: str = "prelocal"):
        super().__init__()
        if kind not in KINDS:
            raise Unusable(f"--predictor {kind} is unknown; there are: {', '.join(KINDS)}")
        a, self.kind = architecture, kind
        heads, depth = max(1, a.heads // 2), layers + KINDS.index(kind)
        fits = math.lcm(2, heads)  # codes of time come in pairs, and half of five heads is two
        width = -(-(a.d_model // 2) // fits) * fits
        self.narrow = nn.Linear(a.d_model, width)
        self.place = Places(width, a.patch / a.rate_hz)
        self.query_E = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads, depth) for _ in range(layers))
        if kind == "contextual":
            self.summary_SE = nn.Parameter(0.02 * torch.randn(SUMMARY, width))
            self.pool = Block(width, heads, depth)
        if kind != "prelocal":
            self.refine, self.norm_refine = Block(width, heads, depth), nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, a.d_model)

    def forward(
        self,
        z_BKD: torch.Tensor,
        positions_BC3: torch.Tensor,
        patches: int,
        context_BK: torch.Tensor,
        target_BM: torch.Tensor,
        context_real_BK: torch.Tensor | None = None,
        target_real_BM: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predictions (B, M, D) at the tokens `target_BM` from the features of `context_BK`; of those not real nothing depends."""
        seen_BKE = self.narrow(z_BKD) + self.place(positions_BC3, patches, context_BK)
        q_BME = self.query_E + self.place(positions_BC3, patches, target_BM)
        keys_BKE, real_BK = seen_BKE, context_real_BK
        if self.kind == "contextual":
            summary_BSE = self.pool(self.summary_SE.expand(len(z_BKD), -1, -1), real_BK, seen_BKE)
            keys_BKE, real_BK = beside(keys_BKE, real_BK, summary_BSE, None)
        for block in self.blocks:
            q_BME = block(q_BME, real_BK, keys_BKE)
        if (
            self.kind != "prelocal"
        ):  # self-attention over all of them; at the visible ones nobody would look at what comes out
            both_BKE, real_BK = beside(keys_BKE, real_BK, q_BME, target_real_BM)
            q_BME = self.refine(q_BME, real_BK, self.norm_refine(both_BKE))
        return self.out(self.norm(q_BME))


def beside(
    a_BKE: torch.Tensor, real_a_BK: torch.Tensor | None, b_BKE: torch.Tensor, real_b_BK: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Two sets of tokens as one, and which of them are real; None: all."""
    both_BKE = torch.cat([a_BKE, b_BKE], 1)
    if real_a_BK is None and real_b_BK is None:
        return both_BKE, None
    reals = ((a_BKE, real_a_BK), (b_BKE, real_b_BK))
    whole = [z.new_ones(z.shape[:2], dtype=torch.bool) if real is None else real for z, real in reals]
    return both_BKE, torch.cat(whole, 1)
