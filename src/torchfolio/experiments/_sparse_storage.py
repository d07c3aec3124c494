"""What training few of the weights holds in memory, and what it writes to disk."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from torchfolio.adaptation.sara import SaRA, load_delta, save_delta

__all__ = ["held_in_memory", "stored_on_disk"]


def held_in_memory(model: nn.Module, optimizer: SaRA) -> dict[str, float]:
    """Bytes of gradients and state after a backward pass, before the step, which is left out."""
    held = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    largest = max(p.numel() for p in model.parameters())
    return {
        "held": optimizer.state_bytes + sum(4 * g.numel() for g in held), "left": len(held),
        "allowed": 4 * (3 * optimizer.trainable_count + largest),
        "adamw_held": 4 * 3 * sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def stored_on_disk(net: nn.Module, model: nn.Module, optimizer: SaRA) -> dict[str, float]:
    """The difference file, and whether the pretrained network and it give the tuned one."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_delta(optimizer, Path(folder) / "delta.safetensors")
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        json.loads(content[8:header])
        again = copy.deepcopy(net)
        load_delta(path, again)
    same = all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    count = sum(len(v) for v in optimizer.delta_state_dict().values())
    return {"stored": (len(content) - header) / (4 * count), "reloaded": float(same), "header": header}
