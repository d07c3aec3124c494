"""How a node of a traced module is written in Python, and what is read off its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torchfolio.diagrams.graph import Value, hint
from torchfolio.diagrams.reader import Reader

__all__ = ["argument", "call", "flat", "lengths", "nodes_of", "shape", "trained"]


def nodes_of(node: Any) -> list[Any]:
    """The nodes among the arguments of another, each as often as it is there."""
    return [a for a in flat([node.args, list(node.kwargs.values())]) if hasattr(a, "op")]


def flat(arguments: Any) -> list[Any]:
    """What lists and tuples hold, in order."""
    if isinstance(arguments, list | tuple):
        return [x for a in arguments for x in flat(a)]
    return [arguments]


def call(r: Reader, node: Any, target: str = "", args: Sequence[Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    """How a node is written: `code`, with the `weights` and `sizes` that it speaks of.

    Args:
        r: the reader.
        node: node of the exported graph.
        target: the function, that of the node by default.
        args: its arguments, those of the node by default. Tensors of the network must be in the order of the inputs.
        **kwargs: named arguments, those of the node where neither `args` nor they are given.
    """
    writing = _Writing(r)
    if args is None and not kwargs:
        kwargs = dict(node.kwargs)
    parts = [writing.of(a) for a in (node.args if args is None else args)]
    parts += [f"{k}={writing.of(v)}" for k, v in kwargs.items()]
    code = f"{target or _target(node)}({', '.join(parts)})"
    made = node.meta.get("val")
    if isinstance(made, list | tuple) and len(made) == 1:  # a list of one tensor
        code += "[0]"
    return {"code": code, "weights": writing.weights, "sizes": writing.sizes}


class _Writing:
    """Arguments as Python, tensors and lengths as marks."""

    def __init__(self, r: Reader) -> None:
        self.r, self.inputs = r, 0
        self.weights: list[Value] = []
        self.sizes: list[Any] = []

    def of(self, a: Any) -> str:
        if isinstance(a, list | tuple):
            inside = ", ".join(map(self.of, a))
            return f"[{inside}]"
        if hasattr(a, "op"):
            return self._node(a)
        if isinstance(a, torch.SymInt):
            return self._size(a.node.expr)
        if isinstance(a, torch.device):
            return "{device}"
        if isinstance(a, float) and not math.isfinite(a):
            return f"float('{a}')"
        return repr(a).replace("{", "{{").replace("}", "}}")

    def _node(self, node: Any) -> str:
        if isinstance(self.r.values.get(node), Value):
            self.inputs += 1
            return f"{{{self.inputs - 1}}}"
        fixed = self.r.fixed.get(node)
        if isinstance(fixed, Value):
            self.weights.append(Value(list(fixed.axes), fixed))
            return f"{{w{len(self.weights) - 1}}}"
        if node.op == "get_attr":
            return node.name
        made = node.meta.get("val")
        if isinstance(made, torch.SymInt):
            return self._size(made.node.expr)
        if isinstance(made, int | float):
            return repr(made)
        return "None"

    def _size(self, formula: Any) -> str:
        self.sizes.append(formula)
        return f"{{s{len(self.sizes) - 1}}}"


WRITTEN = {
    **{n: f"torch.{n}" for n in ("relu", "sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "neg", "sin", "cos", "abs", "sign",
                                 "erf", "reciprocal", "matmul", "bmm", "mm", "cat", "maximum", "minimum")},
    **{n: f"F.{n}" for n in ("gelu", "silu", "hardtanh", "leaky_relu", "elu", "mish", "softplus", "relu6", "hardswish", "linear",
                             "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "dropout",
                             "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                             "scaled_dot_product_attention")},
}  # fmt: skip
"""Functions of PyTorch that take what those of ATen take, in the same order."""


def _target(node: Any) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return f"torch.ops.higher_order.{node.target.__name__}"
    space, name = node.target._schema.name.split("::")
    overload = node.target._overloadname or "default"
    plain = name.rstrip("_")
    if space == "aten" and plain in WRITTEN:
        return WRITTEN[plain]
    if name != plain and hasattr(getattr(torch.ops, space), plain):  # what does the same, not in place
        packet, types = getattr(getattr(torch.ops, space), plain), _types(node.target)
        for other in sorted(packet.overloads(), key=lambda o: o != overload):
            if _types(getattr(packet, other)) == types:
                name, overload = plain, other
                break
    return f"torch.ops.{space}.{name}.{overload}"


def _types(operator: Any) -> list[str]:
    return [a.type.annotation_str for a in operator._schema.arguments if not a.is_out]


def shape(node: Any) -> tuple[int, ...]:
    """The shape of a result in numbers."""
    return tuple(hint(s) for s in node.meta["val"].shape)


def lengths(node: Any) -> tuple[Any, ...]:
    """The shape of a result, formulas where a length can vary."""
    return tuple(node.meta["val"].shape)


def argument(node: Any, place: int, name: str, default: Any = None) -> Any:
    """An argument by its place or its name."""
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def trained(r: Reader, weights: Sequence[Value]) -> bool:
    """Whether something of them is learned."""
    return any(w.root.learned or id(w.root) in r.grown for w in weights)
