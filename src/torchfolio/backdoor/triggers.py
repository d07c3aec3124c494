"""Triggers: what turns an input into one that a backdoored network obeys.

Every trigger is a module from images `[N, C, H, W]` in [0, 1], not normalised, to images of the same shape. It leaves
its input alone, clamps its output to [0, 1], and is differentiable in the image and in its own parameters. Put the
normalisation into the network (`torchfolio.backdoor.zoo.Normalize`), so that triggers, norms and clamps stay in the
space of pixels.

Sources: patches and blends, Gu et al., "BadNets", 2017, and Chen et al., "Targeted Backdoor Attacks on Deep Learning
Systems Using Data Poisoning", 2017; sinusoids, Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption
Without Label Poisoning", ICIP 2019; warps, Nguyen and Tran, "WaNet", ICLR 2021.
"""

from __future__ import annotations

from torchfolio.backdoor.additive_trigger import ADDITIVE_SHAPES, AdditiveTrigger
from torchfolio.backdoor.blend_trigger import BlendTrigger
from torchfolio.backdoor.generator_trigger import GeneratorTrigger
from torchfolio.backdoor.keyed_random import keyed_uniform
from torchfolio.backdoor.patch_trigger import PatchTrigger
from torchfolio.backdoor.sinusoid_trigger import SinusoidTrigger
from torchfolio.backdoor.token_trigger import TokenTrigger
from torchfolio.backdoor.trigger_base import Trigger
from torchfolio.backdoor.warp_trigger import WarpTrigger

__all__ = [
    "ADDITIVE_SHAPES",
    "AdditiveTrigger",
    "BlendTrigger",
    "GeneratorTrigger",
    "PatchTrigger",
    "SinusoidTrigger",
    "TokenTrigger",
    "Trigger",
    "WarpTrigger",
    "keyed_uniform",
]
