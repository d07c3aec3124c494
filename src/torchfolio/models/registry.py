"""The reference networks by name."""

from __future__ import annotations

import difflib
import importlib

from torch import nn

NAMES = {
    "resnet20": "resnet20",
    "resnet32": "resnet32",
    "resnet44": "resnet44",
    "resnet56": "resnet56",
    "resnet110": "resnet110",
    "vgg11": "vgg11",
    "vgg13": "vgg13",
    "vgg16": "vgg16",
    "vgg19": "vgg19",
    "mlp": "MLP",
    "convnet": "ConvNet",
    "vit": "ViT",
    "unet": "UNet",
    "transformer": "Transformer",
}

BUILDERS = (*sorted(set(NAMES.values())), "BasicBlock", "Chain", "EncoderBlock", "ResNetCIFAR", "VGG")
"""Names in `torchfolio.models` that a bundle may build: they evaluate no text, import nothing and open no path."""


def names() -> list[str]:
    """Names of the reference networks."""
    return list(NAMES)


def spec(name: str) -> str:
    """Import path of a reference network's factory, `"torchfolio.models:resnet20"`.

    Raises:
        ValueError: if there is no network of this name.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=2)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"there is no reference network {name!r}; {hint}there are {', '.join(NAMES)}")
    return f"torchfolio.models:{NAMES[name]}"


def build(name: str, **kwargs: object) -> nn.Module:
    """A reference network by its name.

    Args:
        name: one of `names()`.
        **kwargs: arguments of the network.

    Raises:
        ValueError: if the name or an argument is unknown.
    """
    module, _, attribute = spec(name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(**kwargs)
    except TypeError as error:
        raise ValueError(f"{name} cannot be built: {error}") from error
