"""Randomised smoothing (Cohen, Rosenfeld, Kolter, ICML 2019)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.measure import untouched
from torchfolio.robustness.certifier_base import Certificate, Certifier, classes_of

__all__ = ["SmoothingCertifier", "clopper_pearson"]


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
        checks.network(self.model)
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
            classes = classes_of(logits)
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
