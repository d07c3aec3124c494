"""Verifiers by bounds of a whole box, and what all verifiers ask of a network."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.measure import untouched
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.bounds import crown
from torchfolio.robustness.interval_bounds import Bounds, Range, ibp
from torchfolio.robustness.layer_list import Layers
from torchfolio.robustness.properties import Box, Property, Verdict, classification
from torchfolio.shown import Shown

__all__ = ["Crown", "Interval", "check_outputs", "exact_copy", "searched"]


class Interval(Shown):
    """A verifier by interval bounds of the whole box: sound, never falsifies by more than trying the centre.

    Args:
        dtype: dtype that bounds are computed in. Bounds are lowered by what their rounding may be, 1e-12 in float64 and
            1e-5 in float32 of the absolute values that were summed.
    """

    name = "interval"

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.rounding = 1e-12 if dtype == torch.float64 else 1e-5

    def verify(self, model: nn.Module, lower: Tensor, upper: Tensor, label: int, timeout: float = 60.0) -> Verdict:
        """Whether all inputs between `lower` and `upper`, of one input's shape, have the label."""
        box = Box(lower[None], upper[None])
        with untouched(model, training=False), torch.no_grad():
            classes = model(box.center.to(next(model.parameters()).dtype)).shape[1]
        return self.decide(model, box, classification(label, classes), timeout)

    def decide(self, model: nn.Module, box: Box, prop: Property, timeout: float = 60.0) -> Verdict:
        """Whether a property holds on one box.

        Args:
            model: network, left as it is.
            box: one box of inputs.
            prop: property.
            timeout: seconds, of verifiers that search.
        """
        if len(box) != 1:
            raise ValueError(f"expected one box, got {len(box)}")
        started = time.perf_counter()
        exact = exact_copy(model, self.dtype)
        check_outputs(exact, box.to(self.dtype), prop)
        verdict = self._decide(exact, box.to(self.dtype), prop, started + timeout)
        if verdict.witness is not None and not self._confirmed(exact, box, prop, verdict.witness):
            verdict = Verdict("unknown", None, verdict.seconds, verdict.boxes)
        return Verdict(verdict.status, verdict.witness, time.perf_counter() - started, verdict.boxes)

    @torch.no_grad()
    def _confirmed(self, model: nn.Module, box: Box, prop: Property, witness: Tensor) -> bool:
        inside = bool(box.to(self.dtype).contains(witness[None]).all())
        return inside and bool(prop.violated(model(witness[None]))[0])

    def _decide(self, model: nn.Module, box: Box, prop: Property, deadline: float) -> Verdict:
        with torch.no_grad():
            bounds = ibp(model, box, prop, rounding=self.rounding)
        assert isinstance(bounds, Bounds)
        return self._judge(model, box, prop, bounds)

    def _judge(self, model: nn.Module, box: Box, prop: Property, bounds: Bounds) -> Verdict:
        if bool(prop.holds(bounds.lower)[0]):
            return Verdict("verified", boxes=1)
        with torch.no_grad():
            violated = prop.violated(model(box.center))
        return Verdict("falsified", box.center[0], boxes=1) if bool(violated[0]) else Verdict("unknown", boxes=1)


class Crown(Interval):
    """A verifier by CROWN bounds of the whole box.

    Args:
        intermediate: way to bound the inputs of activations, see `crown`.
        alpha_steps: number of steps on the slopes, see `crown`.
        dtype: dtype of the bounds, see `Interval`.

    A subclass may change what the verifier believes in `shrink` and `adjust`; this class changes nothing.
    """

    name = "crown"

    def __init__(self, intermediate: str = "crown", alpha_steps: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self.intermediate, self.alpha_steps = intermediate, whole("alpha_steps", alpha_steps, 0)

    def shrink(self, box: Box) -> Box:
        """The box that is looked at in place of the one that was asked for."""
        return box

    def adjust(self, low: Tensor, high: Tensor) -> Range:
        """The bounds of the inputs of an activation that are used in place of those found."""
        return low, high

    def bounds(self, layers: Layers, box: Box, prop: Property) -> Bounds:
        with torch.no_grad():
            return crown(
                layers, box, prop, intermediate=self.intermediate, alpha_steps=self.alpha_steps, adjust=self.adjust,
                rounding=self.rounding,
            )  # fmt: skip

    def _decide(self, model: nn.Module, box: Box, prop: Property, deadline: float) -> Verdict:
        box = self.shrink(box)
        return self._judge(model, box, prop, self.bounds(Layers(model, box.lower.shape[1:]), box, prop))


def exact_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy in evaluation mode; NaN and infinity are refused, of which no bound says anything."""
    exact = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    for name, value in [*exact.named_parameters(), *exact.named_buffers()]:
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"expected a network of finite numbers, got NaN or infinity in {name}")
    return exact


@torch.no_grad()
def check_outputs(model: nn.Module, box: Box, prop: Property) -> None:
    """Raise ValueError unless the property is one of the network's outputs."""
    outputs = tuple(model(box.center).shape[1:])
    if outputs != (prop.C.shape[1],):
        raise ValueError(f"expected a property of the outputs {outputs}, got one of {prop.C.shape[1]}")


def searched(model: nn.Module, box: Box, prop: Property, steps: int) -> Tensor | None:
    """A violating input by PGD on the box, measured in its radii."""
    center, radius = box.center, box.radius

    def scaled(u: Tensor) -> Tensor:
        return model(torch.minimum(torch.maximum(center + radius * u, box.lower), box.upper))

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        return -prop.by_group(prop.slack(outputs)).amin(1)

    zeros, label = torch.zeros_like(center), torch.zeros(1, dtype=torch.long, device=center.device)
    generator = torch.Generator(center.device).manual_seed(0)
    settings = {"eps": 1.0, "alpha": torch.linspace(0.5, 0.02, steps), "steps": steps, "restarts": 32}
    attack = pgd(scaled, zeros, label, loss=loss, generator=generator, **settings)  # pyright: ignore[reportArgumentType]
    point = torch.minimum(torch.maximum(center + radius * attack.x_adv, box.lower), box.upper)
    with torch.no_grad():
        return point[0] if bool(prop.violated(model(point))[0]) else None
