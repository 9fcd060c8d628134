"""
From what is on disk to what a cache says of itself: labels on the signal's own time axis, splits, tables and the manifest's counts.

Labels are read anew by every build and have a hash of their own, so that mending a label never touches a signal.
"""

import hashlib
import hmac
import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from lib import edf, labels, recordings, store
from lib.channels import POSITIONS
from lib.errors import Rejected
from lib.recordings import Event
from lib.rules import SPLITS
from lib.sources import Discovery, Source, assign_splits
from lib.windows import FULL_SHARE, SEIZURE, Windows, merge

LABEL_RULES = 1  # counted up whenever the same label files give other labels
WINDOW_S, STRIDE_S = 4.0, 2.0  # what the manifest counts windows by; a training run may use others


def assemble(
    found: Discovery, parts: dict[str, dict], signal: dict, directory: str, channel_labels: bool, anonymous: bool
) -> tuple[dict[str, bytes], dict, dict]:
    """
    The tables, the manifest and the results of a build.

    `parts` holds what became of each source, by key. Recordings whose labels can't be trusted are quarantined here; their shards stay,
    so that a mended label file brings them back at once.
    """
    kept: list[tuple[Source, dict, list[Event]]] = []
    quarantine = [{"key": key, "code": code, "reason": reason} for key, _, code, reason in found.rejected]
    notes = Counter(kind_of_note(n) for n in found.notes)
    for source in found.sources:
        part = parts[source.key]
        try:
            if part["status"] != "cached":
                raise Rejected(part["code"], part["reason"])
            events, remarks = recording_events(source, part, signal["rate_hz"], channel_labels)
            kept.append((source, part, events))
            notes.update(kind_of_note(n) for n in (*part["notes"], *remarks))
        except Rejected as error:
            quarantine.append({"key": source.key, "code": error.code, "reason": error.reason})

    split_of = assign_splits(
        {(s.dataset, s.subject) for s, _, _ in kept}, {(s.dataset, s.subject): s.split for s, _, _ in kept if s.split}
    )
    twins: dict[tuple, set[str]] = {}
    for source, part, _ in kept:
        twins.setdefault((part["bytes"], part["crc32"]), set()).add(split_of[source.dataset, source.subject])
    if leaks := sum(len(splits) > 1 for splits in twins.values()):
        notes["the same signal is in several splits"] = leaks
    participants = {f"{d}/{s}": dict(sorted(found.participants.get((d, s), {}).items())) for d, s in sorted(split_of)}
    if anonymous:
        kept = Pseudonyms.without_names(kept, parts)
        quarantine = [{**q, "reason": ""} for q in quarantine]
    kept.sort(key=lambda item: item[0].key)

    montages: list[dict] = []
    orders: dict[str, int] = {}
    index, rows, recording_labels, vocabulary = [], [], {}, sorted({e.label for _, _, events in kept for e in events})
    place = {label: i for i, label in enumerate(vocabulary)}
    for number, (source, part, events) in enumerate(kept):
        montage = _montage(part)
        order = orders.setdefault(store.digest(montage), len(orders))
        if order == len(montages):
            montages.append(montage)
        index.append(
            {
                "key": source.key,
                **{
                    name: part[name]
                    for name in ("shard", "bytes", "crc32", "samples", "segments", "bad", "interpolated")
                },
                "montage": order,
            }
        )
        recording_labels[source.key] = {
            "dataset": source.dataset,
            "subject": source.subject,
            "split": split_of[source.dataset, source.subject],
            **{name: getattr(source, name) for name in ("session", "task", "run")},
            "columns": {**_plain(part["columns"]), **_plain(source.columns)},
        }
        rows += [(number, e.onset_s, e.duration_s, place[e.label], e.value) for e in events]
    events_table = np.array(rows, store.EVENT)
    scales = np.array(
        [pair for _, part, _ in kept for pair in zip(part["scale"], part["offset"], strict=True)], np.float32
    )

    label_text = {
        "recordings": recording_labels,
        "participants": {s: _plain(p) for s, p in participants.items()},
        "vocabulary": vocabulary,
    }
    tables = {
        "index.json": store.canonical_json({"montages": montages, "recordings": index}),
        "labels.json": store.canonical_json(label_text),
        "events.npy": b"".join(bytes(b) for b in store.npy_bytes(events_table)),
        "scales.npy": b"".join(bytes(b) for b in store.npy_bytes(scales.reshape(-1, 2))),
        "quarantine.json": store.utf8(
            json.dumps(sorted(quarantine, key=lambda q: q["key"]), indent=1, ensure_ascii=False)
        ),
    }
    units = sorted({part["unit"] for _, part, _ in kept})
    splits = _split_counts(kept, split_of, index, events_table, vocabulary, signal["rate_hz"])
    told = split_notes([source for source, _, _ in kept], splits)
    notes.update(map(kind_of_note, told))
    results = {
        "recordings": len(kept),
        "subjects": len(split_of),
        "hours": round(sum(p["samples"] for _, p, _ in kept) / signal["rate_hz"] / 3600, 4),
        "quarantined": len(quarantine),
        "quarantined_by_code": dict(sorted(Counter(q["code"] for q in quarantine).items())),
        "windows": count_windows(index, events_table, vocabulary, signal["rate_hz"]),
        "splits": splits,
        "datasets": dict(sorted(Counter(s.dataset for s, _, _ in kept).items())),
        "channels": dict(sorted(Counter(len(p["names"]) for _, p, _ in kept).items())),
        "missing_electrodes": missing_cost(kept, quarantine),
        "notes": dict(sorted(notes.items())),
    }
    head = {
        "signal": signal,
        "signal_hash": store.digest(signal),
        "label_hash": hashlib.sha256(tables["labels.json"] + tables["events.npy"] + bytes([LABEL_RULES])).hexdigest(),
        "directory": directory,
        "unit": units[0] if len(units) == 1 else "mixed",
        "counts": {**results, "channels": {str(n): k for n, k in results["channels"].items()}},
        "seizure_sources": [s.dataset for s in {s.dataset: s for s, _, _ in kept if _states_seizures(s)}.values()],
        "window_s": WINDOW_S,
        "stride_s": STRIDE_S,
        "anonymised": anonymous,
        "libraries": {"numpy": np.__version__},
    }
    head["seizure_sources"].sort()
    results["seizure_sources"], results["units"], results["split_notes"] = head["seizure_sources"], units, told
    # each data set by itself: one without seizures must not hide beside another that has them
    results["seizureless"] = []
    for dataset in head["seizure_sources"]:
        rows = [
            i for i, (s, _, _) in enumerate(kept) if s.dataset == dataset and split_of[dataset, s.subject] == "train"
        ]
        counts = count_windows(index, events_table, vocabulary, signal["rate_hz"], rows)
        if not counts["full"] + counts["partial"]:
            results["seizureless"].append(dataset)
    return tables, head, results


