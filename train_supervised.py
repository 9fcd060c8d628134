"""
Tell something from EEG: fine-tune an encoder, probe it, or train from scratch, on any target in a cache; phase 3.

    python train_supervised.py --target challenge1 --init runs/jepa-1/encoder.safetensors  # response times, demo cohort
    python train_supervised.py --target challenge1 challenge2 --init runs/jepa-1/encoder.safetensors  # two tasks at once
    python train_supervised.py --target sex --mode probe --init runs/jepa-1/encoder.safetensors
    python train_supervised.py --target seizure --where task=szMonitoring  # events as SzCORE's TSV files
    python train_supervised.py --evaluate runs/supervised-1/model.safetensors  # opens the test split
    python train_supervised.py --target task --folds 5                 # every subject scored by a model that never saw it
    torchrun --nproc-per-node 8 train_supervised.py --preset base      # the same result from 8 processes

Needs a cache (build_cache.py), whose splits are by subject. Models and thresholds are chosen on val; test is opened by --evaluate alone.
What is kept is runs/NAME/model.safetensors, which says what its outputs mean; every score has a 95 % interval over subjects and stands
beside the constant and what one would otherwise use (lib/classical.py). To ablate something that is not a flag, copy this file.

Shape letters: B examples, C channels, T samples, K targets, P patches, S stretches, X features, D width.
"""

import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lib import ablation, classical, command, evaluation, judgement, plot, recovery, score_report, shots
from lib.alignment import Align, choose
from lib.batches import Piece, read_pieces
from lib.cache import Cache
from lib.channels import TEN_TWENTY, common_sites
from lib.errors import Unusable
from lib.evaluation import Fitted
from lib.flops import StepCost, matmul_rate
from lib.folds import fold_rows
from lib.heads import fit_heads
from lib.inference import MOST_AT_ONCE, Inference
from lib.lineage import check_leak, inherited, trained_on, waveform_factor
from lib.models import signal_meta, start_encoder
from lib.optim import layer_groups, warmup_cosine
from lib.precision import DTYPES, autocast, choose_dtype
from lib.prefetch import Prefetch
from lib.ranks import Ranks, join
from lib.readouts import Decoder, Kind, Reading, load_model, save_model
from lib.run import Pace, Run, RunConfig, check_batch, due, median_speed, saved_config, steps_of
from lib.samplers import DatasetSampler, SeizureSampler, SubjectSampler, UniformSampler
from lib.targets import WINDOW_S, Examples, Target, balanced, read_targets
from lib.transfer import Offsets, Transfer
from lib.windows import SEIZURE

FITTED = 4096  # windows that the heads are fitted on before training

Readout = Literal["auto", "mean", "sites", "attention", "prelocal", "postlocal", "contextual", "latency"]


