"""Teach a diffusion model three blobs, then find the condition and the noise whose samples land where we want."""

import torch

from torchfolio.dynamics import DiffusionODE, optimize_condition
from torchfolio.dynamics.diffusion import MLPDenoiser, train_diffusion
from torchfolio.dynamics.noise_schedules import CosineSchedule

generator = torch.Generator().manual_seed(0)
centres = torch.tensor([[-0.8, -0.5], [0.0, 0.7], [0.8, -0.5]])
labels = torch.arange(3).repeat(200)
points = centres[labels] + 0.05 * torch.randn(600, 2, generator=generator)

torch.manual_seed(0)
model = MLPDenoiser((2,), hidden=48, depth=2, num_classes=3, cond_dim=4)
train_diffusion(model, points, labels, schedule=CosineSchedule(), steps=200, lr=5e-3)
ode = DiffusionODE(model.eval(), CosineSchedule())

# A condition between the classes, optimised until samples are at a place that no label names.
place = torch.tensor([0.0, -0.5])
noise = torch.randn(32, 2, generator=generator)
between, losses = optimize_condition(
    ode,
    lambda x: (x - place).square().sum(1),
    torch.zeros(4),
    noise,
    iterations=20,
    lr=0.1,
    steps=12,
    grad="symplectic",
)
print(f"distance from the place: {losses[0] ** 0.5:.2f} before, {losses[-1] ** 0.5:.2f} after")

# The gradient with respect to the noise, exact for the steps that were made.
noise.requires_grad_()
solution = ode.solve(noise, 15, cond=labels[:32], grad="symplectic")
(gradient,) = torch.autograd.grad(solution.x.square().sum(), noise)
print(f"{solution.stats}, norm of the gradient {gradient.norm():.3f}")
