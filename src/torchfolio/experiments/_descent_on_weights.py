"""Gradient descent on the weights of an XOR network as PyTorch does it, which the dual form is held against."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from torchfolio.theory.xor_clusters import XORClusters
from torchfolio.theory.xor_grokking import DualGD, XORNetwork, xor_clusters


def differences() -> dict[str, float]:
    """The dual path beside autograd on the weights, float64."""
    generator = torch.Generator().manual_seed(0)
    data = xor_clusters(20, 50, 3.0, 0.1, generator=generator, dtype=torch.float64)
    points = xor_clusters(40, 50, 3.0, generator=generator, dtype=torch.float64).x
    network = XORNetwork(50, 8, 1e-3, generator=generator, dtype=torch.float64)
    dual = DualGD(data, network, 0.1)
    outputs = weights = 0.0
    for _ in range(30):
        dual.step()
        primal_steps(data, network, 0.1, 1)
        with torch.no_grad():
            outputs = max(outputs, float((dual.predict(points) - network(points)).abs().max()))
            weights = max(weights, float((dual.weight() - network.weight).abs().max()))
    return {"outputs": outputs, "weights": weights}


def primal_steps(data: XORClusters, network: XORNetwork, lr: float, steps: int) -> None:
    """Gradient descent on the weights as PyTorch does it."""
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(F.softplus(-data.y * network(data.x)).mean(), network.weight)
        with torch.no_grad():
            network.weight.sub_(lr * gradient)
