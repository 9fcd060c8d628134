"""
Finds recordings below folders and says who and what each one is: BIDS, TUH/TUSZ, dataset.toml, plain folders and single files.

Only names are read here, and small text files (dataset.toml, participants tables), never a signal. The layout of a data set:

    toml     dataset.toml has a `pattern`; recordings that don't match it are never silently dropped. Without a pattern it only adds to
             the layout found (name, split, crop, values, rate, unit, channels).
    bids     dataset_description.json, or names like sub-01_task-rest_eeg.edf. events.tsv by inheritance, participants.tsv.
    tuh      names like aaaaaaac_s001_t000.edf below 01_tcp_ar … or train, dev, eval, which are the split (train, val, test).
    folder   the rest: the subject is guessed from names (`sub-01`, `subject1`, `S001`), else the folder, else the file, and a note says so.

In a folder without a pattern, .csv, .txt and other containers of anything are taken for signals unless they are named like a table about
the data (participants, subject-info, labels, README, LICENSE, requirements …) or stand beside a recording of the same name.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from lib import edf, labels
from lib.errors import Unusable
from lib.folders import Dataset, posix, walk
from lib.recordings import SUFFIXES, ReadSpec, companions, suffix
from lib.rules import FIELDS, SPLITS, Rule, nearest, read_rule

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
CONTAINERS = {".csv", ".txt", ".npy", ".npz", ".mat", ".h5", ".hdf5"}  # may hold anything, not only signals
TUH_SPLITS = {"train": "train", "dev": "val", "eval": "test"}
SPLIT_FOLDERS = {  # of data sets that come with their split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "val", "valid", "validation"), "val"),
    **dict.fromkeys(("eval", "evaluation", "test", "testing"), "test"),
}

_BIDS_NAME = re.compile(r"sub-[^_]+(_[a-z]+-[^_]+)*_(eeg|ieeg|meg)$", re.IGNORECASE)
_TUH_NAME = re.compile(r"(?P<subject>[a-z]{8}|\d{8})_(?P<session>s\d{3})_(?P<run>t\d{3})$", re.IGNORECASE)
_TUH_MONTAGE = re.compile(r"\d\d_tcp_\w+", re.IGNORECASE)
_TUH_PATHOLOGY = re.compile(r"(?:\d\d_)?(normal|abnormal|epilepsy|no_epilepsy)")  # TUAB; TUEP
_SUBJECT = re.compile(r"(?<![a-z])(?:subject|subj|sub|participant|patient|pat)[-_ ]?\d+", re.IGNORECASE)
_INITIALS = re.compile(r"^(?!p300)[sp][-_]?\d{2,}", re.IGNORECASE)
_SCORED = re.compile(r"(?P<recording>.+?)[-_ ](hypnogram|(sleep)?scoring|annotations?|stages|base)$", re.IGNORECASE)
_SEIZURES = re.compile(r"(.+[-_])?summary|seizures?[-_ ]list.*", re.IGNORECASE)  # of CHB-MIT, of Siena
_ABOUT = re.compile(
    r"(.+[-_])?(a*readme|participants?|labels?|events?|markers?|annotations?|channels?|electrodes?|coordsystem)"
    r"|subjects?([-_ ]?(info|list|data))?|demographics|phenotypes?|records|annotators|metadata|info|notes?|(sha\d*|md5)(sums?)?|checksums?"
    r"|annotations?[-_].+|clinical[-_ ]info.*|meta[-_].+|licen[cs]e|requirements|changes|authors|citation",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """One recording as found: where it is, whose it is, and what the user states about it."""

    key: str  # "<data set>/<posix path below it>": unique, never absolute
    path: Path
    dataset: str
    layout: str  # bids | tuh | toml | folder
    companions: tuple[Path, ...]  # other files the signal lives in
    # .csv_bi (also one that should be there and isn't), .csv, events.tsv, -eve.fif, EDF+ of annotations
    label_files: tuple[Path, ...]
    spec: ReadSpec
    subject: str
    session: str = ""
    task: str = ""
    run: str = ""
    columns: dict[str, str | float] = field(default_factory=dict)
    split: str | None = None  # if the source says so
    crop: tuple[float | None, float | None] | None = None  # seconds, negative from the end
    event_names: dict[str, str] = field(default_factory=dict)
    channel_table: Path | None = None  # channels.tsv of BIDS, also among the companions: what is known of its channels
    electrode_files: tuple[Path, ...] = ()  # electrodes.tsv and coordsystem.json of BIDS, likewise: where they are


@dataclass
class Discovery:
    """All that was found, in an order that depends on nothing but names."""

    sources: list[Source] = field(default_factory=list)
    participants: dict[tuple[str, str], dict[str, float | str]] = field(default_factory=dict)  # by (data set, subject)
    notes: list[str] = field(default_factory=list)  # what kind of remark, a colon, the particulars
    rejected: list[tuple[str, Path, str, str]] = field(default_factory=list)  # key, path, code, reason


def discover(
    roots: Sequence[Path | str],
    dataset_files: Sequence[Path | str] = (),
    defaults: ReadSpec = ReadSpec(),  # noqa: B008  frozen
) -> Discovery:
    """
    The recordings below `roots` (folders or files); `dataset_files` are dataset.toml files, one for all roots or one for each.

    Raises Unusable: a root that isn't there, a wrong dataset.toml, two data sets of one name, a subject in two splits, nothing found.
    """
    if len(dataset_files) not in (0, 1, len(roots)):
        raise Unusable(
            f"--dataset: {len(dataset_files)} files for {len(roots)} sources; give one for all or one for each"
        )
    rules = [read_rule(Path(p).expanduser()) for p in dataset_files]
    rules = rules * len(roots) if len(rules) == 1 else rules or [None] * len(roots)

    found = Discovery()
    datasets: dict[str, list[Dataset]] = {}
    for root, rule in _roots(roots, rules, found):
        walked = walk(root, rule)
        found.notes += walked.notes
        found.rejected += walked.rejected
        for dataset in walked.datasets.values():
            _add(datasets, dataset)
    for name in sorted(datasets):
        _understand(datasets[name], defaults, found)

    found.sources.sort(key=lambda s: s.key)
    found.rejected.sort(key=lambda r: r[0])
    for a, b in zip(found.sources, found.sources[1:], strict=False):
        if a.key == b.key:
            raise Unusable(f"{a.path} and {b.path} would both be {a.key}: give the folder above them as one source")
    if not found.sources and not found.rejected:
        remarks = "".join(f"; {note}" for note in found.notes[:3])
        raise Unusable(
            f"no recordings in {', '.join(map(str, roots))} (files of {' '.join(sorted(SUFFIXES))}){remarks}"
        )
    return found


def _roots(
    roots: Sequence[Path | str], rules: Sequence[Rule | None], found: Discovery
) -> list[tuple[Path, Rule | None]]:
    """Absolute paths with their rules, none inside another."""
    places: dict[Path, Rule | None] = {}
    for root, rule in zip(roots, rules, strict=True):
        path = Path(root).expanduser()
        if not os.path.lexists(path):
            raise Unusable(f"--source {root}: there is no such file or folder")
        path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
        if path in places:
            found.notes.append(f"source given twice: {root}")
        elif clash := next((p for p in places if p in path.parents or path in p.parents), None):
            raise Unusable(f"--source {root} and {clash} overlap: give the outer one alone")
        else:
            places[path] = rule
    return list(places.items())


def _add(datasets: dict[str, list[Dataset]], dataset: Dataset) -> None:
    """File a data set under its name; several sources are one data set if they share their folder or a --dataset file."""
    for other in datasets.setdefault(dataset.name, []):
        if other.base == dataset.base:
            other.paths += dataset.paths
            return
        if dataset.paths and other.paths and (dataset.rule is None or dataset.rule is not other.rule):
            raise Unusable(
                f"two data sets are called {dataset.name!r} ({other.base} and {dataset.base}): name one of them in a dataset.toml"
            )
    datasets[dataset.name].append(dataset)


# --- what a data set's names say --------------------------------------------------------------------------------------------------


def _understand(parts: list[Dataset], defaults: ReadSpec, found: Discovery) -> None:
    """Turn the paths of one data set (in one place, or in several under one rule) into sources and participants."""
    name, rule = parts[0].name, parts[0].rule
    spec = replace(defaults, **rule.spec) if rule else defaults
    table = Path(rule.participants.file).name.lower() if rule and rule.participants else None
    sources: list[Source] = []
    left_out: dict[str, list[str]] = {}
    for part in parts:
        layout, listings = _layout(part), _Listings()
        paths = sorted(p for p in part.paths if p.name.lower() != table)
        annotated = _annotated(paths)
        lists = [p for p in paths if _ending(p.name) == ".txt" and _SEIZURES.fullmatch(_stem(p))]
        left_out.setdefault("lists in words are not read, see Public data sets in docs/cache.md", []).extend(
            posix(p, part.base) for p in lists
        )
        paths = sorted(set(paths) - {file for files in annotated.values() for file in files} - set(lists))
        if layout != "toml":
            paths, tables = _signals_and_tables(paths, layout)
            left_out.setdefault("tables about recordings", []).extend(posix(p, part.base) for p in tables)
        understood: dict[str, tuple[Path, dict[str, str]]] = {}
        for path in paths:
            relative = posix(path, part.base)
            facts = _facts(layout, relative, part)
            if isinstance(facts, dict):
                understood[relative] = path, facts
            elif _ending(path.name) in CONTAINERS:
                left_out.setdefault(facts[0], []).append(relative)
            else:
                found.rejected.append((f"{name}/{relative}", path, *facts))
        found.notes += _guess_subjects({relative: facts for relative, (_, facts) in understood.items()}, name)
        for relative, (path, facts) in understood.items():
            source = _source(f"{name}/{relative}", path, layout, part, spec, facts, listings)
            sources.append(replace(source, label_files=(*source.label_files, *annotated.get(path, ()))))
    if rule and rule.pattern and not sources and (paths := [posix(p, part.base) for part in parts for p in part.paths]):
        raise Unusable(
            f"{rule.path}: pattern {rule.pattern.pattern!r} matches none of {len(paths)} recordings, e.g. {paths[0]}"
        )
    found.notes += [
        f"{code}, left out: {len(names)} in {name}, e.g. {names[0]}" for code, names in left_out.items() if names
    ]
    sources = _number_columns(_expect_labels(sources))
    if not (rule and rule.split):
        sources, notes = _split_by_folder(sources, name)
        found.notes += notes
    if rule:
        sources = _apply_rule(rule, sources, all(part.whole for part in parts), found)
    _check_splits(sources)
    subjects = {s.subject for s in sources}
    found.notes += _alike(subjects, name)
    _read_participants(parts, subjects, found)
    found.sources += sources


def _layout(part: Dataset) -> str:
    if part.rule and part.rule.pattern:
        return "toml"
    if part.described or any(_BIDS_NAME.match(_stem(p)) for p in part.paths):
        return "bids"
    for path in part.paths:
        places = _places(path)
        if _TUH_NAME.match(_stem(path)) and (TUH_SPLITS.keys() & places or any(map(_TUH_MONTAGE.fullmatch, places))):
            return "tuh"
    return "folder"


@lru_cache(1 << 16)
def _ending(name: str) -> str:
    return suffix(name)


def _stem(path: Path) -> str:
    ending = _ending(path.name)
    return path.name[: -len(ending)] if ending in SUFFIXES else path.stem


def _places(path: Path) -> list[str]:
    """The names of the five folders above a file, in lower case: split, montage, group, patient and session, in TUH's various orders."""
    return [folder.lower() for folder in path.parts[-6:-1]]


