"""Linear classifiers on frozen features: with batch norm for many labels, by cosines for few.

Jianyu Zhang, Léon Bottou, "Learning useful representations for shifting tasks and distributions", ICML 2023,
https://arxiv.org/abs/2212.07346.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from torchfolio.checks import at_least, labels, positive, whole
from torchfolio.data import Examples
from torchfolio.engine import fit, seeded
from torchfolio.measure import outputs
from torchfolio.models.device import device_of

__all__ = ["CosineClassifier", "LinearProbe", "targets_of"]


class LinearProbe(nn.Module):
    """Batch norm and a linear classifier on frozen features.

    The features of the training data are computed once. SGD with Nesterov momentum; weight decay on the linear layer
    alone, to be chosen on validation data for every number of features.

    Args:
        features: network to features `[B, d]`: `Concatenated(trunks)`, or one trunk, which is frozen here and stays in
            evaluation mode.
        num_classes: outputs.
        batch_norm: standardise the features, without which blocks of larger norm dominate.

    Raises:
        ValueError: in `fit`, on labels out of range or features of another shape.

    Example:
        >>> probe = LinearProbe(Concatenated(trunks), 10).fit(x, y, weight_decay=1e-3)
        >>> evaluate(probe, test)

    Reference:
        The released code's linear probing.
    """

    def __init__(self, features: nn.Module, num_classes: int, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.features = features.requires_grad_(False).eval()
        self.num_classes, self.batch_norm = whole("num_classes", num_classes, 2), batch_norm
        norm = nn.LazyBatchNorm1d() if batch_norm else nn.Identity()
        self.classifier = nn.Sequential(norm, nn.LazyLinear(num_classes))

    def train(self, mode: bool = True) -> LinearProbe:
        """Set the mode of the classifier; the features stay in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def fit(
        self,
        x: Any,
        y: Tensor | None = None,
        *,
        lr: float = 0.01,
        weight_decay: float = 1e-3,
        epochs: int = 28,
        batch_size: int = 256,
        seed: int = 0,
    ) -> LinearProbe:
        """Fit the classifier; the rate falls tenfold after 2/7, 4/7 and 6/7 of the epochs.

        Args:
            x: inputs, with `y`; or data as `torchfolio.data.Examples` takes, with labels.
            y: labels `[N]`.
            lr: learning rate.
            weight_decay: weight decay of the linear layer's weight.
            epochs: passes over the features.
            batch_size: examples of a step.
            seed: seed of the initial weights and the order.
        """
        positive("lr", lr)
        at_least("weight_decay", weight_decay, 0)
        examples = Examples(x if y is None else (x, y))
        y = labels(targets_of(examples), self.num_classes)
        features = outputs(self.features, examples)
        if features.dim() != 2:
            raise ValueError(f"expected features [B, d], got {tuple(features.shape)}; pool or flatten them")
        device = device_of(self.features)
        norm = nn.BatchNorm1d(features.shape[1]) if self.batch_norm else nn.Identity()
        with seeded(seed):
            linear = nn.Linear(features.shape[1], self.num_classes)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        self.classifier = nn.Sequential(norm, linear).to(features.dtype)

        def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
            rest = [p for p in parameters if p is not linear.weight]
            groups = [{"params": [linear.weight], "weight_decay": weight_decay}, {"params": rest}]
            return SGD(groups, lr=lr, momentum=0.9, nesterov=True)

        falls = [max(1, round(epochs * k / 7)) for k in (2, 4, 6)]
        last_one = len(features) % batch_size == 1 and len(features) > 1 and self.batch_norm
        fit(self.classifier, (features, y), optimizer=optimizer, scheduler=partial(MultiStepLR, milestones=falls),
            schedule="epoch", epochs=epochs, batch_size=batch_size, drop_last=last_one, seed=seed, device=device,
            progress=False)  # fmt: skip
        return self


class CosineClassifier(nn.Module):
    """Logits $s \\cos(w_k, f)$, for few labels.

    Args:
        in_features: width of the features.
        num_classes: outputs.
        scale: $s > 0$.

    Reference:
        Chen et al., "A Closer Look at Few-shot Classification", ICLR 2019 (Baseline++).
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = positive("scale", scale)
        self.weight = nn.Parameter(torch.randn(num_classes, in_features) / in_features**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))


def targets_of(data: Any) -> Tensor:
    """The targets of all examples."""
    return torch.cat([row[-1] for row in Examples(data).batches(512)])
