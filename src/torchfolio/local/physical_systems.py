"""Physical layers: systems that can be measured but not differentiated, four of them simulated.

They stand under `torchfolio.local.physical_ff`, in a file of their own because any training of physical networks can use
them. Calling a system measures it: the result carries no graph, is counted, and holds fresh noise. `response` is the
noiseless formula, which autograd can follow; only baselines that know the physics may use it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.checks import between
from torchfolio.local.kerr_cavity import KerrCavity
from torchfolio.local.measured_surrogate import MeasuredSurrogate
from torchfolio.local.metasurface_cavity import MetasurfaceCavity
from torchfolio.local.multimode_optics import MultimodeOptics
from torchfolio.local.physical_system import PhysicalSystem

__all__ = [
    "BlackBox",
    "KerrCavity",
    "MeasuredSurrogate",
    "MetasurfaceCavity",
    "MultimodeOptics",
    "PhysicalSystem",
    "as_physical",
]


class BlackBox(PhysicalSystem):
    """Any callable as a physical layer; made by `as_physical`.

    A module is called in evaluation mode and left in the mode it had. Drift is the callable's own `drift(step)` where it
    has one, else a drift of the gain of every output.
    """

    gain: Tensor

    def __init__(self, fn: Callable[[Any], Any], n_in: int, n_out: int, *, numpy: bool = False, **system: Any) -> None:
        super().__init__(n_in, n_out, **system)
        self.fn, self.numpy, self._warned = fn, numpy, False
        with torch.no_grad():
            self.gain.fill_(1)

    def response(self, x: Tensor) -> Tensor:
        """The callable's outputs as a tensor like the input, times the gains."""
        modules = list(self.fn.modules()) if isinstance(self.fn, nn.Module) else []
        modes = [m.training for m in modules]
        try:
            for m in modules:
                m.training = False
            x = x.clone()  # the callable may write into its input
            y = self.fn(x.cpu().numpy() if self.numpy else x)
        finally:
            for m, mode in zip(modules, modes, strict=True):
                m.training = mode
        if y is None or (y.is_complex() if isinstance(y, Tensor) else np.iscomplexobj(y)):
            kind = "complex ones" if y is not None else "None"
            raise TypeError(f"expected real outputs of a physical layer, got {kind}")
        y = torch.as_tensor(y)
        if y.requires_grad and not torch.is_grad_enabled() and not self._warned:
            warnings.warn("a physical layer returned a tensor with a graph, which is cut", stacklevel=3)
            self._warned = True
        return y.to(x) * self.gain.to(x) if y.shape[-1:] == self.gain.shape else y.to(x)

    def drift(self, step: float) -> None:
        """Drift of the callable itself where it knows how, else of the gains."""
        own = getattr(self.fn, "drift", None)
        if own is None:
            super().drift(step)
        else:
            own(float(between("step", step, 0, 1)))

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.randn(self.n_out, generator=generator)}


def as_physical(
    fn: Callable[[Any], Any], n_in: int, n_out: int, *, numpy: bool = False, noise_std: float = 0.0, seed: int = 0
) -> PhysicalSystem:
    """Take any callable `[B, n_in] -> [B, n_out]` as a physical layer; a `PhysicalSystem` is returned as it is.

    Args:
        fn: a Python function, a module, a device.
        n_in: number of its inputs.
        n_out: number of its outputs.
        numpy: whether it takes arrays; it may return arrays in any case.
        noise_std: standard deviation of noise that is added to its outputs.
        seed: seed of noise and drift.

    Raises:
        TypeError: if it is not callable.
        ValueError: if it is a system of other sizes.

    Example:
        >>> box = as_physical(lambda x: x.sin(), 3, 3)
        >>> box(torch.zeros(2, 3)).shape, box.calls
        (torch.Size([2, 3]), 1)
    """
    if not callable(fn):
        raise TypeError(f"expected a callable as physical layer, got {type(fn).__name__}")
    if isinstance(fn, PhysicalSystem):
        if (fn.n_in, fn.n_out) != (n_in, n_out):
            raise ValueError(f"expected a system of {n_in} inputs and {n_out} outputs, got {fn.n_in} and {fn.n_out}")
        return fn
    return BlackBox(fn, n_in, n_out, numpy=numpy, noise_std=noise_std, seed=seed)
