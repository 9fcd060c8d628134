"""Reading a cache: batches against the plain arrays, the pre-flight check, threads."""

import json
import os
import threading
import time

import numpy as np
import pytest

from lib import store
from lib.cache import CLIP_SD, Cache
from lib.edf import write_edf
from lib.errors import Unusable
from tests.recipes import NAMES, noise_uv, run


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two montages, one flat channel, one gap, one huge artefact."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    (root / "raw").mkdir()
    x_CT = noise_uv(rng, 8, 30 * 200)
    x_CT[2] = 0.0  # C3 is flat
    x_CT[0, 3000:3010] += 5e3  # an artefact of 250 deviations
    write_edf(root / "raw" / "sub1_a.edf", x_CT, 200, NAMES, [(3.0, 8.0, "seizure")])
    records = [*range(10), *range(25, 45)]  # a gap of 15 s after 10 s
    x_CT = noise_uv(rng, 4, 30 * 100)
    names = ["Fz", "Cz", "Pz", "nowhere"]
    write_edf(root / "raw" / "sub2_b.edf", x_CT, 100, names, [(30.0, 2.0, "seizure")], record_onsets_s=records)
    (root / "raw" / "dataset.toml").write_text("pattern = 'sub(?P<subject>\\d)_[ab]\\.edf'\n")
    code, _, stderr = run("--source", root / "raw", "--cache", root / "cache", "--allow-no-seizures")
    assert code == 0, stderr
    return root / "cache"


def plain(cache: Cache, row: int) -> np.ndarray:
    """The stored array, by numpy alone."""
    return np.load(cache.recordings[row].shard, mmap_mode="r")


def test_batches_equal_the_plain_arrays(mixed):
    cache = Cache(mixed)
    windows = cache.windows(window_s=4.0, stride_s=1.0)
    ids = np.random.default_rng(1).permutation(len(windows))
    batch = windows.read(ids)
    rows, starts = windows.locate(ids)
    assert batch.x_BCT.shape == (len(ids), 8, 400) and batch.recording_B.tolist() == rows.tolist()
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        expected = np.clip(plain(cache, row)[start : start + 400].T.astype(np.float32), -CLIP_SD, CLIP_SD)
        good = batch.mask_BC[b].numpy()
        names = cache.recordings[row].names
        assert good[: len(names)].tolist() == [n != "C3" for n in names] and not good[len(names) :].any()
        x_CT = batch.x_BCT[b].numpy()
        assert np.array_equal(x_CT[: len(names)][good[: len(names)]], expected[good[: len(names)]])
        assert not x_CT[~good].any()


def test_microvolts_are_recovered_beyond_the_clip(mixed):
    cache = Cache(mixed)
    row = next(i for i, r in enumerate(cache.recordings) if len(r.names) == 8)
    model = cache.read([row], [1400], 400).x_BCT[0]
    microvolts = cache.read([row], [1400], 400, unit="uV").x_BCT[0]
    assert model.abs().max() == CLIP_SD and microvolts.abs().max() > 500
    assert np.median(np.abs(microvolts[0].numpy())) < 100


def test_windows_do_not_cross_the_gap_and_events_are_on_the_signals_own_time(mixed):
    cache = Cache(mixed)
    row = next(i for i, r in enumerate(cache.recordings) if len(r.names) == 3)  # `nowhere` is no electrode
    assert cache.recordings[row].segments == ((0, 1000), (1000, 3000))
    windows = cache.windows(window_s=4.0, stride_s=1.0, recordings=[row])
    _, starts = windows.locate(np.arange(len(windows)))
    assert len(windows) == 7 + 17 and not any(600 < s < 1000 for s in starts)
    (event,) = cache.events(row, "seizure")
    assert (event.onset_s, event.duration_s) == (15.0, 2.0)  # 30 s of the clock, less the gap of 15 s
    partial, full = windows.seizure_ids()
    covered = {int(s): (min(s + 400, 1700) - max(s, 1500)) / 400 for s in starts if s < 1700 and s + 400 > 1500}
    assert len(partial) == len(covered) and len(full) == 0


def test_windows_are_held_by_one_segment_of_their_recording(mixed):
    cache, rng = Cache(mixed), np.random.default_rng(0)
    row_B, start_B = rng.integers(len(cache.recordings), size=2000), rng.integers(-500, 3500, 2000)
    start_B[:20] = np.repeat([-10_000, 10**6, 600, 601, 1000], 4)
    segments = [cache.recordings[row].segments for row in row_B]
    held = [any(a <= s and s + 400 <= b for a, b in own) for own, s in zip(segments, start_B, strict=True)]
    assert cache.holds(row_B, start_B, 400).tolist() == held and 0 < sum(held) < 2000
    assert cache.holds(row_B[:0], start_B[:0], 400).shape == (0,)


def test_window_choices_need_no_rebuild_and_impossible_ones_are_refused(mixed):
    cache = Cache(mixed)
    assert len(cache.windows(window_s=10, stride_s=10)) == 3 + 1 + 2
    with pytest.raises(Unusable, match="window_s 0.015"):
        cache.windows(window_s=0.015)
    with pytest.raises(Unusable, match="no window of 60"):
        cache.windows(window_s=60)


