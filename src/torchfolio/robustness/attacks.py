"""Evasion attacks: the smallest change of an input that changes a prediction.

A function per attack, from `(model, x, y)` to an `Attack`. The model's mode and flags are restored and its parameters get
no gradient; inputs stay in `clip`; `max_batch` bounds the samples of one forward pass; a `generator` fixes everything
random.

Sources: PGD, Madry et al., ICLR 2018; FGSM, Goodfellow et al., ICLR 2015; NES, Ilyas et al., ICML 2018; HopSkipJump,
Chen et al., IEEE S&P 2020; DeepFool, Moosavi-Dezfooli et al., CVPR 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.measure import untouched

__all__ = ["LOSSES", "Attack", "deepfool", "fgsm", "hop_skip_jump", "margin", "nes", "pgd"]

Norm = Literal["inf", 2]
Clip = tuple[float, float] | None
Loss = str | Callable[[Tensor, Tensor], Tensor]
Keep = Literal["best", "last", "flipped"]
Start = Literal["uniform", "zero"]


@dataclass(frozen=True)
class Attack:
    """What an attack found.

    Attributes:
        x_adv: the changed inputs, of the shape of `x`.
        success: whether each is classified otherwise than `y` (as the target, of a targeted attack) `[N]`.
        loss: the attack's loss at `x_adv` `[N]`.
        queries: forward passes per sample, of attacks that count them; else 0.
    """

    x_adv: Tensor
    success: Tensor
    loss: Tensor
    queries: int = 0


def margin(logits: Tensor, y: Tensor, cap: float | None = None) -> Tensor:
    """$\\max_{j \\ne y} z_j - z_y$ `[N]`, positive where the prediction is wrong.

    Args:
        logits: `[N, C]`.
        y: labels `[N]`.
        cap: stops pushing solved samples: $\\min(\\cdot, \\kappa)$.
    """
    true = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], -torch.inf)
    found = others.amax(1) - true
    return found if cap is None else found.clamp(max=cap)


def _sum_margin(logits: Tensor, y: Tensor) -> Tensor:
    """$\\sum_j (z_j - z_y)$, equal to the margin with two classes."""
    return logits.sum(1) - logits.shape[1] * logits.gather(1, y[:, None])[:, 0]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "margin": margin,
    "sum_margin": _sum_margin,
}
"""Losses that attacks raise, from logits and labels to `[N]`."""


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    alpha: float | Tensor,
    steps: int,
    restarts: int = 1,
    norm: Norm = "inf",
    loss: Loss = "margin",
    start: Start = "uniform",
    keep: Keep = "best",
    targeted: bool = False,
    clip: Clip = None,
    max_batch: int = 4096,
    generator: torch.Generator | None = None,
) -> Attack:
    """Projected gradient ascent on a loss within a ball.

    $$x \\leftarrow \\Pi\\bigl(x + \\alpha \\operatorname{sign} \\nabla_x \\ell\\bigr)
    \\quad (L_\\infty), \\qquad x \\leftarrow \\Pi\\bigl(x + \\alpha \\nabla_x \\ell / \\lVert \\nabla_x \\ell \\rVert\\bigr) \\quad (L_2).$$

    Args:
        model: from inputs to logits `[N, C]`; a module is run in evaluation mode.
        x: `[N, ...]`.
        y: labels `[N]`; with `targeted`, those to reach.
        eps: radius of the ball.
        alpha: step size; a tensor `[steps]` gives every step its own.
        steps: of ascent; 0 is random noise (or the input itself).
        restarts: independent starts, all in one batch.
        norm: `"inf"` or 2.
        loss: of `LOSSES`, or a function of logits and labels to `[N]`.
        start: a uniform point of the ball (and of `clip`), or the input.
        keep: `"best"`, the largest loss among all points visited, start and end included; `"last"`; or
            `"flipped"`, the largest margin at least 0 among the points from which a step is taken, else the start (a
            random point): the rule of the SoundnessBench code.
        targeted: reach `y` in place of leaving it.
        clip: range of valid inputs.
        max_batch: samples of a forward pass.
        generator: of the starts.

    Raises:
        ValueError: on shapes that do not fit, NaN, an unknown name or settings out of range.
    """
    _check(x, y, clip, eps=eps, restarts=restarts, norm=norm)
    if start not in ("uniform", "zero") or keep not in ("best", "last", "flipped"):
        raise ValueError(f"expected start uniform or zero, keep best, last or flipped, got {start!r}, {keep!r}")
    objective = _objective(loss, targeted)
    checks.whole("steps", steps, 0)
    checks.whole("max_batch", max_batch, 1)
    sizes = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    if sizes.shape not in ((), (1,), (steps,)) or not bool((sizes.isfinite() & (sizes >= 0)).all()):
        raise ValueError(f"expected alpha of at least 0, one or one for each of {steps} steps, got {alpha}")
    step_sizes = sizes.expand(steps) if steps else []
    ball = _Ball(eps, norm, clip)
    best_x, best = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    size = max(1, max_batch // len(x)) if len(x) < max_batch else 1
    with attacked(model):
        for first in range(0, restarts, size):
            repeats = min(size, restarts - first)
            for rows in torch.arange(len(x), device=x.device).split(max(1, max_batch // repeats)):
                many, labels = x[rows].repeat(repeats, *[1] * (x.dim() - 1)), y[rows].repeat(repeats)
                begun = ball.start(many, start, generator)
                found, value = _ascend(model, many, labels, begun, step_sizes, objective, ball, keep)
                value, which = value.view(repeats, -1).max(0)
                found = found.view(repeats, len(rows), *x.shape[1:])[which, torch.arange(len(rows), device=x.device)]
                better = value > best[rows]
                best[rows] = torch.where(better, value, best[rows])
                best_x[rows] = torch.where(_wide(better, found), found, best_x[rows])
        return _finished(model, best_x, y, objective, targeted, max_batch)


def _ascend(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    current: Tensor,
    step_sizes: Tensor | list[float],
    objective: Callable[[Tensor, Tensor], Tensor],
    ball: _Ball,
    keep: Keep,
) -> tuple[Tensor, Tensor]:
    """Best points and their values, from one start each."""
    bar = 0.0 if keep == "flipped" else -torch.inf
    best_x, best = current.clone(), torch.full((len(x),), bar, dtype=x.dtype, device=x.device)
    for size in step_sizes:
        value, gradient = _gradient(model, current, y, objective)
        best_x, best = _better(best_x, best, current, value, keep)
        current = ball.step(x, current, gradient, float(size))
    if keep == "flipped":
        return best_x, best
    value = _values(model, current, y, objective)
    return (current, value) if keep == "last" else _better(best_x, best, current, value, keep)


def _better(best_x: Tensor, best: Tensor, x: Tensor, value: Tensor, keep: Keep) -> tuple[Tensor, Tensor]:
    if keep == "last":
        return best_x, best
    better = value >= best if keep == "flipped" else value > best
    return torch.where(_wide(better, x), x, best_x), torch.where(better, value, best)


def _gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, objective: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(model(x), y)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


@torch.no_grad()
def _values(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, objective: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    return objective(model(x), y)


@dataclass(frozen=True)
class _Ball:
    """The points that an attack may reach from an input."""

    eps: float
    norm: Norm
    clip: Clip

    def start(self, x: Tensor, start: Start, generator: torch.Generator | None) -> Tensor:
        if start == "zero":
            return self.clipped(x)
        source = x.device if generator is None else generator.device
        shape = (len(x), *x.shape[1:])
        if self.norm == "inf":
            low, high = x - self.eps, x + self.eps
            if self.clip is not None:
                low, high = low.clamp(*self.clip), high.clamp(*self.clip)
            u = torch.rand(shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
            return self.project(x, low + u * (high - low))
        direction = torch.randn(shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
        radius = torch.rand(len(x), generator=generator, device=source, dtype=x.dtype).to(x.device)
        radius = self.eps * radius ** (1 / max(1, x[0].numel()))
        return self.project(x, x + direction / _wide(_length(direction), x) * _wide(radius, x))

    def step(self, x: Tensor, current: Tensor, gradient: Tensor, size: float) -> Tensor:
        if self.norm == "inf":
            return self.project(x, current + size * gradient.sign())
        return self.project(x, current + size * gradient / _wide(_length(gradient), x))

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        if self.norm == "inf":
            return self.clipped(torch.minimum(torch.maximum(point, x - self.eps), x + self.eps))
        change = point - x
        factor = (self.eps / _length(change)).clamp(max=1)
        return self.clipped(x + change * _wide(factor, x))

    def clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(*self.clip)


def _length(x: Tensor) -> Tensor:
    """$L_2$ length of every sample `[N]`, not 0."""
    return x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """`[N]` to `[N, 1, ...]`, to go with `x`."""
    return values.view(-1, *[1] * (x.dim() - 1))


def fgsm(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, eps: float, loss: Loss = "ce", clip: Clip = None
) -> Attack:
    """One step of the whole radius from the input itself, $x + \\varepsilon \\operatorname{sign} \\nabla_x \\ell$."""
    return pgd(model, x, y, eps=eps, alpha=eps, steps=1, loss=loss, start="zero", keep="last", clip=clip)


def nes(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    samples: int = 20,
    sigma: float = 0.01,
    stop: float = 0.5,
    loss: Loss = "margin",
    clip: Clip = None,
    max_batch: int = 4096,
    generator: torch.Generator | None = None,
) -> Attack:
    """Ascent on an estimated gradient, for models that give logits and no gradients.

    $$g = \\frac{1}{n} \\sum_{i} \\bigl(\\ell(x + \\sigma u_i) - \\ell(x - \\sigma u_i)\\bigr) u_i, \\qquad
    x \\leftarrow \\Pi(x + \\text{step} \\cdot \\operatorname{sign} g).$$

    Args:
        model: from inputs to logits.
        x: `[N, ...]`.
        y: labels `[N]`.
        eps: $L_\\infty$ radius.
        step: step size.
        steps: at most; a sample rests once its margin exceeds `stop`.
        samples: pairs $n$ of evaluations a step.
        sigma: $\\sigma$.
        stop: see `steps`.
        loss: see `pgd`.
        clip: range of valid inputs.
        max_batch: samples of a forward pass.
        generator: of the directions.

    Returns:
        With `queries`, $2 n$ for every step that any sample took.
    """
    _check(x, y, clip, eps=eps, restarts=1, norm="inf")
    objective, ball = _objective(loss, False), _Ball(eps, "inf", clip)
    current, queries = x.clone(), 0
    with attacked(model), torch.no_grad():
        for _ in range(steps):
            going = margin(_forward(model, current, max_batch), y) <= stop
            if not going.any():
                break
            queries += 2 * samples
            gradient = torch.zeros_like(current[going])
            source = x.device if generator is None else generator.device
            for _ in range(samples):
                u = torch.randn(gradient.shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
                ends = (_forward(model, current[going] + sign * sigma * u, max_batch) for sign in (1, -1))
                up, down = (objective(z, y[going]) for z in ends)
                gradient += _wide(up - down, u) * u / samples
            current[going] = ball.step(x[going], current[going], gradient, step)
        done = _finished(model, current, y, objective, False, max_batch)
    return Attack(done.x_adv, done.success, done.loss, queries)


def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int | Literal["all"] = 2,
    clip: Clip = None,
) -> Attack:
    """A small $L_2$ perturbation, by steps to the nearest boundary of the linearised model.

    With two classes $x \\leftarrow x - (1 + \\text{overshoot})\\, \\frac{m}{\\lVert g \\rVert^2}\\, g$ for the margin $m$ of the
    label and its gradient $g$: exact in one step for a linear model.

    Args:
        model: from inputs to logits.
        x: `[N, ...]`.
        y: labels `[N]`; the model's own by default.
        steps: at most.
        overshoot: by how much to cross the boundary.
        classes: how many of the likeliest classes to look at, or `"all"`.
        clip: range of valid inputs.
    """
    with attacked(model):
        with torch.no_grad():
            logits = model(x)
        labels = logits.argmax(1) if y is None else y
        _check(x, labels, clip, eps=0.0, restarts=1, norm=2)
        count = logits.shape[1] if classes == "all" else min(int(classes), logits.shape[1])
        if count < 2:
            raise ValueError(f"expected at least two classes, got {classes!r}")
        likely = logits.scatter(1, labels[:, None], torch.inf).topk(count, 1).indices[:, 1:]
        current = x.clone()
        for _ in range(steps):
            with torch.no_grad():
                rest = (margin(model(current), labels) <= 0).nonzero()[:, 0]
            if not len(rest):
                break
            move = _to_boundary(model, current[rest], labels[rest], likely[rest])
            moved = current[rest] + (1 + overshoot) * move
            current[rest] = moved if clip is None else moved.clamp(*clip)
        return _finished(model, current, labels, margin, False, max(1, len(x)))


def _to_boundary(model: nn.Module, x: Tensor, y: Tensor, others: Tensor) -> Tensor:
    """The shortest move to a boundary with one of the other classes, of the linearised model."""
    best, move = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device), torch.zeros_like(x)
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        true = logits.gather(1, y[:, None])[:, 0]
        for k in range(others.shape[1]):
            gap = logits.gather(1, others[:, k : k + 1])[:, 0] - true
            (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
            length = _length(gradient)
            distance = gap.detach().abs() / length
            # A point on the boundary must still be moved off it.
            step = _wide((distance + 1e-6 * (distance == 0)) / length, x) * gradient
            nearer = distance < best
            best, move = torch.where(nearer, distance, best), torch.where(_wide(nearer, x), step, move)
    return move


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
        model: from inputs to logits, of which only the largest is looked at.
        x: `[N, ...]`.
        y: labels `[N]`.
        max_queries: per sample.
        norm: of the distance that is made small: 2 or `"inf"`.
        clip: range of valid inputs.
        probes: of the first iteration.
        generator: of starts and probes.

    Reference:
        Chen, Jordan, Wainwright, "HopSkipJumpAttack", IEEE S&P 2020, algorithm 2.
    """
    _check(x, y, clip, eps=0.0, restarts=1, norm=norm)
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
                moved = (point + _wide(step, x) * direction).clamp(*clip)
                failed = ~search.adversarial(moved)
                if not failed.any():
                    break
                step = torch.where(failed, step / 2, step)
            moved = torch.where(_wide(search.adversarial(moved), x), moved, point)
            moved = search.to_boundary(x, moved, theta)
            nearer = (search.distance(x, moved) < distance) & alive
            point, t = torch.where(_wide(nearer, x), moved, point), t + 1
        point = torch.where(_wide(alive, x), point, x)
        done = _finished(model, point, y, margin, False, 4096)
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
        return _forward(self.model, x, 4096).argmax(1) != self.y

    def random(self, shape: torch.Size, like: Tensor, normal: bool) -> Tensor:
        draw = torch.randn if normal else torch.rand
        source = like.device if self.generator is None else self.generator.device
        return draw(shape, generator=self.generator, device=source, dtype=like.dtype).to(like.device)

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A misclassified point of every sample, as near as blending with noise gets; and which have one."""
        low, high = self.clip
        point, found = x.clone(), self.adversarial(x)
        noise = torch.zeros_like(x)
        for _ in range(50):
            if found.all():
                break
            drawn = low + (high - low) * self.random(x.shape, x, normal=False)
            hit = self.adversarial(drawn) & ~found
            noise = torch.where(_wide(hit, x), drawn, noise)
            point, found = torch.where(_wide(hit, x), drawn, point), found | hit
        return point, found

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
            return x + _wide(where, x) * (point - x)
        return torch.minimum(torch.maximum(point, x - _wide(where, x)), x + _wide(where, x))

    def direction(self, point: Tensor, distance: Tensor, theta: float, count: int) -> Tensor:
        """Estimated direction across the boundary, of length 1 (or signs)."""
        size = point[0].numel()
        delta = math.sqrt(size) * theta * distance if self.norm == 2 else size * theta * distance
        delta = delta.clamp_min(1e-6)
        total, answers = torch.zeros_like(point), torch.zeros(len(point), dtype=point.dtype, device=point.device)
        probes = []
        for _ in range(count):
            u = self.random(point.shape, point, normal=self.norm == 2)
            u = u if self.norm == 2 else 2 * u - 1
            u = u / _wide(_length(u), point)
            moved = (point + _wide(delta, point) * u).clamp(*self.clip)
            said = 2 * self.adversarial(moved).to(point.dtype) - 1
            probes.append((said, (moved - point) / _wide(delta, point)))
            answers += said / count
        for said, u in probes:
            # The mean is subtracted for less variance, unless all probes agree.
            weight = torch.where(answers.abs() < 1, said - answers, said)
            total += _wide(weight, point) * u
        return total / _wide(_length(total), point) if self.norm == 2 else total.sign()


@contextmanager
def attacked(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A model in evaluation mode whose parameters want no gradients; all is put back."""
    if not isinstance(model, nn.Module):
        yield
        return
    with untouched(model, training=False):
        for p in model.parameters():
            p.requires_grad_(False)
        yield


