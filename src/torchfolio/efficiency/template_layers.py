"""Layers whose weights are mixtures of trainable templates, of full width and of half."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import whole
from torchfolio.efficiency.halves import CONVOLUTIONS, Halves
from torchfolio.models.resnet import Subsample
from torchfolio.shown import Shown

__all__ = [
    "Frozen", "HalvesLayerNorm", "Init", "TemplateBank", "TemplateHalf", "TemplateLayer", "dressed", "half_subsample",
    "mix",
]  # fmt: skip

Init = Literal["orthogonal", "zero", "copy", "random", "none"]
"""Ways to start the added half of a layer."""
JITTER = 0.01  # standard deviation of the noise that sets copied coefficients apart


class TemplateBank(Shown):
    """Templates that layers with blocks of one shape share; each layer keeps coefficients of its own.

    Layers on the raw input or the output have one template each, with coefficient 1.

    Args:
        templates: number T of templates of each set, at least 1.
        shared: whether layers share; otherwise every layer gets templates of its own and no coefficient is fixed.
    """

    def __init__(self, templates: int = 2, shared: bool = True) -> None:
        self.templates, self.shared = whole("templates", templates, 1), shared
        self._pairs: dict[tuple[object, ...], tuple[nn.Parameter, nn.Parameter]] = {}

    def pair(self, like: Tensor, shape: tuple[int, ...], edge: bool) -> tuple[nn.Parameter, nn.Parameter]:
        """The two sets of templates for blocks of a shape."""
        key = (shape, like.dtype, like.device)
        if self.shared and not edge and key in self._pairs:
            return self._pairs[key]
        count = 1 if self.shared and edge else self.templates
        templates = nn.Parameter(_kaiming(like, count, shape)), nn.Parameter(_kaiming(like, count, shape))
        if self.shared and not edge:
            self._pairs[key] = templates
        return templates


class TemplateLayer(nn.Module):
    """A layer of full width whose blocks are mixtures of templates: the layer of the grown network.

    Args:
        layer: convolution, `Linear` or `Embedding` of full width, which says shapes, stride and so on.
        halves: axes whose channels are halved.
        templates: number of templates of each set, or a bank.

    Shapes:
        those of `layer`.
    """

    alpha0: Tensor
    alpha1: Tensor
    alpha2: Tensor
    alpha3: Tensor
    bias0: Tensor
    bias1: Tensor

    def __init__(self, layer: nn.Module, halves: Halves, templates: int | TemplateBank = 2) -> None:
        super().__init__()
        weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
        bank = templates if isinstance(templates, TemplateBank) else TemplateBank(templates, shared=False)
        self.out_axis = 1 if isinstance(layer, nn.Embedding) else 0
        self.outputs_halved = halves.outputs
        grouped = getattr(layer, "groups", 1) > 1
        self.inputs_halved = halves.inputs is not None and not grouped
        self.blocks = 4 if self.inputs_halved and halves.outputs else 2
        shape = list(weight.shape)
        shape[self.out_axis] //= 2 if self.outputs_halved else 1
        shape[1 - self.out_axis] //= 2 if self.inputs_halved else 1
        edge = self.blocks == 2 and not grouped
        self.templates0, self.templates1 = bank.pair(weight, tuple(shape), edge)
        start = torch.empty(self.blocks, len(self.templates0), dtype=torch.float32)
        if bank.shared:
            start.fill_(1.0) if edge else start.normal_()
        else:
            nn.init.orthogonal_(start)
        for k, row in enumerate(start):
            alpha = nn.Parameter(row.clone().to(weight), requires_grad=not (bank.shared and edge))
            self.register_parameter(f"alpha{k}", alpha)
        self.has_bias = getattr(layer, "bias", None) is not None
        width = shape[self.out_axis]
        for k in (0, 1):
            bias = nn.Parameter(weight.new_zeros(width)) if self.has_bias else None
            self.register_parameter(f"bias{k}", bias)
        self.order: Tensor | None
        self.register_buffer("order", None, persistent=False)
        if self.inputs_halved and not halves.in_order and halves.inputs is not None:
            self.order = halves.inputs.argsort().to(weight.device)
        self.plain = _bare(layer)

    def weight_for(self, member: int | None = None) -> Tensor:
        """Weight of a member (0 or 1), or of the grown layer (`None`)."""
        if member is not None:
            return mix(getattr(self, f"alpha{member}")[None], getattr(self, f"templates{member}"))[0]
        return self.join(*self.mixtures())

    def mixtures(self) -> list[Tensor]:
        """Blocks 0 to 3 (or 0 and 1), by one product for each set of templates."""
        if self.blocks == 2:
            return [self.weight_for(0), self.weight_for(1)]
        first = mix(torch.stack([self.alpha0, self.alpha2]), self.templates0)
        second = mix(torch.stack([self.alpha1, self.alpha3]), self.templates1)
        return [first[0], second[0], first[1], second[1]]

    def join(self, *blocks: Tensor) -> Tensor:
        """The full weight from its blocks."""
        out, into = self.out_axis, 1 - self.out_axis
        if self.blocks == 2:
            weight = torch.cat(blocks, out if self.outputs_halved else into)
        else:
            w0, w1, w2, w3 = blocks
            weight = torch.cat([torch.cat([w0, w2], into), torch.cat([w3, w1], into)], out)
        return weight if self.order is None else weight.index_select(into, self.order)

    def bias_for(self, member: int | None = None) -> Tensor | None:
        """Bias of a member, or of the grown layer."""
        if not self.has_bias or member is not None:
            return getattr(self, f"bias{member}") if self.has_bias else None
        return torch.cat([self.bias0, self.bias1]) if self.outputs_halved else self.bias0 + self.bias1

    def forward(self, x: Tensor) -> Tensor:
        return _apply(self.plain, x, self.weight_for(), self.bias_for())

    def start_growth(self, init: Init, scale: float) -> None:
        """Set the coefficients of the new blocks."""
        if self.blocks == 2 or init == "none":
            return
        with torch.no_grad():
            old = torch.stack([self.alpha0, self.alpha1])
            if init == "zero":
                new = torch.zeros_like(old)
            elif init == "copy":
                new = old + JITTER * torch.randn_like(old)
            elif init == "random":
                new = scale * torch.rand_like(old)
            else:
                third = _least_used(self.alpha0, [self.alpha1])
                new = scale * torch.stack([third, _least_used(self.alpha1, [self.alpha0, third])])
            self.alpha2.copy_(new[0])
            self.alpha3.copy_(new[1])

    def extra_repr(self) -> str:
        return f"{self.blocks} blocks of {tuple(self.templates0.shape[1:])}, templates={len(self.templates0)}"


class TemplateHalf(nn.Module):
    """A member's layer: it shares templates, coefficients and bias with the layer of full width."""

    def __init__(self, layer: TemplateLayer, member: int) -> None:
        super().__init__()
        self.templates: Tensor = getattr(layer, f"templates{member}")
        self.alpha: Tensor = getattr(layer, f"alpha{member}")
        self.bias: Tensor | None = getattr(layer, f"bias{member}")
        self.plain = copy.deepcopy(layer.plain)
        if getattr(self.plain, "groups", 1) > 1:
            self.plain.groups //= 2  # pyright: ignore
        _resize(self.plain, self.templates[0])

    def forward(self, x: Tensor) -> Tensor:
        return _apply(self.plain, x, mix(self.alpha[None], self.templates)[0], self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.templates.shape[1:])}, templates={len(self.templates)}"


