"""lib/conditions.py: what is known becomes numbers, what isn't becomes null and is counted."""

import math
from collections import Counter

import pytest
import torch

from lib import conditions
from lib.errors import Unusable

ROWS = [
    {"dataset": d, "label": label, "rate": rate, "speed": rpm, "age": age}
    for d, label, rate, rpm, age in [
        ("a", "ball", 100.0, 1797, 20), ("a", "inner", 100.0, 1772, 31), ("b", "ball", 12e3, 1750, 44),
        ("b", None, 12e3, 1730, 52), ("b", "outer", 12e3, None, 57), ("b", "outer", 12e3, 1700, 63),
    ]
]  # fmt: skip
NAMES = ("dataset", "label", "rate", "speed", "age", "site")


def test_classes_and_numbers_are_told_apart_and_what_nobody_has_is_left_out():
    learned = conditions.learn(ROWS, NAMES)
    assert [c.name for c in learned] == ["dataset", "label", "rate", "speed", "age", "level"]
    kinds = {c.name: c.classes for c in learned}
    assert kinds["dataset"] == ("a", "b") and kinds["label"] == ("ball", "inner", "outer")
    assert kinds["rate"] == kinds["speed"] == kinds["age"] == ()
    assert abs(learned[2].mean - (2 * math.log(100) + 4 * math.log(12e3)) / 6) < 1e-9


def test_missing_and_unknown_values_are_null_and_only_unknown_ones_are_counted():
    learned, unknown = conditions.learn(ROWS, NAMES), Counter()
    codes = torch.tensor([conditions.encode(learned, row, unknown) for row in ROWS])
    assert not unknown and codes[:, 0].tolist() == [0, 0, 1, 1, 1, 1]
    assert codes[3, 1].isnan() and codes[4, 3].isnan() and codes[:, 5].isnan().all()
    assert abs(float(codes[:, 4].mean())) < 1e-6
    new = conditions.encode(learned, {"dataset": "c", "label": "cage", "speed": "fast", "rate": 100}, unknown)
    assert math.isnan(new[0]) and math.isnan(new[1]) and math.isnan(new[3]) and not math.isnan(new[2])
    assert unknown == {"dataset=c": 1, "label=cage": 1, "speed=fast": 1}


def test_conditions_are_dropped_per_window_alone_and_together():
    code_BF, u_BF = torch.ones(20_000, 4), torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0))
    null_BF = conditions.dropped(code_BF, u_BF, 0.1).isnan()
    all_B = null_BF.all(1)
    assert abs(float(all_B.float().mean()) - 0.1) < 0.01
    alone = null_BF[~all_B].float().mean(0)
    assert ((alone[:3] - 0.1).abs() < 0.01).all() and alone[3] == 0  # the level only goes with the others
    assert code_BF.isfinite().all()
    assert not conditions.dropped(code_BF, u_BF, 0.0).isnan().any()


def test_vectors_are_finite_differ_and_null_has_its_own():
    torch.manual_seed(0)
    learned = conditions.learn(ROWS, NAMES)
    net = conditions.Conditioning(learned, 16)
    codes = torch.tensor([conditions.encode(learned, row, Counter()) for row in ROWS])
    vectors = net(codes)
    assert vectors.shape == (6, 16) and vectors.isfinite().all() and len(torch.unique(vectors, dim=0)) == 6
    vectors.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    null, zero = net(torch.full((1, 6), math.nan)), net(torch.zeros(1, 6))
    assert torch.allclose(null, net.null_FD.sum(0, keepdim=True)) and not torch.allclose(null, zero)


def test_words_of_the_command_line():
    learned = conditions.learn(ROWS, NAMES)
    given = conditions.parse(learned, ("label=outer", "speed=1750"))
    assert (
        given["label"] == 2 and abs(given["speed"] - conditions.encode(learned, {"speed": 1750}, Counter())[3]) < 1e-9
    )
    for words, match in (
        (("label=cage",), "there are: label=ball label=inner label=outer"),
        (("colour=red",), "one of"),
        (("label",), "name=value"),
        (("speed=slow",), "speed=NUMBER"),
    ):
        with pytest.raises(Unusable, match=match):
            conditions.parse(learned, words)
    joint = [conditions.Condition("label", ("ball 7", "outer race, 3 o'clock 7"))]
    with pytest.raises(Unusable, match="joined with a blank.*'label=ball 7' 'label=outer race, 3"):
        conditions.parse(joint, ("label=ball_7",))
