"""Measures distillation on one head and on two, under a strong, a weak and a good teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.engine import LearningRule, fit
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.experiments._one_head_distillation import OneHead
from torchfolio.measure import outputs
from torchfolio.models import ConvNet, ResNetCIFAR
from torchfolio.models.conv_net import conv_block, pooled_head
from torchfolio.runs import Results, Run, plots, setting, tasks
from torchfolio.training.dhkd import DHKD, binary_kl_norm, etf_deviation, head_conflict, kd_loss


@dataclass(frozen=True)
class Settings:
    """Two tasks, three teachers, one budget for all students."""

    digits: str = setting("mnist10k", "data of the strong teacher")
    digits_size: tuple[int, int | None] = setting((7500, 14), "training examples and side of its images")
    strong_epochs: int = setting(6, "number of epochs of the strong teacher")
    photos: str = setting("cifar10", "data of the weak and the good teacher")
    photos_size: tuple[int, int | None] = setting((6000, 16), "training examples and side of its images")
    weak_epochs: int = setting(
        3, "number of epochs of the weak teacher, which is stopped before its learning rate falls"
    )
    good_epochs: int = setting(6, "number of epochs of the good teacher")
    test_size: int | None = setting(
        None, "test examples of either; `None` takes all, as two methods differ by little more than 2,000 can tell"
    )
    epochs: tuple[int, int] = setting((6, 8), "number of epochs of students on digits and on photos")
    lr: float = setting(0.05, "peak learning rate of students")
    tau: float = setting(2.0, "temperature of the loss on logits")


GOOD = ("kd", "one_head", "mlp")  # students of the good teacher; labels alone are those of the weak one

SCALES = {
    "smoke": Settings("digits", (512, None), 1, "digits", (512, None), 1, 2, None, (1, 1)),
    "quick": Settings(),
    "full": Settings(photos_size=(20_000, None), good_epochs=30, epochs=(20, 60)),
}


def student(channels: int, classes: int, widths: tuple[int, int, int]) -> nn.Module:
    """Three convolutions, the first two with stride 2, a pool and a linear classifier."""
    a, b, c = widths
    return nn.Sequential(conv_block(channels, a, 2), conv_block(a, b, 2), conv_block(b, c), pooled_head(c, classes))


def rules(tau: float) -> dict[str, Callable[[], LearningRule | None]]:
    """Fresh rules by arm; `None` is backprop by labels."""
    return {
        "labels": lambda: None,
        "kd": lambda: OneHead(kd_loss, 4.0),
        "logits": lambda: OneHead(binary_kl_norm, tau, labels=0.0),
        "one_head": lambda: OneHead(binary_kl_norm, tau),
        "linear": lambda: DHKD(None, tau=tau, aux="linear"),
        "mlp": lambda: DHKD(None, tau=tau, aux="mlp"),
        "aligned": lambda: DHKD(None, tau=tau, aux="mlp", gradient_alignment=True),
    }


def train(
    run: Run[Settings], data: DataSplits, net: nn.Module, epochs: int, rule: LearningRule | None = None,
    v: Tensor | None = None, scheduler: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a network, by labels or with a teacher's logits `v`: test accuracy in percent."""
    x, y = data.train.tensors
    batches = (x, y) if rule is None or v is None else (x, v, y)
    optimizer = sgd(run.settings.lr, weight_decay=5e-4)
    fit(
        net, batches, rule=rule, optimizer=optimizer, scheduler=scheduler, epochs=epochs, batch_size=64,
        drop_last=len(x) % 64 == 1, seed=run.seed, device=run.device,
    )  # fmt: skip
    return {"accuracy": tasks.accuracy(net, data.test)}


def learn(run: Run[Settings], data: DataSplits, epochs: int, widths: Any, name: str, v: Tensor) -> dict[str, Any]:
    """One student, and where both losses were on one head their conflict there."""
    torch.manual_seed(run.seed)
    net = student(data.shape[0], data.num_classes, widths)
    scores = train(run, data, net, epochs, rules(run.settings.tau)[name.removesuffix("_permuted")](), v, cosine())
    scores |= etf_deviation(net[-1][-1].weight)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    if name == "one_head":
        found = head_conflict(net, (*data.train.tensors[:1], v, data.train.tensors[1]), tau=run.settings.tau)
        scores |= {"head": found.head, "backbone": found.backbone}
    return scores


