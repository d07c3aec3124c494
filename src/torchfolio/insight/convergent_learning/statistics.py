"""Correlations of the units of two layers, collected in one pass."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchfolio.insight.activations import layer_name, unit_rows
from torchfolio.measure import StreamingMoments, untouched
from torchfolio.models import take_features
from torchfolio.models.device import device_of
from torchfolio.shown import Shown

DEAD = 1e-6  # of the layer's largest deviation


@dataclass(frozen=True, repr=False)
class CorrelationBlocks(Shown):
    """Correlations within and between two layers, float64 on the CPU.

    A unit that never varies has no correlations: its rows and columns are NaN, and matching, prediction and
    clustering leave it out.

    Attributes:
        within_a: `[S_1, S_1]`.
        within_b: `[S_2, S_2]`.
        between: `[S_1, S_2]`.
        mean: mean of the units of both layers, `[S_1 + S_2]`.
        std: standard deviation, likewise.
        alive: masks of the units whose deviation exceeds 1e-6 of the largest one of its layer.
        count: samples.
        halves: blocks of every other example and of the rest, to fit on one and judge on the other; `None` where
            there are too few examples.
    """

    within_a: Tensor
    within_b: Tensor
    between: Tensor
    mean: Tensor
    std: Tensor
    alive: Tensor
    count: int
    halves: tuple[CorrelationBlocks, CorrelationBlocks] | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Units of both layers, dead ones included."""
        return self.between.shape[0], self.between.shape[1]

    @property
    def alive_a(self) -> Tensor:
        """Which units of the first layer vary, `[S_1]`."""
        return self.alive[: self.sizes[0]]

    @property
    def alive_b(self) -> Tensor:
        """Which units of the second layer vary, `[S_2]`."""
        return self.alive[self.sizes[0] :]

    @property
    def dead(self) -> tuple[int, int]:
        """Number of units of both layers that never vary."""
        return int((~self.alive_a).sum()), int((~self.alive_b).sum())

    def joint(self) -> Tensor:
        """Correlations of the units of both layers together, `[S_1 + S_2, S_1 + S_2]`."""
        top = torch.cat([self.within_a, self.between], 1)
        return torch.cat([top, torch.cat([self.between.T, self.within_b], 1)])

    def swapped(self) -> CorrelationBlocks:
        """The same with the layers exchanged."""
        mean, std, alive = (t.roll(-self.sizes[0]) for t in (self.mean, self.std, self.alive))
        halves = None if self.halves is None else (self.halves[0].swapped(), self.halves[1].swapped())
        return CorrelationBlocks(self.within_b, self.within_a, self.between.T, mean, std, alive, self.count, halves)


class PairStatistics(Shown):
    """Correlations of two layers from activations that arrive in batches.

    Sums run in float64 around running means, so nothing cancels however large the activations are. Even and odd
    examples are kept apart, which gives two independent halves whatever the sizes of the batches.

    Args:
        unit_dim: axis of the units in the activations; see `unit_rows`.
        every: stride over the positions of maps and tokens.

    Example:
        >>> statistics = PairStatistics()
        >>> for x in batches:
        ...     statistics.add(features_a(x), features_b(x))
        >>> blocks = statistics.finalize()
    """

    def __init__(self, unit_dim: int | None = None, every: int = 1) -> None:
        self.unit_dim, self.every = unit_dim, every
        self.examples = 0
        self._sizes: tuple[int, int] | None = None
        self._halves = (StreamingMoments(), StreamingMoments())

    def add(self, a: Tensor, b: Tensor) -> PairStatistics:
        """Add activations of the same examples.

        Args:
            a: features of the first layer, `[N, S_1]`, `[N, S_1, H, W]` or `[N, T, S_1]`.
            b: features of the second layer, likewise; as many positions as `a`.

        Raises:
            ValueError: if examples or positions differ in number, widths change, or a value is not finite.
        """
        rows = [unit_rows(t.detach(), self.unit_dim, self.every) for t in (a, b)]
        if rows[0].shape[:2] != rows[1].shape[:2]:
            shown = [f"{r.shape[0]} examples of {r.shape[1]} positions" for r in rows]
            raise ValueError(f"expected the same samples of both layers, got {shown[0]} and {shown[1]}")
        for t, name in zip(rows, ("first", "second"), strict=True):
            if not t.isfinite().all():
                raise ValueError(f"the activations of the {name} layer hold NaN or infinite values")
        sizes = rows[0].shape[2], rows[1].shape[2]
        if self._sizes not in (None, sizes):
            raise ValueError(f"expected layers of {self._sizes} units as before, got {sizes}")
        self._sizes = sizes
        # Joined in double precision: the layers may be of different dtypes and devices.
        both = torch.cat([rows[0].double(), rows[1].to(rows[0].device).double()], 2)
        for parity in (0, 1):
            share = both[(parity - self.examples) % 2 :: 2]
            if len(share):
                self._halves[parity].update(share.flatten(0, 1))
        self.examples += len(both)
        return self

    def finalize(self) -> CorrelationBlocks:
        """The correlations of what was added.

        Raises:
            ValueError: on fewer than two samples, or if a layer holds constant units alone.
        """
        if self._sizes is None:
            raise ValueError("expected at least one batch of activations, got none")
        total = StreamingMoments().merge(self._halves[0]).merge(self._halves[1])
        blocks = _blocks(total, self._sizes, None)
        widest = max(self._sizes)
        if blocks.count < 2 * widest:
            warnings.warn(
                f"{blocks.count} samples for {widest} units: correlations are noisy, expected at least {2 * widest}",
                stacklevel=2,
            )
        if any(half.count < 2 for half in self._halves):
            return blocks
        # A unit that is silent in one half alone keeps its place there, uncorrelated with all.
        halves = [_blocks(half, self._sizes, blocks.alive) for half in self._halves]
        return replace(blocks, halves=(halves[0], halves[1]))


