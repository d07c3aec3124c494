"""The local heads of earlier rules (linear, DGL, PredSim, InfoPro) and the rule that trains with one of them.

They are the baselines of `torchfolio.local.auglocal` and the hosts of `torchfolio.local.man`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import default_loss
from torchfolio.engine.counting import IGNORED
from torchfolio.local.layered_network import Network, Shape, width
from torchfolio.local.local_model import ClassifierHead, LocalHead, LocalRule, Loss
from torchfolio.models.pools import GlobalPool, MeanPool2d

HeadFactory = Callable[[Shape, int], LocalHead]
Host = Literal["linear", "dgl", "predsim", "infopro"]


def linear_head(shape: Shape, classes: int, loss: Loss = default_loss) -> ClassifierHead:
    """Global average pool and one linear layer: greedy local learning.

    Args:
        shape: shape of the features of one example, `[C, H, W]`, `[T, D]` or `[D]`.
        classes: width of the logits.
        loss: criterion on (logits, targets).
    """
    return ClassifierHead(nn.Sequential(GlobalPool(), nn.Linear(width(shape), classes)), loss)


def dgl_head(shape: Shape, classes: int, loss: Loss = default_loss) -> ClassifierHead:
    """The head of decoupled greedy learning.

    Adaptive pool to a quarter of the resolution, three 1x1 convolutions of constant width, pool to at most 2x2,
    two bias-free layers of four times the width, and a linear layer. On features that are not images the
    convolutions are linear layers on the pooled features.

    Reference:
        Belilovsky, Eickenberg, Oyallon, "Decoupled Greedy Learning of CNNs", ICML 2020.
    """
    channels = width(shape)
    if len(shape) == 3:
        side = [math.ceil(s / 4) for s in shape[1:]]
        final = [min(2, s) for s in side]
        stem: list[nn.Module] = [MeanPool2d(tuple(side))]
        for _ in range(3):
            stem += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        stem += [MeanPool2d(tuple(final)), nn.Flatten()]
        flat = channels * final[0] * final[1]
    else:
        stem = [GlobalPool()]
        for _ in range(3):
            stem += [nn.Linear(channels, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU()]
        flat = channels
    hidden = 4 * channels
    for fan_in in (flat, hidden):
        stem += [nn.Linear(fan_in, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    return ClassifierHead(nn.Sequential(*stem, nn.Linear(hidden, classes)), loss)


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

    Reference:
        Nøkland, Eidnes, "Training Neural Networks with Local Error Signals", ICML 2019.
    """

    needs_labels = True

    def __init__(self, shape: Shape, classes: int, similarity_weight: float = 0.99) -> None:
        super().__init__()
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


def interpolate_weights(
    first: Sequence[float],
    last: Sequence[float],
    positions: Sequence[float],
    allow_negative: bool = False,
) -> list[tuple[float, ...]]:
    """Loss weights of the local blocks, linear from the first to the last: $\\lambda = (1-r)\\lambda^{(1)} + r\\lambda^{(2)}$.

    Args:
        first: weights at $r = 0$.
        last: weights at $r = 1$.
        positions: $r$ of every local block.
        allow_negative: whether to keep negative weights, which push features away from their task.

    Raises:
        ValueError: if a weight is negative and `allow_negative` is not set.
    """
    weights = [tuple((1 - r) * a + r * b for a, b in zip(first, last, strict=True)) for r in positions]
    for k, row in enumerate(weights):
        if min(row) < 0 and not allow_negative:
            raise ValueError(
                f"the loss weights of block {k} are {row} (position r = {positions[k]:.3g}), expected none below 0; "
                "use ratio='index' or pass allow_negative=True"
            )
    return weights


def stages(network_shapes: Sequence[Shape]) -> list[int]:
    """Stage of every layer, from 1: a new stage begins where the resolution falls (or, without one, the width grows)."""
    numbers, stage = [], 1
    for before, now in zip([network_shapes[0], *network_shapes], network_shapes, strict=False):
        if now[1:] != before[1:] if len(now) == 3 else width(now) > width(before):
            stage += 1
        numbers.append(stage)
    return numbers


