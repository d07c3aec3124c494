"""Mixtures of bit widths: trained by chance with a view to curvature, and chosen for a budget by an integer program.

Reference:
    Huang et al., "Nearly Lossless Adaptive Bit Switching", 2025, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.efficiency.quantized_layers import QuantizedLayer, quantized_layers
from torchfolio.efficiency.switching_rules import SwitchingRule
from torchfolio.engine.modes import evaluating
from torchfolio.engine.rules import Batch, Loss
from torchfolio.measure import hessian_traces

__all__ = ["MixedPrecision", "multiply_adds", "pareto_bits", "search_bits", "weight_traces"]


class MixedPrecision(SwitchingRule):
    """Trains mixtures of widths: a pass at the highest, some at widths drawn layer by layer, one at the lowest.

    A layer of mean curvature $t_i$ below the average of all layers draws every width alike; a sensitive one draws
    wide ones more often: $p(b) = b / \\sum_{b'} b'$.

    Args:
        loss: loss, as in `MultiPrecision`.
        traces: mean curvature by layer, of `weight_traces` on the network before its conversion; `None` draws every
            width alike in all layers.
        passes: drawn mixtures in a step.
        alrs: rule for learning rates of the scales, as in `MultiPrecision`; a layer's scales learn at the rate of its own width.

    Raises:
        ValueError: if a layer that switches has no trace, or there are no passes.

    Reference:
        Huang et al., 2025, section 3.3. The passes at both ends (the sandwich of slimmable networks) are ours.
    """

    def __init__(
        self,
        loss: Loss | None = None,
        traces: Mapping[str, float] | None = None,
        passes: int = 3,
        alrs: Literal["full", "ratio"] | None = "full",
    ) -> None:
        super().__init__(loss, alrs)
        self.traces = None if traces is None else _checked(traces)
        self.passes = checks.whole("passes", passes, 1)

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        super().prepare(model, example)
        self.switching = [n for n, m in self.layers.items() if not m.fixed]
        self.table = self.probabilities(self.switching)
        return model

    def partition(self) -> list[list[str]]:
        return [[name] for name in self.layers]

    def probabilities(self, names: Sequence[str]) -> Tensor:
        """Chances of every width, from the highest down, `[layers, widths]`."""
        widths = torch.tensor(self.bits, dtype=torch.float64)
        alike = torch.full_like(widths, 1 / len(widths))
        if self.traces is None:
            return alike.expand(len(names), -1)
        if missing := [n for n in names if n not in self.traces]:
            raise ValueError(f"expected a trace for every layer that switches, {missing[0]} has none")
        mean = sum(self.traces.values()) / len(self.traces)
        return torch.stack([widths / widths.sum() if self.traces[n] >= mean else alike for n in names])

    def draw(self, generator: torch.Generator | None = None) -> dict[str, int]:
        """A mixture, by the roulette of every layer."""
        picks = torch.multinomial(self.table, 1, generator=generator)[:, 0].tolist()
        return {name: self.bits[k] for name, k in zip(self.switching, picks, strict=True)}

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        drawn = [self.draw() for _ in range(self.passes)]
        losses = list(self._passes(batch, backward, [self.bits[0], *drawn, self.bits[-1]]).values())
        return {
            "loss": torch.stack(losses).mean(),
            f"loss_{self.bits[0]}": losses[0],
            "loss_mixed": torch.stack(losses[1:-1]).mean(),
            f"loss_{self.bits[-1]}": losses[-1],
        }


def _checked(traces: Mapping[str, float]) -> dict[str, float]:
    """Traces by layer, checked.

    Raises:
        ValueError: if there are none, or one is not finite.
    """
    if not traces:
        raise ValueError("expected a trace for every layer, got none")
    return {name: float(checks.finite(f"the trace of {name}", value)) for name, value in traces.items()}


def weight_traces(
    model: nn.Module,
    loss: Loss,
    data: Any,
    *,
    samples: int = 64,
    tolerance: float | None = 0.05,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Mean curvature of every layer's weights: the trace of their block of the Hessian over their number.

    Args:
        model: trained network, before `convert`, in evaluation mode.
        loss: criterion with mean reduction.
        data: a batch (x, y) or more; see `torchfolio.measure.hessian_traces`.
        samples: maximum number of random vectors; two backward passes each.
        tolerance: relative standard error at which to stop earlier.
        batch_size: batch size, see `torchfolio.measure.hessian_traces`.
        generator: source of the signs.

    Returns:
        The mean curvature by name of the layer.

    Raises:
        ValueError: if there is no layer that `convert` would quantise.
    """
    names = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d)]
    if not names:
        raise ValueError("expected an nn.Linear, nn.Conv1d or nn.Conv2d; traces are of the network before convert")
    traces = hessian_traces(
        model, loss, data, batch_size=batch_size, samples=samples, tolerance=tolerance, generator=generator
    )
    return {n: traces[f"{n}.weight"].value / model.get_submodule(n).weight.numel() for n in names}  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def search_bits(
    model: nn.Module,
    traces: Mapping[str, float],
    budget: float,
    cost: Literal["size", "bitops"] = "size",
    example: Tensor | None = None,
) -> dict[str, int]:
    """The widths of least expected loss within a budget, by an integer program that is solved exactly.

    $$\\min \\sum_i \\max(t_i, \\epsilon)\\, \\lVert \\hat W_i^{(b_i)} - W_i \\rVert^2 \\quad \\text{subject to} \\quad
    \\sum_i c_i(b_i) \\le \\text{budget},$$

    with $c_i(b) = b \\cdot$ weights of the layer, or $b^2 \\cdot$ its multiply-adds.

    Args:
        model: model of `convert`, trained and not stored. Layers that do not switch count in the cost.
        traces: traces of `weight_traces`.
        budget: bits of all quantised weights, or bit operations on one example.
        cost: `"size"` or `"bitops"`.
        example: one input `[1, ...]`, needed for `"bitops"`.

    Returns:
        A width by name of every layer that switches, as `set_bits` takes them.

    Raises:
        ValueError: if the budget is too small (the least is named), a trace is missing, or an example.

    Reference:
        Huang et al., 2025, section 3.3; Dong et al., "HAWQ-V2", NeurIPS 2020, for the sensitivity.
    """
    checks.one_of("cost", cost, ("size", "bitops"))
    names, widths, losses, costs, constant = _program(model, _checked(traces), cost, example)
    least = float(costs.min(1).sum() + constant)
    if not budget >= least:
        raise ValueError(
            f"expected a budget of at least {least:g} ({cost} with every layer at its lowest width), got {budget}"
        )
    picks = _solve(losses, costs, budget - constant)
    return {name: widths[k] for name, k in zip(names, picks, strict=True)}


