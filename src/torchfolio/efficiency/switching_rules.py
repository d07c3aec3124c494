"""Learning rules of networks that run at several bit widths: an update at every width, at rates of its own.

Reference:
    Huang et al., "Nearly Lossless Adaptive Bit Switching", 2025, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from torchfolio import checks
from torchfolio.efficiency.compression import own_group
from torchfolio.efficiency.quantized_layers import (
    Bits,
    QuantizedLayer,
    quantized_layers,
    set_bits,
    use_bits,
    widths_now,
)
from torchfolio.engine import LearningRule
from torchfolio.engine.rules import Batch, Loss, default_loss
from torchfolio.engine.sync import average_gradients

__all__ = ["MultiPrecision", "SwitchingRule", "eta"]

RHO = 0.1
"""Least share of the learning rate that a scale's gradient leaves: the printed rate would become negative."""


def eta(bit: int, highest: int = 8) -> float:
    """Factor of a width on the learning rate of scales: 1, 0.5, 0.1, 0.05, 0.01, … from the highest down.

    Reference:
        Huang et al., 2025, section 3.2.
    """
    below = highest - bit
    return 10 ** (-below / 2) if below % 2 == 0 else 5 * 10 ** (-(below + 1) / 2)


class SwitchingRule(LearningRule):
    """What both rules have in common: passes at widths, each with an update of its own at rates of its own."""

    def __init__(self, loss: Loss | None, alrs: Literal["full", "ratio"] | None) -> None:
        self.loss = loss or default_loss
        self.alrs = checks.one_of("alrs", alrs, ("full", "ratio", None))
        self.model: nn.Module | None = None
        self.optimizer: Optimizer | None = None
        self.layers: dict[str, QuantizedLayer] = {}
        self.groups: list[list[str]] = []  # names of layers, of the optimizer's last groups

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        self.layers = quantized_layers(model)
        if any(layer.weight is None for layer in self.layers.values()):
            raise ValueError("the network holds stored integers alone; train it before store")
        self.model, self.optimizer = model, None
        self.highest = max(layer.quantizer.bits[0] for layer in self.layers.values())
        self.bits = max((layer.quantizer.bits for layer in self.layers.values()), key=len)
        return model

    def partition(self) -> list[list[str]]:
        """Names of layers whose scales share a learning rate at all times."""
        raise NotImplementedError

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> None:
        self.groups = []
        for names in self.partition():
            scales = [p for n in names for p in _scales(self.layers[n]) if p.requires_grad]
            if scales:
                own_group(optimizer, scales, weight_decay=0.0)
                self.groups.append(names)
        self.optimizer = optimizer

    def _passes(self, batch: Batch, backward: Callable[[Tensor], None], widths: Sequence[Bits]) -> dict[str, Tensor]:
        """A pass at each of several widths, with an update after all but the last, which is the optimizer's user's."""
        model, optimizer = self.model, self.optimizer
        if model is None or optimizer is None:
            raise RuntimeError("an update at every width needs the optimizer; call prepare and configure before step")
        if any(p.grad is not None for p in model.parameters()):
            raise ValueError("an update at every width leaves no gradient to add to: accumulate=1, please")
        device = batch[0].device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise ValueError("an update at every width needs unscaled gradients; take precision bf16-mixed or 32-true")
        before, losses = widths_now(model), {}
        try:
            for k, width in enumerate(widths):
                if k:
                    self._update(model, optimizer)
                set_bits(model, width)
                losses[str(k)] = self._loss(batch)
                backward(losses[str(k)])
                losses[str(k)] = losses[str(k)].detach()
                self._set_rates(optimizer)
        finally:
            set_bits(model, before)
        return losses

    def _loss(self, batch: Batch) -> Tensor:
        assert self.model is not None
        *inputs, target = batch
        return self.loss(self.model(*inputs), target)

    def _update(self, model: nn.Module, optimizer: Optimizer) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            average_gradients([p for p in model.parameters() if p.requires_grad])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _set_rates(self, optimizer: Optimizer) -> None:
        """$\\lambda_b = \\eta_b \\max(\\lambda - g_b, \\rho \\lambda)$ for the scales of the layers that ran at $b$."""
        rate = float(optimizer.param_groups[0]["lr"])
        strength = self._strengths() if self.alrs == "full" else {}
        if not self.groups:  # all scales are frozen
            return
        for names, group in zip(self.groups, optimizer.param_groups[-len(self.groups) :], strict=True):
            bit = self.layers[names[0]].bit
            factor = 1.0 if self.alrs is None else eta(bit, self.highest)
            group["lr"] = factor * max(rate - strength.get(bit, 0.0), RHO * rate)

    def _strengths(self) -> dict[int, float]:
        """$g_b$: the mean over layers at $b$ of the largest gradient of a scale, cut at 1.

        What is learned is $\\log s$, with $\\nabla s = \\nabla(\\log s) / s$.
        """
        by_width: dict[int, list[Tensor]] = {}
        for layer in self.layers.values():
            gradients = [
                p.grad.detach().abs() / p.detach().exp() for p in _scales(layer, layer.bit) if p.grad is not None
            ]
            if gradients:
                by_width.setdefault(layer.bit, []).append(torch.stack(gradients).amax())
        return {bit: float(torch.stack(strengths).clamp_max(1).mean()) for bit, strengths in by_width.items()}


