"""Copies of one classifier that betray on whose copy an adversarial example was computed.

A vendor keeps one trained classifier $C$ and gives buyer $i$ the copy

$$M_i(x) = C(x) + \\alpha T_i(x), \\qquad T_i(x) \\in [-1, 1]^K,$$

with a small network beside it, the tracer, trained from a secret key to stay quiet on ordinary inputs and to react to
small noise in a way of its own. An attack on $M_i$ runs up $T_i$ more than the other tracers, which names its source, and
so transfers less to the other copies.

Whoever averages the outputs of several copies cancels what tells them apart: the method resists no such collusion. The
training loss is a reconstruction, as the paper's own is not public in full. Copies are made in `traced_copies`.

Longer than most because copies are traced here, and tried out as an attacker would: a trial is a trace of many attacks.

Reference:
    Fang et al., "Tracing the Origin of Adversarial Attack for Forensic Investigation and Deterrence", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.data import Examples
from torchfolio.measure import outputs
from torchfolio.robustness.attacks import Attack
from torchfolio.robustness.traced_copies import TracedCopy, Tracer, separate
from torchfolio.shown import Shown

__all__ = [
    "TraceResult",
    "TracedCopy",
    "Tracer",
    "Trial",
    "Utility",
    "separate",
    "trace",
    "transfer_matrix",
    "trial",
    "utility",
]


@dataclass(frozen=True, repr=False)
class TraceResult(Shown):
    """Which copies adversarial examples were computed on.

    Attributes:
        source: number of the copy named, `[B]`.
        scores: $T_i(x)_t - T_i(x)_y$, `[B, N]`; minus infinity for copies left out.
        raw: answers before the tanh, which decide between saturated tracers, `[B, N]`.
        inconclusive: whether nothing should be concluded: no copy is fooled, or the best ones tie, `[B]`.
        fooled: mask of the copies that decide otherwise than the true class, `[B, N]`.
        label: true class $y$, as given or guessed, `[B]`.
        target: class $t$ that was reached, `[B]`; -1 where no copy is fooled.
    """

    source: Tensor
    scores: Tensor
    raw: Tensor
    inconclusive: Tensor
    fooled: Tensor
    label: Tensor
    target: Tensor

    @property
    def margin(self) -> Tensor:
        """How far the best score is ahead of the next, `[B]`."""
        top = self.scores.topk(2, 1).values
        return torch.where(top[:, 0] == top[:, 1], torch.zeros_like(top[:, 0]), top[:, 0] - top[:, 1])

    @property
    def confidence(self) -> Tensor:
        """Softmax of the scores over copies, `[B, N]`."""
        return self.scores.softmax(1).nan_to_num(1 / self.scores.shape[1])

    def pooled(self) -> TraceResult:
        """All examples as evidence of one incident: their scores are summed. The result has one row."""
        scores, raw = self.scores.sum(0, keepdim=True), self.raw.sum(0, keepdim=True)
        source, tied = _best(scores, raw)
        fooled = self.fooled.any(0, keepdim=True)
        none = ~fooled.any(1) | self.inconclusive.all()
        first = {"label": self.label[:1], "target": self.target[:1]}
        return replace(self, source=source, scores=scores, raw=raw, fooled=fooled, inconclusive=tied | none, **first)

    def __getitem__(self, rows: slice | Tensor) -> TraceResult:
        return TraceResult(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.source)


@torch.no_grad()
def trace(
    copies: Sequence[TracedCopy],
    x_adv: Tensor,
    *,
    label: Tensor | int | None = None,
    target: Tensor | int | None = None,
    require_fooled: bool = False,
    batch_size: int = 512,
) -> TraceResult:
    """Name the copy that adversarial examples were computed on, without their clean inputs.

    The source is the copy whose tracer leans most from the true class $y$ to the class $t$ that was reached,
    $\\operatorname{argmax}_i\\, T_i(x)_t - T_i(x)_y$. Copies that are not fooled themselves are candidates too.

    Args:
        copies: all copies that were given away, two or more.
        x_adv: adversarial examples `[B, ...]`.
        label: true class, `[B]` or one for all. By default the classifier's answer, or its second one where its answer
            is what the copies were fooled into.
        target: class reached, `[B]` or one for all. By default what most of the fooled copies decide; where none is
            fooled each copy's runner-up, and the result is inconclusive.
        require_fooled: whether copies that are not fooled are left out.
        batch_size: examples at a time.

    Raises:
        ValueError: on fewer than two copies, copies of several classifiers, NaN, a class out of range, or a target that
            is the label.
    """
    if len(copies) < 2:
        raise ValueError(f"expected two copies or more, got {len(copies)}")
    if not isinstance(x_adv, Tensor) or not x_adv.is_floating_point() or x_adv.dim() < 2 or not len(x_adv):
        raise ValueError("expected adversarial examples [B, ...] in floating point, at least one")
    checks.finite("x_adv", x_adv)
    base, raw, traced = _answers(copies, x_adv, batch_size)
    alphas = torch.tensor([c.alpha for c in copies], dtype=base.dtype)
    logits = base[:, None] + alphas[None, :, None] * traced
    y, t, lost = _classes_of(base, logits, label, target)
    fooled = logits.argmax(2) != y[:, None]
    # Where nothing is known of the class reached, every copy's own runner-up.
    targets = torch.where((t < 0)[:, None], _runner_up(logits, y), t[:, None])
    evidence = (_lean(values, targets, y) for values in (traced, raw))
    scores, raws = (v.masked_fill(~fooled, -torch.inf) if require_fooled else v for v in evidence)
    source, tied = _best(scores, raws)
    return TraceResult(source, scores, raws, tied | lost | ~fooled.any(1), fooled, y, t)


def _classes_of(
    base: Tensor, logits: Tensor, label: Tensor | int | None, target: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """True class and class reached (-1 where unknown) of each example, and where no copy was seen to be fooled."""
    count, num_classes = base.shape
    decisions, answer = logits.argmax(2), base.argmax(1)
    y = answer if label is None else _given("label", label, count, num_classes)
    fooled = decisions != y[:, None]
    if target is not None:
        t, lost = _given("target", target, count, num_classes), torch.zeros(count, dtype=torch.bool)
    else:
        t, lost = _majority(decisions, fooled, logits), ~fooled.any(1)
        # Without a label, copies that all agree with the classifier may be fooled with it.
        t = torch.where(lost, answer if label is None else -1, t)
    if label is None:
        y = torch.where(y == t, base.topk(2, 1).indices[:, 1], y)
    if bool((t == y).any()):
        raise ValueError("expected targets other than the labels, got examples whose target is their label")
    return y, t, lost


def _answers(copies: Sequence[TracedCopy], x: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The classifier's logits `[B, K]`, and the tracers' outputs before and behind the tanh, `[B, N, K]`."""
    if any(not isinstance(c, TracedCopy) for c in copies):
        raise TypeError("expected copies made by separate")
    base = _answer(copies[0].classifier, x, batch_size)
    if any(c.classifier is not copies[0].classifier for c in copies):
        others = [_answer(c.classifier, x[:1], 1) for c in copies]
        if any(not torch.equal(o, others[0]) for o in others):
            raise ValueError("expected copies of one classifier, got several")
    raw = torch.stack([_answer(getattr(c.tracer, "body", c.tracer), x, batch_size) for c in copies], 1)
    limits = torch.tensor([getattr(c.tracer, "bounded", False) for c in copies])[None, :, None]
    return base, raw, torch.where(limits, raw.tanh(), raw)


