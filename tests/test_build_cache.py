"""The builder from the command line: what comes out, what survives, what is refused."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mne
import numpy as np
import pytest
import scipy.io

import build_cache
from lib import filters, recordings, store
from lib.cache import Cache
from lib.channels import canonical
from lib.edf import write_edf
from lib.errors import Unusable
from tests.recipes import NAMES, ROOT, contents, kill, noise_uv, run, start, write_small
from tests.test_recordings import write_brainvision


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small data set, its cache and what the build said."""
    root = tmp_path_factory.mktemp("small")
    write_small(root / "raw")
    code, result, stderr = run("--source", root / "raw", "--cache", root / "cache", "--workers", 2)
    assert code == 0, stderr
    return root / "raw", root / "cache", result


def test_summary(small):
    _, cache, result = small
    assert {k: result[k] for k in ("recordings", "subjects", "quarantined", "built", "reused")} == {
        "recordings": 8,
        "subjects": 4,
        "quarantined": 0,
        "built": 8,
        "reused": 0,
    }
    assert result["hours"] == pytest.approx(8 * 16 / 3600, abs=1e-3) and result["seconds"] > 0
    assert result["windows"] == {"full": 0, "partial": 0, "none": 8 * 7}
    assert set(result["splits"]) == {"train", "val", "test"} and all(s["subjects"] for s in result["splits"].values())


def test_microvolts_labels_and_order(small):
    mne = pytest.importorskip("mne")
    raw_folder, path, _ = small
    cache = Cache(path)
    row = [r.key for r in cache.recordings].index("small/s02_task.edf")
    recording = cache.recordings[row]
    assert recording.names == ("Fp1", "Fp2", "F3", "C3", "C4", "P3", "O1", "O2")  # canonical order, whatever the file's
    assert recording.subject == "small/02" and recording.columns["condition"] == "task"
    assert cache.column("age")[row] == 26 and cache.column("sex")[row] == "F"
    assert [(e.onset_s, e.duration_s, e.label) for e in cache.events(row)] == [(2.0, 3.0, "look"), (7.5, 0.0, "press")]

    raw = mne.io.read_raw_edf(raw_folder / "s02_task.edf", preload=True, verbose="ERROR")
    raw.filter(0.5, 45, verbose="ERROR").resample(100, verbose="ERROR").set_eeg_reference("average", verbose="ERROR")
    expected = raw.get_data()[[NAMES.index(n) for n in [f"EEG {c.upper()}-REF" for c in recording.names]]] * 1e6
    batch = cache.read([row], [0], recording.samples, unit="uV")
    error = batch.x_BCT[0].numpy() - expected
    assert error.std() < 2e-3 * expected.std(), error.std() / expected.std()  # 0.1 % of the filter and float16's 0.05 %
    assert batch.mask_BC.all() and not batch.positions_BC3.isnan().any()

    scaled = cache.read([row], [0], recording.samples).x_BCT[0].numpy()
    low, high = np.percentile(scaled, (25, 75), axis=1)
    assert np.allclose(high - low, 1.349, atol=0.01) and np.allclose(np.median(scaled, axis=1), 0, atol=0.01)


def test_same_bytes_with_any_number_of_workers_and_a_rebuild_does_nothing(small, tmp_path):
    raw, cache, _ = small
    moved = tmp_path / "raw"
    shutil.copytree(raw, moved)  # copy2 keeps modification times
    code, _, stderr = run("--source", moved, "--cache", tmp_path / "cache", "--workers", 1)
    assert code == 0, stderr
    ours, theirs = contents(tmp_path / "cache"), contents(cache)
    differing = [n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]
    assert set(differing) <= {"build.json", "manifest.json"}, differing  # these name the other source folder
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.suffix != ".lock"}
    code, again, _ = run("--source", raw, "--cache", cache)
    assert code == 0 and again["built"] == 0 and again["reused"] == 8
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.suffix != ".lock"} == before


def test_moved_cache_and_copies_without_times(small, tmp_path):
    raw, cache, _ = small
    shutil.copytree(raw, tmp_path / "raw", copy_function=shutil.copyfile)
    shutil.copytree(cache, tmp_path / "elsewhere")
    assert len(Cache(tmp_path / "elsewhere").recordings) == 8
    code, result, _ = run("--source", tmp_path / "raw", "--cache", tmp_path / "elsewhere")
    assert code == 0 and result["recordings"] == 8  # touched, not changed: no signal is computed again
    shards = {n: b for n, b in contents(cache).items() if "shards" in n}
    assert {n: b for n, b in contents(tmp_path / "elsewhere").items() if "shards" in n} == shards


def test_status_lists_what_can_be_a_target(small):
    code, result, _ = run("--action", "status", "--cache", small[1])
    opened = Cache(small[1])
    assert code == 0 and result["complete"] and {"age", "sex"} <= set(result["columns"]) == set(opened.columns())
    assert result["event_labels"] == opened.labels() and result["event_labels"]


