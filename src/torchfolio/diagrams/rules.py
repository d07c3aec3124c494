"""What each operation of PyTorch does to axes, what it is drawn as, and how it is written.

Longer than most because it holds a rule for each operation that changes axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchfolio.diagrams.compile import OPERATORS
from torchfolio.diagrams.contractions import attention, broadcast, contraction
from torchfolio.diagrams.graph import Value, hint
from torchfolio.diagrams.inferred import SIGNS, boxed
from torchfolio.diagrams.reader import Reader
from torchfolio.diagrams.windows import convolution, embedding, normalisation, pooling, recurrence
from torchfolio.diagrams.writing import argument, call, lengths, nodes_of, shape, trained

__all__ = ["FILLED", "read_node"]

FILLED = ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")
"""What has the shape of a tensor and nothing else of it."""


def read_node(r: Reader, node: Any, name: str) -> Any:
    """What a node that takes tensors of the network gives, by the rule for its operation.

    Args:
        r: the reader, which is given the operation.
        node: node of the exported graph.
        name: name of its operation in ATen.
    """
    if name in RULES:
        return RULES[name](r, node, name)
    taken = [a for a in nodes_of(node) if isinstance(r.values.get(a), Value)]
    if name in OF_ONE and taken == [node.args[0]]:
        source = r.value(node.args[0])
        assert source is not None
        return OF_ONE[name](r, node, name, source)
    return boxed(r, node, name)


# --------------------------------------------------------------------------------------------- functions of numbers


def _same(r: Reader, node: Any, name: str) -> Value | None:
    """The tensor itself, by another name."""
    source = node.args[0]
    r.uses[node] += r.uses[source] - 1
    return r.values.get(source)


def _copied(r: Reader, node: Any, name: str) -> Value | None:
    """The same numbers elsewhere, so that a change in place of the one does not change the other."""
    source = _same(r, node, name)
    return None if source is None else Value(list(source.axes), source)


def _cast(r: Reader, node: Any, name: str) -> Value | None:
    """A change of type, or of device, is a tag; none where nothing changes."""
    before, after = node.args[0].meta["val"], node.meta["val"]
    if len(nodes_of(node)) == 1 and before.dtype == after.dtype and before.device == after.device:
        return _same(r, node, name)
    sign = str(after.dtype if before.dtype != after.dtype else after.device).removeprefix("torch.")
    return _tag(r, node, sign)


def _dropout(r: Reader, node: Any, name: str) -> Value | None:
    if len(node.args) < 3 or not node.args[2] or not node.args[1]:
        return _same(r, node, name)
    return _tag(r, node, f"dropout {node.args[1]:g}", random=True)


def _tag(r: Reader, node: Any, sign: str, **more: Any) -> Value | None:
    source = r.value(node.args[0])
    if source is None or len(nodes_of(node)) > 1:
        return boxed(r, node, sign)
    return r.add("dropout", [source], [Value(list(source.axes))], sign=sign, **more, **call(r, node))


def _softmax(r: Reader, node: Any, name: str, source: Value) -> Value:
    more = {} if name == "softmax" and len(node.args) < 3 else {"other": True}
    made = [Value(list(source.axes))]
    return r.add("softmax", [source], made, [source.axes[node.args[1]]], **more, **call(r, node))


def _binary(r: Reader, node: Any, name: str) -> Value | None:
    left, right = r.value(node.args[0]), r.value(node.args[1]) if len(node.args) > 1 else None
    sign = SIGNS.get(name, name)
    plain = not node.kwargs and len(node.args) == 2
    writing = call(r, node)
    if plain and name in OPERATORS:
        code = writing["code"]
        writing["code"] = f" {OPERATORS[name]} ".join(code[code.index("(") + 1 : -1].split(", "))
    if left is None or right is None:
        source = left or right
        other = node.args[1] if left is not None else node.args[0]
        if source is None:
            return boxed(r, node, name)
        number = f"{other:.3g}" if isinstance(other, int | float) else ""
        made = Value(list(source.axes))
        if hasattr(other, "op") and isinstance(r.fixed.get(other), Value):
            mine, theirs = source.axes, r.fixed[other].axes
            # A weight that is longer brings its axes along.
            made = Value(broadcast(r, mine, [r.twin(a) for a in theirs], unite=False))
            if len(writing["weights"]) == 1:
                writing["weights"][0].axes = _matched(r, theirs, made.axes)
        text = f"{sign}{number}" if number else f"{sign}W"
        linear = isinstance(other, int | float) and plain and (name == "mul" or (name == "div" and left is not None))
        return r.add("elementwise", [source], [made], sign=text, learned=trained(r, writing["weights"]), linear=linear,
                     what=name if plain else "", **writing)  # fmt: skip
    made = Value(broadcast(r, left.axes, right.axes))
    other = {} if plain and name in OPERATORS else {"other": True}
    return r.add("binary", [left, right], [made], what=name if name in OPERATORS else sign, **other, **writing)


def _matched(r: Reader, axes: Sequence[int], like: Sequence[int]) -> list[int]:
    """Axes of a tensor that is set against another: those of the other, from the last one on, where they are as long."""
    pairs = zip(axes[::-1], like[::-1], strict=False)
    return [b if r.size[a] == r.size[b] and r.size[a] != 1 else a for a, b in pairs][::-1]


# -------------------------------------------------------------------------------------------------- axes that change


def _permute(r: Reader, node: Any, name: str, source: Value) -> Value:
    order = list(range(len(source.axes)))
    if name == "permute":
        order = [order[d] for d in node.args[1]]
    elif len(order) > 1:
        i, j = node.args[1:3] if name != "t" else (0, 1)
        order[i], order[j] = order[j], order[i]
    made = Value([source.axes[i] for i in order])
    return r.add("transpose", [source], [made], code=f"{{0}}.permute({order})")


def _reshape(r: Reader, node: Any, name: str) -> Value | None:
    """Axes are multiplied out and put together again; a product that is taken apart gives back its factors."""
    source = r.value(node.args[0])
    if source is None:  # another tensor says the shape
        return boxed(r, node, name)
    out = shape(node)
    have = [f for a in source.axes if r.size[a] != 1 for f in r.factored(a)]
    axes: list[int] = []
    i = j = 0
    while j < len(out):
        if out[j] == 1 or i >= len(have):
            axes.append(r.axis("", out[j]))
            j += 1
            continue
        i0, j0, p, q = i, j, r.size[have[i]], out[j]
        i, j = i + 1, j + 1
        while p != q:  # groups of axes whose products agree
            if p < q:
                p, i = p * r.size[have[i]], i + 1
            else:
                q, j = q * out[j], j + 1
        axes += r.regrouped(have[i0:i], out[j0:j]) or [r.axis("m", s) for s in lengths(node)[j0:j]]
    before, after = {r.find(a) for a in source.axes}, {r.find(a) for a in axes}
    core = [a for a in (*source.axes, *axes) if r.size[a] != 1 and r.find(a) not in before & after]
    for axis, length in zip(axes, lengths(node), strict=True):
        if isinstance(length, int):  # stated, not computed from others
            r.stated.add(axis)
        elif length.node.expr.free_symbols:
            r.symbols.setdefault(axis, length.node.expr)
    return r.add("reshape", [source], [Value(axes)], core) if core else _viewed(r, source, axes)


def _viewed(r: Reader, source: Value, axes: list[int]) -> Value:
    """The same tensor with other axes of length one: nothing is drawn."""
    return r.add("view", [source], [Value(axes)])


def _unsqueeze(r: Reader, node: Any, name: str, source: Value) -> Value:
    axes = iter([a for a in source.axes if r.size[a] != 1])
    return _viewed(r, source, [next(axes) if s != 1 else r.axis("", 1) for s in shape(node)])


def _expand(r: Reader, node: Any, name: str) -> Value | None:
    """Axes that are repeated are new, or those of another tensor that says how long they are."""
    source, out = r.value(node.args[0]), lengths(node)
    if source is None:
        return boxed(r, node, name)
    like = r.values.get(node.args[1]) if name == "expand_as" else None
    have: list[int | None] = [*[None] * (len(out) - len(source.axes)), *source.axes]
    new = [r.axis("x", s) for s in out] if like is None else [r.twin(a) for a in like.axes]
    r.branches += zip(new, like.axes if like is not None else (), strict=False)
    axes = [a if a is not None and r.size[a] == hint(s) else n for a, n, s in zip(have, new, out, strict=True)]
    return r.add("view", [source], [Value(axes)], expand=True)


def _concat(r: Reader, node: Any, name: str) -> Value | None:
    """Tensors one after another along an axis, or, each as one entry, along a new one."""
    values = [r.value(a) for a in node.args[0]]
    sources = [v for v in values if v is not None]
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(lengths(node))
    writing = call(r, node, f"torch.{name}", [node.args[0], dim])
    if name == "stack":
        if len(sources) < len(values):  # a weight among them
            return boxed(r, node, name)
        sources = [_viewed(r, s, [*s.axes[:dim], r.axis("", 1), *s.axes[dim:]]) for s in sources]
        writing = {"code": f"torch.cat([{', '.join(f'{{{i}}}' for i in range(len(sources)))}], {dim})"}
    axes = list(sources[0].axes)
    for other in sources[1:]:
        axes = [a if i == dim else r.unite(a, b) for i, (a, b) in enumerate(zip(axes, other.axes, strict=True))]
    axes[dim] = new = r.axis(r.name[axes[dim]], lengths(node)[dim])
    if len(sources) == 1:  # the other parts are weights
        return r.add("reshape", sources, [Value(axes)], [sources[0].axes[dim], new], note="cat", **writing)
    return r.add("concat", sources, [Value(axes)], [*(s.axes[dim] for s in sources), new], dim=dim, **writing)


def _split(r: Reader, node: Any, name: str, source: Value) -> list[Value]:
    dim = argument(node, 1 if name == "unbind" else 2, "dim", 0) % len(source.axes)
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


def _select(r: Reader, node: Any, name: str, source: Value) -> Value:
    dim = node.args[1] % len(source.axes)
    axes = [a for i, a in enumerate(source.axes) if i != dim]
    text = str(node.args[2]) if isinstance(node.args[2], int) else "i"
    return r.add("index", [source], [Value(axes)], [source.axes[dim]], index_text=text, **call(r, node))


def _slice(r: Reader, node: Any, name: str) -> Value | None:
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(lengths(node))
    length, before = lengths(node)[dim], node.args[0].meta["val"].shape[dim]
    if isinstance(length, int) and isinstance(before, int) and length == before:
        return _same(r, node, name)
    source = r.value(node.args[0])
    if source is None:
        return boxed(r, node, name)
    old = source.axes[dim]
    marks = [a if isinstance(a, int) else "i" if hasattr(a, "op") else None for a in node.args[2:5]]
    start, end, step = [*marks, *[None] * (3 - len(marks))]
    end = end if isinstance(end, str) or (end and end < 10**9) else ""
    end = f"{end}:{step}" if step not in (None, 1) else end
    new = r.axis(r.name[old], length)
    axes = [new if i == dim else a for i, a in enumerate(source.axes)]
    return r.add("index", [source], [Value(axes)], [old, new], index_text=f"{start or ''}:{end}", **call(r, node))


def _resized(r: Reader, node: Any, name: str, source: Value) -> Value:
    """Padding, resampling, repetition: axes whose length changes are new."""
    out = lengths(node)
    have: list[int | None] = [*[None] * (len(out) - len(source.axes)), *source.axes]
    axes = [a if a is not None and r.size[a] == hint(s) else r.axis(r.name[a] if a is not None else "a", s)
            for a, s in zip(have, out, strict=True)]  # fmt: skip
    core = {*source.axes, *axes} - ({*source.axes} & {*axes})
    return r.add("reshape", [source], [Value(axes)], core, note=name.split("_")[0], **call(r, node))


def _reduce(r: Reader, node: Any, name: str, source: Value) -> Value:
    n = len(source.axes)
    dims = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], int | list | tuple) else []
    dims = {d % n for d in (dims if isinstance(dims, list | tuple) else [dims])} or set(range(n))
    keep = len(shape(node)) == n
    axes = [a if i not in dims else r.axis("", 1) for i, a in enumerate(source.axes) if keep or i not in dims]
    what = {"amax": "max", "amin": "min"}.get(name, name)
    more = {"other": True} if node.kwargs else {}
    core = [source.axes[d] for d in sorted(dims)]
    return r.add("reduce", [source], [Value(axes)], core, what=what, **more, **call(r, node))


def _extremum(r: Reader, node: Any, name: str) -> Any:
    """Largest or smallest of all, along an axis with its place or without, or of two."""
    if not isinstance(node.meta.get("val"), list | tuple):
        source = r.value(node.args[0]) if len(node.args) == 1 else None
        return _binary(r, node, name) if source is None else _reduce(r, node, name, source)
    source = r.value(node.args[0])
    if source is None or any(user.args[1] and user.users for user in node.users):
        return boxed(r, node, name)
    dim = node.args[1] % len(source.axes)
    keep = [r.axis("", 1)] if bool(argument(node, 2, "keepdim", False)) else []
    made = Value([*source.axes[:dim], *keep, *source.axes[dim + 1 :]])
    code = f"torch.a{name}({{0}}, {dim}, {bool(keep)})"
    return [r.add("reduce", [source], [made], [source.axes[dim]], what=name, code=code), None]


def _gathered(r: Reader, node: Any, name: str) -> Value | None:
    """Entries that are taken from, or put to, places along one axis that a tensor of indices says; other axes stay."""
    dim, index, *other = (node.args[1] % node.meta["val"].dim(), *node.args[2:4])
    moved = node.args[0] if name == "gather" else other[0] if other and hasattr(other[0], "op") else index
    values = {a: r.value(a) for a in nodes_of(node)}
    sources = [v for v in values.values() if v is not None]
    main = values.get(moved)
    if main is None or len(values) < len(nodes_of(node)) or not main.axes:
        return boxed(r, node, name)
    whole = values.get(node.args[0])
    for value in sources:  # lengths that agree away from the axis are those of the same axes
        for d, (a, b) in enumerate(zip(main.axes, value.axes, strict=False)):
            if r.size[a] == r.size[b] and (d != dim or (value is not whole and main is not whole)):
                r.unite(a, b)
    out = lengths(node)
    like = values[index] if name == "gather" else whole
    axes = [a if r.size[a] == hint(s) and (d != dim or like is not None) else r.axis("n", s)
            for d, (a, s) in enumerate(zip((like or main).axes, out, strict=True))]  # fmt: skip
    r.unknown.append(name)
    core = [main.axes[dim], axes[dim], *(v.axes[dim] for v in sources if len(v.axes) > dim)]
    return r.add(name, sources, [Value(axes)], core, **call(r, node))


Rule = Callable[[Reader, Any, str], Any]
RULES: dict[str, Rule] = {
    **dict.fromkeys(("linear", "matmul", "bmm", "mm", "mv", "dot", "einsum", "tensordot", "inner", "bilinear"), contraction),
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum", "gt", "lt", "ge", "le", "eq", "ne"), _binary),
    **dict.fromkeys(("contiguous", "alias", "_assert_tensor_metadata", "identity"), _same), "clone": _copied, "lift_fresh_copy": _copied,
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce"), _gathered),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("expand", "expand_as"), _expand), **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrence),
    **dict.fromkeys(("dropout", "feature_dropout"), _dropout), **dict.fromkeys(("to", "_to_copy"), _cast),
    "detach": lambda r, node, name: _tag(r, node, name), "scaled_dot_product_attention": attention, "embedding": embedding,
    "max": _extremum, "min": _extremum, "cat": _concat, "stack": _concat, "slice": _slice,
}  # fmt: skip
OF_ONE: dict[str, Callable[[Reader, Any, str, Value], Any]] = {
    **{f"conv{t}{d}d": convolution for t in ("", "_transpose") for d in (1, 2, 3)},
    **{f"{k}_pool{d}d": pooling for k in ("max", "avg", "adaptive_avg") for d in (1, 2, 3)},
    **dict.fromkeys(("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"), normalisation),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax), **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("unsqueeze", "squeeze"), _unsqueeze), "select": _select,
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "unbind"), _split),
    **dict.fromkeys(("mean", "sum", "std", "var", "prod", "logsumexp", "any", "all", "argmax", "argmin", "amax", "amin"), _reduce),
    **dict.fromkeys(("pad", "constant_pad_nd", "upsample_nearest2d", "upsample_bilinear2d", "repeat"), _resized),
}  # fmt: skip
"""Rules of operations on one tensor of the network."""
