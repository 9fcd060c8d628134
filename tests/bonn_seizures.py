"""
A seizure set of real signal: Bonn's segments, joined to recordings as an archive of TUSZ has them, with annotations beside.

    python tests/bonn_seizures.py --folder cache/bonn-edf

Every "patient" is made of segments of its own (Andrzejak 2001 doesn't say whose they are), most without a seizure and some of set E. Each segment
is faded into the next over a quarter of a second, so that no step gives a seizure's onset away.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy.signal import resample_poly

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

from lib.edf import write_edf

RATE_HZ, OUT_HZ = 173.61, 200.0  # EDF wants whole records, which the first gives only every hundred seconds
FADE = 43  # samples
BACKGROUND = ("A_Z", "B_O", "D_F")  # eyes open, eyes closed, between seizures
SPLITS = ("train",) * 6 + ("dev",) * 2 + ("eval",) * 2


@dataclass(frozen=True)
class Config:
    folder: Path  # to write to
    data: Path = Path(os.environ.get("BERGER_DATA", Path(__file__).parents[2] / "shared" / "data")) / "bonn"
    seed: int = 0  # of the order


def main(cfg: Config) -> list[Path]:
    """Ten patients with a recording each; the EDF files."""
    rng = np.random.default_rng(cfg.seed)
    kept = {name: iter(rng.permutation(sorted((cfg.data / name).glob("*.txt")))) for name in (*BACKGROUND, "E_S")}
    written = []
    for n, split in enumerate(SPLITS):
        share = [name for name in (*BACKGROUND, "E_S") for _ in range(4)]
        order = [str(name) for name in rng.permutation(share)]
        order = ["D_F", *(name for i, name in enumerate(order) if i != order.index("D_F"))]  # starts without one
        x_T, seizures = join([np.loadtxt(next(kept[name])) for name in order], [name == "E_S" for name in order])
        x_T = resample_poly(x_T, 20000, 17361)
        x_T = x_T[: int(len(x_T) // OUT_HZ * OUT_HZ)]
        patient = f"{'aaaaaaa'}{chr(97 + n)}"
        folder = cfg.folder / "edf" / split / patient / "s001_2015" / "01_tcp_ar"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{patient}_s001_t000.edf"
        write_edf(path, x_T[None], OUT_HZ, ["EEG CZ-REF"])
        path.with_suffix(".csv_bi").write_text(annotated(seizures, len(x_T) / OUT_HZ))
        written.append(path)
    return written


def join(segments: list[np.ndarray], seizure: list[bool]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """One signal in microvolts, and onset and end of its seizures, s; seizures that touch are one."""
    ramp_T = np.linspace(0, 1, FADE)
    x_T, seizures = segments[0], []
    for segment, is_seizure in zip(segments[1:], seizure[1:], strict=True):
        onset = (len(x_T) - FADE) / RATE_HZ
        mixed_T = x_T[-FADE:] * (1 - ramp_T) + segment[:FADE] * ramp_T
        x_T = np.concatenate([x_T[:-FADE], mixed_T, segment[FADE:]])
        if is_seizure:
            touches = seizures and onset - seizures[-1][1] < 1
            start = seizures.pop()[0] if touches else onset
            seizures.append((start, len(x_T) / RATE_HZ))
    return x_T, seizures


def annotated(seizures: list[tuple[float, float]], duration_s: float) -> str:
    """A .csv_bi file."""
    head = f"# version = csv_v1.0.0\n# duration = {duration_s:.4f} secs\n#\nchannel,start_time,stop_time,label,confidence\n"
    return head + "".join(f"TERM,{a:.4f},{min(b, duration_s):.4f},seiz,1.0000\n" for a, b in seizures)


if __name__ == "__main__":
    print(*main(tyro.cli(Config, description=__doc__)), sep="\n")
