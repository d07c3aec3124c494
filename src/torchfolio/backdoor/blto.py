"""A trigger for data that contrastive learning will train on, learned against the training itself.

For auditing pipelines that pretrain on collected images: the hardest known poison at a low rate that keeps labels.

Reference:
    Sun et al., "Backdoor Contrastive Learning via Bi-level Trigger Optimization", ICLR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from torchfolio.backdoor.attacker_data import labelled_images
from torchfolio.backdoor.contrastive_evaluation import evaluate_ssl_backdoor
from torchfolio.backdoor.defenses import Attack
from torchfolio.backdoor.generator_trigger import GeneratorTrigger
from torchfolio.backdoor.labels import CleanLabel
from torchfolio.backdoor.poison import poison
from torchfolio.backdoor.trigger_nets import TriggerNet
from torchfolio.checks import between, images, one_of, positive, whole
from torchfolio.data.views import View, simclr_views
from torchfolio.engine import LearningRule, seeded
from torchfolio.measure import untouched

__all__ = ["BLTO", "BLTOHistory", "evaluate_ssl_backdoor"]


@dataclass
class BLTOHistory:
    """How the optimisation went.

    Attributes:
        similarity: mean outer similarity of each round.
        surrogate: mean loss of the surrogate of each round; empty where it was frozen.
        lives: figures at the end of each surrogate's life: the similarity to the target of triggered images of other
            classes, and of the same without trigger.
    """

    similarity: list[float]
    surrogate: list[float]
    lives: list[tuple[float, float]]


class BLTO(Attack):
    """Bi-level trigger optimisation: the trigger is trained on a surrogate that trains on the trigger.

    $$\\max_\\psi \\mathbb{E}\\, \\cos\\bigl(f_{\\theta^*}(t_1(\\tilde x)), f_{\\theta^*}(t_2(x_r))\\bigr), \\qquad
    \\theta^*(\\psi) = \\arg\\min_\\theta L_\\text{CL}(\\theta; D_\\psi)$$

    with $\\tilde x = g_\\psi(x)$, $x_r$ of the target class, and $D_\\psi$ the data in which a part of the target class is
    triggered. Rounds alternate: `inner_steps` of the surrogate on $D_\\psi$, then `outer_steps` of $\\psi$ with the
    surrogate frozen in evaluation mode; every `reinit_every` rounds the surrogate starts again from scratch, so that the
    trigger is good all through training.

    Args:
        encoder_fn: makes an encoder, from images to features `[N, d]`, anew for every life.
        rule_fn: makes the contrastive rule that trains it, such as `torchfolio.training.contrastive_learning.SimSiam`.
        target: class that triggered images are to be taken for.
        rate: share of the data that is poisoned, all of the target class.
        eps: largest change of a pixel, above 0.
        rounds: number N of rounds.
        inner_steps: number K of the surrogate's steps in a round.
        outer_steps: number J of the trigger's steps in a round.
        reinit_every: number R of rounds in a life; `None` keeps one surrogate.
        feature: `"projector"` compares what the rule's `project` gives, `"backbone"` the encoder's features.
        view: random differentiable change of a batch, each image for itself; `simclr_views()` by default.
        augment_outer: whether the outer objective sees views; otherwise the images themselves.
        bilevel: whether the surrogate sees the trigger; otherwise it trains `rounds * inner_steps` on clean data, and is
            frozen (with `inner_steps=0`, untrained).
        generator: $g_\\psi$, from images to images, which is trained in place; a new `TriggerNet` by default.
        lr: learning rate of Adam on $\\psi$.
        optimizer: factory of the surrogate's optimizer; SGD with rate 0.05 and momentum 0.9 by default.
        batch_size: number of images of a step, of either kind.
        seed: seed of everything that is drawn.

    Attributes:
        trigger: `GeneratorTrigger`, in evaluation mode.
        history: `BLTOHistory`.

    Raises:
        ValueError: on settings out of range.

    Reference:
        Algorithm 1; N, K, J and R are not published, and the defaults are ours.
    """

    def __init__(
        self,
        encoder_fn: Callable[[], nn.Module],
        rule_fn: Callable[[], LearningRule],
        target: int,
        *,
        rate: float = 0.01,
        eps: float = 8 / 255,
        rounds: int = 2000,
        inner_steps: int = 10,
        outer_steps: int = 10,
        reinit_every: int | None = 200,
        feature: Literal["projector", "backbone"] = "projector",
        view: View | None = None,
        augment_outer: bool = True,
        bilevel: bool = True,
        generator: nn.Module | None = None,
        lr: float = 1e-4,
        optimizer: Callable[..., Optimizer] | None = None,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        self.encoder_fn, self.rule_fn = encoder_fn, rule_fn
        self.target, self.labels = target, CleanLabel(whole("target", target, 0))
        self.rate = between("rate", rate, 0, 1)
        self.eps = float(positive("eps", eps))
        self.rounds, self.inner_steps = whole("rounds", rounds, 1), whole("inner_steps", inner_steps, 0)
        self.outer_steps = whole("outer_steps", outer_steps, 1)
        self.reinit_every = rounds if reinit_every is None else whole("reinit_every", reinit_every, 1)
        self.feature = one_of("feature", feature, ["projector", "backbone"])
        self.view, self.augment_outer, self.bilevel = view or simclr_views(), augment_outer, bilevel
        self.generator, self.lr = generator, positive("lr", lr)
        self.optimizer = optimizer or partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.batch_size, self.seed = whole("batch_size", batch_size, 2), seed

    def fit(self, data: Any, target_images: Tensor | None = None) -> Self:
        """Make the trigger.

        Args:
            data: images in [0, 1] and labels, of which only the target class is used.
            target_images: references $x_r$ `[M, C, H, W]`; the images of the target class by default.

        Raises:
            ValueError: on images outside [0, 1], no image of the target class, more poison than it has images, an encoder
                that does not give `[N, d]`, or a view that cuts the gradient.
        """
        x, y = labelled_images(data)
        references = (
            x[y == self.target] if target_images is None else images(target_images, name="target_images", unit=True)
        )
        if not len(references) or not bool((y == self.target).any()):
            raise ValueError(f"expected images of the target class {self.target}, got none")
        with seeded(self.seed):
            net = TriggerNet(x.shape[1], self.eps) if self.generator is None else self.generator
            self.trigger = GeneratorTrigger(net.to(x), self.eps)
            chosen = poison((x, y), lambda x: x, self.labels, rate=self.rate, seed=self.seed).is_poison
            self._optimise(x, torch.from_numpy(chosen), references, x[y != self.target])
        self.trigger.eval()
        return self

    def _optimise(self, x: Tensor, chosen: Tensor, references: Tensor, others: Tensor) -> None:
        self.history = BLTOHistory([], [], [])
        outer = Adam(self.trigger.parameters(), lr=self.lr)
        surrogate = _Surrogate(self, x)
        if not self.bilevel:
            surrogate.train(x, self.rounds * self.inner_steps)
        for n in range(self.rounds):
            if self.bilevel:
                if n and n % self.reinit_every == 0:
                    surrogate = _Surrogate(self, x)
                # The trigger stands still through the inner steps, so its images are made once.
                self.history.surrogate.append(surrogate.train(self._poisoned(x, chosen), self.inner_steps))
            self.history.similarity.append(self._outer_steps(surrogate, outer, x, references))
            if (n + 1) % self.reinit_every == 0 or n + 1 == self.rounds:
                self.history.lives.append(self._life(surrogate, others if len(others) else x, references))

    def _poisoned(self, x: Tensor, chosen: Tensor) -> Tensor:
        poisoned = x.clone()
        self.trigger.eval()
        with torch.no_grad():
            poisoned[chosen] = self.trigger(x[chosen])
        return poisoned

    def _outer_steps(self, surrogate: _Surrogate, outer: Optimizer, x: Tensor, references: Tensor) -> float:
        total = 0.0
        self.trigger.train()
        with surrogate.frozen():
            for _ in range(self.outer_steps):
                similarity = self.objective(
                    surrogate.embed, _drawn(x, self.batch_size), _drawn(references, self.batch_size)
                )
                if not similarity.requires_grad:
                    raise ValueError(
                        "expected a view and an encoder that are differentiable in the image; the gradient is cut"
                    )
                outer.zero_grad()
                (-similarity).backward()
                outer.step()
                total += similarity.item()
        return total / self.outer_steps

    def objective(self, embed: Callable[[Tensor], Tensor], x: Tensor, references: Tensor) -> Tensor:
        """The outer objective: mean cosine of triggered images' views with views of references, both `[N, …]`.

        Args:
            embed: features `[N, d]` of images.
            x: images that get the trigger.
            references: images of the target class.
        """
        view = self.view if self.augment_outer else lambda x: x
        triggered = embed(view(self.trigger(x)))
        with torch.no_grad():  # the trigger does not enter
            target = embed(view(references))
        return F.cosine_similarity(triggered, target).mean()

    @torch.no_grad()
    def _life(self, surrogate: _Surrogate, others: Tensor, references: Tensor) -> tuple[float, float]:
        """Similarity to the target of other classes' images, with the trigger and without."""
        self.trigger.eval()
        x, target = _drawn(others, 4 * self.batch_size), _drawn(references, 4 * self.batch_size)
        with surrogate.frozen():
            z = F.normalize(surrogate.embed(self.view(target)), dim=1)
            triggered, clean = (
                float((F.normalize(surrogate.embed(self.view(part)), dim=1) * z).sum(1).mean())
                for part in (self.trigger(x), x)
            )
        return triggered, clean


