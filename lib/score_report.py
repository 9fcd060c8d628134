"""
The page about a decoder's scores: beside baselines, window by window, by subject, which electrodes and bands they need, how it was trained.
"""

import json
import math
from collections.abc import Sequence

from lib import autopsy, judgement, occlusion
from lib.cache import Cache
from lib.command import json_line
from lib.inference import Inference
from lib.judgement import Said
from lib.run import Run
from lib.store import write_atomic
from lib.targets import Examples, Target
from lib.windows import SEIZURE


def leave(
    run: Run, flags: dict, inference: Inference, examples: Examples, ways: dict[str, dict], said: Said | None, results: dict
) -> dict:  # fmt: skip
    """
    What a run leaves of a model's examples: predictions or events, scores, report; `results` with all of it.

    `ways` and `said` are those of lib/evaluation.py's `compare`; for the rest see `tell`.
    """
    cache, targets, folder, explained = examples.cache, inference.decoder.targets, run.directory, {}
    if said is None:
        results["events"] = str(folder / "events")
        judgement.write_events(folder / "events", *ways[SEIZURE]["model"], cache, 1 / inference.stretch_s)
    else:
        results["predictions"] = str(folder / "predictions.csv")
        write_atomic(folder / "predictions.csv", judgement.predictions_csv(targets, said, cache).encode())
    if most := flags["occlusion_windows"]:
        explained["sites"], explained["bands"] = occlusion.occlude(inference, examples, most)
    if flags["autopsy"]:
        results["autopsy"] = explained["autopsy"] = autopsy.dissect(inference, examples, most)
        results["worst"] = explained["worst"] = autopsy.worst_windows(inference, examples)
    return tell(run, flags, targets, cache, ways, results, explained)


def tell(
    run: Run, flags: dict, targets: Sequence[Target], cache: Cache, ways: dict[str, dict], results: dict, explained: dict | None = None
) -> dict:  # fmt: skip
    """
    Write scores.json and report.html of a run; `results` with the scores.

    `flags` are those of train_supervised.py, `ways` as in lib/judgement.py; `results` says what was `scored`, and has the threshold of
    seizures in `detection`, or in that of each of its `folds`; `explained` is as in `write`.
    """
    table = judgement.tabulate(targets, ways, cache, 1 / flags["stretch_s"], flags["resamples"])
    scores = run.directory / "scores.json"
    judgement.write_scores(scores, table)
    results |= judgement.summary(targets, table)
    results |= {"scores": str(scores), "report": str(run.directory / "report.html"), "seconds": round(run.seconds(), 1)}
    write(run, flags, targets, cache, ways, table, results, explained or {})
    return results


def write(
    run: Run, flags: dict, targets: Sequence[Target], cache: Cache, ways: dict[str, dict], table: list[dict], results: dict, explained: dict
) -> None:  # fmt: skip
    """
    report.html of a run, with its `table` of scores.

    `explained` has `sites` and `bands` of lib/occlusion.py, `autopsy` and `worst` of lib/autopsy.py, as far as they were asked for.
    """
    from lib import report  # here, as it brings matplotlib, which takes a second

    words = f"Scored on {results['scored']}. "
    if results["scored"] == "test":
        words += "The test split was opened for this page: choose nothing by it."
    told, people = "", ""
    for target in targets:
        own = ways[target.name]["model"]
        if target.source == SEIZURE:
            lines, found = own
            names = [cache.recordings[line.row].key for line in lines]
            each = [said["detection"]["threshold"] for said in results.get("folds", [results])]
            told += report.seizure_timeline(lines, found, names, each[0] if len(each) == 1 else math.nan)
            if len(each) > 1:
                told += report.paragraph(
                    f"Each fold has a threshold of its own, and none is drawn: {', '.join(map(str, each))}."
                )
        else:
            told += report.truth_against_said(target, own)
            people += report.by_subject(target, own)
    where = report.head(explained.get("sites", {}), "what the model needs, by place")
    where += report.bars(explained["bands"], "what the model needs, by frequency") if "bands" in explained else ""
    inside = ""
    if "autopsy" in explained:
        layers, worst = explained["autopsy"], explained["worst"]
        inside = report.rows_table(list(layers[0]), [list(row.values()) for row in layers])
        inside += "<h3>worst windows</h3>"
        inside += report.rows_table(["recording", "start (s)", "loss"], [list(row.values()) for row in worst])
    opened = zip(cache.paths, cache.manifests, strict=True)
    sources = [[str(path), m["sha256"][:16], m["counts"]["recordings"]] for path, m in opened]
    sections = [
        ("Scores", report.paragraph(words, warn=True) + report.score_tables(table)),
        ("What was said", told),
        ("By subject", people),
        ("Where and which frequencies", where),
        ("Curves", report.curves(run.lines())),
        ("Inside the model", inside),
        ("Command", report.verbatim((run.directory / "command.txt").read_text(encoding="utf-8"))),
        ("Cache", report.rows_table(["directory", "fingerprint", "recordings"], sources)),
        ("Flags", report.verbatim(json.dumps(json.loads(json_line(flags)), indent=1))),
    ]
    report.write(run.directory / "report.html", f"{' and '.join(flags['target'])}: {run.name}", sections)
