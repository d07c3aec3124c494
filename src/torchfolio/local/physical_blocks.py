"""Blocks of a physical system and a linear layer: encoders, goodness, and the local loss of a pair of passes.

Part of physical local learning (Momeni et al., Science 382, 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import finite, one_of, positive, whole
from torchfolio.engine import seeded
from torchfolio.local.physical_system import PhysicalSystem

__all__ = ["CosineGoodness", "PhysicalBlock", "SquareGoodness", "l2_encode", "local_loss", "two_bit_encode"]

Encoder = Callable[[Tensor], Tensor]


def l2_encode(h: Tensor) -> Tensor:
    """$|h| / (\\lVert h\\rVert_2 + 10^{-6})$ of each row: amplitudes of unit power."""
    return h.abs() / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-6)


def two_bit_encode(h: Tensor) -> Tensor:
    """Two pixels of {0, 1} an entry: its quarter of the row's range, in binary. `[B, n] -> [B, 2n]`."""
    low, high = h.aminmax(dim=1, keepdim=True)
    unit = (h - low) / (high - low).clamp_min(torch.finfo(h.dtype).tiny)
    level = (unit * 4).floor().clamp(0, 3)
    return torch.stack(((level >= 2).to(h), (level % 2)), 2).flatten(1)


ENCODERS: dict[str, Encoder] = {"l2": l2_encode, "two_bit": two_bit_encode, "none": lambda h: h}


class CosineGoodness(nn.Module):
    """$G(z) = \\cos(|z|, p)$ with a fixed Gaussian direction $p$.

    $\\partial G/\\partial z = \\operatorname{sign}(z) \\odot (p - G\\,|z|/\\lVert z\\rVert)/\\lVert z\\rVert$, and $G$ does
    not change with the scale or sign of $z$.

    Args:
        features: width of $z$.
        activation: function in place of the absolute value, such as `F.gelu` for digital networks.
        seed: seed of the direction.
    """

    target: Tensor

    def __init__(self, features: int, activation: Callable[[Tensor], Tensor] = torch.abs, seed: int = 0) -> None:
        super().__init__()
        self.activation = activation
        p = torch.randn(features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("target", p / p.norm())

    def forward(self, z: Tensor) -> Tensor:
        """Goodness of each row, `[B, n] -> [B]`."""
        a = self.activation(z)
        # One product with the target, in place of a broadcast of it: this runs in every inner step.
        norm = torch.linalg.vector_norm(a, dim=1).clamp_min(torch.finfo(a.dtype).tiny)
        return a @ self.target.to(a) / norm

    def hand_over(self, z: Tensor) -> Tensor:
        """What the next block gets: $z$ itself."""
        return z


class SquareGoodness(nn.Module):
    """Hinton's goodness $\\frac1n \\sum_j z_j^2$; the next block gets rows of unit length, which do not carry it.

    Args:
        features: width of $z$.
        seed: number that is not used; nothing is drawn.
    """

    def __init__(self, features: int, seed: int = 0) -> None:
        super().__init__()

    def forward(self, z: Tensor) -> Tensor:
        """Goodness of each row, `[B, n] -> [B]`."""
        return z.square().mean(1)

    def hand_over(self, z: Tensor) -> Tensor:
        """Rows of unit length."""
        return F.normalize(z, dim=1)


GOODNESS: dict[str, Callable[..., nn.Module]] = {"cos": CosineGoodness, "sq": SquareGoodness}


def local_loss(good: Tensor, bad: Tensor, theta: float = 4.0) -> Tensor:
    """$\\operatorname{mean} \\log(1 + e^{-\\theta (G^+ - G^-)})$ over pairs of goodness `[B]`; $\\log 2$ for equal ones."""
    return F.softplus(theta * (bad - good)).mean()


class PhysicalBlock(nn.Module):
    """A physical system and the linear layer on what it gives: $z = W\\,[\\Phi(\\operatorname{enc} h);\\, h] + b$.

    Args:
        physical: measured system, of `as_physical` or `torchfolio.local.physical_systems`.
        out_features: width of $z$.
        skip: whether the linear layer sees $h$ too. With it a network may pass the physics by: see `reliance`.
        encode: encoder of the system's inputs, `"l2"`, `"two_bit"`, `"none"`, or a function on `[B, n]`.
        goodness: goodness of $z$, `"cos"`, `"sq"`, or a module like `CosineGoodness`.
        theta: sharpness $\\theta$ of the local loss, positive.
        in_features: width of $h$; what the encoder asks for by default. Must be given with an encoder of yours.
        seed: seed of weights and goodness; differs between blocks.

    Attributes:
        linear: only trained part.

    Raises:
        TypeError: if `physical` is not a system.
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        physical: PhysicalSystem,
        out_features: int,
        skip: bool = True,
        encode: str | Encoder = "l2",
        goodness: str | nn.Module = "cos",
        theta: float = 4.0,
        *,
        in_features: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(physical, PhysicalSystem):
            raise TypeError(f"expected a physical system (see as_physical), got {type(physical).__name__}")
        self.physical, self.skip, self.theta = physical, skip, positive("theta", theta)
        self.encode = encode if callable(encode) else ENCODERS[one_of("encode", encode, ENCODERS)]
        if in_features is None:
            if self.encode not in ENCODERS.values():
                raise ValueError("expected in_features beside an encoder function")
            in_features = physical.n_in // 2 if encode == "two_bit" else physical.n_in
        self.in_features = whole("in_features", in_features, 1)
        whole("out_features", out_features, 1)
        with seeded(seed):
            self.linear = nn.Linear(physical.n_out + (self.in_features if skip else 0), out_features)
        if isinstance(goodness, str):
            goodness = GOODNESS[one_of("goodness", goodness, GOODNESS)](out_features, seed=seed + 7919)
        self.goodness: Any = goodness

    @property
    def target(self) -> Tensor | None:
        """Fixed direction of the cosine goodness, `None` for another."""
        return getattr(self.goodness, "target", None)

    def measure(self, h: Tensor, name: str = "the physical layer") -> Tensor:
        """$[r; h]$ of one measurement, without a graph.

        Raises:
            ValueError: if the measurement has another shape than it should, or is not finite.
        """
        r = self.physical(self.encode(h.detach())).detach()
        if r.shape != (len(h), self.physical.n_out):
            raise ValueError(f"expected outputs [{len(h)}, {self.physical.n_out}] of {name}, got {list(r.shape)}")
        finite(f"the output of {name}", r)
        return torch.cat((r, h.detach()), 1) if self.skip else r

    def forward(self, h: Tensor) -> Tensor:
        """Measure and apply the linear layer, `[B, in_features] -> [B, out_features]`."""
        return self.linear(self.measure(h))

    def loss(self, s: Tensor) -> Tensor:
        """Local loss of stored $[r; h]$, good rows in the first half, their bad partners in the second."""
        good, bad = self.goodness(self.linear(s)).chunk(2)
        return local_loss(good, bad, self.theta)

    def reliance(self) -> float:
        """Share of the squared weights that stand on the physics; 1 without skip."""
        squares = self.linear.weight.detach().square().sum(0)
        return float(squares[: self.physical.n_out].sum() / squares.sum())
