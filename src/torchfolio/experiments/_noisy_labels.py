"""Images with noisy training labels, as targets of regression on random features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.insight.double_descent import RandomFeatures
from torchfolio.runs import Run


@dataclass(frozen=True)
class Problem:
    """Inputs and targets `[N, K]` of the three splits."""

    inputs: tuple[Tensor, Tensor, Tensor]
    targets: tuple[Tensor, Tensor, Tensor]
    labels: tuple[Tensor, Tensor, Tensor]
    seed: int

    def features(self, count: int, scale: float = 1.0, standardize: str = "") -> tuple[Tensor, ...]:
        """Random features of the splits, nested by their number."""
        inputs = standardized(self.inputs) if standardize == "inputs" else self.inputs
        generator = torch.Generator().manual_seed(self.seed)
        random = RandomFeatures(inputs[0].shape[1], count, torch.tanh, scale, generator, torch.float64)
        features = tuple(random(x) for x in inputs)
        return standardized(features) if standardize == "features" else features

    def scores(self, output: Tensor, split: int = 2) -> tuple[float, float]:
        """Squared error and share of wrong classes, on the test part by default."""
        loss = float((output - self.targets[split]).square().mean())
        return loss, float((output.argmax(1) != self.labels[split]).double().mean())


def noisy_problem(run: Run[Any]) -> Problem:
    """Centred inputs, and targets of which the training's are noisy."""
    settings = run.settings
    splits = run.data(settings.data, train_size=settings.train_size, val=400, normalize=False)
    parts = [part.tensors for part in (splits.train, splits.val, splits.test)]
    mean = parts[0][0].double().mean(0)
    inputs = [settings.scale * (x.double() - mean).flatten(1) for x, _ in parts]
    generator, classes = run.generator(), splits.num_classes
    labels = [y for _, y in parts]
    redrawn = torch.rand(len(labels[0]), generator=generator) < settings.noise_rate
    labels[0] = torch.where(redrawn, torch.randint(classes, labels[0].shape, generator=generator), labels[0])
    targets = [F.one_hot(y, classes).double() for y in labels]
    return Problem(tuple(inputs), tuple(targets), tuple(labels), run.seed)  # pyright: ignore[reportArgumentType]


def standardized(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    mean, std = parts[0].mean(0), parts[0].std(0)
    return tuple((part - mean) / torch.where(std > 0, std, 1.0) for part in parts)