class HostHeads:
    """Builds the heads of one host rule for the blocks of one network.

    Args:
        host: `"linear"`, `"dgl"`, `"predsim"`, `"infopro"`, or a callable `(shape, classes) -> LocalHead`.
        loss: criterion of the classifying hosts `"linear"` and `"dgl"`.
        mean: constants of the input's normalisation; InfoPro needs them.
        std: standard deviation, likewise.
        weights: InfoPro's $(\\lambda_1, \\lambda_2)$ at the first local block.
        last_weights: InfoPro's weights at the last local block; `None` keeps `weights` throughout.
        ratio: measure of how far along a block is. `"index"`: block j of the K-1 local ones is at $r_j = j/(K-2)$.
            `"stage"`: the stage number of the next layer over $K-2$, as in the published code of MAN, which leaves
            [0, 1] on few blocks.
        allow_negative: whether to keep negative weights.

    Raises:
        ValueError: if host or ratio are unknown.
    """

    def __init__(
        self,
        host: Host | HeadFactory,
        *,
        loss: Loss = default_loss,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        weights: tuple[float, float] = (5.0, 0.5),
        last_weights: tuple[float, float] | None = None,
        ratio: Literal["index", "stage"] = "index",
        allow_negative: bool = False,
    ) -> None:
        if not callable(host) and host not in ("linear", "dgl", "predsim", "infopro"):
            raise ValueError(f"expected host to be linear, dgl, predsim, infopro or a head factory, got {host!r}")
        if ratio not in ("index", "stage"):
            raise ValueError(f"expected ratio to be 'index' or 'stage', got {ratio!r}")
        self.host = host
        self.criterion = loss
        self.mean, self.std = mean, std
        self.weights, self.last_weights = weights, last_weights or weights
        self.ratio = ratio
        self.allow_negative = allow_negative

    def build(self, shapes: Sequence[Shape], network: Network) -> list[LocalHead]:
        """A head for every local block.

        Args:
            shapes: shapes of the features that each head reads.
            network: whole network, for its input, its widths and its stages.
        """
        classes = network.classes
        if callable(self.host):
            return [self.host(shape, classes) for shape in shapes]
        if self.host == "infopro":
            heads: list[LocalHead] = []
            for shape, (reconstruct, predict) in zip(shapes, self._weights(shapes, network), strict=True):
                weights = (reconstruct, predict)
                widest = max(network.dims)
                heads.append(InfoProHead(shape, classes, network.input_shape, self.mean, self.std, weights, widest))
            return heads
        if self.host == "predsim":
            return [PredSimHead(shape, classes) for shape in shapes]
        factory = linear_head if self.host == "linear" else dgl_head
        return [factory(shape, classes, self.criterion) for shape in shapes]

    def _weights(self, shapes: Sequence[Shape], network: Network) -> list[tuple[float, ...]]:
        last = max(len(shapes) - 1, 1)
        if self.ratio == "index":
            positions = [j / last for j in range(len(shapes))]
        else:
            stage = stages(network.shapes)
            # The published code reads the stage of the layer that follows the block.
            positions = [stage[group[-1] + 1] / last for group in network.groups[:-1]]
        return interpolate_weights(self.weights, self.last_weights, positions, self.allow_negative)


class LocalHeads(LocalRule):
    """Train every block by a head of an earlier local rule: the baseline of AugLocal, the host of MAN.

    Args:
        host: `"linear"`, `"dgl"`, `"predsim"`, `"infopro"`, or a callable `(shape, classes) -> LocalHead`.
        blocks: `None` takes every layer by itself; a number or names as in `LocalRule`.
        loss: criterion of the output and of the classifying hosts.
        mean: constants of the input's normalisation; the host InfoPro needs them.
        std: standard deviation, likewise.
        **options: options of `HostHeads`: `weights`, `last_weights`, `ratio`, `allow_negative`.
    """

    def __init__(
        self,
        host: Host | HeadFactory = "dgl",
        *,
        blocks: int | Sequence[str] | None = None,
        loss: Loss = default_loss,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        **options: object,
    ) -> None:
        super().__init__(blocks=blocks, loss=loss)
        self.heads = HostHeads(host, loss=loss, mean=mean, std=std, **options)  # pyright: ignore[reportArgumentType]

    def isolate(self, network: Network) -> tuple[list[nn.Module], list[LocalHead]]:
        shapes = [network.shapes[group[-1]] for group in network.groups[:-1]]
        return network.blocks, self.heads.build(shapes, network)