def test_threads_read_the_same(mixed):
    windows = Cache(mixed).windows(window_s=2.0, stride_s=0.5)
    ids = np.arange(len(windows))
    expected = windows.read(ids).x_BCT
    wrong = []

    def read():
        for _ in range(20):
            if not (windows.read(ids).x_BCT == expected).all():
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_least_recently_used_shards_are_closed(mixed):
    cache = Cache(mixed)
    cache._files.capacity = 1
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert cache.read([0, 1], [0, 0], 100).x_BCT.isfinite().all()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_shard_that_shrinks_is_named(mixed, tmp_path):
    import shutil

    shutil.copytree(mixed, tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    shard = cache.recordings[0].shard
    os.truncate(shard, 500)
    with pytest.raises(Unusable, match=shard.name):
        cache.read([0], [0], 400)


def write_many(directory, recordings: int, channels: int = 21):
    """A cache of many recordings whose shards are sparse files: only its metadata is real."""
    data = directory / "000000000000" / "shards"
    data.mkdir(parents=True)
    names = [f"E{i}" for i in range(1, channels + 1)]
    index, labels, size = [], {}, store.NPY_HEADER_BYTES + 60_000 * channels * 2
    for i in range(recordings):
        key, shard = f"many/s{i:05d}.edf", f"{i:010x}-s-000000.npy"
        with open(data / shard, "wb") as file:
            os.truncate(file.fileno(), size)
        entry = {"key": key, "shard": shard, "bytes": size, "crc32": 0, "samples": 60_000, "montage": 0}
        index.append({**entry, "segments": [[0, 60_000, 0.0]], "bad": [], "interpolated": []})
        place = {"dataset": "many", "subject": f"{i // 3:05d}", "session": "1", "task": "rest", "run": ""}
        labels[key] = {**place, "split": "train", "columns": {"montage": "01_tcp_ar"}}
    participants = {f"many/{i:05d}": {"age": 20 + i % 60, "sex": "F"} for i in range(recordings // 3 + 1)}
    events = np.zeros(recordings, store.EVENT)
    events["recording"], events["onset_s"], events["duration_s"] = np.arange(recordings), 30.0, 20.0
    tables = {
        "index.json": store.canonical_json(
            {"montages": [{"names": names, "positions_m": [None] * channels}], "recordings": index}
        ),
        "labels.json": store.canonical_json(
            {"recordings": labels, "participants": participants, "vocabulary": ["seizure"]}
        ),
        "events.npy": b"".join(map(bytes, store.npy_bytes(events))),
        "scales.npy": b"".join(map(bytes, store.npy_bytes(np.ones((recordings * channels, 2), np.float32)))),
        "quarantine.json": b"[]",
        "build.json": store.canonical_json({"command": "python build_cache.py"}),
    }
    signal = {"rate_hz": 100.0, "scale": "robust", "kind": "eeg"}
    store.write_tables(directory, tables, {"signal": signal, "directory": "000000000000", "unit": "uV", "counts": {}})


def test_start_up_with_5000_recordings_reads_metadata_only(tmp_path):
    write_many(tmp_path / "cache", 5000)
    Cache(tmp_path / "cache")
    seconds = []
    for _ in range(3):
        started = time.process_time()
        cache = Cache(tmp_path / "cache")
        windows = cache.windows()
        seconds.append(time.process_time() - started)
    assert len(windows) == 5000 * 299
    assert min(seconds) < 1.0, seconds  # 0.3 s on a quiet machine: tests/bench_cache.py
    partial, full = windows.seizure_ids()
    assert len(full) == 5000 * 9 and len(partial) == 5000 * 2
    (tmp_path / "cache" / "000000000000" / "shards" / f"{7:010x}-s-000000.npy").unlink()
    with pytest.raises(Unusable, match="000000000000/shards/0000000007-s-000000.npy is missing"):
        Cache(tmp_path / "cache")


def test_another_version_is_refused(mixed, tmp_path):
    import shutil

    shutil.copytree(mixed, tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "version": 99}))
    with pytest.raises(Unusable, match="version 99, expected berger-cache 1; rebuild: python build_cache.py --source"):
        Cache(tmp_path / "cache")


def test_signals_that_were_made_differently_are_not_read_together(mixed, tmp_path):
    for name, words, mend in (
        ("reference", ["--reference", "none"], "--reference average"),
        ("band_hz", ["--band-hz", 1, 20], "--band-hz 0.5 45"),
        ("causal", ["--causal"], "without --causal"),
    ):
        raw = ("--source", mixed.parent / "raw", "--cache", tmp_path / name, "--allow-no-seizures")
        assert run(*raw, *words)[0] == 0
        with pytest.raises(Unusable, match=f"has {name} .*; rebuild {tmp_path / name} .*{mend}"):
            Cache(mixed, tmp_path / name)
