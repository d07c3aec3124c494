"""Physical local learning: deep networks of physical systems trained without a gradient through them.

Ali Momeni, Babak Rahmani, Matthieu Malléjac, Philipp del Hougne, Romain Fleury, "Backpropagation-free Training of Deep
Physical Neural Networks", Science 382 (2023), https://arxiv.org/abs/2304.11042.

Black boxes that can be measured but not differentiated alternate with small linear layers. Each of these learns, on
stored measurements, to tell a pass with the right label from one with a wrong label (`PhysicalLocalNet`), or data from
mixtures of them (`PhysicalLocalFeatures`, without labels). Systems are in `torchfolio.local.physical_systems`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, finite, labels, one_of, positive, whole
from torchfolio.data import Examples
from torchfolio.engine import seeded
from torchfolio.local.physical_systems import (
    KerrCavity,
    MeasuredSurrogate,
    MetasurfaceCavity,
    MultimodeOptics,
    PhysicalSystem,
    as_physical,
)

__all__ = [
    "CosineGoodness",
    "KerrCavity",
    "MeasuredSurrogate",
    "MetasurfaceCavity",
    "MultimodeOptics",
    "PhysicalBlock",
    "PhysicalLocalFeatures",
    "PhysicalLocalNet",
    "SquareGoodness",
    "as_physical",
    "convert",
    "hybrid_masks",
    "local_loss",
]

Encoder = Callable[[Tensor], Tensor]


def l2_encode(h: Tensor) -> Tensor:
    """$|h| / (\\lVert h\\rVert_2 + 10^{-6})$ of each row: amplitudes of unit power."""
    return h.abs() / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-6)


def two_bit_encode(h: Tensor) -> Tensor:
    """Two pixels of {0, 1} an entry: its quarter of the row's range, in binary. `[B, n] -> [B, 2n]`."""
    low, high = h.aminmax(dim=1, keepdim=True)
    unit = (h - low) / (high - low).clamp_min(torch.finfo(h.dtype).tiny)
    level = (unit * 4).floor().clamp(0, 3)
    return torch.stack(((level >= 2).to(h), (level % 2)), 2).flatten(1)


ENCODERS: dict[str, Encoder] = {"l2": l2_encode, "two_bit": two_bit_encode, "none": lambda h: h}


