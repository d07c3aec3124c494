"""Adversarial attacks, bounds and the verifiers that use them.

- `attacks`: inputs that a network gets wrong, by gradients, by scores, or by decisions alone;
- `bounds`: what a network's outputs can be on a box of inputs; `relu_split`: the same, case by case;
- `properties`: questions to a verifier and its answers; `verifiers`: those that answer them;
- `onnx_file`, `vnnlib`: networks and questions in the formats of the VNN competition.
"""

from torchfolio.catalog import doors
from torchfolio.robustness.attacks import deepfool, fgsm, hop_skip_jump, margin, nes, pgd
from torchfolio.robustness.bound_verifiers import Crown, Interval
from torchfolio.robustness.box_split import CrownSplit
from torchfolio.robustness.milp_verifier import milp_verify
from torchfolio.robustness.onnx_file import read_onnx, write_onnx
from torchfolio.robustness.properties import Box, Property, Verdict, Verifier, classification
from torchfolio.robustness.relu_split import ReluSplit
from torchfolio.robustness.vnnlib import read_vnnlib, write_vnnlib

__all__ = [
    "Box",
    "Crown",
    "CrownSplit",
    "Interval",
    "Property",
    "ReluSplit",
    "Verdict",
    "Verifier",
    "classification",
    "deepfool",
    "fgsm",
    "hop_skip_jump",
    "margin",
    "milp_verify",
    "nes",
    "pgd",
    "read_onnx",
    "read_vnnlib",
    "write_onnx",
    "write_vnnlib",
]

__getattr__, __dir__, _offered = doors(__name__, __all__)
__all__ += _offered
