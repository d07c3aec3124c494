"""Measures Double Rounding on small images: one network at 8, 6, 4 and 2 bits beside one trained for each width."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.data import DataSplits
from torchfolio.efficiency.double_rounding import MultiPrecision, convert, export, load_export, use_bits
from torchfolio.efficiency.quantized_layers import quantized_layers
from torchfolio.engine import LearningRule, seeded
from torchfolio.engine.recipes import adam, cosine
from torchfolio.experiments._lsq import OneWidth
from torchfolio.experiments._mixed_precision import mixtures
from torchfolio.experiments._shifted_bits import shifted
from torchfolio.models.conv_net import conv_block
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import OwnNetwork, accuracy, own_network

BITS = (8, 6, 4, 2)


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """Data, network and budget."""

    data: str = setting("mnist10k", "name of the data set")
    val: int = setting(500, "training images held out")
    widths: tuple[int, ...] = setting((16, 32, 32), "channels of the three convolutions")
    pretrain: int = setting(4, "epochs in float32")
    epochs: int = setting(3, "epochs after the conversion")
    lr: float = setting(1e-3, "learning rate of Adam, which a cosine takes to zero")
    weight_decay: float = setting(5e-5, "weight decay of weights")
    passes: int = setting(1, "drawn mixtures in a step")
    probes: int = setting(16, "most random vectors for the traces")
    draws: int = setting(10_000, "mixtures that sampling frequencies are taken from")


SCALES = {
    "smoke": Settings(data="digits", val=100, widths=(8, 8, 8), pretrain=2, epochs=1, probes=8, draws=1000),
    "quick": Settings(),
    "full": Settings(data="cifar10", val=5000, widths=(32, 64, 128), pretrain=30, epochs=30, passes=3, probes=64),
}


def network(shape: tuple[int, ...], num_classes: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Convolutions of stride 2 with batch norm, and a linear head."""
    convolutions = [conv_block(fan_in, fan_out, stride=2) for fan_in, fan_out in pairwise((shape[0], *widths))]
    side = math.ceil(shape[-1] / 2 ** len(widths))
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(widths[-1] * side**2, num_classes))


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
    mixed = run.arm("mixed", lambda: mixtures(run, data, net, BITS, arm))
    together = {f"joint_{b}": joint[f"bits_{b}"] for b in BITS}
    run.values("accuracy", together, **{f"separate_{b}": alone[b][f"bits_{b}"] for b in BITS})
    run.values("storage", pick(joint, "ratio", "difference"))
    run.values("scale_gradients", {f"gradient_{b}": before[f"gradient_{b}"] for b in BITS})
    run.values("negative_control", pick(before, "shift", "rounding"))
    run.values("mixed_precision", pick(mixed, "sigmas", "search_gap"))


def train(run: Run[Settings], data: DataSplits, net: nn.Module, rule: LearningRule | None, epochs: int) -> None:
    """Adam and a cosine, alike for every arm."""
    optimizer = adam(run.settings.lr, weight_decay=run.settings.weight_decay)
    run.fit(net, data.train, rule=rule, optimizer=optimizer, scheduler=cosine(), epochs=epochs)


def at_widths(net: nn.Module, data: DataSplits, bits: Any = BITS) -> dict[str, float]:
    """Test accuracy in percent at every width."""
    scores = {}
    for bit in bits:
        with use_bits(net, bit):
            scores[f"bits_{bit}"] = accuracy(net, data.test)
    return scores


@torch.no_grad()
def stored(net: nn.Module, plain: nn.Module, x: Tensor) -> dict[str, float]:
    """Bytes of stored weights over those of float32, and the largest change of an output after loading."""
    exported = export(net)
    again = load_export(convert(plain, BITS, example=x), exported).eval()
    difference = 0.0
    for bit in BITS:
        with use_bits(net, bit), use_bits(again, bit):
            difference = max(difference, float((net(x) - again(x)).abs().max()))
    size = sum(tensor.nbytes for name, tensor in exported.items() if name.endswith("integers"))
    weights = [layer.weight for layer in quantized_layers(net).values() if layer.weight is not None]
    return {"ratio": size / sum(4 * weight.numel() for weight in weights), "difference": difference}


def untrained(net: nn.Module, x: Tensor, data: DataSplits) -> dict[str, float]:
    """Right after conversion: gradients of shared scales, and accuracy at 2 bits with a rounding and with a shift."""
    quantized = convert(net, BITS, example=x)
    result = {"rounding": at_widths(quantized, data, [2])["bits_2"]}
    inputs, target = (t[:1280].to(x.device) for t in data.train.tensors)
    learner = copy.deepcopy(quantized).train()
    for bit in BITS:
        scales = [m.quantizer.log_scale_of(bit)[0] for m in quantized_layers(learner).values() if not m.fixed]
        sizes = []
        for a, y in zip(inputs.split(128), target.split(128), strict=True):
            with use_bits(learner, bit):
                gradients = torch.autograd.grad(F.cross_entropy(learner(a), y), scales)
            sizes += [float(g.abs() / s.detach().exp()) for g, s in zip(gradients, scales, strict=True)]
        result[f"gradient_{bit}"] = sum(sizes) / len(sizes)
    return result | {"shift": at_widths(shifted(quantized), data, [2])["bits_2"]}


def figures(results: Results) -> plots.Figures:
    """Accuracy by width, and gradients of the scales right after conversion."""
    arms = {"joint, adaptive rates": "joint", "joint, one rate": "without_rates", "joint, one update": "one_update"}
    lines = {label: [(arm, f"bits_{b}") for b in BITS] for label, arm in arms.items()}
    lines["a network each (LSQ)"] = [(f"separate_{b}", f"bits_{b}") for b in BITS]
    gradients = {"shared scales": [("before_training", f"gradient_{b}") for b in BITS]}
    return {
        "widths": plots.curves(results, lines, x=BITS, xlabel="bits", ylabel="test accuracy (%)"),
        "gradients": plots.curves(results, gradients, x=BITS, xlabel="bits", ylabel="mean gradient", logy=True),
    }
