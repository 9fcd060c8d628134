"""The live signal path: any chunking gives the same bits, equal to scipy's filter and to a causal cache; nothing doubtful passes as valid."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

import build_cache
from kernels import plain
from lib import recordings
from lib.channels import TEN_TWENTY
from lib.errors import Unusable
from lib.intake import Intake, Layout, Path, Window
from tests import recipes
from tests.recipes import ROOT

NAMES = TEN_TWENTY[:8]
LAYOUT = Layout(NAMES, 250.0, "uV")
PATH = Path(NAMES, "average", (1.0, 40.0), rate_hz=None, window=100, step=50, settle_s=0.4)


def signal(seconds: float = 4.0, rate_hz: float = 250.0, channels: int = 8, seed: int = 0) -> np.ndarray:
    """Time-major float32 microvolts with the offsets of electrodes."""
    rng = np.random.default_rng(seed)
    x_CT = recipes.noise_uv(rng, channels, round(seconds * rate_hz)) + rng.uniform(-2e4, 2e4, (channels, 1))
    return x_CT.T.astype(np.float32)


def feed(intake: Intake, x_TC: np.ndarray, sizes=(37,), first: int = 0) -> list[Window]:
    """Windows of a signal pushed in chunks of these sizes, again and again."""
    windows, at, i = [], 0, 0
    while at < len(x_TC):
        size = min(sizes[i % len(sizes)], len(x_TC) - at)
        windows += intake.push(first + at, x_TC[at : at + size])
        at, i = at + size, i + 1
    return windows


def assert_same(ours: list[Window], theirs: list[Window]) -> None:
    assert [(w.start, w.stop, w.valid, w.reason) for w in ours] == [
        (w.start, w.stop, w.valid, w.reason) for w in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        assert a.x_CT.dtype == np.float32 and a.x_CT.flags.c_contiguous and np.array_equal(a.x_CT, b.x_CT)


# ----------------------------------------------------------------------------
# the same numbers


@pytest.mark.parametrize("rate_hz", [None, 100.0])
@pytest.mark.parametrize("reference", ["average", "F3", "none", "Fp1,Fp2"])
@pytest.mark.parametrize("channels, bad", [(NAMES, ()), ((NAMES[5], NAMES[0], NAMES[2]), ()), (NAMES[:4], NAMES[1:2])])
def test_the_compiled_path_has_the_bits_of_the_plain_one(channels, bad, reference, rate_hz, monkeypatch):
    path = replace(PATH, channels=channels, rate_hz=rate_hz, reference=reference, bad=bad, unit="V" if bad else "uV")
    layout, x_TC = replace(LAYOUT, unit="mV"), signal() / np.float32(1e3)
    x_TC[400, 5], x_TC[600:640, 0], x_TC[700, 2] = np.nan, np.inf, 2e3  # doubtful in the middle of a chunk
    sizes = (1, 8, 130, 64, 3)
    compiled = Intake(layout, path)
    ours = feed(compiled, x_TC, sizes)
    assert plain.library() is None or compiled.live
    monkeypatch.setattr(plain, "_loaded", [None])
    without = Intake(layout, path)
    assert_same(ours, feed(without, x_TC, sizes))
    assert without.live is None and without.counts == compiled.counts and without.quality() == compiled.quality()


def test_bipolar_channels_are_left_as_they_are_as_in_a_cache():
    layout, x_TC = Layout(("FP1-F7", "F7-T7", "T7-P7"), 250.0, "uV"), signal(channels=3)
    path = replace(PATH, channels=layout.channels)
    assert_same(feed(Intake(layout, path), x_TC), feed(Intake(layout, replace(path, reference="none")), x_TC))
    layout, x_TC = Layout(("C3", "Fp1-F7", "C4", "F7-T7"), 250.0, "uV"), signal(channels=4)
    path = replace(PATH, channels=layout.channels, reference="average")
    plainly = feed(Intake(layout, replace(path, reference="none")), x_TC)
    for ours, theirs in zip(feed(Intake(layout, path), x_TC), plainly, strict=True):
        assert np.array_equal(ours.x_CT[1::2], theirs.x_CT[1::2])
        assert np.allclose(ours.x_CT[::2], theirs.x_CT[::2] - theirs.x_CT[::2].mean(0), atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    rate_hz=st.sampled_from([None, 100.0, 128.0]),
    reference=st.sampled_from(["Fz", "average", "none", "Fp1,Fp2"]),
    bad=st.booleans(),
)
def test_chunks_of_any_size_give_the_same_bits(sizes, rate_hz, reference, bad):
    path = replace(PATH, rate_hz=rate_hz, reference=reference)
    x_TC = signal()
    if bad:  # runs that are bridged, and one that isn't; a value that can't be
        x_TC[[120, 121, 300], 2] = np.nan
        x_TC[500:560] = np.inf
        x_TC[700, 1] = 3e6
    whole, cut = Intake(LAYOUT, path), Intake(LAYOUT, path)
    assert_same(feed(cut, x_TC, sizes), feed(whole, x_TC, (len(x_TC),)))
    assert cut.counts == whole.counts


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 64), min_size=1, max_size=4), gap=st.integers(-40, 60), at=st.integers(1, 700))
def test_gaps_of_any_size_are_the_same_however_chunks_fall(sizes, gap, at):
    x_TC, ours, theirs = signal(), Intake(LAYOUT, PATH), Intake(LAYOUT, PATH)
    for intake, s in ((ours, sizes), (theirs, (10_000,))):
        intake.found = feed(intake, x_TC[:at], s) + feed(intake, x_TC[at:], s, first=at + gap)
    assert_same(ours.found, theirs.found)
    assert ours.counts == theirs.counts


def test_equals_scipys_filter_in_double_precision():
    x_TC = signal()
    sos = scipy.signal.butter(4, (1.0, 40.0), "bandpass", fs=250.0, output="sos")
    x_CT = x_TC.T.astype(np.float64)
    zi = scipy.signal.sosfilt_zi(sos)[:, None, :] * x_CT[:, :1]
    y_CT = scipy.signal.sosfilt(sos, x_CT, axis=1, zi=zi)[0]
    intake = Intake(LAYOUT, PATH)
    windows = feed(intake, x_TC, (1, 8, 32, 5))
    kept = intake.ring.read(intake.ring.oldest, intake.ring.total)
    np.testing.assert_allclose(kept, y_CT[:, intake.ring.oldest : intake.ring.total], rtol=0, atol=1e-10)
    z_CT = y_CT - y_CT.mean(0)
    for w in windows:
        np.testing.assert_allclose(w.x_CT, z_CT[:, w.start : w.stop], rtol=1e-6, atol=1e-6)
    assert [w.start for w in windows] == list(range(0, 901, 50)) and windows[-1].stop == 1000
    one = feed(Intake(LAYOUT, replace(PATH, reference="Fz")), x_TC)[5]
    z_CT = y_CT - y_CT[NAMES.index("Fz")]
    np.testing.assert_allclose(one.x_CT, z_CT[:, one.start : one.stop], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rate_hz, reference", [(160.0, "average"), (100.0, "Cz"), (128.0, "none")])
def test_equals_a_causal_cache_of_a_real_recording(data_dir, rate_hz, reference):
    file = data_dir / "eegmmidb" / "S001" / "S001R04.edf"
    cfg = build_cache.Config(rate_hz=rate_hz, reference=reference, causal=True, band_hz=(0.5, 45.0))
    options = build_cache.signal_options(cfg, "eeg", [recordings.ReadSpec()])
    recording = recordings.open_recording(file, recordings.ReadSpec())
    ready = build_cache.prepare(recording, options, recordings.ReadSpec(), None)
    x_CT = recording.read(list(range(len(recording.names))))
    unit = recording.unit
    path = Path(ready.names, reference, (0.5, 45.0), rate_hz=rate_hz, window=256, step=256, settle_s=0)
    windows = feed(Intake(Layout(tuple(recording.names), 160.0, unit), path), x_CT.T.astype(np.float32), (8, 3, 40))
    assert len(windows) == len(ready.z_TC) // 256 > 40 and all(w.valid for w in windows)
    for k, w in enumerate(windows):
        z_CT = (w.x_CT - ready.offset_C[:, None]) / ready.scale_C[:, None]
        stored_CT = ready.z_TC[256 * k : 256 * (k + 1)].T.astype(np.float32)
        np.testing.assert_allclose(z_CT, stored_CT, rtol=1e-3, atol=1e-5)  # float16 keeps eleven bits


# ----------------------------------------------------------------------------
# channels, rates, units


def test_channels_are_found_by_name_and_brought_into_the_models_order():
    x_TC = signal()
    announced = tuple(f"EEG {n.upper()}-REF" for n in reversed(NAMES)) + ("ECG", "Status")
    turned = np.concatenate([x_TC[:, ::-1], np.full((len(x_TC), 2), np.nan, np.float32)], axis=1)  # not our business
    ours = feed(Intake(Layout(announced, 250.0, "uV"), PATH), turned)
    assert_same(ours, feed(Intake(LAYOUT, PATH), x_TC))
    every = Intake(Layout(announced, 250.0, "uV"), replace(PATH, channels=()))
    assert every.names == tuple(n for n in TEN_TWENTY if n in NAMES)  # as the cache builder picks and orders them


@pytest.mark.parametrize(
    "layout, path, words",
    [
        (Layout(NAMES[:6], 250.0, "uV"), PATH, ("F8", "T7", "lacks", "--missing mask")),
        (Layout((*NAMES, "T3"), 250.0, "uV"), replace(PATH, channels=(*NAMES[:7], "T5")), ("T5",)),
        (Layout(("Fz", "EEG Fz", "Cz"), 250.0, "uV"), Path(("Cz",), "FZ"), ("2 times",)),
        (LAYOUT, replace(PATH, reference="A1,A2"), ("reference A1,A2",)),
        (Layout(NAMES, 250.0, "furlong"), PATH, ("furlong", "uV")),
        (Layout(NAMES, 60.0, "uV"), PATH, ("60 Hz", "40 Hz")),
        (Layout(NAMES, 90.0, "uV"), replace(PATH, band_hz=None, rate_hz=100.0), ("90 Hz",)),
        (Layout(NAMES, float("nan"), "uV"), PATH, ("sampling rate",)),
        (Layout(("Status", "ECG"), 250.0, "uV"), replace(PATH, channels=()), ("ECG",)),
        (LAYOUT, replace(PATH, bad=NAMES), ("none",)),
        (LAYOUT, replace(PATH, bad=("F7", "Fp9", "Ozz")), ("--bad-channels Fp9, Ozz:", "F7")),
        (LAYOUT, replace(PATH, window=0), ("window",)),
    ],
)
def test_a_stream_that_does_not_fit_is_refused_in_one_line(layout, path, words):
    with pytest.raises(Unusable) as refused:
        Intake(layout, path)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


def test_bad_and_missing_channels_are_zero_and_in_no_average():
    x_TC = signal()
    keep = [i for i, n in enumerate(NAMES) if n not in ("F7", "Fz")]
    few = feed(Intake(Layout(tuple(NAMES[i] for i in keep), 250.0, "uV"), replace(PATH, partial=True)), x_TC[:, keep])
    x_TC[:, NAMES.index("F7")] = np.nan
    masked = feed(Intake(LAYOUT, replace(PATH, bad=("F7", "FZ"))), x_TC)
    assert_same(masked, few)
    assert all(w.valid for w in masked[3:]) and not masked[5].x_CT[[2, 4]].any() and masked[5].x_CT[keep].any()
    assert np.abs(masked[5].x_CT.mean(0)).max() < 1e-4


@pytest.mark.parametrize("unit, factor", [("mV", 1e-3), ("V", 1e-6), ("µV", 1.0), ("a.u.", 1.0)])
def test_units_come_in_by_name_and_go_out_as_the_model_wants(unit, factor):
    x_TC = signal() - np.float32(2e4)
    ours = feed(Intake(Layout(NAMES, 250.0, unit), PATH), (x_TC * factor).astype(np.float32))
    volts = feed(Intake(LAYOUT, replace(PATH, unit="V")), x_TC)
    for a, b, c in zip(ours, volts, feed(Intake(LAYOUT, PATH), x_TC), strict=True):
        np.testing.assert_allclose(a.x_CT, c.x_CT, atol=0.02)  # float32 of 20 mV
        np.testing.assert_allclose(b.x_CT, 1e-6 * c.x_CT, rtol=1e-6)


# ----------------------------------------------------------------------------
# what is doubtful


def test_a_start_is_invalid_until_the_filter_has_settled():
    windows = feed(Intake(LAYOUT, PATH), signal(), first=1_000_000)
    assert [w.reason for w in windows[:3]] == ["settling", "settling", None]  # 0.4 s: windows from sample 100 on
    assert windows[0].start == 1_000_000 and all(w.valid for w in windows[2:])


@settings(max_examples=20, deadline=None)
@given(
    place=st.integers(200, 500), length=st.integers(1, 25), value=st.sampled_from([np.nan, np.inf, -np.inf, 2e6, -3e38])
)
def test_what_can_not_be_never_poisons_the_filter(place, length, value):
    x_TC = signal()
    clean = feed(Intake(LAYOUT, PATH), x_TC)
    x_TC[place : place + length, 3] = value
    intake = Intake(LAYOUT, PATH)
    windows = feed(intake, x_TC)
    reason = "saturated" if np.isfinite(value) else "nan"
    assert len(windows) == len(clean) and intake.counts["held"] == length and not intake.counts["resets"]
    for w, c in zip(windows, clean, strict=True):
        assert np.isfinite(w.x_CT).all()
        touched = w.start < place + length and w.stop > place
        assert w.reason == (reason if touched and w.start >= 100 else c.reason)
        if w.stop <= place:
            assert np.array_equal(w.x_CT, c.x_CT)
    assert np.abs(windows[-1].x_CT - clean[-1].x_CT).max() < 1.0  # µV: what was held has died away


@pytest.mark.parametrize("rate_hz", [None, 100.0])
def test_a_window_in_which_no_channel_moves_is_invalid(rate_hz):
    x_TC = signal(8)
    x_TC[500:1500] = x_TC[500]  # an amplifier that sends its last sample again and again
    windows = feed(Intake(LAYOUT, replace(PATH, rate_hz=rate_hz)), x_TC, (1, 64, 200))
    assert [w.reason for w in windows if w.start >= 200] == [
        "flat" if w.start >= 500 and w.stop <= 1500 else None for w in windows if w.start >= 200
    ]
    x_TC[500:1500, 2] = signal(4, seed=1)[:, 2]
    assert all(w.valid for w in feed(Intake(LAYOUT, PATH), x_TC) if w.start >= 200)  # one channel that does is enough


def test_too_long_a_run_of_bad_samples_starts_the_filter_anew():
    x_TC = signal()
    x_TC[300:326, 3] = np.nan  # 104 ms
    intake = Intake(LAYOUT, PATH)
    windows = feed(intake, x_TC, (7,))
    assert intake.counts["resets"] == 1
    fresh = feed(Intake(LAYOUT, PATH), x_TC[326:], first=326)
    after = [w for w in windows if w.start >= 326]
    assert [w.reason for w in after[:3]] == ["nan", "nan", None]
    assert all(np.array_equal(a.x_CT, b.x_CT) for a, b in zip(after, fresh, strict=True))


@pytest.mark.parametrize("rate_hz", [None, 100.0])
def test_bad_samples_here_and_there_are_filtered_in_pieces_and_the_same_as_one_by_one(rate_hz, monkeypatch):
    x_TC = signal(16)
    x_TC[400:2000:3, 3], x_TC[401:1999:3, 5] = np.nan, 2e6
    x_TC[3000:3026, 0] = np.nan  # 104 ms: a new start
    one, whole = (Intake(LAYOUT, replace(PATH, rate_hz=rate_hz)) for _ in range(2))
    expected, calls = feed(one, x_TC, (1,)), []
    process = whole.causal.process
    monkeypatch.setattr(whole.causal, "process", lambda x_CT: (calls.append(x_CT.shape[1]), process(x_CT))[1])
    assert_same(whole.push(0, x_TC), expected)
    assert whole.counts == one.counts and whole.counts["held"] == 534 + 533 + 26
    assert len(calls) <= len(x_TC) / whole.piece + 3  # a call per bad sample held up all streams for seconds


@pytest.mark.parametrize("value", [np.nan, -2e6])
@pytest.mark.parametrize("channels", [slice(None), slice(3, 4)])
def test_bad_samples_at_the_start_are_not_taken_for_the_electrodes_offset(channels, value):
    x_TC = signal()
    x_TC[:10, channels] = value
    intake = Intake(LAYOUT, PATH)
    windows = feed(intake, x_TC, (7, 1))
    fresh = feed(Intake(LAYOUT, PATH), x_TC[10:], first=10)
    assert [w.valid for w in windows] == [w.valid for w in fresh] and intake.counts["held"] == 10
    assert all(np.array_equal(a.x_CT, b.x_CT) for a, b in zip(windows, fresh, strict=True))


def test_a_short_gap_is_bridged_and_its_windows_are_invalid():
    x_TC, intake = signal(), Intake(LAYOUT, PATH)
    windows = feed(intake, x_TC[:400]) + feed(intake, x_TC[425:], first=425)  # 100 ms
    assert [w.start for w in windows] == list(range(0, 901, 50))  # time goes on
    assert {w.start for w in windows if w.reason == "gap"} == {350, 400}
    assert dict(intake.counts) == {"gaps": 1, "lost": 25, "held": 25}


def test_a_long_gap_or_a_count_that_goes_back_starts_anew():
    for first, reason in ((426, "gap"), (399, "rewind"), (0, "rewind")):
        x_TC, intake = signal(), Intake(LAYOUT, PATH)
        before = feed(intake, x_TC[:400])
        after = feed(intake, x_TC[400:], first=first)
        assert max(w.stop for w in before) <= 400 and after[0].start == first and intake.counts["resets"] == 1
        assert [w.reason for w in after[:3]] == [reason, reason, None]
        fresh = feed(Intake(LAYOUT, PATH), x_TC[400:], first=first)
        assert all(np.array_equal(a.x_CT, b.x_CT) for a, b in zip(after, fresh, strict=True))


def test_a_segment_begins_where_it_is_told_to():
    x_TC, intake = signal(), Intake(LAYOUT, replace(PATH, rate_hz=125.0, window=50, step=25))
    windows = feed(intake, x_TC[:333])
    intake.restart(333)
    again = feed(intake, x_TC[333:], first=333)
    assert windows[-1].stop <= 333 and again[0].start == 332 and again[1].start == 382  # of 125 Hz, the nearest sample
    intake.restart(950)  # behind: as much as is still there
    assert intake.push(1000, x_TC[:50])[0].start == 950
    late = Intake(LAYOUT, PATH)
    late.restart(120)
    assert feed(late, x_TC)[0].start == 120


def test_windows_may_overlap_touch_or_be_apart():
    x_TC = signal()
    every = feed(Intake(LAYOUT, replace(PATH, step=1)), x_TC)
    for step in (100, 130):
        some = feed(Intake(LAYOUT, replace(PATH, step=step)), x_TC)
        assert_same(some, every[::step])


# ----------------------------------------------------------------------------
# how good the signal is, and what that costs to import


def test_quality_names_the_channels_that_are_not_well():
    x_TC = signal()
    t = np.arange(len(x_TC)) / 250
    x_TC[:, 0] = 5
    x_TC[:, 1] = np.clip(60 * np.sin(2 * np.pi * 3 * t), -55, 55)
    x_TC[:, 2] += 300 * np.sin(2 * np.pi * 50 * t)
    intake = Intake(LAYOUT, PATH)
    assert intake.quality() == {}
    feed(intake, x_TC)
    quality = intake.quality()
    assert list(quality) == list(NAMES)
    assert [n for n, q in quality.items() if q["flat"]] == [NAMES[0]]
    assert [n for n, q in quality.items() if q["clipped"]] == [NAMES[1]]
    assert quality[NAMES[2]]["line"] > 0.9 > 0.2 > quality[NAMES[3]]["line"]
    assert 10 < quality[NAMES[4]]["rms_uV"] < 40


def test_the_live_path_needs_neither_torch_nor_mne():
    program = "import sys; from lib import intake, pipelines; print({'mne', 'torch', 'sklearn', 'pyriemann'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
