"""
A trained flow as one file, and windows from it.

The file holds network, filters and templates. A template describes a training recording (of many, an even choice has one): montage,
scales, filter group and conditions. It has no sample of the signal, and the subject as a hash only. A generated window is modelled on a
template: the network makes its content, its level is drawn from those of the template's group, spectrum and unit are the template's.

Shape letters: N windows, C channels, T samples, F conditions.
"""

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib import flow, hums
from lib.corpus import Corpus, even
from lib.errors import Unusable
from lib.lineage import digest
from lib.masks import uniform
from lib.tensors import check_format, load_tensors, save_tensors
from lib.velocity import Velocity, describe, rebuild
from lib.whitening import SEGMENT, Whitening, restore

FORMAT, VERSION = "berger-flow", 1
MOST_TEMPLATES = 512
CALIBRATION = (
    2**30
)  # number of the first window that the gain per frequency is measured on; none of them is used for anything else


def templates(corpus: Corpus, group_R: np.ndarray, code_RF: torch.Tensor, columns: list[str]) -> list[dict]:
    """What generated windows take from training recordings; `columns` of the caches go with them."""
    found = []
    for i in even(corpus.rows("train"), MOST_TEMPLATES):
        recording, cache, row = corpus.recordings[i], corpus.caches[corpus.cache_R[i]], int(corpus.row_R[i])
        batch = cache.read([row], [recording.segments[0][0]], 1)
        keep = np.flatnonzero(batch.mask_BC[0].numpy())
        places = batch.positions_BC3[0].double().tolist()
        scale_C, offset_C = cache.scales(row)
        values = {name: cache.column(name)[row] for name in columns}
        values = {
            name: digest(str(v)) if name == "subject" else v for name, v in values.items() if v is not None and v == v
        }
        found.append({
            "key": digest(recording.key), "dataset": recording.dataset, "subject": digest(recording.subject), "columns": values,
            "signal": cache.signal, "unit": cache.unit, "group": int(group_R[i]),
            "code": [None if v != v else v for v in code_RF[i].tolist()],
            "names": [recording.names[c] for c in keep],
            "positions": [None if places[c][0] != places[c][0] else places[c] for c in keep],
            "scale": scale_C[keep].tolist(), "offset": offset_C[keep].tolist(),
        })  # fmt: skip
    return found


def save_model(path: Path, net: Velocity, whiten: Whitening, meta: dict) -> None:
    """Write a network with its filters; `meta` has `predict`, `window`, `level`, `templates`, `run`, `step` and lineage."""
    tensors = {f"net.{k}": t for k, t in net.state_dict().items()}
    tensors |= {f"whiten.{k}": t for k, t in whiten.tensors().items()}
    own = {"format": FORMAT, "version": VERSION, "groups": whiten.names, "channels": whiten.channels, **describe(net)}
    save_tensors(path, tensors, own | meta)


