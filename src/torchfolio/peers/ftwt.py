"""One image through a wide network at about half the operations, beside the dense network and the masked one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.efficiency.ftwt import MaskPredictor, attach_gates, compact, gated_layers
from torchfolio.measure import count_flops
from torchfolio.models import VGG


def peers(bench: Any) -> None:
    net, small, x = wide(0.7)
    print(f"operations: {count_flops(small, x) / count_flops(net, x):.2f} of the dense network's")
    with torch.inference_mode():
        bench.compare("one image, half the operations", ours=lambda: small(x), dense=lambda: net(x))


def wide(share: float) -> tuple[nn.Module, nn.Module, Tensor]:
    """A wide network, its compact form whose gates keep a share of the filters, and an image."""
    torch.manual_seed(0)
    net = VGG(((128, 128), (256, 256), (512, 512)), 10, 3).eval()
    model = attach_gates(net, 0.9)
    for layer in gated_layers(model).values():
        predictor: MaskPredictor = layer.predictor
        nn.init.zeros_(predictor.linear.weight)
        with torch.no_grad():
            predictor.linear.bias.copy_((torch.arange(len(predictor.linear.bias)) % 20 < 20 * share).float() - 0.5)
    return net, compact(model), torch.randn(1, 3, 32, 32)
