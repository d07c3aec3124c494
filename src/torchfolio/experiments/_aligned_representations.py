"""Networks trained side by side on tasks of clusters, and how their hidden layers align with inputs and with labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchfolio.insight.representation_geometry import (
    ClusterTask,
    ShallowNetwork,
    aligned_kernel,
    kernel_alignment,
    kernel_to_inputs,
    separable_xor,
    train_side_by_side,
)
from torchfolio.runs import Run


def trained(
    run: Run[Any], tasks: list[ClusterTask], kinds: tuple[str, ...], *, train_readout: bool = False
) -> dict[str, list[ShallowNetwork]]:
    """A network of every kind for every task, all in one tensor; kinds start from the same weights."""
    settings, nets = run.settings, []
    D, O = tasks[0].means.shape[1], tasks[0].labels.shape[1]
    for kind in kinds:
        for k in range(len(tasks)):
            generator = torch.Generator().manual_seed(1000 * run.seed + k)
            nets.append(ShallowNetwork(D, settings.width, O, kind, train_readout=train_readout, generator=generator))
    generator = run.generator()
    train_side_by_side(nets, tasks * len(kinds), steps=settings.steps, generator=generator)
    return {kind: nets[k * len(tasks) : (k + 1) * len(tasks)] for k, kind in enumerate(kinds)}


def alignments(net: ShallowNetwork, task: ClusterTask) -> tuple[float, float]:
    """With inputs and with labels, of noise-free condition means."""
    with torch.no_grad():
        z = net.hidden(task.means.float()).double()
    K_x, K_y = task.kernels
    return kernel_alignment(z @ z.T, K_x), kernel_alignment(z @ z.T, K_y)


def xor(run: Run[Any]) -> dict[str, float]:
    """XOR at four separabilities: alignments by kind."""
    found = {}
    for epsilon in (0.0, 0.25, 0.5, 1.0):
        generators = [torch.Generator().manual_seed(100 * run.seed + k) for k in range(run.settings.nets)]
        tasks = [separable_xor(run.settings.dim, epsilon, generator=generator) for generator in generators]
        for kind, nets in trained(run, tasks, ("tanh", "relu")).items():
            pairs = [alignments(net, task) for net, task in zip(nets, tasks, strict=True)]
            for name, values in zip(("in", "out"), zip(*pairs, strict=True), strict=True):
                found[f"{kind}_{name}_{epsilon:g}".replace(".", "")] = float(np.mean(values))
    return found


def kernels(run: Run[Any]) -> dict[str, Any]:
    """Sixteen conditions with one label or four, at given alignments of inputs and labels; trained readouts besides."""
    bits = torch.tensor([[k >> j & 1 for j in range(4)] for k in range(16)], dtype=torch.float64)
    found = {}
    for outputs in (1, 4):
        labels = bits[:, :outputs]
        K_y = (2 * labels - 1) @ (2 * labels - 1).T
        tasks = []
        for c in run.settings.alignments:
            generator = run.generator()
            K = aligned_kernel(K_y, c, scale=run.settings.dim / 4, generator=generator)
            tasks.append(ClusterTask(kernel_to_inputs(K, run.settings.dim, generator=generator), labels, 0.1))
        for train_readout in (False, True):
            for kind, nets in trained(run, tasks, ("tanh", "relu"), train_readout=train_readout).items():
                pairs = [alignments(net, task) for net, task in zip(nets, tasks, strict=True)]
                label = f"{kind}_{outputs}{'_trained' if train_readout else ''}"
                found[f"{label}_in"], found[f"{label}_out"] = (list(v) for v in zip(*pairs, strict=True))
    return found
