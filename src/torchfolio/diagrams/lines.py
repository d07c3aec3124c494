"""One line of a drawing: wires, dashes, labels, fences, and the arrows where it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torchfolio.diagrams.fonts import Span, spans_width
from torchfolio.diagrams.placing import PARENTHESIS, Placed, Slot, heading
from torchfolio.diagrams.shapes import GREY, Area, Box, Command, DataColumn, Glyph, Part, Path, Text, ease, polyline
from torchfolio.diagrams.sheet import Fence, Step, Wire
from torchfolio.diagrams.strokes import Drawn, Place, finish

__all__ = ["Line"]

FILLS = ("#fff3dc", "#eceaf7", "#e6f3ea", "#fdeced", "#e4f1f8", "#fdfbe0")
EDGES = ("#ecd9b0", "#cfcae8", "#c2dfca", "#f2c9cd", "#bcd9e8", "#e8e3a8")


@dataclass
class _Drawing:
    """What one line has put down; `height` is where it ends."""

    width: float = 0.0
    height: float = 0.0
    fences: list[Area] = field(default_factory=list)
    wires: list[Path] = field(default_factory=list)
    glyphs: list[Glyph] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    decor: list[Part] = field(default_factory=list)
    columns: list[DataColumn] = field(default_factory=list)


class Line(Placed):
    """The columns from one level to another, drawn."""

    def draw(self, top: float, *, is_first: bool, is_last: bool) -> _Drawing:
        """Everything in this line, from `top` down."""
        wires = [self.slots[s] for k in self.levels for s in self.order[k]]
        boxes = [i for pair in (*self.fence_rows.values(), *self.boxes.values()) for i in pair]
        visible = [*wires, *boxes]
        highest = [float(self.y[i]) - self.style.label for i in wires] + [float(self.y[i]) for i in boxes]
        self.top = top - min(highest, default=0.0)
        drawing = _Drawing(width=self.end + self.style.margin)
        drawing.height = self.top + max((float(self.y[i]) for i in visible), default=0.0)
        drawn = {step.index: self._draw_step(k, step) for k, step in self.steps}
        for _, step in self.steps:
            d = drawn[step.index]
            touching = frozenset(w.key for w in (*step.in_wires, *step.out_wires))
            drawing.glyphs.append(Glyph(step.index, step.kind, step.title, tuple(d.parts), d.box, touching))
        self._draw_wires(drawing, drawn)
        self._draw_dashes(drawing)
        self._draw_labels(drawing)
        self._draw_fences(drawing)
        self._count(drawing, top)
        if not is_first:
            self._arrows(drawing, self.first, entering=True)
        if not is_last:
            self._arrows(drawing, self.last, entering=False)
        return drawing

    def _draw_step(self, k: int, step: Step) -> Drawn:
        x0, x1 = self.operation_x[k]
        ins = {w.key: self.height(k, w.key) for w in step.in_wires}
        outs = {w.key: self.height(k + 1, w.key) for w in step.out_wires}
        for level, tensors, heights in ((k, step.inputs, ins), (k + 1, step.outputs, outs)):
            for tensor in (t for t in tensors if not t.wires):
                heights[tensor.key] = self.top + float(self.y[self.slots[Slot(level, "phantom", tensor.key)]])
        place = Place(x0, x1, ins, outs)
        return finish(step, place, self.plans[step.index].draw(place))

    def _draw_wires(self, drawing: _Drawing, drawn: Mapping[int, Drawn]) -> None:
        """One path for every axis from where it starts to where it ends."""
        open_paths: dict[str, list[Command]] = {}
        keys: dict[str, str] = {}  # of every wire those of the tensors it has run through
        for k in self.levels:
            owner = {w.key: s for s in (self.sheet.columns[k] if k < self.last else ()) for w in s.in_wires}
            following: dict[str, list[Command]] = {}
            for wire in (w for t in self.sheet.levels[k] for w in t.wires):
                y = self.height(k, wire.key)
                path = open_paths.pop(wire.key, None) or [("M", (self.data_x[k][0], y))]
                path.append(("L", (self.data_x[k][1], y)))
                keys.setdefault(wire.key, wire.key)
                step = owner.get(wire.key)
                if k == self.last:
                    drawing.wires.append(self._wire(path, wire, keys[wire.key]))
                elif step is None:
                    x0, x1 = self.operation_x[k]
                    following[wire.key] = [*path, *ease(x0, y, x1, self.height(k + 1, wire.key))]
                elif wire.key in drawn[step.index].through:
                    after = dict(step.through)[wire.key]
                    following[after] = [*path, *drawn[step.index].through[wire.key]]
                    keys[after] = f"{keys[wire.key]} {after}"
                else:
                    drawing.wires.append(self._wire([*path, *drawn[step.index].ends[wire.key]], wire, keys[wire.key]))
            for step in self.sheet.columns[k] if k < self.last else ():
                for key, commands in drawn[step.index].starts.items():
                    following[key] = list(commands)
            open_paths = following

    def _wire(self, commands: Iterable[Command], wire: Wire, keys: str) -> Path:
        name = "".join(s.text for s in wire.label)
        return Path(
            tuple(_simplified(commands)),
            "wire",
            title=f"{name} ({wire.size})",
            data={"axis": wire.axis, "keys": keys, **({"twin": "yes"} if wire.twin else {})},
        )

    def _draw_dashes(self, drawing: _Drawing) -> None:
        """The boundaries of tensors; one goes on as long as the tensor under it does."""
        open_paths: dict[str, list[Command]] = {}
        for k in self.levels:
            x0, x1 = self.data_x[k]
            steps = self.sheet.columns[k] if k < self.last else ()
            onward = {s.inputs[0].key: s.outputs[0].key for s in steps if s.inputs and s.outputs}
            inside = {t.key for s in steps for t in s.inputs[1:]}
            following: dict[str, list[Command]] = {}
            for slot in (s for s in self.order[k] if s.kind == "dash"):
                y = self.top + float(self.y[self.slots[slot]])
                path = open_paths.pop(slot.key, None) or [("M", (x0 - (10 if k > self.first else 0), y))]
                path.append(("L", (x1, y)))
                after = onward.get(slot.key, slot.key if slot.key not in inside else None)
                goal = self.slots.get(Slot(k + 1, "dash", after)) if after is not None and k < self.last else None
                if goal is not None:
                    end = self.operation_x[k][1], self.top + float(self.y[goal])
                    following[str(after)] = [*path, *ease(x1, y, *end)]
                    continue
                if k < self.last:
                    path.append(("L", (x1 + 6, y)))
                drawing.wires.append(Path(tuple(_simplified(path)), "dash"))
            open_paths = following

    def _draw_labels(self, drawing: _Drawing) -> None:
        for k in self.levels:
            x = self.label_x[k]
            for wire in self.labels[k].values():
                y = self.height(k, wire.key) - 3.2
                drawing.texts.append(Text(x, y, wire.label, self.style.label, "middle", "label"))

    def _fence_boxes(self) -> dict[str, Box]:
        """Where the fences of this line are; outer ones reach a little further than inner ones."""
        boxes: dict[str, Box] = {}
        for fence in sorted(self.fences, key=lambda f: -f.depth):
            top, bottom = (self.top + float(self.y[i]) for i in self.fence_rows[fence.path])
            pad = 1.0 + PARENTHESIS * (fence.repeat > 1)
            left = self.operation_x[max(fence.first, self.first)][0] - pad
            right = self.operation_x[min(fence.last, self.last - 1)][1] + pad
            inner = [boxes[f.path] for f in self.fences if f.path in boxes and f.steps <= fence.steps]
            left, right = min([left, *(b.left - 2.5 for b in inner)]), max([right, *(b.right + 2.5 for b in inner)])
            boxes[fence.path] = Box(left, top, right, bottom)
        return boxes

    def _draw_fences(self, drawing: _Drawing) -> None:
        boxes = self._fence_boxes()
        for fence in sorted(self.fences, key=lambda f: f.depth):
            box = boxes[fence.path]
            fill, edge = FILLS[fence.depth % len(FILLS)], EDGES[fence.depth % len(EDGES)]
            drawing.fences.append(Area(box, fill, edge, 2.0, "fence", fence.path))
            if heading(fence):
                text = heading(fence) if fence.first >= self.first else f"… {heading(fence)}"
                spans = (Span(text, "sans"),)
                if spans_width(spans, self.style.title) > box.right - box.left - 6 and fence.first < self.first:
                    continue
                place = box.left + 5, box.top + self.style.title + 2
                drawing.texts.append(Text(*place, spans, self.style.title, "start", "title"))
            if fence.repeat > 1:
                self._parentheses(drawing, fence, box)

    def _parentheses(self, drawing: _Drawing, fence: Fence, box: Box) -> None:
        """What is repeated stands between large parentheses."""
        top, bottom, bow = box.top + self.style.title + 7, box.bottom - 2, 7.0
        for x, sign, here in (
            (box.left + 10.5, -1, fence.first >= self.first),
            (box.right - 10.5, 1, fence.last < self.last),
        ):
            if here:
                curve = ("C", (x + sign * bow, top + 12, x + sign * bow, bottom - 12, x, bottom))
                drawing.decor.append(Path((("M", (x, top)), curve), width=2.6))

    def _count(self, drawing: _Drawing, top: float) -> None:
        for k in self.levels:
            wires = sum(len(t.wires) for t in self.sheet.levels[k])
            dashes = max(0, len(self.sheet.levels[k]) - 1)
            x = self.label_x[k]
            drawing.columns.append(DataColumn(k, x, top - 6, drawing.height + 12, wires, dashes))

    def _arrows(self, drawing: _Drawing, level: int, *, entering: bool) -> None:
        """Bent arrows where a line ends and where the next goes on."""
        x = self.data_x[level][0 if entering else 1]
        for wire in (w for t in self.sheet.levels[level] for w in t.wires):
            y = self.height(level, wire.key)
            if entering:
                shaft = [("M", (x - 24, y - 8)), ("C", (x - 18, y - 2, x - 12, y, x, y))]
                tip = [(x - 7, y - 3), (x, y), (x - 7, y + 3)]
            else:
                shaft = [("M", (x, y)), ("C", (x + 12, y, x + 16, y + 2, x + 20, y + 6))]
                tip = [(x + 16.5, y + 7), (x + 24, y + 9.5), (x + 20.6, y + 2.4)]
            drawing.decor.append(Path(tuple(shaft), stroke=GREY))
            drawing.decor.append(Path(polyline(tip, close=True), fill=GREY, stroke="none"))


def _simplified(commands: Iterable[Command]) -> list[Command]:
    """A path without points that lie on a level line between their neighbours."""
    result: list[Command] = []
    for command in commands:
        if command[0] == "L" and len(result) > 1 and result[-1][0] == "L":
            (x0, y0), (x1, y1), (x2, y2) = result[-2][1][-2:], result[-1][1], command[1]
            if abs(y0 - y1) < 0.01 and abs(y1 - y2) < 0.01 and x0 <= x1 <= x2:
                result[-1] = command
                continue
        result.append(command)
    return result
