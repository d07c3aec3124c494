"""Scalable neural network kernels: feed-forward layers whose input and parameters meet in a dot product of m features.

$f(Wx + b)$ becomes $A\\,\\Phi(x)$ with fixed random features $\\Phi$ and a trained matrix $A$ of m columns, which starts
as $\\Psi(W, b)$. So m, and not the width of the input, sets the number of trained parameters; and layers in a row can be
bundled to one.

Longer than most: a layer, two ways to put it into a user's network, and two ways to join layers.

Reference:
    Sehanobish et al., Scalable Neural Network Kernels, ICLR 2024, arXiv 2310.13225, and the authors' code, from which
    initialisation, places of adapters and the ReLU features are. Replaced layers start from the weights of the old ones
    here, not from new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.layers.bundled import BundledClassifier, BundledRegressor, ridge_solution
from torchfolio.layers.random_features import (
    URF,
    ArcCosineFeatures,
    FourierMeasure,
    RandomFeatures,
    best_damping,
    features_of,
    kernel_error,
)
from torchfolio.models import replace_layers

__all__ = [
    "SNNK",
    "URF",
    "ArcCosineFeatures",
    "BundledClassifier",
    "BundledRegressor",
    "FourierMeasure",
    "RandomFeatures",
    "SNNKAdapter",
    "add_adapters",
    "best_damping",
    "bundle",
    "kernel_error",
    "merge_linear",
    "replace_ffl",
    "ridge_solution",
]

Where = Callable[[str, nn.Module], bool]
Kind = str | FourierMeasure | Callable[..., RandomFeatures]

_ACTIVATIONS = ("activation", "activation_fn", "act", "act_fn", "intermediate_act_fn", "nonlinearity")


class SNNK(nn.Module):
    """A feed-forward layer $A\\,\\Phi(x)$ in place of $f(Wx + b)$: only A, of the size l x m, is trained.

    Args:
        in_features: size d of an input.
        out_features: number of outputs l.
        m: number of random features.
        features: `"relu"` (arc-cosine kernel), `"sin"`, `"cos"`, a `FourierMeasure` for any other function, or a factory
            `(in_features, m, bias=, radius=, seed=) -> RandomFeatures`, such as
            `functools.partial(ArcCosineFeatures, orthogonal=True)`.
        from_layer: linear layer whose weight and bias A starts from; drawn as those of `nn.Linear` by default.
        bias: whether the replaced layer has a bias, which is a part of A; what `from_layer` has, if it is given.
        radius: norm that inputs are brought to.
        calibration: inputs `[..., d]` to which the damping of Fourier features is fitted.
        seed: seed of the features; drawn from torch's global generator by default.
        device: device of the parameters.
        dtype: type of the parameters.

    Shapes:
        `[..., d]` to `[..., l]`; `weight` is `[l, m]`, or `[l, 2m]` for Fourier features (real and imaginary parts).

    Raises:
        ValueError: if sizes are out of range or do not fit.

    Example:
        >>> layer = SNNK(64, 128, m=16)
        >>> layer(torch.randn(2, 7, 64)).shape
        torch.Size([2, 7, 128])
    """

    features: RandomFeatures
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        m: int,
        features: Kind = "relu",
        from_layer: nn.Module | None = None,
        *,
        bias: bool = True,
        radius: float | None = None,
        calibration: Tensor | None = None,
        seed: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, whole("out_features", out_features, 1)
        if from_layer is None:
            bound = 1 / math.sqrt(whole("in_features", in_features, 1))
            weight = torch.empty(out_features, in_features).uniform_(-bound, bound)
            offsets = torch.empty(out_features).uniform_(-bound, bound) if bias else None
        else:
            weight, offsets = _affine(from_layer)
            if weight.shape != (out_features, in_features):
                raise ValueError(
                    f"expected a layer from {in_features} to {out_features} features, got {weight.shape[1]} to "
                    f"{weight.shape[0]}"
                )
        exact = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.detach().to("cpu", exact)
        offsets = None if offsets is None else offsets.detach().to(weight)
        self.features = features_of(features, in_features, m, bias=offsets is not None, radius=radius, seed=seed)
        self.features.to(exact)
        if calibration is not None and isinstance(self.features, URF):
            self.features.calibrate(calibration.to(weight), weight)
        self.weight = nn.Parameter(self.features.psi(weight, offsets))
        self.register_parameter("bias", None)
        self.to(device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        features, log_scale = self.features.scaled(input)
        if log_scale is None:
            return nn.functional.linear(features, self.weight, self.bias)
        output = nn.functional.linear(features, self.weight) * log_scale.exp()
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class SNNKAdapter(nn.Module):
    """An adapter with few parameters, the identity at first: $x + v \\odot \\mathrm{SNNK}(x)$.

    With a bottleneck k it is $x + V\\,\\mathrm{SNNK}(x)$, where SNNK goes to k features and V back to d. v and V start
    as 0, so that in the first step they alone have a gradient; their learning rate must not be below that of A.

    Args:
        d: size of an input.
        m: number of random features; 8 or 16 are usual.
        bottleneck: k, or `None` for none.
        features: see `SNNK`.
        radius: norm that inputs of the features are brought to.
        seed: seed of the features; drawn from torch's global generator by default.

    Shapes:
        `[..., d]` to `[..., d]`; $dm + d$ parameters, or $km + kd$ with a bottleneck.
    """

    def __init__(
        self,
        d: int,
        m: int,
        bottleneck: int | None = None,
        features: Kind = "relu",
        *,
        radius: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        width = d if bottleneck is None else whole("bottleneck", bottleneck, 1)
        self.kernel = SNNK(d, width, m, features, bias=False, radius=radius, seed=seed)
        self.scale = nn.Parameter(torch.zeros(d) if bottleneck is None else torch.zeros(d, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.kernel(x)
        return x + (y * self.scale if self.scale.dim() == 1 else nn.functional.linear(y, self.scale))


class AdaptedLayer(nn.Module):
    """A layer and an adapter of its output, or of the first tensor of a tuple; other attributes are the layer's."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("layer", "adapter"):  # not there yet, as in unpickling
                raise
            return getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.adapter(output[0]), *output[1:])
        return self.adapter(output)


