"""
A model beside what one would otherwise use: what is fitted on train and val, kept in the model's file, and held against other recordings.

Thresholds and baselines never see the recordings that are scored, unless these are val itself.

Shape letters: B examples, C classes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lib import classical, judgement
from lib.cache import Cache
from lib.inference import Inference
from lib.judgement import Said, Timeline
from lib.targets import Examples
from lib.transfer import Domain, Transfer
from lib.windows import SEIZURE

SECONDS = "baseline.seconds."  # names of tensors of the baseline of seizures
SECONDS_PER_WINDOW = 4  # that this baseline is fitted on, for each window that others are fitted on
FEATURES = 1000  # examples whose features say where the training data lie, if no number of them is given


@dataclass
class Fitted:
    """What a model's file keeps beside the weights: baselines, the thresholds of seizures, where the features of the training data lie."""

    baselines: list[list[classical.Baseline]]  # of each target
    detection: dict[str, float] | None = None  # threshold and morphology of the model's seizures
    seconds: classical.Linear | None = None  # the baseline of seizures
    detection_seconds: dict[str, float] | None = None  # its own threshold and morphology
    domain: Domain | None = None

    def pack(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """As metadata and tensors of a model's file."""
        described, tensors = classical.pack(self.baselines)
        if self.seconds:
            tensors |= {f"{SECONDS}{n}": torch.from_numpy(a) for n, a in vars(self.seconds).items()}
        if self.domain:
            tensors |= self.domain.tensors()
        meta = {"baselines": described, "detection": self.detection, "detection_seconds": self.detection_seconds}
        return meta, tensors

    @classmethod
    def unpack(cls, meta: dict, tensors: dict[str, torch.Tensor], targets: int) -> "Fitted":
        """What was packed."""
        own = {n.removeprefix(SECONDS): t.numpy() for n, t in tensors.items() if n.startswith(SECONDS)}
        return cls(
            classical.unpack(meta["baselines"], tensors, targets),
            meta["detection"],
            classical.Linear(**own) if own else None,
            meta["detection_seconds"],
            Domain.from_tensors(tensors) if any(n.startswith("domain.") for n in tensors) else None,
        )


def fit(
    inference: Inference, train: Examples, val: Examples, rows: dict[str, list[int]], most: int, transfer: Transfer
) -> Fitted:
    """
    Baselines on at most `most` training examples (0: none), thresholds on the recordings of val, by `rows` of each split.

    With transfer `recentre` baselines are recentred too, because a model may be compared only with what knows as much.
    """
    cache, targets = train.cache, range(len(train.targets))
    fitted = Fitted([[] for _ in targets])
    if train.coverage:
        lines, rate_hz = inference.timelines(val, rows["val"]), 1 / inference.stretch_s
        fitted.detection = judgement.choose_detection(lines, rate_hz)
        if most:
            fitted.seconds = classical.fit_seconds(cache, train, rows["train"], SECONDS_PER_WINDOW * most)
        if fitted.seconds:
            own = classical_timelines(cache, fitted.seconds, lines, inference.stretch_s)
            fitted.detection_seconds = judgement.choose_detection(own, rate_hz)
        return fitted
    if most:
        recentred = transfer == "recentre"
        fitted.baselines = [classical.fit_baselines(cache, train, k, most, recentred=recentred) for k in targets]
    fitted.domain = domain_of(inference, train, most)
    return fitted


def domain_of(inference: Inference, train: Examples, most: int = 0) -> Domain:
    """Where the features of the training data lie, by at most so many examples (0: some)."""
    return Domain.of(inference.features(train, train.even(most or FEATURES))[0].double().numpy())


def compare(
    inference: Inference, fitted: Fitted, examples: Examples, rows: Sequence[int], transfer: Transfer = "none"
) -> tuple[dict[str, dict], Said | None]:
    """
    What the model, the constant and the baselines say of recordings `rows`: per target and way Units, or timelines and found seizures.

    `hybrid` is the mean of what model and tangent space (of times: latency) say, of log-probabilities where there are classes. Also what the model says of each
    example, unless the target is seizures.
    """
    if examples.coverage:
        return {SEIZURE: compare_seizures(inference, fitted, examples, rows)}, None
    cache, ways = examples.cache, {}
    said = inference.predict(examples, np.arange(len(examples)), transfer, fitted.domain)
    for k, target in enumerate(examples.targets):
        own = judgement.units(target, k, said.said[k], said.y_BK, said.row_B, cache)
        ways[target.name] = {"model": own, "constant": replace(own, said_N=judgement.constant(target, len(own.y_N)))}
        known_B = np.flatnonzero(np.isfinite(said.y_BK[:, k]))
        row_B, start_B = said.row_B[known_B], said.start_B[known_B]
        for baseline in fitted.baselines[k]:
            if baseline.recentred and transfer != "recentre":
                continue
            if not baseline.sites.fits(cache, np.unique(row_B).tolist()):
                words = f"{baseline.title} of {target.name} is left out: other electrodes than it was fitted on"
                print(words, file=sys.stderr)
                continue
            told_BC = np.full((len(said.row_B), max(1, len(target.classes))), np.nan)
            told_BC[known_B] = baseline.say(cache, target, row_B, start_B, examples.samples)
            ways[target.name][baseline.title] = judgement.units(target, k, told_BC, said.y_BK, said.row_B, cache)
            partner = ("latency", False) if target.timed else ("tangent_space", transfer == "recentre")
            if (baseline.name, baseline.recentred) == partner:
                both_BC = hybrid(said.said[k], told_BC, bool(target.classes))
                ways[target.name]["hybrid"] = judgement.units(target, k, both_BC, said.y_BK, said.row_B, cache)
    return ways, said


def hybrid(a_BC: np.ndarray, b_BC: np.ndarray, classes: bool) -> np.ndarray:
    """The mean of what two models say: of numbers, or of the logarithms of probabilities."""
    if not classes:
        return (a_BC + b_BC) / 2
    return classical.probabilities((np.log(a_BC + 1e-9) + np.log(b_BC + 1e-9)) / 2)


def compare_seizures(inference: Inference, fitted: Fitted, examples: Examples, rows: Sequence[int]) -> dict[str, tuple]:
    """Timelines of recordings and the seizures found in them, by the model, by what never finds one, and by the baseline."""
    rate_hz, lines = 1 / inference.stretch_s, inference.timelines(examples, rows)
    ways = {"model": judgement.detected(lines, fitted.detection, rate_hz)}
    ways["constant"] = lines, [np.empty((0, 2))] * len(lines)
    if fitted.seconds is not None:
        own = classical_timelines(examples.cache, fitted.seconds, lines, inference.stretch_s)
        ways["band_power"] = judgement.detected(own, fitted.detection_seconds, rate_hz)
    return ways


def classical_timelines(
    cache: Cache, seconds: classical.Linear, lines: Sequence[Timeline], stretch_s: float
) -> list[Timeline]:
    """The same recordings as the classical baseline sees them."""
    return [replace(x, probability_T=classical.along(cache, seconds, x.row, stretch_s)) for x in lines]