def _answer(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    return outputs(model, (x,), batch_size=batch_size)


def _lean(values: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """$v_t - v_y$ of `[B, N, K]`, with a target for every copy `[B, N or 1]`."""
    reached = values.gather(2, t.expand(values.shape[:2])[..., None])
    return (reached - values.gather(2, y[:, None, None].expand(*values.shape[:2], 1)))[..., 0]


def _best(scores: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """The copy of the best score, by the raw ones among equals; and whether copies tie in both."""
    among = torch.where(scores == scores.amax(1, keepdim=True), raw, -torch.inf)
    tied = (among == among.amax(1, keepdim=True)).sum(1) > 1
    return among.argmax(1), tied


def _majority(decisions: Tensor, fooled: Tensor, logits: Tensor) -> Tensor:
    """The class that most fooled copies decide for; of as many votes, the likelier one."""
    votes = F.one_hot(decisions, logits.shape[2]) * fooled[..., None]
    return (votes.sum(1) + 0.5 * logits.softmax(2).mean(1)).where(votes.sum(1) > 0, -torch.inf).argmax(1)


def _runner_up(logits: Tensor, y: Tensor) -> Tensor:
    """Every copy's likeliest class other than y, `[B, N]`."""
    return logits.scatter(2, y[:, None, None].expand(*logits.shape[:2], 1), -torch.inf).argmax(2)


def _given(name: str, value: Tensor | int, count: int, num_classes: int) -> Tensor:
    classes = torch.as_tensor(value).cpu()
    classes = classes.expand(count) if classes.dim() == 0 else classes
    if len(classes) != count:
        raise ValueError(f"expected a {name} for each of {count} examples, got {len(classes)}")
    return checks.labels(classes, num_classes, name=name).long()


@dataclass(frozen=True, repr=False)
class Utility(Shown):
    """What copies are worth: accuracy of the classifier and of every copy, `[N]`, from 0 to 1."""

    classifier: float
    copies: Tensor

    @property
    def mean_loss(self) -> float:
        """Accuracy that copies lose on average."""
        return self.classifier - float(self.copies.mean())

    @property
    def worst_loss(self) -> float:
        """Accuracy that the worst copy loses."""
        return self.classifier - float(self.copies.min())


def utility(copies: Sequence[TracedCopy], classifier: nn.Module, data: Any) -> Utility:
    """Accuracy of every copy beside the classifier's.

    Args:
        copies: all copies.
        classifier: network that they were made from.
        data: examples (x, y).
    """
    y = Examples(data).labels
    if y is None:
        raise ValueError("expected examples with class labels")
    score = [float((outputs(m, data).argmax(1) == y.cpu()).double().mean()) for m in (classifier, *copies)]
    return Utility(score[0], torch.tensor(score[1:], dtype=torch.float64))


class AttackFunction(Protocol):
    """An attack whose settings are fixed, such as `partial(pgd, eps=0.1, alpha=0.02, steps=20)`."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, /) -> Attack: ...


@dataclass(frozen=True, repr=False)
class Trial(Shown):
    """Attacks on several copies, and what became of them.

    Attributes:
        sources: numbers of the copies that were attacked, `[S]`.
        x_adv: adversarial examples of each, `[S, B, ...]`.
        label: true classes `[B]`.
        success: whether each fools its source, `[S, B]`.
        fooled: mask of the copies that each fools, `[S, B, N]`.
        named: copy that each was traced to, `[S, B]`; with `inconclusive` `[S, B]`.
        inconclusive: mask of the attacks that `named` cannot tell.
        queries: forward passes per example, of attacks that count them.
    """

    sources: Tensor
    x_adv: Tensor
    label: Tensor
    success: Tensor
    fooled: Tensor
    named: Tensor
    inconclusive: Tensor
    queries: int

    @property
    def accuracy(self) -> float:
        """Share of the successful examples that are traced to their source, conclusively; NaN where none is."""
        return self._accuracy(self.success)

    @property
    def accuracy_transferred(self) -> float:
        """The same over those that fool another copy too: the case of an investigation."""
        return self._accuracy(self.success & (self.fooled.sum(2) > 1))

    def _accuracy(self, among: Tensor) -> float:
        right = (self.named == self.sources[:, None]) & ~self.inconclusive
        return float(right[among].double().mean())

    @property
    def transfer(self) -> Tensor:
        """A row for each source: share of its successful examples that fool each copy; on its own, of all examples."""
        hits = (self.fooled & self.success[..., None]).double().sum(1) / self.success.sum(1, keepdim=True)
        own = torch.arange(len(self.sources)), self.sources
        hits[own] = self.success.double().mean(1)
        return hits

    @property
    def transfer_rate(self) -> float:
        """Mean share of the other copies that are fooled, over successful examples."""
        hits = (self.fooled[self.success].sum(1) - 1).double()
        return float(hits.mean()) / (self.fooled.shape[2] - 1)


def trial(
    copies: Sequence[TracedCopy], attack: AttackFunction, data: Any, *, sources: Sequence[int] | None = None
) -> Trial:
    """Attack copies one after the other, and trace what comes of it.

    Args:
        copies: all copies.
        attack: attack with its settings.
        data: examples (x, y); those that some copy gets wrong already are left out.
        sources: numbers of the copies that are attacked; all by default.

    Raises:
        ValueError: if no example is right in all copies.
    """
    x, y = _pairs(data)
    right = torch.stack([outputs(c, (x,)).argmax(1) == y for c in copies]).all(0)
    if not bool(right.any()):
        raise ValueError("expected examples that all copies get right, got none")
    x, y = x[right.to(x.device)], y[right]
    weight = next(copies[0].parameters())
    x, labels = x.to(weight.device, weight.dtype), y.to(weight.device)
    chosen = list(range(len(copies)) if sources is None else sources)
    attacks = [attack(copies[k], x, labels) for k in chosen]
    traced = [trace(copies, a.x_adv, label=y) for a in attacks]
    return Trial(
        torch.tensor(chosen), torch.stack([a.x_adv.cpu() for a in attacks]), y,
        torch.stack([t.fooled[:, k] for t, k in zip(traced, chosen, strict=True)]),
        torch.stack([t.fooled for t in traced]), torch.stack([t.source for t in traced]),
        torch.stack([t.inconclusive for t in traced]), max(a.queries for a in attacks),
    )  # fmt: skip


def _pairs(data: Any) -> tuple[Tensor, Tensor]:
    """All inputs, and their labels on the CPU."""
    examples = Examples(data)
    y = examples.labels
    if y is None:
        raise ValueError("expected examples with class labels")
    x = examples.tensors[0] if examples.tensors is not None else torch.cat([row[0] for row in examples.batches()])
    return x, y.cpu()


def transfer_matrix(copies: Sequence[TracedCopy], attack: AttackFunction, data: Any) -> Tensor:
    """Attack every copy: a row for each, with the share of its successful examples that fool each other copy `[N, N]`.

    On the diagonal stands the share of examples that fool the copy itself. See `trial`.
    """
    return trial(copies, attack, data).transfer
