"""What the inversion of triggers stands on: a network made fast for many gradients in its input, and pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from torchfolio.backdoor.suspects import private

__all__ = ["fast_copy", "perturbations", "share_interval", "unit", "varied"]


def fast_copy(model: nn.Module) -> nn.Module:
    """A copy for many passes forward and backward: in evaluation mode, its parameters frozen, channels last, and batch
    norms folded into the convolutions before them where both stand in an `nn.Sequential`.

    Its outputs equal the network's up to rounding.
    """
    net = private(model, None)
    _fold(net)
    # Only 4-D parameters change their layout; a network without any is left as it is.
    return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _fold(module: nn.Module) -> None:
    plain = type(module).forward is nn.Sequential.forward if isinstance(module, nn.Sequential) else False
    children = list(module.named_children())
    for (_, conv), (at, norm) in zip(children, children[1:], strict=False) if plain else ():
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
            if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations") for m in (conv, norm)):
                continue
            name = next(n for n, child in children if child is conv)
            setattr(module, name, fuse_conv_bn_eval(copy.deepcopy(conv), norm).requires_grad_(False))
            setattr(module, at, nn.Identity())
    for _, child in module.named_children():
        _fold(child)


def unit(gradient: Tensor) -> Tensor:
    """Gradients `[P, ...]` of length 1, or 0 where they are 0."""
    norm = gradient.flatten(1).norm(dim=1)
    scale = torch.where(norm > 0, 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
    return gradient * scale.view(-1, *[1] * (gradient.dim() - 1))


def share_interval(hits: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share that was seen `hits` times in `trials`; (0, 1) of no trial."""
    from scipy.stats import beta

    if not trials:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - tail, hits + 1, trials - hits))
    return low, high


def perturbations(rows: Sequence[Sequence[Tensor]], titles: Sequence[str], labels: Sequence[str] = ()) -> Any:
    """A figure of rows of images `[C, H, W]`; those that go below 0 are drawn around a middle grey, scaled.

    Args:
        rows: images, as many in each row.
        titles: titles of the columns.
        labels: labels of the rows.
    """
    import matplotlib.pyplot as plt

    size = (1.5 * len(titles) + 0.4, 1.5 * len(rows) + 0.3)
    fig, axes = plt.subplots(len(rows), len(titles), figsize=size, layout="constrained", squeeze=False)
    for k, row in enumerate(rows):
        for ax, image in zip(axes[k], row, strict=True):
            picture = image.detach().float().cpu()
            if float(picture.min()) < 0:
                picture = 0.5 + 0.5 * picture / picture.abs().max()
            shown = picture.clamp(0, 1)[:3].permute(1, 2, 0).numpy()
            ax.imshow(shown if shown.shape[2] == 3 else shown[:, :, 0], cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        if labels:
            axes[k, 0].set_ylabel(labels[k])
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    return fig


def varied(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Copies of images that are shifted by up to an eighth, mirrored, and noisy."""
    side = [max(1, s // 8) for s in x.shape[-2:]]
    padded = nn.functional.pad(x, (side[1], side[1], side[0], side[0]), mode="replicate")
    copies = []
    for k in range(count):
        top, left = (int(torch.randint(2 * s + 1, (), generator=generator, device=x.device)) for s in side)
        copy = padded[k % len(x), :, top : top + x.shape[-2], left : left + x.shape[-1]]
        copies.append(copy.flip(-1) if k % 2 else copy)
    out = torch.stack(copies)
    return (out + 0.05 * torch.randn(out.shape, device=x.device, dtype=x.dtype, generator=generator)).clamp(0, 1)
