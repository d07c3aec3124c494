"""Layout and rendering of circuit diagrams: heights, order, counts read back from the drawing, bytes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from xml.etree import ElementTree

import pytest

from torchfolio.diagrams.checks import check_svg, parse_path, svg_metadata
from torchfolio.diagrams.fonts import Span, name_spans, spans_width, text_width
from torchfolio.diagrams.layout import Style, lay_out
from torchfolio.diagrams.ordering import ordered
from torchfolio.diagrams.pdf import render_pdf
from torchfolio.diagrams.rows import Rows
from torchfolio.diagrams.shapes import Box, Text, flattened
from torchfolio.diagrams.sheet import Fence, Sheet, Step, Tensor, Wire
from torchfolio.diagrams.svg import render_png, render_svg
from torchfolio.diagrams.text import render_text


@dataclass
class Draft:
    """Builds a sheet by hand, one column after another."""

    levels: list[tuple[Tensor, ...]] = field(default_factory=list)
    columns: list[tuple[Step, ...]] = field(default_factory=list)
    made: int = 0

    def tensor(self, axes: str) -> Tensor:
        self.made += 1
        wires = [
            Wire(f"t{self.made}.{i}", a, name_spans(a), "4", a == "w", a == "h") for i, a in enumerate(axes.split())
        ]
        return Tensor(f"t{self.made}", tuple(wires))

    def start(self, *axes: str) -> list[Tensor]:
        self.levels = [tuple(self.tensor(a) for a in axes)]
        return list(self.levels[0])

    def step(self, kind: str, inputs: list[Tensor], outputs: list[str], core: str = "", **params) -> Step:
        made = tuple(self.tensor(a) for a in outputs)
        free = [w for t in made for w in t.wires]
        through = []
        for wire in (w for t in inputs for w in t.wires):
            after = next((w for w in free if w.axis == wire.axis), None)
            if after is not None:
                free.remove(after)
                through.append((wire.key, after.key))
        index = sum(len(c) for c in self.columns) + self.made * 100
        return Step(index, kind, tuple(inputs), made, tuple(through), frozenset(core.split()), params, title=kind)

    def column(self, *steps: Step) -> list[Tensor]:
        live = list(self.levels[-1])
        for step in steps:
            at = min(live.index(t) for t in step.inputs)
            live = [t for t in live if t not in step.inputs]
            live[at:at] = step.outputs
        self.columns.append(steps)
        self.levels.append(tuple(live))
        return [t for s in steps for t in s.outputs]

    def sheet(self, *fences: Fence) -> Sheet:
        return Sheet(tuple(self.levels), tuple(self.columns), fences)


def attention() -> Sheet:
    """Multi-head cross-attention: 13 wires of 4 + 6 + 9 + 6 + 6 + 6 + 3 + 2 in the columns."""
    d = Draft()
    x, context = d.start("y m", "x m")
    one, two = d.column(d.step("copy", [context], ["x m", "x m"]))
    q, k, v = d.column(
        d.step("linear", [x], ["y k h"], "m", name="Q"),
        d.step("linear", [one], ["x k h"], "m", name="K"),
        d.step("linear", [two], ["x k h"], "m", name="V"),
    )
    (a,) = d.column(d.step("einsum", [q, k], ["y x h"], "k"))
    (a,) = d.column(d.step("elementwise", [a], ["y x h"], sign="∗k"))
    (a,) = d.column(d.step("softmax", [a], ["y x h"], "x"))
    (a,) = d.column(d.step("einsum", [a, v], ["y k h"], "x"))
    d.column(d.step("linear", [a], ["y n"], "k h", name="O"))
    inner = frozenset(s.index for c in d.columns[2:6] for s in c)
    every = frozenset(s.index for c in d.columns for s in c)
    return d.sheet(Fence("Attention", "a", 0, 6, every, 0), Fence("Scaled Dot-Product", "a.s", 2, 5, inner, 1))


def residual(blocks: int = 1) -> Sheet:
    """Residual blocks of a convolution and a norm, with a skip connection."""
    d = Draft()
    (x,) = d.start("b c h w")
    for i in range(blocks):
        x, skip = d.column(d.step("copy", [x], ["b c h w", "b c h w"]))
        (x,) = d.column(d.step("conv", [x], [f"b n{i} h w"], "c h w", kernel_text="3", spatial=("h", "w")))
        (x,) = d.column(d.step("norm", [x], [f"b n{i} h w"], "b h w"))
        (x,) = d.column(d.step("conv", [x], ["b c h w"], f"n{i} h w", kernel_text="3", spatial=("h", "w")))
        (x,) = d.column(d.step("binary", [x, skip], ["b c h w"], what="add"))
        (x,) = d.column(d.step("elementwise", [x], ["b c h w"], function="relu"))
    return d.sheet()


SHEETS = {"attention": attention, "residual": residual, "long": lambda: residual(6)}


@pytest.mark.parametrize("name", SHEETS)
def test_lines_that_cross_each_column_are_the_axes_alive_there(name):
    sheet = ordered(SHEETS[name]())
    check = check_svg(render_svg(lay_out(SHEETS[name]())))
    counted = {c.index: (c.wires, c.dashes) for c in check.columns}
    assert counted == {k: (sum(len(t.wires) for t in v), len(v) - 1) for k, v in enumerate(sheet.levels)}
    assert check.counts_agree
    assert not check.overlaps
    assert not check.through
    assert check.clear == 1.0


def test_counts_of_attention_by_hand():
    check = check_svg(render_svg(lay_out(attention())))
    assert [c.wires for c in check.columns] == [4, 6, 9, 6, 6, 6, 3, 2]
    assert [c.dashes for c in check.columns] == [1, 2, 2, 1, 1, 1, 0, 0]
    assert check.wires == 13


def test_a_missing_or_a_doubled_wire_is_noticed():
    svg = render_svg(lay_out(attention()))
    wire = next(line for line in svg.splitlines() if 'class="wire"' in line)
    assert not check_svg(svg.replace(wire, "", 1)).counts_agree
    assert not check_svg(svg.replace(wire, wire + wire, 1)).counts_agree


def test_a_wire_through_a_box_and_labels_on_each_other_are_noticed():
    geometry = lay_out(attention())
    glyph = next(g for g in geometry.glyphs if g.kind == "softmax")
    stranger = replace(geometry.wires[0], commands=(("M", (0, glyph.box.top + 9)), ("L", (geometry.width, glyph.box.top + 9))), data={"axis": "z", "keys": "z"})  # fmt: skip
    check = check_svg(render_svg(replace(geometry, wires=(*geometry.wires, stranger))))
    assert ("z", "softmax") in check.through
    assert check.clear == pytest.approx(1 - 1 / 14)
    twice = replace(geometry, texts=(*geometry.texts, replace(geometry.texts[0], x=geometry.texts[0].x + 2)))
    assert check_svg(render_svg(twice)).overlaps == ((geometry.texts[0].text, geometry.texts[0].text),)


def test_same_bytes_and_xml():
    first, second = (render_svg(lay_out(attention()), {"a": 1}, title="x < y") for _ in range(2))
    assert first == second
    root = ElementTree.fromstring(first)
    assert svg_metadata(root)["diagram"] == {"a": 1}
    assert root.find("{http://www.w3.org/2000/svg}title").text == "x < y"
    kinds = {t.text for t in root.iter("{http://www.w3.org/2000/svg}title")}
    assert {"softmax", "einsum", "y (4)"} <= kinds


def test_a_long_drawing_is_broken_into_lines():
    check = check_svg(render_svg(lay_out(residual(6), Style(line=700))))
    assert check.width < 900
    indices = [c.index for c in check.columns]
    assert len(indices) > len(set(indices))  # the columns at the breaks are in both lines
    assert check.counts_agree


def test_wires_stay_level_where_nothing_forces_them():
    geometry = lay_out(residual())
    batch = [flattened(p.commands) for p in geometry.wires if p.role == "wire" and p.data["axis"] == "b"]
    assert len(batch) == 2
    heights = {round(y, 2) for _, y in max(batch, key=lambda points: points[-1][0])}
    # The batch runs level through both convolutions and bends only into the circle of its norm.
    assert len({y for _, y in batch[0] if y == min(heights)}) == 1


def test_inputs_of_an_operation_are_brought_together():
    d = Draft()
    a, _, c = d.start("i", "j", "k")
    d.column(d.step("concat", [c, a], ["l"], "i k"))
    sheet = ordered(d.sheet())
    assert len(sheet.columns) == 2
    assert sheet.columns[0] == ()
    assert [t.wires[0].axis for t in sheet.levels[1]] == ["k", "i", "j"]
    check = check_svg(render_svg(lay_out(d.sheet())))
    assert [c.wires for c in check.columns] == [3, 3, 2]


def test_copies_are_ordered_by_what_becomes_of_them():
    d = Draft()
    (x,) = d.start("i")
    late, soon = d.column(d.step("copy", [x], ["i", "i"]))
    (soon,) = d.column(d.step("linear", [soon], ["j"], "i"))
    d.column(d.step("einsum", [soon, late], ["j i"]))
    assert [t.key for t in ordered(d.sheet()).levels[1]] == ["t3", "t2"]


def test_heights_are_straight_on_a_grid():
    rows = Rows()
    a, b, c, d = (rows.add() for _ in range(4))
    rows.below(a, b, 20)
    rows.below(c, d, 30)
    rows.level(a, c)
    rows.level(b, d)
    y = rows.solve()
    assert list(y) == [0, 30, 0, 30]


def test_a_soft_distance_that_contradicts_a_firm_one_is_dropped():
    rows = Rows()
    a, b = rows.add(), rows.add()
    rows.below(a, b, 20)
    rows.below(b, a, 5, soft=True)
    assert list(rows.solve()) == [0, 20]


def test_widths_of_text():
    assert text_width("mm", 10) == pytest.approx(14.44)
    assert spans_width([Span("x"), Span("1", "regular", 0.7)], 10) == pytest.approx(4.44 + 3.5)
    assert [s.text for s in name_spans("n12")] == ["n", "12"]
    assert [s.text for s in name_spans("x_q")] == ["x", "q"]
    assert name_spans("512")[0].style == "regular"
    box = Text(50, 20, (Span("m"),), 10).box
    assert box.left == pytest.approx(50 - 3.61)
    assert box.overlaps(Box(50, 0, 60, 15))


def test_paths_are_read_back():
    assert parse_path("M0 1L2 3C1 2 3 4 5 6Z") == [("M", (0, 1)), ("L", (2, 3)), ("C", (1, 2, 3, 4, 5, 6)), ("Z", ())]
    with pytest.raises(ValueError, match="expected 2 numbers after L, got 1"):
        parse_path("M0 1L2")


def test_text_for_a_terminal():
    lines = render_text(lay_out(attention())).splitlines()
    assert any("Scaled Dot-Product" in line for line in lines)
    assert sum(line.count("◁") for line in lines) == 1
    assert sum(line.count("•") for line in lines) == 4  # two of the copy, and one for the heads of either product
    assert max(map(len, lines)) < 90


def test_raster():
    pytest.importorskip("resvg_py")
    png = render_png(render_svg(lay_out(attention())), width=300)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"


def test_pdf(tmp_path):
    geometry = lay_out(attention())
    document = render_pdf(geometry, title="attention")
    assert document.startswith(b"%PDF-")
    assert document == render_pdf(geometry, title="attention")
    assert b"/MediaBox [ 0 0 %d" % int(geometry.width * 0.75) in document


def test_raster_without_its_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match=r"torchfolio\[draw\]"):
        render_png("<svg/>")


@pytest.mark.parametrize(("document", "message"), [("no", "not XML"), ("<svg/>", "without metadata")])
def test_other_documents(document, message):
    with pytest.raises(ValueError, match=message):
        check_svg(document)
