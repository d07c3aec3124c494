"""The learning-rule protocol, and backprop as its ordinary case."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from torchfolio.shown import Shown

Batch = Sequence[Tensor]
"""Tensors of a batch, the target last."""
Loss = Callable[[Tensor, Tensor], Tensor]


class LearningRule(Shown, ABC):
    """How a batch becomes gradients.

    `torchfolio.engine.fit` calls `prepare` once and `step` for every batch; gradients are left in `.grad`,
    and the optimizer's step is not the rule's business. A rule may call backward as often as it likes:
    gradients are averaged over processes after the step, not by a wrapper around the module.

    Attributes:
        needs_targets: whether batches must hold targets; false for rules that learn from inputs alone.
    """

    needs_targets: ClassVar[bool] = True

    @abstractmethod
    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        """Get ready to train `model` in place.

        Args:
            model: the user's network.
            example: one batch, on the model's device. Only shapes and dtypes matter.

        Returns:
            The module to train: `model` itself, or one that holds it and whatever is trained beside it. The
            optimizer gets its parameters and checkpoints hold its state.
        """

    @abstractmethod
    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """Compute the losses of one batch and call `backward` on them.

        Losses are means over the batch: batches are cut into shares for several processes and put together by
        accumulation, each weighted by its size.

        Args:
            batch: tensors on the model's device, normally (x, y).
            backward: function to be called in place of `loss.backward()`.

        Returns:
            Named finite scalars, detached; `"loss"` among them.
        """

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> None:
        """Get to know the optimizer; nothing by default.

        `torchfolio.engine.fit` calls it once between `prepare` and the first step. Here a rule gives some parameters
        a group with a learning rate of their own (the schedule is made afterwards and knows them). One that updates
        between its backward passes keeps the optimizer, and leaves the gradients of its last pass to `fit`.

        Args:
            optimizer: optimizer of everything that is trained.
            total_steps: number of steps that training will make, or `None` where nobody knows.
        """

    def predictor(self, model: nn.Module) -> nn.Module:
        """How a network trained by this rule answers: what is called to validate, evaluate and predict.

        The model itself by default; a rule for spiking networks unrolls it over time. Does not need `prepare`.

        Args:
            model: the user's network, trained or about to be.

        Returns:
            A module from inputs to outputs that shares the model's weights.
        """
        return model

    def release(self) -> None:
        """Give back what `prepare` changed in the user's network; `torchfolio.engine.fit` calls it at its end."""

    def state_dict(self) -> dict[str, Any]:
        """State beyond the module's, for checkpoints. Tensors, numbers, strings and containers of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state of its own, got {', '.join(state)}")


class Backprop(LearningRule):
    """The gradient of one loss through the whole network.

    Args:
        loss: criterion on (output, target), a mean over the batch. `None` takes cross-entropy for integer targets and
            the mean squared error for others.

    Raises:
        TypeError: if the loss cannot be called, or is a class.
    """

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = check_loss(loss)
        self.model: nn.Module | None = None

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        self.model = model
        return model

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        *inputs, target = batch
        loss = self.loss(self.model(*inputs), target)
        backward(loss)
        return {"loss": loss.detach()}


def check_loss(loss: Loss | None) -> Loss:
    """A loss, the default one for `None`.

    Raises:
        TypeError: if it is no function of outputs and targets, but its name or its class.
    """
    if loss is None:
        return default_loss
    if isinstance(loss, type) or not callable(loss):
        example = f"{loss.__name__}()" if isinstance(loss, type) else "nn.CrossEntropyLoss()"
        raise TypeError(f"expected a loss to call, such as {example}, got {loss!r}")
    return loss


def default_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy for integer targets, the mean squared error for others.

    Raises:
        ValueError: if float targets are not as many as outputs (broadcasting them would be a silent mistake).
    """
    if not target.is_floating_point():
        return F.cross_entropy(output, target)
    if target.numel() != output.numel():
        raise ValueError(
            f"expected float targets of the output's shape {tuple(output.shape)}, got {tuple(target.shape)}"
        )
    return F.mse_loss(output, target.reshape(output.shape))
