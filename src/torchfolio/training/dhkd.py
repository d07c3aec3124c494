"""Dual-head distillation: a teacher's logits teach the backbone through a head of their own.

Penghui Yang, Chen-Chen Zong, Sheng-Jun Huang, Lei Feng, Bo An, "Dual-Head Knowledge Distillation: Enhancing Logits
Utilization with an Auxiliary Head", KDD 2025, https://arxiv.org/abs/2411.08937.

A loss on logits says more than one on softmax probabilities, but on one classifier it pulls against the loss on labels,
most of all where the teacher is wrong. Here labels train the classifier, logits a second head, and both the backbone.
The second head is dropped after training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, one_of, positive
from torchfolio.engine import Batch, LearningRule, Objective
from torchfolio.engine.modes import undisturbed
from torchfolio.training.distillation import binary_kl, binary_kl_norm, kd_loss
from torchfolio.training.dual_head import Aux, Delivered, DualHead, align_gradients, teacher_logits
from torchfolio.training.gradient_conflict import HeadConflict, etf_deviation, head_conflict

__all__ = [
    "DHKD", "AuxiliaryDistillation", "DualHead", "HeadConflict", "align_gradients", "binary_kl", "binary_kl_norm",
    "etf_deviation", "head_conflict", "kd_loss",
]  # fmt: skip


class AuxiliaryDistillation(Objective):
    """Teach the backbone a teacher's logits through a second head, beside any learning rule:

    $$\\alpha\\, L_{\\text{bkn}}(z_B, v), \\qquad z_B = B(h),$$

    with $L_{\\text{bkn}}$ of `binary_kl_norm`, $h$ the features that the classifier reads and $B$ a head of its own.

    Args:
        teacher: network with the student's inputs and classes; runs in evaluation mode without gradients, outside
            autocast. `None` takes logits out of the batch (x, v, y), which `DHKD` alone can do.
        alpha: weight $\\alpha$; 1 for 100 classes, less for more (it grows with the number of classes).
        tau: temperature.
        aux: second head, `"linear"`, `"mlp"` or a module; see `DualHead`.
        layer: name of the classifier's last layer; the last `nn.Linear` by default.

    Raises:
        ValueError: on settings out of range; in `prepare`, if teacher and student share weights or have other numbers
            of classes.

    Reference:
        Yang et al., KDD 2025, section 4.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        alpha: float = 1.0,
        tau: float = 2.0,
        aux: Aux = "mlp",
        layer: str | None = None,
    ) -> None:
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(
                f"expected the teacher to be a network, got {type(teacher).__name__}; for stored logits give None, "
                "and (x, logits, y) to train on"
            )
        self.teacher, self.alpha, self.tau = teacher, at_least("alpha", alpha, 0), positive("tau", tau)
        self.aux: Aux = aux
        self.layer = layer
        self.dual: DualHead | None = None
        self._seen: list[Tensor] = []

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        if self.teacher is not None:
            if {id(p) for p in self.teacher.parameters()} & {id(p) for p in model.parameters()}:
                raise ValueError("teacher and student share weights, so that training would change the teacher")
            weight = next(model.parameters())
            self.teacher.to(weight.device)
        self.dual = DualHead(model, self.layer, self.aux)
        with torch.no_grad(), undisturbed():
            logits, width = teacher_logits(self.teacher, example), self.dual.classifier.out_features
        if logits.dim() != 2 or logits.shape[1] != width:
            raise ValueError(f"expected teacher logits [N, {width}], as the student has, got {tuple(logits.shape)}")
        return self.dual.aux

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        if self.dual is None:
            raise RuntimeError("call prepare(model, example) before step")
        with self.dual.features() as self._seen:
            try:
                yield
            finally:
                self._seen = []

    def ready(self) -> bool:
        return bool(self._seen)

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.dual is None:
            raise RuntimeError("call prepare(model, example) before term")
        if not self._seen:
            with self.watching(model):
                model(*batch[:-1])
                return self.term(model, batch)
        return self.alpha * binary_kl_norm(
            self.dual.auxiliary(self._seen), teacher_logits(self.teacher, batch), self.tau
        )


