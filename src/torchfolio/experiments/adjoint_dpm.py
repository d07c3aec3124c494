"""Measures gradients through a sampler on point masses, a mixture and digits, and three uses of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchfolio.dynamics.diffusion import MLPDenoiser
from torchfolio.dynamics.diffusion_ode import DiffusionODE
from torchfolio.dynamics.noise_schedules import LinearSchedule
from torchfolio.experiments._digit_diffusion import on_digits
from torchfolio.experiments._exact_diffusion import few_steps, on_mixture, point_mass
from torchfolio.runs import Results, Run, plots
from torchfolio.runs.bench import Bench

GRADIENTS = ("adjoint", "backprop")
TASKS = (
    "targets_before", "targets_after", "flipped", "flipped_random", "flipped_shuffled", "style_reduction",
    "style_accuracy", "sample_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A denoiser and a classifier of digits, and the budgets of what is done with them.

    Attributes:
        train_steps: number of steps of the denoiser.
        hidden: width of the denoiser.
        classifier_epochs: number of epochs of the classifier.
        steps: number of steps of the sampler in the three uses.
        iterations: number of iterations of each of the three uses.
        per_class: samples of a class that success is judged on.
        reference: steps of the reference solution on the mixture.
    """

    train_steps: int = 2000
    hidden: int = 256
    classifier_epochs: int = 12
    steps: int = 20
    iterations: int = 30
    per_class: int = 20
    reference: int = 600


SCALES = {
    "smoke": Settings(train_steps=40, hidden=32, classifier_epochs=1, steps=4, iterations=2, per_class=2, reference=60),
    "quick": Settings(),
    "full": Settings(train_steps=20000, hidden=512, steps=30, per_class=100),
}


def run(run: Run[Settings]) -> None:
    """Compare with exact gradients where there are any, then with backprop on digits, and use them there."""
    settings = run.settings
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(run.seed), dtype=torch.float64)
    run.values("point_mass", run.arm("point_mass", point_mass, noise))
    plane = run.arm("mixture", on_mixture, noise, settings.reference)
    run.values("few_uniform_steps", run.arm("few_steps", few_steps, noise, settings.reference))
    digits = run.arm("digits", on_digits, settings, run.data("digits", normalize=False), run.seed)
    accuracy = {
        f"{method}_{k}": plane[f"{method}_{k}"] for method in ("rk4", "heun") for k in ("noise", "scale", "median")
    }
    run.values("gradient_accuracy", accuracy)
    cosines = {name: digits[name] for name in ("cosine_cond", "cosine_weights")}
    run.values("agrees_with_backprop", cosines, symplectic=plane["symplectic"])
    growth = {f"{grad}_growth": digits[f"{grad}_bytes_50"] / digits[f"{grad}_bytes_10"] for grad in GRADIENTS}
    run.values("memory", growth)
    run.values("digit_tasks", {name: digits[name] for name in TASKS})
    coarse = {name: plane[f"coarse_{name}"] for name in ("reconstruction", "warned")}
    run.values("negative_control", coarse, error=plane["coarse_noise"])


def figures(results: Results) -> dict[str, Figure]:
    """Samples, stylised ones, and attacked ones, a digit of each class."""
    pictures = ((results.values("digits", "pictures")[0] + 1) / 2).clip(0, 1)
    titles = [title for title in ("sample", "stylised", "sample", "attacked") for _ in range(10)]
    return {"digits": plots.grid(pictures, titles, columns=10)}


def peers(bench: Bench) -> None:
    """The adjoint of torchdiffeq with the same method on the same grid."""
    from torchdiffeq import odeint_adjoint

    schedule = LinearSchedule()
    net = MLPDenoiser((1, 8, 8), 256, depth=2)
    ode, noise = DiffusionODE(net, schedule), torch.randn(64, 1, 8, 8)
    times = ode.solve(noise, 30).times
    alphas, sigmas = schedule.alpha(times), schedule.sigma(times)
    alpha, sigma = float(alphas[0]), float(sigmas[0])
    rho = (alpha * sigmas / alphas - sigma).float()

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, rho: Tensor, y: Tensor) -> Tensor:
            ratio = (float(rho.detach()) + sigma) / alpha  # sigma_t / alpha_t; in plain numbers, which is fastest here
            s = 2 * (schedule.beta_1 - schedule.beta_0) * math.log1p(ratio**2)
            t = s / ((math.sqrt(schedule.beta_0**2 + s) + schedule.beta_0) * (schedule.beta_1 - schedule.beta_0))
            x = y / (alpha * math.sqrt(1 + ratio**2))
            return self.net(x, torch.full((len(y),), 1000 * t))

    flow = Flow()
    options = {"grid_constructor": lambda func, y, t: rho}
    back = {"grid_constructor": lambda func, y, t: -rho.flip(0)}  # it negates falling times

    def ours() -> None:
        leaf = noise.clone().requires_grad_()
        ode.sample(leaf, 30).square().mean().backward()

    def theirs() -> None:
        leaf = noise.clone().requires_grad_()
        y = odeint_adjoint(flow, leaf, rho[[0, -1]], method="heun2", options=options, adjoint_options=back)
        (torch.as_tensor(y)[-1] * float(alphas[-1] / alphas[0])).square().mean().backward()

    bench.compare("a sample of 30 steps of Heun's method and its gradient, 64 digits", ours=ours, torchdiffeq=theirs)