def split_notes(sources: list[Source], splits: dict[str, dict]) -> list[str]:
    """What is wrong with the splits of what was cached, with the mend: nobody to validate on, or only in recordings without a window."""
    told, mend = [], "[split] in dataset.toml says who goes where"
    for dataset in sorted({s.dataset for s in sources}):
        subjects = {s.subject: s.split for s in sources if s.dataset == dataset}
        if len(subjects) < len(SPLITS) and not any(subjects.values()):
            words = (
                f"all subjects are train: {dataset} has {len(subjects)} that could be cached, too few to split by hash"
            )
            told.append(f"{words}; {mend}" if len(subjects) > 1 else words)
    if any(sum(of["windows"].values()) for of in splits.values()):
        for split, of in splits.items():
            if of["recordings"] and not sum(of["windows"].values()):
                words = f"a split without a window: all recordings of {split} ({of['recordings']}) are shorter than {WINDOW_S:g} s"
                told.append(f"{words}; train with a shorter --window-s, or {mend}")
    return told


def refusal(results: dict, allow_no_seizures: bool) -> str | None:
    """Why a build must not become a cache, in one line, or None."""
    if not results["recordings"]:
        codes = ", ".join(f"{n} {code}" for code, n in results["quarantined_by_code"].items()) or "no recordings found"
        return f"nothing could be cached ({codes}); the reasons are in quarantine.json"
    if len(results["units"]) > 1:
        return f"recordings have different units ({', '.join(results['units'])}): build a cache for each"
    if results["seizureless"] and not allow_no_seizures:
        return (
            f"the training split of {', '.join(results['seizureless'])} holds no seizure: check its label files, or say "
            "--allow-no-seizures"
        )
    return None


