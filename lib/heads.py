"""
Heads fitted in one go on frozen features: a probe, and what training starts from.

Shape letters: B examples, E sites, T samples, K targets, O outputs, X features.
"""

import numpy as np
import torch

from lib import classical
from lib.inference import Inference
from lib.targets import Examples
from lib.transfer import Domain, Offsets, Transfer, groups, moved


def fit_heads(inference: Inference, train: Examples, most: int, transfer: Transfer, offsets: Offsets) -> Domain:
    """
    Fit the heads on frozen features at once: ridge or logistic regression, penalty by cross-validation over subjects.

    `transfer` moves the training features of at most so many examples (0: all) too, so that heads learn from what they will see; returns
    where they lay, and leaves in `offsets` how far each subject's were from there.
    """
    ids, decoder = train.even(most), inference.decoder
    held = fit_latency(inference, train, ids) if decoder.readout.latency else {}
    z_BX, y_BK = (t.double().numpy() for t in inference.features(train, ids))
    row_B, _ = train.locate(ids)
    domain, subject_B = Domain.of(z_BX), classical.subjects(train.cache, row_B)
    offsets.measure(z_BX, subject_B)
    z_BX = moved(z_BX, groups(train.cache, row_B, transfer), transfer, domain)
    for k, (target, head) in enumerate(zip(decoder.targets, decoder.heads, strict=True)):
        known_B = np.isfinite(y_BK[:, k])
        y_B = y_BK[known_B, k].astype(int) if target.classes else y_BK[known_B, k]
        if not len(y_B) or target.classes and len(set(y_B)) < 2:  # nothing to tell apart among these
            continue
        slope, level, seen_BX = 0.0, 0.0, z_BX[known_B]
        if k in held:  # by the latency as far as it goes, what it leaves by the rest
            slope, level = np.polyfit(held[k], y_B, 1)
            y_B, seen_BX = y_B - slope * held[k] - level, seen_BX * (np.arange(z_BX.shape[1]) < z_BX.shape[1] - 1)
        linear = classical.fit_linear(seen_BX, y_B, subject_B[known_B], len(target.classes))
        weight_XO = linear.weight_FK / linear.spread_F[:, None]
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(weight_XO.T))
            head.weight[:, -1] += slope
            head.bias.copy_(torch.from_numpy(linear.bias_K - linear.centre_F @ weight_XO) + level)
    return domain


def fit_latency(inference: Inference, train: Examples, ids: np.ndarray) -> dict[int, np.ndarray]:
    """Fit the filter of a `latency` readout to the first target that is a time; returns, by target, what filters of other subjects say."""
    k = next(k for k, t in enumerate(train.targets) if t.timed)
    y_B, target = train.values(ids)[:, k].astype(np.float64), train.targets[k]
    known_B = np.isfinite(y_B)
    subject_B = classical.subjects(train.cache, train.locate(ids[known_B])[0])
    x_BET, time_s_B = inference.steps(train, ids[known_B]), target.decode(y_B[known_B]) - target.after_s
    return {k: inference.decoder.readout.latency.fit(x_BET, time_s_B, subject_B)}
