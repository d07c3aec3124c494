"""MAN: momentum auxiliary networks, which let gradient-isolated blocks hear of each other.

Junhao Su, Changpeng Cai, Feiyu Zhu, Chenghao He, Xiaojie Xu, Dongzhi Guan, Chenyang Si, "Momentum Auxiliary
Network for Supervised Local Learning", ECCV 2024, https://arxiv.org/abs/2407.05623.

Blocks trained by losses of their own know nothing of what follows. MAN puts into the auxiliary path of block j
a moving average of the first layer of block j+1, and beside it a trainable branch that corrects what the average
does not fit. It plugs into any supervised local rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.engine import default_loss
from torchfolio.local.copied_layers import initialize
from torchfolio.local.heads import HeadFactory, Host, HostHeads
from torchfolio.local.layered_network import Network, trace_shapes, width
from torchfolio.local.local_model import LocalHead, LocalRule, Loss
from torchfolio.models.init import redraw

__all__ = ["MAN", "MomentumAuxiliary", "update_momentum"]

Bias = Literal["branch", "vector"] | None


class MomentumAuxiliary(nn.Module):
    """The auxiliary path of one block: $u = E(h) + L(h)$.

    $E$ has the architecture of the next block's first layer $N$. Its parameters $\\gamma$ get no gradient; they
    follow those of $N$,

    $$\\gamma \\leftarrow m\\,\\gamma + (1 - m)\\,\\theta(N),$$

    over weights and the affine terms of norms; running statistics are not averaged, they follow E's own
    passes in training mode. Gradients do flow through E's activations into $h$.

    Args:
        next_layer: $N$; copied, never changed.
        momentum: $m$ in [0, 1].
        bias: learnable part $L$. `"branch"`: a trainable layer of N's architecture with weights of its own;
            `"vector"`: a trainable vector, one number a channel of the output; `None`: none.
        ema: whether the path has $E$. Without E and branch, $u$ is $h$ (plus the vector).
        init: start of E: `"copy"` as N, `"random"` with fresh weights.
        channels: width of the output; needed for `bias="vector"` alone.

    Raises:
        ValueError: on settings out of range.

    Shapes:
        `h` is what `next_layer` takes, `u` what it returns.

    Reference:
        Su et al., ECCV 2024, section 3.3. The paper's text has learnable parameters in place of $L$; the
        released code has a full branch, which is the default here.
    """

    def __init__(
        self,
        next_layer: nn.Module,
        momentum: float = 0.995,
        *,
        bias: Bias = "branch",
        ema: bool = True,
        init: Literal["copy", "random"] = "copy",
        channels: int | None = None,
    ) -> None:
        super().__init__()
        checks.between("momentum", momentum, 0, 1)
        checks.one_of("bias", bias, ("branch", "vector", None))
        checks.one_of("init", init, ("copy", "random"))
        if bias == "vector" and channels is None:
            raise ValueError("bias='vector' needs channels, the width of the next layer's output")
        self.momentum = momentum
        self.ema = _fresh(next_layer, init).requires_grad_(False) if ema else None
        self.branch = _fresh(next_layer, "random") if bias == "branch" else None
        self.vector = nn.Parameter(torch.zeros(channels)) if bias == "vector" and channels else None
        self._average: list[Tensor] = []

    def forward(self, h: Tensor) -> Tensor:
        u = h
        if self.ema is not None:
            u = self.ema(h)
        if self.branch is not None:
            u = u + self.branch(h) if self.ema is not None else self.branch(h)
        if self.vector is not None:
            shape = (-1, *[1] * (u.dim() - 2)) if u.dim() > 3 else (-1,)
            u = u + self.vector.view(shape)
        return u

    def average(self) -> list[Tensor]:
        """The parameters of E, or what stands for them: in 16 bits a step of $1 - m$ would be lost, so that the average
        of such weights is held in float32, and the weights follow it."""
        assert self.ema is not None
        parameters: list[Tensor] = list(self.ema.parameters())
        if all(p.dtype.itemsize > 2 for p in parameters):
            return parameters
        if not self._average or any(a.device != p.device for a, p in zip(self._average, parameters, strict=True)):
            self._average = [p.detach().float() for p in parameters]
        return self._average

    def get_extra_state(self) -> list[Tensor]:
        return self._average

    def set_extra_state(self, state: list[Tensor]) -> None:
        self._average = list(state)

    def update(self, next_layer: nn.Module) -> None:
        """Move E towards the current parameters of the next layer."""
        update_momentum([(self, next_layer)])


def _fresh(layer: nn.Module, init: str) -> nn.Module:
    """A copy that leaves its input alone, with the layer's weights or new ones."""
    fresh = copy.deepcopy(layer)
    if init == "random":
        redraw(fresh)
    for module in fresh.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010
    return initialize(fresh) if init == "random" else fresh


@torch.no_grad()
def update_momentum(pairs: Sequence[tuple[MomentumAuxiliary, nn.Module]]) -> None:
    """Move every moving average towards its layer, all of them in one fused operation per momentum.

    Args:
        pairs: a momentum auxiliary and the layer it follows.
    """
    followers: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for auxiliary, layer in pairs:
        if auxiliary.ema is None or auxiliary.momentum == 1:  # at 1 the copy stays as it is, to the bit
            continue
        gamma, theta = followers.setdefault(auxiliary.momentum, ([], []))
        gamma.extend(auxiliary.average())
        theta.extend(p.to(a.dtype) for p, a in zip(layer.parameters(), auxiliary.average(), strict=True))
    for momentum, (gamma, theta) in followers.items():
        torch._foreach_lerp_(gamma, theta, 1 - momentum)
    for auxiliary, _ in pairs:
        if auxiliary.ema is not None and auxiliary.momentum < 1:
            for parameter, average in zip(auxiliary.ema.parameters(), auxiliary.average(), strict=True):
                if parameter is not average:
                    parameter.copy_(average)


