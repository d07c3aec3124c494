r"""Denoisers without additive constants, and how a network of your own becomes one.

Without biases, and with a batch norm that only divides, a network of convolutions and ReLUs is piecewise linear and
positively homogeneous in evaluation mode: $f(\alpha y) = \alpha f(y)$ for $\alpha > 0$ and $f(y) = \nabla f(y)\, y$. It
denoises at every noise level without being told which one.

Reference:
    Mohan, Kadkhodaie, Simoncelli, Fernandez-Granda, "Robust and Interpretable Blind Image Denoising via Bias-Free
    Convolutional Neural Networks", ICLR 2020. Kadkhodaie, Guth, Simoncelli, Mallat, ICLR 2024, arXiv 2310.02557,
    appendix A.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import finite, number, positive, whole
from torchfolio.engine import evaluating

__all__ = ["BiasFreeBatchNorm2d", "BiasFreeCNN", "BiasFreeUNet", "homogeneity", "make_bias_free"]

LINEAR = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.LocalResponseNorm, nn.RMSNorm)
CURVED = (
    nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Softsign, nn.Softmax,
    nn.LogSoftmax, nn.LogSigmoid, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
    nn.Threshold, nn.GLU, nn.MultiheadAttention, nn.Embedding,
)  # fmt: skip
HOMOGENEOUS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
    nn.ZeroPad2d, nn.Upsample, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip


class BiasFreeBatchNorm2d(nn.Module):
    r"""Batch norm that divides each channel by a standard deviation and subtracts nothing, $\gamma x / s$.

    In training $s = \sqrt{\mathrm{Var}(x) + \epsilon}$ over examples and places, and gradients flow through it; in
    evaluation s is its running mean.

    Args:
        channels: number of channels.
        gain: initial value of $\gamma$. The paper draws it within 0.025 of 0, which suits long training.
        momentum: share of the newest batch in the running mean.
        eps: added to the variance.

    Shapes:
        `[B, channels, …]`, to the same.
    """

    def __init__(self, channels: int, gain: float = 0.5, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, positive("eps", eps)
        finite("gain", number("gain", gain))
        self.weight = nn.Parameter(torch.full((whole("channels", channels, 1),), float(gain)))
        self.register_buffer("running_sd", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        running = self.get_buffer("running_sd")
        if self.training:
            places = [0, *range(2, x.dim())]
            s = (x.var(places, correction=0) + self.eps).sqrt()
            with torch.no_grad():
                running.lerp_(s.to(running.dtype), self.momentum)
        else:
            s = running.to(x.dtype)
        return x * (self.weight / s).reshape(-1, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, momentum={self.momentum}, eps={self.eps}"


class BiasFreeUNet(nn.Module):
    """The paper's U-Net: the predicted noise of images of any noise level.

    Args:
        channels: channels of an image.
        base: channels at the finest resolution, doubled at each coarser one; 64 in the paper.
        blocks: number of halvings of the resolution; 3 in the paper.
        gain: gain of the norms.

    Shapes:
        `[B, channels, H, W]` with H and W multiples of `2 ** blocks`, to the same.
    """

    def __init__(self, channels: int = 1, base: int = 64, blocks: int = 3, gain: float = 0.5) -> None:
        super().__init__()
        widths = [whole("base", base, 1) * 2**b for b in range(whole("blocks", blocks, 1) + 1)]
        first = nn.Conv2d(whole("channels", channels, 1), base, 3, padding=1, bias=False)
        self.down = nn.ModuleList([nn.Sequential(first, nn.ReLU(), *_unit(base, base, gain))])
        self.down.extend(_pair(a, b, gain) for a, b in zip(widths, widths[1:-1], strict=False))
        self.middle = _pair(widths[-2], widths[-1], gain)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        last = nn.Conv2d(base, channels, 3, padding=1, bias=False)
        self.merge = nn.ModuleList([nn.Sequential(*_unit(2 * base, base, gain), last)])
        self.merge.extend(_pair(2 * a, a, gain) for a in widths[1:-1])
        self.pool = nn.AvgPool2d(2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, a=0)
        nn.init.zeros_(last.weight)  # no noise is seen at first, as with the paper's small gains
        self.to(memory_format=torch.channels_last)  # twice as fast with few channels on a CPU  # pyright: ignore[reportCallIssue]

    def forward(self, y: Tensor) -> Tensor:
        factor = 2 ** len(self.down)
        if y.dim() != 4 or y.shape[-1] % factor or y.shape[-2] % factor:
            raise ValueError(
                f"expected images [B, C, H, W] with sides that are multiples of {factor}, got {tuple(y.shape)}"
            )
        skips = []
        for block in self.down:
            skips.append(block(self.pool(skips[-1]) if skips else y))
        h = self.middle(self.pool(skips[-1]))
        for up, merge, skip in zip(reversed(self.up), reversed(self.merge), reversed(skips), strict=True):
            h = merge(torch.cat([up(h), skip], 1))
        return h


class BiasFreeCNN(nn.Sequential):
    """A plain stack of convolutions: the predicted noise of images of any noise level and any size.

    Args:
        channels: channels of an image.
        width: channels between layers.
        depth: number of convolutions, 3 or more; norms follow all but the first and the last.
        gain: gain of the norms.
    """

    def __init__(self, channels: int = 1, width: int = 64, depth: int = 21, gain: float = 0.5) -> None:
        inner = [
            part for _ in range(whole("depth", depth, 3) - 2) for part in _unit(whole("width", width, 1), width, gain)
        ]
        whole("channels", channels, 1)
        first, last = (nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in ((channels, width), (width, channels)))
        super().__init__(first, nn.ReLU(), *inner, last)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _unit(inputs: int, outputs: int, gain: float) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), BiasFreeBatchNorm2d(outputs, gain), nn.ReLU()]


def _pair(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(*_unit(inputs, outputs, gain), *_unit(outputs, outputs, gain))


def make_bias_free(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy of a network without additive constants: biases are dropped, batch norms only divide.

    Weights are kept; train it anew, or at least finetune it.

    Args:
        model: network of convolutions, linear layers, batch norms, ReLUs and poolings, which stays as it is.
        example: batch of inputs; with it the copy is run, so that what its `forward` does between layers is checked
            too, and layers of your own are allowed.

    Raises:
        ValueError: naming the module that is not homogeneous (GroupNorm, LayerNorm, GELU, sigmoid, …), or of which
            nobody knows without an example.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        label = f"{name or 'the network'} ({type(module).__name__})"
        if isinstance(module, (*NORMS, *CURVED)):
            why = "divides by the size of its input" if isinstance(module, NORMS) else "is curved or has an offset"
            raise ValueError(
                f"{label} {why}, so that outputs do not scale with inputs; replace it by a ReLU or a batch norm"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if not name:
                return _divider(module)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _divider(module))
        elif isinstance(module, LINEAR):
            module.register_parameter("bias", None)
        elif isinstance(module, HOMOGENEOUS):
            if getattr(module, "inplace", False):
                module.inplace = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        elif example is None and not isinstance(module, BiasFreeBatchNorm2d) and list(module.parameters(recurse=False)):
            raise ValueError(f"{label} has parameters of its own; pass example= to find out whether it is homogeneous")
    if example is not None:
        _check(model, example)
    return model


def _divider(norm: Any) -> BiasFreeBatchNorm2d:
    ours = BiasFreeBatchNorm2d(norm.num_features, 1.0, 0.1 if norm.momentum is None else norm.momentum, norm.eps)
    with torch.no_grad():
        if norm.weight is not None:
            ours.weight.copy_(norm.weight)
        if norm.running_var is not None:
            ours.get_buffer("running_sd").copy_((norm.running_var + norm.eps).sqrt())
    like = norm.weight if norm.weight is not None else norm.running_var
    return (ours.to(like) if like is not None else ours).train(norm.training)


@torch.no_grad()
def homogeneity(denoiser: nn.Module, y: Tensor, factor: float = 3.0) -> float:
    r"""$\lVert f(\alpha y) - \alpha f(y) \rVert / \lVert \alpha f(y) \rVert$, 0 for a homogeneous network.

    Args:
        denoiser: network, looked at in evaluation mode.
        y: inputs.
        factor: $\alpha$, positive.
    """
    positive("factor", factor)
    with evaluating(denoiser):
        expected = factor * denoiser(y)
        difference = denoiser(factor * y) - expected
        return float(difference.norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))


def _check(model: nn.Module, example: Tensor) -> None:
    """Find the innermost module whose inputs scale and whose output does not."""
    values: list[dict[str, tuple[Any, Any]]] = [{}, {}]
    for scale, seen in zip((1.0, 3.0), values, strict=True):
        hooks = [m.register_forward_hook(partial(_remember, seen, name)) for name, m in model.named_modules()]
        try:
            with evaluating(model), torch.no_grad():
                model(scale * example)
        finally:
            for hook in hooks:
                hook.remove()
    for name in sorted(values[0], key=lambda name: -name.count(".") - bool(name)):
        (x, out), (x3, out3) = values[0][name], values[1].get(name, (None, None))
        if _scaled(x, x3) and not _scaled((out,), (out3,)):
            kind = type(model.get_submodule(name)).__name__
            raise ValueError(
                f"{name or 'the network'} ({kind}) is not homogeneous: its output does not scale with its input"
            )


def _remember(seen: dict[str, tuple[Any, Any]], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    seen.setdefault(name, (inputs, output))


def _scaled(a: Any, b: Any) -> bool:
    pairs = [(p, q) for p, q in zip(a, b, strict=True) if isinstance(p, Tensor) and p.is_floating_point()] if b else []
    return all(bool((q - 3 * p).norm() <= 1e-3 * (3 * p).norm() + 1e-12) for p, q in pairs)
