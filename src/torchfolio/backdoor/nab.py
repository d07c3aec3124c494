"""NAB: training a clean network on poisoned data by a backdoor of the defender's own.

Min Liu, Alberto Sangiovanni-Vincentelli, Xiangyu Yue, "Beating Backdoor Attack at Its Own Game", ICCV 2023,
https://arxiv.org/abs/2307.15539.

Some training samples may carry an attacker's trigger and label. A few of the most suspicious ones are isolated and get
labels that the defender believes, and those whose label changes get a small *stamp*. Samples with trigger and stamp then
have their true label, samples with the trigger alone the attacker's: the simplest rule that fits both is that the stamp
switches the trigger off. At test time every input is stamped. Loss, optimizer and network stay as they are.

    nab = NAB(LGAIsolator(make_net), VerifiedDataRelabeler(model_fn=make_net))
    data = nab.prepare((images, labels), clean=(few_images, few_labels), seed=0)
    fit(net, data, epochs=100)                  # as ever
    deployed = nab.wrap(net)
    labels, rejected = deployed.filter(x)       # optional: where the stamp changes the prediction
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from torchfolio import checks
from torchfolio.backdoor.defenses import TrainingDefense
from torchfolio.backdoor.isolation import LGAIsolator, PrecomputedIsolator, cosine_tail, flooding
from torchfolio.backdoor.metrics import labels_of
from torchfolio.backdoor.relabeling import NearestCenterRelabeler, PrecomputedRelabeler, VerifiedDataRelabeler
from torchfolio.backdoor.stamp import Stamp
from torchfolio.backdoor.suspects import finite_rows
from torchfolio.data.examples import whole_tensors
from torchfolio.data.rows import WholeBatch
from torchfolio.measure.batches import gathered
from torchfolio.shown import Shown

__all__ = [
    "NAB",
    "LGAIsolator",
    "NABDataset",
    "NearestCenterRelabeler",
    "PrecomputedIsolator",
    "PrecomputedRelabeler",
    "Stamp",
    "StampedModel",
    "VerifiedDataRelabeler",
    "cosine_tail",
    "flooding",
]

Pair = tuple[Tensor, Tensor]


def _evened(candidates: Tensor, count: int, labels: Tensor, stamped: Tensor) -> Tensor:
    """`count` candidates, the earlier first, whose stamps bring every label's share of stamped samples to one level.

    Each raises its label's share to a certain level when those of its label before it are stamped too; those with the
    lowest levels are taken, so that a label which is above the level already gets none.
    """
    classes = int(labels.max()) + 1
    total, there = (torch.bincount(chosen, minlength=classes) for chosen in (labels, labels[stamped]))
    mine = labels[candidates]
    turn = F.one_hot(mine, classes).cumsum(0).gather(1, mine[:, None])[:, 0]
    return candidates[((there[mine] + turn) / total[mine]).argsort(stable=True)[:count]]


class NABDataset(Shown, Dataset):
    """Training samples as the defence wants them: isolated ones with believed labels, and stamped where that changes one.

    Items are `(x, y)` after `augment` and `transform`, and the stamp comes last, so that neither moves it.

    Attributes:
        isolated: bool `[N]`.
        pseudo_labels: int64 `[N]`, the believed label of isolated samples and the given one of others.
        stamped: bool `[N]`.
        scores: scores of the isolator `[N]`, or `None` where it gave a mask.
    """

    def __init__(
        self,
        data: Any,
        y: Tensor,
        isolated: Tensor,
        pseudo_labels: Tensor,
        stamped: Tensor,
        stamp: Stamp,
        *,
        augment: Callable[[Tensor], Tensor] | None = None,
        scores: Tensor | None = None,
    ) -> None:
        self.data, self.y, self.stamp, self.augment, self.scores = data, y, stamp, augment, scores
        self.isolated, self.pseudo_labels, self.stamped = isolated, pseudo_labels, stamped

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Pair:
        whole = whole_tensors(self.data)
        x = torch.as_tensor(self.data[i][0] if whole is None else whole[0][i])
        if self.augment is not None:
            x = self.augment(x[None])[0]
        return self.stamp(x) if self.stamped[i] else x, self.pseudo_labels[i]

    def __getitems__(self, indices: Sequence[int]) -> WholeBatch:
        """A whole batch for a `DataLoader`: augmented and stamped at once."""
        whole = whole_tensors(self.data)
        rows = torch.as_tensor(indices)
        if whole is None:
            x = torch.stack([torch.as_tensor(self.data[i][0]) for i in indices])
        else:
            x = whole[0].index_select(0, rows.to(whole[0].device))
        x = self.augment(x) if self.augment is not None else x
        return WholeBatch(self._stamp(x, rows), self.pseudo_labels[rows])

    def apply(self, x: Tensor, rows: Tensor) -> Tensor:
        """Stamp those of a batch of images, the samples `rows`, that are to be stamped."""
        return self._stamp(x.clone(), rows) if self.stamped[rows].any() else x

    def _stamp(self, x: Tensor, rows: Tensor) -> Tensor:
        """The same in place."""
        which = self.stamped[rows].nonzero()[:, 0].to(x.device)
        if len(which):
            x[which] = self.stamp(x[which])
        return x

    def tensors(self) -> Pair:
        """All samples at once, stamped and not augmented: for training without augmentation."""
        x, _ = _gather(self.data)
        return self.apply(x, torch.arange(len(x))), self.pseudo_labels

    def report(self, is_poison: np.ndarray | Tensor, y_true: np.ndarray | Tensor) -> dict[str, float]:
        """How well samples were isolated and relabelled, where the truth is known.

        Returns:
            `precision` and `recall` of the isolated samples, `label_accuracy` on them, `stamped` share of all samples.
        """
        bad, true = torch.as_tensor(is_poison).bool(), torch.as_tensor(y_true)
        for name, value in (("is_poison", bad), ("y_true", true)):
            if value.shape != (len(self),):
                raise ValueError(f"expected {name} of {len(self)} samples, got shape {tuple(value.shape)}")
        hits = (self.isolated & bad).sum()
        return {
            "precision": float(hits / self.isolated.sum()),
            "recall": float(hits / bad.sum()),
            "label_accuracy": float((self.pseudo_labels == true)[self.isolated].double().mean()),
            "stamped": float(self.stamped.double().mean()),
        }


class NAB(TrainingDefense):
    """The defence: what to train on, and what to deploy.

    Args:
        isolator: suspicion of training samples, such as `LGAIsolator`; any function of (data, seed=) that gives
            scores or a mask `[N]`.
        relabeler: labels that are believed, such as `VerifiedDataRelabeler`.
        stamp: the defender's trigger; 2x2 pixels at the top left of the mean colour, as in the authors' code.
        ratio: $\\mu$, share of the samples that is isolated; 0.05.
        stamp_clean_fraction: share of the other samples that is stamped too, their labels kept. Not in the paper; 0.
            Stamped samples are almost never of the attacker's target, so that a stamp comes to mean "not that class",
            and what accuracy the stamp costs it costs there. These samples are drawn at random such that every label's
            share of stamped samples comes as close to one level as possible: then the stamp says little of the label.
        augment: function from batches of images to such, applied before the stamp.

    Example:
        >>> nab = NAB(LGAIsolator(make), VerifiedDataRelabeler(model_fn=make))
        >>> data = nab.prepare((x, y), clean=(x_verified, y_verified), seed=0)
        >>> fit(net, data, epochs=100)
        >>> deployed = nab.wrap(net)

    Reference:
        Section 3; settings as in the authors' code. There labels and stamps are applied batch by batch after the
        augmentation, as here, and not once before training.
    """

    def __init__(
        self,
        isolator: Callable[..., Tensor],
        relabeler: Callable[..., Tensor],
        stamp: Stamp | None = None,
        ratio: float = 0.05,
        *,
        stamp_clean_fraction: float = 0.0,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        checks.between("ratio", ratio, 0, 1, inclusive=False)
        checks.between("stamp_clean_fraction", stamp_clean_fraction, 0, 1, inclusive=(True, False))
        self.isolator, self.relabeler, self.ratio = isolator, relabeler, ratio
        self._given = stamp if stamp is not None else Stamp()
        self.stamp = self._given
        self.stamp_clean_fraction, self.augment = stamp_clean_fraction, augment

    def prepare(self, dataset: Any, *, clean: Any = None, seed: int = 0) -> NABDataset:
        """Isolate, relabel, and say what is stamped.

        Args:
            dataset: training data that may be poisoned: a pair of tensors, or a data set of (image, label), with the
                normalisation that training will see.
            clean: a few verified examples, for `VerifiedDataRelabeler`.
            seed: seed of isolator, relabeler, and the samples stamped beside.

        Raises:
            ValueError: if a mask or labels have another length, labels are out of range, or the stamp does not fit.
        """
        x, y = _gather(dataset)
        if not self._given.known:  # each data set has a mean of its own
            self.stamp = copy.deepcopy(self._given)
            self.stamp.value = x.float().mean((0, 2, 3)).to(self.stamp.value.device)
        self.stamp(x[:1])
        given = torch.as_tensor(self.isolator((x, y), seed=seed)).cpu()
        isolated = self._isolated(given, len(y))
        pseudo = torch.as_tensor(self.relabeler((x, y), isolated, clean=clean, stamp=self.stamp, seed=seed)).cpu()
        if pseudo.is_floating_point():
            raise ValueError(f"expected integer labels from the relabeler, got {pseudo.dtype}")
        pseudo = pseudo.long()
        if pseudo.shape != y.shape:
            raise ValueError(
                f"expected a label for each of {len(y)} samples from the relabeler, got shape {tuple(pseudo.shape)}"
            )
        highest = int(max(y.max(), -1 if clean is None else gathered(clean)[1].max()))
        if int(pseudo.min()) < 0 or int(pseudo.max()) > highest:
            raise ValueError(
                f"expected labels from 0 to {highest} from the relabeler, got {int(pseudo.min())} to {int(pseudo.max())}"
            )
        pseudo = torch.where(isolated, pseudo, y)
        stamped = isolated & (pseudo != y)
        extra = round(self.stamp_clean_fraction * int((~isolated).sum()))
        if extra:
            others = (~isolated).nonzero()[:, 0]
            order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
            stamped[_evened(others[order], extra, pseudo, stamped)] = True
        scores = None if given.dtype == torch.bool else given
        return NABDataset(dataset, y, isolated, pseudo, stamped, self.stamp, augment=self.augment, scores=scores)

    def _isolated(self, given: Tensor, count: int) -> Tensor:
        if given.shape != (count,):
            raise ValueError(f"expected scores for each of {count} samples from the isolator, got {tuple(given.shape)}")
        if given.dtype == torch.bool:
            return given
        if not given.is_floating_point():
            raise ValueError(
                f"expected a boolean mask or scores of floating point from the isolator, got {given.dtype}"
            )
        if given.isnan().any():
            raise ValueError("the isolator's scores hold NaN")
        if bool((given == given[0]).all()):
            warnings.warn("the isolator scores all samples alike: those isolated are arbitrary", stacklevel=3)
        chosen = given.argsort(descending=True, stable=True)[: int(self.ratio * count)]
        return torch.zeros(count, dtype=torch.bool).index_fill_(0, chosen, True)

    def wrap(self, model: nn.Module) -> StampedModel:
        """The network to deploy, which stamps its inputs."""
        return StampedModel(model, self.stamp)


class StampedModel(nn.Module):
    """A network that stamps its inputs, $x \\mapsto f(s(x))$.

    Args:
        model: $f$.
        stamp: $s$, kept in the state dict.
    """

    def __init__(self, model: nn.Module, stamp: Stamp) -> None:
        super().__init__()
        self.model, self.stamp = model, stamp

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.stamp(x))

    def filter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Labels `[N]` with the stamp, and which inputs are rejected `[N]`: not finite, or of another label without it."""
        labels = labels_of(self, x)
        return labels, (labels != labels_of(self.model, x)) | ~finite_rows(x).cpu()

    def unwrap(self) -> nn.Module:
        """The network without the stamp."""
        return self.model


def _gather(dataset: Any) -> Pair:
    """All images `[N, C, H, W]` and labels `[N]`."""
    whole: Any = whole_tensors(dataset)
    # Where items are transformed, the items count: training sees them.
    if whole is None and callable(getattr(dataset, "tensors", None)) and getattr(dataset, "transform", None) is None:
        whole = dataset.tensors()
    if whole is None:
        whole = gathered(dataset)
    x, y = whole[0], whole[1]
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"expected float images [N, C, H, W], got {x.dtype} of shape {tuple(x.shape)}")
    if y.is_floating_point() or y.shape != (len(x),):
        raise ValueError(f"expected integer labels [{len(x)}], got {y.dtype} of shape {tuple(y.shape)}")
    return x, y.cpu()
