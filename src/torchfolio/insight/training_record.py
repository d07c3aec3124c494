"""What a training leaves for a later look: the losses of some examples, the sharpness and the step size on the way.

The parts of a `TrainingRecorder` go into `fit` as callbacks; its `record()` is text that a bundle keeps and that `TrainingRecord`
reads back, checked, from whomever it comes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import whole
from torchfolio.data import Examples
from torchfolio.engine import StepRecorder
from torchfolio.json_text import to_json
from torchfolio.measure import hessian_eigenvalues
from torchfolio.models.device import device_of
from torchfolio.shown import Shown

__all__ = ["TrainingRecord", "TrainingRecorder", "losses_of", "mean_loss", "sharpness_of", "step_limits"]

LARGEST = 64 * 2**20  # characters of a record
MOMENTS, MEASUREMENTS = 100, 8


def losses_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each example, `[N]`: cross-entropy of labels, the mean square of numbers.

    Args:
        outputs: outputs of a network, `[N, C]`, or `[N]` and `[N, k]` for numbers.
        targets: labels int64 `[N]`, or numbers of as many elements as the outputs.

    Raises:
        ValueError: if they fit neither.
    """
    if not targets.is_floating_point() and targets.dim() == 1 and outputs.dim() == 2 and outputs.shape[1] > 1:
        return F.cross_entropy(outputs, targets, reduction="none")
    if targets.is_floating_point() and targets.numel() == outputs.numel():
        return (outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]).sub(
            targets.reshape(len(targets), -1)
        ).square().mean(1)  # fmt: skip
    raise ValueError(
        f"expected outputs [N, C] and labels [N], or numbers of one shape, got {tuple(outputs.shape)} and "
        f"{targets.dtype} {tuple(targets.shape)}"
    )


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean of `losses_of`."""
    return losses_of(outputs, targets).mean()


def sharpness_of(model: nn.Module, x: Tensor, y: Tensor, start: Tensor | None = None) -> tuple[float, Tensor | None]:
    """Largest eigenvalue of the Hessian of the mean loss, to about two digits, and its vector; NaN where there is none.

    Batch norm takes the statistics of these examples, as in training: with running ones the curvature is that of another
    loss, tens of times sharper. All else is as the network stands.

    Args:
        model: network in evaluation mode.
        x: inputs.
        y: targets.
        start: vector of an earlier measurement.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.training]
    try:
        for norm in norms:
            norm.training = True
        generator = torch.Generator().manual_seed(0)
        top = hessian_eigenvalues(model, mean_loss, (x, y), iterations=30, tolerance=2e-2, start=start,
                                  generator=generator)  # fmt: skip
    except (RuntimeError, ValueError, TypeError):  # layers without a second derivative say so in many ways
        return math.nan, None
    finally:
        for norm in norms:
            norm.training = False
    value = float(top.values[0])
    # Layers that hide their second derivative give exactly nothing.
    return (value, top.vectors) if value else (math.nan, None)


def step_limits(lr: float, momentum: float = 0.0, nesterov: bool = False) -> tuple[float, float]:
    """The sharpness above which gradient descent on a quadratic diverges: without the momentum, $2/\\eta$, and with it.

    With momentum $\\mu$ it is $2(1+\\mu)/\\eta$, with Nesterov's $2(1+\\mu)/((1+2\\mu)\\eta)$.

    Args:
        lr: step size $\\eta$.
        momentum: $\\mu$.
        nesterov: whether it is Nesterov's.

    Reference:
        Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, ICLR 2021, appendix B.
    """
    plain = 2 / lr if lr > 0 else math.inf
    return plain, plain * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)


