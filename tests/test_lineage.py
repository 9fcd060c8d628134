"""Evaluating on people or labels that an encoder was trained on is an error, over any number of phases, unless asked for."""

from types import SimpleNamespace

import pytest

from lib.cache import Cache
from lib.errors import Unusable
from lib.lineage import auxiliary_targets, check_leak, inherited, trained_on, waveform_factor
from lib.tensors import load_tensors, save_tensors
from tests import recipes


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    folder = tmp_path_factory.mktemp("lineage")
    recipes.write_small(folder / "raw", subjects=12, seconds=4)
    assert recipes.run("--source", folder / "raw", "--cache", folder / "cache", "--workers", 1)[0] == 0
    return Cache(folder / "cache")


@pytest.fixture(scope="module")
def people(cache) -> SimpleNamespace:
    """Rows and subjects by split."""
    rows = {s: [i for i, r in enumerate(cache.recordings) if r.split == s] for s in ("train", "val")}
    assert rows["train"] and rows["val"]
    return SimpleNamespace(rows=rows, subjects={s: [cache.recordings[i].subject for i in rows[s]] for s in rows})


def pretrained(cache, people, path, auxiliary=(), lineage=()) -> list[dict]:
    """The lineage that follows from an encoder file of one more phase on the training split, by way of the disk."""
    meta = {"run": path.stem, "step": 9, "lineage": list(lineage)} | trained_on(cache, people.rows["train"], auxiliary)
    save_tensors(path, {}, meta)
    return inherited(load_tensors(path)[1], path)


def test_held_out_people_and_labels_are_no_leak(cache, people, tmp_path):
    lineage = pretrained(cache, people, tmp_path / "a.safetensors", ["sex"])
    assert check_leak(lineage, people.subjects["val"], ["age", "condition"]) == []
    assert check_leak([], people.subjects["train"], ["sex"]) == []


def test_an_auxiliary_target_is_a_leak(cache, people, tmp_path):
    lineage = pretrained(cache, people, tmp_path / "a.safetensors", ["age:regression", "sex"])
    assert auxiliary_targets(lineage) == ["age", "sex"]
    with pytest.raises(Unusable, match=r"^age was an auxiliary target of .*a\.safetensors: .*--allow-leak"):
        check_leak(lineage, people.subjects["val"], ["Age", "condition"])
    allowed = check_leak(lineage, people.subjects["val"], ["age", "sex"], allow=True)
    assert len(allowed) == 1 and allowed[0].startswith("age, sex were auxiliary targets")


def test_a_pretrained_subject_is_a_leak(cache, people, tmp_path):
    lineage = pretrained(cache, people, tmp_path / "a.safetensors")
    one = people.subjects["train"][0]
    with pytest.raises(Unusable, match=r"trained on 1 of the \d+ subjects .*--allow-leak"):
        check_leak(lineage, [*people.subjects["val"], one], ["age"])
    assert len(check_leak(lineage, people.subjects["train"], ["age"], allow=True)) == 1


def test_leaks_are_remembered_over_phases(cache, people, tmp_path):
    first = pretrained(cache, people, tmp_path / "first.safetensors", ["age"])
    second = pretrained(cache, people, tmp_path / "second.safetensors", lineage=first)
    assert [phase["run"] for phase in second] == ["first", "second"] and auxiliary_targets(second) == ["age"]
    with pytest.raises(Unusable, match=r"age was .*first\.safetensors"):
        check_leak(second, people.subjects["val"], ["age"])
    assert len(check_leak(second, people.subjects["train"], [], allow=True)) == 2


def test_a_file_names_nobody_and_one_that_says_nothing_is_refused(cache, people, tmp_path):
    lineage = pretrained(cache, people, tmp_path / "a.safetensors")
    stored = (tmp_path / "a.safetensors").read_bytes()
    assert not any(subject.encode() in stored for subject in people.subjects["train"])
    silent = [{k: v for k, v in lineage[0].items() if k != "subjects"}]
    with pytest.raises(Unusable, match="doesn't say"):
        check_leak(silent, people.subjects["val"], ["age"])
    assert check_leak(silent, people.subjects["val"], ["age"], allow=True)


def test_phases_make_up_what_earlier_ones_left_of_the_waveform():
    five, none = [{"file": "x", "waveform": 5.0}, {"file": "y"}], [{"file": "x", "waveform": 0.0}]
    assert waveform_factor(None, True, []) == 5 and waveform_factor(None, False, []) == 1
    assert waveform_factor(None, True, five) == 1 and waveform_factor(2.0, True, five) == 2
    assert waveform_factor(None, True, none) == 1  # there is nothing left to make louder
