"""Rows that learn a principal subspace by a Hebbian rule, and the projection off it.

Mingqing Xiao et al., ICLR 2024, https://arxiv.org/abs/2402.11984, sections 4.1 and 4.2; the subspace rule is that of
Erkki Oja, "Neural Networks, Principal Components, and Subspaces", International Journal of Neural Systems, 1989.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchfolio.checks import between, positive, whole

__all__ = ["HebbianSubspace"]

SPAN = 20.0  # of the activity that spiking lateral neurons emit
FULL = 0.9  # share of n from which hardly anything is left to learn in


class HebbianSubspace(nn.Module):
    """Lateral neurons beside a layer: the rows of $H$, of which some are fixed and the new ones learn.

    On rows of activity $x$, for so many iterations,

    $$y = x H^\\top, \\qquad \\Delta = \\tfrac{1}{B}\\, y^\\top (x - y H), \\qquad M \\leftarrow \\mu M + (1 - \\mu)\\,
      \\mathrm{clip}(\\Delta), \\qquad H \\leftarrow H + \\eta M,$$

    for the new rows alone. They come to span the principal subspace of what the fixed rows leave, and to be
    orthonormal. `project` takes the part in the fixed rows out of whatever it is given.

    Args:
        n: width of the activity.
        lr: $\\eta > 0$. The step is relative to the size of x: take less where $|x|^2$ is large.
        momentum: $\\mu$ in [0, 1).
        iterations: number of iterations on each batch.
        clip: bound on the entries of $\\Delta$.
        spiking: levels N on each side of 0 of the signed rates that lateral neurons emit between -20 and 20; `None`
            lets them emit real numbers.

    Shapes:
        x `[..., n]`.

    Raises:
        ValueError: on settings out of range, more rows than n, activity that is not finite or has another width.

    Example:
        >>> subspace = HebbianSubspace(50)
        >>> subspace.grow(10)
        >>> for x in batches:
        ...     subspace.update(x)
        >>> subspace.merge()
        >>> rest = subspace.project(x)
    """

    fixed: Tensor
    new: Tensor
    velocity: Tensor

    def __init__(
        self,
        n: int,
        *,
        lr: float = 0.01,
        momentum: float = 0.9,
        iterations: int = 5,
        clip: float = 10.0,
        spiking: int | None = None,
    ) -> None:
        super().__init__()
        self.n, self.iterations = whole("n", n, 1), whole("iterations", iterations, 1)
        self.lr, self.momentum = positive("lr", lr), between("momentum", momentum, 0, 1, inclusive=(True, False))
        self.clip = positive("clip", clip)
        self.spiking = None if spiking is None else whole("spiking", spiking, 1)
        for name in ("fixed", "new", "velocity"):
            self.register_buffer(name, torch.zeros(0, n))

    @property
    def basis(self) -> Tensor:
        """All rows `[m, n]`, the fixed ones first."""
        return torch.cat((self.fixed, self.new))

    def grow(self, m: int, generator: torch.Generator | None = None) -> None:
        """Add m new rows, a random orthonormal block.

        Args:
            m: number of rows.
            generator: source of the rows, on the CPU; torch's global one by default.
        """
        total = len(self.basis) + whole("the number of rows", m, 0)
        if total > self.n:
            raise ValueError(f"expected at most {self.n} rows for activity of that width, got {total}")
        if total > FULL * self.n:
            warnings.warn(f"{total} rows of {self.n} leave the layer nearly nothing to learn in", stacklevel=2)
        block = torch.linalg.qr(torch.randn(self.n, m, generator=generator, dtype=torch.float64))[0].T
        self.new = torch.cat((self.new, block.to(self.new)))
        self.velocity = torch.cat((self.velocity, torch.zeros_like(block).to(self.velocity)))

    def merge(self, orthonormalize: bool = False) -> None:
        """Fix the new rows.

        Args:
            orthonormalize: whether to make all rows exactly orthonormal, which the rule itself does only nearly.
        """
        self.fixed = self.basis
        if orthonormalize and len(self.fixed):
            self.fixed = torch.linalg.qr(self.fixed.mT)[0].mT.contiguous()
        self.new, self.velocity = self.new[:0], self.velocity[:0]

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Learn from a batch of activity."""
        if x.shape[-1] != self.n:
            raise ValueError(f"expected activity of width {self.n}, got shape {tuple(x.shape)}")
        if not x.numel():
            raise ValueError(f"expected activity to learn from, got shape {tuple(x.shape)}")
        if not len(self.new):
            return
        x = x.reshape(-1, self.n).to(self.new)
        with torch.autocast(x.device.type, enabled=False):
            # The fixed rows' share does not change in between.
            rest = x - self._emitted(x @ self.fixed.mT) @ self.fixed if len(self.fixed) else x
            for _ in range(self.iterations):
                y = self._emitted(x @ self.new.mT)
                # y' (rest - y H) without the reconstruction of every row.
                change = torch.addmm(y.mT @ rest, y.mT @ y, self.new, alpha=-1).div_(len(x))
                self.velocity.lerp_(change.clamp_(-self.clip, self.clip), 1 - self.momentum)
                self.new.add_(self.velocity, alpha=self.lr)
        if not self.new.sum().isfinite():
            raise ValueError(
                "lateral rows became NaN or infinite; expected finite activity, or a smaller lr for activity this large"
            )

    def _emitted(self, y: Tensor) -> Tensor:
        if self.spiking is None:
            return y
        return (y.clamp(-SPAN, SPAN) * (self.spiking / SPAN)).round() * (SPAN / self.spiking)

    def project(self, x: Tensor) -> Tensor:
        """The part of rows that the fixed rows do not see, $x - x H^\\top H$; also of a weight's gradient `[out, n]`."""
        if not len(self.fixed):
            return x
        fixed = self.fixed.to(x.dtype)
        return x - (x @ fixed.mT) @ fixed

    def orthonormality_error(self) -> float:
        """Largest entry of $|H H^\\top - I|$; 0 makes `project` a projection."""
        basis = self.basis
        return float((basis @ basis.mT - torch.eye(len(basis)).to(basis)).abs().max()) if len(basis) else 0.0

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: object) -> None:
        for name in ("fixed", "new", "velocity"):  # rows may be more or fewer than here
            if (value := state_dict.get(prefix + name)) is not None and value.shape[1:] == (self.n,):
                setattr(self, name, torch.zeros_like(value, dtype=self.fixed.dtype, device=self.fixed.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{self.n}, fixed={len(self.fixed)}, new={len(self.new)}, lr={self.lr:g}"