def recording_events(source: Source, part: dict, rate_hz: float, channel_labels: bool) -> tuple[list[Event], list[str]]:
    """
    The events of one recording in seconds of its stored signal, sorted, and remarks to be counted.

    Sidecar files win over what the recording itself carries, because they are what data sets mend. Raises Rejected.
    """
    duration_s = part["source_seconds"]  # labels speak of the whole recording, whatever of it is stored
    events = [
        Event(onset, length, label, math.nan if value is None else value)
        for onset, length, label, value in part["events"]
    ]
    events, remarks = _sidecar_events(source, part, events, duration_s, channel_labels)
    renamed = [Event(e.onset_s, e.duration_s, source.event_names.get(e.label, e.label), e.value) for e in events]
    placed = []
    for event in labels.normalise_events(renamed, source.task, duration_s):
        moved = to_signal_time(event, part["segments"], rate_hz)
        if moved is None:
            remarks.append("label_out_of_range: event outside the stored signal left out")
        else:
            placed.append(moved)
    return sorted(placed, key=lambda e: (e.onset_s, e.label, e.duration_s)), remarks


def _sidecar_events(
    source: Source, part: dict, own: list[Event], duration_s: float, channel_labels: bool
) -> tuple[list[Event], list[str]]:
    """A recording's own events, replaced by its events.tsv or event file where there is one, and the seizures of its TUSZ label file."""
    remarks: list[str] = []
    seizure_files = [p for p in source.label_files if p.name.lower().endswith((".csv_bi", ".csv"))]
    binary = [p for p in seizure_files if p.name.lower().endswith(".csv_bi")]
    per_channel = [p for p in seizure_files if p not in binary and p.exists()]
    added: list[Event] = []
    scored: list[Event] = []  # by several files, if several people or programs did
    if channel_labels and per_channel and not any(p.exists() for p in binary):
        found = labels.read_csv_channels(per_channel[0], duration_s)
    elif binary:
        found = labels.read_csv_bi(binary[0], duration_s)
    else:
        found = None
    if found:
        added += [Event(start, stop - start, SEIZURE) for start, stop in found.intervals]
        remarks += found.notes
    for path in source.label_files:
        name = path.name.lower()
        if name.endswith("_events.tsv"):
            events, notes = labels.read_events_tsv(path)
        elif name.endswith(("-eve.fif", "_eve.fif", "-eve.fif.gz", ".eve")):
            events, notes = recordings.read_event_file(path, part["source_rate_hz"], part["first_sample"]), []
        elif name.endswith((".edf", ".bdf")):
            scored += [Event(*annotation) for annotation in edf.read_annotation_file(path, source.path)]
            continue
        else:
            continue
        own, remarks = events or own, remarks + notes
    own = scored or own
    return own + added, remarks


def to_signal_time(event: Event, segments: list, rate_hz: float) -> Event | None:
    """
    An event moved from recording time to the time of the stored signal, where gaps and cropped parts are left out.

    An interval is clipped to what is stored; None if nothing of the event is. The value of a movie's is then the seconds of it that had gone by:
    moments count from its first frame. Segments are [start, stop) samples and onset in seconds.
    """

    def place(t_s: float) -> tuple[float, bool]:
        inside = False
        position = segments[0][0] / rate_hz
        for start, stop, onset_s in segments:
            if t_s < onset_s - 1e-9:
                break
            position = min(start / rate_hz + (t_s - onset_s), stop / rate_hz)
            inside = t_s - onset_s < (stop - start) / rate_hz
        return position, inside

    start_s, inside = place(event.onset_s)
    if event.duration_s <= 0:
        return Event(round(start_s, 6), 0.0, event.label, event.value) if inside else None
    stop_s, _ = place(event.onset_s + event.duration_s)
    if stop_s - start_s <= 1e-9:
        return None
    value = event.value
    if event.label.startswith(labels.MOVIE):  # whatever a table said
        behind_s = (onset_s for _, _, onset_s in segments if onset_s > event.onset_s)
        value = math.nan if inside else round(next(behind_s) - event.onset_s, 6)
    return Event(round(start_s, 6), round(stop_s - start_s, 6), event.label, value)


