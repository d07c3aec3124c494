"""One to one: pairs of units of highest correlation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Match(Shown):
    """Pairs of units, in the order of the first network's.

    Attributes:
        row: units of the first network, `[P]`.
        col: their partners in the second, `[P]`; from a semi-matching they may repeat.
        value: similarity of the pairs, `[P]`, with its sign.
    """

    row: Tensor
    col: Tensor
    value: Tensor

    def __len__(self) -> int:
        return len(self.row)

    @property
    def mean(self) -> float:
        """Mean similarity of the pairs."""
        return float(self.value.mean())

    @property
    def shared(self) -> int:
        """Units whose partner is also another unit's: 0 in a one-to-one matching."""
        counts = torch.bincount(self.col)
        return int((counts[self.col] > 1).sum())

    def above(self, threshold: float = 0.5) -> float:
        """Share of pairs of at least this similarity."""
        return float((self.value >= threshold).double().mean())

    def sorted(self) -> Match:
        """The pairs in the order of their similarity, best first."""
        order = self.value.argsort(descending=True)
        return Match(self.row[order], self.col[order], self.value[order])

    def cycles(self) -> Tensor:
        """Units in the order in which the matching leads from one to the next, `[P]`.

        For a matching of a network with itself: units of one group come to stand side by side.
        """
        following = dict(zip(self.row.tolist(), self.col.tolist(), strict=True))
        order: list[int] = []
        left = dict.fromkeys(following)
        for start in following:
            unit = start
            while unit in left:
                del left[unit]
                order.append(unit)
                unit = following[unit]
        return torch.tensor(order)

    def to_frame(self) -> pd.DataFrame:
        """A row for every pair: `unit_a`, `unit_b`, `value`."""
        import pandas as pd

        return pd.DataFrame({"unit_a": self.row.numpy(), "unit_b": self.col.numpy(), "value": self.value.numpy()})


def bipartite_match(similarity: Tensor, absolute: bool = False, exclude_diagonal: bool = False) -> Match:
    """The one-to-one matching $\\pi$ that maximises $\\sum_i c_{i, \\pi(i)}$.

    Args:
        similarity: `[S_1, S_2]`, for example `CorrelationBlocks.between` or `mi_matrix`; rows and columns of dead
            units are NaN and left out. With $S_1 \\ne S_2$ the surplus stays unmatched.
        absolute: match on $|c|$, for units whose sign is arbitrary (tanh); values keep their sign.
        exclude_diagonal: no unit is its own partner, for a matching of a network with itself.

    Raises:
        ValueError: if no unit is alive, single entries are NaN, or the diagonal of a matrix that is not square
            or has one unit is to be left out.

    Reference:
        Li et al., ICLR 2016, section 3.
    """
    gain, rows, cols = _alive(similarity, absolute, exclude_diagonal)
    i, j = (torch.from_numpy(np.asarray(k)) for k in linear_sum_assignment(gain.numpy(), maximize=True))
    return _match(similarity, rows[i], cols[j])


def semi_match(similarity: Tensor, absolute: bool = False, exclude_diagonal: bool = False) -> Match:
    """The best partner of every unit, $\\arg\\max_j c_{ij}$, whoever else has it.

    Never worse than `bipartite_match` on as many units; where it is much better, features are not one to one.
    Not symmetric: pass `similarity.T` for the other direction.

    Args:
        similarity: `[S_1, S_2]`; see `bipartite_match`.
        absolute: whether signs are ignored, see `bipartite_match`.
        exclude_diagonal: whether a unit may not match itself, see `bipartite_match`.
    """
    gain, rows, cols = _alive(similarity, absolute, exclude_diagonal)
    return _match(similarity, rows, cols[gain.argmax(1)])


def _alive(similarity: Tensor, absolute: bool, exclude_diagonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities among living units, what they are to be matched on, and the units' indices."""
    c = torch.as_tensor(similarity).detach().cpu().double()
    if c.dim() != 2:
        raise ValueError(f"expected similarities [units, units], got shape {tuple(c.shape)}")
    nan = c.isnan()
    rows, cols = (~nan.all(1)).nonzero()[:, 0], (~nan.all(0)).nonzero()[:, 0]
    if not len(rows) or not len(cols):
        raise ValueError("expected at least one unit that varies in each layer, got none")
    gain = c[rows][:, cols]
    if not gain.isfinite().all():
        raise ValueError("single similarities are not finite; expected whole rows and columns of dead units to be NaN")
    gain = gain.abs() if absolute else gain.clone()
    if exclude_diagonal:
        if c.shape[0] != c.shape[1] or len(rows) < 2:
            raise ValueError(f"expected a square matrix of two living units or more, got shape {tuple(c.shape)}")
        gain.fill_diagonal_(-torch.inf)
    return gain, rows, cols


def _match(similarity: Tensor, row: Tensor, col: Tensor) -> Match:
    return Match(row, col, torch.as_tensor(similarity).detach().cpu().double()[row, col])
