"""Traits as auxiliary targets: read from a cache, missing ones silent, learned where there is something to learn, kept with their meaning."""

import math

import numpy as np
import pytest
import torch

from lib.cache import Cache
from lib.errors import Unusable
from lib.traits import AuxiliaryHeads, Trait, known_labels, load_heads, read_traits, save_heads, trait_values
from tests import recipes

AGE = Trait("age", mean=40.0, std=10.0)
SEX = Trait("sex", ("F", "M"), (0.75, 1.5))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    """14 people: everybody has a site, every third no age, one is left-handed, one class of `group` is rare."""
    folder = tmp_path_factory.mktemp("traits")
    recipes.write_small(folder / "raw", subjects=14, seconds=4)
    lines = ["id,age,sex,site,hand,group,level"]
    for s in range(14):
        age = "" if s % 3 == 1 else 20 + 3 * s
        lines.append(f"s{s:02d},{age},{'FM'[s % 2]},here,{'L' if s == 3 else 'R'},{'ab'[s % 4 == 0]},{s % 3}")
    (folder / "raw" / "people.csv").write_text("\n".join(lines) + "\n")
    columns = ", ".join(f'{name} = "{name}"' for name in "age sex site hand group level".split())
    rule = recipes.RULE.replace('age = "age", sex = "sex"', columns) + "[split]\nval = ['00', '05', '10']\n"
    (folder / "raw" / "dataset.toml").write_text(rule)
    status, _, err = recipes.run("--source", folder / "raw", "--cache", folder / "cache", "--workers", 1)
    assert status == 0, err
    return Cache(folder / "cache")


@pytest.fixture(scope="module")
def rows(cache) -> list[int]:
    return [i for i, r in enumerate(cache.recordings) if r.split == "train"]


def test_traits_are_standardised_and_balanced_over_training_subjects(cache, rows):
    age, sex, level = read_traits(cache, ["age", "sex", "level"], rows)
    people = {cache.recordings[i].subject: (cache.column("age")[i], cache.column("sex")[i]) for i in rows}
    ages = [float(a) for a, _ in people.values() if a is not None]
    assert not age.classes and (age.mean, age.std) == pytest.approx((np.mean(ages), np.std(ages)))
    assert sex.classes == ("F", "M") and level.classes == ("0", "1", "2")
    count = [sum(s == c for _, s in people.values()) for c in "FM"]
    assert sex.weights == pytest.approx([sum(count) / 2 / n for n in count])
    values_RK = trait_values(cache, [age, sex, level])
    assert values_RK.shape == (len(cache.recordings), 3) and values_RK.dtype == torch.float32
    missing = [v is None for v in cache.column("age")]
    assert values_RK[:, 0].isnan().tolist() == missing and any(missing) and not values_RK[:, 1:].isnan().any()
    assert trait_values(cache, []).shape == (len(cache.recordings), 0)


def test_the_kind_can_be_said(cache, rows):
    level, age = read_traits(cache, ["level:regression", "age:regression"], rows)
    assert not level.classes and not age.classes
    (condition,) = read_traits(cache, ["condition"], rows)  # a recording's column, both values in every subject
    assert condition.classes == ("rest", "task") and condition.weights == (1.0, 1.0)


@pytest.mark.parametrize(
    "word, said",
    [
        ("colour", r"no such column in .*cache; there are: age, condition, group, hand"),
        ("site", "leave it out"),
        ("hand", "leave it out"),  # one left-handed person
        ("sex:regression", "sex:classification"),
        ("age:classification", "leave it out"),  # as many classes as people
        ("age:ordinal", ":regression or :classification"),
    ],
)
def test_what_can_not_be_learned_is_named(word, said, cache, rows):
    with pytest.raises(Unusable, match=said) as error:
        read_traits(cache, [word], rows)
    assert f"--aux {word.partition(':')[0]}" in str(error.value)
    with pytest.raises(Unusable, match="each column once"):
        read_traits(cache, ["sex", "sex"], rows)


def heads_and_data(windows: int = 12, d: int = 6) -> tuple[AuxiliaryHeads, torch.Tensor, torch.Tensor]:
    """Two heads, features, and labels of which some are missing."""
    torch.manual_seed(0)
    heads = AuxiliaryHeads(d, [AGE, SEX])
    values_BK = torch.stack([torch.randn(windows), torch.arange(windows) % 2.0], 1)
    values_BK[::3, 0] = math.nan
    values_BK[1::4, 1] = math.nan
    return heads, torch.randn(windows, d), values_BK


