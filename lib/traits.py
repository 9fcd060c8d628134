"""
What a cache says of a person or a recording (age, sex, any column), as targets of linear heads beside another objective.

Shape letters: R recordings of a cache, B windows, K traits, D width.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.cache import Cache
from lib.errors import Unusable
from lib.tensors import check_format, load_tensors, save_tensors

FORMAT, VERSION = "berger-traits", 1
MOST_LEVELS = 5  # a column of more distinct numbers is a quantity
KINDS = ("regression", "classification")


@dataclass(frozen=True)
class Trait:
    """A column to be predicted: a number, or one of `classes`. What it takes to read a head's output is in here."""

    name: str
    classes: tuple[str, ...] = ()  # empty: a number
    weights: tuple[
        float, ...
    ] = ()  # of the classes, so that rare ones count as much; 1 on average over training subjects
    mean: float = 0.0  # of the training subjects
    std: float = 1.0

    def encode(self, value) -> float:
        """The number of the value's class, or the standardised value; NaN where it is missing or a class that training lacked."""
        if self.classes:
            name = class_name(value)
            return float(self.classes.index(name)) if name in self.classes else float("nan")
        value = number(value)
        return float("nan") if value is None else (value - self.mean) / self.std


def number(value) -> float | None:
    """A finite number, or None."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def class_name(value) -> str | None:
    """How a value is called as a class: 1.0 of one table and 1 of another are the same; None where it is missing."""
    if value is None or value != value:
        return None
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_quantity(values: Sequence) -> bool:
    """Whether the known values of a column are many distinct numbers; otherwise they are classes."""
    return len(set(values)) > MOST_LEVELS and all(number(v) is not None for v in values)


def read_traits(cache: Cache, names: Sequence[str], rows: Sequence[int]) -> list[Trait]:
    """
    The columns `names` as traits, standardised and balanced over the subjects of recordings `rows` (those of the train split).

    `age:classification` or `age:regression` overrides what the values look like. A subject whose value changes between recordings counts
    once per value; a class of a single subject is left out. Raises Unusable for a column that isn't there or can't be learned.
    """
    traits = []
    for word in names:
        name, _, kind = word.partition(":")
        there = sorted({*cache.columns(), "task"})
        if name not in there:
            raise Unusable(
                f"--aux {name}: no such column in {', '.join(map(str, cache.paths))}; there are: {', '.join(there)}"
            )
        if kind not in ("", *KINDS) or name in {t.name for t in traits}:
            raise Unusable(f"--aux {word}: expected each column once, with :regression or :classification at most")
        column = cache.column(name)
        found = {(cache.recordings[i].subject, column[i]) for i in rows if class_name(column[i]) is not None}
        values = [v for _, v in found]
        traits.append(_trait(name, values, kind or KINDS[not is_quantity(values)]))
    return traits


def _trait(name: str, values: list, kind: str) -> Trait:
    if kind == "regression":
        numbers = np.array([number(v) for v in values], float)
        if np.isnan(numbers).any():
            odd = next(v for v in values if number(v) is None)
            raise Unusable(f"--aux {name}:regression: {odd!r} is no number; say {name}:classification")
        if len(set(values)) < 2:
            raise Unusable(f"--aux {name}: the training subjects have {len(set(values))} distinct values; leave it out")
        return Trait(name, mean=float(np.sort(numbers).mean()), std=float(np.sort(numbers).std()))
    subjects = {c: n for c, n in Counter(map(class_name, values)).items() if n > 1}
    classes = tuple(sorted(subjects))
    if len(classes) < 2:
        raise Unusable(f"--aux {name}: {len(classes)} classes with two training subjects or more; leave it out")
    total = sum(subjects.values())
    return Trait(name, classes, tuple(total / (len(classes) * subjects[c]) for c in classes))


def trait_values(cache: Cache, traits: Sequence[Trait]) -> torch.Tensor:
    """What is to be predicted for every recording of the cache, float32 (R, K); NaN where it is missing."""
    columns = [[trait.encode(v) for v in cache.column(trait.name)] for trait in traits]
    return torch.tensor(columns, dtype=torch.float32).reshape(len(traits), len(cache.recordings)).T.contiguous()


class AuxiliaryHeads(nn.Module):
    """One linear map of a window's mean features per trait."""

    def __init__(self, d: int, traits: Sequence[Trait]):
        super().__init__()
        self.traits = list(traits)
        self.heads = nn.ModuleList(nn.Linear(d, max(1, len(trait.classes))) for trait in traits)

    def forward(self, z_BD: torch.Tensor) -> list[torch.Tensor]:
        """Per trait the standardised number (B, 1), or a logit per class (B, classes)."""
        return [head(z_BD) for head in self.heads]

    def loss(self, z_BD: torch.Tensor, values_BK: torch.Tensor, known_K: torch.Tensor) -> torch.Tensor:
        """
        Mean over traits of the mean over known labels of smooth L1, or cross-entropy weighted by class, float32.

        `known_K` counts the known labels of the global batch (known_labels); its parts' losses add up to the loss of the whole.
        """
        loss = z_BD.new_zeros((), dtype=torch.float32)
        for trait, out, y_B, known in zip(self.traits, self(z_BD), values_BK.T, known_K.tolist(), strict=True):
            told_B = y_B.isfinite()
            out, y_B = out.float(), torch.where(told_B, y_B, 0.0)  # before the loss: 0 x a gradient of NaN is NaN
            if trait.classes:
                weight = torch.tensor(trait.weights, device=out.device)
                loss_B = F.cross_entropy(out, y_B.long(), weight, reduction="none")
            else:
                loss_B = F.smooth_l1_loss(out[:, 0], y_B, reduction="none")
            loss = loss + torch.where(told_B, loss_B, 0.0).sum() / max(known, 1)
        return loss / max(int((known_K > 0).sum()), 1)

    @torch.no_grad()
    def predict(self, z_BD: torch.Tensor) -> dict[str, list]:
        """Numbers in the column's own unit, or names of classes."""
        said = {}
        for trait, out in zip(self.traits, self(z_BD), strict=True):
            if trait.classes:
                said[trait.name] = [trait.classes[i] for i in out.argmax(1).tolist()]
            else:
                said[trait.name] = (out[:, 0].double() * trait.std + trait.mean).tolist()
        return said


def known_labels(values_RK: torch.Tensor, recording_B: np.ndarray) -> torch.Tensor:
    """How many of the windows, given by their recordings, have a label; int64 (K)."""
    return values_RK[torch.from_numpy(recording_B)].isfinite().sum(0)


def save_heads(path: str | Path, heads: AuxiliaryHeads, meta: dict) -> None:
    """Write the heads with what their outputs mean; `meta` says whose features they read."""
    own = {"format": FORMAT, "version": VERSION, "traits": [asdict(trait) for trait in heads.traits]}
    save_tensors(Path(path), heads.state_dict(), own | meta)


def load_heads(path: str | Path) -> tuple[AuxiliaryHeads, dict]:
    """Heads of `save_heads` (on the CPU) and their metadata. Raises Unusable."""
    tensors, meta = load_tensors(path)
    check_format(meta, path, FORMAT, VERSION)
    traits = [Trait(t["name"], tuple(t["classes"]), tuple(t["weights"]), t["mean"], t["std"]) for t in meta["traits"]]
    heads = AuxiliaryHeads(tensors["heads.0.weight"].shape[1] if traits else 1, traits)
    heads.load_state_dict(tensors)
    return heads, meta
