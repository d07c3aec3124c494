"""SmoothInv: the trigger of a backdoored network, drawn from a single image.

A network averaged over Gaussian noise,

$$g(x) = \\frac1N \\sum_{n=1}^{N} \\operatorname{softmax} f(x + \\sigma \\eta_n), \\qquad \\eta_n \\sim \\mathcal N(0, I)
\\text{, drawn anew in every step,}$$

is robust, and the gradient of a robust network draws what it looks for. From one image $x$ and for a class $t$, a
perturbation $\\delta$ descends $\\ell = -\\log g(x + \\delta)_t$, without a mask and without a penalty, in steps of

$$v \\leftarrow \\mu v + \\frac{\\nabla \\ell}{\\lVert \\nabla \\ell \\rVert_2}, \\quad \\delta \\leftarrow \\delta - \\gamma_k v, \\quad
\\delta \\leftarrow \\operatorname{clip}_{[0, 1]}(x + \\delta) - x, \\quad
\\delta \\leftarrow \\delta \\min(1, \\varepsilon / \\lVert \\delta \\rVert_2).$$

The class whose $\\delta$ sends *other* images there too is the target of the attack. That comparison of classes, the
choice of $\\sigma$ and stopping early are ours. $\\log g$ is computed from logarithms, so that it has a gradient however
sure the network is of another class; where the authors' code does not underflow the two are equal.

Longer than most because an inversion, the comparison of classes and a scan go through one loop over images, targets and draws.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.backdoor.additive_trigger import AdditiveTrigger
from torchfolio.backdoor.inversion import fast_copy, share_interval, unit, varied
from torchfolio.backdoor.metrics import labels_of
from torchfolio.backdoor.model_detector import InvertedTrigger, ModelDetector, ModelVerdict, Scan, TriggerInverter
from torchfolio.backdoor.smoothed_classifier import Denoiser, SmoothedClassifier
from torchfolio.backdoor.suspects import device_of
from torchfolio.backdoor.target_profile import OUTLIER, SHARE, SmoothVerdict, TargetProfile, flagged, outlier, shown

__all__ = ["SmoothInv", "SmoothInvTrigger", "SmoothVerdict", "SmoothedClassifier", "TargetProfile", "flagged"]

SURE = 0.999


@dataclass(frozen=True, repr=False)
class SmoothInvTrigger(InvertedTrigger):
    """A trigger that `SmoothInv` drew.

    Attributes:
        target: class that it leads to.
        sigma: noise that it was drawn with.
        confidence: $g(x + \\delta)_t$ over the other deviations of the noise, or its own where there is one alone.
        history: $g(x + \\delta)_t$ before every step `[steps]`; NaN after an early stop.
    """

    target: int
    sigma: float
    confidence: float
    history: Tensor

    @property
    def trigger(self) -> AdditiveTrigger:
        """As a trigger, for poisoning and for the metrics of attacks."""
        return AdditiveTrigger(self.delta, quantize=False)


class SmoothInv(TriggerInverter, ModelDetector):
    """Draws triggers from single images, and finds the class that a backdoor leads to.

    Images are in [0, 1]; put the normalisation into the network.

    Args:
        sigma: deviations of the noise, one or several; among them the one whose perturbation the other deviations' smoothed
            networks are surest of is chosen, which takes no label.
        eps: largest L2 norm $\\varepsilon$ of a perturbation; by default
            $\\max(1, 5 \\sqrt{CHW / (3 \\cdot 224^2)})$, 1 for images of 32 x 32 and 5 for those of 224 x 224.
            A network that was trained under noise takes about twice as much before its trigger shows.
        steps: number of steps.
        lr: length $\\gamma$ of the first ones, $\\varepsilon / 20$ by default; halved after every 300.
        momentum: $\\mu$ in [0, 1).
        n: number $N$ of draws of noise.
        denoiser: function (noisy images, sigma) to images, before the network; see `SmoothedClassifier`.
        chunk: noisy images that go through the network at once, at least `n`.
        patience: steps in a row with $g_t > 0.999$ after which a perturbation is done; `None` never stops early.
        pool: other images that a perturbation is tried on, in a scan.
        images: images of different predicted classes that a scan draws from. A class gets perturbations from images
            that are not predicted as it.
        seed: seed of the noise, in `invert` and `identify_target`.

    Raises:
        ValueError: on a value out of range.

    Reference:
        Sun and Kolter, "Single Image Backdoor Inversion via Robust Smoothed Classifiers", CVPR 2023, Algorithm 1.
    """

    pixels = True

    def __init__(
        self,
        sigma: float | Sequence[float] = (0.12, 0.25, 0.5),
        eps: float | None = None,
        steps: int = 400,
        lr: float | None = None,
        momentum: float = 0.9,
        n: int = 40,
        *,
        denoiser: Denoiser | None = None,
        chunk: int = 400,
        patience: int | None = 50,
        pool: int = 32,
        images: int = 2,
        seed: int = 0,
    ) -> None:
        self.sigma = tuple(sigma) if isinstance(sigma, Sequence) else (sigma,)
        if not self.sigma:
            raise ValueError("expected at least one sigma, got none")
        for value in self.sigma:
            checks.at_least("sigma", value, 0)
        self.eps = None if eps is None else checks.positive("eps", eps)
        self.lr = None if lr is None else checks.positive("lr", lr)
        self.momentum = checks.between("momentum", momentum, 0, 1, inclusive=(True, False))
        self.steps, self.n, self.chunk = (
            checks.whole(k, v, 1) for k, v in (("steps", steps), ("n", n), ("chunk", chunk))
        )
        self.patience = None if patience is None else checks.whole("patience", patience, 1)
        self.pool, self.images = checks.whole("pool", pool, 1), checks.whole("images", images, 1)
        self.denoiser, self.seed = denoiser, checks.whole("seed", seed)

    # From one image

    def invert(self, model: nn.Module, x: Tensor, target: int) -> SmoothInvTrigger:
        """The trigger that leads to a class, drawn from one image; of several, the one that the others follow best.

        Args:
            model: network from images in [0, 1] to logits; it is left as it is.
            x: image `[C, H, W]`, or images `[B, C, H, W]`.
            target: class $t$.

        Raises:
            ValueError: if x is outside [0, 1] or holds NaN, or there is no such class.

        Warns:
            UserWarning: if the images are predicted as the target before; of several, those that are not are used.
        """
        x = _images(x)
        net = fast_copy(model)
        x = x.to(device_of(net, x))
        own = labels_of(net, x) == checks.whole("target", target)
        if bool(own.all()):
            warnings.warn(f"{len(x)} of {len(x)} images are predicted as {target} before", stacklevel=2)
        elif bool(own.any()):
            x = x[~own.to(x.device)]
        inversions = self._inversions(net, x, [target], torch.Generator(x.device).manual_seed(self.seed))
        best = 0
        if len(x) > 1:
            sure = torch.stack([net((x + d).clamp(0, 1)).softmax(1)[:, target].mean() for d in inversions.delta[:, 0]])
            best = int(sure.argmax())
        return SmoothInvTrigger(
            inversions.delta[best, 0], None, _success(inversions.delta[best, 0], target), target, inversions.sigma[best][0],
            float(inversions.confidence[best, 0]), inversions.history[best, 0],
        )  # fmt: skip

    def identify_target(
        self, model: nn.Module, x: Tensor, pool: Tensor | None = None, targets: Sequence[int] | None = None
    ) -> TargetProfile:
        """How far perturbations towards every class carry over, and the class that stands out.

        Args:
            model: network from images in [0, 1] to logits; it is left as it is.
            x: image `[C, H, W]`, or images `[B, C, H, W]`, that perturbations are drawn from.
            pool: other images, without labels, `[U, C, H, W]`; by default shifted, mirrored and noisy copies of x.
            targets: classes to try; all by default.

        Raises:
            ValueError: if images are outside [0, 1] or hold NaN, or a class is out of range.
        """
        x = _images(x)
        net = fast_copy(model)
        x = x.to(device_of(net, x))
        generator = torch.Generator(x.device).manual_seed(self.seed)
        others = varied(x, self.pool, generator) if pool is None else _images(pool).to(x)
        classes = range(net(x[:1]).shape[1]) if targets is None else targets
        return self._profile(net, x, others, list(classes), Scan(self.seed, progress=False), generator)

    def _profile(
        self, net: nn.Module, x: Tensor, pool: Tensor, targets: list[int], scan: Scan, generator: torch.Generator
    ) -> TargetProfile:
        classes = net(x[:1]).shape[1]
        own, before = labels_of(net, x), labels_of(net, pool)
        hits, trials = torch.zeros(classes, dtype=torch.long), torch.zeros(classes, dtype=torch.long)
        deltas = x.new_zeros(classes, *x.shape[1:])
        group = max(1, self.chunk // (self.n * len(x)))
        parts = [targets[k : k + group] for k in range(0, len(targets), group)]
        for part in scan.items(parts, "classes"):
            inversions = self._inversions(net, x, part, generator)
            for k, t in enumerate(part):
                # An image predicted as t says nothing of it, unless there is no other.
                use = [b for b in range(len(x)) if int(own[b]) != t] or list(range(len(x)))
                deltas[t] = inversions.delta[use[0], k]
                for b in use:
                    labels = labels_of(net, (pool + inversions.delta[b, k]).clamp(0, 1))
                    hits[t] += int(((labels == t) & (before != t)).sum())
                    trials[t] += int((before != t).sum())
        scores = hits.double() / trials.clamp_min(1)
        deviations = outlier(scores, trials > 0)
        best = int(torch.where(trials > 0, scores, -1).argmax())
        found_target = best if flagged(scores, deviations, best) else None
        return TargetProfile(scores, hits, trials, deviations, found_target, deltas)

    # All images, targets and draws at once

    def _inversions(self, net: nn.Module, x: Tensor, targets: Sequence[int], generator: torch.Generator) -> _Inversions:
        """Perturbations from every image towards every target, each with the deviation that is chosen for it."""
        classes = net(x[:1]).shape[1]
        for t in targets:
            checks.whole("target", t, 0, classes - 1)
        each = [self._synthesize(net, x, targets, s, generator) for s in self.sigma]
        sure = torch.stack([self._agreement(net, x, targets, k, delta, generator) for k, (delta, _) in enumerate(each)])
        chosen = sure.argmax(0)
        pick = torch.arange(len(x), device=x.device)[:, None], torch.arange(len(targets), device=x.device)
        return _Inversions(
            torch.stack([delta for delta, _ in each])[(chosen, *pick)],
            torch.stack([history for _, history in each])[(chosen, *pick)],
            sure.amax(0),
            [[self.sigma[int(k)] for k in row] for row in chosen],
        )

    def _agreement(
        self, net: nn.Module, x: Tensor, targets: Sequence[int], k: int, delta: Tensor, generator: torch.Generator
    ) -> Tensor:
        """How sure the other deviations' smoothed networks are of each target, `[B, T]`."""
        others = [s for j, s in enumerate(self.sigma) if j != k] or [self.sigma[k]]
        at = torch.as_tensor(list(targets), device=x.device).repeat(len(x))
        total = 0
        with torch.no_grad():
            for s in others:
                smooth = SmoothedClassifier(net, s, self.n, self.denoiser, self.chunk, generator)
                total = total + smooth((x[:, None] + delta).flatten(0, 1)).gather(1, at[:, None])[:, 0]
        return (total / len(others)).view(len(x), len(targets))  # pyright: ignore[reportAttributeAccessIssue]

    def _synthesize(
        self, net: nn.Module, x: Tensor, targets: Sequence[int], sigma: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """$\\delta$ `[B, T, ...]` and the history of $g_t$ `[B, T, steps]` at one deviation."""
        n = self.n if sigma > 0 else 1
        smooth = SmoothedClassifier(net, sigma, n, self.denoiser)
        images = torch.arange(len(x), device=x.device).repeat_interleave(len(targets))
        at = torch.as_tensor(list(targets), device=x.device).repeat(len(x))
        eps = budget(x.shape[1:]) if self.eps is None else self.eps
        first = eps / 20 if self.lr is None else self.lr
        delta = x.new_zeros(len(at), *x.shape[1:])
        velocity = torch.zeros_like(delta)
        history = torch.full((len(at), self.steps), math.nan, device=x.device)
        streak = torch.zeros(len(at), device=x.device)
        active = torch.arange(len(at), device=x.device)
        for k in range(self.steps):
            # Targets share their noise: fewer draws, and a fairer comparison of them.
            noise = torch.randn(len(x), n, *x.shape[1:], device=x.device, dtype=x.dtype, generator=generator)
            for rows in active.split(max(1, self.chunk // n)):
                start = x[images[rows]]
                gradient, sure = _gradient(smooth, start + delta[rows], noise[images[rows]], at[rows])
                velocity[rows] = self.momentum * velocity[rows] + unit(gradient)
                moved = delta[rows] - first * 0.5 ** (k // 300) * velocity[rows]
                # Box first: shrinking towards 0 stays in it.
                delta[rows] = _within((start + moved).clamp(0, 1) - start, eps)
                history[rows, k] = sure.to(history.dtype)
                streak[rows] = torch.where(sure > SURE, streak[rows] + 1, 0)
            if self.patience is not None:
                active = active[streak[active] < self.patience]
                if not len(active):
                    break
        shape = (len(x), len(targets))
        return delta.unflatten(0, shape), history.unflatten(0, shape).cpu()

    # A verdict on a network

    def _scan(self, model: nn.Module, clean: tuple[Tensor, Tensor] | None, scan: Scan) -> ModelVerdict:
        assert clean is not None
        x = checks.images(clean[0], name="the clean examples", unit=True)
        net = fast_copy(model)
        place = device_of(net, x)
        labels = labels_of(net, x)
        order = torch.randperm(len(x), generator=scan.generator())
        chosen = _of_different_classes(labels, order, self.images)
        rest = [k for k in order.tolist() if k not in chosen][: self.pool]
        if not rest:
            raise ValueError(f"expected at least {len(chosen) + 1} clean images, got {len(x)}")
        generator = scan.generator(place)
        source, pool = x[chosen].to(place), x[rest].to(place)
        classes = list(range(net(source[:1]).shape[1]))
        profile = self._profile(net, source, pool, classes, scan, generator)
        return self._verdict(profile, x[chosen[0]])

    def _verdict(self, profile: TargetProfile, image: Tensor) -> SmoothVerdict:
        shares = torch.where(profile.trials > 0, profile.scores, -1)
        best, second = (int(k) for k in shares.topk(2).indices)
        # Several perturbations on one image are no independent trials.
        share, n = float(profile.scores[best]), int(profile.trials[best]) // max(1, self.images)
        low, high = share_interval(round(share * n), n)
        backdoored = profile.target is not None
        evidence: dict[str, Any] = {
            "class": best, "share": share, "low": low, "high": high, "others": n,
            "second": second, "runner_up": float(profile.scores[second]), "median": float(profile.scores.median()),
            "outlier": float(profile.outlier[best]), "eps": budget(image.shape) if self.eps is None else self.eps,
            "images": self.images, "profile": profile, "image": image,
        }  # fmt: skip
        pairs = tuple((k, best) for k in range(len(shares)) if k != best) if backdoored else ()
        trigger = AdditiveTrigger(profile.deltas[best].cpu(), quantize=False) if backdoored else None
        # A share below a half is no finding however far it stands out.
        score = evidence["outlier"] if evidence["share"] >= SHARE else min(evidence["outlier"], OUTLIER)
        return SmoothVerdict(backdoored, score, OUTLIER, pairs, trigger, evidence)

    def pictures(self, verdict: ModelVerdict, classes: Sequence[str]) -> list[tuple[Any, str]]:
        """The profile of the classes, and the perturbation of the one that leads."""
        return shown(verdict, classes)


@dataclass(frozen=True)
class _Inversions:
    delta: Tensor  # [B, T, ...]
    history: Tensor  # [B, T, steps]
    confidence: Tensor  # [B, T]
    sigma: list[list[float]]


def budget(shape: Sequence[int]) -> float:
    """Default $\\varepsilon$ for images `[C, H, W]`."""
    return max(1.0, 5 * math.sqrt(math.prod(shape) / (3 * 224**2)))


def _gradient(smooth: SmoothedClassifier, x: Tensor, noise: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of $-\\log g_t$ in the images, and $g_t$."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logs = smooth.log_probabilities(x, noise).gather(1, at[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(-logs.sum(), x)
    return gradient, logs.detach().exp()


def _within(delta: Tensor, eps: float) -> Tensor:
    norm = delta.flatten(1).norm(dim=1)
    return delta * (eps / norm.clamp_min(eps)).view(-1, *[1] * (delta.dim() - 1))


def _images(x: Tensor) -> Tensor:
    return checks.images(x[None] if isinstance(x, Tensor) and x.dim() == 3 else x, unit=True)


def _of_different_classes(labels: Tensor, order: Tensor, count: int) -> list[int]:
    """The first images in an order of so many different predicted classes, or of as many as there are."""
    chosen: dict[int, int] = {}
    for k in order.tolist():
        if len(chosen) == count:
            break
        chosen.setdefault(int(labels[k]), k)
    return list(chosen.values())


def _success(delta: Tensor, target: int) -> Callable[[nn.Module, Tensor], float]:
    def asr(model: nn.Module, x: Tensor) -> float:
        labels = labels_of(model, (x + delta.to(x)).clamp(0, 1))
        return float((labels == target).double().mean())

    return asr
