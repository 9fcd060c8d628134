"""
The people of the demo cohort: the tables of its truth, and one subject's traits, features and head drawn from them.

Whatever the demo's signals depend on is in PARAMETERS (constants) or FEATURES (what varies from subject to subject, and how far a
trait moves it); docs/demo.md prints both. A trait is z-scored before it acts: age (years - 13) / 4.62, sex F +1 and M -1, ehq_total
(score - 60) / 40, the four factors as they are. Axes: C and B channels, S sites (one dipole under each), K background dipoles, 3 coordinates.
"""

import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from lib import head
from lib.channels import TEN_TWENTY


class Parameter(NamedTuple):
    name: str
    value: float
    unit: str
    meaning: str


class Feature(NamedTuple):
    """A quantity of a subject: base + Σ effect·z + residual·noise, or base·exp(Σ effect·z + residual·noise) if `log`."""

    name: str
    base: float
    unit: str
    log: bool
    effects: dict[str, float]
    residual: float
    meaning: str

    def correlation(self, trait: str) -> float:
        """Correlation of this feature (its logarithm if `log`) with one trait, the other traits independent of it."""
        return self.effects[trait] / np.hypot(self.residual, np.linalg.norm(list(self.effects.values())))


PARAMETERS = (
    ("age_min", 5, "years", "youngest subject"),
    ("age_max", 21, "years", "oldest subject; ages are uniform in between"),
    ("factors_missing", 0.06, "", "share of subjects whose four factors are n/a in participants.tsv"),
    ("background_dipoles", 200, "", "of the 1/f background, anywhere in the brain, different in every subject"),
    ("background_spread", 0.8, "ln", "sd of their log strengths: most of what tells subjects apart"),
    ("background_corner_hz", 0.3, "Hz", "below it the background falls off, as behind an amplifier's high-pass"),
    ("site_jitter", 0.12, "rad", "sd per axis by which a subject's dipoles lie beside their electrode"),
    ("tilt", 0.3, "", "sd per axis of a subject's dipole orientations around radial (length 1)"),
    ("depth", 0.75, "radius", "mean distance of site dipoles from the centre of the head (sd 0.03)"),
    ("electrode_gain", 0.1, "ln", "sd of a subject's gain per electrode, the same in all of its recordings"),
    ("line_spread", 0.5, "ln, rad", "sd of line noise's log amplitude and phase over the channels of a recording"),
    ("alpha_width_hz", 0.7, "Hz", "width (sd of the amplitude spectrum) of alpha and mu"),
    ("rhythm_width_hz", 0.8, "Hz", "width of theta, sensorimotor rhythm and delta"),
    ("beta_width_hz", 2.5, "Hz", "width of beta"),
    ("mu_over_alpha_hz", 1.0, "Hz", "how much faster mu is than the subject's alpha"),
    ("theta_hz", 6.0, "Hz", "frontal midline theta (Fz)"),
    ("beta_hz", 20.0, "Hz", "beta (C3, C4)"),
    ("smr_hz", 14.0, "Hz", "sensorimotor rhythm (Cz)"),
    ("delta_hz", 2.0, "Hz", "lateral frontal delta (F7, F8)"),
    ("eyes_closed_alpha", 2.0, "ratio", "amplitude of posterior alpha, eyes closed over eyes open"),
    ("rest_block_s", 10.0, "s", "RestingState: eyes open, closed, open … for so long each"),
    ("blinks_per_min", 12.0, "1/min", "while eyes are open"),
    ("blink_gap_s", 0.5, "s", "least time between two blinks"),
    ("blink_s", 0.08, "s", "sd of the Gaussian time course of a blink"),
    ("bad_recordings", 0.25, "", "share of recordings with bad channels"),
    ("bad_channels", 3, "", "at most so many of them with 128 channels (one with 21)"),
    ("bad_noise_uv", 150.0, "uV", "rms of a noisy bad channel; half of the bad channels are noisy, half flat"),
    ("movie_low_hz", 0.5, "Hz", "lower edge of the movies' time courses"),
    ("movie_high_hz", 8.0, "Hz", "upper edge"),
    ("movie_lead_s", 3.0, "s", "a movie starts 1 s to 1 s + so much into the recording"),
    ("trial_gap_s", 2.8, "s", "from a target to the next contrastTrial_start"),
    ("target_delay_s", 0.8, "s", "from contrastTrial_start to the target, and uniformly up to 0.6 s more"),
    ("rt_gauss_s", 0.1, "s", "sd of the Gaussian part of response times, within a subject"),
    ("rt_tail_s", 0.22, "s", "mean of their exponential part"),
    ("rt_min_s", 0.4, "s", "response times are redrawn below it"),
    ("rt_max_s", 2.3, "s", "and above it"),
    ("rt_per_alpha_s", 0.06, "s", "added per sd of ln posterior alpha power in the 0.5 s before the target"),
    ("missed", 0.05, "", "share of trials without a response"),
    ("wrong", 0.07, "", "share of responses on the wrong side"),
    ("p3_lead_s", 0.05, "s", "the P3 (Pz) peaks so long before the response, whenever that is"),
    ("p3_s", 0.15, "s", "sd of its Gaussian time course"),
    ("motor_s", 0.1, "s", "sd of the motor potential (C3 or C4, opposite to the hand); it peaks at the response"),
    ("n1_delay_s", 0.18, "s", "the N1 (P7 or P8, opposite to the target) peaks so long after the target"),
    ("n1_s", 0.03, "s", "sd of its time course"),
    ("trial_spread", 0.2, "ln", "sd of the log amplitudes of evoked potentials and blinks, from one to the next"),
    ("second_seizure", 0.5, "", "share of second monitoring recordings with a seizure; all first ones have one"),
    ("seizure_wander_hz", 0.15, "Hz", "sd by which a seizure's frequency wanders"),
    ("spike_wave_hz", 3.0, "Hz", "generalised seizures (D001, D005 …): spike and wave, slowing by a sixth"),
    ("focal_start_hz", 7.0, "Hz", "focal seizures (D003, D007 …): rhythm at the onset, in one temporal lobe"),
    ("focal_stop_hz", 2.5, "Hz", "and at the end, when both hemispheres take part"),
    ("focal_growth", 4.0, "ratio", "amplitude at the end over amplitude at the onset"),
)
PARAMETERS = tuple(Parameter(*row) for row in PARAMETERS)
P = SimpleNamespace(**{parameter.name: parameter.value for parameter in PARAMETERS})

