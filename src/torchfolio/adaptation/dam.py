"""DAM: merging finetuned checkpoints without inheriting a backdoor that one of them may carry.

Jinluan Yang, Anke Tang, Didi Zhu, Zhengyu Chen, Li Shen, Fei Wu, "Mitigating the Backdoor Effect for Multi-Task
Model Merging via Safety-Aware Subspace", ICLR 2025, https://arxiv.org/abs/2410.13910.

Checkpoints of one pretrained network that come from strangers can be merged into one network for all their tasks.
A backdoor in one of them then works in the merged network, on its own task and on others. DAM learns, from
unlabelled inputs alone, which entries of the task vectors to keep: one mask for the subspace that the tasks
share, another that closes the shortcuts which a universal perturbation of the inputs finds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.adaptation.merge import Buffers, Forward, Inputs, Merge, MergeResult
from torchfolio.adaptation.merging import (
    Stream,
    TaskVectors,
    adapt_weights,
    check_finite,
    entropy,
    initial_weights,
    sum_of,
)
from torchfolio.adaptation.weights import Checkpoint
from torchfolio.engine.checks import check_positive

__all__ = ["ConcreteMerging", "DefenseAwareMerging"]

Bound = float | Sequence[float]


class DefenseAwareMerging(Merge):
    """Merge checkpoints with a task-shared and a backdoor-detection mask over their task vectors.

    $$\\theta(\\lambda, M) = \\theta_0 + \\sum_i \\lambda_i (\\tau_i \\odot M), \\qquad M = M_1 \\odot M_2$$

    Each mask is a relaxed Bernoulli sample $m = \\sigma((\\varphi + \\ln u - \\ln(1 - u)) / T)$, divided by its mean
    over every tensor. A step, on one unlabelled batch $x_i$ of every task:

    1. sample the masks;
    2. move $\\lambda$ from $\\lambda^0$ by one gradient step on $\\sum_i H(f_i(x_i))$, the mask held fixed;
    3. move the universal perturbation $\\delta_i$ of every task towards what flips the network's predictions
       $\\hat y_i$, up $\\sum_i \\mathrm{CE}(f_i(x_i + \\delta_i), \\hat y_i)$, and clamp it to
       $\\lVert\\delta_i\\rVert_\\infty \\le \\varepsilon$;
    4. move $\\varphi_1$ down $L_\\text{perf} = \\sum_i H(f_i(x_i))$, $M_2$ held fixed;
    5. move $\\varphi_2$ down $L_\\text{perf} + \\alpha L_\\text{safe}$, $M_1$ and $\\delta$ held fixed, with
       $L_\\text{safe} = \\sum_i \\mathrm{CE}(f_i(x_i + \\delta_i), \\hat y_i)$.

    Afterwards the mask is fixed and $\\lambda$ may be adapted by least entropy. Perturbed inputs are clamped to
    their range; step 3 passes gradients through that clamp, for a pixel of a black border that a perturbation has
    once pushed below zero has no gradient and would stay there.

    Args:
        safety: $L_\\text{safe}$: `"consistency"` as above, or `"entropy"`, $\\sum_i H(f_i(x_i + \\delta_i))$, which
            the authors' code uses and which mostly makes perturbed predictions confident.
        masks: `"dual"` as in the paper, or `"single"`: one mask that takes both losses, as in the authors' code.
        alpha: weight $\\alpha$ of safety. Large values make a constant network the optimum.
        epsilon: bound of the perturbation, as a share of the input range. A trigger that flips no prediction at
            this strength is not found.
        search: how step 3 looks for $\\delta$: `"adam"`, one perturbation that starts at zero and follows Adam, as in
            the authors' code; or `"restarts"`: at every step a uniform draw within the bound and `delta_steps` steps
            of $2 \\varepsilon$ / `delta_steps` along the gradient's sign. Adam follows the mask into one corner of
            the ball, and the mask forgets the others; restarts keep showing it new ones.
        delta_steps: steps of the search at every step of the masks.
        temperature: $T$ of the masks.
        weight: $\\lambda^0$.
        layerwise: one coefficient per task and tensor rather than per task.
        inner_lr: step size on $\\lambda$ in 2; 0 keeps $\\lambda^0$. (The authors' code takes a step of Adam at rate
            1, a jump of one per coefficient.)
        mask_lr: of Adam on the masks' logits; 2e-2 suits small networks.
        delta_lr: of Adam on the perturbations; likewise. Restarts do without.
        steps: number of steps; the authors take 1000 to 2000 on CLIP, small networks need about 100.
        adapt_steps: steps of the adaptation of $\\lambda$ afterwards; 0 keeps $\\lambda^0$.
        adapt_lr: its learning rate.
        eval_mask: the mask in the end: `"mean"`, $\\sigma(\\varphi)$; `"sample"`; or `"discrete"`, $[\\varphi > 0]$.
        batch_size: of inputs given as tensors or data sets; loaders keep their own.
        input_range: least and greatest value of an input, numbers or one per channel (dimension 1); `None` does
            not clamp, and takes `epsilon` in the units of the input.
        seed: of masks and of the order of inputs.

    Example:
        >>> dam = DefenseAwareMerging(steps=120, mask_lr=2e-2, delta_lr=2e-2, alpha=0.05, weight=0.7, adapt_steps=0)
        >>> result = dam.fit(pretrained, [net_a, net_b], [images_a, images_b], heads=[head_a, head_b])
        >>> logits = head_a(result.model(x))

    Reference:
        Section 4; relaxed masks and inner step as in the authors' code (FusionBench's concrete AdaMerging).
    """

    needs_inputs = True

    def __init__(
        self,
        *,
        safety: Literal["consistency", "entropy"] = "consistency",
        masks: Literal["dual", "single"] = "dual",
        alpha: float = 0.1,
        epsilon: float = 0.15,
        search: Literal["adam", "restarts"] = "adam",
        delta_steps: int = 1,
        temperature: float = 0.5,
        weight: float = 0.3,
        layerwise: bool = False,
        inner_lr: float = 0.05,
        mask_lr: float = 1e-3,
        delta_lr: float = 1e-4,
        steps: int = 1000,
        adapt_steps: int = 1000,
        adapt_lr: float = 1e-3,
        eval_mask: Literal["mean", "sample", "discrete"] = "mean",
        batch_size: int = 16,
        input_range: tuple[Bound, Bound] | None = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        _one_of("safety", safety, ("consistency", "entropy"))
        _one_of("masks", masks, ("dual", "single"))
        _one_of("search", search, ("adam", "restarts"))
        _one_of("eval_mask", eval_mask, ("mean", "sample", "discrete"))
        for name, value in {"alpha": alpha, "epsilon": epsilon, "inner_lr": inner_lr, "steps": steps}.items():
            if not value >= 0:
                raise ValueError(f"expected {name} >= 0, got {value}")
        check_positive(delta_steps=delta_steps)
        if not temperature > 0:
            raise ValueError(f"expected temperature > 0, got {temperature}")
        self.safety, self.masks, self.alpha, self.epsilon = safety, masks, alpha, epsilon
        self.temperature, self.weight, self.layerwise, self.inner_lr = temperature, weight, layerwise, inner_lr
        self.mask_lr, self.delta_lr, self.steps = mask_lr, delta_lr, steps
        self.search, self.delta_steps = search, delta_steps
        self.adapt_steps, self.adapt_lr, self.eval_mask = adapt_steps, adapt_lr, eval_mask
        self.batch_size, self.input_range, self.seed = batch_size, input_range, seed

    def fit(
        self,
        pretrained: nn.Module,
        finetuned: Sequence[Checkpoint],
        batches: Sequence[Inputs] = (),
        *,
        heads: nn.Module | Sequence[nn.Module] | None = None,
        forward: Forward | None = None,
        buffers: Buffers = "pretrained",
    ) -> MergeResult:
        """Learn the masks and merge.

        Args:
            pretrained: the common starting point; it is not changed. Its frozen parameters are not merged.
            finetuned: at least two checkpoints of it, modules or state dicts.
            batches: unlabelled inputs of every task: a tensor `[N, ...]`, a data set or a loader each. Labels that
                come with them are ignored.
            heads: what turns the network's outputs into logits, one module per task or one for all; `None` takes the
                outputs as they are.
            forward: instead of heads, `(model_fn, x, task) -> logits`.
            buffers: where BatchNorm's statistics come from when they differ.

        Raises:
            ValueError: if checkpoints do not match, there are fewer than two, or inputs are missing or not finite.
            FloatingPointError: if a loss is no longer finite.
        """
        tasks = TaskVectors(pretrained, finetuned, heads=heads, forward=forward, buffers=buffers)
        stream = Stream(batches, len(tasks), self.batch_size, self.seed, tasks.base.device)
        start = initial_weights(tasks, self.weight, self.layerwise)
        training = _MaskTraining(self, tasks, start)
        history = [training.step(stream.draw(), step) for step in range(self.steps)]
        _warn_of_collapse(history)
        mask = training.final_mask()
        weights, adapted = adapt_weights(tasks, stream, start, mask, lr=self.adapt_lr, steps=self.adapt_steps)
        return MergeResult(
            tasks.merged(weights, mask),
            weights,
            {name: value.clone() for name, value in tasks.unflatten(mask).items()},
            tuple(delta.detach().clone() for delta in training.deltas),
            (*history, *adapted),
        )


class ConcreteMerging(DefenseAwareMerging):
    """Concrete subspace merging: the task-shared mask alone, without a search for backdoors.

    Args:
        **settings: those of `DefenseAwareMerging`, except `safety`, `masks`, `alpha` and those of the search: `epsilon`,
            `search`, `delta_steps` and `delta_lr`.

    Reference:
        A. Tang et al., "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion", 2023,
        https://arxiv.org/abs/2312.06173.
    """

    def __init__(self, **settings: object) -> None:
        fixed = {"safety", "masks", "alpha", "epsilon", "search", "delta_steps", "delta_lr"} & set(settings)
        if fixed:
            raise TypeError(f"ConcreteMerging takes no {', '.join(sorted(fixed))}")
        super().__init__(masks="single", alpha=0.0, **settings)  # type: ignore[arg-type]


class _MaskTraining:
    """The state of mask training: logits, perturbations, their optimizers, and one step on them."""

    def __init__(self, method: DefenseAwareMerging, tasks: TaskVectors, weights: Tensor) -> None:
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
            kept = [
                [part / part.mean().clamp_min(1e-12) for part in (phi > 0).to(phi).split(self.tasks.sizes)]
                for phi in self.phis
            ]
            return _product([torch.cat(parts) for parts in kept])


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


def _warn_of_collapse(history: Sequence[dict[str, float]]) -> None:
    last = [row["top_share"] for row in history[-20:]]
    if last and sum(last) / len(last) > 0.9:
        warnings.warn(
            f"{sum(last) / len(last):.0%} of a task's predictions are of one class: least entropy has collapsed; "
            "lower alpha, mask_lr or the number of steps",
            stacklevel=3,
        )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"expected {name} to be {' or '.join(map(repr, known))}, got {value!r}")
