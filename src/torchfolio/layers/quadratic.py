"""Layers of quadratic neurons, and the ReLinear strategy by which networks of them can be trained.

A quadratic neuron multiplies two inner products of its input and adds an inner product with its squares,

$$q(x) = (w_r \\cdot x + b_r)(w_g \\cdot x + b_g) + w_b \\cdot (x \\odot x) + b_b,$$

in place of $w_r \\cdot x + b_r$. ReLinear starts with $w_g = 0, b_g = 1, w_b = 0, b_b = 0$, so that $q$ is the ordinary
neuron, and lets the quadratic terms grow slowly: by a smaller learning rate (`relinear_param_groups`) or by shrinking
them after every step (`ReLinearShrink`).

Reference:
    Fan et al., On Expressivity and Trainability of Quadratic Networks, arXiv 2110.06081. Shrinking of weights and the
    factor of the learning rate beyond the authors' two settings are our reading of Section III.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from torchfolio.checks import at_least, between, one_of
from torchfolio.measure import untouched
from torchfolio.models import replace_layers

__all__ = [
    "QuadraticConv1d",
    "QuadraticConv2d",
    "QuadraticLinear",
    "ReLinearShrink",
    "functional_dimension",
    "quadratic_strength",
    "relinear_param_groups",
    "to_quadratic",
]

Geometry = tuple[list[int], list[int], list[int]]  # stride, padding, dilation of a convolution


class _OfSquares(torch.autograd.Function):
    """A linear map or convolution of the squares of `x`, which are computed again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
        return _operate(x.square(), weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.geometry = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needed, squares = list(ctx.needs_input_grad[:2]), x.square()
        if ctx.geometry is None:
            of_squares = grads[0] @ weight if needed[0] else None
            flat = grads[0].reshape(-1, len(weight))
            of_weight = flat.mT @ squares.reshape(-1, weight.shape[1]) if needed[1] else None
        else:
            of_squares, of_weight, _ = torch.ops.aten.convolution_backward(
                grads[0], squares, weight, None, *ctx.geometry, False, [0] * (weight.dim() - 2), 1, [*needed, False]
            )
        return (2 * x * of_squares if needed[0] else None), (of_weight if needed[1] else None), None


def _operate(x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
    if geometry is None:
        return F.linear(x, weight)
    convolution: Any = F.conv1d if weight.dim() == 3 else F.conv2d
    return convolution(x, weight, None, *geometry)


class _Quadratic(nn.Module):
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
        return self._biased(_operate(x, self.weight, geometry), self.bias)

    def _biased(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + bias.view(-1, *[1] * (-self.channel - 1))

    def forward(self, input: Tensor) -> Tensor:
        plain = not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if plain and self._is_ordinary():
            return self.linear_part(input)
        x, geometry = self._prepared(input)
        device = x.device.type
        known = torch.amp.is_autocast_available(device)
        low = torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else None
        if self.weight_g is None:
            product = self._biased(_operate(x, self.weight, geometry), self.bias)
        else:
            # One operation for both factors.
            both = _operate(x, torch.cat([self.weight, self.weight_g]), geometry)
            r, g = both.chunk(2, dim=self.channel)
            r, g = self._biased(r, self.bias), self._biased(g, self.bias_g)
            # Products overflow float16 early.
            product = r * g if low is None else r.float() * g.float()
        weight_b = self.weight_b if low is None else self.weight_b.to(low)
        squares: Any = _OfSquares.apply(x if low is None else x.to(low), weight_b, geometry)
        return self._biased(product + squares, self.bias_b)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compact={self.compact}"


class QuadraticLinear(_Quadratic, nn.Linear):
    """A fully connected layer of quadratic neurons.

    Args:
        in_features: size of an input.
        out_features: number of neurons.
        bias: whether there are the biases $b_r$ and $b_b$; $b_g$ is always there.
        compact: whether the interaction is left out: $q(x) = w_r \\cdot x + b_r + w_b \\cdot (x \\odot x) + b_b$.
        init: `"relinear"` starts as the ordinary layer; `"random"` draws all weights, which often diverges.
        device: of the parameters.
        dtype: of the parameters.

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


class _QuadraticConv(_Quadratic):
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
        model: the network, trained or not.
        where: `(name, layer) -> bool`, which layers; all that can be by default.
        compact: see `QuadraticLinear`.

    Returns:
        The network.

    Raises:
        ValueError: if no layer matches, or `where` asks for a layer that has no quadratic form (grouped or transposed
            convolutions, the output projection of `nn.MultiheadAttention`, which never runs as a layer).

    Example:
        >>> net = to_quadratic(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    """
    left: list[str] = []

    def matches(name: str, module: nn.Module) -> bool:
        if isinstance(module, _Quadratic) or (where is not None and not where(name, module)):
            return False
        reason = _refusal(module)
        if reason is None:
            return True
        if where is not None:
            raise ValueError(f"{name or 'the model'} cannot become quadratic: {reason}")
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            left.append(f"{name} ({reason})")
        return False

    replace_layers(model, matches, lambda old: _converted(old, compact))
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


def _terms(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained quadratic parameters by role, each once."""
    found: dict[str, dict[int, nn.Parameter]] = {name: {} for name in ("weight_g", "bias_g", "weight_b", "bias_b")}
    layers = [m for m in model.modules() if isinstance(m, _Quadratic)]
    if not layers:
        raise ValueError("expected a network with quadratic layers, got one without; see to_quadratic")
    for layer in layers:
        for name, members in found.items():
            parameter: Any = getattr(layer, name)
            if parameter is not None and parameter.requires_grad:
                members[id(parameter)] = parameter
    return {name: list(members.values()) for name, members in found.items()}


def relinear_param_groups(
    model: nn.Module, lr: float, *, gamma: float | tuple[float, float] = 0.01, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer, by which the quadratic terms learn more slowly (ReLinear by shrinking gradients).

    Args:
        model: a network with quadratic layers; frozen parameters are left out.
        lr: learning rate $\\eta$ of everything else.
        gamma: $(\\gamma_g, \\gamma_b)$, factors of the rate of $w_g, b_g$ and of $w_b, b_b$; one number for both. At 0
            the network stays an ordinary one. Wide or unnormalised inputs need small ones: 0.1 is good in small
            convolutional networks and diverges in deep perceptrons without normalisation.
        weight_decay: of all parameters but $b_g$, whose ordinary value is 1.

    Raises:
        ValueError: if a factor is negative, or there is no quadratic layer.

    Example:
        >>> optimizer = torch.optim.SGD(relinear_param_groups(net, 0.1, gamma=0.1), lr=0.1, momentum=0.9)
    """
    gamma_g, gamma_b = gamma if isinstance(gamma, tuple) else (gamma, gamma)
    at_least("gamma_g", gamma_g, 0)
    at_least("gamma_b", gamma_b, 0)
    at_least("lr", lr, 0)
    terms = _terms(model)
    quadratic = {id(p) for members in terms.values() for p in members}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in quadratic]
    groups = [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": terms["weight_g"], "lr": gamma_g * lr, "weight_decay": weight_decay},
        {"params": terms["bias_g"], "lr": gamma_g * lr, "weight_decay": 0.0},
        {"params": terms["weight_b"] + terms["bias_b"], "lr": gamma_b * lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


class ReLinearShrink:
    """Shrinks or bounds the quadratic terms after every step of the optimizer; a callback of `fit`, too.

    With $\\theta \\in \\{w_g, b_g - 1\\}$ and $\\{w_b, b_b\\}$: $\\theta \\leftarrow \\alpha\\theta$, then
    $\\theta \\leftarrow \\min(\\max(\\theta, -\\beta), \\beta)$. At 0 the network is an ordinary one.

    Args:
        model: a network with quadratic layers.
        alpha: $(\\alpha_g, \\alpha_b)$ in [0, 1], or one number for both; `None` does not shrink.
        beta: $(\\beta_g, \\beta_b)$, at least 0, or one number for both; `None` does not bound.

    Raises:
        ValueError: if a factor is out of range, both are `None`, or there is no quadratic layer.

    Example:
        >>> shrink = ReLinearShrink(net, alpha=0.99)
        >>> optimizer.step(); shrink.step()
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float | tuple[float, float] | None = None,
        beta: float | tuple[float, float] | None = None,
    ) -> None:
        if alpha is None and beta is None:
            raise ValueError("expected alpha or beta, got neither: nothing would be shrunk")
        self.alpha = alpha if isinstance(alpha, tuple) or alpha is None else (alpha, alpha)
        self.beta = beta if isinstance(beta, tuple) or beta is None else (beta, beta)
        for value in self.alpha or ():
            between("alpha", value, 0, 1)
        for value in self.beta or ():
            at_least("beta", value, 0)
        _terms(model)
        self.model = model

    @torch.no_grad()
    def step(self) -> None:
        """Shrink once."""
        terms = _terms(self.model)
        for k, names in enumerate((("weight_g", "bias_g"), ("weight_b", "bias_b"))):
            for name in names:
                ordinary = 1.0 if name == "bias_g" else 0.0
                for parameter in terms[name]:
                    deviation = parameter - ordinary
                    if self.alpha is not None:
                        deviation *= self.alpha[k]
                    if self.beta is not None:
                        deviation.clamp_(-self.beta[k], self.beta[k])
                    parameter.copy_(deviation + ordinary)

    def __call__(self, state: Any) -> None:
        """Shrink once; as a callback."""
        self.step()

    def __repr__(self) -> str:
        return f"ReLinearShrink(alpha={self.alpha}, beta={self.beta})"


def quadratic_strength(model: nn.Module, x: Tensor) -> dict[str, float]:
    """How much of every quadratic layer's output its quadratic part is: $\\lVert q - (w_r x + b_r) \\rVert / \\lVert q \\rVert$.

    Args:
        model: a network with quadratic layers; it is left as it was.
        x: inputs of the network.

    Returns:
        A share for each layer by name: 0 for an ordinary one; NaN where a layer gives nothing but zeros.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _Quadratic)}
    if not layers:
        raise ValueError("expected a network with quadratic layers, got one without; see to_quadratic")
    strengths: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            rest = (output - module.linear_part(args[0])).double().norm()
            strengths[name] = float(rest / output.double().norm())

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), untouched(model, training=False):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return strengths


def functional_dimension(
    function: Callable[[Mapping[str, Tensor], Tensor], Tensor], params: Mapping[str, Tensor], inputs: Tensor
) -> int:
    """Dimension of the set of functions that parameters reach: the rank of the Jacobian of values by parameters.

    It is taken in float64, relative to the largest singular value at 1e-9. At random parameters it is the dimension of
    the variety of functions (for polynomial networks).

    Args:
        function: `(params, inputs) -> outputs`, such as `lambda p, x: torch.func.functional_call(net, p, x)`.
        params: parameters by name, at generic (random) values.
        inputs: `[N, ...]` generic points, whose values are at least as many as there are parameters.

    Raises:
        ValueError: if there are fewer values than parameters, which bounds the rank from above.
    """
    double = {name: p.detach().double() for name, p in params.items()}
    jacobian = torch.func.jacrev(lambda p: function(p, inputs.double()).flatten())(double)
    matrix = torch.cat([block.flatten(1) for block in jacobian.values()], 1)
    if matrix.shape[0] < matrix.shape[1]:
        raise ValueError(f"expected at least {matrix.shape[1]} values, as many as parameters, got {matrix.shape[0]}")
    singular = torch.linalg.svdvals(matrix)
    return int((singular > 1e-9 * singular[0]).sum())
