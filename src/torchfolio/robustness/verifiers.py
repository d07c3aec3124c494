"""Verifiers: whether a property holds on a whole box of inputs.

- `Interval`, `Crown`: by bounds of the whole box;
- `CrownSplit`: by bounds of ever smaller boxes, complete in the limit, for inputs of few coordinates
  (`torchfolio.robustness.relu_split.ReluSplit` is for wide ones);
- `milp_verify`: exact, for small ReLU networks.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.measure import untouched
from torchfolio.robustness.affine_layers import Affine, matrix_of
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.bounds import crown
from torchfolio.robustness.interval_bounds import Bounds, Range, ibp
from torchfolio.robustness.layer_list import Layers, Mark
from torchfolio.robustness.pooling_bounds import MaxPool
from torchfolio.robustness.preactivation_bounds import activation_ranges
from torchfolio.robustness.properties import Box, Property, Verdict, classification

__all__ = ["Crown", "CrownSplit", "Interval", "exact_copy", "milp_verify", "searched"]


class Interval:
    """A verifier by interval bounds of the whole box: sound, never falsifies by more than trying the centre.

    Args:
        dtype: that bounds are computed in. Bounds are lowered by what their rounding may be, 1e-12 in float64 and 1e-5
            in float32 of the absolute values that were summed.
    """

    name = "interval"

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.rounding = 1e-12 if dtype == torch.float64 else 1e-5

    def verify(self, model: nn.Module, lower: Tensor, upper: Tensor, label: int, timeout: float = 60.0) -> Verdict:
        """Whether all inputs between `lower` and `upper`, of one input's shape, have the label."""
        box = Box(lower[None], upper[None])
        with untouched(model, training=False), torch.no_grad():
            classes = model(box.center.to(next(model.parameters()).dtype)).shape[1]
        return self.decide(model, box, classification(label, classes), timeout)

    def decide(self, model: nn.Module, box: Box, prop: Property, timeout: float = 60.0) -> Verdict:
        """Whether a property holds on one box.

        Args:
            model: the network, left as it is.
            box: one box of inputs.
            prop: the property.
            timeout: seconds, of verifiers that search.
        """
        if len(box) != 1:
            raise ValueError(f"expected one box, got {len(box)}")
        started = time.perf_counter()
        exact = exact_copy(model, self.dtype)
        _fits(exact, box.to(self.dtype), prop)
        verdict = self._decide(exact, box.to(self.dtype), prop, started + timeout)
        if verdict.witness is not None and not self._confirmed(exact, box, prop, verdict.witness):
            verdict = Verdict("unknown", None, verdict.seconds, verdict.boxes)
        return Verdict(verdict.status, verdict.witness, time.perf_counter() - started, verdict.boxes)

    @torch.no_grad()
    def _confirmed(self, model: nn.Module, box: Box, prop: Property, witness: Tensor) -> bool:
        inside = bool(box.to(self.dtype).contains(witness[None]).all())
        return inside and bool(prop.violated(model(witness[None]))[0])

    def _decide(self, model: nn.Module, box: Box, prop: Property, deadline: float) -> Verdict:
        with torch.no_grad():
            bounds = ibp(model, box, prop, rounding=self.rounding)
        assert isinstance(bounds, Bounds)
        return self._judge(model, box, prop, bounds)

    def _judge(self, model: nn.Module, box: Box, prop: Property, bounds: Bounds) -> Verdict:
        if bool(prop.holds(bounds.lower)[0]):
            return Verdict("verified", boxes=1)
        with torch.no_grad():
            found = prop.violated(model(box.center))
        return Verdict("falsified", box.center[0], boxes=1) if bool(found[0]) else Verdict("unknown", boxes=1)


