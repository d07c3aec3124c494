"""Leaky and perfect integrate-and-fire neurons, one call a time step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchfolio.checks import positive
from torchfolio.spiking.state import Stateful, state_modules
from torchfolio.spiking.surrogates import Surrogate, Triangle

__all__ = ["IF", "LIF", "find_neurons"]


class LIF(Stateful):
    """A layer of leaky integrate-and-fire neurons.

    Each call takes the input current $I[t]$ of one time step and returns the spikes:

    $$u[t] = \\lambda v[t-1] + I[t], \\qquad s[t] = \\Theta(u[t] - V_{th}), \\qquad \\lambda = 1 - 1/\\tau,$$

    and then resets, softly by $v[t] = u[t] - V_{th} s[t]$, or hard by $v[t] = (1 - s[t])\\, u[t] + s[t]\\, v_{reset}$.
    A hard-reset neuron leaks towards $v_{reset}$: $u[t] = \\lambda v[t-1] + v_{reset}/\\tau + I[t]$. A sequence starts
    from $v[0] = 0$ with soft, $v_{reset}$ with hard reset.

    Args:
        tau: time constant $\\tau \\ge 1$ in steps; 1 remembers nothing, infinity does not leak.
        v_threshold: $V_{th} > 0$.
        v_reset: potential after a spike; `None` resets softly.
        surrogate: backward of $\\Theta$.
        detach_state: whether to cut $v[t-1]$ in the charge, so that no gradient flows through time.
        detach_reset: whether to cut $s[t]$ in the reset, so that none flows through the reset.
        decay_input: charge by $I[t]/\\tau$ in place of $I[t]$.

    Shapes:
        `[B, ...]` to the same shape, zeros and ones. The state `v` takes shape, dtype and device of the first input.

    Raises:
        ValueError: on settings out of range, or an input of another shape than the state.

    Example:
        >>> neuron = LIF(tau=2.0)
        >>> sum(int(neuron(torch.ones(1))) for _ in range(3))
        3

    Reference:
        Meng et al., ICCV 2023, equation 2 (soft reset).
    """

    states = ("v",)

    def __init__(
        self,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        surrogate: Surrogate | None = None,
        detach_state: bool = False,
        detach_reset: bool = False,
        decay_input: bool = False,
    ) -> None:
        super().__init__()
        if not tau >= 1:
            raise ValueError(f"expected tau of at least 1, got {tau!r}")
        positive("v_threshold", v_threshold)
        if v_reset is not None and not v_reset < v_threshold:
            raise ValueError(f"expected v_reset below the threshold {v_threshold!r}, got {v_reset!r}")
        if decay_input and math.isinf(tau):
            raise ValueError("decay_input with infinite tau would never charge; expected a finite tau")
        self.tau, self.v_threshold, self.v_reset = float(tau), float(v_threshold), v_reset
        self.surrogate = surrogate if surrogate is not None else Triangle()
        self.detach_state, self.detach_reset, self.decay_input = detach_state, detach_reset, decay_input
        self.v: Tensor | None = None

    @property
    def decay(self) -> float:
        """$\\lambda$."""
        return 1 - 1 / self.tau

    def forward(self, current: Tensor) -> Tensor:
        u = self._charge(current)
        s = self.surrogate(u - self.v_threshold)
        self.v = self._reset(u, s)
        return s

    def _charge(self, current: Tensor) -> Tensor:
        if self.decay_input:
            current = current / self.tau
        if self.v is None:
            # From rest: lambda v_reset + v_reset / tau is v_reset itself.
            return current if self.v_reset is None else current + self.v_reset
        self.check(self.v, current)
        v = self.v.detach() if self.detach_state else self.v
        u = torch.add(current, v, alpha=self.decay)
        return u + self.v_reset / self.tau if self.v_reset else u

    def _reset(self, u: Tensor, s: Tensor) -> Tensor:
        if self.detach_state:
            # Nothing that is computed from v will be differentiated: build no graph for it.
            u, s = u.detach(), s.detach()
        elif self.detach_reset:
            s = s.detach()
        if self.v_reset is None:
            return torch.sub(u, s, alpha=self.v_threshold)
        return (1 - s) * u + s * self.v_reset

    def extra_repr(self) -> str:
        reset = "soft" if self.v_reset is None else f"{self.v_reset:g}"
        flags = [f for f in ("detach_state", "detach_reset", "decay_input") if getattr(self, f)]
        text = f"tau={self.tau:g}, v_threshold={self.v_threshold:g}, reset={reset}, surrogate={self.surrogate}"
        return ", ".join([text, *flags])


class IF(LIF):
    """A layer of integrate-and-fire neurons that do not leak: `LIF` with $\\lambda = 1$.

    At a constant current $I$ between 0 and $V_{th}$ a soft-reset neuron fires at the rate $I / V_{th}$.

    Args:
        v_threshold: $V_{th} > 0$.
        v_reset: potential after a spike; `None` resets softly.
        surrogate: backward of $\\Theta$.
        detach_state: whether the state is detached, as in `LIF`.
        detach_reset: whether the reset is detached, as in `LIF`.
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        surrogate: Surrogate | None = None,
        detach_state: bool = False,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(math.inf, v_threshold, v_reset, surrogate, detach_state, detach_reset)


def find_neurons(module: nn.Module) -> list[nn.Module]:
    """The spiking neurons of a network: modules with a potential `v`, those of other libraries too.

    Raises:
        ValueError: if there is none.
    """
    neurons = [m for m in state_modules(module) if hasattr(m, "v")]
    if not neurons:
        raise ValueError(
            f"expected a spiking neuron in the network, got {type(module).__name__} with none; "
            "to_spiking(model, LIF) puts them in place of ReLUs"
        )
    return neurons