def test_only_what_changed_is_rebuilt(small, tmp_path):
    raw, cache = tmp_path / "raw", tmp_path / "cache"
    shutil.copytree(small[0], raw)
    shutil.copytree(small[1], cache)
    shards = {p.name: p.stat().st_mtime_ns for p in cache.rglob("*.npy")}
    # a label: no signal is touched
    (raw / "people.csv").write_text((raw / "people.csv").read_text().replace("s01,23,M", "s01,77,M"))
    code, result, _ = run("--source", raw, "--cache", cache)
    assert code == 0 and result["built"] == 0
    assert {p.name: p.stat().st_mtime_ns for p in cache.rglob("shards/*.npy")} == {
        n: t for n, t in shards.items() if n not in ("events.npy", "scales.npy")
    }
    assert 77 in Cache(cache).column("age")
    # one signal, same size, one sample other: only that one
    write_edf(
        raw / "s01_task.edf", noise_uv(np.random.default_rng(9), len(NAMES), 16 * 200), 200, NAMES, [(1.0, 0.0, "new")]
    )
    code, result, _ = run("--source", raw, "--cache", cache)
    assert code == 0 and result["built"] == 1 and result["reused"] == 7
    # an option: another directory; going back costs nothing; gc then leaves one
    code, result, _ = run("--source", raw, "--cache", cache, "--band-hz", 1, 30)
    assert code == 0 and result["built"] == 8 and Cache(cache).signal["band_hz"] == [1.0, 30.0]
    code, result, _ = run("--source", raw, "--cache", cache)
    assert code == 0 and result["built"] == 0 and Cache(cache).signal["band_hz"] == [0.5, 45.0]
    code, result, _ = run("--action", "gc", "--cache", cache)
    assert code == 0 and result["deleted"] == 8 * 2 + 1  # eight of the other band, and the replaced shard
    assert run("--action", "verify", "--cache", cache)[0] == 0
    # a source that went
    (raw / "s03_rest.edf").unlink()
    code, result, stderr = run("--source", raw, "--cache", cache)
    assert code == 0 and result["recordings"] == 7 and "not among these sources" in stderr


