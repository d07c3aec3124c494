"""Measures Double Rounding on small images: one network at 8, 6, 4 and 2 bits beside one trained for each width.

Longer than most because LSQ, the method it is measured against, and the shift without rounding are built here.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.data import DataSplits
from torchfolio.efficiency.double_rounding import (
    DoubleRounding,
    MixedPrecision,
    MultiPrecision,
    convert,
    export,
    load_export,
    search_bits,
    use_bits,
    weight_traces,
)
from torchfolio.efficiency.quantized_layers import quantized_layers
from torchfolio.efficiency.straight_through import round_ste
from torchfolio.engine import LearningRule, evaluate, fit, seeded
from torchfolio.engine.recipes import adam, cosine
from torchfolio.engine.rules import Batch
from torchfolio.runs import Results, Run
from torchfolio.runs.tasks import OwnNetwork, own_network

BITS = (8, 6, 4, 2)


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """Data, network and budget.

    Attributes:
        data: name of the data set.
        val: training images held out.
        widths: channels of the three convolutions.
        pretrain: epochs in float32.
        epochs: epochs after the conversion.
        lr: of Adam, which a cosine takes to zero.
        weight_decay: of weights.
        passes: drawn mixtures in a step.
        probes: most random vectors for the traces.
        draws: mixtures that sampling frequencies are taken from.
    """

    data: str = "mnist10k"
    val: int = 500
    widths: tuple[int, ...] = (16, 32, 32)
    pretrain: int = 4
    epochs: int = 3
    lr: float = 1e-3
    weight_decay: float = 5e-5
    passes: int = 1
    probes: int = 16
    draws: int = 10_000


SCALES = {
    "smoke": Settings(data="digits", val=100, widths=(8, 8, 8), pretrain=2, epochs=1, probes=8, draws=1000),
    "quick": Settings(),
    "full": Settings(data="cifar10", val=5000, widths=(32, 64, 128), pretrain=30, epochs=30, passes=3, probes=64),
}


class OneWidth(MultiPrecision):
    """LSQ: one width alone, one rounding, one learning rate; the first and the last layer stay at the highest."""

    def __init__(self, bit: int) -> None:
        super().__init__(alrs=None)
        self.bit = bit

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        module = super().prepare(model, example)
        self.bits = (self.bit,)
        return module


class Shifted(DoubleRounding):
    """The negative control: bits are shifted out, which rounds down, in place of the second rounding."""

    def forward(self, x: Tensor, bit: int, samples: int = 1) -> Tensor:
        scale = self.log_scale_of(bit)[0].detach().exp()
        step = 2 ** (self.bits[0] - bit)
        return (self.integers(x).float() / step).floor().clamp(-(2 ** (bit - 1)), 2 ** (bit - 1) - 1) * step * scale


def network(shape: tuple[int, ...], num_classes: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Three convolutions of stride 2 with batch norm, and a linear head."""
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[-1]
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels, side = width, (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, num_classes))


def run(run: Run[Settings]) -> None:
    """Train the float network once, then every arm from it."""
    settings = run.settings
    data = run.data(settings.data, val=settings.val)
    with seeded(run.seed):
        net = own_network(settings, data, lambda: network(tuple(data.shape), data.num_classes, settings.widths))
        train(run, data, net, None, settings.pretrain)
    x = data.train.tensors[0][:128].to(run.device)

    def arm(rule: LearningRule, **how: Any) -> nn.Module:
        quantized = convert(net, BITS, example=x, **how)
        train(run, data, quantized, rule, settings.epochs)
        return quantized

    joint = run.arm("joint", lambda: {**at_widths(trained := arm(MultiPrecision()), data), **stored(trained, net, x)})
    run.arm("without_rates", lambda: at_widths(arm(MultiPrecision(alrs=None)), data))
    run.arm("one_update", lambda: at_widths(arm(MultiPrecision(alrs=None, update="accumulate")), data))
    alone = {
        b: run.arm(f"separate_{b}", lambda b=b: at_widths(arm(OneWidth(b), scale="separate"), data, [b])) for b in BITS
    }
    before = run.arm("before_training", lambda: untrained(net, x, data))
    mixed = run.arm("mixed", lambda: mixtures(run, data, net, arm))
    run.values(
        "accuracy",
        {f"joint_{b}": joint[f"bits_{b}"] for b in BITS} | {f"separate_{b}": alone[b][f"bits_{b}"] for b in BITS},
    )
    run.values("storage", {name: joint[name] for name in ("ratio", "difference")})
    run.values("scale_gradients", {f"gradient_{b}": before[f"gradient_{b}"] for b in BITS})
    run.values("negative_control", {name: before[name] for name in ("shift", "rounding")})
    run.values("mixed_precision", {name: mixed[name] for name in ("sigmas", "search_gap")})


