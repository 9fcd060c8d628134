"""
Quality of generated windows: every planted defect is caught by at least two metrics, real windows by none but chance.

Shape letters: N windows, C channels, L samples.
"""

import time

import numpy as np
import pytest

from lib import memorisation, quality, surrogates, twosample
from lib.errors import Unusable

L, RATE_HZ = 256, 1000.0


def machine(recordings: int, windows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows (N, 1, L), labels and recordings of two faults: blows of two rates that ring, over coloured noise; recordings differ a little."""
    rng = np.random.default_rng(seed)
    x, label, block = [], [], []
    for r in range(recordings):
        every, ring = ((37.3, 0.31), (61.7, 0.22))[r % 2]
        ring *= 1 + 0.01 * rng.standard_normal()
        samples = L * windows
        blow_T = np.zeros(samples)
        at = np.cumsum(every * (1 + 0.02 * rng.standard_normal(int(samples / every * 1.2)))).astype(int)
        at = at[at < samples]
        blow_T[at] = 4 + rng.standard_normal(len(at))
        t = np.arange(60)
        signal_T = np.convolve(blow_T, np.exp(-t / 8) * np.sin(2 * np.pi * ring * t), "full")[:samples]
        signal_T += np.convolve(rng.standard_normal(samples), np.hanning(9) / 4, "same")
        x.append(signal_T.reshape(windows, 1, L))
        label += [f"fault {r % 2}"] * windows
        block += [r] * windows
    return np.concatenate(x).astype(np.float32), np.array(label), np.array(block)


@pytest.fixture(scope="module")
def sets():
    """Training windows (the first half of the time), held-out real ones, and others of the same that play the generated."""
    x, label, block = machine(8, 120)
    when = np.tile(np.arange(120), 8)
    train, rest = when < 50, when >= 50
    odd = rest & (when % 3 == 0)
    return {k: (x[at], label[at], block[at]) for k, at in (("train", train), ("real", rest & ~odd), ("fake", odd))}


def rolled(x_NCL: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.stack([np.roll(x, s, 1) for x, s in zip(x_NCL, rng.integers(L, size=len(x_NCL)), strict=True)])


def stretched(x_NCL: np.ndarray, factor: float) -> np.ndarray:
    """The spectrum moved up by a factor."""
    at = np.arange(L) * factor % (L - 1)
    return np.stack([np.interp(at, np.arange(L), x[0])[None] for x in x_NCL]).astype(np.float32)


def planted(sets, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Windows with one defect, and their labels."""
    rng = np.random.default_rng(5)
    x, label, _ = sets["fake"]
    of_train = rng.integers(len(sets["train"][0]), size=len(x))
    few = rng.permutation(len(x))[:8]
    collapsed = rng.choice(few, len(x))
    return {
        "nothing": lambda: (x, label),
        "noise": lambda: (x + 0.3 * x.std() * rng.standard_normal(x.shape, np.float32), label),
        "blur": lambda: ((x + np.roll(x, 1, 2)) / 2, label),
        "memorised": lambda: (rolled(sets["train"][0][of_train], rng), sets["train"][1][of_train]),
        "mode-collapsed": lambda: (rolled(x[collapsed], rng), label[collapsed]),
        "shifted spectrum": lambda: (stretched(x, 1.1), label),
        "shuffled phase": lambda: (surrogates.phase_randomised(x, rng), label),
        "too loud": lambda: (1.2 * x, label),
        "wrong classes": lambda: (x, label[::-1]),
    }[name]()


def judge(sets, x_NCL, label_N, **options):
    real, train = sets["real"], sets["train"]
    labels = {"labels_real": real[1], "labels_fake": label_N, "labels_train": train[1]}
    options = {"network": False, "legacy": False, **labels, **options}
    return quality.judge(real[0], x_NCL, train[0], rate_hz=RATE_HZ, block_ids=real[2], **options)


DEFECTS = ("noise", "blur", "memorised", "mode-collapsed", "shifted spectrum", "shuffled phase")
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("too loud", "wrong classes")]


