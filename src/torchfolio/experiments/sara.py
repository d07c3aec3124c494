"""A small diffusion model of the digits 0 to 4 learns 5 to 9: by SaRA, by LoRA, and by all of its weights."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchfolio.adaptation.sara import (
    SaRA,
    ineffective_drift,
    load_delta,
    nuclear_gradient,
    save_delta,
    threshold_for,
    zero_smallest,
)
from torchfolio.dynamics.diffusion import MLPDenoiser, NoisePrediction, noise_prediction_loss, train_diffusion
from torchfolio.dynamics.noise_schedules import DiscreteSchedule
from torchfolio.engine.recipes import adamw
from torchfolio.runs import Results, Run, plots


@dataclass(frozen=True)
class Settings:
    """Data, network and the two trainings.

    Attributes:
        data: name of the images.
        hidden: width of the denoiser.
        depth: its hidden layers.
        noise_steps: steps of the diffusion.
        pretrain_size: images of the first five classes.
        pretrain_steps: steps on them.
        tune_size: images of the other classes.
        tune_steps: steps on those.
        batch_size: of both.
        lr: of fine-tuning.
        fraction: share of the weights that SaRA trains.
        rank_weight: weight of its nuclear norm.
        lora_rank: rank of LoRA.
        repeats: draws of time and noise for each held-out image.
    """

    data: str = "digits"
    hidden: int = 192
    depth: int = 4
    noise_steps: int = 200
    pretrain_size: int = 700
    pretrain_steps: int = 3000
    tune_size: int = 200
    tune_steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    fraction: float = 0.1
    rank_weight: float = 5e-4
    lora_rank: int = 8
    repeats: int = 20


SCALES = {
    "smoke": Settings(hidden=72, depth=2, pretrain_steps=150, tune_steps=40, repeats=2),
    "quick": Settings(),
    "full": Settings(data="mnist10k", hidden=1024, depth=6, pretrain_size=4000, pretrain_steps=20000, tune_size=1000,
                     tune_steps=4000, batch_size=128, repeats=4),
}  # fmt: skip
SCHEDULES = (1e-4, 0.05)


class RandomMask(SaRA):
    """Control: as many weights, drawn at random."""

    def __init__(self, model: nn.Module, *, share: float, seed: int, **settings: Any) -> None:
        self.share, self.mask_draws = share, torch.Generator().manual_seed(seed)
        super().__init__(model, fraction=share, seed=seed, **settings)

    def _mask(self, name: str, param: Tensor) -> Tensor:
        return torch.rand(param.shape, generator=self.mask_draws) < self.share


class LoRA(nn.Module):
    """A linear layer beside a trained low-rank one, $Wx + b + BAx$; B begins at 0."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """A network with LoRA on all linear layers but those of the time; all else is frozen."""
    net = copy.deepcopy(model).requires_grad_(False)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear) and name != "time":
            net.set_submodule(name, LoRA(layer, rank))
    return net


def run(run: Run[Settings]) -> None:
    """Pretrain, set weights to zero, and fine-tune in every way."""
    settings = run.settings
    data = run.data(settings.data, normalize=False, val=0)
    first, second = (_digits(data, low) for low in (0, 5))
    torch.manual_seed(run.seed)
    net = MLPDenoiser(tuple(data.shape), settings.hidden, settings.depth)
    state = run.arm("pretrained", pretrain, settings, net, first[0], run.seed)["state"]
    net.load_state_dict(_unpacked(state))
    held = (first[1], second[1])
    zeroed = run.arm("zeroed", zero, settings, net, held, run.seed)
    found = {
        way: run.arm(way, tune, settings, net, second[0], held, run.seed, way)
        for way in run.progress(WAYS, "fine-tuning")
    }
    before, sara, lora, full = zeroed, found["sara"], found["lora"], found["full"]
    run.values(
        "ineffective_weights", smallest=zeroed["smallest"], random=zeroed["random"], smallest_fifth=zeroed["fifth"]
    )
    rise = {k: v["prior"] - before["prior"] for k, v in found.items()}
    gain = {k: before["target"] - v["target"] for k, v in found.items()}
    run.values(
        "forgetting", rise=rise["sara"], lora_rise=rise["lora"], full_rise=rise["full"], gain=gain["sara"],
        lora_gain=gain["lora"], full_gain=gain["full"], random_rise=rise["random_mask"], random_gain=gain["random_mask"],
        trained=sara["trained"], lora_trained=lora["trained"], full_trained=full["trained"],
    )  # fmt: skip
    run.values(
        "low_rank", with_term=found["no_progressive"]["nuclear"], without=found["no_rank_no_progressive"]["nuclear"]
    )
    run.values(
        "frozen", changed=max(found[k]["changed"] for k in WAYS if "changed" in found[k]), full_changed=full["moved"]
    )
    run.values("memory", **{k: sara[k] for k in ("held", "allowed", "left", "stored", "reloaded")})


WAYS = ("sara", "no_progressive", "no_rank", "no_rank_no_progressive", "random_mask", "lora", "full")


def _digits(data: Any, low: int) -> tuple[Tensor, Tensor]:
    """Training and held-out images of five classes, in [-1, 1]."""
    parts = []
    for part in (data.train, data.test):
        x, y = part.tensors
        parts.append(2 * x[(y >= low) & (y < low + 5)] - 1)
    return parts[0], parts[1]


def schedule(settings: Settings) -> DiscreteSchedule:
    return DiscreteSchedule.linear(settings.noise_steps, *SCHEDULES)


def _unpacked(state: Any) -> dict[str, Tensor]:
    return {name: torch.as_tensor(np.asarray(value)) for name, value in state.items()}


def pretrain(settings: Settings, net: nn.Module, x: Tensor, seed: int) -> dict[str, Any]:
    """The denoiser learns the first classes."""
    net = copy.deepcopy(net)
    train_diffusion(net, x[: settings.pretrain_size], schedule=schedule(settings), steps=settings.pretrain_steps,
                    batch_size=settings.batch_size, lr=2e-3, seed=seed, progress=False)  # fmt: skip
    return {"state": {name: value.clone() for name, value in net.state_dict().items()}}


def losses(settings: Settings, net: nn.Module, held: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Held-out losses on the first and on the other classes, at fixed times and noise."""
    rule = NoisePrediction(schedule(settings))
    prior, target = (
        rule.evaluate(net, (x, torch.zeros(len(x))), repeats=settings.repeats, seed=7)["loss"] for x in held
    )
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
    half = None if "no_progressive" in way else settings.tune_steps // 2
    common: dict[str, Any] = {"lr": settings.lr, "rank_weight": 0.0 if "no_rank" in way else settings.rank_weight,
                              "progressive_at": half, "seed": seed}  # fmt: skip
    optimizer = None
    if way == "random_mask":
        optimizer = RandomMask(model, share=settings.fraction, **{**common, "progressive_at": None, "rank_weight": 0.0})
    elif way not in ("lora", "full"):
        optimizer = SaRA(model, fraction=settings.fraction, **common)
    trained = optimizer.trainable_count if optimizer else sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = memory(settings, model, optimizer, x) if way == "sara" and optimizer else {}
    masks = {name: optimizer.mask(name) for name, _ in model.named_parameters()} if optimizer else {}
    train_diffusion(model, x, schedule=schedule(settings), steps=settings.tune_steps, batch_size=settings.batch_size,
                    lr=settings.lr, optimizer=optimizer or adamw(settings.lr), seed=seed, progress=False)  # fmt: skip
    prior, target = losses(settings, model, held)
    result |= {"prior": prior, "target": target, "trained": trained}
    if way == "full":
        result["moved"] = ineffective_drift(net, model, threshold_for(net, settings.fraction))["left"]
    if optimizer is not None:
        pairs = [
            (masks[n], p.detach(), q.detach())
            for (n, p), q in zip(net.named_parameters(), model.parameters(), strict=True)
        ]
        result["changed"] = sum(int((p[~m] != q[~m]).sum()) for m, p, q in pairs)
        result["nuclear"] = sum(
            float(torch.linalg.matrix_norm(q * m, "nuc")) for m, _, q in pairs if q.dim() == 2 and min(q.shape) > 64
        )
        result["still_trained"] = optimizer.trainable_count
    if way == "sara" and optimizer is not None:
        result |= on_disk(net, model, optimizer)
    return result


