"""
Hard inputs through the builder's command line: each is refused with its code or comes out right, and nothing beside it changes.

The case tables are tests/malformed.py and tests/label_cases.py; test_edf.py, test_labels.py and test_sources.py ask the readers
alone. Shapes: C channels, T samples.
"""

import json
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import build_cache
from build_cache import Config
from lib import store
from lib.cache import Cache
from lib.edf import read_header, read_signals, write_edf
from lib.errors import Unusable
from lib.filters import Spectral
from tests import malformed
from tests.label_cases import BIDS_CASES, CSV_BI_CASES, DURATION_S, STEM, write_bids
from tests.malformed import CHANNELS, LABELS
from tests.recipes import ROOT, contents, noise_uv, run

RATE_HZ = 250  # of the cache: what the one file with records of 1.024 s has; the others come from 256 Hz
GOOD_S = 8


def stem(number: int, good: bool = False) -> str:
    """A file name as TUH gives them, of a patient of its own."""
    return f"aaaaa{'g' if good else 'b'}{chr(97 + number // 26)}{chr(97 + number % 26)}_s001_t000"


def rows(directory) -> dict[str, int]:
    """The row of each recording of a cache, by its key without folders and suffix."""
    return {r.key.rsplit("/", 1)[1].rsplit(".", 1)[0]: i for i, r in enumerate(Cache(directory).recordings)}


def codes(directory) -> dict[str, str]:
    """The code of each quarantined recording, by its key without folders and suffix."""
    entries = json.loads((directory / "quarantine.json").read_text())
    assert all(entry["reason"] for entry in entries)
    return {entry["key"].rsplit("/", 1)[1].rsplit(".", 1)[0]: entry["code"] for entry in entries}


def shards(directory) -> dict[str, bytes]:
    """Shards and parts by their place in the cache."""
    return {name: data for name, data in contents(directory).items() if "/shards/" in name or "/parts/" in name}


def stored_time(t_s: float, truth: malformed.Truth) -> float:
    """Seconds of the stored signal, in which gaps are closed, of a time of the recording."""
    start, _, onset_s = max((s for s in truth.segments if s[2] <= t_s), key=lambda s: s[2])
    return start / truth.rate_hz + t_s - onset_s


def write_recording(path, seconds: float = DURATION_S) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.stem.encode()))
    write_edf(path, noise_uv(rng, len(LABELS), round(seconds * RATE_HZ)), RATE_HZ, LABELS)


def plant_good(root) -> None:
    """Recordings in order: two of EDF, two of TUSZ (one with a seizure), and a BIDS data set of three."""
    rule = "name = \"edf\"\npattern = '(?P<subject>[^/]+)\\.edf'\n"
    (root / "malformed").mkdir(parents=True)
    (root / "malformed" / "dataset.toml").write_text(rule)
    for number in range(2):
        write_recording(root / "malformed" / f"good_{number}.edf", GOOD_S)
        patient = root / "tusz" / "train" / stem(number, good=True)[:8] / "s001_2010" / "01_tcp_ar"
        path = patient / f"{stem(number, good=True)}.edf"
        write_recording(path)
        label = CSV_BI_CASES["clean"].data if number else b"channel,start_time,stop_time,label\nTERM,0,60,bckg\n"
        path.with_suffix(".csv_bi").write_bytes(label.replace(STEM.encode(), path.stem.encode()))
    write_bids(root / "bids" / "good", BIDS_CASES["clean"], write_recording)


def plant_cases(root) -> dict[str, malformed.Truth | None]:
    """All cases of the tables beside the good recordings; returns what the malformed EDF files hold."""
    truths = {}
    for name, case in malformed.CASES.items():
        path = root / "malformed" / f"{name}{case.suffix}"
        truths[name] = case.write(path, np.random.default_rng(7))
    for number, case in enumerate(CSV_BI_CASES.values()):
        name = stem(number)
        path = root / "tusz" / "train" / name[:8] / "s001_2010" / "01_tcp_ar" / f"{name}.edf"
        write_recording(path)
        if case.data is not None:
            path.with_suffix(".csv_bi").write_bytes(case.data.replace(STEM.encode(), name.encode()))
    for name, case in BIDS_CASES.items():
        write_bids(root / "bids" / name, case, write_recording)
    return truths


