"""Branch and bound over boxes of inputs: halves of a box are bounded until every one is decided."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.robustness.bound_verifiers import Crown, searched
from torchfolio.robustness.layer_list import Layers
from torchfolio.robustness.properties import Box, Property, Verdict

__all__ = ["CrownSplit"]


class CrownSplit(Crown):
    """CROWN on ever smaller boxes: a box that is not verified is halved across the coordinate of most influence.

    The search begins with PGD. Boxes of least bound come first; of each the centre and the corner that the linear bound
    points to are tried. Complete in the limit: with time every property is decided, but for ties.

    Args:
        batch: boxes that are bounded at once.
        max_boxes: number of boxes after which the answer is unknown.
        attack_steps: number of steps of PGD in the beginning, from 32 starts; 0 leaves it out.
        intermediate: way to bound the inputs of activations, see `crown`.
        alpha_steps: number of steps on the slopes, see `crown`.
        dtype: dtype of the bounds, see `Interval`.
    """

    name = "crown+split"

    def __init__(
        self,
        batch: int = 256,
        max_boxes: int | None = None,
        attack_steps: int = 50,
        intermediate: str = "crown",
        alpha_steps: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(intermediate, alpha_steps, dtype)
        self.batch, self.attack_steps = whole("batch", batch, 1), whole("attack_steps", attack_steps, 0)
        self.max_boxes = None if max_boxes is None else whole("max_boxes", max_boxes, 0)

    def keep(self, boxes: Box) -> Tensor:
        """Which of the halves are looked at further, bool `[B]`."""
        return torch.ones(len(boxes), dtype=torch.bool, device=boxes.lower.device)

    def _decide(self, model: nn.Module, box: Box, prop: Property, deadline: float) -> Verdict:
        box = self.shrink(box)
        witness = searched(model, box, prop, self.attack_steps) if self.attack_steps else None
        if witness is not None:
            return Verdict("falsified", witness)
        layers = Layers(model, box.lower.shape[1:])
        queue = _Queue(box)
        seen = 0
        while len(queue):
            if time.perf_counter() > deadline or (self.max_boxes is not None and seen >= self.max_boxes):
                return Verdict("unknown", boxes=seen)
            boxes = queue.pop(self.batch)
            seen += len(boxes)
            bounds = self.bounds(layers, boxes, prop)
            open_ = ~prop.holds(bounds.lower)
            if not bool(open_.any()):
                continue
            assert bounds.A is not None
            boxes, lower, A = boxes[open_], bounds.lower[open_], bounds.A[open_]
            witness = _tried(model, boxes, prop, lower, A)
            if witness is not None:
                return Verdict("falsified", witness, boxes=seen)
            halves, order = _halved(boxes, prop, lower, A)
            if halves is None:
                return Verdict("unknown", boxes=seen)
            open_halves = self.keep(halves)
            queue.push(halves[open_halves], order[open_halves])
        return Verdict("verified", boxes=seen)


class _Queue:
    """Boxes, taken in the order of their bounds, the least first."""

    def __init__(self, box: Box) -> None:
        self.boxes, self.order = box, box.lower.new_zeros(1)

    def __len__(self) -> int:
        return len(self.boxes)

    def push(self, boxes: Box, order: Tensor) -> None:
        self.boxes, self.order = Box.cat([self.boxes, boxes]), torch.cat([self.order, order])

    def pop(self, count: int) -> Box:
        index = self.order.argsort(stable=True)
        boxes, left = self.boxes[index[:count]], index[count:]
        self.boxes, self.order = self.boxes[left], self.order[left]
        return boxes


def _worst(prop: Property, lower: Tensor) -> tuple[Tensor, Tensor]:
    """The row that holds up each box, the best one of its worst group, and its bound, `[B]`."""
    groups = prop.by_group(lower)
    value, group = groups.min(1)
    inside = prop.groups.to(lower.device)[None] == group[:, None]
    row = torch.where(inside, lower, -torch.inf).argmax(1)
    return row, value


def _halved(boxes: Box, prop: Property, lower: Tensor, A: Tensor) -> tuple[Box | None, Tensor]:
    """Both halves of every box, across the coordinate on which its bound depends most, and their places in the queue."""
    row, value = _worst(prop, lower)
    influence = (A[torch.arange(len(A)), row].abs() * (boxes.upper - boxes.lower)).flatten(1)
    # Where the bound depends on nothing any more, the widest coordinate.
    width = (boxes.upper - boxes.lower).flatten(1)
    influence = torch.where(influence.amax(1, keepdim=True) > 0, influence, width)
    axis = influence.argmax(1, keepdim=True)
    low, high = boxes.lower.flatten(1), boxes.upper.flatten(1)
    middle = (low.gather(1, axis) + high.gather(1, axis)) / 2
    if bool(((middle <= low.gather(1, axis)) | (middle >= high.gather(1, axis))).all()):
        return None, value  # no number lies between the ends any more
    shape = boxes.lower.shape
    left = Box(boxes.lower, high.scatter(1, axis, middle).view(shape))
    right = Box(low.scatter(1, axis, middle).view(shape), boxes.upper)
    return Box.cat([left, right]), torch.cat([value, value])


@torch.no_grad()
def _tried(model: nn.Module, boxes: Box, prop: Property, lower: Tensor, A: Tensor) -> Tensor | None:
    """A violating input among the centres and the corners that the bounds point to."""
    row, _ = _worst(prop, lower)
    down = A[torch.arange(len(A)), row] > 0
    corners = torch.where(down, boxes.lower, boxes.upper)
    points = torch.cat([boxes.center, corners])
    hits = prop.violated(model(points)).nonzero()[:, 0]
    return points[hits[0]] if len(hits) else None
