"""What can be said, and how surely, about a network that was audited with clean examples alone.

A filter such as BaDExpert judges *inputs*. Three statements follow from its calibration scores, all exact if clean
inputs to come are exchangeable with the calibration examples:

- `false_positives`: which share of clean inputs it will reject, with an interval;
- `p_values`: how rarely a clean input scores as high as this one;
- `chance`: how rarely so many of a batch of clean inputs are rejected.

A statement about the *network* needs networks to compare it with: `torchfolio.backdoor.concentration`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

__all__ = ["FalsePositives", "chance", "false_positives", "p_values"]


@dataclass(frozen=True)
class FalsePositives:
    """Share of clean inputs that a filter rejects.

    Attributes:
        n: calibration examples.
        above: number of them above the threshold.
        expected: mean of the share.
        low: lower end of the interval.
        high: upper end.
        level: probability that the share lies in the interval.
    """

    n: int
    above: int
    expected: float
    low: float
    high: float
    level: float = 0.95

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def false_positives(calibration: Tensor, threshold: float, level: float = 0.95) -> FalsePositives:
    """The share of clean inputs to come that lie above a threshold which is one of the calibration scores.

    Where $k$ of $n$ scores lie above the threshold, an order statistic, the share is distributed as
    $\\mathrm{Beta}(k + 1, n - k)$, whatever the distribution of scores; with ties it is smaller.

    Args:
        calibration: scores of clean examples `[n]`.
        threshold: threshold, as chosen by `InputDetector.threshold`.
        level: level of the interval, which leaves as much out on either side.

    Raises:
        ValueError: on no scores, NaN, or a level outside (0, 1).

    Reference:
        S. S. Wilks, "Determination of Sample Sizes for Setting Tolerance Limits", 1941.
    """
    from scipy.stats import beta

    if not 0 < level < 1:
        raise ValueError(f"expected level between 0 and 1, got {level}")
    n, above = _counts(calibration, threshold)
    if above == n:
        return FalsePositives(n, above, 1.0, 1.0, 1.0, level)
    share = beta(above + 1, n - above)
    low, high = share.ppf([(1 - level) / 2, (1 + level) / 2])
    return FalsePositives(n, above, (above + 1) / (n + 1), float(low), float(high), level)


def p_values(calibration: Tensor, scores: Tensor) -> Tensor:
    """For every score the probability that a clean input has one as high, $(1 + \\#\\{c \\ge s\\}) / (n + 1)$, `[N]`.

    Args:
        calibration: scores of clean examples `[n]`.
        scores: scores of the inputs in question `[N]`.
    """
    ordered = calibration.double().cpu().sort().values
    below = torch.searchsorted(ordered, scores.double().cpu().contiguous(), side="left")
    return (1 + len(ordered) - below).double() / (len(ordered) + 1)


def chance(calibration: Tensor, threshold: float, inputs: int, rejected: int) -> float:
    """Probability that at least `rejected` of so many clean inputs lie above the threshold.

    The number is beta-binomial, which counts the uncertainty of the threshold too.
    """
    from scipy.stats import betabinom

    if not 0 <= rejected <= inputs:
        raise ValueError(f"expected between 0 and {inputs} rejected inputs, got {rejected}")
    n, above = _counts(calibration, threshold)
    return 1.0 if above == n or rejected == 0 else float(betabinom.sf(rejected - 1, inputs, above + 1, n - above))


def _counts(calibration: Tensor, threshold: float) -> tuple[int, int]:
    if calibration.dim() != 1 or not len(calibration) or bool(calibration.isnan().any()):
        raise ValueError(f"expected calibration scores [n] without NaN, got shape {tuple(calibration.shape)}")
    return len(calibration), int((calibration > threshold).sum())