def test_missing_labels_contribute_neither_loss_nor_gradient():
    heads, z_BD, values_BK = heads_and_data()
    known_K = values_BK.isfinite().sum(0)
    for label in (math.nan, math.inf):
        z_BD.grad, other_BK = None, torch.where(values_BK.isnan(), label, values_BK)
        loss = heads.loss(z_BD.requires_grad_(), other_BK, known_K)
        loss.backward()
        assert loss.isfinite() and z_BD.grad.isfinite().all()
    nothing_known = values_BK.isnan().all(1)
    assert nothing_known.any() and not z_BD.grad[nothing_known].any() and z_BD.grad[~nothing_known].any(1).all()
    alone = heads.loss(z_BD[~nothing_known], values_BK[~nothing_known], known_K)
    assert alone.item() == pytest.approx(loss.item(), rel=1e-6)
    assert heads.loss(z_BD, values_BK * math.nan, 0 * known_K).item() == 0


def test_the_loss_is_its_formula():
    heads, z_BD, values_BK = heads_and_data()
    age_B1, sex_B2 = (t.detach().double() for t in heads(z_BD))
    known = ~values_BK.isnan()
    age = [0.5 * e**2 if e < 1 else e - 0.5 for e in (age_B1[:, 0] - values_BK[:, 0])[known[:, 0]].abs().tolist()]
    log_BC = sex_B2.log_softmax(1)
    sex = [-SEX.weights[int(y)] * float(log_BC[b, int(y)]) for b, y in enumerate(values_BK[:, 1]) if known[b, 1]]
    loss = heads.loss(z_BD, values_BK, known.sum(0))
    assert loss.item() == pytest.approx((np.mean(age) + np.mean(sex)) / 2, rel=1e-5)


def test_parts_of_a_batch_add_up_and_order_does_not_matter():
    heads, z_BD, values_BK = heads_and_data()
    known_K = values_BK.isfinite().sum(0)
    whole = float(heads.loss(z_BD, values_BK, known_K).detach())
    order = torch.randperm(12)
    parts = [order[:5], order[5:6], order[6:]]
    assert sum(float(heads.loss(z_BD[p], values_BK[p], known_K)) for p in parts) == pytest.approx(whole, rel=1e-5)
    assert float(AuxiliaryHeads(6, []).loss(z_BD, values_BK[:, :0], known_K[:0])) == 0


def test_counts_come_from_window_ids_alone(cache, rows):
    traits = read_traits(cache, ["age", "sex"], rows)
    values_RK, windows = trait_values(cache, traits), cache.windows("train", 1.0, 0.5)
    recording_B, _ = windows.locate(np.arange(0, len(windows), 3))
    ages = cache.column("age")
    assert known_labels(values_RK, recording_B).tolist() == [
        sum(ages[i] is not None for i in recording_B),
        len(recording_B),
    ]


def test_what_is_there_is_learned_and_kept_with_its_meaning(tmp_path):
    rng = torch.Generator().manual_seed(0)
    z_BD = torch.randn(300, 6, generator=rng)
    age_B, male_B = 40 + 10 * z_BD[:, 0], (z_BD[:, 1] > 0.4).float()
    values_BK = torch.stack([(age_B - AGE.mean) / AGE.std, male_B], 1)
    values_BK[torch.rand(300, 2, generator=rng) < 0.3] = math.nan
    heads = AuxiliaryHeads(6, [AGE, SEX])
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        heads.loss(z_BD[:200], values_BK[:200], values_BK[:200].isfinite().sum(0)).backward()
        optimizer.step()
    save_heads(tmp_path / "traits.safetensors", heads, {"encoder": "encoder.safetensors"})
    again, meta = load_heads(tmp_path / "traits.safetensors")
    assert again.traits == [AGE, SEX] and meta["encoder"] == "encoder.safetensors"
    said = again.predict(z_BD[200:])
    assert said == heads.predict(z_BD[200:])
    assert (
        np.corrcoef(said["age"], age_B[200:])[0, 1] > 0.98
        and np.abs(np.array(said["age"]) - age_B[200:].numpy()).max() < 5
    )
    assert np.mean([(s == "M") == bool(m) for s, m in zip(said["sex"], male_B[200:], strict=True)]) > 0.9


def test_no_heads_are_a_file_too(tmp_path):
    torch.save({}, tmp_path / "no.safetensors")
    with pytest.raises(Unusable, match="damaged"):
        load_heads(tmp_path / "no.safetensors")
