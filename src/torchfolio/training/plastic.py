"""Linear layers with fast weights: one matrix for each example that a local rule changes at every step.

Jimmy Ba, Geoffrey Hinton, Volodymyr Mnih, Joel Z. Leibo, Catalin Ionescu, "Using Fast Weights to Attend to the Recent
Past", NeurIPS 2016, https://arxiv.org/abs/1610.06258, for the form that never builds the matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import between, positive, whole

__all__ = ["PlasticLinear"]


class PlasticLinear(nn.Linear):
    """A linear layer whose weights move within a sequence, for every example by itself:

    $$o_t = W x_t + b + F_t^\\top x_t, \\qquad F_{t+1} = \\lambda F_t - \\frac{\\alpha}{n}\\, x_t \\otimes \\delta_t,$$

    with learned rate $\\alpha > 0$ and decay $\\lambda$ in (0, 1), kept as logarithm and logit, and a signal
    $\\delta_t$ that stands for the gradient of a loss by $o_t$. Written out, $F_t^\\top x = \\sum_{j<t} \\kappa_{tj}
    (x \\cdot x_j)\\, \\delta_j$ with $\\kappa_{tj} = -\\frac{\\alpha}{n} \\lambda^{t-1-j}$: `kernel` gives these weights,
    and a whole sequence is attention over what was seen, without the matrix.

    Args:
        in_features: width of x.
        out_features: width of o.
        bias: whether there is b.
        rate: $\\alpha$ at the start, positive.
        decay: $\\lambda$ at the start, in (0, 1).
        scale: constant n, positive.
        device: place of the parameters.
        dtype: type of the parameters.

    Shapes:
        x `[B, in]`, fast weights `[B, in, out]`, o and delta `[B, out]`.

    Example:
        >>> layer = PlasticLinear(3, 2)
        >>> fast = layer.init_state(5)
        >>> x = torch.randn(5, 3)
        >>> fast = layer.update(fast, x, delta=layer(x, fast) - torch.ones(5, 2))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rate: float = math.exp(-3),
        decay: float = 1 / (1 + math.exp(-4)),
        scale: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        whole("in_features", in_features, 1)
        whole("out_features", out_features, 1)
        positive("rate", rate)
        between("decay", decay, 0, 1, inclusive=False)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scale = positive("scale", scale)
        own = {"device": device, "dtype": dtype}
        self.log_rate = nn.Parameter(torch.tensor(math.log(rate), **own))
        self.decay_logit = nn.Parameter(torch.tensor(math.log(decay / (1 - decay)), **own))

    @property
    def rate(self) -> Tensor:
        """$\\alpha$."""
        return self.log_rate.exp()

    @property
    def decay(self) -> Tensor:
        """$\\lambda$."""
        return self.decay_logit.sigmoid()

    def init_state(self, batch_size: int) -> Tensor:
        """Fast weights of a new sequence: zeros `[B, in, out]`."""
        return self.weight.new_zeros(batch_size, self.in_features, self.out_features)

    def forward(self, input: Tensor, fast: Tensor | None = None) -> Tensor:
        """The layer with its fast weights; without them an ordinary linear layer."""
        slow = F.linear(input, self.weight, self.bias)
        return slow if fast is None else torch.baddbmm(slow.unsqueeze(1), input.unsqueeze(1), fast).squeeze(1)

    def update(self, fast: Tensor, x: Tensor, delta: Tensor) -> Tensor:
        """The fast weights after one step; new ones, the old stay."""
        change = delta * (-self.rate / self.scale)
        return torch.baddbmm(fast * self.decay, x.unsqueeze(2), change.unsqueeze(1))

    def kernel(self, steps: int) -> Tensor:
        """The weights $\\kappa$ `[T, T]` of the outer products of earlier steps; zeros from the diagonal on."""
        t = torch.arange(steps, device=self.weight.device)
        lag = t[:, None] - 1 - t
        powers = torch.exp(F.logsigmoid(self.decay_logit) * lag.clamp_min(0))
        return torch.where(lag >= 0, powers * (-self.rate / self.scale), 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"
