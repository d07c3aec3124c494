"""Networks as diagrams in which every axis of every tensor is a wire: graph, algebra, tracing, layout, rendering.

`draw` traces a module on an example and gives a `Drawing`; `ncd` and `op` build one by hand from named axes. The notation
and what can be done with a drawing stand in `torchfolio.insight.circuit_diagrams`.
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
