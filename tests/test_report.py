"""The report: one page that needs nothing else, whatever was told; opened in a real browser where there is one."""

import base64
from html.parser import HTMLParser

import numpy as np
import pytest

from lib import report
from lib.channels import TEN_TWENTY
from lib.judgement import Timeline, Units
from lib.targets import Target
from tests import recipes

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """What a page holds; fails on tags that don't match."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.links, self.text = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.images += [attrs["src"]] if tag == "img" else []
        self.links += [attrs[name] for name in ("href", "src") if name in attrs and tag != "img"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write(path):
    rng = np.random.default_rng(0)
    subject_N = np.repeat([f"set/{i}" for i in range(4)], 5)
    number = Units(rng.standard_normal(20), rng.standard_normal((20, 1)), subject_N, np.arange(20))
    classes = Units(np.arange(20) % 3, rng.dirichlet(np.ones(3), 20), subject_N, np.arange(20))
    age, task = Target("age", unit="years"), Target("task", ("rest", "<b>", "c"), (1.0, 1.0, 1.0))
    lines = [Timeline(i, rng.uniform(size=240), np.array([[10.0, 20.0]])[: i % 2], 60.0) for i in range(15)]
    table = [
        {"target": "age", "model": m, "metric": k, "value": v, "low": v - 1, "high": v + 1}
        for m in ("model", "constant")
        for k, v in (("nrmse", 0.9), ("r2", float("nan")))
    ]
    log = [{"step": i, "loss": 1 / (i + 1), "val_loss": 1.0, "lr": 0.1, "grad_norm": 1.0} for i in range(5)]
    sections = [
        ("Scores", report.score_tables(table)),
        ("Said", report.truth_against_said(age, number) + report.truth_against_said(task, classes)),
        ("By subject", report.by_subject(age, number) + report.by_subject(task, classes)),
        (
            "Where",
            report.head({n: float(i) for i, n in enumerate(TEN_TWENTY)}, "head") + report.bars({"alpha": 1.0}, "bands"),
        ),
        ("Seizures", report.seizure_timeline(lines, [np.array([[12.0, 18.0]])] * 15, ["a & b"] * 15, 0.5)),
        ("Curves", report.curves(log) + report.curves([])),
        ("Nothing", ""),
        ("Command", report.verbatim("python x.py --target <a> && echo")),
    ]
    report.write(path, "age & task", sections)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write(path)
    return path


def test_the_page_is_whole_and_needs_no_network(page):
    found = Page(page.read_text())
    assert not found.links and len(found.images) == 6
    for image in found.images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    text = " ".join(found.text)
    for words in (
        "age & task",
        "0.900 (-0.1 – 1.9)",
        "–",
        "python x.py --target <a> && echo",
        "3 recordings are not shown",
        "set/3",
    ):
        assert words in text, words
    assert "Nothing was trained" in text and "http" not in page.read_text().replace("base64", "")[:2000]


def test_a_real_browser_shows_it(page, tmp_path):
    shown = recipes.in_browser(page, tmp_path)
    assert "<h2>Scores</h2>" in shown and shown.count("<img") == 6
