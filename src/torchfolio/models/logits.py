"""Networks that answer with a record of several things, as those of `transformers` do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Logits"]


class Logits(nn.Module):
    """A network whose answer is the `logits` of what another one returns.

    Models of `transformers` take several inputs by name and return a record. Methods here call a network with one batch
    of inputs, or with several in the order of its arguments, and expect one tensor.

    Args:
        model: network that returns something with an attribute `logits`; its weights are shared.

    Shapes:
        inputs as the model takes them, in order; output as its logits, usually `[N, classes]`.

    Raises:
        TypeError: if called and the model returns something without logits.

    Example:
        >>> net = Logits(AutoModelForSequenceClassification.from_pretrained(name))
        >>> fit(net, (input_ids, attention_mask, labels))
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        answer: Any = self.model(*inputs)
        logits = getattr(answer, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(f"expected {type(self.model).__name__} to return logits, got {type(answer).__name__}")
        return logits
