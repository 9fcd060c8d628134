"""lib/pairs.py: every pair is what its kind says, inside good segments, and no false negative is left."""

import time
from types import SimpleNamespace

import mne
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.cache import Cache
from lib.edf import write_edf
from lib.errors import Unusable
from lib.pairs import KINDS, PairSampler, Partners, Spans, find_spans, movie_moments, parse_shares
from tests import recipes
from tests.movie_cases import build


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(build(tmp_path_factory.mktemp("pairs")))


def rows_of(cache: Cache, split: str = "train") -> list[int]:
    return [i for i, r in enumerate(cache.recordings) if r.split == split]


def sampler(cache: Cache, mix: str, batch: int = 32, seed: int = 0, **options) -> PairSampler:
    return PairSampler(cache, rows_of(cache), 2.0, 1.0, parse_shares(tuple(mix.split())), batch, seed, **options)


def label_of(cache: Cache, row: int, start: int, prefix: str) -> tuple[str, float] | None:
    """The event that covers a 2 s window, and the time (s) since its onset: read from the events one by one."""
    for e in cache.events(row):
        if e.label.startswith(prefix) and e.onset_s * 100 <= start + 0.5:
            if e.duration_s and start + 200 <= (e.onset_s + e.duration_s) * 100 + 0.5:
                return e.label, start / 100 - e.onset_s
    return None


def views(cache: Cache, drawn, batch: int):
    """(kind, (row, start, subject) of the anchor, the same of the partner) of every pair."""
    subject = [r.subject for r in cache.recordings]
    v = [(r, s, subject[r]) for r, s in zip(drawn.recording_V.tolist(), drawn.start_V.tolist(), strict=True)]
    return [(KINDS[k], a, p) for k, a, p in zip(drawn.kind_B, v[:batch], v[batch:], strict=True)]


# ----------------------------------------------------------------------------
# kinds


def test_every_pair_is_what_its_kind_says(cache):
    mixed = "movie:3 resting:2 task:1 augment:1 neighbour:1 event:1"
    pairs = sampler(cache, mixed, 90, neighbour_s=3.0, events=("blip",))
    seen = {kind: 0 for kind in KINDS}
    for step in range(12):
        for kind, (row_a, start_a, subject_a), (row_p, start_p, subject_p) in views(cache, pairs.draw(step), 90):
            seen[kind] += 1
            for row, start in ((row_a, start_a), (row_p, start_p)):
                assert cache.recordings[row].split == "train"
                assert any(low <= start and start + 200 <= high for low, high in cache.recordings[row].segments)
            if kind == "movie":
                (film_a, t_a), (film_p, t_p) = (
                    label_of(cache, r, s, "movie:") for r, s in ((row_a, start_a), (row_p, start_p))
                )
                assert film_a == film_p and t_a == pytest.approx(t_p, abs=0.006) and subject_a != subject_p
            elif kind == "resting":
                states = {label_of(cache, r, s, "eyes_")[0] for r, s in ((row_a, start_a), (row_p, start_p))}
                assert len(states) == 1 and subject_a != subject_p
            elif kind == "task":
                assert cache.recordings[row_a].task == cache.recordings[row_p].task and subject_a != subject_p
            elif kind == "event":
                assert start_a in (300, 800) and start_p in (300, 800) and subject_a != subject_p
            elif kind == "augment":
                assert (row_a, start_a) == (row_p, start_p)
            else:
                assert row_a == row_p and 0 < abs(start_a - start_p) <= 300
    assert seen == {"movie": 360, "resting": 240, "task": 120, "augment": 120, "neighbour": 120, "event": 120}


def test_all_moments_and_all_partners_come_up(cache):
    pairs = sampler(cache, "movie:1", 64)
    starts, partners = set(), set()
    for step in range(60):
        for _, (row_a, start_a, subject_a), (_, _, subject_p) in views(cache, pairs.draw(step), 64):
            starts.add((row_a, start_a))
            partners.add((subject_a, subject_p))
    assert len(partners) == 6 * 5  # both montages
    assert len({start % 100 for _, start in starts}) > 90  # not only the grid of strides


