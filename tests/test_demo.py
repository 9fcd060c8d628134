"""The demo cohort: the head against closed forms and MNE, every stated effect recovered from the signal, files, refusals."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import signal
from threadpoolctl import threadpool_limits

from lib import cohort, demo, edf, head, labels, synthesis
from lib.channels import POSITIONS, canonical
from lib.cohort import MONTAGES, SITES, TRAITS, P, draw_subject, draw_traits, generator
from lib.errors import Unusable
from lib.recordings import ReadSpec
from lib.sources import assign_splits, discover
from lib.synthesis import MOVIES, movie_time_course, record

DOC = Path(__file__).parents[1] / "docs" / "demo.md"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "cohort"
    return root, demo.write_demo(root, seed=3, subjects=4, scale=0.4)


@pytest.fixture(scope="module")
def resting():
    """Subjects with 21 channels at rest: average-referenced spectra and what is true of them."""
    people = [draw_subject(1, 2 * i) for i in range(80)]
    recordings = [record(s, "RestingState", seconds=41) for s in people]
    return people, recordings


def average(recording):
    """Average reference over the good channels; bad ones become zero."""
    good = np.setdiff1d(np.arange(len(recording.x_CT)), list(recording.bad))
    x = np.zeros_like(recording.x_CT)
    x[good] = recording.x_CT[good] - recording.x_CT[good].mean(axis=0)
    return x


def unit_vectors(rng, n):
    e = rng.standard_normal((n, 3))
    return e / np.linalg.norm(e, axis=1, keepdims=True)


# ---- head


def test_leadfield_of_a_homogeneous_sphere_is_the_closed_form():
    rng = np.random.default_rng(0)
    e_C3, moments_K3 = unit_vectors(rng, 40), rng.standard_normal((10, 3))
    dipoles_K3 = unit_vectors(rng, 10) * rng.uniform(0.05, 0.8, (10, 1))
    r, r0, radius = e_C3[:, None] * head.RADIUS_M, dipoles_K3 * head.RADIUS_M, head.RADIUS_M
    d, dot = r - r0, (r * r0).sum(-1, keepdims=True)  # Brody, Terry & Ideker, IEEE TBME 20:141, 1973
    length = np.linalg.norm(d, axis=-1, keepdims=True)
    bracket = r + (r * dot - radius**2 * r0) / (length * radius + radius**2 - dot)
    closed_CK = ((2 * d / length**3 + bracket / (radius**2 * length)) * moments_K3).sum(-1) / (4 * np.pi * 0.33) * 1e-3
    for shells in (((0.9, 1.0), (0.33, 0.33)), ((0.9, 0.92, 0.97, 1.0), (0.33,) * 4)):
        np.testing.assert_allclose(head.leadfield(e_C3, dipoles_K3, moments_K3, shells, 200), closed_CK, rtol=1e-9)


def test_leadfield_of_four_shells_is_that_of_mne():
    mne = pytest.importorskip("mne")
    rng = np.random.default_rng(1)
    e_C3, dipoles_K3 = unit_vectors(rng, 60), unit_vectors(rng, 12) * rng.uniform(0.2, 0.75, (12, 1))
    names = [f"EEG{i}" for i in range(60)]
    sphere = mne.make_sphere_model((0, 0, 0), head.RADIUS_M, None, *head.SHELLS, verbose="error")
    info = mne.create_info(names, 100.0, "eeg")
    positions = dict(zip(names, e_C3 * head.RADIUS_M, strict=True))
    info.set_montage(mne.channels.make_dig_montage(positions, coord_frame="head"))
    moments_K3 = unit_vectors(rng, 12)
    grid = {"rr": dipoles_K3 * head.RADIUS_M, "nn": moments_K3}
    sources = mne.setup_volume_source_space(pos=grid, sphere=sphere, verbose="error")
    made = mne.make_forward_solution(info, None, sources, sphere, meg=False, mindist=0, verbose="error")
    theirs_CK = (
        mne.convert_forward_solution(made, force_fixed=True, verbose="error")["sol"]["data"] * 1e-3
    )  # V/Am → µV/nAm
    ours_CK = head.leadfield(e_C3, dipoles_K3, moments_K3)
    ours_CK, theirs_CK = (a - a.mean(0) for a in (ours_CK, theirs_CK))
    assert np.abs(ours_CK - theirs_CK).max() < 0.01 * np.abs(ours_CK).max()  # MNE's is a fit of three dipoles


def test_leadfield_has_no_mean_turns_with_the_head_and_is_linear():
    rng = np.random.default_rng(2)
    z, turn = np.linspace(-1, 1, 4001)[:-1] + 1 / 4000, np.pi * (3 - 5**0.5) * np.arange(4000)  # an even net of points
    net = np.c_[np.sqrt(1 - z**2) * np.cos(turn), np.sqrt(1 - z**2) * np.sin(turn), z]
    d, m = np.array([[0.2, -0.3, 0.5], [0, 0, 0]]), rng.standard_normal((2, 3))
    a = head.leadfield(net, d, m)
    assert (np.abs(a.mean(0)) < 1e-3 * np.abs(a).max(0)).all()
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    np.testing.assert_allclose(head.leadfield(net @ rotation, d @ rotation, m @ rotation), a, atol=1e-12)
    np.testing.assert_allclose(head.leadfield(net, d, 3 * m), 3 * a)
    np.testing.assert_allclose(
        a[:, 1], net @ m[1] * a[:, 1].max() / (net @ m[1]).max(), rtol=1e-6
    )  # a central dipole: a cosine


def test_skull_blurs_series_has_converged_and_outside_is_refused():
    e, d, m = head.directions(("Cz", "Fz", "O1")), np.array([[0, 0, 0.85]]), np.array([[0, 0, 1.0]])
    bare = ((0.9, 1.0), (0.33, 0.33))
    assert head.leadfield(e, d, m).max() < 0.3 * head.leadfield(e, d, m, bare).max()
    np.testing.assert_allclose(head.leadfield(e, d, m), head.leadfield(e, d, m, terms=400), rtol=1e-5)
    with pytest.raises(ValueError, match="0.950"):
        head.leadfield(e, d * 0.95 / 0.85, m)


def test_electrodes_are_near_the_sphere_they_are_moved_to():
    names = [*SITES, *MONTAGES[1].electrodes]
    offsets = np.array([POSITIONS[n] for n in names]) - head.CENTRE_M
    radii = np.linalg.norm(offsets, axis=1)
    assert 0.09 < radii.mean() < 0.105 and radii.std() < 0.1 * radii.mean()
    e = head.directions(names)
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1)
    assert e[names.index("Cz"), 2] > 0.9 and e[names.index("Oz"), 1] < -0.9 and e[names.index("T8"), 0] > 0.9
    left, right = e[names.index("C3")], e[names.index("C4")]
    np.testing.assert_allclose(left * [-1, 1, 1], right, atol=0.05)


# ---- people


def test_traits_have_the_stated_distribution():
    people = [draw_traits(generator(5, i, "traits")) for i in range(3000)]
    z = {trait: np.array([p[1][trait] for p in people]) for trait in TRAITS}
    for (a, b), r in cohort.CORRELATIONS.items():
        shrink = (2 / np.pi) ** 0.5 if "sex" in (a, b) else 1  # a correlation with the sign of a normal variable
        assert np.corrcoef(z[a], z[b])[0, 1] == pytest.approx(r * shrink, abs=0.06), (a, b)
    for trait in TRAITS:
        assert abs(z[trait].mean()) < 0.12 and 0.8 < z[trait].std() < 1.1, trait
    columns = [p[0] for p in people]
    assert min(c["age"] for c in columns) < 5.1 and max(c["age"] for c in columns) > 20.9
    missing = np.mean([c["p_factor"] is None for c in columns])
    assert missing == pytest.approx(P.factors_missing, abs=0.02)


def test_features_follow_the_traits_as_stated(resting):
    people, _ = resting
    for feature in cohort.FEATURES:
        values = np.array([getattr(s.features, feature.name) for s in people])
        values = np.log(values / feature.base) if feature.log else values - feature.base
        shift = sum(np.array([effect * s.z[t] for s in people]) for t, effect in feature.effects.items())
        assert np.std(values - shift) == pytest.approx(feature.residual, rel=0.35), feature.name


def test_traits_can_be_read_from_the_signal(resting):
    """Each resting effect, from band power at the electrodes it is stated for: right sign, well above chance with 80 subjects."""
    people, recordings = resting
    at = {name: i for i, name in enumerate(people[0].montage.electrodes)}
    hz, power_NCF = signal.welch(np.stack([average(r) for r in recordings]), 250, nperseg=1000, axis=2)

    def ln_power(names, low, high):
        band = (hz >= low) & (hz <= high)
        return np.log(power_NCF[:, [at[n] for n in names]][..., band].mean((1, 2)) + 1e-3)

    occipital = power_NCF[:, [at["O1"], at["O2"]]].mean(1) * hz**1.6
    near = (hz >= 6) & (hz <= 13)
    measured = {
        ("age", 0.6): hz[near][occipital[:, near].argmax(1)],
        ("sex", 0.3): ln_power(("C3", "C4"), 17, 23) - ln_power(("C3", "C4"), 26, 30),
        ("ehq_total", 0.35): ln_power(("C4",), 8, 13) - ln_power(("C3",), 8, 13),
        ("attention", 0.35): ln_power(("Fz",), 5, 7) - ln_power(("Fz",), 3, 4),
        ("internalizing", 0.35): ln_power(("F4",), 7, 12) - ln_power(("F3",), 7, 12),
        ("externalizing", -0.5): ln_power(("Cz",), 13, 15) - ln_power(("Cz",), 17, 19),
        ("p_factor", 0.3): ln_power(("F7", "F8"), 1, 3) - ln_power(("F7", "F8"), 4, 5),
    }
    for (trait, least), value in measured.items():
        r = np.corrcoef([s.z[trait] for s in people], value)[0, 1]
        assert r * np.sign(least) > abs(least), (trait, r)
    flat = (hz >= 30) & (hz <= 45)
    drop = np.log(power_NCF[:, :, (hz >= 3) & (hz <= 4)].mean((1, 2)) / power_NCF[:, :, flat].mean((1, 2)))
    assert np.corrcoef([s.features.exponent for s in people], drop)[0, 1] > 0.5


def test_eyes_closed_doubles_alpha(resting):
    people, recordings = resting
    ratios, truths = [], []
    for subject, r in list(zip(people, recordings, strict=True))[:30]:
        low = subject.features.alpha_hz - 1.5
        sos = signal.butter(4, [low, low + 3], "bandpass", fs=250, output="sos")
        at = [subject.montage.electrodes.index(n) for n in ("O1", "O2")]
        for x, into in ((r.sites_ST[[SITES.index(n) for n in ("O1", "O2")]], truths), (average(r)[at], ratios)):
            x = signal.sosfiltfilt(sos, x)[:, 250:]
            x = x[:, : 4 * 2500].reshape(2, 4, 2500)[..., 250:].std(axis=2)
            into.append(x[:, 1::2].mean() / x[:, ::2].mean())
    assert np.mean(truths) == pytest.approx(P.eyes_closed_alpha, rel=0.05)
    assert P.eyes_closed_alpha * 0.85 < np.mean(ratios) < P.eyes_closed_alpha * 1.05
    assert [e[2] for e in recordings[0].events[1:3]] == ["instructed_toOpenEyes", "instructed_toCloseEyes"]


def test_subjects_make_most_of_the_variance(resting):
    """Share of the variance of log band power per 4 s window that is between subjects; the movie's share of the raw signal is small."""
    features = []
    for number in range(0, 24, 2):
        windows = average(record(draw_subject(0, number), "DespicableMe", seconds=44))[:, : 44 * 250].reshape(
            21, 11, 1000
        )
        hz, power = signal.welch(windows, 250, nperseg=500)
        bands = [
            np.log(power[..., (hz >= a) & (hz < b)].mean(-1) + 1e-3)
            for a, b in ((1, 4), (4, 8), (8, 13), (13, 30), (30, 45))
        ]
        features.append(np.stack(bands).reshape(-1, 11).T)
    y = np.stack(features)  # subject, window, feature
    between = y.mean(1).var(0) / y.reshape(-1, y.shape[-1]).var(0)
    assert np.median(between) > 0.6
    subject = draw_subject(0, 0)
    s = subject.sites_CS - subject.sites_CS.mean(0)
    movie = subject.features.movie_visual_uv**2 * s[:, SITES.index("Oz")] ** 2
    movie = movie + subject.features.movie_auditory_uv**2 * (s[:, SITES.index("T7")] + s[:, SITES.index("T8")]) ** 2
    share = movie.sum() / average(record(subject, "DespicableMe")).var(axis=1).sum()
    assert 0.01 < share < 0.12


