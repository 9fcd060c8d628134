"""Tables and archives: delimiters, headers, time and marker columns, which array is the signal, and what is refused."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from lib.errors import Rejected
from lib.recordings import ReadSpec, Segment, companions, open_recording
from lib.statements import settle_unit

RATE = 250
NAMES = ("Fp1", "Cz", "Oz")
SPEC = ReadSpec(rate_hz=RATE, unit="uV", channels=NAMES)
SHAKEN = ReadSpec(rate_hz=12_000, unit="g", kind="vibration")


@pytest.fixture
def x_TC() -> np.ndarray:
    """Eight seconds of microvolts, with two decimals."""
    return np.random.default_rng(0).normal(0, 20, (8 * RATE, 3)).round(2)


def code(path: Path, spec: ReadSpec | None = None, **changes) -> str:
    """The code a file is refused with."""
    with pytest.raises(Rejected) as refusal:
        open_recording(path, replace(spec or ReadSpec(), **changes))
    return refusal.value.code


def rows(x_TC: np.ndarray, delimiter: str = ",", *before: np.ndarray) -> list[str]:
    columns = [*before, *x_TC.T]
    return [
        delimiter.join(f"{v:g}" if isinstance(v, float) else str(v) for v in row) for row in zip(*columns, strict=True)
    ]


def saved(path: Path, lines: list[str], encoding: str = "utf-8", end: str = "\n") -> Path:
    path.write_bytes((end.join(lines) + end).encode(encoding))
    return path


# ---- text


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " ", ", "])
@pytest.mark.parametrize("header", [True, False])
def test_delimiters_and_headers(tmp_path, x_TC, delimiter, header):
    lines = [delimiter.join(NAMES)] * header + rows(x_TC, delimiter)
    path = saved(tmp_path / "a.csv", lines, end="\r\n")
    recording = open_recording(path, SPEC)
    assert recording.names == list(NAMES) and recording.kinds == ["eeg"] * 3 and recording.samples == len(x_TC)
    assert np.allclose(recording.read([2, 0]), x_TC.T[[2, 0]], atol=1e-5) and recording.read([0]).dtype == np.float32
    assert code(path, SPEC, unit=None) == "unit_missing" and code(path, SPEC, rate_hz=None) == "rate_missing"
    assert code(path, SPEC, channels=("Fp1", "Cz")) == "channels_conflict" if not header else True
    if header:
        assert open_recording(path, ReadSpec(RATE, "uV", ("Oz",))).names == ["Oz"]
        assert code(path, SPEC, channels=("C3", "C4", "Pz")) == "channels_conflict"  # the file says which they are
    else:
        assert code(path, SPEC, channels=None) == "channels_missing"


def test_other_spellings(tmp_path, x_TC):
    comma = saved(tmp_path / "comma.csv", ["Fp1;Cz;Oz", *(row.replace(".", ",") for row in rows(x_TC, ";"))])
    latin = saved(tmp_path / "latin.txt", ["Fp1 [µV]\tCz [µV]\tOz [µV]", *rows(x_TC / 1, "\t")], "latin-1")
    notes = saved(
        tmp_path / "notes.csv",
        ["% made by hand", "# Müller", "subject: 7", '"Fp1","Cz","Oz"', *rows(x_TC)],
        "utf-8-sig",
    )
    for path in (comma, latin, notes):
        assert np.allclose(open_recording(path, ReadSpec(RATE, "uV")).read(range(3)), x_TC.T, atol=1e-5), path.name
    assert open_recording(latin, ReadSpec(RATE)).unit == "uV" and code(latin, ReadSpec(RATE, "mV")) == "unit_conflict"
    millivolts = saved(tmp_path / "mv.csv", ["Fp1 (mV),Cz (mV),Oz (mV)", *rows(x_TC / 1000)])
    assert np.allclose(open_recording(millivolts, ReadSpec(RATE)).read([1]), x_TC.T[[1]], atol=0.01)


def test_columns_that_are_only_counted_are_no_sample(tmp_path, x_TC):
    path = saved(tmp_path / "a.csv", ["0,1,2", *rows(x_TC)])
    assert open_recording(path, SPEC).samples == len(x_TC) and code(path, SPEC, channels=None) == "channels_missing"


def test_time_column_gives_rate_and_gaps(tmp_path, x_TC):
    t_T = 1.5e9 + np.arange(len(x_TC)) / 256
    t_T[1000:] += 5.0
    codes_T = np.zeros(len(x_TC), int)
    codes_T[256:260], codes_T[1128] = 11, 2
    stamps = [f"{t:.3f}" for t in t_T]  # rounded to milliseconds, so that most differences are 4 ms, as at 250 Hz
    path = saved(
        tmp_path / "a.csv", ["timestamps,Fp1,Cz,Oz,Marker0", *rows(np.column_stack([x_TC, codes_T]), ",", stamps)]
    )
    recording = open_recording(path, ReadSpec(unit="uV"))
    assert recording.names == list(NAMES) and set(recording.rates_hz) == {256.0}
    assert [(s.start, s.stop) for s in recording.segments] == [(0, 1000), (1000, 2000)]
    assert recording.segments[1].onset_s == pytest.approx(1000 / 256 + 5, abs=2e-3)
    assert [(e.label, e.value) for e in recording.events] == [("11", 11.0), ("2", 2.0)]
    assert [e.onset_s for e in recording.events] == pytest.approx([1.0, 1128 / 256 + 5], abs=2e-3)
    assert recording.events[0].duration_s == 4 / 256
    assert (
        open_recording(path, ReadSpec(256, "uV")).rates_hz[0] == 256
        and code(path, ReadSpec(250, "uV")) == "rate_conflict"
    )


def test_time_in_other_units(tmp_path, x_TC):
    t_T = np.arange(len(x_TC)) * 4.0
    path = saved(tmp_path / "a.csv", ["time,Fp1,Cz,Oz", *rows(x_TC, ",", t_T)])
    assert code(path, ReadSpec(unit="uV")) == "rate_missing"  # 4 s per sample
    assert open_recording(path, ReadSpec(RATE, "uV")).rates_hz[0] == 250  # must be milliseconds
    path = saved(tmp_path / "b.csv", ["time (ms),Fp1,Cz,Oz", *rows(x_TC, ",", t_T)])
    assert open_recording(path, ReadSpec(unit="uV")).rates_hz[0] == 250
    path = saved(tmp_path / "c.csv", ["time,Fp1,Cz,Oz", *rows(x_TC, ",", t_T[::-1])])
    assert code(path, ReadSpec(RATE, "uV")) == "time_order"


@pytest.mark.parametrize(
    "written",
    [
        "%Y-%m-%d %H:%M:%S.%f",
        "%Y-%m-%dT%H:%M:%S.%fZ",
        "%Y-%m-%dT%H:%M:%S.%f+01:00",
        "%H:%M:%S.%f",
        '"%Y-%m-%d %H:%M:%S,%f"',
        "%d/%m/%Y %H:%M:%S.%f",
    ],
)
def test_time_as_dates(tmp_path, x_TC, written):
    since_s = np.arange(len(x_TC)) / RATE + 5.0 * (np.arange(len(x_TC)) >= 1000)
    start = datetime(2024, 1, 31, 12, 59, 58)
    stamps = [(start + timedelta(seconds=s)).strftime(written) for s in since_s.tolist()]
    path = saved(tmp_path / "a.csv", ["Time,Fp1,Cz,Oz", *rows(x_TC, ",", stamps)])
    if "/" in written:
        for spec in (ReadSpec(unit="uV"), ReadSpec(RATE, "uV")):
            assert code(path, spec) == "time_stamps"
        return
    recording = open_recording(path, ReadSpec(unit="uV"))
    assert recording.names == list(NAMES) and recording.rates_hz[0] == RATE
    assert [(s.start, s.stop) for s in recording.segments] == [(0, 1000), (1000, 2000)]
    assert recording.segments[1].onset_s == pytest.approx(1000 / RATE + 5, abs=2e-3)
    assert code(path, ReadSpec(256, "uV")) == "rate_conflict"
    saved(path, ["Time,t,Fp1,Cz,Oz", *rows(x_TC, ",", np.array(["soon"] * len(x_TC)), since_s)])
    assert open_recording(path, ReadSpec(unit="uV")).rates_hz[0] == RATE  # a column of numbers wins
    saved(path, ["Time,Fp1,Cz,Oz", *rows(x_TC, ",", np.array(["2024-02-31T00:00:00"] * len(x_TC)))])
    assert code(path, ReadSpec(RATE, "uV")) == "time_stamps"


@pytest.mark.parametrize("name, per_s", [("time_ms", 1e3), ("Timestamp (microseconds)", 1e6), ("Time:250Hz", 1)])
def test_time_columns_by_other_names(tmp_path, x_TC, name, per_s):
    t_T = (np.arange(len(x_TC)) / RATE + 5.0 * (np.arange(len(x_TC)) >= 1000)) * per_s
    stamps = [f"{t:.3f}" for t in t_T]
    path = saved(tmp_path / "a.csv", [f"{name},index,Epoch,ch1,ch2,ch3", *rows(x_TC, ",", stamps, t_T, t_T)])
    recording = open_recording(path, ReadSpec(unit="uV"))
    assert recording.rates_hz[0] == RATE and len(recording.segments) == 2  # not a channel, and its gap is one
    assert recording.kinds == ["misc", "misc", "unknown", "unknown", "unknown"]


def test_missing_cells_and_encodings(tmp_path, x_TC):
    lines = ["Fp1,Cz,Oz", *rows(x_TC)]
    lines[7], lines[9] = "NA,1,2", "n/a,,3"
    for encoding in ("utf-8", "utf-16"):
        x_CT = open_recording(saved(tmp_path / "a.csv", lines, encoding), ReadSpec(RATE, "uV")).read([0, 1, 2])
        assert np.argwhere(np.isnan(x_CT)).tolist() == [[0, 6], [0, 8], [1, 8]], encoding
    assert code(saved(tmp_path / "a.csv", lines, "utf-16-le"), ReadSpec(RATE, "uV")) == "not_text"


def test_empty_cells_text_and_ragged_rows(tmp_path, x_TC):
    lines = rows(x_TC)
    lines[5] = "1.5,,3.5"
    recording = open_recording(saved(tmp_path / "gap.csv", lines), SPEC)
    assert np.isnan(recording.read([1])[0, 5]) and np.isnan(recording.read(range(3))).sum() == 1
    lines[5] = "1.5,2.5"
    assert code(saved(tmp_path / "ragged.csv", lines), SPEC) == "ragged_rows"
    recording = open_recording(saved(tmp_path / "cut.csv", rows(x_TC)[:-1] + ["1.5,2"]), SPEC)
    assert recording.samples == len(x_TC) - 1 and any("truncated" in note for note in recording.notes)

    texts = np.full(len(x_TC), "", object)
    texts[500:510], texts[1000] = "blink", "yawn"
    path = saved(
        tmp_path / "text.csv",
        ["Fp1,Cz,Oz,marker,comment", *(f"{a},{t},x" for a, t in zip(rows(x_TC), texts, strict=True))],
    )
    recording = open_recording(path, ReadSpec(RATE, "uV"))
    assert [(e.onset_s, e.duration_s, e.label) for e in recording.events] == [
        (2.0, 0.04, "blink"),
        (4.0, 0.004, "yawn"),
    ]
    assert recording.names == list(NAMES) and any("comment" in note for note in recording.notes)

    assert code(saved(tmp_path / "words.txt", ["Read me", "There is no signal here"]), SPEC) == "not_numeric"
    assert code(saved(tmp_path / "comments.txt", ["# nothing"]), SPEC) == "no_data"
    (tmp_path / "binary.txt").write_bytes(bytes(range(200)))
    assert code(tmp_path / "binary.txt", SPEC) == "not_text"


# ---- arrays


def test_npy_orientation(tmp_path, x_TC):
    for name, array in {"tc": x_TC, "ct": x_TC.T, "integers": np.rint(x_TC).astype(np.int16)}.items():
        np.save(tmp_path / f"{name}.npy", array)
        recording = open_recording(tmp_path / f"{name}.npy", SPEC)
        assert recording.samples == len(x_TC) and np.allclose(recording.read([1])[0], x_TC[:, 1], atol=0.5)
    np.save(tmp_path / "square.npy", x_TC[:3])
    assert code(tmp_path / "square.npy", SPEC) == "orientation"
    np.save(tmp_path / "wide.npy", np.ones((64, 100)))
    assert code(tmp_path / "wide.npy", SPEC, channels=None) == "orientation"
    assert open_recording(tmp_path / "wide.npy", ReadSpec(RATE, "uV", tuple(map(str, range(64))))).samples == 100
    np.save(tmp_path / "epochs.npy", np.ones((10, 3, 500)))
    assert code(tmp_path / "epochs.npy", SPEC) == "epoched"
    with pytest.raises(Rejected, match=r'one array \(samples, channels\) a file, and its rate_hz .*kind = "vibration"'):
        open_recording(tmp_path / "epochs.npy", SPEC)
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    assert code(tmp_path / "pickle.npy", SPEC) == "reader_failed"
    np.save(tmp_path / "one.npy", x_TC[:, 0])
    assert open_recording(tmp_path / "one.npy", ReadSpec(RATE, "uV")).names == ["ch1"]  # one can't be mixed up
    np.save(tmp_path / "two.npy", x_TC[:, :2])
    assert code(tmp_path / "two.npy", ReadSpec(RATE, "uV")) == "channels_missing"
    whole = (tmp_path / "tc.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[: len(whole) // 2])
    assert code(tmp_path / "cut.npy", SPEC) == "reader_failed"


def test_npz_says_what_it_is(tmp_path, x_TC):
    stim_T = np.zeros(len(x_TC), np.int16)
    stim_T[500:502] = 2
    path = tmp_path / "a.npz"
    np.savez(path, data=x_TC, stim=stim_T, fs=RATE, ch_names=np.array(NAMES), unit="uV", age=31.0, other=np.ones(7))
    recording = open_recording(path)
    assert recording.names == list(NAMES) and set(recording.rates_hz) == {RATE} and recording.columns == {"age": 31.0}
    assert [(e.onset_s, e.duration_s, e.label) for e in recording.events] == [(2.0, 0.008, "2")]
    assert np.allclose(recording.read(range(3)), x_TC.T) and "arrays not used: other" in recording.notes
    assert code(path, rate_hz=500) == "rate_conflict" and code(path, unit="V") == "unit_conflict"
    np.savez(tmp_path / "two.npz", left=x_TC, right=x_TC)
    assert code(tmp_path / "two.npz", SPEC) == "ambiguous_array"
    np.savez(tmp_path / "none.npz", fs=RATE)
    assert code(tmp_path / "none.npz", SPEC) == "no_signal"


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
def test_positions_of_electrodes_are_no_signal(tmp_path, x_TC, dtype):
    np.savez(tmp_path / "a.npz", data=x_TC.astype(dtype), positions=np.ones((3, 3)), fs=RATE, ch_names=NAMES, unit="uV")
    recording = open_recording(tmp_path / "a.npz")
    assert recording.samples == len(x_TC) and "arrays not used: positions" in recording.notes
    np.savez(tmp_path / "b.npz", data=x_TC[:300], fs=RATE, ch_names=NAMES, unit="uV")
    assert open_recording(tmp_path / "b.npz").samples == 300  # alone it may be short and narrow


def test_archives_that_contradict_themselves(tmp_path, x_TC):
    path, says = tmp_path / "a.npz", {"x": x_TC, "ch_names": NAMES}
    np.savez(path, **says, fs=RATE, sfreq=500, unit="uV")
    assert code(path) == "rate_conflict" == code(path, rate_hz=125)
    assert open_recording(path, ReadSpec(RATE)).rates_hz[0] == RATE
    np.savez(path, **says, fs=RATE, units=["uV", "uV", "mV"])
    assert code(path) == "unit_conflict"
    np.savez(path, **says, fs=RATE, sfreq=RATE, units=["uV"] * 3)
    assert np.allclose(open_recording(path).read([2]), x_TC.T[[2]], atol=1e-5)


def test_yml_beside_it(tmp_path, x_TC):
    path = tmp_path / "a.npy"
    np.save(path, x_TC)
    (tmp_path / "a.yml").write_text(
        "acquisition:\n  samplingrate: 250\n  units: mV\n  sensors:\n  - Fp1\n  - Cz\n  - 'Oz'\nid: 1\n"
    )
    recording = open_recording(path)
    assert (
        recording.names == list(NAMES)
        and set(recording.rates_hz) == {250.0}
        and companions(path) == (tmp_path / "a.yml",)
    )
    assert np.allclose(recording.read([0]), x_TC.T[:1] * 1000, atol=0.01)
    assert code(path, rate_hz=128) == "rate_conflict"
    (tmp_path / "a.yml").write_text("sensors:\n  - Fp1\n  - Cz\n")
    assert code(path, rate_hz=RATE, unit="uV") == "channels_conflict"


def test_vibration_snapshots(tmp_path):
    x_NTC = np.random.default_rng(3).normal(0, 1, (5, 1200, 2)).astype(np.float32)
    np.savez(tmp_path / "a.npz", acc=x_NTC, index=np.array([1, 21, 41, 61, 81]), total=100)
    recording = open_recording(tmp_path / "a.npz", SHAKEN)
    assert recording.kinds == ["vibration"] * 2 and recording.unit == "g" and recording.columns == {"total": 100.0}
    assert recording.segments == [Segment(i * 1200, (i + 1) * 1200, pytest.approx(i * 0.1)) for i in range(5)]
    assert np.array_equal(recording.read([1])[0], x_NTC[:, :, 1].ravel())
    assert [(e.label, e.value, round(e.onset_s, 6)) for e in recording.events][2] == ("index", 41.0, 0.2)
    np.save(tmp_path / "b.npy", np.swapaxes(x_NTC, 1, 2))
    assert np.array_equal(open_recording(tmp_path / "b.npy", SHAKEN).read([1])[0], x_NTC[:, :, 1].ravel())


def test_cwru_archive(tmp_path):
    drive_T, fan_T = np.random.default_rng(4).normal(0, 1, (2, 5000))
    own = {"X097_DE_time": drive_T[:, None], "X097_FE_time": fan_T[:, None], "X097RPM": np.array([[1796]])}
    scipy.io.savemat(tmp_path / "Normal_0.mat", own)
    recording = open_recording(tmp_path / "Normal_0.mat", SHAKEN)
    assert (
        recording.names == ["DE", "FE"]
        and recording.columns == {"rpm": 1796.0}
        and recording.kinds == ["vibration"] * 2
    )
    assert np.allclose(recording.read([0, 1]), [drive_T, fan_T], atol=1e-6)
    assert open_recording(tmp_path / "Normal_0.mat", ReadSpec(12_000, "g", ("FE",), "vibration")).names == ["FE"]
    assert code(tmp_path / "Normal_0.mat", SHAKEN, rate_hz=None) == "rate_missing"
    other = {"X098_DE_time": drive_T[:4000, None], "X098_FE_time": fan_T[:4000, None]}
    scipy.io.savemat(tmp_path / "98.mat", own | other)  # some of the archives hold another test as well
    assert open_recording(tmp_path / "98.mat", SHAKEN).samples == 4000
    scipy.io.savemat(tmp_path / "Normal_1.mat", own | other)
    assert code(tmp_path / "Normal_1.mat", SHAKEN) == "ambiguous_array"


@pytest.mark.parametrize("kind", ["v5", "v7.3"])
def test_matlab_structures(tmp_path, x_TC, kind):
    path = tmp_path / "a.mat"
    if kind == "v5":
        names = np.array(NAMES, object)
        scipy.io.savemat(path, {"eeg": {"signal": x_TC, "fs": RATE, "labels": names, "trigger": np.zeros(len(x_TC))}})
    else:
        with h5py.File(path, "w", userblock_size=512) as file:
            group = file.create_group("eeg")
            group.attrs["MATLAB_class"] = np.bytes_("struct")
            for name, value in {"signal": x_TC.T, "fs": np.array([[250.0]])}.items():
                group.create_dataset(name, data=value).attrs["MATLAB_class"] = np.bytes_("double")
        with open(path, "r+b") as file:
            file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    recording = open_recording(path, ReadSpec(unit="uV", channels=None if kind == "v5" else NAMES))
    assert recording.names == list(NAMES) and set(recording.rates_hz) == {RATE}
    assert np.allclose(recording.read(range(3)), x_TC.T)


def test_hdf5(tmp_path, x_TC):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        signal = file.create_dataset("run/eeg", data=x_TC.T)
        signal.attrs.update(sfreq=250.0, unit="uV")
        file["run/channels"] = np.array(NAMES, h5py.string_dtype())
        file["run/stim"] = (np.arange(len(x_TC)) == 750).astype(int) * 4
    recording = open_recording(path)
    assert recording.names == list(NAMES) and np.allclose(recording.read([2, 1]), x_TC.T[[2, 1]])
    assert [(e.onset_s, e.label) for e in recording.events] == [(3.0, "4")]


# ---- units


@pytest.mark.parametrize("own, stated, factor", [
    ("uV", None, 1), ("µV", None, 1), ("μV", None, 1), ("microvolts", None, 1), (None, "mV", 1e3), ("V", None, 1e6), ("volts", None, 1e6),
    ("nV", None, 1e-3), ("uV", "µV", 1), ("counts", "uV", 1), (None, None, "unit_missing"), ("", " ", "unit_missing"),
    ("counts", None, "unit_unknown"), (None, "furlong", "unit_unknown"), ("uV", "V", "unit_conflict"),
])  # fmt: skip
def test_units(own, stated, factor):
    if isinstance(factor, str):
        with pytest.raises(Rejected) as refusal:
            settle_unit(own, stated, "a.csv")
        assert refusal.value.code == factor
    else:
        assert settle_unit(own, stated, "a.csv") == ("uV", factor)
    assert settle_unit(own, "a.u.", "a.csv") == ("a.u.", 1.0)


# ---- real files


def test_muse(data_dir):
    for path in sorted(
        (data_dir / "muse").glob("*/*/*.csv")
    ):  # stamps are rounded to 1 ms, or jitter by 17 ms; nothing is missing
        recording = open_recording(path, ReadSpec(unit="uV"))
        assert recording.names == ["TP9", "AF7", "AF8", "TP10", "Right AUX"] and recording.kinds == ["eeg"] * 4 + [
            "misc"
        ]
        assert set(recording.rates_hz) == {256.0} and len(recording.segments) == 1
        table = np.loadtxt(path, delimiter=",", skiprows=1)
        assert np.allclose(recording.read(range(4)), table[:, 1:5].T, atol=1e-3)
        assert len(recording.events) == np.count_nonzero((table[1:, -1] != 0) & (np.diff(table[:, -1]) != 0))
        assert code(path) == "unit_missing" and code(path, unit="uV", rate_hz=250) == "rate_conflict"


def test_bonn(data_dir):
    spec = ReadSpec(173.61, "uV", ("EEG",))
    for path in sorted((data_dir / "bonn").glob("*/*.txt"))[::20]:
        recording = open_recording(path, spec)
        assert recording.samples == 4097 and np.array_equal(recording.read([0])[0], np.loadtxt(path).astype(np.float32))
        assert code(path, spec, rate_hz=None) == "rate_missing"


def test_bi2012_has_one_column_more_than_its_yml_names(data_dir):
    path = data_dir / "bi2012" / "subject_01_session_01.npz"
    assert code(path, unit="uV") == "channels_conflict"
    names = tuple("F7 F3 Fz F4 F8 T7 C3 Cz C4 T8 P7 P3 Pz P4 P8 O1 O2".split())
    recording = open_recording(path, ReadSpec(unit="uV", channels=names))
    assert recording.names == list(names) and set(recording.rates_hz) == {128.0} and recording.samples == 46804
    assert sorted({e.label for e in recording.events}) == ["1", "2"] and len(recording.events) == 640 + 128
    x_CT = recording.read(range(17))
    # all 17 are electrodes of one average reference: they add up to nothing
    assert np.abs(x_CT[:, 20_000:].astype(float).sum(0)).max() < 0.5 < np.abs(x_CT[:, 20_000:]).mean()
    assert code(path, unit="uV", channels=names, rate_hz=256) == "rate_conflict"


def test_bearings(data_dir):
    for path in sorted((data_dir / "cwru").glob("*.npy"))[::7]:
        recording = open_recording(path, SHAKEN)
        assert recording.kinds == ["vibration"] and recording.unit == "g"
        assert np.array_equal(recording.read([0])[0], np.load(path).ravel())
    path = data_dir / "femto" / "Bearing1_1.npz"
    recording = open_recording(path, ReadSpec(25_600, "g", ("horizontal", "vertical"), "vibration"))
    assert len(recording.segments) == 142 and recording.samples == 142 * 2560 and recording.columns == {"total": 2803.0}
    with np.load(path) as archive:
        assert np.array_equal(recording.read([0]).reshape(142, 2560), archive["acc"][:, :, 0])
        assert [e.value for e in recording.events] == archive["index"].tolist()
    assert code(path, ReadSpec(25_600, "uV")) == "epoched"
