"""The losses of all examples along a training: a recorder for any training, and gradient descent on full batches.

Reference:
    Rosenfeld, Risteski, ICLR 2024 (arXiv 2311.04163), Sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import positive, whole
from torchfolio.data import Examples
from torchfolio.engine.modes import evaluating
from torchfolio.measure import hessian_eigenvalues, untouched
from torchfolio.shown import Shown

__all__ = ["LossRecorder", "Trace", "trace"]

Loss = Callable[[Tensor, Tensor], Tensor]


def _each(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


class LossRecorder(Shown):
    """Keeps the loss of every example at every step; a callback of `fit`, or called by one's own loop.

    The network is asked in evaluation mode, so that dropout and batch statistics do not couple examples.

    Args:
        model: network that trains.
        data: examples to follow: the training set or a part of it.
        loss: criterion that gives a loss for each example, such as cross-entropy with `reduction="none"`.
        batch_size: examples at a time.

    Raises:
        ValueError: if the criterion gives something else than a loss for each example.

    Example:
        >>> recorder = LossRecorder(net, (x, y))  # doctest: +SKIP
        >>> fit(net, (x, y), callbacks=[recorder], batch_size=len(x))  # doctest: +SKIP
        >>> groups = find_groups(recorder.losses)  # doctest: +SKIP
    """

    from_start = True

    def __init__(self, model: nn.Module, data: Any, loss: Loss = _each, *, batch_size: int = 512) -> None:
        self.model, self.loss = model, loss
        self.batches = list(Examples(data).batches(whole("batch_size", batch_size, 1)))
        self.rows: list[np.ndarray] = []

    @torch.no_grad()
    def record(self, losses: Tensor | None = None) -> None:
        """Keep the losses of now.

        Args:
            losses: `[n]`, where the training's own forward pass computed them already (full batches): nothing is run.
        """
        if losses is None:
            device = next(self.model.parameters()).device
            with evaluating(self.model), untouched(self.model):
                parts = []
                for *inputs, target in self.batches:
                    values = self.loss(self.model(*(x.to(device) for x in inputs)), target.to(device))
                    if values.shape[:1] != target.shape[:1] or values.dim() != 1:
                        raise ValueError(
                            f"expected a loss for each of {len(target)} examples (reduction='none'), got shape "
                            f"{tuple(values.shape)}"
                        )
                    parts.append(values)
            losses = torch.cat(parts)
        row = losses.detach().float().cpu().numpy()
        if row.ndim != 1:
            raise ValueError(f"expected a loss for each example (reduction='none'), got shape {row.shape}")
        if self.rows and len(row) != len(self.rows[0]):
            raise ValueError(f"expected the losses of {len(self.rows[0])} examples as before, got {len(row)}")
        self.rows.append(row)

    def __call__(self, state: Any) -> None:
        """Record after a step; as a callback of `fit`."""
        if not getattr(state, "epoch_end", False):
            self.record()

    @property
    def losses(self) -> np.ndarray:
        """Losses `[T, n]`, float32."""
        return np.stack(self.rows) if self.rows else np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True, repr=False)
class Trace(Shown):
    """A training by full batches.

    Attributes:
        losses: losses of every example before each step and at the end, `[T + 1, n]`.
        steps: steps at which the sharpness was measured.
        sharpness: top eigenvalue of the Hessian there.
        limit: $2 / \\eta$, above which gradient descent is unstable.
        snapshots: weights, by step, of the steps that were asked for.
    """

    losses: np.ndarray
    steps: tuple[int, ...]
    sharpness: tuple[float, ...]
    limit: float
    snapshots: dict[int, dict[str, Tensor]]


def trace(
    model: nn.Module,
    data: Any,
    *,
    lr: float,
    steps: int,
    sharpness_every: int = 10,
    loss: Loss = _each,
    keep: Iterable[int] = (),
    keep_first_rise: bool = False,
) -> Trace:
    """Train a network in place by full-batch gradient descent, with the losses of all examples and the sharpness.

    Args:
        model: network, in the mode it is in; a network with dropout should be in evaluation mode.
        data: tensors (x, y).
        lr: step size $\\eta$.
        steps: number of steps of gradient descent.
        sharpness_every: steps between measurements; 0 measures none but that of the first rise.
        loss: criterion that gives a loss for each example.
        keep: steps whose weights are kept.
        keep_first_rise: whether the weights before the first step that raises the loss are kept, and its sharpness.

    Raises:
        ValueError: if the loss is no longer finite.
    """
    positive("lr", lr)
    rows = list(Examples(data).batches(None))
    device = next(model.parameters()).device
    x, y = (torch.cat(column).to(device) for column in zip(*rows, strict=True))
    wanted, parameters = set(keep), [p for p in model.parameters() if p.requires_grad]
    mean: Loss = lambda output, target: loss(output, target).mean()  # noqa: E731
    recorder = LossRecorder(model, (x[:1], y[:1]), loss)
    marks: list[int] = []
    values: list[float] = []
    snapshots: dict[int, dict[str, Tensor]] = {}
    start = None
    before: dict[str, Tensor] | None = None
    risen = not keep_first_rise

    def sharpness(step: int) -> None:
        nonlocal start
        eigen = hessian_eigenvalues(model, mean, (x, y), start=start, generator=torch.Generator().manual_seed(0))
        start = eigen.vectors
        marks.append(step)
        values.append(float(eigen.values[0]))

    for step in range(whole("steps", steps, 1) + 1):
        each = loss(model(x), y)
        if not bool(torch.isfinite(each).all()):
            advice = (
                f"lower lr from {lr}" if step else "the data or the weights are not, or the loss is not defined there"
            )
            raise ValueError(f"the loss is not finite at step {step}; {advice}")
        recorder.record(each)
        # Before anything looks at other weights, which the graph of this step would notice.
        grads = torch.autograd.grad(each.mean(), parameters) if step < steps else ()
        if (
            not risen
            and before is not None
            and len(recorder.rows) > 1
            and recorder.rows[-1].mean() > recorder.rows[-2].mean()
        ):
            risen, now = True, _copied(model)
            model.load_state_dict(before)
            snapshots[step - 1] = before
            sharpness(step - 1)
            model.load_state_dict(now)
        if step in wanted:
            snapshots[step] = _copied(model)
        if sharpness_every and step % sharpness_every == 0:
            sharpness(step)
        if step == steps:
            break
        before = None if risen else _copied(model)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(grad, alpha=lr)
    order = np.argsort(marks, kind="stable")
    return Trace(recorder.losses, tuple(marks[k] for k in order), tuple(values[k] for k in order), 2 / lr, snapshots)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}
