"""The live page: what it answers to whom, what it keeps, and that a real browser draws it and runs nothing else."""

import base64
import http.client
import json
import re
import shutil
import socket
import subprocess

import numpy as np
import pytest

from lib import page
from lib.errors import Unusable
from lib.page import ABSENT, Page

CHANNELS = ("Fz", "Cz", "<img src=x onerror=alert(1)>")
SNAPSHOT = {
    "streams": [
        {
            "name": "amp & <b>", "state": "INFERENCE", "connected": True, "pipeline_type": "riemann", "model_version": 2, "not_ready": None,
            "quality": {
                "Fz": {"rms_uV": 12.3, "flat": False, "clipped": False, "line": 0.02},
                "Cz": {"rms_uV": float("nan"), "flat": True, "clipped": False, "line": 0.9},
            },
        }
    ],
    "stats": {
        "uptime_s": 12.0, "budget": 0.031, "counts": {"predicted": 41, "shed": 0}, "skipped": {"gap": 2},
        "latency": {"total": {"count": 41, "p50_ms": 3.1, "p99_ms": 6.4, "max_ms": 7.0}},
    },
    "health": {"status": "ready", "ready": True, "problems": []},
}  # fmt: skip


@pytest.fixture
def live():
    one = Page()
    yield one
    one.close()


def fill(one: Page, rate_hz: float = 250.0, seconds: float = 8.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    x_TC = (50 + 20 * rng.standard_normal((round(seconds * rate_hz), 3))).astype(np.float32)
    for seq in range(0, len(x_TC), 10):
        if not 1500 <= seq < 1600:
            one.samples("amp & <b>", rate_hz, CHANNELS, seq, x_TC[seq : seq + 10])
    for i in range(30):
        skipped = i % 7 == 6
        one.prediction(
            "amp & <b>", 250 + 50 * i, "INFERENCE", None if skipped else i % 3, None if skipped else 0.4 + 0.01 * i, "gap" if skipped else None, 0.003 + 1e-4 * i,
            None if i < 29 else "left <i>",
        )  # fmt: skip
    one.update(SNAPSHOT)
    return x_TC


def ask(one: Page, path: str, method: str = "GET", **headers) -> tuple[int, dict, bytes]:
    link = http.client.HTTPConnection(*one.address, timeout=60)
    link.request(method, path, headers=headers)
    answer = link.getresponse()
    body = answer.read()
    link.close()
    return answer.status, dict(answer.getheaders()), body


def test_the_trace_is_the_signal_with_its_gap(live):
    x_TC = fill(live)
    status, _, body = ask(live, "/data")
    data = json.loads(body)
    assert status == 200 and data["stats"]["counts"]["predicted"] == 41 and data["health"]["status"] == "ready"
    (stream,) = data["streams"]
    trace = stream["trace"]
    drawn = np.frombuffer(base64.b64decode(trace["int16"]), "<i2").reshape(trace["points"], 3)
    first, step = trace["first_seq"], trace["step"]
    assert step == 2 and first + step * trace["points"] == len(x_TC) and stream["state"] == "INFERENCE"
    gap = slice((1500 - first) // step, (1600 - first) // step)
    assert (drawn[gap] == ABSENT).all() and (np.delete(drawn, np.r_[gap], 0) != ABSENT).all()
    mean_PC = x_TC[first:].reshape(-1, step, 3).mean(1)
    there = np.r_[: gap.start, gap.stop : len(drawn)]
    np.testing.assert_allclose(drawn[there] * page.UNIT, (mean_PC - np.median(mean_PC[there], 0))[there], atol=0.06)
    assert len(stream["said"]) == 30 and stream["said"][6][2] is None and stream["said"][6][4] == "gap"
    assert stream["quality"]["Cz"]["rms_uV"] is None  # NaN is no JSON


def test_memory_is_bounded_whatever_comes(live):
    x_TC = np.zeros((10, 2), np.float32)
    for i in range(100):
        live.samples(f"stream {i}", 250.0, ("a", "b"), 0, x_TC)
    assert list(live.streams) == [f"stream {i}" for i in range(100 - page.STREAMS, 100)]
    for i in range(2000):
        live.samples("stream 99", 250.0, ("a", "b"), 10 * i, x_TC)
        live.prediction("stream 99", i, "INFERENCE", 0, 0.5)
        live.prediction("nobody", i, "INFERENCE", 0, 0.5)
    trail = live.streams["stream 99"]
    assert 1250 <= sum(len(x) for _, x in trail.chunks) <= 1260 and len(trail.said) == page.PREDICTIONS
    live.samples("stream 99", 250.0, ("a", "b"), 0, x_TC)  # the producer counts anew
    assert len(trail.chunks) == 1
    for _ in range(1000):  # and again and again
        live.samples("stream 99", 250.0, ("a", "b"), 0, x_TC)
    assert len(live.streams["stream 99"].chunks) == 1
    live.samples("stream 99", 500.0, ("a",), 0, np.full((3, 1), [[3e38]], np.float32))
    live.samples("stream 99", 500.0, ("a",), 10**15, np.full((3, 1), [[np.inf]], np.float32))
    assert ask(live, "/data")[0] == 200


def test_only_this_address_is_answered(live):
    host, port = live.address
    for name in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port + 1}",
        f"localhost.evil:{port}",
        "",
    ):
        for path in ("/", "/data"):
            status, _, body = ask(live, path, Host=name)
            assert status == 421 and b"predicted" not in body
    for name in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert ask(live, "/", Host=name)[0] == 200
    assert ask(live, "/data", **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert ask(live, "/data", **{"Sec-Fetch-Site": "same-origin"})[0] == 200
    assert ask(live, "/../etc/passwd")[0] == 404 and ask(live, "/data", "POST")[0] == 501
    status, headers, body = ask(live, "/")
    assert status == 200 and headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"] and "Access-Control-Allow-Origin" not in headers
    assert not re.search(rb"(src|href)=\"(?!data:)|https?://|@import|url\(", body)  # nothing comes from anywhere else


def test_where_it_cannot_be_served_it_says_so(live):
    with pytest.raises(Unusable, match="no password"):
        Page("0.0.0.0", 0)
    with pytest.raises(Unusable, match="--page .*choose another port"):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            Page(*taken.getsockname())


def test_those_who_say_nothing_keep_nobody_out(live, monkeypatch):
    monkeypatch.setattr(page._Handler, "timeout", 0.3)
    silent = [socket.create_connection(live.address) for _ in range(40)]
    for link in silent:
        link.settimeout(60)
    assert all(link.recv(1) == b"" for link in silent)  # turned away at once, or after the timeout
    assert ask(live, "/data")[0] == 200


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("no browser: install chromium to open the page in one")
    return found


def test_a_real_browser_draws_it(live, tmp_path):
    fill(live)
    words = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--window-size=1300,860",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={tmp_path}", "--enable-logging=stderr",
    ]  # fmt: skip
    done = subprocess.run([*words, "--dump-dom", live.url], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert int(re.search(r'data-drawn="(\d+)"', done.stdout)[1]) >= 1
    for said in ("ready", "41 predicted", "skipped 2 gap", "p99 6.4 ms", "left &lt;i&gt;  0.69", "INFERENCE, riemann version 2", "amp &amp; &lt;b&gt;: 3 channels at 250 Hz", "class 0, class 1, left &lt;i&gt;; 4 skipped", "<td>Cz</td><td>–</td><td>90 %</td><td class=\"bad\">flat</td>"):  # fmt: skip
        assert said in done.stdout, said
    assert "<img" not in done.stdout and "onerror" not in done.stdout
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, complaints