def sources(root) -> list:
    return [root / "malformed", root / "tusz", *sorted((root / "bids").iterdir())]


def command(root, cache) -> tuple:
    """A build that leaves the numbers as they are, but for the rate."""
    signal = ("--rate-hz", RATE_HZ, "--band-hz", "none", "--reference", "none", "--scale", "none")
    return ("--source", *sources(root), "--cache", cache, "--channels", ",".join(CHANNELS), *signal)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Good recordings alone, and with every case of the three tables beside them."""
    root = tmp_path_factory.mktemp("quarantine")
    raw, alone, cache = root / "raw", root / "alone", root / "cache"
    plant_good(raw)
    signal = {"rate_hz": float(RATE_HZ), "band_hz": "none", "reference": "none", "scale": "none"}
    cfg = Config(tuple(sources(raw)), alone, channels=",".join(CHANNELS), workers=1, **signal)
    good = build_cache.build(cfg)
    assert (good["recordings"], good["quarantined"]) == (7, 0)
    truths = plant_cases(raw)
    code, result, stderr = run(*command(raw, cache))
    return SimpleNamespace(raw=raw, alone=alone, cache=cache, truths=truths, code=code, result=result, stderr=stderr)


# ----------------------------------------------------------------------------------------------------------------------
# The three tables


def test_a_build_with_refused_recordings_ends_with_3_and_counts_them(built):
    assert built.code == 3, built.stderr
    refused = [case.expect for case in malformed.CASES.values() if case.expect]
    refused += [case.expected for case in CSV_BI_CASES.values() if isinstance(case.expected, str)]
    assert built.result["quarantined_by_code"] == dict(sorted(Counter(refused).items()))
    files = 45 + 20 + sum(len(case.recordings) for case in BIDS_CASES.values()) + 7
    assert built.result["recordings"] + built.result["quarantined"] == files
    assert "Traceback" not in built.stderr


def test_good_recordings_are_the_same_bytes_as_without_the_bad_ones(built):
    good, all_ = shards(built.alone), shards(built.cache)
    assert len(good) == 14
    assert [name for name, data in good.items() if all_.get(name) != data] == []


@pytest.mark.parametrize("name", malformed.CASES)
def test_malformed_edf_is_refused_or_stored_right(built, name):
    case, truth = malformed.CASES[name], built.truths[name]
    if truth is None:
        assert codes(built.cache)[name] == case.expect and name not in rows(built.cache)
        return
    cache, row = Cache(built.cache), rows(built.cache)[name]
    recording = cache.recordings[row]
    assert recording.names == CHANNELS and name not in codes(built.cache)

    resample = Spectral(truth.rate_hz, RATE_HZ, None, None)
    pieces = [resample(truth.x_CT_uv[:, a:b].astype(np.float32)) for a, b, _ in truth.segments]
    expected_CT = np.concatenate(pieces, axis=1)
    edges = np.cumsum([0, *(piece.shape[1] for piece in pieces)]).tolist()
    assert recording.segments == tuple(zip(edges[:-1], edges[1:], strict=True))
    batch = cache.read([row], [0], recording.samples, unit="uV")
    good_C = batch.mask_BC[0].numpy()
    assert good_C.tolist() == [name != "flat_and_saturated" or c not in (1, 4) for c in range(6)]
    x_CT = batch.x_BCT[0].numpy()
    np.testing.assert_allclose(x_CT[good_C], expected_CT[good_C], rtol=2**-11, atol=1e-3)  # float16 on disk
    assert (x_CT[~good_C] == 0).all()

    events = [(e.onset_s, e.duration_s, e.label) for e in cache.events(row)]
    placed = [(round(stored_time(onset, truth), 6), length, label) for onset, length, label in truth.events]
    assert events == sorted(placed)
    notes = json.loads(next(built.cache.glob(f"*/parts/{store.key_hash(recording.key)}.json")).read_text())["part"][
        "notes"
    ]
    if case.note:
        assert any(note.startswith(case.note) for note in notes), notes


def test_no_window_crosses_the_gap(built):
    cache = Cache(built.cache)
    row, border = rows(built.cache)["edf_d_gap"], 15 * RATE_HZ
    for window_s, stride_s in ((4.0, 2.0), (1.0, 0.1), (15.0, 1.0)):
        windows = cache.windows(window_s=window_s, stride_s=stride_s, recordings=[row])
        assert len(windows) == 2 * (round((15 - window_s) / stride_s) + 1 if window_s != 4.0 else 6)
        _, start_N = windows.locate(np.arange(len(windows)))
        assert not ((start_N < border) & (start_N + windows.samples > border)).any()
    assert [e.onset_s for e in cache.events(row, "after the gap")] == [20.0]  # 15 s of signal, then 5 s behind the gap


@pytest.mark.parametrize("name", CSV_BI_CASES)
def test_seizure_labels_are_refused_or_right(built, name):
    case, file = CSV_BI_CASES[name], stem(list(CSV_BI_CASES).index(name))
    if isinstance(case.expected, str):
        assert codes(built.cache)[file] == case.expected and file not in rows(built.cache)
        return
    events = Cache(built.cache).events(rows(built.cache)[file])
    assert [(e.onset_s, e.onset_s + e.duration_s, e.label) for e in events] == [(*i, "seizure") for i in case.expected]
    assert any(note.startswith(case.note) for note in built.result["notes"])


@pytest.mark.parametrize("name", BIDS_CASES)
def test_bids_sidecars_never_cost_a_recording(built, name):
    case, cache = BIDS_CASES[name], Cache(built.cache)
    own = {i: r for i, r in enumerate(cache.recordings) if r.dataset == name}
    assert [r.key for r in own.values()] == [f"{name}/{path}" for path in case.recordings]
    assert cache.participants[f"{name}/01"] == case.traits
    first = min(own)
    for trait in ("age", "sex", "p_factor"):
        assert cache.column(trait)[first] == case.traits.get(trait)
    assert [(e.onset_s, e.duration_s, e.label) for e in cache.events(first)] == case.events
    kind = case.note.split(":")[0]  # notes on the data set are printed, those on recordings counted
    assert any(note.startswith(kind) for note in (*built.stderr.splitlines(), *built.result["notes"]))


def test_a_mended_label_brings_a_recording_back_without_its_signal(built, tmp_path):
    shutil.copytree(built.raw, tmp_path / "raw")
    shutil.copytree(built.cache, tmp_path / "cache")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("shards/*")}
    mended = [stem(list(CSV_BI_CASES).index(name)) for name in ("missing", "unknown_label", "wholly_past_end")]
    for name in mended:
        path = tmp_path / "raw" / "tusz" / "train" / name[:8] / "s001_2010" / "01_tcp_ar" / f"{name}.csv_bi"
        path.write_bytes(CSV_BI_CASES["clean"].data.replace(STEM.encode(), name.encode()))
    code, result, stderr = run(*command(tmp_path / "raw", tmp_path / "cache"))
    assert code == 3 and result["built"] == 0, stderr
    assert result["recordings"] == built.result["recordings"] + 3
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("shards/*")} == before
    cache = Cache(tmp_path / "cache")
    for name in mended:
        (seizure,) = cache.events(rows(tmp_path / "cache")[name], "seizure")
        assert (seizure.onset_s, seizure.duration_s) == (10.0, 5.0)


def test_every_code_is_explained():
    code = re.compile(r'(?:(?:Rejected|Crash)\(\s*|return |, path, )"([a-z_]+)",\s')
    raised = {
        c for path in (ROOT / "build_cache.py", *(ROOT / "lib").glob("*.py")) for c in code.findall(path.read_text())
    }
    assert {"unreadable", "no_pattern_match", "timeout"} <= raised
    explained = re.findall(r"`([a-z_]+)`", (ROOT / "docs" / "cache.md").read_text().split("## Quarantine codes")[1])
    assert raised - set(explained) == set()


# ----------------------------------------------------------------------------------------------------------------------
# What only the builder can judge: the numbers themselves, with the default signal path

SOURCE_HZ, SECONDS, NAMES = 200, 40, ("Fp1", "Fp2", "F3", "C3", "C4", "P3", "O1", "O2")
RULE = f"""name = "arrays"
pattern = '(?P<subject>[^/]+)\\.(?:npy|fif)'
rate_hz = {SOURCE_HZ}
unit = "uV"
channels = {list(NAMES)}
"""
FILTER = Spectral(SOURCE_HZ, 100, (0.5, 45.0), None)


def clean_uv() -> np.ndarray:
    return noise_uv(np.random.default_rng(3), len(NAMES), SECONDS * SOURCE_HZ)


def lacking(*gaps: tuple, value: float = np.nan) -> np.ndarray:
    """The clean signal with `value` where each of `gaps` says: channels (None: all), start_s, stop_s."""
    x_CT = clean_uv()
    for channels, start_s, stop_s in gaps:
        x_CT[slice(None) if channels is None else channels, round(start_s * SOURCE_HZ) : round(stop_s * SOURCE_HZ)] = (
            value
        )
    return x_CT


def spoilt() -> dict[str, np.ndarray]:
    """The clean signal with one thing wrong each."""
    saturated_CT = lacking(([1], 0, SECONDS), value=7.0)
    saturated_CT[5] = np.clip(saturated_CT[5], -12, 12)
    return {
        "clean": clean_uv(),
        "one_nan": lacking(([3], 12, 12.005)),
        "infinite": lacking(([3], 12, 12.005), value=np.inf),
        "short_gap": lacking((None, 12, 12.3)),
        "long_gap": lacking((None, 20, 23)),
        "gap_at_both_ends": lacking((None, 0, 2), (None, 36, SECONDS)),
        "long_gap_of_a_channel": lacking(([2], 20, 21)),
        "lost_channel": lacking(([2], 10, 25)),
        "lost_most_channels": lacking(([0, 1, 2, 3], 0, SECONDS), ([4], 0, 10)),
        "nothing_but_nan": lacking((None, 0, SECONDS)),
        "flat_and_saturated": saturated_CT,
        "mostly_flat": lacking(([0, 2, 4, 5, 7], 0, SECONDS), value=3.0),
        "volts_as_microvolts": 1e-6 * clean_uv(),
        "thousandfold": 1e3 * clean_uv(),
        "ten_thousandfold": 1e4 * clean_uv(),
    }


def plant_judged(root) -> None:
    """Arrays, FIF and EDF files that no header tells from good ones."""
    mne = pytest.importorskip("mne")
    arrays, files = root / "arrays", root / "files"
    arrays.mkdir(parents=True)
    files.mkdir()
    (arrays / "dataset.toml").write_text(RULE)
    for name, x_CT in spoilt().items():
        np.save(arrays / f"{name}.npy", x_CT.T.astype(np.float32))
    for name in ("one_nan", "long_gap"):
        raw = mne.io.RawArray(spoilt()[name] * 1e-6, mne.create_info(list(NAMES), SOURCE_HZ, "eeg"), verbose="ERROR")
        raw.set_annotations(mne.Annotations([5.0, 21.0, 30.0], [1.0, 0.5, 0.0], ["before", "inside", "after"]))
        raw.save(arrays / f"{name}_raw.fif", verbose="ERROR")
    (arrays / "dangling.npy").symlink_to(root.parent / "fetched.npy")
    np.save(arrays / "forbidden.npy", clean_uv().T.astype(np.float32))
    (arrays / "forbidden.npy").chmod(0)

    def write(name: str, **options) -> None:
        malformed.write(files / f"{name}.edf", np.random.default_rng(5), **options)

    write("plain")
    write("ekg_100", extras=(malformed.Extra("EEG EKG1-REF", 2, samples=100),))
    write("ekg_512", extras=(malformed.Extra("EEG EKG1-REF", 0, samples=512),))
    write("same_twice", extras=(malformed.Extra("C3", 6, copy_of=2),))
    write("name_twice", extras=(malformed.Extra("C3", 6),))
    write("old_and_new_name", labels=("T3", "EEG T7-REF", *LABELS[2:]))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """One default build of everything that looks right until its numbers are read."""
    root = tmp_path_factory.mktemp("judged")
    plant_judged(root / "raw")
    sources = (root / "raw" / "arrays", root / "raw" / "files")
    code, result, stderr = run("--source", *sources, "--cache", root / "cache")
    assert code == 3, stderr
    return SimpleNamespace(raw=root / "raw", sources=sources, cache=root / "cache", result=result)


def stored(judged, name: str) -> tuple[np.ndarray, np.ndarray, list]:
    """x_CT in µV, which channels are good, and the segments with their onsets, of one recording."""
    cache, row = Cache(judged.cache), rows(judged.cache)[name]
    batch = cache.read([row], [0], cache.recordings[row].samples, unit="uV")
    index = json.loads((judged.cache / "index.json").read_text())["recordings"]
    return batch.x_BCT[0].numpy(), batch.mask_BC[0].numpy(), index[row]["segments"]


def closed(x_CT: np.ndarray) -> np.ndarray:
    """Straight lines over whatever is not a number."""
    x_CT = x_CT.copy()
    for x_T in x_CT:
        known = np.flatnonzero(np.isfinite(x_T))
        x_T[:] = np.interp(np.arange(len(x_T)), known, x_T[known])
    return x_CT


def assert_stored(judged, name: str, x_CT: np.ndarray, segments: list, bad: tuple[int, ...] = ()) -> None:
    """What is stored is `x_CT`, filtered by segment ([start_s, stop_s) of the recording), minus the mean of the good channels."""
    found_CT, good_C, found_segments = stored(judged, name)
    assert np.flatnonzero(~good_C).tolist() == list(bad)
    pieces = [FILTER(x_CT[:, round(a * SOURCE_HZ) : round(b * SOURCE_HZ)].astype(np.float32)) for a, b in segments]
    expected_CT = np.concatenate(pieces, axis=1)
    expected_CT -= expected_CT[good_C].mean(0)
    edges = np.cumsum([0, *(piece.shape[1] for piece in pieces)]).tolist()
    assert found_segments == [[i, j, a] for i, j, (a, _) in zip(edges[:-1], edges[1:], segments, strict=True)]
    np.testing.assert_allclose(found_CT[good_C], expected_CT[good_C], rtol=1e-3, atol=0.03)  # float16 of ± 4 deviations
    assert (found_CT[~good_C] == 0).all()


def test_short_gaps_are_closed_and_spoil_nothing(judged):
    whole = [(0, SECONDS)]
    assert_stored(judged, "clean", clean_uv(), whole)
    for name in ("one_nan", "infinite", "one_nan_raw"):
        assert_stored(judged, name, closed(spoilt()["one_nan"]), whole)
    assert_stored(judged, "short_gap", closed(spoilt()["short_gap"]), whole)
    clean_CT, _, _ = stored(judged, "clean")
    mended_CT, _, _ = stored(judged, "one_nan")
    assert np.abs(mended_CT - clean_CT).max() < 40 and (mended_CT - clean_CT).std() < 0.02 * clean_CT.std()


def test_long_gaps_split_the_recording(judged):
    for name in ("long_gap", "long_gap_raw"):
        assert_stored(judged, name, spoilt()["long_gap"], [(0, 20), (23, SECONDS)])
    assert_stored(judged, "gap_at_both_ends", spoilt()["gap_at_both_ends"], [(2, 36)])
    cache, row = Cache(judged.cache), rows(judged.cache)["long_gap_raw"]
    assert [(e.onset_s, e.duration_s, e.label) for e in cache.events(row)] == [(5, 1, "before"), (27, 0, "after")]
    assert judged.result["notes"]["label_out_of_range"] >= 1
    _, start_N = cache.windows(recordings=[row], stride_s=0.5).locate(range(33 + 27))
    assert not ((start_N < 2000) & (start_N + 400 > 2000)).any()


def test_bad_channels_are_masked_and_left_out_of_the_average(judged):
    whole = [(0, SECONDS)]
    assert_stored(judged, "flat_and_saturated", clean_uv(), whole, bad=(1, 5))
    assert_stored(judged, "lost_channel", clean_uv(), whole, bad=(2,))
    assert_stored(judged, "long_gap_of_a_channel", clean_uv(), whole, bad=(2,))


def test_what_only_the_numbers_tell_is_refused(judged):
    refused = codes(judged.cache)
    assert refused.pop("forbidden", "unreadable") == "unreadable"  # root reads whatever it likes
    assert refused == {
        "lost_most_channels": "bad_channels",
        "mostly_flat": "bad_channels",
        "nothing_but_nan": "no_data",
        "volts_as_microvolts": "implausible_amplitude",
        "ten_thousandfold": "implausible_amplitude",
        "dangling": "unreadable",
        "name_twice": "ambiguous_channel",
        "old_and_new_name": "ambiguous_channel",
    }
    assert "thousandfold" in rows(judged.cache)  # 20 mV: some public recordings are like that, so it is only reported
    assert any(note.startswith("unusual amplitude") for note in judged.result["notes"])


def test_channels_of_other_rates_and_copies_change_nothing(judged):
    cache = Cache(judged.cache)
    plain = cache.recordings[rows(judged.cache)["plain"]].shard.read_bytes()
    for name in ("ekg_100", "ekg_512", "same_twice"):
        recording = cache.recordings[rows(judged.cache)[name]]
        assert recording.names == CHANNELS and recording.shard.read_bytes() == plain


def test_wanted_channels_may_have_another_rate_than_the_first(tmp_path):
    """Time is counted by the first EEG channel (256 Hz); the wanted ones have 512 Hz, and a gap."""
    extras = (malformed.Extra("EEG T3-REF", 6, samples=512), malformed.Extra("T4", 7, samples=512))
    truth = malformed.write(
        tmp_path / "x.edf",
        np.random.default_rng(5),
        extras=extras,
        onsets_s=malformed.GAP_S,
        events=((120.0, 1.0, "late"),),
    )
    build_cache.build(Config((tmp_path / "x.edf",), tmp_path / "cache", channels="T7,T8", reference="none", workers=1))
    cache = Cache(tmp_path / "cache")
    assert cache.recordings[0].segments == ((0, 1500), (1500, 3000)) and truth.rate_hz == 256
    assert [(e.onset_s, e.label) for e in cache.events(0)] == [(20.0, "late")]
    header = read_header(tmp_path / "x.edf")
    x_CT = read_signals(header, [6, 7])
    resample = Spectral(512, 100, (0.5, 45.0), None)
    expected_CT = np.concatenate([resample(x_CT[:, :7680]), resample(x_CT[:, 7680:])], axis=1)
    found_CT = cache.read([0], [0], 3000, unit="uV").x_BCT[0].numpy()
    np.testing.assert_allclose(found_CT, expected_CT, rtol=1e-3, atol=0.03)


def test_what_could_not_be_read_is_tried_again(judged, tmp_path):
    shutil.copytree(judged.cache, tmp_path / "cache")
    np.save(judged.raw.parent / "fetched.npy", clean_uv().T.astype(np.float32))
    (judged.raw / "arrays" / "forbidden.npy").chmod(0o600)
    result = build_cache.build(Config(judged.sources, tmp_path / "cache", workers=1))
    assert {"dangling", "forbidden"} <= rows(tmp_path / "cache").keys() and "unreadable" not in codes(
        tmp_path / "cache"
    ).values()
    assert result["recordings"] == len(rows(tmp_path / "cache"))


def test_a_recording_mangled_by_a_line_ending_conversion_is_refused(data_dir, tmp_path):
    with pytest.raises(Unusable, match=r"nothing could be cached \(1 line_endings\)"):
        build_cache.main(Config((data_dir / "damaged",), tmp_path / "cache", workers=1))
    assert not (tmp_path / "cache" / "manifest.json").exists()
