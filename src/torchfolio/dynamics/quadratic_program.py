"""Quadratic programs as a layer, solved by interior points and differentiated at the optimum.

Reference:
    Amos and Kolter, OptNet: Differentiable Optimization as a Layer in Neural Networks, ICML 2017 (arXiv 1703.00443),
    equations 4 to 8; Mehrotra, On the Implementation of a Primal-Dual Interior Point Method, 1992.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from torchfolio import checks

__all__ = ["QPLayer", "QPSolution", "attach_gradient"]


class FirstOrder(torch.autograd.Function):
    """Identity on a gradient whose own derivative is refused.

    `once_differentiable` is not enough: `torch.autograd.grad` walks past it, and leaves out a part of the answer.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, link: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError("the gradient of an implicit layer cannot be differentiated again")


class _Once(torch.autograd.Function):
    """Identity that can be differentiated once: the Jacobian behind it is held constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return FirstOrder.apply(cotangents[0], *ctx.saved_tensors)


def attach_gradient(w: Tensor, condition: Tensor, jacobian: Tensor) -> Tensor:
    """Give solutions the gradient of the implicit function theorem.

    $w - J^{-1} (F - F_{\\text{detached}})$ with constant w and J: the value is that of w to the bit, and the derivative by
    whatever F depends on is $-J^{-1}\\, \\partial F$.

    Args:
        w: solutions of $F(w, p) = 0$, `[..., K]`; taken as constants.
        condition: $F(w, p)$ at the solutions, `[..., K]`, with a graph that reaches p.
        jacobian: $\\partial F / \\partial w$ there, `[..., K, K]`; taken as a constant.

    Returns:
        `[..., K]`. It can be differentiated once; a second derivative raises `RuntimeError`.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if condition.shape != w.shape or jacobian.shape != (*w.shape, w.shape[-1]):
        raise ValueError(
            f"expected a condition {list(w.shape)} and a Jacobian {[*w.shape, w.shape[-1]]}, got "
            f"{list(condition.shape)} and {list(jacobian.shape)}"
        )
    step = torch.linalg.solve(jacobian.detach(), (condition - condition.detach()).unsqueeze(-1)).squeeze(-1)
    # The step is zero, but a NaN of a singular matrix must be seen: it is not cut off here.
    attached: Tensor = _Once.apply(step)  # pyright: ignore[reportAssignmentType]
    return w.detach() - attached


class QPSolution(NamedTuple):
    """Solution of quadratic programs, with its multipliers; all differentiable.

    Attributes:
        z: minima `[B, n]`.
        inequality: multipliers $\\lambda \\ge 0$ of $Gz \\le h$, `[B, m]`.
        equality: multipliers $\\nu$ of $Az = b$, `[B, e]`.
    """

    z: Tensor
    inequality: Tensor
    equality: Tensor