# Amplitudes are rms (rhythms, noise, movies) or peak (evoked, blinks, seizures), average-referenced, where they are largest
FEATURES = (
    ("background_uv", 10.0, "uV", True, {}, 0.25, "1/f background, mean over electrodes"),
    ("exponent", 1.6, "", False, {"age": -0.15}, 0.1, "x of the background's power spectrum 1/f^x"),
    ("noise_uv", 0.8, "uV", True, {}, 0.2, "white noise of every channel"),
    ("line_uv", 3.0, "uV", True, {}, 0.3, "line noise, median over channels"),
    ("alpha_hz", 9.5, "Hz", False, {"age": 0.6}, 0.35, "peak of the alpha rhythm"),
    ("alpha_uv", 8.0, "uV", True, {}, 0.25, "posterior alpha (O1, O2), eyes open"),
    ("frontal_alpha_uv", 5.0, "uV", True, {}, 0.15, "frontal alpha (F3, F4)"),
    ("frontal_asymmetry", 0.0, "ln", False, {"internalizing": 0.6}, 0.35, "ln frontal alpha, right minus left"),
    ("mu_uv", 5.0, "uV", True, {}, 0.15, "mu (C3, C4)"),
    ("mu_asymmetry", 0.0, "ln", False, {"ehq_total": 0.6}, 0.35, "ln mu, right minus left"),
    ("theta_uv", 6.0, "uV", True, {"attention": 0.35}, 0.2, "frontal midline theta"),
    ("beta_uv", 4.0, "uV", True, {"sex": 0.3}, 0.2, "beta"),
    ("smr_uv", 6.0, "uV", True, {"externalizing": -0.45}, 0.15, "sensorimotor rhythm"),
    ("delta_uv", 10.0, "uV", True, {"p_factor": 0.35}, 0.2, "lateral frontal delta"),
    ("movie_visual_uv", 4.0, "uV", True, {}, 0.2, "response to a movie's light (Oz)"),
    ("movie_auditory_uv", 4.0, "uV", True, {}, 0.2, "response to its sound (T7 and T8)"),
    ("movie_latency_s", 0.1, "s", False, {}, 0.01, "from the screen to the response"),
    ("p3_uv", 20.0, "uV", True, {"externalizing": -0.2}, 0.15, "P3"),
    ("motor_uv", 12.0, "uV", True, {}, 0.2, "motor potential"),
    ("n1_uv", 8.0, "uV", True, {}, 0.2, "N1"),
    (
        "rt_s",
        0.95,
        "s",
        False,
        {"externalizing": 0.1, "age": -0.08},
        0.05,
        "response time but for the exponential part",
    ),
    ("blink_uv", 100.0, "uV", True, {}, 0.25, "blinks (Fp1, Fp2)"),
    ("seizure_uv", 100.0, "uV", True, {}, 0.2, "seizures, at their height"),
)
FEATURES = tuple(Feature(*row) for row in FEATURES)

