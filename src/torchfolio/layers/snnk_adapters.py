"""Adapters of a trained network that are layers of random features, which have few parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.layers.snnk_layer import SNNK, Kind, Where, seeds_from
from torchfolio.models import replace_layers

__all__ = ["AdaptedLayer", "SNNKAdapter", "add_adapters"]


class SNNKAdapter(nn.Module):
    """An adapter with few parameters, the identity at first: $x + v \\odot \\mathrm{SNNK}(x)$.

    With a bottleneck k it is $x + V\\,\\mathrm{SNNK}(x)$, where SNNK goes to k features and V back to d. v and V start
    as 0, so that in the first step they alone have a gradient; their learning rate must not be below that of A.

    Args:
        d: size of an input.
        m: number of random features; 8 or 16 are usual.
        bottleneck: k, or `None` for none.
        features: random features, see `SNNK`.
        radius: norm that inputs of the features are brought to.
        seed: seed of the features; drawn from torch's global generator by default.

    Shapes:
        `[..., d]` to `[..., d]`; $dm + d$ parameters, or $km + kd$ with a bottleneck.
    """

    def __init__(
        self,
        d: int,
        m: int,
        bottleneck: int | None = None,
        features: Kind = "relu",
        *,
        radius: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        width = d if bottleneck is None else whole("bottleneck", bottleneck, 1)
        self.kernel = SNNK(d, width, m, features, bias=False, radius=radius, seed=seed)
        self.scale = nn.Parameter(torch.zeros(d) if bottleneck is None else torch.zeros(d, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.kernel(x)
        return x + (y * self.scale if self.scale.dim() == 1 else nn.functional.linear(y, self.scale))


class AdaptedLayer(nn.Module):
    """A layer and an adapter of its output, or of the first tensor of a tuple; other attributes are the layer's."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("layer", "adapter"):  # not there yet, as in unpickling
                raise
            return getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.adapter(output[0]), *output[1:])
        return self.adapter(output)


def add_adapters(
    model: nn.Module,
    where: Where,
    m: int,
    *,
    dim: int | None = None,
    bottleneck: int | None = None,
    features: Kind = "relu",
    radius: float | None = None,
    train: Where | None = None,
    seed: int = 0,
) -> nn.Module:
    """Put adapters behind layers of a network in place, and freeze everything else. Outputs stay as they are.

    In a transformer they belong behind the linear layers that end the attention and the perceptron, before the residual
    sum: in BERT `lambda name, layer: name.endswith("output.dense")`.

    Args:
        model: trained network.
        where: `(name, module) -> bool`, which layers.
        m: number of random features.
        dim: width of the layers' outputs; by default what they say themselves, as `nn.Linear` and norms do.
        bottleneck: width of the bottleneck, see `SNNKAdapter`.
        features: random features, see `SNNK`.
        radius: radius, see `SNNK`.
        train: `(name, module) -> bool`, modules that are trained as well, such as the head or all `nn.LayerNorm`.
        seed: seed of the features, which differ from adapter to adapter.

    Returns:
        The network; the parameters that are trained have `requires_grad`. Names of wrapped layers get `.layer` added.

    Raises:
        ValueError: if no layer matches, a layer's width is unknown, or nothing matches `train`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> net = add_adapters(net, lambda name, layer: name == "0", m=4)
    """
    kept = (
        []
        if train is None
        else [p for n, layer in model.named_modules() if train(n, layer) for p in layer.parameters()]
    )
    if train is not None and not kept:
        raise ValueError("expected train to match modules with parameters, got none")
    seeds = seeds_from(seed)
    added: list[nn.Module] = []

    def adapted(layer: nn.Module) -> nn.Module:
        adapter = SNNKAdapter(
            _width(layer) if dim is None else dim, m, bottleneck, features, radius=radius, seed=next(seeds)
        )
        added.append(adapter)
        return AdaptedLayer(layer, adapter)

    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        model = replace_layers(model, where, adapted)
    except Exception:
        for p, flag in flags:
            p.requires_grad_(flag)
        raise
    for p in [*kept, *(p for adapter in added for p in adapter.parameters())]:
        p.requires_grad_(True)
    return model


def _width(layer: nn.Module) -> int:
    for name in ("out_features", "nf"):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    shape = getattr(layer, "normalized_shape", None)
    if shape is not None:
        return int(shape[-1])
    raise ValueError(
        f"expected dim for layers that do not say how wide their output is, such as {type(layer).__name__}, got None"
    )
