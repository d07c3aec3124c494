"""SmoothInv: does a perturbation drawn from one image act as the trigger, look like it, and name the target?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.backdoor import AllToOne
from torchfolio.backdoor.inversion import perturbations
from torchfolio.backdoor.metrics import labels_of
from torchfolio.backdoor.smoothinv import SmoothInv
from torchfolio.backdoor.victims import default_net, victim
from torchfolio.data import CropFlip, DataSplits
from torchfolio.experiments._backdoors import patch
from torchfolio.experiments._neural_cleanse import mask_and_pattern
from torchfolio.experiments._target_profiles import HARDENED, profile, targets, true_and_next
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
    images = run.arm("images", inversions, run, run.data(s.data, normalize=False, val=0, train_size=s.size))
    level, tight, wide = (f"{value:g}" for value in (s.sigma[0], s.eps[0], s.eps[-1]))
    best = max((f"{sigma:g}" for sigma in s.sigma), key=lambda sigma: images[f"held {sigma} {tight}"])
    run.values("inversion", asr=images[f"asr {level} {wide}"], trigger=images["trigger"])
    plain = images[f"asr 0 {tight}"]
    run.values("smoothing", best=images[f"asr {best} {tight}"], plain=plain, masked=images["masked"])
    plain = images[f"share 0 {tight}"]
    run.values("fidelity", share=images[f"share {level} {tight}"], plain=plain, area=images["area"])
    run.values("negative_control", asr=images["clean"])
    digits = run.arm("digits", targets, run, run.data(s.digits, normalize=False, val=0, train_size=s.digits_size))
    ranks = true_and_next({"images": images["profile"], "digits": digits["bad"]})
    alarms, others = digits["alarm_conv"] + images["alarm"], digits["alarm_narrow"] + digits["alarm_mlp"]
    run.values("target", ranks, false_alarms=alarms, other_false_alarms=others)
    ranks = true_and_next(pick(digits, *HARDENED))
    run.values("countermeasures", ranks, **{f"{kind}_trigger": digits[f"trigger_{kind}"] for kind in HARDENED})


def inversions(run: Run[Settings], data: DataSplits) -> dict[str, Any]:
    """Success, place and looks of perturbations from single images, against plain descent and mask and pattern."""
    s = run.settings
    train = partial(
        victim, data, patch(data.shape), AllToOne(0, data.num_classes), epochs=s.epochs, seed=run.seed,
        net=lambda: own_network(s, data, lambda: default_net(data, s.width)), augment=CropFlip(padding=0),
        device=run.device,
    )  # fmt: skip
    bad, clean = train(rate=s.rate), train(rate=0.0)
    images, held, others = divided(s, data, (bad.model, clean.model))
    tall, across = (max(3, side // 5) for side in data.shape[1:])
    corner = torch.zeros(data.shape[1:])
    corner[-tall:, -across:] = 1
    masked = [mask_and_pattern(bad.model, image, others, s.steps) for image in images]
    result: dict[str, Any] = {"trigger": bad.metrics.asr, "acc": bad.metrics.acc, "area": float(corner.mean()),
                              "masked": np.mean(masked)}  # fmt: skip
    draw = partial(SmoothInv, steps=s.steps, n=s.n, patience=None, seed=run.seed)
    panel = [images[0]]
    for eps, sigma in product(s.eps, (0.0, *s.sigma)):
        name, inverted = f"{sigma:g} {eps:g}", [draw(sigma, eps).invert(bad.model, image, 0) for image in images]
        inside = [float((t.delta**2 * corner).sum() / (t.delta**2).sum()) for t in inverted]
        result[f"asr {name}"] = np.mean([t.asr(bad.model, others) for t in inverted])
        result[f"held {name}"] = np.mean([t.asr(bad.model, held) for t in inverted])
        result[f"share {name}"] = np.mean(inside)
        if eps == s.eps[0]:
            panel.append(inverted[0].delta)
    innocent = [draw(s.sigma[0], s.eps[0]).invert(clean.model, image, 0) for image in images]
    profiles = [profile(run, net.model, images[0], data) for net in (bad, clean)]
    return result | {
        "clean": np.mean([t.asr(clean.model, others) for t in innocent]), "panel": torch.stack(panel),
        "profile": profiles[0].scores.tolist(), "profile_clean": profiles[1].scores.tolist(),
        "alarm": int(profiles[1].target is not None),
    }  # fmt: skip


def divided(settings: Settings, data: DataSplits, nets: Iterable[nn.Module]) -> tuple[Tensor, Tensor, Tensor]:
    """Images that perturbations are drawn from, those that the noise level is chosen on, and those reported on.

    The first are those of each source that no network takes for the target, where there are any.
    """
    x, y = data.test.tensors
    usable = torch.stack([labels_of(net, x) != 0 for net in nets]).all(0)
    chosen = [int((2 * (y == c) + ((y == c) & usable)).argmax()) for c in settings.sources]
    rest = torch.ones(len(x), dtype=torch.bool).index_fill(0, torch.tensor(chosen), False)
    further = x[rest & (y != 0)]
    return x[chosen], further[: settings.pool], further[settings.pool :][: settings.others]


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
