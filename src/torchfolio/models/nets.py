"""Small reference networks. Those that are sequential are `nn.Sequential`, with the classifier last as `head`."""

from torchfolio.models.conv_net import ConvNet, conv_block, pooled_head
from torchfolio.models.mlp import ACTIVATIONS, MLP, activation_layer
from torchfolio.models.mlp import activation_layer as activation
from torchfolio.models.transformer import Transformer, sinusoids
from torchfolio.models.unet import UNet, UNetBlock
from torchfolio.models.vgg import VGG, VGG_PLANS, vgg11, vgg13, vgg16, vgg19
from torchfolio.models.vision_transformer import EncoderBlock, PatchEmbedding, TokenMean, ViT

__all__ = [
    "ACTIVATIONS", "MLP", "VGG", "VGG_PLANS", "ConvNet", "EncoderBlock", "PatchEmbedding", "TokenMean", "Transformer", "UNet",
    "UNetBlock", "ViT", "activation", "activation_layer", "conv_block", "pooled_head", "sinusoids", "vgg11", "vgg13", "vgg16", "vgg19",
]  # fmt: skip
