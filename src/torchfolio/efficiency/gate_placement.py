"""Where gates go in somebody's own network: convolutions that are followed by a norm, a ReLU or an addition."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn
from torch.nn import functional as F

from torchfolio.efficiency.compact_conv import CompactConv
from torchfolio.efficiency.gated_conv import Criterion, GatedConv, MaskPredictor, Pool
from torchfolio.models.stateful import fresh

__all__ = ["attach_gates"]


def attach_gates(
    model: nn.Module,
    r: float,
    *,
    skip: Sequence[str] = (),
    pool: Pool = "max",
    softmax: bool = True,
    criterion: Criterion = "mass",
) -> nn.Module:
    """A copy of a trained network with a gate beside every convolution that has its place in a known pattern.

    These are convolution, batch norm (or none) and ReLU in a row, as modules or functions; a convolution and norm before
    an addition or another convolution are gated after the norm. Convolutions on shortcuts, whose input goes elsewhere
    too before an addition, and those that run twice are left alone: `gated_layers` tells which have gates.

    Args:
        model: trained network, which can be traced by `torch.fx`.
        r: share of the heat to keep, in (0, 1]; see `choose_r`.
        skip: names of convolutions to leave alone.
        pool: pool of the gates; see `MaskPredictor`.
        softmax: whether the pooled input is normalised, likewise.
        criterion: criterion of the targets.

    Raises:
        ValueError: if the network cannot be traced, has gates already or nothing to gate, or a name is unknown.
    """
    if any(isinstance(m, GatedConv | CompactConv) for m in model.modules()):
        raise ValueError("the network has gates already")
    if isinstance(skip, str):
        raise TypeError(f"expected names of convolutions, such as [{skip!r}], got {skip!r}")
    if unknown := sorted(set(skip) - {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}):
        raise ValueError(f"the network has no convolution {unknown[0]!r} to skip")
    net = copy.deepcopy(model)
    chains = {name: chain for name, chain in _chains(net).items() if name not in skip}
    if not chains:
        raise ValueError("expected a convolution that is followed by a norm and a ReLU to gate, found none")
    for name, (norm, activation) in chains.items():
        conv = net.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        predictor = MaskPredictor(conv.in_channels, conv.out_channels, pool, softmax).to(conv.weight)
        # The network's own ReLU stays where it is: a second one changes nothing.
        gated = GatedConv(conv, net.get_submodule(norm) if norm else None, activation, predictor, r, criterion)
        _set(net, name, gated.train(conv.training))
        if norm:
            _set(net, norm, nn.Identity())
    return net


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _chains(model: nn.Module) -> dict[str, tuple[str | None, nn.Module | None]]:
    """Names of convolutions to gate, each with the name of its norm and its activation."""
    try:
        with fresh(model):
            graph = fx.Tracer().trace(model)
    except Exception as error:  # a network that cannot be traced, for any of many reasons
        raise ValueError(f"the network cannot be traced to find its convolutions: {error}") from error
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    chains: dict[str, tuple[str | None, nn.Module | None]] = {}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is not nn.Conv2d or calls[str(node.target)] > 1:
            continue
        follower, norm = _only_user(node), None
        after = modules.get(str(follower.target)) if follower is not None and follower.op == "call_module" else None
        if follower is not None and type(after) is nn.BatchNorm2d and calls[str(follower.target)] == 1:
            norm, follower = str(follower.target), _only_user(follower)
        if follower is None:
            continue
        activation = _relu(follower, modules)
        source = node.args[0]
        shortcut = isinstance(source, fx.Node) and len(source.users) > 1
        linear = norm is not None and ((_is_sum(follower) and not shortcut) or _is_conv(follower, modules))
        if activation is not None or linear:
            chains[str(node.target)] = (norm, activation)
    return chains


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """A ReLU like the one of a node, if it is one."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if type(module) is nn.ReLU or node.target in (F.relu, torch.relu, "relu", "relu_", F.relu_, torch.relu_):
        return nn.ReLU()
    return nn.ReLU6() if type(module) is nn.ReLU6 or node.target is F.relu6 else None


def _is_sum(node: fx.Node) -> bool:
    return node.target in (operator.add, operator.iadd, torch.add, "add", "add_")


def _is_conv(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), nn.Conv2d)
