"""Features of several networks side by side, and the head that averages what their own heads said.

Jianyu Zhang, Léon Bottou, "Learning useful representations for shifting tasks and distributions", ICML 2023,
https://arxiv.org/abs/2212.07346.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import whole

__all__ = ["Concatenated", "average_heads", "split_head"]


def split_head(model: nn.Module, name: str | None = None) -> tuple[nn.Module, nn.Linear]:
    """A network's trunk and its linear head, as copies.

    Args:
        model: network whose last layer is linear.
        name: name of the head among its modules; by default the last linear layer there is.

    Returns:
        The network with an identity in place of the head, and the head.

    Raises:
        ValueError: if there is no linear layer, or none of this name.
    """
    twin = copy.deepcopy(model)
    linear = {n: m for n, m in twin.named_modules() if isinstance(m, nn.Linear)}
    name = next(reversed(linear), None) if name is None else name
    if name not in linear:
        raise ValueError(f"expected a network with a linear head, got {type(model).__name__} with {list(linear)}")
    if not name:
        return nn.Identity(), linear[name]
    twin.set_submodule(name, nn.Identity())
    return twin, linear[name]


class Concatenated(nn.Module):
    """The features of several trunks side by side, $[\\varphi_1(x), \\dots, \\varphi_n(x)]$.

    Frozen and in evaluation mode, whatever mode the network around it is in, unless it is to be fine-tuned.

    Args:
        trunks: networks to features `[B, d_i]`, of any architectures.
        normalize: whether to scale every block to unit length, so that none dominates a cosine.
        frozen: whether to keep weights and running statistics as they are.

    Attributes:
        feature_dims: $d_i$, known after the first call.

    Shapes:
        Inputs of the trunks to `[B, d_1 + … + d_n]`.

    Raises:
        TypeError: on trunks that are no networks.
        ValueError: on no trunk, or trunks that share parameters; in the call, on features of another shape.

    Reference:
        Zhang, Bottou, section 3.
    """

    def __init__(self, trunks: Iterable[nn.Module], *, normalize: bool = False, frozen: bool = True) -> None:
        super().__init__()
        networks = list(trunks)
        wrong = [type(trunk).__name__ for trunk in networks if not isinstance(trunk, nn.Module)]
        if wrong:
            raise TypeError(f"expected networks as trunks, got {', '.join(wrong)}")
        self.trunks = nn.ModuleList(networks)
        if not self.trunks:
            raise ValueError("expected at least one trunk, got none")
        owned = [id(p) for trunk in self.trunks for p in trunk.parameters()]
        if len(set(owned)) < len(owned):
            raise ValueError("expected trunks with parameters of their own; two of them share some")
        self.normalize, self.frozen = normalize, frozen
        self.feature_dims: tuple[int, ...] = ()
        if frozen:
            self.requires_grad_(False)
        self.train(not frozen)

    def train(self, mode: bool = True) -> Concatenated:
        """Set the mode; a frozen concatenation stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def block(self, i: int) -> slice:
        """The columns of trunk i's features."""
        if not self.feature_dims:
            raise RuntimeError("the widths of the blocks are known after the first call")
        start = sum(self.feature_dims[: whole("i", i, 0, len(self.trunks) - 1)])
        return slice(start, start + self.feature_dims[i])

    def forward(self, x: Tensor) -> Tensor:
        blocks = [trunk(x) for trunk in self.trunks]
        for k, block in enumerate(blocks):
            if not isinstance(block, Tensor) or block.dim() != 2:
                got = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
                raise ValueError(f"expected trunk {k} to give features [B, d], got {got}; pool or flatten them")
        self.feature_dims = tuple(block.shape[1] for block in blocks)
        return torch.cat([F.normalize(b, dim=1) for b in blocks] if self.normalize else blocks, dim=1)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, frozen={self.frozen}"


def average_heads(heads: Sequence[nn.Linear]) -> nn.Linear:
    """The head of a concatenation whose logits are the mean of the networks': $W = [W_1 | \\dots | W_n] / n$.

    Args:
        heads: linear layers of equal outputs, in the order of the trunks.

    Returns:
        A new layer with weight `[K, d_1 + … + d_n]` and bias $\\sum_i b_i / n$.

    Raises:
        ValueError: on no head, or other numbers of outputs.
    """
    if not heads:
        raise ValueError("expected at least one head, got none")
    outs = {head.out_features for head in heads}
    if len(outs) > 1:
        raise ValueError(f"expected heads of equal outputs, got {sorted(outs)}")
    weights = [head.weight.detach() for head in heads]
    biases = [head.bias.detach() for head in heads if head.bias is not None]
    weight = torch.cat(weights, dim=1) / len(heads)
    head = nn.Linear(weight.shape[1], weight.shape[0], bool(biases), device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if biases:
            head.bias.copy_(torch.stack(biases).sum(0) / len(heads))
    return head
