"""The tangent kernel of a finite network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["empirical_ntk"]


def empirical_ntk(model: nn.Module, x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """Tangent kernel of a finite network, $\\sum_\\theta \\partial_\\theta f(x) \\, \\partial_\\theta f(\\tilde x)$.

    Contracted a parameter at a time: the Jacobian of one lies in memory beside those of the others, their products do
    not.

    Args:
        model: network from `[n, ...]` to `[n]` or `[n, outputs]`.
        x1: inputs `[n, ...]`.
        x2: inputs `[m, ...]`; `x1` by default.

    Returns:
        Kernel `[n, m]`, or `[n, m, outputs, outputs]` for more than one output.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x[None],)).flatten()

    jacobian = torch.func.vmap(torch.func.jacrev(output), (None, 0))
    first = jacobian(parameters, x1)
    second = first if x2 is None else jacobian(parameters, x2)
    kernel = sum(torch.einsum("nop,mqp->nmoq", first[name].flatten(2), second[name].flatten(2)) for name in parameters)
    assert isinstance(kernel, Tensor)
    return kernel[..., 0, 0] if kernel.shape[-1] == 1 else kernel
