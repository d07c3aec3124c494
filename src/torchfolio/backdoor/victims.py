"""Victims: networks trained on poisoned data, whose truth is known, for detectors and defences to be tried on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.backdoor.labels import LabelMap
from torchfolio.backdoor.metrics import AttackMetrics, attack_metrics
from torchfolio.backdoor.poison import poison, poisoned_test
from torchfolio.backdoor.trigger_base import Trigger
from torchfolio.backdoor.zoo import Normalize, SmallConvNet, fit_classifier
from torchfolio.data import DataSplits
from torchfolio.engine.modes import seeded
from torchfolio.shown import Shown

__all__ = ["Victim", "victim"]

FIGURES = ("acc", "asr", "bacc", "n_clean", "n_attacked")


@dataclass(frozen=True, repr=False)
class Victim(Shown):
    """A trained network and what is known of it.

    Attributes:
        model: network on images in [0, 1], in evaluation mode.
        metrics: its accuracy on clean test images, and how often the trigger succeeds; of a network that was never
            poisoned, the latter says what the trigger does by itself.
    """

    model: nn.Module
    metrics: AttackMetrics

    def stored(self) -> dict[str, Any]:
        """Numbers and tensors that `restored` needs: what an arm of an experiment may return."""
        return {**self.metrics.as_dict(), "weights": dict(self.model.state_dict())}

    @staticmethod
    def restored(model: nn.Module, stored: Mapping[str, Any]) -> Victim:
        """A victim from what `stored` gave, and a network of its architecture, which is left alone."""
        net = copy.deepcopy(model)
        net.load_state_dict({name: torch.as_tensor(value) for name, value in stored["weights"].items()})
        return Victim(net.eval(), AttackMetrics(**{name: stored[name] for name in FIGURES}))


def victim(
    data: DataSplits,
    trigger: Trigger,
    label_map: LabelMap,
    *,
    rate: float,
    epochs: int,
    net: Callable[[], nn.Module] | None = None,
    lr: float = 0.05,
    mode: Any = "replace",
    augment: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
    device: Any = "cpu",
    seed: int,
) -> Victim:
    """Train a network on images some of which carry a trigger.

    The same arguments give the same network; networks of one seed and different triggers begin with equal weights.

    Args:
        data: images in [0, 1], loaded with `normalize=False`.
        trigger: trigger of the attack.
        label_map: label map of the attack.
        rate: share of the training images that is poisoned; 0 gives a clean network.
        epochs: passes over them.
        net: makes the untrained network; by default a `SmallConvNet` of width 8 behind `Normalize`.
        lr: peak of the learning rate.
        mode: `"replace"` or `"append"`, see `poison`.
        augment: function from batches of images to such.
        batch_size: batch size of the training.
        device: device to train on; the network comes back on the CPU.
        seed: seed of weights, choice of images and order.

    Raises:
        ValueError: if the data are normalised.
    """
    if data.normalized:
        raise ValueError("expected images in [0, 1], got normalised ones: load the data with normalize=False")
    with seeded(seed):
        model = default_net(data) if net is None else net()
        poisoned = poison(data.train.tensors, trigger, label_map, rate=rate, seed=seed, mode=mode)  # pyright: ignore[reportArgumentType]
        fit_classifier(
            model, poisoned, epochs, lr, augment=augment, batch_size=batch_size, seed=seed, device=str(device)
        )
    model = model.cpu().eval()
    clean = (data.test.tensors[0], data.test.tensors[1])
    return Victim(model, attack_metrics(model, clean, poisoned_test(clean, trigger, label_map)))


def default_net(data: DataSplits, width: int = 8) -> nn.Module:
    """A new `SmallConvNet` that normalises its inputs by itself."""
    mean, std = data.mean.flatten().tolist(), [max(s, 1e-3) for s in data.std.flatten().tolist()]
    return nn.Sequential(Normalize(mean, std), SmallConvNet(data.shape[0], data.num_classes, width=width))
