"""From what was read of a graph to a sheet: copies where a tensor is used twice, columns, names, fences."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torchfolio.diagrams.fonts import Span, name_spans
from torchfolio.diagrams.graph import Draft, Graph, Value
from torchfolio.diagrams.repeats import fold_repeats
from torchfolio.diagrams.sheet import Fence, Sheet, Step, Tensor, Wire
from torchfolio.errors import TorchfolioError

TOGETHER = 5
"""Uses of a tensor that are at most so many operations apart are served by one copy."""


@dataclass(frozen=True)
class View:
    """What of a graph is drawn.

    Attributes:
        depth: of the modules that become boxes, 0 for the children of the module; None for none.
        opened: paths of modules that are drawn out nevertheless.
        repeats: copies of a part from which they are drawn as one, between parentheses; 0 for never.
        batch: whether the first axis of the first input has wires.
    """

    depth: int | None = None
    opened: tuple[str, ...] = ()
    repeats: int = 0
    batch: bool = True


def assemble(graph: Graph, title: str, view: View | None = None) -> Sheet:
    """Put operations into columns.

    Args:
        graph: what is drawn; it stays as it is.
        title: of the drawing.
        view: what of it is drawn; every operation by default.

    Raises:
        TorchfolioError: if the batch is to be hidden and an operation is about it.
    """
    view = view or View()
    graph = graph.copy()
    steps, outputs = _without_views(graph, graph.alive())
    repeats: dict[str, int] = {}
    if view.repeats:
        steps, repeats = fold_repeats(graph, steps, outputs, view.repeats)
    hidden = _hidden(graph, steps) if not view.batch else set()
    names = _names(graph, steps)
    if view.depth is not None:
        steps = _folded(steps, outputs, view.depth, view.opened)
    steps = _with_copies(steps, graph.inputs, outputs)
    return _Assembly(graph, steps, outputs, names, title, repeats, hidden).sheet()


def _hidden(graph: Graph, steps: list[Draft]) -> set[int]:
    """The batch, if no operation but a bar is about it."""
    batch = {graph.find(graph.inputs[0].axes[0])} if graph.inputs and graph.inputs[0].axes else set[int]()
    for step in steps:
        if batch & {graph.find(a) for a in step.core} and step.kind not in ("reshape", "view", "transpose", "block"):
            raise TorchfolioError(
                f"the batch cannot be hidden: the {step.kind} of {step.stack[-1:] or 'the network'} is about it"
            )
    return batch


def _without_views(graph: Graph, steps: list[Draft]) -> tuple[list[Draft], list[Value]]:
    """Without operations that change nothing that is drawn; their results are uses of what they took."""
    kept = []
    for step in steps:
        moves = step.kind in ("view", "transpose")
        if moves and graph.visible(step.outputs[0]) == graph.visible(step.inputs[0]):
            step.outputs[0].origin = step.inputs[0]
        else:
            kept.append(step)
    return kept, graph.outputs


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


def _with_copies(steps: list[Draft], inputs: list[Value], outputs: list[Value]) -> list[Draft]:
    """With an explicit copy wherever a tensor is used more than once."""
    uses: dict[int, list[tuple[int, Value]]] = defaultdict(list)
    for i, step in enumerate(steps):
        for value in step.inputs:
            uses[id(value.root)].append((i, value))
    for value in outputs:
        uses[id(value.root)].append((len(steps), value))
    before: dict[int, list[Draft]] = defaultdict(list)
    made = [*inputs, *(o for s in steps for o in s.outputs)]
    for value in made:
        if id(value) not in uses:
            continue
        source, rest = value, uses[id(value)]
        while len(rest) > 1:
            first = rest[0][0]
            group = [u for u in rest if u[0] - first <= TOGETHER]
            group = rest if len(rest) - len(group) <= 1 else group
            rest = rest[len(group) :]
            results = [v for _, v in group]
            if rest:
                keep = Value(list(source.axes), source)
                results.append(keep)
            stack = steps[first].stack if first < len(steps) else ()
            common = [s.stack for s in (steps[i] for i, _ in group if i < len(steps))]
            stack = _common([stack, *common]) if not rest and group[-1][0] < len(steps) else ()
            times = min((steps[i].times for i, _ in group if i < len(steps)), default=1) if stack else 1
            before[first].append(Draft("copy", [source], results, stack=stack, times=times))
            if rest:
                source = keep
        if len(rest) == 1 and rest[0][1] is not source:
            _alias(rest[0][1], source)
    ordered = []
    for i in range(len(steps) + 1):
        ordered += before[i]
        ordered += steps[i : i + 1]
    return ordered


def _alias(use: Value, source: Value) -> None:
    use.origin = source


def _common(stacks: list[tuple[tuple[str, str], ...]]) -> tuple[tuple[str, str], ...]:
    result = []
    for level in zip(*stacks, strict=False):
        if len(set(level)) > 1:
            break
        result.append(level[0])
    return tuple(result)


def _names(graph: Graph, steps: list[Draft]) -> dict[int, str]:
    """A name for every axis, no two alike, in the order in which they appear."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    values = [*graph.inputs, *(v for s in steps for v in (*s.inputs, *s.outputs))]
    paired = _pairs(graph, values)
    for axis in (a for value in values for a in graph.visible(value)):
        if axis in names:
            continue
        base = graph.name[axis] or "a"
        if graph.named and base not in taken:
            names[axis] = base
            taken.add(base)
            continue
        partner = next((names[p] for p in sorted(paired.get(axis, ())) if p in names), "")
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
        outputs: list[Value],
        names: dict[int, str],
        title: str,
        repeats: dict[str, int],
        hidden: set[int],
    ) -> None:
        self.graph, self.steps, self.outputs, self.names, self.title = graph, steps, outputs, names, title
        self.repeats, self.hidden = repeats, hidden
        self.tensors: dict[int, Tensor] = {}
        self.numbers = itertools.count(1)
        values = [*graph.inputs, *(v for s in steps for v in (*s.inputs, *s.outputs))]
        self.pairs = _pairs(graph, values)

    def base(self, value: Value) -> Value:
        """The tensor that is drawn for a use: the result of a copy or of another operation, or an input."""
        while id(value) not in self.sources and value.origin is not None:
            value = value.origin
        return value

    def sheet(self) -> Sheet:
        self.sources = {id(v) for v in [*self.graph.inputs, *(o for s in self.steps for o in s.outputs)]}
        used = [*(v for s in self.steps for v in s.inputs), *self.outputs]
        self.wanted = {id(self.base(v)) for v in used}
        column: dict[int, int] = {}
        ready: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            column[i] = max((ready.get(id(self.base(v)), 0) for v in step.inputs), default=0)
            ready |= {id(o): column[i] + 1 for o in step.outputs}
            if step.kind == "binary" and step.params.get("what") in ("add", "mul"):  # a skip connection runs below
                step.inputs.sort(key=lambda v: -ready.get(id(self.base(v)), 0))
        count = max(column.values(), default=-1) + 1
        columns: list[list[Step]] = [[] for _ in range(count)]
        for i, step in enumerate(self.steps):
            columns[column[i]].append(self._step(i, step))
        levels = self._levels(columns)
        ends = (tuple(map(self._tensor, values)) for values in (self.graph.inputs, self.graph.outputs))
        fences, legend = tuple(self._fences(column)), tuple(self._legend())
        return Sheet(levels, tuple(map(tuple, columns)), fences, self.title, legend, *ends)

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
        shapes = [
            " ".join(f"{''.join(s.text for s in w.label) or 'w'}={w.size}" for w in t.wires)
            for t in (*inputs, *outputs)
        ]
        arrow = f"{', '.join(shapes[: len(inputs)])} → {', '.join(shapes[len(inputs) :])}"
        title = " ".join(x for x in (step.kind, arrow, f"{path} ({kind})" if path else "") if x)
        return Step(
            index,
            step.kind,
            inputs,
            outputs,
            self._through(step, inputs, outputs, core),
            core,
            params,
            step.learned,
            title,
            path,
            step.times,
        )

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