def train(run: Run[Settings], data: DataSplits, net: nn.Module, rule: LearningRule | None, epochs: int) -> None:
    """Adam and a cosine, alike for every arm."""
    settings = run.settings
    fit(net, data.train, rule=rule, optimizer=adam(settings.lr, weight_decay=settings.weight_decay), scheduler=cosine(),
        epochs=epochs, seed=run.seed, device=run.device)  # fmt: skip


def at_widths(net: nn.Module, data: DataSplits, bits: Any = BITS) -> dict[str, float]:
    """Test accuracy in percent at every width."""
    scores = {}
    for bit in bits:
        with use_bits(net, bit):
            scores[f"bits_{bit}"] = 100 * evaluate(net, data.test)["accuracy"]
    return scores


@torch.no_grad()
def stored(net: nn.Module, plain: nn.Module, x: Tensor) -> dict[str, float]:
    """Bytes of stored weights over those of float32, and the largest change of an output after loading."""
    exported = export(net)
    again = load_export(convert(plain, BITS, example=x), exported).eval()
    changes = []
    for bit in BITS:
        with use_bits(net, bit), use_bits(again, bit):
            changes.append(float((net(x) - again(x)).abs().max()))
    size = sum(t.numel() * t.element_size() for name, t in exported.items() if name.endswith("integers"))
    return {"ratio": size / sum(4 * m.weight.numel() for m in quantized_layers(net).values() if m.weight is not None),
            "difference": max(changes)}  # fmt: skip


def untrained(net: nn.Module, x: Tensor, data: DataSplits) -> dict[str, float]:
    """Right after conversion: gradients of shared scales, and accuracy at 2 bits with a rounding and with a shift."""
    quantized = convert(net, BITS, example=x)
    result = {"rounding": at_widths(quantized, data, [2])["bits_2"]}
    moving = {n: m for n, m in quantized_layers(quantized).items() if not m.fixed}
    inputs, target = (t[:1280].to(x.device) for t in data.train.tensors)
    for bit in BITS:
        sizes = []
        for a, y in zip(inputs.split(128), target.split(128), strict=True):
            fresh = copy.deepcopy(quantized).train()
            with use_bits(fresh, bit):
                F.cross_entropy(fresh(a), y).backward()
            for name in moving:
                log_scale = quantized_layers(fresh)[name].quantizer.log_scale_of(bit)[0]
                assert log_scale.grad is not None
                sizes.append(float(log_scale.grad.abs() / log_scale.detach().exp()))
        result[f"gradient_{bit}"] = sum(sizes) / len(sizes)
    for layer in moving.values():
        shifted = Shifted(layer.quantizer.bits).to(x.device)
        shifted.load_state_dict(layer.quantizer.state_dict())
        layer.quantizer = shifted
    return result | {"shift": at_widths(quantized, data, [2])["bits_2"]}


def mixtures(run: Run[Settings], data: DataSplits, net: nn.Module, arm: Any) -> dict[str, Any]:
    """Networks of mixed widths, drawn by curvature and alike; the search, beside all combinations."""
    settings = run.settings
    batch = tuple(t[:512].to(run.device) for t in data.train.tensors)
    traces = weight_traces(net.eval(), F.cross_entropy, batch, samples=settings.probes)
    rule = MixedPrecision(traces=traces, passes=settings.passes)
    result: dict[str, Any] = {"traces": list(traces.values())}
    for name, each in (("curvature", rule), ("alike", MixedPrecision(passes=settings.passes))):
        trained = arm(each)
        sizes = {n: m.quantized_weight().numel() for n, m in quantized_layers(trained).items()}
        for mean in (3, 4, 6):
            constant = sum(8 * sizes[n] for n, m in quantized_layers(trained).items() if m.fixed)
            room = mean * sum(sizes[n] for n, m in quantized_layers(trained).items() if not m.fixed)
            with use_bits(trained, search_bits(trained, traces, constant + room)):
                result[f"{name}_{mean}"] = 100 * evaluate(trained, data.test)["accuracy"]
    return result | {"sigmas": frequencies(rule, settings.draws), "search_gap": search_gap(net, traces)}


