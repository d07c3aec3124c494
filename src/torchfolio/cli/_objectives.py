"""Objectives and networks that the settings of a training name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    from torch import nn

    from torchfolio.engine import Objective

T = TypeVar("T")


def find_objective(name: str) -> Callable[..., Objective]:
    """The objective that a paper offers, or one by its import path.

    Raises:
        TorchfolioError: if there is no such objective.
    """
    from torchfolio import catalog
    from torchfolio.engine import Objective

    if ":" not in name:
        return catalog.offered(name, "objective")
    return class_at(name, Objective, "objective")


def class_at(path: str, base: type[T], what: str) -> type[T]:
    """The class at an import path, `package.module:name`.

    Args:
        path: import path.
        base: class of `torchfolio.engine` that it must be a kind of.
        what: words for it in errors.

    Raises:
        TorchfolioError: if it cannot be imported, or is none.
    """
    import importlib

    module, _, attribute = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise TorchfolioError(f"cannot import the {what} {path}: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise TorchfolioError(f"{path} is not a class of torchfolio.engine.{base.__name__}")
    return kind


def settings_by_name(
    names: Sequence[str], pairs: Sequence[str], words: tuple[str, str, str] = ("--add", "--add-set", "objective")
) -> dict[str, list[str]]:
    """The `key=value` pairs of every one of several, by its name; where there is more than one, `name.key=value`.

    Args:
        names: objectives, or whatever `words` says.
        pairs: settings as they were given.
        words: options that name them and set them, and what they are.

    Raises:
        typer.BadParameter: if a pair belongs to none of them, or one is named twice.
    """
    naming, setting, what = words
    own: dict[str, list[str]] = {name: [] for name in names}
    if len(own) < len(names):
        raise typer.BadParameter(f"expected every {what} once", param_hint=naming)
    for pair in pairs:
        name = next((n for n in names if pair.startswith(f"{n}.")), names[0] if len(names) == 1 else None)
        if name is None:
            expected = f"{names[0]}.key=value" if names else f"{naming} before it"
            raise typer.BadParameter(f"expected {expected}, got {pair!r}", param_hint=setting)
        own[name].append(pair.removeprefix(f"{name}."))
    return own


def named_networks(factory: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings that name a bundle: text for a parameter whose annotation speaks of `nn.Module`."""
    takes = inspect.signature(factory).parameters
    wanted = {name for name, p in takes.items() if "nn.Module" in str(p.annotation)}
    return {name: value for name, value in settings.items() if name in wanted and isinstance(value, str)}


def renormalized(
    model: nn.Module, data: tuple[Sequence[float], Sequence[float]], own: tuple[Sequence[float], Sequence[float]]
) -> nn.Module:
    """A network on data that were normalised by other constants than its own.

    Args:
        model: network, in evaluation mode.
        data: mean and standard deviation by which the data are normalised; empty where they are not.
        own: those of the network.
    """
    import torch
    from torch import nn

    if list(data[0]) == list(own[0]) and list(data[1]) == list(own[1]):
        return model
    (mean, std), (own_mean, own_std) = (
        (torch.tensor(m or (0.0,)), torch.tensor(s or (1.0,))) for m, s in ((list(a), list(b)) for a, b in (data, own))
    )
    scale, shift = std / own_std, (mean - own_mean) / own_std

    class Renormalized(nn.Module):
        """`model` after a change of constants."""

        scale: torch.Tensor
        shift: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("scale", scale)
            self.register_buffer("shift", shift)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shape = (1, -1, *[1] * (x.dim() - 2))
            return self.model(x * self.scale.view(shape) + self.shift.view(shape))

    return Renormalized().eval()
