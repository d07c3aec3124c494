"""What is known of a traced module while it is read, node by node."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torchfolio.diagrams.graph import Graph, Value

__all__ = ["Reader"]


class Reader(Graph):
    """A graph that is being read.

    Attributes:
        values: tensor of the network that each node is, or several, or none.
        fixed: constant that each node is that depends on weights and constants alone.
        uses: number of times that each node is taken.
        grown: identities of constants that are made of what is learned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[Any, Any] = {}
        self.fixed: dict[Any, Any] = {}
        self.uses: Counter[Any] = Counter()
        self.grown: set[int] = set()

    def weight_axis(self, name: str, node: Any, dim: int) -> int:
        """A new axis of the result of a node, whose length a weight states."""
        made = self.axis(name, node.meta["val"].shape[dim])
        self.stated.add(made)
        return made

    def value(self, argument: Any) -> Value | None:
        """The tensor of the network that an argument is; of one that is used more than once, a use of it."""
        found = self.values.get(argument) if hasattr(argument, "op") else None
        if not isinstance(found, Value):
            return None
        return found if self.uses[argument] == 1 else self.use(found)
