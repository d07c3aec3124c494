"""PowerNorm: normalisation of tokens by a running quadratic mean of every channel.

Batch statistics of text swing from batch to batch, which is why transformers use LayerNorm. PowerNorm divides every
channel by the root of its running quadratic mean and keeps a running estimate of the term that the exact gradient would
have, so that training and evaluation compute the same and the whole folds into the next linear layer.

For tokens $x_i$, with $D$ the quadratic mean of the batch during warm-up and the running one $\\phi$ afterwards,

$$z = x / \\sqrt{D + \\varepsilon}, \\quad y = \\gamma z + \\beta, \\qquad
\\frac{\\partial L}{\\partial x} = \\frac{g - \\nu z}{\\sqrt{D + \\varepsilon}}, \\quad
g = \\gamma \\frac{\\partial L}{\\partial y}, \\qquad
\\nu \\leftarrow \\nu\\,(1 - (1 - \\alpha_b)\\Gamma) + (1 - \\alpha_b)\\Lambda,$$

with $\\Gamma$ the mean of $z^2$ and $\\Lambda$ that of $g z$ over tokens.

The module holds the layer, its relatives on batch statistics that it is measured against, and conversion; it is longer
than most because padding, recomputation and the transformer's fused path must be right in all three.

Reference:
    Shen et al., PowerNorm: Rethinking Batch Normalization in Transformers, ICML 2020 (arXiv 2003.07845), algorithm 2.
    The published code divides the gradient by the batch's root after warm-up (`divide_by="batch"`), the paper by the
    one of the forward pass; the code averages over padding, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torchfolio.checks import between, one_of, positive, whole
from torchfolio.models import replace_layers

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NormMonitor", "PowerNorm", "PowerNormV", "SequenceBatchNorm", "convert_layernorm", "fold", "padding"]

_masks: list[Tensor | None] = []


@contextmanager
def padding(mask: Tensor) -> Iterator[None]:
    """Say which tokens are padding to all norms of this module that run inside.

    Args:
        mask: bool, True where a token is padding; of the shape of the norms' inputs without the channels.
    """
    _masks.append(mask)
    try:
        yield
    finally:
        _masks.pop()


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
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, forward, backward, power, valid = ctx.saved_tensors
        norm, dy = ctx.norm, grads[0]
        exact = norm.nu.dtype
        products = dy.to(exact) * x.to(exact)
        of_weight = products.sum(0) * forward
        moment = of_weight / len(x) if valid is None else norm._mean(products, valid) * forward
        nu = norm.nu.clone()
        norm._see_moments(power * forward.square(), weight * moment, dy, weight)
        dx = dy * (weight * backward).to(dy.dtype)
        correction = (-nu * forward * backward).to(dy.dtype)
        if valid is None:
            dx.addcmul_(x.to(dy.dtype), correction)
        else:
            dx.addcmul_(x.to(dy.dtype) * valid.to(dy.dtype)[:, None], correction)
        return dx, of_weight.to(weight.dtype), dy.sum(0).to(weight.dtype), None, None, None


class _TokenNorm(nn.Module):
    """What norms over tokens have in common: channels, affine parameters, padding, quadratic means."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, eps: float, affine: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.num_features, self.eps, self.affine = whole("num_features", num_features, 1), positive("eps", eps), affine
        self.name = ""
        self.monitor: NormMonitor | None = None
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            parameter = nn.Parameter(torch.full((num_features,), value, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, parameter)

    def _flat(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens `[N, C]`, and which of them count."""
        if x.shape[-1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels in the last axis, got shape {tuple(x.shape)}")
        if padding_mask is None and _masks:
            padding_mask = _masks[-1]
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


class PowerNorm(_TokenNorm):
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
        device: of parameters and statistics.
        dtype: of the parameters; statistics are float32 at least.

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
        batch = self._mean(tokens.detach().square(), valid, self.sync).to(self.phi.dtype)
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


class _BatchStatistics(_TokenNorm):
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
        device: of parameters and statistics.
        dtype: of the parameters.

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
        device: of parameters and statistics.
        dtype: of the parameters.

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


def convert_layernorm(
    model: nn.Module,
    norm: type[nn.Module] = PowerNorm,
    where: Callable[[str, nn.Module], bool] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Replace LayerNorms over one axis by another norm, in place; $\\gamma$ and $\\beta$ are the same parameters.

    PyTorch's transformer layers, which in evaluation may run a fused LayerNorm whatever their norm is, are kept from
    doing so, and tell the norms inside which tokens `src_key_padding_mask` calls padding.

    Args:
        model: the network.
        norm: `PowerNorm`, `PowerNormV`, `SequenceBatchNorm` or a class with their arguments.
        where: `(name, layer) -> bool`, which LayerNorms; all by default.
        **kwargs: arguments of the norm, such as `warmup_steps=4000`.

    Returns:
        The network.

    Raises:
        ValueError: if there is no such LayerNorm.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 4, norm_first=True, batch_first=True)
        >>> layer = convert_layernorm(layer, warmup_steps=100)
    """

    def matches(name: str, module: nn.Module) -> bool:
        plain = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
        return plain and (where is None or where(name, module))

    def make(old: Any) -> nn.Module:
        new: Any = norm(old.normalized_shape[0], affine=old.elementwise_affine, **{"eps": old.eps, **kwargs})
        if old.elementwise_affine:
            new.weight = old.weight
            new.bias = old.bias if old.bias is not None else nn.Parameter(torch.zeros_like(old.weight), False)
        return new

    converted = replace_layers(model, matches, make)
    for name, module in converted.named_modules():
        if isinstance(module, _TokenNorm):
            module.name = name
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, _TokenNorm) for m in module.modules()):
            module.register_forward_pre_hook(_tell_padding, with_kwargs=True)
            module.register_forward_hook(_forget_padding, always_call=True)
    return converted


