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
import math
import warnings
from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from torchfolio.backdoor.defenses import TrainingDefense
from torchfolio.backdoor.metrics import labels_of, outputs_of
from torchfolio.engine.fit import fit
from torchfolio.engine.loader import tensors_of
from torchfolio.engine.modes import seeded
from torchfolio.engine.rules import Backprop
from torchfolio.measure import untouched
from torchfolio.measure.batches import gathered

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
Factory = Callable[[], nn.Module]
Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]


class Stamp(nn.Module):
    """Sets a small square in a corner of every image to a fixed value, $s(x)$; $s \\circ s = s$.

    Args:
        size: side of the square; 2.
        corner: which one.
        value: of its pixels: a number, one per channel `[C]`, or `"mean"`, the mean of the training images, which
            `NAB.prepare` fills in. It must be visible: on images with black borders the mean is not.

    Shapes:
        `[N, C, H, W]` or `[C, H, W]` to the same.

    Raises:
        ValueError: if the stamp is larger than the image, or `"mean"` was not filled in.
    """

    value: Tensor

    def __init__(
        self,
        size: int = 2,
        corner: Corner = "top-left",
        value: float | Sequence[float] | Tensor | Literal["mean"] = "mean",
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"expected a stamp of at least one pixel, got {size}")
        if corner not in ("top-left", "top-right", "bottom-left", "bottom-right"):
            raise ValueError(f"expected corner to be top-left, top-right, bottom-left or bottom-right, got {corner!r}")
        if isinstance(value, str) and value != "mean":
            raise ValueError(f"expected value to be a number, one per channel, or 'mean', got {value!r}")
        self.size, self.corner = size, corner
        # NaN stands for a mean that is not known yet.
        given = torch.nan if isinstance(value, str) else value
        self.register_buffer("value", torch.as_tensor(given, dtype=torch.float32).reshape(-1))

    @property
    def known(self) -> bool:
        """Whether the value is filled in."""
        return not bool(self.value.isnan().any())

    @classmethod
    def random(cls, seed: int, sizes: Sequence[int] = (2, 3), value: float | Literal["mean"] = "mean") -> Stamp:
        """A stamp whose corner and size an attacker cannot guess; the deployed network remembers them."""
        generator = np.random.default_rng(seed)
        corners: tuple[Corner, ...] = ("top-left", "top-right", "bottom-left", "bottom-right")
        return cls(int(generator.choice(sizes)), corners[int(generator.integers(4))], value)

    def forward(self, x: Tensor) -> Tensor:
        if not self.known:
            raise ValueError("the stamp's value 'mean' is not known yet: NAB.prepare fills it in")
        rows, columns = self._box(x.shape)
        x = x.clone()
        x[..., rows, columns] = self.value.to(x)[:, None, None]
        return x

    def _box(self, shape: Sequence[int]) -> tuple[slice, slice]:
        if len(shape) < 3 or self.size > min(shape[-2:]):
            raise ValueError(f"a stamp of {self.size} pixels does not fit images of shape {tuple(shape)}")
        if len(self.value) not in (1, shape[-3]):
            raise ValueError(f"expected a stamp of {shape[-3]} channels, got a value for {len(self.value)}")
        vertical, _, horizontal = self.corner.partition("-")
        rows = slice(0, self.size) if vertical == "top" else slice(shape[-2] - self.size, shape[-2])
        columns = slice(0, self.size) if horizontal == "left" else slice(shape[-1] - self.size, shape[-1])
        return rows, columns

    def extra_repr(self) -> str:
        shown = [round(v, 4) for v in self.value.tolist()] if self.known else "mean"
        return f"size={self.size}, corner={self.corner!r}, value={shown}"


def flooding(loss: Tensor, gamma: float) -> Tensor:
    """$|L - \\gamma| + \\gamma$: descends above $\\gamma$ and ascends below, where only samples of unusual ease go.

    Its gradient is that of $\\operatorname{sign}(L - \\gamma) L$, local gradient ascent (LGA) of Li et al., "Anti-Backdoor
    Learning", NeurIPS 2021.
    """
    return (loss - gamma).abs() + gamma


