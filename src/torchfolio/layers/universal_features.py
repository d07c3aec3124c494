"""Universal random features, which estimate any function of an inner product that has a Fourier transform.

Reference:
    Sehanobish et al., Scalable Neural Network Kernels, ICLR 2024, arXiv 2310.13225. The damping is that of Likhosherstov
    et al., Chefs' Random Tables, NeurIPS 2022.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import at_least, finite, one_of
from torchfolio.layers.feature_map import RandomFeatures, gaussian_matrix
from torchfolio.layers.fourier_measures import FourierMeasure

__all__ = ["URF", "best_damping"]

TAU = 2 * math.pi
REACH = 4.0  # 2 pi |xi| |x| |w| beyond which the estimate's variance, which grows exponentially, is too large


def best_damping(s: Tensor | float, d: int) -> Tensor:
    """The damping $M \\ge 0$ with the smallest variance for one pair of vectors.

    The second moment is $\\propto ((1+4M)^2/(1+8M))^{d/2} e^{2(1+4M)s/(1+8M)}$, smallest at $M = (\\varrho - 1)/8$ with
    $\\varrho = (d + 2s + \\sqrt{(d+2s)^2 + 8ds}) / 2d$.

    Args:
        s: squared norm of the real part of $\\rho x + \\eta w$, at least 0.
        d: number of dimensions.
    """
    s = torch.as_tensor(s, dtype=torch.float64)
    rho = (d + 2 * s + ((d + 2 * s) ** 2 + 8 * d * s).sqrt()) / (2 * d)
    return (rho - 1) / 8


class URF(RandomFeatures):
    """Universal random features: an unbiased estimate of $f(w \\cdot x + b)$ for any f with a Fourier transform.

    For every frequency, $e^{2\\pi i\\xi\\, w \\cdot x} = e^{\\hat x \\cdot \\hat w}$ with
    $\\hat x = \\rho x, \\hat w = \\eta w, \\rho\\eta = 2\\pi i\\xi$, which has the features

    $$\\varphi_j(v) = (1+4M)^{d/4} \\exp(\\sqrt{1+4M}\\, g_j \\cdot v - M \\lVert g_j \\rVert^2 - v \\cdot v / 2) / \\sqrt m,
    \\qquad f(w \\cdot x + b) \\approx \\mathrm{Re} \\sum_j \\varphi_j(\\hat x)\\, c_j e^{2\\pi i\\xi_j b} \\varphi_j(\\hat w).$$

    Magnitudes, the amplitudes $|c_j|$ among them, stay in log space until the largest of a row is taken out. Real and
    imaginary parts are held side by side.

    Args:
        in_features: size d of an input.
        m: number of frequencies, each with two real features.
        measure: function.
        M: damping of at least 0, or `"auto"`, the best for every frequency: at first that for a pair of orthogonal
            unit vectors, after `calibrate` that for the median pair.
        split: place of $2\\pi i\\xi$ goes: `"balanced"` gives its root to both, with the least variance; `"input"` all
            to x, `"weight"` all to w.
        orthogonal: whether the $g_j$ are orthogonal in blocks of d.
        bias: whether the layer has biases; the features are the same.
        radius: norm that inputs are brought to.
        seed: seed of $g_j$ and $\\xi_j$; drawn from torch's global generator by default.

    Shapes:
        `[..., d]` to `[..., 2m]`; `psi`: `[l, d]` to `[l, 2m]`.
    """

    frequencies: Tensor
    damping: Tensor
    log_amplitude: Tensor
    phase: Tensor
    roots: Tensor

    def __init__(
        self,
        in_features: int,
        m: int,
        measure: FourierMeasure,
        M: Literal["auto"] | float = "auto",
        split: Literal["balanced", "input", "weight"] = "balanced",
        *,
        orthogonal: bool = False,
        bias: bool = False,
        radius: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(in_features, m, bias, radius)
        if not isinstance(measure, FourierMeasure):
            raise TypeError(
                f"expected a FourierMeasure, got {type(measure).__name__}; see FourierMeasure.from_function"
            )
        self.measure, self.split = measure, one_of("split", split, ("balanced", "input", "weight"))
        self.auto, self.width = M == "auto", 2 * m
        matrix, seed = gaussian_matrix(m, in_features, seed, orthogonal)
        xi, amplitude = measure.sample(m, torch.Generator().manual_seed((seed + 1) % 2**62))
        full = torch.complex(torch.zeros_like(xi), TAU * xi)
        one = torch.ones_like(full)
        rho, eta = {"balanced": (full.sqrt(), full.sqrt()), "input": (full, one), "weight": (one, full)}[split]
        dtype = torch.get_default_dtype()
        buffers = {
            "projection": matrix, "frequencies": xi, "log_amplitude": amplitude.abs().log(), "phase": amplitude.angle(),
            "roots": torch.stack([rho.real, rho.imag, eta.real, eta.imag]),
            "damping": torch.zeros(m) if self.auto else torch.full((m,), float(at_least("M", M, 0))),
        }  # fmt: skip
        for name, value in buffers.items():
            self.register_buffer(name, value.to(dtype))
        if self.auto:
            self._damp(1.0, 0.0, 1.0)

    def _damp(self, x2: float, xw: float, w2: float) -> None:
        a, b = self.roots[0].double(), self.roots[2].double()
        s = (a * a * x2 + 2 * a * b * xw + b * b * w2).clamp(min=0)
        self.damping.copy_(best_damping(s, self.in_features))

    @torch.no_grad()
    def calibrate(self, x: Tensor, weight: Tensor) -> URF:
        """Fit the damping to the median pair of inputs `[..., d]` and weights `[l, d]`, in place.

        It changes both maps, so that weights must be mapped anew. It warns where the variance is too large to be of use.
        """
        x, weight = self._inputs(x).flatten(0, -2).double(), weight.double()
        self._check_weights(weight, None)
        finite("x", x)
        finite("weight", weight)
        if not len(x) or not len(weight):
            raise ValueError(f"expected at least one input and one weight, got {len(x)} and {len(weight)}")
        norms = x.norm(dim=1), weight.norm(dim=1)
        reach = TAU * float(self.frequencies.abs().max() * norms[0].max() * norms[1].max())
        if reach > REACH:
            warnings.warn(
                "features have exponential variance beyond the unit ball: normalise inputs or set radius "
                f"(2 pi |xi| |x| |w| is up to {reach:.3g}, expected at most {REACH:g})",
                stacklevel=2,
            )
        if self.auto:
            medians = [v.median().item() for v in (norms[0].square(), x[:4096] @ weight.mT, norms[1].square())]
            self._damp(*medians)
        return self

    def _log_map(self, v: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """Logarithm of the magnitude and the phase of $\\varphi_j$ of `v` times its root."""
        real, imaginary = self.roots[which].to(v.dtype), self.roots[which + 1].to(v.dtype)
        G, M = self.projection.to(v.dtype), self.damping.to(v.dtype)
        kappa = (1 + 4 * M).sqrt()
        constant = self.in_features / 4 * (1 + 4 * M).log() - M * G.square().sum(1) - 0.5 * math.log(self.m)
        u, half = F.linear(v, G), v.square().sum(-1, keepdim=True) / 2
        log = u * (kappa * real) + constant - half * (real.square() - imaginary.square())
        return log, u * (kappa * imaginary) - half * (2 * real * imaginary)

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._inputs(x)
        log, angle = self._log_map(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, 0)
        features, largest = _from_logs(log, angle)
        return features.to(x.dtype), largest.to(x.dtype)

    def scaled_psi(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """$\\Psi$ divided by a positive factor for every weight, and the factor's logarithm `[l, 1]`."""
        self._check_weights(weight, bias)
        log, angle = self._log_map(weight, 2)
        angle = angle + self.phase.to(weight.dtype)
        if bias is not None:
            angle = angle + TAU * bias[:, None] * self.frequencies.to(weight.dtype)
        # The real part of a product is the dot product with the conjugate.
        return _from_logs(log + self.log_amplitude.to(weight.dtype), -angle)

    def psi(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        features, log_scale = self.scaled_psi(weight, bias)
        return features * log_scale.exp()

    def kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        (features, log_scale), (weights, log_factor) = self.scaled(x), self.scaled_psi(weight, bias)
        return features @ weights.mT * (log_scale + log_factor.mT).exp()

    def exact(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The function itself for all pairs, `[..., l]`."""
        return self.measure(F.linear(x, weight, bias))


def _from_logs(log: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    largest = log.detach().amax(-1, keepdim=True)
    size = (log - largest).exp()
    return torch.cat([size * angle.cos(), size * angle.sin()], -1), largest
