"""Outputs of many equal networks from their stacked parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

__all__ = ["stacked_outputs"]

Stacked = dict[str, Tensor]


Outputs = Callable[[Stacked, Stacked, Tensor], Tensor]


# Layers without parameters that treat every number by itself, so that one call serves all members.
ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Identity,
)  # fmt: skip


def stacked_outputs(model: nn.Module, members: int, each: bool) -> Outputs:
    """Outputs of all members from stacked parameters and buffers and a batch."""
    names = {id(p): name for name, p in model.named_parameters()}
    chain = _chain(model, names)
    if chain is not None:

        def through(values: Stacked, rest: Stacked, x: Tensor) -> Tensor:
            z = x if each else x.expand(members, *x.shape)
            for layer in chain:
                z = layer(values, z)
            return z

        return through
    base = copy.deepcopy(model).to("meta").train()

    def of_one(values: Stacked, rest: Stacked, x: Tensor) -> Tensor:
        return functional_call(base, (values, rest), (x,))

    return vmap(of_one, in_dims=(0, 0, 0 if each else None), randomness="different")


def _chain(model: nn.Module, names: dict[int, str]) -> list[Callable[[Stacked, Tensor], Tensor]] | None:
    """The layers of a network as functions of all members' parameters and inputs `[members, N, ...]`, if all can be."""
    if model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks:
        return None
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        parts = [_chain(child, names) for child in model]
        return None if any(p is None for p in parts) else [layer for p in parts if p is not None for layer in p]
    if type(model) is nn.Linear:
        weight, bias = names[id(model.weight)], None if model.bias is None else names[id(model.bias)]
        return [lambda values, z: _linear(z, values[weight], None if bias is None else values[bias])]
    if type(model) is nn.PReLU and model.num_parameters == 1:
        slope = names[id(model.weight)]
        return [lambda values, z: torch.where(z > 0, z, values[slope].view(-1, *[1] * (z.dim() - 1)) * z)]
    if type(model) is nn.Flatten and (model.start_dim, model.end_dim) == (1, -1):
        return [lambda _, z: z.flatten(2)]
    if type(model) in ELEMENTWISE and not getattr(model, "inplace", False):
        return [lambda _, z: model(z)]
    return None


def _linear(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[members, N, ..., in]` by `[members, out, in]`."""
    rows = z.flatten(1, -2) if z.dim() > 3 else z
    product = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
    return product.view(*z.shape[:-1], -1)
