"""Operations without a rule: which axes go through them is found by running them on symbolic shapes.

Every axis of every argument gets a length of its own, a symbol. What torch derives of the result says where its axes come
from, and the equations that torch had to assume say which axes of the arguments are one.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from torchfolio.diagrams.graph import Value, hint
from torchfolio.diagrams.reader import Reader
from torchfolio.diagrams.writing import call, nodes_of, trained
from torchfolio.measure.flops import FlopCounter

__all__ = ["boxed", "counted", "pointwise"]

KINDS = ("linear", "embedding", "einsum", "softmax", "split", "index", "copy", "transpose", "view", "reshape", "norm", "pool",
         "conv", "concat", "reduce", "binary", "elementwise", "dropout", "block", "save", "load", "constant")  # fmt: skip
"""Operations that are known by their axes, or have a sign of their own."""
SIGNS = {"add": "+", "sub": "−", "mul": "∗", "div": "∕", "gt": ">", "lt": "<", "ge": "≥", "le": "≤", "eq": "=", "ne": "≠",
         "gelu": "GELU", "silu": "SiLU", "sqrt": "√", "rsqrt": "1∕√", "leaky_relu": "LReLU", "mish": "Mish", "relu6": "R6",
         "masked_fill": "mask", "hardswish": "HSwish", "reciprocal": "1∕x", "rsub": "c−", "__and": "∧", "__or": "∨", "__xor": "⊻", "logical_and": "∧", "bitwise_and": "∧", "logical_or": "∨",
         "bitwise_or": "∨", "logical_not": "¬", "bitwise_not": "¬"}  # fmt: skip
"""How functions of numbers are called in a drawing, where not by their names."""


def pointwise(node: Any) -> bool:
    """Whether an operation is a function of numbers that runs along every axis."""
    target = node.target
    name = getattr(target, "__name__", "")
    if isinstance(target, torch._ops.OpOverload) and target._schema.name.endswith("_"):  # in place
        packet = getattr(torch.ops.aten, target._schema.name.split("::")[1].rstrip("_"), None)
        target = getattr(packet, target._overloadname or "default", target)
    return torch.Tag.pointwise in getattr(target, "tags", ()) or name.startswith(("__and__", "__or__", "__xor__"))


def boxed(r: Reader, node: Any, name: str) -> Any:
    """A function of numbers, or else a plain box by its name on the axes that it changes."""
    results = node.meta.get("val")
    several = isinstance(results, list | tuple)
    made = [m for m in (results if several else [results]) if isinstance(m, Tensor)]
    taken = [a for a in nodes_of(node) if isinstance(r.values.get(a), Value)]
    if not made or not taken:
        return None
    sources = [v for v in map(r.value, taken) if v is not None]
    axes = _axes(r, node, sources, made)
    writing = call(r, node)
    learned = trained(r, writing["weights"])
    if pointwise(node):
        kind = "elementwise" if len(sources) == 1 else "binary"
        more = {"function" if len(sources) == 1 else "what": SIGNS.get(name, name), "other": True}
        return r.add(kind, sources, [Value(axes[0])], learned=learned, **more, **writing)
    r.unknown.append(name)
    before, after = (
        {r.find(a) for own in side for a in own} for side in ((v.axes for v in sources), (own for own in axes))
    )
    core = (before ^ after) | {r.find(sources[0].axes[d]) for d in _dims(node) if d < len(sources[0].axes)}
    outputs = []
    for own in axes:  # several results have axes of their own, which may be one later
        twins = [r.twin(a) if outputs else a for a in own]
        r.branches += [(a, b) for a, b in zip(twins, own, strict=True) if a != b]
        outputs.append(Value(twins))
    core |= {b for b, a in zip((x for o in outputs for x in o.axes), (x for o in axes for x in o), strict=True)
             if r.find(a) in core} if core else before | {a for o in outputs for a in o.axes}  # fmt: skip
    # A box by another name than that of an operation whose axes are known.
    kind = f"torch.{name}" if name in KINDS else name
    r.add(kind, sources, outputs, core, learned=learned, counted=counted(node), **writing)
    return outputs if several else outputs[0]


def _axes(r: Reader, node: Any, sources: list[Value], made: list[Tensor]) -> list[list[int]]:
    """Axes of the results; those of the arguments that torch assumes to be as long as each other become one."""
    first = sources[0]
    try:
        results, origin, env = _on_symbols(r, node, iter(sources))
    except Exception:  # whatever an operator raises that has no rule for shapes alone
        known = [r.size[a] for a in first.axes]
        return [list(first.axes) if known == [hint(s) for s in m.shape] else [r.axis("a", s) for s in m.shape] for m in made]  # fmt: skip
    groups: dict[Any, list[int]] = defaultdict(list)
    weights = {}
    for symbol, (axis, fixed) in origin.items():
        (weights if fixed else groups).setdefault(env.simplify(symbol), []).append(axis)  # type: ignore[union-attr]
    for axes in groups.values():
        for other in axes[1:]:
            r.unite(axes[0], other)
    found = []
    for result, real in zip(results, made, strict=True):
        own = []
        like = [r.name[a] for a in first.axes] if len(first.axes) == result.dim() else [""] * result.dim()
        for size, length, word in zip(result.shape, real.shape, like, strict=True):
            formula = env.simplify(size.node.expr) if isinstance(size, torch.SymInt) else None
            known = [s for s in getattr(formula, "free_symbols", ()) if s in groups or s in weights]
            if formula in groups:
                own.append(groups[formula][0])
                continue
            name = r.name[(groups.get(known[0]) or weights[known[0]])[0]] if len(known) == 1 else word
            own.append(r.axis(name or "a", length))
            if formula in weights:
                r.stated.add(own[-1])
        found.append(own)
    return found


def _on_symbols(r: Reader, node: Any, sources: Any) -> tuple[list[Any], dict[Any, tuple[int, bool]], Any]:
    """Results of an operation on symbolic shapes, of every symbol the axis and whether a weight has it, and the equations."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env, static_shapes=False)
    origin: dict[Any, tuple[int, bool]] = {}

    def fake(a: Any) -> Any:
        if isinstance(a, list | tuple):
            return type(a)(map(fake, a))
        real = a.meta.get("val") if hasattr(a, "op") else a
        if not isinstance(real, Tensor):
            return hint(real) if isinstance(real, torch.SymInt) else real
        inside = isinstance(r.values.get(a), Value)
        axes = next(sources).axes if inside else r.fixed[a].axes
        sizes = []
        for axis, length in zip(axes, map(hint, real.shape), strict=True):
            if length > 1:
                source = ConstantSource(f"a{len(origin)}")
                symbol = env.create_symbol(length, source, DimDynamic.DYNAMIC, constraint_dim=None)
                origin[symbol] = axis, not inside
                length = env.create_symintnode(symbol, hint=length, source=source)
            sizes.append(length)
        with mode:
            return torch.empty(sizes, dtype=real.dtype, device=real.device)

    args, kwargs = [fake(a) for a in node.args], {k: fake(v) for k, v in node.kwargs.items()}
    with mode:
        found = node.target(*args, **kwargs)
    return [t for t in (found if isinstance(found, list | tuple) else [found]) if isinstance(t, Tensor)], origin, env


def _dims(node: Any) -> list[int]:
    """Places of axes that an operation names."""
    count = node.args[0].meta["val"].dim() if node.args and hasattr(node.args[0], "op") else 0
    for i, argument in enumerate(node.target._schema.arguments if count else ()):
        if argument.name in ("dim", "dims"):
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            return [d % count for d in (given if isinstance(given, list | tuple) else [given]) if isinstance(d, int)]
    return []


def counted(node: Any) -> int | None:
    """Floating-point operations of a node by torch's formulas, at the lengths of the example;
    `None` where it cannot be run on shapes alone."""

    def shape_of(a: Any) -> Any:
        if isinstance(a, list | tuple):
            return type(a)(map(shape_of, a))
        made = a.meta.get("val") if hasattr(a, "op") else a
        if isinstance(made, Tensor):
            return torch.empty([hint(s) for s in made.shape], dtype=made.dtype, device="meta")
        return hint(made) if isinstance(made, torch.SymInt) else made

    try:
        with FlopCounter() as counter:
            node.target(*map(shape_of, node.args), **{k: shape_of(v) for k, v in node.kwargs.items()})
    except Exception:  # whatever an operator raises that has no rule for shapes alone
        return None
    return None if counter.missed else counter.get_total_flops()
