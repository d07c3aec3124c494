"""Labels that a defender believes, for training samples whose own may be an attacker's."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from torchfolio.backdoor.metrics import labels_of
from torchfolio.backdoor.stamp import Stamp
from torchfolio.engine.fit import fit
from torchfolio.engine.modes import seeded
from torchfolio.measure import outputs
from torchfolio.shown import Shown

__all__ = ["NearestCenterRelabeler", "PrecomputedRelabeler", "Relabeler", "VerifiedDataRelabeler"]

Pair = tuple[Tensor, Tensor]
Factory = Callable[[], nn.Module]


class Relabeler(Protocol):
    """Labels that the defender believes, `[N]`, for all samples."""

    def __call__(self, data: Pair, isolated: Tensor, *, clean: Any, stamp: Stamp, seed: int) -> Tensor: ...


class VerifiedDataRelabeler(Shown):
    """Labels of a classifier that was trained on a few verified examples (VD).

    Training images are stamped before they are labelled, as in the authors' code, so that what the stamp covers
    does not matter.

    Args:
        model: a trained classifier, or `None` to train one on the `clean` of `NAB.prepare`.
        model_fn: makes a new network to train.
        epochs: 100, at `lr` for a fifth of them, a tenth of it for two fifths and 1/100 for the rest.
        lr: learning rate of SGD with momentum 0.9; 0.01.
        batch_size: 64.
        weight_decay: 1e-4.
        augment: augmentation of the batches.
        device: device of the training.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        model_fn: Factory | None = None,
        epochs: int = 100,
        lr: float = 0.01,
        batch_size: int = 64,
        weight_decay: float = 1e-4,
        augment: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        if (model is None) == (model_fn is None):
            raise ValueError("expected either a trained model or a model_fn to train one with")
        self.model, self.model_fn, self.epochs, self.lr = model, model_fn, epochs, lr
        self.batch_size, self.weight_decay, self.augment, self.device = batch_size, weight_decay, augment, device

    def __call__(self, data: Pair, isolated: Tensor, *, clean: Any, stamp: Stamp, seed: int) -> Tensor:
        labels = data[1].clone()
        if isolated.any():
            model = self.model if self.model is not None else self._train(clean, seed)
            labels[isolated] = labels_of(model, stamp(data[0][isolated])).to(labels)
        return labels

    def _train(self, clean: Any, seed: int) -> nn.Module:
        if clean is None:
            raise ValueError("verified labels need verified examples: pass clean= to prepare, or a trained model")
        assert self.model_fn is not None
        with seeded(seed):
            net = self.model_fn()
        size = min(self.batch_size, _length(clean))
        sgd = partial(torch.optim.SGD, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        fit(
            net, clean, optimizer=sgd, scheduler=partial(LambdaLR, lr_lambda=partial(_two_drops, epochs=self.epochs)),
            schedule="epoch", epochs=self.epochs, batch_size=size, drop_last=_length(clean) % size == 1,
            augment=self.augment, seed=seed, device=self.device, progress=False,
        )  # fmt: skip
        return net


def _two_drops(epoch: int, epochs: int) -> float:
    return 1.0 if epoch < epochs / 5 else 0.1 if epoch < 3 * epochs / 5 else 0.01


class NearestCenterRelabeler(Shown):
    """Labels of the nearest class centre in the space of an encoder that has seen no labels (NC).

    Centres are means of the embeddings of samples that are not isolated.

    Args:
        encoder: network from images to embeddings `[N, D]`, for example self-supervised on the same images.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor]) -> None:
        self.encoder = encoder

    def __call__(self, data: Pair, isolated: Tensor, *, clean: Any, stamp: Stamp, seed: int) -> Tensor:
        x, y = data
        embedded = _embedded(self.encoder, x).flatten(1).double()
        y = y.cpu()
        trusted = ~isolated.cpu()
        classes = int(y.max()) + 1
        counts = torch.bincount(y[trusted], minlength=classes)
        sums = torch.zeros(classes, embedded.shape[1], dtype=torch.float64).index_add_(0, y[trusted], embedded[trusted])
        centres = sums / counts.clamp_min(1)[:, None]
        distance = torch.cdist(embedded, centres)
        distance[:, counts == 0] = torch.inf
        labels = y.clone()
        labels[~trusted] = distance[~trusted].argmin(1)
        return labels


class PrecomputedRelabeler(Shown):
    """Labels `[N]` from elsewhere."""

    def __init__(self, labels: Tensor | np.ndarray | Sequence[int]) -> None:
        self.labels = torch.as_tensor(labels)

    def __call__(self, data: Pair, isolated: Tensor, *, clean: Any, stamp: Stamp, seed: int) -> Tensor:
        return self.labels


@torch.no_grad()
def _embedded(encoder: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Embeddings `[N, ...]` on the CPU, of a network or of a function."""
    return (
        outputs(encoder, x) if isinstance(encoder, nn.Module) else torch.cat([encoder(p).cpu() for p in x.split(512)])
    )


def _length(data: Any) -> int:
    return len(cast(Sized, data[0] if isinstance(data, list | tuple) else data))
