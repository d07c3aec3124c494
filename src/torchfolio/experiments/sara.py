"""A small diffusion model of the digits 0 to 4 learns 5 to 9: by SaRA, by LoRA, and by all of its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.adaptation.sara import SaRA, ineffective_drift, threshold_for, zero_smallest
from torchfolio.dynamics.diffusion import MLPDenoiser, noise_prediction_loss, train_diffusion
from torchfolio.dynamics.noise_schedules import DiscreteSchedule
from torchfolio.engine.recipes import adamw
from torchfolio.experiments._half_denoisers import half, held_out_losses, pretrained
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
WAYS = ("sara", "no_progressive", "no_rank", "no_rank_no_progressive", "random_mask", "lora", "full")


def schedule(steps: int) -> DiscreteSchedule:
    """The diffusion's noise: variances that rise in a line."""
    return DiscreteSchedule.linear(steps, 1e-4, 0.05)


class RandomMask(SaRA):
    """Control: as many weights of every tensor, drawn at random."""

    def __init__(self, model: nn.Module, *, seed: int, **settings: Any) -> None:
        self.mask_draws = torch.Generator().manual_seed(seed)
        super().__init__(model, seed=seed, **settings)

    def _mask(self, name: str, param: Tensor) -> Tensor:
        smallest = super()._mask(name, param).flatten()
        order = torch.randperm(len(smallest), generator=self.mask_draws)
        return smallest[order.to(smallest.device)].view_as(param)


def run(run: Run[Settings]) -> None:
    """Pretrain, set weights to zero, and fine-tune in every way."""
    settings = run.settings
    data = run.data(settings.data, normalize=False, val=0)
    first, second = half(data, 0), half(data, 5)
    torch.manual_seed(run.seed)
    net = MLPDenoiser(tuple(data.shape), settings.hidden, settings.depth)
    x = first[0][: settings.pretrain_size]
    state = run.arm("pretrained", pretrained, net, x, schedule(settings.noise_steps), steps=settings.pretrain_steps,
                    batch_size=settings.batch_size, seed=run.seed)["state"]  # fmt: skip
    net.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
    held = (first[1], second[1])
    before = run.arm("zeroed", zero, settings, net, held, run.seed)
    ways = run.progress(WAYS, "fine-tuning")
    found = {way: run.arm(way, tune, settings, net, second[0], held, run.seed, way) for way in ways}
    sara, lora, full = found["sara"], found["lora"], found["full"]
    run.values(
        "ineffective_weights", smallest=before["smallest"], random=before["random"], smallest_fifth=before["fifth"]
    )
    rise = {k: v["prior"] - before["prior"] for k, v in found.items()}
    gain = {k: before["target"] - v["target"] for k, v in found.items()}
    alone, random = "no_rank_no_progressive", "random_mask"
    run.values(
        "forgetting", rise=rise["sara"], lora_rise=rise["lora"], full_rise=rise["full"], gain=gain["sara"],
        lora_gain=gain["lora"], full_gain=gain["full"], mask_alone_rise=rise[alone], mask_alone_gain=gain[alone],
        random_rise=rise[random], random_gain=gain[random], random_trained=found[random]["trained"],
        trained=sara["trained"], lora_trained=lora["trained"], full_trained=full["trained"],
    )  # fmt: skip
    run.values(
        "low_rank", with_term=found["no_progressive"]["nuclear"], without=found["no_rank_no_progressive"]["nuclear"]
    )
    changed = max(arm["changed"] for arm in found.values() if "changed" in arm)
    run.values("frozen", changed=changed, full_changed=full["moved"])
    run.values("memory", pick(sara, "held", "allowed", "left", "stored", "reloaded"))


def losses(settings: Settings, net: nn.Module, held: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Held-out losses on the first and on the other classes."""
    prior, target = (held_out_losses(net, x, schedule(settings.noise_steps), settings.repeats) for x in held)
    return prior, target


def zero(settings: Settings, net: nn.Module, held: tuple[Tensor, Tensor], seed: int) -> dict[str, float]:
    """Relative rises of the loss when weights are set to 0."""
    prior, target = losses(settings, net, held)
    draws = torch.Generator().manual_seed(seed)
    random = copy.deepcopy(net)
    with torch.no_grad():
        for p in random.parameters():
            p.masked_fill_(torch.rand(p.shape, generator=draws) < 0.1, 0)
    tried = {"smallest": zero_smallest(net, 0.1), "fifth": zero_smallest(net, 0.2), "random": random}
    return {"prior": prior, "target": target, **{k: losses(settings, v, held)[0] / prior - 1 for k, v in tried.items()}}


def tune(
    settings: Settings, net: nn.Module, x: Tensor, held: tuple[Tensor, Tensor], seed: int, way: str
) -> dict[str, float]:
    """Fine-tune in one way, and measure what was learned, forgotten, changed and kept in memory."""
    torch.manual_seed(seed)
    model = with_lora(net, settings.lora_rank) if way == "lora" else copy.deepcopy(net)
    x = x[: settings.tune_size]
    # The random mask is compared with the mask alone, so that nothing but the mask differs.
    progressive, ranked = (not (way == "random_mask" or off in way) for off in ("no_progressive", "no_rank"))
    common: dict[str, Any] = {"lr": settings.lr, "rank_weight": settings.rank_weight if ranked else 0.0,
                              "progressive_at": settings.tune_steps // 2 if progressive else None, "seed": seed}  # fmt: skip
    optimizer = None
    if way == "random_mask":
        optimizer = RandomMask(model, fraction=settings.fraction, **common)
    elif way not in ("lora", "full"):
        optimizer = SaRA(model, fraction=settings.fraction, **common)
    trained = optimizer.trainable_count if optimizer else sum(p.numel() for p in model.parameters() if p.requires_grad)
    result: dict[str, float] = {}
    if way == "sara" and optimizer is not None:
        noise_prediction_loss(model, schedule(settings.noise_steps), x[: settings.batch_size]).mean().backward()
        result = held_in_memory(model, optimizer)
    masks = {name: optimizer.mask(name) for name, _ in model.named_parameters()} if optimizer else {}
    train_diffusion(model, x, schedule=schedule(settings.noise_steps), steps=settings.tune_steps, batch_size=settings.batch_size,
                    lr=settings.lr, optimizer=optimizer or adamw(settings.lr), seed=seed, progress=False)  # fmt: skip
    prior, target = losses(settings, model, held)
    result |= {"prior": prior, "target": target, "trained": trained}
    if way == "full":
        result["moved"] = ineffective_drift(net, model, threshold_for(net, settings.fraction))["left"]
    if optimizer is not None:
        before, after = (dict(each.named_parameters()) for each in (net, model))
        result["changed"] = sum(int((before[n][~m] != after[n][~m]).sum()) for n, m in masks.items())
        large = [after[n].detach() * m for n, m in masks.items() if m.dim() == 2 and min(m.shape) > 64]
        result["nuclear"] = sum(float(torch.linalg.matrix_norm(matrix, "nuc")) for matrix in large)
        result["still_trained"] = optimizer.trainable_count
    if way == "sara" and optimizer is not None:
        result |= stored_on_disk(net, model, optimizer)
    return result


def figures(results: Results) -> plots.Figures:
    """Held-out losses after fine-tuning."""
    return {
        "prior": plots.bars(results, {w: (w, "prior") for w in WAYS}, ylabel="loss on digits 0 to 4"),
        "target": plots.bars(results, {w: (w, "target") for w in WAYS}, ylabel="loss on digits 5 to 9"),
    }
