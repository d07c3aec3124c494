"""What a mean over a batch was divided by, so that batches can be put together to the mean over all of them.

Cross-entropy leaves out the targets of `ignore_index` and weighs classes: its mean over a batch is not one over examples.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine.rules import default_loss

IGNORED = -100  # the target that cross-entropy passes over by default


class Counting(NamedTuple):
    """How a criterion counts.

    Attributes:
        ignored: target that counts for nothing; `None` where the criterion has none.
        weight: weights of the classes, if it has them.
    """

    ignored: int | None = None
    weight: Tensor | None = None

    @classmethod
    def of(cls, criterion: Any) -> Counting:
        """How a criterion counts: the losses of this package, cross-entropy and the negative log likelihood as functions,
        modules and `functools.partial` of the functions; of others, their attributes `ignore_index` and `weight`. A
        function of the user's own has no such attribute, but no class has the number -100 either.

        Raises:
            ValueError: if it gives sums or single losses, whose scale would follow the size of the batches.
        """
        settings: dict[str, Any] = {}
        while isinstance(criterion, partial):
            settings = {**criterion.keywords, **settings}
            criterion = criterion.func
        reduction = settings.get("reduction", getattr(criterion, "reduction", None))
        if reduction in ("sum", "none"):
            raise ValueError(
                f"expected a loss that is the mean over a batch, got one with reduction={reduction!r}, which would depend "
                "on the size of the batches"
            )
        if criterion in (default_loss, F.cross_entropy, F.nll_loss):
            return cls(settings.get("ignore_index", IGNORED), settings.get("weight"))
        home = getattr(criterion, "__module__", type(criterion).__module__) or ""
        unsaid = None if criterion is None or home.startswith("torch.nn.") else IGNORED
        ignored = getattr(criterion, "ignore_index", unsaid)
        weight = getattr(criterion, "weight", None) if isinstance(criterion, nn.Module) else None
        by_class = isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss)
        return cls(ignored if isinstance(ignored, int) else None, weight if by_class else None)

    def mass(self, target: Tensor) -> Tensor:
        """What the mean over these targets was divided by, a float64 scalar (float32 where there is no float64).

        Targets with an axis of positions count every position.
        """
        exact = torch.float32 if target.device.type == "mps" else torch.float64
        if target.is_floating_point() or (self.ignored is None and self.weight is None):
            return torch.tensor(float(len(target)), dtype=exact, device=target.device)
        counted = target if self.ignored is None else target[target != self.ignored]
        if self.weight is None:
            return torch.tensor(float(counted.numel()), dtype=exact, device=target.device)
        return self.weight.to(target.device, exact)[counted].sum()

    def uneven(self, target: Tensor) -> bool:
        """Whether equally many examples may count differently here."""
        if target.is_floating_point():
            return False
        return self.weight is not None or bool((target == self.ignored).any() if self.ignored is not None else False)
