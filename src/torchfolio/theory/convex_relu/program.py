"""The two training problems, convex and not, and the way from a solution of one to the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import positive
from torchfolio.shown import Shown
from torchfolio.theory.convergence import Convergence

__all__ = [
    "Loss",
    "Solution",
    "convex_objective",
    "data_loss",
    "network_from_blocks",
    "network_output",
    "nonconvex_objective",
]

Loss = Literal["squared", "bce", "hinge"]
"""Losses that the program is convex for."""


@dataclass(frozen=True, repr=False)
class Solution(Shown):
    """What a solver returns.

    Attributes:
        hidden: weights $u_j$ of the hidden neurons, `[m, d]`.
        output: their output weights $\\alpha_j$, `[m]`.
        objective: value of the convex program at the solution.
        convergence: record of the solver.
        blocks: $[v, w]$, `[2, P, d]`, of the programs over activation patterns.
        state: tensors that a further call of the same solver can start from.
    """

    hidden: Tensor
    output: Tensor
    objective: float
    convergence: Convergence
    blocks: Tensor | None = None
    state: tuple[Tensor, ...] = field(default=(), repr=False)


def data_loss(prediction: Tensor, y: Tensor, loss: Loss = "squared") -> Tensor:
    """The data term $\\ell(\\hat y, y)$.

    - `"squared"`: $\\frac12 \\sum_k (\\hat y_k - y_k)^2$;
    - `"bce"`: $\\sum_k \\log(1 + e^{-2 y_k \\hat y_k})$, the cross-entropy of a sigmoid of $2\\hat y$;
    - `"hinge"`: $\\frac1n \\sum_k (1 - y_k \\hat y_k)_+$.

    Args:
        prediction: $\\hat y$, `[n]`.
        y: targets `[n]`; labels are -1 and +1.
        loss: name of the loss.
    """
    if loss == "squared":
        return (prediction - y).square().sum() / 2
    if loss == "bce":
        return F.softplus(-2 * y * prediction).sum()
    return F.relu(1 - y * prediction).mean()


def convex_objective(X: Tensor, y: Tensor, D: Tensor, blocks: Tensor, beta: float, loss: Loss = "squared") -> Tensor:
    """$\\ell(\\sum_i D_i X (v_i - w_i), y) + \\beta \\sum_i (\\|v_i\\|_2 + \\|w_i\\|_2)$; the cones are not checked.

    Args:
        X: data `[n, d]`.
        y: targets `[n]`.
        D: patterns `[n, P]`.
        blocks: $[v, w]$, `[2, P, d]`.
        beta: regularisation.
        loss: loss, see `data_loss`.
    """
    prediction = (X @ (blocks[0] - blocks[1]).T * D).sum(1)
    return data_loss(prediction, y, loss) + beta * blocks.norm(dim=-1).sum()


def network_output(X: Tensor, hidden: Tensor, output: Tensor) -> Tensor:
    """$\\sum_j (X u_j)_+ \\alpha_j$, `[n]`, of hidden weights `[m, d]` and output weights `[m]`."""
    return F.relu(X @ hidden.T) @ output


def nonconvex_objective(
    X: Tensor, y: Tensor, hidden: Tensor, output: Tensor, beta: float, loss: Loss = "squared"
) -> Tensor:
    """What ordinary training minimises: $\\ell(\\hat y, y) + \\frac\\beta2 \\sum_j (\\|u_j\\|^2 + \\alpha_j^2)$."""
    decay = hidden.square().sum() + output.square().sum()
    return data_loss(network_output(X, hidden, output), y, loss) + beta / 2 * decay


def network_from_blocks(v: Tensor, w: Tensor, threshold: float = 1e-8) -> tuple[Tensor, Tensor]:
    """The network that a solution of the convex program stands for.

    A block $v_i \\ne 0$ is a neuron $u = v_i / \\sqrt{\\|v_i\\|}$ with output weight $\\sqrt{\\|v_i\\|}$; a block
    $w_i$ one with output weight $-\\sqrt{\\|w_i\\|}$. The two objectives are equal when the blocks lie in their cones.

    Args:
        v: blocks of positive output, `[P, d]`.
        w: blocks of negative output, `[P, d]`.
        threshold: blocks whose norm is at most this share of the largest are left out.

    Returns:
        Hidden weights `[m, d]` and output weights `[m]`.
    """
    blocks = torch.cat([v, w])
    signs = torch.cat([torch.ones_like(v[:, 0]), -torch.ones_like(w[:, 0])])
    norms = blocks.norm(dim=1)
    active = norms > threshold * norms.max()
    root = norms[active].sqrt()
    return blocks[active] / root[:, None], signs[active] * root


def check_problem(X: Tensor, y: Tensor, beta: float, loss: str, D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Data and targets as floating-point tensors of one dtype and device, or an error that says what is wrong."""
    X = torch.as_tensor(X)
    X = X if X.is_floating_point() else X.double()
    y = torch.as_tensor(y).to(X)
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise ValueError(f"expected X of shape [n, d] and y of shape [n], got {tuple(X.shape)} and {tuple(y.shape)}")
    if D is not None and (D.ndim != 2 or len(D) != len(X) or D.shape[1] == 0):
        raise ValueError(f"expected patterns of shape [{len(X)}, P], got {tuple(D.shape)}")
    if D is not None and not ((D == 0) | (D == 1)).all():
        raise ValueError("expected patterns of 0 and 1, or False and True, got other values among them")
    if not (X.isfinite().all() and y.isfinite().all()):
        raise ValueError("expected finite X and y, got NaN or infinity in them")
    if loss not in get_args(Loss):
        raise ValueError(f"expected loss to be one of {', '.join(get_args(Loss))}, got {loss!r}")
    positive("beta", beta)
    if loss != "squared" and not (y.abs() == 1).all():
        got = ", ".join(f"{v:g}" for v in y.unique()[:5].tolist())
        raise ValueError(f"the {loss} loss is for two classes labelled -1 and +1, got labels {got}")
    return X, y
