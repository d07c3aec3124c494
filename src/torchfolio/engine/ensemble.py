"""Many equal small networks trained at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from torchfolio.engine.checks import check_data, check_positive
from torchfolio.engine.rules import default_loss

Setting = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class EnsembleResult:
    """Networks trained together.

    Attributes:
        models: the networks, trained in place.
        losses: `[steps, members]`.
    """

    models: list[nn.Module]
    losses: Tensor


def fit_many(
    models: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    lr: Setting = 1e-2,
    momentum: Setting = 0.0,
    weight_decay: Setting = 0.0,
    optimizer: Literal["sgd", "adam"] = "sgd",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    batch_size: int | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
    record: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> EnsembleResult:
    """Train networks of one architecture in a single vectorised pass: many seeds or settings for about the price of one.

    Every member takes the steps that `torch.optim.SGD` or `Adam` would take on it alone.

    Args:
        models: networks of equal architecture, trained in place.
        x: inputs `[N, ...]` for all, or `[members, N, ...]` with a data set for each when `y` is alike.
        y: targets `[N, ...]` or `[members, N, ...]`.
        steps: optimizer steps.
        lr: learning rate, one or a value for each member.
        momentum: of SGD, one or a value for each member.
        weight_decay: L2 penalty, one or a value for each member.
        optimizer: `"sgd"` or `"adam"`.
        betas: of Adam.
        eps: of Adam.
        batch_size: examples of a step, the same ones for all members; all examples by default.
        loss: criterion with mean reduction; see `Backprop` for the default.
        seed: of the batches.
        record: called with the step and the stacked parameters before every step.

    Returns:
        The trained networks and their losses before every step.

    Raises:
        ValueError: on networks that differ or hold a batch norm (whose running statistics a vectorised pass cannot
            keep), or settings of another length than there are members.
    """
    members = len(models)
    _check_members(models)
    check_positive(steps=steps, batch_size=batch_size)
    own_data = x.dim() > 1 and y.dim() > 1 and x.shape[0] == y.shape[0] == members and x.shape[1] == y.shape[1]
    check_data((x.flatten(0, 1), y.flatten(0, 1)) if own_data else (x, y), "the data")
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"expected optimizer to be 'sgd' or 'adam', got {optimizer!r}")
    rates = [
        _per_member(v, members, n) for n, v in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay))
    ]
    parameters, buffers = stack_module_state(list(models))
    parameters = {k: v.detach() for k, v in parameters.items()}
    base = copy.deepcopy(models[0]).to("meta")
    criterion = loss or default_loss

    def member_loss(values: dict[str, Tensor], rest: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return criterion(functional_call(base, (values, rest), (a,)), b)

    gradient = vmap(
        grad_and_value(member_loss), in_dims=(0, 0, 0, 0) if own_data else (0, 0, None, None), randomness="different"
    )
    update = _Update(optimizer, parameters, rates, betas, eps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        if record is not None:
            record(step, parameters)
        a, b = _batch(x, y, batch_size, generator, own_data)
        gradients, values = gradient(parameters, buffers, a, b)
        losses.append(values.detach())
        update(parameters, gradients, step + 1)
    with torch.no_grad():
        for k, model in enumerate(models):
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters[name][k])
    return EnsembleResult(list(models), torch.stack(losses))


class _Update:
    """The optimizer's rule on stacked parameters."""

    def __init__(
        self, kind: str, parameters: dict[str, Tensor], rates: Sequence[Tensor], betas: tuple[float, float], eps: float
    ) -> None:
        self.kind, self.betas, self.eps = kind, betas, eps
        self.lr, self.momentum, self.weight_decay = rates
        self.first = {k: torch.zeros_like(v) for k, v in parameters.items()}
        self.second = {k: torch.zeros_like(v) for k, v in parameters.items()} if kind == "adam" else {}

    @torch.no_grad()
    def __call__(self, parameters: dict[str, Tensor], gradients: dict[str, Tensor], step: int) -> None:
        for name, p in parameters.items():
            shape = (-1, *[1] * (p.dim() - 1))
            lr, momentum, decay = (r.to(p).view(shape) for r in (self.lr, self.momentum, self.weight_decay))
            g = gradients[name] + decay * p
            first = self.first[name]
            if self.kind == "sgd":
                # torch's SGD starts its buffer at the first gradient, which a buffer of zeros does too.
                first.mul_(momentum).add_(g)
                p.sub_(lr * first)
                continue
            one, two = self.betas
            second = self.second[name]
            first.lerp_(g, 1 - one)
            second.mul_(two).addcmul_(g, g, value=1 - two)
            scale = (second / (1 - two**step)).sqrt_().add_(self.eps)
            p.sub_(lr / (1 - one**step) * first / scale)


def _batch(
    x: Tensor, y: Tensor, batch_size: int | None, generator: torch.Generator, own_data: bool
) -> tuple[Tensor, Tensor]:
    n = x.shape[1] if own_data else len(x)
    if batch_size is None or batch_size >= n:
        return x, y
    index = torch.randperm(n, generator=generator)[:batch_size].to(x.device)
    return (x[:, index], y[:, index]) if own_data else (x[index], y[index])


def _per_member(value: Setting, members: int, name: str) -> Tensor:
    values = torch.as_tensor(value, dtype=torch.float64)
    if values.dim() == 0:
        return values.repeat(members)
    if values.shape != (members,):
        raise ValueError(f"expected {name} to be one number or {members}, got shape {tuple(values.shape)}")
    return values


def _check_members(models: Sequence[nn.Module]) -> None:
    if not models:
        raise ValueError("expected at least one network, got none")
    shapes = [{k: tuple(v.shape) for k, v in model.state_dict().items()} for model in models]
    odd = next((k for k, s in enumerate(shapes) if s != shapes[0] or type(models[k]) is not type(models[0])), None)
    if odd is not None:
        raise ValueError(f"expected networks of one architecture; network {odd} differs from network 0")
    for name, module in models[0].named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a batch norm, whose running statistics cannot be kept for many networks at once"
            )