class HalvesLayerNorm(nn.Module):
    """A `LayerNorm` of each half of the channels by itself, as the members have it."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        whole_norm = copy.deepcopy(norm)
        self.weight, self.bias = whole_norm.weight, whole_norm.bias
        self.width = norm.normalized_shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.unflatten(-1, (2, -1)), (self.width // 2,), eps=self.eps).flatten(-2)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"2 x {self.width // 2}, eps={self.eps}"


class Frozen(nn.Module):
    """A module that is kept as it is: not trained, always in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _kaiming(like: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    templates = torch.empty(count, *shape, dtype=like.dtype, device=like.device)
    for template in templates:
        nn.init.kaiming_normal_(template)
    return templates


def mix(alphas: Tensor, templates: Tensor) -> Tensor:
    """Mixtures `[n, *shape]` of templates `[T, *shape]` by coefficients `[n, T]`."""
    return (alphas @ templates.flatten(1)).unflatten(1, templates.shape[1:])


def _least_used(shared: Tensor, others: list[Tensor]) -> Tensor:
    """The unit vector orthogonal to the first that the others use least."""
    basis = torch.linalg.svd(shared.double()[None]).Vh[1:]  # of the complement
    used = torch.stack(others).double() @ basis.T
    return (torch.linalg.svd(used).Vh[-1] @ basis).to(shared)


def _bare(layer: nn.Module) -> nn.Module:
    """The layer without weight and bias: what it does with them."""
    bare = copy.copy(layer)
    bare._parameters = dict.fromkeys(layer._parameters)
    return copy.deepcopy(bare)


def dressed(bare: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with its weights."""
    layer: Any = copy.deepcopy(bare)
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    _resize(layer, weight)
    return layer


def _resize(layer: nn.Module, weight: Tensor) -> None:
    """Let a layer count its channels by its weight."""
    sizes = {
        "out_channels": weight.shape[0], "in_channels": weight.shape[1] * getattr(layer, "groups", 1),
        "out_features": weight.shape[0], "in_features": weight.shape[1], "embedding_dim": weight.shape[1],
    }  # fmt: skip
    for name, size in sizes.items():
        if hasattr(layer, name):
            setattr(layer, name, size)


def _apply(plain: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(plain, CONVOLUTIONS):
        return plain._conv_forward(x, weight, bias)
    if isinstance(plain, nn.Linear):
        return F.linear(x, weight, bias)
    return F.embedding(
        x, weight, plain.padding_idx, plain.max_norm, plain.norm_type, plain.scale_grad_by_freq, plain.sparse
    )


def half_subsample(module: Subsample, member: int) -> Subsample:
    """The parameter-free shortcut of one member: its half of the zero channels, on its side."""
    half = copy.deepcopy(module)
    before, after = module.padding
    half.padding = (before, 0) if member == 0 else (0, after)
    return half