class QPLayer(nn.Module):
    """Solves $\\min_z \\tfrac12 z^\\top Q z + p^\\top z$ subject to $Az = b$, $Gz \\le h$ for every example.

    A batched primal-dual interior-point method (Mehrotra's predictor-corrector) in float64; the gradient takes one
    solve with the transposed system of the optimality conditions

    $$Qz + p + G^\\top \\lambda + A^\\top \\nu = 0, \\quad \\lambda \\odot (Gz - h) = 0, \\quad Az - b = 0.$$

    Args:
        tol: largest residual of the conditions, relative to the data, at which an example is done.
        max_steps: maximum number of interior-point steps.

    Shapes:
        `forward(Q, p, G=None, h=None, A=None, b=None)` with Q `[n, n]` or `[B, n, n]` (its symmetric part counts, and
        must be positive definite), p `[n]` or `[B, n]`, G `[.., m, n]`, h `[.., m]`, A `[.., e, n]`, b `[.., e]`; to z
        `[B, n]`, or `[n]` where nothing has a batch.

    Raises:
        ValueError: if shapes do not fit, a matrix comes without its right-hand side, values are not finite, or Q is not
            positive definite.

    Reference:
        Amos and Kolter 2017, equations 6 to 8.

    Example:
        >>> QPLayer()(torch.eye(2), torch.tensor([-1.0, -3.0]), torch.eye(2), torch.tensor([2.0, 2.0]))
        tensor([1., 2.])
    """

    def __init__(self, tol: float = 1e-8, max_steps: int = 20) -> None:
        super().__init__()
        self.tol, self.max_steps = float(checks.positive("tol", tol)), checks.whole("max_steps", max_steps, 1)

    def extra_repr(self) -> str:
        return f"tol={self.tol}, max_steps={self.max_steps}"

    def forward(
        self,
        Q: Tensor,
        p: Tensor,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
    ) -> Tensor:
        z = self.solve(Q, p, G, h, A, b).z
        return z if _batch(Q, p, G, h, A, b) else z[0]

    def solve(
        self,
        Q: Tensor,
        p: Tensor,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
    ) -> QPSolution:
        """As `forward`, with the multipliers; always with a batch."""
        program = _program(Q, p, G, h, A, b)
        with torch.no_grad():
            z, lam, nu, residual = _interior_point([t.detach() for t in program], self.tol, self.max_steps)
        worst = float(residual.max())
        if not worst <= self.tol:
            warnings.warn(
                f"{int((~(residual <= self.tol)).sum())} of {len(residual)} programs were not solved within "
                f"{self.max_steps} steps (largest relative residual {worst:.2g}); they may have no feasible point",
                ConvergenceWarning,
                stacklevel=3,
            )
        w = torch.cat([z, lam, nu], 1)
        if torch.is_grad_enabled() and any(t.requires_grad for t in program):
            w = attach_gradient(w, torch.cat(_conditions(z, lam, nu, program), 1), _kkt(z, lam, program))
        return QPSolution(*(t.to(p.dtype) for t in w.split([z.shape[1], lam.shape[1], nu.shape[1]], 1)))


RANKS = (2, 1, 2, 1, 2, 1)  # of Q, p, G, h, A, b without a batch


def _batch(*tensors: Tensor | None) -> int:
    """Size of the batch, 0 where there is none."""
    sizes = {len(t) for t, rank in zip(tensors, RANKS, strict=True) if t is not None and t.dim() == rank + 1}
    if len(sizes - {1}) > 1 or 0 in sizes:
        raise ValueError(f"expected one batch of one program or more, got sizes {sorted(sizes)}")
    return max(sizes, default=0)


def _program(Q: Tensor, p: Tensor, *constraints: Tensor | None) -> list[Tensor]:
    """The six tensors in float64 with a batch; constraints that are not there have no rows."""
    G, h, A, b = constraints
    if not isinstance(p, Tensor) or not p.is_floating_point() or p.dim() not in (1, 2) or not p.shape[-1]:
        raise ValueError("expected p to be a tensor [n] or [B, n] in floating point")
    for names, matrix, vector in (("G and h", G, h), ("A and b", A, b)):
        if (matrix is None) != (vector is None):
            raise ValueError(f"expected both {names} or neither")
    n, batch = p.shape[-1], max(1, _batch(Q, p, G, h, A, b))
    rows = [n, n, *(0 if v is None else v.shape[-1] for v in (h, h, b, b))]
    program = []
    for name, tensor, size, rank in zip("QpGhAb", (Q, p, G, h, A, b), rows, RANKS, strict=True):
        shape = (size, n)[:rank]
        if tensor is None:
            program.append(p.new_zeros(batch, *shape, dtype=torch.float64))
            continue
        if tuple(tensor.shape[-rank:]) != shape or tensor.dim() not in (rank, rank + 1):
            raise ValueError(f"expected {name} of shape {list(shape)} or a batch of it, got {list(tensor.shape)}")
        program.append(checks.finite(name, tensor).double().expand(batch, *shape))
    program[0] = (program[0] + program[0].mT) / 2
    if bool(torch.linalg.cholesky_ex(program[0].detach())[1].any()):
        raise ValueError("expected Q to be positive definite; add a small multiple of the identity to it")
    return program


def _conditions(z: Tensor, lam: Tensor, nu: Tensor, program: list[Tensor]) -> list[Tensor]:
    """What vanishes at the optimum: stationarity, complementarity, equalities (equation 5)."""
    Q, p, G, h, A, b = program
    gradient = _times(Q, z) + p + _times(G.mT, lam) + _times(A.mT, nu)
    return [gradient, lam * (_times(G, z) - h), _times(A, z) - b]


