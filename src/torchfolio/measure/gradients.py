"""Losses and gradients of single examples, and how far two gradients agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def per_example_losses(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[..., Tensor] = F.cross_entropy,
    *,
    batch_size: int = 512,
) -> Tensor:
    """The loss of every example `[N]`, in the mode the model is in.

    Args:
        model: the network.
        x: inputs `[N, ...]`.
        y: targets `[N, ...]`.
        loss: criterion that takes `reduction="none"`.
        batch_size: examples at a time.
    """
    parts = []
    for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True):
        value = loss(model(a), b, reduction="none")
        parts.append(value if value.dim() == 1 else value.flatten(1).mean(1))
    return torch.cat(parts)


def per_example_gradients(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy, *, chunk_size: int | None = None
) -> dict[str, Tensor]:
    """The gradient of every example's loss, `{name: [N, *parameter shape]}`, in one vectorised pass.

    Args:
        model: the network; batch norm must be in evaluation mode, where an example's output is its own.
        x: inputs `[N, ...]`.
        y: targets `[N, ...]`.
        loss: criterion with mean reduction.
        chunk_size: examples at a time; all by default.

    Raises:
        ValueError: if a batch norm is in training mode.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(f"{name} is a batch norm in training mode, which mixes examples; call model.eval() first")
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {
        **{n: p.detach() for n, p in model.named_parameters() if not p.requires_grad},
        **dict(model.named_buffers()),
    }

    def example_loss(values: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return loss(functional_call(model, (values, rest), (a[None],)), b[None])

    return vmap(grad(example_loss), in_dims=(None, 0, 0), chunk_size=chunk_size, randomness="different")(
        parameters, x, y
    )


def gradient_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that a model holds, by parameter name; those without one are left out."""
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


@dataclass(frozen=True)
class Agreement:
    """How far two gradients agree.

    Attributes:
        cosine: of the two gradients as single vectors.
        sign: share of numbers whose signs agree.
        norm_ratio: norm of the first over that of the second.
        by_parameter: the same three for every parameter.
    """

    cosine: float
    sign: float
    norm_ratio: float
    by_parameter: pd.DataFrame


def gradient_agreement(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Agreement:
    """Compare the gradients of two rules, per parameter and as a whole.

    Args:
        a: gradients by parameter name, see `gradient_dict`.
        b: likewise, of the same names and shapes.

    Raises:
        ValueError: if names or shapes differ, or there are none.
    """
    if set(a) != set(b) or not a:
        odd = sorted(set(a) ^ set(b))
        raise ValueError(f"expected gradients of the same parameters, got {odd[:3] or 'none'} on one side")
    shapes = [n for n in a if a[n].shape != b[n].shape]
    if shapes:
        raise ValueError(
            f"{shapes[0]} has gradients of shapes {tuple(a[shapes[0]].shape)} and {tuple(b[shapes[0]].shape)}"
        )
    rows = {name: _compare(a[name].flatten(), b[name].flatten()) for name in a}
    whole = _compare(torch.cat([t.flatten() for t in a.values()]), torch.cat([b[n].flatten() for n in a]))
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["cosine", "sign", "norm_ratio"])
    return Agreement(*whole, frame)


def _compare(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    a, b = a.double(), b.double()
    norms = a.norm() * b.norm()
    cosine = (a @ b / norms).item() if norms > 0 else float("nan")
    ratio = (a.norm() / b.norm()).item() if b.norm() > 0 else float("nan")
    return cosine, (a.sign() == b.sign()).double().mean().item(), ratio
