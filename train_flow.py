"""
Learn to generate windows of EEG or vibration, and to say how unusual a window is: rectified flow, phase 4.

    python train_flow.py --cache cache/cwru --preset mini                       # vibration, two cores, minutes
    python train_flow.py --cache cache/demo cache/cwru --label fault            # several data sets, of any rates, in one model
    python train_flow.py --init runs/jepa-1/encoder.safetensors --contrast 0.1 --window 800  # around a pretrained encoder
    python train_flow.py --sample 800 --model runs/flow-1/model.safetensors --out cache/generated
    python train_flow.py --judge 800 --model runs/flow-1/model.safetensors --cache cache/cwru --hold-out time
    python train_flow.py --score --model runs/flow-1/model.safetensors --cache cache/other
    torchrun --nproc-per-node 8 train_flow.py --preset base                     # the same result from 8 processes

Needs a cache (build_cache.py). Windows are whitened by a filter and their level is divided out; a network around the encoder's blocks
learns the velocity from noise to such windows, for given conditions or none; sampling takes it back, and filter and level with it.
runs/NAME/model.safetensors has all that sampling needs, runs/NAME/encoder.safetensors the encoder. To ablate something that is not a
flag, copy this file.

Shape letters: B windows, C channels, T samples, N generated windows or tokens, F conditions, D width, E width of a projection, R recordings.
"""

import copy
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lib import command, conditions, flow, plot, recovery
from lib.balance import Balance
from lib.contrast import loss_infonce, units
from lib.corpus import Corpus
from lib.errors import Unusable
from lib.flops import StepCost, matmul_rate
from lib.generated import check_room, write_generated
from lib.generator import calibrate, draw_windows, fitting, in_unit, load_model, save_model, templates
from lib.grid import mean_of
from lib.lineage import check_leak, inherited, trained_on
from lib.masks import uniform
from lib.models import Architecture, build_encoder, load_encoder, save_encoder, signal_meta
from lib.oddness import score_run
from lib.optim import decay_groups, ema_update, warmup_cosine
from lib.precision import DTYPES, autocast, choose_dtype
from lib.prefetch import Prefetch
from lib.quality import FEWEST
from lib.ranks import Ranks, join
from lib.reflow import Pairs, load_teacher
from lib.run import Pace, Run, RunConfig, check_batch, due, saved_config, steps_of, without_val
from lib.samplers import UniformSampler
from lib.velocity import Shape, Velocity, build_velocity, strides
from lib.views import Strength, draws, make_view
from lib.whitened import Target, fit_target

EVAL_STEP = 2**31 - 1  # the "step" whose random numbers draw what is evaluated
EVAL_TIMES = (0.1, 0.5, 0.9)
SHOWN = 0.5  # share of training windows whose features --share cond shows; generated windows have none


