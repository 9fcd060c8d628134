"""
What a model said of examples, held against what is true: one table for the model, the constant, and what one would otherwise use.

Shape letters: B examples, K targets, N units that are scored (examples, or subjects), R recordings, T stretches of a recording.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib import scores, seizures
from lib.cache import Cache
from lib.command import json_line
from lib.errors import Unusable
from lib.seizures import Counts
from lib.store import write_atomic
from lib.targets import Examples, Target
from lib.windows import SEIZURE

MAIN = {"regression": "nrmse", "classification": "balanced_accuracy"}  # what a table is read by


@dataclass
class Said:
    """Of examples: per target numbers in its unit (B, 1) or probabilities (B, classes); encoded truth; where they are; loss."""

    said: list[np.ndarray]
    y_BK: np.ndarray
    row_B: np.ndarray
    start_B: np.ndarray
    loss_K: np.ndarray


@dataclass
class Units:
    """What is scored of one target: truth (numbers in its unit, or class numbers), what was said, whose it is, and where it is from."""

    y_N: np.ndarray
    said_N: np.ndarray
    subject_N: np.ndarray
    first_N: np.ndarray  # an example of each unit


def units(target: Target, k: int, said_BC: np.ndarray, y_BK: np.ndarray, row_B: np.ndarray, cache: Cache) -> Units:
    """Examples with a known value, or subjects whose examples' predictions are averaged."""
    known_B = np.isfinite(y_BK[:, k])
    y_B = y_BK[known_B, k].astype(np.float64)
    y_B = y_B.astype(np.int64) if target.classes else target.decode(y_B)
    said_BC, at_B = said_BC[known_B], np.flatnonzero(known_B)
    subject_B = np.array([cache.recordings[i].subject for i in row_B[known_B]])
    if target.scored_by == "window" or not len(y_B):
        return Units(y_B, said_BC, subject_B, at_B)
    names, first_N, number_B = np.unique(subject_B, return_index=True, return_inverse=True)
    mean_NC = np.stack([np.bincount(number_B, column) for column in said_BC.T], 1) / np.bincount(number_B)[:, None]
    if target.classes:
        return Units(y_B[first_N], mean_NC, names, at_B[first_N])
    return Units(np.bincount(number_B, y_B) / np.bincount(number_B), mean_NC, names, at_B[first_N])


def check_scored(examples: Examples) -> None:
    """Raises Unusable for a target that `units` could make nothing of: no value is known, or a subject's class changes."""
    ids = np.arange(len(examples))
    row_B, value_BK = examples.locate(ids)[0], examples.values(ids)
    subject_B = np.array([r.subject for r in examples.cache.recordings])[row_B]
    for k, target in enumerate(examples.targets if not examples.coverage else ()):
        known_B = np.isfinite(value_BK[:, k])
        if not known_B.any():
            raise Unusable(f"--target {target.name}: no example of the recordings to be scored has a known value")
        if target.classes and target.scored_by == "subject":
            pairs = {*zip(subject_B[known_B].tolist(), value_BK[known_B, k].tolist(), strict=True)}
            if len(pairs) > len({subject for subject, _ in pairs}):
                raise Unusable(f"--score-by subject: {target.name} changes within a subject; score it by window")


def score_units(target: Target, u: Units, resamples: int) -> dict[str, tuple[float, float, float]]:
    """Each score of one target with its 95 % interval over subjects."""

    def score(y_N: np.ndarray, said_NC: np.ndarray) -> dict[str, float]:
        if target.classes:
            return scores.classification_scores(y_N, said_NC)
        return scores.regression_scores(y_N, said_NC[:, 0])

    return scores.subject_bootstrap(score, u.subject_N, u.y_N, u.said_N, resamples=resamples)


def constant(target: Target, count: int) -> np.ndarray:
    """What says the same of everything: the training mean, or the training shares of the classes."""
    if not target.classes:
        return np.full((count, 1), target.mean)
    share = np.array(target.shares) if target.shares else 1 / np.array(target.weights)  # of older files
    return np.tile(share / share.sum(), (count, 1))


