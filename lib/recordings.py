"""
Opens any recording: what a file holds (channels, rate, segments, events, electrode positions), and its signal in microvolts.

Nothing doubtful is guessed: a file that can't be trusted raises Rejected with the code it is quarantined under. EDF and BDF
are read by lib/edf.py, EEGLAB by lib/eeglab.py, tables and archives by lib/tables.py, LSL sessions by lib/xdf.py; FIF, EGI
MFF, rarer formats and, after the checks of lib/brainvision.py, BrainVision go through MNE, which no other module imports.

Shapes: C channels, T samples.
"""

import math
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np

from lib import channels, edf
from lib.errors import Rejected
from lib.statements import ARBITRARY, settle_rate, settle_unit


@dataclass(frozen=True)
class Segment:
    """Uninterrupted samples [start, stop) of the concatenated signal (first EEG channel); onset in recording time."""

    start: int
    stop: int
    onset_s: float


@dataclass(frozen=True)
class Event:
    """Something that happened, in recording time: seconds from the first sample, gaps included."""

    onset_s: float
    duration_s: float
    label: str
    value: float = math.nan


@dataclass(frozen=True)
class ReadSpec:
    """What the user states about files that don't say it themselves."""

    rate_hz: float | None = None
    unit: str | None = None
    channels: tuple[str, ...] | None = None
    kind: str = "eeg"  # eeg | vibration
    renames: tuple[tuple[str, str], ...] = ()  # of channels: as in the file, as it should be called


@dataclass
class Recording:
    """One opened recording; the signal stays on disk until `read`."""

    path: Path
    names: list[str]  # as in the file
    kinds: list[str]  # per channel: eeg, eog, ecg, emg, stim, misc, unknown or vibration
    rates_hz: list[float]
    unit: str  # uV; a.u. where that is stated; for vibration whatever is stated
    samples: int
    segments: list[Segment]
    take: Callable[[list[int]], np.ndarray]  # channel indices -> x_CT in `unit`
    events: list[Event] = field(default_factory=list)
    positions: dict[str, tuple] = field(
        default_factory=dict
    )  # (x, y, z) metres, head frame; only what the file carries
    notes: list[str] = field(default_factory=list)
    columns: dict[str, float | str] = field(default_factory=dict)  # facts about the whole recording, such as rpm
    first_sample: int = 0  # what event files of this recording count from (FIF)
    marked_bad: set[str] = field(default_factory=set)  # of `names`: whoever recorded or curated it says so

    def read(self, indices) -> np.ndarray:
        """The channels `indices`, which must share one rate, as x_CT float32 in `unit`, NaN kept. Raises Rejected."""
        indices = [int(i) for i in indices]
        rates = {self.rates_hz[i] for i in indices}
        assert len(rates) == 1, f"{self.path.name}: channels {indices} don't share one rate: {sorted(rates)}"
        x_CT = _guarded(lambda: self.take(indices))
        return np.ascontiguousarray(x_CT, np.float32)


def open_recording(path, spec: ReadSpec = ReadSpec()) -> Recording:
    """Opens a recording of any format of SUFFIXES, reading headers only where the format allows. Raises Rejected."""
    path = Path(path)
    if suffix(path) not in SUFFIXES:
        raise Rejected("unsupported", f"{path.name}: no reader for this kind of file")
    _check_present(path)
    module, function = SUFFIXES[suffix(path)]
    reader = getattr(import_module(f"lib.{module}"), function)
    recording = _guarded(lambda: reader(path, spec))
    _rename(recording, dict(spec.renames))
    return recording


def _rename(recording: Recording, renames: dict[str, str]) -> None:
    """Calls channels what the user calls them, which also says what they record; those that aren't there are noted."""
    absent = renames.keys() - {name.strip() for name in recording.names}
    if absent:
        recording.notes.append(f"channels to rename are not there: {', '.join(sorted(absent))}")
    for i, name in enumerate(recording.names):
        ours = renames.get(name.strip())
        if ours is None:
            continue
        recording.names[i] = ours
        if recording.kinds[i] == channels.kind(name):  # known by the name alone
            recording.kinds[i] = channels.kind(ours)
        if name in recording.positions:
            recording.positions[ours] = recording.positions.pop(name)
        if name in recording.marked_bad:
            recording.marked_bad = recording.marked_bad - {name} | {ours}


