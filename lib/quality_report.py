"""
The page about a flow: verdict, table with floors, what its windows, spectra and envelopes look like beside real ones, skill against evaluations.

Shape letters: N windows, C channels, L samples, F frequencies, R draws.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lib import descriptors, generator, quality, report, surrogates
from lib.command import json_line
from lib.corpus import Corpus
from lib.errors import Unusable
from lib.lineage import digest
from lib.store import write_atomic

SEARCHED, PIECE = 1 << 22, 1 << 17  # samples of training recordings that copies are looked for in, and of one read
SHOWN, DRAWS = 4, 40  # windows in a figure, and draws of a floor's band
FEWEST_BLOCKS = 4  # held-out recordings or subjects; with fewer the verdict says how few
WORDS = (
    "Floors are real windows in the generated ones' place: iid, windows of the same recordings; block, of other recordings. Surrogates know nothing "
    "but spectra. Skill: 1 real, 0 a surrogate, – where the metric can't tell a surrogate. = within the 95 % of the first floor, ~ of the second."
)


def write(
    path: Path,
    title: str,
    rows: Mapping[str, quality.Row],
    real_NCL: np.ndarray,
    fake_NCL: np.ndarray,
    train_NCL: np.ndarray,
    *,
    rate_hz: float,
    block_ids: Sequence,
    unit: str = "standard deviations",
    labels_real: Sequence | None = None,
    labels_fake: Sequence | None = None,
    sweep: Mapping[int, Mapping[str, quality.Row]] | None = None,
    anomaly: Mapping[str, Mapping[str, float]] | None = None,
    log: Sequence[dict] = (),
    command: str = "",
    seed: int = 0,
) -> None:
    """
    report.html of a run, whole or not at all.

    `sweep` holds the table of each number of evaluations, `anomaly` that of lib.anomaly, `log` the lines of log.jsonl.
    """
    verdict = quality.gate(rows)
    rng = np.random.default_rng([seed, 4])
    bad_NCL = surrogates.phase_randomised(train_NCL[rng.permutation(len(train_NCL))[: len(fake_NCL)]], rng)
    labels, alone = (labels_real, labels_fake), surrogates.lone(block_ids, labels_real)
    words = (
        WORDS
        + f" {alone} labels have one held-out recording each, so its windows are dealt in the block floor."
        * (alone > 0)
    )
    sections = [
        ("Verdict", report.paragraph(verdict, warn="FAILED" in verdict or "WORSE" in verdict)),
        ("Quality", table(rows) + report.paragraph(words)),
        ("Curves", report.curves(log) if log else ""),
        ("Windows", windows(real_NCL, fake_NCL, rate_hz, unit, *labels)),
        ("Spectra and envelopes", spectra(real_NCL, fake_NCL, bad_NCL, rate_hz, block_ids, labels_real, seed)),
        ("Latents", latents(real_NCL, fake_NCL, bad_NCL, rate_hz)),
        ("Skill against evaluations", skills(sweep) if sweep else ""),
        ("Anomaly scores", anomalies(anomaly) if anomaly else ""),
        ("Command", report.verbatim(command) if command else ""),
    ]
    report.write(path, title, sections)


def table(rows: Mapping[str, quality.Row]) -> str:
    """The table, a heading per group; what others publish is labelled so."""
    text = ""
    for group in dict.fromkeys(row["group"] for row in rows.values()):
        lines = []
        for name, row in ((n, r) for n, r in rows.items() if r["group"] == group):
            ranges = [
                f"{row[f'{key}low']:.3g} – {row[f'{key}high']:.3g}" if f"{key}low" in row else ""
                for key in ("", "floor_iid_", "floor_block_")
            ]
            numbers = [row["value"], ranges[0], row.get("floor_iid"), ranges[1], row.get("floor_block"), ranges[2]]
            lines.append([quality.mark(row), name, *numbers, row.get("surrogate"), row.get("skill")])
        names = ("", "metric", "value", "95 %", "iid floor", "95 %", "block floor", "95 %", "surrogate", "skill")
        text += f"<h3>{group}</h3>" + report.rows_table(names, lines)
    return text


def windows(real_NCL, fake_NCL, rate_hz: float, unit: str, labels_real=None, labels_fake=None) -> str:
    """Real windows and beside them generated ones, of the same label where there are labels, first channel, on one scale."""
    at = np.linspace(0, len(fake_NCL) - 1, SHOWN).round().astype(int)
    figure = Figure(figsize=(11, 1.5 * SHOWN + 0.4), layout="constrained")
    time_s_L = np.arange(real_NCL.shape[2]) / rate_hz
    most = float(np.percentile(np.abs(real_NCL[:, 0]), 99.9)) * 1.2
    for row, i in enumerate(at):
        label = None if labels_fake is None else labels_fake[i]
        alike = [j for j in range(len(real_NCL)) if label is None or str(labels_real[j]) == str(label)]
        shown = [("generated", fake_NCL[i, 0])]
        if alike:
            shown.insert(0, ("real", real_NCL[alike[len(alike) * row // SHOWN], 0]))
        for column, (kind, x_L) in enumerate(shown):
            axes = figure.add_subplot(SHOWN, 2, 2 * row + column + 1 + (2 - len(shown)), ylim=(-most, most))
            axes.plot(time_s_L, x_L, lw=0.6, color="k" if kind == "real" else "C3")
            axes.set_title(kind if label is None else f"{kind}: {label}", fontsize=8, loc="left", pad=2)
            axes.tick_params(labelsize=7)
            if row == SHOWN - 1:
                axes.set_xlabel("s", fontsize=8)
            if column == 0:
                axes.set_ylabel(unit, fontsize=7)
    return report.picture(figure, "real windows and generated ones")


def spectra(real_NCL, fake_NCL, bad_NCL, rate_hz: float, block_ids, labels_real=None, seed: int = 0) -> str:
    """Mean power spectra and envelope spectra with the bands of both floors, mean over channels."""
    block_N, rng = np.asarray(block_ids), np.random.default_rng([seed, 5])
    floors = {"same recordings": surrogates.by_window(len(real_NCL), len(real_NCL) // 2)}
    if len(np.unique(block_N)) > 1:
        floors["other recordings"] = surrogates.by_block(block_N, len(real_NCL) // 2, labels_real)
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = (("power spectral density, dB", descriptors.psd), ("squared envelope, dB", descriptors.envelope_spectrum))
    for place, (title, spectrum) in enumerate(panels):
        axes = figure.add_subplot(1, 2, place + 1, title=title, xlabel="Hz")
        hz_F, real_NCF = spectrum(real_NCL, rate_hz)
        real_NF = real_NCF.mean(1)
        for number, (name, draw) in reversed(list(enumerate(floors.items()))):
            drawn = [10 * np.log10(real_NF[part].mean(0)) for _ in range(DRAWS // 2) for part in draw(rng)]
            low_F, high_F = np.percentile(drawn, [2.5, 97.5], axis=0)
            axes.fill_between(hz_F, low_F, high_F, color=("0.55", "0.8")[number], lw=0, label=f"floor, {name}")
        for name, x_NCL, style in (
            ("surrogates", bad_NCL, {"color": "C0", "ls": ":"}),
            ("generated", fake_NCL, {"color": "C3"}),
        ):
            axes.plot(
                hz_F,
                10 * np.log10(spectrum(x_NCL, rate_hz)[1].mean((0, 1)) + descriptors.TINY),
                lw=1.2,
                label=name,
                **style,
            )
        axes.plot(hz_F, 10 * np.log10(real_NF.mean(0)), color="k", lw=0.8, label="real")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return report.picture(figure, "spectra and envelopes with the floors' bands")


def latents(real_NCL, fake_NCL, bad_NCL, rate_hz: float) -> str:
    """All windows on the two main axes of the real ones' log-spectral features."""
    real_NF, fake_NF, bad_NF = (descriptors.log_spectral(x, rate_hz) for x in (real_NCL, fake_NCL, bad_NCL))
    mean_F, sd_F = real_NF.mean(0), real_NF.std(0) + 0.1
    axes_2F = np.linalg.svd((real_NF - mean_F) / sd_F, full_matrices=False)[2][:2]
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot(1, 1, 1, xlabel="first axis", ylabel="second axis", title="log-spectral features")
    for name, x_NF, colour in (("surrogates", bad_NF, "C0"), ("real", real_NF, "k"), ("generated", fake_NF, "C3")):
        axes.plot(*((x_NF - mean_F) / sd_F @ axes_2F.T).T, ".", ms=3, alpha=0.5, color=colour, label=name)
    axes.legend(fontsize=8, markerscale=3)
    return report.picture(figure, "windows on the main axes of real ones")


