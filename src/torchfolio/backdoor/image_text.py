"""Networks that put images and class names into one space, as the guides of attacks.

Each gives class scores $\\text{scale} \\cdot \\cos(E_i(x), E_t(c))$ of images in [0, 1]: CLIP, from the weights of a
user's own disk or of the hub, or any network with a prototype for each class in place of its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import finite, positive
from torchfolio.errors import require

__all__ = ["CLIPEncoder", "ImageTextEncoder", "PrototypeEncoder"]

# Of the pictures that CLIP was trained on (Radford et al., 2021).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageTextEncoder(nn.Module, ABC):
    """Images and classes in one space; called as a module it gives class scores. Subclasses fill `encode_image`.

    Args:
        text_features: direction of each class $E_t$, `[C, d]`; stored with length 1.
        logit_scale: factor on cosines, positive.

    Shapes:
        images `[N, C, H, W]` in [0, 1] to scores `[N, classes]`.

    Raises:
        ValueError: if the directions are not `[C, d]` of two classes or more, or one is zero or not finite.
    """

    text_features: Tensor

    def __init__(self, text_features: Tensor, logit_scale: float = 100.0) -> None:
        super().__init__()
        if text_features.dim() != 2 or len(text_features) < 2:
            raise ValueError(f"expected text features [C, d] of at least two classes, got {tuple(text_features.shape)}")
        lengths = finite("text_features", text_features).norm(dim=1)
        if not bool((lengths > 0).all()):
            raise ValueError("expected text features that are not zero")
        self.register_buffer("text_features", F.normalize(text_features.detach().clone(), dim=1))
        self.logit_scale = float(positive("logit_scale", logit_scale))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.text_features)

    @abstractmethod
    def encode_image(self, x: Tensor) -> Tensor:
        """Features `[N, d]` of images, of any length, differentiable in the image."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.encode_image(x)
        if features.shape != (len(x), self.text_features.shape[1]):
            raise ValueError(
                f"expected image features [{len(x)}, {self.text_features.shape[1]}], got {tuple(features.shape)}"
            )
        # In half precision the squared distance to the uniform distribution, about 1/C², would vanish.
        features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
        return self.logit_scale * F.normalize(features, dim=1) @ self.text_features.to(features).T


class PrototypeEncoder(ImageTextEncoder):
    """Any network of images, with a prototype for each class in place of its name.

    Args:
        backbone: network from images to features `[N, d]`; the user's own module, not a copy.
        prototypes: direction of each class `[C, d]`, such as the weights of a cosine head.
        logit_scale: factor on cosines.
    """

    def __init__(self, backbone: nn.Module, prototypes: Tensor, logit_scale: float = 20.0) -> None:
        super().__init__(prototypes, logit_scale)
        self.backbone = backbone

    def encode_image(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    @classmethod
    def from_images(cls, backbone: nn.Module, x: Tensor, y: Tensor, logit_scale: float = 20.0) -> Self:
        """Prototypes that are the mean directions of some labelled images' features.

        Args:
            backbone: network from images to features.
            x: images `[N, C, H, W]`.
            y: labels `[N]`, every one from 0 to the largest.
            logit_scale: factor on cosines.
        """
        from torchfolio.measure import outputs

        features = F.normalize(outputs(backbone, x), dim=1)
        classes = int(y.max()) + 1
        missing = sorted(set(range(classes)) - set(y.tolist()))
        if missing:
            raise ValueError(f"expected images of every class, got none of {missing}")
        y = y.to(features.device)
        return cls(backbone, torch.stack([features[y == c].mean(0) for c in range(classes)]), logit_scale)


class CLIPEncoder(ImageTextEncoder):
    """CLIP of `transformers`: pictures are resized and normalised here, so that they stay in [0, 1] outside.

    Args:
        model: a `transformers.CLIPModel`; its image part is used, not copied.
        text_features: features of the class names `[C, d]`, see `from_transformers`.

    Reference:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, text_features: Tensor) -> None:
        super().__init__(text_features, float(model.logit_scale.detach().exp()))
        self.vision, self.projection = model.vision_model, model.visual_projection
        self.image_size = int(model.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    @classmethod
    def from_tokens(cls, model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Self:
        """From class names that are tokens already, `[C, L]` with the mask of those that are no padding."""
        was = model.training
        with torch.no_grad():
            pooled = model.eval().text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
            features = model.text_projection(pooled)
        model.train(was)
        return cls(model, features)

    @classmethod
    def from_transformers(
        cls, name: str | Path, class_names: Sequence[str], template: str = "This is a photo of a {}"
    ) -> Self:
        """From weights.

        Args:
            name: folder with a CLIP model and its tokenizer, or a name on the hub such as
                `"openai/clip-vit-base-patch32"`.
            class_names: names of the classes, in the order of the labels.
            template: sentence with a place for the name.

        Raises:
            MissingDependency: without `transformers`.
        """
        transformers: Any = require("transformers", "text")
        model = transformers.CLIPModel.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        tokens = tokenizer([template.format(c) for c in class_names], padding=True, return_tensors="pt")
        return cls.from_tokens(model, tokens["input_ids"], tokens["attention_mask"])

    def encode_image(self, x: Tensor) -> Tensor:
        if x.shape[1] not in (1, 3):
            raise ValueError(f"expected images of one or three channels, got {x.shape[1]}")
        size = (self.image_size, self.image_size)
        if tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode="bicubic", align_corners=True)
        weights = self.projection.weight
        x = ((x.to(self.mean) - self.mean) / self.std).to(weights.dtype)
        return self.projection(self.vision(pixel_values=x.expand(-1, 3, -1, -1)).pooler_output)
