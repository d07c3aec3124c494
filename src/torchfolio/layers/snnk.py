"""Scalable neural network kernels: feed-forward layers whose input and parameters meet in a dot product of m features.

$f(Wx + b)$ becomes $A\\,\\Phi(x)$ with fixed random features $\\Phi$ and a trained matrix $A$ of m columns, which starts
as $\\Psi(W, b)$. So m, and not the width of the input, sets the number of trained parameters; and layers in a row can be
bundled to one.

Reference:
    Sehanobish et al., Scalable Neural Network Kernels, ICLR 2024, arXiv 2310.13225, and the authors' code, from which
    initialisation, places of adapters and the ReLU features are. Replaced layers start from the weights of the old ones
    here, not from new ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
from torchfolio.layers.snnk_adapters import AdaptedLayer, SNNKAdapter, add_adapters
from torchfolio.layers.snnk_layer import SNNK, Kind, Where, affine_of, merge_linear, seeds_from
from torchfolio.models import replace_layers

__all__ = [
    "SNNK",
    "URF",
    "AdaptedLayer",
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

_ACTIVATIONS = ("activation", "activation_fn", "act", "act_fn", "intermediate_act_fn", "nonlinearity")


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
        model: trained network.
        where: `(name, module) -> bool`, which linear layers; in BERT those whose names end with `intermediate.dense`.
        m: number of random features; the layer gets smaller below $dl/(d + l)$.
        features: random features, see `SNNK`.
        activation: activation that is replaced by the identity: the name of an attribute beside the layer; `"auto"`
            finds the next module of an `nn.Sequential` or an attribute with a usual name; `None` leaves all in place.
        radius: radius, see `SNNK`.
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
            affine_of(layer)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'} cannot be replaced: {error}") from None
    activations = [] if activation is None else [_activation_of(model, name, activation) for name in matched]
    seeds = seeds_from(seed)

    def replaced(layer: nn.Module) -> nn.Module:
        weight, _ = affine_of(layer)
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
        attributes = [a for a in _ACTIVATIONS if name and callable(getattr(parent, a, None))]
        if len(attributes) == 1:
            return parent, attributes[0]
    raise ValueError(
        f"expected one activation after {name or 'the model'}, found none or several; give its name as activation, or "
        "None to leave it in place"
    )


def bundle(net: nn.Sequential, m: int, features: Kind = "relu", *, seed: int = 0) -> nn.Sequential:
    """Bundle a perceptron to one trained matrix on fixed features, $A\\,\\Phi_L(\\dots\\Phi_1(x))$.

    A linear layer with an activation becomes features; the next one's weight $W_2$ acts on them as $W_2 A_1$, and its
    features are taken of $\\Phi_1(x)$ itself: $f_2(W_2 A_1 \\Phi_1(x) + b_2) \\approx \\Psi_2(W_2 A_1, b_2)\\,
    \\Phi_2(\\Phi_1(x))$. This changes the function; a last linear layer without activation merges exactly.

    Args:
        net: a sequence of `nn.Linear`, activations and `SNNK`; dropout and `nn.Flatten` in front are kept or left out.
        m: number of random features for each layer.
        features: random features, see `SNNK`; they take the place of the activations.
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
    seeds, maps = seeds_from(seed), []
    A: Tensor | None = None  # the outputs so far are A times the features so far, plus a
    a: Tensor | None = None
    layers = [layer for layer in net if not isinstance(layer, nn.Dropout)]
    front = [layers.pop(0)] if layers and isinstance(layers[0], nn.Flatten) else []
    if not layers:
        raise ValueError("expected an nn.Sequential with linear layers, got one without")
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
