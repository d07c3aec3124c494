"""SmoothInv: does a perturbation drawn from one image act as the trigger, look like it, and name the target?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.backdoor import AllToOne, PatchTrigger, poison, poisoned_test
from torchfolio.backdoor.detectors import private
from torchfolio.backdoor.inversion import perturbations
from torchfolio.backdoor.metrics import attack_metrics, labels_of
from torchfolio.backdoor.smoothinv import SmoothInv
from torchfolio.backdoor.victims import default_net, victim
from torchfolio.backdoor.zoo import Normalize, fit_classifier
from torchfolio.data import CropFlip, DataSplits, load
from torchfolio.engine import seeded
from torchfolio.runs import Results, Run, plots
from torchfolio.runs.tasks import OwnNetwork, own_network


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """Data, victims and inversions.

    Attributes:
        data: name of the images that inversions are judged on.
        digits: name of digits, for the target and for clean networks.
        size: training images of the first.
        digits_size: training images of the second.
        width: of the first's network.
        epochs: of its training.
        digits_epochs: of the second's.
        rate: share of the training images that is poisoned; the target is class 0.
        eps: budgets; the first one is the tight one.
        sigma: deviations of the noise.
        steps: of an inversion.
        n: draws of noise.
        sources: classes whose first test image perturbations are drawn from.
        others: test images that they are tried on.
        pool: images behind the profile of the classes.
        noise: deviation in the training that tries to hide the trigger.
    """

    data: str = "cifar10"
    digits: str = "mnist10k"
    size: int = 10_000
    digits_size: int = 3000
    width: int = 16
    epochs: int = 8
    digits_epochs: int = 5
    rate: float = 0.1
    eps: tuple[float, ...] = (1.0, 2.0)
    sigma: tuple[float, ...] = (0.12, 0.25)
    steps: int = 120
    n: int = 20
    sources: tuple[int, ...] = (1, 3, 5, 8)
    others: int = 900
    pool: int = 64
    noise: float = 0.12


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
    best = max(s.sigma, key=lambda sigma: found[f"asr {sigma:g} {key}"])
    run.values("inversion", asr=found[f"asr {s.sigma[0]:g} {s.eps[-1]:g}"], trigger=found["trigger"])
    run.values("smoothing", best=found[f"asr {best:g} {key}"], plain=found[f"asr 0 {key}"], masked=found["masked"])
    run.values(
        "fidelity", share=found[f"share {s.sigma[0]:g} {key}"], plain=found[f"share 0 {key}"], area=found["area"]
    )
    run.values("negative_control", asr=found["clean"])
    small = run.data(s.digits, normalize=False, val=0, train_size=s.digits_size)
    digits = run.arm("digits", targets, run, small)
    run.values(
        "target",
        {"images": found["profile"][0], "images_next": max(found["profile"][1:]), "digits": digits["bad"][0],
         "digits_next": max(digits["bad"][1:]), "false_alarms": digits["alarm_conv"] + found["alarm"],
         "other_false_alarms": digits["alarm_narrow"] + digits["alarm_mlp"]},
    )  # fmt: skip
    hard: dict[str, float] = {}
    for name in ("negatives", "augmented"):
        hard |= {
            name: digits[name][0],
            f"{name}_next": max(digits[name][1:]),
            f"{name}_trigger": digits[f"trigger_{name}"],
        }
    run.values("countermeasures", hard)


def inversions(run: Run[Settings], data: DataSplits) -> dict[str, Any]:
    """Success, place and looks of perturbations from single images, against plain descent and mask and pattern."""
    s = run.settings
    trigger, labels = patch(data), AllToOne(0, data.num_classes)
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
    others = x[rest & (y != 0)][: s.others]
    side = [max(3, k // 5) for k in data.shape[1:]]
    corner = torch.zeros(data.shape[1:])
    corner[-side[0] :, -side[1] :] = 1
    result: dict[str, Any] = {"trigger": bad.metrics.asr, "acc": bad.metrics.acc, "area": float(corner.mean())}
    panel = [images[0]]
    for eps in s.eps:
        for sigma in (0.0, *s.sigma):
            draw = SmoothInv(sigma, eps, s.steps, n=s.n, patience=None, seed=run.seed)
            inverted = [draw.invert(bad.model, image, 0) for image in images]
            name = f"{sigma:g} {eps:g}"
            result[f"asr {name}"] = sum(t.asr(bad.model, others) for t in inverted) / len(inverted)
            result[f"share {name}"] = sum(
                float((t.delta**2 * corner).sum() / (t.delta**2).sum()) for t in inverted
            ) / len(inverted)
            panel += [inverted[0].delta] if eps == s.eps[0] else []
            if (sigma, eps) == (s.sigma[0], s.eps[0]):
                result["clean"] = sum(draw.invert(clean.model, i, 0).asr(clean.model, others) for i in images) / len(
                    images
                )
    result["masked"] = sum(masked(bad.model, image, others, s.steps) for image in images) / len(images)
    profiles = [
        SmoothInv(s.sigma[0], s.eps[0], s.steps // 2, n=s.n // 2, seed=run.seed).identify_target(
            net.model, images[0], x[50:][: s.pool]
        )
        for net in (bad, clean)
    ]
    result |= {"profile": profiles[0].scores.tolist(), "profile_clean": profiles[1].scores.tolist()}
    return result | {"alarm": int(profiles[1].target is not None), "panel": torch.stack(panel)}


def masked(model: nn.Module, image: Tensor, others: Tensor, steps: int, weight: float = 0.01) -> float:
    """The baseline: Neural Cleanse's mask and pattern, fitted to the same single image; its success on others."""
    net = private(model, None)
    mask, pattern = (
        torch.full(shape, v, requires_grad=True) for shape, v in ((image.shape[-2:], -2.0), (image.shape, 0.0))
    )
    optimizer = torch.optim.Adam([mask, pattern], lr=0.1, betas=(0.5, 0.9))

    def apply(x: Tensor) -> Tensor:
        return torch.lerp(x, pattern.sigmoid().expand_as(x), mask.sigmoid().expand_as(x))

    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(apply(image[None])), torch.tensor([0])) + weight * mask.sigmoid().sum()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((labels_of(net, apply(others)) == 0).double().mean())


