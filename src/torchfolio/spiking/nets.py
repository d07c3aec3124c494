"""Small spiking reference networks, one call a time step. The classifier is the last child, `head`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from torchfolio.models import VGG
from torchfolio.spiking.conversion import to_spiking
from torchfolio.spiking.neurons import LIF

__all__ = ["SpikingBlock", "SpikingConvNet", "SpikingResNet18", "spiking_vgg11"]

Neuron = Callable[[], nn.Module]


class SpikingConvNet(nn.Sequential):
    """Convolution, batch norm and neurons, twice or more, with average pools between: `layer1`, …, `head`.

    Args:
        shape: `(C, H, W)` of one image; height and width must survive the halvings between layers.
        num_classes: width of the output.
        widths: channels of the layers.
        neuron: makes the neurons of one layer.
        norm: whether there is batch norm.

    Shapes:
        `[B, C, H, W]` to `[B, num_classes]`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32),
        neuron: Neuron = LIF,
        norm: bool = True,
    ) -> None:
        channels, height, width = shape
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for k, units in enumerate(widths, start=1):
            parts: list[nn.Module] = [nn.AvgPool2d(2)] if k > 1 else []
            parts.append(nn.Conv2d(channels, units, 3, padding=1))
            if norm:
                parts.append(nn.BatchNorm2d(units))
            children[f"layer{k}"] = nn.Sequential(*parts, neuron())
            channels = units
            height, width = (height // 2, width // 2) if k > 1 else (height, width)
        if not height * width:
            raise ValueError(f"images of shape {tuple(shape)} are too small for {len(widths)} layers")
        children["head"] = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))
        super().__init__(children)


class SpikingBlock(nn.Module):
    """Two rounds of batch norm, neurons, 3x3 convolution beside a shortcut: $x \\mapsto F(x) + S(x)$.

    Where the shape changes the shortcut is a 1x1 convolution of the first neurons' spikes, else the identity.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and the shortcut.
        neuron: makes the neurons of one place.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, neuron: Neuron = LIF) -> None:
        super().__init__()
        self.fire1 = nn.Sequential(nn.BatchNorm2d(in_channels), neuron())
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        self.fire2 = nn.Sequential(nn.BatchNorm2d(out_channels), neuron())
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.fire1(x)
        shortcut = x if self.shortcut is None else self.shortcut(spikes)
        return self.conv2(self.fire2(self.conv1(spikes))) + shortcut


class SpikingResNet18(nn.Sequential):
    """The pre-activation spiking ResNet-18 for small images: `stem`, `block1`, …, `block8`, `head`.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images.
        width: channels of the first stage; every later stage doubles them and halves the resolution.
        neuron: makes the neurons of one place.

    Shapes:
        `[B, in_channels, H, W]` to `[B, num_classes]`.

    Reference:
        Meng et al., ICCV 2023, appendix; He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64, neuron: Neuron = LIF) -> None:
        children: OrderedDict[str, nn.Module] = OrderedDict()
        children["stem"] = nn.Conv2d(in_channels, width, 3, padding=1)
        channels = width
        for k in range(8):
            stage, later = divmod(k, 2)
            units = width * 2**stage
            children[f"block{k + 1}"] = SpikingBlock(channels, units, 1 if stage == 0 or later else 2, neuron)
            channels = units
        children["head"] = nn.Sequential(
            nn.BatchNorm2d(channels), neuron(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
        )
        super().__init__(children)


def spiking_vgg11(num_classes: int = 10, in_channels: int = 2, width: float = 1.0, neuron: Neuron = LIF) -> nn.Module:
    """VGG-11 with batch norm, neurons in place of ReLUs, and average pooling; for event cameras by default.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images; 2 for the polarities of events.
        width: factor on all widths.
        neuron: makes the neurons of one place.
    """
    return to_spiking(VGG("vgg11", num_classes, in_channels, width), neuron, average_pool=True)