def skills(sweep: Mapping[int, Mapping[str, quality.Row]]) -> str:
    """The skill of primary metrics against the number of evaluations of the network."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(1, 1, 1, xlabel="evaluations", ylabel="skill", xscale="log", ylim=(-1, 1.1))
    counts = sorted(sweep)
    for name in quality.PRIMARY:
        values = [sweep[n].get(name, {}).get("skill", float("nan")) for n in counts]
        if np.isfinite(values).any():
            axes.plot(counts, np.clip(values, -1, None), ".-", label=name)
    axes.axhline(1, color="k", lw=0.6, ls=":")
    axes.axhline(0, color="k", lw=0.6)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return report.picture(figure, "skill against evaluations") + report.paragraph("Values below −1 are drawn at −1.")


def anomalies(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Areas under the curve, best first, with what they have over the baseline."""
    lines = [
        [name, row["auroc"], f"{row['low']:.3f} – {row['high']:.3f}", row["gain"], f"{row['gain_low']:.3f} – {row['gain_high']:.3f}", row["error"]]
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["auroc"])
    ]  # fmt: skip
    return report.rows_table(("score", "AUROC", "95 %", "over the baseline", "95 %", "standard error"), lines)


# ----------------------------------------------------------------------------
# from a model file and caches


@dataclass
class Windows:
    """Windows of one kind in the cache's unit, with whose they are."""

    x_NCL: np.ndarray
    block_N: np.ndarray  # recording; of EEG: subject
    label_N: np.ndarray | None


