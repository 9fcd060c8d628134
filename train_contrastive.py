"""
Align an EEG encoder across people: what different brains make of the same moment should be alike, phase 2.

    python train_contrastive.py --init runs/jepa-1/encoder.safetensors  # the demo cohort: same movie, other brain
    python train_contrastive.py --init runs/jepa-1/encoder.safetensors --pairs movie:0.6 resting:0.2 augment:0.2
    python train_contrastive.py --cache cache/a --pairs event:1 --events "13 Hz" "17 Hz" --event-s 5  # without --init: from scratch
    python train_contrastive.py --name align --resume                   # go on after a kill, as if nothing had happened
    torchrun --nproc-per-node 8 train_contrastive.py --preset base      # the same result from 8 processes

Needs a cache (build_cache.py) with what its pairs are made of: events of movies, of the eyes, or any; tasks; or nothing (augment,
neighbour). Both windows of a pair are augmented, encoded, and projected; the loss wants partners closer than all others of the global
batch, but for those of the same moment or state, which may rightly be close. The encoder is kept, runs/NAME/encoder.safetensors;
isc.png and map.png show held-out people before and after. To ablate something that is not a flag, copy this file.

Shape letters: B pairs, V = 2B views (all anchors, then all partners), C channels, T samples, P patches per channel, N = C * P tokens,
M targets or moments, S subjects, D width, E width of a projected window.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lib import command, plot, recovery
from lib.alignment import Align, choose
from lib.batches import Part, read_parts
from lib.cache import Cache
from lib.contrast import (
    Projection,
    alignment,
    loss_infonce,
    loss_supcon,
    loss_vicreg_pairs,
    save_projection,
    uniformity,
    units,
)
from lib.errors import Unusable
from lib.films import Curves, Films
from lib.flops import StepCost, matmul_rate
from lib.grid import mean_of, take
from lib.lineage import auxiliary_targets, check_leak, trained_on, waveform_factor
from lib.losses import layer_normed, loss_latent
from lib.masks import check_tokens, draw_masks
from lib.metrics import collapsed, effective_rank, feature_std, variance_shares
from lib.models import save_encoder, signal_meta, start_encoder
from lib.optim import ema_momentum, ema_update, layer_groups, warmup_cosine
from lib.pairs import PairSampler, labels_of, parse_shares
from lib.precision import DTYPES, autocast, choose_dtype
from lib.predictor import Predictor
from lib.prefetch import Prefetch
from lib.probe import Probe, by_label, encode_by
from lib.ranks import Ranks, join
from lib.run import Pace, Run, RunConfig, check_batch, due, saved_config, steps_of, without_val
from lib.tensors import load_tensors, save_tensors
from lib.views import Strength, draws, make_view

EVAL_STEP = 2**30  # from here on, "steps" whose random numbers draw pairs, views and masks of the validation windows


@dataclass(frozen=True)
class Config(RunConfig):
    # data
    cache: tuple[str, ...] = ("cache/demo",)  # directories written by build_cache.py
    window_s: float = 4.0  # length of a window, s
    stride_s: float = 2.0  # from one anchor to the next in an epoch, s; each is moved by up to that much
    max_channels: int = 24  # channels of a window, drawn anew each time, for speed; 0: all
    align: Align = "auto"  # take off what channels share over a subject, recording, window; auto: as --init, else none
    batch: int = 32  # pairs per step, over all ranks
    micro: int = 0  # windows per forward pass on one device; 0: all of a montage, kept until the loss is known
    steps: int | None = 400  # optimizer steps; none: from --epochs
    epochs: float = 100.0  # passes over the anchors of all kinds; counts if --steps is none
    # pairs
    pairs: tuple[str, ...] = ("movie:1",)  # kinds and shares: movie, resting, event, task, augment, neighbour
    tolerance_s: float = 0.0  # partners of a movie's moment may be so far from it
    guard_s: float = 0.0  # moments of a movie, or windows of a recording, so close are no negatives; 0: one window
    neighbour_s: float = 10.0  # how far a neighbour may be
    resting_subjects: Literal["other", "any", "same"] = "other"  # whom a partner of the same resting state is from
    events: tuple[str, ...] = ()  # labels for event pairs; none: all that have a duration
    event_s: float = 0.0  # duration of those that have none; 0: one window
    # views: the most that is done to a window; each draws how much it gets
    warp_s: float = 0.0  # smooth displacement in time, s
    shift_s: float = 0.0  # displacement of the whole window, s
    white_db: float | None = -10.0  # power of white noise relative to each channel, dB; none: off
    pink_db: float | None = None  # power of 1/f noise, dB
    amplitude_db: float = 2.0  # gain per channel, dB
    bandstop_hz: float = 0.0  # width of a band that is taken out, Hz
    dropout: float = 0.3  # share of channels that are masked, scattered or together
    flip: float = 0.0  # probability of the opposite sign
    # encoder
    init: str | None = None  # encoder.safetensors to start from; its architecture replaces the flags below
    encoder: Literal["transformer", "mamba", "fno", "hybrid"] = "transformer"  # what mixes the tokens
    adapter: Literal["none", "perceiver", "nearest"] = "none"  # montage of its own: learned, or by nearest electrode
    queries: int = 32  # electrodes of that montage, at most 128
    relations: bool = True  # tokens know how their samples correlate with those of other electrodes, by place
    d_model: int = 128  # width
    layers: int = 4  # depth
    heads: int = 4  # attention heads
    patch_s: float = 1.0  # length of a token, s
    waveform: float | None = None  # factor on raw samples at the start; none: 5 in all phases for movies, else 1
    # objective
    loss: Literal["infonce", "ntxent", "supcon", "vicreg"] = "ntxent"  # negatives from the other half, or from both
    temperature: float = 0.1  # of the similarities; where learning starts
    learn_temperature: bool = True  # or keep it fixed
    projection: int = 32  # width of what is compared, per patch or per window
    compare: Literal["patches", "windows"] = "patches"  # patch by patch in time, or means over windows
    jepa: float = 0.0  # weight of phase 1's masked prediction beside, so that it isn't forgotten
    mask_ratio: float = 0.6  # its share of hidden tokens, in blocks of 9 cm and 2 patches
    predictor_layers: int = 2  # depth of its predictor
    ema: float = 0.996  # its teacher's momentum at the first step, raised linearly to 1
    allow_leak: bool = False  # evaluate people and labels that an --init was trained on
    # optimizer
    lr: float = 1e-3  # peak of AdamW's learning rate, of the projection and the last layer
    lr_decay: float = 1.0  # from each layer to the one below it; under 1 keeps more of an --init
    weight_decay: float = 0.05  # of weight matrices
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # largest gradient norm
    # evaluation
    val_pairs: int = 256  # pairs of the val split for val_loss
    film_subjects: int = 32  # of train and of val, evenly, whose movies are evaluated before and after; 0: none
    film_step_s: float = 1.0  # between the moments that are told apart
    probe_windows: int = 400  # windows of the train and val splits for the linear probe
    keep: int = 3  # encoders of lowest val_loss kept in best/ beside the last one


PRESETS = {
    "mini": {},
    "base": dict(queries=128, d_model=512, layers=12, heads=8, batch=256, micro=64, max_channels=0, steps=None, lr=1e-4, val_pairs=1024,
                 film_subjects=64, probe_windows=6000, warmup=0.05, log_every=20, eval_every=1000, save_every=1000),
    "full": dict(queries=128, d_model=768, layers=16, heads=12, batch=1024, micro=64, max_channels=0, steps=None, lr=1e-4, val_pairs=2048,
                 film_subjects=128, probe_windows=10000, warmup=0.05, log_every=20, eval_every=1000, save_every=1000),
}  # fmt: skip


@dataclass
class Views:
    """What one rank does in a step: its own views in micro-batches, and how all views of the global batch stand to each other."""

    parts: list[Part]
    alike_VV: torch.Tensor
    excluded_VV: torch.Tensor
    recording_V: np.ndarray
    start_V: np.ndarray


def draw(
    cache: Cache, sampler: PairSampler, share: np.ndarray, cfg: Config, micro: int, patch: int, step: int
) -> Views:
    """
    Read both windows of this rank's pairs and augment them.

    What happens to a view depends on (seed, step, its index in the global batch), not on how the batch is divided.
    """
    pairs = sampler.draw(step)
    view_V = np.concatenate([share, share + sampler.batch])
    which = (pairs.recording_V[view_V], pairs.start_V[view_V], sampler.samples, view_V)
    parts = read_parts(cache, *which, cfg.max_channels, micro, cfg.seed, step)
    names = ("warp_s", "shift_s", "white_db", "pink_db", "amplitude_db", "bandstop_hz", "dropout", "flip")
    strength = Strength(**{name: getattr(cfg, name) for name in names})
    for part in parts:
        good_BC = torch.ones(part.x_BCT.shape[:2], dtype=torch.bool) if part.mask_BC is None else part.mask_BC
        draw_of = draws(cfg.seed, step, part.index_B)
        part.x_BCT, good_BC = make_view(part.x_BCT, part.positions_BC3, good_BC, cache.rate_hz, strength, draw_of)
        part.mask_BC = None if good_BC.all() else good_BC
        if cfg.jepa:
            how = (cfg.mask_ratio, 0.09, 2, cfg.seed, step, part.index_B)
            part.masks = draw_masks("spatiotemporal", part.positions_BC3, good_BC, sampler.samples // patch, *how)
    alike_VV, excluded_VV = torch.from_numpy(pairs.alike_VV), torch.from_numpy(pairs.excluded_VV)
    return Views(parts, alike_VV, excluded_VV, pairs.recording_V, pairs.start_V)


class Aligned(nn.Module):
    """Encoder, projection, and the predictor of phase 1 if that goes on: what the gradient goes to."""

    def __init__(self, encoder: nn.Module, cfg: Config):
        super().__init__()
        a = encoder.architecture
        self.encoder = encoder
        self.project = Projection(a, cfg.projection, cfg.compare == "patches", cfg.temperature)
        self.project.log_temperature.requires_grad_(cfg.learn_temperature and cfg.loss != "vicreg")
        self.predictor = Predictor(a, cfg.predictor_layers) if cfg.jepa else None
        self.register_buffer("centre_D", torch.zeros(a.d_model))  # moving mean of the teacher's features

    def forward(self, part: Part) -> torch.Tensor:
        """Projected windows (B, E)."""
        return self.project(self.encoder(*part.signal), part.positions_BC3, part.mask_BC)


def loss_of(y_VE: torch.Tensor, views: Views, temperature: torch.Tensor, kind: str) -> torch.Tensor:
    """The objective, of the projected views of a global batch."""
    if kind == "vicreg":
        return loss_vicreg_pairs(y_VE)
    relations = (views.alike_VV.to(y_VE.device), views.excluded_VV.to(y_VE.device))
    if kind == "supcon":
        return loss_supcon(units(y_VE), *relations, temperature)
    return loss_infonce(units(y_VE), *relations, temperature, within=kind == "ntxent")


def compare(model: Aligned, forward: Callable, views: Views, cfg: Config, dtype: str, ranks: Ranks, keep: bool):
    """
    The loss of the global batch, its gradient by the projected views (V, E), that by the temperature, and this rank's projected views.

    Every rank gathers all views and computes the same loss. Later each takes its own rows of the gradient back through its encoder
    (GradCache, Gao 2021). That needs a second forward pass, unless `keep` keeps the graphs of the first.
    """
    projected = []
    with torch.set_grad_enabled(keep), autocast(ranks.device.type, dtype):
        for part in views.parts:
            projected.append(forward(part.to(ranks.device)))
    return *pull(model, projected, views, cfg, ranks), projected if keep else []


def pull(
    model: Aligned, projected: list[torch.Tensor], views: Views, cfg: Config, ranks: Ranks
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """Gather projected views, and what `compare` returns of them."""
    order_S = torch.from_numpy(np.argsort(np.concatenate([p.index_B for p in views.parts]))).to(ranks.device)
    own_2SE = torch.cat([y.detach() for y in projected])[order_S].unflatten(0, (2, -1))
    both_BE = ranks.gather(
        own_2SE.transpose(0, 1).flatten(1), cfg.batch
    ).requires_grad_()  # anchor and partner side by side
    temperature = model.project.log_temperature
    y_VE = both_BE.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)
    loss = loss_of(y_VE, views, model.project.temperature(), cfg.loss)
    pull_VE = ranks.gradient(loss, both_BE).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)
    told = None if temperature.grad is None else temperature.grad.clone()
    return float(loss.detach()), pull_VE, told


def predict_hidden(model: Aligned, teacher: nn.Module, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase 1's latent loss of each window (B), and the mean of the teacher's features over its tokens (B, D)."""
    m, patches = part.masks, part.x_BCT.shape[2] // model.encoder.architecture.patch
    with torch.no_grad():
        z_BND = teacher(*part.signal).float()
        target_BMD = layer_normed(take(z_BND, m.target_BM) - model.centre_D)
    z_BKD = model.encoder(part.x_BCT, part.positions_BC3, None, m.context_BK, m.context_real_BK)
    places = (part.positions_BC3, patches, m.context_BK, m.target_BM, m.context_real_BK, m.target_real_BM)
    return loss_latent(model.predictor(z_BKD, *places), target_BMD, m.target_real_BM), mean_of(z_BND, part.mask_BC)


