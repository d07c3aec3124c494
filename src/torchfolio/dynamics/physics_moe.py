"""A differential equation enforced inside a network: a least-squares solve as a layer, by blocks of the domain.

The network gives K basis functions on a grid. The layer finds, for every instance and every block (expert) e, the
combination $u = \\sum_k \\omega_k B_k$ that satisfies the equation at sampled points of the block, the initial values and
the boundary conditions in the sense of least squares,

$$\\omega_e = \\arg\\min_\\omega \\varphi_e(\\omega) = \\tfrac12 \\|F_e(\\omega, B)\\|^2, \\qquad
\\frac{d\\omega_e}{dB} = -(\\nabla^2_\\omega \\varphi_e)^{-1}\\, \\partial_B \\nabla_\\omega \\varphi_e,$$

and puts the blocks together again. Derivatives of the basis are taken once, on the whole grid; within the solve a
residual is a pointwise function of the basis' terms times $\\omega$, so that the Jacobian is one product.

Reference:
    Chalapathi, Du, Krishnapriyan, Scaling Physics-Informed Hard Constraints with Mixture-of-Experts, ICLR 2024
    (arXiv 2402.13412), Sections 2 and 3; Négiar, Mahoney, Krishnapriyan, Learning Differentiable Solvers for Systems with
    Hard Constraints, ICLR 2023 (arXiv 2207.08675).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.dynamics.data_free_loss import equation_loss
from torchfolio.dynamics.domain_blocks import partition, unpartition
from torchfolio.dynamics.equations import PDE, Burgers1D, DiffusionSorption1D, Grid, Heat1D, NavierStokes2D
from torchfolio.dynamics.fourier_operator import FNO
from torchfolio.dynamics.levenberg_marquardt import LevenbergMarquardt
from torchfolio.dynamics.pointwise_rows import RowProblem, Rows
from torchfolio.dynamics.quadratic_program import attach_gradient

__all__ = [
    "FNO", "PDE", "Burgers1D", "ConstraintOutput", "DiffusionSorption1D", "ExpertConstraint", "Grid", "HardConstraint",
    "Heat1D", "LevenbergMarquardt", "NavierStokes2D", "equation_loss", "partition", "unpartition",
]  # fmt: skip


class ConstraintOutput(NamedTuple):
    """What the layer gives.

    Attributes:
        u: field `[B, *grid.shape]`.
        weights: $\\omega$ of every expert, `[B, E, K]`; differentiable, as u is.
        residual_before: $\\varphi$ at the start of the solve, `[B, E]`.
        residual_after: $\\varphi$ at its end.
        iterations: number of iterations of the solve, `[B, E]`.
        converged: whether it met the solver's tolerance, `[B, E]`.
    """

    u: Tensor
    weights: Tensor
    residual_before: Tensor
    residual_after: Tensor
    iterations: Tensor
    converged: Tensor


class ExpertConstraint(nn.Module):
    """The constraint layer with a solve of its own for every block of the grid (PI-HC-MoE).

    An expert sees the equation at points of its block alone, and all initial and boundary conditions. Experts never
    couple: neither in the solve nor in the gradient.

    Args:
        pde: equation; see `PDE` for one of your own.
        experts: number of blocks along each axis of the grid, time first.
        points: number of grid points at which an expert sees the equation, drawn without replacement; all by default.
        solver: solver of the least-squares problems.
        ridge: $\\rho$ of the additional row $\\rho \\omega$, so that dependent basis functions do no harm.
        normalise: whether each kind of rows (equation, initial values, each boundary) is divided by the square root of
            their number, so that the balance does not depend on the number of points.
        hessian: `"full"`, or `"gauss_newton"` to leave second derivatives of the residual out of the gradient.
        start: first value of all $\\omega$.
        stationary: largest relative gradient of $\\varphi$ at which the implicit function theorem is relied on; farther
            from a minimum than that, a solve passes no gradient, and says so. Equations with kinks, where solves end
            beside a minimum whatever the number of steps, may want more.
        seed: seed of the points.
        dtype: dtype of the solve. float32 loses the gradient on nearly dependent basis functions, and warns.

    Shapes:
        `forward(basis, grid, initial, params=None, *, start=None, generator=None)` with basis `[B, *grid.shape, K]`,
        initial values `[B, *grid.shape[1:]]`, params by name `[B]`, starts `[B, E, K]` or `[E, K]`; a generator draws
        new points, without one they are the same at every call. To `ConstraintOutput`.

    Raises:
        ValueError: if the experts do not divide the grid, shapes do not fit, there are more basis functions than rows, or
            a term of the equation is not finite.

    Reference:
        Chalapathi et al. 2024, Section 3 and Algorithm 1.

    Example:
        >>> grid = Grid(t=torch.linspace(0, 0.1, 8), x=torch.linspace(0, 1, 16))
        >>> basis = torch.randn(2, 8, 16, 4, generator=torch.Generator().manual_seed(0))
        >>> layer = ExpertConstraint(Heat1D(), experts=(2, 1))
        >>> layer(basis, grid, torch.zeros(2, 16)).weights.shape
        torch.Size([2, 2, 4])
    """

    def __init__(
        self,
        pde: PDE,
        experts: Sequence[int] = (),
        points: int | None = None,
        *,
        solver: LevenbergMarquardt | None = None,
        ridge: float = 1e-4,
        normalise: bool = True,
        hessian: str = "full",
        start: float = 1.0,
        stationary: float = 1e-3,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.pde = pde
        self.experts = tuple(checks.whole("experts", e, 1) for e in experts)
        self.points = None if points is None else checks.whole("points", points, 1)
        self.solver = LevenbergMarquardt() if solver is None else solver
        self.ridge, self.start = float(checks.at_least("ridge", ridge, 0)), float(checks.finite("start", start))
        self.stationary = float(checks.positive("stationary", stationary))
        self.normalise, self.hessian = bool(normalise), checks.one_of("hessian", hessian, ("full", "gauss_newton"))
        self.seed, self.dtype = (
            checks.whole("seed", seed, 0),
            checks.one_of("dtype", dtype, (torch.float32, torch.float64)),
        )
        if dtype == torch.float32:
            warnings.warn("least squares in float32: gradients are unreliable on nearly dependent bases", stacklevel=2)

    def extra_repr(self) -> str:
        return f"{type(self.pde).__name__}, experts={self.experts}, points={self.points}, ridge={self.ridge}"

    def forward(
        self,
        basis: Tensor,
        grid: Grid,
        initial: Tensor,
        params: Mapping[str, Tensor] | None = None,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ConstraintOutput:
        problem, fields, lift = self._problem(basis, grid, initial, params, generator)
        experts, kinds = self._experts(grid), basis.shape[-1]
        count = math.prod(experts)
        w0 = torch.full((), self.start) if start is None else start.detach()
        w0 = w0.to(fields).expand(len(basis), count, kinds).reshape(-1, kinds)
        solved = self.solver(problem.compressed(), w0)
        w = self._attach(problem, solved.w, solved.gradient) if torch.is_grad_enabled() else solved.w
        w = w.view(len(basis), count, kinds)
        u = unpartition((partition(fields.movedim(1, -1), experts) @ w[..., None])[..., 0], experts, grid.shape)
        u = u if lift is None else u + lift
        shape = (len(basis), count)
        return ConstraintOutput(
            u.to(basis.dtype), w.to(basis.dtype), solved.start_cost.view(shape), solved.cost.view(shape),
            solved.steps.view(shape), solved.converged.view(shape),
        )  # fmt: skip

    def problem(
        self,
        basis: Tensor,
        grid: Grid,
        initial: Tensor,
        params: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> RowProblem:
        """The least-squares problems that `forward` solves, those of an instance's experts side by side."""
        return self._problem(basis, grid, initial, params, generator)[0]

    def _problem(
        self,
        basis: Tensor,
        grid: Grid,
        initial: Tensor,
        params: Mapping[str, Tensor] | None,
        generator: torch.Generator | None,
    ) -> tuple[RowProblem, Tensor, Tensor | None]:
        """The problems, the shaped basis `[B, K, *grid.shape]`, and the field that has the initial values."""
        self._check(basis, grid, initial, params)
        fields = self.pde.shape_basis(basis.to(self.dtype).movedim(-1, 1), grid)
        lift = self.pde.lift(initial.to(self.dtype), grid)
        groups = self._groups(fields, grid, initial.to(self.dtype), lift, params or {}, generator)
        problem = RowProblem(groups, self.ridge, self.normalise)
        if problem.rows < basis.shape[-1]:
            raise ValueError(
                f"expected at least as many rows as basis functions, got {problem.rows} and {basis.shape[-1]}"
            )
        return problem, fields, lift

    def _experts(self, grid: Grid) -> tuple[int, ...]:
        return self.experts or (1,) * len(grid.shape)

    def _check(self, basis: Tensor, grid: Grid, initial: Tensor, params: Mapping[str, Tensor] | None) -> None:
        experts = self._experts(grid)
        if basis.dim() != 2 + len(grid.shape) or tuple(basis.shape[1:-1]) != grid.shape or not basis.numel():
            raise ValueError(f"expected a basis [B, {', '.join(map(str, grid.shape))}, K], got {list(basis.shape)}")
        if tuple(initial.shape) != (len(basis), *grid.shape[1:]):
            raise ValueError(f"expected initial values {[len(basis), *grid.shape[1:]]}, got {list(initial.shape)}")
        if len(experts) != len(grid.shape):
            raise ValueError(f"expected a number of experts for each axis {grid.names}, got {experts}")
        for name, value in (params or {}).items():
            if tuple(value.shape) != (len(basis),):
                raise ValueError(f"expected one value of {name} an instance, [{len(basis)}], got {list(value.shape)}")
        checks.finite("basis", basis)
        checks.finite("initial", initial)
        block = math.prod(n // e for n, e in zip(grid.shape, experts, strict=True))
        if self.points is not None and self.points > block:
            raise ValueError(f"expected at most the {block} points of a block, got points={self.points}")

    def _groups(
        self, fields: Tensor, grid: Grid, initial: Tensor, lift: Tensor | None, params: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> list[Rows]:  # fmt: skip
        """The rows of all problems: equation, initial values, boundaries."""
        pde, experts, d = self.pde, self._experts(grid), len(grid.shape)
        count = math.prod(experts)
        terms, names = _stacked(pde.terms(fields, grid))  # [B, terms, *grid, K]
        fixed = None if lift is None else _stacked(pde.terms(lift[:, None], grid))[0]
        values = {k: v.to(fields).repeat_interleave(count)[:, None] for k, v in params.items()}
        chosen = self._chosen(fields, grid, experts, generator)

        def everywhere(index: tuple[slice | int, ...], function: Any, constants: dict[str, Tensor]) -> Rows:
            """Conditions on a part of the grid, the same for every expert."""
            part = (slice(None), slice(None), *index)
            a = terms[part].flatten(2, -2).repeat_interleave(count, 0)
            b = None if fixed is None else fixed[part].flatten(2, -2)[..., 0].repeat_interleave(count, 0)
            return Rows(a, b, names, function, constants)

        def inside(stack: Tensor) -> Tensor:
            """The points of every block."""
            blocks = partition(stack.movedim(1, d + 1), experts)  # [B, E, points, terms, K]
            if chosen is not None:
                blocks = blocks.gather(2, chosen[..., None, None].expand(*chosen.shape, *blocks.shape[3:]))
            return blocks.flatten(0, 1).transpose(1, 2).contiguous()

        groups = [Rows(inside(terms), None if fixed is None else inside(fixed)[..., 0], names, pde.residual, values)]
        if lift is None:
            wanted = {"initial": initial.flatten(1).repeat_interleave(count, 0)}
            groups.append(everywhere((0,), lambda s, c: s["u"] - c["initial"], wanted))
        for edge, (axis, end) in pde.edges.items():
            index = [slice(None)] * d
            index[grid.names.index(axis)] = slice(0, 1) if end == 0 else slice(-1, None)
            groups.append(everywhere(tuple(index), partial(pde.boundary, edge), values))
        return groups

    def _chosen(
        self, fields: Tensor, grid: Grid, experts: Sequence[int], generator: torch.Generator | None
    ) -> Tensor | None:
        """Points of every block, `[B, E, points]`."""
        block = math.prod(n // e for n, e in zip(grid.shape, experts, strict=True))
        if self.points is None or self.points == block:
            return None
        generator = torch.Generator().manual_seed(self.seed) if generator is None else generator
        order = torch.rand(len(fields), math.prod(experts), block, generator=generator, device=generator.device)
        return order.argsort(-1)[..., : self.points].to(fields.device)

    def _attach(self, problem: RowProblem, w: Tensor, slope: Tensor) -> Tensor:
        """The solutions with their gradient; solves that are far from stationary are taken as constants."""
        gradient = problem.gradient(w)
        if not gradient.requires_grad:
            return w
        hessian = problem.hessian(w, full=self.hessian == "full")
        valid = (slope <= self.stationary)[:, None]
        if not bool(valid.all()):
            warnings.warn(
                f"{int((~valid).sum())} of {len(w)} solves are not at a stationary point: no gradient goes through them; "
                "let the solver take more steps",
                ConvergenceWarning,
                stacklevel=4,
            )
            identity = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
            hessian = torch.where(valid[..., None], hessian, identity)
            gradient = torch.where(valid, gradient, 0)
        return attach_gradient(w, gradient, hessian)


class HardConstraint(ExpertConstraint):
    """The constraint layer with one solve for the whole grid (PI-HC); arguments as those of `ExpertConstraint`."""

    def __init__(self, pde: PDE, points: int | None = None, **settings: object) -> None:
        super().__init__(pde, (), points, **settings)  # pyright: ignore[reportArgumentType]


def _stacked(terms: dict[str, Tensor]) -> tuple[Tensor, tuple[str, ...]]:
    """Terms of K basis functions `[B, K, *grid]`, as `[B, terms, *grid, K]`, and their names."""
    if "u" not in terms:
        raise ValueError(f"expected a term 'u', the field itself, among {', '.join(terms)}")
    return torch.stack([value.movedim(1, -1) for value in terms.values()], 1), tuple(terms)
