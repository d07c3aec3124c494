"""Objectives that are added to whatever a learning rule minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchfolio.engine.rules import Backprop, Batch, LearningRule
from torchfolio.shown import Shown

__all__ = ["Added", "Objective"]


class Objective(Shown, ABC):
    """A term of the loss, made for any network and put on any learning rule.

    A method joins by a subclass with `term`, and by a line `objective = "Name"` in its paper's file; then
    `torchfolio train --add SLUG --add-set key=value` finds it. Its constructor takes settings. An argument annotated
    `nn.Module` (a teacher, a guide) is given on the command line as the folder of a bundle; one of the name `target`
    gets the network that is trained. Everything else has a default:

    - `prepare`, for a term with modules of its own that are trained beside the network;
    - `watching` and `ready`, for one that reads inner features of the rule's own forward pass instead of running the
      network once more;
    - `on`, for one that needs another wrapper than `Added`.

    Example:
        >>> class WeightNorm(Objective):
        ...     def term(self, model, batch):
        ...         return 1e-4 * sum(p.square().sum() for p in model.parameters())
        >>> fit(net, (x, y), rule=WeightNorm().on(Backprop()), epochs=1).steps > 0
        True
    """

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module | None:
        """Get ready for a network, after its rule did.

        Args:
            model: the user's network, which stays as it is.
            example: one batch, on the model's device.

        Returns:
            What is trained beside the network, if there is something.
        """
        return None

    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hooks on the network for the time of one step."""
        return nullcontext()

    def ready(self) -> bool:
        """Whether the step has run what the term reads; asked whenever the rule calls backward, until it has."""
        return True

    @abstractmethod
    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        """The weighted term of one batch: a scalar, a mean over the batch as the losses of rules are.

        Args:
            model: network as it answers by its rule (`LearningRule.predictor`).
            batch: batch that the rule gets, normally (x, y).
        """

    def on(self, rule: LearningRule | None = None) -> LearningRule:
        """A rule that adds this objective to another's losses (`Backprop()` by default)."""
        return Added(self, rule)

    def release(self) -> None:
        """Give back what `prepare` changed."""

    def state_dict(self) -> dict[str, Any]:
        """State beyond that of the modules, for checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state of its own, got {', '.join(state)}")


class Added(LearningRule):
    """A learning rule with an objective added.

    The term joins the first loss of a step that the rule calls backward on once the objective is ready: one backward
    pass for both where the term reads the rule's own forward pass. Rules that cut the network into blocks keep doing so
    for such terms; a term that runs the network by itself sends its gradient through all of it.

    Args:
        objective: objective that is added.
        rule: rule of the task; `Backprop()` by default.

    Raises:
        ValueError: in `step`, if the rule never ran what the objective reads.
    """

    def __init__(self, objective: Objective, rule: LearningRule | None = None) -> None:
        self.objective, self.rule = objective, rule or Backprop()
        self.model: nn.Module | None = None

    @property
    def loss(self) -> Any:
        """The criterion of the task's rule, where it has one."""
        return self.rule.loss  # pyright: ignore[reportAttributeAccessIssue]

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        """Prepare the rule, then the objective."""
        self.model = model
        module, beside = self.rule.prepare(model, example), self.objective.prepare(model, example)
        return module if beside is None else nn.ModuleDict({"rule": module, "objective": beside})

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """One step of the rule. The term is returned under the name of the objective's class, in lower case."""
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        predictor, terms = self.rule.predictor(self.model), []

        def added(loss: Tensor) -> None:
            if not terms and self.objective.ready():
                term = self.objective.term(predictor, batch)
                terms.append(term.detach())
                loss = loss + term
            backward(loss)

        with self.objective.watching(self.model):
            scalars = self.rule.step(batch, added)
        name = type(self.objective).__name__
        if not terms:
            raise ValueError(f"{type(self.rule).__name__} ran nothing of what {name} reads, so it was not added")
        return {**scalars, name.lower(): terms[0]}

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> None:
        self.rule.configure(optimizer, total_steps)

    def predictor(self, model: nn.Module) -> nn.Module:
        return self.rule.predictor(model)

    def release(self) -> None:
        self.objective.release()
        self.rule.release()

    def state_dict(self) -> dict[str, Any]:
        return {"objective": self.objective.state_dict(), "rule": self.rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.rule.load_state_dict(state["rule"])
