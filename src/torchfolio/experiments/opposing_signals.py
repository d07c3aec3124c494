"""Measures the solvable model, and the examples behind the first rise of the loss of a small network on photographs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.insight.opposing_signals import OpposingSignalModel, find_groups, inject, measure_groups, trace
from torchfolio.measure import auroc
from torchfolio.models import MLP
from torchfolio.runs import Results, Run, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """The model of Section 4, and full batches on photographs."""

    data: str = setting("cifar10", "name of the data set")
    images: int = setting(1000, "number of images to train on")
    hidden: tuple[int, ...] = setting((64, 64), "widths of the network")
    lr: float = setting(0.1, "step size")
    steps: int = setting(250, "number of steps of gradient descent")
    planted: int = setting(30, "images with a planted signal, half in each of two classes")
    flow_lr: float = setting(2.5e-5, "step size that stands for gradient flow in the model")
    flow_steps: int = setting(240_000, "number of steps of gradient flow")


SCALES = {
    "smoke": Settings("digits", 100, (8,), steps=20, planted=4, flow_steps=300),
    "quick": Settings(),
    "full": Settings(images=5000, steps=1000),
}
ALPHA, BETA, LIMIT = 50.0, 4.0, 120.0


def theory(run: Run[Settings], alpha: float) -> dict[str, Any]:
    """Gradient flow and gradient descent at 2 / lr = 120 on the solvable model."""
    model = OpposingSignalModel(20, 20, alpha, 0.05, BETA, seed=run.seed)
    start = model.start(generator=run.generator())
    # The fall at the start is quick: it is looked at closely.
    lr, steps = run.settings.flow_lr, run.settings.flow_steps
    first = model.simulate(lr, steps // 60, start, every=20)
    flow = model.simulate(lr, steps, first.state, every=max(1, steps // 300))
    descent = model.simulate(2 / LIMIT, 140, start)
    excess = descent.loss - 0.5 * alpha
    peak = int((excess[1:] - excess[:-1] > 0).nonzero()[0]) if bool((excess[1:] > excess[:-1]).any()) else 0
    top = int(excess[peak:].argmax()) + peak
    signs = descent.delta.sign()
    alternating = 0
    for step in range(top, 0, -1):
        if signs[step] * signs[step - 1] >= 0:
            break
        alternating += 1
    q, sharpness = (torch.cat([getattr(part, n) for part in (first, flow)]) for n in ("conserved", "sharpness"))
    bound_c = (float(q[0]) + math.sqrt(float(q[0]) ** 2 + 4 * BETA**2)) / 2
    return {
        "drift": float((q - q[0]).abs().max() / q[0].abs().clamp_min(1e-9)), "final": float(sharpness[-1]),
        "closed_form": model.final_sharpness(*start), "lowest_at": int(sharpness.argmin()),
        "alternating": alternating, "spike": float(excess[top] / excess[: peak + 1].min().clamp_min(1e-12)),
        "descent_final": float(descent.sharpness[-1]), "rises": int((excess[1:] > excess[:-1] + 1e-9).sum()),
        "excess": float(sharpness.max() / max(bound_c + BETA**2 / bound_c, float(sharpness[0])) - 1),
        "flow_sharpness": sharpness, "descent_loss": excess, "descent_sharpness": descent.sharpness,
    }  # fmt: skip


def network(run: Run[Settings], x: Tensor) -> nn.Module:
    torch.manual_seed(run.seed)
    return MLP(x[0].numel(), 10, run.settings.hidden).to(run.device)


def photographs(run: Run[Settings], x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train by full batches, and measure the groups of the first rise of the loss."""
    net = network(run, x)
    path = trace(net, (x, y), lr=run.settings.lr, steps=run.settings.steps, sharpness_every=25, keep_first_rise=True)
    groups = find_groups(path.losses)
    found: dict[str, Any] = {"limit": path.limit, "start": path.sharpness[0], "instability": groups.instability,
                             "loss": path.losses.mean(1), "steps": list(path.steps), "sharpness": list(path.sharpness)}  # fmt: skip
    if groups.step in path.snapshots:
        net.load_state_dict(path.snapshots[groups.step])
        found["at_rise"] = path.sharpness[path.steps.index(groups.step)]
    else:
        found["at_rise"] = math.nan
    table: Any = measure_groups(net, (x, y), groups, seed=run.seed)
    changes = np.diff(path.losses, axis=0)
    follows = changes[min(groups.step + 1, len(changes) - 1)]
    return found | {
        "step": groups.step, "cosine": table.loc["opposing", "cosine"], "random_cosine": table.loc["random", "cosine"],
        "curvature_1": table.loc["opposing", "curvature_1"], "curvature_2": table.loc["opposing", "curvature_2"],
        "norm_ratio": table.loc["opposing", "norm_ratio"], "concentration": groups.concentration,
        "opposition": groups.opposition,
        "alternation_1": float(groups.delta[groups.positive].mean() * follows[groups.positive].mean()),
        "alternation_2": float(groups.delta[groups.negative].mean() * follows[groups.negative].mean()),
    }  # fmt: skip


def planted(run: Run[Settings], x: Tensor, y: Tensor, *, plant: bool) -> dict[str, float]:
    """AUROC of the outlier score for planted images, or for the same as they are, and signs of both classes' changes."""
    classes = (0, 1)
    changed, mask = inject(x, y, classes, run.settings.planted, seed=run.seed)
    net = network(run, x)
    data = (changed if plant else x, y)
    path = trace(net, data, lr=run.settings.lr, steps=run.settings.steps, sharpness_every=0)
    first = find_groups(path.losses)
    groups = find_groups(path.losses[: first.step + 2])
    means = [groups.delta[(mask & (y == label)).numpy()].mean() for label in classes]
    return {"auroc": auroc(torch.from_numpy(groups.score), mask), "opposite": float(means[0] * means[1] < 0)}


def run(run: Run[Settings]) -> None:
    """The model with outliers and without, then photographs as they are and with a planted signal."""
    settings = run.settings
    model = run.arm("model", theory, run, ALPHA)
    run.values("progressive_sharpening", pick(model, "drift", "final", "closed_form", "lowest_at"))
    run.values("model_spike", alternating=model["alternating"], spike=model["spike"], final=model["descent_final"],
               limit=LIMIT, closed_form=model["closed_form"])  # fmt: skip
    plain = run.arm("model without outliers", theory, run, 0.0)
    run.values("control_no_outliers", excess=plain["excess"], rises=plain["rises"])
    data = run.data(settings.data, train_size=settings.images)
    x, y = data.train.tensors
    real = run.arm("photographs", photographs, run, x, y)
    run.values("edge_of_stability", pick(real, "start", "at_rise", "limit"))
    names = ("cosine", "random_cosine", "curvature_1", "curvature_2", "concentration", "alternation_1", "alternation_2")
    run.values("opposing_groups", {k: real[k] for k in names})
    run.values("planted_signal", run.arm("planted", planted, run, x, y, plant=True))
    run.values("control_not_planted", auroc=run.arm("not planted", planted, run, x, y, plant=False)["auroc"])


def figures(results: Results) -> plots.Figures:
    """Sharpness of the model under gradient flow, and the loss on photographs."""
    flow, batch = {"gradient flow": ("model", "flow_sharpness")}, {"full batch": ("photographs", "loss")}
    return {
        "sharpness of the model": plots.curves(results, flow, xlabel="record", ylabel="top eigenvalue"),
        "loss on photographs": plots.curves(results, batch, xlabel="step", ylabel="loss (nats)"),
    }