def test_tolerance_moves_partners_within_it(cache):
    pairs = sampler(cache, "movie:1", 64, tolerance_s=0.3)
    apart = []
    for step in range(10):
        for _, (row_a, start_a, _), (row_p, start_p, _) in views(cache, pairs.draw(step), 64):
            apart.append(label_of(cache, row_a, start_a, "movie:")[1] - label_of(cache, row_p, start_p, "movie:")[1])
    assert np.abs(apart).max() <= 0.311 and np.std(apart) > 0.1


@pytest.mark.parametrize("who", ["same", "any"])
def test_resting_pairs_of_the_same_subject(cache, who):
    pairs = sampler(cache, "resting:1", 60, resting_subjects=who)
    same = []
    for step in range(8):
        for _, (row_a, start_a, subject_a), (row_p, start_p, subject_p) in views(cache, pairs.draw(step), 60):
            assert label_of(cache, row_a, start_a, "eyes_")[0] == label_of(cache, row_p, start_p, "eyes_")[0]
            assert row_a != row_p or abs(start_a - start_p) >= 200  # another block
            same.append(subject_a == subject_p)
    assert all(same) if who == "same" else 0 < np.mean(same) < 0.5


# ----------------------------------------------------------------------------
# false negatives


def test_relations_against_a_loop(cache):
    batch, guard = 40, 1.5
    pairs = sampler(cache, "movie:2 resting:1 augment:1 neighbour:1", batch, guard_s=guard)
    for step in range(4):
        drawn = pairs.draw(step)
        kind = np.tile(drawn.kind_B, 2)
        film, eyes = (
            [label_of(cache, r, s, p) for r, s in zip(drawn.recording_V, drawn.start_V, strict=True)]
            for p in ("movie:", "eyes_")
        )
        for i in range(2 * batch):
            for j in range(2 * batch):
                near = drawn.recording_V[i] == drawn.recording_V[j]
                near = near and abs(int(drawn.start_V[i]) - int(drawn.start_V[j])) < 100 * guard
                moment = film[i] and film[j] and film[i][0] == film[j][0]
                apart = abs(film[i][1] - film[j][1]) if moment else np.inf
                state = eyes[i] and eyes[j] and eyes[i][0] == eyes[j][0]
                state = state and KINDS.index("resting") in (kind[i], kind[j])
                own = i != j and i % batch == j % batch
                if abs(apart - guard) < 0.011 or (abs(apart) < 0.011 and not own):
                    continue  # onsets lie between samples
                alike = own or bool(state) and not near
                assert drawn.alike_VV[i, j] == alike, (i, j)
                assert drawn.excluded_VV[i, j] == (not alike and bool(i == j or near or state or apart < guard)), (i, j)


def test_another_kind_knows_of_the_same_moment(cache):
    """An augmented window is no negative of someone else's at the same moment of the movie."""
    drawn = sampler(cache, "movie:1 augment:1", 400, guard_s=0.5).draw(0)
    film = [label_of(cache, r, s, "movie:") for r, s in zip(drawn.recording_V, drawn.start_V, strict=True)]
    augment = np.flatnonzero(drawn.kind_B == KINDS.index("augment"))
    found = 0
    for i in augment:
        for j in range(800):
            if film[i] and film[j] and film[i][0] == film[j][0] and j % 400 != i:
                if abs(film[i][1] - film[j][1]) < 0.48:
                    found += 1
                    assert drawn.alike_VV[i, j] or drawn.excluded_VV[i, j]
    assert found > 100


def test_supervised_positives_are_every_view_of_the_moment(cache):
    drawn = sampler(cache, "movie:1", 200, tolerance_s=0.1).draw(0)
    positives = drawn.alike_VV.sum(1)
    assert positives.min() >= 1 and positives.max() > 3
    assert not (drawn.alike_VV & drawn.excluded_VV).any()
    assert (drawn.alike_VV == drawn.alike_VV.T).all() and (drawn.excluded_VV == drawn.excluded_VV.T).all()


