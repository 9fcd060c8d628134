"""Every format that is made here, by hand: known signal in, the same microvolts and events out; damaged files give their code."""

import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from lib.edf import write_edf
from lib.errors import Rejected
from lib.recordings import (
    Event,
    ReadSpec,
    Segment,
    companions,
    is_recording,
    mne_filter_resample,
    open_recording,
    read_event_file,
)
from tests import malformed
from tests.conftest import ROOT

RATE = 250
NAMES = ["Fp1", "Fp2", "C3", "C4", "O1", "O2"]


@pytest.fixture
def x_CT() -> np.ndarray:
    """Four seconds of microvolts."""
    return np.random.default_rng(0).normal(0, 20, (len(NAMES), 4 * RATE)).astype(np.float32)


def code(path: Path, spec: ReadSpec = ReadSpec(), read: bool = False) -> str:  # noqa: B008  frozen
    """The code a file is refused with."""
    with pytest.raises(Rejected) as refusal:
        recording = open_recording(path, spec)
        if read:
            recording.read([0])
    return refusal.value.code


def labels(recording) -> list[tuple[float, str]]:
    return [(round(e.onset_s, 6), e.label) for e in recording.events]


def test_importing_recordings_imports_no_reader():
    heavy = "{'mne', 'scipy', 'h5py', 'pyxdf', 'pymatreader'}"
    program = f"import lib.recordings, sys; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- EDF, BDF


def test_edf_with_gap_events_and_trigger_channel(tmp_path, x_CT):
    codes_T = np.zeros(4 * RATE, np.float32)
    codes_T[100:110], codes_T[600:602] = 3, 5
    path = tmp_path / "a.edf"
    onsets = [0, 1, 102, 103]
    write_edf(path, np.vstack([x_CT, codes_T]), RATE, [*NAMES, "TRIGGER"], [(0.5, 0.25, "go")], record_onsets_s=onsets)
    recording = open_recording(path)
    assert recording.names == [*NAMES, "TRIGGER"] and recording.kinds == ["eeg"] * 6 + ["stim"]
    assert recording.segments == [Segment(0, 500, 0.0), Segment(500, 1000, 102.0)]
    x_uV = recording.read(range(6))
    assert x_uV.dtype == np.float32 and np.abs(x_uV - x_CT).max() < 0.01
    assert np.array_equal(recording.read([4, 1]), x_uV[[4, 1]])
    assert labels(recording) == [(0.4, "3"), (0.5, "go"), (102.4, "5")]
    assert [e.duration_s for e in recording.events] == pytest.approx([0.04, 0.25, 0.008])
    assert open_recording(path, ReadSpec(rate_hz=RATE)).samples == 1000
    assert code(path, ReadSpec(rate_hz=256)) == "rate_conflict"


@pytest.mark.parametrize("dimension", ["", "arb"])
def test_edf_without_a_unit_takes_the_stated_one(tmp_path, x_CT, dimension):
    write_edf(tmp_path / "a.edf", x_CT / 1000, RATE, NAMES, dimension=dimension)
    with pytest.raises(Rejected, match="state the unit in dataset.toml"):
        open_recording(tmp_path / "a.edf").read(range(6))
    recording = open_recording(tmp_path / "a.edf", ReadSpec(unit="mV"))
    assert np.allclose(recording.read(range(6)), x_CT, atol=0.05) and recording.notes == []
    write_edf(tmp_path / "b.edf", x_CT, RATE, NAMES, dimension="uV")  # carries its own
    assert np.allclose(open_recording(tmp_path / "b.edf", ReadSpec(unit="mV")).read(range(6)), x_CT, atol=0.05)


def test_noise_in_a_trigger_channel_is_no_event(tmp_path, x_CT):
    write_edf(tmp_path / "a.edf", x_CT[:3], RATE, ["C3", "PHOTIC-REF", "TRIGGER"])
    recording = open_recording(tmp_path / "a.edf")
    assert recording.kinds == ["eeg", "stim", "stim"] and recording.events == []


