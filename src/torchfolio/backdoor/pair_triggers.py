"""The smallest trigger for every pair of classes, all pairs in one batch.

For a pair $(s, t)$ a trigger is inverted on images of $s$ until a share $\\pi$ of them is predicted $t$. A pair that does
not get there has no trigger: its size is infinite.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.backdoor.additive_trigger import AdditiveTrigger
from torchfolio.backdoor.inversion import fast_copy, unit
from torchfolio.backdoor.patch_trigger import PatchTrigger
from torchfolio.backdoor.suspects import device_of
from torchfolio.backdoor.trigger_base import Trigger
from torchfolio.shown import Shown

__all__ = ["AdditiveInversion", "PairInversion", "PairTriggers", "PatchInversion"]

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True, repr=False)
class PairTriggers(Shown):
    """Triggers of pairs of classes.

    Attributes:
        pairs: `(source, target)` of each.
        sizes: $\\lVert v \\rVert_2$ or $\\lVert m \\rVert_1$ `[P]`; infinite where the share was not reached.
        patterns: patterns that are added, or put in place of pixels, `[P, C, H, W]`.
        masks: places of the patterns, `[P, 1, H, W]`; `None` where it is added.
    """

    pairs: tuple[tuple[int, int], ...]
    sizes: Tensor
    patterns: Tensor
    masks: Tensor | None = None

    def apply(self, k: int, x: Tensor) -> Tensor:
        """Images `[N, C, H, W]` with the trigger of the k-th pair."""
        if self.masks is None:
            return (x + self.patterns[k].to(x)).clamp(0, 1)
        return torch.lerp(x, self.patterns[k].to(x).expand_as(x), self.masks[k].to(x).expand_as(x))

    def trigger(self, k: int) -> Trigger:
        """The trigger of the k-th pair, for poisoning and for the metrics of attacks."""
        if self.masks is None:
            return AdditiveTrigger(self.patterns[k].float().cpu(), quantize=False)
        return PatchTrigger(self.patterns[k].float().cpu(), self.masks[k].float().cpu())

    @staticmethod
    def joined(parts: Sequence[PairTriggers]) -> PairTriggers:
        """The triggers of several sets of pairs, one after another."""
        masks = [p.masks for p in parts if p.masks is not None]
        return PairTriggers(
            tuple(pair for p in parts for pair in p.pairs), torch.cat([p.sizes for p in parts]),
            torch.cat([p.patterns for p in parts]), torch.cat(masks) if masks else None,
        )  # fmt: skip


class PairInversion(Shown, ABC):
    """How the triggers of pairs of classes are inverted.

    Args:
        pi: share $\\pi$ of the source's images that the trigger must send to the target.
        steps: maximum number of steps.
        chunk: images that go through the network at once.
    """

    def __init__(self, pi: float = 0.9, steps: int = 200, chunk: int = 500) -> None:
        self.pi = checks.between("pi", pi, 0, 1, inclusive=(False, True))
        self.steps, self.chunk = checks.whole("steps", steps, 1), checks.whole("chunk", chunk, 1)

    def estimate(
        self,
        model: nn.Module,
        images: Sequence[Tensor] | Tensor,
        pairs: Pairs,
        generator: torch.Generator | None = None,
    ) -> PairTriggers:
        """The triggers of pairs. The network is left as it is.

        Args:
            model: network from images in [0, 1] to logits.
            images: images of every class, `[n, C, H, W]` each.
            pairs: `(source, target)`; classes without pairs need no images.
            generator: source of initial values, where there are any.

        Raises:
            ValueError: on no pair, a pair of one class with itself, a class out of range, or images outside [0, 1].
        """
        net = fast_copy(model)
        sources, targets = checked_pairs(pairs, len(images))
        used = sorted(set(sources))
        stack = torch.stack([checks.images(images[s], name=f"images of class {s}", unit=True) for s in used])
        stack = stack.to(device_of(net, stack))
        classes = net(stack[0, :1]).shape[-1]
        for t in targets:
            checks.whole("target", t, 0, classes - 1)
        rows = torch.tensor([used.index(s) for s in sources], device=stack.device)
        with torch.enable_grad():
            triggers = self._estimate(net, stack, rows, torch.tensor(targets, device=stack.device), generator)
        return PairTriggers(tuple(zip(sources, targets, strict=True)), *triggers)

    @abstractmethod
    def _estimate(
        self, net: nn.Module, images: Tensor, rows: Tensor, targets: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sizes, patterns and masks; pair p is on `images[rows[p]]`."""

    def _parts(self, active: Tensor, n: int) -> tuple[Tensor, ...]:
        return active.split(max(1, self.chunk // n))


def checked_pairs(pairs: Pairs, classes: int) -> tuple[list[int], list[int]]:
    """Sources and targets of pairs.

    Raises:
        ValueError: on no pair, a pair of one class with itself, or a source without images.
    """
    if not len(pairs):
        raise ValueError("expected at least one pair of classes, got none")
    for s, t in pairs:
        checks.whole("source", s, 0, classes - 1)
        if s == t:
            raise ValueError(f"expected pairs of different classes, got {s} to {t}")
    return [int(s) for s, _ in pairs], [int(t) for _, t in pairs]


class AdditiveInversion(PairInversion):
    """What is added, $x \\oplus v = \\operatorname{clip}_{[0, 1]}(x + v)$, from $v = 0$ in steps of one length,

    $$v \\leftarrow v - \\eta\\, g / \\lVert g \\rVert_2, \\quad g = \\nabla_v \\operatorname{CE}(f(x \\oplus v), t),$$

    until the share is reached. The authors step by $\\eta g$, with $\\eta$ set by hand for the scale of the logits.

    Args:
        step: $\\eta$; by default $0.1 \\sqrt{784 / CHW}$, 0.1 at most: 0.05 for colour images of 32 x 32.
        limit: norm of $v$ at which a pair is given up.
        **settings: settings of `PairInversion`.
    """

    def __init__(self, step: float | None = None, limit: float = 20.0, **settings: float) -> None:
        super().__init__(**settings)  # pyright: ignore[reportArgumentType]
        self.step = None if step is None else checks.positive("step", step)
        self.limit = checks.positive("limit", limit)

    def _estimate(
        self, net: nn.Module, images: Tensor, rows: Tensor, targets: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        shape, n = images.shape[2:], images.shape[1]
        step = min(0.1, 0.1 * math.sqrt(784 / math.prod(shape))) if self.step is None else self.step
        v = images.new_zeros(len(rows), *shape)
        sizes = torch.full((len(rows),), math.inf, device=images.device, dtype=images.dtype)
        active = torch.arange(len(rows), device=images.device)
        for k in range(self.steps + 1):
            kept = []
            for part in self._parts(active, n):
                share, gradient = self._look(net, images[rows[part]], v[part], targets[part])
                norms = v[part].flatten(1).norm(dim=1)
                reached = share >= self.pi
                sizes[part[reached]] = norms[reached]
                on = ~reached & (norms <= self.limit)
                if k < self.steps:
                    v[part[on]] -= step * unit(gradient[on])
                kept.append(part[on])
            active = torch.cat(kept)
            if not len(active):
                break
        return sizes, v, None

    @staticmethod
    def _look(net: nn.Module, x: Tensor, v: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Share of each pair's images that get there, and the gradient of the loss in v."""
        v = v.detach().requires_grad_(True)
        share, loss = shares(net, (x + v[:, None]).clamp(0, 1), targets)
        return share, torch.autograd.grad(loss.sum(), v)[0]


class PatchInversion(PairInversion):
    """What is put in place of pixels, $x \\oplus v = (1 - m) x + m p$ with $p = (\\tanh \\tilde p + 1) / 2$ and $m$ likewise,
    one mask for all channels.

    First without a penalty until the share is reached ten steps in a row, then with $\\operatorname{CE} + \\lambda
    \\lVert m \\rVert_1$, where $\\lambda$ grows by half after five steps that reach the share and shrinks likewise after five
    that do not. The smallest mask that reached the share is kept, the best of several trials; all trials run at once.

    Args:
        trials: random beginnings.
        patience: steps without a mask smaller by 1 % after which a pair is done.
        **settings: settings of `PairInversion`; `steps` is the maximum for each of the two stages.
    """

    def __init__(self, trials: int = 5, patience: int = 100, **settings: float) -> None:
        super().__init__(**{"steps": 1000, **settings})  # pyright: ignore[reportArgumentType]
        self.trials, self.patience = checks.whole("trials", trials, 1), checks.whole("patience", patience, 1)

    def _estimate(
        self, net: nn.Module, images: Tensor, rows: Tensor, targets: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        pairs = len(rows)
        rows, targets = rows.repeat(self.trials), targets.repeat(self.trials)
        raw = self._start(images, len(rows), generator)
        self._first(net, images, rows, targets, raw, generator)
        sizes, best = self._second(net, images, rows, targets, raw)
        at = sizes.view(self.trials, pairs).argmin(0) * pairs + torch.arange(pairs, device=sizes.device)
        p, m = best[at, :-1], best[at, -1:]
        return sizes[at], (p.tanh() + 1) / 2, (m.tanh() + 1) / 2

    @staticmethod
    def _start(images: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """$\\tilde p$ and, as the last channel, $\\tilde m$, `[count, C + 1, H, W]`."""
        kind = {"device": images.device, "dtype": images.dtype}
        level = 2 * torch.rand(count, 1, 1, 1, generator=generator, **kind) - 1
        p = level + 0.1 * torch.randn(count, *images.shape[2:], generator=generator, **kind)
        return torch.cat([p, p[:, :1]], 1)

    def _first(
        self,
        net: nn.Module,
        images: Tensor,
        rows: Tensor,
        targets: Tensor,
        raw: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        """Stage 1, in place."""
        jitter = torch.randn(len(rows), 1, 1, 1, device=raw.device, dtype=raw.dtype, generator=generator)
        lr, velocity = 1e-2 * (1 + 0.1 * jitter), torch.zeros_like(raw)
        streak = torch.zeros(len(rows), device=raw.device)
        active = torch.arange(len(rows), device=raw.device)
        for _ in range(self.steps):
            for part in self._parts(active, images.shape[1]):
                share, gradient, _ = self._look(net, images[rows[part]], raw[part], targets[part], None)
                streak[part] = torch.where(share >= self.pi, streak[part] + 1, 0)
                velocity[part] = 0.5 * velocity[part] + gradient
                raw[part] -= lr[part] * velocity[part]
            active = active[streak[active] < 10]
            if not len(active):
                return

    def _second(
        self, net: nn.Module, images: Tensor, rows: Tensor, targets: Tensor, raw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stage 2: sizes and the masks and patterns that have them."""
        count, pixels = len(rows), raw.shape[-1] * raw.shape[-2]
        weight, sizes = raw.new_full((count,), 1e-2), raw.new_full((count,), math.inf)
        best, above, below, idle = raw.clone(), *torch.zeros(3, count, device=raw.device)
        active = torch.arange(count, device=raw.device)
        for _ in range(self.steps):
            for part in self._parts(active, images.shape[1]):
                share, gradient, area = self._look(net, images[rows[part]], raw[part], targets[part], weight[part])
                fits = share >= self.pi
                better = fits & (area < 0.99 * sizes[part])
                sizes[part[better]], best[part[better]] = area[better], raw[part[better]]
                idle[part] = torch.where(better, 0, idle[part] + 1)
                above[part], below[part] = torch.where(fits, above[part] + 1, 0), torch.where(fits, 0, below[part] + 1)
                grown, shrunk = above[part] >= 5, below[part] >= 5
                # The cap falls once a mask is known that leaves some of the image.
                cap = torch.where(sizes[part] < 0.98 * pixels, 0.1, 10.0)
                factor = torch.where(grown, 1.5, torch.where(shrunk, 1 / 1.5, 1.0))
                weight[part] = torch.minimum(weight[part] * factor, cap)
                above[part], below[part] = torch.where(grown, 0, above[part]), torch.where(shrunk, 0, below[part])
                raw[part] -= 0.1 * gradient
            active = active[idle[active] < self.patience]
            if not len(active):
                break
        return sizes, best

    @staticmethod
    def _look(
        net: nn.Module, x: Tensor, raw: Tensor, targets: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Share of each pair's images that get there, the gradient of the loss, and the area of the mask."""
        raw = raw.detach().requires_grad_(True)
        p, m = (raw[:, None, :-1].tanh() + 1) / 2, (raw[:, None, -1:].tanh() + 1) / 2
        share, loss = shares(net, (1 - m) * x + m * p, targets)
        area = m.flatten(1).sum(1)
        total = loss if weight is None else loss + weight * area
        return share, torch.autograd.grad(total.sum(), raw)[0], area.detach()


def shares(net: nn.Module, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of images `[P, n, ...]`: the share that is predicted as the target, and the mean loss towards it, `[P]` each."""
    flat = x.flatten(0, 1)
    logits = net(flat.contiguous(memory_format=torch.channels_last) if flat.dim() == 4 else flat)
    at = targets.repeat_interleave(x.shape[1])
    loss = F.cross_entropy(logits, at, reduction="none").unflatten(0, x.shape[:2]).mean(1)
    return (logits.argmax(1) == at).unflatten(0, x.shape[:2]).to(loss.dtype).mean(1), loss