def _blocks(moments: StreamingMoments, sizes: tuple[int, int], alive: Tensor | None) -> CorrelationBlocks:
    covariance = moments.covariance().cpu()
    std = covariance.diagonal().sqrt()
    first = sizes[0]
    varies = torch.cat([part > DEAD * part.max() for part in (std[:first], std[first:])])
    if alive is None:
        alive = varies
        for name, part in (("first", alive[:first]), ("second", alive[first:])):
            if not part.any():
                raise ValueError(f"all {len(part)} units of the {name} layer are constant: there is nothing to match")
    scale = torch.where(varies, std, torch.inf)
    correlation = (covariance / scale / scale[:, None]).clamp(-1, 1).fill_diagonal_(1)
    correlation[~alive] = torch.nan
    correlation[:, ~alive] = torch.nan
    a, b = slice(0, first), slice(first, None)
    return CorrelationBlocks(
        correlation[a, a], correlation[b, b], correlation[a, b], moments.mean.cpu(), std, alive, moments.count
    )


class ActivationStatistics(PairStatistics):
    """Correlations between a layer of one network and a layer of another, over batches of inputs.

    Args:
        module_a: a network.
        layer_a: one of its layers, by dotted name or as the module itself.
        module_b: another network, or the same one.
        layer_b: one of its layers.
        unit_dim: axis of the units in the activations; see `unit_rows`.
        every: stride over the positions of maps and tokens.

    Raises:
        ValueError: if a network has no such layer.

    Shapes:
        Layers that return `[N, S]`, `[N, S, H, W]` (every position is a sample) or `[N, T, S]` (every token is).

    Example:
        >>> statistics = ActivationStatistics(net, "layer1", other, "layer1")
        >>> for x in batches:
        ...     statistics.update(x)
        >>> match = bipartite_match(statistics.finalize().between)
    """

    def __init__(
        self,
        module_a: nn.Module,
        layer_a: str | nn.Module,
        module_b: nn.Module,
        layer_b: str | nn.Module,
        unit_dim: int | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(unit_dim, every)
        self.modules = module_a, module_b
        self.layers = layer_name(module_a, layer_a), layer_name(module_b, layer_b)

    @torch.no_grad()
    def update(self, batch: Tensor) -> ActivationStatistics:
        """Run both networks, in evaluation mode, on a batch `[N, ...]`."""
        seen = [activations(m, [name], batch)[name] for m, name in zip(self.modules, self.layers, strict=True)]
        self.add(*seen)
        return self


@torch.no_grad()
def activations(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """Outputs of named layers on one batch, in evaluation mode on the model's device."""
    device = device_of(model, x)
    with untouched(model, training=False), take_features(model, names, detach=True) as features:
        model(x.to(device))
        return dict(features.items())


def correlation_blocks(a: Tensor, b: Tensor, unit_dim: int | None = None) -> CorrelationBlocks:
    """Correlations of activations at hand.

    Args:
        a: `[N, S_1]`, `[N, S_1, H, W]` or `[N, T, S_1]`; a tensor or array.
        b: features of the same examples.
        unit_dim: axis of the units; see `unit_rows`.

    Raises:
        ValueError: as `PairStatistics`.
    """
    return PairStatistics(unit_dim).add(torch.as_tensor(a), torch.as_tensor(b)).finalize()
