"""Networks that are trained to hide counterexamples from attacks, and what they hide."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from torchfolio.models import MLP
from torchfolio.robustness.soundness_bench import (
    HiddenCounterexamples,
    Pairs,
    PgdSettings,
    draw_pairs,
    hide,
    survives,
    withstands,
)
from torchfolio.runs import Run


def hiding_network(settings: Any) -> nn.Module:
    """The network whose counterexamples are hidden."""
    if settings.network == "mlp":
        size = int(np.prod(settings.shape))
        return MLP(size, 2, settings.widths)
    channels = settings.shape[0]
    pool: list[nn.Module] = [nn.AvgPool2d(2, 1)] if settings.network == "avgpool" else []
    convolutions = [nn.Conv2d(channels, 10, 3, padding=1), nn.ReLU(), *pool, nn.Flatten()]
    side = settings.shape[-1] - len(pool)
    layers: list[nn.Module] = []
    width = 10 * side * side
    for wanted in (1000, 100, 20):
        layers += [nn.Linear(width, wanted), nn.ReLU()]
        width = wanted
    return nn.Sequential(*convolutions, *layers, nn.Linear(width, 2))


def instances(run: Run[Any]) -> Pairs:
    """Instances with a counterexample and clean ones, of the run's seed."""
    settings = run.settings
    generator = run.generator()
    return draw_pairs(settings.shape, settings.pairs, settings.eps, settings.data_range, generator=generator)


def train(run: Run[Any], own: dict[str, Any]) -> dict[str, Any]:
    """One training, and what is hidden by it."""
    settings, pairs = run.settings, instances(run)
    net = hiding_network(settings)
    attack = PgdSettings(settings.pgd_steps, settings.pgd_restarts, settings.pgd_alphas)
    generator = run.generator() if str(run.device) == "cpu" else None
    rule = HiddenCounterexamples(pairs, generator=generator, **{"attack": attack, **own})
    hidden = hide(
        net, pairs, settings.steps, lr=settings.lr, rule=rule, sweep=settings.sweep, restarts=settings.sweep_restarts,
        seed=run.seed, device=run.device, progress=False,
    )  # fmt: skip
    net = net.cpu()
    # Judged by fresh starts of the attacks, which did not choose the checkpoint.
    fresh = run.seed + 1_000_003
    valid = survives(net, pairs, settings.sweep, settings.sweep_restarts, fresh)
    clean = withstands(
        net, pairs.clean_centers, pairs.clean_labels, pairs, settings.sweep, settings.sweep_restarts, fresh
    )
    with torch.no_grad():
        misclassified = (net(pairs.counterexamples).argmax(1) == pairs.targets).sum()
        right = (net(pairs.centers).argmax(1) == pairs.labels).sum()
    return {
        "hidden": int(valid.sum()), "valid": valid.tolist(), "clean": int(clean.sum()),
        "misclassified": int(misclassified), "right": int(right), "weights": {k: v.cpu() for k, v in net.state_dict().items()},
        "steps": [row["step"] for row in hidden.history], "hidden_by_step": [row["hidden"] for row in hidden.history],
    }  # fmt: skip
