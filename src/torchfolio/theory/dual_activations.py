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
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.theory.dual_base import DualActivation, polynomial
from torchfolio.theory.erf_dual import ErfDual
from torchfolio.theory.normal_quadrature import hermite_polynomials, nodes, weighted_hermite
from torchfolio.theory.rectifier_dual import RectifierDual, StepDual
from torchfolio.theory.sine_dual import SineDual

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

LARGEST_TAIL = 1e-5


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
    z, weight = nodes()
    values, slopes = _evaluate(function, z)
    moment = float(weight @ values.square())
    edges = values[[0, -1]].square() * weight[[0, -1]]
    if not moment > 0 or float(edges.max()) > 1e-12 * moment:
        reason = "is zero" if not moment > 0 else "is not square integrable under the normal distribution"
        raise ValueError(f"expected an activation of finite mean square, got one that {reason}")
    a = values @ weighted_hermite(degree) / math.sqrt(moment)
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
