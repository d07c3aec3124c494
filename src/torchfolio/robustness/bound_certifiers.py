"""Certifiers by bounds on margins over $L_\\infty$ balls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.models.device import device_of
from torchfolio.robustness.bound_verifiers import exact_copy
from torchfolio.robustness.certifier_base import Certificate, Certifier, classes_of
from torchfolio.robustness.layer_list import Layers
from torchfolio.robustness.margins import crown_margins, interval_margins
from torchfolio.robustness.properties import Box

__all__ = ["BoundCertifier", "CrownCertifier", "IntervalCertifier"]

Margins = Callable[[Tensor, Tensor], Tensor]


class BoundCertifier(Certifier):
    """A certifier by lower bounds on the margins of the prediction over $L_\\infty$ balls.

    Args:
        model: (nested) `nn.Sequential` of layers in `bounds.KNOWN`; taken in evaluation mode.
        eps: radius $\\varepsilon \\ge 0$.
        clip: range of valid inputs, to which balls are cut; `None` where there is none.
        dtype: precision of the bounds; they are lowered by what rounding may add up to.

    Raises:
        ValueError: on a radius that is negative or no number.
        TypeError: in `certify`, naming a layer without bounds.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        clip: tuple[float, float] | None = (0.0, 1.0),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(model)
        self.eps = float(checks.at_least("eps", eps, 0))
        self.clip, self.dtype = clip, dtype
        self.rounding = 1e-12 if dtype == torch.float64 else 1e-5

    @abstractmethod
    def margins(self, layers: Layers, box: Box, labels: Tensor) -> Tensor:
        """Lower bounds on $z_y - z_j$, `[B, K]`, 0 at the label."""

    def bounds(self) -> Margins:
        """Margins over balls as a function of their centres `[B, ...]` and labels `[B]`, differentiable in the centres."""
        exact, device = exact_copy(self.model, self.dtype), device_of(self.model)

        def of(x: Tensor, labels: Tensor) -> Tensor:
            x, labels = x.to(device, self.dtype), labels.to(device)
            return self.margins(Layers(exact, x.shape[1:]), self.ball(x), labels)

        return of

    def ball(self, x: Tensor) -> Box:
        """The balls around inputs.

        Raises:
            ValueError: if an input lies outside `clip`.
        """
        # Inputs in the range in their own precision are in it in this one.
        low, high = (float(v) for v in x.detach().aminmax())
        if self.clip is not None and not (low >= self.clip[0] and high <= self.clip[1]):
            raise ValueError(
                f"expected inputs from {self.clip[0]:g} to {self.clip[1]:g}, got {low:g} to {high:g}; "
                "pass their range as clip, or None"
            )
        return Box.ball(x, self.eps, self.clip)

    def _prepared(self) -> Callable[[Tensor, int], Certificate]:
        exact, bounds = exact_copy(self.model, self.dtype), self.bounds()

        @torch.no_grad()
        def certify(x: Tensor, first: int) -> Certificate:
            prediction = classes_of(exact(x.to(device_of(exact), self.dtype)))
            margins = bounds(x, prediction)
            value = margins.scatter(1, prediction[:, None], torch.inf).amin(1)
            # NaN is not above 0, and a bound of infinity is an overflow.
            return Certificate(prediction, (value > 0) & value.isfinite(), value)

        return certify


class IntervalCertifier(BoundCertifier):
    """Certifies by interval bounds, the last layer merged with the margins."""

    name = "interval"

    def margins(self, layers: Layers, box: Box, labels: Tensor) -> Tensor:
        return interval_margins(layers, box, labels, rounding=self.rounding)


class CrownCertifier(BoundCertifier):
    """Certifies by CROWN's linear bounds: what intervals certify and more, at a higher cost.

    Args:
        model: (nested) `nn.Sequential` of layers in `bounds.KNOWN`; taken in evaluation mode.
        eps: radius $\\varepsilon \\ge 0$.
        clip: range of valid inputs, to which balls are cut; `None` where there is none.
        dtype: precision of the bounds.
        intermediate: way in which the inputs of activations are bounded: `"crown"`, or `"ibp"` (CROWN-IBP), which is
            cheaper.
    """

    name = "crown"
    batch_size = 128

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        clip: tuple[float, float] | None = (0.0, 1.0),
        dtype: torch.dtype = torch.float64,
        intermediate: str = "crown",
    ) -> None:
        super().__init__(model, eps, clip=clip, dtype=dtype)
        self.intermediate = checks.one_of("intermediate", intermediate, ("crown", "ibp"))

    def margins(self, layers: Layers, box: Box, labels: Tensor) -> Tensor:
        return crown_margins(layers, box, labels, intermediate=self.intermediate, rounding=self.rounding)
