"""Two networks behind two thresholds, and the tightest pair of thresholds with few errors.

Reference:
    Asemian et al., arXiv 2403.02645, Section V.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["DoubleThreshold", "select_thresholds"]


def select_thresholds(
    p: Any, y: Any, epsilon: float = 0.01, fallback: tuple[float, float] = (0.1, 0.9)
) -> tuple[float, float]:
    """The pair of thresholds between which as little as possible is left undecided.

    $\\theta_H$ is the smallest value with $P(\\text{clean} \\mid p \\ge \\theta_H) \\le \\epsilon$, $\\theta_L$ the largest with
    $P(\\text{jammed} \\mid p \\le \\theta_L) \\le \\epsilon$. Where there is no such pair with $\\theta_L < \\theta_H$, $\\epsilon$ is
    widened by 1.5, at most three times, and then the fallback is taken.

    Args:
        p: probabilities of a jammer by networks that did not see the examples, `[N]`.
        y: labels, `[N]`.
        epsilon: $\\epsilon$, share of errors that is allowed on either side.
        fallback: pair for when there is none.
    """
    p, y = np.asarray(p, dtype=float), np.asarray(y)
    order = np.argsort(p)
    values, jammed = p[order], y[order]
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # ties are decided together
    below = np.cumsum(jammed)[last] / (last + 1)
    first = np.append(0, last[:-1] + 1)
    above = (np.cumsum((1 - jammed)[::-1])[::-1])[first] / (len(p) - first)
    for k in range(4):
        low, high = (np.flatnonzero(error <= epsilon * 1.5**k) for error in (below, above))
        if len(low) and len(high):
            pair = float(values[last[low[-1]]]), float(values[first[high[0]]])
            if pair[0] < pair[1]:
                return pair
    return fallback


class DoubleThreshold(nn.Module):
    """The detector as a network, from features to a score above 0.5 where there is a jammer.

    Args:
        first: function from standardised features to the logit of $p_1$, a linear layer last.
        scale: mean and standard deviation of the features, `[2, F]`.
        thresholds: $\\theta_L$ and $\\theta_H$.
        second: hidden layers and head of the second network; none for a detector with a single threshold of 0.5.
        second_scale: mean and standard deviation of its inputs.
        final: threshold on $p_2$.

    Shapes:
        `[N, F]` to scores `[N]` in [0, 1]: $p_1$ where it decides, a value between the thresholds elsewhere.
    """

    scale: Tensor
    thresholds: Tensor
    second_scale: Tensor

    def __init__(
        self,
        first: nn.Sequential,
        scale: Tensor,
        thresholds: tuple[float, float] = (0.5, 0.5),
        second: nn.Sequential | None = None,
        second_scale: Tensor | None = None,
        final: float = 0.5,
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("scale", scale)
        self.register_buffer("thresholds", torch.tensor([*thresholds, final], dtype=torch.float64))
        self.register_buffer("second_scale", torch.zeros(2, 0) if second_scale is None else second_scale)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the second network without their logit, `[N, F + H]`, and the first one's logits `[N]`."""
        z = (x - self.scale[0]) / self.scale[1]
        h = self.first[:-1](z)
        return torch.cat([z, h], 1), self.first[-1](h)[:, 0]

    def probabilities(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """$p_1$ and $p_2$ of every example, in float64."""
        z, logit = self.hidden(x)
        p1 = logit.double().sigmoid()
        if self.second is None:
            return p1, None
        z = torch.cat([z, logit[:, None]], 1)
        return p1, self.second((z - self.second_scale[0]) / self.second_scale[1])[:, 0].double().sigmoid()

    def stage(self, x: Tensor) -> Tensor:
        """Which network decides, 1 or 2, `[N]`."""
        return 1 + self._ambiguous(self.probabilities(x)[0]).long()

    def _ambiguous(self, p1: Tensor) -> Tensor:
        low, high, _ = self.thresholds
        return (p1 > low) & (p1 < high) if self.second is not None else torch.zeros_like(p1, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        p1, p2 = self.probabilities(x)
        if p2 is None:
            return p1
        low, high, final = self.thresholds
        # Scores rise with what either network says, and 0.5 is where the decision turns.
        bottom, top = low.clamp_max(0.5), high.clamp_min(0.5)
        tiny = torch.finfo(torch.float64).tiny
        sure = torch.where(
            p1 <= low, p1 * bottom / low.clamp_min(tiny), top + (1 - top) * (p1 - high) / (1 - high + tiny)
        )
        under = bottom + (0.5 - bottom) * p2 / final
        over = 0.5 + (top - 0.5) * (p2 - final) / (1 - final + tiny)
        return torch.where(self._ambiguous(p1), torch.where(p2 < final, under, over), sure)
