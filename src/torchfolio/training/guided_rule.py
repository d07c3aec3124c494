"""Guidance on top of any learning rule: a share of it with every loss that the rule goes backward on.

Vighnesh Subramaniam, David Mayo, Colin Conwell, Tomaso Poggio, Boris Katz, Brian Cheung, Andrei Barbu, "Training
the Untrainable: Introducing Inductive Bias via Representational Alignment", NeurIPS 2025,
https://arxiv.org/abs/2410.20035.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.engine import Backprop, Batch, LearningRule
from torchfolio.engine.modes import undisturbed
from torchfolio.measure import untouched
from torchfolio.training.layer_recorder import Maps, device_of, examples_in

__all__ = ["GuidedRule"]


class GuidedRule(LearningRule):
    """Guidance on top of any learning rule.

    Whenever the rule calls backward on a loss, the alignment of the layers that ran since its previous backward is
    added to that loss. With backprop this is the equation of `Guidance`; with a rule that trains blocks by losses of
    their own, every block is guided by its own layers, and still no gradient crosses blocks.

    Args:
        guidance: `Guidance` of the network that is handed to `fit`. Its hooks are on the target only while a step runs.
        rule: rule of the task; `Backprop()` by default.
        warmup_only: whether to train on the alignment alone in the first `guidance.steps` steps, then on the task
            alone.

    Raises:
        TypeError: if `guidance` is none.
        ValueError: if `warmup_only` is set without `steps`; in `prepare` if the network is not the guidance's target,
            in `step` if the rule ran none of its layers.

    Shapes:
        Batches are (inputs…, targets); the guide gets the inputs. On several processes each aligns its own share of
        the batch, so choose a batch size that leaves each of them enough examples.

    Example:
        >>> guidance = Guidance(net, guide, alpha=10.0, steps=300)
        >>> fit(net, train, rule=GuidedRule(guidance, AugLocal(2)), batch_size=256, drop_last=True)

    Reference:
        Subramaniam et al., NeurIPS 2025; the share of each backward is this library's own.
    """

    def __init__(self, guidance: Any, rule: LearningRule | None = None, *, warmup_only: bool = False) -> None:
        if not callable(getattr(guidance, "armed", None)):
            raise TypeError(f"expected a Guidance of two networks, got {type(guidance).__name__}")
        if warmup_only and guidance.steps is None:
            raise ValueError("expected guidance with a number of steps for warmup_only, got steps=None")
        self.guidance = guidance
        self.rule = rule or Backprop()
        self.warmup_only = warmup_only
        self.names: list[tuple[str, str]] = []

    @property
    def loss(self) -> Any:
        """The criterion of the task's rule, where it has one."""
        return self.rule.loss  # pyright: ignore[reportAttributeAccessIssue]

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        """Prepare the rule, and pair the layers by running both networks on the example."""
        guidance = self.guidance
        if model is not guidance.target:
            raise ValueError(
                f"expected the network that the guidance was made for, a {type(guidance.target).__name__}, "
                f"got another {type(model).__name__}"
            )
        guidance.close()
        module = self.rule.prepare(model, example)
        guidance.guide.to(device_of(model))
        inputs = example[:-1]
        with torch.no_grad(), undisturbed(), untouched(model, training=False), guidance.armed() as recorder:
            model(*inputs)
            target = recorder.take(examples_in(inputs, guidance.batch_dim))
            self.names = guidance.correspond(list(guidance.guide_features(*inputs)), list(target))
        return module

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """One step of the rule. `guidance` is the term that was added; the other scalars are the rule's own."""
        if not self.names:
            raise RuntimeError("call prepare(model, example) before step")
        guidance = self.guidance
        active = guidance.active
        guidance.steps_done += 1
        if not active:
            return self.rule.step(batch, backward)
        n = examples_in(batch[:-1], guidance.batch_dim)
        guide = guidance.guide_features(*batch[:-1])
        guidance.per_layer = {}
        added: list[Tensor] = []
        with guidance.armed() as recorder:

            def guided(loss: Tensor) -> None:
                target = recorder.take(n, required=False)
                fresh = [(i, j) for i, j in self.names if j in target and (i, j) not in guidance.per_layer]
                if fresh:
                    added.append(self._term(fresh, guide, target))
                    backward(added[-1] if self.warmup_only else loss + added[-1])
                    added[-1] = added[-1].detach()
                elif not self.warmup_only:
                    backward(loss)

            scalars = self.rule.step(batch, guided)
        if not added:
            raise ValueError(f"{type(self.rule).__name__} ran none of the guided layers of the target")
        return {**scalars, "guidance": torch.stack(added).sum()}

    def _term(self, fresh: Sequence[tuple[str, str]], guide: Maps, target: Maps) -> Tensor:
        """The share of these pairs in the whole term."""
        share = len(fresh) / len(self.names) if self.guidance.reduction == "mean" else 1
        return share * self.guidance.align(fresh, guide, target)

    def predictor(self, model: nn.Module) -> nn.Module:
        return self.rule.predictor(model)

    def configure(self, optimizer: torch.optim.Optimizer, total_steps: int | None) -> None:
        self.rule.configure(optimizer, total_steps)

    def release(self) -> None:
        self.rule.release()

    def state_dict(self) -> dict[str, Any]:
        return {"guidance": self.guidance.state_dict(), "rule": self.rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.guidance.load_state_dict(state["guidance"])
        self.rule.load_state_dict(state["rule"])
