"""Double Rounding: one network for several bit widths, of which only the highest integers are stored.

Haiduo Huang, Zhenhua Liu, Tian Xia, Wenzhe Zhao, Pengju Ren, "Nearly Lossless Adaptive Bit Switching", 2025,
https://arxiv.org/abs/2502.01199.

A device that changes its precision with load or battery needs no second model: low widths are rounded a second time
from the stored int8 weights (see `quantized_layers` for layers, conversion and storage). This module trains them: all
widths together at learning rates that adapt to each (`MultiPrecision`), or random mixtures of widths, drawn with a view
to the curvature of every layer (`MixedPrecision`), from which `search_bits` picks one for a budget without training.

    net = convert(net, bits=(8, 6, 4, 2), example=x)
    fit(net, train, rule=MultiPrecision(), optimizer=adam(1e-3), scheduler=cosine(), epochs=3)
    net = store(net)                          # a byte per weight
    set_bits(net, 4)                          # at any time

`torchfolio compress net/ --method double_rounding --data cifar10 -o small/` does the same for a network on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.optim import Optimizer

from torchfolio import checks
from torchfolio.efficiency.compression import Compression, Phase, own_group
from torchfolio.efficiency.quantized_layers import (
    Bits,
    DoubleRounding,
    QuantizedLayer,
    SwitchableNorm,
    calibrate,
    check_bits,
    convert,
    double_round,
    export,
    load_export,
    quantized_layers,
    set_bits,
    store,
    use_bits,
    widths_now,
)
from torchfolio.engine import LearningRule
from torchfolio.engine.modes import evaluating
from torchfolio.engine.rules import Batch, Loss, default_loss
from torchfolio.engine.sync import average_gradients
from torchfolio.measure import count_flops, hessian_traces

__all__ = [
    "BitSwitching",
    "DoubleRounding",
    "MixedPrecision",
    "MultiPrecision",
    "SwitchableNorm",
    "calibrate",
    "convert",
    "double_round",
    "eta",
    "export",
    "load_export",
    "pareto_bits",
    "search_bits",
    "set_bits",
    "store",
    "switchable",
    "use_bits",
    "weight_traces",
    "widths_now",
]

RHO = 0.1
"""Least share of the learning rate that a scale's gradient leaves: the printed rate would become negative."""


def eta(bit: int, highest: int = 8) -> float:
    """Factor of a width on the learning rate of scales: 1, 0.5, 0.1, 0.05, 0.01, … from the highest down.

    Reference:
        Huang et al., 2025, section 3.2.
    """
    below = highest - bit
    return 10 ** (-below / 2) if below % 2 == 0 else 5 * 10 ** (-(below + 1) / 2)


