"""Neural circuit diagrams: a network drawn so that every axis of every tensor is a wire.

Vincent Abbott, "Neural Circuit Diagrams: Robust Diagrams for the Communication, Implementation, and Analysis of Deep
Learning Architectures", TMLR 2024, https://arxiv.org/abs/2402.05424.

A diagram is read from left to right. A solid wire is an axis, a dashed line the boundary of two tensors; an operation
stands on the wires that it is about and is broadcast along those that pass it. `draw` traces a module on an example
and gives a `Drawing`, which writes itself as SVG, as a raster and as text; `check_svg` counts what was drawn.

A drawing turns back: `to_module` is a module on the same weights, `to_source` the Python of it, and `backward` the
backward pass by the rules of the operations, as a drawing of its own that runs without autograd. Expressions on named
axes (`ncd`, `op`) are diagrams too, and do all of that.

Example:
    >>> drawing = draw(net, torch.zeros(2, 3, 32, 32), names=["b c h w"])
    >>> drawing.svg("net.svg")
    >>> check_svg(drawing.svg()).counts_agree
    True
    >>> torch.testing.assert_close(drawing.to_module()(x), net(x))
"""

from torchfolio.diagrams.algebra import Expression, ncd, op
from torchfolio.diagrams.checks import Check, ColumnCount, check_svg
from torchfolio.diagrams.cost import Cost
from torchfolio.diagrams.drawing import BackwardDrawing, Drawing, draw
from torchfolio.diagrams.layout import Style

__all__ = [
    "BackwardDrawing",
    "Check",
    "ColumnCount",
    "Cost",
    "Drawing",
    "Expression",
    "Style",
    "check_svg",
    "draw",
    "ncd",
    "op",
]
