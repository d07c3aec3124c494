"""What a training left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import pandas as pd

    from torchfolio.engine.rules import LearningRule


class History:
    """A row of named values for every epoch."""

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        self.rows = rows or []

    def append(self, row: dict[str, Any]) -> None:
        """Add an epoch."""
        self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(name for row in self.rows for name in row if name != "epoch"))
        return f"History({len(self.rows)} epochs{': ' if names else ''}{names})"

    def __getitem__(self, name: str) -> list[Any]:
        """One value over the epochs; `None` where an epoch lacks it."""
        if not any(name in row for row in self.rows):
            known = sorted({key for row in self.rows for key in row})
            raise KeyError(f"the history has no {name!r}; it has {', '.join(known) or 'no rows'}")
        return [row.get(name) for row in self.rows]

    def to_frame(self) -> pd.DataFrame:
        """The rows as a DataFrame indexed by epoch, counted from 1."""
        import pandas as pd

        frame = pd.DataFrame(self.rows)
        return frame.set_index("epoch") if "epoch" in frame else frame


@dataclass(frozen=True)
class FitResult:
    """The outcome of `fit`.

    Attributes:
        model: the user's network, trained in place.
        module: trained module, auxiliary networks included.
        rule: learning rule.
        history: a row for every epoch.
        steps: optimizer steps taken.
        epochs: epochs completed.
        stopped: why training ended before its last epoch, or `None`.
    """

    model: nn.Module
    module: nn.Module
    rule: LearningRule
    history: History = field(default_factory=History)
    steps: int = 0
    epochs: int = 0
    stopped: str | None = None

    def __repr__(self) -> str:
        last = self.history.rows[-1] if len(self.history) else {}
        scores = [
            f"{n} {last[n]:.4g}" for n in ("loss", "accuracy", "val_loss", "val_accuracy") if last.get(n) is not None
        ]
        words = [f"{self.epochs} epochs", f"{self.steps} steps", *scores, *([self.stopped] if self.stopped else [])]
        return f"FitResult({type(self.model).__name__} by {self.rule!r}: {', '.join(words)})"
