"""
The recordings of the demo cohort: what happens in one task of one subject, and the signal it leaves at the electrodes.

Every activity is added to the time courses of the subject's sites (one dipole under each, lib/cohort.py), in microvolts at the electrode
where that dipole is strongest; background, line and sensor noise come with the projection to the electrodes. Axes: C channels, T samples,
S sites, B background sources, R realisations, F frequencies.
"""

import zlib
from dataclasses import dataclass, field

import numpy as np
from scipy import fft, signal

from lib.cohort import SITES, P, Subject, generator

MOVIES = ("DespicableMe", "ThePresent")
MOVIE_PERIOD_S = 128  # a movie's time course repeats after this
RHYTHMS = (  # amplitude, frequency and width of the oscillations that never stop, and their sites
    ("theta_uv", P.theta_hz, P.rhythm_width_hz, ("Fz",)),
    ("beta_uv", P.beta_hz, P.beta_width_hz, ("C3", "C4")),
    ("smr_uv", P.smr_hz, P.rhythm_width_hz, ("Cz",)),
    ("delta_uv", P.delta_hz, P.rhythm_width_hz, ("F7", "F8")),
)
# sites of a generalised seizure, with its strength there
SPIKE_WAVE = {"F3": 0.9, "Fz": 1.0, "F4": 0.9, "C3": 0.6, "C4": 0.6, "P3": 0.3, "P4": 0.3}
# sites that a focal seizure reaches (left, right lobe), the share of its duration after which it does, its strength there
FOCAL = (
    ("T7", "T8", 0.0, 1.0),
    ("F7", "F8", 0.1, 0.7),
    ("P7", "P8", 0.15, 0.7),
    ("C3", "C4", 0.3, 0.6),
    ("T8", "T7", 0.5, 0.6),
    ("F8", "F7", 0.6, 0.5),
)


@dataclass
class Recording:
    """One recording and its truth. Events are rows of events.tsv: onset_s, duration_s, value, event_code, feedback."""

    x_CT: np.ndarray  # float32, µV
    events: list[tuple[float, float, str, str, str]]
    bad: dict[int, str]  # channel -> what is wrong with it
    seizures: list[tuple[float, float]] = field(default_factory=list)  # s
    sites_ST: np.ndarray | None = None  # activity of the sites, without the background


def noise(rng: np.random.Generator, rows: int, amplitude_F: np.ndarray, samples: int) -> np.ndarray:
    """Gaussian noise x_RT (float32, expected rms 1) with the amplitude spectrum given at the frequencies of rfft."""
    amplitude_F = np.where(amplitude_F > 1e-4 * amplitude_F.max(), amplitude_F, 0)
    amplitude_F[0] = 0
    used_F = np.flatnonzero(amplitude_F)
    white = rng.standard_normal((rows, len(used_F), 2), np.float32).view(np.complex64)[..., 0]
    scaled_F = amplitude_F[used_F] * (samples / (2 * np.sqrt((amplitude_F**2).sum())))
    spectrum_RF = np.zeros((rows, len(amplitude_F)), np.complex64)
    spectrum_RF[:, used_F] = white * scaled_F.astype(np.float32)
    return fft.irfft(spectrum_RF, samples, axis=1)


def rhythm(rng: np.random.Generator, rows: int, centre_hz: float, width_hz: float, rate_hz: int, samples: int):
    """Independent oscillations x_RT (rms 1) whose amplitude spectrum is a Gaussian around `centre_hz`."""
    hz = fft.rfftfreq(samples, 1 / rate_hz)
    return noise(rng, rows, np.exp(-((hz - centre_hz) ** 2) / (2 * width_hz**2)), samples)


