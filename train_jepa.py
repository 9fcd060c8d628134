"""
Pretrain an EEG encoder by predicting the representations of hidden (electrode, time) tokens: JEPA, phase 1.

    python train_jepa.py                                              # the demo cohort's cache, two cores, minutes
    python train_jepa.py --cache cache/a cache/b --name m50 --mask-ratio 0.5  # several caches, one change, one named run
    python train_jepa.py --name m50 --resume                           # go on after a kill, as if nothing had happened
    torchrun --nproc-per-node 8 train_jepa.py --preset base           # the same result from 8 processes

Needs a cache (build_cache.py). A context encoder sees the visible tokens of a window, a teacher (its moving average) sees all, and
a predictor tells from the context and the places of the hidden tokens what the teacher makes of them. The context encoder is what is
kept: runs/NAME/encoder.safetensors. To ablate something that is not a flag, copy this file.

Shape letters: B windows, C channels, T samples, P patches per channel, N = C * P tokens, K context tokens, M targets, D width.
"""

import copy
import math
import re
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lib import command, plot, recovery
from lib.alignment import Align, choose
from lib.batches import Part, read_parts
from lib.cache import Cache
from lib.errors import Failed, Unusable
from lib.flops import StepCost, matmul_rate
from lib.lineage import auxiliary_targets, check_leak, trained_on
from lib.losses import layer_normed, loss_latent, loss_sigreg, loss_vicreg
from lib.masks import check_tokens, draw_masks
from lib.metrics import collapsed, effective_rank, feature_std, variance_shares
from lib.models import save_encoder, signal_meta, start_encoder, take
from lib.optim import decay_groups, ema_momentum, ema_update, warm_restarts, warmup_cosine
from lib.precision import DTYPES, autocast, choose_dtype
from lib.predictor import Predictor
from lib.prefetch import Prefetch
from lib.probe import Probe, by_label, encode_by, stimuli
from lib.ranks import Ranks, join
from lib.run import Pace, Run, RunConfig, check_batch, due, saved_config, steps_of, without_val
from lib.samplers import DatasetSampler, SeizureSampler, SubjectSampler, UniformSampler
from lib.traits import AuxiliaryHeads, Trait, known_labels, read_traits, save_heads, trait_values
from lib.windows import Windows

Sampling = Literal["uniform", "subject", "seizure"]
Prediction = Literal["prelocal", "postlocal", "contextual"]
Kind = Literal["random", "spatial", "temporal", "spatiotemporal"]
RESTART_EPOCHS = 10  # of the first cosine of --schedule restarts; each is twice as long as the one before
EVAL_STEP = 2**31 - 1  # the "step" whose random numbers draw the masks of the validation windows


@dataclass(frozen=True)
class Config(RunConfig):
    # data
    cache: tuple[str, ...] = ("cache/demo",)  # directories written by build_cache.py
    window_s: float = 4.0  # length of a window, s
    stride_s: float = 2.0  # from one window's start to the next, s
    max_channels: int = 24  # channels of a window, drawn anew each time, for speed; 0: all
    align: Align = "auto"  # take off what channels share over a subject, recording, window; auto: as --init, else none
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
    relations: bool = True  # tokens know how their samples correlate with those of other electrodes, by place
    d_model: int = 128  # width
    layers: int = 4  # depth
    heads: int = 4  # attention heads
    patch_s: float = 1.0  # length of a token, s
    waveform: float = 1.0  # factor on raw samples' weights at the start; 5 keeps what a movie or a stimulus evokes
    init: str | None = None  # encoder.safetensors to start from; its architecture replaces the flags above
    # objective
    mask: Kind = "spatiotemporal"  # random: single tokens; else blocks of electrodes in a radius, patches, or both
    mask_ratio: float = 0.6  # share of tokens to predict, met exactly
    mask_radius_m: float = 0.09  # radius of a block around its central electrode, m
    mask_patches: int = 2  # patches that a block lasts
    predictor: Prediction = "prelocal"  # targets attend to the context; then to each other, too; or to a summary
    predictor_layers: int = 2  # depth of the predictor, half as wide as the encoder
    visible: float = 0.33  # weight of the same loss on visible tokens, told from themselves: features keep them
    ema: float = 0.996  # teacher's momentum at the first step, raised linearly to 1
    aux: tuple[str, ...] = ()  # columns to predict beside, as in: age sex p_factor; they can't be evaluated on then
    aux_weight: float = 0.45  # of their mean loss
    vicreg: float = 0.0  # weight of the variance and covariance of windows' features, against collapse
    sigreg: float = 0.0  # weight of their distance from a Gaussian, likewise
    collapse: Literal["warn", "stop"] = "warn"  # what to do when features have collapsed
    allow_leak: bool = False  # probe labels that were auxiliary targets, and people an --init was trained on
    # optimizer
    lr: float = 1e-3  # peak of AdamW's learning rate; small models need more
    weight_decay: float = 0.05  # of weight matrices
    schedule: Literal["cosine", "restarts"] = "cosine"  # once down to 0, or anew after 10, 20, 40 … epochs
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # largest gradient norm
    # evaluation
    val_windows: int = 256  # windows of the val split for val_loss and the collapse watch
    probe_windows: int = 400  # windows of the train and val splits for the linear probe
    keep: int = 3  # encoders of lowest val_loss kept in best/ beside the last one


