"""The EDF reader against MNE, the 45 malformed files, altered sizes, and random damage; the writer against both."""

import os
import warnings
from datetime import datetime, timezone

import mne
import numpy as np
import pytest

from lib import channels, edf
from lib.errors import Rejected
from tests import malformed
from tests.malformed import CASES, CHANNELS

FLOAT32 = 2.0**-23


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def rejection(path) -> Rejected:
    with pytest.raises(Rejected) as caught:
        header = edf.read_header(path)
        edf.read_annotations(header)
        edf.read_signals(header, [0])
    return caught.value


def pick(header: edf.Header) -> list[int]:
    """The indices of CHANNELS as a build would take them: usable signals, exact names, the first of identical ones."""
    kept: list[int] = []
    for i, signal in enumerate(header.signals):
        twins = [j for j in kept if header.signals[j].label == signal.label]
        if signal.usable and not any(
            (edf.read_signals(header, [i]) == edf.read_signals(header, [j])).all() for j in twins
        ):
            kept.append(i)
    labels = [header.signals[i].label for i in kept]
    selection = channels.select(labels, [channels.kind(label) for label in labels], ",".join(CHANNELS), max_missing=0)
    return [kept[i] for i in selection.indices]


@pytest.mark.parametrize("name", CASES)
def test_malformed_file_is_refused_or_read_right(name, tmp_path, rng):
    case, path = CASES[name], tmp_path / f"{name}{CASES[name].suffix}"
    truth = case.write(path, rng)
    if truth is None:
        with pytest.raises(Rejected) as caught:
            header = edf.read_header(path)
            edf.read_signals(header, pick(header))
        assert caught.value.code == case.expect
        return

    header = edf.read_header(path)
    segments, events = edf.read_annotations(header)
    indices = pick(header)
    x_CT = edf.read_signals(header, indices)
    assert tuple(s.label for s in header.signals) == truth.names
    assert {header.signals[i].rate_hz for i in indices} == {truth.rate_hz}
    assert x_CT.dtype == np.float32 and x_CT.shape == truth.x_CT_uv.shape
    np.testing.assert_allclose(x_CT, truth.x_CT_uv, atol=1e-4)
    n = header.signals[indices[0]].samples_per_record
    assert [(a * n, b * n, onset_s) for a, b, onset_s in segments] == list(truth.segments)
    assert events == list(truth.events)
    assert any(note.startswith(case.note) for note in header.notes) if case.note else header.notes == []


def test_there_are_45_cases():
    assert len(CASES) == 45
    assert sum(case.expect is None for case in CASES.values()) == 33


def altered(tmp_path, rng, change, **options):
    """A file whose bytes `change(data, header bytes, record bytes)` made; returns its path."""
    path = tmp_path / "altered.edf"
    malformed.write(path, rng, edit=change, **options)
    return path


def plain(data: bytes, head: int) -> bytes:
    """The same file without annotations: its last signal renamed, and no longer EDF+."""
    count = head // 256 - 1
    at = 256 + (count - 1) * 16
    return data[:192] + b" " * 44 + data[236:at] + b"Aux".ljust(16) + data[at + 16 :]


def test_file_that_can_not_be_opened_is_unreadable(tmp_path):
    (tmp_path / "dangling.edf").symlink_to(tmp_path / "gone.edf")
    (tmp_path / "annex.edf").symlink_to("../.git/annex/objects/Xx/4z/SHA256E-s1--0.edf/SHA256E-s1--0.edf")
    os.mkfifo(tmp_path / "pipe.edf")
    codes = {name: rejection(tmp_path / name).code for name in ("dangling.edf", "gone.edf", ".", "pipe.edf")}
    assert set(codes.values()) == {"unreadable"}, codes
    assert rejection(tmp_path / "annex.edf").code == "annex_pointer"


def test_other_contents_are_not_edf(tmp_path, rng):
    contents = {"noise": rng.bytes(5000), "text": b"time,Fp1\n" * 999, "short": b"0       ", "spaces": b" " * 5000}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        assert rejection(tmp_path / name).code == "not_edf", name
    (tmp_path / "lfs").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert rejection(tmp_path / "lfs").code == "annex_pointer"


