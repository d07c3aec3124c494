"""Layers with a sign of their own: convolutions, pools, norms, embeddings, recurrent layers."""

from __future__ import annotations

import math
from typing import Any

from torchfolio.diagrams.graph import Value, hint
from torchfolio.diagrams.inferred import boxed, counted
from torchfolio.diagrams.reader import Reader
from torchfolio.diagrams.writing import argument, call, lengths, trained

__all__ = ["convolution", "embedding", "normalisation", "pooling", "recurrence", "window_text"]


def convolution(r: Reader, node: Any, name: str, source: Value) -> Value | None:
    """A learned window that runs along the axes after the channels."""
    if not isinstance(r.fixed.get(node.args[1]), Value):
        return boxed(r, node, name)
    weight = node.args[1].meta["val"].shape
    transposed, dims = "transpose" in name, len(weight) - 2
    # x, weight, bias, stride, padding, then dilation, groups; of a transposed one output padding, groups, dilation.
    plain = {"stride": argument(node, 3, "stride", 1), "padding": argument(node, 4, "padding", 0),
             "dilation": argument(node, 7 if transposed else 5, "dilation", 1), "groups": argument(node, 6, "groups", 1)}  # fmt: skip
    if transposed:
        plain["output_padding"] = argument(node, 5, "output_padding", 0)
    for axis, word in zip(r.fixed[node.args[1]].axes, "cnklj" if transposed else "ncklj", strict=False):
        r.name[axis] = r.name[axis] or word
    geometry = {k: v if k == "groups" else _sides(v, dims) for k, v in plain.items()}
    text = window_text(list(weight[2:]), geometry, transposed)
    channel = r.weight_axis("n", node, -dims - 1)
    # Without a stride the change of length is the same for every length: an axis that keeps its length here always does.
    space = [
        a if r.size[a] == hint(s) and "stride_text" not in text else r.axis(r.name[a], s)
        for a, s in zip(source.axes[-dims:], lengths(node)[-dims:], strict=True)
    ]
    *batch, inner = source.axes[:-dims]
    core = [inner, channel, *source.axes[-dims:], *space]
    return r.add("conv", [source], [Value([*batch, channel, *space])], core, bias=argument(node, 2, "bias") is not None,
                 learned=True, spatial=[*source.axes[-dims:], *space], **text, **call(r, node))  # fmt: skip


def window_text(kernel: list[int], geometry: dict[str, Any], transposed: bool) -> dict[str, Any]:
    """What the pictogram of a convolution and its cost are told.

    Args:
        kernel: sides of the window.
        geometry: `stride`, `padding`, `dilation`, each a number for every side, and `groups`.
        transposed: whether it is the transpose of a convolution.
    """
    sides, stride, dilation = (_text(v) for v in (kernel, geometry["stride"], geometry["dilation"]))
    groups, strided = geometry["groups"], stride != "1" or transposed
    notes = [f"groups {groups}"] * (groups > 1) + [f"dilation {dilation}"] * (dilation != "1")
    square = strided and len(kernel) == 2 and "×" not in sides
    return {"window": math.prod(map(hint, kernel)), "groups": groups, "geometry": geometry, "note": ", ".join(notes),
            "transposed": transposed, "kernel_text": f"{sides}²" if square else sides,
            **({"stride_text": stride} if strided else {})}  # fmt: skip


