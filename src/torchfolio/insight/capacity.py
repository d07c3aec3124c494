"""Sweeps of a model's capacity: is there a peak of the test error, how high is it, and did training reach a low loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from torchfolio.checks import finite, one_of
from torchfolio.engine import evaluating, seeded
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Peak", "SweepResult", "capacity_sweep", "compare", "peak", "plot_comparison"]

Data = tuple[Tensor, Tensor] | TensorDataset


class Peak(NamedTuple):
    """Peak of a curve over capacity.

    Attributes:
        height: ratio of the peak to the higher of the two sides' minima; exactly 1 where there is no peak.
        capacity: place of the peak; `None` where there is none.
        index: number on the grid.
    """

    height: float
    capacity: float | None
    index: int | None


def peak(capacity: Sequence[float] | Tensor, test_loss: Sequence[float] | Tensor) -> Peak:
    """How far a test loss rises above both of its sides:

    $$H = \\max_i \\frac{T_i}{\\max(\\min_{j<i} T_j, \\min_{j>i} T_j)}$$

    over interior points, and 1 where no point has more, as on every monotone curve.

    Args:
        capacity: increasing sizes, at least 3.
        test_loss: loss at each, above 0 and finite.

    Raises:
        ValueError: if capacities do not increase, are fewer than 3, or losses are not finite or not above 0.
    """
    sizes, losses = [float(c) for c in capacity], [float(t) for t in test_loss]
    _check_capacities(sizes)
    if len(losses) != len(sizes):
        raise ValueError(f"expected a loss for each of {len(sizes)} capacities, got {len(losses)}")
    if not all(0 < t < math.inf for t in losses):
        raise ValueError(f"expected losses that are finite and above 0, got {losses}")
    heights = [losses[i] / max(min(losses[:i]), min(losses[i + 1 :])) for i in range(1, len(losses) - 1)]
    best = max(range(len(heights)), key=heights.__getitem__)
    return Peak(heights[best], sizes[best + 1], best + 1) if heights[best] > 1 else Peak(1.0, None, None)


def _check_capacities(sizes: Sequence[float]) -> None:
    if len(sizes) < 3 or not all(a < b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"expected at least 3 increasing capacities, got {list(sizes)}")


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult(Shown):
    """A sweep over capacity.

    Attributes:
        frame: row for each `capacity`, with at least `train_loss` and `test_loss`; of `capacity_sweep` also
            `n_parameters`, `test_error`, `condition_number`, and further metrics.
    """

    frame: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """The table, a row for each capacity."""
        return self.frame

    def peak(self, column: str = "test_loss") -> Peak:
        """The peak of the test loss, or of another column."""
        one_of("column", column, list(self.frame.columns))
        return peak(self.frame["capacity"].tolist(), self.frame[column].tolist())

    def at(self, capacity: float, column: str = "train_loss") -> float:
        """A column at the grid point nearest to a capacity, by ratio."""
        one_of("column", column, list(self.frame.columns))
        distances = [abs(math.log(c / capacity)) for c in self.frame["capacity"]]
        return float(self.frame[column].iloc[distances.index(min(distances))])

    def plot(self) -> Figure:
        """Training and test loss over capacity, with the test error and the condition number where they are known."""
        import matplotlib.pyplot as plt

        columns = [
            c for c in ("test_error", "condition_number") if c in self.frame and not all(map(math.isnan, self.frame[c]))
        ]
        figure, grid = plt.subplots(
            1, 1 + len(columns), figsize=(5 + 4 * len(columns), 3.8), layout="constrained", squeeze=False
        )
        for column in ("train_loss", "test_loss"):
            grid[0, 0].plot(self.frame["capacity"], self.frame[column], marker=".", label=column.replace("_", " "))
        grid[0, 0].legend()
        for ax, column in zip(grid[0, 1:], columns, strict=True):
            ax.plot(self.frame["capacity"], self.frame[column], marker=".")
            ax.set_ylabel(column.replace("_", " "))
        for ax in grid[0]:
            ax.set(xscale="log", xlabel="capacity", yscale="linear" if ax.get_ylabel() == "test error" else "log")
        return figure


def capacity_sweep(
    build: Callable[[int, torch.Generator], nn.Module],
    capacities: Sequence[int],
    fit: Callable[[nn.Module, Data], float],
    train: Data,
    test: Data,
    *,
    metrics: Mapping[str, Callable[[Tensor, Tensor], float]] | None = None,
    seed: int = 0,
) -> SweepResult:
    """Train a model at every capacity and measure it.

    Args:
        build: makes a model from a capacity and a generator, which starts alike for every capacity.
        capacities: increasing sizes, at least 3.
        fit: trains a model and returns its final training loss.
        train: inputs and targets; whole numbers are class labels.
        test: inputs and targets to measure on, which are not trained on.
        metrics: functions of outputs and targets of the test data, by column; those named `test_loss` or `test_error`
            take the place of mean squared error (against one-hot labels) and of the share of wrong classes.
        seed: seed of the generator, and of torch's global ones during `build` and `fit`, which are put back.

    Returns:
        The table. `condition_number` is that of the training inputs of the last linear layer; NaN without one.

    Raises:
        ValueError: if capacities do not increase or are fewer than 3, test labels are outside the training classes, or a
            loss is not finite.
    """
    import pandas as pd

    _check_capacities(capacities)
    (x, y), (x_test, y_test) = _tensors(train, "train"), _tensors(test, "test")
    classes = None if y.is_floating_point() else int(y.max()) + 1
    if classes is not None and not set(y_test.unique().tolist()) <= set(y.unique().tolist()):
        raise ValueError(f"expected test labels among the training classes, got {sorted(set(y_test.tolist()))}")
    rows = []
    for capacity in capacities:
        with seeded(seed):
            model = build(capacity, torch.Generator().manual_seed(seed))
            loss = float(fit(model, train))
        with evaluating(model), torch.no_grad():
            output = model(x_test)
            row = {
                "capacity": capacity,
                "n_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "train_loss": finite(f"the training loss at capacity {capacity}", loss),
                **_scores(output, y_test, classes),
                **{name: float(metric(output, y_test)) for name, metric in (metrics or {}).items()},
                "condition_number": _condition(model, x),
            }
        finite(f"the test loss at capacity {capacity}", row["test_loss"])
        rows.append(row)
    return SweepResult(pd.DataFrame(rows))


def _tensors(data: Data, name: str) -> tuple[Tensor, Tensor]:
    x, y = data.tensors if isinstance(data, TensorDataset) else data
    if len(x) != len(y) or not len(x):
        raise ValueError(f"expected {name} to hold as many inputs as targets, at least one, got {len(x)} and {len(y)}")
    return finite(f"inputs of {name}", x), finite(f"targets of {name}", y)


def _scores(output: Tensor, y: Tensor, classes: int | None) -> dict[str, float]:
    """Mean squared error and share of wrong classes (NaN in regression)."""
    if classes is None:
        return {"test_loss": float(F.mse_loss(output, y.reshape(output.shape))), "test_error": math.nan}
    if output.dim() != 2 or output.shape[1] < classes:
        raise ValueError(f"expected outputs [N, {classes}] or wider, got {tuple(output.shape)}")
    target = F.one_hot(y.long(), output.shape[1]).to(output)
    error = float((output.argmax(1) != y).double().mean())
    return {"test_loss": float(F.mse_loss(output, target)), "test_error": error}


def _condition(model: nn.Module, x: Tensor) -> float:
    """Condition number of what the last linear layer sees."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers or not layers[-1][0]:
        return float(torch.linalg.cond(x.double())) if layers and x.dim() == 2 else math.nan
    seen: list[Tensor] = []
    handle = layers[-1][1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    try:
        model(x)
    finally:
        handle.remove()
    return float(torch.linalg.cond(seen[0].flatten(1).double())) if seen else math.nan


def compare(sweeps: Mapping[str, SweepResult], threshold: float | None = None) -> pd.DataFrame:
    """The unified view: height of the peak beside the training loss at the threshold, a row for each setting.

    Args:
        sweeps: sweep by name of its optimisation setting.
        threshold: capacity at which the training data can just be fitted; by default the place of the highest peak.

    Raises:
        ValueError: if there are no sweeps, or none has a peak and no threshold is given.
    """
    import pandas as pd

    if not sweeps:
        raise ValueError("expected at least one sweep, got none")
    peaks = {name: sweep.peak() for name, sweep in sweeps.items()}
    if threshold is None:
        threshold = max(peaks.values()).capacity
        if threshold is None:
            raise ValueError("no sweep has a peak; expected threshold, the capacity at which to read the training loss")
    rows = [
        {
            "setting": name,
            "height": peaks[name].height,
            "capacity": math.nan if (place := peaks[name].capacity) is None else place,
            "train_loss": sweep.at(threshold),
            "condition_number": sweep.at(threshold, "condition_number")
            if "condition_number" in sweep.frame
            else math.nan,
        }
        for name, sweep in sweeps.items()
    ]
    return pd.DataFrame(rows).set_index("setting")


def plot_comparison(table: pd.DataFrame) -> Figure:
    """Height of the peak over the training loss at the threshold, a point for each row of `compare`."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    losses = [float(loss) for loss in table["train_loss"]]
    # Losses of 0 or of rounding stand at the left edge, a tenth of the least that is told apart.
    edge = min((loss for loss in losses if loss > 1e-12), default=1.0) / 10
    for k, (name, loss, height) in enumerate(zip(table.index, losses, table["height"], strict=True)):
        ax.scatter(max(loss, edge), height, color=f"C{k % 10}", marker="os^Dv"[k // 10 % 5], label=str(name))
    ax.set(xscale="log", yscale="log", xlabel="training loss at the threshold", ylabel="height of the peak")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.grid(alpha=0.3)
    return figure
