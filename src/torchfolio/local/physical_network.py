"""Networks of physical blocks: their scaling of inputs, their training on stored measurements, their scores.

Part of physical local learning (Momeni et al., Science 382, 2023); what a pair of passes is, a subclass says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchfolio.checks import finite, labels, positive, whole
from torchfolio.data import Examples
from torchfolio.local.physical_blocks import PhysicalBlock
from torchfolio.local.physical_system import PhysicalSystem

__all__ = ["LocalNetwork"]


class LocalNetwork(nn.Module):
    """Blocks in a row and their training; a subclass says what the pairs of a batch are."""

    mean: Tensor
    std: Tensor
    low: Tensor

    def __init__(
        self, blocks: Sequence[PhysicalBlock], num_classes: int, n_features: int, extra: int, standardize: bool
    ) -> None:
        super().__init__()
        self.standardize = standardize
        self.blocks: Any = nn.ModuleList(blocks)
        if not len(self.blocks):
            raise ValueError("expected at least one block, got none")
        self.num_classes = whole("num_classes", num_classes, 2)
        widths = [n_features + extra, *(block.linear.out_features for block in self.blocks)]
        for k, block in enumerate(self.blocks):
            if block.in_features != widths[k]:
                raise ValueError(f"expected block {k} to take {widths[k]} features, got {block.in_features}")
        self.n_features = n_features
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        self.register_buffer("low", torch.full((n_features,), float("nan")))  # until the scaling is fitted
        self.losses: list[list[float]] = []
        self._optimizers: list[torch.optim.Optimizer] = []

    def fit(
        self,
        data: Any,
        y: Any = None,
        *,
        epochs: int = 30,
        inner_steps: int = 10,
        lr: float = 2e-3,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Self:
        """Fit the scaling of the features to the data and train; weights go on from where they are.

        Args:
            data: inputs `[N, ...]`, or `Examples` or whatever these take, such as a `DataLoader`.
            y: labels `[N]`, where the data bring none.
            epochs: passes over the data.
            inner_steps: Adam steps on each measurement (the paper uses 10 to 25).
            lr: learning rate of Adam.
            batch_size: examples of a batch, `None` for all; a loader keeps its own.
            seed: seed of the negatives and of the order.

        Raises:
            ValueError: if data, labels or a setting are out of range.
        """
        examples = self._examples(data, y)
        x = torch.cat([self._flat(row[0]) for row in examples.batches(None)])
        if self.standardize:
            self.std.copy_(torch.where((std := x.std(0, correction=0)) > 0, std, 1))
            self.mean.copy_(x.mean(0))
            self.low.copy_(((x - self.mean) / self.std).amin(0))
        else:
            self.low.copy_(x.amin(0).clamp_max(0))
        self._optimizers = []
        return self.partial_fit(
            examples, epochs=epochs, inner_steps=inner_steps, lr=lr, batch_size=batch_size, seed=seed
        )

    def partial_fit(
        self,
        data: Any,
        y: Any = None,
        *,
        epochs: int = 1,
        inner_steps: int = 10,
        lr: float = 2e-3,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Self:
        """Train on with the scaling and the optimizers as they are, for example after the physics drifted; see `fit`."""
        if self.low.isnan().any():
            return self.fit(data, y, epochs=epochs, inner_steps=inner_steps, lr=lr, batch_size=batch_size, seed=seed)
        examples = self._examples(data, y)
        for name, value in (("epochs", epochs), ("inner_steps", inner_steps)):
            whole(name, value, 1)
        positive("lr", lr)
        if batch_size is not None:
            whole("batch_size", batch_size, 1)
        if not self._optimizers:
            self._optimizers = [torch.optim.Adam(block.linear.parameters(), lr=lr) for block in self.blocks]
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = lr
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            losses = [
                self._step(*self._pairs(*row, generator), inner_steps)
                for row in self._shuffled(examples, batch_size, generator)
            ]
            self.losses.append(torch.tensor(losses).mean(0).tolist())
        return self

    def _step(self, good: Tensor, bad: Tensor, inner_steps: int) -> list[float]:
        """One batch through all blocks; the loss of each after its inner steps."""
        losses = []
        for k, (block, optimizer) in enumerate(zip(self.blocks, self._optimizers, strict=True)):
            s = torch.cat((block.measure(good, f"layer {k}"), block.measure(bad, f"layer {k}")))
            for _ in range(inner_steps):
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss = block.loss(s)
                if not loss.requires_grad:  # all of the block is frozen
                    break
                loss.backward()
                optimizer.step()
            losses.append(loss.item())  # pyright: ignore[reportPossiblyUnboundVariable]
            with torch.no_grad():
                good, bad = block.goodness.hand_over(block.linear(s)).chunk(2)
        return losses

    def layers(self, h: Tensor) -> list[Tensor]:
        """$z$ of every block for embedded inputs."""
        outputs = []
        with torch.no_grad():
            for k, block in enumerate(self.blocks):
                outputs.append(block.linear(block.measure(h, f"layer {k}")))
                h = block.goodness.hand_over(outputs[-1])
        return outputs

    def score(self, data: Any, y: Any = None) -> float:
        """Accuracy in [0, 1]."""
        right = [self.predict(x) == y.to(self.low.device) for x, y in self._examples(data, y).batches(512)]
        return float(torch.cat(right).float().mean())

    def predict(self, x: Any) -> Tensor:
        """Class of every example."""
        raise NotImplementedError

    @property
    def physical_calls(self) -> int:
        """Number of measurements of a batch, over all different systems."""
        return sum(system.calls for system in self._systems())

    def reset_calls(self) -> None:
        """Count measurements from 0 again."""
        for system in self._systems():
            system.reset_calls()

    def _systems(self) -> list[PhysicalSystem]:
        return list({id(block.physical): block.physical for block in self.blocks}.values())

    def _pairs(self, x: Tensor, y: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _shuffled(
        self, examples: Examples, batch_size: int | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Scaled inputs and labels, in batches of a new order."""
        device = self.low.device
        if examples.tensors is None or batch_size is None:
            for row in examples.batches(batch_size, device):
                yield self.scale(row[0]), row[-1] if len(row) > 1 else None
            return
        x, y = examples.tensors[0], examples.targets
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            yield self.scale(x[rows]), None if y is None else y[rows].to(device)

    def _examples(self, data: Any, y: Any) -> Examples:
        examples = Examples(data if y is None else (data, y))
        if examples.supervised:
            targets = examples.targets
            assert targets is not None
            labels(targets, self.num_classes)
        return examples

    def _flat(self, x: Tensor) -> Tensor:
        x = x.flatten(1).to(self.low)
        if x.shape[1] != self.n_features:
            raise ValueError(f"expected {self.n_features} features an example, got {x.shape[1]}")
        return finite("x", x)

    def scale(self, x: Any) -> Tensor:
        """Features as the blocks get them, 0 or more."""
        if self.low.isnan().any():
            raise ValueError("expected a fitted network; call fit first")
        return ((self._flat(torch.as_tensor(x)) - self.mean) / self.std - self.low).clamp_min(0)
