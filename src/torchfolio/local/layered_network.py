"""A network in sequential layers, with the shapes that flow between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchfolio.engine import blocks as split_blocks
from torchfolio.engine import layers as split_layers
from torchfolio.shown import Shown

Shape = tuple[int, ...]


@contextmanager
def like(model: nn.Module) -> Iterator[None]:
    """Build new modules on the device and in the dtype of a model."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with weight.device:
            yield
    finally:
        torch.set_default_dtype(dtype)


@dataclass(frozen=True, repr=False)
class Network(Shown):
    """A network in sequential layers, with the shapes that flow between them.

    Attributes:
        layers: hidden layers, first to last.
        head: network from the last hidden layer to the output.
        shapes: `shapes[l]` is the shape of layer l's output, without the batch.
        input_shape: shape of one input.
        classes: width of the output.
        groups: indices of the layers that form each block.
    """

    layers: tuple[nn.Module, ...]
    head: nn.Module
    shapes: tuple[Shape, ...]
    input_shape: Shape
    classes: int
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, blocks: int | Sequence[str] | None = None) -> Network:
        """Split a network and trace its shapes once.

        Args:
            model: network.
            x: one batch of inputs.
            blocks: blocks, see `LocalRule`.

        Raises:
            ValueError: if the network has no hidden layer, a layer returns something else than one tensor, or
                the output is not `[B, C]`.
        """
        if blocks is None or isinstance(blocks, int):
            parts = [layer for _, layer in split_layers(model, x)]
        else:
            parts = list(split_blocks(model, names=list(blocks), example=x))
        if len(parts) < 2:
            raise ValueError(f"a local rule needs at least a hidden layer and a head, got {len(parts)} layer(s)")
        *shapes, output = trace_shapes(parts, x)
        if len(output) != 1:
            got = ", ".join(map(str, output))
            raise ValueError(f"expected a network output of shape [batch, classes], got [batch, {got}]")
        for part, shape in zip(parts, shapes, strict=False):
            weights = [m for m in part.modules() if isinstance(m, nn.Conv1d | nn.Linear | nn.Conv2d | nn.RNNBase)]
            if len(shape) == 2 and weights and isinstance(weights[-1], nn.Conv1d):
                raise ValueError(
                    f"a layer of Conv1d gives features {list(shape)}, channels first, which local heads would read as "
                    "tokens [T, D]; use Conv2d on inputs [B, C, 1, L]"
                )
        hidden = len(parts) - 1
        groups = partition(range(hidden), blocks if isinstance(blocks, int) else hidden)
        return cls(tuple(parts[:-1]), parts[-1], tuple(shapes), tuple(x.shape[1:]), output[0], groups)

    @property
    def dims(self) -> list[int]:
        """Width of every hidden layer's output: channels of maps, features of tokens, units."""
        return [width(shape) for shape in self.shapes]

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of each group as one module; the last one ends in the head."""
        parts = [[self.layers[l] for l in group] for group in self.groups]
        parts[-1].append(self.head)
        return [part[0] if len(part) == 1 else nn.Sequential(*part) for part in parts]

    def merged(self) -> Network:
        """The same network with each group as one layer."""
        layers = [[self.layers[l] for l in group] for group in self.groups]
        return replace(
            self,
            layers=tuple(part[0] if len(part) == 1 else nn.Sequential(*part) for part in layers),
            shapes=tuple(self.shapes[group[-1]] for group in self.groups),
            groups=tuple((k,) for k in range(len(self.groups))),
        )


def partition(layers: Sequence[int], n: int) -> tuple[tuple[int, ...], ...]:
    """Cut layers into `n` nearly equal contiguous groups, the first ones a layer longer where it does not divide.

    Raises:
        ValueError: if `n` is not between 1 and the number of layers.
    """
    if not 1 <= n <= len(layers):
        raise ValueError(f"expected between 1 and {len(layers)} blocks (the number of layers), got {n}")
    size, longer = divmod(len(layers), n)
    starts = [k * size + min(k, longer) for k in range(n + 1)]
    return tuple(tuple(layers[a:b]) for a, b in zip(starts, starts[1:], strict=False))


def width(shape: Shape) -> int:
    """Width of features of one example: channels of `[C, H, W]`, features of `[T, D]` and of `[D]`."""
    return shape[0] if len(shape) >= 3 else shape[len(shape) - 1]


@torch.no_grad()
def trace_shapes(layers: Sequence[nn.Module], x: Tensor) -> list[Shape]:
    """Shape of every layer's output without the batch. Leaves statistics and random state as they were.

    Raises:
        ValueError: if a layer returns something else than one tensor with the batch first.
    """
    shapes = []
    modes = {module: module.training for layer in layers for module in layer.modules()}
    try:
        for l, layer in enumerate(layers):
            batch = x.shape[0]
            x = layer.eval()(x)
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"layer {l} ({type(layer).__name__}) returns a {type(x).__name__}, expected one tensor"
                )
            if x.dim() < 2 or x.shape[0] != batch:
                raise ValueError(
                    f"layer {l} ({type(layer).__name__}) returns shape {tuple(x.shape)}, expected [{batch}, ...]"
                )
            shapes.append(tuple(x.shape[1:]))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return shapes


def check_disjoint(blocks: Sequence[nn.Module]) -> None:
    """Refuse blocks that share a parameter.

    Raises:
        ValueError: naming the two blocks.
    """
    owner: dict[nn.Parameter, int] = {}
    for k, block in enumerate(blocks):
        for parameter in block.parameters():
            other = owner.setdefault(parameter, k)
            if other != k:
                raise ValueError(
                    f"blocks {other} and {k} share a parameter; a local rule needs blocks of their own weights"
                )
