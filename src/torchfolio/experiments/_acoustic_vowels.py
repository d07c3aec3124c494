"""Vowels told apart by a net around an acoustic cavity, of which a surrogate is fitted to the authors' measurements."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch.nn import functional as F

from torchfolio.data.places import folder_of
from torchfolio.local.physical_ff import PhysicalBlock, PhysicalLocalNet
from torchfolio.local.physical_systems import MeasuredSurrogate, PhysicalSystem

__all__ = ["vowels"]


def vowels(without: PhysicalSystem, *, cavity_epochs: int, epochs: int, lr: float, seed: int) -> dict[str, float]:
    """Test accuracy with the cavity and without.

    Two blocks 40 -> 20 and 40 -> 20, as the authors' acoustic network; a column of zeros fills the 20 inputs.

    Args:
        without: system that takes the cavity's place in the control.
        cavity_epochs: passes that fit the surrogate.
        epochs: passes of the local rule over the vowels, all in one batch.
        lr: learning rate of the local rule.
        seed: random seed.
    """
    folder = folder_of("physical_ff", "acoustic_cavity.npz")
    measured = np.load(folder / "acoustic_cavity.npz")
    table = np.genfromtxt(folder / "vowel_formants.csv", delimiter=",", skip_header=1, dtype=str)
    y = torch.from_numpy(np.unique([name[-2:] for name in table[:, 0]], return_inverse=True)[1])
    x = F.pad(torch.from_numpy(table[:, 1:].astype(np.float32)), (0, 1))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = rows[: len(x) // 5], rows[len(x) // 5 :]
    pairs = (torch.from_numpy(measured[key]) for key in ("x", "y"))
    cavity = MeasuredSurrogate(*pairs, epochs=cavity_epochs, lr=1e-3, seed=seed)
    outcome = {"surrogate_error": float(cavity.error)}
    for name, system in (("cavity", cavity), ("digital", without)):
        blocks = [PhysicalBlock(copy.deepcopy(system), 20, seed=seed + k) for k in range(2)]
        net = PhysicalLocalNet(blocks, 7, 13).fit(x[train], y[train], epochs=epochs, lr=lr)
        outcome[name] = 100 * net.score(x[test], y[test])
    return outcome
