"""Second derivatives without the Hessian: products, extreme eigenvalues, the trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchfolio.measure.batches import Data
from torchfolio.measure.hessian import Hessian, flatten, hvp, unflatten
from torchfolio.measure.krylov import Eigen, Which, lanczos
from torchfolio.measure.trace_estimates import Trace, hessian_traces, hutchinson_trace

__all__ = [
    "Eigen", "Hessian", "Trace", "Which", "flatten", "hessian_eigenvalues", "hessian_traces", "hutchinson_trace", "hvp", "lanczos",
    "unflatten",
]  # fmt: skip


def hessian_eigenvalues(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Data,
    k: int = 1,
    *,
    batch_size: int | None = None,
    which: Which = "largest",
    iterations: int | None = None,
    tolerance: float = 1e-3,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Eigen:
    """Extreme eigenvalues of the Hessian of the mean loss; the largest is the sharpness.

    Args:
        model: network, see `Hessian`.
        loss: loss of outputs and targets, see `Hessian`.
        data: data set, see `Hessian`.
        k: number of eigenvalues.
        batch_size: number of examples in a batch, see `Hessian`.
        which: end of the spectrum, see `lanczos`.
        iterations: maximum number of products, see `lanczos`.
        tolerance: relative tolerance, see `lanczos`.
        start: `vectors` of an earlier measurement: along training this saves most of the products.
        generator: source of the start, see `lanczos`.

    Returns:
        The eigenpairs; `Hessian(model, loss, data).split(vector)` gives a vector by parameter name.
    """
    hessian = Hessian(model, loss, data, batch_size=batch_size)
    return lanczos(
        hessian,
        hessian.n,
        k,
        which=which,
        iterations=iterations,
        tolerance=tolerance,
        start=start,
        generator=generator,
        device=hessian.device,
        dtype=hessian.dtype,
    )
