"""Initialisers of convolutions and linear layers: variance-scaled, orthogonal, by data (LSUV), or from a bank.

Reference:
    Collated in Hirani and Abdulla, arXiv 2410.21644. LSUV: Mishkin and Matas 2016. Delta-orthogonal: Xiao et al. 2018.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import at_least, finite, number, one_of
from torchfolio.layers.filter_banks import Bank
from torchfolio.measure import untouched

__all__ = ["SCHEMES", "init_"]

SCHEMES = ("gaussian", "lecun_1998", "lecun_normal", "xavier", "he", "orthogonal", "delta_orthogonal", "lsuv")
"""Names of the initialisations."""


@torch.no_grad()
def init_(
    model: nn.Module,
    scheme: str | Bank,
    *,
    data: Tensor | None = None,
    gain: float = 1.0,
    sigma: float = 0.01,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Fill the weights of all convolutions and linear layers in place; biases become 0 and frozen weights stay.

    With $F_{in} = Ck^2$ and $F_{out} = Kk^2$: `"gaussian"` $N(0, \\sigma^2)$, `"lecun_1998"`
    $U(\\pm 2.4/F_{in})$, `"lecun_normal"` $N(0, 1/F_{in})$, `"xavier"` $U(\\pm\\sqrt{6/(F_{in}+F_{out})})$, `"he"`
    $N(0, 2/F_{in})$, `"orthogonal"` (rows or columns), `"delta_orthogonal"` (orthogonal in the central tap, 0 elsewhere),
    `"lsuv"` (orthogonal, then scaled so that every layer's outputs have variance 1 on `data`).

    Args:
        model: a layer or a network.
        scheme: name, or a bank for one convolution of its shape (or several), whitening folded in.
        data: a batch of inputs for `"lsuv"`.
        gain: factor of (delta-)orthogonal weights.
        sigma: standard deviation of `"gaussian"`.
        generator: generator that is drawn from; torch's global one by default.

    Returns:
        The model.

    Raises:
        ValueError: if there is no such layer or scheme, the bank does not fit, or `"lsuv"` has no data or a layer with
            constant outputs.
    """
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
    layers: list[Any] = [m for m in model.modules() if isinstance(m, kinds) and m.weight.requires_grad]
    if isinstance(scheme, Bank):
        layers = [m for m in layers if isinstance(m, nn.Conv2d)]
    if not layers:
        raise ValueError("expected a model with convolutions or linear layers that are trained, got none")
    if isinstance(scheme, Bank):
        weight, bias = scheme.folded()
        if wrong := [m for m in layers if m.weight.shape != weight.shape]:
            raise ValueError(f"expected convolutions of shape {list(weight.shape)}, got {list(wrong[0].weight.shape)}")
        if bias is not None and any(m.bias is None for m in layers):
            raise ValueError("expected convolutions with a bias, which a whitened bank needs, got one without")
    else:
        one_of("scheme", scheme, SCHEMES)
        if scheme == "lsuv" and data is None:
            raise ValueError("expected data for the scheme 'lsuv', got None")
        if scheme == "lsuv":
            finite("data", data)
        number("gain", gain)
    for layer in layers:
        if layer.bias is not None:
            layer.bias.zero_()
        if isinstance(scheme, Bank):
            layer.weight.copy_(scheme.folded()[0])
            if layer.bias is not None and (bias := scheme.folded()[1]) is not None:
                layer.bias.copy_(bias)
        else:
            _fill(layer.weight, scheme, gain, sigma, generator)
    if scheme == "lsuv" and data is not None:
        _unit_variance(model, layers, data)
    return model


def _fill(weight: Tensor, scheme: str, gain: float, sigma: float, generator: torch.Generator | None) -> None:
    area = weight[0, 0].numel()
    inputs, outputs = weight.shape[1] * area, weight.shape[0] * area
    if scheme in ("lecun_1998", "xavier"):
        bound = 2.4 / inputs if scheme == "lecun_1998" else math.sqrt(6 / (inputs + outputs))
        weight.uniform_(-bound, bound, generator=generator)
    elif scheme in ("gaussian", "lecun_normal", "he"):
        std = {"gaussian": sigma, "lecun_normal": inputs**-0.5, "he": (2 / inputs) ** 0.5}[scheme]
        weight.normal_(0, at_least("sigma", std, 0), generator=generator)
    elif scheme == "delta_orthogonal":
        weight.zero_()
        center = weight[(slice(None), slice(None), *(n // 2 for n in weight.shape[2:]))]
        center.copy_(nn.init.orthogonal_(torch.empty_like(center), gain, generator))
    else:
        nn.init.orthogonal_(weight, gain, generator)


def _unit_variance(model: nn.Module, layers: list[Any], data: Tensor, rounds: int = 10, tol: float = 0.05) -> None:
    """Scale each layer at its turn within one forward pass, so that later ones see the outputs of scaled ones."""
    ran: list[nn.Module] = []
    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    with untouched(model, training=False):
        handles: list[Any] = [m.register_forward_hook(lambda m, a, y: ran.append(m)) for m in leaves]
        try:
            model(data)
        finally:
            for handle in handles:
                handle.remove()
    skipped = {id(a) for a, b in zip(ran, ran[1:], strict=False) if isinstance(b, norms)}
    scaled: set[int] = set()
    names = {id(m): n for n, m in model.named_modules()}

    def scale(layer: Any, args: Any, output: Tensor) -> Tensor | None:
        if id(layer) in scaled or id(layer) in skipped:
            return None
        scaled.add(id(layer))
        for _ in range(rounds):
            s2 = float(output.float().var(correction=0))
            if not s2 > 1e-30:
                raise ValueError(f"expected outputs that vary on the data, got constant ones from {names[id(layer)]!r}")
            if abs(s2 - 1) < tol:
                break
            layer.weight.div_(s2**0.5)
            output = type(layer).forward(layer, args[0])
        return output

    modes = {m: m.training for m in model.modules()}
    handles = [layer.register_forward_hook(scale) for layer in layers]
    try:
        model.eval()
        model(data)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
