"""Standard initialisations by name."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import init

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

SCHEMES = {
    "he": lambda w, g: init.kaiming_normal_(w, nonlinearity="relu", generator=g),
    "he_fan_out": lambda w, g: init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu", generator=g),
    "he_uniform": lambda w, g: init.kaiming_uniform_(w, nonlinearity="relu", generator=g),
    "xavier": lambda w, g: init.xavier_normal_(w, generator=g),
    "xavier_uniform": lambda w, g: init.xavier_uniform_(w, generator=g),
    "lecun": lambda w, g: init.kaiming_normal_(w, nonlinearity="linear", generator=g),
    "orthogonal": lambda w, g: init.orthogonal_(w, gain=math.sqrt(2), generator=g),
    "zeros": lambda w, g: init.zeros_(w),
}


def initialize(model: nn.Module, scheme: str, generator: torch.Generator | None = None) -> nn.Module:
    """Initialise the weights of linear and convolutional layers in place; their biases become zero.

    Norms become the identity. Other layers are left alone.

    Args:
        model: network.
        scheme: `"he"` (normal, variance 2 / fan-in), `"he_fan_out"` (2 / fan-out), `"he_uniform"`, `"xavier"`
            (2 / (fan-in + fan-out)), `"xavier_uniform"`, `"lecun"` (1 / fan-in), `"orthogonal"` (gain sqrt 2),
            `"zeros"`.
        generator: source of randomness; the global one by default.

    Returns:
        The model.

    Raises:
        ValueError: if the scheme is unknown.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"expected scheme to be one of {', '.join(SCHEMES)}, got {scheme!r}")
    for module in model.modules():
        if isinstance(module, WEIGHTED):
            SCHEMES[scheme](module.weight, generator)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif "Norm" in type(module).__name__ and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
    return model


@torch.no_grad()
def redraw(module: nn.Module) -> nn.Module:
    """Draw the weights of a copied layer anew, in place, and let all of them train.

    Modules draw by their own `reset_parameters`; what a module without one holds itself is drawn from the normal
    distribution of its values (constants stay).
    """
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
            continue
        for p in part.parameters(recurse=False):
            if p.is_floating_point() and p.numel() > 1:
                p.copy_(torch.randn_like(p) * p.std() + p.mean())
    for p in module.parameters():
        if p.is_floating_point():
            p.requires_grad_()
    return module