def _tell_padding(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("src_key_padding_mask", args[2] if len(args) > 2 else None)
    if mask is None:
        _masks.append(_masks[-1] if _masks else None)
        return
    padded = mask if mask.dtype == torch.bool else mask == -torch.inf
    _masks.append(padded if layer.self_attn.batch_first or padded.dim() == 1 else padded.T)


def _forget_padding(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if _masks:
        _masks.pop()


@torch.no_grad()
def fold(norm: PowerNorm | PowerNormV, linear: nn.Linear) -> nn.Linear:
    """The linear layer that does in evaluation what the norm and `linear` after it do.

    $W' = W \\operatorname{diag}(\\gamma / \\sqrt{\\phi + \\varepsilon})$, $b' = b + W\\beta$.

    Args:
        norm: without group scaling (`num_groups=None`), which depends on the token.
        linear: the layer that follows; both are left as they are.

    Raises:
        ValueError: if the norm scales groups, or sizes differ.
    """
    if getattr(norm, "num_groups", None) is not None:
        raise ValueError(
            "expected a norm with num_groups=None: group scaling depends on the token and cannot be folded"
        )
    if linear.in_features != norm.num_features:
        raise ValueError(f"expected a layer of {norm.num_features} inputs, got {linear.in_features}")
    scale = (norm.phi + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.weight is not None and norm.bias is not None:
        scale, shift = scale * norm.weight, norm.bias.to(scale)
    weight = linear.weight.to(scale.dtype)
    folded = nn.Linear(linear.in_features, linear.out_features, device=weight.device, dtype=linear.weight.dtype)
    folded.weight.copy_(weight * scale)
    folded.bias.copy_(weight @ shift + (0 if linear.bias is None else linear.bias))
    return folded


class NormMonitor:
    """Records, step by step, how PowerNorms behave while they train.

    Columns of `to_frame()`: `layer`, `step`, `deviation` (mean of $|\\psi_B^2 - \\phi| / \\phi$), `gamma` (mean
    $\\Gamma$), `nu` (largest $|\\nu|$), `gradient` (norm of $g$).

    Args:
        model: a network with PowerNorms.

    Example:
        >>> with NormMonitor(net) as monitor:  # doctest: +SKIP
        ...     fit(net, train)
        >>> monitor.to_frame()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        self.norms = {id(m): (name, m) for name, m in model.named_modules() if isinstance(m, PowerNorm)}
        if not self.norms:
            raise ValueError("expected a network with PowerNorms, got one without")
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> NormMonitor:
        for _, norm in self.norms.values():
            norm.monitor = self
        return self

    def __exit__(self, *error: object) -> None:
        for _, norm in self.norms.values():
            norm.monitor = None

    def note(self, norm: PowerNorm, **values: float) -> None:
        """Keep figures of a step; those of its backward pass join those of its forward pass."""
        name = self.norms[id(norm)][0]
        step = int(norm.steps) + ("deviation" in values)
        row = next((r for r in reversed(self.rows) if r["layer"] == name and r["step"] == step), None)
        if row is None:
            self.rows.append(row := {"layer": name, "step": step})
        row.update(values)

    def to_frame(self) -> pd.DataFrame:
        """A row for each layer and step."""
        import pandas as pd

        return pd.DataFrame(self.rows)
