"""Diagrams whose answer is known: axes of attention and norms, the cost of a derivative, what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from torchfolio.diagrams import draw, ncd, op
from torchfolio.diagrams.algebra import SignatureError
from torchfolio.errors import TorchfolioError
from torchfolio.experiments._circuit_gallery import Branching, SelfAttention


def derivative_of_a_map() -> dict[str, int]:
    """Terms by which the cost of the derivative of a map of numbers differs from that of the map itself."""
    drawing = draw(nn.Tanh(), torch.rand(2, 5, 16))
    there, back = (sum(d.cost().operations, sympy.Integer(0)) for d in (drawing, drawing.backward()))
    difference = sympy.expand(there - back)
    return {"cross_terms": 0 if difference == 0 else len(sympy.Add.make_args(difference))}


def axes_apart() -> dict[str, int]:
    """Names of the axes of the scores of self-attention; whether norms take the batch axis in."""
    drawing = draw(SelfAttention(), torch.rand(2, 5, 16), names=["b x m"])
    steps = [s for column in drawing.sheet.columns for s in column]
    softmax = next(s for s in steps if s.kind == "softmax")
    batch = softmax.in_wires[0].axis
    names = {"".join(p.text for p in w.label) for w in softmax.in_wires if w.axis != batch}

    def takes_batch(norm: nn.Module, x: Tensor) -> int:
        sheet = draw(norm, x).sheet
        step = next(s for column in sheet.columns for s in column if s.kind == "norm")
        return int(sheet.levels[0][0].wires[0].axis in step.core)

    return {
        "attention_names": len(names),
        "batch_norm_takes_batch": takes_batch(nn.Sequential(nn.BatchNorm1d(6)).train(), torch.rand(4, 6)),
        "layer_norm_takes_batch": takes_batch(nn.Sequential(nn.LayerNorm(6)), torch.rand(4, 6)),
    }


def wrong_diagrams() -> dict[str, int]:
    """Swapped letters, control flow that depends on values, operations that do not fit: told, or not."""
    right, swapped = ncd("y k h, x k h -> y x h"), ncd("y k h, x k h -> x y h")
    sizes = {"y": 5, "x": 5, "k": 8, "h": 4}
    found = {
        "swap_unequal": int(not right.equals(swapped)),
        "swap_drawn_otherwise": int(right.drawing(**sizes).svg() != swapped.drawing(**sizes).svg()),
    }
    refusals: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
        "branching_refused": (TorchfolioError, lambda: draw(Branching(), torch.rand(3))),
        "mismatch_refused": (SignatureError, lambda: ncd("a b -> a b") @ op.softmax("x")),
    }
    unwoven = draw(SelfAttention(), torch.rand(2, 5, 16))
    for step in unwoven.graph.steps:
        step.weave = set()
    refusals["weave_needed"] = (TorchfolioError, unwoven.to_module)
    for name, (kind, call) in refusals.items():
        try:
            call()
            found[name] = 0
        except kind:
            found[name] = 1
    return found
