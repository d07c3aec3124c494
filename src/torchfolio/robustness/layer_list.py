"""A network as a list of affine maps, activations and pools, with the places where two paths part and join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.models.resnet import BasicBlock, Subsample
from torchfolio.robustness.affine_layers import Affine, ElementwiseAffine, Residual
from torchfolio.robustness.pooling_bounds import MaxPool
from torchfolio.shown import Shown

__all__ = ["AFFINE", "KNOWN", "Layers", "Mark", "Part", "flat_layers", "is_exactly", "joins", "mixes"]

KNOWN = (
    "Linear", "Conv2d", "ReLU", "Tanh", "Sigmoid", "AvgPool2d", "MaxPool2d", "Flatten", "Unflatten", "Identity", "Dropout",
    "BatchNorm1d", "BatchNorm2d", "AdaptiveAvgPool2d", "ElementwiseAffine", "Residual", "BasicBlock",
)  # fmt: skip
"""Layers that bounds are known of."""


@dataclass(frozen=True)
class Mark:
    """Where a sum of two paths begins (`"fork"`), passes from the shortcut to the body (`"turn"`), and ends (`"join"`).

    Forward, and backward in the other order, a stack holds what waits for the other path.

    Attributes:
        kind: `"fork"`, `"turn"` or `"join"`.
        fork: place of the fork among the parts.
    """

    kind: str
    fork: int


class Layers(Shown):
    """A network as a list of affine maps and activations, with the shape of one input of each.

    Args:
        model: a (nested) `nn.Sequential` or a single layer.
        shape: shape of one input.

    Raises:
        TypeError: on a layer without bounds; names those that have.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int]) -> None:
        self.parts: list[Part] = []
        self.shapes: list[tuple[int, ...]] = []
        weight = next((p for p in model.parameters()), torch.empty(0))
        with torch.no_grad():
            x = self._append(model, torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device))
        self.outputs = tuple(x.shape[1:])
        self.dtype, self.device = x.dtype, x.device

    def _append(self, model: nn.Module, x: Tensor) -> Tensor:
        """Add a network's parts, and return its output."""
        for layer in flat_layers(model):
            if isinstance(layer, Residual) and type(layer).forward is Residual.forward:
                fork = len(self.parts)
                self._mark("fork", fork, x)
                shortcut = self._append(layer.shortcut, x)
                self._mark("turn", fork, x)
                body = self._append(layer.body, x)
                if body.shape != shortcut.shape:
                    raise ValueError(
                        f"expected paths of one shape, got {tuple(body.shape)} and {tuple(shortcut.shape)}"
                    )
                self._mark("join", fork, body)
                x = body + shortcut
                continue
            part = _part(layer)
            if part is None:
                continue
            if isinstance(part, MaxPool):
                part.checked(tuple(x.shape[2:]))
            self.parts.append(part)
            self.shapes.append(tuple(x.shape[1:]))
            x = part.forward(x) if isinstance(part, Affine | MaxPool) else x
        return x

    def _mark(self, kind: str, fork: int, x: Tensor) -> None:
        self.parts.append(Mark(kind, fork))
        self.shapes.append(tuple(x.shape[1:]))


Part = Affine | MaxPool | Mark | str


AFFINE = (
    nn.Linear, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Unflatten, nn.BatchNorm1d, nn.BatchNorm2d, ElementwiseAffine,
    Subsample,
)  # fmt: skip


def is_exactly(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is of one of the kinds and computes what that kind does, which a subclass may not."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def flat_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of nested `nn.Sequential`s in order, a `BasicBlock` as a `Residual` and its last activation."""
    if is_exactly(model, (nn.Sequential,)):
        assert isinstance(model, nn.Sequential)
        return [layer for child in model for layer in flat_layers(child)]
    if is_exactly(model, (BasicBlock,)):
        assert isinstance(model, BasicBlock)
        body = nn.Sequential(model.conv1, model.bn1, model.relu1, model.conv2, model.bn2)
        return [Residual(body, model.shortcut), model.relu2]
    return [model]


def _part(layer: nn.Module) -> Affine | MaxPool | str | None:
    """A layer as a part of `Layers`; `None` for one that changes nothing."""
    if is_exactly(layer, (nn.Identity, nn.Dropout)):
        return None
    activations = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
    if type(layer) in activations:
        return activations[type(layer)]
    if is_exactly(layer, AFFINE):
        if isinstance(layer, nn.Flatten) and layer.start_dim != 1:
            raise TypeError("interval bounds need nn.Flatten(1), which keeps the batch axis")
        if isinstance(layer, nn.Unflatten) and layer.dim in (0, "N"):
            raise TypeError("interval bounds need an nn.Unflatten that keeps the batch axis")
        return Affine(layer)
    if is_exactly(layer, (nn.MaxPool2d,)):
        assert isinstance(layer, nn.MaxPool2d)
        return MaxPool(layer)
    raise TypeError(f"interval bounds for {type(layer).__name__} are not known; known: {', '.join(KNOWN)}")


def joins(part: Part) -> bool:
    """Whether a part is the end of a sum of two paths."""
    return isinstance(part, Mark) and part.kind == "join"


def mixes(part: Part) -> bool:
    """Whether an output of a part depends on several of its inputs."""
    return joins(part) or (isinstance(part, Affine) and part.mixes)
