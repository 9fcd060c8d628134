"""
What a trained flow and its encoder say of windows, in the form that lib/anomaly.py takes, without telling them any condition.

Shape letters: B or N windows, C channels, T samples, D width.
"""

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from lib import anomaly, flow
from lib.grid import mean_of
from lib.models import load_encoder
from lib.velocity import Velocity


class Windows(Protocol):
    """Some windows: raw for the encoder, whitened for the flow."""

    raw_BCT: torch.Tensor
    x1_BCT: torch.Tensor
    positions_BC3: torch.Tensor
    mask_BC: torch.Tensor | None


def encoder_beside(path: str | Path, net: Velocity) -> nn.Module:
    """The encoder of the run that a model is of: its file, or the one inside the network."""
    beside = Path(path).with_name("encoder.safetensors")
    return load_encoder(beside)[0] if beside.exists() else net.encoder


@torch.no_grad()
def features(encoder: nn.Module, parts: list[Windows], device: torch.device) -> np.ndarray:
    """Mean features (N, D) of whole patches of windows."""
    length, found = encoder.architecture.patch, []
    for part in parts:
        whole = part.raw_BCT.shape[2] // length * length
        mask_BC = None if part.mask_BC is None else part.mask_BC.to(device)
        z_BND = encoder(part.raw_BCT[:, :, :whole].to(device), part.positions_BC3.to(device), mask_BC)
        found.append(mean_of(z_BND, mask_BC).cpu())
    return torch.cat(found).numpy()


def flow_scores(
    net: Velocity,
    encoder: nn.Module,
    predict: str,
    healthy: list[Windows],
    test: list[Windows],
    rate_hz: float,
    nfe: int,
    seed: int,
    device: torch.device,
) -> dict[str, anomaly.Score]:
    """Every score of lib/anomaly.py: plain ones of the signal, neighbours in the encoder's features, and the flow's own."""
    net, encoder = net.to(device), encoder.to(device).eval()
    raw_healthy, raw_test = (torch.cat([p.raw_BCT for p in parts]).numpy() for parts in (healthy, test))
    white_healthy, white_test = (torch.cat([p.x1_BCT for p in parts]).numpy() for parts in (healthy, test))
    positions_1C3 = test[0].positions_BC3[:1].to(device)

    def of(count: int) -> flow.Velocity:
        code_NF = torch.full((count, net.codes), math.nan, device=device)
        return flow.network_velocity(net, code_NF, positions_1C3.expand(count, -1, -1), predict)

    @torch.no_grad()
    def velocity(x_NCT: np.ndarray, t: float) -> np.ndarray:
        x_NCT = torch.from_numpy(np.asarray(x_NCT, np.float32)).to(device)
        return of(len(x_NCT))(x_NCT, t).cpu().numpy()

    def encode(x_NCT: np.ndarray, probes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x_NCT = torch.from_numpy(x_NCT).to(device)
        noise_NCT, log_p_N, error_N = flow.log_likelihood(of(len(x_NCT)), x_NCT, nfe, probes, seed)
        return noise_NCT.cpu().numpy(), -log_p_N.cpu().numpy(), error_N.cpu().numpy()

    scores = anomaly.plain_scores(raw_healthy, raw_test, rate_hz)
    scores["5-NN of features"] = anomaly.feature_score(
        features(encoder, healthy, device), features(encoder, test, device)
    )
    scores["residual"] = anomaly.residual_score(velocity, white_healthy, white_test, seed=seed)
    return scores | anomaly.likelihood_scores(encode, white_healthy, white_test)
