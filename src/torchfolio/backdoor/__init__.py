"""Backdoors: attacks, detectors and defences, on common ground.

- `triggers`: what makes an input obeyed by a backdoored network; `labels`: which labels the attacker gives;
- `poison`: poisoned data sets with known truth; `metrics`: ACC, ASR, what a filter rejects, …;
- `detectors`, `defenses`: base classes of detectors, defences and attacks; `evaluation`: what they are judged by;
- `zoo`: small networks and their training.
"""

from torchfolio.backdoor.evaluation import (
    evaluate_attack,
    evaluate_defense,
    evaluate_input_detector,
    evaluate_model_detector,
)
from torchfolio.backdoor.labels import X2X, AllToAll, AllToOne, CleanLabel, LabelMap
from torchfolio.backdoor.metrics import attack_metrics, auroc, filter_metrics, threshold_at_fpr, tpr_at_fpr
from torchfolio.backdoor.poison import PoisonedDataset, poison, poisoned_test
from torchfolio.backdoor.triggers import (
    AdditiveTrigger,
    BlendTrigger,
    GeneratorTrigger,
    PatchTrigger,
    SinusoidTrigger,
    TokenTrigger,
    Trigger,
    WarpTrigger,
)
from torchfolio.catalog import doors

__all__ = [
    "X2X",
    "AdditiveTrigger",
    "AllToAll",
    "AllToOne",
    "BlendTrigger",
    "CleanLabel",
    "GeneratorTrigger",
    "LabelMap",
    "PatchTrigger",
    "PoisonedDataset",
    "SinusoidTrigger",
    "TokenTrigger",
    "Trigger",
    "WarpTrigger",
    "attack_metrics",
    "auroc",
    "evaluate_attack",
    "evaluate_defense",
    "evaluate_input_detector",
    "evaluate_model_detector",
    "filter_metrics",
    "poison",
    "poisoned_test",
    "threshold_at_fpr",
    "tpr_at_fpr",
]

__getattr__, __dir__, _offered = doors(__name__, __all__)
__all__ += _offered
