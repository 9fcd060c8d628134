"""The page about a flow is whole, needs no network, and says when a flow fails; a real browser shows it. From caches and from arrays."""

import numpy as np
import pytest

import build_cache
from lib import quality_report, surrogates
from lib.corpus import Corpus
from lib.lineage import digest
from tests import recipes
from tests.test_quality import L, machine
from tests.test_report import Page

RULE = """name = "machine"
kind = "vibration"
pattern = '(?P<subject>(?P<fault>[ab])(?P<number>\\d))\\.npy'
rate_hz = 1000
unit = "g"
[split]
val = ["a2", "b3", "a4"]
test = ["b5"]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache of eight recordings of two faults, and surrogates of their windows as the generated ones."""
    folder = tmp_path_factory.mktemp("machine")
    x_NCL, _, block_N = machine(8, 80)
    for r in range(8):
        np.save(folder / f"{'ab'[r % 2]}{r}.npy", x_NCL[block_N == r].ravel().astype(np.float32))
    (folder / "dataset.toml").write_text(RULE)
    build_cache.build(build_cache.Config(source=(folder,), cache=folder / "cache", workers=1))
    fake_NCL = surrogates.phase_randomised(x_NCL[::4], np.random.default_rng(0))
    fake = quality_report.Windows(fake_NCL, block_N[::4], np.array(["ab"[r % 2] for r in block_N[::4]]))
    return folder / "cache", fake


def judge(world, by_time: bool, columns: tuple[str, ...], open_test: bool = False):
    corpus = Corpus([world[0]], L, 0, L, by_time, 0.6)
    names = corpus.recordings[0].names
    return quality_report.judge_windows(corpus, world[1], names, columns, 0, open_test, network=False, legacy=False)


def test_the_test_split_is_read_only_when_asked(world, monkeypatch):
    read, parts = quality_report.read_windows, []
    monkeypatch.setattr(
        quality_report, "read_windows", lambda c, part, *more: parts.append(part) or read(c, part, *more)
    )
    _, figures = judge(world, False, ())
    assert set(parts) == {"train", "val"}
    _, both = judge(world, False, (), open_test=True)
    assert "test" in parts and set(figures["block_ids"]) < set(both["block_ids"])


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    rows, figures = judge(world, True, ("fault",))
    assert rows["class_accuracy"]["floor_iid"] > 0.9 and abs(rows["envelope_db"]["skill"]) < 0.5
    assert set(figures["labels_real"]) == {"a", "b"} and figures["unit"] == "g"
    anomalies = {"5-NN": dict.fromkeys(("auroc", "low", "high", "gain", "gain_low", "gain_high", "error"), 0.5)}
    log = [{"step": i, "loss": 2 / (i + 1), "val_loss": 1.0, "lr": 0.1, "grad_norm": 1.0} for i in range(4)]
    path = tmp_path_factory.mktemp("page") / "report.html"
    words = {"command": "python train_flow.py --cache <c> && echo", "anomaly": anomalies, "log": log}
    quality_report.write(path, "a & flow", rows, **figures, sweep={1: rows, 16: rows}, **words)
    return path


def test_the_page_is_whole(page):
    found = Page(page.read_text())
    assert not found.links and len(found.images) == 5
    text = " ".join(found.text)
    for words in ("a & flow", "copies of training windows", "coverage", "block floor", "memorisation", "5-NN"):
        assert words in text, words
    assert "python train_flow.py --cache <c> && echo" in text


def test_a_real_browser_shows_it(page, tmp_path):
    shown = recipes.in_browser(page, tmp_path)
    assert "<h2>Verdict</h2>" in shown and shown.count("<img") == 5


def test_new_recordings_are_their_own_floor(world):
    rows, _ = judge(world, False, ())
    assert "floor_block" in rows["log_psd_db"] and "class_accuracy" not in rows


def test_labels_are_those_that_model_files_have(world):
    corpus = Corpus([world[0]], L, 0, L, True, 0.6)
    names = corpus.recordings[0].names
    own = quality_report.read_windows(corpus, "val", names, ("fault", "subject"), 100, 0)
    faults, hashes = zip(*(label.split() for label in own.label_N), strict=True)
    assert set(faults) == {"a", "b"} and len(set(hashes)) == len(np.unique(own.block_N)) == 8
    assert set(hashes) == {digest(str(r.subject)) for r in corpus.recordings}
    assert set(quality_report.read_windows(corpus, "val", names, ("fault", "age"), 100, 0).label_N) == {""}
