"""Splitting an ordinary network into the sequential layers or blocks that it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor, nn

from torchfolio.engine.traced_cuts import ByMode as ByMode
from torchfolio.engine.traced_cuts import Unit, cut_after, cut_before, in_mode, traced


def layers(model: nn.Module, example: Tensor | None = None) -> list[Unit]:
    """The network as layers that run one after the other; the last one is the head.

    An `nn.Sequential` is its children; those that are again an `nn.Sequential` of several weight layers are
    opened. Any other module is one unit (a residual block stays whole). A network that is no `nn.Sequential`
    is traced: its children must run in order, each on the output of the one before; functions between them,
    such as `torch.flatten`, go into the layer that follows.

    A layer is a unit with weights. Activations, pools, dropout and norms join the layer before them; what
    stands before the first layer joins that. The last layer is the head: pools, flattening and dropout right
    before it belong to it, so that it goes from feature maps to the output.

    The modules are the model's own: to train them is to train the model.

    Args:
        model: network.
        example: one batch of inputs. With it the composed layers are compared with the model in evaluation
            mode. Networks that cannot be traced, because their forward pass depends on the data, are split
            by this comparison alone.

    Returns:
        Pairs of name and module, in running order. A layer is named after its first unit with weights (the
        head too), by the dotted name in the model.

    Raises:
        ValueError: if the children do not run in order; the message says how to name the blocks by hand.
    """
    return _attach(_units(model, example))


def blocks(
    model: nn.Module,
    n: int | None = None,
    *,
    names: Sequence[str] | None = None,
    example: Tensor | None = None,
) -> list[nn.Module]:
    """The network in contiguous blocks that compose to it.

    Args:
        model: network.
        n: number of blocks, nearly equal in `layers`, the first ones longer.
        names: dotted names of the modules that start a block, in running order; what comes before the first
            one belongs to the first block. Modules that a name leads through (`"layer2"` of `"layer2.0"`)
            are opened, others stay whole, so children that run out of order may be kept inside one block.
        example: one batch of inputs; see `layers`.

    Returns:
        The blocks, sharing the model's parameters. The last one ends in the network's output.

    Raises:
        ValueError: if neither or both of `n` and `names` are given, `n` is out of range, a name is unknown
            or out of order, or the network is not sequential.
    """
    if (n is None) == (names is None):
        raise ValueError("give either n, the number of blocks, or names, the modules that start them")
    if names is not None:
        return _named_blocks(model, list(names), example)
    parts = [module for _, module in layers(model, example)]
    if not isinstance(n, int) or not 1 <= n <= len(parts):
        raise ValueError(f"expected between 1 and {len(parts)} blocks (the network's layers), got {n!r}")
    size, longer = divmod(len(parts), n)
    cuts = [k * size + min(k, longer) for k in range(n + 1)]
    return [_join(parts[a:b]) for a, b in pairwise(cuts)]


def _join(parts: Sequence[nn.Module]) -> nn.Module:
    return parts[0] if len(parts) == 1 else in_mode(nn.Sequential(*parts), parts[0].training)


def _units(model: nn.Module, example: Tensor | None) -> list[Unit]:
    """The smallest pieces to cut between, in running order."""
    if next(model.children(), None) is None:
        return [("", model)]
    if _is_sequential(model):
        return list(_open(model, ""))
    pieces = cut_after(model, [name for name, _ in model.named_children()], example)
    return [unit for name, piece in pieces for unit in _opened(piece, name)]


def _is_sequential(module: nn.Module) -> bool:
    """An `nn.Sequential` that runs as one (a subclass may have a forward of its own)."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _open(module: nn.Module, path: str) -> Iterator[Unit]:
    # Not `named_children`, which passes over a module that is registered twice.
    for name, child in module._modules.items():
        if child is not None:
            yield from _opened(child, f"{path}.{name}" if path else name)


def _opened(module: nn.Module, path: str) -> Iterator[Unit]:
    """The units of a module: its own children where it is a chain of several weight layers."""
    if not _is_sequential(module):
        yield path, module
        return
    inside = list(_open(module, path))
    # A convolution with its norm and activation is one layer. A named head is one, however deep.
    whole = sum(_has_weights(part) for _, part in inside) < 2 or path.rpartition(".")[2] == "head"
    yield from [(path, module)] if whole else inside


def _has_weights(module: nn.Module) -> bool:
    """Whether a module has weights that are not a norm's."""
    return any(
        next(part.parameters(recurse=False), None) is not None and "Norm" not in type(part).__name__
        for part in module.modules()
    )


def _attach(units: Sequence[Unit]) -> list[Unit]:
    """Give every layer its weights: what has none joins the layer before, or the head."""
    groups: list[list[Unit]] = []
    for unit in units:
        complete = bool(groups) and any(_has_weights(module) for _, module in groups[-1])
        if not groups or (complete and _has_weights(unit[1])):
            groups.append([unit])
        else:
            groups[-1].append(unit)
    if len(groups) > 1:
        *_, before, head = groups
        while len(before) > 1 and _leads_to_head(before[-1][1]):
            head.insert(0, before.pop())
    return [(_name(group), _join([module for _, module in group])) for group in groups]


def _name(group: Sequence[Unit]) -> str:
    return next((name for name, module in group if _has_weights(module)), group[0][0])


def _leads_to_head(module: nn.Module) -> bool:
    """Whether a module turns the last features into what a classifier takes."""
    kind = type(module).__name__
    return kind.startswith(("Adaptive", "AvgPool", "Dropout", "Flatten", "GlobalPool", "Identity"))


def _named_blocks(model: nn.Module, names: list[str], example: Tensor | None) -> list[nn.Module]:
    known = dict(model.named_modules())
    for name in names:
        if not name or name not in known:
            children = ", ".join(n for n, _ in model.named_children())
            raise ValueError(f"the network has no module {name!r}; its children are {children}")
    pieces = _pieces_between(model, names, example)
    running = [name for name, _ in pieces]
    places = [running.index(name) if name in running else -1 for name in names]
    if -1 in places or places != sorted(set(places)):
        raise ValueError(f"expected names in running order, each once, among {running}; got {names}")
    cuts = [0, *(p for p in places if p > 0), len(pieces)]
    return [_join([module for _, module in pieces[a:b]]) for a, b in pairwise(cuts)]


def _pieces_between(model: nn.Module, names: Sequence[str], example: Tensor | None) -> list[Unit]:
    """The network in pieces that start at the named modules, or finer."""
    if _is_sequential(model) and all("." not in name for name in names):
        return [(name, child) for name, child in model._modules.items() if child is not None]
    leaves = _leaves(model, names)
    try:
        return cut_after(model, leaves, example)
    except ValueError as error:
        # Not everywhere can be cut. The named modules may still be the only places where it is wanted.
        try:
            graphs = traced(model, leaves)
        except Exception:
            raise error from None
        return cut_before(model, graphs, names, example)


def _leaves(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The modules that no name leads through, nor any of their children: those that stay whole."""
    opened = {""}
    for name in names:
        parts = name.split(".")
        opened.update(".".join(parts[:k]) for k in range(1, len(parts)))
    leaves = []
    for path in sorted(opened):
        module = model.get_submodule(path)
        leaves += [f"{path}.{n}" if path else n for n, _ in module.named_children()]
    return [leaf for leaf in leaves if leaf not in opened]
