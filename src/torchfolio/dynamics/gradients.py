"""Ways to differentiate a solve: through the solver, from checkpoints, by reversing it, by the adjoint equation."""

from __future__ import annotations

from torchfolio.dynamics.adjoint_gradient import Adjoint
from torchfolio.dynamics.checkpoint_gradient import Checkpoint
from torchfolio.dynamics.gradient_base import Direct, Gradient, check_gradient
from torchfolio.dynamics.reversible_gradient import Reversible
from torchfolio.dynamics.used_parameters import refuse_random_layers

__all__ = ["Adjoint", "Checkpoint", "Direct", "Gradient", "Reversible", "check_gradient", "refuse_random_layers"]