PRESETS = {
    "mini": {},
    "base": dict(queries=128, d_model=512, layers=12, heads=8, batch=256, max_channels=0, steps=None, lr=1e-4, val_windows=1024, probe_windows=6000,
                 warmup=0.05, log_every=20, eval_every=1000, save_every=1000, probe_epochs=5),
    "full": dict(queries=128, d_model=768, layers=16, heads=12, batch=1024, max_channels=0, steps=None, lr=1e-4, val_windows=2048, probe_windows=10000,
                 warmup=0.05, log_every=20, eval_every=1000, save_every=1000, probe_epochs=5),
}  # fmt: skip


def choose_sampler(cfg: Config, windows: Windows):
    """The sampler of the training windows. Raises Unusable."""
    recordings = windows.cache.recordings
    try:
        if cfg.dataset_weights:
            return DatasetSampler(
                windows.ranges([r.dataset for r in recordings]), parse_weights(cfg), cfg.batch, cfg.seed
            )
        if cfg.sampler == "subject":
            return SubjectSampler(windows.ranges([r.subject for r in recordings]).values(), cfg.batch, cfg.seed)
        if cfg.sampler == "seizure":
            return SeizureSampler(*windows.seizure_ids(), len(windows), cfg.batch, cfg.seed)
        return UniformSampler(len(windows), cfg.batch, cfg.seed)
    except ValueError as error:
        raise Unusable(f"--sampler {cfg.sampler} --dataset-weights {' '.join(cfg.dataset_weights)}: {error}") from error


def parse_weights(cfg: Config) -> dict[str, float]:
    """The share of each data set. Raises Unusable."""
    weights = {}
    for text in cfg.dataset_weights:
        name, _, share = text.partition("=")
        if name in weights or not re.fullmatch(r"\d*\.?\d+", share):
            raise Unusable(f"--dataset-weights {text}: expected a data set once, = and its share, as in tuh=0.3")
        weights[name] = float(share)
    return weights


def draw(
    windows: Windows, ids_B: np.ndarray, index_B: np.ndarray, cfg: Config, micro: int, patch: int, step: int
) -> list[Part]:
    """
    Read windows in micro-batches and hide tokens of each.

    What happens to a window depends on (seed, step, its index in the global batch), not on how the batch is divided.
    """
    recording_B, start_B = windows.locate(ids_B)
    shape = (windows.samples, index_B, cfg.max_channels, micro, cfg.seed, step)
    parts = read_parts(windows.cache, recording_B, start_B, *shape)
    how = (cfg.mask_ratio, cfg.mask_radius_m, cfg.mask_patches, cfg.seed, step)
    for part in parts:
        good_BC = torch.ones(part.x_BCT.shape[:2], dtype=torch.bool) if part.mask_BC is None else part.mask_BC
        patches = windows.samples // patch
        part.masks = draw_masks(cfg.mask, part.positions_BC3, good_BC, patches, *how, part.index_B)
    return parts