# ----------------------------------------------------------------------------
# randomness


def test_pairs_depend_on_seed_and_step_only(cache):
    mix = "movie:0.6 resting:0.2 augment:0.2"
    first = sampler(cache, mix)
    forward = [first.draw(step) for step in range(30)]
    for step in (29, 2, 17):  # as after a resume
        again = sampler(cache, mix).draw(step)
        for name in vars(again):
            np.testing.assert_array_equal(getattr(again, name), getattr(forward[step], name))
    assert not np.array_equal(sampler(cache, mix, seed=1).draw(0).start_V, forward[0].start_V)
    share = np.bincount(np.concatenate([d.kind_B for d in forward]), minlength=6) / (30 * 32)
    np.testing.assert_allclose(share[[0, 1, 4]], [0.6, 0.2, 0.2], atol=2 / 960)


def test_every_anchor_comes_once_per_epoch(cache):
    pairs = sampler(cache, "augment:1", 18)
    n = len(cache.windows("train", 2.0, 1.0))
    assert n % 18 == 0
    ids = np.concatenate([pairs.sampler.ids(step) for step in range(n // 18)])
    np.testing.assert_array_equal(np.sort(ids), np.arange(n))


# ----------------------------------------------------------------------------
# spans and partners, against brute force


def world(segments: list[list[tuple[int, int]]], subjects: list[str]) -> SimpleNamespace:
    """Recordings with nothing but segments (samples) and subjects, at 1 Hz so that seconds are samples."""
    recordings = [
        SimpleNamespace(segments=tuple(s), subject=u, onsets_s=tuple(float(start) for start, _ in s))
        for s, u in zip(segments, subjects, strict=True)
    ]
    return SimpleNamespace(recordings=recordings, rate_hz=1.0)


@st.composite
def worlds(draw):
    segments, subjects, table = [], [], []
    for row in range(draw(st.integers(2, 6))):
        edges = sorted(draw(st.sets(st.integers(0, 60), min_size=2, max_size=6)))
        segments.append(list(zip(edges[::2], edges[1::2], strict=False)))
        subjects.append(draw(st.sampled_from("abc")))
        for _ in range(draw(st.integers(0, 2))):
            onset = draw(st.integers(0, 50))
            table.append((row, float(onset), float(onset + draw(st.integers(3, 40))), draw(st.sampled_from("xy"))))
    return world(segments, subjects), table


@given(worlds(), st.integers(2, 6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_spans_are_intervals_within_segments(made, samples, stride):
    cache, table = made
    spans = Spans(cache, list(range(len(cache.recordings))), table, samples, stride)
    expected = [
        (row, start, stop, int(onset), name)
        for row, onset, end, name in table
        for begin, finish in cache.recordings[row].segments
        for start, stop in [(max(int(onset), begin), min(int(end), finish))]
        if stop - start >= samples
    ]
    found = zip(
        spans.row_S, spans.start_S, spans.stop_S, spans.onset_S, (spans.names[w] for w in spans.what_S), strict=True
    )
    assert sorted(found) == sorted(expected)
    windows = [
        (s, t) for s in range(len(spans.row_S)) for t in range(spans.start_S[s], spans.stop_S[s] - samples + 1, stride)
    ]
    assert list(zip(*spans.locate(np.arange(len(spans))), strict=True)) == windows and len(spans) == len(windows)
    where = np.array([(row, t) for row in range(len(cache.recordings)) for t in range(62)])
    for what in set(spans.what_S):
        among = np.flatnonzero(spans.what_S == what)
        for (row, t), s in zip(where, spans.holding(among, *where.T), strict=True):
            begun = [i for i in among if spans.row_S[i] == row and spans.start_S[i] <= t]
            last = max(begun, default=-1)
            assert s == (last if begun and t + samples <= spans.stop_S[last] else -1)


@given(worlds(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_partners_against_brute_force(made, aligned):
    cache, table = made
    spans = Spans(cache, list(range(len(cache.recordings))), table, 3, 2)
    partners = Partners(spans, spans.what_S, spans.subject_S, aligned)
    paired = {i for first, stop in partners.ranges for i in range(first, stop)}
    for i in range(len(spans)):
        span, start = (int(a[0]) for a in spans.locate(np.array([i])))
        moment = start - spans.onset_S[span]
        possible = {
            s
            for s in range(len(spans.row_S))
            if spans.what_S[s] == spans.what_S[span] and spans.subject_S[s] != spans.subject_S[span]
            if not aligned or spans.start_S[s] <= spans.onset_S[s] + moment <= spans.stop_S[s] - 3
        }
        assert (i in paired) == bool(possible)
        if possible:
            u_NW = np.random.default_rng(i).random((200, 8))
            drawn = partners.draw(np.full(200, span), np.full(200, moment), u_NW)
            assert set(drawn.tolist()) == possible


def test_a_rare_partner_is_found_and_common_ones_are_equally_likely():
    """One of 3,000 spans belongs to someone else: blind tries would not do."""
    cache = world([[(0, 10)]] * 3000, ["a"] * 2999 + ["b"])
    spans = Spans(cache, range(3000), [(i, 0.0, 10.0, "x") for i in range(3000)], 10, 10)
    partners = Partners(spans, spans.what_S, spans.subject_S, True)
    assert set(partners.draw(np.arange(50), np.zeros(50, int), np.random.default_rng(0).random((50, 8))).tolist()) == {
        2999
    }
    many = partners.draw(np.full(30_000, 2999), np.zeros(30_000, int), np.random.default_rng(1).random((30_000, 8)))
    counts = np.bincount(many, minlength=3000)
    assert counts[2999] == 0 and abs(counts[:2999].mean() - 30_000 / 2999) < 1e-9 and counts.max() < 30


def test_a_large_cohort_costs_little():
    """3,000 subjects, four films of 170 s each, batches of 1,024."""
    cache = world([[(0, 20_000)]] * 12_000, [f"s{i // 4}" for i in range(12_000)])
    cache.rate_hz = 100.0
    table = [(np.arange(i, 12_000, 4), np.full(3000, 3.0), np.full(3000, 173.0), f"movie:{i}") for i in range(4)]
    began = time.process_time()
    spans = Spans(cache, range(12_000), table, 400, 200)
    partners = Partners(spans, spans.what_S, spans.subject_S, True)
    assert time.process_time() - began < 4 and len(spans) == 12_000 * 84
    ids = np.random.default_rng(0).integers(0, len(spans), 1024)
    span, start = spans.locate(ids)
    u_NW = np.random.default_rng(1).random((1024, 8))
    began = time.process_time()
    for _ in range(10):
        partners.draw(span, start - spans.onset_S[span], u_NW)
    assert (time.process_time() - began) / 10 < 0.02


# ----------------------------------------------------------------------------
# what isn't there


@pytest.mark.parametrize(
    "words", [("movies:1",), ("movie",), ("movie:0",), ("movie:-1",), ("movie:nan",), ("movie:1", "movie:2"), ()]
)
def test_senseless_shares_are_unusable(words):
    with pytest.raises(Unusable, match="--pairs"):
        parse_shares(words)


def test_a_share_too_small_to_be_drawn_is_unusable(cache):
    with pytest.raises(Unusable, match="--pairs movie:1 augment:1e-05: .*one in 10,000"):
        sampler(cache, "movie:1 augment:0.00001")


def test_what_is_missing_is_named(cache):
    rest = [i for i in rows_of(cache) if cache.recordings[i].task == "RestingState"]
    one = [i for i in rows_of(cache) if cache.recordings[i].subject == cache.recordings[0].subject]
    with pytest.raises(Unusable, match="--pairs movie: needs .*movie:NAME.*; in .*cache events are blip, eyes_closed"):
        PairSampler(cache, rest, 2.0, 1.0, {"movie": 1}, 8, 0)
    with pytest.raises(Unusable, match="--pairs movie: .*two subjects.*long enough are movie:DespicableMe, movie:The"):
        PairSampler(cache, one, 2.0, 1.0, {"movie": 1}, 8, 0)
    with pytest.raises(Unusable, match="--pairs resting: .*eyes_open and eyes_closed.* windows of 6 s"):
        PairSampler(cache, rest, 6.0, 1.0, {"resting": 1}, 8, 0)
    with pytest.raises(Unusable, match="--pairs task: RestingState is the only one.*augment:0.5"):
        PairSampler(cache, rest, 2.0, 1.0, {"task": 1}, 8, 0)
    with pytest.raises(Unusable, match="--events burp: .*blip"):
        PairSampler(cache, rest, 2.0, 1.0, {"event": 1}, 8, 0, events=("burp",))
    with pytest.raises(Unusable, match="--pairs event"):  # those with a duration are the eyes only
        PairSampler(cache, rest, 2.0, 1.0, {"event": 1}, 8, 0)
    with pytest.raises(Unusable, match="--pairs neighbour: .*segment longer"):
        PairSampler(cache, rest, 20.0, 1.0, {"neighbour": 1}, 8, 0)


def test_a_task_that_is_a_state_will_do(cache):
    """Recordings without events of the eyes, as in eegmat (rest) and eegmmidb (eyes_open): the task says it."""
    films = [i for i in rows_of(cache) if cache.recordings[i].task != "RestingState"]
    stand_in = SimpleNamespace(**{name: getattr(cache, name) for name in ("windows", "labels", "rate_hz", "paths")})
    stand_in.intervals = lambda name: (np.empty(0, np.int64), np.empty(0), np.empty(0))
    stand_in.recordings = list(cache.recordings)
    for i in films:
        r = cache.recordings[i]
        task = {"DespicableMe": "eyes_open", "ThePresent": "Resting state"}[r.task]
        whole = {name: getattr(r, name) for name in ("segments", "onsets_s", "samples", "subject")}
        stand_in.recordings[i] = SimpleNamespace(task=task, **whole)
    spans = find_spans(stand_in, films, "resting", 2.0, 1.0)
    assert {spans.names[w] for w in spans.what_S} == {"eyes_open", "rest"} and len(spans.row_S) == len(films)


# ----------------------------------------------------------------------------
# moments for the evaluation


def test_movie_moments(cache):
    rows = rows_of(cache, "val")
    moments = movie_moments(cache, rows, 2.0, 1.0)
    assert set(moments) == {"DespicableMe", "ThePresent"}
    for film, (row_S, start_SM) in moments.items():
        assert len({cache.recordings[r].subject for r in row_S}) == len(row_S) == 4
        assert {cache.recordings[r].task for r in row_S} == {film} and set(row_S) <= set(rows)
        for row, start_M in zip(row_S, start_SM, strict=True):
            onset = round(cache.events(row, f"movie:{film}")[0].onset_s * 100)
            whole = onset + 100 * np.arange(start_SM.shape[1])
            np.testing.assert_array_equal(start_M, np.where(whole + 200 <= 1950, whole, -1))
        assert (start_SM >= 0).any(0).all()


def test_a_moment_is_the_same_behind_gaps_and_in_cropped_recordings(tmp_path):
    """One film, seen by six: whole; without 20 to 30 s; from 12 s on; begun in what is not there."""
    (folder := tmp_path / "raw").mkdir()
    rng = np.random.default_rng(0)
    film_CT = 20e-6 * rng.standard_normal((4, 6000))
    info = mne.create_info(["Fz", "Cz", "Pz", "Oz"], 100, "eeg")
    for s in range(6):
        raw = mne.io.RawArray(film_CT + 2e-6 * rng.standard_normal(film_CT.shape), info, verbose="ERROR")
        marks = [(5.0, 50.0, "movie:abc")]
        marks += {1: [(20.0, 10.0, "BAD_ACQ_SKIP")], 4: [(3.0, 6.0, "BAD_ACQ_SKIP")]}.get(s, [])
        raw.set_annotations(mne.Annotations(*zip(*marks, strict=True)))
        raw.save(folder / f"s{s}_film_eeg.fif", verbose="ERROR")
    rule = "name = 'x'\npattern = 's(?P<subject>.)_(?P<task>film)_eeg.fif'\n[crop.subject]\n2 = [12.0, 60.0]\n"
    (folder / "dataset.toml").write_text(rule)
    words = ("--source", folder, "--cache", tmp_path / "cache", "--workers", 1, "--scale", "none")
    status, results, err = recipes.run(*words)
    assert status == 0 and results["recordings"] == 6, err
    cache = Cache(tmp_path / "cache")
    assert [len(r.segments) for r in cache.recordings] == [1, 2, 1, 1, 2, 1]
    rows = list(range(6))
    sampler = PairSampler(cache, rows, 4.0, 2.0, {"movie": 1.0}, 16, 0)
    seen = set()
    for step in range(40):
        pairs = sampler.draw(step)
        x_VCT = cache.read(pairs.recording_V, pairs.start_V, 400, cache.unit).x_BCT
        for a, b in zip(x_VCT[:16], x_VCT[16:], strict=True):
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.8
        seen |= set(pairs.recording_V.tolist())
    assert seen == set(rows)
    ((row_S, start_SM),) = movie_moments(cache, rows, 4.0, 1.0).values()
    assert start_SM.shape == (6, 47)
    for m in range(47):
        there = np.flatnonzero(start_SM[:, m] >= 0)
        x_SCT = cache.read(row_S[there], start_SM[there, m], 400, cache.unit).x_BCT
        assert all(np.corrcoef(x_SCT[0].ravel(), x.ravel())[0, 1] > 0.8 for x in x_SCT[1:])
    first_S = (start_SM >= 0).argmax(1)
    assert first_S.tolist() == [0, 0, 7, 0, 4, 0] and (start_SM[1] >= 0).sum() == 47 - 13


def test_views_of_a_state_are_no_negatives_whatever_shorter_event_is_in_it(tmp_path):
    (folder := tmp_path / "raw").mkdir()
    rng = np.random.default_rng(0)
    for s in range(4):
        events = [
            (0.0, 20.0, "block"),
            (20.0, 20.0, "pause"),
            (6.0, 4.0, "cue"),
            (12.0, 4.0, "cue"),
            (28.0, 4.0, "cue"),
        ]
        write_edf(folder / f"s{s:02d}_rest.edf", recipes.noise_uv(rng, 2, 8000), 200, recipes.NAMES[:2], events)
    (folder / "people.csv").write_text("id,age,sex\n" + "".join(f"s{s:02d},30,F\n" for s in range(4)))
    (folder / "dataset.toml").write_text(recipes.RULE)
    status, _, err = recipes.run("--source", folder, "--cache", tmp_path / "cache", "--workers", 1)
    assert status == 0, err
    cache = Cache(tmp_path / "cache")
    drawn_by = PairSampler(cache, list(range(4)), 2.0, 1.0, {"event": 0.5, "augment": 0.5}, 32, 0)
    spans, within = drawn_by.partners["event"].spans, 0
    for step in range(20):
        pairs = drawn_by.draw(step)
        place_V = np.tile(pairs.kind_B, 2)
        held_LV = [
            [
                any(
                    spans.row_S[i] == row and spans.start_S[i] <= t and t + 200 <= spans.stop_S[i]
                    for i in np.flatnonzero(spans.what_S == what)
                )
                for row, t in zip(pairs.recording_V, pairs.start_V, strict=True)
            ]
            for what in range(len(spans.names))
        ]
        held_LV = np.array(held_LV)
        negative_VV = ~(pairs.alike_VV | pairs.excluded_VV)
        event_V, augment_V = (place_V == KINDS.index(kind) for kind in ("event", "augment"))
        only_V = event_V & (held_LV.sum(0) == 1)  # drawn for the one state it is in
        for state_V in held_LV:
            among_VV = (only_V & state_V)[:, None] & (augment_V & state_V)
            within += among_VV.sum()
            assert not (among_VV & negative_VV).any()
    assert within > 1000
