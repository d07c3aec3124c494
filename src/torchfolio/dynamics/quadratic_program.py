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
from torchfolio.engine.first_order import once

__all__ = ["QPLayer", "QPSolution", "attach_gradient"]


class _Once(torch.autograd.Function):
    """Identity that can be differentiated once: the Jacobian behind it is held constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return once(cotangents[0], *ctx.saved_tensors, what="the gradient of an implicit layer")


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
        >>> QPLayer()(torch.eye(2), torch.tensor([-1.0, -3.0]), torch.eye(2), torch.tensor([2.0, 2.0])).round(decimals=4)
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
    """The best iterate (z and the multipliers), and the largest relative residual of every program."""
    # The size of the objective changes nothing but the multipliers; with it at 1 the start fits.
    unit = torch.maximum(program[0].abs().flatten(1).amax(1), program[1].abs().amax(1))[:, None]
    program = [program[0] / unit[:, :, None], program[1] / unit, *program[2:]]
    scale = 1 + torch.stack([t.abs().flatten(1).amax(1) for t in program if t[0].numel()]).amax(0)
    point = _start(program)
    best, lowest = point, torch.full_like(scale, torch.inf)
    for step in range(max_steps + 1):
        residuals = _residuals(point, program)
        worst = torch.stack([r.abs().amax(1) for r in residuals if r.shape[1]]).amax(0) / scale
        better = worst < lowest
        best = [torch.where(better[:, None], new, old) for new, old in zip(point, best, strict=True)]
        lowest = torch.where(better, worst, lowest)
        if step == max_steps or bool((lowest <= tol).all()):
            break
        point = _predict_and_correct(point, residuals, program)
    z, lam, nu, _ = best
    return z, lam * unit, nu * unit, lowest


def _start(program: list[Tensor]) -> list[Tensor]:
    """The optimum with $\\|Gz - h\\|^2 / 2$ in place of the inequalities, moved until slacks and multipliers are positive."""
    _, p, G, h, _, b = program
    z, lam, nu, _ = _Step(program, torch.ones_like(h))(p, -h, -b, torch.zeros_like(h), torch.ones_like(h))
    slack = -lam
    if G.shape[1]:
        lowest = [t.amin(1, keepdim=True) for t in (slack, lam)]
        slack, lam = (torch.where(low > 0, t, t + 1 - low) for t, low in zip((slack, lam), lowest, strict=True))
    return [z, lam, nu, slack]


def _residuals(point: list[Tensor], program: list[Tensor]) -> list[Tensor]:
    """Of stationarity, inequalities, equalities, complementarity."""
    z, lam, nu, slack = point
    stationarity, _, equal = _conditions(z, lam, nu, program)
    return [stationarity, _times(program[2], z) + slack - program[3], equal, slack * lam]


def _predict_and_correct(point: list[Tensor], residuals: list[Tensor], program: list[Tensor]) -> list[Tensor]:
    """One step of Mehrotra's method: how far the plain Newton step gets says how much to centre the real one."""
    _, lam, _, slack = point
    solve = _Step(program, slack / lam)
    dual, primal, equal, gap = residuals
    steps = solve(dual, primal, equal, gap, lam)
    length: Tensor | float = 1.0
    if lam.shape[1]:
        _, dlam, _, ds = steps
        length = torch.minimum(_longest(slack, ds), _longest(lam, dlam))
        mean, ahead = (t.mean(1, keepdim=True) for t in (gap, (slack + length * ds) * (lam + length * dlam)))
        steps = solve(dual, primal, equal, gap + ds * dlam - (ahead / mean) ** 3 * mean, lam)
        length = 0.99 * torch.minimum(_longest(slack, steps[3]), _longest(lam, steps[1]))
    return [t + length * dt for t, dt in zip(point, steps, strict=True)]


class _Step:
    """Newton directions at one point, from one factorisation of $[[Q, G^\\top, A^\\top], [G, -S/\\Lambda, 0], [A, 0, 0]]$.

    The system is not reduced further: $Q + G^\\top (\\Lambda / S) G$ is smaller, but loses the last digits near the optimum.
    """

    def __init__(self, program: list[Tensor], ratio: Tensor) -> None:
        Q, _, self.G, _, A, _ = program
        self.ratio, m, e = ratio, ratio.shape[1], A.shape[1]
        corner = Q.new_zeros(len(Q), m + e, m + e)
        corner[:, :m, :m] = torch.diag_embed(-ratio)
        below = torch.cat([torch.cat([self.G, A], 1), corner], 2)
        system = torch.cat([torch.cat([Q, self.G.mT, A.mT], 2), below], 1)
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(system)

    def __call__(
        self, dual: Tensor, primal: Tensor, equal: Tensor, gap: Tensor, lam: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps of z, lambda, nu and s that bring the four residuals to 0."""
        right = torch.cat([-dual, gap / lam - primal, -equal], 1)
        steps = torch.linalg.lu_solve(self.lu, self.pivots, right[:, :, None])[:, :, 0]
        dz, dlam, dnu = steps.split([dual.shape[1], gap.shape[1], equal.shape[1]], 1)
        return dz, dlam, dnu, -gap / lam - self.ratio * dlam


def _longest(x: Tensor, dx: Tensor) -> Tensor:
    """Largest step with which x stays positive, `[B, 1]`."""
    return torch.where(dx < 0, -x / dx, torch.inf).amin(1, keepdim=True).clamp_max(1)
