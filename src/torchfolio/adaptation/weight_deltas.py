"""Files of what fine-tuning by `SaRA` changed: the values of the trained entries, without their positions."""

from __future__ import annotations

from pathlib import Path

from torchfolio.adaptation.packed_entries import digest, write_entries
from torchfolio.adaptation.sara_optimizer import SaRA
from torchfolio.adaptation.small_weights import Named, named_parameters

__all__ = ["load_delta", "save_delta"]


def save_delta(optimizer: SaRA, path: str | Path) -> Path:
    """Write what fine-tuning changed: a safetensors file of the trained entries' values alone.

    Positions are not stored; `load_delta` finds them again in the pretrained weights.
    """
    from safetensors.torch import save_file

    notes = {"format": "sara", "threshold": repr(optimizer.threshold), "positions": digest(optimizer._first)}
    save_file({k: v.cpu().contiguous() for k, v in optimizer.delta_state_dict().items()}, path, notes)
    return Path(path)


def load_delta(path: str | Path, model: Named) -> None:
    """Write what `save_delta` stored into the pretrained network that it was fine-tuned from, in place.

    Raises:
        ValueError: if the file is no such file, or the network has other weights: its mask differs.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            delta = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        threshold = float(notes["threshold"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no difference of SaRA: {error}") from error
    named = dict(named_parameters(model))
    missing = [name for name in delta if name not in named]
    if missing:
        raise ValueError(f"the network has no parameter {missing[0]!r}")
    index = {name: (named[name].detach().abs() < threshold).reshape(-1).nonzero()[:, 0].int() for name in delta}
    if digest(index) != notes.get("positions"):
        raise ValueError(f"{path} was fine-tuned from other weights than these: their masks differ")
    write_entries(named, index, delta)
