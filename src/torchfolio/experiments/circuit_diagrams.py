"""Circuit diagrams of a gallery: do drawings count right, cost right, keep axes apart, turn back and differentiate?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from torchfolio.diagrams import Expression, draw, ncd, op
from torchfolio.diagrams.algebra import SignatureError
from torchfolio.errors import TorchfolioError
from torchfolio.experiments._circuit_gallery import EXPRESSIONS, MODULES, SIZES, Branching, SelfAttention
from torchfolio.experiments._drawing_checks import DERIVATIVES, as_drawn, backward, there_and_back
from torchfolio.experiments._live_bytes import working_memory
from torchfolio.measure import count_flops
from torchfolio.runs import Results, Run, plots, setting


@dataclass(frozen=True)
class Settings:
    """What is drawn."""

    modules: tuple[str, ...] = setting((), "names in `MODULES`; all by default")
    repeats: int = setting(3, "random inputs of every round trip")


SCALES = {
    "smoke": Settings(modules=("mlp", "cross attention", "residual block"), repeats=1),
    "quick": Settings(),
    "full": Settings(repeats=10),
}


def run(run: Run[Settings]) -> None:
    """Draw the gallery, count, price, run back and differentiate."""
    settings = run.settings
    chosen = settings.modules or tuple(MODULES)
    drawn = [run.arm(name, lambda name=name: module(run, name)) for name in chosen]
    composed = [run.arm(f"{name}, composed", lambda name=name: expression(run, name)) for name in EXPRESSIONS]
    memory = run.arm("memory", working_memory)
    apart = run.arm("axes", axes_apart)
    diagonal = run.arm("diagonal", derivative_of_a_map)
    wrong = run.arm("wrong", wrong_diagrams)
    every = [*drawn, *composed]

    def all_of(key: str) -> list[float]:
        return [arm[key] for arm in every]

    run.values(
        "round_trip",
        largest_difference=max(all_of("round_trip")),
        other_sizes=max(all_of("other_sizes")),
        source=max(all_of("source")),
    )
    run.values(
        "counting",
        wrong_columns=sum(all_of("wrong_columns")),
        overlaps=sum(all_of("overlaps")),
        least_clear=min(all_of("clear")),
        other_bytes=sum(all_of("other_bytes")),
    )
    difference = max(abs(arm["flops"] - arm["counted"]) for arm in drawn)
    attention = run.arms.get("cross attention", {"flops": math.nan})["flops"]
    run.values("cost", memory, largest_difference=difference, cross_attention=attention)
    run.values("axis_identity", apart)
    ruled = [kind for kind in DERIVATIVES if any(all_of(f"rule: {kind}"))]
    largest = max(all_of("backward"))
    run.values("backward", diagonal, largest_difference=largest, operations=len(ruled), wanted=len(DERIVATIVES))
    run.values("negative_control", wrong)


def module(run: Run[Settings], name: str) -> dict[str, Any]:
    """A module of the gallery: counted, priced against torch's counter, run back, differentiated."""
    piece = MODULES[name]
    net, args = piece.make(), piece.tensors()
    started = time.perf_counter()
    drawing = draw(net, args, level="full", names=piece.inputs)
    drawing.svg()
    seconds = time.perf_counter() - started
    found = as_drawn(drawing, draw(net, args, level="full", names=piece.inputs))
    counted = count_flops(net, *args)
    varying = draw(net, args, names=piece.inputs, dynamic=list(piece.other))
    inputs = [[piece.tensors(**sizes) for sizes in piece.varied()] for _ in range(run.settings.repeats)]
    found |= there_and_back(net, varying, inputs)
    exact = net.double()
    doubled = [[tuple(t.double() for t in given) for given in row] for row in inputs]
    found |= backward(exact, draw(exact, doubled[0][0], names=piece.inputs, dynamic=list(piece.other)), doubled)
    return {**found, "flops": drawing.cost().total(), "counted": counted, "seconds": seconds}


def expression(run: Run[Settings], name: str) -> dict[str, Any]:
    """An expression: written out, differentiated by its own rules, drawn."""
    net = EXPRESSIONS[name]().double()
    inputs = []
    for k in range(run.settings.repeats):
        sizes = [SIZES, {**SIZES, "y": 6 + k, "x": 8 + 2 * k, "b": 3 + k, "p": 10 + 2 * k, "q": 12 + 2 * k}]
        inputs.append(
            [tuple(torch.randn([s[a] for a in axes], dtype=torch.float64) for axes in net.inputs) for s in sizes]
        )
    drawing = net.drawing(**_sizes(net))
    found = as_drawn(drawing, net.drawing(**_sizes(net)))
    return found | there_and_back(net, drawing, inputs) | backward(net, drawing, inputs)


def _sizes(net: Expression) -> dict[str, int]:
    return {a: SIZES[a] for axes in net.inputs for a in axes}


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


def figures(results: Results) -> plots.Figures:
    """Time to a drawing, and columns of the gallery."""
    names = results.settings.modules or tuple(MODULES)
    return {
        "time": plots.bars(
            results, {name: (name, "seconds") for name in names}, ylabel="seconds to trace, lay out and draw"
        ),
        "columns": plots.bars(results, {name: (name, "columns") for name in names}, ylabel="columns"),
    }
