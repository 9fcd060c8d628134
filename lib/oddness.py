"""
How strange held-out windows are: to a trained flow and its encoder, without any condition given, and to scores that need no network.

Shape letters: R recordings, B or N windows, C channels, T samples, D width.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lib import anomaly, flow, whitening
from lib.command import json_line
from lib.corpus import Corpus, even, for_strangers
from lib.errors import Unusable
from lib.generator import load_model
from lib.grid import mean_of
from lib.models import load_encoder
from lib.store import write_atomic
from lib.traits import class_name
from lib.velocity import Velocity
from lib.whitened import Target, White


def encoder_beside(path: str | Path, net: Velocity) -> nn.Module:
    """The encoder of the run that a model is of: its file, or the one inside the network."""
    beside = Path(path).with_name("encoder.safetensors")
    return load_encoder(beside)[0] if beside.exists() else net.encoder


@torch.no_grad()
def features(encoder: nn.Module, parts: list[White], device: torch.device) -> np.ndarray:
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
    healthy: list[White],
    test: list[White],
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


def score_run(
    model: str | Path,
    paths: Sequence[str | Path],
    healthy: str | None,
    *,
    stride: int,
    by_time: bool,
    share: float,
    count: int,
    nfe: int,
    seed: int,
    device: torch.device,
) -> dict:
    """
    Score held-out windows of caches beside training windows of recordings that are `healthy` (column=value; None: all are).

    At most `count` of each. Writes scores.json beside the model and returns what a command prints. Raises Unusable for caches that the
    model wasn't trained on the likes of, for unlike montages, and where there are too few windows.
    """
    began = time.perf_counter()
    net, whiten, meta = load_model(model)
    corpus = Corpus(paths, meta["window"], whiten.order, stride, by_time, share)
    model_of = {(t["signal"]["kind"], t["signal"]["rate_hz"], t["unit"]) for t in meta["templates"]}
    for path, cache in zip(paths, corpus.caches, strict=True):
        if (own := (cache.signal["kind"], cache.rate_hz, cache.unit)) not in model_of:
            raise Unusable(
                f"--score: {path} holds {own[0]} at {own[1]:g} Hz in {own[2]}, and {model} was trained on other signals"
            )
    well_R = healthy_ones(corpus, healthy)
    whole_R = np.array([len(corpus.good(i)) == len(r.names) for i, r in enumerate(corpus.recordings)])
    if left_out := int((~whole_R).sum()):  # a channel of zeros is stranger than anything a brain or a machine does
        print(f"{left_out} of {len(whole_R)} recordings have bad channels and are left out", file=sys.stderr)
    chosen = {"train": well_R & whole_R, "val": whole_R}
    if not all(fits[corpus.rows(part)].any() for part, fits in chosen.items()):
        raise Unusable(
            "--score: all recordings to compare have bad channels: build a cache of their good ones (--channels)"
        )
    found, row_of = {}, {}
    for part, fits in chosen.items():
        windows = corpus.windows(part)
        row_N, start_N = windows.locate(np.arange(len(windows)))
        kept = np.array(even(np.flatnonzero(fits[row_N]).tolist(), count), np.int64)
        if len(kept) < 2 * anomaly.NEIGHBOURS:
            raise Unusable(f"--score: too few windows to compare with, {len(kept)} of {part} (--healthy {healthy})")
        target = unconditioned(corpus, part, whiten, np.unique(row_N[kept]).tolist(), len(net.given.conditions), meta)
        found[part] = target.read(row_N[kept], start_N[kept], np.arange(len(kept)), 0, 64, seed, 0)
        row_of[part] = np.concatenate([white.recording_B for white in found[part]])
    rows = np.concatenate([*row_of.values()])
    if any(len({of(i) for i in rows}) > 1 for of in (corpus.rate_hz, lambda i: tuple(corpus.recordings[i].names))):
        raise Unusable("--score: recordings differ in rate or channels: give --cache with alike ones (--channels)")
    encoder, rate_hz = encoder_beside(model, net), corpus.rate_hz(rows[0])
    scores = flow_scores(net, encoder, meta["predict"], found["train"], found["val"], rate_hz, nfe, seed, device)
    row_N, table = row_of["val"], {}
    if healthy and (well_R[row_N].all() or not well_R[row_N].any()):
        which = "all" if well_R[row_N].all() else "none"
        print(
            f"--healthy {healthy}: {which} of the held-out windows are, so there is no area under the curve",
            file=sys.stderr,
        )
    elif healthy:
        table = anomaly.table(scores, ~well_R[row_N], [corpus.block(i) for i in row_N], seed)
    keys = [corpus.recordings[i].key for i in row_N]
    told = {name: {"value": s.value_N.tolist(), "error": s.error_N.tolist()} for name, s in scores.items()}
    path = Path(model).with_name("scores.json")
    write_atomic(
        path, json_line({"recording": keys, "healthy": well_R[row_N], "scores": told, "table": table}).encode()
    )
    return {
        "run": str(path.parent), "step": meta["step"], "metrics": {name: row["auroc"] for name, row in table.items()},
        "windows": len(keys), "left_out": left_out, "scores": str(path), "model": str(model), "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def healthy_ones(corpus: Corpus, healthy: str | None) -> np.ndarray:
    """Which recordings (R) have the value of a column=value; all for None. Raises Unusable where no training recording has."""
    column, given, value = (healthy or "").partition("=")
    named = corpus.values({column: (column,)}) if column else [{}] * len(corpus.recordings)
    values_R = [class_name(row.get(column)) for row in named]
    if healthy and not (given and any(v is not None for v in values_R)):
        raise Unusable(f"--healthy {healthy}: expected COLUMN=VALUE, of a column of the cache")
    well_R = np.array([v == (value or None) for v in values_R])
    if not well_R[corpus.rows("train")].any():
        known = sorted({str(values_R[i]) for i in corpus.rows("train")})
        raise Unusable(f"--healthy {healthy}: no training recording has it; there are: {', '.join(known)}")
    return well_R


def unconditioned(
    corpus: Corpus, part: str, whiten: whitening.Whitening, rows: list[int], conditions: int, meta: dict
) -> Target:
    """What reads recordings with the filters that fit them best, whatever is known of them."""
    group_R = np.zeros(len(corpus.recordings), np.int64)
    for i in rows:
        group_R[i] = whiten.choose(whitening.autocorrelation(torch.cat(corpus.signal(i, part), 1), whiten.order))
    own, group_R = for_strangers(corpus, whiten, group_R, rows, part)
    return Target(corpus, own, group_R, torch.full((len(group_R), conditions), math.nan), meta["level"])