@pytest.mark.parametrize(
    "cells, fixed, code",
    [
        ({("samples", 1): "0"}, {}, "bad_header"),
        ({("samples", 1): "many"}, {}, "bad_header"),
        ({("samples", 1): "99999999"}, {}, "no_data"),
        ({("physical_max", 1): "nan"}, {}, "bad_header"),
        ({("digital_max", 1): ""}, {}, "bad_header"),
        ({}, {"records": "many"}, "bad_header"),
        ({}, {"records": "-7"}, "bad_header"),
        ({}, {"records": "0"}, "no_data"),
        ({}, {"record_s": "-1"}, "record_duration"),
        ({}, {"record_s": "soon"}, "record_duration"),
        ({}, {"record_s": "1e-300"}, "record_duration"),
        ({("samples", 0): "255"}, {}, "size_mismatch"),
    ],
)
def test_header_field_that_means_nothing_is_refused(cells, fixed, code, tmp_path, rng):
    malformed.write(tmp_path / "bad.edf", rng, cells=cells, fixed=fixed)
    assert rejection(tmp_path / "bad.edf").code == code


def test_line_ending_conversions_are_refused(tmp_path, rng):
    loud = {"shape": lambda x_CT: np.multiply(x_CT, 4, out=x_CT)}  # so that 0A and 0D are also upper bytes
    crlf = altered(tmp_path, rng, lambda d, h, r: d[:h] + d[h:].replace(b"\n", b"\r\n"), **loud)
    assert rejection(crlf).code == "line_endings"
    crlf = altered(
        tmp_path, rng, lambda d, h, r: d[:236] + b"-1      " + d[244:h] + d[h:].replace(b"\n", b"\r\n"), **loud
    )
    assert rejection(crlf).code == "line_endings"
    for bdf in (False, True):
        lf = altered(tmp_path, rng, lambda d, h, r: d[:h] + d[h:].replace(b"\r\n", b"\n"), bdf=bdf, **loud)
        assert rejection(lf).code == "size_mismatch"
        lost = altered(tmp_path, rng, lambda d, h, r: d[: h + r * 10 + 333] + d[h + r * 10 + 334 :], bdf=bdf)
        assert rejection(lost).code == "size_mismatch"


def test_mangled_recording_is_refused(data_dir):
    for path in sorted((data_dir / "damaged").glob("*.edf")):
        assert rejection(path).code == "line_endings"