class Crown(Interval):
    """A verifier by CROWN bounds of the whole box.

    Args:
        intermediate: see `crown`.
        alpha_steps: see `crown`.
        dtype: see `Interval`.

    A subclass may change what the verifier believes in `shrink` and `adjust`; this class changes nothing.
    """

    name = "crown"

    def __init__(self, intermediate: str = "crown", alpha_steps: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self.intermediate, self.alpha_steps = intermediate, whole("alpha_steps", alpha_steps, 0)

    def shrink(self, box: Box) -> Box:
        """The box that is looked at in the place of the one that was asked for."""
        return box

    def adjust(self, low: Tensor, high: Tensor) -> Range:
        """The bounds of the inputs of an activation that are used in the place of those found."""
        return low, high

    def bounds(self, layers: Layers, box: Box, prop: Property) -> Bounds:
        with torch.no_grad():
            return crown(
                layers, box, prop, intermediate=self.intermediate, alpha_steps=self.alpha_steps, adjust=self.adjust,
                rounding=self.rounding,
            )  # fmt: skip

    def _decide(self, model: nn.Module, box: Box, prop: Property, deadline: float) -> Verdict:
        box = self.shrink(box)
        return self._judge(model, box, prop, self.bounds(Layers(model, box.lower.shape[1:]), box, prop))


class CrownSplit(Crown):
    """CROWN on ever smaller boxes: a box that is not verified is halved across the coordinate of most influence.

    The search begins with PGD. Boxes of least bound come first; of each the centre and the corner that the linear bound
    points to are tried. Complete in the limit: with time every property is decided, but for ties.

    Args:
        batch: boxes that are bounded at once.
        max_boxes: after which the answer is unknown.
        attack_steps: of PGD in the beginning, from 32 starts; 0 leaves it out.
        intermediate: see `crown`.
        alpha_steps: see `crown`.
        dtype: see `Interval`.
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
            kept = self.keep(halves)
            queue.push(halves[kept], order[kept])
        return Verdict("verified", boxes=seen)


def exact_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy in evaluation mode; NaN and infinity are refused, of which no bound says anything."""
    exact = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    for name, value in [*exact.named_parameters(), *exact.named_buffers()]:
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"expected a network of finite numbers, got NaN or infinity in {name}")
    return exact


@torch.no_grad()
def _fits(model: nn.Module, box: Box, prop: Property) -> None:
    """That the property is one of the network's outputs."""
    outputs = tuple(model(box.center).shape[1:])
    if outputs != (prop.C.shape[1],):
        raise ValueError(f"expected a property of the outputs {outputs}, got one of {prop.C.shape[1]}")


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
        taken, left = self.boxes[index[:count]], index[count:]
        self.boxes, self.order = self.boxes[left], self.order[left]
        return taken


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


def searched(model: nn.Module, box: Box, prop: Property, steps: int) -> Tensor | None:
    """A violating input by PGD on the box, measured in its radii."""
    center, radius = box.center, box.radius

    def scaled(u: Tensor) -> Tensor:
        return model(torch.minimum(torch.maximum(center + radius * u, box.lower), box.upper))

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        return -prop.by_group(prop.slack(outputs)).amin(1)

    zeros, label = torch.zeros_like(center), torch.zeros(1, dtype=torch.long, device=center.device)
    generator = torch.Generator(center.device).manual_seed(0)
    settings = {"eps": 1.0, "alpha": torch.linspace(0.5, 0.02, steps), "steps": steps, "restarts": 32}
    found = pgd(scaled, zeros, label, loss=loss, generator=generator, **settings)  # pyright: ignore[reportArgumentType]
    point = torch.minimum(torch.maximum(center + radius * found.x_adv, box.lower), box.upper)
    with torch.no_grad():
        return point[0] if bool(prop.violated(model(point))[0]) else None


