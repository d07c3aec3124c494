"""From what was read of a graph to a sheet: copies where a tensor is used twice, columns, names, fences.

Longer than most because folding, names, columns and fences are decided on the same operations.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torchfolio.diagrams.fonts import Span, name_spans
from torchfolio.diagrams.graph import Draft, Graph, Value
from torchfolio.diagrams.memory import with_copies
from torchfolio.diagrams.repeats import fold_repeats
from torchfolio.diagrams.sheet import Fence, Sheet, Step, Tensor, Wire
from torchfolio.diagrams.simplify import simplified, without_views
from torchfolio.errors import TorchfolioError


@dataclass(frozen=True)
class View:
    """What of a graph is drawn.

    Attributes:
        depth: depth of the modules that become boxes, 0 for the children of the module; None for none.
        opened: paths of modules that are drawn out nevertheless.
        repeats: copies of a part from which they are drawn as one, between parentheses; 0 for never.
        batch: whether the first axis of the first input has wires.
        memory: whether what is used far away is named and picked up there, not drawn across.
    """

    depth: int | None = None
    opened: tuple[str, ...] = ()
    repeats: int = 0
    batch: bool = True
    memory: bool = True


def assemble(graph: Graph, title: str, view: View | None = None) -> Sheet:
    """Put operations into columns.

    Args:
        graph: operations; they stay as they are.
        title: heading of the drawing.
        view: parts that are drawn; every operation by default.

    Raises:
        TorchfolioError: if the batch is to be hidden and an operation is about it.
    """
    view = view or View()
    graph = graph.copy()
    steps = without_views(graph, graph.alive())
    repeats: dict[str, int] = {}
    if view.repeats:
        steps, repeats = fold_repeats(graph, steps, graph.outputs, view.repeats)
    steps = simplified(graph, steps)
    hidden = _hidden(graph, steps) if not view.batch else set()
    values = [*graph.inputs, *(v for s in steps for v in (*s.inputs, *s.outputs))]
    pairs = _pairs(graph, values)
    names = _names(graph, values, pairs)
    if view.depth is not None:
        steps = _folded(steps, graph.outputs, view.depth, view.opened)
    steps = with_copies(graph, steps, view.memory)
    return _Assembly(graph, steps, names, pairs, title, repeats, hidden).sheet()


def _hidden(graph: Graph, steps: list[Draft]) -> set[int]:
    """The batch, if no operation but a bar is about it."""
    batch = {graph.find(graph.inputs[0].axes[0])} if graph.inputs and graph.inputs[0].axes else set[int]()
    for step in steps:
        if batch & {graph.find(a) for a in step.core} and step.kind not in ("reshape", "view", "transpose", "block"):
            raise TorchfolioError(
                f"the batch cannot be hidden: the {step.kind} of {step.stack[-1:] or 'the network'} is about it"
            )
    return batch


def _folded(steps: list[Draft], outputs: list[Value], depth: int, opened: tuple[str, ...]) -> list[Draft]:
    """With a box in place of every module at a depth that holds several operations side by side."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        paths = [path for path, _ in step.stack]
        if any(path in opened for path in paths):
            continue
        at = next((d for d in range(depth, len(paths)) if not _holds(paths[d], opened)), None)
        if at is not None:
            groups[paths[at], at].append(i)
    uses: dict[int, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        for value in step.inputs:
            uses[id(value.root)].append(i)
    leaving = {id(v.root) for v in outputs}
    result: list[Draft | None] = list(steps)
    for (path, at), members in groups.items():
        if len(members) < 2 or members[-1] - members[0] != len(members) - 1:
            continue
        inside = [steps[i] for i in members]
        own = set(members)
        made = {id(o) for s in inside for o in s.outputs}
        results = [
            o for s in inside for o in s.outputs if id(o) in leaving or any(i not in own for i in uses.get(id(o), ()))
        ]
        taken: dict[int, Value] = {}
        for value in (v for s in inside for v in s.inputs if id(v.root) not in made):
            taken.setdefault(id(value.root), value)
        kind = inside[0].stack[at][1]
        axes = {a for v in (*taken.values(), *results) for a in v.axes}
        text = f"{kind}\n{path.rsplit('.', 1)[-1]}"
        learned = any(s.learned for s in inside)
        result[members[-1]] = Draft(
            "block", list(taken.values()), results, axes, {"text": text}, learned, inside[0].stack[: at + 1],
            times=inside[0].times,
        )  # fmt: skip
        for i in members[:-1]:
            result[i] = None
    return [s for s in result if s is not None]


def _holds(path: str, others: tuple[str, ...]) -> bool:
    """Whether a module is around one of others."""
    return any(other.startswith(f"{path}.") for other in others)


def _names(graph: Graph, values: list[Value], pairs: Mapping[int, set[int]]) -> dict[int, str]:
    """A name for every axis, no two alike, in the order in which they appear."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for axis in (a for value in values for a in graph.visible(value)):
        if axis in names:
            continue
        base = graph.name[axis] or "a"
        if graph.named and base not in taken:
            names[axis] = base
            taken.add(base)
            continue
        partner = next((names[p] for p in sorted(pairs.get(axis, ())) if p in names), "")
        if partner and base + partner[1:] not in taken:  # h2 goes with w2
            names[axis] = base + partner[1:]
        else:
            numbers = {"x": ["x", "y", "z"], "n": []}.get(base, [base])
            names[axis] = next(
                n for n in itertools.chain(numbers, (f"{base}{i}" for i in itertools.count(1))) if n not in taken
            )
        taken.add(names[axis])
    return names


def _pairs(graph: Graph, values: list[Value]) -> dict[int, set[int]]:
    """Of every axis that is the width of an image the axes that are its height."""
    pairs: dict[int, set[int]] = defaultdict(set)
    for value in values:
        axes = graph.visible(value)
        for a, b in itertools.pairwise(axes):
            if graph.name[a] == "h" and graph.name[b] == "w":
                pairs[b].add(a)
    return pairs


class _Assembly:
    """Columns, tensors and fences of operations in order."""

    def __init__(
        self,
        graph: Graph,
        steps: list[Draft],
        names: dict[int, str],
        pairs: Mapping[int, set[int]],
        title: str,
        repeats: dict[str, int],
        hidden: set[int],
    ) -> None:
        self.graph, self.steps, self.outputs, self.title = graph, steps, graph.outputs, title
        self.names, self.pairs, self.repeats, self.hidden = names, pairs, repeats, hidden
        self.tensors: dict[int, Tensor] = {}
        self.numbers = itertools.count(1)

    def base(self, value: Value) -> Value:
        """The tensor that is drawn for a use: the result of a copy or of another operation, or an input."""
        while id(value) not in self.sources and value.origin is not None:
            value = value.origin
        return value

    def sheet(self) -> Sheet:
        self.sources = {id(v) for v in [*self.graph.inputs, *(o for s in self.steps for o in s.outputs)]}
        used = [*(v for s in self.steps for v in s.inputs), *self.outputs]
        self.wanted = {id(self.base(v)) for v in used}
        column = self._columns()
        count = max(column.values(), default=-1) + 1
        columns: list[list[Step]] = [[] for _ in range(count)]
        for i, step in enumerate(self.steps):
            columns[column[i]].append(self._step(i, step))
        levels = self._levels(columns)
        ends = (tuple(map(self._tensor, values)) for values in (self.graph.inputs, self.graph.outputs))
        fences, legend = tuple(self._fences(column)), tuple(self._legend())
        return Sheet(levels, tuple(map(tuple, columns)), fences, self.title, legend, *ends)

    def _columns(self) -> dict[int, int]:
        """The column of every operation: after what it needs, and after all that its module needs of others.

        What comes from memory, and what needs nothing else, is late: just before it is used.
        """
        maker = {id(o): i for i, s in enumerate(self.steps) for o in s.outputs}
        saver = {s.params["index"]: i for i, s in enumerate(self.steps) if s.kind == "save"}
        inside: dict[str, list[int]] = defaultdict(list)
        needs: list[list[int]] = []
        for i, step in enumerate(self.steps):
            needs.append([maker[k] for v in step.inputs if (k := id(self.base(v))) in maker])
            if step.kind != "save" and "index" in step.params:
                needs[i].append(saver[step.params["index"]])
            for path, _ in step.stack:
                inside[path].append(i)
        floor: dict[str, int] = {}
        column: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            paths = [p for p, _ in step.stack if len(inside[p]) > 1]
            for path in paths:
                if path not in floor:
                    before = [
                        column[j] for k in inside[path] for j in needs[k] if j in column and j not in inside[path]
                    ]
                    floor[path] = max(before, default=-1) + 1
            column[i] = max([*(column[j] + 1 for j in needs[i]), *(floor[p] for p in paths)], default=0)
            if step.kind == "binary" and step.params.get("what") in ("add", "mul"):  # a skip connection runs below
                step.inputs.sort(key=lambda v: -column.get(maker.get(id(self.base(v)), -1), -1))
        users: dict[int, list[int]] = defaultdict(list)
        loose = set[int]()
        for i, step in enumerate(self.steps):
            made = all(id(self.base(v)) in maker for v in step.inputs)
            if step.kind == "load" or (made and needs[i] and loose.issuperset(needs[i])):
                loose.add(i)
            for j in needs[i]:
                users[j].append(i)
        for i in reversed(range(len(self.steps))):
            if i in loose and users[i]:
                column[i] = min(column[j] for j in users[i]) - 1
        return column

    def _tensor(self, value: Value) -> Tensor:
        value = self.base(value)
        if id(value) not in self.tensors:
            key = f"t{next(self.numbers)}"
            axes = [a for a in self.graph.visible(value) if a not in self.hidden]
            heads = {a for a, b in itertools.pairwise(axes) if a in self.pairs.get(b, ())}
            wires = []
            for i, axis in enumerate(axes):
                twin = i > 0 and axes[i - 1] in self.pairs.get(axis, ())
                label = self._label(axis, axis in heads)
                size = str(self.graph.size[axis])
                wires.append(Wire(f"{key}.{i}", f"a{axis}", label, size, twin, axis in heads, self.names[axis]))
            self.tensors[id(value)] = Tensor(key, tuple(wires))
        return self.tensors[id(value)]

    def _label(self, axis: int, group: bool) -> tuple[Span, ...]:
        name = self.names[axis]
        return name_spans("x" + name[1:], style="bold", over=True) if group else name_spans(name)

    def _step(self, index: int, step: Draft) -> Step:
        inputs = tuple(map(self._tensor, step.inputs))
        outputs = tuple(self._tensor(o) for o in step.outputs if id(o) in self.wanted)
        core = frozenset(f"a{self.graph.find(a)}" for a in step.core)
        params = dict(step.params)
        if "spatial" in params:
            params["spatial"] = {f"a{self.graph.find(a)}" for a in params["spatial"]}
        path, kind = step.stack[-1] if step.stack else ("", "")
        shapes = (
            (" ".join(f"{''.join(s.text for s in w.label) or 'w'}={w.size}" for w in t.wires) for t in side)
            for side in (inputs, outputs)
        )
        arrow = " → ".join(map(", ".join, shapes))
        title = " ".join(x for x in (step.kind, arrow, f"{path} ({kind})" if path else "") if x)
        through = self._through(step, inputs, outputs, core)
        told = (core, params, step.learned, title, path, step.times)
        return Step(index, step.kind, inputs, outputs, through, *told)

    def _through(
        self, step: Draft, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], core: frozenset[str]
    ) -> tuple[tuple[str, str], ...]:
        if step.kind == "copy":
            return tuple((a.key, b.key) for a, b in zip(inputs[0].wires, outputs[0].wires, strict=True))
        ends = core if step.kind in ("conv", "pool") and step.params.get("stride_text") else frozenset()
        free = [w for t in outputs for w in t.wires if w.axis not in ends]
        pairs = []
        for wire in (w for t in inputs for w in t.wires):
            after = next((w for w in free if w.axis == wire.axis), None)
            if after is not None:
                free.remove(after)
                pairs.append((wire.key, after.key))
        return tuple(pairs)

    def _levels(self, columns: list[list[Step]]) -> tuple[tuple[Tensor, ...], ...]:
        level = [self._tensor(v) for v in self.graph.inputs]
        wanted = {t.key for c in columns for s in c for t in s.inputs} | {self._tensor(v).key for v in self.outputs}
        level = [t for t in level if t.key in wanted]
        levels = [tuple(level)]
        for steps in columns:
            for step in steps:
                keys = [t.key for t in step.inputs]
                at = min((i for i, t in enumerate(level) if t.key in keys), default=len(level))
                level = [t for t in level if t.key not in keys]
                level[at:at] = [t for t in step.outputs if t.key in wanted]
            levels.append(tuple(level))
        return tuple(levels)

    def _fences(self, column: dict[int, int]) -> Iterator[Fence]:
        inside: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, step in enumerate(self.steps):
            for entry in step.stack:
                inside[entry].append(i)
        kept = {e: members for e, members in inside.items() if len(members) > 1 or e[0] in self.repeats}
        sets = {e: frozenset(m) for e, m in kept.items()}
        for entry in list(kept):  # a module that holds the same as one around it says nothing new
            if entry[0] not in self.repeats and any(
                sets[other] == sets[entry] and len(other[0]) > len(entry[0]) for other in kept
            ):
                del kept[entry]
        for (path, kind), members in sorted(kept.items(), key=lambda e: e[0][0]):
            depth = sum(sets[path, kind] < sets[other] for other in kept)
            places = [column[i] for i in members]
            yield Fence(kind, path, min(places), max(places), frozenset(members), depth, self.repeats.get(path, 1))

    def _legend(self) -> Iterator[tuple[tuple[Span, ...], str]]:
        seen: dict[tuple[str, ...], str] = {}
        for tensor in self.tensors.values():
            for i, wire in enumerate(tensor.wires):
                if wire.twin:
                    continue
                size = wire.size if not wire.heads else f"{wire.size}×{tensor.wires[i + 1].size}"
                text = tuple(s.text for s in wire.label)
                if text not in seen:
                    seen[text] = size
                    yield wire.label, size
