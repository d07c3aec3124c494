"""Splitting an ordinary network into the sequential layers or blocks that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

HOW_TO_NAME = (
    "name the modules that start each block, for example blocks(model, names=[{names}]), or wrap the network in an "
    "nn.Sequential"
)


def layers(model: nn.Module, example: Tensor | None = None) -> list[tuple[str, nn.Module]]:
    """The network as layers that run one after the other; the last one is the head.

    An `nn.Sequential` is its children, nested ones opened. Modules without weights and norms belong to the weight
    layer before them; pools and flattening before the last weight layer belong to it, so that the last entry goes
    from feature maps to the output. Children with names of their own (residual blocks, the children of a reference
    network) stay whole. Any other network is traced: its children must run in order, each on the output of the one
    before; functions between them, such as `torch.flatten`, go into the layer that follows.

    The modules are the model's own: to train them is to train the model.

    Args:
        model: the network.
        example: one batch of inputs. Needed for networks that are no `nn.Sequential`, where the composed layers
            are compared with the model.

    Returns:
        Pairs of name and module. A layer made of several modules is named after the first.

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
        model: the network.
        n: number of blocks, nearly equal in layers, the first ones longer.
        names: dotted names of the modules that start a block, in running order; what comes before the first one
            belongs to the first block.
        example: one batch of inputs; see `layers`.

    Returns:
        The blocks, sharing the model's parameters. The last one ends in the network's output.

    Raises:
        ValueError: if neither or both of `n` and `names` are given, `n` is out of range, a name is unknown or out
            of order, or the network is not sequential.
    """
    if (n is None) == (names is None):
        raise ValueError("give either n, the number of blocks, or names, the modules that start them")
    if names is not None:
        return _named_blocks(model, list(names), example)
    parts = [module for _, module in layers(model, example)]
    if n is None or not 1 <= n <= len(parts):
        raise ValueError(f"expected between 1 and {len(parts)} blocks (the network's layers), got {n}")
    size, longer = divmod(len(parts), n)
    cuts = [k * size + min(k, longer) for k in range(n + 1)]
    return [_join(parts[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def _join(parts: Sequence[nn.Module]) -> nn.Module:
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _units(model: nn.Module, example: Tensor | None) -> list[tuple[str, nn.Module]]:
    """The smallest pieces to cut between, in running order."""
    if _is_sequential(model):
        return _open(model, "")
    if next(model.children(), None) is None:
        return [("", model)]
    children = [name for name, _ in model.named_children()]
    pieces = _trace(model, children)
    if example is not None:
        _compare(model, [piece for _, piece in pieces], example, children)
    return [
        unit for name, piece in pieces for unit in (_open(piece, name) if _is_sequential(piece) else [(name, piece)])
    ]


def _is_sequential(module: nn.Module) -> bool:
    """An `nn.Sequential` that runs as one (a subclass may have a forward of its own)."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _open(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    units: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children() if not _repeats(module) else _all_children(module):
        path = f"{prefix}.{name}" if prefix else name
        # A named group in a reference network is one layer; only anonymous nests are opened.
        opened = _is_sequential(child) and type(child) is nn.Sequential and _opens(child, name)
        units.extend(_open(child, path) if opened else [(path, child)])
    return units


def _repeats(module: nn.Module) -> bool:
    return len(dict(module.named_children())) != len(module._modules)


def _all_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children including those registered twice, which `named_children` drops."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _opens(child: nn.Module, name: str) -> bool:
    """Whether a nest holds layers to cut between, rather than being one layer with its norm and activation."""
    return sum(_weighty(part) for _, part in _all_children(child)) > 1 and name != "head"


def _weighty(module: nn.Module) -> bool:
    """Whether a module has weights of its own that are not a norm's."""
    return any(
        next(part.parameters(recurse=False), None) is not None and "Norm" not in type(part).__name__
        for part in module.modules()
    )


