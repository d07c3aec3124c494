"""From a diagram back to Python: a statement for every operation.

The axes say how an operation is written. A contraction is an einsum over the letters that it is about and those that it
is woven over, a softmax runs along the place of its axis, a reshape goes to the products of its axes. Lengths are read
from the tensors at hand, so that what was drawn for one length runs for others.

Longer than most because tensors, lengths and operations are written into one text that shares its names.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from torchfolio.diagrams.graph import Draft, Graph, Value
from torchfolio.errors import TorchfolioError

__all__ = ["CircuitModule", "function_of", "source_of"]

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def source_of(graph: Graph, name: str, doc: str = "", outputs: Sequence[Value] | None = None) -> str:
    """A diagram as a function in Python.

    Args:
        graph: operations that are written.
        name: name of the function.
        doc: its docstring.
        outputs: tensors that it returns, the outputs of the graph by default.

    Returns:
        The text of a module that defines the function. It takes the inputs in order, and where there are any the weights
        by their names, `weights=dict(net.state_dict())`.

    Raises:
        TorchfolioError: if an operation cannot be written, or if the axes that it is woven over are not known.
    """
    return _Writer(graph).write(name, doc, graph.outputs if outputs is None else outputs)


class _Writer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names: dict[int, str] = {}
        self.lines: list[str] = []
        self.count = 0
        self.variables: dict[int, str] = {}
        self.used: set[str] = set()
        self.held: dict[int, str] = {}
        self.maker = {id(o): step for step in graph.constants for o in step.outputs}
        self.members = graph.members()

    # -- the whole

    def write(self, name: str, doc: str, outputs: Sequence[Value]) -> str:
        arguments = []
        for i, value in enumerate(self.graph.inputs):
            word = value.name if value.name.isidentifier() and value.name not in arguments else f"x{i}"
            self.names[id(value)] = word
            arguments.append(word)
        reserved = {*arguments, "torch", "F", "weights"}
        for value in self.graph.inputs:
            for axis in map(self.graph.find, value.axes):
                if axis not in self.variables:
                    word = re.sub(r"\W", "_", self.graph.name[axis]) or "a"
                    while word in reserved or re.fullmatch(r"t\d+", word) or word in self.variables.values():
                        word += "_"
                    self.variables[axis] = word
        for step in self.graph.constants:
            if step.params.get("effect"):
                self._statement(step)
        for step in self.graph.alive(outputs):
            self._statement(step)
        results = [self.name(v) for v in outputs]
        weights = bool(self.graph.weights) and any("weights[" in line for line in [*self.lines, *results])
        heads = []
        for argument, value in zip(arguments, self.graph.inputs, strict=True):
            words = [self.variables[self.graph.find(a)] for a in value.axes]
            own = [w if w in self.used else "_" for w in words]
            self.used -= set(words)
            if set(own) - {"_"}:
                heads.append(f"{', '.join(own)}{',' if len(own) == 1 else ''} = {argument}.shape")
        signature = ", ".join([*arguments, *(["weights"] if weights else [])])
        body = [*([f'"""{doc}"""'] if doc else []), *heads, *self.lines, f"return {', '.join(results)}"]
        text = ["import torch"]
        if any("F." in line for line in self.lines):
            text.append("from torch.nn import functional as F")
        return "\n".join([*text, "", "", f"def {name}({signature}):", *(f"    {line}" for line in body), ""])

    def _statement(self, step: Draft) -> None:
        expression = self._expression(step)
        results = []
        for output in step.outputs:
            self.count += 1
            results.append(f"t{self.count}")
            self.names[id(output)] = results[-1]
            for place, axis in enumerate(output.axes):
                self.held.setdefault(self.graph.find(axis), f"{results[-1]}.shape[{place}]")
        if step.params.get("effect"):
            self.lines.append(expression)
        else:
            self.lines.append(f"{', '.join(results)} = {expression}")

    # -- tensors and lengths

    def name(self, value: Value) -> str:
        """The variable that holds a tensor."""
        inner = value.root
        if id(inner) not in self.names:
            if id(inner) in self.maker:
                self._statement(self.maker[id(inner)])
            elif inner.name in self.graph.weights:
                return f"weights[{inner.name!r}]"
            else:
                raise TorchfolioError(f"the diagram uses a tensor {inner.name!r} that no operation gives")
        return self.names[id(inner)]

    def length(self, axis: int) -> str | int:
        """The length of an axis: a number where the network states it, otherwise Python that reads it."""
        graph, root = self.graph, self.graph.find(axis)
        if root in self.variables:
            self.used.add(self.variables[root])
            return self.variables[root]
        if root in graph.factors:
            return _product([self.length(f) for f in graph.factors[root]])
        for member in self.members[root]:
            # Twins are younger than what they are like: of those that lead to each other one is followed.
            if member in graph.twins and graph.find(graph.twins[member]) < root:
                return self.length(graph.twins[member])
        for member in (m for m in self.members[root] if m in graph.cuts):
            whole, other = graph.cuts[member]
            mine, theirs = self._stated(member), self._stated(other)
            if theirs and (not mine or (whole in graph.factors and graph.factors[whole][0] == member)):
                return _quotient(self._whole(whole), graph.size[other])
            if mine:
                return graph.size[member]
        if self._stated(root):
            return graph.size[root]
        if root in self.held:
            return self.held[root]
        for member in self.members[root]:
            if member in graph.symbols:
                return self.formula(graph.symbols[member])
        return graph.size[root]

    def _whole(self, axis: int) -> str | int:
        """The length of an axis that was cut, not by way of its parts."""
        root = self.graph.find(axis)
        if root in self.variables:
            return self.length(root)
        return self.graph.size[root] if self._stated(root) else self.held.get(root, self.graph.size[root])

    def _stated(self, axis: int) -> bool:
        return any(m in self.graph.stated for m in self.members[self.graph.find(axis)])

    def formula(self, expression: Any) -> str:
        """A formula in the lengths of the inputs' axes."""
        from torch.utils._sympy.printers import PythonPrinter

        text = PythonPrinter().doprint(expression)
        known: dict[str, int] = {}
        for axis, symbol in self.graph.symbols.items():
            if symbol.is_Symbol and (str(symbol) not in known or self.graph.find(axis) in self.variables):
                known[str(symbol)] = axis
        return re.sub(r"[A-Za-z_]\w*", lambda m: str(self.length(known[m[0]])) if m[0] in known else m[0], text)

    # -- operations

    def _expression(self, step: Draft) -> str:
        known = {self.graph.find(a) for a in step.core} | {self.graph.find(a) for a in step.weave}
        axes = [self.graph.find(a) for v in (*step.inputs, *step.outputs) for a in v.axes]
        loose = [a for a in axes if a not in known]
        if loose and step.kind != "constant":
            raise TorchfolioError(
                f"the {step.kind} is neither about the axis {self.graph.name[loose[0]]!r} nor woven over it: its weave is "
                "missing, so it cannot be written"
            )
        by_axes = AXES.get(step.kind)
        if by_axes is not None and not step.params.get("other"):
            text = by_axes(self, step)
            if text is not None:
                return text
        if not step.code:
            raise TorchfolioError(f"there is no way to write the operation {step.kind!r} in Python")
        return self.spelled(step)

    def spelled(self, step: Draft, code: str = "") -> str:
        """The code of an operation with names in place of marks."""
        marks: dict[str, str] = {f"w{i}": self.name(w) for i, w in enumerate(step.weights)}
        for i, size in enumerate(step.sizes):
            text = str(self.length(size) if isinstance(size, int) else self.formula(size))
            marks[f"s{i}"] = f"({text})" if " " in text else text
        first = self.graph.inputs[0] if self.graph.inputs else None
        marks["device"] = "None" if first is None else f"{self.name(first)}.device"
        return (code or step.code).format(*(self.name(v) for v in step.inputs), **marks)

    def axes(self, value: Value) -> list[int] | None:
        """The axes of a tensor; None where it has one twice, so that an axis does not say a place."""
        found = [self.graph.find(a) for a in value.axes]
        return found if len(set(found)) == len(found) else None

    def einsum(self, operands: Sequence[Value], result: Value) -> str | None:
        """The product of tensors, summed over the axes that do not come out."""
        terms = [self.axes(v) for v in operands]
        made = self.axes(result)
        if made is None or any(t is None for t in terms):
            return None
        letters: dict[int, str] = {}
        for axis in (a for t in terms for a in t or []):
            letters.setdefault(axis, LETTERS[len(letters) % len(LETTERS)])
        if len(letters) > len(LETTERS) or any(a not in letters for a in made):
            return None
        left, right = (["".join(letters[a] for a in t or []) for t in side] for side in (terms, [made]))
        return f"torch.einsum({','.join(left) + '->' + right[0]!r}, {', '.join(map(self.name, operands))})"


