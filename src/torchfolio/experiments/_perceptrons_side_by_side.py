"""Deep perceptrons side by side as one batched network, each with its own initialisation, noise and learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import seeded
from torchfolio.runs import Run
from torchfolio.training.gradient_noise import add_gradient_noise_

__all__ = ["Row", "train_rows"]


@dataclass(frozen=True)
class Row:
    """One network of the batch: its name, scale of the initial weights (`None` is He's), noise and rate."""

    name: str
    scale: float | None
    eta: float
    gamma: float
    lr: float


class Perceptrons(nn.Module):
    """Deep ReLU perceptrons side by side: `[N, F]` to `[R, N, classes]`."""

    def __init__(self, rows: list[Row], features: int, classes: int, hidden: int, width: int) -> None:
        super().__init__()
        sizes = [features, *[width] * hidden, classes]
        drawn: list[Tensor] = [torch.randn(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        scales = [[math.sqrt(2 / len(w)) if row.scale is None else row.scale for row in rows] for w in drawn]
        # Every row starts from the same draw, at its own scale.
        self.weights = nn.ParameterList(torch.tensor(s)[:, None, None] * w for s, w in zip(scales, drawn, strict=True))
        self.biases = nn.ParameterList(torch.zeros(len(rows), 1, b) for b in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        h = x.expand(len(self.biases[0]), -1, -1)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h.relu() if k else h, weight)
        return h


def train_rows(run: Run[Any], rows: list[Row]) -> dict[str, Any]:
    """Train all rows on the same batches.

    Args:
        run: run whose settings have `data`, `train_size`, `hidden` layers of `width`, `steps`, `batch_size` and `clip`,
            the largest norm of a row's gradient before the noise.
        rows: conditions; those of equal noise stand together.

    Returns:
        By the name of a row its test accuracy (%); with `.loss`, its training loss at the end; with `.curve`, 40 or so
        of its losses on the way.
    """
    settings = run.settings
    data = run.data(settings.data, val=0, train_size=settings.train_size)
    (x, y), (x_test, y_test) = (
        (s.tensors[0].flatten(1).to(run.device), s.tensors[1].to(run.device)) for s in (data.train, data.test)
    )
    with seeded(run.seed):
        net = Perceptrons(rows, x.shape[1], data.num_classes or 10, settings.hidden, settings.width).to(run.device)
    draws = run.generator()
    noise = torch.Generator(run.device).manual_seed(run.seed + 1)
    parameters = list(net.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    gradients: list[Any] = [p.grad for p in parameters]
    rates = torch.tensor([row.lr for row in rows], device=run.device)[:, None, None]
    noisy = slices(rows, parameters)
    every, curve = max(1, settings.steps // 40), []
    for step in run.progress(range(settings.steps), "steps"):
        torch._foreach_zero_(gradients)
        index = torch.randint(len(x), (settings.batch_size,), generator=draws)
        loss = losses(net(x[index]), y[index])
        loss.sum().backward()
        with torch.no_grad():
            norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
            for g in gradients:
                g.mul_((settings.clip / norms.clamp_min(settings.clip))[:, None, None])
            for (eta, gamma), parts in noisy.items():
                add_gradient_noise_(parts, step, eta=eta, gamma=gamma, generator=noise)
            # Plain SGD, with a rate for each row.
            for p, g in zip(parameters, gradients, strict=True):
                p.addcmul_(g, rates, value=-1.0)
        if step % every == 0:
            curve.append(loss.detach())
    with torch.no_grad():
        accuracy = 100 * (net(x_test).argmax(2) == y_test).float().mean(1)
        final = losses(net(x), y)
    names = [row.name for row in rows]
    found: dict[str, Any] = {name: float(a) for name, a in zip(names, accuracy, strict=True)}
    found |= {f"{name}.loss": float(a) for name, a in zip(names, final, strict=True)}
    return found | {f"{name}.curve": line for name, line in zip(names, torch.stack(curve).T.tolist(), strict=True)}


def slices(rows: list[Row], parameters: list[nn.Parameter]) -> dict[tuple[float, float], list[Tensor]]:
    """By noise, the rows that have it as parameters of their own, whose gradients are views into the whole ones."""
    found: dict[tuple[float, float], list[Tensor]] = {}
    for kind in sorted({(row.eta, row.gamma) for row in rows if row.eta}):
        places = [k for k, row in enumerate(rows) if (row.eta, row.gamma) == kind]
        for p in parameters:
            part = nn.Parameter(p.detach()[places[0] : places[-1] + 1])
            part.grad = None if p.grad is None else p.grad[places[0] : places[-1] + 1]
            found.setdefault(kind, []).append(part)
    return found


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of every row."""
    return F.cross_entropy(logits.movedim(2, 1), y.expand(len(logits), -1), reduction="none").mean(1)
