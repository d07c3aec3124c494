"""Gradient-isolated training of a deep network: what every supervised local rule shares.

A network is cut into blocks $B_1, \\dots, B_K$. Each block but the last carries a *local head*, an auxiliary
module that turns the block's output into a loss; the last block ends in the network's own classifier. One step
runs

$$h_k = B_k(\\operatorname{sg}[h_{k-1}]), \\qquad
  \\ell_k = \\mathcal{L}_k(h_k, x, y), \\qquad
  \\ell_K = \\mathcal{L}(B_K(\\operatorname{sg}[h_{K-1}]), y),$$

with $\\operatorname{sg}$ the stop-gradient, and calls backward on each $\\ell_k$ at once, so that the graph of a
block is freed before the next block runs: the memory held for backward is that of one block and its head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import LearningRule, default_loss
from torchfolio.engine import blocks as split_blocks
from torchfolio.engine import layers as split_layers

Loss = Callable[[Tensor, Tensor], Tensor]
Shape = tuple[int, ...]


class LocalHead(nn.Module, ABC):
    """An auxiliary module that gives a block a loss of its own.

    A head that can only learn from class labels sets `needs_labels`.
    """

    needs_labels = False

    @abstractmethod
    def loss(self, features: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The local loss, a scalar with a graph back to `features`.

        Args:
            features: output of the block, `[B, ...]`.
            x: the batch of inputs, as the network sees them.
            y: the batch of targets.
        """


class ClassifierHead(LocalHead):
    """A local head that classifies: $\\ell = \\mathcal{L}(a(h), y)$.

    Args:
        net: auxiliary network $a$ from the block's features to logits `[B, C]`.
        loss: criterion on (logits, targets).
    """

    def __init__(self, net: nn.Module, loss: Loss = default_loss) -> None:
        super().__init__()
        self.net = net
        self.criterion = loss

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features)

    def loss(self, features: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.net(features), y)


@dataclass(frozen=True)
class LocalStep:
    """What one local step computed: the loss of every block, first to last, and the network's output."""

    losses: tuple[Tensor, ...]
    logits: Tensor


