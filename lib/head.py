"""
A head of four concentric spheres: the potential that current dipoles in the brain leave at the electrodes.

The series is Zhang's (Phys Med Biol 40:335, 1995, eqs 1-2; first for three shells: Ary et al., IEEE TBME 28:447, 1981), radii and
conductivities are those of Cuffin & Cohen (1979) that Berg & Scherg (1994) and MNE use. Electrodes are moved along the ray from
the sphere's centre onto its surface. Axes: C electrodes, K dipoles, 3 coordinates; unit vectors are called e.
"""

import numpy as np

from lib.channels import POSITIONS

SHELLS = ((0.90, 0.92, 0.97, 1.0), (0.33, 1.0, 0.004, 0.33))  # brain, CSF, skull, scalp: radius / outer radius, S/m
RADIUS_M = 0.09  # of the scalp, as in MNE; it only scales what a dipole moment is worth
TERMS = 80  # of the series: more of them change nothing above 1e-5 for sources up to 0.85 of the radius

_NET_C3 = np.array([POSITIONS[f"E{i}"] for i in range(1, 129)])
# |p|² = 2 p·c + (R² - |c|²) is linear in the centre c of the sphere through the net
CENTRE_M = np.linalg.lstsq(np.c_[2 * _NET_C3, np.ones(128)], (_NET_C3**2).sum(1), rcond=None)[0][:3]


def directions(names) -> np.ndarray:
    """Unit vectors e_C3 from the centre of the sphere to the electrodes called `names` (canonical)."""
    e_C3 = np.array([POSITIONS[name] for name in names]) - CENTRE_M
    return e_C3 / np.linalg.norm(e_C3, axis=1, keepdims=True)


def shell_factors(n_N: np.ndarray, shells=SHELLS) -> np.ndarray:
    """Factor by which the shells weaken term n of the homogeneous sphere's series, from continuity of potential and current at each border."""
    radii, sigmas = shells
    one_N, zero_N = np.ones(len(n_N)), np.zeros(len(n_N))
    # r^n and r^-(n+1) parts in the present shell, as functions of those in the brain
    growing, decaying = np.stack([one_N, zero_N]), np.stack([zero_N, one_N])
    for radius, inner, outer in zip(radii[:-1], sigmas[:-1], sigmas[1:], strict=True):
        s, x = inner / outer, (radius / radii[-1]) ** (2 * n_N + 1.0)
        growing, decaying = (
            ((n_N + 1 + s * n_N) * growing + (n_N + 1) * (1 - s) / x * decaying) / (2 * n_N + 1),
            (n_N * (1 - s) * x * growing + (n_N + s * (n_N + 1)) * decaying) / (2 * n_N + 1),
        )
    return n_N / (n_N * growing[0] - (n_N + 1) * decaying[0])


def leadfield(
    e_C3: np.ndarray, dipoles_K3: np.ndarray, moments_K3: np.ndarray, shells=SHELLS, terms: int = TERMS
) -> np.ndarray:
    """
    Potential a_CK (µV) at electrodes e_C3 (unit vectors) of dipoles at dipoles_K3 (units of the head's radius) with moments in nA·m.

    The reference is at infinity: the mean over the sphere is zero. Raises ValueError for a dipole outside the innermost shell.
    """
    eccentricity_K = np.linalg.norm(dipoles_K3, axis=1)
    if not (eccentricity_K < shells[0][0]).all():
        raise ValueError(f"dipole at {eccentricity_K.max():.3f} of the radius: the brain ends at {shells[0][0]}")
    e_K3 = dipoles_K3 / np.maximum(eccentricity_K, 1e-12)[:, None]
    x_CK = e_C3 @ e_K3.T
    radial_K = (moments_K3 * e_K3).sum(1)
    tangential_CK = e_C3 @ moments_K3.T - x_CK * radial_K
    n_N = np.arange(1, terms + 1)
    weight_N = (2 * n_N + 1) / n_N * shell_factors(n_N, shells)

    legendre, before = x_CK, np.ones_like(x_CK)  # P_n and P_(n-1)
    slope, slope_before = np.ones_like(x_CK), np.zeros_like(x_CK)  # their derivatives
    a_CK = np.zeros_like(x_CK)
    for n, weight in zip(n_N, weight_N, strict=True):
        a_CK += weight * eccentricity_K ** (n - 1) * (n * radial_K * legendre + tangential_CK * slope)
        legendre, before = ((2 * n + 1) * x_CK * legendre - n * before) / (n + 1), legendre
        slope, slope_before = slope_before + (2 * n + 1) * before, slope  # P'_(n+1) = P'_(n-1) + (2n+1) P_n
    return a_CK * 1e-3 / (4 * np.pi * shells[1][-1] * RADIUS_M**2)  # 1e-9 A·m, 1e6 µV
