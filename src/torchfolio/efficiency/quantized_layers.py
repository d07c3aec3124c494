"""Layers that run at several bit widths from one stored integer weight, and how a network gets them.

The layers of `torchfolio.efficiency.double_rounding`, which trains them. A real weight $W$ is kept for training alone;
what is stored are the integers of the highest width $h$, and every lower width $l$ is a second rounding of those:

$$Q_h = \\operatorname{clip}(\\lfloor W / s_h \\rceil), \\qquad
Q_l = \\operatorname{clip}(\\lfloor Q_h / 2^{h-l} \\rceil), \\qquad \\hat W_l = Q_l\\, 2^{h-l} s_h,$$

with $\\operatorname{clip}$ to $[-2^{b-1}, 2^{b-1} - 1]$ and halves rounded to even, in training and after it alike.
Activations and batch norms keep parameters of their own for every width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.data.examples import Examples
from torchfolio.efficiency.binary import conv_arguments, linear_arguments
from torchfolio.engine.first_order import first_order
from torchfolio.engine.modes import evaluating
from torchfolio.models import replace_layers

__all__ = [
    "DoubleRounding",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "SwitchableNorm",
    "calibrate",
    "check_bits",
    "convert",
    "double_round",
    "export",
    "load_export",
    "quantized_layers",
    "set_bits",
    "store",
    "use_bits",
    "widths_now",
]

Bits = int | Mapping[str, int]
Range = tuple[int, int]


def span(bit: int, signed: bool = True) -> Range:
    """The least and the largest integer of a width."""
    return (-(2 ** (bit - 1)), 2 ** (bit - 1) - 1) if signed else (0, 2**bit - 1)


def check_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """Widths from high to low.

    Raises:
        ValueError: if there are none, one is there twice or is not between 2 and 8.
        TypeError: if one is no whole number.
    """
    widths = sorted((checks.whole("a bit width", b, 2, 8) for b in bits), reverse=True)
    if not widths or len(set(widths)) < len(widths):
        raise ValueError(f"expected different bit widths, at least one, got {tuple(bits)}")
    return tuple(widths)


class _DoubleRound(torch.autograd.Function):
    """Both roundings in one step, which saves its input and output; a chain of operations would save three more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, high: Range, step: int, low: Range, weight: float) -> Tensor:
        rounded = _coarse((x / scale).round_().clamp_(*high), step, low).mul_(scale)
        ctx.save_for_backward(x, scale, rounded)
        ctx.settings = high, step, low, weight
        return rounded

    @staticmethod
    @first_order("the gradient through a rounding")
    def backward(ctx: Any, saved: tuple[Tensor, ...], *gradients: Tensor) -> Any:
        (gradient,), (x, scale, rounded) = gradients, saved
        high, step, low, weight = ctx.settings
        to_x = _inside(gradient, x / scale, high, step, low)
        to_scale = None
        if ctx.needs_input_grad[1]:
            # d/ds = Q 2^(h-l) - [inside] x / s, in every case; Q 2^(h-l) is the output over s
            to_scale = ((_dot(gradient, rounded) - _dot(to_x, x)) * weight / scale).to(scale)
        return to_x, to_scale, None, None, None, None


def _between(gradient: Tensor, real: Tensor, limits: Range) -> Tensor:
    """The gradient where a rounding stays within limits, else 0, by a kernel that passes what lies strictly between.

    At the upper limit a half rounds up and is cut; at the lower it rounds to the even limit and is not.
    """
    least = (limits[0] - 0.5) * (1 + 2 * torch.finfo(real.dtype).eps)
    return torch.ops.aten.hardtanh_backward(gradient, real, least, limits[1] + 0.5)


