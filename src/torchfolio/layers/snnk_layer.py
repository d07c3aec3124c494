"""A feed-forward layer as a trained matrix on fixed random features, which `torchfolio.layers.snnk` puts into networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.layers.random_features import URF, FourierMeasure, RandomFeatures, features_of

__all__ = ["SNNK", "affine_of", "merge_linear", "seeds_from"]

Where = Callable[[str, nn.Module], bool]
Kind = str | FourierMeasure | Callable[..., RandomFeatures]


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
            weight, offsets = affine_of(from_layer)
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


def merge_linear(layer: SNNK, linear: nn.Module) -> SNNK:
    """One SNNK layer that equals a linear layer after an SNNK layer: $W(A\\Phi(x) + a) + b$. Exact.

    Args:
        layer: the first layer; it is left as it is, and its features are shared.
        linear: second one.

    Raises:
        ValueError: if the sizes do not fit.
    """
    weight, bias = affine_of(linear)
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


def affine_of(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `[l, d]` and bias of a linear layer; GPT-2's `Conv1D` has its weight the other way round."""
    if isinstance(layer, nn.Linear):
        return layer.weight, layer.bias
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        weight: Any = layer.weight
        bias: Any = layer.bias
        return weight.mT, bias
    raise ValueError(f"expected a linear layer, got {type(layer).__name__}")


def seeds_from(seed: int) -> Iterator[int]:
    """Seeds that differ from layer to layer, and between neighbouring seeds."""
    generator = torch.Generator().manual_seed(whole("seed", seed, 0))
    while True:
        yield int(torch.randint(2**62, (), generator=generator))