def _signals_and_tables(paths: list[Path], layout: str) -> tuple[list[Path], list[Path]]:
    """Recordings, and tables about them: known by name, or by standing beside a recording of the same name; all tables of TUH are."""
    stems = {(p.parent, _stem(p)) for p in paths if _ending(p.name) not in CONTAINERS}
    tables = [
        p
        for p in paths
        if _ending(p.name) in CONTAINERS
        and (layout == "tuh" or _ABOUT.fullmatch(_stem(p)) or (p.parent, _stem(p)) in stems)
    ]
    return sorted(set(paths) - set(tables)), tables


def _annotated(paths: list[Path]) -> dict[Path, list[Path]]:
    """
    Files that hold nothing but annotations, such as a hypnogram, by the recording in the same folder that they are named after.

    SN001_sleepscoring.edf is of SN001.edf; Sleep-EDF's SC4001EC-Hypnogram.edf, whose last letter says who scored it, of SC4001E0-PSG.edf.
    """
    edfs = [p for p in paths if _ending(p.name) in (".edf", ".bdf")]
    scored = {p: found["recording"] for p in edfs if (found := _SCORED.match(_stem(p)))}
    annotated: dict[Path, list[Path]] = {}
    recordings: dict[tuple[Path, str], list[Path]] = {}
    for path in edfs if scored else ():
        bare = _bare(path)
        for name in {bare, re.sub(r"\d$", "?", bare)} if path not in scored else ():
            recordings.setdefault((path.parent, name), []).append(path)
    for path, bare in scored.items():
        names = (bare, re.sub(r"[a-z]$", "?", bare, flags=re.IGNORECASE))
        of = next((found for name in names if (found := recordings.get((path.parent, name)))), [])
        if len(of) == 1 and edf.holds_only_annotations(path):
            annotated.setdefault(of[0], []).append(path)
    return annotated


