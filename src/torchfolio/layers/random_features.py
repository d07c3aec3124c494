"""Random features by which an input and the parameters of a feed-forward layer meet in one dot product only.

Each class maps inputs (`forward`, called $\\Phi$) and weights (`psi`, called $\\Psi$) so that
$\\Phi(x) \\cdot \\Psi(w, b)$ estimates a function of both: `URF` any $f(w \\cdot x + b)$ with a Fourier transform,
`ArcCosineFeatures` the arc-cosine kernel.

Reference:
    Sehanobish et al., Scalable Neural Network Kernels, ICLR 2024, arXiv 2310.13225. The damping is that of Likhosherstov
    et al., Chefs' Random Tables, NeurIPS 2022; the tapered Fourier series of `FourierMeasure.from_function` is ours.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, finite, number, one_of, positive, whole

__all__ = ["URF", "ArcCosineFeatures", "FourierMeasure", "RandomFeatures", "best_damping", "kernel_error"]

TAU = 2 * math.pi
REACH = 4.0  # 2 pi |xi| |x| |w| beyond which the estimate's variance, which grows exponentially, is too large
GRID = 4096  # points of the Fourier series' period


def gaussian_matrix(rows: int, columns: int, seed: int | None, orthogonal: bool = False) -> tuple[Tensor, int]:
    """A float64 matrix of standard normal rows, and the seed that draws it; orthogonal ones in blocks of `columns`."""
    seed = int(torch.randint(2**62, ())) if seed is None else whole("seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if not orthogonal:
        return plain, seed
    blocks = torch.randn(-(-rows // columns), columns, columns, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(blocks)
    Q = Q * R.diagonal(dim1=1, dim2=2).sign()[:, None]  # uniform only with these signs
    directions = Q.mT.reshape(-1, columns)[:rows]
    return directions * plain.norm(dim=1, keepdim=True), seed


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


class FourierMeasure(ABC):
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


class RandomFeatures(nn.Module):
    """Base of the feature maps: `forward` maps inputs, `psi` maps weights, both to `width` real numbers.

    Args:
        in_features: size d of an input.
        m: number of random features.
        bias: whether the layer has biases.
        radius: norm r that inputs are brought to, $r x / \\lVert x \\rVert$; they stay as they are by default.
    """

    projection: Tensor
    width: int

    def __init__(self, in_features: int, m: int, bias: bool, radius: float | None) -> None:
        super().__init__()
        self.in_features, self.m = whole("in_features", in_features, 1), whole("m", m, 1)
        self.bias, self.radius = bool(bias), None if radius is None else float(positive("radius", radius))

    def forward(self, x: Tensor) -> Tensor:
        """$\\Phi(x)$: `[..., d]` to `[..., width]`."""
        features, log_scale = self.scaled(x)
        return features if log_scale is None else features * log_scale.exp()

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """$\\Phi(x)$ divided by a positive factor for every input, and the factor's logarithm, `None` for 1."""
        raise NotImplementedError

    def psi(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """$\\Psi(w, b)$ for weights `[l, d]` and biases `[l]` (0 by default): `[l, width]`."""
        raise NotImplementedError

    def kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """$\\Phi(x) \\cdot \\Psi(w, b)$ for all pairs, `[..., l]`."""
        return self(x) @ self.psi(weight, bias).mT

    def _inputs(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected inputs of {self.in_features} features, got shape {tuple(x.shape)}")
        return x if self.radius is None else self.radius * F.normalize(x, dim=-1)

    def _check_weights(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.dim() != 2 or weight.shape[1] != self.in_features:
            raise ValueError(f"expected weights [l, {self.in_features}], got {list(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"expected {len(weight)} biases, got {list(bias.shape)}")

    def extra_repr(self) -> str:
        radius = "" if self.radius is None else f", radius={self.radius}"
        return f"{self.in_features}, m={self.m}, bias={self.bias}{radius}"


class ArcCosineFeatures(RandomFeatures):
    """Features of the arc-cosine kernel: $\\Phi(x) = \\mathrm{ReLU}(Gx)/\\sqrt m$, and $\\Psi(w)$ the same of w.

    Their dot product tends to $\\lVert x\\rVert \\lVert w\\rVert (\\sin\\theta + (\\pi - \\theta)\\cos\\theta) / 2\\pi$
    with the angle $\\theta$: no approximation of $\\mathrm{ReLU}(w \\cdot x)$, but a kernel that no $f(w \\cdot x)$ is.
    With biases it is that of $(x, 1)$ and $(w, b)$.

    Args:
        in_features: size d of an input.
        m: number of features, at least 1.
        orthogonal: whether the rows of G are orthogonal in blocks of d, with the norms of Gaussian ones.
        floor: constant c of $\\max(Gx, c)$; 0 is the ReLU, and the exact kernel is known for it alone.
        bias: whether inputs get a constant 1, and weights their bias.
        radius: norm that inputs are brought to.
        seed: seed of G; drawn from torch's global generator by default.

    Shapes:
        `[..., d]` to `[..., m]`; `psi`: `[l, d]` to `[l, m]`.
    """

    offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        m: int,
        orthogonal: bool = False,
        *,
        floor: float = 0.0,
        bias: bool = False,
        radius: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(in_features, m, bias, radius)
        matrix, _ = gaussian_matrix(m, in_features + bias, seed, orthogonal)
        matrix = (matrix / math.sqrt(m)).to(torch.get_default_dtype())
        self.width, self.floor = m, float(number("floor", floor))
        self.register_buffer("projection", matrix[:, :in_features].contiguous())
        self.register_buffer("offset", matrix[:, -1].clone() if bias else None)

    def _activation(self, z: Tensor) -> Tensor:
        return z.relu() if self.floor == 0 else z.clamp(min=self.floor / math.sqrt(self.m))

    def scaled(self, x: Tensor) -> tuple[Tensor, None]:
        return self._activation(F.linear(self._inputs(x), self.projection, self.offset)), None

    def psi(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._check_weights(weight, bias)
        z = F.linear(weight, self.projection)
        if bias is not None and self.offset is None:
            raise ValueError("expected no biases for features made with bias=False, got some")
        return self._activation(z if bias is None or self.offset is None else z + bias[:, None] * self.offset)

    @staticmethod
    def exact(x: Tensor, weight: Tensor) -> Tensor:
        """The kernel itself for all pairs (without biases), `[..., l]`."""
        norms = x.norm(dim=-1, keepdim=True) * weight.norm(dim=1)
        cosine = (x @ weight.mT / norms.clamp(min=torch.finfo(x.dtype).tiny)).clamp(-1, 1)
        theta = cosine.arccos()
        return norms / TAU * (theta.sin() + (math.pi - theta) * cosine)


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
        measure: the function.
        M: damping of at least 0, or `"auto"`, the best for every frequency: at first that for a pair of orthogonal
            unit vectors, after `calibrate` that for the median pair.
        split: where $2\\pi i\\xi$ goes: `"balanced"` gives its root to both, with the least variance; `"input"` all to x,
            `"weight"` all to w.
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


def features_of(
    kind: str | FourierMeasure | Callable[..., RandomFeatures], in_features: int, m: int, **arguments: Any
) -> RandomFeatures:
    """Features by name (`"relu"`, `"sin"`, `"cos"`), of a measure, or of `kind(in_features, m, bias=, radius=, seed=)`."""
    if isinstance(kind, FourierMeasure):
        return URF(in_features, m, kind, **arguments)
    if callable(kind):
        made = kind(in_features, m, **arguments)
        if not isinstance(made, RandomFeatures):
            raise TypeError(f"expected features to make RandomFeatures, got {type(made).__name__}")
        return made
    one_of("features", kind, ("relu", "sin", "cos"))
    if kind == "relu":
        return ArcCosineFeatures(in_features, m, **arguments)
    return URF(in_features, m, FourierMeasure.sin() if kind == "sin" else FourierMeasure.cos(), **arguments)


@torch.no_grad()
def kernel_error(
    features: RandomFeatures | Iterable[RandomFeatures], x: Tensor, w: Tensor, exact: Tensor | None = None
) -> dict[int, float]:
    """Relative error of the estimate over all pairs, by number of features m.

    Args:
        features: one feature map or several; maps of the same m are averaged (root mean square).
        x: inputs `[N, d]`.
        w: weights `[l, d]`.
        exact: values `[N, l]`; those of the map's own `exact` by default.

    Returns:
        $\\lVert \\text{estimate} - \\text{exact} \\rVert / \\lVert \\text{exact} \\rVert$ for every m.

    Raises:
        ValueError: if there is no map, the exact values are of another shape, or all of them are 0.
    """
    maps: Any = [features] if isinstance(features, RandomFeatures) else list(features)
    if not maps:
        raise ValueError("expected at least one feature map, got none")
    squares: dict[int, list[float]] = {}
    for one in maps:
        values = finite("exact", one.exact(x, w) if exact is None else exact)
        estimate = one.kernel(x, w)
        if values.shape != estimate.shape:
            raise ValueError(f"expected exact values of shape {list(estimate.shape)}, got {list(values.shape)}")
        norm = float(values.double().norm())
        if norm == 0:
            raise ValueError("expected exact values that are not all 0, to which an error could be relative")
        squares.setdefault(one.m, []).append((float((estimate - values).double().norm()) / norm) ** 2)
    return {m: math.sqrt(sum(own) / len(own)) for m, own in sorted(squares.items())}