def val_scores(targets: Sequence[Target], said: Said, cache: Cache) -> dict[str, float]:
    """What the log says of the val split: the loss that a model is chosen by, and each target's main score."""
    values = {"val_loss": float(said.loss_K.mean())}
    if targets[0].source == SEIZURE:
        y, p = said.y_BK.ravel() > 0, said.said[0].ravel()
        return values | {"val_seizure_auroc": scores.area_under_roc(y, p) if 0 < y.sum() < len(y) else math.nan}
    for k, target in enumerate(targets):
        u = units(target, k, said.said[k], said.y_BK, said.row_B, cache)
        if len(u.y_N):
            name = MAIN[target.kind]
            values[f"val_{target.name}_{name}"] = score_units(target, u, 0)[name][0]
    return values


# ----------------------------------------------------------------------------
# seizures


@dataclass
class Timeline:
    """One recording: probability of a seizure per stretch, and when it was annotated."""

    row: int
    probability_T: np.ndarray
    annotated_N2: np.ndarray
    seconds: float


def annotated(cache: Cache, rows: Sequence[int]) -> list[np.ndarray]:
    """The seizures of each of some recordings, s (n, 2)."""
    row_N, start_N, stop_N = cache.intervals(SEIZURE)  # which merges those of all recordings: once, and not for each
    span_N2 = np.stack([start_N, stop_N], 1)
    return [span_N2[slice(*np.searchsorted(row_N, [row, row + 1]))] for row in rows]


def score_timelines(
    lines: Sequence[Timeline], found: Sequence[np.ndarray], cache: Cache, rate_hz: float, resamples: int
) -> dict[str, tuple[float, float, float]]:
    """
    Sensitivity, precision, F1 and false alarms a day by every rule, and area under the curves of the stretches, with intervals.

    Resamples without an annotated seizure are undefined and don't count.
    """
    pairs = [(line.annotated_N2, f, line.seconds) for line, f in zip(lines, found, strict=True)]
    counts = {name: [rule(*p) for p in pairs] for name, rule in seizures.RULES.items()}
    truth = [seizures.mask_of(x.annotated_N2, len(x.probability_T) / rate_hz, rate_hz) for x in lines]

    def score(at_N: np.ndarray) -> dict[str, float]:
        values = {
            k: v for name, c in counts.items() for k, v in sum((c[i] for i in at_N), Counts()).rates(name).items()
        }
        y_T, p_T = np.concatenate([truth[i] for i in at_N]), np.concatenate([lines[i].probability_T for i in at_N])
        if 0 < y_T.sum() < len(y_T):
            values |= {"auroc": scores.area_under_roc(y_T, p_T), "auprc": scores.average_precision(y_T, p_T)}
        else:
            values |= dict.fromkeys(("auroc", "auprc"), float("nan"))
        return values

    subject_N = np.array([cache.recordings[line.row].subject for line in lines])
    return scores.subject_bootstrap(score, subject_N, np.arange(len(lines)), resamples=resamples)


def detected(lines: Sequence[Timeline], detection: dict, rate_hz: float) -> tuple[list[Timeline], list[np.ndarray]]:
    """Recordings and the seizures found in each, s (n, 2)."""
    return list(lines), [seizures.detect(line.probability_T, rate_hz, **detection) for line in lines]


def choose_detection(lines: Sequence[Timeline], rate_hz: float) -> dict[str, float]:
    """Threshold and morphology that do best on these recordings."""
    columns = ([getattr(line, name) for line in lines] for name in ("probability_T", "annotated_N2", "seconds"))
    return seizures.choose_detection(*columns, rate_hz)[0]


def events_tsv(line: Timeline, found_N2: np.ndarray, rate_hz: float) -> str:
    """The found seizures of a recording as a SzCORE annotation file; confidence is the largest probability in each."""
    slices = [slice(int(a * rate_hz), max(int(a * rate_hz) + 1, round(b * rate_hz))) for a, b in found_N2]
    return seizures.events_tsv(found_N2, [line.probability_T[s].max() for s in slices], line.seconds)