class _Switching(LearningRule):
    """What both rules have in common: passes at widths, each with an update of its own at rates of its own."""

    def __init__(self, loss: Loss | None, alrs: Literal["full", "ratio"] | None) -> None:
        self.loss = loss or default_loss
        self.alrs = checks.one_of("alrs", alrs, ("full", "ratio", None))
        self.model: nn.Module | None = None
        self.optimizer: Optimizer | None = None
        self.layers: dict[str, QuantizedLayer] = {}
        self.groups: list[list[str]] = []  # names of layers, of the optimizer's last groups

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        self.layers = quantized_layers(model)
        if any(layer.weight is None for layer in self.layers.values()):
            raise ValueError("the network holds stored integers alone; train it before store")
        self.model, self.optimizer = model, None
        self.highest = max(layer.quantizer.bits[0] for layer in self.layers.values())
        self.bits = max((layer.quantizer.bits for layer in self.layers.values()), key=len)
        return model

    def partition(self) -> list[list[str]]:
        """Names of layers whose scales share a learning rate at all times."""
        raise NotImplementedError

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> None:
        self.groups = []
        for names in self.partition():
            scales = [p for n in names for p in _scales(self.layers[n]) if p.requires_grad]
            if scales:
                own_group(optimizer, scales, weight_decay=0.0)
                self.groups.append(names)
        self.optimizer = optimizer

    def _passes(self, batch: Batch, backward: Callable[[Tensor], None], widths: Sequence[Bits]) -> dict[str, Tensor]:
        """A pass at each of several widths, with an update after all but the last, which is the optimizer's user's."""
        model, optimizer = self.model, self.optimizer
        if model is None or optimizer is None:
            raise RuntimeError("an update at every width needs the optimizer; call prepare and configure before step")
        if any(p.grad is not None for p in model.parameters()):
            raise ValueError("an update at every width leaves no gradient to add to: accumulate=1, please")
        device = batch[0].device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise ValueError("an update at every width needs unscaled gradients; take precision bf16-mixed or 32-true")
        before, losses = widths_now(model), {}
        try:
            for k, width in enumerate(widths):
                if k:
                    self._update(model, optimizer)
                set_bits(model, width)
                losses[str(k)] = self._loss(batch)
                backward(losses[str(k)])
                losses[str(k)] = losses[str(k)].detach()
                self._set_rates(optimizer)
        finally:
            set_bits(model, before)
        return losses

    def _loss(self, batch: Batch) -> Tensor:
        assert self.model is not None
        *inputs, target = batch
        return self.loss(self.model(*inputs), target)

    def _update(self, model: nn.Module, optimizer: Optimizer) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            average_gradients([p for p in model.parameters() if p.requires_grad])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _set_rates(self, optimizer: Optimizer) -> None:
        """$\\lambda_b = \\eta_b \\max(\\lambda - g_b, \\rho \\lambda)$ for the scales of the layers that ran at $b$."""
        rate = float(optimizer.param_groups[0]["lr"])
        strength = self._strengths() if self.alrs == "full" else {}
        if not self.groups:  # all scales are frozen
            return
        for names, group in zip(self.groups, optimizer.param_groups[-len(self.groups) :], strict=True):
            bit = self.layers[names[0]].bit
            factor = 1.0 if self.alrs is None else eta(bit, self.highest)
            group["lr"] = factor * max(rate - strength.get(bit, 0.0), RHO * rate)

    def _strengths(self) -> dict[int, float]:
        """$g_b$: the mean over layers at $b$ of the largest gradient of a scale, cut at 1.

        What is learned is $\\log s$, with $\\nabla s = \\nabla(\\log s) / s$.
        """
        by_width: dict[int, list[Tensor]] = {}
        for layer in self.layers.values():
            gradients = [
                p.grad.detach().abs() / p.detach().exp() for p in _scales(layer, layer.bit) if p.grad is not None
            ]
            if gradients:
                by_width.setdefault(layer.bit, []).append(torch.stack(gradients).amax())
        return {bit: float(torch.stack(found).clamp_max(1).mean()) for bit, found in by_width.items()}


def _scales(layer: QuantizedLayer, bit: int | None = None) -> list[nn.Parameter]:
    """Scales of a layer: all of them, or those of one width."""
    quantizers = [q for q in (layer.quantizer, layer.activation) if q is not None]
    if bit is not None:
        return [q.log_scale_of(bit)[0] for q in quantizers]
    return [p for q in quantizers for p in q.log_scales.parameters()]


