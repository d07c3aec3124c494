"""A network twice as wide as its two members, whose weights are mixed from templates, and how a user's network gets there.

Reference:
    Pham et al., "MixtureGrowth: Growing Neural Networks by Recombining Learned Parameters", WACV 2024.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import finite, one_of, positive
from torchfolio.efficiency.halves import NORMS, find_halves, shrink_norm
from torchfolio.efficiency.template_layers import (
    Frozen,
    HalvesLayerNorm,
    Init,
    TemplateBank,
    TemplateHalf,
    TemplateLayer,
    dressed,
    half_subsample,
    mix,
)
from torchfolio.engine import seeded
from torchfolio.measure import count_flops
from torchfolio.models.resnet import Subsample

__all__ = ["GrowableModel", "templatize"]


def templatize(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    templates: int | TemplateBank = 2,
    skip: Collection[str] = (),
    halve: Mapping[type[nn.Module], Callable[[Any, int], nn.Module]] | None = None,
) -> GrowableModel:
    r"""Prepare a network to be trained as two networks of half its width first, and grown to its full width then.

    Every layer with weights $W \in \mathbb{R}^{O \times I \times \dots}$ is cut into blocks of half its outputs and
    inputs, each a mixture of trainable templates with trainable coefficients, $W_m = \sum_t \alpha_{m,t} T_{m \bmod
    2,t}$. Blocks 0 and 1 are the layers of the two members; growth puts them on the diagonal,

    $$ W = \begin{pmatrix} W_0 & W_2 \\ W_3 & W_1 \end{pmatrix}, $$

    and mixes blocks 2 and 3 anew from the templates already learned. Layers that read the raw input are stacked,
    $(W_0; W_1)$, those that give the output stand side by side, $(W_0, W_1)$, with the sum of the members' biases.
    Normalization works channel by channel: that of the grown network is the members' joined. A `LayerNorm` becomes one
    of each half, a `GroupNorm` keeps its groups.

    Args:
        model: network of full width. It gives the architecture; its weights are not used, it is left as it is.
        example: inputs of it, a few examples.
        templates: number T of templates of each set, at least 1; or a bank, by which layers of equal shape share
            theirs. Orthogonal growth needs 2.
        skip: names of modules on the raw input that are kept whole, frozen, and shared by members and grown network.
        halve: for modules without weights that count channels (such as `Unflatten`), by type, a function from one
            and the member, 0 or 1, to the member's.

    Returns:
        The growable model, with both members initialised.

    Raises:
        TypeError: if a layer's halves are unknown (convolutions, `Linear`, `Embedding` and normalization have halves).
        ValueError: if the halves are not defined, or a network of half the width cannot run; with the layer's name.

    Example:
        >>> wide = templatize(torchfolio.models.resnet20(), images[:2], templates=4)
        >>> for i in range(2):
        ...     fit(wide.train_member(i), train, epochs=10)
        >>> wide.grow("orthogonal")
        >>> fit(wide, train, epochs=4)
        >>> net = wide.export()

    Reference:
        Pham, Teterwak, Nelson, Plummer, "MixtureGrowth: Growing Neural Networks by Recombining Learned Parameters",
        WACV 2024, section 3.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(x, Tensor) and len(x) for x in inputs):
        raise ValueError("expected example to be a tensor, or several, with at least one example")
    for x in inputs:
        finite("example", x)
    if isinstance(skip, str):
        raise TypeError(f"expected names of modules, such as [{skip!r}], got {skip!r}")
    pairs = find_halves(model, inputs, skip)
    bank = templates if isinstance(templates, TemplateBank) else TemplateBank(templates, shared=False)
    cuts = {Subsample: half_subsample, **(halve or {})}
    parts: list[dict[int, nn.Module]] = [{}, {}, {}]  # the replacements in the grown network and in either member
    for name, module in model.named_modules():
        if name in skip:
            frozen = Frozen(copy.deepcopy(module))
            for part in parts:
                part[id(module)] = frozen
        elif type(module) in cuts:
            for member in (0, 1):
                parts[1 + member][id(module)] = cuts[type(module)](module, member)
        elif name in pairs and type(module) in NORMS:
            whole_norm = HalvesLayerNorm(module) if isinstance(module, nn.LayerNorm) else copy.deepcopy(module)
            for part, norm in zip(parts, (whole_norm, shrink_norm(module), shrink_norm(module)), strict=True):
                part[id(module)] = norm
        elif name in pairs:
            layer = TemplateLayer(module, pairs[name], bank)
            for part, part_half in zip(parts, (layer, TemplateHalf(layer, 0), TemplateHalf(layer, 1)), strict=True):
                part[id(module)] = part_half
    # What a copy finds in its memo takes the original's place.
    net, *members = (copy.deepcopy(model, dict(part)) for part in parts)
    norms = {name: halves.inputs for name, halves in pairs.items() if type(model.get_submodule(name)) in NORMS}
    growable = GrowableModel(net, members, norms)
    _check_halves(growable, inputs)
    return growable


def _check_halves(growable: GrowableModel, inputs: tuple[Tensor, ...]) -> None:
    """Grow a copy by zeros: it must be the sum of its members, also where an operation between layers counts units."""
    trial = copy.deepcopy(growable).eval()
    with torch.no_grad(), seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is trained yet
        try:
            apart = trial(*inputs)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"a network of half the width cannot run: {error}") from error
        trial.grow("zero")
        together = trial(*inputs)
    tolerance = 1000 * torch.finfo(apart.dtype).eps
    if not torch.allclose(apart, together, rtol=tolerance, atol=tolerance):
        raise ValueError(
            "the network depends on its width beyond its layers: with zeros between the halves it is not their sum"
        )


