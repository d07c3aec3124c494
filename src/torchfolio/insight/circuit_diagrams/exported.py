"""From a module to a sheet: the graph that `torch.export` traces, with an identity for every axis.

An axis is known by where it comes from, never by its length: each operation says which axes of its result are axes of
its arguments, and which are new. Two axes that an operation sets against each other (an addition, the letters of a
product) are one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor as TorchTensor
from torch import nn

from torchfolio.errors import TorchfolioError
from torchfolio.insight.circuit_diagrams.sheet import Sheet

AUTOMATIC = {1: "b", 2: "b m", 3: "b x m", 4: "b c h w", 5: "b c t h w"}
"""Names of the axes of an input by their number."""


@dataclass
class Value:
    """A tensor while the graph is read: identities of its axes, from the first to the last; of a copy, its origin."""

    axes: list[int]
    origin: Value | None = None


@dataclass
class Draft:
    """An operation while the graph is read."""

    kind: str
    inputs: list[Value]
    outputs: list[Value]
    core: set[int] = field(default_factory=set)
    params: dict[str, Any] = field(default_factory=dict)
    learned: bool = False
    stack: tuple[tuple[str, str], ...] = ()
    title: str = ""


def trace(module: nn.Module, args: Sequence[TorchTensor]) -> Any:
    """The exported program of a module on one example for each input.

    Raises:
        TorchfolioError: if the module cannot be traced, as where its control flow depends on data.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(module, tuple(args))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TorchfolioError(
            f"{type(module).__name__} cannot be traced by torch.export: {first}; control flow that depends on values "
            "must be written with torch.where or torch.cond, or the part drawn by itself"
        ) from error


def sheet_of(
    program: Any, title: str, names: Sequence[str | None] | None = None, *, fold: int | None = None
) -> tuple[Sheet, list[str]]:
    """Lay the operations of a traced module out in columns.

    Args:
        program: of `trace`.
        title: of the drawing.
        names: names of the axes of each input, `"b c h w"`; those that have none are named automatically.
        fold: depth of the modules that become boxes, 0 for the children of the module; None for none.

    Returns:
        The sheet, and the names of operations that have no sign.
    """
    from torchfolio.insight.circuit_diagrams.assembly import assemble

    reader = Reader(program, names)
    reader.read()
    return assemble(reader, title, fold), sorted(set(reader.unknown))


