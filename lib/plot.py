"""
Curves of a run, drawn from its log.jsonl.
"""

from pathlib import Path

PANELS = {  # title: how the keys in it begin
    "loss": ("loss", "val_loss"),
    "probes": ("probe_",),
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
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=100)
    temporary.replace(path)
