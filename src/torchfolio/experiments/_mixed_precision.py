"""Networks whose layers differ in width: draws by curvature, and the search for widths within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.data import DataSplits
from torchfolio.efficiency.double_rounding import MixedPrecision, convert, search_bits, use_bits, weight_traces
from torchfolio.efficiency.quantized_layers import quantized_layers
from torchfolio.engine import LearningRule
from torchfolio.runs import Run
from torchfolio.runs.tasks import accuracy

__all__ = ["mixtures"]


def mixtures(
    run: Run[Any], data: DataSplits, net: nn.Module, bits: tuple[int, ...], learn: Callable[[LearningRule], nn.Module]
) -> dict[str, Any]:
    """Networks of mixed widths, drawn by curvature and alike; the search, beside all combinations.

    Args:
        run: run whose settings have `probes` for the traces, `passes` of a step and `draws` for the frequencies.
        data: images.
        net: trained float network.
        bits: widths, the largest first.
        learn: trains a converted copy of the network by a rule.
    """
    settings = run.settings
    batch = tuple(t[:512].to(run.device) for t in data.train.tensors)
    traces = weight_traces(net.eval(), F.cross_entropy, batch, samples=settings.probes)
    rule = MixedPrecision(traces=traces, passes=settings.passes)
    result: dict[str, Any] = {"traces": list(traces.values())}
    for name, each in (("curvature", rule), ("alike", MixedPrecision(passes=settings.passes))):
        trained = learn(each)
        sizes = {n: m.quantized_weight().numel() for n, m in quantized_layers(trained).items()}
        for mean in (3, 4, 6):
            constant = sum(bits[0] * sizes[n] for n, m in quantized_layers(trained).items() if m.fixed)
            room = mean * sum(sizes[n] for n, m in quantized_layers(trained).items() if not m.fixed)
            with use_bits(trained, search_bits(trained, traces, constant + room)):
                result[f"{name}_{mean}"] = accuracy(trained, data.test)
    return result | {"sigmas": frequencies(rule, bits, settings.draws), "search_gap": search_gap(net, bits, traces)}


def frequencies(rule: MixedPrecision, bits: tuple[int, ...], draws: int) -> float:
    """Largest distance of a frequency from its chance, in standard deviations, of a sensitive layer and another."""
    rule.traces, rule.switching = {"sensitive": 1.0, "insensitive": 0.0}, ["sensitive", "insensitive"]
    rule.table = rule.probabilities(rule.switching)
    drawn = [rule.draw() for _ in range(draws)]
    counts = torch.tensor([[sum(d[n] == b for d in drawn) for b in bits] for n in rule.switching]) / draws
    return float(((counts - rule.table).abs() / (rule.table * (1 - rule.table) / draws).sqrt()).max())


def search_gap(net: nn.Module, bits: tuple[int, ...], traces: dict[str, float]) -> float:
    """What the search loses against all combinations of widths, over several budgets; all layers switch."""
    quantized = convert(net, bits, fixed=[])
    layers = quantized_layers(quantized)
    sizes = {n: m.quantized_weight().numel() for n, m in layers.items()}
    with torch.no_grad():
        losses = {(n, b): max(traces[n], 0) * float((m.quantizer(m.weight, b) - m.weight).double().square().sum())
                  for n, m in layers.items() for b in bits if m.weight is not None}  # fmt: skip
    gap = 0.0
    for mean in (2.5, 3, 4, 5.5, 7):
        budget = mean * sum(sizes.values())
        picks = (dict(zip(layers, p, strict=True)) for p in itertools.product(bits, repeat=len(layers)))
        best = min(
            sum(losses[i] for i in p.items()) for p in picks if sum(sizes[n] * b for n, b in p.items()) <= budget
        )
        ours = sum(losses[i] for i in search_bits(quantized, traces, budget).items())
        gap = max(gap, ours / best - 1)
    return gap
