"""Measurements of the live model at chosen steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.engine.modes import evaluating, undisturbed
from torchfolio.engine.state import FitState
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd


class StepRecorder(Shown):
    """Measures at every n-th step, or at steps spaced evenly in their logarithm.

    Given to `fit` among the `callbacks`, it also measures before the first step. Measurements leave no trace: they
    run in evaluation mode, and random states and modes are put back. The gradients of the last step are still there.

    Args:
        measurements: functions of the `FitState` by name. A number, a tensor or array, or a mapping of
            those, which becomes columns `name_key`.
        every: number of steps between measurements.
        per_decade: number of measured steps, about, for each factor of ten, from step 1 on.

    Raises:
        ValueError: unless exactly one of `every` and `per_decade` is given, at least 1.

    Example:
        >>> recorder = StepRecorder({"norm": lambda state: weight_norm(state.model)}, per_decade=10)
        >>> fit(net, train, callbacks=[recorder])
        >>> recorder.to_frame()
    """

    from_start = True

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
        if self.every is not None or step == 0:
            return step % (self.every or 1) == 0
        assert self.per_decade is not None
        k = 0
        while (point := round(10 ** (k / self.per_decade))) < step:
            k += 1
        return point == step

    def __call__(self, state: FitState) -> None:
        if state.epoch_end or not self.due(state.step):
            return
        row: dict[str, Any] = {"step": state.step}
        with undisturbed(), evaluating(state.module), evaluating(state.model):
            for name, measure in self.measurements.items():
                value = measure(state)
                if isinstance(value, Mapping):
                    row |= {f"{name}_{key}": _kept(part) for key, part in value.items()}
                else:
                    row[name] = _kept(value)
        self.rows.append(row)

    def to_frame(self) -> pd.DataFrame:
        """The measurements as a DataFrame indexed by step."""
        import pandas as pd

        return pd.DataFrame(self.rows or None, columns=None if self.rows else ["step"]).set_index("step")

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, for checkpoints."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved rows."""
        self.rows = list(state["rows"])


def _kept(value: Any) -> Any:
    """A value that outlives the step and that checkpoints can hold."""
    if isinstance(value, np.ndarray | np.generic):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 else value.detach().cpu().clone()
    return value