@torch.no_grad()
def evaluate(model: Aligned, batches: list[Views], cfg: Config, dtype: str, cache: Cache) -> dict[str, float]:
    """Loss on held-out pairs and what it is made of, and whether features still tell windows apart; the same pairs every time."""
    device = model.centre_D.device
    losses, projected, features, rows = [], [], [], []
    for views in batches:
        z_VD = torch.empty(len(views.recording_V), model.centre_D.numel())
        y_VE = None
        for part in (p.to(device) for p in views.parts):
            with autocast(device.type, dtype):
                z_BND = model.encoder(*part.signal)
                y_BE = model.project(z_BND, part.positions_BC3, part.mask_BC).cpu()
            y_VE = torch.empty(len(z_VD), y_BE.shape[1]) if y_VE is None else y_VE
            y_VE[part.index_B], z_VD[part.index_B] = y_BE, mean_of(z_BND, part.mask_BC).cpu()
        losses.append(loss_of(y_VE, views, model.project.temperature().cpu(), cfg.loss).item())
        half = len(z_VD) // 2
        projected.append(units(y_VE).unflatten(0, (2, half)))
        features.append(z_VD[:half])
        rows += views.recording_V[:half].tolist()
    z_BD, unit_VE = torch.cat(features), torch.cat(projected, 1).flatten(0, 1)
    by_subject, by_task = variance_shares(
        z_BD, [cache.recordings[i].subject for i in rows], [cache.recordings[i].task or None for i in rows]
    )
    return {
        "val_loss": float(np.mean(losses)),
        "alignment": alignment(unit_VE),
        "uniformity": uniformity(unit_VE),
        "feature_rank": effective_rank(z_BD),
        "feature_std": feature_std(z_BD),
        "subject_share": by_subject,
        "stimulus_share": by_task,
    }