def count_windows(
    index: list[dict], events: np.ndarray, vocabulary: list[str], rate_hz: float, rows=None
) -> dict[str, int]:
    """How many windows are seizure throughout, partly, or not at all."""
    rows = range(len(index)) if rows is None else rows
    segments = [(i, start, stop) for i in rows for start, stop, _ in index[i]["segments"]]
    windows = Windows(segments, round(WINDOW_S * rate_hz), round(STRIDE_S * rate_hz))
    seizures = events[
        (events["label"] == (vocabulary.index(SEIZURE) if SEIZURE in vocabulary else -1)) & (events["duration_s"] > 0)
    ]
    row, start_s, stop_s = merge(
        seizures["recording"], seizures["onset_s"], seizures["onset_s"] + seizures["duration_s"]
    )
    _, share = windows.overlap(row, start_s * rate_hz, stop_s * rate_hz)
    full = int((share >= FULL_SHARE).sum())
    return {"full": full, "partial": len(share) - full, "none": len(windows) - len(share)}


def missing_cost(kept: list, quarantine: list[dict]) -> dict:
    """What missing electrodes cost: how many recordings lacked each, and what became of them."""
    lacking = [(p["missing"], bool(p["interpolated"])) for _, p, _ in kept if p["missing"]]
    return {
        "electrodes": dict(Counter(name for names, _ in lacking for name in names).most_common()),
        "interpolated": sum(done for _, done in lacking),
        "masked": sum(not done for _, done in lacking),
        "rejected": sum(q["code"] == "missing_channel" for q in quarantine),
        "rejected_for": dict(
            Counter(q["reason"] for q in quarantine if q["code"] == "missing_channel").most_common(20)
        ),
    }


def listed_keys(cache: Path) -> set[str]:
    """The keys a complete cache lists: its recordings, and what it quarantined."""
    index = json.loads((cache / "index.json").read_bytes())["recordings"]
    return {r["key"] for r in index} | {q["key"] for q in json.loads((cache / "quarantine.json").read_bytes())}


def known_labels(cache: Path) -> dict[str, list[str]]:
    """What a complete cache has to be told apart: columns of recordings and traits of people, and labels of events."""
    labels = json.loads((cache / "labels.json").read_bytes())
    named = [r["columns"] for r in labels["recordings"].values()] + [*labels["participants"].values()]
    return {"columns": sorted({name for row in named for name in row}), "event_labels": labels["vocabulary"]}


def _split_counts(kept, split_of, index, events, vocabulary, rate_hz) -> dict[str, dict]:
    counts = {}
    for split in ("train", "val", "test"):
        rows = [i for i, (s, _, _) in enumerate(kept) if split_of[s.dataset, s.subject] == split]
        subjects = {(kept[i][0].dataset, kept[i][0].subject) for i in rows}
        windows = count_windows(index, events, vocabulary, rate_hz, rows)
        counts[split] = {"recordings": len(rows), "subjects": len(subjects), "windows": windows}
    return counts


def _montage(part: dict) -> dict:
    places = [part["positions"].get(n, POSITIONS.get(n)) for n in part["names"]]
    return {"names": list(part["names"]), "positions_m": [p and [round(v, 5) for v in p] for p in places]}


def _states_seizures(source: Source) -> bool:
    return any(path.name.endswith(".csv_bi") for path in source.label_files)


def _plain(values: dict) -> dict:
    """Columns as JSON holds them: numbers and text; a missing number is left out, because absent means missing everywhere."""
    return {k: v for k, v in values.items() if not (v is None or v == "" or (isinstance(v, float) and math.isnan(v)))}


def kind_of_note(note: str) -> str:
    """Notes are counted by what they say before the first colon or figure."""
    head = note.split(":")[0]
    return "".join(c for c in head if not c.isdigit()).strip()[:80]


