"""
What scores without a network find: each value of a column in turn is the anomaly, and only the others are known.

    python tests/bench_anomaly.py --cache cache/cwru --column fault --hold-out time --samples 1024
    python tests/bench_anomaly.py --cache cache/bonn --column set --samples 400

A flow has to beat these (`train_flow.py --score` prints them beside its own). With `--hold-out time` the known are fitted on the first 60 % of their recordings, and
everything is judged on the rest; by subject, half of the subjects are fitted on and the other half judged.

Shape letters: N windows.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path
from lib import anomaly
from lib.cache import Cache

FITTED, JUDGED = 400, 300  # windows of a task, at most


def main() -> None:
    """Print a table per task, and all as JSON in the last line."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--column", required=True)
    parser.add_argument("--hold-out", choices=("subject", "time"), default="subject")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    cache, rng = Cache(flags.cache), np.random.default_rng(flags.seed)
    if not any(v is not None and v == v for v in cache.column(flags.column)):
        parser.error(
            f"--column {flags.column}: no recording of {flags.cache} has one; there are {', '.join(cache.columns())}"
        )
    windows = cache.windows(None, flags.samples / cache.rate_hz, flags.samples / cache.rate_hz)
    row_N, start_N = windows.locate(np.arange(len(windows)))
    value_N = np.array([str(v) for v in cache.column(flags.column)])[row_N]
    people = cache.signal["kind"] == "eeg"  # intervals are over them; over recordings of machines
    block_N = np.array([cache.recordings[i].subject if people else cache.recordings[i].key for i in row_N])
    if flags.hold_out == "time":
        late_N = start_N >= 0.6 * np.array([cache.recordings[i].samples for i in row_N])
    else:
        subjects, number_N = np.unique([cache.recordings[i].subject for i in row_N], return_inverse=True)
        late_N = (rng.permutation(len(subjects)) % 2 == 1)[number_N]
    tables = {}
    for strange in np.unique(value_N):
        strange_N = value_N == strange
        healthy, judged = np.flatnonzero(~strange_N & ~late_N), np.flatnonzero(late_N)
        healthy, judged = rng.permutation(healthy)[:FITTED], rng.permutation(judged)[:JUDGED]
        if strange_N[judged].all() or not strange_N[judged].any():
            continue
        x_NCL = [cache.read(row_N[i], start_N[i], flags.samples, cache.unit).x_BCT.numpy() for i in (healthy, judged)]
        scores = anomaly.plain_scores(*x_NCL, cache.rate_hz)
        tables[strange] = anomaly.table(scores, strange_N[judged], block_N[judged], flags.seed)
        for name, row in tables[strange].items():
            print(f"{strange:26}{name:28}{row['auroc']:7.3f} ({row['low']:.3f} – {row['high']:.3f})", flush=True)
    if not tables:
        parser.error(f"--column {flags.column} has one value, or one side of the split has: nothing to tell apart")
    print(json.dumps(tables))


if __name__ == "__main__":
    main()
