"""From a sheet to a geometry: columns, lines, heights of wires, fences and labels.

A drawing is a grid of columns, of data and of operations by turns. Wires run level through the columns of data, where
their labels stand, and change their heights within the columns of operations. A long drawing is broken into lines.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torchfolio.diagrams.fonts import Span, spans_width
from torchfolio.diagrams.lines import Line
from torchfolio.diagrams.ordering import ordered
from torchfolio.diagrams.pictograms import plan
from torchfolio.diagrams.placing import Style, heading
from torchfolio.diagrams.shapes import Geometry, Text
from torchfolio.diagrams.sheet import Sheet, Wire

__all__ = ["Style", "lay_out"]


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
    operations = [max((plans[s.index].width for s in steps), default=40.0) for steps in sheet.columns]
    _widen_for_titles(sheet, data, operations, style)
    lines = _broken(sheet, data, operations, style)
    labels = _labels(sheet, style, {first for first, _ in lines})
    data = [_label_room(labels[k], style) for k in range(len(sheet.levels))]
    top, drawings = style.margin, []
    for first, last in lines:
        line = Line(sheet, style, plans, first, last, data, operations, labels)
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


def _widen_for_titles(sheet: Sheet, data: list[float], operations: list[float], style: Style) -> None:
    """A fence is at least as wide as its title."""
    for fence in sheet.fences:
        span = range(fence.first, fence.last + 1)
        have = sum(operations[k] for k in span) + sum(data[k] for k in span if k > fence.first)
        need = _title_width(heading(fence), style) + 12
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
        wires, fences = sum(len(t.wires) for t in sheet.levels[end]), sum(f.first < end <= f.last for f in sheet.fences)
        cut = wires + 6.0 * fences if end < n else 0.0
        choices = []
        for start in range(end - 1, -1, -1):
            width = sum(data[start : end + 1]) + sum(operations[start:end])
            if width > style.line * 1.05 and start < end - 1:
                break
            slack = max(0.0, (1.0 if end < n else 0.7) * (ideal - width)) / ideal
            choices.append((best[start][0] + cut + 14.0 * slack**2 + 2.0, start))
        best.append(min(choices))
    breaks = [n]
    while breaks[-1]:
        breaks.append(best[breaks[-1]][1])
    ends = breaks[::-1]
    return list(zip(ends[:-1], ends[1:], strict=True))


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
