"""The base of all triggers of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Trigger", "check_unit"]


class Trigger(nn.Module, ABC):
    """What all triggers of images share; subclasses say in `change` what they do.

    Call it as `trigger(x, index=index)`: `x` is `[N, C, H, W]` in [0, 1] and `index` `[N]` numbers the samples, for
    triggers that draw something for each (without it they count from 0).
    """

    def forward(self, x: Tensor, *, index: Tensor | None = None) -> Tensor:
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"expected float images [N, C, H, W], got {x.dtype} of shape {tuple(x.shape)}")
        self.check_shape(x.shape[1:])
        if index is None:
            index = torch.arange(len(x), device=x.device)
        elif index.shape != (len(x),):
            raise ValueError(f"expected an index for each of {len(x)} images, got shape {tuple(index.shape)}")
        return self.change(x, index.to(x.device)).clamp(0, 1)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError on images `[C, H, W]` that the trigger is not made for."""
        expected = self.image_shape()
        if expected is not None and not _fits(shape, expected):
            raise ValueError(f"expected images of shape {tuple(expected)}, got {tuple(shape)}")

    @abstractmethod
    def change(self, x: Tensor, index: Tensor) -> Tensor:
        """The triggered images, before they are clamped."""

    def image_shape(self) -> Sequence[int] | None:
        """`[C, H, W]` of the images that the trigger is made for, 1 for any number of channels; `None` for any."""
        return None

    def settings(self) -> dict[str, Any]:
        """Constructor arguments other than tensors."""
        return {}

    def spec(self) -> dict[str, Any]:
        """`kind`, `settings` (JSON values) and `tensors`: all that `from_spec` needs."""
        tensors = {name: value.detach().clone() for name, value in self.state_dict().items()}
        return {"kind": type(self).__name__, "settings": self.settings(), "tensors": tensors}

    @staticmethod
    def from_spec(spec: Mapping[str, Any], **modules: nn.Module) -> Trigger:
        """A trigger from what `spec` gave.

        Args:
            spec: specification of the trigger.
            **modules: arguments that are modules (`net` of a `GeneratorTrigger`); their weights come from the spec.

        Raises:
            ValueError: if the kind is unknown.
        """
        kinds = {kind.__name__: kind for kind in Trigger.__subclasses__()}
        if spec["kind"] not in kinds:
            raise ValueError(f"expected a trigger of the kinds {', '.join(sorted(kinds))}, got {spec['kind']!r}")
        return kinds[spec["kind"]]._build(spec["settings"], dict(spec["tensors"]), modules)

    @classmethod
    def _build(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
    ) -> Trigger:
        return cls(**tensors, **settings)  # pyright: ignore[reportCallIssue]


def _fits(got: Sequence[int], expected: Sequence[int]) -> bool:
    return (expected[0] in (1, got[0])) and tuple(got[1:]) == tuple(expected[1:])


def check_unit(name: str, value: Tensor) -> None:
    """Refuse values outside [0, 1].

    Raises:
        ValueError: with the name and the smallest and largest value.
    """
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"expected {name} in [0, 1], got {float(value.min()):g} to {float(value.max()):g}")