TRAITS = ("age", "sex", "ehq_total", "p_factor", "attention", "internalizing", "externalizing")
CORRELATIONS = {  # of the normal variables behind the traits; all others are independent
    ("age", "attention"): -0.1,
    ("sex", "internalizing"): 0.2,
    ("sex", "attention"): -0.15,
    ("sex", "externalizing"): -0.2,
    ("p_factor", "attention"): 0.3,
    ("p_factor", "internalizing"): 0.35,
    ("p_factor", "externalizing"): 0.35,
    ("attention", "externalizing"): 0.3,
}

SITES = (*TEN_TWENTY, "Oz")
_NET = (*TEN_TWENTY, *(f"E{i}" for i in range(1, 129)))  # where "the electrode where it is largest" is looked for


class Montage(NamedTuple):
    name: str
    electrodes: tuple[str, ...]  # canonical
    labels: tuple[str, ...]  # as written into the file
    reference: str
    rate_hz: int
    line_hz: float
    recordings: tuple[tuple[str, int, int], ...]  # task, run, seconds


_OLD_NAMES = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6"}  # what Temple's recordings call them
_TUH21 = (*TEN_TWENTY, "A1", "A2")
MONTAGES = (
    Montage(
        *("tuh21", _TUH21, tuple(f"EEG {_OLD_NAMES.get(n, n).upper()}-REF" for n in _TUH21), "CPz", 250, 50.0),
        (("RestingState", 1, 61), ("DespicableMe", 1, 60), ("ThePresent", 1, 60), ("contrastChangeDetection", 1, 80))
        + (("szMonitoring", 1, 80), ("szMonitoring", 2, 80)),
    ),
    Montage(
        *("hbn128", _NET[len(TEN_TWENTY) :], _NET[len(TEN_TWENTY) :], "Cz", 500, 60.0),
        (("RestingState", 1, 31), ("DespicableMe", 1, 32), ("ThePresent", 1, 32), ("contrastChangeDetection", 1, 36)),
    ),
)


@dataclass(frozen=True)
class Subject:
    """One subject: what participants.tsv says of it (None: missing), what is true, and the topographies of its sources."""

    seed: int
    number: int
    montage: Montage
    columns: dict[str, float | str | None]
    z: dict[str, float]
    features: SimpleNamespace
    sites_CS: (
        np.ndarray
    )  # referenced potential of each site's dipole; 1 at the electrode where its average-referenced one is largest
    background_CB: np.ndarray  # µV; mixes C independent sources to what all background dipoles together make
    gain_C: np.ndarray

    @property
    def id(self) -> str:
        return f"D{self.number + 1:03d}"


def generator(seed: int, number: int, purpose: str) -> np.random.Generator:
    """The random numbers of one purpose of one subject: no other purpose or subject, present or not, changes them."""
    return np.random.Generator(np.random.PCG64DXSM([seed, number, zlib.crc32(purpose.encode())]))