class GrowableModel(nn.Module):
    """Two members of half the width, and the network that they grow into; made by `templatize`.

    Before growth it gives the sum of the members' outputs, from which zero growth starts; after it, the grown
    network's. Its state dict holds all three networks and whether it has grown, so that it loads into either state.

    Attributes:
        net: network of full width.
        grown: whether it has grown.
    """

    def __init__(self, net: nn.Module, members: Iterable[nn.Module], norms: Mapping[str, Tensor | None]) -> None:
        super().__init__()
        self.net, self.members = net, nn.ModuleList(members)
        self._norms = dict(norms)
        self.grown = False
        self._fixed = {name for name, p in net.named_parameters() if not p.requires_grad}
        self._select(self.members)

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.grown:
            return self.net(*inputs)
        return self.members[0](*inputs) + self.members[1](*inputs)

    def member(self, i: int) -> nn.Module:
        """A network of half the width, an ordinary module with its own parameters only: i is 0 or 1."""
        return self.members[one_of("member", i, (0, 1))]

    def train_member(self, i: int) -> nn.Module:
        """A member in training mode, with everything that is not the member's frozen.

        Raises:
            RuntimeError: after growth, where members share their weights with the grown network.
        """
        if self.grown:
            raise RuntimeError("the model has grown: its members are no longer trained by themselves")
        self._select([self.member(i)])
        return self.member(i).train()

    def grow(self, init: Init = "orthogonal", scale: float = 1.0, *, average: bool = False, seed: int = 0) -> None:
        """Join the members to the full width, and set the blocks between them; train the model itself afterwards.

        Args:
            init: coefficients of the new blocks: `"orthogonal"` to those learned on the same templates (least used by
                the others), `"zero"` (starts as the sum of the members), `"copy"` of those learned with a little
                noise, `"random"` uniform in [0, scale), or `"none"` for those drawn at the start.
            scale: norm of orthogonal coefficients, bound of random ones; positive.
            average: whether to give the mean of the members' outputs in place of their sum, which is over-confident;
                scales the layers that give the output, in the members too.
            seed: seed of random coefficients and noise.

        Raises:
            RuntimeError: if the model has grown already.
            ValueError: if the argument is unknown or out of range, or orthogonal growth has one template.
        """
        if self.grown:
            raise RuntimeError("the model has grown already")
        one_of("init", init, ("orthogonal", "zero", "copy", "random", "none"))
        positive("scale", scale)
        layers = [m for m in self.net.modules() if isinstance(m, TemplateLayer)]
        if init == "orthogonal" and any(m.blocks == 4 and len(m.alpha0) < 2 for m in layers):
            raise ValueError("orthogonal growth needs at least 2 templates, got 1")
        for i, member in enumerate(self.members):
            counts = [b for n, b in member.named_buffers() if n.endswith("num_batches_tracked")]
            if counts and not any(int(count) for count in counts):
                warnings.warn(f"member {i} was never run in training mode", stacklevel=2)
        with seeded(seed):
            for layer in layers:
                layer.start_growth(init, scale)
        with torch.no_grad():
            for p in (p for m in layers if average and not m.outputs_halved for p in _output_scale(m)):
                p.mul_(0.5)
            for name in self._norms:
                self._join_norm(name)
        self.grown = True
        self._select([self.net])

    def export(self, member: int | None = None) -> nn.Module:
        """A plain network with the mixed weights as its own: the grown one, or a member."""
        if member is None and not self.grown:
            raise RuntimeError("the model has not grown yet; grow it, or export a member")
        source = self.net if member is None else self.member(member)
        memo: dict[int, Any] = {}
        for module in source.modules():
            if isinstance(module, TemplateLayer):
                memo[id(module)] = dressed(module.plain, module.weight_for(), module.bias_for())
            elif isinstance(module, TemplateHalf):
                weight = mix(module.alpha[None], module.templates)[0]
                memo[id(module)] = dressed(module.plain, weight, module.bias)
            elif isinstance(module, Frozen):
                memo[id(module)] = copy.deepcopy(module.module)
        plain = copy.deepcopy(source, memo)
        return plain.requires_grad_(True)

    def flops(self, *inputs: Tensor, member: int | None = None) -> int:
        """Operations of a forward pass of the grown network or a member, those of mixing the weights included."""
        return count_flops(self.net if member is None else self.member(member), *inputs)

    def _join_norm(self, name: str) -> None:
        norm = self.net.get_submodule(name)
        halves = [member.get_submodule(name) for member in self.members]
        order = self._norms[name]
        for tensors in ("_parameters", "_buffers"):
            for key, tensor in getattr(norm, tensors).items():
                parts = [getattr(half, tensors)[key] for half in halves]
                if tensor is not None and tensor.dim():
                    tensor.data[order.to(tensor.device) if order is not None else slice(None)] = torch.cat(parts)
                elif tensor is not None:
                    tensor.fill_(max(parts))

    def _select(self, trained: Iterable[nn.Module]) -> None:
        """Let these modules train, and nothing else."""
        self.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        for module in self.modules():
            if isinstance(module, Frozen):
                module.requires_grad_(False)
        for name in self._fixed:
            self.net.get_parameter(name).requires_grad_(False)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.grown)

    def set_extra_state(self, state: Tensor) -> None:
        self.grown = bool(state)
        self._select([self.net] if self.grown else self.members)


def _output_scale(layer: TemplateLayer) -> list[Tensor]:
    return [t for t in (layer.alpha0, layer.alpha1, layer.bias0, layer.bias1) if t is not None]
