"""Many equal small networks trained at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import stack_module_state, vmap
from torch.nn import functional as F

from torchfolio.engine.checks import check_data, check_positive
from torchfolio.engine.counting import IGNORED
from torchfolio.engine.loader import TensorBatches
from torchfolio.engine.modes import seeded
from torchfolio.engine.rules import Loss, default_loss
from torchfolio.engine.stacked_outputs import Stacked, stacked_outputs
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

Setting = float | Sequence[float] | Tensor


@dataclass(frozen=True, repr=False)
class EnsembleResult(Shown):
    """Networks trained together.

    Attributes:
        models: networks, trained in place.
        losses: losses of every step before its update, `[steps, members]`.
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
    penalty: Callable[[Stacked], Tensor] | None = None,
    own_data: bool = False,
    seed: int | Sequence[int] = 0,
    record: Callable[[int, Stacked], None] | None = None,
) -> EnsembleResult:
    """Train networks of one architecture in one vectorised pass: many seeds or settings, the price of one.

    Every member takes the steps that `fit` with `torch.optim.SGD`, `Adam` or `AdamW` would take on it alone,
    in the same order of batches for the same seed. A member that diverges leaves the others alone. Frozen
    parameters stay as they are. Chains of linear layers and activations run as batched matrix products, other
    networks through `torch.func.vmap`, which costs more for each operation.

    Args:
        models: networks of equal architecture, trained in place.
        x: inputs `[N, ...]` for all, or `[members, N, ...]`.
        y: targets `[N, ...]` for all, or `[members, N, ...]`.
        steps: optimizer steps.
        lr: learning rate, one or a value for each member.
        momentum: momentum of SGD, one or a value for each member.
        weight_decay: L2 penalty (decoupled for `"adamw"`), one or a value for each member.
        optimizer: `"sgd"`, `"adam"` or `"adamw"`.
        betas: decay rates of Adam.
        eps: epsilon of Adam.
        batch_size: examples of a step; all by default.
        loss: criterion with mean reduction; see `Backprop` for the default.
        penalty: term that is added to the losses, `[members]`, as a function of the stacked parameters.
        own_data: `x` and `y` hold a data set for each member along their first axis.
        seed: seed of the order of batches, as in `fit`; one for each member gives each its own order.
        record: function that is called with the steps taken and the stacked parameters before every step and after the
            last. They change in place with the steps: clone what is kept.

    Returns:
        The trained networks and their losses.

    Raises:
        ValueError: on networks that differ, share parameters, have none to train or hold a batch norm (whose
            running statistics a vectorised pass cannot keep), on data as in `fit`, on settings of another length
            than there are members, or on a penalty of another shape.

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
    batches = _Batches(x, y, batch_size, seed, members, own_data)
    state = _State(models)
    outputs = stacked_outputs(models[0], members, batches.each)
    criterion = _criterion(loss, batches.each)
    update = _Update(optimizer, state.flat, rates, betas, eps)
    losses = []
    with seeded(batches.seeds[0]):  # dropout; the global generators are put back
        for step in range(steps):
            if record is not None:
                record(step, state.parameters)
            inputs, targets = batches.next()
            values = criterion(outputs(state.parameters, state.buffers, inputs), targets)
            if penalty is not None:
                values = values + _checked_penalty(penalty(state.parameters), members)
            losses.append(values.detach())
            update(state.flat, state.gradient(values), step + 1)
    if record is not None:
        record(steps, state.parameters)
    state.write(models)
    return EnsembleResult(models, torch.stack(losses))


class _State:
    """Parameters of all members, `[members, ...]` by name: views of one flat tensor, which an optimizer moves at once."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        parameters, self.buffers = stack_module_state(list(models))
        self.names = [name for name, p in models[0].named_parameters() if p.requires_grad]
        if not self.names:
            raise ValueError("expected networks with parameters to train, got none that require a gradient")
        trained = [parameters[name].detach() for name in self.names]
        if len({(p.dtype, p.device) for p in trained}) > 1:
            raise ValueError("expected parameters of one dtype on one device")
        self.flat = _flatten(trained)
        parts = self.flat.split([p[0].numel() for p in trained], dim=1)
        views = {n: part.view(p.shape) for n, part, p in zip(self.names, parts, trained, strict=True)}
        self.parameters = {
            name: views[name].requires_grad_() if name in views else p.detach() for name, p in parameters.items()
        }

    def gradient(self, losses: Tensor) -> Tensor:
        """Of every member's loss by its own parameters, flat."""
        leaves = [self.parameters[name] for name in self.names]
        # No member's loss depends on another's parameters: the gradient of the sum is that of each.
        return _flatten(torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True))

    @torch.no_grad()
    def write(self, models: Sequence[nn.Module]) -> None:
        """Put the parameters into the networks."""
        for k, model in enumerate(models):
            for name, parameter in model.named_parameters():
                parameter.copy_(self.parameters[name][k])


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(len(t), -1) for t in tensors], dim=1)


