"""A convolution with a gate that picks its filters for every input, and the masks that the gate is taught.

Reference:
    Elkerdawy et al., "Fire Together Wire Together", CVPR 2022, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks

__all__ = [
    "Criterion",
    "GatedConv",
    "Gates",
    "MaskPredictor",
    "Pool",
    "gated_layers",
    "mass_mask",
    "open_gates",
    "uniform_mask",
]

LEAST = 1e-5
"""A share of the heat below which a filter does not fire; also the tolerance of the sum of shares."""

Pool = Literal["max", "avg"]
Criterion = Literal["mass", "uniform"]


def mass_mask(heat: Tensor, r: float) -> Tensor:
    """The strongest filters whose shares of the heat sum to at most `r`.

    The filter that crosses `r` is dropped, and so are those with a share of $10^{-5}$ or less; the strongest stays
    always. `r` = 1 drops only what fires nowhere.

    Args:
        heat: scores of filters, not negative, `[B, C]`.
        r: share that is kept, in (0, 1].

    Returns:
        What to keep, bool `[B, C]`.

    Reference:
        Elkerdawy et al., CVPR 2022, section 3.2. That the strongest always stays is ours.
    """
    shares = heat / heat.sum(1, keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    keep = shares > LEAST
    ranked, order = torch.sort(shares, dim=1, descending=True, stable=True)
    if r < 1:
        total = ranked.double().cumsum(1)
        keep &= torch.zeros_like(keep).scatter_(1, order, total <= r + LEAST)
    return keep.scatter_(1, order[:, :1], True)


def uniform_mask(heat: Tensor, r: float) -> Tensor:
    """All filters but the $\\lfloor r C \\rfloor$ weakest, and those that fire nowhere: the ablation; see `mass_mask`."""
    shares = heat / heat.sum(1, keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    order = torch.sort(shares, dim=1, descending=True, stable=True).indices
    keep = torch.zeros_like(shares, dtype=torch.bool)
    keep.scatter_(1, order[:, : heat.shape[1] - math.floor(r * heat.shape[1])], True)
    return (keep & (shares > LEAST)).scatter_(1, order[:, :1], True)


_CRITERIA: dict[str, Callable[[Tensor, float], Tensor]] = {"mass": mass_mask, "uniform": uniform_mask}


class MaskPredictor(nn.Module):
    """The gate of a layer: pooled input, softmax over channels, linear.

    Args:
        in_channels: channels of the layer's input.
        out_channels: its filters.
        pool: `"max"` or `"avg"`, over all positions.
        softmax: whether to normalise the pooled input. Without it the gates follow the budget more closely and cost
            more accuracy.

    Shapes:
        `[B, in_channels, H, W]` to logits `[B, out_channels]`.

    Reference:
        Elkerdawy et al., CVPR 2022, figure 3 (max pooling; the released code pools by the mean).
    """

    def __init__(self, in_channels: int, out_channels: int, pool: Pool = "max", softmax: bool = True) -> None:
        super().__init__()
        self.pool, self.softmax = checks.one_of("pool", pool, ("max", "avg")), softmax
        self.linear = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.amax((2, 3)) if self.pool == "max" else x.mean((2, 3))
        return self.linear(pooled.softmax(1) if self.softmax else pooled)

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}, softmax={self.softmax}"


def open_gates(logits: Tensor) -> Tensor:
    """$\\sigma(P) > 1/2$, and always the largest."""
    return (logits > 0).scatter_(1, logits.argmax(1, keepdim=True), True)


class Gates(NamedTuple):
    """What the gates of a layer did in the last pass.

    Attributes:
        logits: logits of the predictor `[B, C]`; with their graph while a rule trains them.
        target: bool `[B, C]`, or `None` where nothing asked for it.
        mask: bool `[B, C]`, what was used.
    """

    logits: Tensor
    target: Tensor | None
    mask: Tensor


class GatedConv(nn.Module):
    """A convolution, its norm and its activation, of which a gate picks the filters.

    $$O = \\operatorname{act}(\\operatorname{norm}(W * I)), \\qquad y = O \\odot M, \\qquad
    M = \\mathbf 1[\\text{predictor}(I) > 0].$$

    All filters are computed here, so that norms see all channels in training; `compact` skips the closed ones.

    Args:
        conv: convolution.
        norm: its batch norm, or `None`.
        activation: such as `nn.ReLU`, or `None` (before an addition; filters are then scored by the size of the norm's
            output).
        predictor: gate.
        r: share of the heat to keep, in (0, 1].
        criterion: `"mass"` or `"uniform"`.

    Attributes:
        last: `Gates` of the last pass.
        joint: whether the loss of the masks reaches the layers before.
        learning: whether targets are computed.
        oracle: whether targets are used in place of predictions.

    Shapes:
        As the convolution.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module | None,
        activation: nn.Module | None,
        predictor: MaskPredictor,
        r: float,
        criterion: Criterion = "mass",
    ) -> None:
        super().__init__()
        self.r = checks.between("r", r, 0, 1, inclusive=(False, True))
        self.criterion = checks.one_of("criterion", criterion, tuple(_CRITERIA))
        self.conv, self.norm, self.activation, self.predictor = conv, norm, activation, predictor
        self.joint = self.learning = self.oracle = self.counting = False
        self.last: Gates | None = None
        self.macs: Tensor | None = None

    def dense(self, x: Tensor) -> Tensor:
        """The output without a mask."""
        out = self.conv(x)
        out = out if self.norm is None else self.norm(out)
        return out if self.activation is None else self.activation(out)

    def gates(self, x: Tensor, out: Tensor) -> Gates:
        """Predictions, targets where they are needed, and the mask; no loss but that of the masks reaches them."""
        logits = self.predictor(x if self.joint else x.detach())
        target = None
        if self.learning or self.oracle:
            target = _CRITERIA[self.criterion](out.detach().abs().amax((2, 3)), self.r)
        mask = target if self.oracle and target is not None else open_gates(logits.detach())
        return Gates(logits if self.learning else logits.detach(), target, mask)

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense(x)
        self.last = self.gates(x, out)
        if self.counting:
            self.macs = _macs(self.conv, x, out, self.last.mask)
        return out * self.last.mask[:, :, None, None].to(out.dtype)

    def mask_loss(self) -> Tensor:
        """Binary cross-entropy of the last predictions, summed over filters, a mean over the batch."""
        if self.last is None or self.last.target is None:
            raise RuntimeError("there are no targets; a rule sets learning before the forward pass")
        target = self.last.target.to(self.last.logits.dtype)
        return F.binary_cross_entropy_with_logits(self.last.logits, target, reduction="sum") / len(target)

    def extra_repr(self) -> str:
        return f"r={self.r:g}, criterion={self.criterion!r}"


def _macs(conv: nn.Conv2d, x: Tensor, out: Tensor, mask: Tensor) -> Tensor:
    """Multiply-adds of every sample: open filters times channels that hold anything, times window and positions."""
    window = math.prod(conv.kernel_size) * math.prod(out.shape[2:])
    filters = mask.sum(1).double()
    if conv.groups == conv.in_channels:  # depthwise: every filter reads one channel
        return filters * window
    return filters * (x != 0).flatten(2).any(2).sum(1) / conv.groups * window


def gated_layers(model: nn.Module) -> dict[str, GatedConv]:
    """The gated convolutions of a network by name.

    Raises:
        ValueError: if there is none.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GatedConv)}
    if not layers:
        raise ValueError("the network has no gates; attach them first")
    return layers
