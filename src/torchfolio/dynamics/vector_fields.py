"""Networks that serve as right-hand sides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchfolio.checks import positive, whole
from torchfolio.dynamics.expressions import Expression

__all__ = ["FormulaField", "LipSwish", "VectorField"]


class LipSwish(nn.Module):
    """0.909 x σ(x): smooth, with slopes of at most 1."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.909 * nn.functional.silu(x)


class VectorField(nn.Module):
    """A network with bounded output, s ⊙ tanh(MLP(y)) with a learned scale s.

    Unbounded fields, such as those that end in a linear layer, blow up during training.

    Args:
        channels: number of channels of the state.
        width: width of the hidden layers.
        depth: number of hidden layers, at least 1.
        shape: shape of an example's output; that of the state if None.
        time: whether t is an input too.
        activation: module between layers, without parameters; `Softplus()` by default.

    Shapes:
        t: `[]`; y: `[..., channels]`; output: `[..., *shape]`.
    """

    def __init__(
        self,
        channels: int,
        width: int = 64,
        depth: int = 2,
        shape: Sequence[int] | None = None,
        *,
        time: bool = False,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.shape = (whole("channels", channels, 1),) if shape is None else tuple(whole("shape", n, 1) for n in shape)
        self.time, out = time, math.prod(self.shape)
        sizes = [channels + time] + [whole("width", width, 1)] * whole("depth", depth, 1)
        layers: list[nn.Module] = []
        for n, m in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(n, m), activation or nn.Softplus()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], out), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(out))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.time:
            y = torch.cat([t.expand(*y.shape[:-1], 1), y], -1)
        out = self.scale * self.net(y)
        return out if len(self.shape) == 1 else out.unflatten(-1, self.shape)


class FormulaField(nn.Module):
    """A field of one formula a channel, whose constants are parameters: put back into the equation, they are tuned.

    Args:
        expressions: one expression a channel, in the channels of the state.

    Shapes:
        t: `[]`; y: `[..., channels]`; output: `[..., channels]`.

    Raises:
        ValueError: if there is none, or one names a channel that is not there.
    """

    def __init__(self, expressions: Sequence[Expression]) -> None:
        super().__init__()
        variables = [node for e in expressions for node in e.nodes if isinstance(node, int)]
        if not expressions or max(variables, default=0) >= len(expressions):
            raise ValueError(
                f"expected one formula a channel, got {len(expressions)}, of channel {max(variables, default=0)}"
            )
        self.formulas = list(expressions)
        self.constants = nn.ParameterList(torch.tensor(e.constants) for e in expressions)

    @property
    def expressions(self) -> list[Expression]:
        """Formulas with the constants of now."""
        pairs = zip(self.formulas, self.constants, strict=True)
        return [formula.with_constants(c.tolist()) for formula, c in pairs]

    @torch.no_grad()
    def snap(self, grid: float = 0.01) -> None:
        """Round constants to multiples of `grid`."""
        positive("grid", grid)
        for c in self.constants:
            c.copy_((c / grid).round() * grid)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        columns = y.unbind(-1)
        pairs = zip(self.formulas, self.constants, strict=True)
        values = [torch.as_tensor(f.evaluate(columns, c.unbind())).to(y).expand(y.shape[:-1]) for f, c in pairs]
        return torch.stack(values, -1)