def _facts(layout: str, relative: str, part: Dataset) -> dict[str, str] | tuple[str, str]:
    """What the path of a recording says, by field or column, or the code and reason why it can't be one."""
    *folders, file = relative.split("/")
    stem = _stem(Path(file))
    if layout == "toml":
        facts = part.rule.match(relative)
        if facts is None:
            return "no_pattern_match", f"the pattern of {part.rule.path.name} doesn't match"
    elif layout == "bids" and (part.described or _BIDS_NAME.match(stem)):
        if not _BIDS_NAME.match(stem):
            return "not_bids", f"{file} isn't named sub-…_eeg"
        named = _entities(stem)
        above = {k: v for folder in folders for k, v in _entities(folder).items() if k in ("sub", "ses")}
        if wrong := next((k for k in above if named.get(k, above[k]) != above[k]), None):
            return "name_conflict", f"the folder says {wrong}-{above[wrong]}, the file {wrong}-{named[wrong]}"
        facts = above | named
        facts = {{"sub": "subject", "ses": "session"}.get(k, k): v for k, v in facts.items()}
    elif layout == "tuh" and (named := _TUH_NAME.match(stem)):
        places = _places(part.base / relative)
        told = {
            "montage": next(filter(_TUH_MONTAGE.fullmatch, places), None),
            "pathology": next((m[1] for m in map(_TUH_PATHOLOGY.fullmatch, places) if m), None),
            "split": next((p for p in reversed(places) if p in TUH_SPLITS), None),
        }
        facts = named.groupdict() | {k: v for k, v in told.items() if v}
    else:
        entities = _entities(stem)
        facts = {
            ours: entities[k] for k, ours in (("ses", "session"), ("task", "task"), ("run", "run")) if k in entities
        }
    if part.rule:
        facts = {column: part.rule.rename(column, value) for column, value in facts.items()}
    return facts