class CosineGoodness(nn.Module):
    """$G(z) = \\cos(|z|, p)$ with a fixed Gaussian direction $p$.

    $\\partial G/\\partial z = \\operatorname{sign}(z) \\odot (p - G\\,|z|/\\lVert z\\rVert)/\\lVert z\\rVert$, and $G$ does
    not change with the scale or sign of $z$.

    Args:
        features: width of $z$.
        activation: function in place of the absolute value, such as `F.gelu` for digital networks.
        seed: seed of the direction.
    """

    target: Tensor

    def __init__(self, features: int, activation: Callable[[Tensor], Tensor] = torch.abs, seed: int = 0) -> None:
        super().__init__()
        self.activation = activation
        p = torch.randn(features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("target", p / p.norm())

    def forward(self, z: Tensor) -> Tensor:
        """Goodness of each row, `[B, n] -> [B]`."""
        a = self.activation(z)
        # One product with the target, in place of a broadcast of it: this runs in every inner step.
        norm = torch.linalg.vector_norm(a, dim=1).clamp_min(torch.finfo(a.dtype).tiny)
        return a @ self.target.to(a) / norm

    def hand_over(self, z: Tensor) -> Tensor:
        """What the next block gets: $z$ itself."""
        return z


class SquareGoodness(nn.Module):
    """Hinton's goodness $\\frac1n \\sum_j z_j^2$; the next block gets rows of unit length, which do not carry it.

    Args:
        features: width of $z$.
        seed: not used; nothing is drawn.
    """

    def __init__(self, features: int, seed: int = 0) -> None:
        super().__init__()

    def forward(self, z: Tensor) -> Tensor:
        """Goodness of each row, `[B, n] -> [B]`."""
        return z.square().mean(1)

    def hand_over(self, z: Tensor) -> Tensor:
        """Rows of unit length."""
        return F.normalize(z, dim=1)


GOODNESS: dict[str, Callable[..., nn.Module]] = {"cos": CosineGoodness, "sq": SquareGoodness}


def local_loss(good: Tensor, bad: Tensor, theta: float = 4.0) -> Tensor:
    """$\\operatorname{mean} \\log(1 + e^{-\\theta (G^+ - G^-)})$ over pairs of goodness `[B]`; $\\log 2$ for equal ones."""
    return F.softplus(theta * (bad - good)).mean()


class PhysicalBlock(nn.Module):
    """A physical system and the linear layer on what it gives: $z = W\\,[\\Phi(\\operatorname{enc} h);\\, h] + b$.

    Args:
        physical: measured system, of `as_physical` or `torchfolio.local.physical_systems`.
        out_features: width of $z$.
        skip: whether the linear layer sees $h$ too. With it a network may pass the physics by: see `reliance`.
        encode: encoder of the system's inputs, `"l2"`, `"two_bit"`, `"none"`, or a function on `[B, n]`.
        goodness: goodness of $z$, `"cos"`, `"sq"`, or a module like `CosineGoodness`.
        theta: sharpness $\\theta$ of the local loss, positive.
        in_features: width of $h$; what the encoder asks for by default. Must be given with an encoder of yours.
        seed: seed of weights and goodness; differs between blocks.

    Attributes:
        linear: the only trained part.

    Raises:
        TypeError: if `physical` is not a system.
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        physical: PhysicalSystem,
        out_features: int,
        skip: bool = True,
        encode: str | Encoder = "l2",
        goodness: str | nn.Module = "cos",
        theta: float = 4.0,
        *,
        in_features: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(physical, PhysicalSystem):
            raise TypeError(f"expected a physical system (see as_physical), got {type(physical).__name__}")
        self.physical, self.skip, self.theta = physical, skip, positive("theta", theta)
        self.encode = encode if callable(encode) else ENCODERS[one_of("encode", encode, ENCODERS)]
        if in_features is None:
            if self.encode not in ENCODERS.values():
                raise ValueError("expected in_features beside an encoder function")
            in_features = physical.n_in // 2 if encode == "two_bit" else physical.n_in
        self.in_features = whole("in_features", in_features, 1)
        whole("out_features", out_features, 1)
        with seeded(seed):
            self.linear = nn.Linear(physical.n_out + (self.in_features if skip else 0), out_features)
        if isinstance(goodness, str):
            goodness = GOODNESS[one_of("goodness", goodness, GOODNESS)](out_features, seed=seed + 7919)
        self.goodness: Any = goodness

    @property
    def target(self) -> Tensor | None:
        """Fixed direction of the cosine goodness, `None` for another."""
        return getattr(self.goodness, "target", None)

    def measure(self, h: Tensor, name: str = "the physical layer") -> Tensor:
        """$[r; h]$ of one measurement, without a graph.

        Raises:
            ValueError: if the measurement has another shape than it should, or is not finite.
        """
        r = self.physical(self.encode(h.detach())).detach()
        if r.shape != (len(h), self.physical.n_out):
            raise ValueError(f"expected outputs [{len(h)}, {self.physical.n_out}] of {name}, got {list(r.shape)}")
        finite(f"the output of {name}", r)
        return torch.cat((r, h.detach()), 1) if self.skip else r

    def forward(self, h: Tensor) -> Tensor:
        """Measure and apply the linear layer, `[B, in_features] -> [B, out_features]`."""
        return self.linear(self.measure(h))

    def loss(self, s: Tensor) -> Tensor:
        """Local loss of stored $[r; h]$, good rows in the first half, their bad partners in the second."""
        good, bad = self.goodness(self.linear(s)).chunk(2)
        return local_loss(good, bad, self.theta)

    def reliance(self) -> float:
        """Share of the squared weights that stand on the physics; 1 without skip."""
        squares = self.linear.weight.detach().square().sum(0)
        return float(squares[: self.physical.n_out].sum() / squares.sum())


class _LocalNetwork(nn.Module):
    """Blocks in a row and their training; a subclass says what the pairs of a batch are."""

    mean: Tensor
    std: Tensor
    low: Tensor

    def __init__(
        self, blocks: Sequence[PhysicalBlock], num_classes: int, n_features: int, extra: int, standardize: bool
    ) -> None:
        super().__init__()
        self.standardize = standardize
        self.blocks: Any = nn.ModuleList(blocks)
        if not len(self.blocks):
            raise ValueError("expected at least one block, got none")
        self.num_classes = whole("num_classes", num_classes, 2)
        widths = [n_features + extra, *(block.linear.out_features for block in self.blocks)]
        for k, block in enumerate(self.blocks):
            if block.in_features != widths[k]:
                raise ValueError(f"expected block {k} to take {widths[k]} features, got {block.in_features}")
        self.n_features = n_features
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        self.register_buffer("low", torch.full((n_features,), float("nan")))  # until the scaling is fitted
        self.losses: list[list[float]] = []
        self._optimizers: list[torch.optim.Optimizer] = []

    def fit(
        self,
        data: Any,
        y: Any = None,
        *,
        epochs: int = 30,
        inner_steps: int = 10,
        lr: float = 2e-3,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Self:
        """Fit the scaling of the features to the data and train; weights go on from where they are.

        Args:
            data: inputs `[N, ...]`, or `Examples` or whatever these take, such as a `DataLoader`.
            y: labels `[N]`, where the data bring none.
            epochs: passes over the data.
            inner_steps: Adam steps on each measurement (the paper uses 10 to 25).
            lr: learning rate of Adam.
            batch_size: examples of a batch, `None` for all; a loader keeps its own.
            seed: seed of the negatives and of the order.

        Raises:
            ValueError: if data, labels or a setting are out of range.
        """
        examples = self._examples(data, y)
        x = torch.cat([self._flat(row[0]) for row in examples.batches(None)])
        if self.standardize:
            self.std.copy_(torch.where((std := x.std(0, correction=0)) > 0, std, 1))
            self.mean.copy_(x.mean(0))
            self.low.copy_(((x - self.mean) / self.std).amin(0))
        else:
            self.low.copy_(x.amin(0).clamp_max(0))
        self._optimizers = []
        return self.partial_fit(
            examples, epochs=epochs, inner_steps=inner_steps, lr=lr, batch_size=batch_size, seed=seed
        )

    def partial_fit(
        self,
        data: Any,
        y: Any = None,
        *,
        epochs: int = 1,
        inner_steps: int = 10,
        lr: float = 2e-3,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Self:
        """Train on with the scaling and the optimizers as they are, for example after the physics drifted; see `fit`."""
        if self.low.isnan().any():
            return self.fit(data, y, epochs=epochs, inner_steps=inner_steps, lr=lr, batch_size=batch_size, seed=seed)
        examples = self._examples(data, y)
        whole("epochs", epochs, 1), whole("inner_steps", inner_steps, 1), positive("lr", lr)
        if batch_size is not None:
            whole("batch_size", batch_size, 1)
        if not self._optimizers:
            self._optimizers = [torch.optim.Adam(block.linear.parameters(), lr=lr) for block in self.blocks]
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = lr
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            losses = [
                self._step(*self._pairs(*row, generator), inner_steps)
                for row in self._shuffled(examples, batch_size, generator)
            ]
            self.losses.append(torch.tensor(losses).mean(0).tolist())
        return self

    def _step(self, good: Tensor, bad: Tensor, inner_steps: int) -> list[float]:
        """One batch through all blocks; the loss of each after its inner steps."""
        losses = []
        for k, (block, optimizer) in enumerate(zip(self.blocks, self._optimizers, strict=True)):
            s = torch.cat((block.measure(good, f"layer {k}"), block.measure(bad, f"layer {k}")))
            for _ in range(inner_steps):
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss = block.loss(s)
                loss.backward()
                optimizer.step()
            losses.append(loss.item())  # pyright: ignore[reportPossiblyUnboundVariable]
            with torch.no_grad():
                good, bad = block.goodness.hand_over(block.linear(s)).chunk(2)
        return losses

    def layers(self, h: Tensor) -> list[Tensor]:
        """$z$ of every block for embedded inputs."""
        outputs = []
        with torch.no_grad():
            for k, block in enumerate(self.blocks):
                outputs.append(block.linear(block.measure(h, f"layer {k}")))
                h = block.goodness.hand_over(outputs[-1])
        return outputs

    def score(self, data: Any, y: Any = None) -> float:
        """Accuracy in [0, 1]."""
        right = [self.predict(x) == y.to(self.low.device) for x, y in self._examples(data, y).batches(512)]
        return float(torch.cat(right).float().mean())

    def predict(self, x: Any) -> Tensor:
        """Class of every example."""
        raise NotImplementedError

    @property
    def physical_calls(self) -> int:
        """Number of measurements of a batch, over all different systems."""
        return sum(system.calls for system in self._systems())

    def reset_calls(self) -> None:
        """Count measurements from 0 again."""
        for system in self._systems():
            system.reset_calls()

    def _systems(self) -> list[PhysicalSystem]:
        return list({id(block.physical): block.physical for block in self.blocks}.values())

    def _pairs(self, x: Tensor, y: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _shuffled(
        self, examples: Examples, batch_size: int | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Scaled inputs and labels, in batches of a new order."""
        device = self.low.device
        if examples.tensors is None or batch_size is None:
            for row in examples.batches(batch_size, device):
                yield self.scale(row[0]), row[-1] if len(row) > 1 else None
            return
        x, y = examples.tensors[0], examples.targets
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            yield self.scale(x[rows]), None if y is None else y[rows].to(device)

    def _examples(self, data: Any, y: Any) -> Examples:
        examples = Examples(data if y is None else (data, y))
        if examples.supervised:
            targets = examples.targets
            assert targets is not None
            labels(targets, self.num_classes)
        return examples

    def _flat(self, x: Tensor) -> Tensor:
        x = x.flatten(1).to(self.low)
        if x.shape[1] != self.n_features:
            raise ValueError(f"expected {self.n_features} features an example, got {x.shape[1]}")
        return finite("x", x)

    def scale(self, x: Any) -> Tensor:
        """Features as the blocks get them, 0 or more."""
        if self.low.isnan().any():
            raise ValueError("expected a fitted network; call fit first")
        return ((self._flat(torch.as_tensor(x)) - self.mean) / self.std - self.low).clamp_min(0)


class PhysicalLocalNet(_LocalNetwork):
    """A classifier of physical blocks; labels enter with the input.

    In each batch, block after block: both passes are measured once, $W$ takes `inner_steps` Adam steps on
    $\\operatorname{softplus}(-\\theta\\,(G^+ - G^-))$, and its new outputs are handed on. The class is the candidate label
    whose goodness, summed over blocks, is largest; all candidates are measured in one batch.

    Args:
        blocks: blocks in order; the first takes `n_features + num_classes` inputs, with `"overwrite"` `n_features`.
        num_classes: number of classes $C$, 2 or more.
        n_features: number of features of an example.
        label_slots: `"concat"` puts C slots before the features, `"overwrite"` takes the first C of them.
        label_value: value of the slot of the label: `"max"`, the largest feature of the example, or a number.
        standardize: whether features are standardised; without it they are only moved to be at least 0, which suits
            pixels, whose rare ones would else be the largest.

    Attributes:
        losses: local loss of every block, by epoch.

    Shapes:
        x: `[N, n_features]`, or any shape that flattens to it.

    Raises:
        ValueError: if widths do not fit, or a setting is out of range.

    Reference:
        Momeni et al. 2023, "Results", and the authors' scripts, whose settings the defaults are.

    Example:
        >>> block = PhysicalBlock(MultimodeOptics(64 + 10, 100), out_features=50)
        >>> net = PhysicalLocalNet([block], num_classes=10, n_features=64).fit(x, y)
    """

    def __init__(
        self,
        blocks: Sequence[PhysicalBlock],
        num_classes: int,
        n_features: int,
        label_slots: Literal["concat", "overwrite"] = "concat",
        label_value: Literal["max"] | float = "max",
        standardize: bool = True,
    ) -> None:
        one_of("label_slots", label_slots, ("concat", "overwrite"))
        whole("num_classes", num_classes, 2)
        concat = label_slots == "concat"
        whole("n_features", n_features, 1 if concat else num_classes)
        super().__init__(blocks, num_classes, n_features, num_classes if concat else 0, standardize)
        self.label_slots = label_slots
        self.label_value: str | float = label_value if label_value == "max" else at_least("label_value", label_value, 0)

    def embed(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Scaled features with the label in its slot; no label leaves the slots at 0."""
        slots = x.new_zeros(len(x), self.num_classes)
        if y is not None:
            fixed = self.label_value
            top = x.abs().amax(1, keepdim=True)
            value = top if isinstance(fixed, str) else torch.full_like(top, fixed)
            slots.scatter_(1, y.to(x.device)[:, None], value)
        return torch.cat((slots, x if self.label_slots == "concat" else x[:, self.num_classes :]), 1)

    def goodness(self, x: Any) -> Tensor:
        """Goodness of every candidate label in every block, `[N, C, L]`; all candidates in one batch."""
        x, C = self.scale(x), self.num_classes
        candidates = torch.arange(C, device=x.device).repeat(len(x))
        return self._judge(self.embed(x.repeat_interleave(C, 0), candidates)).unflatten(0, (len(x), C))

    def predict(self, x: Any) -> Tensor:
        """Candidate label of the largest summed goodness, `[N]`."""
        return self.goodness(x).sum(2).argmax(1)

    def layer_accuracy(self, x: Any, y: Tensor) -> Tensor:
        """Accuracy of each block by its own goodness alone, `[L]`."""
        return (self.goodness(x).argmax(1) == y.to(self.low.device)[:, None]).float().mean(0)

    def _judge(self, h: Tensor) -> Tensor:
        return torch.stack([b.goodness(z) for b, z in zip(self.blocks, self.layers(h), strict=True)], 1)

    def _pairs(self, x: Tensor, y: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if y is None:
            raise ValueError("expected labels beside the inputs, got none")
        return self.embed(x, y), self.embed(x, self.wrong_labels(y, generator))

    def wrong_labels(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """A uniformly random other label, for the whole batch at once."""
        shift = torch.randint(1, self.num_classes, (len(y),), generator=generator).to(y)
        return (y + shift) % self.num_classes


class PhysicalLocalFeatures(_LocalNetwork):
    """Blocks trained without labels, data against hybrids of two examples, and a ridge readout of their outputs.

    A hybrid is $m \\odot x_a + (1 - m) \\odot x_b$ with a smooth random mask $m$. Labels are used by the readout alone, on
    the outputs of all blocks but the first (of the first, if it is the only one).

    Args:
        blocks: blocks in order; the first takes as many inputs as an example has features.
        num_classes: number of classes of the readout.
        shape: shape of an example, in which masks are smooth: `(H, W)`, `(C, H, W)` or `(D,)`.
        ridge: penalty of the readout on standardised outputs, per example.
        standardize: see `PhysicalLocalNet`.
    """

    readout: Tensor

    def __init__(
        self,
        blocks: Sequence[PhysicalBlock],
        num_classes: int,
        shape: Sequence[int],
        ridge: float = 1e-3,
        standardize: bool = True,
    ) -> None:
        self.shape, self.ridge = tuple(shape), positive("ridge", ridge)
        n = int(torch.Size(self.shape).numel())
        super().__init__(blocks, num_classes, n, 0, standardize)
        width = sum(block.linear.out_features for block in self.blocks[1:] or self.blocks)
        self.register_buffer("readout", torch.zeros(2 * width + 1, num_classes))

    def features(self, x: Any) -> Tensor:
        """Signed and absolute outputs of the blocks that the readout sees, `[N, F]`."""
        outputs = self.layers(self.scale(x))
        z = torch.cat(outputs[1:] or outputs, 1)
        return torch.cat((z, z.abs()), 1)

    def fit_readout(self, x: Any, y: Tensor) -> Self:
        """Ridge regression of one-hot labels on the features, in float64."""
        y = labels(torch.as_tensor(y), self.num_classes).to(self.low.device)
        z = self.features(x).double()
        mean, std = z.mean(0), z.std(0, correction=0).clamp_min(1e-12)
        z, targets = (z - mean) / std, F.one_hot(y, self.num_classes).double()
        gram = z.mT @ z + self.ridge * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        weight = torch.linalg.solve(gram, z.mT @ (targets - targets.mean(0))) / std[:, None]
        self.readout.copy_(torch.cat((weight, targets.mean(0, keepdim=True) - mean[None] @ weight)))
        return self

    def predict(self, x: Any) -> Tensor:
        """Class of the largest output of the readout."""
        if not self.readout.any():
            raise ValueError("expected a fitted readout; call fit_readout first")
        return (self.features(x) @ self.readout[:-1] + self.readout[-1]).argmax(1)

    def _pairs(self, x: Tensor, y: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if len(x) < 2:
            raise ValueError("expected batches of two examples or more for hybrids, got one")
        # A shift of a random order: no example is its own partner.
        order = torch.randperm(len(x), generator=generator)
        partner = torch.empty_like(order).scatter_(0, order, order.roll(1)).to(x.device)
        m = hybrid_masks(len(x), self.shape, generator).flatten(1).to(x)
        return x, m * x + (1 - m) * x[partner]


def hybrid_masks(n: int, shape: Sequence[int], generator: torch.Generator, blurs: int = 6) -> Tensor:
    """Random masks of 0 and 1 with large patches: noise, blurred with (1/4, 1/2, 1/4) along each axis, over 0.5.

    Args:
        n: number of masks.
        shape: shape of an example, `(D,)`, `(H, W)` or `(C, H, W)`, whose channels share a mask.
        generator: source of randomness.
        blurs: number of passes.

    Returns:
        Masks `[n, *shape]`.
    """
    plane = tuple(shape[-2:])
    noise = torch.rand(n, *plane, generator=generator)
    for _ in range(blurs):
        for axis in range(1, noise.dim()):
            size = noise.shape[axis]
            before = noise.index_select(axis, torch.arange(-1, size - 1).clamp_min(0))
            after = noise.index_select(axis, torch.arange(1, size + 1).clamp_max(size - 1))
            noise = before / 4 + noise / 2 + after / 4
    mask = (noise > 0.5).float()
    return mask[:, None].expand(n, *shape) if len(shape) == 3 else mask


def convert(
    model: nn.Sequential,
    physical_map: Mapping[str, Callable[[Any], Any] | None],
    *,
    num_classes: int,
    n_features: int,
    **block: Any,
) -> PhysicalLocalNet:
    """Make a locally trained network of a sequence (physical, linear, physical, linear, …).

    Args:
        model: sequence in which each chosen layer stands before an `nn.Linear`, which starts from the same weights; it
            is left as it is. A linear layer as wide as the physics' inputs and outputs together gets the skip.
        physical_map: what stands for the chosen layers, by name: a callable, or `None` for the layer itself as a black
            box. Each is measured once with zeros to learn its width.
        num_classes: number of classes; the first layer takes that many slots before the features.
        n_features: number of features of an example.
        **block: further arguments of `PhysicalBlock`.

    Raises:
        TypeError: if the model is not a `nn.Sequential`.
        ValueError: if layers do not alternate, a name is unknown, or widths do not fit.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"expected an nn.Sequential, got {type(model).__name__}")
    children = dict(model.named_children())
    for name in physical_map:
        one_of("a name of physical_map", name, children)
    names, blocks, n_in = list(children), [], num_classes + n_features
    if len(names) % 2 or names[::2] != [name for name in names if name in physical_map]:
        raise ValueError(f"expected physical and linear layers in turn, got {names} with physical {list(physical_map)}")
    for k, (name, after) in enumerate(zip(names[::2], names[1::2], strict=True)):
        linear: Any = children[after]
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"expected nn.Linear after {name}, got {type(linear).__name__}")
        fn = copy.deepcopy(children[name]) if physical_map[name] is None else physical_map[name]
        assert fn is not None
        n_out = as_physical(fn, n_in, getattr(fn, "n_out", 1))(torch.zeros(1, n_in)).shape[-1]
        if linear.in_features not in (n_out, n_out + n_in):
            raise ValueError(f"expected {after} to take {n_out} or {n_out + n_in} features, got {linear.in_features}")
        system = as_physical(fn, n_in, n_out)
        new = PhysicalBlock(system, linear.out_features, linear.in_features > n_out, **{"seed": k, **block})
        with torch.no_grad():
            new.linear.weight.copy_(linear.weight)
            if linear.bias is not None:
                new.linear.bias.copy_(linear.bias)
            else:
                new.linear.bias.zero_()
        blocks.append(new)
        n_in = linear.out_features
    return PhysicalLocalNet(blocks, num_classes, n_features)
