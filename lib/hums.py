"""
Hums: tones of nearly constant loudness in a signal, whatever their phase, found, taken off windows and put back.

Mains, motors and what turns beside the machine that is meant hum on their own time. To a filter a hum is noise in a narrow band, whose loudness
would change from window to window; a network that is trained for minutes hears no difference either, and what it makes varies more than any
machine. So the hums of a group are measured in its training windows, their phases in each window; generated windows draw them uniformly.

A table has the amplitude at every frequency of a grid FINER than a window's own, zero where nothing hums. Shape letters: N windows,
T samples, F = FINER T / 2 + 1 frequencies, P hums.
"""

import math

import torch

FINER = 4
EDGE = 4  # of the window's own frequencies, at either end, that nothing is looked for in
NEAR = 2.5  # of them, between two hums: the main lobe of a Hann window is two wide to either side
SURE = 1.5  # standard errors of Gaussian noise's power that a hum's must vary less by
MOST = 64  # hums of a group


def find(x_NT: torch.Tensor, apart: float) -> torch.Tensor:
    """
    Amplitudes of what hums in windows of which `apart` are as good as independent, float32 (F); all zero where that can't be told.

    The power of a sine of amplitude A in noise of power s has mean m = A² + s and variance v = 2 A² s + s² (Rice 1944), so A² = √(m² - v).
    Noise alone has v = m², give or take m² √(8 / windows).
    """
    power_NF = lines(x_NT.double()).abs().square()
    mean_F = power_NF.mean(0)
    steady_F = mean_F.square() - power_NF.var(0, correction=0)
    steady_F = torch.where(steady_F > SURE * math.sqrt(8 / apart) * mean_F.square(), steady_F, 0.0)
    steady_F[: FINER * EDGE] = steady_F[-FINER * EDGE :] = 0.0
    found_F, near = torch.zeros(len(mean_F)), round(NEAR * FINER)
    for _ in range(MOST):
        at = int(steady_F.argmax())
        if steady_F[at] <= 0:
            break
        found_F[at] = float(steady_F[at]) ** 0.25
        steady_F[max(0, at - near) : at + near + 1] = 0.0
    return found_F


def lines(x_NT: torch.Tensor) -> torch.Tensor:
    """Complex amplitudes of windows (N, F), tapered by a Hann window: those of a sine at its own frequency."""
    taper_T = torch.hann_window(x_NT.shape[-1], dtype=x_NT.dtype)
    return torch.fft.rfft(x_NT * (2 / taper_T.sum()) * taper_T, FINER * x_NT.shape[-1])


def of(x_NT: torch.Tensor, hum_NF: torch.Tensor) -> torch.Tensor:
    """The hums in windows (N, T), of their own phases and their group's amplitudes."""
    line_NF = lines(x_NT)
    return sound(hum_NF * line_NF / line_NF.abs().clamp_min(1e-12), x_NT.shape[-1])


def drawn(hum_F: torch.Tensor, u_NP: torch.Tensor, samples: int) -> torch.Tensor:
    """Hums of a group with phases that are uniform if `u_NP` is, P at least their number (N, T)."""
    at_P = hum_F.nonzero()[:, 0]
    line_NF = torch.zeros(len(u_NP), len(hum_F), dtype=torch.complex64)
    line_NF[:, at_P] = torch.polar(hum_F[at_P].expand(len(u_NP), -1), 2 * math.pi * u_NP[:, : len(at_P)].float())
    return sound(line_NF, samples)


def sound(line_NF: torch.Tensor, samples: int) -> torch.Tensor:
    """Sum of sines of these complex amplitudes (N, T)."""
    n = FINER * samples
    return torch.fft.irfft(line_NF * (n / 2), n)[:, :samples]