def cosine_tail(epochs: int, tail: int) -> Callable[[int], float]:
    """Factor on the learning rate at epoch $e$, $\\frac12 (1 + \\cos \\frac{\\pi e}{E + \\text{tail}})$, which does not reach 0."""
    return partial(_cosine_tail, length=epochs + tail)


def _cosine_tail(epoch: int, length: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * epoch / length))


class Isolator(Protocol):
    """Says how suspicious training samples are: from (data, seed) to scores `[N]`, or a mask `[N]`."""

    def __call__(self, data: Pair, *, seed: int) -> Tensor: ...


class Relabeler(Protocol):
    """Labels that the defender believes, `[N]`, for all samples."""

    def __call__(self, data: Pair, isolated: Tensor, *, clean: Any, stamp: Stamp, seed: int) -> Tensor: ...


class LGAIsolator:
    """Isolates samples of least loss in a short training with local gradient ascent.

    A network is trained on the batch loss $|L - \\gamma| + \\gamma$; what it has learned nonetheless is easy, as
    triggers are. A sample is the more suspicious the lower its cross-entropy $\\ell$.

    When to measure is the difficulty. Around $\\gamma$ the training swings between descent and ascent, the lowest losses
    belong to the poison at one moment and to an easy class at another, and clean samples follow sooner or later.
    Three remedies, none of which knows what is poisoned:

    - `choose`: the losses are measured `looks` times an epoch, and those of one moment count. `"log_gap"` takes that
      with the largest difference between the mean of $\\log \\ell$ over the `ratio` of least loss and over as many that
      follow; `"gap"` does so with $\\ell$ itself; `"last"` takes the end. Losses of clean samples spread by as much as
      they are large, those of the poison fall by orders of magnitude, so their logarithms tell them apart and
      their differences do not.
    - `statistics`: with `"batch"` batch norm normalises by random batches of the data; its running averages lag behind
      a training of few steps, and `"running"` measures a network that was never trained.
    - `restarts`: that many trainings of new networks, whose losses are averaged geometrically. An easy class sinks in
      one, the poison in all.

    The authors' form is one training, measured once: `epochs=20, choose="last", statistics="running", restarts=1`.

    Args:
        model_fn: makes a new network, for restarts another each time.
        gamma: $\\gamma$; 0.5.
        epochs: of a training; 4. 20 in the authors' code, on CIFAR-10.
        lr: of SGD with momentum 0.9; 0.1, by `cosine_tail(epochs, 80)`.
        choose: the moment whose losses count, `"log_gap"`, `"gap"` or `"last"`.
        looks: measurements an epoch, evenly spaced; 4. The last is at its end.
        statistics: of batch norm when losses are measured, `"batch"` or `"running"`.
        restarts: trainings; 4.
        batch_size: 64.
        weight_decay: 1e-4.
        ratio: $\\mu$ of `choose`.
        device: of the training.

    Attributes:
        gaps_: what `choose` goes by (for `"last"` the gap), per restart and look.
        epochs_: the chosen moment of every restart, in epochs.

    Raises:
        ValueError: on a setting out of range.

    Reference:
        Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021; settings as in the
        authors' code of NAB. `choose`, `looks`, `statistics="batch"` and `restarts` are not in either paper.
    """

    def __init__(
        self,
        model_fn: Factory,
        gamma: float = 0.5,
        epochs: int = 4,
        lr: float = 0.1,
        *,
        choose: Literal["log_gap", "gap", "last"] = "log_gap",
        looks: int = 4,
        statistics: Literal["batch", "running"] = "batch",
        restarts: int = 4,
        batch_size: int = 64,
        weight_decay: float = 1e-4,
        ratio: float = 0.05,
        device: str | torch.device = "auto",
    ) -> None:
        for name, value in (("epochs", epochs), ("looks", looks), ("restarts", restarts)):
            if value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        if not gamma >= 0:
            raise ValueError(f"expected gamma of at least 0, got {gamma}")
        if not 0 < ratio <= 0.5:
            raise ValueError(f"expected a ratio between 0 and 0.5, got {ratio}")
        if choose not in ("log_gap", "gap", "last"):
            raise ValueError(f"expected choose to be 'log_gap', 'gap' or 'last', got {choose!r}")
        if statistics not in ("batch", "running"):
            raise ValueError(f"expected statistics 'batch' or 'running', got {statistics!r}")
        self.model_fn, self.gamma, self.epochs, self.lr = model_fn, gamma, epochs, lr
        self.choose, self.looks, self.statistics, self.restarts = choose, looks, statistics, restarts
        self.batch_size, self.weight_decay, self.ratio, self.device = batch_size, weight_decay, ratio, device

    def __call__(self, data: Pair, *, seed: int) -> Tensor:
        self.gaps_: list[list[float]] = []
        self.epochs_: list[float] = []
        chosen = [self._restart(data, (seed + 1_000_003 * k) % 2**63) for k in range(self.restarts)]
        # Their geometric mean; of one training these are the losses.
        return -torch.stack(chosen).clamp_min(1e-12).log().mean(0).exp()

    def _restart(self, data: Pair, seed: int) -> Tensor:
        """The losses `[N]` of one training at its chosen moment."""
        drop = len(data[0]) % self.batch_size == 1
        steps = max(1, len(data[0]) // self.batch_size if drop else -(-len(data[0]) // self.batch_size))
        moments = {round(steps * look / self.looks) for look in range(1, self.looks + 1)}
        gaps: list[float] = []
        found = (-math.inf, torch.empty(0), 0.0)

        def look(state: Any) -> None:
            nonlocal found
            step = (state.step - 1) % steps + 1
            # Called at the end of an epoch too, after its last step.
            if state.epoch_end or step not in moments:
                return
            losses = _losses(state.model, data, self.statistics == "batch", self.batch_size, seed)
            gaps.append(_gap(losses, self.ratio, logarithms=self.choose == "log_gap"))
            if self.choose == "last" or gaps[-1] > found[0]:
                found = (gaps[-1], losses, state.step / steps)

        with seeded(seed):
            net = self.model_fn()
        sgd = partial(torch.optim.SGD, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        fit(
            net, data, rule=Backprop(partial(_flooded, gamma=self.gamma)), optimizer=sgd,
            scheduler=partial(LambdaLR, lr_lambda=cosine_tail(self.epochs, 80)), schedule="epoch", epochs=self.epochs,
            batch_size=self.batch_size, drop_last=drop, callbacks=[look], seed=seed, device=self.device, progress=False,
        )  # fmt: skip
        self.gaps_.append(gaps)
        self.epochs_.append(found[2])
        return found[1]


def _flooded(output: Tensor, target: Tensor, gamma: float) -> Tensor:
    return flooding(F.cross_entropy(output, target), gamma)


def _losses(net: nn.Module, data: Pair, batch_statistics: bool, batch_size: int, seed: int) -> Tensor:
    """Cross-entropy of every sample `[N]`, in evaluation mode but, if wanted, batch norm by statistics of random batches."""
    x, y = data[0], data[1].cpu()
    if not batch_statistics:
        return F.cross_entropy(outputs_of(net, x).double(), y, reduction="none")
    device = next((p.device for p in net.parameters()), x.device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    losses = torch.empty(len(x), dtype=torch.float64)
    with torch.no_grad(), untouched(net, training=False):
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        # Batches of equal size, as a last small one would have statistics of its own.
        for rows in order.tensor_split(max(1, len(x) // max(256, batch_size))):
            out = net(x[rows.to(x.device)].to(device)).cpu().double()
            losses[rows] = F.cross_entropy(out, y[rows], reduction="none")
    return losses


def _gap(losses: Tensor, ratio: float, logarithms: bool) -> float:
    count = max(1, int(ratio * len(losses)))
    ordered = losses.sort().values
    ordered = ordered.clamp_min(1e-12).log() if logarithms else ordered
    return float(ordered[count : 2 * count].mean() - ordered[:count].mean())


class PrecomputedIsolator:
    """A mask `[N]` of suspicious samples, or scores `[N]`, from elsewhere."""

    def __init__(self, mask: Tensor | np.ndarray | Sequence[bool] | Sequence[float]) -> None:
        self.mask = torch.as_tensor(mask)
        if not (self.mask.dtype == torch.bool or self.mask.is_floating_point()):
            raise ValueError(
                f"expected a boolean mask or scores of floating point, got {self.mask.dtype}: call .bool() on a mask"
            )

    def __call__(self, data: Pair, *, seed: int) -> Tensor:
        return self.mask


class VerifiedDataRelabeler:
    """Labels of a classifier that was trained on a few verified examples (VD).

    Training images are stamped before they are labelled, as in the authors' code, so that what the stamp covers
    does not matter.

    Args:
        model: a trained classifier, or `None` to train one on the `clean` of `NAB.prepare`.
        model_fn: makes a new network to train.
        epochs: 100, at `lr` for a fifth of them, a tenth of it for two fifths and 1/100 for the rest.
        lr: of SGD with momentum 0.9; 0.01.
        batch_size: 64.
        weight_decay: 1e-4.
        augment: of the batches.
        device: of the training.
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


class NearestCenterRelabeler:
    """Labels of the nearest class centre in the space of an encoder that has seen no labels (NC).

    Centres are means of the embeddings of samples that are not isolated.

    Args:
        encoder: from images to embeddings `[N, D]`, for example self-supervised on the same images.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor]) -> None:
        self.encoder = encoder

    def __call__(self, data: Pair, isolated: Tensor, *, clean: Any, stamp: Stamp, seed: int) -> Tensor:
        x, y = data
        embedded = outputs_of(self.encoder, x).flatten(1).double()
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


class PrecomputedRelabeler:
    """Labels `[N]` from elsewhere."""

    def __init__(self, labels: Tensor | np.ndarray | Sequence[int]) -> None:
        self.labels = torch.as_tensor(labels)

    def __call__(self, data: Pair, isolated: Tensor, *, clean: Any, stamp: Stamp, seed: int) -> Tensor:
        return self.labels


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


class NABDataset(Dataset):
    """Training samples as the defence wants them: isolated ones with believed labels, and stamped where that changes one.

    Items are `(x, y)` after `augment` and `transform`, and the stamp comes last, so that neither moves it.

    Attributes:
        isolated: bool `[N]`.
        pseudo_labels: int64 `[N]`, the believed label of isolated samples and the given one of others.
        stamped: bool `[N]`.
        scores: of the isolator `[N]`, or `None` where it gave a mask.
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
        whole = tensors_of(self.data)
        x = torch.as_tensor(self.data[i][0] if whole is None else whole[0][i])
        if self.augment is not None:
            x = self.augment(x[None])[0]
        return self.stamp(x) if self.stamped[i] else x, self.pseudo_labels[i]

    def __getitems__(self, indices: Sequence[int]) -> list[Pair]:
        """A whole batch for a `DataLoader`: augmented and stamped at once."""
        whole = tensors_of(self.data)
        rows = torch.as_tensor(indices)
        x = torch.stack([torch.as_tensor(self.data[i][0]) for i in indices]) if whole is None else whole[0][rows]
        x = self.augment(x) if self.augment is not None else x
        return list(zip(self.apply(x, rows), self.pseudo_labels[rows], strict=True))

    def apply(self, x: Tensor, rows: Tensor) -> Tensor:
        """Stamp those of a batch of images, the samples `rows`, that are to be stamped."""
        which = self.stamped[rows].to(x.device)
        if not which.any():
            return x
        x = x.clone()
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
        augment: from batches of images to such, applied before the stamp.

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
        if not 0 < ratio < 1:
            raise ValueError(f"expected a ratio between 0 and 1, got {ratio}")
        if not 0 <= stamp_clean_fraction < 1:
            raise ValueError(f"expected stamp_clean_fraction in [0, 1), got {stamp_clean_fraction}")
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
            seed: of isolator, relabeler, and the samples stamped beside.

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
            raise ValueError(
                f"expected a score or mask for each of {count} samples from the isolator, got {tuple(given.shape)}"
            )
        if given.dtype == torch.bool:
            return given
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
        """Labels `[N]` with the stamp, and which inputs are rejected `[N]`: those whose label is another without it."""
        labels = labels_of(self, x)
        return labels, labels != labels_of(self.model, x)

    def unwrap(self) -> nn.Module:
        """The network without the stamp."""
        return self.model


def _gather(dataset: Any) -> Pair:
    """All images `[N, C, H, W]` and labels `[N]`."""
    whole: Any = tensors_of(dataset)
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


def _length(data: Any) -> int:
    return len(cast(Sized, data[0] if isinstance(data, list | tuple) else data))