def load_model(path: str | Path) -> tuple[Velocity, Whitening, dict]:
    """A network (on the CPU, in evaluation mode), its filters, and the file's metadata. Raises Unusable."""
    tensors, meta = load_tensors(path)
    check_format(meta, path, FORMAT, VERSION)
    own = {k.removeprefix("whiten."): t for k, t in tensors.items() if k.startswith("whiten.")}
    try:
        net, whiten = rebuild(meta), restore(meta["groups"], own, meta.get("channels", ()))
        net.load_state_dict({k.removeprefix("net."): t for k, t in tensors.items() if k.startswith("net.")})
    except (RuntimeError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise Unusable(
            f"{path} was written by another version of lib/velocity.py ({reason}); train it again"
        ) from error
    return net.eval().requires_grad_(False), whiten, meta


def fitting(net: Velocity, meta: dict, given: dict[str, float]) -> list[dict]:
    """The templates that have the given conditions; all of them, given what nobody had."""
    place = {c.name: f for f, c in enumerate(net.given.conditions)}

    def fits(template: dict) -> bool:
        own = ((template["code"][place[name]], code) for name, code in given.items())
        return all(v is not None and abs(v - code) < 1e-4 for v, code in own)

    return [t for t in meta["templates"] if fits(t)] or meta["templates"]


def draw_windows(
    net: Velocity,
    whiten: Whitening,
    meta: dict,
    template: dict,
    index_N: np.ndarray,
    seed: int,
    given: dict[str, float] | None = None,
    unconditional: bool = False,
    cfg: float = 1.0,
    nfe: int = 16,
    solver: str = "heun",
) -> tuple[torch.Tensor, np.ndarray | None, torch.Tensor, torch.Tensor]:
    """
    White windows (N, C, T) modelled on a template, their log RMS (N, None if the model has no levels), codes (N, F + 2 Q), and phases of hums (N, P).

    A window depends on the seed and its number in `index_N` alone. `given` replaces conditions of the template; `unconditional` leaves
    only level and rhythms.
    """
    log_N, deviate_N = whiten.draw_levels(uniform(seed, 0, index_N, 1, "flow level")[:, 0], template["group"])
    code_F = torch.tensor([math.nan if v is None else v for v in template["code"]], dtype=torch.float32)
    code_NF = code_F.repeat(len(index_N), 1)
    for f, condition in enumerate(net.given.conditions):
        if condition.name in (given or {}):
            code_NF[:, f] = given[condition.name]
    if unconditional:
        code_NF[:] = math.nan
    code_NF[:, -1] = deviate_N if meta["level"] else math.nan
    u_NQ = uniform(seed, 0, index_N, net.shape.rhythms, "flow rhythm")
    code_NF = torch.cat([code_NF, whiten.draw_rhythms(u_NQ, template["group"])], 1)
    how = (positions_of(template), meta["window"], meta["predict"], cfg, nfe, solver, seed)
    w_NCT = flow.sample(net, code_NF, *how, first=int(index_N[0]))
    turn_NP = torch.from_numpy(uniform(seed, 0, index_N, hums.MOST, "flow hum"))
    return w_NCT, log_N if meta["level"] else None, code_NF, turn_NP


def positions_of(template: dict) -> torch.Tensor:
    """Places (C, 3) of a template's channels; NaN where unknown."""
    return torch.tensor([p or [math.nan] * 3 for p in template["positions"]], dtype=torch.float32)


def in_unit(
    whiten: Whitening,
    template: dict,
    w_NCT: torch.Tensor,
    log_N: np.ndarray | None,
    code_NX: torch.Tensor,
    turn_NP: torch.Tensor,
) -> np.ndarray:
    """White windows as signals in the template's unit (uV, g), with its spectrum, what its turns repeat and what hums; float64 (N, C, T)."""
    scale_C1, offset_C1 = (np.array(template[name])[:, None] for name in ("scale", "offset"))
    w_NCT, place_C = mixed(whiten, template, w_NCT, code_NX, turn_NP)
    return whiten.colour(w_NCT, template["group"], log_N, place_C=place_C) * scale_C1 + offset_C1


def mixed(
    whiten: Whitening, template: dict, w_NCT: torch.Tensor, code_NX: torch.Tensor, turn_NP: torch.Tensor
) -> tuple[torch.Tensor, np.ndarray]:
    """White windows with what the template repeats, what hums and what its channels have in common, and which of the filters' channels these are."""
    w_NCT = whiten.unsettled(w_NCT, template["group"], turn_NP)
    if w_NCT.shape[1] == 1 and (rhythms := 2 * whiten.rhythm_GQ.shape[1]):
        w_NCT = w_NCT + whiten.repeated(code_NX[:, -rhythms:], np.full(len(w_NCT), template["group"]), w_NCT.shape[2])
    number = {name: v for v, name in enumerate(whiten.channels)}
    place_C = np.array([number.get(name, -1) for name in template["names"]])
    return whiten.mixed(w_NCT, template["group"], place_C), place_C


def calibrate(net: Velocity, whiten: Whitening, meta: dict, windows: int, seed: int, nfe: int, solver: str) -> None:
    """Measure, group by group, what the mean spectrum of about so many samples lacks, and let `whiten` mend it from now on."""
    groups = {t["group"]: t for t in meta["templates"]}
    each = max(8, windows // len(groups))
    for k, (group, template) in enumerate(tqdm(groups.items(), desc="calibrating", unit="filter", dynamic_ncols=True)):
        index_N = CALIBRATION + k * each + np.arange(each)
        w_NCT, log_N, *codes = draw_windows(net, whiten, meta, template, index_N, seed, nfe=nfe, solver=solver)
        apart = meta["window"] >= SEGMENT  # shorter windows are measured end to end: their levels would jump in between
        w_NCT, place_C = mixed(whiten, template, w_NCT, *codes)
        whiten.calibrate(group, whiten.colour(w_NCT, group, log_N if apart else None, False, place_C))
