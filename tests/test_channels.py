"""Electrode names, profiles and spline interpolation."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib import channels
from lib.deep import Encoder
from lib.errors import Rejected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("EEG FP1-REF", "Fp1"),
        ("EEG T3-LE", "T7"),
        ("T6", "P8"),
        ("Fc5.", "FC5"),
        ("Iz..", "Iz"),
        ("m1", "A1"),
        ("E001", "E1"),
        ("E129", "Cz"),
        ("C3P", "C3P"),
        ("EEG A2-A1", "A2-A1"),
        ("EEG 31-REF", "31"),
        ("FP1-F7", "FP1-F7"),
        ("", ""),
    ],
)
def test_canonical_is_exact(name, expected):
    assert channels.canonical(name) == expected
    assert channels.canonical(channels.canonical(name)) == expected


def test_positions_are_mnes():
    mne = pytest.importorskip("mne")
    names = mne.channels.get_builtin_montages()
    montage = mne.channels.make_standard_montage("colin27_1005" if "colin27_1005" in names else "standard_1005")
    info = mne.create_info(montage.ch_names, 100.0, "eeg")
    info.set_montage(montage)
    for channel in info["chs"]:
        if channel["ch_name"] in channels.POSITIONS:
            assert np.allclose(channel["loc"][:3], channels.POSITIONS[channel["ch_name"]], atol=1e-4), channel[
                "ch_name"
            ]
    # the HydroCel net was moved onto the same head: its equivalents of 10-20 electrodes lie within three centimetres of them
    for ours, theirs in (("E36", "C3"), ("E104", "C4"), ("E11", "Fz"), ("E62", "Pz"), ("E70", "O1"), ("E22", "Fp1")):
        assert np.linalg.norm(np.subtract(channels.POSITIONS[ours], channels.POSITIONS[theirs])) < 0.03
    assert sum(n.startswith("E") and n[1:].isdigit() for n in channels.POSITIONS) == 128


def test_all_takes_known_electrodes_in_canonical_order():
    names = ["EEG O1-REF", "EEG FP1-REF", "EEG EKG1-REF", "EEG 31-REF", "EEG A2-A1", "EEG CZ-REF"]
    picked = channels.select(names, [channels.kind(n) for n in names], "all")
    assert picked.names == ("Fp1", "Cz", "O1") and picked.indices == (1, 5, 0)
    assert picked.dropped == ("EEG EKG1-REF", "EEG 31-REF", "EEG A2-A1")


def test_unknown_names_only_where_no_electrode_is_known_or_the_user_named_them():
    kinds = ["unknown", "unknown", "eeg"]
    assert channels.select(["x", "y", "Cz"], kinds, "all").names == ("Cz",)
    assert channels.select(["x", "y", "Cz"], kinds, "all", stated=True).names == ("Cz", "x", "y")
    assert channels.select(["x", "y"], kinds[:2], "all").names == ("x", "y")
    with pytest.raises(Rejected, match="no_eeg_channels"):
        channels.select(["ECG", "EMG"], ["ecg", "emg"], "all")


def test_biosemi_names_are_no_ear_lobes():
    names = [f"A{i}" for i in range(1, 17)]
    picked = channels.select(names, ["eeg"] * 16, "all")
    assert picked.names == tuple(names) and picked.indices == tuple(range(16))


def test_biosemi_places_are_no_electrodes_of_their_name():
    names = [f"{box}{i}" for box in "ABCD" for i in range(1, 33)] + ["EXG1", "EXG8", "GSR1", "Erg1", "Plet", "Temp"]
    kinds = [channels.kind(n) for n in names]
    assert channels.select(names, kinds, "all").names == tuple(names[:128])
    assert channels.standard(names) == [None] * len(names) and channels.standard(["C3", "x"]) == ["C3", None]
    for profile in ("C3,C4", "tuh19", "A1,A2"):
        with pytest.raises(Rejected, match="missing_channel"):
            channels.select(names, kinds, profile)
    assert channels.select(names, kinds, "A1,B7").indices == (0, 38)
    with pytest.raises(Rejected, match="missing_reference"):
        channels.reference_channels("A1,A2", names)
    assert channels.reference_channels("A1,B7", names) == [0, 38]
    model = SimpleNamespace(path=SimpleNamespace(channels=names[:128]))
    assert np.isnan(Encoder._positions_C3.func(model)).all()  # nor are they in what is served
    model.path.channels = ("C3", "x")
    np.testing.assert_allclose(Encoder._positions_C3.func(model), [channels.POSITIONS["C3"], [np.nan] * 3], rtol=1e-6)


def test_e1_and_e2_of_a_sleep_recording_are_eyes():
    def picked(*names: str, **options) -> tuple[str, ...]:
        return channels.select(names, [channels.kind(n) for n in names], "all", **options).names

    assert picked("C3", "C4", "O1", "E1", "E2") == ("C3", "C4", "O1")
    assert picked("C3-M2", "C4-M1", "E1", "E2") == ("C3-M2", "C4-M1") == picked("C3-M2", "C4-M1", "E1-M2", "E2-M2")
    assert picked("E1", "E2", "E3", "Cz") == ("Cz", "E1", "E2", "E3")  # EGI's net, or a part of it
    assert picked("C3", "E1", "E2", stated=True) == ("C3", "E1", "E2")


@pytest.mark.parametrize(
    "names, bipolar",
    [
        (["FP1-F7", "F7-T7", "T7-P7", "-", "ECG"], True),  # a double banana
        (["EEG Fpz-Cz", "EEG Pz-Oz", "EOG"], True),
        (["F3-M2", "C4-M1"], True),
        (["Fp1-A1", "F7-A1", "T3-A1"], False),  # one reference, spelled out
        (["EEG FP1-REF", "EEG F7-REF", "EEG A2-A1"], False),
        (["x-1", "x-2", "EEG 001"], False),
    ],
)
def test_differences_of_electrodes_are_bipolar(names, bipolar):
    electrodes = [bipolar and name.count("-") == 1 and len(name) > 1 for name in names]
    assert channels.are_bipolar(names) == electrodes and channels.are_bipolar(["Cz", *names]) == [False, *electrodes]


def test_columns_of_headsets():
    """What Emotiv, Mind Monitor and the OpenBCI GUI write beside the signal is none."""
    assert [channels.canonical(n) for n in ("EEG.AF3", "RAW_TP9", "RAW_AF7")] == ["AF3", "TP9", "AF7"]
    other = "EEG.Counter Accel_X Gyro_X Other Delta_TP9 Battery AUX_RIGHT - --".split()
    assert {channels.kind(n) for n in [*other, "Accel Channel 0", "Analog Channel 2", "Sample Index"]} == {"misc"}
    assert channels.kind("EXG Channel 0") == "unknown" and channels.kind("EXG1") == "misc"


def test_duplicates():
    names, kinds = ["C3", "C3", "C4"], ["eeg"] * 3
    with pytest.raises(Rejected, match="ambiguous_channel"):
        channels.select(names, kinds, "all")
    assert channels.select(names, kinds, "all", identical=lambda a, b: True).indices == (0, 2)
    with pytest.raises(Rejected, match="ambiguous_channel"):
        channels.select(["T3", "T7"], kinds[:2], "T7")  # two names of one electrode
    assert channels.select(["C3", "C3", "Cz"], kinds, "Cz").indices == (2,)  # not wanted, so no matter


def test_profiles_and_missing():
    names = [n for n in channels.TEN_TWENTY if n not in ("Fz", "Pz")]
    kinds = ["eeg"] * len(names)
    picked = channels.select(names, kinds, "tuh19")
    assert picked.missing == ("Fz", "Pz") and picked.indices[picked.names.index("Fz")] == -1
    with pytest.raises(Rejected, match="missing_channel: Fz, Pz"):
        channels.select(names, kinds, "tuh19", max_missing=0)
    assert channels.select(names, kinds, "tuh21").missing == ("Fz", "Pz", "A1", "A2")
    with pytest.raises(Rejected, match="missing_channel"):
        channels.select(names[4:], kinds[4:], "tuh19")
    with pytest.raises(Rejected, match="missing_channel"):
        channels.select(names, kinds, "Fp1,Oz", max_missing=0)
    assert channels.select(names, kinds, "Fp1,Oz").missing == ("Oz",)  # --missing mask or interpolate
    with pytest.raises(Rejected, match="missing_channel: Fz, Pz"):
        channels.select(names, kinds, "Fz,Cz,Pz")


def test_splines_equal_mnes():
    mne = pytest.importorskip("mne")
    from mne.channels.interpolation import _make_interpolation_matrix

    sources, targets = [n for n in channels.TEN_TWENTY if n not in ("Fz", "Pz")], ["Fz", "Pz"]
    on_sphere = [
        np.array([channels.POSITIONS[n] for n in group]) - channels.SPHERE_CENTRE_M for group in (sources, targets)
    ]
    expected = _make_interpolation_matrix(*on_sphere, alpha=1e-5)
    assert np.allclose(channels.spline_weights(sources, targets), expected, atol=2e-3)
    assert mne.__version__
    with pytest.raises(Rejected, match="no position"):
        channels.spline_weights(sources, ["x1"])


def test_reference_channels():
    assert channels.reference_channels("A1,A2", ["EEG A2-REF", "C3", "M1"]) == [2, 0]
    assert channels.reference_channels("average", ["C3"]) == []
    with pytest.raises(Rejected, match="missing_reference"):
        channels.reference_channels("Fz", ["C3"])


def test_a_lone_reference_is_no_channel_of_all():
    names = ["Fz", "Cz", "A1", "A2"]
    kinds = [channels.kind(name) for name in names]
    assert "Cz" not in channels.select(names, kinds, "all", reference=[1]).names
    assert {"A1", "A2"} < set(channels.select(names, kinds, "all", reference=[2, 3]).names)
    assert channels.select(names, kinds, "Fz,Cz", reference=[1]).names == ("Fz", "Cz")