def test_common_refusals(tmp_path):
    (tmp_path / "empty.set").write_bytes(b"")
    (tmp_path / "annexed.fif").write_bytes(b"/annex/objects/MD5E-s123--0123.fif\n")
    (tmp_path / "lfs.npy").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    (tmp_path / "linked.set").symlink_to(tmp_path / ".git" / "annex" / "objects" / "MD5E-s123--0123.set")
    for name, word in {
        "empty.set": "empty", "annexed.fif": "annex_pointer", "lfs.npy": "annex_pointer", "gone.csv": "unreadable",
        "none.xdf": "unreadable", "linked.set": "annex_pointer", "movie.mp4": "unsupported",
    }.items():  # fmt: skip
        assert code(tmp_path / name) == word, name
    for name in ("a.set", "a.fif", "a.xdf", "a.mat", "a.h5", "a.npy", "a.npz", "a.gdf", "a.cnt", "a.lay", "a.nedf"):
        (tmp_path / name).write_bytes(b"<html><body>404 not found</body></html>" * 9)
        assert code(tmp_path / name) == "reader_failed", name


# ---- BrainVision


def write_brainvision(
    folder: Path, x_CT: np.ndarray, *, stem="sub", kind="INT_16", vectorized=False, markers=(), extra=""
) -> Path:
    """A BrainVision recording in 0.1 µV steps (or float), markers (type, description, sample counted from 1, length)."""
    channels = "\n".join(f"Ch{i + 1}={n},,{'0.1' if kind == 'INT_16' else '1'},µV" for i, n in enumerate(NAMES))
    header = f"""Brain Vision Data Exchange Header File Version 1.0
[Common Infos]
Codepage=UTF-8
DataFile={stem}.eeg
MarkerFile={stem}.vmrk
DataFormat=BINARY
DataOrientation={"VECTORIZED" if vectorized else "MULTIPLEXED"}
NumberOfChannels={len(x_CT)}
SamplingInterval={1e6 / RATE:g}
{extra}
[Binary Infos]
BinaryFormat={kind}
[Channel Infos]
{channels}
"""
    lines = "\n".join(f"Mk{i + 1}={t},{d},{s},{n},0" for i, (t, d, s, n) in enumerate(markers))
    (folder / f"{stem}.vhdr").write_text(header, "utf-8")
    (folder / f"{stem}.vmrk").write_text(
        f"Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nDataFile={stem}.eeg\n[Marker Infos]\n{lines}\n"
    )
    data = np.rint(x_CT * 10).astype("<i2") if kind == "INT_16" else x_CT.astype("<f4")
    (folder / f"{stem}.eeg").write_bytes((data if vectorized else data.T).tobytes())
    return folder / f"{stem}.vhdr"


@pytest.mark.parametrize("kind, vectorized", [("INT_16", False), ("IEEE_FLOAT_32", False), ("INT_16", True)])
def test_brainvision(tmp_path, x_CT, kind, vectorized):
    markers = [
        ("New Segment", "", 1, 1),
        ("Stimulus", "S  1", 251, 1),
        ("New Segment", "", 501, 1),
        ("Response", "R  2", 751, 1),
        ("Stimulus", "eyes closed", 801, 125),
    ]
    path = write_brainvision(tmp_path, x_CT, kind=kind, vectorized=vectorized, markers=markers, extra="DataPoints=1000")
    recording = open_recording(path)
    assert recording.names == NAMES and set(recording.kinds) == {"eeg"} and recording.notes == []
    assert np.abs(recording.read(range(6)) - x_CT).max() < (0.051 if kind == "INT_16" else 1e-4)
    assert labels(recording) == [(1.0, "Stimulus/S  1"), (3.0, "Response/R  2"), (3.2, "Stimulus/eyes closed")]
    assert [e.duration_s for e in recording.events] == [0.0, 0.0, 0.5]  # one sample is an instant
    assert recording.segments == [Segment(0, 500, 0.0), Segment(500, 1000, 2.0)]
    assert companions(path) == (tmp_path / "sub.eeg", tmp_path / "sub.vmrk")


