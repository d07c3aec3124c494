"""Records what the layers of a network give in the very pass that runs, as features with the axis of examples first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from torchfolio.models import take_features
from torchfolio.shown import Shown

__all__ = ["LAYERS", "Maps", "Recorder", "Select", "device_of", "examples_in", "layer_correspondence", "placed"]

Select = str | type[nn.Module] | Sequence[str] | tuple[type[nn.Module], ...]
Maps = dict[str, Tensor]  # features [N, ...] of every recorded layer, in running order

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.Linear,
    nn.AdaptiveAvgPool2d,
    nn.RNN,
    nn.LSTM,
    nn.TransformerDecoderLayer,
    nn.LayerNorm,
    nn.MultiheadAttention,
)
"""Types of modules whose outputs are compared unless others are asked for."""


def layer_correspondence(n_guide: int, n_target: int) -> list[tuple[int, int]]:
    """Spread the guide's layers evenly over the target's: layer $k$ of $n_G$ goes with layer

    $$j(k) = \\min\\bigl(\\operatorname{round}(k (n_T - 1) / (n_G - 1)),\\; n_T - 1\\bigr),$$

    rounding half to even. A deeper guide gives several layers to one of the target; a shallower one skips some.

    Args:
        n_guide: number of guide layers $n_G$.
        n_target: number of target layers $n_T$.

    Returns:
        Pairs (guide layer, target layer), one for each guide layer.

    Raises:
        ValueError: if a network has no layer.
    """
    if n_guide < 1 or n_target < 1:
        raise ValueError(f"expected at least one layer of each network, got {n_guide} and {n_target}")
    step = (n_target - 1) / max(n_guide - 1, 1)
    return [(k, min(round(k * step), n_target - 1)) for k in range(n_guide)]


class Recorder(Shown):
    """Records the layers of one network in running order, by name and call.

    Args:
        network: network to be recorded.
        layers: names or types; see `Guidance`.
        side: name of the network in messages.
        batch_dim: axis of the examples in the inputs.
    """

    def __init__(self, network: nn.Module, layers: Select | None, side: str, batch_dim: int) -> None:
        self.network, self.side, self.batch_dim = network, side, batch_dim
        self.kinds = LAYERS if layers is None else _types(layers)
        self.names = _names(layers) if self.kinds is None else []
        self.features = None
        self.arm()  # finds unknown names and networks without a layer now
        self.close()

    def arm(self) -> None:
        """Put hooks on the modules as they are now."""
        self.close()
        self.features = take_features(self.network, self._modules(), read=_tensors)

    def close(self) -> None:
        if self.features is not None:
            self.features.close()
            self.features = None

    def clear(self) -> None:
        """Forget the last pass."""
        if self.features is not None:
            self.features.clear()

    def take(self, n: int, *, required: bool = True) -> Maps:
        """Features `[n, ...]` recorded since the last pass began, or since they were taken; then forget them.

        Args:
            n: number of examples.
            required: this is a whole pass: it must hold features, and those of the last layer found by type, the
                logits, are left out.

        Returns:
            Features by name; a module that ran before in the same pass gets `#2`, `#3`, ….
        """
        if self.features is None:
            raise RuntimeError(
                f"the hooks are off the {self.side}; use the guidance in a with block, or make a new one"
            )
        maps: Maps = {}
        calls: dict[str, int] = {}
        for name, value, version in self.features.in_order():
            if not value.is_inference() and value._version != version:
                raise RuntimeError(
                    f"the output of the {self.side}'s {name or 'network'} was overwritten in place after it was "
                    "recorded; set inplace=False in the module that follows, or choose other layers"
                )
            first = self._examples_first(name, value, n)
            if first is not None:
                calls[name] = calls.get(name, 0) + 1
                maps[name if calls[name] == 1 else f"{name}#{calls[name]}"] = first
        self.features.clear()
        if required:
            self._check(maps)
            if self.kinds is not None:
                maps.popitem()  # the logits
        return maps

    def _check(self, maps: Maps) -> None:
        if not maps:
            raise RuntimeError(
                f"no layer of the {self.side} was recorded with an axis of examples; run {self.side}(x) right before "
                "guidance(x), on the same batch"
            )
        if self.kinds is not None and len(maps) < 2:
            raise ValueError(
                f"the {self.side} has one layer of the types asked for, the last, which is left out; name layers of "
                f"its own: {_some(name for name, _ in self.network.named_modules() if name)}"
            )

    def _modules(self) -> list[str]:
        if self.kinds is None:
            return list(dict.fromkeys(name.split("#")[0] for name in self.names))
        names = [name for name, module in self.network.named_modules() if isinstance(module, self.kinds)]
        if not names:
            types_seen = _some(sorted({type(m).__name__ for m in self.network.modules()}))
            raise ValueError(
                f"the {self.side} has no module of the types {_some(kind.__name__ for kind in self.kinds)}; it is "
                f"made of {types_seen}; name its layers"
            )
        return names

    def _examples_first(self, name: str, value: Tensor, n: int) -> Tensor | None:
        """The features with the axis of examples first; `None` for outputs of a type search that have none."""
        if value.dim() > 1 and value.is_floating_point():
            axes = [self.batch_dim, *range(value.dim())] if value.dim() > self.batch_dim + 1 else range(value.dim())
            if (own := _batch_axis(self.network, name)) is not None and value.dim() == 3:
                axes = [own, *axes]
            axis = next((axis for axis in axes if value.shape[axis] == n), None)
            if axis is not None:
                return value.movedim(axis, 0)
        if self.kinds is None:
            raise ValueError(
                f"expected the {self.side}'s {name} to give features with an axis of {n} examples, got shape "
                f"{tuple(value.shape)} of {value.dtype}"
            )
        return None

    def __enter__(self) -> Recorder:
        self.arm()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _tensors(module: nn.Module, output: object) -> list[Tensor]:
    """The tensors in a module's output: packed sequences padded, final states of recurrent modules left out."""
    if isinstance(output, PackedSequence):
        return [pad_packed_sequence(output, batch_first=bool(getattr(module, "batch_first", False)))[0]]
    if isinstance(output, Tensor):
        return [output]
    if isinstance(module, nn.RNNBase) and isinstance(output, tuple):
        return _tensors(module, output[0])
    if isinstance(module, nn.MultiheadAttention) and isinstance(output, tuple) and output[0].dim() == 3:
        # The weights beside it have the examples first, whatever `batch_first` says.
        first = output[0] if module.batch_first else output[0].transpose(0, 1)
        return [first, *_tensors(module, output[1])]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in _tensors(module, part)]
    return []


