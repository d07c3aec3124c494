"""Parameters in the groups of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from torchfolio.models.replacement import Predicate, _matcher


def parameter_groups(
    model: nn.Module, groups: Mapping[Predicate, Mapping[str, object]], *, biases: Mapping[str, object] | None = None
) -> list[dict[str, object]]:
    """Optimizer groups chosen by module type.

    Args:
        model: network.
        groups: function from a module type, a tuple of types or `(name, module) -> bool` to the options of the group
            that gets the parameters that such modules own. The first that matches wins; the rest form a group without
            options.
        biases: options for parameters named `bias` of modules that match no group.

    Returns:
        Groups for a `torch.optim` optimizer, in which every parameter is once, tied ones too.

    Example:
        >>> parameter_groups(net, {(nn.BatchNorm2d, nn.LayerNorm): {"weight_decay": 0.0}}, biases={"weight_decay": 0.0})
    """
    matchers = [(_matcher(predicate), dict(options)) for predicate, options in groups.items()]
    chosen: list[list[nn.Parameter]] = [[] for _ in matchers]
    bias: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        target = next((k for k, (matches, _) in enumerate(matchers) if matches(name, module)), None)
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if target is not None:
                chosen[target].append(parameter)
            else:
                (bias if biases is not None and key == "bias" else rest).append(parameter)
    made: list[dict[str, object]] = [{"params": p, **o} for p, (_, o) in zip(chosen, matchers, strict=True) if p]
    if bias:
        made.append({"params": bias, **(biases or {})})
    if rest:
        made.append({"params": rest})
    return made
