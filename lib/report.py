"""
One HTML page that says how a run went; everything is in it, so that it opens in any browser without a network.

Shape letters: N scored units, K classes, T stretches of a recording.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # the object, not pyplot: no window system, no global state

from lib.channels import POSITIONS, SPHERE_CENTRE_M
from lib.judgement import Timeline, Units
from lib.store import write_atomic
from lib.targets import Target

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } th, td { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } tr.own { font-weight: 600; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; white-space: pre-wrap; } img { max-width: 100%; }
p.warn { background: #fff3d6; padding: .6rem .9rem; } small { color: #666; }
"""
MOST_LINES = 12  # recordings on a seizure timeline
FIRST = ("nrmse", "r2", "pearson_r", "balanced_accuracy", "auroc", "szcore_f1", "szcore_false_alarms_per_day")


def write(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """A page of sections, each a heading and HTML."""
    body = "".join(f"<section><h2>{html.escape(name)}</h2>\n{text}</section>\n" for name, text in sections if text)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{body}</body></html>\n'
    write_atomic(path, page.encode())


def picture(figure: Figure, words: str) -> str:
    """A figure as an image inside the page."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return f'<p><img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"></p>\n'


def verbatim(text: str) -> str:
    """Text as it is."""
    return f"<pre>{html.escape(text)}</pre>\n"


def paragraph(text: str, warn: bool = False) -> str:
    """A paragraph, in colour if it is a warning."""
    return f"<p{' class=warn' if warn else ''}>{html.escape(text)}</p>\n"


def rows_table(names: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table; numbers stand right."""
    head = "".join(f"<th>{html.escape(str(n))}</th>" for n in names)
    body = ""
    for row in rows:
        cells = (f"<td{' class=n' if isinstance(v, float | int) else ''}>{html.escape(_words(v))}</td>" for v in row)
        body += f"<tr{' class=own' if row and row[0] == 'model' else ''}>{''.join(cells)}</tr>\n"
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n"


def _words(value) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.3g}"
    return "" if value is None else str(value)


def score_tables(table: Sequence[dict]) -> str:
    """One table per target: models down, scores across, each with its interval."""
    text = ""
    for target in dict.fromkeys(row["target"] for row in table):
        own = [row for row in table if row["target"] == target]
        metrics = sorted(
            dict.fromkeys(row["metric"] for row in own), key=lambda m: (FIRST.index(m) if m in FIRST else 99, m)
        )
        found = {(row["model"], row["metric"]): row for row in own}
        rows = []
        for model in dict.fromkeys(row["model"] for row in own):
            cells = []
            for metric in metrics:
                row = found.get((model, metric))
                known = row and row["value"] is not None and row["value"] == row["value"]
                cells.append(f"{row['value']:.3f} ({_words(row['low'])} – {_words(row['high'])})" if known else "–")
            rows.append([model, *cells])
        text += f"<h3>{html.escape(target)}</h3>" + rows_table(["", *metrics], rows)
    return text + "<p><small>In brackets: 95 % intervals from a bootstrap over subjects.</small></p>\n"


# ----------------------------------------------------------------------------
# figures


def curves(lines: Sequence[dict]) -> str:
    """Losses, validation scores and learning rate against the step."""
    steps = [line for line in lines if not line.get("event")]
    keys = sorted({k for line in steps for k, v in line.items() if isinstance(v, int | float)})
    groups = {"loss": [k for k in keys if k.startswith("loss") or k == "val_loss"]}
    groups |= {"validation": [k for k in keys if k.startswith("val_") and k != "val_loss"]}
    groups |= {"gradient norm": [k for k in keys if k == "grad_norm"], "learning rate": [k for k in keys if k == "lr"]}
    groups = {title: found for title, found in groups.items() if found}
    if len(steps) < 2 or not groups:
        return paragraph("Nothing was trained step by step.")
    figure = Figure(figsize=(4.6 * len(groups), 3.2), layout="constrained")
    for i, (title, found) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), i + 1, title=title, xlabel="step")
        for key in found:
            points = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 12 else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return picture(figure, "curves of the training")


