"""What each operation of PyTorch does to axes, what it is drawn as, and how it is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor as TorchTensor

from torchfolio.diagrams.compile import OPERATORS
from torchfolio.diagrams.graph import Value, hint
from torchfolio.measure.cost import FlopCounter

if TYPE_CHECKING:
    from torchfolio.diagrams.exported import Reader

__all__ = ["call", "flat", "nodes_of", "rule_of"]

Rule = Callable[["Reader", Any, str], Any]


def rule_of(name: str) -> Rule:
    """The rule for an operation of ATen by its name."""
    return RULES.get(name) or (_elementwise if name in FUNCTIONS else _unknown)


def nodes_of(node: Any) -> list[Any]:
    """The nodes among the arguments of another, each as often as it is there."""
    return [a for a in flat([node.args, list(node.kwargs.values())]) if hasattr(a, "op")]


def flat(arguments: Any) -> list[Any]:
    """What lists and tuples hold, in order."""
    if isinstance(arguments, list | tuple):
        return [x for a in arguments for x in flat(a)]
    return [arguments]


# ----------------------------------------------------------------------------------------------------------- writing


def call(r: Reader, node: Any, target: str = "", args: Sequence[Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    """How a node is written: `code`, with the `weights` and `sizes` that it speaks of.

    Args:
        r: the reader.
        node: of the exported graph.
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
        return getattr(node.target, "__name__", str(node.target))
    space, name = node.target._schema.name.split("::")
    overload = node.target._overloadname or "default"
    plain = name.rstrip("_")
    if space == "aten" and plain in WRITTEN:
        return WRITTEN[plain]
    if name != plain and hasattr(getattr(torch.ops, space), plain):
        packet = getattr(getattr(torch.ops, space), plain)
        if overload in packet.overloads():
            name = plain
    return f"torch.ops.{space}.{name}.{overload}"


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(hint(s) for s in node.meta["val"].shape)


def _lengths(node: Any) -> tuple[Any, ...]:
    """The shape of a result, formulas where a length can vary."""
    return tuple(node.meta["val"].shape)


def _argument(node: Any, place: int, name: str, default: Any = None) -> Any:
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def _learned(weights: Sequence[Value]) -> bool:
    return any(w.root.learned for w in weights)


# ------------------------------------------------------------------------------------------------------------- rules

FUNCTIONS = {
    "relu": "relu", "gelu": "GELU", "silu": "SiLU", "sigmoid": "sigmoid", "tanh": "tanh", "exp": "exp", "log": "log",
    "sqrt": "√", "rsqrt": "1∕√", "neg": "neg", "hardtanh": "hardtanh", "leaky_relu": "LReLU", "elu": "ELU", "sin": "sin",
    "cos": "cos", "abs": "abs", "pow": "pow", "mish": "Mish", "softplus": "softplus", "clamp": "clamp", "relu6": "R6",
    "masked_fill": "mask", "sign": "sign", "hardswish": "HSwish", "reciprocal": "1∕x", "erf": "erf",
    "rsub": "c−",
}  # fmt: skip
SILENT = {"contiguous", "clone", "alias", "_assert_tensor_metadata", "identity", "lift_fresh_copy"}
SIGNS = {"add": "+", "sub": "−", "mul": "∗", "div": "∕"}


def _elementwise(r: Reader, node: Any, name: str) -> Value:
    source = r.value(node.args[0])
    others = [a for a in flat([node.args[1:], list(node.kwargs.values())]) if hasattr(a, "op") and r.values.get(a)]
    if others or source is None:  # a second tensor of the network is no parameter of the function
        return _unknown(r, node, name)
    writing = call(r, node)
    return r.add("elementwise", [source], [Value(list(source.axes))], function=FUNCTIONS.get(name, name),
                 learned=_learned(writing["weights"]), **writing)  # fmt: skip


def _same(r: Reader, node: Any, name: str) -> Value | None:
    return r.values.get(node.args[0])


def _cast(r: Reader, node: Any, name: str) -> Value | None:
    """A change of type, or of device, is a tag; none where nothing changes."""
    source = r.value(node.args[0])
    if source is None or len(nodes_of(node)) > 1:
        return _unknown(r, node, name)
    before, after = node.args[0].meta["val"], node.meta["val"]
    if before.dtype == after.dtype and before.device == after.device:
        return _same(r, node, name)
    sign = str(after.dtype if before.dtype != after.dtype else after.device).removeprefix("torch.")
    return r.add("dropout", [source], [Value(list(source.axes))], sign=sign, **call(r, node))


