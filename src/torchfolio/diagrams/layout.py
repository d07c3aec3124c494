"""From a sheet to a geometry: columns, lines, heights of wires, fences and labels.

A drawing is a grid of columns, of data and of operations by turns. Wires run level through the columns of data, where
their labels stand, and change their heights within the columns of operations. A long drawing is broken into lines.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torchfolio.diagrams.fonts import Span, spans_width
from torchfolio.diagrams.ordering import ordered
from torchfolio.diagrams.pictograms import Drawn, Place, Plan, finish, plan
from torchfolio.diagrams.rows import Rows
from torchfolio.diagrams.shapes import (
    Area,
    Box,
    Command,
    DataColumn,
    Geometry,
    Glyph,
    Path,
    Text,
    ease,
    polyline,
)
from torchfolio.diagrams.sheet import Fence, Sheet, Step, Wire

INK, GREY = "#1c1c22", "#8a8a92"
FILLS = ("#fff3dc", "#eceaf7", "#e6f3ea", "#fdeced", "#e4f1f8", "#fdfbe0")
COHESION = 0.3
"""Wish for wires of a tensor to be neighbours, against 4 for a wire to be level."""
PARENTHESIS = 13.0
"""Room for a large parenthesis, px."""
EDGES = ("#ecd9b0", "#cfcae8", "#c2dfca", "#f2c9cd", "#bcd9e8", "#e8e3a8")


@dataclass(frozen=True)
class Style:
    """Sizes of a drawing, in px.

    Attributes:
        pitch: between two wires of a tensor.
        twin: between the two lines of a group of axes.
        between: between two tensors.
        column: least width of a column of data with its operation.
        label: size of labels.
        title: size of titles of fences.
        line: width after which a drawing is broken.
        relabel: columns after which the label of an unchanged wire is repeated.
        margin: around the drawing.
    """

    pitch: float = 20.0
    twin: float = 5.0
    between: float = 32.0
    column: float = 40.0
    label: float = 13.0
    title: float = 10.0
    line: float = 1180.0
    relabel: int = 4
    margin: float = 16.0


def lay_out(sheet: Sheet, style: Style | None = None) -> Geometry:
    """Places for everything.

    Args:
        sheet: the diagram.
        style: sizes.

    Returns:
        The drawing; equal sheets give equal drawings.
    """
    style = style or Style()
    sheet = ordered(sheet)
    plans = {step.index: plan(step) for steps in sheet.columns for step in steps}
    labels = _labels(sheet, style)
    data = [_label_room(labels[k], style) for k in range(len(sheet.levels))]
    operations = [_operation_room(steps, plans) for steps in sheet.columns]
    _widen_for_titles(sheet, data, operations, style)
    lines = _broken(sheet, data, operations, style)
    labels = _labels(sheet, style, {first for first, _ in lines})
    data = [_label_room(labels[k], style) for k in range(len(sheet.levels))]
    top, drawings = style.margin, []
    for first, last in lines:
        line = _Line(sheet, style, plans, first, last, data, operations, labels)
        drawings.append(line.draw(top, is_first=first == 0, is_last=last == len(sheet.columns)))
        top = drawings[-1].height + 12
    width = max([d.width for d in drawings] + [_title_width(sheet.title, style) + 2 * style.margin])
    legend, bottom = _legend(sheet, style, width, top - 10)
    return Geometry(
        width=width,
        height=bottom + style.margin - 6,
        fences=tuple(f for d in drawings for f in d.fences),
        wires=tuple(w for d in drawings for w in d.wires),
        glyphs=tuple(g for d in drawings for g in d.glyphs),
        texts=(*(t for d in drawings for t in d.texts), *legend),
        decor=tuple(p for d in drawings for p in d.decor),
        columns=tuple(c for d in drawings for c in d.columns),
    )


def _title_width(title: str, style: Style) -> float:
    return spans_width([Span(title, "sans")], style.title) if title else 0.0


def _heading(fence: Fence) -> str:
    """The title of a fence, with the range of λ where it is repeated."""
    return f"{fence.title} λ = 1…{fence.repeat}".strip() if fence.repeat > 1 else fence.title


# ------------------------------------------------------------------------------------------------ columns and lines


def _labels(sheet: Sheet, style: Style, breaks: Collection[int] = (0,)) -> list[dict[str, Wire]]:
    """For every column of data the wires that are labelled there; all of them where a line begins."""
    since: dict[str, int] = {}
    last = len(sheet.levels) - 1
    labels: list[dict[str, Wire]] = []
    for k, level in enumerate(sheet.levels):
        here: dict[str, Wire] = {}
        onward = {b: a for step in (sheet.columns[k - 1] if k else ()) for a, b in step.through}
        age: dict[str, int] = {}
        for wire in (w for tensor in level for w in tensor.wires if not w.twin):
            before = since.get(onward.get(wire.key, wire.key))
            if before is None or k in breaks or before + 1 >= (2 if k == last else style.relabel):
                here[wire.key] = wire
                age[wire.key] = 0
            else:
                age[wire.key] = before + 1
        since = age
        labels.append(here)
    return labels


def _label_room(labels: Mapping[str, Wire], style: Style) -> float:
    return max((spans_width(w.label, style.label) + 8 for w in labels.values()), default=8.0)


def _operation_room(steps: Sequence[Step], plans: Mapping[int, Plan]) -> float:
    return max((plans[s.index].width for s in steps), default=40.0)


def _widen_for_titles(sheet: Sheet, data: list[float], operations: list[float], style: Style) -> None:
    """A fence is at least as wide as its title."""
    for fence in sheet.fences:
        span = range(fence.first, fence.last + 1)
        have = sum(operations[k] for k in span) + sum(data[k] for k in span if k > fence.first)
        need = _title_width(_heading(fence), style) + 12
        for k in span:
            operations[k] += max(0.0, need - have) / len(span)


def _broken(sheet: Sheet, data: list[float], operations: list[float], style: Style) -> list[tuple[int, int]]:
    """First and last level of every line: breaks where few wires and fences are cut, in lines of like width."""
    n = len(sheet.columns)
    total = sum(data) + sum(operations)
    if total <= style.line:
        return [(0, n)]
    count = -(-total // style.line)
    ideal = total / count + 60
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, n + 1):
        cut = (
            0.0
            if end == n
            else sum(len(t.wires) for t in sheet.levels[end]) + 6.0 * sum(f.first < end <= f.last for f in sheet.fences)
        )
        choices = []
        for start in range(end - 1, -1, -1):
            width = sum(data[start : end + 1]) + sum(operations[start:end])
            if width > style.line * 1.05 and start < end - 1:
                break
            slack = max(0.0, ideal - width) / ideal if end < n else max(0.0, 0.7 * (ideal - width) / ideal)
            choices.append((best[start][0] + cut + 14.0 * slack**2 + 2.0, start))
        best.append(min(choices))
    breaks = [n]
    while breaks[-1]:
        breaks.append(best[breaks[-1]][1])
    ends = breaks[::-1]
    return list(zip(ends[:-1], ends[1:], strict=True))


# ------------------------------------------------------------------------------------------------------- one line


@dataclass
class _Drawing:
    """What one line has put down; `height` is where it ends."""

    width: float = 0.0
    height: float = 0.0
    fences: list[Area] = field(default_factory=list)
    wires: list[Path] = field(default_factory=list)
    glyphs: list[Glyph] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    decor: list[Path | Text | Area] = field(default_factory=list)
    columns: list[DataColumn] = field(default_factory=list)


@dataclass(frozen=True)
class _Slot:
    """A place in a column of data: a wire, the phantom of a tensor without wires, or the dash above a tensor."""

    level: int
    kind: str
    key: str


class _Line:
    """The columns from one level to another, laid out by themselves."""

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
        self.rows = Rows()
        self.slots: dict[_Slot, int] = {}
        self.order: dict[int, list[_Slot]] = {}
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
        for fence in sorted(self.fences, key=lambda f: -f.depth):
            self._fence_rows(fence)
        self.y = self.rows.solve()

    def _slot(self, slot: _Slot) -> int:
        if slot not in self.slots:
            self.slots[slot] = self.rows.add()
        return self.slots[slot]

    def _order_level(self, k: int) -> None:
        style, order = self.style, []
        for i, tensor in enumerate(self.sheet.levels[k]):
            if i:
                order.append((_Slot(k, "dash", tensor.key), style.between * 0.34))
            first = style.between * 0.66 if i else 0.0
            if not tensor.wires:
                order.append((_Slot(k, "phantom", tensor.key), first))
            for j, wire in enumerate(tensor.wires):
                gap = first if not j else style.twin if wire.twin else style.pitch
                order.append((_Slot(k, "wire", wire.key), gap))
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
            for kind, keys in (
                ("wire", [w.key for w in tensor.wires]),
                ("phantom", [tensor.key]),
                ("dash", [tensor.key]),
            ):
                for key in keys:
                    if (a := rows.get(_Slot(k, kind, key))) is not None and (
                        b := rows.get(_Slot(k + 1, kind, key))
                    ) is not None:
                        level(a, b, late * (1.2 if kind == "dash" else 4.0))
        for step in self.sheet.columns[k]:
            for before, after, weight in _continuing(step):
                level(rows[_Slot(k, "wire", before)], rows[_Slot(k + 1, "wire", after)], weight * late)
            for before, after in zip(step.ending, step.starting, strict=False):
                level(rows[_Slot(k, "wire", before.key)], rows[_Slot(k + 1, "wire", after.key)], 3.0 * late)
            if step.inputs and step.outputs:
                a, b = _Slot(k, "dash", step.inputs[0].key), _Slot(k + 1, "dash", step.outputs[0].key)
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
                and (there := self.slots.get(_Slot(level, "wire", across.get(order[i].key, "")))) is not None
            ):
                self.rows.below(*((there, box[0]) if upper else (box[1], there)), 4.0, soft=True)

    def _fence_rows(self, fence: Fence) -> None:
        """Heights of a fence: round its wires, pictograms and inner fences; strangers stay outside."""
        top, bottom = self.rows.add(), self.rows.add()
        self.fence_rows[fence.path] = (top, bottom)
        self.rows.level(top, bottom, 0.05)
        steps = [s for _, s in self.steps if s.index in fence.steps]
        keys = {t.key for s in steps for t in (*s.inputs, *s.outputs)}
        head = 4.0 + (self.style.title + 5 if _heading(fence) else 0.0)
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
        return self.top + float(self.y[self.slots[_Slot(level, "wire", key)]])

    # -- drawing

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
                heights[tensor.key] = self.top + float(self.y[self.slots[_Slot(level, "phantom", tensor.key)]])
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
                goal = self.slots.get(_Slot(k + 1, "dash", after)) if after is not None and k < self.last else None
                if goal is None:
                    if k < self.last:
                        path.append(("L", (x1 + 6, y)))
                    drawing.wires.append(Path(tuple(_simplified(path)), "dash"))
                else:
                    following[str(after)] = [
                        *path,
                        *ease(x1, y, self.operation_x[k][1], self.top + float(self.y[goal])),
                    ]
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
            left, right = (
                min([left, *(b.left - 2.5 for b in inner)]),
                max([right, *(b.right + 2.5 for b in inner)]),
            )
            boxes[fence.path] = Box(left, top, right, bottom)
        return boxes

    def _draw_fences(self, drawing: _Drawing) -> None:
        boxes = self._fence_boxes()
        for fence in sorted(self.fences, key=lambda f: f.depth):
            box = boxes[fence.path]
            fill, edge = FILLS[fence.depth % len(FILLS)], EDGES[fence.depth % len(EDGES)]
            drawing.fences.append(Area(box, fill, edge, 2.0, "fence", fence.path))
            if _heading(fence):
                text = _heading(fence) if fence.first >= self.first else f"… {_heading(fence)}"
                spans = (Span(text, "sans"),)
                if spans_width(spans, self.style.title) > box.right - box.left - 6 and fence.first < self.first:
                    continue
                drawing.texts.append(
                    Text(box.left + 5, box.top + self.style.title + 2, spans, self.style.title, "start", "title")
                )
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
        for wire in (w for t in self.sheet.levels[level] for w in t.wires):
            y = self.height(level, wire.key)
            if entering:
                x = self.data_x[level][0]
                drawing.decor.append(
                    Path((("M", (x - 24, y - 8)), ("C", (x - 18, y - 2, x - 12, y, x, y))), stroke=GREY)
                )
                drawing.decor.append(
                    Path(polyline([(x - 7, y - 3), (x, y), (x - 7, y + 3)], close=True), fill=GREY, stroke="none")
                )
            else:
                x = self.data_x[level][1]
                drawing.decor.append(
                    Path((("M", (x, y)), ("C", (x + 12, y, x + 16, y + 2, x + 20, y + 6))), stroke=GREY)
                )
                tip = [(x + 16.5, y + 7), (x + 24, y + 9.5), (x + 20.6, y + 2.4)]
                drawing.decor.append(Path(polyline(tip, close=True), fill=GREY, stroke="none"))


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


def _legend(sheet: Sheet, style: Style, width: float, top: float) -> tuple[list[Text], float]:
    """Symbols and what they stand for, in rows at the foot."""
    texts: list[Text] = []
    x, y = style.margin, top + 14
    for symbol, meaning in sheet.legend:
        spans = (*symbol, Span(f" = {meaning}", "regular"))
        room = spans_width(spans, 13)
        if x > style.margin and x + room > width - style.margin:
            x, y = style.margin, y + 17
        texts.append(Text(x, y, spans, 13, "start", "legend", "#55555e"))
        x += room + 18
    return texts, y if sheet.legend else top - 6


__all__ = ["Style", "lay_out"]
