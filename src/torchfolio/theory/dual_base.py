"""The dual of an activation as a power series in the correlation, and the base of those with closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from torchfolio.theory.normal_quadrature import hermite_polynomials, nodes, weighted_hermite

__all__ = ["ClosedFormDual", "DualActivation", "polynomial"]

ZERO = 1e-8  # a Hermite coefficient below this share of the norm is rounding


LOCAL_DEGREE = 24  # of the Koenigs function's power series


TILE = 1 << 15  # elements that stay in the cache while they are iterated


NEAR = 0.1  # distance from 1 below which iterates are followed as 1 - ξ


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """$\\sum_k c_k x^k$ by Horner's scheme over the coefficients that are not zero; powers between as products."""
    powers = [k for k, c in enumerate(coefficients) if c != 0]
    if not powers:
        return torch.zeros_like(x)
    square = x * x if any(b - a > 1 for a, b in zip([0, *powers], powers, strict=False)) else x
    value: Tensor | None = None
    in_place = not (torch.is_grad_enabled() and x.requires_grad)
    for k, lower in zip(powers[::-1], [*powers[-2::-1], 0], strict=True):
        for factor in [square] * ((k - lower) // 2) + [x] * ((k - lower) % 2):
            if value is None:
                value = factor * coefficients[k]
                continue
            value = value.mul_(factor) if in_place else value * factor
        if value is not None and lower != k and coefficients[lower] != 0:
            value = value.add_(coefficients[lower]) if in_place else value + coefficients[lower]
    return torch.full_like(x, coefficients[0]) if value is None else value


class DualActivation:
    """The dual of an activation function, as a power series in the correlation.

    Args:
        coefficients: Hermite coefficients $a_0, a_1, \\dots$ of $\\varphi$; scaled to $\\sum_k a_k^2 = 1$.
        function: activation function itself, for variances other than 1; $\\sum_k a_k h_k$ by default.
        second_moment: $E[\\varphi(z)^2]$, by which the dual is normalised; $\\sum_k a_k^2$ by default.
        slope_at_one: $E[\\varphi'(z)^2] / E[\\varphi(z)^2]$ where the series is cut off too early to tell.

    Attributes:
        coefficients: $a_k$ of the normalised activation.
        second_moment: $E[\\varphi(z)^2]$.
        mean: $A = E[\\varphi(z)]$ of the normalised activation.
        slope: $A' = E[\\varphi'(z)]$ of the normalised activation; $\\check\\varphi'(0) = A'^2$.
        slope_at_one: $B' = \\check\\varphi'(1)$.

    Raises:
        ValueError: if the coefficients are none, not finite or all zero.

    Example:
        >>> dual = DualActivation([0, 1, 0, 1])
        >>> dual(torch.tensor(0.5))
        tensor(0.3125)
        >>> round(dual.slope_at_one, 12)
        2.0
    """

    def __init__(
        self,
        coefficients: Sequence[float] | Tensor,
        *,
        function: Callable[[Tensor], Tensor] | None = None,
        second_moment: float | None = None,
        slope_at_one: float | None = None,
    ) -> None:
        values = np.asarray([float(c) for c in coefficients])
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or not values.any():
            raise ValueError(f"expected finite Hermite coefficients that are not all zero, got {values.tolist()}")
        mass = float(values @ values)
        self.coefficients = tuple(float(c) for c in values / math.sqrt(mass))
        self.second_moment = mass if second_moment is None else float(second_moment)
        self._function = function
        squares = [c * c for c in self.coefficients]
        self._series = squares
        self._derivative = [k * c for k, c in enumerate(squares)][1:] or [0.0]
        # (1 - ξ^k) / (1 - ξ) = 1 + ξ + ... + ξ^(k-1): positive terms, hence no digits are lost near 1.
        self._quotient = np.cumsum(squares[:0:-1])[::-1].tolist() or [0.0]
        self.slope_at_one = float(sum(self._derivative)) if slope_at_one is None else float(slope_at_one)

    @property
    def mean(self) -> float:
        return self.coefficients[0] if abs(self.coefficients[0]) > ZERO else 0.0

    @property
    def slope(self) -> float:
        slope = self.coefficients[1] if len(self.coefficients) > 1 else 0.0
        return slope if abs(slope) > ZERO else 0.0

    @property
    def is_linear(self) -> bool:
        """Whether $\\check\\varphi(\\xi) = \\xi$."""
        return not self.mean and 1 - self.slope**2 <= 1e-12

    def __repr__(self) -> str:
        nonzero = [f"{c:.4g} h{k}" for k, c in enumerate(self.coefficients) if abs(c) > ZERO]
        return f"{type(self).__name__}({' + '.join(nonzero[:4])}{' + ...' if len(nonzero) > 4 else ''})"

    # Unit variances, normalised activation

    def __call__(self, xi: Tensor) -> Tensor:
        """$\\check\\varphi(\\xi)$ of correlations in [-1, 1]."""
        return polynomial(self._series, xi)

    def derivative(self, xi: Tensor) -> Tensor:
        """$\\check\\varphi'(\\xi)$, which is the dual of $\\varphi'$."""
        return polynomial(self._derivative, xi)

    def both_normalized(self, xi: Tensor) -> tuple[Tensor, Tensor]:
        """$\\check\\varphi(\\xi)$ and $\\check\\varphi'(\\xi)$."""
        return self(xi), self.derivative(xi)

    def gap(self, eta: Tensor) -> Tensor:
        """$1 - \\check\\varphi(1 - \\eta)$ without loss of digits for small $\\eta$ in [0, 1]."""
        return eta * polynomial(self._quotient, 1 - eta)

    def _ratio(self, xi: Tensor) -> Tensor:
        """$\\check\\varphi(\\xi) / \\xi$ where $\\check\\varphi(0) = 0$."""
        return polynomial(self._series[1:], xi)

    @torch.no_grad()
    def koenigs(self, xi: Tensor | None = None, *, eta: Tensor | None = None) -> Tensor:
        """The Koenigs function $\\psi(\\xi) = \\lim_L \\check\\varphi^{\\circ L}(\\xi) / \\check\\varphi'(0)^L$.

        It solves $\\psi(\\check\\varphi(\\xi)) = \\check\\varphi'(0) \\psi(\\xi)$ with $\\psi(0) = 0$ and
        $\\psi'(0) = 1$, and is infinite at 1. Iterates are followed as $1 - \\xi$ near 1 and as products of ratios
        $\\check\\varphi(T) / \\check\\varphi'(0) T$ elsewhere, so that nothing underflows; below a small $T$ the power
        series of $\\psi$ takes over. Not differentiable.

        Args:
            xi: correlations in [-1, 1].
            eta: $1 - \\xi$ instead, which keeps the digits of correlations near 1.

        Raises:
            ValueError: unless $\\check\\varphi(0) = 0 \\ne \\check\\varphi'(0)$ and $\\varphi$ is not linear, or on
                values out of range.
        """
        if self.mean or not self.slope or self.is_linear:
            raise ValueError(f"expected an activation with A = 0, A' ≠ 0 that is not linear, got {self!r}")
        if (xi is None) == (eta is None):
            raise ValueError("expected one of xi and eta")
        argument = xi if xi is not None else eta
        assert argument is not None
        lowest, highest = (argument.min(), argument.max()) if argument.numel() else (0, 1)
        if not (lowest >= (-1 if eta is None else 0) - 1e-9 and highest <= (1 if eta is None else 2) + 1e-9):
            what = "correlations from -1 to 1" if eta is None else "eta from 0 to 2"
            raise ValueError(f"expected {what}, got {float(lowest)} to {float(highest)}")
        value = torch.empty_like(argument, memory_format=torch.contiguous_format)
        series, radius = self._local
        for x, out in zip(argument.reshape(-1).split(TILE), value.view(-1).split(TILE), strict=True):
            t, e = (x.clone(), 1 - x) if eta is None else (1 - x, x)
            self._iterate(t, e, out, series, radius)
        return value

    def _iterate(self, t: Tensor, eta: Tensor, value: Tensor, series: list[float], radius: float) -> None:
        """Write the Koenigs function of `t` = 1 - `eta` to `value`; overwrites `t`."""
        first = self.slope**2
        opposite = t < 0
        if fold := not any(self._series[::2]) and bool(opposite.any()):  # an odd series: -1 is a fixed point, too
            eta = torch.where(opposite, 2 - eta, eta)
            t.abs_()
        value.copy_(t)
        duplicate = eta <= 0
        near = ((eta < NEAR) & ~duplicate).nonzero()[:, 0]
        e, v = eta[near], value[near]
        while len(near):
            after = self.gap(e)
            v = v * (1 - after) / ((1 - e) * first)
            value[near], t[near] = v, 1 - after
            stay = after < NEAR
            near, e, v = near[stay], after[stay], v[stay]
        t[duplicate] = 0
        while t.numel() and float(torch.maximum(t.max(), -t.min())) > radius:
            ratio = self._ratio(t)
            value.mul_(ratio).div_(first)
            t.mul_(ratio)
        value.mul_(polynomial(series, t))
        value[duplicate] = math.inf
        if fold:
            value.mul_(torch.where(opposite, -1, 1))

    @property
    def _local(self) -> tuple[list[float], float]:
        """Coefficients of $\\psi(\\xi) / \\xi$, and up to where they give it to rounding."""
        degree, first = 2 * LOCAL_DEGREE, self.slope**2
        phi = np.zeros(degree + 1)
        phi[: len(self._series)] = self._series[: degree + 1]
        phi[0], phi[1] = 0, first
        # Comparing powers of ξ in ψ(φ(ξ)) = φ'(0) ψ(ξ); row j of `powers` is φ^j.
        powers = np.zeros((degree + 1, degree + 1))
        powers[0, 0] = 1
        for j in range(1, degree + 1):
            powers[j] = np.convolve(powers[j - 1], phi)[: degree + 1]
        c = np.zeros(degree + 1)
        c[1] = 1
        for k in range(2, degree + 1):
            c[k] = c[1:k] @ powers[1:k, k] / (first - first**k)
        left = [(1e-17 / c[k]) ** (1 / (k - 1)) for k in range(LOCAL_DEGREE + 1, degree + 1) if c[k] > 0]
        return c[1 : LOCAL_DEGREE + 1].tolist(), min([0.3, *left])

    # Any variances, the activation as it is

    def function(self, z: Tensor) -> Tensor:
        """The activation $\\varphi$, not normalised."""
        if self._function is not None:
            return self._function(z)
        scale = math.sqrt(self.second_moment)
        a = torch.tensor(self.coefficients, dtype=z.dtype, device=z.device) * scale
        return hermite_polynomials(z, len(a) - 1) @ a

    def _moments(self, variance: Tensor) -> Tensor:
        """Hermite coefficients of $\\varphi(\\sqrt{q} z)$ for every variance $q$, along a new last axis."""
        z, _ = nodes()
        basis = weighted_hermite(len(self.coefficients) - 1).to(variance)
        return self.function(variance.sqrt()[..., None] * z.to(variance)) @ basis

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        """$E[\\varphi(u) \\varphi(v)]$.

        Args:
            p: variance of $u$.
            q: variance of $v$.
            c: covariance. All three broadcast.
        """
        return self._sum(p, q, c, 0)

    def covariance_derivative(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        """$E[\\varphi'(u) \\varphi'(v)]$, the derivative of `covariance` in $c$."""
        return self._sum(p, q, c, 1)

    def _sum(self, p: Tensor, q: Tensor, c: Tensor, derivative: int) -> Tensor:
        a, b = self._moments(p), self._moments(q)
        scale = (p * q).sqrt().clamp_min(torch.finfo(c.dtype).tiny)
        rho = (c / scale).clamp(-1, 1)
        value = torch.zeros_like(rho)
        for k in range(a.shape[-1] - 1, derivative - 1, -1):
            value = value * rho + (k if derivative else 1) * a[..., k] * b[..., k]
        return value / scale if derivative else value

    def both(self, p: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """`covariance` and `covariance_derivative`."""
        return self.covariance(p, q, c), self.covariance_derivative(p, q, c)

    def diagonal(self, q: Tensor) -> Tensor:
        """$E[\\varphi(u)^2]$ for a variance $q$: `covariance` where $u = v$."""
        return self._moments(q).square().sum(-1)

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        """$E[\\varphi'(u)^2]$ for a variance $q$."""
        a = self._moments(q)
        return (torch.arange(a.shape[-1], dtype=q.dtype, device=q.device) * a.square()).sum(-1) / q


class ClosedFormDual(DualActivation):
    """A dual whose covariances have a closed form; its first coefficients come from quadrature."""

    def __init__(self, function: Callable[[Tensor], Tensor], slope_at_one: float) -> None:
        z, _ = nodes()
        one = torch.ones((), dtype=torch.float64)
        moment = float(self.diagonal(one))
        a = function(z) @ weighted_hermite(2 * LOCAL_DEGREE) / math.sqrt(moment)
        a = torch.where(a.abs() > 1e-14, a, 0)
        super().__init__(a, function=function, second_moment=moment, slope_at_one=slope_at_one)
        self.coefficients = tuple(a.tolist())  # the rest of the mass lies beyond them
        self._series = a.square().tolist()

    def __call__(self, xi: Tensor) -> Tensor:
        one = torch.ones((), dtype=xi.dtype, device=xi.device)
        return self.covariance(one, one, xi) / self.second_moment

    def derivative(self, xi: Tensor) -> Tensor:
        one = torch.ones((), dtype=xi.dtype, device=xi.device)
        return self.covariance_derivative(one, one, xi) / self.second_moment

    def both_normalized(self, xi: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=xi.dtype, device=xi.device)
        value, slope = self.both(one, one, xi)
        return value / self.second_moment, slope / self.second_moment

    def gap(self, eta: Tensor) -> Tensor:
        return 1 - self(1 - eta)

    def _ratio(self, xi: Tensor) -> Tensor:
        nonzero = torch.where(xi == 0, 1.0, xi)
        return torch.where(xi == 0, self.slope**2, self(nonzero) / nonzero)
