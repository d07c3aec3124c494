"""Many equal small networks trained at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from torchfolio.engine.checks import check_data, check_positive
from torchfolio.engine.loader import TensorBatches
from torchfolio.engine.modes import seeded
from torchfolio.engine.rules import Loss, default_loss

if TYPE_CHECKING:
    import pandas as pd

Setting = float | Sequence[float] | Tensor
Stacked = dict[str, Tensor]


@dataclass(frozen=True)
class EnsembleResult:
    """Networks trained together.

    Attributes:
        models: the networks, trained in place.
        losses: of every step before its update, `[steps, members]`.
    """

    models: list[nn.Module]
    losses: Tensor

    @property
    def diverged(self) -> Tensor:
        """Which members met a loss that is not finite, `[members]`."""
        return ~torch.isfinite(self.losses).all(0)

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """Outputs of all members in evaluation mode.

        Args:
            x: `[N, ...]`.

        Returns:
            `[members, N, ...]`.
        """
        return torch.stack([model.eval()(x) for model in self.models])

    def to_frame(self) -> pd.DataFrame:
        """The losses as a DataFrame: a row for each step from 1, a column for each member."""
        import pandas as pd

        frame = pd.DataFrame(self.losses.cpu().numpy(), index=range(1, len(self.losses) + 1))
        return frame.rename_axis(index="step", columns="member")


def fit_many(
    models: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    lr: Setting = 1e-2,
    momentum: Setting = 0.0,
    weight_decay: Setting = 0.0,
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    batch_size: int | None = None,
    loss: Loss | None = None,
    own_data: bool = False,
    seed: int | Sequence[int] = 0,
    record: Callable[[int, Stacked], None] | None = None,
) -> EnsembleResult:
    """Train networks of one architecture in one vectorised pass: many seeds or settings, the price of one.

    Every member takes the steps that `fit` with `torch.optim.SGD`, `Adam` or `AdamW` would take on it alone,
    in the same order of batches for the same seed. A member that diverges leaves the others alone.

    Args:
        models: networks of equal architecture, trained in place.
        x: inputs `[N, ...]` for all, or `[members, N, ...]`.
        y: targets `[N, ...]` for all, or `[members, N, ...]`.
        steps: optimizer steps.
        lr: learning rate, one or a value for each member.
        momentum: of SGD, one or a value for each member.
        weight_decay: L2 penalty (decoupled for `"adamw"`), one or a value for each member.
        optimizer: `"sgd"`, `"adam"` or `"adamw"`.
        betas: of Adam.
        eps: of Adam.
        batch_size: examples of a step; all by default.
        loss: criterion with mean reduction; see `Backprop` for the default.
        own_data: `x` and `y` hold a data set for each member along their first axis.
        seed: of the order of batches, as in `fit`; one for each member gives each its own order.
        record: called with the steps taken and the stacked parameters before every step and after the last.

    Returns:
        The trained networks and their losses.

    Raises:
        ValueError: on networks that differ, share parameters or hold a batch norm (whose running statistics a
            vectorised pass cannot keep), on data as in `fit`, or settings of another length than there are
            members.

    Example:
        >>> nets = [MLP(2, 2) for _ in range(100)]
        >>> fit_many(nets, x, y, steps=1000, lr=torch.logspace(-3, 0, 100)).to_frame()
    """
    models = list(models)
    members = len(models)
    _check_members(models)
    check_positive(steps=steps, batch_size=batch_size)
    _check_examples(x, y, members, own_data)
    if optimizer not in ("sgd", "adam", "adamw"):
        raise ValueError(f"expected optimizer to be 'sgd', 'adam' or 'adamw', got {optimizer!r}")
    rates = [_per_member(v, members, n) for n, v in (("lr", lr), ("momentum", momentum), ("decay", weight_decay))]
    parameters, buffers = stack_module_state(models)
    parameters = {name: value.detach() for name, value in parameters.items()}
    batches = _Batches(x, y, batch_size, seed, members, own_data)
    gradient = _gradient(models[0], loss or default_loss, batches.each)
    update = _Update(optimizer, parameters, rates, betas, eps)
    losses = []
    with seeded(batches.seeds[0]):  # dropout; the global generators are put back
        for step in range(steps):
            if record is not None:
                record(step, parameters)
            gradients, values = gradient(parameters, buffers, *batches.next())
            losses.append(values.detach())
            update(parameters, gradients, step + 1)
    if record is not None:
        record(steps, parameters)
    with torch.no_grad():
        for k, model in enumerate(models):
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters[name][k])
    return EnsembleResult(models, torch.stack(losses))


def _gradient(model: nn.Module, criterion: Loss, each: bool) -> Callable[..., tuple[Stacked, Tensor]]:
    """Gradients and losses of all members, from stacked parameters and buffers and a batch."""
    base = copy.deepcopy(model).to("meta").train()

    def member_loss(values: Stacked, rest: Stacked, x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(base, (values, rest), (x,)), y)

    data = 0 if each else None
    return vmap(grad_and_value(member_loss), in_dims=(0, 0, data, data), randomness="different")


class _Batches:
    """The batches of all members: one for all, or one for each where data or order are their own."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int | None,
        seed: int | Sequence[int],
        members: int,
        own_data: bool,
    ) -> None:
        self.x, self.y, self.own_data = x, y, own_data
        n = x.shape[1] if own_data else len(x)
        self.whole = batch_size is None or batch_size >= n
        self.seeds = [seed] if isinstance(seed, int) else list(seed)
        if len(self.seeds) not in (1, members):
            raise ValueError(f"expected one seed or {members}, got {len(self.seeds)}")
        self.each = own_data or (len(self.seeds) > 1 and not self.whole)
        rows = torch.arange(n)
        self.orders = [TensorBatches([rows], batch_size or n, s) for s in self.seeds]
        self.members = torch.arange(members, device=x.device)[:, None]
        self.epoch, self.drawn = 0, iter(())

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step."""
        if self.whole:
            return self.x, self.y
        try:
            shares = next(self.drawn)
        except StopIteration:
            self.drawn = zip(*(order.epoch(self.epoch) for order in self.orders), strict=True)
            self.epoch += 1
            shares = next(self.drawn)
        rows = torch.stack([share.batch[0] for share in shares]).to(self.x.device)
        if self.own_data:
            rows = rows.expand(len(self.members), -1)
            return self.x[self.members, rows], self.y[self.members, rows]
        rows = rows if self.each else rows[0]
        return self.x[rows], self.y[rows]


class _Update:
    """The optimizer's rule on stacked parameters.

    Reference:
        The algorithms in the documentation of `torch.optim.SGD`, `Adam` and `AdamW`.
    """

    def __init__(
        self, kind: str, parameters: Stacked, rates: Sequence[Tensor], betas: tuple[float, float], eps: float
    ) -> None:
        self.kind, self.betas, self.eps = kind, betas, eps
        self.lr, self.momentum, self.decay = rates
        self.first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.second = {} if kind == "sgd" else {k: torch.zeros_like(v) for k, v in parameters.items()}

    @torch.no_grad()
    def __call__(self, parameters: Stacked, gradients: Stacked, step: int) -> None:
        for name, p in parameters.items():
            shape = (-1, *[1] * (p.dim() - 1))
            lr, momentum, decay = (rate.to(p).view(shape) for rate in (self.lr, self.momentum, self.decay))
            g = gradients[name]
            if self.kind == "adamw":
                p.mul_(1 - lr * decay)
            else:
                g = g + decay * p
            if self.kind == "sgd":
                # torch's SGD starts its buffer at the first gradient, which a buffer of zeros does too.
                p.sub_(lr * self.first[name].mul_(momentum).add_(g))
            else:
                p.sub_(lr * self._direction(name, g, step))

    def _direction(self, name: str, g: Tensor, step: int) -> Tensor:
        one, two = self.betas
        first = self.first[name].lerp_(g, 1 - one)
        second = self.second[name].mul_(two).addcmul_(g, g, value=1 - two)
        return first / (1 - one**step) / (second / (1 - two**step)).sqrt_().add_(self.eps)


def _per_member(value: Setting, members: int, name: str) -> Tensor:
    values = torch.as_tensor(value, dtype=torch.float64)
    if values.dim() == 0:
        return values.repeat(members)
    if values.shape != (members,):
        raise ValueError(f"expected {name} to be one number or {members}, got shape {tuple(values.shape)}")
    return values


def _check_examples(x: Tensor, y: Tensor, members: int, own_data: bool) -> None:
    if own_data:
        if x.dim() < 2 or y.dim() < 2 or len(x) != members or len(y) != members:
            raise ValueError(
                f"expected a data set for each of {members} members, x and y [members, N, ...]; got "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    check_data((x, y), "the data")


def _check_members(models: Sequence[nn.Module]) -> None:
    if not models:
        raise ValueError("expected at least one network, got none")
    shapes = [{name: tuple(v.shape) for name, v in model.state_dict().items()} for model in models]
    kinds = [[type(module) for module in model.modules()] for model in models]
    odd = next((k for k in range(len(models)) if shapes[k] != shapes[0] or kinds[k] != kinds[0]), None)
    if odd is not None:
        raise ValueError(f"expected networks of one architecture; network {odd} differs from network 0")
    owned = [id(p) for model in models for p in model.parameters()]
    if len(set(owned)) != len(owned):
        raise ValueError("expected networks with parameters of their own; two of them share some")
    for name, module in models[0].named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ValueError(
                f"{name or 'the network'} is a {type(module).__name__}, whose running statistics cannot be "
                "kept for many networks at once; expected another norm, or track_running_stats=False"
            )
