"""Which classifier an activation leads to in an infinitely wide and deep network, and activations made for one.

Part of Radhakrishnan et al., "Wide and Deep Neural Networks Achieve Optimality for Classification", PNAS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.theory.dual_activations import Activation, dual_activation
from torchfolio.theory.dual_base import DualActivation, polynomial

__all__ = ["ActivationReport", "HermiteActivation", "OptimalActivation", "classify_activation"]

Kind = Literal["nearest neighbor", "singular kernel", "majority vote"]


@dataclass(frozen=True)
class ActivationReport:
    """What an activation makes of an infinitely wide and deep network.

    Attributes:
        kind: `"nearest neighbor"`, `"singular kernel"` or `"majority vote"`.
        A: $E[\\varphi]$ of the activation with $E[\\varphi^2] = 1$.
        A_prime: $E[\\varphi']$.
        B_prime: $E[\\varphi'^2]$.
        alpha: exponent of the singularity; infinite for the nearest neighbour, NaN for the majority vote.
        optimal_dim: dimension of the sphere on which it is Bayes optimal, which is `alpha`.
    """

    kind: Kind
    A: float
    A_prime: float
    B_prime: float
    alpha: float
    optimal_dim: float


def classify_activation(activation: Activation, degree: int = 64) -> ActivationReport:
    """Which of the three classifiers an activation leads to.

    Args:
        activation: name, module, function or dual; see `dual_activation`.
        degree: highest Hermite degree of its dual.

    Raises:
        ValueError: if it is linear, which leads to none of them, or as `dual_activation` does.

    Reference:
        Radhakrishnan et al., section 2.

    Example:
        >>> classify_activation("erf").kind
        'singular kernel'
        >>> round(classify_activation(OptimalActivation(3)).alpha, 10)
        3.0
    """
    dual = dual_activation(activation, degree)
    if dual.is_linear:
        raise ValueError("expected an activation that is not linear: a deep linear network is a linear one")
    kind: Kind
    if dual.mean:
        kind, alpha = "majority vote", math.nan
    elif dual.slope:
        kind, alpha = "singular kernel", -4 * math.log(abs(dual.slope)) / math.log(dual.slope_at_one)
    else:
        kind, alpha = "nearest neighbor", math.inf
    return ActivationReport(kind, dual.mean, dual.slope, dual.slope_at_one, alpha, alpha)


class HermiteActivation(nn.Module):
    """Activation $\\varphi(z) = \\sum_k a_k h_k(z)$ of orthonormal Hermite polynomials.

    Args:
        coefficients: $a_0, a_1, \\dots$; of mean square 1 where $\\sum_k a_k^2 = 1$.

    Shapes:
        Any, kept.

    Raises:
        ValueError: if they are none, not finite or all zero.
    """

    def __init__(self, coefficients: Sequence[float]) -> None:
        super().__init__()
        self.coefficients = tuple(float(a) for a in coefficients)
        self.dual = DualActivation(self.coefficients)
        scaled = [a / math.sqrt(math.factorial(k)) for k, a in enumerate(self.coefficients)]
        self._powers = np.polynomial.hermite_e.herme2poly(scaled).tolist()

    def forward(self, z: Tensor) -> Tensor:
        return polynomial(self._powers, z)

    def extra_repr(self) -> str:
        return ", ".join(f"{a:.4g}" for a in self.coefficients)


class OptimalActivation(HermiteActivation):
    """The activation whose infinitely wide and deep network is Bayes optimal on the sphere of dimension $d$.

    $(h_1 + h_7) / \\sqrt 2$ for $d = 1$, otherwise
    $2^{-d/4} h_1 + \\sqrt{1 - 2^{1 - d/2}} h_2 + 2^{-d/4} h_3$: both have $\\alpha = d$.

    Args:
        dim: dimension $d$ of the sphere, one less than that of the space around it.

    Raises:
        ValueError: if it is below 1.

    Reference:
        Radhakrishnan et al., corollary 1.
    """

    def __init__(self, dim: int) -> None:
        self.dim = checks.whole("dim", dim, 1)
        half = 2 ** (-dim / 4)
        middle = math.sqrt(max(0.0, 1 - 2 ** (1 - dim / 2)))
        super().__init__([0, 0.5**0.5, 0, 0, 0, 0, 0, 0.5**0.5] if dim == 1 else [0, half, middle, half])