def _sides(given: Any, dims: int) -> Any:
    """A number for every side."""
    return [*given] * (dims // len(given)) if isinstance(given, list | tuple) else [given] * dims


def _text(sides: Any) -> str:
    sides = [hint(s) for s in sides]
    return str(sides[0]) if len(set(sides)) == 1 else "×".join(map(str, sides))


def pooling(r: Reader, node: Any, name: str, source: Value) -> Value:
    """The largest entry of a window, or its mean; of a whole axis a reduction."""
    out, dims = lengths(node), int(name[-2])
    what = "Max" if "max" in name else "𝔼"
    kept, ending = source.axes[:-dims], source.axes[-dims:]
    if "adaptive" in name and all(s == 1 for s in out[-dims:]):
        ones = [r.axis("", 1) for _ in range(dims)]
        what = "max" if what == "Max" else "mean"
        return r.add("reduce", [source], [Value([*kept, *ones])], ending, what=what, **call(r, node))
    space = [r.axis(r.name[a], s) for a, s in zip(ending, out[-dims:], strict=True)]
    if "adaptive" in name:
        sides = strides = [-(-r.size[a] // r.size[b]) for a, b in zip(ending, space, strict=True)]
    else:
        sides, strides = (_sides(g, dims) for g in (node.args[1], argument(node, 2, "stride") or node.args[1]))
    text = _text(sides)
    return r.add("pool", [source], [Value([*kept, *space])], [*ending, *space], what=what, stride_text=_text(strides),
                 kernel_text=text + ("²" if dims == 2 and "×" not in text else ""), window=math.prod(map(hint, sides)),
                 **call(r, node))  # fmt: skip


def normalisation(r: Reader, node: Any, name: str, source: Value) -> Value:
    """A norm along the axes that it is about; batch norm that is not trained is a function of numbers."""
    axes, args = source.axes, list(node.args)
    made, core = [Value(list(axes))], axes[2:]  # each channel of each example by itself
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
    elif name == "group_norm" and args[1] != r.size[axes[1]]:
        core = axes[1:]  # groups of channels are normalised with all their places
    writing = call(r, node) if name == "instance_norm" else call(r, node, f"F.{name}", args[:5])
    note = f"groups {args[1]}" if name == "group_norm" and core == axes[1:] and args[1] > 1 else ""
    return r.add("norm", [source], made, core, learned=trained(r, writing["weights"]), note=note, **writing)


def embedding(r: Reader, node: Any, name: str) -> Value | None:
    """A learned vector for each index."""
    source = r.value(node.args[1])
    if source is None or not isinstance(r.fixed.get(node.args[0]), Value):
        return boxed(r, node, name)
    new = r.weight_axis("m", node, -1)
    padding = argument(node, 2, "padding_idx", -1)
    more = {} if padding in (None, -1) else {"padding_idx": padding}
    writing = call(r, node, "F.embedding", [node.args[1], node.args[0]], **more)
    return r.add("embedding", [source], [Value([*source.axes, new])], [new], learned=True, **writing)


def recurrence(r: Reader, node: Any, name: str) -> Any:
    """A layer that runs along time: its sequence, and the states after the last step."""
    taken = [a for a in (node.args[0], *(node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:2])) if r.values.get(a)]  # fmt: skip
    if taken[0] is not node.args[0] or len(node.args) != 9:  # packed sequences
        return boxed(r, node, name)
    sources = [v for v in map(r.value, taken) if v is not None]
    source, (sequence, *states) = sources[0], node.meta["val"]
    batch, time = source.axes[:2] if node.args[8] else source.axes[1::-1]
    new = r.axis("n", sequence.shape[-1])
    r.stated.add(new)
    for other in sources[1:]:
        r.unite(other.axes[1], batch)
    outputs = [Value([*source.axes[:2], new])]
    for state in states:
        last = r.twin(batch)
        r.branches.append((last, batch))
        hidden = r.twin(new) if hint(state.shape[2]) == r.size[new] else r.axis("n", state.shape[2])
        outputs.append(Value([r.axis("l", state.shape[0]), last, hidden]))
        r.stated |= set(outputs[-1].axes[::2])
    core = [time, *(s.axes[-1] for s in sources), *(a for o in outputs for a in o.axes if a not in (batch, time))]
    core = [a for a in core if a not in {b for b, _ in r.branches}]
    r.add(name, sources, outputs, core, learned=True, counted=counted(node), **call(r, node))
    return outputs
