"""Measurements of the live model at chosen steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torchfolio.engine.fit import FitState

if TYPE_CHECKING:
    import pandas as pd


class StepRecorder:
    """A callback of `fit` that measures at every n-th step or at steps spaced evenly in their logarithm.

    Args:
        measurements: functions of the `FitState` by name; a number or anything a DataFrame holds.
        every: measure at every so many steps.
        per_decade: measure at about so many steps for each factor of ten, from step 1 on.

    Raises:
        ValueError: unless exactly one of `every` and `per_decade` is given, at least 1.

    Example:
        >>> recorder = StepRecorder({"norm": lambda s: weight_norm(s.model)}, per_decade=10)
        >>> fit(net, train, callbacks=[recorder])
        >>> recorder.to_frame()
    """

    def __init__(
        self,
        measurements: Mapping[str, Callable[[FitState], Any]],
        *,
        every: int | None = None,
        per_decade: int | None = None,
    ) -> None:
        if (every is None) == (per_decade is None) or (every or per_decade or 0) < 1:
            raise ValueError(f"give either every or per_decade, at least 1; got {every!r} and {per_decade!r}")
        self.measurements = dict(measurements)
        self.every, self.per_decade = every, per_decade
        self.rows: list[dict[str, Any]] = []

    def due(self, step: int) -> bool:
        """Whether a step is measured."""
        if self.every is not None:
            return step % self.every == 0
        assert self.per_decade is not None
        k = 0
        while (point := round(10 ** (k / self.per_decade))) < step:
            k += 1
        return point == step

    def __call__(self, state: FitState) -> None:
        if state.epoch_end or not self.due(state.step):
            return
        self.rows.append({"step": state.step, **{name: measure(state) for name, measure in self.measurements.items()}})

    def to_frame(self) -> pd.DataFrame:
        """The measurements as a DataFrame indexed by step."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["step", *self.measurements]).set_index("step")

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, for checkpoints."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved rows."""
        self.rows = list(state["rows"])
