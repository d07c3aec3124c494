r"""AdjointDPM: what gradients through a diffusion sampler are for.

With `DiffusionODE` any differentiable loss on samples has a gradient at a memory that does not grow with the steps, and
three things follow: a condition that is optimised until samples look as wanted, weights that are finetuned by a loss on
samples, and noise near a given one whose sample fools a classifier.

Reference:
    Pan, Liew, Tan, Feng, Yan, "AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of Diffusion
    Probabilistic Models", ICLR 2024, arXiv 2307.10711, sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import positive, whole
from torchfolio.dynamics.diffusion_ode import ClassifierFreeGuidance, ClassifierGuidance, DiffusionODE, Solution
from torchfolio.shown import Shown

__all__ = [
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "DiffusionODE",
    "NoiseAttack",
    "Solution",
    "adversarial_noise",
    "finetune",
    "optimize_condition",
    "style_loss",
]

Metric = Callable[[Tensor], Tensor]


def optimize_condition(
    ode: DiffusionODE,
    metric: Metric,
    cond: Tensor,
    noise: Tensor,
    *,
    iterations: int = 40,
    lr: float = 0.05,
    batch_size: int | None = None,
    seed: int = 0,
    **solve: Any,
) -> tuple[Tensor, list[float]]:
    """Change a condition by Adam until the samples drawn with it are what a metric asks for.

    Args:
        ode: sampler whose model takes a condition; its weights stay.
        metric: loss of samples `(x) -> [B]` or a scalar, to be minimised.
        cond: condition to begin with: of one example `[…]`, which all noise shares, or of several `[K, …]`, which are
            optimised side by side with the same noise (samples are in order, all noise of the first one first).
        noise: pool of starting noise `[N, …]`.
        iterations: number of iterations of Adam.
        lr: learning rate of Adam; 0.01 to 0.05 in the paper.
        batch_size: starting noises of an iteration, drawn from the pool anew; all by default.
        seed: seed of those draws.
        **solve: arguments of `DiffusionODE.solve`.

    Returns:
        The condition, and the mean loss before each iteration.
    """
    several = cond.dim() > 1
    c = (cond if several else cond[None]).detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([c], lr=positive("lr", lr))
    generator, losses = torch.Generator().manual_seed(seed), []
    count = len(noise) if batch_size is None else whole("batch_size", batch_size, 1, len(noise))
    for _ in range(whole("iterations", iterations, 1)):
        chosen = torch.randperm(len(noise), generator=generator)[:count].to(noise.device)
        start = noise[chosen].repeat(len(c), *[1] * (noise.dim() - 1))
        # Weights are not asked for, which saves their part of every product.
        x = ode.sample(start, cond=c.repeat_interleave(count, 0), params=(), **solve)
        # A sum over conditions, so that each is optimised as if alone.
        loss = metric(x).mean()
        optimizer.zero_grad()
        (len(c) * loss).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return (c if several else c[0]).detach(), losses


def finetune(
    ode: DiffusionODE,
    metric: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    cond: Tensor | None = None,
    params: Sequence[nn.Parameter] | None = None,
    iterations: int = 40,
    lr: float = 1e-3,
    batch_size: int = 32,
    clip_norm: float = 1.0,
    seed: int = 0,
    **solve: Any,
) -> list[float]:
    """Change weights of the model in place by Adam on a loss of its samples.

    Args:
        ode: sampler.
        metric: `(samples, anchors) -> [B]` or a scalar, to be minimised; anchors are what the unchanged model draws
            from the same noise.
        noise: pool of starting noise `[N, …]`.
        cond: condition of each of the pool `[N, …]`, if there is one.
        params: weights to change; all of the model that require gradients by default.
        iterations: number of iterations of Adam.
        lr: learning rate of Adam.
        batch_size: starting noises of an iteration, drawn from the pool.
        clip_norm: largest norm of all gradients together.
        seed: seed of those draws.
        **solve: arguments of `DiffusionODE.solve`.

    Returns:
        The mean loss before each iteration.

    Raises:
        ValueError: if no weight is to be changed.
    """
    weights = ode._params(params)
    if not weights:
        raise ValueError("expected parameters that require gradients, got none")
    with torch.no_grad():
        anchors = ode.sample(noise, cond=cond, **solve)
    optimizer = torch.optim.Adam(weights, lr=positive("lr", lr))
    generator, losses = torch.Generator().manual_seed(seed), []
    count = min(whole("batch_size", batch_size, 1), len(noise))
    for _ in range(whole("iterations", iterations, 1)):
        chosen = torch.randperm(len(noise), generator=generator)[:count].to(noise.device)
        told = None if cond is None else cond[chosen]
        loss = metric(ode.sample(noise[chosen], cond=told, params=weights, **solve), anchors[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, clip_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@dataclass(frozen=True, repr=False)
class NoiseAttack(Shown):
    """What `adversarial_noise` gives.

    Attributes:
        noise: changed noise `[B, …]`.
        x: its samples `[B, …]`.
        correct: whether the sample of the given noise was classified as its label `[B]`.
        success: whether it was and that of the changed noise is not `[B]`.
    """

    noise: Tensor
    x: Tensor
    correct: Tensor
    success: Tensor


def adversarial_noise(
    ode: DiffusionODE,
    classifier: Callable[[Tensor], Tensor],
    noise: Tensor,
    y: Tensor,
    *,
    tau: float = 0.1,
    lr: float = 0.01,
    iterations: int = 30,
    cond: Tensor | None = None,
    **solve: Any,
) -> NoiseAttack:
    r"""Search noise near a given one whose samples a classifier gets wrong: an audit of classifier and sampler.

    $x_T \leftarrow \mathrm{clamp}(x_T + \eta\, g / \lVert g \rVert_2,\ x_T^0 \pm \tau)$ with the gradient g of the
    cross-entropy, normalised for each example. Success is judged on samples drawn anew from the final noise.

    Args:
        ode: sampler; its weights stay.
        classifier: samples to logits `[B, K]`, in evaluation mode.
        noise: start `[B, …]`.
        y: labels that the samples are meant to have `[B]`.
        tau: largest change of a number of the noise.
        lr: norm of a step.
        iterations: number of iterations of ascent.
        cond: condition `[B, …]`, if the model takes one.
        **solve: arguments of `DiffusionODE.solve`.
    """
    positive("tau", tau)
    positive("lr", lr)
    with torch.no_grad():
        correct = classifier(ode.sample(noise, cond=cond, **solve)).argmax(-1) == y
    moved = noise.detach().clone()
    for _ in range(whole("iterations", iterations, 1)):
        leaf = moved.requires_grad_()
        logits = classifier(ode.sample(leaf, cond=cond, params=(), **solve))
        (g,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), leaf)
        norms = g.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, *[1] * (g.dim() - 1))
        moved = torch.clamp(leaf.detach() + lr * g / norms, noise - tau, noise + tau)
    with torch.no_grad():
        x = ode.sample(moved, cond=cond, **solve)
        success = correct & (classifier(x).argmax(-1) != y)
    return NoiseAttack(moved, x, correct, success)


def style_loss(
    features: Callable[[Tensor], Sequence[Tensor]],
    style: Tensor,
    *,
    content_weight: float = 1.0,
    style_weight: float = 100.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The loss of stylisation, for `finetune`.

    $w_c \lVert \phi(x) - \phi(x_\text{anchor}) \rVert^2 + w_s \sum_l \lVert G_l(x) - G_l(\text{style}) \rVert^2$, both
    means over entries; $G_l$ are Gram matrices of features over places, $\phi$ are the last features.

    Args:
        features: images to feature maps `[B, C_l, H_l, W_l]`, one or more.
        style: image or images of the style `[S, …]`, whose Gram matrices are averaged.
        content_weight: $w_c$.
        style_weight: $w_s$.

    Returns:
        `(x, anchors) -> [B]`.
    """
    with torch.no_grad():
        targets = [_gram(f).mean(0) for f in features(style)]

    def loss(x: Tensor, anchors: Tensor) -> Tensor:
        maps = features(x)
        with torch.no_grad():
            content = features(anchors)[-1]
        apart = (maps[-1] - content).square().flatten(1).mean(1)
        styles = [(_gram(f) - target).square().flatten(1).mean(1) for f, target in zip(maps, targets, strict=True)]
        return content_weight * apart + style_weight * torch.stack(styles).sum(0)

    return loss


def _gram(f: Tensor) -> Tensor:
    flat = f.flatten(2)
    return flat @ flat.mT / flat.shape[-1]
