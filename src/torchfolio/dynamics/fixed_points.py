"""Fixed points by Anderson acceleration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchfolio import checks
from torchfolio.shown import Shown

__all__ = ["Anderson", "FixedPoint"]


@dataclass(frozen=True, repr=False)
class FixedPoint(Shown):
    """What a fixed-point solver found.

    Attributes:
        z: best iterate of every example.
        residual: $\\|f(z) - z\\| / \\|f(z)\\|$ of every example, `[B]`.
        steps: evaluations of f.
    """

    z: Tensor
    residual: Tensor
    steps: int


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration of $z \\leftarrow f(z)$, every example with weights of its own.

    From the last m iterates with residuals $G_i = f(z_i) - z_i$ it takes the weights $\\alpha$ that minimise
    $\\alpha^\\top (G G^\\top + \\lambda \\bar g I) \\alpha$ with $\\sum_i \\alpha_i = 1$, and goes to
    $\\beta \\sum_i \\alpha_i f(z_i) + (1 - \\beta) \\sum_i \\alpha_i z_i$. Here $\\bar g$ is the smallest squared residual
    norm among them: the acceleration does not depend on the scale of z, which for gradients is very small.

    Args:
        memory: number m of iterates that are kept.
        beta: share of the values in the step, in (0, 1].
        ridge: $\\lambda$.
        tol: largest relative residual with which every example is content.
        max_steps: maximum number of evaluations.

    Raises:
        ValueError: if a setting is out of range.
    """

    memory: int = 5
    beta: float = 1.0
    ridge: float = 1e-4
    tol: float = 1e-4
    max_steps: int = 50

    def __post_init__(self) -> None:
        checks.whole("memory", self.memory, 1)
        checks.whole("max_steps", self.max_steps, 1)
        checks.between("beta", self.beta, 0, 1, inclusive=(False, True))
        checks.positive("ridge", self.ridge)
        checks.positive("tol", self.tol)

    @torch.no_grad()
    def __call__(self, f: Callable[[Tensor], Tensor], z0: Tensor) -> FixedPoint:
        """Iterate from `z0` `[B, ...]`.

        Raises:
            ValueError: if f gives another shape, or nothing finite for some example.
        """
        z = best = z0.detach().flatten(1)
        lowest = torch.full((len(z),), torch.inf, device=z.device)
        iterates, values = (z.new_zeros(len(z), self.memory, z.shape[1]) for _ in range(2))
        step = 0
        for step in range(1, self.max_steps + 1):
            value = f(z.view_as(z0))
            if value.shape != z0.shape:
                raise ValueError(f"expected a map of {tuple(z0.shape)} into itself, got values of {tuple(value.shape)}")
            value = value.flatten(1)
            residual = _relative(value, z)
            better = residual < lowest
            best, lowest = torch.where(better[:, None], z, best), torch.where(better, residual, lowest)
            if bool((lowest <= self.tol).all()):
                break
            slot = (step - 1) % self.memory
            iterates[:, slot], values[:, slot] = z, value
            z = self._next(iterates[:, :step], values[:, :step])
        if not bool(lowest.isfinite().all()):
            raise ValueError(f"expected finite values of the map, got NaN or infinite ones for {_count(lowest)}")
        return FixedPoint(best.view_as(z0), lowest, step)

    def _next(self, iterates: Tensor, values: Tensor) -> Tensor:
        """The step from what is in memory, `[B, m, d]` each."""
        wide = torch.promote_types(values.dtype, torch.float32)
        residuals = (values - iterates).to(wide)
        gram = (residuals @ residuals.mT).double()
        norms = gram.diagonal(dim1=1, dim2=2)
        scale = norms.amin(1).clamp_min(torch.finfo(torch.float64).tiny)
        # Entries of one Gram matrix differ by many orders near the solution: equilibrate it before it is factored.
        unit = norms.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
        shift = (self.ridge * scale[:, None] * unit**2).clamp_min(torch.finfo(wide).eps)
        system = unit[:, :, None] * gram * unit[:, None] + torch.diag_embed(shift)
        alpha = unit * torch.linalg.solve_ex(system, unit)[0]
        alpha = (alpha / alpha.sum(1, keepdim=True)).to(values.dtype)[:, None]
        mixed = self.beta * (alpha @ values)
        return (mixed if self.beta == 1 else mixed + (1 - self.beta) * (alpha @ iterates))[:, 0]


def _relative(value: Tensor, z: Tensor) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    size = torch.linalg.vector_norm(value, dim=1, dtype=wide)
    return torch.linalg.vector_norm(value - z, dim=1, dtype=wide) / size.clamp_min(torch.finfo(wide).tiny)


def _count(residual: Tensor) -> str:
    return f"{int((~residual.isfinite()).sum())} of {len(residual)} examples"