def read_windows(
    corpus: Corpus, part: str, names: Sequence[str], columns: Sequence[str], most: int, seed: int
) -> Windows:
    """
    At most `most` windows of a part that have the channels `names`, drawn at random, in physical units; labels join the `columns`.

    Raises Unusable where no recording has those channels.
    """
    windows = corpus.windows(part, corpus.samples)
    row_N, start_N = windows.locate(np.arange(len(windows)))
    fit_N = np.flatnonzero(np.isin(row_N, fitting(corpus, names)))
    if not len(fit_N):
        raise Unusable(f"no recording to compare with has the channels {', '.join(names)}")
    kept = np.sort(np.random.default_rng([seed, 8]).permutation(fit_N)[:most])
    values = corpus.values({name: (name,) for name in columns})
    x, block, label = [], [], []
    for i in kept:
        recording, cache = corpus.recordings[row_N[i]], corpus.caches[corpus.cache_R[row_N[i]]]
        batch = cache.read([corpus.row_R[row_N[i]]], [start_N[i]], corpus.samples, cache.unit)
        x.append(batch.x_BCT[0, [recording.names.index(name) for name in names]].numpy())
        block.append(corpus.block(row_N[i]))
        own = values[row_N[i]]
        own = own | ({"subject": digest(str(own["subject"]))} if "subject" in own else {})  # as model files have them
        label.append(label_of(own, columns))
    return Windows(np.stack(x), np.array(block), np.array(label) if columns else None)


def signal_of(template: Mapping) -> tuple[str, float, str]:
    """Kind, rate and unit of what a model's file has from a recording."""
    return template["signal"]["kind"], template["signal"]["rate_hz"], template["unit"]


