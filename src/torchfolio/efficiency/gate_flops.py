"""Operations of a network with gates: estimated before any gate is trained, and measured after, sample by sample."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.data.examples import Examples
from torchfolio.efficiency.gate_placement import attach_gates
from torchfolio.efficiency.gated_conv import Criterion, GatedConv, gated_layers
from torchfolio.engine.modes import evaluating
from torchfolio.measure import count_flops
from torchfolio.shown import Shown

__all__ = ["Flops", "choose_r", "estimate_flops", "gates_open", "measure_flops"]


@dataclass(frozen=True, repr=False)
class Flops(Shown):
    """Operations of a network whose gates are closed sample by sample, two for a multiply-add.

    Attributes:
        dense: without gates, of one sample.
        per_sample: operations with gates `[N]`, those of the gates not counted.
        gates: gates of all gates together, of one sample.
    """

    dense: int
    per_sample: Tensor
    gates: int

    @property
    def reductions(self) -> Tensor:
        """The share that is saved `[N]`."""
        return 1 - self.per_sample / self.dense

    @property
    def reduction(self) -> float:
        """The mean share that is saved."""
        return float(self.reductions.mean())

    @property
    def reduction_with_gates(self) -> float:
        """The mean share that is saved when the gates' own operations count."""
        return self.reduction - self.gates / self.dense


@torch.no_grad()
def measure_flops(model: nn.Module, data: Any, *, batch_size: int = 256) -> Flops:
    """Operations on every sample, by the gates that open and the channels that reach each layer.

    Args:
        model: model of `attach_gates`; mode and statistics are left as they are.
        data: inputs, a data set or a loader; see `torchfolio.data.Examples`.
        batch_size: samples at a time.

    Raises:
        ValueError: if there are no gates, no samples, or inputs that are not finite.
    """
    layers, rows = gated_layers(model), []
    sizes: dict[str, int] = {}
    like = next(model.parameters())
    first: Tensor | None = None
    try:
        for layer in layers.values():
            layer.counting = True
        with evaluating(model):
            for x, *_ in Examples(data).batches(batch_size):
                x = checks.finite("inputs", x.to(like.device, like.dtype))
                first = x[:1] if first is None else first
                model(x)
                # A layer that did not run has no counts.
                macs = {n: m.macs for n, m in layers.items() if m.macs is not None}
                rows.append(torch.stack(list(macs.values())).sum(0).cpu())
            assert first is not None
            handles = [m.conv.register_forward_hook(partial(_count_dense, sizes, n)) for n, m in layers.items()]
            try:
                gates = 2 * sum(m.predictor.linear.weight.numel() for m in layers.values())
                whole = count_flops(model, first) - gates
            finally:
                for handle in handles:
                    handle.remove()
    finally:
        for layer in layers.values():
            layer.counting, layer.macs = False, None
    return Flops(whole, whole - 2 * sum(sizes.values()) + 2 * torch.cat(rows), gates)


def _count_dense(sizes: dict[str, int], name: str, conv: nn.Module, inputs: Any, output: Tensor) -> None:
    assert isinstance(conv, nn.Conv2d)
    sizes[name] = math.prod(output.shape[2:]) * conv.weight.numel()


def estimate_flops(model: nn.Module, data: Any, r: float, *, criterion: Criterion = "mass") -> Flops:
    """Operations with gates that hit their targets exactly, known before any gate is trained.

    Args:
        model: trained network, with gates or without.
        data: inputs like those of training.
        r: share of the heat.
        criterion: criterion of the targets.

    Raises:
        ValueError: as `attach_gates` and `measure_flops`.
    """
    checks.between("r", r, 0, 1, inclusive=(False, True))
    gated = any(isinstance(m, GatedConv) for m in model.modules())
    net = copy.deepcopy(model) if gated else attach_gates(model, r, criterion=criterion)
    with _oracle(net, r):
        return measure_flops(net, data)


@contextmanager
def _oracle(model: nn.Module, r: float) -> Iterator[None]:
    layers = gated_layers(model).values()
    before = [(layer.oracle, layer.r) for layer in layers]
    try:
        for layer in layers:
            layer.oracle, layer.r = True, r
        yield
    finally:
        for layer, (oracle, own) in zip(layers, before, strict=True):
            layer.oracle, layer.r = oracle, own


def choose_r(model: nn.Module, data: Any, reduction: float, *, tolerance: float = 0.005) -> float:
    """The share of the heat at which the estimated saving is as wanted, by bisection.

    Args:
        model: trained network, without gates.
        data: inputs like those of training, some hundreds.
        reduction: share of the operations to save, such as 0.4.
        tolerance: tolerance of the saving.

    Raises:
        ValueError: if no share gives it; the range that can be reached is named.
    """
    checks.between("reduction", reduction, 0, 1, inclusive=False)
    checks.positive("tolerance", tolerance)
    net = attach_gates(model, 1.0)

    def saved(r: float) -> float:
        with _oracle(net, r):
            return measure_flops(net, data).reduction

    low, high = 1e-6, 1.0
    most, least = saved(low), saved(high)
    if not least - tolerance <= reduction <= most + tolerance:
        raise ValueError(
            f"expected a reduction between {least:.3f} and {most:.3f}, which r = 1 and r near 0 give, got {reduction}"
        )
    for _ in range(20):
        middle = (low + high) / 2
        value = saved(middle)
        if abs(value - reduction) <= tolerance:
            return middle
        low, high = (middle, high) if value > reduction else (low, middle)
    return (low + high) / 2


@torch.no_grad()
def gates_open(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Which filters open for every input, bool `[B, C]` by name of the layer, in evaluation mode."""
    layers = gated_layers(model)
    with evaluating(model):
        model(x)
    return {name: layer.last.mask for name, layer in layers.items() if layer.last is not None}
