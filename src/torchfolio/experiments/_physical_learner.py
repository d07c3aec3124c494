"""Two physical blocks that learn digits by local rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchfolio.local.physical_ff import PhysicalBlock, PhysicalLocalNet
from torchfolio.local.physical_systems import PhysicalSystem, as_physical
from torchfolio.runs import Run

__all__ = ["PhysicalLearner", "System", "silent"]

System = Callable[..., PhysicalSystem]
"""A kind of physical systems: of numbers of inputs and outputs, and a seed."""


def silent(n_in: int, n_out: int, *, seed: int) -> PhysicalSystem:
    """A system that answers nothing."""
    return as_physical(lambda x: x.new_zeros(len(x), n_out), n_in, n_out, seed=seed)


class PhysicalLearner:
    """Digits, and networks of two blocks for them."""

    def __init__(self, run: Run[Any]) -> None:
        self.run, self.settings = run, run.settings
        data = run.data("digits", normalize=False)
        x, y = (torch.cat([part.tensors[k] for part in (data.train, data.val, data.test)]) for k in (0, 1))
        rows = torch.randperm(len(x), generator=run.generator())
        x, y = x.flatten(1)[rows].to(run.device), y[rows].to(run.device)
        n = min(run.settings.train_size, len(x) - 360)
        self.train, self.test = (x[:n], y[:n]), (x[-360:], y[-360:])

    def blocks(self, n_in: int, system: System, skip: bool = True) -> list[PhysicalBlock]:
        """Blocks of two specimens of a system."""
        n, seed = self.settings.hidden, 10 * self.run.seed
        widths = (n_in, n)
        return [PhysicalBlock(system(w, n, seed=seed + k), n, skip, seed=seed + k) for k, w in enumerate(widths)]

    def network(
        self, system: System, skip: bool = True, kind: type[PhysicalLocalNet] = PhysicalLocalNet
    ) -> PhysicalLocalNet:
        """Blocks for digits with their labels in front."""
        return kind(self.blocks(74, system, skip), 10, 64, standardize=False)

    def fit(self, net: Any, epochs: int, first: bool = True, seed: int = 0) -> Any:
        """Train a network, or train it further."""
        s = self.settings
        train = net.to(self.run.device).fit if first else net.partial_fit
        own = {"inner_steps": s.inner_steps, "lr": s.lr, "batch_size": s.batch_size}
        return train(*self.train, epochs=epochs, seed=self.run.seed + 1000 * seed, **own)

    def course(self, net: PhysicalLocalNet) -> dict[str, Any]:
        """Test accuracy of a network by epoch, its physical calls, and how much each block owes to its system."""
        curve, calls = [], 0
        for epoch in self.run.progress(range(self.settings.epochs), "epochs"):
            net.reset_calls()
            self.fit(net, 1, epoch == 0, epoch)
            calls += net.physical_calls
            curve.append(net.score(*self.test))
        return {"curve": curve, "calls": calls, "reliance": [block.reliance() for block in net.blocks]}

    def local(self, system: System, skip: bool = True) -> dict[str, Any]:
        """The course of a network of a system."""
        return self.course(self.network(system, skip))