class MultiPrecision(_Switching):
    """Trains all widths together: for every batch a pass and an update at each, from the highest to the lowest.

    Scales learn at rates of their own, because their gradients at low widths are larger by orders of magnitude:

    $$\\lambda_b = \\eta_b \\max(\\lambda - g_b, 0.1 \\lambda), \\qquad
    g_b = \\operatorname{mean}_i \\min(\\max |\\nabla s_b^i|, 1), \\qquad \\eta_b \\approx 10^{-(h - b) / 2},$$

    with the learning rate $\\lambda$ of the weights, which the schedule sets. Scales are never decayed.

    Args:
        loss: criterion on (output, target); by default cross-entropy for labels, else the mean squared error.
        alrs: `"full"`, `"ratio"` ($\\eta_b \\lambda$ alone), or `None` ($\\lambda$ at every width).
        update: `"separate"`, or `"accumulate"` for the usual way: one update of the sum of all losses, without rates
            of their own (`alrs=None`).

    Raises:
        ValueError: if rates are asked for with a single update.

    Reference:
        Huang et al., 2025, section 3.2. The lower bound is ours; as printed the rate may become negative.
    """

    def __init__(
        self,
        loss: Loss | None = None,
        alrs: Literal["full", "ratio"] | None = "full",
        update: Literal["separate", "accumulate"] = "separate",
    ) -> None:
        super().__init__(loss, alrs)
        self.update = checks.one_of("update", update, ("separate", "accumulate"))
        if update == "accumulate" and alrs is not None:
            raise ValueError("one update of all widths has one rate: expected alrs=None with update='accumulate'")

    def partition(self) -> list[list[str]]:
        moving = [n for n, m in self.layers.items() if not m.fixed]
        fixed = [n for n, m in self.layers.items() if m.fixed]
        return [names for names in (moving, fixed) if names]

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.update == "separate":
            losses = list(self._passes(batch, backward, self.bits).values())
        else:
            losses = self._sum(batch, backward)
        named = {f"loss_{b}": value for b, value in zip(self.bits, losses, strict=True)}
        return {"loss": torch.stack(losses).mean(), **named}

    def _sum(self, batch: Batch, backward: Callable[[Tensor], None]) -> list[Tensor]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        losses = []
        for bit in self.bits:
            with use_bits(self.model, bit):
                loss = self._loss(batch)
                backward(loss)
            losses.append(loss.detach())
        return losses


class MixedPrecision(_Switching):
    """Trains mixtures of widths: a pass at the highest, some at widths drawn layer by layer, one at the lowest.

    A layer of mean curvature $t_i$ below the average of all layers draws every width alike; a sensitive one draws
    wide ones more often: $p(b) = b / \\sum_{b'} b'$.

    Args:
        loss: as in `MultiPrecision`.
        traces: mean curvature by layer, of `weight_traces` on the network before its conversion; `None` draws every
            width alike in all layers.
        passes: drawn mixtures in a step.
        alrs: as in `MultiPrecision`; a layer's scales learn at the rate of its own width.

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
        self.traces = None if traces is None else checks_of_traces(traces)
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


def checks_of_traces(traces: Mapping[str, float]) -> dict[str, float]:
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
        model: the trained network, before `convert`, in evaluation mode.
        loss: criterion with mean reduction.
        data: a batch (x, y) or more; see `torchfolio.measure.hessian_traces`.
        samples: most random vectors; two backward passes each.
        tolerance: relative standard error at which to stop earlier.
        batch_size: see `torchfolio.measure.hessian_traces`.
        generator: of the signs.

    Returns:
        The mean curvature by name of the layer.

    Raises:
        ValueError: if there is no layer that `convert` would quantise.
    """
    names = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d)]
    if not names:
        raise ValueError("expected an nn.Linear, nn.Conv1d or nn.Conv2d; traces are of the network before convert")
    found = hessian_traces(
        model, loss, data, batch_size=batch_size, samples=samples, tolerance=tolerance, generator=generator
    )
    return {n: found[f"{n}.weight"].value / model.get_submodule(n).weight.numel() for n in names}  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


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
        model: of `convert`, trained and not stored. Layers that do not switch count in the cost.
        traces: of `weight_traces`.
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
    names, widths, losses, costs, constant = _program(model, checks_of_traces(traces), cost, example)
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
    work = _weights_of(layers) if example is None or cost == "size" else _multiply_adds(model, example)
    power = 1 if cost == "size" else 2
    costs = np.array([[work[n] * b**power for b in widths] for n in names])
    constant = float(sum(work[n] * m.bit**power for n, m in layers.items() if m.fixed))
    return names, widths, losses, costs, constant


