"""Certifiers: for which inputs a prediction provably holds on a whole ball, and a classifier that abstains elsewhere.

- `IntervalCertifier`, `CrownCertifier`: $L_\\infty$ balls, by bounds on the margins (`margins`);
- `SmoothingCertifier`: $L_2$ balls, for the majority vote of a network under Gaussian noise (Cohen et al., ICML 2019).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.data import Examples
from torchfolio.measure import outputs, untouched
from torchfolio.models.device import device_of
from torchfolio.robustness.bound_verifiers import exact_copy
from torchfolio.robustness.layer_list import Layers
from torchfolio.robustness.margins import crown_margins, interval_margins
from torchfolio.robustness.properties import Box

__all__ = [
    "AbstainingClassifier",
    "BoundCertifier",
    "Certificate",
    "Certifier",
    "CrownCertifier",
    "Decision",
    "IntervalCertifier",
    "SmoothingCertifier",
    "clopper_pearson",
]

Margins = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Certificate:
    """What a certifier says of inputs.

    Attributes:
        prediction: class of each `[B]`.
        certified: whether it holds on the whole ball `[B]`.
        value: figure that decided it `[B]`: the least margin's lower bound, or the radius up to which it holds.
    """

    prediction: Tensor
    certified: Tensor
    value: Tensor

    @property
    def abstain_rate(self) -> float:
        """Share of the inputs that are not certified, whatever their prediction."""
        return float((~self.certified).double().mean())

    def certified_accuracy(self, y: Tensor) -> float:
        """Share of the inputs that are certified and right."""
        return float((self.certified & (self.prediction == y.to(self.prediction.device))).double().mean())

    def accuracy(self, y: Tensor) -> float:
        """Share of the predictions that are right, certified or not."""
        return float((self.prediction == y.to(self.prediction.device)).double().mean())


class Certifier(ABC):
    """What all certifiers share: `certify` takes inputs in batches; subclasses say in `_certify` what of one batch."""

    name = ""
    batch_size = 512

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a network (nn.Module), got {type(model).__name__}")
        self.model = model

    def certify(self, x: Tensor) -> Certificate:
        """Predictions on inputs `[B, ...]`, and which of them are certified; the network is left as it is.

        Raises:
            ValueError: on no input, NaN, or a network that does not give logits `[B, K]`.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not len(x):
            raise ValueError("expected inputs [B, ...] in floating point, at least one")
        checks.finite("inputs", x)
        certify = self._prepared()
        parts = [certify(part, k * self.batch_size) for k, part in enumerate(x.split(self.batch_size))]
        return Certificate(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Certificate)})

    __call__ = certify

    @abstractmethod
    def _prepared(self) -> Callable[[Tensor, int], Certificate]:
        """The network as it is now, from a batch and the number of its first input to certificates."""


