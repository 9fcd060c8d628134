"""
What turns a window into a prediction: three pipelines with the same methods, each an immutable value.

    riemann   covariance (OAS) → parallel transport from the subject's mean to the model's → CSP → SVM with probabilities
    encoder   an encoder with its readout and head, as train_supervised.py leaves them in model.safetensors
    hybrid    both, each calibrated, averaged

`fit` (on what was collected while the eyes moved and at rest) and `partial_fit` (on windows being served, no labels needed) return a copy;
`ready` says what is still missing. Windows are (N, C, T) in the channels, order, rate and unit of `path`. A folder of a saved pipeline
holds pipeline.safetensors (arrays and, as JSON, all the rest) and, where there is an encoder, model.safetensors; nothing is unpickled.
Only an encoder needs torch; only the making of a riemann pipeline needs scikit-learn and pyriemann.

Shapes: N windows, C channels, T samples, F filters, K classes, S support vectors, B classifiers.
"""

import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path as File
from typing import Any

import numpy as np

from lib.arrays import load_arrays, save_arrays
from lib.deep import Encoder, load_encoder
from lib.errors import Unusable
from lib.eyes import Eyes
from lib.intake import Path
from lib.riemann import Machines, Riemann

FORMAT, VERSION = "berger-pipeline", 1
FILE, MODEL = "pipeline.safetensors", "model.safetensors"


@dataclass(frozen=True, eq=False)
class Hybrid:
    """A riemann pipeline and an encoder of the same windows and classes: the average of both probabilities, each at its own temperature."""

    riemann: Riemann
    encoder: Encoder
    temperature: tuple[float, float] = (1.0, 1.0)
    weight: float = 0.5  # of the encoder
    name = "hybrid"

    @property
    def path(self) -> Path:
        return self.riemann.path

    @property
    def classes(self) -> tuple[str, ...]:
        return self.riemann.classes

    @property
    def ready(self) -> str | None:
        """None, or what is still missing."""
        return self.riemann.ready or self.encoder.ready

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        """Probabilities (N, K), float64. Raises NotReady."""
        both = (self.riemann.predict_proba(x_NCT), self.encoder.predict_proba(x_NCT))
        p_NK, q_NK = (tempered(p, t) for p, t in zip(both, self.temperature, strict=True))
        return (1 - self.weight) * p_NK + self.weight * q_NK

    def fit(self, groups: dict) -> "Hybrid":
        return replace(self, riemann=self.riemann.fit(groups), encoder=self.encoder.fit(groups))

    def partial_fit(self, windows) -> "Hybrid":
        return replace(self, riemann=self.riemann.partial_fit(windows), encoder=self.encoder.partial_fit(windows))

    def warm(self, compile: str = "auto") -> dict:
        """Both parts' first windows."""
        return {"riemann": self.riemann.warm(compile), "encoder": self.encoder.warm(compile)}


