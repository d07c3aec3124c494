"""Networks of PyTorch's own layers as plain values, and back: what a bundle can hold of a live `nn.Sequential`."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

__all__ = ["Chain", "described", "recipe_of", "remembered"]

T = TypeVar("T", bound=type[nn.Module])

LAYERS: frozenset[str] = frozenset([
    "Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "GroupNorm", "RMSNorm", "InstanceNorm1d", "InstanceNorm2d",
    "Embedding", "Flatten", "Unflatten", "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "MaxPool1d",
    "MaxPool2d", "MaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "GELU",
    "SiLU", "Mish", "Tanh", "Sigmoid", "Hardtanh", "Hardswish", "Hardsigmoid", "Softplus", "Softmax", "LogSoftmax", "PReLU",
    "Upsample", "PixelShuffle", "ZeroPad2d", "ReflectionPad2d", "ReplicationPad2d",
])  # fmt: skip
"""Layers that only compute: none evaluates text, imports anything or opens a path."""

WORDS = frozenset(["zeros", "reflect", "replicate", "circular", "same", "valid", "none", "tanh", "nearest", "linear",
                   "bilinear", "bicubic", "trilinear", "area", "nearest-exact"])  # fmt: skip
LEFT_OUT = ("device", "dtype", "_weight", "_freeze", "inplace", "min_value", "max_value")  # the last are old names


class Chain(nn.Sequential):
    """An `nn.Sequential` from plain values.

    Args:
        layers: one for each child: its `kind`, a layer of PyTorch's such as `"Linear"` or `"Sequential"`, a `name` that
            defaults to its number, and the layer's arguments by name; of a `"Sequential"` its `layers`.

    Raises:
        ValueError: if a kind is not known, or an argument is no plain value of that kind.

    >>> Chain([{"kind": "Linear", "in_features": 3, "out_features": 2}, {"kind": "ReLU"}])
    Chain(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): ReLU()
    )
    """

    def __init__(self, layers: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(_children(layers))


def _children(layers: Any, depth: int = 0) -> OrderedDict[str, nn.Module]:
    if not isinstance(layers, list | tuple) or depth > 20:
        raise ValueError(f"expected a list of layers, at most 20 within one another, got {type(layers).__name__}")
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for k, layer in enumerate(layers):
        if not isinstance(layer, Mapping) or not isinstance(layer.get("kind"), str):
            raise ValueError(f"expected layer {k} to be a table with its kind, got {layer!r:.100}")
        name = layer.get("name", str(k))
        if not isinstance(name, str) or not name.replace("_", "a").isalnum() or name in children:
            raise ValueError(
                f"expected a name of its own for layer {k}, of letters, digits and underscores, got {name!r:.100}"
            )
        children[name] = _layer(layer["kind"], {n: v for n, v in layer.items() if n not in ("kind", "name")}, depth)
    return children


def _layer(kind: str, settings: Mapping[str, Any], depth: int) -> nn.Module:
    if kind == "Sequential":
        return nn.Sequential(_children(settings.get("layers"), depth + 1))
    if kind not in LAYERS:
        raise ValueError(f"expected a layer of PyTorch's that is known here, got {kind!r:.100}")
    for name, value in settings.items():
        if name not in _settings(kind) or not _is_plain(value):
            raise ValueError(f"{kind} cannot be built with {name!r:.100}={value!r:.100}")
    return getattr(nn, kind)(**{n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()})


@functools.cache
def _settings(kind: str) -> tuple[str, ...]:
    parameters = inspect.signature(getattr(nn, kind)).parameters.values()
    named = tuple(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD)
    return tuple(name for name in named if name not in LEFT_OUT)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 8 and all(isinstance(v, int) and abs(v) < 2**31 for v in value)
    if isinstance(value, str):
        return value in WORDS
    return value is None or (isinstance(value, bool | int | float) and abs(value) < 2**31)


def described(model: nn.Sequential) -> list[dict[str, Any]]:
    """The layers of an `nn.Sequential` as `Chain` takes them.

    Raises:
        ValueError: naming the first layer that is not one of PyTorch's own.
    """
    return [{**_described(name, child), "name": name} for name, child in model._modules.items() if child is not None]


def _described(name: str, layer: nn.Module) -> dict[str, Any]:
    kind = type(layer).__name__
    if type(layer) is nn.Sequential or type(layer) is Chain:
        return {"kind": "Sequential", "layers": described(layer)}
    if type(layer) is not getattr(nn, kind, None) or kind not in LAYERS:
        raise ValueError(f"{name!r} is a {kind}, which is none of PyTorch's plain layers")
    settings = {n: _setting(layer, n) for n in _settings(kind)}
    if odd := [n for n, v in settings.items() if not _is_plain(v)]:
        raise ValueError(f"{odd[0]}={settings[odd[0]]!r:.100} of {name!r} is no plain value")
    return {"kind": kind, **settings}


def _setting(layer: nn.Module, name: str) -> Any:
    """What a layer was built with; it keeps that under the same name, but for its bias and a few more."""
    if name == "bias":
        return layer.bias is not None
    if isinstance(layer, nn.PReLU) and name == "init":
        return 0.25
    value = getattr(layer, name)
    return list(value) if isinstance(value, tuple) else value


def remembered(cls: T) -> T:
    """Let the instances of a class know the arguments that they were built with, as `recipe_of` needs them."""
    build: Any = cls.__init__
    signature = inspect.signature(build)

    @functools.wraps(build)
    def remembering(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if type(self) is cls:
            arguments = dict(signature.bind(self, *args, **kwargs).arguments)
            arguments.pop(next(iter(signature.parameters)))
            self.__dict__["_arguments"] = {n: v for n, v in arguments.items() if v is not self}

    setattr(cls, "__init__", remembering)  # noqa: B010
    return cls


def recipe_of(model: nn.Module) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """What builds a network of the same form: a reference network's class, or `Chain`, and its arguments.

    Raises:
        ValueError: if that is not known.
    """
    if "_arguments" in vars(model):
        return type(model), dict(vars(model)["_arguments"])
    if type(model) in (nn.Sequential, Chain):
        assert isinstance(model, nn.Sequential)
        return Chain, {"layers": described(model)}
    raise ValueError(f"it is a {type(model).__name__}, neither a reference network nor an nn.Sequential")
