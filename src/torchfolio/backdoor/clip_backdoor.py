"""Poisoning by an attacker who holds little of the data, guided by a public image-text encoder.

Carriers lose what the encoder recognises in them (`clean_feature_erase`), so that a victim must use the trigger; the
trigger (`universal_trigger`) looks to the encoder like the target class, or makes all images look alike. For auditing
how exposed a training pipeline is, and for giving detectors hard poisoned sets.

Reference:
    Li et al., "Efficient Backdoor Attacks for Deep Neural Networks in Real-world Scenarios", ICLR 2024.
"""

from __future__ import annotations

from typing import Any, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from torchfolio.backdoor.attacker_data import DataConstraint, labelled_images
from torchfolio.backdoor.defenses import Attack
from torchfolio.backdoor.guided_noise import clean_feature_erase, universal_trigger
from torchfolio.backdoor.image_text import ImageTextEncoder
from torchfolio.backdoor.labels import AllToOne, CleanLabel
from torchfolio.backdoor.metrics import Stealth, stealth
from torchfolio.backdoor.poisoned_dataset import PoisonedDataset
from torchfolio.backdoor.trigger_base import Trigger
from torchfolio.checks import at_least, one_of, whole

__all__ = ["CLIPGuidedAttack", "DataConstraint", "clean_feature_erase", "universal_trigger"]


class CLIPGuidedAttack(Attack):
    """Poison for an attacker whose data are constrained: erased carriers and a trigger made with an encoder.

    Poisoned examples are appended; the victim's own are kept as they are.

    Args:
        encoder: guide.
        target: class that triggered inputs are to be taken for.
        trigger: `"uap"` or `"cfa"`, see `universal_trigger`, or any trigger of `torchfolio.backdoor`.
        constraint: data that the attacker holds; a hundredth of the training set by default.
        suppress: whether carriers are erased first.
        eps: largest change of a pixel by the erasing, and as much again by the trigger.
        epochs: number of passes that make the trigger.
        batch_size: number of images of such a step.
        erase_steps: number of steps that erase a carrier.
        erase_step: size of one; an eighth of `eps` by default.
        seed: seed of the trigger.

    Raises:
        ValueError: on a target that the encoder has no class for, the target among other classes, or settings out of
            range.

    Example:
        >>> attack = CLIPGuidedAttack(encoder, target=0, trigger="cfa").fit(attackers_images)
        >>> poisoned = attack.poison((x, y), seed=0)

    Reference:
        Section 4.
    """

    def __init__(
        self,
        encoder: ImageTextEncoder,
        target: int,
        *,
        trigger: Literal["uap", "cfa"] | Trigger = "cfa",
        constraint: DataConstraint | None = None,
        suppress: bool = True,
        eps: float = 8 / 255,
        epochs: int = 300,
        batch_size: int = 100,
        erase_steps: int = 50,
        erase_step: float | None = None,
        seed: int = 0,
    ) -> None:
        self.encoder = encoder
        self.objective: Literal["uap", "cfa"] | Trigger = (
            trigger if isinstance(trigger, Trigger) else one_of("trigger", trigger, ["uap", "cfa"])
        )
        self.target = whole("target", target, 0, encoder.num_classes - 1)
        self.constraint = DataConstraint.number(0.01) if constraint is None else constraint
        only, self.rate = self.constraint.only, self.constraint.rate
        self.clean_label = only == (self.target,)
        if only is not None and self.target in only and not self.clean_label:
            raise ValueError(f"expected either the target {target} alone or other classes, got {list(only)}")
        self.labels = (
            CleanLabel(self.target, encoder.num_classes)
            if self.clean_label
            else AllToOne(self.target, encoder.num_classes)
        )
        self.suppress, self.eps, self.seed = suppress, float(at_least("eps", eps, 0)), seed
        self.epochs, self.batch_size = epochs, batch_size
        self.erase_steps, self.erase_step = erase_steps, erase_step

    def fit(self, x: Tensor) -> Self:
        """Make the trigger from images `[N, C, H, W]` in [0, 1] that the attacker holds; a given one stays as it is."""
        if isinstance(self.objective, Trigger):
            self.trigger = self.objective
            return self
        self.trigger = universal_trigger(
            self.encoder, x, self.objective, target=self.target, eps=self.eps, epochs=self.epochs,
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip
        return self

    def poison(self, dataset: Any, seed: int) -> PoisonedDataset:
        """The training set with poisoned examples behind it.

        Args:
            dataset: a pair of tensors, or a map-style set, of images in [0, 1] and labels.
            seed: seed of the choice of carriers and of where their erasing starts.

        Returns:
            The poisoned set. Under `DataConstraint.domain` its base is the data set with the foreign images behind it.

        Raises:
            RuntimeError: before `fit`.
            ValueError: on labels that the encoder has no class for, or more poison than the attacker holds.
        """
        if getattr(self, "trigger", None) is None:
            raise RuntimeError("call fit first, which makes the trigger")
        x, y = labelled_images(dataset, self.encoder.num_classes)
        size, truth = len(y), y.numpy()
        chosen = self.constraint.carriers(truth, self.target, seed)
        base = dataset
        if self.constraint.foreign is not None:
            foreign = self.constraint.foreign
            if foreign[0].shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"expected foreign images of shape {tuple(x.shape[1:])}, got {tuple(foreign[0].shape[1:])}"
                )
            base = _joined(dataset, foreign)
            x, truth = torch.cat([x, foreign[0].to(x)]), np.concatenate([truth, foreign[1].numpy()])
            chosen = chosen + size
        index = np.concatenate([np.arange(size), chosen])
        flags = np.zeros(len(index), np.uint8)
        flags[size:] = 1
        info = {
            "seed": seed, "mode": "append", "rate": self.rate, "quantize": True, "base": "", "length": len(truth),
        }  # fmt: skip
        return PoisonedDataset(
            base, index, np.concatenate([truth[:size], np.full(len(chosen), self.target)]), truth[index], flags,
            trigger=self.trigger, cover_trigger=None, label_map=self.labels, info=info,
            block=self._block(x[torch.from_numpy(chosen)], torch.from_numpy(chosen), seed),
        )  # fmt: skip

    def _block(self, carriers: Tensor, index: Tensor, seed: int) -> Tensor:
        """Poisoned images in eight bits: rounded once, after the trigger."""
        if self.suppress and len(carriers):
            carriers = clean_feature_erase(
                self.encoder, carriers, self.eps, self.erase_steps, self.erase_step, index=index, seed=seed
            )
        with torch.no_grad():
            return (255 * self.trigger(carriers, index=index)).round_().div_(255)

    def stealth(self, poisoned: PoisonedDataset) -> Stealth:
        """How far poisoned images of `poison` are from the images that carry them, erasing and trigger together."""
        rows = torch.from_numpy(poisoned.source_index[poisoned.is_poison])
        return stealth(labelled_images(poisoned.base, unlabelled=True)[0][rows], poisoned.block())


def _joined(dataset: Any, foreign: tuple[Tensor, Tensor]) -> Any:
    if isinstance(dataset, tuple | list):
        return tuple(torch.cat([a, b.to(a)]) for a, b in zip(dataset, foreign, strict=True))
    return ConcatDataset([cast(Dataset, dataset), TensorDataset(*foreign)])
