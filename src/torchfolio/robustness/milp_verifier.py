"""Exact decisions on ReLU networks by mixed-integer linear programs (Tjeng, Xiao, Tedrake, ICLR 2019)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from torchfolio.robustness.affine_layers import Affine, matrix_of
from torchfolio.robustness.bound_verifiers import check_outputs, exact_copy
from torchfolio.robustness.layer_list import Layers, Mark
from torchfolio.robustness.pooling_bounds import MaxPool
from torchfolio.robustness.preactivation_bounds import activation_ranges
from torchfolio.robustness.properties import Box, Property, Verdict

__all__ = ["milp_verify"]


def milp_verify(model: nn.Module, box: Box, prop: Property, timeout: float = 60.0) -> Verdict:
    """Decide a property of a ReLU network exactly, by a mixed-integer linear program per row (HiGHS).

    Sums of two paths are known, and max pools, of which a binary variable says which input is the largest. Constants of the "big M" come from CROWN bounds. For about 60 unstable units; rows of one group are asked for together.

    Args:
        model: network.
        box: one box.
        prop: property.
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
    check_outputs(exact, box, prop)
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
