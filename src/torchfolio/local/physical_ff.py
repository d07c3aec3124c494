"""Physical local learning: deep networks of physical systems trained without a gradient through them.

Ali Momeni, Babak Rahmani, Matthieu Malléjac, Philipp del Hougne, Romain Fleury, "Backpropagation-free Training of Deep
Physical Neural Networks", Science 382 (2023), https://arxiv.org/abs/2304.11042.

Black boxes that can be measured but not differentiated alternate with small linear layers. Each of these learns, on
stored measurements, to tell a pass with the right label from one with a wrong label (`PhysicalLocalNet`), or data from
mixtures of them (`PhysicalLocalFeatures`, without labels). Systems are in `torchfolio.local.physical_systems`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfolio.checks import at_least, one_of, whole
from torchfolio.local.kerr_cavity import KerrCavity
from torchfolio.local.measured_surrogate import MeasuredSurrogate
from torchfolio.local.metasurface_cavity import MetasurfaceCavity
from torchfolio.local.multimode_optics import MultimodeOptics
from torchfolio.local.physical_blocks import (
    CosineGoodness,
    PhysicalBlock,
    SquareGoodness,
    l2_encode,
    local_loss,
    two_bit_encode,
)
from torchfolio.local.physical_features import PhysicalLocalFeatures, hybrid_masks
from torchfolio.local.physical_network import LocalNetwork
from torchfolio.local.physical_systems import as_physical

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
    "l2_encode",
    "local_loss",
    "two_bit_encode",
]


class PhysicalLocalNet(LocalNetwork):
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
        physical_map: stand-ins for the chosen layers, by name: a callable, or `None` for the layer itself as a black
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