class LocalModel(nn.Module):
    """A network as gradient-isolated blocks with local heads.

    The blocks are the user's own modules: training them trains the user's network. `forward` is plain
    inference and never touches a head.

    Args:
        blocks: the network in running order; the last block ends in the classifier.
        heads: one local head for each block but the last.
        loss: criterion of the last block.

    Raises:
        ValueError: if there is not one head fewer than blocks, or two blocks share a parameter (they would
            be trained by two losses).

    Shapes:
        `x` is whatever the first block takes, `[B, ...]`; the result is the last block's, `[B, C]`.
    """

    def __init__(self, blocks: Sequence[nn.Module], heads: Sequence[LocalHead], loss: Loss = default_loss) -> None:
        super().__init__()
        if len(heads) != len(blocks) - 1:
            raise ValueError(
                f"expected a head for each block but the last, got {len(blocks)} blocks and {len(heads)} heads"
            )
        check_disjoint(blocks)
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(heads)
        self.criterion = loss

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def local_step(self, x: Tensor, y: Tensor, backward: Callable[[Tensor], None] = Tensor.backward) -> LocalStep:
        """Forward through all blocks, with a backward pass for each as soon as its loss is known.

        Gradients are added to `.grad`; no optimizer is stepped.

        Args:
            x: inputs `[B, ...]`.
            y: targets `[B]` or `[B, k]`.
            backward: called with every loss.

        Raises:
            RuntimeError: if a head changes the features it is given in place (the next block needs them).
        """
        losses = []
        h = x
        for k, (block, head) in enumerate(zip(self.blocks, self.heads, strict=False)):
            h = block(h)
            version = h._version
            loss = head.loss(h, x, y)  # pyright: ignore[reportCallIssue]
            if h._version != version:
                raise RuntimeError(
                    f"the head of block {k} changes its input in place; make its first operation out of place"
                )
            backward(loss)
            losses.append(loss.detach())
            h = h.detach()
        logits = self.blocks[-1](h)
        loss = self.criterion(logits, y)
        backward(loss)
        return LocalStep((*losses, loss.detach()), logits.detach())

    def backbone(self) -> nn.Sequential:
        """The network without its heads, sharing the trained parameters."""
        return nn.Sequential(*self.blocks)

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters that each loss trains: block and head, first to last. Groups are disjoint."""
        parts = [nn.ModuleList([block, head]) for block, head in zip(self.blocks, self.heads, strict=False)]
        return [list(part.parameters()) for part in (*parts, self.blocks[-1])]


class LocalRule(LearningRule):
    """Base of the supervised local rules: splits the network, traces its shapes, trains block by block.

    A rule says in `isolate` which layers form a block and what head each block gets.

    Args:
        blocks: `None` takes every layer by itself; a number groups the layers into so many contiguous, nearly
            equal blocks; a sequence of names starts a layer at each named module (see `torchfolio.engine.blocks`).
        loss: criterion on (output `[B, C]`, targets), of the local classifiers too; by default cross-entropy for
            integer targets and the mean squared error for others.
    """

    def __init__(self, *, blocks: int | Sequence[str] | None = None, loss: Loss = default_loss) -> None:
        self.blocks = blocks
        self.loss = loss
        self.model: LocalModel | None = None

    @abstractmethod
    def isolate(self, network: Network) -> tuple[list[nn.Module], list[LocalHead]]:
        """The gradient-isolated blocks, first to last, and a head for each but the last."""

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> LocalModel:
        """Split `model` and build the heads.

        Args:
            model: the user's network; its modules are used as they are, not copied.
            example: one batch (x, y); only the shapes matter.

        Returns:
            The trainable `LocalModel`; its parameters are those of `model` and of the heads.
        """
        network = Network.of(model, example[0], self.blocks)
        with _like(model):
            blocks, heads = self.isolate(network)
        unfit = next((head for head in heads if head.needs_labels), None)
        if unfit is not None and len(example) > 1 and example[1].is_floating_point():
            name = type(unfit).__name__
            raise ValueError(f"{name} learns from class labels, got targets of {example[1].dtype}; take another head")
        self.model = LocalModel(blocks, heads, self.loss).train(model.training)
        return self.model

    def step(self, batch: Sequence[Tensor], backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """One local step. `loss` is the last block's, the network's own; `local_loss` the mean of the others."""
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        x, y = batch
        done = self.model.local_step(x, y, backward)
        scalars: dict[str, Tensor | float] = {"loss": done.losses[-1]}
        if len(done.losses) > 1:
            scalars["local_loss"] = torch.stack(done.losses[:-1]).mean()
        return scalars


@contextmanager
def _like(model: nn.Module) -> Iterator[None]:
    """Build new modules on the device and in the dtype of a model."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with weight.device:
            yield
    finally:
        torch.set_default_dtype(dtype)


@dataclass(frozen=True)
class Network:
    """A network in sequential layers, with the shapes that flow between them.

    Attributes:
        layers: the hidden layers, first to last.
        head: from the last hidden layer to the output.
        shapes: `shapes[l]` is the shape of layer l's output, without the batch.
        input_shape: the shape of one input.
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
            model: the network.
            x: one batch of inputs.
            blocks: see `LocalRule`.

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


class MeanPool2d(nn.Module):
    """Adaptive average pooling that holds nothing for the backward pass where the output divides the input.

    PyTorch's own keeps its whole input, of which the backward pass reads the shape alone.

    Args:
        output_size: height and width of the output.

    Shapes:
        `[B, C, H, W]` to `[B, C, *output_size]`.
    """

    def __init__(self, output_size: Sequence[int]) -> None:
        super().__init__()
        self.height, self.width = output_size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.height or x.shape[-1] % self.width:
            return F.adaptive_avg_pool2d(x, (self.height, self.width))
        return x.unflatten(-1, (self.width, -1)).unflatten(-3, (self.height, -1)).mean((-3, -1))


class GlobalPool(nn.Module):
    """Average over all positions: `[B, C, ...] -> [B, C]`, tokens `[B, T, D] -> [B, D]`, `[B, D]` unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x
        return x.mean(1) if x.dim() == 3 else x.flatten(2).mean(2)
