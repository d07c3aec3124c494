"""Physical layers: systems that can be measured but not differentiated, four of them simulated.

They stand under `torchfolio.local.physical_ff`, in a file of their own because any training of physical networks can use
them. Calling a system measures it: the result carries no graph, is counted, and holds fresh noise. `response` is the
noiseless formula, which autograd can follow; only baselines that know the physics may use it.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.checks import at_least, between, finite, positive, same_length, whole
from torchfolio.engine import seeded
from torchfolio.measure.similarity import at_least_float32

__all__ = [
    "BlackBox",
    "KerrCavity",
    "MeasuredSurrogate",
    "MetasurfaceCavity",
    "MultimodeOptics",
    "PhysicalSystem",
    "as_physical",
]


class PhysicalSystem(nn.Module):
    """A system of `n_in` inputs and `n_out` outputs that is measured, `[B, n_in] -> [B, n_out]`.

    A subclass gives `response`, and in `_draw` the random quantities that make one specimen. They are buffers in real
    numbers (complex ones with a last axis of 2, which survives a change of dtype).

    Args:
        n_in: number of inputs.
        n_out: number of outputs.
        noise_std: standard deviation of Gaussian noise on each output, fresh in each call; 0 or more.
        seed: seed of the specimen, its noise and its drift.

    Attributes:
        calls: number of measurements, of a batch each.
        samples: number of examples measured.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, n_in: int, n_out: int, *, noise_std: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.n_in, self.n_out = whole("n_in", n_in, 1), whole("n_out", n_out, 1)
        self.noise_std, self.seed = at_least("noise_std", noise_std, 0), whole("seed", seed, 0)
        self.calls = self.samples = self._streams = 0
        for name, value in self._draw(self._generator()).items():
            self.register_buffer(name, value)

    def response(self, x: Tensor) -> Tensor:
        """Outputs without noise, as a formula in $x$."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Measure a batch.

        Raises:
            ValueError: if the input is not `[B, n_in]`.
        """
        if x.dim() != 2 or x.shape[1] != self.n_in:
            raise ValueError(f"expected inputs [B, {self.n_in}], got shape {tuple(x.shape)}")
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        with torch.no_grad():
            y = self.response(x.detach())
            if self.noise_std:
                y = y + self.noise_std * torch.randn(y.shape, generator=self._generator()).to(y)
        return y

    def reset_calls(self) -> None:
        """Count measurements from 0 again."""
        self.calls = self.samples = 0

    def drift(self, step: float) -> None:
        """Move the specimen $T$ to $\\sqrt{1 - s^2}\\, T + s T'$ with a fresh draw $T'$.

        Args:
            step: size $s$ in [0, 1]; 1 is another specimen.

        Raises:
            ValueError: if it is outside.
        """
        step = float(between("step", step, 0, 1))
        self._blend(math.sqrt(1 - step**2), step, self._generator())

    def twin(self, error: float = 0.0, seed: int = 0) -> Self:
        """A digital model of the system with a relative error, $T + \\varepsilon T'$; noiseless, with its own counts.

        Args:
            error: relative error $\\varepsilon$, 0 or more.
            seed: seed of the error.
        """
        at_least("error", error, 0)
        twin = copy.deepcopy(self)
        twin.reset_calls()
        twin.noise_std = 0.0
        twin._blend(1.0, error, torch.Generator().manual_seed(whole("seed", seed, 0)))
        return twin

    def extra_repr(self) -> str:
        """Sizes and noise."""
        return f"{self.n_in}, {self.n_out}, noise_std={self.noise_std}"

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A specimen's random quantities by the name of their buffer."""
        return {}

    def _blend(self, old: float, new: float, generator: torch.Generator) -> None:
        for name, fresh in self._draw(generator).items():
            buffer = getattr(self, name)
            with torch.no_grad():
                buffer.mul_(old).add_(fresh.to(buffer), alpha=new)

    def _generator(self) -> torch.Generator:
        # A number beside the seed, not a generator as an attribute: the system stays easy to copy and to pickle.
        self._streams += 1
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self._streams)


class MultimodeOptics(PhysicalSystem):
    """Light through a multiple-scattering medium onto a camera, $y = |T x|$, $T$ complex Gaussian $/\\sqrt{n_{in}}$.

    Args: see `PhysicalSystem`.
    """

    transmission: Tensor

    def response(self, x: Tensor) -> Tensor:
        """$|Tx|$; real and imaginary parts apart, which is faster than a complex product on a CPU."""
        T = at_least_float32(self.transmission)  # half precision has no complex numbers
        parts = x.to(T) @ T.permute(1, 2, 0).flatten(1)
        real, imaginary = parts.chunk(2, 1)
        # The hypotenuse has no derivative at 0, where a silent input ends.
        return (real.square() + imaginary.square()).clamp_min(1e-24).sqrt().to(x.dtype)

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        T = torch.randn(self.n_out, self.n_in, 2, generator=generator)
        return {"transmission": T / math.sqrt(2 * self.n_in)}


