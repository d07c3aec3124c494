"""Linear bounds of the units of convolutions by their receptive fields.

A unit behind convolutions depends on a window of what lies before them. Coefficients are held for this window alone, and
those of all channels at one position together: before the first activation they are even the same at every position. What
lies outside the input, in the padding of a convolution, has coefficients of no meaning, which are set to 0 before they count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.shown import Shown

__all__ = ["Window", "average_kernel", "pair", "windows"]


@dataclass(frozen=True, repr=False)
class Window(Shown):
    """Coefficients of units on windows of a layer.

    Attributes:
        A: coefficients `[B, P, Q, C, h, w]` of $Q$ rows at each of $P$ positions; `B` and `P` may be 1 where they do not
            matter yet.
        top: upper row of the window of each position `[P]`, negative in the padding.
        left: first columns, likewise.
        clean: whether coefficients outside the layer are 0.
    """

    A: Tensor
    top: Tensor
    left: Tensor
    clean: bool = True

    @classmethod
    def of_units(cls, channels: int, top: Tensor, left: Tensor, like: Tensor) -> Window:
        """Every channel at some positions, and its negative."""
        eye = torch.eye(channels, dtype=like.dtype, device=like.device)
        return cls(torch.cat([eye, -eye]).view(1, 1, 2 * channels, channels, 1, 1), top, left)

    @property
    def size(self) -> tuple[int, int]:
        return self.A.shape[4], self.A.shape[5]

    def taken(self, values: Tensor) -> Tensor:
        """Windows `[B, P, C, h, w]` of values `[B, C, H, W]`, 0 outside."""
        return windows(values, self.top, self.left, self.size)

    def weighed(self, values: Tensor, part: Tensor | None = None) -> Tensor:
        """$\\sum_i A_{ri} v_i$ `[B, P, Q]` of values `[B, C, H, W]`, or of another matrix than $A$."""
        A, v = (self.A if part is None else part).flatten(3), self.taken(values).flatten(2)
        if A.shape[:2] == (1, 1):
            return v @ A[0, 0].T
        return (A @ v[..., None])[..., 0]

    def cleaned(self, shape: tuple[int, ...]) -> Window:
        """With 0 outside a layer `[C, H, W]`."""
        if self.clean:
            return self
        inside = self.taken(torch.ones(1, 1, *shape[1:], dtype=self.A.dtype, device=self.A.device))
        return replace(self, A=self.A * inside[:, :, None], clean=True)

    def through(
        self, lines: tuple[Tensor, Tensor, Tensor, Tensor], sizes: Tensor | None
    ) -> tuple[Window, Tensor, Tensor | None]:
        """Behind an activation with lines `(slope, cut)` below and above; what intercepts give, and $\\sum |A| s$."""
        slope_low, cut_low, slope_high, cut_high = lines
        positive, negative = self.A.clamp_min(0), self.A.clamp_max(0)
        constant = self.weighed(cut_low, positive) + self.weighed(cut_high, negative)
        absolute = None if sizes is None else self.weighed(sizes.expand_as(cut_high), positive - negative)
        A = torch.addcmul(positive * self.taken(slope_low)[:, :, None], negative, self.taken(slope_high)[:, :, None])
        return replace(self, A=A, clean=True), constant, absolute

    def scaled(self, scale: Tensor, shift: Tensor) -> tuple[Window, Tensor]:
        """Before an elementwise affine layer, of which both are `[1, C, H, W]`."""
        return replace(self, A=self.A * self.taken(scale)[:, :, None], clean=True), self.weighed(shift)

    def convolved(self, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d | nn.AvgPool2d) -> tuple[Window, Tensor]:
        """Before a convolution."""
        stride, padding = pair(layer.stride), pair(layer.padding)
        dilation = pair(layer.dilation) if isinstance(layer, nn.Conv2d) else (1, 1)
        groups = layer.groups if isinstance(layer, nn.Conv2d) else weight.shape[0]
        flat = self.A.flatten(0, 2)
        back = F.conv_transpose2d(flat, weight, None, stride, 0, 0, groups, dilation)
        constant = self.A.new_zeros(self.A.shape[:3]) if bias is None else self.A.flatten(4).sum(4) @ bias
        moved = Window(
            back.view(*self.A.shape[:3], *back.shape[1:]), self.top * stride[0] - padding[0],
            self.left * stride[1] - padding[1], False,
        )  # fmt: skip
        return moved, constant

    def spread(self, shape: tuple[int, ...]) -> Tensor:
        """Coefficients on a whole layer, `[B, P Q, C, H, W]`."""
        whole = self.A.new_zeros(len(self.A), len(self.top), self.A.shape[2], *shape)
        (height, width), (h, w) = shape[1:], self.size
        A = self.A.expand(-1, len(self.top), -1, -1, -1, -1)
        for p, (t, l) in enumerate(zip(self.top.tolist(), self.left.tolist(), strict=True)):
            rows, columns = slice(max(t, 0), min(t + h, height)), slice(max(l, 0), min(l + w, width))
            inside = A[:, p, :, :, rows.start - t : rows.stop - t, columns.start - l : columns.stop - l]
            whole[:, p, :, :, rows, columns] = inside
        return whole.flatten(1, 2)


def windows(values: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Windows `[B, P, C, h, w]` of `[B, C, H, W]`, 0 outside."""
    (height, width), (h, w) = values.shape[2:], size
    above, before = max(0, -int(top.min())), max(0, -int(left.min()))
    below, behind = max(0, int(top.max()) + h - height), max(0, int(left.max()) + w - width)
    padded = F.pad(values, (before, behind, above, below))
    views = padded.unfold(2, h, 1).unfold(3, w, 1)
    return views[:, :, top + above, left + before].transpose(1, 2)


def average_kernel(layer: nn.AvgPool2d, channels: int, like: Tensor) -> Tensor:
    """The kernel of an average pool as a convolution of every channel by itself."""
    h, w = pair(layer.kernel_size)
    return torch.full((channels, 1, h, w), 1 / (h * w), dtype=like.dtype, device=like.device)


def pair(value: int | tuple[int, ...] | str) -> tuple[int, int]:
    """Two numbers, of both axes."""
    if isinstance(value, tuple):
        return value[0], value[1]
    return int(value), int(value)
