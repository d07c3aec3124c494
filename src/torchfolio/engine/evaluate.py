"""Loss and accuracy of a network on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.data.examples import Examples
from torchfolio.engine.checks import check_data
from torchfolio.engine.counting import Counting
from torchfolio.engine.loader import Data
from torchfolio.engine.modes import evaluating
from torchfolio.engine.rules import LearningRule, default_loss
from torchfolio.models.stateful import reset_state

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Totals:
    """Sums over examples, which processes may add up.

    Attributes:
        loss: sum of the losses.
        correct: examples whose label is the largest output.
        labelled: examples that have a label, ignored ones left out.
        count: what the sum of the losses is divided by: examples, or the weights of those that count.
    """

    loss: float = 0.0
    correct: float = 0.0
    labelled: float = 0.0
    count: float = 0.0

    def scores(self) -> dict[str, float]:
        """Mean loss, and accuracy where there are labels."""
        if not self.count:
            raise ValueError("there are no examples with a target that counts to evaluate on")
        scores = {"loss": self.loss / self.count}
        return {**scores, "accuracy": self.correct / self.labelled} if self.labelled else scores


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss | None = None,
    batch_size: int = 512,
    device: str | torch.device | None = None,
    rule: LearningRule | None = None,
) -> dict[str, float]:
    """Mean loss, and accuracy where the targets are labels, over a data set in evaluation mode.

    Args:
        model: the network; its modes are restored, and modules with state (spiking neurons) start every batch afresh.
        data: whatever `torchfolio.data.Examples` takes: tensors or arrays (x, y), a `Dataset`, a `DataLoader`.
        loss: criterion with mean reduction; by default cross-entropy for integer targets, else the mean
            squared error.
        batch_size: examples at a time, unless `data` is a `DataLoader`.
        device: where to compute; the model moves there. The model's own device by default, `"auto"` takes an
            accelerator if there is one.
        rule: learning rule that the network was trained by, where its answers are not the plain outputs: a spiking
            network is run over time.

    Returns:
        `{"loss": ..., "accuracy": ...}`; no accuracy for other targets than labels.

    Raises:
        ValueError: if there are no examples, or the criterion ignores the targets of all of them.
    """
    check_data(data, "data")
    if device is not None:
        model.to(resolve_device(device))
    predictor = rule.predictor(model) if rule is not None else model
    return add_up(predictor, data, loss=loss, batch_size=batch_size).scores()


@torch.no_grad()
def add_up(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss | None = None,
    batch_size: int = 512,
    rank: int = 0,
    world: int = 1,
) -> Totals:
    """The sums behind `evaluate`, over every `world`-th batch from the `rank`-th on."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # Float64 everywhere but on devices that lack it.
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    sums = torch.zeros(4, dtype=exact, device=weight.device)
    counting = Counting.of(loss or default_loss)
    with evaluating(model):
        for k, (*inputs, target) in enumerate(Examples(data).batches(batch_size)):
            if k % world != rank:
                continue
            target = target.to(weight.device, non_blocking=True)
            reset_state(model)
            output = model(*(_like(x, weight) for x in inputs))
            mass = counting.mass(target)
            value = (loss or default_loss)(output, target).to(exact)
            # The mean over a batch of ignored targets alone is 0 / 0; they count for nothing.
            sums[0] += torch.where(mass > 0, value * mass, 0)
            sums[1] += mass
            if output.dim() == 2 and target.dim() == 1 and not target.is_floating_point():
                sums[2] += (output.argmax(1) == target).sum()
                sums[3] += len(target) if counting.ignored is None else (target != counting.ignored).sum()
    reset_state(model)
    total, count, correct, labelled = sums.tolist()
    return Totals(total, correct, labelled, count)


def _like(x: Tensor, weight: Tensor) -> Tensor:
    """Inputs on the weights' device; floats in the weights' precision."""
    return x.to(weight.device, weight.dtype if x.is_floating_point() else None, non_blocking=True)


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name; `"auto"` takes an accelerator if there is one."""
    if str(device) != "auto":
        return torch.device(device)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
