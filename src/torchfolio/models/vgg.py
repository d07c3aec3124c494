"""VGG for small images (Simonyan and Zisserman, ICLR 2015)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from torchfolio.models.chain import remembered
from torchfolio.models.conv_net import conv_block, pooled_head
from torchfolio.models.init import initialize

VGG_PLANS: dict[str, tuple[tuple[int, ...], ...]] = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "vgg19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


@remembered
class VGG(nn.Sequential):
    """VGG with batch norm for small images: `layer1`, …, `layerL`, and a pooled linear `head`.

    Args:
        plan: `"vgg11"`, `"vgg13"`, `"vgg16"`, `"vgg19"`, or the widths of each stage.
        num_classes: width of the output.
        in_channels: channels of the images.
        width: factor on all widths.

    Shapes:
        `[B, in_channels, H, W]` to `[B, num_classes]`; every stage halves the resolution (rounding up), so 16x16
        images do too.

    Reference:
        Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, with
        batch norm and one linear layer, as is usual on CIFAR.
    """

    def __init__(
        self,
        plan: str | Sequence[Sequence[int]] = "vgg16",
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        if isinstance(plan, str) and plan not in VGG_PLANS:
            raise ValueError(f"expected plan to be one of {', '.join(VGG_PLANS)} or widths, got {plan!r}")
        stages = VGG_PLANS[plan] if isinstance(plan, str) else plan
        children: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for stage in stages:
            for k, wanted in enumerate(stage):
                units = max(1, round(wanted * width))
                children[f"layer{len(children) + 1}"] = conv_block(channels, units, pool=k == len(stage) - 1)
                channels = units
        children["head"] = pooled_head(channels, num_classes)
        super().__init__(children)
        initialize(self, "he_fan_out")


def vgg11(**kwargs: object) -> VGG:
    """VGG-11 with batch norm; arguments of `VGG`."""
    return VGG("vgg11", **kwargs)  # pyright: ignore[reportArgumentType]


def vgg13(**kwargs: object) -> VGG:
    """VGG-13 with batch norm; arguments of `VGG`."""
    return VGG("vgg13", **kwargs)  # pyright: ignore[reportArgumentType]


def vgg16(**kwargs: object) -> VGG:
    """VGG-16 with batch norm; arguments of `VGG`."""
    return VGG("vgg16", **kwargs)  # pyright: ignore[reportArgumentType]


def vgg19(**kwargs: object) -> VGG:
    """VGG-19 with batch norm; arguments of `VGG`."""
    return VGG("vgg19", **kwargs)  # pyright: ignore[reportArgumentType]
