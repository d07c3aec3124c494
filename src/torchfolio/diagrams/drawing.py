"""Draw a module: from an example input to SVG, a raster or text.

Longer than most because a `Drawing` is the face of all that can be done with a diagram.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor, nn

from torchfolio.checks import one_of
from torchfolio.diagrams.assembly import View, assemble
from torchfolio.diagrams.compile import CircuitModule, source_of
from torchfolio.diagrams.cost import Cost, axis_symbols, cost_of
from torchfolio.diagrams.equality import same_graph
from torchfolio.diagrams.exported import read, trace
from torchfolio.diagrams.graph import Graph
from torchfolio.diagrams.layout import Style, lay_out
from torchfolio.diagrams.orders import ContractionOrder, contraction_orders
from torchfolio.diagrams.pdf import render_pdf
from torchfolio.diagrams.shapes import Geometry
from torchfolio.diagrams.sheet import Sheet, Step
from torchfolio.diagrams.sheet import Tensor as Wires
from torchfolio.diagrams.svg import render_png, render_svg
from torchfolio.diagrams.text import render_text
from torchfolio.diagrams.vjp import Pullback, pullback
from torchfolio.errors import TorchfolioError

LEVELS = ("auto", "full", "blocks")
LONGEST = 60
"""Columns that a drawing has at most at the level `"auto"`, where modules are there to be folded."""
REPEATS = 3
"""Modules in a row, built alike, that are drawn as one."""


class Composed(Protocol):
    """What has a graph without being drawn: an expression."""

    def graph(self) -> Graph: ...


@dataclass(frozen=True)
class Drawing:
    """A circuit diagram ready to be drawn; a notebook shows it as it is.

    Attributes:
        sheet: operations in columns, and the tensors alive between them.
        style: sizes.
        unknown: names of operations that are drawn as plain boxes, for want of a sign.
        graph: all operations, those too that the drawing leaves out or puts into boxes.
        view: choice of those that are drawn.
    """

    sheet: Sheet
    style: Style = field(default_factory=Style)
    unknown: tuple[str, ...] = ()
    graph: Graph = field(default_factory=Graph, repr=False)
    view: View = field(default_factory=View)

    @cached_property
    def geometry(self) -> Geometry:
        """Places for everything."""
        return lay_out(self.sheet, self.style)

    def svg(self, path: str | Path | None = None) -> str:
        """The SVG document; written to a file too where one is named."""
        document = render_svg(self.geometry, self.json(), title=self.sheet.title)
        if path is not None:
            Path(path).write_text(document, encoding="utf-8")
        return document

    def png(self, *, width: int | None = None, zoom: float = 2.0) -> bytes:
        """A raster. See `torchfolio.diagrams.svg.render_png`."""
        return render_png(self.svg(), width=width, zoom=zoom)

    def pdf(self, path: str | Path | None = None) -> bytes:
        """The PDF document, of one page; written to a file too where one is named."""
        document = render_pdf(self.geometry, title=self.sheet.title)
        if path is not None:
            Path(path).write_bytes(document)
        return document

    def text(self) -> str:
        """The drawing in characters."""
        return render_text(self.geometry)

    def signature(self) -> str:
        """Axes of the inputs and of the outputs, in the code's order, `b c h w -> b n`."""
        first = self.sheet.inputs or self.sheet.levels[0]
        last = self.sheet.outputs or self.sheet.levels[-1]
        return f"{', '.join(map(_axes, first))} -> {', '.join(map(_axes, last))}"

    def cost(self) -> Cost:
        """Time and memory, as formulas in the names of axes and as numbers; of what is in boxes and hidden too."""
        return cost_of(self._seen(replace(self.view, depth=None, batch=True, memory=False)).sheet)

    def _seen(self, view: View) -> Drawing:
        """The same diagram, drawn in another way."""
        return replace(self, sheet=assemble(self.graph, self.sheet.title, view), view=view)

    def expand(self, path: str) -> Drawing:
        """The drawing with a module drawn out that is a box in it, and the modules around it.

        Args:
            path: path of the module, `encoder.layers.0`.

        Raises:
            ValueError: if there is no such module.
        """
        known = {p for s in self.graph.steps for p, _ in s.stack}
        if path not in known:
            raise ValueError(f"expected the path of a module, one of {', '.join(sorted(known))}, got {path!r}")
        return self._seen(replace(self.view, opened=(*self.view.opened, path)))

    def fold(self, depth: int = 0) -> Drawing:
        """The drawing with modules as boxes.

        Args:
            depth: depth of those modules, 0 for the children of the module that is drawn.
        """
        if depth < 0:
            raise ValueError(f"expected a depth of at least 0, got {depth}")
        return self._seen(replace(self.view, depth=depth, opened=()))

    def saved_for_backward(self) -> sympy.Expr:
        """Elements that the backward pass needs of the forward pass, inputs among them, in the names of axes.

        Weights do not count. A tensor that several operations need counts once.

        Raises:
            TorchfolioError: if there is no backward pass, as of dropout in training.
        """
        symbols = axis_symbols(assemble(self.graph, ""))
        sizes = [
            [symbols.get(a, self.graph.size[a]) for a in self.graph.visible(v)] for v in pullback(self.graph).saved
        ]
        return sympy.Add(*(sympy.Mul(*own) for own in sizes))

    def contraction_orders(self) -> list[ContractionOrder]:
        """Products of three tensors or more: what their order costs, and what the best order would.

        Contractions may be shifted past each other, and past multiplication by a number. So attention without softmax,
        `(q k) v`, is seen to be `q (k v)`, with no product of two sequence lengths.

        Example:
            >>> both = ncd("y k, x k -> y x") * op.identity("x l") @ ncd("y x, x l -> y l")
            >>> both.drawing(y=512, x=512, k=8, l=8).contraction_orders()[0].order
            ('k x, l x -> k l', 'k y, k l -> l y')
        """
        return contraction_orders(self.graph, axis_symbols(assemble(self.graph, "")))

    def to_source(self, name: str = "diagram") -> str:
        """The diagram as Python: a function on its inputs, with a statement for every operation.

        Where it has weights, the function takes them by the names that they have in the module, as its `state_dict` gives
        them: `diagram(x, weights=net.state_dict())`.

        Raises:
            TorchfolioError: if an operation cannot be written, as a function that is not one of torch.
        """
        if self.graph.functions:
            raise TorchfolioError(f"only functions of torch can be written out, got {', '.join(self.graph.functions)}")
        return self._source(name)

    def _source(self, name: str = "diagram") -> str:
        return source_of(self.graph, name, self.signature())

    def to_module(self) -> CircuitModule:
        """The diagram as a module that runs `to_source` on the parameters and buffers of the module that was drawn.

        Example:
            >>> torch.testing.assert_close(draw(net, x).to_module()(x), net(x))

        It runs for other lengths of axes too, unless the module that was drawn makes constants of a length, as of a mask;
        those must be said to vary when it is drawn: `draw(net, x, names=["b x m"], dynamic=["x"])`.

        Raises:
            TorchfolioError: if an operation cannot be written.
        """
        return CircuitModule(self._source(), "diagram", self.graph.weights, self.graph.saved, self.graph.functions)

    def equals(self, other: Drawing | Composed) -> bool:
        """Whether another diagram does the same operations on the same axes, whatever its axes are called.

        How it was bracketed does not matter, nor in which order independent operations and the tensors between them come.
        """
        return same_graph(self.graph, other.graph if isinstance(other, Drawing) else other.graph())

    def backward(self) -> BackwardDrawing:
        """The backward pass, by a rule for every operation, as a diagram of its own.

        Raises:
            TorchfolioError: if an operation is random, as dropout in training.
        """
        found = pullback(self.graph)
        sheet = assemble(found.graph, f"{self.sheet.title}, backward")
        return BackwardDrawing(sheet, self.style, self.unknown, found.graph, View(), found, self.graph)

    def json(self) -> dict[str, Any]:
        """The diagram as JSON values: tensors of every column of data, and operations of every column between."""
        tensors = {t.key: [{"axis": w.axis, "name": _name(w), "size": w.size} for w in t.wires] for c in self.sheet.levels for t in c}  # fmt: skip
        return {
            "signature": self.signature(),
            "tensors": tensors,
            "data": [[t.key for t in level] for level in self.sheet.levels],
            "operations": [[_operation(s) for s in column] for column in self.sheet.columns],
        }

    def _repr_svg_(self) -> str:
        return self.svg()


