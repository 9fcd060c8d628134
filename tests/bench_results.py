"""
What pretraining is worth: frozen features of encoders that never saw a subject, beside what one would otherwise use on it.

    python tests/bench_results.py                                      # every set, one seed, about an hour on two cores
    python tests/bench_results.py --sets eegmat --seeds 0 1 2          # one set, several seeds
    python tests/bench_results.py --flags "" mask=random "ema=1 lr=3e-4" --no-baselines # ablation: rows of train_jepa.py's flags
    python tests/bench_results.py --sets eegmat --aligned "pairs=task:1" # train_contrastive.py goes on from what was pretrained
    python tests/bench_results.py --sets eegmat --flows "steps=300" --few 5 # so does train_flow.py; five labels a class, too

The subjects of every data set are dealt into folds. Per fold, flags and seed, train_jepa.py runs once on all data sets without that
fold's subjects (a [split] in dataset.toml keeps them out) and linear models are fitted on the labels of the same others; the
fold's subjects are only scored. Penalties are chosen by cross-validation over subjects of the fit. "Re-centred": each subject's
features minus their mean over its own, unlabelled, windows. Untrained: the same initial, calibrated weights. The gain of what
is trained is over untrained, of what is aligned over what it started from.

Prints tables and, last, one JSON line. What can't be measured on the data at hand is left out, with a word on stderr.

Shape letters: B windows, C channels, T samples, N tokens, D width, F features, S subjects, K classes.
"""

import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

from lib.alignment import choose
from lib.cache import Cache, Recording
from lib.models import load_encoder
from lib.probe import band_power

ROOT = Path(__file__).resolve().parent.parent
warnings.filterwarnings(
    "ignore", category=ConvergenceWarning
)  # so well regularised, more iterations change no decision
WINDOW_S, STRIDE_S = 4.0, 2.0
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
RESAMPLES = 2000  # of the subjects, for intervals
DRAWS = 10  # of few labels


@dataclass(frozen=True)
class Config:
    sets: tuple[str, ...] = ("eegmat", "eyes", "ssvep", "bonn", "bonn-eyes", "muse")  # labels to be told
    corpora: tuple[str, ...] = (
        "eegmat", "eegmmidb", "ssvep_exo", "muse", "bonn", "bi2012", "xdf", "formats",
    )  # folders with real recordings to pretrain on, each with its rules in tests/datasets  # fmt: skip
    unseen: tuple[str, ...] = ()  # corpora of which nobody is pretrained on, only linear models fitted
    data: Path = Path(os.environ.get("BERGER_DATA", ROOT.parent / "shared" / "data"))  # where they are
    flags: tuple[str, ...] = ("",)  # of train_jepa.py as name=value, one string per row of the ablation table
    aligned: tuple[str, ...] = ()  # of train_contrastive.py as name=value value, from what each of `flags` has given
    flows: tuple[str, ...] = ()  # of train_flow.py's, the same way; --window is that of the sets
    few: int = 0  # labelled windows of each class, to fit on so few as well; 0: don't
    steps: int = 400  # of pretraining
    seeds: tuple[int, ...] = (0,)
    folds: int = 5  # a pretraining per fold, flags and seed
    baselines: bool = True  # measure what one would otherwise use, too
    rate_hz: float = 100.0  # of the caches
    band_hz: tuple[float, float] = (0.5, 45.0)
    folder: Path = Path("runs/results")  # of caches and runs; what is there and of the same code is not computed again


# ----------------------------------------------------------------------------------------------------------------------
# What is to be told


@dataclass
class Task:
    """Labelled windows of one data set."""

    cache: Cache
    row_B: np.ndarray
    start_B: np.ndarray
    samples: int
    y_B: np.ndarray
    subject_B: np.ndarray
    fold_B: np.ndarray  # in which a window's subject is scored

    def read(self, unit: str = "model") -> torch.Tensor:
        return self.cache.read(self.row_B, self.start_B, self.samples, unit).x_BCT

    @property
    def mixed(self) -> bool:
        """Whether subjects have windows of more than one class: re-centring would take away what tells the others."""
        return len(set(zip(self.subject_B, self.y_B, strict=True))) > len(set(self.subject_B))


def along(length_s: float, stride_s: float, label: Callable[[Recording], str | None]):
    """Windows all along recordings, labelled by what is known of the recording."""

    def choose(cache: Cache, row: int) -> list[tuple[float, str]]:
        r = cache.recordings[row]
        starts_s = np.arange(0, r.samples / cache.rate_hz - length_s + 1e-9, stride_s)
        return [(s, label(r)) for s in starts_s.tolist() if label(r)]

    return length_s, choose


