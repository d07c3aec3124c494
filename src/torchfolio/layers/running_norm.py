"""The layer of PowerNorm: tokens over a running quadratic mean, with a backward pass that is approximate.

`torchfolio.layers.powernorm` has the equations, and puts it into networks.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from torchfolio.checks import between, one_of, whole
from torchfolio.engine.first_order import first_order
from torchfolio.layers.token_norms import TokenNorm

__all__ = ["PowerNorm"]


class _Roots(NamedTuple):
    """Of one training step: inverse roots of the forward and backward pass, and the quadratic mean of the batch."""

    forward: Tensor
    backward: Tensor
    power: Tensor


class _Running(torch.autograd.Function):
    """Normalise and scale, with the approximate backward; `norm` holds $\\nu$, which the backward updates.

    Kept for the backward pass are the input and vectors of C: $\\Gamma = \\psi_B^2 / (D + \\varepsilon)$ is known, and
    $\\Lambda$ is $\\gamma$ times the gradient of $\\gamma$ over the number of tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, roots: _Roots, valid: Tensor | None, norm: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *roots, valid)
        ctx.norm = norm
        return torch.addcmul(bias.to(x.dtype), x, (roots.forward * weight).to(x.dtype))

    @staticmethod
    @first_order("the gradient of PowerNorm")
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, forward, backward, power, valid = saved
        norm, dy = ctx.norm, grads[0]
        products = torch.mul(dy.to(norm.nu.dtype), x)
        of_weight = products.sum(0) * forward
        moment = of_weight / len(x) if valid is None else norm._mean(products, valid) * forward
        nu = norm.nu.clone()
        norm._see_moments(power * forward.square(), weight * moment, dy, weight)
        # Memory of the products is used again: to get new one takes longer than to compute.
        dx = torch.mul(dy, (weight * backward).to(dy.dtype), out=products if products.dtype == dy.dtype else None)
        correction = (-nu * forward * backward).to(dy.dtype)
        if valid is None:
            dx.addcmul_(x.to(dy.dtype), correction)
        else:
            dx.addcmul_(x.to(dy.dtype) * valid.to(dy.dtype)[:, None], correction)
        return dx, of_weight.to(weight.dtype), dy.sum(0).to(weight.dtype), None, None, None


class PowerNorm(TokenNorm):
    """Normalise tokens by a running quadratic mean, with the approximate backward.

    Args:
        num_features: channels C.
        warmup_steps: training steps that use the statistics of their own batch, as many as the learning rate warms up
            for. There is no default: shorter trainings than it never leave batch statistics.
        eps: $\\varepsilon$.
        alpha_fwd: decay $\\alpha_f$ of the running quadratic mean.
        alpha_bwd: decay $\\alpha_b$ of the running gradient term. It diverges where $(1 - \\alpha_b)\\Gamma > 2$, that is
            where a batch is 20 times as large as usual at 0.9; `num_groups` bounds that.
        num_groups: groups of channels (as many as heads) by whose root mean square every token is divided first; `None`
            leaves that out, which is what `fold` needs.
        affine: whether there are $\\gamma$ and $\\beta$.
        divide_by: `"running"` divides the gradient by the root that the forward pass divided by; `"batch"` by the
            batch's, as the published code does after warm-up.
        sync: whether statistics are those of all processes.
        device: device of parameters and statistics.
        dtype: dtype of the parameters; statistics are float32 at least.

    Shapes:
        `[..., C]` to the same, with an optional bool mask `[...]`, True where a token is padding.

    Raises:
        ValueError: on other channels, C that the groups do not divide, or no token that counts.
        FloatingPointError: if a statistic in training is not finite.
    """

    phi: Tensor
    nu: Tensor
    steps: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        warmup_steps: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        num_groups: int | None = 1,
        affine: bool = True,
        divide_by: Literal["running", "batch"] = "running",
        sync: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        self.warmup_steps = whole("warmup_steps", warmup_steps, 0)
        self.alpha_fwd, self.alpha_bwd = between("alpha_fwd", alpha_fwd, 0, 1), between("alpha_bwd", alpha_bwd, 0, 1)
        self.divide_by, self.sync = one_of("divide_by", divide_by, ("running", "batch")), sync
        if num_groups is not None and (whole("num_groups", num_groups, 1) and num_features % num_groups):
            raise ValueError(f"expected num_groups to divide {num_features} channels, got {num_groups}")
        self.num_groups = num_groups
        exact = dtype if dtype == torch.float64 else torch.float32
        self.register_buffer("phi", torch.ones(num_features, device=device, dtype=exact))
        self.register_buffer("nu", torch.zeros(num_features, device=device, dtype=exact))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self._roots: _Roots | None = None

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        tokens, valid = self._flat(x, padding_mask)
        if self.num_groups is not None:
            grouped = tokens.view(len(tokens), self.num_groups, -1)
            tokens = F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).view_as(tokens)
        if not self.training:
            return self._scaled(tokens * (self.phi + self.eps).rsqrt().to(tokens.dtype)).view_as(x)
        # Inside a backward pass this is a recomputation, which must see what the first pass saw, and count once.
        again = torch._C._current_graph_task_id() != -1 and self._roots is not None
        self._roots = self._roots if again else self._observe(tokens, valid)
        weight = torch.ones_like(self.phi) if self.weight is None else self.weight
        bias = torch.zeros_like(self.phi) if self.bias is None else self.bias
        y: Any = _Running.apply(tokens, weight, bias, self._roots, valid, self)
        return y.view_as(x)

    @torch.no_grad()
    def _observe(self, tokens: Tensor, valid: Tensor | None) -> _Roots:
        """What divides this step; the running quadratic mean takes the batch in."""
        batch = self._power(tokens.detach(), valid).to(self.phi.dtype)
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(batch).all()):
            raise FloatingPointError(f"the quadratic mean of a batch is not finite in {self.name or 'a PowerNorm'}")
        step = int(self.steps) + 1
        by_batch = (batch + self.eps).rsqrt()
        forward = by_batch if step <= self.warmup_steps else (self.phi + self.eps).rsqrt()
        if self.monitor is not None:
            self.monitor.note(self, deviation=((batch - self.phi).abs() / self.phi).mean().item())
        if step < self.warmup_steps:
            self.phi.lerp_(batch, 1 / step)
        self.phi.lerp_(batch, 1 - self.alpha_fwd)
        self.steps += 1
        return _Roots(forward, by_batch if self.divide_by == "batch" else forward, batch)

    def _power(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """$\\psi_B^2$ of the tokens that count, of all processes with `sync`."""
        if valid is not None or self.sync or tokens.dtype not in (torch.float32, torch.float64):
            return self._mean(tokens.square(), valid, self.sync)
        mean, var = torch.batch_norm_update_stats(tokens, None, None, 0.0)  # in one pass, without the squares in memory
        return var + mean.square()

    def _see_moments(self, gamma: Tensor, lambda_: Tensor, dy: Tensor, weight: Tensor) -> None:
        """Take $\\Gamma$ and $\\Lambda$ of a batch into the running gradient term."""
        if self.sync and dist.is_available() and dist.is_initialized():
            dist.all_reduce(lambda_)
            lambda_ /= dist.get_world_size()
        rate = 1 - self.alpha_bwd
        self.nu.copy_(self.nu * (1 - rate * gamma) + rate * lambda_)
        if self.monitor is not None:
            size = (dy * weight).norm().item()
            self.monitor.note(self, gamma=gamma.mean().item(), nu=self.nu.abs().max().item(), gradient=size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, warmup_steps={self.warmup_steps}, num_groups={self.num_groups}"
