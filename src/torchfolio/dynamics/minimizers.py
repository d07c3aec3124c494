"""Layers whose output is a minimum."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from torchfolio import checks
from torchfolio.dynamics.quadratic_program import attach_gradient

__all__ = ["argmin_layer"]


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
