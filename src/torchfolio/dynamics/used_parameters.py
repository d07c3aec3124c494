"""The parameters that a field depends on, found in the graph of one evaluation; and fields that cannot be asked again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from torchfolio.dynamics.stepping import Problem

__all__ = ["refuse_random_layers", "used_parameters"]


def refuse_random_layers(field: Any) -> None:
    """Refuse a module that answers at random, or counts its calls, where it will be asked again.

    Raises:
        ValueError: if dropout or batch normalisation is in training mode.
    """
    modules = field.modules() if isinstance(field, nn.Module) else ()
    for module in modules:
        if module.training and isinstance(module, (_DropoutNd, _BatchNorm)):
            raise ValueError(
                f"expected a field that answers alike each time, got {type(module).__name__} in training mode; "
                "use the gradient Direct() or call eval()"
            )


def used_parameters(problem: Problem, y0: Tensor) -> tuple[Tensor, ...]:
    """Parameters that the field depends on directly.

    Raises:
        ValueError: if it depends on other tensors that want gradients, or a parameter was computed from another one that
            the field depends on too, whose gradient would count twice.
    """
    terms = problem.terms
    before = terms.stats.nfe_forward
    with torch.enable_grad():
        # As in a solve, the state wants a gradient: fields such as those of flows differentiate in it themselves.
        state = y0.detach().requires_grad_()
        outputs = terms.rates(problem.sides(problem.ts[0], problem.ts[-1])[0], state)
    terms.stats.nfe_forward = before
    # Parameters by the node of the graph that stands for them: leaves by their own, computed ones by what computed them.
    declared = {id(p) if p.grad_fn is None else p.grad_fn: p for p in terms.params}
    used, missing = _reached([out.grad_fn for out in outputs], {**declared, id(state): state})
    used = [key for key in used if key != id(state)]
    if missing:
        raise ValueError(
            f"expected params to name every tensor that the field depends on and that wants a gradient, "
            f"one of shape {tuple(missing[0].shape)} is missing"
        )
    computed = [node for key in used if (node := declared[key].grad_fn) is not None]
    behind, _ = _reached([parent for node in computed for parent, _ in node.next_functions], declared)
    if twice := [declared[key] for key in used if key in behind]:
        raise ValueError(
            f"expected params of which none was computed from another, one of shape {tuple(twice[0].shape)} was used so; "
            "hand the field one of the two detached, or use the gradient Direct()"
        )
    return tuple(declared[key] for key in used)


def _reached(nodes: list[Any], declared: Mapping[Any, Tensor]) -> tuple[list[Any], list[Tensor]]:
    """Keys of declared tensors that a graph reaches without passing through one, and leaves that are not declared."""
    seen, used, missing = set(), [], []
    nodes = [node for node in nodes if node is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        key = node if variable is None else id(variable)
        if key in declared:
            used.append(key)
        elif variable is not None:
            missing.append(variable)
        else:
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return used, missing