def _entities(name: str) -> dict[str, str]:
    """The key-value pairs of a BIDS name."""
    pairs = (part.partition("-") for part in name.split("_"))
    return {key.lower(): value for key, mark, value in pairs if mark and value and key.isalpha()}


def _guess_subjects(recordings: dict[str, dict[str, str]], dataset: str) -> list[str]:
    """
    Add a subject where a path (with its facts) says none, and say in notes by what: the deepest name like a subject's, else the folder,
    else the file. Initials such as S001 count only if all of them have some: Bonn's S001.txt is the first of a set.
    """
    guessed: Counter[str] = Counter()
    names = {
        path: [_stem(Path(path)), *path.split("/")[-2::-1]]
        for path, facts in recordings.items()
        if not facts.get("subject")
    }
    initials = all(any(map(_INITIALS.search, parts)) for parts in names.values())
    for path, parts in names.items():
        for how, subjects in (
            ("names like sub-01", (_entities(part).get("sub") for part in parts)),
            ("names like subject1", (m and m[0] for m in map(_SUBJECT.search, parts))),
            ("names like S001", (m and m[0] for m in map(_INITIALS.search, parts if initials else ()))),
            ("the folder", parts[1:2]),
            ("the file name", parts[:1]),
        ):
            if subject := next(filter(None, subjects), None):
                recordings[path]["subject"] = subject
                guessed[how] += 1
                break
    return [
        f"subjects guessed from {how}: {count} recordings of {dataset}; state a `pattern` in dataset.toml to be sure"
        for how, count in sorted(guessed.items())
    ]


