"""Partial differential equations on regular grids, as what is computed pointwise from a field and its derivatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchfolio import checks
from torchfolio.shown import Shown

__all__ = ["PDE", "Burgers1D", "DiffusionSorption1D", "Grid", "Heat1D", "NavierStokes2D"]

Terms = Mapping[str, Tensor]
Edges = Mapping[str, tuple[str, int]]


class Grid:
    """A regular mesh, its first axis usually the time.

    Args:
        periodic: names of axes that close on themselves (without their last point, which is the first).
        **axes: coordinates by name, each evenly spaced and rising, three points or more.

    Raises:
        ValueError: if an axis is too short or not even, or a periodic axis is not there.

    Example:
        >>> grid = Grid(t=torch.linspace(0, 1, 5), x=torch.linspace(0, 1, 9))
        >>> grid.shape
        (5, 9)
    """

    def __init__(self, *, periodic: Sequence[str] = (), **axes: Tensor) -> None:
        if not axes:
            raise ValueError("expected at least one axis, got none")
        for name, points in axes.items():
            if points.dim() != 1 or len(points) < 3:
                raise ValueError(f"expected three points or more along {name}, got shape {tuple(points.shape)}")
            steps = checks.finite(name, points.double()).diff()
            if bool((steps <= 0).any()) or float(steps.max() - steps.min()) > 1e-3 * float(steps.mean()):
                raise ValueError(f"expected evenly spaced, rising points along {name}")
        for name in periodic:
            checks.one_of("periodic axis", name, axes)
        self.axes = {name: points.double() for name, points in axes.items()}
        self.periodic = tuple(periodic)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(points) for points in self.axes.values())

    def __repr__(self) -> str:
        return f"Grid({', '.join(f'{name}={len(points)}' for name, points in self.axes.items())})"

    def dim(self, axis: str) -> int:
        """Place of an axis among a field's last dimensions, from the end."""
        return self.names.index(axis) - len(self.axes)

    def step(self, axis: str) -> float:
        """Distance of its points."""
        points = self.axes[axis]
        return float((points[-1] - points[0]) / (len(points) - 1))

    def derivative(self, field: Tensor, axis: str) -> Tensor:
        """By central differences, of second order at the ends too; `field` is `[..., *shape]`."""
        dim, h = self.dim(axis), self.step(axis)
        if axis in self.periodic:
            return (field.roll(-1, dim) - field.roll(1, dim)) / (2 * h)
        return torch.gradient(field, spacing=h, dim=dim, edge_order=2)[0]

    def points(self) -> Tensor:
        """Coordinates of every point, `[*shape, axes]`."""
        return torch.stack(torch.meshgrid(*self.axes.values(), indexing="ij"), -1)


