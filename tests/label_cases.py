"""
Label files as they are found in archives: 20 of TUSZ's .csv_bi and 15 BIDS data sets, one of each in order.

CSV_BI_CASES maps a name to a CsvBiCase about a recording of DURATION_S seconds called STEM.edf. BIDS_CASES maps a name to a BidsCase;
`write_bids(root, case, write_recording)` writes one, where `write_recording(path)` makes a recording of DURATION_S seconds or more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DURATION_S = 60.0
STEM = "aaaaaaac_s001_t000"


@dataclass(frozen=True)
class CsvBiCase:
    data: bytes | None  # None: the file is missing
    expected: str | list[tuple[float, float]]  # the code it is quarantined under, or the seizures
    rejected: int = 0  # rows
    note: str = ""  # how a note begins


def csv_bi(
    *rows: str, duration: str = "60.0000 secs", header: str = "channel,start_time,stop_time,label,confidence"
) -> bytes:
    """A file as TUSZ writes it."""
    comments = ["# version = csv_v1.0.0", f"# bname = {STEM}", f"# duration = {duration}", "#"]
    return "\n".join([*comments, *([header] if header else []), *rows, ""]).encode()


def csv_bi_cases() -> dict[str, CsvBiCase]:
    seizure, truth = "TERM,10.0000,15.0000,seiz,1.0000", [(10.0, 15.0)]
    background = "TERM,0.0000,10.0000,bckg,1.0000", "TERM,15.0000,60.0000,bckg,1.0000"
    clean = csv_bi(background[0], seizure, background[1])
    left_out = "table rows left out"
    return {
        "clean": CsvBiCase(clean, truth),
        "missing": CsvBiCase(None, "labels_missing"),
        "empty": CsvBiCase(b"", "labels_empty"),
        "no_rows": CsvBiCase(csv_bi(), "labels_empty"),
        "upper_case_label": CsvBiCase(clean.replace(b"seiz", b"SEIZ"), truth),
        "unknown_label": CsvBiCase(clean.replace(b"seiz", b"sezi"), "label_unknown"),
        "spaces_after_commas": CsvBiCase(clean.replace(b",", b", "), truth),
        "negative_start": CsvBiCase(
            csv_bi("TERM,-3.0000,5.0000,seiz,1.0000"), [(0.0, 5.0)], note="seizure rows clipped"
        ),
        "stop_before_start": CsvBiCase(csv_bi(seizure, "TERM,45.0,40.0,seiz,1.0"), truth, rejected=1, note=left_out),
        "runs_past_end": CsvBiCase(
            csv_bi("TERM,55.0000,75.0000,seiz,1.0000"), [(55.0, 60.0)], note="seizure rows clipped"
        ),
        "wholly_past_end": CsvBiCase(csv_bi(seizure, "TERM,70.0000,75.0000,seiz,1.0000"), "label_out_of_range"),
        "no_header_row": CsvBiCase(csv_bi(background[0], seizure, background[1], header=""), truth),
        "tab_separated": CsvBiCase(clean.replace(b",", b"\t"), truth),
        "per_channel": CsvBiCase(csv_bi("FP1-F7,10.0,15.0,fnsz,1.0", "F7-T3,9.0,16.0,fnsz,1.0"), "labels_per_channel"),
        "latin1_comment": CsvBiCase("# annotated by Böhm\n".encode("latin-1") + clean, truth),
        "extra_column": CsvBiCase(csv_bi(seizure, "TERM,40.0,45.0,seiz,1.0,checked"), truth, rejected=1, note=left_out),
        "short_row": CsvBiCase(csv_bi(seizure, "TERM,40.0"), truth, rejected=1, note=left_out),
        "nan_time": CsvBiCase(csv_bi(seizure, "TERM,nan,45.0,seiz,1.0"), truth, rejected=1, note=left_out),
        "other_duration": CsvBiCase(
            csv_bi(seizure, duration="58.5000 secs"), truth, note="labels and recording differ"
        ),
        "bom_and_crlf": CsvBiCase(b"\xef\xbb\xbf" + clean.replace(b"\n", b"\r\n"), truth),
    }


CSV_BI_CASES = csv_bi_cases()


@dataclass(frozen=True)
class BidsCase:
    files: dict[str, bytes]  # sidecars, by path below the data set
    traits: dict[str, float | str]  # what is known of subject 01, and nothing else is
    events: list[tuple[float, float, str]]  # onset_s, duration_s, label of the first recording
    note: str = ""  # how a note begins
    recordings: tuple[str, ...] = tuple(f"sub-{s}/eeg/sub-{s}_task-rest_eeg.edf" for s in ("01", "02", "03"))
    subjects: tuple[str, ...] = ("01", "02", "03")


def bids_cases() -> dict[str, BidsCase]:
    people = b"participant_id\tage\tsex\tp_factor\nsub-01\t9.5\tF\t0.25\nsub-02\t12\tM\t-0.5\nsub-03\t8\tM\t0\n"
    traits = {"age": 9.5, "sex": "F", "p_factor": 0.25}
    stimuli = b"onset\tduration\ttrial_type\n1.5\t0.5\tgo\n10.25\tn/a\tstop\n"
    events = [(1.5, 0.5, "go"), (10.25, 0.0, "stop")]
    table, own = "participants.tsv", "sub-01/eeg/sub-01_task-rest_events.tsv"

    def case(
        participants: bytes | None = people,
        stimuli: bytes | None = stimuli,
        traits=traits,
        events=events,
        note="",
        **files,
    ):
        given = {
            table: participants,
            own: stimuli,
            "dataset_description.json": b'{"Name": "case", "BIDSVersion": "1.8.0"}',
            **files,
        }
        return BidsCase({name: data for name, data in given.items() if data is not None}, traits, events, note)

    session = "sub-01/ses-a/eeg/sub-01_ses-a_task-rest_run-{}_eeg.edf"
    inherited = {
        table: people,
        "task-rest_events.tsv": b"onset\tduration\ttrial_type\n1\t0\troot\n",
        "sub-01/ses-a/sub-01_ses-a_task-rest_events.tsv": stimuli,
        "sub-01/ses-a/eeg/sub-01_ses-a_task-rest_run-2_events.tsv": b"onset\tduration\ttrial_type\n2\t0\tanother run\n",
        "sub-01/ses-a/eeg/sub-01_ses-a_task-movie_events.tsv": b"onset\tduration\ttrial_type\n2\t0\tanother task\n",
    }
    return {
        "clean": case(),
        "subject_absent": case(people.replace(b"sub-01", b"sub-99"), traits={}, note="subjects without a row"),
        "one_column": case(b"participant_id\nsub-01\nsub-02\nsub-03\n", traits={}),
        "bom": case(b"\xef\xbb\xbf" + people, b"\xef\xbb\xbf" + stimuli),
        "latin1": case(
            people.replace(b"\tp_factor", b"\tp_factor\tsite").replace(b"0.25", "0.25\tKöln".encode("latin-1")),
            traits=traits | {"site": "Köln"},
        ),
        "missing_values": case(people.replace(b"9.5\tF\t0.25", b"n/a\t\tNaN"), traits={}),
        "decimal_comma": case(people.replace(b".", b","), stimuli.replace(b".", b",")),
        "duplicate_rows": case(
            people + b"sub-01\t11\tF\t0.25\n", traits={"sex": "F", "p_factor": 0.25}, note="participants contradict"
        ),
        "sex_codes": case(
            people.replace(b"\tF\t", b"\t1\t").replace(b"12\tM", b"12\tmale"),
            traits={"age": 9.5, "p_factor": 0.25},
            note="participants values left out",
        ),
        "crlf_and_spaces": case(
            people.replace(b"\tage", b"\t age ").replace(b"\n", b"\r\n"),
            stimuli.replace(b"onset", b" onset ").replace(b"\n", b"\r\n"),
        ),
        "onset_missing": case(stimuli=stimuli + b"n/a\t1\tlost\n\t1\tlost\n", note="table rows left out: 2 of 4"),
        "no_onset_column": case(
            stimuli=stimuli.replace(b"onset", b"start"), events=[], note="events file without onset"
        ),
        "no_events_file": case(stimuli=None, events=[]),
        "inheritance": BidsCase(
            inherited,
            traits,
            events,
            recordings=(session.format(1), session.format(2), *BidsCase.recordings[1:]),
            subjects=("01", "01", "02", "03"),
        ),
        "case_and_prefix": case(
            b"Participant_ID\tAge\tSEX\tp_factor\n01\t9.5\tf\t0.25\nSUB-02\t12\tm\t-0.5\nSub-03\t8\tm\t0\n",
            stimuli.replace(b"onset", b"Onset").replace(b"trial_type", b"Trial_type"),
        ),
    }


BIDS_CASES = bids_cases()


def write_bids(root: Path, case: BidsCase, write_recording: Callable[[Path], object]) -> None:
    """Write a data set of BIDS_CASES."""
    for relative, data in case.files.items():
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).write_bytes(data)
    for relative in case.recordings:
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        write_recording(root / relative)
