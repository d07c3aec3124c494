"""Series for controlled and stochastic equations to learn, for the experiment on neural differential equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.dynamics import neural_de as de

__all__ = ["SERIES", "classify", "latent"]


def _spirals(n: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clockwise and anticlockwise spirals from random angles, with 30 % of the points missing."""
    t, y = torch.linspace(0, 1, length), torch.arange(n) % 2
    angle = 2 * math.pi * (torch.rand(n) + (2 * y - 1) * 2 * t[:, None])
    x = torch.stack([angle.cos(), angle.sin()], -1) * (0.2 + t)[:, None, None]
    gone = torch.rand(length, n) < 0.3
    gone[0] = False
    return t, x.masked_fill(gone[..., None], math.nan), y


def _speeds(n: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same straight paths, walked steadily or with a late rush: only the speed differs."""
    t, y = torch.linspace(0, 1, length), torch.arange(n) % 2
    share = torch.where(y == 1, t[:, None] ** 3, t[:, None])
    return t, 0.5 * torch.randn(n, 2) + share[..., None] * F.normalize(torch.randn(n, 2), dim=-1), y


def _starts(n: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same movements from the left or from the right: only the first value differs."""
    t, y = torch.linspace(0, 1, length), torch.arange(n) % 2
    x = (torch.randn(length, n, 2) / length**0.5).cumsum(0)
    return t, x - x[0] + torch.stack([2.0 * y - 1, torch.zeros(n)], -1), y


class _FixedStart(de.NeuralCDE):
    """A neural CDE whose start does not depend on the series (negative control)."""

    def start(self, control: de.Control) -> Tensor:
        return self.initial(torch.zeros_like(control.evaluate(control.t0)))


SERIES: dict[str, tuple[Callable[..., Any], type[de.NeuralCDE], bool]] = {
    "spirals": (_spirals, de.NeuralCDE, True),
    "speeds": (_speeds, de.NeuralCDE, True),
    "speeds_without_time": (_speeds, de.NeuralCDE, False),
    "starts": (_starts, de.NeuralCDE, True),
    "starts_with_fixed_start": (_starts, _FixedStart, True),
}  # task, model and whether time is a channel


def classify(s: Any, task: Callable[..., Any], kind: type[de.NeuralCDE], time: bool) -> dict[str, Any]:
    """Train a neural CDE on a task by the settings `s`; accuracy on other series."""
    t, x, y = task(2 * s.series, s.length)
    model = kind(2, 8, 2, width=32, append_time=time, solver=de.Midpoint(), gradient=de.Direct())
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.cde_steps)
    for _ in range(s.cde_steps):
        loss = F.cross_entropy(model(x[:, : s.series], t), y[: s.series])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        accuracy = (model(x[:, s.series :], t).argmax(-1) == y[s.series :]).float().mean()
    return {"accuracy": 100 * float(accuracy), "losses": losses}


def latent(s: Any, seed: int) -> dict[str, Any]:
    """A latent SDE of an Ornstein-Uhlenbeck process; its prior's mean and deviation over time beside the data's."""
    ts = torch.linspace(0, 2, 11)
    ou = de.SDE(lambda t, y: -y, lambda t, y: torch.full_like(y, 0.5), "additive", "ito")
    x = de.sdeint(ou, 1.5 + 0.2 * torch.randn(s.series, 1), ts, dt=0.02, seed=seed).ys
    model = de.LatentSDE(1, latent=2, context=8, width=16, dt=0.1)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for step in range(s.latent_steps):
        loss = model.loss(x, ts, kl_weight=min(1.0, step / (0.2 * s.latent_steps)), seed=seed * s.latent_steps + step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    drawn = model.sample(1000, ts, seed)
    moments = {name: torch.cat([v.mean((1, 2)), v.std((1, 2))]) for name, v in (("data", x), ("model", drawn))}
    return {"losses": losses, "ts": ts, **moments}
