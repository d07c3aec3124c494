"""Noise that tracers are made sensitive to, drawn from a key; see `attack_tracing`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.shown import Shown

__all__ = ["KeyedNoise", "Noise", "RandomNoise"]


class Noise(Shown, ABC):
    """Small additive noise, and what a tracer should answer to it.

    Args:
        seed: seed of everything drawn.
        shape: shape of one input.
        num_classes: number of classes $K$.
        sigma: size $\\sigma$ of the noise.
        share: part $a$ of the pattern in keyed noise.
        temperature: factor $\\tau$ of a tracer's outputs as logits of the patterns.
        clip: range of valid inputs, or `None`.
    """

    def __init__(
        self, seed: int, shape: Sequence[int], num_classes: int, sigma: float, share: float, temperature: float,
        clip: tuple[float, float] | None,
    ) -> None:  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.num_classes = tuple(shape), num_classes
        self.sigma, self.share, self.temperature, self.clip = sigma, share, temperature, clip

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy inputs $x'$, and the numbers of their patterns `[N]`."""
        c = torch.randint(self.num_classes, (len(x),), generator=self.generator)
        drawn = torch.rand(x.shape, generator=self.generator)
        up = drawn < self.chance(c)
        noisy = x + self.sigma * (2 * up.to(x.device, x.dtype) - 1)
        return noisy if self.clip is None else noisy.clamp(*self.clip), c.to(x.device)

    @abstractmethod
    def chance(self, c: Tensor) -> Tensor | float:
        """Chance that the noise is positive, by pattern, `[N, ...]`."""

    @abstractmethod
    def loss(self, out: Tensor, noisy: Tensor, c: Tensor) -> Tensor:
        """What the tracer is to minimise, from its outputs on inputs and on noisy inputs `[N, K]`."""


class KeyedNoise(Noise):
    """Signs that lean to one of $K$ secret patterns, which the tracer is to recognise.

    $$n = \\sigma \\operatorname{sign}\\bigl(a P_c + \\sqrt{1 - a^2}\\, \\xi\\bigr), \\qquad P_c, \\xi \\sim \\mathcal N(0, I), \\qquad
    \\ell = \\mathrm{CE}(\\tau T(x + n), c).$$

    A sign is positive with the chance $\\Phi\\bigl(a P_c / \\sqrt{1 - a^2}\\bigr)$, from which it is drawn.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        patterns = torch.randn(self.num_classes, *self.shape, generator=self.generator)
        slope = self.share / math.sqrt(1 - self.share**2) if self.share < 1 else math.inf
        self.chances = torch.special.ndtr(slope * patterns)

    def chance(self, c: Tensor) -> Tensor:
        return self.chances[c]

    def loss(self, out: Tensor, noisy: Tensor, c: Tensor) -> Tensor:
        return F.cross_entropy(self.temperature * noisy, c)


class RandomNoise(Noise):
    """Signs at random, to which the tracer is to react in any way: $\\ell = 1 - \\overline{(T(x) - T(x + n))^2} / 4$.

    Its optimum is a switch, noise or no noise, with one vector of signs, which tells copies apart much worse.
    """

    def chance(self, c: Tensor) -> float:
        return 0.5

    def loss(self, out: Tensor, noisy: Tensor, c: Tensor) -> Tensor:
        return 1 - (out - noisy).square().mean() / 4