@pytest.mark.parametrize("name", [*DEFECTS, *MORE])
def test_a_planted_defect_is_caught_by_two_metrics(sets, name):
    rows = judge(sets, *planted(sets, name))
    found = quality.caught(rows)
    assert len(found) >= 2, (name, found)
    if name == "memorised":
        assert {"copy_rate", "nearest_train"} <= set(found) and "FAILED: memorised" in quality.gate(rows)
    else:
        assert "FAILED" not in quality.gate(rows)


def test_real_windows_pass_and_the_scale_has_its_ends(sets):
    rows = judge(sets, *planted(sets, "nothing"))
    assert len(quality.caught(rows)) <= 3
    primary = [name for name in quality.PRIMARY if name in rows]
    assert np.mean([rows[name]["skill"] for name in primary if rows[name]["skill"] == rows[name]["skill"]]) > 0.9
    assert rows["class_accuracy"]["value"] > 0.95 and rows["copy_rate"]["value"] <= 0.02
    assert rows["coverage"]["floor_iid"] > 0.9 and rows["coverage"]["surrogate"] < 0.6
    assert "c2st" in quality.table(rows) and "copies of training windows" in quality.gate(rows)
    shuffled = judge(sets, *planted(sets, "shuffled phase"))
    skills = [shuffled[name]["skill"] for name in primary if shuffled[name]["skill"] == shuffled[name]["skill"]]
    assert np.mean(np.abs(skills)) < 0.35  # the surrogates of other windows


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table(sets):
    x, label = planted(sets, "blur")
    first, second = (judge(sets, x, label, network=True, legacy=True, seed=3) for _ in range(2))
    assert first == second
    assert {"c2st_network", "class_accuracy_network", "predictive_24", "discriminative_24"} <= first.keys()
    assert first["c2st_network"]["value"] > 0.6 and first["c2st_network"]["floor_iid"] < 0.6


def test_classifiers_tell_what_differs_and_nothing_else_by_the_same_seed(sets):
    real, other = sets["real"][0][::7][:48], sets["fake"][0][::3][:48]
    loud = 2.5 * other
    fold_N = twosample.folds(96, 2, np.random.default_rng(0))
    y_N = np.arange(96) >= 48
    model = twosample.train_network(real, np.arange(48) % 2, 2, seed=1, steps=2)
    assert 20_000 < sum(p.numel() for p in model.parameters()) < 40_000
    said = [twosample.told_by_network(real, x, fold_N, seed=4, steps=40) for x in (loud, loud, other)]
    assert np.array_equal(said[0], said[1])
    right = [((s > 0.5) == y_N).mean() for s in said]
    assert right[0] > 0.75 and right[2] < 0.7
    features = [x.std(2) for x in (real, loud, other)]
    right = [((twosample.told_by_logistic(features[0], f, fold_N) > 0.5) == y_N).mean() for f in features[1:]]
    assert right[0] > 0.75 and right[1] < 0.7
    scores = twosample.published(real, loud, 0, steps=5)
    assert scores == twosample.published(real, loud, 0, steps=5) and scores["ks_pooled"] > 0.1


def test_without_labels_and_for_eeg_with_an_encoder(sets):
    real, fake, train = (np.repeat(sets[name][0], 2, 1) for name in ("real", "fake", "train"))
    rows = quality.judge(
        real, fake, train, rate_hz=100.0, block_ids=sets["real"][2], eeg=True, network=False, legacy=False,
        embed=lambda x_NCL: x_NCL.std(2), lines_hz={"outer race": 9.0},
    )  # fmt: skip
    assert {"band_power_db", "slope", "alpha_hz", "alpha_db", "frechet", "envelope_outer race_db"} <= rows.keys()
    assert not {"class_accuracy", "train_on_generated"} & rows.keys()
    assert quality.within(rows["band_power_db"], "block")


def test_what_cannot_be_judged_is_refused(sets):
    x, label = planted(sets, "nothing")
    with pytest.raises(Unusable, match="10 generated windows; 40 are the least"):
        judge(sets, x[:10], label[:10])
    with pytest.raises(Unusable, match="differ in shape"):
        judge(sets, x[:, :, :100], label)
    with pytest.raises(Unusable, match="labels are needed of all three"):
        judge(sets, x, None)
    with pytest.raises(Unusable, match="1 values that are not numbers"):
        judge(sets, np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x), label)


