"""
Data sets as they come: HBN and TUSZ releases and vibration archives made on the spot, and the real recordings of `data_dir`.

Shapes: C channels, T samples.
"""

import json
import shutil
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.io import savemat

import build_cache
from lib import channels, store
from lib.cache import Cache
from lib.edf import write_edf
from lib.edf_header import format_header
from lib.errors import Unusable
from lib.filters import Spectral
from lib.sources import discover
from tests.recipes import noise_uv, run

RULES = Path(__file__).parent / "datasets"


def build(source: Path, cache: Path, **options) -> dict:
    """A build without a process of its own but for its worker, in half the time of `recipes.run`; returns its results."""
    return build_cache.build(build_cache.Config(source=(source,), cache=cache, workers=1, **options))


def row_of(cache: Cache, part: str) -> int:
    """The one recording whose key holds `part`."""
    (row,) = (i for i, r in enumerate(cache.recordings) if part in r.key)
    return row


def signal(cache: Cache, row: int) -> np.ndarray:
    """One recording, x_CT in the unit of its cache."""
    return cache.read([row], [0], cache.recordings[row].samples, unit=cache.unit).x_BCT[0].numpy()


def events(cache: Cache, row: int, *labels: str) -> list[tuple]:
    return [(e.onset_s, e.duration_s, e.label) for e in cache.events(row) if not labels or e.label in labels]


# ----------------------------------------------------------------------------------------------------------------------
# HBN: BIDS, 129 channels at 500 Hz, .set with and without .fdt

HBN_HZ, HBN_S = 500, 8
ELECTRODES = (*(f"E{i}" for i in range(1, 129)), "Cz")  # the reference is in the files, as zeros
PEOPLE = """participant_id\trelease_number\tsex\tage\tehq_total\tcommercial_use\tfull_pheno\tp_factor\tattention\tinternalizing\texternalizing\tRestingState
sub-NDARAA001AAA\tR1\tM\t9.2414\t95.53\tYes\tYes\t0.103\t-0.555\t-0.205\t0.123\tavailable
sub-NDARAB002BBB\tR1\tF\t13.35\tn/a\tYes\tNo\tn/a\tn/a\tn/a\tn/a\tunavailable
sub-NDARAC003CCC\tR1\tF\tn/a\t-40\tYes\tYes\t-1.5\t0\t2.25\t-0.75\tavailable
"""
FILM = [(0.5, "video_start"), (7.0, "video_stop")]
# task and run → events.tsv, and what of the common vocabulary (onset, duration, label) they imply
HBN = {
    "RestingState": (
        [
            (0.0, "resting_start"),
            (1.0, "instructed_toOpenEyes"),
            (3.0, "instructed_toCloseEyes"),
            (6.0, "instructed_toOpenEyes"),
            (7.5, "break cnt"),
        ],
        [(1.0, 2.0, "eyes_open"), (3.0, 3.0, "eyes_closed"), (6.0, 1.5, "eyes_open")],
    ),
    "DespicableMe": (FILM, [(0.5, 6.5, "movie:DespicableMe")]),
    "ThePresent": (FILM, [(0.5, 6.5, "movie:ThePresent")]),
    "DiaryOfAWimpyKid": (FILM[:1], [(0.5, 7.5, "movie:DiaryOfAWimpyKid")]),  # without its stop: to the end of the file
    "FunwithFractals": (FILM, [(0.5, 6.5, "movie:FunwithFractals")]),
    **{
        f"contrastChangeDetection_run-{run}": (
            [
                (0.25, "contrastChangeB1_start"),
                (1.0, "contrastTrial_start"),
                (2.0, "left_target"),
                (2.75, "left_buttonPress"),
                (2.9, "left_buttonPress"),
                (4.0, "contrastTrial_start"),
                (5.0, "right_target"),
                (6.5, "contrastTrial_start"),
            ],
            [(2.0, 0.0, "stimulus"), (2.75, 0.0, "response"), (5.0, 0.0, "stimulus")],
        )
        for run in (1, 2, 3)
    },
    **{f"surroundSupp_run-{run}": ([(1.0, "fixpoint_ON"), (2.0, "stim_ON")], []) for run in (1, 2)},
    "seqLearning6target": ([(1.0, "seqLearning_start"), (2.0, "dot_no1_ON"), (2.5, "dot_no1_OFF")], []),
    "seqLearning8target": ([(1.0, "seqLearning_start"), (2.0, "dot_no7_ON")], []),
    "symbolSearch": ([(1.0, "symbolSearch_start"), (3.0, "newPage"), (4.0, "trialResponse")], []),
}
VOCABULARY = ("eyes_open", "eyes_closed", "stimulus", "response", *(f"movie:{task}" for task in HBN))


def write_set(path: Path, x_CT: np.ndarray, names: tuple[str, ...], beside: bool) -> None:
    """An EEGLAB data set as HBN releases hold it, with its signal inside or in an .fdt."""
    places = np.zeros(len(names), [("labels", "O"), ("X", "O"), ("Y", "O"), ("Z", "O")])
    for place, name in zip(places, names, strict=True):
        x, y, z = 100 * np.array(channels.POSITIONS[name])  # EEGLAB: the nose is +X, cm
        place["labels"], place["X"], place["Y"], place["Z"] = name, y, -x, z
    data = np.asarray(x_CT, np.float32)
    if beside:
        data.T.tofile(path.with_suffix(".fdt"))
    eeg = {"setname": path.stem, "nbchan": len(names), "pnts": x_CT.shape[1], "trials": 1, "srate": float(HBN_HZ)}
    eeg |= {"data": path.with_suffix(".fdt").name if beside else data, "chanlocs": places, "event": [], "xmin": 0.0}
    savemat(path, {"EEG": eeg})


def hbn_uv(seed: int) -> np.ndarray:
    x_CT = noise_uv(np.random.default_rng(seed), len(ELECTRODES), HBN_S * HBN_HZ)
    x_CT[-1] = 0
    return x_CT


def plant_hbn(root: Path) -> None:
    """Subject 1 did every task; 2 lacks two electrodes, and 3 lacks twenty in one recording and has EDF files."""
    root.mkdir()
    (root / "dataset_description.json").write_text('{"Name": "HBN-EEG", "BIDSVersion": "1.9.0"}')
    (root / "participants.tsv").write_text(PEOPLE)
    subjects = ("NDARAA001AAA", "NDARAB002BBB", "NDARAC003CCC")
    for number, (task, (rows, _)) in enumerate(HBN.items()):
        for subject in subjects if task in ("RestingState", "ThePresent") else subjects[:1]:
            stem = root / f"sub-{subject}" / "eeg" / f"sub-{subject}_task-{task}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            path, x_CT = Path(f"{stem}_eeg.set"), hbn_uv(number)
            if subject == subjects[0]:
                write_set(path, x_CT, ELECTRODES, beside=number % 2 == 0)
            elif subject == subjects[1]:
                taken = [c for c, name in enumerate(ELECTRODES) if name not in ("E14", "E17")]
                write_set(path, x_CT[taken], tuple(ELECTRODES[c] for c in taken), beside=True)
            else:
                taken = [c for c in range(129) if task == "RestingState" or not 30 <= c < 50]
                write_edf(path.with_suffix(".edf"), x_CT[taken], HBN_HZ, [ELECTRODES[c] for c in taken])
            text = "".join(f"{onset}\tn/a\t{value}\t{i}\tn/a\n" for i, (onset, value) in enumerate(rows))
            Path(f"{stem}_events.tsv").write_text("onset\tduration\tvalue\tevent_code\tfeedback\n" + text)