def draw_subject(seed: int, number: int) -> Subject:
    """Subject `number` (from 0; even ones have 21 channels, odd ones 128) of the cohort of `seed`."""
    rng = generator(seed, number, "traits")
    columns, z = draw_traits(rng)
    features = {}
    for feature in FEATURES:
        shift = (
            sum(effect * z[trait] for trait, effect in feature.effects.items())
            + feature.residual * rng.standard_normal()
        )
        features[feature.name] = feature.base * np.exp(shift) if feature.log else feature.base + shift
    montage = MONTAGES[number % 2]
    sites_CS, background_CB, gain_C = _draw_head(generator(seed, number, "head"), montage)
    background_CB *= features["background_uv"]
    return Subject(seed, number, montage, columns, z, SimpleNamespace(**features), sites_CS, background_CB, gain_C)


def draw_traits(rng: np.random.Generator) -> tuple[dict, dict]:
    """One person's columns of participants.tsv, and the z-scored traits behind them (of which nothing is missing)."""
    correlation = np.eye(len(TRAITS))
    for (a, b), r in CORRELATIONS.items():
        i, j = TRAITS.index(a), TRAITS.index(b)
        correlation[i, j] = correlation[j, i] = r
    latent = dict(zip(TRAITS, np.linalg.cholesky(correlation) @ rng.standard_normal(len(TRAITS)), strict=True))
    years = P.age_max - P.age_min
    columns = {
        "age": round(P.age_min + years * float(ndtr(latent["age"])), 2),
        "sex": "F" if latent["sex"] > 0 else "M",
        "ehq_total": round(float(np.clip(60 + 40 * latent["ehq_total"], -100, 100)), 2),
        **{trait: round(float(latent[trait]), 3) for trait in TRAITS[3:]},
    }
    z = {trait: value for trait, value in columns.items() if trait not in ("age", "sex", "ehq_total")}
    z["age"] = (columns["age"] - (P.age_min + P.age_max) / 2) / (years / 12**0.5)  # sd of a uniform distribution
    z["sex"] = 1.0 if columns["sex"] == "F" else -1.0
    z["ehq_total"] = (columns["ehq_total"] - 60) / 40
    if rng.random() < P.factors_missing:
        columns |= dict.fromkeys(TRAITS[3:])
    return columns, z


def _draw_head(rng: np.random.Generator, montage: Montage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    e_S3 = head.directions(SITES)
    e_S3 = e_S3 + P.site_jitter * rng.standard_normal(e_S3.shape)
    e_S3 /= np.linalg.norm(e_S3, axis=1, keepdims=True)
    depth_S1 = (P.depth + 0.03 * rng.standard_normal((len(SITES), 1))).clip(0.6, 0.85)
    moments_S3 = e_S3 + P.tilt * rng.standard_normal(e_S3.shape)

    dipoles_K3 = rng.standard_normal((P.background_dipoles, 3))
    dipoles_K3[:, 2] = abs(dipoles_K3[:, 2]) - 0.3  # most of the cortex lies above the rim of the cap
    dipoles_K3 *= rng.uniform(0.3, 0.8, (P.background_dipoles, 1)) / np.linalg.norm(dipoles_K3, axis=1, keepdims=True)
    moments_K3 = rng.standard_normal(dipoles_K3.shape)
    moments_K3 *= np.exp(P.background_spread * rng.standard_normal((P.background_dipoles, 1)))

    e_C3 = head.directions((*_NET, *montage.electrodes, montage.reference))
    sites = head.leadfield(e_C3, e_S3 * depth_S1, moments_S3)
    background = head.leadfield(e_C3, dipoles_K3, moments_K3)
    net = slice(0, len(_NET))
    sites /= abs(sites[net] - sites[net].mean(0)).max(0)
    background /= np.linalg.norm(background[net] - background[net].mean(0), axis=1).mean()
    sites_CS, background_CK = (a[len(_NET) : -1] - a[-1] for a in (sites, background))
    gain_C = np.exp(P.electrode_gain * rng.standard_normal(len(montage.electrodes)))
    # all background dipoles have one spectrum, so that any square root of their covariance mixes fewer sources to the same signal
    background_CB = np.linalg.qr(background_CK.T, mode="r").T
    return gain_C[:, None] * sites_CS, gain_C[:, None] * background_CB, gain_C


def best_nrmse(trait: str) -> float:
    """The least RMSE / sd with which a trait can be told from its subject's true features, the other traits known (linear, Gaussian)."""
    return (1 + sum((f.effects[trait] / f.residual) ** 2 for f in FEATURES if trait in f.effects)) ** -0.5