class BoundCertifier(Certifier):
    """A certifier by lower bounds on the margins of the prediction over $L_\\infty$ balls.

    Args:
        model: (nested) `nn.Sequential` of layers in `bounds.KNOWN`; taken in evaluation mode.
        eps: radius $\\varepsilon \\ge 0$.
        clip: range of valid inputs, to which balls are cut; `None` where there is none.
        dtype: precision of the bounds; they are lowered by what rounding may add up to.

    Raises:
        ValueError: on a radius that is negative or no number.
        TypeError: in `certify`, naming a layer without bounds.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        clip: tuple[float, float] | None = (0.0, 1.0),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(model)
        self.eps = float(checks.at_least("eps", eps, 0))
        self.clip, self.dtype = clip, dtype
        self.rounding = 1e-12 if dtype == torch.float64 else 1e-5

    @abstractmethod
    def margins(self, layers: Layers, box: Box, labels: Tensor) -> Tensor:
        """Lower bounds on $z_y - z_j$, `[B, K]`, 0 at the label."""

    def bounds(self) -> Margins:
        """Margins over balls as a function of their centres `[B, ...]` and labels `[B]`, differentiable in the centres."""
        exact, device = exact_copy(self.model, self.dtype), device_of(self.model)

        def of(x: Tensor, labels: Tensor) -> Tensor:
            x, labels = x.to(device, self.dtype), labels.to(device)
            return self.margins(Layers(exact, x.shape[1:]), self.ball(x), labels)

        return of

    def ball(self, x: Tensor) -> Box:
        """The balls around inputs.

        Raises:
            ValueError: if an input lies outside `clip`.
        """
        # Inputs in the range in their own precision are in it in this one.
        low, high = (float(v) for v in x.detach().aminmax())
        if self.clip is not None and not (low >= self.clip[0] and high <= self.clip[1]):
            raise ValueError(
                f"expected inputs from {self.clip[0]:g} to {self.clip[1]:g}, got {low:g} to {high:g}; "
                "pass their range as clip, or None"
            )
        return Box.ball(x, self.eps, self.clip)

    def _prepared(self) -> Callable[[Tensor, int], Certificate]:
        exact, bounds = exact_copy(self.model, self.dtype), self.bounds()

        @torch.no_grad()
        def certify(x: Tensor, first: int) -> Certificate:
            prediction = _classes(exact(x.to(device_of(exact), self.dtype)))
            margins = bounds(x, prediction)
            value = margins.scatter(1, prediction[:, None], torch.inf).amin(1)
            # NaN is not above 0, and a bound of infinity is an overflow.
            return Certificate(prediction, (value > 0) & value.isfinite(), value)

        return certify


class IntervalCertifier(BoundCertifier):
    """Certifies by interval bounds, the last layer merged with the margins."""

    name = "interval"

    def margins(self, layers: Layers, box: Box, labels: Tensor) -> Tensor:
        return interval_margins(layers, box, labels, rounding=self.rounding)


class CrownCertifier(BoundCertifier):
    """Certifies by CROWN's linear bounds: what intervals certify and more, at a higher cost.

    Args:
        model: (nested) `nn.Sequential` of layers in `bounds.KNOWN`; taken in evaluation mode.
        eps: radius $\\varepsilon \\ge 0$.
        clip: range of valid inputs, to which balls are cut; `None` where there is none.
        dtype: precision of the bounds.
        intermediate: way in which the inputs of activations are bounded: `"crown"`, or `"ibp"` (CROWN-IBP), which is
            cheaper.
    """

    name = "crown"
    batch_size = 128

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        clip: tuple[float, float] | None = (0.0, 1.0),
        dtype: torch.dtype = torch.float64,
        intermediate: str = "crown",
    ) -> None:
        super().__init__(model, eps, clip=clip, dtype=dtype)
        self.intermediate = checks.one_of("intermediate", intermediate, ("crown", "ibp"))

    def margins(self, layers: Layers, box: Box, labels: Tensor) -> Tensor:
        return crown_margins(layers, box, labels, intermediate=self.intermediate, rounding=self.rounding)


class SmoothingCertifier(Certifier):
    """Certifies the majority vote of a network under Gaussian noise on $L_2$ balls.

    A class is guessed from $n_0$ noisy copies of the input; of $n$ fresh ones $k$ vote for it. With the lower confidence
    bound $\\underline p$ of `clopper_pearson` the vote holds within $R = \\sigma \\Phi^{-1}(\\underline p)$; for
    $\\underline p \\le 1/2$ there is no certificate. A certificate is wrong with probability $\\alpha$ at most.

    Args:
        model: network, any module from inputs to logits, taken in evaluation mode.
        sigma: deviation $\\sigma$ of the noise.
        radius: radius that is asked for.
        n0: number of samples for the guess.
        n: number of samples for the count.
        alpha: probability $\\alpha$ of a wrong certificate.
        max_batch: noisy inputs of one forward pass.
        seed: seed of the noise; an input's noise depends on it and on the input's place.

    Raises:
        ValueError: on settings out of range, or if no input could be certified even by unanimous votes.

    Reference:
        Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019, algorithm 2.
    """

    name = "smoothing"

    def __init__(
        self,
        model: nn.Module,
        sigma: float,
        radius: float,
        *,
        n0: int = 100,
        n: int = 1000,
        alpha: float = 0.001,
        max_batch: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        self.sigma, self.radius = checks.positive("sigma", sigma), checks.at_least("radius", radius, 0)
        self.n0, self.n = checks.whole("n0", n0, 1), checks.whole("n", n, 1)
        self.alpha = checks.between("alpha", alpha, 0, 1, inclusive=False)
        self.max_batch, self.seed = checks.whole("max_batch", max_batch, 1), seed
        best = self._radius(torch.tensor([n]))
        if not float(best) >= radius:
            raise ValueError(
                f"expected n large enough for a radius of {radius:g}: {n} unanimous votes certify {float(best):.3g}, "
                "so that every input would be refused"
            )

    def _radius(self, votes: Tensor) -> Tensor:
        """Certified radius of counts, minus infinity where there is none."""
        p = clopper_pearson(votes, self.n, self.alpha)
        return torch.where(p > 0.5, self.sigma * torch.special.ndtri(p), -torch.inf)

    def _prepared(self) -> Callable[[Tensor, int], Certificate]:
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)

        @torch.no_grad()
        def certify(x: Tensor, first: int) -> Certificate:
            x = x if weight is None else x.to(weight.device, weight.dtype)
            with untouched(self.model, training=False):
                generator = torch.Generator(x.device).manual_seed(hash((self.seed, first)) % 2**63)
                guess = self._votes(x, self.n0, generator).argmax(1)
                votes = self._votes(x, self.n, generator).gather(1, guess[:, None])[:, 0]
            radius = self._radius(votes.cpu()).to(x.device)
            return Certificate(guess, radius >= self.radius, radius)

        return certify

    def _votes(self, x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """How often each class is predicted under noise `[B, K]`."""
        counts = None
        for flat in torch.arange(len(x) * samples, device=x.device).split(self.max_batch):
            rows = flat // samples
            noise = torch.randn((len(rows), *x.shape[1:]), generator=generator, device=x.device, dtype=x.dtype)
            # In place: the noise is most of the memory that passes by.
            logits = self.model(noise.mul_(self.sigma).add_(x[rows]))
            classes = _classes(logits)
            counts = (
                torch.zeros(len(x), logits.shape[1], dtype=torch.long, device=x.device) if counts is None else counts
            )
            counts.index_put_((rows, classes), torch.ones_like(rows), accumulate=True)
        assert counts is not None
        return counts


def clopper_pearson(k: Tensor, n: int, alpha: float) -> Tensor:
    """Lower confidence bound of a probability after k successes of n, at level $1 - \\alpha$, in float64.

    The $\\alpha$-quantile of $\\mathrm{Beta}(k, n - k + 1)$; $\\alpha^{1/n}$ for $k = n$ and 0 for $k = 0$.
    """
    from scipy.stats import beta

    count = k.double().numpy()
    with_some = count > 0
    p = beta.ppf(alpha, count.clip(1), n - count + 1)
    return torch.from_numpy(p * with_some)


def _classes(logits: Any) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected logits [B, K] of two classes or more, got {shape}")
    return logits.argmax(1)


@dataclass(frozen=True)
class Decision:
    """Answers of a system with a fallback.

    Attributes:
        labels: answer to each input `[B]`, -1 where the system abstained and there is no fallback.
        abstained: mask of the inputs for which the certifier gave no certificate, and the fallback was asked `[B]`.
    """

    labels: Tensor
    abstained: Tensor


class AbstainingClassifier:
    """A classifier that answers where its prediction is certified, and asks a fallback elsewhere.

    Args:
        certifier: certifier of its network.
        fallback: function that is asked otherwise, from inputs `[B, ...]` to labels `[B]` or logits `[B, K]`: a slower
            network, a queue for people; `None` leaves those inputs unanswered.
    """

    def __init__(self, certifier: Certifier, fallback: Callable[[Tensor], Tensor] | None = None) -> None:
        self.certifier, self.fallback = certifier, fallback

    def __call__(self, x: Tensor) -> Decision:
        """Answers to inputs `[B, ...]`; the fallback sees only those it is asked about."""
        certificate = self.certifier.certify(x)
        labels, abstained = certificate.prediction.clone(), ~certificate.certified
        labels[abstained] = -1
        if self.fallback is not None and bool(abstained.any()):
            answers = self._asked(x[abstained.to(x.device)])
            labels[abstained] = answers.to(labels)
        return Decision(labels, abstained)

    def _asked(self, x: Tensor) -> Tensor:
        answers = outputs(self.fallback, (x,)) if isinstance(self.fallback, nn.Module) else self.fallback(x)  # pyright: ignore[reportOptionalCall]
        answers = answers.argmax(1) if answers.dim() == 2 else answers
        if answers.shape != (len(x),):
            raise ValueError(
                f"expected a label from the fallback for each of {len(x)} inputs, got {tuple(answers.shape)}"
            )
        return answers

    def load(self, data: Any) -> float:
        """Share of the examples that the fallback would be asked about."""
        asked, count = 0, 0
        for row in Examples(data).batches(self.certifier.batch_size):
            asked += int((~self.certifier.certify(row[0]).certified).sum())
            count += len(row[0])
        return asked / count