def _product(parts: Sequence[str | int]) -> str | int:
    number, words = 1, []
    for part in parts:
        if isinstance(part, int):
            number *= part
        else:
            words.append(f"({part})" if "//" in part else part)
    return " * ".join([*words, *([str(number)] if number > 1 else [])]) if words else number


def _quotient(whole: str | int, part: int) -> str | int:
    if isinstance(whole, int):
        return whole // part
    return f"({whole}) // {part}" if " " in whole else f"{whole} // {part}"


# ------------------------------------------------------------------------------------- operations that their axes say


def _einsum(w: _Writer, step: Draft) -> str | None:
    return w.einsum(step.inputs, step.outputs[0])


def _linear(w: _Writer, step: Draft) -> str | None:
    if step.code:
        return None
    factors = step.weights[:-1] if step.params.get("bias") else step.weights
    product = w.einsum([*step.inputs, *factors], step.outputs[0])
    if product is None or len(factors) == len(step.weights):
        return product
    return f"{product} + {_aligned(w, step.weights[-1], step.outputs[0])}"


def _transpose(w: _Writer, step: Draft) -> str | None:
    before, after = w.axes(step.inputs[0]), w.axes(step.outputs[0])
    if before is None or after is None:
        return None
    return f"{w.name(step.inputs[0])}.permute({', '.join(str(before.index(a)) for a in after)})"