class MomentumHead(LocalHead):
    """A host rule's head behind a momentum auxiliary: the host's loss of $u$ in place of $h$."""

    def __init__(self, auxiliary: MomentumAuxiliary, host: LocalHead) -> None:
        super().__init__()
        self.auxiliary = auxiliary
        self.host = host
        self.needs_labels = host.needs_labels

    def loss(self, features: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.host.loss(self.auxiliary(features), x, y)


class MAN(LocalRule):
    """Train blocks by a host rule's losses on momentum auxiliary features.

    For $j < K$, with $N_j$ the first layer of block $j + 1$,

    $$u_j = E_j(h_j) + L_j(h_j), \\qquad \\ell_j = \\text{host loss}(u_j), \\qquad
      \\gamma_j \\leftarrow m \\gamma_j + (1 - m) \\theta(N_j).$$

    The moving averages are taken from the parameters before the optimizer's step, once a step. See
    `MomentumAuxiliary` for $E$ and $L$. Inference uses the user's network alone.

    Args:
        blocks: number of blocks $K$; `None` takes every layer by itself; names as in `LocalRule`.
        host: rule that gives the losses: `"dgl"`, `"infopro"`, `"predsim"`, `"linear"`, or a callable
            `(shape, classes) -> LocalHead`.
        momentum: $m$ in [0, 1]. $1/(1-m)$ steps should be some 5 to 15 % of the training; 0.995 suits hundreds
            of epochs.
        bias: `"branch"`, `"vector"` or `None`.
        ema: whether there are moving averages; without them and without bias the host rule remains.
        init: `"copy"` starts $E_j$ as $N_j$, `"random"` with fresh weights.
        source: index of the layer that block j's average follows, `(j, index of N_j) -> index`; the default
            follows $N_j$ itself. For ablations: the layer must have $N_j$'s architecture.
        loss: criterion of the output and of the classifying hosts.
        mean: constants of the input's normalisation; the host InfoPro needs them.
        std: standard deviation, likewise.
        **options: options of `torchfolio.local.heads.HostHeads`: `weights`, `last_weights`, `ratio`, `allow_negative`.

    Raises:
        ValueError: on settings out of range, and in `prepare` on fewer than two blocks, more blocks than layers,
            or blocks that share parameters.

    Shapes:
        As the host: classes `[B]`, outputs `[B, C]`. Where a block ends a stage, $u_j$ has the next stage's width
        and resolution.

    Example:
        >>> result = fit(resnet32(), train, rule=MAN(blocks=8, host="dgl"), epochs=100)

    Reference:
        Su et al., ECCV 2024, equations 3 to 6; the order of updates is that of the released code.
    """

    def __init__(
        self,
        blocks: int | Sequence[str] | None = None,
        *,
        host: Host | HeadFactory = "dgl",
        momentum: float = 0.995,
        bias: Bias = "branch",
        ema: bool = True,
        init: Literal["copy", "random"] = "copy",
        source: Callable[[int, int], int] | None = None,
        loss: Loss = default_loss,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        **options: object,
    ) -> None:
        super().__init__(blocks=blocks, loss=loss)
        if isinstance(blocks, int) and blocks < 2:
            raise ValueError(f"expected at least 2 blocks, got {blocks}")
        checks.between("momentum", momentum, 0, 1)
        checks.one_of("bias", bias, ("branch", "vector", None))
        checks.one_of("init", init, ("copy", "random"))
        self.host = HostHeads(host, loss=loss, mean=mean, std=std, **options)  # pyright: ignore[reportArgumentType]
        self.momentum = momentum
        self.bias: Bias = bias
        self.ema = ema
        self.init: Literal["copy", "random"] = init
        self.source = source
        self._pairs: list[tuple[MomentumAuxiliary, nn.Module]] = []

    def isolate(self, network: Network) -> tuple[list[nn.Module], list[LocalHead]]:
        if len(network.groups) < 2:
            raise ValueError(f"expected at least 2 blocks, got {len(network.groups)}")
        self._pairs, shapes = [], []
        for j, group in enumerate(network.groups[:-1]):
            following = group[-1] + 1
            auxiliary, shape = self._auxiliary(network, following)
            followed = network.layers[self.source(j, following) if self.source else following]
            _check_same(network.layers[following], followed, j)
            self._pairs.append((auxiliary, followed))
            shapes.append(shape)
        hosts = self.host.build(shapes, network)
        return network.blocks, [MomentumHead(a, head) for (a, _), head in zip(self._pairs, hosts, strict=True)]

    def step(self, batch: Sequence[Tensor], backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        scalars = super().step(batch, backward)
        update_momentum(self._pairs)
        return scalars

    def _auxiliary(self, network: Network, following: int) -> tuple[MomentumAuxiliary, tuple[int, ...]]:
        layer, before = network.layers[following], network.shapes[following - 1]
        passes = not self.ema and self.bias != "branch"
        after = before if passes else network.shapes[following]
        auxiliary = MomentumAuxiliary(
            layer, self.momentum, bias=self.bias, ema=self.ema, init=self.init, channels=width(after)
        )
        return auxiliary, trace_shapes([auxiliary], torch.zeros(2, *before))[0]


def _check_same(layer: nn.Module, followed: nn.Module, block: int) -> None:
    wanted = [tuple(p.shape) for p in layer.parameters()]
    got = [tuple(p.shape) for p in followed.parameters()]
    if wanted != got:
        raise ValueError(f"the average of block {block} has parameters {wanted}; the layer it should follow has {got}")
