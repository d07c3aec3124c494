"""Random targets g(p(x)) with a hidden polynomial p of Gaussian inputs, and what of them is known in closed form.

Part of Wang et al., "Learning Hierarchical Polynomials with Three-Layer Neural Networks", ICLR 2024.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchfolio import checks

__all__ = ["HierarchicalPolynomial", "hermite"]


def hermite(z: Tensor, degree: int) -> Tensor:
    """Normalised Hermite polynomials $he_0 .. he_{degree}$ of z, in a last dimension.

    $he_j = He_j/\\sqrt{j!}$ with $He_{j+1} = z\\,He_j - j\\,He_{j-1}$; orthonormal for a standard normal z.
    """
    checks.whole("degree", degree, low=0)
    values = [torch.ones_like(z), z]
    for j in range(1, degree):
        values.append((z * values[j] - math.sqrt(j) * values[j - 1]) / math.sqrt(j + 1))
    return torch.stack(values[: degree + 1], -1)


class HierarchicalPolynomial:
    """A random target $h(x) = g(p(x))$ with $p = L^{-1/2} \\sum_i \\lambda_i \\psi_i$ and $g = \\sum_j g_j he_j$.

    Args:
        d: dimension of the inputs.
        k: degree of the hidden polynomial, at least 1.
        link: coefficients $g_0, g_1, ..$ of g in normalised Hermite polynomials. The first stage sees p only through
            $g_1$.
        family: `"sum_of_hermite"`, $\\psi_i(x) = he_k(\\langle w_i, x \\rangle)$ for orthonormal $w_i$, or
            `"sum_of_monomials"`, products of k coordinates in disjoint groups.
        L: number of terms; as many as fit by default, d or d/k.
        signs: $\\lambda_i$ `[L]` with $\\sum \\lambda_i^2 = L$; by default 1 and -1 in turn.
        rotate: whether the axes are turned by a random rotation, or the rotation itself, `[d, d]` with orthonormal rows.
        seed: seed of the rotation.

    Raises:
        ValueError: if the terms do not fit into d dimensions, or an argument is out of range.

    Warns:
        UserWarning: if $g_1 = 0$, so that the first stage cannot see p.

    Reference:
        Section 2; Assumptions on the target.
    """

    def __init__(
        self,
        d: int,
        k: int = 2,
        link: Sequence[float] = (0.0, math.sqrt(0.6), math.sqrt(0.4)),
        family: Literal["sum_of_hermite", "sum_of_monomials"] = "sum_of_hermite",
        L: int | None = None,
        signs: Sequence[float] | None = None,
        rotate: bool | Tensor = True,
        seed: int = 0,
    ) -> None:
        checks.whole("d", d, low=1)
        checks.whole("k", k, low=1)
        checks.one_of("family", family, ("sum_of_hermite", "sum_of_monomials"))
        room = d if family == "sum_of_hermite" else d // k
        L = room if L is None else checks.whole("L", L, low=1)
        if not 1 <= L <= room:
            raise ValueError(f"expected at most {room} terms of {family} with k = {k} in {d} dimensions, got {L}")
        self.d, self.k, self.family, self.L, self.seed = d, k, family, L, seed
        self.link = torch.as_tensor(tuple(link), dtype=torch.float64)
        if len(self.link) < 2 or not bool(self.link.isfinite().all()):
            raise ValueError(f"expected at least two finite coefficients of the link, got {tuple(link)}")
        if float(self.link[1]) == 0:
            warnings.warn("the link has no linear part, so that the first stage cannot see p", stacklevel=2)
        turns = (-1.0) ** torch.arange(L, dtype=torch.float64)
        self.signs = turns if signs is None else torch.as_tensor(tuple(signs), dtype=torch.float64)
        if self.signs.shape != (L,) or not math.isclose(float(self.signs.square().sum()), L, rel_tol=1e-6):
            raise ValueError(f"expected {L} signs whose squares sum to {L}, got {self.signs.tolist()}")
        self.axes = self._axes(rotate)

    def __repr__(self) -> str:
        link = tuple(round(float(g), 4) for g in self.link)
        return f"HierarchicalPolynomial({self.d}, k={self.k}, link={link}, family={self.family!r}, L={self.L})"

    def _axes(self, rotate: bool | Tensor) -> Tensor:
        eye = torch.eye(self.d, dtype=torch.float64)
        if isinstance(rotate, Tensor):
            Q = rotate.double()
            if Q.shape != eye.shape or not torch.allclose(Q @ Q.T, eye, atol=1e-5):
                raise ValueError(f"expected a rotation [{self.d}, {self.d}] with orthonormal rows")
            return Q
        if not rotate:
            return eye
        generator = torch.Generator().manual_seed(self.seed)
        Q, R = torch.linalg.qr(torch.randn(self.d, self.d, generator=generator, dtype=torch.float64))
        return (Q * R.diagonal().sign()).T  # uniform over rotations and reflections

    def features(self, x: Tensor) -> Tensor:
        """The orthonormal $\\psi_i(x)$, `[n, L]`."""
        z = self._inputs(x) @ self.axes.to(x).T
        if self.family == "sum_of_hermite":
            return hermite(z[:, : self.L], self.k)[..., self.k]
        return z[:, : self.L * self.k].unflatten(1, (self.L, self.k)).prod(-1)

    def p(self, x: Tensor) -> Tensor:
        """The hidden polynomial, `[n]`; mean 0 and variance 1."""
        return self.features(x) @ (self.signs / math.sqrt(self.L)).to(x)

    def g(self, z: Tensor) -> Tensor:
        """The link, of the shape of z."""
        return hermite(z, len(self.link) - 1) @ self.link.to(z)

    def __call__(self, x: Tensor) -> Tensor:
        return self.g(self.p(x))

    def sample(self, n: int, seed: int = 0, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Standard normal inputs `[n, d]` and their targets `[n]`, in float64.

        Args:
            n: number of examples.
            seed: seed of the inputs, independent of the rotation's.
            noise: standard deviation of normal noise on the targets.
        """
        checks.whole("n", n, low=1)
        checks.at_least("noise", noise, 0)
        state = np.random.SeedSequence([checks.whole("seed", seed, low=0), n, 2]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        x = torch.randn(n, self.d, generator=generator, dtype=torch.float64)
        return x, self(x) + noise * torch.randn(n, generator=generator, dtype=torch.float64)

    def _square(self) -> float:
        """Coefficient of $\\psi_i$ in the degree-k part of $\\psi_i^2$, for Hermite terms: 0 for odd k."""
        if self.family != "sum_of_hermite" or self.k % 2:
            return 0.0
        half = self.k // 2
        return math.factorial(half) * math.comb(self.k, half) ** 2 / math.sqrt(math.factorial(self.k))

    def coefficients(self) -> Tensor:
        """Coefficients `[L]` of the degree-k part of h along the $\\psi_i$:
        $g_1 \\lambda_i/\\sqrt L + \\frac{g_2}{\\sqrt2} \\frac{c_k}{L} \\lambda_i^2$ with $c_2 = 2\\sqrt2$, $c_k = 0$ for odd k.

        Raises:
            ValueError: for links of a degree above 2 where k > 1, for which no closed form is at hand.
        """
        if self.k > 1 and bool((self.link[3:] != 0).any()):
            raise ValueError(f"expected a link of degree at most 2 for the closed form, got {len(self.link) - 1}")
        linear = self.link[1] * self.signs / math.sqrt(self.L)
        if len(self.link) < 3 or (self.k == 1 and self.L == 1):
            return linear
        return linear + self.link[2] / math.sqrt(2) * self._square() / self.L * self.signs.square()

    def projection_degree_k(self, x: Tensor) -> Tensor:
        """The part of h of degree k, $P_k h(x)$, in closed form, `[n]`.

        Raises:
            ValueError: where no closed form is at hand; see `coefficients`.
        """
        part = self.features(x) @ self.coefficients().to(x)
        if self.family == "sum_of_monomials" and self.k % 2 == 0 and len(self.link) > 2:
            z = (self._inputs(x) @ self.axes.to(x).T)[:, : self.L * self.k].unflatten(1, (self.L, self.k))
            # The square of a monomial is the product of 1 + (z^2 - 1): the terms with k / 2 factors are of degree k.
            chosen = _elementary(z.square() - 1, self.k // 2)
            part = part + self.link[2].to(x) / math.sqrt(2) / self.L * (chosen @ self.signs.square().to(x))
        return part

    def recovery_limit(self) -> float:
        """Correlation of $P_k h$ with p: what the first stage tends to with ever more samples, for this number of terms.

        For $|\\lambda_i| = 1$, $\\sum \\lambda_i = 0$ and k = 2 it is $g_1/\\sqrt{g_1^2 + 4 g_2^2/L}$.
        """
        a, weights = self.coefficients(), self.signs / math.sqrt(self.L)
        power = float(a.square().sum())
        if self.family == "sum_of_monomials" and self.k % 2 == 0 and len(self.link) > 2:
            terms = math.comb(self.k, self.k // 2) * 2 ** (self.k // 2)
            power += float(self.link[2] ** 2 / 2 / self.L**2 * self.signs.pow(4).sum() * terms)
        return float(a @ weights) / math.sqrt(power) if power else 0.0

    def _inputs(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected inputs as a tensor [n, {self.d}], got {type(x).__name__}")
        if x.dim() != 2 or x.shape[1] != self.d or not x.is_floating_point():
            raise ValueError(f"expected inputs [n, {self.d}] of a floating type, got {x.dtype} {tuple(x.shape)}")
        return x


def _elementary(values: Tensor, order: int) -> Tensor:
    """Elementary symmetric polynomial of an order over the last dimension."""
    sums = [torch.ones_like(values[..., 0])] + [torch.zeros_like(values[..., 0])] * order
    for value in values.unbind(-1):
        sums = [sums[0]] + [sums[j] + value * sums[j - 1] for j in range(1, order + 1)]
    return sums[order]
