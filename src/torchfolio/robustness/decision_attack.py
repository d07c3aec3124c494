"""A small perturbation from decisions alone: HopSkipJump (Chen, Jordan, Wainwright, IEEE S&P 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchfolio.robustness.attack_base import (
    Attack,
    Norm,
    attacked,
    check_inputs,
    check_logits,
    finished,
    lengths,
    logits_of,
    margin,
    wide,
)

__all__ = ["hop_skip_jump"]


def hop_skip_jump(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    max_queries: int = 5000,
    norm: Norm = 2,
    clip: tuple[float, float] = (0.0, 1.0),
    probes: int = 100,
    generator: torch.Generator | None = None,
) -> Attack:
    """A small perturbation from decisions alone.

    From a misclassified start, binary search to the boundary; then again and again estimate the direction across it
    from the decisions on $B_t = 100 \\sqrt t$ probes, go on by a step that is halved until it stays misclassified, and search
    back. Samples are attacked together, each with its own queries.

    Args:
        model: function from inputs to logits, of which only the place of the largest is used.
        x: inputs `[N, ...]`.
        y: labels `[N]`.
        max_queries: maximum number of queries a sample.
        norm: norm of the distance that is made small: 2 or `"inf"`.
        clip: range of valid inputs.
        probes: number of probes in the first iteration.
        generator: source of starts and probes.

    Reference:
        Chen, Jordan, Wainwright, "HopSkipJumpAttack", IEEE S&P 2020, algorithm 2.
    """
    check_inputs(x, y, clip, eps=0.0, restarts=1, norm=norm)
    search = _Decisions(model, y, clip, norm, generator)
    with attacked(model), torch.no_grad():
        point, alive = search.begin(x)
        theta = x[0].numel() ** -1.5 if norm == 2 else x[0].numel() ** -2.0
        point = search.to_boundary(x, point, theta)
        t = 1
        while search.queries + int(probes * math.sqrt(t)) + 50 <= max_queries and alive.any():
            distance = search.distance(x, point)
            direction = search.direction(point, distance, theta, int(probes * math.sqrt(t)))
            step = distance / math.sqrt(t)
            for _ in range(20):
                moved = (point + wide(step, x) * direction).clamp(*clip)
                failed = ~search.adversarial(moved)
                if not failed.any():
                    break
                step = torch.where(failed, step / 2, step)
            moved = torch.where(wide(search.adversarial(moved), x), moved, point)
            moved = search.to_boundary(x, moved, theta)
            nearer = (search.distance(x, moved) < distance) & alive
            point, t = torch.where(wide(nearer, x), moved, point), t + 1
        point = torch.where(wide(alive, x), point, x)
        done = finished(model, point, y, margin, False, 4096)
    return Attack(done.x_adv, done.success, done.loss, search.queries)


class _Decisions:
    """Questions to a model that answers by labels; counts them per sample."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        y: Tensor,
        clip: tuple[float, float],
        norm: Norm,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.y, self.clip, self.norm, self.generator = model, y, clip, norm, generator
        self.queries = 0

    def adversarial(self, x: Tensor) -> Tensor:
        self.queries += 1
        logits = logits_of(self.model, x, 4096)
        if self.queries == 1:
            check_logits(logits, self.y)
        return logits.argmax(1) != self.y

    def random(self, shape: torch.Size, like: Tensor, normal: bool) -> Tensor:
        draw = torch.randn if normal else torch.rand
        source = like.device if self.generator is None else self.generator.device
        return draw(shape, generator=self.generator, device=source, dtype=like.dtype).to(like.device)

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A misclassified point of every sample, as near as blending with noise gets; and which have one."""
        low, high = self.clip
        point, wrong = x.clone(), self.adversarial(x)
        noise = torch.zeros_like(x)
        for _ in range(50):
            if wrong.all():
                break
            drawn = low + (high - low) * self.random(x.shape, x, normal=False)
            hit = self.adversarial(drawn) & ~wrong
            noise = torch.where(wide(hit, x), drawn, noise)
            point, wrong = torch.where(wide(hit, x), drawn, point), wrong | hit
        return point, wrong

    def distance(self, x: Tensor, point: Tensor) -> Tensor:
        change = (point - x).flatten(1)
        return change.norm(dim=1) if self.norm == 2 else change.abs().amax(1)

    def to_boundary(self, x: Tensor, point: Tensor, theta: float) -> Tensor:
        """Binary search between input and point; the result is misclassified if the point was."""
        if self.norm == 2:
            low, high = (
                torch.zeros(len(x), dtype=x.dtype, device=x.device),
                torch.ones(len(x), dtype=x.dtype, device=x.device),
            )
            tolerance = theta
        else:
            low, high = torch.zeros(len(x), dtype=x.dtype, device=x.device), self.distance(x, point)
            tolerance = theta * float(high.max().clamp_min(1e-12))
        while float((high - low).max()) > max(tolerance, 1e-7):
            middle = (low + high) / 2
            hit = self.adversarial(self._between(x, point, middle))
            high, low = torch.where(hit, middle, high), torch.where(hit, low, middle)
        return self._between(x, point, high)

    def _between(self, x: Tensor, point: Tensor, where: Tensor) -> Tensor:
        if self.norm == 2:
            return x + wide(where, x) * (point - x)
        return torch.minimum(torch.maximum(point, x - wide(where, x)), x + wide(where, x))

    def direction(self, point: Tensor, distance: Tensor, theta: float, count: int) -> Tensor:
        """Estimated direction across the boundary, of length 1 (or signs)."""
        size = point[0].numel()
        delta = math.sqrt(size) * theta * distance if self.norm == 2 else size * theta * distance
        delta = delta.clamp_min(1e-6)
        total, mean = torch.zeros_like(point), torch.zeros(len(point), dtype=point.dtype, device=point.device)
        probes = []
        for _ in range(count):
            u = self.random(point.shape, point, normal=self.norm == 2)
            u = u if self.norm == 2 else 2 * u - 1
            u = u / wide(lengths(u), point)
            moved = (point + wide(delta, point) * u).clamp(*self.clip)
            answer = 2 * self.adversarial(moved).to(point.dtype) - 1
            probes.append((answer, (moved - point) / wide(delta, point)))
            mean += answer / count
        for answer, u in probes:
            # The mean is subtracted for less variance, unless all probes agree.
            weight = torch.where(mean.abs() < 1, answer - mean, answer)
            total += wide(weight, point) * u
        return total / wide(lengths(total), point) if self.norm == 2 else total.sign()
