"""Layers of quadratic neurons, and how a network gets them.

The layers of `torchfolio.layers.quadratic`, which trains them.

$$q(x) = (w_r \\cdot x + b_r)(w_g \\cdot x + b_g) + w_b \\cdot (x \\odot x) + b_b.$$
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from torchfolio.checks import one_of
from torchfolio.models import replace_layers

__all__ = ["QuadraticConv1d", "QuadraticConv2d", "QuadraticLayer", "QuadraticLinear", "to_quadratic"]

Geometry = tuple[list[int], list[int], list[int]]  # stride, padding, dilation of a convolution


class _OfSquares(torch.autograd.Function):
    """A linear map or convolution of the squares of `x`, which are computed again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
        return _operate(x.square(), weight, bias, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.geometry = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed, squares = list(ctx.needs_input_grad[:3]), x.square()
        if ctx.geometry is None:
            flat = grads[0].reshape(-1, len(weight))
            of_squares = grads[0] @ weight if needed[0] else None
            of_weight = flat.mT @ squares.reshape(-1, weight.shape[1]) if needed[1] else None
            of_bias = flat.sum(0) if needed[2] else None
        else:
            sizes, no_shift = [len(weight)], [0] * (weight.dim() - 2)
            of_squares, of_weight, of_bias = torch.ops.aten.convolution_backward(
                grads[0], squares, weight, sizes, *ctx.geometry, False, no_shift, 1, needed
            )
        return (2 * x * of_squares if needed[0] else None), of_weight, of_bias, None


def _operate(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    if geometry is None:
        return F.linear(x, weight, bias)
    convolution: Any = F.conv1d if weight.dim() == 3 else F.conv2d
    return convolution(x, weight, bias, *geometry)


class QuadraticLayer(nn.Module):
    """What the three layers have in common: the terms beside `weight` and `bias`, and the quadratic function."""

    weight: Tensor
    bias: Tensor | None
    weight_g: Tensor | None
    bias_g: Tensor | None
    weight_b: Tensor
    bias_b: Tensor | None
    compact: bool
    init: str
    channel: int

    def _add_terms(self, compact: bool, init: str) -> None:
        self.compact, self.init = bool(compact), one_of("init", init, ("relinear", "random"))
        like = self.weight
        self.weight_g = None if compact else nn.Parameter(torch.empty_like(like))
        self.bias_g = None if compact else nn.Parameter(torch.empty(len(like), dtype=like.dtype, device=like.device))
        self.weight_b = nn.Parameter(torch.empty_like(like))
        self.bias_b = None if self.bias is None else nn.Parameter(torch.empty_like(self.bias))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]
        if "init" not in self.__dict__:  # called by the ordinary layer, before the other terms are there
            return
        for term, bias, start in ((self.weight_g, self.bias_g, 1.0), (self.weight_b, self.bias_b, 0.0)):
            if term is not None:
                nn.init.kaiming_normal_(term, nonlinearity="relu") if self.init == "random" else nn.init.zeros_(term)
            if bias is not None:
                nn.init.constant_(bias, 0.0 if self.init == "random" else start)

    def _is_ordinary(self) -> bool:
        """Whether all quadratic terms are as ReLinear starts them, so that they need not be computed."""
        zero = [t for t in (self.weight_g, self.weight_b, self.bias_b) if t is not None]
        return not any(bool(t.any()) for t in zero) and (self.bias_g is None or bool((self.bias_g == 1).all()))

    def _prepared(self, x: Tensor) -> tuple[Tensor, Geometry | None]:
        """The input as the operation takes it, padded where that is no part of it."""
        return x, None

    def linear_part(self, x: Tensor) -> Tensor:
        """$w_r \\cdot x + b_r$, the output of the ordinary layer with these weights."""
        x, geometry = self._prepared(x)
        return _operate(x, self.weight, self.bias, geometry)

    def forward(self, input: Tensor) -> Tensor:
        plain = not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if plain and self._is_ordinary():
            return self.linear_part(input)
        x, geometry = self._prepared(input)
        device = x.device.type
        known = torch.amp.is_autocast_available(device)
        low = torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else None
        terms: Any = (x, self.weight_b, self.bias_b)
        squares: Any = _OfSquares.apply(*(t if low is None or t is None else t.to(low) for t in terms), geometry)
        if self.weight_g is None or self.bias_g is None:
            return _operate(x, self.weight, self.bias, geometry) + squares
        # One operation for both factors.
        biases = torch.cat([torch.zeros_like(self.bias_g) if self.bias is None else self.bias, self.bias_g])
        both = _operate(x, torch.cat([self.weight, self.weight_g]), biases, geometry)
        r, g = both.chunk(2, dim=self.channel)
        # Products overflow float16 early.
        return torch.addcmul(squares, r, g) if low is None else torch.addcmul(squares.float(), r.float(), g.float())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compact={self.compact}"


class QuadraticLinear(QuadraticLayer, nn.Linear):
    """A fully connected layer of quadratic neurons.

    Args:
        in_features: size of an input.
        out_features: number of neurons.
        bias: whether there are the biases $b_r$ and $b_b$; $b_g$ is always there.
        compact: whether the interaction is left out: $q(x) = w_r \\cdot x + b_r + w_b \\cdot (x \\odot x) + b_b$.
        init: `"relinear"` starts as the ordinary layer; `"random"` draws all weights, which often diverges.
        device: device of the parameters.
        dtype: type of the parameters.

    Shapes:
        `[..., in_features]` to `[..., out_features]`. `weight`, `weight_g`, `weight_b` are `[out, in]`; the state dict
        of an ordinary layer loads into `weight` and `bias` with `strict=False`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compact: bool = False,
        init: Literal["relinear", "random"] = "relinear",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._add_terms(compact, init)

    channel = -1


class _QuadraticConv(QuadraticLayer):
    """What the convolutions have in common; arguments are those of `nn.Conv1d` and `nn.Conv2d`."""

    dims: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def __init__(
        self,
        *args: Any,
        compact: bool = False,
        init: Literal["relinear", "random"] = "relinear",
        **kwargs: Any,
    ) -> None:
        ordinary = nn.Conv1d if self.dims == 1 else nn.Conv2d
        ordinary.__init__(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        if self.groups != 1:
            raise ValueError(f"quadratic convolutions have one group, got groups={self.groups}")
        self._add_terms(compact, init)

    @property
    def channel(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return -self.dims - 1

    def _prepared(self, x: Tensor) -> tuple[Tensor, Geometry | None]:
        padding: Any = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)  # pyright: ignore
            padding = [0] * self.dims
        return x, (list(self.stride), list(padding), list(self.dilation))

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == self.dims + 1:
            return super().forward(input[None])[0]
        return super().forward(input)


class QuadraticConv1d(_QuadraticConv, nn.Conv1d):
    """A 1-D convolution of quadratic neurons; arguments of `nn.Conv1d` (one group), `compact`, `init`.

    Shapes:
        `[B, C, L]` or `[C, L]`, as `nn.Conv1d`. Zero padding is zero before it is squared.
    """

    dims = 1


class QuadraticConv2d(_QuadraticConv, nn.Conv2d):
    """A 2-D convolution of quadratic neurons; arguments of `nn.Conv2d` (one group), `compact`, `init`.

    Shapes:
        `[B, C, H, W]` or `[C, H, W]`, as `nn.Conv2d`. Zero padding is zero before it is squared.
    """

    dims = 2


def to_quadratic(
    model: nn.Module,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    compact: bool = False,
) -> nn.Module:
    """Give a network quadratic neurons in place, with the outputs that it had.

    Linear and convolutional layers keep their weights as the linear part, the same `Parameter` objects: what was
    shared or frozen stays so.

    Args:
        model: network, trained or not.
        where: `(name, layer) -> bool`, which layers; all that can be by default.
        compact: whether the layer is compact, see `QuadraticLinear`.

    Returns:
        The network; the new layer, if the network is a single one.

    Raises:
        ValueError: if no layer matches, or `where` asks for a layer that has no quadratic form (grouped or transposed
            convolutions, the output projection of `nn.MultiheadAttention`, which never runs as a layer).

    Example:
        >>> net = to_quadratic(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    """
    left: list[str] = []

    def matches(name: str, module: nn.Module) -> bool:
        if isinstance(module, QuadraticLayer) or (where is not None and not where(name, module)):
            return False
        reason = _refusal(module)
        if reason is None:
            return True
        if where is not None:
            raise ValueError(f"{name or 'the model'} cannot become quadratic: {reason}")
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            left.append(f"{name} ({reason})")
        return False

    model = replace_layers(model, matches, lambda old: _converted(old, compact))
    if left:
        warnings.warn(f"these layers stay as they are: {', '.join(left)}", stacklevel=2)
    return model


def _refusal(module: nn.Module) -> str | None:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "it is the output projection of an attention, which never runs as a layer"
    if type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d):
        return f"expected Linear, Conv1d or Conv2d, got {type(module).__name__}"
    groups = getattr(module, "groups", 1)
    return None if groups == 1 else f"expected one group, got {groups}"


def _converted(old: nn.Module, compact: bool) -> nn.Module:
    like = {"bias": old.bias is not None, "device": "meta", "compact": compact}
    if isinstance(old, nn.Linear):
        new: Any = QuadraticLinear(old.in_features, old.out_features, **like)
    else:
        kind = QuadraticConv1d if isinstance(old, nn.Conv1d) else QuadraticConv2d
        geometry = {k: getattr(old, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        new = kind(old.in_channels, old.out_channels, old.kernel_size, **geometry, **like)
    new.to_empty(device=old.weight.device)  # pyright: ignore[reportArgumentType]
    new.to(old.weight.dtype)  # pyright: ignore[reportArgumentType]
    new.reset_parameters()
    new.weight, new.bias = old.weight, old.bias
    return new