@dataclass(frozen=True)
class Config(RunConfig):
    # what
    target: tuple[str, ...] = ("challenge1",)  # or challenge2, seizure, columns, event labels (A+B: which of them)
    mode: Literal["auto", "scratch", "probe", "finetune"] = "auto"  # auto: finetune with --init, else scratch
    readout: Readout = "auto"  # auto: latency for times, contextual for events, attention for seizures, else sites
    fitted_head: bool = True  # training starts from the heads that a probe would fit; not for seizures
    filters: int = 8  # spatial filters of a readout, or means of `attention`
    score_by: Literal["auto", "window", "subject"] = "auto"  # of what; auto: subject where it has one label
    after_s: float = 0.0  # from an event to its window, s (challenge1 has its own)
    event_s: float = 0.0  # duration of events that have none, s
    stretch_s: float = 0.25  # of a seizure's probability, s
    # data
    cache: tuple[str, ...] = ("cache/demo",)  # directories written by build_cache.py; for --evaluate, too
    where: tuple[str, ...] = ()  # only recordings with these values, as in: task=RestingState run=03+07
    window_s: float | None = None  # length of a window, s; none: 2 for the challenge, 16 for seizures, else 4
    stride_s: float | None = None  # from one window's start to the next, s; none: half a window
    max_channels: int | None = None  # of a window, drawn anew each time; 0: all; none: all for challenge1, else 24
    align: Align = "auto"  # take off what channels share over a subject, recording, window; auto: as --init, else none
    sampler: Literal["uniform", "subject"] = "uniform"  # over windows or subjects; seizures have their own, balanced
    batch: int = 32  # windows per step, over all ranks
    micro: int = 0  # windows per forward pass on one device, for memory; 0: all of a montage at once
    steps: int | None = 300  # optimizer steps; none: from --epochs
    epochs: float = 20.0  # passes over the training windows; counts if --steps is none
    # encoder
    init: str | None = None  # encoder.safetensors to start from; its architecture replaces the flags below
    encoder: Literal["transformer", "mamba", "fno", "hybrid"] = "transformer"  # what mixes the tokens
    adapter: Literal["none", "perceiver", "nearest"] = "none"  # montage of its own: learned, or by nearest electrode
    queries: int = 32  # electrodes of that montage, at most 128
    relations: bool = True  # tokens know how their samples correlate with those of other electrodes, by place
    d_model: int = 128  # width
    layers: int = 4  # depth
    heads: int = 4  # attention heads
    patch_s: float = 0.5  # length of a token, s
    waveform: float | None = None  # factor on raw samples at the start; none: 5 in all phases for challenge1, else 1
    # objective
    move_s: float = 0.3  # windows of challenge1 are moved by up to so many seconds, and their response times with them
    class_weights: bool = True  # every class counts alike, however rare
    task_weights: tuple[str, ...] = ()  # of several targets, as in: challenge1=0.3 challenge2=0.7
    balance: Literal["fixed", "uncertainty"] = "fixed"  # weights of several targets: as given or learned (Kendall 2018)
    # optimizer
    lr: float = 5e-4  # peak of AdamW's learning rate, of the head and the last layer
    lr_decay: float = 0.75  # from each layer to the one below it, in --mode finetune
    head_warmup: float = 0.1  # share of the steps in which only the head learns, in --mode finetune
    unfreeze: float = 0.0  # share of the steps after that over which layers join from the top down; 0: at once
    weight_decay: float = 0.05  # of weight matrices
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # largest gradient norm
    # evaluation
    evaluate: str | None = None  # model.safetensors to score on the test split, with its own target and windows
    transfer: Transfer = "none"  # move features of other people or data sets to the training data's, without labels
    folds: int = 0  # cross-validation over the subjects of train and val, in so many folds
    shots: int = 0  # few-shot: prototypes of so many windows per class instead of training, with --init or --evaluate
    episodes: int = 600  # of --shots
    val_windows: int = 512  # examples of the val split to choose the model by
    baseline_windows: int = 2000  # examples that the classical baselines are fitted on; 0: no baselines
    resamples: int = 300  # of the subjects, for intervals
    occlusion_windows: int = 128  # examples for what electrodes and bands matter; 0: leave it out
    eval_every: int = 50  # steps between validations; 0: only at the end
    keep: int = 3  # models of lowest val_loss kept in best/; the best is the result
    lineage: tuple[str, ...] = ()  # run whole lineages instead: full no_contrastive no_auxiliary supervised_only
    pretrain_steps: int = 400  # of each earlier phase, in --lineage
    autopsy: bool = False  # dead units, gradients and activations per layer, worst windows
    allow_leak: bool = False  # evaluate people and labels that an --init was trained on


MADE_WITH = (
    "target init mode readout window_s stride_s event_s after_s stretch_s".split()
)  # flags that a model's file answers

PRESETS = {
    "mini": {},
    "base": dict(queries=128, d_model=512, layers=12, heads=8, batch=128, max_channels=0, steps=None, lr=2e-4, val_windows=4096,
                 resamples=1000, warmup=0.05, log_every=20, eval_every=500, save_every=500),
    "full": dict(queries=128, d_model=768, layers=16, heads=12, batch=512, max_channels=0, steps=None, lr=2e-4, val_windows=8192,
                 resamples=1000, warmup=0.05, log_every=20, eval_every=500, save_every=500),
}  # fmt: skip


class TaskWeights(nn.Module):
    """One number from the losses of several targets: a weighted mean, or weights learned as variances (Kendall 2018, equation 7)."""

    def __init__(self, weights: list[float], learned: bool):
        super().__init__()
        self.learned = learned
        self.register_buffer("weight_K", torch.tensor(weights))
        self.log_variance_K = nn.Parameter(torch.zeros(len(weights)), requires_grad=learned)

    def forward(self, loss_K: torch.Tensor, share: float) -> torch.Tensor:
        """Of `share` of a global batch; shares add up."""
        if self.learned:
            loss_K = (-self.log_variance_K).exp() * loss_K + share * self.log_variance_K
        return (self.weight_K * loss_K).sum() / self.weight_K.sum()


def choose_sampler(cfg: Config, train: Examples):
    """The sampler of the training examples. Raises Unusable."""
    recordings = train.cache.recordings
    try:
        if train.coverage:
            return SeizureSampler(*train.windows.seizure_ids(), len(train), cfg.batch, cfg.seed)
        if cfg.sampler == "subject":
            return SubjectSampler(train.ranges([r.subject for r in recordings]).values(), cfg.batch, cfg.seed)
        if len(kinds := train.kinds()) > 1:  # windows along recordings would drown those of events
            return DatasetSampler(kinds, dict.fromkeys(kinds, 1.0), cfg.batch, cfg.seed)
        return UniformSampler(len(train), cfg.batch, cfg.seed)
    except ValueError as error:
        raise Unusable(f"--target {' '.join(cfg.target)}: the training split can't be sampled: {error}") from error


