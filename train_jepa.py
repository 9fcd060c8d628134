"""
Pretrain an EEG encoder by predicting the representations of hidden (electrode, time) tokens: JEPA, phase 1.

    python train_jepa.py                                              # the demo cohort's cache, two cores, minutes
    python train_jepa.py --cache cache/a cache/b --name m50 --mask-ratio 0.5  # several caches, one change, one named run
    python train_jepa.py --name m50 --resume                           # go on after a kill, as if nothing had happened
    torchrun --nproc-per-node 8 train_jepa.py --preset base           # the same result from 8 processes

Needs a cache (build_cache.py). A context encoder sees the visible tokens of a window, a teacher (its moving average) sees all, and
a predictor tells from the context and the places of the hidden tokens what the teacher makes of them. The teacher is what is kept:
runs/NAME/encoder.safetensors. To ablate something that is not a flag, copy this file.

Shape letters: B windows, C channels, T samples, P patches per channel, N = C * P tokens, K context tokens, M targets, D width.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lib import command, plot
from lib.cache import Batch, Cache
from lib.errors import Failed, Unusable
from lib.losses import layer_normed, loss_latent
from lib.masks import Masks, choose_channels, draw_masks
from lib.metrics import effective_rank, feature_std
from lib.models import Architecture, Predictor, build_encoder, load_encoder, save_encoder, signal_meta, take
from lib.optim import decay_groups, ema_momentum, ema_update, warmup_cosine
from lib.precision import autocast, choose_dtype
from lib.prefetch import Prefetch
from lib.probe import Probe
from lib.ranks import join
from lib.run import Pace, Run, RunConfig, due, saved_config
from lib.samplers import DatasetSampler, SeizureSampler, SubjectSampler, UniformSampler
from lib.windows import Windows

Sampling = Literal["uniform", "subject", "seizure"]
Kind = Literal["random", "spatial", "temporal", "spatiotemporal"]
EVAL_STEP = 2**31 - 1  # the "step" whose random numbers draw the masks of the validation windows
MOST_SKIPPED = 10  # steps in a row without a finite gradient that end the run


@dataclass(frozen=True)
class Config(RunConfig):
    # data
    cache: tuple[str, ...] = ("cache/demo",)  # directories written by build_cache.py
    window_s: float = 4.0  # length of a window, s
    stride_s: float = 2.0  # from one window's start to the next, s
    max_channels: int = 24  # channels of a window, drawn anew each time, for speed; 0: all
    sampler: Sampling = "uniform"  # over windows, over subjects, or balanced for seizures
    dataset_weights: tuple[str, ...] = ()  # shares of the data sets instead, as in: tuh=0.3 hbn=0.7
    batch: int = 64  # windows per step, over all ranks
    micro: int = 0  # windows per forward pass on one device, for memory; 0: all of a montage at once
    steps: int | None = 400  # optimizer steps; none: from --epochs
    epochs: float = 200.0  # passes over the training windows; counts if --steps is none
    # encoder
    encoder: Literal["transformer", "mamba", "fno", "hybrid"] = "transformer"  # what mixes the tokens
    adapter: Literal["none", "perceiver", "nearest"] = "none"  # montage of its own: learned, or by nearest electrode
    queries: int = 32  # electrodes of that montage, at most 128; 4 to 16 for speed
    d_model: int = 128  # width
    layers: int = 4  # depth
    heads: int = 4  # attention heads
    patch_s: float = 1.0  # length of a token, s
    init: str | None = None  # encoder.safetensors to start from; its architecture replaces the flags above
    # objective
    mask: Kind = (
        "spatiotemporal"  # random: single tokens; others: blocks of electrodes within a radius, patches, or both
    )
    mask_ratio: float = 0.6  # share of tokens to predict, met exactly
    mask_radius_m: float = 0.09  # of a block, around its central electrode
    mask_patches: int = 2  # patches that a block lasts
    predictor_layers: int = 2  # depth of the predictor, half as wide as the encoder
    ema: float = 0.996  # teacher's momentum at the first step, raised linearly to 1
    # optimizer
    lr: float = 1e-3  # peak of AdamW's learning rate; small models need more
    weight_decay: float = 0.05  # of weight matrices
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # largest gradient norm
    # evaluation
    val_windows: int = 256  # windows of the val split for val_loss and the collapse watch
    probe_windows: int = 400  # windows of the train and val splits for the linear probe


PRESETS = {
    "mini": {},
    "base": dict(queries=128, d_model=512, layers=12, heads=8, batch=256, max_channels=0, steps=None, lr=1e-4, val_windows=1024, probe_windows=6000,
                 warmup=0.05, log_every=20, eval_every=1000, save_every=1000, probe_every=10000),
    "full": dict(queries=128, d_model=768, layers=16, heads=12, batch=1024, max_channels=0, steps=None, lr=1e-4, val_windows=2048, probe_windows=10000,
                 warmup=0.05, log_every=20, eval_every=1000, save_every=1000, probe_every=10000),
}  # fmt: skip


@dataclass
class Part:
    """Windows of one micro-batch, all of about the same number of channels, and what is hidden in them."""

    x_BCT: torch.Tensor
    positions_BC3: torch.Tensor
    mask_BC: torch.Tensor | None  # None: every channel is good
    masks: Masks

    def good_patches(self, patch: int) -> torch.Tensor:
        """The samples of all tokens of good channels."""
        x_BCT = self.x_BCT if self.mask_BC is None else self.x_BCT[self.mask_BC]
        return x_BCT.reshape(-1, patch)

    def to(self, device: torch.device) -> "Part":
        if device.type == "cpu":
            return self
        x, positions, mask = (
            None if t is None else t.to(device, non_blocking=True)
            for t in (self.x_BCT, self.positions_BC3, self.mask_BC)
        )
        return Part(x, positions, mask, self.masks.to(device))


def choose_sampler(cfg: Config, windows: Windows):
    """The sampler of the training windows. Raises Unusable."""
    recordings = windows.cache.recordings
    try:
        if cfg.dataset_weights:
            weights = {name: float(share) for name, _, share in (text.partition("=") for text in cfg.dataset_weights)}
            return DatasetSampler(windows.ranges([r.dataset for r in recordings]), weights, cfg.batch, cfg.seed)
        if cfg.sampler == "subject":
            return SubjectSampler(windows.ranges([r.subject for r in recordings]).values(), cfg.batch, cfg.seed)
        if cfg.sampler == "seizure":
            return SeizureSampler(*windows.seizure_ids(), len(windows), cfg.batch, cfg.seed)
        return UniformSampler(len(windows), cfg.batch, cfg.seed)
    except ValueError as error:
        raise Unusable(f"--sampler {cfg.sampler} --dataset-weights {' '.join(cfg.dataset_weights)}: {error}") from error


def draw(windows: Windows, ids_B: np.ndarray, index_B: np.ndarray, cfg: Config, patch: int, step: int) -> list[Part]:
    """
    Read windows and hide tokens: micro-batches by number of channels, so that a small montage is never padded to a large one.

    What happens to a window depends on (seed, step, its index in the global batch), not on how the batch is divided.
    """
    recording_B, start_B = windows.locate(ids_B)
    channels_B = np.array([len(windows.cache.recordings[i].names) for i in recording_B])
    if cfg.max_channels:
        channels_B = np.minimum(channels_B, cfg.max_channels)
    parts = []
    for channels in np.unique(channels_B):
        alike = np.flatnonzero(channels_B == channels)
        for some in np.array_split(alike, -(-len(alike) // (cfg.micro or len(alike)))):
            batch = windows.cache.read(recording_B[some], start_B[some], windows.samples)
            kept_BC = choose_channels(batch.mask_BC, cfg.max_channels, cfg.seed, step, index_B[some])
            x_BCT = take(batch.x_BCT, kept_BC)
            positions_BC3, mask_BC = take(batch.positions_BC3, kept_BC), batch.mask_BC.gather(1, kept_BC)
            shape = (
                cfg.mask,
                positions_BC3,
                mask_BC,
                windows.samples // patch,
                cfg.mask_ratio,
                cfg.mask_radius_m,
                cfg.mask_patches,
            )
            masks = draw_masks(*shape, cfg.seed, step, index_B[some])
            parts.append(Part(x_BCT, positions_BC3, None if mask_BC.all() else mask_BC, masks))
    return parts


class JEPA(nn.Module):
    """Context encoder and predictor: what the gradient goes to."""

    def __init__(self, encoder: nn.Module, predictor_layers: int):
        super().__init__()
        self.encoder = encoder
        self.predictor = Predictor(encoder.architecture, predictor_layers)
        self.register_buffer(
            "centre_D", torch.zeros(encoder.architecture.d_model)
        )  # moving mean of the teacher's features

    def forward(self, part: Part) -> torch.Tensor:
        m, patches = part.masks, part.x_BCT.shape[2] // self.encoder.architecture.patch
        z_BKD = self.encoder(part.x_BCT, part.positions_BC3, None, m.context_BK, m.context_real_BK)
        return self.predictor(z_BKD, part.positions_BC3, patches, m.context_BK, m.target_BM, m.context_real_BK)


def jepa_loss(model: JEPA, teacher: nn.Module, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Loss summed over the real targets of all windows, and the teacher's features summed over all good tokens (D).

    The step divides both by their number in the global batch.
    """
    with torch.no_grad():
        z_BND = teacher(part.x_BCT, part.positions_BC3, part.mask_BC).float()
        target_BMD = layer_normed(take(z_BND, part.masks.target_BM) - model.centre_D)
        if part.mask_BC is not None:
            z_BND = z_BND * part.mask_BC.repeat_interleave(z_BND.shape[1] // part.mask_BC.shape[1], 1)[:, :, None]
    return loss_latent(model(part), target_BMD, part.masks.target_real_BM), z_BND.sum((0, 1))


@torch.no_grad()
def evaluate(model: JEPA, teacher: nn.Module, parts: list[Part], dtype: str) -> dict[str, float]:
    """Loss on held-out windows, and whether features still tell windows apart; the same windows and masks every time."""
    device = next(teacher.parameters()).device
    losses, targets, cosines, agreements, features = 0.0, 0, 0.0, [], []
    for part in (p.to(device) for p in parts):
        with autocast(device.type, dtype):
            z_BND = teacher(part.x_BCT, part.positions_BC3, part.mask_BC).float()
            own_BND = model.encoder(part.x_BCT, part.positions_BC3, part.mask_BC).float()
            predicted_BMD = model(part).float()
        target_BMD, real_BM = (
            layer_normed(take(z_BND, part.masks.target_BM) - model.centre_D),
            part.masks.target_real_BM,
        )
        losses += float(loss_latent(predicted_BMD, target_BMD, real_BM))
        targets += part.masks.targets
        cosine_BM = F.cosine_similarity(predicted_BMD, target_BMD, dim=2)
        cosines += float(cosine_BM.sum() if real_BM is None else cosine_BM[real_BM].sum())
        good_BN1 = torch.ones_like(z_BND[:, :, :1])
        if part.mask_BC is not None:
            good_BN1 *= part.mask_BC.repeat_interleave(z_BND.shape[1] // part.mask_BC.shape[1], 1)[:, :, None]
        features.append(((z_BND * good_BN1).sum(1) / good_BN1.sum(1)).cpu())
        agreements.append(F.cosine_similarity(z_BND, own_BND, dim=2)[good_BN1[:, :, 0] > 0].cpu())
    z_BD = torch.cat(features)
    return {
        "val_loss": losses / targets,
        "feature_rank": effective_rank(z_BD),
        "feature_std": feature_std(z_BD),
        "teacher_cosine": float(torch.cat(agreements).mean()),
        "predicted_cosine": cosines / targets,
    }


def check(cfg: Config, window: int, patch: int) -> None:
    """Raises Unusable for flags that make no sense, alone or together."""
    if window % patch:
        raise Unusable(
            f"--window-s {cfg.window_s:g} is {window} samples, no whole number of patches of {patch} (--patch-s or --init)"
        )
    if window == patch and cfg.mask == "temporal":
        raise Unusable("--mask temporal needs windows of at least two patches: raise --window-s or lower --patch-s")
    if not (0 < cfg.mask_ratio < 1 and 0 <= cfg.ema <= 1 and 0 <= cfg.warmup <= 1):
        raise Unusable("--mask-ratio must lie between 0 and 1, and --ema and --warmup in 0 to 1")
    for name in "batch mask_patches predictor_layers lr clip log_every val_windows probe_windows steps epochs".split():
        if getattr(cfg, name) is not None and not getattr(cfg, name) > 0:
            raise Unusable(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be positive")
    for name in "micro max_channels eval_every save_every probe_every mask_radius_m weight_decay seed".split():
        if getattr(cfg, name) < 0:
            raise Unusable(f"--{name.replace('_', '-')} {getattr(cfg, name)} must not be negative")


def main(cfg: Config) -> dict | None:
    ranks = join(cfg.device)
    device = ranks.device
    if cfg.batch < ranks.world:
        raise Unusable(f"--batch {cfg.batch} is less than one window for each of {ranks.world} processes")
    cache = Cache(*cfg.cache)
    torch.manual_seed(cfg.seed)
    lineage: list[dict] = []
    if cfg.init:
        encoder, init = load_encoder(cfg.init, cache)
        lineage = [*init["lineage"], {"file": cfg.init, "run": init["run"], "step": init["step"]}]
    else:
        patch = round(cfg.patch_s * cache.rate_hz)
        if patch != cfg.patch_s * cache.rate_hz:
            raise Unusable(f"--patch-s {cfg.patch_s:g} is not a whole number of samples at {cache.rate_hz:g} Hz")
        sizes = (cfg.encoder, cfg.d_model, cfg.layers, cfg.heads, cache.rate_hz, patch, cfg.adapter, cfg.queries)
        encoder = build_encoder(Architecture(*sizes))
    patch = encoder.architecture.patch
    train = cache.windows("train", cfg.window_s, cfg.stride_s)
    check(cfg, train.samples, patch)
    held_out = "val" if any(r.split == "val" for r in cache.recordings) else "train"
    val = cache.windows(held_out, cfg.window_s, cfg.stride_s)
    sampler, share = choose_sampler(cfg, train), ranks.share(cfg.batch)
    steps = cfg.steps or max(1, round(cfg.epochs * len(train) / cfg.batch))
    warmup = max(1, round(cfg.warmup * steps))

    run = Run(cfg, __file__, ranks)
    if not cfg.init:
        parts = draw(train, sampler.ids(0), np.arange(cfg.batch), cfg, patch, 0)
        encoder.embed.calibrate(torch.cat([p.good_patches(patch) for p in parts]))
    model = JEPA(encoder.train(), cfg.predictor_layers).to(device)
    teacher = copy.deepcopy(model.encoder).requires_grad_(False).eval()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=cfg.lr, fused=True)
    state = {"step": 0, "dtype": None, "skipped": 0, "in_a_row": 0, "recent": [], "probe_protocol": {}}
    if cfg.resume:
        state |= run.restore({"model": model, "teacher": teacher}, optimizer)

    if not state["dtype"]:
        some = share if device.type == "cuda" else share[:16]
        part = draw(train, sampler.ids(0)[some], some, cfg, patch, 0)[0].to(device)
        state["dtype"] = choose_dtype(cfg.dtype, trial(model, teacher, part), ranks)
    loss_of = torch.compile(jepa_loss) if cfg.compile else jepa_loss
    if ranks.first:
        ids = np.linspace(0, len(val) - 1, min(cfg.val_windows, len(val))).astype(np.int64)
        val_parts = draw(val, ids, np.arange(len(ids)), cfg, patch, EVAL_STEP)
        probe = Probe(cache, cfg.window_s, cfg.stride_s, cfg.probe_windows)
    if ranks.first and state["step"] == 0:  # what the untrained encoder gives is a baseline too
        values = evaluate(model, teacher, val_parts, state["dtype"])
        run.log(0, **values, **probe.score(encode_by(teacher, state["dtype"])))

    loader = Prefetch(lambda s: draw(train, sampler.ids(s)[share], share, cfg, patch, s), state["step"], steps)
    bar = tqdm(total=steps, initial=state["step"], unit="step", disable=not ranks.first, dynamic_ncols=True)
    pace = Pace(device)
    for step in range(state["step"], steps):
        began = time.perf_counter()
        lr = warmup_cosine(step, steps, cfg.lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts, loss_sum, z_sum_D = loader.next(), torch.zeros((), device=device), torch.zeros_like(model.centre_D)
        for part in (p.to(device) for p in parts):
            with autocast(device.type, state["dtype"]):
                loss, z_D = loss_of(model, teacher, part)
            loss.backward()
            loss_sum += loss.detach()
            z_sum_D += z_D
        targets, tokens = (sum(getattr(p.masks, name) for p in parts) for name in ("targets", "tokens"))
        # divided once, by the targets of the global batch: neither ranks nor micro-batches change what a token counts
        gradients = [p.grad for p in parameters]
        loss_sum, targets, tokens, stop = ranks.sum([*gradients, z_sum_D], [loss_sum, targets, tokens, run.stop])
        torch._foreach_div_(gradients, targets)
        norm = float(nn.utils.clip_grad_norm_(parameters, cfg.clip))
        if math.isfinite(loss_sum) and math.isfinite(norm):
            optimizer.step()
            ema_update(teacher, model.encoder, ema_momentum(step, steps, cfg.ema))
            model.centre_D.lerp_(z_sum_D / tokens, 0.1 if step else 1.0)
            state["recent"].append((loss_sum / targets, norm))
            state["in_a_row"] = 0
        else:  # never stepped on
            state["skipped"] += 1
            state["in_a_row"] += 1
        optimizer.zero_grad(set_to_none=True)
        pace.add(began, cfg.batch, tokens)
        bar.update()

        state["step"] = done = step + 1
        last, values = done == steps, {}
        if ranks.first and (last or due(done, cfg.eval_every)):
            values |= evaluate(model, teacher, val_parts, state["dtype"])
        if ranks.first and (last or due(done, cfg.probe_every)):
            values |= probe.score(encode_by(teacher, state["dtype"]))
            state["probe_protocol"] = probe.protocol
        if values or last or due(done, cfg.log_every):
            loss, norm = np.mean(state["recent"] or [(math.nan, math.nan)], axis=0).tolist()
            state["recent"] = []
            skipped = state["skipped"]
            run.log(done, loss=loss, lr=lr, grad_norm=norm, skipped=skipped, **values, **pace.take(loader))
            watched = {k: f"{values[k]:.3g}" for k in ("val_loss", "feature_rank") if k in values}
            bar.set_postfix(loss=f"{loss:.4f}", **watched)
        if last or stop or due(done, cfg.save_every):
            run.save(state, {"model": model, "teacher": teacher}, optimizer)
        if state["in_a_row"] == MOST_SKIPPED:
            raise Failed(
                f"no finite gradient in {MOST_SKIPPED} steps up to {done}: lower --lr {cfg.lr:g} or check the data"
            )
        if stop and not last:
            go_on = f"python {Path(__file__).name} --name {run.directory} --resume"
            raise KeyboardInterrupt(f"at step {done} of {steps}; go on with: {go_on}")
    bar.close()
    loader.close()

    results = None
    if ranks.first:
        lines = run.lines()
        meta = signal_meta(cache) | {"window_s": cfg.window_s, "run": run.name, "step": steps, "lineage": lineage}
        save_encoder(run.directory / "encoder.safetensors", teacher, meta)
        plot.curves(lines, run.directory / "curves.png")
        results = report(run, lines, state, sum(p.numel() for p in teacher.parameters()))
    run.close()
    return results


def trial(model: JEPA, teacher: nn.Module, part: Part) -> Callable[[str], None]:
    """Forward and backward pass of a throwaway copy, in a number format."""
    model, teacher = copy.deepcopy(model), copy.deepcopy(teacher)

    def work(dtype: str) -> None:
        with autocast(part.x_BCT.device.type, dtype):
            loss, _ = jepa_loss(model, teacher, part)
        loss.backward()

    return work


def encode_by(teacher: nn.Module, dtype: str) -> Callable[[Batch], torch.Tensor]:
    """A function that gives the teacher's features (B, N, D) of a batch."""
    device = next(teacher.parameters()).device

    @torch.no_grad()
    def encode(batch: Batch) -> torch.Tensor:
        mask_BC = None if batch.mask_BC.all() else batch.mask_BC.to(device)
        with autocast(device.type, dtype):
            return teacher(batch.x_BCT.to(device), batch.positions_BC3.to(device), mask_BC).float().cpu()

    return encode


def report(run: Run, lines: list[dict], state: dict, parameters: int) -> dict:
    """What the command prints: the last line of the log, and the probe of the untrained encoder from the first."""
    first, final = lines[0], lines[-1]
    keys = ("loss", "val_loss", "feature_rank", "feature_std", "teacher_cosine", "predicted_cosine", "skipped")
    metrics = {k: v for k, v in final.items() if k in keys or k.startswith("probe_")}
    probes = (k for k in first if k.startswith("probe_") and not k.endswith(("_bandpower", "_chance")))
    metrics |= {f"{k}_untrained": first[k] for k in probes}
    speeds = [line["windows_per_s"] for line in lines if line.get("windows_per_s")]
    return {
        "run": str(run.directory),
        "step": final["step"],
        "metrics": metrics,
        "probe_protocol": state["probe_protocol"],
        "windows_per_s": float(np.median(speeds)),
        "seconds": round(run.seconds(), 1),
        "parameters": parameters,
        "dtype": state["dtype"],
        "encoder": str(run.directory / "encoder.safetensors"),
    }


if __name__ == "__main__":
    sys.exit(command.run(main, Config, __doc__, PRESETS, saved_config))