@pytest.mark.parametrize("name", ["eegmat/Subject00_2.edf", "eegmmidb/S001/S001R01.edf", "formats/test.bdf"])
def test_real_recording_cut_short_is_read_and_one_that_lost_bytes_is_not(name, data_dir, tmp_path):
    data, path = (data_dir / name).read_bytes(), tmp_path / "x.edf"
    whole = edf.read_header(data_dir / name)
    path.write_bytes(data[: len(data) * 2 // 3])
    header = edf.read_header(path)
    assert header.notes == ["truncated"] and header.records == int(
        (len(data) * 2 // 3 - header.header_bytes) / header.record_bytes
    )
    expected = edf.read_signals(whole, [0])[:, : header.records * header.signals[0].samples_per_record]
    np.testing.assert_array_equal(edf.read_signals(header, [0]), expected)
    head, body = data[: header.header_bytes], data[header.header_bytes :]
    path.write_bytes(head + body[: len(body) // 3] + body[len(body) // 3 + 1 :])
    assert rejection(path).code == "size_mismatch"
    path.write_bytes(head + body.replace(b"\n", b"\r\n"))
    assert rejection(path).code == "line_endings"


def test_bytes_after_the_stated_records_are_ignored_only_where_they_are_records(tmp_path, rng):
    fewer = b"20      "
    cases = {
        "more of the same": (lambda d, h, r: plain(d[:236] + fewer + d[244:], h), None),
        "noise": (lambda d, h, r: plain(d, h) + np.random.default_rng(0).bytes(3 * r), "size_mismatch"),
        "zeros": (lambda d, h, r: plain(d, h) + bytes(3 * r), "size_mismatch"),
        "half a record": (lambda d, h, r: plain(d, h) + d[-r // 2 :], "size_mismatch"),
        "noise with annotations": (lambda d, h, r: d + np.random.default_rng(0).bytes(3 * r), "size_mismatch"),
        "an earlier record again": (lambda d, h, r: d + d[h : h + r], "size_mismatch"),
    }
    for name, (change, code) in cases.items():
        path = altered(tmp_path, rng, change)
        if code:
            assert rejection(path).code == code, name
        else:
            header = edf.read_header(path)
            assert (header.records, header.notes) == (20, ["records_ignored 10"])


def test_magic_decides_the_format_and_size_confirms_it(tmp_path, rng):
    sixteen_bits = altered(tmp_path, rng, lambda d, h, r: b"\xffBIOSEMI" + d[8:])
    assert rejection(sixteen_bits).code == "size_mismatch"
    twenty_four = altered(tmp_path, rng, lambda d, h, r: b"0".ljust(8) + d[8:], bdf=True)
    assert rejection(twenty_four).code == "size_mismatch"


def test_24_bits_are_read_over_their_whole_range(tmp_path, rng):
    extremes = np.array([-(1 << 23), -(1 << 23) + 1, -257, -256, -1, 0, 1, 255, 256, 65535, 65536, (1 << 23) - 1])

    def set_samples(x_CT):
        for row in x_CT:  # the file's scale is (digit + half) * step - 500
            row[: len(extremes)] = (extremes + (1 << 23)) * (1000 / ((1 << 24) - 1)) - 500

    truth = malformed.write(tmp_path / "x.bdf", rng, bdf=True, shape=set_samples)
    header = edf.read_header(tmp_path / "x.bdf")
    x_CT = edf.read_signals(header, range(6), volts=False)
    assert header.format == "bdf" and header.sample_bytes == 3
    np.testing.assert_allclose(x_CT, truth.x_CT_uv, atol=500 * FLOAT32)
    block = next(edf._blocks(header, 0, header.records))[1]
    for signal in header.signals:
        np.testing.assert_array_equal(edf._digital(header, block, signal)[0, : len(extremes)], extremes)


def test_unknown_unit_is_microvolts_only_where_the_signal_is_eegs(tmp_path, rng):
    path = tmp_path / "unit.edf"
    for unit, per_uv, code in (
        ("", 1, None),
        ("counts", 1, None),
        ("?V", 1, None),
        ("", 1e-3, "unit"),
        ("x", 1e3, "unit"),
    ):
        malformed.write(path, rng, unit=unit, per_uv=per_uv)
        header = edf.read_header(path)
        if code:
            assert rejection(path).code == code
            assert np.isfinite(edf.read_signals(header, [0], volts=False)).all()
        else:
            edf.read_signals(header, [0, 1])
            edf.read_signals(header, [0, 1])
            assert header.notes == [f"unit_guessed uV for {unit!r}"]


def test_file_that_shrinks_while_it_is_read_is_refused(tmp_path, rng):
    malformed.write(tmp_path / "x.edf", rng)
    header = edf.read_header(tmp_path / "x.edf")
    os.truncate(tmp_path / "x.edf", 50_000)
    with pytest.raises(Rejected, match="size_mismatch"):
        edf.read_signals(header, [0])


def test_only_signals_of_one_rate_are_read_together(tmp_path, rng):
    malformed.write(tmp_path / "x.edf", rng, extras=(malformed.Extra("EKG", 0, samples=100),))
    header = edf.read_header(tmp_path / "x.edf")
    assert [s.rate_hz for s in header.signals] == [100.0] + [256.0] * 6
    assert edf.read_signals(header, [0]).shape == (1, 3000) and edf.read_signals(header, [3, 1]).shape == (2, 7680)
    with pytest.raises(AssertionError, match="EKG"):
        edf.read_signals(header, [0, 1])


def test_discontinuous_file_must_say_when_its_records_start(tmp_path, rng):
    cases = {
        "no annotations": lambda d, h, r: plain(d, h)[:192] + b"EDF+D".ljust(44) + plain(d, h)[236:],
        "a record without a time": lambda d, h, r: d.replace(b"+7\x14\x14", b"\0\0\0\0"),
        "out of order": lambda d, h, r: d.replace(b"+7\x14\x14", b"+2\x14\x14"),
    }
    for name, change in cases.items():
        path = altered(tmp_path, rng, change, onsets_s=[float(r) for r in range(30)], events=())
        assert rejection(path).code == "record_onsets", name


def test_times_count_from_the_first_sample(tmp_path):
    """An EDF+ may start at a fraction of a second, and every gap of an EDF+D starts a segment."""
    onsets_s = [0.25, 1.25, 4.25, 5.25, 5.75 + 10.5]
    path = tmp_path / "x.edf"
    edf.write_edf(
        path, np.ones((2, 500)), 100, ["C3", "C4"], [(4.75, 0.5, "in"), (17.0, 9, "over")], record_onsets_s=onsets_s
    )
    header = edf.read_header(path)
    segments, events = edf.read_annotations(header)
    assert segments == [(0, 2, 0.0), (2, 4, 4.0), (4, 5, 16.0)]
    assert events == [(4.5, 0.5, "in"), (16.75, 0.25, "over")] and header.notes == ["label_clipped 1"]
    assert not header.continuous


def test_annotations_of_any_encoding_order_and_kind(tmp_path, rng):
    events = ((8.0, 1.5, "später"), (2.0, 0.0, "öffnet \u03b1"), (2.0, 0.0, "twice"), (2.0, 0.0, "twice"))
    malformed.write(tmp_path / "x.edf", rng, events=events)
    header = edf.read_header(tmp_path / "x.edf")
    _, found = edf.read_annotations(header)
    assert found == sorted(events, key=lambda e: e[0])
    garbled = altered(tmp_path, rng, lambda d, h, r: d.replace(b"+12\x14eyes", b"twelve\x14e"))
    header = edf.read_header(garbled)
    assert edf.read_annotations(header)[1] == [(3.5, 2.0, "seizure")] and header.notes == ["label_unreadable 1"]


def test_written_file_comes_back(tmp_path, rng):
    x_CT = rng.normal(size=(5, 2560)) * np.array([[0.01], [1], [40], [3000], [0]])
    events = [(0.0, 0.0, "start"), (1.25, 3.5, "Anfall \u00fc"), (9.9, 0.05, "last")]
    start = datetime(2021, 3, 4, 5, 6, 7)
    path, names = tmp_path / "x.edf", ["Fp1", "Fp2", "EEG C3-REF", "T3", "A1"]
    for dimension in ("uV", "\u00b5V", "mV", "V"):
        edf.write_edf(path, x_CT, 256, names, events, dimension=dimension, start=start)
        header = edf.read_header(path)
        y_CT = edf.read_signals(header, range(5))
        lsb_C = np.array([s.gain * s.to_uv for s in header.signals])
        assert (np.abs(y_CT - x_CT) <= 0.501 * lsb_C[:, None]).all() and (y_CT[4] == 0).all()
        if dimension.endswith(("uV", "\u00b5V")):  # in volts eight characters leave steps of 10 µV
            assert (lsb_C * 32767 <= np.abs(x_CT).max(axis=1) * 1.00001 + 2e-3).all()
        assert edf.read_annotations(header) == ([(0, 10, 0.0)], events)
        assert [s.label for s in header.signals] == names and header.start == start and header.notes == []
    first = path.read_bytes()
    edf.write_edf(path, x_CT, 256, names, events, dimension="V", start=start)
    assert path.read_bytes() == first


def test_written_file_saturates_at_the_stated_range(tmp_path):
    x_CT = np.array([[-900.0, -100, 0, 100], [0, 1, 2, 3]])
    edf.write_edf(tmp_path / "x.edf", x_CT, 4, ["C3", "C4"], physical_uv=[200, 10])
    header = edf.read_header(tmp_path / "x.edf")
    np.testing.assert_allclose(edf.read_signals(header, [0, 1]), [[-200, -100, 0, 100], [0, 1, 2, 3]], atol=0.004)


def test_what_does_not_fit_the_format_is_not_written(tmp_path):
    x_CT = np.zeros((1, 512))
    with pytest.raises(ValueError, match="doesn't fit"):
        edf.write_edf(tmp_path / "x.edf", x_CT, 256, ["a name of many characters"])
    for kwargs in (
        {"rate_hz": 250, "names": ["C3"]},
        {"rate_hz": 256, "names": ["C3", "C4"]},
        {"rate_hz": 0.1, "names": ["C3"]},
    ):
        with pytest.raises(ValueError, match="don't make"):
            edf.write_edf(tmp_path / "x.edf", x_CT, **kwargs)
    for wrong in ({"x_CT_uv": x_CT * np.nan}, {"events": [(0, 0, "a\x14b")]}):
        with pytest.raises(ValueError, match="finite numbers"):
            edf.write_edf(tmp_path / "x.edf", **{"x_CT_uv": x_CT, "rate_hz": 256, "names": ["C3"], **wrong})
    assert not (tmp_path / "x.edf").exists()


def compare_with_mne(path) -> int:
    """Signals, rates, start and annotations equal MNE's; returns how many signals were compared."""
    header = edf.read_header(path)
    _, events = edf.read_annotations(header)
    read = mne.io.read_raw_bdf if header.format == "bdf" else mne.io.read_raw_edf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = read(path, stim_channel=False, verbose="ERROR")
    rate_hz = raw.info["sfreq"]
    known = [i for i, s in enumerate(header.signals) if s.to_uv and s.usable and s.rate_hz == rate_hz]
    assert len(raw.ch_names) == len(header.signals) and max(s.rate_hz for s in header.signals) == rate_hz
    x_CT, y_CT = edf.read_signals(header, known), raw.get_data(picks=known) * 1e6
    # float32 holds 1e-4 µV only up to some hundred µV: beyond, one step of float32
    tolerance_C = np.maximum(
        1e-4,
        FLOAT32
        * np.array([max(np.abs(y).max(), abs(header.signals[i].bias)) for i, y in zip(known, y_CT, strict=True)]),
    )
    assert x_CT.shape == y_CT.shape and (np.abs(x_CT - y_CT) <= tolerance_C[:, None]).all()
    expected = zip(raw.annotations.onset, raw.annotations.duration, raw.annotations.description, strict=True)
    rounded = [sorted((round(o, 5), round(d, 5), t) for o, d, t in rows) for rows in (events, expected)]
    assert rounded[0] == rounded[1]
    if raw.info["meas_date"]:
        assert abs((header.start.replace(tzinfo=timezone.utc) - raw.info["meas_date"]).total_seconds()) < 1
    return len(known)


@pytest.mark.parametrize("folder, files, signals", [("eegmat", 20, 420), ("eegmmidb", 6, 384), ("formats", 5, 76)])
def test_real_recordings_equal_mnes(folder, files, signals, data_dir):
    paths = sorted(p for s in ("edf", "bdf") for p in (data_dir / folder).rglob(f"*.{s}") if "Hypnogram" not in p.name)
    assert [compare_with_mne(path) > 0 for path in paths] == [True] * files


def test_written_file_equals_mnes(tmp_path, rng):
    events = [(0.5, 0.0, "a"), (3.0, 2.0, "b c")]
    edf.write_edf(
        tmp_path / "x.edf", rng.normal(0, 30, (3, 2000)), 200, ["C3", "Cz", "C4"], events, start=datetime(2020, 1, 2)
    )
    assert compare_with_mne(tmp_path / "x.edf") == 3


def test_odd_real_files(data_dir):
    formats = data_dir / "formats"
    assert rejection(formats / "SC4001EC-Hypnogram.edf").code == "no_signals"
    header = edf.read_header(formats / "test.bdf")
    status = next(i for i, s in enumerate(header.signals) if s.label == "Status")
    codes = edf.read_signals(header, [status], volts=False)
    assert header.notes == ["truncated"] and (codes == np.rint(codes)).all()
    assert edf.read_header(formats / "subsecond_starttime.edf").notes == ["inverted Fp1, F7, T3"]


@pytest.mark.parametrize("bdf", [False, True])
def test_random_damage_is_refused_or_read_finite(bdf, tmp_path):
    """Whatever the bytes: Rejected, or finite float32 of the stated shape, with memory bounded by the file."""
    malformed.write(path := tmp_path / "x.edf", rng := np.random.default_rng(11), bdf=bdf, onsets_s=malformed.GAP_S)
    whole = path.read_bytes()[: 256 * 8 + 3 * (len(path.read_bytes()) - 256 * 8) // 30]
    outcomes = []
    for _ in range(250):
        data = bytearray(whole)
        for at in rng.integers(0, 256 * 8 if rng.random() < 0.8 else len(data), rng.integers(1, 9)).tolist():
            data[at] = rng.choice([rng.integers(256), *b"0123456789-.,e +\0\x14\x15"])
        if rng.random() < 0.2:
            data = data[: rng.integers(len(data))]
        path.write_bytes(data)
        try:
            header = edf.read_header(path)
            segments, events = edf.read_annotations(header)
            for i, signal in enumerate(header.signals):
                if signal.usable:
                    x_CT = edf.read_signals(header, [i], volts=False)
                    assert x_CT.shape == (1, header.records * signal.samples_per_record) and x_CT.dtype == np.float32
                    assert np.isfinite(x_CT).all() and x_CT.nbytes <= 2 * len(data)
            assert segments[0][0] == 0 and segments[-1][1] == header.records
            assert all(onset >= 0 and duration >= 0 for onset, duration, _ in events)
            outcomes.append("read")
        except Rejected as refused:
            assert refused.code.isidentifier() and refused.reason
            outcomes.append(refused.code)
    assert len(set(outcomes)) > 4 and outcomes.count("read") > 20
