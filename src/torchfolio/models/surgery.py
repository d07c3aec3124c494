"""Surgery on a user's network: replacing layers, reading inner features, grouping parameters."""

from __future__ import annotations

import difflib
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchfolio.models.device import device_of
from torchfolio.models.stateful import reset_state

Predicate = Callable[[str, nn.Module], bool] | type[nn.Module] | tuple[type[nn.Module], ...]
Flatten = Literal[False, "all", "pool"]
Reader = Callable[[nn.Module, object], Sequence[Tensor]]


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


def _by_any_name(model: nn.Module, matches: Callable[[str, nn.Module], bool]) -> Callable[[str, nn.Module], bool]:
    """A module that is registered under several names matches everywhere if it does under one of them."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return lambda path, module: any(matches(name, module) for name in names.get(id(module), [path]))


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


class Feature(NamedTuple):
    """One output of one module.

    Attributes:
        name: name of the module.
        value: output.
        version: its version counter when it was seen; another one now means that it was overwritten in place.
    """

    name: str
    value: Tensor
    version: int


class _Listener:
    """A hook that hands on the last of its arguments. In a copy or a pickle of the module it hears nothing."""

    def __init__(self, hear: Callable[[object], None] | None = None) -> None:
        self.hear = hear

    def __call__(self, module: nn.Module, *seen: object) -> None:
        if self.hear is not None:
            self.hear(seen[-1])

    def __reduce__(self) -> tuple[type[_Listener], tuple[()]]:
        return _Listener, ()


class Features:
    """Outputs of named modules, filled at every forward pass of the model.

    Index it by name. `close` (or leaving the `with` block) removes the hooks.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], flatten: Flatten, detach: bool, read: Reader | None = None
    ) -> None:
        self._flatten: Flatten = flatten
        self._detach = detach
        self._read = read
        self._seen: list[Feature] = []
        self.names = tuple(names)
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                close = difflib.get_close_matches(name, list(modules), n=3) or list(modules)[1:6]
                raise ValueError(f"the network has no module {name!r}; did you mean {', '.join(close)}?")
        self._handles = [model.register_forward_pre_hook(_Listener(lambda _: self._seen.clear()))]
        self._handles += [
            modules[name].register_forward_hook(_Listener(partial(self._keep, name, modules[name]))) for name in names
        ]

    def _keep(self, name: str, module: nn.Module, output: object) -> None:
        for value in self._read(module, output) if self._read is not None else [_first_tensor(name, output)]:
            features = flatten_features(value, self._flatten)
            features = features.detach() if self._detach else features
            self._seen.append(Feature(name, features, 0 if features.is_inference() else features._version))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(f"{name!r} was not asked for; there are {', '.join(self.names)}")
        outputs = self.calls(name)
        if not outputs:
            raise RuntimeError(f"{name} has not run; call the model first")
        if len(outputs) > 1:
            raise RuntimeError(f"{name} ran {len(outputs)} times in one pass; use calls({name!r})")
        return outputs[0]

    def calls(self, name: str) -> list[Tensor]:
        """Outputs of every call of a module in the last pass."""
        return [feature.value for feature in self._seen if feature.name == name]

    def in_order(self) -> list[Feature]:
        """All outputs of the last pass in running order; a module that ran twice is there twice."""
        return list(self._seen)

    def clear(self) -> None:
        """Forget what was seen. The model's own forward pass does so by itself."""
        self._seen.clear()

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and features, in the order asked for."""
        return [(name, self[name]) for name in self.names]

    def close(self) -> None:
        """Remove the hooks; what was seen last stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Features:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


def _first_tensor(name: str, output: object) -> Tensor:
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]  # attention and recurrent modules return their features first
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name} returns a {type(output).__name__}, expected a tensor (or a tuple that starts with one)"
        )
    return output


def take_features(
    model: nn.Module,
    names: Sequence[str] | str,
    *,
    flatten: Flatten = False,
    detach: bool = False,
    read: Reader | None = None,
) -> Features:
    """Read inner features during the model's own forward pass.

    Args:
        model: network.
        names: dotted names of modules.
        flatten: `False` keeps all axes, `"all"` gives `[B, features]`, `"pool"` averages over positions or tokens.
        detach: cut the features from the graph.
        read: `(module, output) -> tensors`, what to keep of an output that is not one tensor; by default the tensor
            that a tuple starts with.

    Returns:
        A `Features` to be used in a `with` block and indexed by name.

    Raises:
        ValueError: if a name is unknown.

    Example:
        >>> with take_features(net, ["block3", "block6"]) as features:
        ...     logits = net(x)
        ...     loss = similarity(features["block3"], features["block6"])
    """
    return Features(model, [names] if isinstance(names, str) else list(names), flatten, detach, read)


def flatten_features(x: Tensor, flatten: Flatten = "all") -> Tensor:
    """Features as rows: `"all"` joins all axes but the batch, `"pool"` averages over positions.

    `[B, C, ...]` maps are averaged over their positions, `[B, T, D]` tokens over T.
    """
    if flatten not in (False, "all", "pool"):
        raise ValueError(f"expected flatten to be False, 'all' or 'pool', got {flatten!r}")
    if flatten is False or x.dim() <= 2:
        return x
    if flatten == "all":
        return x.flatten(1)
    return x.mean(1) if x.dim() == 3 else x.flatten(2).mean(2)


@torch.no_grad()
def collect_features(
    model: nn.Module,
    x: Tensor,
    names: Sequence[str] | str,
    *,
    flatten: Flatten = "all",
    batch_size: int = 256,
) -> dict[str, Tensor]:
    """Features of many examples, computed in batches in evaluation mode on the model's device.

    Args:
        model: network; its mode is restored, and modules with state start every batch afresh.
        x: inputs `[N, ...]`.
        names: dotted names of modules.
        flatten: shape of the features, see `take_features`.
        batch_size: examples at a time.

    Returns:
        For every name a tensor on the CPU with N rows.
    """
    names = [names] if isinstance(names, str) else list(names)
    device = device_of(model, x)
    modes = {module: module.training for module in model.modules()}
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    try:
        model.eval()
        with take_features(model, names, flatten=flatten, detach=True) as features:
            for batch in x.split(batch_size):
                reset_state(model)
                model(batch.to(device))
                for name in names:
                    parts[name].append(features[name].cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
        reset_state(model)
    return {name: torch.cat(rows) for name, rows in parts.items()}


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
