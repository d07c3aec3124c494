"""Functions as means of waves, which universal random features draw their frequencies from.

Reference:
    Sehanobish et al., Scalable Neural Network Kernels, ICLR 2024, arXiv 2310.13225. The tapered Fourier series of
    `FourierMeasure.from_function` is ours.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from torchfolio.checks import finite, positive, whole
from torchfolio.shown import Shown

__all__ = ["FourierMeasure"]

TAU = 2 * math.pi
GRID = 4096  # points of the Fourier series' period


class FourierMeasure(Shown, ABC):
    """A real function as the mean of waves, $f(z) = \\mathrm{Re}\\,\\mathbb{E}_\\xi[c(\\xi) e^{2\\pi i \\xi z}]$.

    Frequencies $\\xi \\ge 0$ are enough: for a real function the wave at $-\\xi$ with the same Gaussian vector is the
    complex conjugate, so that antithetic pairs come free with the real part. Make one by `sin`, `cos`, `gaussian`,
    `sinc`, `from_function` or `series`; a subclass fills `sample` and `__call__`.
    """

    @abstractmethod
    def sample(self, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw m frequencies (float64) and their amplitudes $c$ (complex128)."""

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """The function itself, elementwise."""

    @staticmethod
    def sin() -> FourierMeasure:
        """The sine: one atom, at $1/2\\pi$."""
        return _Series(torch.tensor([1 / TAU]), torch.tensor([-1j]))

    @staticmethod
    def cos() -> FourierMeasure:
        """The cosine: one atom, at $1/2\\pi$."""
        return _Series(torch.tensor([1 / TAU]), torch.tensor([1.0 + 0j]))

    @staticmethod
    def gaussian(sigma: float = 1.0) -> FourierMeasure:
        """$e^{-z^2 / 2\\sigma^2}$, with normal frequencies."""
        return _Gaussian(positive("sigma", sigma))

    @staticmethod
    def sinc(bandwidth: float = 1.0) -> FourierMeasure:
        """$\\sin(\\beta z) / \\beta z$ with the bandwidth $\\beta$, with uniform frequencies."""
        return _Sinc(positive("bandwidth", bandwidth))

    @staticmethod
    def series(frequencies: Tensor, weights: Tensor) -> FourierMeasure:
        """$\\mathrm{Re} \\sum_k a_k e^{2\\pi i \\xi_k z}$, drawn with probabilities $\\propto |a_k|$.

        Args:
            frequencies: $\\xi_k$, `[K]`.
            weights: $a_k$, complex `[K]`, not all 0.
        """
        return _Series(frequencies, weights)

    @staticmethod
    def from_function(f: Callable[[Tensor], Tensor], radius: float = 2.0, n_terms: int | None = None) -> FourierMeasure:
        """Any function, equal to it on $[-R, R]$ up to the error of the series.

        f is multiplied by a taper that is 1 on $[-R, R]$ and falls as $\\cos^2$ to 0 at $\\pm 2R$, and continued with
        period $4R$.

        Args:
            f: elementwise function of a float64 tensor.
            radius: largest $|w \\cdot x + b|$ that is wanted, above 0.
            n_terms: number of terms besides the constant; $4R$ by default. More are more exact and have exponentially
                more variance.
        """
        radius = float(positive("radius", radius))
        terms = max(1, round(4 * radius)) if n_terms is None else whole("n_terms", n_terms, 1, GRID // 2 - 1)
        z = torch.arange(GRID, dtype=torch.float64) / GRID * 4 * radius - 2 * radius
        taper = (math.pi / 2 * (z.abs() / radius - 1).clamp(0, 1)).cos().square()
        values = finite("the values of f", torch.as_tensor(f(z), dtype=torch.float64))
        if values.shape != z.shape:
            raise ValueError(f"expected f to be elementwise, got values of shape {tuple(values.shape)} for {GRID}")
        k = torch.arange(terms + 1, dtype=torch.float64)
        sign = 1 - 2 * (k % 2)  # the grid begins at -2R, half a period before 0
        weights = torch.fft.rfft(values * taper)[: terms + 1] / GRID * sign
        weights[1:] *= 2
        return _Series(k / (4 * radius), weights)


class _Series(FourierMeasure):
    def __init__(self, frequencies: Tensor, weights: Tensor) -> None:
        self.frequencies = finite("frequencies", frequencies.to(torch.float64))
        self.weights = finite("weights", torch.view_as_real(weights.to(torch.complex128)))
        self.weights = torch.view_as_complex(self.weights)
        if self.frequencies.dim() != 1 or self.frequencies.shape != self.weights.shape:
            raise ValueError(
                f"expected as many frequencies as weights, got {list(frequencies.shape)} and {list(weights.shape)}"
            )
        if not self.weights.abs().sum() > 0:
            raise ValueError("expected a function that is not 0 everywhere, got weights of 0 only")

    def sample(self, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        total = self.weights.abs().sum()
        # Systematic draws: each has the right distribution, and shares deviate by less than one draw.
        places = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(m)) / m
        chosen = torch.searchsorted(self.weights.abs().cumsum(0) / total, places).clamp(max=len(self.weights) - 1)
        chosen = chosen[torch.randperm(m, generator=generator)]
        return self.frequencies[chosen], total * torch.polar(torch.ones(m).double(), self.weights.angle()[chosen])

    def __call__(self, z: Tensor) -> Tensor:
        waves = torch.exp(1j * TAU * z.to(torch.float64)[..., None] * self.frequencies)
        return (waves * self.weights).sum(-1).real.to(z.dtype)


class _Gaussian(FourierMeasure):
    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def sample(self, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        draws = torch.randn(m, generator=generator, dtype=torch.float64).abs()
        return draws / (TAU * self.sigma), torch.ones(m, dtype=torch.complex128)

    def __call__(self, z: Tensor) -> Tensor:
        return (-(z**2) / (2 * self.sigma**2)).exp()


class _Sinc(FourierMeasure):
    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth

    def sample(self, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        draws = torch.rand(m, generator=generator, dtype=torch.float64)
        return draws * self.bandwidth / TAU, torch.ones(m, dtype=torch.complex128)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.sinc(z * self.bandwidth / math.pi)