@pytest.fixture(scope="module")
def hbn(tmp_path_factory):
    root = tmp_path_factory.mktemp("hbn")
    plant_hbn(root / "ds005505")
    code, result, stderr = run("--source", root / "ds005505", "--cache", root / "hbn128", "--channels", "hbn128")
    assert code == 3, stderr
    everything = build(root / "ds005505", root / "all")
    return SimpleNamespace(root=root, hbn128=result, everything=everything)


def test_hbn_recordings_tasks_and_electrodes(hbn):
    files = len(HBN) + 2 * 2
    assert (hbn.everything["recordings"], hbn.everything["subjects"], hbn.everything["quarantined"]) == (files, 3, 0)
    assert hbn.everything["channels"] == {109: 1, 127: 2, 129: files - 3}
    assert hbn.hbn128["recordings"] == files - 1 and hbn.hbn128["quarantined_by_code"] == {"missing_channel": 1}
    cost = hbn.hbn128["missing_electrodes"]
    assert cost["electrodes"] == {"E14": 2, "E17": 2} and cost["interpolated"] == 2 and cost["masked"] == 0
    assert cost["rejected"] == 1 and "E31, E32" in next(iter(cost["rejected_for"]))

    cache = Cache(hbn.root / "hbn128")
    assert {r.names for r in cache.recordings} == {tuple(f"E{i}" for i in range(1, 129))}
    tasks = {task.split("_")[0] for task in HBN}
    assert len(tasks) == 10 and set(cache.column("task")) == tasks
    runs = {(r.task, r.run) for r in cache.recordings if r.run}
    assert runs == {("contrastChangeDetection", n) for n in "123"} | {("surroundSupp", n) for n in "12"}
    batch = cache.windows().read(range(4))
    assert batch.mask_BC.all() and batch.positions_BC3.isfinite().all() and batch.x_BCT.shape == (4, 128, 400)


def test_hbn_signals_are_those_of_the_files(hbn):
    cache = Cache(hbn.root / "all")
    resample = Spectral(HBN_HZ, 100, (0.5, 45.0), None)
    for number, task in ((0, "RestingState"), (1, "DespicableMe")):  # with and without .fdt
        row = row_of(cache, f"sub-NDARAA001AAA_task-{task}_eeg.set")
        recording = cache.recordings[row]
        good_C = np.array([name != "Cz" for name in recording.names])  # flat: masked, and not in the average
        expected_CT = resample(hbn_uv(number)[[ELECTRODES.index(n) for n in recording.names]].astype(np.float32))
        expected_CT -= expected_CT[good_C].mean(0)
        batch = cache.read([row], [0], recording.samples, unit="uV")
        assert (batch.mask_BC[0].numpy() == good_C).all()
        np.testing.assert_allclose(batch.x_BCT[0].numpy()[good_C], expected_CT[good_C], rtol=1e-3, atol=0.03)
    written = signal(cache, row_of(cache, "sub-NDARAC003CCC_task-RestingState"))
    read = signal(cache, row_of(cache, "sub-NDARAA001AAA_task-RestingState"))
    np.testing.assert_allclose(written, read, atol=0.05)  # EDF has 16 bits


def test_hbn_events_become_the_common_vocabulary(hbn):
    for name in ("hbn128", "all"):
        cache = Cache(hbn.root / name)
        for task, (rows, implied) in HBN.items():
            row = row_of(cache, f"sub-NDARAA001AAA_task-{task}_eeg.set")
            assert events(cache, row, *VOCABULARY) == implied
            own = [(e.onset_s, e.label) for e in cache.events(row) if e.label not in VOCABULARY]
            assert own == sorted(rows)  # nothing of the data set's own labels is lost
        trials = cache.events(row_of(cache, "task-contrastChangeDetection_run-2"))
        times = [(e.label, e.value) for e in trials if e.label in ("stimulus", "response")]
        assert (
            times[:2] == [("stimulus", 0.75), ("response", 0.75)]
            and times[2][0] == "stimulus"
            and np.isnan(times[2][1])
        )


def test_hbn_traits_are_numbers_or_missing(hbn):
    cache = Cache(hbn.root / "hbn128")
    rows = {r.subject.rsplit("/", 1)[1]: i for i, r in enumerate(cache.recordings)}
    expected = {
        "age": (9.2414, 13.35, None),
        "sex": ("M", "F", "F"),
        "ehq_total": (95.53, None, -40.0),
        "p_factor": (0.103, None, -1.5),
        "attention": (-0.555, None, 0.0),  # a 0 is a value
        "internalizing": (-0.205, None, 2.25),
        "externalizing": (0.123, None, -0.75),
    }
    for trait, values in expected.items():
        assert tuple(cache.column(trait)[rows[subject]] for subject in sorted(rows)) == values, trait


# ----------------------------------------------------------------------------------------------------------------------
# TUSZ: EDF trees with .csv_bi and .csv, montages that lack electrodes

TUSZ_S = 40
TUH_NAMES = "FP1 FP2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T3 T4 T5 T6 FZ CZ PZ A1 A2".split()
MIDLINE, EARS = ("FZ", "PZ"), ("A1", "A2")
# place in the tree: rate in Hz, electrodes that lack, seizures in s
TUSZ = {
    "train/aaaaaaaa/s001_2002/01_tcp_ar/aaaaaaaa_s001_t000": (256, (), [(10.0, 22.0), (30.0, 31.5)]),
    "train/aaaaaaaa/s002_2003/02_tcp_le/aaaaaaaa_s002_t000": (250, (), []),
    "train/aaaaaaab/s001_2004/03_tcp_ar_a/aaaaaaab_s001_t000": (256, EARS, [(0.0, 7.98)]),
    "train/aaaaaaac/s001_2005/04_tcp_le_a/aaaaaaac_s001_t000": (400, EARS, []),
    "train/aaaaaaag/s001_2006/01_tcp_ar/aaaaaaag_s001_t000": (256, (*MIDLINE, *EARS, "T5"), []),
    "dev/aaaaaaad/s003_2009/01_tcp_ar/aaaaaaad_s003_t001": (256, MIDLINE, [(20.0, 40.0)]),
    "dev/aaaaaaae/s001_2010/03_tcp_ar_a/aaaaaaae_s001_t000": (256, (*MIDLINE, *EARS), []),
    "dev/aaaaaaah/s001_2010/01_tcp_ar/aaaaaaah_s001_t000": (256, (), None),  # no .csv_bi
    "eval/aaaaaaaf/s001_2012/01_tcp_ar/aaaaaaaf_s001_t000": (512, (), [(3.0, 5.0)]),
}
CHANNEL_ROWS = "FP1-F7,5.0,9.0,fnsz,1.0\nF7-T3,6.0,14.0,fnsz,1.0\nT3-T5,0.0,40.0,bckg,1.0\n"
TUSZ_HEAD = "# version = csv_v1.0.0\n# bname = {}\n# duration = 40.0000 secs\n# montage_file = x\n#\nchannel,start_time,stop_time,label,confidence\n"


def write_csv_bi(edf: Path, seizures: list[tuple[float, float]]) -> None:
    """All of a recording as rows of seizure and background."""
    edges = [0.0, *(t for pair in seizures for t in pair), float(TUSZ_S)]
    spans = [(a, b, "seiz" if i % 2 else "bckg") for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))]
    rows = [f"TERM,{a:.4f},{b:.4f},{label},1.0000\n" for a, b, label in spans if b > a]
    edf.with_suffix(".csv_bi").write_text(TUSZ_HEAD.format(edf.stem) + "".join(rows))


