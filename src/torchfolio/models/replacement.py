"""Layers of a network replaced in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

Predicate = Callable[[str, nn.Module], bool] | type[nn.Module] | tuple[type[nn.Module], ...]


def _matcher(predicate: Predicate) -> Callable[[str, nn.Module], bool]:
    if isinstance(predicate, type | tuple):
        kinds = predicate
        return lambda name, module: isinstance(module, kinds)
    return predicate


def replace_layers(
    model: nn.Module, predicate: Predicate, factory: Callable[[nn.Module], nn.Module], *, allow_none: bool = False
) -> nn.Module:
    """Replace modules of a network in place.

    Each new module takes over the training mode, and is moved to the device and floating dtype of the old one. A
    module used in several places is replaced once, by the same new module everywhere. Inside a replaced module
    nothing is replaced again. `nn.TransformerEncoderLayer` has a fused path in evaluation mode that reads the
    weights of its standard children; where one of its descendants is replaced, that path is switched off, so that
    the new module really runs.

    Args:
        model: network; if it matches itself, the new module is returned in its place.
        predicate: a module type, a tuple of them, or `(name, module) -> bool`.
        factory: function from the old module to the new one. To hand weights over, copy them here, for example
            `new.weight = old.weight` to share or `new.load_state_dict(old.state_dict())` to copy.
        allow_none: whether it is no error that nothing matches.

    Returns:
        The model.

    Raises:
        ValueError: if no module matches.
        TypeError: if the factory returns something else than a module.

    Example:
        >>> replace_layers(net, nn.ReLU, lambda old: nn.GELU())
    """
    matches = _by_any_name(model, _matcher(predicate))
    replacements: dict[int, nn.Module] = {}
    if matches("", model):
        return _make(factory, model, replacements, [])
    count = _replace_below(model, "", matches, factory, replacements, set(), [])
    if not count and not allow_none:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise ValueError(f"no module matches the predicate; the network has {', '.join(kinds)}")
    _guard_fast_paths(model, {id(m) for m in replacements.values()})
    return model


def _replace_below(
    parent: nn.Module,
    prefix: str,
    matches: Callable[[str, nn.Module], bool],
    factory: Callable[[nn.Module], nn.Module],
    made: dict[int, nn.Module],
    seen: set[int],
    kept: list[nn.Module],
) -> int:
    if id(parent) in seen:
        return 0
    seen.add(id(parent))
    count = 0
    for name, child in list(parent._modules.items()):
        if child is None:
            continue
        path = f"{prefix}.{name}" if prefix else name
        if id(child) in made or matches(path, child):
            parent._modules[name] = _make(factory, child, made, kept)
            count += 1
        else:
            count += _replace_below(child, path, matches, factory, made, seen, kept)
    return count


def _make(
    factory: Callable[[nn.Module], nn.Module], old: nn.Module, made: dict[int, nn.Module], kept: list[nn.Module]
) -> nn.Module:
    if id(old) in made:
        return made[id(old)]
    new = factory(old)
    if not isinstance(new, nn.Module):
        raise TypeError(f"expected the factory to return a module, got {type(new).__name__}")
    if old._forward_hooks or old._forward_pre_hooks:
        warnings.warn(
            f"the replaced {type(old).__name__} had forward hooks, which the new module does not have", stacklevel=4
        )
    if new is not old:
        like = next((p for p in (*old.parameters(), *old.buffers()) if p.is_floating_point()), None)
        if like is not None:
            new.to(device=like.device, dtype=like.dtype)
        new.train(old.training)
    made[id(old)] = made[id(new)] = new
    kept.append(old)  # an id is unique only among the living
    return new


def _guard_fast_paths(model: nn.Module, new: set[int]) -> None:
    """Keep transformer layers with replaced parts off the fused path, and stacks off nested tensors."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(id(part) in new for part in module.modules()):
            # The layer asks for these before it looks into its norms, which may no longer be what it expects.
            module.activation_relu_or_gelu = 0
            if not hasattr(module.self_attn, "batch_first"):
                module.self_attn.batch_first = False
        if isinstance(module, nn.TransformerEncoder) and any(id(part) in new for part in module.modules()):
            module.enable_nested_tensor = False
            module.use_nested_tensor = False


def _by_any_name(model: nn.Module, matches: Callable[[str, nn.Module], bool]) -> Callable[[str, nn.Module], bool]:
    """A module that is registered under several names matches everywhere if it does under one of them."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return lambda path, module: any(matches(name, module) for name in names.get(id(module), [path]))
