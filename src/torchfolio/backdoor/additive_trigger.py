"""Patterns that are added to an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.backdoor.keyed_random import keyed_uniform
from torchfolio.backdoor.trigger_base import Trigger

__all__ = ["ADDITIVE_SHAPES", "AdditiveTrigger"]

ADDITIVE_SHAPES = ("bigX", "chessboard", "static", "cross", "square", "lshape", "X", "pixel")


class AdditiveTrigger(Trigger):
    """A pattern that is added, $x' = \\operatorname{round}(255 (x + \\delta)) / 255$, clamped.

    Args:
        delta: $\\delta$, `[C, H, W]` or `[1, H, W]`.
        quantize: whether to round to whole grey levels, as a stored image is; the gradient passes straight through.
    """

    delta: Tensor

    def __init__(self, delta: Tensor, quantize: bool = True) -> None:
        super().__init__()
        if delta.dim() != 3 or not bool(delta.isfinite().all()):
            raise ValueError(f"expected a finite pattern [C, H, W], got shape {tuple(delta.shape)}")
        self.register_buffer("delta", delta.float())
        self.quantize = quantize

    @classmethod
    def shape(
        cls, name: str, shape: Sequence[int], amplitude: float = 15 / 255, *, seed: int = 0, quantize: bool = True
    ) -> AdditiveTrigger:
        """A pattern of constant amplitude.

        Args:
            name: `"bigX"` (both diagonals), `"chessboard"` (every other pixel), `"static"` (even rows and columns),
                or, small and at a place drawn by `seed`: `"cross"`, `"square"`, `"lshape"`, `"X"`, `"pixel"`.
            shape: `[C, H, W]` of the images.
            amplitude: amplitude of the pattern, in [0, 1].
            seed: seed of the place.
            quantize: whether to round to grey levels, see the class.
        """
        return cls(amplitude * _figure(name, shape[-2], shape[-1], seed)[None], quantize)

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        y = (x + self.delta.to(x)).clamp(0, 1)
        # Exactly the rounded values, with the gradient of y.
        return (255 * y).round().detach() / 255 + (y - y.detach()) if self.quantize else y

    def image_shape(self) -> Sequence[int]:
        return self.delta.shape

    def settings(self) -> dict[str, Any]:
        return {"quantize": self.quantize}


def _figure(name: str, height: int, width: int, seed: int) -> Tensor:
    """The ones of a pattern, `[H, W]`."""
    i, j = torch.arange(height)[:, None], torch.arange(width)
    whole = {
        "bigX": lambda: (i * (width - 1) // max(1, height - 1) == j) | (i * (width - 1) // max(1, height - 1) == width - 1 - j),
        "chessboard": lambda: (i + j) % 2 == 0,
        "static": lambda: (i % 2 == 0) & (j % 2 == 0),
    }  # fmt: skip
    if name in whole:
        return whole[name]().float()
    small = {
        "cross": [[0, 1, 0], [1, 1, 1], [0, 1, 0]],
        "square": [[1, 1], [1, 1]],
        "lshape": [[1, 0], [1, 0], [1, 1]],
        "X": [[1, 0, 1], [0, 1, 0], [1, 0, 1]],
        "pixel": [[1]],
    }
    if name not in small:
        raise ValueError(f"expected a shape among {', '.join(ADDITIVE_SHAPES)}, got {name!r}")
    figure, canvas = torch.tensor(small[name], dtype=torch.float32), torch.zeros(height, width)
    if height < len(figure) or width < len(figure[0]):
        raise ValueError(f"images of {height}x{width} are too small for the shape {name}")
    u = keyed_uniform(seed, torch.zeros(1, dtype=torch.long), (2,))[0]
    top, left = int(u[0] * (height - len(figure) + 1)), int(u[1] * (width - len(figure[0]) + 1))
    canvas[top : top + len(figure), left : left + len(figure[0])] = figure
    return canvas
