"""Spins of a block updated together, with exactly the result of one after another.

The heat bath is a threshold, and within a block only the spins before one change its field. Iterated to a fixed point of
this triangular system, which is unique, the thresholds give the spins that one update after another would give.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["by_gram", "by_prefix", "settled"]

Effect = Callable[[Tensor], Tensor]


def settled(before: Tensor, h: Tensor, threshold: Tensor | None, later: Effect) -> Tensor:
    """Spins of a block `[..., R, B]` after updates one by one.

    Args:
        before: spins, with fields `h` as if none of the block turned.
        h: `[..., R, B]`.
        threshold: threshold of the heat bath; `None` without noise.
        later: function from the changes of spins to what they add to the fields of the spins after them.
    """
    # Equal sums may differ by rounding; a tie must keep the spin.
    tie = 1e-12 * h.abs().amax() if threshold is None else 0.0
    after, field = before, h
    while True:
        if threshold is None:
            decided = torch.where(field.abs() <= tie, before, field.sign())
        else:
            decided = torch.where(field > threshold, 1.0, -1.0).to(field)
        if torch.equal(decided, after):
            return after
        after = decided
        field = h + later(after - before)


def by_gram(couplings: Tensor) -> Effect:
    """The effect of changes through the matrix of couplings."""
    upper = couplings.triu(1)
    return lambda change: change @ upper


def by_prefix(x: Tensor, w: Tensor) -> Effect:
    """As `by_gram(x.mT @ w)`, by running sums of the few overlaps."""
    x, w = x[..., None, :, :], w[..., None, :, :]

    def effect(change: Tensor) -> Tensor:
        moved = change[..., None, :] * x
        return ((moved.cumsum(-1) - moved) * w).sum(-2)

    return effect
