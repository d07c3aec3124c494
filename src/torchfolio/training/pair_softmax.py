"""Cross-entropy over pairs whose temperatures are dot products, with its gradient in one go.

The soft form of `torchfolio.training.AMCLLoss` on two views. A pair costs a few numbers in one head's matrix, which is
made, differentiated and left before the next head's: nothing of the size of all pairs is kept for the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.engine.first_order import first_order

__all__ = ["PairSoftmax"]


class PairSoftmax(torch.autograd.Function):
    """The loss, and the sums of temperatures and similarities over positive and negative pairs.

    $$s = z z^\\top, \\quad \\tau = l + (u - l)\\, \\sigma(q q^\\top), \\quad -\\frac{s_{ii^+}}{\\tau_{ii^+}} + \\log
      \\sum_{j \\neq i} e^{s_{ij}/\\tau_{ij}} + \\beta\\Omega(\\tau_{ii^+}) - \\beta\\,\\frac{1}{|n|}\\sum_n \\Omega(\\tau_{in})$$

    Shapes:
        z `[C, 2N, d]`, the second view behind the first, q `[C, 2N, m]`; a scalar and four sums `[4]`:
        $\\tau$ over positive pairs, over negative ones, then $s$.
    """

    LEAST = 0.025  # of low: exponentials are shifted by 1 / low, and those of -2 / low must stay above 0

    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor, low: float, high: float, beta: float) -> tuple[Tensor, Tensor]:
        heads, rows = z.shape[:2]
        needed = any(ctx.needs_input_grad[:2])
        slopes = (torch.empty_like(z), torch.empty_like(q)) if needed else (None, None)
        loss, sums = z.new_zeros(()), z.new_zeros(4)
        for c in range(heads):
            value, stats, *slope = _head(z[c], q[c], low, high, beta, needed)
            loss, sums = loss + value, sums + stats
            for whole, part in zip(slopes, slope, strict=True) if needed else ():
                whole[c] = part  # pyright: ignore[reportOptionalSubscript]
        ctx.save_for_backward(z, q, *slopes)  # z and q only so that a second derivative is refused
        ctx.mark_non_differentiable(sums)
        return loss / rows, sums

    @staticmethod
    @first_order("the gradient of the losses over pairs")
    def backward(ctx: Any, saved: Any, outer: Tensor, _: Tensor) -> Any:
        by_z, by_q = saved[2:]
        outer = outer / by_z.shape[1]
        return by_z * outer, by_q * outer, None, None, None


def _head(z: Tensor, q: Tensor, low: float, high: float, beta: float, needed: bool) -> tuple[Tensor, ...]:
    """Of one head, summed over anchors: loss and sums, and the gradients by z and q where they are needed.

    All matrices are symmetric, and so is that of the exponentials, shifted by a bound instead of each row's largest:
    the gradient by a pair and that by its mirror image are added without a transposition.
    """
    rows, dim = z.shape
    negatives = rows - 2
    i = torch.arange(rows, device=z.device)
    partner = i.roll(rows // 2)
    similarity, bend = z @ z.mT, (q @ q.mT).sigmoid_()
    tau = torch.add(bend.new_tensor(low), bend, alpha=high - low)
    own_s, own_tau, self_tau = similarity[i, partner], tau[i, partner], tau.diagonal()
    stats = torch.stack([
        own_tau.sum(), tau.sum() - own_tau.sum() - self_tau.sum(),
        own_s.sum(), z.sum(0).square().sum() - z.square().sum() - own_s.sum(),
    ])  # fmt: skip
    inverse = tau.reciprocal()
    p = torch.addcmul(z.new_tensor(-1 / low), similarity, inverse).exp_().fill_diagonal_(0)
    total = p.sum(1, keepdim=True)
    loss = total.log().sum() + rows / low - (own_s / own_tau).sum()
    if beta:
        positive, every = _penalty(own_tau.reciprocal(), dim), _penalty(inverse, dim)
        every = every - _penalty(self_tau.reciprocal(), dim)
        loss = loss + beta * (positive + (positive - every) / negatives)
    if not needed:
        return loss, stats
    # With respect to s / tau: softmax less the positive, both ways round.
    share = total.reciprocal()
    p.mul_(share + share.mT)
    p[i, partner] -= 2
    p.mul_(inverse)
    # The penalty's derivative is d/(2 tau) - 1/tau²; the mean over negatives counts with a minus.
    each = 2 * beta / negatives
    by_tau = torch.addcmul(z.new_tensor(each * dim / 2), similarity, p).sub_(inverse, alpha=each)
    by_tau[i, partner] -= (negatives + 1) * each * (dim / 2 - inverse[i, partner])
    by_tau.mul_(inverse).fill_diagonal_(0)
    by_logit = torch.ops.aten.sigmoid_backward(by_tau, bend)
    return loss, stats, p @ z, by_logit @ q * (low - high)


def _penalty(inverse: Tensor, dim: int) -> Tensor:
    """The sum of $\\Omega$, from $1 / \\tau$."""
    return inverse.sum() - dim / 2 * inverse.log().sum()