def frequencies(rule: MixedPrecision, draws: int) -> float:
    """Largest distance of a frequency from its chance, in standard deviations, of a sensitive layer and another."""
    rule.traces, rule.switching = {"sensitive": 1.0, "insensitive": 0.0}, ["sensitive", "insensitive"]
    rule.table = rule.probabilities(rule.switching)
    drawn = [rule.draw() for _ in range(draws)]
    counts = torch.tensor([[sum(d[n] == b for d in drawn) for b in BITS] for n in rule.switching]) / draws
    return float(((counts - rule.table).abs() / (rule.table * (1 - rule.table) / draws).sqrt()).max())


def search_gap(net: nn.Module, traces: dict[str, float]) -> float:
    """What the search loses against all combinations of widths, over several budgets; all layers switch."""
    quantized = convert(net, BITS, fixed=[])
    layers = quantized_layers(quantized)
    sizes = {n: m.quantized_weight().numel() for n, m in layers.items()}
    with torch.no_grad():
        losses = {(n, b): max(traces[n], 0) * float((m.quantizer(m.weight, b) - m.weight).double().square().sum())
                  for n, m in layers.items() for b in BITS if m.weight is not None}  # fmt: skip
    gap = 0.0
    for mean in (2.5, 3, 4, 5.5, 7):
        budget = mean * sum(sizes.values())
        picks = (dict(zip(layers, p, strict=True)) for p in itertools.product(BITS, repeat=len(layers)))
        best = min(
            sum(losses[i] for i in p.items()) for p in picks if sum(sizes[n] * b for n, b in p.items()) <= budget
        )
        ours = sum(losses[i] for i in search_bits(quantized, traces, budget).items())
        gap = max(gap, ours / best - 1)
    return gap


def peers(bench: Any) -> None:
    """One batch at four widths, beside four steps of the float network and of LSQ from elementary operations."""
    net = network((1, 28, 28), 10, (32, 64, 64))
    x, y = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))

    class Chain(DoubleRounding):
        def forward(self, x: Tensor, bit: int, samples: int = 1) -> Tensor:
            scale = self.log_scale_of(bit)[0].exp()
            low, high = (-(2 ** (bit - 1)), 2 ** (bit - 1) - 1) if self.is_signed() else (0, 2**bit - 1)
            return round_ste((x / scale).clamp(low, high)) * scale

    def stepper(model: nn.Module, rule: Any) -> Any:
        model.train()
        rule.prepare(model, (x, y))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        rule.configure(optimizer, None)

        def step() -> None:
            optimizer.zero_grad()
            rule.step((x, y), Tensor.backward)
            optimizer.step()

        return step

    chained = convert(net, BITS, example=x, scale="separate")
    for layer in quantized_layers(chained).values():
        layer.quantizer.__class__ = Chain
        if layer.activation is not None:
            layer.activation.__class__ = Chain
    ours = stepper(convert(net, BITS, example=x), MultiPrecision())
    plain, optimizer = copy.deepcopy(net).train(), None
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)

    def plain_steps() -> None:
        for _ in BITS:
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()

    bench.compare(
        "a batch of 128 at 4 widths",
        ours=ours,
        float32_steps=plain_steps,
        lsq=stepper(chained, MultiPrecision(alrs=None)),
    )


def figures(results: Results) -> dict[str, Figure]:
    """Accuracy by width, and gradients of the scales right after conversion."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for arm, label in (
        ("joint", "joint, adaptive rates"),
        ("without_rates", "joint, one rate"),
        ("one_update", "joint, one update"),
    ):
        left.plot(BITS, [results.values(arm, f"bits_{b}").mean() for b in BITS], marker="o", label=label)
    left.plot(
        BITS,
        [results.values(f"separate_{b}", f"bits_{b}").mean() for b in BITS],
        "k--",
        marker="o",
        label="a network each (LSQ)",
    )
    left.set(xlabel="bits", ylabel="test accuracy (%)")
    left.legend()
    right.semilogy(BITS, [results.values("before_training", f"gradient_{b}").mean() for b in BITS], marker="o")
    right.set(xlabel="bits", ylabel="mean gradient of the shared scales")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return {"widths": fig}