# ---- recordings


@pytest.mark.parametrize("number", [0, 1])
def test_amplitudes_are_those_of_eeg_and_line_noise_is_where_it_should_be(number):
    subject = draw_subject(0, number)
    for task in ("RestingState", *MOVIES, "contrastChangeDetection"):
        r = record(subject, task, seconds=20)
        assert r.x_CT.dtype == np.float32 and r.x_CT.shape == (
            len(subject.montage.labels),
            20 * subject.montage.rate_hz,
        )
        good = np.delete(average(r), list(r.bad), axis=0)
        assert 3 < good.std(axis=1).min() and good.std(axis=1).max() < 60 and np.abs(good).max() < 500
    hz, power = signal.welch(good, subject.montage.rate_hz, nperseg=2 * subject.montage.rate_hz)
    line, beside = (np.median(power[:, hz == subject.montage.line_hz + offset]) for offset in (0, 3))
    assert line > 10 * beside and {0: 50, 1: 60}[number] == subject.montage.line_hz


def test_blinks_are_frontal_and_need_open_eyes():
    subject = draw_subject(0, 6)
    r = record(subject, "RestingState", seconds=61)
    blinks = r.sites_ST[SITES.index("Fp1")] > 20  # nothing else is there
    closed = [e[0] for e in r.events if e[2] == "instructed_toCloseEyes"]
    assert blinks.any() and not any(blinks[round((t + 1) * 250) : round((t + 9.5) * 250)].any() for t in closed)
    x = average(r)[:, blinks].mean(axis=1)
    assert subject.montage.electrodes[np.argmax(x)] in ("Fp1", "Fp2") and x.max() > 30


