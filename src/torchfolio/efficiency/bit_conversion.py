"""Conversion of a trained network to layers of several bit widths."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, fx, nn

from torchfolio import checks
from torchfolio.efficiency.binary import conv_arguments, linear_arguments
from torchfolio.efficiency.quantized_layers import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    SwitchableNorm,
    calibrate,
)
from torchfolio.efficiency.rounding import check_bits
from torchfolio.models import replace_layers
from torchfolio.models.stateful import fresh

__all__ = ["convert"]

_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
}
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def convert(
    model: nn.Module,
    bits: Sequence[int] = (8, 6, 4, 2),
    *,
    fixed: Sequence[str] | None = None,
    act: bool = True,
    norm: Literal["switchable", "shared"] = "switchable",
    scale: Literal["shared", "separate"] = "shared",
    example: Tensor | None = None,
) -> nn.Module:
    """A copy of a trained network whose layers run at several bit widths.

    Every `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` (grouped ones too) is replaced by a quantised one that shares nothing
    with the old. Inputs of all but the first are quantised; the network's own input is not. It starts at the highest
    width. Other layers with weights (embeddings, transposed convolutions, attention's own) stay as they are, which a
    warning says. Activations need an example, or `calibrate`, before the network is evaluated or trained by `fit`.

    Args:
        model: trained network.
        bits: widths, each from 2 to 8.
        fixed: names of layers that stay at the highest width; by default the first and the last, in the order in
            which the network lists them.
        act: whether to quantise inputs too, not weights alone.
        norm: `"switchable"` gives every batch norm parameters for each width of the layer that it follows.
        scale: scale of weights; see `DoubleRounding`.
        example: a batch of inputs, from which the scales of activations start.

    Raises:
        ValueError: if there is no layer to quantise, a name is unknown, the example is not finite, or widths are
            repeated or out of range.
    """
    widths = check_bits(bits)
    checks.one_of("norm", norm, ("switchable", "shared"))
    if isinstance(fixed, str):
        raise TypeError(f"expected names of layers, such as [{fixed!r}], got {fixed!r}")
    model = copy.deepcopy(model)
    names = [n for n, m in model.named_modules() if type(m) in _KINDS]
    if not names:
        raise ValueError("expected an nn.Linear, nn.Conv1d or nn.Conv2d to quantise, and the network has none")
    stay = {names[0], names[-1]} if fixed is None else set(fixed)
    if unknown := sorted(stay - set(names)):
        raise ValueError(f"the network has no layer {unknown[0]!r} to quantise; it has {', '.join(names)}")
    if left := _left(model, names):
        warnings.warn(f"these layers keep real weights at all widths: {', '.join(left)}", stacklevel=2)
    sources = _norm_sources(model, names) if norm == "switchable" else {}
    name_of = {id(model.get_submodule(n)): n for n in names}

    def quantize(old: nn.Module) -> nn.Module:
        name = name_of[id(old)]
        arguments = linear_arguments(old) if isinstance(old, nn.Linear) else conv_arguments(old)  # pyright: ignore[reportArgumentType]
        new = _KINDS[type(old)](**arguments, device="meta")
        assert isinstance(new, QuantizedLayer)
        new.begin(old, widths, act and name != names[0], name in stay, scale)
        return new

    model = replace_layers(model, lambda name, module: type(module) in _KINDS, quantize)
    for name, source in sources.items():
        own = widths[:1] if source in stay else widths
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SwitchableNorm(model.get_submodule(name), own, source))
    return model if example is None else calibrate(model, example, batch_size=len(example))


def _left(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Layers with matrices or filters of their own that are not quantised."""
    return [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if name not in names and any(p.dim() > 1 for p in module.parameters(recurse=False))
    ]


def _norm_sources(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """For every batch norm the quantised layer that it follows: in the traced graph, or else in the list of modules."""
    sources: dict[str, str] = {}
    latest = None
    for name, module in model.named_modules():
        latest = name if name in layers else latest
        if isinstance(module, _NORMS) and latest is not None and name:
            sources[name] = latest
    try:
        with fresh(model):
            graph = fx.Tracer().trace(model)
    except Exception:  # a network that cannot be traced, for any of many reasons
        return sources
    for node in graph.nodes:
        if node.op == "call_module" and node.target in sources:
            before = node.args[0] if node.args else None
            if isinstance(before, fx.Node) and before.op == "call_module" and before.target in layers:
                sources[node.target] = str(before.target)
    return sources
