"""What is to be shown of a network on a box of inputs, and what a verifier answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.shown import Shown

__all__ = ["Box", "Property", "Status", "Verdict", "Verifier", "classification"]

Status = Literal["verified", "falsified", "unknown"]
"""What a verifier answers."""


@dataclass(frozen=True, repr=False)
class Box(Shown):
    """Boxes of inputs, $\\{x : \\text{lower} \\le x \\le \\text{upper}\\}$.

    Attributes:
        lower: `[B, *shape]`.
        upper: upper ends, nowhere below `lower`.
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        if self.lower.shape != self.upper.shape or self.lower.dim() < 2:
            raise ValueError(
                f"expected bounds of one shape [B, ...], got {tuple(self.lower.shape)} and {tuple(self.upper.shape)}"
            )
        if not bool(((self.lower <= self.upper) & self.lower.isfinite() & self.upper.isfinite()).all()):
            raise ValueError("expected bounds that are finite, the lower ones nowhere above the upper ones")

    @classmethod
    def ball(cls, x: Tensor, eps: float, clip: tuple[float, float] | None = (0.0, 1.0)) -> Box:
        """The $L_\\infty$ balls around inputs `[B, *shape]`, cut to `clip`."""
        checks.at_least("eps", eps, 0)
        lower, upper = x - eps, x + eps
        return cls(lower, upper) if clip is None else cls(lower.clamp(*clip), upper.clamp(*clip))

    def __len__(self) -> int:
        return len(self.lower)

    def __getitem__(self, rows: slice | Tensor) -> Box:
        return Box(self.lower[rows], self.upper[rows])

    @property
    def center(self) -> Tensor:
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        return (self.upper - self.lower) / 2

    def contains(self, x: Tensor) -> Tensor:
        """Which of the inputs `[B, *shape]` lie in their boxes `[B]`."""
        return ((x >= self.lower) & (x <= self.upper)).flatten(1).all(1)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Box:
        """The same in another dtype or on another device; narrowing rounds outward, so that nothing is lost."""
        lower, upper = self.lower.to(device), self.upper.to(device)
        if dtype is None or dtype == lower.dtype:
            return Box(lower, upper)
        low, high = lower.to(dtype), upper.to(dtype)
        low = torch.where(low.to(lower.dtype) > lower, torch.nextafter(low, torch.full_like(low, -torch.inf)), low)
        high = torch.where(high.to(upper.dtype) < upper, torch.nextafter(high, torch.full_like(high, torch.inf)), high)
        return Box(low, high)

    @staticmethod
    def cat(boxes: Sequence[Box]) -> Box:
        return Box(torch.cat([b.lower for b in boxes]), torch.cat([b.upper for b in boxes]))


@dataclass(frozen=True, repr=False)
class Property(Shown):
    """A linear property of outputs, told by what would violate it.

    It is violated by outputs $z$ with $C_r z \\le t_r$ for *all* rows $r$ of *some* group. One row per group is
    $C z > t$ for all rows.

    Attributes:
        C: `[R, K]`.
        t: `[R]`.
        groups: number of each row's group `[R]`.
    """

    C: Tensor
    t: Tensor
    groups: Tensor

    def __post_init__(self) -> None:
        rows = len(self.C)
        if self.C.dim() != 2 or self.t.shape != (rows,) or self.groups.shape != (rows,) or not rows:
            raise ValueError(
                f"expected C [R, K], t [R] and groups [R], got {tuple(self.C.shape)}, {tuple(self.t.shape)}, "
                f"{tuple(self.groups.shape)}"
            )
        if not bool(self.C.isfinite().all() and self.t.isfinite().all()):
            raise ValueError("expected C and t that are finite, got NaN or infinity")
        if self.groups.is_floating_point() or bool((self.groups < 0).any()):
            raise ValueError("expected groups to be integers of at least 0")

    @classmethod
    def rows(cls, C: Tensor, t: Tensor | float = 0.0) -> Property:
        """$C z > t$ for all rows."""
        offsets = torch.as_tensor(t, dtype=C.dtype).expand(len(C)).clone()
        return cls(C, offsets, torch.arange(len(C)))

    def holds(self, values: Tensor) -> Tensor:
        """From values, or lower bounds, of $C z - t$ `[B, R]`: whether no group can be violated `[B]`."""
        # A bound of infinity is an overflow: nothing is known.
        return (self.by_group(values.where(values < torch.inf, -torch.inf)) > 0).all(1)

    def by_group(self, values: Tensor) -> Tensor:
        """The largest value of each group `[B, G]`; NaN counts as minus infinity."""
        values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        count = int(self.groups.max()) + 1
        index = self.groups.to(values.device).expand_as(values)
        start = torch.full((len(values), count), -torch.inf, dtype=values.dtype, device=values.device)
        return start.scatter_reduce(1, index, values, "amax")

    def slack(self, outputs: Tensor) -> Tensor:
        """$C z - t$ of outputs `[B, K]`, `[B, R]`."""
        return outputs @ self.C.to(outputs).T - self.t.to(outputs)

    def violated(self, outputs: Tensor) -> Tensor:
        """Which outputs `[B, K]` violate the property."""
        return (self.by_group(self.slack(outputs)) <= 0).any(1) & outputs.isfinite().all(1)


def classification(label: int, classes: int, dtype: torch.dtype = torch.float64) -> Property:
    """Class `label` against all others: $z_y - z_j > 0$."""
    if not 0 <= label < classes or classes < 2:
        raise ValueError(f"expected a label from 0 to {classes - 1}, got {label}")
    others = [j for j in range(classes) if j != label]
    C = torch.zeros(len(others), classes, dtype=dtype)
    C[:, label] = 1
    C[torch.arange(len(others)), others] = -1
    return Property.rows(C)


@dataclass(frozen=True, repr=False)
class Verdict(Shown):
    """What a verifier says.

    Attributes:
        status: `"verified"`, `"falsified"` or `"unknown"`.
        witness: an input of the box that violates the property, of the input's shape.
        seconds: seconds that it took.
        boxes: number of boxes that were bounded.
    """

    status: Status
    witness: Tensor | None = None
    seconds: float = 0.0
    boxes: int = 0


@runtime_checkable
class Verifier(Protocol):
    """Decides whether a classifier has one label on a whole box."""

    def verify(self, model: nn.Module, lower: Tensor, upper: Tensor, label: int, timeout: float = 60.0) -> Verdict: ...