def milp_verify(model: nn.Module, box: Box, prop: Property, timeout: float = 60.0) -> Verdict:
    """Decide a property of a ReLU network exactly, by a mixed-integer linear program per row (HiGHS).

    Sums of two paths are known, and max pools, of which a binary variable says which input is the largest. Constants of the "big M" come from CROWN bounds. For about 60 unstable units; rows of one group are asked for together.

    Args:
        model: the network.
        box: one box.
        prop: the property.
        timeout: seconds per program.

    Reference:
        Tjeng, Xiao, Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming", ICLR 2019.
    """
    from scipy.optimize import Bounds as Limits
    from scipy.optimize import LinearConstraint, milp

    started = time.perf_counter()
    if len(box) != 1:
        raise ValueError(f"expected one box, got {len(box)}")
    exact = exact_copy(model, torch.float64)
    box = box.to(torch.float64)
    _fits(exact, box, prop)
    layers = Layers(exact, box.lower.shape[1:])
    with torch.no_grad():
        program = _Program(layers, box)
    groups = prop.groups.unique().tolist()
    for group in groups:
        rows = (prop.groups == group).nonzero()[:, 0]
        # Violated where all rows are at most t: minimise s with C_r z - t_r <= s.
        objective, (A, low, high) = program.objective(prop.C[rows].double().numpy(), prop.t[rows].double().numpy())
        limits: Any = [*program.low, -np.inf], [*program.high, np.inf]
        solved = milp(
            objective, constraints=LinearConstraint(A, low, high), integrality=[*program.integrality, 0],
            bounds=Limits(*limits), options={"time_limit": timeout},
        )  # fmt: skip
        if solved.x is None or solved.status not in (0,):
            return Verdict("unknown", seconds=time.perf_counter() - started)
        point = torch.from_numpy(solved.x[: box.lower[0].numel()]).view(box.lower.shape)
        point = torch.minimum(torch.maximum(point, box.lower), box.upper)
        if solved.fun <= 0:
            with torch.no_grad():
                real = bool(prop.violated(exact(point))[0])
            return Verdict(
                "falsified" if real else "unknown", point[0] if real else None, time.perf_counter() - started
            )
    return Verdict("verified", seconds=time.perf_counter() - started)


_Affine = tuple[np.ndarray, np.ndarray, list[int]]
"""Values as affine functions of variables: a matrix, a constant, and the variables of its columns."""


def _marked(mark: Mark, here: _Affine, waiting: list[_Affine]) -> _Affine:
    """Past a place where paths part or meet."""
    if mark.kind == "fork":
        waiting.append(here)
        return here
    if mark.kind == "turn":
        before = waiting.pop()
        waiting.append(here)
        return before
    (W, c, columns), (V, d, others) = here, waiting.pop()
    place = {column: j for j, column in enumerate(dict.fromkeys([*columns, *others]))}
    total = np.zeros((len(W), len(place)))
    for matrix, names in ((W, columns), (V, others)):
        total[:, [place[name] for name in names]] += matrix
    return total, c + d, list(place)


