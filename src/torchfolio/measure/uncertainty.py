"""How sure a mean over seeds, or any statistic of a sample, is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from torchfolio.checks import between


class Interval(NamedTuple):
    """A confidence interval.

    Attributes:
        low: lower end.
        high: upper end.
    """

    low: float
    high: float


def standard_error(values: ArrayLike) -> float:
    """Standard error of the mean, $s / \\sqrt{n}$ with the standard deviation over $n - 1$.

    Args:
        values: `[n]`, one for each independent repetition. For two conditions on the same seeds, pass the
            differences.

    Raises:
        ValueError: on fewer than two values or values that are not finite.
    """
    sample = _sample(values)
    return float(sample.std(ddof=1) / len(sample) ** 0.5)


def confidence_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Student's interval of the mean, right for few repetitions with roughly normal values.

    Args:
        values: `[n]`.
        level: level of confidence, in (0, 1).

    Raises:
        ValueError: on fewer than two values, values that are not finite, or a level out of range.
    """
    from scipy.stats import t

    sample = _sample(values)
    margin = t.ppf(0.5 + _level(level) / 2, len(sample) - 1) * standard_error(sample)
    return Interval(float(sample.mean() - margin), float(sample.mean() + margin))


def bootstrap_interval(
    *samples: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    resamples: int = 9_999,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval (bias-corrected and accelerated) of a statistic.

    Args:
        *samples: `[n]`; several are paired and resampled together.
        statistic: statistic of the samples, for example `lambda a, b: np.corrcoef(a, b)[0, 1]`.
        level: level of confidence, in (0, 1).
        resamples: number of resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: on samples of different lengths, fewer than two values, values that are not finite, or a
            level out of range.

    Reference:
        Efron, "Better Bootstrap Confidence Intervals", JASA 1987.
    """
    from scipy.stats import bootstrap

    arrays = [_sample(s) for s in samples]
    if not arrays or len({len(a) for a in arrays}) > 1:
        raise ValueError(f"expected samples of one length, got {[len(a) for a in arrays] or 'none'}")
    result = bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=resamples,
        confidence_level=_level(level),
        rng=np.random.default_rng(seed),
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))


def _level(level: float) -> float:
    return between("level", level, 0, 1, inclusive=False)


def _sample(values: ArrayLike | Sequence[float]) -> np.ndarray:
    if isinstance(values, Tensor):  # of any device and type, bfloat16 too
        values = values.detach().double().cpu().numpy()
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2:
        raise ValueError(f"expected at least two values [n], got shape {sample.shape}")
    if not np.isfinite(sample).all():
        raise ValueError("the values are not all finite")
    return sample
