"""Networks of one hidden layer, trained side by side in one tensor, whose backward pass may use another derivative.

$z = \\varphi(Wx + b)$, logits $Jz$, Bernoulli cross-entropy, plain gradient descent on minibatches. With a readout that
stays fixed, the expected update of a unit's weights is $E[J_j (y - \\sigma(f))\\, \\varphi'(w_j x + b_j)\\, x]$: the
derivative decides which conditions pull at a unit.

Reference:
    Alleman, Lindsey, Fusi, ICLR 2024 (arXiv 2401.13558), Section 4 and appendix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfolio.checks import one_of, positive, whole
from torchfolio.insight.cluster_tasks import ClusterTask
from torchfolio.shown import Shown

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ShallowNetwork",
    "expected_gradient",
    "train_side_by_side",
    "weight_trajectories",
]

Readout = Literal["balanced", "uniform", "sphere"]


@dataclass(frozen=True, repr=False)
class Activation(Shown):
    """A function and the derivative that learning uses, which need not be its own.

    Attributes:
        function: $\\varphi$.
        derivative: function that takes the place of $\\varphi'$ at the pre-activation.
        of_output: derivative from $\\varphi$, where that is cheaper.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    of_output: Callable[[Tensor], Tensor] | None = None

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The activations and their derivatives."""
        z = self.function(x)
        return z, self.derivative(x) if self.of_output is None else self.of_output(z)

    def __call__(self, x: Tensor) -> Tensor:
        """The activations, with this derivative in the backward pass."""
        return _Swapped.apply(x, self)  # pyright: ignore[reportReturnType]


class _Swapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return activation.function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.activation.derivative(x), None


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _tanh_slope(x: Tensor) -> Tensor:
    return 1 - x.tanh().square()


def _sigmoid_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 - x.sigmoid())


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, _tanh_slope, lambda z: z.square().neg_().add_(1)),
    "relu": Activation(torch.relu, _step),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope, lambda z: (1 - z).mul_(z)),
    "hard_tanh": Activation(lambda x: x.clamp(-1, 1), lambda x: (x.abs() < 1).to(x.dtype)),
    "linear": Activation(lambda x: x, torch.ones_like),
    "softplus": Activation(nn.functional.softplus, torch.sigmoid),
    "leaky_relu": Activation(lambda x: torch.where(x > 0, x, 0.01 * x), lambda x: _step(x) + 0.01 * _step(-x)),
    "relu_shifted": Activation(lambda x: torch.relu(x + 1), lambda x: _step(x + 1)),
    "relu_clipped": Activation(lambda x: x.clamp(0, 0.5), lambda x: _step(x) * _step(0.5 - x)),
    "relu_linear_gradient": Activation(torch.relu, torch.ones_like),
    "tanh_step_gradient": Activation(torch.tanh, _step),
}
"""Activations by name; the last two are controls, which learn with a derivative that is not theirs."""


class ShallowNetwork(nn.Module):
    """One hidden layer and a readout that may stay fixed.

    Args:
        in_features: D.
        width: M, hidden units.
        out_features: O, logits.
        activation: name of `ACTIVATIONS`, or an `Activation`.
        readout: `"balanced"` (half the units +, half -, for one logit; random signed choices of one or two logits for
            more; columns of length $1/\\sqrt{M}$), `"uniform"` in $\\pm 1/\\sqrt{M}$, or `"sphere"`, random columns of that
            length.
        train_readout: whether J is trained.
        generator: source of the draws.

    Shapes:
        `[B, D]` to `[B, O]`; `hidden(x)` gives `[B, M]`.
    """

    def __init__(
        self,
        in_features: int,
        width: int = 120,
        out_features: int = 1,
        activation: str | Activation = "tanh",
        readout: Readout = "balanced",
        train_readout: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.activation = (
            ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)] if isinstance(activation, str) else activation
        )
        for name, value in (("in_features", in_features), ("width", width), ("out_features", out_features)):
            whole(name, value, 1)
        scale = in_features**-0.5
        self.weight = nn.Parameter((2 * torch.rand(width, in_features, generator=generator) - 1) * scale)
        self.bias = nn.Parameter(torch.randn(width, generator=generator) * scale)
        self.readout = nn.Parameter(_readout(readout, out_features, width, generator), requires_grad=train_readout)
        self.readout_bias = nn.Parameter(torch.zeros(out_features), requires_grad=train_readout)

    def hidden(self, x: Tensor) -> Tensor:
        """Activations of the hidden layer."""
        return self.activation(nn.functional.linear(x, self.weight, self.bias))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.hidden(x), self.readout, self.readout_bias)


def _readout(kind: str, outputs: int, width: int, generator: torch.Generator | None) -> Tensor:
    one_of("readout", kind, ("balanced", "uniform", "sphere"))
    if kind == "uniform":
        return (2 * torch.rand(outputs, width, generator=generator) - 1) * width**-0.5
    if kind == "sphere":
        columns = torch.randn(outputs, width, generator=generator)
        return columns / columns.norm(dim=0) * width**-0.5
    if outputs == 1:
        return torch.where(torch.arange(width) < width // 2, 1.0, -1.0)[None] * width**-0.5
    scores = torch.rand(outputs, width, generator=generator)
    chosen = scores.argsort(0) < 1 + (torch.rand(width, generator=generator) < 0.5)
    signs = 1 - 2 * (torch.rand(outputs, width, generator=generator) < 0.5).float()
    columns = chosen * signs
    return columns / columns.norm(dim=0) * width**-0.5


def train_side_by_side(
    networks: Sequence[ShallowNetwork],
    tasks: Sequence[ClusterTask],
    *,
    steps: int = 1500,
    lr: float = 0.1,
    batch_size: int = 200,
    generator: torch.Generator | None = None,
    record_every: int | None = None,
) -> list[Tensor]:
    """Train networks of equal sizes, each on its own task, as one batched network, in place.

    Plain gradient descent on fresh samples; where the readouts are trained, all of them are.

    Args:
        networks: S networks of equal sizes; their activations may differ.
        tasks: S tasks of equal sizes.
        steps: number of steps of gradient descent.
        lr: learning rate.
        batch_size: samples of every network at a step.
        generator: source of the samples.
        record_every: number of steps between records of all input weights, from the start on.

    Returns:
        Input weights `[S, M, D]` at the recorded steps; none by default.

    Raises:
        ValueError: if there are not as many tasks as networks, or sizes differ.
    """
    if len(networks) != len(tasks) or not networks:
        raise ValueError(f"expected a task for each network, got {len(networks)} networks and {len(tasks)} tasks")
    whole("steps", steps, 0)
    positive("lr", lr)
    shapes = {
        (net.weight.shape, net.readout.shape, task.means.shape) for net, task in zip(networks, tasks, strict=True)
    }
    if len(shapes) > 1:
        raise ValueError(f"expected networks and tasks of equal sizes, got {len(shapes)} different ones")
    names = ("weight", "bias", "readout", "readout_bias")
    W, b, J, c = (torch.stack([getattr(net, name).detach() for net in networks]) for name in names)
    means = torch.stack([task.means for task in tasks]).to(W)
    labels = torch.stack([task.labels for task in tasks]).to(W)
    noise = torch.tensor([task.noise for task in tasks]).to(W)[:, None, None]
    trains = networks[0].readout.requires_grad
    # Networks of one activation stand together, so that each function is called once.
    kinds = [net.activation for net in networks]
    groups = [(kind, [k for k, other in enumerate(kinds) if other is kind]) for kind in dict.fromkeys(kinds)]
    conditions = means.shape[1]
    offsets = conditions * torch.arange(len(networks))[:, None]
    means, labels = means.flatten(0, 1), labels.flatten(0, 1)
    snapshots = []
    # Tensors of this size would be fetched from the system anew at every step.
    x, before = W.new_empty(len(W), batch_size, W.shape[2]), W.new_empty(len(W), batch_size, W.shape[1])
    rows = W.new_empty(len(W) * batch_size, W.shape[2])
    for step in range(steps):
        if record_every is not None and step % record_every == 0:
            snapshots.append(W.clone())
        pick = torch.randint(conditions, (len(networks), batch_size), generator=generator)
        at = (pick + offsets).flatten()
        y = labels.index_select(0, at).view(*pick.shape, -1)
        torch.randn(x.shape, generator=generator, dtype=x.dtype, out=x).mul_(noise)
        x.view(len(at), -1).add_(torch.index_select(means, 0, at, out=rows))
        z, slope = _activations(torch.baddbmm(b[:, None], x, W.mT, out=before), groups)
        error = torch.baddbmm(c[:, None], z, J.mT).sigmoid_().sub_(y).div_(batch_size * y.shape[-1])
        back = slope.mul_(error * J if J.shape[1] == 1 else error @ J)
        W.baddbmm_(back.mT, x, alpha=-lr)
        b.sub_(back.sum(1), alpha=lr)
        if trains:
            J.baddbmm_(error.mT, z, alpha=-lr)
            c.sub_(error.sum(1), alpha=lr)
    for k, net in enumerate(networks):
        for name, value in zip(names, (W, b, J, c), strict=True):
            getattr(net, name).data.copy_(value[k])
    return snapshots


def _activations(before: Tensor, groups: Sequence[tuple[Activation, list[int]]]) -> tuple[Tensor, Tensor]:
    """Activations and derivatives of networks `[S, B, M]`, a call for each kind of them."""
    if len(groups) == 1:
        return groups[0][0].pair(before)
    z, slope = torch.empty_like(before), torch.empty_like(before)
    for kind, members in groups:
        z[members], slope[members] = kind.pair(before[members])
    return z, slope


def weight_trajectories(
    task: ClusterTask,
    activation: str | Activation = "tanh",
    *,
    steps: int = 1500,
    every: int = 50,
    seed: int = 0,
    **sizes: Any,
) -> dict[str, Tensor]:
    """Paths of the units' input weights in training, along the axis between classes and across it.

    Args:
        task: task with one label.
        activation: activation, see `ShallowNetwork`.
        steps: number of steps of training.
        every: steps between records.
        seed: seed of weights and samples.
        **sizes: further arguments of `ShallowNetwork`.

    Returns:
        `inter` and `intra`, `[T, M]`: projections on the unit axis $a = \\sum_\\mu \\tilde y_\\mu x_\\mu$ and length of the rest
        within the span of the means.
    """
    generator = torch.Generator().manual_seed(seed)
    net = ShallowNetwork(task.means.shape[1], activation=activation, generator=generator, **sizes).double()
    paths = torch.stack(
        train_side_by_side([net], [task], steps=steps, generator=generator, record_every=whole("every", every, 1))
    )[:, 0]
    axis = (2 * task.labels[:, :1] - 1).T @ task.means
    axis = axis[0] / axis.norm()
    span = torch.linalg.svd(task.means, full_matrices=False)
    basis = span.Vh[1e-9 * span.S[0] < span.S]
    inside = paths @ basis.T @ basis
    inter = inside @ axis
    return {"inter": inter, "intra": (inside - inter[..., None] * axis).norm(dim=-1)}


def expected_gradient(
    w: Tensor,
    X: Tensor,
    Y: Tensor,
    J: Tensor,
    activation: str | Activation,
    *,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
) -> Tensor:
    """Expected update of input weights for a fixed readout, $E[J_j (y - \\sigma(f))\\, \\varphi'(w_j x + b_j)\\, x]$, `[M, D]`.

    Args:
        w: input weights `[M, D]`, on a grid of the plane for a vector field.
        X: means of the conditions `[P, D]`, equally likely.
        Y: labels `[P, O]`.
        J: readout `[O, M]`.
        activation: activation, see `ShallowNetwork`.
        bias: b `[M]`; 0 by default.
        logits: f `[P, O]` of the network; 0 by default, as at the start.
    """
    kind = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)] if isinstance(activation, str) else activation
    before = X @ w.T + (0 if bias is None else bias)
    chance = torch.full_like(Y, 0.5) if logits is None else logits.sigmoid()
    pull = ((Y - chance) @ J) * kind.derivative(before)
    return pull.T @ X / (len(X) * Y.shape[1])