@pytest.mark.slow
def test_the_whole_table_of_800_windows_takes_two_cores_less_than_a_minute():
    x, label, block = machine(8, 400)
    x = np.concatenate([x, x[:, :, ::-1], x, x[:, :, ::-1]], 2)  # 1,024 samples
    fake, real, train = (np.arange(len(x)) % 4 == 0), (np.arange(len(x)) % 4 > 1), (np.arange(len(x)) % 4 == 1)
    labels = {"labels_real": label[real], "labels_fake": label[fake], "labels_train": label[train]}
    began = time.process_time()
    rows = quality.judge(x[real], x[fake], x[train], rate_hz=RATE_HZ, block_ids=block[real], **labels)
    spent_s = time.process_time() - began
    assert spent_s < 2 * 60, spent_s  # of both cores together
    assert {"c2st_network", "predictive_24", "copy_rate"} <= rows.keys() and len(quality.caught(rows)) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nothing", "noise", "blur", "mode-collapsed", "shuffled phase", "memorised"])
def test_defects_of_real_bearings_are_caught(data_dir, name):
    rng = np.random.default_rng(0)
    found = []
    for path in sorted((data_dir / "cwru").glob("*_DE12.npy")):
        x_NL = np.load(path).ravel()[: 100 * 1024].reshape(100, 1024)
        found.append((x_NL / x_NL.std(), path.stem.split("_", 1)[1], path.stem))
    x_NCL = np.concatenate([x for x, _, _ in found])[:, None].astype(np.float32)
    label_N, block_N = (np.repeat([row[i] for row in found], 100) for i in (1, 2))
    when_N = np.tile(np.arange(100), len(found))
    train, fake, real = when_N < 50, (when_N >= 50) & (when_N % 3 == 0), (when_N >= 50) & (when_N % 3 > 0)
    x, label = x_NCL[fake], label_N[fake]
    few = rng.choice(np.flatnonzero(fake)[:20], len(x))
    copied = rng.choice(np.flatnonzero(train), len(x))
    x, label = {
        "nothing": lambda: (x, label),
        "noise": lambda: (x + 0.1 * rng.standard_normal(x.shape, np.float32), label),
        "blur": lambda: ((x + np.roll(x, 1, 2)) / 2, label),
        "mode-collapsed": lambda: (x_NCL[few], label_N[few]),
        "shuffled phase": lambda: (surrogates.phase_randomised(x, rng), label),
        "memorised": lambda: (x_NCL[copied], label_N[copied]),
    }[name]()
    labels = {"labels_real": label_N[real], "labels_fake": label, "labels_train": label_N[train]}
    rows = quality.judge(
        x_NCL[real], x, x_NCL[train], rate_hz=12_000.0, block_ids=block_N[real], legacy=False, **labels
    )
    caught = quality.caught(rows)
    assert (len(caught) <= 4) if name == "nothing" else (len(caught) >= 2), caught
    assert ("FAILED: memorised" in quality.gate(rows)) == (name == "memorised")


# ----------------------------------------------------------------------------
# parts


def test_surrogates_keep_spectra_and_cross_spectra_and_nothing_else():
    rng = np.random.default_rng(0)
    x_NCL = np.cumsum(rng.standard_normal((6, 3, 128)), 2)
    y_NCL = surrogates.phase_randomised(x_NCL, rng).astype(np.float64)
    x_NCF, y_NCF = np.fft.rfft(x_NCL), np.fft.rfft(y_NCL)
    np.testing.assert_allclose(np.abs(y_NCF), np.abs(x_NCF), atol=1e-3)
    np.testing.assert_allclose(y_NCF[:, 0] * y_NCF[:, 1].conj(), x_NCF[:, 0] * x_NCF[:, 1].conj(), atol=0.05)
    assert all(abs(np.corrcoef(a[0], b[0])[0, 1]) < 0.999 for a, b in zip(x_NCL, y_NCL, strict=True))


def test_blocks_are_never_on_both_sides():
    block_N, label_N = np.repeat(np.arange(7), 20), np.repeat([0, 0, 0, 0, 1, 1, 2], 20)
    draw = surrogates.by_block(block_N, 60, label_N)
    for seed in range(20):
        a, b = draw(np.random.default_rng(seed))
        assert not set(a) & set(b) and len(a) == len(b)
        assert {*block_N[a]} & {*block_N[b]} <= {6}  # the only block of its label
        assert {*label_N[a]} == {*label_N[b]} == {0, 1, 2}
    assert surrogates.lone(block_N, label_N) == 1


