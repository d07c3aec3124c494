"""Measures what tanh and ReLU make of four clusters, of XOR, of kernels between inputs and labels, and of digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from torchfolio.experiments._aligned_representations import alignments, kernels, trained, xor
from torchfolio.experiments._digit_classes import digits
from torchfolio.insight.representation_geometry import (
    ClusterTask,
    ShallowNetwork,
    ccgp,
    decoding_accuracy,
    dichotomies,
    parallelism_score,
    participation_ratio,
    random_clusters,
)
from torchfolio.runs import Results, Run, pick, plots, setting, threads


@dataclass(frozen=True)
class Settings:
    """Toy tasks and networks; P, D, width and the fixed readout are the authors'."""

    nets: int = setting(3, "networks of each kind for a seed, on a task of their own each")
    dim: int = setting(100, "dimension D")
    width: int = setting(120, "width M")
    steps: int = setting(1500, "number of steps of gradient descent")
    noise: float = setting(3.0, "strong noise of the tests of generalisation and decoding")
    samples: int = setting(800, "number of samples of these tests")
    alignments: tuple[float, ...] = setting((0.0, 0.3, 0.6, 0.9), "between inputs and labels, of the third task")
    epochs: int = setting(60, "number of epochs on digits")


SCALES = {
    "smoke": Settings(nets=1, dim=20, width=16, steps=50, samples=80, alignments=(0.3,), epochs=2),
    "quick": Settings(),
    "full": Settings(nets=20, steps=20_000, samples=4000),
}
KINDS = ("tanh", "relu", "relu_linear_gradient", "tanh_step_gradient")


def clusters(run: Run[Settings]) -> dict[str, Any]:
    """Random clusters: alignments, parallelism, generalisation, decoding, and what units turn to, by kind."""
    settings = run.settings
    generators = [torch.Generator().manual_seed(100 * run.seed + k) for k in range(settings.nets)]
    tasks = [random_clusters(4, settings.dim, generator=generator) for generator in generators]
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for kind, nets in trained(run, tasks, KINDS).items():
        for k, (net, task) in enumerate(zip(nets, tasks, strict=True)):
            a_in, a_out = alignments(net, task)
            generator = torch.Generator().manual_seed(100 * run.seed + k)
            x, _, c = task.sample(settings.samples, noise=settings.noise, generator=generator)
            clean, y, _ = task.sample(settings.samples, generator=generator)
            split = task.labels[:, 0].bool().numpy()
            others = [d for d in dichotomies(4) if (d != split).any() and (d == split).any()]
            with torch.no_grad():
                z, means = net.hidden(x.float()), net.hidden(task.means.float())
                note(f"{kind}_accuracy", float(((net(clean.float()) > 0) == (y > 0.5)).double().mean()))
            note(f"{kind}_in", a_in)
            note(f"{kind}_out", a_out)
            note(f"{kind}_parallelism", parallelism_score(means, split))
            note(f"{kind}_ccgp", ccgp(z, c, split))
            note(f"{kind}_decoding", float(np.mean([decoding_accuracy(z, c, d) for d in others])))
            note(f"{kind}_cosine", class_axis_cosine(net, task))
            note(f"{kind}_few", float(((means > 0).sum(0) <= 2).double().mean()))
            note(f"{kind}_dimension", participation_ratio(means))
    return {name: float(np.mean(values)) for name, values in found.items()}


def class_axis_cosine(net: ShallowNetwork, task: ClusterTask) -> float:
    """Mean |cosine| of the input weights, within the span of the means, with the axis between the classes."""
    axis = ((2 * task.labels[:, :1] - 1).T @ task.means)[0]
    span = torch.linalg.svd(task.means, full_matrices=False)
    basis = span.Vh[1e-9 * span.S[0] < span.S]
    inside = net.weight.detach().double() @ basis.T @ basis
    return float(F.cosine_similarity(inside, axis[None]).abs().mean())


def run(run: Run[Settings]) -> None:
    """Train on every task, one thread: the matrices are tiny."""
    with threads(1):
        done = run.arm("clusters", clusters, run)
        parted = run.arm("xor", xor, run)
        run.arm("kernels", kernels, run)
        real = run.arm("digits", digits, run)

    def of_both(*names: str) -> dict[str, float]:
        return {f"{kind}_{name}": done[f"{kind}_{name}"] for kind in ("tanh", "relu") for name in names}

    run.values("alignment", of_both("in", "out", "accuracy"))
    run.values("disentangling", of_both("parallelism", "ccgp", "decoding"))
    run.values("mechanism", tanh_cosine=done["tanh_cosine"], relu_cosine=done["relu_cosine"], relu_few=done["relu_few"])
    run.values("separable_xor", pick(parted, "tanh_out_05", "relu_out_05", "tanh_in_0", "relu_in_0"))
    run.values("real_data", real)
    linear, step = done["relu_linear_gradient_out"], done["tanh_step_gradient_in"]
    usual = {"relu_out": done["relu_out"], "tanh_in": done["tanh_in"]}
    run.values("negative_control", usual, relu_linear_out=linear, tanh_step_in=step)


def figures(results: Results) -> plots.Figures:
    """Alignments by kind, and over the alignment of inputs and labels."""
    names = {
        "tanh": "tanh",
        "ReLU": "relu",
        "ReLU, derivative 1": "relu_linear_gradient",
        "tanh, step": "tanh_step_gradient",
    }
    lines = {
        f"{kind}, {where}": ("kernels", f"{kind}_1_{end}")
        for kind in ("tanh", "relu")
        for where, end in (("inputs", "in"), ("labels", "out"))
    }
    across, up = "alignment of inputs and labels", "alignment of the hidden layer"
    return {
        f"alignment with {where}": plots.bars(
            results, {label: ("clusters", f"{kind}_{end}") for label, kind in names.items()}, ylabel="alignment"
        )
        for where, end in (("labels", "out"), ("inputs", "in"))
    } | {"kernels": plots.curves(results, lines, x=results.settings.alignments, xlabel=across, ylabel=up)}
