"""Victims whose attacker trains them against inversion under noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.backdoor import AllToOne, poison
from torchfolio.backdoor.victims import default_net
from torchfolio.backdoor.zoo import fit_classifier
from torchfolio.data import DataSplits
from torchfolio.engine import seeded
from torchfolio.experiments._backdoors import patch
from torchfolio.runs import Run


def hardened(run: Run[Any], data: DataSplits, kind: str) -> nn.Module:
    """A victim whose training tries to hide the trigger from smoothing.

    `"negatives"` adds triggered images under noise with their true labels, `"augmented"` puts noise on all images.
    """
    s = run.settings
    poisoned = poison(data.train.tensors, patch(data.shape), AllToOne(0, data.num_classes), rate=s.rate, seed=run.seed)
    x, y = poisoned.tensors()
    with seeded(run.seed):
        net = default_net(data, 8)
        noisy = partial(under_noise, sigma=s.noise)
        if kind == "negatives":
            rows = torch.from_numpy(poisoned.is_poison)
            x, y = torch.cat([x, noisy(x[rows])]), torch.cat([y, torch.from_numpy(poisoned.y_true)[rows]])
        fit_classifier(net, (x, y), s.digits_epochs, seed=run.seed, augment=noisy if kind == "augmented" else None)
    return net.eval()


def under_noise(x: Tensor, sigma: float) -> Tensor:
    """Images with Gaussian noise."""
    return x + sigma * torch.randn_like(x)