def pareto_bits(
    model: nn.Module,
    traces: Mapping[str, float],
    budgets: Sequence[float],
    cost: Literal["size", "bitops"] = "size",
    example: Tensor | None = None,
) -> list[tuple[float, dict[str, int]]]:
    """`search_bits` for several budgets, each with its widths."""
    return [(budget, search_bits(model, traces, budget, cost, example)) for budget in budgets]


@torch.no_grad()
def _program(
    model: nn.Module, traces: Mapping[str, float], cost: str, example: Tensor | None
) -> tuple[list[str], tuple[int, ...], np.ndarray, np.ndarray, float]:
    """Layers that switch, widths, losses and costs `[layers, widths]`, and the cost of the layers that do not."""
    layers = quantized_layers(model)
    names = [n for n, m in layers.items() if not m.fixed]
    if missing := [n for n in names if n not in traces]:
        raise ValueError(f"expected a trace for every layer that switches, {missing[0]} has none")
    if cost == "bitops" and example is None:
        raise ValueError("bit operations depend on the size of the input: give an example")
    widths = max((m.quantizer.bits for m in layers.values()), key=len)
    losses = np.empty((len(names), len(widths)))
    least = 1e-6 * max(abs(t) for t in traces.values())  # where the estimate says nothing, a smaller error is better
    for i, name in enumerate(names):
        layer = layers[name]
        if layer.weight is None:
            raise ValueError("errors of rounding need the real weights; search before store")
        for k, bit in enumerate(widths):
            error = (layer.quantizer(layer.weight, bit) - layer.weight).double().square().sum()
            losses[i, k] = max(traces[name], least) * float(error)
    work = _weights_of(layers) if example is None or cost == "size" else multiply_adds(model, example)
    power = 1 if cost == "size" else 2
    costs = np.array([[work[n] * b**power for b in widths] for n in names])
    constant = float(sum(work[n] * m.bit**power for n, m in layers.items() if m.fixed))
    return names, widths, losses, costs, constant


def _weights_of(layers: Mapping[str, QuantizedLayer]) -> dict[str, int]:
    return {n: m.weight.numel() for n, m in layers.items() if m.weight is not None}


def multiply_adds(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Multiply-adds of every quantised layer on an example: every weight is used once at every place."""
    work = dict.fromkeys(quantized_layers(model), 0)

    def count(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            assert isinstance(layer, QuantizedLayer)
            weights = layer.integers if layer.weight is None else layer.weight
            assert weights is not None
            work[name] += output.numel() // len(weights) * weights.numel()

        return hook

    handles = [layer.register_forward_hook(count(n)) for n, layer in quantized_layers(model).items()]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return work


def _solve(losses: np.ndarray, costs: np.ndarray, budget: float) -> list[int]:
    """One column for every row: the least sum of losses whose costs sum to at most the budget."""
    if not len(losses):
        return []
    rows, columns = losses.shape
    one = np.kron(np.eye(rows), np.ones(columns))
    # Both are scaled to about 1, so that the solver's tolerances mean the same for all networks.
    scale, unit = losses.max() or 1.0, costs.max()
    result = milp(
        (losses / scale).ravel(),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(costs.ravel()[None] / unit, -np.inf, budget / unit)],
        integrality=np.ones(losses.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the integer program was not solved: {result.message}")
    return result.x.reshape(rows, columns).argmax(1).tolist()