def add_adapters(
    model: nn.Module,
    where: Where,
    m: int,
    *,
    dim: int | None = None,
    bottleneck: int | None = None,
    features: Kind = "relu",
    radius: float | None = None,
    train: Where | None = None,
    seed: int = 0,
) -> nn.Module:
    """Put adapters behind layers of a network in place, and freeze everything else. Outputs stay as they are.

    In a transformer they belong behind the linear layers that end the attention and the perceptron, before the residual
    sum: in BERT `lambda name, layer: name.endswith("output.dense")`.

    Args:
        model: the trained network.
        where: `(name, module) -> bool`, which layers.
        m: number of random features.
        dim: width of the layers' outputs; by default what they say themselves, as `nn.Linear` and norms do.
        bottleneck: see `SNNKAdapter`.
        features: see `SNNK`.
        radius: see `SNNK`.
        train: `(name, module) -> bool`, modules that are trained as well, such as the head or all `nn.LayerNorm`.
        seed: seed of the features, which differ from adapter to adapter.

    Returns:
        The network; the parameters that are trained have `requires_grad`. Names of wrapped layers get `.layer` added.

    Raises:
        ValueError: if no layer matches, a layer's width is unknown, or nothing matches `train`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> net = add_adapters(net, lambda name, layer: name == "0", m=4)
    """
    kept = (
        []
        if train is None
        else [p for n, layer in model.named_modules() if train(n, layer) for p in layer.parameters()]
    )
    if train is not None and not kept:
        raise ValueError("expected train to match modules with parameters, got none")
    seeds = _seeds(seed)
    added: list[nn.Module] = []

    def adapted(layer: nn.Module) -> nn.Module:
        adapter = SNNKAdapter(
            _width(layer) if dim is None else dim, m, bottleneck, features, radius=radius, seed=next(seeds)
        )
        added.append(adapter)
        return AdaptedLayer(layer, adapter)

    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        model = replace_layers(model, where, adapted)
    except Exception:
        for p, flag in flags:
            p.requires_grad_(flag)
        raise
    for p in [*kept, *(p for adapter in added for p in adapter.parameters())]:
        p.requires_grad_(True)
    return model


