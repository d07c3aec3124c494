"""BiPer: binary networks trained through a periodic function.

Edwin Vargas, Claudia V. Correa, Carlos Hinojosa, Henry Arguello, "BiPer: Binary Neural Networks using a Periodic
Function", CVPR 2024, https://arxiv.org/abs/2404.01278.

A network whose weights are +1 and -1 takes a thirtieth of the memory. The usual way to train one is $w^q =
\\operatorname{sign}(w)$ with a gradient that pretends the sign was the identity. BiPer sends the real weight through a
square wave instead, and takes the derivative of the sine of the same period, which is a real derivative of something
close by:

$$w^q = \\operatorname{sign}(\\sin \\omega_0 w), \\qquad
\\frac{\\partial L}{\\partial w} = \\frac{\\partial L}{\\partial w^q}\\, \\omega_0 \\cos \\omega_0 w.$$

Training has two stages. In the first the layer uses $\\hat w = \\sin \\omega_0 w$ itself, in the second, from the
weights of the first and at a smaller learning rate, the square wave. The frequency $\\omega_0$ says how far $\\hat w$
is from binary: `quantization_error`, `laplace_qe`, `frequency_for`.

    net = binarize(net)                      # convolutions but the first, with their weights
    fit(net, train, epochs=60, ...)          # stage 1
    set_stage(net, 2)
    fit(net, train, epochs=30, ...)          # stage 2, learning rate five times smaller
    net = pack(net)                          # a bit per weight

`torchfolio compress net/ --method biper --data cifar10 -o small/` does the same for a network on disk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.efficiency.binary import (
    BinaryLayer,
    PackedConv2d,
    PackedLinear,
    SignSTEConv2d,
    SignSTELinear,
    conv_arguments,
    export_binary,
    linear_arguments,
    load_binary,
    pack,
)
from torchfolio.efficiency.compression import Compression, Phase
from torchfolio.efficiency.straight_through import sign, square_wave
from torchfolio.engine import Backprop
from torchfolio.engine.rules import default_loss
from torchfolio.measure import flops_by_module
from torchfolio.models import replace_layers

__all__ = [
    "BiPer",
    "BiPerConv2d",
    "BiPerLinear",
    "SignSTEConv2d",
    "SignSTELinear",
    "binarize",
    "export_binary",
    "frequency_for",
    "laplace_qe",
    "load_binary",
    "pack",
    "quantization_error",
    "set_stage",
    "sine_decay",
]

Where = Callable[[str, nn.Module], bool] | Sequence[str]

PEAK_U, PEAK_QE = 0.9548824, 0.1028346
"""Where the quantisation error of Laplace weights is largest, and how large."""


class BiPerLayer(BinaryLayer):
    """What `BiPerConv2d` and `BiPerLinear` have in common.

    Attributes:
        frequency: $\\omega_0$.
        stage: 1 for $\\sin \\omega_0 w$, 2 for its sign; kept in the state dict.
        trained: whether the weights have been in training in stage 1; kept in the state dict.
    """

    trained: Tensor
    in_stage: Tensor

    def _begin(self, frequency: float, binary_input: bool, stage: int) -> None:
        if not (math.isfinite(frequency) and frequency > 0):
            raise ValueError(f"expected a frequency above 0, got {frequency!r}")
        self.frequency = float(frequency)
        self.register_buffer("in_stage", torch.tensor(1, dtype=torch.uint8, device=self.weight.device))
        self.stage = stage
        self._start(binary_input)
        self.register_buffer("trained", torch.zeros((), dtype=torch.bool, device=self.weight.device))
        self._look = True

    @property
    def stage(self) -> int:
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage = _checked(stage)  # a number of its own, so that no forward pass waits for a device
        self.in_stage.fill_(stage)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.in_stage.is_meta:
            self._stage = _checked(int(self.in_stage))

    def effective_weight(self) -> Tensor:
        if self.stage == 1:
            return (self.frequency * self.weight).sin()
        return square_wave(self.weight, self.frequency)

    def binary_weight(self) -> Tensor:
        return sign((self.frequency * self.weight.detach()).sin())

    def _input(self, x: Tensor) -> Tensor:
        if self.training and self._look:
            self._first_look(x)
        return super()._input(x)

    def _first_look(self, x: Tensor) -> None:
        """Once, at the first batch of training: remember it, and warn if the signs of the inputs say nothing."""
        self._look = False
        if self.stage == 1:
            self.trained.fill_(True)
        if self.binary_input and not torch.compiler.is_compiling() and bool((x >= 0).all()):
            warnings.warn(
                f"no input of a {type(self).__name__} with binary input is negative, so all of them become +1: put "
                "nn.Hardtanh in place of the ReLU before it, or keep real inputs by binary_input=False",
                stacklevel=4,
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frequency={self.frequency:g}, binary_input={self.binary_input}, stage={self.stage}"


def _checked(stage: int) -> int:
    if stage not in (1, 2):
        raise ValueError(f"expected stage 1 (sine) or 2 (square wave), got {stage!r}")
    return stage


class BiPerConv2d(BiPerLayer, nn.Conv2d):
    """A convolution with binary weights that are trained through a sine.

    $$y = \\alpha \\odot (w^q * a^q) + b, \\qquad
    w^q = \\begin{cases} \\sin \\omega_0 w & \\text{stage 1} \\\\
    \\operatorname{sign}(\\sin \\omega_0 w) & \\text{stage 2,}\\end{cases} \\qquad
    a^q = \\operatorname{sign}(a),$$

    with a learned $\\alpha$ per output channel and $\\operatorname{sign}(0) = +1$. In training the gradient of the
    inputs is $\\partial L / \\partial a' = \\partial L / \\partial a^q \\cdot \\max(0, 2 - 2|a'|)$ for $a' = a /
    \\sqrt{\\operatorname{var}(a) + 10^{-5}}$, the variance over one example; it runs on through this normalisation.
    Padding stays 0.

    Args:
        *args: of `nn.Conv2d`: `in_channels`, `out_channels`, `kernel_size`, `stride`, `padding`, …
        frequency: $\\omega_0$. It multiplies gradients: the learning rate that fits falls as $1 / \\omega_0^2$.
        binary_input: binarise the inputs too (1W1A); otherwise weights alone (1W32A). Inputs must take both signs:
            put `nn.Hardtanh`, not ReLU, before the layer.
        stage: 1 or 2.
        **kwargs: of `nn.Conv2d`: `groups`, `dilation`, `bias`, `padding_mode`, `device`, `dtype`, …

    Raises:
        ValueError: if the frequency is not above 0 or the stage not 1 or 2.
        RuntimeError: if a second derivative is asked for.

    Shapes:
        As `nn.Conv2d`: `[B, in_channels, H, W]` to `[B, out_channels, H', W']`.

    Example:
        >>> layer = BiPerConv2d(16, 32, 3, padding=1, frequency=20.0)
        >>> layer(torch.randn(8, 16, 12, 12)).shape
        torch.Size([8, 32, 12, 12])

    Reference:
        Vargas et al., CVPR 2024, section 3. The normalisation of the inputs, their gradient (of Bi-Real Net) and the
        initialisation (Kaiming normal weights, uniform scales) follow the released code.
    """

    def __init__(
        self, *args: Any, frequency: float = 20.0, binary_input: bool = True, stage: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._begin(frequency, binary_input, stage)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self._input(x), self._scaled_weight(), self.bias)


class BiPerLinear(BiPerLayer, nn.Linear):
    """A linear layer with binary weights; see `BiPerConv2d`. Arguments of `nn.Linear`, then of BiPer.

    Shapes:
        `[B, ..., in_features]` to `[B, ..., out_features]`.
    """

    def __init__(
        self, *args: Any, frequency: float = 20.0, binary_input: bool = True, stage: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._begin(frequency, binary_input, stage)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._input(x), self._scaled_weight(), self.bias)


def binarize(
    model: nn.Module,
    *,
    frequency: float = 20.0,
    where: Where | None = None,
    binary_input: bool = True,
    hardtanh: bool = True,
    match: bool = False,
    stage: int = 1,
) -> nn.Module:
    """Make the layers of a network binary, in place, with their weights.

    Args:
        model: any network.
        frequency: $\\omega_0$ of all layers.
        where: `(name, module) -> bool` over `nn.Conv2d` and `nn.Linear`, or names of such layers. By default every
            `nn.Conv2d` but the first and those with 1x1 windows (projections on shortcuts).
        binary_input: binarise inputs too, not weights alone.
        hardtanh: with `binary_input`, put `nn.Hardtanh` in place of every `nn.ReLU` of the network, after which
            no input would be negative. A ReLU called as a function cannot be replaced; the layer behind it warns.
        match: choose $w$ and $\\alpha$ so that $\\alpha \\sin \\omega_0 w$ equals the old weights, in place of copying
            the old weights to $w$ as the released code does: with real inputs, stage 1 starts at the old function.
        stage: that layers start in.

    Returns:
        The model.

    Raises:
        ValueError: if no layer is chosen, a name is unknown, or a setting is out of range.
        TypeError: if a layer is chosen that is neither `nn.Conv2d` nor `nn.Linear` (transposed convolutions).

    Example:
        >>> net = binarize(resnet20(), frequency=20.0, binary_input=False)
    """
    chosen = _choose(model, where)
    settings = {"frequency": frequency, "binary_input": binary_input, "stage": stage}
    matched: dict[nn.Parameter, BiPerLayer] = {}
    if match:
        _refuse_half_tied(model, chosen)

    def convert(old: nn.Module) -> nn.Module:
        if type(old).__name__.startswith("ConvTranspose") or not isinstance(old, nn.Conv2d | nn.Linear):
            raise TypeError(f"expected nn.Conv2d or nn.Linear to make binary, got {type(old).__name__}")
        if isinstance(old, nn.Conv2d):
            new = BiPerConv2d(**conv_arguments(old), **settings)
        else:
            new = BiPerLinear(**linear_arguments(old), **settings)
        new.adopt(old)
        if match:
            _match(new, matched)
        return new

    model = replace_layers(model, lambda name, module: name in chosen, convert)
    if binary_input and hardtanh:
        replace_layers(model, nn.ReLU, lambda old: nn.Hardtanh(), allow_none=True)
    return model


def _choose(model: nn.Module, where: Where | None) -> set[str]:
    """Names of the layers to make binary."""
    modules = dict(model.named_modules())
    if where is None:
        binary = BinaryLayer, PackedConv2d, PackedLinear
        convs = [n for n, m in modules.items() if isinstance(m, nn.Conv2d) and not isinstance(m, binary)]
        chosen = {n for n in convs[1:] if tuple(modules[n].kernel_size) != (1, 1)}  # pyright: ignore[reportArgumentType]
    elif callable(where):
        chosen = {n for n, m in modules.items() if _weighs(m) and where(n, m)}
    else:
        chosen = set(where)
        unknown = sorted(chosen - set(modules))
        if unknown:
            raise ValueError(f"the network has no module {unknown[0]!r}; expected names of its layers")
    _refuse_inside_attention(modules, chosen)
    if not chosen:
        kinds = sorted({type(m).__name__ for m in modules.values() if not list(m.children())})
        raise ValueError(
            f"expected layers to make binary, found none among {', '.join(kinds)}: by default these are nn.Conv2d "
            "after the first, larger than 1x1; choose others by where="
        )
    return chosen


def _weighs(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear | nn.modules.conv._ConvTransposeNd)


def _refuse_inside_attention(modules: dict[str, nn.Module], chosen: set[str]) -> None:
    for name in sorted(chosen):
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{name!r} belongs to an nn.MultiheadAttention, which uses its weight without calling the layer: it would "
                "stay real; leave it out by where="
            )


def _refuse_half_tied(model: nn.Module, chosen: set[str]) -> None:
    """Matched weights are others than the old ones, which a layer that stays real cannot share."""
    places: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, set()).add(name.rpartition(".")[0])
    for owners in places.values():
        if owners & chosen and owners - chosen:
            raise ValueError(
                f"{min(owners & chosen)!r} shares a weight with {min(owners - chosen)!r}, which stays real: match=True "
                "gives it a weight of its own; make both binary, or use match=False"
            )


@torch.no_grad()
def _match(layer: BiPerLayer, matched: dict[nn.Parameter, BiPerLayer]) -> None:
    """Scale of a channel: its largest weight; the weights: where the sine takes the rest of it. Shared ones once."""
    old = layer.weight
    if old in matched:
        layer.weight = matched[old].weight
        layer.alpha.copy_(matched[old].alpha)
        return
    matched[old] = layer
    flat = old.flatten(1)
    alpha = flat.abs().amax(1).clamp_min(torch.finfo(flat.dtype).tiny)
    layer.alpha.copy_(alpha)
    sines = (flat / alpha[:, None]).asin() / layer.frequency
    layer.weight = nn.Parameter(sines.view_as(old), old.requires_grad)


def _layers(model: nn.Module) -> dict[str, BiPerLayer]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, BiPerLayer)}
    if not found:
        raise ValueError("the network has no BiPer layer; convert it with binarize first")
    return found


def set_stage(model: nn.Module, stage: int) -> None:
    """Set the stage of every BiPer layer: 1 for the sine, 2 for the square wave.

    Warns if stage 2 is set on weights that were never trained in stage 1.

    Raises:
        ValueError: if the stage is not 1 or 2, or there is no BiPer layer.
    """
    layers = _layers(model)
    _checked(stage)
    if stage == 2 and not all(bool(layer.trained) for layer in layers.values()):
        warnings.warn("stage 2 starts from weights that were not trained in stage 1", stacklevel=2)
    for layer in layers.values():
        layer.stage = stage
        layer._look = True


def sine_decay(model: nn.Module) -> Tensor:
    """$\\sum_l \\operatorname{mean} \\sin^2(\\omega_0 w_l)$ over the BiPer layers, a scalar with a gradient.

    The released code adds it to the loss on CIFAR, times 0.037 in stage 1 and 0.0468 in stage 2. It pulls
    $\\sin \\omega_0 w$ towards zero.
    """
    return torch.stack([(m.frequency * m.weight).sin().square().mean() for m in _layers(model).values()]).sum()


@overload
def quantization_error(model_or_weight: Tensor, frequency: float | None = None) -> dict[str, float]: ...
@overload
def quantization_error(model_or_weight: nn.Module, frequency: None = None) -> dict[str, dict[str, float]]: ...


def quantization_error(
    model_or_weight: nn.Module | Tensor, frequency: float | None = None
) -> dict[str, float] | dict[str, dict[str, float]]:
    """How far real weights are from the best scaled binary ones,

    $$\\mathrm{QE} = \\min_\\gamma \\operatorname{E}(\\hat w - \\gamma w^q)^2
    = \\operatorname{E}\\hat w^2 - (\\operatorname{E}|\\hat w|)^2, \\qquad \\hat w = \\sin \\omega_0 w.$$

    Args:
        model_or_weight: weights, or a network with binary layers.
        frequency: $\\omega_0$ of the weights; `None` takes $\\hat w = w$, the plain sign. Layers of a network have
            their own.

    Returns:
        `{"qe", "normalized", "u"}`: the error, the error over $\\operatorname{E}\\hat w^2$, and $u = b\\,\\omega_0$
        with $b = \\operatorname{E}|w|$ (NaN for the plain sign). For a network, one such dict for every layer.

    Raises:
        ValueError: if a network has no binary layer.
    """
    if isinstance(model_or_weight, Tensor):
        return _quantization_error(model_or_weight, frequency)
    found = {
        name: _quantization_error(layer.weight, layer.frequency if isinstance(layer, BiPerLayer) else None)
        for name, layer in model_or_weight.named_modules()
        if isinstance(layer, BinaryLayer)
    }
    if not found:
        raise ValueError("the network has no binary layer; convert it with binarize first")
    return found


def _quantization_error(weight: Tensor, frequency: float | None) -> dict[str, float]:
    weight = weight.detach().double()
    seen = weight if frequency is None else (frequency * weight).sin()
    power, size = float(seen.square().mean()), float(seen.abs().mean())
    error = power - size**2
    u = math.nan if frequency is None else frequency * float(weight.abs().mean())
    return {"qe": error, "normalized": error / power if power else math.nan, "u": u}


def laplace_qe(u: ArrayLike) -> Any:
    """Quantisation error of Laplace weights of scale $b$ at frequency $\\omega_0$, with $u = b\\,\\omega_0$:

    $$\\mathrm{QE}(u) = \\frac{2u^2}{1 + 4u^2} - \\left[\\frac{u}{1 + u^2} \\coth\\frac{\\pi}{2u}\\right]^2.$$

    It grows as $u^2$, is largest (0.102835) at $u = 0.954882$ and tends to $1/2 - 4/\\pi^2$.

    Args:
        u: at least 0, any shape.

    Returns:
        A float for a number, else an array.

    Raises:
        ValueError: if `u` is negative.
    """
    u_ = np.asarray(u, dtype=float)
    if (u_ < 0).any():
        raise ValueError(f"expected u of at least 0, got {u_.min():g}")
    with np.errstate(divide="ignore"):
        coth = 1 / np.tanh(np.pi / (2 * u_))
    qe = 2 * u_**2 / (1 + 4 * u_**2) - (u_ / (1 + u_**2) * coth) ** 2
    return float(qe) if qe.ndim == 0 else qe


def frequency_for(model: nn.Module, qe: float = 0.05, where: Where | None = None) -> dict[str, float]:
    """For every layer the frequency at which Laplace weights of its size have a given quantisation error.

    `laplace_qe` is inverted on its rising branch, $u < 0.955$.

    Args:
        model: a network, converted or not.
        qe: the error wanted, between 0 and 0.102835.
        where: layers of a network that has no BiPer layer yet; as in `binarize`.

    Returns:
        $\\omega_0 = u / \\operatorname{E}|w|$ by the name of the layer.

    Raises:
        ValueError: if no weights have such an error, or a layer's weights are all zero.
    """
    if not 0 < qe < PEAK_QE:
        raise ValueError(f"expected qe between 0 and {PEAK_QE}, the largest error of Laplace weights, got {qe!r}")
    u = float(brentq(lambda v: laplace_qe(v) - qe, 0.0, PEAK_U))  # pyright: ignore[reportArgumentType]
    converted = {name for name, m in model.named_modules() if isinstance(m, BiPerLayer)}
    made: dict[str, float] = {}
    for name in sorted(converted or _choose(model, where)):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        size = float(weight.detach().abs().mean())
        if not size:
            raise ValueError(f"the weights of {name} are all zero; no frequency changes their error")
        made[name] = u / size
    return made


class BiPer(Compression):
    """BiPer as a way to shrink a trained network: convert, two stages of training, pack.

    Two thirds of the epochs train $\\sin \\omega_0 w$, one third the square wave, at a learning rate 0.18 and a weight
    decay 0.1 times as large: the proportions of the released CIFAR-10 recipe.

    Args:
        frequency: $\\omega_0$.
        binary_input: binarise inputs too; see `binarize`. Off by default, because most networks have ReLUs.
        match: start from the function of the trained network; see `binarize`.
        sine_decay: weight $\\tau$ of `sine_decay` in the loss (the released code: about 0.04 on CIFAR).
        layers: names of the layers to make binary; by default as in `binarize`.

    Raises:
        ValueError: if `sine_decay` is negative; see `binarize` for the rest.

    Example:
        >>> small = compress(net, BiPer(), train, epochs=9).model  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        frequency: float = 20.0,
        binary_input: bool = False,
        match: bool = True,
        sine_decay: float = 0.0,
        layers: Sequence[str] | None = None,
    ) -> None:
        if sine_decay < 0:
            raise ValueError(f"expected sine_decay of at least 0, got {sine_decay!r}")
        self.frequency, self.binary_input, self.match = frequency, binary_input, match
        self.sine_decay, self.layers = sine_decay, layers

    def convert(self, model: nn.Module, example: Tensor) -> nn.Module:
        return binarize(
            model, frequency=self.frequency, where=self.layers, binary_input=self.binary_input, match=self.match
        )

    def phases(self, model: nn.Module) -> Iterator[Phase]:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            own = default_loss(output, target)
            return own + self.sine_decay * sine_decay(model) if self.sine_decay else own

        set_stage(model, 1)
        yield Phase("sine", share=2 / 3, rule=Backprop(loss))
        set_stage(model, 2)
        yield Phase("square wave", share=1 / 3, lr=0.18, weight_decay=0.1, rule=Backprop(loss))

    def finish(self, model: nn.Module) -> nn.Module:
        return pack(model)

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        arguments = {"frequency": self.frequency, "binary_input": self.binary_input, "model": network}
        if self.layers is not None:
            arguments["where"] = list(self.layers)
        converted = {"build": "torchfolio.efficiency.biper:binarize", "arguments": arguments}
        return {"build": "torchfolio.efficiency.binary:pack", "arguments": {"model": converted}}

    def operations(self, model: nn.Module, example: Tensor) -> dict[str, int]:
        rows = flops_by_module(model, example)
        flops = rows["flops"].to_numpy()
        binary = rows["type"].isin([PackedConv2d.__name__, PackedLinear.__name__]).to_numpy()
        # A product with a weight of +1 or -1 is a change of sign; where the input is binary too, it is an XNOR.
        kind = "binary_operations" if self.binary_input else "sign_operations"
        return {"flops": int(flops[~binary].sum()), kind: int(flops[binary].sum())}
