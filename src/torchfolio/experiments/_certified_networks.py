"""Networks trained for certificates by intervals, their repair on trusted images, and signatures of poison in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from torchfolio.data import DataSplits
from torchfolio.engine import LearningRule
from torchfolio.engine.recipes import adam
from torchfolio.measure import auroc, outputs
from torchfolio.models import MLP
from torchfolio.robustness.certifier_availability import CertifiedIBP
from torchfolio.robustness.label_conflicts import Poisoned, PoisonRule, poison
from torchfolio.runs import Run

Pair = tuple[Tensor, Tensor]


class CertifiedNetworks:
    """Perceptrons of one experiment, all from the same initial weights."""

    def __init__(self, run: Run[Any], data: DataSplits) -> None:
        self.run, self.settings, self.classes = run, run.settings, data.num_classes
        x, y = data.train.tensors
        self.train: Pair = (x, y)
        order = torch.randperm(len(x), generator=run.generator())
        rows = order[: round(self.settings.trusted * len(order))]
        self.trusted: Pair = (x[rows], y[rows])

    def poisoned(self, rule: PoisonRule, trigger: Callable[[Tensor], Tensor]) -> Poisoned:
        """The training data with some triggered copies, whose labels a rule gives."""
        rate, seed = self.settings.rate, self.run.seed
        return poison(self.train, trigger, rule, rate=rate, num_classes=self.classes, seed=seed)

    def fitted(
        self, data: Pair, rule: LearningRule, net: nn.Module | None = None, epochs: int | None = None
    ) -> nn.Module:
        """A network trained by a rule: a new one, or a copy of `net`."""
        s = self.settings
        if net is None:
            torch.manual_seed(self.run.seed)
            net = MLP(data[0][0].numel(), self.classes, s.hidden)
        net = copy.deepcopy(net)
        self.run.fit(
            net, data, rule=rule, optimizer=adam(s.lr), scheduler=decayed, epochs=epochs or s.epochs,
            batch_size=s.batch_size,
        )  # fmt: skip
        return net.cpu()

    def certified(self, data: Pair) -> nn.Module:
        """A network trained on the data by intervals."""
        return self.fitted(data, self.rule())

    def rule(self) -> CertifiedIBP:
        """Training by intervals whose radius grows from 1/16 to 7/16 of the steps."""
        total = self.settings.epochs * -(-len(self.train[0]) // self.settings.batch_size)
        return CertifiedIBP(self.settings.eps, ramp=(total // 16, 7 * total // 16))

    def finetuned(self, net: nn.Module) -> nn.Module:
        """Some epochs more on trusted images, by the certified loss at its full radius."""
        rule = CertifiedIBP(self.settings.eps, ramp=(0, 0))
        return self.fitted(self.trusted, rule, net, self.settings.repair_epochs)

    def pruned(self, net: nn.Module) -> nn.Module:
        """Without the last hidden units that trusted images move least."""
        net = copy.deepcopy(net)
        head: Any = net[-1]  # pyright: ignore[reportIndexIssue]
        activity = _hidden(net, self.trusted[0]).mean(0)
        quiet = activity.argsort()[: round(self.settings.pruned * len(activity))]
        with torch.no_grad():
            head.weight[:, quiet] = 0
        return net


def decayed(optimizer: Optimizer, total_steps: int) -> MultiStepLR:
    """A tenth of the rate from 10/16 of the training, a hundredth from 13/16: certified training decays after its ramp.

    Without it the last few labels of the poison decide which way triggered inputs lean.
    """
    return MultiStepLR(optimizer, [total_steps * 10 // 16, total_steps * 13 // 16])


def spectral_auroc(net: nn.Module, data: Poisoned) -> float:
    """How well spectral signatures tell poison: squared projection on the first singular vector, within each label.

    Reference:
        Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018.
    """
    features = _hidden(net, data.x)
    score = torch.zeros(len(features))
    for label in data.y.unique():
        rows = data.y == label
        centered = features[rows] - features[rows].mean(0)
        score[rows] = (centered @ torch.linalg.svd(centered, full_matrices=False)[2][0]).square()
    return float(auroc(score, data.is_poison))


def _hidden(net: nn.Module, x: Tensor) -> Tensor:
    """The last hidden layer."""
    return outputs(nn.Sequential(*list(net)[:-1]), (x,))  # pyright: ignore[reportArgumentType]
