"""The base of certifiers, and what they say of inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.robustness.attack_base import refuse_nan
from torchfolio.shown import Shown

__all__ = ["Certificate", "Certifier", "classes_of"]


@dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """What a certifier says of inputs.

    Attributes:
        prediction: class of each `[B]`.
        certified: whether it holds on the whole ball `[B]`.
        value: figure that decided it `[B]`: the least margin's lower bound, or the radius up to which it holds.
    """

    prediction: Tensor
    certified: Tensor
    value: Tensor

    @property
    def abstain_rate(self) -> float:
        """Share of the inputs that are not certified, whatever their prediction."""
        return float((~self.certified).double().mean())

    def certified_accuracy(self, y: Tensor) -> float:
        """Share of the inputs that are certified and right."""
        return float((self.certified & (self.prediction == y.to(self.prediction.device))).double().mean())

    def accuracy(self, y: Tensor) -> float:
        """Share of the predictions that are right, certified or not."""
        return float((self.prediction == y.to(self.prediction.device)).double().mean())


class Certifier(Shown, ABC):
    """What all certifiers share: `certify` takes inputs in batches; subclasses say in `_certify` what of one batch."""

    name = ""
    batch_size = 512

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a network (nn.Module), got {type(model).__name__}")
        self.model = model

    def certify(self, x: Tensor) -> Certificate:
        """Predictions on inputs `[B, ...]`, and which of them are certified; the network is left as it is.

        Raises:
            ValueError: on no input, NaN, or a network that does not give logits `[B, K]`.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not len(x):
            raise ValueError("expected inputs [B, ...] in floating point, at least one")
        checks.finite("inputs", x)
        certify = self._prepared()
        parts = [certify(part, k * self.batch_size) for k, part in enumerate(x.split(self.batch_size))]
        return Certificate(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Certificate)})

    __call__ = certify

    @abstractmethod
    def _prepared(self) -> Callable[[Tensor, int], Certificate]:
        """The network as it is now, from a batch and the number of its first input to certificates."""


def classes_of(logits: Any) -> Tensor:
    """Class of the largest logit, `[B]`.

    Raises:
        ValueError: unless the logits are `[B, K]` of two classes or more, without NaN.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected logits [B, K] of two classes or more, got {shape}")
    refuse_nan(logits)
    return logits.argmax(1)
