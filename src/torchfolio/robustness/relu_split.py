"""Verification of ReLU networks by deciding the signs of their units.

Where the input has few coordinates, halving the box is best (`CrownSplit`). Where it has many, as an image, hundreds of
halvings change little; the activations that the bounds are loose at are fewer. `ReluSplit` takes an unstable unit and looks
at the two cases $z \\ge 0$ and $z \\le 0$ apart, each with linear bounds in which that unit is exact, and goes on with the
cases that are not decided. What a case says of its unit, $s z \\ge 0$, enters the bound by a multiplier:

$$\\min_{x \\in B,\\ s_i z_i(x) \\ge 0} f(x) \\ \\ge\\ \\max_{\\alpha, \\beta \\ge 0} \\min_{x \\in B} \\underline f_\\alpha(x) - \\sum_i \\beta_i s_i z_i(x),$$

optimised together with the slopes $\\alpha$ by Adam, for all cases of a batch at once.

Wang, Zhang, Xu, Lin, Jana, Hsieh, Kolter, "Beta-CROWN: Efficient Bound Propagation with Per-neuron Split Constraints for
Neural Network Robustness Verification", NeurIPS 2021, equations 7 to 12; the unit to split as in De Palma et al., "Improved
Branch and Bound for Neural Network Verification via Lagrangian Decomposition", 2021: a few candidates by what their
relaxation costs, then the one whose cases are bounded best.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.robustness.affine_layers import Affine, matrix_of
from torchfolio.robustness.backward_bounds import linear_bounds
from torchfolio.robustness.bound_verifiers import Crown, searched
from torchfolio.robustness.bounds import row_bounds
from torchfolio.robustness.interval_bounds import Range
from torchfolio.robustness.layer_list import Layers, Mark
from torchfolio.robustness.pooling_bounds import MaxPool
from torchfolio.robustness.preactivation_bounds import activation_ranges
from torchfolio.robustness.properties import Box, Property, Verdict

__all__ = ["ReluSplit"]


class ReluSplit(Crown):
    """Branch and bound on the signs of ReLUs, for networks with wide inputs.

    The search begins with PGD. Cases of least bound come first; of each the corner of the box that its bound points to is
    tried. A case in which every unit has a sign is a linear program, which is solved; so the search is complete, but for ties.

    Args:
        batch: cases that are bounded at once.
        max_cases: number of cases after which the answer is unknown.
        steps: number of steps of Adam on slopes and multipliers, for the cases of a batch.
        root_steps: number of steps for the whole box.
        candidates: units of which both cases are bounded before one of them is split.
        attack_steps: number of steps of PGD in the beginning, from 32 starts; 0 leaves it out.
        intermediate: way to bound the inputs of activations, see `crown`.
        dtype: dtype of the bounds, see `Interval`.

    Raises:
        TypeError: when asked about a network that has other activations, or max pools.
    """

    name = "crown+relu"

    def __init__(
        self,
        batch: int = 128,
        max_cases: int | None = None,
        steps: int = 15,
        root_steps: int = 40,
        candidates: int = 3,
        attack_steps: int = 50,
        intermediate: str = "crown",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(intermediate, whole("root_steps", root_steps, 0), dtype)
        self.batch, self.steps = whole("batch", batch, 1), whole("steps", steps, 1)
        self.candidates, self.attack_steps = whole("candidates", candidates, 1), whole("attack_steps", attack_steps, 0)
        self.max_cases = None if max_cases is None else whole("max_cases", max_cases, 0)

    def _decide(self, model: nn.Module, box: Box, prop: Property, deadline: float) -> Verdict:
        box = self.shrink(box)
        layers = Layers(model, box.lower.shape[1:])
        others = {
            "max pools" if isinstance(p, MaxPool) else p for p in layers.parts if not isinstance(p, Affine | Mark)
        }
        if others - {"relu"}:
            raise TypeError(
                f"expected a network whose only activations are ReLUs, whose signs are decided, got one with "
                f"{' and '.join(sorted(map(str, others - {'relu'})))}; CrownSplit halves the box instead"
            )
        witness = searched(model, box, prop, self.attack_steps) if self.attack_steps else None
        if witness is not None:
            return Verdict("falsified", witness)
        with torch.no_grad():
            ranges, terms = activation_ranges(layers, box, self.intermediate, self.adjust, self.rounding)
        seen = 1
        lower = row_bounds(layers, box, prop, ranges, terms, self.alpha_steps, self.rounding).lower
        values = prop.by_group(lower)[0]
        for group in values.argsort().tolist():  # what is hardest is asked first
            if 0 < values[group] < torch.inf:
                continue
            rows = (prop.groups == group).nonzero()[:, 0]
            part = Property(prop.C[rows], prop.t[rows], torch.zeros_like(rows))
            search = _Search(self, model, layers, box, part, ranges, terms)
            verdict = search.run(deadline, None if self.max_cases is None else self.max_cases - seen)
            seen += verdict.boxes
            if verdict.status != "verified":
                witness = verdict.witness
                if witness is not None and not bool(prop.violated(model(witness[None]))[0]):
                    witness = None
                return Verdict("unknown" if witness is None else "falsified", witness, boxes=seen)
        return Verdict("verified", boxes=seen)


@dataclass
class _Cases:
    """Cases `[D]`: signs of units `[D, U]`, 0 where undecided; slopes and multipliers `[D, R, U]`; bounds `[D]`."""

    signs: Tensor
    alphas: Tensor
    betas: Tensor
    lower: Tensor

    def __len__(self) -> int:
        return len(self.signs)

    def __getitem__(self, index: Tensor) -> _Cases:
        return _Cases(self.signs[index], self.alphas[index], self.betas[index], self.lower[index])

    @staticmethod
    def cat(parts: list[_Cases]) -> _Cases:
        fields = ("signs", "alphas", "betas", "lower")
        return _Cases(*(torch.cat([getattr(p, f) for p in parts]) for f in fields))


class _Search:
    """The cases of one group of rows on one box."""

    def __init__(
        self, verifier: ReluSplit, model: nn.Module, layers: Layers, box: Box, prop: Property, ranges: dict[int, Range],
        terms: dict[int, Tensor],
    ) -> None:  # fmt: skip
        self.verifier, self.model, self.layers, self.box, self.prop = verifier, model, layers, box, prop
        self.terms = terms
        self.C, self.t = prop.C.to(box.lower), prop.t.to(box.lower)
        self.start = self.C.view(1, len(self.C), *layers.outputs)
        # All units in a row: of every activation its place in the network, its shape and where it begins.
        self.places: dict[int, tuple[torch.Size, slice]] = {}
        at = 0
        for k, (low, _) in ranges.items():
            count = low[0].numel()
            self.places[k] = low.shape[1:], slice(at, at + count)
            at += count
        self.low = torch.cat([low.flatten(1) for low, _ in ranges.values()], 1)[0]
        self.high = torch.cat([high.flatten(1) for _, high in ranges.values()], 1)[0]
        self.unstable = (self.low < 0) & (self.high > 0)

    # -- the search

    def run(self, deadline: float, most: int | None) -> Verdict:
        first = (self.high >= -self.low).to(self.low)
        alphas = first.expand(1, len(self.C), -1).float()
        whole = _Cases(
            torch.zeros_like(self.low, dtype=torch.int8)[None], alphas, torch.zeros_like(alphas), self.low.new_zeros(1)
        )
        cases, witness = self._bounded(whole, self.verifier.alpha_steps)
        seen = 0
        while len(cases):
            if witness is not None:
                return Verdict("falsified", witness, boxes=seen)
            if time.perf_counter() > deadline or (most is not None and seen >= most):
                return Verdict("unknown", boxes=seen)
            order = cases.lower.argsort(stable=True)
            taken, cases = cases[order[: self.verifier.batch // 2 or 1]], cases[order[self.verifier.batch // 2 or 1 :]]
            free = self.unstable & (taken.signs == 0)
            done = ~free.any(1)
            for index in done.nonzero()[:, 0]:
                verdict = self._leaf(taken[index[None]])
                if verdict.status != "verified":
                    return Verdict(verdict.status, verdict.witness, boxes=seen)
            if bool(done.all()):
                continue
            taken, free = taken[~done], free[~done]
            halves = self._halves(taken, self._unit(taken, free))
            seen += len(halves)
            left, witness = self._bounded(halves, self.verifier.steps)
            cases = _Cases.cat([cases, left])
        return Verdict("verified", boxes=seen)

    def _halves(self, cases: _Cases, unit: Tensor) -> _Cases:
        """Both cases of one unit of each."""
        parts = []
        for sign in (1, -1):
            signs = cases.signs.scatter(1, unit[:, None], torch.full_like(unit[:, None], sign, dtype=torch.int8))
            parts.append(_Cases(signs, cases.alphas, cases.betas, cases.lower))
        return _Cases.cat(parts)

    def _unit(self, cases: _Cases, free: Tensor) -> Tensor:
        """The undecided unit of each case to split."""
        lower, behind = self._plain(cases, trace=True)
        row = lower.argmax(1)
        A = torch.cat([behind[k].expand(len(cases), *behind[k].shape[1:]).flatten(2) for k in self.places], 2)
        A, alpha = A[torch.arange(len(cases)), row], cases.alphas.to(A)[torch.arange(len(cases)), row]
        slope = self.high / (self.high - self.low).where(self.unstable, torch.ones_like(self.low))
        # What the line above costs where it is used, and what the line below costs at the worse end where that is.
        cost = torch.where(
            A < 0, A.abs() * slope * -self.low, A * torch.minimum(-self.low * alpha, self.high * (1 - alpha))
        )
        cost = torch.where(free, cost, -torch.inf)
        count = min(self.verifier.candidates, int(free.sum(1).min()))
        best = cost.topk(max(1, count), 1).indices
        if best.shape[1] == 1:
            return best[:, 0]
        tries = [self._halves(cases, best[:, j]) for j in range(best.shape[1])]
        bounds = self._plain(_Cases.cat(tries))[0].amax(1).view(best.shape[1], 2, len(cases))
        # The cases together are as good as the worse of them; where that is the same, as good as the better.
        score = bounds.amin(1) + 1e-3 * bounds.amax(1).clamp_max(0)
        return best.gather(1, score.argmax(0)[:, None])[:, 0]

    # -- bounds

    def _ranges(self, signs: Tensor) -> dict[int, Range]:
        low = torch.where(signs > 0, self.low.clamp_min(0), self.low)
        high = torch.where(signs < 0, self.high.clamp_max(0), self.high)
        return {
            k: (low[:, at].view(-1, *shape), high[:, at].view(-1, *shape)) for k, (shape, at) in self.places.items()
        }

    def _by_layer(self, values: Tensor) -> dict[int, Tensor]:
        return {k: values[..., at].view(*values.shape[:2], *shape) for k, (shape, at) in self.places.items()}

    def _evaluate(
        self, signs: Tensor, alphas: Tensor, betas: Tensor, trace: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds, coefficients on the input, and scales of the sums, of all rows."""
        signed = betas * signs[:, None]
        return linear_bounds(
            self.layers, len(self.layers.parts), self.start, self._ranges(signs), self.box, self._by_layer(alphas), self.terms,
            self._by_layer(signed), trace,
        )  # fmt: skip

    def _safe(self, lower: Tensor, scale: Tensor) -> Tensor:
        return lower - self.verifier.rounding * (scale + self.t.abs()) - self.t

    @torch.no_grad()
    def _plain(self, cases: _Cases, trace: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
        """Bounds `[D, R]` with the slopes and multipliers as they are, and the coefficients behind every activation."""
        behind: dict[int, Tensor] = {}
        lower, _, scale = self._evaluate(
            cases.signs, cases.alphas.to(self.low), cases.betas.to(self.low), behind if trace else None
        )
        return self._safe(lower, scale), behind

    def _bounded(self, cases: _Cases, steps: int) -> tuple[_Cases, Tensor | None]:
        """Cases with optimised slopes and multipliers, without those that are decided; and a violating input, if any."""
        alphas, betas = (v.to(self.low).clone().requires_grad_() for v in (cases.alphas, cases.betas))
        optimizer = torch.optim.Adam([{"params": [alphas], "lr": 0.1}, {"params": [betas], "lr": 0.05}], maximize=True)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        best = torch.full_like(cases.lower, -torch.inf)
        kept = alphas.detach().clone(), betas.detach().clone()
        corners = self.box.lower.expand(len(cases), *self.box.lower.shape[1:])
        for step in range(steps + 1):
            with torch.enable_grad():
                lower, A, scale = self._evaluate(cases.signs, alphas, betas)
            with torch.no_grad():
                value, row = self._safe(lower, scale).nan_to_num(-torch.inf, -torch.inf, -torch.inf).max(1)
                better = value > best
                best = torch.where(better, value, best)
                wide = better[:, None, None]
                kept = torch.where(wide, alphas, kept[0]), torch.where(wide, betas, kept[1])
                own = A[torch.arange(len(cases)), row]
                here = torch.where(own > 0, self.box.lower, self.box.upper)
                corners = torch.where(better.view(-1, *[1] * (here.dim() - 1)), here, corners)
            if step == steps or bool((best > 0).all()):
                break
            optimizer.zero_grad()
            lower.sum().backward(inputs=[alphas, betas])
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                alphas.clamp_(0, 1)
                betas.clamp_min_(0)
        open_ = best <= 0
        witness = None
        if bool(open_.any()):
            points = corners[open_]
            with torch.no_grad():
                hits = self.prop.violated(self.model(points)).nonzero()[:, 0]
            witness = points[hits[0]] if len(hits) else None
        found = _Cases(cases.signs, kept[0].float(), kept[1].float(), best)
        return found[open_], witness

    # -- where every unit has a sign

    def _leaf(self, case: _Cases) -> Verdict:
        """Decide a case in which the network is linear: minimise the largest row, by a linear program.

        Its multipliers, of units and of rows, give a bound that is sound whatever the program's tolerances are.
        """
        from scipy.optimize import linprog

        with np.errstate(all="ignore"):
            W, c, F, f = self._linear(case.signs[0])
        if not all(np.isfinite(part).all() for part in (W, c, F, f)):
            return Verdict("unknown")  # the network's numbers are too large
        low, high = (v.flatten().double().numpy() for v in (self.box.lower, self.box.upper))
        inputs, rows = len(low), len(F)
        limits: Any = [*zip(low, high, strict=True), (None, None)]
        # F x + f <= s of the rows, W x + c >= 0 of the units.
        matrix = np.block([[F, -np.ones((rows, 1))], [-W, np.zeros((len(W), 1))]])
        solved = linprog(np.r_[np.zeros(inputs), 1.0], A_ub=matrix, b_ub=np.r_[-f, c], bounds=limits, method="highs")
        sizes, shares = np.ones(1), None
        if solved.status == 0:
            multipliers = -solved.ineqlin.marginals.clip(max=0)
            shares, betas = multipliers[:rows], multipliers[rows:]
        elif solved.status == 2:  # no input is of this case: multipliers that say so, as large as it takes
            matrix = np.concatenate([-W, -np.ones((len(W), 1))], 1)
            limits[-1] = (0, None)
            solved = linprog(np.r_[np.zeros(inputs), 1.0], A_ub=matrix, b_ub=c, bounds=limits, method="highs")
            if solved.status != 0:
                return Verdict("unknown")
            betas, sizes = -solved.ineqlin.marginals.clip(max=0), 10.0 ** np.arange(0, 9)
        else:
            return Verdict("unknown")
        shares = np.full(rows, 1 / rows) if shares is None or shares.sum() <= 0 else shares / shares.sum()
        if any(0 < self._combined(case.signs, shares, betas * size) < torch.inf for size in sizes):
            return Verdict("verified")
        point = torch.from_numpy(solved.x[:inputs]).to(self.low).view(self.box.lower.shape)
        point = torch.minimum(torch.maximum(point, self.box.lower), self.box.upper)
        with torch.no_grad():
            hit = bool(self.prop.violated(self.model(point))[0])
        return Verdict("falsified", point[0]) if hit else Verdict("unknown")

    @torch.no_grad()
    def _combined(self, signs: Tensor, shares: np.ndarray, betas: np.ndarray) -> float:
        """A bound of an average of the rows, which is above 0 only if they cannot all be violated."""
        own = torch.from_numpy(shares).to(self.low)
        start, t = (own @ self.C).view(1, 1, *self.layers.outputs), own @ self.t
        signed = torch.zeros(1, 1, len(self.low), dtype=self.low.dtype, device=self.low.device)
        index = (signs[0] != 0).nonzero()[:, 0]
        signed[0, 0, index] = torch.from_numpy(betas).to(self.low) * signs[0, index]
        lower, _, scale = linear_bounds(
            self.layers,
            len(self.layers.parts),
            start,
            self._ranges(signs),
            self.box,
            None,
            self.terms,
            self._by_layer(signed),
        )
        return float(lower - self.verifier.rounding * (scale + own @ self.t.abs()) - t)

    def _linear(self, signs: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """`s z(x) = W x + c` of the units that have a sign, and the rows `F x + f`, where all units have one."""
        box = Box(self.box.lower.double(), self.box.upper.double())
        count = box.lower[0].numel()
        M, m = np.eye(count), np.zeros(count)
        rows: list[np.ndarray] = []
        offsets: list[np.ndarray] = []
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        for k, part in enumerate(self.layers.parts):
            if isinstance(part, Mark):
                if part.kind != "fork":
                    before = waiting.pop()
                    M, m, bounds = (M + before[0], m + before[1], None) if part.kind == "join" else (*before, (M, m))
                else:
                    bounds = M, m
                waiting += [bounds] if bounds is not None else []
                continue
            if isinstance(part, Affine):
                L, b = matrix_of(part, self.layers.shapes[k])
                M, m = L @ M, L @ m + b
                continue
            at = self.places[k][1]
            sign = signs[at].numpy()
            rows.append(sign[sign != 0, None] * M[sign != 0])
            offsets.append(sign[sign != 0] * m[sign != 0])
            on = np.where(sign != 0, sign > 0, self.low[at].numpy() >= 0)
            M, m = M * on[:, None], m * on
        C = self.C.double().numpy()
        return np.concatenate(rows), np.concatenate(offsets), C @ M, C @ m - self.t.double().numpy()
