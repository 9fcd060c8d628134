"""
Making a pipeline for serve_realtime.py from a causal cache, and scoring it as it will be served.

The subject's mean (and scale) that a session learns at rest stands for here by that subject's own windows, without their labels.

Shapes: N windows, C channels, T samples, K classes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lib import pipelines
from lib.cache import Cache
from lib.deep import load_encoder, signal_path
from lib.errors import Unusable
from lib.lineage import check_leak, inherited
from lib.models import check_signal
from lib.riemann import Riemann, learn
from lib.scores import classification_scores
from lib.targets import WINDOW_S, Examples, Target, read_targets

FOLDS = 5  # of val subjects, by which a hybrid is calibrated and scored
MOST = 6000  # windows that are learned from, evenly spread
KINDS = ("riemann", "encoder", "hybrid")


@dataclass
class Lesson:
    """Labelled windows of one montage."""

    x_NCT: np.ndarray  # float64, microvolts
    y_N: np.ndarray  # class numbers
    subject_N: np.ndarray
    row_N: np.ndarray  # recordings of the cache
    start_N: np.ndarray  # first samples
    names: tuple[str, ...]


def read_lesson(cache: Cache, target: Target, rows: Sequence[int], window_s: float, stride_s: float, **more) -> Lesson:
    """Windows of recordings `rows` that have a class. Raises Unusable if there are none, or if montages differ."""
    montages = {cache.recordings[i].names for i in rows}
    if len(montages) != 1:
        raise Unusable(
            f"--cache {', '.join(map(str, cache.paths))}: {len(montages)} montages, and a spatial filter needs one: "
            "build it with --channels C3,Cz,C4,… that all have"
        )
    examples = Examples(cache, [target], rows, window_s, stride_s, more.get("event_s", 0.0))
    ids = examples.even(more.get("most", MOST), 0)
    y_N = examples.values(ids)[:, 0].astype(np.int64)
    row_N, start_N = examples.locate(ids)
    x_NCT = read(cache, row_N, start_N, examples.samples)
    subject_N = np.array([cache.recordings[i].subject for i in row_N])
    return Lesson(x_NCT, y_N, subject_N, row_N, start_N, montages.pop())


def read(cache: Cache, row_N: np.ndarray, start_N: np.ndarray, samples: int) -> np.ndarray:
    """Windows of one montage in microvolts, float64."""
    some = np.array_split(np.arange(len(row_N)), -(-len(row_N) // 512))
    return np.concatenate(
        [cache.read(row_N[i], start_N[i], samples, cache.unit).x_BCT.numpy().astype(np.float64) for i in some]
    )


def fit(
    cache: Sequence[str | Path],
    target: str,
    pipeline: str,
    models: str | Path,
    encoder: str | Path | None = None,
    where: Sequence[str] = (),
    window_s: float | None = None,
    stride_s: float | None = None,
    after_s: float = 0.0,
    event_s: float = 0.0,
    remove_eyes: bool = False,
    transport_min: int = 10,
    allow_leak: bool = False,
) -> dict:
    """
    Make a pipeline from the training subjects, calibrate and score it on the val subjects, save it in `models`; returns what was found.

    A hybrid is calibrated on all of val; its score there is of calibrations that didn't know the subject.

    `encoder` is a model.safetensors of train_supervised.py with the same target, for encoder and hybrid; it brings its own window.
    Raises Unusable, also where the encoder knows the val subjects, unless `allow_leak`.
    """
    if pipeline not in KINDS:
        raise Unusable(f"--pipeline {pipeline} is unknown; there are: {', '.join(KINDS)}")
    if (pipeline == "riemann") == bool(encoder):
        raise Unusable(
            f"--pipeline {pipeline} {'takes no' if encoder else 'needs an'} --encoder runs/NAME/model.safetensors"
        )
    opened = Cache(*([cache] if isinstance(cache, str | Path) else cache))
    if opened.signal["kind"] != "eeg" or opened.unit != "uV":
        raise Unusable(
            f"--cache {opened.paths[0]} holds {opened.signal['kind']} in {opened.unit}; the service takes EEG"
        )
    if not opened.signal["causal"]:
        raise Unusable(
            f"--cache {opened.paths[0]} was filtered without delay, which no service can do: build it with --causal"
        )
    rows = {split: opened.rows((split,), where) for split in ("train", "val")}
    if not rows["train"]:
        raise Unusable(f"--cache {opened.paths[0]}: no training recording {' '.join(where)}")
    deep = None
    if encoder:
        deep = load_encoder(_model(encoder), target)
        check_signal(deep.meta, opened, encoder)
        window_s = deep.path.window / opened.rate_hz
        found = deep.decoder.targets[deep.target]
        subjects = [opened.recordings[i].subject for i in rows["val"]]
        check_leak(inherited(deep.meta, encoder), subjects, (found.name, *found.labels), allow_leak)
    else:
        window_s = window_s or WINDOW_S.get(target, 2.0)
        found = read_targets(opened, [target], rows["train"], round(window_s * opened.rate_hz), after_s, event_s)[0]
    if not found.classes:
        raise Unusable(f"--target {target} is a number; the service predicts classes (try {found.name}:classification)")
    stride_s = stride_s or window_s / 2
    pipelines.check_folder(models)
    train = read_lesson(opened, found, rows["train"], window_s, stride_s, event_s=event_s)
    val = None
    if rows["val"]:
        val = read_lesson(opened, found, rows["val"], window_s, stride_s, event_s=event_s)
    step = max(1, round(stride_s * opened.rate_hz))
    options = {"remove_eyes": remove_eyes}
    if deep:
        deep = replace(deep, path=replace(deep.path, channels=train.names, step=step), **options)
    made = deep
    if pipeline != "encoder":
        path = signal_path(opened.signal, train.names, train.x_NCT.shape[2], step)
        options |= {"transport_min": transport_min, "bands_hz": flicker_bands(found.classes, opened.signal)}
        made = learn(train.x_NCT, train.y_N, train.subject_N, tuple(found.classes), path, **options)
    if pipeline == "hybrid":
        made = pipelines.Hybrid(made, deep)
    if val is not None and pipeline == "hybrid":
        parts = [served(part, val) for part in (made.riemann, made.encoder)]
        temperature, weight = pipelines.calibrate(*parts, val.y_N)
        made, told_NK = replace(made, temperature=temperature, weight=weight), cross_calibrated(*parts, val)
    elif val is not None:
        told_NK = served(made, val)
    pipelines.save(made, models)
    said = {"pipeline": pipeline, "models": str(models), "target": target, "classes": list(made.classes)}
    said |= {"channels": len(train.names), "rate_hz": opened.rate_hz, "window": made.path.window, "step": step}
    said |= {"windows": len(train.y_N), "subjects": len(set(train.subject_N.tolist()))}
    if val is not None:
        said |= {"val_windows": len(val.y_N), "val_subjects": len(set(val.subject_N.tolist()))}
        said["val"] = {k: round(v, 4) for k, v in classification_scores(val.y_N, told_NK).items()}
    return said


def flicker_bands(classes: Sequence[str], signal: dict) -> tuple[tuple[float, float], ...]:
    """1 Hz either side of each frequency that a class is named after (`13 Hz`) and of its second harmonic, as far as the cache goes."""
    named = [re.fullmatch(r"([\d.]+) ?Hz", name, re.IGNORECASE) for name in classes]
    if sum(map(bool, named)) < 2:
        return ()
    highest = signal["band_hz"][1] if signal["band_hz"] and signal["band_hz"][1] else signal["rate_hz"] / 2
    hz = sorted(h * float(m[1]) for m in named if m for h in (1, 2))
    return tuple((f - 1, f + 1) for f in hz if f + 1 <= highest)


def served(pipeline, lesson: Lesson) -> np.ndarray:
    """Probabilities (N, K) of windows, each subject as a session of its own whose windows at rest are all of them."""
    p_NK = np.empty((len(lesson.y_N), len(pipeline.classes)))
    for subject in np.unique(lesson.subject_N):
        mine = np.flatnonzero(lesson.subject_N == subject)
        own = with_least(pipeline.fit({"BACKGROUND": list(lesson.x_NCT[mine])}))
        for some in np.array_split(mine, -(-len(mine) // 256)):
            p_NK[some] = own.predict_proba(lesson.x_NCT[some])
    return p_NK


def cross_calibrated(p_NK: np.ndarray, q_NK: np.ndarray, lesson: Lesson) -> np.ndarray:
    """
    What a hybrid of these two parts says (N, K), of each subject with the temperatures and weight that suit the others.

    So that it is scored on nobody by whom it was calibrated; as they are before calibration where there is one subject alone.
    """
    fold_N = np.unique(lesson.subject_N, return_inverse=True)[1] % FOLDS
    r_NK = (p_NK + q_NK) / 2
    for fold in range(fold_N.max() + 1 if fold_N.any() else 0):
        held_N = fold_N == fold
        rest = (a[~held_N] for a in (p_NK, q_NK, lesson.y_N))
        (cool_p, cool_q), weight = pipelines.calibrate(*rest)
        p, q = pipelines.tempered(p_NK[held_N], cool_p), pipelines.tempered(q_NK[held_N], cool_q)
        r_NK[held_N] = (1 - weight) * p + weight * q
    return r_NK


def with_least(pipeline):
    """The pipeline content with as few windows of a subject as there are."""
    if isinstance(pipeline, pipelines.Hybrid):
        return replace(pipeline, riemann=with_least(pipeline.riemann), encoder=with_least(pipeline.encoder))
    return replace(pipeline, **{"transport_min" if isinstance(pipeline, Riemann) else "scale_min": 1})


def _model(path: str | Path) -> Path:
    """The model file of a run directory."""
    return Path(path) / pipelines.MODEL if Path(path).is_dir() else Path(path)
