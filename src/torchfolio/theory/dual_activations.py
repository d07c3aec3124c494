"""Dual activations: what an activation function does to the covariance of infinitely many Gaussian neurons.

For $(u, v)$ Gaussian with variances $p, q$ and covariance $c$, an activation $\\varphi$ has the covariance
$E[\\varphi(u) \\varphi(v)]$ and its derivative in $c$, $E[\\varphi'(u) \\varphi'(v)]$. With unit variances and
$E[\\varphi^2] = 1$ both are functions of the correlation alone,

$$\\check\\varphi(\\xi) = \\sum_k a_k^2 \\xi^k, \\qquad \\check\\varphi'(\\xi) = \\sum_k k a_k^2 \\xi^{k-1}, \\qquad
a_k = E[\\varphi(z) h_k(z)],$$

with the orthonormal Hermite polynomials $h_k = He_k / \\sqrt{k!}$. `dual_activation` finds them for a name, a module or
a function; rectifiers, erf, sine and step have closed forms. The `koenigs` function of a dual activation is the limit of
its iterates.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Activation",
    "DualActivation",
    "ErfDual",
    "RectifierDual",
    "SineDual",
    "StepDual",
    "dual_activation",
    "hermite_polynomials",
    "polynomial",
]

HALF_WIDTH, PANELS, NODES = 20.0, 160, 16  # panels of 1/4: kinks at 0, ±1, ±3, ±6 lie between panels
ZERO = 1e-8  # a Hermite coefficient below this share of the norm is rounding
LARGEST_TAIL = 1e-5
LOCAL_DEGREE = 24  # of the Koenigs function's power series
TILE = 1 << 15  # elements that stay in the cache while they are iterated
NEAR = 0.1  # distance from 1 below which iterates are followed as 1 - ξ


def hermite_polynomials(z: Tensor, degree: int) -> Tensor:
    """Orthonormal Hermite polynomials $h_0, \\dots, h_{degree}$ of every element, along a new last axis."""
    rows = [torch.ones_like(z), z]
    for k in range(1, degree):
        rows.append((z * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1))
    return torch.stack(rows[: degree + 1], -1)


@cache
def _nodes() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal distribution by composite Gauss-Legendre quadrature.

    Gauss-Hermite nodes would be fewer for smooth functions, but lose 10 digits at a kink.
    """
    x, w = np.polynomial.legendre.leggauss(NODES)
    width = 2 * HALF_WIDTH / PANELS
    left = -HALF_WIDTH + width * np.arange(PANELS)
    z = (left[:, None] + width * (x + 1) / 2).ravel()
    weight = np.tile(width * w / 2, PANELS) * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return torch.from_numpy(z), torch.from_numpy(weight)


@cache
def _weighted_hermite(degree: int) -> Tensor:
    z, weight = _nodes()
    return hermite_polynomials(z, degree) * weight[:, None]


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
        given = np.asarray([float(c) for c in coefficients])
        if given.ndim != 1 or not len(given) or not np.isfinite(given).all() or not given.any():
            raise ValueError(f"expected finite Hermite coefficients that are not all zero, got {given.tolist()}")
        mass = float(given @ given)
        self.coefficients = tuple(float(c) for c in given / math.sqrt(mass))
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
        given = xi if xi is not None else eta
        assert given is not None
        lowest, highest = (given.min(), given.max()) if given.numel() else (0, 1)
        if not (lowest >= (-1 if eta is None else 0) - 1e-9 and highest <= (1 if eta is None else 2) + 1e-9):
            what = "correlations from -1 to 1" if eta is None else "eta from 0 to 2"
            raise ValueError(f"expected {what}, got {float(lowest)} to {float(highest)}")
        value = torch.empty_like(given, memory_format=torch.contiguous_format)
        series, radius = self._local
        for x, out in zip(given.reshape(-1).split(TILE), value.view(-1).split(TILE), strict=True):
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
        z, _ = _nodes()
        basis = _weighted_hermite(len(self.coefficients) - 1).to(variance)
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


class _ClosedForm(DualActivation):
    """A dual whose covariances have a closed form; its first coefficients come from quadrature."""

    def __init__(self, function: Callable[[Tensor], Tensor], slope_at_one: float) -> None:
        z, _ = _nodes()
        one = torch.ones((), dtype=torch.float64)
        moment = float(self.diagonal(one))
        a = function(z) @ _weighted_hermite(2 * LOCAL_DEGREE) / math.sqrt(moment)
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