def after(length_s: float, delay_s: float, labels: dict[str, str], task: str = ""):
    """One window a while after each event of certain labels."""

    def choose(cache: Cache, row: int) -> list[tuple[float, str]]:
        if task and cache.recordings[row].task != task:
            return []
        return [(e.onset_s + delay_s, labels[e.label]) for e in cache.events(row) if e.label in labels]

    return length_s, choose


EYES = ("eyes_open", "eyes_closed")
SETS = {  # name: corpus, (window length in s, choice of windows)
    "eegmat": ("eegmat", along(WINDOW_S, STRIDE_S, lambda r: r.task)),
    "eyes": ("eegmmidb", along(WINDOW_S, STRIDE_S, lambda r: r.task if r.task in EYES else None)),
    "ssvep": ("ssvep_exo", after(WINDOW_S, 1.0, {f"{hz} Hz": f"{hz} Hz" for hz in (13, 17, 21)})),
    "bonn": ("bonn", along(WINDOW_S, WINDOW_S, lambda r: r.columns["set"])),
    "bonn-eyes": ("bonn", along(WINDOW_S, WINDOW_S, lambda r: {"eyes open": "open", "eyes closed": "closed"}.get(r.columns["set"]))),
    "muse": ("muse", after(2.0, 0.0, {"1": "side 1", "2": "side 2"}, "cueing")),  # the target comes 1.5 to 2 s after the cue
}  # fmt: skip


def collect(cache: Cache, name: str, fold_of: dict[str, int]) -> Task | None:
    """The windows of one set; None, with a word, if fewer than three subjects, or no two classes, have any."""
    corpus, (length_s, choose) = SETS[name]
    samples, found = round(length_s * cache.rate_hz), []
    for row, r in enumerate(cache.recordings):
        if r.dataset == corpus:
            found += [(row, round(s * cache.rate_hz), y, r.subject) for s, y in choose(cache, row)]
    found = [f for f in found if 0 <= f[1] <= cache.recordings[f[0]].samples - samples]
    subjects, classes = {f[3] for f in found}, {f[2] for f in found}
    if len(subjects) < 3 or len(classes) < 2:
        print(f"{name}: left out, there are {len(subjects)} subjects and {len(classes)} classes", file=sys.stderr)
        return None
    row_B, start_B, y_B, subject_B = (np.array(column) for column in zip(*found, strict=True))
    return Task(cache, row_B, start_B, samples, y_B, subject_B, np.array([fold_of[s] for s in subject_B]))


# ----------------------------------------------------------------------------------------------------------------------
# Caches and encoders


def deal(cfg: Config, cache: Cache) -> dict[str, int]:
    """The fold of every subject of the data sets that have at least three; all others are always trained on."""
    fold_of = {}
    for dataset in sorted({r.dataset for r in cache.recordings}):
        subjects = sorted({r.subject for r in cache.recordings if r.dataset == dataset})
        fold_of |= {s: i % cfg.folds for i, s in enumerate(subjects) if len(subjects) > 2}
    return fold_of


def build(cfg: Config, name: str, held_out: set[str] = frozenset(), others: set[str] = frozenset()) -> Path:
    """A cache of all corpora with the subjects `held_out` as its test split, `others` and those without a fold for training."""
    rules = cfg.folder / f"{name}-rules"
    rules.mkdir(parents=True, exist_ok=True)
    for corpus in cfg.corpora:
        text = (ROOT / "tests" / "datasets" / f"{corpus}.toml").read_text()
        split = {"test": held_out, "train": others}
        own = {
            k: sorted(s.partition("/")[2] for s in subjects if s.startswith(f"{corpus}/"))
            for k, subjects in split.items()
        }
        if any(own.values()):  # else the hash of names would put people aside that are in no fold
            text += "\n[split]\n" + "".join(f"{k} = {json.dumps(names)}\n" for k, names in own.items() if names)
        (rules / f"{corpus}.toml").write_text(text)
    words = ["--source", *(cfg.data / c for c in cfg.corpora), "--dataset", *(rules / f"{c}.toml" for c in cfg.corpora)]
    words += ["--cache", cfg.folder / name, "--rate-hz", cfg.rate_hz, "--band-hz", *cfg.band_hz]
    call("build_cache.py", words, good=(0, 3))  # 3: some of the odd files are quarantined, as they should be
    return cfg.folder / name


