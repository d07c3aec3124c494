"""What can be said, and how surely, about a network that was audited with clean examples alone.

A filter such as BaDExpert judges *inputs*. Three statements follow from its calibration scores, all exact if clean
inputs to come are exchangeable with the calibration examples:

- `false_positives`: which share of clean inputs it will reject, with an interval;
- `p_values`: how rarely a clean input scores as high as this one;
- `chance`: how rarely so many of a batch of clean inputs are rejected.

A statement about the *network* needs networks to compare it with: `ExpertConcentration`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.backdoor.badexpert import extract_backdoor_expert
from torchfolio.backdoor.detectors import ModelDetector, ModelVerdict, Scan
from torchfolio.backdoor.metrics import outputs_of

__all__ = ["ExpertConcentration", "FalsePositives", "chance", "concentration", "false_positives", "judge", "p_values"]


@dataclass(frozen=True)
class FalsePositives:
    """Share of clean inputs that a filter rejects.

    Attributes:
        n: calibration examples.
        above: how many of them lie above the threshold.
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
        threshold: as chosen by `InputDetector.threshold`.
        level: of the interval, which leaves as much out on either side.

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
        scores: of the inputs in question `[N]`.
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


def concentration(expert: nn.Module, x: Tensor) -> Tensor:
    """Mean confidence of a backdoor expert in every class on clean inputs, `[C]`.

    It has unlearned the task but kept its backdoor, if there is one; an all-to-one backdoor's target may then draw
    many inputs that have no trigger.
    """
    return outputs_of(expert, x).double().softmax(1).mean(0)


class ExpertConcentration(ModelDetector):
    """Whether a network's backdoor expert concentrates on one class more than those of clean networks do.

    The score is the largest of the confidences of `concentration`. A network is suspicious if its score exceeds the $k$-th
    largest of those of $K$ reference networks, $k = \\lfloor \\alpha (K + 1) \\rfloor$. If the network is clean and
    trained like the references, this happens with probability at most $\\alpha$; with fewer than $1 / \\alpha - 1$
    references it cannot happen. A network that is not suspicious may have a backdoor all the same.

    Args:
        references: networks for the same task that are known to be clean.
        alpha: share of clean networks that may be called suspicious.
        **settings: of `torchfolio.backdoor.badexpert.BaDExpert`, for all networks alike.

    Raises:
        ValueError: on an `alpha` outside (0, 1).
    """

    def __init__(self, references: Sequence[nn.Module], alpha: float = 0.05, **settings: Any) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"expected alpha between 0 and 1, got {alpha}")
        self.references, self.alpha, self.settings = list(references), alpha, settings

    @property
    def needed(self) -> int:
        """How many references a verdict takes."""
        return math.ceil(1 / self.alpha - 1e-9) - 1

    def _scan(self, model: nn.Module, clean: tuple[Tensor, Tensor] | None, scan: Scan) -> ModelVerdict:
        assert clean is not None
        settings = {"seed": scan.seed, **self.settings}
        nets = [model, *self.references]
        shares, *others = [self._shares(net, *clean, settings) for net in scan.items(nets, "experts")]
        return judge(shares, others, self.alpha)

    @staticmethod
    def _shares(net: nn.Module, x: Tensor, y: Tensor, settings: dict[str, Any]) -> Tensor:
        return concentration(extract_backdoor_expert(net, (x, y), **settings), x)


def judge(shares: Tensor, references: Sequence[Tensor], alpha: float) -> ModelVerdict:
    """The verdict of `ExpertConcentration` from what `concentration` gives for the network and for the references."""
    score = float(shares.max())
    others = sorted((float(other.max()) for other in references), reverse=True)
    rank = math.floor(alpha * (len(others) + 1) + 1e-9)
    threshold = others[rank - 1] if rank else math.inf
    suspected = int(shares.argmax())
    found = score > threshold
    evidence = {
        "shares": shares.tolist(), "references": others, "alpha": alpha, "class": suspected,
        "p_value": (1 + sum(other >= score for other in others)) / (len(others) + 1),
    }  # fmt: skip
    pairs = tuple((k, suspected) for k in range(len(shares)) if k != suspected) if found else ()
    return ModelVerdict(found, score, threshold, pairs, evidence=evidence)
