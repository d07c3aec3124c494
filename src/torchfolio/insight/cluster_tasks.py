"""Toy tasks of a few clusters, with a dial for how far the inputs hint at the labels.

Random clusters, an XOR that is more or less separable, and inputs whose kernel has exactly the alignment with the labels'
that is asked for.

Reference:
    Alleman, Lindsey, Fusi, Task structure and nonlinearity jointly determine learned representational geometry, ICLR
    2024 (arXiv 2401.13558).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchfolio.checks import at_least, between, finite, whole
from torchfolio.measure import cka_from_kernels
from torchfolio.measure.similarity import centred_kernel
from torchfolio.shown import Shown

__all__ = ["ClusterTask", "aligned_kernel", "kernel_to_inputs", "random_clusters", "separable_xor"]


@dataclass(frozen=True, repr=False)
class ClusterTask(Shown):
    """Clusters around means, each with labels.

    Attributes:
        means: $x_\\mu$, `[P, D]`, float64.
        labels: 0 or 1, `[P, O]`, float64.
        noise: standard deviation of the samples about their mean.
    """

    means: Tensor
    labels: Tensor
    noise: float

    def sample(
        self, n: int, *, noise: float | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs `[n, D]`, labels `[n, O]` and conditions `[n]`; every condition equally often, up to one.

        Args:
            n: number of samples.
            noise: noise in place of the task's own.
            generator: source of the draws.
        """
        whole("n", n, 1)
        conditions = torch.arange(n) % len(self.means)
        scale = self.noise if noise is None else at_least("noise", noise, 0)
        x = self.means[conditions]
        x = x + scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x, self.labels[conditions], conditions

    @property
    def kernels(self) -> tuple[Tensor, Tensor]:
        """Kernels of the conditions' inputs and labels, `[P, P]` each."""
        return self.means @ self.means.T, (2 * self.labels - 1) @ (2 * self.labels - 1).T

    @property
    def alignment(self) -> float:
        """Centred alignment of the two kernels."""
        return float(cka_from_kernels(*self.kernels))


