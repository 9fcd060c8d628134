"""
Recordings as a flow learns them: windows whitened by filters of their own, their level divided out, with codes of what is known of them.

Shape letters: R recordings, B windows, C channels, T samples, F conditions, Q rhythms, X = F + 2 Q.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lib import conditions
from lib.batches import Part
from lib.corpus import Corpus, even, fit_corpus, for_strangers
from lib.errors import Unusable
from lib.lineage import digest
from lib.whitening import Whitening

SEEN, LEAST, ALL = (
    512,
    32,
    2**14,
)  # windows that `fit_rest` measures: most and fewest of a group; about so many of all groups, or channels
REMEMBERED = 2**26  # samples of white windows, 256 MB


@dataclass
class White:
    """Some windows of one number of channels."""

    x1_BCT: torch.Tensor  # whitened, level divided out, what rhythms repeat and what hums taken off, flattened
    code_BX: torch.Tensor  # conditions, NaN where unknown, the level last, then the rhythms
    raw_BCT: torch.Tensor  # in the cache's unit, as an encoder takes it
    positions_BC3: torch.Tensor
    mask_BC: torch.Tensor | None  # None: every channel is good
    recording_B: np.ndarray
    index_B: np.ndarray  # places in the batch that was asked for


@dataclass
class Target:
    """What turns recordings into what is learned: windows, filters, conditions."""

    corpus: Corpus
    whiten: Whitening
    group_R: np.ndarray  # filter of each recording
    code_RF: torch.Tensor  # conditions of each recording
    level: bool  # whether a window's RMS is divided out and a condition

    def __post_init__(self):
        self.place_RC = self.corpus.places(self.whiten.channels)  # which of the filters' channels are a recording's
        self._made = {}  # (recording, start): white window and codes, where they take longer to make than to learn from

    def read(
        self,
        recording_B: np.ndarray,
        start_B: np.ndarray,
        index_B: np.ndarray,
        max_channels: int,
        micro: int,
        seed: int,
        step: int,
    ) -> list[White]:
        """Windows in micro-batches; which channels a window keeps depends on (seed, step, index) alone."""
        found = []
        for part in self.corpus.read(recording_B, start_B, index_B, max_channels, micro, seed, step):
            own_B = start_B[np.searchsorted(index_B, part.index_B)]
            x1_BCT, code_BX = self._known(part, own_B) if self._slow(part) else self._make(part)
            raw_BCT = part.x_BCT[:, :, self.corpus.before :].contiguous()
            of = (part.positions_BC3, part.mask_BC, part.recording_B, part.index_B)
            found.append(White(x1_BCT, code_BX, raw_BCT, *of))
        return found

    def _slow(self, part: Part) -> bool:
        """Whether the phases of what a machine repeats are looked for, in windows of recordings of one channel, which is always kept."""
        alone = all(len(self.corpus.recordings[row].names) == 1 for row in part.recording_B)
        return self.whiten.repeats is not None and alone

    def _known(self, part: Part, start_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """`_make` for windows of one channel, of which those met before are remembered."""
        keys = [*zip(part.recording_B.tolist(), start_B.tolist(), strict=True)]
        new, made = [b for b, key in enumerate(keys) if key not in self._made], {}
        if new:
            made = {keys[b]: (x1_CT, code_X) for b, x1_CT, code_X in zip(new, *self._make(part.some(new)), strict=True)}
        x1_BCT, code_BX = (
            torch.stack(rows) for rows in zip(*(made.get(k) or self._made[k] for k in keys), strict=True)
        )
        if len(self._made) * x1_BCT.shape[2] < REMEMBERED:
            self._made |= {key: (x1_CT.clone(), code_X.clone()) for key, (x1_CT, code_X) in made.items()}
        return x1_BCT, code_BX

    def _make(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """White windows (B, C, T) and their codes (B, X)."""
        row_B, group_B, whiten = part.recording_B, self.group_R[part.recording_B], self.whiten
        place_BC = np.take_along_axis(self.place_RC[row_B], part.kept_BC.numpy(), 1)
        x1_BCT, level_B = whiten.whiten(part.x_BCT, group_B, part.mask_BC, self.level, place_BC)
        code_BF = self.code_RF[torch.from_numpy(row_B)]
        code_BF[:, -1] = level_B if self.level else math.nan
        rhythm_BQ2 = whiten.rhythms(x1_BCT, group_B, part.mask_BC)
        if rhythm_BQ2.shape[1] and x1_BCT.shape[1] == 1:
            x1_BCT = x1_BCT - whiten.repeated(rhythm_BQ2, group_B, x1_BCT.shape[2])
        return whiten.settled(x1_BCT, group_B), torch.cat([code_BF, rhythm_BQ2], 1)


def fit_target(
    corpus: Corpus,
    *,
    label: Sequence[str],
    domain: Sequence[str],
    speed: str,
    traits: Sequence[str],
    by_recording: bool,
    order: int,
    rhythms: int,
    unmix: bool,
    level: bool,
    hum: bool,
    flatten: bool,
) -> tuple[Target, Whitening, list[conditions.Condition], Counter]:
    """
    What makes windows, the part of it that the training recordings told, conditions, and which values of others these don't know, counted.

    Raises Unusable for columns that no training recording has.
    """
    whiten, group_R = fit_corpus(corpus, by_recording, order, rhythms, unmix)
    asked = {"label": label, "domain": domain, **{name: (name,) for name in traits}}
    asked = {name: words for name, words in asked.items() if words}
    values = corpus.values({"dataset": ("dataset",), **asked, "speed": (speed,)})
    known = {key: digest(key) for key in whiten.names if by_recording}
    for i, row in enumerate(values):
        row |= {"rate": corpus.rate_hz(i), "recording": known.get(corpus.recordings[i].key)}
    rows = [values[i] for i in corpus.rows("train")]
    for name, words in asked.items():
        if not any(name in row for row in rows):
            flag = name if name in ("label", "domain") else "traits"
            raise Unusable(f"--{flag} {' '.join(words)}: no training recording has it")
    learned, unknown = conditions.learn(rows, ("dataset", "rate", *asked, "speed", "recording")), Counter()
    code_RF = torch.tensor([conditions.encode(learned, row, unknown) for row in values], dtype=torch.float32)
    if hum or flatten:
        fit_rest(Target(corpus, whiten, group_R, code_RF, level), hum, flatten)
    strangers = sorted({*corpus.rows("val")} - {*corpus.rows("train")})
    own, group_R = for_strangers(corpus, whiten, group_R, strangers, "val")
    return Target(corpus, own, group_R, code_RF, level), whiten, learned, unknown


def fit_rest(target: Target, hum: bool, flatten: bool) -> None:
    """Measure what filters and rhythms leave of the training windows of each group: what hums, and the spectrum of the rest; take both off from now on."""
    windows = target.corpus.windows("train")
    row_N, start_N = windows.locate(np.arange(len(windows)))
    group_N = target.group_R[row_N]
    groups = np.unique(group_N)
    for group in groups:
        of = np.flatnonzero(group_N == group)
        channels = max(len(target.corpus.recordings[i].names) for i in np.unique(row_N[of]))
        some = np.array(even(of.tolist(), min(SEEN, max(LEAST, ALL // max(len(groups), channels)))))
        parts = target.read(row_N[some], start_N[some], np.arange(len(some)), 0, 64, 0, 0)
        x_NT = torch.cat([p.x1_BCT.flatten(0, 1) if p.mask_BC is None else p.x1_BCT[p.mask_BC] for p in parts])
        apart = min(len(some), len(of) * min(1, target.corpus.stride / target.corpus.samples)) * len(x_NT) / len(some)
        alone = all(p.x1_BCT.shape[1] == 1 for p in parts)
        target.whiten.settle(group, x_NT, apart, hum and alone, flatten)
