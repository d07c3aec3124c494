"""What a method says to adapt one trained network to data: `Adapter`, which `torchfolio adapt` calls."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchfolio import checks
from torchfolio.engine.devices import resolve_device
from torchfolio.engine.loader import Data
from torchfolio.engine.modes import seeded
from torchfolio.shown import Shown

__all__ = ["Adapted", "Adapter", "Adapting"]


@dataclass(frozen=True, repr=False)
class Adapted(Shown):
    """An adapted network and what there is to say of it.

    Attributes:
        model: an ordinary module, in evaluation mode.
        report: figures by name.
    """

    model: nn.Module
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapting:
    """What an adaptation runs with.

    Attributes:
        seed: seed of whatever is drawn; every global generator is seeded with it too.
        device: device of the network.
        num_classes: number of classes of the data, 0 where they have none.
        val: data that settings may be chosen on, or `None`.
        say: function that is called with a line about what is being done.
    """

    seed: int
    device: torch.device
    num_classes: int = 0
    val: Data | None = None
    say: Callable[[str], None] = lambda text: None


class Adapter(Shown, ABC):
    """A way to adapt a trained network to data. Settings are the keyword arguments of its class, how long to train too.

    A method fills `_adapt`, and `recipe` where it changes the network's structure.
    """

    @abstractmethod
    def _adapt(self, model: nn.Module, data: Data, run: Adapting) -> Adapted:
        """Adapt a network.

        Args:
            model: a copy of the user's, on its device, which may be changed in place.
            data: training data, see `torchfolio.engine.fit`.
            run: seed, device and the like.
        """

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        """What builds a network of the adapted structure, given what builds the original; asked for after `adapt`.

        Args:
            network: `{"build": import path, "arguments": {...}}`, the form that `torchfolio.bundle.build` takes.

        Returns:
            The same form; `network` itself where the structure is the same.
        """
        return network

    def adapt(
        self,
        model: nn.Module,
        data: Data,
        *,
        val: Data | None = None,
        num_classes: int = 0,
        seed: int = 0,
        device: str | torch.device = "auto",
        say: Callable[[str], None] = lambda text: None,
    ) -> Adapted:
        """Adapt a copy of a network, which itself is left as it is, as are global generators.

        Args:
            model: trained network.
            data: training data, see `torchfolio.engine.fit`.
            val: data that settings may be chosen on.
            num_classes: number of classes of the data, where a method needs it.
            seed: seed of whatever is drawn.
            device: device to compute on: `"auto"`, `"cpu"`, `"cuda"`, ...
            say: called with a line about what is being done.

        Returns:
            The adapted network and its figures.

        Raises:
            ValueError: if the network holds NaN.
        """
        place = resolve_device(device)
        checks.network(model)
        net = copy.deepcopy(model).to(place)
        with seeded(seed):
            done = self._adapt(net, data, Adapting(seed, place, num_classes, val, say))
        return Adapted(done.model.eval(), dict(done.report))