def _attach(units: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Give every layer its weights: what has none joins the layer before, or the head."""
    groups: list[tuple[str, list[nn.Module]]] = []
    for name, module in units:
        if groups and not (_weighty(module) and any(_weighty(part) for part in groups[-1][1])):
            groups[-1][1].append(module)
        else:
            groups.append((name, [module]))
    _move_to_head(groups)
    return [(name, _join(parts)) for name, parts in groups]


def _move_to_head(groups: list[tuple[str, list[nn.Module]]]) -> None:
    """Pools, flattening and dropout right before the head belong to it."""
    if len(groups) < 2:
        return
    before, (name, head) = groups[-2][1], groups[-1]
    while len(before) > 1 and _leads_to_head(before[-1]):
        head.insert(0, before.pop())
    groups[-1] = (name, head)


def _leads_to_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Flatten | nn.Dropout) or type(module).__name__.startswith(
        ("AdaptiveAvg", "AdaptiveMax", "AvgPool")
    )


class _ChildTracer(fx.Tracer):
    """Traces with the named modules as leaves."""

    def __init__(self, leaves: Sequence[str]) -> None:
        super().__init__()
        self.leaves = set(leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, leaves: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Cut the traced network after every leaf: one piece a leaf, with the functions that run before it."""
    try:
        graph = _ChildTracer(leaves).trace(model)
    except Exception as error:
        raise ValueError(
            f"cannot follow how the children of {type(model).__name__} run ({type(error).__name__}: {error}); "
            + HOW_TO_NAME.format(names=", ".join(map(repr, list(leaves)[:3])))
        ) from error
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    _check_chain(model, inputs, nodes, output, leaves)
    calls = [i for i, node in enumerate(nodes) if node.op == "call_module" and node.target in leaves]
    if not calls:
        raise ValueError(f"none of the children of {type(model).__name__} runs as a module")
    ends = [i + 1 for i in calls]
    ends[-1] = len(nodes)  # what follows the last child belongs to it
    pieces, start = [], 0
    for call, end in zip(calls, ends, strict=True):
        source = inputs[0] if start == 0 else nodes[start - 1]
        pieces.append((str(nodes[call].target), _piece(model, nodes[start:end], source)))
        start = end
    return pieces


def _check_chain(
    model: nn.Module, inputs: list[fx.Node], nodes: list[fx.Node], output: fx.Node, leaves: Sequence[str]
) -> None:
    """Between two children exactly one value may be alive, and every child runs once."""
    complaint = None
    called = [node.target for node in nodes if node.op == "call_module"]
    repeated = next((target for target in called if target in leaves and called.count(target) > 1), None)
    if len(inputs) != 1:
        complaint = f"it takes {len(inputs)} inputs"
    elif repeated is not None:
        complaint = f"{repeated} runs more than once"
    else:
        order = {node: i for i, node in enumerate([inputs[0], *nodes])}
        for i, node in enumerate(nodes[:-1], start=1):
            if not (node.op == "call_module" and node.target in leaves):
                continue
            crossing = [n for n in order if order[n] < i and any(order.get(u, len(order)) > i for u in n.users)]
            if crossing:
                complaint = f"{crossing[0].name} is used again after {node.target}"
                break
    if complaint is None and not isinstance(output.args[0], fx.Node):
        complaint = "it does not return one tensor"
    if complaint is not None:
        raise ValueError(
            f"the children of {type(model).__name__} do not run one after the other: {complaint}; "
            + HOW_TO_NAME.format(names=", ".join(map(repr, list(leaves)[:3])))
        )


def _piece(model: nn.Module, nodes: list[fx.Node], source: fx.Node) -> nn.Module:
    """The nodes as a module that shares the model's parameters; the child itself where it is all there is."""
    if len(nodes) == 1 and nodes[0].op == "call_module":
        return model.get_submodule(str(nodes[0].target))
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {source: graph.placeholder("x")}
    for node in nodes:
        mapped[node] = graph.node_copy(node, lambda n: mapped[n])
    graph.output(mapped[nodes[-1]])
    return fx.GraphModule(model, graph)


@torch.no_grad()
def _compare(model: nn.Module, pieces: Sequence[nn.Module], example: Tensor, leaves: Sequence[str]) -> None:
    """The pieces must give what the model gives."""
    modes = {module: module.training for part in (model, *pieces) for module in part.modules()}
    try:
        model.eval()
        expected, x = model(example), example
        for piece in pieces:
            x = piece.eval()(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
    same = isinstance(expected, Tensor) and x.shape == expected.shape
    if not same or not torch.allclose(x, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"the children of {type(model).__name__}, run one after the other, do not give what it gives; "
            + HOW_TO_NAME.format(names=", ".join(map(repr, list(leaves)[:3])))
        )


def _named_blocks(model: nn.Module, names: list[str], example: Tensor | None) -> list[nn.Module]:
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            raise ValueError(
                f"the network has no module {name!r}; its children are {', '.join(n for n, _ in model.named_children())}"
            )
    leaves = _cut_leaves(model, names)
    if _is_sequential(model) and all("." not in name for name in names):
        pieces = _all_children(model)
    else:
        pieces = _trace(model, leaves)
        if example is not None:
            _compare(model, [piece for _, piece in pieces], example, leaves)
    running = [name for name, _ in pieces]
    positions = [running.index(name) if name in running else -1 for name in names]
    if -1 in positions or positions != sorted(set(positions)):
        raise ValueError(f"expected names in running order, each once, among {running}; got {names}")
    cuts = [0, *[p for p in positions if p > 0], len(pieces)]
    modules = [module for _, module in pieces]
    return [cast(nn.Module, _join(modules[a:b])) for a, b in zip(cuts, cuts[1:], strict=False)]


def _cut_leaves(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Children at every level that a name leads through: the modules between which one may cut."""
    opened = {""}
    for name in names:
        parts = name.split(".")
        opened.update(".".join(parts[:k]) for k in range(1, len(parts)))
    leaves = []
    for path in opened:
        module = model.get_submodule(path) if path else model
        leaves += [f"{path}.{n}" if path else n for n, _ in module.named_children()]
    return [leaf for leaf in leaves if leaf not in opened]