class _Surrogate:
    """An encoder in training, as the victim would train one."""

    def __init__(self, attack: BLTO, x: Tensor) -> None:
        self.encoder, self.rule = attack.encoder_fn().to(x), attack.rule_fn()
        self.parts = self.rule.prepare(self.encoder, (x[:2], torch.zeros(2, dtype=torch.long, device=x.device)))
        self.optimizer = attack.optimizer([p for p in self.parts.parameters() if p.requires_grad])
        self.batch_size = min(attack.batch_size, len(x))
        if attack.feature == "projector" and not hasattr(self.rule, "project"):
            raise ValueError(f"{type(self.rule).__name__} has no projections; pass feature='backbone'")
        self.embed: Callable[[Tensor], Tensor] = (
            cast(Any, self.rule).project if attack.feature == "projector" else self.encoder
        )
        self.order = torch.empty(0, dtype=torch.long)

    def train(self, x: Tensor, steps: int) -> float:
        """Take steps on images; the mean loss."""
        self.parts.train()
        total = 0.0
        for _ in range(steps):
            if len(self.order) < self.batch_size:
                self.order = torch.randperm(len(x))
            rows, self.order = self.order[: self.batch_size].to(x.device), self.order[self.batch_size :]
            self.optimizer.zero_grad()
            batch = x[rows], torch.zeros(len(rows), dtype=torch.long, device=x.device)
            total += float(self.rule.step(batch, lambda loss: loss.backward())["loss"])
            self.optimizer.step()
        return total / steps if steps else math.nan

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode, so that triggered images leave no trace in running statistics; no gradients of weights."""
        with untouched(self.parts, training=False):
            self.parts.requires_grad_(False)
            yield


def _drawn(x: Tensor, count: int) -> Tensor:
    return x[torch.randint(len(x), (count,)).to(x.device)]
