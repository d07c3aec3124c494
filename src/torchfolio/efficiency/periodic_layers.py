"""Layers with binary weights that are trained through a sine; `torchfolio.efficiency.biper` has the method.

Reference:
    Vargas et al., "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024, section 3.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.efficiency.binary import BinaryLayer
from torchfolio.efficiency.straight_through import sign, square_wave

__all__ = ["BiPerConv2d", "BiPerLayer", "BiPerLinear", "biper_layers", "checked_stage"]


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
        self.frequency = float(checks.positive("a frequency", frequency))
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
        self._stage = checked_stage(stage)  # a number of its own, so that no forward pass waits for a device
        self.in_stage.fill_(stage)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.in_stage.is_meta:
            self._stage = checked_stage(int(self.in_stage))

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


def checked_stage(stage: int) -> int:
    """The stage, 1 or 2, or an error."""
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
        *args: arguments of `nn.Conv2d`: `in_channels`, `out_channels`, `kernel_size`, `stride`, `padding`, …
        frequency: $\\omega_0$. It multiplies gradients: the learning rate that fits falls as $1 / \\omega_0^2$.
        binary_input: binarise the inputs too (1W1A); otherwise weights alone (1W32A). Inputs must take both signs:
            put `nn.Hardtanh`, not ReLU, before the layer.
        stage: 1 or 2.
        **kwargs: arguments of `nn.Conv2d`: `groups`, `dilation`, `bias`, `padding_mode`, `device`, `dtype`, …

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


def biper_layers(model: nn.Module) -> dict[str, BiPerLayer]:
    """The periodic layers of a network by name; an error where it has none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BiPerLayer)}
    if not layers:
        raise ValueError("the network has no BiPer layer; convert it with binarize first")
    return layers
