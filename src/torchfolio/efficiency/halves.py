"""Finds how the channels of a network fall into two halves, so that it can be cut into two networks of half the width.

Every layer with weights gives its first half of outputs to one half network and its second half to the other, except
the layers that read the raw input (all of it goes to both) and those that give the network's output (both give all of
it). What the layer after it reads is found by running the network: one half of all outputs is made NaN, which every
operation between two layers hands on, so that a channel that is NaN comes from that half. A channel that comes from
both halves belongs to none, and such a network is refused with the name of the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.measure import untouched
from torchfolio.shown import Shown

__all__ = ["Halves", "find_halves", "shrink_norm"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MIXING = (nn.Linear, *CONVOLUTIONS, nn.Embedding)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, eq=False, repr=False)
class Halves(Shown):
    """Where the halves of one layer's channels are.

    Attributes:
        inputs: places of the inputs `[C]`, those of the first half and then those of the second; `None` where both
            half networks read all of them.
        outputs: whether the outputs are halved; the first half of them belongs to the first network.
    """

    inputs: Tensor | None
    outputs: bool

    @property
    def in_order(self) -> bool:
        """Whether the first half of the inputs stands before the second."""
        return self.inputs is None or bool((self.inputs == torch.arange(len(self.inputs))).all())


def find_halves(model: nn.Module, example: tuple[Tensor, ...], skip: Collection[str] = ()) -> dict[str, Halves]:
    """The halves of every layer with weights.

    Args:
        model: network; it is left as it was.
        example: its inputs, with an axis of examples.
        skip: names of modules that are kept whole; only raw inputs may enter them.

    Returns:
        The halves by name of the layer.

    Raises:
        TypeError: if it holds a layer or parameter whose halves are unknown.
        ValueError: if the halves are not defined: a width is odd, a layer reads channels that mix both halves, is not
            reached, or is shared or skipped in a way that leaves no halves.
    """
    layers = _layers(model, skip)
    if not layers:
        raise ValueError("expected a network with layers that have weights, got none outside of skip")
    probe = _Probe(model, layers, skip)
    finals = probe.reached_by_output(example)
    first, second = (probe.spread(example, lambda name, half=half: _half_mask(layers, finals, name, half))
                     for half in (0, 1))  # fmt: skip
    after_output = probe.spread(example, lambda name: slice(None) if name in finals else slice(0))
    halves: dict[str, Halves] = {}
    for name, layer in layers.items():
        if after_output[name].any():
            raise ValueError(f"layer {name!r} reads an output of the network, of which there are no halves")
        halves[name] = _judge(name, layer, first[name], second[name], name not in finals)
    return halves


def _layers(model: nn.Module, skip: Collection[str]) -> dict[str, nn.Module]:
    """Layers with weights by name; refuses every other parameter."""
    modules = dict(model.named_modules())
    unknown = [name for name in skip if name not in modules]
    if unknown:
        raise ValueError(f"the network has no module {unknown[0]!r} to skip")
    layers: dict[str, nn.Module] = {}
    owner: dict[int, str] = {}
    for name, module in modules.items():
        if any(name == skipped or name.startswith(f"{skipped}.") for skipped in skip):
            continue
        if type(module) in (*MIXING, *NORMS):
            layers[name] = module
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(
                f"{type(module).__name__} {name!r} has parameters whose halves are unknown; expected "
                f"{', '.join(kind.__name__ for kind in (*MIXING, *NORMS))}, or its name in skip"
            )
        for parameter in module.parameters(recurse=False):
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"layers {owner[id(parameter)]!r} and {name!r} share a parameter, which cannot be cut")
    return layers


def _judge(name: str, layer: nn.Module, first: Tensor, second: Tensor, halved: bool) -> Halves:
    """The halves of one layer, from what it reads of each."""
    if (first & second).any():
        raise ValueError(f"layer {name!r} reads channels that mix both halves of the layers before it")
    per_channel = type(layer) in NORMS or getattr(layer, "groups", 1) > 1
    if not (first | second).any():
        if per_channel:
            raise ValueError(f"layer {name!r} works on the raw input, channel by channel; put it in skip")
        if not halved:
            raise ValueError(f"layer {name!r} leads from the raw input to the output and has no half")
        inputs = None
    else:
        if not (first | second).all():
            raise ValueError(f"layer {name!r} reads raw inputs beside halved channels")
        inputs = torch.cat([first.nonzero()[:, 0], second.nonzero()[:, 0]])
        if int(first.sum()) * 2 != len(inputs):
            raise ValueError(
                f"layer {name!r} reads {int(first.sum())} channels of one half and {int(second.sum())} of the other"
            )
    halves = Halves(inputs, halved)
    if not halved and per_channel:
        raise ValueError(f"layer {name!r} works channel by channel and gives the output, which is not halved")
    groups = getattr(layer, "num_groups", getattr(layer, "groups", 1))
    if groups > 1 and groups % 2:
        raise ValueError(f"layer {name!r} has {groups} groups, expected an even number of them")
    if not halves.in_order and (groups > 1 or type(layer) in (nn.GroupNorm, nn.LayerNorm)):
        raise ValueError(f"layer {name!r} works on groups of channels, and the halves lie across them")
    if type(layer) is nn.GroupNorm and groups == 1:
        raise ValueError(f"layer {name!r} normalizes all channels as one group, which mixes both halves")
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) != 1:
        raise ValueError(f"layer {name!r} normalizes {len(layer.normalized_shape)} axes, expected one")
    return halves


def _half_mask(layers: Mapping[str, nn.Module], finals: Collection[str], name: str, half: int) -> slice:
    """The outputs of a layer that belong to one half; none of a layer that gives the output."""
    if name in finals:
        return slice(0)
    layer = layers[name]
    width = next((getattr(layer, n) for n in ("out_features", "out_channels", "embedding_dim") if hasattr(layer, n)), 0)
    if width % 2:
        raise ValueError(f"layer {name!r} has {width} outputs, expected an even number to cut in half")
    return slice(0, width // 2) if half == 0 else slice(width // 2, None)


class _Probe:
    """Runs a network with outputs of our own in place of its layers'."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], skip: Collection[str]) -> None:
        self.model, self.layers = model, layers
        self.skipped = {name: model.get_submodule(name) for name in skip}

    def reached_by_output(self, example: tuple[Tensor, ...]) -> set[str]:
        """Layers whose outputs reach the network's without passing another layer."""
        leaves: list[tuple[str, Tensor]] = []

        def replace(name: str, mask: Tensor, output: Tensor) -> Tensor:
            leaves.append((name, torch.ones_like(output).requires_grad_()))
            return leaves[-1][1].clone()  # no leaf, so that what follows may work in place

        with torch.enable_grad():
            output = self._run(example, replace)
            if not isinstance(output, Tensor):
                raise TypeError(f"expected the network to give one tensor, got {type(output).__name__}")
            if not output.requires_grad:
                raise ValueError("the network's output does not depend on any of its layers")
            gradients = torch.autograd.grad(output.sum(), [leaf for _, leaf in leaves], allow_unused=True)
        missed = set(self.layers) - {name for name, _ in leaves}
        if missed:
            raise ValueError(f"layer {sorted(missed)[0]!r} is not reached by the example")
        return {name for (name, _), gradient in zip(leaves, gradients, strict=True) if gradient is not None}

    def spread(self, example: tuple[Tensor, ...], spoiled: Callable[[str], slice]) -> dict[str, Tensor]:
        """Which inputs of every layer depend on the spoiled outputs, `[C]` of bool by name."""
        seen: dict[str, Tensor] = {}

        def replace(name: str, mask: Tensor, output: Tensor) -> Tensor:
            seen[name] = seen.get(name, mask) | mask
            fresh = torch.ones_like(output).movedim(_axis(self.layers[name]), -1)
            fresh[..., mask if type(self.layers[name]) in NORMS else spoiled(name)] = torch.nan
            return fresh.movedim(-1, _axis(self.layers[name]))

        with torch.no_grad():
            self._run(example, replace)
        return seen

    def _run(self, example: tuple[Tensor, ...], replace: Callable[[str, Tensor, Tensor], Tensor]) -> object:
        handles = []
        for name, layer in self.layers.items():

            def swap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> Tensor:
                if type(module) is nn.Embedding:
                    return replace(name, torch.zeros(1, dtype=torch.bool), output.detach())
                spoiled = args[0].detach().isnan().movedim(_axis(module), -1).flatten(0, -2).any(0).cpu()
                return replace(name, spoiled, output.detach())

            handles.append(layer.register_forward_hook(swap))
        for name, module in self.skipped.items():

            def check(module: nn.Module, args: tuple[object, ...], name: str = name) -> None:
                if any(isinstance(x, Tensor) and (x.requires_grad or bool(x.isnan().any())) for x in args):
                    raise ValueError(f"skipped module {name!r} reads what a halved layer gives; only raw inputs may")

            handles.append(module.register_forward_pre_hook(check))
        try:
            with untouched(self.model, training=False):
                return self.model(*example)
        finally:
            for handle in handles:
                handle.remove()


def _axis(layer: nn.Module) -> int:
    """Axis of the channels of what a layer reads and gives."""
    if isinstance(layer, CONVOLUTIONS):
        return -1 - len(layer.kernel_size)
    return -1 if type(layer) in (nn.Linear, nn.LayerNorm, nn.Embedding) else 1


def shrink_norm(norm: nn.Module) -> nn.Module:
    """A new normalization layer for half the channels of this one, in its initial state."""
    half: nn.Module = copy.deepcopy(norm)
    for tensors in (half._parameters, half._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.dim():
                cut = tensor.detach()[: len(tensor) // 2].clone()
                tensors[name] = nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut  # pyright: ignore
    for name in ("num_features", "num_channels", "num_groups"):
        if hasattr(half, name):
            setattr(half, name, getattr(half, name) // 2)
    if isinstance(half, nn.LayerNorm):
        half.normalized_shape = (half.normalized_shape[0] // 2,)
    half.reset_parameters()  # pyright: ignore[reportCallIssue]
    return half
