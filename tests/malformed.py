"""
45 EDF files as they are found in archives, one of them in order: written byte by byte, without lib/edf.py.

CASES maps a name to a Case. `case.write(path, rng)` writes the file and returns the Truth a reader must find, or None where
the file must be refused with the code `case.expect`. `ambiguous_channel` and `missing_channel` are the builder's codes, and
hold for a build of exactly CHANNELS. Shapes: C channels, T samples, R records.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

CHANNELS = ("Fp1", "Fp2", "C3", "C4", "O1", "O2")
LABELS = ("EEG FP1-REF", "EEG FP2-REF", "EEG C3-REF", "EEG C4-REF", "EEG O1-REF", "EEG O2-REF")
RECORDS, RATE_HZ = 30, 256
EVENTS = ((3.5, 2.0, "seizure"), (12.0, 0.0, "eyes closed"))
WIDTHS = {"label": 16, "transducer": 80, "dimension": 8, "physical_min": 8, "physical_max": 8}
WIDTHS |= {"digital_min": 8, "digital_max": 8, "prefilter": 80, "samples": 8, "reserved": 32}


@dataclass(frozen=True)
class Truth:
    names: tuple[str, ...]  # every ordinary signal, as labelled in the file
    rate_hz: float
    x_CT_uv: np.ndarray  # CHANNELS, in that order
    segments: tuple[tuple[int, int, float], ...]  # start, stop (samples), onset_s
    events: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Case:
    write: Callable[[Path, np.random.Generator], Truth | None]
    expect: str | None = None  # quarantine code; None: the signal must come out
    note: str | None = None  # how a note on the recording begins
    suffix: str = ".edf"


@dataclass
class Extra:
    """A signal beside CHANNELS, at place `at` in the file."""

    label: str
    at: int
    samples: int = RATE_HZ  # per record
    copy_of: int | None = None  # of CHANNELS; otherwise its own noise


def eeg(rng: np.random.Generator, samples: int, sd_uv: float = 25.0) -> np.ndarray:
    """One channel of brown-to-white noise with the spread of EEG."""
    x_T = np.convolve(rng.normal(size=samples + 63), 0.9 ** np.arange(64), "valid")
    return x_T * (sd_uv / x_T.std())


def _columns(rows: list[dict], unit: str, half: int, marks: str, width: int) -> dict[str, list[str]]:
    """Header text per field: a cell for every signal, and one for the annotations."""
    both = {"digital_min": -half, "digital_max": half - 1}
    rows = [{"dimension": unit, **both, **row} for row in rows]
    rows.append({**both, "label": marks, "physical_min": -1, "physical_max": 1, "samples": width})
    return {field: [str(row.get(field, "")) for row in rows] for field in WIDTHS}


def write(
    path: Path,
    rng: np.random.Generator,
    *,
    labels=LABELS,
    extras: tuple[Extra, ...] = (),
    unit: str = "uV",
    per_uv: float = 1.0,
    physical: dict | None = None,  # (min, max) in µV by channel
    cells: dict | None = None,  # header text by (field, channel), in place of the right one
    fixed: dict | None = None,  # the same for the fields before the signals
    record_s: str = "1",
    onsets_s=None,  # of the records; makes it EDF+D
    events=EVENTS,
    kept_events=None,  # what of them must come out
    encoding: str = "utf-8",
    kept: int = RECORDS,  # records that must come out
    shape: Callable[[np.ndarray], None] = lambda x_CT: None,  # changes the signal in place
    edit: Callable[[bytes, int, int], bytes] = lambda data, header, record: data,  # of the finished file
    bdf: bool = False,
) -> Truth:
    """Write one recording of CHANNELS with everything right but what the arguments say."""
    sample_bytes, half = (3, 1 << 23) if bdf else (2, 1 << 15)
    x_CT = np.stack([eeg(rng, RECORDS * RATE_HZ) for _ in CHANNELS])
    shape(x_CT)
    signals = []
    for c, label in enumerate(labels):
        low, high = (physical or {}).get(c, (-500.0, 500.0))
        step = (high - low) / (2 * half - 1)
        digital_T = np.clip(np.rint((x_CT[c] - low) / step) - half, -half, half - 1).astype(np.int64)
        x_CT[c] = (digital_T + half) * step + low
        row = {"label": label, "physical_min": low * per_uv, "physical_max": high * per_uv, "samples": RATE_HZ}
        signals.append((row, digital_T))
    for extra in extras:
        noise_T = np.rint(eeg(rng, RECORDS * extra.samples) * 65535 / 1000).astype(np.int64)
        digital_T = noise_T if extra.copy_of is None else signals[extra.copy_of][1]
        row = {
            "label": extra.label,
            "physical_min": -500 * per_uv,
            "physical_max": 500 * per_uv,
            "samples": extra.samples,
        }
        signals.insert(extra.at, (row, digital_T))

    starts_s = [r * float(record_s) for r in range(RECORDS)] if onsets_s is None else onsets_s
    tals = [f"+{start:g}\x14\x14\0".encode() for start in starts_s]
    for onset, duration, text in events:
        record = max([r for r in range(RECORDS) if starts_s[r] <= onset], default=0)
        tals[record] += f"{onset:+g}{f'{chr(21)}{duration:g}' if duration else ''}\x14{text}\x14\0".encode(encoding)
    width = -(-max(map(len, tals)) // sample_bytes)

    columns = _columns([row for row, _ in signals], unit, half, f"{'BDF' if bdf else 'EDF'} Annotations", width)
    for (field, c), text in (cells or {}).items():
        columns[field][c] = text
    count = len(signals) + 1
    top = {"version": "\xffBIOSEMI" if bdf else "0", "patient": "X X X X", "recording": "Startdate X X X X"}
    top |= {"date": "01.01.15", "time": "10.00.00", "header_bytes": 256 * (count + 1)}
    top |= {"reserved": f"{'BDF' if bdf else 'EDF'}+{'D' if onsets_s else 'C'}", "records": RECORDS}
    top |= {"record_s": record_s, "signals": count, **(fixed or {})}
    header = [str(v)[:w].ljust(w) for v, w in zip(top.values(), (8, 80, 80, 8, 8, 8, 44, 8, 8, 4), strict=True)]
    header += [text[: WIDTHS[field]].ljust(WIDTHS[field]) for field, column in columns.items() for text in column]

    data = bytearray("".join(header).encode("latin-1"))
    assert len(data) == 256 * (count + 1), (len(data), count)
    for r in range(RECORDS):
        for _, digital_T in signals:
            part_N = digital_T.reshape(RECORDS, -1)[r].astype("<i4")
            data += part_N.view(np.uint8).reshape(-1, 4)[:, :sample_bytes].tobytes()
        data += tals[r].ljust(width * sample_bytes, b"\0")
    head, record_bytes = 256 * (count + 1), (len(data) - 256 * (count + 1)) // RECORDS
    path.write_bytes(edit(bytes(data), head, record_bytes))

    rate_hz, n = RATE_HZ / (float(record_s) or 1), RATE_HZ
    gap = next((r for r in range(1, kept) if starts_s[r] - starts_s[r - 1] > float(record_s) + 1), kept)
    segments = [(0, gap * n, 0.0)]
    if gap < kept:
        segments.append((gap * n, kept * n, starts_s[gap]))
    end_s = segments[-1][2] + (segments[-1][1] - segments[-1][0]) / rate_hz
    found = kept_events if kept_events is not None else [event for event in events if event[0] < end_s]
    names = tuple(columns["label"][:-1])
    return Truth(names, rate_hz, x_CT[:, : kept * n], tuple(segments), tuple(found))


def refuse(path: Path, rng: np.random.Generator, **options) -> None:
    """Write a recording that must be refused."""
    write(path, rng, **options)


def contents(path: Path, rng: np.random.Generator, data: bytes) -> None:
    """Write something that isn't EDF at all."""
    path.write_bytes(data)


