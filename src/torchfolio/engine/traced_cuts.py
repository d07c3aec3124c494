"""Networks that are no `nn.Sequential`, traced and cut into pieces that run one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor, fx, nn

from torchfolio.engine.modes import seed_all, undisturbed
from torchfolio.models.stateful import fresh, reset_state

__all__ = ["cut_after", "cut_before", "in_mode", "traced"]

Unit = tuple[str, nn.Module]


def in_mode(module: nn.Module, training: bool) -> nn.Module:
    """A new module around the user's: its own mode alone, theirs may differ."""
    module.training = training
    return module


class _ChildTracer(fx.Tracer):
    """Traces with the named modules as leaves."""

    def __init__(self, leaves: Sequence[str]) -> None:
        super().__init__()
        self.leaves = set(leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        name = module_qualified_name.removeprefix(_INSIDE)
        return name in self.leaves or super().is_leaf_module(m, module_qualified_name)


_INSIDE = "net."  # where a network stands in `_FirstInput`


class _FirstInput(nn.Module):
    """A network as a function of its first input; the others keep their defaults, and there are none more."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward(x)


Graphs = tuple[fx.Graph, fx.Graph]  # of a network in training and in evaluation mode


def traced(model: nn.Module, leaves: Sequence[str]) -> Graphs:
    """The network's graph in both modes: what depends on `self.training` is fixed while it is traced."""
    modes = {module: module.training for module in model.modules()}
    graphs = []
    try:
        for training in (True, False):
            model.train(training)
            with fresh(model):
                graphs.append(_trace_as_it_is(model, leaves))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return graphs[0], graphs[1]


def _trace_as_it_is(model: nn.Module, leaves: Sequence[str]) -> fx.Graph:
    _, *inputs = inspect.signature(type(model).forward).parameters.values()
    if len(inputs) < 2 or any(p.default is p.empty and p.kind not in _VARIADIC for p in inputs[1:]):
        return _ChildTracer(leaves).trace(model)
    graph = _ChildTracer(leaves).trace(_FirstInput(model))
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix(_INSIDE)
    return graph


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def cut_after(model: nn.Module, leaves: Sequence[str], example: Tensor | None) -> list[Unit]:
    """One piece for every named module, checked on the example."""
    try:
        graphs = traced(model, leaves)
    except Exception as error:
        if example is None:
            _refuse(
                model,
                leaves,
                f"its forward pass cannot be traced ({error}) and there is no example to check by",
            )
        pieces = [(name, model.get_submodule(name)) for name in leaves]
    else:
        pieces = _cut(model, graphs, leaves)
    if example is not None and not _agree(model, [piece for _, piece in pieces], example, training=False):
        _refuse(model, leaves, "run in order they do not give what it gives")
    if example is not None and not _agree(model, [piece for _, piece in pieces], example, training=True):
        _refuse(
            model, leaves, "run in order they do not give what it gives in training; it may call dropout between them"
        )
    return pieces


Span = tuple[str, Sequence[fx.Node], fx.Node]  # a name, the nodes of one piece, and the node that they start from


def _cut(model: nn.Module, graphs: Graphs, leaves: Sequence[str]) -> list[Unit]:
    """Cut the traced network after every leaf: one piece a leaf, with the functions that run before it."""
    return _pieces(model, [_spans(model, graph, leaves) for graph in graphs], leaves)


def _pieces(model: nn.Module, spans: Sequence[Sequence[Span]], leaves: Sequence[str]) -> list[Unit]:
    """The pieces of both modes put together."""
    training, evaluation = spans
    if [name for name, _, _ in training] != [name for name, _, _ in evaluation]:
        _refuse(model, leaves, "it runs other ones in training than in evaluation")
    return [
        (name, _by_mode(_piece(model, nodes, source), _piece(model, others, start)))
        for (name, nodes, source), (_, others, start) in zip(training, evaluation, strict=True)
    ]


def _spans(model: nn.Module, graph: fx.Graph, leaves: Sequence[str]) -> list[Span]:
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    complaint = _complaint(inputs, nodes, output, leaves)
    if complaint is not None:
        _refuse(model, leaves, complaint)
    calls = [k for k, node in enumerate(nodes) if _calls(node, leaves)]
    ends = [k + 1 for k in calls]
    ends[-1] = len(nodes)  # what follows the last child belongs to it
    spans: list[Span] = []
    source = inputs[0]
    for call, (start, end) in zip(calls, pairwise([0, *ends]), strict=True):
        spans.append((str(nodes[call].target), nodes[start:end], source))
        source = nodes[end - 1]
    return spans


class ByMode(nn.Module):
    """One piece of a network that computes something else in training than in evaluation, such as dropout as a function.

    Both ways share the network's modules.
    """

    def __init__(self, in_training: nn.Module, in_evaluation: nn.Module) -> None:
        super().__init__()
        self.in_training, self.in_evaluation = in_training, in_evaluation

    def forward(self, x: Tensor) -> Tensor:
        return self.in_training(x) if self.training else self.in_evaluation(x)


def _by_mode(training: nn.Module, evaluation: nn.Module) -> nn.Module:
    """One module for both modes where they do the same."""
    if training is evaluation:
        return training
    graphs = isinstance(training, fx.GraphModule) and isinstance(evaluation, fx.GraphModule)
    if graphs and training.code == evaluation.code:
        return training
    return in_mode(ByMode(training, evaluation), training.training)


def _calls(node: fx.Node, leaves: Sequence[str]) -> bool:
    return node.op == "call_module" and node.target in leaves


def _complaint(inputs: list[fx.Node], nodes: list[fx.Node], output: fx.Node, leaves: Sequence[str]) -> str | None:
    """Why one cannot cut after every leaf: between two of them exactly one value may be alive."""
    if len(inputs) != 1:
        return f"it takes {len(inputs)} inputs"
    if not isinstance(output.args[0], fx.Node):
        return "it does not return one tensor"
    called = [str(node.target) for node in nodes if _calls(node, leaves)]
    if not called:
        return "none of them runs as a module"
    repeated = next((name for name in called if called.count(name) > 1), None)
    if repeated is not None:
        return f"{repeated} runs more than once"
    place = {node: k for k, node in enumerate([*inputs, *nodes, output])}
    for node in [node for node in nodes if _calls(node, leaves)][:-1]:
        crossing = [n for n in place if place[n] < place[node] and any(place[u] > place[node] for u in n.users)]
        if crossing:
            return f"{crossing[0].name} is used again after {node.target}"
    return None


def _piece(model: nn.Module, nodes: Sequence[fx.Node], source: fx.Node) -> nn.Module:
    """The nodes as a module that shares the model's parameters; the child itself where it is all there is."""
    if len(nodes) == 1 and nodes[0].op == "call_module":
        return model.get_submodule(str(nodes[0].target))
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {source: graph.placeholder("x")}
    for node in nodes:
        mapped[node] = graph.node_copy(node, lambda n: mapped[n])
    graph.output(mapped[nodes[-1]])
    # Shares the modules that the nodes name, and no others.
    return in_mode(fx.GraphModule(model, graph), model.training)


@torch.no_grad()
def _agree(model: nn.Module, pieces: Sequence[nn.Module], example: Tensor, *, training: bool) -> bool:
    """Whether the pieces give what the model gives. In training mode both draw the same random numbers."""
    from torchfolio.measure.untouched import untouched

    whole = nn.ModuleList([model, *pieces])
    with undisturbed(), untouched(whole, training=training):
        try:
            seed_all(0)
            expected, x = model(example), example
        except Exception:
            if training:  # one example is too few for a batch norm: nothing to compare
                return True
            raise
        try:
            seed_all(0)
            for piece in pieces:
                x = piece(x)
        except (RuntimeError, TypeError, ValueError):  # what one gives is not what the next one takes
            return False
        finally:
            reset_state(whole)
    if not isinstance(expected, Tensor) or not isinstance(x, Tensor) or x.shape != expected.shape:
        return False
    return torch.allclose(x, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def _refuse(model: nn.Module, leaves: Sequence[str], why: str) -> NoReturn:
    shown = ", ".join(map(repr, leaves[:3]))
    raise ValueError(
        f"the children of {type(model).__name__} do not run one after the other: {why}. Name the modules "
        f"that start each block by hand, for example blocks(model, names=[{shown}]), and leave out those "
        "before which a cut is not possible (a learning rule takes the names as blocks=[...]); or wrap the parts in an nn.Sequential"
    )


def cut_before(model: nn.Module, graphs: Graphs, names: Sequence[str], example: Tensor | None) -> list[Unit]:
    """Cut the traced network right before the named modules alone."""
    pieces = _pieces(model, [_spans_before(model, graph, names) for graph in graphs], names)
    for training in (False, True):
        if example is not None and not _agree(model, [piece for _, piece in pieces], example, training=training):
            _refuse(model, list(names), "the blocks do not give what it gives")
    return pieces


def _spans_before(model: nn.Module, graph: fx.Graph, names: Sequence[str]) -> list[Span]:
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    starts = [k for k, node in enumerate(nodes) if node.op == "call_module" and node.target in names]
    if len(inputs) != 1 or len(starts) != len(set(names)) or not isinstance(output.args[0], fx.Node):
        _refuse(model, list(names), "each named module must run once, on one input, towards one output")
    place = {node: k for k, node in enumerate([*inputs, *nodes, output])}
    spans: list[Span] = []
    source = inputs[0]
    cuts = sorted({0, *starts, len(nodes)})
    for start, end in pairwise(cuts):
        alive = [n for n in place if place[n] <= end and any(place[u] > end for u in n.users)]
        others = [n.name for n in alive if n is not nodes[end - 1]]
        if others:
            _refuse(model, list(names), f"{others[0]} is used again after the start of {nodes[end].target}")
        spans.append((str(nodes[start].target) if start in starts else "", nodes[start:end], source))
        source = nodes[end - 1]
    return spans
