"""Diagnostics of grokking: how odd a function is, where neurons point, when test accuracy follows training accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from torchfolio.checks import between, finite, one_of, whole
from torchfolio.engine import evaluating
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Alignment", "Trajectory", "alignment", "grokking_time", "odd_energy"]


class Alignment(NamedTuple):
    """How far neurons point to the mean of their class.

    Attributes:
        aligned: share of neurons nearer, by absolute cosine, to their own mean than to the other.
        own: mean absolute cosine with the own mean, $\\mu_1$ where $a_j > 0$ and $\\mu_2$ where $a_j < 0$.
        other: mean absolute cosine with the other mean.
    """

    aligned: float
    own: float
    other: float


def alignment(weight: Tensor, a: Tensor, means: Tensor) -> Alignment:
    """How far the neurons of a two-layer network point to the mean of their own class.

    Args:
        weight: hidden weights `[m, p]`.
        a: output weights `[m]`, whose signs say which class a neuron speaks for.
        means: orthogonal means $\\mu_1$ of the positive and $\\mu_2$ of the negative class, `[2, p]`.

    Raises:
        ValueError: on shapes that do not fit, values that are not finite, and neurons or means of norm 0.
    """
    if weight.dim() != 2 or a.shape != weight.shape[:1] or means.shape != (2, weight.shape[1]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, a, means))
        raise ValueError(f"expected weight [m, p], a [m] and means [2, p], got {shapes}")
    for name, tensor in (("weight", weight), ("a", a), ("means", means)):
        finite(name, tensor)
    norm = means.norm(dim=1, keepdim=True)
    if not (norm > 0).all():
        raise ValueError(f"expected means of a norm above 0, got {norm.flatten().tolist()}")
    return alignment_of(weight @ (means / norm).T, weight.norm(dim=1), a)


def alignment_of(along: Tensor, norm: Tensor, a: Tensor) -> Alignment:
    """`alignment` from the neurons' coordinates along both means `[m, 2]`, and their norms `[m]`."""
    if not (norm > 0).all():
        raise ValueError(f"expected neurons of a norm above 0, got {float(norm.min())}")
    cosine = along.abs() / norm[:, None]
    own, other = torch.where((a > 0)[:, None], cosine, cosine.flip(1)).unbind(1)
    return Alignment(float((own > other).double().mean()), float(own.mean()), float(other.mean()))


@torch.no_grad()
def odd_energy(f: Callable[[Tensor], Tensor], x: Tensor, *, batch_size: int = 1024) -> float:
    """Share of the odd part in the energy of a function, from 0 (even) to 1 (odd, as every linear function is).

    $$\\frac{E[((f(x) - f(-x)) / 2)^2]}{E[(f(x)^2 + f(-x)^2) / 2]}$$

    An odd classifier is right on exactly half of the points where the label is even, as it is in XOR.

    Args:
        f: network, which answers in evaluation mode and is left as it was, or another function of a batch. The energies
            of several outputs are added.
        x: inputs `[N, ...]`, drawn from a distribution that is symmetric about 0.
        batch_size: number of inputs at a time.

    Raises:
        ValueError: if there are no inputs, they or the outputs are not finite, or all outputs are 0.
    """
    if not len(x):
        raise ValueError("expected at least one input, got none")
    whole("batch_size", batch_size, 1)
    finite("x", x)
    if isinstance(f, nn.Module):
        with evaluating(f):
            return _odd_energy(f, x, batch_size)
    return _odd_energy(f, x, batch_size)


def _odd_energy(f: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> float:
    parts = [(f(part), f(-part)) for part in x.split(batch_size)]
    return odd_energy_of(*(torch.cat(side) for side in zip(*parts, strict=True)))


def odd_energy_of(plus: Tensor, minus: Tensor) -> float:
    """`odd_energy` from outputs at $x$ and at $-x$."""
    finite("outputs", plus)
    finite("outputs at -x", minus)
    scale = max(float(plus.abs().max()), float(minus.abs().max()))
    if not scale:
        raise ValueError("expected outputs that are not all 0: a function that is 0 has no odd or even part")
    # Divided first, since squares of tiny outputs would vanish.
    plus, minus = plus.double() / scale, minus.double() / scale
    return float(((plus - minus) / 2).square().sum() / ((plus.square() + minus.square()) / 2).sum())


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory(Shown):
    """What was seen of a network on XOR clusters during gradient descent.

    Attributes:
        frame: row of diagnostics for each step (the index). `loss`; `train_accuracy` on the labels trained on and
            `train_clean_accuracy`; `flipped_margin`, the smallest $y f(x)$ among flipped points (NaN without any). With
            test data `test_accuracy` on clean labels, `test_noisy_accuracy`, as expected on labels as noisy as the
            training's, and `odd_energy`. For clusters `aligned`, `own_cosine`, `other_cosine`, see `Alignment`.
        neurons: coordinates of the neurons along $\\mu_1$ and $\\mu_2$, `[rows, m, 2]`; no rows for other data.
        a: output weights at the last step, `[m]`.
    """

    frame: pd.DataFrame
    neurons: Tensor
    a: Tensor

    def to_frame(self) -> pd.DataFrame:
        """The diagnostics, a row for each step."""
        return self.frame

    @property
    def fit_time(self) -> int | None:
        """First step at which every training label is fitted; `None` if there is none."""
        return grokking_time(self, 1.0, column="train_accuracy")

    def plot(self, steps: Sequence[int] = ()) -> Figure:
        """Accuracies and odd energy over steps, and the neurons in the plane of the means at chosen steps.

        Args:
            steps: steps of the run at which to show the neurons, coloured by the sign of $a_j$.

        Raises:
            ValueError: if a step was not run or the data have no means.
        """
        import matplotlib.pyplot as plt

        rows = list(self.frame.index)[: len(self.neurons)]
        for step in steps:
            one_of("step", step, rows)
        width = 4 + 3 * len(steps)
        figure, grid = plt.subplots(1, 1 + len(steps), figsize=(width, 3.6), layout="constrained", squeeze=False)
        curves, planes = grid[0, 0], grid[0, 1:]
        for column in ("train_accuracy", "test_accuracy", "odd_energy"):
            if column in self.frame:
                curves.plot(self.frame.index, self.frame[column], marker=".", label=column.replace("_", " "))
        curves.set(xscale="symlog", xlabel="step", ylim=(-0.03, 1.03))
        curves.legend()
        for ax, step in zip(planes, steps, strict=True):
            points = self.neurons[rows.index(step)].numpy()
            ax.scatter(*points.T, c=["C0" if a > 0 else "C3" for a in self.a], s=8)
            limits = (-1.1 * abs(points).max(), 1.1 * abs(points).max())
            ax.set(title=f"step {step}", xlabel="along μ₁", ylabel="along μ₂", xlim=limits, ylim=limits)
        return figure


def grokking_time(
    trajectory: Trajectory | pd.DataFrame, threshold: float = 0.95, *, column: str = "test_accuracy"
) -> int | None:
    """First step at which the test accuracy reaches a threshold; `None` if it never does.

    Args:
        trajectory: run, or any table whose index is the step.
        threshold: accuracy in (0, 1].
        column: name of the accuracy to look at.

    Raises:
        ValueError: if there is no such column or the threshold is out of range.
    """
    frame = trajectory.frame if isinstance(trajectory, Trajectory) else trajectory
    between("threshold", threshold, 0, 1, inclusive=(False, True))
    one_of("column", column, list(frame.columns))
    reached = (frame[column] >= threshold).to_numpy().nonzero()[0]
    return int(frame.index[reached[0]]) if len(reached) else None
