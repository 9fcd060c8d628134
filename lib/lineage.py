"""
Whom and what an encoder was trained on, and the guard against evaluating it on the same.

Every encoder file says so of itself (`trained_on`) and of all encoders it was started from (`inherited`). Subjects are kept as hashes, so
that a published file lists nobody; they are found again only in caches that name them alike (data set and subject, or its pseudonym).
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from lib.cache import Cache
from lib.errors import Unusable

WAVEFORM = 5.0  # how loud raw samples start where a waveform is what counts


def digest(subject: str) -> str:
    """16 hexadecimal digits that stand for a "dataset/subject"."""
    return hashlib.sha256(subject.encode()).hexdigest()[:16]


def trained_on(cache: Cache, rows: Iterable[int], auxiliary: Sequence[str] = ()) -> dict:
    """What an encoder's metadata says of its own training: the subjects of recordings `rows`, and columns that were targets."""
    subjects = sorted({digest(cache.recordings[i].subject) for i in rows})
    return {"subjects": subjects, "auxiliary": [name.partition(":")[0] for name in auxiliary]}


def inherited(meta: dict, path: str | Path) -> list[dict]:
    """The lineage of what is trained or tuned from an encoder file: its own, and itself."""
    own = {name: meta[name] for name in ("run", "step", "subjects", "auxiliary", "waveform") if name in meta}
    return [*meta["lineage"], {"file": str(path), **own}]


def waveform_factor(asked: float | None, needed: bool, lineage: Sequence[dict]) -> float:
    """What a phase multiplies the weights of raw samples by: as asked, else, if waveforms are needed, what WAVEFORM lacks after earlier phases."""
    so_far = math.prod(phase.get("waveform", 1.0) for phase in lineage)
    if asked is not None:
        return asked
    return WAVEFORM / so_far if needed and so_far else 1.0


def auxiliary_targets(lineage: Sequence[dict]) -> list[str]:
    """Every column that was an auxiliary target on the way."""
    return sorted({name for phase in lineage for name in phase.get("auxiliary", ())})


def check_leak(
    lineage: Sequence[dict], subjects: Iterable[str], labels: Iterable[str], allow: bool = False
) -> list[str]:
    """
    One line for each leak from training into an evaluation of `labels` on `subjects` ("dataset/subject").

    Raises Unusable for the first one, unless it is allowed.
    """
    subjects, labels, leaks = sorted(set(subjects)), {label.casefold() for label in labels}, []
    for phase in lineage:
        if "subjects" not in phase or "auxiliary" not in phase:
            leaks.append(f"{phase['file']} doesn't say which subjects it was trained on")
            continue
        targets = [name for name in phase["auxiliary"] if name.casefold() in labels]
        if targets:
            verb = "was an auxiliary target" if len(targets) == 1 else "were auxiliary targets"
            leaks.append(f"{', '.join(targets)} {verb} of {phase['file']}")
        seen = set(phase["subjects"])
        known = [subject for subject in subjects if digest(subject) in seen]
        if known:
            leaks.append(
                f"{phase['file']} was trained on {len(known)} of the {len(subjects)} subjects to be evaluated ({known[0]} …)"
            )
    if leaks and not allow:
        raise Unusable(f"{leaks[0]}: evaluate on others, or give --allow-leak to do it anyway")
    return leaks
