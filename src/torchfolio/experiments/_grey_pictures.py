"""Small grey pictures for denoisers, none of them nearly a copy of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics.harmonic_denoising import remove_repeats
from torchfolio.runs import Run


def grey(images: Tensor) -> Tensor:
    """Luminance."""
    if images.shape[1] == 1:
        return images
    return (images * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True)


def pictures(run: Run[Any]) -> tuple[Tensor, Tensor]:
    """Training pool and test images, without near-copies, in an order of the seed."""
    settings = run.settings
    data = run.data(settings.data, image_size=settings.image_size, normalize=False, train_size=settings.pool)
    images = grey(data.train.tensors[0])
    order = torch.randperm(len(images), generator=run.generator())
    images = images[order]
    images = images[remove_repeats(images)]
    return images[: -settings.test], images[-settings.test :]
