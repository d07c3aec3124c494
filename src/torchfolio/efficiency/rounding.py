"""The two roundings by which low bit widths follow from the integers of the highest, and the quantiser with its scales.

A real weight $W$ is kept for training alone; what is stored are the integers of the highest width $h$, and every lower
width $l$ is a second rounding of those:

$$Q_h = \\operatorname{clip}(\\lfloor W / s_h \\rceil), \\qquad
Q_l = \\operatorname{clip}(\\lfloor Q_h / 2^{h-l} \\rceil), \\qquad \\hat W_l = Q_l\\, 2^{h-l} s_h,$$

with $\\operatorname{clip}$ to $[-2^{b-1}, 2^{b-1} - 1]$ and halves rounded to even, in training and after it alike.

Reference:
    Huang et al., "Nearly Lossless Adaptive Bit Switching", 2025, section 3; Esser et al., "Learned Step Size
    Quantization", ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.engine.first_order import first_order

__all__ = ["DoubleRounding", "check_bits", "double_round", "span"]

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
    if isinstance(bits, int | str):
        raise TypeError(f"expected bit widths such as (8, 4), got {bits!r}")
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
    rounded = _DoubleRound.apply(x, scale, span(highest, signed), 2 ** (highest - bit), span(bit, signed), weight)
    assert isinstance(rounded, Tensor)
    return rounded


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