def _detach(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    assert source is not None
    return r.add("dropout", [source], [Value(list(source.axes))], sign="detach", **call(r, node))


def _dropout(r: Reader, node: Any, name: str) -> Value | None:
    if len(node.args) < 3 or not node.args[2] or not node.args[1]:
        return _same(r, node, name)
    source = r.value(node.args[0])
    assert source is not None
    return r.add("dropout", [source], [Value(list(source.axes))], sign=f"dropout {node.args[1]:g}", random=True,
                 **call(r, node))  # fmt: skip


def _linear(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    fixed = [a for a in node.args[1:] if a is not None]
    if source is None or not all(isinstance(r.fixed.get(a), Value) for a in fixed):
        return _unknown(r, node, name)
    new = r.weight_axis("n", node, -1)
    leaf = r._stack[-1][0].rsplit(".", 1)[-1] if r._stack else ""
    known = leaf and leaf[0] in "qkvo" and (len(leaf) == 1 or leaf[1:] in ("_proj", "uery", "ey", "alue", "ut"))
    writing = call(r, node)
    for weight, axes in zip(writing["weights"], ([new, source.axes[-1]], [new]), strict=False):
        weight.axes = axes
    return r.add("linear", [source], [Value([*source.axes[:-1], new])], [source.axes[-1], new], bias=len(fixed) > 1,
                 learned=True, name=leaf[0].upper() if known else "", **writing)  # fmt: skip


def _conv(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None or not isinstance(r.fixed.get(node.args[1]), Value):
        return _unknown(r, node, name)
    weight = node.args[1].meta["val"].shape
    bias = len(node.args) > 2 and node.args[2] is not None
    transposed = "transpose" in name
    # x, weight, bias, stride, padding, then dilation, groups; of a transposed one output padding, groups, dilation.
    dims = len(weight) - 2
    rest = _argument(node, 3, "stride", 1), _argument(node, 4, "padding", 0)
    groups = _argument(node, 6, "groups", 1)
    dilation = _argument(node, 7 if transposed else 5, "dilation", 1)
    output_padding = _argument(node, 5, "output_padding", 0) if transposed else 0
    out = _lengths(node)
    kernel, stride = _text(list(weight[2:])), _text(rest[0])
    strided = stride != "1" or transposed
    channel = r.weight_axis("n", node, 1)
    for axis, word in zip(
        r.fixed[node.args[1]].axes, ("c", "n", "k", "l", "j") if transposed else ("n", "c", "k", "l", "j"), strict=False
    ):
        r.name[axis] = r.name[axis] or word
    # Without a stride the change of length is the same for every length: an axis that keeps its length here always does.
    space = [
        a if r.size[a] == hint(s) and not strided else r.axis(r.name[a], s)
        for a, s in zip(source.axes[2:], out[2:], strict=True)
    ]
    notes = [f"groups {groups}"] * (groups > 1) + [f"dilation {_text(dilation)}"] * (_text(dilation) != "1")
    core = [source.axes[1], channel, *source.axes[2:], *space]
    text: dict[str, Any] = {"window": math.prod(map(hint, weight[2:])), "groups": groups}
    text["kernel_text"] = f"{kernel}²" if strided and len(space) == 2 and "×" not in kernel else kernel
    if strided:
        text["stride_text"] = stride
    plain = {"stride": rest[0], "padding": rest[1], "dilation": dilation, "groups": groups}
    if transposed:
        plain["output_padding"] = output_padding
    return r.add("conv", [source], [Value([source.axes[0], channel, *space])], core, bias=bias, learned=True,
                 note=", ".join(notes), transposed=transposed, spatial=[*source.axes[2:], *space],
                 geometry=_sides(plain, dims), **text, **call(r, node))  # fmt: skip


def _sides(geometry: dict[str, Any], dims: int) -> dict[str, Any]:
    """Stride, padding and dilation with one number for every side."""
    return {
        k: v if k == "groups" else ([*v] * (dims // len(v)) if isinstance(v, list | tuple) else [v] * dims)
        for k, v in geometry.items()
    }


def _text(sides: Any) -> str:
    sides = [hint(s) for s in sides] if isinstance(sides, list | tuple) else [sides]
    return str(sides[0]) if len(set(sides)) == 1 else "×".join(map(str, sides))


def _pool(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    out = _lengths(node)
    what = "Max" if "max" in name else "𝔼"
    count = 1 if "1d" in name else 2
    kept, ending = source.axes[:-count], source.axes[-count:]
    if "adaptive" in name and all(s == 1 for s in out[-count:]):
        ones = [r.axis("", 1) for _ in range(count)]
        what = "max" if what == "Max" else "mean"
        return r.add("reduce", [source], [Value([*kept, *ones])], ending, what=what, **call(r, node))
    space = [r.axis(r.name[a], s) for a, s in zip(ending, out[-count:], strict=True)]
    made = Value([*kept, *space])
    if "adaptive" in name:
        sides = [-(-r.size[a] // r.size[b]) for a, b in zip(ending, space, strict=True)]
        strides = sides
    else:
        given = [node.args[1], _argument(node, 2, "stride") or node.args[1]]
        sides, strides = ([*g] * (count // len(g)) if isinstance(g, list | tuple) else [g] * count for g in given)
    text = _text(sides)
    return r.add("pool", [source], [made], [*ending, *space], what=what, stride_text=_text(strides),
                 kernel_text=text + ("²" if count == 2 and "×" not in text else ""), window=math.prod(map(hint, sides)),
                 **call(r, node))  # fmt: skip


def _norm(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    axes, args = source.axes, list(node.args)
    made = [Value(list(axes))]
    if name == "batch_norm":
        training = bool(args[5]) if len(args) > 5 else False
        x, weight, bias, mean, variance = args[:5]
        epsilon = args[7] if len(args) > 7 else 1e-5
        momentum = args[6] if len(args) > 6 else 0.1
        writing = call(r, node, "F.batch_norm", [x, mean, variance, weight, bias, training, momentum, epsilon])
        if not training:  # a fixed scale and shift of every channel
            return r.add("elementwise", [source], made, function="norm", learned=True, **writing)
        if mean is not None:
            marks = [
                f"{{w{i}}}" if a is not None else "None" for i, a in ((2, weight), (2 + (weight is not None), bias))
            ]
            writing["pure"] = f"F.batch_norm({{0}}, None, None, {marks[0]}, {marks[1]}, True, 0.0, {epsilon!r})"
        return r.add("norm", [source], made, [axes[0], *axes[2:]], learned=True, **writing)
    if name in ("layer_norm", "rms_norm"):
        core = axes[len(axes) - len(args[1]) :]
        writing = call(r, node, f"F.{name}", args[:5])
    elif name == "group_norm":
        # Groups of channels are normalised with all their places; with a channel to each group, the places alone.
        core = axes[2:] if args[1] == r.size[axes[1]] else axes[1:]
        writing = call(r, node, "F.group_norm", args[:5])
    else:  # each channel of each example by itself
        core = axes[2:]
        writing = call(r, node)
    note = f"groups {args[1]}" if name == "group_norm" and core == axes[1:] and args[1] > 1 else ""
    return r.add("norm", [source], made, core, learned=_learned(writing["weights"]), note=note, **writing)


def _softmax(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    more = {} if name == "softmax" and len(node.args) < 3 else {"other": True}
    made = [Value(list(source.axes))]
    return r.add("softmax", [source], made, [source.axes[node.args[1]]], **more, **call(r, node))


def _binary(r: Reader, node: Any, name: str) -> Value | None:
    left, right = r.value(node.args[0]), r.value(node.args[1]) if len(node.args) > 1 else None
    sign = SIGNS.get(name, name)
    plain = not node.kwargs and len(node.args) == 2
    writing = call(r, node)
    if plain and name in SIGNS:
        operands = iter(_operands(writing["code"]))
        writing["code"] = f"{next(operands)} {OPERATORS[name]} {next(operands)}"
    if left is None or right is None:
        source = left or right
        other = node.args[1] if left is not None else node.args[0]
        if source is None:
            return None
        number = f"{other:.3g}" if isinstance(other, int | float) else ""
        made = Value(list(source.axes))
        if hasattr(other, "op") and isinstance(r.fixed.get(other), Value):
            mine, theirs = source.axes, r.fixed[other].axes
            # A weight that is longer brings its axes along.
            made = Value(_broadcast(r, mine, [r.twin(a) for a in theirs], unite=False))
            if len(writing["weights"]) == 1:
                writing["weights"][0].axes = _matched(r, theirs, made.axes)
        text = f"{sign}{number}" if number else f"{sign}W"
        linear = isinstance(other, int | float) and plain and (name == "mul" or (name == "div" and left is not None))
        return r.add("elementwise", [source], [made], sign=text, learned=_learned(writing["weights"]), linear=linear,
                     what=name if plain else "", **writing)  # fmt: skip
    made = Value(_broadcast(r, left.axes, right.axes))
    if not plain or name not in SIGNS:
        return r.add("binary", [left, right], [made], what=name, other=True, **writing)
    return r.add("binary", [left, right], [made], what=name, **writing)


KINDS = ("linear", "embedding", "einsum", "softmax", "split", "index", "copy", "transpose", "view", "reshape", "norm", "pool",
         "conv", "concat", "reduce", "binary", "elementwise", "dropout", "block", "save", "load", "constant")  # fmt: skip
"""Operations that are known by their axes, or have a sign of their own."""


def _operands(code: str) -> list[str]:
    """The two arguments in `f(a, b)`."""
    return code[code.index("(") + 1 : -1].split(", ")


def _matched(r: Reader, axes: Sequence[int], like: Sequence[int]) -> list[int]:
    """Axes of a tensor that is set against another: those of the other, from the last one on, where they are as long."""
    pairs = zip(axes[::-1], like[::-1], strict=False)
    return [b if r.size[a] == r.size[b] and r.size[a] != 1 else a for a, b in pairs][::-1]


def _broadcast(r: Reader, a: Sequence[int], b: Sequence[int], unite: bool = True) -> list[int]:
    """Axes of two tensors set against each other from the last one on; equal ones are one."""
    width = max(len(a), len(b))
    axes: list[int] = []
    for i in range(-width, 0):
        one, other = a[i] if -i <= len(a) else None, b[i] if -i <= len(b) else None
        if one is None or other is None:
            axes.append(one if one is not None else other)  # type: ignore[arg-type]
        elif r.size[one] == r.size[other] and r.size[one] != 1:
            axes.append(r.unite(one, other) if unite else one)
        else:
            axes.append(one if r.size[one] != 1 else other)
    return axes


def _matmul(r: Reader, node: Any, name: str) -> Value | None:
    left, right = r.value(node.args[0]), r.value(node.args[1])
    ranks = [a.meta["val"].dim() for a in node.args[:2]]
    if min(ranks) < 2:
        return _unknown(r, node, name)
    writing = call(r, node)
    if left is not None and right is not None:
        a, b = list(left.axes), list(right.axes)
        shared = r.unite(a[-1], b[-2])
        made = Value([*_broadcast(r, a[:-2], b[:-2]), a[-2], b[-1]])
        return r.add("einsum", [left, right], [made], [shared], **writing)
    source = left or right
    if source is None or max(ranks) != len(source.axes) or min(ranks) != 2:
        return _unknown(r, node, name)
    # The other one is a weight: a linear map of the last axis, or of the one before it.
    if left is not None:
        core, new = source.axes[-1], r.axis("n", _lengths(node)[-1])
        writing["weights"][0].axes, made = [core, new], Value([*source.axes[:-1], new])
    else:
        core, new = source.axes[-2], r.axis("n", _lengths(node)[-2])
        writing["weights"][0].axes, made = [new, core], Value([*source.axes[:-2], new, source.axes[-1]])
    return r.add("linear", [source], [made], [core, new], learned=_learned(writing["weights"]), **writing)


def _einsum(r: Reader, node: Any, name: str) -> Value | None:
    operands = [r.value(a) for a in node.args[1]]
    sources = [o for o in operands if o is not None]
    writing = call(r, node, "torch.einsum", [node.args[0], *node.args[1]])
    terms = _terms(node.args[0], [len(o.axes) for o in sources]) if len(sources) == len(operands) else None
    if terms is None:
        return _unknown(r, node, name, sources)
    *left, result = terms
    letters: dict[str, int] = {}
    for term, source in zip(left, sources, strict=True):
        for letter, axis in zip(term, source.axes, strict=True):
            if letter in letters and r.size[letters[letter]] != r.size[axis]:  # one of them is of length one
                return _unknown(r, node, name, sources)
            letters[letter] = r.unite(letters[letter], axis) if letter in letters else axis
    core = [a for c, a in letters.items() if c not in result]
    return r.add("einsum", sources, [Value([letters[c] for c in result])], core, **writing)


def _terms(equation: str, ranks: Sequence[int]) -> list[str] | None:
    """The letters of every operand and of the result, with letters in place of an ellipsis and a result that is said."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    if not arrow:
        counts = Counter(left.replace(",", "").replace(".", ""))
        result = ("..." if "..." in left else "") + "".join(sorted(c for c, n in counts.items() if n == 1))
    free = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in equation]
    widths = [rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True)]
    most = max((w for t, w in zip(terms, widths, strict=True) if "..." in t), default=0)
    if most > len(free):
        return None
    dots = "".join(free[:most])
    return [
        *(t.replace("...", dots[most - w :]) for t, w in zip(terms, widths, strict=True)),
        result.replace("...", dots),
    ]


def _attention(r: Reader, node: Any, name: str) -> Value | None:
    q, k, v = (r.value(a) for a in node.args[:3])
    mask, rate = _argument(node, 3, "attn_mask"), _argument(node, 4, "dropout_p", 0.0)
    causal, scale = _argument(node, 5, "is_causal", False), node.kwargs.get("scale")
    given = r.value(mask)  # a mask that the network makes of its inputs
    if q is None or k is None or v is None or node.kwargs.get("enable_gqa"):
        return _unknown(r, node, name, [x for x in (q, k, v, given) if x is not None])
    outer = r._stack
    r._stack = (*outer, (f"{outer[-1][0] if outer else ''}.sdpa{len(r.steps)}", "Scaled Dot-Product Attention"))
    batch = [r.unite(a, b) if r.size[a] == r.size[b] else a for a, b in zip(q.axes[:-2], k.axes[:-2], strict=True)]
    shared = r.unite(q.axes[-1], k.axes[-1])
    score = r.add("einsum", [q, k], [Value([*batch, q.axes[-2], k.axes[-2]])], [shared],
                  code="torch.matmul({0}, {1}.transpose(-2, -1))")  # fmt: skip
    code, sizes = ("{0} * {s0} ** -0.5", [shared]) if scale is None else (f"{{0}} * {scale!r}", [])
    sign = "∗k^−½" if scale is None else f"∗{scale:.3g}"
    score = r.add("elementwise", [score], [Value(list(score.axes))], sign=sign, code=code, sizes=sizes, linear=True)
    if given is not None:
        made = Value(_broadcast(r, score.axes, given.axes))
        if mask.meta["val"].dtype == torch.bool:
            code, core = "{0}.masked_fill(~{1}, float('-inf'))", [*score.axes, *given.axes]
            score = r.add("mask", [score, given], [made], core, code=code)
        else:
            score = r.add("binary", [score, given], [made], what="add", code="{0} + {1}")
    elif hasattr(mask, "op") or causal:
        weights, sizes = [], []
        if causal:
            ones = "torch.ones({s0}, {s1}, dtype=torch.bool, device={device})"
            code, sizes = f"{{0}}.masked_fill({ones}.triu(1), float('-inf'))", list(score.axes[-2:])
        else:
            weights = [Value(list(r.fixed[mask].axes), r.fixed[mask])]
            boolean = mask.meta["val"].dtype == torch.bool
            code = "{0}.masked_fill(~{w0}, float('-inf'))" if boolean else "{0} + {w0}"
        made = Value(list(score.axes))
        score = r.add("elementwise", [score], [made], sign="mask", code=code, sizes=sizes, weights=weights)
    score = r.add("softmax", [score], [Value(list(score.axes))], [score.axes[-1]], code="torch.softmax({0}, -1)")
    if rate:
        made = Value(list(score.axes))
        score = r.add("dropout", [score], [made], sign=f"dropout {rate:g}", code=f"F.dropout({{0}}, {rate!r}, True)",
                      random=True)  # fmt: skip
    for a, b in zip(batch, v.axes[:-2], strict=True):
        if r.size[a] == r.size[b]:
            r.unite(a, b)
    key = r.unite(k.axes[-2], v.axes[-2])
    made = Value([*batch, q.axes[-2], v.axes[-1]])
    made = r.add("einsum", [score, v], [made], [key], code="torch.matmul({0}, {1})")
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
    made = Value([source.axes[i] for i in order])
    return r.add("transpose", [source], [made], code=f"{{0}}.permute({order})")


def _reshape(r: Reader, node: Any, name: str) -> Value | None:
    """Axes are multiplied out and put together again; a product that is taken apart gives back its factors."""
    source = r.value(node.args[0])
    if source is None:
        return None
    lengths = _lengths(node)
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
        axes += r.regrouped(have[i0:i], out[j0:j]) or [r.axis("m", s) for s in lengths[j0:j]]
    before, after = {r.find(a) for a in source.axes}, {r.find(a) for a in axes}
    core = [a for a in (*source.axes, *axes) if r.size[a] != 1 and r.find(a) not in before & after]
    for axis, length in zip(axes, lengths, strict=True):
        if isinstance(length, int):  # stated, not computed from others
            r.stated.add(axis)
        elif length.node.expr.free_symbols:
            r.symbols.setdefault(axis, length.node.expr)
    return r.add("reshape", [source], [Value(axes)], core) if core else _viewed(r, source, axes)


def _viewed(r: Reader, source: Value, axes: list[int]) -> Value:
    """The same tensor with other axes of length one: nothing is drawn."""
    return r.add("view", [source], [Value(axes)])


def _unsqueeze(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    axes, out = iter([a for a in source.axes if r.size[a] != 1]), _shape(node)
    return _viewed(r, source, [next(axes) if s != 1 else r.axis("", 1) for s in out])


def _expand(r: Reader, node: Any, name: str) -> Value | None:
    source, out = r.value(node.args[0]), _lengths(node)
    if source is None:
        return None
    have: list[int | None] = [*[None] * (len(out) - len(source.axes)), *source.axes]
    axes = [a if a is not None and r.size[a] == hint(s) else r.axis("x", s) for a, s in zip(have, out, strict=True)]
    return r.add("view", [source], [Value(axes)], expand=True)


def _concat(r: Reader, node: Any, name: str) -> Value | None:
    sources = [v for v in (r.value(a) for a in node.args[0]) if v is not None]
    dim = node.args[1] if len(node.args) > 1 else 0
    out = _lengths(node)
    dim %= len(out)
    writing = call(r, node, "torch.cat", [node.args[0], dim])
    new = r.axis(r.name[sources[0].axes[dim]], out[dim])
    axes = list(sources[0].axes)
    for other in sources[1:]:
        axes = [a if i == dim else r.unite(a, b) for i, (a, b) in enumerate(zip(axes, other.axes, strict=True))]
    axes[dim] = new
    if len(sources) == 1:  # the other parts are weights
        return r.add("reshape", sources, [Value(axes)], [sources[0].axes[dim], new], note="cat", **writing)
    return r.add("concat", sources, [Value(axes)], [*(s.axes[dim] for s in sources), new], dim=dim, **writing)


def _stack(r: Reader, node: Any, name: str) -> Value | None:
    """A concatenation along a new axis."""
    sources = [v for v in (r.value(a) for a in node.args[0]) if v is not None]
    if len(sources) < len(node.args[0]):  # a weight among them
        return _unknown(r, node, name, sources)
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(node.meta["val"].shape)
    axes = list(sources[0].axes)
    for other in sources[1:]:
        axes = [r.unite(a, b) for a, b in zip(axes, other.axes, strict=True)]
    viewed = []
    for source in sources:
        own = list(source.axes)
        viewed.append(_viewed(r, source, [*own[:dim], r.axis("", 1), *own[dim:]]))
    new = r.axis("", len(sources))
    core = [*(v.axes[dim] for v in viewed), new]
    marks = ", ".join(f"{{{i}}}" for i in range(len(viewed)))
    return r.add("concat", viewed, [Value([*axes[:dim], new, *axes[dim:]])], core, dim=dim,
                 code=f"torch.cat([{marks}], {dim})")  # fmt: skip


def _extremum(r: Reader, node: Any, name: str) -> Any:
    """Largest or smallest of all, along an axis with its place, or of two."""
    if isinstance(node.meta.get("val"), list | tuple):
        made = _unknown(r, node, name)
        source = r.value(node.args[0])
        assert source is not None
        dim, keep = node.args[1] % len(source.axes), len(made[0].axes) == len(source.axes)
        for value in made:
            one = [r.axis("", 1)] if keep else []
            value.axes = [*source.axes[:dim], *one, *source.axes[dim + 1 :]]
        return made
    return (_reduce if len(node.args) == 1 else _binary)(r, node, name)


def _split(r: Reader, node: Any, name: str) -> Any:
    source = r.value(node.args[0])
    if source is None:
        return None
    dim = _argument(node, 1 if name == "unbind" else 2, "dim", 0) % len(source.axes)
    outputs = []
    for i, part in enumerate(node.meta["val"]):
        axes = [a if not i or k == dim else r.twin(a) for k, a in enumerate(source.axes)]
        r.branches += [(a, b) for a, b in zip(axes, source.axes, strict=True) if a != b]
        if len(part.shape) < len(axes):
            del axes[dim]
        else:
            axes[dim] = r.axis(r.name[axes[dim]], part.shape[dim])
        outputs.append(Value(axes))
    cut = [source.axes[dim]]
    if len(outputs[0].axes) == len(source.axes):
        cut += [o.axes[dim] for o in outputs]
    r.add("split", [source], outputs, cut, dim=dim, **call(r, node))
    return outputs


def _select(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    dim = node.args[1] % len(source.axes)
    axes = [a for i, a in enumerate(source.axes) if i != dim]
    text = str(node.args[2]) if isinstance(node.args[2], int) else "i"
    return r.add("index", [source], [Value(axes)], [source.axes[dim]], index_text=text, **call(r, node))


def _slice(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(source.axes)
    old, length = source.axes[dim], _lengths(node)[dim]
    before = node.args[0].meta["val"].shape[dim]
    if isinstance(length, int) and isinstance(before, int) and length == before:
        return _same(r, node, name)
    marks = [a if isinstance(a, int) else "i" if hasattr(a, "op") else None for a in node.args[2:5]]
    start, end, step = [*marks, *[None] * (3 - len(marks))]
    end = end if isinstance(end, str) or (end and end < 10**9) else ""
    end = f"{end}:{step}" if step not in (None, 1) else end
    new = r.axis(r.name[old], length)
    axes = [new if i == dim else a for i, a in enumerate(source.axes)]
    return r.add("index", [source], [Value(axes)], [old, new], index_text=f"{start or ''}:{end}", **call(r, node))


def _resized(r: Reader, node: Any, name: str) -> Value | None:
    """Padding and resampling: axes whose length changes are new."""
    source, out = r.value(node.args[0]), _lengths(node)
    if source is None:
        return None
    axes = [a if r.size[a] == hint(s) else r.axis(r.name[a], s) for a, s in zip(source.axes, out, strict=True)]
    core = [a for pair in zip(source.axes, axes, strict=True) for a in pair if pair[0] != pair[1]]
    return r.add("reshape", [source], [Value(axes)], core, note=name.split("_")[0], **call(r, node))


def _reduce(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[0])
    if source is None:
        return None
    n = len(source.axes)
    dims = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], int | list | tuple) else list(range(n))
    dims = {d % n for d in (dims if isinstance(dims, list | tuple) else [dims])} or set(range(n))
    keep = len(_shape(node)) == n
    axes = [a if i not in dims else r.axis("", 1) for i, a in enumerate(source.axes) if keep or i not in dims]
    what = {"amax": "max", "amin": "min"}.get(name, name)
    more = {"other": True} if node.kwargs else {}
    core = [source.axes[d] for d in sorted(dims)]
    return r.add("reduce", [source], [Value(axes)], core, what=what, **more, **call(r, node))


def _embedding(r: Reader, node: Any, name: str) -> Value | None:
    source = r.value(node.args[1])
    if source is None or not isinstance(r.fixed.get(node.args[0]), Value):
        return _unknown(r, node, name)
    new = r.weight_axis("m", node, -1)
    padding = _argument(node, 2, "padding_idx", -1)
    more = {} if padding in (None, -1) else {"padding_idx": padding}
    writing = call(r, node, "F.embedding", [node.args[1], node.args[0]], **more)
    return r.add("embedding", [source], [Value([*source.axes, new])], [new], learned=True, **writing)


def _counted(node: Any) -> int | None:
    """Floating-point operations of a node by torch's formulas, at the lengths of the example;
    `None` where it cannot be run on shapes alone."""

    def shape_of(a: Any) -> Any:
        if isinstance(a, list | tuple):
            return type(a)(map(shape_of, a))
        made = a.meta.get("val") if hasattr(a, "op") else a
        if isinstance(made, TorchTensor):
            return torch.empty([hint(s) for s in made.shape], dtype=made.dtype, device="meta")
        return hint(made) if isinstance(made, torch.SymInt) else made

    try:
        with FlopCounter() as counter:
            node.target(*map(shape_of, node.args), **{k: shape_of(v) for k, v in node.kwargs.items()})
    except Exception:  # whatever an operator raises that has no rule for shapes alone
        return None
    return None if counter.missed else counter.get_total_flops()


def _unknown(r: Reader, node: Any, name: str, sources: Sequence[Value] | None = None) -> Any:
    """An operation without a rule: its axes stay where the shape stays, and are new otherwise."""
    if sources is None:
        sources = [v for v in (r.value(a) for a in nodes_of(node)) if v is not None]
    made = node.meta.get("val")
    several = isinstance(made, list | tuple)
    results = [m for m in (made if several else [made]) if isinstance(m, TorchTensor)]
    if not results or not sources:
        return None
    r.unknown.append(name)
    first, known = sources[0], [r.size[a] for a in sources[0].axes]
    outputs = []
    for result in results:
        same = known == [hint(s) for s in result.shape]
        twins = [r.twin(a) if outputs else a for a in first.axes] if same else [r.axis("a", s) for s in result.shape]
        outputs.append(Value(twins))
    core = [a for s in sources for a in s.axes] + [a for o in outputs for a in o.axes]
    writing = call(r, node)
    # A box by another name than that of an operation whose axes are known.
    kind = f"torch.{name}" if name in KINDS else name
    r.add(kind, sources, outputs, core, learned=_learned(writing["weights"]), counted=_counted(node), **writing)
    return outputs if several else outputs[0]


RULES: dict[str, Rule] = {
    "linear": _linear, **{f"conv{t}{d}d": _conv for t in ("", "_transpose") for d in (1, 2, 3)},
    **{f"{k}_pool{d}d": _pool for k in ("max", "avg", "adaptive_avg") for d in (1, 2)}, "adaptive_max_pool2d": _unknown,
    "batch_norm": _norm, "layer_norm": _norm, "group_norm": _norm, "instance_norm": _norm, "rms_norm": _norm,
    "softmax": _softmax, "log_softmax": _softmax,
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), _binary),
    "matmul": _matmul, "bmm": _matmul, "mm": _matmul, "einsum": _einsum, "scaled_dot_product_attention": _attention,
    "permute": _permute, "transpose": _permute, "t": _permute, "view": _reshape, "reshape": _reshape, "flatten": _reshape,
    "unflatten": _reshape, "unsqueeze": _unsqueeze, "squeeze": _unsqueeze, "expand": _expand, "cat": _concat, "split": _split,
    "chunk": _split, "split_with_sizes": _split, "unbind": _split, "select": _select, "slice": _slice, "mean": _reduce,
    "sum": _reduce, **dict.fromkeys(("std", "var", "prod", "logsumexp", "any", "all", "argmax", "argmin"), _reduce),
    "max": _extremum, "min": _extremum, "stack": _stack, "amax": _reduce, "amin": _reduce, "embedding": _embedding, "pad": _resized, "constant_pad_nd": _resized,
    "upsample_nearest2d": _resized, "upsample_bilinear2d": _resized, "dropout": _dropout, "feature_dropout": _dropout,
    "to": _cast, "_to_copy": _cast, "detach": _detach, **dict.fromkeys(SILENT, _same),
}  # fmt: skip
