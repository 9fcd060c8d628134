"""
Figures of a run: curves from its log.jsonl, what people share, and maps of windows.

Shape letters: N windows, D width.
"""

from pathlib import Path

PANELS = {  # title: how the keys in it begin
    "loss": ("loss", "val_loss"),
    "probes": ("probe_",),
    "moments found": ("embedding_retrieval_top1", "encoder_retrieval_top1"),
    "who and what": ("embedding_subject", "embedding_movie", "encoder_subject", "encoder_movie"),
    "features": ("feature_rank",),
    "collapse watch": ("feature_std", "teacher_cosine", "predicted_cosine"),
    "gradient norm": ("grad_norm",),
    "learning rate": ("lr",),
    "windows/s": ("windows_per_s",),
}


def curves(lines: list[dict], path: Path) -> None:
    """One panel per group of keys that `lines` (of log.jsonl) hold, against the step, as PNG."""
    from matplotlib.figure import (
        Figure,
    )  # the object, not pyplot: no window system, no global state; here: it takes 1 s

    keys = sorted({k for line in lines for k, v in line.items() if isinstance(v, (int, float))} - {"step"})
    panels = {title: [k for k in keys if k.startswith(starts)] for title, starts in PANELS.items()}
    panels = {title: found for title, found in panels.items() if found}
    rows, columns = -(-len(panels) // 3), min(3, len(panels))
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    for i, (title, found) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1, title=title, xlabel="step")
        colours: dict[str, str] = {}
        for key in found:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            base = key.removesuffix("_chance").removesuffix("_bandpower")
            own = key == base
            dashes, label = ("-" if own else "--" if key.endswith("_bandpower") else ":"), (key if own else None)
            colour = colours.setdefault(base, f"C{len(colours)}")
            axes.plot(*zip(*points, strict=True), dashes, color=colour, label=label, lw=1.5 if own else 1)
        if title in ("loss", "gradient norm") and all(
            line[k] > 0 for k in found for line in lines if line.get(k) is not None
        ):
            axes.set_yscale("log")
        if title == "probes":
            axes.set_ylim(bottom=max(-0.5, axes.get_ylim()[0]))  # R² has no lower bound
            axes.set_title("probes (-- band power, ·· chance)")
        if len(colours) > 1:
            axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    _write(figure, path)


def shared(curves: dict, path: Path) -> None:
    """
    Inter-subject correlation (lib.films.Curves by title) by lag, and by the time of each movie; dotted: 95 % of shifted time courses are
    below. As PNG.
    """
    from matplotlib.figure import Figure

    films = sorted({name for c in curves.values() for name in c.by_time})
    figure = Figure(figsize=(5 * (1 + len(films)), 2.6 * len(curves)), layout="constrained")
    for row, (title, c) in enumerate(curves.items()):
        axes = [
            figure.add_subplot(len(curves), 1 + len(films), row * (1 + len(films)) + i + 1)
            for i in range(1 + len(films))
        ]
        axes[0].plot(c.lag_s, c.by_lag)
        axes[0].set(title=f"{title}: by lag", xlabel="lag, s", ylabel="inter-subject correlation")
        for place, name in zip(axes[1:], films, strict=True):
            place.plot(c.time_s.get(name, []), c.by_time.get(name, []), ".-", color="C1")
            place.set(title=f"{title}: {name}", xlabel="time of the movie, s", ylim=axes[0].get_ylim())
        for place in axes:
            place.axhline(c.null, color="k", ls=":", lw=1)
            place.grid(alpha=0.3)
    _write(figure, path)


def maps(tables: dict, subject_N: list, movie_N: list, path: Path) -> None:
    """Windows (N, D) by title on their two main axes (principal components), coloured by subject and by movie, as PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2 * len(tables)), layout="constrained")
    for row, (title, z_ND) in enumerate(tables.items()):
        u, s, _ = np.linalg.svd(z_ND - z_ND.mean(0), full_matrices=False)
        for column, (of, label_N) in enumerate((("subject", subject_N), ("movie", movie_N))):
            axes = figure.add_subplot(len(tables), 2, 2 * row + column + 1, title=f"{title}: by {of}")
            for i, label in enumerate(dict.fromkeys(label_N)):
                chosen = [j for j, other in enumerate(label_N) if other == label]
                axes.plot(*(u[chosen, :2] * s[:2]).T, ".", ms=3, color=f"C{i % 10}", label=label)
            axes.set(xticks=[], yticks=[])
            if len(set(label_N)) <= 10:
                axes.legend(fontsize=7, markerscale=3)
    _write(figure, path)


def _write(figure, path: Path) -> None:
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=100)
    temporary.replace(path)