@dataclass(frozen=True)
class Config(RunConfig):
    # instead of training
    sample: int = 0  # windows to generate by --model into the cache --out; 0: train
    judge: int = 0  # samples to hold against held-out windows of --cache (report.html): after training, or of --model
    open_test: bool = False  # --judge of --model on the test split, too: once, when nothing is left to choose
    score: bool = False  # how strange --model finds the held-out windows of --cache
    healthy: str | None = None  # column=value of usual recordings, for --score; none: there are no others to tell apart
    score_windows: int = 400  # of each of the healthy and the held-out ones
    model: str | None = None  # model.safetensors of a run, for --sample, --judge and --score
    out: str = "cache/generated"  # directory for --sample
    given: tuple[str, ...] = ()  # conditions of samples, as in: label=ball speed=1772; none: as in training recordings
    unconditional: bool = False  # samples for no condition but their level
    guidance: float = 1.0  # classifier-free, of samples; 1: plain
    nfe: int = 16  # evaluations of the network per sample, 1 to 50 or so
    solver: Literal["heun", "euler", "midpoint", "sde"] = "heun"  # of the way from noise to data
    # data
    cache: tuple[str, ...] = ("cache/demo",)  # directories written by build_cache.py; rates and units may differ
    window: int = 1024  # samples of a window, whatever the rate
    stride: int = 512  # samples from one window's start to the next
    hold_out: Literal["subject", "time"] = "subject"  # validation: the val split, or the end of each recording
    train_share: float = 0.6  # of every recording's time, if that is held out
    max_channels: int = 8  # channels of a training window, drawn anew each time, for speed; 0: all
    batch: int = 32  # windows per step, over all ranks
    micro: int = 0  # windows per forward pass on one device, for memory; 0: all of a montage at once
    steps: int | None = 6000  # optimizer steps; none: from --epochs
    epochs: float = 100.0  # passes over the training windows; counts if --steps is none
    # conditions; what no recording has is left out
    label: tuple[str, ...] = ()  # columns that are the label, jointly, as in: fault diameter
    domain: tuple[str, ...] = ()  # columns that are the domain (load, site, subject), jointly
    speed: str = "rpm"  # column with the speed of a machine
    traits: tuple[str, ...] = ()  # further columns, each a condition
    drop: float = 0.1  # share of windows that lose a condition, and share that lose all
    # target
    whiten_order: int = 64  # of the filter that windows are whitened by, samples; 0: no filter
    whiten_by: Literal["recording", "dataset"] = "recording"  # whose filters and levels
    unmix: bool = True  # take off what channels have in common, where there are several
    level: bool = True  # divide out a window's RMS and condition on it
    rhythms: int = 2  # 0, 1 or 2 of the envelope: their phases are conditions, and what they repeat is taken off
    hums: bool = True  # take off tones of constant loudness from recordings of one channel
    flatten: bool = True  # divide out what spectrum windows have left after filter, rhythms and hums
    calibrate: int = 1024  # samples that the final gain per frequency is measured on; 0: no such gain
    predict: Literal["preconditioned", "v", "x1"] = "preconditioned"  # what the network's output means
    times: Literal["logit-normal", "uniform", "ends"] = "logit-normal"  # where on the path it is trained
    uniform_share: float = 0.1  # of these times that are uniform all the same
    reflow: str | None = None  # model.safetensors whose pairs of noise and sample are learned, for fewer evaluations
    pairs: int = 4096  # pairs of noise and sample that --reflow makes
    # network
    share: Literal["trunk", "cond", "repa", "none"] = "trunk"  # the encoder's blocks: used, looked at, imitated, or not
    init: str | None = None  # encoder.safetensors to start from; its architecture replaces the four flags below
    encoder: Literal["transformer", "mamba", "fno", "hybrid"] = "transformer"  # what mixes the tokens
    d_model: int = 64  # width of tokens
    layers: int = 3  # depth
    heads: int = 4  # attention heads
    patch: int = 64  # samples per token
    widths: tuple[int, ...] = (16, 48)  # of the stages above the tokens
    kernel: int = 3  # taps of their convolutions
    # further losses
    contrast: float = 0.0  # weight of InfoNCE between features of two augmented views of real windows
    align: float = 0.5  # weight of imitating the encoder, for --share repa
    balance: Literal["fixed", "gradnorm", "uncertainty"] = "fixed"  # how the weights go on from there
    temperature: float = 0.1  # of InfoNCE
    allow_leak: bool = False  # validate on people that an --init was trained on
    # optimizer
    lr: float = 2e-3  # peak of AdamW's learning rate
    weight_decay: float = 0.01  # of weight matrices
    warmup: float = 0.03  # share of the steps
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999  # momentum of the averaged network, which samples are from
    # evaluation
    val_windows: int = 256  # windows for val_loss
    keep: int = 3  # models of lowest val_loss kept in best/ beside the last one


PRESETS = {
    "mini": {},
    "base": dict(steps=None, d_model=256, layers=6, heads=8, widths=(48, 128), kernel=5, batch=64, micro=32, max_channels=24, window=1024, lr=5e-4, ema=0.9995,
                 contrast=0.1, val_windows=512, warmup=0.02, log_every=20, eval_every=1000, save_every=1000),
    "full": dict(steps=None, d_model=512, layers=12, heads=8, widths=(64, 192), kernel=5, batch=256, micro=32, max_channels=0, window=1024, lr=2e-4, ema=0.9999,
                 contrast=0.1, val_windows=1024, warmup=0.02, log_every=20, eval_every=1000, save_every=1000),
}  # fmt: skip


@dataclass
class Part:
    """Windows of one micro-batch on their way from noise, and two views of them for the encoder."""

    x1_BCT: torch.Tensor  # whitened, level divided out
    x0_BCT: torch.Tensor
    t_B: torch.Tensor
    code_BF: torch.Tensor
    positions_BC3: torch.Tensor
    mask_BC: torch.Tensor | None  # None: every channel is good
    raw_BCT: torch.Tensor  # in the cache's unit, as an encoder takes it
    shown_B1: torch.Tensor  # whether --share cond shows its features
    a_BCT: torch.Tensor | None  # views; None if nothing is compared
    a_mask_BC: torch.Tensor | None
    b_BCT: torch.Tensor | None
    b_mask_BC: torch.Tensor | None
    index_B: np.ndarray  # places in the global batch

    def to(self, device: torch.device) -> "Part":
        """The same on another device."""
        if device.type == "cpu":
            return self
        moved = (v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for v in vars(self).values())
        return Part(*moved)


