"""A small diffusion model of the digits 0 to 4 learns 5 to 9: by SaRA, by LoRA, and by all of its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.adaptation.sara import SaRA, ineffective_drift, threshold_for, zero_smallest
from torchfolio.dynamics.diffusion import noise_prediction_loss
from torchfolio.experiments._half_denoisers import HalfDenoiser
from torchfolio.experiments._lora import with_lora
from torchfolio.experiments._sparse_storage import held_in_memory, stored_on_disk
from torchfolio.runs import Results, Run, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """Data, network and the two trainings."""

    data: str = setting("digits", "name of the images")
    hidden: int = setting(192, "width of the denoiser")
    depth: int = setting(4, "its hidden layers")
    noise_steps: int = setting(200, "steps of the diffusion")
    pretrain_size: int = setting(700, "images of the first five classes")
    pretrain_steps: int = setting(3000, "steps on them")
    tune_size: int = setting(200, "images of the other classes")
    tune_steps: int = setting(1000, "steps on those")
    batch_size: int = setting(64, "batch size of both")
    lr: float = setting(1e-3, "learning rate of fine-tuning")
    fraction: float = setting(0.1, "share of the weights that SaRA trains")
    rank_weight: float = setting(5e-4, "weight of its nuclear norm")
    lora_rank: int = setting(8, "rank of LoRA")
    repeats: int = setting(20, "draws of time and noise for each held-out image")


SCALES = {
    "smoke": Settings(hidden=72, depth=2, pretrain_steps=150, tune_steps=40, repeats=2),
    "quick": Settings(),
    "full": Settings(data="mnist10k", hidden=1024, depth=6, pretrain_size=4000, pretrain_steps=20000, tune_size=1000,
                     tune_steps=4000, batch_size=128, repeats=4),
}  # fmt: skip


class RandomMask(SaRA):
    """Control: as many weights of every tensor, drawn at random."""

    def __init__(self, model: nn.Module, *, seed: int, **settings: Any) -> None:
        self.mask_draws = torch.Generator().manual_seed(seed)
        super().__init__(model, seed=seed, **settings)

    def _mask(self, name: str, param: Tensor) -> Tensor:
        smallest = super()._mask(name, param).flatten()
        order = torch.randperm(len(smallest), generator=self.mask_draws)
        return smallest[order.to(smallest.device)].view_as(param)


PARTS: dict[str, tuple[type[SaRA], bool, bool]] = {
    "no_progressive": (SaRA, True, False), "no_rank": (SaRA, False, True),
    # The random mask is compared with the mask alone, so that nothing but the mask differs.
    "no_rank_no_progressive": (SaRA, False, False), "random_mask": (RandomMask, False, False),
}  # fmt: skip
"""Parts of SaRA: whose mask, whether with the nuclear norm, and whether masks change halfway."""


class Study(HalfDenoiser):
    """The ways in which the network learns the other classes."""

    def zeroed(self) -> dict[str, float]:
        """Relative rises of the loss when weights are set to 0."""
        prior, target = self.losses(self.net)
        draws = torch.Generator().manual_seed(self.seed)
        random = copy.deepcopy(self.net)
        with torch.no_grad():
            for p in random.parameters():
                p.masked_fill_(torch.rand(p.shape, generator=draws) < 0.1, 0)
        tried = {"smallest": zero_smallest(self.net, 0.1), "fifth": zero_smallest(self.net, 0.2), "random": random}
        rises = {name: self.losses(net)[0] / prior - 1 for name, net in tried.items()}
        return {"prior": prior, "target": target, **rises}

    def lora(self) -> dict[str, float]:
        """By LoRA."""
        return self.tuned(with_lora(self.net, self.settings.lora_rank))

    def full(self) -> dict[str, float]:
        """By all weights."""
        model = copy.deepcopy(self.net)
        result = self.tuned(model)
        drift = ineffective_drift(self.net, model, threshold_for(self.net, self.settings.fraction))
        return {**result, "moved": drift["left"]}

    def optimizer(self, kind: type[SaRA], ranked: bool, progressive: bool) -> tuple[nn.Module, SaRA]:
        """A copy of the network, and SaRA or a part of it on that."""
        s, model = self.settings, copy.deepcopy(self.net)
        own: dict[str, Any] = {"rank_weight": s.rank_weight if ranked else 0.0,
                               "progressive_at": s.tune_steps // 2 if progressive else None}  # fmt: skip
        return model, kind(model, fraction=s.fraction, lr=s.lr, seed=self.seed, **own)

    def masked(self, model: nn.Module, optimizer: SaRA) -> dict[str, float]:
        """What was learned and forgotten by a mask, and what changed outside of it and within."""
        masks = {name: optimizer.mask(name) for name, _ in model.named_parameters()}
        trained = optimizer.trainable_count
        result = {**self.tuned(model, optimizer), "trained": trained, "still_trained": optimizer.trainable_count}
        before, after = (dict(net.named_parameters()) for net in (self.net, model))
        changed = sum(int((before[n][~m] != after[n][~m]).sum()) for n, m in masks.items())
        large = [after[n].detach() * m for n, m in masks.items() if m.dim() == 2 and min(m.shape) > 64]
        nuclear = sum(float(torch.linalg.matrix_norm(matrix, "nuc")) for matrix in large)
        return {**result, "changed": changed, "nuclear": nuclear}

    def part(self, way: str) -> dict[str, float]:
        """By a part of SaRA."""
        return self.masked(*self.optimizer(*PARTS[way]))

    def sara(self) -> dict[str, float]:
        """By SaRA, with what it holds in memory and writes to disk."""
        model, optimizer = self.optimizer(SaRA, True, True)
        noise_prediction_loss(model, self.schedule, self.x[: self.settings.batch_size]).mean().backward()
        memory = held_in_memory(model, optimizer)
        return {**memory, **self.masked(model, optimizer), **stored_on_disk(self.net, model, optimizer)}


def run(run: Run[Settings]) -> None:
    """Pretrain, set weights to zero, and fine-tune in every way."""
    study = Study(run)
    before, sara = run.arm("zeroed", study.zeroed), run.arm("sara", study.sara)
    parts = {way: run.arm(way, study.part, way) for way in PARTS}
    lora, full = run.arm("lora", study.lora), run.arm("full", study.full)
    alone, random = parts["no_rank_no_progressive"], parts["random_mask"]
    run.values("ineffective_weights", pick(before, "smallest", "random"), smallest_fifth=before["fifth"])
    ways = {"": sara, "lora_": lora, "full_": full, "mask_alone_": alone, "random_": random}
    rise = {f"{name}rise": arm["prior"] - before["prior"] for name, arm in ways.items()}
    gain = {f"{name}gain": before["target"] - arm["target"] for name, arm in ways.items()}
    trained = {f"{name}trained": arm["trained"] for name, arm in ways.items() if arm is not alone}
    run.values("forgetting", rise | gain | trained)
    run.values("low_rank", with_term=parts["no_progressive"]["nuclear"], without=alone["nuclear"])
    changed = max(arm["changed"] for arm in (sara, *parts.values()))
    run.values("frozen", changed=changed, full_changed=full["moved"])
    run.values("memory", pick(sara, "held", "allowed", "left", "stored", "reloaded"))


def figures(results: Results) -> plots.Figures:
    """Held-out losses after fine-tuning."""
    ways = ("sara", *PARTS, "lora", "full")
    return {
        "prior": plots.bars(results, {w: (w, "prior") for w in ways}, ylabel="loss on digits 0 to 4"),
        "target": plots.bars(results, {w: (w, "target") for w in ways}, ylabel="loss on digits 5 to 9"),
    }
