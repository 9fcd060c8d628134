"""
The page about a decoder's scores: beside baselines, window by window, by subject, which electrodes and bands they need, how it was trained.
"""

import json
import math

from lib.cache import Cache
from lib.command import json_line
from lib.run import Run
from lib.targets import Target
from lib.windows import SEIZURE


def write(
    run: Run, flags: dict, targets: list[Target], cache: Cache, ways: dict[str, dict], table: list[dict], results: dict, explained: dict
) -> None:  # fmt: skip
    """
    report.html of a run.

    `ways` and `table` are as in lib/judgement.py; `results` says what was `scored`, and has the threshold of seizures in `detection`, or in that of each of its `folds`;
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