def _inside(gradient: Tensor, real: Tensor, high: Range, step: int, low: Range) -> Tensor:
    """The gradient where neither clip cuts, else 0."""
    if step == 1:
        return _between(gradient, real, high)
    first = real.round_()
    clipped = first.clamp(*high)
    second = (clipped / step).round_()
    return gradient * ((first == clipped) & (second == second.clamp(*low)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products, in float32 where numbers are shorter."""
    exact = torch.promote_types(a.dtype, torch.float32)
    return torch.dot(a.reshape(-1).to(exact), b.reshape(-1).to(exact))


def _coarse(integers: Tensor, step: int, low: Range) -> Tensor:
    """The second rounding, in place, of integers held as floats, times its step."""
    return integers if step == 1 else integers.div_(step).round_().clamp_(*low).mul_(step)


def double_round(x: Tensor, scale: Tensor, bit: int, highest: int, signed: bool = True, weight: float = 1.0) -> Tensor:
    """$\\hat x = Q_l\\, 2^{h-l} s$, with gradients straight through the roundings and exact through the clips.

    $$\\frac{\\partial \\hat x}{\\partial x} = [\\text{inside}], \\qquad
    \\frac{\\partial \\hat x}{\\partial s} = 2^{h-l} Q_l - [\\text{inside}]\\, x / s.$$

    Args:
        x: real numbers, any shape.
        scale: $s > 0$, a scalar.
        bit: width $l$.
        highest: width $h$ that is rounded to first.
        signed: whether the integers are signed.
        weight: factor on the gradient of the scale.

    Reference:
        Huang et al., "Nearly Lossless Adaptive Bit Switching", 2025, section 3; for $l = h$ this is the gradient of
        Esser et al., "Learned Step Size Quantization", ICLR 2020.
    """
    made = _DoubleRound.apply(x, scale, span(highest, signed), 2 ** (highest - bit), span(bit, signed), weight)
    assert isinstance(made, Tensor)
    return made


class DoubleRounding(nn.Module):
    """A quantiser with several widths and learned scales.

    Args:
        bits: widths $b_1 > b_2 > …$, each from 2 to 8.
        signed: whether integers are signed; activations after a ReLU are not.
        scale: `"shared"`, one scale for all widths and the second rounding, or `"separate"`, a scale of every width's
            own and a single rounding (which needs the real numbers at every width).

    Attributes:
        log_scales: $\\log s$ by width, scalar parameters; `"shared"` has that of the highest alone. $-\\infty$ until it
            is known. A step of Adam on $s$ itself, which is near 0.002 for weights, would often make it negative.

    Shapes:
        Any to the same.

    Raises:
        ValueError: if widths are repeated or out of range.

    Reference:
        Huang et al., 2025, section 3; the scale's gradient is multiplied by $1 / \\sqrt{N Q_\\max}$ as in LSQ.
    """

    def __init__(
        self,
        bits: Sequence[int] = (8, 6, 4, 2),
        signed: bool = True,
        scale: Literal["shared", "separate"] = "shared",
    ) -> None:
        super().__init__()
        self.signed: Tensor
        self.bits = check_bits(bits)
        self.scale = checks.one_of("scale", scale, ("shared", "separate"))
        own = self.bits if scale == "separate" else self.bits[:1]
        self.log_scales = nn.ParameterDict({str(b): nn.Parameter(torch.tensor(-torch.inf)) for b in own})
        self.register_buffer("signed", torch.tensor(bool(signed)))
        self._signed: bool | None = signed
        self._known: set[str] = set()

    def is_signed(self) -> bool:
        """Whether integers are signed."""
        if self._signed is None:
            self._signed = bool(self.signed)
        return self._signed

    def log_scale_of(self, bit: int) -> tuple[nn.Parameter, int]:
        """The logarithm of the scale of a width, and the width that it belongs to.

        Raises:
            ValueError: if there is no such width.
        """
        if bit not in self.bits:
            raise ValueError(f"expected one of the trained widths {self.bits}, got {bit}")
        highest = bit if self.scale == "separate" else self.bits[0]
        parameter = self.log_scales[str(highest)]
        assert isinstance(parameter, nn.Parameter)
        return parameter, highest

    def forward(self, x: Tensor, bit: int, samples: int = 1) -> Tensor:
        """Numbers as a width sees them.

        Args:
            x: real numbers.
            bit: width.
            samples: examples in `x`; $N$ is the numbers of one.

        Raises:
            RuntimeError: if the scale is unknown: the width has not seen anything.
        """
        log_scale, highest = self.log_scale_of(bit)
        if not self.known(highest):
            raise RuntimeError(
                f"the scale of {bit} bits is not known, since nothing was seen at this width; call calibrate(model, "
                "data), or train it first"
            )
        factor = (max(1, x.numel() // max(1, samples)) * span(highest, self.is_signed())[1]) ** -0.5
        return double_round(x, log_scale.exp(), bit, highest, self.is_signed(), factor)

    def known(self, bit: int) -> bool:
        """Whether there is a scale of a width; looked up once."""
        key = str(bit)
        if key not in self._known:
            if torch.compiler.is_compiling() or self.log_scales[key].is_meta or bool(self.log_scales[key] > -torch.inf):
                self._known.add(key)
            else:
                return False
        return True

    @torch.no_grad()
    def start(self, x: Tensor, bit: int | None = None) -> None:
        """Set scales from numbers: $\\max |x| / (2^{h-1} - 1)$ of weights with one scale, and the rule of LSQ, $2
        \\operatorname{mean} |x| / \\sqrt{Q_\\max}$, where every width has its own (of a shared scale it would send all
        weights to 0 at 2 bits). Whether activations are signed is taken from the first of them.

        Args:
            x: weights, or activations.
            bit: width of activations; `None` for weights.
        """
        tiny = torch.finfo(x.dtype).tiny ** 0.5  # where all numbers are 0
        if bit is None:
            for key, log_scale in self.log_scales.items():
                most = span(int(key))[1]
                scale = x.abs().max() / most if self.scale == "shared" else 2 * x.abs().mean() * most**-0.5
                log_scale.copy_(scale.clamp_min(tiny).log())
        else:
            if not any(self.known(int(key)) for key in self.log_scales):
                self._signed = bool((x < 0).any())
                self.signed.fill_(self._signed)
            scale = 2 * x.abs().mean() * span(bit, self.is_signed())[1] ** -0.5
            self.log_scales[str(bit)].copy_(scale.clamp_min(tiny).log())
        self._known.clear()

    def integers(self, x: Tensor) -> Tensor:
        """The stored integers $Q_h$, int8, of weights."""
        if self.scale == "separate":
            raise ValueError("separate scales need real weights at every width; only scale='shared' can be stored")
        log_scale, highest = self.log_scale_of(self.bits[0])
        return (x.detach() / log_scale.detach().exp()).round_().clamp_(*span(highest)).to(torch.int8)

    def from_integers(self, integers: Tensor, bit: int) -> Tensor:
        """Weights of a width from the stored integers; equal to the forward pass bit for bit."""
        log_scale, highest = self.log_scale_of(bit)
        scale = log_scale.detach().exp()
        return _coarse(integers.to(scale.dtype), 2 ** (highest - bit), span(bit)).mul_(scale)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._signed = None
        self._known.clear()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scale={self.scale!r}"


class QuantizedLayer(nn.Module):
    """What quantised layers have in common, mixed into `nn.Linear`, `nn.Conv1d` or `nn.Conv2d`.

    Attributes:
        weight: real weights, or `None` once they are stored.
        integers: stored weights (int8), or `None` in training.
        bit: width now.
        fixed: whether the layer stays at the highest width.
        quantizer: of the weights.
        activation: quantiser of the inputs, or `None`.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    integers: Tensor | None
    bit: int
    fixed: bool
    quantizer: DoubleRounding
    activation: DoubleRounding | None

    def begin(self, old: nn.Module, bits: Sequence[int], act: bool, fixed: bool, scale: Any) -> None:
        """Take over the weights of an ordinary layer."""
        self.weight, self.bias = old.weight, old.bias  # pyright: ignore[reportAttributeAccessIssue]
        assert self.weight is not None
        self.bit, self.fixed = max(bits), fixed
        own = bits[:1] if fixed else bits
        self.quantizer = DoubleRounding(own, scale=scale).to(self.weight)
        self.quantizer.start(self.weight)
        self.activation = DoubleRounding(own, signed=False, scale="separate").to(self.weight) if act else None
        self.register_buffer("integers", None)
        self.calibrating = False

    def quantized_weight(self) -> Tensor:
        """$\\hat W$ at the width now."""
        if self.weight is None:
            assert self.integers is not None
            return self.quantizer.from_integers(self.integers, self.bit)
        return self.quantizer(self.weight, self.bit)

    def quantized_input(self, x: Tensor) -> Tensor:
        """$\\hat X$ at the width now; on the first batch of training the scale starts from it."""
        if self.activation is None:
            return x
        if (self.training or self.calibrating) and not self.activation.known(self.bit):
            self.activation.start(x, self.bit)
        return self.activation(x, self.bit, len(x))

    @torch.no_grad()
    def store(self) -> None:
        """Keep the integers and drop the real weights, permanently."""
        if self.weight is not None:
            self.integers = self.quantizer.integers(self.weight)
            self.weight = None

    def extra_repr(self) -> str:
        stored = ", stored" if self.weight is None else ""
        return f"{super().extra_repr()}, bit={self.bit}{', fixed' if self.fixed else ''}{stored}"


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer of several widths; made by `convert`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """A convolution of several widths; made by `convert`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution of several widths; made by `convert`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)


class SwitchableNorm(nn.Module):
    """A batch norm for every width of the layer before it, each starting as a copy of one.

    Args:
        norm: the batch norm of the trained network.
        bits: widths.
        source: name of the layer that it follows.

    Reference:
        Jin et al., "AdaBits: Neural Network Quantization with Adaptive Bit-Widths", CVPR 2020, section 4.
    """

    def __init__(self, norm: nn.Module, bits: Sequence[int], source: str) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({str(b): copy.deepcopy(norm) for b in bits})
        self.bit, self.source = max(bits), source

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[str(self.bit)](x)

    def extra_repr(self) -> str:
        return f"bit={self.bit}, source={self.source!r}"


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
}
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def convert(
    model: nn.Module,
    bits: Sequence[int] = (8, 6, 4, 2),
    *,
    fixed: Sequence[str] | None = None,
    act: bool = True,
    norm: Literal["switchable", "shared"] = "switchable",
    scale: Literal["shared", "separate"] = "shared",
    example: Tensor | None = None,
) -> nn.Module:
    """A copy of a trained network whose layers run at several bit widths.

    Every `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` (grouped ones too) is replaced by a quantised one that shares nothing
    with the old. Inputs of all but the first are quantised; the network's own input is not. It starts at the highest
    width. Activations need an example, or `calibrate`, before the network is evaluated or trained by `fit`.

    Args:
        model: the trained network.
        bits: widths, each from 2 to 8.
        fixed: names of layers that stay at the highest width; by default the first and the last, in the order in
            which the network lists them.
        act: quantise inputs too, not weights alone.
        norm: `"switchable"` gives every batch norm parameters for each width of the layer that it follows.
        scale: of weights; see `DoubleRounding`.
        example: a batch of inputs, from which the scales of activations start.

    Raises:
        ValueError: if there is no layer to quantise, a name is unknown, or widths are repeated or out of range.
    """
    widths = check_bits(bits)
    checks.one_of("norm", norm, ("switchable", "shared"))
    model = copy.deepcopy(model)
    names = [n for n, m in model.named_modules() if type(m) in _KINDS]
    if not names:
        raise ValueError("expected an nn.Linear, nn.Conv1d or nn.Conv2d to quantise, and the network has none")
    stay = {names[0], names[-1]} if fixed is None else set(fixed)
    if unknown := sorted(stay - set(names)):
        raise ValueError(f"the network has no layer {unknown[0]!r} to quantise; it has {', '.join(names)}")
    sources = _norm_sources(model, names) if norm == "switchable" else {}
    kept = {id(model.get_submodule(n)): n for n in names}

    def quantize(old: nn.Module) -> nn.Module:
        name = kept[id(old)]
        arguments = linear_arguments(old) if isinstance(old, nn.Linear) else conv_arguments(old)  # pyright: ignore[reportArgumentType]
        new = _KINDS[type(old)](**arguments, device="meta")
        assert isinstance(new, QuantizedLayer)
        new.begin(old, widths, act and name != names[0], name in stay, scale)
        return new

    model = replace_layers(model, lambda name, module: type(module) in _KINDS, quantize)
    for name, source in sources.items():
        own = widths[:1] if source in stay else widths
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SwitchableNorm(model.get_submodule(name), own, source))
    return model if example is None else calibrate(model, example, batch_size=len(example))


def _norm_sources(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """For every batch norm the quantised layer that it follows: in the traced graph, or else in the list of modules."""
    sources: dict[str, str] = {}
    latest = None
    for name, module in model.named_modules():
        latest = name if name in layers else latest
        if isinstance(module, _NORMS) and latest is not None and name:
            sources[name] = latest
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # a network that cannot be traced, for any of many reasons
        return sources
    for node in graph.nodes:
        if node.op == "call_module" and node.target in sources:
            before = node.args[0] if node.args else None
            if isinstance(before, fx.Node) and before.op == "call_module" and before.target in layers:
                sources[node.target] = str(before.target)
    return sources


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers of a network by name.

    Raises:
        ValueError: if there is none.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    if not layers:
        raise ValueError("the network has no quantised layer; convert it first")
    return layers


def set_bits(model: nn.Module, bits: Bits) -> None:
    """Switch a network to a width, or its layers to widths of their own; nothing is computed.

    Args:
        model: of `convert`, in training or stored.
        bits: a width for all layers but the fixed ones, or widths by name of some of them.

    Raises:
        ValueError: if a layer is unknown or fixed at another width, or a width was not converted for.
    """
    layers = quantized_layers(model)
    if isinstance(bits, Mapping):
        wanted = dict(bits)
    else:
        wanted = {n: bits for n, m in layers.items() if not m.fixed}
        checks.one_of("bits", bits, max((m.quantizer.bits for m in layers.values()), key=len))
    for name, bit in wanted.items():
        if name not in layers:
            raise ValueError(f"the network has no quantised layer {name!r}; it has {', '.join(layers)}")
        if bit not in layers[name].quantizer.bits:
            raise ValueError(f"expected a width of {name} in {layers[name].quantizer.bits}, got {bit!r}")
    for name, bit in wanted.items():
        layers[name].bit = bit
    for module in model.modules():
        if isinstance(module, SwitchableNorm):
            module.bit = layers[module.source].bit


def widths_now(model: nn.Module) -> dict[str, int]:
    """The width of every quantised layer, as `set_bits` takes it."""
    return {name: layer.bit for name, layer in quantized_layers(model).items()}


@contextmanager
def use_bits(model: nn.Module, bits: Bits) -> Iterator[nn.Module]:
    """Widths within a `with` block; see `set_bits`."""
    before = widths_now(model)
    try:
        set_bits(model, bits)
        yield model
    finally:
        set_bits(model, before)


@torch.no_grad()
def calibrate(model: nn.Module, data: Any, *, batch_size: int = 128) -> nn.Module:
    """Start the scales of activations that are still 0, from one batch at every width.

    Args:
        model: of `convert`. Its norms, mode and widths are left as they are.
        data: tensors, a data set or a loader; see `torchfolio.data.Examples`. The first batch is taken.
        batch_size: examples of it.

    Returns:
        The model.

    Raises:
        ValueError: if there is no quantised layer, or no example.
    """
    layers = quantized_layers(model)
    x = next(iter(Examples(data).batches(batch_size)))[0]
    like = next(model.parameters())
    x = x.to(like.device, like.dtype if x.is_floating_point() else None)
    widths = max((m.quantizer.bits for m in layers.values()), key=len)
    try:
        for layer in layers.values():
            layer.calibrating = True
        with evaluating(model):
            for bit in widths:
                with use_bits(model, bit):
                    model(x)
    finally:
        for layer in layers.values():
            layer.calibrating = False
    return model


def store(model: nn.Module) -> nn.Module:
    """Keep int8 weights and drop the real ones in place: a network for inference that still switches widths.

    Its `state_dict` holds a byte for each quantised weight, so that it is small on disk.

    Args:
        model: of `convert`, trained.

    Returns:
        The model.

    Raises:
        ValueError: if there is no quantised layer, or scales are separate.
    """
    for layer in quantized_layers(model).values():
        layer.store()
    return model


def export(model: nn.Module) -> dict[str, Tensor]:
    """The stored network as tensors that `safetensors` can save; the model is left as it is.

    Returns:
        `NAME.integers` (int8) and `NAME.quantizer.log_scales.H` of every layer, scales of activations and norms by width,
        and everything else of the network.
    """
    return {name: t.detach().clone() for name, t in store(copy.deepcopy(model)).state_dict().items()}


def load_export(model: nn.Module, exported: Mapping[str, Tensor]) -> nn.Module:
    """Make a network converted alike the stored one, in place.

    Args:
        model: of `convert` with the same settings.
        exported: what `export` gave.

    Raises:
        RuntimeError: if names or shapes differ.
    """
    store(model).load_state_dict(exported)
    return model
