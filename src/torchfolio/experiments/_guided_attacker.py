"""An attacker with few images and a guide: a small network with a cosine head, whose prototypes act as class names."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.backdoor import AdditiveTrigger, BlendTrigger, PatchTrigger, Trigger
from torchfolio.backdoor.clip_backdoor import CLIPGuidedAttack, DataConstraint, clean_feature_erase, universal_trigger
from torchfolio.backdoor.image_text import PrototypeEncoder
from torchfolio.backdoor.metrics import accuracy_of, labels_of
from torchfolio.backdoor.zoo import Normalize, SmallConvNet, fit_classifier
from torchfolio.data import CropFlip
from torchfolio.measure import outputs
from torchfolio.runs import Run


class CosineHead(nn.Module):
    """Scores by cosine with a prototype of each class."""

    def __init__(self, backbone: nn.Module, width: int, classes: int, scale: float) -> None:
        super().__init__()
        self.backbone, self.scale = backbone, scale
        self.prototypes = nn.Parameter(torch.randn(classes, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(self.backbone(x), dim=1) @ F.normalize(self.prototypes, dim=1).T


class GuidedAttacker:
    """The attacker's images, guide and triggers; the victim's images and the test set lie beside them."""

    def __init__(self, run: Run[Any]) -> None:
        self.run, self.settings = run, run.settings
        s = self.settings
        sizes = {"train_size": s.own + s.train_size, "test_size": s.test_size, "image_size": s.image_size}
        self.data = run.data(s.data, normalize=False, val=0, **sizes)
        x, y = self.data.train.tensors
        self.own, self.theirs = (x[: s.own], y[: s.own]), (x[s.own :], y[s.own :])
        x, y = self.data.test.tensors
        self.test = x, y

    def fit(self, net: nn.Module, data: Any) -> nn.Module:
        """Train a guide or a victim; photographs are flipped."""
        flip = CropFlip(padding=0) if self.data.shape[0] == 3 else None
        fit_classifier(net, data, self.settings.epochs, augment=flip, seed=self.run.seed, device=self.run.device)
        return net

    @cached_property
    def guide(self) -> PrototypeEncoder:
        s = self.settings
        torch.manual_seed(1000 + self.run.seed)
        layers = list(SmallConvNet(self.data.shape[0], self.data.num_classes, s.guide_width).children())[:-1]
        normalize = Normalize(self.data.mean.flatten().tolist(), self.data.std.flatten().tolist())
        net = CosineHead(nn.Sequential(normalize, *layers), 4 * s.guide_width, self.data.num_classes, s.scale)
        self.fit(net, self.own)
        return PrototypeEncoder(net.backbone, net.prototypes.detach(), s.scale)

    @cached_property
    def triggers(self) -> dict[str, Trigger]:
        s, shape = self.settings, self.data.shape
        signs = torch.randint(2, shape, generator=self.run.generator()) * 2.0 - 1
        made: dict[str, Trigger] = {
            "random": AdditiveTrigger(s.eps * signs),
            "badnets": PatchTrigger.checkerboard(shape, size=2, margin=0),
            "blend": BlendTrigger.noise(shape, 0.15),
        }
        for objective in ("uap", "cfa"):
            made[objective] = universal_trigger(
                self.guide, self.own[0][: s.trigger_images], objective, target=0, eps=s.eps, epochs=s.trigger_epochs,
                step=s.trigger_step * s.eps, seed=self.run.seed,
            )  # fmt: skip
        return made

    def erase(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        s = self.settings
        return clean_feature_erase(
            self.guide, x, s.eps, s.erase_steps, s.erase_step * s.eps, index=index, seed=self.run.seed
        )

    def attack(self, trigger: str, constraint: str, erase: bool) -> CLIPGuidedAttack:
        s, grey = self.settings, self.own[0].mean(1, keepdim=True)
        constraints = {
            "number": lambda: DataConstraint.number(s.rate),
            "target_class": lambda: DataConstraint.classes([0], s.class_rate),
            # Another domain: negatives in grey.
            "domain": lambda: DataConstraint.domain((1 - grey.expand_as(self.own[0]), self.own[1]), s.rate),
        }
        attack = CLIPGuidedAttack(
            self.guide, 0, trigger=self.triggers[trigger], constraint=constraints[constraint](), suppress=erase,
            eps=s.eps, erase_steps=s.erase_steps, erase_step=s.erase_step * s.eps,
        )  # fmt: skip
        return attack.fit(self.own[0])

    @cached_property
    def erased(self) -> tuple[Tensor, Tensor]:
        """Test images whose features are erased, and labels."""
        x, y = (t[: self.settings.erased_size] for t in self.test)
        return self.erase(x), y

    def on_guide(self) -> dict[str, Any]:
        """What erasing and triggers do to the guide, on test images."""
        (x, y), (erased, labels) = self.test, self.erased
        plain = x[: len(erased)]
        sure, sure_erased = (outputs(self.guide, part).softmax(1).amax(1).mean() for part in (plain, erased))
        right, right_erased = (accuracy_of(self.guide, part, labels) for part in (plain, erased))
        examples = [plain, erased, *(self.triggers[t](plain[:6]) for t in ("blend", "uap", "cfa"))]
        result: dict[str, Any] = {
            "confidence_fall": 1 - float(sure_erased / sure), "accuracy": right, "accuracy_fall": right - right_erased,
            "largest_change": float((erased.double() - plain.double()).abs().max()),
            "examples": torch.cat([part[:6] for part in examples]),
        }  # fmt: skip
        for name in ("clean", "random", "uap", "cfa"):
            images = x if name == "clean" else self.triggers[name](x)
            f = F.normalize(outputs(self.guide.backbone, images).double(), dim=1)
            result[f"{name}_cosine"] = float((f.sum(0).square().sum() - len(f)) / (len(f) * (len(f) - 1)))
            result[f"{name}_target_rate"] = float((labels_of(self.guide, images)[y != 0] == 0).double().mean())
        return result
