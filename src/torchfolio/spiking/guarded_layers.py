"""The layers of a network that are guarded by subspaces of their inputs, and the weights that nothing guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from torchfolio.spiking.credit import WeightLayer, weight_layers

__all__ = ["choose_layers", "unguarded_weights"]

Choice = Sequence[str] | Callable[[str, nn.Module], bool] | None


def choose_layers(model: nn.Module, choice: Choice) -> dict[str, WeightLayer]:
    """Linear layers and ungrouped convolutions by name, of shared weights the first.

    Args:
        model: network.
        choice: names of the layers, or a predicate (name, layer); all by default.

    Raises:
        ValueError: if there is none, or a name is none of them.
    """
    known = weight_layers(model)
    if choice is None:
        chosen = known
    elif callable(choice):
        chosen = {n: m for n, m in known.items() if choice(n, m)}
    else:
        chosen = {n: known[n] for n in choice if n in known}
    if not chosen or (isinstance(choice, Sequence) and len(chosen) < len(choice)):
        raise ValueError(
            f"expected linear layers or convolutions without groups, of {', '.join(known) or 'none'}; got {choice!r}"
        )
    names: dict[int, str] = {}
    for name, layer in chosen.items():
        names.setdefault(id(layer.weight), name)
    return {name: chosen[name] for name in names.values()}


def unguarded_weights(model: nn.Module) -> list[str]:
    """Names of trained weights that no subspace can guard: of recurrent layers, embeddings, grouped convolutions, …"""
    guarded = {id(layer.weight) for layer in weight_layers(model).values()}
    return [n for n, p in model.named_parameters() if p.dim() > 1 and p.requires_grad and id(p) not in guarded]