def _guarded(read: Callable):
    """Calls a reader; whatever it raises on a damaged file comes out as Rejected, whatever it prints goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):  # stdout belongs to the command's result
            return read()
    except (Rejected, MemoryError):  # memory is the machine's fault, not the file's: the builder tries again
        raise
    except PermissionError as error:
        raise Rejected("unreadable", str(error)) from error
    except Exception as error:  # third-party readers raise anything at all on damaged files
        lines = str(error).strip().splitlines() or ["(no message)"]
        raise Rejected("reader_failed", f"{type(error).__name__}: {lines[0]}") from error


def _check_present(path: Path) -> None:
    """Refuses what isn't there, is empty, or only points to a file that was never fetched."""
    try:
        if path.is_dir():
            return
        with path.open("rb") as file:
            head = file.read(200)
    except OSError as error:
        if path.is_symlink() and "annex/objects/" in path.readlink().as_posix():
            raise Rejected("annex_pointer", f"{path.name} is a git-annex link: fetch the recording") from error
        raise Rejected("unreadable", f"{path.name}: {error.strerror}") from error
    if not head:
        raise Rejected("empty", f"{path.name} has no bytes")
    if head.startswith(b"version https://git-lfs") or b"annex/objects/" in head:
        raise Rejected("annex_pointer", f"{path.name} is only a pointer of git-annex or git-lfs: fetch the recording")


# segments and events


def onset_of(segments: list[Segment], rate_hz: float, sample: int) -> float:
    """Recording time, in seconds, of a sample of the concatenated signal."""
    segment = next(s for s in reversed(segments) if s.start <= sample or s is segments[0])
    return segment.onset_s + (sample - segment.start) / rate_hz


def code_events(codes_T: np.ndarray, rate_hz: float, segments: list[Segment]) -> list[Event]:
    """
    Events of a trigger or marker channel: one at every change to a code other than 0, as long as the code stays.

    None at all for a channel that changes all the time: that is a signal, whatever it is called.
    """
    codes_T = np.nan_to_num(np.asarray(codes_T, np.float64))
    changes = np.flatnonzero(np.diff(codes_T, prepend=0.0))
    if len(changes) > max(10, len(codes_T) / 10):
        return []
    stops = np.append(changes, len(codes_T))[1:]
    return [
        Event(onset_of(segments, rate_hz, i), (stop - i) / rate_hz, code_label(codes_T[i]), float(codes_T[i]))
        for i, stop in zip(changes.tolist(), stops.tolist(), strict=True)
        if codes_T[i] != 0
    ]


def code_label(code: float) -> str:
    return str(int(code)) if float(code).is_integer() else str(float(code))


def cut(samples: int, rate_hz: float, breaks, skips=()) -> list[Segment]:
    """Segments of a signal that is broken before each sample of `breaks` and void in [start, stop) of each of `skips`."""
    edges = sorted({0, samples, *breaks, *(edge for skip in skips for edge in skip)})
    edges = [e for e in edges if 0 <= e <= samples]
    pieces = [(a, b) for a, b in pairwise(edges) if not any(start <= a and b <= stop for start, stop in skips)]
    return [Segment(a, b, a / rate_hz) for a, b in pieces]


# EDF, BDF


