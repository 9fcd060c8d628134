"""
What goes on inside a model: activations and gradients of every layer, units that do nothing, the windows it does worst on.

Shape letters: B windows, X units of a layer.
"""

from collections.abc import Callable

import torch
from torch import nn

from lib.inference import MOST_AT_ONCE, Inference
from lib.targets import Examples

DEAD = 1e-3  # a unit whose deviation is below this share of its layer's median deviation says nothing


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The layers looked at: linear maps and norms, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm)}


def autopsy(module: nn.Module, loss: Callable[[], torch.Tensor]) -> list[dict]:
    """
    One row per layer that `loss()`, a forward pass of `module`, runs through.

    `mean`, `std` and `largest` of its outputs, share of `dead` units (whose output hardly varies over tokens), norm of the gradient of
    its weights and that norm over the weights' own: where it is far smaller than elsewhere, nothing is learned.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.register_forward_hook(
            lambda _m, _x, out, name=name: seen.setdefault(name, []).append(out.detach().float())
        )
        for name, layer in layers_of(module).items()
    ]
    module.zero_grad(set_to_none=True)
    try:
        loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    rows = []
    for name, layer in layers_of(module).items():
        if name not in seen:
            continue
        out_BX = torch.cat([o.flatten(0, -2) for o in seen[name]])
        std_X = out_BX.std(0) if len(out_BX) > 1 else out_BX.new_zeros(out_BX.shape[1])
        gradient = 0.0 if layer.weight.grad is None else float(layer.weight.grad.norm())
        rows.append(
            {
                "layer": name,
                "mean": float(out_BX.mean()),
                "std": float(out_BX.std()),
                "largest": float(out_BX.abs().max()),
                "dead": float((std_X <= DEAD * std_X.median()).float().mean()),
                "gradient": gradient,
                "gradient_over_weight": gradient / max(float(layer.weight.detach().norm()), 1e-12),
            }
        )
    module.zero_grad(set_to_none=True)
    return rows


def dissect(inference: Inference, examples: Examples, most: int) -> list[dict]:
    """`autopsy` of a model on the first chunk of at most `most` examples (0: all), spread evenly; in float32."""
    decoder, ids = inference.decoder, examples.even(most)
    pieces = [piece.to(inference.device) for piece in next(inference.pieces(examples, ids))]
    count = sum(len(piece.y) for piece in pieces)

    def loss() -> torch.Tensor:
        return sum(decoder.loss(decoder(p.part), p.y).sum() for p in pieces) / count

    return autopsy(decoder, loss)


@torch.no_grad()
def worst_windows(inference: Inference, examples: Examples, most: int = 10) -> list[dict]:
    """The examples with the largest loss, of at most MOST_AT_ONCE spread evenly."""
    ids, decoder = examples.even(MOST_AT_ONCE), inference.decoder
    z_BX, y_BK = (t.to(inference.device) for t in inference.features(examples, ids))
    loss_B = torch.stack([decoder.loss(decoder.read(z[None]), y[None]).sum() for z, y in zip(z_BX, y_BK, strict=True)])
    order = loss_B.argsort(descending=True)[:most].cpu().numpy()
    row_B, start_B = examples.locate(ids[order])
    recordings, rate_hz = examples.cache.recordings, examples.cache.rate_hz
    return [
        {"recording": recordings[row].key, "start_s": start / rate_hz, "loss": float(loss_B[i])}
        for i, row, start in zip(order, row_B, start_B.tolist(), strict=True)
    ]