def _batch_axis(network: nn.Module, name: str) -> int | None:
    """The axis of the examples in what `_tensors` takes of a layer.

    It is known where the layer, or a transformer's that it stands in, says it by `batch_first`; else it is `None`.
    """
    module = network.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        return 0
    while not isinstance(module, nn.RNNBase | nn.Transformer | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder) and len(module.layers):
            module = module.layers[0]
        elif name:
            name = name.rpartition(".")[0]
            module = network.get_submodule(name)
        else:
            return None
    return 0 if getattr(getattr(module, "self_attn", module), "batch_first", False) else 1


def _types(layers: Select) -> tuple[type[nn.Module], ...] | None:
    """The types asked for; `None` if layers are asked for by name."""
    kinds = tuple(kind for kind in ([layers] if isinstance(layers, str | type) else layers) if isinstance(kind, type))
    return kinds or None


def _names(layers: Select | None) -> list[str]:
    names = [layers] if isinstance(layers, str) else list(layers or ())  # pyright: ignore[reportArgumentType]
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None or not names:
        raise ValueError(f"expected layers by name or by type, got {layers if wrong is None else wrong!r}")
    return [str(name) for name in names]


def examples_in(inputs: Sequence[Any], batch_dim: int) -> int:
    """Number of examples of a batch.

    Raises:
        ValueError: if there are too few to compare.
    """
    x = inputs[0] if inputs else None
    if not isinstance(x, Tensor) or x.dim() <= batch_dim:
        what = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected the inputs to start with a tensor that has an axis {batch_dim}, got {what}")
    if x.shape[batch_dim] < 4:
        raise ValueError(
            f"expected a batch of at least 4 examples to compare representations on, got {x.shape[batch_dim]}; "
            "leave the last incomplete batch out (drop_last=True)"
        )
    return x.shape[batch_dim]


def device_of(network: nn.Module) -> torch.device | None:
    """Where the parameters of a network are."""
    return next((p.device for p in network.parameters()), None)


def _some(names: Any, most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def placed(x: Any, weight: Tensor) -> Any:
    """A tensor on a weight's device; floats in its precision too."""
    if not isinstance(x, Tensor):
        return x
    return x.to(weight.device, weight.dtype) if x.is_floating_point() else x.to(weight.device)
