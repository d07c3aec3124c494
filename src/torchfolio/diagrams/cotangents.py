"""The rule of every operation for the backward pass: which cotangents it pushes to what it takes."""

from __future__ import annotations

import re
from collections.abc import Callable

from torchfolio.diagrams.chain import Chain
from torchfolio.diagrams.graph import Draft, Value
from torchfolio.errors import TorchfolioError

__all__ = ["RULES", "by_torch"]

Rule = Callable[[Chain, Draft, list[Value]], bool | None]
"""Pushes cotangents of what an operation takes; False where it does not know how."""


def by_torch(c: Chain, step: Draft, found: list[Value | None]) -> None:
    """The derivative as PyTorch has it for that one operation, as a box."""
    if not step.code:
        raise TorchfolioError(f"there is no rule for the backward pass of {step.kind!r}")
    inputs = [v for v in step.inputs if not v.root.whole]
    weights = [w for w in step.weights if c.trains(w)]
    free = {f"{{{i}}}": f"v{i}" for i, v in enumerate(step.inputs) if not v.root.whole}
    free |= {f"{{w{j}}}": f"u{j}" for j, w in enumerate(step.weights) if any(w is x for x in weights)}
    inner = re.sub(r"\{w?\d+\}", lambda m: free.get(m[0], m[0]), step.pure or step.code)
    given = [(i, g) for i, g in enumerate(found) if g is not None]
    if len(step.outputs) > 1:
        places = ", ".join(f"{inner}[{i}]" for i, _ in given)
        inner = f"({places})" if len(given) > 1 else places
    first = len(step.inputs)
    marks = ", ".join(f"{{{first + k}}}" for k in range(len(given)))
    call = f"(({marks}))" if len(given) > 1 else f"({marks})"
    code = f"torch.func.vjp(lambda {', '.join(free.values())}: {inner}, {', '.join(free)})[1]{call}"
    outputs = [Value(list(x.axes)) for x in (*inputs, *weights)]
    if len(outputs) == 1:
        code += "[0]"
    taken = [c.saved(v) for v in step.inputs] + [c.once(g) for _, g in given]
    core = set(step.core) | {a for w in weights for a in w.axes}
    params = {"text": f"{step.params.get('function') or step.kind}′"}
    c.graph.add(f"{step.kind}′", taken, outputs, core, weights=step.weights, code=code, sizes=step.sizes,
                learned=bool(weights), **params)  # fmt: skip
    for value, made in zip((*inputs, *weights), outputs, strict=True):
        c.push(value, made)


def _einsum(c: Chain, step: Draft, found: list[Value]) -> None:
    for i, value in enumerate(step.inputs):
        if not value.root.whole:
            others = [c.saved(v) for j, v in enumerate(step.inputs) if j != i]
            c.push(value, c.contract([found[0], *others], value.axes))


def _linear(c: Chain, step: Draft, found: list[Value]) -> bool | None:
    if len(step.inputs) > 1 or len(step.weights) > 1 + bool(step.params.get("bias")):
        return False
    (source,), (made,), (weight, *bias) = step.inputs, found, step.weights
    if len(set(c.find(weight.axes))) < len(weight.axes):
        # A map of an axis to itself, as where a residual connection says that they are one: here they are two.
        if not step.code.startswith("F.linear"):
            return False
        new = c.graph.twin(weight.axes[0])
        made = Value([*made.axes[:-1], new], made)
        weight, bias = Value([new, weight.axes[1]], weight), [Value([new], b) for b in bias]
    core = step.core
    if not source.root.whole:
        back = c.add("linear", [made], source.axes, core, weights=[Value(list(weight.axes), weight)], learned=True,
                     name=f"{step.params.get('name', '')}T")  # fmt: skip
        c.push(source, back)
    if c.trains(weight):
        c.push(weight, c.contract([made, c.saved(source)], weight.axes))
    if bias and c.trains(bias[0]):
        c.push(bias[0], c.contract([made], bias[0].axes))


def _elementwise(c: Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), (made,) = step.inputs, found
    what, same = step.params.get("what"), c.find(source.axes) == c.find(made.axes)
    if len(step.weights) == 1 and what == "add":
        weight = step.weights[0]
        c.push(source, c.contract([made], source.axes))
        if c.trains(weight):
            c.push(weight, c.contract([made], weight.axes))
        return None
    if step.weights or not same:
        return False
    if what == "add":  # of a number
        c.push(source, made)
    elif step.params.get("linear"):
        more = {"sign": step.params.get("sign", ""), "code": step.code, "sizes": step.sizes, "linear": True}
        c.push(source, c.add("elementwise", [made], source.axes, **more))
    else:
        inner = step.code.replace("{0}", "v")
        name = f"{step.params.get('function') or step.params.get('sign') or 'f'}′"
        code = f"torch.func.vjp(lambda v: {inner}, {{0}})[1]({{1}})[0]"  # diagonal: the slope times the cotangent
        c.push(
            source,
            c.add("binary", [c.saved(source), made], source.axes, what=name, other=True, code=code, sizes=step.sizes),
        )
    return None


def _binary(c: Chain, step: Draft, found: list[Value]) -> bool | None:
    what = step.params.get("what")
    if step.params.get("other") or what not in ("add", "sub", "mul"):
        return False
    (left, right), (made,) = step.inputs, found
    for one, other, second in ((left, right, False), (right, left, True)):
        if one.root.whole:
            continue
        if what == "mul":
            if c.find(one.axes) == c.find(other.axes) == c.find(made.axes):
                back = c.add("binary", [made, c.saved(other)], one.axes, what="mul")
            else:
                back = c.contract([made, c.saved(other)], one.axes)
        else:
            back = c.contract([made], one.axes)
            if what == "sub" and second:
                back = c.add("elementwise", [back], one.axes, sign="neg", code="-{0}", linear=True)
        c.push(one, back)
    return None


