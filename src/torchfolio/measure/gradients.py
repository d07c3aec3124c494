"""Losses and gradients, of whole data sets and of single examples, and how far two gradients agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from torchfolio.measure.batches import Data, batches, taking
from torchfolio.models.stateful import fresh
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

Loss = Callable[[Tensor, Tensor], Tensor]


def per_example_losses(model: nn.Module, loss: Loss, data: Data, *, batch_size: int | None = 512) -> Tensor:
    """The loss of every example.

    The network is used in the mode it is in, and its buffers do not change. Batch norm in training mode makes
    an example's loss depend on the others of its batch; call `model.eval()` first where that is not wanted.

    Args:
        model: network.
        loss: criterion on (outputs, targets); it is given one example at a time, so its reduction does not
            matter.
        data: (x, y), a data set, or batches.
        batch_size: batch size of tensors and data sets; `None` takes all at once.

    Returns:
        Losses `[N]`.

    Raises:
        ValueError: if the network or the loss cannot take a batch, as one of another dtype than the weights.
    """
    one = vmap(lambda output, target: loss(output[None], target[None]).reshape(()), randomness="different")
    parts: list[Tensor] = []
    for x, y in batches(data, batch_size, _device(model)):
        with torch.no_grad(), taking(model, x, y):
            parts.append(one(_forward(model, x), y))
    return torch.cat(parts)


def per_example_gradients(
    model: nn.Module, loss: Loss, data: Data, *, batch_size: int | None = None
) -> dict[str, Tensor]:
    """The gradient of every example's loss, in one vectorised pass for each batch.

    Args:
        model: network; batch norm must be in evaluation mode, where an example's output is its own.
        loss: criterion on (outputs, targets); its reduction does not matter.
        data: (x, y), a data set, or batches.
        batch_size: examples at a time; the result is N times the size of the model in any case.

    Returns:
        `{name: [N, *shape of the parameter]}` for every parameter that requires a gradient.

    Raises:
        ValueError: if a batch norm uses the statistics of the batch, nothing requires a gradient, or the network or the
            loss cannot take a batch.
    """
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (module.training or module.running_mean is None):
            raise ValueError(f"{name} is a batch norm that mixes the examples of a batch; call model.eval() first")
    trained = {n: p.detach() for n, p in _trainable(model).items()}
    fixed = {n: p.detach() for n, p in model.named_parameters() if n not in trained} | dict(model.named_buffers())

    def example_loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with fresh(model):
            return loss(functional_call(model, (values, fixed), (x[None],)), y[None]).reshape(())

    gradients = vmap(grad(example_loss), in_dims=(None, 0, 0), randomness="different")
    parts: list[dict[str, Tensor]] = []
    for x, y in batches(data, batch_size, _device(model)):
        with taking(model, x, y):
            parts.append(gradients(trained, x, y))
    return {n: torch.cat([part[n] for part in parts]) for n in trained}


def loss_gradients(model: nn.Module, loss: Loss, data: Data, *, batch_size: int | None = None) -> dict[str, Tensor]:
    """The gradient of the mean loss, without touching the gradients that the model holds.

    The network is used in the mode it is in, and its buffers do not change.

    Args:
        model: network.
        loss: criterion on (outputs, targets) with mean reduction.
        data: (x, y), a data set, or batches.
        batch_size: batch size of tensors and data sets; `None` takes all at once.

    Returns:
        Gradients by parameter name, zero where the loss does not depend on one.

    Raises:
        ValueError: if nothing requires a gradient, or the network or the loss cannot take a batch.
    """
    trained = _trainable(model)
    total, examples = {n: torch.zeros_like(p) for n, p in trained.items()}, 0
    for x, y in batches(data, batch_size, _device(model)):
        with torch.enable_grad(), taking(model, x, y):
            value = loss(_forward(model, x), y)
        for name, g in zip(
            trained, torch.autograd.grad(value, list(trained.values()), materialize_grads=True), strict=True
        ):
            total[name] += len(x) * g
        examples += len(x)
    return {n: t / examples for n, t in total.items()}


def gradient_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that a model holds, by parameter name; those without one are left out."""
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    with fresh(model):
        return functional_call(model, {n: b.clone() for n, b in model.named_buffers()}, (x,))


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("expected a parameter that requires a gradient, got none")
    return trained


def _device(model: nn.Module) -> torch.device | None:
    first = next(model.parameters(), None)
    return None if first is None else first.device


@dataclass(frozen=True, repr=False)
class Agreement(Shown):
    """How far two gradients agree.

    Attributes:
        cosine: cosine of the angle between them; NaN if one is zero.
        sign: share of the numbers, of those that are not zero in both, whose signs agree.
        norm_ratio: norm of the first over that of the second; NaN if the second is zero.
        by_parameter: these three figures for every parameter.
    """

    cosine: float
    sign: float
    norm_ratio: float
    by_parameter: pd.DataFrame


def gradient_agreement(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Agreement:
    """Compare the gradients of two rules, per parameter and as a whole.

    Args:
        a: gradients by parameter name, see `gradient_dict` and `loss_gradients`.
        b: gradients of the same names and shapes.

    Raises:
        ValueError: if names or shapes differ, there are none, or one is not finite.
    """
    import pandas as pd

    if set(a) != set(b) or not a:
        odd = sorted(set(a) ^ set(b))
        raise ValueError(f"expected gradients of the same parameters, got {odd[:3] or 'none'} on one side")
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(f"{name} has gradients of shapes {tuple(a[name].shape)} and {tuple(b[name].shape)}")
        if not (a[name].isfinite().all() and b[name].isfinite().all()):
            raise ValueError(f"the gradient of {name} is not finite")
    sums = {name: _sums(a[name], b[name]) for name in a}
    rows = {name: _compare(s) for name, s in sums.items()}
    whole = _compare(torch.stack(list(sums.values())).sum(0))
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["cosine", "sign", "norm_ratio"])
    return Agreement(*whole, frame)


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, squared norms, numbers of agreeing signs and of numbers that are not zero in both."""
    a, b = a.detach().double().flatten(), b.detach().to(a.device).double().flatten()
    counted = (a != 0) | (b != 0)
    agreeing = counted & (a.sign() == b.sign())
    return torch.stack([a @ b, a @ a, b @ b, agreeing.sum().double(), counted.sum().double()]).cpu()


def _compare(sums: Tensor) -> tuple[float, float, float]:
    inner, aa, bb, agreeing, counted = sums.tolist()
    cosine = inner / math.sqrt(aa) / math.sqrt(bb) if aa > 0 and bb > 0 else math.nan
    return cosine, agreeing / counted if counted else math.nan, math.sqrt(aa / bb) if bb > 0 else math.nan