class Reader:
    """Reads an exported graph node by node."""

    def __init__(self, program: Any, names: Sequence[str | None] | None) -> None:
        self.program = program
        self.names = list(names or [])
        self.parent: list[int] = []
        self.name: list[str] = []
        self.size: list[int] = []
        self.values: dict[Any, Any] = {}
        self.steps: list[Draft] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.unknown: list[str] = []
        self.copies: list[Value] = []
        self.branches: list[tuple[int, int]] = []
        self.factors: dict[int, list[int]] = {}
        self._stack: tuple[tuple[str, str], ...] = ()

    # -- axes

    def axis(self, name: str, size: int) -> int:
        self.parent.append(len(self.parent))
        self.name.append(name)
        self.size.append(int(size))
        return len(self.parent) - 1

    def find(self, axis: int) -> int:
        while self.parent[axis] != axis:
            axis = self.parent[axis]
        return axis

    def unite(self, one: int, other: int) -> int:
        one, other = self.find(one), self.find(other)
        if one != other:
            self.parent[max(one, other)] = min(one, other)
        return min(one, other)

    def twin(self, axis: int) -> int:
        """A new axis like another, with factors of its own."""
        made = self.axis(self.name[axis], self.size[axis])
        if self.find(axis) in self.factors:
            self.factors[made] = [self.twin(f) for f in self.factors[self.find(axis)]]
        return made

    def merge(self, one: int, other: int) -> int:
        """Make two axes one, and their factors too."""
        a, b = (self.factors.get(self.find(x)) for x in (one, other))
        root = self.unite(one, other)
        if a and b and [self.size[x] for x in a] == [self.size[x] for x in b]:
            for x, y in zip(a, b, strict=True):
                self.merge(x, y)
        elif a or b:
            self.factors[root] = a or b or []
        return root

    def factored(self, axis: int) -> list[int]:
        """An axis as the factors that it was made of, or taken apart into."""
        axis = self.find(axis)
        return [f for part in self.factors[axis] for f in self.factored(part)] if axis in self.factors else [axis]

    def regrouped(self, before: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
        """Axes of given sizes in place of others of the same product, by way of factors common to both.

        None where they have none, as of 4 and 3 in place of 6 and 2.
        """
        parts: list[list[int]] = [[] for _ in sizes]
        cuts: list[tuple[int, list[int]]] = []
        queue = [(self.find(a), self.size[a]) for a in before][::-1]
        for part, size in zip(parts, sizes, strict=True):
            while size > 1:
                axis, length = queue.pop()
                if size % length and length % size:
                    return None
                if length <= size:
                    part.append(axis)
                    size //= length
                    continue
                # The axis is cut: its first factor belongs here, the rest to what follows.
                one = self.axis("h", size)
                other = self.axis("k", length // size)
                cuts.append((axis, [one, other]))
                part.append(one)
                queue.append((other, length // size))
                size = 1
        self.factors |= dict(cuts)
        return [self._product(part) for part in parts]

    def _product(self, parts: Sequence[int]) -> int:
        """The axis that runs over several others; the same one for the same others."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return self.axis("", 1)
        key = [self.find(a) for a in parts]
        for axis, factors in self.factors.items():
            if [self.find(f) for f in factors] == key:
                return axis
        size = 1
        for a in parts:
            size *= self.size[a]
        made = self.axis("m", size)
        self.factors[made] = list(parts)
        return made

    # -- nodes

    def read(self) -> None:
        """Read the whole graph."""
        from torch.export.graph_signature import InputKind

        kinds = {s.arg.name: s.kind for s in self.program.graph_signature.input_specs if hasattr(s.arg, "name")}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if kinds.get(node.name) is InputKind.USER_INPUT and isinstance(node.meta.get("val"), TorchTensor):
                    self._input(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                wanted = {s.arg.name for s in self.program.graph_signature.output_specs if "USER_OUTPUT" in str(s.kind)}
                results = [n for n in node.args[0] if getattr(n, "name", None) in wanted]
                self.outputs = [v for v in (self.value(n) for n in results) if v is not None]

    def _input(self, node: Any) -> None:
        shape = node.meta["val"].shape
        given = self.names.pop(0) if self.names else None
        words = (given or AUTOMATIC.get(len(shape), "")).split()
        if not given and not node.meta["val"].is_floating_point() and len(shape) == 2:
            words = ["b", "x"]
        words = words if len(words) == len(shape) else [f"a{i}" for i in range(len(shape))]
        if not given:
            taken = {self.name[a] for v in self.inputs for a in v.axes} - {"b"}
            words = [w if w not in taken else _fresh(w, taken) for w in words]
        value = Value([self.axis(w, s) for w, s in zip(words, shape, strict=True)])
        known = {self.name[a]: a for v in self.inputs for a in v.axes}
        if given:  # what has one name is one axis
            value.axes = [
                self.unite(known[w], a) if w in known and self.size[known[w]] == self.size[a] else a
                for w, a in zip(words, value.axes, strict=True)
            ]
        elif self.inputs:  # the batch is one for all inputs
            first = self.inputs[0].axes
            if first and value.axes and self.size[first[0]] == self.size[value.axes[0]]:
                value.axes[0] = self.unite(first[0], value.axes[0])
        self.values[node] = value
        self.inputs.append(value)

    def _call(self, node: Any) -> None:
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0].rstrip("_")
        stack = node.meta.get("nn_module_stack") or {}
        self._stack = tuple((path, str(kind).rsplit(".", 1)[-1]) for path, kind in stack.values() if path)
        tensors = [a for a in _flat(node.args) if isinstance(self.values.get(a) if hasattr(a, "op") else None, Value)]
        if name == "getitem":
            whole = self.values.get(node.args[0])
            if isinstance(whole, list):
                self.values[node] = whole[node.args[1]]
            return
        if not tensors and not isinstance(node.meta.get("val"), TorchTensor):
            return
        if not tensors:
            return  # made of weights and constants alone
        rule = RULES.get(name)
        if rule is None:
            rule = _elementwise if name in FUNCTIONS else _unknown
        self.values[node] = rule(self, node, name)

    def add(
        self, kind: str, inputs: Sequence[Value], outputs: Sequence[Value], core: Sequence[int] = (), **more: Any
    ) -> Value:
        learned = bool(more.pop("learned", False))
        step = Draft(kind, list(inputs), list(outputs), set(core), more, learned, self._stack)
        self.steps.append(step)
        return outputs[0]

    def value(self, argument: Any) -> Value | None:
        found = self.values.get(argument) if hasattr(argument, "op") else None
        if not isinstance(found, Value):
            return None
        if len(argument.users) == 1:
            return found
        # Each use has axes of its own: those of keys and queries made from one tensor are not the same axis.
        copy = Value([self.twin(a) for a in found.axes], found)
        self.copies.append(copy)
        return copy


def _fresh(word: str, taken: set[str]) -> str:
    options = {"x": ["y", "z"], "m": ["n"]}.get(word, [])
    return next(
        (o for o in options if o not in taken), next(f"{word}{i}" for i in range(1, 99) if f"{word}{i}" not in taken)
    )


def _flat(arguments: Any) -> list[Any]:
    if isinstance(arguments, list | tuple):
        return [x for a in arguments for x in _flat(a)]
    return [arguments]


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(s) for s in node.meta["val"].shape)


# ------------------------------------------------------------------------------------------------------------- rules

FUNCTIONS = {
    "relu": "relu", "gelu": "GELU", "silu": "SiLU", "sigmoid": "sigmoid", "tanh": "tanh", "exp": "exp", "log": "log",
    "sqrt": "√", "rsqrt": "1∕√", "neg": "neg", "hardtanh": "hardtanh", "leaky_relu": "LReLU", "elu": "ELU", "sin": "sin",
    "cos": "cos", "abs": "abs", "pow": "pow", "mish": "Mish", "softplus": "softplus", "clamp": "clamp", "relu6": "R6",
    "masked_fill": "mask", "sign": "sign", "hardswish": "HSwish", "reciprocal": "1∕x", "log_softmax": "log", "erf": "erf",
}  # fmt: skip
SILENT = {"contiguous", "clone", "to", "detach", "alias", "_to_copy", "type_as", "_assert_tensor_metadata", "identity"}


def _elementwise(r: Reader, node: Any, name: str) -> Value:
    others = [
        a
        for a in [*node.args[1:], *node.kwargs.values()]
        if isinstance(r.values.get(a) if hasattr(a, "op") else None, Value)
    ]
    source = r.value(node.args[0])
    if others or source is None:  # a second tensor of the network is no parameter of the function
        return _unknown(r, node, name)
    return r.add("elementwise", [source], [Value(list(source.axes))], function=FUNCTIONS.get(name, name))


def _same(r: Reader, node: Any, name: str) -> Value | None:
    return r.values.get(node.args[0])


def _dropout(r: Reader, node: Any, name: str) -> Value | None:
    if len(node.args) < 3 or not node.args[2]:
        return _same(r, node, name)
    source = r.value(node.args[0])
    if source is None:
        return None
    return r.add("dropout", [source], [Value(list(source.axes))], sign=f"dropout {node.args[1]:g}")


def _linear(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return _unknown(r, node, name)
    new = r.axis("n", _shape(node)[-1])
    bias = len(node.args) > 2 and node.args[2] is not None
    leaf = r._stack[-1][0].rsplit(".", 1)[-1] if r._stack else ""
    label = (
        leaf[0].upper()
        if leaf and (leaf[0] in "qkvo" and (len(leaf) == 1 or leaf[1:] in ("_proj", "uery", "ey", "alue", "ut")))
        else ""
    )
    return r.add(
        "linear",
        [source],
        [Value([*source.axes[:-1], new])],
        [source.axes[-1], new],
        bias=bias,
        learned=True,
        name=label,
    )


def _conv(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    weight = node.args[1].meta["val"].shape
    bias = len(node.args) > 2 and node.args[2] is not None
    stride = _text(node.args[3] if len(node.args) > 3 else 1)
    transposed = "transpose" in name
    out = _shape(node)
    kernel = _text(list(weight[2:]))
    strided = stride not in ("1", "") or transposed
    channel = r.axis("n", out[1])
    space = [
        a if r.size[a] == s and not strided else r.axis(r.name[a], s)
        for a, s in zip(source.axes[2:], out[2:], strict=True)
    ]
    groups_at = 7 if transposed else 6
    groups = (
        node.args[groups_at - (0 if not transposed else 1)]
        if len(node.args) > groups_at - (0 if not transposed else 1)
        else 1
    )
    note = f"groups {groups}" if isinstance(groups, int) and groups > 1 else ""
    core = [source.axes[1], channel, *source.axes[2:], *space]
    text: dict[str, Any] = {"window": math.prod(weight[2:]), "groups": groups}
    text |= {
        "kernel_text": kernel if not strided else f"{kernel}²" if len(space) == 2 and "×" not in kernel else kernel
    }
    if strided:
        text["stride_text"] = stride
    made = Value([source.axes[0], channel, *space])
    return r.add("conv", [source], [made], core, bias=bias, learned=True, note=note, transposed=transposed,
                 spatial=[*source.axes[2:], *space], **text)  # fmt: skip


def _text(sides: Any) -> str:
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    return str(sides[0]) if len(set(sides)) == 1 else "×".join(map(str, sides))


def _pool(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    out = _shape(node)
    what = "Max" if "max" in name else "𝔼"
    count = 1 if "1d" in name else 2
    if all(s == 1 for s in out[-count:]):
        kept = source.axes[:-count]
        ones = [r.axis("", 1) for _ in range(count)]
        return r.add(
            "reduce", [source], [Value([*kept, *ones])], source.axes[-count:], what="max" if what == "Max" else "mean"
        )
    space = [r.axis(r.name[a], s) for a, s in zip(source.axes[-count:], out[-count:], strict=True)]
    size = r.size[source.axes[-1]] // out[-1] if "adaptive" in name else None
    kernel = _text(node.args[1]) if size is None else str(size)
    stride = (_text(node.args[2]) if len(node.args) > 2 and node.args[2] else kernel) if size is None else str(size)
    made = Value([*source.axes[:-count], *space])
    core = [*source.axes[-count:], *space]
    return r.add(
        "pool", [source], [made], core, what=what, stride_text=stride, kernel_text=kernel + ("²" if count == 2 else "")
    )


def _norm(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    axes = source.axes
    if name == "batch_norm":
        training = bool(node.args[5]) if len(node.args) > 5 else False
        if not training:  # a fixed scale and shift of every channel
            return r.add("elementwise", [source], [Value(list(axes))], function="norm", learned=True)
        core = [axes[0], *axes[2:]]
    elif name == "layer_norm" or name == "rms_norm":
        core = axes[len(axes) - len(node.args[1]) :]
    else:
        core = axes[1:]
    return r.add("norm", [source], [Value(list(axes))], core, learned=True)


def _softmax(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    return r.add("softmax", [source], [Value(list(source.axes))], [source.axes[node.args[1]]])


def _binary(r: Reader, node: Any, name: str) -> Value | None:
    left, right = r.value(node.args[0]), r.value(node.args[1]) if len(node.args) > 1 else None
    sign = {"add": "+", "sub": "−", "mul": "∗", "div": "∕"}.get(name, name)
    if left is None or right is None:
        source = left or right
        other = node.args[1] if left is not None else node.args[0]
        if source is None:
            return None
        number = f"{other:.3g}" if isinstance(other, int | float) else ""
        text = f"{sign}{number}" if number else f"{sign}W"
        return r.add("elementwise", [source], [Value(list(source.axes))], sign=text, learned=not number)
    return r.add("binary", [left, right], [Value(_broadcast(r, left.axes, right.axes))], what=name)


def _broadcast(r: Reader, a: Sequence[int], b: Sequence[int]) -> list[int]:
    """Axes of two tensors set against each other from the last one on; equal ones are one."""
    width = max(len(a), len(b))
    axes: list[int] = []
    for i in range(-width, 0):
        one, other = a[i] if -i <= len(a) else None, b[i] if -i <= len(b) else None
        if one is None or other is None:
            axes.append(one if one is not None else other)  # type: ignore[arg-type]
        elif r.size[one] == r.size[other] and r.size[one] != 1:
            axes.append(r.unite(one, other))
        else:
            axes.append(one if r.size[one] != 1 else other)
    return axes


def _matmul(r: Reader, node: Any, name: str) -> Value | None:
    left, right = r.value(node.args[0]), r.value(node.args[1])
    if left is None or right is None:
        source = left or right
        if source is None:
            return None
        new = r.axis("n", _shape(node)[-1])
        return r.add("linear", [source], [Value([*source.axes[:-1], new])], [source.axes[-1], new], learned=True)
    a, b = list(left.axes), list(right.axes)
    if len(a) < 2 or len(b) < 2:
        return _unknown(r, node, name)
    shared = r.unite(a[-1], b[-2])
    return r.add("einsum", [left, right], [Value([*_broadcast(r, a[:-2], b[:-2]), a[-2], b[-1]])], [shared])


def _einsum(r: Reader, node: Any, name: str) -> Value | None:
    equation, operands = node.args[0].replace(" ", ""), [r.value(a) for a in node.args[1]]
    sources = [o for o in operands if o is not None]
    if "..." in equation or "->" not in equation or len(sources) != len(operands):
        return _unknown(r, node, name)
    left, result = equation.split("->")
    letters: dict[str, int] = {}
    for term, source in zip(left.split(","), sources, strict=True):
        for letter, axis in zip(term, source.axes, strict=True):
            letters[letter] = r.unite(letters[letter], axis) if letter in letters else axis
    core = [a for c, a in letters.items() if c not in result]
    return r.add("einsum", sources, [Value([letters[c] for c in result])], core)


def _attention(r: Reader, node: Any, name: str) -> Value | None:
    q, k, v = (r.value(a) for a in node.args[:3])
    if q is None or k is None or v is None:
        return _unknown(r, node, name)
    outer = r._stack
    r._stack = (*outer, (f"{outer[-1][0] if outer else ''}.sdpa{len(r.steps)}", "Scaled Dot-Product Attention"))
    batch = [r.unite(a, b) for a, b in zip(q.axes[:-2], k.axes[:-2], strict=True)]
    shared = r.unite(q.axes[-1], k.axes[-1])
    score = r.add("einsum", [q, k], [Value([*batch, q.axes[-2], k.axes[-2]])], [shared])
    score = r.add("elementwise", [score], [Value(list(score.axes))], sign="∗k^−½")
    if (
        (len(node.args) > 3 and node.args[3] is not None)
        or node.kwargs.get("is_causal")
        or (len(node.args) > 5 and node.args[5])
    ):
        score = r.add("elementwise", [score], [Value(list(score.axes))], sign="mask")
    score = r.add("softmax", [score], [Value(list(score.axes))], [score.axes[-1]])
    for a, b in zip(batch, v.axes[:-2], strict=True):
        r.unite(a, b)
    key = r.unite(k.axes[-2], v.axes[-2])
    made = r.add("einsum", [score, v], [Value([*batch, q.axes[-2], v.axes[-1]])], [key])
    r._stack = outer
    return made


def _permute(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    n = len(source.axes)
    if name == "permute":
        order = [d % n for d in node.args[1]]
    else:
        i, j = (node.args[1] % n, node.args[2] % n) if name != "t" else (0, 1)
        order = list(range(n))
        order[i], order[j] = j, i
    return r.add("transpose", [source], [Value([source.axes[i] for i in order])])


def _reshape(r: Reader, node: Any, name: str) -> Value | None:
    """Axes are multiplied out and put together again; a product that is taken apart gives back its factors."""
    source = r.value(node.args[0])
    if source is None:
        return None
    out = _shape(node)
    have = [f for a in source.axes if r.size[a] != 1 for f in r.factored(a)]
    axes: list[int] = []
    i = j = 0
    while j < len(out):
        if out[j] == 1:
            axes.append(r.axis("", 1))
            j += 1
            continue
        i0, j0, p, q = i, j, r.size[have[i]], out[j]
        i, j = i + 1, j + 1
        while p != q:  # groups of axes whose products agree
            if p < q:
                p, i = p * r.size[have[i]], i + 1
            else:
                q, j = q * out[j], j + 1
        axes += r.regrouped(have[i0:i], out[j0:j]) or [r.axis("m", s) for s in out[j0:j]]
    before, after = {r.find(a) for a in source.axes}, {r.find(a) for a in axes}
    core = [a for a in (*source.axes, *axes) if r.size[a] != 1 and r.find(a) not in before & after]
    return r.add("reshape", [source], [Value(axes)], core) if core else _viewed(r, source, axes)


def _viewed(r: Reader, source: Value, axes: list[int]) -> Value:
    """The same tensor with other axes of length one: nothing is drawn."""
    made = Value(axes)
    r.add("view", [source], [made])
    return made


def _unsqueeze(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    axes, out = iter([a for a in source.axes if r.size[a] != 1]), _shape(node)
    return _viewed(r, source, [next(axes) if s != 1 else r.axis("", 1) for s in out])


def _expand(r: Reader, node: Any, name: str) -> Value | None:
    source, out = r.value(node.args[0]), _shape(node)
    if source is None:
        return None
    have: list[int | None] = [*[None] * (len(out) - len(source.axes)), *source.axes]
    axes = [a if a is not None and r.size[a] == s else r.axis("x", s) for a, s in zip(have, out, strict=True)]
    return _viewed(r, source, axes)


def _concat(r: Reader, node: Any, name: str) -> Value | None:
    sources = [v for v in (r.value(a) for a in node.args[0]) if v is not None]
    dim = node.args[1] if len(node.args) > 1 else 0
    out = _shape(node)
    dim %= len(out)
    new = r.axis(r.name[sources[0].axes[dim]], out[dim])
    axes = list(sources[0].axes)
    for other in sources[1:]:
        axes = [a if i == dim else r.unite(a, b) for i, (a, b) in enumerate(zip(axes, other.axes, strict=True))]
    axes[dim] = new
    if len(sources) == 1:  # the other parts are weights
        return r.add("reshape", sources, [Value(axes)], [sources[0].axes[dim], new], note="cat")
    return r.add("concat", sources, [Value(axes)], [*(s.axes[dim] for s in sources), new])


def _split(r: Reader, node: Any, name: str) -> Any:
    source = r.value(node.args[0])
    if source is None:
        return None
    at = 1 if name == "unbind" else 2
    dim = (node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)) % len(source.axes)
    outputs = []
    for i, part in enumerate(node.meta["val"]):
        axes = [a if not i or k == dim else r.twin(a) for k, a in enumerate(source.axes)]
        r.branches += [(a, b) for a, b in zip(axes, source.axes, strict=True) if a != b]
        if len(part.shape) < len(axes):
            del axes[dim]
        else:
            axes[dim] = r.axis(r.name[axes[dim]], int(part.shape[dim]))
        outputs.append(Value(axes))
    cut = [source.axes[dim]]
    if len(outputs[0].axes) == len(source.axes):
        cut += [o.axes[dim] for o in outputs]
    r.add("split", [source], outputs, cut)
    return outputs


def _select(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    dim = node.args[1] % len(source.axes)
    axes = [a for i, a in enumerate(source.axes) if i != dim]
    return r.add("index", [source], [Value(axes)], [source.axes[dim]], index_text=str(node.args[2]))


def _slice(r: Reader, node: Any, name: str) -> Value | None:
    source, out = r.value(node.args[0]), _shape(node)
    if source is None:
        return None
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(source.axes)
    old = source.axes[dim]
    if r.size[old] == out[dim]:
        return _same(r, node, name)
    start = node.args[2] if len(node.args) > 2 and node.args[2] else 0
    end = node.args[3] if len(node.args) > 3 and node.args[3] and node.args[3] < 10**9 else ""
    if len(node.args) > 4 and node.args[4] != 1:
        end = f"{end}:{node.args[4]}"
    start = start or ""
    new = r.axis(r.name[old], out[dim])
    axes = [new if i == dim else a for i, a in enumerate(source.axes)]
    return r.add("index", [source], [Value(axes)], [old, new], index_text=f"{start}:{end}")


def _resized(r: Reader, node: Any, name: str) -> Value | None:
    """Padding and resampling: axes whose length changes are new."""
    source, out = r.value(node.args[0]), _shape(node)
    if source is None:
        return None
    axes = [a if r.size[a] == s else r.axis(r.name[a], s) for a, s in zip(source.axes, out, strict=True)]
    core = [a for pair in zip(source.axes, axes, strict=True) for a in pair if pair[0] != pair[1]]
    return r.add("reshape", [source], [Value(axes)], core, note=name.split("_")[0])


def _reduce(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    n = len(source.axes)
    dims = node.args[1] if len(node.args) > 1 and node.args[1] is not None else list(range(n))
    dims = {d % n for d in (dims if isinstance(dims, list | tuple) else [dims])}
    keep = len(_shape(node)) == n
    axes = [a if i not in dims else r.axis("", 1) for i, a in enumerate(source.axes) if keep or i not in dims]
    what = {"amax": "max", "amin": "min"}.get(name, name)
    return r.add("reduce", [source], [Value(axes)], [source.axes[d] for d in sorted(dims)], what=what)


def _embedding(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[1])
    if source is None:
        return None
    new = r.axis("m", _shape(node)[-1])
    return r.add("embedding", [source], [Value([*source.axes, new])], [new], learned=True)


def _unknown(r: Reader, node: Any, name: str) -> Any:
    """An operation without a rule: its axes stay where the shape stays, and are new otherwise."""
    sources = [v for v in (r.value(a) for a in _flat([node.args, list(node.kwargs.values())])) if v is not None]
    made = node.meta.get("val")
    several = isinstance(made, list | tuple)
    shapes = [tuple(map(int, m.shape)) for m in (made if several else [made]) if isinstance(m, TorchTensor)]
    if not shapes or not sources:
        return None
    r.unknown.append(name)
    first, known = sources[0], [r.size[a] for a in sources[0].axes]
    outputs = []
    for shape in shapes:
        same = known == list(shape)
        twins = [r.twin(a) if outputs else a for a in first.axes] if same else [r.axis("a", s) for s in shape]
        outputs.append(Value(twins))
    core = [a for s in sources for a in s.axes] + [a for o in outputs for a in o.axes]
    r.add(name, sources, outputs, core)
    return outputs if several else outputs[0]


RULES: dict[str, Callable[[Reader, Any, str], Any]] = {
    "linear": _linear, "conv1d": _conv, "conv2d": _conv, "conv3d": _conv, "conv_transpose2d": _conv, "conv_transpose1d": _conv,
    "max_pool2d": _pool, "avg_pool2d": _pool, "adaptive_avg_pool2d": _pool, "max_pool1d": _pool, "avg_pool1d": _pool,
    "adaptive_avg_pool1d": _pool, "adaptive_max_pool2d": _pool, "batch_norm": _norm, "layer_norm": _norm,
    "group_norm": _norm, "instance_norm": _norm, "rms_norm": _norm, "softmax": _softmax, "log_softmax": _softmax,
    "add": _binary, "sub": _binary, "mul": _binary, "div": _binary, "maximum": _binary, "minimum": _binary,
    "matmul": _matmul, "bmm": _matmul, "mm": _matmul, "einsum": _einsum, "scaled_dot_product_attention": _attention,
    "permute": _permute, "transpose": _permute, "t": _permute, "view": _reshape, "reshape": _reshape, "flatten": _reshape,
    "unflatten": _reshape, "unsqueeze": _unsqueeze, "squeeze": _unsqueeze, "expand": _expand, "cat": _concat, "split": _split,
    "chunk": _split, "split_with_sizes": _split, "unbind": _split, "select": _select, "slice": _slice, "mean": _reduce,
    "sum": _reduce, "amax": _reduce, "amin": _reduce, "embedding": _embedding, "pad": _resized, "constant_pad_nd": _resized,
    "upsample_nearest2d": _resized, "upsample_bilinear2d": _resized, "dropout": _dropout,
    "feature_dropout": _dropout, **dict.fromkeys(SILENT, _same),
}  # fmt: skip
