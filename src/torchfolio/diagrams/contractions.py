"""Products of tensors as letters say them: einsum, linear maps, attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from torchfolio.diagrams.graph import Value
from torchfolio.diagrams.inferred import boxed
from torchfolio.diagrams.reader import Reader
from torchfolio.diagrams.writing import argument, call, trained

__all__ = ["attention", "broadcast", "contraction"]

LETTERS = "zyxwvutsrqp"
"""Those of axes that a product runs along, from the last one on."""


def contraction(r: Reader, node: Any, name: str) -> Value | None:
    """A product of tensors of the network, summed over the axes that do not come out; with a weight a linear map."""
    operands, bias = list(node.args[:2]), None
    ranks = [a.meta["val"].dim() for a in (node.args[1] if name == "einsum" else operands)]
    target, args = "", None
    if name == "einsum":
        operands, target, args = node.args[1], "torch.einsum", [node.args[0], *node.args[1]]
        terms = _terms(node.args[0], ranks)
    elif name == "linear":
        terms, bias = [_dots(ranks[0], 1) + "j", "ij" if ranks[1] == 2 else "j", _dots(ranks[0], 1) + "i"[: ranks[1] - 1]], argument(node, 2, "bias")  # fmt: skip
    elif name == "bilinear":
        dots = _dots(ranks[0], 1)
        operands, bias, terms = [*operands, node.args[2]], argument(node, 3, "bias"), [dots + "i", dots + "j", "kij", dots + "k"]  # fmt: skip
    elif name == "tensordot":
        terms = _summed(ranks, node.args[2], node.args[3])
    elif name == "inner" and min(ranks):
        terms = _summed(ranks, [ranks[0] - 1], [ranks[1] - 1])
    elif min(ranks):
        left, right = _dots(ranks[0], 2) + "ij"[-ranks[0] :], _dots(ranks[1], 2) + "jk"[: ranks[1]]
        most = max((left, right), key=len)[: max(0, max(ranks) - 2)]
        terms = [left, right, most + "i"[: ranks[0] - 1] + "k"[: ranks[1] - 1]]
    else:
        terms = None
    known = all(isinstance(r.values.get(a) or r.fixed.get(a), Value) for a in operands)
    if terms is None or not known or (bias is not None and not isinstance(r.fixed.get(bias), Value)):
        return boxed(r, node, name)
    return _contracted(r, node, terms, operands, bias, call(r, node, target, args))


def _dots(rank: int, own: int) -> str:
    """Letters of the axes that a product runs along, aligned at the last."""
    return LETTERS[: max(0, rank - own)][::-1]


def _summed(ranks: Sequence[int], one: Sequence[int], other: Sequence[int]) -> list[str]:
    """Letters of a product that is summed over pairs of axes."""
    left, right = list("abcdefgh"[: ranks[0]]), list("ijklmnop"[: ranks[1]])
    for i, j in zip(one, other, strict=True):
        right[j] = left[i]
    both = set(left) & set(right)
    return ["".join(left), "".join(right), "".join(c for c in (*left, *right) if c not in both)]


def _contracted(
    r: Reader, node: Any, terms: list[str], operands: Sequence[Any], bias: Any, writing: dict[str, Any]
) -> Value | None:
    *left, result = terms
    values = [r.value(a) for a in operands]
    letters: dict[str, int] = {}
    for term, value in zip(left, values, strict=True):
        for letter, axis in zip(term, value.axes if value is not None else (), strict=False):
            old = letters.setdefault(letter, axis)
            if r.size[old] == r.size[axis]:
                r.merge(old, axis)
            elif r.size[old] == 1:  # one of them is of length one
                letters[letter] = axis
    inside = set(letters)
    weights = iter(writing["weights"])
    for term, operand, value in zip(left, operands, values, strict=True):
        if value is not None:
            continue
        own = r.fixed[operand].axes
        for letter, axis in zip(term, own, strict=True):
            if letter not in letters or (r.size[letters[letter]] == 1 and r.size[axis] != 1):
                letters[letter] = r.axis("n", r.size[axis])
                r.stated.add(letters[letter])
        next(weights).axes = [
            letters[c] if r.size[letters[c]] == r.size[a] else a for c, a in zip(term, own, strict=True)
        ]
    if bias is not None:
        next(weights).axes = [letters[c] for c in result[len(result) - len(r.fixed[bias].axes) :]]
    sources = [v for v in values if v is not None]
    made = [Value([letters[c] for c in result])]
    core = [a for c, a in letters.items() if c not in result or c not in inside]
    if not writing["weights"]:
        return r.add("einsum", sources, made, core, **writing)
    core = core or [a for w in writing["weights"] for a in w.axes]
    return r.add("linear", sources, made, core, bias=bias is not None, name=_superscript(r) if bias is not None or
                 node.target is torch.ops.aten.linear.default else "", learned=trained(r, writing["weights"]), **writing)  # fmt: skip


def _superscript(r: Reader) -> str:
    """Q, K, V or O, where a linear layer is called so."""
    leaf = r._stack[-1][0].rsplit(".", 1)[-1] if r._stack else ""
    known = leaf and leaf[0] in "qkvo" and (len(leaf) == 1 or leaf[1:] in ("_proj", "uery", "ey", "alue", "ut"))
    return leaf[0].upper() if known else ""


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


def broadcast(r: Reader, a: Sequence[int], b: Sequence[int], unite: bool = True) -> list[int]:
    """Axes of two tensors set against each other from the last one on; equal ones are one."""
    width = max(len(a), len(b))
    axes: list[int] = []
    for i in range(-width, 0):
        one, other = a[i] if -i <= len(a) else None, b[i] if -i <= len(b) else None
        if one is None or other is None:
            axes.append(one if one is not None else other)  # type: ignore[arg-type]
        elif r.size[one] == r.size[other] and r.size[one] != 1:
            axes.append(r.merge(one, other) if unite else one)
        else:
            axes.append(one if r.size[one] != 1 else other)
    return axes


def attention(r: Reader, node: Any, name: str) -> Value | None:
    """Scaled dot-product attention, as the operations that it is made of."""
    mask, rate = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    causal, scale = argument(node, 5, "is_causal", False), node.kwargs.get("scale")
    inside = [isinstance(r.values.get(a), Value) for a in node.args[:3]]
    if not all(inside) or node.kwargs.get("enable_gqa"):
        return boxed(r, node, name)
    q, k, v = (r.value(a) for a in node.args[:3])
    given = r.value(mask)  # a mask that the network makes of its inputs
    assert q is not None
    assert k is not None
    assert v is not None
    outer = r._stack
    r._stack = (*outer, (f"{outer[-1][0] if outer else ''}.sdpa{len(r.steps)}", "Scaled Dot-Product Attention"))
    batch = broadcast(r, q.axes[:-2], k.axes[:-2])
    shared = r.merge(q.axes[-1], k.axes[-1])
    score = r.add("einsum", [q, k], [Value([*batch, q.axes[-2], k.axes[-2]])], [shared],
                  code="torch.matmul({0}, {1}.transpose(-2, -1))")  # fmt: skip
    code, sizes = ("{0} * {s0} ** -0.5", [shared]) if scale is None else (f"{{0}} * {scale!r}", [])
    sign = "∗k^−½" if scale is None else f"∗{scale:.3g}"
    score = r.add("elementwise", [score], [Value(list(score.axes))], sign=sign, code=code, sizes=sizes, linear=True)
    if given is not None:
        boolean = mask.meta["val"].dtype == torch.bool
        what: dict[str, Any] = {"what": "mask", "other": True} if boolean else {"what": "add"}
        code = "{0}.masked_fill(~{1}, float('-inf'))" if boolean else "{0} + {1}"
        score = r.add("binary", [score, given], [Value(broadcast(r, score.axes, given.axes))], code=code, **what)
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
    key = r.merge(k.axes[-2], v.axes[-2])
    made = Value([*broadcast(r, batch, v.axes[:-2]), q.axes[-2], v.axes[-1]])
    made = r.add("einsum", [score, v], [made], [key], code="torch.matmul({0}, {1})")
    r._stack = outer
    return made