def _checked_penalty(value: Tensor, members: int) -> Tensor:
    if value.shape != (members,):
        raise ValueError(f"expected a penalty for each member, shape ({members},), got {tuple(value.shape)}")
    return value


def _criterion(loss: Loss | None, each: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Losses of all members from their outputs and the targets."""
    general = vmap(loss or default_loss, in_dims=(0, 0 if each else None), randomness="different")
    if loss is not None:
        return general

    def default(z: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point() or z.dim() < 3:
            return general(z, y)
        y = y if each else y.expand(len(z), *y.shape)
        values = F.cross_entropy(z.flatten(0, 1), y.flatten(0, 1), reduction="none").view(len(z), -1)
        return values.sum(1) / (y != IGNORED).flatten(1).sum(1)

    return default


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
        self.epoch = 0
        self.drawn: Iterator[Tensor] = iter(())

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step."""
        if self.whole:
            return self.x, self.y
        rows = next(self.drawn, None)
        if rows is None:  # a whole epoch's orders at once: a step of small networks costs less than many small draws
            orders = torch.stack([order.order(self.epoch) for order in self.orders]).to(self.x.device)
            self.drawn = iter(orders.split(self.orders[0].batch_size, dim=1))
            self.epoch += 1
            rows = next(self.drawn)
        if self.own_data:
            rows = rows.expand(len(self.members), -1)
            return self.x[self.members, rows], self.y[self.members, rows]
        flat = rows.flatten() if self.each else rows[0]
        shape = rows.shape if self.each else flat.shape
        x, y = self.x.index_select(0, flat), self.y.index_select(0, flat)
        return x.view(*shape, *x.shape[1:]), y.view(*shape, *y.shape[1:])


class _Update:
    """The optimizer's rule on parameters `[members, count]`.

    Reference:
        The algorithms in the documentation of `torch.optim.SGD`, `Adam` and `AdamW`.
    """

    def __init__(
        self, kind: str, parameters: Tensor, rates: Sequence[Tensor], betas: tuple[float, float], eps: float
    ) -> None:
        self.kind, self.betas, self.eps = kind, betas, eps
        self.lr, self.momentum, self.decay = (rate.to(parameters)[:, None] for rate in rates)
        self.decays = bool((self.decay != 0).any())
        self.first = torch.zeros_like(parameters)
        self.second = torch.zeros_like(parameters) if kind != "sgd" else parameters.new_empty(0)

    @torch.no_grad()
    def __call__(self, parameters: Tensor, gradient: Tensor, step: int) -> None:
        if self.kind == "adamw":
            parameters.mul_(1 - self.lr * self.decay)
        elif self.decays:
            gradient = gradient + self.decay * parameters
        if self.kind == "sgd":
            # torch's SGD starts its buffer at the first gradient, which a buffer of zeros does too.
            parameters.sub_(self.lr * self.first.mul_(self.momentum).add_(gradient))
        else:
            parameters.sub_(self.lr * self._direction(gradient, step))

    def _direction(self, g: Tensor, step: int) -> Tensor:
        one, two = self.betas
        first = self.first.lerp_(g, 1 - one)
        second = self.second.mul_(two).addcmul_(g, g, value=1 - two)
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