def flat_and_saturated(x_CT: np.ndarray) -> None:
    x_CT[1] = 0.0
    x_CT[4] = np.where(x_CT[4] > 0, 500.0, -500.0)


def junk(data: bytes, header: int, record: int) -> bytes:
    """Three records and a bit of noise after the end."""
    return data + np.random.default_rng(1).bytes(3 * record + 77)


GAP_S = [float(r) for r in range(15)] + [115.0 + r for r in range(15)]
MARKUP = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>" + b"<p>Sign in to download.</p>" * 40
POINTER = b"/annex/objects/SHA256E-s4067328--" + b"3f" * 32 + b".edf\n"
PAST = ((3.5, 2.0, "seizure"), (28.0, 5.0, "runs over"), (31.0, 1.0, "after the end"))
BEFORE = ((-4.0, 1.0, "before the start"), (-2.0, 3.0, "runs in"), (3.5, 2.0, "seizure"))

CASES: dict[str, Case] = {
    "clean": Case(write),
    # records and gaps
    "edf_d_gap": Case(partial(write, onsets_s=GAP_S, events=(*EVENTS, (120.0, 1.0, "after the gap")))),
    "edf_d_contiguous": Case(partial(write, onsets_s=[float(r) for r in range(RECORDS)])),
    "records_minus_one": Case(partial(write, fixed={"records": -1}), note="truncated"),
    "records_more_than_file": Case(partial(write, fixed={"records": 99999999}), note="truncated"),
    "cut_mid_record": Case(
        partial(write, kept=21, edit=lambda d, h, r: d[: h + 21 * r + r // 2 + 1]), note="truncated"
    ),
    "records_fewer_than_file": Case(partial(write, kept=15, fixed={"records": 15}), note="records_ignored"),
    "trailing_junk": Case(partial(refuse, edit=junk), "size_mismatch"),
    # no recording at all
    "cut_inside_header": Case(partial(refuse, edit=lambda d, h, r: d[: h // 2 + 3]), "not_edf"),
    "zero_length": Case(partial(contents, data=b""), "empty"),
    "html_page": Case(partial(contents, data=MARKUP), "not_edf"),
    "annex_pointer": Case(partial(contents, data=POINTER), "annex_pointer"),
    "header_only": Case(partial(refuse, edit=lambda d, h, r: d[:h]), "no_data"),
    "header_bytes_wrong": Case(partial(refuse, fixed={"header_bytes": 1024}), "bad_header"),
    "signal_count_too_large": Case(partial(refuse, fixed={"signals": 99}), "bad_header"),
    # labels
    "duplicate_labels_same": Case(partial(write, extras=(Extra("EEG C3-REF", 3, copy_of=2),))),
    "duplicate_labels_differ": Case(partial(refuse, extras=(Extra("EEG C3-REF", 3),)), "ambiguous_channel"),
    "empty_labels": Case(partial(write, extras=(Extra("", 2), Extra("", 7)))),
    "prefix_label_first": Case(partial(write, extras=(Extra("EEG C3P-REF", 2),))),
    # rates
    "ekg_100_hz": Case(partial(write, extras=(Extra("EEG EKG1-REF", 3, samples=100),))),
    "ekg_512_hz": Case(partial(write, extras=(Extra("EEG EKG1-REF", 0, samples=512),))),
    "record_duration_0": Case(partial(refuse, record_s="0"), "record_duration"),
    "record_duration_1024": Case(partial(write, record_s="1.024")),
    # scale and unit
    "digital_min_is_max": Case(partial(refuse, cells={("digital_min", 2): "32767"}), "missing_channel", "unusable"),
    "physical_min_is_max": Case(partial(refuse, cells={("physical_min", 2): "500"}), "missing_channel", "unusable"),
    "physical_inverted": Case(partial(write, physical={2: (500.0, -500.0)}), note="inverted"),
    "unit_mv": Case(partial(write, unit="mV", per_uv=1e-3)),
    "unit_v": Case(partial(write, unit="V", per_uv=1e-6)),
    "unit_empty": Case(partial(write, unit=""), note="unit_guessed"),
    "unit_upper_case": Case(partial(write, unit="UV")),
    "unit_utf8_micro": Case(partial(write, unit="\u00b5V".encode().decode("latin-1"))),
    "unit_latin1_micro": Case(partial(write, unit="\u00b5V")),
    "comma_decimals": Case(
        partial(
            write,
            physical={c: (-312.5, 312.5) for c in range(6)},
            cells={
                (f"physical_{end}", c): f"{sign}312,5" for c in range(6) for end, sign in (("min", "-"), ("max", ""))
            },
        )
    ),
    "flat_and_saturated": Case(partial(write, shape=flat_and_saturated)),
    # text and dates
    "non_ascii_patient": Case(partial(write, fixed={"patient": "X F X Bj\u00f6rn_S\u00e1"})),
    "non_ascii_label": Case(partial(write, extras=(Extra("\u00c9lectrode", 6),))),
    "non_ascii_version": Case(partial(write, fixed={"version": "0\u00a0\u00e9"})),
    "date_colons": Case(partial(write, fixed={"date": "01:01:20"})),
    "date_zeros": Case(partial(write, fixed={"date": "00.00.00"})),
    "start_second_75": Case(partial(write, fixed={"time": "10.00.75"})),
    # annotations
    "annotations_past_end": Case(
        partial(write, events=PAST, kept_events=(PAST[0], (28.0, 2.0, "runs over"))), note="label_out_of_range"
    ),
    "annotations_negative": Case(
        partial(write, events=BEFORE, kept_events=((0.0, 1.0, "runs in"), BEFORE[2])), note="label_out_of_range"
    ),
    "annotation_latin1": Case(partial(write, events=((5.0, 1.0, "R\u00f6ntgen \u00b5"),), encoding="latin-1")),
    # what the name of the file says
    "bdf_magic_in_edf": Case(partial(write, bdf=True)),
    "upper_case_suffix": Case(write, suffix=".EDF"),
}
assert len(CASES) == 45, len(CASES)