class JEPA(nn.Module):
    """Context encoder, predictor and auxiliary heads: what the gradient goes to."""

    def __init__(self, encoder: nn.Module, predictor: str, predictor_layers: int, traits: list[Trait]):
        super().__init__()
        self.encoder = encoder
        self.predictor = Predictor(encoder.architecture, predictor_layers, predictor)
        self.heads = AuxiliaryHeads(encoder.architecture.d_model, traits)
        width = encoder.architecture.d_model
        self.own = nn.Linear(width, width)  # what the teacher makes of a visible token, told from its own features
        self.register_buffer("centre_D", torch.zeros(width))  # moving mean of the teacher's features

    def context(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the visible tokens (B, K, D), and their mean over each window (B, D)."""
        m = part.masks
        z_BKD = self.encoder(part.x_BCT, part.positions_BC3, None, m.context_BK, m.context_real_BK)
        return z_BKD, mean_of(z_BKD, m.context_real_BK)

    def forward(self, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From the visible tokens: the teacher's features of the hidden (B, M, D) and of the visible ones (B, K, D), and their own mean (B, D)."""
        m, patches = part.masks, part.x_BCT.shape[2] // self.encoder.architecture.patch
        z_BKD, mean_BD = self.context(part)
        places = (part.positions_BC3, patches, m.context_BK, m.target_BM, m.context_real_BK, m.target_real_BM)
        return self.predictor(z_BKD, *places), self.own(z_BKD), mean_BD


def mean_of(z_BKD: torch.Tensor, real_BK: torch.Tensor | None) -> torch.Tensor:
    """Mean over the real tokens of each window (B, D), float32."""
    if real_BK is None:
        return z_BKD.float().mean(1)
    return (z_BKD.float() * real_BK[:, :, None]).sum(1) / real_BK.sum(1, keepdim=True)


def jepa_loss(
    model: JEPA, teacher: nn.Module, part: Part, visible: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Latent loss of each window (B), the mean of its context's features (B, D), and that of the teacher's (B, D).

    A window's loss is the mean over its own targets, so that one of 129 electrodes counts no more than one of 19.
    """
    with torch.no_grad():
        z_BND = teacher(*part.signal).float()
        wanted_BND, m = layer_normed(z_BND - model.centre_D), part.masks
        level_BD = mean_of(z_BND, good_tokens(part, z_BND.shape[1]))
    predicted_BMD, own_BKD, mean_BD = model(part)
    hidden_B = loss_latent(predicted_BMD, take(wanted_BND, m.target_BM), m.target_real_BM)
    visible_B = loss_latent(own_BKD, take(wanted_BND, m.context_BK), m.context_real_BK)
    return hidden_B + visible * visible_B, mean_BD, level_BD


def good_tokens(part: Part, tokens: int) -> torch.Tensor | None:
    """Which tokens (B, N) are of good channels; None: all."""
    return None if part.mask_BC is None else part.mask_BC.repeat_interleave(tokens // part.mask_BC.shape[1], 1)


def regularise(
    model: JEPA, parts: list[Part], cfg: Config, dtype: str, ranks: Ranks, step: int
) -> tuple[float, torch.Tensor]:
    """
    The collapse terms of the global batch, and their gradient by the mean features of its windows (batch, D).

    They need all windows at once, which neither a rank nor a micro-batch has: features are made without a gradient first, and
    the second pass takes each window's share of it (GradCache, Gao 2021). One more forward pass of the context; the sums are exact.
    """
    with torch.no_grad(), autocast(ranks.device.type, dtype):
        mean_SD = torch.cat([model.context(part.to(ranks.device))[1] for part in parts])
    order_S = torch.from_numpy(np.argsort(np.concatenate([p.index_B for p in parts]))).to(ranks.device)
    z_BD = ranks.gather(mean_SD[order_S], cfg.batch).requires_grad_()
    loss = cfg.vicreg * loss_vicreg(z_BD) + cfg.sigreg * loss_sigreg(z_BD, cfg.seed, step)
    loss.backward()
    return float(loss.detach()), z_BD.grad


@torch.no_grad()
def evaluate(
    model: JEPA, teacher: nn.Module, parts: list[Part], dtype: str, subject_B: np.ndarray, stimulus_B: np.ndarray
) -> dict[str, float]:
    """Loss on held-out windows, and whether features still tell windows apart; the same windows and masks every time."""
    device = next(teacher.parameters()).device
    losses, cosines, agreements = [], [], []
    z_BD = torch.empty(len(subject_B), model.centre_D.numel())
    for part in (p.to(device) for p in parts):
        with autocast(device.type, dtype):
            z_BND = teacher(*part.signal).float()
            own_BND = model.encoder(*part.signal).float()
            predicted_BMD, _, _ = model(part)
        target_BMD = layer_normed(take(z_BND, part.masks.target_BM) - model.centre_D)
        losses.append(loss_latent(predicted_BMD, target_BMD, part.masks.target_real_BM).cpu())
        cosine_BM1 = F.cosine_similarity(predicted_BMD.float(), target_BMD, dim=2)[:, :, None]
        cosines.append(mean_of(cosine_BM1, part.masks.target_real_BM).cpu())
        good_BN = good_tokens(part, z_BND.shape[1])
        agreements.append(mean_of(F.cosine_similarity(z_BND, own_BND, dim=2)[:, :, None], good_BN).cpu())
        z_BD[part.index_B] = mean_of(own_BND, good_BN).cpu()
    by_subject, by_stimulus = variance_shares(z_BD, subject_B, stimulus_B)
    return {
        "val_loss": float(torch.cat(losses).mean()),
        "feature_rank": effective_rank(z_BD),
        "feature_std": feature_std(z_BD),
        "teacher_cosine": float(torch.cat(agreements).mean()),
        "predicted_cosine": float(torch.cat(cosines).mean()),
        "subject_share": by_subject,
        "stimulus_share": by_stimulus,
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
    command.check_signs(
        cfg,
        positive="batch mask_patches predictor_layers lr clip log_every val_windows probe_windows steps epochs",
        not_negative="micro max_channels eval_every save_every probe_epochs mask_radius_m weight_decay seed keep aux_weight visible vicreg sigreg waveform",
    )
    if cfg.batch == 1 and (cfg.vicreg or cfg.sigreg):
        raise Unusable("--vicreg and --sigreg compare windows: they need a --batch of at least two")


def main(cfg: Config) -> dict | None:
    ranks = join(cfg.device)
    device = ranks.device
    if cfg.batch < ranks.world:
        raise Unusable(f"--batch {cfg.batch} is less than one window for each of {ranks.world} processes")
    cache = Cache(*cfg.cache)
    cache.align(choose(cfg.align, cfg.init))
    torch.manual_seed(cfg.seed)
    sizes = (cfg.encoder, cfg.d_model, cfg.layers, cfg.heads, cfg.adapter, cfg.queries, cfg.relations)
    encoder, lineage = start_encoder(cfg.init, cache, cfg.patch_s, *sizes)
    patch = encoder.architecture.patch
    train = cache.windows("train", cfg.window_s, cfg.stride_s)
    check(cfg, train.samples, patch)
    check_batch(cfg.batch, len(train))
    held_out = "val" if cache.long_enough("val", train.samples) else "train"
    val = cache.windows(held_out, cfg.window_s, cfg.stride_s)
    if min(cfg.val_windows, len(val)) < 2:
        mend = (
            "raise it"
            if len(val) > 1
            else "take a shorter --window-s or --stride-s, or more for val ([split] in dataset.toml)"
        )
        words = f"--val-windows {cfg.val_windows}, of {len(val)} there are in {held_out}"
        raise Unusable(f"{words}: whether features tell windows apart takes two; {mend}")
    there = [row for split in ("train", held_out) for row in cache.long_enough(split, train.samples)]
    check_tokens(cache, there, cfg.max_channels, train.samples // patch)
    rows = [i for i, r in enumerate(cache.recordings) if r.split == "train"]
    traits = read_traits(cache, cfg.aux, rows)
    trait_RK = trait_values(cache, traits)
    check_leak(lineage, [r.subject for r in cache.recordings if r.split == "val"], (), cfg.allow_leak)
    told = () if cfg.allow_leak else (*auxiliary_targets(lineage), *(t.name for t in traits))  # not to be probed
    sampler, share = choose_sampler(cfg, train), ranks.share(cfg.batch)
    steps = cfg.steps or steps_of(cfg.epochs, len(train), cfg.batch)
    warmup = max(1, round(cfg.warmup * steps))
    period, probe_every = (steps_of(epochs, len(train), cfg.batch) for epochs in (RESTART_EPOCHS, cfg.probe_epochs))

    run = Run(cfg, __file__, ranks, cache.fingerprint)
    if held_out == "train":
        run.say(without_val(len(cache.rows(["val"])), f"{cfg.window_s:g} s"))
    if not cfg.init:
        parts = draw(train, sampler.ids(0), np.arange(cfg.batch), cfg, cfg.micro, patch, 0)
        encoder.calibrate(parts)
    with torch.no_grad():
        encoder.embed.samples.weight *= cfg.waveform
    model = JEPA(encoder.train(), cfg.predictor, cfg.predictor_layers, traits).to(device)
    teacher = copy.deepcopy(model.encoder).requires_grad_(False).eval()
    modules, parameters = {"model": model, "teacher": teacher}, list(model.parameters())
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=cfg.lr, fused=True)
    state = {"step": 0, "dtype": None, "recent": [], "untrained": {}, "probe_protocol": {}, "best": []}
    state |= recovery.fresh(cfg.micro)
    if cfg.resume:
        state |= run.restore(modules, optimizer)

    if not state["dtype"]:
        some = share if device.type == "cuda" else share[:16]
        part = draw(train, sampler.ids(0)[some], some, cfg, cfg.micro, patch, 0)[0].to(device)
        state["dtype"] = choose_dtype(
            cfg.dtype, lambda m, t: jepa_loss(m, t, part, cfg.visible)[0], (model, teacher), ranks
        )
    loss_of = torch.compile(jepa_loss) if cfg.compile else jepa_loss
    meta = signal_meta(cache) | {
        "window_s": cfg.window_s,
        "run": run.name,
        "lineage": lineage,
        "waveform": cfg.waveform,
    }
    meta |= trained_on(cache, rows, [t.name for t in traits])
    if ranks.first:
        ids = np.linspace(0, len(val) - 1, min(cfg.val_windows, len(val))).astype(np.int64)
        val_parts = draw(val, ids, np.arange(len(ids)), cfg, cfg.micro, patch, EVAL_STEP)
        groups = [cache.recordings[i].subject for i in val.locate(ids)[0]], stimuli(val, ids)
        probe = Probe(cache, cfg.window_s, cfg.stride_s, cfg.probe_windows, cfg.max_channels, told)
    if run.fresh:  # what the untrained encoder gives is a baseline too, and a state to go back to
        values = evaluate(model, teacher, val_parts, state["dtype"], *groups) if ranks.first else {}
        state["untrained"] = ranks.agree({name: values.get(name) for name in ("feature_rank", "feature_std")})
        if ranks.first:
            run.log(0, **values, **probe.score(encode_by(model.encoder, state["dtype"])))
        run.save(state, modules, optimizer)
    cost = StepCost(lambda part: jepa_loss(model, teacher, part.to(device), cfg.visible)[0], model)
    rate = matmul_rate(DTYPES[state["dtype"]], device)

    def batch_of(step: int) -> tuple[list[Part], torch.Tensor]:
        ids = sampler.ids(step)
        known_K = known_labels(trait_RK, train.locate(ids)[0])  # in the global batch
        return draw(train, ids[share], share, cfg, state["micro"], patch, step), known_K

    loader = Prefetch(batch_of, state["step"], steps, shares=ranks.device.type == "cpu")
    bar = tqdm(total=steps, initial=state["step"], unit="step", disable=not ranks.first, dynamic_ncols=True)
    pace, regularised_step, regularised, pull_BD = Pace(device), -1, 0.0, None
    for step, (parts, known_K) in loader:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        cosine = cfg.schedule == "cosine"
        lr = warmup_cosine(step, steps, cfg.lr, warmup) if cosine else warm_restarts(step, period, cfg.lr, warmup)
        lr *= state["lr_scale"]
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        sums_2, level_D = torch.zeros(2, device=device), torch.zeros_like(model.centre_D)
        try:
            if (cfg.vicreg or cfg.sigreg) and regularised_step != step:  # once, as all ranks take part
                regularised, pull_BD = regularise(model, parts, cfg, state["dtype"], ranks, step)
                regularised_step = step
            for part in (p.to(device) for p in parts):
                with autocast(device.type, state["dtype"]):
                    latent_B, mean_BD, level_BD = loss_of(model, teacher, part, cfg.visible)
                    aux = model.heads.loss(mean_BD, trait_RK[part.recording_B].to(device), known_K)
                latent = latent_B.sum() / cfg.batch
                pulled = 0.0 if pull_BD is None else (mean_BD * pull_BD[part.index_B]).sum()
                (latent + cfg.aux_weight * aux + pulled).backward()
                sums_2 += torch.stack([latent, aux]).detach()
                level_D += level_BD.sum(0) / cfg.batch
        except RuntimeError as error:  # out of memory, or raised again
            recovery.halve(error, run, state, max(len(p.x_BCT) for p in parts))
            loader.seek(step)
            continue
        tokens = sum(p.masks.tokens for p in parts)
        latent, aux, tokens, stop = ranks.sum([*(p.grad for p in parameters), level_D], [*sums_2, tokens, run.stop])
        loss = latent + cfg.aux_weight * aux + regularised
        norm = float(nn.utils.clip_grad_norm_(parameters, cfg.clip))
        if recovery.sound(state, loss, norm):
            optimizer.step()
            ema_update(teacher, model.encoder, ema_momentum(step, steps, cfg.ema))
            model.centre_D.lerp_(level_D, 0.1 if step else 1.0)
            state["recent"].append((loss, norm, latent, aux, regularised))
        elif recovery.skip(run, state, loss, norm, sampler.ids(step).tolist()):
            recovery.go_back(run, state, modules, optimizer)
            loader.seek(state["step"])
            bar.update(state["step"] - step)
            continue
        pace.add(began, cfg.batch, tokens)
        bar.update()

        state["step"] = done = step + 1
        last, values, alarm = done == steps, {}, None
        if ranks.first and (last or due(done, cfg.eval_every)):
            values |= evaluate(model, teacher, val_parts, state["dtype"], *groups)
            alarm = collapsed(values, state["untrained"])
            if path := run.among_best(state, values["val_loss"], cfg.keep):
                save_encoder(path, model.encoder, meta | {"step": done})
        if ranks.first and (last or due(done, probe_every)):
            values |= probe.score(encode_by(model.encoder, state["dtype"]))
            state["probe_protocol"] = probe.protocol
        if values or last or due(done, cfg.log_every):
            means = np.mean(state["recent"] or [(math.nan,) * 5], axis=0).tolist()
            names = ("loss", "grad_norm", "loss_latent", "loss_aux", "loss_regularised")
            state["recent"] = []
            counts = {name: state[name] for name in ("skipped", "rollbacks")} | ({"alarm": alarm} if alarm else {})
            speed = pace.take(loader, sum(map(cost, parts)) / rate)
            run.log(done, **dict(zip(names, means, strict=True)), lr=lr, **counts, **values, **speed)
            watched = {k: f"{values[k]:.3g}" for k in ("val_loss", "feature_rank") if k in values}
            bar.set_postfix(loss=f"{means[0]:.4f}", **watched)
        if alarm:
            run.say(f"COLLAPSE at step {done}: {alarm}. Lower --lr, raise --ema, or add --vicreg or --sigreg")
        on_time = last or due(done, cfg.save_every)
        if last or (on_time or stop) and not state["streak"]:
            run.save(state, modules, optimizer, on_time)
        if cfg.collapse == "stop" and (last or due(done, cfg.eval_every)) and ranks.agree(alarm):
            raise Failed(f"features collapsed at step {done}, see alarm in {run.directory}/log.jsonl")
        if stop and not last:
            run.interrupt(f"at step {done} of {steps}")
    bar.close()
    loader.close()

    results = None
    if ranks.first:
        lines = run.lines()
        save_encoder(run.directory / "encoder.safetensors", model.encoder, meta | {"step": steps})
        if traits:
            save_heads(run.directory / "traits.safetensors", model.heads, meta | {"step": steps})
        plot.curves(lines, run.directory / "curves.png")
        results = report(run, lines, state, sum(p.numel() for p in encoder.parameters()))
    run.close()
    return results


def report(run: Run, lines: list[dict], state: dict, parameters: int) -> dict:
    """What the command prints: the last line of the log, and beside each probe that of the untrained encoder, from the first."""
    first, final = lines[0], lines[-1]
    keys = (
        "val_loss loss loss_latent loss_aux loss_regularised feature_rank feature_std teacher_cosine predicted_cosine"
    )
    keys += " subject_share stimulus_share skipped rollbacks alarm"
    metrics = {k: final[k] for k in keys.split() if k in final}
    told = {k: v for k, v in final.items() if k.startswith("probe_")}
    own = (k for k in first if k.startswith("probe_") and not k.endswith(("_bandpower", "_chance")))
    told |= {f"{k}_untrained": first[k] for k in own}
    return run.results(state, metrics, parameters, probes=by_label(told, state["probe_protocol"]))


if __name__ == "__main__":
    sys.exit(command.run(main, Config, __doc__, PRESETS, saved_config))