def truth_against_said(target: Target, u: Units) -> str:
    """A scatter of a quantity, or the confusion matrix of classes (rows: truth)."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    unit = f" ({target.unit})" if target.unit else ""
    if not target.classes:
        axes = figure.add_subplot(
            1,
            1,
            1,
            xlabel=f"true{unit}",
            ylabel=f"said{unit}",
            title=f"{target.name}, {len(u.y_N)} {target.scored_by}s",
        )
        for subject in np.unique(u.subject_N):
            own = u.subject_N == subject
            axes.plot(u.y_N[own], u.said_N[own, 0], ".", ms=5 if target.scored_by == "window" else 9)
        ends = [float(min(u.y_N.min(), u.said_N.min())), float(max(u.y_N.max(), u.said_N.max()))]
        axes.plot(ends, ends, "k:", lw=1)
        axes.grid(alpha=0.3)
        return picture(figure, f"{target.name}: said against true, one colour per subject")
    count_KK = np.zeros((len(target.classes),) * 2, int)
    np.add.at(count_KK, (u.y_N, u.said_N.argmax(1)), 1)
    share_KK = count_KK / np.maximum(count_KK.sum(1, keepdims=True), 1)
    axes = figure.add_subplot(
        1, 1, 1, xlabel="said", ylabel="true", title=f"{target.name}, {len(u.y_N)} {target.scored_by}s"
    )
    axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(target.classes)), target.classes, rotation=30, ha="right")
    axes.set_yticks(range(len(target.classes)), target.classes)
    for (i, j), n in np.ndenumerate(count_KK):
        axes.text(
            j,
            i,
            f"{n}\n{share_KK[i, j]:.0%}",
            ha="center",
            va="center",
            fontsize=8,
            color="w" if share_KK[i, j] > 0.6 else "k",
        )
    return picture(figure, f"{target.name}: confusion matrix")


def by_subject(target: Target, u: Units) -> str:
    """What each subject got: share of windows told rightly, or mean absolute error."""
    rows = []
    for subject in np.unique(u.subject_N):
        own = u.subject_N == subject
        if target.classes:
            rows.append([subject, int(own.sum()), float((u.said_N[own].argmax(1) == u.y_N[own]).mean())])
        else:
            gap_N = u.said_N[own, 0] - u.y_N[own]
            rows.append([subject, int(own.sum()), float(np.abs(gap_N).mean()), float(gap_N.mean())])
    names = [
        "subject",
        target.scored_by + "s",
        *(["accuracy"] if target.classes else ["mean absolute error", "mean error"]),
    ]
    return f"<h3>{html.escape(target.name)}</h3>" + rows_table(names, rows)


def head(by_site: dict[str, float], title: str) -> str:
    """Values at electrodes, on a head seen from above (nose up); distance from the vertex is kept."""
    if not by_site:
        return ""
    xyz_E3 = np.array([POSITIONS[name] for name in by_site]) - SPHERE_CENTRE_M
    xyz_E3 /= np.linalg.norm(xyz_E3, axis=1, keepdims=True)
    angle_E = np.arccos(np.clip(xyz_E3[:, 2], -1, 1)) / (np.pi / 2)
    flat_E2 = xyz_E3[:, :2] / np.maximum(np.linalg.norm(xyz_E3[:, :2], axis=1, keepdims=True), 1e-9) * angle_E[:, None]
    value_E = np.array(list(by_site.values()))
    most = float(np.abs(value_E).max()) or 1.0
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.add_subplot(1, 1, 1, title=title, aspect="equal")
    grid = np.stack(np.meshgrid(np.linspace(-1.15, 1.15, 120), np.linspace(-1.15, 1.15, 120)), -1)
    apart = np.linalg.norm(grid[:, :, None] - flat_E2, axis=3)
    weight = np.exp(-0.5 * (apart / 0.18) ** 2) + 1e-3  # far from all electrodes, their mean
    shade = np.where(np.linalg.norm(grid, axis=2) <= 1.1, (weight * value_E).sum(2) / weight.sum(2), np.nan)
    image = axes.imshow(shade, extent=(-1.15, 1.15, -1.15, 1.15), origin="lower", cmap="RdBu_r", vmin=-most, vmax=most)
    turn = np.linspace(0, 2 * np.pi, 200)
    axes.plot(1.1 * np.cos(turn), 1.1 * np.sin(turn), "k", lw=1)
    axes.plot([-0.12, 0, 0.12], [1.09, 1.22, 1.09], "k", lw=1)
    axes.plot(*flat_E2.T, "k.", ms=3)
    for name, (x, y) in zip(by_site, flat_E2, strict=True):
        axes.annotate(name, (x, y), fontsize=6, ha="center", va="bottom")
    axes.axis("off")
    figure.colorbar(image, shrink=0.7, label="rise of the loss")
    return picture(figure, f"{title}, drawn on the head")


def bars(values: dict[str, float], title: str) -> str:
    """One bar per name."""
    figure = Figure(figsize=(5, 0.4 * len(values) + 1.2), layout="constrained")
    axes = figure.add_subplot(1, 1, 1, title=title, xlabel="rise of the loss")
    axes.barh(list(values), list(values.values()), color="C0")
    axes.invert_yaxis()
    axes.axvline(0, color="k", lw=0.8)
    return picture(figure, title)


def seizure_timeline(
    lines: Sequence[Timeline], found: Sequence[np.ndarray], names: Sequence[str], threshold: float
) -> str:
    """Probability along recordings, annotated seizures shaded, found ones as bars above; those with seizures first."""
    order = sorted(range(len(lines)), key=lambda i: (not len(lines[i].annotated_N2), not len(found[i]), i))[:MOST_LINES]
    figure = Figure(figsize=(11, 1.3 * len(order) + 0.6), layout="constrained")
    for place, i in enumerate(order):
        line = lines[i]
        axes = figure.add_subplot(len(order), 1, place + 1, ylim=(-0.02, 1.2), xlim=(0, line.seconds))
        time_s_T = (np.arange(len(line.probability_T)) + 0.5) * line.seconds / len(line.probability_T)
        axes.plot(time_s_T, line.probability_T, lw=0.9)
        axes.axhline(threshold, color="k", lw=0.5, ls=":")
        for start, stop in line.annotated_N2:
            axes.axvspan(start, stop, color="C3", alpha=0.25, lw=0)
        for start, stop in found[i]:
            axes.plot([start, stop], [1.1, 1.1], color="C2", lw=4, solid_capstyle="butt")
        axes.set_title(names[i], fontsize=7, loc="left", pad=2)
        axes.tick_params(labelsize=7)
    words = "Shaded: annotated. Green bars: found. Dotted: threshold." + (
        f" {len(lines) - len(order)} recordings are not shown." if len(lines) > len(order) else ""
    )
    return picture(figure, "probability of a seizure along recordings") + paragraph(words)
