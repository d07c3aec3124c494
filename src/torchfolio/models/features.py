"""Inner features of a network, read while it runs."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchfolio.models.device import device_of
from torchfolio.models.stateful import reset_state
from torchfolio.shown import Shown

Flatten = Literal[False, "all", "pool"]


Reader = Callable[[nn.Module, object], Sequence[Tensor]]


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


class Features(Shown):
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