class _Program:
    """The constraints of a ReLU network: variables are the input, then every activation's output and binary."""

    def __init__(self, layers: Layers, box: Box) -> None:
        others = [p for p in layers.parts if isinstance(p, str) and p != "relu"]
        if others:
            raise TypeError(f"the exact verifier is for networks whose activations are ReLUs, got {others[0]}")
        ranges, _ = activation_ranges(layers, box, "crown", rounding=1e-12)
        if not all(bool(end.isfinite().all()) for ends in ranges.values() for end in ends):
            raise ValueError("the bounds of an activation overflow: the network's numbers are too large")
        count = box.lower[0].numel()
        self.low, self.high = box.lower.flatten().tolist(), box.upper.flatten().tolist()
        self.integrality: list[int] = [0] * count
        self.rows: list[tuple[dict[int, float], float, float]] = []
        # The current layer's values as affine functions of variables: matrix over `columns`, and a constant.
        here: _Affine = np.eye(count), np.zeros(count), list(range(count))
        waiting: list[_Affine] = []
        for k, part in enumerate(layers.parts):
            if isinstance(part, Affine):
                L, b = matrix_of(part, layers.shapes[k])
                here = L @ here[0], L @ here[1] + b, here[2]
            elif isinstance(part, Mark):
                here = _marked(part, here, waiting)
            else:
                low, high = (t.flatten().numpy() for t in ranges[k])
                if isinstance(part, MaxPool):
                    here = self._max_pool(part.members(layers.shapes[k]), here, low, high)
                else:
                    here = self._relu(*here, low, high)
        W, c, columns = here
        self.W, self.c, self.columns = W, c, columns

    def _relu(
        self, W: np.ndarray, c: np.ndarray, columns: list[int], low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """New variables $a = \\max(z, 0)$ with $z = W v + c$, a binary for each unstable unit."""
        outputs = []
        for i in range(len(W)):
            a = len(self.low)
            self.low.append(max(0.0, float(low[i])))
            self.high.append(max(0.0, float(high[i])))
            self.integrality.append(0)
            z = {columns[j]: float(W[i, j]) for j in range(len(columns)) if W[i, j]}
            minus_z = {j: -w for j, w in z.items()}
            if low[i] >= 0:
                self.rows.append(({**minus_z, a: 1.0}, float(c[i]), float(c[i])))
            elif high[i] > 0:
                binary = len(self.low)
                self.low.append(0.0)
                self.high.append(1.0)
                self.integrality.append(1)
                self.rows.append(({**minus_z, a: 1.0}, float(c[i]), np.inf))  # a >= z
                # a <= z - l (1 - q), a <= u q
                self.rows.append(({**minus_z, a: 1.0, binary: -float(low[i])}, -np.inf, float(c[i] - low[i])))
                self.rows.append(({a: 1.0, binary: -float(high[i])}, -np.inf, 0.0))
            outputs.append(a)
        return np.eye(len(outputs)), np.zeros(len(outputs)), outputs

    def _max_pool(self, windows: list[list[int]], here: _Affine, low: np.ndarray, high: np.ndarray) -> _Affine:
        """New variables $a = \\max_{i \\in w} z_i$, a binary $q_i$ for each input that may be the largest, $\\sum_i q_i = 1$."""
        W, c, columns = here
        outputs = []
        for window in windows:
            least = max(low[window])
            window = [i for i in window if high[i] >= least]
            top = max(high[window])
            a = self._variable(float(least), float(top), 0)
            first = len(self.low)
            for i in window:
                minus_z = {columns[j]: -float(W[i, j]) for j in range(len(columns)) if W[i, j]}
                if len(window) == 1:
                    self.rows.append(({**minus_z, a: 1.0}, float(c[i]), float(c[i])))
                    continue
                room = float(top - low[i])
                q = self._variable(0.0, 1.0, 1)
                self.rows.append(({**minus_z, a: 1.0}, float(c[i]), np.inf))  # a >= z_i
                self.rows.append(
                    ({**minus_z, a: 1.0, q: room}, -np.inf, float(c[i]) + room)
                )  # a <= z_i + r_i (1 - q_i)
            if len(window) > 1:
                self.rows.append((dict.fromkeys(range(first, len(self.low)), 1.0), 1.0, 1.0))
            outputs.append(a)
        return np.eye(len(outputs)), np.zeros(len(outputs)), outputs

    def _variable(self, low: float, high: float, integer: int) -> int:
        self.low.append(low)
        self.high.append(high)
        self.integrality.append(integer)
        return len(self.low) - 1

    def objective(self, C: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, tuple[Any, Any, Any]]:
        """Cost and constraints that minimise the largest row of $C z - t$, in one variable more."""
        from scipy.sparse import lil_matrix

        count = len(self.low)
        rows = [*self.rows]
        for weights, offset in zip(C @ self.W, C @ self.c - t, strict=True):
            entry = {column: float(w) for column, w in zip(self.columns, weights, strict=True) if w}
            rows.append(({**entry, count: -1.0}, -np.inf, -float(offset)))
        A = lil_matrix((len(rows), count + 1))
        for i, (entry, _, _) in enumerate(rows):
            for j, value in entry.items():
                A[i, j] = value
        cost = np.zeros(count + 1)
        cost[-1] = 1
        return cost, (A.tocsr(), np.array([r[1] for r in rows]), np.array([r[2] for r in rows]))