def check(cfg: Config, window: int, patch: int, ranks: Ranks) -> None:
    """Raises Unusable for flags that make no sense, alone or together."""
    if cfg.batch < max(2, ranks.world):
        raise Unusable(f"--batch {cfg.batch} pairs: two at least, or there are no negatives, and one for each process")
    if window % patch:
        raise Unusable(
            f"--window-s {cfg.window_s:g} is {window} samples, no whole number of patches of {patch} (--patch-s or --init)"
        )
    if not (0 < cfg.mask_ratio < 1 and 0 <= cfg.ema <= 1 and 0 <= cfg.warmup <= 1 and 0 < cfg.lr_decay <= 1):
        raise Unusable("--mask-ratio and --lr-decay must lie between 0 and 1, and --ema and --warmup in 0 to 1")
    if not (0.01 <= cfg.temperature <= 1 and 0 <= cfg.dropout < 1 and 0 <= cfg.flip <= 1):
        raise Unusable("--temperature must lie in 0.01 to 1, --flip in 0 to 1, and --dropout below 1")
    if cfg.warp_s * math.pi >= 1:
        raise Unusable(f"--warp-s {cfg.warp_s:g} would make time run backwards: less than 0.318")
    command.check_signs(
        cfg,
        positive="predictor_layers projection lr clip log_every val_pairs film_step_s probe_windows steps epochs",
        not_negative="micro max_channels eval_every save_every probe_epochs weight_decay seed keep jepa film_subjects tolerance_s "
        "guard_s neighbour_s event_s warp_s shift_s amplitude_db bandstop_hz waveform",
    )


