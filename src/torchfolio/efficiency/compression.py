"""What a method says to make trained networks smaller, and the one function that does it.

A method's module holds one class of `Compression`, which `torchfolio compress --method SLUG` finds there: how to
convert a network, in which phases to train it, how to finish it, and how to build its like again.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from torchfolio import checks
from torchfolio.engine import LearningRule, fit, seeded
from torchfolio.engine.loader import Data
from torchfolio.measure import count_flops
from torchfolio.shown import Shown

__all__ = ["Compressed", "Compression", "Phase", "compress", "own_group", "tensor_bytes", "without_decay_of_vectors"]


@dataclass(frozen=True)
class Phase:
    """One training of a converted network.

    Attributes:
        name: shown to the user.
        share: share of all epochs.
        lr: factor on the learning rate.
        weight_decay: factor on the weight decay.
        rule: learning rule that the method needs; by default backprop, or what the caller of `compress` chooses.
    """

    name: str
    share: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    rule: LearningRule | None = None


class Compression(Shown, ABC):
    """A way to make a trained network smaller. Settings are the keyword arguments of its class."""

    @abstractmethod
    def convert(self, model: nn.Module, example: Tensor) -> nn.Module:
        """Change the network in place, or make another, that is trained further.

        Args:
            model: trained network, which may be changed.
            example: a few inputs.
        """

    @abstractmethod
    def phases(self, model: nn.Module) -> Iterator[Phase]:
        """The trainings of the converted network, in order.

        Each is done when the next is asked for, so that what stands between two `yield`s sees its result.
        """

    def finish(self, model: nn.Module) -> nn.Module:
        """The network that is kept after training; by default as it is."""
        return model

    @abstractmethod
    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        """What builds a network of the finished structure, given what builds the original.

        Args:
            network: `{"build": import path, "arguments": {...}}`, the form that `torchfolio.bundle.build` takes.

        Returns:
            The same form, around `network`.
        """

    def operations(self, model: nn.Module, example: Tensor) -> dict[str, int]:
        """Operations of the finished network on an example, by kind; FLOPs by default."""
        return {"flops": count_flops(model, example)}


@dataclass(frozen=True, repr=False)
class Compressed(Shown):
    """A compressed network.

    Attributes:
        model: finished network, in evaluation mode.
        epochs: number of epochs that every phase took, by name.
    """

    model: nn.Module
    epochs: dict[str, int]


def compress(
    model: nn.Module,
    method: Compression,
    train: Data,
    *,
    example: Tensor,
    val: Data | None = None,
    rule: LearningRule | None = None,
    epochs: int = 9,
    lr: float = 0.02,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    augment: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
    say: Callable[[str], None] = lambda text: None,
) -> Compressed:
    """Convert a copy of a trained network, train it phase by phase, and finish it.

    Every phase is SGD with momentum 0.9 and a cosine from the learning rate to zero. Norms, scales and biases are
    not decayed.

    Args:
        model: network; it is left as it is.
        method: such as `torchfolio.efficiency.biper.BiPer()`.
        train: settings of the training, see `torchfolio.engine.fit`.
        example: a few inputs `[B, ...]`.
        val: evaluated after every epoch.
        rule: learning rule of the phases; backprop by default.
        epochs: number of epochs of all phases together; each phase gets at least one.
        lr: learning rate, times the phase's factor.
        weight_decay: weight decay, likewise.
        batch_size: examples of a batch.
        augment: function that is applied to every batch of inputs.
        seed: seed of order, augmentation and new parameters.
        device: device, as in `fit`.
        precision: precision, as in `fit`.
        say: function that is called with a line about each phase.

    Returns:
        The finished network and how long each phase was.

    Raises:
        ValueError: if there are no epochs, the network holds NaN, the method cannot convert the network, or a rule is given and
            the method trains by one of its own.
    """
    checks.whole("epochs", epochs, 1)
    checks.network(model)
    with seeded(seed):
        net = method.convert(copy.deepcopy(model), example)
    done: dict[str, int] = {}
    for k, phase in enumerate(method.phases(net)):
        if rule is not None and phase.rule is not None:
            raise ValueError(
                f"{method!r} trains by a rule of its own, {phase.rule!r}, and takes no other, got {rule!r}"
            )
        done[phase.name] = max(1, round(epochs * phase.share))
        say(f"phase {phase.name}: {done[phase.name]} epochs")
        fit(
            net,
            train,
            val=val,
            rule=phase.rule or copy.deepcopy(rule),
            optimizer=_sgd(lr * phase.lr, weight_decay * phase.weight_decay),
            scheduler=lambda o, n=done[phase.name]: CosineAnnealingLR(o, T_max=n),
            schedule="epoch",
            epochs=done[phase.name],
            batch_size=batch_size,
            augment=augment,
            seed=seed + k,
            device=device,
            precision=precision,
        )
    return Compressed(method.finish(net).eval(), done)


def _sgd(lr: float, weight_decay: float) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    return lambda parameters: SGD(without_decay_of_vectors(parameters, weight_decay), lr=lr, momentum=0.9)


def without_decay_of_vectors(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices and filters are decayed, vectors (norms, scales, biases) are not."""
    remaining = list(parameters)
    groups = [
        {"params": [p for p in remaining if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in remaining if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def own_group(optimizer: Optimizer, parameters: Iterable[nn.Parameter], **options: Any) -> dict[str, Any]:
    """Move parameters of an optimizer to a new group of their own.

    Args:
        optimizer: optimizer that holds them; it must not have made a step with them.
        parameters: parameters to move.
        **options: options of the new group, such as `lr`; the others are those of the first group.

    Returns:
        The new group, the last of `optimizer.param_groups`.
    """
    moved = list({id(p): p for p in parameters}.values())
    moved_ids = {id(p) for p in moved}
    defaults = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved_ids]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    optimizer.add_param_group({**defaults, **options, "params": moved})
    return optimizer.param_groups[-1]


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, tied ones once."""
    tensors = {t.data_ptr() or -k: t for k, t in enumerate(model.state_dict().values(), start=1)}
    return sum(math.prod(t.shape) * t.element_size() for t in tensors.values())
