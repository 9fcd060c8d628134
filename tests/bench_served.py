"""
Is what is served what was trained? The score of a pipeline on recordings replayed against its score on the cache, window by window.

    python tests/bench_served.py                                 # motor imagery, SSVEP and recorded LSL sessions, riemann
    python tests/bench_served.py --parts ssvep --encoder-steps 300   # with an encoder and a hybrid, trained on the spot
    python tests/bench_served.py --parts ssvep --through service # the replay goes through a running serve_realtime.py --sync
    python tests/bench_served.py --parts cost eyes               # what ingest costs, and what is left of blinks

Each part builds a causal cache of real recordings, learns from some and serves the others: samples in chunks of random sizes through
the intake, windows one by one through the pipeline. The same pipeline is given the same windows of the recording filtered in one go
(`offline`), and as the cache rounded them to float16 (`cache`). A window counts where one event covers all of it; the subject's mean is that of its windows, unlabelled,
so that both sides know the same. Prints tables and, last, one JSON line.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import scipy.signal
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

from lib import eyes, pipelines, recordings, replay, served, wire
from lib.cache import Cache
from lib.channels import POSITIONS, canonical
from lib.deep import load_encoder, signal_path
from lib.filters import Causal
from lib.intake import Intake, Layout
from lib.intake import Path as SignalPath
from lib.recordings import ReadSpec
from lib.riemann import learn
from lib.scores import classification_scores
from lib.sources import discover
from lib.targets import read_targets
from lib.traits import class_name
from tests.bench_cache import show
from tests.recipes import ROOT, run

Part = Literal["motor", "ssvep", "mental", "xdf", "cost", "eyes"]


@dataclass(frozen=True)
class Config:
    data: Path = ROOT.parent / "shared" / "data"  # real recordings
    parts: tuple[Part, ...] = ("motor", "ssvep", "mental", "xdf", "cost", "eyes")
    encoder_steps: int = 0  # training steps of an encoder, for the parts that have enough subjects; 0: riemann alone
    caches: Path | None = None  # folder in which caches are kept for the next time; none: they are not
    through: Literal["intake", "service"] = "intake"  # what the replay goes through


@dataclass(frozen=True)
class Case:
    """A data set, how it is cached, what is told apart, and who is learned from when `held` is served."""

    folder: str
    flags: tuple[str, ...]
    target: str
    window_s: float
    folds: tuple[tuple[str, str, str], ...]  # column, its values to learn from, its values to serve
    halves: bool = False  # one session: learn from the first half of each block, serve the second


RUNS = (("run", "03+04", "07+08"), ("run", "07+08", "03+04"))
SUBJECTS = tuple(
    ("subject", "+".join(f"ssvep_exo/0{t}" for t in range(1, 5) if t != s), f"ssvep_exo/0{s}") for s in range(1, 5)
)
SESSION = (("subject", "xdf/ssvep_example", "xdf/ssvep_example"),)
CASES = {
    "motor": Case("eegmmidb", ("--rate-hz", "160", "--band-hz", "4", "40"), "T1+T2", 2.0, RUNS),
    "ssvep": Case(
        "ssvep_exo",
        ("--rate-hz", "128", "--band-hz", "4", "45", "--reference", "none"),
        "rest+13 Hz+17 Hz+21 Hz",
        2.0,
        SUBJECTS,
    ),
    "xdf": Case(
        "xdf",
        ("--rate-hz", "100", "--band-hz", "4", "40", "--reference", "none"),
        "1.4,0,10,12,15+1.4,1,10,12,15+1.4,2,10,12,15",
        1.4,
        SESSION,
        halves=True,
    ),
}
CASES["mental"] = Case(
    "eegmat", ("--rate-hz", "100", "--band-hz", "0.5", "45"), "task", 2.0, (("split", "train", "test"),)
)
EVENT_S = {"ssvep": 5.0, "xdf": 1.4}  # how long markers without a duration hold


def compare(cfg: Config, part: Part, folder: Path) -> list[dict]:
    """One row per fold and pipeline."""
    case, rows = CASES[part], []
    cache_path = folder / part
    words = ["--causal", "--source", cfg.data / case.folder, "--cache", cache_path, "--workers", 1, *case.flags]
    toml = folder / f"{part}.toml"
    toml.write_text((ROOT / "tests" / "datasets" / f"{case.folder}.toml").read_text().partition("[crop]")[0])
    code, _, said = run(*words, "--dataset", toml)
    assert code in (0, 3), said
    cache = Cache(cache_path)
    sources = {s.key: s for s in discover([cfg.data / case.folder], [toml]).sources}
    event_s = EVENT_S.get(part, 0.0)
    for column, learned, held in case.folds:
        value = cache.column(column)
        train, test = ([i for i, v in enumerate(value) if v in some.split("+")] for some in (learned, held))
        target = read_targets(cache, [case.target], train, round(case.window_s * cache.rate_hz), 0.0, event_s)[0]
        lesson = served.read_lesson(cache, target, train, case.window_s, case.window_s / 2, event_s=event_s)
        if case.halves:
            start_s_N = lesson.start_N / cache.rate_hz
            found = {row: blocks(cache, row, target, event_s) for row in train}
            kept = [found[r].first_half(t, t + case.window_s) for r, t in zip(lesson.row_N, start_s_N, strict=True)]
            kept = np.array(kept)
            lesson.x_NCT, lesson.y_N, lesson.subject_N = (a[kept] for a in (lesson.x_NCT, lesson.y_N, lesson.subject_N))
        window = lesson.x_NCT.shape[2]
        path = signal_path(cache.signal, lesson.names, window)
        classes, bands_hz = tuple(target.classes), served.flicker_bands(target.classes, cache.signal)
        made = [learn(lesson.x_NCT, lesson.y_N, lesson.subject_N, classes, path, bands_hz)]
        if cfg.encoder_steps and part in ("ssvep", "mental"):
            made += with_encoder(cfg, case, cache_path, folder, made[0], lesson, held, event_s)
        for pipeline in made:
            rows.append({"part": part, "held": held, "pipeline": pipeline.name})
            rows[-1] |= judge(cfg, pipeline, cache, target, test, sources, event_s, case.halves)
    return rows


def with_encoder(cfg, case, cache_path, folder, riemann, lesson, held, event_s) -> list:
    """An encoder of the cache's own training subjects (whoever is held here), and a hybrid with it, where they don't include `held`."""
    cache = Cache(cache_path)
    if held in {r.subject for r in cache.recordings if r.split in ("train", "val")}:
        return []
    words = ["--cache", cache_path, "--target", case.target, "--window-s", case.window_s, "--steps", cfg.encoder_steps]
    words += [
        "--d-model",
        64,
        "--layers",
        2,
        "--max-channels",
        0,
        "--event-s",
        EVENT_S["ssvep"],
        "--name",
        folder / "run",
    ]
    code, found, said = run(*words, script="train_supervised.py", timeout_s=3600)
    assert code == 0, said
    deep = load_encoder(Path(found["model"]), case.target)
    deep = replace(deep, path=replace(deep.path, channels=lesson.names))
    assert deep.classes == riemann.classes
    return [deep, pipelines.Hybrid(riemann, deep)]


def judge(cfg, pipeline, cache, target, rows, sources, event_s, halves) -> dict:
    """Both ways of predicting the windows of recordings `rows`."""
    said, told, exact, truth, apart_sd = [], [], [], [], 0.0
    for row in rows:
        source = sources[cache.recordings[row].key]
        windows = [w for w in stream(source, pipeline.path) if w.valid]
        out = np.array([round(w.start * cache.rate_hz / rate_of(source)) for w in windows])
        found = blocks(cache, row, target, event_s)
        inside = [found.covering(s / cache.rate_hz, (s + pipeline.path.window) / cache.rate_hz) for s in out]
        kept = [
            i
            for i, b in enumerate(inside)
            if b is not None and (not halves or out[i] / cache.rate_hz >= found.middle(b))
        ]
        x_live = np.stack([windows[i].x_CT for i in kept]).astype(np.float64)
        x_kept = served.read(cache, np.full(len(kept), row), out[kept], pipeline.path.window)
        apart_sd = max(apart_sd, float(np.abs(x_live - x_kept).max() / x_kept.std()))
        if cfg.through == "service":
            said.append(through_service(pipeline, source, [windows[i] for i in kept], x_live))
        else:
            own = served.with_least(pipeline.fit({"BACKGROUND": list(x_live)}))
            said.append(np.concatenate([own.predict_proba(x[None]) for x in x_live]))
        told.append(served.with_least(pipeline.fit({"BACKGROUND": list(x_kept)})).predict_proba(x_kept))
        x_whole = at_once(source, cache, row, out[kept], pipeline.path.window)
        exact.append(served.with_least(pipeline.fit({"BACKGROUND": list(x_whole)})).predict_proba(x_whole))
        truth += [target.classes.index(found.spans[inside[i]][2]) for i in kept]
    said, told, exact = (np.concatenate(p) for p in (said, told, exact))
    scores = [classification_scores(np.array(truth), p)["balanced_accuracy"] for p in (said, exact, told)]
    return {
        "windows": len(truth),
        "classes": len(target.classes),
        "served": round(scores[0], 4),
        "offline": round(scores[1], 4),
        "apart": float(np.abs(said - exact).max()),
        "same": float((said.argmax(1) == exact.argmax(1)).mean()),
        "cache": round(scores[2], 4),
        "cache_apart": float(np.abs(said - told).max()),
        "cache_same": round(float((said.argmax(1) == told.argmax(1)).mean()), 4),
        "cache_signal_apart_sd": apart_sd,
    }


def at_once(source, cache: Cache, row: int, start_N: np.ndarray, samples: int) -> np.ndarray:
    """The same windows as the builder has them before it rounds: the whole recording filtered in one go."""
    recording, names = recordings.open_recording(source.path, source.spec), cache.recordings[row].names
    own = [canonical(n) for n in recording.names]
    x_CT = recording.read([own.index(n) for n in names])
    signal, rate_hz = cache.signal, rate_of(source)
    notch_hz = signal["notch_hz"] and tuple(signal["notch_hz"])
    y_CT = Causal(rate_hz, cache.rate_hz, tuple(signal["band_hz"]), notch_hz, len(names)).process(x_CT)
    y_CT = (y_CT - y_CT.mean(0) if signal["reference"] == "average" else y_CT).astype(np.float32)
    return np.stack([y_CT[:, s : s + samples] for s in start_N]).astype(np.float64)


def stream(source, path: SignalPath) -> list:
    """The windows of a recording that is pushed through the intake in chunks of random sizes."""
    material, rng, windows = replay.read(source.path, spec=source.spec), np.random.default_rng(0), []
    intake = Intake(material.stream, path)
    for first, x_TC in material.pieces:
        at = 0
        while at < len(x_TC):
            size = int(rng.integers(1, 65))
            windows += intake.push(first + at, x_TC[at : at + size])
            at += size
    return windows


_rates: dict[str, float] = {}


def rate_of(source) -> float:
    if source.key not in _rates:
        _rates[source.key] = replay.read(source.path, spec=source.spec).stream.rate_hz
    return _rates[source.key]


def through_service(pipeline, source, windows: list, x_live: np.ndarray) -> np.ndarray:
    """What a running service says of these windows: it is given the session as fitted, and the recording as fast as it takes it."""
    with tempfile.TemporaryDirectory() as folder:
        pipelines.save(served.with_least(pipeline.fit({"BACKGROUND": list(x_live)})), folder)
        words = ["--models", folder, "--replay", source.path, "--speed", 0, "--sync", "--listen", "127.0.0.1:0"]
        words += ["--wait", 1, "--partial-fit", 0, "--chunk", 23]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "serve_realtime.py", *map(str, words)]
        service = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        address = json.loads(service.stdout.readline())["listen"]
        client = [sys.executable, "serve_realtime.py", "--action", "client", "--to", address]
        listener = subprocess.Popen(client, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        service.communicate(timeout=600)
        listener.terminate()  # it would wait for the next service
        lines = listener.communicate()[0]
    said = {}
    for line in map(json.loads, lines.splitlines()):
        if line.get("type") == "data" and line["prediction"] is not None:
            said[line["window_metadata"]["start"]] = line["window_metadata"]["probabilities"]
    return np.array([said[window.start] for window in windows])


@dataclass(frozen=True)
class Blocks:
    """Stretches of one class: events of its label that touch, in order."""

    spans: list[tuple[float, float, str]]

    def covering(self, start_s: float, stop_s: float) -> int | None:
        """The block that holds all of a window."""
        fits = (i for i, (a, b, _) in enumerate(self.spans) if a - 1e-9 <= start_s and stop_s <= b + 1e-9)
        return next(fits, None)

    def middle(self, i: int) -> float:
        """The time that halves a block."""
        return (self.spans[i][0] + self.spans[i][1]) / 2

    def first_half(self, start_s: float, stop_s: float) -> bool:
        """Whether a window that was learned from lies in the first half of a block."""
        return any(a - 0.01 <= start_s and stop_s <= self.middle(i) for i, (a, _, _) in enumerate(self.spans))


def blocks(cache: Cache, row: int, target, event_s: float) -> Blocks:
    """The blocks of a recording; all of it, where the target is a column."""
    if target.source == "column":
        own = class_name(cache.column(target.labels[0])[row])
        return Blocks([(0.0, cache.recordings[row].samples / cache.rate_hz, own)])
    spans: list[tuple[float, float, str]] = []
    for e in cache.events(row):
        stop_s = e.onset_s + (e.duration_s or event_s)
        if e.label in target.classes and spans and spans[-1][2] == e.label and e.onset_s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], stop_s, e.label)
        elif e.label in target.classes:
            spans.append((e.onset_s, stop_s, e.label))
    return Blocks(spans)


# ----------------------------------------------------------------------------
# what ingest costs


def cost() -> list[dict]:
    """A chunk of 64 channels from frame to window, in CPU time, beside scipy's filter alone; medians of blocks that take turns."""
    names = tuple(n for n in POSITIONS if not n.startswith("E"))[:63] + ("Fz",)
    names = tuple(dict.fromkeys(names + tuple(POSITIONS)))[:64]
    rows, rng = [], np.random.default_rng(0)
    sos = scipy.signal.butter(4, (0.5, 45.0), "bandpass", fs=500.0, output="sos")
    for reference, out_hz, size in (
        ("Fz", None, 1),
        ("Fz", None, 8),
        ("average", None, 8),
        ("Fz", None, 32),
        ("Fz", 100.0, 8),
    ):
        path = SignalPath(names, reference, (0.5, 45.0), rate_hz=out_hz)
        intake, x_TC = (
            Intake(Layout(names, 500.0, "uV"), path),
            (20 * rng.standard_normal((size, 64))).astype(np.float32),
        )
        frame, x_CT, state = wire.frame_samples(0, 0.0, x_TC), x_TC.T.astype(np.float64), np.zeros((len(sos), 64, 2))
        took: dict[str, list[float]] = {"ingest": [], "sosfilt": []}
        seq = 0
        for _ in range(15):
            start = time.process_time()
            for _ in range(400):
                header = wire.parse_header(frame[: wire.HEADER.size], 64)
                intake.push(seq, wire.parse_samples(header, frame[wire.HEADER.size :], 64))
                seq += size
            took["ingest"].append((time.process_time() - start) / 400)
            start = time.process_time()
            for _ in range(400):
                _, state = scipy.signal.sosfilt(sos, x_CT, axis=1, zi=state)
            took["sosfilt"].append((time.process_time() - start) / 400)
        ours, theirs = (1e6 * np.median(took[n]) for n in ("ingest", "sosfilt"))
        filter_us = alone(intake, x_CT)
        rows.append({"chunk": f"64 x {size}", "reference": reference, "out_hz": out_hz or 500.0})
        rows[-1] |= {"ingest_us": round(ours, 1), "filter_us": round(filter_us, 1), "sosfilt_us": round(theirs, 1)}
        rows[-1] |= {
            "sosfilt_over_filter": round(theirs / filter_us, 1),
            "sosfilt_over_ingest": round(theirs / ours, 1),
        }
    return rows