class KerrCavity(PhysicalSystem):
    """A nonlinear scattering cavity: $u \\leftarrow x + S\\,(u\\,e^{2i|u|^2/(1+|u|^2)})$, six times; $y = |u|$.

    $S$ is complex Gaussian of spectral norm 0.7; it has as many modes as the larger of inputs and outputs.

    Args: see `PhysicalSystem`.
    """

    scattering: Tensor

    def response(self, x: Tensor) -> Tensor:
        """Amplitudes of the first `n_out` modes after six passes."""
        S = torch.view_as_complex(at_least_float32(self.scattering))
        S = S * (0.7 / torch.linalg.matrix_norm(S, 2))  # drift changes the norm
        e = nn.functional.pad(x.to(S.real.dtype), (0, len(S) - self.n_in)).to(S.dtype)
        u = e
        for _ in range(6):
            power = u.real.square() + u.imag.square()
            u = e + (u * torch.polar(torch.ones_like(power), 2 * power / (1 + power))) @ S
        return (u.real.square() + u.imag.square()).clamp_min(1e-24).sqrt()[:, : self.n_out].to(x.dtype)

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        modes = max(self.n_in, self.n_out)
        return {"scattering": torch.randn(modes, modes, 2, generator=generator) / math.sqrt(2 * modes)}


class MetasurfaceCavity(PhysicalSystem):
    """A microwave cavity whose input sets the states of meta-atoms: the scatterer changes, not the wave.

    $y_f = |H_f + g_f^\\top (A(x) - W_f)^{-1} t_f|$ for `n_out` frequencies, by an exact solve of coupled dipoles;
    $W_f$ complex symmetric of spectral norm 0.8, $A = \\operatorname{diag}(1 + 0.2i + 0.8\\,[x_j / \\max x > 0.3])$.
    The states are two-level, so that the response has no slope in $x$.

    Args: see `PhysicalSystem`.
    """

    coupling: Tensor
    antennas: Tensor
    direct: Tensor

    def response(self, x: Tensor) -> Tensor:
        """Transmission at each frequency."""
        W, ports, H = (torch.view_as_complex(at_least_float32(b)) for b in (self.coupling, self.antennas, self.direct))
        W = W + W.mT
        W = W * (0.8 / torch.linalg.matrix_norm(W, 2, keepdim=True))
        top = x.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        states = 1 + 0.2j + 0.8 * (x / top > 0.3).to(W.dtype)
        system = torch.diag_embed(states)[:, None] - W  # [B, F, n, n]
        source, receiver = ports[0, :, :, None].expand(len(x), -1, -1, -1), ports[1]
        field = torch.linalg.solve(system, source)[..., 0]
        return (H + (receiver * field).sum(-1)).abs().to(x.dtype)

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        n, scale = self.n_in, 1 / math.sqrt(2 * self.n_in)
        return {
            "coupling": torch.randn(self.n_out, n, n, 2, generator=generator) * scale,
            "antennas": torch.randn(2, self.n_out, n, 2, generator=generator) * scale,
            "direct": torch.randn(self.n_out, 2, generator=generator) * scale,
        }


