"""Networks that fit a data set: a user's factory, with the arguments that the data decide filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from torchfolio.data import DataSplits

__all__ = ["fitting_network", "fitting_recipe", "importable", "network_recipe"]


def fitting_network(model: str, splits: DataSplits) -> nn.Module:
    """A network with random weights, drawn by the global generator, that fits a data set.

    Args:
        model: reference network or import path, `package.module:factory`.
        splits: data.

    Raises:
        BundleError: if it cannot be imported or built.
    """
    from torchfolio.bundle import build

    path, arguments = network_recipe(model, {}, splits)
    return build(path, arguments, allow=[path])


def network_recipe(model: str, settings: Mapping[str, Any], splits: DataSplits) -> tuple[str, dict[str, Any]]:
    """Import path and arguments of a network that fits a data set.

    See `fitting_recipe`.
    """
    outputs = len(splits.classes) or (splits.train.tensors[1].shape[1] if splits.train.tensors[1].dim() > 1 else 1)
    known = {"vocab_size": len(splits.vocabulary)} if splits.vocabulary else {}
    return fitting_recipe(model, settings, splits.shape, outputs, known)


def fitting_recipe(
    model: str, settings: Mapping[str, Any], shape: Sequence[int], outputs: int, more: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Import path and arguments of a network for inputs of a shape, without the batch, and a number of outputs.

    What the factory takes of `num_classes`, `out_features`, `in_channels`, `in_features`, `image_size` and, for sets of
    text, `vocab_size` is filled in, unless it is set.
    """
    import inspect
    import math

    from torchfolio import models
    from torchfolio.bundle import resolve

    path = importable([model])[0] if ":" in model else models.spec(model)
    factory = resolve(path, allow=[path])
    known = {"num_classes": outputs, "out_features": outputs, "in_features": math.prod(shape)}
    if shape:
        known |= {"in_channels": shape[0], "image_size": shape[-1], "shape": tuple(shape)}
    parameters = _parameters(factory, inspect.signature(factory))
    return path, {**{k: v for k, v in {**known, **(more or {})}.items() if k in parameters}, **settings}


def _parameters(factory: Callable[..., nn.Module], signature: Any) -> set[str]:
    """Names that a factory takes; one that passes `**kwargs` on takes those of the class it returns."""
    import inspect
    import typing

    names = {n for n, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()) and not inspect.isclass(factory):
        product = typing.get_type_hints(factory).get("return")
        if inspect.isclass(product):
            names |= set(inspect.signature(product).parameters)
    return names


def importable(paths: list[str]) -> list[str]:
    """Let import paths that the user names be found in the working directory too."""
    import os
    import sys

    if paths and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return paths
