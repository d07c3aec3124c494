"""What the layout and the pictograms work on: the visible part of a diagram, one tensor after another.

Axes of size one have no wire, and neither has the batch where it is hidden. What is left is put into tensors with an
identity of their own: a column of data is a list of them, from top to bottom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchfolio.diagrams.fonts import Span


@dataclass(frozen=True)
class Wire:
    """One visible axis of one tensor.

    Attributes:
        key: unique in the drawing.
        axis: identity of the axis, the same along the whole wire.
        label: name as it is set above the wire.
        size: length as text, `"28"` or a formula.
        twin: whether it is drawn close below the wire before it, as the second line of a group.
        heads: whether it is the first line of a group.
        name: name of the axis, where the label is that of a group.
    """

    key: str
    axis: str
    label: tuple[Span, ...]
    size: str
    twin: bool = False
    heads: bool = False
    name: str = ""


@dataclass(frozen=True)
class Tensor:
    """One tensor and its visible wires from top to bottom."""

    key: str
    wires: tuple[Wire, ...]


@dataclass(frozen=True)
class Step:
    """One operation between two columns.

    Attributes:
        index: place of the operation in the diagram.
        kind: kind that the diagram has.
        inputs, outputs: tensors that it takes and gives.
        through: pairs of keys, of a wire that goes in and of the same axis where it comes out.
        core: identities of the axes that the operation is about; the others are woven over.
        params: settings of the pictogram.
        learned: whether it has weights.
        title: tooltip.
        path: path of the module in the network.
        times: number of times that it is done, where it is repeated.
    """

    index: int
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    through: tuple[tuple[str, str], ...] = ()
    core: frozenset[str] = frozenset()
    params: Mapping[str, Any] = field(default_factory=dict)
    learned: bool = False
    title: str = ""
    path: str = ""
    times: int = 1

    @property
    def in_wires(self) -> list[Wire]:
        return [w for t in self.inputs for w in t.wires]

    @property
    def out_wires(self) -> list[Wire]:
        return [w for t in self.outputs for w in t.wires]

    @property
    def ending(self) -> list[Wire]:
        """Wires that go in and do not come out."""
        on = {a for a, _ in self.through}
        return [w for w in self.in_wires if w.key not in on]

    @property
    def starting(self) -> list[Wire]:
        """Wires that come out and did not go in."""
        on = {b for _, b in self.through}
        return [w for w in self.out_wires if w.key not in on]


@dataclass(frozen=True)
class Fence:
    """A module: the columns of operations that it spans, those operations, and how deep it is.

    Attributes:
        title: at its top left.
        path: path of the module in the network; unique.
        first, last: columns of operations that it spans, both included.
        steps: indices of its operations.
        depth: number of fences round it.
        repeat: number of repeats, drawn as large parentheses; 1 for none.
    """

    title: str
    path: str
    first: int
    last: int
    steps: frozenset[int]
    depth: int
    repeat: int = 1


@dataclass(frozen=True)
class Sheet:
    """A diagram ready to be laid out.

    Attributes:
        levels: tensors alive at each column of data, from top to bottom; one more than there are columns of steps.
        columns: operations of each column. A tensor that none of them takes goes on as it is.
        fences: modules, outermost first.
        title: heading of the drawing.
        legend: symbols and what they stand for.
        inputs: tensors that go in, in the code's order, which a drawing may change.
        outputs: tensors that come out, likewise; one that comes out twice stands there twice.
    """

    levels: tuple[tuple[Tensor, ...], ...]
    columns: tuple[tuple[Step, ...], ...]
    fences: tuple[Fence, ...] = ()
    title: str = ""
    legend: tuple[tuple[tuple[Span, ...], str], ...] = ()
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
