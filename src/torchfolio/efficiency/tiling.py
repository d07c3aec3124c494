"""Growth without templates: two trained networks on the diagonal of a wide one, or one network twice.

Reference:
    Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfolio.checks import at_least, one_of
from torchfolio.efficiency.growable import templatize
from torchfolio.efficiency.halves import NORMS
from torchfolio.efficiency.template_layers import TemplateHalf, TemplateLayer
from torchfolio.engine import seeded

__all__ = ["grow_by_tiling", "net2net_widen"]


def grow_by_tiling(
    wide: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    first: nn.Module,
    second: nn.Module,
    off_diagonal: Literal["zero", "random", "copy"] = "zero",
    *,
    skip: Collection[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Put two ordinary trained networks of half the width on the diagonal of a wide one: growth without templates.

    Args:
        wide: network of full width, which gives the architecture; left as it is.
        example: inputs of it.
        first: network of half the width, with modules of the same names.
        second: another.
        off_diagonal: blocks between them: 0, fresh random ones (Kaiming), or copies of the diagonal's.
        skip: modules to leave out, see `templatize`; these modules are taken from `wide`.
        seed: seed of fresh blocks.

    Returns:
        A network like `wide`. With zeros, its outputs are the sum of the two networks' in evaluation mode.

    Raises:
        ValueError: as `templatize`, or if a weight of a given network is not half of the wide one's.
    """
    one_of("off_diagonal", off_diagonal, ("zero", "random", "copy"))
    with seeded(seed):
        model = templatize(wide, example, 1, skip)
        for member, network in zip(model.members, (first, second), strict=True):
            _take_over(member, network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # networks without training are the caller's business here
            model.grow("zero")
        fresh = model.export()
        for name, layer in model.net.named_modules():
            if isinstance(layer, TemplateLayer) and layer.blocks == 4 and off_diagonal != "zero":
                w0, w1, *_ = layer.mixtures()
                full = torch.empty_like(layer.weight_for())
                nn.init.kaiming_normal_(full)
                out, into = layer.out_axis, 1 - layer.out_axis
                upper, lower = full.chunk(2, out)
                new = (upper.chunk(2, into)[1], lower.chunk(2, into)[0]) if off_diagonal == "random" else (w0, w1)
                module: Any = fresh.get_submodule(name)
                module.weight.data.copy_(layer.join(w0, w1, *new))
    return fresh


def net2net_widen(
    wide: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    narrow: nn.Module,
    noise: float = 0.0,
    *,
    skip: Collection[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Double the width of a trained network without changing its function: every unit stands there twice.

    Args:
        wide: network of full width, which gives the architecture; left as it is.
        example: inputs of it.
        narrow: trained network of half the width, with modules of the same names.
        noise: standard deviation of noise on the copied weights, relative to theirs; sets the twins apart.
        skip: modules to leave out, see `templatize`.
        seed: seed of the noise.

    Returns:
        A network like `wide` that gives the outputs of `narrow` (without noise, in evaluation mode).

    Reference:
        Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016.
    """
    at_least("noise", noise, 0)
    grown = grow_by_tiling(wide, example, narrow, narrow, "copy", skip=skip)
    with seeded(seed), torch.no_grad():
        for name, layer in templatize(wide, example, 1, skip).net.named_modules():
            if isinstance(layer, TemplateLayer):
                module: Any = grown.get_submodule(name)
                module.weight.mul_(0.5 if layer.inputs_halved else 1.0)
                if layer.has_bias and not layer.outputs_halved:
                    module.bias.mul_(0.5)
                module.weight.add_(noise * module.weight.std() * torch.randn_like(module.weight))
    return grown


def _take_over(member: nn.Module, given: nn.Module) -> None:
    """Load an ordinary network's weights into a member with one template."""
    theirs = dict(given.named_modules())
    for name, module in member.named_modules():
        if name not in theirs:
            if isinstance(module, TemplateHalf) or type(module) in NORMS:
                raise ValueError(f"the given network has no layer {name!r}")
        elif isinstance(module, TemplateHalf):
            source: Any = theirs[name]
            if tuple(source.weight.shape) != tuple(module.templates.shape[1:]):
                raise ValueError(
                    f"expected layer {name!r} with weight {tuple(module.templates.shape[1:])}, half of the wide one, "
                    f"got {tuple(source.weight.shape)}"
                )
            with torch.no_grad():
                module.templates[0] = source.weight
                module.alpha.fill_(1.0)
                if module.bias is not None:
                    module.bias.copy_(source.bias)
        elif type(module) in NORMS:
            module.load_state_dict(theirs[name].state_dict())
