"""Two-layer ReLU networks under attack: by the robust convex program, by the standard one, and by PGD training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.experiments._noisy_sines import descend
from torchfolio.experiments._two_class_tables import Pair, signs_agree
from torchfolio.theory.convex_relu import (
    Solution,
    activation_patterns,
    conic_program,
    data_loss,
    network_output,
    nonconvex_objective,
)

Network = tuple[Tensor, Tensor]


def conic(
    train: Pair, test: Pair, *, patterns: int, beta: float, radius: float, epsilon: float, seed: int
) -> dict[str, Any]:
    """Solve the convex program, robust within `radius` or not, and attack the recovered network within `epsilon`."""
    X, y = train
    D = activation_patterns(X, patterns, radius, torch.Generator().manual_seed(seed), bias=True)
    # Tighter than the default: an attack may gain what the cones are violated by.
    solution = conic_program(X, y, D, beta=beta, loss="hinge", epsilon=radius, bias=True, tol=1e-11)
    assert solution.blocks is not None
    network = solution.hidden, solution.output
    worst = _worst_case(X, y, D, solution, epsilon)
    return {
        "data_term": solution.objective - beta * float(solution.blocks.norm(dim=-1).sum()),
        "worst_case": float(data_loss(network_output(worst, *network), y, "hinge")),
        "neurons": len(solution.output),
        **_attacked(network, train, test, epsilon, seed),
    }


def pgd_trained(
    train: Pair, test: Pair, *, width: int, beta: float, epsilon: float, steps: int, seed: int
) -> dict[str, Any]:
    """Adam on the same objective at examples that PGD finds anew in every step."""
    X, y = train
    hidden = (torch.randn(width, X.shape[1], dtype=X.dtype) / X.shape[1] ** 0.5).requires_grad_()
    output = (torch.randn(width, dtype=X.dtype) / width**0.5).requires_grad_()

    def loss() -> Tensor:
        worst = _pgd((hidden, output), X, y, epsilon, steps=5)
        return nonconvex_objective(worst, y, hidden, output, beta, "hinge")

    descend([hidden, output], loss, steps)
    return _attacked((hidden.detach(), output.detach()), train, test, epsilon, seed)


def _worst_case(X: Tensor, y: Tensor, D: Tensor, solution: Solution, epsilon: float) -> Tensor:
    """Every example moved by $-\\epsilon y \\operatorname{sign}(g)$, the worst case where patterns stay as they are."""
    assert solution.blocks is not None
    g = D.to(X) @ (solution.blocks[0] - solution.blocks[1])
    move = -epsilon * y[:, None] * g.sign()
    move[:, -1] = 0
    return X + move


def _attacked(network: Network, train: Pair, test: Pair, epsilon: float, seed: int) -> dict[str, Any]:
    """Loss and accuracies; the attack of every network starts from the same points."""
    draws = torch.Generator().manual_seed(seed)
    learned, unseen = (
        (network_output(_pgd(network, X, y, epsilon, generator=draws), *network), y) for X, y in (train, test)
    )
    X, y = test
    return {
        "pgd_loss": float(data_loss(*learned, "hinge")),
        "clean_accuracy": signs_agree(network_output(X, *network), y),
        "pgd_accuracy": signs_agree(*unseen),
        "hidden": network[0],
        "output": network[1],
    }


def _pgd(
    network: Network, X: Tensor, y: Tensor, epsilon: float, steps: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """Signed gradient ascent from a random point of the ball; the column of ones stays."""
    hidden, output = (p.detach() for p in network)
    move = (torch.rand(X.shape, dtype=X.dtype, generator=generator) * 2 - 1) * epsilon
    move[:, -1] = 0
    for _ in range(steps):
        at = (X + move).requires_grad_()
        margin = y * network_output(at, hidden, output)
        (gradient,) = torch.autograd.grad(margin.sum(), at)
        gradient[:, -1] = 0
        move = (move - 2.5 * epsilon / steps * gradient.sign()).clamp(-epsilon, epsilon)
    return X + move