def replace_ffl(
    model: nn.Module,
    where: Where,
    m: int,
    *,
    features: Kind = "relu",
    activation: str | None = "auto",
    radius: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replace linear layers and the activations after them by SNNK layers in place, which start from their weights.

    The network is to be trained further: arc-cosine features do not approximate $\\mathrm{ReLU}(Wx + b)$.

    Args:
        model: the trained network.
        where: `(name, module) -> bool`, which linear layers; in BERT those whose names end with `intermediate.dense`.
        m: number of random features; the layer gets smaller below $dl/(d + l)$.
        features: see `SNNK`.
        activation: what is replaced by the identity: the name of an attribute beside the layer; `"auto"` finds the next
            module of an `nn.Sequential` or an attribute with a usual name; `None` leaves all in place.
        radius: see `SNNK`.
        seed: seed of the features, which differ from layer to layer.

    Returns:
        The network.

    Raises:
        ValueError: if no layer matches, one is not linear, or its activation is not found.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True)
        >>> layer = replace_ffl(layer, lambda name, layer: name.endswith("linear1"), m=4)
    """
    matched = {name: layer for name, layer in model.named_modules() if where(name, layer)}
    for name, layer in matched.items():
        try:
            _affine(layer)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'} cannot be replaced: {error}") from None
    activations = [] if activation is None else [_activation_of(model, name, activation) for name in matched]
    seeds = _seeds(seed)

    def replaced(layer: nn.Module) -> nn.Module:
        weight, _ = _affine(layer)
        new = SNNK(weight.shape[1], weight.shape[0], m, features, layer, radius=radius, seed=next(seeds))
        return new.requires_grad_(weight.requires_grad)

    model = replace_layers(model, lambda name, layer: name in matched, replaced)
    for parent, attribute in activations:
        if attribute not in parent._modules:
            parent.__dict__.pop(attribute, None)  # a function, such as that of nn.TransformerEncoderLayer
        setattr(parent, attribute, nn.Identity())
    return model


def _activation_of(model: nn.Module, name: str, activation: str) -> tuple[nn.Module, str]:
    above, _, own = name.rpartition(".")
    parent = model.get_submodule(above) if name else model
    if activation != "auto":
        if not name or not callable(getattr(parent, activation, None)):
            raise ValueError(f"expected an activation named {activation!r} beside {name or 'the model'}, got none")
        return parent, activation
    if isinstance(parent, nn.Sequential) and name:
        names = list(parent._modules)
        after = names[names.index(own) + 1 :][:1]
        if after and not any(True for _ in parent[names.index(after[0])].parameters()):
            return parent, after[0]
    else:
        found = [a for a in _ACTIVATIONS if name and callable(getattr(parent, a, None))]
        if len(found) == 1:
            return parent, found[0]
    raise ValueError(
        f"expected one activation after {name or 'the model'}, found none or several; give its name as activation, or "
        "None to leave it in place"
    )


def merge_linear(layer: SNNK, linear: nn.Module) -> SNNK:
    """One SNNK layer that equals a linear layer after an SNNK layer: $W(A\\Phi(x) + a) + b$. Exact.

    Args:
        layer: the first layer; it is left as it is, and its features are shared.
        linear: the second one.

    Raises:
        ValueError: if the sizes do not fit.
    """
    weight, bias = _affine(linear)
    if weight.shape[1] != layer.out_features:
        raise ValueError(f"expected a linear layer of {layer.out_features} inputs, got {weight.shape[1]}")
    merged = SNNK.__new__(SNNK)
    nn.Module.__init__(merged)
    merged.in_features, merged.out_features, merged.features = layer.in_features, len(weight), layer.features
    with torch.no_grad():
        merged.weight = nn.Parameter(weight @ layer.weight)
        offset = None if layer.bias is None else weight @ layer.bias
        offset = bias if offset is None else offset if bias is None else offset + bias
        merged.register_parameter("bias", None if offset is None else nn.Parameter(offset.detach().clone()))
    return merged.train(layer.training)


def bundle(net: nn.Sequential, m: int, features: Kind = "relu", *, seed: int = 0) -> nn.Sequential:
    """Bundle a perceptron to one trained matrix on fixed features, $A\\,\\Phi_L(\\dots\\Phi_1(x))$.

    A linear layer with an activation becomes features; the next one's weight $W_2$ acts on them as $W_2 A_1$, and its
    features are taken of $\\Phi_1(x)$ itself: $f_2(W_2 A_1 \\Phi_1(x) + b_2) \\approx \\Psi_2(W_2 A_1, b_2)\\,
    \\Phi_2(\\Phi_1(x))$. This changes the function; a last linear layer without activation merges exactly.

    Args:
        net: a sequence of `nn.Linear`, activations and `SNNK`; dropout and `nn.Flatten` in front are kept or left out.
        m: number of random features for each layer.
        features: see `SNNK`; they take the place of the activations.
        seed: seed of the features.

    Returns:
        The feature maps and an `nn.Linear` that holds A. The network is left as it is.

    Raises:
        ValueError: if there is something else in the sequence, or an SNNK layer that is not the first: its features
            are those of its inputs, and the weight that would act on other features is no longer known.
    """
    if not isinstance(net, nn.Sequential) or not len(net):
        raise ValueError(
            f"expected an nn.Sequential of layers, got {type(net).__name__} of {len(list(net.children()))}"
        )
    seeds, maps = _seeds(seed), []
    A: Tensor | None = None  # the outputs so far are A times the features so far, plus a
    a: Tensor | None = None
    layers = [layer for layer in net if not isinstance(layer, nn.Dropout)]
    front = [layers.pop(0)] if isinstance(layers[0], nn.Flatten) else []
    with torch.no_grad():
        for k, layer in enumerate(layers):
            linear = isinstance(layer, nn.Linear)
            if isinstance(layer, SNNK) and not maps and A is None:
                maps, A, a = [layer.features], layer.weight, layer.bias
            elif linear:
                W, b = layer.weight, layer.bias
                if A is not None:
                    shift = None if a is None else W @ a
                    W, b = W @ A, shift if b is None else b if shift is None else b + shift
                A, a = W, b
            elif isinstance(layer, SNNK) or any(True for _ in layer.parameters()):
                raise ValueError(f"expected Linear, activations or a first SNNK, got {type(layer).__name__} at {k}")
            elif k and isinstance(layers[k - 1], nn.Linear) and A is not None:
                own = features_of(features, A.shape[1], m, bias=a is not None, radius=None, seed=next(seeds)).to(A)
                maps.append(own)
                A, a = own.psi(A, a), None
            else:
                raise ValueError(f"expected every activation to follow a Linear, got {type(layer).__name__} at {k}")
        assert A is not None
        last = nn.Linear(A.shape[1], len(A), bias=a is not None, device=A.device, dtype=A.dtype)
        last.weight.copy_(A)
        if a is not None:
            last.bias.copy_(a)
    return nn.Sequential(*front, *maps, last).train(net.training)


def _affine(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `[l, d]` and bias of a linear layer; GPT-2's `Conv1D` has its weight the other way round."""
    if isinstance(layer, nn.Linear):
        return layer.weight, layer.bias
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        weight: Any = layer.weight
        bias: Any = layer.bias
        return weight.mT, bias
    raise ValueError(f"expected a linear layer, got {type(layer).__name__}")


def _width(layer: nn.Module) -> int:
    for name in ("out_features", "nf"):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    shape = getattr(layer, "normalized_shape", None)
    if shape is not None:
        return int(shape[-1])
    raise ValueError(
        f"expected dim for layers that do not say how wide their output is, such as {type(layer).__name__}, got None"
    )


def _seeds(seed: int) -> Iterator[int]:
    """Seeds that differ from layer to layer, and between neighbouring seeds."""
    generator = torch.Generator().manual_seed(whole("seed", seed, 0))
    while True:
        yield int(torch.randint(2**62, (), generator=generator))
