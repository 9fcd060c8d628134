"""
Electrode names, aliases and 3-D positions, and the channel profiles a cache can be built with.

Positions are metres in MNE's head frame (+x right ear, +y nose, +z up), read once from electrodes.tsv: the 10-05 system
(Oostenveld & Praamstra 2001, MNE's `standard_1005`) and the 128 electrodes of EGI's GSN-HydroCel-128, which were moved onto
the 10-05 head by the similarity that best maps 20 of them on their 10-20 equivalents (Luu & Ferree 2005), so that both
montages share one space.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.errors import Rejected


def _load_positions() -> dict[str, tuple[float, float, float]]:
    rows = (Path(__file__).parent / "electrodes.tsv").read_text().splitlines()[1:]
    return {
        name: (float(x) / 1000, float(y) / 1000, float(z) / 1000) for name, x, y, z in (r.split("\t") for r in rows)
    }


POSITIONS = _load_positions()
ORDER = {name: i for i, name in enumerate(POSITIONS)}
_BY_UPPER = {name.upper(): name for name in POSITIONS}
ALIASES = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8", "M1": "A1", "M2": "A2", "E129": "Cz", "VREF": "Cz"}

SPHERE_CENTRE_M = np.array([0.0, 0.015, 0.045])  # of the sphere that fits the 10-20 electrodes

TEN_TWENTY = tuple("Fp1 Fp2 F7 F3 Fz F4 F8 T7 C3 Cz C4 T8 P7 P3 Pz P4 P8 O1 O2".split())


@dataclass(frozen=True)
class Profile:
    """Channels a cache must hold, and what happens to a recording that lacks some of them."""

    channels: tuple[str, ...]
    missing: str  # reject | interpolate | mask
    max_missing: int  # more missing electrodes than this reject the recording whatever the policy


# TUSZ has 249 files without Fz and Pz (both can be interpolated from their neighbours) and 1,309 in the 03_tcp_ar_a montage without A1
# and A2 (at the rim of the cap, nothing to interpolate from: masked). See docs/cache.md for what each policy costs.
PROFILES = {
    "tuh21": Profile((*TEN_TWENTY, "A1", "A2"), missing="mask", max_missing=4),
    "tuh19": Profile(TEN_TWENTY, missing="interpolate", max_missing=2),
    "hbn128": Profile(tuple(f"E{i}" for i in range(1, 129)), missing="interpolate", max_missing=12),
}

_PREFIX = re.compile(r"^(EEG[\s:._-]+|RAW_)", re.IGNORECASE)
_REFERENCE = re.compile(r"-(REF|LE|AR|AVG|AVE|CAR)$", re.IGNORECASE)
_KINDS = {  # by whole word at the start of the cleaned, upper-case name
    "eog": r"EOG|HEOG|VEOG|LOC|ROC|LUE|RLE|E[12]-(?:[AM][12]|FPZ)",
    "ecg": r"ECG|EKG",
    "emg": r"EMG",
    "stim": r"STIM|STI|STATUS|TRIG|TRIGGER|TRG|EVENT|MARKER|MARKERS|MARKER0|PHOTIC|DIN|BNC|STIMULUS|ANNOTATIONS|EDF ANNOTATIONS|BDF ANNOTATIONS",
    "misc": r"IBI|BURSTS|SUPPR|RESP|PULSE|SPO2|TEMP|GSR|ACC|AUX|RIGHT AUX|DC|OSAT|PG|RATE|TIMESTAMP|TIMESTAMPS|TIME|COUNTER|SAMPLE|INDEX|EPOCH|QUALITY|REF|GND|GROUND"
    r"|ACCEL|ACCELEROMETER|GYRO|ANALOG|OTHER|BATTERY|PPG|HR|DELTA|THETA|ALPHA|BETA|GAMMA"  # OpenBCI, Muse: also powers of bands
    r"|PLET|ERG|EXG(?=\d)",  # BioSemi's EXG1 … EXG8 are wherever somebody put them
}
_KINDS = {kind: re.compile(rf"^(?:{words})(?![A-Z])") for kind, words in _KINDS.items()}
_BIOSEMI = re.compile(r"[A-H]\d{1,2}")


def canonical(name: str) -> str:
    """The standard spelling of an electrode (`EEG FP1-REF`, `Fp1.` → `Fp1`; `T3` → `T7`), by exact match only; other names come back stripped."""
    text = name.strip()
    bare = _REFERENCE.sub("", _PREFIX.sub("", text)).strip().strip(".").replace(" ", "")
    upper = bare.upper()
    upper = ALIASES.get(upper, upper).upper()
    zeroless = re.sub(r"^E0+(?=\d)", "E", upper)  # E001 is E1
    return _BY_UPPER.get(zeroless) or (bare if bare else text)


def kind(name: str) -> str:
    """What a channel records, judged by its name: eeg, eog, ecg, emg, stim, misc, or unknown."""
    if canonical(name) in POSITIONS:
        return "eeg"
    text = _PREFIX.sub("", name.strip()).upper().strip(".")
    if not any(c.isalnum() for c in text):  # CHB-MIT's `-`: a place in a list without an electrode
        return "misc"
    return next((kind for kind, words in _KINDS.items() if words.match(text)), "unknown")


def common_sites(montages: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The electrodes of montages that are all the same, else the 10-20 system's; none if the place of one isn't known."""
    montages = set(montages)
    if any(name not in POSITIONS for names in montages for name in names):
        return ()
    return montages.pop() if len(montages) == 1 else TEN_TWENTY


