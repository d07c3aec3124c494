"""Reference networks, and the surgery that methods need on a user's own."""

from torchfolio.models.chain import Chain
from torchfolio.models.conv_net import ConvNet
from torchfolio.models.features import Features, collect_features, flatten_features, take_features
from torchfolio.models.grouping import parameter_groups
from torchfolio.models.init import initialize
from torchfolio.models.logits import Logits
from torchfolio.models.mlp import MLP
from torchfolio.models.registry import BUILDERS, build, names, spec
from torchfolio.models.replacement import replace_layers
from torchfolio.models.resnet import (
    BasicBlock,
    ResNetCIFAR,
    parameter_count,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from torchfolio.models.transformer import Transformer
from torchfolio.models.unet import UNet
from torchfolio.models.vgg import VGG, vgg11, vgg13, vgg16, vgg19
from torchfolio.models.vision_transformer import EncoderBlock, ViT

__all__ = [
    "BUILDERS",
    "MLP",
    "VGG",
    "BasicBlock",
    "Chain",
    "ConvNet",
    "EncoderBlock",
    "Features",
    "Logits",
    "ResNetCIFAR",
    "Transformer",
    "UNet",
    "ViT",
    "build",
    "collect_features",
    "flatten_features",
    "initialize",
    "names",
    "parameter_count",
    "parameter_groups",
    "replace_layers",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "spec",
    "take_features",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]
