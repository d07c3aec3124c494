"""Geometry of two classes and a linear boundary: angle to the nearest-centroid classifier, strength, mirrors, tilts.

Tanay and Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", 2016,
https://arxiv.org/abs/1608.07690. The smaller of two labels is class I, the larger J; classifiers are positive on J;
angles are in degrees.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from torch import Tensor

from torchfolio.checks import between, finite, one_of, same_length

__all__ = [
    "TwoClasses",
    "adversarial_strength",
    "angle_between",
    "deviation_angle",
    "gaussian_error",
    "mirror",
    "nearest_centroid",
    "project",
    "tilt",
    "tilt_direction",
    "tilt_to_data",
]

Array = NDArray[np.float64]
Along = Literal["trailing", "leading"]


def project(x: ArrayLike | Tensor, w: ArrayLike | Tensor, b: float) -> Any:
    """The nearest point of the boundary, $p(x) = x - (c \\cdot x + c_0)\\, c$.

    Args:
        x: points `[N, ...]`, array or tensor.
        w: weights, as many numbers as a point has, of any length but 0.
        b: bias.

    Returns:
        Points of the shape and kind of x.

    Raises:
        ValueError: if w is 0 or does not fit, or something is not finite.
    """
    return _moved(x, w, b, 1.0)


def mirror(x: ArrayLike | Tensor, w: ArrayLike | Tensor, b: float) -> Any:
    """The mirror image, $m(x) = x - 2 (c \\cdot x + c_0)\\, c$: of the other class, at the same confidence.

    Args:
        x: points `[N, ...]`, array or tensor.
        w: weights, as many numbers as a point has.
        b: bias.

    Returns:
        Points of the shape and kind of x. Mirrored again they are x.
    """
    return _moved(x, w, b, 2.0)


def nearest_centroid(X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> tuple[Array, float]:
    """The classifier between two centroids: w = z, and b puts the boundary through their middle.

    Args:
        X: samples `[N, ...]` of two classes.
        y: labels `[N]`, of two kinds.

    Raises:
        ValueError: if there are not two classes, the centroids coincide, or a sample is not finite.
    """
    pair = TwoClasses.of(X, y)
    return pair.z, float(-pair.z @ pair.middle)


def deviation_angle(w: ArrayLike | Tensor, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> Any:
    """Deviation angle $\\delta$ between a linear classifier and the nearest-centroid one.

    It is taken as $\\operatorname{atan2}(\\lVert c - (c \\cdot z) z\\rVert, c \\cdot z)$, which is exact near 0.

    Args:
        w: weights `[d]` of one classifier, or `[P, d]` of several.
        X: samples `[N, ...]` of two classes.
        y: labels `[N]`, of two kinds.

    Returns:
        Degrees, a number or `[P]`. Above 90, with a warning, for a classifier that is worse than chance.
    """
    angle = angle_between(unit(w), TwoClasses.of(X, y).z)
    return float(angle) if angle.ndim == 0 else angle


def adversarial_strength(
    w: ArrayLike | Tensor, b: float, X: ArrayLike | Tensor, y: ArrayLike | Tensor, signed: bool = True
) -> float:
    """Adversarial strength s: distance of the centroids over the mean distance of points to their mirror images.

    Both classes weigh the same. With distances that are negative on the wrong side of the boundary $s = 1 / \\cos\\delta$
    whatever the bias; with unsigned ones s is smaller, and equal if every point is classified rightly.

    Args:
        w: weights `[d]`.
        b: bias.
        X: samples `[N, ...]` of two classes.
        y: labels `[N]`, of two kinds.
        signed: whether distances have signs.

    Returns:
        s, at least 1 if signed; NaN, with a warning, for a classifier that is worse than chance.
    """
    pair, c = TwoClasses.of(X, y), unit(w)
    distance = pair.distances(c, bias_of(w, b))
    angle_between(c, pair.z)  # warns
    mean = distance if signed else [np.abs(d) for d in distance]
    if signed and c @ pair.z < 0:
        return math.nan
    return float(pair.D / (mean[0].mean() + mean[1].mean()))


def gaussian_error(w: ArrayLike | Tensor, b: float, i: ArrayLike, j: ArrayLike, covariance: ArrayLike) -> float:
    """Error of a linear classifier on two equally likely classes $N(i, \\Sigma)$ and $N(j, \\Sigma)$.

    $$\\frac12 \\Phi\\Bigl(\\frac{c \\cdot i + c_0}{\\sqrt{c^\\top \\Sigma c}}\\Bigr) + \\frac12 \\Phi\\Bigl(-\\frac{c \\cdot j +
    c_0}{\\sqrt{c^\\top \\Sigma c}}\\Bigr),$$

    which is $\\Phi(-\\frac12 c \\cdot (j - i) / \\sqrt{c^\\top \\Sigma c})$ for a boundary through the middle.
    """
    c, bias = unit(w), bias_of(w, b)
    deviation = math.sqrt(c @ np.asarray(covariance, dtype=np.float64) @ c)
    first, second = (c @ np.asarray(mean, dtype=np.float64) + bias for mean in (i, j))
    return float(norm.cdf(first / deviation) + norm.cdf(-second / deviation)) / 2


def tilt(
    w: ArrayLike | Tensor, b: float, direction: ArrayLike | Tensor, angle: float, mean: ArrayLike | Tensor
) -> tuple[Array, float]:
    """Lean a boundary by an angle towards a direction, about a point.

    $$c_\\theta = \\cos\\theta\\, c + \\sin\\theta\\, t, \\qquad c_{0\\theta} = \\cos\\theta\\, c_0 - \\sin\\theta\\, (t \\cdot \\mu)$$

    Where the data do not vary along t, decision values are those of c times $\\cos\\theta$: no prediction changes, and
    $\\cos\\delta_\\theta = \\cos\\theta \\cos\\delta$ if t is orthogonal to z as well.

    Args:
        w: weights `[d]`.
        b: bias.
        direction: t `[d]`; the part of it that is orthogonal to w counts, at length 1.
        angle: $\\theta$ in degrees, from -90 to 90.
        mean: $\\mu$ `[d]`, such as the mean of all samples.

    Returns:
        $c_\\theta$ `[d]`, of length 1, and $c_{0\\theta}$.

    Raises:
        ValueError: if the direction is along w, or the angle is out of range.
    """
    theta = math.radians(between("angle", angle, -90, 90))
    c, t, mu = unit(w), unit(direction), flat(mean).reshape(-1)
    rest = t - (t @ c) * c
    if not np.linalg.norm(rest) > 1e-10:
        raise ValueError("expected a direction that is not along w, got one that is")
    t = rest / np.linalg.norm(rest)
    return math.cos(theta) * c + math.sin(theta) * t, math.cos(theta) * bias_of(w, b) - math.sin(theta) * float(t @ mu)


def tilt_direction(
    w: ArrayLike | Tensor, X: ArrayLike | Tensor, y: ArrayLike | Tensor, along: Along = "trailing"
) -> Array:
    """A direction to tilt along: a principal one of the data within classes.

    Args:
        w: weights `[d]` of the classifier that is to be tilted.
        X: samples `[N, ...]` of two classes.
        y: labels `[N]`, of two kinds.
        along: `"trailing"`, of least variance among those orthogonal to w and z, which has none at all where the data
            leave a direction out; or `"leading"`, of most variance among those orthogonal to w.

    Returns:
        A unit vector `[d]`.

    Raises:
        ValueError: if d leaves no such direction.
    """
    one_of("along", along, ("trailing", "leading"))
    pair, c = TwoClasses.of(X, y), unit(w)
    out = np.stack([c, pair.z] if along == "trailing" else [c], 1)
    basis, size, _ = np.linalg.svd(out)
    rank = int((size > 1e-10).sum())
    if len(c) <= rank:
        raise ValueError(f"expected more than {rank} features to tilt along, got {len(c)}")
    free = basis[:, rank:]
    rows = pair.within @ free
    _, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    return free @ vectors[:, 0 if along == "trailing" else -1]


def tilt_to_data(
    w: ArrayLike | Tensor,
    b: float,
    X: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    angle: float,
    *,
    along: Along = "trailing",
) -> tuple[Array, float]:
    """Tilt a classifier along a principal direction of the data, about their mean; see `tilt` and `tilt_direction`."""
    return tilt(w, b, tilt_direction(w, X, y, along), angle, flat(X).mean(0))


@dataclass(frozen=True)
class TwoClasses:
    """Samples of two classes `[N, d]` and what they have in common."""

    X: Array
    upper: NDArray[np.bool_]
    classes: NDArray[Any]
    i: Array
    j: Array
    z: Array
    D: float

    @staticmethod
    def of(X: Any, y: Any) -> TwoClasses:
        rows, labels = flat(X), numpy_of(y)
        if labels.ndim != 1:
            raise ValueError(f"expected labels [N], got shape {labels.shape}")
        same_length(X=rows, y=labels)
        classes = np.unique(labels)
        if len(classes) != 2:
            raise ValueError(f"expected samples of two classes, got {len(classes)}")
        upper = labels == classes[1]
        i, j = rows[~upper].mean(0), rows[upper].mean(0)
        D = float(np.linalg.norm(j - i))
        if D / max(1.0, float(np.abs(rows).max())) <= 1e-12:
            raise ValueError("expected classes with different centroids, they coincide")
        return TwoClasses(rows, upper, classes, i, j, (j - i) / D, D)

    @property
    def middle(self) -> Array:
        return (self.i + self.j) / 2

    @property
    def within(self) -> Array:
        return self.X - np.where(self.upper[:, None], self.j, self.i)

    def distances(self, c: Array, bias: float) -> tuple[Array, Array]:
        """Distances to a boundary of I and of J, positive on the right side."""
        value = self.X @ c + bias
        return -value[~self.upper], value[self.upper]


def _moved(x: Any, w: Any, b: float, factor: float) -> Any:
    rows, c = flat(x), unit(w)
    if c.ndim != 1 or rows.shape[1] != len(c):
        raise ValueError(f"expected weights of {rows.shape[1]} numbers, got shape {numpy_of(w).shape}")
    moved = rows - factor * (rows @ c + bias_of(w, b))[:, None] * c
    if isinstance(x, Tensor):
        dtype = x.dtype if x.is_floating_point() else torch.float32
        return torch.from_numpy(moved).to(x.device, dtype).view(x.shape)
    return moved.reshape(np.shape(x))


def unit(w: Any) -> Array:
    """Weights `[d]` or `[P, d]` at length 1."""
    weight = finite("w", numpy_of(w).astype(np.float64))
    weight = weight if weight.ndim == 2 else weight.reshape(-1)
    length = np.linalg.norm(weight, axis=-1, keepdims=True)
    if not (length > 0).all():
        raise ValueError("expected weights other than 0")
    return weight / length


def bias_of(w: Any, b: float) -> float:
    """The bias that goes with weights of length 1."""
    return float(finite("b", float(b))) / float(np.linalg.norm(numpy_of(w).astype(np.float64)))


def angle_between(c: Array, z: Array) -> Array:
    """Angle in degrees between weights `[..., d]` and a direction `[d]`, both of norm 1; warns above 90."""
    if c.shape[-1] != len(z):
        raise ValueError(f"expected weights of {len(z)} numbers, got {c.shape[-1]}")
    cosine = c @ z
    sine = np.linalg.norm(c - cosine[..., None] * z, axis=-1)
    if (cosine < 0).any():
        warnings.warn("a classifier is worse than chance: its angle is above 90 degrees", stacklevel=3)
    return np.degrees(np.arctan2(sine, cosine))


def upper_of(y: Any, classes: NDArray[Any]) -> NDArray[np.bool_]:
    labels = numpy_of(y)
    if not np.isin(labels, classes).all():
        raise ValueError(f"expected labels among {classes}, got others")
    return labels == classes[1]


def flat(X: Any) -> Array:
    rows = numpy_of(X)
    if rows.ndim < 1 or not rows.size:
        raise ValueError(f"expected samples [N, ...], got shape {rows.shape}")
    rows = rows.astype(np.float64).reshape(len(rows), -1) if rows.ndim > 1 else rows.astype(np.float64)
    return finite("the samples", rows)


def numpy_of(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
    return np.asarray(values)