class MeasuredSurrogate(PhysicalSystem):
    """A network (20-100-200-100-20 for 20 inputs and outputs, SiLU) fitted to measured pairs of a real system.

    Args:
        x: measured inputs `[N, n_in]`, N of 20 or more.
        y: measured outputs `[N, n_out]`.
        epochs: passes over the pairs.
        lr: learning rate of Adam.
        batch_size: number of pairs of a step.
        noise_std: standard deviation of the noise, see `PhysicalSystem`.
        seed: seed, see `PhysicalSystem`.

    Attributes:
        error: root mean squared error on the last tenth of the pairs, which is not fitted, over their standard
            deviation.

    Raises:
        ValueError: if the pairs are not finite, differ in number, or are fewer than 20.
    """

    error: Tensor

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        epochs: int = 300,
        lr: float = 1e-4,
        batch_size: int = 256,
        noise_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        if x.dim() != 2 or y.dim() != 2 or same_length(x=x, y=y) < 20:
            raise ValueError(
                f"expected 20 pairs [N, n_in] and [N, n_out] or more, got {list(x.shape)}, {list(y.shape)}"
            )
        finite("x", x)
        finite("y", y)
        positive("lr", lr)
        whole("epochs", epochs, 1)
        whole("batch_size", batch_size, 1)
        super().__init__(x.shape[1], y.shape[1], noise_std=noise_std, seed=seed)
        held = max(len(x) // 10, 1)
        with seeded(seed):
            sizes = (self.n_in, 100, 200, 100, self.n_out)
            layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.SiLU())][:-1]
            self.network = nn.Sequential(*layers).to(x)
            self._fit(x[:-held], y[:-held], epochs, lr, batch_size)
        self.network.requires_grad_(False)
        residual = self.response(x[-held:]) - y[-held:]
        self.register_buffer("error", residual.square().mean().sqrt() / y[-held:].std())

    def response(self, x: Tensor) -> Tensor:
        """The network's outputs."""
        return self.network(x.to(next(self.network.parameters()))).to(x.dtype)

    def _fit(self, x: Tensor, y: Tensor, epochs: int, lr: float, batch_size: int) -> None:
        optimizer = torch.optim.Adam(self.network.parameters(), lr=lr)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
                optimizer.zero_grad()
                (self.network(x[rows]) - y[rows]).square().mean().sqrt().backward()
                optimizer.step()

    def _blend(self, old: float, new: float, generator: torch.Generator) -> None:
        for p in self.network.parameters():
            scale = float(p.std(unbiased=False))
            with torch.no_grad():
                p.mul_(old).add_(torch.randn(p.shape, generator=generator).to(p), alpha=new * scale)


class BlackBox(PhysicalSystem):
    """Any callable as a physical layer; made by `as_physical`.

    A module is called in evaluation mode and left in the mode it had. Drift is the callable's own `drift(step)` where it
    has one, else a drift of the gain of every output.
    """

    gain: Tensor

    def __init__(self, fn: Callable[[Any], Any], n_in: int, n_out: int, *, numpy: bool = False, **system: Any) -> None:
        super().__init__(n_in, n_out, **system)
        self.fn, self.numpy, self._warned = fn, numpy, False
        with torch.no_grad():
            self.gain.fill_(1)

    def response(self, x: Tensor) -> Tensor:
        """The callable's outputs as a tensor like the input, times the gains."""
        modules = list(self.fn.modules()) if isinstance(self.fn, nn.Module) else []
        modes = [m.training for m in modules]
        try:
            for m in modules:
                m.training = False
            x = x.clone()  # the callable may write into its input
            y = self.fn(x.cpu().numpy() if self.numpy else x)
        finally:
            for m, mode in zip(modules, modes, strict=True):
                m.training = mode
        if y is None or (y.is_complex() if isinstance(y, Tensor) else np.iscomplexobj(y)):
            kind = "complex ones" if y is not None else "None"
            raise TypeError(f"expected real outputs of a physical layer, got {kind}")
        y = torch.as_tensor(y)
        if y.requires_grad and not torch.is_grad_enabled() and not self._warned:
            warnings.warn("a physical layer returned a tensor with a graph, which is cut", stacklevel=3)
            self._warned = True
        return y.to(x) * self.gain.to(x) if y.shape[-1:] == self.gain.shape else y.to(x)

    def drift(self, step: float) -> None:
        """Drift of the callable itself where it knows how, else of the gains."""
        own = getattr(self.fn, "drift", None)
        if own is None:
            super().drift(step)
        else:
            own(float(between("step", step, 0, 1)))

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.randn(self.n_out, generator=generator)}


def as_physical(
    fn: Callable[[Any], Any], n_in: int, n_out: int, *, numpy: bool = False, noise_std: float = 0.0, seed: int = 0
) -> PhysicalSystem:
    """Take any callable `[B, n_in] -> [B, n_out]` as a physical layer; a `PhysicalSystem` is returned as it is.

    Args:
        fn: a Python function, a module, a device.
        n_in: number of its inputs.
        n_out: number of its outputs.
        numpy: whether it takes arrays; it may return arrays in any case.
        noise_std: standard deviation of noise that is added to its outputs.
        seed: seed of noise and drift.

    Raises:
        TypeError: if it is not callable.
        ValueError: if it is a system of other sizes.

    Example:
        >>> box = as_physical(lambda x: x.sin(), 3, 3)
        >>> box(torch.zeros(2, 3)).shape, box.calls
        (torch.Size([2, 3]), 1)
    """
    if not callable(fn):
        raise TypeError(f"expected a callable as physical layer, got {type(fn).__name__}")
    if isinstance(fn, PhysicalSystem):
        if (fn.n_in, fn.n_out) != (n_in, n_out):
            raise ValueError(f"expected a system of {n_in} inputs and {n_out} outputs, got {fn.n_in} and {fn.n_out}")
        return fn
    return BlackBox(fn, n_in, n_out, numpy=numpy, noise_std=noise_std, seed=seed)
