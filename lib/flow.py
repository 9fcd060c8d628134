"""
Rectified flow: a straight path from noise to data, what a network predicts along it, and the ways back and forth.

x_t = t x_1 + (1 - t) x_0 with x_0 white noise, x_1 data; the velocity along the path is x_1 - x_0, and what is learned is its mean given
x_t (Lipman 2023, Liu 2023). A velocity is a function (x_BCT, t) -> v_BCT, t a float.

Shape letters: B or N windows, C channels, T samples, K probes.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch

from lib.errors import Unusable
from lib.masks import uniform
from lib.samplers import derive, key

PREDICTIONS = ("v", "x1", "preconditioned")
TIMES = ("logit-normal", "uniform", "ends")
SOLVERS = ("euler", "heun", "midpoint", "sde")
CLOSEST = 0.05  # 1 - t is at least this where it divides
DIFFUSION = 1.0  # of the SDE: noise of variance 2 x DIFFUSION x (1 - t) per unit of time; any value keeps the marginals

Velocity = Callable[[torch.Tensor, float], torch.Tensor]


# ----------------------------------------------------------------------------
# the path


def draw_times(kind: str, uniform_share: float, seed: int, step: int, index_B: np.ndarray) -> torch.Tensor:
    """
    Times of windows, float32 (B), functions of (seed, step, window) alone: uniform; logit-normal with mean 0 and deviation 1 (Esser 2024);
    or ends, with density ~ cosh(4 t - 2), for straightened paths, which are hard where noise and data are (Lee 2024).

    `uniform_share` of those that aren't uniform are so all the same.
    """
    u_B2 = torch.from_numpy(uniform(seed, step, index_B, 2, "flow time"))
    plain_B = u_B2[:, 0]
    if kind == "uniform":
        return plain_B.float()
    curved_B = torch.sigmoid(torch.special.ndtri(plain_B.clamp(1e-9, 1 - 1e-9)))
    if kind == "ends":
        curved_B = 0.5 + 0.25 * torch.asinh((2 * plain_B - 1) * math.sinh(2))
    return torch.where(u_B2[:, 1] < uniform_share, plain_B, curved_B).float()


def draw_noise(seed: int, step: int, index_B: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise (B, *shape), a function of (seed, step, window) alone."""
    keys_B = derive(key(seed, "flow noise"), step, index_B) >> np.uint64(1)
    noise = torch.empty(len(index_B), *shape)
    for row, number in zip(noise, keys_B.tolist(), strict=True):
        row.normal_(generator=torch.Generator().manual_seed(number))
    return noise


def spread(t_B: torch.Tensor, x_BCT: torch.Tensor) -> torch.Tensor:
    """Times in the shape of windows."""
    return t_B.reshape(-1, *[1] * (x_BCT.ndim - 1))