def _softmax(c: Chain, step: Draft, found: list[Value]) -> bool | None:
    if step.params.get("other"):
        return False
    (source,), (made,), (result,) = step.inputs, found, step.outputs
    core = c.find(list(step.core))
    # A diagonal, less a product of rank one: p (g - sum p g).
    rest = [a for a in result.axes if c.graph.find(a) not in core]
    mean = c.add("einsum", [made, c.saved(result)], rest, core)
    centred = c.add("binary", [made, mean], result.axes, what="sub")
    c.push(source, c.add("binary", [centred, c.saved(result)], source.axes, what="mul"))
    return None


def _transpose(c: Chain, step: Draft, found: list[Value]) -> None:
    (source,), (made,) = step.inputs, found
    c.push(source, c.add("transpose", [made], source.axes))


def _reshape(c: Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), (made,) = step.inputs, found
    if step.code:
        return False
    if step.params.get("expand"):
        c.push(source, c.contract([made], source.axes))
    else:
        c.push(source, c.add(step.kind, [made], source.axes, step.core))
    return None


def _concat(c: Chain, step: Draft, found: list[Value]) -> bool | None:
    dim = step.params.get("dim")
    if dim is None or step.weights or any(v.root.whole for v in step.inputs):
        return False
    sizes = [v.axes[dim] for v in step.inputs]
    code = f"torch.split({{0}}, [{', '.join(f'{{s{i}}}' for i in range(len(sizes)))}], {dim})"
    parts = [Value(list(v.axes)) for v in step.inputs]
    c.graph.add("split", [c.once(found[0])], parts, step.core, code=code, sizes=sizes, dim=dim)
    for value, part in zip(step.inputs, parts, strict=True):
        c.push(value, part)
    return None


def _split(c: Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), dim = step.inputs, step.params.get("dim")
    if dim is None:
        return False
    whole = len(found[0].axes) == len(source.axes)
    marks = ", ".join(f"{{{i}}}" for i in range(len(found)))
    code = f"torch.{'cat' if whole else 'stack'}([{marks}], {dim})"
    parts = [Value(list(found[0].axes) if i == 0 else _like(g, found[0], dim, whole), g) for i, g in enumerate(found)]
    c.push(source, c.graph.add("concat", parts, [Value(list(source.axes))], step.core, code=code, dim=dim))
    return None


def _like(value: Value, first: Value, dim: int, whole: bool) -> list[int]:
    """Axes of a part as the first has them, but for the one that is joined."""
    return [a if whole and i == dim else b for i, (a, b) in enumerate(zip(value.axes, first.axes, strict=True))]


def _conv(c: Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), (made,), geometry = step.inputs, found, step.params.get("geometry", {})
    sides = [v for k in ("stride", "padding", "dilation") for v in geometry.get(k, ["?"])]
    if not all(isinstance(s, int) for s in sides) or any(geometry.get("output_padding", [])):
        return False
    weight, *bias = step.weights
    dims, transposed = len(geometry["stride"]), step.params["transposed"]
    if len(source.axes) < dims + 2:  # one example without a batch
        return False
    how = f"{geometry['stride']}, {geometry['padding']}, {geometry['dilation']}, {geometry['groups']}"
    shared = {k: step.params[k] for k in ("window", "groups", "kernel_text", "note", "spatial") if k in step.params}
    if not source.root.whole:
        if transposed:
            code, sizes = f"F.conv{dims}d({{0}}, {{w0}}, None, {how})", []
        else:
            marks = ", ".join(f"{{s{i}}}" for i in range(len(source.axes)))
            code, sizes = f"torch.nn.grad.conv{dims}d_input([{marks}], {{w0}}, {{0}}, {how})", list(source.axes)
        more = shared | ({"stride_text": step.params["stride_text"]} if "stride_text" in step.params else {})
        back = c.add("conv", [made], source.axes, step.core, weights=[weight], code=code, sizes=sizes, learned=True,
                     transposed=not transposed, bias=False, name="T", **more)  # fmt: skip
        c.push(source, back)
    if c.trains(weight):
        pair = [made, c.saved(source)] if transposed else [c.saved(source), made]
        code = f"torch.nn.grad.conv{dims}d_weight({{0}}, {{w0}}.shape, {{1}}, {how})"
        core = [*step.core, *made.axes, *source.axes, *weight.axes]
        c.push(weight, c.add("conv weight", pair, weight.axes, core, weights=[weight], code=code, text="★ᵀ", **shared))
    if bias and c.trains(bias[0]):
        c.push(bias[0], c.contract([made], [made.axes[1]]))
    return None


def _reduce(c: Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), (made,), what = step.inputs, found, step.params.get("what")
    if what not in ("sum", "mean") or step.params.get("other"):
        return False
    if what == "mean":
        code = " / ".join(["{0}", *(f"{{s{i}}}" for i in range(len(step.core)))])
        made = c.add("elementwise", [made], made.axes, sign="∗1∕n", code=code, sizes=step.core, linear=True)
    c.push(source, c.contract([made], source.axes))
    return None


RULES: dict[str, Rule] = {
    "einsum": _einsum, "linear": _linear, "elementwise": _elementwise, "binary": _binary, "softmax": _softmax,
    "transpose": _transpose, "view": _reshape, "reshape": _reshape, "concat": _concat, "split": _split, "conv": _conv,
    "reduce": _reduce,
}  # fmt: skip
