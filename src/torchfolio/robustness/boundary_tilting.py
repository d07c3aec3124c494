"""Boundary tilting: whether a classifier's adversarial examples buy it accuracy, or come of a boundary that leans
against the data for nothing.

Thomas Tanay, Lewis Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", 2016,
https://arxiv.org/abs/1608.07690.

For two classes with centroids i, j and a linear classifier $\\operatorname{sign}(c \\cdot x + c_0)$, $\\lVert c\\rVert =
1$, the deviation angle $\\delta$ lies between c and $z = (j - i) / \\lVert j - i\\rVert$, the nearest-centroid
classifier. `analyse` measures it for a fitted linear estimator or a network, `RidgePath` and `regularisation_path`
along a path of classifiers, and `tilt` leans a boundary on purpose. Wherever labels are of two kinds, the smaller one
is class I, the larger J, and classifiers are positive on J. Angles are in degrees.

Longer than most for the panel of `torchfolio inspect`, which must stand where the paper's names do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from torchfolio.checks import finite, same_length, whole
from torchfolio.data.examples import Examples
from torchfolio.measure import Analysis, Panel
from torchfolio.robustness.linear_weights import places, weights
from torchfolio.robustness.local_tilting import distances_and_gradients
from torchfolio.robustness.tilting_geometry import (
    Array,
    TwoClasses,
    adversarial_strength,
    angle_between,
    bias_of,
    deviation_angle,
    flat,
    gaussian_error,
    mirror,
    nearest_centroid,
    numpy_of,
    project,
    tilt,
    tilt_direction,
    tilt_to_data,
    unit,
)
from torchfolio.robustness.tilting_path import RidgePath, pareto, plot_path, regularisation_path, taxonomy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = [
    "BoundaryAngles",
    "RidgePath",
    "TiltReport",
    "adversarial_strength",
    "analyse",
    "deviation_angle",
    "gaussian_error",
    "mirror",
    "nearest_centroid",
    "pareto",
    "plot_mirrors",
    "plot_path",
    "project",
    "regularisation_path",
    "taxonomy",
    "tilt",
    "tilt_direction",
    "tilt_to_data",
]


@dataclass(frozen=True)
class TiltReport:
    """What `analyse` found of a classifier and two classes.

    Attributes:
        classes: two labels, I and J.
        angle: deviation angle in degrees; of a network, the median over samples.
        strength: adversarial strength of signed distances, $1 / \\cos\\delta$; of a network, the median over samples of
            half the centroids' distance over the distance to the boundary.
        strength_unsigned: strength of the mean unsigned distance, both classes weighing the same.
        errors: share of wrong answers in I and in J, between the two classes.
        distances: mean distance to the boundary in I and in J, negative on the wrong side.
        centroids: i and j, `[2, ...]` in the shape of a sample (or of a layer's features).
        mirrors: mean mirror images of I and of J, `[2, ...]`; of a network, with the boundary where the attack met it.
        angles: deviation angle of every sample `[N]`; of a linear classifier there is one.
        strengths: strength of every sample `[N]`; likewise.
        reached: share of the samples from which the boundary was reached; 1 for a linear classifier.
    """

    classes: tuple[Any, Any]
    angle: float
    strength: float
    strength_unsigned: float
    errors: tuple[float, float]
    distances: tuple[float, float]
    centroids: Array = field(repr=False)
    mirrors: Array = field(repr=False)
    angles: Array = field(repr=False)
    strengths: Array = field(repr=False)
    reached: float = 1.0

    def quartiles(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Quartiles of the angles and of the strengths over samples."""
        both = [np.nanquantile(values, (0.25, 0.5, 0.75)).tolist() for values in (self.angles, self.strengths)]
        return tuple(both[0]), tuple(both[1])

    def to_frame(self) -> DataFrame:
        """One row with the numbers."""
        import pandas as pd

        (low, _, high), (weak, _, strong) = self.quartiles()
        row = {
            "class_i": self.classes[0], "class_j": self.classes[1], "angle": self.angle, "angle_q1": low,
            "angle_q3": high, "strength": self.strength, "strength_q1": weak, "strength_q3": strong,
            "strength_unsigned": self.strength_unsigned, "error_i": self.errors[0], "error_j": self.errors[1],
            "distance_i": self.distances[0], "distance_j": self.distances[1], "reached": self.reached,
        }  # fmt: skip
        return pd.DataFrame([row])


def analyse(
    model: Any,
    X: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    classes: tuple[Any, Any] | None = None,
    *,
    layer: str | None = None,
    steps: int = 50,
    batch_size: int = 512,
) -> TiltReport:
    """Measure how far a classifier's boundary between two classes leans away from the nearest-centroid one.

    A linear classifier, of which $w_b - w_a$ and the biases' difference are taken, is measured exactly: any fitted
    scikit-learn classifier whose decision function is linear in X, pipelines included, or an `nn.Linear` with X its
    features. Any other network is measured sample by sample: the angle is that of $\\nabla_x (z_b - z_a)$, and the
    distance to its boundary that of a minimal $L_2$ attack. The network is left as it was.

    Args:
        model: fitted classifier.
        X: samples `[N, ...]`; those of other classes are left out.
        y: labels `[N]`; of a network, places of its outputs.
        classes: pair (a, b), I and J; the two labels of y by default.
        layer: dotted name of a module of the network, whose output takes the place of the input.
        steps: maximum number of steps of the attack.
        batch_size: samples that a network sees at a time.

    Raises:
        ValueError: if the pair is not two classes that both occur, centroids coincide, a sample is not finite, or the
            difference of weights is 0.
        TypeError: if the estimator's decision is not linear.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.linear_model import RidgeClassifier
        >>> X, y = load_digits(return_X_y=True)
        >>> report = analyse(RidgeClassifier(alpha=1.0).fit(X, y), X, y, classes=(3, 7))
        >>> 0 < report.angle < 90 and report.strength > 1
        True
    """
    labels = numpy_of(y)
    same_length(X=X, y=labels)  # pyright: ignore[reportArgumentType]
    if classes is None:
        kinds = np.unique(labels)
        if len(kinds) != 2:
            raise ValueError(f"expected classes, the pair to look at, as y has {len(kinds)} labels")
        classes = (kinds[0].item(), kinds[1].item())
    if len(classes) != 2 or classes[0] == classes[1]:
        raise ValueError(f"expected classes to be two different labels, got {classes!r}")
    chosen = np.flatnonzero((labels == classes[0]) | (labels == classes[1]))
    upper = labels[chosen] == classes[1]
    if isinstance(model, nn.Module) and not (isinstance(model, nn.Linear) and layer is None):
        if not isinstance(X, Tensor) or not (X.is_floating_point() or layer):
            got = X.dtype if isinstance(X, Tensor) else type(X).__name__
            raise TypeError(f"expected X to be a tensor in floating point for a network, got {got}")
        rows = X[torch.from_numpy(chosen).to(X.device)]
        a, b = (whole("a class of a network", c, 0) for c in classes)
        return _local(model, rows, upper, (a, b), layer, steps, batch_size)
    samples = flat(X)[chosen]
    pair = TwoClasses.of(samples, upper)
    at = places(model, classes)
    w, b = weights(model, pair.X, *at)
    return _linear(pair, w, b, classes, tuple(numpy_of(X).shape[1:]))


def _linear(pair: TwoClasses, w: Array, b: float, classes: tuple[Any, Any], shape: tuple[int, ...]) -> TiltReport:
    c, bias = unit(w), bias_of(w, b)
    first, second = pair.distances(c, bias)
    angle = float(angle_between(c, pair.z))
    strength = 1 / float(c @ pair.z) if angle < 90 else math.nan
    images = mirror(pair.X, c, bias)
    means = np.stack([images[~pair.upper].mean(0), images[pair.upper].mean(0)])
    unsigned = float(pair.D / (np.abs(first).mean() + np.abs(second).mean()))
    return TiltReport(
        classes, angle, strength, unsigned, (float((first < 0).mean()), float((second <= 0).mean())),
        (float(first.mean()), float(second.mean())), np.stack([pair.i, pair.j]).reshape(2, *shape),
        means.reshape(2, *shape), np.array([angle]), np.array([strength]),
    )  # fmt: skip


def _local(
    model: nn.Module, X: Tensor, upper: Any, pair: tuple[int, int], layer: str | None, steps: int, batch_size: int
) -> TiltReport:
    finite("X", X)
    distances = distances_and_gradients(model, X, pair, layer=layer, steps=steps, batch_size=batch_size)
    points, shape = distances.points.flatten(1).double().cpu().numpy(), tuple(distances.points.shape[1:])
    data = TwoClasses.of(points, upper)
    gradient = distances.gradient.flatten(1).double().cpu().numpy()
    length = np.linalg.norm(gradient, axis=1)
    cosine = gradient @ data.z / np.where(length > 0, length, np.nan)
    sine = np.linalg.norm(gradient / np.where(length > 0, length, np.nan)[:, None] - cosine[:, None] * data.z, axis=1)
    angles = np.degrees(np.arctan2(sine, cosine))
    move = distances.move.flatten(1).double().cpu().numpy()
    reached = distances.reached.cpu().numpy()
    distance = np.where(reached, np.linalg.norm(move, axis=1), np.nan)
    side = distances.margin.double().cpu().numpy() * np.where(upper, 1, -1)
    signed = np.where(side > 0, distance, -distance)
    if reached.mean() < 1:
        warnings.warn(
            f"the boundary was not reached from {(~reached).sum()} of {len(reached)} samples, which are left out; take "
            "more steps",
            stacklevel=3,
        )
    strengths = data.D / 2 / np.where(distance > 0, distance, np.nan)
    halves = [~upper, upper]
    means = [np.nanmean(signed[h]) if reached[h].any() else math.nan for h in halves]
    unsigned = [np.nanmean(distance[h]) if reached[h].any() else math.nan for h in halves]
    images = np.stack(
        [(points + 2 * move)[h & reached].mean(0) if (h & reached).any() else data.i * np.nan for h in halves]
    )
    median = float(np.nanmedian(strengths)) if np.isfinite(strengths).any() else math.nan
    return TiltReport(
        pair, float(np.nanmedian(angles)) if np.isfinite(angles).any() else math.nan, median,
        float(data.D / (unsigned[0] + unsigned[1])), (float((side[~upper] <= 0).mean()), float((side[upper] <= 0).mean())),
        (float(means[0]), float(means[1])), np.stack([data.i, data.j]).reshape(2, *shape), images.reshape(2, *shape),
        angles, strengths, float(reached.mean()),
    )  # fmt: skip


class BoundaryAngles(Analysis):
    """Deviation angles and adversarial strengths of a network, between every class and the one whose centroid is nearest.

    Args:
        most: maximum number of pairs of classes, those with the nearest centroids.
        examples: maximum number of examples of a class.
        steps: maximum number of steps to the boundary; see `torchfolio.robustness.boundary_tilting.analyse`.

    Reference:
        Tanay and Griffin, arXiv 1608.07690, by the local version of `analyse`.
    """

    def __init__(self, most: int = 6, examples: int = 40, steps: int = 20) -> None:
        self.most, self.examples, self.steps = (
            whole("most", most, 1),
            whole("examples", examples, 2),
            whole("steps", steps, 1),
        )

    def look(self, *models: nn.Module, data: Examples, layers: Sequence[str] = (), seed: int = 0) -> Panel:
        import matplotlib.pyplot as plt
        import pandas as pd

        x, y = torch.cat([row[0] for row in data.batches()]), data.labels
        if y is None or not x.is_floating_point() or len(torch.unique(y)) < 2:
            raise ValueError(
                "How its boundaries lean is not shown: it needs inputs in floating point and two classes or more."
            )
        pairs = self._pairs(x, y)
        reports = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said by the column `reached`
            for pair in pairs:
                rows = torch.cat([(y == c).nonzero()[: self.examples, 0] for c in pair])
                reports[pair] = analyse(models[0], x[rows], y[rows], pair, steps=self.steps)
        table = pd.DataFrame(
            [{"class": self.named(i), "next": self.named(j), "angle, degrees": r.angle, "strength": r.strength, "wrong, %": 50 * sum(r.errors),
              "reached, %": 100 * r.reached} for (i, j), r in reports.items()]
        )  # fmt: skip
        fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
        ax.boxplot([r.angles[np.isfinite(r.angles)] for r in reports.values()], showfliers=False)
        ax.set_xticks(range(1, len(reports) + 1), [f"{self.named(i)}\n{self.named(j)}" for i, j in reports])
        ax.set(ylabel="deviation angle, degrees", ylim=(0, 95))
        ax.axhline(90, c="grey", ls=":", lw=1)
        angle, strength = table["angle, degrees"].median(), table["strength"].median()
        sentences = [
            f"Between a class and its nearest one the network's direction of steepest change stands {angle:.0f} degrees from the "
            f"line that joins the two classes' means (median of {len(reports)} pairs); its boundary is "
            f"{strength:.1f} times nearer to an example than halfway to the other class's mean.",
            "Near 0 degrees a change must look like the other class to be called so. Near 90 a small change that looks like "
            "neither is enough: such adversarial examples buy no accuracy by themselves.",
        ]
        notes = []
        if min(r.reached for r in reports.values()) < 0.9:
            notes.append("From some examples the boundary was not reached; distances and strengths leave them out.")
        record = {"pairs": [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]}
        count = int(min(self.examples, min(int((y == c).sum()) for pair in pairs for c in pair)))
        return Panel("How do its boundaries lean?", sentences, notes, [table],
                     [(fig, "Deviation angles over examples, by pair of classes: median, quartiles, range.")], record,
                     f"boundary tilting, {count} examples of a class or more")  # fmt: skip

    def _pairs(self, x: torch.Tensor, y: torch.Tensor) -> list[tuple[int, int]]:
        """Every class with its nearest one, those nearest to each other first."""
        classes = [int(c) for c in torch.unique(y) if int((y == c).sum()) >= 2]
        if len(classes) < 2:
            raise ValueError("How its boundaries lean is not shown: it needs two examples of two classes.")
        means = torch.stack([x[y == c].flatten(1).mean(0) for c in classes])
        distance = torch.cdist(means.double(), means.double())
        distance.fill_diagonal_(torch.inf)
        nearest = sorted(
            (float(distance[k].min()), tuple(sorted((classes[k], classes[int(distance[k].argmin())]))))
            for k in range(len(classes))
        )
        return list(dict.fromkeys(pair for _, pair in nearest))[: self.most]  # pyright: ignore[reportReturnType]


def plot_mirrors(report: TiltReport, shape: tuple[int, int] | None = None) -> Figure:
    """Each class's centroid, its mean mirror image, and the other class's centroid, side by side.

    Args:
        report: result of `analyse` on images.
        shape: height and width of a picture, where samples were rows.
    """
    import matplotlib.pyplot as plt

    images = [np.squeeze(a.reshape(2, *shape) if shape else a) for a in (report.centroids, report.mirrors)]
    if images[0].ndim != 3:
        raise ValueError(f"expected images of one channel, or their shape, got samples of {report.centroids.shape[1:]}")
    (i, j), (mirror_i, mirror_j) = images
    shown = [(i, "centroid of I"), (mirror_i, "mirrored I"), (j, "centroid of J"), (mirror_j, "mirrored J")]
    fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
    for ax, (image, title) in zip(axes, shown, strict=True):
        ax.imshow(image, cmap="gray")
        ax.set_title(title)
        ax.axis("off")
    return fig
