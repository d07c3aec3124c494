"""MixtureGrowth: a network twice as wide, grown from two small ones by recombining what they learned.

`growable` has the network and its growth, `template_layers` the layers that mix templates, `halves` how a network is
halved, `tiling` growth without templates.

Reference:
    Pham et al., "MixtureGrowth: Growing Neural Networks by Recombining Learned Parameters", WACV 2024 (arXiv 2311.04251).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import at_least
from torchfolio.efficiency.growable import GrowableModel, templatize
from torchfolio.efficiency.template_layers import TemplateBank, TemplateHalf, TemplateLayer
from torchfolio.efficiency.tiling import grow_by_tiling, net2net_widen

__all__ = [
    "GrowableModel", "TemplateBank", "TemplateLayer", "grow_by_tiling", "net2net_widen", "param_groups",
    "recalibrate_bn", "templatize",
]  # fmt: skip


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of what is trained: all is decayed except the coefficients, which decay would put out.

    Args:
        model: growable model, or a member of one.
        weight_decay: weight decay of templates, biases and norms; 0 or more.

    Raises:
        ValueError: if nothing is trained.
    """
    at_least("weight_decay", weight_decay, 0)
    alphas = {
        id(p)
        for module in model.modules()
        if isinstance(module, TemplateLayer | TemplateHalf)
        for name, p in module.named_parameters(recurse=False)
        if name.startswith("alpha")
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("expected a model with parameters that are trained, got none")
    groups = [
        {"params": [p for p in trained if id(p) not in alphas], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in alphas], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def recalibrate_bn(model: nn.Module, batches: Tensor | Iterable[Any]) -> None:
    """Estimate the running statistics of batch norms anew, as means over batches; the mode is left as it is.

    Orthogonal, copied and random growth change what batch norms see: without this, or some steps of training, the
    grown network is at chance in evaluation mode.

    Args:
        model: network.
        batches: inputs, or tuples that begin with them, or one tensor of inputs; a few hundred examples in all.

    Raises:
        ValueError: if there are no batches, or no batch norm that keeps running statistics. Whatever fails, the network
            is left as it was.
    """
    batches = [batches] if isinstance(batches, Tensor) else list(batches)
    if not batches:
        raise ValueError("expected at least one batch, got none")
    norms: list[Any] = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    if not norms:
        raise ValueError("expected a network with batch norms that keep running statistics, got none")
    device = next((p.device for p in model.parameters()), None)
    modes = {m: m.training for m in model.modules()}
    before = [(m, m.momentum, {name: b.clone() for name, b in m.named_buffers()}) for m in norms]
    try:
        torch.optim.swa_utils.update_bn(batches, model, device)
    except BaseException:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        for module, mode in modes.items():
            module.training = mode
        raise