def memory(settings: Settings, model: nn.Module, optimizer: SaRA, x: Tensor) -> dict[str, float]:
    """Bytes of gradients and state between backward and step."""
    noise_prediction_loss(model, schedule(settings), x[: settings.batch_size]).mean().backward()
    held = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    largest = max(p.numel() for p in model.parameters())
    return {
        "held": optimizer.state_bytes + sum(4 * g.numel() for g in held), "left": len(held),
        "allowed": 4 * (3 * optimizer.trainable_count + largest),
        "adamw_held": 4 * 3 * sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def on_disk(net: nn.Module, model: nn.Module, optimizer: SaRA) -> dict[str, float]:
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


def figures(results: Results) -> dict[str, Figure]:
    """Held-out losses after fine-tuning."""
    return {
        "prior": plots.bars(results, {w: (w, "prior") for w in WAYS}, ylabel="loss on digits 0 to 4"),
        "target": plots.bars(results, {w: (w, "target") for w in WAYS}, ylabel="loss on digits 5 to 9"),
    }


def peers(bench: Any) -> None:
    """Steps of fine-tuning, against AdamW and LoRA; and the subgradient of the nuclear norm against autograd's."""
    x, plan = torch.randn(64, 1, 8, 8), DiscreteSchedule.linear(200, *SCHEDULES)

    def steps(way: str) -> Any:
        torch.manual_seed(0)
        net = MLPDenoiser((1, 8, 8), 192, 4)
        net = with_lora(net, 8) if way == "lora" else net
        optimizer: torch.optim.Optimizer = (
            SaRA(net, fraction=0.1, lr=1e-3)
            if way == "sara"
            else torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
        )

        def go() -> None:
            for _ in range(20):
                optimizer.zero_grad()
                noise_prediction_loss(net, plan, x).mean().backward()
                optimizer.step()

        return go

    bench.compare("20 steps of a denoiser", ours=steps("sara"), adamw=steps("adamw"), lora=steps("lora"))
    matrix = torch.randn(192, 192)

    def autograd() -> Tensor:
        leaf = matrix.clone().requires_grad_()
        return torch.autograd.grad(torch.linalg.matrix_norm(leaf, "nuc"), leaf)[0]

    bench.compare("nuclear norm of 192 x 192", ours=lambda: nuclear_gradient(matrix), autograd=autograd)