def _correlation(p: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    scale = (p * q).sqrt()
    return scale, (c / scale.clamp_min(torch.finfo(c.dtype).tiny)).clamp(-1, 1)


class _StepKernel(torch.autograd.Function):
    """$(\\pi - \\theta) / 2\\pi$. Its derivative is infinite at $\\theta = 0$ and $\\pi$, and taken as 0 there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        return (math.pi - torch.acos(_correlation(p, q, c)[1])) / (2 * math.pi)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        p, q, c = ctx.saved_tensors
        rest = p * q - c * c
        apart = rest > 4 * torch.finfo(c.dtype).eps * (p * q)
        slope = torch.where(apart, 1 / (2 * math.pi * torch.where(apart, rest, 1.0).sqrt()), 0.0) * grads[0]
        one = torch.ones((), dtype=c.dtype, device=c.device)
        safe_p, safe_q = torch.where(apart, p, one), torch.where(apart, q, one)
        return -slope * c / (2 * safe_p), -slope * c / (2 * safe_q), slope


class _RampKernel(torch.autograd.Function):
    """$\\sqrt{pq} (\\sin\\theta + (\\pi - \\theta) \\cos\\theta) / 2\\pi$: smooth although the arccosine in it is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        scale, cos = _correlation(p, q, c)
        sin = ((1 - cos) * (1 + cos)).sqrt_()
        return (scale * sin + (math.pi - torch.acos(cos)) * (scale * cos)) / (2 * math.pi)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        p, q, c = ctx.saved_tensors
        rest = p * q - c * c
        apart = rest > torch.finfo(c.dtype).eps * (p * q)
        half = torch.where(apart, torch.where(apart, rest, 1.0).sqrt() / (4 * math.pi), 0.0) * grads[0]
        one = torch.ones((), dtype=c.dtype, device=c.device)
        return (
            half / torch.where(apart, p, one),
            half / torch.where(apart, q, one),
            grads[0] * _StepKernel.apply(p, q, c),
        )


class RectifierDual(_ClosedForm):
    """Dual of $\\max(z, 0) + s \\min(z, 0)$: ReLU at $s = 0$, leaky ReLU, the identity at 1, $|z|$ at -1.

    With $\\cos\\theta = c / \\sqrt{pq}$ its covariance is
    $(1 - s)^2 \\sqrt{pq} (\\sin\\theta + (\\pi - \\theta) \\cos\\theta) / 2\\pi + sc$, the arc-cosine kernel of order 1.

    Args:
        negative_slope: $s$.
    """

    def __init__(self, negative_slope: float = 0.0) -> None:
        self.negative_slope = float(negative_slope)
        super().__init__(_Rectifier(self.negative_slope), 1.0)

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        s = self.negative_slope
        if s == 1:
            return c
        ramp = _RampKernel.apply(*torch.broadcast_tensors(p, q, c))
        return ramp if s == 0 else (1 - s) ** 2 * ramp + s * c

    def covariance_derivative(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        s = self.negative_slope
        if s == 1:
            return torch.ones_like(c)
        step = _StepKernel.apply(*torch.broadcast_tensors(p, q, c))
        return step if s == 0 else (1 - s) ** 2 * step + s

    def both(self, p: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        s = self.negative_slope
        if s == 1 or (torch.is_grad_enabled() and any(t.requires_grad for t in (p, q, c))):
            return super().both(p, q, c)
        scale, cos = _correlation(p, q, c)
        step = (math.pi - torch.acos(cos)).mul_((1 - s) ** 2 / (2 * math.pi)).add_(s)
        sin = cos.square().neg_().add_(1).clamp_min_(0).sqrt_()
        return cos.mul_(step).add_(sin, alpha=(1 - s) ** 2 / (2 * math.pi)).mul_(scale), step

    def diagonal(self, q: Tensor) -> Tensor:
        return (1 + self.negative_slope**2) / 2 * q

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        return torch.full_like(q, (1 + self.negative_slope**2) / 2)


class _Rectifier:
    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, self.slope * z)


class StepDual(_ClosedForm):
    """Dual of the step function, 1 above 0 and 0 below: $(\\pi - \\theta) / 2\\pi$. It has no tangent kernel."""

    def __init__(self) -> None:
        super().__init__(_step, math.inf)

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        return _StepKernel.apply(*torch.broadcast_tensors(p, q, c))

    def covariance_derivative(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        raise ValueError("the step function has no derivative, hence no tangent kernel; use its NNGP")

    def diagonal(self, q: Tensor) -> Tensor:
        return torch.full_like(q, 0.5)

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        return self.covariance_derivative(q, q, q)


def _step(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


class ErfDual(_ClosedForm):
    """Dual of the error function, $\\frac2\\pi \\arcsin \\frac{2c}{\\sqrt{(1 + 2p)(1 + 2q)}}$."""

    def __init__(self) -> None:
        super().__init__(torch.erf, 2 / math.sqrt(5) / math.asin(2 / 3))

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(2 * c / ((1 + 2 * p) * (1 + 2 * q)).sqrt())

    def covariance_derivative(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        return 4 / math.pi / (1 + 2 * (p + q) + 4 * (p * q - c * c).clamp_min(0)).sqrt()

    def gap(self, eta: Tensor) -> Tensor:
        # arcsin a - arcsin b = arcsin((a² - b²) / (a √(1 - b²) + b √(1 - a²))) with a = 2/3, b = a (1 - η)
        a, b = 2 / 3, 2 / 3 * (1 - eta)
        difference = a * a * eta * (2 - eta) / (a * (1 - b * b).sqrt() + b * math.sqrt(1 - a * a))
        return torch.asin(difference) / math.asin(a)

    def diagonal(self, q: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(2 * q / (1 + 2 * q))

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        return 4 / math.pi / (1 + 4 * q).sqrt()


class SineDual(_ClosedForm):
    """Dual of $\\sin \\omega z$, $e^{-\\omega^2 (p + q) / 2} \\sinh \\omega^2 c$; normalised, $\\sinh a\\xi / \\sinh a$.

    Args:
        a: squared frequency $\\omega^2$, above 0.
    """

    def __init__(self, a: float = 1.0) -> None:
        if not a > 0 or not math.isfinite(a):
            raise ValueError(f"expected a above 0, got {a!r}")
        self.a = float(a)
        super().__init__(_Sine(math.sqrt(a)), a / math.tanh(a))

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        # Exponents below 0, where a hyperbolic sine would overflow; sinh keeps the digits of small covariances.
        return torch.exp(self.a * (c.abs() - (p + q) / 2)) * -torch.expm1(-2 * self.a * c.abs()) / 2 * c.sign()

    def covariance_derivative(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        half = (p + q) / 2
        return self.a / 2 * (torch.exp(self.a * (c - half)) + torch.exp(-self.a * (c + half)))

    def gap(self, eta: Tensor) -> Tensor:
        a = self.a
        # 2 cosh(a - aη/2) sinh(aη/2) / sinh a
        first = torch.exp(-a * eta / 2) * (1 + torch.exp(-a * (2 - eta)))
        return 2 * first * torch.sinh(a * eta / 2) / -math.expm1(-2 * a)

    def diagonal(self, q: Tensor) -> Tensor:
        return -torch.expm1(-2 * self.a * q) / 2

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        return self.a / 2 * (1 + torch.exp(-2 * self.a * q))


class _Sine:
    def __init__(self, frequency: float) -> None:
        self.frequency = frequency

    def __call__(self, z: Tensor) -> Tensor:
        return torch.sin(self.frequency * z)


Activation = str | nn.Module | Callable[[Tensor], Tensor] | DualActivation
"""Name of an activation, a module, a function, or its dual kernel."""

CLOSED: dict[str, Callable[[], DualActivation]] = {
    "relu": RectifierDual,
    "leaky_relu": lambda: RectifierDual(0.01),
    "abs": lambda: RectifierDual(-1.0),
    "identity": lambda: RectifierDual(1.0),
    "erf": ErfDual,
    "sine": SineDual,
    "step": StepDual,
}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "cosine": torch.cos,
}
FUNCTIONS = {
    torch.relu: "relu",
    F.relu: "relu",
    torch.abs: "abs",
    torch.erf: "erf",
    torch.special.erf: "erf",
    torch.sin: "sine",
}


def dual_activation(activation: Activation, degree: int = 64) -> DualActivation:
    """The dual of any activation function.

    Rectifiers, erf, the sine and the step have closed forms. Of other functions $A$, $A'$, $B'$ and the Hermite
    coefficients up to `degree` are integrals by quadrature; the share of $E[\\varphi^2]$ beyond is given to the next
    degree.

    Args:
        activation: name (`"relu"`, `"leaky_relu"`, `"abs"`, `"identity"`, `"erf"`, `"sine"`, `"step"`, `"tanh"`,
            `"sigmoid"`, `"gelu"`, `"silu"`, `"elu"`, `"selu"`, `"softplus"`, `"cosine"`), module, function of a
            tensor, or dual, which is returned as it is.
        degree: highest Hermite degree, at least 2.

    Returns:
        The dual, with $E[\\varphi(z)^2]$ as `second_moment`.

    Warns:
        UserWarning: if more than 1e-5 of $E[\\varphi^2]$ lies beyond `degree`.

    Raises:
        ValueError: on an unknown name, or a function that is zero, random, not elementwise, not finite or not square
            integrable under the normal distribution.
        TypeError: on anything else.

    Example:
        >>> dual_activation("relu")
        RectifierDual(0.5642 h0 + 0.7071 h1 + 0.3989 h2 + -0.1152 h4 + ...)
        >>> dual_activation(nn.Tanh()).mean
        0.0
    """
    if isinstance(activation, DualActivation):
        return activation
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 2:
        raise ValueError(f"expected degree to be a whole number of at least 2, got {degree!r}")
    if isinstance(activation, str):
        if activation in CLOSED:
            return CLOSED[activation]()
        if activation not in SMOOTH:
            raise ValueError(f"expected an activation of {', '.join([*CLOSED, *SMOOTH])}, got {activation!r}")
        activation = SMOOTH[activation]
    if not callable(activation):
        raise TypeError(f"expected an activation's name, module, function or dual, got {type(activation).__name__}")
    if isinstance(activation, nn.Module):
        closed = _closed_form(activation)
        return closed if closed is not None else _by_quadrature(_frozen(activation), degree)
    if (name := FUNCTIONS.get(activation) if activation.__hash__ else None) is not None:
        return CLOSED[name]()
    return _by_quadrature(activation, degree)


def _closed_form(module: nn.Module) -> DualActivation | None:
    if type(module) is nn.ReLU:
        return RectifierDual()
    if type(module) is nn.LeakyReLU:
        return RectifierDual(module.negative_slope)
    if type(module) is nn.Identity:
        return RectifierDual(1.0)
    dual = getattr(module, "dual", None)
    return dual if isinstance(dual, DualActivation) else None


def _frozen(module: nn.Module) -> nn.Module:
    """A copy that computes in float64, deterministically."""
    return copy.deepcopy(module).double().cpu().eval().requires_grad_(False)


def _by_quadrature(function: Callable[[Tensor], Tensor], degree: int) -> DualActivation:
    z, weight = _nodes()
    values, slopes = _evaluate(function, z)
    moment = float(weight @ values.square())
    edges = values[[0, -1]].square() * weight[[0, -1]]
    if not moment > 0 or float(edges.max()) > 1e-12 * moment:
        reason = "is zero" if not moment > 0 else "is not square integrable under the normal distribution"
        raise ValueError(f"expected an activation of finite mean square, got one that {reason}")
    a = values @ _weighted_hermite(degree) / math.sqrt(moment)
    a = torch.where(a.abs() > 1e-14, a, 0)
    tail = max(0.0, 1 - float(a.square().sum()))
    if tail > LARGEST_TAIL:
        warnings.warn(
            f"{tail:.2g} of the activation's mean square lies beyond Hermite degree {degree}; raise degree",
            stacklevel=3,
        )
    known = float(torch.arange(degree + 1, dtype=torch.float64) @ a.square())
    at_one = float(weight @ slopes.square()) / moment
    if at_one < known * (1 - 1e-6):
        at_one = math.inf  # the slope at the nodes misses what the function gains in jumps
    a = torch.cat([a, a.new_tensor([math.sqrt(tail) if tail > 1e-13 else 0.0])])
    return DualActivation(a, function=function, second_moment=moment, slope_at_one=at_one)


def _evaluate(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Values and slopes of a function that must be deterministic, elementwise and finite."""
    with torch.enable_grad():
        x = z.clone().requires_grad_()
        values = function(x)
        if not isinstance(values, Tensor) or values.shape != z.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"expected an activation that keeps the shape {tuple(z.shape)}, got {got}")
        slopes = torch.autograd.grad(values.sum(), x, allow_unused=True)[0] if values.requires_grad else None
        part = function(z[::2])
    values = values.detach().to(torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("expected an activation that is finite on [-20, 20]")
    if not torch.allclose(part.detach().to(torch.float64), values[::2], rtol=1e-6, atol=1e-9):
        raise ValueError("expected an activation that acts on every element alone and without randomness")
    return values, torch.zeros_like(z) if slopes is None else slopes.detach()