def random_clusters(
    P: int = 4, D: int = 100, noise: float = 0.1, *, generator: torch.Generator | None = None
) -> ClusterTask:
    """Clusters at random places, with a random balanced label: inputs without structure.

    Args:
        P: number of clusters, even.
        D: dimension of the inputs.
        noise: standard deviation about the means.
        generator: source of the draws.
    """
    if whole("P", P, 2) % 2:
        raise ValueError(f"expected an even number of clusters, for a balanced label, got {P}")
    means = torch.randn(P, whole("D", D, 1), generator=generator, dtype=torch.float64)
    labels = torch.zeros(P, 1, dtype=torch.float64)
    labels[torch.randperm(P, generator=generator)[: P // 2]] = 1
    return ClusterTask(means - means.mean(0), labels, at_least("noise", noise, 0))


def separable_xor(
    D: int = 100, epsilon: float = 0.0, noise: float = 0.1, *, generator: torch.Generator | None = None
) -> ClusterTask:
    """XOR of two bits, whose product is an input, too: $x = \\sqrt{D/3}\\,(s_1 e_1 + s_2 e_2 + \\epsilon s_1 s_2 e_3)$.

    The alignment of inputs and label is $\\epsilon^2 / \\sqrt{2 + \\epsilon^4}$.

    Args:
        D: dimension of the inputs, at least 3.
        epsilon: linear separability in [0, 1].
        noise: standard deviation about the means.
        generator: source of the directions $e_k$, which have non-negative entries on disjoint thirds of the inputs.
    """
    between("epsilon", epsilon, 0, 1)
    directions = torch.zeros(3, whole("D", D, 3), dtype=torch.float64)
    for k, part in enumerate(torch.arange(D).tensor_split(3)):
        entries = torch.rand(len(part), generator=generator, dtype=torch.float64)
        directions[k, part] = entries / entries.norm()
    bits = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    product = bits.prod(1, keepdim=True)
    means = math.sqrt(D / 3) * torch.cat([bits, epsilon * product], 1) @ directions
    return ClusterTask(means, (1 - product) / 2, at_least("noise", noise, 0))


def aligned_kernel(
    K_y: Tensor,
    alignment: float,
    *,
    max_rank: int | None = None,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random centred kernel of inputs with exactly the alignment that is asked for.

    A random kernel is moved along a segment, towards the labels' kernel or towards a random one orthogonal to it, to the
    point where the alignment is right (a root of a quadratic). Both ends are positive semidefinite, and so is the point.

    Args:
        K_y: kernel of the labels `[P, P]`.
        alignment: c in [0, 1].
        max_rank: maximum rank of the two random kernels; P - 1 by default.
        scale: the trace is `scale` times P.
        generator: source of the draws.

    Returns:
        The kernel, float64 `[P, P]`.

    Raises:
        ValueError: if $K_y$ is no centrable positive semidefinite kernel, or the alignment cannot be reached, with the
            bound.
    """
    between("alignment", alignment, 0, 1)
    K_y = finite("K_y", K_y).double()
    P = len(K_y)
    if K_y.shape != (P, P) or not torch.allclose(K_y, K_y.T) or torch.linalg.eigvalsh(K_y)[0] < -1e-8 * K_y.norm():
        raise ValueError(f"expected a symmetric positive semidefinite kernel, got shape {tuple(K_y.shape)}")
    centred = centred_kernel(K_y)
    if centred.norm() <= 1e-12 * K_y.norm():
        raise ValueError("expected labels that differ between conditions, got a constant kernel")
    y = centred / centred.norm()
    rank = P - 1 if max_rank is None else whole("max_rank", max_rank, 1, P - 1)
    ones = torch.full((P, 1), P**-0.5, dtype=torch.float64)
    start = _random_kernel(ones, P, rank, generator)
    if float(cka_from_kernels(start, K_y)) > alignment:
        values, vectors = torch.linalg.eigh(centred)
        held = torch.cat([ones, vectors[:, values > 1e-9 * values[-1]]], 1)
        if held.shape[1] >= P:
            raise ValueError(
                f"the alignment {alignment} cannot be reached: labels of rank {P - 1} leave no direction free; the least "
                f"alignment with a kernel of trace P is {float(y.trace()) / math.sqrt(P - 1):.3f}"
            )
        end = _random_kernel(held, P, min(rank, P - held.shape[1]), generator)
    else:
        end = centred * (P / centred.trace())
    kernel = _on_segment(start, end, y, alignment)
    return kernel * (scale * P / kernel.trace())


def _random_kernel(held: Tensor, P: int, rank: int, generator: torch.Generator | None) -> Tensor:
    """Haar eigenvectors orthogonal to some directions, Dirichlet eigenvalues, trace P."""
    draws = torch.randn(P, rank, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(held)[0]
    vectors = torch.linalg.qr(draws - basis @ (basis.T @ draws))[0]
    values = -torch.rand(rank, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    return (vectors * (P * values / values.sum())) @ vectors.T


def _on_segment(a: Tensor, b: Tensor, y: Tensor, c: float) -> Tensor:
    """The kernel between two whose alignment with y (of norm 1) is c."""
    a1, b1 = float((a * y).sum()), float((b * y).sum())
    a2, b2, m = float((a * a).sum()), float((b * b).sum()), float((a * b).sum())
    # ((1-t) a1 + t b1)^2 = c^2 ((1-t)^2 a2 + 2 t (1-t) m + t^2 b2), as a polynomial in t.
    d1 = b1 - a1
    quadratic = d1**2 - c**2 * (a2 - 2 * m + b2)
    linear = 2 * a1 * d1 - c**2 * (2 * m - 2 * a2)
    constant = a1**2 - c**2 * a2
    if abs(quadratic) < 1e-14:
        roots = [-constant / linear]
    else:
        root = math.sqrt(max(linear**2 - 4 * quadratic * constant, 0.0))
        roots = [(-linear - root) / (2 * quadratic), (-linear + root) / (2 * quadratic)]
    t = min(roots, key=lambda t: max(-t, t - 1, 0.0))
    t = min(max(t, 0.0), 1.0)
    return (1 - t) * a + t * b


def kernel_to_inputs(K: Tensor, D: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Inputs `[P, D]` with a kernel, by a random isometry of its eigenvectors.

    Raises:
        ValueError: if the kernel is not positive semidefinite, or of a rank above D.
    """
    values, vectors = torch.linalg.eigh(finite("K", K).double())
    if values[0] < -1e-8 * values[-1].clamp_min(1e-12):
        raise ValueError(f"expected a positive semidefinite kernel, got the eigenvalue {float(values[0]):.3g}")
    positive = values > 1e-10 * values[-1]
    rank = int(positive.sum())
    if rank > D:
        raise ValueError(f"expected D of at least the kernel's rank {rank}, got {D}")
    isometry = torch.linalg.qr(torch.randn(D, rank, generator=generator, dtype=torch.float64))[0]
    return (vectors[:, positive] * values[positive].sqrt()) @ isometry.T
