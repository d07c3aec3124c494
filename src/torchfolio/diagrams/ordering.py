"""The order of tensors from top to bottom in every column, with as few crossings as possible.

Two passes, each of barycentres: from the end to the beginning, every tensor takes the place of what it becomes; from
the beginning to the end, results take the place of what they come from, those of one operation sorted by the first
pass. Where an operation needs tensors side by side that are not, a column of crossings is put before it.
"""

from __future__ import annotations

from dataclasses import replace

from torchfolio.diagrams.sheet import Fence, Sheet, Step, Tensor

COMMUTES = {"binary", "einsum"}
"""Kinds of operations whose inputs may stand in any order."""


def ordered(sheet: Sheet) -> Sheet:
    """The same diagram with its tensors in a good order and crossings in columns of their own."""
    ranks = _backwards(sheet)
    levels: list[tuple[Tensor, ...]] = [sheet.levels[0]]
    columns: list[tuple[Step, ...]] = []
    place: list[int] = []  # where each of the given columns has come to stand
    for steps, rank in zip(sheet.columns, ranks[1:], strict=True):
        gathered = _gathered(levels[-1], steps)
        if [t.key for t in gathered] != [t.key for t in levels[-1]]:
            columns.append(())
            levels.append(gathered)
        place.append(len(columns))
        columns.append(steps)
        levels.append(_after(gathered, steps, rank))
    goal = tuple(sheet.levels[-1])
    if [t.key for t in levels[-1]] != [t.key for t in goal]:
        columns.append(())
        levels.append(goal)
    fences = tuple(_shifted(f, place) for f in sheet.fences)
    return replace(sheet, levels=tuple(levels), columns=tuple(columns), fences=fences)


def _shifted(fence: Fence, place: list[int]) -> Fence:
    return replace(fence, first=place[fence.first], last=place[fence.last])


def _backwards(sheet: Sheet) -> list[dict[str, float]]:
    """For every level the wished place of each tensor: that of what it becomes."""
    ranks = [{t.key: float(i) for i, t in enumerate(sheet.levels[-1])}]
    for level, steps in zip(reversed(sheet.levels[:-1]), reversed(sheet.columns), strict=True):
        later = ranks[-1]
        wish: dict[str, tuple[float, int]] = {t.key: (later[t.key], 0) for t in level if t.key in later}
        for step in steps:
            places = [later[t.key] for t in step.outputs if t.key in later] or [0.0]
            centre = sum(places) / len(places)
            wish |= {t.key: (centre, i) for i, t in enumerate(step.inputs)}
        keys = sorted((t.key for t in level), key=lambda k: wish.get(k, (0.0, 0)))
        ranks.append({key: float(i) for i, key in enumerate(keys)})
    return ranks[::-1]


def _gathered(level: tuple[Tensor, ...], steps: tuple[Step, ...]) -> tuple[Tensor, ...]:
    """An order in which the inputs of every operation stand side by side."""
    order = list(level)
    for step in steps:
        if len(step.inputs) < 2:
            continue
        keys = [t.key for t in step.inputs]
        at = [next(i for i, t in enumerate(order) if t.key == key) for key in keys]
        side_by_side = max(at) - min(at) == len(at) - 1
        if side_by_side and (step.kind in COMMUTES or at == sorted(at)):
            continue
        chosen = [order[i] for i in (sorted(at) if step.kind in COMMUTES else at)]
        # The inputs meet where the first of them stands, the others move up to it.
        rest = [t for t in order if t.key not in keys]
        before = sum(t.key not in keys for t in order[: min(at)])
        order = [*rest[:before], *chosen, *rest[before:]]
    return tuple(order)


def _after(level: tuple[Tensor, ...], steps: tuple[Step, ...], rank: dict[str, float]) -> tuple[Tensor, ...]:
    """The order after the operations: their results stand where the first of their inputs stood."""
    owner = {t.key: step for step in steps for t in step.inputs}
    result: list[Tensor] = []
    done: set[int] = set()
    for tensor in level:
        step = owner.get(tensor.key)
        if step is None:
            result.append(tensor)
        elif step.index not in done:
            done.add(step.index)
            outputs = list(step.outputs)
            if step.kind == "copy":
                outputs.sort(key=lambda t: rank.get(t.key, 0.0))
            result += outputs
    for made in (t for step in steps if not step.inputs for t in step.outputs):  # from memory: beside what it goes to
        before = [
            (rank.get(t.key, 0.0), i) for i, t in enumerate(result) if rank.get(t.key, 0.0) < rank.get(made.key, 0.0)
        ]
        result.insert(max(before)[1] + 1 if before else len(result), made)
    return tuple(result)
