"""The record that an iterative solver keeps: its residuals, whether they met the tolerance, and in how many steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sklearn.exceptions import ConvergenceWarning

from torchfolio.checks import at_least, whole
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Convergence"]


class Convergence(Shown):
    """Runs the loop of a solver and remembers what happened in it.

    Iterating gives 1, 2, ... and ends when every residual that the last `record` named is within its limit, or at
    `max_iter` with a `ConvergenceWarning` that says which residual is how far off.

    Args:
        solver: its name, for messages.
        tol: relative tolerance; a residual $r$ of scale $c$ is within it when $r \\le \\mathrm{tol}\\,(1 + c)$.
        max_iter: maximum number of iterations.
        advice: remedies that may help, by the name of the residual that is left, for the warning.

    Attributes:
        converged: whether the residuals met the tolerance.
        n_iter: iterations made.
        rows: records, a mapping for each iteration.

    Raises:
        ValueError: if `tol` is negative or `max_iter` is below 1.
        FloatingPointError: from `record`, when a residual is not finite.

    Example:
        >>> progress, x = Convergence("halving", tol=1e-3, max_iter=50), 1.0
        >>> for _ in progress:
        ...     x /= 2
        ...     progress.record({"size": (x, 0.0)})
        >>> progress.converged, progress.n_iter
        (True, 10)
    """

    def __init__(self, solver: str, *, tol: float, max_iter: int, advice: Mapping[str, str] | None = None) -> None:
        self.solver = solver
        self.tol = at_least("tol", tol, 0)
        self.max_iter = whole("max_iter", max_iter, 1)
        self.converged = False
        self.rows: list[dict[str, float]] = []
        self.advice = advice or {}
        self._excess: dict[str, str] = {}

    @property
    def n_iter(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        for iteration in range(1, self.max_iter + 1):
            yield iteration
            if self.converged:
                return
        hints = ["raise max_iter or tol", *(self.advice[name] for name in self._excess if name in self.advice)]
        warnings.warn(
            f"{self.solver} stopped at max_iter={self.max_iter} with {' and '.join(self._excess.values())}; "
            f"{', '.join(hints)}, or scale the features so that examples have a norm of about 1",
            ConvergenceWarning,
            stacklevel=3,
        )

    def record(self, residuals: Mapping[str, tuple[float, float]], **values: float) -> None:
        """Add an iteration.

        Args:
            residuals: a value and its scale by name; all must be within tolerance for convergence.
            **values: further numbers to keep.
        """
        self.rows.append({**{name: value for name, (value, _) in residuals.items()}, **values})
        self._excess = {}
        for name, (value, scale) in residuals.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} residual of {self.solver} is {value} at iteration {self.n_iter}")
            limit = self.tol * (1 + scale)
            if value > limit:
                self._excess[name] = f"a {name} residual of {value:.2g} (allowed {limit:.2g})"
        self.converged = not self._excess

    def to_frame(self) -> pd.DataFrame:
        """A row for each iteration (index `iteration`, from 1), a column for each number recorded."""
        import pandas as pd

        return pd.DataFrame(self.rows, index=pd.RangeIndex(1, self.n_iter + 1, name="iteration"))
