"""Which class perturbations of one image lead others to: of victims, clean networks, and victims that hide it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from torchfolio.backdoor import AllToOne, poisoned_test
from torchfolio.backdoor.metrics import attack_metrics
from torchfolio.backdoor.smoothinv import SmoothInv
from torchfolio.backdoor.target_profile import TargetProfile
from torchfolio.backdoor.victims import default_net, victim
from torchfolio.data import DataSplits
from torchfolio.experiments._backdoors import patch, perceptron
from torchfolio.experiments._hardened_victims import hardened
from torchfolio.runs import Run

HARDENED = ("negatives", "augmented")
"""Trainings that try to hide a trigger from smoothing, see `torchfolio.experiments._hardened_victims`."""


def profile(run: Run[Any], net: nn.Module, image: Tensor, data: DataSplits) -> TargetProfile:
    """Which class perturbations of one image lead others to."""
    s = run.settings
    finder = SmoothInv(s.sigma[0], s.eps[0], s.steps // 2, n=s.n // 2, seed=run.seed)
    return finder.identify_target(net, image, data.test.tensors[0][50:][: s.pool])


def targets(run: Run[Any], data: DataSplits) -> dict[str, Any]:
    """Profiles of digit networks: a victim, clean ones of several kinds, and victims trained against smoothing."""
    s, (x, y) = run.settings, data.test.tensors
    trigger, labels = patch(data.shape), AllToOne(0, data.num_classes)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: default_net(data, 8), "narrow": lambda: default_net(data, 4), "mlp": partial(perceptron, data)
    }  # fmt: skip
    train = partial(victim, data, trigger, labels, epochs=s.digits_epochs, seed=run.seed, device=run.device)
    nets = {"bad": train(rate=s.rate).model, **{name: train(rate=0, net=net).model for name, net in kinds.items()}}
    nets |= {name: hardened(run, data, name) for name in HARDENED}
    profiles = {name: profile(run, net, x[y == s.sources[0]][0], data) for name, net in nets.items()}
    alarms = {f"alarm_{name}": int(profiles[name].target is not None) for name in kinds}
    attacked = poisoned_test((x, y), trigger, labels)
    success = {f"trigger_{name}": attack_metrics(net, (x, y), attacked).asr for name, net in nets.items()}
    return {**{name: p.scores.tolist() for name, p in profiles.items()}, **alarms, **success}


def true_and_next(profiles: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Score of the true target, class 0, and of the runner-up."""
    return {k: v[0] for k, v in profiles.items()} | {f"{k}_next": max(v[1:]) for k, v in profiles.items()}