def _kkt(z: Tensor, lam: Tensor, program: list[Tensor]) -> Tensor:
    """Jacobian of the conditions by (z, lambda, nu), `[B, n + m + e, n + m + e]` (equation 6)."""
    Q, _, G, h, A, _ = program
    m, e = G.shape[1], A.shape[1]
    zeros = z.new_zeros(len(z), m + e, m + e)
    zeros[:, :m, :m] = torch.diag_embed(_times(G, z) - h)
    top = torch.cat([Q, G.mT, A.mT], 2)
    return torch.cat([top, torch.cat([torch.cat([lam[:, :, None] * G, A], 1), zeros], 2)], 1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[:, :, None])[:, :, 0]


def _interior_point(program: list[Tensor], tol: float, max_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mehrotra's predictor-corrector: z, the multipliers, and the largest relative residual of every program."""
    _, p, G, h, _, b = program
    m = G.shape[1]
    scale = 1 + torch.stack(
        [t.abs().flatten(1).amax(1) if t[0].numel() else t.new_zeros(len(t)) for t in program]
    ).amax(0)
    ones = torch.ones_like(h)
    z, lam, nu = _Step(program, ones)(p, -h, -b, torch.zeros_like(h), ones, ones)[:3]
    s = -lam
    s, lam = (
        t + (1 - t.amin(1, keepdim=True)).clamp_min(0) * (t.amin(1, keepdim=True) <= 0) if m else t for t in (s, lam)
    )
    for step in range(max_steps + 1):
        dual, _, equal = _conditions(z, lam, nu, program)
        primal = _times(G, z) + s - h
        gap = s * lam
        parts = [t.abs().amax(1) for t in (dual, primal, equal, gap) if t.shape[1]]
        residual = torch.stack(parts).amax(0) / scale
        if step == max_steps or bool((residual <= tol).all()):
            break
        solve = _Step(program, lam / s)
        dz, dlam, dnu, ds = solve(dual, primal, equal, gap, s, lam)
        if m:
            mean = gap.mean(1, keepdim=True)
            length = torch.minimum(_longest(s, ds), _longest(lam, dlam))
            centred = ((s + length * ds) * (lam + length * dlam)).mean(1, keepdim=True)
            gap = gap + ds * dlam - (centred / mean) ** 3 * mean
            dz, dlam, dnu, ds = solve(dual, primal, equal, gap, s, lam)
            length = (0.99 * torch.minimum(_longest(s, ds), _longest(lam, dlam))).clamp_max(1)
        else:
            length = torch.ones_like(p[:, :1])
        length = torch.where(residual[:, None] <= tol, 0, length)  # what is solved stays
        z, lam, nu, s = z + length * dz, lam + length * dlam, nu + length * dnu, s + length * ds
    return z, lam, nu, residual


class _Step:
    """Newton directions at one point, from one factorisation of $[[Q + G^\\top D G, A^\\top], [A, 0]]$."""

    def __init__(self, program: list[Tensor], weight: Tensor) -> None:
        Q, _, self.G, _, self.A, _ = program
        self.weight, e = weight, self.A.shape[1]
        top = torch.cat([Q + self.G.mT @ (weight[:, :, None] * self.G), self.A.mT], 2)
        below = torch.cat([self.A, Q.new_zeros(len(Q), e, e)], 2)
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(torch.cat([top, below], 1))

    def __call__(
        self, dual: Tensor, primal: Tensor, equal: Tensor, gap: Tensor, s: Tensor, lam: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps of z, lambda, nu and s that bring the four residuals to 0."""
        shifted = self.weight * primal - gap / s
        right = torch.cat([-dual - _times(self.G.mT, shifted), -equal], 1)
        both = torch.linalg.lu_solve(self.lu, self.pivots, right[:, :, None])[:, :, 0]
        dz, dnu = both.split([self.G.shape[2], self.A.shape[1]], 1)
        moved = _times(self.G, dz)
        return dz, shifted + self.weight * moved, dnu, -primal - moved


def _longest(x: Tensor, dx: Tensor) -> Tensor:
    """Largest step with which x stays positive, `[B, 1]`."""
    return torch.where(dx < 0, -x / dx, torch.inf).amin(1, keepdim=True).clamp_max(1)