# ----------------------------------------------------------------------------
# tables and files


def tabulate(
    targets: Sequence[Target], ways: dict[str, dict], cache: Cache, rate_hz: float, resamples: int
) -> list[dict]:
    """One row per target, way to tell it, and score, with its interval; `ways` holds Units, or timelines and found seizures."""
    table = []
    for target in targets:
        for name, said in ways[target.name].items():
            if target.source == SEIZURE:
                values = score_timelines(*said, cache, rate_hz, resamples)
            else:
                values = score_units(target, said, resamples)
            for metric, (v, low, high) in values.items():
                table.append(
                    {"target": target.name, "model": name, "metric": metric, "value": v, "low": low, "high": high}
                )
    return table


def summary(targets: Sequence[Target], table: Sequence[dict]) -> dict:
    """What a command prints of a table: the model's scores, their intervals, and what stands beside them."""
    flat: dict[str, dict] = {}
    for row in table:
        flat.setdefault(row["model"], {})[f"{row['target']}_{row['metric']}"] = [row["value"], row["low"], row["high"]]
    mine = flat.pop("model")
    metrics = {name: value for name, (value, _, _) in mine.items()}
    if {"challenge1_nrmse", "challenge2_nrmse"} <= metrics.keys():
        metrics["challenge_score"] = scores.challenge_score(metrics["challenge1_nrmse"], metrics["challenge2_nrmse"])
    intervals = {name: [low, high] for name, (_, low, high) in mine.items()}
    scored_by = {t.name: t.scored_by for t in targets}
    return {"metrics": metrics, "intervals": intervals, "baselines": flat, "scored_by": scored_by}


def pool(pooled: dict[str, dict], ways: dict[str, dict], targets: Sequence[Target]) -> None:
    """Add what one fold said to what others did; a way that some fold lacks is dropped."""
    for target in targets:
        known = pooled.setdefault(target.name, dict.fromkeys(ways[target.name]))
        for name in list(known):
            new, old = ways[target.name].get(name), known[name]
            if new is None:
                del known[name]
            elif target.source == SEIZURE:
                known[name] = new if old is None else (old[0] + new[0], old[1] + new[1])
            else:
                columns = (
                    np.concatenate([getattr(u, n) for u in (old, new) if u])
                    for n in ("y_N", "said_N", "subject_N", "first_N")
                )
                known[name] = Units(*columns)


def write_scores(path: Path, table: Sequence[dict]) -> None:
    """A table as JSON, one object per row."""
    write_atomic(path, json.dumps(json.loads(json_line(table)), indent=1).encode())


def write_events(
    folder: Path, lines: Sequence[Timeline], found: Sequence[np.ndarray], cache: Cache, rate_hz: float
) -> None:
    """The found seizures as SzCORE annotation files, one per recording."""
    folder.mkdir(exist_ok=True)
    for line, found_N2 in zip(lines, found, strict=True):
        name = cache.recordings[line.row].key.replace("/", "_")
        write_atomic(folder / f"{name}.tsv", events_tsv(line, found_N2, rate_hz).encode())


def predictions_csv(targets: Sequence[Target], said: Said, cache: Cache) -> str:
    """One line per example and target: where it is, what is true, what was said."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")  # labels of events may hold commas
    lines.writerow("recording start_s target true said probability".split())
    for k, target in enumerate(targets):
        for b in np.flatnonzero(np.isfinite(said.y_BK[:, k])).tolist():
            y, told_C = said.y_BK[b, k], said.said[k][b]
            if target.classes:
                words = target.classes[int(y)], target.classes[told_C.argmax()], f"{told_C.max():.4f}"
            else:
                words = f"{target.decode(y):.6g}", f"{told_C[0]:.6g}", ""
            where = cache.recordings[said.row_B[b]].key, f"{said.start_B[b] / cache.rate_hz:.3f}"
            lines.writerow([*where, target.name, *words])
    return text.getvalue()
