"""Bounds through max pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.shown import Shown

__all__ = ["MaxPool", "looks_past"]


class MaxPool(Shown):
    """A max pool $y = \\max_{i \\in W} x_i$ over windows, between two linear functions of its inputs in $[l, u]$.

    Below lies the input of the largest lower bound, $x_k$ with $k = \\operatorname{argmax}_i l_i$. Above lies the same input
    where no other can exceed it, $l_k \\ge u_i$ for all $i \\ne k$, and the constant $\\max_i u_i$ elsewhere.

    Args:
        layer: layer, without `ceil_mode` and `return_indices`.

    Raises:
        TypeError: on those.
    """

    def __init__(self, layer: nn.MaxPool2d) -> None:
        if layer.ceil_mode or layer.return_indices:
            raise TypeError("interval bounds of MaxPool2d are known without ceil_mode and return_indices")
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer; monotone, so that intervals go through by their ends."""
        return self.layer(x)

    def checked(self, sides: tuple[int, ...]) -> MaxPool:
        """Itself, for images of such height and width.

        Raises:
            TypeError: if a window lies in the padding alone, of which the largest value is minus infinity.
        """
        if looks_past(self.layer, sides):
            raise TypeError(f"a window of MaxPool2d reads nothing of images of {sides[0]}x{sides[1]} but their padding")
        return self

    def backward(
        self, A: Tensor, low: Tensor, high: Tensor, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Coefficients on the outputs `[B, R, C, h, w]` to those on the inputs, and what the constants give `[B, R]`.

        With `sizes`, bounds on absolute values of the inputs, also the sum of the coefficients over them.
        """
        place, sure, top = self._chosen(low, high)
        positive, negative = A.clamp_min(0), A.clamp_max(0)
        coefficients = (positive + negative * sure[:, None]).flatten(3)
        shape = (max(len(A), len(low)), A.shape[1], *low.shape[1:])
        where = place.flatten(2)[:, None].expand(shape[0], A.shape[1], -1, -1)
        coefficients = coefficients.expand(shape[0], -1, -1, -1)
        back = (
            torch.zeros(shape, dtype=A.dtype, device=A.device)
            .flatten(3)
            .scatter_add(3, where, coefficients)
            .view(shape)
        )
        constant = (negative * torch.where(sure, torch.zeros_like(top), top)[:, None]).flatten(2).sum(2)
        absolute = None if sizes is None else (A.abs() * self.layer(sizes)[:, None]).flatten(2).sum(2)
        return back, constant, absolute

    def members(self, shape: tuple[int, ...]) -> list[list[int]]:
        """Of every output the places of its inputs in a flat input of a shape `[C, H, W]`."""
        size = torch.Size(shape).numel()
        places = self._windows(torch.arange(size, dtype=torch.float64).view(1, *shape))[0]
        return [
            [int(place) for place in window.tolist() if place >= 0] for window in places.transpose(1, 2).flatten(0, 1)
        ]

    def _chosen(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each window: the flat place of the input of the largest lower bound, whether none exceeds it, and $\\max u$."""
        lower, upper = self._windows(low.detach()), self._windows(high.detach())
        first = lower.argmax(2, keepdim=True)
        others = upper.scatter(2, first, -torch.inf).amax(2)
        sure = lower.gather(2, first)[:, :, 0] >= others
        side = torch.arange(low[0, 0].numel(), dtype=torch.float64, device=low.device).view(1, 1, *low.shape[2:])
        places = self._windows(side).expand(*lower.shape[:2], -1, -1)
        place = places.gather(2, first)[:, :, 0].long()
        top = self.layer(high)
        return place.view(top.shape), sure.view(top.shape), top

    def _windows(self, x: Tensor) -> Tensor:
        """The inputs of each window `[B, C, window, outputs]`; what pads them is minus infinity."""
        kernel, stride, padding, dilation = _pairs(self.layer)
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=-torch.inf)
        rows, columns = (
            torch.arange(0, size - reach * (k - 1), step, device=x.device)[:, None]
            + reach * torch.arange(k, device=x.device)
            for size, reach, k, step in zip(padded.shape[2:], dilation, kernel, stride, strict=True)
        )
        # [B, C, h, kh, w, kw], by places: unfold would make NaN of infinity.
        windows = padded[:, :, rows[:, :, None, None], columns[None, None]]
        return windows.permute(0, 1, 3, 5, 2, 4).flatten(4).flatten(2, 3)


def looks_past(layer: nn.MaxPool2d, sides: tuple[int, ...]) -> bool:
    """Whether a window reads only what pads images of such height and width; dilation can step over all of them."""
    for n, k, step, padding, reach in zip(sides, *_pairs(layer), strict=True):
        first = torch.arange(-padding, n + padding - reach * (k - 1), step)
        inside = first + reach * (-first).clamp_min(0).add(reach - 1).floor_divide(reach)  # the first place from 0 on
        if bool(((inside >= n) | (inside > first + reach * (k - 1))).any()):
            return True
    return False


def _pairs(layer: nn.MaxPool2d) -> list[tuple[int, int]]:
    """Kernel, stride, padding and dilation, of both axes each."""
    values = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return [value if isinstance(value, tuple) else (value, value) for value in values]
