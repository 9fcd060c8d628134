"""Text labels: what is right is read, what is wrong is named, and nothing that is missing turns into background or zero."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import labels
from lib.errors import Rejected, Unusable
from lib.manifest import to_signal_time
from lib.recordings import Event
from tests.label_cases import CSV_BI_CASES, DURATION_S, STEM, csv_bi


@pytest.mark.parametrize("name", CSV_BI_CASES)
def test_csv_bi_case(name, tmp_path):
    case, path = CSV_BI_CASES[name], tmp_path / f"{STEM}.csv_bi"
    if case.data is not None:
        path.write_bytes(case.data)
    if isinstance(case.expected, str):
        with pytest.raises(Rejected) as error:
            labels.read_csv_bi(path, DURATION_S)
        assert error.value.code == case.expected
        assert path.name in error.value.reason
        return
    found = labels.read_csv_bi(path, DURATION_S)
    assert found.intervals == case.expected
    assert len(found.rows_rejected) == case.rejected
    assert any(note.startswith(case.note) for note in found.notes) if case.note else not found.notes


def test_there_are_20_csv_bi_cases():
    assert len(CSV_BI_CASES) == 20


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("row", ["TERM,45.0,40.0,seiz,1.0", "TERM,40.0", "TERM,nan,nan,seiz,1.0", "TERM,1,2,seiz,1,x"])
def test_a_lost_seizure_is_no_background(tmp_path, row):
    """Where no seizure is left because a row was wrong, the recording is refused."""
    path = write(tmp_path / f"{STEM}.csv_bi", csv_bi("TERM,0.0,10.0,bckg,1.0", row))
    with pytest.raises(Rejected, match="labels_rejected"):
        labels.read_csv_bi(path, DURATION_S)
    path = write(tmp_path / f"{STEM}.csv_bi", csv_bi("TERM,0.0,60.0,bckg,1.0", "TERM,9.0,5.0,bckg,1.0"))
    assert labels.read_csv_bi(path, DURATION_S).intervals == []


def test_per_channel_labels_are_a_union_only_when_asked(tmp_path):
    rows = "FP1-F7,0.0,10.0,bckg,1.0", "FP1-F7,10.0,15.0,fnsz,1.0", "F7-T3,14.0,16.0,FNSZ,1.0", "F7-T3,30,31,mysz,1.0"
    path = write(tmp_path / f"{STEM}.csv", csv_bi(*rows))
    assert labels.read_csv_channels(path, DURATION_S).intervals == [(10.0, 16.0), (30.0, 31.0)]
    for kind in "seiz fnsz gnsz spsz cpsz absz tnsz cnsz tcsz atsz mysz nesz".split():
        write(path, csv_bi(f"C3-CZ,1.0,2.0,{kind},1.0"))
        assert labels.read_csv_channels(path, DURATION_S).intervals == [(1.0, 2.0)]


def test_a_label_file_of_another_recording_is_noted(tmp_path):
    path = write(tmp_path / "aaaaaaaz_s001_t000.csv_bi", csv_bi("TERM,10.0,15.0,seiz,1.0"))
    assert labels.read_csv_bi(path, DURATION_S).notes == [
        f"labels are of another recording by name: {path.name} is for {STEM}"
    ]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300) | st.text(alphabet='TERM,;\t0123456789.-nabckgseiz"#\n\r\x00\x85', max_size=200))
def test_any_bytes_are_labels_or_are_refused(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("any") / "x.csv_bi", data)
    try:
        found = labels.read_csv_bi(path, DURATION_S)
    except Rejected:
        return
    assert all(0 <= start < stop <= DURATION_S for start, stop in found.intervals)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9))))
def test_merged_intervals_cover_the_same_and_are_apart(pairs):
    intervals = [(float(a), float(a + n)) for a, n in pairs]
    merged = labels.merge(intervals)
    assert {t for a, b in merged for t in range(int(a), int(b))} == {
        t for a, b in intervals for t in range(int(a), int(b))
    }
    assert all(b < c for (_, b), (c, _) in zip(merged, merged[1:], strict=False))


def test_numbers_are_finite_or_nothing():
    assert [labels.number(t) for t in ("1", " -2.5 ", "1e3", ".5")] == [1.0, -2.5, 1000.0, 0.5]
    assert [labels.number(t) for t in ("", "n/a", "nan", "inf", "1e999", "1_0", "0x1", "1,5", "12 s")] == [None] * 9
    assert labels.number("1,5", decimal_comma=True) == 1.5
    assert labels.has_decimal_comma(["9,5", "10"]) and labels.has_decimal_comma(["0,125"])
    assert not labels.has_decimal_comma(["1,234"]) and not labels.has_decimal_comma(["9,5", "1.5"])


# --- events -----------------------------------------------------------------------------------------------------------------------


def read_events(tmp_path, text):
    return labels.read_events_tsv(write(tmp_path / "sub-01_task-x_events.tsv", text))


def triples(events):
    return [(e.onset_s, e.duration_s, e.label) for e in events]


def test_hbn_events_come_through_as_they_are(tmp_path):
    text = (
        "onset\tduration\tvalue\tevent_code\tfeedback\n"
        "6.084\tn/a\tcontrastTrial_start\t5\tn/a\n"
        "8.884\tn/a\tright_target\t9\tn/a\n"
        "0.000\tn/a\tbreak cnt\tbreak cnt\tn/a\n"
        "11.014\tn/a\tright_buttonPress\t13\tsmiley_face\n"
        "12.5\tn/a\tn/a\tboundary\tn/a\n"
    )
    events, notes = read_events(tmp_path, text)
    assert notes == []
    assert triples(events) == [
        (0.0, 0.0, "break cnt"),
        (6.084, 0.0, "contrastTrial_start"),
        (8.884, 0.0, "right_target"),
        (11.014, 0.0, "right_buttonPress"),
        (12.5, 0.0, "boundary"),
    ]
    assert all(math.isnan(e.value) for e in events)


def test_label_and_value_columns(tmp_path):
    events, _ = read_events(
        tmp_path, "onset\tduration\ttrial_type\tvalue\tresponse_time\n1\t0\tgo\t7\t0.41\n2\t0\tn/a\t8\tn/a\n"
    )
    assert [(e.label, e.value) for e in events[:1]] == [("go", 0.41)]
    assert events[1].label == "8" and math.isnan(events[1].value)
    # a trial_type that never says more than `stimulus` yields to the marker
    events, _ = read_events(
        tmp_path, "onset\tduration\ttrial_type\tvalue\n1\t0\tstimulus\tleft\n2\t0\tresponse\tright\n"
    )
    assert [e.label for e in events] == ["left", "right"]
    events, _ = read_events(tmp_path, "onset\tduration\teventType\tconfidence\n0\t5\tsz_foc_ia\tn/a\n")
    assert triples(events) == [(0.0, 5.0, "sz_foc_ia")]


def test_wrong_rows_are_left_out_and_named(tmp_path):
    text = "onset\tduration\ttrial_type\n1\t0\ta\nx\t0\tb\n2\t-1\tc\n3\tlong\td\n4\t0\tn/a\n5\t0\te\textra\n6\t\tf\n"
    events, notes = read_events(tmp_path, text)
    assert triples(events) == [(1.0, 0.0, "a"), (6.0, 0.0, "f")]
    assert len(notes) == 1 and notes[0].startswith("table rows left out: 5 of 7") and "line 3: onset 'x'" in notes[0]


def test_a_stray_quote_swallows_nothing(tmp_path):
    events, _ = read_events(tmp_path, 'onset\tduration\ttrial_type\n1\t0\t"said "a\n2\t0\tb\n3\t0\t"quoted"\n')
    assert len(events) == 3 and [e.label for e in events[1:]] == ["b", "quoted"]


def test_a_missing_or_empty_events_file_is_a_note(tmp_path):
    assert labels.read_events_tsv(tmp_path / "none_events.tsv")[0] == []
    events, notes = read_events(tmp_path, "")
    assert events == [] and notes[0].startswith("events file without onset column")


def test_eyes_open_and_closed_hold_until_the_next_instruction():
    cues = [(0.0, "resting_start"), (46.5, "instructed_toOpenEyes"), (66.5, "instructed_toCloseEyes")]
    cues += [(106.5, "instructed_toOpenEyes"), (126.5, "instructed_toCloseEyes"), (166.5, "instructed_toOpenEyes")]
    events = [Event(t, 2.5 if "instructed" in label else 0.0, label) for t, label in cues]  # 2.5 s is the voice
    found = labels.normalise_events(events, "RestingState", 400.0)
    assert [e for e in found if e in events] == events
    assert triples(e for e in found if e not in events) == [
        (46.5, 20.0, "eyes_open"),
        (66.5, 40.0, "eyes_closed"),
        (106.5, 20.0, "eyes_open"),
        (126.5, 40.0, "eyes_closed"),
        (166.5, 20.0, "eyes_open"),  # no longer than the others, although the recording goes on
    ]
    ended = labels.normalise_events([*events, Event(180.0, 0.0, "break cnt")], "RestingState", 400.0)
    assert (166.5, 13.5, "eyes_open") in triples(ended)
    short = labels.normalise_events(events[:2], "RestingState", 60.0)
    assert triples(short)[-1] == (46.5, 13.5, "eyes_open")


@pytest.mark.parametrize("task", ["DespicableMe", "film", "movie", "VideoTask"])
def test_a_film_without_triggers_is_no_movie(task):
    assert [e.label for e in labels.normalise_events([Event(1.0, 0.0, "x")], task, 60.0)] == ["x"]


def test_a_movie_that_begins_where_nothing_is_stored_says_how_much_has_gone_by():
    segments = [(0, 1000, 0.0), (1000, 2000, 20.0)]  # ten seconds, ten of nothing, ten more

    def placed(onset_s, duration_s, label, value=math.nan):
        e = to_signal_time(Event(onset_s, duration_s, label, value), segments, 100.0)
        return (e.onset_s, e.duration_s, None if math.isnan(e.value) else e.value)

    assert placed(5.0, 20.0, "movie:x", 7.0) == (5.0, 10.0, None)  # a table's value is no time
    assert placed(12.0, 18.0, "movie:x") == (10.0, 10.0, 8.0)
    assert placed(20.0, 5.0, "movie:x") == (10.0, 5.0, None)
    assert placed(12.0, 18.0, "look", 7.0) == (10.0, 10.0, 7.0)


def test_movies_run_from_start_to_stop():
    events = [Event(5.0, 0.0, "video_start"), Event(208.1, 0.0, "video_stop")]
    found = labels.normalise_events(events, "ThePresent", 220.0)
    assert (5.0, pytest.approx(203.1), "movie:ThePresent") in triples(found)
    cut = labels.normalise_events(events[:1], "thepresent", 100.0)  # the recording ended within the film
    assert triples(cut)[-1] == (5.0, 95.0, "movie:ThePresent")
    assert labels.normalise_events(events, "surroundSupp", 220.0) == events
    assert labels.normalise_events(events[:1], "movie2", 220.0) == events[:1]
    assert (1.0, 9.0, "movie:rest") in triples(labels.normalise_events([Event(1.0, 9.0, "movie")], "rest", 20.0))


def test_responses_lie_between_their_target_and_the_next_trial():
    rows = [(0.0, "contrastTrial_start"), (1.0, "left_buttonPress"), (2.0, "right_target"), (3.5, "right_buttonPress")]
    rows += [(4.0, "right_buttonPress"), (5.0, "contrastTrial_start"), (7.0, "left_target")]
    rows += [
        (10.0, "contrastTrial_start"),
        (11.0, "left_buttonPress"),
        (12.0, "contrastTrial_start"),
        (13.0, "left_target"),
    ]
    rows += [(14.25, "left_buttonPress")]
    found = labels.normalise_events([Event(t, 0.0, label) for t, label in rows], "contrastChangeDetection", 20.0)
    stimuli = [(e.onset_s, e.value) for e in found if e.label == "stimulus"]
    assert [s for s, _ in stimuli] == [2.0, 7.0, 13.0]
    assert stimuli[0][1] == 1.5 and math.isnan(stimuli[1][1]) and stimuli[2][1] == 1.25
    assert [(e.onset_s, e.value) for e in found if e.label == "response"] == [(3.5, 1.5), (14.25, 1.25)]


def test_seizures_by_any_of_their_names():
    events = [Event(1.0, 4.0, "sz_foc_ia"), Event(4.0, 6.0, "FNSZ"), Event(20.0, 0.0, "sz"), Event(30.0, 5.0, "szene")]
    events += [Event(40.0, 60.0, "bckg"), Event(50.0, 2.0, "seizure")]
    found = labels.normalise_events(events)
    assert triples(e for e in found if e.label == "seizure") == [(1.0, 9.0, "seizure"), (50.0, 2.0, "seizure")]
    assert labels.normalise_events(found) == found


# --- participants -----------------------------------------------------------------------------------------------------------------


def read_people(tmp_path, text, name="participants.tsv", **options):
    return labels.read_participants(write(tmp_path / name, text), **options)


def test_hbn_participants(tmp_path):
    text = (
        "participant_id\trelease_number\tsex\tage\tehq_total\tcommercial_use\tfull_pheno\tp_factor\tattention\tinternalizing\t"
        "externalizing\tRestingState\n"
        "sub-NDARAC904DMU\tR1\tM\t9.2414\t95.53\tYes\tYes\t0.103\t-0.555\t-0.205\t0.123\tavailable\n"
        "sub-NDARAM704GKZ\tR1\tF\t13.35\tn/a\tYes\tNo\tn/a\tn/a\tn/a\tn/a\tunavailable\n"
    )
    people, notes = read_people(tmp_path, text)
    assert notes == []
    assert people["NDARAM704GKZ"] == {
        "release_number": "R1", "sex": "F", "age": 13.35, "commercial_use": "Yes", "full_pheno": "No", "RestingState": "unavailable"
    }  # fmt: skip
    assert people["NDARAC904DMU"]["externalizing"] == 0.123 and people["NDARAC904DMU"]["ehq_total"] == 95.53


def test_numbers_words_and_sexes(tmp_path):
    text = "participant_id\tage\tsex\tgroup\tcode\n1\t89+\tfemale\t1\tx1\n2\t30\tMALE\t2\t7\n3\tunknown\tother\tnone\tn/a\n"
    people, notes = read_people(tmp_path, text)
    assert people["1"] == {"sex": "F", "group": 1.0, "code": "x1"}
    assert people["2"] == {"age": 30.0, "sex": "M", "group": 2.0, "code": "7"}
    assert people["3"] == {}
    assert len(notes) == 2 and "age" in notes[0] and "89+" in notes[0] and "other" in notes[1]


def test_sex_codes_need_their_meaning(tmp_path):
    text = "participant_id\tsex\nsub-1\t0\nsub-2\t1\n"
    people, notes = read_people(tmp_path, text)
    assert people == {"1": {}, "2": {}} and "0, 1" in notes[0]
    write(tmp_path / "participants.json", '{"Sex": {"Levels": {"0": "female", "1": {"Description": "Male"}}}}')
    assert read_people(tmp_path, text) == ({"1": {"sex": "F"}, "2": {"sex": "M"}}, [])
    write(tmp_path / "participants.json", "no json")
    assert read_people(tmp_path, text, renames={"sex": {"0": "M", "1": "F"}})[0] == {
        "1": {"sex": "M"},
        "2": {"sex": "F"},
    }


def test_stated_columns(tmp_path):
    text = "Subject;Age;Gender\nSubject00;21,5;F\nSubject01;18,0;M\nmean;19,75;\n"
    options = {
        "id_column": "Subject",
        "id_pattern": r"Subject(?P<subject>\d+)",
        "columns": {"age": "Age", "sex": "Gender"},
    }
    people, notes = read_people(tmp_path, text, "info.csv", **options)
    assert people == {"00": {"age": 21.5, "sex": "F"}, "01": {"age": 18.0, "sex": "M"}}
    assert notes[0].startswith("table rows left out: 1 of 3") and "'mean'" in notes[0]
    with pytest.raises(Unusable, match="no column 'Years'.*Age"):
        read_people(tmp_path, text, "info.csv", **options | {"columns": {"age": "Years"}})
    with pytest.raises(Unusable, match="participant_id"):
        read_people(tmp_path, text, "info.csv")
    with pytest.raises(Unusable, match="none.csv"):
        labels.read_participants(tmp_path / "none.csv")


def test_contradicting_rows_leave_a_value_missing(tmp_path):
    text = "participant_id\tage\tsex\nsub-1\t9\tF\nsub-1\t10\tF\nsub-1\t\tF\nsub-2\t8\tM\n"
    people, notes = read_people(tmp_path, text)
    assert people == {"1": {"sex": "F"}, "2": {"age": 8.0, "sex": "M"}}
    assert notes == ["participants contradict themselves: age of 1 in participants.tsv is 9.0 and 10.0"]