def _source(
    key: str, path: Path, layout: str, part: Dataset, spec: ReadSpec, facts: dict[str, str], listings: "_Listings"
) -> Source:
    try:
        beside = companions(path)
    except OSError:  # what is wrong with it, reading will say
        beside = ()
    split = TUH_SPLITS.get(facts.pop("split", "")) if layout == "tuh" else None
    known = {name: facts.pop(name, "") for name in FIELDS}
    labelled = _label_files(path, layout, part.base, listings)
    table = _nearest_table(path, layout, part.base, listings, "channels")
    places = _electrode_files(path, layout, part.base, listings)
    beside = (*beside, *([table] if table else []), *places)
    source = Source(key, path, part.name, layout, beside, labelled, spec, **known, columns=facts, split=split)
    return replace(source, channel_table=table, electrode_files=places)


class _Listings:
    """The names in a folder, read once, found whatever their case; and of its tables of one kind the entities."""

    def __init__(self):
        self._names: dict[Path, dict[str, str]] = {}  # as it is, and in lower case → as it is
        self._tables: dict[tuple[Path, str], list[tuple[dict[str, str], Path]]] = {}

    def names(self, folder: Path) -> dict[str, str]:
        if folder not in self._names:
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                names = []
            self._names[folder] = {n.lower(): n for n in names} | {n: n for n in names}
        return self._names[folder]

    def file(self, folder: Path, name: str) -> Path | None:
        names = self.names(folder)
        actual = names.get(name) or names.get(name.lower())
        return folder / actual if actual else None

    def tables(self, folder: Path, kind: str) -> list[tuple[dict[str, str], Path]]:
        """The folder's `…_<kind>.tsv` (events, channels, electrodes; coordsystem is .json), each with the entities of its name."""
        if (folder, kind) not in self._tables:
            ending = f"{kind}.json" if kind == "coordsystem" else f"{kind}.tsv"
            named = {
                n
                for n in self.names(folder).values()
                if re.search(rf"(^|_){re.escape(ending)}$", n, re.IGNORECASE) and n[0] != "."
            }
            found = [(_entities(n[: -len(ending)].rstrip("_")), folder / n) for n in sorted(named)]
            for entities, _ in found:
                entities.pop("space", None)  # which no recording has
            self._tables[folder, kind] = found
        return self._tables[folder, kind]


def _bare(path: Path) -> str:
    """The name of a recording without what only says that it is one."""
    return re.sub(r"[-_ ](raw|eeg|meg|ieeg|psg)$", "", _stem(path), flags=re.IGNORECASE)