@dataclass(frozen=True)
class BackwardDrawing(Drawing):
    """The backward pass of a diagram: from what is saved and cotangents of the outputs to those of inputs and weights.

    Attributes:
        pullback: tensors that are saved, and what comes out.
        forward: the graph whose backward pass it is.
    """

    pullback: Pullback = field(default_factory=lambda: Pullback(Graph(), [], [], []), repr=False)
    forward: Graph = field(default_factory=Graph, repr=False)

    @cached_property
    def _passes(self) -> tuple[CircuitModule | None, CircuitModule]:
        """What gives the saved tensors, if there are any, and what takes them."""
        if not self.pullback.saved:
            return None, self.to_module()
        graph, source = self.forward, source_of(self.forward, "forward", outputs=self.pullback.saved)
        return CircuitModule(source, "forward", graph.weights, graph.saved, graph.functions), self.to_module()

    def gradients(
        self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor]]:
        """Run forward, then backward, both as written from the diagrams, without autograd.

        Args:
            inputs: tensors that the forward diagram takes.
            cotangents: one for each of its outputs.

        Returns:
            Cotangents of the inputs, None for those that have none, and of the weights by name.

        Raises:
            ValueError: if their number is not that of the inputs and outputs.
        """
        for what, given, wanted in (
            ("inputs", inputs, self.forward.inputs),
            ("cotangents", cotangents, self.forward.outputs),
        ):
            if len(given) != len(wanted):
                raise ValueError(f"expected {len(wanted)} {what}, got {len(given)}")
        with torch.no_grad():
            first, second = self._passes
            saved = () if first is None else first(*inputs)
            saved = (saved,) if isinstance(saved, Tensor) else saved
            found = second(*saved, *cotangents)
        found = (found,) if isinstance(found, Tensor) else found
        own: list[Tensor | None] = [None] * len(inputs)
        for place, cotangent in zip(self.pullback.inputs, found, strict=False):
            own[place] = cotangent
        return tuple(own), dict(zip(self.pullback.weights, found[len(self.pullback.inputs) :], strict=True))


