"""How far a field is from solving an equation: a training loss without data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchfolio.dynamics.equations import PDE, Grid

__all__ = ["equation_loss"]


def equation_loss(
    pde: PDE,
    u: Tensor,
    grid: Grid,
    initial: Tensor,
    params: Mapping[str, Tensor] | None = None,
    *,
    initial_weight: float = 1.0,
    boundary_weight: float = 1.0,
) -> Tensor:
    """Training loss without data: norms of the assembled field's residuals, mean over instances.

    $\\|\\mathrm{PDE}(u)\\| + w_i \\|u(0) - u_0\\| / \\|u_0\\| + w_b \\sum_{\\text{edges}} \\|\\mathrm{boundary}(u)\\|$, where a norm
    is the root of the mean square: the balance does not depend on the mesh. Differences cross the seams between
    experts, so that jumps there cost.

    Args:
        pde: equation.
        u: fields `[B, *grid.shape]`.
        grid: its mesh.
        initial: initial values `[B, *grid.shape[1:]]`, or those of all instances.
        params: parameters of the instances.
        initial_weight: $w_i$.
        boundary_weight: $w_b$.

    Returns:
        A scalar.

    Reference:
        Chalapathi et al. 2024, Section 3.2.
    """
    values = {k: v.to(u).view(-1, *(1,) * len(grid.shape)) for k, v in (params or {}).items()}
    terms, initial = pde.terms(u, grid), initial.expand_as(u[:, 0])
    loss = _norm(pde.residual(terms, values))
    if pde.lift(initial, grid) is None and initial_weight:
        loss = loss + initial_weight * _norm(u[:, 0] - initial) / _norm(initial).clamp_min(1e-12)
    for edge, (axis, end) in pde.edges.items():
        part = {name: value.narrow(grid.dim(axis), 0 if end == 0 else value.shape[grid.dim(axis)] - 1, 1)
                for name, value in terms.items()}  # fmt: skip
        loss = loss + boundary_weight * _norm(pde.boundary(edge, part, values))
    return loss.mean()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1) / x[0].numel() ** 0.5
