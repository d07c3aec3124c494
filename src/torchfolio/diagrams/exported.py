"""From a module to a graph: what `torch.export` traces, with an identity for every axis.

Longer than most because what is traced is read in the same terms: lengths, in-place changes, constants.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor as TorchTensor
from torch import nn

from torchfolio.diagrams.graph import Draft, Graph, Value
from torchfolio.diagrams.reader import Reader
from torchfolio.diagrams.rules import FILLED, read_node
from torchfolio.diagrams.writing import call, nodes_of, trained
from torchfolio.errors import TorchfolioError
from torchfolio.models.stateful import fresh

AUTOMATIC = {1: "b", 2: "b m", 3: "b x m", 4: "b c h w", 5: "b c t h w"}
"""Names of the axes of an input by their number."""


def input_names(examples: Sequence[TorchTensor], names: Sequence[str | None] | None = None) -> list[list[str]]:
    """Names of the axes of every input: those given, and automatic ones for the rest."""
    found: list[list[str]] = []
    for i, example in enumerate(examples):
        rank, given = example.dim(), names[i] if names and i < len(names) else None
        words = (given or AUTOMATIC.get(rank, "")).split()
        if not given and not example.is_floating_point() and rank == 2:
            words = ["b", "x"]
        words = words if len(words) == rank else [f"a{j}" for j in range(rank)]
        if not given:
            taken = {w for other in found for w in other} - {"b"}
            words = [w if w not in taken else _fresh(w, taken) for w in words]
        found.append(words)
    return found


def _fresh(word: str, taken: set[str]) -> str:
    options = {"x": ["y", "z"], "m": ["n"]}.get(word, [])
    return next(
        (o for o in options if o not in taken), next(f"{word}{i}" for i in range(1, 99) if f"{word}{i}" not in taken)
    )


def trace(
    module: nn.Module,
    args: Sequence[TorchTensor],
    names: Sequence[str | None] | None = None,
    dynamic: bool | Collection[str] = False,
) -> Any:
    """The exported program of a module on one example for each input.

    Args:
        module: network that is traced.
        args: examples.
        names: names of the axes of each input.
        dynamic: names of the axes whose length may vary; True for all that the module allows to.

    Raises:
        ValueError: if no input has an axis that is named in `dynamic`.
        TorchfolioError: if the module cannot be traced, as where its control flow depends on data, or where it fixes
            the length of an axis that is to vary.
    """
    words = input_names(args, names)
    free = {w for own in words for w in own} if dynamic is True else set(dynamic or ())
    unknown = sorted(free - {w for own in words for w in own})
    if unknown:
        have = ", ".join(" ".join(own) for own in words)
        raise ValueError(f"no input has the axis {unknown[0]!r} that is to vary; the axes are {have}")
    auto = torch.export.Dim.AUTO
    shapes = tuple(
        {i: auto for i, w in enumerate(own) if w in free and example.shape[i] > 1}
        for own, example in zip(words, args, strict=True)
    )
    try:
        with warnings.catch_warnings(), torch.no_grad(), fresh(module):
            warnings.simplefilter("ignore")
            # One tensor that is given twice, or a weight that is given, would be traced as one.
            own = tuple(example.detach().clone() for example in args)
            program = torch.export.export(module, own, dynamic_shapes=shapes if free else None)
            nodes = program.graph.nodes
            if _writes_beside_a_view(nodes) or any(_short(n) in MADE_OF_OTHERS for n in nodes):
                program = program.run_decompositions(_decompositions())
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TorchfolioError(
            f"{type(module).__name__} cannot be traced by torch.export: {first}; control flow that depends on values "
            "must be written with torch.where or torch.cond, or the part drawn by itself"
        ) from error
    _measure(program, own)
    if free and dynamic is not True:
        _check_free(program, words, free, type(module).__name__)
    return program


class _Measured(torch.fx.Interpreter):
    """Runs a traced module on the example to see lengths that depend on values, as the number of entries of a mask."""

    def run_node(self, n: Any) -> Any:
        made, meant = super().run_node(n), n.meta.get("val")
        if isinstance(meant, TorchTensor) and isinstance(made, TorchTensor):
            for size, length in zip(meant.shape, made.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.hint is None and size.node.expr.is_Symbol:
                    size.node.shape_env.set_real_tensor_prop_unbacked_vals(size.node.expr, length)
        return made


def _measure(program: Any, args: Sequence[TorchTensor]) -> None:
    values = [n.meta.get("val") for n in program.graph.nodes]
    sizes = [s for v in values if isinstance(v, TorchTensor) for s in v.shape]
    if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes):
        signature, state = program.graph_signature, {**program.state_dict, **program.constants}
        held, given = _held(signature), iter(args)
        names = [n.name for n in program.graph.nodes if n.op == "placeholder"]
        with torch.no_grad():
            _Measured(program.graph_module).run(*(state[held[n]].clone() if n in held else next(given) for n in names))


def _held(signature: Any) -> dict[str, str]:
    """Names of weights and constants by those of the placeholders that stand for them."""
    constants = signature.inputs_to_lifted_tensor_constants
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **constants}


def _check_free(program: Any, words: list[list[str]], free: set[str], what: str) -> None:
    """Refuse axes that were to vary and cannot."""
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    for node, own in zip(inputs, words, strict=False):
        for size, word in zip(node.meta["val"].shape, own, strict=True):
            if word in free and not (isinstance(size, torch.SymInt) and size.node.expr.free_symbols):
                raise TorchfolioError(f"{what} fixes the length of the axis {word}, which was to vary, at {size}")


def _in_place(node: Any) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _views(node: Any) -> bool:
    """Whether the result of an operation may share its memory with what it takes."""
    if node.target is operator.getitem:
        return True
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(r.alias_info is not None for r in returns)


MADE_OF_OTHERS = {"movedim", "moveaxis", "swapaxes", "swapdims", "mT", "mH", "adjoint", "numpy_T", "narrow", "glu", "hstack",
                  "vstack", "dstack", "outer", "ger", "addr", "addmm", "addmv", "baddbmm", "addbmm", "kron", "tile", "meshgrid",
                  "type_as", "broadcast_to", "tensor_split", "hsplit", "vsplit", "lerp", "addcmul", "addcdiv"}  # fmt: skip
"""Operations that are read as the simpler ones that they are made of."""


def _decompositions() -> dict[Any, Any]:
    table = torch.export.default_decompositions()
    chosen = {op: rule for op, rule in table.items() if op.name().split("::")[1].split(".")[0] in MADE_OF_OTHERS}
    aten = torch.ops.aten
    for op, product in ((aten.addmm, aten.mm), (aten.addmv, aten.mv)):
        chosen[op.default] = functools.partial(_added, product.default)
    return chosen


def _added(
    product: Any, to: TorchTensor, a: TorchTensor, b: TorchTensor, *, beta: float = 1, alpha: float = 1
) -> TorchTensor:
    made = product(a, b)
    made = made if alpha == 1 else made * alpha
    return made + (to if beta == 1 else to * beta)


def _writes_beside_a_view(nodes: Iterable[Any]) -> bool:
    """Whether an operation changes a tensor of which there is a view by then, or by way of a view."""
    root: dict[Any, Any] = {}  # whose memory a node has
    viewed = set()
    for node in nodes:
        root[node] = node
        if node.op != "call_function" or not node.args or not hasattr(node.args[0], "op"):
            continue
        first = root[node.args[0]]
        if _in_place(node):
            if first in viewed:
                return True
            root[node] = first
        elif _views(node):
            root[node] = first
            viewed.add(first)
    return False


def _short(node: Any) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0].rstrip("_")


def read(module: nn.Module, program: Any, names: Sequence[str | None] | None = None) -> Graph:
    """The graph of a module that was traced.

    Args:
        module: whose weights it refers to.
        program: result of `trace`.
        names: names of the axes of each input, `"b c h w"`; those that have none are named automatically.
    """
    reader = _Reading(module, program, names)
    reader.read()
    reader.settle()
    return reader.plain()


class _Reading(Reader):
    """Goes through an exported program."""

    def __init__(self, module: nn.Module, program: Any, names: Sequence[str | None] | None) -> None:
        super().__init__()
        self.program, self.names = program, names
        parameters = dict(module.named_parameters(remove_duplicate=False))
        constants = {k: v for k, v in (program.constants or {}).items() if isinstance(v, TorchTensor)}
        self.weights |= constants | dict(module.named_buffers(remove_duplicate=False)) | parameters
        self.saved = set(module.state_dict())
        self._learned = {k for k, v in parameters.items() if v.requires_grad}

    def plain(self) -> Graph:
        """The graph without what was needed to read it."""
        graph = Graph()
        graph.__dict__ |= {k: v for k, v in self.__dict__.items() if k in graph.__dict__}
        return graph

    def read(self) -> None:
        """Read all nodes."""
        signature = self.program.graph_signature
        held = _held(signature)
        nodes = list(self.program.graph.nodes)
        self.uses = Counter(a for node in nodes for a in nodes_of(node))
        given = [n for n in nodes if n.op == "placeholder" and n.name in signature.user_inputs]
        given = [n for n in given if isinstance(n.meta.get("val"), TorchTensor)]
        words = dict(zip(given, input_names([n.meta["val"] for n in given], self.names), strict=True))
        for node in nodes:
            if node in words:
                self._input(node, words[node])
            elif node.op == "placeholder" and node.name in held:
                name, shape = held[node.name], node.meta["val"].shape
                self.fixed[node] = Value([self.axis("", s) for s in shape], None, name, name in self._learned)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "get_attr":  # the branches of torch.cond
                self.functions[node.name] = getattr(self.program.graph_module, node.target)
            elif node.op == "output":
                wanted = set(signature.user_outputs)
                results = [n for n in node.args[0] if getattr(n, "name", None) in wanted]
                self._take_outputs([self.value(n) for n in results])

    def _take_outputs(self, results: list[Value | None]) -> None:
        """What comes out, of which no drawing shows what no input leads to."""
        self.outputs = [v for v in results if v is not None]
        left = [str(i) for i, v in enumerate(results) if v is None]
        if not self.outputs:
            raise TorchfolioError("expected a module that returns a tensor made of its inputs, got none")
        if left:
            warnings.warn(f"left out of the drawing, as no input leads to it: output {', '.join(left)}", stacklevel=5)

    def _input(self, node: Any, words: list[str]) -> None:
        shape = node.meta["val"].shape
        known = {self.name[a]: a for v in self.inputs for a in v.axes}
        value = Value([self.axis(w, s) for w, s in zip(words, shape, strict=True)], None, node.name)
        value.whole = _whole(node.meta["val"])
        # What has one name is one axis, and the batch is one for all inputs.
        value.axes = [
            self.unite(known[w], a) if w in known and self.size[known[w]] == self.size[a] else a
            for w, a in zip(words, value.axes, strict=True)
        ]
        self.values[node] = value
        self.inputs.append(value)

    def _call(self, node: Any) -> None:
        name = _short(node)
        stack = node.meta.get("nn_module_stack") or {}
        self._stack = tuple((path, str(kind).rsplit(".", 1)[-1]) for path, kind in stack.values() if path)
        if node.target is operator.getitem:
            for known in (self.values, self.fixed):
                if isinstance(known.get(node.args[0]), list):
                    known[node] = known[node.args[0]][node.args[1]]
            return
        if name in FILLED or not any(isinstance(self.values.get(a), Value) for a in nodes_of(node)):
            self._constant(node)
            return
        made = self.values[node] = read_node(self, node, name)
        results = node.meta.get("val")
        pair = made if isinstance(made, list) else [made], results if isinstance(results, list | tuple) else [results]
        for value, result in zip(*pair, strict=False):
            if isinstance(value, Value) and isinstance(result, TorchTensor):
                value.whole = _whole(result)
        if _in_place(node):  # from here on the tensor is what it was changed into
            changed = self.values.get(node.args[0])
            for other, value in list(self.values.items()):
                if value is changed and value is not None:
                    self.values[other] = self.values[node]

    def _constant(self, node: Any) -> None:
        """An operation on weights and constants alone: written in Python, not drawn."""
        made = node.meta.get("val")
        shapes = [m.shape for m in (made if isinstance(made, list | tuple) else [made]) if isinstance(m, TorchTensor)]
        if not shapes:
            return
        outputs = [Value([self.axis("", s) for s in shape]) for shape in shapes]
        if _short(node) in FILLED and isinstance(made, TorchTensor):
            kind = _short(node).removeprefix("new_").removesuffix("_like")
            value = {"zeros": 0, "ones": 1, "empty": 0}.get(kind, node.args[-1])
            how = {"dtype": made.dtype, "device": made.device}
            writing = call(self, node, "torch.full", [list(made.shape), value], **how)
            self.constants.append(Draft("constant", [], outputs, **writing))
            self.fixed[node] = outputs[0]
            return
        # What changes a weight, as the count of batches, is done as it stands there.
        changed = self.fixed.get(node.args[0]) if _in_place(node) else None
        target = f"torch.ops.{node.target.name().replace('::', '.')}" if changed is not None else ""
        effect = {"effect": True} if isinstance(changed, Value) and changed.name else {}
        self.constants.append(Draft("constant", [], outputs, params=effect, **call(self, node, target)))
        if trained(self, self.constants[-1].weights):
            self.grown |= set(map(id, outputs))
        self.fixed[node] = outputs if isinstance(made, list | tuple) else outputs[0]
        if changed is not None and not effect:
            self.fixed = {k: self.fixed[node] if v is changed else v for k, v in self.fixed.items()}


def _whole(tensor: TorchTensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())
