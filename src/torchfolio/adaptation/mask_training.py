"""Training of masks over task vectors, with universal perturbations that seek a backdoor's shortcut.

Reference:
    Yang et al., "Mitigating the Backdoor Effect for Multi-Task Model Merging via Safety-Aware Subspace", ICLR 2025, arXiv
    2410.13910, Section 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.adaptation.merging import TaskVectors, check_finite, entropy, sum_of
from torchfolio.shown import Shown

__all__ = ["Bound", "MaskTraining", "warn_of_collapse"]

Bound = float | Sequence[float]


class MaskTraining(Shown):
    """The state of mask training: logits, perturbations, their optimizers, and one step on them."""

    def __init__(self, method: Any, tasks: TaskVectors, weights: Tensor) -> None:
        self.method, self.tasks, self.weights = method, tasks, weights
        count = 2 if method.masks == "dual" else 1
        self.phis = [torch.zeros_like(tasks.base, requires_grad=True) for _ in range(count)]
        self.mask_optimizers = [torch.optim.Adam([phi], lr=method.mask_lr) for phi in self.phis]
        self.deltas: list[Tensor] = []
        self.generator = torch.Generator(tasks.base.device).manual_seed(method.seed)
        # Of its own, so that masks are the same whatever the search draws.
        self.restarts = torch.Generator(tasks.base.device).manual_seed(method.seed + 1)

    def step(self, inputs: list[Tensor], step: int) -> dict[str, float]:
        """Steps 1 to 5 of the algorithm."""
        if not self.deltas:
            self._start_perturbations(inputs)
        samples = [self._sample(phi) for phi in self.phis]
        mask = _product([m.detach() for m in samples])
        weights = self._inner_step(inputs, mask)
        theta = self.tasks.theta(weights, mask)
        row = {"phase": 0.0, "step": float(step)}
        labels: list[Tensor] = []
        if self.method.alpha > 0:
            labels, flip = self._detect(theta, inputs)
            row["flip"] = flip
        direction = self.tasks.direction(weights)
        for k, optimizer in enumerate(self.mask_optimizers):
            held = [m if i == k else m.detach() for i, m in enumerate(samples)]
            logits_of = self.tasks.base + direction * _product(held)
            safe = self.method.alpha > 0 and k == len(samples) - 1
            loss, figures = self._loss(logits_of, inputs, labels if safe else None)
            check_finite(loss, step)
            optimizer.zero_grad()
            loss.backward(retain_graph=False)
            optimizer.step()
            row.update(figures)
        return row

    def _start_perturbations(self, inputs: list[Tensor]) -> None:
        self.deltas = [torch.zeros_like(x[0], requires_grad=True) for x in inputs]
        self.delta_optimizers = [torch.optim.Adam([delta], lr=self.method.delta_lr) for delta in self.deltas]
        self.bounds = [_bounds(self.method.input_range, x) for x in inputs]
        self.radii = [
            _like(self.method.epsilon * (1 if low is None or high is None else high - low), delta)
            for delta, (low, high) in zip(self.deltas, self.bounds, strict=True)
        ]

    def _sample(self, phi: Tensor) -> Tensor:
        u = torch.rand(phi.shape, generator=self.generator, device=phi.device, dtype=phi.dtype)
        # A uniform number may be exactly 0, whose logarithm is not finite.
        u = u.clamp(torch.finfo(phi.dtype).tiny, 1 - torch.finfo(phi.dtype).eps)
        return self._rescale(torch.sigmoid((phi + u.log() - torch.log1p(-u)) / self.method.temperature))

    def _rescale(self, mask: Tensor) -> Tensor:
        """Divide by the mean over every tensor, so that a mask never shrinks the average task vector."""
        return torch.cat([part / part.mean() for part in mask.split(self.tasks.sizes)])

    def _inner_step(self, inputs: list[Tensor], mask: Tensor) -> Tensor:
        if self.method.inner_lr == 0:
            return self.weights
        weights = self.weights.clone().requires_grad_(True)
        loss = sum_of(entropy(z) for z in self.tasks.logits(self.tasks.theta(weights, mask), inputs))
        (gradient,) = torch.autograd.grad(loss, weights)
        return (weights - self.method.inner_lr * gradient).detach()

    def _detect(self, theta: Tensor, inputs: list[Tensor]) -> tuple[list[Tensor], float]:
        """Predictions on clean inputs, after a search for perturbations that flip them."""
        with torch.no_grad():
            labels = [z.argmax(-1) for z in self.tasks.logits(theta, inputs)]
        if self.method.search == "restarts":
            self._restart()
        logits: list[Tensor] = []
        for _ in range(self.method.delta_steps):
            logits = self.tasks.logits(theta, self._perturbed(inputs, self.deltas, through=True))
            loss = -sum_of(F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True))
            self._move(torch.autograd.grad(loss, self.deltas))
        flipped = [(z.argmax(-1) != y).float().mean() for z, y in zip(logits, labels, strict=True)]
        return labels, float(torch.stack(flipped).mean())

    @torch.no_grad()
    def _restart(self) -> None:
        for delta, radius in zip(self.deltas, self.radii, strict=True):
            u = torch.rand(delta.shape, generator=self.restarts, device=delta.device, dtype=delta.dtype)
            delta.copy_((2 * u - 1) * radius)

    @torch.no_grad()
    def _move(self, gradients: Sequence[Tensor]) -> None:
        """A step of every perturbation against its gradient, back into the bound."""
        for delta, gradient, optimizer, radius in zip(
            self.deltas, gradients, self.delta_optimizers, self.radii, strict=True
        ):
            if self.method.search == "restarts":
                delta.sub_(2 * radius / self.method.delta_steps * gradient.sign())
            else:
                delta.grad = gradient
                optimizer.step()
            delta.copy_(torch.clamp(delta, -radius, radius))

    def _perturbed(self, inputs: list[Tensor], deltas: Sequence[Tensor], through: bool = False) -> list[Tensor]:
        """Inputs plus perturbations, clamped to their range; with `through`, gradients ignore the clamp."""
        perturbed = []
        for x, d, (low, high) in zip(inputs, deltas, self.bounds, strict=True):
            moved = x + d
            clamped = moved if low is None else torch.clamp(moved, low, high)
            perturbed.append(moved + (clamped - moved).detach() if through else clamped)
        return perturbed

    def _loss(
        self, theta: Tensor, inputs: list[Tensor], labels: list[Tensor] | None
    ) -> tuple[Tensor, dict[str, float]]:
        """$L_\\text{perf}$, and $\\alpha L_\\text{safe}$ on top where predictions are given."""
        if labels is None:
            clean = self.tasks.logits(theta, inputs)
            performance = sum_of(entropy(z) for z in clean)
            return performance, {"entropy": float(performance.detach()), "top_share": _top_share(clean)}
        perturbed = self._perturbed(inputs, [d.detach() for d in self.deltas])
        both = self.tasks.logits(theta, [torch.cat(pair) for pair in zip(inputs, perturbed, strict=True)])
        clean = [z[: len(x)] for z, x in zip(both, inputs, strict=True)]
        moved = [z[len(x) :] for z, x in zip(both, inputs, strict=True)]
        performance = sum_of(entropy(z) for z in clean)
        if self.method.safety == "consistency":
            safety = sum_of(F.cross_entropy(z, y) for z, y in zip(moved, labels, strict=True))
        else:
            safety = sum_of(entropy(z) for z in moved)
        figures = {"entropy": float(performance.detach()), "safety": float(safety.detach())}
        return performance + self.method.alpha * safety, {**figures, "top_share": _top_share(clean)}

    def final_mask(self) -> Tensor:
        """The mask that the merged network gets."""
        with torch.no_grad():
            if self.method.eval_mask == "sample":
                return _product([self._sample(phi) for phi in self.phis])
            if self.method.eval_mask == "mean":
                return _product([self._rescale(torch.sigmoid(phi)) for phi in self.phis])
            masks = [
                [part / part.mean().clamp_min(1e-12) for part in (phi > 0).to(phi).split(self.tasks.sizes)]
                for phi in self.phis
            ]
            return _product([torch.cat(parts) for parts in masks])


def _product(masks: Sequence[Tensor]) -> Tensor:
    return masks[0] if len(masks) == 1 else masks[0] * masks[1]


def _bounds(input_range: tuple[Bound, Bound] | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Bounds that broadcast over a batch; checked against the first batch."""
    if input_range is None:
        return None, None
    low, high = (torch.as_tensor(b, dtype=x.dtype, device=x.device) for b in input_range)
    if low.dim() or high.dim():
        shape = (1, -1, *[1] * (x.dim() - 2))
        low, high = (b.reshape(shape) if b.dim() else b for b in (low, high))
    slack = 1e-3 * (high - low)
    if (x < low - slack).any() or (x > high + slack).any():
        raise ValueError(
            f"inputs lie in [{float(x.min()):.3g}, {float(x.max()):.3g}], outside of the input range {input_range}; "
            "give the range that the inputs really have (normalised images: per channel)"
        )
    return low, high


def _like(radius: float | Tensor, delta: Tensor) -> Tensor:
    """The bound of a perturbation, which has no batch dimension."""
    radius = torch.as_tensor(radius, dtype=delta.dtype, device=delta.device)
    return (radius[0] if radius.dim() == delta.dim() + 1 else radius).expand_as(delta)


def _top_share(logits: Sequence[Tensor]) -> float:
    """Largest share of one class among the predictions of a task, over the tasks."""
    return max(float(z.argmax(-1).bincount().max()) / len(z) for z in logits)


def warn_of_collapse(history: Sequence[dict[str, float]]) -> None:
    """Warn if the last predictions are nearly all of one class."""
    last = [row["top_share"] for row in history[-20:]]
    if last and sum(last) / len(last) > 0.9:
        warnings.warn(
            f"{sum(last) / len(last):.0%} of a task's predictions are of one class: least entropy has collapsed; "
            "lower alpha, mask_lr or the number of steps",
            stacklevel=4,
        )
