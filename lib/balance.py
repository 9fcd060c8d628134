"""
How much each of several losses counts: by fixed weights, by their gradients, or by their uncertainty.

Every mode works on sums over the global batch, so that ranks and micro-batches change nothing, and starts from the fixed weights.
"""

import torch
from torch import nn

MODES = ("fixed", "gradnorm", "uncertainty")
EVERY = 10  # steps between the comparisons of gradients, each one more partial backward pass per loss
ALPHA = 0.5  # GradNorm's pull towards losses that have fallen less than others
PACE = 0.2  # share of the way that weights go, in logarithms, at each comparison
LEAST = 1e-3  # no weight falls below this share of them all


class Balance(nn.Module):
    """
    Weights of the losses `names`, in the proportions `shares` at first.

    gradnorm: weighted gradients at the last shared layer get the proportions of the shares; a loss that has fallen less than the others
    gets more (Chen 2018, equation 2). Weights move towards that in logarithms, not by a gradient of their own, so that the scales of the
    losses don't matter; they always add up to what the shares do.
    uncertainty: the sum of share x (exp(-s) x loss + s), s learned for each loss (Kendall 2018). This makes up for the losses' scales and
    keeps the shares. A weight learned without the term + s would go to 0.
    """

    def __init__(self, names: tuple[str, ...], shares: tuple[float, ...], mode: str):
        super().__init__()
        assert mode in MODES and len(names) == len(shares) and all(s > 0 for s in shares), (mode, names, shares)
        self.names, self.mode = names, mode
        self.register_buffer("share", torch.tensor(shares, dtype=torch.float32))
        self.register_buffer("weight", torch.tensor(shares, dtype=torch.float32))
        self.register_buffer("first", torch.zeros(len(names)))  # each loss when it was first compared; 0: not yet
        self.log_variance = nn.Parameter(torch.zeros(len(names)), requires_grad=mode == "uncertainty")

    def weights(self) -> list[float]:
        """What each loss is multiplied by in this step."""
        if self.mode == "uncertainty":
            return (self.share * torch.exp(-self.log_variance.detach())).tolist()
        return self.weight.tolist()

    def compares(self, step: int) -> bool:
        """Whether the gradients of this step are to be compared."""
        return self.mode == "gradnorm" and len(self.names) > 1 and step % EVERY == 0

    @torch.no_grad()
    def compare(self, losses: list[float], norms: list[float]) -> None:
        """Move the weights, given each loss and the norm of its own gradient at the shared layer, unweighted."""
        loss, norm = (torch.tensor(v, dtype=torch.float32, device=self.weight.device) for v in (losses, norms))
        if not (loss.isfinite().all() and norm.isfinite().all() and (norm > 0).all()):
            return  # a step that recovery will skip, or a loss that doesn't reach the layer yet
        self.first.copy_(torch.where(self.first > 0, self.first, loss))
        fallen = loss / self.first.clamp_min(1e-12)
        wanted = self.share * (fallen / fallen.mean()).clamp_min(1e-6) ** ALPHA
        wanted = wanted / norm
        wanted = wanted / wanted.sum() * self.share.sum()
        weight = self.weight ** (1 - PACE) * wanted**PACE
        weight = (weight / weight.sum()).clamp_min(LEAST)
        self.weight.copy_(weight / weight.sum() * self.share.sum())

    @torch.no_grad()
    def learn(self, losses: list[float]) -> float:
        """
        Give the log variances their gradient, from the losses of the global batch, and return what is added to the weighted losses.

        By hand, because no rank and no micro-batch has the whole loss.
        """
        if self.mode != "uncertainty":
            return 0.0
        loss = torch.tensor(losses, dtype=torch.float32, device=self.share.device)
        self.log_variance.grad = self.share * (1 - torch.exp(-self.log_variance) * loss)
        return float((self.share * self.log_variance).sum())
