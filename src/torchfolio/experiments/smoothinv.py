"""SmoothInv: does a perturbation drawn from one image act as the trigger, look like it, and name the target?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from torchfolio.backdoor import AllToOne, poisoned_test
from torchfolio.backdoor.inversion import perturbations
from torchfolio.backdoor.metrics import attack_metrics, labels_of
from torchfolio.backdoor.smoothinv import SmoothInv
from torchfolio.backdoor.victims import default_net, victim
from torchfolio.data import CropFlip, DataSplits
from torchfolio.experiments._backdoors import patch, perceptron
from torchfolio.experiments._hardened_victims import hardened
from torchfolio.experiments._neural_cleanse import mask_and_pattern
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import OwnNetwork, own_network


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """Data, victims and inversions."""

    data: str = setting("cifar10", "name of the images that inversions are judged on")
    digits: str = setting("mnist10k", "name of digits, for the target and for clean networks")
    size: int = setting(10_000, "training images of the first")
    digits_size: int = setting(3000, "training images of the second")
    width: int = setting(16, "width of the first's network")
    epochs: int = setting(8, "number of epochs of its training")
    digits_epochs: int = setting(5, "number of epochs of the second's")
    rate: float = setting(0.1, "share of the training images that is poisoned; the target is class 0")
    eps: tuple[float, ...] = setting((1.0, 2.0), "budgets; the first one is the tight one")
    sigma: tuple[float, ...] = setting((0.12, 0.25), "deviations of the noise")
    steps: int = setting(120, "number of steps of an inversion")
    n: int = setting(20, "draws of noise")
    sources: tuple[int, ...] = setting((1, 3, 5, 8), "classes whose first test image perturbations are drawn from")
    others: int = setting(900, "test images that they are tried on")
    pool: int = setting(64, "images behind the profile of the classes, and others behind the choice of the noise level")
    noise: float = setting(0.12, "deviation in the training that tries to hide the trigger")


SCALES = {
    "smoke": Settings(data="digits", digits="digits", size=200, digits_size=200, width=4, epochs=1, digits_epochs=1,
                      steps=2, n=2, sources=(1, 3), others=50, pool=16),
    "quick": Settings(),
    "full": Settings(size=50_000, digits_size=10_000, epochs=20, eps=(1.0, 1.5, 2.0), sigma=(0.12, 0.25, 0.5),
                     steps=400, n=40, sources=(1, 2, 3, 4, 5, 6, 7, 8, 9)),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Train victims and clean networks, draw perturbations, and try them on other test images."""
    s = run.settings
    data = run.data(s.data, normalize=False, val=0, train_size=s.size)
    found = run.arm("images", inversions, run, data)
    key = f"{s.eps[0]:g}"
    best = max(s.sigma, key=lambda sigma: found[f"held {sigma:g} {key}"])
    run.values("inversion", asr=found[f"asr {s.sigma[0]:g} {s.eps[-1]:g}"], trigger=found["trigger"])
    run.values("smoothing", best=found[f"asr {best:g} {key}"], plain=found[f"asr 0 {key}"], masked=found["masked"])
    run.values(
        "fidelity", share=found[f"share {s.sigma[0]:g} {key}"], plain=found[f"share 0 {key}"], area=found["area"]
    )
    run.values("negative_control", asr=found["clean"])
    small = run.data(s.digits, normalize=False, val=0, train_size=s.digits_size)
    digits = run.arm("digits", targets, run, small)
    profiles = {"images": found["profile"], "digits": digits["bad"]}
    ranks = {**{k: v[0] for k, v in profiles.items()}, **{f"{k}_next": max(v[1:]) for k, v in profiles.items()}}
    alarms, others = digits["alarm_conv"] + found["alarm"], digits["alarm_narrow"] + digits["alarm_mlp"]
    run.values("target", ranks, false_alarms=alarms, other_false_alarms=others)
    hard = pick(digits, "negatives", "augmented")
    ranks = {**{k: v[0] for k, v in hard.items()}, **{f"{k}_next": max(v[1:]) for k, v in hard.items()}}
    run.values("countermeasures", ranks, **{f"{k}_trigger": digits[f"trigger_{k}"] for k in hard})


