"""Detectors of backdoors: `InputDetector` judges inputs of a network, `ModelDetector` networks.

A method says how it learns and how it scores; the base class owns what every detector needs. Both hand a method a copy of
the network, in evaluation mode and with frozen parameters, so that nothing a method does, nor an error on its way, leaves
a trace on the user's. Higher scores are more suspicious.
"""

from __future__ import annotations

from torchfolio.backdoor.input_detector import InputDetector, Judgement
from torchfolio.backdoor.model_detector import InvertedTrigger, ModelDetector, ModelVerdict, Scan, TriggerInverter
from torchfolio.backdoor.suspects import Pair, checked_classes, collected, device_of, fingerprint, finite_rows, private

__all__ = [
    "InputDetector", "InvertedTrigger", "Judgement", "ModelDetector", "ModelVerdict", "Pair", "Scan", "TriggerInverter",
    "checked_classes", "collected", "device_of", "fingerprint", "finite_rows", "private",
]  # fmt: skip