def test_brainvision_files_that_were_moved_or_renamed(tmp_path, x_CT):
    path = write_brainvision(tmp_path, x_CT, markers=[("Stimulus", "S  1", 251, 1)])
    text = path.read_text("utf-8")
    path.write_text(text.replace("DataFile=sub.eeg", r"DataFile=C:\Daten\EEG\sub.eeg"), "utf-8")
    assert np.abs(open_recording(path).read([2]) - x_CT[2]).max() < 0.051

    path.write_text(text, "utf-8")
    for ending in (".vhdr", ".eeg", ".vmrk"):  # renamed together; the header still has the old names
        (tmp_path / f"sub{ending}").rename(tmp_path / f"neu ö{ending}")
    recording = open_recording(tmp_path / "neu ö.vhdr")
    assert np.abs(recording.read([5]) - x_CT[5]).max() < 0.051 and labels(recording) == [(1.0, "Stimulus/S  1")]
    assert any("sub.eeg" in note for note in recording.notes)

    (tmp_path / "neu ö.vmrk").unlink()
    recording = open_recording(tmp_path / "neu ö.vhdr")
    assert recording.events == [] and any("no markers" in note for note in recording.notes)
    (tmp_path / "neu ö.eeg").unlink()
    assert code(tmp_path / "neu ö.vhdr") == "missing_file"


@pytest.mark.parametrize("codepage", ["Codepage=ANSI\n", ""])
def test_brainvision_of_an_older_recorder_in_any_folder(tmp_path, x_CT, codepage):
    folder = tmp_path / "日本 é"
    folder.mkdir()
    path = write_brainvision(folder, x_CT, markers=[("Comment", "Augen geöffnet", 251, 1)])
    for ending in (".vhdr", ".vmrk"):
        file = folder / f"sub{ending}"
        text = file.read_text("utf-8").replace("Codepage=UTF-8\n", "")
        file.write_bytes(text.replace("[Common Infos]\n", f"[Common Infos]\n{codepage}").encode("latin-1"))
    recording = open_recording(path)
    assert np.abs(recording.read(range(6)) - x_CT).max() < 0.051
    assert labels(recording) == [(1.0, "Comment/Augen geöffnet")]


def test_brainvision_shorter_than_anything_says(tmp_path, x_CT):
    def cut_to(path: Path, size: int) -> str:
        data = path.with_suffix(".eeg")
        data.write_bytes(data.read_bytes()[:size])
        return code(path)

    half = x_CT.nbytes // 2 // 2
    for folder in "abcdef":
        (tmp_path / folder).mkdir()
    assert cut_to(write_brainvision(tmp_path / "a", x_CT, extra="DataPoints=1000"), half) == "truncated"
    assert cut_to(write_brainvision(tmp_path / "b", x_CT, markers=[("Stimulus", "S  1", 900, 1)]), half) == "truncated"
    assert cut_to(write_brainvision(tmp_path / "c", x_CT), half + 1) == "truncated"
    path = write_brainvision(tmp_path / "d", x_CT)
    path.with_suffix(".json").write_text('{"RecordingDuration": 4.0}')
    assert open_recording(path).samples == 1000 and path.with_suffix(".json") in companions(path)
    assert cut_to(path, half) == "truncated"
    assert cut_to(write_brainvision(tmp_path / "e", x_CT), 0) == "no_data"
    assert code(write_brainvision(tmp_path / "f", x_CT, extra="DataPoints=900")) == "size_mismatch"


# ---- EEGLAB