def is_biosemi(names: list[str]) -> bool:
    """Whether A1, A2 … are BioSemi's cap positions rather than the ear lobes: then A3 and A4 stand beside them."""
    return {"A3", "A4"} <= {n.strip() for n in names}


def standard(names: list[str]) -> list[str | None]:
    """The electrode that each channel of one recording is by its name, None where that says none: BioSemi's C3 is a place on its cap."""
    caps = is_biosemi(names)
    found = [None if caps and _BIOSEMI.fullmatch(name.strip()) else canonical(name) for name in names]
    return [name if name in POSITIONS else None for name in found]


def are_eyes(names: list[str]) -> bool:
    """Whether E1 and E2 are the eyes of a sleep recording (AASM) rather than electrodes of EGI's net, which has more of them."""
    return sum(name.startswith("E") and name in POSITIONS for name in map(canonical, names)) <= 2


def are_bipolar(names: Sequence[str]) -> list[bool]:
    """Which of the channels taken of a file are differences such as `Fp1-F7`, of electrodes without a reference in common."""
    pairs = [[canonical(n) for n in canonical(name).split("-")] for name in names]
    pairs = [pair if len(pair) == 2 and all(n in POSITIONS for n in pair) else None for pair in pairs]
    several = len({pair[1] for pair in pairs if pair}) > 1  # one alone is a reference, spelled out
    return [several and pair is not None for pair in pairs]


@dataclass(frozen=True)
class Selection:
    """Which channels of a recording a cache takes: file index per cached channel, or -1 where the electrode is missing."""

    names: tuple[str, ...]
    indices: tuple[int, ...]
    missing: tuple[str, ...]
    dropped: tuple[str, ...]  # names in the file that were not taken


def select(
    names: list[str],
    kinds: list[str],
    profile: str,
    stated: bool = False,
    max_missing: int | None = None,
    identical: Callable[[int, int], bool] = lambda a, b: False,
    reference: Sequence[int] = (),
) -> Selection:
    """
    The channels of one recording under a profile (`all`, a key of PROFILES, or comma-separated names), in canonical order.

    `stated`: the user gave the names (dataset.toml), so unknown ones are wanted too. `max_missing` overrides the profile's.
    `identical(i, j)`: whether two channels of the same name hold the same samples, so that the second can be left out.
    `reference` is what will be subtracted: one electrode alone is nothing but zeros then, and none of `all`.
    Raises Rejected: `no_eeg_channels`, `ambiguous_channel`, `missing_channel`.
    """
    electrodes = standard(names)
    canon = [electrode or canonical(name) for electrode, name in zip(electrodes, names, strict=True)]
    known = [electrode is not None for electrode in electrodes]
    usable = [k in ("eeg", "unknown", "vibration") for k in kinds]
    for i in range(len(names)):
        first = canon.index(canon[i])
        if first < i and canon[i] and usable[first] and usable[i] and identical(first, i):
            usable[i] = False

    if profile == "all":
        if len(reference) == 1:
            usable[reference[0]] = False
        eyes = ("E1", "E2") if are_eyes(names) and not stated else ()
        candidates = [i for i in range(len(names)) if usable[i] and canon[i] and canon[i] not in eyes]
        # names that say nothing (BioSemi caps, `ch1`, `EEG 001`) are taken where the user gave them, or where no electrode is known
        wanted = candidates if stated or "vibration" in kinds else [i for i in candidates if known[i]] or candidates
        if not wanted:
            raise Rejected("no_eeg_channels", f"none of {len(names)} channels is EEG: {', '.join(names[:8])}")
        wanted.sort(key=lambda i: (ORDER[canon[i]] if known[i] else len(ORDER), i))
        taken, missing, channels = wanted, (), tuple(canon[i] for i in wanted)
        _refuse_duplicates(channels)
    else:
        channels, limit = profile_channels(profile)
        limit = limit if max_missing is None else max_missing
        # C3 is asked for as an electrode, unless beside places of a cap such as B7
        on_cap = any(c not in POSITIONS for c in channels)
        found = {c: [i for i, name in enumerate(canon) if name == c and usable[i]] for c in channels}
        found = {c: [i for i in fitting if known[i] or on_cap] for c, fitting in found.items()}
        _refuse_duplicates([c for c, places in found.items() for _ in places])
        taken = [found[c][0] if found[c] else -1 for c in channels]
        missing = tuple(c for c in channels if not found[c])
        if len(missing) > limit or len(missing) == len(channels):
            raise Rejected("missing_channel", f"{', '.join(missing[:12])} not in the file")
    dropped = tuple(name for i, name in enumerate(names) if i not in set(taken))
    return Selection(tuple(channels), tuple(taken), missing, dropped)