def plant_tusz(root: Path) -> None:
    for number, (place, (rate_hz, lacking, seizures)) in enumerate(TUSZ.items()):
        path = root / "edf" / f"{place}.edf"
        path.parent.mkdir(parents=True, exist_ok=True)
        reference = "LE" if "_le" in place else "REF"
        names = [f"EEG {name}-{reference}" for name in TUH_NAMES if name not in lacking]
        names += [f"EEG EKG1-{reference}", f"EEG 31-{reference}", "PHOTIC-REF", "IBI", "BURSTS", "SUPPR"]
        x_CT = noise_uv(np.random.default_rng(number), len(names), TUSZ_S * rate_hz)
        write_edf(path, x_CT, rate_hz, names)
        path.with_suffix(".csv").write_text(TUSZ_HEAD.format(path.stem) + CHANNEL_ROWS)
        if seizures is not None:
            write_csv_bi(path, seizures)


def count_windows(seizures: list[tuple[float, float]], window_s: int = 4, stride_s: int = 2) -> dict[str, int]:
    """By hand: the share of every window that is seizure."""
    shares = [
        sum(max(0.0, min(stop, t + window_s) - max(start, t)) for start, stop in seizures) / window_s
        for t in range(0, TUSZ_S - window_s + 1, stride_s)
    ]
    full = sum(share >= 0.99 for share in shares)
    return {"full": full, "partial": sum(share > 0 for share in shares) - full, "none": shares.count(0)}


def added(counts: list[dict]) -> dict[str, int]:
    return {name: sum(c[name] for c in counts) for name in ("full", "partial", "none")}


@pytest.fixture(scope="module")
def tusz(tmp_path_factory):
    root = tmp_path_factory.mktemp("tusz")
    plant_tusz(root / "tusz")
    code, result, stderr = run("--source", root / "tusz", "--cache", root / "cache", "--channels", "tuh21")
    assert code == 3, stderr
    return SimpleNamespace(raw=root / "tusz", cache=root / "cache", result=result)


def test_tusz_splits_montages_and_seizures(tusz):
    assert tusz.result["quarantined_by_code"] == {"labels_missing": 1, "missing_channel": 1}
    cache = Cache(tusz.cache)
    assert len(cache.recordings) == len(TUSZ) - 2 and tusz.result["seizure_sources"] == ["tusz"]
    for place, (_, lacking, seizures) in TUSZ.items():
        if seizures is None or len(lacking) > 4:
            continue
        row = row_of(cache, place)
        recording = cache.recordings[row]
        folder, patient, session, montage, _ = place.split("/")
        assert recording.split == {"train": "train", "dev": "val", "eval": "test"}[folder]
        assert recording.subject == f"tusz/{patient}" and recording.session == session.split("_")[0]
        assert recording.columns["montage"] == montage and recording.samples == TUSZ_S * 100
        assert recording.names == channels.PROFILES["tuh21"].channels
        assert events(cache, row) == [(start, round(stop - start, 6), "seizure") for start, stop in seizures]


def test_tusz_windows_are_counted_as_by_hand(tusz):
    kept = {place: s for place, (_, lacking, s) in TUSZ.items() if s is not None and len(lacking) <= 4}
    assert tusz.result["windows"] == added([count_windows(s) for s in kept.values()])
    assert tusz.result["windows"]["full"] == 5 + 3 + 9  # 10 … 18 s; 0 … 4 s, the last by 0.995; 20 … 36 s
    for folder, split in (("train", "train"), ("dev", "val"), ("eval", "test")):
        own = added([count_windows(s) for place, s in kept.items() if place.startswith(folder)])
        assert tusz.result["splits"][split]["windows"] == own
    cache = Cache(tusz.cache)
    assert len(cache.windows()) == sum(tusz.result["windows"].values())


@pytest.mark.parametrize("profile", ["tuh21", "tuh19"])
@pytest.mark.parametrize("missing", ["reject", "interpolate", "mask"])
def test_tusz_policies_for_missing_electrodes_and_what_they_cost(tusz, tmp_path, profile, missing):
    result = build(tusz.raw, tmp_path / "cache", channels=profile, missing=missing, rate_hz=50, band_hz=(0.5, 20.0))
    wanted = channels.PROFILES[profile].channels
    limit = 0 if missing == "reject" else channels.PROFILES[profile].max_missing
    lacks = {
        place: [n for n in map(channels.canonical, lacking) if n in wanted] for place, (_, lacking, _) in TUSZ.items()
    }
    kept = {place: names for place, names in lacks.items() if len(names) <= limit and "aaaaaaah" not in place}
    incomplete = [names for names in kept.values() if names]
    cost = result["missing_electrodes"]
    assert result["recordings"] == len(kept)
    assert cost["electrodes"] == {n: k for n in wanted if (k := sum(n in names for names in incomplete))}
    assert cost["interpolated"] == len(incomplete) * (missing == "interpolate")
    assert cost["masked"] == len(incomplete) * (missing == "mask")
    assert cost["rejected"] == len(TUSZ) - 1 - len(kept) == result["quarantined_by_code"].get("missing_channel", 0)
    assert sum(cost["rejected_for"].values()) == cost["rejected"]

    cache = Cache(tmp_path / "cache")
    for place, names in kept.items():
        row = row_of(cache, place)
        batch = cache.read([row], [0], 2000, unit="uV")
        x_CT, mask_C = batch.x_BCT[0].numpy(), batch.mask_BC[0].numpy()
        lacking = np.isin(wanted, names)
        assert (mask_C == (True if missing == "interpolate" else ~lacking)).all()
        assert (x_CT[~mask_C] == 0).all() and (x_CT[mask_C].std(1) > 1).all()
        if lacking.any() and missing == "interpolate":
            there = [n for n in wanted if n not in names]
            expected_CT = channels.spline_weights(there, [n for n in wanted if n in names]) @ x_CT[~lacking]
            np.testing.assert_allclose(x_CT[lacking], expected_CT, atol=0.1)


def test_a_seizure_split_without_a_seizure_is_refused(tusz, tmp_path):
    raw, cache = tmp_path / "tusz", tmp_path / "cache"
    shutil.copytree(tusz.raw, raw)
    shutil.copytree(tusz.cache, cache)
    for path in raw.rglob("train/**/*.edf"):
        write_csv_bi(path, [])
    code, result, stderr = run("--source", raw, "--cache", cache, "--channels", "tuh21")
    assert code == 2 and result is None and "--allow-no-seizures" in stderr and "Traceback" not in stderr
    assert not (cache / "manifest.json").exists()  # the one of before is gone too
    result = build(raw, cache, channels="tuh21", allow_no_seizures=True)
    assert result["built"] == 0 and result["splits"]["train"]["windows"]["full"] == 0
    assert Cache(cache).intervals("seizure")[0].size == 2  # those of dev and eval


def test_channel_labels_are_a_union_only_when_asked(tusz, tmp_path):
    assert not any("aaaaaaah" in r.key for r in Cache(tusz.cache).recordings)
    shutil.copytree(tusz.cache, tmp_path / "cache")
    result = build(tusz.raw, tmp_path / "cache", channels="tuh21", channel_labels=True)
    assert result["built"] == 0 and result["recordings"] == tusz.result["recordings"] + 1
    before, cache = Cache(tusz.cache), Cache(tmp_path / "cache")
    assert events(cache, row_of(cache, "aaaaaaah")) == [(5.0, 9.0, "seizure")]
    for row, recording in enumerate(before.recordings):  # where there is a .csv_bi, it alone counts
        assert events(cache, row_of(cache, recording.key)) == events(before, row)


