"""Gradients through a sampler of digits: how they agree with backprop and what they cost, and three uses of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.data import DataSplits
from torchfolio.dynamics.adjoint_dpm import adversarial_noise, finetune, optimize_condition, style_loss
from torchfolio.dynamics.diffusion import MLPDenoiser, train_diffusion
from torchfolio.dynamics.diffusion_ode import DiffusionODE
from torchfolio.dynamics.noise_schedules import LinearSchedule
from torchfolio.engine import fit
from torchfolio.engine.recipes import adamw, one_cycle
from torchfolio.experiments._exact_diffusion import gradients
from torchfolio.measure import saved_bytes


def on_digits(settings: Any, data: DataSplits, seed: int) -> dict[str, Any]:
    """All that is measured on one trained denoiser; every number is a float."""
    digits = DigitDiffusion(settings, data, seed)
    measured = {"sample_accuracy": digits.right(digits.samples(digits.fresh)).float().mean(), **digits.agreement()}
    measured |= digits.towards_classes()
    attacked, flipped = digits.attacked()
    stylised, style = digits.stylised()
    pictures = [digits.samples(digits.fresh), stylised, digits.samples(digits.noise), attacked]
    each = settings.per_class
    return {
        **{name: float(value) for name, value in (measured | flipped | style).items()},
        "pictures": torch.cat([picture[::each] for picture in pictures]),
    }


class DigitDiffusion:
    """A denoiser and a classifier of digits scaled to [-1, 1], and noises and classes for all that is done with them.

    Attributes:
        y: classes, as many of each.
        noise: noise that is optimised, attacked or fine-tuned on, one for each of `y`.
        fresh: noise that success is judged on.
    """

    def __init__(self, settings: Any, data: DataSplits, seed: int) -> None:
        self.settings, self.data, self.seed = settings, data, seed
        x, y = data.train.tensors
        x = 2 * x - 1
        self.convolutions = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        )
        head = [nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)]
        self.classifier = nn.Sequential(self.convolutions, *head)
        budget = {"epochs": settings.classifier_epochs, "batch_size": 64, "seed": seed}
        fit(self.classifier, (x, y), optimizer=adamw(3e-3), scheduler=one_cycle(), **budget)
        self.classifier.eval().requires_grad_(False)
        self.net = MLPDenoiser((1, 8, 8), settings.hidden, depth=2, num_classes=10)
        train_diffusion(self.net, x, y, schedule=LinearSchedule(), steps=settings.train_steps, seed=seed)
        self.ode = DiffusionODE(self.net.eval(), LinearSchedule())
        self.generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(10).repeat_interleave(settings.per_class)
        self.noise, self.fresh = (torch.randn(len(self.y), 1, 8, 8, generator=self.generator) for _ in range(2))

    def right(self, x: Tensor) -> Tensor:
        """Which images the classifier takes for their class."""
        return self.classifier(x).argmax(-1) == self.y

    def samples(self, noise: Tensor, cond: Tensor | None = None, ode: DiffusionODE | None = None) -> Tensor:
        """Images of 30 steps, by class or condition."""
        return (ode or self.ode).sample(noise, 30, cond=self.y if cond is None else cond).detach()

    def embedding(self) -> nn.Embedding:
        assert self.net.embed is not None
        return self.net.embed

    def agreement(self) -> dict[str, Any]:
        """Cosines of the adjoint's gradients with backprop's, and bytes saved by both for 10 steps and 50."""
        y, noise, result = self.y[:10], self.noise[:10], {}
        cond = self.embedding()(y).detach().requires_grad_()
        weights = [p for name, p in self.net.named_parameters() if name != "embed.weight"]
        flat: dict[str, list[Tensor]] = {}

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(self.classifier(x), (y + 1) % 10)

        for grad in ("adjoint", "backprop"):
            arguments = {"cond": cond, "grad": grad, "params": weights}
            both, _ = gradients(self.ode, loss, noise, cond, *weights, steps=30, **arguments)
            flat[grad] = [both[1].flatten(), torch.cat([g.flatten() for g in both[2:]])]
            for k in (10, 50):

                def through(k: int = k, arguments: dict[str, Any] = arguments) -> Any:
                    return gradients(self.ode, loss, noise, cond, steps=k, **arguments)

                result[f"{grad}_bytes_{k}"] = saved_bytes(through, exclude=[self.net, self.classifier]).peak
        for name, ours, theirs in zip(("cond", "weights"), flat["adjoint"], flat["backprop"], strict=True):
            result[f"cosine_{name}"] = F.cosine_similarity(ours, theirs, dim=0)
        return result

    def towards_classes(self) -> dict[str, Tensor]:
        """Conditions optimised from the mean embedding: share of classes that most samples reach, before and after."""
        s, result = self.settings, {}
        start = self.embedding().weight.detach().mean(0).expand(10, -1)

        def loss(x: Tensor) -> Tensor:
            wanted = torch.arange(10).repeat_interleave(len(x) // 10)
            return F.cross_entropy(self.classifier(x), wanted, reduction="none")

        budget = {"iterations": s.iterations, "batch_size": min(16, len(self.noise)), "steps": s.steps}
        optimized, _ = optimize_condition(self.ode, loss, start, self.noise[:64], **budget, seed=self.seed)
        same = self.fresh[: s.per_class].repeat(10, 1, 1, 1)
        for name, cond in (("before", start), ("after", optimized)):
            hits = self.right(self.samples(same, cond.repeat_interleave(s.per_class, 0))).reshape(10, s.per_class)
            result[f"targets_{name}"] = (hits.float().mean(1) > 0.5).float().mean()
        return result

    def attacked(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Images of attacked noise; share that changes its class, also by uniform noise and by the shuffled attack."""
        steps, y, generator = self.settings.steps, self.y, self.generator
        attack = adversarial_noise(self.ode, self.classifier, self.noise, y, tau=0.8, lr=0.3, cond=y, steps=steps)
        moved = attack.noise - self.noise
        order = torch.rand(len(y), 64, generator=generator).argsort(1)
        shuffled = moved.flatten(1).gather(1, order).reshape_as(moved)
        uniform = 0.8 * (2 * torch.rand(moved.shape, generator=generator) - 1)
        result = {"flipped": attack.success.sum() / attack.correct.sum()}
        for name, other in (("random", uniform), ("shuffled", shuffled)):
            images = self.ode.sample(self.noise + other, steps, cond=y).detach()
            result[f"flipped_{name}"] = (~self.right(images) & attack.correct).sum() / attack.correct.sum()
        return attack.x.detach(), result

    def stylised(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Images of a denoiser fine-tuned towards thicker strokes; fall of the style loss, and accuracy."""
        x = 2 * self.data.train.tensors[0][:256] - 1
        bold = 0.5 * (x + F.pad(F.max_pool2d(x, 2, 1), (0, 1, 0, 1), value=-1.0))
        other = DiffusionODE(copy.deepcopy(self.net), self.ode.schedule)
        budget = {"iterations": self.settings.iterations, "batch_size": 32, "steps": self.settings.steps}
        loss = style_loss(self.features, bold, style_weight=30.0)
        finetune(other, loss, self.noise, cond=self.y, **budget, seed=self.seed)
        before, after = self.samples(self.fresh), self.samples(self.fresh, ode=other)
        style = style_loss(self.features, bold, content_weight=0.0)
        with torch.no_grad():
            reduction = 1 - style(after, before).mean() / style(before, before).mean()
        return after, {"style_reduction": reduction, "style_accuracy": self.right(after).float().mean()}

    def features(self, x: Tensor) -> list[Tensor]:
        """Both layers of the classifier's convolutions."""
        first = self.convolutions[0](x)
        return [first, self.convolutions[1](first)]
