"""Stochastic differential equations: drift, diffusion, kind of noise and calculus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import one_of
from torchfolio.dynamics.terms import AdjointTerms, Packing, Stats, Terms

__all__ = ["SDE", "SDETerms"]

NOISES = ("diagonal", "additive", "scalar", "general")
CALCULI = ("ito", "stratonovich")


class SDE(nn.Module):
    """The equation dY = f(t, Y) dt + g(t, Y) dW, or ∘ dW in Stratonovich's calculus.

    Args:
        drift: function or module `(t, y) -> f`.
        diffusion: function or module `(t, y) -> g`.
        noise: kind of noise. "diagonal": one Brownian motion a channel, g has the shape of y. "additive": g does not
            depend on y; it has the shape of y, or is a matrix. "scalar": one Brownian motion for all channels, g is
            `[..., h, 1]`. "general": g is a matrix `[..., h, w]`.
        calculus: "ito" or "stratonovich". A solver of the other one is refused: the two differ by ½ g ∂g/∂y dt.

    Shapes:
        y: `[..., h]`.

    Raises:
        ValueError: if noise or calculus is none of these.
        TypeError: if drift or diffusion is no function.
    """

    def __init__(
        self,
        drift: Callable[[Tensor, Tensor], Tensor],
        diffusion: Callable[[Tensor, Tensor], Tensor],
        noise: str = "diagonal",
        calculus: str = "stratonovich",
    ) -> None:
        super().__init__()
        for name, part in (("drift", drift), ("diffusion", diffusion)):
            if not callable(part):
                raise TypeError(f"expected {name} to be a function (t, y), got {type(part).__name__}")
        self.drift, self.diffusion = drift, diffusion
        self.noise = one_of("noise", noise, NOISES)
        self.calculus = one_of("calculus", calculus, CALCULI)

    def forward(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Drift and diffusion at once; override it where they share work."""
        return self.drift(t, y), self.diffusion(t, y)


class SDETerms(Terms):
    """Right-hand side of a stochastic equation.

    Args:
        sde: equation.
        packing: packing of states; a single tensor `[..., h]`.
        params: tensors that the equation depends on and that want gradients.
        stats: counter of evaluations.
    """

    noisy = True

    def __init__(self, sde: SDE, packing: Packing, params: Sequence[Tensor] = (), stats: Stats | None = None) -> None:
        super().__init__(sde, packing, params, stats)
        self.sde, self.shape = sde, packing.shapes[0]
        self.matrix = sde.noise in ("scalar", "general")

    def noise_shape(self, t: float, y: Tensor) -> tuple[int, ...]:
        """Shape of the Brownian motion, from the diffusion at a state.

        Raises:
            ValueError: if the diffusion has no shape that the kind of noise allows.
        """
        with torch.no_grad():
            g = self.sde(self.time(t), y)[1]
        h, kind = self.shape[-1], self.sde.noise
        if kind == "diagonal" or (kind == "additive" and g.shape == self.shape):
            expected, fits = f"{tuple(self.shape)}", g.shape == self.shape
        else:
            width = "1" if kind == "scalar" else "w"
            expected = f"({', '.join(map(str, (*self.shape[:-1], h)))}, {width})"
            fits = g.dim() >= 2 and g.shape[:-1] == self.shape and (kind != "scalar" or g.shape[-1] == 1)
            self.matrix = True
        if not fits:
            raise ValueError(f"expected the diffusion of {kind} noise of shape {expected}, got {tuple(g.shape)}")
        return (*self.shape[:-1], g.shape[-1]) if self.matrix else tuple(self.shape)

    def __call__(self, t: float, y: Tensor) -> Tensor:
        return self.rates(t, y)[0]

    def rates(self, t: float, y: Tensor) -> tuple[Tensor, ...]:
        self.count()
        f, g = self.sde(self.time(t), y)
        if f.shape != self.shape:
            raise ValueError(f"expected the drift of shape {tuple(self.shape)}, got {tuple(f.shape)}")
        return f, g

    def increment(self, rates: Sequence[Tensor], h: float, noise: Any) -> Tensor:
        f, g = rates
        moved = (g @ noise.unsqueeze(-1)).squeeze(-1) if self.matrix else g * noise
        return torch.add(moved, f, alpha=h)

    def increment_cotangents(self, a: Tensor, h: float, noise: Any) -> tuple[Tensor, ...]:
        return a * h, a.unsqueeze(-1) * noise.unsqueeze(-2) if self.matrix else a * noise

    def adjoint(self) -> AdjointTerms:
        return _SDEAdjointTerms(self)


class _SDEAdjointTerms(AdjointTerms):
    """The adjoint equation in Stratonovich's calculus, whose increments obey the ordinary rules."""

    def move(self, t: float, y: Tensor, h: float, noise: Any) -> Tensor:
        state, a = self._parts(y)
        at = self.terms.linearised(t, state)
        change = self.terms.increment(at.rates, h, noise)
        return self._joined(change, *at.pull(self.terms.increment_cotangents(-a, h, noise)))