def pair_sampler(cfg: Config, cache: Cache, rows: list[int]) -> PairSampler:
    """Pairs among some recordings. Raises Unusable."""
    return PairSampler(
        *(cache, rows, cfg.window_s, cfg.stride_s, parse_shares(cfg.pairs), cfg.batch, cfg.seed),
        tolerance_s=cfg.tolerance_s,
        neighbour_s=cfg.neighbour_s,
        guard_s=cfg.guard_s,
        resting_subjects=cfg.resting_subjects,
        events=cfg.events,
        event_s=cfg.event_s,
    )


def main(cfg: Config) -> dict | None:
    ranks = join(cfg.device)
    device = ranks.device
    cache = Cache(*cfg.cache)
    cache.align(choose(cfg.align, cfg.init))
    torch.manual_seed(cfg.seed)
    sizes = (cfg.encoder, cfg.d_model, cfg.layers, cfg.heads, cfg.adapter, cfg.queries, cfg.relations)
    encoder, lineage = start_encoder(cfg.init, cache, cfg.patch_s, *sizes)
    patch = encoder.architecture.patch
    train, samples = cache.rows(["train"]), cache.windows("train", cfg.window_s, cfg.stride_s).samples
    held = cache.long_enough("val", samples)
    check(cfg, samples, patch, ranks)
    moment = cfg.film_step_s * cache.rate_hz
    if abs(moment - round(moment)) > 1e-6 * moment:
        raise Unusable(
            f"--film-step-s {cfg.film_step_s:g} is {moment:g} samples at {cache.rate_hz:g} Hz, no whole number"
        )
    if cfg.jepa:  # of which dropout may leave one channel
        check_tokens(
            cache, cache.long_enough("train", samples), 1 if cfg.dropout else cfg.max_channels, samples // patch
        )
    check_leak(lineage, [cache.recordings[i].subject for i in held], (), cfg.allow_leak)
    told = () if cfg.allow_leak else auxiliary_targets(lineage)  # not to be probed
    paired = () if cfg.allow_leak else labels_of(parse_shares(cfg.pairs))  # on val alone
    sampler, share = pair_sampler(cfg, cache, train), ranks.share(cfg.batch)
    anchors = sum(int(np.diff(found.ranges).sum()) for found in sampler.partners.values())
    check_batch(cfg.batch, anchors, "windows of train that have a partner")
    steps = cfg.steps or steps_of(cfg.epochs, anchors, cfg.batch)
    warmup, probe_every = max(1, round(cfg.warmup * steps)), steps_of(cfg.probe_epochs, anchors, cfg.batch)

    run = Run(cfg, __file__, ranks, cache.fingerprint)
    if not held:
        run.say(without_val(len(cache.rows(["val"])), f"{cfg.window_s:g} s"))
    try:
        val_sampler = pair_sampler(cfg, cache, held) if held else sampler
    except Unusable as error:
        run.say(f"no val_loss, and so no best/: in the val split {error}")
        val_sampler = None
    if not cfg.init:
        views = draw(cache, sampler, np.arange(cfg.batch), cfg, cfg.micro, patch, 0)
        encoder.calibrate(views.parts)
    model = Aligned(encoder.train(), cfg).to(device)
    modules = {"model": model}
    if cfg.jepa:
        modules["teacher"] = copy.deepcopy(model.encoder).requires_grad_(False).eval()
    rest = nn.ModuleList(m for m in (model.project, model.predictor) if m is not None)
    optimizer = torch.optim.AdamW(
        layer_groups(model.encoder, rest, cfg.lr_decay, cfg.weight_decay), lr=cfg.lr, fused=True
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        "step": 0,
        "dtype": None,
        "recent": [],
        "untrained": {},
        "probe_protocol": {},
        "best": [],
    } | recovery.fresh(cfg.micro)
    if cfg.resume:
        state |= run.restore(modules, optimizer)

    if not state["dtype"]:
        some = share if device.type == "cuda" else share[:8]
        part = draw(cache, sampler, some, cfg, 0, patch, 0).parts[0].to(device)
        state["dtype"] = choose_dtype(cfg.dtype, lambda m: m(part).square(), (model,), ranks)
    forward = torch.compile(model) if cfg.compile else model
    meta = signal_meta(cache) | {
        "window_s": cfg.window_s,
        "run": run.name,
        "lineage": lineage,
        "waveform": waveform_factor(cfg.waveform, "movie" in parse_shares(cfg.pairs), lineage),
        **trained_on(cache, train),
    }
    if ranks.first:
        every = np.arange(cfg.batch)
        eval_steps = range(EVAL_STEP, EVAL_STEP + -(-cfg.val_pairs // cfg.batch)) if val_sampler else ()
        val = [draw(cache, val_sampler, every, cfg, cfg.micro, patch, s) for s in eval_steps]
        probe = Probe(cache, cfg.window_s, cfg.stride_s, cfg.probe_windows, cfg.max_channels, told, paired)
        films = Films(cache, train, held or train, cfg.window_s, cfg.film_step_s, cfg.film_subjects, cfg.max_channels)
        if not films.names:
            run.say("no movie that two held-out subjects saw: no retrieval and no inter-subject correlation")
    if run.fresh:  # what training starts from, to compare with
        if ranks.first:
            values = evaluate(model, val, cfg, state["dtype"], cache) if val else {}
            state["untrained"] = {name: values.get(name) for name in ("feature_rank", "feature_std")}
            values |= probe.score(encode_by(model.encoder, state["dtype"]))
            found, shared, tables = films.score(embed_by(model, state["dtype"]))
            signal, shared_signal = films.score_signals()
            run.log(0, **values, **found, **signal)
            keep_before(run, shared | shared_signal, tables)
        with torch.no_grad():  # people who see the same share a waveform, of which phase 1's features have little
            model.encoder.embed.samples.weight *= meta["waveform"]
        run.save(state, modules, optimizer)

    cost = StepCost(lambda part: model(part.to(device)), model)
    rate = matmul_rate(DTYPES[state["dtype"]], device)
    loader = Prefetch(
        lambda s: draw(cache, sampler, share, cfg, state["micro"], patch, s),
        state["step"],
        steps,
        shares=ranks.device.type == "cpu",
    )
    bar = tqdm(total=steps, initial=state["step"], unit="step", disable=not ranks.first, dynamic_ncols=True)
    pace, compared = Pace(device), None
    for step, views in loader:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        lr = state["lr_scale"] * warmup_cosine(step, steps, cfg.lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        latent_sum, level_D = torch.zeros((), device=device), torch.zeros_like(model.centre_D)
        try:
            if compared is None or compared[0] != step:  # once, as all ranks take part
                keep = not state["micro"]
                compared = (step, *compare(model, forward, views, cfg, state["dtype"], ranks, keep))
                kept = compared[-1]
            _, loss, pull_VE, by_temperature, _ = compared
            model.project.log_temperature.grad = by_temperature
            for i, part in enumerate(p.to(device) for p in views.parts):
                with autocast(device.type, state["dtype"]):
                    y_BE = kept[i] if kept else forward(part)
                    total = (y_BE * pull_VE[part.index_B]).sum()
                    if cfg.jepa:
                        latent_B, z_BD = predict_hidden(model, modules["teacher"], part)
                        total = total + cfg.jepa * latent_B.sum() / (2 * cfg.batch)
                        latent_sum += latent_B.detach().sum() / (2 * cfg.batch)
                        level_D += z_BD.sum(0) / (2 * cfg.batch)
                total.backward()
        except RuntimeError as error:  # out of memory, or raised again
            recovery.halve(error, run, state, max(len(p.x_BCT) for p in views.parts))
            kept, y_BE, total = [], None, None  # and with them the graphs of the first pass, of all its memory
            compared = compared and (*compared[:-1], [])
            loader.seek(step)
            continue
        tokens = sum(p.x_BCT.shape[0] * p.x_BCT.shape[1] * (p.x_BCT.shape[2] // patch) for p in views.parts)
        latent, tokens, stop = ranks.sum([*(p.grad for p in parameters), level_D], [latent_sum, tokens, run.stop])
        total = loss + cfg.jepa * latent
        norm = float(nn.utils.clip_grad_norm_(parameters, cfg.clip))
        if recovery.sound(state, total, norm):
            optimizer.step()
            if cfg.jepa:
                ema_update(modules["teacher"], model.encoder, ema_momentum(step, steps, cfg.ema))
                model.centre_D.lerp_(level_D, 0.1 if step else 1.0)
            negatives = float((~(views.alike_VV | views.excluded_VV)).sum(1).float().mean())
            state["recent"].append((total, norm, loss, latent, negatives))
        elif recovery.skip(run, state, total, norm, [views.recording_V.tolist(), views.start_V.tolist()]):
            recovery.go_back(run, state, modules, optimizer)
            loader.seek(state["step"])
            bar.update(state["step"] - step)
            continue
        pace.add(began, 2 * cfg.batch, tokens)
        bar.update()

        state["step"] = done = step + 1
        last, values = done == steps, {}
        if ranks.first and val and (last or due(done, cfg.eval_every)):
            values |= evaluate(model, val, cfg, state["dtype"], cache)
            if alarm := collapsed(values, state["untrained"]):
                values["alarm"] = alarm
                run.say(f"COLLAPSE at step {done}: {alarm}. Lower --lr or raise --temperature")
            if path := run.among_best(state, values["val_loss"], cfg.keep):
                save_encoder(path, model.encoder, meta | {"step": done})
        if ranks.first and (last or due(done, probe_every)):
            values |= probe.score(encode_by(model.encoder, state["dtype"]))
            values |= films.score(embed_by(model, state["dtype"]))[0]
            state["probe_protocol"] = probe.protocol
        if values or last or due(done, cfg.log_every):
            means = np.mean(state["recent"] or [(math.nan,) * 5], axis=0).tolist()
            names = ("loss", "grad_norm", "loss_contrast", "loss_latent", "negatives")
            state["recent"] = []
            counts = {name: state[name] for name in ("skipped", "rollbacks")}
            counts["temperature"] = round(model.project.temperature().item(), 5)
            speed = pace.take(loader, sum(map(cost, views.parts)) / rate)
            run.log(done, **dict(zip(names, means, strict=True)), lr=lr, **counts, **values, **speed)
            watched = {k: f"{values[k]:.3g}" for k in ("val_loss", "embedding_retrieval_top1") if k in values}
            bar.set_postfix(loss=f"{means[0]:.4f}", **watched)
        on_time = last or due(done, cfg.save_every)
        if last or (on_time or stop) and not state["streak"]:
            run.save(state, modules, optimizer, on_time)
        if stop and not last:
            run.interrupt(f"at step {done} of {steps}")
    bar.close()
    loader.close()

    results = None
    if ranks.first:
        lines = run.lines()
        save_encoder(run.directory / "encoder.safetensors", model.encoder, meta | {"step": steps})
        which = (model.project, model.encoder.architecture, meta | {"step": steps})
        save_projection(run.directory / "projection.safetensors", *which)
        plot.curves(lines, run.directory / "curves.png")
        if films.names:
            found, shared, tables = films.score(embed_by(model, state["dtype"]))
            draw_films(run, shared, tables)
        results = report(run, lines, state, sum(p.numel() for p in model.encoder.parameters()))
    run.close()
    return results


def keep_before(run: Run, shared: dict[str, Curves], tables: dict[str, np.ndarray]) -> None:
    """Write what the figures need of the encoder that training starts from; a run may be resumed before they are drawn."""
    meta = {"shared": {kind: asdict(curves) for kind, curves in shared.items()}}
    encoder_SMD = tables.get("encoder", np.empty((0, 0, 0), np.float32))
    save_tensors(run.directory / "before.safetensors", {"encoder_SMD": torch.from_numpy(encoder_SMD)}, meta)


def draw_films(run: Run, shared: dict[str, Curves], tables: dict[str, np.ndarray]) -> None:
    """Figures of held-out subjects before and after."""
    before, meta = load_tensors(run.directory / "before.safetensors")
    curves = {kind: Curves(**c) for kind, c in meta["shared"].items()}
    order = {"signal": "signal", "encoder": "encoder before", "embedding": "embedding before"}
    titled = {title: curves[kind] for kind, title in order.items() if kind in curves}
    titled |= {f"{kind} after": shared[kind] for kind in ("encoder", "embedding") if kind in shared}
    if titled:
        plot.shared(titled, run.directory / "isc.png")
    there_SM = np.isfinite(tables["encoder"]).all(2)
    subject_N, movie_N = (
        np.broadcast_to(names, there_SM.shape)[there_SM].tolist()
        for names in (tables["subject"][:, None], tables["film"])
    )
    windows = {
        "encoder before": before["encoder_SMD"].numpy(),
        "encoder after": tables["encoder"],
        "embedding after": tables["embedding"],
    }
    plot.maps(
        {title: z_SMD[there_SM] for title, z_SMD in windows.items()}, subject_N, movie_N, run.directory / "map.png"
    )


def embed_by(model: Aligned, dtype: str) -> Callable[[Part], dict[str, torch.Tensor]]:
    """A function that gives the encoder's mean features and the projection of windows."""
    device = model.centre_D.device

    @torch.no_grad()
    def embed(part: Part) -> dict[str, torch.Tensor]:
        part = part.to(device)
        with autocast(device.type, dtype):
            z_BND = model.encoder(*part.signal)
            y_BE = model.project(z_BND, part.positions_BC3, part.mask_BC)
        return {"encoder": mean_of(z_BND, part.mask_BC).cpu(), "embedding": y_BE.cpu()}

    return embed


def report(run: Run, lines: list[dict], state: dict, parameters: int) -> dict:
    """What the command prints: the last line of the log, and what training started from, as `_before`."""
    first, final = lines[0], lines[-1]
    ways = ("probe_", "encoder_", "embedding_", "signal_")
    keys = "loss val_loss alignment uniformity feature_rank feature_std subject_share stimulus_share temperature skipped rollbacks"
    metrics = {k: v for k, v in {**first, **final}.items() if k in keys.split() or k.startswith(ways)}
    before = (
        k for k in first if k in metrics and not k.endswith(("_bandpower", "_chance")) and not k.startswith("signal_")
    )
    metrics |= {f"{k}_before": first[k] for k in before}
    probes = by_label({k: metrics.pop(k) for k in [*metrics] if k.startswith("probe_")}, state["probe_protocol"])
    projection = str(run.directory / "projection.safetensors")
    return run.results(state, metrics, parameters, probes=probes) | {"projection": projection}


if __name__ == "__main__":
    sys.exit(command.run(main, Config, __doc__, PRESETS, saved_config))