def choose_rows(cfg: Config, cache: Cache, *splits: str) -> list[int]:
    """Recordings of splits that --where leaves, for seizures only of data sets that have any. Raises Unusable."""
    rows = cache.rows(splits, cfg.where)
    if cfg.target == (SEIZURE,):
        marked = {cache.recordings[i].dataset for i in np.unique(cache.intervals(SEIZURE)[0])}
        rows = [i for i in rows if cache.recordings[i].dataset in marked]
    if not rows:
        have = ", ".join(f"{n} in {s}" for s, n in Counter(r.split for r in cache.recordings).items())
        raise Unusable(
            f"no recording in split {' or '.join(splits)} of {', '.join(map(str, cache.paths))} {' '.join(cfg.where)} (there are {have}): "
            "splits are by subject; more subjects, or a [split] in dataset.toml, fill them"
        )
    return rows


def lengths(cfg: Config) -> tuple[float, float]:
    """Length and stride of windows, s."""
    window_s = cfg.window_s or min((WINDOW_S[t] for t in cfg.target if t in WINDOW_S), default=4.0)
    return window_s, cfg.stride_s or window_s / 2


def channels_of(cfg: Config) -> int:
    """Channels of a window, 0: all. Where on the head a response is matters: with 24 of 128 its time is found half as well."""
    return cfg.max_channels if cfg.max_channels is not None else 0 if "challenge1" in cfg.target else 24


def check(cfg: Config) -> None:
    """Raises Unusable for flags that make no sense, alone or together."""
    command.check_signs(
        cfg,
        positive="batch filters lr clip log_every val_windows steps epochs window_s stride_s stretch_s keep episodes",
        not_negative="micro max_channels eval_every save_every weight_decay seed move_s shots baseline_windows resamples waveform occlusion_windows",
    )
    if not (0 <= cfg.warmup <= 1 and 0 <= cfg.head_warmup <= 1 and 0 <= cfg.unfreeze <= 1 and 0 < cfg.lr_decay <= 1):
        raise Unusable("--warmup, --head-warmup and --unfreeze must lie in 0 to 1, and --lr-decay above 0 and up to 1")
    if cfg.evaluate and (given := [n for n in MADE_WITH if getattr(cfg, n) != getattr(Config, n)]):
        flag = f"--{given[0].replace('_', '-')}"
        raise Unusable(
            f"{flag} says what a model is made with, and --evaluate takes one that is made: leave {flag} out"
        )
    if cfg.shots and (cfg.transfer != "none" or cfg.readout not in ("auto", "mean")):
        raise Unusable("--shots compares the mean of all tokens as it is: leave --transfer and --readout out")
    if cfg.lineage and (cfg.init or cfg.mode != "auto"):
        raise Unusable("--lineage makes its own encoders: leave --init and --mode out")
    least = 2 if cfg.mode == "probe" else 3
    if cfg.folds and cfg.folds < least:
        raise Unusable(
            f"--folds {cfg.folds}: at least three (to train on, choose by and score), two for a probe, or 0 for none"
        )
    if cfg.mode in ("probe", "finetune") and not cfg.init:
        raise Unusable(f"--mode {cfg.mode} needs an encoder: --init runs/NAME/encoder.safetensors")
    if cfg.mode == "scratch" and cfg.init:
        raise Unusable("--mode scratch starts from nothing: leave out --init, or take --mode finetune")
    if cfg.mode == "probe" and cfg.readout not in ("auto", "mean", "sites", "contextual"):
        words = f"can't train --readout {cfg.readout}: take mean, sites or contextual"
        raise Unusable(f"--mode probe fits the head in one go and {words}")
    if cfg.mode == "probe" and cfg.target == (SEIZURE,):
        raise Unusable(
            "--mode probe has no output per stretch: take --mode finetune with --head-warmup 1 for a frozen encoder"
        )
    if cfg.transfer != "none" and cfg.target == (SEIZURE,):
        raise Unusable("--transfer moves features of windows, not of the stretches of seizures")
    if cfg.shots and not (cfg.init or cfg.evaluate):
        raise Unusable("--shots needs an encoder that knows something: --init FILE, or --evaluate MODEL")
    if sum(map(bool, (cfg.folds, cfg.shots, cfg.evaluate))) > 1 and not (cfg.shots and cfg.evaluate and not cfg.folds):
        raise Unusable("--folds goes with neither --shots nor --evaluate")


def readout_of(cfg: Config, examples: Examples, sites: tuple[str, ...]) -> Kind:
    """The readout asked for; by itself one that keeps what the target needs: the order of patches, or where on the head they come from."""
    if cfg.readout != "auto":
        return cfg.readout
    if examples.coverage:
        return "attention"
    if cfg.mode != "probe" and any(t.source == "event" for t in examples.targets):
        return "latency" if any(t.timed for t in examples.targets) and sites else "contextual"
    return "sites" if len(sites) > 1 else "mean"