class PDE(Shown, ABC):
    """An equation: which linear terms of a field it needs, and its residual as a pointwise function of them.

    A new equation takes a few lines:

        >>> class Advection(PDE):
        ...     edges = {"left": ("x", 0)}
        ...     def terms(self, field, grid):
        ...         return {"u": field, "u_t": grid.derivative(field, "t"), "u_x": grid.derivative(field, "x")}
        ...     def residual(self, terms, params):
        ...         return terms["u_t"] + params["speed"] * terms["u_x"]
        ...     def boundary(self, edge, terms, params):
        ...         return terms["u"]

    Attributes:
        edges: boundaries on which a condition holds, by name: axis, and 0 or -1 for its first or last point.
    """

    edges: ClassVar[Edges] = {}

    @abstractmethod
    def terms(self, field: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The field and what is linear in it, by name; `field` is `[..., *grid.shape]`. One of them is called `"u"`."""

    @abstractmethod
    def residual(self, terms: Terms, params: Terms) -> Tensor:
        """What is zero at a solution, from the terms at the same point; differentiable."""

    def boundary(self, edge: str, terms: Terms, params: Terms) -> Tensor:
        """What is zero on an edge."""
        raise NotImplementedError(f"{type(self).__name__} has the edge {edge!r} and no condition on it")

    def shape_basis(self, basis: Tensor, grid: Grid) -> Tensor:
        """Basis functions `[..., *grid.shape]` made fit for the equation; as they are by default."""
        return basis

    def lift(self, initial: Tensor, grid: Grid) -> Tensor | None:
        """A field that has the initial values, to which basis functions that vanish at the start are added.

        Without one, by default, the initial values are among the conditions.
        """
        return None


class Heat1D(PDE):
    """$u_t = \\kappa u_{xx}$ with u = 0 at both ends; linear, so that its solve has a closed form.

    Args:
        conductivity: $\\kappa$.
    """

    edges: ClassVar[Edges] = {"left": ("x", 0), "right": ("x", -1)}

    def __init__(self, conductivity: float = 1.0) -> None:
        self.conductivity = float(checks.positive("conductivity", conductivity))

    def terms(self, field: Tensor, grid: Grid) -> dict[str, Tensor]:
        u_x = grid.derivative(field, "x")
        return {"u": field, "u_t": grid.derivative(field, "t"), "u_xx": grid.derivative(u_x, "x")}

    def residual(self, terms: Terms, params: Terms) -> Tensor:
        return terms["u_t"] - self.conductivity * terms["u_xx"]

    def boundary(self, edge: str, terms: Terms, params: Terms) -> Tensor:
        return terms["u"]


class Burgers1D(PDE):
    """$u_t + u u_x = \\nu u_{xx}$ on a periodic x.

    Args:
        viscosity: $\\nu$; instances may bring their own as `params["viscosity"]`.
    """

    def __init__(self, viscosity: float = 0.01) -> None:
        self.viscosity = float(checks.positive("viscosity", viscosity))

    def terms(self, field: Tensor, grid: Grid) -> dict[str, Tensor]:
        u_x = grid.derivative(field, "x")
        return {"u": field, "u_t": grid.derivative(field, "t"), "u_x": u_x, "u_xx": grid.derivative(u_x, "x")}

    def residual(self, terms: Terms, params: Terms) -> Tensor:
        viscosity: Any = params.get("viscosity", self.viscosity)
        return terms["u_t"] + terms["u"] * terms["u_x"] - viscosity * terms["u_xx"]


class DiffusionSorption1D(PDE):
    """Diffusion of a substance that the ground retains, $u_t = \\frac{D}{R(u)} u_{xx}$, $R = 1 + \\frac{1 - \\phi}{\\phi} \\rho_s k n_f u^{n_f - 1}$.

    With u = 1 at the left end and $u = D u_x$ at the right one.

    Args:
        diffusion: D.
        time_unit: length of the grid's unit of time, to solve in a rescaled time.
        porosity: $\\phi$, in (0, 1).
        density: $\\rho_s$.
        freundlich: k.
        exponent: $n_f$.

    Reference:
        Takamoto et al., PDEBench, 2022 (arXiv 2210.07182), Appendix D.
    """

    edges: ClassVar[Edges] = {"left": ("x", 0), "right": ("x", -1)}

    def __init__(
        self,
        diffusion: float = 5e-4,
        time_unit: float = 1.0,
        porosity: float = 0.29,
        density: float = 2880.0,
        freundlich: float = 3.5e-4,
        exponent: float = 0.874,
    ) -> None:
        self.diffusion, self.time_unit = (
            checks.positive("diffusion", diffusion),
            checks.positive("time_unit", time_unit),
        )
        checks.between("porosity", porosity, 0, 1, inclusive=False)
        self.exponent = checks.positive("exponent", exponent)
        factor = checks.positive("density", density) * checks.positive("freundlich", freundlich) * exponent
        self.retention = (1 - porosity) / porosity * factor

    def retardation(self, u: Any) -> Any:
        """R(u), of tensors; negative u counts as 0."""
        return 1 + self.retention * (u.clamp_min(0) + 1e-6) ** (self.exponent - 1)

    def terms(self, field: Tensor, grid: Grid) -> dict[str, Tensor]:
        u_x = grid.derivative(field, "x")
        return {"u": field, "u_t": grid.derivative(field, "t"), "u_x": u_x, "u_xx": grid.derivative(u_x, "x")}

    def residual(self, terms: Terms, params: Terms) -> Tensor:
        speed = self.time_unit * self.diffusion / self.retardation(terms["u"])
        return terms["u_t"] - speed * terms["u_xx"]

    def boundary(self, edge: str, terms: Terms, params: Terms) -> Tensor:
        return terms["u"] - 1 if edge == "left" else terms["u"] - self.diffusion * terms["u_x"]


class NavierStokes2D(PDE):
    """Incompressible flow on a periodic square as vorticity, $w_t + v \\cdot \\nabla w = \\nu \\Delta w$, without mean.

    The velocity $v = (\\psi_y, -\\psi_x)$ comes from $\\Delta \\psi = -w$ by Fourier transform. Basis functions are multiplied
    by `scale` t / t_end and lose their mean; the initial vorticity is added to them.

    Args:
        viscosity: $\\nu$; instances may bring their own as `params["viscosity"]`.
        scale: size of the basis functions.
    """

    def __init__(self, viscosity: float = 1e-4, scale: float = 0.005) -> None:
        self.viscosity, self.scale = checks.positive("viscosity", viscosity), checks.positive("scale", scale)

    def terms(self, field: Tensor, grid: Grid) -> dict[str, Tensor]:
        psi = self._stream(field, grid)
        w_x, w_y = grid.derivative(field, "x"), grid.derivative(field, "y")
        laplace = grid.derivative(w_x, "x") + grid.derivative(w_y, "y")
        terms = {"u": field, "w_t": grid.derivative(field, "t"), "w_x": w_x, "w_y": w_y, "laplace": laplace}
        return terms | {"v_x": grid.derivative(psi, "y"), "v_y": -grid.derivative(psi, "x")}

    def _stream(self, w: Tensor, grid: Grid) -> Tensor:
        (nx, ny), (hx, hy) = grid.shape[-2:], (grid.step("x"), grid.step("y"))
        kx = 2 * torch.pi * torch.fft.fftfreq(nx, hx, dtype=w.dtype, device=w.device)
        ky = 2 * torch.pi * torch.fft.rfftfreq(ny, hy, dtype=w.dtype, device=w.device)
        square = kx[:, None] ** 2 + ky**2
        square[0, 0] = 1
        return torch.fft.irfft2(torch.fft.rfft2(w) / square, s=(nx, ny))

    def residual(self, terms: Terms, params: Terms) -> Tensor:
        carried = terms["v_x"] * terms["w_x"] + terms["v_y"] * terms["w_y"]
        viscosity: Any = params.get("viscosity", self.viscosity)
        return terms["w_t"] + carried - viscosity * terms["laplace"]

    def shape_basis(self, basis: Tensor, grid: Grid) -> Tensor:
        t = grid.axes["t"].to(basis)
        grown = self.scale * ((t - t[0]) / (t[-1] - t[0]))[:, None, None] * basis
        return grown - grown.mean((-2, -1), keepdim=True)

    def lift(self, initial: Tensor, grid: Grid) -> Tensor:
        initial = initial - initial.mean((-2, -1), keepdim=True)
        return initial.unsqueeze(-3).expand(*initial.shape[:-2], *grid.shape)