def _scales(layer: QuantizedLayer, bit: int | None = None) -> list[nn.Parameter]:
    """Scales of a layer: all of them, or those of one width."""
    quantizers = [q for q in (layer.quantizer, layer.activation) if q is not None]
    if bit is not None:
        return [q.log_scale_of(bit)[0] for q in quantizers]
    return [p for q in quantizers for p in q.log_scales.parameters()]


class MultiPrecision(SwitchingRule):
    """Trains all widths together: for every batch a pass and an update at each, from the highest to the lowest.

    Scales learn at rates of their own, because their gradients at low widths are larger by orders of magnitude:

    $$\\lambda_b = \\eta_b \\max(\\lambda - g_b, 0.1 \\lambda), \\qquad
    g_b = \\operatorname{mean}_i \\min(\\max |\\nabla s_b^i|, 1), \\qquad \\eta_b \\approx 10^{-(h - b) / 2},$$

    with the learning rate $\\lambda$ of the weights, which the schedule sets. Scales are never decayed.

    Args:
        loss: criterion on (output, target); by default cross-entropy for labels, else the mean squared error.
        alrs: `"full"`, `"ratio"` ($\\eta_b \\lambda$ alone), or `None` ($\\lambda$ at every width).
        update: `"separate"`, or `"accumulate"` for the usual way: one update of the sum of all losses, without rates
            of their own (`alrs=None`).

    Raises:
        ValueError: if rates are asked for with a single update.

    Reference:
        Huang et al., 2025, section 3.2. The lower bound is ours; as printed the rate may become negative.
    """

    def __init__(
        self,
        loss: Loss | None = None,
        alrs: Literal["full", "ratio"] | None = "full",
        update: Literal["separate", "accumulate"] = "separate",
    ) -> None:
        super().__init__(loss, alrs)
        self.update = checks.one_of("update", update, ("separate", "accumulate"))
        if update == "accumulate" and alrs is not None:
            raise ValueError("one update of all widths has one rate: expected alrs=None with update='accumulate'")

    def partition(self) -> list[list[str]]:
        moving = [n for n, m in self.layers.items() if not m.fixed]
        fixed = [n for n, m in self.layers.items() if m.fixed]
        return [names for names in (moving, fixed) if names]

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.update == "separate":
            losses = list(self._passes(batch, backward, self.bits).values())
        else:
            losses = self._sum(batch, backward)
        named = {f"loss_{b}": value for b, value in zip(self.bits, losses, strict=True)}
        return {"loss": torch.stack(losses).mean(), **named}

    def _sum(self, batch: Batch, backward: Callable[[Tensor], None]) -> list[Tensor]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        losses = []
        for bit in self.bits:
            with use_bits(self.model, bit):
                loss = self._loss(batch)
                backward(loss)
            losses.append(loss.detach())
        return losses