def between(x0_BCT: torch.Tensor, x1_BCT: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """x_t."""
    return torch.lerp(x0_BCT, x1_BCT, spread(t_B, x1_BCT))


def to_velocity(out_BCT: torch.Tensor, x_BCT: torch.Tensor, t_B: torch.Tensor, prediction: str) -> torch.Tensor:
    """
    The velocity that a network's output means.

    v: the output is the velocity. x1: it is the data, so v = (out - x) / (1 - t).
    preconditioned (after Karras 2022): v = (2 t - 1) / D x + out / sqrt(D) with D = t² + (1 - t)². The first term is the exact velocity
    for white Gaussian data of variance 1; the network adds the rest, which is of order 1 at all times. A network that gives 0 thus
    generates white noise, which unwhitening gives the right spectrum.
    """
    if prediction == "v":
        return out_BCT
    t = spread(t_B, x_BCT)
    if prediction == "x1":
        return (out_BCT - x_BCT) / (1 - t).clamp_min(CLOSEST)
    d = t.square() + (1 - t).square()
    return (2 * t - 1) / d * x_BCT + out_BCT / d.sqrt()


def loss_flow(
    v_BCT: torch.Tensor, x0_BCT: torch.Tensor, x1_BCT: torch.Tensor, mask_BC: torch.Tensor | None
) -> torch.Tensor:
    """Squared error of the velocity of each window (B): mean over its good channels and their samples."""
    error_BC = (v_BCT.float() - (x1_BCT - x0_BCT)).square().mean(2)
    return error_BC.mean(1) if mask_BC is None else (error_BC * mask_BC).sum(1) / mask_BC.sum(1).clamp_min(1)


# ----------------------------------------------------------------------------
# from noise to data


def guided(given: Velocity, null: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale x (given - null); 1 is the plain conditional velocity."""
    if scale == 1.0:
        return given

    def velocity(x_BCT: torch.Tensor, t: float) -> torch.Tensor:
        without_BCT = null(x_BCT, t)
        return without_BCT + scale * (given(x_BCT, t) - without_BCT)

    return velocity


@torch.no_grad()
def integrate(
    velocity: Velocity,
    x_BCT: torch.Tensor,
    nfe: int,
    solver: str = "heun",
    noise: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    From noise at t = 0 to data at t = 1 in at most `nfe` evaluations of the velocity, in equal steps.

    euler, sde: one evaluation per step; midpoint: two; heun: two, but where an odd one is left the last step is Euler's. The SDE adds noise
    that vanishes at t = 1 and the drift that keeps every marginal: dx = [v + g²/2 s] dt + g dW with the score s = (t v - x) / (1 - t) and
    g² = 2 DIFFUSION (1 - t); `noise(i)` is that of its step i. Raises Unusable for fewer evaluations than a step takes.
    """
    each = 1 if solver in ("euler", "sde") else 2
    if solver not in SOLVERS or nfe < 1 or (solver == "midpoint" and nfe < 2):
        raise Unusable(f"--solver {solver} --nfe {nfe}: one of {', '.join(SOLVERS)}, and evaluations for one step")
    steps = -(-nfe // each) if solver == "heun" else nfe // each
    for i in range(steps):
        t, h = i / steps, 1 / steps
        v_BCT = velocity(x_BCT, t)
        if solver == "midpoint":
            v_BCT = velocity(x_BCT + 0.5 * h * v_BCT, t + 0.5 * h)
        elif solver == "heun" and not (i == steps - 1 and nfe % 2):
            v_BCT = 0.5 * (v_BCT + velocity(x_BCT + h * v_BCT, t + h))
        elif solver == "sde":
            kick = math.sqrt(DIFFUSION * (2 * h * (1 - t) - h * h))  # the variance of the noise over the step
            x_BCT = x_BCT + h * DIFFUSION * (t * v_BCT - x_BCT) + kick * noise(i).to(x_BCT)
        x_BCT = x_BCT + h * v_BCT
    return x_BCT


@torch.no_grad()
def sample(
    net: torch.nn.Module,
    code_NF: torch.Tensor,
    positions_C3: torch.Tensor,
    samples: int,
    prediction: str,
    cfg: float = 1.0,
    nfe: int = 16,
    solver: str = "heun",
    seed: int = 0,
    first: int = 0,
    batch: int = 64,
) -> torch.Tensor:
    """
    Windows (N, C, samples), float32 on the CPU, still white, of a velocity network for condition codes (N, F; NaN for null).

    Window n is a function of (seed, first + n) and its codes, however many others there are. With cfg != 1 each evaluation is two passes.
    """
    device = next(net.parameters()).device
    done = []
    for at in range(0, len(code_NF), batch):
        code_BF = code_NF[at : at + batch].to(device)
        index_B = np.arange(first + at, first + at + len(code_BF))
        shape = (len(positions_C3), samples)
        positions_BC3 = positions_C3.to(device).expand(len(code_BF), -1, -1)
        given = network_velocity(net, code_BF, positions_BC3, prediction)
        null = network_velocity(net, torch.full_like(code_BF, math.nan), positions_BC3, prediction)
        noise = functools.partial(_step_noise, seed, index_B, shape)
        done.append(integrate(guided(given, null, cfg), noise(-1).to(device), nfe, solver, noise).cpu())
    return torch.cat(done)


def _step_noise(seed: int, index_B: np.ndarray, shape: tuple[int, ...], step: int) -> torch.Tensor:
    return draw_noise(seed, step + 1, index_B, shape)


def network_velocity(
    net: torch.nn.Module, code_BF: torch.Tensor, positions_BC3: torch.Tensor, prediction: str
) -> Velocity:
    """The velocity of a network under fixed conditions."""

    def velocity(x_BCT: torch.Tensor, t: float) -> torch.Tensor:
        t_B = x_BCT.new_full((len(x_BCT),), t)
        out_BCT, _ = net(x_BCT, t_B, code_BF, positions_BC3, None)
        return to_velocity(out_BCT.float(), x_BCT, t_B, prediction)

    return velocity


# ----------------------------------------------------------------------------
# from data to noise


def log_likelihood(
    velocity: Velocity, x_BCT: torch.Tensor, steps: int = 16, probes: int = 4, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The noise that windows come from, their log density in nats, and its standard error, float64 (B), by the change of variables backwards.

    Midpoint steps; the divergence of the velocity by Hutchinson's estimate with `probes` random signs, the same ones all the way, so that
    each probe gives an unbiased number and their spread the error (Grathwohl 2019).
    """
    generator = torch.Generator().manual_seed(seed)
    sign_KBCT = (torch.randint(0, 2, (probes, *x_BCT.shape), generator=generator) * 2 - 1).to(x_BCT)
    gained_KB = torch.zeros(probes, len(x_BCT), dtype=torch.float64, device=x_BCT.device)
    h = 1 / steps
    for i in range(steps, 0, -1):
        t = i / steps
        with torch.no_grad():
            middle_BCT = x_BCT - 0.5 * h * velocity(x_BCT, t)
        with torch.enable_grad():
            middle_BCT = middle_BCT.detach().requires_grad_()
            v_BCT = velocity(middle_BCT, t - 0.5 * h)
            for k, sign_BCT in enumerate(sign_KBCT):
                (pulled,) = torch.autograd.grad((v_BCT * sign_BCT).sum(), middle_BCT, retain_graph=k < probes - 1)
                gained_KB[k] -= h * (pulled * sign_BCT).flatten(1).sum(1).double()
        x_BCT = x_BCT - h * v_BCT.detach()
    z_BD = x_BCT.double().flatten(1)
    base_B = -0.5 * (z_BD.square() + math.log(2 * math.pi)).sum(1)
    error_B = gained_KB.std(0) / math.sqrt(probes) if probes > 1 else torch.full_like(base_B, math.nan)
    return x_BCT, base_B + gained_KB.mean(0), error_B