def _refuse_duplicates(channels) -> None:
    twice = sorted(c for c, n in Counter(channels).items() if n > 1)
    if twice:
        raise Rejected("ambiguous_channel", f"{', '.join(twice)} named more than once, with different signals")


def profile_channels(profile: str) -> tuple[tuple[str, ...], int]:
    """The channels a profile name or a comma-separated list stands for, and how many of them may be missing where that is allowed."""
    if profile in PROFILES:
        return PROFILES[profile].channels, PROFILES[profile].max_missing
    named = tuple(canonical(n) for n in profile.split(",") if n.strip())
    return named, len(named) // 2  # as many as may be bad


def named_twice(names: list[str]) -> str:
    """The names that mean the same electrode as another one, such as `T3 and T7`; empty where there are none."""
    places = Counter(canonical(n) for n in names if n.strip())
    return " and ".join(n.strip() for n in names if places[canonical(n)] > 1)


def reference_channels(reference: str, names: list[str]) -> list[int]:
    """File indices of the electrodes a reference such as `A1,A2` names; empty for `average` and `none`. Raises Rejected."""
    if reference in ("average", "none"):
        return []
    wanted = [canonical(n) for n in reference.split(",")]
    on_cap = any(n not in POSITIONS for n in wanted)  # as in select
    canon = [canonical(n) if on_cap else electrode for n, electrode in zip(names, standard(names), strict=True)]
    lacking = [n for n in wanted if n not in canon]
    if lacking:
        raise Rejected("missing_reference", f"reference {', '.join(lacking)} is not in the file")
    return [canon.index(n) for n in wanted]


def spline_weights(sources: list[str], targets: list[str]) -> np.ndarray:
    """
    Weights (targets, sources) that interpolate electrodes from others by spherical splines (Perrin et al. 1989, eq. 1-3, m = 4).

    Equal to MNE's `interpolate_bads` for electrodes on the same sphere. Raises Rejected if an electrode has no position.
    """
    unplaced = [n for n in (*sources, *targets) if n not in POSITIONS]
    if unplaced:
        raise Rejected("missing_channel", f"{', '.join(unplaced)} can't be interpolated: no position is known")
    a, b = (np.array([POSITIONS[n] for n in group]) - SPHERE_CENTRE_M for group in (sources, targets))
    a, b = (p / np.linalg.norm(p, axis=1, keepdims=True) for p in (a, b))
    degree = np.arange(1, 51)
    coefficients = np.concatenate([[0], (2 * degree + 1) / (degree**4 * (degree + 1) ** 4 * 4 * np.pi)])
    g_aa, g_ba = (np.polynomial.legendre.legval(np.clip(p @ a.T, -1, 1), coefficients) for p in (a, b))
    n = len(sources)
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = g_aa + 1e-5 * np.eye(n)
    system[n, n] = 0
    return (np.hstack([g_ba, np.ones((len(targets), 1))]) @ np.linalg.pinv(system))[:, :n].astype(np.float32)
