"""Norms over tokens: what they have in common, padding that counts nowhere, and norms by statistics of the batch.

`PowerNorm`, which does without those statistics, is measured against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from torchfolio.checks import between, positive, whole

__all__ = ["PowerNormV", "SequenceBatchNorm", "TokenNorm", "padding"]

masks: list[Tensor | None] = []


@contextmanager
def padding(mask: Tensor) -> Iterator[None]:
    """Say which tokens are padding to all norms of this module that run inside.

    Args:
        mask: bool, True where a token is padding; of the shape of the norms' inputs without the channels.
    """
    masks.append(mask)
    try:
        yield
    finally:
        masks.pop()


class TokenNorm(nn.Module):
    """What norms over tokens have in common: channels, affine parameters, padding, quadratic means."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, eps: float, affine: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.num_features, self.eps, self.affine = whole("num_features", num_features, 1), positive("eps", eps), affine
        self.name = ""
        self.monitor: Any = None  # a NormMonitor
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            parameter = nn.Parameter(torch.full((num_features,), value, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, parameter)

    def _flat(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens `[N, C]`, and which of them count."""
        if x.shape[-1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels in the last axis, got shape {tuple(x.shape)}")
        if padding_mask is None:
            padding_mask = self._told(x)
        if padding_mask is None:
            if x.numel() == 0:
                raise ValueError(f"expected at least one token, got an input of shape {tuple(x.shape)}")
            return x.reshape(-1, x.shape[-1]), None
        if padding_mask.dtype != torch.bool or padding_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"expected a bool padding mask of shape {tuple(x.shape[:-1])}, got {padding_mask.dtype} of shape "
                f"{tuple(padding_mask.shape)}"
            )
        valid = ~padding_mask.reshape(-1)
        if self.training and not torch.compiler.is_compiling() and not bool(valid.any()):
            raise ValueError("expected at least one token that is no padding, got none")
        return x.reshape(-1, x.shape[-1]), valid

    def _told(self, x: Tensor) -> Tensor | None:
        """What `padding` says, as far as it matters: in training, and to sequences of tokens."""
        mask = masks[-1] if masks and self.training else None
        if mask is None or mask.shape == x.shape[:-1]:
            return mask
        if mask.numel() == x.shape[:-1].numel():  # tokens of all sequences in a row
            return mask.reshape(x.shape[:-1])
        return None if len(x) == len(mask) and x.dim() == 2 else mask  # a vector for each sequence has no padding

    def _mean(self, values: Tensor, valid: Tensor | None, sync: bool = False) -> Tensor:
        """Mean over the tokens that count, of all processes with `sync`; at least float32."""
        values = values if values.dtype == torch.float64 else values.float()
        total = values.sum(0) if valid is None else (values * valid[:, None]).sum(0)
        count = values.new_tensor(float(len(values))) if valid is None else valid.sum().to(values.dtype)
        if sync and dist.is_available() and dist.is_initialized():
            both = torch.cat([total, count[None]])
            dist.all_reduce(both)
            total, count = both[:-1], both[-1]
        return total / count

    def _scaled(self, z: Tensor) -> Tensor:
        return z if self.weight is None or self.bias is None else torch.addcmul(self.bias, z, self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move and convert; statistics stay in float32 where the weights become shorter."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # pyright: ignore[reportCallIssue]
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype in (torch.float16, torch.bfloat16) and new.device.type != "meta":
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, affine={self.affine}"


class _BatchStatistics(TokenNorm):
    """Norms by the batch's own statistics in training, and by running ones in evaluation."""

    starts: ClassVar[dict[str, float]]

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        self.momentum = between("momentum", momentum, 0, 1)
        exact = dtype if dtype == torch.float64 else torch.float32
        for name, start in self.starts.items():
            self.register_buffer(name, torch.full((num_features,), start, device=device, dtype=exact))

    def _follow(self, **statistics: Tensor) -> None:
        """Take statistics of a batch into the running ones."""
        for name, value in statistics.items():
            running = self.get_buffer(name)
            running.lerp_(value.detach().to(running.dtype), self.momentum)


class PowerNormV(_BatchStatistics):
    """Divide by the batch's own quadratic mean, with the exact gradient (PN-V, the paper's intermediate form).

    Evaluation uses a running mean.

    Args:
        num_features: channels C.
        momentum: weight of a new batch in the running mean.
        eps: $\\varepsilon$.
        affine: whether there are $\\gamma$ and $\\beta$.
        device: device of parameters and statistics.
        dtype: dtype of the parameters.

    Shapes:
        As `PowerNorm`.
    """

    phi: Tensor

    starts: ClassVar[dict[str, float]] = {"phi": 1.0}

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        tokens, valid = self._flat(x, padding_mask)
        power = self.phi
        if self.training:
            power = self._mean(tokens.square(), valid)
            self._follow(phi=power)
        return self._scaled(tokens * (power + self.eps).rsqrt().to(tokens.dtype)).view_as(x)


class SequenceBatchNorm(_BatchStatistics):
    """Batch normalisation over tokens, padding left out: the baseline of the other norms.

    Args:
        num_features: channels C.
        momentum: weight of a new batch in the running statistics.
        eps: $\\varepsilon$.
        affine: whether there are $\\gamma$ and $\\beta$.
        device: device of parameters and statistics.
        dtype: dtype of the parameters.

    Shapes:
        As `PowerNorm`.
    """

    mean: Tensor
    var: Tensor

    starts: ClassVar[dict[str, float]] = {"mean": 0.0, "var": 1.0}

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        tokens, valid = self._flat(x, padding_mask)
        mean, var = self.mean, self.var
        if self.training:
            mean = self._mean(tokens, valid)
            var = self._mean((tokens - mean.to(tokens.dtype)).square(), valid)
            self._follow(mean=mean, var=var)
        z = (tokens - mean.to(tokens.dtype)) * (var + self.eps).rsqrt().to(tokens.dtype)
        return self._scaled(z).view_as(x)
