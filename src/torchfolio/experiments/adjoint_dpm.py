"""Measures gradients through a sampler on point masses, a mixture and digits, and three uses of them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.data import DataSplits
from torchfolio.dynamics.adjoint_dpm import adversarial_noise, finetune, optimize_condition, style_loss
from torchfolio.dynamics.diffusion import MLPDenoiser, train_diffusion
from torchfolio.dynamics.diffusion_ode import DiffusionODE
from torchfolio.dynamics.noise_schedules import LinearSchedule
from torchfolio.engine import fit
from torchfolio.engine.recipes import adamw, one_cycle
from torchfolio.experiments._exact_diffusion import few_steps, gradients, on_mixture, point_mass
from torchfolio.measure import saved_bytes
from torchfolio.runs import Results, Run, plots
from torchfolio.runs.bench import Bench


@dataclass(frozen=True)
class Settings:
    """A denoiser and a classifier of digits, and the budgets of what is done with them.

    Attributes:
        train_steps: of the denoiser.
        hidden: width of the denoiser.
        classifier_epochs: of the classifier.
        steps: of the sampler in the three uses.
        iterations: of each of the three uses.
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


def networks(settings: Settings, data: DataSplits, seed: int) -> tuple[nn.Module, MLPDenoiser, nn.Sequential]:
    """A classifier, a denoiser, and the convolutions of the classifier, on digits scaled to [-1, 1]."""
    x, y = data.train.tensors
    x = 2 * x - 1
    convolutions = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
    )
    classifier = nn.Sequential(
        convolutions, nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    fit(classifier, (x, y), epochs=settings.classifier_epochs, batch_size=64, optimizer=adamw(3e-3), scheduler=one_cycle(),
        seed=seed)  # fmt: skip
    denoiser = MLPDenoiser((1, 8, 8), settings.hidden, depth=2, num_classes=10)
    train_diffusion(denoiser, x, y, schedule=LinearSchedule(), steps=settings.train_steps, seed=seed)
    return classifier.eval().requires_grad_(False), denoiser.eval(), convolutions


def on_digits(settings: Settings, data: DataSplits, seed: int) -> dict[str, Any]:
    """Agreement, memory and the three uses on one trained denoiser."""
    classifier, net, convolutions = networks(settings, data, seed)
    ode, generator = DiffusionODE(net, LinearSchedule()), torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, 1, 8, 8, generator=generator)  # noqa: E731
    n, steps = settings.per_class, settings.steps
    y, noise, fresh = torch.arange(10).repeat_interleave(n), draw(10 * n), draw(10 * n)
    assert net.embed is not None

    right = lambda x: classifier(x).argmax(-1) == y  # noqa: E731
    sample = lambda ode, noise, cond=y: ode.sample(noise, 30, cond=cond).detach()  # noqa: E731
    result: dict[str, Any] = {"sample_accuracy": right(sample(ode, fresh)).float().mean()}

    loss = lambda x: F.cross_entropy(classifier(x), (y[:10] + 1) % 10)  # noqa: E731
    cond, weights = (
        net.embed(y[:10]).detach().requires_grad_(),
        [p for k, p in net.named_parameters() if k != "embed.weight"],
    )
    for grad in ("adjoint", "backprop"):
        arguments = {"cond": cond, "grad": grad, "params": weights}
        found, _ = gradients(ode, loss, noise[:10], cond, *weights, steps=30, **arguments)
        result |= {f"{grad}_cond": found[1].flatten(), f"{grad}_weights": torch.cat([g.flatten() for g in found[2:]])}
        for k in (10, 50):
            run = lambda k=k, arguments=arguments: gradients(ode, loss, noise[:10], cond, steps=k, **arguments)  # noqa: E731
            result[f"{grad}_bytes_{k}"] = saved_bytes(run, exclude=[net, classifier]).peak
    for part in ("cond", "weights"):
        ours, theirs = (result.pop(f"{grad}_{part}") for grad in ("adjoint", "backprop"))
        result[f"cosine_{part}"] = F.cosine_similarity(ours, theirs, dim=0)

    start = net.embed.weight.detach().mean(0).expand(10, -1)

    def towards(x: Tensor) -> Tensor:
        return F.cross_entropy(classifier(x), torch.arange(10).repeat_interleave(len(x) // 10), reduction="none")

    found, _ = optimize_condition(
        ode,
        towards,
        start,
        noise[:64],
        iterations=settings.iterations,
        batch_size=min(16, len(noise)),
        steps=steps,
        seed=seed,
    )
    for name, c in (("before", start), ("after", found)):
        hits = right(sample(ode, fresh[:n].repeat(10, 1, 1, 1), c.repeat_interleave(n, 0))).reshape(10, n)
        result[f"targets_{name}"] = (hits.float().mean(1) > 0.5).float().mean()

    attack = adversarial_noise(ode, classifier, noise, y, tau=0.8, lr=0.3, cond=y, steps=steps)
    moved = attack.noise - noise
    shuffled = moved.flatten(1).gather(1, torch.rand(len(y), 64, generator=generator).argsort(1)).reshape_as(moved)
    uniform = 0.8 * (2 * torch.rand(noise.shape, generator=generator) - 1)
    result["flipped"] = attack.success.sum() / attack.correct.sum()
    for name, other in (("random", uniform), ("shuffled", shuffled)):
        wrong = ~right(ode.sample(noise + other, steps, cond=y).detach()) & attack.correct
        result[f"flipped_{name}"] = wrong.sum() / attack.correct.sum()

    features = lambda x: [first := convolutions[0](x), convolutions[1](first)]  # noqa: E731
    x = 2 * data.train.tensors[0][:256] - 1
    bold = 0.5 * (x + F.pad(F.max_pool2d(x, 2, 1), (0, 1, 0, 1), value=-1.0))  # thicker strokes are the style
    other = DiffusionODE(copy.deepcopy(net), ode.schedule)
    finetune(other, style_loss(features, bold, style_weight=30.0), noise, cond=y, iterations=settings.iterations,
             batch_size=32, steps=steps, seed=seed)  # fmt: skip
    before, after = sample(ode, fresh), sample(other, fresh)
    style = style_loss(features, bold, content_weight=0.0)
    with torch.no_grad():
        result["style_reduction"] = 1 - style(after, before).mean() / style(before, before).mean()
    result["style_accuracy"] = right(after).float().mean()
    pictures = [picture[::n] for picture in (before, after, sample(ode, noise), attack.x.detach())]
    return {**{name: float(v) for name, v in result.items()}, "pictures": torch.cat(pictures)}


def run(run: Run[Settings]) -> None:
    settings = run.settings
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(run.seed), dtype=torch.float64)
    mass = run.arm("point_mass", point_mass, noise)
    plane = run.arm("mixture", on_mixture, noise, settings.reference)
    few = run.arm("few_steps", few_steps, noise, settings.reference)
    data = run.data("digits", normalize=False)
    digits = run.arm("digits", on_digits, settings, data, run.seed)
    run.values("point_mass", mass)
    run.values("few_uniform_steps", few)
    run.values("gradient_accuracy", {k: plane[k] for k in ("rk4_noise", "rk4_scale", "heun_noise", "heun_scale")})
    run.values("agrees_with_backprop", symplectic=plane["symplectic"], cosine_cond=digits["cosine_cond"],
               cosine_weights=digits["cosine_weights"])  # fmt: skip
    run.values("memory", {
        f"{grad}_growth": digits[f"{grad}_bytes_50"] / digits[f"{grad}_bytes_10"] for grad in ("adjoint", "backprop")
    })  # fmt: skip
    names = ("targets_before", "targets_after", "flipped", "flipped_random", "flipped_shuffled", "style_reduction",
             "style_accuracy", "sample_accuracy")  # fmt: skip
    run.values("digit_tasks", {name: digits[name] for name in names})
    run.values("negative_control", error=plane["coarse_noise"], reconstruction=plane["coarse_reconstruction"],
               warned=plane["coarse_warned"])  # fmt: skip


def figures(results: Results) -> dict[str, Figure]:
    pictures = results.values("digits", "pictures")[0]
    titles = ["sample", "stylised", "sample", "attacked"]
    return {
        "digits": plots.grid(
            ((pictures + 1) / 2).clip(0, 1), [title for title in titles for _ in range(10)], columns=10
        )
    }


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