def fitting(corpus: Corpus, names: Sequence[str]) -> np.ndarray:
    """The recordings that have the channels `names`. Raises Unusable for none, and for those that differ in rate, unit or kind."""
    found = np.array([i for i, r in enumerate(corpus.recordings) if set(names) <= set(r.names)], int)
    if not len(found):
        raise Unusable(f"no recording to compare with has the channels {', '.join(names)}")
    caches = [corpus.caches[c] for c in np.unique(corpus.cache_R[found])]
    signals = {(c.signal["kind"], c.rate_hz, c.unit) for c in caches}
    if len(signals) > 1:
        said = ", ".join(sorted(f"{kind} at {rate:g} Hz in {unit}" for kind, rate, unit in signals))
        raise Unusable(f"recordings to compare with differ ({said}): give --cache with alike ones")
    return found


def stretches(corpus: Corpus, names: Sequence[str], seed: int) -> list[np.ndarray]:
    """The training part of the recordings that have these channels, uncut, in physical units; at most SEARCHED samples, spans at random."""
    fits, left, found = set(fitting(corpus, names).tolist()), SEARCHED, []
    spans = [span for span in corpus.spans["train"] if span[0] in fits]
    for at in np.random.default_rng([seed, 9]).permutation(len(spans)):
        i, first, stop = spans[at]
        cache, stop = corpus.caches[corpus.cache_R[i]], min(stop, first + left)
        for start in range(first, stop - corpus.samples + 1, PIECE):
            length = min(PIECE + corpus.samples - 1, stop - start)
            x_CT = cache.read([corpus.row_R[i]], [start], length, cache.unit).x_BCT[0]
            found.append(x_CT[[corpus.recordings[i].names.index(name) for name in names]].numpy())
        left -= stop - first
        if left < corpus.samples:
            break
    return found


def draw_windows(
    path: str | Path, count: int, columns: Sequence[str], seed: int, nfe: int, solver: str, guidance: float
) -> tuple:
    """Windows of a model file, as many of each training recording, with the names of their channels: those of most recordings."""
    net, whiten, meta = generator.load_model(path)
    kind_of = {id(t): (tuple(t["names"]), *signal_of(t)) for t in meta["templates"]}
    chosen = Counter(kind_of.values()).most_common(1)[0][0]
    names, templates = chosen[0], [t for t in meta["templates"] if kind_of[id(t)] == chosen]
    edges = np.linspace(0, count, len(templates) + 1).round().astype(int)
    x, label, block = [], [], []
    for template, first, stop in zip(templates, edges[:-1], edges[1:], strict=True):
        if first == stop:
            continue
        how = {"cfg": guidance, "nfe": nfe, "solver": solver}
        drawn = generator.draw_windows(net, whiten, meta, template, np.arange(first, stop), seed, **how)
        x.append(generator.in_unit(whiten, template, *drawn).astype(np.float32))
        label += [label_of(template["columns"], columns)] * (stop - first)
        block += [template["key"]] * (stop - first)
    return Windows(np.concatenate(x), np.array(block), np.array(label) if columns else None), names, meta


def judge_windows(
    corpus: Corpus,
    fake: Windows,
    names: Sequence[str],
    columns: Sequence[str],
    seed: int,
    open_test: bool = False,
    **options,
) -> tuple[dict[str, quality.Row], dict]:
    """
    The table of generated windows, held against the held-out part of a corpus, and what `write` needs for its figures.

    The held-out part is val: the end of each recording by time, or the val split; with `open_test` the test split's recordings as well.
    """
    parts = [part for part in ("val", "test")[: 1 + open_test] if corpus.spans[part]]
    if not parts:
        raise Unusable(
            "there are no held-out recordings to compare with; --hold-out time compares within recordings, and "
            "--judge of a --model with --open-test takes those of the test split"
        )
    held = joined([read_windows(corpus, part, names, columns, 2 * quality.MOST, seed) for part in parts])
    train = read_windows(corpus, "train", names, columns, quality.AMONG, seed)
    cache = corpus.caches[corpus.cache_R[fitting(corpus, names)[0]]]
    labels = dict(labels_real=held.label_N, labels_fake=fake.label_N)
    # new recordings may be of new classes, and a model may not know of these columns
    known = bool(columns) and {*held.label_N, *fake.label_N} <= {*train.label_N}
    figures = dict(real_NCL=held.x_NCL, fake_NCL=fake.x_NCL, train_NCL=train.x_NCL)
    figures |= dict(rate_hz=cache.rate_hz, block_ids=held.block_N)
    rows = quality.judge(
        **figures, among=stretches(corpus, names, seed), **(labels | {"labels_train": train.label_N} if known else {}),
        eeg=cache.signal["kind"] == "eeg", seed=seed, **options,
    )  # fmt: skip
    return rows, figures | {"unit": cache.unit} | (labels if known else {})