def inversions(run: Run[Settings], data: DataSplits) -> dict[str, Any]:
    """Success, place and looks of perturbations from single images, against plain descent and mask and pattern."""
    s = run.settings
    trigger, labels = patch(data.shape), AllToOne(0, data.num_classes)
    bad, clean = (
        victim(data, trigger, labels, rate=rate, epochs=s.epochs, seed=run.seed,
               net=lambda: own_network(s, data, lambda: default_net(data, s.width)),
               augment=CropFlip(padding=0), device=run.device)
        for rate in (s.rate, 0.0)
    )  # fmt: skip
    x, y = data.test.tensors
    # The first test image of each source that neither network takes for the target.
    usable = (labels_of(bad.model, x) != 0) & (labels_of(clean.model, x) != 0)
    chosen = [int((2 * (y == c) + ((y == c) & usable)).argmax()) for c in s.sources]
    images = x[chosen]
    rest = torch.ones(len(x), dtype=torch.bool).index_fill(0, torch.tensor(chosen), False)
    # The noise level is chosen on images that success is not reported on.
    further = x[rest & (y != 0)]
    held, others = further[: s.pool], further[s.pool :][: s.others]
    side = [max(3, k // 5) for k in data.shape[1:]]
    corner = torch.zeros(data.shape[1:])
    corner[-side[0] :, -side[1] :] = 1
    result: dict[str, Any] = {"trigger": bad.metrics.asr, "acc": bad.metrics.acc, "area": float(corner.mean())}
    panel = [images[0]]
    for eps in s.eps:
        for sigma in (0.0, *s.sigma):
            draw = SmoothInv(sigma, eps, s.steps, n=s.n, patience=None, seed=run.seed)
            inverted, name = [draw.invert(bad.model, image, 0) for image in images], f"{sigma:g} {eps:g}"
            inside = [(t.delta**2 * corner).sum() / (t.delta**2).sum() for t in inverted]
            result[f"asr {name}"] = average(t.asr(bad.model, others) for t in inverted)
            result[f"held {name}"] = average(t.asr(bad.model, held) for t in inverted)
            result[f"share {name}"] = average(float(share) for share in inside)
            panel += [inverted[0].delta] if eps == s.eps[0] else []
            if (sigma, eps) == (s.sigma[0], s.eps[0]):
                result["clean"] = average(draw.invert(clean.model, i, 0).asr(clean.model, others) for i in images)
    result["masked"] = average(mask_and_pattern(bad.model, image, others, s.steps) for image in images)
    finder = SmoothInv(s.sigma[0], s.eps[0], s.steps // 2, n=s.n // 2, seed=run.seed)
    profiles = [finder.identify_target(net.model, images[0], x[50:][: s.pool]) for net in (bad, clean)]
    result |= {"profile": profiles[0].scores.tolist(), "profile_clean": profiles[1].scores.tolist()}
    return result | {"alarm": int(profiles[1].target is not None), "panel": torch.stack(panel)}


def average(values: Iterable[float]) -> float:
    parts = list(values)
    return sum(parts) / len(parts)


def targets(run: Run[Settings], data: DataSplits) -> dict[str, Any]:
    """Profiles of digit networks: a victim, clean ones of several kinds, and victims trained against smoothing."""
    s = run.settings
    trigger, labels = patch(data.shape), AllToOne(0, data.num_classes)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: default_net(data, 8), "narrow": lambda: default_net(data, 4), "mlp": partial(perceptron, data)
    }  # fmt: skip
    train = partial(victim, data, trigger, labels, epochs=s.digits_epochs, seed=run.seed, device=run.device)
    nets = {"bad": train(rate=s.rate).model, **{name: train(rate=0, net=net).model for name, net in kinds.items()}}
    nets |= {name: hardened(run, data, name) for name in ("negatives", "augmented")}
    x, y = data.test.tensors
    image, pool = x[y == s.sources[0]][0], x[50:][: s.pool]
    finder = SmoothInv(s.sigma[0], s.eps[0], s.steps // 2, n=s.n // 2, seed=run.seed)
    profiles = {name: finder.identify_target(net, image, pool) for name, net in nets.items()}
    alarms = {f"alarm_{name}": int(profiles[name].target is not None) for name in kinds}
    attacked = poisoned_test((x, y), trigger, labels)
    success = {f"trigger_{name}": attack_metrics(net, (x, y), attacked).asr for name, net in nets.items()}
    return {**{name: p.scores.tolist() for name, p in profiles.items()}, **alarms, **success}


def figures(results: Results) -> plots.Figures:
    """Success against the budget, the profiles, and what is drawn."""
    s = results.settings
    lines = {
        f"noise {sigma:g}" if sigma else "plain descent": [("images", f"asr {sigma:g} {eps:g}") for eps in s.eps]
        for sigma in (0.0, *s.sigma)
    }
    profile, ax = plots.axes("class", "share of other images", width=7)
    shown = {
        "images": ("images", "profile"), "images, clean network": ("images", "profile_clean"),
        "digits": ("digits", "bad"), "digits, clean network": ("digits", "conv"),
    }  # fmt: skip
    for k, (label, value) in enumerate(shown.items()):
        share = results.values(*value).mean(0)
        ax.bar([c + 0.2 * k - 0.3 for c in range(len(share))], share, 0.2, label=label)
    ax.legend()
    image, *deltas = torch.as_tensor(results.arms[0]["images"]["panel"]).unbind()
    rows = [[image, (image + delta).clamp(0, 1), delta] for delta in deltas]
    panel = perturbations(rows, ["image", "with it", "perturbation"], [f"noise {v:g}" for v in (0.0, *s.sigma)])
    curves = plots.curves(results, lines, x=s.eps, xlabel="budget", ylabel="success on other images")
    return {"budgets": curves, "profiles": profile, "drawn": panel}