@dataclass(frozen=True, repr=False)
class TrainingRecord(Shown):
    """What was recorded.

    Attributes:
        steps: optimizer steps after which the losses were taken; the first is 0.
        losses: losses of each followed example, `[T, n]`.
        targets: targets of the followed examples, `[n]`; by which they are known again.
        measured: steps at which the sharpness was measured.
        sharpness: there; NaN where it could not be.
        lr: step size there.
        momentum: momentum of the optimizer, 0 for one without.
        nesterov: whether it is Nesterov's.
        optimizer: name of its class.
        followed: examples that the sharpness is taken over.
    """

    steps: tuple[int, ...]
    losses: np.ndarray
    targets: tuple[float, ...]
    measured: tuple[int, ...]
    sharpness: tuple[float, ...]
    lr: tuple[float, ...]
    momentum: float
    nesterov: bool
    optimizer: str
    followed: int

    def to_text(self) -> str:
        """The record as JSON."""
        rounded = [[float(f"{v:.6g}") for v in row] for row in self.losses.tolist()]
        return to_json({**asdict(self), "losses": rounded}) + "\n"

    @classmethod
    def from_text(cls, text: str) -> TrainingRecord:
        """Read what `to_text` wrote.

        Raises:
            ValueError: if it is anything else; nothing of it is believed.
        """
        if len(text) > LARGEST:
            raise ValueError("the record of the training is too large to be one")
        try:
            body = json.loads(text)
            if not isinstance(body, Mapping) or set(body) != set(cls.__dataclass_fields__):
                raise ValueError("it has other parts")
            rows: Any = [[math.nan if v is None else _real(v) for v in row] for row in body["losses"]]
            numbers = {
                k: tuple(_real(math.nan if v is None else v) for v in body[k]) for k in ("sharpness", "lr", "targets")
            }
            steps = {k: tuple(whole(k, v, 0) for v in body[k]) for k in ("steps", "measured")}
            record = cls(steps["steps"], np.asarray(rows, dtype=float), numbers["targets"], steps["measured"],
                       numbers["sharpness"], numbers["lr"], _real(body["momentum"]), body["nesterov"] is True,
                       str(body["optimizer"])[:40], whole("followed", body["followed"], 1))  # fmt: skip
            if record.losses.shape != (len(record.steps), len(record.targets)) or record.losses.size == 0:
                raise ValueError("its losses have another shape")
            if not len(record.measured) == len(record.sharpness) == len(record.lr):
                raise ValueError("its measurements are not as many as their steps")
            if list(record.steps) != sorted(set(record.steps)):
                raise ValueError("its steps do not rise")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(f"the record of the training cannot be read: {error}") from error
        return record


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {str(value)[:40]!r}")
    return float(value)


class TrainingRecorder(Shown):
    """Follows some training examples while a network trains; for `fit(callbacks=...)`.

    At about a hundred steps the losses of the examples are taken, at eight of them the sharpness. For the losses the network
    is asked in evaluation mode, where an example does not depend on its batch: with batch norm these are not quite those of
    training. The training is the same as without.

    Args:
        data: examples to follow, (x, y): a few hundred of the training set.
        steps: optimizer steps that the training will take.
        followed: maximum number of examples that the sharpness is taken over.

    Raises:
        ValueError: if there are no targets.

    Example:
        >>> recorder = TrainingRecorder((x[:500], y[:500]), steps=1000)  # doctest: +SKIP
        >>> fit(net, (x, y), max_steps=1000, callbacks=recorder.parts)  # doctest: +SKIP
        >>> record = recorder.record()  # doctest: +SKIP
    """

    def __init__(self, data: Any, steps: int, *, followed: int = 128) -> None:
        *inputs, target = next(Examples(data).batches(None))
        if len(inputs) != 1:
            raise ValueError(f"expected examples (x, y) to follow, got {len(inputs)} inputs")
        self.x, self.y = inputs[0], target
        self.followed = min(whole("followed", followed, 1), len(target))
        every = max(1, -(-whole("steps", steps, 1) // MOMENTS))
        moments = steps // every + 1
        self._start: Tensor | None = None
        self._optimizer: Any = None
        self.parts = (
            StepRecorder({"losses": self._losses}, every=every),
            StepRecorder({"at": self._sharpness}, every=every * max(1, -(-moments // MEASUREMENTS))),
        )

    def _losses(self, state: Any) -> Tensor:
        self._optimizer = state.optimizer
        model = state.rule.predictor(state.model)
        place = device_of(model)
        with torch.no_grad():
            chunks = zip(self.x.split(256), self.y.split(256), strict=True)
            return torch.cat([losses_of(model(x.to(place)).float(), y.to(place)) for x, y in chunks]).float().cpu()

    def _sharpness(self, state: Any) -> dict[str, float]:
        self._optimizer = state.optimizer
        model = state.rule.predictor(state.model)
        place = device_of(model)
        x, y = self.x[: self.followed].to(place), self.y[: self.followed].to(place)
        value, self._start = sharpness_of(model, x, y, self._start)
        return {"sharpness": value, "lr": max(group["lr"] for group in state.optimizer.param_groups)}

    def record(self) -> TrainingRecord:
        """What was recorded so far.

        Raises:
            ValueError: if nothing was.
        """
        losses, marks = (part.rows for part in self.parts)
        if not losses:
            raise ValueError("nothing was recorded: give the recorder's parts to fit(callbacks=...)")
        group = self._optimizer.param_groups[0] if self._optimizer is not None else {}
        return TrainingRecord(
            tuple(row["step"] for row in losses), torch.stack([row["losses"] for row in losses]).numpy(),
            tuple(self.y.double().reshape(len(self.y), -1)[:, 0].tolist()), tuple(row["step"] for row in marks),
            tuple(row["at_sharpness"] for row in marks), tuple(row["at_lr"] for row in marks),
            float(group.get("momentum", 0.0)), bool(group.get("nesterov", False)),
            type(getattr(self._optimizer, "optimizer", self._optimizer)).__name__, self.followed,
        )  # fmt: skip