def _interrupt_until_done(command, cache, kills: int, seed: int, longest_s: float):
    """Run a build and kill it at random moments, then let it finish; every interrupted state must be refused."""
    rng = random.Random(seed)
    done = 0
    while done < kills:
        process = start(*command)
        time.sleep(rng.uniform(0.3, longest_s))
        if process.poll() is not None:  # it finished first: take the cache away and go on
            shutil.rmtree(cache)
            continue
        kill(process)
        done += 1
        if cache.exists() and not (cache / "manifest.json").exists():
            with pytest.raises(Unusable, match=r"(resume it: python build_cache.py|no cache at)"):
                Cache(cache)
    code, result, stderr = run(*command)
    assert code == 0, stderr
    return result


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_sigkills_at_random_moments_then_the_same_bytes(tmp_path, kills):
    raw = write_small(tmp_path / "raw", subjects=12, seconds=60)
    command = ("--source", raw, "--cache", tmp_path / "cache", "--workers", 2)
    started = time.monotonic()
    assert run(*command)[0] == 0
    whole_s = time.monotonic() - started
    expected = contents(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    result = _interrupt_until_done(command, tmp_path / "cache", kills=kills, seed=kills, longest_s=0.9 * whole_s)
    assert result["recordings"] == 24
    assert contents(tmp_path / "cache") == expected


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv[0] = {script!r}
import runpy
sys.path.insert(0, {root!r})
runpy.run_path({script!r}, run_name="__main__")
"""


def _full_disk_build(tmp_path, raw):
    """Build on a file system that is too small; returns (exit status, stderr, cache). A tmpfs where we may mount, else a file size quota."""
    cache = tmp_path / "tiny" / "cache"
    cache.parent.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(cache.parent)], capture_output=True
        ).returncode
    )
    if mounted:
        return (*run("--source", raw, "--cache", cache)[::2], cache, True)
    program = FULL_DISK.format(limit=20_000, script=str(ROOT / "build_cache.py"), root=str(ROOT))
    words = [sys.executable, "-c", program, "--source", str(raw), "--cache", str(cache)]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode, done.stderr, cache, False


def test_a_full_disk_leaves_a_resumable_state(tmp_path):
    raw = write_small(tmp_path / "raw", subjects=6)
    code, _, _ = run("--source", raw, "--cache", tmp_path / "cache")
    assert code == 0
    code, stderr, cache, mounted = _full_disk_build(tmp_path, raw)
    try:
        assert code == 1 and "free some space" in stderr and "Traceback" not in stderr, stderr
        assert not (cache / "manifest.json").exists() and not list(cache.rglob("*.tmp"))
        with pytest.raises(Unusable, match="resume it"):
            Cache(cache)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(cache.parent)], check=True)
        code, result, stderr = run("--source", raw, "--cache", cache)
        assert code == 0, stderr
        ours, whole = contents(cache), contents(tmp_path / "cache")
        differing = [n for n in ours.keys() | whole.keys() if ours.get(n) != whole.get(n)]
        assert set(differing) <= {"build.json", "manifest.json"}  # they name another cache directory
    finally:
        if mounted:
            subprocess.run(["umount", str(cache.parent)], check=True)


DAMAGE = {
    "delete": lambda path: path.unlink(),
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flip": lambda path: _flip(path),
}


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["manifest.json", *store.TABLES, "shards/*.npy", "parts/*.json"])
def test_verify_names_the_damaged_file(small, tmp_path, damage, kind):
    import build_cache

    cache = tmp_path / "cache"
    shutil.copytree(small[1], cache)
    path = sorted(cache.rglob(kind))[0]
    DAMAGE[damage](path)
    with pytest.raises(Unusable) as refusal:
        build_cache.main(build_cache.Config(action="verify", cache=cache))
    assert path.name in str(refusal.value), refusal.value
    assert "build_cache.py" in str(refusal.value)  # the command that mends it
    if kind in ("manifest.json", "index.json", "labels.json", "scales.npy") or (
        kind == "shards/*.npy" and damage != "flip"
    ):
        with pytest.raises(
            Unusable, match=path.name
        ):  # the pre-flight check of training reads metadata only, and sees these
            Cache(cache)


def test_what_verify_suggests_mends_it(small, tmp_path):
    raw, cache = small[0], tmp_path / "my cache"
    shutil.copytree(small[1], cache)
    expected = contents(cache)
    shard, part = sorted(cache.rglob("shards/*.npy"))[0], sorted(cache.rglob("parts/*.json"))[3]
    DAMAGE["flip"](shard)
    DAMAGE["truncate"](part)
    DAMAGE["flip"](cache / "index.json")
    code, _, stderr = run("--action", "verify", "--cache", cache)
    assert code == 2
    damaged = [Path(word) for word in shlex.split(stderr.split("mend: rm -f ")[1].split(" && ")[0])]
    assert damaged == [cache / "index.json"]  # without it nobody knows what else should be there
    damaged[0].write_bytes(expected["index.json"])
    code, _, stderr = run("--action", "verify", "--cache", cache)
    damaged = [Path(word) for word in shlex.split(stderr.split("mend: rm -f ")[1].split(" && ")[0])]
    assert code == 2 and damaged == [shard, part]
    for path in damaged:
        path.unlink()
    code, result, _ = run("--source", raw, "--cache", cache)
    assert code == 0 and result["built"] == 2
    ours = contents(cache)
    assert {n: b for n, b in ours.items() if n not in ("build.json", "manifest.json")} == {
        n: b for n, b in expected.items() if n not in ("build.json", "manifest.json")
    }


def test_two_builders_do_not_meet(tmp_path):
    raw = write_small(tmp_path / "raw", subjects=10, seconds=60)
    first = start("--source", raw, "--cache", tmp_path / "cache")
    lock = tmp_path / "cache" / "build.lock"
    while not (lock.exists() and lock.read_text()):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # or it may have ended before the second has begun
    code, _, stderr = run("--source", raw, "--cache", tmp_path / "cache")
    first.send_signal(signal.SIGCONT)
    assert code == 2 and f"process {first.pid}" in stderr
    assert first.wait(timeout=120) == 0
    assert run("--action", "verify", "--cache", tmp_path / "cache")[0] == 0


def test_shares_and_torchrun_end_in_the_same_bytes(small, tmp_path):
    raw, cache, _ = small
    expected = contents(cache)
    shared = tmp_path / "cache"
    for share in ("1/2", "2/2"):
        code, result, stderr = run("--source", raw, "--cache", shared, "--share", share)
        assert code == 0 and result["share"] == share, stderr
        assert not (shared / "manifest.json").exists()
    code, result, _ = run("--source", raw, "--cache", shared)
    assert code == 0 and result["built"] == 0 and result["reused"] == 8
    launched = tmp_path / "launched"
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "build_cache.py"),
    ]
    done = subprocess.run([*words, "--source", str(raw), "--cache", str(launched)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["recordings"] == 8
    for path in (shared, launched):
        ours = contents(path)
        differing = [n for n in ours.keys() | expected.keys() if ours.get(n) != expected.get(n)]
        assert set(differing) <= {"build.json", "manifest.json"}, differing


def test_nothing_to_cache_is_an_error(tmp_path):
    (tmp_path / "raw").mkdir()
    code, result, stderr = run("--source", tmp_path / "raw", "--cache", tmp_path / "cache")
    assert code == 2 and result is None and stderr.strip().splitlines()[-1].startswith("build_cache.py:")
    (tmp_path / "raw" / "x.edf").write_bytes(b"")
    code, result, stderr = run("--source", tmp_path / "raw", "--cache", tmp_path / "cache")
    assert code == 2 and "nothing could be cached (1 empty)" in stderr
    assert not (tmp_path / "cache" / "manifest.json").exists()
    code, _, stderr = run("--source", tmp_path / "nowhere", "--cache", tmp_path / "cache")
    assert code == 2 and "nowhere" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    "flags, word",
    [
        (("--band-hz", 40, 10), "--band-hz"),
        (("--rate-hz", 60), "--band-hz"),
        (("--rate-hz", -1, "--band-hz", "none"), "--rate-hz"),
        (("--rate-hz", "inf"), "--rate-hz"),
        (("--band-hz", 0, 45), "--band-hz"),
        (("--notch-hz", 50, -50), "--notch-hz"),
        (("--notch-hz", "nan"), "--notch-hz"),
        (("--min-seconds", "nan"), "--min-seconds"),
        (("--timeout-s", 0), "--timeout-s"),
        (("--workers", -3), "--workers"),
        (("--source-rate-hz", -5), "--source-rate-hz"),
        (("--share", "3/2"), "--share"),
        (("--channels", "nonsense,,"), "missing_channel"),
        (("--missing", "mask"), "--missing"),
        (("--channels", "Fp1,fp1"), "--channels Fp1,fp1 names one electrode twice: Fp1 and fp1"),
        (("--channels", "T3,Cz,T7"), "T3 and T7"),
        (("--reference", "A1,M1"), "--reference"),
        (("--no-such-flag",), "no-such-flag"),
        (("--reference", "Fz"), "missing_reference"),
    ],
)
def test_bad_flags_are_named(small, tmp_path, flags, word):
    code, _, stderr = run("--source", small[0], "--cache", tmp_path / "cache", *flags)
    assert code == 2 and word in stderr.splitlines()[-1] and "Traceback" not in stderr


def test_strict_makes_a_bad_file_fatal_but_keeps_the_rest(small, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(small[0], raw)
    (raw / "s09_rest.edf").write_bytes(b"<html>404</html>" * 40)
    code, _, stderr = run("--source", raw, "--cache", tmp_path / "cache", "--strict")
    assert code == 1 and "--strict" in stderr
    code, result, _ = run("--source", raw, "--cache", tmp_path / "cache")
    assert code == 3 and result["quarantined_by_code"] == {"not_edf": 1} and result["reused"] == 8
    assert json.loads((tmp_path / "cache" / "quarantine.json").read_bytes())[0]["key"] == "small/s09_rest.edf"


def test_anonymised_cache_names_nobody(tmp_path):
    raw = tmp_path / "raw"
    write_small(raw, subjects=3)
    for path in raw.glob("s*.edf"):
        path.rename(raw / path.name.replace("s0", "s4711"))
    (raw / "people.csv").write_text(
        "id,age,sex,group,remark\ns47110,93,F,a,Mrs Jones\ns47111,40,M,a,\ns47112,50,F,b,\n"
    )
    x_CT = noise_uv(np.random.default_rng(3), len(NAMES), 16 * 200)
    write_edf(
        raw / "s47110_rest.edf",
        x_CT,
        200,
        NAMES,
        [(2.0, 3.0, "look"), (4.0, 0.0, "Mrs Jones coughs")],
        patient="Jones F 1930",
    )
    (raw / "s47119_rest.edf").write_bytes(b"")
    header = write_brainvision(raw, x_CT[:6], stem="s47110_more", markers=[("Stimulus", "look", 201, 1)])
    header.write_text(header.read_text("utf-8").replace("=s47110_more.eeg", "=Jones_Mary.eeg"), "utf-8")
    rule = (raw / "dataset.toml").read_text().replace('sex = "sex"', 'sex = "sex", group = "group", remark = "remark"')
    (raw / "dataset.toml").write_text(rule.replace(r"\.edf", r"\.(edf|vhdr)"))
    cache = tmp_path / "cache"
    code, result, stderr = run("--source", raw, "--cache", cache, "--anonymise")
    assert code == 3 and result["recordings"] == 7 and result["notes"]["file of another name"] == 1, stderr
    for name, data in contents(cache).items():
        if name == "build.json":  # the folder of the source, which the user chose
            continue
        assert b"4711" not in name.encode() + data and b"Jones" not in data, name
    opened = Cache(cache)
    assert sorted(set(opened.column("age"))) == [40, 50, 90] and "look" in opened.labels()
    assert set(opened.column("sex")) == {"F", "M"} and set(opened.column("group")) == {"a", None}
    assert (tmp_path / "cache.key").stat().st_mode & 0o777 == 0o600
    assert contents(cache) == (run("--source", raw, "--cache", cache, "--anonymise") and contents(cache))


def test_numbers_that_are_given_to_people_are_anonymised_too(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    people = ["id\tnumber\tborn\tiq\tgroup\tthreshold"]
    for i in range(5):
        x_CT = noise_uv(np.random.default_rng(i), 3, 8 * 200)
        facts = {"mrn": 880011 + i, "age": 88 + i, "gain": 24}
        name = f"S00{4711 + i}_d201903{11 + i}_{91 + i}_{1 + i % 2}.mat"
        scipy.io.savemat(raw / name, {"x": x_CT, "fs": 200, "labels": ["C3", "Cz", "C4"], "unit": "uV", **facts})
        people.append(f"00{4711 + i}\t{77001 + i}\t{19870401 + i}\t{100 + i // 2}\t{i % 2}\t{0.25 + i / 7:.4f}")
    (raw / "people.tsv").write_text("\n".join(people))
    (raw / "dataset.toml").write_text(
        """name = "small"
pattern = '(?P<code>S(?P<subject>(?P<number>\\d+)))_d(?P<date>\\d+)_(?P<Age>\\d+)_(?P<block>\\d)\\.mat'
[participants]
file = "people.tsv"
id = "id"
"""
    )
    cache = tmp_path / "cache"
    code, result, stderr = run("--source", raw, "--cache", cache, "--anonymise")
    assert code == 0 and "could identify people left out: born, code, date, number" in stderr, stderr
    assert result["notes"]["columns that could identify people left out"] == 1
    labels = json.loads((cache / "labels.json").read_bytes())
    assert {tuple(sorted(r["columns"])) for r in labels["recordings"].values()} == {("Age", "age", "block", "gain")}
    assert {tuple(sorted(p)) for p in labels["participants"].values()} == {("group", "iq", "threshold")}
    assert max(r["columns"][name] for r in labels["recordings"].values() for name in ("Age", "age")) == 90
    parts = [store.read_part(path)["columns"] for path in cache.glob("*/parts/*.json")]
    assert len(parts) == 5 and all(sorted(columns) == ["age", "gain"] for columns in parts)


def test_a_cache_where_there_is_no_folder_yet_or_can_be_none(small, tmp_path):
    code, _, stderr = run("--source", small[0], "--cache", tmp_path / "not" / "there" / "yet", "--anonymise")
    assert code == 0, stderr
    (tmp_path / "file").write_text("")
    for words in (("--source", small[0]), ("--source", small[0], "--anonymise"), ()):
        code, _, stderr = run(*words, "--cache", tmp_path / "file" / "cache")
        assert code == 2 and "--cache" in stderr.splitlines()[-1] and "Traceback" not in stderr
    code, _, stderr = run("--action", "gc", "--cache", tmp_path / "nowhere")
    assert code == 2 and "no cache at" in stderr and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("policy", ["reject", "mask", "interpolate"])
def test_missing_electrodes_among_named_ones(small, tmp_path, policy):
    words = ("--source", small[0], "--cache", tmp_path / "cache", "--channels", "C3,Cz,C4", "--missing", policy)
    code, result, stderr = run(*words)
    if policy == "reject":
        assert code == 2 and "missing_channel" in stderr.splitlines()[-1]
        return
    assert code == 0 and result["missing_electrodes"]["electrodes"] == {"Cz": 8}, stderr
    batch = Cache(tmp_path / "cache").read([0], [0], 800, unit="uV")
    assert batch.mask_BC[0].tolist() == [True, policy == "interpolate", True]
    assert (batch.x_BCT[0, 1].std() > 0) == (policy == "interpolate")


def test_causal_cache_equals_streaming(small, tmp_path):
    from lib.edf import read_header, read_signals
    from lib.filters import Causal

    raw, _, _ = small
    code, _, stderr = run("--source", raw, "--cache", tmp_path / "cache", "--causal", "--reference", "none")
    assert code == 0, stderr
    cache = Cache(tmp_path / "cache")
    header = read_header(raw / "s00_rest.edf")
    order = [NAMES.index(f"EEG {c.upper()}-REF") for c in cache.recordings[0].names]
    x_CT = read_signals(header, order)
    stream = Causal(200.0, 100.0, (0.5, 45.0), None, len(order))
    rng, pieces, at = np.random.default_rng(0), [], 0
    while at < x_CT.shape[1]:
        n = int(rng.integers(1, 60))
        pieces.append(stream.process(x_CT[:, at : at + n]))
        at += n
    streamed = np.concatenate(pieces, axis=1)
    stored = cache.read([0], [0], cache.recordings[0].samples, unit="uV").x_BCT[0].numpy()
    assert np.abs(streamed - stored).max() < 2e-3 * np.abs(streamed).max()  # float16


def test_mne_engine_agrees(small, tmp_path):
    pytest.importorskip("mne")
    code, _, stderr = run("--source", small[0], "--cache", tmp_path / "cache", "--engine", "mne", "--scale", "none")
    assert code == 0, stderr
    assert run("--source", small[0], "--cache", tmp_path / "fft", "--scale", "none")[0] == 0
    ours, theirs = (Cache(tmp_path / n).read([1], [0], 1600, unit="uV").x_BCT.numpy() for n in ("fft", "cache"))
    assert (ours - theirs).std() < 1.5e-3 * theirs.std()


def test_two_caches_read_as_one(small, tmp_path):
    write_small(tmp_path / "raw", subjects=3, seed=5)
    (tmp_path / "raw" / "dataset.toml").write_text(
        (small[0] / "dataset.toml").read_text().replace('"small"', '"other"')
    )
    assert run("--source", tmp_path / "raw", "--cache", tmp_path / "cache")[0] == 0
    both = Cache(small[1], tmp_path / "cache")
    assert len(both.recordings) == 14 and len(both.windows()) == len(Cache(small[1]).windows()) + len(
        Cache(tmp_path / "cache").windows()
    )
    alone, row = Cache(tmp_path / "cache"), 3
    assert both.recordings[8 + row].key == alone.recordings[row].key
    a, b = both.read([8 + row, 0], [100, 0], 400, unit="uV"), alone.read([row], [100], 400, unit="uV")
    assert (a.x_BCT[0] == b.x_BCT[0]).all() and [e.label for e in both.events(8 + row)] == [
        e.label for e in alone.events(row)
    ]
    with pytest.raises(Unusable, match="once more"):
        Cache(small[1], small[1])
    assert run("--source", tmp_path / "raw", "--cache", tmp_path / "fast", "--rate-hz", 200)[0] == 0
    with pytest.raises(Unusable, match="rate_hz"):
        Cache(small[1], tmp_path / "fast")


def test_a_seizure_less_data_set_does_not_hide_beside_another(tmp_path):
    for name, seizures in (("with", True), ("without", False)):
        raw = write_small(tmp_path / name, subjects=3)
        (raw / "dataset.toml").write_text((raw / "dataset.toml").read_text().replace('"small"', f'"{name}"'))
        for path in raw.glob("*.edf"):
            rows = "TERM,0.0,16.0,bckg,1.0\n" if not seizures else "TERM,0.0,4.0,bckg,1.0\nTERM,4.0,10.0,seiz,1.0\n"
            text = "# version = csv_v1.0.0\n# duration = 16.0 secs\n#\nchannel,start_time,stop_time,label,confidence\n"
            path.with_suffix(".csv_bi").write_text(text + rows)
    both = ("--source", tmp_path / "with", tmp_path / "without", "--cache", tmp_path / "cache")
    code, _, stderr = run(*both)
    assert code == 2 and "training split of without holds no seizure" in stderr.splitlines()[-1]
    assert not (tmp_path / "cache" / "manifest.json").exists()
    code, result, stderr = run(*both, "--allow-no-seizures")
    assert code == 0 and result["reused"] == 12 and result["windows"]["full"] > 0, stderr


def test_numbers_that_are_none_do_not_end_a_build(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    x_CT = noise_uv(np.random.default_rng(0), len(NAMES), 16 * 200)
    facts = {"data": x_CT, "fs": 200.0, "unit": "uV", "ch_names": NAMES}
    np.savez(raw / "sub-01.npz", **facts, age=np.nan, threshold=np.inf, gain=24.0)
    kind = [("latency", object), ("type", object), ("duration", object)]
    events = np.array([(201.0, "inf", 5.0), (401.0, "look", np.inf)], kind)
    chanlocs = np.array([(name,) for name in NAMES], [("labels", object)])
    eeg = {"nbchan": len(NAMES), "pnts": x_CT.shape[1], "srate": 200, "data": x_CT}
    scipy.io.savemat(raw / "sub-02.set", {"EEG": {**eeg, "chanlocs": chanlocs, "event": events}}, appendmat=False)
    code, result, stderr = run("--source", raw, "--cache", tmp_path / "cache", "--workers", 1)
    assert code == 0 and result["recordings"] == 2, stderr
    cache = Cache(tmp_path / "cache")
    assert cache.recordings[0].columns == {"gain": 24.0}
    assert [(e.onset_s, e.duration_s, e.label) for e in cache.events(1)] == [(1.0, 0.025, "inf"), (2.0, 0.0, "look")]


def test_an_electrode_in_the_air_does_not_drown_the_others(tmp_path):
    x_CT = noise_uv(np.random.default_rng(0), len(NAMES), 16 * 200)
    loud_CT = x_CT.copy()
    loud_CT[2] *= 2000
    caches = []
    for name, ours_CT in (("quiet", x_CT), ("loud", loud_CT)):
        (tmp_path / name).mkdir()
        write_edf(tmp_path / name / "sub-01.edf", ours_CT, 200, NAMES)
        code, result, stderr = run("--source", tmp_path / name, "--cache", tmp_path / f"c-{name}", "--workers", 1)
        assert code == 0 and ("loud channels" in result["notes"]) == (name == "loud"), stderr
        caches.append(Cache(tmp_path / f"c-{name}"))
    quiet, loud = (cache.read([0], [0], 1600, unit="uV") for cache in caches)
    bad = caches[1].recordings[0].names.index("C3")
    assert quiet.mask_BC.all() and loud.mask_BC.numpy().tolist()[0] == [c != bad for c in range(len(NAMES))]
    others = [c for c in range(len(NAMES)) if c != bad]
    left_CT, right_CT = (batch.x_BCT[0].numpy()[others] for batch in (quiet, loud))
    assert np.corrcoef(left_CT.ravel(), right_CT.ravel())[0, 1] > 0.9  # the average is of one channel less


def test_channels_that_are_marked_bad_or_of_another_type(tmp_path):
    """A BIDS channels.tsv and a FIF header say the same of one signal; a table that changes is read again."""
    raw = tmp_path / "bids" / "sub-01" / "eeg"
    raw.mkdir(parents=True)
    x_CT = noise_uv(np.random.default_rng(0), len(NAMES), 16 * 200)
    x_CT[2] *= 10  # too quiet to be called loud
    write_edf(raw / "sub-01_task-rest_eeg.edf", x_CT, 200, NAMES)
    table = raw / "sub-01_task-rest_channels.tsv"
    rows = [
        f"{name}\t{'EOG' if name == NAMES[0] else 'EEG'}\t{'bad' if name == NAMES[2] else 'good'}" for name in NAMES
    ]
    table.write_text("\n".join(["name\ttype\tstatus", *rows, "Oz9\tEEG\tbad"]))

    (tmp_path / "fif").mkdir()
    info = mne.create_info(NAMES, 200, ["eog"] + ["eeg"] * (len(NAMES) - 1))
    info["bads"] = [NAMES[2]]
    mne.io.RawArray(x_CT * 1e-6, info, verbose="ERROR").save(tmp_path / "fif" / "sub-01_raw.fif", verbose="ERROR")

    def build(name: str) -> tuple[dict, Cache]:
        code, result, stderr = run("--source", tmp_path / name, "--cache", tmp_path / f"c-{name}", "--workers", 1)
        assert code == 0, stderr
        return result, Cache(tmp_path / f"c-{name}")

    read = {}
    for name in ("bids", "fif"):
        result, cache = build(name)
        assert "marked bad channels" in result["notes"]
        recording = cache.recordings[0]
        assert "Fp1" not in recording.names and len(recording.names) == len(NAMES) - 1
        batch = cache.read([0], [0], 1600, unit="uV")
        good = [c != recording.names.index("C3") for c in range(len(recording.names))]
        assert batch.mask_BC.numpy().tolist()[0] == good
        read[name] = batch.x_BCT[0].numpy()[good]
        assert abs(read[name].mean(0)).max() < 0.1  # the average is of the good ones
        expected = (
            {"channels not of type EEG", "rows of a channel table without a channel"} if name == "bids" else set()
        )
        assert expected <= set(result["notes"])
    np.testing.assert_allclose(read["bids"], read["fif"], atol=0.1)

    table.write_text("\n".join(["name\ttype\tstatus", *(f"{canonical(name)}\tEEG\tn/a" for name in NAMES)]))
    result, cache = build("bids")
    assert len(cache.recordings[0].names) == len(NAMES) and cache.read([0], [0], 1600).mask_BC.all()
    table.write_text("what is this")
    assert "channel table not taken" in build("bids")[0]["notes"]
    table.write_text("\n".join(["name\tstatus", *(f"{name}\tbad" for name in NAMES)]))
    code, result, stderr = run("--source", tmp_path / "bids", "--cache", tmp_path / "c-bids", "--workers", 1)
    assert code != 0 and "marked bad" in stderr and "bad_channels" in stderr


def test_bipolar_channels_are_not_averaged(tmp_path):
    (tmp_path / "raw").mkdir()
    x_CT = noise_uv(np.random.default_rng(5), 3, 16 * 200)
    write_edf(tmp_path / "raw" / "sub-1.edf", x_CT, 200, ["FP1-F7", "F7-T7", "T7-P7"], [])
    stored = []
    for reference in ("average", "none"):
        words = ("--source", tmp_path / "raw", "--cache", tmp_path / reference, "--reference", reference)
        code, result, stderr = run(*words)
        assert code == 0, stderr
        noted = result["notes"].get("bipolar channels left as recorded, not re-referenced", 0)
        assert noted == (reference == "average")
        stored.append(Cache(tmp_path / reference).read([0], [0], 1600).x_BCT)
    assert np.array_equal(*stored)


def test_averages_of_few_channels_are_noted_and_are_of_unipolar_ones_alone(tmp_path):
    (tmp_path / "raw").mkdir()
    names = ["C3", "C4", "O1", "FP1-F7", "F7-T7"]
    write_edf(tmp_path / "raw" / "sub-1.edf", noise_uv(np.random.default_rng(5), 5, 16 * 200), 200, names, [])

    def stored(cache: str, picked: list[str], reference: str) -> tuple[np.ndarray, dict]:
        words = ("--channels", ",".join(picked), "--reference", reference)
        code, result, stderr = run("--source", tmp_path / "raw", "--cache", tmp_path / cache, *words)
        assert code == 0, stderr
        return Cache(tmp_path / cache).read([0], [0], 1600, unit="uV").x_BCT[0].numpy(), result["notes"]

    y_CT, notes = stored("a", names, "average")
    x_CT, _ = stored("b", names, "none")
    assert np.allclose(y_CT[:3], x_CT[:3] - x_CT[:3].mean(0), atol=0.1) and np.array_equal(y_CT[3:], x_CT[3:])
    assert notes["bipolar channels left as recorded, not re-referenced"] == 1
    assert notes["average reference of few channels"] == 1
    assert stored("c", names[:2], "average")[1]["average reference of few channels"] == 1
    assert "average reference of few channels" not in stored("d", names[:2], "none")[1]


def test_renamed_channels_are_cached_once(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_edf(raw / "sub-1.edf", noise_uv(np.random.default_rng(0), 3, 3200), 200, ["X1", "X2", "X3"])
    (raw / "dataset.toml").write_text('name = "d"\n[values.channel]\nX1 = "C3"\nX2 = "Cz"\nX3 = "C4"\n')
    for built in (1, 0):
        code, result, stderr = run("--source", raw, "--cache", tmp_path / "cache", "--workers", 1)
        assert code == 0 and result["built"] == built, stderr
    assert Cache(tmp_path / "cache").recordings[0].names == ("C3", "Cz", "C4")


def test_names_that_are_no_utf8_do_not_end_a_build(tmp_path):
    folder = os.fsencode(tmp_path) + b"/r\xfcck"
    os.mkdir(folder)
    write_edf(folder + b"/sub-\xfc.edf", noise_uv(np.random.default_rng(0), len(NAMES), 3200), 200, NAMES)
    with open(folder + b"/sub-\xff.edf", "wb"):
        pass
    source, cache = os.fsdecode(folder), tmp_path / os.fsdecode(b"c\xe4che")
    for built in (1, 0):
        code, result, stderr = run("--source", source, "--cache", cache, "--workers", 1)
        assert code == 3 and result["built"] == built and result["quarantined_by_code"] == {"empty": 1}, stderr
    assert Cache(cache).recordings[0].key == "r\\xfcck/sub-\\xfc.edf"


def test_reasons_do_not_name_the_folder(tmp_path):
    raw = write_small(tmp_path / "raw", subjects=3)
    (raw / "s07_rest.edf").write_bytes(b"<html>404</html>" * 40)
    (raw / "s08_rest.edf").symlink_to(tmp_path / "nowhere.edf")
    code, result, stderr = run("--source", raw, "--cache", tmp_path / "cache")
    assert code == 3 and result["quarantined_by_code"] == {"not_edf": 1, "unreadable": 1}, stderr
    for entry in json.loads((tmp_path / "cache" / "quarantine.json").read_bytes()):
        assert str(tmp_path) not in entry["reason"] and entry["key"].split("/")[-1] in entry["reason"], entry


def knocks(rate_hz: float, every_hz: float, ring_hz: float, seconds: float = 8.0) -> np.ndarray:
    """Noise with a resonance that is struck again and again."""
    t_T = np.arange(round(seconds * rate_hz)) / rate_hz
    since_T = t_T % (1 / every_hz)
    return 0.05 * np.random.default_rng(0).standard_normal(len(t_T)) + np.exp(-400 * since_T) * np.sin(
        2 * np.pi * ring_hz * since_T
    )


def test_an_envelope_cache_holds_how_often_a_resonance_is_struck_and_not_which_one(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for ring_hz in (2200, 3700):
        np.save(folder / f"{ring_hz}.npy", knocks(12000.0, 107.0, ring_hz).astype(np.float32))
    flags = ["--source", folder, "--source-rate-hz", 12000, "--source-unit", "g", "--rate-hz", 1200]
    (folder / "dataset.toml").write_text('name = "knocks"\nkind = "vibration"\npattern = \'(?P<subject>\\d+)\\.npy\'\n')
    code, _, said = run(*flags, "--cache", tmp_path / "cache", "--envelope-hz", 500, 6000)
    assert code == 0, said
    cache = Cache(tmp_path / "cache")
    assert cache.signal["envelope_hz"] == [500.0, 6000.0] and cache.rate_hz == 1200
    for row in (0, 1):
        x_T = cache.read([row], [0], 9000, unit="g").x_BCT[0, 0].double().numpy()
        power_F, hz_F = np.abs(np.fft.rfft(x_T - x_T.mean())) ** 2, np.fft.rfftfreq(9000, 1 / 1200)
        lines = [power_F[np.abs(hz_F - k * 107) < 0.5].sum() for k in (1, 2, 3)]
        assert hz_F[power_F.argmax()] == pytest.approx(107, abs=0.2) and sum(lines) > 0.8 * power_F[hz_F < 400].sum()
    for words, reason in (
        (["--envelope-hz", 600, 500], "must rise"),
        (["--envelope-hz", 500, 6000, "--causal"], "leave one of them out"),
    ):
        code, _, said = run(*flags, "--cache", tmp_path / "other", *words)
        assert code == 2 and reason in said
    code, left, _ = run(*flags, "--cache", tmp_path / "other", "--envelope-hz", 500, 9000)
    assert code != 0 and "9000 Hz" in json.dumps(json.loads((tmp_path / "other" / "quarantine.json").read_text()))
    code, _, said = run(*flags, "--cache", tmp_path / "plain")
    assert code == 0, said
    with pytest.raises(Unusable, match="envelope_hz"):
        Cache(tmp_path / "cache", tmp_path / "plain")


def swelling(names: int, hz: float, seconds: float = 40.0, rate_hz: float = 200.0) -> np.ndarray:
    """A rhythm of 20 µV of another phase in each channel, twice as loud every second second, and 100 µV of something common to all."""
    t_T = np.arange(round(seconds * rate_hz)) / rate_hz
    loud_T = 20 * (1.5 + 0.5 * np.sign(np.sin(np.pi * t_T)))
    phase_C1 = 2 * np.pi * np.arange(names)[:, None] / names
    return loud_T * np.sin(2 * np.pi * hz * t_T + phase_C1) + 100 * np.sin(2 * np.pi * 11.3 * t_T)


def test_line_noise_goes_before_the_envelope_is_made():
    segment = recordings.Segment(0, 8000, 0.0)
    clean_CT = swelling(4, 20.0).astype(np.float32)
    t_T = np.arange(clean_CT.shape[1]) / 200
    noisy_CT = (clean_CT + 300 * np.sin(2 * np.pi * 50 * t_T)).astype(np.float32)
    signal = dict(rate_hz=100.0, band_hz=None, envelope_hz=[5.0, 90.0], causal=False, min_seconds=1.0)
    for engine in ("fft", "mne"):
        found = [
            build_cache._filter(x_CT, 200.0, [segment], signal | dict(engine=engine, notch_hz=notch))[0][:, 500:-500]
            for x_CT, notch in ((clean_CT, None), (noisy_CT, [50.0]), (noisy_CT, None))
        ]
        assert np.abs(found[1] - found[0]).mean() < 0.05 * found[0].mean() < found[2].mean() - found[0].mean(), engine


def test_envelopes_of_an_eeg_are_of_signals_that_have_their_reference(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    x_CT = swelling(8, 9.0)
    for name in ("s01", "s02"):
        write_edf(raw / f"{name}_rest.edf", x_CT, 200, NAMES[:8], [])
    flags = ("--source", raw, "--band-hz", "none", "--envelope-hz", 7, 13, "--scale", "none", "--workers", 1)
    code, _, said = run(*flags, "--cache", tmp_path / "cache")
    assert code == 0, said
    cache = Cache(tmp_path / "cache")
    got_CT = cache.read([0], [200], 3600, unit="uV").x_BCT[0].numpy()
    # what is common to all goes, and the mean of the rhythms, which is none
    rhythm_CT = (x_CT - x_CT.mean(0)).astype(np.float32)
    wanted_CT = filters.envelope(rhythm_CT, 200.0, (7.0, 13.0))[:, 400:7600:2]
    assert (got_CT > 0).mean() > 0.99 and np.abs(got_CT - wanted_CT).mean() < 0.02 * wanted_CT.mean()
    assert cache.signal["recipe"] == build_cache.RECIPE + 1


def test_only_envelopes_that_are_others_now_have_another_recipe():
    known = build_cache.RECIPE
    for words, kind, recipe in (
        ({}, "eeg", known),
        ({"notch_hz": (50.0,)}, "vibration", known),
        ({"envelope_hz": (10.0, 40.0)}, "vibration", known),
        ({"envelope_hz": (10.0, 40.0), "notch_hz": (50.0,)}, "vibration", known + 1),
        ({"envelope_hz": (10.0, 40.0)}, "eeg", known + 1),
    ):
        signal = build_cache.signal_options(build_cache.Config(rate_hz=100.0, **words), kind, [])
        assert signal["recipe"] == recipe and ("envelope_hz" in signal) == ("envelope_hz" in words)


def test_a_recording_too_short_for_an_envelope_is_quarantined_and_the_others_are_cached(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, samples in (("short", 27), ("fits", 28), ("long", 500)):
        np.save(folder / f"{name}.npy", np.random.default_rng(0).standard_normal(samples).astype(np.float32))
    (folder / "dataset.toml").write_text('name = "bits"\nkind = "vibration"\npattern = \'(?P<subject>\\w+)\\.npy\'\n')
    flags = ("--source", folder, "--source-rate-hz", 500, "--source-unit", "g", "--envelope-hz", 10, 60)
    code, result, said = run(*flags, "--cache", tmp_path / "cache")
    assert code == 3 and result["quarantined_by_code"] == {"too_short": 1} and result["recordings"] == 2, said
    (entry,) = json.loads((tmp_path / "cache" / "quarantine.json").read_text())
    assert "short" in entry["key"] and "0.056 s (--envelope-hz)" in entry["reason"]


def test_an_envelope_is_the_magnitude_of_the_analytic_signal_in_its_band():
    t_T = np.arange(6000) / 1000.0
    loud_T = 1 + 0.5 * np.cos(2 * np.pi * 3 * t_T)
    x_CT = np.stack([loud_T * np.sin(2 * np.pi * 200 * t_T), loud_T * np.sin(2 * np.pi * 20 * t_T)])
    got_CT = filters.envelope(x_CT, 1000.0, (100.0, 300.0))
    assert np.abs(got_CT[0, 500:-500] - loud_T[500:-500]).max() < 0.02 and got_CT[1, 500:-500].max() < 0.02
    assert got_CT.dtype == np.float32 and got_CT.shape == x_CT.shape
