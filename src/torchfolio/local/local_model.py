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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.engine import LearningRule, default_loss
from torchfolio.local.layered_network import Network, Shape, check_disjoint, like, partition, trace_shapes, width
from torchfolio.models.pools import GlobalPool, MeanPool2d
from torchfolio.shown import Shown

__all__ = [
    "ClassifierHead", "GlobalPool", "LocalHead", "LocalModel", "LocalRule", "LocalStep", "Loss", "MeanPool2d", "Network", "Shape",
    "partition", "trace_shapes", "width",
]  # fmt: skip

Loss = Callable[[Tensor, Tensor], Tensor]


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
            x: batch of inputs, as the network sees them.
            y: batch of targets.
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


@dataclass(frozen=True, repr=False)
class LocalStep(Shown):
    """What one local step computed: the loss of every block, first to last, and the network's output."""

    losses: tuple[Tensor, ...]
    logits: Tensor


class LocalModel(nn.Module):
    """A network as gradient-isolated blocks with local heads.

    The blocks are the user's own modules: training them trains the user's network. `forward` is plain
    inference and never touches a head.

    Args:
        blocks: network in running order; the last block ends in the classifier.
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
        with like(model):
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
