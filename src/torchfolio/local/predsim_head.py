"""The head of prediction and similarity matching (Nøkland and Eidnes, ICML 2019)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine.counting import IGNORED
from torchfolio.local.layered_network import Shape, width
from torchfolio.local.local_model import LocalHead
from torchfolio.models.pools import GlobalPool, MeanPool2d


def similarity_matrix(features: Tensor) -> Tensor:
    """Cosine similarities between the centred examples of a batch, `[B, ...] -> [B, B]`.

    Feature maps are summarised by the standard deviation over positions of each channel first.
    """
    if features.dim() == 4 and features.shape[2] * features.shape[3] > 1:
        features = features.flatten(2).std(2)
    z = features.flatten(1)
    z = F.normalize(z - z.mean(1, keepdim=True), dim=1)
    return (z @ z.T).clamp(-1, 1)


class PredSimHead(LocalHead):
    """Prediction and similarity matching:

    $$\\ell = 0.99\\,\\lVert S(g(h)) - S(\\mathrm{onehot}(y)) \\rVert^2 / B^2 + 0.01\\,\\mathrm{CE}(W h, y).$$

    Args:
        shape: shape of the features of one example.
        classes: number of classes.
        similarity_weight: weight of the similarity term; the rest is the prediction's.

    Raises:
        ValueError: if the features are neither images nor tokens nor vectors.

    Reference:
        Nøkland, Eidnes, "Training Neural Networks with Local Error Signals", ICML 2019.
    """

    needs_labels = True

    def __init__(self, shape: Shape, classes: int, similarity_weight: float = 0.99) -> None:
        super().__init__()
        if len(shape) > 3:
            raise ValueError(f"expected features [C, H, W], [T, D] or [D], got {list(shape)}")
        channels = width(shape)
        self.classes = classes
        self.similarity_weight = similarity_weight
        self.project = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            if len(shape) == 3
            else nn.Linear(channels, channels, bias=False)
        )
        if len(shape) == 3:
            # The prediction sees at most 2,048 numbers, as in the published rule.
            side = max(1, math.isqrt(2048 // channels))
            size = (min(side, shape[1]), min(side, shape[2]))
            self.predict = nn.Sequential(
                MeanPool2d(size), nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes)
            )
        else:
            self.predict = nn.Sequential(GlobalPool(), nn.Linear(channels, classes))

    def forward(self, features: Tensor) -> Tensor:
        return self.predict(features)

    def loss(self, features: Tensor, x: Tensor, y: Tensor) -> Tensor:
        counted = y != IGNORED  # the others resemble nobody
        target = similarity_matrix(F.one_hot(y[counted], self.classes).to(features.dtype))
        similarity = F.mse_loss(similarity_matrix(self.project(features)[counted]), target)
        a = self.similarity_weight
        return a * similarity + (1 - a) * F.cross_entropy(self.predict(features), y)
