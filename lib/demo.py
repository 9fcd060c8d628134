"""
The demo cohort on disk: a BIDS dataset of EDF files whose truth is known (lib/cohort.py, lib/synthesis.py; printed in docs/demo.md).

    dataset_description.json  README  participants.tsv  participants.json  .bidsignore  dataset.toml (the split)
    sub-D001/eeg/sub-D001_task-RestingState_run-1_{eeg.edf,eeg.json,channels.tsv,events.tsv}
    sub-D001/eeg/sub-D001_task-szMonitoring_run-1_eeg.{edf,json,csv_bi}
    demo.json                 parameters and the size of every file; written last
"""

import json
import os
from itertools import pairwise
from pathlib import Path

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from lib import cohort, synthesis
from lib.edf import write_edf
from lib.errors import Unusable
from lib.store import canonical_json, digest, fsync_directory, remove_stale_temporaries, write_atomic

RECIPE = 1  # to be raised when the code gives other signals from the same tables
SECONDS_MIN = 12
LEVELS = {
    "sex": {"Levels": {"F": "female", "M": "male"}},
    "age": {"Description": "age", "Units": "years"},
    "ehq_total": {"Description": "Edinburgh Handedness Questionnaire, -100 (left) to 100 (right)"},
    **{name: {"Description": f"{name} factor, z-score"} for name in cohort.TRAITS[3:]},
}


def write_demo(directory: str | Path, seed: int = 0, subjects: int = 24, scale: float = 1.0) -> dict:
    """
    Write the demo cohort into `directory` (every recording `scale` times as long as usual) and return what it holds.

    A complete cohort with the same parameters is left alone, an interrupted one is written again: its files are a function of the
    parameters alone. Raises Unusable for a directory that holds anything else, or senseless parameters.
    """
    root = Path(directory)
    if seed < 0 or subjects < 1 or not 0.1 <= scale <= 100:
        raise Unusable(
            f"demo cohort: need seed >= 0, subjects >= 1 and scale 0.1 to 100, got {seed}, {subjects} and {scale:g}"
        )
    correlations = list(cohort.CORRELATIONS.items())
    truth = digest([RECIPE, cohort.PARAMETERS, cohort.FEATURES, correlations, cohort.MONTAGES])
    parameters = {"seed": seed, "subjects": subjects, "scale": float(scale), "truth": truth[:12]}
    description = _json(_dataset_description(parameters))
    summary = _find(root, parameters, description)
    if summary:
        return summary

    root.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(root)
    (root / "demo.json").unlink(missing_ok=True)
    write_atomic(root / "dataset_description.json", description)
    write_atomic(root / ".bidsignore", b"*.csv_bi\ndemo.json\ndataset.toml\n")
    write_atomic(root / "README", b"Simulated EEG of people who do not exist; docs/demo.md of Berger has the truth.\n")
    write_atomic(root / "participants.json", _json(LEVELS))
    people = [cohort.draw_subject(seed, number) for number in range(subjects)]
    write_atomic(root / "dataset.toml", split_toml(people))
    rows = [[f"sub-{s.id}", *(s.columns[trait] for trait in cohort.TRAITS), s.montage.name] for s in people]
    write_atomic(root / "participants.tsv", _tsv(["participant_id", *cohort.TRAITS, "montage"], rows))

    seizures, total_s = 0, 0
    todo = [(s, task, run, seconds) for s in people for task, run, seconds in s.montage.recordings]
    for subject, task, run, seconds in tqdm(todo, desc="demo cohort", unit="recording", disable=None):
        with threadpool_limits(1):  # the matrix products are small: threads would spend twice the time on waiting
            recording = synthesis.record(subject, task, run, max(SECONDS_MIN, round(seconds * scale)))
        _write_recording(root / f"sub-{subject.id}" / "eeg", subject, task, run, recording)
        seizures += len(recording.seizures)
        total_s += recording.x_CT.shape[1] / subject.montage.rate_hz
    files = {p.relative_to(root).as_posix(): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}
    summary = {"subjects": subjects, "recordings": len(todo), "seconds": total_s}
    summary |= {"seizures": seizures, "bytes": sum(files.values())}
    write_atomic(root / "demo.json", _json({"parameters": parameters, "summary": summary, "files": files}))
    return {"directory": str(root), "written": True, **summary}


def _find(root: Path, parameters: dict, description: bytes) -> dict | None:
    """The summary of the complete cohort that is in `root`, None if it has to be written. Raises Unusable."""
    mend = "remove it or name another directory"
    if root.exists() and not root.is_dir():
        raise Unusable(f"{root} is not a directory: the demo cohort can't be written there; {mend}")
    if not root.exists() or not any(root.iterdir()):
        return None
    marker = root / "demo.json"
    if not marker.exists():
        started = root / "dataset_description.json"  # the first file that is written
        if started.exists() and started.read_bytes() == description or all(p.suffix == ".tmp" for p in root.iterdir()):
            return None  # an interrupted call's
        raise Unusable(f"{root} is not empty and holds no demo cohort of these parameters; {mend}")
    try:
        found = json.loads(marker.read_bytes())
        there, files, summary = found["parameters"], found["files"], found["summary"]
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{marker} is not the marker of a demo cohort; {mend}") from error
    if there != parameters:
        differs = [f"{k} {there.get(k)} there, {v} asked for" for k, v in parameters.items() if there.get(k) != v]
        raise Unusable(f"{root} holds another demo cohort ({', '.join(differs)}); {mend}")
    complete = all((root / name).is_file() and (root / name).stat().st_size == size for name, size in files.items())
    return {"directory": str(root), "written": False, **summary} if complete else None


