"""What is checked of a drawing: what it shows, the module made of it, and its derivative."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.diagrams import Drawing, check_svg
from torchfolio.diagrams.graph import Graph
from torchfolio.measure import timed

DERIVATIVES = ("linear", "elementwise", "softmax", "einsum", "conv", "add", "copy", "concat")


def as_drawn(make: Callable[[], Drawing]) -> tuple[Drawing, dict[str, Any]]:
    """A drawing, the seconds it takes, what is wrong with it, and whether it comes out the same to the byte again."""

    def drawn() -> tuple[Drawing, str]:
        drawing = make()
        return drawing, drawing.svg()

    (drawing, document), seconds = timed(drawn)
    found = check_svg(document)
    return drawing, {
        "wrong_columns": sum(not c.agrees for c in found.columns), "overlaps": len(found.overlaps),
        "clear": 1 - len(found.through) / max(1, found.wires), "other_bytes": int(document != drawn()[1]),
        "columns": len(drawing.sheet.columns), "seconds": seconds,
    }  # fmt: skip


def there_and_back(
    net: nn.Module, drawing: Drawing, inputs: Sequence[Sequence[tuple[Tensor, ...]]]
) -> dict[str, float]:
    """Largest differences of a module and what its drawing gives: of the first sizes, of others, and of the source."""
    back, space = drawing.to_module(), dict[str, Any]()
    exec(drawing.to_source("f"), space)
    weights = {"weights": net.state_dict()} if "weights[" in back.source else {}
    same = other = source = 0.0
    with torch.no_grad():
        for row in inputs:
            for k, given in enumerate(row):
                wanted = net(*given)
                difference = float((back(*given) - wanted).abs().max())
                same, other = (max(same, difference), other) if k == 0 else (same, max(other, difference))
                source = max(source, float((space["f"](*given, **weights) - wanted).abs().max()))
    return {"round_trip": same, "other_sizes": other, "source": source}


def backward(net: nn.Module, drawing: Drawing, inputs: Sequence[Sequence[tuple[Tensor, ...]]]) -> dict[str, Any]:
    """Largest difference of the backward drawing's gradients and autograd's; operations with a rule of their own."""
    pass_back, largest = drawing.backward(), 0.0
    for given in (given for row in inputs for given in row):
        leaves = [x.clone().requires_grad_() for x in given]
        output = net(*leaves)
        cotangent = torch.randn_like(output)
        weights = dict(net.named_parameters())
        wanted = torch.autograd.grad(output, [*leaves, *weights.values()], cotangent)
        found, own = pass_back.gradients(given, [cotangent])
        pairs = zip([*found, *(own[k] for k in weights)], wanted, strict=True)
        largest = max(largest, *(float((a - b).abs().max()) for a, b in pairs if a is not None))
    return {"backward": largest, **_ruled(drawing.graph, {s.kind for s in pass_back.graph.steps})}


def _ruled(graph: Graph, kinds: set[str]) -> dict[str, bool]:
    """Which operations a graph has whose backward pass is not a plain box."""
    steps = graph.alive()
    uses = Counter(id(v.root) for v in [*(v for s in steps for v in s.inputs), *graph.outputs])
    has = {s.kind for s in steps if f"{s.kind}′" not in kinds}
    has |= (
        {"add"}
        if any(s.kind == "binary" and s.params.get("what") == "add" for s in steps) and "binary" in has
        else set()
    )
    has |= {"copy"} if max(uses.values(), default=0) > 1 else set()
    return {f"rule: {kind}": kind in has for kind in DERIVATIVES}
