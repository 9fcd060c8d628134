"""
Is what is served what was trained? The score of a pipeline on recordings replayed against its score on the cache, window by window.

    python tests/bench_served.py                                 # motor imagery, SSVEP and recorded LSL sessions, riemann
    python tests/bench_served.py --parts ssvep --encoder-steps 300   # with an encoder and a hybrid, trained on the spot
    python tests/bench_served.py --parts ssvep --through service # the replay goes through a running serve_realtime.py --sync
    python tests/bench_served.py --parts cost eyes               # what ingest costs, and what is left of blinks

Each part builds a causal cache of real recordings, learns from some and serves the others: samples in chunks of random sizes through
the intake, windows one by one through the pipeline. The same windows are read from the cache and given to the same pipeline. What may
differ is what float16 rounds. A window counts where one event covers all of it; the subject's mean is that of its windows, unlabelled,
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

from lib import eyes, pipelines, replay, served, wire
from lib.cache import Cache
from lib.channels import POSITIONS
from lib.intake import Intake, Layout
from lib.intake import Path as SignalPath
from lib.recordings import ReadSpec
from lib.scores import classification_scores
from lib.sources import discover
from lib.targets import read_targets
from tests.bench_cache import show
from tests.recipes import ROOT, run

Part = Literal["motor", "ssvep", "xdf", "cost", "eyes"]


@dataclass(frozen=True)
class Config:
    data: Path = ROOT.parent / "shared" / "data"  # real recordings
    parts: tuple[Part, ...] = ("motor", "ssvep", "xdf", "cost", "eyes")
    encoder_steps: int = 0  # training steps of an encoder, for the parts that have enough subjects; 0: riemann alone
    through: Literal["intake", "service"] = "intake"  # what the replay goes through


@dataclass(frozen=True)
class Case:
    """A data set, how it is cached, what is told apart, and who is learned from when `held` is served."""

    folder: str
    flags: tuple[str, ...]
    target: str
    window_s: float
    folds: tuple[tuple[str, str, str], ...]  # column, its values to learn from, its values to serve
    half: bool = False  # learn from the first half of each recording, serve the second


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
        2.0,
        SESSION,
        half=True,
    ),
}
EVENT_S = {"xdf": 5.0}  # how long markers without a duration hold


def compare(cfg: Config, part: Part, folder: Path) -> list[dict]:
    """One row per fold and pipeline."""
    case, rows = CASES[part], []
    cache_path = folder / part
    words = ["--causal", "--source", cfg.data / case.folder, "--cache", cache_path, "--workers", 1, *case.flags]
    toml = ROOT / "tests" / "datasets" / f"{case.folder}.toml"
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
        if case.half:
            middle_N = np.array([cache.recordings[i].samples / 2 for i in lesson.row_N])
            kept = lesson.start_N + lesson.x_NCT.shape[2] <= middle_N
            lesson.x_NCT, lesson.y_N, lesson.subject_N = (a[kept] for a in (lesson.x_NCT, lesson.y_N, lesson.subject_N))
        window = lesson.x_NCT.shape[2]
        path = pipelines.signal_path(cache.signal, lesson.names, window)
        classes, bands_hz = tuple(target.classes), served.flicker_bands(target.classes, cache.signal)
        made = [pipelines.learn(lesson.x_NCT, lesson.y_N, lesson.subject_N, classes, path, bands_hz)]
        if cfg.encoder_steps and part == "ssvep":
            made += with_encoder(cfg, case, cache_path, folder, made[0], lesson, held)
        for pipeline in made:
            rows.append({"part": part, "held": held, "pipeline": pipeline.name})
            rows[-1] |= judge(cfg, pipeline, cache, target, test, sources, event_s, case.half)
    return rows


def with_encoder(cfg, case, cache_path, folder, riemann, lesson, held) -> list:
    """An encoder of the cache's own training subjects (whoever is held here), and a hybrid with it, where they don't include `held`."""
    cache = Cache(cache_path)
    if held in {r.subject for r in cache.recordings if r.split in ("train", "val")}:
        return []
    words = ["--cache", cache_path, "--target", case.target, "--window-s", case.window_s, "--steps", cfg.encoder_steps]
    words += ["--d-model", 64, "--layers", 2, "--max-channels", 0, "--runs", folder / "runs", "--name", "served"]
    code, found, said = run(*words, script="train_supervised.py", timeout_s=3600)
    assert code == 0, said
    deep = pipelines.load_encoder(Path(found["model"]), case.target)
    deep = replace(deep, path=replace(deep.path, channels=lesson.names))
    assert deep.classes == riemann.classes
    return [deep, pipelines.Hybrid(riemann, deep)]


def judge(cfg, pipeline, cache, target, rows, sources, event_s, half) -> dict:
    """Both ways of predicting the windows of recordings `rows`."""
    said, told, truth, apart_uV = [], [], [], 0.0
    for row in rows:
        source, r = sources[cache.recordings[row].key], cache.recordings[row]
        windows = [w for w in stream(source, pipeline.path) if w.valid]
        out = np.array([round(w.start * cache.rate_hz / rate_of(source)) for w in windows])
        spans = [(e.onset_s, e.onset_s + (e.duration_s or event_s), e.label) for e in cache.events(row)]
        label = [covering(spans, s / cache.rate_hz, (s + pipeline.path.window) / cache.rate_hz, target) for s in out]
        kept = [i for i, c in enumerate(label) if c >= 0 and not (half and out[i] < r.samples / 2)]
        x_live = np.stack([windows[i].x_CT for i in kept]).astype(np.float64)
        x_kept = served.read(cache, np.full(len(kept), row), out[kept], pipeline.path.window)
        apart_uV = max(apart_uV, float(np.abs(x_live - x_kept).max() / x_kept.std()))
        if cfg.through == "service":
            said.append(through_service(pipeline, source, [windows[i] for i in kept], x_live))
        else:
            own = served.with_least(pipeline.fit({"BACKGROUND": list(x_live)}))
            said.append(np.concatenate([own.predict_proba(x[None]) for x in x_live]))
        told.append(served.with_least(pipeline.fit({"BACKGROUND": list(x_kept)})).predict_proba(x_kept))
        truth += [label[i] for i in kept]
    said, told, truth = np.concatenate(said), np.concatenate(told), np.array(truth)
    scores = [classification_scores(truth, p)["balanced_accuracy"] for p in (said, told)]
    return {
        "windows": len(truth),
        "classes": len(target.classes),
        "served": round(scores[0], 4),
        "offline": round(scores[1], 4),
        "same": round(float((said.argmax(1) == told.argmax(1)).mean()), 4),
        "apart": float(np.abs(said - told).max()),
        "signal_apart_sd": apart_uV,
    }


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


def through_service(pipeline, source, windows, x_live) -> np.ndarray:
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
        lines = subprocess.run(client, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600).stdout
        service.wait(60)
    said = {}
    for line in map(json.loads, lines.splitlines()):
        if line.get("type") == "data" and line["prediction"] is not None:
            said[line["window_metadata"]["start"]] = (line["prediction"], line["probability"])
    p_NK = np.zeros((len(windows), len(pipeline.classes)))
    for p_K, window in zip(p_NK, windows, strict=True):
        k, p = said[window.start]
        p_K[:] = (1 - p) / (len(p_K) - 1)
        p_K[k] = p
    return p_NK


def covering(spans: list[tuple], start_s: float, stop_s: float, target) -> int:
    """The class of the event that covers all of a window, or -1."""
    for a, b, label in spans:
        if label in target.classes and a - 1e-9 <= start_s and stop_s <= b + 1e-9:
            return target.classes.index(label)
    return -1


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
                results[part] = compare(cfg, part, Path(folder))
            columns = list(dict.fromkeys(k for row in results[part] for k in row))
            show(part, columns, [[row.get(c, "") for c in columns] for row in results[part]])
    return results


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config, description=__doc__))))
