"""Equilibrium and quadratic-program layers on trial, for the experiment on neural differential equations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.dynamics import neural_de as de
from torchfolio.dynamics.implicit import jacobian_penalty
from torchfolio.engine import seeded
from torchfolio.measure import saved_bytes

__all__ = ["implicit_layers"]


class _Cell(nn.Module):
    """z ← tanh(W z + U x), with W small enough at first to contract."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(channels, width)
        with torch.no_grad():
            self.inner.weight *= 0.8

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.outer(x))


def implicit_layers(data: Any, steps: int, seed: int) -> dict[str, float]:
    """Train an equilibrium network on images beside a weight-tied one; its equilibrium, its gradient, and programs."""
    width = 64
    x, x_test = (part.tensors[0].flatten(1) for part in (data.train, data.test))
    y, y_test = data.train.tensors[1], data.test.tensors[1]
    values: dict[str, float] = {}
    for name in ("deq", "tied"):
        draws = torch.Generator().manual_seed(seed)
        with seeded(seed):  # both from the same weights, on the same batches
            cell, readout = _Cell(x.shape[1], width), nn.Linear(width, 10)
        deq = de.DEQ(cell, width)

        def layer(v: Tensor, name: str = name, cell: _Cell = cell, deq: de.DEQ = deq) -> Tensor:
            return deq(v) if name == "deq" else _unrolled(cell, v, width, 10)

        optimizer = torch.optim.Adam([*cell.parameters(), *readout.parameters()], 1e-3)
        for _ in range(steps):
            rows = torch.randint(len(x), (128,), generator=draws)
            z = layer(x[rows])
            loss = F.cross_entropy(readout(z), y[rows])
            if name == "deq":  # keeps the equilibrium easy to find
                loss = loss + 4 * jacobian_penalty(cell, z, x[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            values[f"accuracy_{name}"] = 100 * float((readout(layer(x_test)).argmax(-1) == y_test).float().mean())
        if name == "deq":
            values |= _equilibrium(deq, cell, x[:128], width)
    return {**values, **_quadratic(seed)}


def _unrolled(cell: _Cell, x: Tensor, width: int, steps: int) -> Tensor:
    z = x.new_zeros(len(x), width)
    for _ in range(steps):
        z = cell(z, x)
    return z


def _equilibrium(deq: de.DEQ, cell: _Cell, x: Tensor, width: int) -> dict[str, float]:
    weight, params = torch.randn(len(x), width), list(cell.parameters())
    held, grads = [], []
    for solve in (lambda: deq(x), lambda: _unrolled(cell, x, width, 60)):
        held.append(saved_bytes(lambda solve=solve: (solve() * weight).sum().backward(), exclude=[cell, x]).peak)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad((solve() * weight).sum(), params)]))
    with torch.no_grad():
        z = deq(x)
        residual = ((cell(z, x) - z).norm(dim=-1) / z.norm(dim=-1)).max()
    cosine = F.cosine_similarity(grads[0].double(), grads[1].double(), 0)
    return {"residual": float(residual), "cosine": float(cosine), "memory": held[0] / held[1]}


def _quadratic(seed: int) -> dict[str, float]:
    """A quadratic program without constraints against its formula, and with them against finite differences."""
    generator = torch.Generator().manual_seed(seed)
    root, p, G = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((4, 4), (4,), (3, 4)))
    # Differences of 1e-5 show errors of the solve a hundred thousand times as large: it must be tighter than by default.
    layer, Q, h = (
        de.QPLayer(tol=1e-13, max_steps=40),
        root @ root.T + torch.eye(4).double(),
        torch.full((3,), 0.2).double(),
    )
    free = float((layer(Q, p) + torch.linalg.solve(Q, p)).abs().max())
    inputs = [v.requires_grad_() for v in (Q, p, G, h)]
    weight = torch.arange(1.0, 5).double()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(layer(*inputs) @ weight, inputs)])
    flat = torch.cat([v.detach().flatten() for v in inputs])

    def value(v: Tensor) -> Tensor:
        parts = [part.view_as(old) for part, old in zip(v.split([i.numel() for i in inputs]), inputs, strict=True)]
        return layer(*parts) @ weight

    eye = 1e-5 * torch.eye(len(flat)).double()
    with torch.no_grad():
        numeric = torch.stack([(value(flat + e) - value(flat - e)) / 2e-5 for e in eye])
    return {"qp_free": free, "qp_gradient": float((exact - numeric).abs().max())}