def plan_reading(cfg: Config, examples: Examples, patch: int) -> Reading:
    """The readout that fits the windows. Raises Unusable."""
    if examples.samples % patch:
        raise Unusable(
            f"--window-s {examples.samples / examples.cache.rate_hz:g} is {examples.samples} samples, no whole number of patches of {patch} "
            "(--patch-s or --init)"
        )
    stretches = patch / (cfg.stretch_s * examples.cache.rate_hz) if examples.coverage else 0
    if stretches % 1:
        raise Unusable(f"--stretch-s {cfg.stretch_s:g} doesn't divide a patch of {patch / examples.cache.rate_hz:g} s")
    if cfg.readout == "latency" and not any(t.timed for t in examples.targets):
        raise Unusable("--readout latency needs a target that is a time after an event: challenge1")
    sites = common_sites(examples.cache.recordings[i].names for i in examples.rows)
    kind, patches = readout_of(cfg, examples, sites), examples.samples // patch
    return Reading(kind, patches, cfg.filters, int(stretches), sites or TEN_TWENTY)


def parameter_groups(cfg: Config, decoder: Decoder, weights: TaskWeights, mode: str, steps: int) -> list[dict]:
    """
    AdamW groups with `scale`, a factor of the learning rate, and `joins`, the step from which they learn.

    Fine-tuning: the head first, then the encoder, each layer --lr-decay times as fast as the one above, from the top down.
    """
    head, tuned = nn.ModuleList([decoder.readout, decoder.heads, weights]), mode == "finetune"
    groups = layer_groups(decoder.encoder, head, cfg.lr_decay if tuned else 1.0, cfg.weight_decay)
    deepest = max((group["depth"] for group in groups if group["depth"]), default=1)
    for group in groups:
        group["joins"] = 0
        if tuned and group["depth"] is not None:
            group["joins"] = round(steps * (cfg.head_warmup + cfg.unfreeze * group["depth"] / deepest))
    return groups


def weights_of(cfg: Config, targets: list[Target]) -> list[float]:
    """What each target's loss counts, by --task-weights. Raises Unusable."""
    try:
        wanted = {name: float(w) for name, _, w in (word.partition("=") for word in cfg.task_weights)}
    except ValueError:
        raise Unusable(f"--task-weights {' '.join(cfg.task_weights)}: expected TARGET=NUMBER, as in age=0.3") from None
    if odd := [name for name, w in wanted.items() if not 0 < w < math.inf]:
        raise Unusable(f"--task-weights {odd[0]}={wanted[odd[0]]:g}: expected a number above 0")
    if unknown := sorted(set(wanted) - {t.name for t in targets}):
        raise Unusable(f"--task-weights {unknown[0]}: no such target; there are: {', '.join(t.name for t in targets)}")
    return [wanted.get(t.name, 1.0) for t in targets]