def _write_recording(
    folder: Path, subject: cohort.Subject, task: str, run: int, recording: synthesis.Recording
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    montage, stem = subject.montage, f"sub-{subject.id}_task-{task}_run-{run}"
    duration_s = recording.x_CT.shape[1] / montage.rate_hz
    good = ["EEG", "uV", montage.rate_hz, montage.reference, "good", None]
    channels = [
        [n, *good[:4], "bad", recording.bad[i]] if i in recording.bad else [n, *good]
        for i, n in enumerate(montage.labels)
    ]
    columns = ["name", "type", "units", "sampling_frequency", "reference", "status", "status_description"]
    write_atomic(folder / f"{stem}_channels.tsv", _tsv(columns, channels))
    facts = {
        "TaskName": task,
        "EEGReference": montage.reference,
        "SamplingFrequency": montage.rate_hz,
        "PowerLineFrequency": montage.line_hz,
        "SoftwareFilters": "n/a",
        "EEGChannelCount": len(montage.labels),
        "RecordingDuration": duration_s,
        "RecordingType": "continuous",
    }
    write_atomic(folder / f"{stem}_eeg.json", _json(facts))
    if recording.events:
        rows = [[f"{onset_s:.3f}", f"{length_s:.3f}", *texts] for onset_s, length_s, *texts in recording.events]
        write_atomic(
            folder / f"{stem}_events.tsv", _tsv(["onset", "duration", "value", "event_code", "feedback"], rows)
        )
    if task == "szMonitoring":
        write_atomic(folder / f"{stem}_eeg.csv_bi", csv_bi(f"{stem}_eeg", duration_s, recording.seizures))
    path = folder / f"{stem}_eeg.edf"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_edf(temporary, recording.x_CT, montage.rate_hz, list(montage.labels))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(folder)


def truth_tables() -> str:
    """The tables of docs/demo.md: every parameter, every feature with the effects of traits on it, traits and montages."""
    effects = [", ".join(f"{trait} {effect:+g}" for trait, effect in f.effects.items()) for f in cohort.FEATURES]
    correlations = [", ".join(f"{f.correlation(trait):+.2f}" for trait in f.effects) for f in cohort.FEATURES]
    features = zip(cohort.FEATURES, effects, correlations, strict=True)
    tables = (
        ("parameter | value | unit | meaning", [(n, f"{v:g}", u, m) for n, v, u, m in cohort.PARAMETERS]),
        (
            "feature | base | unit | scale | effect per sd of a trait | residual sd | correlation | meaning",
            [(f.name, f.base, f.unit, "ln" * f.log, e, f.residual, r, f.meaning) for f, e, r in features],
        ),
        ("trait | best NRMSE", [(trait, f"{cohort.best_nrmse(trait):.2f}") for trait in cohort.TRAITS]),
        ("traits | correlation", [(f"{a}, {b}", f"{r:+g}") for (a, b), r in cohort.CORRELATIONS.items()]),
        (
            "montage | channels | rate Hz | line Hz | reference | recordings, s",
            [
                (
                    m.name,
                    len(m.labels),
                    m.rate_hz,
                    m.line_hz,
                    m.reference,
                    ", ".join(f"{t} {s}" for t, _, s in m.recordings),
                )
                for m in cohort.MONTAGES
            ],
        ),
    )
    lines = []
    for head, rows in tables:
        cells = [head.split(" | "), ["---"] * (head.count("|") + 1), *rows]
        lines += ["| " + " | ".join("-" if cell == "" else str(cell) for cell in row) + " |" for row in cells] + [""]
    return "\n".join(lines)


def csv_bi(stem: str, duration_s: float, seizures: list[tuple[float, float]]) -> bytes:
    """A Temple-style `.csv_bi` (term-based, seizure or background) that covers the whole recording; `seizures` in order."""
    edges = [0.0, *(t for interval in seizures for t in interval), duration_s]
    spans = [(a, b, ("bckg", "seiz")[i % 2]) for i, (a, b) in enumerate(pairwise(edges)) if b > a]
    head = ["# version = csv_v1.0.0", f"# bname = {stem}", f"# duration = {duration_s:.4f} secs", "#"]
    lines = [f"TERM,{a:.4f},{b:.4f},{label},1.0000" for a, b, label in spans]
    return "\n".join([*head, "channel,start_time,stop_time,label,confidence", *lines, ""]).encode()


def split_toml(people: list[cohort.Subject]) -> bytes:
    """A stated split, 5:1:1 in either montage, so that val and test have both and seizures too; a hash decides in tiny cohorts."""
    if len(people) < 6:
        return b'name = "demo"\n'
    lists = {name: [s.id for s in people if s.number // 2 % 7 == place] for name, place in (("val", 1), ("test", 2))}
    return "\n".join(
        ['name = "demo"', "", "[split]", *(f"{name} = {json.dumps(ids)}" for name, ids in lists.items()), ""]
    ).encode()


def _dataset_description(parameters: dict) -> dict:
    return {
        "Name": "Berger demo cohort",
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "License": "CC0",
        "GeneratedBy": [
            {"Name": "berger-demo", "Version": str(RECIPE), "Description": canonical_json(parameters).decode()}
        ],
    }


def _json(value) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _tsv(columns: list[str], rows: list[list]) -> bytes:
    return (
        "\n".join("\t".join("n/a" if cell is None else str(cell) for cell in row) for row in [columns, *rows]).encode()
        + b"\n"
    )
