"""Classifiers of images that are trained under masks, by a policy's, by random ones, and without any."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from torchfolio.data import CropFlip
from torchfolio.engine import Backprop, LearningRule
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.experiments._digits_and_photographs import Part
from torchfolio.models import ConvNet
from torchfolio.runs import Run
from torchfolio.training.noise_mask import BetaMaskPolicy, NoiseMaskPretraining, average_checkpoints
from torchfolio.training.snapshots import Snapshots


def classifier(s: Any) -> nn.Module:
    """Three convolutions; 20 outputs whichever classes are trained on."""
    return ConvNet(20, 1, (s.width, 2 * s.width, 4 * s.width))


def policy(s: Any) -> BetaMaskPolicy:
    """The light network beside it."""
    w = s.policy_width
    return BetaMaskPolicy(ConvNet(4 * w, 1, (w, 2 * w, 4 * w)), 4 * w, s.grid)


def fixed_policy(s: Any) -> BetaMaskPolicy:
    """Beta(1.6, 1.6) in every cell, whatever the image."""
    constant = policy(s)
    constant.mix = constant.ema = 1.0
    constant.base.fill_(1.6).log_()
    return constant


def masked(s: Any, **options: Any) -> NoiseMaskPretraining:
    """The method with the blur of small images."""
    return NoiseMaskPretraining(**{"policy": policy(s), "kernel": 3, "sigma": 1.0, **options})


RULES: dict[str, Callable[[Any], LearningRule | None]] = {
    "conventional": lambda s: None,
    "two_phase": lambda s: Backprop(),
    "lse": lambda s: masked(s, objective="lse"),
    "reinforce": masked,
    "random": lambda s: masked(s, policy=fixed_policy(s)),
}


def train(run: Run[Any], parts: dict[str, Part], name: str, lr: float) -> tuple[nn.Module, nn.Module, Any]:
    """One arm at one rate: the network before and after fine-tuning, and its rule. All arms take as many epochs."""
    s = run.settings
    net, rule = classifier(s), RULES[name](s)  # the classifier first, so that all arms start from the same weights
    own = {"augment": CropFlip(2, flip=False), "batch_size": 64, "drop_last": True}
    steps = len(parts["train"][0]) // 64
    recipe = partial(sgd, momentum=0.9, weight_decay=1e-4, nesterov=False)
    first = s.pretrain_epochs + (s.finetune_epochs if rule is None else 0)
    factory = rule.optimizer(recipe(lr)) if isinstance(rule, NoiseMaskPretraining) else recipe(lr)
    snapshots = Snapshots(3)
    run.fit(net, parts["train"], rule=rule, optimizer=factory, scheduler=cosine(), epochs=first, callbacks=[snapshots],
            **own)  # fmt: skip
    if rule is None:
        return net, net, rule
    if isinstance(rule, NoiseMaskPretraining):
        net.load_state_dict(average_checkpoints(snapshots.states))
    heated = copy.deepcopy(net)
    run.fit(net, parts["train"], optimizer=recipe(0.3 * lr), scheduler=cosine(warmup=steps), epochs=s.finetune_epochs,
            seed=run.seed + 1000, **own)  # fmt: skip
    return heated, net, rule
