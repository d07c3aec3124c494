"""Layers whose output is the solution of a problem: a fixed point, a minimum, a quadratic program.

Their gradient comes from the implicit function theorem and does not see how the problem was solved. With
$F(w^*, p) = 0$,

$$\\frac{dw^*}{dp} = -\\Big(\\frac{\\partial F}{\\partial w}\\Big)^{-1} \\frac{\\partial F}{\\partial p},$$

which costs one linear solve and the memory of a single evaluation of F.

Reference:
    Kidger, On Neural Differential Equations, 2021 (arXiv 2202.02435), Chapter 6; Bai et al., Deep Equilibrium Models,
    NeurIPS 2019; Amos and Kolter, OptNet, ICML 2017.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.dynamics.quadratic_program import QPLayer, attach_gradient
from torchfolio.engine.first_order import once

__all__ = ["DEQ", "Anderson", "FixedPoint", "QPLayer", "argmin_layer", "attach_gradient", "jacobian_penalty"]


@dataclass(frozen=True)
class FixedPoint:
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


def argmin_layer(
    objective: Callable[..., Tensor], z0: Tensor, *params: Tensor, tol: float | None = None, max_steps: int = 50
) -> Tensor:
    """Minimise $\\varphi(z, p)$ over z and differentiate the minimum, $dz^* = -(\\partial_z^2 \\varphi)^{-1} \\partial_p \\partial_z \\varphi\\, dp$.

    Damped Newton steps, every example with a damping of its own; the backward pass is one solve.

    Args:
        objective: $\\varphi$, called as `objective(z, *params)`, twice differentiable; gives one value an example,
            `[B]`, that depends on that example's z alone.
        z0: start `[B, d]`.
        *params: tensors that the minimum is differentiated by. What the objective holds otherwise, such as the weights
            of a module, gets its gradient too.
        tol: largest entry of the gradient, relative to that at the start if it is above 1, at which an example is done;
            $\\epsilon^{2/3}$ of the number format by default.
        max_steps: maximum number of steps.

    Returns:
        Minima `[B, d]`.

    Raises:
        ValueError: if the objective does not give one value an example, or is not finite at the start.

    Reference:
        Kidger 2021, Section 6.2.

    Example:
        >>> p = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> z = argmin_layer(lambda z, p: ((z - p) ** 2).sum(1), torch.zeros(1, 2), p)
        >>> z.sum().backward(); p.grad
        tensor([[1., 1.]])
    """
    limit = torch.finfo(z0.dtype).eps ** (2 / 3) if tol is None else float(checks.positive("tol", tol))
    checks.whole("max_steps", max_steps, 1)
    if z0.dim() != 2 or not z0.numel():
        raise ValueError(f"expected a start [B, d] of one example or more, got shape {tuple(z0.shape)}")
    fixed = [p.detach() for p in params]
    z, converged = _newton(lambda z: objective(z, *fixed), z0.detach(), limit, max_steps)
    if not converged:
        warnings.warn(
            f"the minimum was not reached within {max_steps} steps at tol {limit:.2g}; its gradient is not to be relied on",
            ConvergenceWarning,
            stacklevel=2,
        )
    if not torch.is_grad_enabled():
        return z
    hessian = _derivatives(lambda z: objective(z, *fixed), z)[2]
    point = z.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(point, *params).sum(), point, create_graph=True)
    return attach_gradient(point, gradient, hessian)


def _newton(objective: Callable[[Tensor], Tensor], z: Tensor, tol: float, max_steps: int) -> tuple[Tensor, bool]:
    """Steps $(H + \\mu I)^{-1} g$: the damping falls where the value falls, and rises where it does not."""
    value, gradient, hessian = _derivatives(objective, z)
    if value.shape != z.shape[:1]:
        raise ValueError(f"expected one value an example, {list(z.shape[:1])}, got shape {list(value.shape)}")
    checks.finite("objective at the start", value)
    damping, limit = z.new_zeros(len(z)), tol * gradient.abs().amax(1).clamp_min(1)
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    for _ in range(max_steps):
        done = gradient.abs().amax(1) <= limit
        if bool(done.all()):
            return z, True
        size = hessian.diagonal(dim1=1, dim2=2).abs().mean(1).clamp_min(torch.finfo(z.dtype).tiny)
        factor, info = torch.linalg.cholesky_ex(hessian + (damping * size)[:, None, None] * identity)
        step = torch.cholesky_solve(gradient[:, :, None], torch.where((info == 0)[:, None, None], factor, identity))
        trial = z - step[:, :, 0]
        with torch.no_grad():
            fallen = (info == 0) & (objective(trial) <= value + 1e-12 * value.abs())
        damping = torch.where(fallen, damping * 0.1, (damping * 4).clamp_min(1e-3))
        if bool((damping > 1e12).any()):
            break
        z = torch.where((fallen & ~done)[:, None], trial, z)
        value, gradient, hessian = _derivatives(objective, z)
    return z, bool((gradient.abs().amax(1) <= limit).all())


def _derivatives(objective: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values `[B]`, gradients `[B, d]`, Hessians `[B, d, d]`; examples do not depend on each other."""
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        value = objective(point)
        (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        directions = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[:, None].expand(-1, *z.shape)
        if gradient.requires_grad:
            (rows,) = torch.autograd.grad(gradient, point, directions, is_grads_batched=True, allow_unused=True)
        else:
            rows = None
    hessian = z.new_zeros(*z.shape, z.shape[1]) if rows is None else rows.transpose(0, 1)
    return value.detach(), gradient.detach(), hessian.detach()
