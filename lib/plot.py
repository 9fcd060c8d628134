"""
Curves of a run, drawn from its log.jsonl.
"""

from pathlib import Path

from matplotlib.figure import Figure  # the object, not pyplot: no window system, no global state

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
    keys = sorted({k for line in lines for k, v in line.items() if isinstance(v, (int, float))} - {"step"})
    panels = {title: [k for k in keys if k.startswith(starts)] for title, starts in PANELS.items()}
    panels = {title: found for title, found in panels.items() if found}
    figure = Figure(figsize=(5 * min(3, len(panels)), 3.2 * -(-len(panels) // 3)), layout="constrained")
    for i, (title, found) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // 3), min(3, len(panels)), i + 1, title=title, xlabel="step")
        for key in found:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else None)
        if (
            title in ("loss", "gradient norm")
            and min(line[k] for k in found for line in lines if line.get(k) is not None) > 0
        ):
            axes.set_yscale("log")
        if len(found) > 1:
            axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
