"""Makes the layers of a user's network binary: which ones, with which weights, and what stays real."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from torchfolio.efficiency.binary import BinaryLayer, PackedConv2d, PackedLinear, conv_arguments, linear_arguments
from torchfolio.efficiency.periodic_layers import BiPerConv2d, BiPerLayer, BiPerLinear
from torchfolio.models import replace_layers

__all__ = ["Where", "binarize", "choose_layers"]

Where = Callable[[str, nn.Module], bool] | Sequence[str]


def binarize(
    model: nn.Module,
    *,
    frequency: float = 20.0,
    where: Where | None = None,
    binary_input: bool = True,
    hardtanh: bool = True,
    match: bool = False,
    stage: int = 1,
) -> nn.Module:
    """Make the layers of a network binary, in place, with their weights.

    Args:
        model: any network.
        frequency: $\\omega_0$ of all layers.
        where: `(name, module) -> bool` over `nn.Conv2d` and `nn.Linear`, or names of such layers. By default every
            `nn.Conv2d` but the first and those with 1x1 windows (projections on shortcuts).
        binary_input: binarise inputs too, not weights alone.
        hardtanh: with `binary_input`, put `nn.Hardtanh` in place of every `nn.ReLU` of the network, after which
            no input would be negative. A ReLU called as a function cannot be replaced; the layer behind it warns.
        match: whether to choose $w$ and $\\alpha$ so that $\\alpha \\sin \\omega_0 w$ equals the old weights, in place
            of copying the old weights to $w$ as the released code does: with real inputs, stage 1 starts at the old
            function.
        stage: stage that layers start in.

    Returns:
        The model.

    Raises:
        ValueError: if no layer is chosen, a name is unknown, a setting is out of range, or a weight is computed.
        TypeError: if a layer is chosen that is neither `nn.Conv2d` nor `nn.Linear` (transposed convolutions).

    Example:
        >>> net = binarize(resnet20(), frequency=20.0, binary_input=False)
    """
    chosen = choose_layers(model, where)
    settings = {"frequency": frequency, "binary_input": binary_input, "stage": stage}
    matched: dict[nn.Parameter, BiPerLayer] = {}
    if match:
        _refuse_half_tied(model, chosen)

    def convert(old: nn.Module) -> nn.Module:
        if type(old).__name__.startswith("ConvTranspose") or not isinstance(old, nn.Conv2d | nn.Linear):
            raise TypeError(f"expected nn.Conv2d or nn.Linear to make binary, got {type(old).__name__}")
        if "weight" not in old._parameters:
            raise ValueError(
                f"a {type(old).__name__} has a weight that is computed (weight or spectral norm, pruning); make it plain "
                "first, as by torch.nn.utils.parametrize.remove_parametrizations"
            )
        if isinstance(old, nn.Conv2d):
            new = BiPerConv2d(**conv_arguments(old), **settings)
        else:
            new = BiPerLinear(**linear_arguments(old), **settings)
        new.adopt(old)
        if match:
            _match(new, matched)
        return new

    model = replace_layers(model, lambda name, module: name in chosen, convert)
    if binary_input and hardtanh:
        replace_layers(model, nn.ReLU, lambda old: nn.Hardtanh(), allow_none=True)
    return model


def choose_layers(model: nn.Module, where: Where | None) -> set[str]:
    """Names of the layers to make binary."""
    if isinstance(where, str):
        raise TypeError(f"expected names of layers, such as [{where!r}], got {where!r}")
    modules = dict(model.named_modules())
    if where is None:
        binary = BinaryLayer, PackedConv2d, PackedLinear
        convs = [n for n, m in modules.items() if isinstance(m, nn.Conv2d) and not isinstance(m, binary)]
        chosen = {n for n in convs[1:] if tuple(modules[n].kernel_size) != (1, 1)}  # pyright: ignore[reportArgumentType]
    elif callable(where):
        chosen = {n for n, m in modules.items() if _weighs(m) and where(n, m)}
    else:
        firsts = _first_names(model)
        if unknown := sorted(set(where) - set(firsts)):
            raise ValueError(f"the network has no module {unknown[0]!r}; expected names of its layers")
        chosen = {firsts[name] for name in where}
    _refuse_inside_attention(modules, chosen)
    if not chosen:
        kinds = sorted({type(m).__name__ for m in modules.values() if not list(m.children())})
        raise ValueError(
            f"expected layers to make binary, found none among {', '.join(kinds)}: by default these are nn.Conv2d "
            "after the first, larger than 1x1; name others by where= of binarize, or layers= of BiPer"
        )
    return chosen


def _first_names(model: nn.Module) -> dict[str, str]:
    """For every name of a module, the first one: a module may be registered under several."""
    firsts = {id(m): name for name, m in model.named_modules()}
    return {name: firsts[id(m)] for name, m in model.named_modules(remove_duplicate=False)}


def _weighs(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear | nn.modules.conv._ConvTransposeNd)


def _refuse_inside_attention(modules: dict[str, nn.Module], chosen: set[str]) -> None:
    for name in sorted(chosen):
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{name!r} belongs to an nn.MultiheadAttention, which uses its weight without calling the layer: it would "
                "stay real; leave it out by where="
            )


def _refuse_half_tied(model: nn.Module, chosen: set[str]) -> None:
    """Matched weights are others than the old ones, which a layer that stays real cannot share."""
    places: dict[nn.Parameter, set[str]] = {}
    firsts = _first_names(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, set()).add(firsts[name.rpartition(".")[0]])
    for owners in places.values():
        if owners & chosen and owners - chosen:
            raise ValueError(
                f"{min(owners & chosen)!r} shares a weight with {min(owners - chosen)!r}, which stays real: match=True "
                "gives it a weight of its own; make both binary, or use match=False"
            )


@torch.no_grad()
def _match(layer: BiPerLayer, matched: dict[nn.Parameter, BiPerLayer]) -> None:
    """Scale of a channel: its largest weight; the weights: where the sine takes the rest of it. Shared ones once."""
    old = layer.weight
    if old in matched:
        layer.weight = matched[old].weight
        layer.alpha.copy_(matched[old].alpha)
        return
    matched[old] = layer
    flat = old.flatten(1)
    alpha = flat.abs().amax(1).clamp_min(torch.finfo(flat.dtype).tiny)
    layer.alpha.copy_(alpha)
    sines = (flat / alpha[:, None]).asin() / layer.frequency
    layer.weight = nn.Parameter(sines.view_as(old), old.requires_grad)