class Pseudonyms:
    """
    Names for subjects and files that say nothing, the same in every build, by HMAC-SHA256 with a key kept beside, not in, the cache.

    Without the key file nobody can try names; who deletes it makes the pseudonyms final.
    """

    def __init__(self, cache: Path):
        path = cache.with_name(cache.name + ".key")
        if not path.exists():
            store.write_atomic(path, os.urandom(32).hex().encode())
            path.chmod(0o600)
        self.secret = path.read_bytes()

    def name(self, text: str, prefix: str) -> str:
        """A pseudonym of `text`."""
        return f"{prefix}-{hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()[:12]}"

    def key(self, key: str) -> str:
        """A pseudonym of a recording's key, below its data set."""
        return f"{key.split('/')[0]}/{self.name(key, 'rec')}"

    def discovery(self, found: Discovery) -> Discovery:
        """
        The same sources under pseudonyms: nothing that names a person or a file goes further; ages over 89 become 90.

        Kept are the traits, what two subjects or more share, and numbers that are measured of each rather than given to each.
        """
        said: dict[tuple, set[str]] = {}
        for s in found.sources:
            for item in s.columns.items():
                said.setdefault((s.dataset, *item), set()).add(s.subject)

        def own(s: Source) -> dict[str, float | str]:
            named = {text for name in (s.subject, s.session) for text in (name, labels.number(name))}
            told = {k: v for k, v in s.columns.items() if v not in named}
            if s.spec.kind != "eeg":  # machines have no privacy
                return told
            return _capped({k: v for k, v in told.items() if _is_trait(k) or len(said[s.dataset, k, v]) > 1})

        sources = [
            replace(
                s,
                key=self.key(s.key),
                subject=self.name(f"{s.dataset}/{s.subject}", "sub"),
                session=self.name(f"{s.dataset}/{s.subject}/{s.session}", "ses") if s.session else "",
                columns=own(s),
            )
            for s in found.sources
        ]
        spoken = Counter((d, k, v) for (d, _), p in found.participants.items() for k, v in p.items())
        numbers = _numbers_given(spoken)
        participants = {
            (d, self.name(f"{d}/{s}", "sub")): _capped(
                {
                    k: v
                    for k, v in p.items()
                    if _is_trait(k) or (spoken[d, k, v] > 1 if isinstance(v, str) else (d, k) not in numbers)
                }
            )
            for (d, s), p in found.participants.items()
        }
        before = {k for p in found.participants.values() for k in p} | {k for s in found.sources for k in s.columns}
        after = {k for p in participants.values() for k in p} | {k for s in sources for k in s.columns}
        notes = [f"columns that could identify people left out: {', '.join(sorted(before - after))}"]
        rejected = [(self.key(key), path, code, "") for key, path, code, _ in found.rejected]
        return replace(
            found,
            sources=sorted(sources, key=lambda s: s.key),
            participants=participants,
            rejected=rejected,
            notes=[*found.notes, *(notes if before - after else [])],
        )

    @staticmethod
    def without_names(kept: list, parts: dict[str, dict]) -> list:
        """
        Keep only event texts and facts that stand in recordings of two subjects or more, because these can name people.

        What is dropped here is dropped from `parts` too, so that it is nowhere in a finished cache.
        """
        seen: dict[object, set] = {}
        for source, part, events in kept:
            facts = {e.label for e in events} | {e[2] for e in part["events"]} | {*part["columns"].items()}
            for fact in facts:
                seen.setdefault(fact, set()).add((source.dataset, source.subject))
        clean = []
        for source, part, events in kept:
            common = [e for e in part["events"] if len(seen[e[2]]) > 1]
            columns = part["columns"]
            if source.spec.kind == "eeg":
                columns = _capped({k: v for k, v in columns.items() if _is_trait(k) or len(seen[k, v]) > 1})
            if len(common) < len(part["events"]) or columns != part["columns"]:
                part = parts[source.key] = {**part, "events": common, "columns": columns}
            clean.append((source, part, [e for e in events if len(seen[e.label]) > 1]))
        return clean


def _is_trait(column: str) -> bool:
    return column.lower() in labels.TRAITS


def _capped(columns: dict[str, float | str]) -> dict[str, float | str]:
    """Columns with ages over 89 as 90, because the oldest are few."""
    return {k: min(v, 90.0) if k.lower() == "age" and isinstance(v, int | float) else v for k, v in columns.items()}


def _numbers_given(spoken: Counter) -> set[tuple[str, str]]:
    """
    The columns (data set, name) of whole numbers that hardly two subjects share: record numbers, dates of birth, not measurements.

    `spoken` counts the subjects of each (data set, column, value).
    """
    values: dict[tuple[str, str], dict] = {}
    for (dataset, column, value), count in spoken.items():
        if isinstance(value, int | float):
            values.setdefault((dataset, column), {})[value] = count
    return {
        column
        for column, counts in values.items()
        if all(float(v).is_integer() for v in counts)
        and 10 * sum(n == 1 for n in counts.values()) >= 9 * sum(counts.values())
    }