def _weights_of(layers: Mapping[str, QuantizedLayer]) -> dict[str, int]:
    return {n: m.weight.numel() for n, m in layers.items() if m.weight is not None}


def _multiply_adds(model: nn.Module, example: Tensor) -> dict[str, int]:
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
    found = milp(
        (losses / scale).ravel(),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(costs.ravel()[None] / unit, -np.inf, budget / unit)],
        integrality=np.ones(losses.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the integer program was not solved: {found.message}")
    return found.x.reshape(rows, columns).argmax(1).tolist()


class BitSwitching(Compression):
    """Double Rounding as a way to shrink a trained network: convert, train all widths together, store int8.

    The written network switches widths (`set_bits`) after it is loaded. Train for so many epochs that the running
    statistics of every width's norms settle, which takes about 30 steps: a network that was trained for less may answer
    badly although its loss was small.

    Args:
        bits: widths, each from 2 to 8.
        bit: width that the written network runs at until it is switched; the highest by default.
        fixed: names of layers that stay at the highest width; by default the first and the last.
        act: quantise activations too.
        norm: see `convert`.
        alrs: see `MultiPrecision`.

    Raises:
        ValueError: if widths are repeated or out of range, or `bit` is none of them.

    Example:
        >>> small = compress(net, BitSwitching(bit=4), train, example=x, epochs=3).model  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        bits: Sequence[int] = (8, 6, 4, 2),
        bit: int | None = None,
        fixed: Sequence[str] | None = None,
        act: bool = True,
        norm: Literal["switchable", "shared"] = "switchable",
        alrs: Literal["full", "ratio"] | None = "full",
    ) -> None:
        self.bits = check_bits(bits)
        self.bit = self.bits[0] if bit is None else checks.one_of("bit", bit, self.bits)
        self.fixed, self.act = fixed, act
        self.norm: Literal["switchable", "shared"] = checks.one_of("norm", norm, ("switchable", "shared"))
        self.rule = MultiPrecision(alrs=alrs)

    def convert(self, model: nn.Module, example: Tensor) -> nn.Module:
        return convert(model, self.bits, fixed=self.fixed, act=self.act, norm=self.norm, example=example)

    def phases(self, model: nn.Module) -> Iterator[Phase]:
        yield Phase("all widths together", rule=self.rule)

    def finish(self, model: nn.Module) -> nn.Module:
        set_bits(store(model), self.bit)
        return model

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        arguments = {"model": network, "bits": list(self.bits), "bit": self.bit, "act": self.act, "norm": self.norm}
        if self.fixed is not None:
            arguments["fixed"] = list(self.fixed)
        return {"build": "torchfolio.efficiency.double_rounding:switchable", "arguments": arguments}

    def operations(self, model: nn.Module, example: Tensor) -> dict[str, int]:
        widths = widths_now(model)
        work = _multiply_adds(model, example)
        total = sum(n * widths[name] ** 2 for name, n in work.items())
        return {"flops": count_flops(model, example) - 2 * sum(work.values()), "bit_operations": total}


def switchable(
    model: nn.Module,
    bits: Sequence[int] = (8, 6, 4, 2),
    bit: int | None = None,
    fixed: Sequence[str] | None = None,
    act: bool = True,
    norm: Literal["switchable", "shared"] = "switchable",
) -> nn.Module:
    """The structure of a stored network, into which its state dict is loaded: what a bundle builds.

    Args:
        model: the network before its conversion.
        bits: see `convert`.
        bit: width that it runs at; the highest by default.
        fixed: see `convert`.
        act: likewise.
        norm: likewise.
    """
    made = store(convert(model, bits, fixed=fixed, act=act, norm=norm))
    if bit is not None:
        set_bits(made, bit)
    return made
