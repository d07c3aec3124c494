"""Right-hand sides of differential equations, as solvers see them: one tensor in, one tensor out, counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchfolio.shown import Shown

__all__ = ["AdjointTerms", "Linearised", "Packing", "Stats", "Terms"]


@dataclass
class Stats:
    """What a solve cost; the figures of the backward pass are filled in by it.

    Attributes:
        n_steps: accepted steps.
        n_rejected: steps that were tried and thrown away.
        nfe_forward: evaluations of the field.
        n_steps_backward: accepted steps of the adjoint equation.
        n_rejected_backward: rejected steps of the adjoint equation.
        nfe_backward: evaluations of the field in the backward pass.
    """

    n_steps: int = 0
    n_rejected: int = 0
    nfe_forward: int = 0
    n_steps_backward: int = 0
    n_rejected_backward: int = 0
    nfe_backward: int = 0


class Packing(Shown):
    """How a pytree of tensors is packed into one tensor, and back.

    A single tensor keeps its shape; several leaves are raveled and joined.

    Args:
        y0: tensor, or nested lists, tuples and dicts of tensors, all of one floating dtype and device.

    Raises:
        TypeError: if a leaf is no tensor in floating point, or leaves differ in dtype or device.
        ValueError: if there is no leaf, or leaves have no entries.
    """

    def __init__(self, y0: Any) -> None:
        leaves, self.tree = pytree.tree_flatten(y0)
        if not leaves:
            raise ValueError("expected y0 to hold a tensor, got none")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"expected y0 to hold tensors in floating point, got {got}")
        kinds = {(leaf.dtype, leaf.device) for leaf in leaves}
        if len(kinds) > 1:
            raise TypeError(f"expected the tensors of y0 to share dtype and device, got {sorted(map(str, kinds))}")
        if not sum(leaf.numel() for leaf in leaves):
            raise ValueError("expected y0 to have entries, got none")
        (self.dtype, self.device) = kinds.pop()
        self.single = isinstance(y0, Tensor)
        self.shapes = [leaf.shape for leaf in leaves]
        self.sizes = [leaf.numel() for leaf in leaves]

    def pack(self, y: Any, what: str = "y0") -> Tensor:
        """Join the leaves of a tree of the same form.

        Raises:
            ValueError: if the form or a shape is another one.
        """
        if self.single and isinstance(y, Tensor):
            leaves, fits = [y], y.shape == self.shapes[0]
        else:
            leaves, tree = pytree.tree_flatten(y)
            shapes = [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]
            fits = tree == self.tree and shapes == self.shapes
        if not fits:
            expected = ", ".join(str(tuple(shape)) for shape in self.shapes)
            got = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in leaves)
            raise ValueError(f"expected {what} of the form of y0, with shapes {expected}, got {got}")
        return leaves[0] if self.single else torch.cat([leaf.reshape(-1) for leaf in leaves])

    def unpack(self, y: Tensor) -> Any:
        """Take a packed state apart; leading axes before the packed ones are kept."""
        if self.single:
            return y
        lead = y.shape[:-1]
        parts = [part.reshape(*lead, *s) for part, s in zip(y.split(self.sizes, -1), self.shapes, strict=True)]
        return pytree.tree_unflatten(parts, self.tree)


class Terms(Shown):
    """Right-hand side f of dy/dt = f(t, y) on packed states.

    Args:
        field: function `(t, y) -> dy/dt` of a time (tensor without axes) and a tree.
        packing: packing of trees.
        params: tensors that `field` depends on and that want gradients.
        stats: counter of evaluations.
    """

    noisy = False

    def __init__(
        self, field: Callable[..., Any], packing: Packing, params: Sequence[Tensor] = (), stats: Stats | None = None
    ) -> None:
        self.field, self.packing, self.params = field, packing, tuple(params)
        self.stats = Stats() if stats is None else stats
        self.backward = False  # whether evaluations count as those of the backward pass

    def time(self, t: float) -> Tensor:
        """A time as the field is handed it."""
        return torch.full((), t, dtype=self.packing.dtype, device=self.packing.device)

    def count(self) -> None:
        """Count one evaluation."""
        if self.backward:
            self.stats.nfe_backward += 1
        else:
            self.stats.nfe_forward += 1

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """dy/dt at a time and a packed state."""
        self.count()
        packing = self.packing
        return packing.pack(self.field(self.time(t), packing.unpack(y)), "the field's output")

    def rates(self, t: float, y: Tensor) -> tuple[Tensor, ...]:
        """What multiplies the increments of time and, for stochastic terms, of the Brownian motion."""
        return (self(t, y),)

    def increment(self, rates: Sequence[Tensor], h: float, noise: Any) -> Tensor:
        """Change of the state by rates over a time and a Brownian increment."""
        return rates[0] * h

    def move(self, t: float, y: Tensor, h: float, noise: Any) -> Tensor:
        """Change of the state if the rates at a state held for a time and a Brownian increment."""
        return self.increment(self.rates(t, y), h, noise)

    def increment_cotangents(self, a: Tensor, h: float, noise: Any) -> tuple[Tensor, ...]:
        """Gradients in the rates from that in their increment."""
        return (a * h,)

    def adjoint(self) -> AdjointTerms:
        """Right-hand side of the adjoint equation."""
        return AdjointTerms(self)

    def linearised(self, t: float, y: Tensor) -> Linearised:
        """Rates at a state, with the products with their Jacobian."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            return Linearised(y, self.rates(t, y), self.params)


class AdjointTerms(Terms):
    """Right-hand side of the adjoint equation, on the flat state of y, its gradient a and the parameters' gradients G.

        dy/dt = f,    da/dt = -aᵀ ∂f/∂y,    dG/dt = -aᵀ ∂f/∂θ

    Args:
        terms: right-hand side f.
    """

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms.field, terms.packing, (), terms.stats)
        self.terms, self.backward, self.noisy = terms, True, terms.noisy
        self.n_params = sum(p.numel() for p in terms.params)

    def __call__(self, t: float, y: Tensor) -> Tensor:
        state, a = self._parts(y)
        at = self.terms.linearised(t, state)
        rate = at.rates[0]
        return self._joined(rate, *at.pull([-a]))

    def _parts(self, s: Tensor) -> tuple[Tensor, Tensor]:
        n = (s.numel() - self.n_params) // 2
        shape = self.packing.shapes[0] if self.packing.single else (n,)
        return s[:n].view(shape), s[n : 2 * n].view(shape)

    def _joined(self, y: Tensor, a: Tensor, params: list[Tensor]) -> Tensor:
        return torch.cat([y.reshape(-1), a.reshape(-1), *(p.reshape(-1).to(y.dtype) for p in params)])


class Linearised(Shown):
    """Rates at a state and, on demand, gradients through them.

    Attributes:
        rates: rates, detached.
    """

    def __init__(self, y: Tensor, rates: tuple[Tensor, ...], params: tuple[Tensor, ...]) -> None:
        self.y, self.params, self._graph = y, params, rates
        self.rates = tuple(rate.detach() for rate in rates)

    def pull(self, cotangents: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Gradients in the state and in the parameters; the graph is freed."""
        inputs = (self.y, *self.params)
        pairs = [(r, a) for r, a in zip(self._graph, cotangents, strict=True) if r.requires_grad]
        self._graph = ()
        if not pairs:
            return torch.zeros_like(self.y), [torch.zeros_like(p) for p in self.params]
        outputs, weights = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, inputs, weights, allow_unused=True, materialize_grads=True)
        return grads[0], list(grads[1:])
