"""Errors of classifiers by the number of samples they are fitted to, and where one overtakes another.

Simulation and measurements of Zheng et al., "Revisiting Discriminative vs. Generative Classifiers: Theory and
Implications", ICML 2023, https://arxiv.org/abs/2302.02334.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, logsumexp
from sklearn.base import clone
from torch import Tensor

from torchfolio.adaptation.class_sums import as_numpy
from torchfolio.checks import finite, one_of, same_length, whole

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["LearningCurve", "crossover", "gaussian_mixture", "learning_curve", "samples_to_reach"]

Array = NDArray[np.float64]
_DRAWS = 100  # of a subset, before the numbers of its classes' rows are drawn first


@dataclass(frozen=True)
class LearningCurve:
    """Test errors by number of samples.

    Attributes:
        sizes: numbers of samples, increasing, `[I]`.
        errors: test error of each subset, `[I, R]`; NaN where a size has fewer subsets than others.
    """

    sizes: NDArray[np.int64]
    errors: Array

    @property
    def mean(self) -> Array:
        """Mean error over subsets, `[I]`."""
        return np.nanmean(self.errors, 1)

    @property
    def spread(self) -> Array:
        """Standard deviation over subsets, `[I]`."""
        return np.nanstd(self.errors, 1)

    def to_frame(self) -> DataFrame:
        """A row a size: `mean`, `spread` and `subsets`, by `size`."""
        import pandas as pd

        count = np.isfinite(self.errors).sum(1)
        columns = {"size": self.sizes, "mean": self.mean, "spread": self.spread, "subsets": count}
        return pd.DataFrame(columns).set_index("size")


def learning_curve(
    X: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    X_test: ArrayLike | Tensor,
    y_test: ArrayLike | Tensor,
    sizes: Sequence[int],
    repeats: int | Sequence[int],
    heads: Mapping[str, Any],
    *,
    seed: int = 0,
) -> dict[str, LearningCurve]:
    """Test errors of classifiers that are fitted to random subsets of the samples.

    All get the same subsets. A subset is drawn again until it holds every class: small ones are more balanced than
    chance, and their errors are those under that condition. A `NaiveBayesProbe` is fitted to all subsets in one
    batched pass, others one by one.

    Args:
        X: features `[M, n]` to draw from, array or tensor.
        y: labels `[M]`.
        X_test: features `[T, n]`.
        y_test: labels `[T]`, of the same classes.
        sizes: numbers of samples, each from the number of classes to M.
        repeats: number of subsets of every size, or of each.
        heads: scikit-learn classifiers by name. They are copied; anything that must be fitted to the subset alone,
            such as a scaler, belongs in a pipeline.
        seed: number that the subsets depend on.

    Returns:
        A curve for each head, its sizes sorted.

    Raises:
        ValueError: on shapes that do not fit, features that are not finite, sizes out of range, labels of the test
            samples that are not among the others.

    Example:
        >>> from torchfolio.adaptation.naive_bayes_probe import NaiveBayesProbe
        >>> X, y = gaussian_mixture(20, 2, 400, seed=0)
        >>> learning_curve(X[:200], y[:200], X[200:], y[200:], [4, 50], 3, {"nb": NaiveBayesProbe()})["nb"].sizes
        array([ 4, 50])
    """
    same_length(X=X, y=y)  # pyright: ignore[reportArgumentType]
    same_length(X_test=X_test, y_test=y_test)  # pyright: ignore[reportArgumentType]
    rows, test = _rows("X", X), _rows("X_test", X_test)
    if rows.shape[1] != test.shape[1]:
        raise ValueError(f"expected X_test of {rows.shape[1]} features, got {test.shape[1]}")
    classes, codes = np.unique(as_numpy(y), return_inverse=True)
    labels = as_numpy(y_test)
    test_codes = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    if (classes[test_codes] != labels).any():
        raise ValueError("expected test labels among those of y, got others")
    if not heads:
        raise ValueError("expected at least one head, got none")
    counts = [repeats] * len(sizes) if isinstance(repeats, int) else list(repeats)
    same_length(sizes=sizes, repeats=counts)
    if not counts:
        raise ValueError("expected at least one size, got none")
    order = np.argsort(np.asarray(sizes), kind="stable")
    sizes, counts = [sizes[i] for i in order], [whole("repeats", counts[i], 1) for i in order]
    rng = np.random.default_rng(seed)
    subsets = [_subset(rng, codes, len(classes), m) for m, r in zip(sizes, counts, strict=True) for _ in range(r)]
    curves = {}
    for name, head in heads.items():
        flat = _errors(head, rows, codes, subsets, test, test_codes)
        errors = np.full((len(sizes), max(counts)), np.nan)
        errors[np.arange(max(counts)) < np.array(counts)[:, None]] = flat
        curves[name] = LearningCurve(np.array(sizes, dtype=np.int64), errors)
    return curves


def _subset(rng: Generator, codes: NDArray[Any], K: int, size: int) -> NDArray[np.int64]:
    """Rows of a random subset that holds every class."""
    whole("a size", size, K, len(codes))
    for _ in range(_DRAWS):
        rows = rng.choice(len(codes), size, replace=False)
        if len(np.unique(codes[rows])) == K:
            return rows
    members = [np.flatnonzero(codes == k) for k in range(K)]
    counts = _counts(rng, [len(part) for part in members], size)
    return np.concatenate([rng.choice(part, c, replace=False) for part, c in zip(members, counts, strict=True)])


def _counts(rng: Generator, available: list[int], size: int) -> list[int]:
    """Rows of each class in a random subset, given that it holds every class, where drawing again takes too long.

    `ways[k][r]`: logarithm of the number of subsets of r rows of the classes from k on that hold all of them.
    """
    r = np.arange(size + 1)
    ways = [np.where(r == 0, 0.0, -np.inf)]
    choices = []
    for M in reversed(available):
        c = r[1 : min(M, size) + 1]
        choices.append(gammaln(M + 1) - gammaln(c + 1) - gammaln(M - c + 1))
        shifted = np.full((len(c), size + 1), -np.inf)
        for i, count in enumerate(c):
            shifted[i, count:] = choices[-1][i] + ways[-1][: size + 1 - count]
        ways.append(logsumexp(shifted, axis=0))
    counts = []
    for k in range(len(available), 0, -1):
        log = choices[k - 1][:size] + ways[k - 1][size - r[1 : len(choices[k - 1]) + 1]]
        counts.append(int(rng.choice(len(log), p=np.exp(log - logsumexp(log)))) + 1)
        size -= counts[-1]
        r = r[: size + 1]
        choices = [part[:size] for part in choices]
    return counts


def _errors(head: Any, rows: Tensor, codes: Any, subsets: list[Any], test: Tensor, test_codes: Any) -> Array:
    if hasattr(head, "subset_errors") and getattr(head, "variance", None) == "shared":
        device = rows.device
        on = [torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (codes, test_codes)]
        indices = [torch.from_numpy(s).to(device) for s in subsets]
        copied: Any = clone(head)
        return copied.subset_errors(rows, on[0], indices, test.to(device), on[1])
    X, X_test = rows.cpu().numpy(), test.cpu().numpy()
    errors = []
    for subset in subsets:
        copied: Any = clone(head)
        errors.append(np.mean(copied.fit(X[subset], codes[subset]).predict(X_test) != test_codes))
    return np.array(errors)


def samples_to_reach(curve: LearningCurve, target: float) -> int | None:
    """The first size whose mean error is below the target; `None` if no size's is.

    Args:
        curve: errors by size.
        target: error to get below, such as the Bayes error + 0.01.
    """
    finite("target", target)
    below = np.flatnonzero(curve.mean < target)
    return int(curve.sizes[below[0]]) if len(below) else None


def crossover(curve_a: LearningCurve, curve_b: LearningCurve) -> float | None:
    """The number of samples where the better of two classifiers changes; `None` if it never does.

    Between two sizes the difference of the mean errors is taken as linear in the logarithm of the size. Of several
    changes it is the first; sizes at which both are equally good decide nothing.

    Args:
        curve_a: errors of one.
        curve_b: errors of the other, at the same sizes.

    Raises:
        ValueError: if the sizes differ.
    """
    if not np.array_equal(curve_a.sizes, curve_b.sizes):
        raise ValueError(f"expected curves of the same sizes, got {curve_a.sizes} and {curve_b.sizes}")
    difference, size = curve_a.mean - curve_b.mean, np.log(curve_a.sizes)
    decided = np.flatnonzero(difference)
    for i, j in zip(decided, decided[1:], strict=False):
        if difference[i] * difference[j] < 0:
            share = difference[i] / (difference[i] - difference[j])
            return float(math.exp(size[i] + share * (size[j] - size[i])))
    return None


def gaussian_mixture(
    n: int, K: int, m: int, cov: Literal["easy", "hard"] = "easy", *, seed: int = 0
) -> tuple[Array, NDArray[np.int64]]:
    """Samples of K equally likely Gaussian classes with a common covariance, on which the paper simulates.

    Class centres are $c_k (1, …, 1)$ with $c_0 = -1$, $c_k = 2^{k-1}$; the first $\\lfloor n/2 \\rfloor$ features have
    variance n, the others 1. For $K > 2$ all is shifted by $-2^{K-3}$ and divided by $2^{K-3}$.

    Args:
        n: features, at least 1.
        K: classes, at least 2.
        m: samples, at least 1.
        cov: `"easy"`, a diagonal covariance, naive Bayes's own; or `"hard"`, with the same diagonal and the
            correlations of $A^\\top A$, where A is n x n and uniform in [-1, 1].
        seed: number that samples and A depend on.

    Returns:
        X `[m, n]` in float64 and y `[m]`.

    Reference:
        Zheng et al., ICML 2023, simulation. Off-diagonal entries of $A^\\top A$ itself beside this diagonal, as the
        authors' code takes them, are no covariance; correlations are.
    """
    n, K, m = whole("n", n, 1), whole("K", K, 2), whole("m", m, 1)
    one_of("cov", cov, ("easy", "hard"))
    rng = np.random.default_rng(seed)
    deviation = np.where(np.arange(n) < n // 2, math.sqrt(n), 1.0)
    centre = np.array([-1.0, *(2.0**k for k in range(K - 1))])
    y = rng.integers(K, size=m)
    noise = rng.standard_normal((m, n))
    if cov == "hard":
        mixing = rng.uniform(-1, 1, (n, n))  # rows of noise @ A have covariance A^T A
        noise = noise @ (mixing / np.linalg.norm(mixing, axis=0))
    X = centre[y][:, None] + noise * deviation
    if K > 2:
        X = (X - 2.0 ** (K - 3)) / 2.0 ** (K - 3)
    return X, y


def _rows(name: str, X: Any) -> Tensor:
    rows = X.detach() if isinstance(X, Tensor) else torch.from_numpy(np.asarray(X, dtype=np.float64))
    if rows.dim() != 2 or not rows.numel():
        raise ValueError(f"expected {name} to be features [N, n] of one sample or more, got shape {tuple(rows.shape)}")
    return finite(name, rows.cpu() if rows.device.type == "mps" else rows).double()
