"""Deep equilibrium layers (Bai et al., NeurIPS 2019): the output is a fixed point."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.dynamics.fixed_points import Anderson
from torchfolio.engine.first_order import once

__all__ = ["DEQ", "jacobian_penalty"]


class _Equilibrium(torch.autograd.Function):
    """Identity on f(z*, x) whose backward pass solves $u = (\\partial f / \\partial z)^\\top u + v$."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, point: Tensor, layer: DEQ) -> Tensor:
        ctx.value, ctx.point, ctx.layer = value, point, layer
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (v,) = cotangents

        def pull(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(ctx.value, ctx.point, u, retain_graph=True, allow_unused=True)
            return v if product is None else product + v

        u = ctx.layer._solve(ctx.layer.backward_solver, pull, v, "backward")
        return once(u, ctx.value, what="the gradient of an implicit layer"), None, None


class DEQ(nn.Module):
    """Deep equilibrium layer: the fixed point $z^* = f_\\theta(z^*, x)$, as a network of infinite depth.

    The backward pass solves $u = (\\partial f / \\partial z)^\\top u + v$ by a solver of the same kind, with one
    vector-Jacobian product an iteration; no more than one evaluation of f is held for it.

    Args:
        f: module or function of z and x, with z's shape. It must be the same map at every call: dropout or batch
            statistics inside it leave no fixed point.
        shape: shape of one example's z; that of an example of x by default.
        solver: solver of the forward pass.
        backward_solver: solver of the backward pass; `solver` by default.

    Attributes:
        last: steps and largest residual of the last `"forward"` and `"backward"` solve.

    Shapes:
        x `[B, ...]`, to z `[B, *shape]`.

    Raises:
        ValueError: if there are no examples, f changes the shape, or has no finite values.

    Reference:
        Kidger 2021, Section 6.1; Bai et al., Deep Equilibrium Models, NeurIPS 2019 (arXiv 1909.01377), Theorem 1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> inner = torch.nn.Linear(4, 4)
        >>> layer = DEQ(lambda z, x: torch.tanh(0.3 * inner(z) + x))
        >>> x = torch.randn(8, 4)
        >>> z = layer(x)
        >>> bool((z - torch.tanh(0.3 * inner(z) + x)).norm() <= 1e-3 * z.norm())
        True
    """

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        shape: int | Sequence[int] | None = None,
        *,
        solver: Anderson | None = None,
        backward_solver: Anderson | None = None,
    ) -> None:
        super().__init__()
        self.f = f
        sizes = (shape,) if isinstance(shape, int) else shape
        self.shape = None if sizes is None else tuple(checks.whole("size of z", n, 1) for n in sizes)
        self.solver = Anderson() if solver is None else solver
        self.backward_solver = self.solver if backward_solver is None else backward_solver
        self.last: dict[str, tuple[int, float]] = {}

    def extra_repr(self) -> str:
        return f"shape={self.shape}, solver={self.solver}"

    @torch.compiler.disable
    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """The fixed point for every example, from `z0` (zeros by default)."""
        if not x.dim() or not len(x):
            raise ValueError(f"expected at least one example, got shape {tuple(x.shape)}")
        checks.finite("x", x)
        if z0 is None:
            z0 = x.new_zeros(len(x), *(x.shape[1:] if self.shape is None else self.shape))
        with torch.no_grad():
            z = self._solve(self.solver, lambda z: self.f(z, x), z0, "forward")
        if not torch.is_grad_enabled():
            return z
        point = z.detach().requires_grad_()
        value = self.f(point, x)
        return _Equilibrium.apply(value, point, self) if value.requires_grad else value  # pyright: ignore

    def _solve(self, solver: Anderson, f: Callable[[Tensor], Tensor], z0: Tensor, way: str) -> Tensor:
        solved = solver(f, z0)
        worst = float(solved.residual.max())
        self.last[way] = (solved.steps, worst)
        if worst > solver.tol:
            warnings.warn(
                f"the {way} pass stopped after {solved.steps} steps with a relative residual of {worst:.2g}, above "
                f"tol {solver.tol:.2g}; take more steps, or make f contract more",
                ConvergenceWarning,
                stacklevel=4,
            )
        return solved.z


def jacobian_penalty(
    f: Callable[[Tensor, Tensor], Tensor], z: Tensor, x: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Estimate of $\\|\\partial f / \\partial z\\|_F^2 / d$ by one probe an example, to keep equilibria easy to find.

    Args:
        f: function of z and x.
        z: points, `[B, ...]`, such as a `DEQ`'s output; taken as constants.
        x: inputs.
        generator: source of the probe.

    Returns:
        A scalar to add to the loss.

    Reference:
        Bai et al., Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021 (arXiv 2106.14342), eq. 4.
    """
    point = z.detach().requires_grad_()
    probe = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    (product,) = torch.autograd.grad(f(point, x), point, probe, create_graph=True)
    return product.square().sum() / z.numel()
