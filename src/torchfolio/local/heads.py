"""The local heads of earlier rules (linear, DGL, PredSim, InfoPro) and the rule that trains with one of them.

They are the baselines of `torchfolio.local.auglocal` and the hosts of `torchfolio.local.man`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from torchfolio.engine import default_loss
from torchfolio.local.infopro_head import InfoProHead
from torchfolio.local.layered_network import Network, Shape, width
from torchfolio.local.local_model import ClassifierHead, LocalHead, LocalRule, Loss
from torchfolio.local.predsim_head import PredSimHead
from torchfolio.local.predsim_head import similarity_matrix as similarity_matrix
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
