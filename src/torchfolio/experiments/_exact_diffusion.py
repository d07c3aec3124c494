"""Gradients through the sampler of diffusion models that are known exactly: a point mass and a mixture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.dynamics.diffusion_ode import DiffusionODE
from torchfolio.dynamics.exponential_solver import METHODS
from torchfolio.dynamics.noise_schedules import LinearSchedule

__all__ = ["EXACT", "MixtureDenoiser", "few_steps", "gradients", "mixture", "on_mixture", "point_mass", "raw_flow"]

EXACT = LinearSchedule(scale=1.0)  # the exact denoisers are told the time as it is


class MixtureDenoiser(nn.Module):
    """The exact noise predictor of a mixture of equal Gaussians; its one parameter multiplies the means `[K, d]`."""

    def __init__(self, means: Tensor, std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.means, self.std = means.double(), std

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = EXACT.alpha(t)[:, None], EXACT.sigma(t)[:, None]
        apart = x[:, None] - alpha[..., None] * self.scale * self.means
        variance = alpha**2 * self.std**2 + sigma**2
        share = torch.softmax(-apart.square().sum(-1) / (2 * variance), 1)
        return sigma / variance * (share[..., None] * apart).sum(1)


def mixture(std: float = 0.15) -> MixtureDenoiser:
    """Three components around the origin."""
    return MixtureDenoiser(torch.tensor([[1, 0], [-0.5, 0.8], [-0.5, -0.8]]), std)


def raw_flow(model: Callable[..., Tensor], x: Tensor, times: Tensor, heun: bool = False) -> Tensor:
    """Euler's or Heun's method on the flow before it is reparameterised, dx/dt = f x + g^2 / (2 sigma) noise."""

    def slope(x: Tensor, t: float) -> Tensor:
        beta = EXACT.beta_0 + t * (EXACT.beta_1 - EXACT.beta_0)
        sigma = EXACT.sigma(torch.tensor(t, dtype=torch.float64))
        return -0.5 * beta * x + 0.5 * beta / sigma * model(x, torch.full((len(x),), t, dtype=x.dtype))

    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        k = slope(x, t)
        x = x + (s - t) * (0.5 * (k + slope(x + (s - t) * k, s)) if heun else k)
    return x


@torch.no_grad()
def point_mass(noise: Tensor) -> dict[str, float]:
    """Errors of one reparameterised and of twenty raw steps, and of the adjoint, whose closed form is known."""
    mean = torch.tensor([0.7, -0.3], dtype=torch.float64)
    end = torch.tensor(EXACT.t_min, dtype=torch.float64)
    first = torch.tensor(EXACT.t_max, dtype=torch.float64)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return (x - EXACT.alpha(t)[:, None] * mean) / EXACT.sigma(t)[:, None]

    eps = model(noise, first.expand(len(noise)))
    exact = EXACT.alpha(end) * mean + EXACT.sigma(end) * eps
    ode = DiffusionODE(model, EXACT)
    # a(0) = a(rho_end) (rho_end + sigma_T) / sigma_T, which as a gradient of x is sigma_end / sigma_T.
    known = float(EXACT.sigma(end) / EXACT.sigma(first))
    result = {
        "one_step": float((ode.sample(noise, 1, "euler", "time_uniform") - exact).abs().max()),
        "raw": float((raw_flow(model, noise, torch.linspace(1.0, EXACT.t_min, 21)) - exact).abs().max()),
    }
    steps, errors = (25, 50, 100, 200), {}
    for name in ("midpoint", "heun", "rk4"):
        errors[name] = []
        for n in steps:
            with torch.enable_grad():
                leaf = noise.clone().requires_grad_()
                ode.sample(leaf, n, name, "logsnr").sum().backward()
            assert leaf.grad is not None
            errors[name].append(float((leaf.grad - known).abs().max()) / known)
    # Heun's method solves da/drho = -a / (rho + sigma_T) without error, and so does the classical one.
    result |= {f"{name}_error": max(errors[name]) for name in ("heun", "rk4")}
    return {**result, "midpoint_order": -float(np.polyfit(np.log(steps), np.log(errors["midpoint"]), 1)[0])}


def gradients(
    ode: DiffusionODE, loss: Callable[[Tensor], Tensor], noise: Tensor, *tensors: Tensor, **solve: Any
) -> tuple:
    """Gradients of a loss on samples with respect to the noise and to tensors, and what they cost."""
    leaf = noise.clone().requires_grad_()
    solution = ode.solve(leaf, **solve)
    return torch.autograd.grad(loss(solution.x), [leaf, *tensors]), solution.stats


def apart(a: Tensor, b: Tensor) -> float:
    """Relative distance from b."""
    return float((a - b).norm() / b.norm())


def on_mixture(noise: Tensor, reference: int) -> dict[str, float]:
    """Errors of adjoint gradients against a fine reference, and of the discrete ones against backprop."""
    model = mixture()
    ode, target = DiffusionODE(model, EXACT), torch.tensor([0.3, 0.3], dtype=torch.float64)

    def gradient(steps: int, method: str, grid: str = "logsnr", grad: str = "adjoint") -> tuple:
        loss = lambda x: (x - target).square().sum(1).mean()  # noqa: E731
        return gradients(ode, loss, noise, model.scale, steps=steps, method=method, grid=grid, grad=grad)

    (x, scale), _ = gradient(reference, "rk4", grad="symplectic")
    result: dict[str, float] = {}
    for name, arguments in {"rk4": (50, "rk4"), "heun": (50, "heun"), "coarse": (20, "euler", "time_uniform")}.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found, stats = gradient(*arguments)
        result |= {f"{name}_noise": apart(found[0], x), f"{name}_scale": apart(found[1], scale)}
        result[f"{name}_median"] = float(((found[0] - x).norm(dim=1) / x.norm(dim=1)).median())
        result |= {f"{name}_reconstruction": stats.reconstruction_error, f"{name}_warned": float(len(told))}
    worst = 0.0
    for method in METHODS:
        ours, theirs = (gradient(7, method, grad=grad)[0] for grad in ("symplectic", "backprop"))
        worst = max(worst, *(apart(a, b) for a, b in zip(ours, theirs, strict=True)))
    return {**result, "symplectic": worst}


@torch.no_grad()
def few_steps(noise: Tensor, reference: int) -> dict[str, float]:
    """Median errors of ten steps on a narrow mixture, reparameterised and raw."""
    model = mixture(0.02)
    ode = DiffusionODE(model, EXACT)
    exact = ode.sample(noise, reference, "rk4")
    result = {}
    for method, grid in (("euler", "time_uniform"), ("heun", "logsnr")):
        ours = ode.solve(noise, 10, method, grid)
        for name, x in (("rho", ours.x), ("raw", raw_flow(model, noise, ours.times, method == "heun"))):
            result[f"{name}_{method}"] = float((x - exact).norm(dim=1).median())
    return result