def _nearest_table(path: Path, layout: str, base: Path, listings: _Listings, kind: str) -> Path | None:
    """A recording's `…_<kind>.tsv`: beside it by name, in BIDS by inheritance (the nearest folder, then the most entities, wins)."""
    if layout != "bids":
        return listings.file(path.parent, f"{_bare(path)}_{kind}.tsv")
    entities, folder = _entities(_stem(path)), path.parent
    while True:
        fitting = [(len(e), f) for e, f in listings.tables(folder, kind) if e.items() <= entities.items()]
        if fitting:
            return max(fitting, key=lambda item: (item[0], item[1].name))[1]
        if folder == base or folder == folder.parent:
            return None
        folder = folder.parent


def _electrode_files(path: Path, layout: str, base: Path, listings: _Listings) -> tuple[Path, ...]:
    """A recording's electrodes.tsv, and the coordsystem.json that says what its numbers mean."""
    table = _nearest_table(path, layout, base, listings, "electrodes")
    if table is None:
        return ()
    of_its_space = listings.file(table.parent, f"{table.name[: -len('electrodes.tsv')]}coordsystem.json")
    system = of_its_space or (_nearest_table(path, layout, base, listings, "coordsystem") if layout == "bids" else None)
    return (table, system) if system else (table,)


def _label_files(path: Path, layout: str, base: Path, listings: _Listings) -> tuple[Path, ...]:
    """The text and event files that label a recording."""
    stem, bare = _stem(path), _bare(path)
    names = [
        f"{stem}.csv_bi",
        *([f"{stem}.csv"] if layout == "tuh" or listings.file(path.parent, f"{stem}.csv_bi") else []),
    ]
    names += [f"{bare}{ending}" for ending in ("-eve.fif", "_eve.fif", "-eve.fif.gz", ".eve")]
    names += [] if layout == "bids" else [f"{stem}_events.tsv", f"{bare}_events.tsv"]
    files = [file for name in dict.fromkeys(names) if (file := listings.file(path.parent, name)) and file != path]
    if layout == "bids" and (table := _nearest_table(path, layout, base, listings, "events")):
        files.append(table)
    return tuple(files)


def _expect_labels(sources: list[Source]) -> list[Source]:
    """Where recordings of a data set (in BIDS: of a task) have .csv_bi files, one without any labels lacks its own: it is not background."""

    def has(source: Source, ending: str) -> bool:
        return any(f.name.lower().endswith(ending) for f in source.label_files)

    def kind(source: Source) -> str:
        return source.task if source.layout == "bids" else ""

    labelled = {kind(s) for s in sources if has(s, ".csv_bi")}
    return [
        s
        if kind(s) not in labelled or has(s, ".csv_bi") or has(s, "_events.tsv")
        else replace(s, label_files=(s.path.with_name(f"{_stem(s.path)}.csv_bi"), *s.label_files))
        for s in sources
    ]


def _split_by_folder(sources: list[Source], dataset: str) -> tuple[list[Source], list[str]]:
    """The split that folders called train and test (eval, dev …) make, and notes; none where a subject is in two: those are other parts."""
    named = {
        s.key: next((SPLIT_FOLDERS[f] for f in reversed(s.key.lower().split("/")[1:-1]) if f in SPLIT_FOLDERS), None)
        for s in sources
        if s.layout in ("folder", "toml")
    }
    given = set(named.values()) - {None}
    if "train" not in given or len(given) < 2:
        return sources, []
    splits: dict[str, set] = {}
    for s in sources:
        splits.setdefault(s.subject, set()).add(named[s.key])
    if shared := sorted(subject for subject, of in splits.items() if len(of) > 1):
        listed = f"{len(shared)} of {len(splits)} subjects are in several, e.g. {shared[0]}"
        return sources, [f"folders named like splits are not taken for the split: {listed} ({dataset})"]
    counts = ", ".join(f"{count} {split}" for split, count in sorted(Counter(filter(None, named.values())).items()))
    return [replace(s, split=named[s.key]) for s in sources], [f"split by folders: {counts} ({dataset})"]


