"""Functions and classes that are new in every episode, and scores by the position in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.training.meta_episodes import prototype_episodes, sine_episodes

__all__ = ["CLASSES", "TASKS", "Episodes", "scores_by_position"]

Episodes = tuple[Tensor, Tensor]


def kinks(n: int, seed: int) -> Episodes:
    """A |x - b|, A from -2 to 2, b from -3 to 3, on x from -5 to 5."""
    return _functions(n, seed, lambda x, a, b: (4 * a - 2) * (x - 6 * b + 3).abs())


def soft_steps(n: int, seed: int) -> Episodes:
    """A tanh(x - b), A from -5 to 5, b from -3 to 3."""
    return _functions(n, seed, lambda x, a, b: (10 * a - 5) * torch.tanh(x - 6 * b + 3))


def _functions(n: int, seed: int, f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.rand(n, 20, 1, generator=generator) - 5
    a, b = torch.rand(2, n, 1, 1, generator=generator)
    return x / 5, f(x, a, b)


TASKS: dict[str, Callable[[int, int], Episodes]] = {
    "sines": lambda n, seed: sine_episodes(n, seed=seed),
    "kinks": kinks,
    "soft_steps": soft_steps,
    "prototypes": lambda n, seed: prototype_episodes(n, seed=seed),
    "rare": lambda n, seed: prototype_episodes(n, shots=(5, 5, 5, 5, 2), seed=seed),
}
"""`n` episodes of a seed, by task."""

CLASSES = {"prototypes": (16, 5), "rare": (16, 5), "digits": (64, 4)}
"""Numbers of features and of classes of the tasks that have classes."""


def scores_by_position(output: Tensor, y: Tensor, *, rare: bool = False) -> dict[str, Any]:
    """Squared errors or accuracies (%) over episodes, at every position and on average over some.

    Args:
        output: outputs of a network `[N, T, out]`.
        y: targets `[N, T, out]`, or labels `[N, T]`.
        rare: whether both appearances of a class that comes only twice are scored besides.
    """
    if y.is_floating_point():
        by = (output - y).square().mean((0, 2))
        return {"by": by, "first": float(by[:2].mean()), "fifth": float(by[4:6].mean()),
                "tenth": float(by[9:11].mean()), "last": float(by[-3:].mean())}  # fmt: skip
    right = (output.argmax(2) == y).float()
    by = 100 * right.mean(0)
    parts = {"first": by[:5], "second": by[5:10], "before_last": by[-10:-5], "last": by[-5:]}
    scores = {"by": by, **{name: float(part.mean()) for name, part in parts.items()}}
    if rare:  # both appearances of the class that comes only twice; at the first nothing can be known
        scarce = F.one_hot(y, output.shape[2]).sum(1).argmin(1)
        places = torch.sort((y == scarce[:, None]).int(), dim=1, descending=True, stable=True).indices[:, :2]
        first, second = (100 * right.gather(1, places).mean(0)).tolist()
        scores |= {"rare_first": first, "rare_second": second}
    return scores