def draw(target: Target, recording_B, start_B, index_B, cfg: Config, micro: int, step: int, drop: float) -> list[Part]:
    """
    Read whitened windows in micro-batches, and draw noise, times, dropped conditions and views.

    What happens to a window depends on (seed, step, its index in the global batch), not on how the batch is divided.
    """
    corpus, parts = target.corpus, []
    for white in target.read(recording_B, start_B, index_B, cfg.max_channels, micro, cfg.seed, step):
        index, raw_BCT, mask_BC = white.index_B, white.raw_BCT, white.mask_BC
        u_BF = torch.from_numpy(uniform(cfg.seed, step, index, target.code_RF.shape[1] + 1, "flow drop"))
        code_BX = conditions.dropped(white.code_BX, u_BF, drop)
        shown_B1 = torch.from_numpy(uniform(cfg.seed, step, index, 1, "flow look") < SHOWN) & (step != EVAL_STEP)
        t_B = flow.draw_times(cfg.times, cfg.uniform_share, cfg.seed, step, index)
        x0_BCT = flow.draw_noise(cfg.seed, step, index, white.x1_BCT.shape[1:])
        views = [None] * 4
        if cfg.contrast:
            rate_hz = corpus.rate_hz(white.recording_B[0])
            shift_s = 0.125 * corpus.samples / rate_hz
            some = dict(shift_s=shift_s, amplitude_db=1.6, bandstop_hz=0.1 * rate_hz, dropout=0.3)
            good_BC = torch.ones(raw_BCT.shape[:2], dtype=torch.bool) if mask_BC is None else mask_BC
            for v in range(2):  # two views of one window have two indices
                how = (rate_hz, Strength(**some), draws(cfg.seed, step, index + v * cfg.batch))
                x_BCT, seen_BC = make_view(raw_BCT, white.positions_BC3, good_BC, *how)
                views[2 * v : 2 * v + 2] = x_BCT, None if seen_BC.all() else seen_BC
        parts.append(
            Part(white.x1_BCT, x0_BCT, t_B, code_BX, white.positions_BC3, mask_BC, raw_BCT, shown_B1, *views, index)
        )
    return parts


def paired(pairs: Pairs, index_B: np.ndarray, cfg: Config, micro: int, step: int, conditioned: int) -> list[Part]:
    """A teacher's pairs instead of windows and independent noise."""
    parts = []
    for x1_BCT, x0_BCT, code_BF, positions_BC3, index in pairs.draw(index_B, micro, cfg.seed, step):
        u_BF = torch.from_numpy(uniform(cfg.seed, step, index, conditioned + 1, "flow drop"))
        t_B = flow.draw_times(cfg.times, cfg.uniform_share, cfg.seed, step, index)
        code_BF = conditions.dropped(code_BF, u_BF, cfg.drop)
        shown_B1 = torch.zeros(len(index), 1, dtype=torch.bool)
        parts.append(Part(x1_BCT, x0_BCT, t_B, code_BF, positions_BC3, None, x1_BCT, shown_B1, *[None] * 4, index))
    return parts


