"""Circuit diagrams of a gallery: do drawings count right, cost right, keep axes apart, turn back and differentiate?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from torchfolio.diagrams import draw
from torchfolio.experiments._circuit_gallery import EXPRESSIONS, MODULES, SIZES
from torchfolio.experiments._drawing_checks import DERIVATIVES, as_drawn, backward, there_and_back
from torchfolio.experiments._known_diagrams import axes_apart, derivative_of_a_map, wrong_diagrams
from torchfolio.experiments._live_bytes import working_memory
from torchfolio.measure import count_flops
from torchfolio.runs import Results, Run, column, plots, setting


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
    drawn = [run.arm(name, module, run, name) for name in run.settings.modules or MODULES]
    every = drawn + [run.arm(f"{name}, composed", expression, run, name) for name in EXPRESSIONS]
    memory = run.arm("memory", working_memory)
    run.values("axis_identity", run.arm("axes", axes_apart))
    diagonal = run.arm("diagonal", derivative_of_a_map)
    run.values("negative_control", run.arm("wrong", wrong_diagrams))
    largest = {name: column(every, name).max() for name in ("other_sizes", "source")}
    run.values("round_trip", largest, largest_difference=column(every, "round_trip").max())
    faults = {name: column(every, name).sum() for name in ("wrong_columns", "overlaps", "other_bytes")}
    run.values("counting", faults, least_clear=column(every, "clear").min())
    difference = abs(column(drawn, "flops") - column(drawn, "counted")).max()
    attention = run.arms.get("cross attention", {"flops": math.nan})["flops"]
    run.values("cost", memory, largest_difference=difference, cross_attention=attention)
    ruled = [kind for kind in DERIVATIVES if column(every, f"rule: {kind}").any()]
    operations = {"operations": len(ruled), "wanted": len(DERIVATIVES)}
    run.values("backward", diagonal | operations, largest_difference=column(every, "backward").max())


def module(run: Run[Settings], name: str) -> dict[str, Any]:
    """A module of the gallery: counted, priced against torch's counter, run back, differentiated."""
    piece = MODULES[name]
    net, args = piece.make(), piece.tensors()
    drawing, shown = as_drawn(lambda: draw(net, args, level="full", names=piece.inputs))
    cost = {"flops": drawing.cost().total(), "counted": count_flops(net, *args)}
    inputs = [[piece.tensors(**sizes) for sizes in piece.varied()] for _ in range(run.settings.repeats)]
    varying: dict[str, Any] = {"names": piece.inputs, "dynamic": list(piece.other)}
    back = there_and_back(net, draw(net, args, **varying), inputs)
    doubled = [[tuple(t.double() for t in given) for given in row] for row in inputs]
    exact = net.double()
    return {**shown, **cost, **back, **backward(exact, draw(exact, doubled[0][0], **varying), doubled)}


def expression(run: Run[Settings], name: str) -> dict[str, Any]:
    """An expression: written out, differentiated by its own rules, drawn."""
    net = EXPRESSIONS[name]().double()
    inputs = []
    for k in range(run.settings.repeats):
        other = {**SIZES, "y": 6 + k, "x": 8 + 2 * k, "b": 3 + k, "p": 10 + 2 * k, "q": 12 + 2 * k}
        shapes = [[[sizes[axis] for axis in axes] for axes in net.inputs] for sizes in (SIZES, other)]
        inputs.append([tuple(torch.randn(shape, dtype=torch.float64) for shape in row) for row in shapes])
    sizes = {axis: SIZES[axis] for axes in net.inputs for axis in axes}
    drawing, shown = as_drawn(lambda: net.drawing(**sizes))
    return {**shown, **there_and_back(net, drawing, inputs), **backward(net, drawing, inputs)}


def figures(results: Results) -> plots.Figures:
    """Time to a drawing, and columns of the gallery."""
    names = results.settings.modules or tuple(MODULES)
    seconds, columns = ({name: (name, key) for name in names} for key in ("seconds", "columns"))
    return {
        "time": plots.bars(results, seconds, ylabel="seconds to trace, lay out and draw"),
        "columns": plots.bars(results, columns, ylabel="columns"),
    }
