"""AugLocal: local learning with auxiliary networks built from the layers that follow.

Chenxiang Ma, Jibin Wu, Chenyang Si, Kay Chen Tan, "Scaling Supervised Local Learning with Augmented Auxiliary
Networks", ICLR 2024, https://arxiv.org/abs/2402.17318.

Every hidden layer is trained by a loss of its own, so no backward pass crosses layers. What makes it work on
tens of layers is the auxiliary network: a small stack that copies the *architecture* of a few of the layers that
follow, spread evenly to the end of the network, and that is shallower the deeper its host layer lies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from torchfolio import checks
from torchfolio.engine import default_loss
from torchfolio.local.copied_layers import copy_architecture, halvings
from torchfolio.local.layered_network import Network, Shape, trace_shapes, width
from torchfolio.local.local_model import ClassifierHead, LocalHead, LocalRule, Loss
from torchfolio.measure import count_flops
from torchfolio.models.pools import GlobalPool

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AugLocal", "AuxiliaryPlan", "auxiliary_depths", "copy_architecture", "halvings", "select_layers"]

AuxFactory = Callable[[int, nn.Module, Shape, Shape], nn.Module]
Selection = Literal["uniform", "sequential", "repetitive"]


def auxiliary_depths(n_layers: int, aux_depth: int, tau: float = 0.5) -> list[int]:
    """Depth of the auxiliary network of every layer that has one, by pyramidal decay:

    $$d_l = \\max\\bigl(1, \\operatorname{round}(D(1 - \\tau r_l) + \\tau r_l)\\bigr), \\qquad r_l = l / (K' - 2),$$

    for $l = 0, \\dots, K'-2$ with $K' = L - D$ local modules. $D = 0$ gives zeros: a pooled linear head each.

    Args:
        n_layers: number of hidden layers $L$.
        aux_depth: maximal depth $D$.
        tau: pyramid coefficient $\\tau$, from 0 to 1; 0 keeps the depth constant.

    Raises:
        ValueError: if there is no layer, the depth is not below their number, or tau is out of range.
    """
    checks.whole("n_layers", n_layers, 1)
    checks.whole("aux_depth", aux_depth, 0, n_layers - 1)
    checks.between("tau", tau, 0, 1)
    modules = n_layers - aux_depth
    if aux_depth == 0:
        return [0] * (modules - 1)
    span = max(modules - 2, 1)  # with two modules there is one auxiliary network, at r = 0
    ratios = [l / span for l in range(modules - 1)]
    return [max(1, round(aux_depth * (1 - tau * r) + tau * r)) for r in ratios]


def select_layers(layer: int, depth: int, n_layers: int, selection: Selection = "uniform") -> list[int]:
    """Indices of the layers whose architecture the auxiliary network of `layer` copies.

    - `"uniform"`: $i_j = \\operatorname{round}(l + j (L - 1 - l) / d)$, $j = 1, \\dots, d$ (half to even), so the
      last one is always $L - 1$; all of $l + 1, \\dots, L - 1$ when there are no more than $d$.
    - `"sequential"`: $l + 1, \\dots, l + d$.
    - `"repetitive"`: $L - 1$, $d$ times.

    Raises:
        ValueError: if the layer is none of the `n_layers`, the depth is negative, or the selection is unknown.
    """
    checks.whole("n_layers", n_layers, 1)
    checks.whole("layer", layer, 0, n_layers - 1)
    checks.whole("depth", depth, 0)
    checks.one_of("selection", selection, ("uniform", "sequential", "repetitive"))
    left = n_layers - 1 - layer
    if selection == "repetitive":
        return [n_layers - 1] * depth
    if depth >= left:
        return list(range(layer + 1, n_layers))
    if selection == "sequential":
        return list(range(layer + 1, layer + 1 + depth))
    return [round(layer + j * left / depth) for j in range(1, depth + 1)]


@dataclass(frozen=True)
class AuxiliaryPlan:
    """How the auxiliary network of one layer is built.

    Attributes:
        layer: index of the host layer.
        selected: indices of the layers copied.
        shapes: shape of the features after each copied layer, without the batch; strides are the ratios of
            consecutive resolutions.
        parameters: number of weights of the auxiliary network, its classifier included.
        flops: floating-point operations of its forward pass for one example (two for a multiply-add).
    """

    layer: int
    selected: tuple[int, ...]
    shapes: tuple[Shape, ...]
    parameters: int
    flops: int

    @property
    def depth(self) -> int:
        """Number of copied layers."""
        return len(self.selected)


class AugLocal(LocalRule):
    """Train every layer by the loss of an auxiliary network made of the layers that follow.

    With $L$ hidden layers and maximal depth $D$ there are $K' = L - D$ modules. Module $l < K' - 1$ is layer
    $f_l$ with an auxiliary network $a_l$ of fresh weights,

    $$h_l = f_l(\\operatorname{sg}[h_{l-1}]), \\qquad \\ell_l = \\mathrm{CE}(a_l(h_l), y);$$

    the last module is $f_{K'-1}, \\dots, f_{L-1}$ and the classifier, trained by the output loss. The backward
    pass of $\\ell_l$ runs as soon as it is known and frees the graph of $f_l$ and $a_l$. Inference uses the user's
    network alone.

    The auxiliary network copies the type of the layers that `select_layers` names, at their widths, and halves
    the resolution where the network does (at most once a layer; leftover halvings fall to the global pool). It ends
    in a global average pool, a batch norm if it is no deeper than one layer, and a linear classifier.

    Args:
        aux_depth: maximal auxiliary depth $D$. 0 is greedy learning with linear heads; $L - 1$ is backprop.
        tau: pyramid coefficient $\\tau$ in [0, 1]; 0 keeps all auxiliary networks at depth $D$.
        selection: rule by which layers are copied: `"uniform"`, `"sequential"` or `"repetitive"`.
        widen: factor on the widths of the auxiliary layers.
        head_norm: batch norm before the classifier of auxiliary networks no deeper than one layer (the paper
            leaves it out on ImageNet).
        aux_factory: `(index, layer, in_shape, out_shape) -> nn.Module` builds the copy of one layer in place of
            `copy_architecture`. Shapes are those of one example, without the batch.
        blocks: blocks, see `LocalRule`.
        loss: criterion on (logits `[B, C]`, targets).

    Raises:
        ValueError: on settings out of range, and in `prepare` if $D > L - 1$.

    Shapes:
        Any network of sequential layers that ends in `[B, C]`; features may be maps `[B, C, H, W]`, tokens
        `[B, T, D]` or vectors `[B, D]`.

    Example:
        >>> result = fit(resnet20(), train, rule=AugLocal(aux_depth=3), epochs=5)

    Reference:
        Ma et al., ICLR 2024, section 3. Depths and uniform selection follow the paper's released code, the
        strides too where widths double; at other width ratios the traced resolutions decide.
    """

    def __init__(
        self,
        aux_depth: int = 2,
        *,
        tau: float = 0.5,
        selection: Selection = "uniform",
        widen: float = 1.0,
        head_norm: bool = True,
        aux_factory: AuxFactory | None = None,
        blocks: int | Sequence[str] | None = None,
        loss: Loss = default_loss,
    ) -> None:
        super().__init__(blocks=blocks, loss=loss)
        checks.between("tau", tau, 0, 1)
        checks.one_of("selection", selection, ("uniform", "sequential", "repetitive"))
        checks.positive("widen", widen)
        self.aux_depth = checks.whole("aux_depth", aux_depth, 0)
        self.tau = tau
        self.selection: Selection = selection
        self.widen = widen
        self.head_norm = head_norm
        self.aux_factory = aux_factory
        self.plan: list[AuxiliaryPlan] = []

    def isolate(self, network: Network) -> tuple[list[nn.Module], list[LocalHead]]:
        network = network.merged()
        n_layers = len(network.layers)
        if self.aux_depth > n_layers - 1:
            raise ValueError(
                f"aux_depth {self.aux_depth} leaves no local layer in a network of {n_layers} hidden layers; "
                f"expected at most {n_layers - 1}, which is plain backprop"
            )
        if self.aux_depth == n_layers - 1:
            warnings.warn(f"aux_depth {self.aux_depth} on {n_layers} hidden layers is plain backprop", stacklevel=3)
        depths = auxiliary_depths(n_layers, self.aux_depth, self.tau)
        heads: list[LocalHead] = []
        self.plan = []
        for l, depth in enumerate(depths):
            selected = select_layers(l, depth, n_layers, self.selection)
            net, shapes = self._auxiliary(network, l, selected)
            self._check(net, network, l)
            heads.append(ClassifierHead(net, self.loss))
            self.plan.append(_describe(l, selected, shapes, net, network.shapes[l]))
        local = len(depths)
        return [*network.layers[:local], nn.Sequential(*network.layers[local:], network.head)], heads

    def auxiliary_plan(self) -> pd.DataFrame:
        """The auxiliary networks of the prepared model, a row for each: layers copied, widths, weights, FLOPs."""
        import pandas as pd

        if self.model is None:
            raise RuntimeError("call prepare(model, example) before auxiliary_plan")
        rows = [
            {
                "layer": plan.layer,
                "depth": plan.depth,
                "selected": plan.selected,
                "shapes": plan.shapes,
                "parameters": plan.parameters,
                "flops": plan.flops,
            }
            for plan in self.plan
        ]
        return pd.DataFrame(rows, columns=["layer", "depth", "selected", "shapes", "parameters", "flops"])

    def _auxiliary(self, network: Network, host: int, selected: Sequence[int]) -> tuple[nn.Sequential, list[Shape]]:
        """Stack the copies of the selected layers and the classifier."""
        shape = network.shapes[host]
        # The width before widening drives the halvings, so that a wide auxiliary network downsamples alike.
        reference, pending = network.shapes[host], 0.0
        stack: list[nn.Module] = []
        shapes: list[Shape] = []
        for index in selected:
            target = network.shapes[index]
            pending += halvings(reference, target)
            stride = 2 if pending >= 1 else 1
            pending -= stride - 1
            reference = target
            out_shape = _out_shape(shape, target, stride, self.widen)
            layer = network.layers[index]
            before = network.shapes[index - 1] if index else network.input_shape
            if self.aux_factory is not None:
                part = self.aux_factory(index, layer, shape, out_shape)
            else:
                part = copy_architecture(layer, before, target, shape, out_shape)
            out_shape = _probe(part, shape)
            stack.append(part)
            shapes.append(out_shape)
            shape = out_shape
        stack.append(GlobalPool())
        if len(selected) <= 1 and self.head_norm:
            stack.append(nn.BatchNorm1d(width(shape)))
        stack.append(nn.Linear(width(shape), network.classes))
        return nn.Sequential(*stack), shapes

    def _check(self, net: nn.Module, network: Network, host: int) -> None:
        output = _probe(net, network.shapes[host])
        if output != (network.classes,):
            raise ValueError(
                f"the auxiliary network of layer {host} gives {output} for one example, "
                f"expected ({network.classes},), the network's output"
            )


def _out_shape(shape: Shape, target: Shape, stride: int, widen: float) -> Shape:
    wide = max(1, round(width(target) * widen))
    if len(shape) == 3:
        return (wide, *(max(1, -(-side // stride)) for side in shape[1:]))
    return (*shape[:-1], wide)


def _probe(net: nn.Module, shape: Shape) -> Shape:
    return trace_shapes([net], torch.zeros(2, *shape))[0]


def _describe(
    layer: int, selected: Sequence[int], shapes: Sequence[Shape], net: nn.Module, in_shape: Shape
) -> AuxiliaryPlan:
    parameters = sum(p.numel() for p in net.parameters())
    training = net.training
    flops = count_flops(net.eval(), torch.zeros(1, *in_shape))
    net.train(training)
    return AuxiliaryPlan(layer, tuple(selected), tuple(shapes), parameters, int(flops))
