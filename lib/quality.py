"""
How good generated windows are, on a scale whose ends are measured: real windows against real windows, and phase-randomised surrogates.

Every metric m compares a set with held-out real windows of the same number. Three other sets are put in the generated one's place: the other
half of the real windows (`floor_iid`: what independent windows of the same recordings have), windows of other recordings
(`floor_block`: what honest new recordings have), and surrogates of the training windows (`surrogate`: what a model has that knows nothing
but spectra). Skill is 1 − (m − floor_iid) / (m_surrogate − floor_iid): 1 is real, 0 no better than surrogates, negative worse.

Whatever is fitted (scales, principal components, classifiers of labels) is fitted on training windows. All windows have to be in one
unit, and those of `real` from recordings, or at least times, that nothing was trained on.

Shape letters: N windows, C channels, L samples, F frequencies or features, R draws, K classes, S statistics.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lib import descriptors, memorisation, surrogates, twosample
from lib.errors import Unusable
from lib.probe import BANDS_HZ
from lib.scores import area_under_roc

MOST = 800  # windows per set
SEARCHED, AMONG = 400, 8000  # generated windows that are looked for, among so many training windows at most
FEWEST = 40  # fewer in a set are an anecdote
DRAWS, FEW_DRAWS = 60, 3  # of the sets: for means and neighbours, and for what takes longer
COMPONENTS = 32
CLIP_DB = 30.0  # below the peak, where a spectrum is compared no more
HIGHER = "density coverage precision recall class_accuracy class_accuracy_network train_on_generated".split()
PRIMARY = "ks_statistics log_psd_db log_psd_clipped_db envelope_db band_power_db coverage c2st c2st_network".split()
LEGACY = ("ks_pooled", "mmd_raw", "diversity", "discriminative_24", "predictive_24")
GROUPS = {  # metric → where it stands in the table
    "marginal": ("ks_statistics", "wasserstein_statistics"),
    "spectral": ("log_psd_db", "log_psd_clipped_db", "envelope_db", "snr_db", "band_power_db", "slope", "alpha_hz", "alpha_db"),
    "temporal": ("acf", "envelope_acf"),
    "joint": ("c2st", "c2st_auc", "c2st_network", "c2st_network_auc", "mmd", "mmd_z"),
    "fidelity and diversity": ("density", "coverage", "precision", "recall", "frechet"),
    "use": ("class_accuracy", "class_accuracy_network", "train_on_generated", "augmentation"),
    "usual published scores": LEGACY,
}  # fmt: skip
Row = dict[str, float | str]


class Pool:
    """Real, generated and surrogate windows one after the other, with everything about a window that metrics need, computed once."""

    def __init__(self, parts: Sequence, labels: Sequence, train_NCL: np.ndarray, rate_hz: float, seed: int):
        from sklearn.decomposition import PCA  # here: it takes a second

        self.scale = float(np.std(train_NCL)) or 1.0
        self.x_NCL = np.concatenate([p / self.scale for p in parts]).astype(np.float32)
        self.label_N = np.concatenate(labels)
        self.first = np.cumsum([0, *map(len, parts)])
        self.train_NCL = train_NCL = (train_NCL / self.scale).astype(np.float32)
        self.statistics_NCS = descriptors.statistics(self.x_NCL)
        self.spread_CS = descriptors.statistics(train_NCL).std(0) + 1e-9
        self.hz_F, self.psd_NCF = descriptors.psd(self.x_NCL, rate_hz)
        self.envelope_hz_F, self.envelope_NCF = descriptors.envelope_spectrum(self.x_NCL, rate_hz)
        self.acf_NCK = descriptors.autocorrelation(self.x_NCL)
        self.envelope_acf_NCK = descriptors.envelope_autocorrelation(self.x_NCL)
        fitted_NF = descriptors.log_spectral(train_NCL, rate_hz)
        self.mean_F, self.sd_F = fitted_NF.mean(0), fitted_NF.std(0) + 0.1  # dB
        self.train_NF = (fitted_NF - self.mean_F) / self.sd_F
        self.features_NF = (descriptors.log_spectral(self.x_NCL, rate_hz) - self.mean_F) / self.sd_F
        self.axes_FD = PCA(min(COMPONENTS, *fitted_NF.shape), random_state=seed).fit(self.train_NF).components_.T
        self.square_NN = twosample.squared_distances(self.features_NF @ self.axes_FD)
        near = twosample.squared_distances(self.train_NF @ self.axes_FD)
        self.kernel_NN = twosample.kernel(self.square_NN, float(np.sqrt(np.median(near[near > 0]))))

    def means(self, values_NX: np.ndarray, sets: Sequence[np.ndarray]) -> np.ndarray:
        """Mean of some values over the windows of each label in each set (R, K, …); NaN where a set has none of a label."""
        labels = np.unique(self.label_N)
        weight = np.zeros((len(sets), len(labels), len(self.label_N)), np.float32)
        for r, chosen in enumerate(sets):
            np.add.at(weight[r], (np.searchsorted(labels, self.label_N[chosen]), chosen), 1)
        total = weight.sum(2)
        flat = weight.reshape(-1, weight.shape[2]) @ values_NX.reshape(len(values_NX), -1).astype(np.float32)
        with np.errstate(invalid="ignore"):
            return (flat.reshape(*total.shape, -1) / total[:, :, None]).reshape(*total.shape, *values_NX.shape[1:])


def judge(
    real_NCL: np.ndarray,
    fake_NCL: np.ndarray,
    train_NCL: np.ndarray,
    *,
    rate_hz: float,
    block_ids: Sequence,
    labels_real: Sequence | None = None,
    labels_fake: Sequence | None = None,
    labels_train: Sequence | None = None,
    eeg: bool = False,
    lines_hz: Mapping[str, float] | None = None,
    embed: Callable[[np.ndarray], np.ndarray] | None = None,
    network: bool = True,
    legacy: bool = True,
    among: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, Row]:
    """
    The table: metric → value, interval, floors, surrogate and skill. Deterministic in `seed`.

    `block_ids` says of each real window which recording (or subject) it is from. Spectra are compared label by label, and classes scored, where
    all three sets have labels. `eeg` adds bands, slope and alpha peak; `lines_hz` frequencies of the envelope by name (such as a bearing's);
    `embed` a Fréchet distance in the features (N, D) of an encoder; `network` the convolutional classifiers; `legacy` what others publish. Copies are looked for
    in the stretches `among` (C, T), else in the training windows at any circular shift.
    Raises Unusable for fewer windows than mean anything, and for shapes or labels that don't fit together.
    """
    given = [labels_real, labels_fake, labels_train]
    _check([real_NCL, fake_NCL, train_NCL], given, block_ids)
    rng = np.random.default_rng([seed, 0])
    count = min(MOST, len(real_NCL) // 2, len(fake_NCL))
    sizes = ((len(real_NCL), 2 * count), (len(fake_NCL), count), (len(train_NCL), MOST))
    kept, fakes, trained = (np.sort(rng.permutation(total)[:most]) for total, most in sizes)
    labels = [
        np.zeros(len(at), "<U1") if v is None else np.asarray([str(word) for word in v])[at]
        for v, at in zip(given, (kept, fakes, trained), strict=True)
    ]
    every_NCL, train_NCL = train_NCL, train_NCL[trained]
    sources = np.resize(rng.permutation(len(trained)), count)
    shuffled_NCL = surrogates.phase_randomised(train_NCL[sources], rng)
    pool = Pool(
        [real_NCL[kept], fake_NCL[fakes], shuffled_NCL], [*labels[:2], labels[2][sources]], train_NCL, rate_hz, seed
    )
    block_N = np.asarray(block_ids)[kept]
    draws = _draws(pool, count, block_N, seed)
    found = {}
    for kind, sets in draws.items():
        found[kind] = _spectral(pool, sets, eeg, lines_hz or {}) | _distances(pool, sets, embed, seed)
        found[kind] |= _told_apart(pool, sets, kind, network, legacy, seed)
    rows = {
        name: _row(name, {kind: values[name] for kind, values in found.items() if name in values})
        for name in found["fake"]
    }
    if labels_real is not None:
        rows |= _use(pool, labels[2], network, seed)
    rows |= _copied(pool, among or memorisation.around(every_NCL[:AMONG]), rng)
    order = [name for group in GROUPS.values() for name in group]
    return {name: rows[name] for name in sorted(rows, key=lambda n: order.index(n) if n in order else len(order))}


def _check(sets: list[np.ndarray], labels: list, block_ids: Sequence) -> None:
    shapes = {x.shape[1:] for x in sets}
    if len(shapes) > 1 or any(x.ndim != 3 for x in sets):
        raise Unusable(f"windows to compare differ in shape (channels, samples): {sorted(map(str, shapes))}")
    for name, x, least in zip(("held-out", "generated", "training"), sets, (2 * FEWEST, FEWEST, FEWEST), strict=True):
        if len(x) < least:
            raise Unusable(
                f"{len(x)} {name} windows; {least} are the least that say anything: take shorter windows, or a smaller stride"
            )
        if not np.isfinite(x).all():
            raise Unusable(f"{name} windows hold {int((~np.isfinite(x)).sum())} values that are not numbers")
    if len(block_ids) != len(sets[0]):
        raise Unusable(f"{len(block_ids)} block ids for {len(sets[0])} held-out windows")
    if len({v is None for v in labels}) > 1:
        raise Unusable("labels are needed of all three sets (held-out, generated, training) or of none")
    for x, v in zip(sets, labels, strict=True):
        if v is not None and len(v) != len(x):
            raise Unusable(f"{len(v)} labels for {len(x)} windows")


def _draws(pool: Pool, count: int, block_N: np.ndarray, seed: int) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Pairs of sets (indices of the pool) to compare: generated, both floors, and surrogates against held-out windows."""
    _, fake, shuffled, stop = pool.first
    half = surrogates.by_window(fake, count)
    blocks = surrogates.by_block(block_N, count, pool.label_N[:fake])
    rngs = {kind: np.random.default_rng([seed, 1, i]) for i, kind in enumerate(("fake", "iid", "block", "surrogate"))}
    own, bad = np.arange(fake, shuffled), np.arange(shuffled, stop)
    draws = {"fake": [(half(rngs["fake"])[0], own) for _ in range(DRAWS)]}
    draws["iid"] = [half(rngs["iid"]) for _ in range(DRAWS)]
    if len(np.unique(block_N)) > 1:
        draws["block"] = [blocks(rngs["block"]) for _ in range(DRAWS)]
    draws["surrogate"] = [(half(rngs["surrogate"])[0], bad) for _ in range(FEW_DRAWS)]
    return draws


# ----------------------------------------------------------------------------
# metrics of sets: each a value per draw


def _spectral(pool: Pool, sets: list, eeg: bool, lines_hz: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Distances of mean spectra, envelopes and autocorrelations, label by label, then averaged."""
    a, b = zip(*sets, strict=True)

    def apart(values_NX: np.ndarray, to=lambda x: x) -> np.ndarray:
        difference = to(pool.means(values_NX, a)) - to(pool.means(values_NX, b))
        return np.nanmean(np.sqrt((difference**2).mean((2, 3))), 1)

    psd_a, psd_b = pool.means(pool.psd_NCF, a), pool.means(pool.psd_NCF, b)
    db_a, db_b = descriptors.decibel(psd_a), descriptors.decibel(psd_b)
    floor = db_a.max(3, keepdims=True) - CLIP_DB
    clipped = np.maximum(db_a, floor) - np.maximum(db_b, floor)
    ratio_a, ratio_b = descriptors.decibel(_loud_to_quiet(psd_a)), descriptors.decibel(_loud_to_quiet(psd_b))
    found = {
        "log_psd_db": np.nanmean(np.sqrt(((db_a - db_b) ** 2).mean((2, 3))), 1),
        "log_psd_clipped_db": np.nanmean(np.sqrt((clipped**2).mean((2, 3))), 1),
        "envelope_db": apart(pool.envelope_NCF, descriptors.decibel),
        "snr_db": np.nanmean(np.abs(ratio_a - ratio_b).mean(2), 1),
        "acf": apart(pool.acf_NCK),
        "envelope_acf": apart(pool.envelope_acf_NCK),
    }
    if eeg:
        band_a, band_b = (
            10 * np.log10(descriptors.band_powers(pool.hz_F, p, BANDS_HZ) + descriptors.TINY) for p in (psd_a, psd_b)
        )
        found["band_power_db"] = np.nanmean(np.sqrt(((band_a - band_b) ** 2).mean((2, 3))), 1)
        peaks = zip(descriptors.background(pool.hz_F, psd_a), descriptors.background(pool.hz_F, psd_b), strict=True)
        for name, (in_a, in_b) in zip(("slope", "alpha_hz", "alpha_db"), peaks, strict=True):
            found[name] = np.nanmean(np.abs(in_a - in_b).mean(2), 1)
    for name, hz in lines_hz.items():
        at = int(np.abs(pool.envelope_hz_F - hz).argmin())
        near = slice(max(0, at - 1), at + 2)
        found[f"envelope_{name}_db"] = apart(pool.envelope_NCF[:, :, near].max(2, keepdims=True), descriptors.decibel)
    return found


def _loud_to_quiet(psd: np.ndarray) -> np.ndarray:
    """Power of the loudest quarter of the frequencies over that of the quietest: a signal-to-noise ratio that needs no clean signal."""
    ordered = np.sort(psd, axis=-1)
    quarter = max(1, ordered.shape[-1] // 4)
    return ordered[..., -quarter:].mean(-1) / (ordered[..., :quarter].mean(-1) + descriptors.TINY)


def _distances(pool: Pool, sets: list, embed: Callable | None, seed: int) -> dict[str, np.ndarray]:
    """Of distributions of windows: statistics, neighbours, kernels, and an encoder's features if there is one."""
    found: dict[str, list[float]] = {}

    def add(values: Mapping[str, float]) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    rng = np.random.default_rng([seed, 2])
    encoded_ND = None if embed is None else np.asarray(embed(pool.x_NCL * pool.scale), np.float64)
    for i, (a, b) in enumerate(sets):
        of_a, of_b = (np.sort(pool.statistics_NCS[chosen] / pool.spread_CS, axis=0) for chosen in (a, b))
        add({"ks_statistics": _ks(of_a, of_b).mean(0).max()})
        add({"wasserstein_statistics": np.abs(of_a - of_b).mean(0).mean(0).max()})
        add(twosample.neighbourhoods(pool.square_NN, a, b))
        if i < 4 * FEW_DRAWS:
            add(dict(zip(("mmd", "mmd_z"), twosample.mmd(pool.kernel_NN, a, b, rng), strict=True)))
        if encoded_ND is not None and i < 4 * FEW_DRAWS:
            add({"frechet": twosample.frechet(encoded_ND[a], encoded_ND[b])})
    return {name: np.array(values) for name, values in found.items()}


def _ks(a_ACS: np.ndarray, b_BCS: np.ndarray) -> np.ndarray:
    """Kolmogorov-Smirnov distance (C, S) of each column of sorted values."""
    both = np.concatenate([a_ACS, b_BCS])
    step = np.concatenate([np.full(len(a_ACS), 1 / len(a_ACS)), np.full(len(b_BCS), -1 / len(b_BCS))])
    return np.abs(np.cumsum(step[np.argsort(both, axis=0, kind="stable")], 0)).max(0)


def _told_apart(pool: Pool, sets: list, kind: str, network: bool, legacy: bool, seed: int) -> dict[str, np.ndarray]:
    """
    Accuracy and area under the curve of classifiers that tell two sets apart, by windows they were not fitted on; values of resampled windows.

    Folds are of windows at random. Folds of whole recordings look stricter and are not: generated windows can't be left out with the
    recording they imitate, so a classifier takes what it has not seen for generated (0.26 was measured for real windows against real).
    """
    found: dict[str, list] = {}

    def add(name: str, said_N: np.ndarray, count: int, rng: np.random.Generator) -> None:
        y_N = np.arange(len(said_N)) >= count
        for _ in range(DRAWS):
            again = np.concatenate(
                [rng.integers(count, size=count), rng.integers(count, len(said_N), len(said_N) - count)]
            )
            found.setdefault(name, []).append(((said_N > 0.5) == y_N)[again].mean())
            found.setdefault(f"{name}_auc", []).append(area_under_roc(y_N[again], said_N[again]))

    for i, (a, b) in enumerate(sets[:FEW_DRAWS]):
        rng = np.random.default_rng([seed, 3, i])
        fold_N = twosample.folds(len(a) + len(b), 3, rng)
        add("c2st", twosample.told_by_logistic(pool.features_NF[a], pool.features_NF[b], fold_N), len(a), rng)
        if network and i == 0:
            fold_N = twosample.folds(len(a) + len(b), 2, rng)
            said_N = twosample.told_by_network(pool.x_NCL[a], pool.x_NCL[b], fold_N, seed + 10 * i)
            add("c2st_network", said_N, len(a), rng)
    if legacy and kind in ("fake", "iid"):
        a, b = sets[0]
        found |= {name: [value] for name, value in twosample.published(pool.x_NCL[a], pool.x_NCL[b], seed).items()}
    return {name: np.array(values) for name, values in found.items()}


# ----------------------------------------------------------------------------
# classes and copies


def _use(pool: Pool, train_label: np.ndarray, network: bool, seed: int) -> dict[str, Row]:
    """
    What generated windows are good for: their classes as told by classifiers of real ones, and classifiers of real ones trained on them.

    Floors are real held-out windows in their place, for `augmentation` 0: the gain of adding generated windows to as many real ones.
    """
    names = np.unique(train_label)
    if len(names) < 2:
        return {}
    _, fake, shuffled, stop = pool.first
    at = {"iid": np.arange(fake), "fake": np.arange(fake, shuffled), "surrogate": np.arange(shuffled, stop)}
    x = {kind: pool.features_NF[i] for kind, i in at.items()}
    y = {kind: pool.label_N[i] for kind, i in at.items()}
    of_train = twosample.logistic(pool.train_NF, train_label)
    right = {kind: of_train.predict(x[kind]) == y[kind] for kind in at}
    rows = {"class_accuracy": _share_row("class_accuracy", right)}
    if network:
        number = {name: i for i, name in enumerate(names)}
        model = twosample.train_network(pool.train_NCL, [number[v] for v in train_label], len(names), seed)
        said = {kind: names[twosample.network_says(model, pool.x_NCL[i]).argmax(1)] for kind, i in at.items()}
        rows["class_accuracy_network"] = _share_row("class_accuracy_network", {k: said[k] == y[k] for k in at})
    reach = {"iid": right["iid"]}
    for kind in ("fake", "surrogate"):
        if len(np.unique(y[kind])) > 1:
            reach[kind] = twosample.logistic(x[kind], y[kind]).predict(x["iid"]) == y["iid"]
    if "fake" in reach:
        rows["train_on_generated"] = _share_row("train_on_generated", reach)
        both = twosample.logistic(np.concatenate([pool.train_NF, x["fake"]]), np.concatenate([train_label, y["fake"]]))
        gain_N = (both.predict(x["iid"]) == y["iid"]).astype(float) - right["iid"]
        rows["augmentation"] = _row("augmentation", {"fake": np.array([gain_N.mean()]), "iid": np.zeros(1)})
    return rows


def _share_row(name: str, right: Mapping[str, np.ndarray]) -> Row:
    """Shares of windows, the intervals those of Wilson (1927)."""
    row = _row(name, {kind: np.array([found.mean()]) for kind, found in right.items()})
    for kind, prefix in (("fake", ""), ("iid", "floor_iid_")):
        n, p, z = len(right[kind]), right[kind].mean(), 1.96
        middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        row[f"{prefix}low"], row[f"{prefix}high"] = ((middle + side * half) / (1 + z**2 / n) for side in (-1, 1))
    if "surrogate" in row and abs(row["surrogate"] - row["floor_iid"]) <= row["floor_iid_high"] - row["floor_iid_low"]:
        row["skill"] = float("nan")
    return {key: float(v) if isinstance(v, np.floating) else v for key, v in row.items()}


def _copied(pool: Pool, among: Sequence[np.ndarray], rng: np.random.Generator) -> dict[str, Row]:
    """The share of copies among generated windows, beside that of held-out real ones."""
    real, fake = (pool.x_NCL[a:b][:SEARCHED] for a, b in itertools.pairwise(pool.first[:3]))
    own_N, real_N = (memorisation.nearest(x_NCL, among)[0] for x_NCL in (fake, real))
    found = memorisation.copies(own_N, real_N)
    common = {"group": "memorisation", "better": "lower"}
    rate = {
        "value": found["rate"],
        "floor_iid": found["real"],
        "floor_iid_high": found["most"],
        "chance": found["chance"],
    }
    low, high = _range([np.median(real_N[r]) for r in rng.integers(len(real_N), size=(10 * DRAWS, len(real_N)))])
    median = {"value": float(np.median(own_N)), "floor_iid": float(np.median(real_N))}
    median |= {"floor_iid_low": low, "floor_iid_high": high}
    return {"copy_rate": {**common, **rate}, "nearest_train": {**common, **median}}


# ----------------------------------------------------------------------------
# the table


def _row(name: str, found: Mapping[str, np.ndarray]) -> Row:
    """Means and 95 % ranges over draws, and the skill."""
    group = next((g for g, names in GROUPS.items() if name in names), "spectral")
    better = "higher" if name in HIGHER else "lower"
    row: Row = {"group": group, "better": better, "value": float(found["fake"].mean())}
    row |= dict(zip(("low", "high"), _range(found["fake"]), strict=True))
    for kind in ("iid", "block"):
        if kind in found:
            low, high = _range(found[kind])
            row |= {f"floor_{kind}": float(found[kind].mean()), f"floor_{kind}_low": low, f"floor_{kind}_high": high}
    if "surrogate" in found:
        worst, best = float(found["surrogate"].mean()), row["floor_iid"]
        beyond = abs(worst - best) > 2 * max(row["floor_iid_high"] - row["floor_iid_low"], 1e-9)
        row["surrogate"] = worst
        row["skill"] = 1 - (row["value"] - best) / (worst - best) if beyond else float("nan")  # blind to surrogates
    return row


def _range(values: Sequence) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def within(row: Row, floor: str) -> bool:
    """Whether a value is no worse than the 95 % range of a floor (`iid`, `block`)."""
    if row.get("better") == "higher":
        return row["value"] >= row[f"floor_{floor}_low"]
    return row["value"] <= row[f"floor_{floor}_high"]


def table(rows: Mapping[str, Row]) -> str:
    """The table as text: one metric a line, `=` where it is within the floor of independent windows, `~` within that of new recordings."""
    names = (
        "value",
        "low",
        "high",
        "floor_iid",
        "floor_iid_high",
        "floor_block",
        "floor_block_high",
        "surrogate",
        "skill",
    )
    lines = [f"{'':26}" + "".join(f"{name.replace('floor_', ''):>12}" for name in names)]
    group = None
    for name, row in rows.items():
        if row["group"] != group:
            group = row["group"]
            lines.append(f"{group}:")
        numbers = "".join(f"{_short(row.get(key)):>12}" for key in names)
        lines.append(f"{mark(row):>2} {name:23}{numbers}")
    return "\n".join(lines)


def mark(row: Row) -> str:
    """`=` within the floor of independent windows, `~` within that of new recordings, nothing where neither is known or met."""
    for floor, sign in (("iid", "="), ("block", "~")):
        if f"floor_{floor}_high" in row and within(row, floor):
            return sign
    return ""


def _worse_than_surrogates(row: Row) -> bool:
    """By the whole interval."""
    if "surrogate" not in row:
        return False
    return row["high"] < row["surrogate"] if row["better"] == "higher" else row["low"] > row["surrogate"]


def caught(rows: Mapping[str, Row]) -> list[str]:
    """The metrics that say the generated windows are not held-out real ones; of 30 that judge real ones, chance gives one or two."""
    return [name for name, row in rows.items() if "floor_iid_high" in row and not within(row, "iid")]


def _short(value) -> str:
    return "" if value is None else "–" if value != value else f"{value:.3g}"


def gate(rows: Mapping[str, Row]) -> str:
    """The verdict in words: copies first, then which of the primary metrics are within which floor, and what fails."""
    copied = rows["copy_rate"]
    words = [
        f"{copied['value']:.1%} of the generated windows are copies of training windows ({copied['floor_iid']:.1%} of the held-out real ones pass for that)."
    ]
    if copied["chance"] < 0.01:
        words.insert(0, "FAILED: memorised, so nothing below means anything.")
    known = [name for name in PRIMARY if name in rows]
    for floor, meaning in (("iid", "held-out windows of the same recordings"), ("block", "new recordings")):
        judged = [name for name in known if f"floor_{floor}_high" in rows[name]]
        good = [name for name in judged if within(rows[name], floor)]
        if judged:
            least = (
                "Not to be told from"
                if len(good) == len(judged)
                else f"{len(good)} of {len(judged)} primary metrics are as of"
            )
            words.append(f"{least} {meaning}" + (f": {', '.join(good)}." if 0 < len(good) < len(judged) else "."))
    worse = [name for name in known if _worse_than_surrogates(rows[name])]
    if worse:
        words.append(f"WORSE THAN SURROGATES that know only spectra: {', '.join(worse)}.")
    return " ".join(words)