def eeglab(x_CT: np.ndarray, **changes) -> dict:
    """The EEG structure of a data set with a boundary at two seconds."""
    events = [(251.0, "square", 5.0), (500.5, "boundary", 300.0), (751.0, "rt", 0.0)]
    places = {
        "Fp1": (80, 25, 0),
        "Fp2": (80, -25, 0),
        "C3": (0, 60, 60),
        "C4": (0, -60, 60),
        "O1": (-85, 25, 0),
        "O2": (0, 0, 0),
    }
    chanlocs = [(n, *places[n], "EEG") for n in NAMES]
    kind = [("labels", object), ("X", object), ("Y", object), ("Z", object), ("type", object)]
    fiducials = [
        ("Nasion", 85, 0, -40),
        ("Left periauricular point", 0, 75, -40),
        ("Right periauricular point", 0, -75, -40),
    ]
    return {
        "nbchan": len(x_CT), "pnts": x_CT.shape[1], "trials": 1, "srate": RATE, "xmin": 0, "xmax": 4,
        "data": x_CT, "chanlocs": np.array(chanlocs, kind),
        "event": np.array(events, [("latency", object), ("type", object), ("duration", object)]),
        "chaninfo": {"nosedir": "+X", "nodatchans": np.array(fiducials, [("description", object), ("X", object), ("Y", object), ("Z", object)])},
    } | changes  # fmt: skip


@pytest.mark.parametrize("kind", ["embedded", "fdt", "fields at the top"])
def test_eeglab(tmp_path, x_CT, kind):
    path = tmp_path / "a.set"
    if kind == "fdt":
        (tmp_path / "a.fdt").write_bytes(x_CT.T.astype("<f4").tobytes())
        scipy.io.savemat(path, {"EEG": eeglab(x_CT, data="old name.fdt")})
        assert companions(path) == (tmp_path / "a.fdt",)
    else:
        scipy.io.savemat(path, {"EEG": eeglab(x_CT)} if kind == "embedded" else eeglab(x_CT), appendmat=False)
    recording = open_recording(path)
    assert recording.names == NAMES and np.array_equal(recording.read([3, 0]), x_CT[[3, 0]])
    assert labels(recording) == [(1.0, "square"), (3.0, "rt")] and recording.events[0].duration_s == 0.02
    assert recording.segments == [Segment(0, 500, 0.0), Segment(500, 1000, 2.0)]
    # the head frame starts between the ears, 40 mm below the origin of these coordinates; O2 has none
    assert recording.positions.keys() == set(NAMES) - {"O2"}
    assert recording.positions["C3"] == pytest.approx((-0.06, 0.0, 0.1)) and recording.positions[
        "Fp2"
    ] == pytest.approx((0.025, 0.08, 0.04))