def targets(run: Run[Settings], data: DataSplits) -> dict[str, Any]:
    """Profiles of digit networks: a victim, clean ones of several kinds, and victims trained against smoothing."""
    s = run.settings
    trigger, labels = patch(data), AllToOne(0, data.num_classes)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: default_net(data, 8), "narrow": lambda: default_net(data, 4), "mlp": partial(mlp, data)
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


def hardened(run: Run[Settings], data: DataSplits, kind: str) -> nn.Module:
    """A victim whose training tries to hide the trigger from smoothing.

    `"negatives"` adds triggered images under noise with their true labels, `"augmented"` puts noise on all images.
    """
    s = run.settings
    poisoned = poison(data.train.tensors, patch(data), AllToOne(0, data.num_classes), rate=s.rate, seed=run.seed)
    x, y = poisoned.tensors()
    with seeded(run.seed):
        net = default_net(data, 8)
        noisy = partial(under_noise, sigma=s.noise)
        if kind == "negatives":
            rows = torch.from_numpy(poisoned.is_poison)
            x, y = torch.cat([x, noisy(x[rows])]), torch.cat([y, torch.from_numpy(poisoned.y_true)[rows]])
        fit_classifier(net, (x, y), s.digits_epochs, seed=run.seed, augment=noisy if kind == "augmented" else None)
    return net.eval()


def under_noise(x: Tensor, sigma: float) -> Tensor:
    """Images with Gaussian noise."""
    return x + sigma * torch.randn_like(x)


def patch(data: DataSplits) -> PatchTrigger:
    """A checkerboard near the corner."""
    small = min(data.shape[1:]) < 16
    return PatchTrigger.checkerboard(data.shape, size=2 if small else 3, margin=0 if small else 1)


def mlp(data: DataSplits) -> nn.Module:
    """A network without convolutions."""
    features = data.shape[0] * data.shape[1] * data.shape[2]
    return nn.Sequential(Normalize([0.5] * data.shape[0], [0.5] * data.shape[0]), nn.Flatten(), nn.Linear(features, 64), nn.ReLU(),
                         nn.Linear(64, data.num_classes))  # fmt: skip


def figures(results: Results) -> dict[str, Figure]:
    """Success against the budget, the profiles, and what is drawn."""
    s = results.settings
    curves, ax = plots.axes("budget", "success on other images")
    for sigma in (0.0, *s.sigma):
        values = [results.values("images", f"asr {sigma:g} {eps:g}").mean() for eps in s.eps]
        ax.plot(s.eps, values, marker="o", label=f"noise {sigma:g}" if sigma else "plain descent")
    ax.legend()
    profile, bx = plots.axes("class", "share of other images", width=7)
    for k, (arm, name) in enumerate(
        (("images", "profile"), ("images", "profile_clean"), ("digits", "bad"), ("digits", "conv"))
    ):
        values = results.values(arm, name).mean(0)
        bx.bar(
            [c + 0.2 * k - 0.3 for c in range(len(values))],
            values,
            0.2,
            label=("images", "images, clean network", "digits", "digits, clean network")[k],
        )
    bx.legend()
    image, *deltas = torch.as_tensor(results.arms[0]["images"]["panel"]).unbind()
    rows = [[image, (image + delta).clamp(0, 1), delta] for delta in deltas]
    panel = perturbations(rows, ["image", "with it", "perturbation"], [f"noise {v:g}" for v in (0.0, *s.sigma)])
    return {"budgets": curves, "profiles": profile, "drawn": panel}


def peers(bench: Any) -> None:
    """All images and targets at once, against one after another with a smoothed network as it comes."""
    data = load("mnist10k", normalize=False, val=0, train_size=2000)
    net = victim(data, patch(data), AllToOne(0, 10), rate=0.1, epochs=3, seed=0).model
    images, steps, n, eps, sigma = data.test.tensors[0][:2], 120, 20, 1.0, 0.12
    draw = SmoothInv(sigma, eps, steps, n=n)

    def loop() -> None:
        for image in images:
            for target in range(10):
                delta, v = torch.zeros_like(image), torch.zeros_like(image)
                for _ in range(steps):
                    moved = (image + delta).requires_grad_(True)
                    g = net(moved + sigma * torch.randn(n, *image.shape)).softmax(1).mean(0)[target]
                    (gradient,) = torch.autograd.grad(-g.clamp_min(1e-20).log(), moved)
                    v = 0.9 * v + gradient / gradient.norm().clamp_min(1e-12)
                    delta = (image + delta - eps / 20 * v).clamp(0, 1) - image
                    delta = delta * min(1.0, eps / float(delta.norm()))

    bench.compare(
        "2 images x 10 targets, 120 steps of 20 draws",
        repeats=2,
        ours=lambda: draw.identify_target(net, images, images),
        loop=loop,
    )
