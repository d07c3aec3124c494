"""Activations of a user's network as rows of units: what the analyses of this family begin with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Probe = Tensor | Dataset | Iterable[Tensor | Sequence[Tensor]]


def input_batches(data: Probe, batch_size: int = 256) -> Iterator[Tensor]:
    """Batches of inputs; labels that come with them are dropped.

    Args:
        data: a tensor `[N, ...]`; a map-style data set of x or (x, y); or a loader or list of batches x or (x, y),
            which keep their size.
        batch_size: batch size of tensors and data sets.

    Raises:
        TypeError: if a batch does not begin with a tensor.
        ValueError: if there is no example.
    """
    examples = 0
    for batch in _split(data, batch_size):
        x = batch if isinstance(batch, Tensor) else batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"expected batches x or (x, y) of tensors, got {type(x).__name__}")
        if len(x):
            examples += len(x)
            yield x
    if not examples:
        raise ValueError("expected at least one example, got none")


def _split(data: Probe, batch_size: int) -> Iterable[Tensor | Sequence[Tensor]]:
    if isinstance(data, Tensor):
        return data.split(batch_size)
    return DataLoader(data, batch_size) if isinstance(data, Dataset) else data


def unit_rows(x: Tensor, unit_dim: int | None = None, every: int = 1) -> Tensor:
    """A layer's output as `[N, positions, units]`, each position of each example being a sample of all units.

    Args:
        x: `[N, S]`, `[N, S, H, W]` (and other maps with channels second) or `[N, T, S]`.
        unit_dim: axis of the units; 1 by default, the last one for three axes (tokens).
        every: stride over positions.

    Raises:
        ValueError: on fewer than two axes, an axis that is not there, or the batch's axis.
    """
    if x.dim() < 2:
        raise ValueError(f"expected activations [N, units] or with positions besides, got shape {tuple(x.shape)}")
    axis = unit_dim if unit_dim is not None else 2 if x.dim() == 3 else 1
    if not -x.dim() <= axis < x.dim() or axis % x.dim() == 0:
        raise ValueError(f"expected unit_dim to be an axis of {tuple(x.shape)} after the first, got {axis}")
    rows = x.movedim(axis, -1)
    return rows.flatten(1, -2)[:, ::every] if x.dim() > 2 else rows[:, None]


def layer_name(model: nn.Module, layer: str | nn.Module) -> str:
    """The dotted name of a layer, given by name or as a module of the network.

    Raises:
        ValueError: if the network has no such layer; the message lists those that it has.
    """
    modules = dict(model.named_modules())
    chosen = layer if isinstance(layer, str) else next((name for name, m in modules.items() if m is layer), None)
    if chosen is None or chosen not in modules or (chosen == "" and layer is not model):
        named = [name for name in modules if name]
        shown = ", ".join(named[:40]) + (", …" if len(named) > 40 else "")
        what = repr(layer) if isinstance(layer, str) else f"this {type(layer).__name__}"
        raise ValueError(f"the network has no layer {what}; its layers are {shown}")
    return chosen
