"""
What each phase is worth: whole lineages, from pretraining to fine-tuning, from one command, and their table.

    full              train_jepa.py with auxiliary traits, train_contrastive.py, train_supervised.py
    no_contrastive    without the second phase (which pairs people by movies, or where there are none two views of a window)
    no_auxiliary      without the auxiliary traits of the first
    supervised_only   the last phase from scratch

Every phase is a run of its own below the run directory; one that is finished is not run again. Targets of the last phase are never
auxiliary traits of the first.
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from lib.cache import Cache
from lib.errors import Failed, Unusable
from lib.labels import TRAITS
from lib.store import write_atomic
from lib.targets import parse_word

LINEAGES = {  # whether the first phase runs, with auxiliary traits, and whether the second does
    "full": (True, True, True),
    "no_contrastive": (True, True, False),
    "no_auxiliary": (True, False, True),
    "supervised_only": (False, False, False),
}
SHARED = (
    "encoder adapter queries relations d_model layers heads patch_s max_channels seed device dtype".split()
)  # flags of all phases
NOT_PASSED = {"name", "lineage", "pretrain_steps", "init", "mode", "resume", "overwrite", "preset"}


def words_of(values: dict, defaults: dict) -> list[str]:
    """Flags for what differs from the defaults."""
    words = []
    for name, value in values.items():
        if value != defaults.get(name):
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def call(script: Path, words: list[str], left: Path) -> dict:
    """
    Run a phase unless it has left its file already; its results.

    Raises Failed with the phase's own last line, and Unusable if other flags have been there before.
    """
    results, asked = left.parent / "results.json", left.parent.with_name(f"{left.parent.name}.json")
    if left.parent.exists() and (not asked.exists() or json.loads(asked.read_text()) != words):
        raise Unusable(f"{left.parent} was made with other flags: another --name, or --overwrite")
    if left.exists() and results.exists():
        return json.loads(results.read_text())
    asked.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(asked, json.dumps(words).encode())
    resume = ["--resume"] if (left.parent / "state.safetensors").exists() else ["--overwrite"]
    line = [
        sys.executable,
        str(script),
        *words,
        *(["--name", str(left.parent), "--resume"] if resume == ["--resume"] else resume),
    ]
    print(shlex.join([script.name, *words]), file=sys.stderr, flush=True)
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failed(f"{shlex.join([script.name, *words])} ended with {done.returncode}; its last words are above")
    results.write_text(done.stdout.splitlines()[-1])
    return json.loads(results.read_text())


def run_lineages(cfg, script: Path) -> dict:
    """
    Run the lineages of `cfg.lineage`, one after the other, phases they share once; a table of their scores on val.

    `cfg` is the configuration of train_supervised.py, whose flags all lineages share. Raises Unusable and Failed.
    """
    if unknown := [name for name in cfg.lineage if name not in LINEAGES]:
        raise Unusable(f"--lineage {unknown[0]}: there are {', '.join(LINEAGES)}")
    cache = Cache(*cfg.cache)
    told = {label for word in cfg.target for label in parse_word(cache, word)[3]}
    traits = [
        t if t == "sex" else f"{t}:regression"
        for t in TRAITS
        if t in cache.columns() and t not in told and t != "ehq_total"
    ]
    if not traits and any(LINEAGES[name][1] for name in cfg.lineage):
        raise Unusable("--lineage: the cache has no trait for an auxiliary head; take no_auxiliary and supervised_only")
    defaults = vars(type(cfg)())
    shared = words_of({k: getattr(cfg, k) for k in SHARED}, defaults)
    # phases before need all shared flags as they are, because their own defaults differ; what is left open here is left to theirs
    shape = words_of({k: getattr(cfg, k) for k in SHARED}, {})
    caches = ["--cache", *map(str, cfg.cache)]
    folder = Path(cfg.name) if cfg.name and "/" in cfg.name else Path("runs") / (cfg.name or "lineages")
    own = words_of(
        {k: v for k, v in vars(cfg).items() if k not in NOT_PASSED | {"cache"} and k not in SHARED}, defaults
    )
    pairs = "movie:1" if any(label.startswith("movie:") for label in cache.labels()) else "augment:1"
    if cfg.overwrite:
        for name in (*LINEAGES, "jepa", "jepa-traits", "contrastive-traits", "contrastive-plain"):
            if (folder / name / "config.json").exists():  # never a directory that isn't a run
                shutil.rmtree(folder / name)
    results: dict = {}
    for name in cfg.lineage:
        first, auxiliary, second = LINEAGES[name]
        encoder = None
        if first:
            run = folder / ("jepa-traits" if auxiliary else "jepa")
            words = [
                *caches,
                *shape,
                "--steps",
                str(cfg.pretrain_steps),
                "--name",
                str(run),
                *(["--aux", *traits] if auxiliary else []),
            ]
            encoder = call(script.parent / "train_jepa.py", words, run / "encoder.safetensors")["encoder"]
        if second:
            run = folder / f"contrastive-{'traits' if auxiliary else 'plain'}"
            words = [*caches, "--seed", str(cfg.seed), "--steps", str(cfg.pretrain_steps), "--pairs", pairs]
            words += ["--device", cfg.device, "--dtype", cfg.dtype, "--name", str(run), "--init", encoder]
            encoder = call(script.parent / "train_contrastive.py", words, run / "encoder.safetensors")["encoder"]
        run = folder / name
        words = [*caches, *shared, *own, "--name", str(run), *(["--init", encoder] if encoder else [])]
        results[name] = call(script, words, run / "model.safetensors")
    table = compare(results)
    (folder / "table.md").write_text(table)
    print(table, file=sys.stderr)
    metrics = {f"{name}_{k}": v for name, r in results.items() for k, v in r["metrics"].items()}
    seconds = sum(r["seconds"] for r in results.values())
    steps = max(r["step"] for r in results.values())
    last = next(reversed(results.values()))
    runs = {name: r["run"] for name, r in results.items()}
    return {
        "run": str(folder),
        "step": steps,
        "metrics": metrics,
        "windows_per_s": last["windows_per_s"],
        "seconds": seconds,
        "runs": runs,
    }


def compare(results: dict[str, dict]) -> str:
    """A Markdown table: lineages and baselines down, main scores across, with intervals."""
    wanted = ("nrmse", "pearson_r", "balanced_accuracy", "auroc", "szcore_f1", "challenge_score")
    metrics = [m for m in next(iter(results.values()))["metrics"] if m.endswith(wanted)]
    rows = {
        name: {m: [r["metrics"][m], *r["intervals"].get(m, [None, None])] for m in metrics}
        for name, r in results.items()
    }
    rows |= next(iter(results.values()))["baselines"]
    lines = [f"| | {' | '.join(metrics)} |", f"| - |{' - |' * len(metrics)}"]
    for name, values in rows.items():
        cells = []
        for metric in metrics:
            value, low, high = values.get(metric, [None] * 3)
            cells.append(
                "" if value is None else f"{value:.3f}" + ("" if low is None else f" ({low:.3f} – {high:.3f})")
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