def _number_columns(sources: list[Source]) -> list[Source]:
    """Columns whose every value is a number as numbers."""
    words = {k for s in sources for k, v in s.columns.items() if labels.number(v) is None}
    return [
        replace(s, columns={k: v if k in words else labels.number(v) for k, v in s.columns.items()}) for s in sources
    ]


def _apply_rule(rule: Rule, sources: list[Source], whole: bool, found: Discovery) -> list[Source]:
    """What dataset.toml states about single recordings: split, crop, rate and the names of events. Raises Unusable."""
    values = [{**{f: getattr(s, f) for f in FIELDS}, **s.columns} for s in sources]
    dealt = [_as_written(v[rule.split_by]) if v.get(rule.split_by) is not None else "" for v in values]
    unknown = [s for s in rule.split if s not in dealt]
    if unknown and whole:
        raise Unusable(
            f"{rule.path}: [split] names {rule.split_by} {unknown[0]!r}, which isn't there; did you mean {nearest(unknown[0], sorted(set(dealt)), 3)}?"
        )
    if set(rule.split.values()) == set(SPLITS) and (left := sorted(set(dealt) - set(rule.split) - {""})):
        raise Unusable(
            f"{rule.path}: [split] states train, val and test, but leaves out {rule.split_by} {left[0]!r}"
            + f" and {len(left) - 1} more" * (len(left) > 1)
        )

    used: set[tuple[str, str, str]] = set()

    def stated(key: str, table: dict[str, dict], own: dict, source: Source):
        """What a table says of a recording by the values of its columns, or None."""
        hits = [(c, str(v)) for c in table if (v := _as_written(own.get(c))) in table[c]]
        if len(hits) > 1:
            raise Unusable(
                f"{rule.path}: [{key}] says two things about {source.key}: {hits[0][0]}.{hits[0][1]} and {hits[1][0]}.{hits[1][1]}"
            )
        used.update((key, *hit) for hit in hits)
        return table[hits[0][0]][hits[0][1]] if hits else None

    changed = []
    for source, own, value in zip(sources, values, dealt, strict=True):
        rate_hz = stated("rates", rule.rates_hz, own, source)
        changed.append(
            replace(
                source,
                crop=stated("crop", rule.crop, own, source),
                spec=source.spec if rate_hz is None else replace(source.spec, rate_hz=rate_hz),
                split=rule.split.get(value, source.split),
                event_names=rule.values.get("event", {}),
            )
        )
    for key, table in (("crop", rule.crop), ("rates", rule.rates_hz)):
        for column, value in ((c, v) for c in table for v in table[c] if (key, c, v) not in used):
            found.notes.append(f"{key} without a recording: {rule.path.name}: no recording has {column} = {value}")
    return changed