def test_neighbourhoods_and_kernels_against_plain_loops():
    rng = np.random.default_rng(1)
    x_NF = rng.standard_normal((50, 3))
    a, b, k = np.arange(25), np.arange(25, 50), 4
    distance = np.linalg.norm(x_NF[:, None] - x_NF, axis=2)
    radius = np.array([np.sort(distance[i, a])[k] for i in a])
    found = twosample.neighbourhoods(twosample.squared_distances(x_NF), a, b, k)
    assert found["coverage"] == pytest.approx(np.mean([distance[i, b].min() < radius[i] for i in a]))
    assert found["density"] == pytest.approx(np.mean([(distance[a, j] < radius).sum() / k for j in b]))
    assert found["precision"] == pytest.approx(np.mean([(distance[a, j] < radius).any() for j in b]))
    kernel = twosample.kernel(twosample.squared_distances(x_NF), 1.7)
    k_aa, k_bb, k_ab = kernel[np.ix_(a, a)], kernel[np.ix_(b, b)], kernel[np.ix_(a, b)]
    n = len(a)
    plain = (k_aa.sum() - np.trace(k_aa) + k_bb.sum() - np.trace(k_bb)) / (n * (n - 1)) - 2 * k_ab.mean()
    assert twosample.mmd(kernel, a, b, rng)[0] == pytest.approx(plain, abs=1e-5)
    assert twosample.frechet(x_NF, x_NF + [3, 0, 0]) == pytest.approx(9, rel=1e-6)


def test_a_copy_is_found_wherever_in_a_recording_it_was_cut():
    rng = np.random.default_rng(3)
    stretches = [rng.standard_normal((2, t)).cumsum(1) for t in (1000, 300, 20)]
    cut = [stretches[0][:, 0:64], stretches[0][:, 517:581], stretches[0][:, 936:], -2 * stretches[1][:, 99:163] + 5]
    fake_NCL = np.stack([*cut, rng.standard_normal((2, 64)).cumsum(1)])
    r_N, at_N = memorisation.nearest(fake_NCL, stretches)
    assert (r_N[:4] > 0.9999).all() and at_N[:4].tolist() == [0, 0, 0, 1] and r_N[4] < 0.99
    x_CL, best = fake_NCL[4] - fake_NCL[4].mean(1, keepdims=True), 0.0
    for y_CT in stretches[:2]:
        for k in range(y_CT.shape[1] - 63):
            y_CL = y_CT[:, k : k + 64] - y_CT[:, k : k + 64].mean(1, keepdims=True)
            best = max(best, abs((x_CL * y_CL).sum()) / np.sqrt((x_CL**2).sum() * (y_CL**2).sum()))
    assert r_N[4] == pytest.approx(best, abs=1e-4)
    flat = [np.zeros((2, 500)), np.ones((2, 500))]
    assert np.abs(memorisation.nearest(fake_NCL, flat)[0]).max() < 1e-6


def test_a_copy_is_found_at_any_shift_scale_and_sign():
    rng = np.random.default_rng(2)
    train_NCL = rng.standard_normal((30, 2, 64)).astype(np.float32)
    fake_NCL = np.stack([-3 * np.roll(train_NCL[7], 11, 1) + 1, rng.standard_normal((2, 64))]).astype(np.float32)
    r_N, at_N = memorisation.nearest(fake_NCL, memorisation.around(train_NCL))
    assert r_N[0] > 0.999 and at_N[0] == 7 and r_N[1] < 0.8
    found = memorisation.copies(np.r_[np.full(10, 0.99), np.full(90, 0.3)], np.full(100, 0.3))
    assert found["rate"] == 0.1 and found["chance"] < 0.01 and 0.03 < found["most"] < 0.1
    repeats = memorisation.copies(np.full(100, 0.97), np.full(100, 0.98))  # a recording that repeats itself
    assert repeats["rate"] == 0 and repeats["limit"] == pytest.approx(0.98)