def alone(intake: Intake, x_CT: np.ndarray) -> float:
    """The filter's own share of a chunk, in µs of CPU time."""
    sections, took = intake.causal.sections, []
    for _ in range(15):
        start = time.process_time()
        for _ in range(400):
            sections(x_CT)
        took.append((time.process_time() - start) / 400)
    return 1e6 * float(np.median(took))


# ----------------------------------------------------------------------------
# eyes


def blinks(cfg: Config) -> list[dict]:
    """
    A minute with eyes open: fitted on the half with its blinks against its quiet stretches, looked at in the other half.

    What is left of the mean blink where it is largest, and of the rhythm above 7 Hz in stretches without blinks.
    """
    rows = []
    for file in ("S001R01.edf", "S001R03.edf"):
        material = replay.read(cfg.data / "eegmmidb" / "S001" / file, spec=ReadSpec())
        names = tuple(material.stream.channels)
        path = SignalPath(names, "average", (0.5, 45.0), rate_hz=160.0, window=160, step=160, settle_s=2.0)
        intake = Intake(material.stream, path)
        windows = [w.x_CT.astype(np.float64) for first, x in material.pieces for w in intake.push(first, x) if w.valid]
        half = len(windows) // 2
        found = eyes.fit(windows[:half], [], 160.0)
        x_CT = np.concatenate(windows[half:], axis=1)
        slow_CT = eyes.slow(x_CT, 160.0)
        front = [names.index(n) for n in ("Fp1.", "Fp2.") if n in names] or [0, 1]
        trace_T = slow_CT[front].mean(0)
        peaks = scipy.signal.find_peaks(trace_T, height=4 * np.median(np.abs(trace_T)) / 0.6745, distance=48)[0]
        peaks = [p for p in peaks if 40 <= p < x_CT.shape[1] - 40]
        row = {"recording": file, "blinks": len(peaks), "directions": 0 if found is None else len(found.ratio_D)}
        if found and peaks:
            clean_CT = found(x_CT[None])[0]
            mean = [np.mean([z[:, p - 40 : p + 40] for p in peaks], axis=0) for z in (x_CT, clean_CT)]
            tall = [np.abs(m[front].mean(0)).max() for m in mean]
            quiet_T = np.ones(x_CT.shape[1], bool)
            for p in peaks:
                quiet_T[max(p - 80, 0) : p + 80] = False
            fast = [(z - eyes.slow(z, 160.0))[:, quiet_T].std(1) for z in (x_CT, clean_CT)]
            back = [i for i, n in enumerate(names) if n.strip(".").upper() in ("O1", "OZ", "O2", "POZ", "PO3", "PO4")]
            middle = [i for i, n in enumerate(names) if n.strip(".").upper() in ("C3", "CZ", "C4", "CP3", "CP4")]
            row |= {"peak_uV": round(tall[0], 1), "left_uV": round(tall[1], 1), "left": round(tall[1] / tall[0], 3)}
            row |= {"rhythm_kept_back": round(float((fast[1] / fast[0])[back].mean()), 3)}
            row |= {"rhythm_kept_middle": round(float((fast[1] / fast[0])[middle].mean()), 3)}
        rows.append(row)
    return rows


def main(cfg: Config) -> dict:
    results: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in cfg.parts:
            if part == "cost":
                results[part] = cost()
            elif part == "eyes":
                results[part] = blinks(cfg)
            else:
                results[part] = compare(cfg, part, cfg.caches or Path(folder))
            columns = list(dict.fromkeys(k for row in results[part] for k in row))
            show(part, columns, [[row.get(c, "") for c in columns] for row in results[part]])
    return results


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config, description=__doc__))))