def test_bad_channels_are_flat_or_noisy_and_in_the_stated_share():
    people, kinds, with_bad = [draw_subject(2, number) for number in (0, 2, 4, 1)], [], 0
    for i in range(120):
        r = record(people[i % 4], "DespicableMe", run=1 + i // 4, seconds=4)
        with_bad += bool(r.bad)
        for channel, kind in r.bad.items():
            kinds.append(kind)
            sd = r.x_CT[channel].std()
            assert sd == 0 if kind == "flat" else sd == pytest.approx(P.bad_noise_uv, rel=0.1)
    assert with_bad / 120 == pytest.approx(P.bad_recordings, abs=0.12) and set(kinds) == {"flat", "noisy"}


def test_movie_time_course_is_one_function_of_time():
    a, b = movie_time_course("DespicableMe", 250, 60), movie_time_course("DespicableMe", 500, 60)
    np.testing.assert_allclose(a, b[:, ::2], atol=1e-5)
    np.testing.assert_allclose(movie_time_course("DespicableMe", 250, 60, 0.1)[:, 25:], a[:, :-25], atol=1e-5)
    assert movie_time_course("DespicableMe", 100, 300).std(axis=1) == pytest.approx(1, abs=0.1)
    hz, power = signal.welch(a, 250, nperseg=2500)
    assert power[:, (hz < 0.3) | (hz > 8.3)].sum() < 1e-3 * power.sum()
    assert abs(np.corrcoef(a, movie_time_course("ThePresent", 250, 60))[np.triu_indices(4, 1)]).max() < 0.25


def correlated_components(x_NCT):
    """Spatial filters that are most alike in all subjects (Dmochowski et al. 2012), shrunk by 2 %."""
    n, channels = x_NCT.shape[:2]
    within = sum(x @ x.T for x in x_NCT)
    total = x_NCT.sum(0) @ x_NCT.sum(0).T
    within_shrunk = within + 0.02 * np.trace(within) / channels * np.eye(channels)
    values, vectors = np.linalg.eig(np.linalg.solve(within_shrunk, (total - within) / (n - 1)))
    return vectors.real[:, np.argsort(-values.real)[:2]]


@pytest.mark.parametrize("parity", [0, 1])
def test_a_movie_makes_unseen_brains_alike(parity):
    """Correlation between subjects not used to find the component, against circularly shifted time; and retrieval of 4 s windows."""
    x = {}
    for i in range(8):
        subject = draw_subject(0, 2 * i + parity)
        rate = subject.montage.rate_hz
        for movie in MOVIES:
            r = record(subject, movie, seconds=32)
            (onset, *_), (stop, *_) = r.events
            assert 1 <= onset <= 1 + P.movie_lead_s and stop == pytest.approx(32, abs=0.01)
            y = signal.decimate(np.clip(average(r), -80, 80), rate // 50, axis=1)
            y = signal.sosfiltfilt(signal.butter(3, [0.5, 8], "bandpass", fs=50, output="sos"), y)
            x[movie, i] = y[:, round(onset * 50) :][:, : 28 * 50]
    train = np.concatenate([np.stack([x[movie, i] for i in range(5)]) for movie in MOVIES], axis=2)
    w = correlated_components(train)
    y = {k: w.T @ v for k, v in x.items()}
    rng = np.random.default_rng(0)

    def isc(component, shifted):
        pairs = [(m, i, j) for m in MOVIES for i in range(5, 8) for j in range(5, i)]
        shifts = rng.integers(100, 1300, len(pairs)) * shifted
        return np.mean(
            [
                np.corrcoef(y[m, i][component], np.roll(y[m, j][component], s))[0, 1]
                for (m, i, j), s in zip(pairs, shifts, strict=True)
            ]
        )

    null = [isc(0, True) for _ in range(100)]
    assert isc(0, False) > 0.1 and isc(0, False) > 4 * np.std(null)

    right = total = 0
    windows = [(m, s) for m in MOVIES for s in range(0, 1201, 100)]
    references = [np.mean([y[m, i][:, s : s + 200] for i in range(5)], axis=0).ravel() for m, s in windows]
    for i in range(5, 8):
        queries = [y[m, i][:, s : s + 200].ravel() for m, s in windows]
        score = np.corrcoef(queries, references)[: len(windows), len(windows) :]
        right, total = right + (score.argmax(1) == np.arange(len(windows))).sum(), total + len(windows)
    assert right / total > 5 / len(windows)


def test_response_times_follow_trait_and_alpha_and_can_be_decoded():
    rt, estimate, externalizing, alpha = [], [], [], []
    for number in [*range(0, 60, 2), 1, 3]:
        subject = draw_subject(4, number)
        rate, r = subject.montage.rate_hz, record(subject, "contrastChangeDetection", seconds=60)
        x, topography = average(r), subject.sites_CS - subject.sites_CS.mean(0)
        good = np.setdiff1d(np.arange(len(x)), list(r.bad))
        pz = topography[good, SITES.index("Pz")]
        weights = np.linalg.solve(np.cov(x[good]) + 0.5 * np.eye(len(good)), pz)
        y = signal.sosfiltfilt(
            signal.butter(2, [0.3, 6], "bandpass", fs=rate, output="sos"), weights @ x[good] / (weights @ pz)
        )
        t = np.arange(-rate, rate) / rate
        y = signal.fftconvolve(y, np.exp(-(t**2) / (2 * P.p3_s**2)), "same")
        occipital = r.sites_ST[[SITES.index(n) for n in ("O1", "O2")]]
        starts = [e[0] for e in r.events if e[2] == "contrastTrial_start"] + [60.0]
        targets = [e for e in r.events if e[2].endswith("_target")]
        assert len(targets) == len(starts) - 1 > 10
        for target, start, following in zip(targets, starts, starts[1:], strict=False):
            assert start + P.target_delay_s - 0.01 < target[0] < following
            presses = [e for e in r.events if e[2].endswith("_buttonPress") and target[0] < e[0] < following]
            assert len(presses) <= 1
            if presses:
                (press,) = presses
                assert (press[4] == "smiley_face") == (press[2].split("_")[0] == target[2].split("_")[0])
                first = round((target[0] + P.rt_min_s) * rate)
                estimate.append(y[first : first + round(1.9 * rate)].argmax() / rate)
                rt.append(press[0] - target[0])
                externalizing.append(subject.z["externalizing"])
                before = occipital[:, round((target[0] - 0.5) * rate) : round(target[0] * rate)]
                alpha.append(np.log((before**2).sum() / (occipital**2).sum()))
    rt = np.array(rt)
    assert (
        P.rt_min_s - 0.01 <= rt.min()
        and rt.max() <= P.rt_max_s + 0.01
        and 0.9 < rt.mean() < 1.4
        and 0.15 < rt.std() < 0.4
    )
    assert np.corrcoef(externalizing, rt)[0, 1] > 0.15 and np.corrcoef(alpha, rt)[0, 1] > 0.05
    residual = rt - np.polyval(np.polyfit(estimate, rt, 1), estimate)
    assert residual.std() / rt.std() < 0.7  # NRMSE of a matched filter that knows where the P3 is


@pytest.mark.parametrize("number", [0, 2])
def test_seizures_stand_out_and_have_their_rhythm(number):
    subject = draw_subject(0, number)
    r = record(subject, "szMonitoring", 1, 80)
    ((start, stop),) = r.seizures
    assert 0 < start < stop < 80 and 15 < stop - start < 28
    x = average(r)
    inside = np.zeros(x.shape[1], bool)
    inside[round(start * 250) : round(stop * 250)] = True
    ratio = x[:, inside].std(axis=1) / np.maximum(x[:, ~inside].std(axis=1), 1)
    assert ratio.max() > 2
    quiet = r.sites_ST[SITES.index("C3"), ~inside]
    assert np.abs(quiet).max() < 30 < np.abs(r.sites_ST[SITES.index("C3"), inside]).max()
    ictal = x[ratio.argmax(), inside]
    early, late = ictal[: len(ictal) // 4], ictal[-len(ictal) // 4 :]
    peaks = []
    for part in (early, late):
        hz, power = signal.welch(part, 250, nperseg=len(part) // 2, nfft=2500)
        band = (hz > 1.5) & (hz < 9)
        peaks.append(hz[band][(power * hz)[band].argmax()])
    if number == 0:  # generalised
        assert all(2.2 < p < 3.4 for p in peaks) and np.sum(ratio > 1.5) > 5
    else:
        assert peaks[0] > 5 > peaks[1] and late.std() > 1.5 * early.std()
        assert subject.montage.electrodes[ratio.argmax()] in ("T7", "T8", "F7", "F8", "P7", "P8")


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="juggling"):
        record(draw_subject(0, 0), "juggling")


# ---- files


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_files_are_a_bids_dataset(small):
    root, summary = small
    assert summary["written"] and summary["subjects"] == 4 and summary["recordings"] == 20 and summary["seizures"] >= 2
    files = contents(root)
    assert summary["bytes"] == sum(len(data) for name, data in files.items() if name != "demo.json")
    assert (
        json.loads(files["dataset_description.json"])["BIDSVersion"]
        and "README" in files
        and "participants.json" in files
    )
    names, rows = labels.read_table(root / "participants.tsv")
    assert names[:2] == ["participant_id", "age"] and [row[0] for _, row in rows] == [
        f"sub-D00{i}" for i in range(1, 5)
    ]
    recordings = [name for name in files if name.endswith(".edf")]
    assert len(recordings) == 20
    for name in recordings:
        assert re.fullmatch(r"(sub-D\d{3})/eeg/\1_task-[A-Za-z]+_run-\d_eeg\.edf", name)
        facts = json.loads(files[name.removesuffix(".edf") + ".json"])
        stem = name.removesuffix("_eeg.edf")
        header = edf.read_header(root / name)
        channel_names, channels = labels.read_table(root / f"{stem}_channels.tsv")
        assert [row[0] for _, row in channels] == [s.label for s in header.signals] and channel_names[0] == "name"
        assert facts["RecordingDuration"] == header.records * header.record_s and facts["TaskName"] in name
        assert (f"{stem}_events.tsv" in files) != ("szMonitoring" in name)
        assert (f"{stem}_eeg.csv_bi" in files) == ("szMonitoring" in name)


@pytest.mark.parametrize("number", [0, 1])
def test_edf_holds_what_was_simulated(small, number):
    mne = pytest.importorskip("mne")
    root, _ = small
    subject = draw_subject(3, number)
    seconds = max(demo.SECONDS_MIN, round(0.4 * subject.montage.recordings[0][2]))
    r = record(subject, "RestingState", 1, seconds)
    path = root / f"sub-{subject.id}" / "eeg" / f"sub-{subject.id}_task-RestingState_run-1_eeg.edf"
    header = edf.read_header(path)
    x = edf.read_signals(header, range(len(header.signals)))
    assert [canonical(s.label) for s in header.signals] == list(subject.montage.electrodes)
    assert all(s.rate_hz == subject.montage.rate_hz for s in header.signals)
    step_C1 = np.abs(r.x_CT).max(axis=1, keepdims=True) / 32767 + 1e-6
    assert (np.abs(x - r.x_CT) <= step_C1).all()
    raw = mne.io.read_raw_edf(path, preload=True, verbose="error")
    assert raw.info["sfreq"] == subject.montage.rate_hz and raw.ch_names == [s.label for s in header.signals]
    assert (np.abs(raw.get_data() * 1e6 - r.x_CT) <= step_C1).all()


def test_label_files_say_when_the_seizures_are(small):
    root, summary = small
    found = 0
    for path in sorted(root.rglob("*.csv_bi")):
        number, run = int(path.name[5:8]) - 1, int(path.stem.split("run-")[1][0])
        truth = record(draw_subject(3, number), "szMonitoring", run, 32).seizures
        read = labels.read_csv_bi(path, 32.0)
        assert not read.notes and not read.rows_rejected and len(read.intervals) == len(truth)
        np.testing.assert_allclose(np.reshape(read.intervals, (-1, 2)), np.reshape(truth, (-1, 2)), atol=1e-3)
        found += len(truth)
    assert found == summary["seizures"]


def test_events_read_back(small):
    root, _ = small
    path = root / "sub-D002/eeg/sub-D002_task-contrastChangeDetection_run-1_events.tsv"
    events, notes = labels.read_events_tsv(path)
    truth = record(draw_subject(3, 1), "contrastChangeDetection", 1, 14).events
    assert not notes and [e.label for e in events] == [t[2] for t in truth]
    np.testing.assert_allclose([e.onset_s for e in events], [t[0] for t in truth], atol=1e-3)


def test_files_depend_on_seed_and_subject_only(small, tmp_path):
    root, _ = small
    more = tmp_path / "more"
    demo.write_demo(more, seed=3, subjects=5, scale=0.4)
    ours, theirs = contents(root), contents(more)
    shared = [name for name in ours if name.startswith("sub-")]
    assert len(shared) == 80 and all(ours[name] == theirs[name] for name in shared)
    assert theirs["participants.tsv"].startswith(ours["participants.tsv"])
    other = record(draw_subject(4, 0), "RestingState", seconds=12)
    assert not np.array_equal(other.x_CT, record(draw_subject(3, 0), "RestingState", seconds=12).x_CT)


def test_threads_do_not_change_the_signal():
    signals = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            signals.append(record(draw_subject(0, 1), "DespicableMe", seconds=12).x_CT)
    assert np.mean(signals[0] != signals[1]) < 1e-6  # float64 sums, rounded to float32


def test_complete_cohort_is_left_alone_and_a_damaged_one_mended(small, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(small[0], root)
    before, times = contents(root), {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    again = demo.write_demo(root, seed=3, subjects=4, scale=0.4)
    assert not again.pop("written") and times == {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert again | {"written": True, "directory": str(small[0])} == small[1]

    victims = sorted(root.rglob("*.edf"))
    victims[0].unlink()
    victims[1].write_bytes(victims[1].read_bytes()[:-2])
    (victims[2].parent / f".{victims[2].name}.999999999.tmp").write_bytes(b"half")
    assert demo.write_demo(root, seed=3, subjects=4, scale=0.4)["written"] and contents(root) == before

    (root / "demo.json").unlink()  # killed before the end
    victims[3].unlink()
    assert demo.write_demo(root, seed=3, subjects=4, scale=0.4)["written"] and contents(root) == before


def test_refusals(small, tmp_path):
    root, _ = small
    before = contents(root)
    for wrong, word in (
        ({"seed": 4}, "seed 3 there, 4"),
        ({"subjects": 6}, "subjects 4 there, 6"),
        ({"scale": 1.0}, "scale"),
    ):
        with pytest.raises(Unusable, match=word):
            demo.write_demo(root, **({"seed": 3, "subjects": 4, "scale": 0.4} | wrong))
    assert contents(root) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(Unusable, match="is not empty"):
        demo.write_demo(tmp_path)
    with pytest.raises(Unusable, match="not a directory"):
        demo.write_demo(tmp_path / "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "demo.json").write_text("[1]")
    with pytest.raises(Unusable, match="marker"):
        demo.write_demo(tmp_path / "x")
    for wrong in ({"subjects": 0}, {"seed": -1}, {"scale": 0.0}, {"scale": float("nan")}):
        with pytest.raises(Unusable, match="demo cohort: need"):
            demo.write_demo(tmp_path / "y", **wrong)


@pytest.mark.parametrize("subjects", [6, 24])
def test_every_split_has_both_montages_and_seizures(tmp_path, subjects):
    root = tmp_path / "x"
    people = [draw_subject(0, number) for number in range(subjects)]
    for s in people:  # what discovery looks at: names and tables
        folder = root / f"sub-{s.id}" / "eeg"
        folder.mkdir(parents=True)
        for task, run, _ in s.montage.recordings:
            edf.write_edf(folder / f"sub-{s.id}_task-{task}_run-{run}_eeg.edf", np.ones((1, 250)), 250, ["Cz"])
    (root / "dataset_description.json").write_bytes(b"{}")
    (root / "dataset.toml").write_bytes(demo.split_toml(people))
    found = discover([root], [], ReadSpec())
    assert len(found.sources) == sum(len(s.montage.recordings) for s in people) and not found.rejected
    given = {(s.dataset, s.subject): s.split for s in found.sources if s.split}
    splits = assign_splits({(s.dataset, s.subject) for s in found.sources}, given)
    for split in ("train", "val", "test"):
        tasks = {s.task for s in found.sources if splits[s.dataset, s.subject] == split}
        numbers = {int(subject[1:]) - 1 for (_, subject), where in splits.items() if where == split}
        assert "szMonitoring" in tasks and {n % 2 for n in numbers} == {0, 1}, split


def test_default_cohort_is_small():
    size = sum(len(m.labels) * m.rate_hz * 2 * seconds * 12 for m in MONTAGES for _, _, seconds in m.recordings)
    assert size < 260e6


def test_the_document_is_the_code():
    text = DOC.read_text(encoding="utf-8")
    assert demo.truth_tables() in text, f"docs/demo.md is out of date; its tables should be:\n{demo.truth_tables()}"
    assert set(synthesis.MOVIES) <= set(re.findall(r"\w+", text))
