"""Copies of one classifier, told apart by a small network beside each; see `attack_tracing`."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.data import Examples
from torchfolio.engine import seeded
from torchfolio.measure import outputs
from torchfolio.robustness.tracing_noise import KeyedNoise, Noise, RandomNoise

__all__ = ["TracedCopy", "Tracer", "separate"]

NOISES: dict[str, type[Noise]] = {"keyed": KeyedNoise, "random": RandomNoise}


class Tracer(nn.Module):
    """The small network beside a classifier, $T = \\tanh(f)$.

    Args:
        body: network $f$ from inputs to `[N, K]`.
        bounded: whether the tanh is put behind it.
    """

    def __init__(self, body: nn.Module, bounded: bool = True) -> None:
        super().__init__()
        self.body, self.bounded = body, bounded

    def forward(self, x: Tensor) -> Tensor:
        raw = self.body(x)
        return raw.tanh() if self.bounded else raw

    @classmethod
    def small(cls, shape: Sequence[int], num_classes: int) -> Tracer:
        """Two convolutions of stride 2 and a linear layer for images `[C, H, W]`, else one hidden layer of 64.

        Args:
            shape: shape of one input.
            num_classes: number of classes $K$.
        """
        if len(shape) != 3:
            hidden = nn.Linear(math.prod(shape), 64)
            return cls(nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(64, num_classes)))
        sides = [((side - 1) // 2 - 1) // 2 for side in shape[1:]]
        if min(sides) < 1:
            raise ValueError(f"expected images of 7 pixels a side or more for the usual tracer, got {tuple(shape)}")
        convs = nn.Conv2d(shape[0], 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU()
        return cls(nn.Sequential(*convs, nn.Flatten(), nn.Linear(16 * math.prod(sides), num_classes)))


class TracedCopy(nn.Module):
    """One buyer's copy, $C(x) + \\alpha T(x)$.

    The classifier stays in evaluation mode whatever mode the copy is in.

    Args:
        classifier: network $C$ from inputs to logits `[N, K]`.
        tracer: network $T$ from inputs to `[N, K]`.
        alpha: weight $\\alpha \\ge 0$ of the tracer.
    """

    def __init__(self, classifier: nn.Module, tracer: nn.Module, alpha: float = 4.0) -> None:
        super().__init__()
        self.classifier, self.tracer = classifier, tracer
        self.alpha = float(checks.at_least("alpha", alpha, 0))
        self.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.classifier(x)
        return logits + self.alpha * self.tracer(x) if self.alpha else logits

    def train(self, mode: bool = True) -> TracedCopy:
        super().train(mode)
        self.classifier.eval()
        return self

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


def separate(
    classifier: nn.Module,
    data: Any,
    *,
    n_copies: int | None = None,
    keys: Sequence[int] | None = None,
    tracer: Callable[[int], nn.Module] | None = None,
    bounded: bool = True,
    noise: Literal["keyed", "random"] | None = "keyed",
    alpha: float | Literal["auto"] = 4.0,
    sigma: float = 0.1,
    share: float = 0.5,
    temperature: float = 3.0,
    noise_weight: float = 1.0,
    quiet_weight: float = 1.0,
    labels: Literal["data", "model"] = "data",
    steps: int = 600,
    batch_size: int = 64,
    lr: float = 1e-3,
    clip: tuple[float, float] | None = (0.0, 1.0),
    vectorize: bool | None = None,
    seed: int = 0,
) -> list[TracedCopy]:
    """Make a copy of a classifier for each key, by training a tracer for each.

    Every tracer minimises, by Adam, with the noisy inputs $x'$ of its key and their patterns $c$,

    $$\\mathrm{CE}(C(x) + \\alpha T(x), y) + \\lambda_n\\, \\mathrm{CE}(\\tau T(x'), c) + \\lambda_0\\, \\overline{T(x)^2}$$

    (`tracing_noise.KeyedNoise`). The classifier is asked once for each batch, whatever the number of copies. It is left
    as it is; the copies share its weights and hold it in evaluation mode.

    Args:
        classifier: network from inputs to logits `[N, K]`.
        data: examples (x, y), whatever `torchfolio.data.Examples` takes; without labels for `labels="model"`.
        n_copies: number of copies, with the keys 0, 1, …; for secret ones give `keys`.
        keys: whole numbers, all different, one for each copy: they fix its first weights and its noise.
        tracer: function from a seed to a tracer's network; `Tracer.small` by default.
        bounded: whether a tanh is put behind it.
        noise: noise that tracers are made sensitive to: `"keyed"` patterns, `"random"` signs (the plain reading of the
            abstract, which separates far worse), or `None` for nothing.
        alpha: weight of the tracer; `"auto"` takes half the median margin between the classifier's two largest logits.
        sigma: size of the noise.
        share: part $a \\in [0, 1]$ of the pattern in keyed noise.
        temperature: factor $\\tau$ of the tracer's outputs as logits of the patterns.
        noise_weight: weight $\\lambda_n$ of the sensitivity to noise.
        quiet_weight: weight $\\lambda_0$ of silence on ordinary inputs.
        labels: data's, or those that the classifier gives.
        steps: steps of Adam.
        batch_size: examples of a step.
        lr: rate of Adam.
        clip: range of valid inputs; `None` where there is none.
        vectorize: whether all tracers train in one pass (`vmap`), which gives the same copies; by default where that
            is faster: on an accelerator, or for tracers without convolutions.
        seed: seed of the order of the examples, the same for all copies.

    Returns:
        A copy for each key.

    Raises:
        ValueError: on fewer than two keys or equal ones, inputs outside `clip`, outputs that are no logits `[N, K]`, or
            settings out of range.
    """
    keys = _keys(keys, n_copies)
    for name, value in {"noise_weight": noise_weight, "quiet_weight": quiet_weight}.items():
        checks.at_least(name, value, 0)
    for name, value in {"sigma": sigma, "temperature": temperature, "lr": lr}.items():
        checks.positive(name, value)
    checks.between("share", share, 0, 1)
    checks.one_of("noise", noise, (*NOISES, None))
    checks.one_of("labels", labels, ("data", "model"))
    checks.whole("steps", steps, 1)
    batches = _Batches(classifier, data, labels, checks.whole("batch_size", batch_size, 1), clip, seed)
    shell = _shell(classifier)
    weight = batches.weight() if alpha == "auto" else float(checks.at_least("alpha", alpha, 0))
    tracers = [_tracer(tracer, key, bounded, batches) for key in keys]
    shape, classes = batches.shape, batches.num_classes
    makers = [
        NOISES[noise](_derived(key, "noise"), shape, classes, sigma, share, temperature, clip) if noise else None
        for key in keys
    ]
    loss = _Loss(weight, noise_weight, quiet_weight)
    if vectorize is None:
        plain = not any(isinstance(m, nn.modules.conv._ConvNd) for m in tracers[0].modules())
        vectorize = plain or batches.device.type != "cpu"
    train = _train_together if vectorize and _alike(tracers) else _train_each
    train(tracers, makers, loss, batches, steps, lr)
    return [TracedCopy(shell, t.eval(), weight).eval() for t in tracers]


@dataclass(frozen=True)
class _Loss:
    """The loss of a tracer on a batch, from its outputs on the inputs and on the noisy inputs."""

    alpha: float
    noise_weight: float
    quiet_weight: float

    def __call__(
        self, out: Tensor, noisy: Tensor | None, logits: Tensor, y: Tensor, noise: Noise | None, pattern: Tensor | None
    ) -> Tensor:
        loss = F.cross_entropy(logits + self.alpha * out, y)
        if noise is not None:
            assert noisy is not None
            assert pattern is not None
            loss = loss + self.noise_weight * noise.loss(out, noisy, pattern)
            loss = loss + self.quiet_weight * out.square().mean()
        return loss


class _Batches:
    """Batches of inputs, the classifier's logits on them, and labels; the classifier is asked once for each batch."""

    def __init__(
        self, classifier: nn.Module, data: Any, labels: str, size: int, clip: tuple[float, float] | None, seed: int
    ) -> None:
        self.examples = Examples(data)
        if labels == "data" and not self.examples.supervised:
            raise ValueError('expected examples (x, y); for inputs alone, pass labels="model"')
        self.classifier, self.labels, self.size, self.clip, self.seed = classifier, labels, size, clip, seed
        first = next((p for p in classifier.parameters() if p.is_floating_point()), None)
        x = self.examples.first(2)[0]
        if not x.is_floating_point():
            raise TypeError(f"expected inputs in floating point, got {x.dtype}")
        self.device, self.dtype = (x.device, x.dtype) if first is None else (first.device, first.dtype)
        self.shape = tuple(x.shape[1:])
        self.num_classes = _logits(classifier, x).shape[1]
        self.known: Tensor | None = None  # the classifier's logits on all examples, where these are in memory
        if self.examples.tensors is not None:
            self.checked(self.examples.tensors[0])
            self.known = _logits(classifier, self.examples.tensors[0])

    def checked(self, x: Tensor) -> Tensor:
        checks.finite("inputs", x)
        if self.clip is not None and not (float(x.min()) >= self.clip[0] and float(x.max()) <= self.clip[1]):
            raise ValueError(
                f"expected inputs from {self.clip[0]:g} to {self.clip[1]:g}, got {float(x.min()):g} to {float(x.max()):g}; "
                "pass their range as clip, or None"
            )
        return x

    def __call__(self, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        done = 0
        while done < steps:
            for x, logits, y in self._epoch(generator):
                yield x.to(self.device, self.dtype), logits.to(self.device), y.to(self.device)
                done += 1
                if done == steps:
                    return

    def _epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.known is None:
            for row in self.examples.batches(self.size):
                logits = _logits(self.classifier, self.checked(row[0]))
                yield row[0], logits, self._targets(row, logits)
            return
        assert self.examples.tensors is not None
        for rows in torch.randperm(len(self.examples), generator=generator).split(self.size):
            row = tuple(t[rows.to(t.device)] for t in self.examples.tensors)
            yield row[0], self.known[rows], self._targets(row, self.known[rows])

    def _targets(self, row: Sequence[Tensor], logits: Tensor) -> Tensor:
        return logits.argmax(1) if self.labels == "model" else checks.labels(row[-1], self.num_classes)

    def weight(self) -> float:
        """Half the median margin between the classifier's two largest logits."""
        logits = self.known
        if logits is None:
            logits = torch.cat([_logits(self.classifier, row[0]) for row in self.examples.batches(self.size)])
        top = logits.topk(2, 1).values
        return float((top[:, 0] - top[:, 1]).median()) / 2


def _train_each(
    tracers: Sequence[nn.Module], makers: Sequence[Noise | None], loss: _Loss, batches: _Batches, steps: int, lr: float
) -> None:
    """Tracer by tracer within every batch, whose logits they share."""
    optimizers = [torch.optim.Adam(t.parameters(), lr) for t in tracers]
    for x, logits, y in batches(steps):
        for tracer, noise, optimizer in zip(tracers, makers, optimizers, strict=True):
            inputs, pattern = (x, None) if noise is None else noise(x)
            both = tracer(inputs if noise is None else torch.cat([x, inputs]))
            value = loss(both[: len(x)], both[len(x) :], logits, y, noise, pattern)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()


def _train_together(
    tracers: Sequence[nn.Module], makers: Sequence[Noise | None], loss: _Loss, batches: _Batches, steps: int, lr: float
) -> None:
    """All tracers in one pass over stacked weights: every number meets the same operations as by `_train_each`."""
    values, rest = stack_module_state(list(tracers))
    base = copy.deepcopy(tracers[0]).to("meta")
    run = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), randomness="different")
    optimizer = torch.optim.Adam(values.values(), lr)
    for x, logits, y in batches(steps):
        drawn = [(x, None) if noise is None else noise(x) for noise in makers]
        inputs = torch.stack([n if p is None else torch.cat([x, n]) for n, p in drawn])
        both = run(values, rest, inputs)
        total = sum(
            loss(out[: len(x)], out[len(x) :], logits, y, noise, pattern)
            for out, noise, (_, pattern) in zip(both, makers, drawn, strict=True)
        )
        optimizer.zero_grad()
        assert isinstance(total, Tensor)
        total.backward()
        optimizer.step()
    with torch.no_grad():
        for k, tracer in enumerate(tracers):
            for name, p in tracer.named_parameters():
                p.copy_(values[name][k])


def _alike(tracers: Sequence[nn.Module]) -> bool:
    """Whether tracers can be stacked: one architecture, without statistics that a pass changes."""
    kinds = [[type(m) for m in t.modules()] for t in tracers]
    shapes = [{name: p.shape for name, p in t.state_dict().items()} for t in tracers]
    counts = any(isinstance(m, nn.modules.batchnorm._NormBase) for m in tracers[0].modules())
    return not counts and all(k == kinds[0] for k in kinds) and all(s == shapes[0] for s in shapes)


def _keys(keys: Sequence[int] | None, n_copies: int | None) -> list[int]:
    if (keys is None) == (n_copies is None):
        raise ValueError("expected exactly one of n_copies and keys")
    numbers = (
        list(range(checks.whole("n_copies", n_copies))) if keys is None else [checks.whole("key", k) for k in keys]
    )
    if len(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise ValueError(f"expected two keys or more, all different, got {numbers}")
    return numbers


def _derived(key: int, use: str) -> int:
    """A seed for one use of a key: weights and noise from one seed would be correlated."""
    return int.from_bytes(hashlib.sha256(f"{use} {key}".encode()).digest()[:7], "big")


def _tracer(make: Callable[[int], nn.Module] | None, key: int, bounded: bool, batches: _Batches) -> Tracer:
    seed = _derived(key, "weights")
    with seeded(seed):
        body = Tracer.small(batches.shape, batches.num_classes).body if make is None else make(seed)
    tracer = Tracer(body, bounded).to(batches.device, batches.dtype).train()
    shape = _logits(tracer, batches.examples.first(2)[0]).shape
    if shape[1] != batches.num_classes:
        raise ValueError(f"expected a tracer with {batches.num_classes} outputs, as the classifier, got {shape[1]}")
    return tracer


def _shell(classifier: nn.Module) -> nn.Module:
    """The classifier in evaluation mode as a module of its own on the same weights, so that the user's keeps its mode."""
    shared = {id(t): t for t in (*classifier.parameters(), *classifier.buffers())}
    return copy.deepcopy(classifier, shared).eval()  # pyright: ignore[reportArgumentType]


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits = outputs(model, (x,))
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"expected logits [N, K] of two classes or more, got shape {tuple(logits.shape)}")
    return logits