def _reshape(w: _Writer, step: Draft) -> str | None:
    if step.code:
        return None
    sizes = ", ".join(str(w.length(a)) if w.graph.size[a] != 1 else "1" for a in step.outputs[0].axes)
    return f"{w.name(step.inputs[0])}.{'expand' if step.params.get('expand') else 'reshape'}({sizes or '()'})"


def _softmax(w: _Writer, step: Draft) -> str | None:
    axes = w.axes(step.inputs[0])
    (core,) = {w.graph.find(a) for a in step.core}
    return None if axes is None else f"{w.name(step.inputs[0])}.softmax({axes.index(core)})"


FUNCTIONS = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}


def _reduce(w: _Writer, step: Draft) -> str | None:
    before, after, what = w.axes(step.inputs[0]), w.axes(step.outputs[0]), FUNCTIONS.get(step.params.get("what", ""))
    if before is None or after is None or what is None:
        return None
    core = {w.graph.find(a) for a in step.core}
    dims = [i for i, a in enumerate(before) if a in core]
    kept = [a for a in before if a not in core]
    if after != kept and len(after) != len(before):
        return w.einsum(step.inputs, step.outputs[0]) if what == "sum" else None
    keep = ", keepdim=True" if len(after) == len(before) and dims else ""
    return f"{w.name(step.inputs[0])}.{what}({dims}{keep})" if dims else w.name(step.inputs[0])


def _binary(w: _Writer, step: Draft) -> str | None:
    if step.params.get("what") not in OPERATORS:
        return None
    parts = [_aligned(w, v, step.outputs[0]) for v in step.inputs]
    return None if None in parts else f" {OPERATORS[step.params['what']]} ".join(map(str, parts))


def _aligned(w: _Writer, value: Value, like: Value) -> str | None:
    """A tensor with its axes where those of another have them, so that both broadcast against each other."""
    own, axes = [w.graph.find(a) for a in value.axes], [w.graph.find(a) for a in like.axes]
    short = {a for a in own if w.graph.size[a] == 1}
    if len(own) <= len(axes) and all(a == b or a in short for a, b in zip(own[::-1], axes[::-1], strict=False)):
        return w.name(value)
    if len(set(axes)) < len(axes) or any(a not in axes for a in own):
        return None
    order = [own.index(a) for a in axes if a in own]
    text = w.name(value) if order == sorted(order) else f"{w.name(value)}.permute({', '.join(map(str, order))})"
    return f"{text}[{', '.join(':' if a in own else 'None' for a in axes)}]" if len(own) < len(axes) else text


AXES: dict[str, Callable[[_Writer, Draft], str | None]] = {
    "einsum": _einsum, "linear": _linear, "transpose": _transpose, "reshape": _reshape, "view": _reshape,
    "softmax": _softmax, "reduce": _reduce, "binary": _binary,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- module


class CircuitModule(nn.Module):
    """A diagram as a module: Python that is written from it, on the parameters and buffers of what was drawn.

    Args:
        source: text from `source_of`.
        name: name of the function in it.
        weights: parameters and buffers by the names that they keep here.
        saved: names of those that `state_dict` holds.
        functions: functions that the source calls, by name.

    Its parameters are those of the drawn module, not copies; `state_dict` has the same names. It takes and gives tensors
    alone: where the drawn module gives a structure of tensors, this gives a tuple.
    """

    def __init__(
        self,
        source: str,
        name: str,
        weights: Mapping[str, Tensor],
        saved: Collection[str],
        functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        self.source, self.name, self.functions = source, name, dict(functions or {})
        self._names = [n for n in weights if f"weights[{n!r}]" in source]
        for path in self._names:
            *above, leaf = path.split(".")
            owner: nn.Module = self
            for part in above:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            if isinstance(weights[path], nn.Parameter):
                owner.register_parameter(leaf, weights[path])  # type: ignore[arg-type]
            else:
                owner.register_buffer(leaf, weights[path], persistent=path in saved)
        self._function = function_of(source, name, functions)

    def forward(self, *inputs: Tensor) -> Any:
        if not self._names:
            return self._function(*inputs)
        return self._function(*inputs, weights={n: attrgetter(n)(self) for n in self._names})

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._function = function_of(self.source, self.name, self.functions)

    def extra_repr(self) -> str:
        return self.name


def function_of(
    source: str, name: str, functions: Mapping[str, Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """The function that a source defines, which may call others; its lines are there for tracebacks."""
    file = f"<circuit {name} {abs(hash(source)):x}>"
    space: dict[str, Any] = dict(functions or {})
    exec(compile(source, file, "exec"), space)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    return space[name]