class Model(nn.Module):
    """The velocity network, an encoder of its own if it doesn't share its, and heads: what the gradient goes to."""

    def __init__(self, net: Velocity, encoder: nn.Module | None, cfg: Config):
        super().__init__()
        self.net, self.share = net, cfg.share
        self.own_encoder = encoder
        d, width = net.encoder.architecture.d_model, self.encoder.architecture.d_model
        self.project = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 32)) if cfg.contrast else None
        self.imitate = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, width)) if cfg.share == "repa" else None
        if cfg.share == "repa":
            encoder.requires_grad_(False)
        elif not cfg.contrast and cfg.share != "cond":  # nothing reaches it
            for module in (*self.encoder.front, *([] if encoder is None else [encoder])):
                module.requires_grad_(False)
        if encoder is not None:
            for module in net.encoder.front:
                module.requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:
        """What makes features of clean windows."""
        return self.net.encoder if self.own_encoder is None else self.own_encoder

    def views(self, part: Part) -> torch.Tensor:
        """Projected views side by side (B, 2 E)."""
        views = ((part.a_BCT, part.a_mask_BC), (part.b_BCT, part.b_mask_BC))
        means = (mean_of(self.encoder(x_BCT, part.positions_BC3, mask_BC), mask_BC) for x_BCT, mask_BC in views)
        return torch.cat([self.project(z_BD).float() for z_BD in means], 1)

    def forward(self, part: Part, predict: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Flow loss of each window, and how unlike the encoder's its tokens are (B) if they should imitate them."""
        x_BCT = flow.between(part.x0_BCT, part.x1_BCT, part.t_B)
        signal, seen_BD = (part.raw_BCT, part.positions_BC3, part.mask_BC), None
        if self.share == "cond":
            seen_BD = torch.where(part.shown_B1, mean_of(self.encoder(*signal), part.mask_BC), 0.0)
        out_BCT, z_BND = self.net(x_BCT, part.t_B, part.code_BF, part.positions_BC3, part.mask_BC, seen_BD)
        v_BCT = flow.to_velocity(out_BCT.float(), x_BCT, part.t_B, predict)
        loss_B = flow.loss_flow(v_BCT, part.x0_BCT, part.x1_BCT, part.mask_BC)
        if self.imitate is None:
            return loss_B, None
        with torch.no_grad():
            wanted_BND = self.encoder(*signal).float()
        unlike_BN1 = 1 - F.cosine_similarity(self.imitate(z_BND).float(), wanted_BND, dim=2)[:, :, None]
        return loss_B, mean_of(unlike_BN1, part.mask_BC)[:, 0]


def contrast(model: Model, parts: list[Part], cfg: Config, dtype: str, ranks: Ranks) -> tuple[float, torch.Tensor]:
    """
    InfoNCE of the views of the global batch, and its gradient by them (batch, 2 E).

    It needs all windows at once, which neither a rank nor a micro-batch has: views are projected without a gradient first, and the second
    pass takes each window's share of it (GradCache, Gao 2021).
    """
    with torch.no_grad(), autocast(ranks.device.type, dtype):
        y_SE = torch.cat([model.views(part.to(ranks.device)) for part in parts])
    order_S = torch.from_numpy(np.argsort(np.concatenate([p.index_B for p in parts]))).to(ranks.device)
    y_BE = ranks.gather(y_SE[order_S], cfg.batch).requires_grad_()
    alike_VV = torch.eye(cfg.batch, dtype=torch.bool, device=ranks.device).repeat(2, 2)
    views_VE = units(torch.cat(y_BE.chunk(2, 1)))
    loss = loss_infonce(views_VE, alike_VV, torch.zeros_like(alike_VV), cfg.temperature)
    loss.backward()
    return float(loss.detach()), y_BE.grad


@torch.no_grad()
def evaluate(model: Model, net: Velocity, parts: list[Part], cfg: Config, dtype: str) -> dict[str, float]:
    """The averaged network's loss on held-out windows, the same windows, noise and times every time, and at three times."""
    device, losses = model.net.shared.device, {"val_loss": []} | {f"val_loss_t{t:g}": [] for t in EVAL_TIMES}
    trained, model.net = model.net, net
    for part in (p.to(device) for p in parts):
        own_t_B = part.t_B
        for name, t in zip(losses, (None, *EVAL_TIMES), strict=True):
            part.t_B = own_t_B if t is None else torch.full_like(own_t_B, t)
            with autocast(device.type, dtype):
                losses[name].append(model(part, cfg.predict)[0].cpu())
        part.t_B = own_t_B
    model.net = trained
    return {name: float(torch.cat(values).mean()) for name, values in losses.items()}


def check(cfg: Config, ranks: Ranks) -> None:
    """Raises Unusable for flags that make no sense, alone or together."""
    if cfg.model and not Path(cfg.model).is_file():
        raise Unusable(f"--model: no file {cfg.model} (looked in {Path(cfg.model).resolve().parent})")
    if cfg.batch < ranks.world:
        raise Unusable(f"--batch {cfg.batch} is less than one window for each of {ranks.world} processes")
    if not (0 < cfg.train_share < 1 and 0 <= cfg.drop < 1 and 0 <= cfg.ema < 1):
        raise Unusable("--train-share must lie between 0 and 1, --drop and --ema in 0 to below 1")
    if not (0 <= cfg.uniform_share <= 1 and 0 <= cfg.warmup <= 1):
        raise Unusable("--uniform-share and --warmup must lie in 0 to 1")
    command.check_signs(
        cfg,
        positive="batch window stride nfe lr clip log_every val_windows steps epochs pairs kernel temperature patch",
        not_negative="rhythms sample micro max_channels eval_every save_every weight_decay seed keep whiten_order calibrate contrast align",
    )
    if cfg.rhythms > 2:
        raise Unusable(f"--rhythms {cfg.rhythms}: two are the most, blows and the shaft that they follow")
    if cfg.kernel % 2 == 0 or not cfg.widths or min(cfg.widths) < 1:
        raise Unusable(f"--kernel {cfg.kernel} must be odd, and --widths {cfg.widths} positive")
    if cfg.share == "repa" and not (cfg.init and cfg.align):
        raise Unusable("--share repa imitates a trained encoder: give --init, and --align above 0")
    if cfg.reflow and (cfg.contrast or cfg.share in ("cond", "repa")):
        raise Unusable("--reflow learns generated pairs only: leave out --contrast, and --share cond or repa")
    if cfg.balance == "gradnorm" and cfg.contrast and cfg.share != "trunk":
        raise Unusable(
            f"--balance gradnorm weighs gradients that meet in one trunk: --share {cfg.share} has none for --contrast"
        )
    if cfg.solver == "midpoint" and cfg.nfe < 2:
        raise Unusable("--solver midpoint takes two evaluations a step: --nfe 2 or more")
    if 0 < cfg.judge < FEWEST:
        raise Unusable(f"--judge {cfg.judge}: fewer than {FEWEST} windows can't be judged")
    if cfg.open_test and not (cfg.judge and cfg.model and cfg.hold_out == "subject"):
        raise Unusable(
            "--open-test goes with --judge of a --model, by subject: training and choosing are done without it"
        )
    if cfg.judge and (cfg.unconditional or cfg.given):
        raise Unusable(
            "--judge is of windows with the conditions of their recordings: leave --unconditional and --given out"
        )
    try:
        strides(cfg.patch)
    except ValueError as error:
        raise Unusable(f"--patch {cfg.patch}: {error}") from error
    if cfg.patch > cfg.window:
        raise Unusable(f"--patch {cfg.patch} is longer than --window {cfg.window}")
    if cfg.contrast and cfg.batch < 2:
        raise Unusable("--contrast compares windows: it needs a --batch of at least two")
    if (cfg.sample or cfg.score) and not cfg.model:
        raise Unusable("--sample and --score need --model: model.safetensors of a run")
    if cfg.model and bool(cfg.sample) + cfg.score + bool(cfg.judge) != 1:
        raise Unusable("--model goes with one of --sample, --score and --judge; training goes on with --resume")


# ----------------------------------------------------------------------------
# what is learned


def start_encoder(cfg: Config, corpus: Corpus) -> tuple[nn.Module, list[dict]]:
    """The encoder to build on and the lineage of the file it comes from. Raises Unusable."""
    if cfg.init:
        encoder, init = load_encoder(cfg.init, corpus.caches[0])
        adapter = encoder.architecture.adapter
        if adapter != "none":
            raise Unusable(
                f"--init {cfg.init} has the adapter {adapter}; a flow needs an encoder without (--adapter none)"
            )
        if init["signal"].get("align", "none") != "none":
            raise Unusable(
                f"--init {cfg.init} was trained with --align {init['signal']['align']}, and a flow has its own mixing"
            )
        return encoder.train(), inherited(init, cfg.init)
    architecture = Architecture(cfg.encoder, cfg.d_model, cfg.layers, cfg.heads, corpus.rate_hz(0), cfg.patch)
    return build_encoder(architecture), []


# ----------------------------------------------------------------------------
# training


def main(cfg: Config) -> dict | None:
    ranks = join(cfg.device)
    check(cfg, ranks)
    if cfg.model and not ranks.first:
        return None
    if cfg.model:
        return generate(cfg, ranks) if cfg.sample else score(cfg, ranks) if cfg.score else judge(cfg, cfg.model)
    device = ranks.device
    torch.manual_seed(cfg.seed)
    corpus = Corpus(cfg.cache, cfg.window, cfg.whiten_order, cfg.stride, cfg.hold_out == "time", cfg.train_share)
    train, rows = corpus.windows("train"), corpus.rows("train")
    check_batch(cfg.batch, len(train))
    encoder, lineage = start_encoder(cfg, corpus)
    columns = dict(label=cfg.label, domain=cfg.domain, speed=cfg.speed, traits=cfg.traits)
    filters = dict(by_recording=cfg.whiten_by == "recording", order=cfg.whiten_order, rhythms=cfg.rhythms)
    target, whiten, learned, unknown = fit_target(
        corpus, **columns, **filters, unmix=cfg.unmix, level=cfg.level, hum=cfg.hums, flatten=cfg.flatten
    )
    held = corpus.rows("val") if corpus.spans["val"] and len(corpus.windows("val")) else []
    val = corpus.windows("val" if held else "train")
    patch = encoder.architecture.patch
    if cfg.window % patch and (cfg.contrast or cfg.share in ("cond", "repa")):
        raise Unusable(f"--window {cfg.window} is no whole number of patches of {patch} (--patch or --init)")
    if cfg.hold_out == "subject":
        check_leak(lineage, [corpus.recordings[i].subject for i in held], (), cfg.allow_leak)
    teacher = load_teacher(cfg.reflow, cfg.window, learned, whiten, cfg.level) if cfg.reflow else None
    sampler, share = UniformSampler(len(train), cfg.batch, cfg.seed), ranks.share(cfg.batch)
    steps = cfg.steps or steps_of(cfg.epochs, len(train), cfg.batch)
    warmup = max(1, round(cfg.warmup * steps))

    run = Run(cfg, __file__, ranks, corpus.fingerprint)
    if not held:
        told = without_val(len(corpus.rows("val")), f"{corpus.before + cfg.window} samples")
        run.say(f"{told}; --hold-out time holds the end of every recording out")
    if unknown:
        run.say(f"conditions that training recordings don't have, taken as unknown: {dict(unknown.most_common(5))}")
    if not cfg.init:
        some = corpus.read(*train.locate(sampler.ids(0)), np.arange(cfg.batch), cfg.max_channels, 0, cfg.seed, 0)
        signals = (p.x_BCT.flatten(0, 1) if p.mask_BC is None else p.x_BCT[p.mask_BC] for p in some)
        encoder.embed.calibrate(torch.cat([x[:, : cfg.window // patch * patch].reshape(-1, patch) for x in signals]))
    shared = cfg.share == "trunk"
    shape = Shape(cfg.widths, cfg.kernel, rhythms=whiten.rhythm_GQ.shape[1], look=cfg.share == "cond")
    net = Velocity(encoder, learned, shape) if shared else build_velocity(encoder.architecture, learned, shape)
    model = Model(net, None if shared else encoder, cfg).to(device)
    ema = copy.deepcopy(model.net).requires_grad_(False).eval()
    losses = ("flow", *(["contrast"] if cfg.contrast else []), *(["align"] if cfg.share == "repa" else []))
    shares = {"flow": 1.0, "contrast": cfg.contrast, "align": cfg.align}
    balance = Balance(losses, tuple(shares[name] for name in losses), cfg.balance).to(device)
    modules = {"model": model, "ema": ema, "balance": balance}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = decay_groups(model, cfg.weight_decay)
    if cfg.balance == "uncertainty":
        groups.append({"params": [balance.log_variance], "weight_decay": 0.0, "scale": 1.0})
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    state = {"step": 0, "dtype": None, "recent": [], "best": []} | recovery.fresh(cfg.micro)
    if cfg.resume:
        state |= run.restore(modules, optimizer)
    columns = [name for name in (*cfg.label, *cfg.domain, cfg.speed, *cfg.traits) if name]
    meta = {"predict": cfg.predict, "window": cfg.window, "level": cfg.level, "run": run.name, "lineage": lineage}
    meta |= {"templates": templates(corpus, target.group_R, target.code_RF, columns), **trained_on_corpus(corpus, rows)}
    pairs = Pairs(teacher, cfg.pairs, cfg.seed) if cfg.reflow else None

    def batch_of(step: int, who: np.ndarray = share, micro: int | None = None) -> list[Part]:
        micro = state["micro"] if micro is None else micro
        if pairs:
            return paired(pairs, who, cfg, micro, step, len(learned))
        return draw(target, *train.locate(sampler.ids(step)[who]), who, cfg, micro, step, cfg.drop)

    if not state["dtype"]:
        part = batch_of(0, share if device.type == "cuda" else share[:16], 0)[0].to(device)
        state["dtype"] = choose_dtype(cfg.dtype, lambda m: m(part, cfg.predict)[0], (model,), ranks)
    forward = torch.compile(model) if cfg.compile else model
    if ranks.first:
        ids = np.linspace(0, len(val) - 1, min(cfg.val_windows, len(val))).astype(np.int64)
        plain = replace(cfg, contrast=0.0)  # no views
        val_parts = draw(target, *val.locate(ids), np.arange(len(ids)), plain, cfg.micro or 64, EVAL_STEP, 0.0)
    if run.fresh:  # what the untrained network gives, and a state to go back to
        if ranks.first:
            run.log(0, **evaluate(model, ema, val_parts, cfg, state["dtype"]))
        run.save(state, modules, optimizer)
    cost = StepCost(lambda part: model(part.to(device), cfg.predict)[0], model)
    rate = matmul_rate(DTYPES[state["dtype"]], device)
    loader = Prefetch(batch_of, state["step"], steps, shares=ranks.device.type == "cpu")
    bar = tqdm(total=steps, initial=state["step"], unit="step", disable=not ranks.first, dynamic_ncols=True)
    pace, compared, told, pull_BE = Pace(device), -1, 0.0, None
    for step, parts in loader:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        lr = state["lr_scale"] * warmup_cosine(step, steps, cfg.lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        weights, compares = balance.weights(), balance.compares(step)
        sums = torch.zeros(len(losses), device=device)
        pulls = [torch.zeros_like(model.net.shared) for _ in losses]
        model.net.checkpointing = state["checkpointing"]
        try:
            if cfg.contrast and compared != step:  # once, as all ranks take part
                told, pull_BE = contrast(model, parts, cfg, state["dtype"], ranks)
                compared = step
            for part in (p.to(device) for p in parts):
                with autocast(device.type, state["dtype"]):
                    flow_B, unlike_B = forward(part, cfg.predict)
                    own = {"flow": flow_B.sum() / cfg.batch}
                    if cfg.contrast:  # its value is `told`; this has its gradient
                        own["contrast"] = (model.views(part) * pull_BE[part.index_B]).sum()
                    if unlike_B is not None:
                        own["align"] = unlike_B.sum() / cfg.batch
                for k, name in enumerate(losses if compares else ()):
                    (g,) = torch.autograd.grad(own[name], model.net.shared, retain_graph=True, allow_unused=True)
                    pulls[k] += 0.0 if g is None else g
                sum(w * own[name] for w, name in zip(weights, losses, strict=True)).backward()
                sums += torch.stack([own[name].detach() for name in losses])
        except RuntimeError as error:  # out of memory, or raised again
            recovery.halve(error, run, state, max(len(p.x1_BCT) for p in parts), checkpoints=True)
            loader.seek(step)
            continue
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        *values, stop = ranks.sum([*(p.grad for p in parameters), *pulls], [*sums, run.stop])
        if cfg.contrast:
            values[1] = told
        loss = sum(w * v for w, v in zip(weights, values, strict=True)) + balance.learn(values)
        norm = float(nn.utils.clip_grad_norm_(parameters, cfg.clip))
        if recovery.sound(state, loss, norm):
            optimizer.step()
            ema_update(ema, model.net, min(cfg.ema, (step + 1) / (step + 10)))
            if compares:
                balance.compare(values, [float(p.norm()) for p in pulls])
            state["recent"].append((loss, norm, *values))
        elif recovery.skip(run, state, loss, norm, sampler.ids(step).tolist()):
            recovery.go_back(run, state, modules, optimizer)
            loader.seek(state["step"])
            bar.update(state["step"] - step)
            continue
        tokens = sum(p.x1_BCT.shape[:2].numel() for p in parts) * -(-cfg.window // patch)
        pace.add(began, cfg.batch, tokens * ranks.world)
        bar.update()

        state["step"] = done = step + 1
        last, values = done == steps, {}
        if ranks.first and (last or due(done, cfg.eval_every)):
            values |= evaluate(model, ema, val_parts, cfg, state["dtype"])
            if path := run.among_best(state, values["val_loss"], cfg.keep):
                save_model(path, ema, whiten, meta | {"step": done})
        if values or last or due(done, cfg.log_every):
            means = np.mean(state["recent"] or [(math.nan,) * (2 + len(losses))], axis=0).tolist()
            names = ("loss", "grad_norm", *(f"loss_{name}" for name in losses))
            state["recent"] = []
            counts = {name: state[name] for name in ("skipped", "rollbacks")}
            counts |= {f"weight_{n}": w for n, w in zip(losses, weights, strict=True) if cfg.balance != "fixed"}
            speed = pace.take(loader, sum(map(cost, parts)) / rate)
            run.log(done, **dict(zip(names, means, strict=True)), lr=lr, **counts, **values, **speed)
            bar.set_postfix(loss=f"{means[0]:.4f}", **({"val_loss": f"{values['val_loss']:.4f}"} if values else {}))
        on_time = last or due(done, cfg.save_every)
        if last or (on_time or stop) and not state["streak"]:
            run.save(state, modules, optimizer, on_time)
        if stop and not last:
            run.interrupt(f"at step {done} of {steps}")
    bar.close()
    loader.close()

    results = None
    if ranks.first:
        if cfg.calibrate:
            save_model(run.directory / "model.safetensors", ema, whiten, meta | {"step": steps})  # whatever comes
            calibrate(ema, whiten, meta, cfg.calibrate, cfg.seed, cfg.nfe, cfg.solver)
        save_model(run.directory / "model.safetensors", ema, whiten, meta | {"step": steps})
        signal = signal_meta(corpus.caches[0]) | {
            "window_s": cfg.window / corpus.rate_hz(0),
            "run": run.name,
            "lineage": lineage,
            "step": steps,
        }
        save_encoder(run.directory / "encoder.safetensors", model.encoder, signal | trained_on_corpus(corpus, rows))
        lines = run.lines()
        plot.curves(lines, run.directory / "curves.png")
        results = report(run, lines, state, sum(p.numel() for p in model.net.parameters()), dict(unknown))
        if cfg.judge:
            judged = judge(cfg, results["model"], lines)
            results["metrics"] |= {f"quality_{name}": value for name, value in judged["metrics"].items()}
            results |= {name: judged[name] for name in ("verdict", "table", "report")}
    run.close()
    return results


def trained_on_corpus(corpus: Corpus, rows: list[int]) -> dict:
    """What a file says of the recordings it was trained on; `lib.lineage`."""
    told = [
        trained_on(cache, corpus.row_R[[i for i in rows if corpus.cache_R[i] == c]].tolist())
        for c, cache in enumerate(corpus.caches)
    ]
    return {"subjects": sorted({s for t in told for s in t["subjects"]}), "auxiliary": []}


def report(run: Run, lines: list[dict], state: dict, parameters: int, unknown: dict) -> dict:
    """What the command prints: the last line of the log, and val_loss of the untrained network from the first."""
    first, final = lines[0], lines[-1]
    metrics = {
        k: v for k, v in final.items() if k.startswith(("loss", "val_loss", "weight_")) or k in ("skipped", "rollbacks")
    }
    metrics["val_loss_untrained"] = first["val_loss"]
    memory_mb, model = (
        max(line["memory_mb"] for line in lines if "memory_mb" in line),
        run.directory / "model.safetensors",
    )
    return run.results(state, metrics, parameters, unknown_conditions=unknown, memory_mb=memory_mb, model=str(model))


# ----------------------------------------------------------------------------
# what a model is for


def generate(cfg: Config, ranks: Ranks) -> dict:
    """Windows in a cache, spread evenly over the training recordings that fit --given."""
    began, spent_s, first, found = time.perf_counter(), 0.0, 0, []
    net, whiten, meta = load_model(cfg.model)
    net = net.to(ranks.device)
    given = conditions.parse(net.given.conditions, cfg.given)
    chosen = fitting(net, meta, given)
    check_room(cfg.out, chosen)
    counts = np.diff(np.linspace(0, cfg.sample, len(chosen) + 1).round().astype(int)).tolist()
    for template, count in zip(
        tqdm(chosen, desc="sampling", unit="recording", dynamic_ncols=True), counts, strict=True
    ):
        if count:
            started = time.perf_counter()
            how = (given, cfg.unconditional, cfg.guidance, cfg.nfe, cfg.solver)
            drawn = draw_windows(net, whiten, meta, template, first + np.arange(count), cfg.seed, *how)
            spent_s += time.perf_counter() - started
            found.append((template, in_unit(whiten, template, *drawn)))
            first += count
    flags = f"--sample {cfg.sample} --model {cfg.model} --out {cfg.out} --seed {cfg.seed} --nfe {cfg.nfe} --solver {cfg.solver}"
    flags += f" --guidance {cfg.guidance:g}" + " --unconditional" * cfg.unconditional
    flags += f" --given {shlex.join(cfg.given)}" if cfg.given else ""
    recordings = write_generated(cfg.out, found, meta["run"], f"python {Path(__file__).name} {flags}")
    return {
        "run": str(Path(cfg.model).parent), "step": meta["step"], "metrics": {}, "cache": cfg.out, "recordings": recordings, "windows": first,
        "nfe": cfg.nfe, "solver": cfg.solver, "windows_per_s": round(first / spent_s, 1),
        "seconds": round(time.perf_counter() - began, 2), "model": cfg.model,
    }  # fmt: skip


def judge(cfg: Config, model: str, lines: Sequence[dict] = ()) -> dict:
    """Samples of a model beside held-out windows and floors, written as metrics.json and report.html beside it."""
    from lib.quality_report import judge_run  # here: it brings scikit-learn and matplotlib along

    held = dict(
        by_time=cfg.hold_out == "time",
        open_test=cfg.open_test,
        share=cfg.train_share,
        columns=cfg.label,
        count=cfg.judge,
    )
    how = dict(nfe=cfg.nfe, solver=cfg.solver, guidance=cfg.guidance, seed=cfg.seed)
    return judge_run(model, cfg.cache, **held, **how, log=lines, command=shlex.join(["python", *sys.argv]))


def score(cfg: Config, ranks: Ranks) -> dict:
    """How strange held-out windows of --cache are beside its healthy training windows, written as scores.json beside the model."""
    held = dict(stride=cfg.stride, by_time=cfg.hold_out == "time", share=cfg.train_share, count=cfg.score_windows)
    return score_run(cfg.model, cfg.cache, cfg.healthy, **held, nfe=cfg.nfe, seed=cfg.seed, device=ranks.device)


if __name__ == "__main__":
    sys.exit(command.run(main, Config, __doc__, PRESETS, saved_config))
