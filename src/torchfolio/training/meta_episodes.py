"""Short labelled sequences in which a rule has to be picked up: functions of one variable, classes never seen before.

The labels of classes are shuffled in every episode, so that nothing but the episode itself tells them: Adam Santoro,
Sergey Bartunov, Matthew Botvinick, Daan Wierstra, Timothy Lillicrap, "Meta-Learning with Memory-Augmented Neural
Networks", ICML 2016; sines as in Finn et al., ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchfolio.checks import at_least, finite, labels, same_length, whole

__all__ = ["class_episodes", "prototype_episodes", "sine_episodes"]

RANGE = 5.0  # of the sines' x, which are fed as x / RANGE


def sine_episodes(episodes: int, length: int = 20, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of sines $A \\sin(x - \\varphi)$, A from 0.1 to 5, phase from 0 to pi, x from -5 to 5.

    Args:
        episodes: number N of them.
        length: points T of each.
        seed: seed of everything random.

    Returns:
        x / 5 `[N, T, 1]` and the values `[N, T, 1]`.
    """
    generator = _generator(episodes, seed)
    x = (2 * torch.rand(episodes, whole("length", length, 1), 1, generator=generator) - 1) * RANGE
    amplitude, phase = torch.rand(2, episodes, 1, 1, generator=generator)
    return x / RANGE, (0.1 + 4.9 * amplitude) * torch.sin(x - math.pi * phase)


def prototype_episodes(
    episodes: int, ways: int = 5, shots: int | Sequence[int] = 5, dim: int = 16, noise: float = 0.6, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Samples about random class means: means N(0, I), samples N(mean, noise^2 I), in random order.

    Args:
        episodes: number N of them.
        ways: classes of an episode.
        shots: samples of each class, or one number for every class; which label a class gets is random.
        dim: width of a sample.
        noise: standard deviation within a class.
        seed: seed of everything random.

    Returns:
        Samples `[N, T, dim]` and labels `[N, T]`, T the number of all samples of an episode.
    """
    generator, counts = _generator(episodes, seed), _counts(ways, shots)
    at_least("noise", noise, 0)
    means = torch.randn(episodes, ways, whole("dim", dim, 1), generator=generator)
    members = _shuffled(episodes, counts, generator)
    x = means.gather(1, members.unsqueeze(2).expand(-1, -1, dim))
    x = x + noise * torch.randn(x.shape, generator=generator)
    return x, _names(episodes, ways, generator).gather(1, members)


def class_episodes(
    X: Tensor, y: Tensor, ways: int = 5, shots: int | Sequence[int] = 5, *, episodes: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Episodes of classes drawn from a labelled set, no example twice in one.

    Args:
        X: examples `[M, ...]`.
        y: their labels `[M]`.
        ways: classes of an episode.
        shots: number of examples a class, as in `prototype_episodes`.
        episodes: number N of them.
        seed: seed of everything random.

    Returns:
        Examples `[N, T, ...]` and the labels of the episode `[N, T]`, from 0 to ways - 1.

    Raises:
        ValueError: if there are fewer classes than `ways`, or a class has fewer examples than an episode needs.
    """
    same_length(X=X, y=y)
    labels(y)
    finite("X", X)
    generator, counts = _generator(episodes, seed), _counts(ways, shots)
    classes, sizes = y.unique(return_counts=True)
    if len(classes) < ways:
        raise ValueError(f"expected at least {ways} classes in y, got {len(classes)}")
    if int(sizes.min()) < max(counts):
        raise ValueError(f"expected at least {max(counts)} examples of every class, got {int(sizes.min())} of one")
    rows = [(y == label).nonzero().flatten() for label in classes]
    drawn = torch.rand(episodes, len(classes), generator=generator).argsort(1)[:, :ways]
    order = _shuffled(episodes, counts, generator)
    picked = torch.empty_like(order)
    for k in range(episodes):
        for way, count in enumerate(counts):
            pool = rows[int(drawn[k, way])]
            picked[k, order[k] == way] = pool[torch.randperm(len(pool), generator=generator)[:count]]
    return X[picked], _names(episodes, ways, generator).gather(1, order)


def _generator(episodes: int, seed: int) -> torch.Generator:
    whole("episodes", episodes, 1)
    return torch.Generator().manual_seed(whole("seed", seed))


def _counts(ways: int, shots: int | Sequence[int]) -> list[int]:
    counts = [shots] * whole("ways", ways, 1) if isinstance(shots, int) else list(shots)
    if len(counts) != ways:
        raise ValueError(f"expected shots for each of {ways} classes, got {len(counts)}")
    return [whole("shots", count, 1) for count in counts]


def _shuffled(episodes: int, counts: Sequence[int], generator: torch.Generator) -> Tensor:
    """The classes `[N, T]` of an episode's samples, by number, in random order."""
    order = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return order[torch.rand(episodes, len(order), generator=generator).argsort(1)]


def _names(episodes: int, ways: int, generator: torch.Generator) -> Tensor:
    """A random label for each class."""
    return torch.rand(episodes, ways, generator=generator).argsort(1)
