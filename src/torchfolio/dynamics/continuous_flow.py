"""Continuous normalising flows: densities by a neural ordinary differential equation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchfolio.checks import one_of, whole
from torchfolio.dynamics.gradient_base import Gradient
from torchfolio.dynamics.integrate import odeint
from torchfolio.dynamics.solved_module import SolvedModule
from torchfolio.dynamics.solver import Solver

__all__ = ["ContinuousFlow"]


class ContinuousFlow(SolvedModule):
    """A density on vectors: normal noise at time 0, carried by a field to data at time 1.

        dy/dt = f(t, y),    log p(y(1)) = log N(y(0); 0, I) - ∫₀¹ tr(∂f/∂y) dt

    Train it by maximising `log_prob` of data.

    Args:
        field: module or function `(t, y) -> dy/dt` for y `[B, channels]`, each example by itself, such as `VectorField(2,
            time=True)`.
        channels: number of channels of an example.
        trace: "exact", by one product with the Jacobian a channel; or "hutchinson", unbiased by a single one, with one
            random probe an example and solve.
        solver: method; `Tsit5()` by default.
        gradient: way to differentiate, as for `odeint`.
        rtol: relative tolerance, at least 0.
        atol: absolute tolerance, above 0.
        dt: length of fixed steps, above 0; steps are adaptive if None and the solver has an error estimate.

    Shapes:
        x: `[B, channels]`; log densities `[B]`.

    Attributes:
        stats: cost of the last solve; None before the first.

    Raises:
        ValueError: if an option is out of range or data have another shape.

    Reference:
        Kidger, arXiv 2202.02435, section 2.3.1; Grathwohl et al., FFJORD, arXiv 1810.01367 (Hutchinson's trace).
    """

    def __init__(
        self,
        field: Callable[[Tensor, Tensor], Tensor],
        channels: int,
        trace: str = "hutchinson",
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        rtol: float = 1e-4,
        atol: float = 1e-5,
        dt: float | None = None,
    ) -> None:
        super().__init__(solver, gradient, rtol, atol, dt)
        self.field, self.channels = field, whole("channels", channels, 1)
        self.trace = one_of("trace", trace, ("exact", "hutchinson"))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, trace={self.trace}, {self.solver}"

    def log_prob(self, x: Tensor, seed: int | None = None) -> Tensor:
        """Log density of every example `[B]`.

        Args:
            x: examples `[B, channels]`.
            seed: number that decides the probes; drawn by torch's global generator if None.
        """
        if x.dim() != 2 or x.shape[1] != self.channels or not len(x):
            raise ValueError(f"expected examples [B, {self.channels}], got shape {tuple(x.shape)}")
        if self.trace == "exact":
            probes = torch.eye(self.channels, dtype=x.dtype, device=x.device)[:, None].expand(-1, *x.shape)
        else:
            generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)
            signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device)
            probes = (2 * signs - 1).to(x.dtype)[None]

        def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with_grad = torch.is_grad_enabled()
            with torch.enable_grad():
                y = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
                f = self.field(t, y)
                trace = torch.zeros_like(y[:, 0])
                for probe in probes if f.requires_grad else ():
                    (product,) = torch.autograd.grad(
                        f,
                        y,
                        probe,
                        create_graph=with_grad,
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    trace = trace + (product * probe).sum(1)
            return (f, trace) if with_grad else (f.detach(), trace.detach())

        (y, change), self.stats = self._solve(flow, (x, torch.zeros_like(x[:, 0])), (1.0, 0.0))
        y0 = y[-1]
        normal = -0.5 * (y0.square().sum(1) + self.channels * math.log(2 * math.pi))
        # Backwards in time the integral comes with the other sign.
        return normal + change[-1]

    def sample(self, n: int, seed: int | None = None) -> Tensor:
        """Draw `n` examples `[n, channels]`; gradients reach the field.

        Args:
            n: number of examples, at least 1.
            seed: number that decides them; drawn by torch's global generator if None.
        """
        like = next(self.parameters(), torch.empty(()))
        generator = None if seed is None else torch.Generator(like.device).manual_seed(seed)
        shape = (whole("n", n, 1), self.channels)
        noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        ys, self.stats = self._solve(self.field, noise, (0.0, 1.0))
        return ys[-1]

    forward = log_prob

    def _solve(self, field: Callable[..., Any], y0: Any, ts: tuple[float, float]) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        return odeint(field, y0, ts, self.solver, self.gradient, params=params, **self.steps())