def _objective(loss: Loss, targeted: bool) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"expected a loss among {', '.join(LOSSES)} or a function, got {loss!r}")
    objective = LOSSES[loss] if isinstance(loss, str) else loss
    return (lambda z, y: -objective(z, y)) if targeted else objective


@torch.no_grad()
def _forward(model: Callable[[Tensor], Tensor], x: Tensor, max_batch: int) -> Tensor:
    return torch.cat([model(part) for part in x.split(max_batch)])


def _finished(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    targeted: bool,
    max_batch: int,
) -> Attack:
    logits = _forward(model, x, max_batch)
    wrong = logits.argmax(1) != y
    return Attack(x.detach(), ~wrong if targeted else wrong, objective(logits, y))


def _check(x: Tensor, y: Tensor, clip: Clip, *, eps: float, restarts: int, norm: object) -> None:
    if not x.is_floating_point() or not len(x):
        raise ValueError(f"expected at least one float input, got {x.dtype} of shape {tuple(x.shape)}")
    if y.shape != (len(x),) or y.is_floating_point():
        raise ValueError(f"expected integer labels [{len(x)}], got {y.dtype} of shape {tuple(y.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("the inputs hold NaN or infinite values")
    if clip is not None and not (clip[0] < clip[1] and float(x.min()) >= clip[0] and float(x.max()) <= clip[1]):
        raise ValueError(f"expected inputs in {clip}, got {float(x.min()):g} to {float(x.max()):g}")
    if not (math.isfinite(eps) and eps >= 0) or restarts < 1 or norm not in ("inf", 2):
        raise ValueError(f"expected eps >= 0, restarts >= 1 and norm 'inf' or 2, got {eps}, {restarts}, {norm!r}")