class DHKD(LearningRule):
    """Train by labels on the classifier and by a teacher's logits on a second head.

    $$L = \\gamma\\,\\mathrm{CE}(z_A, y) + \\alpha\\,L_{\\text{bkn}}(z_B, v)$$

    With gradient alignment, whatever of the second gradient opposes the first one is taken out before they are added
    (`align_gradients`); the gradient of the labels is never changed. That costs a second backward pass through the
    backbone. The second head is no part of the network that `fit` leaves.

    Args:
        teacher: network with the student's inputs and classes; `None` takes stored logits from batches
            (x, v, y), in float32 and of the very inputs that the student sees.
        gamma: weight $\\gamma$ of the labels.
        alpha: weight $\\alpha$ of the logits; 1 for 100 classes, 0.1 for 1,000.
        tau: temperature.
        aux: second head, `"linear"`, `"mlp"` or a module; see `DualHead`.
        layer: name of the classifier's last layer; the last `nn.Linear` by default.
        gradient_alignment: whether to project the second gradient.
        scope: parameters that are compared: `"shared"` by both losses, or `"all"`, as the released code does. There
            the gradients of either head count as zero for the other loss, and a conflict also lengthens the gradient
            of the classifier.

    Shapes:
        Batches are (x, y), or (x, v `[N, K]`, y), with labels y `[N]`.

    Raises:
        ValueError: on settings out of range, float targets, or a teacher with other classes or the student's weights.

    Example:
        >>> fit(net, (x, y), rule=DHKD(teacher, aux="linear"), epochs=1).steps > 0
        True

    Reference:
        Yang et al., KDD 2025, section 4; the scope `"shared"` is this library's.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        gamma: float = 1.0,
        alpha: float = 1.0,
        tau: float = 2.0,
        aux: Aux = "mlp",
        layer: str | None = None,
        gradient_alignment: bool = False,
        scope: Literal["shared", "all"] = "shared",
    ) -> None:
        self.logit_loss = AuxiliaryDistillation(teacher, alpha, tau, aux, layer)
        self.gamma, self.alpha, self.tau = at_least("gamma", gamma, 0), alpha, tau
        self.aux, self.layer = aux, layer
        self.gradient_alignment = gradient_alignment
        self.scope = one_of("scope", scope, ("shared", "all"))
        self.model: nn.Module | None = None
        if teacher is not None:
            self.loss = F.cross_entropy  # by which labels are looked through before training

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        self.logit_loss.prepare(model, example)
        self.model = model
        assert self.logit_loss.dual is not None
        return self.logit_loss.dual

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """One step; `logit_loss` is the weighted term of the second head."""
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        x, y = batch[0], batch[-1]
        if y.is_floating_point():
            raise ValueError(f"expected class labels, got targets of {y.dtype}")
        with self.logit_loss.watching(self.model):
            label_loss = self.gamma * F.cross_entropy(self.model(x), y)
            logit_loss = self.logit_loss.term(self.model, batch)
        total = label_loss + logit_loss
        backward(self._aligned(label_loss, logit_loss) if self.gradient_alignment else total)
        return {"loss": total.detach(), "logit_loss": logit_loss.detach()}

    def _aligned(self, label_loss: Tensor, logit_loss: Tensor) -> Tensor:
        """The sum of both losses, with the aligned gradient."""
        assert self.logit_loss.dual is not None
        trained = [p for p in self.logit_loss.dual.parameters() if p.requires_grad]
        primary = torch.autograd.grad(label_loss, trained, retain_graph=True, allow_unused=True)
        secondary = torch.autograd.grad(logit_loss, trained, allow_unused=True)
        pairs = list(zip(trained, primary, secondary, strict=True))
        # Which parameters take part is seen by which loss reaches them.
        reached = [(p, a, b) for p, a, b in pairs if a is not None or b is not None]
        full = [(torch.zeros_like(p) if a is None else a, torch.zeros_like(p) if b is None else b)
                for p, a, b in reached]  # fmt: skip
        both = [k for k, (_, a, b) in enumerate(reached) if self.scope == "all" or (a is not None and b is not None)]
        aligned = dict(zip(both, align_gradients([full[k][0] for k in both], [full[k][1] for k in both]), strict=True))
        gradients = [a + aligned.get(k, b) for k, (a, b) in enumerate(full)]
        total = (label_loss + logit_loss).detach()
        return Delivered.apply(total, gradients, *(p for p, _, _ in reached))  # pyright: ignore[reportReturnType]
