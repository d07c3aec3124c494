"""Loss and accuracy of a network on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from torchfolio.data.examples import Examples
from torchfolio.engine.checks import check_data, check_kinds, check_row, check_targets
from torchfolio.engine.counting import Counting
from torchfolio.engine.devices import resolve_device
from torchfolio.engine.loader import Data
from torchfolio.engine.modes import evaluating, undisturbed
from torchfolio.engine.rules import Backprop, LearningRule, check_loss, default_loss
from torchfolio.models.stateful import reset_state

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Totals:
    """Sums over examples, which processes may add up.

    Attributes:
        loss: sum of the losses.
        correct: examples whose label is the largest output.
        labelled: examples that have a label, ignored ones left out.
        count: number that the sum of the losses is divided by: examples, or the weights of those that count.
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
        model: network; its modes are restored, and modules with state (spiking neurons) start every batch afresh.
        data: whatever `torchfolio.data.Examples` takes: tensors or arrays (x, y), a `Dataset`, a `DataLoader`.
        loss: criterion with mean reduction; by default cross-entropy for integer targets, else the mean
            squared error.
        batch_size: examples at a time, unless `data` is a `DataLoader`.
        device: device to compute on; the model moves there. The model's own device by default, `"auto"` takes an
            accelerator if there is one.
        rule: learning rule that the network was trained by, where its answers are not the plain outputs: a spiking
            network is run over time.

    Returns:
        `{"loss": ..., "accuracy": ...}`; no accuracy for other targets than labels.

    Raises:
        ValueError: if there are no examples, the criterion ignores the targets of all of them or is no mean, or there is
            no such device.
        TypeError: if `model` is no network or `rule` no learning rule.
    """
    check_kinds(model, rule if rule is not None else Backprop())
    loss = check_loss(loss)
    check_data(data, "data")
    if device is not None:
        model.to(resolve_device(device))
    predictor = rule.predictor(model) if rule is not None else model
    return add_up(predictor, data, loss=loss, batch_size=batch_size).scores()


def check_validation(model: nn.Module, val: Data, rule: LearningRule, example: int = 8) -> None:
    """Evaluate on the first validation examples, so that what does not fit is told before training.

    Streams and loaders with a way to collate of their own are not looked at: what is drawn from them is gone.

    Args:
        model: network on its device.
        val: validation data.
        rule: prepared.
        example: examples to look at.

    Raises:
        ValueError: if the model cannot take the inputs, the loss cannot take the targets, or labels are out of range.
        TypeError: if labels have another type than int64.
    """
    looked_at: Any = val
    if isinstance(val, DataLoader):
        looked_at = val.dataset if val.collate_fn is default_collate else None
    if looked_at is None or isinstance(looked_at, IterableDataset):
        return
    criterion = rule.loss if isinstance(rule, Backprop) else default_loss
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    with undisturbed(), torch.no_grad(), evaluating(model):
        row = Examples(looked_at, "val").first(example)
        check_row(row, "val")
        *inputs, target = (t.to(weight.device) for t in row)
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        reset_state(model)
        try:
            output = rule.predictor(model)(*(_like(x, weight) for x in inputs))
        except Exception as error:
            if not hasattr(rule, "loss"):  # as in `check_model`
                return
            raise ValueError(f"the model cannot take val, {shapes}: {type(error).__name__}: {error}") from error
        finally:
            reset_state(model)
        if not target.is_floating_point():
            check_targets(output, target, looked_at, criterion or default_loss, "val")
        _compared(criterion or default_loss, output, target, "val")


def _compared(loss: Loss, output: Any, target: Tensor, name: str) -> Tensor:
    """A loss, with a sentence where it cannot compare output and target.

    Raises:
        ValueError: if it cannot.
        TypeError: if labels have another type than int64.
    """
    try:
        return loss(output, target)
    except Exception as error:
        if not target.is_floating_point():
            check_targets(output, target, (output, target), loss, name)
        shape = f"{tuple(output.shape)}" if isinstance(output, Tensor) else f"of type {type(output).__name__}"
        raise ValueError(
            f"the loss cannot compare outputs {shape} with the targets of {name}, {tuple(target.shape)} "
            f"{target.dtype}: {type(error).__name__}: {error}"
        ) from error


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
        for k, row in enumerate(Examples(data).batches(batch_size)):
            if k % world != rank:
                continue
            check_row(row, "data")
            *inputs, target = row
            target = target.to(weight.device, non_blocking=True)
            reset_state(model)
            try:
                output = model(*(_like(x, weight) for x in inputs))
            except TypeError as error:  # another number of inputs, say
                shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
                raise ValueError(f"the model cannot take a batch of {shapes}: {error}") from error
            mass = counting.mass(target)
            value = _compared(loss or default_loss, output, target, "the data").to(exact)
            # The mean over a batch of ignored targets alone is 0 / 0; they count for nothing.
            sums[0] += torch.where(mass > 0, value * mass, 0)
            sums[1] += mass
            if output.dim() == 2 and target.dim() == 1 and not target.is_floating_point():
                # An output of NaN names no class, whatever `argmax` says.
                sums[2] += ((output.argmax(1) == target) & ~output.isnan().any(1)).sum()
                sums[3] += len(target) if counting.ignored is None else (target != counting.ignored).sum()
    reset_state(model)
    total, count, correct, labelled = sums.tolist()
    return Totals(total, correct, labelled, count)


def _like(x: Tensor, weight: Tensor) -> Tensor:
    """Inputs on the weights' device; floats in the weights' precision."""
    return x.to(weight.device, weight.dtype if x.is_floating_point() else None, non_blocking=True)
