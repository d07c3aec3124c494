"""The multilayer perceptron."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from torchfolio.models.chain import remembered
from torchfolio.models.init import initialize

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "identity": nn.Identity,
}


def activation_layer(name: str) -> nn.Module:
    """An activation by its name.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"expected activation to be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


@remembered
class MLP(nn.Sequential):
    """A multilayer perceptron: `layer1`, …, `layerL`, `head`.

    Args:
        in_features: width of the input; inputs with more axes are flattened.
        out_features: width of the output.
        hidden: widths of the hidden layers; may be empty.
        activation: name in `ACTIVATIONS`.
        norm: `"batch"`, `"layer"` or `None`, between the linear map and the activation.
        dropout: probability of dropping a hidden unit.
        bias: whether linear maps have a bias.
        init: name of an initialisation (see `initialize`), or `None` for PyTorch's default.

    Shapes:
        `[B, ...]` with `in_features` numbers each, to `[B, out_features]`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (128,),
        activation: str = "relu",
        norm: str | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        init: str | None = None,
    ) -> None:
        if norm not in (None, "batch", "layer"):
            raise ValueError(f"expected norm to be 'batch', 'layer' or None, got {norm!r}")
        children: OrderedDict[str, nn.Module] = OrderedDict()
        width = in_features
        for k, units in enumerate(hidden, start=1):
            parts: list[nn.Module] = [nn.Flatten()] if k == 1 else []
            parts.append(nn.Linear(width, units, bias=bias))
            if norm is not None:
                parts.append(nn.BatchNorm1d(units) if norm == "batch" else nn.LayerNorm(units))
            parts.append(activation_layer(activation))
            if dropout:
                parts.append(nn.Dropout(dropout))
            children[f"layer{k}"] = nn.Sequential(*parts)
            width = units
        head = nn.Linear(width, out_features, bias=bias)
        children["head"] = head if hidden else nn.Sequential(nn.Flatten(), head)
        super().__init__(children)
        if init is not None:
            initialize(self, init)
