"""Gated convolutions for inference, which skip the closed filters of single images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.efficiency.gated_conv import GatedConv, gated_layers, open_gates
from torchfolio.models import replace_layers

__all__ = ["CompactConv", "compact"]


class CompactConv(nn.Module):
    """A gated convolution with its norm folded in, which computes only the open filters of a single image.

    They read only the channels that hold anything. Batches of several images, and convolutions in groups that are not
    depthwise, compute all filters and mask them.

    Args:
        gated: gated layer in evaluation mode; copied.

    Shapes:
        As the convolution.
    """

    def __init__(self, gated: GatedConv) -> None:
        super().__init__()
        self.predictor, self.activation = copy.deepcopy(gated.predictor), copy.deepcopy(gated.activation)
        self.conv = copy.deepcopy(gated.conv)
        weight, bias = _folded(gated)
        self.conv.weight = nn.Parameter(weight, requires_grad=False)
        self.conv.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = open_gates(self.predictor(x))
        conv = self.conv
        if len(x) != 1 or (conv.groups > 1 and conv.groups != conv.in_channels) or conv.padding_mode != "zeros":
            return self._activated(conv(x)) * mask[:, :, None, None].to(x.dtype)
        assert conv.bias is not None
        channels = mask[0].nonzero()[:, 0]
        weight, bias, groups = conv.weight.index_select(0, channels), conv.bias.index_select(0, channels), 1
        if conv.groups > 1:  # depthwise; a filter may be one of several of a channel
            x, groups = x.index_select(1, channels // (conv.out_channels // conv.groups)), len(channels)
        else:
            active = (x[0] != 0).flatten(1).any(1).nonzero()[:, 0]
            if 0 < len(active) < x.shape[1]:
                x, weight = x.index_select(1, active), weight.index_select(1, active)
        part = self._activated(F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups))
        whole = part.new_zeros(1, conv.out_channels, *part.shape[2:])
        return whole.index_copy_(1, channels, part)

    def _activated(self, out: Tensor) -> Tensor:
        return out if self.activation is None else self.activation(out)


def _folded(gated: GatedConv) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with its batch norm in them."""
    conv, norm = gated.conv, gated.norm
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    if norm is None:
        return conv.weight.detach().clone(), bias.clone()
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("expected batch norms with running statistics to compact, got one without")
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    shift = 0 if norm.bias is None else norm.bias.detach()
    return conv.weight.detach() * scale[:, None, None, None], (bias - norm.running_mean) * scale + shift


def compact(model: nn.Module) -> nn.Module:
    """A copy for inference that skips closed filters, so that single images take less time where layers are wide.

    Outputs are those of the masked network up to rounding.

    Args:
        model: model of `attach_gates`, trained.

    Raises:
        ValueError: if there are no gates.
    """
    gated_layers(model)
    net = copy.deepcopy(model).eval()
    return replace_layers(net, GatedConv, lambda gated: CompactConv(gated))  # pyright: ignore[reportArgumentType]
