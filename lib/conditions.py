"""
What a window is generated for: data set, label, domain, sampling rate, speed, traits of a person, a known recording, and its level.

Each is a number or one of the classes that training recordings had. So that any of them may be left out later, training drops each one
in some windows, and all of them in some. A value that is missing, or that training didn't have, is null: a vector of its own, never
class 0. Values that training didn't have are counted.

Shape letters: B windows, F conditions, D width, W waves.
"""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib.errors import Unusable
from lib.traits import class_name, is_quantity, number

LEVEL = "level"  # of the window, as a normal deviate: given per window, not per recording
LOGARITHMIC = ("rate", "speed")  # numbers whose ratios count
WAVES = (0.5, 1.0, 2.0, 4.0)  # radians per standard deviation, of a number's code


@dataclass(frozen=True)
class Condition:
    """One of the things that windows differ in; without classes it is a number, standardised by mean and std."""

    name: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    def encode(self, value, unknown: Counter) -> float:
        """The number of the value's class, or the standardised number; NaN where it is missing or, counted, unknown."""
        if value is None or value == "" or value != value:
            return math.nan
        if self.classes:
            if class_name(value) in self.classes:
                return float(self.classes.index(class_name(value)))
        elif (n := self._number(value)) is not None:
            return (n - self.mean) / self.std
        unknown[f"{self.name}={value}"] += 1
        return math.nan

    def _number(self, value) -> float | None:
        n = number(value)
        if self.name in LOGARITHMIC:
            n = math.log(n) if n is not None and n > 0 else None
        return n


def learn(rows: Sequence[Mapping], names: Sequence[str]) -> list[Condition]:
    """
    The conditions `names` as far as training recordings have them; `rows` holds the values of each by name.

    Many distinct numbers are a quantity, anything else classes; what no recording has, or what all share, is left out, and the level
    comes last.
    """
    learned = []
    for name in names:
        values = [row.get(name) for row in rows]
        values = [v for v in values if not (v is None or v == "" or v != v)]
        if len({class_name(v) for v in values}) < 2:
            continue
        if name in LOGARITHMIC or is_quantity(values):
            numbers = [n for v in values if (n := Condition(name)._number(v)) is not None]
            numbers = torch.tensor(numbers, dtype=torch.float64)
            if len(numbers) > 1 and numbers.std() > 0:
                learned.append(Condition(name, (), float(numbers.mean()), float(numbers.std())))
        else:
            learned.append(Condition(name, tuple(sorted({class_name(v) for v in values}))))
    return [*learned, Condition(LEVEL)]


def encode(conditions: Sequence[Condition], row: Mapping, unknown: Counter) -> list[float]:
    """What a recording's values are to a model, one number per condition; its level is null until a window gives it."""
    return [condition.encode(row.get(condition.name), unknown) for condition in conditions]


def parse(conditions: Sequence[Condition], words: Sequence[str]) -> dict[str, float]:
    """`name=value` words as codes by name. Raises Unusable for a name or value that the model doesn't know."""
    known, given = {c.name: c for c in conditions if c.name != LEVEL}, {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise Unusable(f"--given {word}: expected name=value, with one of: {', '.join(known) or 'nothing'}")
        code = known[name].encode(value if known[name].classes else number(value), Counter())
        if code != code:
            listed = " ".join(shlex.quote(f"{name}={c}") for c in known[name].classes) or f"{name}=NUMBER"
            columns = " (several columns are one value, joined with a blank)" * any(
                " " in c for c in known[name].classes
            )
            raise Unusable(f"--given {word}: the model doesn't know this value; there are{columns}: {listed}")
        given[name] = code
    return given


def dropped(code_BF: torch.Tensor, u_BF: torch.Tensor, share: float, keep_level: bool = True) -> torch.Tensor:
    """
    Codes with some null: each on its own in `share` of the windows, and all of a window in as many; `u_BF` (B, F + 1) is uniform.

    The level is never dropped on its own, because sampling always draws one, nor are rhythms, which may stand behind the F codes of conditions.
    """
    drop_BF = F.pad(u_BF[:, :-1] < share, (0, code_BF.shape[1] + 1 - u_BF.shape[1]))
    if keep_level:
        drop_BF[:, u_BF.shape[1] - 2] = False
    return code_BF.masked_fill(drop_BF | (u_BF[:, -1:] < share), math.nan)


class Conditioning(nn.Module):
    """Codes (B, F), NaN for null, to vectors (B, D): the sum of one vector per condition."""

    def __init__(self, conditions: Sequence[Condition], d: int):
        super().__init__()
        self.conditions = tuple(conditions)
        self.null_FD = nn.Parameter(0.02 * torch.randn(len(conditions), d))
        self.maps = nn.ModuleList(
            nn.Embedding(len(c.classes), d) if c.classes else nn.Linear(2 * len(WAVES), d, bias=False)
            for c in conditions
        )
        self.register_buffer("wave_W", torch.tensor(WAVES), persistent=False)

    def forward(self, code_BF: torch.Tensor) -> torch.Tensor:
        total_BD = 0.0
        for f, (condition, vector) in enumerate(zip(self.conditions, self.maps, strict=True)):
            code_B = code_BF[:, f]
            told_B1 = code_B.isfinite()[:, None]
            code_B = torch.where(told_B1[:, 0], code_B, 0.0)
            if condition.classes:
                own_BD = vector(code_B.long())
            else:
                angle_BW = code_B[:, None] * self.wave_W
                own_BD = vector(torch.cat([angle_BW.sin(), angle_BW.cos()], 1))
            total_BD = total_BD + torch.where(told_B1, own_BD, self.null_FD[f])
        return total_BD