def movie_time_course(movie: str, rate_hz: int, seconds: float, latency_s: float = 0.0) -> np.ndarray:
    """
    Light and sound of a movie, x_2T (rms 1), from its first frame: the same for every subject, seed and rate.

    With `latency_s` it is the response that follows them so much later (before the first frame it is that to the loop's end).
    """
    rng = np.random.Generator(np.random.PCG64DXSM(zlib.crc32(movie.encode())))
    cycles = np.arange(round(P.movie_low_hz * MOVIE_PERIOD_S), round(P.movie_high_hz * MOVIE_PERIOD_S) + 1)
    delay = np.exp(-2j * np.pi * cycles / MOVIE_PERIOD_S * latency_s)
    n = MOVIE_PERIOD_S * rate_hz
    spectrum = np.zeros((2, n // 2 + 1), complex)
    spectrum[:, cycles] = (rng.standard_normal((2, len(cycles), 2)) @ [1, 1j]) * delay * n / (2 * np.sqrt(len(cycles)))
    loop = fft.irfft(spectrum, n, axis=1)
    return np.take(loop, np.arange(round(seconds * rate_hz)), axis=1, mode="wrap").astype(np.float32)


class _Scene:
    """A recording in the making: its clock, random numbers, site activity and events."""

    def __init__(self, subject: Subject, task: str, run: int, seconds: int):
        self.subject, self.features = subject, subject.features
        self.seconds, self.rate_hz = seconds, subject.montage.rate_hz
        self.samples = seconds * self.rate_hz
        self.rng = generator(subject.seed, subject.number, f"{task}/{run}")
        self.sites_ST = np.zeros((len(SITES), self.samples), np.float32)
        self.events, self.seizures = [], []

    def on_clock(self, t_s: float) -> float:
        """The nearest time at which there is a sample."""
        return round(t_s * self.rate_hz) / self.rate_hz

    def event(self, onset_s: float, value: str, code: int, feedback: str = "n/a") -> None:
        self.events.append((onset_s, 0.0, value, str(code), feedback))

    def add(self, site: str, x_T: np.ndarray, start: int = 0) -> None:
        """Add activity (µV) to a site, from sample `start`, as far as it lies within the recording."""
        stop = min(start + len(x_T), self.samples)
        self.sites_ST[SITES.index(site), max(start, 0) : stop] += x_T[max(-start, 0) : stop - start]

    def bump(self, site: str, peak_s: float, sd_s: float, uv: float) -> None:
        """Add one Gaussian deflection."""
        start = round((peak_s - 4 * sd_s) * self.rate_hz)
        t_s = np.arange(start, start + round(8 * sd_s * self.rate_hz)) / self.rate_hz
        if start < self.samples and start + len(t_s) > 0:
            self.add(site, (uv * np.exp(-((t_s - peak_s) ** 2) / (2 * sd_s**2))).astype(np.float32), start)


def record(subject: Subject, task: str, run: int = 1, seconds: int = 60) -> Recording:
    """The recording of one task of a subject. Raises ValueError for an unknown task."""
    scene = _Scene(subject, task, run, seconds)
    f, rate_hz, samples = scene.features, scene.rate_hz, scene.samples
    for name, hz, width_hz, sites in RHYTHMS:
        for site, x_T in zip(sites, rhythm(scene.rng, len(sites), hz, width_hz, rate_hz, samples), strict=True):
            scene.add(site, getattr(f, name) * x_T)
    for name, hz, balance, sites in (
        ("frontal_alpha_uv", f.alpha_hz, f.frontal_asymmetry, ("F3", "F4")),
        ("mu_uv", f.alpha_hz + P.mu_over_alpha_hz, f.mu_asymmetry, ("C3", "C4")),
    ):
        left_T, right_T = getattr(f, name) * rhythm(scene.rng, 2, hz, P.alpha_width_hz, rate_hz, samples)
        scene.add(sites[0], np.exp(-balance / 2) * left_T)
        scene.add(sites[1], np.exp(balance / 2) * right_T)
    alpha_2T = f.alpha_uv * rhythm(scene.rng, 2, f.alpha_hz, P.alpha_width_hz, rate_hz, samples)

    closed_T = np.zeros(samples, np.float32)
    if task == "RestingState":
        closed_T = _rest(scene)
    elif task in MOVIES:
        _movie(scene, task)
    elif task == "contrastChangeDetection":
        _contrast_change(scene, alpha_2T)
    elif task == "szMonitoring":
        if run == 1 or scene.rng.random() < P.second_seizure:
            _seizure(scene)
    else:
        raise ValueError(f"no task {task!r}")
    alpha_2T *= 1 + (P.eyes_closed_alpha - 1) * closed_T
    for site, x_T in zip(("O1", "O2"), alpha_2T, strict=True):
        scene.add(site, x_T)
    _blinks(scene, closed_T)
    x_CT = _at_electrodes(scene)
    bad = _spoil(scene.rng, x_CT)
    return Recording(x_CT, sorted(scene.events), bad, scene.seizures, scene.sites_ST)


def _at_electrodes(scene: _Scene) -> np.ndarray:
    subject, f, rng = scene.subject, scene.features, scene.rng
    hz = np.maximum(fft.rfftfreq(scene.samples, 1 / scene.rate_hz), 1e-3)
    amplitude_F = hz ** (-f.exponent / 2) / (1 + (P.background_corner_hz / hz) ** 4)
    background_BT = noise(rng, subject.background_CB.shape[1], amplitude_F, scene.samples)
    phase_T = 2 * np.pi * subject.montage.line_hz / scene.rate_hz * np.arange(scene.samples)
    spread_C = P.line_spread * (rng.standard_normal((len(subject.gain_C), 2)) @ [1, 1j])
    line_C = f.line_uv * np.sqrt(2) * np.exp(spread_C)
    mixing = np.c_[subject.sites_CS, subject.background_CB, line_C.real, line_C.imag]
    x_CT = mixing @ np.concatenate([scene.sites_ST, background_BT, [np.sin(phase_T), np.cos(phase_T)]])
    # float64 up to here: the order of a sum, which varies with the threads of the matrix product, must not reach the file
    x_CT += f.noise_uv * rng.standard_normal(x_CT.shape, np.float32)
    return x_CT.astype(np.float32)


def _spoil(rng: np.random.Generator, x_CT: np.ndarray) -> dict[int, str]:
    if rng.random() >= P.bad_recordings:
        return {}
    count = 1 if len(x_CT) < 64 else rng.integers(1, P.bad_channels + 1)
    bad = {int(channel): ("flat", "noisy")[rng.integers(2)] for channel in rng.choice(len(x_CT), count, replace=False)}
    for channel, what in bad.items():
        x_CT[channel] = 0 if what == "flat" else P.bad_noise_uv * rng.standard_normal(x_CT.shape[1], np.float32)
    return bad


def _blinks(scene: _Scene, closed_T: np.ndarray) -> None:
    t_s = scene.rng.exponential(60 / P.blinks_per_min)
    while t_s < scene.seconds:
        if closed_T[int(t_s * scene.rate_hz)] < 0.5:
            height_uv = scene.features.blink_uv * np.exp(P.trial_spread * scene.rng.standard_normal())
            for site in ("Fp1", "Fp2"):  # the two dipoles overlap: each carries half of the blink
                scene.bump(site, t_s, P.blink_s, height_uv / 2)
        t_s += P.blink_gap_s + scene.rng.exponential(60 / P.blinks_per_min - P.blink_gap_s)


def _rest(scene: _Scene) -> np.ndarray:
    closed_T = np.zeros(scene.samples, np.float32)
    t_T = np.arange(scene.samples) / scene.rate_hz
    scene.event(0.0, "resting_start", 90)
    onset_s, closed = 1.0, False
    while onset_s < scene.seconds - 1:
        if closed:
            scene.event(onset_s, "instructed_toCloseEyes", 30)
            since_s = t_T - onset_s  # it takes half a second to follow
            closed_T += np.clip(since_s / 0.5, 0, 1) - np.clip((since_s - P.rest_block_s) / 0.5, 0, 1)
        else:
            scene.event(onset_s, "instructed_toOpenEyes", 20)
        onset_s, closed = onset_s + P.rest_block_s, not closed
    return closed_T


def _movie(scene: _Scene, movie: str) -> None:
    start_s = scene.on_clock(1 + P.movie_lead_s * scene.rng.random())
    light_T, sound_T = movie_time_course(movie, scene.rate_hz, scene.seconds - start_s, scene.features.movie_latency_s)
    start = round(start_s * scene.rate_hz)
    scene.add("Oz", scene.features.movie_visual_uv * light_T, start)
    for site in ("T7", "T8"):
        scene.add(site, scene.features.movie_auditory_uv * sound_T, start)
    code = 81 + MOVIES.index(movie)
    scene.event(start_s, "video_start", code)
    scene.event(scene.seconds - 1 / scene.rate_hz, "video_stop", code + 20)


def _contrast_change(scene: _Scene, alpha_2T: np.ndarray) -> None:
    rng, f = scene.rng, scene.features
    power_T = np.log((abs(signal.hilbert(alpha_2T, axis=1)) ** 2).sum(0))
    half_s = scene.rate_hz // 2
    before_T = np.convolve(power_T, np.ones(half_s) / half_s)[: scene.samples]  # mean of the half second that ends here
    before_T = (before_T - before_T[half_s:].mean()) / before_T[half_s:].std()
    scene.event(0.0, "contrastChangeB1_start", 94)
    start_s = 1.0
    while True:
        target_s = scene.on_clock(start_s + P.target_delay_s + 0.6 * rng.random())
        if target_s + P.trial_gap_s > scene.seconds:
            return
        mean_s = f.rt_s + P.rt_per_alpha_s * before_T[round(target_s * scene.rate_hz)]
        rt_s = 0.0
        while not P.rt_min_s <= rt_s <= P.rt_max_s:
            rt_s = mean_s + P.rt_gauss_s * rng.standard_normal() + rng.exponential(P.rt_tail_s)
        response_s = scene.on_clock(target_s + rt_s)
        target, missed, wrong = ("left", "right")[rng.integers(2)], rng.random() < P.missed, rng.random() < P.wrong
        hand = {"left": "right", "right": "left"}[target] if wrong else target
        p3, motor, n1 = np.exp(P.trial_spread * rng.standard_normal(3))
        scene.event(scene.on_clock(start_s), "contrastTrial_start", 5)
        scene.event(target_s, f"{target}_target", {"left": 8, "right": 9}[target])
        scene.bump({"left": "P8", "right": "P7"}[target], target_s + P.n1_delay_s, P.n1_s, -n1 * f.n1_uv)
        if not missed:
            feedback = "sad_face" if wrong else "smiley_face"
            scene.event(response_s, f"{hand}_buttonPress", {"left": 12, "right": 13}[hand], feedback)
            scene.bump("Pz", response_s - P.p3_lead_s, P.p3_s, p3 * f.p3_uv)
            scene.bump({"left": "C4", "right": "C3"}[hand], response_s, P.motor_s, -motor * f.motor_uv)
        start_s = target_s + P.trial_gap_s


def _seizure(scene: _Scene) -> None:
    rng, height_uv = scene.rng, scene.features.seizure_uv
    start_s = scene.on_clock(scene.seconds * rng.uniform(0.2, 0.45))
    duration_s = scene.on_clock(scene.seconds * rng.uniform(0.2, 0.33))
    n, start = round(duration_s * scene.rate_hz), round(start_s * scene.rate_hz)
    t_s = np.arange(n) / scene.rate_hz
    done = t_s / duration_s
    ends = np.clip(np.minimum(t_s, duration_s - t_s) / 0.3, 0, 1)
    wander = 2 * np.pi / scene.rate_hz * np.cumsum(P.seizure_wander_hz * rhythm(rng, 1, 0, 0.3, scene.rate_hz, n)[0])
    if scene.subject.number // 2 % 2 == 0:
        phase = 2 * np.pi * P.spike_wave_hz * (t_s - t_s * done / 12) + wander
        position = phase / (2 * np.pi) % 1
        spike = np.exp(-((position - 0.15) ** 2) / (2 * 0.035**2))
        wave = np.where(position > 0.3, np.sin(np.pi * (position - 0.3) / 0.7), 0)
        x_T = height_uv * ends * (spike - wave)
        for site, strength in SPIKE_WAVE.items():
            scene.add(site, (strength * x_T).astype(np.float32), start)
    else:
        hz = P.focal_start_hz + (P.focal_stop_hz - P.focal_start_hz) * done
        phase = 2 * np.pi * np.cumsum(hz) / scene.rate_hz + wander
        growth = P.focal_growth ** (done - 1)
        lobe = rng.integers(2)
        for order, (*sites, reached, strength) in enumerate(FOCAL):
            there = np.clip((done - reached) / 0.05, 0, 1) if reached else 1
            wave = np.sin(phase - 0.4 * order) + 0.4 * np.sin(2 * phase - 0.8 * order)
            scene.add(sites[lobe], (strength * height_uv * ends * growth * there * wave).astype(np.float32), start)
    scene.seizures.append((start_s, scene.on_clock(start_s + duration_s)))
