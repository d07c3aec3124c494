"""Distillation as it is usual: the loss on labels and that on the teacher's logits meet on one classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import Batch, LearningRule

__all__ = ["OneHead"]


class OneHead(LearningRule):
    """Both losses on the classifier: what the second head takes the place of. Batches are (x, logits, y)."""

    def __init__(self, logit_loss: Callable[[Tensor, Tensor, float], Tensor], tau: float, labels: float = 1.0) -> None:
        self.logit_loss, self.tau, self.labels = logit_loss, tau, labels

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        self.model = model
        return model

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        logits = self.model(batch[0])
        loss = self.labels * F.cross_entropy(logits, batch[2]) + self.logit_loss(logits, batch[1], self.tau)
        backward(loss)
        return {"loss": loss.detach()}
