"""Where everything in a line of a drawing stands: columns from left to right, heights of wires, boxes and fences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torchfolio.diagrams.rows import Rows
from torchfolio.diagrams.sheet import Fence, Sheet, Step, Wire
from torchfolio.diagrams.strokes import Plan
from torchfolio.shown import Shown

__all__ = ["PARENTHESIS", "Placed", "Slot", "Style", "heading"]

COHESION = 0.3
"""Wish for wires of a tensor to be neighbours, against 4 for a wire to be level."""


PARENTHESIS = 13.0
"""Room for a large parenthesis, px."""


@dataclass(frozen=True)
class Style:
    """Sizes of a drawing, in px.

    Attributes:
        pitch: distance of two wires of a tensor.
        twin: distance of the two lines of a group of axes.
        between: distance of two tensors.
        label: size of labels.
        title: size of titles of fences.
        line: width after which a drawing is broken.
        relabel: columns after which the label of an unchanged wire is repeated.
        margin: room around the drawing.
    """

    pitch: float = 20.0
    twin: float = 5.0
    between: float = 32.0
    label: float = 13.0
    title: float = 10.0
    line: float = 1180.0
    relabel: int = 4
    margin: float = 16.0


def heading(fence: Fence) -> str:
    """The title of a fence, with the range of λ where it is repeated."""
    return f"{fence.title} λ = 1…{fence.repeat}".strip() if fence.repeat > 1 else fence.title


@dataclass(frozen=True)
class Slot:
    """A place in a column of data: a wire, the phantom of a tensor without wires, or the dash above a tensor."""

    level: int
    kind: str
    key: str


class Placed(Shown):
    """The columns from one level to another, and places for all that stands in them."""

    def __init__(
        self,
        sheet: Sheet,
        style: Style,
        plans: Mapping[int, Plan],
        first: int,
        last: int,
        data: Sequence[float],
        operations: Sequence[float],
        labels: Sequence[Mapping[str, Wire]],
    ) -> None:
        self.sheet, self.style, self.plans = sheet, style, plans
        self.first, self.last = first, last
        self.levels = range(first, last + 1)
        self.steps = [(k, s) for k in range(first, last) for s in sheet.columns[k]]
        self.fences = [f for f in sheet.fences if f.first < last and f.last >= first]
        self.labels, self.data, self.operations = labels, data, operations
        self.top = 0.0
        self.rows = Rows()
        self.slots: dict[Slot, int] = {}
        self.order: dict[int, list[Slot]] = {}
        self.boxes: dict[int, tuple[int, int]] = {}
        self.fence_rows: dict[str, tuple[int, int]] = {}
        self._place_columns()
        self._heights()

    # -- x

    def _place_columns(self) -> None:
        """Left ends of the columns of data and of operations."""
        x = self.style.margin + (26 if self.first else 0)
        self.data_x: dict[int, tuple[float, float]] = {}
        self.label_x: dict[int, float] = {}
        self.operation_x: dict[int, tuple[float, float]] = {}
        # Parentheses stand in the columns of data, where wires run level.
        before = {f.first for f in self.sheet.fences if f.repeat > 1}
        after = {f.last + 1 for f in self.sheet.fences if f.repeat > 1}
        for k in self.levels:
            start, x = x, x + (PARENTHESIS if k in after and k > self.first else 0)
            self.label_x[k] = x + self.data[k] / 2
            x += self.data[k] + (PARENTHESIS if k in before and k < self.last else 0)
            self.data_x[k] = (start, x)
            if k < self.last:
                self.operation_x[k] = (x, x + self.operations[k])
                x += self.operations[k]
        self.end = x + (26 if self.last < len(self.sheet.columns) else 0)

    # -- y

    def _heights(self) -> None:
        for k in self.levels:
            self._order_level(k)
        for k in range(self.first, self.last):
            self._straighten(k)
        for k, step in self.steps:
            self._box_rows(k, step)
        for k in range(self.first, self.last):
            self._stack_boxes(k)
        for fence in sorted(self.fences, key=lambda f: -f.depth):
            self._fence_rows(fence)
        self.y = self.rows.solve()

    def _slot(self, slot: Slot) -> int:
        if slot not in self.slots:
            self.slots[slot] = self.rows.add()
        return self.slots[slot]

    def _order_level(self, k: int) -> None:
        style, order = self.style, []
        for i, tensor in enumerate(self.sheet.levels[k]):
            if i:
                order.append((Slot(k, "dash", tensor.key), style.between * 0.34))
            first = style.between * 0.66 if i else 0.0
            if not tensor.wires:
                order.append((Slot(k, "phantom", tensor.key), first))
            for j, wire in enumerate(tensor.wires):
                gap = first if not j else style.twin if wire.twin else style.pitch
                order.append((Slot(k, "wire", wire.key), gap))
        for (upper, _), (lower, gap) in zip(order, order[1:], strict=False):
            self.rows.below(self._slot(upper), self._slot(lower), gap)
            if lower.kind == "wire" and upper.kind == "wire":  # the wires of a tensor keep together
                self.rows.level(self._slot(upper), self._slot(lower), COHESION, gap)
        for slot, _ in order[:1]:
            self._slot(slot)
        self.order[k] = [slot for slot, _ in order]

    def _straighten(self, k: int) -> None:
        """Wishes that what goes on from one level to the next stays at its height."""
        late = 1.0 + 0.002 * (k - self.first)  # bends come early rather than anywhere
        level, rows = self.rows.level, self.slots
        taken = {t.key for s in self.sheet.columns[k] for t in s.inputs}
        for tensor in (t for t in self.sheet.levels[k] if t.key not in taken):
            places = [("wire", w.key) for w in tensor.wires] + [("phantom", tensor.key), ("dash", tensor.key)]
            for kind, key in places:
                a, b = Slot(k, kind, key), Slot(k + 1, kind, key)
                if a in rows and b in rows:
                    level(rows[a], rows[b], late * (1.2 if kind == "dash" else 4.0))
        for step in self.sheet.columns[k]:
            for before, after, weight in _continuing(step):
                level(rows[Slot(k, "wire", before)], rows[Slot(k + 1, "wire", after)], weight * late)
            for before, after in zip(step.ending, step.starting, strict=False):
                level(rows[Slot(k, "wire", before.key)], rows[Slot(k + 1, "wire", after.key)], 3.0 * late)
            if step.inputs and step.outputs:
                a, b = Slot(k, "dash", step.inputs[0].key), Slot(k + 1, "dash", step.outputs[0].key)
                if a in rows and b in rows:
                    level(rows[a], rows[b], 1.2 * late)

    def _box_rows(self, k: int, step: Step) -> None:
        """Heights of the box of an operation, with its neighbours kept away from it at both ends of the column."""
        need = self.plans[step.index]
        top, bottom = self.rows.add(), self.rows.add()
        self.boxes[step.index] = (top, bottom)
        self.rows.below(top, bottom, 0.0)
        self.rows.level(top, bottom, 0.3)
        core_in = {w.key for w in step.in_wires if w.axis in step.core} | {w.key for w in step.ending}
        core_out = {w.key for w in step.out_wires if w.axis in step.core} | {w.key for w in step.starting}
        if not need.solid:  # the sign stands over the whole tensor
            core_in, core_out = {w.key for w in step.in_wires}, {w.key for w in step.out_wires}
        for level, keys in ((k, core_in), (k + 1, core_out)):
            places = [i for i, slot in enumerate(self.order[level]) if slot.kind == "wire" and slot.key in keys]
            if not places:
                self._apart(k, level, step, (top, bottom))
                continue
            order = self.order[level]
            self.rows.below(top, self.slots[order[places[0]]], need.above)
            self.rows.below(self.slots[order[places[-1]]], bottom, need.below)
            if places[0]:
                upper = order[places[0] - 1]
                self.rows.below(self.slots[upper], top, 3.0 if upper.kind == "dash" else 4.0, soft=True)
            if places[-1] + 1 < len(order):
                lower = order[places[-1] + 1]
                self.rows.below(bottom, self.slots[lower], 3.0 if lower.kind == "dash" else 4.0, soft=True)

    def _stack_boxes(self, k: int) -> None:
        """Keep the boxes of a column apart, in the order of what comes out of them."""
        place = {slot.key: i for i, slot in enumerate(self.order[k + 1])}
        solid = [s for s in self.sheet.columns[k] if self.plans[s.index].solid and s.out_wires]
        solid.sort(key=lambda s: place[s.out_wires[0].key])
        for upper, lower in pairwise(solid):
            self.rows.below(self.boxes[upper.index][1], self.boxes[lower.index][0], 4.0, soft=True)

    def _apart(self, k: int, level: int, step: Step, box: tuple[int, int]) -> None:
        """Keep what goes on beside a box away from it on the side where it has no wires: where a tag ends, or memory begins."""
        onward = {a: b for s in self.sheet.columns[k] for a, b in s.through}
        taken = {t.key for s in self.sheet.columns[k] for t in s.inputs}
        onward |= {w.key: w.key for t in self.sheet.levels[k] if t.key not in taken for w in t.wires}
        across = {b: a for a, b in onward.items()} if level == k else onward
        other = 2 * k + 1 - level
        own = {
            w.key for w in (step.in_wires if other == k else step.out_wires) if w.key not in across or not step.inputs
        }
        order = [slot for slot in self.order[other] if slot.kind == "wire"]
        places = [i for i, slot in enumerate(order) if slot.key in own]
        for beside, upper in ((places[:1], True), (places[-1:], False)) if places else ():
            i = beside[0] + (-1 if upper else 1)
            if (
                0 <= i < len(order)
                and (there := self.slots.get(Slot(level, "wire", across.get(order[i].key, "")))) is not None
            ):
                self.rows.below(*((there, box[0]) if upper else (box[1], there)), 4.0, soft=True)

    def _fence_rows(self, fence: Fence) -> None:
        """Heights of a fence: round its wires, pictograms and inner fences; strangers stay outside."""
        top, bottom = self.rows.add(), self.rows.add()
        self.fence_rows[fence.path] = (top, bottom)
        self.rows.level(top, bottom, 0.05)
        steps = [s for _, s in self.steps if s.index in fence.steps]
        keys = {t.key for s in steps for t in (*s.inputs, *s.outputs)}
        head = 4.0 + (self.style.title + 5 if heading(fence) else 0.0)
        for step in steps:
            box = self.boxes[step.index]
            self.rows.below(top, box[0], head)
            self.rows.below(box[1], bottom, 5.0)
        for inner in self.fences:
            if inner.depth > fence.depth and inner.steps <= fence.steps and inner.path in self.fence_rows:
                self.rows.below(top, self.fence_rows[inner.path][0], head)
                self.rows.below(self.fence_rows[inner.path][1], bottom, 4.0)
        for level in range(max(self.first, fence.first), min(self.last, fence.last + 1) + 1):
            member = {w.key for t in self.sheet.levels[level] if t.key in keys for w in t.wires}
            member |= {t.key for t in self.sheet.levels[level] if t.key in keys and not t.wires}
            self._fence_level(level, member, top, bottom, head)

    def _fence_level(self, level: int, member: set[str], top: int, bottom: int, head: float) -> None:
        order = self.order[level]
        places = [i for i, slot in enumerate(order) if slot.kind != "dash" and slot.key in member]
        if not places:
            return
        self.rows.below(top, self.slots[order[places[0]]], head + 13)
        self.rows.below(self.slots[order[places[-1]]], bottom, 7.0)
        if places[0]:
            self.rows.below(self.slots[order[places[0] - 1]], top, 4.0, soft=True)
        if places[-1] + 1 < len(order):
            self.rows.below(bottom, self.slots[order[places[-1] + 1]], 4.0, soft=True)

    def height(self, level: int, key: str) -> float:
        return self.top + float(self.y[self.slots[Slot(level, "wire", key)]])


def _continuing(step: Step) -> list[tuple[str, str, float]]:
    """Pairs of wires that go on in an operation, and how much each of them should stay level.

    Where several tensors become one, it stands where one of them stood: of a sum the first, of a product the one that
    most wires come from, the first of those.
    """
    after = dict(step.through)
    if len(step.inputs) < 2:
        return [(a, b, 4.0) for a, b in step.through]
    goal = {w.axis: w.key for w in step.out_wires}
    kept = [sum(w.axis in goal for w in t.wires) for t in step.inputs]
    main = 0 if step.kind != "einsum" else max(range(len(kept)), key=lambda i: (kept[i], -i))
    pairs = []
    for i, tensor in enumerate(step.inputs):
        for wire in tensor.wires:
            to = after.get(wire.key) or (goal.get(wire.axis) if step.kind in ("einsum", "binary", "concat") else None)
            if to is not None:
                pairs.append((wire.key, to, 4.0 if i == main else 1.0))
    return pairs
