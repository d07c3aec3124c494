"""Layers of a graph neural network trained one by one, or side by side with states that go up and down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.local.frozen_layer import FrozenLayer, adjacency_of, aggregate_once, tensors_of
from torchfolio.local.graph_layers import normalize_rows
from torchfolio.measure import saved_bytes
from torchfolio.shown import Shown

__all__ = ["LayerStep", "Sweeps", "adam", "label_loss", "train_locally"]


def adam(layer: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam for one layer, in one kernel."""
    return torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def label_loss(goodness: Tensor, right: bool) -> Tensor:
    """Mean cross-entropy of the goodness as the logit of "this is right"."""
    return F.softplus(-goodness if right else goodness).mean()


class LayerStep(Shown):
    """One step of training of one layer; the first also measures what autograd holds.

    Args:
        layer: layer that is trained.
        loss: its loss, a function of its weights.
        optimizer: optimizer of the layer alone.
        exclude: tensors that do not count as held (the features of the graph).
        clip: largest norm of the gradient; `None` for any.

    Attributes:
        peak: largest number of bytes held in the first step.
    """

    def __init__(
        self,
        layer: nn.Module,
        loss: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        exclude: Iterable[Tensor] = (),
        clip: float | None = None,
    ) -> None:
        self.layer, self.loss, self.optimizer, self.clip = layer, loss, optimizer, clip
        self.exclude = [layer, *exclude]
        self.peak: int | None = None

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        if self.peak is None:
            results: list[Tensor] = []
            self.peak = saved_bytes(lambda: results.append(self._backward()), exclude=self.exclude).peak
            loss = results[0]
        else:
            loss = self._backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.layer.parameters(), self.clip)
        self.optimizer.step()
        return loss

    def _backward(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()


def train_locally(
    module: nn.Module,
    step: Callable[[], Tensor],
    score: Callable[[], float] | None,
    *,
    epochs: int,
    val_every: int,
    patience: int,
) -> tuple[list[float], float]:
    """Train one layer to its own end, with the best weights kept.

    Args:
        module: module that is trained; its best weights are put back.
        step: one step of training, which returns its loss.
        score: validation score, larger is better; `None` for no early stopping.
        epochs: maximum number of steps.
        val_every: steps between validations; the first step has none.
        patience: validations without improvement before it stops.

    Returns:
        Losses of all steps, and the best score (NaN without one).

    Raises:
        ValueError: if the loss is NaN or infinite.
    """
    losses: list[Tensor] = []
    best, since, weights = -math.inf, 0, None
    for epoch in range(epochs):
        module.train()
        losses.append(step().detach())
        if score is None or not epoch or epoch % val_every:
            continue
        module.eval()
        with torch.no_grad():
            value = score()
        since += 1
        if value > best:
            best, since = value, 0
            weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        if since >= patience:
            break
    module.eval()
    history = torch.stack(losses).tolist()
    if not math.isfinite(sum(history)):
        raise ValueError("expected finite losses, got NaN or infinity; a lower learning rate may help")
    if weights is not None:
        module.load_state_dict(weights)
    return history, best if weights is not None else math.nan


class Sweeps(Shown):
    """Layers that train side by side: each reads the states of its neighbours, frozen, and writes its own.

    Args:
        layers: layers of the network, from the bottom.
        x: features `[N, F]`.
        edge_index: edges `[2, E]`.
        hidden: width of every layer.
        down: whether a layer reads the state of the layer above, too.
        above: tensor that the top layer reads as the state above it, `[N, C]`; `None` for nothing.
        order: `"alternating"` moves odd layers before even ones, `"together"` all from old states.
        dense_rows: number of last rows of `x` that are dense though the others are sparse.

    Attributes:
        states: outputs of the layers.
        peak: largest number of bytes that autograd held in the first step of training.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module] | nn.ModuleList,
        x: Tensor,
        edge_index: Tensor,
        hidden: int,
        *,
        down: bool = True,
        above: Tensor | None = None,
        order: Literal["alternating", "together"] = "together",
        dense_rows: int = 0,
    ) -> None:
        self.layers, self.edge_index, self.hidden, self.down = list(layers), edge_index, hidden, down
        self.adjacency = adjacency_of(self.layers[0], x, edge_index)
        self.x, self.above = x, above
        self.bottom = aggregate_once(self.layers[0], normalize_rows(x), self.adjacency, dense_rows)
        self.top = None if above is None else aggregate_once(self.layers[-1], above, self.adjacency)
        count = range(len(self.layers))
        self.groups = [count] if order == "together" else [count[::2], count[1::2]]
        self.states: list[Tensor] = []
        self.steps: list[LayerStep] = []
        self._output: Tensor | None = None

    @property
    def peak(self) -> int:
        """Layers step one after another: the largest of them counts."""
        return max((step.peak or 0 for step in self.steps), default=0)

    @torch.no_grad()
    def rise(self) -> None:
        """Fill the states from the bottom up, with zeros as the states above."""
        self.states = []
        for l in range(len(self.layers)):
            self.states.append(self._layer(l, zeros=True)())

    @torch.no_grad()
    def move(self) -> None:
        """Renew all states once."""
        for group in self.groups:
            new = {l: self._layer(l)() for l in group}
            for l, z in new.items():
                self.states[l] = z

    def settled(self, time_steps: int) -> list[Tensor]:
        """Rise and move; the states of all layers at the time steps from 2 to the last but one."""
        self.rise()
        states = []
        for time in range(1, time_steps):
            self.move()
            states += self.states if time > 1 else []
        return states

    def prepare(
        self, loss: Callable[[int, Tensor], Tensor], lr: float, weight_decay: float, clip: float | None = None
    ) -> None:
        """Set the loss of layer l on its output, and one Adam a layer."""

        def of(l: int) -> Callable[[], Tensor]:
            def value() -> Tensor:
                self._output = self._layer(l)()
                return loss(l, self._output)

            return value

        known = [t for piece in (self.bottom, self.top) if piece is not None for t in tensors_of(piece)]
        self.steps = [
            LayerStep(layer, of(l), adam(layer, lr, weight_decay), known, clip) for l, layer in enumerate(self.layers)
        ]

    def step(self) -> Tensor:
        """One step of every layer, each writing the state it had before it; returns the sum of losses."""
        total = self.x.new_zeros(())
        for group in self.groups:
            new = {}
            for l in group:
                total = total + self.steps[l]()
                assert self._output is not None
                new[l], self._output = self._output.detach(), None
            for l, z in new.items():
                self.states[l] = z
        return total

    def _layer(self, l: int, zeros: bool = False) -> FrozenLayer:
        pieces: list[Any] = [normalize_rows(self.states[l - 1]) if l else self.bottom]
        last = l == len(self.layers) - 1
        if self.down and not (last and self.top is None):
            width = self.above.shape[1] if last and self.above is not None else self.hidden
            if zeros:
                pieces.append(self.x.new_zeros(len(self.x), width))
            else:
                pieces.append(self.top if last else normalize_rows(self.states[l + 1]))
        return FrozenLayer(self.layers[l], pieces, self.edge_index, self.adjacency)
