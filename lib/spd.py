"""
Covariance matrices of windows and the geometry they live in, in plain NumPy: what a served window costs, it costs here.

Equal to scikit-learn's and pyriemann's (tests/test_pipelines.py), at a fraction of their overhead per call and without importing them.

Shapes: N matrices, E channels, T samples.
"""

import numpy as np


def oas(x_NET: np.ndarray) -> np.ndarray:
    """Covariances (N, E, E) of windows, shrunk towards the identity by oracle approximating shrinkage (Chen et al. 2010, eq. 23)."""
    x_NET = x_NET - x_NET.mean(2, keepdims=True)
    E, T = x_NET.shape[1:]
    s_NEE = x_NET @ x_NET.transpose(0, 2, 1) / T
    mu_N = np.trace(s_NEE, axis1=1, axis2=2) / E
    alpha_N = np.mean(s_NEE**2, axis=(1, 2))
    below_N = (T + 1) * (alpha_N - mu_N**2 / E)
    share_N = np.minimum((alpha_N + mu_N**2) / np.where(below_N > 0, below_N, 1), 1)
    share_N = np.where(below_N > 0, share_N, 1)[:, None, None]
    return (1 - share_N) * s_NEE + share_N * mu_N[:, None, None] * np.eye(E)


def power(c_NEE: np.ndarray, exponent: float) -> np.ndarray:
    """Real powers of symmetric positive definite matrices."""
    return function(c_NEE, lambda v: v**exponent)


def function(c_NEE: np.ndarray, f) -> np.ndarray:
    """f of the eigenvalues of symmetric matrices."""
    v_NE, u_NEE = np.linalg.eigh(c_NEE)
    return (u_NEE * f(v_NE)[..., None, :]) @ u_NEE.swapaxes(-1, -2)


def mean(c_NEE: np.ndarray, weight_N: np.ndarray | None = None, steps: int = 50, tolerance: float = 1e-8) -> np.ndarray:
    """Affine-invariant mean (E, E): the point to which the geodesics from all matrices add up to nothing (Moakher 2005)."""
    weight_N = np.ones(len(c_NEE)) if weight_N is None else np.asarray(weight_N, np.float64)
    weight_N = weight_N / weight_N.sum()
    mean_EE = np.einsum("n,nij->ij", weight_N, c_NEE)
    stride, before = 1.0, np.inf
    for _ in range(steps):
        root_EE, inverse_EE = power(mean_EE, 0.5), power(mean_EE, -0.5)
        tangent_EE = np.einsum("n,nij->ij", weight_N, function(inverse_EE @ c_NEE @ inverse_EE, np.log))
        mean_EE = root_EE @ function(stride * tangent_EE, np.exp) @ root_EE
        mean_EE = (mean_EE + mean_EE.T) / 2
        size = np.linalg.norm(tangent_EE)
        if size < tolerance or stride < 1e-4:
            break
        stride, before = (stride * 0.95, size) if stride * size < before else (stride * 0.5, before)
    return mean_EE


def transport(start_EE: np.ndarray, end_EE: np.ndarray) -> np.ndarray:
    """E with E start E' = end, which moves matrices along the geodesic between both (Yair et al. 2019, eq. 7)."""
    root_EE, inverse_EE = power(start_EE, 0.5), power(start_EE, -0.5)
    return root_EE @ power(inverse_EE @ end_EE @ inverse_EE, 0.5) @ inverse_EE