def judge_run(
    model: str | Path,
    real: Sequence[str | Path],
    *,
    by_time: bool,
    open_test: bool = False,
    share: float = 0.6,
    columns: Sequence[str] = (),
    count: int = quality.MOST,
    nfe: int = 16,
    solver: str = "heun",
    guidance: float = 1.0,
    sweep: Sequence[int] = (1, 2, 4, 8, 16, 32),
    seed: int = 0,
    log: Sequence[dict] = (),
    command: str = "",
) -> dict:
    """
    Judge windows of a model file against the held-out part of caches; writes metrics.json and report.html beside it.

    `sweep` are numbers of evaluations that a quarter of the windows is judged at too, without networks. `open_test`: with the test
    split's recordings, too. Returns what a command prints.
    """
    began, folder = time.perf_counter(), Path(model).parent
    fake, names, meta = draw_windows(model, count, columns, seed, nfe, solver, guidance)
    corpus = Corpus(real, meta["window"], 0, meta["window"], by_time, share)
    cache = corpus.caches[corpus.cache_R[fitting(corpus, names)[0]]]
    ours, theirs = (cache.signal["kind"], cache.rate_hz, cache.unit), {signal_of(t) for t in meta["templates"]}
    if ours not in theirs:
        raise Unusable(
            f"{cache.paths[0]} holds {ours[0]} at {ours[1]:g} Hz in {ours[2]}, and {model} was trained on other signals"
        )
    how = names, columns, seed, open_test
    rows, figures = judge_windows(corpus, fake, *how)
    swept = {}
    for n in sweep:
        some, _, _ = draw_windows(model, max(2 * quality.FEWEST, count // 4), columns, seed, n, solver, guidance)
        swept[n], _ = judge_windows(corpus, some, *how, network=False, legacy=False)
    verdict, blocks = quality.gate(rows), len(np.unique(figures["block_ids"]))
    if blocks < FEWEST_BLOCKS:
        verdict += f" Only {blocks} held out: so few say little of others."
    if open_test:
        verdict += " The test split was opened for this: choose nothing by it."
    told = {
        "verdict": verdict,
        "held_out": blocks,
        "nfe": nfe,
        "solver": solver,
        "guidance": guidance,
        "table": rows,
        "sweep": swept,
    }
    write_atomic(folder / "metrics.json", json_line(told).encode())
    write(
        folder / "report.html", f"Flow {meta['run']}", rows, **figures, sweep=swept, log=log, command=command, seed=seed
    )
    return {
        "run": str(folder), "step": meta["step"], "metrics": {name: row["value"] for name, row in rows.items()}, "verdict": verdict,
        "windows": len(fake.x_NCL), "nfe": nfe, "solver": solver, "table": str(folder / "metrics.json"),
        "report": str(folder / "report.html"), "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def label_of(values: Mapping, columns: Sequence[str]) -> str:
    """The values of columns joined with a blank; nothing where one is missing."""
    return " ".join(str(values[name]) for name in columns) if all(name in values for name in columns) else ""


def joined(parts: Sequence[Windows]) -> Windows:
    """All of them."""
    label_N = None if parts[0].label_N is None else np.concatenate([p.label_N for p in parts])
    return Windows(np.concatenate([p.x_NCL for p in parts]), np.concatenate([p.block_N for p in parts]), label_N)
