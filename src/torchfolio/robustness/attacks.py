"""Evasion attacks: the smallest change of an input that changes a prediction.

A function per attack, from `(model, x, y)` to an `Attack`. The model's mode and flags are restored and its parameters get
no gradient; inputs stay in `clip`; `max_batch` bounds the samples of one forward pass; a `generator` fixes everything
random.

Sources: PGD, Madry et al., ICLR 2018; FGSM, Goodfellow et al., ICLR 2015; NES, Ilyas et al., ICML 2018; HopSkipJump,
Chen et al., IEEE S&P 2020; DeepFool, Moosavi-Dezfooli et al., CVPR 2016.
"""

from __future__ import annotations

from torchfolio.robustness.attack_base import LOSSES, Attack, attacked, margin
from torchfolio.robustness.boundary_steps import deepfool
from torchfolio.robustness.decision_attack import hop_skip_jump
from torchfolio.robustness.gradient_attack import fgsm, pgd
from torchfolio.robustness.score_attack import nes

__all__ = ["LOSSES", "Attack", "attacked", "deepfool", "fgsm", "hop_skip_jump", "margin", "nes", "pgd"]