def open_edf(path: Path, spec: ReadSpec) -> Recording:
    header = edf.read_header(path)
    names = [s.label for s in header.signals]
    # a channel without a scale is as good as missing: as `misc` it is never taken for EEG
    kinds = [channels.kind(s.label) if s.usable else "misc" for s in header.signals]
    main = header.signals[_first_signal(kinds)]
    settle_rate(main.rate_hz, spec.rate_hz, path.name)
    if spec.unit not in (None, ARBITRARY) and spec.kind == "eeg":
        for signal in header.signals:
            signal.to_uv = signal.to_uv or settle_unit(signal.dimension, spec.unit, path.name)[1]
    ranges, annotations = edf.read_annotations(header)

    def segments_of(signal: edf.Signal) -> list[Segment]:
        N = signal.samples_per_record
        return [Segment(first * N, stop * N, onset_s) for first, stop, onset_s in ranges]

    events = [Event(*annotation) for annotation in annotations]
    for i, signal in enumerate(header.signals):
        if kinds[i] == "stim" and "PHOTIC" not in signal.label.upper():  # TUH's is analog, and in every file
            codes_T = np.rint(edf.read_signals(header, [i], volts=False)[0])
            if header.format == "bdf":  # 16 trigger bits below 8 of the amplifier's own
                codes_T = codes_T.astype(np.int64) & 0xFFFF
                if (
                    codes_T.all()
                ):  # unused lines read as ones, so that the lines never rest at 0 but at what they start with
                    codes_T[codes_T == codes_T[0]] = 0
            events += code_events(codes_T, signal.rate_hz, segments_of(signal))
    return Recording(
        path=path,
        names=names,
        kinds=kinds,
        rates_hz=[s.rate_hz for s in header.signals],
        unit=ARBITRARY if spec.unit == ARBITRARY else "uV",
        samples=header.records * main.samples_per_record,
        segments=segments_of(main),
        take=lambda indices: edf.read_signals(header, indices, volts=spec.unit != ARBITRARY),
        events=sorted(events, key=lambda e: e.onset_s),
        notes=header.notes,
    )


def _first_signal(kinds: list[str]) -> int:
    """The channel that time is counted by: the first EEG channel or, without one, the first that may be one."""
    return next((kinds.index(kind) for kind in ("eeg", "unknown", "vibration") if kind in kinds), 0)


# through MNE: FIF, BrainVision, EGI MFF and rarer ones. MNE is imported where it is used: it takes 1.3 s, which EDF need not pay

_BREAKS = (
    "boundary",
    "bad boundary",
    "edge boundary",
    "bad_acq_skip",
    "new segment",
)  # the signal is not continuous there
_CHATTER = re.compile(r"naming conventions|highpass|lowpass|software filter|measurement date")
_DAMAGE = re.compile(r"truncat|incomplete|corrupt|unexpected end|fewer samples|could not read", re.IGNORECASE)
_FIFF_UNIT_V = 107
ELECTRIC = ("eeg", "eog", "ecg", "emg", "unknown")  # kinds of channels that MNE gives in volts


