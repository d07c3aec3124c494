"""Measures gradients through a sampler on point masses, a mixture and digits, and three uses of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchfolio.experiments._digit_diffusion import on_digits
from torchfolio.experiments._exact_diffusion import few_steps, on_mixture, point_mass
from torchfolio.runs import Results, Run, pick, plots, setting

GRADIENTS = ("adjoint", "backprop")
TASKS = (
    "targets_before", "targets_after", "flipped", "flipped_random", "flipped_shuffled", "style_reduction",
    "style_accuracy", "sample_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A denoiser and a classifier of digits, and the budgets of what is done with them."""

    train_steps: int = setting(2000, "number of steps of the denoiser")
    hidden: int = setting(256, "width of the denoiser")
    classifier_epochs: int = setting(12, "number of epochs of the classifier")
    steps: int = setting(20, "number of steps of the sampler in the three uses")
    iterations: int = setting(30, "number of iterations of each of the three uses")
    per_class: int = setting(20, "samples of a class that success is judged on")
    reference: int = setting(600, "steps of the reference solution on the mixture")


SCALES = {
    "smoke": Settings(train_steps=40, hidden=32, classifier_epochs=1, steps=4, iterations=2, per_class=2, reference=60),
    "quick": Settings(),
    "full": Settings(train_steps=20000, hidden=512, steps=30, per_class=100),
}


def run(run: Run[Settings]) -> None:
    """Compare with exact gradients where there are any, then with backprop on digits, and use them there."""
    settings = run.settings
    noise = torch.randn(64, 2, generator=run.generator(), dtype=torch.float64)
    run.values("point_mass", run.arm("point_mass", point_mass, noise))
    plane = run.arm("mixture", on_mixture, noise, settings.reference)
    run.values("few_uniform_steps", run.arm("few_steps", few_steps, noise, settings.reference))
    digits = run.arm("digits", on_digits, settings, run.data("digits", normalize=False), run.seed)
    accuracy = {
        f"{method}_{k}": plane[f"{method}_{k}"] for method in ("rk4", "heun") for k in ("noise", "scale", "median")
    }
    run.values("gradient_accuracy", accuracy)
    cosines = pick(digits, "cosine_cond", "cosine_weights")
    run.values("agrees_with_backprop", cosines, symplectic=plane["symplectic"])
    growth = {f"{grad}_growth": digits[f"{grad}_bytes_50"] / digits[f"{grad}_bytes_10"] for grad in GRADIENTS}
    run.values("memory", growth)
    run.values("digit_tasks", {name: digits[name] for name in TASKS})
    coarse = {name: plane[f"coarse_{name}"] for name in ("reconstruction", "warned")}
    run.values("negative_control", coarse, error=plane["coarse_noise"])


def figures(results: Results) -> plots.Figures:
    """Samples, stylised ones, and attacked ones, a digit of each class."""
    pictures = ((results.values("digits", "pictures")[0] + 1) / 2).clip(0, 1)
    titles = [title for title in ("sample", "stylised", "sample", "attacked") for _ in range(10)]
    return {"digits": plots.grid(pictures, titles, columns=10)}