def test_labels_of_what_is_cropped_away_refuse_nothing(tusz, tmp_path):
    place = "train/aaaaaaaa/s001_2002/01_tcp_ar"
    shutil.copytree(tusz.raw / "edf" / place, tmp_path / "tusz" / place)
    (tmp_path / "tusz" / "dataset.toml").write_text("[crop]\nsession.s001 = [5, 25]\n")
    result = build(tmp_path / "tusz", tmp_path / "cache", channels="tuh21")
    cache = Cache(tmp_path / "cache")
    assert cache.recordings[0].samples == 2000
    assert events(cache, 0) == [(5.0, 12.0, "seizure")]  # 10 … 22 s of the recording; 30 … 31.5 s are cut off
    assert result["notes"]["label_out_of_range"] == 1
    assert not any(note.startswith("seizure rows clipped") for note in result["notes"])  # the label file is right


# ----------------------------------------------------------------------------------------------------------------------
# Public sets in miniature: names, layout and oddities of the real ones, the recipes of tests/datasets

EVENING = datetime(1989, 4, 24, 16, 13)
NIGHT = [(0, 30, "Sleep stage W"), (30, 60, "Sleep stage 2"), (90, 30, "Sleep stage R"), (120, 900, "Sleep stage ?")]


def write_annotations(path: Path, events, start: datetime = EVENING) -> None:
    """An EDF+ of annotations alone, in one record that lasts no time, as hypnograms are published."""
    tals = b"+0\x14\x14\0" + b"".join(f"+{o}\x15{d}\x14{text}\x14\0".encode() for o, d, text in events)
    tals += b"\0" * (len(tals) % 2)
    header = format_header([], "uV", [], 1, len(tals) // 2, "EDF+C", 1, 0, start, "X F X Female_33yr")
    path.write_bytes(header + tals)


def test_sleep_edf_hypnograms_are_the_annotations_of_their_recordings(tmp_path):
    nights = tmp_path / "sleep-edf" / "sleep-cassette"
    nights.mkdir(parents=True)
    for name, scorer, later_s in (("SC4001E", "C", 0), ("SC4002E", "C", 10), ("SC4011E", "H", 0)):
        x_CT = noise_uv(np.random.default_rng(0), 2, 120 * 100)
        write_edf(nights / f"{name}0-PSG.edf", x_CT, 100, ["EEG Fpz-Cz", "EEG Pz-Oz"], start=EVENING)
        write_annotations(nights / f"{name}{scorer}-Hypnogram.edf", NIGHT, EVENING + timedelta(seconds=later_s))
    write_annotations(nights / "SC4012EC-Hypnogram.edf", NIGHT)  # its recording is missing
    result = build(nights.parent, tmp_path / "cache", dataset=(RULES / "sleep_edf.toml",))
    assert (result["recordings"], result["subjects"]) == (3, 2)
    assert result["quarantined_by_code"] == {"no_pattern_match": 1}
    cache = Cache(tmp_path / "cache")
    night = [(0.0, 30.0, "W"), (30.0, 60.0, "N2"), (90.0, 30.0, "R")]
    assert events(cache, row_of(cache, "SC4001E0")) == events(cache, row_of(cache, "SC4011E0")) == night
    late = events(cache, row_of(cache, "SC4002E0"))  # its clock runs from a later start, and what ends later is cut
    assert late == [(10.0, 30.0, "W"), (40.0, 60.0, "N2"), (100.0, 20.0, "R")]
    assert {(r.subject, r.session) for r in cache.recordings} == {("sleep-edf/SC400", s) for s in "12"} | {
        ("sleep-edf/SC401", "1")
    }


def test_annotations_are_taken_only_by_the_recording_of_their_name(tmp_path):
    x_CT = noise_uv(np.random.default_rng(0), 1, 1000)
    for name in ("SN001", "SN003", "SN004", "SN004_annotations"):
        write_edf(tmp_path / f"{name}.edf", x_CT, 100, ["C3"])
    write_annotations(tmp_path / "SN001_sleepscoring.edf", NIGHT)
    write_annotations(tmp_path / "SN002_sleepscoring.edf", NIGHT)
    found = {s.path.stem: [p.name for p in s.label_files] for s in discover([tmp_path]).sources}
    assert found == {
        "SN001": ["SN001_sleepscoring.edf"],
        "SN002_sleepscoring": [],  # of no recording here: to be refused
        "SN003": [],
        "SN004": [],
        "SN004_annotations": [],  # holds a signal
    }


def test_bids_electrode_positions_in_any_unit_and_system(tmp_path):
    """An EasyCap, whose electrodes are numbered, and a BioSemi cap, whose A1 is no ear lobe and whose C3 is not C3."""
    sites = ("Cz", "FC1", "FC2", "C1", "C2", "CP1", "Oz", "Pz")
    caps = {"easycap": [f"{i}" for i in range(1, 9)], "biosemi": ["A1", "A2", "A3", "A4", "B1", "C3", "F3", "EXG1"]}
    systems = {"01": ("CapTrak", "mm"), "02": ("EEGLAB", "cm"), "03": ("CTF", "m"), "04": ("Other", "mm"), "05": None}
    for cap, names in caps.items():
        for subject, system in systems.items():
            eeg = tmp_path / cap / f"sub-{subject}" / "eeg"
            eeg.mkdir(parents=True)
            stem = f"sub-{subject}_task-rest"
            write_edf(eeg / f"{stem}_eeg.edf", noise_uv(np.random.default_rng(0), 8, 1000), 200, names)
            if system:
                unit = {"mm": 1000, "cm": 100, "m": 1}[system[1]]
                table = ["name\tx\ty\tz\timpedance"]
                for name, site in zip(names[:7], sites, strict=False):
                    x, y, z = np.multiply(channels.POSITIONS[site], unit)
                    place = (x, y, z) if system[0] == "CapTrak" else (y, -x, z)
                    table.append("\t".join([name, *(f"{v:.6f}" for v in place), "n/a"]))
                of = f"sub-{subject}_space-{system[0]}"
                (eeg / f"{of}_electrodes.tsv").write_text("\n".join([*table, f"{names[7]}\tn/a\tn/a\tn/a\tn/a"]))
                about = {"EEGCoordinateSystem": system[0], "EEGCoordinateUnits": system[1]}
                (eeg / f"{of}_coordsystem.json").write_text(json.dumps(about))
        result = build(tmp_path / cap, tmp_path / f"{cap}-cache")
        assert result["recordings"] == 5 and result["notes"]["electrode positions not taken"] == 1
        cache = Cache(tmp_path / f"{cap}-cache")
        electrodes = names if cap == "easycap" else names[:7]
        for subject in systems:
            recording = cache.recordings[row_of(cache, f"sub-{subject}_")]
            assert recording.names == tuple(electrodes)
            places_CT = cache.read([row_of(cache, f"sub-{subject}_")], [0], 100).positions_BC3[0].numpy()
            expected = [channels.POSITIONS[s] if subject < "04" else [np.nan] * 3 for s in sites[: len(electrodes)]]
            if cap == "easycap":
                expected[7] = [np.nan] * 3
            np.testing.assert_allclose(places_CT, expected, atol=2e-5)


def test_numbered_electrodes_get_their_names(tmp_path):
    """BCI Competition IV 2a: five electrodes have names, and the others were left out without a word."""
    given = "Fz 0 1 2 3 4 5 C3 6 Cz 7 C4 8 9 10 11 12 13 14 Pz 15 16".split()
    names = [*(f"EEG-{n}" for n in given), "EOG-left", "EOG-central", "EOG-right"]
    for name in ("A01T", "A01E", "A02T"):
        x_CT = noise_uv(np.random.default_rng(0), 25, 10 * 250)
        (tmp_path / "2a").mkdir(exist_ok=True)
        write_edf(tmp_path / "2a" / f"{name}.edf", x_CT, 250, names, [(2.0, 0.0, "769")], patient=f"{name} X X X")
    result = build(tmp_path / "2a", tmp_path / "without")
    assert result["channels"] == {5: 3} and result["notes"]["channels of unknown name left out"] == 3
    rule = RULES / "bnci2014_001.toml"
    result = build(tmp_path / "2a", tmp_path / "cache", dataset=(rule,))
    assert result["channels"] == {22: 3} and set(result["notes"]) == {"all subjects are train"}
    cache = Cache(tmp_path / "cache")
    expected = "Fz FC3 FC1 FCz FC2 FC4 C5 C3 C1 Cz C2 C4 C6 CP3 CP1 CPz CP2 CP4 P1 Pz P2 POz"
    assert cache.recordings[0].names == tuple(expected.split())
    assert events(cache, 0) == [(2.0, 0.0, "left hand")]
    expected_CT = Spectral(250, 100, (0.5, 45.0))(x_CT[:22].astype(np.float32))
    np.testing.assert_allclose(signal(cache, 0), expected_CT - expected_CT.mean(0), atol=0.5)
    (tmp_path / "wrong.toml").write_text(rule.read_text().replace("EEG-16 =", "EEG-61 ="))
    result = build(tmp_path / "2a", tmp_path / "cache", dataset=(tmp_path / "wrong.toml",))
    assert result["channels"] == {21: 3} and result["notes"]["channels to rename are not there"] == 3


def test_headsets_csv(tmp_path):
    """Emotiv, Muse (Mind Monitor) and OpenBCI: of all their columns only the electrodes are signals."""
    rng, seconds = np.random.default_rng(0), 8

    def write(path: Path, top: str, columns: dict, separator: str = ",") -> None:
        path.parent.mkdir(parents=True)
        rows = zip(
            *([f"{v:.6f}" if isinstance(v, float) else str(v) for v in list(c)] for c in columns.values()), strict=True
        )
        header = separator.join(name.split("|")[0] for name in columns)
        path.write_text(top + "\n".join([header, *map(separator.join, rows)]) + "\n")

    T, sites = 128 * seconds, ("AF3", "F7", "O1", "AF4")
    columns = {"Timestamp": 1617177000 + np.arange(T) / 128, "EEG.Counter": np.arange(T) % 128}
    columns |= {f"EEG.{s}": 4200 + x_T for s, x_T in zip(sites, noise_uv(rng, 4, T), strict=True)}
    columns |= {"MarkerIndex": [""] * T, "EEG.RawCq": [0] * T, "CQ.AF3": [4] * T, "POW.AF3.Theta": rng.normal(9, 1, T)}
    write(tmp_path / "emotiv" / "S1_rest_EPOCX_2021.md.csv", "title:S1_rest,headset type:EPOCX,version:2.2\n", columns)

    T, sites = 256 * seconds, ("TP9", "AF7", "AF8", "TP10")
    columns = {f"{band}_{s}": rng.normal(0.5, 0.1, T) for band in ("Delta", "Alpha") for s in sites}
    columns |= {f"RAW_{s}": 800 + x_T for s, x_T in zip(sites, noise_uv(rng, 4, T), strict=True)}
    columns |= {
        "AUX_RIGHT": [800] * T,
        "Accelerometer_X": rng.normal(0, 1, T),
        "HSI_TP9": [1] * T,
        "Battery": [80] * T,
        "Elements": [""] * T,
    }
    muse = tmp_path / "mindmonitor" / "mindMonitor_2021-03-01--10-00-00.csv"
    write(muse, "", columns)
    lines = muse.read_text().splitlines()  # remarks stand in rows of their own, and are no samples
    for row, remark in ((1025, "/Marker/1"), (513, "/muse/elements/blink"), (1, "/muse/event/connected")):
        lines.insert(row, "," * (len(columns) - 1) + remark)
    muse.write_text("\n".join(lines))

    T = 250 * seconds
    columns = {"Sample Index": np.arange(T) % 256}
    columns |= {f"EXG Channel {i}": x_T - 12e3 for i, x_T in enumerate(noise_uv(rng, 8, T))}
    columns |= {f"Accel Channel {i}": rng.normal(0, 1, T) for i in range(3)} | {
        f"Other|{i}": rng.normal(0, 1, T) for i in range(7)
    }
    columns |= {"Analog Channel 0": [0] * T, "Timestamp": 1616681273 + (np.arange(T) // 10) * 0.04}
    columns |= {"Timestamp (Formatted)": ["2021-03-25 14:07:53.123"] * T}
    top = "%OpenBCI Raw EXG Data\n%Number of channels = 8\n%Sample Rate = 250 Hz\n"
    write(tmp_path / "openbci" / "OpenBCISession_a" / "OpenBCI-RAW-2021.txt", top, columns, ", ")

    kit = ("Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2")
    wanted = {"emotiv": ("AF3", "F7", "O1", "AF4"), "mindmonitor": ("TP9", "AF7", "AF8", "TP10"), "openbci": kit}
    for name, electrodes in wanted.items():
        result = build(tmp_path / name, tmp_path / "cache" / name, dataset=(RULES / f"{name}.toml",))
        assert result["quarantined"] == 0
        cache = Cache(tmp_path / "cache" / name)
        assert (
            set(cache.recordings[0].names) == set(electrodes) and abs(cache.recordings[0].samples - 100 * seconds) < 2
        )
        remarks = [(2.0, "/muse/elements/blink"), (4.0, "/Marker/1")]
        found = [(onset_s, label) for onset_s, _, label in events(cache, 0)]
        assert found == (remarks if name == "mindmonitor" else []) and "short gaps interpolated" not in result["notes"]
        assert 5 < signal(cache, 0).std() < 40


def recipe(name: str) -> str:
    """A shell command of docs/cache.md that turns a set's labels into events.tsv files."""
    page = (Path(__file__).parent.parent / "docs" / "cache.md").read_text()
    parts = page.split("```sh\n")[1].split("```")[0].split("# ")[1:]
    return "# " + next(part for part in parts if part.startswith(name))


@pytest.mark.skipif(not shutil.which("awk"), reason="the recipes are of sh and awk")
def test_recipes_of_the_page_make_events_of_labels_in_other_forms(tmp_path):
    bipolar = ["FP1-F7", "F7-T7", "T7-P7", "-", "T8-P8", "T8-P8"]
    x_CT = noise_uv(np.random.default_rng(0), 6, 60 * 256)
    x_CT[3], x_CT[5] = 0, x_CT[4]
    files = {
        "CHB-MIT": ["chb12/chb12_06.edf", "chb12/chb12_08.edf", "chb21/chb21_01.edf"],
        "TUEV": ["train/aaaaaaar/aaaaaaar_00000001.edf", "eval/000/bckg_000_a_.edf"],
        "Helsinki": ["eeg1.edf", "eeg7.edf"],
    }
    for name, paths in files.items():
        for path in paths:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            names = (
                bipolar
                if name == "CHB-MIT"
                else ["EEG Fp1-Ref", "EEG F3-Ref", "EEG C3-Ref", "ECG EKG", "EEG O1-Ref", "EEG O2-Ref"]
            )
            write_edf(tmp_path / name / path, x_CT, 256, names)
    chb = tmp_path / "CHB-MIT"
    none = "File Name: {}\r\nFile Start Time: 11:42:54\r\nNumber of Seizures in File: {}\r\n"
    text = none.format("chb12_06.edf", 2) + "".join(
        f"Seizure {i} Start Time: {a} seconds\r\nSeizure {i} End Time: {b} seconds\r\n"
        for i, a, b in ((1, 10, 20), (2, 40, 45))
    )
    (chb / "chb12" / "chb12-summary.txt").write_text(text + none.format("chb12_08.edf", 0), newline="")
    text = none.format("chb21_01.edf", 1) + "Seizure Start Time:  20 seconds\nSeizure End Time: 50 seconds\n"
    (chb / "chb21" / "chb21-summary.txt").write_text(text)
    (chb / "SUBJECT-INFO").write_text("Case\tGender\tAge (years)\nchb01\tF\t11\nchb12\tF\t2\n")
    for path in files["TUEV"]:
        (tmp_path / "TUEV" / path).with_suffix(".rec").write_text("6,1.0,2.0,6\n7,3.0,4.5,1\n")
    rows = [f"{int(t in (30, 31))},{int(5 <= t < 8 or t >= 50)}" for t in range(60)]
    (tmp_path / "Helsinki" / "annotations_2017_A_fixed.csv").write_text("\n".join(["7,1", *rows]) + "\n")

    found = {}
    for name in files:
        subprocess.run(["sh", "-ec", recipe(name)], cwd=tmp_path / name, check=True)
        rule = {"CHB-MIT": (RULES / "chbmit.toml",)}.get(name, ())
        result = build(tmp_path / name, tmp_path / f"c-{name}", dataset=rule, reference="none")
        cache = Cache(tmp_path / f"c-{name}")
        found |= {r.key.split("/")[-1]: events(cache, i) for i, r in enumerate(cache.recordings)}
        if name == "CHB-MIT":
            assert {r.names for r in cache.recordings} == {("FP1-F7", "F7-T7", "T7-P7", "T8-P8")}
            assert {r.subject for r in cache.recordings} == {"chbmit/chb01", "chbmit/chb12"} and not result[
                "quarantined"
            ]
            assert "lists in words are not read, see Public data sets in docs/cache.md, left out" in result["notes"]
    labelled = [(1.0, 1.0, "6"), (3.0, 1.5, "1")]
    assert found == {
        "chb12_06.edf": [(10.0, 10.0, "seizure"), (40.0, 5.0, "seizure")],
        "chb12_08.edf": [],
        "chb21_01.edf": [(20.0, 30.0, "seizure")],
        "aaaaaaar_00000001.edf": labelled,
        "bckg_000_a_.edf": labelled,
        "eeg1.edf": [(5.0, 3.0, "seizure"), (50.0, 10.0, "seizure")],
        "eeg7.edf": [(30.0, 2.0, "seizure")],
    }


def test_seed_trials_are_events_of_one_recording(tmp_path):
    """An array per film, fifteen in a file, called by the initials of the subject; the labels are in a file of their own."""
    rng, seconds = np.random.default_rng(0), (4, 3, 5)
    folder = tmp_path / "Preprocessed_EEG"
    folder.mkdir()
    for name, initials in (("1_20131027", "djc"), ("1_20131030", "djc"), ("2_20140404", "jl")):
        films = {f"{initials}_eeg{i}": noise_uv(rng, 62, 200 * s) for i, s in enumerate(seconds, 9)}
        savemat(folder / f"{name}.mat", dict(reversed(films.items())))
    savemat(folder / "label.mat", {"label": [[1, 0, -1]]})
    result = build(tmp_path, tmp_path / "cache", dataset=(RULES / "seed.toml",))
    assert (result["recordings"], result["subjects"], result["quarantined"]) == (3, 2, 0)
    assert result["notes"]["arrays taken for trials, one after the other"] == 3
    cache = Cache(tmp_path / "cache")
    row = row_of(cache, "2_20140404")
    assert events(cache, row) == [
        (0.0, 4.0, "positive"),
        (4.0, 3.0, "positive"),
        (7.0, 5.0, "neutral"),
    ]  # films 9 to 11
    assert [s[:2] for s in cache.recordings[row].segments] == [(0, 400), (400, 700), (700, 1200)]
    expected_CT = Spectral(200, 100, (0.5, 45.0))(
        films["jl_eeg10"].astype(np.float32)
    )  # each film is filtered by itself
    stored_CT, order = signal(cache, row)[:, 400:700], cache.recordings[row].names
    assert order[:2] == ("Fp1", "Fpz") and {"CB1", "CB2"} < set(order)
    np.testing.assert_allclose(stored_CT[0], (expected_CT - expected_CT.mean(0))[0], atol=0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Vibration archives


def test_vibration_keeps_its_rate_and_unit(tmp_path):
    rng = np.random.default_rng(0)
    x_T = rng.normal(0, 0.3, 24_000).astype(np.float32)
    raw, rate_hz = tmp_path / "bearings", 12_000
    raw.mkdir()
    (raw / "dataset.toml").write_text(
        "pattern = '(?P<fault>[a-z]+)_(?P<subject>\\d+)\\.(?:npy|npz|mat)'\nkind = 'vibration'\nrate_hz = 12000\nunit = 'g'\n"
        "channels = ['DE']\n[values.fault]\nok = 'normal'\n"
    )
    np.save(raw / "ok_1.npy", x_T)
    np.savez(raw / "ball_2.npz", DE=x_T, rpm=1797)
    savemat(raw / "inner_97.mat", {"X097_DE_time": x_T[:, None], "X097_FE_time": -x_T[:, None], "X097RPM": [[1772]]})
    result = build(raw, tmp_path / "cache")
    assert result["recordings"] == 3 and result["quarantined"] == 0 and result["units"] == ["g"]
    cache = Cache(tmp_path / "cache")
    assert cache.rate_hz == rate_hz and cache.unit == "g" and cache.signal["reference"] == "none"
    assert cache.signal["band_hz"] is None and {r.names for r in cache.recordings} == {("DE",)}
    for row in range(3):
        np.testing.assert_allclose(signal(cache, row)[0], x_T, atol=1e-3)  # neither filtered nor referenced
    columns = {r.columns["fault"]: r.columns.get("rpm") for r in cache.recordings}
    assert columns == {"normal": None, "ball": 1797.0, "inner": 1772.0}
    assert len(cache.windows(window_s=0.1, stride_s=0.1)) == 3 * 20
    with pytest.raises(Unusable, match="EEG and vibration"):
        write_edf(tmp_path / "s01.edf", np.outer([1, 2], x_T[:2000]), 200, ["C3", "C4"])
        build_cache.main(build_cache.Config(source=(raw, tmp_path / "s01.edf"), cache=tmp_path / "both"))


def test_vibration_archives_that_name_their_arrays_in_other_ways(tmp_path):
    """MFPT: `sr` is the sampling rate and `rate` the shaft's. Paderborn: signals of several rates in an array of structures."""
    x_T = np.random.default_rng(0).normal(0, 0.3, 24_000)
    (tmp_path / "mfpt").mkdir()
    for name, rate_hz in (("baseline_1", 24_000), ("InnerRaceFault_vload_1", 12_000)):
        archive = {"sr": float(rate_hz), "gs": x_T[:, None], "load": 270.0, "rate": 25.0}
        savemat(tmp_path / "mfpt" / f"{name}.mat", {"bearing": archive})
    with pytest.raises(Unusable, match="--rate-hz is needed for vibration sources that state no rate_hz"):
        build(tmp_path / "mfpt", tmp_path / "c-mfpt", dataset=(RULES / "mfpt.toml",))
    result = build(tmp_path / "mfpt", tmp_path / "c-mfpt", dataset=(RULES / "mfpt.toml",), rate_hz=12_000)
    cache = Cache(tmp_path / "c-mfpt")
    assert result["recordings"] == 2 and sorted(r.samples for r in cache.recordings) == [12_000, 24_000]
    fact = {r.columns["fault"]: (r.columns["rate"], r.columns["load"]) for r in cache.recordings}
    assert fact == {"baseline": (25.0, 270.0), "InnerRaceFault": (25.0, 270.0)}

    name = "N09_M07_F10_KA01_1"
    (tmp_path / "paderborn" / "KA01").mkdir(parents=True)
    y = np.zeros((1, 3), [("Name", "O"), ("Data", "O"), ("Raster", "O")])
    signals = (("force", x_T[:1500], "Mech_4kHz"), ("phase_current_1", 2 * x_T, "HostService"))
    for place, (what, data, raster) in zip(y[0], (*signals, ("vibration_1", x_T, "HostService")), strict=True):
        place["Name"], place["Data"], place["Raster"] = what, data[None], raster
    savemat(tmp_path / "paderborn" / "KA01" / f"{name}.mat", {name: {"Info": {"Version": 1.0}, "Y": y}})
    build(tmp_path / "paderborn", tmp_path / "c-paderborn", dataset=(RULES / "paderborn.toml",))
    cache = Cache(tmp_path / "c-paderborn")
    np.testing.assert_allclose(signal(cache, 0), x_T[None], atol=1e-3)
    columns = cache.recordings[0].columns
    assert {k: columns[k] for k in ("speed", "fault", "torque")} == {"speed": 9.0, "fault": "KA", "torque": 7.0}


# ----------------------------------------------------------------------------------------------------------------------
# Real recordings, each with one fact about it that no test of ours made

EEG = ("eegmat", "eegmmidb", "ssvep_exo", "muse", "bonn", "bi2012", "xdf", "formats")


@pytest.fixture(scope="module")
def real(data_dir, tmp_path_factory):
    """One cache of all the real EEG, each folder under its rule."""
    folder = tmp_path_factory.mktemp("real") / "cache"
    rules = [RULES / f"{name}.toml" for name in EEG]
    words = ("--source", *(data_dir / name for name in EEG), "--dataset", *rules, "--cache", folder, "--workers", 2)
    code, result, stderr = run(*words)
    assert code == 3, stderr
    return SimpleNamespace(folder=folder, cache=Cache(folder), result=result, data=data_dir)


def part_of(real, row: int) -> dict:
    """What the builder noted of one recording."""
    key = store.key_hash(real.cache.recordings[row].key)
    return json.loads(next(real.folder.glob(f"*/parts/{key}.json")).read_text())["part"]


def rows_of(real, dataset: str) -> list[int]:
    return [i for i, r in enumerate(real.cache.recordings) if r.dataset == dataset]


def power(x_CT: np.ndarray, low_hz: float, high_hz: float, rate_hz: float = 100) -> np.ndarray:
    """Mean power of a band in each channel."""
    f_F = np.fft.rfftfreq(x_CT.shape[1], 1 / rate_hz)
    p_CF = np.abs(np.fft.rfft(x_CT * np.hanning(x_CT.shape[1]))) ** 2
    return p_CF[:, (f_F >= low_hz) & (f_F <= high_hz)].mean(1)


def test_all_real_eeg_in_one_cache(real):
    """recordings, channels, rate of the files, and seconds cached of each data set"""
    expected = {
        "eegmat": (20, {19}, {500.0}, 20 * 60),
        "eegmmidb": (6, {64}, {160.0}, 2 * 60 + 4 * 125),
        "ssvep_exo": (4, {8}, {256.0}, 982),
        "muse": (5, {4}, {256.0}, 958),
        "bonn": (160, {1}, {173.61}, 160 * 4097 / 173.61),
        "bi2012": (1, {16}, {128.0}, 46804 / 128),
        "xdf": (2, {4, 16}, {300.0, 256.0}, 244),
        "formats": (7, {3, 9, 16, 27, 30, 129}, {128.0, 200.0, 256.0, 500.0, 512.0}, 329.31),
    }
    for name, (count, widths, rates_hz, seconds) in expected.items():
        rows = rows_of(real, name)
        assert len(rows) == count == real.result["datasets"][name]
        assert {len(real.cache.recordings[i].names) for i in rows} == widths, name
        assert {part_of(real, i)["source_rate_hz"] for i in rows} == rates_hz, name
        assert sum(real.cache.recordings[i].samples for i in rows) / 100 == pytest.approx(seconds, rel=2e-3), name
    assert real.result["recordings"] == sum(count for count, *_ in expected.values())
    assert real.result["units"] == ["uV"] and real.cache.rate_hz == 100
    # a hypnogram has no signal; XDF streams without channel names can't be told from anything else
    assert real.result["quarantined_by_code"] == {"channels_missing": 2, "no_eeg_stream": 1, "no_signals": 1}


def test_eegmat(real):
    cache, rows = real.cache, rows_of(real, "eegmat")
    assert len({cache.recordings[i].subject for i in rows}) == 10
    assert {cache.recordings[i].samples for i in rows} == {6000}  # a minute of each
    row = row_of(cache, "Subject00_2.edf")
    assert [cache.column(name)[row] for name in ("task", "age", "sex", "quality")] == ["arithmetic", 21, "F", 0]
    assert set(cache.recordings[row].names) == set(channels.TEN_TWENTY)
    assert part_of(real, row)["dropped"] == ["EEG A2-A1", "ECG ECG"]
    scale_uv = [signal(cache, i).std() for i in rows]
    assert 3 < min(scale_uv) and max(scale_uv) < 60


def test_eegmmidb(real):
    cache = real.cache
    for run_, labels in (("01", ["T0"]), ("02", ["T0"]), ("03", ["T0", "T1", "T2"])):
        row = row_of(cache, f"S001R{run_}")
        assert sorted({e.label for e in cache.events(row)}) == labels
    cues = cache.events(row)
    assert len(cues) == 30 and [e.label for e in cues[::2]] == ["T0"] * 15
    assert all(
        a.onset_s + a.duration_s == pytest.approx(b.onset_s, abs=0.11) for a, b in zip(cues, cues[1:], strict=False)
    )
    alpha = []
    for run_ in ("01", "02"):  # eyes open, eyes closed: Berger's effect
        row = row_of(cache, f"S001R{run_}")
        occipital = [cache.recordings[row].names.index(name) for name in ("O1", "Oz", "O2")]
        alpha.append(power(signal(cache, row)[occipital], 8, 13).mean())
    assert alpha[1] > 4 * alpha[0]


def test_ssvep_follows_the_lamp(real):
    cache, ratios = real.cache, {}
    for row in rows_of(real, "ssvep_exo"):
        assert sorted(e.label for e in cache.events(row)) == sorted(["rest", "13 Hz", "17 Hz", "21 Hz"] * 8)
        x_CT = signal(cache, row)
        for event in cache.events(row):
            start = round(event.onset_s * 100) + 100
            for hz in (13, 17, 21):
                trial_CT = x_CT[:, start : start + 400]
                line, beside = power(trial_CT, hz, hz).mean(), power(trial_CT, hz - 1.5, hz + 1.5).mean()
                ratios.setdefault((hz, event.label), []).append(line / beside)
    for hz in (13, 17, 21):
        assert np.mean(ratios[hz, f"{hz} Hz"]) > 1.5 * np.mean(ratios[hz, "rest"])


def test_muse_markers_are_where_the_table_has_them(real):
    row = row_of(real.cache, "subject102_session1")
    text = (real.data / real.cache.recordings[row].key).read_text().splitlines()
    cells = [line.split(",") for line in text]
    marks = [(i, int(float(c[-1]))) for i, c in enumerate(cells[1:]) if float(c[-1])]
    found = [(e.onset_s, e.label) for e in real.cache.events(row)]
    assert [label for _, label in found] == [str(code) for _, code in marks]
    np.testing.assert_allclose([onset for onset, _ in found], [i / 256 for i, _ in marks], atol=1e-3)


def test_bonn_and_bi2012_and_xdf_events(real):
    cache = real.cache
    rms = {}
    for row in rows_of(real, "bonn"):
        rms.setdefault(cache.column("set")[row], []).append(signal(cache, row).std())
    assert {name: len(values) for name, values in rms.items()} == dict.fromkeys(
        ("eyes open", "eyes closed", "interictal", "ictal"), 40
    )
    assert np.median(rms["ictal"]) > 3 * max(np.median(rms[name]) for name in rms if name != "ictal")
    (row,) = rows_of(real, "bi2012")
    labels = [e.label for e in cache.events(row)]
    assert (labels.count("target"), labels.count("nontarget")) == (128, 640)  # two flashes of twelve
    assert set(cache.recordings[row].names) <= set(channels.POSITIONS)
    row = row_of(cache, "ssvep_example.xdf")
    assert [e.label for e in cache.events(row)].count("Trial Started") == 3


def test_formats(real):
    cache = real.cache
    row = row_of(cache, "test_raw_chanloc_fids.set")
    assert set(cache.recordings[row].names) == set(ELECTRODES)
    labels = [e.label for e in cache.events(row_of(cache, "formats/eeglab_data.set"))]
    assert (labels.count("square"), labels.count("rt")) == (80, 74)
    row = row_of(cache, "subsecond_starttime.edf")
    assert any(note.startswith("inverted") for note in part_of(real, row)["notes"])
    assert "仰卧" in [e.label for e in cache.events(row_of(cache, "test_utf8_annotations.edf"))]


def test_splits_that_nobody_can_be_validated_on_are_noted_with_the_mend(tmp_path, capsys):
    for subject, seconds in (("m1", 20), ("m2", 20), ("m3", 20), ("m4", 2)):
        np.save(tmp_path / f"{subject}.npy", np.random.default_rng(seconds).standard_normal(seconds * 1000))
    rule = 'name = "m"\nkind = "vibration"\npattern = \'(?P<subject>m\\d)\\.npy\'\nrate_hz = 1000\nunit = "g"\n'
    (tmp_path / "dataset.toml").write_text(rule + '[split]\nval = ["m4"]\n')
    result = build(tmp_path, tmp_path / "c")
    assert result["notes"]["a split without a window"] == 1 and "all subjects are train" not in result["notes"]
    assert (
        "a split without a window: all recordings of val (1) are shorter than 4 s; train with"
        in capsys.readouterr().err
    )
    (tmp_path / "dataset.toml").write_text(rule)
    for subject in ("m1", "m4"):  # quarantined: two subjects are left
        (tmp_path / f"{subject}.npy").write_bytes(b"")
    assert build(tmp_path, tmp_path / "c")["notes"]["all subjects are train"] == 1
    said = "m has 2 that could be cached, too few to split by hash; [split] in dataset.toml"
    assert said in capsys.readouterr().err


def test_a_recording_that_is_in_two_splits_under_two_names_is_counted(tmp_path):
    for s in range(3):
        x_T = np.random.default_rng(min(s, 1)).standard_normal(4096).astype(np.float32)
        np.save(tmp_path / f"m{s}.npy", x_T)
    rule = 'name = "m"\nkind = "vibration"\npattern = \'(?P<subject>m\\d)\\.npy\'\nrate_hz = 1000\nunit = "g"\n[split]\ntrain = ["m1"]\ntest = ["m2"]\n'
    (tmp_path / "dataset.toml").write_text(rule)
    assert build(tmp_path, tmp_path / "c")["notes"]["the same signal is in several splits"] == 1
    (tmp_path / "dataset.toml").write_text(
        rule.replace('test = ["m2"]', 'test = ["m0"]').replace('["m1"]', '["m1", "m2"]')
    )
    assert "the same signal is in several splits" not in build(tmp_path, tmp_path / "c")["notes"]


def test_cwru_by_fault_size(data_dir, tmp_path):
    build(data_dir / "cwru", tmp_path / "cwru", dataset=(RULES / "cwru_sizes.toml",), rate_hz=12_000.0)
    cache = Cache(tmp_path / "cwru")
    sides = {(size, split) for size, split in zip(cache.column("diameter"), cache.column("split"), strict=True) if size}
    assert sides == {(7, "train"), (21, "test")}


def test_cwru_and_femto(data_dir, tmp_path):
    with pytest.raises(Unusable, match="--rate-hz is needed .* 12000, 48000 Hz"):
        build(data_dir / "cwru", tmp_path / "cwru", dataset=(RULES / "cwru.toml",))
    result = build(data_dir / "cwru", tmp_path / "cwru", dataset=(RULES / "cwru.toml",), rate_hz=12_000.0)
    assert (result["recordings"], result["subjects"], result["quarantined"], result["units"]) == (21, 11, 0, ["g"])
    cache = Cache(tmp_path / "cwru")
    assert cache.rate_hz == 12_000 and set(cache.column("rpm")) == {1772, 1797}
    for row, recording in enumerate(cache.recordings):
        x_T = np.load(data_dir / recording.key).ravel()
        if "Normal" in recording.key:  # at 48 kHz: a quarter of the samples, and nothing of the signal lost
            assert abs(4 * recording.samples - len(x_T)) < 4
            assert abs(signal(cache, row).std() / x_T.std() - 1) < 0.05
        else:
            np.testing.assert_allclose(signal(cache, row)[0], x_T, atol=1e-3 * np.abs(x_T).max())
    rms = {cache.column("fault")[row]: signal(cache, row).std() for row in range(21)}
    assert min(rms, key=rms.get) == "normal"

    rule = (RULES / "cwru.toml").read_text().partition("[rates.fault]")[0]  # as most people have it: all at 12 kHz
    (tmp_path / "wrong.toml").write_text(rule)
    result = build(data_dir / "cwru", tmp_path / "wrong", dataset=(tmp_path / "wrong.toml",))
    assert result["quarantined_by_code"] == {"rate_implausible": 1} and result["recordings"] == 20
    assert "as if the rate were 48000 Hz" in (tmp_path / "wrong" / "quarantine.json").read_text()

    build(data_dir / "femto", tmp_path / "femto", source_rate_hz=25600.0, source_unit="g")  # instead of a dataset.toml
    cache = Cache(tmp_path / "femto")
    assert cache.rate_hz == 25_600 and len(cache.recordings[0].segments) == 142  # snapshots of 0.1 s
    x_CNT = signal(cache, 0).reshape(2, 142, 2560)
    assert x_CNT[:, -3:].std() > 3 * x_CNT[:, :10].std()  # run to failure
    assert len(cache.windows(window_s=0.1, stride_s=0.1)) == 142
