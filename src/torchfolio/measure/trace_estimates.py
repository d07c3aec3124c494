"""Traces of matrices that are known by their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchfolio.measure.batches import Data
from torchfolio.measure.hessian import Hessian, Product


class Trace(NamedTuple):
    """An estimated trace.

    Attributes:
        value: estimate.
        standard_error: standard error of the estimate; zero for a diagonal matrix.
        samples: number of random vectors that it took.
    """

    value: float
    standard_error: float
    samples: int


def hutchinson_trace(
    product: Product,
    n: int,
    *,
    samples: int = 64,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Trace:
    """Trace of a matrix known by its products: $\\operatorname{tr} A = \\mathbb{E}[z^\\top A z]$ over random
    signs $z$.

    The variance of one sample is $2 \\sum_{i \\ne j} A_{ij}^2$ for a symmetric matrix. The matrix need not be
    symmetric: a Jacobian's trace, a divergence, is found the same way.

    Args:
        product: $v \\mapsto A v$ on vectors `[n]`.
        n: size of the matrix.
        samples: maximum number of random vectors.
        tolerance: standard error over the estimate at which to stop, after at least 8 samples.
        generator: source of the signs (on the CPU).
        device: device of the vectors.
        dtype: dtype of the vectors.

    Raises:
        ValueError: if there are fewer than 2 samples.

    Reference:
        Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", 1989.
    """
    like = torch.empty(n, device=device, dtype=dtype)
    draws = _hutchinson(lambda z: (z * product(z)).double().sum()[None], like, samples, tolerance, generator)
    return _trace(draws[:, 0])


def hessian_traces(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Data,
    *,
    batch_size: int | None = None,
    samples: int = 64,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Trace]:
    """Trace of every parameter's diagonal block of the Hessian of the mean loss, all from the same products.

    With $z = (z_1, …)$ over the parameters, $\\mathbb{E}[z_p^\\top (H z)_p] = \\operatorname{tr} H_{pp}$.
    Their sum is the trace of the Hessian.

    Args:
        model: network, see `Hessian`.
        loss: loss of outputs and targets, see `Hessian`.
        data: data set, see `Hessian`.
        batch_size: number of examples in a batch, see `Hessian`.
        samples: maximum number of random vectors.
        tolerance: standard error over the estimate, of every parameter, at which to stop.
        generator: source of the signs.

    Returns:
        The estimate by parameter name; divide by the parameter's `numel()` for the mean curvature.

    Reference:
        Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020.
    """
    hessian = Hessian(model, loss, data, batch_size=batch_size)

    def blocks(z: Tensor) -> Tensor:
        return torch.stack([t.double().sum() for t in hessian.split(z * hessian(z)).values()])

    like = torch.empty(hessian.n, device=hessian.device, dtype=hessian.dtype)
    draws = _hutchinson(blocks, like, samples, tolerance, generator)
    return {name: _trace(draws[:, i]) for i, name in enumerate(hessian.names)}


def _hutchinson(
    sample: Callable[[Tensor], Tensor],
    like: Tensor,
    samples: int,
    tolerance: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws `[samples, traces]` of one or several traces at once."""
    if samples < 2:
        raise ValueError(f"expected at least 2 samples, got {samples}")
    draws: list[Tensor] = []
    while len(draws) < samples:
        signs = torch.randint(2, like.shape, generator=generator) * 2 - 1
        draws.append(sample(signs.to(like)).cpu())
        if tolerance is not None and len(draws) >= 8:
            drawn = torch.stack(draws)
            error = drawn.std(0) / len(draws) ** 0.5
            if (error <= tolerance * drawn.mean(0).abs()).all():
                break
    return torch.stack(draws)


def _trace(draws: Tensor) -> Trace:
    return Trace(draws.mean().item(), draws.std().item() / len(draws) ** 0.5, len(draws))