def call(script: str, words: list, good: tuple[int, ...] = (0,)) -> dict:
    """Run one of the commands; its JSON line. Ends with its message if it failed."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in good:
        raise SystemExit(f"{shlex.join(command)}\nended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def code() -> str:
    """What identifies the code that trains."""
    files = [*sorted(ROOT.glob("train_*.py")), *sorted((ROOT / "lib").glob("*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def content(cache: Path) -> str:
    """What identifies a cache: its signals, its labels and who is in which split."""
    return (cache / "manifest.json").read_text()


def words_of(flags: str) -> list[str]:
    """The command line of `name=value value name=value`; a flag without a value is `name=`."""
    named = (part for word in shlex.split(flags) for part in (f"--{word}".split("=", 1) if "=" in word else (word,)))
    return [part for part in named if part]


def pretrain(cfg: Config, cache: Path, seed: int, flags: str, untrained: bool) -> Path:
    """encoder.safetensors of one run of train_jepa.py, kept from an earlier call where nothing has changed."""
    words = ["--cache", cache, "--seed", seed, "--steps", cfg.steps, *words_of(flags)]
    if untrained:  # a step of no length leaves the calibrated initial encoder
        words += ["--steps", 1, "--lr", 1e-30]
    words += ["--eval-every", 0, "--save-every", 0, "--probe-windows", 40, "--val-windows", 64]
    return trained_by(
        cfg, "train_jepa.py", words, f"{cache.name}, seed {seed}: {'untrained' if untrained else 'training'} {flags}"
    )


def align(cfg: Config, cache: Path, seed: int, flags: str, init: Path) -> Path:
    """encoder.safetensors of one run of train_contrastive.py that starts from another."""
    words = ["--cache", cache, "--seed", seed, "--init", init, *words_of(flags)]
    words += ["--eval-every", 0, "--save-every", 0, "--probe-windows", 40, "--val-pairs", 64, "--film-subjects", 2]
    return trained_by(cfg, "train_contrastive.py", words, f"{cache.name}, seed {seed}: aligning {flags}")


def generate(cfg: Config, cache: Path, seed: int, flags: str, init: Path) -> Path:
    """encoder.safetensors of one run of train_flow.py that starts from another, whose blocks are the trunk of the flow."""
    words = ["--cache", cache, "--seed", seed, "--init", init, "--window", round(WINDOW_S * cfg.rate_hz)]
    words += ["--stride", round(STRIDE_S * cfg.rate_hz), *words_of(flags)]
    words += ["--eval-every", 0, "--save-every", 0, "--calibrate", 0, "--val-windows", 64]
    return trained_by(cfg, "train_flow.py", words, f"{cache.name}, seed {seed}: flow {flags}")


def trained_by(cfg: Config, script: str, words: list, said: str) -> Path:
    """encoder.safetensors of a run on the cache `words[1]`, kept from an earlier call where nothing has changed, who is in it included."""
    known = [code(), script, *map(str, words), cfg.corpora, cfg.folds, content(words[1])]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    run = cfg.folder / "runs" / digest
    if not (run / "encoder.safetensors").exists():
        print(said, file=sys.stderr)
        call(script, [*words, "--name", run, "--overwrite"])
    return run / "encoder.safetensors"


# ----------------------------------------------------------------------------------------------------------------------
# Features and linear models


@torch.no_grad()
def encode(task: Task, path: Path) -> np.ndarray:
    """Features averaged over time per electrode, (B, C * D), of windows aligned as the encoder's were."""
    task.cache.align(choose("auto", path))
    encoder, _ = load_encoder(path, task.cache)
    features = []
    for ids in np.array_split(np.arange(len(task.y_B)), -(-len(task.y_B) // 64)):
        batch = task.cache.read(task.row_B[ids], task.start_B[ids], task.samples)
        mask_BC = None if batch.mask_BC.all() else batch.mask_BC
        z_BND = encoder(batch.x_BCT, batch.positions_BC3, mask_BC)
        z_BCD = z_BND.unflatten(1, (batch.x_BCT.shape[1], -1)).mean(2)
        features.append(torch.where(batch.mask_BC[:, :, None], z_BCD, 0.0).flatten(1))
    task.cache.align("none")
    return torch.cat(features).numpy()


def recentred(x_BF: np.ndarray, subject_B: np.ndarray) -> np.ndarray:
    x_BF = x_BF.copy()
    for subject in np.unique(subject_B):
        x_BF[subject_B == subject] -= x_BF[subject_B == subject].mean(0)
    return x_BF


def guess(x_BF: np.ndarray, task: Task, fit_B: np.ndarray) -> np.ndarray:
    """Labels that logistic regression, fitted on some windows, gives to the others; its penalty from folds over the fit's subjects."""
    scaler = StandardScaler().fit(x_BF[fit_B])
    fit_BF, rest_BF = scaler.transform(x_BF[fit_B]), scaler.transform(x_BF[~fit_B])
    if fit_BF.shape[1] > len(fit_BF):  # in the span of the fit's windows, which changes nothing but the time it takes
        basis_FR = np.linalg.svd(fit_BF, full_matrices=False)[2].T
        fit_BF, rest_BF = fit_BF @ basis_FR, rest_BF @ basis_FR
    y_B, people = task.y_B[fit_B], task.subject_B[fit_B]
    folds = list(GroupKFold(min(5, len(set(people)))).split(fit_BF, groups=people)) if len(set(people)) > 1 else []
    if folds and all(set(y_B[fit]) == set(y_B[score]) == set(y_B) for fit, score in folds):
        model = LogisticRegressionCV(
            Cs=PENALTIES,
            cv=folds,
            class_weight="balanced",
            scoring="balanced_accuracy",
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
        )
    else:  # too few people to choose it by
        model = LogisticRegression(C=PENALTIES[1], class_weight="balanced")
    return model.fit(fit_BF, y_B).predict(rest_BF)


def guess_few(x_BF: np.ndarray, task: Task, fit_B: np.ndarray, few: int, draw: int) -> np.ndarray:
    """Labels from `few` labelled windows of each class, drawn from those of the fit; for one draw and set the same whatever the features."""
    rng, chosen_B = np.random.default_rng([draw, int(fit_B.sum())]), np.zeros_like(fit_B)
    for label in np.unique(task.y_B):
        chosen_B[rng.permutation(np.flatnonzero(fit_B & (task.y_B == label)))[:few]] = True
    scaler = StandardScaler().fit(x_BF[chosen_B])
    model = LogisticRegression(C=PENALTIES[1]).fit(scaler.transform(x_BF[chosen_B]), task.y_B[chosen_B])
    return model.predict(scaler.transform(x_BF[~fit_B]))


def right_SK2(guess_B: np.ndarray, task: Task) -> np.ndarray:
    """Windows told rightly, and all, per subject and class (S, K, 2)."""
    subjects, s_B = np.unique(task.subject_B, return_inverse=True)
    classes, k_B = np.unique(task.y_B, return_inverse=True)
    counts_SK2 = np.zeros((len(subjects), len(classes), 2))
    np.add.at(counts_SK2, (s_B, k_B), np.stack([guess_B == task.y_B, np.ones(len(s_B))], 1))
    return counts_SK2


# ----------------------------------------------------------------------------------------------------------------------
# What one would otherwise use


def log_band_power(task: Task) -> np.ndarray:
    return band_power(task.read(), task.cache.rate_hz).flatten(1).numpy()


def tangent_space(task: Task, aligned: bool) -> np.ndarray:
    """
    Covariances in the tangent space at their mean: at that of all windows, or each subject's at its own (Zanini 2018).

    In microvolts: scaled by channel, an average reference leaves a direction empty that is each recording's own, and
    re-centred by subject that direction tells recordings apart, which here are classes.
    """
    from pyriemann.estimation import Covariances
    from pyriemann.tangentspace import TangentSpace

    covariance_BCC = Covariances("oas").transform(task.read("uV").double().numpy())
    group_B = task.subject_B if aligned else np.zeros(len(task.y_B))
    x_BF = np.empty((len(group_B), covariance_BCC.shape[1] * (covariance_BCC.shape[1] + 1) // 2))
    for group in np.unique(group_B):
        x_BF[group_B == group] = TangentSpace().fit_transform(covariance_BCC[group_B == group])
    return x_BF


def amplitude(task: Task) -> np.ndarray:
    """Log standard deviation in µV."""
    return task.read("uV").std(2).log().numpy()


def canonical_correlation(task: Task) -> np.ndarray:
    """The frequency whose sines and cosines, with their second harmonics, correlate most with the channels (Lin 2006): no training."""
    hz_K = [float(label.split()[0]) for label in np.unique(task.y_B)]
    time_s_T = np.arange(task.samples) / task.cache.rate_hz
    x_BTC, best_BK = task.read().double().numpy().transpose(0, 2, 1), []
    for hz in hz_K:
        angle_T = 2 * np.pi * hz * time_s_T
        wave_TW = np.stack([f(h * angle_T) for h in (1, 2) for f in (np.sin, np.cos)], 1)
        q_TW = np.linalg.qr(wave_TW - wave_TW.mean(0))[0]
        q_BTC = np.linalg.qr(x_BTC - x_BTC.mean(1, keepdims=True))[0]
        best_BK.append(np.linalg.svd(q_BTC.transpose(0, 2, 1) @ q_TW, compute_uv=False)[:, 0])
    return np.unique(task.y_B)[np.argmax(best_BK, axis=0)]


def eegnet(task: Task, fit_B: np.ndarray) -> np.ndarray:
    """Labels from EEGNet (Lawhern 2018) of braindecode, trained from scratch with AdamW and a cosine."""
    from braindecode.models import EEGNet

    torch.manual_seed(0)
    x_BCT = task.read()
    classes, y_B = np.unique(task.y_B, return_inverse=True)
    model = EEGNet(n_chans=x_BCT.shape[1], n_outputs=len(classes), n_times=x_BCT.shape[2], sfreq=task.cache.rate_hz)
    fit, y_B = np.flatnonzero(fit_B), torch.from_numpy(y_B)
    steps = max(400, 40 * (len(fit) // 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    share_K = torch.bincount(y_B[fit], minlength=len(classes)) / len(fit)
    for _ in range(steps):
        ids = torch.from_numpy(fit[torch.randint(len(fit), (min(64, len(fit)),))])
        loss = torch.nn.functional.cross_entropy(model(x_BCT[ids]), y_B[ids], weight=1 / share_K.clamp_min(1e-6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return classes[model.eval()(x_BCT[~torch.from_numpy(fit_B)]).argmax(1).numpy()]


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def tell(task: Task, way: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Counts (S, K, 2) of what `way(windows to fit on, fold)` says of the windows of each fold."""
    told_B = np.empty_like(task.y_B)
    for fold in np.unique(task.fold_B).tolist():
        told_B[task.fold_B == fold] = way(task.fold_B != fold, fold)
    return right_SK2(told_B, task)


def linear(task: Task, x_BF_of: list[np.ndarray], name: str, few: int) -> dict[str, np.ndarray]:
    """Counts of linear models of the features that each fold has, as they are and re-centred, of all labels and of few."""
    ways, of = {}, {name: x_BF_of}
    if task.mixed:
        of[f"{name}, re-centred"] = [recentred(x_BF, task.subject_B) for x_BF in x_BF_of]
    for way, x_of in of.items():
        ways[way] = tell(task, lambda fit_B, fold, x_of=x_of: guess(x_of[fold], task, fit_B))
        if few:
            each = (
                tell(task, lambda fit_B, fold, x_of=x_of, draw=draw: guess_few(x_of[fold], task, fit_B, few, draw))
                for draw in range(DRAWS)
            )
            ways[f"{way}, few"] = sum(each)
    return ways


def baselines(cfg: Config, name: str, task: Task) -> dict[str, np.ndarray]:
    """Counts of what one would otherwise use, by name."""
    ways = linear(task, [log_band_power(task)] * cfg.folds, "band power", cfg.few)
    if len(task.cache.recordings[task.row_B[0]].names) > 1:
        plain_BF, aligned_BF = tangent_space(task, aligned=False), tangent_space(task, aligned=True)
        ways["tangent space"] = tell(task, lambda fit_B, _: guess(plain_BF, task, fit_B))
        ways["tangent space, re-centred"] = tell(task, lambda fit_B, _: guess(aligned_BF, task, fit_B))
    if name.startswith("bonn"):
        ways["amplitude"] = tell(task, lambda fit_B, _: guess(amplitude(task), task, fit_B))
    if name == "ssvep":
        ways["canonical correlation"] = right_SK2(canonical_correlation(task), task)
    try:
        ways["EEGNet"] = tell(task, lambda fit_B, _: eegnet(task, fit_B))
    except (ImportError, OSError) as error:
        print(f"EEGNet: left out, braindecode can't be imported: {error}", file=sys.stderr)
    return ways


def balanced_accuracy(right_SK2: np.ndarray, weight_RS: np.ndarray) -> np.ndarray:
    """Over R weightings of the subjects (R); classes that a weighting lacks don't count."""
    told_RK, all_RK = (weight_RS @ right_SK2[:, :, i] for i in (0, 1))
    return np.nanmean(np.where(all_RK > 0, told_RK / np.maximum(all_RK, 1), np.nan), axis=1)


def score(ways: dict[str, list[np.ndarray]], start_of: dict[str, str]) -> dict[str, dict]:
    """
    Balanced accuracy of each way with its 95 % interval over resampled subjects, and of its gain over the one it started from.

    A way has counts (S, K, 2) per seed, and the mean of the seeds' scores is what is resampled: the interval is of people.
    """
    subjects = len(next(iter(ways.values()))[0])
    draws_RS = np.random.default_rng(0).multinomial(subjects, np.full(subjects, 1 / subjects), RESAMPLES)
    weight_RS = np.concatenate([np.ones((1, subjects)), draws_RS])
    sampled, scores = {}, {}
    for name, counts in ways.items():
        each = [balanced_accuracy(right_SK2, weight_RS) for right_SK2 in counts]
        sampled[name] = np.mean(each, axis=0)
        scores[name] = {"score": interval(sampled[name]), "seeds": [float(e[0]) for e in each]}
        if name in start_of:
            scores[name]["gain"] = interval(sampled[name] - sampled[start_of[name]])
    return scores


def interval(sampled_R: np.ndarray) -> list[float]:
    """The value itself, which comes first, and the 2.5 and 97.5 % quantiles of the resampled ones."""
    return [float(sampled_R[0]), *np.quantile(sampled_R[1:], (0.025, 0.975)).tolist()]


def show(results: dict[str, dict], key: str) -> None:
    """A table of one kind of score: rows are ways, columns are sets."""
    print(f"\n| {key} | {' | '.join(results)} |\n| - |{' - |' * len(results)}")
    for way in dict.fromkeys(way for scores in results.values() for way in scores):
        found = [scores.get(way, {}).get(key) for scores in results.values()]
        if any(found):
            cells = ("" if v is None else f"{v[0]:.3f} ({v[1]:.3f} – {v[2]:.3f})" for v in found)
            print(f"| {way} | {' | '.join(cells)} |")


def main(cfg: Config) -> dict:
    whole = Cache(build(cfg, "all"))
    fold_of = deal(cfg, whole)
    if missing := set(cfg.unseen) - {s.partition("/")[0] for s in fold_of}:
        raise SystemExit(f"--unseen {' '.join(sorted(missing))}: no corpus here with three people or more")
    tasks = {name: task for name in cfg.sets if (task := collect(whole, name, fold_of))}
    ways: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in tasks}
    if cfg.baselines:
        for name, task in tasks.items():
            print(f"{name}: baselines", file=sys.stderr)
            ways[name] = {way: [counts] for way, counts in baselines(cfg, name, task).items()}
    caches = []
    for fold in range(cfg.folds):
        held_out = {s for s, f in fold_of.items() if f == fold or s.partition("/")[0] in cfg.unseen}
        caches.append(build(cfg, f"fold-{fold}", held_out, set(fold_of) - held_out))
    start_of = {}
    for flags, seed in itertools.product(cfg.flags, cfg.seeds):
        untrained, trained = f"untrained {flags}".strip(), f"trained {flags}".strip()
        paths_of = {
            name: [pretrain(cfg, c, seed, flags, name == untrained) for c in caches] for name in (untrained, trained)
        }
        start_of[trained] = untrained
        goes_on = [("aligned", align, more) for more in cfg.aligned] + [("flow", generate, more) for more in cfg.flows]
        for what, train, more in goes_on:
            name = f"{what} {more} {flags}".strip()
            inits = zip(caches, paths_of[trained], strict=True)
            paths_of[name], start_of[name] = [train(cfg, cache, seed, more, init) for cache, init in inits], trained
        for (name, paths), (task_name, task) in itertools.product(paths_of.items(), tasks.items()):
            for way, right_SK2 in linear(task, [encode(task, path) for path in paths], name, cfg.few).items():
                ways[task_name].setdefault(way, []).append(right_SK2)
    for kind in (", re-centred", ", few"):
        start_of |= {name + kind: start + kind for name, start in start_of.items()}
    results = {name: score(each, start_of) for name, each in ways.items()}
    for name, task in tasks.items():
        print(
            f"{name}: {len(task.y_B)} windows, {len(set(task.subject_B))} subjects, chance {1 / len(set(task.y_B)):.3f}"
        )
    show(results, "score")
    show(results, "gain")
    return {"steps": cfg.steps, "seeds": cfg.seeds, "folds": cfg.folds, "code": code(), "results": results}


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config, description=__doc__))))