def draw(
    module: nn.Module,
    example_args: Sequence[Tensor] | Tensor,
    names: Sequence[str | None] | None = None,
    level: str = "auto",
    style: Style | None = None,
    dynamic: bool | Sequence[str] = False,
    repeats: int | None = None,
    hide_batch: bool = False,
) -> Drawing:
    """Draw a module as a neural circuit diagram.

    Args:
        module: network that is drawn, in the mode that it is in: batch norm in training takes the batch axis in.
        example_args: an input, or one for each argument.
        names: names of the axes of each input, `"b c h w"`; what has the same name is the same axis.
        level: `"full"`, every operation; `"blocks"`, the children of the module as boxes; `"auto"`, as much as fits
            into 60 columns.
        style: sizes.
        dynamic: names of axes whose length may vary, so that constants of the module that depend on it are read as
            such; True for all that can.
        repeats: number of modules in a row, built alike, from which they are drawn as one, between parentheses with
            λ = 1…N; 0 for never. By default three, and never at the level `"full"`. Costs count all of them.
        hide_batch: whether to leave the first axis of the first input out of the drawing, not out of the costs.

    Returns:
        The drawing.

    Raises:
        ValueError: if the level is unknown, or names do not fit the inputs.
        TypeError: if an input is no tensor.
        TorchfolioError: if no output is made of the inputs, if the module fixes a length that is to vary, if an
            operation is about the batch that is to be hidden, or if `torch.export` cannot trace the module, as where
            its control flow depends on values.

    Operations without a sign become plain boxes on the axes that they change, and a warning names them; so does one name
    outputs that no input leads to, as a weight by itself, which are left out.

    Example:
        >>> draw(net, torch.zeros(2, 3, 32, 32)).svg("net.svg")
    """
    examples = (example_args,) if isinstance(example_args, Tensor) else tuple(example_args)
    _check_inputs(examples, names)
    one_of("level", level, LEVELS)
    if repeats is not None and (repeats < 0 or repeats == 1):
        raise ValueError(f"expected at least two repeats, or 0 for none to be drawn as one, got {repeats}")
    graph = read(module, trace(module, examples, names, dynamic), names)
    least = repeats if repeats is not None else 0 if level == "full" else REPEATS
    depths = {"auto": (None, 3, 2, 1, 0), "full": (None,), "blocks": (0,)}[level]
    for view in (View(depth, (), least, not hide_batch) for depth in depths):
        sheet = assemble(graph, type(module).__name__, view)
        if len(sheet.columns) <= LONGEST:
            break
    unknown = tuple(sorted(set(graph.unknown)))
    if unknown:
        warnings.warn(f"drawn as plain boxes, for want of a sign: {', '.join(unknown)}", stacklevel=2)
    return Drawing(sheet, style or Style(), unknown, graph, view)


def _check_inputs(examples: Sequence[Any], names: Sequence[str | None] | None) -> None:
    for i, example in enumerate(examples):
        if not isinstance(example, Tensor):
            raise TypeError(f"expected tensors as inputs, got {type(example).__name__} as input {i}")
    if names is not None and len(names) != len(examples):
        raise ValueError(f"expected names for each of {len(examples)} inputs, got {len(names)}")
    for text, example in zip(names or [], examples, strict=False):
        if text is not None and len(text.split()) != example.dim():
            raise ValueError(f"expected names for the {example.dim()} axes of an input, got {text!r}")


def _name(wire: Any) -> str:
    return wire.name or "".join(s.text for s in wire.label)


def _axes(tensor: Wires) -> str:
    return " ".join(map(_name, tensor.wires)) or "1"


def _operation(step: Step) -> dict[str, Any]:
    params = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in step.params.items()}
    return {
        "index": step.index,
        "kind": step.kind,
        "inputs": [t.key for t in step.inputs],
        "outputs": [t.key for t in step.outputs],
        "core": sorted(step.core),
        "weave": sorted({w.axis for w in (*step.in_wires, *step.out_wires)} - step.core),
        "params": params,
        "learned": step.learned,
        "path": step.path,
        "times": step.times,
    }
