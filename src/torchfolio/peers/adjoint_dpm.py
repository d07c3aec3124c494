"""The adjoint of torchdiffeq with the same method on the same grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchfolio.dynamics.diffusion import MLPDenoiser
from torchfolio.dynamics.diffusion_ode import DiffusionODE
from torchfolio.dynamics.noise_schedules import LinearSchedule
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
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
