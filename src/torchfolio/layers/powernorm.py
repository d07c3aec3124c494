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

Reference:
    Shen et al., PowerNorm: Rethinking Batch Normalization in Transformers, ICML 2020 (arXiv 2003.07845), algorithm 2.
    The published code divides the gradient by the batch's root after warm-up (`divide_by="batch"`), the paper by the
    one of the forward pass; the code averages over padding, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchfolio.layers.running_norm import PowerNorm
from torchfolio.layers.token_norms import PowerNormV, SequenceBatchNorm, TokenNorm, masks, padding
from torchfolio.models import replace_layers
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NormMonitor", "PowerNorm", "PowerNormV", "SequenceBatchNorm", "convert_layernorm", "fold", "padding"]


def convert_layernorm(
    model: nn.Module,
    norm: type[nn.Module] = PowerNorm,
    where: Callable[[str, nn.Module], bool] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Replace LayerNorms over one axis by another norm, in place; $\\gamma$ and $\\beta$ are the same parameters.

    PyTorch's transformer layers, which in evaluation may run a fused LayerNorm whatever their norm is, are kept from
    doing so. Every module around a new norm that is handed a mask of sequences by one of the usual names
    (`src_key_padding_mask` and `tgt_key_padding_mask` of PyTorch, `attention_mask` of `transformers`) tells the norms
    inside which tokens are padding; for other networks there is `padding`.

    Args:
        model: network.
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
        if isinstance(module, TokenNorm):
            module.name = name
        elif (argument := _mask_argument(module)) and any(isinstance(m, TokenNorm) for m in module.modules()):
            module.register_forward_pre_hook(partial(_tell_padding, argument), with_kwargs=True)
            module.register_forward_hook(_forget_padding, always_call=True)
    return converted


def _mask_argument(module: nn.Module) -> str | None:
    """The argument by which a module is told of padding."""
    names = inspect.signature(module.forward).parameters
    usual = ("src_key_padding_mask", "tgt_key_padding_mask", "attention_mask")
    present = [name for name in usual if name in names]
    return present[0] if len(present) == 1 else None  # nn.Transformer has two, and leaves them to its halves


def _tell_padding(argument: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = dict(zip(inspect.signature(layer.forward).parameters, args, strict=False)) | kwargs
    mask = arguments.get(argument)
    if mask is None or mask.dim() > 2:  # layers of `transformers` get it once more, as [B, 1, T, T]
        masks.append(masks[-1] if masks else None)
    elif argument == "attention_mask":
        masks.append(mask == 0)  # there, what counts is marked
    else:
        padded = mask if mask.dtype == torch.bool else mask == -torch.inf
        first = next((m.batch_first for m in layer.modules() if isinstance(m, nn.MultiheadAttention)), True)
        masks.append(padded if first or padded.dim() == 1 else padded.T)


def _forget_padding(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if masks:
        masks.pop()


@torch.no_grad()
def fold(norm: PowerNorm | PowerNormV, linear: nn.Linear) -> nn.Linear:
    """The linear layer that does in evaluation what the norm and `linear` after it do.

    $W' = W \\operatorname{diag}(\\gamma / \\sqrt{\\phi + \\varepsilon})$, $b' = b + W\\beta$.

    Args:
        norm: without group scaling (`num_groups=None`), which depends on the token.
        linear: layer that follows; both are left as they are.

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


class NormMonitor(Shown):
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