def teach(
    run: Run[Settings], data: DataSplits, net: Callable[[], nn.Module], epochs: int, converged: bool
) -> dict[str, Any]:
    """A teacher's test accuracy, and its logits on the training examples in float32."""
    torch.manual_seed(run.seed)
    teacher = net()
    scores = train(run, data, teacher, epochs, scheduler=cosine() if converged else None)
    return {**scores, "logits": outputs(teacher, data.train)}


def run(run: Run[Settings]) -> None:
    """Teachers first, then every student under each of them."""
    s = run.settings
    digits, photos = (
        run.data(name, train_size=size[0], image_size=size[1], test_size=s.test_size, val=500 if size[1] else 100)
        for name, size in ((s.digits, s.digits_size), (s.photos, s.photos_size))
    )
    convnet = lambda: ConvNet(digits.num_classes, digits.shape[0], (16, 32, 32))  # noqa: E731
    residual = lambda: ResNetCIFAR(8, in_channels=photos.shape[0], num_classes=photos.num_classes)  # noqa: E731
    teachers = {
        "strong": (digits, convnet, s.strong_epochs, s.epochs[0], (3, 6, 12)),
        "weak": (photos, residual, s.weak_epochs, s.epochs[1], (6, 12, 24)),
        "good": (photos, residual, s.good_epochs, s.epochs[1], (6, 12, 24)),
    }
    done: dict[str, dict[str, Any]] = {}
    for kind, (data, net, lessons, epochs, widths) in teachers.items():
        taught = run.arm(f"{kind}_teacher", teach, run, data, net, lessons, kind != "weak")
        done[f"{kind}_teacher"], v = taught, torch.as_tensor(taught["logits"])
        for name in rules(s.tau):
            if kind != "good" or name in GOOD:
                done[f"{kind}_{name}"] = run.arm(f"{kind}_{name}", learn, run, data, epochs, widths, name, v)
        if kind == "strong":
            order = torch.randperm(len(v), generator=run.generator())
            done["strong_permuted"] = run.arm(
                "strong_permuted", learn, run, data, epochs, widths, "mlp_permuted", v[order]
            )
    report(run, {name: arm["accuracy"] for name, arm in done.items()}, done)


def report(run: Run[Settings], accuracy: dict[str, float], done: dict[str, dict[str, Any]]) -> None:
    """The values of the claims."""
    conflict = {f"{k}_{part}": done[f"{k}_one_head"][part] for k in ("strong", "weak") for part in ("head", "backbone")}
    run.values("conflict", conflict)
    good = {f"good_{n}": accuracy[f"good_{n}"] for n in ("teacher", *GOOD)}
    weak = {n: accuracy[f"weak_{n}"] for n in ("teacher", "labels", "kd", "one_head", "linear", "aligned")}
    run.values("two_heads", dhkd=accuracy["weak_mlp"], **weak, **good)
    strong = {n: accuracy[f"strong_{n}"] for n in ("teacher", "labels", "kd", "one_head", "linear", "aligned")}
    run.values("gain", dhkd=accuracy["strong_mlp"], **strong)
    run.values("negative_control", permuted=accuracy["strong_permuted"], labels=accuracy["strong_labels"])


def figures(results: Results) -> plots.Figures:
    """Accuracy of every student under each teacher."""
    names = {
        "labels": "labels", "kd": "KD", "logits": "logits", "one_head": "one head", "linear": "DHKD, linear",
        "mlp": "DHKD, mlp", "aligned": "DHKD, aligned",
    }  # fmt: skip
    made = {}
    for kind in ("strong", "weak", "good"):
        arms = {text: (f"{kind}_{n}", "accuracy") for n, text in names.items() if kind != "good" or n in GOOD}
        made[f"{kind} teacher"] = plots.bars(results, arms, ylabel="test accuracy (%)")
    return made