def _as_written(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_splits(sources: list[Source]) -> None:
    splits: dict[str, str] = {}
    for s in sources:
        if s.split and splits.setdefault(s.subject, s.split) != s.split:
            raise Unusable(
                f"subject {s.subject!r} of {s.dataset} is both in {splits[s.subject]} and {s.split} ({s.path}): "
                "a subject has one split; move its files or state [split] in a dataset.toml"
            )


def _alike(subjects: set[str], dataset: str) -> list[str]:
    """A note where subjects differ in case or leading zeros alone: if they are one person, this one may be in two splits."""
    folded: dict[str, list[str]] = {}
    for subject in sorted(subjects):
        folded.setdefault(re.sub(r"(?<!\d)0+(?=\d)", "", subject.casefold()), []).append(subject)
    groups = [" and ".join(group) for group in folded.values() if len(group) > 1]
    mend = "if they are one, rename them under [values.subject] of a dataset.toml"
    return [f"subjects that may be one person: {'; '.join(groups[:3])} of {dataset}; {mend}"] if groups else []


def _read_participants(parts: list[Dataset], subjects: set[str], found: Discovery) -> None:
    """Participants tables; one that is missing or lacks a subject costs targets, never a recording, unless dataset.toml names it."""
    folded = {s.casefold(): s for s in subjects} if len({s.casefold() for s in subjects}) == len(subjects) else {}
    tables, known = [], set()
    for part in parts:
        path, table = _participants(part, found)
        tables += [path] if path and path not in tables else []
        for id_, traits in table.items():
            id_ = part.rule.rename("subject", id_) if part.rule else id_
            subject = id_ if id_ in subjects else folded.get(id_.casefold())
            if subject is not None:
                known.add(subject)
                found.participants.setdefault((part.name, subject), {}).update(traits)
    if tables and (absent := sorted(subjects - known)):
        found.notes.append(
            f"subjects without a row in {tables[0].name}: {len(absent)}, e.g. {absent[0]}; their targets are missing"
        )


def _participants(part: Dataset, found: Discovery) -> tuple[Path | None, dict[str, dict[str, float | str]]]:
    """The participants table of a data set, if there is one, and what it says of each subject."""
    rule = part.rule
    if rule and (stated := rule.participants):
        path = next((p for p in (part.base / stated.file, rule.path.parent / stated.file) if p.is_file()), None)
        if path is None:
            raise Unusable(
                f"{rule.path}: participants.file {stated.file!r} is neither in {part.base} nor beside the dataset.toml"
            )
        try:
            table, notes = labels.read_participants(path, stated.id, stated.id_pattern, stated.columns, rule.values)
        except Unusable as error:
            raise Unusable(f"{rule.path}: [participants] {error}") from error
    else:
        listings = _Listings()
        path = listings.file(part.base, "participants.tsv") or listings.file(part.base, "participants.csv")
        try:
            table, notes = labels.read_participants(path, renames=rule.values if rule else None) if path else ({}, [])
        except Unusable as error:
            table, notes = {}, [f"participants table not read: {error}"]
    found.notes += notes
    return path, table


# --- splits -----------------------------------------------------------------------------------------------------------------------


def assign_splits(subjects: Iterable[tuple[str, str]], given: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    """
    A split for every (data set, subject): the given one, else by a hash of both, 70 : 15 : 15, independent of all other subjects.

    Within a data set, a split that is given to anyone is closed: the others are dealt to the remaining ones in their proportions. If that
    leaves one of those empty although there are subjects enough, it gets the subject whose hash is nearest to its range, so small cohorts
    can be evaluated. With fewer subjects than open splits all of them are train.
    """
    result: dict[tuple[str, str], str] = {}
    by_dataset: dict[str, list[tuple[str, str]]] = {}
    for subject in sorted(set(subjects)):
        by_dataset.setdefault(subject[0], []).append(subject)
    for members in by_dataset.values():
        closed = {given[m] for m in members if m in given}
        result |= {m: given[m] for m in members if m in given}
        result |= _deal([m for m in members if m not in given], [s for s in SPLITS if s not in closed] or ["train"])
    return result


def _deal(members: list[tuple[str, str]], splits: list[str]) -> dict[tuple[str, str], str]:
    if len(members) < len(splits):
        return dict.fromkeys(members, "train" if "train" in splits else splits[0])
    total, edge, ranges = sum(SHARES[s] for s in splits), 0.0, {}
    for split in splits:
        ranges[split] = (edge, edge := edge + SHARES[split] / total)
    place = {m: int.from_bytes(hashlib.sha256("/".join(m).encode()).digest()[:8], "big") / 2**64 for m in members}
    dealt = {m: next((s for s in splits if u < ranges[s][1]), splits[-1]) for m, u in place.items()}
    for split in splits:
        if split not in dealt.values():
            low, high = ranges[split]
            counts = Counter(dealt.values())
            spare = [m for m in members if counts[dealt[m]] > 1]
            dealt[min(spare, key=lambda m: (max(low - place[m], place[m] - high), m))] = split
    return dealt
