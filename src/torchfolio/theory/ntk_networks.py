"""Networks of finite width in the parametrisation whose limit is the normalised tangent kernel."""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn

from torchfolio import checks
from torchfolio.theory.dual_activations import Activation, dual_activation
from torchfolio.theory.dual_base import DualActivation

__all__ = ["NTKLinear", "finite_network"]


class NTKLinear(nn.Linear):
    """Linear layer without bias whose weights are standard normal, divided outside of them.

    Args:
        in_features: length of inputs.
        out_features: length of outputs.
        scale: factor on $Wx$.
    """

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class _Elementwise(nn.Module):
    def __init__(self, dual: DualActivation) -> None:
        super().__init__()
        self.dual = dual

    def forward(self, z: Tensor) -> Tensor:
        return self.dual.function(z)


def finite_network(d_in: int, width: int, depth: int, activation: Activation, outputs: int = 1) -> nn.Sequential:
    """A network of finite width in the parametrisation in which `ntk(..., normalized=True)` is its limit.

    Weights are standard normal, drawn by torch's global generator. Layers are divided by $\\sqrt{\\text{width}}$ and the
    activation's root mean square, the first one not: inputs have norm 1.

    Args:
        d_in: length of inputs.
        width: width of the hidden layers.
        depth: number of hidden layers.
        activation: name, module (copied to every layer), function or dual.
        outputs: number of outputs.

    Shapes:
        `[n, d_in]` to `[n, outputs]`.

    Example:
        >>> import torch
        >>> finite_network(3, 100, 1, "erf")(torch.eye(3)).shape
        torch.Size([3, 1])
    """
    for name, value in (("d_in", d_in), ("width", width), ("depth", depth), ("outputs", outputs)):
        checks.whole(name, value, 1)
    dual = dual_activation(activation)
    layers: list[nn.Module] = [NTKLinear(d_in, width, 1.0)]
    for layer in range(depth):
        layers.append(copy.deepcopy(activation) if isinstance(activation, nn.Module) else _Elementwise(dual))
        out = outputs if layer == depth - 1 else width
        layers.append(NTKLinear(width, out, 1 / math.sqrt(width * dual.second_moment)))
    return nn.Sequential(*layers)
