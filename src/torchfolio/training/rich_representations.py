"""Rich representations: features of several trainings, concatenated.

Jianyu Zhang, Léon Bottou, "Learning useful representations for shifting tasks and distributions", ICML 2023,
https://arxiv.org/abs/2212.07346.

One training keeps the features that still lower its loss and drops those that say the same again. Weight decay on a
product of layers is an L1 penalty: $\\min \\tfrac12 (\\|u\\|^2 + \\|v\\|^2)$ subject to $u \\odot v = \\beta$ is
$\\|\\beta\\|_1$. Another seed drops others. So train $n$ times, drop the heads, and concatenate:
$\\Phi(x) = [\\varphi_1(x), \\dots, \\varphi_n(x)]$. Put a linear probe on it for new tasks; fold it into one network by
distillation where inference must be cheap; or fine-tune in two stages, since fine-tuning it as a whole drops them again.

Episodes come from `torchfolio.training.episodes`, or from one training at a high constant rate by `Snapshots`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from torchfolio.checks import one_of, positive, whole
from torchfolio.engine import Batch, LearningRule, fit
from torchfolio.measure import outputs, untouched
from torchfolio.training.concatenation import Concatenated, average_heads, split_head
from torchfolio.training.linear_heads import CosineClassifier, LinearProbe, targets_of
from torchfolio.training.rich_features import RichFeatures
from torchfolio.training.risk_extrapolation import vrex_penalty

__all__ = [
    "Concatenated",
    "CosineClassifier",
    "LinearProbe",
    "RichDistillation",
    "RichFeatures",
    "average_heads",
    "split_head",
    "two_stage_finetune",
    "vrex_penalty",
]


def two_stage_finetune(
    models: Sequence[nn.Module],
    finetune: Callable[[nn.Module, int], object],
    data: Any,
    *,
    lr: float = 1e-3,
    epochs: int = 2,
    batch_size: int = 256,
    seed: int = 0,
) -> nn.Sequential:
    """Fine-tune each network by itself, concatenate, average the heads, then train the head a little.

    Args:
        models: networks with a linear head for the target task; left as they are.
        finetune: trains a network in place on the target, given a seed: `lambda net, seed: fit(net, data, …)`.
        data: the target's examples with labels, for the head.
        lr: learning rate of the head's SGD with Nesterov momentum.
        epochs: number of epochs of the head; 0 leaves the mean of the networks' logits.
        batch_size: batch size of the head.
        seed: seed of the first network; the others take the next ones.

    Returns:
        The concatenation, frozen, and its head.

    Raises:
        ValueError: on no network, one without a linear head, or heads of other outputs.

    Reference:
        Zhang, Bottou, section 5; without batch norm before the head, so that it starts as the ensemble.
    """
    pairs = []
    for k, model in enumerate(models):
        tuned = copy.deepcopy(model)
        finetune(tuned, seed + k)
        pairs.append(split_head(tuned))
    joint = nn.Sequential(Concatenated(trunk for trunk, _ in pairs), average_heads([head for _, head in pairs]))
    if whole("epochs", epochs, 0):
        sgd = partial(SGD, lr=lr, momentum=0.9, nesterov=True)
        features, device = outputs(joint[0], data), next(joint[1].parameters()).device
        fit(joint[1], (features, targets_of(data)), optimizer=sgd, epochs=epochs, batch_size=batch_size, seed=seed,
            device=device, progress=False)  # fmt: skip
    return joint.eval()


class RichDistillation(LearningRule):
    """Fold several networks into one trunk: it must serve a temporary linear head for each of them.

    $$\\sum_i \\tau^2\\, \\mathrm{KL}\\bigl(\\operatorname{softmax}(t_i(x)/\\tau) \\,\\|\\,
      \\operatorname{softmax}(u_i(\\Phi(x))/\\tau)\\bigr),$$

    the mean over the batch. Labels are not used, and the heads $u_i$ are left behind.

    Args:
        teachers: trained networks with logits $t_i$; evaluated, never changed.
        tau: temperature $\\tau > 0$.
        heads: `"separate"`, or `"averaged"` for one head and the mean of the teachers' probabilities.

    Shapes:
        The trained network is a trunk to features `[B, d]`; batches are (x, y).

    Raises:
        ValueError: on no teacher or settings out of range; in `prepare`, on a trunk without features `[B, d]`.

    Example:
        >>> trunk, _ = split_head(fresh_network)
        >>> fit(trunk, train, rule=RichDistillation(networks), epochs=12)

    Reference:
        Zhang, Bottou, section 3 (DISTILL).
    """

    needs_targets = False

    def __init__(self, teachers: Sequence[nn.Module], tau: float = 10.0, heads: str = "separate") -> None:
        if not teachers:
            raise ValueError("expected at least one teacher, got none")
        self.teachers, self.tau = list(teachers), positive("tau", tau)
        self.heads = one_of("heads", heads, ("separate", "averaged"))
        self.module: nn.ModuleDict | None = None

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        x = example[0]
        with torch.no_grad(), untouched(model, training=False):
            features = model(x)
        if not isinstance(features, Tensor) or features.dim() != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"expected a trunk to features [B, d], got {got}; pool or flatten them")
        widths = [self._targets(x, teacher).shape[1] for teacher in self.teachers]
        if self.heads == "averaged":
            if len(set(widths)) > 1:
                raise ValueError(f"expected teachers of equal outputs for one averaged head, got {widths}")
            widths = widths[:1]
        temporary = nn.ModuleList(nn.Linear(features.shape[1], width) for width in widths).to(features)
        self.module = nn.ModuleDict({"trunk": model, "heads": temporary})
        return self.module

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.module is None:
            raise RuntimeError("call prepare(model, example) before step")
        x = batch[0]
        targets = [self._targets(x, teacher) for teacher in self.teachers]
        if self.heads == "averaged":
            targets = [torch.stack(targets).mean(0)]
        features = self.module["trunk"](x)
        terms = []
        heads: Any = self.module["heads"]
        for head, target in zip(heads, targets, strict=True):
            log_q = (head(features) / self.tau).log_softmax(1)
            terms.append(self.tau**2 * F.kl_div(log_q, target.to(log_q), reduction="batchmean"))
        loss = torch.stack(terms).sum()
        backward(loss)
        return {"loss": loss.detach()}

    @torch.no_grad()
    def _targets(self, x: Tensor, teacher: nn.Module) -> Tensor:
        """Probabilities of a teacher at the temperature."""
        weight = next((p for p in teacher.parameters() if p.is_floating_point()), x)
        if weight.device != x.device:
            teacher.to(x.device)
        with untouched(teacher, training=False):
            logits = teacher(x.to(weight.dtype) if x.is_floating_point() else x)
            return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.tau).softmax(1)
