"""The generator of T-Miner, pretrained to copy random sentences once for all classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from torchfolio.backdoor.text_generator import PerturbationGenerator
from torchfolio.experiments._text_victims import Text


def pretrained(settings: Any, text: Text, seed: int) -> dict[str, Any]:
    """The generator learns to copy random sentences, once for all classifiers."""
    generator = _new(settings, text)
    generator.pretrain(
        settings.pretrain, settings.length, lr=settings.pretrain_lr, batch_size=settings.batch_size, seed=seed
    )
    state = {f"state/{name}": value for name, value in generator.state_dict().items()}
    return {"accuracy": generator.token_accuracy(settings.length), **state}


def restored(settings: Any, text: Text, arm: Mapping[str, Any]) -> PerturbationGenerator:
    """The generator that `pretrained` gave, from its stored arm."""
    generator = _new(settings, text)
    state = {name.removeprefix("state/"): value for name, value in arm.items() if name.startswith("state/")}
    generator.load_state_dict({name: torch.as_tensor(np.asarray(value)) for name, value in state.items()})
    return generator


def _new(settings: Any, text: Text) -> PerturbationGenerator:
    size = len(text.words) - 4 - ("." in text.words)
    return PerturbationGenerator(size, settings.embedding, settings.dim_c, settings.dim_z, settings.dropout)