def open_mne(path: Path, spec: ReadSpec, typed: bool = False, shown: Path | None = None, **options) -> Recording:
    """
    Opens through MNE. `typed`: the format says itself which channels are EEG; otherwise their names decide.
    `shown` is the file to speak of, where `path` is a mended copy of its header.
    """
    shown = shown or path
    raw, notes = _open_raw(path, shown, options)
    rate_hz = settle_rate(float(raw.info["sfreq"]), spec.rate_hz, shown.name)
    names, samples = list(raw.ch_names), int(raw.n_times)
    kinds = []
    for ch, declared in zip(raw.info["chs"], raw.get_channel_types(), strict=True):
        kind = channels.kind(ch["ch_name"]) if declared == "eeg" and not typed else declared
        electric = kind in ELECTRIC and int(ch["unit"]) == _FIFF_UNIT_V
        kinds.append(kind if electric or kind == "stim" else "misc")

    segments, events = _annotations(raw, rate_hz)
    if shown.suffix.lower() != ".mff":  # there, annotations say it too
        triggers = [i for i, kind in enumerate(kinds) if kind == "stim"]
        composite = [
            i for i in triggers if names[i] in ("STI101", "STI 014")
        ]  # the other trigger channels are its bits
        for i in composite[:1] or triggers:
            events += code_events(raw.get_data([i], verbose="ERROR")[0], rate_hz, segments)

    def take(indices: list[int]) -> np.ndarray:
        x_CT = np.empty((len(indices), samples), np.float32)
        block = max(1, (1 << 23) // len(names))  # 64 MB as float64 of all channels, which most readers decode together
        factor_C = np.array([1e6 if kinds[i] in ELECTRIC and spec.unit != ARBITRARY else 1.0 for i in indices])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for start in range(0, samples, block):
                stop = min(start + block, samples)
                x_CT[:, start:stop] = raw.get_data(indices, start, stop, verbose="ERROR") * factor_C[:, None]
        return x_CT

    placed = [i for i, kind in enumerate(kinds) if kind in ("eeg", "unknown")]
    return Recording(
        path=shown,
        names=names,
        kinds=kinds,
        rates_hz=[rate_hz] * len(names),
        unit=ARBITRARY if spec.unit == ARBITRARY else "uV",
        samples=samples,
        segments=segments,
        take=take,
        events=sorted(events, key=lambda e: e.onset_s),
        positions=plausible_positions({names[i]: raw.info["chs"][i]["loc"][:3] for i in placed}, notes),
        notes=notes,
        first_sample=int(raw.first_samp),
        marked_bad=set(raw.info["bads"]),
    )


def open_fif(path: Path, spec: ReadSpec) -> Recording:
    return open_mne(path, spec, typed=True, allow_maxshield="yes")


def open_mff(path: Path, spec: ReadSpec) -> Recording:
    import defusedxml.ElementTree  # noqa: F401  MNE up to 1.11 uses it without importing it

    return open_mne(path, spec, typed=True, events_as_annotations=True)


def _open_raw(path: Path, shown: Path, options: dict) -> tuple:
    """(MNE's Raw without its data, what it warned of). Raises Rejected: `truncated`."""
    import mne

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raw = mne.io.read_raw(path, preload=False, verbose="WARNING", **options)
        layout = shown.with_suffix(".elc")
        if layout.exists():
            montage = mne.channels.read_custom_montage(layout, head_size=None)
            raw.set_montage(montage, on_missing="ignore", verbose="WARNING")
    notes = [" ".join(str(w.message).split()) for w in caught if issubclass(w.category, RuntimeWarning)]
    damage = next((note for note in notes if _DAMAGE.search(note)), None)
    if damage:
        raise Rejected("truncated", f"{shown.name}: {damage}")
    return raw, [note for note in notes if not _CHATTER.search(note)]


def _annotations(raw, rate_hz: float) -> tuple[list[Segment], list[Event]]:
    """Segments between the annotations that mark a break, and the others as events."""
    breaks, skips, events = [], [], []
    for annotation in raw.annotations:
        onset_s, duration_s = float(annotation["onset"]) - raw.first_time, float(annotation["duration"])
        duration_s *= duration_s > 1.5 / rate_hz  # a BrainVision marker of one sample is an instant
        text = str(annotation["description"]).strip()
        if text.lower().startswith(_BREAKS):
            breaks.append(round(onset_s * rate_hz))
            if text.lower() == "bad_acq_skip":  # filled up with zeros
                skips.append((breaks[-1], round((onset_s + duration_s) * rate_hz)))
        else:
            events.append(Event(onset_s, duration_s, text))
    return cut(int(raw.n_times), rate_hz, breaks, skips), events


def plausible_positions(positions: dict, notes: list[str]) -> dict[str, tuple[float, float, float]]:
    """Electrode positions in metres without unset ones; none at all where they are not the size of a head."""
    known = {name: xyz for name, xyz in positions.items() if np.isfinite(xyz).all() and np.any(xyz)}
    if known and not 0.04 < np.median([np.linalg.norm(xyz) for xyz in known.values()]) < 0.2:
        notes.append("electrode positions ignored: not the size of a head")
        return {}
    return {name: tuple(float(v) for v in xyz) for name, xyz in known.items()}


def read_event_file(path, rate_hz: float, first_sample: int = 0) -> list[Event]:
    """Events of an MNE event file (`-eve.fif`, `.eve`), which counts from `Recording.first_sample`. Raises Rejected."""

    def read() -> list[Event]:
        import mne

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's name
            rows = mne.read_events(path, verbose="ERROR").tolist()
        return [
            Event((sample - first_sample) / rate_hz, 0.0, str(code), float(code)) for sample, _, code in rows if code
        ]

    return _guarded(read)


def mne_filter_resample(x_CT: np.ndarray, rate_hz: float, out_hz: float, band_hz, notch_hz) -> np.ndarray:
    """What lib/filters.py is measured against: MNE's default notch, band-pass and resampling, in float64."""
    import mne

    y_CT = x_CT.astype(np.float64)
    if notch_hz:
        y_CT = mne.filter.notch_filter(y_CT, rate_hz, [f for f in notch_hz if f < rate_hz / 2], verbose="ERROR")
    if band_hz:
        y_CT = mne.filter.filter_data(y_CT, rate_hz, *band_hz, verbose="ERROR")
    if out_hz != rate_hz:
        y_CT = mne.filter.resample(y_CT, out_hz, rate_hz, npad="auto", pad="auto", verbose="ERROR")
    return y_CT.astype(np.float32)


# which reader for which file: module and function, imported when needed, because they bring scipy, h5py and pyxdf
SUFFIXES = {
    **dict.fromkeys([".edf", ".bdf"], ("recordings", "open_edf")),
    **dict.fromkeys([".fif", ".fif.gz"], ("recordings", "open_fif")),
    **dict.fromkeys([".gdf", ".cnt", ".nedf", ".lay"], ("recordings", "open_mne")),
    ".mff": ("recordings", "open_mff"),
    ".vhdr": ("brainvision", "open_vhdr"),
    ".set": ("eeglab", "open_set"),
    **dict.fromkeys([".xdf", ".xdfz"], ("xdf", "open_xdf")),
    **dict.fromkeys([".csv", ".txt"], ("tables", "open_table")),
    **dict.fromkeys([".npy", ".npz", ".mat", ".h5", ".hdf5"], ("archives", "open_archive")),
}
_BESIDE = {".vhdr": (".json", ".elc"), ".set": (".fdt", ".FDT"), ".lay": (".dat", ".elc"), ".cnt": (".elc",)}
_BESIDE |= dict.fromkeys([".csv", ".txt", ".npy", ".npz", ".mat", ".h5", ".hdf5"], (".yml", ".yaml"))
_NOT_RAW = re.compile(
    r"[-_](eve|epo|ave|evo|cov|trans|fwd|inv|src|bem|sol|ica|proj|annot|dip|stc)\.fif(\.gz)?$", re.IGNORECASE
)
_SPLIT_PART = re.compile(r"(?P<base>.+)(-(?P<number>\d+)|_split-(?P<split>\d+)(?P<rest>_.*)?)\.fif$", re.IGNORECASE)


def suffix(path) -> str:
    """The suffix that decides on the reader, in lower case, `.fif.gz` as one."""
    name = Path(path).name.lower()
    return ".fif.gz" if name.endswith(".fif.gz") else Path(name).suffix


def is_recording(path) -> bool:
    """Whether a path is the head of a recording, judged by its name: not its parts (.fdt, later FIF splits), no events."""
    path = Path(path)
    litter = path.name.startswith(".")  # `._x.edf` of macOS
    if litter or suffix(path) not in SUFFIXES or _NOT_RAW.search(path.name):
        return False
    part = _SPLIT_PART.match(path.name)
    if part and part["number"]:
        return not path.with_name(part["base"] + ".fif").exists()
    return not (part and int(part["split"]) > 1)


def companions(path) -> tuple[Path, ...]:
    """The files beside `path` that the recording also lives in or is checked against, sorted."""
    path = Path(path)
    kind = suffix(path)
    if kind == ".mff":
        return tuple(sorted(file for file in path.rglob("*") if file.is_file()))
    found = [path.with_suffix(ending) for ending in _BESIDE.get(kind, ())]
    if kind == ".vhdr":
        from lib.brainvision import parts

        found += parts(path)
    if kind == ".fif":
        splits = [(file, _SPLIT_PART.match(file.name)) for file in path.parent.iterdir()]
        found += [file for file, part in splits if part and file != path and path.name in _heads(part)]
    return tuple(sorted({file for file in found if file.is_file()}))


def _heads(part: re.Match) -> tuple[str, str]:
    """The names that the first file of a split FIF recording may have, given a later one."""
    return part["base"] + ".fif", f"{part['base']}_split-{1:0{len(part['split'] or '')}}{part['rest'] or ''}.fif"