def val_ids(cfg: Config, val: Examples) -> np.ndarray:
    """Examples that the model is chosen by: spread evenly, and as many around seizures where they are the target."""
    ids = val.even(cfg.val_windows)
    if val.coverage:
        seizure = np.concatenate(val.windows.seizure_ids())
        ids = np.union1d(ids, np.sort(seizure)[:: max(1, len(seizure) // cfg.val_windows)])
    return ids


# ----------------------------------------------------------------------------
# training


def initial_encoder(cfg: Config, cache: Cache) -> tuple[nn.Module, list[dict]]:
    """The encoder to start from and the lineage of its file. Raises Unusable."""
    sizes = (cfg.encoder, cfg.d_model, cfg.layers, cfg.heads, cfg.adapter, cfg.queries, cfg.relations)
    return start_encoder(cfg.init, cache, cfg.patch_s, *sizes)


def watch(
    cfg: Config, run: Run, state: dict, inference: Inference, train: Examples, val: Examples, val_at: np.ndarray, meta: dict
) -> dict[str, float]:  # fmt: skip
    """What the log says of examples `val_at` of val; the model is kept if it is among the best."""
    decoder = inference.decoder.eval()
    source = None if cfg.transfer == "none" else evaluation.domain_of(inference, train)
    said = inference.predict(val, val_at, cfg.transfer, source)
    values = judgement.val_scores(decoder.targets, said, val.cache)
    if path := run.among_best(state, values["val_loss"], cfg.keep):
        save_model(path, decoder, meta | {"step": state["step"]})
    decoder.train()
    return values


def inference_of(cfg: Config, decoder: Decoder, dtype: str) -> Inference:
    """The model as it is evaluated."""
    return Inference(decoder, dtype, channels_of(cfg), cfg.micro, cfg.seed, cfg.stretch_s)


def fit(
    cfg: Config, ranks: Ranks, cache: Cache, rows: dict[str, list[int]], only_check: bool = False
) -> tuple[dict | None, dict | None]:
    """
    Train on recordings `rows["train"]`, choose on `rows["val"]`, score `rows["score"]`; leaves a run directory.

    Returns the results and what was said, on the first process. Raises Unusable before there is a directory, which `only_check` leaves out.
    """
    device = ranks.device
    torch.manual_seed(cfg.seed)
    encoder, lineage = initial_encoder(cfg, cache)
    mode = ("finetune" if cfg.init else "scratch") if cfg.mode == "auto" else cfg.mode
    patch, (window_s, stride_s) = encoder.architecture.patch, lengths(cfg)
    samples = round(window_s * cache.rate_hz)
    targets = read_targets(cache, cfg.target, rows["train"], samples, cfg.after_s, cfg.event_s, cfg.score_by)
    train, val, score = (
        Examples(cache, targets, rows[k], window_s, stride_s, cfg.event_s) for k in ("train", "val", "score")
    )
    targets = train.targets = val.targets = score.targets = balanced(targets, train, cfg.class_weights)
    reading = plan_reading(cfg, train, patch)
    held_out = {cache.recordings[i].subject for k in ("val", "score") for i in rows[k]}
    held_out |= {r.subject for r in cache.recordings if r.split == "test"}
    check_leak(lineage, held_out, labels_of(targets), cfg.allow_leak)
    sampler, share = choose_sampler(cfg, train), ranks.share(cfg.batch)
    if train.coverage and not len(np.concatenate(val.windows.seizure_ids())):
        raise Unusable("--target seizure: the val split has no seizure, and a threshold can't be chosen without one")
    steps = 0 if mode == "probe" else cfg.steps or steps_of(cfg.epochs, len(train), cfg.batch)
    if steps:
        check_batch(cfg.batch, len(train))
    warmup = max(1, round(cfg.warmup * steps))
    weights = TaskWeights(weights_of(cfg, targets), cfg.balance == "uncertainty").to(device)
    judgement.check_scored(score)
    if only_check:
        return None, None

    def draw(step: int, who: np.ndarray, micro: int, move_s: float = 0.0) -> tuple[list[Piece], np.ndarray]:
        """Examples `who` of a step's batch, and how many of the whole batch have a value, per target."""
        ids, known_K = sampler.ids(step), np.array([cfg.batch])
        if not train.coverage:  # where there is no seizure is known too
            known_K = np.isfinite(train.values(ids)).sum(0)
        how = (channels_of(cfg), micro, cfg.seed, step, cfg.stretch_s, move_s)
        return read_pieces(train, ids[who], who, *how), known_K

    run = Run(cfg, __file__, ranks, cache.fingerprint)
    if not cfg.init:
        pieces, _ = draw(0, np.arange(cfg.batch), cfg.micro)
        encoder.calibrate([p.part for p in pieces])
    if mode != "probe":  # a response to a stimulus is a waveform, of which phase 1's features have little
        with torch.no_grad():
            encoder.embed.samples.weight *= waveform_factor(cfg.waveform, "challenge1" in cfg.target, lineage)
    decoder = Decoder(encoder, reading, targets).to(device).train()
    offsets = Offsets([cache.recordings[i].subject for i in rows["train"]], decoder.readout.width).to(device)
    modules = {"decoder": decoder, "weights": weights, "offsets": offsets}
    optimizer = torch.optim.AdamW(parameter_groups(cfg, decoder, weights, mode, max(1, steps)), lr=cfg.lr, fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dtype = "float32" if mode == "probe" else None  # None: to be chosen
    state = {"step": 0, "dtype": dtype, "recent": [], "best": []} | recovery.fresh(cfg.micro)
    if cfg.resume:
        state |= run.restore(modules, optimizer)
    if not state["dtype"]:
        some = share if device.type == "cuda" else share[:16]
        piece = draw(0, some, cfg.micro)[0][0].to(device)
        state["dtype"] = choose_dtype(cfg.dtype, lambda d: d.loss(d(piece.part), piece.y), (decoder,), ranks)
    meta = signal_meta(cache) | trained_on(cache, rows["train"]) | {"run": run.name, "lineage": lineage, "mode": mode}
    meta |= {"window_s": window_s, "stride_s": stride_s, "event_s": cfg.event_s, "stretch_s": cfg.stretch_s}
    meta |= {"max_channels": channels_of(cfg), "seed": cfg.seed, "where": list(cfg.where), "transfer": cfg.transfer}
    val_at = val_ids(cfg, val) if ranks.first else np.empty(0, np.int64)
    inference = inference_of(cfg, decoder, state["dtype"])

    if run.fresh and mode != "probe":
        if cfg.fitted_head and not train.coverage:
            decoder.eval()
            fit_heads(inference, train, FITTED, cfg.transfer, offsets)
            decoder.train()
        if ranks.first:
            run.log(0, **watch(cfg, run, state, inference, train, val, val_at, meta))
        run.save(state, modules, optimizer)
    told_by = torch.compile(decoder) if cfg.compile else decoder
    if steps:
        cost = StepCost(lambda piece: decoder.loss(decoder((p := piece.to(device)).part), p.y), decoder)
        rate = matmul_rate(DTYPES[state["dtype"]], device)

    def offset_of(step: int, piece: Piece) -> torch.Tensor | None:
        if cfg.transfer != "recentre":
            return None
        return offsets(classical.subjects(cache, train.locate(sampler.ids(step)[piece.part.index_B])[0]))

    loader = Prefetch(
        lambda step: draw(step, share, state["micro"], cfg.move_s),
        state["step"],
        steps,
        shares=ranks.device.type == "cpu",
    )
    bar = tqdm(total=steps, initial=state["step"], unit="step", disable=not ranks.first, dynamic_ncols=True)
    pace = Pace(device)
    for step, (pieces, known_K) in loader:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        lr = warmup_cosine(step, steps, cfg.lr, warmup) * state["lr_scale"]
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"] * (step >= group["joins"])
        count_K = torch.from_numpy(np.maximum(known_K, 1)).to(device)
        sums_K, total = torch.zeros(len(targets), device=device), torch.zeros((), device=device)
        try:
            for piece in (p.to(device) for p in pieces):
                with autocast(device.type, state["dtype"]):
                    out = told_by(piece.part, offset_of(step, piece))
                loss_K = decoder.loss(out, piece.y) / count_K
                loss = weights(loss_K, len(piece.y) / cfg.batch)
                loss.backward()
                sums_K += loss_K.detach()
                total += loss.detach()
        except RuntimeError as error:  # out of memory, or raised again
            recovery.halve(error, run, state, max(len(p.y) for p in pieces))
            loader.seek(step)
            continue
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        loss, stop, *losses = ranks.sum([p.grad for p in parameters], [total, run.stop, *sums_K])
        norm = float(nn.utils.clip_grad_norm_(parameters, cfg.clip))
        if recovery.sound(state, loss, norm):
            optimizer.step()
            state["recent"].append((loss, norm, *losses))
        elif recovery.skip(run, state, loss, norm, sampler.ids(step).tolist()):
            recovery.go_back(run, state, modules, optimizer)
            loader.seek(state["step"])
            bar.update(state["step"] - step)
            continue
        tokens = sum(p.part.x_BCT.shape[0] * p.part.x_BCT.shape[1] * reading.patches for p in pieces) * ranks.world
        pace.add(began, cfg.batch, tokens)
        bar.update()

        state["step"] = done = step + 1
        last, values = done == steps, {}
        if ranks.first and (last or due(done, cfg.eval_every)):
            values = watch(cfg, run, state, inference, train, val, val_at, meta)
        if values or last or due(done, cfg.log_every):
            means = np.mean(state["recent"] or [(math.nan,) * (2 + len(targets))], axis=0).tolist()
            names = ("loss", "grad_norm", *(f"loss_{t.name}" for t in targets))
            state["recent"] = []
            counts = {name: state[name] for name in ("skipped", "rollbacks")}
            speed = pace.take(loader, sum(map(cost, pieces)) / rate)
            run.log(done, **dict(zip(names, means, strict=True)), lr=lr, **counts, **values, **speed)
            bar.set_postfix(loss=f"{means[0]:.4f}", **{k: f"{v:.3g}" for k, v in values.items()})
        on_time = last or due(done, cfg.save_every)
        if last or (on_time or stop) and not state["streak"]:
            run.save(state, modules, optimizer, on_time)
        if stop and not last:
            run.interrupt(f"at step {done} of {steps}")
    bar.close()
    loader.close()

    results, ways = None, None
    if ranks.first:
        if mode == "probe":
            decoder.eval()
            domain = fit_heads(inference, train, 0, cfg.transfer, offsets)
            said = inference.predict(val, val_at, cfg.transfer, domain)
            run.log(0, **judgement.val_scores(targets, said, cache))
        chosen = state["best"][0][1] if state["best"] else state["step"]
        if state["best"]:
            decoder = load_model(run.directory / "best" / f"step-{chosen:06d}.safetensors", cache)[0].to(device)
            inference = replace(inference, decoder=decoder)
        examples = {"train": train, "val": val, "score": score}
        results, ways = finish(cfg, run, inference, examples, rows, state, meta | {"step": chosen})
    run.close()
    return results, ways


def finish(
    cfg: Config, run: Run, inference: Inference, examples: dict[str, Examples], rows: dict, state: dict, meta: dict
) -> tuple[dict, dict]:
    """What a run leaves: the model with its thresholds and baselines, scores, report. Its results, and what was said."""
    train, val, score = (examples[k] for k in ("train", "val", "score"))
    say_unknown(run, score)
    if cfg.baseline_windows and not train.coverage:
        run.say("fitting the classical baselines")
    fitted = evaluation.fit(inference, train, val, rows, cfg.baseline_windows, cfg.transfer)
    described, tensors = fitted.pack()
    path = run.directory / "model.safetensors"
    save_model(path, inference.decoder, meta | described, tensors)
    ways, said = evaluation.compare(inference, fitted, score, rows["score"], cfg.transfer)
    lines = run.lines()
    plot.curves(lines, run.directory / "curves.png")
    results = {
        "run": str(run.directory), "step": state["step"], "chosen_step": meta["step"], "mode": meta["mode"], "model": str(path),
        "scored": "val, by which the model was chosen: --evaluate opens test", "dtype": inference.dtype, "detection": fitted.detection,
        "examples": {name: len(e) for name, e in examples.items()}, "unknown_classes": score.unknown, "parameters": sum(p.numel() for p in inference.decoder.parameters()),
        "windows_per_s": median_speed(lines),
    }  # fmt: skip
    return score_report.leave(run, asdict(cfg), inference, score, ways, said, results), ways


def say_unknown(run: Run, score: Examples) -> None:
    """What is left out of the scores because training lacked its class."""
    for name, classes in score.unknown.items():
        run.say(f"{name}: training lacked {', '.join(classes)}; their windows are left out of the scores")


# ----------------------------------------------------------------------------
# other ways to run


def evaluate(cfg: Config, ranks: Ranks, cache: Cache) -> dict | None:
    """Score a model on the test split, with the target, windows and thresholds it was made with. Raises Unusable."""
    decoder, meta, tensors = load_model(cfg.evaluate, cache)
    cfg = as_trained(cfg, decoder, meta)
    check(replace(cfg, evaluate=None))  # again, now that the target is known
    rows = choose_rows(cfg, cache, "test")
    subjects = [cache.recordings[i].subject for i in rows]
    check_leak(inherited(meta, cfg.evaluate), subjects, labels_of(decoder.targets), cfg.allow_leak)
    score = Examples(cache, decoder.targets, rows, cfg.window_s, cfg.stride_s, cfg.event_s)
    if score.coverage and not any(map(len, judgement.annotated(cache, rows))):
        raise Unusable("the test split has no seizure: sensitivity and F1 would mean nothing")
    judgement.check_scored(score)
    fitted = Fitted.unpack(meta, tensors, len(decoder.targets))
    run = Run(cfg, __file__, ranks, cache.fingerprint)
    results = None
    if ranks.first:
        caches = ", ".join(map(str, cache.paths))
        words = f"{len(rows)} recordings of {len(set(subjects))} subjects of {caches}; choose nothing by what it says"
        run.say(f"THE TEST SPLIT IS OPEN: {words}")
        run.log(meta["step"], event="test_opened", model=cfg.evaluate)
        say_unknown(run, score)
        inference = inference_of(cfg, decoder.to(ranks.device), "float32" if cfg.dtype == "auto" else cfg.dtype)
        transfer = meta["transfer"] if cfg.transfer == "none" else cfg.transfer  # heads that learned with it need it
        ways, said = evaluation.compare(inference, fitted, score, rows, transfer)
        results = {
            "run": str(run.directory), "step": meta["step"], "mode": meta["mode"], "model": cfg.evaluate, "scored": "test",
            "cache": [str(path) for path in cache.paths], "subjects": len(set(subjects)), "recordings": len(rows), "unknown_classes": score.unknown, "transfer": transfer, "detection": meta["detection"],
            "windows_per_s": round(len(score) / max(run.seconds(), 1e-9), 1),
        }  # fmt: skip
        results = score_report.leave(run, asdict(cfg), inference, score, ways, said, results)
    run.close()
    return results


def as_trained(cfg: Config, decoder: Decoder, meta: dict) -> Config:
    """The target and windows that a model was made with; which recordings, if --where doesn't say otherwise."""
    names = ("window_s", "stride_s", "event_s", "stretch_s", "max_channels", "seed")
    where = cfg.where or tuple(meta["where"])
    return replace(cfg, **{k: meta[k] for k in names}, target=tuple(t.name for t in decoder.targets), where=where)


def cross_validate(cfg: Config, ranks: Ranks, cache: Cache) -> dict:
    """
    Every subject of train and val scored by a model that never saw it: folds over subjects, the next fold chooses the model.

    Each fold is a run of its own below the run's directory; what was finished before an interruption is only scored again.
    """
    if ranks.world > 1:
        raise Unusable("--folds runs in one process: leave torchrun out")
    rows = choose_rows(cfg, cache, "train", "val")
    plan = fold_rows(cache, rows, cfg.folds, chosen=cfg.mode != "probe")
    check_folds(cfg, cache, rows, plan)
    for of in plan:
        fit(replace(cfg, folds=0), ranks, cache, of, only_check=True)
    run, pooled, done = Run(cfg, __file__, ranks, cache.fingerprint), {}, []
    for fold, of in enumerate(plan):
        name = run.directory / f"fold-{fold}"
        begun = (name / "config.json").exists()
        run.say(f"fold {fold + 1} of {cfg.folds}")
        try:
            last, ways = fit(replace(cfg, folds=0, name=str(name), resume=begun, overwrite=False), ranks, cache, of)
        except KeyboardInterrupt:  # whose words are of the fold alone
            run.interrupt(f"in fold {fold + 1} of {cfg.folds}")
        done.append({k: last[k] for k in ("run", "chosen_step", "metrics", "detection")})
        targets = load_model(last["model"])[0].targets
        judgement.pool(pooled, ways, targets)
    results = {
        "run": str(run.directory), "step": last["step"], "folds": done, "scored": f"{cfg.folds} folds over subjects of train and val",
        "windows_per_s": last["windows_per_s"],
    }  # fmt: skip
    results = score_report.tell(run, asdict(cfg), targets, cache, pooled, results)
    run.close()
    return results


def check_folds(cfg: Config, cache: Cache, rows: list[int], plan: list[dict[str, list[int]]]) -> None:
    """Raises Unusable if the targets don't mean the same in every fold: their scores are put together."""
    known = (round(lengths(cfg)[0] * cache.rate_hz), cfg.after_s, cfg.event_s, cfg.score_by)
    every = read_targets(cache, cfg.target, rows, *known)
    for fold, of in enumerate(plan):
        for ours, theirs in zip(every, read_targets(cache, cfg.target, of["train"], *known), strict=True):
            where = f"--folds {cfg.folds}: without the people of fold {fold + 1} {ours.name}"
            if missing := sorted({*ours.classes} - {*theirs.classes}) if theirs.classes and ours.classes else []:
                raise Unusable(f"{where} has no {missing[0]} to learn from: fewer classes, or other folds")
            if (ours.kind, ours.scored_by) != (theirs.kind, theirs.scored_by):
                raise Unusable(
                    f"{where} looks like another kind of target: say {ours.name}:{ours.kind} --score-by {ours.scored_by}"
                )


def few_shots(cfg: Config, ranks: Ranks, cache: Cache) -> dict:
    """Prototypes of --shots windows per class, on features of an encoder (val) or of a model (test), beside band power. Raises Unusable."""
    if ranks.world > 1:
        raise Unusable("--shots runs in one process: leave torchrun out")
    if cfg.evaluate:
        split, (decoder, meta, _) = "test", load_model(cfg.evaluate, cache)
        targets, lineage = decoder.targets, inherited(meta, cfg.evaluate)
        cfg = as_trained(cfg, decoder, meta)
        rows = choose_rows(cfg, cache, split)
        examples = Examples(cache, targets, rows, *lengths(cfg), cfg.event_s)
    else:
        split, (encoder, lineage) = "val", initial_encoder(cfg, cache)
        rows, (window_s, stride_s) = choose_rows(cfg, cache, split), lengths(cfg)
        known = (choose_rows(cfg, cache, "train"), round(window_s * cache.rate_hz), cfg.after_s, cfg.event_s)
        targets = read_targets(cache, cfg.target, *known, "window")
        examples = Examples(cache, targets, rows, window_s, stride_s, cfg.event_s)
        reading = replace(plan_reading(cfg, examples, encoder.architecture.patch), kind="mean")
        decoder = Decoder(encoder, reading, targets).eval()
    check_leak(lineage, [cache.recordings[i].subject for i in rows], labels_of(targets), cfg.allow_leak)
    if len(targets) > 1 or not targets[0].classes or examples.coverage:
        raise Unusable(f"--shots needs one target of classes, not {' '.join(cfg.target)}")
    ids = examples.even(MOST_AT_ONCE, 0)
    shots.check(examples, ids, cfg.shots, cfg.episodes, cfg.seed, split)
    run = Run(cfg, __file__, ranks, cache.fingerprint)
    if split == "test":
        run.say(f"THE TEST SPLIT IS OPEN: {len(rows)} recordings; choose nothing by what it says")
        run.log(0, event="test_opened", model=cfg.evaluate)
    inference = inference_of(cfg, decoder.to(ranks.device), "float32")
    told = shots.score(inference, examples, ids, cfg.shots, cfg.episodes, cfg.seed, cfg.resamples)
    beside = {f"{n}_{way}": v[0] for way, of in told["baselines"].items() if way != "constant" for n, v in of.items()}
    run.log(0, **told["metrics"], **beside)
    results = {
        "run": str(run.directory), "step": 0, **told, "scored": split, "episodes": cfg.episodes,
        "windows_per_s": len(ids) / run.seconds(), "seconds": round(run.seconds(), 1),
    }  # fmt: skip
    run.close()
    return results


def labels_of(targets: list[Target]) -> list[str]:
    """Names under which the targets may have been learned before."""
    return [name for t in targets for name in (t.name, *t.labels)]


def main(cfg: Config) -> dict | None:
    check(cfg)
    ranks = join(cfg.device)
    if cfg.batch < ranks.world:
        raise Unusable(f"--batch {cfg.batch} is less than one window for each of {ranks.world} processes")
    cache = Cache(*cfg.cache)
    if cfg.evaluate and cfg.align not in ("auto", trained := choose("auto", cfg.evaluate)):
        raise Unusable(f"--align {cfg.align}: {cfg.evaluate} was trained with --align {trained}; leave the flag out")
    cache.align(choose(cfg.align, cfg.evaluate or cfg.init))
    if cfg.lineage and ranks.world > 1:
        raise Unusable("--lineage runs in one process: leave torchrun out")
    if cfg.lineage:
        return ablation.run_lineages(cfg, Path(__file__))
    if cfg.shots:
        return few_shots(cfg, ranks, cache)
    if cfg.evaluate:
        return evaluate(cfg, ranks, cache)
    if cfg.folds:
        return cross_validate(cfg, ranks, cache)
    rows = {split: choose_rows(cfg, cache, split) for split in ("train", "val")}
    return fit(cfg, ranks, cache, rows | {"score": rows["val"]})[0]


if __name__ == "__main__":
    sys.exit(command.run(main, Config, __doc__, PRESETS, saved_config))
