"""The head of information propagation (Wang et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.local.layered_network import Shape
from torchfolio.local.local_model import LocalHead
from torchfolio.models.pools import GlobalPool


class InfoProHead(LocalHead):
    """Information propagation: reconstruct the image and predict the label from the features,

    $$\\ell = \\lambda_1\\,\\mathrm{BCE}(w(h), \\text{image}) + \\lambda_2\\,\\mathrm{CE}(v(h), y).$$

    The decoder $w$ resizes to the image (bilinear, corners aligned), then conv 3x3 to 12 channels, BN, ReLU,
    conv 3x3 to the image's channels, sigmoid. The classifier $v$ is a 3x3 convolution (twice the width at
    stride 2; at the width `keep_width` the same width at stride 1), BN, ReLU, global pool, 128 units, ReLU, logits.

    Args:
        shape: `[C, H, W]` of the features.
        classes: number of classes.
        image_shape: `[C, H, W]` of the network's input.
        mean: per-channel mean that the input was normalised with; images are `x * std + mean`, in [0, 1].
        std: per-channel standard deviation, likewise.
        weights: $(\\lambda_1, \\lambda_2)$.
        keep_width: width of the network's last stage, whose features are not halved again.

    Raises:
        ValueError: if features or inputs are not images, or `mean` and `std` are missing.

    Reference:
        Wang et al., "Revisiting Locally Supervised Learning: an Alternative to End-to-end Training", ICLR 2021.
    """

    needs_labels = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        shape: Shape,
        classes: int,
        image_shape: Shape,
        mean: Sequence[float] | Tensor | None,
        std: Sequence[float] | Tensor | None,
        weights: tuple[float, float] = (5.0, 0.5),
        keep_width: int | None = None,
    ) -> None:
        super().__init__()
        if len(shape) != 3 or len(image_shape) != 3:
            raise ValueError(
                f"InfoPro reconstructs images: expected features and inputs [C, H, W], got {shape} and {image_shape}"
            )
        if mean is None or std is None:
            raise ValueError(
                "InfoPro compares with the image in [0, 1]: give mean and std, the constants the input was normalised with"
            )
        channels, colours = shape[0], image_shape[0]
        for name, value in (("mean", mean), ("std", std)):
            constants = torch.as_tensor(value, dtype=torch.get_default_dtype()).reshape(-1, 1, 1)
            if constants.shape[0] not in (1, colours):
                raise ValueError(f"expected {name} of {colours} channel(s), got {constants.shape[0]}")
            self.register_buffer(name, constants)
        self.weights = weights
        self.image_size = image_shape[1:]
        wide, stride = (channels, 1) if channels == keep_width else (2 * channels, 2)
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, wide, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            GlobalPool(),
            nn.Linear(wide, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )
        self.decoder = nn.Sequential(
            nn.Upsample(self.image_size, mode="bilinear", align_corners=True),
            nn.Conv2d(channels, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, colours, 3, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(features)

    def loss(self, features: Tensor, x: Tensor, y: Tensor) -> Tensor:
        reconstruct, predict = self.weights
        image = (x.detach() * self.std + self.mean).clamp(0, 1)
        # The sigmoid stands inside the criterion, which keeps it finite in half precision.
        loss = reconstruct * F.binary_cross_entropy_with_logits(self.decoder(features), image)
        return loss + predict * F.cross_entropy(self.classifier(features), y)
