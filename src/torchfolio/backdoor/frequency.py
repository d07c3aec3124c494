"""A trigger in the frequencies of an image's colours, the usual fixed one against contrastive learning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchfolio.backdoor.additive_trigger import AdditiveTrigger
from torchfolio.checks import at_least, whole

__all__ = ["ctrl_trigger"]

# Red, green and blue of one unit of U and one of V.
U, V = (0.0, -0.395, 2.032), (1.140, -0.581, 0.0)


def ctrl_trigger(
    shape: Sequence[int],
    magnitude: float = 50 / 255,
    window: int = 32,
    coefficients: Sequence[tuple[int, int]] | None = None,
    *,
    quantize: bool = True,
) -> AdditiveTrigger:
    """The trigger of CTRL: a constant added to some coefficients of the discrete cosine transform of U and V.

    The transform is linear and orthonormal, so this adds one fixed pattern, the sum of the coefficients' cosines, to
    every window of the image; images of one channel have no chroma and get it as it is.

    Args:
        shape: `[C, H, W]` of the images, C of 3 or 1.
        magnitude: addend in the scale of pixels in [0, 1]; the authors take 50/255 in training and 100/255 in tests.
        window: side of the windows; smaller images are one.
        coefficients: row and column of those changed; by default the middle one and the last, (15, 15) and (31, 31) of 32.
        quantize: whether to round images to eight bits.

    Raises:
        ValueError: on another number of channels, windows that do not tile the image, or coefficients outside them.

    Reference:
        Li et al., "An Embarrassingly Simple Backdoor Attack on Self-supervised Learning", ICCV 2023, section 4.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"expected images of one or three channels, got {channels}")
    window = min(whole("window", window, 1), height, width)
    if height % window or width % window:
        raise ValueError(f"expected windows that tile images of {height}x{width}, got {window}")
    at_least("magnitude", magnitude, 0)
    pattern = torch.zeros(window, window, dtype=torch.float64)
    for i, j in coefficients or ((window // 2 - 1, window // 2 - 1), (window - 1, window - 1)):
        high = window - 1
        pattern += torch.outer(_cosine(whole("row", i, 0, high), window), _cosine(whole("column", j, 0, high), window))
    tiled = magnitude * pattern.repeat(height // window, width // window)
    color = torch.tensor([[1.0]] if channels == 1 else [U, V], dtype=torch.float64).sum(0)
    return AdditiveTrigger((color[:, None, None] * tiled).float(), quantize)


def _cosine(frequency: int, window: int) -> Tensor:
    """One row of the orthonormal DCT-II."""
    place = torch.arange(window, dtype=torch.float64)
    scale = math.sqrt((1 if frequency == 0 else 2) / window)
    return scale * (math.pi * (2 * place + 1) * frequency / (2 * window)).cos()
