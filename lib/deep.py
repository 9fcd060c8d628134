"""
The encoder pipeline: a model of train_supervised.py on one window after the other, on the signal it was trained on.

Shapes: N windows, B windows as lib.readouts calls them, C channels, T samples, K classes.
"""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import numpy as np

from lib.channels import POSITIONS, canonical, standard
from lib.errors import Unusable
from lib.eyes import Eyes, fit_groups
from lib.intake import Path, stack
from lib.riemann import NotReady, timed

CLIP_SD = 15.0  # as lib.cache clips what is not in microvolts


@dataclass(frozen=True, eq=False)
class Encoder:
    """
    A Decoder of lib/readouts.py on one window after the other, in float32 and one thread.

    Where it was trained on signals scaled per recording, the scale of this session is a step that is fitted at rest.
    """

    path: Path
    classes: tuple[str, ...]
    decoder: Any  # lib.readouts.Decoder
    meta: dict  # of its file
    target: int = 0  # which of its targets
    scale_min: int = 10  # windows before anything is said
    remove_eyes: bool = False
    eyes: Eyes | None = None
    scale_C: np.ndarray | None = None  # microvolts per unit of the model's signals
    offset_C: np.ndarray | None = None
    covariance_CC: np.ndarray | None = None  # mean of windows', square microvolts, for models of aligned signals
    seen: int = 0  # windows these are of
    quick: Any = None  # the decoder as TorchScript, for windows one by one
    name = "encoder"

    @property
    def scaled(self) -> str:
        """How its signals were scaled: robust, zscore or none."""
        return self.meta["signal"]["scale"]

    @property
    def aligned(self) -> str:
        """Over what its channels were uncorrelated (lib/alignment.py): none, subject, recording or window."""
        return self.meta["signal"].get("align", "none")

    @property
    def learns(self) -> bool:
        """Whether there is something to measure of a person before anything is said."""
        return self.scaled != "none" or self.aligned in ("subject", "recording")

    @property
    def ready(self) -> str | None:
        """None, or what is still missing."""
        if self.learns and self.seen < self.scale_min:
            what = "scale of the channels" if self.aligned in ("none", "window") else "covariance of the channels"
            return f"the {what} has {self.seen} of {self.scale_min} subject windows that don't overlap"
        return None

    @cached_property
    def _positions_C3(self) -> np.ndarray:
        return np.array([POSITIONS.get(n, (np.nan,) * 3) for n in standard(list(self.path.channels))], np.float32)

    @cached_property
    def _silent_C(self) -> np.ndarray:
        """The only channel that is zero without being bad: the reference."""
        reference = [canonical(n) for n in self.path.reference.split(",")]
        return np.array([reference == [canonical(n)] for n in self.path.channels])

    def signal(self, x_NCT: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Windows as the decoder knows them, float32, and which channels are good; None: all are."""
        x_NCT = np.asarray(x_NCT, np.float64) * (1e6 if self.path.unit == "V" else 1.0)
        good_NC = x_NCT.any(2) | self._silent_C
        x_NCT = self.eyes(x_NCT) if self.eyes else x_NCT
        if self.scaled != "none":
            x_NCT = (x_NCT - self.offset_C[:, None]) / self.scale_C[:, None]
        x_NCT = np.where(good_NC[..., None], x_NCT.clip(-CLIP_SD, CLIP_SD) if self.scaled != "none" else x_NCT, 0)
        x_NCT = x_NCT if self.aligned == "none" else self._align(x_NCT, good_NC)
        return x_NCT.astype(np.float32), None if good_NC.all() else good_NC

    def _align(self, x_NCT: np.ndarray, good_NC: np.ndarray) -> np.ndarray:
        """Windows in the model's unit, aligned as the cache aligns them, by the covariance that was measured or their own."""
        import torch

        from lib.alignment import covariance, whitener

        x_NCT = x_NCT if self.scaled == "none" else x_NCT * self.scale_C[:, None]
        if self.aligned == "window":
            return whitener(covariance(torch.from_numpy(x_NCT))).numpy() @ x_NCT
        both_NCC = torch.from_numpy(good_NC[:, :, None] & good_NC[:, None])
        return whitener(torch.from_numpy(self.covariance_CC) * both_NCC).numpy() @ x_NCT

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        """Probabilities (N, K), float64. Raises NotReady."""
        import torch

        if self.ready:
            raise NotReady(self.ready)
        (x_NCT, good_NC), positions_C3 = self.signal(x_NCT), self._positions_C3
        if good_NC is not None and good_NC[0].any() and (good_NC == good_NC[0]).all():
            # left out rather than masked: the same is said, without the work on what the stream lacks
            x_NCT, positions_C3, good_NC = x_NCT[:, good_NC[0]], positions_C3[good_NC[0]], None
        x_BCT = torch.from_numpy(x_NCT)
        positions_BC3 = torch.from_numpy(positions_C3).expand(len(x_NCT), -1, -1)
        with torch.inference_mode():
            if self.quick is not None and x_NCT.shape[:2] == (1, len(self.path.channels)) and good_NC is None:
                out = list(self.quick(x_BCT, positions_BC3))
            else:
                mask_BC = None if good_NC is None else torch.from_numpy(good_NC)
                part = SimpleNamespace(x_BCT=x_BCT, signal=(x_BCT, positions_BC3, mask_BC))
                out = self.decoder(part)
            p_NK = self.decoder.say(out)[self.target].double().numpy()
        if self.decoder.reading.stretches:  # of a seizure in any stretch of the window
            p_NK = np.stack([1 - p_NK.max(1), p_NK.max(1)], 1)
        return p_NK

    def fit(self, groups: dict) -> "Encoder":
        """The steps in order: eyes, if wanted, then scale and covariance from BACKGROUND (which other eyes make void)."""
        new = self
        if self.remove_eyes:
            found = fit_groups(groups, self.path, self.eyes)
            if found is not self.eyes:
                new = replace(new, eyes=found, scale_C=None, offset_C=None, covariance_CC=None, seen=0)
        x_NCT = stack(groups.get("BACKGROUND", ()))
        if len(x_NCT) and self.learns:
            scale_C, offset_C, covariance_CC = new._measure(x_NCT)
            new = replace(new, scale_C=scale_C, offset_C=offset_C, covariance_CC=covariance_CC, seen=len(x_NCT))
        return new

    def partial_fit(self, windows) -> "Encoder":
        """Where nothing was recorded at rest, the first windows say scale and covariance; later ones change nothing."""
        x_NCT = stack(windows)
        if not self.learns or self.seen >= self.scale_min or not len(x_NCT):
            return self
        scale_C, offset_C, covariance_CC = self._measure(x_NCT)
        if self.seen:
            share = len(x_NCT) / (self.seen + len(x_NCT))
            scale_C = self.scale_C ** (1 - share) * scale_C**share
            offset_C = self.offset_C * (1 - share) + offset_C * share
            covariance_CC = self.covariance_CC * (1 - share) + covariance_CC * share
        seen = self.seen + len(x_NCT)
        return replace(self, scale_C=scale_C, offset_C=offset_C, covariance_CC=covariance_CC, seen=seen)

    def _measure(self, x_NCT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scale and offset of each channel as the cache builder would say of these windows as a recording, and their mean covariance."""
        x_NCT = x_NCT * (1e6 if self.path.unit == "V" else 1.0)
        x_NCT = self.eyes(x_NCT) if self.eyes else x_NCT
        x_CT = x_NCT.transpose(1, 0, 2).reshape(x_NCT.shape[1], -1)
        if self.scaled == "zscore":
            scale_C, offset_C = x_CT.std(1), x_CT.mean(1)
        else:
            low_C, offset_C, high_C = np.quantile(x_CT, (0.25, 0.5, 0.75), axis=1)
            scale_C = (high_C - low_C) / 1.349
        centred_NCT = x_NCT - x_NCT.mean(2, keepdims=True)
        covariance_CC = (centred_NCT @ centred_NCT.transpose(0, 2, 1)).mean(0) / x_NCT.shape[2]
        return np.where(scale_C > 1e-6, scale_C, 1.0), offset_C, covariance_CC

    def warm(self, compile: str = "auto") -> dict:
        """
        Run what the first window would otherwise pay for; `auto` keeps TorchScript where it gives the same and is a tenth faster.

        Which is faster is measured, so it may differ from one start to the next, and with it the last bits: `off` where they matter.
        """
        import torch

        C, T = len(self.path.channels), self.path.window
        x_1CT = np.random.default_rng(0).standard_normal((1, C, T))
        one = np.ones(C)
        blank = dict(scale_C=one, offset_C=0 * one, covariance_CC=np.diag(one), seen=self.scale_min)
        ready = self if self.ready is None else replace(self, **blank)
        done = timed(lambda: ready.predict_proba(x_1CT)) | {"compiled": False}
        if compile == "off":
            return done
        x_1CT, _ = ready.signal(x_1CT)
        example = torch.from_numpy(x_1CT), torch.from_numpy(self._positions_C3)[None]
        quick = _script(self.decoder, example)
        if quick is None:
            return done
        trial = replace(ready, quick=quick)
        window = np.random.default_rng(1).standard_normal((1, C, T))
        same = np.allclose(trial.predict_proba(window), ready.predict_proba(window), atol=1e-5)
        with_it = timed(lambda: trial.predict_proba(window))
        if same and (compile == "on" or with_it["window_ms"] < 0.9 * done["window_ms"]):
            object.__setattr__(self, "quick", quick)  # a cache, like any cached_property: what is said stays the same
            return with_it | {"compiled": True}
        return done


def _script(decoder, example: tuple):
    """The decoder as frozen TorchScript for windows of one shape, or None where it can't be traced."""
    import torch

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, x_BCT, positions_BC3):
            return tuple(self.decoder(SimpleNamespace(x_BCT=x_BCT, signal=(x_BCT, positions_BC3, None))))

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # that shapes become constants is what is wanted
        try:
            quick = torch.jit.freeze(torch.jit.trace(Plain().eval(), example, check_trace=False))
            for _ in range(3):  # its optimiser works during the first calls
                quick(*example)
        except RuntimeError:
            return None
    return quick


def load_encoder(file: File, target: str | None = None, acausal: bool = False) -> Encoder:
    """An encoder pipeline of a model of train_supervised.py, for one of its targets. Raises Unusable."""
    import torch

    from lib.readouts import load_model

    torch.set_num_threads(1)  # a window is too small to share, and the other cores have streams to serve
    decoder, meta, _ = load_model(file)
    signal, names = meta["signal"], [t.name for t in decoder.targets]
    if signal.get("kind") != "eeg":
        raise Unusable(f"{file} was trained on {signal.get('kind')} signals; the service takes EEG")
    if signal.get("envelope_hz"):
        raise Unusable(f"{file} was trained on envelopes of whole recordings, which no service can give it")
    if not signal.get("causal") and not acausal:
        raise Unusable(
            f"{file} was trained on zero-phase filtered signals, which no service can give it: build the cache with --causal "
            "and train again, or accept the difference with --acausal"
        )
    if (transfer := meta.get("transfer", "none")) != "none":
        raise Unusable(
            f"{file} was trained with --transfer {transfer}, for which the service would have to know a person's later windows"
        )
    if target is not None and target not in names:
        raise Unusable(f"--target {target}: {file} predicts {', '.join(names)}")
    told = [k for k, t in enumerate(decoder.targets) if t.classes and target in (None, t.name)]
    if not told:
        raise Unusable(f"{file}: {target or ', '.join(names)} is a number, and the service predicts classes")
    k = told[0]
    path = signal_path(signal, tuple(meta["channels"]), round(meta["window_s"] * meta["rate_hz"]))
    return Encoder(path, tuple(decoder.targets[k].classes), decoder, meta, k)


def signal_path(signal: dict, names: tuple[str, ...], window: int, step: int | None = None) -> Path:
    """The path that gives a stream the signals of a cache with these options."""
    band = signal["band_hz"] and tuple(signal["band_hz"])
    return Path(
        channels=tuple(names),
        reference=signal["reference"],
        band_hz=band or None,
        notch_hz=tuple(signal["notch_hz"] or ()),
        rate_hz=float(signal["rate_hz"]),
        window=window,
        step=step or max(1, window // 2),
    )