def test_eeglab_faults(tmp_path, x_CT):
    def saved(name: str, **changes) -> Path:
        scipy.io.savemat(tmp_path / name, {"EEG": eeglab(x_CT, **changes)}, appendmat=False)
        return tmp_path / name

    assert code(saved("epochs.set", data=np.stack([x_CT, x_CT], -1), trials=2)) == "epoched"
    assert code(saved("points.set", pnts=2000)) == "size_mismatch"
    assert code(saved("no_fdt.set", data="no_fdt.fdt")) == "missing_file"
    path = saved("fdt.set", data="fdt.fdt")
    data = x_CT.T.astype("<f4").tobytes()
    for size, expected in {0: "no_data", len(data) // 2: "truncated", len(data) + 4: "size_mismatch"}.items():
        path.with_suffix(".fdt").write_bytes((data + b"\0" * 4)[:size])
        assert code(path) == expected
    whole = saved("whole.set").read_bytes()
    (tmp_path / "half.set").write_bytes(whole[: len(whole) // 2])
    assert code(tmp_path / "half.set") == "reader_failed"
    scipy.io.savemat(tmp_path / "other.set", {"x": x_CT}, appendmat=False)
    assert code(tmp_path / "other.set") == "bad_header"
    assert code(saved("old.set", data="old.dat")) == "missing_file"
    volts = open_recording(
        saved("volts.set", data=x_CT * 1e-6)
    )  # to be caught by the builder's amplitude check, unless …
    assert volts.read([0]).std() < 1e-4
    assert np.allclose(
        open_recording(saved("volts.set", data=x_CT * 1e-6), ReadSpec(unit="V")).read([0]), x_CT[:1], atol=1e-3
    )
    x_CT[2, 100] = np.nan
    assert np.isnan(open_recording(saved("nan.set")).read([2])).sum() == 1
    assert code(saved("rate.set"), ReadSpec(rate_hz=500)) == "rate_conflict"


def test_eeglab_of_one_channel_and_one_event(tmp_path, x_CT):
    one = eeglab(x_CT[:1])
    one |= {
        "chanlocs": one["chanlocs"][:1],
        "event": np.array([(251.0, 7)], [("latency", object), ("type", object)]),
        "chaninfo": {},
    }
    scipy.io.savemat(tmp_path / "a.set", {"EEG": one}, appendmat=False)
    recording = open_recording(tmp_path / "a.set")
    assert recording.names == ["Fp1"] and np.array_equal(recording.read([0]), x_CT[:1])
    assert recording.events == [Event(1.0, 0.0, "7", 7.0)]


def test_eeglab_v73(tmp_path, x_CT):
    import h5py

    def text(file, name: str, value: str):
        data = file.create_dataset(name, data=np.array([[ord(c)] for c in value], np.uint16))
        data.attrs.update(MATLAB_class=np.bytes_("char"), MATLAB_int_decode=2)
        return data

    path = tmp_path / "a.set"
    with h5py.File(path, "w", userblock_size=512) as file:
        eeg = file.create_group("EEG")
        eeg.attrs["MATLAB_class"] = np.bytes_("struct")
        for key, value in {"nbchan": len(NAMES), "pnts": x_CT.shape[1], "trials": 1, "srate": RATE}.items():
            eeg.create_dataset(key, data=np.array([[value]], float)).attrs["MATLAB_class"] = np.bytes_("double")
        eeg.create_dataset("data", data=x_CT.T).attrs["MATLAB_class"] = np.bytes_(
            "single"
        )  # MATLAB counts axes from the other end
        chanlocs = eeg.create_group("chanlocs")
        chanlocs.attrs["MATLAB_class"] = np.bytes_("struct")
        references = np.array([[text(file, f"#refs#/{n}", n).ref] for n in NAMES], h5py.ref_dtype)
        chanlocs.create_dataset("labels", data=references, dtype=h5py.ref_dtype)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    recording = open_recording(path)
    assert recording.names == NAMES and np.array_equal(recording.read(range(6)), x_CT)


def test_eeglab_reads_what_mne_reads(data_dir):
    import mne

    for name in ("eeglab_data.set", "test_raw_chanloc_fids.set"):
        recording = open_recording(data_dir / "formats" / name)
        raw = mne.io.read_raw_eeglab(data_dir / "formats" / name, verbose="ERROR")
        assert recording.names == raw.ch_names and recording.samples == raw.n_times
        assert np.allclose(recording.read(range(len(raw.ch_names))), raw.get_data() * 1e6, atol=1e-3)
        assert [e.label for e in recording.events] == list(raw.annotations.description)
        assert np.allclose([e.onset_s for e in recording.events], raw.annotations.onset)
    # this file has fiducials, so its electrodes come out in the head frame, where MNE's own layout of the net is too
    montage = mne.channels.make_standard_montage("GSN-HydroCel-129")
    info = mne.create_info(montage.ch_names, 100.0, "eeg").set_montage(montage)
    layout = {ch["ch_name"]: ch["loc"][:3] for ch in info["chs"]}
    apart = [
        np.linalg.norm(np.subtract(xyz, layout[name])) for name, xyz in recording.positions.items() if name in layout
    ]
    assert len(apart) == 128 and max(apart) < 0.01


# ---- FIF


def fif(folder: Path, x_CT: np.ndarray, name: str = "a_raw.fif", **options) -> Path:
    """A FIF recording whose first sample is number 3000, with a trigger channel and annotations."""
    import mne

    codes_T = np.zeros(x_CT.shape[1])
    codes_T[250:260], codes_T[750:752] = 5, 7
    info = mne.create_info([*NAMES, "STI 014", "STI 001"], RATE, ["eeg"] * 6 + ["stim"] * 2)
    info.set_montage(
        mne.channels.make_dig_montage({"C3": (-0.06, 0.0, 0.1), "Fp1": (0, 0, 0)}, coord_frame="head"),
        on_missing="ignore",
    )
    raw = mne.io.RawArray(np.vstack([x_CT * 1e-6, codes_T, codes_T > 5]), info, first_samp=3000, verbose="ERROR")
    raw.set_annotations(mne.Annotations([0.5, 2.0, 2.0], [0.25, 0, 0], ["blink", "BAD boundary", "EDGE boundary"]))
    raw.save(folder / name, verbose="ERROR", **options)
    return folder / name


def test_fif_with_its_event_file(tmp_path, x_CT):
    import mne

    path = fif(tmp_path, x_CT)
    recording = open_recording(path)
    assert recording.kinds == ["eeg"] * 6 + ["stim"] * 2 and recording.first_sample == 3000
    assert np.abs(recording.read(range(6)) - x_CT).max() < 1e-4
    assert np.array_equal(np.unique(recording.read([6])), [0, 5, 7])
    assert recording.segments == [Segment(0, 500, 0.0), Segment(500, 1000, 2.0)]
    assert [(e.onset_s, e.duration_s, e.label) for e in recording.events] == [
        (0.5, 0.25, "blink"),
        (1.0, 0.04, "5"),
        (3.0, 0.008, "7"),
    ]
    assert recording.positions == {"C3": pytest.approx((-0.06, 0.0, 0.1))}

    events = np.array([[3000 + 250, 0, 5], [3000 + 750, 0, 7]])
    mne.write_events(tmp_path / "a-eve.fif", events, verbose="ERROR")
    mne.write_events(tmp_path / "a.eve", events, verbose="ERROR")
    for name in ("a-eve.fif", "a.eve"):
        assert read_event_file(tmp_path / name, RATE, 3000) == [Event(1.0, 0.0, "5", 5.0), Event(3.0, 0.0, "7", 7.0)]
    with pytest.raises(Rejected):
        read_event_file(path, RATE, 3000)


def test_fif_positions_that_are_no_head_are_ignored(tmp_path, x_CT, data_dir):
    path = next((data_dir / "ssvep_exo" / "subject01").glob("*_raw.fif"))  # millimetres where metres are due
    recording = open_recording(path)
    assert recording.positions == {} and any("positions ignored" in note for note in recording.notes)


def test_split_and_damaged_fif(tmp_path):
    x_CT = np.random.default_rng(1).normal(0, 20, (len(NAMES), 600 * RATE)).astype(np.float32)
    path = fif(tmp_path, x_CT, split_size="2MB", buffer_size_sec=1)
    parts = sorted(tmp_path.glob("a_raw-*.fif"))
    assert parts and companions(path) == tuple(parts) and not any(map(is_recording, parts))
    recording = open_recording(path)
    assert recording.samples == 600 * RATE and np.abs(recording.read([1])[0] - x_CT[1]).max() < 1e-4
    parts[-1].unlink()
    assert code(path, read=True) == "reader_failed"
    parts[0].rename(tmp_path / "b.fif")  # alone, the second part is a recording of its own name
    whole = fif(tmp_path, x_CT[:, :5000], "c_raw.fif").read_bytes()
    for share in (0.3, 0.6, 0.95):
        (tmp_path / "d_raw.fif").write_bytes(whole[: int(share * len(whole))])
        assert code(tmp_path / "d_raw.fif", read=True) in ("reader_failed", "truncated")


def test_epochs_are_no_recording(tmp_path, x_CT):
    import mne

    raw = mne.io.read_raw_fif(fif(tmp_path, x_CT), verbose="ERROR")
    mne.make_fixed_length_epochs(raw, 1.0, verbose="ERROR").save(tmp_path / "a-epo.fif", verbose="ERROR")
    assert not is_recording(tmp_path / "a-epo.fif")
    (tmp_path / "a-epo.fif").rename(tmp_path / "a.fif")
    assert code(tmp_path / "a.fif") == "reader_failed"


# ---- EGI MFF


def test_mff_with_a_pause(tmp_path, capfd):
    from datetime import timedelta

    from mffpy.bin_writer import BinWriter
    from mffpy.writer import Writer

    x_CT = np.random.default_rng(2).normal(0, 20, (129, 1000)).astype(np.float32)
    start = datetime(2020, 1, 2, 3, 4, 5, 123456, tzinfo=timezone.utc)
    signal = BinWriter(sampling_rate=RATE, data_type="EEG")
    signal.add_block(x_CT[:, :500])
    signal.add_block(x_CT[:, 500:], offset_us=2_000_000)
    path = tmp_path / "a.mff"
    writer = Writer(path)
    writer.addxml("fileInfo", recordTime=start)
    writer.add_coordinates_and_sensor_layout("HydroCel GSN 128 1.0")
    event = {"duration": 4000, "code": "DIN1", "label": "DIN1", "description": "", "sourceDevice": "x"}
    events = [{"beginTime": start + timedelta(seconds=s), **event} for s in (1, 5)]
    writer.addxml("eventTrack", filename="Events_DIN.xml", name="DIN", trackType="EVNT", events=events)
    writer.addbin(signal)
    writer.write()

    recording = open_recording(path)
    assert is_recording(path) and path / "signal1.bin" in companions(path)
    assert recording.names[:2] == ["E1", "E2"] and recording.kinds[:129] == ["eeg"] * 129
    assert recording.segments == [Segment(0, 500, 0.0), Segment(1000, 1500, 4.0)]
    x_uV = recording.read(range(129))
    assert np.allclose(x_uV[:, :500], x_CT[:, :500], atol=1e-4) and np.allclose(
        x_uV[:, 1000:], x_CT[:, 500:], atol=1e-4
    )
    assert labels(recording) == [(1.0, "DIN1"), (5.0, "DIN1")]
    assert recording.positions["E1"] == pytest.approx((0.066, 0.063, 0.0015), abs=1e-3)
    assert capfd.readouterr().out == ""
    (path / "signal1.bin").write_bytes((path / "signal1.bin").read_bytes()[:100_000])
    assert code(path, read=True) == "reader_failed"


# ---- names


def test_what_is_a_recording(tmp_path):
    yes = "a.EDF b.bdf c.vhdr d.set e_raw.fif e.fif.gz f.mff g.csv h.txt i.npz j.mat k.h5 l.xdf m_split-01_eeg.fif sub-1.fif"
    no = "a.eeg b.vmrk c.fdt d-eve.fif e_epo.fif f-ave.fif.gz g.json h.tsv i.csv_bi ._a.edf m_split-02_eeg.fif n-trans.fif"
    assert [n for n in yes.split() if not is_recording(tmp_path / n)] == []
    assert [n for n in no.split() if is_recording(tmp_path / n)] == []


@pytest.mark.parametrize("name, channels, rate, events", [
    ("chtypes_edf.edf", 42, 200, 8), ("subsecond_starttime.edf", 3, 512, 2), ("test_utf8_annotations.edf", 11, 200, 2),
    ("test.bdf", 17, 256, None), ("test_bdf_stim_channel.bdf", 4, 500, None),
])  # fmt: skip
def test_real_files_with_odd_headers(data_dir, name, channels, rate, events):
    recording = open_recording(data_dir / "formats" / name)
    assert len(recording.names) == channels and set(recording.rates_hz) == {rate}
    assert events is None or len(recording.events) == events
    eeg = [i for i, kind in enumerate(recording.kinds) if kind in ("eeg", "unknown")]
    x_CT = recording.read(eeg)
    assert x_CT.shape == (len(eeg), recording.samples) and np.isfinite(x_CT).all()


def test_bdf_status_has_the_triggers_mne_finds(data_dir):
    import mne

    path = data_dir / "formats" / "test.bdf"
    raw = mne.io.read_raw_bdf(path, verbose="ERROR")
    found = mne.find_events(raw, mask=0xFFFF, mask_type="and", consecutive=True, verbose="ERROR")
    ours = [(round(e.onset_s * 256), int(e.value)) for e in open_recording(path).events]
    assert ours == [(s, v) for s, _, v in found.tolist() if v != 255]  # 255 is how these lines rest
    assert len(ours) == 40
    assert code(data_dir / "formats" / "SC4001EC-Hypnogram.edf") == "no_signals"


@pytest.mark.parametrize("rest, first", [(0, [(0.0, "5")]), (0xFF00, [])])
def test_bdf_that_starts_within_a_trigger(tmp_path, rest, first):
    def triggers(x_CT):
        x_CT[-1] = rest
        if not rest:
            x_CT[-1, :50] = 5  # at lines that are never at 0 nobody could tell such a trigger from rest
        x_CT[-1, 2 * malformed.RATE_HZ :][:50] = rest + 5

    labels_ = (*malformed.LABELS[:-1], "Status")
    scale = {len(labels_) - 1: (-(1 << 23), (1 << 23) - 1)}
    path = tmp_path / "a.bdf"
    malformed.write(path, np.random.default_rng(0), bdf=True, labels=labels_, physical=scale, shape=triggers, events=())
    assert labels(open_recording(path)) == [*first, (2.0, str(rest + 5))]


def test_ssvep_events_are_where_the_event_file_says(data_dir):
    path = next((data_dir / "ssvep_exo" / "subject02").glob("*_raw.fif"))
    recording = open_recording(path)
    events = read_event_file(next(path.parent.glob("*-eve.fif")), recording.rates_hz[0], recording.first_sample)
    assert {e.label for e in events} == {"1", "2", "3", "4"} and len(events) == 32
    assert 0 < events[0].onset_s < events[-1].onset_s < recording.samples / 256
    arbitrary = open_recording(path, ReadSpec(unit="a.u."))  # its volts are no volts, as 3 mV of alpha show
    assert arbitrary.unit == "a.u." and np.allclose(arbitrary.read([0]) * 1e6, recording.read([0]), rtol=1e-5)


@pytest.mark.parametrize(
    "band_hz, notch_hz", [((0.5, 45.0), None), ((0.5, 45.0), [50.0, 100.0, 150.0]), (None, [60.0])]
)
def test_the_mne_engine_is_what_raw_does(x_CT, band_hz, notch_hz):
    import mne

    y_CT = mne_filter_resample(np.tile(x_CT, 3), RATE, 100, band_hz, notch_hz)
    raw = mne.io.RawArray(np.tile(x_CT, 3).astype(float), mne.create_info(NAMES, RATE, "eeg"), verbose="ERROR")
    if notch_hz:
        raw.notch_filter([f for f in notch_hz if f < RATE / 2], verbose="ERROR")
    if band_hz:
        raw.filter(*band_hz, verbose="ERROR")
    expected_CT = raw.resample(100, verbose="ERROR").get_data()
    assert y_CT.dtype == np.float32 and y_CT.shape == expected_CT.shape
    assert np.sqrt(np.mean((y_CT - expected_CT) ** 2)) < 1e-5 * expected_CT.std()