def tempered(p_NK: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities whose logits are divided by a temperature (Guo 2017)."""
    q_NK = np.clip(p_NK, 1e-9, None) ** (1 / temperature)
    return q_NK / q_NK.sum(1, keepdims=True)


def calibrate(p_NK: np.ndarray, q_NK: np.ndarray, y_N: np.ndarray) -> tuple[tuple[float, float], float]:
    """Temperatures of both parts and the encoder's weight, of the least log loss on windows neither was trained on."""
    grid = np.geomspace(0.25, 8, 61)

    def loss(r_NK: np.ndarray) -> float:
        return -float(np.log(np.clip(r_NK[np.arange(len(y_N)), y_N], 1e-9, None)).mean())

    temperature = tuple(float(min(grid, key=lambda t, r=r_NK: loss(tempered(r, t)))) for r_NK in (p_NK, q_NK))
    p_NK, q_NK = tempered(p_NK, temperature[0]), tempered(q_NK, temperature[1])
    weight = min(np.linspace(0, 1, 21), key=lambda w: loss((1 - w) * p_NK + w * q_NK))
    return temperature, float(weight)


# ----------------------------------------------------------------------------
# files


def with_path(pipeline, path: Path):
    """The pipeline with another path, of the same channels, rate and filter: bad channels, step, settling time."""
    if isinstance(pipeline, Hybrid):
        parts = (replace(part, path=path) for part in (pipeline.riemann, pipeline.encoder))
        return replace(pipeline, **dict(zip(("riemann", "encoder"), parts, strict=True)))
    return replace(pipeline, path=path)


def check_folder(folder: str | File) -> None:
    """Make the folder of `save` and try it, before hours of work depend on it. Raises Unusable."""
    try:
        File(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Unusable(f"--save {folder} can't be written: {error.strerror}; name another folder") from error


def save(pipeline, folder: str | File) -> None:
    """Write a pipeline with all it has learned in this session. Raises Unusable if the folder can't be written."""
    folder = File(folder)
    parts = {"riemann": pipeline} if isinstance(pipeline, Riemann) else {"encoder": pipeline}
    if isinstance(pipeline, Hybrid):
        parts = {"riemann": pipeline.riemann, "encoder": pipeline.encoder}
    arrays: dict[str, np.ndarray] = {}
    meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": pipeline.name}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            meta[name], own = _pack(part)
            arrays |= {f"{name}.{key}": a for key, a in own.items()}
        if "encoder" in parts:
            from lib.readouts import save_model

            save_model(folder / MODEL, parts["encoder"].decoder, parts["encoder"].meta)
        if isinstance(pipeline, Hybrid):
            meta |= {"temperature": list(pipeline.temperature), "weight": pipeline.weight}
        save_arrays(folder / FILE, arrays, meta)
    except OSError as error:
        raise Unusable(f"{folder}: {error.strerror}; name another folder") from error


def load(path: str | File, acausal: bool = False):
    """
    A pipeline from its folder, or from a run directory or model file of train_supervised.py.

    Raises Unusable in one line: missing, damaged, of another kind or version, not of the service's causal filter (unless `acausal`).
    """
    path = File(path)
    if path.name == FILE:
        path = path.parent
    if path.is_file() or (not (path / FILE).is_file() and (path / MODEL).is_file()):
        return load_encoder(path if path.is_file() else path / MODEL, acausal=acausal)
    if not (path / FILE).is_file():
        raise Unusable(
            f"--models {path}: no {FILE} or {MODEL} there (looked in {path.resolve()}); "
            "make one: python serve_realtime.py --action fit --cache CACHE --target NAME --save DIR"
        )
    arrays, meta = load_arrays(path / FILE)
    if meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise Unusable(f"{path / FILE} is {meta.get('format')} {meta.get('version')}, expected {FORMAT} {VERSION}")
    try:
        parts = {}
        for name in ("riemann", "encoder"):
            own = {k.removeprefix(f"{name}."): a for k, a in arrays.items() if k.startswith(f"{name}.")}
            if name in meta and name == "riemann":
                parts[name] = _unpack_riemann(meta[name], own)
            elif name in meta:
                parts[name] = _unpack_encoder(load_encoder(path / MODEL, acausal=acausal), meta[name], own)
        if meta["name"] == "hybrid":
            pipeline = Hybrid(**parts, temperature=tuple(map(float, meta["temperature"])), weight=float(meta["weight"]))
            if pipeline.riemann.classes != pipeline.encoder.classes:
                raise ValueError("its parts have different classes")
        else:
            pipeline = parts[meta["name"]]
        _try(pipeline)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, np.linalg.LinAlgError) as error:
        raise Unusable(f"{path / FILE} doesn't hold a whole pipeline ({error}); save it again") from error
    return pipeline


def _pack(part) -> tuple[dict, dict[str, np.ndarray]]:
    """A part as JSON and arrays."""
    arrays = {
        f.name: v for f in fields(part) if isinstance(v := getattr(part, f.name), np.ndarray)
    }  # all but what is nested
    meta = {n: getattr(part, n) for n in ("remove_eyes", "seen")} | {
        "path": asdict(part.path),
        "classes": list(part.classes),
    }
    if part.eyes:
        arrays |= {f"eyes.{k}": v for k, v in vars(part.eyes).items()}
    if isinstance(part, Riemann):
        arrays |= {f"machines.{f.name}": getattr(part.machines, f.name) for f in fields(part.machines)}
        meta |= {n: getattr(part, n) for n in ("transport_min", "transport_most", "bands_hz")}
    else:
        meta |= {n: getattr(part, n) for n in ("target", "scale_min")}
    return meta, {name: np.asarray(a, np.float64) for name, a in arrays.items()}


def _unpack_path(meta: dict) -> Path:
    return Path(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta.items()})


def _nested(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays of a nested value, taken out."""
    return {k.removeprefix(f"{name}."): arrays.pop(k) for k in list(arrays) if k.startswith(f"{name}.")}


def _unpack_riemann(meta: dict, arrays: dict[str, np.ndarray]) -> Riemann:
    meta, own_eyes, machines = dict(meta), _nested(arrays, "eyes"), _nested(arrays, "machines")
    path, classes = _unpack_path(meta.pop("path")), tuple(meta.pop("classes"))
    return Riemann(
        path, classes, machines=Machines(**machines), eyes=Eyes(**own_eyes) if own_eyes else None, **arrays, **meta
    )


def _unpack_encoder(base: Encoder, meta: dict, arrays: dict[str, np.ndarray]) -> Encoder:
    meta, own_eyes = dict(meta), _nested(arrays, "eyes")
    path, classes = _unpack_path(meta.pop("path")), tuple(meta.pop("classes"))
    found = Eyes(**own_eyes) if own_eyes else None
    if tuple(base.decoder.targets[meta["target"]].classes) != classes:
        raise ValueError(f"{MODEL} beside it is another model")
    return replace(base, path=path, classes=classes, eyes=found, **arrays, **meta)


def _try(pipeline) -> None:
    """Raises ValueError where a loaded pipeline can't say anything of a window of noise."""
    parts = (pipeline.riemann, pipeline.encoder) if isinstance(pipeline, Hybrid) else (pipeline,)
    for part in parts:
        C = len(part.path.channels)
        if isinstance(part, Riemann):
            wide = C * max(1, len(part.bands_hz))
            shapes = {"mean": (part.mean_CC, (wide, wide)), "subject": (part.subject_CC, (wide, wide))}
        else:
            shapes = {"scale": (part.scale_C, (C,)), "offset": (part.offset_C, (C,))}
            shapes["covariance"] = (part.covariance_CC, (C, C))
        shapes["eyes"] = (part.eyes and part.eyes.project_CC, (C, C))
        for name, (array, shape) in shapes.items():
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} is {array.shape}, not {shape}")
        if isinstance(part, Riemann):
            ready = part if part.seen else replace(part, subject_CC=part.mean_CC)
            ready = replace(ready, transport_min=0)
        else:
            one = np.ones(C)
            ready = part if part.seen else replace(part, scale_C=one, offset_C=0 * one, covariance_CC=np.diag(one))
            ready = replace(ready, scale_min=0)
        p_1K = ready.predict_proba(np.random.default_rng(0).standard_normal((1, C, part.path.window)))
        if p_1K.shape != (1, len(part.classes)) or not np.isfinite(p_1K).all():
            raise ValueError(f"says {p_1K.shape} of {len(part.classes)} classes, or no number")
